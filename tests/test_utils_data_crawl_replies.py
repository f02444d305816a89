"""utils/data/crawl_replies.py, and prepare_data.py with answers of Bilibili's API.

python -m pytest tests/test_utils_data_crawl_replies.py
"""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_prepare_data import (  # noqa: F401
    answer,
    comment,
    dropped,
    prepare,
    prompt,
    quick_plot,
    video,
    write_json,
    write_jsonl,
)

from utils.data.crawl_files import scan_json
from utils.data.crawl_replies import converted_replies, kind_of_answers, unread_lists
from utils.data.records import comment_prompt

Record = dict[str, Any]


def reply(number: int, to: int = 0, replies: list[Record] | None = None, **fields: Any) -> Record:
    """A reply object; its id is 10**11 + number."""
    parent = 10**11 + to if to else 0
    return {
        "rpid": 10**11 + number, "oid": 1000, "type": 1, "mid": 5, "root": parent, "parent": parent,
        "ctime": 1700000000, "like": number, "member": {"mid": "5", "uname": "某用户", "vip": {"label": {"text": ""}}},
        "content": {"message": f"接口{number}", "members": []}, "replies": replies,
    } | fields  # fmt: skip


def page(replies: list[Record] | None, **fields: Any) -> Record:
    """A whole answer."""
    data = {"page": {"num": 1, "count": 9}, "config": {"showtopic": 1}, "replies": replies, "top_replies": None}
    return {"code": 0, "message": "0", "ttl": 1, "data": data | {"upper": {"mid": 5, "top": None}} | fields}


