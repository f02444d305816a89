"""utils/data/crawl_files.py; test_prepare_data.py has broken files of every kind.

python -m pytest tests/test_utils_data_crawl_files.py
"""

import io
import json
import random
import sqlite3
import time
from pathlib import Path

import pytest
from test_prepare_data import comment, dropped, prepare, quick_plot, video, write_json, write_sqlite  # noqa: F401

from utils.data import crawl_files


def test_scan_json_reads_in_pieces() -> None:
    """Whatever the size of a piece, the objects are those that json reads."""
    records = [comment(i, content="{" * (i % 3) + '文字\\"') for i in range(20)]
    for options in ({}, {"indent": 4}):
        text = json.dumps(records, ensure_ascii=False, **options)
        for chunk_chars in (1000, 1777, 1 << 20):
            assert list(crawl_files.scan_json(io.StringIO(text), chunk_chars)) == records


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_csv_of_any_office_program(tmp_path: Path, mark: str, encoding: str) -> None:
    rows = [("标题", "评论内容"), ("一个标题", f'有"引号"{mark}和\n第二行'), ("另一个标题", "第二条评论")]
    cells = (mark.join(f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row) for row in rows)
    (tmp_path / "x.csv").write_bytes("\r\n".join(cells).encode(encoding))
    ((name, columns, records),) = crawl_files.tables_or_problem(tmp_path / "x.csv")
    assert name == "x" and columns == {"标题", "评论内容"}


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "utf-16"])
def test_csv_records(tmp_path: Path, mark: str, encoding: str) -> None:
    lines = [f"标题{mark}评论内容", f"一个标题{mark}第一条", f"标题{mark}缺{mark}了", f'一个标题{mark}"第二{mark}条"']
    (tmp_path / "x.csv").write_bytes("\r\n".join(lines).encode(encoding))
    (rows,) = ([*records] for _, _, records in crawl_files.tables_or_problem(tmp_path / "x.csv"))
    assert [row and row["评论内容"] for row in rows] == ["第一条", None, f"第二{mark}条"]


