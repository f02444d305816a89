"""What prepare_data.py wrote is found again: counts, records, texts; and whether its cleaning is right, by hand.

python -m pytest tests/test_utils_data_prepared.py
"""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import load_script, write_rows

from utils.data import prepared
from utils.data.records import DataError, to_messages

CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 2000)]
ODD = '他说"好"\\n，\n第二行 ABC 😀'


def crawl() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Videos, and comments of which many are junk."""
    random = Random(0)
    texts = ["".join(random.sample(CHARACTERS, 12)) for _ in range(80)] + [ODD]
    texts += ["加我微信 abc12345 领资料"] * 4 + ["好"] * 5 + ["求一份完整的资料吧"] * 40 + ["  "]
    videos = [
        {"video_id": str(1000 + n), "title": f"第{n}个 Video", "desc": "简介" * n, "last_modify_ts": 1}
        for n in range(9)
    ]
    comments = [
        {"comment_id": str(n + 1), "parent_comment_id": "0", "video_id": str(1000 + n % 9), "content": text}
        for n, text in enumerate(texts)
    ]
    return videos, comments + comments[:7]


def prepare(data: Path, output: Path, *arguments: str) -> Path:
    script = load_script("prepare_data.py")
    given = ["--data_dir", str(data), "--output_dir", str(output), "--test_size", "0.3", *arguments]
    script.main(script.build_parser().parse_args(given))
    return output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crawl")
    for name, rows in zip(("contents", "comments"), crawl(), strict=True):
        (folder / f"search_{name}_2026-01-01.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def output(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(data, tmp_path_factory.mktemp("output"), "--write_dropped", "True")


@pytest.fixture
def copy(output: Path, tmp_path: Path) -> Path:
    """To be damaged."""
    return shutil.copytree(output, tmp_path / "copy")


def kept(folder: Path) -> list[dict[str, Any]]:
    return [
        row for name in ("train", "test") for row in json.loads((folder / f"data_{name}.json").read_text("utf-8"))
    ]


def dropped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text("utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Counts and records


def test_counts(output: Path) -> None:
    found = prepared.read_prepared(output)
    assert (found.read, found.dropped["duplicate"]) == (138, 7) and found.has_dropped
    cleaned = Counter(row["reason"] for row in dropped(output))
    assert cleaned.pop("empty") == 1 and found.cleaned == cleaned.total() == 4 + 5 + 37
    assert found.passed == len(kept(output)) == found.read - sum(found.dropped.values()) == 84
    assert found.splits["test"]["comments"] > 0
    assert found.lengths["comment"] == Counter(len(row["conversations"][-1]["value"]) for row in kept(output))
    assert prepared.is_prepared(output) and not prepared.is_prepared(output / "no")


def test_the_mark_is_that_of_data_and_rules(data: Path, copy: Path, tmp_path: Path) -> None:
    """With --total comments pass that are in no file. What an earlier run dropped is not taken for this one's."""
    first, path = prepared.read_prepared(copy), copy / "report.json"
    path.write_text(path.read_text("utf-8").replace('"write_dropped": true', '"write_dropped": false'), "utf-8")
    again = prepared.read_prepared(copy)
    assert again.mark == first.mark and (copy / "dropped.jsonl").exists() and not again.has_dropped
    other = prepared.read_prepared(prepare(data, tmp_path / "other", "--max_repeats", "2", "--total", "50"))
    assert other.mark != first.mark and not other.has_dropped
    assert (other.passed, sum(split["comments"] for split in other.splits.values())) == (83, 50)


@pytest.mark.parametrize(
    ("counts", "edge", "expected"),
    [
        ({1: 2, 3: 5, 900: 1}, 4, [(0, 1, 0), (1, 2, 2), (2, 3, 0), (3, 4, 5), (4, 5, 1)]),
        ({0: 1, 2: 1, 80: 3, 81: 4}, 80, [(0, 3, 2), *((n, n + 3, 0) for n in range(3, 78, 3)), (78, 81, 7)]),
        ({7: 3}, 0, [(0, 1, 3)]),
    ],
)
def test_bars(counts: dict[int, int], edge: int, expected: list[tuple[int, int, int]]) -> None:
    assert prepared.bars(counts, edge) == expected


