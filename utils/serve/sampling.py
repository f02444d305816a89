"""Samples the next token of each answer in a batch, with each request's own parameters.

Shapes: R answers, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

# Few tokens hold nearly all probability: what `top_p` keeps is first looked for among so many, not in a sorted V.
LIKELIEST = (512, 8192)


class SamplingParams(NamedTuple):
    """The sampling parameters of one request.

    Attributes:
        temperature: 0: always the likeliest token.
        top_p: The likeliest tokens that together have this probability are kept.
        top_k: The k likeliest are kept; 0: all.
        repetition_penalty: Divides the positive logits of tokens that prompt or answer hold already and multiplies the
            negative ones (CTRL, arXiv 1909.05858, section 4.1).
        frequency_penalty: Taken off a token's logit for each time that the answer holds it.
        presence_penalty: Taken off once if it holds it at all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    @property
    def penalises(self) -> bool:
        """Whether what was said before counts."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


def with_penalties(
    logits: torch.Tensor, choice: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> torch.Tensor:
    """Applies repetition, frequency and presence penalties.

    Args:
        logits: (V,) fp32.
        choice: With the penalties.
        prompt: Its tokens.
        answer: Its tokens so far.

    Returns:
        (V,) fp32; the argument is not changed.
    """
    logits = logits.clone()
    if choice.repetition_penalty != 1:
        said = torch.tensor(sorted({*prompt, *answer}), device=logits.device)
        values = logits[said]
        logits[said] = torch.where(values < 0, values * choice.repetition_penalty, values / choice.repetition_penalty)
    if answer and (choice.frequency_penalty or choice.presence_penalty):
        said, counts = torch.tensor(answer, device=logits.device).unique(return_counts=True)
        logits[said] -= choice.frequency_penalty * counts + choice.presence_penalty
    return logits


def kept(logits: torch.Tensor, choice: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Finds the tokens to draw from; `top_k` is applied before `top_p`, both after the temperature, as in transformers
    and vLLM.

    Args:
        logits: (V,) fp32.
        choice: With a temperature above 0.

    Returns:
        (K,) probabilities that need not sum up to 1, and the K tokens that have them; None: all tokens.
    """
    # Near 0 the quotients are infinite, whose differences are no numbers.
    logits = (logits - logits.max()) / max(choice.temperature, 1e-4)
    ids = None
    if choice.top_k:
        values, ids = logits.topk(min(choice.top_k, len(logits)))
        probs = values.softmax(-1)
    elif choice.top_p < 1:
        total = logits.logsumexp(-1)
        for count in (*LIKELIEST, len(logits)):
            values, ids = logits.topk(min(count, len(logits)))
            probs = (values - total).exp()
            if probs.sum() >= choice.top_p:
                break
    else:
        probs = logits.softmax(-1)
    if choice.top_p < 1:
        stays = probs.cumsum(-1) - probs < choice.top_p
        stays[0] = True  # Of numbers too small for fp32 nothing would be left.
        probs = probs * stays
    return probs, ids


def sample_tokens(
    logits: torch.Tensor,
    choices: Sequence[SamplingParams],
    said: Sequence[tuple[Sequence[int], Sequence[int]]],
    generators: Sequence[torch.Generator | None],
) -> torch.Tensor:
    """Samples a token for each answer.

    Args:
        logits: (R, V) fp32.
        choices: R of them.
        said: R pairs of tokens: prompt, and answer so far.
        generators: R; None: PyTorch's own.

    Returns:
        (R,) int64.
    """
    tokens = logits.argmax(-1)
    for row, (choice, (prompt, answer), generator) in enumerate(zip(choices, said, generators, strict=True)):
        if not choice.penalises and choice.temperature == 0:
            continue
        own = with_penalties(logits[row], choice, prompt, answer) if choice.penalises else logits[row]
        if choice.temperature == 0:
            tokens[row] = own.argmax()
            continue
        probs, ids = kept(own, choice)
        place = torch.multinomial(probs, 1, generator=generator)[0]
        tokens[row] = place if ids is None else ids[place]
    return tokens
