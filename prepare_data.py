"""Turns crawled Bilibili comments into training data: every comment is an answer to "write a comment on this video".

    python prepare_data.py --total 2000

Reads whatever MediaCrawler wrote below --data_dir: json, jsonl, csv, xlsx and sqlite, videos and comments in any mix;
other tables of comments, whose columns are guessed or named (--columns); and answers of Bilibili's API.
Writes into --output_dir
    data_train.json, data_test.json    [{"id", "video_id", "conversations": [{"from", "value"}, ...]}], a record a line
    report.json, report.png            what was read, kept and dropped, and how long the texts are

A video's comments stand together, and all are in training or all in the test set. Which of the two depends on the
video's id, the seed and the share alone, so that a later run with more data moves nothing across.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from itertools import chain, islice, repeat
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from utils.cli import ArgumentParser, boolean, parse_columns
from utils.data.cleaning import MACROS, REASONS, Rules, cap, find_bait, has_contact, masked, reasons, sql_text
from utils.data.contacts import MASK, SOMEONE
from utils.data.crawl_columns import (
    MADE,
    NAMES,
    NO_COMMENTS,
    VIDEO_ID_DIGITS,
    Kept,
    Record,
    column,
    converted,
    escaped,
    is_danmaku,
    listed,
    recognised,
    title_id,
)
from utils.data.crawl_files import (
    DANMAKU,
    DROPPED,
    LONGEST_RECORD_CHARS,
    MARKS,
    OUR_FILES,
    SUFFIXES,
    Table,
    csv_header,
    find_files,
    kind_of,
    scan_json,
    tables_or_problem,
    text_encoding,
)
from utils.data.crawl_replies import converted_replies, kind_of_answers, unread_lists
from utils.data.records import MENTIONS, SYSTEM_PROMPT, WHITESPACE
from utils.files import atomic_writes, from_root, shown

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

COLUMNS = {
    "comments": ["comment_id", "parent_comment_id", "video_id", "content", "create_time", "last_modify_ts",
                 "like_count", "user_id", "creator_hash"],
    "videos": ["video_id", "video_url", "title", "desc", "last_modify_ts", "user_id", "creator_hash"],
    "parents": ["comment_id", "content"],
}
# DuckDB takes some 10 ms a file, so small ones are read here and loaded together.
SMALL_BYTES = 1 << 18
SPILLED_BYTES = 1 << 26
NOBODY = -2  # In the place of a video that is none.
# Of tables that are not the crawler's: so many records show which columns there are.
SAMPLED_RECORDS = 100
# An answer of the API with its pages is parsed at once up to this length.
LONGEST_ANSWER_CHARS = 1 << 24
UPLOADERS = re.compile(r"creators|contacts?(_|$)|dynamics?(_|$)|up_info", re.IGNORECASE)
OTHER_PLATFORMS = re.compile(r"(^|[/_])(xhs|douyin|dy|kuaishou|ks|weibo|wb|tieba|zhihu)(?=[/_])", re.IGNORECASE)

# The crawler's own form is "回复 @name :"; people who copy it leave out the space.
REPLY_PREFIX = r"^(?:[\s\p{Cf}]*回复\s*[@＠](?:[^:：\n]{1,40}? :|[^\s:：]{1,40}\s*[:：])\s*)+"
# E-mail addresses and mentions, but not "4K@120Hz". Group 1 is what stands before the @ and stays. \p{Cf} are the
# characters without a width that come along when a mention is copied.
_NAMES = r"(?:[@＠]\p{Cf}*[\p{L}\p{M}\p{N}_·-]+\p{Cf}*)+"
MENTION = (
    r"[0-9A-Za-z._+-]+@[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*\.[A-Za-z]{2,}"
    rf"|(^|[^0-9A-Za-z]){_NAMES}"
    r"|(?:[@＠]\p{Cf}*(?:[\p{L}\p{M}_·-]|\p{N}{5})[\p{L}\p{M}\p{N}_·-]*)+"
)
# Other ways to write the @, and the marks that a search puts around a name.
MENTION_FORMS = {"﹫": "@", "&#64;": "@", "&#x40;": "@", "&amp;#64;": "@", "&commat;": "@"}
FOUND_NAME = r"([@＠])<[A-Za-z]+[^>]*>([^<]*)</[A-Za-z]+>"
_AT = rf"(?:[@＠]|{'|'.join(MENTION_FORMS)})"
# The group makes the engine slow, and few texts need it: those with one of these. In the others this finds the same.
BEFORE_AT = rf"[0-9A-Za-z._+-]{_AT}|<[A-Za-z]"
PLAIN_MENTION = rf"\B{_NAMES}"
# Names that begin with emoji, marks or a space: rare, and too slow to look for everywhere.
_MARKS = r"[\p{So}\p{Sk}\x{FE0F}.~～『「【《*^（(“\"'！!]"
MARKED_NAME = rf"{_AT}\p{{Cf}}*(?:{_MARKS}|[ \x{{A0}}\x{{3000}}]{{1,2}}\p{{Cf}}*[\p{{L}}\p{{M}}_])|<[A-Za-z]"
MARKED_MENTION = (
    rf"(^|[^0-9A-Za-z])[@＠](?:(?:\p{{Cf}}*{_MARKS})+(?:\p{{Cf}}*[\p{{L}}\p{{M}}\p{{N}}_·-]+[』」】》~～）)”\"']?)?"
    r"|\p{Cf}*[ \x{A0}\x{3000}]{1,2}\p{Cf}*[\p{L}\p{M}_][\p{L}\p{M}\p{N}_·-]*)"
)
RATE = r"[@＠]([0-9]+(?:\.[0-9]+)?[ ]?(?:[GMk]?[Hh]z|fps|帧|m?V|m?W|[mn]m|℃))"  # "功耗@3.5GHz"
ASIDE, RATE_ASIDE = "\ue000", "\ue001"  # Characters that are nobody's.

EMOTICONS = r"(\s*\[[^\[\]]+\])+\s*"

EXAMPLES = 3  # Of each reason in the report.
EXAMPLE_CHARS = 200
DROPS = {
    "torn": "torn row",
    "duplicate": "duplicate of another record",
    "empty": "no text (or nothing but mentions)",
    "video_id_lost": "no video id (lost, or rounded by Excel)",
    "video_missing": "video not among the files",
    "parent_unknown": "reply that does not say to whom (id lost, or crawled before May 2024)",
    "parent_missing": "reply whose parent is not among the files or has no text",
    **REASONS,
    "beyond_total": "more than --total",
}


# ---------------------------------------------------------------------------------------------------------------------
# Loading: all tables into two tables of DuckDB

# In the tables of comments a parent of 0 says that there is none, and NULL that there is one whose id is not known. A
# video of -1 marks what is no record of its own, but the text of a comment that another one answers.
SCHEMA = r"""
-- The crawler writes seconds. A row that is shifted has some other text here.
CREATE MACRO is_time(x) AS
    regexp_full_match(x, '|[0-9]+(\.[0-9]*)?([eE]\+?[0-9]+)?|[0-9]{1,4}[-/.年][0-9]{1,2}[-/.月][0-9]{1,4}.*');
