"""Held-out conversations: read from a file, those of one video together, some of them spread over the videos."""

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from utils.data.records import DataError, Message, UnusableRecord, fields_notes, id_of, read_records, to_messages
from utils.files import shown


class Comment(NamedTuple):
    """A held-out conversation.

    Attributes:
        id: The record's, or its place in the file.
        video_id: The video's, or what its conversations have in common.
        messages: All turns; the last one is the real answer.
    """

    id: str
    video_id: str
    messages: list[Message]


def read_comments(
    path: Path, count: int | None = None, columns: Mapping[str, str] | None = None
) -> list[list[Comment]]:
    """Reads held-out conversations.

    Args:
        path: As prepare_data.py writes them, or in any other format of records.
        count: How many to take, spread over the videos: the first comment of each, then the second ones, and so on.
        columns: Of --columns, see `utils.data.records.read_records`.

    Returns:
        Those of a video together, videos in the file's order; no two have the same id.

    Raises:
        SystemExit: if there are none.
    """
    videos: dict[str, list[Comment]] = {}
    unusable, ids, taken = Counter(), set(), {}
    try:
        for number, record in enumerate(read_records(path, columns)):
            try:
                messages = to_messages(record, taken)
            except UnusableRecord as reason:
                unusable[str(reason)] += 1
                continue
            id, video = id_of(record) or str(number), id_of(record, "video_id") or parts_of(messages)[0]
            id = f"{id} in record {number}" if id in ids else id
            ids.add(id)
            videos.setdefault(video, []).append(Comment(id, video, messages))
    except DataError as error:
        raise SystemExit(f"{shown(path)} cannot be used: {error}") from error
    for note in [] if columns else fields_notes(taken):
        print(f"({shown(path)}: {note})", file=sys.stderr)
    for reason, times in unusable.items():
        print(f"({times} records were left out: {reason})", file=sys.stderr)
    if not videos:
        held = "Hold out more: python prepare_data.py --test_size 0.3"
        raise SystemExit(f"{shown(path)} is empty, or holds nothing that can be used. {held}")
    return [*videos.values()] if count is None else spread([*videos.values()], count)


def spread(groups: list[list[Comment]], count: int) -> list[list[Comment]]:
    """Takes some comments, spread over the videos: the first one of each, then the second ones, and so on."""
    if count < len(groups):
        groups = [groups[number * len(groups) // count] for number in range(count)]
    turns = sorted((turn, video) for video, group in enumerate(groups) for turn in range(len(group)))
    taken = Counter(video for _, video in turns[:count])
    return [group[: taken[video]] for video, group in enumerate(groups)]


def read_held_out(
    path: Path, count: int | None = None, columns: Mapping[str, str] | None = None
) -> list[list[list[Message]]]:
    """The conversations of `read_comments` alone."""
    return [[comment.messages for comment in group] for group in read_comments(path, count, columns)]


def parts_of(messages: list[Message]) -> tuple[str, str]:
    """Takes a conversation's questions apart: what comments under one video have in common, and what is answered.

    Returns:
        All but the system prompt and the last answer; the line with the comment to answer, which may be missing.
    """
    text = "\n".join(message["content"] for message in messages[:-1] if message["role"] != "system")
    shared, separator, parent = text.rpartition("\n父评论：")
    return (shared, separator[1:] + parent) if separator else (parent, "")
