"""utils/evaluate/measures.py: contenders with known faults, each found by the measure that is made for it.

python -m pytest tests/test_utils_evaluate_measures.py
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from utils.data.held_out import Comment
from utils.data.records import comment_prompt
from utils.evaluate.contenders import API, TUNED
from utils.evaluate.intervals import Estimate, Interval, draw_videos, estimate, ratio
from utils.evaluate.measures import (
    Evidence,
    Videos,
    add_judged,
    best_of,
    compare,
    describe,
    distances,
    measure,
    wins,
)

WORDS = (
    "这个 视频 真的 好看 笑死 我了 第一 前排 为什么 没有 老师 声音 "
    "画面 音乐 可爱 厉害 感觉 已经 三连 支持 想吃 下次 一定 泪目"
).split()
VIDEOS, EACH = 40, 6
OTHERS = 3  # Questions of the same video, and as many of others, that a reply is read after.
TRAINING = [f"训练数据里的第{number}句话，随便写得长一些" for number in range(50)]


def sentence(random: np.random.Generator) -> str:
    words = random.choice(WORDS, size=random.integers(3, 8)).tolist()
    return "".join(words) + random.choice(["", "", "！", "。", "？", "[doge]", "😂"])


def comment(video: int, number: int, answer: str, parent: str = "") -> Comment:
    """In messages as prepare_data.py writes them."""
    prompt = comment_prompt(f"第{video}个视频", "", parent)
    turns = [("system", "你是一名用户。"), ("user", prompt), ("assistant", answer)]
    return Comment(f"{video}-{number}", str(video), [{"role": role, "content": text} for role, text in turns])


@pytest.fixture(scope="module")
def comments() -> list[Comment]:
    random = np.random.default_rng(0)
    numbers = [(video, number) for video in range(VIDEOS) for number in range(EACH)]
    return [comment(*both, sentence(random), sentence(random)) for both in numbers]


def parent_of(one: Comment) -> str:
    return one.messages[1]["content"].rpartition("父评论：")[2]


def nats(comments: list[Comment], own: float, spread: float = 3, seed: int = 0) -> dict[str, dict[str, float]]:
    """Of replies that are so much likelier after their own question than after others, on average."""
    random, found = np.random.default_rng(seed), {}
    for place, one in enumerate(comments):
        first = place - place % EACH
        same = [first + (place + step) % EACH for step in range(EACH)]
        away = [(place + EACH * step) % len(comments) for step in range(1, OTHERS + 1)]
        others = [other for other in same if other != place][:OTHERS] + away
        found[one.id] = {comments[other].id: -20 + spread * random.normal() for other in others}
        found[one.id][one.id] = -20 + own + spread * random.normal()
    return found


def evidence(
    name: str, comments: list[Comment], write: Callable[[Comment], str], own: float = 4, seed: int = 0, count: int = 1
) -> Evidence:
    """Of a contender that reads the real replies well, and whose own replies fit as `own` says."""
    replies = {one.id: [write(one) for _ in range(count)] for one in comments}
    cut = {id: [False] * count for id in replies}
    return Evidence(name, TUNED, replies, cut, nats(comments, 4, seed=seed), nats(comments, own, seed=seed + 1))


@pytest.fixture(scope="module")
def measured(comments: list[Comment]) -> dict[str, Any]:
    """One without faults, one for each fault, and one whose likelihoods nobody knows."""
    random = np.random.default_rng(1)
    api = evidence("api", comments, lambda one: sentence(random), count=2)._replace(kind=API, real={}, written={})
    everybody = [
        evidence("good", comments, lambda one: sentence(random), seed=10),
        evidence("echo", comments, lambda one: "：" + parent_of(one), own=100, seed=20),
        evidence("same", comments, lambda one: "求", own=0, seed=30),
        evidence("copy", comments, lambda one: TRAINING[random.integers(50)], seed=40),
        evidence("astray", comments, lambda one: sentence(random), own=-4, seed=50),
        api,
    ]
    return measure(comments, everybody, TRAINING)


def test_what_is_measured(measured: dict[str, Any]) -> None:
    assert (measured["comments"], measured["left_out"], measured["videos"]) == (VIDEOS * EACH, 0, VIDEOS)
    assert measured["contenders"]["api"] == API
    assert [*measured["texts"]] == ["real", *measured["contenders"]]
    floor = measured["floor"]
    assert floor.value == pytest.approx(0.5, abs=0.1)


def test_one_without_faults(measured: dict[str, Any]) -> None:
    """Its replies are made like the real ones, and fit; nobody is better."""
    scores, written = measured["scores"]["good"], measured["texts"]["good"]
    assert scores["noticed"].value == pytest.approx(0.5, abs=0.1)
    assert scores["by length"].value == pytest.approx(0.5, abs=0.1)
    assert scores["fitting"].low > 0.6 and scores["reading"].low > 0.6
    for name in ("copied, whole", "copied, part", "contact", "link", "control", "empty", "cut"):
        assert written["shares"][name].value == 0
    assert written["shares"]["echo"].high < 0.1  # Two words in a row may be the comment's.
    assert "good" in measured["best"]
    assert {row["verdict"] for row in measured["verdicts"]["noticed"]["good"].values()} <= {"better", "equal"}


def test_an_echo_counts_as_guessing(measured: dict[str, Any]) -> None:
    """Its replies are always the likeliest after their own questions, and that says nothing."""
    scores = measured["scores"]["echo"]
    assert measured["texts"]["echo"]["shares"]["echo"].low > 0.9
    assert measured["texts"]["real"]["shares"]["echo"].high < 0.1
    for name in ("fitting", "fitting, same video", "fitting, other videos"):
        assert scores[name].value == pytest.approx(0.5, abs=0.03)  # Comments of fewer than four characters are none.
    assert scores["reading"].low > 0.6
    assert measured["verdicts"]["fitting"]["echo"]["good"]["verdict"] == "worse"
    assert "echo" not in measured["best"]


def test_one_reply_for_all(measured: dict[str, Any]) -> None:
    """求 has no pair of characters, and no length but one."""
    scores, written = measured["scores"]["same"], measured["texts"]["same"]
    assert written["shares"]["equal"] == (1, 1, 1)
    assert written["distinct-2"] == 0 < measured["texts"]["good"]["distinct-2"]
    assert written["commonest"] == [("求", VIDEOS * EACH)]
    assert written["characters"] == [1, 1]
    assert written["distances"]["length"] == pytest.approx(measured["texts"]["real"]["characters"][1] - 1)
    assert scores["noticed"].low > 0.98 and scores["by length"].low > 0.9
    verdicts = measured["verdicts"]["noticed"]
    assert (verdicts["same"]["good"]["verdict"], verdicts["good"]["same"]["verdict"]) == ("worse", "better")
    assert "same" not in measured["best"]


def test_copies_of_training_answers(measured: dict[str, Any]) -> None:
    shares = measured["texts"]["copy"]["shares"]
    assert shares["copied, whole"] == (1, 1, 1)
    assert shares["copied, part"].value == 0
    assert measured["texts"]["real"]["shares"]["copied, whole"].value == 0


def test_answers_to_other_videos(measured: dict[str, Any]) -> None:
    """They look like the others' replies."""
    scores = measured["scores"]["astray"]
    assert scores["fitting"].high < 0.4
    assert measured["verdicts"]["fitting"]["astray"]["good"]["verdict"] == "worse"
    assert measured["verdicts"]["fitting"]["good"]["astray"]["lead"].low > 0.2
    assert measured["verdicts"]["likelihood"]["astray"]["good"]["verdict"] == "equal"
    assert scores["noticed"].value == pytest.approx(0.5, abs=0.1)


