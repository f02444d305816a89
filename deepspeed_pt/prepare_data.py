"""Cleans raw text for continued pre-training: the same text twice, advertisements, menus, other languages go.

    python deepspeed_pt/prepare_data.py --data novels/ --data news.jsonl
    python deepspeed_pt/prepare_data.py --comments data            # a crawl's comments as text, video by video

Reads   text as deepspeed_pt/train.py does (a .txt is a document, of other files the field `text` of each record), and
        data_train.json of prepare_data.py: a video's title, its description and the comments, in one document. Held-out
        videos stay held out.
Writes into --output_dir
    text.jsonl                 {"id", "source", "text"}, a document a line
    report.json, report.png    what was read, dropped (with examples) and changed, and how long the documents are
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import ArgumentParser
from utils.data.cleaning import MACROS, has_contact, masked, sql_text
from utils.files import atomic_writes, explained, from_root, shown, write_problem

if TYPE_CHECKING:
    import numpy as np
    from duckdb import DuckDBPyConnection

BATCH_DOCUMENTS = 1000  # So many go to the database at once.
EXAMPLES, EXAMPLE_CHARS = 3, 200
LINE_LETTERS = 6  # Shorter lines recur in any text: "嗯。"
QUANTILES = {"half": 0.5, "90 %": 0.9, "longest": 1.0}
REASONS = {
    "short": "fewer letters and digits than --min_chars",
    "language": "fewer Chinese letters than others (--language)",
    "contact": "with contact details (--contacts drop)",
    "repeat": "the same as an earlier one, but for case, width, spaces, punctuation and digits",
    "near_repeat": "nearly the same as an earlier one",
}


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", action="append", default=[], metavar="PATH", help="file or folder of text; may be given again")
    add("--comments", help="folder with data_train.json of prepare_data.py, or such a file")
    add("--output_dir", default="deepspeed_pt/data", help="folder for the results")
    add("--max_repeats", type=int, default=1, help="documents that are the same, or nearly; -1: all")
    add(
        "--max_line_repeats", type=int, default=10,
        help="documents that a line of six letters may stand in, else all lose it (menus, imprints); -1: any",
    )  # fmt: skip
    add("--min_chars", type=int, default=20, help="fewest letters and digits of a document")
    add("--language", choices=["any", "zh"], default="any", help="zh: half of the letters or more are Chinese")
    add("--contacts", choices=["mask", "drop", "keep"], default="mask", help="contact details in a document")
    return parser


def argument_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with the arguments."""
    paths = [(flag, path) for flag, given in (("--data", args.data), ("--comments", [args.comments])) for path in given
             if path is not None]  # fmt: skip
    problems = [f"{flag}: no {path!r}." for flag, path in paths if not path.strip() or not from_root(path).exists()]
    if not paths:
        problems.append("Nothing to read: --data PATH, or --comments data.")
    for name in ("max_repeats", "max_line_repeats"):
        if getattr(args, name) < 1 and getattr(args, name) != -1:
            problems.append(f"--{name}: got {getattr(args, name)}, expected 1 or more, or -1.")
    if problem := write_problem(from_root(args.output_dir)):
        problems.append(f"--output_dir: {problem}")
    return problems


def video_texts(path: Path) -> Iterator[str]:
    """The comments of each video as a document: its title and description, then each comment below what it answers.

    Raises:
        DataError, OSError: if there are no such records.
    """
    from utils.data.held_out import read_comments
    from utils.data.records import DataError, find_split

    file = find_split(path, "train") if path.is_dir() else path
    if file is None:
        raise DataError(f"no data_train.json in {shown(path)}. Make it with: python prepare_data.py")
    for comments in read_comments(file):
        lines: list[str] = []
        for comment in comments:
            *_, question, answer = comment.messages
            # Title and description stand in front of each comment of a video; once is enough.
            own = [line for line in question["content"].splitlines() if line not in lines]
            lines += [*own, answer["content"]]
        yield "\n".join(lines)


