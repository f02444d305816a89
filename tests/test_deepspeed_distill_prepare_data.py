"""deepspeed_distill/prepare_data.py: every answer once in the file, none paid twice, whatever the teacher does.

python -m pytest tests/test_deepspeed_distill_prepare_data.py
"""

import contextlib
import json
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, load_script
from teacher_server import FAULTS, LOST, TeacherServer

from utils.data import collector, teacher
from utils.data.answers import ANSWER_FIELDS
from utils.data.records import to_messages

Build = Callable[..., list[str]]
SCRIPT = "deepspeed_distill/prepare_data.py"


@pytest.fixture(scope="session")
def prepare() -> ModuleType:
    """deepspeed_distill/prepare_data.py as a module."""
    return load_script(SCRIPT)


def records(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Prepared comments, each of another prompt."""
    return [
        {
            "id": str(number),
            "video_id": str(number // 4),
            "conversations": [
                {"from": "system", "value": "你是一名B站用户"},
                {"from": "user", "value": f"视频标题：第{number}个视频"},
                {"from": "assistant", "value": f"真人的第{number}条"},
            ],
        }
        for number in range(first, first + count)
    ]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Writes comments and a teacher's entry; the command line that asks."""

    def write(server: TeacherServer, count: int = 8, test: int = 4, entry: Any = (), **flags: Any) -> list[str]:
        for split, part in (("train", records(count)), ("test", records(test, first=count))):
            (tmp_path / f"data_{split}.json").write_text(json.dumps(part), encoding="utf-8")
        teacher = {"base_url": server.url, "model": "big", "price_in": 2.0, "price_out": 10.0} | dict(entry)
        (tmp_path / "teachers.yaml").write_text(json.dumps({"kind": teacher}))
        flags = {
            "model_name": "kind",
            "data_dir": tmp_path,
            "output_dir": tmp_path / "out",
            "teacher_config": tmp_path / "teachers.yaml",
        } | flags
        return [text for name, value in flags.items() for text in (f"--{name}", str(value))]

    return write


def run(prepare: ModuleType, arguments: list[str]) -> None:
    prepare.main(prepare.build_parser().parse_args(arguments))


def rows(folder: Path, split: str = "train", kind: str = "") -> list[dict[str, Any]]:
    """What stands in a file of answers, or of failures."""
    path = folder / f"out/data_{split}_teacher_kind{kind}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_questions_of_other_fields(prepare: ModuleType, tmp_path: Path) -> None:
    """By their usual names, or as --columns names them: the same is asked as of prepare_data.py's records."""
    teacher = prepare.Teacher(base_url="", model="big")
    ids = {"id": "7", "video_id": "1"}
    asked = []
    for columns, names in ((None, ("question", "answer")), ({"user": "问", "assistant": "答"}, ("问", "答"))):
        path = tmp_path / f"{names[0]}.json"
        path.write_text(json.dumps([ids | dict(zip(names, ("好看吗", "好看"), strict=True))]), encoding="utf-8")
        asked += prepare.read_questions(path, teacher, "装", columns)
    talk = [{"role": "user", "content": "好看吗"}, {"role": "assistant", "content": "好看"}]
    (tmp_path / "messages.json").write_text(json.dumps([ids | {"messages": talk}]))
    (expected,) = prepare.read_questions(tmp_path / "messages.json", teacher, "装")
    assert asked == [expected] * 2


def test_answers_and_what_was_asked(prepare: ModuleType, build: Build, tmp_path: Path, capsys: Any) -> None:
    """The teacher gets the instruction, the student keeps the comment's own system prompt. 8 x (100 x 2 + 10 x 10)."""
    with TeacherServer() as server:
        run(prepare, build(server, entry={"options": {"temperature": 0.5}}, instruction="装作B站用户"))
        asked = server.requests
    assert {request["messages"][0]["content"] for request in asked} == {"装作B站用户"}
    assert all(len(request["messages"]) == 2 and request["temperature"] == 0.5 for request in asked)
    assert {request["model"] for request in asked} == {"big"}
    found = sorted(rows(tmp_path), key=lambda row: int(row["id"]))
    assert [row["id"] for row in found] == [str(number) for number in range(8)]
    assert to_messages(found[3]) == [
        {"role": "system", "content": "你是一名B站用户"},
        {"role": "user", "content": "视频标题：第3个视频"},
        {"role": "assistant", "content": "答：视频标题：第3个视频"},
    ]
    assert found[3]["real"] == "真人的第3条" and found[3]["video_id"] == "0" and found[3]["teacher"] == "big"
    assert found[3]["usage"] == {"in": 100, "out": 10}
    told = capsys.readouterr().out
    assert "800 tokens in, 80 out, cost 0.0024" in told and "--teacher_model_name kind" in told


def test_nothing_is_asked_twice(prepare: ModuleType, build: Build, tmp_path: Path) -> None:
    """A second run asks nothing; another option or instruction asks again; another address or price does not."""
    with TeacherServer() as server:
        for entry, flags, paid in (
            ({}, {}, 8),
            ({}, {}, 8),
            ({"price_in": 5.0, "base_url": server.url + "/"}, {}, 8),
            ({"options": {"temperature": 0.5}}, {}, 16),
            ({}, {"instruction": "别的"}, 24),
        ):
            run(prepare, build(server, entry=entry, **flags))
            assert server.outcomes() == {"answered": paid}
        assert len(rows(tmp_path)) == 24
        # Back to the first question, to the last and to the first: nothing is paid, but answers become the newest.
        for instruction, length in (({}, 32), ({}, 32), ({"instruction": "别的"}, 40), ({}, 48), ({}, 48)):
            run(prepare, build(server, **instruction))
            found = rows(tmp_path)
            wanted = found[16:24] if instruction else found[:8]
            assert len(found) == length and {row["key"] for row in found[-8:]} == {row["key"] for row in wanted}
        assert server.outcomes() == {"answered": 24}


def test_an_answer_follows_its_comment_to_the_other_split(prepare: ModuleType, build: Build, tmp_path: Path) -> None:
    """And the old file is not touched: training takes from it what its comments are."""
    with TeacherServer() as server:
        run(prepare, build(server))
        arguments = build(server, d_type="test")
        (tmp_path / "data_test.json").write_text(json.dumps(records(6, first=6)), encoding="utf-8")
        run(prepare, arguments)
        assert server.outcomes() == {"answered": 8 + 4}
    assert sorted(int(row["id"]) for row in rows(tmp_path, "test")) == [6, 7, 8, 9, 10, 11]
    assert len(rows(tmp_path)) == 8


def test_a_trial_says_what_the_rest_will_take(prepare: ModuleType, build: Build, tmp_path: Path, capsys: Any) -> None:
    """16 others: 1,600 tokens in and 160 out, 1,600 x 2 + 160 x 10 = 4,800 millionths."""
    with TeacherServer() as server:
        run(prepare, build(server, count=20, limit=4, entry={"price_in": 2000.0, "price_out": 10000.0}))
        assert server.outcomes() == {"answered": 4}
        told = capsys.readouterr().out
        assert "The other 16 will take about 1,600 tokens in and 160 out, cost 4.80" in told
        run(prepare, build(server, count=20))
    assert len(rows(tmp_path)) == 20


def say(**message: Any) -> dict[str, Any]:
    """A choice with these parts of a message."""
    finish_reason = message.pop("finish_reason", "stop")
    return {"message": {"role": "assistant", "content": None} | message, "finish_reason": finish_reason}


@pytest.mark.parametrize(
    ("choice", "reason", "attempts"),
    [
        (say(content="半句", finish_reason="length"), "cut off", 1),
        (say(content="好", finish_reason="content_filter"), "content filter", 1),
        # What is paid for is tried four times, what is not eight times.
        (say(content=None), "an empty answer", 4),
        (say(content="  \n"), "an empty answer", 4),
        (say(content="<think>还在想"), "an empty answer", 4),
        (say(content="<think>想</think>  "), "an empty answer", 4),
        (say(content="半句", finish_reason="insufficient_system_resource"), "ended by 'insufficient", 4),
        (400, "HTTP 400", 1),
        (403, "HTTP 403", 1),
        (500, "HTTP 500", 8),
    ],
    ids=str,
)
def test_what_is_no_answer(
    prepare: ModuleType, build: Build, tmp_path: Path, monkeypatch: Any, choice: Any, reason: str, attempts: int
) -> None:
    """It is counted, named, not in the file, and asked again by the next run."""
    monkeypatch.setattr(collector, "LONGEST_BACKOFF_SEC", 0.01)
    bad, good = "视频标题：第2个视频", say(content="好")
    with TeacherServer(reply=lambda messages: choice if messages[-1]["content"] == bad else good) as server:
        with pytest.raises(SystemExit, match="1 failed, more than --max_failures 0"):
            run(prepare, build(server, count=4))
        assert len(server.log[bad]) == attempts
        (failure,) = rows(tmp_path, kind="_failures")
        assert failure["id"] == "2" and reason in failure["reason"]
        assert len(rows(tmp_path)) == 3
        server.reply = lambda messages: good
        run(prepare, build(server, count=4))
        assert not (tmp_path / "out/data_train_teacher_kind_failures.jsonl").exists()
    assert sorted(row["id"] for row in rows(tmp_path)) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "message",
    [
        {"content": "好看", "reasoning_content": "先想想"},
        {"content": "好看", "reasoning": "先想想"},
        {"content": "<think>先想想</think>\n\n好看"},
        {"content": "先想想</think>好看"},
    ],
    ids=str,
)
def test_thoughts_stay_apart(prepare: ModuleType, build: Build, tmp_path: Path, message: dict[str, str]) -> None:
    with TeacherServer(reply=lambda _: say(**message)) as server:
        run(prepare, build(server, count=1))
    (row,) = rows(tmp_path)
    assert row["reasoning"] == "先想想" and row["conversations"][-1] == {"from": "assistant", "value": "好看"}


