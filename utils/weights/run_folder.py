"""A training run's folder: its checkpoints and records are checked and loaded as a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from utils.files import check_manifest, explained, read_json, reason_of, shown
from utils.weights.adapters import read_adapter
from utils.weights.layouts import open_weights
from utils.weights.lazy import weights_digest
from utils.weights.loading import DTYPES
from utils.weights.merging import ModelParts, assemble, materialize
from utils.weights.probe import PROBE_PLACES
from utils.weights.shards import open_shards
from utils.weights.skeleton import cast_lazy, check_shapes


def check_base(base: Path, record: dict[str, Any]) -> None:
    """Makes sure that a base is the one that a run was trained on.

    Raises:
        OSError, ValueError: if it is not, or not whole.
    """
    expected = record["settings"].get("base")  # Runs of earlier versions do not say.
    if expected and weights_digest(open_weights(base)) != expected:
        raise ValueError("its weights are not those that the run was trained on.")


def check_tag(run: Path, tag: str, trust_checkpoint: bool = False) -> dict[str, Any]:
    """Makes sure that a checkpoint is there and whole.

    Args:
        run: The run's folder.
        tag: The checkpoint's name.
        trust_checkpoint: Whether it need not be known to be whole.

    Returns:
        Its run.json.

    Raises:
        SystemExit: naming the checkpoints that exist.
    """
    folder = run / tag
    if len(Path(tag).parts) != 1 or not (folder / "run.json").is_file():
        tags = sorted(path.name for path in run.glob("[!.]*") if (path / "run.json").is_file())
        near = sorted({shown(path.parent.parent) for path in run.parent.glob("*/*/run.json")})
        there = f"Checkpoints there: {', '.join(tags)}." if tags else f"Runs nearby: {', '.join(near) or 'none'}."
        raise SystemExit(f"No checkpoint {tag!r} in {shown(run)}. {there}")
    if not trust_checkpoint:
        check_manifest(folder)
    return read_record(folder / "run.json")


def read_record(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's run.json.

    Raises:
        SystemExit: if it is not a record as training runs write it.
    """
    try:
        record = read_json(path)
        settings, data, progress = record["settings"], record["data"], record["progress"]
        texts = (settings["model_name"], settings.get("base", ""), record["chat_template"], data["system_prompt"])
        sound = (
            settings["tuner"] in ("lora", "full")
            and settings["precision"] in DTYPES
            and settings["quant_bits"] in (None, 4)
            and settings["zero_stage"] in (0, 1, 2, 3)
            and all(isinstance(text, str) for text in texts)
            and all(isinstance(digest, str) for digest in data["files"].values())
            and all(isinstance(data[name], int) for name in ("train_samples", "test_samples"))
            and all(isinstance(progress[name], int) for name in ("step", "best_step"))
            and isinstance(progress["best_eval_loss"], float | None)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise SystemExit(f"{shown(path)} is damaged: it is not what a training run writes. Use another checkpoint.")
    return record


def read_probe(path: Path) -> dict[str, torch.Tensor]:
    """Reads a checkpoint's probe.

    Raises:
        SystemExit: if it is none.
    """
    from safetensors.torch import load_file

    try:
        probe = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"{shown(path)} is damaged ({error}). Use another checkpoint.") from error
    prompts = [tensor for name, tensor in sorted(probe.items()) if name.startswith("input_ids_")]
    logits = [tensor for name, tensor in sorted(probe.items()) if name.startswith("logits_")]
    sound = 0 < len(prompts) == len(logits) == len(probe) / 2 and all(
        ids.dtype == torch.int64
        and ids.ndim == 1
        and said.ndim == 2
        and said.is_floating_point()
        and len(said) == min(PROBE_PLACES, len(ids))
        and 0 <= ids.min() <= ids.max() < said.shape[1] == logits[0].shape[1]
        and bool(torch.isfinite(said).all())
        for ids, said in zip(prompts, logits, strict=True)
    )
    if not sound:
        raise SystemExit(f"{shown(path)} is damaged: it is not what a training run writes. Use another checkpoint.")
    return probe


@contextmanager
def base_in_use(base: Path, record: dict[str, Any]) -> Iterator[None]:
    """Turns what the libraries say about a base that is not whole, or not the run's, into what to do.

    Args:
        base: The base model's folder, which the block loads.
        record: From `check_tag`.

    Raises:
        SystemExit: in place of their errors.
    """
    try:
        yield
    except Exception as error:  # Libraries raise all kinds of errors on damaged files.
        name = record["settings"]["model_name"]
        raise SystemExit(
            f"{shown(base)} cannot be used as the base: {reason_of(error)}\nThe run was trained on {name}. Name the "
            f"folder of that model, or fetch it again: python download_pt.py --model {name}"
        ) from error


def load_trained(run: Path, tag: str, record: dict[str, Any], base: Path, trust_remote_code: bool) -> torch.nn.Module:
    """Loads a checkpoint's model, its adapter merged, in the precision that it was trained in; as `as_trained`."""
    trained = as_trained(run, tag, record, base, trust_remote_code=trust_remote_code)
    return materialize(trained, DTYPES[record["settings"]["precision"]])


def as_trained(
    run: Path,
    tag: str,
    record: dict[str, Any],
    base: Path,
    base_kind: str = "dequant4",
    trust_remote_code: bool = False,
    trust_checkpoint: bool = False,
) -> ModelParts:
    """Finds the parts of the model that the training run computed with, adapters not merged.

    Args:
        run: The run's folder.
        tag: One of its checkpoints.
        record: From `check_tag`.
        base: The base model's folder.
        base_kind: Of a 4-bit run: "dequant4" is the base that was trained on, "original" the base's own weights in
            fp32.
        trust_remote_code: Whether the model's own Python code may run.
        trust_checkpoint: Whether reading the checkpoint's files may run code.

    Raises:
        SystemExit: if the base is not whole, or not the run's, or the checkpoint cannot be read.
    """
    settings = record["settings"]
    dtype, bits = DTYPES[settings["precision"]], settings["quant_bits"]
    if bits and base_kind == "original":
        dtype, bits = torch.float32, None
    adapters, weights = [], {}
    if settings["tuner"] != "full":
        with explained(f"{shown(run / tag / 'adapter')} cannot be used"):
            adapters = [read_adapter(run / tag / "adapter")]
    else:
        with explained(f"{shown(run / tag)} cannot be used"):
            weights = open_shards(run / tag, settings["zero_stage"], trust_checkpoint)
    with base_in_use(base, record):
        check_base(base, record)
        trained = assemble(base, dtype, bits, adapters, trust_remote_code)
        if adapters:
            return trained
        shells = trained.model.state_dict()
        parameters = {name for name, _ in trained.model.named_parameters()}
        if differing := sorted((parameters ^ (weights.keys() & shells.keys())) - set(trained.ties)):
            raise ValueError(f"{differing[0]} is not in both the base and the run.")
        weights = {name: cast_lazy(weights[name], dtype) for name in parameters}
        check_shapes(shells, weights)
        return trained._replace(weights=trained.weights | weights)
