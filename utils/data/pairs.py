"""Preference pairs in any known format become two samples with one prompt: the chosen answer, then the rejected one."""

import re
from collections.abc import Mapping
from typing import Any

from utils.data.chat import Dialogue
from utils.data.records import (
    QUESTIONS,
    TURNS,
    DataError,
    Message,
    Taken,
    UnusableRecord,
    as_text,
    find_fields,
    has_content,
    note_fields,
    past_turns,
    question_of,
    to_messages,
)

FORMATS = (
    "one of {prompt, chosen, rejected} (texts, or lists of {role, content}), {chosen, rejected} (whole dialogues), "
    "{messages or conversations, chosen, rejected}, {instruction, input, chosen, rejected} or {question, chosen, "
    "rejected}"
)
NAMED = "--columns 'user={},chosen={},rejected={}'"
SIDES = ("chosen", "rejected")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def to_pair(record: Any, taken: Taken | None = None) -> tuple[list[Message], str, str]:
    """Turns a record of any known format into a conversation and two answers.

    Known are `prompt`, `chosen`, `rejected` as texts (the prompt perhaps a dialogue of "\\n\\nHuman: " and
    "\\n\\nAssistant: ") or as lists of messages, whole dialogues as `chosen` and `rejected` (a prompt beside them says
    nothing more), LLaMA-Factory's `conversations`, `messages` or `instruction` with `chosen` and `rejected`, and other
    usual names of a prompt, such as `question`.

    Args:
        record: From `utils.data.records.read_records`.
        taken: Gets the fields that were taken, see `utils.data.records.note_fields`.

    Returns:
        Messages up to the user's last turn, the chosen answer and the rejected one.

    Raises:
        DataError: if the format is unknown, or several fields may be the prompt.
        UnusableRecord: if a text is empty, both answers are equal, or the two dialogues differ before their ends.
    """
    if not isinstance(record, Mapping):
        raise _unknown(record)
    # Of whole dialogues a prompt beside them says nothing more.
    alone = {field: value for field, value in record.items() if field.strip().casefold() not in (*QUESTIONS, *TURNS)}
    fields = find_fields(alone, SIDES)
    if not {*SIDES} <= fields.keys():
        raise _unknown(record)
    fields = {role: field for role, field in fields.items() if role in (*SIDES, "system")}
    ends = [_messages(record[fields[side]], "assistant") for side in SIDES if has_content(record[fields[side]])]
    if len(ends) < 2 or not all(ends):
        raise UnusableRecord("an empty answer")
    starts = [_past(record, fields)] * 2
    if not all(whole := [end[0]["role"] in ("system", "user", "human") for end in ends]):
        alone, fields = record, find_fields(record, SIDES)
        start = _prompt(record, fields)
        starts = [before if is_whole else start for before, is_whole in zip(starts, whole, strict=True)]
    turns = ([*start, *end] for start, end in zip(starts, ends, strict=True))
    chosen, rejected = (to_messages({"messages": messages}) for messages in turns)
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRecord("chosen and rejected answers to different prompts")
    if chosen[-1] == rejected[-1]:
        raise UnusableRecord("two equal answers")
    note_fields(alone, fields, taken)
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _past(record: Mapping[str, Any], fields: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in past_turns(record, fields)]


def _prompt(record: Mapping[str, Any], fields: Mapping[str, str]) -> list[dict[str, Any]]:
    """The conversation before an answer that is no whole dialogue."""
    if "user" in fields:
        return _past(record, fields) + _messages(question_of(record, fields), "user")
    if name := next((name for name in TURNS if name in fields), None):
        return _past(record, fields) + _turns(record[fields[name]], "user")
    raise _unknown(record)


def _unknown(record: Any) -> DataError:
    got = f"the fields {sorted(record)}" if isinstance(record, Mapping) else f"a {type(record).__name__}"
    return DataError(f"got {got}, expected {FORMATS}. Others are to be named: {NAMED.format(*['FIELD'] * 3)}")


def _messages(value: Any, role: str) -> list[dict[str, Any]]:
    """Reads a text of one role, a dialogue written out, a turn, or a list of turns."""
    value = as_text(value)
    if isinstance(value, str):
        parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + value.lstrip("\n"))
        if len(parts) == 1 or parts[0].strip():
            return [{"role": role, "content": value}]
        turns = [{"role": SPEAKERS[name], "content": text} for name, text in zip(parts[1::2], parts[2::2], strict=True)]
        # A prompt ends with "Assistant:", after which the answer comes.
        return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip() else turns
    return _turns(value, role) if isinstance(value, Mapping | list) else [{"role": role, "content": value}]


def _turns(value: Any, role: str) -> list[dict[str, Any]]:
    turns = [value] if isinstance(value, Mapping) else value
    try:
        return [
            {"role": turn["role"], "content": turn["content"]}
            if "role" in turn
            else {"role": turn["from"], "content": turn["value"]}
            for turn in (turns if has_content(turns) else [])
        ]
    except (TypeError, KeyError) as error:
        raise DataError(f"a {role} part that is no text and no list of turns, expected {FORMATS}.") from error


def pair(record: Any, id: str, taken: Taken | None = None) -> Dialogue:
    """Reads a preference pair, as a `Parse` of `load_samples`: its samples are the chosen answer and the rejected."""
    messages, chosen, rejected = to_pair(record, taken)
    return Dialogue(id, messages, [chosen, rejected])
