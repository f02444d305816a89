"""Files of crawls: JSON, JSON lines, CSV, TSV, workbooks, SQLite, broken ones too, become tables of records."""

import codecs
import csv
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

Record = dict[str, Any]
# A file's table: its name, its columns, and its records, with None in the place of a torn one.
Table = tuple[str, set[str], Iterator[Record | None]]

# The columns that tell the crawler's tables.
REQUIRED = {"comments": {"comment_id", "video_id", "content"}, "videos": {"video_id", "title"}}
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".xlsx", ".db", ".sqlite", ".sqlite3")
# Bullet comments as programs save them; Bilibili's own XML has <d p="..."> in it.
DANMAKU_SUFFIXES = (".xml", ".ass")
OLD_WORKBOOK = ".xls"  # Found, but not read.
# What prepare_data.py writes.
OUR_FILES = ("data_train.json", "data_test.json", "report.json", "report.png")
DROPPED = "dropped.jsonl"
LABELS = "labels.jsonl"  # What people say of dropped and kept comments (utils.data.prepared).
# DuckDB takes no JSON object above 16 MB, and no comment or description has a thousandth of this.
LONGEST_RECORD_CHARS = 1 << 20
# A CSV file's cells are apart by one of these.
MARKS = ",\t;"
# Of objects inside each other, where Python's parser gives up: more than any record has, and less than it can take.
DEEP = 100
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
# With more such bytes among those outside ASCII a text is no UTF-8 with torn characters; GBK has 0.6.
MOST_TORN = 1 / 4
# With more such characters among those outside ASCII, and more than a few, a text is lost; random bytes have 0.27.
MOST_LOST = 1 / 8
# Of a workbook; tables of texts unpack to ten or twenty times their size.
SMALL_WORKBOOK_BYTES = 1 << 26
MOST_UNPACKED = 100
# A virtual table of a database may have no end.
TABLE_SECONDS = 600
DANMAKU = (
    "danmaku (bullet comments): they answer a moment of the picture, which no model of texts sees; take the comments "
    "below the video"
)
# How the crawler's records begin, and how many cells its rows have had in the versions since 2024.
BEGINNINGS = {
    "comments": (["comment_id", "parent_comment_id", "create_time", "video_id", "content"], {10, 12, 13}),
    "videos": (["video_id", "video_type", "title", "desc", "create_time"], {15, 16, 19, 20}),
}


class UnreadableError(Exception):
    """Its text is a sentence for people: why a file is not read, and what to do."""


