"""utils/train/memory.py: what a run is said to need is what it takes.

python -m pytest tests/test_utils_train_memory.py
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model

from utils.train.memory import needed_bytes, report_embeddings, report_needs
from utils.weights.loading import add_lora, count_parameters, load_model

KINDS = ("llama", "qwen2", "gemma3", "mistral")


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


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_whole_embeddings_take(
    model_dir: Path, needs_args: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, precision: str
) -> None:
    """The line says by how much the estimate with them is larger, tied or not, and offers the new rows if there are."""
    path = tmp_path / "model"
    shutil.copytree(model_dir / "tiny" / kind, path)

    def more(asked: str) -> int:
        args = [needs_args(train_embeddings=one, train_only=None) for one in ("none", asked)]
        needs = [needed_bytes(path, one, None, precision) for one in args]
        return sum(needs[1][name] - needs[0][name] for name in ("weights", "gradients and optimizer"))

    whole = more("all")
    monkeypatch.setattr("utils.train.memory.GIB", 1)
    assert report_embeddings(path, False, precision) == f"Of it ~{whole:.2f} GiB for embedding and output head."
    made = {"vocabulary": {"first_new_id": 700, "new_tokens": 100}}
    (path / "run.json").write_text(json.dumps(made), encoding="utf-8")
    rows, line = more("new_rows"), report_embeddings(path, False, precision)
    assert f"~{whole:.2f} GiB" in line and f"100 new tokens' rows alone: ~{rows:.2f} GiB" in line
