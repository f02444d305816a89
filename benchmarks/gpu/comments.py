"""The kit's samples: token ids of the project's example comments, from comments.npz (see make_comments.py)."""

from pathlib import Path

import numpy as np

from utils.data.samples import Samples
from utils.train.packing import Layout, Pack, PackCost, plan_packs, rank_packs

# A pack pays for its tokens alone: then all samples of a plan that fit together stand in one pack.
ONE_PACK = Layout(pack_tokens=10**9, world_size=1, share_prefix=True, cost=PackCost(1e12, 1e12))


def load_comments(tiny: bool = False) -> Samples:
    """Reads the comments.

    Args:
        tiny: Whether to take some short ones, with their ids renumbered from 0, for models with a tiny vocabulary.
    """
    with np.load(Path(__file__).with_name("comments.npz")) as file:
        tokens, supervised, lengths, video = (file[name] for name in ("tokens", "supervised", "lengths", "video"))
    end = lengths.cumsum(dtype=np.int64)
    begin = end - lengths
    targets = np.array([supervised[a + 1 : b].sum() for a, b in zip(begin, end, strict=True)])
    ids = [str(number) for number in range(len(lengths))]
    if tiny:
        tokens = np.unique(tokens, return_inverse=True)[1].astype(np.int32)
    samples = Samples(tokens, supervised, begin, end, video.astype(np.int64), targets, ids)
    return samples.select(np.flatnonzero(lengths < 120)[:40]) if tiny else samples


def tiny_vocabulary() -> int:
    """How many token ids the renumbered comments have."""
    return int(load_comments(tiny=True).tokens.max()) + 1


def pack_of(samples: Samples, most_tokens: int) -> tuple[np.ndarray, Pack]:
    """Lays out as many of the first samples as stand in one pack of at most so many tokens.

    Returns:
        Their numbers, and the pack.
    """
    low, high = 1, len(samples)
    while low < high:
        middle = (low + high + 1) // 2
        fits = plan_packs(samples, [np.arange(middle)], ONE_PACK).count(samples, range(1))["executed"] <= most_tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    plan = plan_packs(samples, [np.arange(low)], ONE_PACK)
    (pack,) = rank_packs(samples, plan, 0, 0)
    return plan.order, pack
