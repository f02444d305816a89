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

WORDS = (
    "这个 视频 真的 好看 笑死 我了 第一 前排 为什么 没有 老师 声音 "
    "画面 音乐 可爱 厉害 感觉 已经 三连 支持 想吃 下次 一定 泪目"
).split()
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
    """The same with scikit-learn's area under the curve."""
    learnt, asked = next(GroupKFold(2, shuffle=True, random_state=0).split(real, groups=videos))
    texts = [real[row] for row in learnt] + [written[row] for row in learnt]
    classifier = make().fit(texts, [0] * len(learnt) + [1] * len(learnt))
    texts = [real[row] for row in asked] + [written[row] for row in asked]
    counts = [weights[videos[row]] for row in asked]
    labels = [0] * len(asked) + [1] * len(asked)
    return float(roc_auc_score(labels, classifier.decision_function(texts), sample_weight=counts * 2))


@pytest.mark.filterwarnings("ignore:Bins whose width")
@pytest.mark.parametrize("make", [by_characters, by_length])
def test_area_is_scikit_learns(make: Callable[[], Any], pairs: tuple[list[str], list[str]]) -> None:
    """Once with all videos, once with some that come twice or thrice; videos of unequal size, and equal scores."""
    real, written = pairs[0], make_texts(np.random.default_rng(1), longer=2)
    kept = [row for row, place in enumerate(PLACES) if row % EACH <= place % 5]
    real, written, videos = ([side[row] for row in kept] for side in (real, written, PLACES))
    written[::3] = [text[:5] for text in written[::3]]
    some = [1 + (place % 7 == 0) + 2 * (place % 3 == 1) for place in range(VIDEOS)]
    statistic = auc(real, written, videos, make)
    assert statistic is not None
    found = statistic(np.array([[1] * VIDEOS, some]))
    wanted = [by_scikit_learn(real, written, videos, make, weights) for weights in ([1] * VIDEOS, some)]
    assert found == pytest.approx(wanted)
    assert abs(wanted[0] - wanted[1]) > 1e-3


def test_only_videos_that_were_not_learnt_on_count(pairs: tuple[list[str], list[str]]) -> None:
    """Half of them: how often the others were drawn changes nothing, and where only they were there is no number."""
    real, written = pairs
    learnt, asked = next(GroupKFold(2, shuffle=True, random_state=0).split(real, groups=PLACES))
    inside, outside = (sorted(set(np.array(PLACES)[part])) for part in (learnt, asked))
    assert len(inside) == len(outside) == VIDEOS // 2 and not {*inside} & {*outside}
    statistic = auc(real, written, PLACES, by_characters)
    assert statistic is not None
    weights = np.ones((3, VIDEOS), dtype=int)
    weights[1, inside], weights[2, outside] = 5, 0
    whole, repeated, none = statistic(weights)
    assert whole == repeated and np.isnan(none)


@pytest.mark.parametrize("make", [by_characters, by_length])
def test_same_making_cannot_be_told(make: Callable[[], Any]) -> None:
    """Half on average, and the intervals hold it."""
    misses, values = 0, []
    for seed in range(12):
        random = np.random.default_rng(seed)
        found = interval(auc(make_texts(random), make_texts(random), PLACES, make))
        misses += not found.low <= 0.5 <= found.high
        values.append(found.value)
    assert misses <= 2
    assert np.mean(values) == pytest.approx(0.5, abs=0.04)


@pytest.mark.slow
def test_intervals_cover() -> None:
    """Two models that write alike are called different in about 5 % of cases, and not more often."""
    held = 0
    for seed in range(120):
        random = np.random.default_rng(1000 + seed)
        real, one, two = (make_texts(random) for _ in range(3))
        numbers = []
        for written in (one, two):
            statistic = auc(real, written, PLACES, by_characters)
            assert statistic is not None
            numbers.append(estimate(statistic, draw_videos(VIDEOS, draws=500)))
        lead = (numbers[0] - numbers[1]).interval()
        held += lead.low <= 0 <= lead.high
    assert held >= 0.9 * 120


def test_one_reply_for_all_is_told(pairs: tuple[list[str], list[str]]) -> None:
    """求 under every video."""
    found = interval(auc(pairs[0], ["求"] * len(PLACES), PLACES, by_characters))
    assert found.low > 0.98


def test_right_words_of_the_wrong_length_are_told(pairs: tuple[list[str], list[str]]) -> None:
    """Twice as long, and also half of them too short and half too long, which no single limit can tell."""
    real, long = pairs[0], make_texts(np.random.default_rng(2), longer=2)
    assert interval(auc(real, long, PLACES, by_length)).low > 0.75
    odd = [text[:2] if row % 2 else text * 4 for row, text in enumerate(real)]
    assert interval(auc(real, odd, PLACES, by_length)).low > 0.9


def test_floor(pairs: tuple[list[str], list[str]]) -> None:
    """Real replies against real ones: about half, even where each video has words of its own."""
    texts = make_texts(np.random.default_rng(4))
    own = [f"{chr(0x5000 + place)}{text}" for place, text in zip(PLACES, texts, strict=True)]
    for real in (texts, own):
        found = interval(floor(real, PLACES, by_characters))
        assert found.low <= 0.5 <= found.high
        assert found.value == pytest.approx(0.5, abs=0.06)


def test_floor_takes_pairs_of_one_video() -> None:
    """The first video has one reply, the others two and the last one three, of which one finds no other."""
    names = "甲乙丙丁戊己庚辛"
    real = ["甲a", *(f"{name}{side}" for name in names[1:] for side in "ab"), "辛c"]
    learnt: list[str] = []
    asked: list[list[str]] = []

    class Recorder:
        def fit(self, texts: list[str], labels: np.ndarray) -> "Recorder":
            half = len(texts) // 2
            assert labels.tolist() == [0] * half + [1] * half
            assert all(one[0] == two[0] and one != two for one, two in zip(texts[:half], texts[half:], strict=True))
            learnt.extend(texts[:half])
            return self

        def decision_function(self, texts: list[str]) -> np.ndarray:
            asked.append(texts)
            return np.zeros(len(texts))

    assert floor(real, [names.index(text[0]) for text in real], Recorder) is not None
    sides = [sum(part, []) for part in (asked[::2], asked[1::2])]
    # Five times one pair of each.
    assert sorted(text[0] for text in [*learnt, *sides[0]]) == sorted(names[1:] * 5)
    assert {text[1] for text in [*learnt, *sides[0]]} == set("abc")


def test_too_few() -> None:
    """One video cannot be held out; with one comment a video nothing real is like another."""
    assert auc(["甲", "乙"], ["丙", "丁"], [0, 0], by_characters) is None
    assert floor(["甲", "乙", "丙"], [0, 1, 2], by_characters) is None
    assert floor(["甲", "乙"], [0, 0], by_characters) is None
    assert auc(["甲", "乙"], ["丙丙", "丁丁"], [0, 1], by_characters) is not None
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
    apart = interval(auc(real, written, PLACES, by_characters))
    assert apart.low <= 0.5 <= apart.high
    count = len(PLACES)
    assert plain(auc(real, written, list(range(count)), by_characters), count) > 0.9  # Each its own video.
