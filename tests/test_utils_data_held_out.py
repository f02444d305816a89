"""utils/data/held_out.py: those of a video together, some of them spread over the videos.

python -m pytest tests/test_utils_data_held_out.py
"""

import json
from pathlib import Path
from typing import Any

import pytest

from utils.data.held_out import parts_of, read_comments, read_held_out
from utils.data.records import comment_prompt


def record(video: str, number: int, **more: Any) -> dict[str, Any]:
    question = comment_prompt(f"视频{video}", "简介", "前排" * (number % 2))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"{number}"}]} | more


def taken(path: Path, records: list[Any], count: int | None = None) -> list[str]:
    """Which were read: video and answer."""
    path.write_text(json.dumps(records), encoding="utf-8")
    groups = read_held_out(path, count)
    return ["".join(f"{m[0]['content'].split()[0][-1]}{m[-1]['content']}" for m in group) for group in groups]


# Five comments under A, one under B, two under C, as a crawl may have them: in no order.
MIXED = [record(*pair) for pair in [("A", 0), ("B", 0), ("A", 1), ("C", 0), ("A", 2), ("A", 3), ("C", 1), ("A", 4)]]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (None, ["A0A1A2A3A4", "B0", "C0C1"]),
        (1, ["A0"]),
        (2, ["A0", "B0"]),
        (3, ["A0", "B0", "C0"]),
        (4, ["A0A1", "B0", "C0"]),
        (5, ["A0A1", "B0", "C0C1"]),
        (6, ["A0A1A2", "B0", "C0C1"]),
        (99, ["A0A1A2A3A4", "B0", "C0C1"]),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["video_id", "title"])
def test_spread_over_the_videos(tmp_path: Path, named: bool, count: int | None, expected: list[str]) -> None:
    """Videos are told apart by their ids, or by what their comments' prompts have in common."""
    ids = [{"video_id": r["messages"][0]["content"].split()[0]} if named else {} for r in MIXED]
    records = [r | more for r, more in zip(MIXED, ids, strict=True)]
    assert taken(tmp_path / "data_test.json", records, count) == expected


@pytest.mark.parametrize("nothing", [None, "", float("nan")], ids=str)
def test_nothing_is_no_video_and_no_id(tmp_path: Path, nothing: Any) -> None:
    records = [row | {"id": nothing, "video_id": nothing} for row in MIXED]
    assert taken(tmp_path / "data_test.json", records) == ["A0A1A2A3A4", "B0", "C0C1"]
    ids = [comment.id for group in read_comments(tmp_path / "data_test.json") for comment in group]
    assert sorted(ids) == [str(number) for number in range(8)]


def test_few_of_many_videos_are_from_everywhere(tmp_path: Path) -> None:
    assert taken(tmp_path / "data_test.json", [record(f"{n}", 0) for n in range(10)], 4) == ["00", "20", "50", "70"]


def test_records_without_an_answer_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unusable = {"messages": [{"role": "user", "content": "问"}]}
    assert taken(tmp_path / "data_test.json", [unusable, record("A", 0), unusable]) == ["A0"]
    told = "(2 records were left out: turns that are not user and assistant by turns)\n"
    assert capsys.readouterr().err == told


def test_fields_of_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, rows = tmp_path / "test.jsonl", [("甲", "一"), ("乙", "二"), ("甲", "三")]
    expected = [[[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in group]
                for group in ([("甲", "一"), ("甲", "三")], [("乙", "二")])]  # fmt: skip
    for names, columns in ((("Question", "Answer"), None), (("q", "a"), {"user": "q", "assistant": "a"})):
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
        assert read_held_out(path, columns=columns) == expected
        told = "test.jsonl: fields taken as user and assistant: Question, Answer)\n"
        assert capsys.readouterr().err.endswith(told) == (columns is None)
    with pytest.raises(SystemExit, match=r"test\.jsonl cannot be used: .*no field 'frage' of --columns"):
        read_held_out(path, columns={"user": "frage", "assistant": "a"})


@pytest.mark.parametrize(
    ("text", "message"),
    [("no JSON", "not readable as json"), ("[]", "is empty"), ("[1]", "got a int"), ('[{"messages": []}]', "is empty")],
)
def test_nothing_to_answer(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data_test.json").write_text(text)
    with pytest.raises(SystemExit, match=message):
        read_held_out(tmp_path / "data_test.json")


@pytest.mark.parametrize(
    ("desc", "parent", "expected"),
    [
        ("", "", ("视频标题：标题", "")),
        ("一行\n两行", "", ("视频标题：标题\n视频简介：一行\n两行", "")),
        ("简介", "前排\n沙发", ("视频标题：标题\n视频简介：简介", "父评论：前排\n沙发")),
    ],
)
def test_parts_of_a_prompt(desc: str, parent: str, expected: tuple[str, str]) -> None:
    texts = [("system", "设定"), ("user", comment_prompt("标题", desc, parent)), ("assistant", "答")]
    assert parts_of([{"role": role, "content": text} for role, text in texts]) == expected


def test_parts_of_a_conversation() -> None:
    """All of it but the answer to compare with."""
    talk = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate("一二三四")]
    assert parts_of(talk) == ("一\n二\n三", "")
