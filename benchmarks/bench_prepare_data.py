"""Measures prepare_data.py against a plain script with the same joins, and against parsing the same bytes with orjson.

    python benchmarks/bench_prepare_data.py --comments 1000000

The crawl is made by repeating and re-numbering a small one: `examples/`, or another with --source. Each copy's comments
are made of pieces of the source's in another order, as equal ones would be dropped. Prints a table and one JSON line.
orjson is no requirement of the project: without it that row is left out.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from utils.data.crawl_files import find_files, kind_of, read_tables  # noqa: E402

FIRST_ID = 10**14
PIECE_CHARS = (2, 6)

PLAIN = """
import json, sys
folder, output = sys.argv[1:]
videos = {video["video_id"]: video for video in json.load(open(f"{folder}/search_contents_2026-01-01.json"))}
comments = {comment["comment_id"]: comment for comment in json.load(open(f"{folder}/search_comments_2026-01-01.json"))}
records = []
for comment in comments.values():
    video, parent = videos.get(comment["video_id"]), comments.get(comment["parent_comment_id"])
    if video is None or not comment["content"] or (comment["parent_comment_id"] != "0" and parent is None):
        continue
    prompt = f"视频标题：{video['title']}\\n视频简介：{video['desc']}"
    if parent:
        prompt += f"\\n父评论：{parent['content']}"
    turns = [("system", "你是一名B站用户。"), ("user", prompt), ("assistant", comment["content"])]
    conversations = [{"from": name, "value": value} for name, value in turns]
    records.append({"id": comment["comment_id"], "video_id": comment["video_id"], "conversations": conversations})
json.dump(records, open(f"{output}/data.json", "w"), ensure_ascii=False)
"""
ORJSON = """
import pathlib, sys
import orjson
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    orjson.loads(path.read_bytes())
"""


def read_source(source: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the records of a small crawl: {"comments": [...], "videos": [...]}, all values as text."""
    records: dict[str, list[dict[str, Any]]] = {"comments": [], "videos": []}
    for path in find_files(source):
        for _, columns, rows in read_tables(path):
            if kind := kind_of(columns):
                records[kind] += [row for row in rows if row]
    return records


def make_crawl(records: dict[str, list[dict[str, Any]]], comments: int, folder: Path) -> None:
    """Writes a crawl of a given number of comments as two one-line arrays, the way MediaCrawler did until 2025-09."""
    names = ("video_id", "comment_id", "parent_comment_id")
    all_records = [record for rows in records.values() for record in rows]
    ids = sorted({str(record[name]) for record in all_records for name in names if name in record})
    number = {id: place for place, id in enumerate(ids)}
    draw, pool = random.Random(0), "".join(str(record["content"]) for record in records["comments"])

    def shuffled(text: str) -> str:
        made = ""
        while len(made) < len(text):
            start = draw.randrange(len(pool) - PIECE_CHARS[1])
            made += pool[start : start + draw.randint(*PIECE_CHARS)]
        return made[: len(text)]

    def renumbered(record: dict[str, Any], copy: int) -> str:
        changes = {name: str(record[name]) for name in names if record.get(name)}
        changes = {
            name: id if id == "0" else str(FIRST_ID + copy * len(ids) + number[id]) for name, id in changes.items()
        }
        if copy and record.get("content"):
            changes["content"] = shuffled(str(record["content"]))
        return json.dumps({**record, **changes}, ensure_ascii=False)

    copies = -(-comments // len(records["comments"]))
    for kind, name in (("videos", "contents"), ("comments", "comments")):
        count = copies * len(records[kind]) if kind == "videos" else comments
        with (folder / f"search_{name}_2026-01-01.json").open("w", encoding="utf-8") as file:
            for index in range(count):
                copy, at = divmod(index, len(records[kind]))
                file.write(("[" if index == 0 else ", ") + renumbered(records[kind][at], copy))
            file.write("]")


def measured(command: list[str]) -> tuple[float, float]:
    """Runs a command.

    Returns:
        Wall time in seconds and peak memory in GB.
    """
    # A process of its own keeps the largest child's memory apart from that of the commands before it.
    probe = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", probe, *command], check=True, stdout=subprocess.PIPE, text=True)
    wall_sec = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    return wall_sec, int(result.stdout) * unit / 1e9


def main(args: argparse.Namespace) -> None:
    """Makes the crawl, runs everything in turn and prints the figures."""
    names = ["prepare_data.py", "without cleaning"] + ["plain script"] * args.plain
    if importlib.util.find_spec("orjson"):
        names.append("orjson parse")
    else:
        print("orjson is not installed: without its row. (pip install orjson)")
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        crawl, output = Path(folder, "crawl"), Path(folder, "output")
        crawl.mkdir()
        output.mkdir()
        make_crawl(read_source(Path(args.source)), args.comments, crawl)
        size_bytes = sum(path.stat().st_size for path in crawl.iterdir())
        python, script, folders = sys.executable, str(ROOT / "prepare_data.py"), [str(crawl), str(output)]
        ours = [python, script, "--data_dir", folders[0], "--output_dir", folders[1]]
        commands = {
            "prepare_data.py": ours,
            "without cleaning": [*ours, "--clean", "False"],
            "plain script": [python, "-c", PLAIN, *folders],
            "orjson parse": [python, "-c", ORJSON, folders[0]],
        }
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(args.repeats):
            for name in names:
                figures[name].append(measured(commands[name]))
    best = {name: (min(sec for sec, _ in runs), max(gb for _, gb in runs)) for name, runs in figures.items()}
    fastest = best["prepare_data.py"][0]
    print(f"\n{args.comments:,} comments, {size_bytes / 1e6:,.0f} MB of JSON, {os.cpu_count()} cores\n")
    print("| | wall, s | against ours | peak memory, GB |\n|---|---|---|---|")
    for name, (wall_sec, peak_gb) in best.items():
        print(f"| {name} | {wall_sec:.1f} | {wall_sec / fastest:.2f}x | {peak_gb:.2f} |")
    rows = {name: {"wall_sec": round(sec, 2), "peak_gb": round(gb, 2)} for name, (sec, gb) in best.items()}
    print("\n" + json.dumps({"bench": "prepare_data", "comments": args.comments, "bytes": size_bytes, "results": rows}))


def build_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--comments", type=int, default=1_000_000, help="how many comments to make")
    add("--source", default=str(ROOT / "examples"), help="folder of the crawl to be repeated")
    add("--repeats", type=int, default=1, help="runs of each; the fastest counts, and the largest memory")
    add("--work_dir", help="where the crawl is made (1.5 GB for a million); not given: the place for temporary files")
    add("--no_plain", dest="plain", action="store_false", help="leave out the plain script, which needs 4 GB a million")
    return parser


if __name__ == "__main__":
    main(build_parser().parse_args())