def test_without_likelihoods(measured: dict[str, Any]) -> None:
    """An API says what it wrote, not how likely it finds anything: it is compared in the rest."""
    assert set(measured["scores"]["api"]) == {"noticed", "by length"}
    assert measured["verdicts"]["noticed"]["api"]["same"]["verdict"] == "better"
    assert set(measured["verdicts"]) == {"likelihood", "reading", "fitting", "noticed"}
    assert all("api" not in measured["verdicts"][name] for name in ("likelihood", "reading", "fitting"))
    assert len(measured["texts"]["api"]["lengths"]) == 2 * VIDEOS * EACH


def test_leads_are_seen_from_both_sides(measured: dict[str, Any]) -> None:
    mirror = {"better": "worse", "worse": "better", "equal": "equal"}
    for rows in measured["verdicts"].values():
        for one, row in rows.items():
            for other, said in row.items():
                back = rows[other][one]
                assert back["verdict"] == mirror[said["verdict"]]
                assert back["lead"] == pytest.approx((-said["lead"].value, -said["lead"].high, -said["lead"].low))


def test_unwanted_replies(comments: list[Comment]) -> None:
    """Shares of comments' replies, two of each: half of the replies, and those cut as they say."""
    videos = Videos(comments)
    replies = {one.id: ["加QQ：12345678", f"www.example.com{one.id}"] for one in comments}
    cut = {id: [True, id.startswith("1")] for id in replies}
    found = describe(videos, replies, cut, None)["shares"]
    assert (found["contact"].value, found["link"].value, found["control"].value) == (0.5, 0.5, 0)
    assert found["equal"].value == 1  # The first replies.
    assert found["cut"].value == pytest.approx(0.5 + 0.5 * 11 / VIDEOS)  # Videos 1 and 10 to 19.
    assert "copied, whole" not in found and "cut" not in describe(videos, replies, {}, None)["shares"]