@pytest.mark.parametrize("status", [401, 402, 404])
def test_a_hopeless_teacher_ends_the_run(
    prepare: ModuleType, build: Build, tmp_path: Path, monkeypatch: Any, capsys: Any, status: int
) -> None:
    """At once, without the key or what the server says of it; what else was under way is kept."""
    monkeypatch.setenv("KEY_OF_THE_TEST", "sk-secret-of-the-test")
    good = say(content="好")
    with TeacherServer(reply=lambda messages: status if "第0个" in messages[-1]["content"] else good) as server:
        with pytest.raises(SystemExit, match="Stopped: .*The same command goes on") as ended:
            run(prepare, build(server, count=200, concurrency=4, entry={"api_key_env": "KEY_OF_THE_TEST"}))
        assert server.headers[0]["authorization"] == "Bearer sk-secret-of-the-test"
        assert server.outcomes().total() < 50
        assert len(rows(tmp_path)) == server.outcomes()["answered"]
    printed = "".join(capsys.readouterr()) + str(ended.value)
    assert "secret" not in printed and "secret" not in "".join(
        path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()
    )


@pytest.mark.parametrize("status", [400, 403, 500])
def test_a_key_is_not_repeated(
    prepare: ModuleType, build: Build, tmp_path: Path, monkeypatch: Any, capsys: Any, status: int
) -> None:
    """What the server says of a request is kept, without the key, whole or shortened."""
    monkeypatch.setenv("KEY_OF_THE_TEST", "sk-secret-of-the-test")
    monkeypatch.setattr(collector, "LONGEST_BACKOFF_SEC", 0.001)
    for key in ("sk-secret-of-the-test", "another-key"):  # The server's words hold the first one.
        monkeypatch.setenv("KEY_OF_THE_TEST", key)
        with TeacherServer(reply=lambda _: status) as server, pytest.raises(SystemExit) as ended:
            run(prepare, build(server, count=2, entry={"api_key_env": "KEY_OF_THE_TEST"}))
        failures = (tmp_path / "out/data_train_teacher_kind_failures.jsonl").read_text(encoding="utf-8")
        assert "wrong key ***" in failures
        assert "secret" not in failures + "".join(capsys.readouterr()) + str(ended.value)


