"""utils/data/crawl_files.py; test_prepare_data.py has broken files of every kind.

python -m pytest tests/test_utils_data_crawl_files.py
"""

import io
import json
import sqlite3
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
