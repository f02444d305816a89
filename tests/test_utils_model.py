"""utils/model.py: what is estimated and counted, against models that are really built.

python -m pytest tests/test_utils_model.py
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, make_model

from utils.data import PLAIN_TEMPLATE
from utils.model import (
    add_lora,
    attention_windows,
    count_parameters,
    load_model,
    load_tokenizer,
    needed_bytes,
    report_needs,
    scale_early,
)

KINDS = ("llama", "qwen2", "gemma3", "mistral")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_load_tokenizer_keeps_the_models_template(model_dir: Path) -> None:
    assert load_tokenizer(model_dir / "tiny/qwen2").chat_template == CHATML


def test_load_tokenizer_takes_another_template(model_dir: Path) -> None:
    assert load_tokenizer(model_dir / "tiny/qwen2", chat_template="{{ messages }}").chat_template == "{{ messages }}"


def test_load_tokenizer_of_a_base_model(tokenizer: Any, tmp_path: Path) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == PLAIN_TEMPLATE
    messages = [
        {"role": "system", "content": "设定"},
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答"},
    ]
    assert loaded.apply_chat_template(messages, tokenize=False) == (
        "设定\n\n### User:\n问\n\n### Assistant:\n答<|endoftext|>\n\n"
    )
    assert loaded.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True) == (
        "### User:\n问\n\n### Assistant:\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Attention windows


@pytest.mark.parametrize(
    ("kind", "changes", "windows"),
    [
        ("llama", {}, {"full_attention": None}),
        ("qwen2", {}, {"full_attention": None}),
        ("mistral", {}, {"sliding_attention": 16}),
        ("gemma3", {}, {"full_attention": None, "sliding_attention": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
         {"full_attention": None, "sliding_attention": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, {"sliding_attention": 8}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, {"full_attention": None}),
    ],
)  # fmt: skip
def test_attention_windows(kind: str, changes: dict[str, Any], windows: dict[str, int | None]) -> None:
    """Seen in the model, too: a change of the first token reaches the last one only where a layer sees so far."""
    model = make_model(kind, 100, **changes).eval()
    assert attention_windows(model.config) == windows
    ids = torch.arange(40)[None] + 10
    other = ids.clone()
    other[0, 0] = 99
    with torch.no_grad():
        reached = not torch.equal(model(input_ids=ids).logits[0, -1], model(input_ids=other).logits[0, -1])
    assert reached == (None in windows.values())


# ---------------------------------------------------------------------------------------------------------------------
# Counts and needs


@pytest.fixture
def needs_args() -> Callable[..., argparse.Namespace]:
    def build(**changes: Any) -> argparse.Namespace:
        values = {
            "tuner": "lora",
            "lora_r": 8,
            "lora_dropout": 0.0,
            "pack_tokens": 512,
            "share_prefix": False,
            "gradient_checkpointing": False,
            "trust_remote_code": False,
        }
        return argparse.Namespace(**(values | changes))

    return build


def stored_bytes(model: torch.nn.Module) -> int:
    """The bytes of a model's weights as they lie in memory, tied ones once, and NF4's scales with them."""
    total = 0
    for weight in model.parameters():
        total += weight.numel() * weight.element_size()
        if state := getattr(weight, "quant_state", None):
            scales = [state.absmax, state.state2.absmax]
            total += sum(tensor.numel() * tensor.element_size() for tensor in scales)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_count_parameters(kind: str) -> None:
    """LoRA adds r x (in + out) weights to each of the seven linear layers of a block."""
    model = make_model(kind, 800)
    whole = sum({id(weight): weight.numel() for weight in model.parameters()}.values())
    assert count_parameters(model) == (whole, whole)
    hidden, mlp, queries, keys = 64, 128, 64, 32
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    layers = [*attention, (hidden, mlp), (hidden, mlp), (mlp, hidden)]
    lora = 2 * sum(8 * (n_in + n_out) for n_in, n_out in layers)
    assert count_parameters(add_lora(model, 8, 16, 0.0, "all-linear")) == (lora, whole + lora)


def test_add_lora_to_named_layers() -> None:
    model = add_lora(make_model("llama", 800), 4, 8, 0.0, "q_proj,v_proj")
    trained = {name.split(".")[-4] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("changes", "variants"),
    [({}, {"ScaledEarly"}), ({"use_dora": True}, {"DoraLinearVariant"}), ({"lora_bias": True}, set())],
    ids=["lora", "dora", "bias"],
)
def test_scale_early_changes_no_function(changes: dict[str, bool], variants: set[str]) -> None:
    """Against PEFT's own forward, with a scale that is no power of two, two adapters, and those that are left alone."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **changes)
    model = get_peft_model(make_model("qwen2", 800), config)
    model.add_adapter("other", config)
    ids = torch.arange(3, 23)[None]

    def outcome() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        return logits.detach(), [weight.grad for weight in model.parameters() if weight.grad is not None]

    plain = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        plain[name] = outcome()
    scale_early(model)
    layers = [module for module in model.modules() if hasattr(module, "lora_variant")]
    assert {type(variant).__name__ for layer in layers for variant in layer.lora_variant.values()} == variants
    for name, (logits, gradients) in plain.items():
        model.set_adapter(name)
        ours, own_gradients = outcome()
        torch.testing.assert_close(ours, logits)
        torch.testing.assert_close(own_gradients, gradients, rtol=1e-4, atol=1e-7)
    if not changes:
        with pytest.raises(NotImplementedError, match="loaded anew"):
            model.merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_needed_bytes_of_weights(model_dir: Path, needs_args: Any, kind: str, precision: str) -> None:
    needs = needed_bytes(model_dir / "tiny" / kind, needs_args(), None, precision)
    model = load_model(model_dir / "tiny" / kind, torch.float32 if precision == "fp32" else torch.bfloat16)
    assert needs["weights"] == stored_bytes(model)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_needed_bytes_of_4_bit_weights(model_dir: Path, needs_args: Any, kind: str) -> None:
    """Small layers have relatively more scales than large ones, hence the tenth."""
    path = model_dir / "tiny" / kind
    needs = needed_bytes(path, needs_args(), 4, "bf16")
    model = load_model(path, torch.bfloat16, quant_bits=4)
    assert needs["weights"] == pytest.approx(stored_bytes(model), rel=0.1)
    assert count_parameters(model)[1] == count_parameters(make_model(kind, 800))[1], "counted as what they stand for"