def test_only_the_teachers_key_is_sent(prepare: ModuleType, build: Build, monkeypatch: Any) -> None:
    """What the openai client takes from the environment is meant for another service."""
    monkeypatch.setenv("KEY_OF_THE_TEST", "sk-own")
    others = {"API_KEY": "sk-other", "ORG_ID": "org-other", "PROJECT_ID": "project-other"}
    others["CUSTOM_HEADERS"] = "Authorization: Bearer sk-other\nX-Other: other"
    for name, value in others.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    with TeacherServer() as server:
        run(prepare, build(server, entry={"api_key_env": "KEY_OF_THE_TEST"}))
        assert server.headers[0]["authorization"] == "Bearer sk-own"
        assert not [value for headers in server.headers for value in headers.values() if "other" in value]


@pytest.mark.parametrize("key", ["“sk-own”", "sk-own\n"])
def test_a_key_with_odd_characters(prepare: ModuleType, build: Build, monkeypatch: Any, key: str) -> None:
    monkeypatch.setenv("KEY_OF_THE_TEST", key)
    with TeacherServer() as server, pytest.raises(SystemExit, match="KEY_OF_THE_TEST holds characters") as ended:
        run(prepare, build(server, entry={"api_key_env": "KEY_OF_THE_TEST"}))
    assert "sk-own" not in str(ended.value) and not server.headers


