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
import asyncio
import hashlib
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from utils.cli import ArgumentParser, progress_bar
from utils.data.answers import ANSWER_FIELDS, answers_path
from utils.data.records import DataError, Message, UnusableRecord, find_split, read_records, to_messages
from utils.files import exclusive_lock, from_root, read_lines, shown

INSTRUCTION = (
    "你是一名B站用户。请根据视频的标题、简介和父评论（如果有），模仿B站用户的语气写一条评论或回复，不超过50个字。只写评论本身，不要解释。"
)
THOUGHT = "</think>"
# How often a question is sent at most: after failures that cost nothing, such that tokens were paid for, and responses
# that cannot be understood, which may have been.
ATTEMPTS, PAID_ATTEMPTS, ODD_ATTEMPTS = 8, 4, 2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Answers under way are taken before the process ends.
LONGEST_BACKOFF_SEC = 60
LONGEST_WAIT_SEC = 600  # The teacher may ask for more; then the run ends.
FAILED_IN_A_ROW = 20  # So many failures with no answer between them: the teacher is not going to answer.
FINISHED = ["stop", "eos", "end_turn", "", None]  # Why an answer ended, if it is whole.
# What the openai client would send to any teacher, the last one even in place of the configured key.
OPENAI_VARIABLES = ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS")
KINDS = {
    "base_url": str,
    "model": str,
    "api_key_env": str,
    "price_in": (int, float),
    "price_out": (int, float),
    "options": dict,
}


class Teacher(NamedTuple):
    """An entry of teacher_config.yaml."""

    base_url: str
    model: str
    api_key_env: str = ""
    price_in: float = 0.0
    price_out: float = 0.0
    options: dict[str, Any] = {}

    def cost(self, usage: Counter[str]) -> float:
        """What tokens cost, in the currency of the prices."""
        return (usage["in"] * self.price_in + usage["out"] * self.price_out) / 1e6


class Question(NamedTuple):
    """A request to the teacher for one comment."""

    record: dict[str, Any]  # Of the line to write, without what the teacher says.
    messages: list[Message]


class Answer(NamedTuple):
    """What the teacher said."""

    text: str
    reasoning: str
    usage: Counter[str]


class NoAnswer(Exception):
    """A request that gave no answer.

    Attributes:
        again: Whether it is worth another attempt.
        odd: Whether the response cannot be understood.
        busy: Whether the teacher is asked too much at a time.
        wait_sec: How long the teacher asked to wait; None if it did not.
        usage: Tokens that it cost all the same.
    """

    def __init__(
        self,
        reason: str,
        again: bool,
        busy: bool = False,
        wait_sec: float | None = None,
        usage: Any = None,
        odd: bool = False,
    ) -> None:
        super().__init__(reason)
        self.again, self.busy, self.wait_sec, self.usage, self.odd = again, busy, wait_sec, usage or Counter(), odd

    @property
    def attempts(self) -> int:
        """After how many such failures a question is given up."""
        if not self.again:
            return 1
        return ODD_ATTEMPTS if self.odd else PAID_ATTEMPTS if self.usage.total() else ATTEMPTS


class FatalError(Exception):
    """Why no request can succeed, such as a wrong key."""


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--d_type", choices=["train", "test"], default="train", help="which comments the teacher answers")
    add("--model_name", required=True, help="name of the teacher in --teacher_config")
    add("--data_dir", default="data", help="folder with data_train.json and data_test.json of prepare_data.py")
    add("--output_dir", default="deepspeed_distill/data", help="folder for the answers")
    add("--teacher_config", default="deepspeed_distill/teacher_config.yaml", help="file of the teachers")
    add("--instruction", default=INSTRUCTION, help="the teacher's system prompt")
    add("--concurrency", type=int, default=16, help="requests under way at most; fewer while the teacher refuses some")
    add("--timeout", type=float, default=300, help="seconds until a request is given up and sent again")
    add("--limit", type=int, help="ask for so many answers only, and say what the rest will take")
    add("--max_failures", type=int, default=0, help="exit code 1 if more comments got no answer")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# What is asked