@pytest.mark.parametrize("kind", KINDS)
def test_needed_bytes_of_training(model_dir: Path, needs_args: Any, kind: str) -> None:
    """fp32: a gradient and AdamW's two moments of every trainable weight, as a real step leaves them."""
    path = model_dir / "tiny" / kind
    for tuner in ("lora", "full"):
        model = load_model(path, torch.float32)
        if tuner == "lora":
            model = add_lora(model, 8, 16, 0.0, "all-linear")
        trainable = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trainable)
        model(input_ids=torch.arange(9)[None]).logits.sum().backward()
        optimizer.step()
        moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
        real = sum(tensor.numel() * 4 for tensor in [*moments, *(weight.grad for weight in trainable)])
        assert needed_bytes(path, needs_args(tuner=tuner), None, "fp32")["gradients and optimizer"] == real


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_needed_bytes_of_activations(model_dir: Path, needs_args: Any, kind: str) -> None:
    """Within a factor of three of what autograd keeps for a pack, and less with checkpointing."""
    path = model_dir / "tiny" / kind
    model = add_lora(load_model(path, torch.float32), 8, 16, 0.0, "all-linear")
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    tokens = 512
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(input_ids=torch.arange(tokens)[None] % 800, logits_to_keep=tokens // 4, use_cache=False)
        loss = torch.nn.functional.cross_entropy(out.logits[0], torch.zeros(tokens // 4, dtype=torch.long))
    real = sum(size for place, size in kept.items() if place not in weights)
    assert loss.requires_grad
    estimate = needed_bytes(path, needs_args(), None, "fp32")["activations"]
    assert real / 3 < estimate < real * 3
    assert needed_bytes(path, needs_args(gradient_checkpointing=True), None, "fp32")["activations"] < estimate


def test_report_needs(tmp_path: Path) -> None:
    gib = 1024**3
    needs = {"weights": 4 * gib, "gradients and optimizer": 8 * gib, "activations": gib, "checkpoints": 2**20}
    assert "~13.00 GiB" in report_needs(needs, tmp_path, ranks=4, ds_config={"zero_optimization": {"stage": 0}})
    assert "~7.00 GiB" in report_needs(needs, tmp_path, ranks=4, ds_config={"zero_optimization": {"stage": 2}})
    assert "~4.00 GiB" in report_needs(needs, tmp_path, ranks=4, ds_config={"zero_optimization": {"stage": 3}})
    with pytest.raises(SystemExit, match="--output_dir"):
        report_needs({**needs, "checkpoints": 2**60}, tmp_path, ranks=1, ds_config={"zero_optimization": {"stage": 0}})
