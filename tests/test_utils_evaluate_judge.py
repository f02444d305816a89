"""utils/evaluate/judge.py: what a judge prefers by hand, and no answer is paid twice.

python -m pytest tests/test_utils_evaluate_judge.py
"""

import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import load_script
from teacher_server import TeacherServer

from utils.data import collector
from utils.data.held_out import Comment
from utils.data.teacher import Teacher
from utils.evaluate.contenders import BASE, STYLE, TUNED, Contender
from utils.evaluate.folder import EvaluationFolder
from utils.evaluate.judge import INSTRUCTION, answers_of, choice_of, judge, told

PAIR = ("tuned", "base")
# Of every two replies one holds the word.
REPLIES = {
    "tuned": {str(number): f"第{number}条，真好看" for number in range(3)},
    "base": {str(number): f"第{number}条，作为一个模型" for number in range(3)},
}


def comments(count: int = 3) -> list[Comment]:
    """Each under a video of its own."""
    made = []
    for number in range(count):
        turns = [("system", "你是用户"), ("user", f"视频标题：第{number}个"), ("assistant", "真的")]
        messages = [{"role": role, "content": text} for role, text in turns]
        made.append(Comment(str(number), f"v{number}", messages))
    return made


def says(choose: Callable[[str, str], str]) -> Callable[[list[dict[str, str]]], dict[str, Any]]:
    """A judge that looks at both replies."""

    def reply(messages: list[dict[str, str]]) -> dict[str, Any]:
        first, second = re.search(r"回复 A：(.*)\n回复 B：(.*)\n\n", messages[-1]["content"]).groups()
        return {"message": {"role": "assistant", "content": choose(first, second)}, "finish_reason": "stop"}

    return reply


def likes(word: str) -> Callable[[list[dict[str, str]]], dict[str, Any]]:
    """Prefers the reply with a word, wherever it stands."""
    return says(lambda first, second: "A" if word in first else "B")