def small() -> list[Comment]:
    """Three comments under one video, one under another; 1, 2, 3 and 10 characters."""
    sizes = {(0, 0): 1, (0, 1): 2, (0, 2): 3, (1, 0): 10}
    return [comment(*both, "好" * size) for both, size in sizes.items()]


def test_bits_per_character() -> None:
    """1, 2, 3 and 4 bits for each of 1, 2, 3 and 10 characters: 54 bits for 16 characters, whatever the tokens."""
    real = {one.id: {one.id: -math.log(2) * bits * len(one.messages[-1]["content"])}
            for bits, one in enumerate(small(), start=1)}  # fmt: skip
    replies, cut = {id: ["嗯"] for id in real}, {id: [False] for id in real}
    found = measure(small(), [Evidence("one", TUNED, replies, cut, real, {})], None)
    assert found["scores"]["one"]["likelihood"].value == pytest.approx((1 + 4 + 9 + 40) / 16)
    assert "reading" not in found["scores"]["one"]  # Nothing was read after other questions.


def test_wins_by_hand() -> None:
    """Of 0-0 one is likelier at home, one equal, one not; 1-0 is read after its own question and one other."""
    videos = Videos(small())
    after = {
        "0-0": {"0-0": -5.0, "0-1": -6.0, "0-2": -5.0, "1-0": -4.0},
        "1-0": {"1-0": -1.0, "0-2": -1.5},
        "0-1": {"0-0": -3.0},  # Its own question is not known.
    }
    assert wins(videos, after, None) == {"0-0": (1.5, 3), "1-0": (1, 1)}
    assert wins(videos, after, True) == {"0-0": (1.5, 2), "1-0": (0, 0)}
    assert wins(videos, after, False) == {"0-0": (0, 1), "1-0": (1, 1)}
    assert wins(videos, after, None, {"0-0", "1-0"}) == {"0-0": (1.5, 3), "1-0": (0.5, 1)}
    assert wins(videos, after, False, {"0-0"}) == {"0-0": (0.5, 1), "1-0": (1, 1)}