@pytest.mark.parametrize(("choice", "what"), [(500, "comments"), (400, "videos")])
def test_a_teacher_that_never_answers_is_given_up(
    prepare: ModuleType, build: Build, monkeypatch: Any, choice: int, what: str
) -> None:
    monkeypatch.setattr(collector, "LONGEST_BACKOFF_SEC", 0.001)
    with TeacherServer(reply=lambda _: choice) as server:
        with pytest.raises(SystemExit, match=f"failures for 20 {what} in a row, the last one: HTTP {choice}"):
            run(prepare, build(server, count=500))
        assert len(server.log) < 60


def test_a_video_that_the_teacher_will_not_talk_about(prepare: ModuleType, build: Build, tmp_path: Path) -> None:
    """Its comments fail, all others are answered, although they are most of the data."""

    def reply(messages: list[dict[str, str]]) -> Any:
        number = int(messages[-1]["content"].split("第")[1].split("个")[0])
        return say(content="好", finish_reason="content_filter" if number >= 40 else "stop")

    with TeacherServer(reply=reply) as server:
        arguments = build(server, max_failures=60)
        comments = records(100)
        for record in comments[40:]:
            record["video_id"] = "filtered"
        (tmp_path / "data_train.json").write_text(json.dumps(comments), encoding="utf-8")
        run(prepare, arguments)
    assert len(rows(tmp_path)) == 40 and len(rows(tmp_path, kind="_failures")) == 60


def test_records_that_cannot_be_asked(prepare: ModuleType, build: Build, tmp_path: Path, capsys: Any) -> None:
    """Those without an answer are counted, those that cannot be read are named."""
    with TeacherServer() as server:
        arguments, comments = build(server), records(4)
        comments[1]["conversations"][-1]["value"] = " "
        (tmp_path / "data_train.json").write_text(json.dumps(comments), encoding="utf-8")
        run(prepare, arguments)
        assert "1 records of" in capsys.readouterr().out and len(rows(tmp_path)) == 3
        comments[2]["conversations"] = "谁知道"
        (tmp_path / "data_train.json").write_text(json.dumps(comments), encoding="utf-8")
        with pytest.raises(SystemExit, match="record 2: "):
            run(prepare, arguments)