CREATE MACRO is_number(x) AS regexp_full_match(x, '[0-9]+(\.[0-9]*)?([eE]\+?[0-9]+)?');
-- trim() with a set of characters is slow, and hardly a text needs it.
CREATE MACRO strip(x) AS CASE
    WHEN contains({whitespace}, left(x, 1)) OR contains({whitespace}, right(x, 1)) THEN trim(x, {whitespace}) ELSE x
END;
-- NULL for an id that went through Excel: 2.28539E+11, or the same as a number, 228539000000.0
CREATE MACRO as_id(x) AS CASE
    WHEN regexp_full_match(x, '[0-9]{1,18}') THEN x::BIGINT
    WHEN regexp_full_match(x, '[0-9]{1,18}\.0*') AND NOT regexp_matches(x, '00000\.') THEN split_part(x, '.', 1)::BIGINT
END;
CREATE TABLE raw_comments (id BIGINT, parent BIGINT, video BIGINT, content VARCHAR, modified DOUBLE, torn BOOLEAN,
    likes BIGINT, author UBIGINT);
CREATE TABLE raw_videos (id BIGINT, title VARCHAR, description VARCHAR, modified DOUBLE, author UBIGINT);
CREATE MACRO author_of(user_id, creator_hash) AS
    CASE WHEN coalesce(nullif(creator_hash, ''), user_id, '') NOT IN ('', '0')
    THEN hash(coalesce(nullif(creator_hash, ''), user_id)) END;
"""

INSERT = {
    # A comment whose own id is lost gets one from what it says, below zero so that nothing can name it as parent.
    "comments": r"""
        INSERT INTO raw_comments SELECT
            coalesce(as_id(comment_id),
                     -(md5_number_lower(concat_ws('|', video_id, create_time, content)) >> 2)::BIGINT),
            CASE WHEN lower(coalesce(parent_comment_id, '')) IN ('', '0', '0.0', 'nan', 'none', 'null') THEN 0
                 ELSE as_id(parent_comment_id) END,
            as_id(video_id), content, coalesce(try_cast(last_modify_ts AS DOUBLE), 0),
            NOT (coalesce(is_number(comment_id), false) AND coalesce(is_time(create_time), true)
                 AND coalesce(last_modify_ts, '0') <> ''),
            try_cast(like_count AS BIGINT), author_of(user_id, creator_hash)
        FROM {source}""",
    "videos": r"""
        INSERT INTO raw_videos SELECT
            coalesce(as_id(video_id), try_cast(regexp_extract(video_url, 'av([0-9]{1,18})', 1) AS BIGINT)),
            title, "desc", coalesce(try_cast(last_modify_ts AS DOUBLE), 0), author_of(user_id, creator_hash)
        FROM {source}""",
    # Of copies the later one counts, so that this one does only if the comment is not among the files.
    "parents": r"""
        INSERT INTO raw_comments SELECT as_id(comment_id), 0, -1, content, -1, false, NULL, NULL FROM {source}""",
}  # fmt: skip


# DuckDB takes a name for UTF-8 and for a pattern, and in a pattern a backslash cannot stand for itself.
NO_NAME = re.compile(r"[\ud800-\udfff]|\\.*[*?[]|[*?[].*\\", re.DOTALL)


def insert_json(con: "DuckDBPyConnection", path: Path, kind: str, lines: bool) -> int:
    """Loads a JSON file with DuckDB.

    Returns:
        The number of records.

    Raises:
        duckdb.InvalidInputException: if anything in the file cannot be parsed; nothing is inserted then.
    """
    columns = ", ".join(f"\"{name}\": 'VARCHAR'" for name in COLUMNS[kind])
    # The name is a pattern to DuckDB, and crawled names have brackets in them at times.
    name = re.sub(r"([*?[])", r"[\1]", str(path))
    form = "newline_delimited" if lines else "array"
    source = f"read_json({sql_text(name)}, format = '{form}', columns = {{{columns}}})"
    return con.execute(INSERT[kind].replace("{source}", source)).fetchone()[0]


def spill(records: Iterable[Kept | tuple[str, None] | None], work: Path) -> tuple[Counter[str], int, str]:
    """Writes records as JSON lines for DuckDB, behind those that are in the files already, one for each kind.

    Args:
        records: With their kinds; None for a torn one.
        work: Where the files lie.

    Returns:
        The number of records of each kind, the number of torn ones, and why reading ended early ("" if it did not).
    """

    def text(value: Any) -> str:  # a date in a sheet, or bytes in a database
        return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)

    counts, torn, files = Counter[str](), 0, {}
    with ExitStack() as stack:
        try:
            for pair in records:
                if pair is None or pair[1] is None:
                    torn += 1
                    continue
                kind, record = pair
                values = {key: record[key] for key in COLUMNS[kind] if record.get(key) is not None}
                line = json.dumps(values, ensure_ascii=False, default=text)
                if len(line) > LONGEST_RECORD_CHARS:
                    torn += 1
                    continue
                if kind not in files:
                    file = (work / f"{kind}.jsonl").open("a", encoding="utf-8", errors="replace")
                    files[kind] = stack.enter_context(file)
                files[kind].write(line + "\n")
                counts[kind] += 1
        except Exception as error:  # a broken file may raise anything; what came before is still good
            return counts, torn, f"{type(error).__name__}: {error}"
    return counts, torn, ""


def skipped(path: str | Path, reason: str) -> Record:
    """Writes the report's line for what is not read."""
    return {"file": shown(path), "kind": None, "records": 0, "torn": 0, "note": f"skipped: {reason}"}


def is_book(path: Path) -> bool:
    """Tells files of several tables."""
    return path.suffix.lower() in (".xlsx", ".db", ".sqlite", ".sqlite3")


