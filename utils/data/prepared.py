"""What prepare_data.py left in a folder, to be looked through: counts, records, and whether its cleaning is right.

A crawl may have millions of comments: files are read a line at a time, and of most lines only the place is kept.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from utils.data.cleaning import REASONS
from utils.data.crawl_files import DROPPED
from utils.data.records import DataError, Message, to_messages
from utils.files import read_json, read_lines, shown

FILES = ("report.json", "data_train.json", "data_test.json", DROPPED)
HALF = 25  # Of a draw: so many that were dropped and as many that were kept.
MOST_HITS = 50
UNWRITTEN = ("torn", "duplicate", "beyond_total")  # Reasons that dropped.jsonl has no lines of.
BARS = 40
INTERVAL_DRAWS = 20_000
# Where lines begin, in bytes, of one file or several.
Lines = list[tuple[Path, array]]


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Turns whatever comes of a missing, torn or foreign file into a sentence.

    Raises:
        DataError: in place of it.
    """
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{shown(path)} cannot be read, or is not what prepare_data.py writes ({type(error).__name__}: {error})."
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Counts


class Prepared(NamedTuple):
    """What report.json says.

    Attributes:
        folder: Where it lies.
        mark: Changes with the rules, and with what was read or kept; not when the same is prepared again.
        arguments: Of prepare_data.py.
        read: Comments, with what is no whole row.
        dropped: Reason -> how many went for it.
        examples: Reason -> some of their texts.
        splits: "train", "test" -> {"comments", "videos"}.
        lengths: "comment", "prompt" -> {characters: how many have so many}.
    """

    folder: Path
    mark: str
    arguments: dict[str, Any]
    read: int
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    splits: dict[str, dict[str, int]]
    lengths: dict[str, dict[int, int]]

    @property
    def cleaned(self) -> int:
        """How many the cleaning dropped."""
        return sum(self.dropped.get(reason, 0) for reason in REASONS)

    @property
    def written_dropped(self) -> int:
        """How many are in dropped.jsonl: all that were dropped but for those that SQL never joined."""
        return sum(self.dropped.values()) - sum(self.dropped.get(reason, 0) for reason in UNWRITTEN)

    @property
    def passed(self) -> int:
        """How many the cleaning let pass; with --total not all of them are in the files."""
        return sum(split["comments"] for split in self.splits.values()) + self.dropped.get("beyond_total", 0)

    @property
    def has_dropped(self) -> bool:
        """Whether what was dropped is there; the file of an earlier run may be left where it was not asked for."""
        return self.arguments.get("write_dropped") is True and (self.folder / DROPPED).is_file()


def read_prepared(folder: Path) -> Prepared:
    """Reads report.json.

    Raises:
        DataError: if prepare_data.py did not write it.
    """
    path = folder / "report.json"
    with as_written(path):
        report = read_json(path)
        dropped = {reason: int(count) for reason, count in report["dropped"].items()}
        examples = {reason: [*map(str, texts)] for reason, texts in report.get("examples", {}).items()}
        splits = {
            name: {part: int(report["splits"][name][part]) for part in ("comments", "videos")}
            for name in ("train", "test")
        }
        lengths = {
            name: {int(chars): int(count) for chars, count in report["lengths"][name].items()}
            for name in ("comment", "prompt")
        }
        arguments, read = dict(report["arguments"]), int(report["read"])
        if read < 1 or not all(lengths.values()) or not all(name.isidentifier() for name in dropped | examples):
            raise ValueError("counts that make no sense")
        places = ("data_dir", "output_dir", "write_dropped")
        rules = {name: value for name, value in arguments.items() if name not in places}
        state = json.dumps([rules, read, dropped, splits, report["lengths"]], sort_keys=True)
    mark = hashlib.sha256(state.encode()).hexdigest()[:16]
    return Prepared(folder, mark, arguments, read, dropped, examples, splits, lengths)


def is_prepared(folder: Path) -> bool:
    """Whether prepare_data.py wrote into a folder; other scripts write reports too."""
    try:
        read_prepared(folder)
    except DataError:
        return False
    return True


