"""Pure helpers on tensors that two or more stages use.

Shapes: T supervised targets, S samples, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F


def token_logprobs(logits: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target token.

    Args:
        logits: (T, V), any float dtype; the softmax is taken in fp32.
        target_ids: (T,) int64.

    Returns:
        (T,) fp32, natural logarithm.

    Raises:
        ValueError: if there are more or fewer logits than targets.
    """
    if len(logits) != len(target_ids):  # gather would take the first ones and say nothing.
        raise ValueError(f"{len(logits)} places' logits for {len(target_ids)} targets: the model's code has to take "
                         "logits_to_keep.")  # fmt: skip
    return _TokenLogprobs.apply(logits, target_ids)


class _TokenLogprobs(torch.autograd.Function):
    """Its backward writes over what forward kept: autograd's would fill two more (T, V) tensors, which costs time too.

    d log p(y) / d logit(v) = [v = y] - p(v). A second backward through the same graph is refused by autograd.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        logprobs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        ctx.save_for_backward(logprobs, target_ids)
        ctx.dtype = logits.dtype
        return logprobs.gather(1, target_ids[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logprobs, target_ids = ctx.saved_tensors
        result = logprobs.exp_().mul_(-gradient[:, None])
        result.scatter_add_(1, target_ids[:, None], gradient[:, None])
        return result.to(ctx.dtype), None


def weighted_nll(logits: torch.Tensor, target_ids: torch.Tensor, target_weight: torch.Tensor) -> torch.Tensor:
    """-sum_t w_t log p(y_t), () fp32, nats; shapes as in `token_logprobs`, weights (T,) fp32."""
    return -(target_weight * token_logprobs(logits, target_ids)).sum()


def sample_sums(values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive parts.

    Args:
        values: (T,), those of the first sample, of the second and so on.
        sizes: (S,) int64, how many values each sample has.

    Returns:
        (S,) in the values' dtype.
    """
    owner = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    return values.new_zeros(len(sizes)).index_add(0, owner, values)


def all_reduced(value: float) -> float:
    """Sums a number over all ranks."""
    return all_reduced_each({"": value})[""]


def all_reduced_each(values: dict[str, float]) -> dict[str, float]:
    """Sums several numbers over all ranks, each by itself; every rank names the same ones."""
    if not torch.distributed.is_initialized():  # A model by itself, without an engine.
        return values
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if deepspeed.comm.get_world_size() == 1:
        return values
    totals = torch.tensor([*values.values()], dtype=torch.float64, device=get_accelerator().current_device_name())
    deepspeed.comm.all_reduce(totals)
    return dict(zip(values, totals.tolist(), strict=True))


def means_over_ranks(sums: Mapping[str, float], count: int) -> dict[str, float]:
    """Sums of all ranks become means.

    Args:
        sums: Of this rank; every rank names the same ones.
        count: Of what all ranks together have summed.
    """
    return {name: value / count for name, value in all_reduced_each(dict(sums)).items()}