def load_crawled_table(
    con: "DuckDBPyConnection", path: Path, place: Path, kind: str, records: Iterator[Record | None], work: Path,
) -> Record:
    """Loads a table of the crawler's: a large JSON file with DuckDB, others record by record.

    Args:
        con: With the tables of SCHEMA.
        path: The file.
        place: What it is called in the report.
        kind: Of the records.
        records: The table's.
        work: For temporary files.

    Returns:
        The table's line for the report.
    """
    import duckdb

    line = {"file": shown(place), "kind": kind, "records": 0, "torn": 0, "note": ""}
    is_json = path.suffix.lower() in (".json", ".jsonl")
    by_duckdb = is_json and path.stat().st_size > SMALL_BYTES and not NO_NAME.search(str(path))
    if by_duckdb and text_encoding(path) == "utf-8-sig":
        insert_spilled(con, kind, work)  # Of equal copies the last one counts.
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            lines = file.read(1 << 16).lstrip().startswith("{")
        try:
            return {**line, "records": insert_json(con, path, kind, lines)}
        except duckdb.InvalidInputException:
            line["note"] = "damaged: read record by record"
    counts, line["torn"], problem = spill(zip(repeat(kind), records), work)
    line["records"] = counts[kind]
    if is_json and line["torn"]:
        line["note"] = "damaged: read record by record"
    line["note"] = f"read up to an error: {problem}" if problem else line["note"]
    return line


def load_other_table(
    path: Path, place: Path, table: Table, work: Path, named: Mapping[str, str], has_title: bool,
    found: dict[str, list[str]], barred: str,
) -> list[Record] | str:
    """Loads answers of the API, or a table of comments or videos whose columns are named or guessed.

    Args:
        path: The file.
        place: What it is called in the report.
        table: One of its tables.
        work: For temporary files.
        named: What --columns says.
        has_title: Whether there is a --title.
        found: Gets the table's columns.
        barred: Why its name says that these are no comments; "" if it does not. The API's answers are read even so.

    Returns:
        The lines for the report, none where the name and the columns say the same; or why the table is none of these.
    """
    _, columns, records = table
    first = list(islice(records, SAMPLED_RECORDS))
    sample = [record for record in first if record]
    there = list(dict.fromkeys(chain.from_iterable(sample))) or sorted(columns)
    found[shown(place)] = there
    if path.suffix.lower() in (".json", ".jsonl") and (kind := kind_of_answers(sample)):
        return load_answers(path, place, work, sample) if kind == "api" else [skipped(place, DANMAKU)]
    if not sample:
        why = f"all rows are torn: none has as many cells as there are columns ({listed(there)})"
        why = why if first and there else f"no rows below the columns {listed(there)}"
        return [] if is_book(path) or barred else why if there else f"{NO_COMMENTS}, got no records"
    meant = "danmaku" if is_danmaku(there) else recognised(sample, there, named, has_title)
    if barred:
        none = isinstance(meant, str) and meant.startswith(("danmaku", NO_COMMENTS))
        return [] if none else [skipped(place, barred)]
    if isinstance(meant, str):
        return [skipped(place, DANMAKU)] if meant == "danmaku" else meant
    if twice := [name for name in repeated_columns(path) if name in meant.values()]:
        return f"two columns are called {twice[0]}, and one of them is needed; give the other one another name"
    left_out = Counter[str]()
    rows = converted(chain(first, records), meant, shown(place), path.suffix.lower() == ".xlsx", left_out)
    counts, torn, problem = spill(rows, work)
    used = {name: theirs for name, theirs in meant.items() if name in NAMES}
    note = "columns: " + ", ".join(f"{name}={escaped(theirs.strip())}" for name, theirs in used.items())
    if any(column([theirs], named.get(name, "")) is None for name, theirs in used.items()):
        note = f"{note.replace('columns', 'columns guessed', 1)} (to change it: --columns 'NAME=COLUMN,...')"
    notes = [f"read up to an error: {problem}"] * bool(problem) + [note]
    return report_lines(place, counts, torn, "; ".join(notes + notes_of_unread(sample, left_out)))


def repeated_columns(path: Path) -> list[str]:
    """The names that several columns of a CSV file have; of other files none."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        return []
    with path.open(encoding=text_encoding(path), errors="replace", newline="") as file:
        names, _ = csv_header(file, "\t" if path.suffix.lower() == ".tsv" else MARKS, max_lines=200)
    return [name for name, times in Counter(names).items() if times > 1]


def load_answers(path: Path, place: Path, work: Path, sample: list[Record]) -> list[Record]:
    """Loads a file of answers of Bilibili's API, which begins with these records; the lines for the report."""
    left_out = Counter[str]()
    with path.open(encoding=text_encoding(path), errors="replace") as file:
        counts, torn, problem = spill(converted_replies(scan_json(file, LONGEST_ANSWER_CHARS), left_out), work)
    notes = [f"read up to an error: {problem}"] * bool(problem) + ["answers of Bilibili's API"]
    return report_lines(place, counts, torn, "; ".join(notes + notes_of_unread(sample, left_out)))


def notes_of_unread(sample: list[Record], left_out: Counter[str]) -> list[str]:
    """Says what a file's first records have in them that is not read, and how many comments stand below no video."""
    notes = [f"not read: the lists {listed(lists)}"] if (lists := unread_lists(sample)) else []
    if left_out:
        kinds = ", ".join(sorted(left_out))
        notes.append(f"{left_out.total():,} below dynamics, articles and the like left out (type {kinds})")
    return notes


def report_lines(place: Path, counts: Counter[str], torn: int, note: str) -> list[Record]:
    """Writes the report's lines for a table that gave records of several kinds."""
    kinds = [kind for kind in ("comments", "videos") if counts[kind]] or ["comments"]
    lines = [{"file": shown(place), "kind": kind, "records": counts[kind], "torn": 0, "note": ""} for kind in kinds]
    lines[0] |= {"torn": torn, "note": note}
    return lines


def insert_spilled(con: "DuckDBPyConnection", kind: str, work: Path) -> None:
    """Loads what was spilled, if anything."""
    spilled = work / f"{kind}.jsonl"
    if spilled.exists():
        insert_json(con, spilled, kind, lines=True)
        spilled.unlink()