def documents(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """All documents with the names of their sources.

    Raises:
        DataError, OSError: if something cannot be read.
    """
    from utils.data.documents import read_texts

    for path in map(from_root, args.data):
        parts: list[str] = []
        for text, begins, ends in read_texts(path):
            parts = [text] if begins else [*parts, text]
            if ends:
                yield path.name, "".join(parts)
    if args.comments:
        for text in video_texts(from_root(args.comments)):
            yield "comments", text


def load(con: "DuckDBPyConnection", args: argparse.Namespace) -> None:
    """Fills the table `documents` (id, source, text)."""
    con.execute("CREATE TABLE documents (id BIGINT, source VARCHAR, text VARCHAR)")
    numbered = enumerate(documents(args))
    while batch := [*islice(numbered, BATCH_DOCUMENTS)]:
        ids, sources, texts = zip(*((id, *document) for id, document in batch), strict=True)
        con.execute("INSERT INTO documents SELECT unnest($1), unnest($2), unnest($3)", [ids, sources, texts])


def drop_lines(con: "DuckDBPyConnection", most: int) -> list[tuple[str, int]]:
    """Takes lines out that stand in many documents.

    Returns:
        The commonest ones, and in how many.
    """
    con.execute(f"""
        CREATE TABLE lines AS
            SELECT id, unnest(parts) line, generate_subscripts(parts, 1) place
            FROM (SELECT id, string_split(text, chr(10)) parts FROM documents);
        CREATE TABLE often AS SELECT trim(line) line, count(DISTINCT id) n FROM lines
            WHERE length(fold(line)) >= {LINE_LETTERS} GROUP BY trim(line) HAVING count(DISTINCT id) > {most};
        UPDATE documents SET text = coalesce(kept.text, '') FROM (
            SELECT id, string_agg(lines.line, chr(10) ORDER BY place) FILTER (often.line IS NULL) AS text
            FROM lines LEFT JOIN often ON often.line = trim(lines.line)
            GROUP BY id HAVING count(often.line) > 0) kept
        WHERE kept.id = documents.id;
        DROP TABLE lines;
    """)
    return con.execute("SELECT line, n FROM often ORDER BY n DESC, line LIMIT 10").fetchall()


def judge(con: "DuckDBPyConnection", args: argparse.Namespace) -> None:
    """Fills the table `verdicts` (id, reason), in the order of `REASONS`; no reason: it stays."""
    from utils.data.near_documents import near_documents

    dropped = has_contact("text") if args.contacts == "drop" else "false"
    chinese = "regexp_replace(letters, '[^\\p{Han}]+', '', 'g')"
    con.execute(f"""
        CREATE TABLE folded AS SELECT id, text, fold(text) letters FROM documents ORDER BY id;
        CREATE TABLE verdicts AS SELECT id, CASE
            WHEN length(letters) + length(digits_of(text)) < {max(args.min_chars, 1)} THEN 'short'
            WHEN {args.language == "zh"} AND 2 * length({chinese}) < length(letters) THEN 'language'
            WHEN {dropped} THEN 'contact' END reason FROM folded""")
    if args.max_repeats < 0:
        return
    left = "FROM folded JOIN verdicts USING (id) WHERE reason IS NULL"
    con.execute(f"""
        UPDATE verdicts SET reason = 'repeat' WHERE id IN (SELECT id {left}
            QUALIFY row_number() OVER (PARTITION BY letters ORDER BY id) > {args.max_repeats})""")
    rows = con.cursor().execute(f"SELECT id, letters {left} ORDER BY id")
    documents = (row for batch in iter(partial(rows.fetchmany, BATCH_DOCUMENTS), []) for row in batch)
    found = near_documents(documents, args.max_repeats)
    con.execute("UPDATE verdicts SET reason = 'near_repeat' WHERE id IN (SELECT unnest($1::BIGINT[]))", [found])


def make_report(con: "DuckDBPyConnection", lines: list[tuple[str, int]]) -> dict[str, Any]:
    """What was read, kept, dropped and changed."""
    sources = con.execute("""
        SELECT source, count(*), count(*) FILTER (reason IS NULL),
            coalesce(sum(length(text)) FILTER (reason IS NULL), 0)
        FROM documents JOIN verdicts USING (id) GROUP BY source ORDER BY min(id)""").fetchall()
    counts = dict(con.execute("SELECT reason, count(*) FROM verdicts WHERE reason IS NOT NULL GROUP BY 1").fetchall())
    examples = {
        reason: [text for (text,) in con.execute(
            f"SELECT left(text, {EXAMPLE_CHARS}) FROM documents JOIN verdicts USING (id) WHERE reason = $1 "
            f"ORDER BY id LIMIT {EXAMPLES}", [reason]).fetchall()] for reason in counts
    }  # fmt: skip
    names = ("source", "documents", "kept", "characters")
    (found,) = con.execute(f"SELECT quantile_disc(length(text), {[*QUANTILES.values()]}) FROM kept").fetchone()
    return {
        "sources": [dict(zip(names, map(int_or_text, row), strict=True)) for row in sources],
        "dropped": {reason: {"documents": counts[reason], "examples": examples[reason]} for reason in REASONS
                    if reason in counts},
        "masked": con.execute("SELECT count(*) FROM kept WHERE masked").fetchone()[0],
        "lengths": dict(zip(QUANTILES, found or [], strict=False)),
        "lines": [{"line": line, "documents": n} for line, n in lines],
    }  # fmt: skip


def int_or_text(value: Any) -> Any:
    """DuckDB's sums are large whole numbers."""
    return value if isinstance(value, str) else int(value)


def prepare(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """Reads, cleans and writes; returns the report."""
    import duckdb

    with TemporaryDirectory() as work, duckdb.connect(f"{work}/texts.db") as con:
        con.execute(MACROS)
        load(con, args)
        if not con.execute("SELECT count(*) FROM documents").fetchone()[0]:
            raise ValueError("there is no text in what was given.")
        lines = drop_lines(con, args.max_line_repeats) if args.max_line_repeats > 0 else []
        judge(con, args)
        masks = args.contacts == "mask"
        con.execute(f"""
            CREATE TABLE kept AS SELECT id, source, {masked("text") if masks else "text"} AS text,
                {has_contact("text") if masks else "false"} masked
            FROM documents JOIN verdicts USING (id) WHERE reason IS NULL ORDER BY id""")
        report = make_report(con, lines)
        names = ("text.jsonl", "report.json", "report.png")
        with atomic_writes([output_dir / name for name in names]) as (texts, facts, picture):
            con.execute(f"COPY (SELECT id, source, text FROM kept ORDER BY id) TO {sql_text(str(texts))} (FORMAT json)")
            facts.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
            plot_report(report, con.execute("SELECT length(text) n FROM kept").fetchnumpy()["n"], picture)
    return report


def plot_report(report: dict[str, Any], lengths: "np.ndarray", path: Path) -> None:
    """Draws how long the kept documents are, and what became of all."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8))
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, right=0.97, bottom=0.15, wspace=0.45)
    if len(lengths):
        # From a text to a book: each bar is as many times longer than the one before.
        bins = np.geomspace(lengths.min(), lengths.max() + 1, 40)
        left.hist(lengths, bins=bins, histtype="stepfilled", color="#4c72b0")
    left.set(title="kept documents", xlabel="characters", ylabel="documents", xscale="log")
    bars = {"kept": sum(source["kept"] for source in report["sources"])}
    bars |= {reason.replace("_", " "): found["documents"] for reason, found in report["dropped"].items()}
    drawn = right.barh([*bars], [*bars.values()], color=["#55a868"] + ["#c44e52"] * len(report["dropped"]))
    right.bar_label(drawn, fmt="{:,.0f}", fontsize=8, padding=2)
    right.invert_yaxis()
    right.margins(x=0.2)
    read = sum(source["documents"] for source in report["sources"])
    right.set(title=f"{read:,} documents read", xlabel="documents")
    figure.savefig(path, format="png", dpi=100)


def say(report: dict[str, Any], output_dir: Path) -> None:
    """Prints what became of the documents."""
    for source in report["sources"]:
        print(f"{source['source']}: {source['kept']:,} of {source['documents']:,} documents kept, "
              f"{source['characters']:,} characters.")  # fmt: skip
    for reason, found in report["dropped"].items():
        print(f"  dropped: {found['documents']:,} {REASONS[reason]}")
    if report["lines"]:
        first = report["lines"][0]
        print(f"  lines of many documents are left out, such as {first['line'][:40]!r} ({first['documents']:,})")
    if report["masked"]:
        print(f"  contact details masked in {report['masked']:,} documents")
    if report["lengths"]:
        half, most, longest = report["lengths"].values()
        print(f"Length of a document: half up to {half:,} characters, 90 % up to {most:,}, longest {longest:,}.")
    print(f"Written to {shown(output_dir)}: text.jsonl, report.json, report.png")
    print(f"Next: bash deepspeed_pt/run.sh --data {shown(output_dir / 'text.jsonl')}")


def main(args: argparse.Namespace) -> None:
    """Checks the arguments, and prepares."""
    if problems := argument_problems(args):
        raise SystemExit("\n".join(problems))
    output_dir = from_root(args.output_dir)
    with explained("The text cannot be prepared"):
        report = prepare(args, output_dir)
    say(report, output_dir)


if __name__ == "__main__":
    main(build_parser().parse_args())
