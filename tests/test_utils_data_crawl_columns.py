"""utils/data/crawl_columns.py, and prepare_data.py with tables that are not the crawler's.

python -m pytest tests/test_utils_data_crawl_columns.py
"""

import json
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
    write_csv,
    write_json,
    write_jsonl,
    write_sqlite,
    write_xlsx,
)

from utils.data import crawl_columns
from utils.data.records import comment_prompt

Record = dict[str, Any]
ROWS: list[Record] = [
    {"视频标题": "显卡评测", " 评论内容 ": "画面很好看", "点赞数": 3, "父评论": "", "时间": "2025-01-02"},
    {"视频标题": "显卡评测", " 评论内容 ": "同意", "点赞数": "1.2万", "父评论": "说得对", "时间": "昨天"},
    {"视频标题": "主板介绍", " 评论内容 ": "不错,真的", "点赞数": "", "父评论": "无", "时间": ""},
]
EXPECTED = {
    "画面很好看": comment_prompt("显卡评测", ""),
    "同意": comment_prompt("显卡评测", "", "说得对"),
    "不错,真的": comment_prompt("主板介绍", ""),
}
WRITERS = {
    "csv gbk": lambda d: write_csv(d / "x.csv", ROWS, encoding="gb18030"),
    "jsonl": lambda d: write_jsonl(d / "x.jsonl", ROWS),
    "xlsx": lambda d: write_xlsx(d / "x.xlsx", {"评论表": ROWS, "说明": [{"甲": 1}]}),
    "sqlite": lambda d: write_sqlite(d / "x.db", {"t": ROWS, "说明": [{"甲": 1}]}),
}


def said(written: dict[str, Record]) -> dict[str, str]:
    """What is answered to what."""
    return {answer(record): prompt(record) for record in written.values()}


def notes(report: Record) -> dict[str, str]:
    """What is said of each file, of several lines the first one."""
    return {Path(line["file"]).name: line["note"] for line in reversed(report["files"])}


@pytest.mark.parametrize("container", WRITERS)
def test_every_container(tmp_path: Path, container: str) -> None:
    """Guessed columns, videos by their titles, comments without ids, beside a crawl that is read as ever."""
    WRITERS[container](tmp_path / "crawl")
    write_json(tmp_path / "crawl/a_contents.json", [video(0)])
    write_json(tmp_path / "crawl/a_comments.json", [comment(1)])
    written, report = prepare(tmp_path / "crawl")
    assert said(written) == EXPECTED | {"评论1": comment_prompt("标题0", "简介0")}
    assert report["read"] == 4 and not dropped(report) and report["ids_made"] == 3
    # What stands beside comments in a workbook is somebody's own; in a database it may be anything.
    note, *others = [line["note"] for line in report["files"] if line["note"]]
    assert len(others) == (container == "xlsx") and len(report["files"]) == 4 + len(others)
    assert note.startswith("columns guessed: content=评论内容, title=视频标题, parent=父评论, like_count=点赞数")


def test_likes_and_ids_from_run_to_run(tmp_path: Path) -> None:
    write_csv(tmp_path / "crawl/x.csv", ROWS)
    options = ["--total", "1", "--prefer_liked", "True"]
    first, again = (prepare(tmp_path / "crawl", *options)[0] for _ in range(2))
    assert list(said(first)) == ["同意"] and again == first  # 12,000 likes


def test_the_split_stays(tmp_path: Path) -> None:
    """More videos, another order, another file: a title's comments stay where they are."""
    rows = [{"标题": f"标题 {i}", "评论": f"评论{i}"} for i in range(200)]
    write_csv(tmp_path / "few/x.csv", rows[:80])
    write_jsonl(tmp_path / "many/y.jsonl", rows[::-1])
    few, many = (prepare(tmp_path / name, "--test_size", "0.3")[0] for name in ("few", "many"))
    assert all(many[id]["split"] == record["split"] for id, record in few.items())
    assert {record["split"] for record in few.values()} == {"train", "test"} and len(many) == 200