def load_files(
    con: "DuckDBPyConnection",
    data_dir: Path,
    work: Path,
    say: Callable[[str], None],
    named: Mapping[str, str],
    has_title: bool,
) -> list[Record]:
    """Loads all files below a folder and says what each one gave.

    Args:
        con: Of an empty database.
        data_dir: The folder.
        work: For temporary files.
        say: Told of each file or table.
        named: What --columns says: our name -> the column of tables that are not the crawler's.
        has_title: Whether --title says what comments without a video are about.

    Returns:
        A line for every file or table, and kind that it holds: {file, kind, records, torn, note}.

    Raises:
        SystemExit: if no table that is not the crawler's has a column that --columns names.
    """
    con.execute(SCHEMA.replace("{whitespace}", sql_text(WHITESPACE)) + MACROS)
    report: list[Record] = []
    found: dict[str, list[str]] = {}  # Columns by table.
    crawled: dict[str, list[str]] = {}  # Those of the crawler's.

    def tell(line: Record) -> None:
        torn = f", {line['torn']:,} torn" if line["torn"] else ""
        kind = counted(line["records"], line["kind"]) + torn if line["kind"] else ""
        say(f"  {line['file']}: " + "; ".join(filter(None, [kind, line["note"]])))
        report.append(line)

    def unlisted(error: OSError) -> None:
        tell(skipped(error.filename, f"cannot be listed ({error.strerror})"))

    def load(path: Path, place: Path, table: Table) -> list[Record] | str:
        name, columns, records = table
        kind = kind_of(columns)
        platform = OTHER_PLATFORMS.search(f"{path.relative_to(data_dir).as_posix()}/{path.stem}/")
        if is_book(path) and OTHER_PLATFORMS.search(f"/{name}/"):
            return []
        barred = ""
        if platform:
            barred = f"{platform[2]!r} in its path names another platform; if these are Bilibili's, rename it"
        elif not kind and (about := UPLOADERS.search(name)):
            barred = f"{about[0]!r} in its name says that it is about people; if these are comments, rename it"
        if kind and barred:
            return [skipped(place, barred)]
        # No comments of the crawler's have the video's title beside them.
        if not kind or kind == "comments" and "title" in columns:
            return load_other_table(path, place, table, work, named, has_title, found, barred)
        crawled[shown(place)] = sorted(columns)
        return [load_crawled_table(con, path, place, kind, records, work)]

    for path in find_files(data_dir, unlisted):
        unknown, known = [], False
        for table in tables_or_problem(path):
            if isinstance(table, str):
                tell(skipped(path, table))
                continue
            place = path.with_name(path.name if table[0] == path.stem else f"{path.name} [{table[0]}]")
            lines = load(path, place, table)
            for kind in COLUMNS:
                if (spilled := work / f"{kind}.jsonl").exists() and spilled.stat().st_size > SPILLED_BYTES:
                    insert_spilled(con, kind, work)
            if isinstance(lines, str):
                unknown.append(skipped(place, lines))
                continue
            for line in lines:
                tell(line)
                known |= line["kind"] is not None
        # A database with comments holds tables of other things too; a workbook's sheets are somebody's own.
        silent = known and is_book(path) and path.suffix.lower() != ".xlsx"
        for line in unknown:
            if not (silent and line["note"].startswith(f"skipped: {NO_COMMENTS}")):
                tell(line)
    for kind in COLUMNS:
        insert_spilled(con, kind, work)
    missing = [one for one in named.values() if one and not any(column(there, one) for there in found.values())]
    if missing:
        lines = [f"  {place}: {listed(there)}" for place, there in (found | crawled).items()] or ["  none"]
        got = " or ".join(map(repr, missing))
        own = any(column(there, one) for there in crawled.values() for one in missing)
        aside = " but MediaCrawler's own, which are read as they are" if own else ""
        raise SystemExit("\n".join([f"--columns: no table has a column {got}{aside}. The columns found:", *lines]))
    return report


def join_titles(con: "DuckDBPyConnection", say: Callable[[str], None]) -> None:
    """Joins what is known of videos by their titles alone to the video of that title, if there is exactly one.

    Otherwise one video would be in training and in the test. And numbers of somebody's own that two tables give to
    different videos are taken from both, since the comments below them may be about either.

    Args:
        con: With all that was read.
        say: Told of these numbers.
    """
    own = f"id >= {MADE} OR id < {10 ** (VIDEO_ID_DIGITS - 1)} AND modified = 0"
    if not rows_in(con, f"raw_videos WHERE {own}"):
        return
    titles, own_titles = {}, {}  # title -> ids, id -> titles
    rows = con.execute(f"SELECT DISTINCT id, title, {own} FROM raw_videos WHERE id IS NOT NULL AND title <> ''")
    for id, title, is_own in rows.fetchall():
        by_title = int(title_id(re.sub("</?em[^>]*>", "", title)))
        titles.setdefault(by_title, set()).add(id)
        if is_own:
            own_titles.setdefault(id, set()).add(by_title)
    twice = sorted(id for id, several in own_titles.items() if len(several) > 1)
    if twice:
        say(f"  {counted(len(twice), 'video numbers')} with different titles in different tables, such as {twice[0]}: "
            "the comments are about one of them. Put the title beside the comments, or prepare the tables one by one.")
    same = dict.fromkeys(twice, NOBODY)
    for by_title, several in titles.items():
        if len(others := several - {by_title, *twice}) == 1:
            same[by_title] = others.pop()
    pairs = [[*same], [*same.values()]]
    con.execute("CREATE TABLE same AS SELECT unnest($1::BIGINT[]) old, unnest($2::BIGINT[]) new", pairs)
    con.execute("UPDATE raw_comments SET video = new FROM same WHERE video = old")
    con.execute("DELETE FROM raw_videos WHERE id IN (SELECT old FROM same); DROP TABLE same")