def test_records_are_read_one_by_one(output: Path) -> None:
    lines = prepared.kept_lines(output)
    rows = kept(output)
    assert prepared.size_of(lines) == len(rows)
    assert [prepared.record_at(lines, number) for number in range(len(rows))] == rows
    assert prepared.messages_at(lines, [3, 1]) == [to_messages(rows[3]), to_messages(rows[1])]
    lines = prepared.cleaned_lines(output)
    found = [prepared.record_at(lines, number) for number in range(prepared.size_of(lines))]
    assert found == [row for row in dropped(output) if row["reason"] != "empty"]


def test_no_order_is_likelier() -> None:
    """Of 5 things 2 in order: 20 ways, 150 times each, +- 4 standard deviations. Larger draws begin alike."""
    random = Random(0)
    found = Counter(tuple(prepared.in_random_order(random, 5, 2)) for _ in range(3000))
    assert len(found) == 20 and all(abs(count - 150) < 48 for count in found.values())
    for count in range(9):
        drawn = prepared.in_random_order(Random(1), 6, count)
        assert drawn == prepared.in_random_order(Random(1), 6, 6)[:count] and len({*drawn}) == min(count, 6)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("report.json", lambda text: text[:90]),
        ("report.json", lambda text: "[]"),
        ("report.json", lambda text: '{"arguments": {}, "verdict": "better"}'),
        ("report.json", lambda text: text.replace('"read": 138', '"read": 0')),
        ("report.json", lambda text: text.replace('"too_short"', '"<b>**"')),
        ("report.json", lambda text: text.replace('"videos"', '"movies"')),
        ("data_train.json", lambda text: text[: len(text) // 2]),
        ("data_test.json", lambda text: "[\n]\n"),
        ("data_test.json", None),
        ("dropped.jsonl", lambda text: text[:-30]),
        ("dropped.jsonl", lambda text: text[text.index("\n") + 1 :] + '{"reason": 7, "id": "1", "text": ""}\n'),
        ("dropped.jsonl", lambda text: text[: text.rindex("\n", 0, -1) + 1]),
        ("dropped.jsonl", lambda text: "[1]\n" + text),
        ("dropped.jsonl", lambda text: "[" * 100_000 + "\n" + text),
    ],
)
def test_damaged_files_are_named(copy: Path, name: str, change: Any) -> None:
    path = copy / name
    path.unlink() if change is None else path.write_text(change(path.read_text("utf-8")), "utf-8")
    with pytest.raises(DataError, match=name):
        prepared.read_prepared(copy)
        prepared.kept_lines(copy)
        prepared.cleaned_lines(copy)


# ---------------------------------------------------------------------------------------------------------------------
# Search


@pytest.mark.parametrize("where", ["answer", "prompt", "dropped"])
@pytest.mark.parametrize("wanted", ["的", '"好"\\', "abc", "vIDEO", "😀", "资料", "from", "B站", "\n第", "没有这个"])
def test_search_finds_what_is_there(output: Path, where: str, wanted: str) -> None:
    """Whichever the case; in the texts alone, not in names of fields, the system prompt or ids."""
    if where == "dropped":
        pairs = [(row["reason"], row["text"], row["text"]) for row in dropped(output)]
    else:
        turns = [[turn["value"] for turn in row["conversations"]] for row in kept(output)]
        pairs = [(each[1], each[2], each[1 if where == "prompt" else 2]) for each in turns]
    expected = [pair[:2] for pair in pairs if wanted.lower() in pair[2].lower()]
    assert prepared.search(output, where, wanted) == (len(expected), expected[:50])