def test_ids_meet_those_of_other_files(tmp_path: Path) -> None:
    """BV numbers, addresses, numbers; comments' ids and parents; short ids count within their file."""
    folder = tmp_path / "crawl"
    write_json(folder / "contents.json", [video(0, video_id="170001"), video(1, video_id="455017605", title="另一个")])
    write_json(folder / "comments.json", [comment(1, video_id="170001", comment_id="123456789012")])
    new = [{"BV号": "BV17x411w7KC", "内容": "答它", "评论ID": "123456789013", "父评论ID": "123456789012"}]
    write_csv(folder / "a.csv", new)
    for name, link in {"b": "https://www.bilibili.com/video/BV1Q541167Qg?p=1", "c": "av455017605"}.items():
        rows = [{"id": 1, "parent_id": 0, "text": f"第一{name}"}, {"id": 2, "parent_id": 1, "text": f"第二{name}"}]
        write_json(folder / f"{name}.json", [row | {"url": link} for row in rows])
    write_csv(folder / "d.csv", [{"视频ID": "2.28E+11", "内容": "丢了"}, {"视频ID": "abc", "内容": "不认识"}])
    written, report = prepare(folder)
    assert said(written) == {
        "评论1": comment_prompt("标题0", "简介0"),
        "答它": comment_prompt("标题0", "简介0", "评论1"),
        **{f"第一{name}": comment_prompt("另一个", "简介1") for name in "bc"},
        **{f"第二{name}": comment_prompt("另一个", "简介1", f"第一{name}") for name in "bc"},
    }
    assert written["123456789013"]["video_id"] == "170001"
    assert dropped(report) == {"video_id_lost": 1, "video_missing": 1}


@pytest.mark.parametrize(("bv", "av"), [
    ("BV17x411w7KC", 170001), ("BV1Q541167Qg", 455017605), ("bv17x411w7KC", 170001), ("BV1L9Uoa9EUx", 111298867365120),
])  # fmt: skip
def test_bv_numbers(bv: str, av: int) -> None:
    assert crawl_columns.video_id(bv) == str(av)


def encoded(av: int) -> str:
    """The other way, as its authors write it."""
    characters, number = list("BV1000000000"), (1 << 51 | av) ^ crawl_columns.BV_XOR
    for place in range(11, 2, -1):
        number, left = divmod(number, 58)
        characters[place] = crawl_columns.BV_TABLE[left]
    characters[3], characters[9] = characters[9], characters[3]
    characters[4], characters[7] = characters[7], characters[4]
    return "".join(characters)


def test_bv_numbers_there_and_back() -> None:
    assert encoded(170001) == "BV17x411w7KC"
    for av in (1, 2, 2**31, 113850422659234, 2**51 - 1):
        assert crawl_columns.video_id(encoded(av)) == str(av)


def test_other_ids_meet_no_real_one() -> None:
    ids = [crawl_columns.video_id(text) for text in ("abc", "视频一", "BV1", "BV10000000000", "https://b23.tv/x1")]
    assert len({*ids}) == 5 and all(len(id) == 18 and int(id) > 2**51 for id in ids)
    assert crawl_columns.video_id("228539000000.0") == crawl_columns.video_id("2.2E+11") == ""


def test_named_columns(tmp_path: Path) -> None:
    """What is named wins over what would be guessed; a comma in a name; tables without these are read as ever."""
    folder = tmp_path / "crawl"
    write_csv(folder / "a.csv", [{"内容": "不是它", "说的,话": "是它", "哪个视频 ": "题目", "标题": "不是"}])
    write_csv(folder / "b.csv", [{"评论": "猜的", "标题": "别的题目"}])
    write_json(folder / "c.json", [video(0)])
    write_json(folder / "d.json", [comment(1)])
    written, report = prepare(folder, "--columns", r"content=说的\,话,title=哪个视频,desc=")
    assert said(written) == {
        "是它": comment_prompt("题目", ""),
        "猜的": comment_prompt("别的题目", ""),
        "评论1": comment_prompt("标题0", "简介0"),
    }
    assert notes(report)["a.csv"] == r"columns: content=说的\,话, title=哪个视频"
    assert notes(report)["b.csv"].startswith("columns guessed: content=评论, title=标题 (")
    assert notes(report)["c.json"] == notes(report)["d.json"] == ""


