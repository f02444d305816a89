"""python -m pytest tests/test_prepare_data.py"""

import contextlib
import csv
import io
import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from datetime import datetime, time
from hashlib import md5
from pathlib import Path
from typing import Any

import openpyxl
import pytest

import prepare_data
from utils.data.records import SYSTEM_PROMPT, comment_prompt
from utils.files import ROOT

Record = dict[str, Any]
PLOT_REPORT = prepare_data.plot_report


@pytest.fixture(autouse=True)
def quick_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the picture out, which takes most of a small run's time; test_picture draws it."""
    monkeypatch.setattr(prepare_data, "plot_report", lambda report, path: path.write_bytes(b""))


def video(number: int, **fields: Any) -> Record:
    """A video record as MediaCrawler writes it; its id is 1000 + number."""
    return {
        "video_id": str(1000 + number), "video_type": "video", "title": f"标题{number}", "desc": f"简介{number}",
        "create_time": 1700000000, "user_id": "90001", "nickname": "昵称甲", "avatar": "https://example.com/a.jpg",
        "last_modify_ts": 1700000000000, "video_url": f"https://www.bilibili.com/video/av{1000 + number}",
    } | fields  # fmt: skip


def comment(number: int, of: int = 0, to: int | str = "0", **fields: Any) -> Record:
    """A comment record of the second shape; its id is 50000 + number."""
    return {
        "comment_id": str(50000 + number), "parent_comment_id": str(50000 + to) if isinstance(to, int) else to,
        "create_time": 1700000100, "video_id": str(1000 + of), "content": f"评论{number}", "user_id": "90002",
        "nickname": "昵称乙", "avatar": "https://example.com/b.jpg", "sub_comment_count": "0",
        "last_modify_ts": 1700000200000,
    } | fields  # fmt: skip


def write_json(path: Path, records: list[Record], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, ensure_ascii=False, **options), encoding="utf-8")
    return path


def write_jsonl(path: Path, records: list[Record], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + end for record in records)
    path.write_bytes(text.encode())
    return path