def test_search_parses_what_may_match_alone(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Any] = []
    monkeypatch.setattr(json, "loads", lambda text, loads=json.loads: parsed.append(text) or loads(text))
    assert prepared.search(output, "answer", "第二行").total == 1
    assert len(parsed) == 2, "report.json, and the record"


def test_search_in_a_damaged_file(copy: Path) -> None:
    with (copy / "dropped.jsonl").open("a") as file:
        file.write('{"reason": "bait", "tex": "好"}\n')
    with pytest.raises(DataError, match="dropped.jsonl"):
        prepared.search(copy, "dropped", "好")


@pytest.mark.parametrize(("name", "where"), [("data_train.json", "answer"), ("dropped.jsonl", "dropped")])
def test_search_in_half_a_file(copy: Path, name: str, where: str) -> None:
    """Nothing found would be no answer."""
    lines = (copy / name).read_text("utf-8").splitlines(keepends=True)
    (copy / name).write_text("".join(lines[: len(lines) // 2]), "utf-8")
    with pytest.raises(DataError, match=f"{name}: got .* records, expected"):
        prepared.search(copy, where, "没有这个")


# ---------------------------------------------------------------------------------------------------------------------
# Is the cleaning right?


def test_half_of_a_draw_was_dropped(output: Path) -> None:
    """46 dropped ones: 25, then 21, then none, and 25 kept ones each time. The same again; others for other data."""
    lines = prepared.kept_lines(output), prepared.cleaned_lines(output)
    drawn = prepared.draw_records("m", *lines, 3)
    assert [Counter((each.draw, bool(each.reason)) for each in drawn)] == [
        {(0, True): 25, (0, False): 25, (1, True): 21, (1, False): 25, (2, False): 25}
    ]
    assert prepared.draw_records("m", *lines, 1) == drawn[:50] != prepared.draw_records("n", *lines, 1)
    order = [bool(each.reason) for each in drawn[:50]]
    assert 10 < sum(one != two for one, two in zip(order, order[1:], strict=False)) < 40, "mixed"
    turns = {row["id"]: [turn["value"] for turn in row["conversations"]] for row in kept(output)}
    texts = {id: (prompt, answer, "") for id, (_, prompt, answer) in turns.items()}
    texts |= {row["id"]: (row["prompt"], row["text"], row["reason"]) for row in dropped(output)}
    assert all(texts[each.id] == (each.prompt, each.text, each.reason) for each in drawn)
    assert len({each.id for each in drawn}) == len(drawn) == 121


@pytest.mark.parametrize(("name", "before", "after"), [
    ("data_train.json", '"conversations"', '"messages"'), ("dropped.jsonl", '"text":"', '"texts":"'),
    ("dropped.jsonl", '"prompt":"', '"prompt":7,"was":"'),
])  # fmt: skip
def test_foreign_records_cannot_be_judged(copy: Path, name: str, before: str, after: str) -> None:
    text = (copy / name).read_text("utf-8")
    assert before in text
    (copy / name).write_text(text.replace(before, after), "utf-8")
    with pytest.raises(DataError, match="not what prepare_data.py writes"):
        prepared.draw_records("m", prepared.kept_lines(copy), prepared.cleaned_lines(copy), 1)


def test_labels_that_are_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        prepared.read_labels(tmp_path, "m")


def test_the_last_label_counts(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    assert prepared.read_labels(path, "m") == {}
    rows = [{"data": "m", "draw": 0, "id": id, "junk": junk} for id, junk in (("1", True), ("2", True), ("1", False))]
    write_rows(path, [*rows, rows[1] | {"data": "other", "junk": False}, {"data": "m"}])
    with path.open("a") as file:
        file.write('{"data": "m", "draw": 0, "id": "2", "jun')
    assert {id: row["junk"] for id, row in prepared.read_labels(path, "m").items()} == {"1": False, "2": True}


def test_quality_by_hand() -> None:
    """8 of 10 dropped and 1 of 10 kept ones are junk: of 100 dropped 80, of 900 kept 90; 80 of 170 were dropped."""
    found = prepared.quality([True] * 8 + [False] * 2, [True] + [False] * 9, 100, 900)
    assert (found.precision.value, found.recall.value, found.left.value) == (0.8, pytest.approx(8 / 17), 0.1)
    # Of Clopper and Pearson's 0 of n: up to 1 - 0.025 ** (1 / n).
    clean = prepared.quality([True] * 10, [False] * 10, 100, 900)
    assert clean.precision[:1] + clean.precision[2:] == (1, 1) and clean.left[:2] == (0, 0)
    assert clean.precision.low == pytest.approx(0.025 ** (1 / 10)) == pytest.approx(1 - clean.left.high)
    assert clean.recall.value == 1 == clean.recall.high and 0 < clean.recall.low < 1
    nothing = prepared.quality([False] * 10, [False] * 10, 100, 900).recall
    assert nothing == (None, 0, 1)
    assert prepared.quality([False], [True], 1, 9).recall[:2] == (0, 0)


def test_recall_interval_by_integration() -> None:
    """The ends are quantiles of D P / (D P + K Q): P(D P / (D P + K Q) <= r) = E F(K Q r / (D (1 - r)))."""
    import numpy as np
    from scipy.optimize import brentq
    from scipy.stats import beta

    x, n, y, m, n_dropped, n_kept = 20, 25, 3, 25, 500, 2000
    points = (np.arange(20_000) + 0.5) / 20_000

    def end(p: tuple[int, int], q: tuple[int, int], level: float) -> float:
        other = beta.ppf(points, *q)
        return brentq(
            lambda r: beta.cdf(n_kept * other * r / (n_dropped * (1 - r)), *p).mean() - level, 1e-6, 1 - 1e-6
        )

    found = prepared.quality([True] * x + [False] * (n - x), [True] * y + [False] * (m - y), n_dropped, n_kept).recall
    assert found.low == pytest.approx(end((x, n - x + 1), (y + 1, m - y), 0.025), abs=0.01)
    assert found.high == pytest.approx(end((x + 1, n - x), (y, m - y + 1), 0.975), abs=0.01)


def test_recall_interval_covers() -> None:
    """Whatever the true shares are, 95 % of all possible draws of 10 and 10 give an interval that holds the recall."""
    n, sizes = 10, (200, 3000)
    intervals = {
        (x, y): prepared.quality([True] * x + [False] * (n - x), [True] * y + [False] * (n - y), *sizes).recall
        for x in range(n + 1)
        for y in range(n + 1)
    }

    def chance(count: int, share: float) -> float:
        return math.comb(n, count) * share**count * (1 - share) ** (n - count)

    for p in (0.05, 0.3, 0.6, 0.9, 1.0):
        for q in (0.002, 0.01, 0.05, 0.2, 0.5, 1.0):
            recall = sizes[0] * p / (sizes[0] * p + sizes[1] * q)
            held = [pair for pair, each in intervals.items() if each.low <= recall <= each.high]
            assert sum(chance(x, p) * chance(y, q) for x, y in held) >= 0.95, (p, q)


def test_how_to_loosen_a_rule() -> None:
    """With arguments that prepare_data.py takes and that let more pass."""
    script = load_script("prepare_data.py")
    usual = vars(script.build_parser().parse_args([]))
    usual |= {"min_likes": 3, "drop_uploader": True, "language": "zh"}
    for reason in prepared.REASONS:
        name, value = prepared.looser(reason, usual).removeprefix("--").split()
        changed = getattr(script.build_parser().parse_args([f"--{name}", value]), name)
        assert changed != usual[name] and not (name.startswith("max") and changed < usual[name]), reason
    assert prepared.looser("repeat", {"max_repeats": 3}) == "--max_repeats 6"
    assert prepared.looser("too_short", {"min_chars": 2}) == "--min_chars 1"
    assert prepared.looser("emoticons", {"max_emoticons": 0}) == "--max_emoticons 1"
    assert prepared.looser("repeat", {}) == prepared.looser("something", usual) == ""
