"""utils/data/answers.py: a teacher's answers take the place of the real ones, each at its comment.

python -m pytest tests/test_utils_data_answers.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import answers_of, make_records, write_rows

from utils.data.answers import join_answers


def test_answers_are_joined_to_their_comments(tmp_path: Path) -> None:
    """The newest answer counts; those to other comments, or to a prompt that has changed since, do not."""
    records = make_records(1)
    (tmp_path / "data_train.json").write_text(json.dumps(records), encoding="utf-8")
    rows = answers_of(records, key="old") + answers_of(make_records(1, first=5))
    for row in rows[:1]:
        row["conversations"][-1]["value"] = "旧的回答"
    rows += answers_of(records[:1], key="new")
    rows[1]["conversations"][1]["value"] = "另一个标题"
    write_rows(tmp_path / "answers.jsonl", rows)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"id": "torn by a ki')
    path = join_answers(tmp_path / "data_train.json", tmp_path / "answers.jsonl", tmp_path / "cache")
    joined = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in joined] == ["0-0", "0-2", "0-3"]
    assert joined[0]["conversations"][-1]["value"] == "老师说0-0很好看"
    assert join_answers(tmp_path / "data_train.json", tmp_path / "answers.jsonl", tmp_path / "cache") == path


def test_answers_to_comments_whose_fields_are_named(tmp_path: Path) -> None:
    """The same as of comments in a format that is known; with other columns they are joined anew."""
    records, (data, answers) = make_records(1), (tmp_path / "train.jsonl", tmp_path / "answers.jsonl")
    write_rows(answers, answers_of(records))
    (tmp_path / "data_train.json").write_text(json.dumps(records), encoding="utf-8")
    named = [{"id": record["id"], "video_id": record["video_id"]} for record in records]
    for row, record in zip(named, records, strict=True):
        row |= zip(("rolle", "frage", "antwort"), (turn["value"] for turn in record["conversations"]), strict=True)
    write_rows(data, [row | {"andere": "别的"} for row in named])
    columns = {"user": "frage", "assistant": "antwort", "system": "rolle"}
    path = join_answers(data, answers, tmp_path / "cache", columns)
    assert path.read_text() == join_answers(tmp_path / "data_train.json", answers, tmp_path / "cache").read_text()
    other = join_answers(data, answers, tmp_path / "cache", columns | {"assistant": "andere"})
    assert other != path and {json.loads(line)["real"] for line in other.read_text().splitlines()} == {"别的"}


def test_damaged_answers_are_named_and_left_out(tmp_path: Path, capsys: Any) -> None:
    records = make_records(1)
    (tmp_path / "data_train.json").write_text(json.dumps(records), encoding="utf-8")
    rows = answers_of(records)
    rows[1]["conversations"] = [{"from": "human"}]
    write_rows(tmp_path / "answers.jsonl", rows)
    lines = (tmp_path / "answers.jsonl").read_bytes().split(b"\n")
    lines[2] = lines[2][:40]
    (tmp_path / "answers.jsonl").write_bytes(b"\n".join(lines))
    path = join_answers(tmp_path / "data_train.json", tmp_path / "answers.jsonl", tmp_path / "cache")
    told = capsys.readouterr().out
    assert "answers.jsonl: damaged and left out: line 3." in told
    assert f"the answer to {rows[1]['id']} is left out" in told
    joined = [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert joined == [rows[0]["id"], rows[3]["id"]]


def test_answers_to_other_comments_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "data_train.json").write_text(json.dumps(make_records(1)), encoding="utf-8")
    write_rows(tmp_path / "answers.jsonl", answers_of(make_records(1, first=7)))
    with pytest.raises(SystemExit, match="has no answer to a comment of"):
        join_answers(tmp_path / "data_train.json", tmp_path / "answers.jsonl", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("learnt-*"))


def test_a_students_system_prompt_is_not_the_teachers(tmp_path: Path, capsys: Any) -> None:
    """Answers count although the comments' own system prompt has changed; other instructions are told of."""
    records = make_records(1)
    rows = answers_of(records)
    for number, row in enumerate(rows):
        row["setting"] = "new" if number else "old"
    for record in records:
        record["conversations"][0] = {"from": "system", "value": "从现在起"}
    (tmp_path / "data_train.json").write_text(json.dumps([*records, [{"human": "a", "assistant": "b"}]]))
    write_rows(tmp_path / "answers.jsonl", rows)
    path = join_answers(tmp_path / "data_train.json", tmp_path / "answers.jsonl", tmp_path / "cache")
    joined = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(joined) == len(records) > 2
    assert joined[0]["conversations"][0] == {"from": "system", "value": "从现在起"}
    assert joined[0]["conversations"][-1] == {"from": "assistant", "value": "老师说0-0很好看"}
    assert "to 2 different instructions" in capsys.readouterr().out