def test_half_a_character(prepare: ModuleType, build: Build, tmp_path: Path) -> None:
    """JSON can hold half of a surrogate pair, files cannot."""
    with TeacherServer(reply=lambda _: say(content="好\ud83d")) as server:
        run(prepare, build(server))
    assert {row["conversations"][-1]["value"] for row in rows(tmp_path)} == {"好?"}


def test_a_request_without_an_end_is_given_up(
    prepare: ModuleType, build: Build, tmp_path: Path, monkeypatch: Any
) -> None:
    """A slow stream is alive at every moment: the time for all of it counts."""
    monkeypatch.setattr(teacher, "ATTEMPTS", 2)
    monkeypatch.setattr(collector, "LONGEST_BACKOFF_SEC", 0.01)
    with TeacherServer(faults=("slow stream",), fault_every=1) as server, pytest.raises(SystemExit, match="1 failed"):
        run(prepare, build(server, count=1, timeout=0.2))
    assert rows(tmp_path, kind="_failures")[0]["reason"] == "no answer in 0.2 s"


@pytest.mark.parametrize(
    ("count", "latency", "concurrency"),
    [(150, (0.01, 0.05), 16), pytest.param(2000, (0.2, 0.8), 32, marks=pytest.mark.slow)],
)
def test_whatever_happens_all_are_answered_once(
    prepare: ModuleType, build: Build, tmp_path: Path, monkeypatch: Any, count: int, latency: Any, concurrency: int
) -> None:
    """The teacher has written one answer to each question, and another one where the first was lost on its way."""
    monkeypatch.setattr(collector, "LONGEST_BACKOFF_SEC", 1)
    with TeacherServer(latency, fault_every=7, retry_after="0.3") as server:
        run(prepare, build(server, count=count, concurrency=concurrency))
        log, outcomes = server.log, server.outcomes()
        assert server.most_active <= concurrency
    assert all(outcomes[fault] >= 2 for fault in FAULTS if fault != "slow stream")
    assert sorted(int(row["id"]) for row in rows(tmp_path)) == [*range(count)]
    assert len(log) == count and not [happened for happened in log.values() if happened.count("answered") != 1]
    assert all(happened[-1] == "answered" for happened in log.values())
    assert sum(outcomes[fault] for fault in LOST) > 0


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / SCRIPT), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(path: Path, lines: int, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.01)
    raise TimeoutError


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 20])
def test_killed_at_any_moment(build: Build, tmp_path: Path, kills: int) -> None:
    """No line is lost, and no more is paid twice than was under way."""
    path, draw, concurrency = tmp_path / "out/data_train_teacher_kind.jsonl", random.Random(kills), 8
    with TeacherServer((0.02, 0.1)) as server:
        arguments = build(server, count=60 * kills, concurrency=concurrency)
        kept: list[bytes] = []
        for _ in range(kills):
            process = start(arguments)
            wait_for_lines(path, len(kept) + draw.randint(1, 40))
            time.sleep(draw.uniform(0, 0.05))
            process.kill()
            process.communicate()
            lines = path.read_bytes().split(b"\n")[:-1]
            assert lines[: len(kept)] == kept
            kept = lines
        process = start(arguments)
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        paid = [happened.count("answered") for happened in server.log.values()]
    assert sorted(int(row["id"]) for row in rows(tmp_path)) == [*range(60 * kills)]
    assert sum(paid) <= 60 * kills + kills * concurrency and max(paid) <= 1 + kills