def ask(
    server: TeacherServer,
    path: Path,
    replies: dict[str, dict[str, str]] = REPLIES,
    pairs: Sequence[tuple[str, str]] = (PAIR,),
    **entry: Any,
) -> tuple[Any, dict[str, int]]:
    teacher = Teacher(**{"base_url": server.url, "model": "big"} | entry)
    return judge(comments(), replies, pairs, teacher, "kind", path / "judge_kind.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    """What is kept of the judge's answers."""
    return [json.loads(line) for line in (path / "judge_kind.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("A", "A"), ("B", "B"), ("回复 A", "A"), ("答案：B。", "B"), ("**A**", "A"), ("选A，因为A更自然", "A"),
        ("A或B", None), ("A 和 B 都行", None), ("", None), ("两条差不多", None), ("Both", None), ("AB", None),
        ("BGM 好听", None), ("BGM 好听，选 A", "A"),
    ],
)  # fmt: skip
def test_which_one_an_answer_names(text: str, choice: str | None) -> None:
    assert choice_of(text) == choice


@pytest.mark.parametrize(("word", "share"), [("真好看", 1.0), ("模型", 0.0)])
def test_a_judge_that_knows_what_it_likes(tmp_path: Path, word: str, share: float) -> None:
    """Three pairs, each asked in both orders: one contender wins all, and no order contradicts the other."""
    with TeacherServer(reply=likes(word)) as server:
        judged, counts = ask(server, tmp_path)
        asked = server.requests
    assert judged == {PAIR: {str(number): (share, 1.0) for number in range(3)}}
    assert counts == {"pairs": 3, "disagree": 0}
    assert len(asked) == 6 and {request["model"] for request in asked} == {"big"}
    assert {request["messages"][0]["content"] for request in asked} == {INSTRUCTION}
    texts = [request["messages"][1]["content"] for request in asked if "第1个" in request["messages"][1]["content"]]
    orders = ["A：第1条，真好看\n回复 B：第1条，作为一个模型", "A：第1条，作为一个模型\n回复 B：第1条，真好看"]
    assert sorted(texts) == sorted(f"视频标题：第1个\n\n回复 {both}\n\n哪一条更好？只回答 A 或 B。" for both in orders)


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_that_looks_at_the_place_only(tmp_path: Path, letter: str) -> None:
    with TeacherServer(reply=says(lambda *_: letter)) as server:
        judged, counts = ask(server, tmp_path)
    assert judged == {PAIR: {str(number): (0.5, 1.0) for number in range(3)}}
    assert counts == {"pairs": 3, "disagree": 3}
    assert told(counts, tmp_path) == f"The judge compared 3 pairs; in 100% its two orders disagree. In {tmp_path}."


@pytest.mark.parametrize("answer", ["A或B", "都不像", ""])
def test_what_names_neither_counts_for_none(tmp_path: Path, monkeypatch: Any, answer: str) -> None:
    """Of the first comment's pair one answer is of no use, so that the pair is not counted at all."""
    monkeypatch.setattr(collector, "LONGEST_BACKOFF_SEC", 0.01)

    def choose(first: str, second: str) -> str:
        return answer if "第0条，真" in first else "答案：A。" if "真好看" in first else "回复 B"

    with TeacherServer(reply=says(choose)) as server:
        judged, counts = ask(server, tmp_path)
    assert judged == {PAIR: {"1": (1.0, 1.0), "2": (1.0, 1.0)}}
    assert counts == {"pairs": 2, "disagree": 0}


def test_what_is_not_asked(tmp_path: Path) -> None:
    """Equal replies, and comments that one of the two has not answered."""
    replies = {"tuned": {"0": "一样", "1": "真好看", "2": "有"}, "base": {"0": "一样", "1": "模型"}}
    with TeacherServer(reply=likes("真好看")) as server:
        judged, counts = ask(server, tmp_path, replies)
        assert judged == {PAIR: {"1": (1.0, 1.0)}} and counts == {"pairs": 1, "disagree": 0}
        assert len(server.requests) == 2


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    """Not by a second run, nor by an evaluation whose contenders have other names and stand in another order."""
    other = {"mine": REPLIES["tuned"], "plain": REPLIES["base"]}
    with TeacherServer(reply=likes("真好看")) as server:
        first = ask(server, tmp_path)
        for _ in range(2):
            assert ask(server, tmp_path) == first
        judged, _ = ask(server, tmp_path, other, [("plain", "mine")])
        assert judged == {("plain", "mine"): {str(number): (0.0, 1.0) for number in range(3)}}
        ask(server, tmp_path, price_in=5.0, base_url=server.url + "/")
        assert len(server.requests) == 6
        for number, entry in enumerate(({"model": "bigger"}, {"options": {"temperature": 0.5}}), start=2):
            ask(server, tmp_path, **entry)
            assert len(server.requests) == 6 * number
        more = {**REPLIES, "base": REPLIES["base"] | {"2": "新的"}}
        ask(server, tmp_path, more)
        assert len(server.requests) == 18 + 2


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Two answers are whole, the third is cut in the middle: four are asked."""
    with TeacherServer(reply=likes("真好看")) as server:
        expected, path = ask(server, tmp_path), tmp_path / "judge_kind.jsonl"
        whole = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(whole[:2]) + whole[2][:40])
        assert ask(server, tmp_path) == expected
        assert len(server.requests) == 6 + 4
    assert len(lines(tmp_path)) == 6 and len({row["key"] for row in lines(tmp_path)}) == 6


def test_the_cost_is_told_before_it_is_paid(tmp_path: Path) -> None:
    """Six questions, a quarter for each of two tokens: 6 x 2 x 0.25 = 3; then two that are left: 1."""
    seen: list[str] = []

    def reply(messages: list[dict[str, str]]) -> dict[str, Any]:
        seen.append(out.getvalue())
        return likes("真好看")(messages)

    with redirect_stdout(io.StringIO()) as out, TeacherServer(reply=reply) as server:
        ask(server, tmp_path, price_out=250_000.0)
        characters = sum(len(message["content"]) for one in server.requests for message in one["messages"])
        head = f"kind judges: 6 questions, 0 answered before. The others take about {characters:,} tokens in, and cost"
        assert len(seen) == 6 and all(text.startswith(f"{head} about 3.00 in the currency") for text in seen)
        seen.clear()
        out.truncate(0)
        out.seek(0)
        ask(server, tmp_path, {**REPLIES, "base": REPLIES["base"] | {"2": "新的"}}, price_out=250_000.0)
    assert len(seen) == 2
    assert all("6 questions, 4 answered before" in text and "cost about 1.00" in text for text in seen)


@pytest.mark.parametrize("status", [None, 400, 401])
def test_the_key_appears_nowhere(tmp_path: Path, monkeypatch: Any, capsys: Any, status: int | None) -> None:
    """Whether the judge answers, refuses a question, or refuses the key and repeats it."""
    monkeypatch.setenv("KEY_OF_THE_TEST", "sk-secret-of-the-test")
    ended = ""
    with TeacherServer(reply=(lambda _: status) if status else likes("真好看")) as server:
        try:
            ask(server, tmp_path, api_key_env="KEY_OF_THE_TEST")
        except SystemExit as error:
            ended = str(error)
        assert server.headers[0]["authorization"] == "Bearer sk-secret-of-the-test"
    assert bool(ended) == (status == 401)
    files = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert files or status == 401
    assert "secret" not in "".join([*files, *capsys.readouterr(), ended])


def test_a_judge_for_an_evaluation(tmp_path: Path, capsys: Any) -> None:
    """Two of four comments, against the base and the style prompt, in two orders: eight questions."""
    evaluate = load_script("evaluate.py")
    folder, four = EvaluationFolder(tmp_path / "eval/mine"), comments(4)
    folder.path.mkdir(parents=True)
    contenders = [Contender(name, kind, "m") for name, kind in (("t", TUNED), ("base", BASE), ("style prompt", STYLE))]
    for one in contenders:
        for comment in four:
            folder.add_replies(one.name, comment, [f"{one.kind}的{comment.id}", "第二条"], [False, False])
    with TeacherServer(reply=likes("tuned")) as server:
        (tmp_path / "teachers.yaml").write_text(json.dumps({"a/b": {"base_url": server.url, "model": "big"}}))
        flags = ["--model", "m", "--judge", "a/b", "--judge_limit", "2", "--output_dir", str(tmp_path / "eval")]
        args = evaluate.build_parser().parse_args([*flags, "--teacher_config", str(tmp_path / "teachers.yaml")])
        judged, more = evaluate.ask_judge(args, SimpleNamespace(folder=folder, comments=four), contenders)
        assert len(server.requests) == 8
        assert not any("第二条" in request["messages"][1]["content"] for request in server.requests)
    assert set(judged) == {("t", "base"), ("t", "style prompt")}
    assert all([*found.values()] == [(1.0, 1.0)] * 2 for found in judged.values())
    assert more == {"judge": {"name": "a/b", "model": "big", "pairs": 4, "disagree": 0}}
    assert answers_of(tmp_path / "eval", "a/b") == tmp_path / "eval/judge_a_b.jsonl"
    assert (tmp_path / "eval/judge_a_b.jsonl").is_file()
    assert "The judge compared 4 pairs; in 0% its two orders disagree." in capsys.readouterr().out
