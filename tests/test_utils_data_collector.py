"""utils/data/collector.py: how many requests are under way, and lines of any script's own making.

python -m pytest tests/test_utils_data_collector.py
"""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import another_writer
from teacher_server import TeacherServer

from utils.data.collector import Collector, ConcurrencyLimit, Question, read_answers, report, writing_answers
from utils.data.teacher import Answer, Teacher, teacher_client


def test_pace_by_hand() -> None:
    """16; two refusals of requests sent before the first: 8; a later one: 4; 4 + 1/4 + 1/4.25 ... after answers."""
    pace = ConcurrencyLimit(16)
    now = time.monotonic()
    pace.refused(now, None)
    pace.refused(now - 1, None)
    assert pace.limit == 8
    pace.refused(time.monotonic() + 1, None)
    assert pace.limit == 4
    pace.answered()
    pace.answered()
    assert pace.limit == 4 + 1 / 4 + 1 / 4.25
    for _ in range(1000):
        pace.answered()
    assert pace.limit == 16


def test_after_a_refusal_all_wait() -> None:
    async def waited() -> float:
        pace = ConcurrencyLimit(2)
        pace.refused(time.monotonic(), 0.3)
        async with pace.turn() as sent_at:
            return sent_at

    started = time.monotonic()
    assert asyncio.run(waited()) - started >= 0.3


def test_a_script_with_lines_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what a line holds; what a kill has torn is cut before, and the newest answer stands last."""
    path, failures = tmp_path / "judged.jsonl", tmp_path / "failures.jsonl"
    whole = [{"id": name, "key": "k", "said": "before"} for name in ("0", "1")]
    path.write_text("".join(json.dumps(row) + "\n" for row in whole) + '{"id": "torn by a ki')

    def as_row(question: Question, answer: Answer, model: str) -> dict[str, Any]:
        return question.record | {"said": answer.text, "by": model}

    records = [{"id": str(number), "key": "k", "video_id": "v"} for number in (0, 2)]
    questions = [Question(record, [{"role": "user", "content": record["id"]}]) for record in records]
    with TeacherServer() as server, writing_answers(path):
        judge = Teacher(server.url, "big")
        client = teacher_client(judge, "kind", 30)
        collector = Collector(client, judge, path, failures, as_row, concurrency=1, timeout_sec=30)
        collector.collect(questions)
    report(collector, left=2, max_failures=0)
    told = capsys.readouterr().out
    assert "2 answers in" in told and "The other 2 will take about 200 tokens in and 20 out" in told
    found = read_answers(path, {"id": str, "key": str, "said": str})
    assert [*found] == [("1", "k"), ("0", "k"), ("2", "k")] and "damaged" not in capsys.readouterr().out
    assert found["0", "k"] == records[0] | {"said": "答：0", "by": "big"}


def test_another_process_has_the_answers(tmp_path: Path) -> None:
    """Nothing is cut then: it may be in the middle of a line."""
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"id": "in the mid')
    with another_writer(path), pytest.raises(SystemExit, match="Another process is writing"), writing_answers(path):
        pass
    assert path.read_bytes() == b'{"id": "in the mid'