def test_comments_and_videos_in_tables_of_their_own(tmp_path: Path) -> None:
    write_csv(tmp_path / "crawl/a.csv", [{"BV号": "BV17x411w7KC", "评论": "一条"}])
    write_csv(tmp_path / "crawl/b.csv", [{"BV号": "BV17x411w7KC", "标题": "题目", "简介": "说明", "评论": 12}])
    written, report = prepare(tmp_path / "crawl")
    assert said(written) == {"一条": comment_prompt("题目", "说明")}
    assert [line["kind"] for line in report["files"]] == ["comments", "videos"]


def test_a_crawl_with_titles_beside_its_comments(tmp_path: Path) -> None:
    write_csv(tmp_path / "crawl/joined.csv", [comment(1, comment_id="9050001") | {"title": "题目", "desc": "说明"}])
    written, _ = prepare(tmp_path / "crawl")
    assert prompt(written["9050001"]) == comment_prompt("题目", "说明")


@pytest.mark.parametrize(("row", "message"), [
    ({"标题": "一", "内容": "甲", "评论": "乙"}, "content may be 内容 or 评论; say which: --columns 'content=内容'"),
    ({"标题": "一", "title": "二", "内容": "甲"}, "title may be 标题 or title; say which: --columns 'title="),
    ({"甲": "一", "乙": "二"}, "got 甲, 乙; if these are comments, say which is which: --columns 'content=COLUMN"),
    ({"评论内容": "好", "时间": "1"}, "no column says of which video (columns: 评论内容, 时间); give --title"),
    ({"标题": "一", "评论": "12"}, "got 标题, 评论; if these are comments"),  # How many there are.
    ({"note_id": "1", "content": "别处的", "title": "一"}, "got note_id, content, title; if these are comments"),
    ({"title": "数学", "text": "一门学科"}, "text may be any text: no other column tells comments (columns: title, "
     "text); if it is: --columns 'content=text,title=title'"),
    ({"title": "诗", "author": "李白", "content": "床前"}, "content may be any text"),
    ({"role": "user", "content": "请问", "title": "一"}, "got role, content, title; if these"),
    ({"标题": "一", "内容": "好物", "昵称": "甲", "链接": "https://xhs.example/1"}, "链接 leads to xhs.example, not"),
    ({"标题": "一", "评论内容": "666"}, "评论内容 holds nothing but numbers; if these are comments: --columns"),
    ({"标题": "一", "评论": "1.2万", "回复": "3条回复"}, "got 标题, 评论, 回复; if these are comments"),
    ({"标题": "一", "回复": "李四狗"}, "got 标题, 回复; if these are comments"),
    ({"标题": "一", "评论": "好", "parent": "李四狗"}, "parent may be what is answered, or who; if it is the text"),
    ({"标题": "一", "评论": "好", "父评论": "李四狗", "昵称": "李四狗"}, "父评论 may be what is answered, or who"),
    ({"标题": "一", "message": {"text": "好"}, "uname": "甲"}, "(message: no texts, but lists or objects); if"),
    ({"": "一", "评论详情": "好", "标题": "一"}, "got , 评论详情, 标题; if these are comments"),
    ({"标题": "一", "弹幕": "前方高能"}, "danmaku"),
])  # fmt: skip
def test_what_is_not_guessed(row: Record, message: str) -> None:
    found = crawl_columns.recognised([row], list(row), {}, False)
    assert isinstance(found, str) and message in found


@pytest.mark.parametrize(("row", "expected"), [
    ({"标题": "一", "内容": "好", "点赞": 3}, {"content": "内容", "title": "标题", "like_count": "点赞"}),
    ({"title": "一", "text": "好", "link": "https://www.bilibili.com/video/av7"},
     {"content": "text", "title": "title", "video_url": "link"}),
    ({"标题": "一", "评论": "好", "链接": "https://space.bilibili.com/7"}, {"content": "评论", "title": "标题"}),
    ({"标题": "一", "BV号": "BV17x411w7KC", "弹幕": "1.2万", "评论": "1,234"}, {"bvid": "BV号", "title": "标题"}),
    ({"标题": "一", "评论": "好", "progress": 1, "color": 2}, {"content": "评论", "title": "标题"}),
    ({"标题": "一", "评论内容": "好", "评论": "3条", "replies": [1]}, {"content": "评论内容", "title": "标题"}),
    ({"标题": "一", "评论": "好", "父评论": "无"}, {"content": "评论", "title": "标题", "parent": "父评论"}),
    ({"标题": "一", "评论": "好", "parent": 0}, {"content": "评论", "title": "标题", "parent_comment_id": "parent"}),
    ({"message": "好", "oid": 170001, "type": 1, "rpid": 12345678},
     {"content": "message", "video_id": "oid", "type": "type", "comment_id": "rpid"}),
])  # fmt: skip
def test_what_is_guessed(row: Record, expected: dict[str, str]) -> None:
    assert crawl_columns.recognised([row], list(row), {}, False) == expected


