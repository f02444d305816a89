"""A model behind an API says which of two replies is better; every pair in both orders, and no answer is paid twice.

Models that judge often prefer what stands first (arXiv 2306.05685, section 3.3): what they say in one order only counts
half.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.data.collector import Collector, Question, read_answers, report, writing_answers
from utils.data.held_out import Comment
from utils.data.teacher import Answer, Teacher, teacher_client
from utils.evaluate.likelihood import question_of
from utils.files import shown

INSTRUCTION = (
    "下面给出一个B站视频的信息（可能还有一条要回复的评论），以及两条回复 A 和 B。请判断哪一条更像真实的B站用户写的，"
    "并且更切合视频内容和要回复的评论。只回答一个字母：A 或 B。"
)
CONCURRENCY, TIMEOUT_SEC = 16, 300
FIELDS = {"id": str, "key": str, "answer": str}

# Two contenders -> comment -> (how often the judge preferred the first one: 0, 0.5 or 1; 1).
Judged = dict[tuple[str, str], dict[str, tuple[float, float]]]


def ask_about(comment: Comment, first: str, second: str, teacher: Teacher) -> Question:
    """Writes the question which of two replies is better."""
    text = f"{question_of(comment)}\n\n回复 A：{first}\n回复 B：{second}\n\n哪一条更好？只回答 A 或 B。"
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]
    asked = json.dumps([teacher.model, teacher.options, messages], ensure_ascii=False, sort_keys=True)
    key = hashlib.sha256(asked.encode()).hexdigest()[:32]
    return Question({"id": comment.id, "video_id": comment.video_id, "key": key}, messages)


def as_row(question: Question, answer: Answer, model: str) -> dict[str, Any]:
    """A line of the judge's answers."""
    return question.record | {"answer": answer.text, "judge": model, "usage": dict(answer.usage)}


def choice_of(text: str) -> str | None:
    """Which reply an answer names; None if it names both or none."""
    named = {*re.findall(r"(?<![A-Za-z])[AB](?![A-Za-z])", text)}
    return named.pop() if len(named) == 1 else None


def judge(
    comments: Sequence[Comment],
    replies: Mapping[str, Mapping[str, str]],
    pairs: Sequence[tuple[str, str]],
    teacher: Teacher,
    name: str,
    path: Path,
) -> tuple[Judged, dict[str, int]]:
    """Asks for what has not been asked before, and counts.

    Args:
        comments: Whose replies are judged.
        replies: Contender -> comment -> reply.
        pairs: Of contenders.
        teacher: The judge.
        name: Its name in the configuration.
        path: Of its answers, of all evaluations.

    Returns:
        What it prefers; and how many "pairs" of replies it has judged, in how many of them the two orders "disagree".

    Raises:
        SystemExit: if the run ended early.
    """
    asked: dict[tuple[str, str, str], tuple[Question, Question]] = {}
    for one, other in pairs:
        for comment in comments:
            texts = (replies[one].get(comment.id), replies[other].get(comment.id))
            if None not in texts and texts[0] != texts[1]:
                both = ask_about(comment, *texts, teacher), ask_about(comment, *texts[::-1], teacher)
                asked[one, other, comment.id] = both
    questions = {question.record["key"]: question for both in asked.values() for question in both}
    known = {key for _, key in read_answers(path, FIELDS)}
    left = [question for key, question in questions.items() if key not in known]
    tokens = sum(len(message["content"]) for question in left for message in question.messages)
    cost = (tokens * teacher.price_in + 2 * len(left) * teacher.price_out) / 1e6
    print(
        f"{name} judges: {len(questions):,} questions, {len(questions) - len(left):,} answered before. The others take "
        f"about {tokens:,} tokens in, and cost about {cost:.2f} in the currency of the prices, more if it thinks "
        "before it answers.",
        flush=True,
    )
    if left:
        client, failures = teacher_client(teacher, name, TIMEOUT_SEC), path.with_name(f"{path.stem}_failures.jsonl")
        failures.unlink(missing_ok=True)
        with writing_answers(path):
            collector = Collector(
                client, teacher, path, failures, as_row, concurrency=CONCURRENCY, timeout_sec=TIMEOUT_SEC
            )
            collector.collect(left)
        report(collector, 0, len(left))
    said = {key: choice_of(row["answer"]) for (_, key), row in read_answers(path, FIELDS).items()}
    return _count(asked, said)


def _count(
    asked: Mapping[tuple[str, str, str], tuple[Question, Question]], said: Mapping[str, str | None]
) -> tuple[Judged, dict[str, int]]:
    judged: Judged = {}
    counts = {"pairs": 0, "disagree": 0}
    for (one, other, id), both in asked.items():
        choices = [said.get(question.record["key"]) for question in both]
        if None in choices:
            continue
        won = [choices[0] == "A", choices[1] == "B"]
        judged.setdefault((one, other), {})[id] = (sum(won) / 2, 1.0)
        counts["pairs"] += 1
        counts["disagree"] += won[0] != won[1]
    return judged, counts


def answers_of(folder: Path, name: str) -> Path:
    """Where a judge's answers lie."""
    plain = re.sub(r"[^\w.-]", "_", name)
    return folder / f"judge_{plain}.jsonl"


def told(counts: Mapping[str, int], path: Path) -> str:
    """A line on how far the judge is to be trusted."""
    share = counts["disagree"] / max(counts["pairs"], 1)
    return f"The judge compared {counts['pairs']:,} pairs; in {share:.0%} its two orders disagree. In {shown(path)}."
