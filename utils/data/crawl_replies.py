"""Answers of Bilibili's API as people save them: pages of comments and the facts of a video, whole or in pieces."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from utils.data.crawl_columns import BELOW_VIDEO, NAMES, Kept, Record, is_danmaku, plain

TEXTS = {*" ".join(NAMES["content"]).split()}


def objects(value: Any) -> Iterator[tuple[str, Record]]:
    """Finds the API's objects in what was parsed, however deep: ("reply" | "view" | "danmaku", the object).

    A reply's own replies come behind it, and a video's behind the video. Which page or wrapper they lie in does not
    matter.
    """
    waiting = [(value, None)]  # with the video that they lie in
    while waiting:
        value, video = waiting.pop()
        if isinstance(value, list):
            waiting += [(one, video) for one in reversed(value)]
        elif isinstance(value, dict):
            is_reply = "rpid" in value and isinstance(value.get("content"), dict)
            # A video's facts have others in them, less complete: of a series, of what they recommend.
            if video is None and "aid" in value and "bvid" in value and isinstance(value.get("title"), str):
                if not has_text(value):  # otherwise a row of somebody's table
                    yield "view", value
                    video = value["aid"]
            if is_reply:
                yield "reply", value if video is None else {"oid": video, **value}
                waiting.append((value.get("replies"), video))
            elif video is None and "content" in value and is_danmaku(value):
                yield "danmaku", value
            else:
                waiting += [(one, video) for one in reversed(list(value.values()))]


def has_text(value: Any) -> bool:
    """Tells an object with a text that is called as comments are."""
    cells = value.items() if isinstance(value, dict) else ()
    return any(isinstance(text, str) and plain(name) in TEXTS for name, text in cells)


def unread_lists(sample: Iterable[Record]) -> list[str]:
    """Names the lists of comments that lie inside records, which are read only if they are the API's replies."""
    names, waiting = dict[str, None](), [*sample]
    while waiting:
        value = waiting.pop()
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, dict | list):
                waiting.append(inner)
            if isinstance(name, str) and isinstance(inner, list) and any(map(has_text, inner)):
                names[name] = None
    return sorted(names)


def kind_of_answers(sample: Iterable[Record]) -> str | None:
    """Tells a file of the API's answers by its first records: "api", "danmaku", or None."""
    records = list(sample)
    kinds = {kind for record in records for kind, _ in objects(record)}
    if kinds & {"reply", "view"}:
        return "api"
    if kinds:
        return "danmaku"
    # Errors, and pages without replies.
    return "api" if any({"code", "message", "ttl"} <= record.keys() for record in records) else None


def converted_replies(records: Iterable[Record | None], left_out: Counter[str]) -> Iterator[Kept | None]:
    """Turns the API's answers into our records.

    Args:
        records: As scan_json yields them: None for a piece that cannot be parsed.
        left_out: Counts the replies that stand below no video, by type.

    Yields:
        Comments and videos; None for a torn piece. A wrapper that is too long to be parsed at once is none: the replies
        in it follow one by one.
    """
    torn = False
    for record in records:
        if record is None:
            if torn:
                yield None
            torn = True
            continue
        for kind, found in objects(record):
            torn = False
            if kind == "view":
                yield "videos", view(found)
            elif kind == "reply" and (below := str(found.get("type", BELOW_VIDEO)).removesuffix(".0")) != BELOW_VIDEO:
                left_out[below] += 1
            elif kind == "reply":
                yield "comments", reply(found)
    if torn:
        yield None


def view(found: Record) -> Record:
    """A video's record."""
    owner = found.get("owner")
    return {
        "video_id": str(found["aid"]),
        "title": found["title"],
        "desc": found.get("desc") or found.get("description") or "",
        "user_id": str(owner.get("mid", "")) if isinstance(owner, dict) else str(found.get("mid", "")),
    }


def reply(found: Record) -> Record:
    """A comment's record."""
    member = found.get("member")
    return {
        "comment_id": str(found["rpid"]),
        "parent_comment_id": str(found.get("parent") or 0),
        "video_id": str(found.get("oid") or ""),
        "content": found["content"].get("message"),
        "create_time": str(found.get("ctime") or ""),
        "like_count": str(found.get("like") or 0),
        "user_id": str(found.get("mid") or (member.get("mid", "") if isinstance(member, dict) else "")),
    }