VIEW = {
    "code": 0,
    "data": {"bvid": "BV17x411w7KC", "aid": 1000, "title": "标题0", "desc": "简介0", "owner": {"mid": 90001},
             "pages": [{"cid": 1, "part": "x"}], "stat": {"aid": 1000, "reply": 9}},
}  # fmt: skip
NESTED = [reply(1, replies=[reply(2, to=1), reply(3, to=2)]), reply(4, replies=[])]
FORMS = {
    "a whole answer": lambda d: write_json(d / "r.json", page(NESTED, top_replies=[reply(5)])),
    "answers in a list": lambda d: write_json(d / "r.json", [page(NESTED), page([reply(5)]), page(None)], indent=1),
    "answers in lines": lambda d: write_jsonl(d / "r.jsonl", [page(NESTED), page([reply(5), reply(2, to=1)])]),
    "by video": lambda d: write_json(d / "r.json", {"BV17x411w7KC": [*NESTED, reply(5)]}),
    "a list": lambda d: write_json(d / "r.json", [*NESTED, reply(5), reply(2, to=1)]),
    "lines": lambda d: write_jsonl(d / "r.jsonl", [*NESTED, reply(5, member=None, like=None)]),
    "the pinned one": lambda d: write_json(d / "r.json", page(NESTED, upper={"mid": 5, "top": reply(5)})),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(tmp_path: Path, form: str) -> None:
    """Nested replies too, however deep the wrapper."""
    path = FORMS[form](tmp_path)
    with path.open(encoding="utf-8") as file:
        first = next(scan_json(file))
        file.seek(0)
        found = list(converted_replies(scan_json(file), Counter()))
    assert kind_of_answers([first]) == "api" and {kind for kind, _ in found} == {"comments"}
    parents = {2: 1, 3: 2}
    assert {int(one["comment_id"]) - 10**11: one["parent_comment_id"] for _, one in found} == {
        number: str(10**11 + parents[number] if number in parents else 0) for number in range(1, 6)
    }
    assert all(one["content"] == f"接口{int(one['comment_id']) - 10**11}" for _, one in found)
    assert all(one["video_id"] == "1000" and one["user_id"] == "5" for _, one in found)


@pytest.mark.parametrize("about", ["view", "crawler", "title"])
def test_videos_come_from_anywhere(tmp_path: Path, about: str) -> None:
    """Nested replies are kept once, and beside a crawl that holds one of them too."""
    folder = tmp_path / "crawl"
    FORMS["a whole answer"](folder)
    write_jsonl(folder / "again.jsonl", [reply(2, to=1)])
    if about != "title":
        write_json(folder / "v.json", VIEW if about == "view" else [video(0)])
    write_json(folder / "c.json", [comment(1, comment_id="100000000004", content="接口4")])
    written, report = prepare(folder, *(["--title", "标题0", "--desc", "简介0"] if about == "title" else []))
    parents = {2: "接口1", 3: "接口2"}
    assert {int(id) - 10**11: prompt(record) for id, record in written.items()} == {
        number: comment_prompt("标题0", "简介0", parents.get(number, "")) for number in range(1, 6)
    }
    assert dropped(report) == {"duplicate": 2}
    assert "answers of Bilibili's API" in [line["note"] for line in report["files"]]


def test_what_stands_below_no_video_is_left_out(tmp_path: Path) -> None:
    write_json(tmp_path / "crawl/v.json", VIEW)
    others = [reply(6, type=11), reply(7, type=17, replies=[reply(8, type=17)])]
    write_json(tmp_path / "crawl/r.json", page([*NESTED, *others]))
    written, report = prepare(tmp_path / "crawl")
    assert {answer(record) for record in written.values()} == {f"接口{number}" for number in range(1, 5)}
    (line,) = [line for line in report["files"] if line["kind"] == "comments"]
    assert line["note"].endswith("3 below dynamics, articles and the like left out (type 11, 17)")
    assert not dropped(report)


def test_the_videos_author(tmp_path: Path) -> None:
    """mid of a reply and of the video's owner are one person, whatever the crawler calls it."""
    write_json(tmp_path / "crawl/v.json", VIEW)
    write_json(tmp_path / "crawl/r.json", page([reply(1, mid=90001), reply(2)]))
    written, report = prepare(tmp_path / "crawl", "--clean", "True", "--drop_uploader", "True", "--min_chars", "0")
    assert list(written) == ["100000000002"] and dropped(report) == {"uploader": 1}


@pytest.mark.parametrize("longest", [4000, 1 << 24])
def test_files_that_are_cut_off_or_too_long(longest: int) -> None:
    """Of an answer that is longer than what is parsed at once the replies are read one by one."""
    text = json.dumps(page([reply(number, replies=[]) for number in range(1, 101)]))
    for end in (None, -200):
        found = list(converted_replies(scan_json(io.StringIO(text[:end]), longest), Counter()))
        assert [one and one[0] for one in found] == ["comments"] * (99 + (end is None)) + [None] * (end is not None)


def test_errors_and_empty_pages_are_no_comments(tmp_path: Path) -> None:
    write_json(tmp_path / "crawl/a.json", [video(0)])
    write_json(tmp_path / "crawl/b.json", [comment(1)])
    write_jsonl(tmp_path / "crawl/r.jsonl", [{"code": -404, "message": "啥都木有", "ttl": 1}, page(None)])
    written, report = prepare(tmp_path / "crawl", "--title", "标题")
    assert set(written) == {"50001"}
    assert [(line["records"], line["note"]) for line in report["files"]][2:] == [(0, "answers of Bilibili's API")]


FACTS = {"aid": 1000, "bvid": "BV17x411w7KC", "title": "标题0"}


@pytest.mark.parametrize("in_a_page", [False, True])
def test_replies_inside_a_videos_facts(in_a_page: bool) -> None:
    """They say which video they are below if they do not know it; what it recommends is no video of ours."""
    replies = [reply(1, replies=[reply(2, to=1)]), {"rpid": 3, "content": {"message": "没有oid"}}]
    facts = FACTS | {"comments": page(replies) if in_a_page else replies, "related": [FACTS | {"aid": 1001}]}
    found = list(converted_replies([facts], Counter()))
    assert kind_of_answers([facts]) == "api" and [kind for kind, _ in found] == ["videos", *["comments"] * 3]
    assert {one["video_id"] for _, one in found} == {"1000"} and not unread_lists([facts])


def test_facts_beside_replies_and_texts() -> None:
    """A reply with its video's facts is both; a row of somebody's table with a text is neither."""
    found = list(converted_replies([FACTS | reply(1)], Counter()))
    assert [kind for kind, _ in found] == ["videos", "comments"] and found[0][1]["title"] == "标题0"
    for name in ("content", "评论内容", "Comment Text"):
        assert kind_of_answers([FACTS | {name: "一条评论"}]) is None
    assert kind_of_answers([FACTS | {"content": None, "desc": "简介"}]) == "api"


@pytest.mark.parametrize(
    "record, names",
    [
        ({"title": "显卡", "bvid": "BV17x411w7KC", "comments": [{"user": "某", "content": "真好"}]}, ["comments"]),
        ({"rpid": 1, "content": "真好", "replies": [{"rpid": 2, "content": "是的"}]}, ["replies"]),
        ({"data": FACTS | {"评论": [[], {"评论内容": "真好", "回复": [{"text": "是"}]}]}}, ["回复", "评论"]),
        (page(NESTED), []),
        (VIEW, []),
        (comment(1), []),
    ],
)
def test_lists_of_comments_that_are_not_read_are_named(record: Record, names: list[str]) -> None:
    assert unread_lists([record]) == names


def test_types_are_compared_as_texts() -> None:
    left_out = Counter[str]()
    types = ["1", 1, 1.0, "11", 11, 17]
    found = list(converted_replies([reply(number, type=type) for number, type in enumerate(types)], left_out))
    assert len(found) == 3 and left_out == {"11": 2, "17": 1}
