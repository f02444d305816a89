"""What a training run left becomes a model again: adapters merged, ZeRO shards joined, fidelity probed.

Shapes: V vocabulary, K probed places of a prompt.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

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
        top1: Part of the places at which both hold the same token likeliest; where the trained model's first two are
            within 0.1 of each other, rounding decides, and either counts.
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


def compare_with_probe(model: Any, probe: dict[str, torch.Tensor]) -> Drift:
    """Replays a probe on another model."""
    pairs = [
        (probe[name.replace("logits", "input_ids")], logits.float())
        for name, logits in probe.items()
        if name.startswith("logits")
    ]
    trained = torch.cat([logits for _, logits in pairs])
    other = torch.cat([probe_logits(model, input_ids).float() for input_ids, _ in pairs])
    log_p, log_q = trained.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    # How much less likely than its favourite the trained model holds the other model's favourite.
    gap = trained.amax(-1) - trained.gather(-1, other.argmax(-1, keepdim=True))[:, 0]
    return Drift((trained - other).abs().max().item(), kl.item(), (gap < 0.1).float().mean().item())


def check_tag(run: Path, tag: str) -> dict[str, Any]:
    """Makes sure that a checkpoint is there and whole.

    Returns:
        Its run.json.

    Raises:
        SystemExit: naming what there is instead.
    """
    folder = run / tag
    if not (folder / "run.json").is_file():
        tags = sorted(path.name for path in run.glob("[!.]*") if (path / "run.json").is_file())
        near = sorted(shown(path.parent.parent) for path in run.parent.glob("*/*/run.json"))
        there = f"Checkpoints there: {', '.join(tags)}." if tags else f"Runs nearby: {', '.join(near) or 'none'}."
        raise SystemExit(f"No checkpoint {tag!r} in {shown(run)}. {there}")
    check_manifest(folder)
    return read_json(folder / "run.json")


def rebuild(
    run: Path, tag: str, record: dict[str, Any], base: Path, dtype: torch.dtype, base_kind: str = "dequant4"
) -> torch.nn.Module:
    """Makes the trained model as a plain transformers model on the CPU.

    Args:
        run: The run's folder.
        tag: One of its checkpoints.
        record: From `check_tag`.
        base: The base model's folder.
        dtype: Of the result. Merging is done in fp32.
        base_kind: Of a 4-bit run: "dequant4" merges into the weights that were trained on, "original" into the
            base's own.
    """
    if record["settings"]["tuner"] == "full":
        model = load_model(base, torch.float32)
        _load_full(model, run, tag)
        return model.to(dtype)
    from peft import PeftModel

    bits = record["settings"]["quant_bits"] if base_kind == "dequant4" else None
    # 4-bit weights stand for numbers that depend on the precision the run computed in.
    model = load_model(base, DTYPES[record["settings"]["precision"]] if bits else torch.float32, bits)
    if bits:
        model = model.dequantize()
    model = model.float()
    return PeftModel.from_pretrained(model, run / tag / "adapter").merge_and_unload().to(dtype)


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
        raise SystemExit(
            f"{shown(run / tag)} does not fit the base model: missing {sorted(set(missing) - tied)[:3]}, "
            f"unexpected {unexpected[:3]}. Name the base it was trained from: --org_model DIR"
        )