@pytest.mark.parametrize(
    "odd",
    [
        None,
        {"message": None},
        {"message": "好"},
        {"message": {"content": {"a": "好"}}},
        {"message": {"content": 7}, "finish_reason": "stop"},
        {"message": {"content": "好"}, "finish_reason": ["stop"]},
    ],
    ids=str,
)
def test_what_cannot_be_understood_is_asked_once_more(
    prepare: ModuleType, build: Build, tmp_path: Path, monkeypatch: Any, odd: Any
) -> None:
    """It may have been paid. The other answers are kept."""
    monkeypatch.setattr(collector, "LONGEST_BACKOFF_SEC", 0.001)

    def reply(messages: list[dict[str, str]]) -> Any:
        return odd if "第2个" in messages[-1]["content"] else say(content="好")

    with TeacherServer(reply=reply) as server, pytest.raises(SystemExit, match="1 failed"):
        run(prepare, build(server, count=6, concurrency=2))
    assert len(rows(tmp_path)) == 5 and len(rows(tmp_path, kind="_failures")) == 1
    assert sorted(len(happened) for happened in server.log.values()) == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": "12.0", "completion_tokens": 5},
        {"prompt_tokens": float("nan"), "completion_tokens": 5},
        {"prompt_tokens": -(10**9), "completion_tokens": 5},
        {"prompt_tokens": 10**30, "completion_tokens": 5.0},
        {"prompt_tokens": [1], "completion_tokens": 5},
    ],
    ids=str,
)
def test_a_whole_text_is_kept_whatever_its_usage(
    prepare: ModuleType, build: Build, tmp_path: Path, usage: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked once each; of the tokens those count that are numbers, and that others are missing is said."""

    def reply(messages: list[dict[str, str]]) -> Any:
        return say(content="好") | {"usage": usage}

    with TeacherServer(reply=reply) as server:
        run(prepare, build(server, count=3))
    assert [row["usage"] for row in rows(tmp_path)] == [{"out": 5}] * 3
    assert all(happened == ["answered"] for happened in server.log.values())
    assert "3 answers came without a count" in capsys.readouterr().out


@pytest.mark.parametrize("usage", [[1, 2], "7", 7, None], ids=str)
def test_a_usage_that_is_none(prepare: ModuleType, build: Build, tmp_path: Path, usage: Any) -> None:
    with TeacherServer(reply=lambda _: say(content="好") | {"usage": usage}) as server:
        run(prepare, build(server, count=2))
    assert [row["usage"] for row in rows(tmp_path)] == [{}, {}] and server.outcomes()["answered"] == 2


@pytest.mark.parametrize(
    "odd",
    [
        {"finish_reason": "STOP"},
        {"message": {"content": [{"type": "text", "text": "好"}, {"type": "image"}, "呀"]}},
        {"message": {"content": "好呀", "reasoning": [{"text": "想"}], "reasoning_content": {"a": 1}}},
        {"index": "x", "logprobs": 3},
    ],
    ids=str,
)
def test_a_whole_text_is_kept_whatever_stands_beside_it(
    prepare: ModuleType, build: Build, tmp_path: Path, odd: dict[str, Any]
) -> None:
    with TeacherServer(reply=lambda _: say(content="好呀") | odd) as server:
        run(prepare, build(server, count=2))
    assert [row["conversations"][-1]["value"] for row in rows(tmp_path)] == ["好呀"] * 2
    assert server.outcomes()["answered"] == 2


def test_a_past_date_is_no_word_of_waiting(prepare: ModuleType, build: Build, monkeypatch: Any) -> None:
    """With `Retry-After: 0` attempts are spread out as without it."""
    slept = []

    async def sleep(_: Any, seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(collector.ConcurrencyLimit, "sleep", sleep)
    with TeacherServer(faults=("429 with Retry-After",), fault_every=1, retry_after="0") as server:
        with pytest.raises(SystemExit, match="1 failed"):
            run(prepare, build(server, count=1))
    assert len([seconds for seconds in slept if seconds > 0]) == 7


def test_a_full_disk_ends_the_run(prepare: ModuleType, build: Build, tmp_path: Path, monkeypatch: Any) -> None:
    """In a sentence, and no line is half written."""
    fsync, written = os.fsync, []

    def full(number: int) -> None:
        written.append(number)
        if len(written) == 6:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    with TeacherServer() as server, pytest.raises(SystemExit, match="cannot be written to .*No space left"):
        run(prepare, build(server, count=50, concurrency=2))
    assert len(rows(tmp_path)) > 0


@pytest.mark.slow
def test_a_disk_that_fills_up_inside_a_line(build: Build, tmp_path: Path) -> None:
    """What had no room any more is not written later on, when there is room again."""
    with TeacherServer() as server:
        arguments = build(server, count=50, concurrency=1)
        path = tmp_path / "out/data_train_teacher_kind.jsonl"
        limited = f"ulimit -f 8 && exec '{sys.executable}' '{ROOT / SCRIPT}' {' '.join(map(repr, arguments))}"
        stopped = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
        assert stopped.returncode == 1 and "cannot be written to" in stopped.stderr, stopped.stderr
        assert "Traceback" not in stopped.stderr
        kept = path.read_bytes()
        assert 7_000 < len(kept) <= 8_192 and kept.endswith(b"}\n")
        known = len(rows(tmp_path))
        subprocess.run([sys.executable, str(ROOT / SCRIPT), *arguments], capture_output=True, check=True)
    assert len(rows(tmp_path)) == 50 > known > 10


def test_a_place_that_cannot_be_written_to(prepare: ModuleType, build: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with TeacherServer() as server, pytest.raises(SystemExit, match="Answers cannot be written to"):
        run(prepare, build(server, output_dir=tmp_path / "file"))


def test_a_torn_line_is_asked_again(prepare: ModuleType, build: Build, tmp_path: Path) -> None:
    """At whatever byte it was torn, inside a letter as well."""
    with TeacherServer() as server:
        run(prepare, build(server, count=2))
        path = tmp_path / "out/data_train_teacher_kind.jsonl"
        whole = path.read_bytes()
        for cut in range(whole.index(b"\n") + 1, len(whole), 17):
            path.write_bytes(whole[:cut])
            run(prepare, build(server, count=2))
            assert len(rows(tmp_path)) == 2 and len({row["id"] for row in rows(tmp_path)}) == 2


DAMAGED = {
    "torn": lambda line: line[:30],
    "nul": lambda line: b"\0" * 300,
    "list": lambda line: b"[1]",
    "no id": lambda line: b'{"key": "x"}',
    "number": lambda line: line.replace(b'"id": "', b'"id": 1, "other": "'),
    "binary": lambda line: line[:20] + b"\xff\xfe" + line[22:],
    "empty": lambda line: b"",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_named_and_asked_again(
    prepare: ModuleType, build: Build, tmp_path: Path, capsys: Any, damage: str
) -> None:
    """What was paid behind it is kept."""
    path = tmp_path / "out/data_train_teacher_kind.jsonl"
    with TeacherServer() as server:
        run(prepare, build(server))
        lines = path.read_bytes().split(b"\n")
        lines[5] = DAMAGED[damage](lines[5])
        path.write_bytes(b"\n".join(lines))
        capsys.readouterr()
        run(prepare, build(server))
        assert server.outcomes()["answered"] == 9
    assert f"{path}: damaged and left out: line 6." in capsys.readouterr().out
    assert path.read_bytes().split(b"\n")[:8] == lines[:8], "nothing is removed"
    known = collector.read_answers(path, ANSWER_FIELDS)
    assert {row["id"] for row in known.values()} == {str(number) for number in range(8)}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_what_is_paid(build: Build, tmp_path: Path, number: int) -> None:
    path = tmp_path / "out/data_train_teacher_kind.jsonl"
    with TeacherServer((0.5, 0.8)) as server:
        process = start(build(server, count=200, concurrency=8))
        wait_for_lines(path, 4)
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
        name = signal.Signals(number).name
        assert process.returncode == 1 and f"Stopped: interrupted by {name}. The same command goes on" in error
        assert "Traceback" not in error and "answers in" in out
        assert len(rows(tmp_path)) == server.outcomes()["answered"] < 100


@pytest.mark.slow
def test_a_closed_terminal_waits_for_what_is_paid(build: Build, tmp_path: Path) -> None:
    """A real one, which takes no more output after it was closed."""
    path = tmp_path / "out/data_train_teacher_kind.jsonl"
    with TeacherServer((0.5, 0.8)) as server:
        arguments = build(server, count=200, concurrency=8)
        process, terminal = pty.fork()
        if process == 0:
            os.execv(sys.executable, [sys.executable, str(ROOT / SCRIPT), *arguments])
        reader = threading.Thread(target=read_all, args=(terminal,), daemon=True)
        reader.start()
        wait_for_lines(path, 4)
        os.kill(process, signal.SIGHUP)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
        assert len(rows(tmp_path)) == server.outcomes()["answered"] < 100


def read_all(terminal: int) -> None:
    """Reads what a program prints, as a terminal does."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 1024):
            pass


@pytest.mark.slow
def test_what_is_ignored_stays_ignored(build: Build, tmp_path: Path) -> None:
    """Under nohup a closed terminal does not stop the run."""
    path = tmp_path / "out/data_train_teacher_kind.jsonl"
    with TeacherServer((0.1, 0.2)) as server:
        command = ["nohup", sys.executable, str(ROOT / SCRIPT), *build(server, count=40, concurrency=8)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_lines(path, 4)
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)
        assert process.returncode == 0 and len(rows(tmp_path)) == 40


def test_two_runs_do_not_write_at_once(prepare: ModuleType, build: Build, tmp_path: Path) -> None:
    with TeacherServer((0.2, 0.4)) as server:
        arguments = build(server, count=200, concurrency=2)
        process = start(arguments)
        wait_for_lines(tmp_path / "out/data_train_teacher_kind.jsonl", 1)
        with pytest.raises(SystemExit, match="Another process is writing"):
            run(prepare, arguments)
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"api_key": "sk-secret"}, "unknown api_key; known are .* Keys do not belong in files"),
        ({"model": 3}, "not usable: model"),
        ({"price_in": "free"}, "not usable: price_in"),
        ({"base_url": "http://me:sk-secret@host/v1"}, "base_url has room for an address only"),
        ({"base_url": "http://host/v1?key=sk-secret"}, "base_url has room for an address only"),
        ({"api_key_env": "sk-secret"}, "api_key_env is not the name"),
        ({"options": {"stream": True}}, "options cannot change stream"),
        ({"api_key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE is not set"),
    ],
)
def test_wrong_teachers(prepare: ModuleType, build: Build, entry: dict[str, Any], says: str) -> None:
    with pytest.raises(SystemExit, match=says) as ended:
        run(prepare, build(SimpleNamespace(url="http://127.0.0.1:9/v1"), entry=entry))
    assert "secret" not in str(ended.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"concurrency": 0}, "--concurrency: got 0"),
        ({"limit": 0}, "--limit: got 0"),
        ({"timeout": 0}, "--timeout: got 0"),
        ({"max_failures": -1}, "--max_failures: got -1"),
        ({"instruction": " "}, "--instruction"),
        ({"model_name": "nobody"}, "no entry 'nobody' in .* There are: kind"),
        ({"teacher_config": "/nowhere/t.yaml"}, "cp /nowhere/teacher_config.example.yaml /nowhere/t.yaml"),
        ({"data_dir": "/nowhere"}, "python prepare_data.py --total 2000"),
    ],
)
def test_wrong_arguments(prepare: ModuleType, build: Build, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(SystemExit, match=says):
        run(prepare, build(SimpleNamespace(url="http://127.0.0.1:9/v1"), **flags))


def test_no_torch_is_needed(build: Build) -> None:
    """Data can be collected on a small machine."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    with TeacherServer() as server:
        command = [sys.executable, "-c", code, str(ROOT / SCRIPT), *build(server)]
        finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0 and "8 answers" in finished.stdout, finished.stderr
