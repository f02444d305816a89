"""Asks a teacher many questions at a time; every answer is on the disk before it counts."""

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from utils.cli import progress_bar
from utils.data.records import Message
from utils.data.teacher import Answer, FatalError, NoAnswer, Teacher, ask
from utils.files import exclusive_lock, read_lines, shown

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Answers under way are taken before the process ends.
LONGEST_BACKOFF_SEC = 60
LONGEST_WAIT_SEC = 600  # The teacher may ask for more; then the run ends.
FAILED_IN_A_ROW = 20  # So many failures with no answer between them: the teacher is not going to answer.


class Question(NamedTuple):
    """A request to the teacher for one comment.

    Its record needs three texts: "id" and "key", by which an answer is known, and "video_id": requests that fail for
    good are counted by the video.
    """

    record: dict[str, Any]  # Of the line to write, without what the teacher says.
    messages: list[Message]


# ---------------------------------------------------------------------------------------------------------------------
# The answers' file


@contextmanager
def writing_answers(path: Path) -> Iterator[None]:
    """Keeps other processes from writing to a file of answers until the block ends, and cuts what a kill has torn.

    Raises:
        SystemExit: if another process is writing there.
    """
    with exclusive_lock(path):
        cut_torn_line(path)
        yield


def read_answers(path: Path, fields: Mapping[str, type]) -> dict[tuple[str, str], dict[str, Any]]:
    """Reads answers by id and key, the newest last; torn and damaged lines are left out.

    Args:
        path: The file; one that is not there has no answers.
        fields: What every line has at least, "id" and "key" among it, and of which types.
    """
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for row in read_lines(path, fields):
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


class Collector:
    """Asks questions, some at a time, and writes what comes back.

    Attributes:
        usage: Tokens of all requests, those without an answer as well.
        uncounted: Answers of whose tokens the server did not say, or not in numbers, how many there were.
        busy_sec: Time that answers took, summed.
        seconds: How long `collect` took.
        stop_reason: Why it ended before all questions were asked; "" if it did not.
    """

    def __init__(
        self,
        client: Any,
        teacher: Teacher,
        answers: Path,
        failures: Path,
        as_row: Callable[[Question, Answer, str], dict[str, Any]],
        *,
        concurrency: int,
        timeout_sec: float,
    ) -> None:
        """Prepares; nothing is sent yet.

        Args:
            client: Of `teacher_client`.
            teacher: Who is asked.
            answers: File that the answers are appended to, inside `writing_answers`.
            failures: File for the ids of what got no answer, and why.
            as_row: Makes a line of the answers' file of a question, its answer and the teacher's model.
            concurrency: Requests under way at most.
            timeout_sec: Until a request is given up and sent again.
        """
        self.client, self.teacher, self.as_row = client, teacher, as_row
        self.answers, self.failures = answers, failures
        self.concurrency, self.timeout_sec = concurrency, timeout_sec
        self.usage: Counter[str] = Counter()
        self.answered = self.failed = self.uncounted = 0
        self.busy_sec = self.seconds = 0.0
        # Since the last answer: comments without one for reasons that may pass, and videos for others.
        self.failing: dict[bool, set[str]] = {True: set(), False: set()}
        self.stop_reason = ""

    def collect(self, questions: list[Question]) -> None:
        """Asks, until all questions are answered or there is a reason to stop.

        Raises:
            SystemExit: if answers cannot be written.
        """
        started = time.monotonic()
        try:
            asyncio.run(self.run(questions))
        except KeyboardInterrupt:
            self.stop_reason = "interrupted"
        except ExceptionGroup as errors:  # Of asyncio's group of tasks.
            full = errors.subgroup(OSError)
            if full is None:
                raise
            place = shown(self.answers.parent)
            raise SystemExit(f"Answers cannot be written to {place}: {full.exceptions[0]}") from None
        self.seconds = time.monotonic() - started

    async def run(self, questions: list[Question]) -> None:
        """Asks. If there is a reason to stop, what is under way may still come back: it is paid for."""
        self.pace, self.writing = ConcurrencyLimit(self.concurrency), asyncio.Lock()
        self.pending: dict[Path, list[dict[str, Any]]] = {self.answers: [], self.failures: []}
        left, loop = iter(questions), asyncio.get_running_loop()
        with progress_bar(None, "asking", "answer", total=len(questions), smoothing=0.05) as self.bar:
            terminals = [number for number in (1, 2) if os.isatty(number)]
            # What the process was told to ignore, as by nohup, it goes on ignoring.
            self.signals = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            for number in self.signals:
                loop.add_signal_handler(number, self.interrupt, number, terminals)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrency, len(questions))):
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
                    await self.write(self.answers, self.as_row(question, answer, self.teacher.model))
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
                    answer = await ask(self.client, self.teacher, question.messages, self.timeout_sec)
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


def projection(collector: Collector, left: int) -> str:
    """Says what the questions that were not asked will take, judged by those that were."""
    each = 1 / collector.answered
    tokens = Counter({name: round(number * each * left) for name, number in collector.usage.items()})
    minutes = collector.busy_sec * each * left / min(left, collector.concurrency) / 60
    return (
        f"The other {left:,} will take about {tokens['in']:,} tokens in and {tokens['out']:,} out, cost "
        f"{collector.teacher.cost(tokens):.2f} in the currency of the prices, and last {minutes:.0f} min at this pace."
    )


def report(collector: Collector, left: int, max_failures: int) -> None:
    """Says what came back, and what the rest will take.

    Args:
        collector: That has asked.
        left: Questions without an answer that it was not given.
        max_failures: So many may have got no answer.

    Raises:
        SystemExit: if more failed, or the run ended early.
    """
    usage, failed = collector.usage, collector.failed
    print(
        f"{collector.answered:,} answers in {collector.seconds:.0f} s, {usage['in']:,} tokens in, {usage['out']:,} "
        f"out, cost {collector.teacher.cost(usage):.4f} in the currency of the prices: {shown(collector.answers)}"
    )
    if collector.uncounted:
        print(f"{collector.uncounted:,} answers came without a count of their tokens: these and the cost are higher.")
    if failed:
        print(f"{failed:,} comments got no answer, the reasons are in {shown(collector.failures)}")
    if collector.stop_reason:
        raise SystemExit(f"Stopped: {collector.stop_reason}. The same command goes on with what is missing.")
    if left and collector.answered:
        print(projection(collector, left))
    if failed > max_failures:
        more = f"{failed:,} failed, more than --max_failures {max_failures}"
        raise SystemExit(f"{more}. The same command asks them again.")
