"""Samples become packs (token trees laid out in depth-first order) and windows (the samples of one optimizer step).

Shapes: L tokens in a pack, T supervised targets in a pack.
"""

from typing import NamedTuple

import numpy as np
import torch

from utils.data import Sample


class Pack(NamedTuple):
    """Token trees in depth-first order. Token i may attend to token j iff j <= i < subtree_end[j]: j is its ancestor.

    A sample that shares nothing is a chain: every token's subtree ends where the chain ends. Integers are int64.
    """

    input_ids: torch.Tensor  # (L,)
    position_ids: torch.Tensor  # (L,) depth in the tree
    subtree_end: torch.Tensor  # (L,) index after the last descendant
    target_index: torch.Tensor  # (T,) places whose next token is supervised, once per sample
    target_ids: torch.Tensor  # (T,) those next tokens
    target_weight: torch.Tensor  # (T,) fp32

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack on another device."""
        return Pack(*(tensor.to(device) for tensor in self))


def n_targets(sample: Sample) -> int:
    """Number of supervised tokens. The first token of a sample has nothing to be predicted from."""
    return int(sample.supervised[1:].sum())


def make_packs(samples: list[Sample], pack_tokens: int) -> list[Pack]:
    """Lays samples out in as few packs as first-fit-decreasing finds.

    Args:
        samples: In any order; the same packs come out of the same samples in the same order.
        pack_tokens: The most tokens in a pack. A longer sample gets a pack of its own.

    Returns:
        Packs; none for no samples.
    """
    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.input_ids)):
        length = len(sample.input_ids)
        place = next((number for number, left in enumerate(room) if left >= length), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(pack_tokens)
        bins[place].append(sample)
        room[place] -= length
    return [_lay_out(samples) for samples in bins]


def _lay_out(samples: list[Sample]) -> Pack:
    lengths = [len(sample.input_ids) for sample in samples]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    position_ids = np.concatenate([np.arange(length) for length in lengths])
    subtree_end = np.repeat(starts + lengths, lengths)
    target_index = np.concatenate(
        [start + np.flatnonzero(sample.supervised[1:]) for start, sample in zip(starts, samples, strict=True)]
    )
    target_ids = ids[target_index + 1]
    weight = np.ones(len(target_index), dtype=np.float32)
    return Pack(*map(torch.from_numpy, (ids, position_ids, subtree_end, target_index, target_ids, weight)))


def attention_mask(pack: Pack, window: int | None = None) -> torch.Tensor:
    """The ancestor rule as a mask.

    Args:
        pack: Of L tokens.
        window: Of a model with sliding-window attention: a token sees itself and the window - 1 tokens before it.

    Returns:
        (1, 1, L, L) bool; [0, 0, i, j] is True where token i may attend to token j. L x L bytes.
    """
    place = torch.arange(len(pack.subtree_end), device=pack.subtree_end.device)
    query, key = place[:, None], place[None, :]
    mask = (key <= query) & (query < pack.subtree_end[None, :])
    if window is not None:
        mask &= pack.position_ids[:, None] - pack.position_ids[None, :] < window
    return mask[None, None]


def model_inputs(pack: Pack, windows: dict[str, int | None]) -> dict[str, torch.Tensor]:
    """What a model's forward takes for a pack; only supervised places go through the output head.

    Args:
        pack: Of L tokens.
        windows: From `utils.model.attention_windows`: the kind of layer -> its window.

    Returns:
        `input_ids` (1, L), `position_ids` (1, L), `attention_mask` (1, 1, L, L) or a dict of them by kind of layer,
        `logits_to_keep` (T,).
    """
    masks = {kind: attention_mask(pack, window) for kind, window in windows.items()}
    return {
        "input_ids": pack.input_ids[None],
        "position_ids": pack.position_ids[None],
        "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
        "logits_to_keep": pack.target_index,
        "use_cache": False,
    }


def rank_packs(samples: list[Sample], pack_tokens: int, rank: int, world_size: int) -> list[Pack]:
    """One rank's packs of a window; every rank gets the same number, so that collective calls meet.

    Args:
        samples: The whole window's, the same on all ranks.
        pack_tokens: The most tokens in a pack.
        rank: This one.
        world_size: Number of ranks.

    Returns:
        At least one pack; some may be empty.
    """
    packs = make_packs(samples, pack_tokens)
    # Longest first, dealt to and fro, so that the ranks' work is about equal.
    packs.sort(key=lambda pack: -len(pack.input_ids))
    filler = packs[-1]._replace(target_weight=torch.zeros_like(packs[-1].target_weight))
    packs += [filler] * (-len(packs) % world_size)
    rows = [packs[start : start + world_size] for start in range(0, len(packs), world_size)]
    return [row[rank if number % 2 == 0 else world_size - 1 - rank] for number, row in enumerate(rows)]


def windows(n_samples: int, window_samples: int, epochs: int, seed: int) -> list[np.ndarray]:
    """Draws the samples of every optimizer step of a run; each epoch draws every sample once.

    Args:
        n_samples: In the training set.
        window_samples: Samples in a step, over all ranks.
        epochs: Passes over the data.
        seed: Same seed, same windows.

    Returns:
        For each step the numbers of its samples; the last step of an epoch has what is left.
    """
    orders = [np.random.default_rng([seed, epoch]).permutation(n_samples) for epoch in range(epochs)]
    return [order[start : start + window_samples] for order in orders for start in range(0, n_samples, window_samples)]
