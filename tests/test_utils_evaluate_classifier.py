"""utils/evaluate/classifier.py: known areas under the curve, what can be told and what cannot.

python -m pytest tests/test_utils_evaluate_classifier.py
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from utils.evaluate.classifier import auc, by_characters, by_length, floor, mean
from utils.evaluate.intervals import Interval, Statistic, draw_videos, estimate

WORDS = "这个 视频 真的 好看 笑死 我了 第一 前排 为什么 没有 老师 声音 画面 音乐 可爱 厉害 感觉 已经 三连 支持 想吃 下次 一定 泪目".split()
TOPICS = "猫咪 火锅 钢琴 火车 篮球 围棋 相机 手工 天文 恐龙 单车 盆栽".split()
VIDEOS, EACH = 40, 6
PLACES = np.repeat(np.arange(VIDEOS), EACH).tolist()


def make_texts(random: np.random.Generator, longer: int = 1) -> list[str]:
    """Six comments under each of 40 videos: some everyday words, and often the one that the video is about."""
    texts = []
    for place in PLACES:
        words = random.choice(WORDS, size=longer * random.integers(2, 7)).tolist()
        words += [TOPICS[place % len(TOPICS)]] * random.integers(0, 2)
        texts.append("".join(random.permutation(words)) + random.choice(["", "", "！", "。", "？", "[doge]"]))
    return texts


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str]]:
    """Real replies, and others of the same making."""
    random = np.random.default_rng(0)
    return make_texts(random), make_texts(random)


def interval(statistic: Statistic | None, videos: int = VIDEOS) -> Interval:
    assert statistic is not None
    return estimate(statistic, draw_videos(videos, draws=1000)).interval()


def plain(statistic: Statistic | None, videos: int = VIDEOS) -> float:
    """Of all videos."""
    assert statistic is not None
    return float(statistic(np.ones((1, videos)))[0])


def by_scikit_learn(
    real: list[str], written: list[str], videos: list[int], make: Callable[[], Any], weights: list[int]
) -> float:
    """The same, fold after fold, with scikit-learn's area under the curve."""
    sizes, areas = [], []
    for learnt, asked in GroupKFold(5, shuffle=True, random_state=0).split(real, groups=videos):
        texts = [real[row] for row in learnt] + [written[row] for row in learnt]
        classifier = make().fit(texts, [0] * len(learnt) + [1] * len(learnt))
        texts = [real[row] for row in asked] + [written[row] for row in asked]
        counts = [weights[videos[row]] for row in asked]
        labels = [0] * len(asked) + [1] * len(asked)
        areas.append(roc_auc_score(labels, classifier.decision_function(texts), sample_weight=counts * 2))
        sizes.append(sum(counts))
    return sum(size * area for size, area in zip(sizes, areas, strict=True)) / sum(sizes)


@pytest.mark.parametrize("make", [by_characters, by_length])
def test_area_is_scikit_learns(make: Callable[[], Any], pairs: tuple[list[str], list[str]]) -> None:
    """Once with all videos, once with some that come twice or thrice; folds of unequal size, and equal scores."""
    real, written = pairs[0], make_texts(np.random.default_rng(1), longer=2)
    kept = [row for row, place in enumerate(PLACES) if row % EACH <= place % 5]
    real, written, videos = ([side[row] for row in kept] for side in (real, written, PLACES))
    written[::3] = [text[:5] for text in written[::3]]
    some = [1 + (place % 7 == 0) + 2 * (place % 3 == 1) for place in range(VIDEOS)]
    statistic = auc(real, written, videos, VIDEOS, make)
    assert statistic is not None
    found = statistic(np.array([[1] * VIDEOS, some]))
    wanted = [by_scikit_learn(real, written, videos, make, weights) for weights in ([1] * VIDEOS, some)]
    assert found == pytest.approx(wanted)
    assert abs(wanted[0] - wanted[1]) > 1e-3


def test_videos_that_were_not_drawn_do_not_count(pairs: tuple[list[str], list[str]]) -> None:
    """If only the videos of one fold are drawn, its area is all there is."""
    real, written = pairs
    folds = [set(np.array(PLACES)[asked]) for _, asked in GroupKFold(5, shuffle=True, random_state=0).split(
        real, groups=PLACES)]  # fmt: skip
    statistic = auc(real, written, PLACES, VIDEOS, by_characters)
    assert statistic is not None
    alone = np.array([[int(place in fold) for place in range(VIDEOS)] for fold in folds])
    assert plain(statistic) == pytest.approx(np.average(statistic(alone), weights=[len(fold) for fold in folds]))
    assert len(set(statistic(alone))) > 1


