"""utils/export/gguf_file.py: llama.cpp itself says what transformers says.

python -m pytest tests/test_utils_export_gguf_file.py
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import llama_cpp, make_model, make_tokenizer
from gguf import GGUFReader, dequantize
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
)

from utils.data.chat import Chat, make_chat
from utils.export import gguf_file
from utils.export.gguf_file import write_gguf

GEMMA = dict(num_hidden_layers=7, layer_types=None, query_pre_attn_scalar=16)
GEMMA4 = dict(
    hidden_size_per_layer_input=16, vocab_size_per_layer_input=800, global_head_dim=32, num_kv_shared_layers=0,
    sliding_window=16, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
# Name -> (model, settings).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral, window": ("mistral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3.5": ("qwen3_5", {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_value_heads": 6}),
    "gemma4": ("gemma4", GEMMA4),
    "gemma4, shared": (
        "gemma4",
        GEMMA4
        | dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2)
        | dict(use_double_wide_mlp=True, final_logit_softcapping=30.0),
    ),
    "gemma3": ("gemma3", GEMMA),
    "gemma3, linear": (
        "gemma3",
        GEMMA
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            }
        },
    ),
}


@pytest.fixture
def chat(tokenizer: Any) -> Chat:
    """Of the tests' tokenizer."""
    return make_chat(tokenizer)


def make_folder(folder: Path, tokenizer: Any, kind: str, **settings: Any) -> torch.nn.Module:
    """Writes a model in bf16 whose norms and biases are not just ones and zeros; returns it in fp32."""
    model = make_model(kind, len(tokenizer), **settings)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += torch.randn(weight.shape) * 0.2
    model.bfloat16().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def distances(model: torch.nn.Module, path: Path, tokenizer: Any) -> list[float]:
    """How far llama.cpp's 20 most likely tokens are from transformers' log-probs, for prompts of 12 to 100 tokens."""
    torch.manual_seed(1)
    found = []
    with llama_cpp(path) as ask:
        for length in (12, 57, 100):
            ids = torch.randint(10, len(tokenizer), (length,)).tolist()
            with torch.no_grad():
                expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            # After half a letter llama.cpp would wait for the rest; what it is made to write does not change log-probs.
            letter = [[tokenizer.encode("a")[0], 100.0]]
            said = ask("/completion", prompt=ids, n_predict=1, n_probs=20, temperature=0, logit_bias=letter)
            top = said["completion_probabilities"][0]["top_logprobs"]
            found.append(max(abs(expected[one["id"]].item() - one["logprob"]) for one in top))
            assert {one["id"] for one in top[:3]} <= set(expected.topk(5).indices.tolist())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_says_what_transformers_says(tmp_path: Path, tokenizer: Any, chat: Chat, name: str) -> None:
    """Matrices are exact in bf16; what is left is llama.cpp's rounding of activations."""
    kind, settings = MODELS[name]
    model = make_folder(tmp_path / "model", tokenizer, kind, **settings)
    write_gguf(tmp_path / "model", chat, "bf16", "test", tmp_path / "model.gguf")
    assert max(distances(model, tmp_path / "model.gguf", tokenizer)) < 0.1


