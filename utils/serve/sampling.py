"""Samples the next token of each answer in a batch, with each request's own parameters.

Shapes: R answers, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

# Few tokens hold nearly all probability: what `top_p` keeps is first looked for among so many, not in a sorted V.
LIKELIEST = (512, 8192)
ROWS = 16  # That are looked at together: each takes several times the memory of its logits.


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


class Kept(NamedTuple):
    """The tokens that answers draw from.

    Attributes:
        rows: (R',) int64, whose these are.
        probs: (R', K), need not sum up to 1.
        ids: (R', K) int64, the tokens that have these; None: all tokens.
    """

    rows: torch.Tensor
    probs: torch.Tensor
    ids: torch.Tensor | None


def kept(logits: torch.Tensor, temperatures: torch.Tensor, top_k: int, top_p: float) -> Iterator[Kept]:
    """Finds the tokens to draw from; `top_k` is applied before `top_p`, both after the temperature, as in transformers
    and vLLM.

    Args:
        logits: (R, V) fp32.
        temperatures: (R,), above 0.
        top_k: 0: all.
        top_p: Of what `top_k` leaves.

    Yields:
        Each row once, those together that keep a like number of tokens.
    """
    # Near 0 the quotients are infinite, whose differences are no numbers.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperatures.clamp(min=1e-4)[:, None]
    rows = torch.arange(len(logits), device=logits.device)
    if top_k:
        values, ids = logits.topk(min(top_k, logits.shape[-1]))
        yield Kept(rows, _nucleus(values.softmax(-1), top_p), ids)
    elif top_p == 1:
        yield Kept(rows, logits.softmax(-1), None)
    else:
        total = logits.logsumexp(-1, keepdim=True)
        for count in (*LIKELIEST, logits.shape[-1]):
            values, ids = logits[rows].topk(min(count, logits.shape[-1]))
            probs = (values - total[rows]).exp()
            enough = (probs.sum(-1) >= top_p) | (probs.shape[-1] == logits.shape[-1])
            if enough.any():
                yield Kept(rows[enough], _nucleus(probs[enough], top_p), ids[enough])
            rows = rows[~enough]
            if not len(rows):
                break


def _nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Leaves the likeliest tokens that together have the probability `top_p`; they come in order."""
    if top_p >= 1:
        return probs
    stays = probs.cumsum(-1) - probs < top_p
    stays[:, 0] = True  # Of numbers too small for fp32 nothing would be left.
    return probs * stays


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
    tokens, drawn = logits.argmax(-1), defaultdict(list)
    penalised = [row for row, choice in enumerate(choices) if choice.penalises]
    logits = logits.clone() if penalised else logits
    for row in penalised:
        logits[row] = with_penalties(logits[row], choices[row], *said[row])
        tokens[row] = logits[row].argmax()
    for row, choice in enumerate(choices):
        if choice.temperature > 0:
            drawn[choice.top_k, choice.top_p].append(row)
    several = [(kind, all_rows[start : start + ROWS]) for kind, all_rows in drawn.items()
               for start in range(0, len(all_rows), ROWS)]  # fmt: skip
    for (top_k, top_p), rows in several:
        temperatures = logits.new_tensor([choices[row].temperature for row in rows])
        for numbers, probs, ids in kept(logits[rows], temperatures, top_k, top_p):
            for number, own, place in zip(numbers.tolist(), probs, range(len(probs)), strict=True):
                token = torch.multinomial(own, 1, generator=generators[rows[number]])[0]
                tokens[rows[number]] = token if ids is None else ids[place, token]
    return tokens
