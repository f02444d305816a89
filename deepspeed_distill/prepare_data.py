"""Asks a teacher behind an OpenAI-compatible API to answer the prepared comments, and never twice for the same answer.

    python deepspeed_distill/prepare_data.py --d_type train --model_name deepseek-chat --limit 20   # What will it cost?
    python deepspeed_distill/prepare_data.py --d_type train --model_name deepseek-chat
    python deepspeed_distill/prepare_data.py --d_type test --model_name deepseek-chat

Reads   data_<d_type>.json of prepare_data.py in --data_dir, and the teacher's entry in --teacher_config, which is made
        from teacher_config.example.yaml. The key comes from the environment variable that the entry names.
Writes into --output_dir
    data_<d_type>_teacher_<name>.jsonl           an answer a line: {"id", "video_id", "key", "setting", "conversations",
                                                 "real", "reasoning", "teacher", "usage"}
    data_<d_type>_teacher_<name>_failures.jsonl  what this run got no answer to, and why

Answers are appended and on the disk before they count, so that a run may be killed at any moment: the next one asks for
what is missing. An answer is known by the comment's id and a hash of what was asked (`key`): another instruction, model
or option asks again, another address, key or price does not.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import ArgumentParser, add_columns_argument
from utils.data.answers import ANSWER_FIELDS, answers_path
from utils.data.collector import Collector, Question, append, read_answers, report, writing_answers
from utils.data.records import DataError, UnusableRecord, find_split, id_of, read_records, to_messages
from utils.data.teacher import Answer, Teacher, read_teacher, teacher_client
from utils.files import from_root, shown

INSTRUCTION = (
    "你是一名B站用户。请根据视频的标题、简介和父评论（如果有），模仿B站用户的语气写一条评论或回复，不超过50个字。只写评论本身，不要解释。"
)


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--d_type", choices=["train", "test"], default="train", help="which comments the teacher answers")
    add("--model_name", required=True, help="name of the teacher in --teacher_config")
    add("--data_dir", default="data", help="folder with data_train.json and data_test.json of prepare_data.py")
    add_columns_argument(parser)
    add("--output_dir", default="deepspeed_distill/data", help="folder for the answers")
    add("--teacher_config", default="deepspeed_distill/teacher_config.yaml", help="file of the teachers")
    add("--instruction", default=INSTRUCTION, help="the teacher's system prompt")
    add("--concurrency", type=int, default=16, help="requests under way at most; fewer while the teacher refuses some")
    add("--timeout", type=float, default=300, help="seconds until a request is given up and sent again")
    add("--limit", type=int, help="ask for so many answers only, and say what the rest will take")
    add("--max_failures", type=int, default=0, help="exit code 1 if more comments got no answer")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# What is asked, and what is written


def read_questions(
    path: Path, teacher: Teacher, instruction: str, columns: dict[str, str] | None = None
) -> list[Question]:
    """Reads prepared comments as questions to a teacher.

    Args:
        path: The comments.
        teacher: Who will answer.
        instruction: Its system prompt.
        columns: Of --columns, see `utils.data.records.read_records`.

    Returns:
        The questions; first one of every video, then the second ones, and so on: what a teacher will not talk about
        comes by the video, and a trial sees many.

    Raises:
        DataError: if the file holds something else.
    """
    questions, in_video, unusable = [], Counter(), Counter()
    setting = json.dumps([teacher.model, teacher.options, instruction], ensure_ascii=False, sort_keys=True)
    for number, record in enumerate(read_records(path, columns)):
        if not id_of(record) or not id_of(record, "video_id"):
            raise DataError(f"{shown(path)}: a record without id and video_id. Make it with: python prepare_data.py")
        try:
            *prompt, answer = to_messages(record)
        except UnusableRecord as error:
            unusable[str(error)] += 1
            continue
        except DataError as error:
            raise DataError(f"{shown(path)}, record {number}: {error}") from error
        asked = [{"role": "system", "content": instruction}, *(turn for turn in prompt if turn["role"] != "system")]
        made_of = json.dumps([teacher.model, teacher.options, asked], ensure_ascii=False, sort_keys=True)
        key = hashlib.sha256(made_of.encode()).hexdigest()[:32]
        line = {"id": str(record["id"]), "video_id": str(record["video_id"]), "key": key, "conversations": prompt}
        line |= {"setting": hashlib.sha256(setting.encode()).hexdigest()[:8], "real": answer["content"]}
        in_video[line["video_id"]] += 1
        questions.append((in_video[line["video_id"]], Question(line, asked)))
    for reason, times in unusable.items():
        print(f"{times:,} records of {shown(path)} are left out: {reason}")
    return [question for _, question in sorted(questions, key=lambda entry: entry[0])]


def as_row(question: Question, answer: Answer, model: str) -> dict[str, Any]:
    """A line of the answers' file, whose `conversations` are those of the comment with the teacher's answer."""
    conversation = [*question.record["conversations"], {"role": "assistant", "content": answer.text}]
    turns = [{"from": turn["role"], "value": turn["content"]} for turn in conversation]
    said = {"conversations": turns, "reasoning": answer.reasoning, "teacher": model, "usage": dict(answer.usage)}
    return question.record | said


# ---------------------------------------------------------------------------------------------------------------------
# The run


def answered_before(
    questions: list[Question], own: Path, other: Path
) -> tuple[list[Question], list[dict[str, Any]]]:
    """Finds what need not be asked.

    Args:
        questions: Of this run.
        own: The file that the run writes; the newest answer to a comment counts.
        other: The other split's: a comment may have moved.

    Returns:
        The questions that are left, and known answers that are to be appended as the newest ones.
    """
    known = read_answers(own, ANSWER_FIELDS)
    newest = {id: key for id, key in known}
    known = read_answers(other, ANSWER_FIELDS) | known
    left, again = [], []
    for question in questions:
        id, key = question.record["id"], question.record["key"]
        if newest.get(id) == key:
            continue
        if (id, key) in known:
            again.append(known[id, key])
        else:
            left.append(question)
    return left, again


def argument_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with the arguments."""
    problems = []
    for name, least in (("concurrency", 1), ("limit", 1), ("max_failures", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            problems.append(f"--{name}: got {value}, expected {least} or more.")
    if not args.timeout > 0:
        problems.append(f"--timeout: got {args.timeout}, expected more than 0.")
    if not args.instruction.strip():
        problems.append("--instruction: got an empty text.")
    return problems


def collect(args: argparse.Namespace, teacher: Teacher, questions: list[Question]) -> None:
    """Asks for missing answers and reports the outcome.

    Raises:
        SystemExit: if more failed than may, or the run ended early.
    """
    place, other_type = from_root(args.output_dir), "test" if args.d_type == "train" else "train"
    answers, other = (answers_path(place, split, args.model_name) for split in (args.d_type, other_type))
    failures = answers.with_name(f"{answers.stem}_failures.jsonl")
    client = teacher_client(teacher, args.model_name, args.timeout)
    with writing_answers(answers):
        left, again = answered_before(questions, answers, other)
        append(answers, again)
        failures.unlink(missing_ok=True)
        asked = left[: args.limit]
        print(
            f"{len(questions):,} comments, {len(questions) - len(left):,} answered before; asking {args.model_name} "
            f"for {len(asked):,}."
        )
        collector = Collector(
            client, teacher, answers, failures, as_row, concurrency=args.concurrency, timeout_sec=args.timeout
        )
        collector.collect(asked)
    report(collector, len(left) - len(asked), args.max_failures)
    if len(left) == len(asked):
        print(f"Next: bash deepspeed_distill/run.sh --teacher_model_name {args.model_name}")


def main(args: argparse.Namespace) -> None:
    """Checks what was asked for, and asks."""
    if problems := argument_problems(args):
        raise SystemExit("\n".join(problems))
    teacher = read_teacher(from_root(args.teacher_config), args.model_name)
    data = find_split(from_root(args.data_dir), args.d_type)
    if data is None:
        folder = shown(from_root(args.data_dir))
        raise SystemExit(f"No data_{args.d_type}.json in {folder}. Make it with: python prepare_data.py --total 2000")
    try:
        questions = read_questions(data, teacher, args.instruction, args.columns)
        collect(args, teacher, questions)
    except DataError as error:
        raise SystemExit(str(error)) from error
    except OSError as error:
        raise SystemExit(f"Answers cannot be written to {shown(from_root(args.output_dir))}: {error}") from error


if __name__ == "__main__":
    main(build_parser().parse_args())