def test_sums_over_videos() -> None:
    """Video 0 has 3 of 4, video 1 has 1 of 5; the draws take them together."""
    videos = Videos(small())
    found = videos.ratio({"0-0": (1, 2), "0-2": (2, 2), "1-0": (1, 5)})
    assert found is not None
    assert found.value == pytest.approx(4 / 9)
    assert set(np.round(found.draws, 6)) == {0.75, 0.2, round(4 / 9, 6)}
    assert videos.ratio({}) is None and videos.ratio({"0-0": (0, 0)}) is None


def constant(value: float, videos: int = 20) -> Estimate:
    """The same in each video."""
    return estimate(ratio([value] * videos, [1] * videos), draw_videos(videos))


def test_compare() -> None:
    """More is better of reading and fitting, less of likelihood and noticed."""
    noisy = estimate(ratio([0.2, 0.81] * 10, [1] * 20), draw_videos(20))
    one, two = ([constant(value) for value in values] for values in ((3, 0.7, 0.6, 0.5), (4, 0.6, 0.9)))
    names = ("likelihood", "reading", "noticed", "fitting")
    numbers = {
        "one": dict(zip(names, one, strict=True)),
        "two": dict(zip(names, [*two, noisy], strict=True)),
        "api": {"noticed": constant(0.7)},
    }
    found = compare(numbers, 300, 40)
    said = {name: {pair: rows[pair[0]][pair[1]]["verdict"] for pair in (("one", "two"), ("two", "one"))}
            for name, rows in found.items()}  # fmt: skip
    better = {("one", "two"): "better", ("two", "one"): "worse"}
    assert said == dict.fromkeys(("likelihood", "reading", "noticed"), better) | {
        "fitting": {("one", "two"): "equal", ("two", "one"): "equal"}
    }
    assert found["likelihood"]["one"]["two"]["lead"] == pytest.approx((1, 1, 1))
    assert found["noticed"]["api"]["one"]["lead"] == pytest.approx((-0.1, -0.1, -0.1))
    assert "api" not in found["reading"]
    few = compare(numbers, 199, 40)
    assert few["noticed"]["one"]["two"]["verdict"] == "few" and few["reading"]["one"]["two"]["verdict"] == "better"
    short = compare({name: {"reading": constant(value, 9)} for name, value in (("one", 0.9), ("two", 0.1))}, 300, 9)
    assert short["reading"]["one"]["two"]["verdict"] == "few"


def said(*rows: str) -> dict[str, Any]:
    """From "question: contender verdict other", and the same from the other's side."""
    found: dict[str, Any] = {}
    mirror = {"better": "worse", "worse": "better"}
    for row in rows:
        question, one, verdict, other = row.replace(":", "").split()
        found.setdefault(question, {}).setdefault(one, {})[other] = {"verdict": verdict}
        found[question].setdefault(other, {})[one] = {"verdict": mirror.get(verdict, verdict)}
    return found


@pytest.mark.parametrize(
    "rows, wanted",
    [
        (["x: a better b", "x: a better c", "x: b equal c"], "a"),
        (["x: a better b", "y: a worse b"], "abc"),  # One each.
        (["x: a better b", "y: a worse b", "z: a worse b"], "bc"),
        (["x: a better b", "x: b better c", "x: a equal c"], "a"),
        (["x: a better b", "x: b better c", "x: c better a"], "abc"),  # A circle.
        (["x: a few b", "x: b few c"], ""),
        (["x: a few b", "y: a better b"], "ac"),
        (["x: a equal b", "x: b equal c", "x: a equal c"], "abc"),
    ],
)
def test_best(rows: list[str], wanted: str) -> None:
    assert best_of(said(*rows), ["a", "b", "c"]) == [*wanted]