def find_files(data_dir: Path, unlisted: Callable[[OSError], object] | None = None) -> list[Path]:
    """Lists the files that may hold crawled data, in linked folders too, without hidden ones and our own results.

    Args:
        data_dir: Where to look.
        unlisted: Told of each folder that cannot be listed.
    """
    found, seen = [], set()
    for folder, folders, names in os.walk(data_dir, onerror=unlisted, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # Excel leaves a "~$name.xlsx" beside an open file.
        found += [
            Path(folder, name)
            for name in sorted(names)
            if name.lower().endswith((*SUFFIXES, *DANMAKU_SUFFIXES, OLD_WORKBOOK))
            and not name.startswith((".", "~$"))
            and name not in (*OUR_FILES, DROPPED, LABELS)
        ]
    return found


def read_tables(path: Path) -> Iterator[Table]:
    """Opens a file of any kind. Records are read while the tables are iterated."""
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl"):
        with path.open(encoding=text_encoding(path), errors="replace") as file:
            columns = next((set(record) for record in scan_json(file) if record), set())
            file.seek(0)
            yield path.stem, columns, scan_json(file)
    elif suffix in (".csv", ".tsv"):
        with path.open(encoding=text_encoding(path), errors="replace", newline="") as file:
            yield path.stem, *scan_csv(file, "\t" if suffix == ".tsv" else MARKS)
    elif suffix == ".xlsx":
        yield from xlsx_tables(path)
    else:
        yield from sqlite_tables(path)


def tables_or_problem(path: Path) -> Iterator[Table | str]:
    """Opens a file like read_tables, and ends with a sentence if it is not read."""
    if not path.is_file():  # A pipe or a device would be read for ever.
        yield "not readable (no regular file)"
        return
    if path.suffix.lower() == OLD_WORKBOOK:
        yield "an old workbook; open it and save it as .xlsx or .csv"
        return
    try:
        if not path.name.lower().endswith(DANMAKU_SUFFIXES):
            yield from read_tables(path)
        elif path.suffix.lower() == ".ass" or has_danmaku(path):
            yield DANMAKU
    except UnreadableError as error:
        yield f"not readable: {error}"
    except Exception as error:  # a broken file may raise anything; the other files are still good
        yield f"not readable ({type(error).__name__}: {error})"


def has_danmaku(path: Path) -> bool:
    """Tells Bilibili's XML of bullet comments from any other."""
    with path.open("rb") as file:
        return re.search(rb"<d\s+p\s*=", file.read(1 << 16)) is not None


def scan_json(file: IO[str], chunk_chars: int = LONGEST_RECORD_CHARS) -> Iterator[Record | None]:
    """Reads the objects of a JSON array or of JSON lines one by one, going on after what cannot be parsed.

    A killed crawl leaves a truncated array, and two that write at once leave pieces of records.

    Args:
        file: The text.
        chunk_chars: How much is read at a time, more than any record has.

    Yields:
        The objects; one None for each stretch of broken text.
    """
    decode = json.JSONDecoder(strict=False).raw_decode
    text, at, broken = "", 0, False
    while True:
        if len(text) - at < chunk_chars:
            text, at = text[at:] + file.read(chunk_chars), 0
        start = text.find("{", at)
        if start < 0:
            at = len(text)
            if not (text := file.read(chunk_chars)):
                return
            at = 0
            continue
        try:
            record, at = decode(text, start)
            yield record
            broken = False
        except (ValueError, RecursionError) as error:
            at = deep_place(text, start) if isinstance(error, RecursionError) else start + 1
            if not broken:
                yield None
            broken = True


def deep_place(text: str, start: int) -> int:
    """Finds where the object at a place in a text has DEEP others around it; going there keeps the time linear."""
    depth = 0
    for token in TOKEN.finditer(text, start):
        depth += (token[0] in "{[") - (token[0] in "}]")
        if depth == DEEP:
            return token.end()
    return start + 1


def text_encoding(path: Path) -> str:
    """Tells UTF-8 with a few torn characters from UTF-16 and from the GBK and Big5 that a Chinese Excel writes.

    Raises:
        UnreadableError: if it is none of these.
    """
    with path.open("rb") as file:
        start = file.read(1 << 20)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    encoding = "utf-8-sig"
    torn = len(start) - len(start.decode("utf-8", errors="ignore").encode())
    if torn > MOST_TORN * len(start.translate(None, bytes(range(128)))):
        # Simplified Chinese is GB 2312, a part of GBK. Most of what Big5 means is in another part.
        text = start.decode("gb18030", errors="replace")
        rare = len(text) - len(text.encode("gb2312", errors="ignore").decode("gb2312"))
        is_big5 = rare > outside_ascii(text) / 4 and "\ufffd" not in start.decode("cp950", errors="replace")[:-1]
        encoding = "cp950" if is_big5 else "gb18030"
    text = start.decode(encoding, errors="replace")
    # A crash leaves zeros in a row; between other bytes they are UTF-16 without its mark, or no text.
    zeros = len(re.findall(rb"[^\0]\0(?!\0)", start[:1000]))
    if zeros > 5 or text.count("\ufffd") > max(10, MOST_LOST * outside_ascii(text)):
        raise UnreadableError(
            "its text is neither UTF-8 nor UTF-16, GBK or Big5, or was lost when it was saved; save it as UTF-8"
        )
    return encoding


def outside_ascii(text: str) -> int:
    """Counts a text's characters outside ASCII."""
    return len(text) - len(text.encode("ascii", errors="ignore"))


def scan_csv(file: IO[str], marks: str = MARKS, max_lines: int = 200) -> tuple[set[str], Iterator[Record | None]]:
    """Reads a CSV file that several processes may have written to at once, with commas, tabs or semicolons.

    A record that lost its end swallows the lines after it up to the next quotation mark. So of a record with a wrong
    number of cells, or with text behind a closing quotation mark, only the first line is given up, and reading goes on
    with the second.

    Args:
        file: The text, opened with newline="".
        marks: What may stand between the cells.
        max_lines: No comment has more lines.

    Returns:
        The columns, and the records, with a None for each stretch of torn lines and for each line in it that begins
        with an id, as a row does.

    Raises:
        UnreadableError: if the columns' names have no end.
    """
    # Spreadsheets and interrupted writes may leave one huge cell, which is no reason to give up the file.
    csv.field_size_limit(1 << 30)
    columns, delimiter = csv_header(file, marks, max_lines)

    def records() -> Iterator[Record | None]:
        waiting: list[str] = []  # lines to be read again, the next one last
        taken: list[str] = []  # the lines of this record

        def lines() -> Iterator[str]:
            while len(taken) < max_lines and (line := waiting.pop() if waiting else file.readline()):
                taken.append(line)
                yield line

        torn, kind = False, kind_of(set(columns))
        while True:
            try:
                cells = next(csv.reader(lines(), delimiter=delimiter, strict=True), None)
            except csv.Error:
                cells = ["torn"]
            if cells is None:
                return
            same = len(cells) == len(columns)
            if record := dict(zip(columns, cells, strict=True)) if same else of_another_version(cells, kind):
                yield record
                torn = False
            elif cells:  # an empty line is no record
                waiting += reversed(taken[1:])
                if not torn or re.match(r'"?\d+"?,', taken[0]):
                    yield None
                torn = True
            taken.clear()

    return set(columns), records()


def csv_header(file: IO[str], marks: str, max_lines: int) -> tuple[list[str], str]:
    """Reads the columns' names of a CSV file, behind empty lines and Excel's "sep=;".

    Returns:
        The names, and what stands between them: of the marks the one that finds most.

    Raises:
        UnreadableError: if a quotation mark has no end.
    """
    for line in iter(file.readline, ""):
        if said := re.fullmatch(r'"?sep=(.)"?[\r\n]*', line, re.IGNORECASE):
            marks = said[1]
        elif line.strip(f'{MARKS}" \r\n'):
            break
    else:
        return [], marks[0]
    lines = [line]
    while line and len(lines) < max_lines:  # A name may have several.
        found = []
        for mark in marks:
            with suppress(csv.Error):
                found.append((next(csv.reader(lines, delimiter=mark, strict=True)), mark))
        names, mark = max(found, key=lambda one: len(one[0]), default=([], ""))
        if len(names) > 1 or len(found) == len(marks):
            return names, mark
        line = file.readline()
        lines.append(line)
    raise UnreadableError("a quotation mark in its first line, that of the columns' names, is not closed; correct it")


def of_another_version(cells: list[str], kind: str | None) -> Record | None:
    """Reads a row that another version of the crawler wrote below the header of the first.

    Returns:
        The columns that all versions begin with; None for a row that is none of theirs.
    """
    if not kind:
        return None
    names, lengths = BEGINNINGS[kind]
    record = dict(zip(names, cells, strict=False))
    numbers = (record[name] for name in names if name.endswith(("_id", "_time")))
    return record if len(cells) in lengths and all(map(str.isdigit, numbers)) else None


def xlsx_tables(path: Path) -> Iterator[Table]:
    """Reads the sheets of a workbook, with the column names in the first row."""
    import openpyxl

    def value(column: str, cell: Any) -> Any:
        # A number as id is marked as such: it may have been rounded on its way (see the macro as_id).
        return float(cell) if column.endswith("_id") and isinstance(cell, int) else cell

    with zipfile.ZipFile(path) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    if unpacked > max(SMALL_WORKBOOK_BYTES, MOST_UNPACKED * path.stat().st_size):
        size = path.stat().st_size
        raise ValueError(f"it unpacks to {unpacked / 1e6:,.0f} MB from {size / 1e6:,.2f}, as no texts do")
    book = openpyxl.load_workbook(path, read_only=True)  # a formula as it was typed: =_= is a comment
    try:
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # some programs write a wrong size
            rows = sheet.iter_rows(values_only=True)
            columns = [str(cell) for cell in next(rows, ())]
            filled = (row for row in rows if any(cell is not None for cell in row))
            records = ({name: value(name, cell) for name, cell in zip(columns, row, strict=False)} for row in filled)
            yield sheet.title, set(columns), records
    finally:
        book.close()


def sqlite_tables(path: Path) -> Iterator[Table | str]:
    """Reads the tables of an SQLite database without ever writing to it, each for TABLE_SECONDS at most.

    Views, which may compute for ever, are named in a sentence.
    """
    import sqlite3

    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    database.text_factory = lambda raw: raw.decode("utf-8", errors="replace")
    start = time.monotonic()
    database.set_progress_handler(lambda: time.monotonic() > start + TABLE_SECONDS, 10_000)

    def records(columns: list[str], rows: sqlite3.Cursor) -> Iterator[Record]:
        try:
            yield from (dict(zip(columns, row, strict=True)) for row in rows)
        except sqlite3.OperationalError as error:
            if str(error) != "interrupted":
                raise
            raise TimeoutError(f"a table is read for {TABLE_SECONDS} seconds at most") from None

    def names(kind: str) -> list[str]:
        listed = database.execute("SELECT name FROM sqlite_master WHERE type = ? ORDER BY name", [kind])
        return [name for (name,) in listed.fetchall()]

    try:
        for name in names("table"):
            start = time.monotonic()
            rows = database.execute('SELECT * FROM "{}"'.format(name.replace('"', '""')))
            columns = [column[0] for column in rows.description]
            yield name, set(columns), records(columns, rows)
        if views := names("view"):
            yield f"views are not read ({', '.join(views)}): save them as tables (CREATE TABLE ... AS SELECT ...)"
    finally:
        database.close()


def kind_of(columns: set[str]) -> str | None:
    """Tells comments from videos by their columns: the crawler has renamed its files, but never these."""
    return next((kind for kind, required in REQUIRED.items() if required <= columns), None)