def title_the_rest(con: "DuckDBPyConnection", title: str, description: str) -> None:
    """Gives comments a video with this title whose own video is not among those that were read."""
    con.execute(f"UPDATE raw_comments SET video = {title_id(title)} WHERE video IS NULL AND NOT torn")
    con.execute(
        """INSERT INTO raw_videos SELECT DISTINCT video, $1, $2, -1, NULL FROM raw_comments
           WHERE NOT torn AND video <> -1 AND video NOT IN (SELECT id FROM raw_videos WHERE id IS NOT NULL)""",
        [title, description],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Joining: which comments are kept, and where they stand


def anonymized(column: str, anonymize: bool) -> str:
    """Writes the SQL that removes "回复 @name :" and replaces mentions in a text column, and trims it."""
    if anonymize:
        rates = f"regexp_replace({column}, {sql_text(RATE)}, {sql_text(RATE_ASIDE + chr(92) + '1')}, 'g')"
        plain = f"CASE WHEN regexp_matches({column}, '[@＠][0-9]') THEN {rates} ELSE {column} END"
        for form, at in MENTION_FORMS.items():
            plain = f"replace({plain}, {sql_text(form)}, {sql_text(at)})"
        plain = f"regexp_replace({plain}, {sql_text(FOUND_NAME)}, {sql_text(chr(92) + '1' + chr(92) + '2')}, 'g')"
        text = f"regexp_replace({plain}, {sql_text(REPLY_PREFIX)}, '')"
        # What is found first is put aside, as the second pattern would go on where a name ends.
        marked = f"regexp_replace({text}, {sql_text(MARKED_MENTION)}, {sql_text(chr(92) + '1' + ASIDE)}, 'g')"
        text = f"CASE WHEN regexp_matches({column}, {sql_text(MARKED_NAME)}) THEN {marked} ELSE {text} END"
        any_masked = f"regexp_replace({text}, {sql_text(MENTION)}, {sql_text(chr(92) + '1' + SOMEONE)}, 'g')"
        masked = f"regexp_replace({text}, {sql_text(PLAIN_MENTION)}, {sql_text(SOMEONE)}, 'g')"
        masked = f"CASE WHEN regexp_matches({column}, {sql_text(BEFORE_AT)}) THEN {any_masked} ELSE {masked} END"
        masked = f"replace(replace({masked}, {sql_text(ASIDE)}, {sql_text(SOMEONE)}), {sql_text(RATE_ASIDE)}, '@')"
        # Most texts have no mention, and looking for a character is cheap.
        has_any = " OR ".join(f"contains({column}, {sql_text(form)})" for form in ("@", "＠", *MENTION_FORMS))
        column = f"CASE WHEN {has_any} THEN {masked} ELSE {column} END"
    return f"strip({column})"


def make_tables(con: "DuckDBPyConnection", args: argparse.Namespace, test_share: float, rules: Rules | None) -> None:
    """Removes duplicates, and writes texts as they are to be read: the tables `comments` and `videos`.

    Args:
        con: With the tables of SCHEMA.
        args: The command's.
        test_share: Part of the videos that is held out.
        rules: Of the cleaning, if there is any.
    """
    anonymize, seed = args.anonymize, args.seed
    masks = rules is not None and rules.contacts != "keep"
    # A name before an answer is none of its contact details.
    prefixed = f"starts_with(content, '回复') AND regexp_matches(content, {sql_text(REPLY_PREFIX)})"
    without = f"regexp_replace(content, {sql_text(REPLY_PREFIX)}, '')"
    own = f"CASE WHEN {prefixed} THEN {without} ELSE content END" if anonymize else "content"
    # Copies differ in the time of writing only; the row number decides between equal ones.
    newest = "SELECT arg_max(rowid, (modified, rowid)) FROM {} WHERE {} GROUP BY id"
    title = "regexp_replace(coalesce(title, ''), '</?em[^>]*>', '', 'g')"
    # This is utils.data.records.comment_prompt in SQL, in which a million prompts take a second.
    tells_nothing = f"description IN ('', '-') OR regexp_full_match(description, {sql_text(MENTIONS)})"
    head = f"""'视频标题：' || title || CASE WHEN {tells_nothing} THEN '' ELSE '\n视频简介：' || description END"""
    said, has_mark = "text", "false"
    for mark in [SOMEONE] * anonymize + [MASK] * (rules is not None and rules.contacts == "mask"):
        said, has_mark = f"replace({said}, {sql_text(mark)}, '')", f"{has_mark} OR contains(text, {sql_text(mark)})"
    con.execute(f"""
        CREATE TABLE comments AS
            SELECT id, parent, video, CASE WHEN ({has_mark}) AND strip({said}) = '' THEN '' ELSE text END text,
                CASE WHEN parent = 0 THEN regexp_matches(content, {sql_text(REPLY_PREFIX)}) END to_nobody,
                {"contact, likes, author, fold(text) letters" if rules else "likes"}
            FROM (SELECT * EXCLUDE shown, {anonymized("coalesce(shown, '')", anonymize)} text
                FROM (SELECT *, {masked("said", "contact") if masks else "said"} shown
                    FROM (SELECT *, {has_contact("said") if masks else "false"} contact
                        FROM (SELECT *, {own if masks else "content"} said FROM raw_comments
                              WHERE rowid IN ({newest.format("raw_comments", "NOT torn")})))));
        CREATE TABLE videos AS
            SELECT id, to_json(head)::VARCHAR head, length(head) head_chars,
                left(md5('{seed}:split:' || id), 13) < '{int(test_share * 16**13):013x}' test,
                row_number() OVER (ORDER BY md5('{seed}:order:' || id)) position, title, author
            FROM (SELECT id, {head} head, fold(title) title, author
                FROM (SELECT id, author, {anonymized(title, anonymize)} title,
                        {anonymized("coalesce(description, '')", anonymize)} description
                    FROM (SELECT id, author, {masked("title") if masks else "title"} title,
                            {masked("description") if masks else "description"} description FROM raw_videos
                          WHERE rowid IN ({newest.format("raw_videos", "id IS NOT NULL")}))))
            ORDER BY position;
    """)


def join_tables(con: "DuckDBPyConnection", args: argparse.Namespace, test_share: float, dropped: Path | None) -> Record:
    """Removes duplicates, finds videos and parents, cleans, and gives every kept comment its place in the output.

    Leaves the table `kept` (place, test, id, video, ...) and `videos`. Texts are stored as JSON strings, ready to be
    written. The place of a comment counts from 1 over all, video by video in an order drawn from the seed.

    Args:
        con: With the tables of SCHEMA.
        args: The command's.
        test_share: Part of the videos that is held out.
        dropped: Where what is dropped is written to, if anywhere.

    Returns:
        Counts: `read`, the keys of DROPS that SQL can see, and `ids_made` (kept comments whose own id was lost); and
        `examples`: reason -> texts.
    """
    total, parent = args.total, "'\n父评论：' || p.text"
    rules = Rules(**{name: getattr(args, name) for name in Rules._fields}) if args.clean else None
    make_tables(con, args, test_share, rules)
    if rules and rules.drop_bait:
        find_bait(con)
    else:
        con.execute("CREATE TABLE bait (id BIGINT)")
    con.execute(f"""
        CREATE TABLE verdicts AS
            SELECT c.id, v.position, CASE
                WHEN c.text = '' THEN 'empty'
                WHEN c.video IS NULL THEN 'video_id_lost'
                WHEN v.id IS NULL THEN 'video_missing'
                WHEN c.parent IS NULL OR c.to_nobody THEN 'parent_unknown'
                WHEN c.parent <> 0 AND coalesce(p.text, '') = '' THEN 'parent_missing'
                {reasons(rules) if rules else ""} END reason
            FROM comments c LEFT JOIN videos v ON v.id = c.video LEFT JOIN bait ON bait.id = c.id
                LEFT JOIN comments p ON p.id = c.parent AND c.parent <> 0
            WHERE c.video IS DISTINCT FROM -1;
        DROP TABLE bait;
    """)
    if rules:
        cap(con, rules)
    best = f"QUALIFY row_number() OVER (ORDER BY likes DESC NULLS LAST, position, id) <= {total}"
    con.execute(f"""
        CREATE TABLE places AS
            SELECT id, row_number() OVER (ORDER BY position, id) place FROM (
                SELECT id, position FROM verdicts JOIN comments USING (id) WHERE reason IS NULL
                {best if total and args.prefer_liked else ""});
    """)
    counts = dict(con.execute("SELECT reason, count(*) FROM verdicts GROUP BY ALL").fetchall())
    usable = counts.pop(None, 0)
    counts["examples"] = examples(con)
    if dropped:
        row = f"reason, c.id::VARCHAR id, (v.head::JSON ->> '$') || coalesce({parent}, '') prompt, c.text"
        con.execute(f"""
            COPY (SELECT {row} FROM verdicts JOIN comments c USING (id) LEFT JOIN videos v ON v.id = c.video
                      LEFT JOIN comments p ON p.id = c.parent AND c.parent <> 0
                  WHERE reason IS NOT NULL ORDER BY verdicts.position, c.id)
            TO {sql_text(str(dropped))} (FORMAT json)""")
    records = "SELECT count(*), count(*) FILTER (torn) FROM raw_comments WHERE video IS DISTINCT FROM -1"
    counts["read"], counts["torn"] = con.execute(records).fetchone()
    counts["duplicate"] = counts["read"] - counts["torn"] - rows_in(con, "comments WHERE video IS DISTINCT FROM -1")
    con.execute(f"""
        DROP TABLE raw_comments; DROP TABLE raw_videos; DROP TABLE verdicts;
        CREATE TABLE kept AS
            SELECT place, position, v.test, c.id, c.video,
                to_json(c.text)::VARCHAR answer, to_json({parent})::VARCHAR parent,
                length(c.text) comment_chars, v.head_chars + coalesce(length({parent}), 0) prompt_chars,
                regexp_full_match(c.text, {sql_text(EMOTICONS)}) emoticons_only
            FROM places JOIN comments c USING (id) JOIN videos v ON v.id = c.video
                LEFT JOIN comments p ON p.id = c.parent AND c.parent <> 0
            {f"WHERE place <= {total}" if total else ""} ORDER BY place;
        DROP TABLE comments;
    """)
    counts["beyond_total"] = usable - rows_in(con, "kept")
    counts["ids_made"] = rows_in(con, "kept WHERE id < 0")
    return counts


def examples(con: "DuckDBPyConnection") -> dict[str, list[str]]:
    """Some of the dropped comments' texts, by reason."""
    rows = con.execute(f"""
        SELECT reason, text FROM verdicts JOIN comments USING (id) WHERE reason IS NOT NULL AND text <> ''
        QUALIFY row_number() OVER (PARTITION BY reason ORDER BY hash(id), id) <= {EXAMPLES}""").fetchall()
    found: dict[str, list[str]] = {}
    for reason, text in sorted(rows):
        found.setdefault(reason, []).append(text[:EXAMPLE_CHARS])
    return found


def rows_in(con: "DuckDBPyConnection", table: str) -> int:
    """Counts rows."""
    return con.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_splits(con: "DuckDBPyConnection", paths: list[Path], bucket: int = 100_000) -> None:
    """Writes the kept comments into two files, for training and for the test: JSON arrays, a record a line.

    The texts are joined a bucket of places at a time, since all records at once, with their titles and descriptions
    repeated, take far more memory. Both tables are in the order of the output, so that a bucket touches its own part of
    them only, which matters when they have been moved out to disk. One bucket is written while the next is joined.
    """
    system = json.dumps({"from": "system", "value": SYSTEM_PROMPT}, ensure_ascii=False)
    # [2:-2] takes off the quotation marks of a JSON string. Bytes spare Python the decoding and encoding.
    query = f"""
        SELECT place, test, encode('{{"id": "' || CASE WHEN id < 0 THEN 'lost' || -id ELSE id::VARCHAR END
            || '", "video_id": "' || video || '", "conversations": [' || {sql_text(system)}
            || ', {{"from": "user", "value": "' || head[2:-2] || coalesce(parent[2:-2], '')
            || '"}}, {{"from": "assistant", "value": ' || answer || '}}]}}') line
        FROM (SELECT * FROM kept WHERE place > $1 AND place <= $2) JOIN
            (SELECT position, head FROM videos WHERE position BETWEEN $3 AND $4) USING (position)"""
    last = con.execute("SELECT max(place) FROM kept").fetchone()[0]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        writer = stack.enter_context(ThreadPoolExecutor(1))
        separators = [b"[\n", b"[\n"]

        def write(rows: dict[str, Any]) -> None:
            order = rows["place"].argsort()  # sorting numbers here is cheaper than sorting texts in the query
            test, lines = rows["test"][order], rows["line"][order]
            for split, file in enumerate(files):
                if chosen := lines[test == split].tolist():
                    file.write(separators[split])
                    file.write(b",\n".join(chosen))
                    separators[split] = b",\n"

        written = writer.submit(lambda: None)
        for start in range(0, last, bucket):
            places = [start, start + bucket]
            videos = con.execute("SELECT min(position), max(position) FROM kept WHERE place > ? AND place <= ?", places)
            rows = con.execute(query, places + list(videos.fetchone())).fetchnumpy()
            written.result()  # no more than one bucket waits in memory, and a full disk is reported at once
            written = writer.submit(write, rows)
        written.result()
        for file, separator in zip(files, separators, strict=True):
            file.write(b"[\n]\n" if separator == b"[\n" else b"\n]\n")


def measure(con: "DuckDBPyConnection") -> Record:
    """Counts what is kept: splits, replies, emoticon-only comments, and lengths in characters.

    Returns:
        `splits` {name: {comments, videos}}, `replies`, `emoticons_only`, `lengths` {comment, prompt: {chars: count}}.
    """
    splits = {}
    for name in ("train", "test"):
        found = con.execute("SELECT count(*), count(DISTINCT video) FROM kept WHERE test = ?", [name == "test"])
        splits[name] = dict(zip(("comments", "videos"), found.fetchone(), strict=True))
    lengths = {
        name: dict(con.execute(f"SELECT {name}_chars, count(*) FROM kept GROUP BY ALL ORDER BY ALL").fetchall())
        for name in ("comment", "prompt")
    }
    replies, emoticons = con.execute("SELECT count(parent), count(*) FILTER (emoticons_only) FROM kept").fetchone()
    return {"splits": splits, "replies": replies, "emoticons_only": emoticons, "lengths": lengths}


def quantile(counts: dict[int, int], share: float) -> int:
    """Finds the smallest value that at least a share of all counted values do not exceed."""
    needed = share * sum(counts.values())
    for value in sorted(counts):
        needed -= counts[value]
        if needed <= 0:
            return value
    return max(counts)


def plot_report(report: Record, path: Path) -> None:
    """Draws the lengths of comments and prompts, and what became of the records."""
    from matplotlib.figure import Figure  # without pyplot, which takes as long to load as a small crawl to prepare

    figure = Figure(figsize=(13, 3.8))
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.14, wspace=0.36)  # a layout engine draws everything twice
    for axes, (name, counts) in zip((left, middle), report["lengths"].items(), strict=True):
        edge = max(quantile(counts, 0.99), 1)
        values, weights = [min(value, edge) for value in counts], list(counts.values())
        axes.hist(values, weights=weights, bins=min(40, edge), histtype="stepfilled", color="#4c72b0")
        for share, height in ((0.5, 0.97), (0.9, 0.87)):
            at = quantile(counts, share)
            axes.axvline(at, color="#c44e52", linestyle="--", linewidth=1)
            label, place = f" p{share * 100:.0f} = {at}", ("data", "axes fraction")
            axes.annotate(label, (at, height), xycoords=place, fontsize=8, va="top")
        axes.set(title=f"{name} length", xlabel=f"characters (the last bar: p99 = {edge} and more)", ylabel="comments")
    bars = {"train": report["splits"]["train"]["comments"], "test": report["splits"]["test"]["comments"]}
    bars |= {key.replace("_", " "): count for key, count in report["dropped"].items() if count}
    colors = ["#55a868", "#55a868"] + ["#c44e52"] * (len(bars) - 2)
    drawn = right.barh(list(bars), list(bars.values()), color=colors)
    right.bar_label(drawn, fmt="{:,.0f}", fontsize=8, padding=2)
    right.invert_yaxis()
    right.margins(x=0.2)
    right.tick_params(axis="y", labelsize=8)
    right.set(title=f"{report['read']:,} comments read", xlabel="comments")
    figure.savefig(path, format="png", dpi=100)


