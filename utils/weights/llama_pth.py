"""Meta's own layout of Llama weights, consolidated.*.pth, read under the names and in the order that transformers uses.

Shapes: D width of the model, H its heads, R number of files (the model was split over R devices).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils.data.chat import PLAIN_TEMPLATE
from utils.files import read_json
from utils.weights.lazy import LazyTensor, load_pickle

# Meta's name -> (transformers' name, dimension along which files hold parts; None where each holds the whole).
TOP = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
IN_LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
LLAMA3_VOCAB = 128_256
FREQUENCIES = "rope.freqs"  # Computed today.


def llama_config(params: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Writes transformers' config.json for Meta's params.json.

    Args:
        params: Of the model.
        shapes: Of the whole tensors, by transformers' names.
    """
    vocab_size, width = shapes["model.embed_tokens.weight"]
    # None says how long texts may be; Code Llama turns positions slower, Llama 1 has the smaller epsilon.
    positions = 16384 if params.get("rope_theta") == 1e6 else 2048 if params["norm_eps"] < 5e-6 else 4096
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "max_position_embeddings": positions,
        "rms_norm_eps": params["norm_eps"],
        "rope_parameters": {"rope_theta": float(params.get("rope_theta", 10000.0)), "rope_type": "default"},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def open_llama(parts: list[Path]) -> dict[str, LazyTensor]:
    """Finds the tensors of a model in Meta's layout.

    Args:
        parts: Its consolidated.*.pth, in order; params.json lies beside them.

    Returns:
        Transformers' name -> whole tensor, with the rows of queries and keys in transformers' order: Meta turns pairs
        of neighbouring rows by an angle (RoPE, arXiv 2104.09864), transformers a row and the one half a head further.

    Raises:
        OSError: if params.json is missing.
        ValueError: if this is not a whole Llama.
    """
    params = read_params(parts[0].parent)
    names = dict(TOP)
    for layer in range(params["n_layers"]):
        for meta, (name, dim) in IN_LAYER.items():
            names[f"layers.{layer}.{meta}"] = (f"model.layers.{layer}.{name}", dim)
    opened = [load_pickle(part) for part in parts]
    weights = {}
    for one in opened:
        there = set(one) - {FREQUENCIES} if isinstance(one, Mapping) else set()
        if differing := sorted(there ^ set(names), key=str):
            raise ValueError(f"consolidated.*.pth and params.json do not agree on {differing[0]}.")
    for meta, (name, dim) in names.items():
        shape = list(opened[0][meta].shape)
        if dim is not None:
            shape[dim] = sum(one[meta].shape[dim] for one in opened)
        heads = {"wq": params["n_heads"], "wk": params["n_kv_heads"]}.get(meta.split(".")[-2])
        weights[name] = LazyTensor(tuple(shape), opened[0][meta].dtype, partial(_read, parts, meta, dim, heads))
    return weights


def read_params(folder: Path) -> dict[str, Any]:
    """Reads params.json.

    Raises:
        OSError: if there is none.
        ValueError: if it lacks what a model needs.
    """
    params = read_json(folder / "params.json")
    kinds = {"dim": int, "n_layers": int, "n_heads": int, "norm_eps": float}
    if wrong := [name for name, kind in kinds.items() if not isinstance(params.get(name), kind) or params[name] <= 0]:
        raise ValueError(f"params.json does not say {', '.join(wrong)}.")
    if params.get("vocab_size") == LLAMA3_VOCAB:
        raise ValueError(
            "it is a Llama 3, whose tokenizer is not read here. Take the model in transformers' format: "
            "python download_pt.py --model meta-llama/NAME"
        )
    return params | {"n_kv_heads": params.get("n_kv_heads") or params["n_heads"]}


def _read(parts: list[Path], meta: str, dim: int | None, heads: int | None, rows: slice | None = None) -> torch.Tensor:
    found = [load_pickle(part)[meta] for part in (parts if dim is not None else parts[:1])]
    tensor = torch.cat(found, dim or 0)
    if heads:
        height, width = tensor.shape
        tensor = tensor.view(heads, height // heads // 2, 2, width).transpose(1, 2).reshape(height, width)
    return tensor if rows is None else tensor[rows]


def load_llama_tokenizer(folder: Path) -> Any:
    """Makes a tokenizer of Llama 1 and 2 from Meta's tokenizer.model.

    Its merges follow the pieces' scores, as sentencepiece's do; transformers' own conversion goes by their ids, and so
    tokenizes several spaces in a row otherwise.

    Raises:
        ValueError: if there is none, or one of Llama 3.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    path = folder / "tokenizer.model"
    path = path if path.is_file() else folder.parent / path.name  # Meta's download puts it above the models' folders.
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(
            "tokenizer.model is missing or not sentencepiece's (Llama 3 has another one). Take the model in "
            "transformers' format: python download_pt.py --model meta-llama/NAME"
        ) from error
    vocab = {pieces.id_to_piece(number): number for number in range(len(pieces))}
    scores = {piece: pieces.get_score(number) for piece, number in vocab.items()}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores), add_bos_token=True)
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer
