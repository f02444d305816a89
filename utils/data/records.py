"""Records of any known format, read from files and turned into messages."""

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TextIO

from utils.data.thoughts import REASONING, Message, split_thought, with_thought, without_thoughts
from utils.files import shown

SYSTEM_PROMPT = "你是一名B站用户，看完视频后在评论区用自然、口语化的语气发表评论或回复别人的评论。"


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
FORMATS = (
    "one of {conversations: [{from, value}]}, {messages: [{role, content}]}, {instruction, input, output}, "
    "[{human, assistant}], {question, answer}, {prompt, completion}, {query, response} or {input, target}"
)
# Turns of ShareGPT's, OpenAI's and ms-swift's tool calls.
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "tool_call", "tool_response")
NO_TOOLS = "tool calls are not trained on"
# What the fields of a question and its answer are called, in lower case.
PAIRS = (
    ("user", "assistant"), ("question", "answer"), ("prompt", "completion"), ("query", "response"),
    ("input", "target"), ("input", "output"), ("instruction", "output"), ("instruction", "response"),
)  # fmt: skip
QUESTIONS, ANSWERS = (tuple(dict.fromkeys(names)) for names in zip(*PAIRS[1:], strict=True))
TURNS = {"conversations": ("from", "value"), "messages": ("role", "content")}
SYSTEMS = ("system", "system_prompt")
KEPT_FIELDS = ("id", "video_id")  # Whatever the others are called.
# Nothing is said of these, where no other field is there.
PLAIN = {("user", "instruction"), ("assistant", "output")}
PLAIN |= {(name, name) for name in (*TURNS, "input", "system", "history", "chosen", "rejected")}
NOT_NOTED = (*KEPT_FIELDS, *REASONING, "real")  # What a teacher's answer has replaced.

Taken = dict[str, dict[str, int]]  # Which fields are whose -> other field -> records that have it.
# What Python's str.strip() takes away.
WHITESPACE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())
# A description that tells nothing: it names other users, and that is all. A pattern for Python's and DuckDB's engine.
MENTIONS = f"(?:[@＠][^@＠{WHITESPACE}]+[{WHITESPACE}]*)+"
PART_CHARACTERS = 1 << 20  # So much of a file is read at once.
LONGEST_ITEM = 1 << 26  # Characters of what can be meant as one item.
WHITE_SPACE = re.compile(r"[ \t\n\r]*")  # Of JSON.


class DataError(ValueError):
    """Data that a run cannot go on with; the message is written for the user."""


class UnusableRecord(DataError):
    """A record of a known format that has nothing to learn from; runs count it and go on."""


def comment_prompt(title: str, desc: str = "", parent: str = "") -> str:
    """Writes the user turn that asks for a comment.

    The parts that all comments of one video have in common come first, so that their token prefixes are equal.

    Args:
        title: The video's title.
        desc: Its description; no line is written for an empty one, for Bilibili's "-" and for mentions alone.
        parent: The comment to answer; no line is written for a comment on the video itself.

    Returns:
        One line a part.
    """
    lines = [f"视频标题：{title.strip()}"]
    if desc.strip() not in ("", "-") and not re.fullmatch(MENTIONS, desc.strip()):
        lines.append(f"视频简介：{desc.strip()}")
    if parent.strip():
        lines.append(f"父评论：{parent.strip()}")
    return "\n".join(lines)


