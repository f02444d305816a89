"""utils/train/tensors.py: against the formulas written out.

python -m pytest tests/test_utils_train_tensors.py
"""

import pytest
import torch

from utils.train.tensors import all_reduced, means_over_ranks, token_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_logprobs(dtype: torch.dtype) -> None:
    """log p(y) = z_y - log sum exp z, in double precision from the same rounded logits."""
    logits = (torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)
    target_ids = torch.tensor([0, 49, 3, 3, 10, 20, 30])
    found = token_logprobs(logits, target_ids)
    rows = logits.double()
    expected = rows[torch.arange(7), target_ids] - rows.exp().sum(-1).log()
    assert found.dtype == torch.float32 and found.shape == (7,)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_token_logprobs_of_large_logits_and_of_none() -> None:
    assert token_logprobs(torch.tensor([[1e4, 0.0]]), torch.tensor([1])).item() == pytest.approx(-1e4)
    assert token_logprobs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_token_logprobs_refuses_logits_of_other_places() -> None:
    with pytest.raises(ValueError, match="5 places' logits for 2 targets"):
        token_logprobs(torch.zeros(5, 9), torch.tensor([1, 2]))


def test_token_logprobs_has_the_softmax_gradient() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    token_logprobs(logits, torch.tensor([2])).sum().backward()
    assert torch.allclose(logits.grad, torch.tensor([[0.0, 0.0, 1.0]]) - logits.detach().softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_has_autograds_gradient(dtype: torch.dtype) -> None:
    """With a weight for each target and one target twice in a row of logits, as PyTorch differentiates the formula."""
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 40, generator=random).to(dtype)
    weights, target_ids = torch.randn(5, generator=random), torch.tensor([0, 39, 7, 7, 12])
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (weights * token_logprobs(ours, target_ids)).sum().backward()
    (weights * plain.float().log_softmax(-1)[torch.arange(5), target_ids]).sum().backward()
    assert ours.grad.dtype == dtype and torch.equal(ours.detach(), logits)
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)


def test_token_logprobs_differentiates_once() -> None:
    """What the first backward wrote over is not used by a second one."""
    value = token_logprobs(torch.zeros(1, 3, requires_grad=True), torch.tensor([0])).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_all_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone a number is its own sum; with others it goes through one call, in fp64."""
    import deepspeed

    monkeypatch.setattr(deepspeed.comm, "get_world_size", lambda: 1)
    assert all_reduced(2.5) == 2.5
    monkeypatch.setattr(deepspeed.comm, "get_world_size", lambda: 3)
    monkeypatch.setattr(deepspeed.comm, "all_reduce", lambda tensor: tensor.mul_(3))
    assert all_reduced(1 + 2**-40) == 3 + 3 * 2**-40


def test_means_are_over_what_all_ranks_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    monkeypatch.setattr(deepspeed.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(deepspeed.comm, "all_reduce", lambda tensor: tensor.mul_(2))
    assert means_over_ranks({"loss": 6.0, "kd": 3.0}, 4) == {"loss": 3.0, "kd": 1.5}