def test_a_table_without_an_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a virtual table may be; what was read by then is kept, and the other tables are read."""
    folder = tmp_path / "crawl"
    write_json(folder / "contents.json", [video(0)])
    write_sqlite(folder / "a.db", {"more": [comment(i) for i in range(9000)], "other": [comment(9999)]})
    assert len(prepare(folder)[0]) == 9001
    clock = iter([0.0] * 9 + [1e9] * 9)
    monkeypatch.setattr(crawl_files.time, "monotonic", lambda: next(clock, 0.0))
    written, report = prepare(folder)
    (line,) = [line for line in report["files"] if "more" in line["file"]]
    assert line["note"] == "read up to an error: TimeoutError: a table is read for 600 seconds at most"
    assert 1000 < line["records"] < 9000 and len(written) == line["records"] + 1 and not dropped(report)


def test_a_database_is_read_only(tmp_path: Path) -> None:
    write_sqlite(tmp_path / "a.db", {"t": [comment(1)]})
    before = (tmp_path / "a.db").read_bytes()
    assert [name for name, _, _ in crawl_files.tables_or_problem(tmp_path / "a.db")] == ["t"]
    assert (tmp_path / "a.db").read_bytes() == before and sqlite3.connect(tmp_path / "a.db").total_changes == 0


@pytest.mark.parametrize("opening", ['{"a":', '{"b": {}, "a": ', '{"a": "{[", "b": [[], {"c": 1}], "a": [', '[{"b":'])
def test_json_of_endless_openings(opening: str) -> None:
    """In a time that grows with the length alone; what comes behind is read."""
    good = [comment(i) for i in range(3)]
    text = opening * 20_000 + "\n" + "\n".join(map(json.dumps, good))
    start = time.perf_counter()
    records = list(crawl_files.scan_json(io.StringIO(text)))
    assert time.perf_counter() - start < 5 and records[0] is None
    assert [record for record in records if record and "comment_id" in record] == good


def test_json_that_is_deep_and_whole() -> None:
    """As deep as the parser goes it is read as before, and deeper without what lies outside."""
    for depth, whole in ((500, True), (5000, False)):
        (found, *_) = (one for one in crawl_files.scan_json(io.StringIO('{"a":' * depth + "1" + "}" * depth)) if one)
        levels = 0
        while isinstance(found, dict):
            found, levels = found["a"], levels + 1
        assert found == 1 and (levels == depth) == whole


LONG = "很长的一段话，" * 100
ENCODED = {
    "utf-8": "这个视频讲得真清楚", "utf-8-sig": "这个视频", "gb18030": "我觉得第二部分太快了", "utf-16": "笑死",
    "big5": "這個視頻講得真清楚，我覺得不錯",
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_encodings(tmp_path: Path, encoding: str, suffix: str) -> None:
    """However much ASCII is around the text."""
    for around in ("x", "x" * 5000):
        record = {"content": ENCODED[encoding], "url": around}
        text = "\n".join(map(",".join, [record, record.values()]))
        text = json.dumps([record], ensure_ascii=False) if suffix == ".json" else text
        (tmp_path / f"a{suffix}").write_bytes(text.encode(encoding))
        (rows,) = ([*records] for _, _, records in crawl_files.tables_or_problem(tmp_path / f"a{suffix}"))
        assert rows == [record]


def test_traditional_chinese_as_gbk_is_no_big5(tmp_path: Path) -> None:
    text = "這個視頻講得真清楚，我覺得第二部分講得太快了，請問背景音樂叫什麼名字"
    (tmp_path / "a.csv").write_bytes(f"content,title\n{text},x\n".encode("gbk"))
    (rows,) = ([*records] for _, _, records in crawl_files.tables_or_problem(tmp_path / "a.csv"))
    assert rows == [{"content": text, "title": "x"}]


def test_a_few_torn_characters_are_still_utf_8(tmp_path: Path) -> None:
    raw = json.dumps([comment(i, content=LONG) for i in range(9)], ensure_ascii=False).encode()
    (tmp_path / "a.json").write_bytes(raw.replace("长".encode(), "长".encode()[:2], 60))
    (rows,) = ([*records] for _, _, records in crawl_files.tables_or_problem(tmp_path / "a.json"))
    assert [row["content"] == LONG for row in rows] == [False] + [True] * 8 and "很\ufffd的一段话" in rows[0]["content"]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.tsv"])
def test_a_text_that_is_lost_is_refused(tmp_path: Path, name: str) -> None:
    lost = json.dumps([{"content": "\ufffd" * 12 + "好"}], ensure_ascii=False)
    no_mark = "评论内容,标题\n" * 6
    for raw in (lost.encode(), random.Random(0).randbytes(9999), no_mark.encode("utf-16-le")):
        (tmp_path / name).write_bytes(raw)
        (problem,) = crawl_files.tables_or_problem(tmp_path / name)
        assert problem.startswith("not readable: its text is neither UTF-8") and "save it as UTF-8" in problem


def test_the_zeros_of_a_crash_are_no_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps(comment(1)).encode() + b"\0" * 9999 + json.dumps(comment(2)).encode())
    (rows,) = ([*records] for _, _, records in crawl_files.tables_or_problem(tmp_path / "a.jsonl"))
    assert rows == [comment(1), comment(2)]


HEADERS = {
    "nothing before": ("", ","), "empty lines": ("\r\n\n , ,\n", ","), "sep=;": ("sep=;\r\n", ";"),
    "sep=|": ("SEP=|\n", "|"), "sep of tabs, quoted": ('"sep=\t"\n\n', "\t"),
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_what_stands_before_the_columns(header: str) -> None:
    before, mark = HEADERS[header]
    text = f'{before}标题{mark}"评论\n内容"\n甲{mark}乙\n'
    columns, records = crawl_files.scan_csv(io.StringIO(text, newline=""))
    assert columns == {"标题", "评论\n内容"} and list(records) == [{"标题": "甲", "评论\n内容": "乙"}]


def test_the_mark_is_the_one_that_finds_most() -> None:
    for text, names in (
        ('评论;"a,b";标题\n', {"评论", "a,b", "标题"}), ("评论,标题;副\n", {"评论", "标题;副"}), ("\n\n", set()),
    ):  # fmt: skip
        assert crawl_files.scan_csv(io.StringIO(text))[0] == names


@pytest.mark.parametrize("rows", [1, 1000])
def test_a_header_that_is_not_closed(tmp_path: Path, rows: int) -> None:
    (tmp_path / "a.csv").write_text('"评论内容,标题\n' + "真好,显卡\n" * rows, encoding="utf-8")
    (problem,) = crawl_files.tables_or_problem(tmp_path / "a.csv")
    assert problem.startswith("not readable: a quotation mark in its first line")


def test_tabs_and_old_workbooks(tmp_path: Path) -> None:
    (tmp_path / "a.TSV").write_text('标题,副\t评论,内容\n甲,\t"乙\n丙"\n', encoding="utf-8")
    (tmp_path / "b.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    table, problem = (one for path in crawl_files.find_files(tmp_path) for one in crawl_files.tables_or_problem(path))
    assert table[1] == {"标题,副", "评论,内容"} and problem == "an old workbook; open it and save it as .xlsx or .csv"