@pytest.mark.parametrize(("columns", "expected"), [
    ("text time color mode", True), ("content title 出现时间 发送者hash", True), ("content progress midHash", True),
    ("评论内容 progress color", False), ("comment mode", False),
])  # fmt: skip
def test_danmaku_by_its_columns(columns: str, expected: bool) -> None:
    assert crawl_columns.is_danmaku(columns.split()) == expected


def test_what_is_named_needs_no_signs() -> None:
    """But has to be texts; a few words again and again are only taken if they are named."""
    named = {"content": "text", "parent": "parent"}
    row = {"title": "一", "text": "666", "parent": "答", "url": "https://example.com", "role": "x"}
    expected = {"content": "text", "parent": "parent", "title": "title"}
    assert crawl_columns.recognised([row], list(row), named, False) == expected
    message = "--columns: text holds lists or objects, expected texts"
    assert crawl_columns.recognised([row | {"text": ["好"]}], list(row), named, False) == message
    rows = [{"标题": "一", "评论": "有"}, {"标题": "一", "评论": "没有"}] * 5
    assert "got 标题, 评论" in crawl_columns.recognised(rows, list(rows[0]), {}, False)
    assert crawl_columns.recognised(rows, list(rows[0]), {"content": "评论"}, False)["content"] == "评论"