def counted(number: int, things: str) -> str:
    """Writes a number of things: "1 video", "2 videos"."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


def describe_kept(report: Record) -> str:
    """Writes what is kept for the terminal."""
    rows = []
    for name, split in report["splits"].items():
        rows.append(f"  {split['comments']:>11,}  {name}: comments under {counted(split['videos'], 'videos')}")
    rows.append(f"Of the kept ones {report['replies']:,} are replies and {report['emoticons_only']:,} emoticons only.")
    if report["ids_made"]:
        rows.append(f"{report['ids_made']:,} kept comments had no id, or lost it, and got one made from their text.")
    for name, counts in report["lengths"].items():
        half, most, longest = quantile(counts, 0.5), quantile(counts, 0.9), max(counts)
        rows.append(f"Length of a {name}: half up to {half} characters, 90 % up to {most}, longest {longest}.")
    return "\n".join(rows)


def describe_drops(report: Record) -> str:
    """Writes what was read and dropped for the terminal."""
    dropped = [f"  {-count:>11,}  {DROPS[key]}" for key, count in report["dropped"].items() if count]
    return "\n".join([f"  {report['read']:>11,}  comments read", *dropped])


# ---------------------------------------------------------------------------------------------------------------------


def test_share(text: str, total: int | None) -> float | None:
    """Turns --test_size into the share of the videos that is held out; None for a number without --total.

    The share may depend on what was typed but never on how much data there is: a share that follows the data would move
    the border, and with it videos from one side to the other.
    """
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if 0 <= size < 1:
        return size
    if not size.is_integer() or size < 1:
        raise SystemExit(f"--test_size: got {text!r}, expected a share such as 0.1 or a whole number of comments.")
    if total is not None and size >= total:
        raise SystemExit(f"--test_size {text}: expected less than --total, which is {total}, or a share such as 0.1.")
    return None if total is None else size / total


def argument_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with the arguments of the cleaning and with the title."""
    return [
        f"--{name}: got {getattr(args, name)}, expected {expected}."
        for name, fits, expected in (
            ("max_repeats", args.max_repeats == -1 or args.max_repeats >= 1, "a number of comments, or -1 for all"),
            ("max_emoticons", args.max_emoticons >= -1, "a number of comments, or -1 for all"),
            ("min_chars", args.min_chars >= 0, "a number of characters"),
            ("max_chars", args.max_chars == -1 or args.max_chars >= 1, "a number of characters, or -1 for any"),
            ("min_likes", args.min_likes >= 0, "a number of likes"),
            ("title", args.title is None or args.title.strip(), "the video's title"),
            ("desc", args.desc is None or args.title, "it together with --title"),
            ("prefer_liked", not args.prefer_liked or args.total is not None, "it together with --total"),
        )
        if not fits
    ]