def test_comments_that_one_lacks() -> None:
    """They are left out for all: the other's nats and replies there would change its numbers."""
    comments = [comment(video, number, "好看" * (1 + number)) for video in range(3) for number in range(2)]
    one = evidence("one", comments, lambda comment: "嗯嗯" + comment.id)
    other = evidence("other", comments, lambda comment: "啊啊" + comment.id, seed=5)
    del other.replies["0-0"], other.real["1-1"]
    found = measure(comments, [one, other], None)
    assert (found["comments"], found["left_out"], found["videos"]) == (4, 2, 3)
    assert len(found["texts"]["one"]["lengths"]) == len(found["texts"]["real"]["lengths"]) == 4
    kept = [comment for comment in comments if comment.id not in ("0-0", "1-1")]
    bits = sum(-one.real[comment.id][comment.id] / math.log(2) for comment in kept)
    characters = sum(len(comment.messages[-1]["content"]) for comment in kept)
    assert found["scores"]["one"]["likelihood"].value == pytest.approx(bits / characters)
    asked = [(id, other) for id in (comment.id for comment in kept) for other in one.real[id] if other != id]
    asked = [pair for pair in asked if pair[1] not in ("0-0", "1-1")]
    right = [one.real[id][id] > one.real[id][other] for id, other in asked]
    assert found["scores"]["one"]["reading"].value == pytest.approx(np.mean(right))


def test_nothing_in_common() -> None:
    comments = small()
    replies = {one.id: ["嗯"] for one in comments}
    halves = [{id: replies[id] for id in ids} for ids in (("0-0", "0-1"), ("0-2", "1-0"))]
    both = [Evidence(name, API, half, {}, {}, {}) for name, half in zip(("one", "other"), halves, strict=True)]
    with pytest.raises(ValueError, match="no comment"):
        measure(comments, both, None)


def test_judged_by_hand() -> None:
    """In 12 videos a wins 2 of 2 against b, and 1 of 2 against c; a comment that was left out has no part."""
    comments = [comment(video, 0, "好看") for video in range(12)]
    videos = Videos(comments)
    ids = [one.id for one in comments]
    judged = {
        ("a", "b"): {id: (2.0, 2.0) for id in ids} | {"99-0": (0.0, 50.0)},
        ("a", "c"): {id: (1.0, 2.0) for id in ids},
        ("c", "b"): {},
    }
    scores: dict[str, dict[str, Interval]] = {name: {} for name in "abc"}
    verdicts: dict[str, Any] = {}
    add_judged(videos, judged, scores, verdicts)
    rows = verdicts["judged"]
    assert {one: {other: row["verdict"] for other, row in found.items()} for one, found in rows.items()} == {
        "a": {"b": "better", "c": "equal"}, "b": {"a": "worse"}, "c": {"a": "equal"},
    }  # fmt: skip
    assert rows["a"]["b"]["lead"] == (0.5, 0.5, 0.5) and rows["b"]["a"]["lead"] == (-0.5, -0.5, -0.5)
    assert {name: own["judged"].value for name, own in scores.items()} == {"a": 0.75, "b": 0, "c": 0.5}


def test_judged_leads_have_intervals() -> None:
    """Half of the videos for a, half for b, one has more comments: no lead that could not be chance."""
    comments = [comment(video, 0, "好看") for video in range(12)]
    scores: dict[str, dict[str, Interval]] = {name: {} for name in "ab"}
    verdicts: dict[str, Any] = {}
    found = {one.id: (float(place % 2), 1.0) for place, one in enumerate(comments)} | {"1-0": (3.0, 3.0)}
    add_judged(Videos(comments), {("a", "b"): found}, scores, verdicts)
    row = verdicts["judged"]["a"]["b"]
    assert row["verdict"] == "equal" and row["lead"].value == pytest.approx(8 / 14 - 0.5)
    assert row["lead"].low < 0 < row["lead"].high


def test_distances() -> None:
    """Nothing between equal replies; the emoticons apart from one another, the rest equal."""
    one, two = ["好看[doge]", "前排！"], ["好看[笑哭]", "前排！"]
    assert distances(one, one) == dict.fromkeys(("length", "emoticons", "emoji", "punctuation", "beginnings"), 0)
    found = distances(one, two)
    assert found.pop("length") == pytest.approx((len("[doge]") - len("[笑哭]")) / 2)
    assert found == {"emoticons": pytest.approx(1), "emoji": 0, "punctuation": 0, "beginnings": 0}