def test_numbers_of_videos_and_parents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody's own mean another video in another file: the title beside them counts, and of two tables' none.

    An id of a parent is none to be read, in a column of ids with other words and in one of texts.
    """
    folder = tmp_path / "crawl"
    for name, number in {"a": 1, "b": 1, "c": "v1", "d": "v1"}.items():
        write_csv(folder / f"{name}.csv", [{"视频编号": number, "标题": f"题{name}", "评论": f"评{name}"}])
    write_csv(folder / "e.csv", [{"视频编号": 7, "评论": "评七"}, {"视频编号": 8, "评论": "评八"}])
    write_csv(folder / "f.csv", [{"视频编号": 7, "标题": "题七"}, {"视频编号": 8, "标题": "题八"}])
    write_csv(folder / "g.csv", [{"视频编号": 8, "标题": "别的"}])
    ids = [{"评论ID": 2000000000 + i, "父评论": "无" if not i else 2000000000, "评论": f"评{i}"} for i in range(3)]
    write_csv(folder / "h.csv", [row | {"标题": "题"} for row in ids])
    texts = [{"标题": "题", "父评论": text, "评论": f"甲{i}"} for i, text in enumerate(("", "说得对", "2000000000"))]
    write_csv(folder / "i.csv", texts)
    written, report = prepare(folder)
    parents = {"评0": "", "评1": "评0", "评2": "评0", "甲0": "", "甲1": "说得对", "甲2": "评0"}
    expected = {text: comment_prompt("题", "", parent) for text, parent in parents.items()}
    assert said(written) == expected | {f"评{name}": comment_prompt(f"题{name}", "") for name in "abcd七"}
    assert dropped(report) == {"video_missing": 1}
    assert "1 video number with different titles in different tables, such as 8: the" in capsys.readouterr().out


def test_one_video_is_one(tmp_path: Path) -> None:
    """By its title here and its number there, by a BV number beside a rounded one, by addresses with changing ends."""
    folder = tmp_path / "crawl"
    numbers = [{"标题": f"题{i}", "aid": 170001 + i, "评论": f"有号{i}"} for i in range(30)]
    write_csv(folder / "a.csv", [{"标题": f"题{i}", "评论": f"无号{i}"} for i in range(30)])
    write_csv(folder / "b.csv", numbers)
    write_csv(folder / "c.csv", [{"标题": "题0", "aid": "1.7E+05", "bvid": "BV17x411w7KC", "评论": "圆了"}])
    episode = "https://www.bilibili.com/bangumi/play/ep123?from="
    write_csv(folder / "d.csv", [{"标题": "番", "视频链接": f"{episode}{i}", "评论": f"番{i}"} for i in range(30)])
    write_csv(folder / "e.csv", [{"标题": "两个", "aid": 300000 + i, "评论": f"两个{i}"} for i in range(2)])
    write_csv(folder / "f.csv", [{"标题": "两个", "评论": "哪个"}])
    written, report = prepare(folder, "--test_size", "0.5")
    sides = {(prompt(record), record["video_id"]): set() for record in written.values()}
    for record in written.values():
        sides[prompt(record), record["video_id"]].add(record["split"])
    assert len(written) == 94 and not dropped(report) and all(len(side) == 1 for side in sides.values())
    assert len(sides) == 34 and {("视频标题：题0", "170001"), ("视频标题：题29", "170030")} <= sides.keys()


def test_what_is_left_is_said(tmp_path: Path) -> None:
    """Files whose names say that they are something else, torn ones, empty ones, sheets beside good ones, lists."""
    folder, row = tmp_path / "crawl", {"评论内容": "好", "视频标题": "题"}
    write_csv(folder / "ks/a.csv", [row])
    write_csv(folder / "top_creators_b.csv", [row])
    write_json(folder / "x_creators.json", [{"user_id": "1", "nickname": "甲"}])
    replies = [{"rpid": 3000000000, "oid": 170001, "type": 1, "parent": 0, "content": {"message": "答"}}]
    write_json(folder / "my_dy_bili.json", [{"code": 0, "data": {"replies": replies}}])
    book = {
        "视频": [{"BV号": "BV17x411w7KC", "标题": "题"}],
        "评论": [{"BV号": "BV17x411w7KC", "评论": "一", "内容": "二"}],
        "短": [{"评论内容": "短一", "标题": "题", "BV号": "BV17x411w7KC"}, {"评论内容": "短二", "标题": "题"}],
    }
    write_xlsx(folder / "c.xlsx", book)
    (folder / "torn.csv").write_text("评论内容,标题\n好,题,\n", encoding="utf-8")
    (folder / "head.csv").write_text("评论内容,标题\n", encoding="utf-8")
    (folder / "twice.csv").write_text("标题,评论内容,标题\n甲,好,乙\n", encoding="utf-8")
    likes = [{"评论": text, "标题": "题", "点赞": like} for text, like in {"甲": "..万", "乙": "1.2万"}.items()]
    write_json(folder / "likes.json", [one | {"replies": [{"content": "里面的"}]} for one in likes])
    flat = {"rpid": 2000000000, "oid": 170001, "type": 1, "message": "平"}
    write_csv(folder / "flat.csv", [flat, flat | {"rpid": 2000000001, "type": 11, "message": "动态"}])
    written, report = prepare(folder)
    assert said(written) == dict.fromkeys(["答", "短一", "短二", "甲", "乙", "平"], comment_prompt("题", ""))
    note = notes(report)
    expected = {
        "a.csv": "skipped: 'ks' in its path names another platform; if these are Bilibili's, rename it",
        "top_creators_b.csv": "skipped: 'creators' in its name says that it is about people; if these are comments, r",
        "my_dy_bili.json": "answers of Bilibili's API",
        "c.xlsx [评论]": "skipped: content may be 评论 or 内容",
        "c.xlsx [短]": "columns guessed",
        "torn.csv": "skipped: all rows are torn: none has as many cells as there are columns (标题, 评论内容)",
        "head.csv": "skipped: no rows below the columns 标题, 评论内容",
        "twice.csv": "skipped: two columns are called 标题",
    }
    assert {name: note[name][: len(text)] for name, text in expected.items()} == expected
    assert note["likes.json"].endswith("not read: the lists replies") and "x_creators.json" not in note
    assert note["flat.csv"].endswith("1 below dynamics, articles and the like left out (type 11)")


def test_the_crawlers_own_tables_are_read_as_they_are(tmp_path: Path) -> None:
    """Whatever --columns says, with rows that are shifted too."""
    write_json(tmp_path / "crawl/a.json", [video(0)])
    write_csv(tmp_path / "crawl/b.csv", [comment(1), comment(2, create_time="昨天说的")])
    write_csv(tmp_path / "crawl/c.csv", [{"nickname": "甲", "评论": "一条", "标题": "题"}])
    written, report = prepare(tmp_path / "crawl", "--columns", "user_id=nickname")
    assert set(said(written)) == {"评论1", "一条"} and dropped(report) == {"torn": 1} and notes(report)["b.csv"] == ""
    (tmp_path / "crawl/c.csv").unlink()
    with pytest.raises(SystemExit, match="no table has a column 'nickname' but MediaCrawler's own, which are read as"):
        prepare(tmp_path / "crawl", "--columns", "user_id=nickname")


def test_what_is_not_guessed_is_said(tmp_path: Path) -> None:
    """The table is skipped with its columns and with what to give; the others are read."""
    write_json(tmp_path / "crawl/a.json", [video(0)])
    write_json(tmp_path / "crawl/b.json", [comment(1)])
    write_xlsx(tmp_path / "crawl/x.xlsx", {"x": [{"甲": 1, "乙": 2}], "空": [{"甲": None}]})
    write_csv(tmp_path / "crawl/y.csv", [{"标题": "一", "内容": "甲", "评论": "乙"}])
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {"50001"}
    assert notes(report)["x.xlsx"].startswith("skipped: expected the columns of comments or of videos, got 甲, 乙;")
    assert notes(report)["y.csv"].startswith("skipped: content may be 内容 or 评论") and len(report["files"]) == 4


@pytest.mark.parametrize(("text", "message"), [
    ("内容=content", "got '内容=content', expected NAME=FIELD"),
    ("content", "got 'content', expected NAME=FIELD"),
    ("content=a,content=b", "got 'content=b', expected NAME=FIELD, each NAME once"),
])  # fmt: skip
def test_what_are_no_columns(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare(tmp_path / "crawl", "--columns", text)
    assert message in capsys.readouterr().err and not (tmp_path / "crawl_out").exists()


def test_columns_that_no_table_has(tmp_path: Path) -> None:
    write_csv(tmp_path / "crawl/x.csv", [{"标题": "一", "内容": "甲"}])
    write_json(tmp_path / "crawl/a.json", [video(0)])
    with pytest.raises(SystemExit) as error:
        prepare(tmp_path / "crawl", "--columns", "content=评论正文")
    said = str(error.value)
    assert "--columns: no table has a column '评论正文'. The columns found:" in said
    assert "x.csv: 标题, 内容" in said and "a.json: avatar, " in said and not (tmp_path / "crawl_out").exists()


def test_a_parent_that_is_also_a_comment(tmp_path: Path) -> None:
    """Its text counts only if it is not among the files; it is no comment to be learnt by itself."""
    rows = [
        {"视频ID": "7", "标题": "题", "评论ID": "1000001", "父评论ID": "1000009", "父评论": "行里的", "内容": "甲"},
        {"视频ID": "7", "标题": "题", "评论ID": "1000002", "父评论ID": "1000001", "父评论": "不同的", "内容": "乙"},
    ]
    write_json(tmp_path / "crawl/x.json", rows)
    written, report = prepare(tmp_path / "crawl")
    assert said(written) == {"甲": comment_prompt("题", "", "行里的"), "乙": comment_prompt("题", "", "甲")}
    assert report["read"] == 2 and not dropped(report)
    rows[0]["父评论"] = "回复 @张三 :加我微信wx123456"
    (tmp_path / "crawl/x.json").write_text(json.dumps(rows), encoding="utf-8")
    written, _ = prepare(tmp_path / "crawl", "--clean", "True", "--min_chars", "0")
    assert prompt(written["1000001"]).endswith("父评论：加我（联系方式）")


def test_ids_of_a_workbook(tmp_path: Path) -> None:
    """Numbers may have been rounded by Excel: then the title says which video it is."""
    rows = [
        {"视频ID": 114748000000000, "标题": "题", "内容": "甲", "评论ID": 228539000000},
        {"视频ID": 170001, "标题": "另一个", "内容": "乙", "评论ID": 228539123456},
    ]
    write_xlsx(tmp_path / "crawl/x.xlsx", {"x": rows})
    written, report = prepare(tmp_path / "crawl")
    assert said(written) == {"甲": comment_prompt("题", ""), "乙": comment_prompt("另一个", "")}
    assert report["ids_made"] == 1 and written["228539123456"]["video_id"] == "170001"
