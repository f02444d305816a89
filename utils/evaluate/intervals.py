"""Confidence intervals by bootstrap over videos, and whether two models can be told apart.

Comments under one video are alike, so videos are drawn, not comments. All statistics of an evaluation see the same
draws: the difference of two models is paired.

Shapes: V videos, B bootstrap draws.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000
LEAST_VIDEOS = 10  # With fewer an interval says next to nothing of other videos.
LEAST_PAIRS = 200  # Real and written replies that a classifier has to tell apart.

# (B, V) how often each video counts -> (B,) the statistic.
Statistic = Callable[[np.ndarray], np.ndarray]


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval; the latter is NaN where there is none."""

    value: float
    low: float
    high: float


def draw_videos(videos: int, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Draws videos with replacement.

    Returns:
        (B, V) int64, how often each video was drawn.
    """
    random = np.random.default_rng(seed)
    return random.multinomial(videos, np.full(videos, 1 / videos), size=draws)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Statistic:
    """A sum over videos divided by another, such as right answers by answers.

    Args:
        numerators: (V,).
        denominators: (V,).
    """
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (weights @ top) / (weights @ bottom)

    return statistic


class Estimate(NamedTuple):
    """A statistic of all videos, and of each bootstrap draw of them."""

    value: float
    draws: np.ndarray  # (B,)
    videos: int

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference of two statistics of the same draws."""
        return Estimate(self.value - other.value, self.draws - other.draws, self.videos)

    def __neg__(self) -> "Estimate":
        return Estimate(-self.value, -self.draws, self.videos)

    def interval(self) -> Interval:
        """The 95 % confidence interval.

        Percentiles of the bootstrap alone are too narrow for few videos; they are expanded to what Student's t would
        ask for (Hesterberg 2015, arXiv 1411.5279, section 4.3): alpha' / 2 = Phi(-sqrt(V / (V - 1)) t(0.975, V - 1)).
        """
        from scipy.stats import norm, t

        if self.videos < 2:
            return Interval(self.value, math.nan, math.nan)
        tail = norm.cdf(-math.sqrt(self.videos / (self.videos - 1)) * t.ppf(0.975, self.videos - 1))
        low, high = np.nanquantile(self.draws, [tail, 1 - tail])
        return Interval(self.value, float(low), float(high))


def estimate(statistic: Statistic, weights: np.ndarray) -> Estimate:
    """Computes a statistic of all videos and of each draw.

    Args:
        statistic: Of weighted videos.
        weights: (B, V), from `draw_videos`.
    """
    videos = weights.shape[1]
    return Estimate(float(statistic(np.ones((1, videos)))[0]), statistic(weights), videos)


def verdict(lead: Interval, videos: int, pairs: int | None = None) -> str:
    """Says whether one model can be told from another.

    Args:
        lead: By how much the first one is better, in the sense in which more is better.
        videos: Of how many.
        pairs: How many replies were compared, where that number decides; None otherwise.

    Returns:
        "better", "worse", "equal" (which cannot be told apart) or "few" (too little data to say).
    """
    if videos < LEAST_VIDEOS or (pairs is not None and pairs < LEAST_PAIRS):
        return "few"
    return "better" if lead.low > 0 else "worse" if lead.high < 0 else "equal"
