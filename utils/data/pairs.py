"""Preference pairs in any known format become two samples with one prompt: the chosen answer, then the rejected one."""

import re
from collections.abc import Mapping
from typing import Any

from utils.data.chat import Dialogue
from utils.data.records import QUESTIONS, DataError, Message, UnusableRecord, by_name, note_fields, to_messages

FORMATS = (
    "one of {prompt, chosen, rejected} (texts, or lists of {role, content}), {chosen, rejected} (whole dialogues), "
    "{messages or conversations, chosen, rejected}, {instruction, input, chosen, rejected} or {question, chosen, "
    "rejected}"
)
NAMED = "--columns 'user={},chosen={},rejected={}'"
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def to_pair(record: Any, taken: dict[str, list[str]] | None = None) -> tuple[list[Message], str, str]:
    """Turns a record of any known format into a conversation and two answers.

    Known are `prompt`, `chosen`, `rejected` as texts (the prompt perhaps a dialogue of "\\n\\nHuman: " and
    "\\n\\nAssistant: ") or as lists of messages, whole dialogues as `chosen` and `rejected` (a prompt beside them says
    nothing more), LLaMA-Factory's `conversations`, `messages` or `instruction` with `chosen` and `rejected`, and other
    usual names of a prompt, such as `question`.

    Args:
        record: From `utils.data.records.read_records`.
        taken: Gets the fields that were found by their usual names, see `utils.data.records.note_fields`.

    Returns:
        Messages up to the user's last turn, the chosen answer and the rejected one.

    Raises:
        DataError: if the format is unknown, or several fields may be the prompt.
        UnusableRecord: if a text is empty, both answers are equal, or the two dialogues differ before their ends.
    """
    if isinstance(record, Mapping) and not {"chosen", "rejected"} <= record.keys():
        folded = ((field.strip().casefold(), field, value) for field, value in record.items())
        record = {name if name in ("chosen", "rejected") else field: value for name, field, value in folded}
    if not isinstance(record, Mapping) or not {"chosen", "rejected"} <= record.keys():
        raise _unknown(record)
    if record["chosen"] is None or record["rejected"] is None:
        raise UnusableRecord("an empty answer")
    chosen, rejected = (_dialogue(record, record[side], taken) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise UnusableRecord("chosen and rejected answers to different prompts")
    if chosen[-1] == rejected[-1]:
        raise UnusableRecord("two equal answers")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _dialogue(record: Mapping[str, Any], answer: Any, taken: dict[str, list[str]] | None) -> list[Message]:
    """The conversation that ends with one of a record's answers."""
    end = _messages(answer, "assistant")
    if not end:
        raise UnusableRecord("an empty answer")
    start: list[dict[str, Any]] = []
    system = record.get("system")
    if end[0]["role"] not in ("system", "user", "human"):
        if record.get("instruction") is not None:
            # An answer in LLaMA-Factory's format is a text; in a list the last is meant.
            return to_messages({**record, "output": end[-1]["content"]})
        names = [name for name in ("conversations", "messages", "prompt") if record.get(name) is not None]
        if not names:
            fields = _find_question(record)
            names, system = [fields["user"]], record[fields["system"]] if "system" in fields else None
            note_fields(record, fields, taken)
        start = _messages(record[names[0]], "user")
    return to_messages({"messages": [*start, *end], "system": system})


def _find_question(record: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a pair whose prompt has another usual name: "user", "chosen", "rejected", perhaps "system"."""
    names = by_name(record)
    usual = [field for name in QUESTIONS for field in names.get(name, []) if record[field] is not None]
    if not (questions := usual or names.get("user", [])):
        raise _unknown(record)
    if len(questions) > 1:
        named = NAMED.format(questions[0], "chosen", "rejected")
        raise DataError(
            f"got the fields {sorted(record)}, of which {' or '.join(questions)} may be the prompt. Say which: {named}"
        )
    fields = {"user": questions[0], "chosen": "chosen", "rejected": "rejected"}
    system = names.get("system", []) + names.get("system_prompt", [])
    return fields | {"system": system[0]} if system else fields


def _unknown(record: Any) -> DataError:
    got = f"the fields {sorted(record)}" if isinstance(record, Mapping) else f"a {type(record).__name__}"
    return DataError(f"got {got}, expected {FORMATS}. Others are to be named: {NAMED.format(*['FIELD'] * 3)}")


def _messages(value: Any, role: str) -> list[dict[str, Any]]:
    """Reads a text of one role, a dialogue written out, a turn, or a list of turns."""
    if isinstance(value, str):
        parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + value.lstrip("\n"))
        if len(parts) == 1 or parts[0].strip():
            return [{"role": role, "content": value}]
        turns = [{"role": SPEAKERS[name], "content": text} for name, text in zip(parts[1::2], parts[2::2], strict=True)]
        # A prompt ends with "Assistant:", after which the answer comes.
        return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip() else turns
    turns = [value] if isinstance(value, Mapping) else value
    try:
        return [
            {"role": turn["role"], "content": turn["content"]}
            if "role" in turn
            else {"role": turn["from"], "content": turn["value"]}
            for turn in turns
        ]
    except (TypeError, KeyError) as error:
        raise DataError(f"a {role} part that is no text and no list of turns, expected {FORMATS}.") from error


def pair(record: Any, id: str, taken: dict[str, list[str]] | None = None) -> Dialogue:
    """Reads a preference pair, as a `Parse` of `load_samples`: its samples are the chosen answer and the rejected."""
    messages, chosen, rejected = to_pair(record, taken)
    return Dialogue(id, messages, [chosen, rejected])
