"""What a training run left becomes a model again: adapters merged, ZeRO shards joined, fidelity probed.

Shapes: V vocabulary, K probed places of a prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from utils.data import Sample
from utils.files import check_manifest, shown
from utils.model import DTYPES, load_model, read_json

PROBE_PROMPTS = 4
PROBE_TOKENS = 256
PROBE_PLACES = 16


class Drift(NamedTuple):
    """How far a model is from the one that was trained.

    Attributes:
        max_abs: Largest difference of a logit.
        kl: KL divergence of this model's next-token distribution from the trained one's, nats, mean over places.
        top1: Part of the places at which both hold the same token likeliest. Where the trained model's favourites are
            two steps of their precision apart or less, rounding decides, and either counts.
    """

    max_abs: float
    kl: float
    top1: float

    def __str__(self) -> str:
        return f"max |d logit| {self.max_abs:.2e}, KL {self.kl:.2e}, top-1 agreement {self.top1:.1%}"


def probe_prompt(sample: Sample) -> torch.Tensor:
    """The token ids that a probe takes of a sample."""
    return torch.from_numpy(sample.input_ids[:PROBE_TOKENS]).long()


@torch.no_grad()
def probe_logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """(K, V) logits at the last places of a prompt, from a plain forward pass."""
    ids = input_ids[None].to(next(model.parameters()).device)
    return model(input_ids=ids, logits_to_keep=PROBE_PLACES, use_cache=False).logits[0].cpu()


def record_probe(model: Any, prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Records what the training model says to a few prompts. All ranks call it together.

    Args:
        model: The engine, in evaluation mode.
        prompts: Token ids, from `probe_prompt`.

    Returns:
        "input_ids_<n>" and "logits_<n>" of every prompt; the logits in the model's own precision.
    """
    probe = {}
    for number, input_ids in enumerate(prompts):
        probe[f"input_ids_{number}"] = input_ids
        probe[f"logits_{number}"] = probe_logits(model, input_ids).contiguous()
    return probe


def recorded(probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """(N, V) fp32 logits at all N places of a probe."""
    return torch.cat([logits.float() for name, logits in probe.items() if name.startswith("logits")])


def replay(model: torch.nn.Module, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """(N, V) fp32 logits of another model at a probe's places."""
    names = [name.replace("logits", "input_ids") for name in probe if name.startswith("logits")]
    return torch.cat([probe_logits(model, probe[name]).float() for name in names])


def compare_logits(trained: torch.Tensor, other: torch.Tensor, precision: torch.dtype) -> Drift:
    """Measures how far logits are from the trained model's.

    Args:
        trained: (N, V) fp32.
        other: (N, V) fp32.
        precision: In which the less exact of the two was stored or computed.
    """
    log_p, log_q = trained.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    # How much less likely than its favourite the trained model holds the other model's favourite.
    favourite = trained.amax(-1)
    gap = favourite - trained.gather(-1, other.argmax(-1, keepdim=True))[:, 0]
    step = torch.finfo(precision).eps * 2 ** favourite.abs().log2().floor()
    return Drift((trained - other).abs().max().item(), kl.item(), (gap <= 2 * step).float().mean().item())


def compare_with_probe(model: torch.nn.Module, probe: dict[str, torch.Tensor]) -> Drift:
    """Replays a probe on another model."""
    return compare_logits(recorded(probe), replay(model, probe), probe["logits_0"].dtype)


def check_tag(run: Path, tag: str) -> dict[str, Any]:
    """Makes sure that a checkpoint is there and whole.

    Returns:
        Its run.json.

    Raises:
        SystemExit: naming what there is instead.
    """
    folder = run / tag
    if len(Path(tag).parts) != 1 or not (folder / "run.json").is_file():
        tags = sorted(path.name for path in run.glob("[!.]*") if (path / "run.json").is_file())
        near = sorted({shown(path.parent.parent) for path in run.parent.glob("*/*/run.json")})
        there = f"Checkpoints there: {', '.join(tags)}." if tags else f"Runs nearby: {', '.join(near) or 'none'}."
        raise SystemExit(f"No checkpoint {tag!r} in {shown(run)}. {there}")
    check_manifest(folder)
    return read_json(folder / "run.json")


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
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        name = record["settings"]["model_name"]
        # Of the places where sizes differ, which may be hundreds of lines, the first ones do.
        reason = "\n".join([line for line in str(error).splitlines() if line.strip()][:3])
        raise SystemExit(
            f"{shown(base)} cannot be used as the base: {reason}\nThe run was trained on {name}. Name the folder of "
            f"that model (--org_model DIR), or fetch it again: python download_pt.py --model {name}"
        ) from error


def load_base(path: Path, dtype: torch.dtype, bits: int | None, trust_remote_code: bool) -> torch.nn.Module:
    """Loads a base model on the CPU; 4-bit weights come back as the numbers that they stand for."""
    model = load_model(path, dtype, bits, trust_remote_code=trust_remote_code)
    return cast(model.dequantize(), dtype) if bits else model


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Changes the precision of the weights alone: `Module.to` would round the frequencies of the positions as well."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def as_trained(
    run: Path,
    tag: str,
    record: dict[str, Any],
    base: Path,
    base_kind: str = "dequant4",
    trust_remote_code: bool = False,
) -> torch.nn.Module:
    """Makes the model that the training run computed with: the same weights, in its precision, adapters not merged.

    Args:
        run: The run's folder.
        tag: One of its checkpoints.
        record: From `check_tag`.
        base: The base model's folder.
        base_kind: Of a 4-bit run: "dequant4" is the base that was trained on, "original" the base's own weights in
            fp32.
        trust_remote_code: Whether the model's own Python code may run.
    """
    settings = record["settings"]
    dtype, bits = DTYPES[settings["precision"]], settings["quant_bits"]
    if bits and base_kind == "original":
        dtype, bits = torch.float32, None
    with base_in_use(base, record):
        model = load_base(base, dtype, bits, trust_remote_code)
        if settings["tuner"] == "full":
            _load_full(model, run, tag)
        else:
            from peft import PeftModel

            # The engine computes with adapters in the run's precision; left to itself, PEFT makes them fp32.
            model = PeftModel.from_pretrained(model, run / tag / "adapter", autocast_adapter_dtype=False)
    return model.eval()


def merge(model: torch.nn.Module) -> torch.nn.Module:
    """Turns a model from `as_trained` into a plain one in fp32; the given one is used up."""
    model = cast(model, torch.float32)
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def rebuild(
    run: Path, tag: str, record: dict[str, Any], base: Path, dtype: torch.dtype, trust_remote_code: bool
) -> torch.nn.Module:
    """Makes the trained model as a plain transformers model on the CPU: `as_trained`, merged in fp32, in `dtype`."""
    return cast(merge(as_trained(run, tag, record, base, trust_remote_code=trust_remote_code)), dtype)


def _load_full(model: torch.nn.Module, run: Path, tag: str) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    whole = run / tag / "mp_rank_00_model_states.pt"
    if read_json(run / tag / "run.json")["settings"]["zero_stage"] == 0:
        # zero_to_fp32 reads shards, which stage 0 does not write. The manifest was checked before this pickle is read.
        weights = torch.load(whole, map_location="cpu", weights_only=False)["module"]
    else:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(run), tag=tag)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {name for name in missing if name.endswith("lm_head.weight") and model.config.tie_word_embeddings}
    if unexpected or set(missing) != tied:
        raise ValueError(f"missing in the run: {sorted(set(missing) - tied)[:3]}, unknown here: {unexpected[:3]}.")