def read_teacher(path: Path, name: str) -> Teacher:
    """Reads a teacher's entry.

    Raises:
        SystemExit: saying what is wrong with it; no value is repeated, as it could be a key.
    """
    import yaml

    example = shown(path.with_name("teacher_config.example.yaml"))
    if not path.is_file():
        raise SystemExit(f"No {shown(path)}. Make it from the example: cp {example} {shown(path)}")
    try:
        teachers = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        raise SystemExit(f"{shown(path)}{line}: not YAML. Compare it with {example}") from None
    if not isinstance(teachers, dict) or not isinstance(teachers.get(name), dict):
        there = ", ".join(map(str, teachers)) if isinstance(teachers, dict) else ""
        raise SystemExit(f"--model_name: no entry {name!r} in {shown(path)}. There are: {there or 'none'}.")
    entry, place = teachers[name], f"{shown(path)}, {name}"
    if unknown := sorted(str(field) for field in entry.keys() - KINDS.keys()):
        advice = " Keys do not belong in files: name an environment variable in api_key_env."
        raise SystemExit(
            f"{place}: unknown {', '.join(unknown)}; known are {', '.join(KINDS)}."
            f"{advice if any('key' in field for field in unknown) else ''}"
        )
    wrong = [field for field, value in entry.items() if not isinstance(value, KINDS[field])]
    wrong += [f"{field} (missing)" for field in ("base_url", "model") if field not in entry]
    if wrong:
        raise SystemExit(f"{place}: not usable: {', '.join(wrong)}. Compare it with {example}")
    if re.search("[@?]", entry["base_url"]):
        raise SystemExit(f"{place}: base_url has room for an address only. Keys go into environment variables.")
    if not re.fullmatch("([A-Z_][A-Z0-9_]*)?", entry.get("api_key_env", "")):
        raise SystemExit(f"{place}: api_key_env is not the name of an environment variable, such as DEEPSEEK_API_KEY.")
    if asked := {"stream", "n", "model", "messages"} & entry.get("options", {}).keys():
        raise SystemExit(f"{place}: options cannot change {', '.join(sorted(asked))}.")
    return Teacher(**entry)


def read_questions(path: Path, teacher: Teacher, instruction: str) -> list[Question]:
    """Reads prepared comments as questions to a teacher.

    Returns:
        The questions; first one of every video, then the second ones, and so on: what a teacher will not talk about
        comes by the video, and a trial sees many.

    Raises:
        DataError: if the file holds something else.
    """
    questions, in_video, unusable = [], Counter(), Counter()
    setting = json.dumps([teacher.model, teacher.options, instruction], ensure_ascii=False, sort_keys=True)
    for number, record in enumerate(read_records(path)):
        if not isinstance(record, dict) or not {"id", "video_id"} <= record.keys():
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


# ---------------------------------------------------------------------------------------------------------------------
# The answers' file


def read_answers(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Reads answers by id and key, the newest last; torn and damaged lines are left out."""
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for row in read_lines(path, ANSWER_FIELDS):
        known.pop((row["id"], row["key"]), None)  # So that the newest stands last.
        known[row["id"], row["key"]] = row
    return known


def cut_torn_line(path: Path) -> None:
    """Removes what a kill left after the last whole line, so that the next one starts a line."""
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends lines, and returns when they are on the disk."""
    is_new = not path.exists()
    # A teacher may send half a character (a lone surrogate), which no file can hold.
    data = memoryview("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace"))
    with path.open("ab", buffering=0) as file:  # A buffer would write what is left in it when the file is closed.
        whole = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:  # A full disk: the next line must not be written behind half a one.
            os.truncate(path, whole)
            raise
    if is_new:  # The folder has to know of it too.
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Asking


class ConcurrencyLimit:
    """Limits the concurrent requests: halved when the server refuses, raised slowly with answers (AIMD).

    (Additive increase, multiplicative decrease, as TCP does it: RFC 5681.)
    """

    def __init__(self, most: int) -> None:
        self.most, self.limit, self.active = most, float(most), 0
        self.refused_at = self.resume_at = 0.0
        self.changed, self.stopped = asyncio.Condition(), asyncio.Event()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Waits until a request may be sent; yields when that was."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.active < int(self.limit))
            self.active += 1
        try:
            while (left := self.resume_at - time.monotonic()) > 0 and not self.stopped.is_set():
                await self.sleep(left)
            yield time.monotonic()
        finally:
            async with self.changed:
                self.active -= 1
                self.changed.notify_all()

    async def sleep(self, seconds: float) -> None:
        """Sleeps, or wakes up if all is to stop."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopped.wait(), seconds)

    def answered(self) -> None:
        """After as many answers as there are requests under way, one more is."""
        self.limit = min(self.most, self.limit + 1 / self.limit)

    def refused(self, sent_at: float, wait_sec: float | None) -> None:
        """Halves the requests, once for all that were sent before; all wait if the teacher says how long."""
        if sent_at > self.refused_at:
            self.limit, self.refused_at = max(1.0, self.limit / 2), time.monotonic()
        if wait_sec is not None:
            self.resume_at = max(self.resume_at, time.monotonic() + wait_sec * random.uniform(1, 1.1))


def usage_of(completion: Any) -> Counter[str]:
    """The tokens of a request, as far as the server says so in numbers that can be."""
    usage = getattr(completion, "usage", None)
    said = {"in": getattr(usage, "prompt_tokens", None), "out": getattr(usage, "completion_tokens", None)}
    return Counter({
        name: int(number) for name, number in said.items() if isinstance(number, int | float) and 0 <= number < 1e9
    })  # fmt: skip


def text_of(content: Any) -> str:
    """The text of a message, which some servers send in parts; "" if there is none."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str)).strip()


