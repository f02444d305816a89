"""utils/weights/probe.py: how far two models are from each other.

python -m pytest tests/test_utils_weights_probe.py
"""

import pytest
import torch

from utils.weights.probe import compare_logits


@pytest.mark.parametrize(
    ("precision", "gap", "top1"),
    [(torch.bfloat16, 0.5, 1.0), (torch.bfloat16, 0.75, 0.0), (torch.float16, 0.0625, 1.0), (torch.float16, 0.1, 0.0),
     (torch.float32, 0.01, 0.0)],
)  # fmt: skip
def test_likeliest_tokens_may_swap_within_two_steps_of_the_precision(
    precision: torch.dtype, gap: float, top1: float
) -> None:
    """From 32 to 64 a step of bf16 is 0.25 and one of fp16 is 0.03125."""
    trained, other = torch.tensor([[40.0, 40.0 - gap, 1.0]]), torch.tensor([[39.0, 39.5, 1.0]])
    assert compare_logits(trained, other, precision).top1 == top1


def test_drift_is_measured_from_the_trained_model() -> None:
    trained = torch.tensor([[0.75, 0.25]]).log()
    drift = compare_logits(trained, torch.tensor([[0.5, 0.5]]).log(), torch.float32)
    assert drift.kl == pytest.approx(0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log())
    assert drift.max_abs == pytest.approx(torch.tensor(2.0).log())
