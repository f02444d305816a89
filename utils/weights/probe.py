"""The fidelity probe: the logits that the training model gave to a few prompts, recorded and replayed.

Shapes: V vocabulary, K probed places of a prompt.
"""

from typing import Any, NamedTuple

import torch

from utils.data.chat import Sample

PROBE_PROMPTS = 4
PROBE_TOKENS = 256
PROBE_PLACES = 16


class Drift(NamedTuple):
    """How far a model is from the one that was trained.

    Attributes:
        max_abs: Largest difference of a logit.
        kl: KL divergence of this model's next-token distribution from the trained one's, nats, mean over places.
        top1: Part of the places at which both hold the same token likeliest. Where the trained model's two likeliest
            are two steps of their precision apart or less, rounding decides, and either counts.
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
def probe_logits(model: Any, input_ids: torch.Tensor, device: Any) -> torch.Tensor:
    """(K, V) logits at the last places of a prompt, from a plain forward pass."""
    ids = input_ids[None].to(device)
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
        probe[f"logits_{number}"] = probe_logits(model, input_ids, model.device).contiguous()
    return probe


def recorded(probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """(N, V) fp32 logits at all N places of a probe."""
    return torch.cat([probe[name].float() for name in sorted(probe) if name.startswith("logits")])


def replay(model: torch.nn.Module, probe: dict[str, torch.Tensor], device: str = "cpu") -> torch.Tensor:
    """(N, V) fp32 logits of another model, which computes on `device`, at a probe's places."""
    names = [name for name in sorted(probe) if name.startswith("input_ids")]
    return torch.cat([probe_logits(model, probe[name], device).float() for name in names])


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
