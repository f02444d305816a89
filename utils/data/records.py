"""Records of any known format, read from files and turned into messages."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, TextIO

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
KEPT_FIELDS = ("id", "video_id")  # Whatever the others are called.

Message = dict[str, str]
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


def _read(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".json":
            with path.open(encoding="utf-8-sig") as file:
                yield from _read_array(file, path)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        elif path.suffix == ".csv":
            # Not through pandas: cells stay the texts they are, 666 is an answer, and so is NA.
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file)
                if not rows.fieldnames:
                    raise DataError(f"{shown(path)}: expected the columns' names in the first row, got nothing.")
                for row in rows:
                    if None in row or None in row.values():
                        raise DataError(f"{shown(path)}: a row with another number of cells than the first: {row}")
                    yield row
        elif path.suffix == ".parquet":
            from datasets import load_dataset

            yield from load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            raise DataError(f"{shown(path)}: expected a .json, .jsonl, .csv or .parquet file.")
    except (ValueError, csv.Error, OSError) as error:  # json's, a wrong encoding, and what datasets and pyarrow raise.
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown(path)}: not readable as {path.suffix[1:]}: {error}") from error


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
                item, end = decoder.raw_decode(text, place)
                length = end - place
                # A number may go on in the next part.
                if text[end : end + 3].strip(".eE+-") or not read_more():
                    place += length
                    return item
            except json.JSONDecodeError as error:
                line = lines + error.lineno
                if len(text) - place > LONGEST_ITEM or not read_more():
                    raise ValueError(f"{error.msg}: line {line}") from error

    if next_character() != "[":
        got = type(json.loads(text + file.read())).__name__
        raise DataError(f"{shown(path)}: got one JSON {got}, expected an array of records.")
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


def find_splits(data_dir: Path) -> list[Path | None]:
    """Finds the files of the training and of the held-out records in a folder."""
    return [find_split(data_dir, split) for split in ("train", "test")]


def find_split(data_dir: Path, split: str) -> Path | None:
    """Finds data_<split> or <split> with any readable ending in a folder."""
    stems, endings = (f"data_{split}", split), (".json", ".jsonl", ".csv", ".parquet")
    paths = [data_dir / f"{stem}{ending}" for stem in stems for ending in endings]
    return next((path for path in paths if path.is_file()), None)


def to_messages(record: Any, taken: dict[str, list[str]] | None = None) -> list[Message]:
    """Turns a record of any known format into messages.

    Known are the original's and ShareGPT's `conversations`, OpenAI's `messages`, Alpaca's `instruction`, `input`,
    `output` (with `system` and `history`) and lists of `human`, `assistant` pairs; and fields with usual names of a
    question and its answer (`find_fields`), which may be lists of messages, as TRL's `prompt` and `completion` are.

    Args:
        record: From `read_records`.
        taken: Gets the fields that were found by their usual names, see `note_fields`.

    Returns:
        [{"role": ..., "content": stripped text}]: perhaps a system message, then user and assistant by turns.

    Raises:
        DataError: if the format is unknown, or several fields may be meant.
        UnusableRecord: if a turn is empty or no text, a role is unknown or the turns do not alternate.
    """
    system = record.get("system") if isinstance(record, dict) else None
    if isinstance(record, list) and all(
        isinstance(turn, dict) and {"human", "assistant"} <= {*turn} for turn in record
    ):
        turns = [(role, turn[role]) for turn in record for role in ("human", "assistant")]
    elif not isinstance(record, dict):
        raise DataError(f"got a {type(record).__name__}, expected {FORMATS}.")
    elif record.get("conversations") is not None:
        turns = _named_turns(record["conversations"], "from", "value")
    elif record.get("messages") is not None:
        turns = _named_turns(record["messages"], "role", "content")
    elif "instruction" in record and "output" in record:
        question = _joined(record["instruction"], record.get("input"))
        turns = [*_past_turns(record.get("history") or []), ("user", question), ("gpt", record["output"])]
    elif fields := find_fields(record):
        turns, system = _field_turns(record, fields), record[fields["system"]] if "system" in fields else None
        note_fields(record, fields, taken)
    else:
        raise DataError(
            f"got the fields {sorted(record)}, expected {FORMATS}. Others are to be named: "
            "--columns 'user=FIELD,assistant=FIELD'"
        )
    return _checked([("system", system), *turns] if system else turns)


def by_name(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """A record's fields by their names in lower case, without spaces around."""
    names: dict[str, list[str]] = {}
    for field in record:
        names.setdefault(field.strip().casefold(), []).append(field)
    return names


