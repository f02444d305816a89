"""utils/serve/sampling.py: the same tokens to draw from as transformers keeps, and penalties by hand.

python -m pytest tests/test_utils_serve_sampling.py
"""

import itertools

import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from utils.serve.sampling import LIKELIEST, SamplingParams, kept, sample_tokens, with_penalties

V = 2000


def some_logits(scale: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * scale


def dense(logits: torch.Tensor, temperatures: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """(R, V), the probabilities of all tokens."""
    whole, seen = torch.zeros_like(logits), []
    for rows, probs, ids in kept(logits, temperatures, top_k, top_p):
        whole[rows] = probs if ids is None else torch.zeros(len(rows), V).scatter_(-1, ids, probs)
        seen += rows.tolist()
    assert sorted(seen) == [*range(len(logits))]
    return whole / whole.sum(-1, keepdim=True)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.9), (50, 1.0), (50, 0.8), (10_000, 0.95), (1, 0.5)])
def test_the_same_tokens_as_transformers(top_k: int, top_p: float) -> None:
    """Rows together, also where what top_p keeps is not among the likeliest that are looked at first."""
    scales, temperatures = zip(*itertools.product((0.1, 1.0, 5.0), (0.3, 1.0, 1.7)), strict=True)
    logits = torch.stack([some_logits(scale, seed) for seed, scale in enumerate(scales)])
    found = dense(logits, torch.tensor(temperatures), top_k, top_p)
    for row, temperature in enumerate(temperatures):
        expected = TemperatureLogitsWarper(temperature)(None, logits[row, None])
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        expected = expected.softmax(-1)[0]
        assert torch.allclose(found[row], expected, atol=1e-6)
        if scales[row] == 0.1 and top_k == 0 and top_p < 1:
            assert (expected > 0).sum() > LIKELIEST[0]


def test_repetition_penalty_is_transformers() -> None:
    logits = some_logits(2.0)
    prompt, answer = [3, 5, 3], [7, 5]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + answer]), logits[None].clone())[0]
    found = with_penalties(logits, SamplingParams(repetition_penalty=1.3), prompt, answer)
    assert torch.equal(found, expected) and not torch.equal(found, logits)


def test_frequency_and_presence_by_hand() -> None:
    """OpenAI's formula: logit - count x frequency_penalty - (1 if count > 0) x presence_penalty, of the answer."""
    logits = torch.tensor([1.0, 2.0, 3.0, -1.0])
    found = with_penalties(
        logits, SamplingParams(frequency_penalty=0.5, presence_penalty=0.25), prompt=[0, 0], answer=[2, 3, 2]
    )
    assert found.tolist() == [1.0, 2.0, 3.0 - 2 * 0.5 - 0.25, -1.0 - 0.5 - 0.25]
    assert logits.tolist() == [1.0, 2.0, 3.0, -1.0], "the caller's are left as they are"


def test_a_batch_of_different_requests() -> None:
    """Greedy ones, one with a penalty that changes the winner, and drawn ones that a seed repeats."""
    logits = torch.stack([some_logits(1.0, seed) for seed in range(5)])
    best = logits.argmax(-1)
    logits[1, best[1]] += 0.5
    choices = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, presence_penalty=2.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=5.0, top_k=1),
    ]
    said = [([], []), ([], [int(best[1])]), ([], []), ([], []), ([], [])]

    def drawn(seed: int) -> list[int]:
        generators = [None, None, torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed), None]
        return sample_tokens(logits, choices, said, generators).tolist()

    one, two, other = drawn(1), drawn(1), drawn(2)
    second = logits[1].clone()
    second[best[1]] -= 2.0
    assert one[0] == best[0] and one[1] == second.argmax() != best[1] and one[4] == best[4]
    assert one == two != other


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).log1p()  # Probabilities 1, 2, 3, 4 of 10.
    generator = torch.Generator().manual_seed(0)
    n = 4000
    tokens = sample_tokens(logits.repeat(n, 1), [SamplingParams()] * n, [([], [])] * n, [generator] * n)
    found = tokens.bincount(minlength=4) / n
    # Four standard deviations of a mean of 4,000 draws.
    assert torch.allclose(found, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=4 * (0.25 / n) ** 0.5)


def test_numbers_too_small_for_fp32() -> None:
    """A top_p that is 0 in fp32 keeps the likeliest token, and not none."""
    logits = some_logits(1.0)
    (token,) = sample_tokens(logits[None], [SamplingParams(top_p=1e-320)], [([], [])], [None])
    assert token == logits.argmax()


@pytest.mark.parametrize("temperature", [1e-30, 1e-5, 100.0])
def test_extreme_temperatures(temperature: float) -> None:
    logits = some_logits(30.0)
    (probs,) = dense(logits[None], torch.tensor([temperature]), 0, 1.0)
    assert probs.isfinite().all() and probs.sum() > 0
    if temperature < 1:
        assert probs.argmax() == logits.argmax() and probs.max() > 0.999
