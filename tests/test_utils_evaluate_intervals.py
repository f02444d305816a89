"""utils/evaluate/intervals.py: intervals over videos by hand, and how often they hold the truth.

python -m pytest tests/test_utils_evaluate_intervals.py
"""

import math

import numpy as np
import pytest

from utils.evaluate.intervals import (
    LEAST_PAIRS,
    LEAST_VIDEOS,
    Estimate,
    Interval,
    draw_videos,
    estimate,
    ratio,
    verdict,
)

STEPS = np.linspace(0, 1, 10001)  # Draws whose quantiles are their shares.


def test_ratio_by_hand() -> None:
    """The second draw takes the first video twice and the last one not at all; the third one has no answers."""
    weights = np.array([[1, 1, 1], [2, 1, 0], [0, 3, 0]])
    found = ratio([1, 0, 4], [2, 0, 5])(weights)
    assert found[:2] == pytest.approx([5 / 7, 2 / 4])
    assert math.isnan(found[2])


def test_draws_of_videos() -> None:
    """Each draw has as many videos as there are, each video comes once on average, and a seed says which."""
    weights = draw_videos(20)
    assert weights.shape == (2000, 20)
    assert set(weights.sum(1).tolist()) == {20}
    assert weights.mean(0) == pytest.approx(np.ones(20), abs=0.15)
    assert weights.var() == pytest.approx(1 - 1 / 20, abs=0.05)  # Of a binomial of 20 at 1/20.
    assert (weights == draw_videos(20)).all()
    assert (weights != draw_videos(20, seed=1)).any()


def test_value_is_of_all_videos_once() -> None:
    found = estimate(ratio([1, 0, 4], [2, 1, 5]), draw_videos(3))
    assert found.value == pytest.approx(5 / 8)
    assert found.videos == 3
    low, high = found.interval()[1:]
    assert low == 0 and high == pytest.approx(0.8)  # The second video alone, and the third one alone.


def test_differences_are_paired() -> None:
    """Nothing is better than itself; a tenth more in each video is a tenth more, whatever is drawn."""
    weights = draw_videos(30)
    right = np.random.default_rng(0).random(30)
    one, other = (estimate(ratio(values, np.ones(30)), weights) for values in (right, right + 0.1))
    assert (one - one).interval() == (0, 0, 0)
    assert (other - one).interval() == pytest.approx((0.1, 0.1, 0.1))
    assert (-other).interval().low == pytest.approx(-other.interval().high)
    low, high = one.interval()[1:]
    assert high - low > 0.1  # Unpaired, one could not tell.


def test_many_videos_give_plain_percentiles() -> None:
    assert Estimate(0.5, STEPS, 10**7).interval() == pytest.approx((0.5, 0.025, 0.975), abs=1e-5)


def test_few_videos_give_wider_intervals() -> None:
    """Ten videos: 2.262157 is Student's t for nine degrees of freedom in any table, sqrt(10 / 9) times that 2.38453."""
    tail = math.erfc(2.262157 * math.sqrt(10 / 9) / math.sqrt(2)) / 2
    assert tail == pytest.approx(0.00855, abs=1e-5)
    assert Estimate(0.5, STEPS, 10).interval() == pytest.approx((0.5, tail, 1 - tail), abs=1e-6)
    widths = [found.high - found.low for found in (Estimate(0.5, STEPS, count).interval() for count in (2, 10, 100))]
    assert widths == sorted(widths, reverse=True)


def test_draws_without_a_value_do_not_count() -> None:
    assert Estimate(0.5, np.append(STEPS, math.nan), 10).interval() == Estimate(0.5, STEPS, 10).interval()


def test_one_video_has_no_interval() -> None:
    found = estimate(ratio([3], [4]), draw_videos(1)).interval()
    assert found.value == 0.75
    assert math.isnan(found.low) and math.isnan(found.high)
    assert verdict(found, 1) == "few"


def test_verdicts() -> None:
    """Zero at an interval's end is still in it."""
    ahead, behind, open_ = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1), Interval(0.1, -0.1, 0.3)
    assert [verdict(lead, LEAST_VIDEOS) for lead in (ahead, behind, open_)] == ["better", "worse", "equal"]
    assert [verdict(Interval(0.1, low, 0.2), 40) for low in (0, 1e-9)] == ["equal", "better"]
    assert [verdict(Interval(-0.1, -0.2, high), 40) for high in (0, -1e-9)] == ["equal", "worse"]
    assert [verdict(lead, LEAST_VIDEOS - 1) for lead in (ahead, behind, open_)] == ["few"] * 3
    assert [verdict(ahead, 40, pairs) for pairs in (LEAST_PAIRS - 1, LEAST_PAIRS)] == ["few", "better"]
    assert verdict(ahead, LEAST_VIDEOS - 1, 10 * LEAST_PAIRS) == "few"


def held(videos: int, by_video: bool, simulations: int = 500) -> float:
    """How often the interval of a share holds the truth.

    Each video has 1 to 30 comments, most have few, and its own chance that a comment is right, which is 0.4 on average
    and leans to 0 and to 1. The truth is that of all comments of all videos that there might be.
    """
    random, hits = np.random.default_rng(videos), 0
    for number in range(simulations):
        sizes = np.minimum(random.geometric(0.15, videos), 30)
        right = random.binomial(sizes, random.beta(0.8, 1.2, videos))
        top, bottom = (right, sizes) if by_video else (np.repeat([1, 0], [sum(right), sum(sizes - right)]), None)
        bottom = np.ones(len(top)) if bottom is None else bottom
        found = estimate(ratio(top, bottom), draw_videos(len(top), number, draws=400)).interval()
        hits += found.low <= 0.4 <= found.high
    return hits / simulations


@pytest.mark.parametrize("videos", [15, 40])
def test_coverage(videos: int) -> None:
    """95 % are promised; of 500 simulations of that, 93 to 97 % would be usual, and a bootstrap is not exact."""
    assert 0.91 <= held(videos, by_video=True) <= 0.99


def test_drawing_comments_would_promise_too_much() -> None:
    """Comments of one video are alike: as if there were more of them than there are."""
    assert held(15, by_video=False, simulations=200) < 0.8