def read_records(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Reads the records of a .json, .jsonl, .csv or .parquet file in order.

    Args:
        path: The file.
        columns: Of --columns: role -> field; a record then has the roles as its fields, and its ids.

    Raises:
        DataError: if the file's ending is unknown, its content is not what the ending says, or fields are missing.
    """
    return _renamed(_read(path), columns, path) if columns else _read(path)


def _renamed(records: Iterator[Any], columns: Mapping[str, str], path: Path) -> Iterator[dict[str, Any]]:
    unseen, names = {*columns}, ["nothing"]
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{shown(path)}, record {number}: got a {type(record).__name__}, expected named fields.")
        there = {role: field if field in record else _alike(record, field) for role, field in columns.items()}
        found = {role: record[field] for role, field in there.items() if field is not None}
        names = sorted(record)
        # Not every record has a system prompt.
        if missing := [field for role, field in columns.items() if role not in found and role != "system"]:
            raise DataError(f"{shown(path)}, record {number}: no field {missing[0]!r} of --columns, there are {names}.")
        unseen -= found.keys()
        yield {name: record[name] for name in KEPT_FIELDS if name in record} | found
    if unseen == {"system"}:
        raise DataError(f"{shown(path)}: no field {columns['system']!r} of --columns, in the last record are {names}.")


def _alike(record: Mapping[str, Any], field: str) -> str | None:
    return next(iter(by_name(record).get(field.casefold(), [])), None)


def has_content(value: Any) -> bool:
    """Tells what a field holds from nothing: None, NaN, an empty text or list."""
    return value is not None and value == value and bool(value.strip() if isinstance(value, str) else value != [])


def id_of(record: Any, field: str = "id") -> str | None:
    """A record's id, or its video's with "video_id"; None if there is none."""
    value = record.get(field) if isinstance(record, dict) else None
    return str(value) if has_content(value) else None


def _read(path: Path) -> Iterator[Any]:
    readers = {".json": _read_array, ".jsonl": _read_lines, ".csv": _read_csv}
    kind, opened = (Path(path.stem).suffix, gzip.open) if path.suffix == ".gz" else (path.suffix, open)
    try:
        if kind in readers:
            with opened(path, "rt", encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file:
                yield from readers[kind](file, path)
        elif path.suffix == ".parquet":
            from datasets import load_dataset

            yield from load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            raise DataError(f"{shown(path)}: expected a .json, .jsonl, .csv or .parquet file.")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)}: its text is not UTF-8 ({error}). Save it as UTF-8.") from error
    except (ValueError, csv.Error, OSError, EOFError, zlib.error) as error:  # Also what datasets and pyarrow raise.
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown(path)}: not readable as {kind[1:]}: {error}") from error


def _read_lines(file: TextIO, path: Path) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                if number > 1 or line.strip()[0] != "[":
                    raise ValueError(f"line {number}: {error}. Expected a record a line.") from error
                record = [None]  # An array goes on in the next lines.
            if isinstance(record, list) and not _is_dialogue(record):
                raise DataError(
                    f"{shown(path)}: got an array in line {number}, expected a record a line. If the file is one array "
                    f"of records, rename it to {path.stem}.json"
                )
            yield record


def _read_csv(file: TextIO, path: Path) -> Iterator[dict[str, str]]:
    """Not through pandas: cells stay the texts they are, 666 is an answer, and so is NA."""
    rows = csv.DictReader(file, strict=True)  # Else a quote that is not closed makes the rest of a file one cell.
    if not rows.fieldnames:
        raise DataError(f"{shown(path)}: expected the columns' names in the first row, got nothing.")
    if twice := [name for name, times in Counter(rows.fieldnames).items() if times > 1 and name.strip()]:
        raise DataError(f"{shown(path)}: the column {twice[0]!r} is there twice. Rename or remove one of them.")
    line = rows.line_num + 1
    try:
        for row in rows:
            if None in row or None in row.values():
                raise DataError(f"{shown(path)}: a row with another number of cells than the first: {row}")
            yield row
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{shown(path)}: the row that begins in line {line} cannot be read: {error}. A cell that begins with a "
            'quote ends with one, and quotes within it are doubled: "a ""b"" c"'
        ) from error


def _read_array(file: TextIO, path: Path) -> Iterator[Any]:
    """Reads a JSON array an item at a time, so that a file of any size takes no more memory than its longest item.

    Raises:
        ValueError: if it is no JSON array.
    """
    decoder, text, place, lines = json.JSONDecoder(), "", 0, 0

    def read_more() -> bool:
        nonlocal text, place, lines
        part = file.read(max(PART_CHARACTERS, len(text) - place))  # More each time, for items that are long.
        lines += text.count("\n", 0, place)
        text, place = text[place:] + part, 0
        return bool(part)

    def next_character() -> str:
        """Goes to the next character that is no white space; it is "" at the end."""
        nonlocal place
        while (place := WHITE_SPACE.match(text, place).end()) == len(text):
            if not read_more():
                return ""
        return text[place]

    def next_item() -> Any:
        nonlocal place
        while True:
            try:
                before, (item, end) = place, decoder.raw_decode(text, place)
                # A number may go on in the next part.
                if text[end : end + 3].strip(".eE+-") or not read_more():
                    place += end - before
                    return item
            except json.JSONDecodeError as error:
                line = lines + error.lineno
                if len(text) - place > LONGEST_ITEM or not read_more():
                    raise ValueError(f"{error.msg}: line {line}") from error

    if next_character() != "[":
        raise DataError(f"{shown(path)}: {_no_array(text + file.read(), path)}")
    place += 1
    character = next_character()
    while character != "]":
        yield next_item()
        if (character := next_character()) == ",":
            place += 1
            next_character()
        elif character != "]":
            raise ValueError(f"Expecting ',' or ']': line {lines + text.count(chr(10), 0, place) + 1}")
    place += 1
    if next_character():
        raise ValueError(f"Extra data: line {lines + text.count(chr(10), 0, place) + 1}")


def _no_array(text: str, path: Path) -> str:
    """What is in a .json file that holds no array, and what to do.

    Raises:
        ValueError: if it is no JSON.
    """
    try:
        got = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return f"expected one array of records. If it holds a record a line, rename it to {path.stem}.jsonl"
    lists = [name for name, value in got.items() if isinstance(value, list)] if isinstance(got, dict) else []
    told = f" Are they in {lists[0]!r}? Then save that list alone." if {*lists} - TURNS.keys() else ""
    return f"got one JSON {type(got).__name__}, expected an array of records.{told}"


def find_splits(data_dir: Path) -> list[Path | None]:
    """Finds the files of the training and of the held-out records in a folder."""
    return [find_split(data_dir, split) for split in ("train", "test")]


def find_split(data_dir: Path, split: str) -> Path | None:
    """Finds data_<split> or <split> with any readable ending in a folder."""
    stems, endings = (f"data_{split}", split), (".json", ".jsonl", ".csv", ".parquet")
    paths = [data_dir / f"{stem}{ending}" for stem in stems for ending in endings]
    return next((path for path in paths if path.is_file()), None)


def to_messages(record: Any, taken: Taken | None = None, thoughts: bool = False) -> list[Message]:
    """Turns a record of any known format into messages.

    Known are the original's and ShareGPT's `conversations`, OpenAI's `messages`, Alpaca's `instruction`, `input`,
    `output` (with `system` and `history`), other fields with usual names of a question and its answer
    (`find_fields`), which may be lists of messages, as TRL's `prompt` and `completion` are; and lists of `human`,
    `assistant` pairs.

    Args:
        record: From `read_records`.
        taken: Gets the fields that were taken, see `note_fields`.
        thoughts: Whether thoughts (`reasoning_content`, `reasoning`, or at an answer's beginning) stay before answers,
            as `utils.data.thoughts.split_thought` reads them.

    Returns:
        [{"role": ..., "content": stripped text}]: perhaps a system message, then user and assistant by turns.

    Raises:
        DataError: if the format is unknown, or several fields may be meant.
        UnusableRecord: if a turn is empty or no text, a role is unknown or the turns do not alternate.
    """
    if isinstance(record, list) and _is_dialogue(record):
        return _checked([(role, turn[role]) for turn in record for role in ("human", "assistant")])
    if not isinstance(record, dict):
        raise DataError(f"got a {type(record).__name__}, expected {FORMATS}.")
    fields = find_fields(record)
    turns = past_turns(record, fields)
    if name := next((name for name in TURNS if name in fields), None):
        turns += _named_turns(record[fields[name]], *TURNS[name], thoughts)
    elif {"user", "assistant"} <= fields.keys():
        for role, value in (("user", question_of(record, fields)), ("assistant", record[fields["assistant"]])):
            turns += _named_turns(value, "role", "content", thoughts) if isinstance(value, list) else [(role, value)]
    else:
        raise DataError(
            f"got the fields {sorted(record)}, expected {FORMATS}. Others are to be named: "
            "--columns 'user=FIELD,assistant=FIELD'"
        )
    messages = _checked(turns)
    note_fields(record, fields, taken)
    answer = {**messages[-1], "content": with_thought(record, messages[-1]["content"])}
    return [*messages[:-1], answer] if thoughts else without_thoughts(messages)


def _is_dialogue(record: list[Any]) -> bool:
    return all(isinstance(turn, dict) and {"human", "assistant"} <= {*turn} for turn in record)


def by_name(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """A record's fields by their names in lower case, without spaces around; in the record's order."""
    names: dict[str, list[str]] = {}
    for field in record:
        names.setdefault(field.strip().casefold(), []).append(field)
    return names


def find_fields(record: Mapping[str, Any], answers: Sequence[str] = ()) -> dict[str, str]:
    """Finds a record's fields by their usual names. Those without content count only where no other may be meant.

    Args:
        record: With named fields.
        answers: What the answers are called; left out, they are the usual ones of one answer, "assistant".

    Returns:
        What there is of these -> field: "conversations" or "messages", or else "user", perhaps with "input" (what
        follows `instruction`: Alpaca's input, or Dolly's context) and "history"; the answers; "system".

    Raises:
        DataError: if several fields may be one of these.
    """
    names, there = by_name(record), {field for field, value in record.items() if has_content(value)}
    if not answers and not {"user", "assistant"} <= names.keys():  # One alone is somebody's name.
        names = {name: fields for name, fields in names.items() if name not in ("user", "assistant")}

    def called(*known: str) -> list[str]:
        found = [field for name in known for field in names.get(name, [])]
        return sorted(found, key=lambda field: field not in there)

    def filled(*known: str) -> list[str]:
        return [field for field in called(*known) if field in there]

    sides = {answer: (answer,) for answer in answers} or {"assistant": (*ANSWERS, "assistant")}
    found = {side: filled(*known) or called(*known)[-1:] for side, known in sides.items()}
    found["system"] = filled(*SYSTEMS) or called(*SYSTEMS)[:1]
    follows = ("input", "context") if "instruction" in names else ()
    questions = [name for name in QUESTIONS if name not in follows]
    user = filled(*questions, *["user"] * bool(filled("assistant")))
    if filled(*follows) and not filled("instruction"):  # Both are one question.
        user += names["instruction"][:1]
    found = {"user": user or called("user", *questions)[-1:]} | found
    if turns := filled(*TURNS) or called(*TURNS) * (not all(found[role] for role in ("user", *sides))):
        return _first({turns[0].strip().casefold(): turns} | {role: found[role] for role in (*answers, "system")})
    if any(len(fields) > 1 for fields in found.values()):
        raise _several(record, found)
    if found["user"] and found["user"][0] in names.get("instruction", []):
        found["input"] = called(*follows)
    # A patient's is a text.
    found["history"] = [field for field in called("history") if isinstance(record[field], list) or field not in there]
    return _first(found)


def _first(found: Mapping[str, list[str]]) -> dict[str, str]:
    return {role: fields[0] for role, fields in found.items() if fields}


def _several(record: Mapping[str, Any], found: Mapping[str, list[str]]) -> DataError:
    which = ", ".join(f"{' or '.join(fields)} may be {role}" for role, fields in found.items() if len(fields) > 1)
    one = dict.fromkeys((role for role in found if role != "system"), "FIELD") | _first(found)
    pairs = product(found["user"], found.get("assistant", []))
    usual = [pair for pair in pairs if tuple(field.strip().casefold() for field in pair) in PAIRS]
    one |= zip(("user", "assistant"), usual[0], strict=True) if usual else {}
    named = ",".join(f"{role}={field}" for role, field in one.items())
    return DataError(f"got the fields {sorted(record)}, of which {which}. Say which: --columns '{named}'")


def note_fields(record: Mapping[str, Any], fields: Mapping[str, str], taken: Taken | None) -> None:
    """Notes which fields of a record were taken for what, and which others it has; nothing of a plain format."""
    pair = "chosen" in fields
    known = (*fields.values(), *NOT_NOTED, *["source"] * pair)  # Where our own pairs come from.
    unused = [name for name in record if name not in known and has_content(record[name])]
    plain = PLAIN | {("user", "prompt")} if pair else PLAIN
    if taken is not None and (unused or not fields.items() <= plain):
        what = listed_fields({role: field for role, field in fields.items() if role != "input"})
        what += f", {fields['user']} followed by {fields['input']}" if "input" in fields else ""
        others = taken.setdefault(what, {})
        for name in unused:
            others[name] = others.get(name, 0) + 1


def listed_fields(fields: Mapping[str, str]) -> str:
    """Says which fields are whose, such as "user and assistant: question, answer"."""
    *first, last = fields
    return f"{', '.join(first)}{' and ' * bool(first)}{last}: {', '.join(fields.values())}"


def fields_notes(taken: Taken) -> list[str]:
    """What `note_fields` has noted: "fields taken as user and assistant: question, answer; not used: topic (in 12)"."""
    unused = {what: [f"{name} (in {times})" for name, times in sorted(taken[what].items())] for what in taken}
    return [f"fields taken as {what}{'; not used: ' * bool(more)}{', '.join(more)}" for what, more in unused.items()]


def past_turns(record: Mapping[str, Any], fields: Mapping[str, str]) -> list[tuple[str, Any]]:
    """The turns of a record's fields before its question: its system prompt and its history.

    Raises:
        DataError: if the history is no list of pairs.
    """
    system, history = (record[fields[role]] if role in fields else None for role in ("system", "history"))
    history = history if has_content(history) else []
    if not all(isinstance(pair, list) for pair in history):
        raise DataError(f"a history that is not a list of [question, answer] pairs, expected {FORMATS}.")
    turns = [turn for pair in history for turn in zip(("user", "assistant"), pair, strict=False)]
    return [("system", system), *turns] if has_content(system) else turns


def question_of(record: Mapping[str, Any], fields: Mapping[str, str]) -> Any:
    """A record's question, an instruction and its input as one text; what is no text stays what it is."""
    parts = [record[fields[role]] for role in ("user", "input") if role in fields]
    there = [as_text(part) for part in parts if has_content(part)]
    if len(there) == 1:
        return there[0]
    return "\n".join(there) if all(isinstance(part, str) for part in there) else (*there,)


def as_text(value: Any) -> Any:
    """A number as the text that it is in a table of texts, NaN as None; all else as it is."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value).removesuffix(".0") if value == value else None
    return value


def _named_turns(turns: Any, role: str, content: str, thoughts: bool = False) -> list[tuple[str, Any]]:
    try:
        if any(turn.get("tool_calls") and not turn.get(content) for turn in turns if isinstance(turn, dict)):
            raise UnusableRecord(f"a turn of 'tool_calls' ({NO_TOOLS})")
        return [(turn[role], with_thought(turn, turn[content]) if thoughts else turn[content]) for turn in turns]
    except (TypeError, KeyError) as error:
        raise DataError(f"a turn without {role!r} and {content!r}, expected {FORMATS}.") from error


def _checked(turns: list[tuple[str, Any]]) -> list[Message]:
    messages = []
    for role, _ in turns:
        if role not in [*ROLES]:  # A list, since what stands for the role may not be hashable.
            why = f" ({NO_TOOLS})" if role in [*TOOL_ROLES] else ""
            raise UnusableRecord(f"a turn of {role!r}{why}, known are {', '.join(ROLES)}")
    for role, content in turns:
        content = as_text(content)
        if content is not None and not isinstance(content, str):
            raise UnusableRecord(f"a turn of the {ROLES[role]} that is not a text")
        if not content or not split_thought(content)[1].strip():  # A thought alone is no answer.
            raise UnusableRecord(f"an empty {ROLES[role]} turn")
        # Half of a surrogate pair, which JSON can carry, is no character: tokenizers refuse it.
        whole = content.strip().encode("utf-8", "replace").decode()
        messages.append({"role": ROLES[role], "content": whole})
    roles = [message["role"] for message in messages]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        raise UnusableRecord("turns that are not user and assistant by turns")
    return messages
