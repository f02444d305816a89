"""Pure helpers on tensors that two or more stages use.

Shapes: T supervised targets, V vocabulary.
"""

import torch
import torch.nn.functional as F


def token_logprobs(logits: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target token.

    Args:
        logits: (T, V), any float dtype; the softmax is taken in fp32.
        target_ids: (T,) int64.

    Returns:
        (T,) fp32, natural logarithm.
    """
    return -F.cross_entropy(logits.float(), target_ids, reduction="none")


def all_reduced(value: float) -> float:
    """Sums a number over all ranks."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if deepspeed.comm.get_world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=get_accelerator().current_device_name())
    deepspeed.comm.all_reduce(total)
    return total.item()