def nothing_usable(data_dir: Path, files: list[Record]) -> str:
    """Explains that there is nothing to train on, and what to do."""
    comments, videos = (
        sum(line["records"] for line in files if line["kind"] == kind) for kind in ("comments", "videos")
    )
    title = "" if videos else (
        "No file says what the videos are called. If all comments are about one video, say it: "
        "python prepare_data.py --title 'the title'\n"
    )
    return (
        f"Nothing usable below {shown(data_dir)}: {comments:,} comment and {videos:,} video records in {len(files)} "
        "files or tables, and no comment is left of them.\n"
        f"Looked for {', '.join('*' + suffix for suffix in SUFFIXES)} with the columns comment_id, video_id, content, "
        "parent_comment_id (comments) and video_id, title, desc (videos), for answers of Bilibili's API, and for other "
        "tables of comments (--columns 'content=COLUMN,title=COLUMN' says which column is what).\n"
        f"{title}Copy MediaCrawler's data folder there, or try the example data: "
        "python prepare_data.py --data_dir examples"
    )


def build_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data_dir", default="data", help="folder with crawled files, searched with all folders below it")
    add("--output_dir", default="data", help="folder for the results")
    add("--columns", type=partial(parse_columns, known=[*NAMES], may_lack=True), metavar="NAME=COLUMN,...",
        help="which column is what in tables that are not MediaCrawler's (whose own are read as they are), such as "
        f"'content=评论内容,title=标题'. The names: {', '.join(NAMES)} (parent: the text of the answered comment). "
        "Others are guessed; NAME= with nothing behind it: none")
    add("--title", help="what comments are about whose video is not among the files")
    add("--desc", help="with --title: the video's description")
    add("--total", type=int, help="at most so many comments, training and test together, taken video by video "
        "in an order drawn from the seed, so that a video's comments stay together (not given: all)")
    add("--test_size", default="0.1", help="share of the videos held out for the test, or a number N of comments, "
        "which stands for the share N / --total. A video is held out if the hash of its id and the seed lies below the "
        "share: more data never moves it, the size is met roughly, and of a few videos it may be none")
    add("--seed", type=int, default=0, help="draws other test videos and another order")
    add("--anonymize", type=boolean, default=True, help='False: keep "回复 @name :" before replies, which otherwise '
        f"goes, and names in mentions, which otherwise become {SOMEONE}")
    add("--prefer_liked", type=boolean, default=False, help="with --total: take the comments with the most likes")
    add = parser.add_argument_group("cleaning: which comments are no answers to learn from").add_argument
    add("--clean", type=boolean, default=True, help="False: none of the following")
    add("--max_repeats", type=int, default=3, help="comments with the same text, or nearly the same, such as an "
        "advertisement with small changes, of which the better liked ones stay; case, spaces, punctuation, digits and "
        "emoticons make no difference; -1: all")
    add("--contacts", choices=["drop", "mask", "keep"], default="drop", help="comments with phone numbers, QQ, WeChat, "
        f"groups, e-mail addresses or short links; drop: they go; mask: the detail becomes {MASK}. In titles, "
        "descriptions and comments that are answered it is masked in both")
    add("--drop_bait", type=boolean, default=True, help='comments whose replies say nothing new ("reply 1 and I send '
        'it to you"), with all that is said below them')
    add("--drop_echo", type=boolean, default=True, help="comments that repeat what they answer, or the title")
    add("--max_emoticons", type=int, default=3, help="comments of nothing but emoticons under a video; -1: all")
    add("--min_chars", type=int, default=2, help="fewest letters and digits of other comments")
    add("--max_chars", type=int, default=500, help="most characters; -1: any number")
    add("--min_likes", type=int, default=0, help="fewest likes; comments of crawls without them stay")
    add("--drop_uploader", type=boolean, default=False, help="comments by the video's author")
    add("--language", choices=["any", "zh"], default="any", help="zh: half of the letters or more are Chinese")
    add("--write_dropped", type=boolean, default=False, help=f"True: write all that is dropped to {DROPPED}: "
        "reason, id, prompt, text")  # fmt: skip
    return parser