def to_answer(completion: Any) -> Answer:
    """Takes the answer out of what the server sent. A complete text counts, even if the rest of the response is odd.

    Raises:
        NoAnswer: if there is none that a student should learn.
    """
    usage, choices = usage_of(completion), getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise NoAnswer("no choices in the response", again=True, usage=usage, odd=bool(choices))
    reason, message = getattr(choices[0], "finish_reason", None), getattr(choices[0], "message", None)
    reason = reason.lower() if isinstance(reason, str) else reason
    if reason == "content_filter":
        raise NoAnswer("content filter", again=False, usage=usage)
    if reason == "length":
        advice = "raise max_tokens in the teacher's options (another option asks all comments again)"
        raise NoAnswer(f"cut off: {advice}", again=False, usage=usage)
    if reason not in FINISHED:  # Such as a server that ran out of memory in the middle.
        raise NoAnswer(f"ended by {reason!r}", again=True, usage=usage, odd=not isinstance(reason, str))
    content = getattr(message, "content", ...)
    text = text_of(content)
    reasoning = text_of(getattr(message, "reasoning_content", None)) or text_of(getattr(message, "reasoning", None))
    if THOUGHT in text:  # Some servers leave the tags in, or only the closing one.
        thought, _, text = text.rpartition(THOUGHT)
        reasoning, text = reasoning or thought.replace("<think>", "", 1).strip(), text.strip()
    if not text or "<think>" in text:
        raise NoAnswer("an empty answer", again=True, usage=usage, odd=not isinstance(content, str | list | None))
    return Answer(text, reasoning, usage)


def retry_after(headers: Any) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after")
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