def find_fields(record: Mapping[str, Any]) -> dict[str, str]:
    """Finds the fields of a question and its answer by their usual names.

    Returns:
        "user" and "assistant" -> field, also "input" (beside `instruction`, as in Alpaca), "system" and "history" where
        they are there; nothing if there is no question or no answer.

    Raises:
        DataError: if several fields may be meant: there are two of the usual pairs; or none, but several that might
            make one, such as `prompt` with `answer` and `response`.
    """
    names = by_name(record)
    more = {"input": names.pop("input", []) if "instruction" in names else []}
    more["system"] = names.get("system", []) + names.get("system_prompt", [])
    # A patient's is a text.
    more["history"] = [field for field in names.get("history", []) if isinstance(record[field], list)]

    def pairs_of(known: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        return [pair for one, other in known for pair in product(names.get(one, []), names.get(other, []))]

    pairs = pairs_of(PAIRS) or pairs_of(product(QUESTIONS, ANSWERS))
    if not pairs:
        return {}
    if len(pairs) > 1:
        found, (user, assistant) = ", ".join(map("/".join, pairs)), pairs[0]
        raise DataError(
            f"got the fields {sorted(record)}, with several pairs of a question and an answer: {found}. Say which: "
            f"--columns 'user={user},assistant={assistant}'"
        )
    ((user, assistant),) = pairs
    return {"user": user, "assistant": assistant} | {role: found[0] for role, found in more.items() if found}


def note_fields(record: Mapping[str, Any], fields: Mapping[str, str], taken: dict[str, list[str]] | None) -> None:
    """Notes which fields of a record were taken for what, and at the first such record which others it has."""
    if taken is not None:
        what = listed_fields({role: field for role, field in fields.items() if role != "input"})
        what += f", {fields['user']} followed by {fields['input']}" if "input" in fields else ""
        unused = record.keys() - {*fields.values(), *KEPT_FIELDS}
        taken.setdefault(what, sorted(field for field in unused if record[field] not in (None, "")))


def listed_fields(fields: Mapping[str, str]) -> str:
    """Says which fields are whose, such as "user and assistant: question, answer"."""
    *first, last = fields
    return f"{', '.join(first)} and {last}: {', '.join(fields.values())}"


def fields_notes(taken: Mapping[str, list[str]]) -> list[str]:
    """What `note_fields` has noted, such as "fields taken as user and assistant: question, answer; not used: topic"."""
    return [f"fields taken as {what}{'; not used: ' * bool(more)}{', '.join(more)}" for what, more in taken.items()]


def _field_turns(record: Mapping[str, Any], fields: Mapping[str, str]) -> list[tuple[str, Any]]:
    turns = _past_turns(record[fields["history"]] if "history" in fields else [])
    for role in ("user", "assistant"):
        value = record[fields[role]]
        if role == "user" and "input" in fields:
            value = _joined(value, record[fields["input"]])
        turns += _named_turns(value, "role", "content") if isinstance(value, list) else [(role, value)]
    return turns


def _joined(*parts: Any) -> Any:
    """An instruction and its input as one text; what is no text stays what it is."""
    there = [part for part in parts if part]
    return "\n".join(there) if all(isinstance(part, str) for part in there) else there


def _named_turns(turns: Any, role: str, content: str) -> list[tuple[str, Any]]:
    try:
        if any(turn.get("tool_calls") and not turn.get(content) for turn in turns if isinstance(turn, dict)):
            raise UnusableRecord(f"a turn of 'tool_calls' ({NO_TOOLS})")
        return [(turn[role], turn[content]) for turn in turns]
    except (TypeError, KeyError) as error:
        raise DataError(f"a turn without {role!r} and {content!r}, expected {FORMATS}.") from error


def _past_turns(history: Any) -> list[tuple[str, Any]]:
    if not isinstance(history, list) or not all(isinstance(pair, list) for pair in history):
        raise DataError(f"a history that is not a list of [question, answer] pairs, expected {FORMATS}.")
    return [turn for pair in history for turn in zip(("user", "gpt"), pair, strict=False)]


def _checked(turns: list[tuple[str, Any]]) -> list[Message]:
    messages = []
    for role, _ in turns:
        if role not in [*ROLES]:  # A list, since what stands for the role may not be hashable.
            why = f" ({NO_TOOLS})" if role in [*TOOL_ROLES] else ""
            raise UnusableRecord(f"a turn of {role!r}{why}, known are {', '.join(ROLES)}")
    for role, content in turns:
        if content is not None and not isinstance(content, str):
            raise UnusableRecord(f"a {ROLES[role]} turn that is not a text")
        if not content or not content.strip():
            raise UnusableRecord(f"an empty {ROLES[role]} turn")
        # Half of a surrogate pair, which JSON can carry, is no character: tokenizers refuse it.
        whole = content.strip().encode("utf-8", "replace").decode()
        messages.append({"role": ROLES[role], "content": whole})
    roles = [message["role"] for message in messages]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        raise UnusableRecord("turns that are not user and assistant by turns")
    return messages