@pytest.mark.parametrize("mistake", ["heads", "shift", "order"])
def test_the_comparison_sees_mistakes(
    tmp_path: Path, tokenizer: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """Rows or heads in transformers' order, or Gemma's norms without their 1, are found by the test above."""
    kind, settings = MODELS[{"heads": "llama", "shift": "gemma3", "order": "qwen3.5"}[mistake]]
    model = make_folder(tmp_path / "model", tokenizer, kind, **settings)
    right = gguf_file.gguf_parts

    def wrong(*given: Any) -> list[tuple[str, Any]]:
        if mistake != "order":
            return [(name, part._replace(**{mistake: 0})) for name, part in right(*given)]
        return [(name, part._replace(change=None) if "attn_gate" in name else part) for name, part in right(*given)]

    monkeypatch.setattr(gguf_file, "gguf_parts", wrong)
    write_gguf(tmp_path / "model", chat, "bf16", "test", tmp_path / "model.gguf")
    with pytest.raises(AssertionError):
        assert max(distances(model, tmp_path / "model.gguf", tokenizer)) < 0.1


@pytest.mark.parametrize(("kind", "part"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 254 + 2**-11)])
def test_numbers_are_rounded_to_the_kind(tmp_path: Path, tokenizer: Any, chat: Chat, kind: str, part: float) -> None:
    """Read back by gguf, each matrix is as near as the kind's step; rows that 8-bit blocks do not fit are in 16."""
    model = make_model("qwen2", len(tokenizer), hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    model.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", chat, kind, "test", tmp_path / "model.gguf")
    read = {one.name: one for one in GGUFReader(tmp_path / "model.gguf").tensors}
    down, gate = read["blk.1.ffn_down.weight"], read["blk.1.ffn_gate.weight"]
    assert down.tensor_type.name == kind.upper()
    assert gate.tensor_type.name == ("F16" if kind == "q8_0" else kind.upper())
    assert read["output_norm.weight"].tensor_type.name == "F32"
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    # The largest of a block of 32 sets the step of 8 bits; 16 bits have their own step for each number.
    scale = np.abs(weight).reshape(-1, 32).max(1).repeat(32).reshape(weight.shape) if kind == "q8_0" else np.abs(weight)
    assert (np.abs(dequantize(down.data, down.tensor_type) - weight) <= part * scale * 1.01).all()


def test_eight_bits_in_llama_cpp(tmp_path: Path, tokenizer: Any, chat: Chat) -> None:
    """It is the same model, a little less exact."""
    model = make_folder(tmp_path / "model", tokenizer, "qwen3", head_dim=32)
    write_gguf(tmp_path / "model", chat, "q8_0", "test", tmp_path / "model.gguf")
    assert max(distances(model, tmp_path / "model.gguf", tokenizer)) < 0.5


def test_large_numbers_are_refused_in_f16(tmp_path: Path, tokenizer: Any, chat: Chat) -> None:
    """fp16 would make infinity of them."""
    model = make_model("llama", len(tokenizer))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = 1e5
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="use --gguf bf16 or q8_0"):
        write_gguf(tmp_path / "model", chat, "f16", "test", tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gemma2", {}, "this is Gemma2ForCausalLM"),
        ("llama", {"hidden_act": "gelu"}, "its activation function is gelu"),
        ("gemma3", {"query_pre_attn_scalar": 16}, "other layers than each sixth"),
        ("gemma3", GEMMA | {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
        ("gemma3", GEMMA | {"final_logit_softcapping": 30.0}, "logits are capped"),
        ("qwen3", {"attention_bias": True}, "its attention has biases"),
        ("qwen3_5", {"linear_value_head_dim": 32}, "keys and values of linear attention differ in size"),
        ("qwen3_5", {"layer_types": ["full_attention", "linear_attention"]}, "that see all are not each n-th"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
        ("qwen2", {"rope_parameters": YARN | {"beta_fast": 16}}, "rope_parameters"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(
    tmp_path: Path, tokenizer: Any, chat: Chat, kind: str, settings: dict[str, Any], reason: str
) -> None:
    """In a sentence, and before a file is there."""
    make_model(kind, len(tokenizer), **settings).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=reason):
        write_gguf(tmp_path / "model", chat, "bf16", "test", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_context_is_no_longer_than_a_window(tmp_path: Path, tokenizer: Any, chat: Chat) -> None:
    """llama.cpp lets layers of Mistral see all; within the window that is the same."""
    make_model("mistral", len(tokenizer)).save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", chat, "bf16", "test", tmp_path / "model.gguf")
    assert GGUFReader(tmp_path / "model.gguf").fields["llama.context_length"].contents() == 16


def test_gemma_3_with_eyes(tmp_path: Path, tokenizer: Any) -> None:
    """Of the larger ones the text's part is written. Their tokenizer has a token for pictures and no row for it."""
    text = make_model("gemma3", len(tokenizer), **GEMMA).config
    eyes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = Gemma3Config(text_config=text, vision_config=eyes | {"patch_size": 14})
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    words = make_tokenizer()
    words.add_tokens(["<image_soft_token>"], special_tokens=True)
    assert words.convert_tokens_to_ids("<image_soft_token>") == len(tokenizer)
    write_gguf(tmp_path / "model", make_chat(words), "bf16", "test", tmp_path / "model.gguf")
    assert max(distances(model, tmp_path / "model.gguf", tokenizer)) < 0.1


def test_gemma_4_as_it_is_published(tmp_path: Path, tokenizer: Any, chat: Chat) -> None:
    """The text's part of a model that takes pictures and sound."""
    text = make_model("gemma4", len(tokenizer), **GEMMA4, pad_token_id=0).config
    torch.manual_seed(0)
    Gemma4ForConditionalGeneration(Gemma4Config(text_config=text)).bfloat16().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(model).__name__ == "Gemma4ForConditionalGeneration"
    write_gguf(tmp_path / "model", chat, "bf16", "test", tmp_path / "model.gguf")
    assert max(distances(model, tmp_path / "model.gguf", tokenizer)) < 0.1


def test_larger_embeddings_than_tokenizers(tmp_path: Path, tokenizer: Any, chat: Chat) -> None:
    """Rows without a token, as Qwen's models have, get names that no text has; too few rows are refused."""
    model = make_model("qwen2", len(tokenizer) + 40)
    model.bfloat16().save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", chat, "bf16", "test", tmp_path / "model.gguf")
    with llama_cpp(tmp_path / "model.gguf") as ask:
        assert ask("/tokenize", content="今天[PAD805]")["tokens"] == tokenizer.encode("今天[PAD805]")
    make_model("qwen2", len(tokenizer) - 1).save_pretrained(tmp_path / "small")  # The last is a piece of text.
    with pytest.raises(ValueError, match="more tokens than the embedding"):
        write_gguf(tmp_path / "small", chat, "bf16", "test", tmp_path / "small.gguf")


def test_stop_tokens_end_a_text(tmp_path: Path, tokenizer: Any, chat: Chat) -> None:
    """The template's stop token is known to llama.cpp even where the tokenizer's own end is another one."""
    make_model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    assert chat.stop_id != tokenizer.eos_token_id
    write_gguf(tmp_path / "model", chat, "bf16", "test", tmp_path / "model.gguf")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == chat.stop_id
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    other = replace(chat, stop_id=tokenizer.eos_token_id)
    write_gguf(tmp_path / "model", other, "bf16", "test", tmp_path / "other.gguf")
    assert "tokenizer.ggml.eot_token_id" not in GGUFReader(tmp_path / "other.gguf").fields