async def ask(client: Any, teacher: Teacher, messages: list[Message], timeout_sec: float) -> Answer:
    """Sends a question once.

    Raises:
        NoAnswer: if this request gave none.
        FatalError: if no request will.
    """
    import openai

    try:
        async with asyncio.timeout(timeout_sec):  # The client's own limit is for each part of a response.
            return to_answer(
                await client.chat.completions.create(model=teacher.model, messages=messages, extra_body=teacher.options)
            )
    except TimeoutError:
        raise NoAnswer(f"no answer in {timeout_sec:g} s", again=True) from None
    except openai.APIStatusError as error:
        status = error.status_code
        if status in (401, 402) or error.code == "insufficient_quota":
            # What the server says may repeat a part of the key.
            raise FatalError(f"the teacher refused the key, or the account is empty (HTTP {status})") from None
        if status == 404:
            raise FatalError(f"HTTP 404 for model {teacher.model!r} at {teacher.base_url}") from None
        busy = status == 429 or status >= 500
        again = busy or status in (408, 409)
        # The server's own words say which option it does not like, or what its filter did.
        said = re.sub(r"\bsk-\S+", "***", str(error.message).replace(client.api_key, "***"))[:200]
        raise NoAnswer(f"HTTP {status}: {said}", again, busy, retry_after(error.response.headers)) from None
    except openai.APIConnectionError as error:
        raise NoAnswer(f"connection: {type(error.__cause__ or error).__name__}", again=True) from None
    except (openai.APIError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise NoAnswer(f"a broken response ({type(error).__name__})", again=True, odd=True) from None


class Collector:
    """Asks questions, some at a time, and writes what comes back.

    Attributes:
        usage: Tokens of all requests, those without an answer as well.
        uncounted: Answers of whose tokens the server did not say, or not in numbers, how many there were.
        busy_sec: Time that answers took, summed.
        stop_reason: Why it ended before all questions were asked; "" if it did not.
    """

    def __init__(self, client: Any, teacher: Teacher, args: argparse.Namespace, answers: Path, failures: Path) -> None:
        self.client, self.teacher, self.args = client, teacher, args
        self.answers, self.failures = answers, failures
        self.usage: Counter[str] = Counter()
        self.answered = self.failed = self.uncounted = 0
        self.busy_sec = 0.0
        # Since the last answer: comments without one for reasons that may pass, and videos for others.
        self.failing: dict[bool, set[str]] = {True: set(), False: set()}
        self.stop_reason = ""

    async def run(self, questions: list[Question]) -> None:
        """Asks. If there is a reason to stop, what is under way may still come back: it is paid for."""
        self.pace, self.writing = ConcurrencyLimit(self.args.concurrency), asyncio.Lock()
        self.pending: dict[Path, list[dict[str, Any]]] = {self.answers: [], self.failures: []}
        left, loop = iter(questions), asyncio.get_running_loop()
        with progress_bar(None, "asking", "answer", total=len(questions), smoothing=0.05) as self.bar:
            terminals = [number for number in (1, 2) if os.isatty(number)]
            # What the process was told to ignore, as by nohup, it goes on ignoring.
            self.signals = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            for number in self.signals:
                loop.add_signal_handler(number, self.interrupt, number, terminals)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.args.concurrency, len(questions))):
                    group.create_task(self.work(left))
            self.restore_signals()

    def interrupt(self, number: int, terminals: list[int]) -> None:
        """Ctrl-C, SIGTERM or a closed terminal: the first waits for the answers under way, the second ends it all."""
        self.restore_signals()
        if number == signal.SIGHUP:  # What is printed to a terminal that is gone fails.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in terminals:
                os.dup2(nowhere, terminal)
        tqdm.write("Waiting for the answers that are under way; Ctrl-C again gives them up.")
        self.stop(f"interrupted by {signal.Signals(number).name}")

    def restore_signals(self) -> None:
        """Restores the default signal handling."""
        for number in self.signals:
            asyncio.get_running_loop().remove_signal_handler(number)
        self.signals = []

    def stop(self, reason: str) -> None:
        """Sends no more requests."""
        self.stop_reason = self.stop_reason or reason
        self.pace.stopped.set()

    async def work(self, questions: Iterator[Question]) -> None:
        """Takes one question after the other."""
        for question in questions:
            started = time.monotonic()
            try:
                answer = await self.answer(question)
            except FatalError as error:
                self.stop(str(error))
            except NoAnswer as error:
                await self.write(self.failures, {"id": question.record["id"], "reason": str(error)})
                self.failed += 1
                self.failing[error.again].add(question.record["id" if error.again else "video_id"])
                if len(self.failing[error.again]) >= FAILED_IN_A_ROW:
                    what = "comments" if error.again else "videos"
                    self.stop(f"failures for {FAILED_IN_A_ROW} {what} in a row, the last one: {error}")
            else:
                if answer:
                    await self.write(self.answers, as_row(question, answer, self.teacher.model))
                    self.answered += 1
                    self.uncounted += len(answer.usage) < 2
                    self.busy_sec += time.monotonic() - started
                    for failing in self.failing.values():
                        failing.clear()
                    self.bar.update()
            failed = f", {self.failed:,} failed" if self.failed else ""
            tokens, cost = sum(self.usage.values()), self.teacher.cost(self.usage)
            self.bar.set_postfix_str(f"{tokens:,} tokens, cost {cost:.4f}{failed}", refresh=False)
            if self.pace.stopped.is_set():
                return

    async def answer(self, question: Question) -> Answer | None:
        """Asks until there is an answer, None if it was told to stop before.

        Raises:
            NoAnswer: when another attempt is not worth it.
            FatalError: from `ask`.
        """
        failures: Counter[int] = Counter()  # By how many of the kind are too many.
        for attempt in count(1):
            async with self.pace.turn() as sent_at:
                if self.pace.stopped.is_set():
                    return None
                try:
                    answer = await ask(self.client, self.teacher, question.messages, self.args.timeout)
                except NoAnswer as error:
                    failure = error
                    self.usage += error.usage
                    if error.busy or error.wait_sec is not None:
                        self.pace.refused(sent_at, error.wait_sec)
                else:
                    self.usage += answer.usage
                    self.pace.answered()
                    return answer
            failures[failure.attempts] += 1
            if failures[failure.attempts] == failure.attempts:
                raise failure
            if (failure.wait_sec or 0) > LONGEST_WAIT_SEC:
                self.stop(f"the teacher asks to wait {failure.wait_sec:,.0f} s")
            elif not failure.wait_sec:
                # Exponential backoff, drawn at random so that not all come back at once.
                await self.pace.sleep(random.uniform(0, min(LONGEST_BACKOFF_SEC, 2**attempt)))

    async def write(self, path: Path, row: dict[str, Any]) -> None:
        """Appends a line; other requests go on while the disk works, and what they bring is written together."""
        self.pending[path].append(row)
        async with self.writing:
            rows, self.pending[path] = self.pending[path], []
            if rows:  # Otherwise the one before has written this row.
                await asyncio.to_thread(append, path, rows)


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
    known = read_answers(own)
    newest = {id: key for id, key in known}
    known = read_answers(other) | known
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


