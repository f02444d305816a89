"""A teacher's collected answers: where they lie, and how they take the place of the real ones."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from utils.cli import fail
from utils.data.records import DataError, Message, UnusableRecord, id_of, read_records, to_messages
from utils.files import create_once, read_lines, sha256, shown

# What every line of a teacher's collected answers has.
ANSWER_FIELDS = {"id": str, "key": str, "conversations": list}


def answers_path(folder: Path, split: str, teacher: str) -> Path:
    """Where a teacher's collected answers to a split's comments lie."""
    name = re.sub(r"[^\w.-]", "_", teacher)
    return folder / f"data_{split}_teacher_{name}.jsonl"


def join_answers(data: Path, answers: Path, cache: Path, columns: Mapping[str, str] | None = None) -> Path:
    """Writes a split's comments with a teacher's newest answers in the place of the real ones.

    Answers to comments that are not in the split (any more), or whose prompt has changed, are left out. The comments'
    own system prompt stays; the teacher had another one.

    Args:
        data: The split.
        answers: From `answers_path`.
        cache: Folder of what was joined before.
        columns: Of --columns, for the split.

    Raises:
        SystemExit: if nothing is left.
    """
    made_from = sha256(data) + sha256(answers) + (json.dumps(columns, sort_keys=True) if columns else "")
    path = cache / f"learnt-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.jsonl"
    with create_once(path) as temporary:
        if temporary:
            newest = {row["id"]: row for row in read_lines(answers, ANSWER_FIELDS)}
            lines, settings = [], Counter()
            for record in read_records(data, columns):
                row = newest.get(id_of(record))
                if row is None:
                    continue
                try:
                    *prompt, answer = to_messages(row)
                except DataError as error:
                    print(f"{shown(answers)}: the answer to {row['id']} is left out: {error}")
                    continue
                try:
                    *asked, real = to_messages(record)
                except UnusableRecord:  # As it was when the teacher was asked.
                    continue
                if without_system(prompt) == without_system(asked):
                    turns = [{"from": turn["role"], "value": turn["content"]} for turn in (*asked, answer)]
                    kept = {"id": row["id"], "video_id": row["video_id"], "conversations": turns}
                    lines.append(json.dumps(kept | {"real": real["content"]}, ensure_ascii=False) + "\n")
                    settings[row.get("setting")] += 1
            if len(settings) > 1:
                counts = ", ".join(f"{times:,}" for times in settings.values())
                print(
                    f"{shown(answers)}: the newest answers are to {len(settings)} different instructions, models or "
                    f"options ({counts}). If that is not meant, run again: python deepspeed_distill/prepare_data.py"
                )
            if not lines:
                again = "Run again: python deepspeed_distill/prepare_data.py"
                fail(f"{shown(answers)} has no answer to a comment of {shown(data)}. {again}")
            temporary.write_text("".join(lines), encoding="utf-8")
    return path


def without_system(turns: list[Message]) -> list[Message]:
    """Turns without the system prompt."""
    return [turn for turn in turns if turn["role"] != "system"]