@pytest.mark.parametrize("make", [by_characters, by_length])
def test_same_making_cannot_be_told(make: Callable[[], Any]) -> None:
    """Half is within the interval nearly always: an interval of 95 % misses two or more of five in 2 % of all cases."""
    misses, values = 0, []
    for seed in range(5):
        random = np.random.default_rng(seed)
        found = interval(auc(make_texts(random), make_texts(random), PLACES, VIDEOS, make))
        misses += not found.low <= 0.5 <= found.high
        values.append(found.value)
    assert misses <= 1
    assert np.mean(values) == pytest.approx(0.5, abs=0.04)


def test_one_reply_for_all_is_told(pairs: tuple[list[str], list[str]]) -> None:
    """求 under every video."""
    found = interval(auc(pairs[0], ["求"] * len(PLACES), PLACES, VIDEOS, by_characters))
    assert found.low > 0.98


def test_right_words_of_the_wrong_length_are_told(pairs: tuple[list[str], list[str]]) -> None:
    """Twice as long, and also half of them too short and half too long, which no single limit can tell."""
    real, long = pairs[0], make_texts(np.random.default_rng(2), longer=2)
    assert interval(auc(real, long, PLACES, VIDEOS, by_length)).low > 0.75
    odd = [text[:2] if row % 2 else text * 4 for row, text in enumerate(real)]
    assert interval(auc(real, odd, PLACES, VIDEOS, by_length)).low > 0.9


def test_floor(pairs: tuple[list[str], list[str]]) -> None:
    """Real replies against real ones: about half, even where each video has words of its own."""
    own = [f"{chr(0x5000 + place)}{text}" for place, text in zip(PLACES, pairs[0], strict=True)]
    for real in (pairs[0], own):
        found = interval(floor(real, PLACES, VIDEOS, by_characters))
        assert found.low <= 0.5 <= found.high
        assert found.value == pytest.approx(0.5, abs=0.08)


def test_floor_takes_pairs_of_one_video() -> None:
    """Two replies a video are one pair. Only the sides that they come to differ from draw to draw."""
    real = [f"{'甲乙丙丁戊己庚辛'[place]}{side}" for place in range(8) for side in "ab"]
    seen: list[str] = []

    class Recorder:
        def fit(self, texts: list[str], labels: np.ndarray) -> "Recorder":
            half = len(texts) // 2
            assert labels.tolist() == [0] * half + [1] * half
            seen.extend(one + two for one, two in zip(texts[:half], texts[half:], strict=True))
            return self

        def decision_function(self, texts: list[str]) -> np.ndarray:
            return np.array([float(text[1] == "b") for text in texts])

    assert floor(real, np.repeat(np.arange(8), 2).tolist(), 8, Recorder) is not None
    assert all(pair[0] == pair[2] and {pair[1], pair[3]} == {"a", "b"} for pair in seen)
    assert len(set(seen)) > 8


def test_too_few() -> None:
    """One video cannot be held out; with one comment a video nothing real is like another."""
    assert auc(["甲", "乙"], ["丙", "丁"], [0, 0], 1, by_characters) is None
    assert floor(["甲", "乙", "丙"], [0, 1, 2], 3, by_characters) is None
    assert floor(["甲", "乙"], [0, 0], 1, by_characters) is None
    assert auc(["甲", "乙"], ["丙丙", "丁丁"], [0, 1], 2, by_characters) is not None
    assert mean([]) is mean([lambda weights: weights.sum(1), None]) is None


def test_mean() -> None:
    both = mean([lambda weights: weights[:, 0] * 1.0, lambda weights: weights[:, 1] * 3.0])
    assert both is not None
    assert both(np.array([[1, 1], [2, 0]])).tolist() == [2, 1]


def test_no_leak_between_folds() -> None:
    """A word that only one video's replies have says who wrote them, but not in other videos."""
    random = np.random.default_rng(3)
    plain_texts = [make_texts(random) for _ in range(2)]
    real, written = (
        [text + chr(0x6000 + 100 * side + place) * 3 for place, text in zip(PLACES, texts, strict=True)]
        for side, texts in enumerate(plain_texts)
    )
    apart = interval(auc(real, written, PLACES, VIDEOS, by_characters))
    assert apart.low <= 0.5 <= apart.high
    count = len(PLACES)
    assert plain(auc(real, written, list(range(count)), count, by_characters), count) > 0.9  # Each its own video.