def prepare(
    con: "DuckDBPyConnection", args: argparse.Namespace, share: float | None, work: Path, paths: dict[str, Path],
) -> Record:
    """Reads, joins, reports what was dropped, and writes the kept comments.

    Args:
        con: Of an empty database.
        args: The command's.
        share: Part of the videos that is held out.
        work: For temporary files.
        paths: Results' names -> where they are written to.

    Returns:
        What report.json holds.

    Raises:
        SystemExit: if there is nothing to train on.
    """
    data_dir = from_root(args.data_dir)
    files = load_files(con, data_dir, work, print, args.columns or {}, args.title is not None)
    if args.title is not None:
        title_the_rest(con, args.title.strip(), args.desc or "")
    join_titles(con, print)
    counts = join_tables(con, args, share or 0.0, paths.get(DROPPED))
    torn = sum(line["torn"] for line in files if line["kind"] == "comments")
    counts["read"], counts["torn"] = counts["read"] + torn, counts["torn"] + torn
    report = {
        "arguments": vars(args), "files": files, "read": counts["read"],
        "dropped": {reason: counts.get(reason, 0) for reason in DROPS}, "examples": counts["examples"],
        "ids_made": counts["ids_made"],
        **measure(con),
    }  # fmt: skip
    print(describe_drops(report))
    if not report["lengths"]["comment"]:
        raise SystemExit(nothing_usable(data_dir, files))
    print(describe_kept(report))
    if share is None:
        kept, part = report["splits"]["train"]["comments"], 0.1
        if float(args.test_size) < kept:
            part = float(args.test_size) / kept
        raise SystemExit(
            f"--test_size {args.test_size}: a number of comments is counted as a share of --total, and {kept:,} are "
            f"kept here. Give --total too, such as --total {kept}, or a share such as --test_size {part:.2g}."
        )
    if not report["splits"]["train"]["comments"]:
        raise SystemExit("All comments fell into the test set. Take another --seed or a smaller --test_size.")
    write_splits(con, [paths["data_train.json"], paths["data_test.json"]])
    return report


def main(args: argparse.Namespace) -> None:
    """Checks the arguments, prepares the data, and puts results and report in their places."""
    data_dir, output_dir = from_root(args.data_dir), from_root(args.output_dir)
    if args.total is not None and args.total < 1:
        raise SystemExit(f"--total: got {args.total}, expected 1 or more comments.")
    share = test_share(args.test_size, args.total)
    if wrong := argument_problems(args):
        raise SystemExit("\n".join(wrong))
    if data_dir.is_file():
        raise SystemExit(
            f"--data_dir: {shown(data_dir)} is a file, expected a folder. To read it with all that lies beside it: "
            f"python prepare_data.py --data_dir {shlex.quote(shown(data_dir.parent))}"
        )
    if not data_dir.is_dir():
        raise SystemExit(
            f"--data_dir: no folder {from_root(shown(data_dir))}. Copy MediaCrawler's data folder there, "
            "or try the example data: python prepare_data.py --data_dir examples"
        )
    import duckdb

    # Not in the system's folder for such files, which is often kept in memory.
    work = output_dir / ".prepare_data.partial"
    # For the report's picture; loaded while DuckDB reads.
    Thread(target=import_module, args=["matplotlib.figure"], daemon=True).start()
    # Every thread has read buffers of its own, so many threads would not fit into the memory limit.
    config = {"memory_limit": "1GB", "temp_directory": str(work), "threads": min(os.cpu_count() or 1, 8)}
    names = [*OUR_FILES, DROPPED] if args.write_dropped else [*OUR_FILES]
    with ExitStack() as results:
        try:
            temporaries = results.enter_context(atomic_writes([output_dir / name for name in names]))
            shutil.rmtree(work, ignore_errors=True)  # What a killed run left.
            work.mkdir()
        except OSError as error:
            why = "a file is there" if isinstance(error, FileExistsError) else error.strerror
            raise SystemExit(
                f"--output_dir: {shown(output_dir)} is no folder that can be written to ({why}). Name another."
            ) from None
        paths = dict(zip(names, temporaries, strict=True))
        print(f"Reading {shown(data_dir)} ...")
        try:
            with duckdb.connect(config=config) as con:
                con.execute(f"SET enable_progress_bar = {sys.stdout.isatty()}")  # for what takes more than two seconds
                report = prepare(con, args, share, work, paths)
        finally:
            shutil.rmtree(work)
        plot_report(report, paths["report.png"])
        text = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
        paths["report.json"].write_text(text, encoding="utf-8", errors="backslashreplace")
    if share and not report["splits"]["test"]["comments"]:
        print("No video fell into the test set: with so few, take another --seed or a larger --test_size, such as 0.3.")
    print(f"Written to {shown(output_dir)}: {', '.join(names)}")
    print("Next: python download_pt.py --model Qwen/Qwen2.5-0.5B")


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except (KeyboardInterrupt, RuntimeError) as error:
        if isinstance(error, RuntimeError) and str(error) != "Query interrupted":  # DuckDB's word for Ctrl-C
            raise
        raise SystemExit("\nStopped, nothing was written. Run the command again to start over.") from None