def make_client(teacher: Teacher, name: str, timeout_sec: float) -> Any:
    """An openai client; it does not retry, since `Collector` does.

    Raises:
        SystemExit: if the key is not in the environment.
    """
    key = os.environ.get(teacher.api_key_env, "") if teacher.api_key_env else "none"
    if not key:
        variable = teacher.api_key_env
        raise SystemExit(f"{variable} is not set, which holds the key of {name}. Set it: export {variable}=...")
    if not (key.isascii() and key.isprintable()):
        odd = "characters that no key has, such as curly quotes or a line break"
        raise SystemExit(f"{teacher.api_key_env} holds {odd}. Set it again: export {teacher.api_key_env}=...")
    import openai

    for variable in OPENAI_VARIABLES:
        os.environ.pop(variable, None)
    return openai.AsyncOpenAI(base_url=teacher.base_url, api_key=key, max_retries=0, timeout=timeout_sec)


def projection(collector: Collector, left: int) -> str:
    """Says what the questions that were not asked will take, judged by those that were."""
    each = 1 / collector.answered
    tokens = Counter({name: round(number * each * left) for name, number in collector.usage.items()})
    minutes = collector.busy_sec * each * left / min(left, collector.args.concurrency) / 60
    return (
        f"The other {left:,} will take about {tokens['in']:,} tokens in and {tokens['out']:,} out, cost "
        f"{collector.teacher.cost(tokens):.2f} in the currency of the prices, and last {minutes:.0f} min at this pace."
    )


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
    client = make_client(teacher, args.model_name, args.timeout)
    with exclusive_lock(answers):
        cut_torn_line(answers)
        left, again = answered_before(questions, answers, other)
        append(answers, again)
        failures.unlink(missing_ok=True)
        asked = left[: args.limit]
        print(
            f"{len(questions):,} comments, {len(questions) - len(left):,} answered before; asking {args.model_name} "
            f"for {len(asked):,}."
        )
        collector, started = Collector(client, teacher, args, answers, failures), time.monotonic()
        try:
            asyncio.run(collector.run(asked))
        except KeyboardInterrupt:
            collector.stop_reason = "interrupted"
        except ExceptionGroup as errors:  # Of asyncio's group of tasks.
            full = errors.subgroup(OSError)
            if full is None:
                raise
            raise SystemExit(f"Answers cannot be written to {shown(place)}: {full.exceptions[0]}") from None
        seconds = time.monotonic() - started
    usage, failed = collector.usage, collector.failed
    print(
        f"{collector.answered:,} answers in {seconds:.0f} s, {usage['in']:,} tokens in, {usage['out']:,} out, cost "
        f"{teacher.cost(usage):.4f} in the currency of the prices: {shown(answers)}"
    )
    if collector.uncounted:
        print(f"{collector.uncounted:,} answers came without a count of their tokens: these and the cost are higher.")
    if failed:
        print(f"{failed:,} comments got no answer, the reasons are in {shown(failures)}")
    if collector.stop_reason:
        raise SystemExit(f"Stopped: {collector.stop_reason}. The same command goes on with what is missing.")
    if len(left) > len(asked) and collector.answered:
        print(projection(collector, len(left) - len(asked)))
    if failed > args.max_failures:
        most = args.max_failures
        raise SystemExit(f"{failed:,} failed, more than --max_failures {most}. The same command asks them again.")
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
        questions = read_questions(data, teacher, args.instruction)
        collect(args, teacher, questions)
    except DataError as error:
        raise SystemExit(str(error)) from error
    except OSError as error:
        raise SystemExit(f"Answers cannot be written to {shown(from_root(args.output_dir))}: {error}") from error


if __name__ == "__main__":
    main(build_parser().parse_args())