def write_csv(path: Path, records: list[Record], end: str = "\r\n", encoding: str = "utf-8-sig") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0], lineterminator=end)
    writer.writeheader()
    writer.writerows(records)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def write_xlsx(path: Path, sheets: dict[str, list[Record]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, records in sheets.items():
        sheet = book.create_sheet(name)
        sheet.append(list(records[0]))
        for record in records:
            sheet.append(list(record.values()))
    book.save(path)
    return path


def write_sqlite(path: Path, tables: dict[str, list[Record]], id_type: str = "TEXT") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path)
    for name, records in tables.items():
        columns = ", ".join(f'"{key}" {id_type if key.endswith("_id") else ""}' for key in records[0])
        database.execute(f"CREATE TABLE {name} (id INTEGER PRIMARY KEY, {columns})")
        marks = ", ".join("?" * len(records[0]))
        keys = ", ".join(f'"{key}"' for key in records[0])
        for record in records:
            database.execute(f"INSERT INTO {name} ({keys}) VALUES ({marks})", list(record.values()))
    database.commit()
    database.close()
    return path


def prepare(folder: Path, *options: str) -> tuple[dict[str, Record], Record]:
    """Runs the script on a folder.

    Returns:
        The written records by id, with their split in "split", and the report.
    """
    output = folder.parent / f"{folder.name}_out"
    arguments = ["--data_dir", str(folder), "--output_dir", str(output), "--test_size", "0"]
    # Most tests here have texts that no rule would keep; test_utils_data_cleaning.py is about those.
    prepare_data.main(prepare_data.build_parser().parse_args([*arguments, "--clean", "False", *options]))
    records = {}
    for split in ("train", "test"):
        text = (output / f"data_{split}.json").read_text(encoding="utf-8")
        written = json.loads(text)
        assert len(text.splitlines()) == len(written) + 2 or "\u2028" in text  # a record a line
        for record in written:
            assert record["id"] not in records
            records[record["id"]] = record | {"split": split}
    return records, json.loads((output / "report.json").read_text(encoding="utf-8"))


def dropped(report: Record) -> dict[str, int]:
    """The reasons that dropped anything."""
    return {reason: count for reason, count in report["dropped"].items() if count}


def prompt(record: Record) -> str:
    return record["conversations"][1]["value"]


def answer(record: Record) -> str:
    return record["conversations"][2]["value"]


# The crawl that every container must give back: replies before parents, a reply to a reply, duplicates, orphans.
VIDEOS = [video(0), video(1, desc="-"), video(2, desc=""), video(0, last_modify_ts=1700000000001, title="新标题")]
COMMENTS = [
    comment(2, to=1, content="回复 @某用户 :答二"),
    comment(1, content="第一行\n第二行,\"引号\""),
    comment(3, to=2, content="答三[doge]"),
    comment(4, of=1),
    comment(4, of=1, content="后来的", last_modify_ts=1700000300000),
    comment(4, of=1, last_modify_ts=1700000000000),
    comment(5, of=2, content="[doge][笑哭]"),
    comment(6, of=9),
    comment(7, to=99),
    comment(8, content=""),
    comment(9, to=8),
]  # fmt: skip
EXPECTED = {
    "50001": (comment_prompt("新标题", "简介0"), '第一行\n第二行,"引号"'),
    "50002": (comment_prompt("新标题", "简介0", '第一行\n第二行,"引号"'), "答二"),
    "50003": (comment_prompt("新标题", "简介0", "答二"), "答三[doge]"),
    "50004": (comment_prompt("标题1", "-"), "后来的"),
    "50005": (comment_prompt("标题2", ""), "[doge][笑哭]"),
}
EXPECTED_DROPS = {"duplicate": 2, "video_missing": 1, "parent_missing": 2, "empty": 1}


def with_integer_ids(records: list[Record]) -> list[Record]:
    ids = ("video_id", "comment_id", "parent_comment_id")
    return [{key: int(value) if key in ids else value for key, value in record.items()} for record in records]


WRITERS = {
    "json": lambda d: (
        write_json(d / "search_contents_1.json", VIDEOS),
        write_json(d / "search_comments_1.json", COMMENTS),
    ),
    "json indented": lambda d: (
        write_json(d / "creator_contents_2026-01-01 12:30:00.json", VIDEOS, indent=4),
        write_json(d / "1_creator_comments_[a]*.json", COMMENTS, indent=4),
    ),
    "json without names": lambda d: (write_json(d / "a.json", VIDEOS), write_json(d / "b.json", COMMENTS)),
    "jsonl": lambda d: (
        write_jsonl(d / "jsonl/x_contents_1.jsonl", VIDEOS),
        write_jsonl(d / "x_comments_1.jsonl", COMMENTS),
    ),
    "jsonl crlf": lambda d: (
        write_jsonl(d / "x_contents_1.jsonl", VIDEOS, "\r\n"),
        write_jsonl(d / "x_comments_1.jsonl", COMMENTS, "\r\n"),
    ),
    "csv": lambda d: (
        write_csv(d / "1_search_videos_1.csv", VIDEOS),
        write_csv(d / "1_search_comments_1.csv", COMMENTS),
    ),
    "csv lf": lambda d: (
        write_csv(d / "search_videos_1.csv", VIDEOS, "\n", "utf-8"),
        write_csv(d / "search_comments_1.csv", COMMENTS, "\n", "utf-8"),
    ),
    "csv gbk": lambda d: (
        write_csv(d / "search_videos_1.csv", VIDEOS, encoding="gb18030"),
        write_csv(d / "search_comments_1.csv", COMMENTS, encoding="gb18030"),
    ),
    "xlsx": lambda d: write_xlsx(
        d / "bilibili_search_1.xlsx", {"Contents": VIDEOS, "Comments": COMMENTS, "Creators": [{"user_id": 1}]}
    ),
    "xlsx numbers": lambda d: write_xlsx(
        d / "x.xlsx", {"bilibili_video": with_integer_ids(VIDEOS), "bilibili_video_comment": with_integer_ids(COMMENTS)}
    ),
    "sqlite": lambda d: write_sqlite(
        d / "sqlite_tables.db", {"bilibili_video": VIDEOS, "bilibili_video_comment": COMMENTS}
    ),
    "sqlite integers": lambda d: write_sqlite(
        d / "sqlite_tables.db", {"bilibili_video": VIDEOS, "bilibili_video_comment": COMMENTS}, "INTEGER"
    ),
    "json and csv": lambda d: (
        write_json(d / "a/x_contents_1.json", VIDEOS),
        write_csv(d / "b/x_comments_1.csv", COMMENTS),
    ),
    "sqlite and jsonl": lambda d: (
        write_sqlite(d / "v.db", {"bilibili_video": VIDEOS}),
        write_jsonl(d / "x_comments_1.jsonl", COMMENTS),
    ),
    "integers in json": lambda d: (
        write_json(d / "x_contents.json", with_integer_ids(VIDEOS)),
        write_json(d / "x_comments.json", with_integer_ids(COMMENTS)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("container", WRITERS)
def test_every_container_gives_the_same(tmp_path: Path, container: str) -> None:
    WRITERS[container](tmp_path / "crawl")
    records, report = prepare(tmp_path / "crawl")
    assert {id: (prompt(record), answer(record)) for id, record in records.items()} == EXPECTED
    for record in records.values():
        assert [turn["from"] for turn in record["conversations"]] == ["system", "user", "assistant"]
        assert record["conversations"][0]["value"] == SYSTEM_PROMPT
        assert set(record) == {"id", "video_id", "conversations", "split"}
    assert records["50004"]["video_id"] == "1001"
    assert dropped(report) == EXPECTED_DROPS
    assert report["read"] == len(COMMENTS) and report["splits"]["train"] == {"comments": 5, "videos": 3}
    assert report["replies"] == 2 and report["emoticons_only"] == 1
    assert sum(line["records"] for line in report["files"] if line["kind"] == "videos") == len(VIDEOS)


@pytest.mark.parametrize("shape", "ABCDE")
def test_every_comment_shape(tmp_path: Path, shape: str) -> None:
    """From 2023 to 2026: without parents, with them, with sex and sign, with like_count, with creator_hash."""
    records = [comment(1), comment(2, to=1, content="回复 @甲 :好")]
    for record in records:
        if shape == "A":
            del record["parent_comment_id"]
        if shape in "CD":
            record |= {"sex": "男", "sign": "签名"}
        if shape in "DE":
            record["like_count"] = 3
        if shape == "E":
            del record["user_id"], record["avatar"]
            record |= {"creator_hash": "0123456789abcdef", "nickname": "昵***乙"}
    write_json(tmp_path / "crawl/contents.json", [video(0)])
    write_json(tmp_path / "crawl/comments.json", records)
    written, report = prepare(tmp_path / "crawl")
    assert answer(written["50001"]) == "评论1"
    if shape == "A":  # an answer to nobody knows whom
        assert "50002" not in written and dropped(report) == {"parent_unknown": 1}
    else:
        assert prompt(written["50002"]).endswith("父评论：评论1") and not dropped(report)


@pytest.mark.parametrize("top", ["0", 0, 0.0, "", None, "nan", "absent"])
def test_top_comment_spellings(tmp_path: Path, top: Any) -> None:
    record = comment(1, parent_comment_id=top)
    if top == "absent":
        del record["parent_comment_id"]
    write_jsonl(tmp_path / "crawl/all_contents.jsonl", [video(0)])
    write_jsonl(tmp_path / "crawl/all_comments.jsonl", [record])
    written, _ = prepare(tmp_path / "crawl")
    assert prompt(written["50001"]) == comment_prompt("标题0", "简介0")


TEXTS = [
    "普通", "", "-", " - ", "  两边  ", "\u3000全角\u3000\n", "a\"b\\c/d", "行\n\n行\t制表", "\u2028分行\u2029",
    "😀\x01\x7f", "</s>{}[]", "\u200b零宽", "\xa0", "'单引号' || \"", "%s {0} $1 \\1", "\x1f边\x85",
]  # fmt: skip
MENTIONS = ["@某人", " @某人\u3000@某人\n", "@某人@某人", "看这里 @某人", "@某人 看这里"]


def test_prompts_equal_comment_prompt(tmp_path: Path) -> None:
    """SQL renders what utils.data.records renders, for all combinations of difficult texts."""
    pairs = [(title, desc) for title in TEXTS for desc in (*TEXTS, *MENTIONS)]
    videos = [video(i, title=title, desc=desc) for i, (title, desc) in enumerate(pairs)]
    parents = [comment(i, content=text) for i, text in enumerate(TEXTS)]
    tops = [comment(1000 + i, of=i) for i in range(len(videos))]
    replies = [comment(5000 + i, of=3 * i, to=i) for i in range(len(TEXTS))]
    write_json(tmp_path / "crawl/contents.json", videos)
    write_json(tmp_path / "crawl/comments.json", replies + parents + tops)
    written, report = prepare(tmp_path / "crawl")
    assert len(written) == len(tops) + 2 * sum(bool(text.strip()) for text in TEXTS)
    by_id = {record["video_id"]: record for record in videos}
    lengths = {"comment": {}, "prompt": {}}
    for id, record in written.items():
        number, about = int(id) - 50000, by_id[record["video_id"]]
        parent = TEXTS[number - 5000] if number >= 5000 else ""
        assert prompt(record) == comment_prompt(about["title"], about["desc"], parent)
        if number < 1000:
            assert answer(record) == TEXTS[number].strip()
        for name, text in {"comment": answer(record), "prompt": prompt(record)}.items():
            lengths[name][str(len(text))] = lengths[name].get(str(len(text)), 0) + 1
    assert report["lengths"] == lengths


MENTIONED = [
    ("回复 @小明 :好的", "好的"),
    ("回复 @a b·c★ :好的", "好的"),
    ("回复@小明：好的", "好的"),
    ("回复 @甲 :回复 @乙 :好", "好"),
    ("回复 @甲 :@乙 你看", "@某人 你看"),
    ("回复我的人 :好", "回复我的人 :好"),
    ("@张三 @李四 快来", "@某人 @某人 快来"),
    ("@张三@李四 来", "@某人 来"),
    ("666@bob 快来", "666@某人 快来"),
    ("哈哈@-名_字-9，来", "哈哈@某人，来"),
    ("＠全角 你好", "@某人 你好"),
    ("4K@120Hz 比 1080p@60 好", "4K@120Hz 比 1080p@60 好"),
    ("写信给 li.si+1@mail.example.com 吧", "写信给 @某人 吧"),
    ("12345@qq.com", None),
    ("@张三", None),
    ("@张三 @李四\n", None),
    ("回复 @张三 :", None),
    ("@ 空格", None),
    ("@ 张三 来", "@某人 来"),
    ("@😀张三 快看", "@某人 快看"),
    ("@.张三 快看", "@某人 快看"),
    ("@~张三~ 快看", "@某人 快看"),
    ("@『张三』快看", "@某人快看"),
    ("@😀😎 快看", "@某人 快看"),
    ("@（张三） 快看", "@某人 快看"),
    ('@"张三" 快看', "@某人 快看"),
    ("@!张三 快看", "@某人 快看"),
    ("功耗@3.5GHz 还行，@3楼 你说呢", "功耗@3.5GHz 还行，@某人 你说呢"),
    ("@\u2068张三\u2069 快看", "@某人 快看"),
    ("﹫张三 快看", "@某人 快看"),
    ("&#64;张三 快看", "@某人 快看"),
    ('@<em class="keyword">张三</em> 快看', "@某人 快看"),
    ("1 @ 2，价格@ 3", "1 @ 2，价格@ 3"),
    ("就这？@，你好", "就这？@，你好"),
    ("@张\u0301三 来", "@某人 来"),
    ("@\u200b张三 来", "@某人 来"),
    ("\u200b回复 @小明 :好", "好"),
    (" \ufeff 回复 @小明 :\u200b回复 @张三 :好", "好"),
    ("hi@12345678 来", "hi@某人 来"),
    ("呵_@12 来", "呵_@某人 来"),
    ("写信给 li﹫mail.example.com", "写信给 @某人"),
    ("666&#64;bob 快来", "666@某人 快来"),
    ("﹫😀张三 快看", "@某人 快看"),
    ("@<em>😀张三</em> 快看", "@某人 快看"),
    ("@<em>.a</em>@张三 快看", "@某人@某人 快看"),
    ("@<b>张三</b> 快看", "@某人 快看"),
    ("@\u00a0张三 快看", "@某人 快看"),
    ("@\u3000张三 快看", "@某人 快看"),
    ("@👨\u200d👩\u200d👧张三 快看", "@某人 快看"),
    ("&#x40;张三 快看，&amp;#64;李四 也来", "@某人 快看，@某人 也来"),
]  # fmt: skip


@pytest.fixture(scope="module")
def con() -> Iterator[Any]:
    import duckdb

    with duckdb.connect() as con:
        con.execute(prepare_data.SCHEMA.replace("{whitespace}", prepare_data.sql_text(prepare_data.WHITESPACE)))
        yield con


@pytest.mark.parametrize(("text", "expected"), MENTIONED)
def test_mentions(con: Any, text: str, expected: str | None) -> None:
    """None: nothing but mentions is left."""
    (found,) = con.execute(f"SELECT {prepare_data.anonymized('x', True)} FROM (SELECT ?::VARCHAR x)", [text]).fetchone()
    assert found == expected or (expected is None and not found.replace(prepare_data.SOMEONE, "").strip())


def test_plain_mentions_are_what_the_whole_pattern_finds(con: Any) -> None:
    """All texts of five pieces in which no letter, digit or mark of an address stands before an @."""
    pieces = ["@", "＠", "张", "a", "1", ".", "-", "_", " ", "，", "\u200b"]
    con.execute("CREATE OR REPLACE TABLE texts AS SELECT unnest($1::VARCHAR[]) x",
                [["".join(text) for text in itertools.product(pieces, repeat=5)]])  # fmt: skip
    quoted = prepare_data.sql_text
    whole = f"regexp_replace(x, {quoted(prepare_data.MENTION)}, {quoted(chr(92) + '1' + prepare_data.SOMEONE)}, 'g')"
    plain = f"regexp_replace(x, {quoted(prepare_data.PLAIN_MENTION)}, {quoted(prepare_data.SOMEONE)}, 'g')"
    found = f"FROM texts WHERE NOT regexp_matches(x, {quoted(prepare_data.BEFORE_AT)})"
    assert con.execute(f"SELECT count(*) {found} AND {plain} <> x").fetchone()[0] > 10_000
    assert con.execute(f"SELECT x, {whole}, {plain} {found} AND {whole} <> {plain} LIMIT 3").fetchall() == []


@pytest.mark.parametrize(("text", "expected"), [MENTIONED[0], MENTIONED[7], *(one for one in MENTIONED if not one[1])])
def test_anonymize(tmp_path: Path, text: str, expected: str | None) -> None:
    write_json(tmp_path / "crawl/contents.json", [video(0, title=f"标题 {text}", desc=f"简介 @{text}")])
    write_json(tmp_path / "crawl/comments.json", [comment(1), comment(2, to=1, content=text), comment(3, to=2)])
    kept, report = prepare(tmp_path / "crawl", "--anonymize", "False")
    assert answer(kept["50002"]) == text.strip() and prompt(kept["50003"]).endswith(f"父评论：{text.strip()}")
    assert text.strip() in prompt(kept["50001"])
    written, report = prepare(tmp_path / "crawl")
    for name in ("张三", "李四", "小明", "bob", "-名_字-9", "li.si", "12345"):
        assert name not in "".join(map(prompt, written.values())) or "@" not in text
    if expected is None:
        assert dropped(report) == {"empty": 1, "parent_missing": 1}
    else:
        assert answer(written["50002"]) == expected and prompt(written["50003"]).endswith(f"父评论：{expected}")


def test_no_person_in_the_output(tmp_path: Path) -> None:
    WRITERS["json"](tmp_path / "crawl")
    prepare(tmp_path / "crawl")
    text = "".join(path.read_text("utf-8") for path in (tmp_path / "crawl_out").glob("*.json"))
    assert not any(word in text for word in ("9000", "昵称", "avatar", "example.com", "某用户"))


def test_search_marks_leave_the_title(tmp_path: Path) -> None:
    write_json(tmp_path / "crawl/contents.json", [video(0, title='<em class="keyword">显卡</em>评测 a<b')])
    write_json(tmp_path / "crawl/comments.json", [comment(1)])
    assert prompt(prepare(tmp_path / "crawl")[0]["50001"]).startswith("视频标题：显卡评测 a<b\n")


def test_truncated_and_interleaved_json(tmp_path: Path) -> None:
    records = [comment(i, content="花括号{里}" * 5) for i in range(300)]
    whole = json.dumps(records, ensure_ascii=False, indent=4)
    write_json(tmp_path / "crawl/contents.json", [video(0)])
    for cut, torn in ((whole.index("50150") + 60, 1), (whole.index("50150") - 30, 0)):  # within a record, after a comma
        (tmp_path / "crawl/x_comments_1.json").write_text(whole[:cut], encoding="utf-8")
        _, report = prepare(tmp_path / "crawl")
        assert report["splits"]["train"]["comments"] == 150 and report["dropped"]["torn"] == torn
        notes = [line["note"] for line in report["files"] if line["kind"] == "comments"]
        assert len(notes) == 1 and ("damaged" in notes[0]) >= torn
    piece = json.dumps(records[0], ensure_ascii=False)[20:90] + "\n"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (tmp_path / "crawl/x_comments_1.json").unlink()
    text = "".join(lines[:9] + ['{"comment_id": "5', piece] + lines[9:])
    (tmp_path / "crawl/x_comments_1.jsonl").write_text(text, encoding="utf-8")
    _, report = prepare(tmp_path / "crawl")
    assert report["splits"]["train"]["comments"] == 300 and dropped(report) == {"torn": 1}


@pytest.mark.parametrize("small_bytes", [0, 400, 1 << 18])
def test_files_of_any_size_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_bytes: int) -> None:
    """By DuckDB or here, one by one or together: of copies written at the same time the last file's counts."""
    monkeypatch.setattr(prepare_data, "SMALL_BYTES", small_bytes)
    folder = tmp_path / "crawl"
    write_json(folder / "a_contents.json", [video(number) for number in range(3)])
    write_json(folder / "b_comments.json", [comment(1, content="旧"), comment(2, content="旧")])
    write_jsonl(folder / "c_comments.jsonl", [comment(2, content="新"), comment(3, of=1), comment(5, of=2)])
    write_csv(folder / "d_comments.csv", [comment(4, to=2), comment(5, of=2, content="最后")])
    written, report = prepare(folder)
    assert {id: answer(record) for id, record in written.items()} == {
        "50001": "旧", "50002": "新", "50003": "评论3", "50004": "评论4", "50005": "最后"
    }  # fmt: skip
    assert [line["records"] for line in report["files"]] == [3, 2, 3, 2] and report["dropped"]["duplicate"] == 2
    text = (folder / "b_comments.json").read_text(encoding="utf-8")
    (folder / "b_comments.json").write_text(text[:-40], encoding="utf-8")
    damaged = prepare(folder)[1]["files"][1]
    assert damaged["torn"] == 1 and damaged["note"] == "damaged: read record by record"


def test_torn_csv(tmp_path: Path) -> None:
    """Two processes wrote at once: a record without its start, one without its end, and an invalid byte."""
    write_json(tmp_path / "crawl/contents.json", [video(0)])
    records = [comment(i, content=f'第{i}条\n引"号') for i in range(40)]
    path = write_csv(tmp_path / "crawl/search_comments_1.csv", records)
    starts = [path.read_bytes().index(f"{50000 + i},0".encode()) for i in range(40)]
    data = path.read_bytes()
    no_start = data[starts[7] + 40 : starts[8]]
    no_end = data[starts[9] :].split("引".encode())[0]  # within the quotation marks
    middle = data[starts[3] : starts[20]]
    path.write_bytes(data[: starts[3]] + no_start + middle + no_end + b"\r\n" + data[starts[20] :])
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {str(50000 + i) for i in range(40)}
    assert all(answer(record) == f'第{int(id) - 50000}条\n引"号' for id, record in written.items())
    assert dropped(report) == {"torn": 2}
    path.write_bytes(data[: starts[20]] + no_end + data[starts[20] :].replace("第30条".encode(), b"\xff\xfe"))
    written, report = prepare(tmp_path / "crawl")
    assert set(written) >= {str(50000 + i) for i in range(40) if i != 20} and "\ufffd" in answer(written["50030"])


@pytest.mark.parametrize("later", ['他说"好"，对吧\n真的', '他说"好"吧', '"好"吧'])
def test_torn_csv_row_swallows_no_record(tmp_path: Path, later: str) -> None:
    """A quoted text without its end reaches to the next quotation mark, and no further columns betray it."""
    write_json(tmp_path / "crawl/contents.json", [video(0)])
    records = [comment(i) for i in range(12)] + [comment(12, content=later)]
    path = write_csv(tmp_path / "crawl/search_comments_1.csv", records)
    text = path.read_text("utf-8-sig")
    path.write_text(
        text.replace("评论3,90002,昵称乙,https://example.com/b.jpg,0,1700000200000", '"开头，\n第'), "utf-8", newline=""
    )
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {str(50000 + i) for i in range(13) if i != 3} and dropped(report) == {"torn": 1}
    assert "昵称乙" not in (tmp_path / "crawl_out/data_train.json").read_text("utf-8")
    path.write_text(text.replace("评论3", '"评论3').replace("评论7", '评"论7'), "utf-8", newline="")
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {str(50000 + i) for i in range(13) if i != 3} and dropped(report) == {"torn": 1}


def test_csv_rows_of_a_later_version(tmp_path: Path) -> None:
    """A crawler that was updated between two runs of a day goes on below the old header."""
    first = [comment(i, of=i) for i in range(5)]
    about = {"sex": "男", "sign": "签名,\n二"}
    kinds = [
        [comment(i) | about for i in range(5, 10)],  # to 12 columns
        [comment(i) | about | {"like_count": 3} for i in range(10, 15)],  # to 13
        [comment(i) | {"future": 1} for i in range(15, 35)],  # to 11, of no known version
        [comment(i) for i in range(35, 40)],
    ]
    counters = dict.fromkeys(
        ("liked_count", "video_play_count", "video_danmaku", "video_comment", "video_cover_url"), "1"
    )
    videos = [
        [video(i) | counters for i in range(2)],
        [video(i) | counters | {"source_keyword": "词"} for i in range(2, 5)],
    ]
    for name, runs in {"comments": [first, *kinds], "videos": videos}.items():
        paths = [write_csv(tmp_path / f"{name}_{i}.csv", run, encoding="utf-8") for i, run in enumerate(runs)]
        rows = [path.read_bytes().split(b"\r\n", 1)[1] for path in paths[1:]]
        target = tmp_path / "crawl" / f"search_{name}_1.csv"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(paths[0].read_bytes() + b"".join(rows))
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {str(50000 + i) for i in [*range(15), *range(35, 40)]}
    assert dropped(report) == {"torn": 20} and report["read"] == 40 and report["splits"]["train"]["videos"] == 5


@pytest.mark.parametrize("first", ["torn", "{}", "too long"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_first_json_record_that_is_none(tmp_path: Path, first: str, ending: str) -> None:
    """The columns are those of the first whole record, and the file is read from its start."""
    write_json(tmp_path / "crawl/contents.json", [video(0)])
    begin = {
        "torn": '{"comment_id": "5", "conte',
        "{}": "{},",
        "too long": json.dumps(comment(0, content="长" * 2_000_000)) + ",",
    }[first]
    path = write_json(tmp_path / f"crawl/x_comments_1.{ending}", [comment(1), comment(2)])
    if ending == "jsonl":
        begin = begin.rstrip(",") + "\n"
        write_jsonl(path, [comment(1), comment(2)])
    text = path.read_text("utf-8")
    path.write_text(begin + text if ending == "jsonl" else "[" + begin + text[1:], "utf-8")
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {"50001", "50002"} | ({"50000"} if first == "too long" else set())
    assert dropped(report) == ({} if first == "too long" else {"torn": 1})


def test_shifted_rows_are_torn(tmp_path: Path) -> None:
    shifted = list(comment(3).values())[4:] + ["", "", "", ""]
    write_json(tmp_path / "crawl/contents.json", [video(0)])
    rows = [comment(1), comment(2), dict(zip(comment(3), shifted, strict=True)), dict.fromkeys(comment(4), "")]
    write_csv(tmp_path / "crawl/search_comments_1.csv", rows)
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {"50001", "50002"} and dropped(report) == {"torn": 2}


@pytest.mark.parametrize("container", ["csv", "xlsx"])
def test_ids_that_went_through_excel(tmp_path: Path, container: str) -> None:
    """Comments with a lost id are kept and not taken for one another; a lost video or parent cannot be joined."""
    lost: Any = "2.28539E+11" if container == "csv" else 228539000000
    lost_video: Any = "1.14748E+14" if container == "csv" else 114748000000000
    videos = [video(0), video(1, video_id=lost_video), video(2, video_id=lost_video)]
    comments = [
        comment(1, comment_id=lost, content="甲"), comment(2, comment_id=lost, content="乙"),
        comment(2, comment_id=lost, content="乙", last_modify_ts=1800000000000), comment(3, of=1, content="丙"),
        comment(4, video_id=lost_video), comment(5, parent_comment_id=lost), comment(6, to=3, content="丁", of=1),
    ]  # fmt: skip
    if container == "csv":
        write_csv(tmp_path / "crawl/search_videos_1.csv", videos)
        write_csv(tmp_path / "crawl/search_comments_1.csv", comments)
    else:
        write_xlsx(tmp_path / "crawl/x.xlsx", {"Contents": videos, "Comments": comments})
    written, report = prepare(tmp_path / "crawl")
    assert sorted(map(answer, written.values())) == sorted("甲乙丙丁")
    assert prompt(written["50003"]).startswith("视频标题：标题1\n")  # by the address of the video
    assert dropped(report) == {"duplicate": 1, "video_id_lost": 1, "parent_unknown": 1} and report["ids_made"] == 2
    again, _ = prepare(tmp_path / "crawl")
    assert set(again) == set(written)


def big_crawl(folder: Path, videos: range) -> None:
    write_json(folder / "x_contents_1.json", [video(i) for i in videos])
    comments = [comment(i * 20 + j, of=i, to=i * 20 if j else "0") for j in range(8) for i in videos]
    write_json(folder / "x_comments_1.json", comments)


def test_split_is_by_video_and_stays(tmp_path: Path) -> None:
    big_crawl(tmp_path / "small", range(0, 300, 2))
    big_crawl(tmp_path / "large", range(300))
    small, _ = prepare(tmp_path / "small", "--test_size", "0.2")
    large, report = prepare(tmp_path / "large", "--test_size", "0.2")
    assert set(small) < set(large) and len(large) == 2400
    assert all(large[id]["split"] == record["split"] for id, record in small.items())
    hashes = {str(id): int(md5(f"0:split:{id}".encode()).hexdigest()[:13], 16) for id in range(1000, 1300)}
    below = {id for id, value in hashes.items() if value < 0.2 * 16**13}
    assert {record["video_id"] for record in large.values() if record["split"] == "test"} == below
    assert report["splits"]["test"] == {"comments": 8 * len(below), "videos": len(below)} and 40 < len(below) < 80
    more, _ = prepare(tmp_path / "large", "--test_size", "0.4")
    assert all(more[id]["split"] == "test" for id, record in large.items() if record["split"] == "test")
    other, _ = prepare(tmp_path / "large", "--test_size", "0.2", "--seed", "1")
    assert {id for id in other if other[id]["split"] == "test"} != {id for id in large if large[id]["split"] == "test"}


def test_total_takes_whole_videos(tmp_path: Path) -> None:
    big_crawl(tmp_path / "crawl", range(60))
    whole, _ = prepare(tmp_path / "crawl", "--test_size", "0.2")
    some, report = prepare(tmp_path / "crawl", "--test_size", "0.2", "--total", "100")
    assert len(some) == 100 and dropped(report) == {"beyond_total": 380}
    sizes: dict[str, int] = {}
    for id, record in some.items():
        assert record == whole[id]
        sizes[record["video_id"]] = sizes.get(record["video_id"], 0) + 1
    assert sorted(sizes.values()) == [4] + [8] * 12
    by_number, _ = prepare(tmp_path / "crawl", "--test_size", "20", "--total", "100")
    assert by_number == some  # 20 of 100 is the share 0.2
    every, report = prepare(tmp_path / "crawl", "--total", "5000")
    assert len(every) == 480 and not dropped(report)


def test_one_video_stays_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also across buckets, which end in the middle of a video; the order of the files does not matter."""
    monkeypatch.setattr(prepare_data.write_splits, "__defaults__", (7,))
    big_crawl(tmp_path / "crawl", range(40))
    written, _ = prepare(tmp_path / "crawl", "--test_size", "0.3")
    order = [record["video_id"] for record in written.values()]
    assert len(order) == 320 and sum(a != b for a, b in zip(order, order[1:], strict=False)) == 39
    first = (tmp_path / "crawl_out/data_train.json").read_bytes()
    comments = json.loads((tmp_path / "crawl/x_comments_1.json").read_text("utf-8"))
    write_json(tmp_path / "crawl/x_comments_1.json", comments[::-1])
    prepare(tmp_path / "crawl", "--test_size", "0.3")
    assert (tmp_path / "crawl_out/data_train.json").read_bytes() == first


def test_unreadable_and_foreign_files_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crawl = tmp_path / "crawl"
    WRITERS["json"](crawl)
    (crawl / "x_comments_2.xlsx").write_bytes(b"PK no workbook")
    (crawl / "x_comments_3.db").write_bytes(b"no database " * 100)
    (crawl / "x_comments_4.json").write_bytes(b"\x00\xff\x00")
    (crawl / "empty_comments.csv").write_bytes(b"")
    (crawl / "~$open.xlsx").write_bytes(b"lock")
    write_json(crawl / "settings.json", [{"a": 1}])
    write_json(crawl / "search_creators_1.json", [{"user_id": "1"}])
    write_json(crawl / "kuaishou/json/kuaishou_comments_1.json", [comment(77)])
    write_json(crawl / "douyin/json/search_comments_1.json", [{"aweme_id": "1"}])
    tables = {"kuaishou_video_comment": [comment(78)], "bilibili_video_comment": [comment(79)]}
    write_sqlite(crawl / "all.db", tables)
    for name in prepare_data.OUR_FILES:
        write_json(crawl / name, [comment(80)])
    written, report = prepare(crawl)
    assert set(written) == {*EXPECTED, "50079"}
    notes = {Path(line["file"]).name: line["note"] for line in report["files"]}
    assert set(notes) == {
        "search_contents_1.json", "search_comments_1.json", "x_comments_2.xlsx", "x_comments_3.db",
        "x_comments_4.json", "empty_comments.csv", "settings.json", "all.db [bilibili_video_comment]",
        "kuaishou_comments_1.json",
    }  # fmt: skip
    assert notes["kuaishou_comments_1.json"].startswith("skipped: 'kuaishou' in its path names another platform;")
    assert "BadZipFile" in notes["x_comments_2.xlsx"] and "DatabaseError" in notes["x_comments_3.db"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in notes)


@pytest.mark.parametrize("name", ["my_creators_comments.json", "dynamics_comments_1.json", "contacts.jsonl"])
def test_columns_go_before_names(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "crawl/up_info_contents.json", [video(0)])
    (write_jsonl if name.endswith("l") else write_json)(tmp_path / "crawl" / name, [comment(1)])
    assert set(prepare(tmp_path / "crawl")[0]) == {"50001"}


def test_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["json"](tmp_path / "crawl")
    WRITERS["json"](tmp_path / "crawl/closed")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == set(EXPECTED)
    notes = {Path(line["file"]).name: line["note"] for line in report["files"]}
    assert notes["closed"] == "skipped: cannot be listed (Permission denied)"


NAMES = [
    b"we [ir]d\\x/y.json",
    b"a\\*.json",
    b"a\\b.json",
    b"\xff\xfe.json",
    b"l\nine.jsonl",
    "（副本）?.json".encode(),
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_any_file_name(tmp_path: Path, name: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "crawl/a.json", [video(0)])
    path = tmp_path / "crawl" / os.fsdecode(name)
    (write_jsonl if path.suffix == ".jsonl" else write_json)(path, [comment(1)])
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {"50001"} and [line["note"] for line in report["files"]] == ["", ""]
    shown = name.decode(errors="backslashreplace")
    assert f"{shown}: 1 comment\n" in capsys.readouterr().out.encode("utf-8").decode()
    assert {Path(line["file"]).name for line in report["files"]} == {"a.json", Path(shown).name}


def test_cells_that_are_no_texts(tmp_path: Path) -> None:
    """A number, a date, a time and what looks like a formula in a sheet; bytes in a database."""
    write_json(tmp_path / "crawl/contents.json", [video(0)])
    day, hour = datetime(2025, 1, 2, 3, 4, 5), time(12, 30)
    contents = {1: 666, 2: hour, 3: "=_=", 4: "==b", 5: 6.5, 6: "后"}
    rows = with_integer_ids([comment(i, content=text, create_time=day) for i, text in contents.items()])
    write_xlsx(tmp_path / "crawl/x.xlsx", {"Comments": rows})
    blobs = [comment(7, content="字节".encode()), comment(8, content=b"\xe8"), comment(9)]
    write_sqlite(tmp_path / "crawl/x.db", {"bilibili_video_comment": blobs})
    written, report = prepare(tmp_path / "crawl")
    expected = {1: "666", 2: "12:30:00", 3: "=_=", 4: "==b", 5: "6.5", 6: "后", 7: "字节", 8: "\ufffd", 9: "评论9"}
    assert {int(id) - 50000: answer(record) for id, record in written.items()} == expected
    assert not any(line["note"] for line in report["files"]) and not dropped(report)


@pytest.mark.parametrize(
    "time", ["", "2025-01-01 10:00:00", "2025/1/1 8:05", "1/2/2025", "2025年1月2日", "1700000100.0"]
)
def test_time_does_not_make_a_row_torn(tmp_path: Path, time: str) -> None:
    write_json(tmp_path / "crawl/contents.json", [video(0)])
    write_csv(tmp_path / "crawl/search_comments_1.csv", [comment(1, create_time=time), comment(2, create_time="昵称")])
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {"50001"} and dropped(report) == {"torn": 1}


def test_output_into_the_data_folder_is_not_read_again(tmp_path: Path) -> None:
    WRITERS["json"](tmp_path)
    arguments = prepare_data.build_parser().parse_args(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path)])
    prepare_data.main(arguments)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {
        "search_contents_1.json", "search_comments_1.json",
        "data_train.json", "data_test.json", "report.json", "report.png",
    }  # fmt: skip
    prepare_data.main(arguments)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_picture(tmp_path: Path) -> None:
    """For one comment as well as for many; titles are English, since a machine may have no Chinese font."""
    report = {"read": 1, "dropped": {"torn": 0}, "lengths": {"comment": {5: 1}, "prompt": {70: 1}}}
    report["splits"] = {"train": {"comments": 1}, "test": {"comments": 0}}
    for lengths in ({5: 1}, {1: 1}, {length: 1000 - length for length in range(1, 900)}):
        report["lengths"]["comment"] = lengths
        PLOT_REPORT(report, tmp_path / "report.png")
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    WRITERS["json"](tmp_path / "elsewhere")
    (tmp_path / "crawl").mkdir()
    (tmp_path / "crawl/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "crawl")
    assert prepare(tmp_path / "crawl")[1]["read"] == len(COMMENTS)


def test_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped crawl, joined once more in plain Python."""
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "crawl")
    written, report = prepare(tmp_path / "crawl", "--test_size", "0.1")
    records: dict[str, dict[str, Record]] = {"contents": {}, "comments": {}}
    for path in sorted((tmp_path / "crawl").rglob("*.json*")):
        text = path.read_text("utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        for kind, id in (("contents", "video_id"), ("comments", "comment_id")):
            if f"_{kind}_" in path.name:
                for row in sorted(rows, key=lambda row: row["last_modify_ts"]):
                    if records[kind].get(row[id], row)["last_modify_ts"] <= row["last_modify_ts"]:
                        records[kind][row[id]] = row
    expected = set()
    for id, row in records["comments"].items():
        parent = records["comments"].get(row["parent_comment_id"], {"content": ""})
        if row["content"].strip() and row["video_id"] in records["contents"]:
            if row["parent_comment_id"] == "0" or parent["content"].strip():
                expected.add(id)
    assert set(written) == expected and len(expected) > 250
    assert report["read"] == len(written) + sum(report["dropped"].values())
    assert not any("回复 @" in prompt(record) + answer(record) for record in written.values())
    printed = capsys.readouterr().out
    assert "python download_pt.py --model Qwen/Qwen2.5-0.5B" in printed
    assert f"{report['read']:,}  comments read" in printed


@pytest.mark.parametrize(("options", "message"), [
    (["--total", "0"], "--total: got 0, expected 1 or more"),
    (["--test_size", "1.5"], "--test_size: got '1.5', expected a share such as 0.1"),
    (["--test_size", "-1"], "--test_size: got '-1'"),
    (["--test_size", "viele"], "--test_size: got 'viele'"),
    (["--test_size", "nan"], "--test_size: got 'nan'"),
    (["--test_size", "20"], "Give --total too"),
    (["--test_size", "20", "--total", "20"], "expected less than --total, which is 20"),
    (["--max_repeats", "0"], "--max_repeats: got 0, expected a number of comments, or -1 for all"),
    (["--min_likes", "-1", "--max_chars", "0"], "--min_likes: got -1"),
    (["--prefer_liked", "True"], "--prefer_liked: got True, expected it together with --total"),
    (["--data_dir", "no/such/folder"], f"no folder {ROOT / 'no/such/folder'}. Copy MediaCrawler's data folder there"),
    (["--data_dir", "no/such/folder"], "python prepare_data.py --data_dir examples"),
    (["--data_dir", "examples/README.md"], "examples/README.md is a file, expected a folder"),
    (["--data_dir", "examples/README.md"], "python prepare_data.py --data_dir examples"),
    (["--output_dir", "README.md"], "--output_dir: README.md is no folder that can be written to (a file is there)"),
])  # fmt: skip
def test_user_errors(tmp_path: Path, options: list[str], message: str) -> None:
    WRITERS["json"](tmp_path / "crawl")
    with pytest.raises(SystemExit) as error:
        prepare(tmp_path / "crawl", *options)
    assert message in str(error.value)
    assert not (tmp_path / "crawl_out").exists()


def test_nothing_usable(tmp_path: Path) -> None:
    """As a user sees it: exit code 1, what was looked for, the next command, no traceback and nothing left behind."""
    write_json(tmp_path / "crawl/x_comments_1.json", [comment(1)])
    folders = ["--data_dir", tmp_path / "crawl", "--output_dir", tmp_path / "out"]
    command = [sys.executable, ROOT / "prepare_data.py", *folders]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "1 comment and 0 video records" in result.stderr and "*.jsonl" in result.stderr
    assert "python prepare_data.py --data_dir examples" in result.stderr
    assert "-1  video not among the files" in result.stdout
    assert not (tmp_path / "out").exists()


def test_all_in_the_test_set(tmp_path: Path) -> None:
    WRITERS["json"](tmp_path / "crawl")
    with pytest.raises(SystemExit, match="smaller --test_size"):
        prepare(tmp_path / "crawl", "--test_size", "0.9999999")
    assert not (tmp_path / "crawl_out").exists()


@pytest.mark.parametrize("share", ["1e-9", "0"])
def test_empty_test_set_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str) -> None:
    """Unless it was asked for."""
    write_json(tmp_path / "crawl/a.json", [video(0)])
    write_json(tmp_path / "crawl/b.json", [comment(1)])
    prepare(tmp_path / "crawl", "--test_size", share)
    printed = capsys.readouterr().out
    assert ("No video fell into the test set" in printed) == (share != "0")
    assert json.loads((tmp_path / "crawl_out/data_test.json").read_text()) == []
    assert "a.json: 1 video\n" in printed and "b.json: 1 comment\n" in printed
    assert "1  train: comments under 1 video\n" in printed and "0  test: comments under 0 videos\n" in printed


def test_results_appear_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends before its report is there leaves the data of the run before."""
    WRITERS["json"](tmp_path / "crawl")
    prepare(tmp_path / "crawl")
    before = {path.name: path.read_bytes() for path in (tmp_path / "crawl_out").iterdir()}
    write_json(tmp_path / "crawl/more_comments.json", [comment(30)])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "plot_report", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "crawl")
    assert {path.name: path.read_bytes() for path in (tmp_path / "crawl_out").iterdir()} == before


@pytest.mark.parametrize("renames", range(1, 5))
def test_a_kill_leaves_no_data_of_two_runs(tmp_path: Path, renames: int) -> None:
    """Before the first file takes its place, the second ...: without training data the next stage says what to do."""
    big_crawl(tmp_path / "crawl", range(30))
    prepare(tmp_path / "crawl", "--test_size", "0.3")
    program = (
        "import os, signal, sys; import prepare_data; import utils.files\n"
        "replace, left = os.replace, [int(sys.argv.pop(1))]\n"
        "def killed(*paths):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(*paths)\n"
        "utils.files.os.replace = killed\n"
        "prepare_data.main(prepare_data.build_parser().parse_args())\n"
    )
    out = tmp_path / "crawl_out"
    folders = ["--data_dir", str(tmp_path / "crawl"), "--output_dir", str(out)]
    options = ["--test_size", "0.3", "--seed", "1", "--clean", "False"]
    command = [sys.executable, "-c", program, str(renames), *folders, *options]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "data_train.json").exists()
    _, report = prepare(tmp_path / "crawl", "--test_size", "0.3", "--seed", "1")
    assert sorted(path.name for path in out.iterdir()) == sorted(prepare_data.OUR_FILES)
    videos = {}
    for split in ("train", "test"):
        records = json.loads((out / f"data_{split}.json").read_text(encoding="utf-8"))
        videos[split] = {record["video_id"] for record in records}
        assert len(records) == report["splits"][split]["comments"]
    assert videos["train"] and videos["test"] and not videos["train"] & videos["test"]


def test_two_runs_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second says so and ends; the first does not notice."""
    WRITERS["json"](tmp_path / "crawl")
    folders = ["--data_dir", tmp_path / "crawl", "--output_dir", tmp_path / "crawl_out"]
    ended = []

    def second(*_: object) -> None:
        command = [sys.executable, ROOT / "prepare_data.py", *folders]
        ended.append(subprocess.run(command, capture_output=True, text=True))
        (tmp_path / "crawl_out/.report.png.partial").touch()

    monkeypatch.setattr(prepare_data, "plot_report", second)
    assert set(prepare(tmp_path / "crawl")[0]) == set(EXPECTED)
    (one,) = ended
    assert one.returncode == 1 and one.stderr.startswith("Another process is writing") and one.stderr.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "crawl_out").iterdir()) == sorted(prepare_data.OUR_FILES)


def test_a_workbook_that_unpacks_to_gigabytes_is_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "crawl"
    write_json(folder / "contents.json", VIDEOS)
    write_json(folder / "comments.json", COMMENTS)
    expected, _ = prepare(folder)
    write_xlsx(folder / "more.xlsx", {"Comments": COMMENTS})
    with zipfile.ZipFile(folder / "more.xlsx", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/sharedStrings.xml", b"<si><t>" + bytes(1 << 27))
    written, report = prepare(folder)
    assert written == expected
    assert "not readable (ValueError: it unpacks to 134 MB from 0.1" in report["files"][2]["note"]


def test_an_endless_view_is_no_table(tmp_path: Path) -> None:
    folder = tmp_path / "crawl"
    write_sqlite(folder / "tables.db", {"bilibili_video": VIDEOS, "bilibili_video_comment": COMMENTS})
    expected, _ = prepare(folder)
    database = sqlite3.connect(folder / "tables.db")
    database.execute("""CREATE VIEW more AS WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers)
        SELECT n comment_id, 1000 video_id, 'x' content FROM numbers""")
    database.close()
    written, report = prepare(folder)
    assert written == expected and "views are not read (more)" in report["files"][-1]["note"]


# ---------------------------------------------------------------------------------------------------------------------
# Comments that are not the crawler's


def test_title_for_comments_without_a_video(tmp_path: Path) -> None:
    """Their own video's ids stay, so that nothing moves when its file comes; what has a video keeps its title."""
    folder = tmp_path / "crawl"
    write_json(folder / "comments.json", [comment(1), comment(2, to=1), comment(3, of=1)])
    with pytest.raises(SystemExit, match="python prepare_data.py --title 'the title'"):
        prepare(folder)
    written, _ = prepare(folder, "--title", " 一个标题 ", "--desc", "简介")
    assert {prompt(written[id]) for id in ("50001", "50003")} == {comment_prompt("一个标题", "简介")}
    assert prompt(written["50002"]) == comment_prompt("一个标题", "简介", "评论1")
    assert written["50003"]["video_id"] == "1001"
    (folder / "texts.csv").write_text("评论内容\n只有一列的评论\n", encoding="utf-8")
    write_json(folder / "contents.json", [video(0)])
    written, report = prepare(folder, "--title", "一个标题")
    about = {answer(record): prompt(record) for record in written.values()}
    assert about["评论1"] == comment_prompt("标题0", "简介0")
    assert about["评论3"] == about["只有一列的评论"] == comment_prompt("一个标题", "") and not dropped(report)
    written, report = prepare(folder)
    assert set(written) == {"50001", "50002"} and dropped(report) == {"video_missing": 1}
    (note,) = [line["note"] for line in report["files"] if "texts.csv" in line["file"]]
    assert "no column says of which video" in note and "--title" in note


@pytest.mark.parametrize(("options", "message"), [
    (["--title", " "], "--title: got  , expected the video's title."),
    (["--desc", "x"], "--desc: got x, expected it together with --title."),
])  # fmt: skip
def test_title_errors(tmp_path: Path, options: list[str], message: str) -> None:
    WRITERS["json"](tmp_path / "crawl")
    with pytest.raises(SystemExit) as error:
        prepare(tmp_path / "crawl", *options)
    assert message in str(error.value)


def test_danmaku_is_refused_and_the_rest_read(tmp_path: Path) -> None:
    folder = tmp_path / "crawl"
    WRITERS["json"](folder)
    bullets = [{"id": 1, "progress": 4, "mode": 1, "fontsize": 25, "midHash": "a", "content": "前方高能", "ctime": 1}]
    write_json(folder / "d1.json", bullets)
    write_json(folder / "d2.json", [{"code": 0, "data": {"elems": bullets}}])
    write_csv(folder / "d3.csv", bullets)
    write_csv(folder / "d4.csv", [{"视频标题": "标题", "弹幕": "前方高能"}])
    write_csv(folder / "d5.csv", [{"标题": "标题", "弹幕内容": "前方高能"}])
    (folder / "d6.xml").write_text('<?xml version="1.0"?><i><chatid>1</chatid><d p="1,1,25,1,1,0,a,1">高能</d></i>')
    (folder / "d7.ass").write_text("[Script Info]")
    (folder / "settings.xml").write_text("<a/>")
    write_csv(folder / "videos.csv", [{"视频ID": "7", "标题": "一", "弹幕": 12, "评论": 3}])  # How many there are.
    written, report = prepare(folder, "--title", "标题")
    assert written.keys() >= EXPECTED.keys() and not any("高能" in answer(record) for record in written.values())
    notes = {Path(line["file"]).name: line["note"] for line in report["files"]}
    assert all("skipped: danmaku" in notes[name] for name in notes if name[0] == "d") and len(notes) == 10
    assert "skipped" not in notes["videos.csv"]


def test_dropped_comments_are_not_read_again(tmp_path: Path) -> None:
    WRITERS["json"](tmp_path / "crawl")
    (tmp_path / "crawl/dropped.jsonl").write_text('{"reason": "empty", "id": "1", "text": "x"}\n')
    assert set(prepare(tmp_path / "crawl", "--title", "t")[0]) == {*EXPECTED, "50006"}  # Whose video is missing.


@pytest.mark.parametrize("name", ["z.json", "z.db", "z.csv", "z.jsonl", "z.xlsx", "z.sqlite3"])
@pytest.mark.parametrize("kind", ["pipe", "zero", "socket", "nowhere"])
def test_what_is_no_regular_file_is_skipped(tmp_path: Path, name: str, kind: str) -> None:
    """A pipe that nobody writes into, a device, a socket, a link to nothing; a link to a file is read."""
    WRITERS["json"](tmp_path / "crawl")
    path = tmp_path / "crawl" / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as end, contextlib.chdir(tmp_path / "crawl"):
            end.bind(name)
    else:
        path.symlink_to("/dev/zero" if kind == "zero" else tmp_path / "nowhere")
    (tmp_path / "elsewhere.json").write_text(json.dumps([comment(30)]))
    (tmp_path / "crawl/more_comments.json").symlink_to(tmp_path / "elsewhere.json")
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {*EXPECTED, "50030"}
    (note,) = [line["note"] for line in report["files"] if line["file"].endswith(name)]
    assert note == "skipped: not readable (no regular file)"


@pytest.mark.parametrize("cell", ["[" * 100_000 + "]" * 100_000, '{"x":' * 3000 + "1" + "}" * 3000], ids=["[[", "{{"])
@pytest.mark.parametrize("container", ["json", "jsonl"])
def test_a_deep_cell_is_a_torn_record(tmp_path: Path, container: str, cell: str) -> None:
    """Nested deeper than Python reads, in a file that is read record by record as another one is torn."""
    WRITERS["json"](tmp_path / "crawl")
    deep = json.dumps(comment(31, content="deep")).replace('"deep"', cell)
    rows = [json.dumps(comment(30)), deep, json.dumps(comment(32)), '{"comment_id": "5003']
    text = "[" + ",".join(rows) if container == "json" else "\n".join(rows)
    (tmp_path / f"crawl/more_comments.{container}").write_text(text)
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {*EXPECTED, "50030", "50032"}
    (torn,) = [line["torn"] for line in report["files"] if "more_comments" in line["file"]]
    assert torn == 2


@pytest.mark.parametrize("container", ["csv", "json", "jsonl", "db"])
def test_a_huge_cell_is_a_torn_record(tmp_path: Path, container: str) -> None:
    """Longer than DuckDB takes; the others of the file are read."""
    WRITERS["json"](tmp_path / "crawl")
    records = [comment(30), comment(31, content="长" * 20_000_000), comment(32)]
    path = tmp_path / f"crawl/more_comments.{container}"
    if container == "db":
        write_sqlite(path, {"bilibili_video_comment": records})
    else:
        {"csv": write_csv, "json": write_json, "jsonl": write_jsonl}[container](path, records)
    written, report = prepare(tmp_path / "crawl")
    assert set(written) == {*EXPECTED, "50030", "50032"}
    (line,) = [line for line in report["files"] if "more_comments" in line["file"]]
    assert (line["records"], line["torn"]) == (2, 1) and "skipped" not in line["note"]


def test_ctrl_c(tmp_path: Path) -> None:
    """Also while DuckDB works: one line, no traceback, nothing left behind."""
    comments = [comment(i, of=i % 9, content=f"回复 @小明 :@甲 {i}" * 9) for i in range(60_000)]
    write_json(tmp_path / "crawl/x_contents_1.json", [video(i) for i in range(9)])
    write_json(tmp_path / "crawl/x_comments_1.json", comments)
    folders = ["--data_dir", tmp_path / "crawl", "--output_dir", tmp_path / "out"]
    command = [sys.executable, "-u", ROOT / "prepare_data.py", *folders]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "videos" not in process.stdout.readline():  # all is read, it is being joined
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and error.startswith("\nStopped") and error.count("\n") == 2
    assert not (tmp_path / "out").exists()


def test_benchmark_runs() -> None:
    command = [sys.executable, ROOT / "benchmarks/bench_prepare_data.py", "--comments", "2000"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = json.loads(printed.strip().splitlines()[-1])
    assert figures["comments"] == 2000 and {"prepare_data.py", "plain script"} <= set(figures["results"])