def bars(counts: dict[int, int], edge: int) -> list[tuple[int, int, int]]:
    """Counts lengths in bars of equal width, what is longer than `edge` in the last one.

    Returns:
        (first length, the first one after it, how many), up to some `BARS`.
    """
    width = edge // BARS + 1
    found: Counter[int] = Counter()
    for length, count in counts.items():
        found[min(length, edge) // width] += count
    return [(width * bar, width * (bar + 1), found[bar]) for bar in range(edge // width + 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Records


def line_starts(path: Path, wanted: Callable[[bytes], bool]) -> array:
    """Finds where the wanted lines of a file begin."""
    starts, place = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            if wanted(line):
                starts.append(place)
            place += len(line)
    return starts


def kept_lines(folder: Path) -> Lines:
    """Finds the kept records.

    Raises:
        DataError: if they are not as many as report.json says.
    """
    found = []
    for split, sizes in read_prepared(folder).splits.items():
        path = folder / f"data_{split}.json"
        with as_written(path):
            starts = line_starts(path, lambda line: line.startswith(b"{"))
        _check_count(path, len(starts), sizes["comments"])
        found.append((path, starts))
    return found


def cleaned_lines(folder: Path) -> Lines:
    """Finds what the cleaning dropped, which is not what was torn, doubled or incomplete.

    Raises:
        DataError: if it is not as much as report.json says.
    """
    path = folder / DROPPED
    with as_written(path):
        starts = line_starts(path, lambda line: json.loads(line)["reason"] in REASONS)
    _check_count(path, len(starts), read_prepared(folder).cleaned)
    return [(path, starts)]


def _check_count(path: Path, count: int, expected: int) -> None:
    if count != expected:
        raise DataError(
            f"{shown(path)}: got {count:,} records, expected {expected:,}, as report.json says: it is damaged, or of "
            "another run."
        )


def record_at(lines: Lines, number: int) -> Any:
    """Reads one of the records."""
    for path, starts in lines:
        if number < len(starts):
            with as_written(path), path.open("rb") as file:
                file.seek(starts[number])
                return json.loads(file.readline().rstrip(b",\r\n"))
        number -= len(starts)
    raise IndexError(number)


def in_random_order(random: Random, population: int, count: int) -> list[int]:
    """Draws different numbers below `population`; a larger count begins with what a smaller one gives."""
    found: dict[int, None] = {}
    while len(found) < min(count, population):
        found[random.randrange(population)] = None
    return [*found]


def messages_at(lines: Lines, numbers: list[int]) -> list[list[Message]]:
    """Reads kept records as the messages that a model is trained on."""
    return [to_messages(record_at(lines, number)) for number in numbers]


def size_of(lines: Lines) -> int:
    """How many records there are."""
    return sum(len(starts) for _, starts in lines)


# ---------------------------------------------------------------------------------------------------------------------
# Search


class Hits(NamedTuple):
    """What was found: how many records, and of the first of them (what it is about, or why it went; text)."""

    total: int
    first: list[tuple[str, str]]


def search(folder: Path, where: str, wanted: str) -> Hits:
    """Looks for a text through all files, A to Z in either case; most lines are not even parsed.

    Args:
        folder: Of the files.
        where: "answer", "prompt" or "dropped".
        wanted: The text.

    Raises:
        DataError: if a file is missing or damaged.
    """
    plain = wanted.encode("utf-8", "surrogatepass").lower()
    # As it stands in JSON, where line breaks and quotation marks are escaped.
    escaped = json.dumps(wanted, ensure_ascii=False)[1:-1].encode("utf-8", "surrogatepass").lower()
    report = read_prepared(folder)
    sizes = {f"data_{split}.json": size["comments"] for split, size in report.splits.items()}
    total, first = 0, []
    for name, size in ({DROPPED: report.written_dropped} if where == "dropped" else sizes).items():
        path, count = folder / name, 0
        with as_written(path), path.open("rb") as file:
            for line in file:
                count += line.startswith(b"{")
                if escaped not in line.lower() or not line.startswith(b"{"):
                    continue
                row = json.loads(line.rstrip(b",\r\n"))
                if where == "dropped":
                    about, text = row["reason"], row["text"]
                else:
                    about, text = (turn["value"] for turn in row["conversations"][-2:])
                if plain in (about if where == "prompt" else text).encode("utf-8", "surrogatepass").lower():
                    total += 1
                    if total <= MOST_HITS:
                        first.append((about, text))
        _check_count(path, count, size)
    return Hits(total, first)


# ---------------------------------------------------------------------------------------------------------------------
# Is the cleaning right?


class Drawn(NamedTuple):
    """A text to judge.

    Attributes:
        draw: The number of the draw that it belongs to, from 0.
        id: Of the comment.
        reason: Why the cleaning dropped it; "" if it was kept.
        prompt: What it answers: title, description, comment.
        text: The comment.
    """

    draw: int
    id: str
    reason: str
    prompt: str
    text: str


def texts_of(values: Iterable[Any]) -> tuple[str, str]:
    """A prompt and a comment.

    Raises:
        TypeError: if they are no texts.
    """
    prompt, text = values
    if not isinstance(prompt, str) or not isinstance(text, str):
        raise TypeError(f"expected two texts, got {prompt!r} and {text!r}")
    return prompt, text


def draw_records(mark: str, kept: Lines, cleaned: Lines, draws: int) -> list[Drawn]:
    """Draws records, half of them dropped, in a mixed order; the same ones for the same data.

    Args:
        mark: Of the data.
        kept: From `kept_lines`.
        cleaned: From `cleaned_lines`; when none are left, the others go on.
        draws: How many times `HALF` of each. More draws add to those before.

    Raises:
        DataError: if one of them is not what prepare_data.py writes.
    """
    found: list[Drawn] = []
    numbers = [
        in_random_order(Random(f"{mark} {side}"), size_of(lines), HALF * draws)
        for side, lines in enumerate((kept, cleaned))
    ]
    with as_written(kept[0][0].parent):
        for draw in range(draws):
            part = slice(HALF * draw, HALF * (draw + 1))
            drawn = [
                Drawn(draw, str(record["id"]), "", *texts_of(turn["value"] for turn in record["conversations"][-2:]))
                for record in (record_at(kept, number) for number in numbers[0][part])
            ]
            drawn += [
                Drawn(draw, str(record["id"]), record["reason"], *texts_of((record["prompt"], record["text"])))
                for record in (record_at(cleaned, number) for number in numbers[1][part])
            ]
            Random(f"{mark} {draw} order").shuffle(drawn)
            found += drawn
    return found


def read_labels(path: Path, mark: str) -> dict[str, dict[str, Any]]:
    """Reads what people said of the drawn comments: id -> the last line on it.

    Args:
        path: Of labels.jsonl.
        mark: Of the data: what was drawn from other data, or under other rules, is left out.
    """
    with as_written(path):
        rows = read_lines(path, {"data": str, "draw": int, "id": str, "junk": bool})
    return {row["id"]: row for row in rows if row["data"] == mark}


class Share(NamedTuple):
    """A share, and the interval that holds the true one with 95 %; the value is None where there is nothing to say."""

    value: float | None
    low: float
    high: float


class Quality(NamedTuple):
    """How good a cleaning is.

    Attributes:
        precision: Of what was dropped, how much is junk.
        recall: Of all junk, how much was dropped.
        left: Of what was kept, how much is junk.
    """

    precision: Share
    recall: Share
    left: Share


def quality(dropped: list[bool], kept: list[bool], n_dropped: int, n_kept: int) -> Quality:
    """Estimates precision and recall from what was drawn of each side.

    With D dropped and K kept comments, of which the shares p and q are junk, the recall is D p / (D p + K q). Shares
    have Clopper and Pearson's interval. The recall rises with p and falls with q, so its ends come from draws of what
    bounds these two ("melded" intervals: Fay, Proschan and Brittain 2015, Biometrics 71): x of n bounds a share from
    below by Beta(x, n - x + 1), from above by Beta(x + 1, n - x). Draws from Jeffreys' Beta(x + 1/2, n - x + 1/2) hold
    the truth 95 % of the time on the whole, but less than 90 % where a share is small. That nearly all of few dropped
    ones may have been drawn is not made use of: the interval is too wide then.

    Args:
        dropped: For each one drawn of the dropped, whether it is junk; at least one.
        kept: For each one drawn of the kept; at least one.
        n_dropped: D.
        n_kept: K.
    """
    import numpy as np

    random = np.random.default_rng(0)
    x, n, y, m = sum(dropped), len(dropped), sum(kept), len(kept)

    def bound(a: int, b: int) -> np.ndarray:
        return np.full(INTERVAL_DRAWS, float(b == 0)) if a * b == 0 else random.beta(a, b, INTERVAL_DRAWS)

    def recall(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return n_dropped * p / (n_dropped * p + n_kept * q)

    low = float(np.quantile(recall(bound(x, n - x + 1), bound(y + 1, m - y)), 0.025))
    high = float(np.quantile(recall(bound(x + 1, n - x), bound(y, m - y + 1)), 0.975))
    junk = n_dropped * x / n + n_kept * y / m
    value = n_dropped * x / n / junk if junk else None
    return Quality(exact_share(x, n), Share(value, low, high), exact_share(y, m))


def exact_share(count: int, of: int) -> Share:
    """A share with Clopper and Pearson's interval."""
    from scipy.stats import binomtest

    interval = binomtest(count, of).proportion_ci()
    return Share(count / of, float(interval.low), float(interval.high))


def looser(reason: str, arguments: dict[str, Any]) -> str:
    """An argument with which fewer comments go for a reason; "" where none is known.

    Args:
        reason: One of `REASONS`.
        arguments: What was given.
    """
    switches = {"contact": "--contacts mask", "bait": "--drop_bait False", "echo": "--drop_echo False"}
    switches |= {"uploader": "--drop_uploader False", "language": "--language any"}
    numbers = {"few_likes": "min_likes", "too_short": "min_chars", "too_long": "max_chars"}
    numbers |= {"emoticons": "max_emoticons", "repeat": "max_repeats", "near_repeat": "max_repeats"}
    name = numbers.get(reason, "")
    if not isinstance(now := arguments.get(name), int):
        return switches.get(reason, "")
    return f"--{name} {now // 2 if name.startswith('min') else max(2 * now, 1)}"
