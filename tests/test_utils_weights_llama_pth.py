"""utils/weights/llama_pth.py: Meta's files, computed as Meta computes, say what the converted model says.

python -m pytest tests/test_utils_weights_llama_pth.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_texts
from torch.nn import functional

from utils.weights.layouts import open_weights
from utils.weights.llama_pth import load_llama_tokenizer, open_llama
from utils.weights.merging import assemble, materialize

PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5}
VOCAB, HIDDEN, HEAD = 320, 96, 16
# Meta's name -> (shape, dimension that is split over devices).
SHAPES = {
    "attention.wq.weight": ((64, 64), 0),
    "attention.wk.weight": ((32, 64), 0),
    "attention.wv.weight": ((32, 64), 0),
    "attention.wo.weight": ((64, 64), 1),
    "feed_forward.w1.weight": ((HIDDEN, 64), 0),
    "feed_forward.w2.weight": ((64, HIDDEN), 1),
    "feed_forward.w3.weight": ((HIDDEN, 64), 0),
    "attention_norm.weight": ((64,), None),
    "ffn_norm.weight": ((64,), None),
}


def make_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {f"layers.{layer}.{name}": shape for layer in range(2) for name, (shape, _) in SHAPES.items()}
    shapes |= {"tok_embeddings.weight": (VOCAB, 64), "norm.weight": (64,), "output.weight": (VOCAB, 64)}
    return {name: torch.randn(shape) * (0.15 if len(shape) == 2 else 1) for name, shape in shapes.items()}


def write(weights: dict[str, torch.Tensor], folder: Path, parts: int) -> None:
    """Splits weights over devices as Meta's files are."""
    dims = {name: dim for name, (_, dim) in SHAPES.items()} | {"norm": None, "output": 0, "tok_embeddings": 1}
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": -1}))
    for part in range(parts):
        split = {"rope.freqs": torch.zeros(HEAD // 2)}
        for name, tensor in weights.items():
            key = name.split(".", 2)[2] if name.startswith("layers") else name.removesuffix(".weight")
            dim = dims[key]
            split[name] = tensor if dim is None else tensor.chunk(parts, dim)[part].clone()
        torch.save(split, folder / f"consolidated.{part:02}.pth")


def meta_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """(L, V) logits by Meta's formulas: neighbouring pairs of a head's numbers are turned as complex numbers."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + PARAMS["norm_eps"]) * weight

    length = len(ids)
    angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(length, -1, HEAD // 2, 2))
        return torch.view_as_real(pairs * turns).flatten(2)

    x, causal = weights["tok_embeddings.weight"][ids], torch.full((length, length), float("-inf")).triu(1)
    for layer in range(2):
        w = {name: weights[f"layers.{layer}.{name}"] for name in SHAPES}
        h = norm(x, w["attention_norm.weight"])
        q = turned((h @ w["attention.wq.weight"].T).view(length, 4, HEAD))
        k = turned((h @ w["attention.wk.weight"].T).view(length, 2, HEAD)).repeat_interleave(2, 1)
        v = (h @ w["attention.wv.weight"].T).view(length, 2, HEAD).repeat_interleave(2, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD**0.5 + causal
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["attention.wo.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        gate = functional.silu(h @ w["feed_forward.w1.weight"].T) * (h @ w["feed_forward.w3.weight"].T)
        x = x + gate @ w["feed_forward.w2.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].T


@pytest.mark.parametrize("parts", [1, 2], ids=["7B", "13B"])
def test_logits_are_metas(tmp_path: Path, parts: int) -> None:
    weights = make_weights()
    write(weights, tmp_path / "meta", parts)
    model = materialize(assemble(tmp_path / "meta", torch.float32, None, [], False), torch.float32)
    ids = torch.arange(7, 57)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    assert (logits - meta_logits(weights, ids)).abs().max() < 1e-4
    assert model.config.max_position_embeddings == 4096 and model.config.num_key_value_heads == 2
    stored = open_weights(tmp_path / "meta")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(stored.read(slice(3, 5)), stored.read()[3:5])


def test_what_is_no_llama(tmp_path: Path) -> None:
    weights = make_weights()
    del weights["layers.1.attention.wo.weight"]
    write(weights, tmp_path / "meta", 1)
    with pytest.raises(ValueError, match=r"do not agree on layers.1.attention.wo.weight"):
        open_llama([tmp_path / "meta/consolidated.00.pth"])
    for changes, says in (
        ({"n_layers": 1}, "do not agree on layers.1"),
        ({"n_layers": "2"}, "does not say n_layers"),
        ({"norm_eps": None, "dim": 0}, "does not say dim, norm_eps"),
        ({"vocab_size": 128_256}, "it is a Llama 3"),
    ):
        (tmp_path / "meta/params.json").write_text(json.dumps(PARAMS | changes))
        with pytest.raises(ValueError, match=says):
            open_llama([tmp_path / "meta/consolidated.00.pth"])
    (tmp_path / "meta/params.json").unlink()
    with pytest.raises(FileNotFoundError):
        open_llama([tmp_path / "meta/consolidated.00.pth"])


def test_tokens_are_sentencepieces(tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("\n".join(example_texts()[:400]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=900, model_type="bpe", byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        user_defined_symbols=["▁▁"],
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    (tmp_path / "model").mkdir()
    tokenizer: Any = load_llama_tokenizer(tmp_path / "model")  # Meta puts it beside the models' folders.
    # At the beginning of a text transformers adds no space before spaces.
    for line in [*(text.strip() for text in example_texts()[400:600]), "a  b   c", "一二 三\t四", "🐱 is a cat"]:
        assert tokenizer.encode(line, add_special_tokens=False) == pieces.encode(line), line
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2
    (tmp_path / "tokenizer.model").write_text("IQ== 0\n")
    with pytest.raises(ValueError, match="Llama 3 has another one"):
        load_llama_tokenizer(tmp_path / "model")
