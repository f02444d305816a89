"""Makes Markdown tables of what the kit measured, and puts them into the two READMEs.

    python benchmarks/gpu/table.py                     # prints the tables of benchmarks/gpu/results/
    python benchmarks/gpu/table.py results.jsonl       # of other files
    python benchmarks/gpu/table.py --write             # writes them into README.md and README_zh.md

Of several files of one card the newest counts, by the time in its name. Every figure stands in those files.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.cli import boolean  # noqa: E402
from utils.files import atomic_write, shown  # noqa: E402

RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- cards: made by benchmarks/gpu/table.py -->", "<!-- cards: end -->"
# Language -> README, and the words of the tables.
READMES = {"en": "README.md", "zh": "README_zh.md"}
WORDS = {
    "en": {
        "none": "No card has been measured yet. `bash benchmarks/gpu/run.sh` does it in six minutes, on any card of "
        "8 GB or more ([how](benchmarks/gpu/README.md)).",
        "card": "{card}, {limit}; PyTorch {torch}, transformers {transformers}, Liger {liger}, measured with "
        "`bash benchmarks/gpu/run.sh`.",
        "limited": "memory held to {gib} GiB",
        "unlimited": "all of its {gib} GiB",
        "train": ["updates of 32 comments", "samples/s", "tokens/s", "ratio to padded", "peak, GiB", "estimated, GiB"],
        "attention": "attention of a layer, forward and backward, ms",
        "gradients": "gradients of a pack against its samples one by one",
        "rounding": "of the samples themselves against fp32",
        "profile": ["an update", "ms", "card busy, ms", "card idle", "host, ms", "kernels launched"],
        "stages": ["the scripts themselves", ""],
        "ours": "ours, packs of {pack_tokens}",
        "ours, nothing shared": "ours, nothing shared, packs of {pack_tokens}",
        "padded": "padded, batches of {batch_size}",
    },
    "zh": {
        "none": "还没有在显卡上测过。`bash benchmarks/gpu/run.sh` 在任何 8 GB 及以上的显卡上用六分钟测完"
        "（[说明](benchmarks/gpu/README.md)）。",
        "card": "{card}，{limit}；PyTorch {torch}，transformers {transformers}，Liger {liger}，"
        "由 `bash benchmarks/gpu/run.sh` 测得。",
        "limited": "显存限制在 {gib} GiB",
        "unlimited": "使用全部 {gib} GiB",
        "train": ["每次更新 32 条评论", "样本/秒", "token/秒", "相对补齐批次", "峰值 GiB", "估计 GiB"],
        "attention": "一层注意力的前向加反向，毫秒",
        "gradients": "一个 pack 的梯度与逐条样本的梯度之差",
        "rounding": "逐条样本自身与 fp32 之差",
        "profile": ["一次更新", "毫秒", "显卡忙，毫秒", "显卡空闲", "主机，毫秒", "启动的核函数"],
        "stages": ["脚本本身", ""],
        "ours": "本项目，pack {pack_tokens}",
        "ours, nothing shared": "本项目，不共享前缀，pack {pack_tokens}",
        "padded": "补齐批次，每批 {batch_size}",
    },
}  # fmt: skip

Row = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="*", help="results (not given: those in benchmarks/gpu/results)")
    parser.add_argument("--write", type=boolean, nargs="?", const=True, default=False,
                        help="put the tables into README.md and README_zh.md")  # fmt: skip
    return parser


def read_results(path: Path) -> list[Row]:
    """Reads a file of the kit; a last line that was not finished is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def newest(files: list[Path]) -> list[Path]:
    """Of files whose names differ in the time alone the last one."""
    by_card = {re.sub(r"-[\d-]+$", "", path.stem): path for path in sorted(files)}
    return list(by_card.values())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; empty where there are no rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _measured(row: Row | None, name: str, digits: int = 3) -> str:
    """A figure, or why there is none."""
    if row is None:
        return ""
    value = row.get(name, row.get("error", "") if name == "samples_per_sec" else "")
    return f"{value:.{digits}g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def training_table(rows: list[Row], words: dict[str, Any]) -> str:
    """Speed and memory of all models, ours and padded."""
    table = []
    for part in dict.fromkeys(row["part"] for row in rows if row["part"].startswith("train ")):
        # What ran; else the last size that was tried, which says why nothing did.
        own = {row["name"]: row for row in rows if row["part"] == part}
        peer = own.get("padded", {}).get("samples_per_sec")
        for name, row in own.items():
            speed = row.get("samples_per_sec")
            ratio = f"{speed / peer:.2f}x" if speed and peer else ""
            label = words[name].format_map({"pack_tokens": "?", "batch_size": "?"} | row)
            figures = [_measured(row, "samples_per_sec"), _measured(row, "tokens_per_sec"), ratio]
            memory = [_measured(row, "peak_gib"), _measured(row, "estimate_gib")]
            table.append([f"{part.removeprefix('train ')}: {label}", *figures, *memory])
    return markdown(words["train"], table)


def attention_table(rows: list[Row], words: dict[str, Any]) -> str:
    """Milliseconds by kind and length."""
    own = [row for row in rows if row["part"] == "attention" and "kinds" in row]
    lengths = sorted({row["tokens"] for row in own})
    cells: dict[str, dict[int, str]] = {}
    for row in own:
        for kind, figures in row["kinds"].items():
            text = f"{figures['both_ms']:.3g}" if "both_ms" in figures else ""
            cells.setdefault(f"{row['name'].partition(',')[0]}: {kind}", {})[row["tokens"]] = text
    table = [[name, *(by_length.get(length, "") for length in lengths)] for name, by_length in sorted(cells.items())]
    return markdown([words["attention"], *map(str, lengths)], table)


def gradients_table(rows: list[Row], words: dict[str, Any]) -> str:
    """Errors by precision and kind of attention."""
    own = [row for row in rows if row["part"] == "gradients" and "attention" in row]
    kinds = list(dict.fromkeys(kind for row in own for kind in row["attention"]))

    def cell(row: Row, kind: str) -> str:
        error = row["attention"].get(kind, {}).get("error", "")
        return f"{error:.1e}" if isinstance(error, float) else str(error).partition(":")[0]

    table = [
        [row["name"], *(cell(row, kind) for kind in kinds), f"{row['rounding']:.1e}" if "rounding" in row else ""]
        for row in own
    ]
    return markdown([words["gradients"], *kinds, words["rounding"]], table)


def profile_table(rows: list[Row], words: dict[str, Any]) -> str:
    """Where an update's time goes."""
    table = [
        [row["part"].removeprefix("profile "), f"{row['step_ms']:.0f}", f"{row['busy_ms']:.0f}", f"{row['idle']:.0%}",
         f"{row['host_ms']:.0f}", f"{row['launches']:,}"]
        for row in rows
        if row["part"].startswith("profile ") and row.get("launches")
    ]  # fmt: skip
    return markdown(words["profile"], table)


def stages_table(rows: list[Row], words: dict[str, Any]) -> str:
    """What the scripts did."""
    table = []
    for row in rows:
        if row["part"] not in ("stages", "preferences") or row["name"] == "inputs":
            continue
        links = "; ".join(re.sub(r"^Link (\d).*?: (max.*)\.$", r"\1: \2", link) for link in row.get("links", []))
        losses = f"{row['losses'][0]:.3f} -> {row['losses'][-1]:.3f}" if row.get("losses") else ""
        distance = f"distance {row['distance']:.1e}" if "distance" in row else ""
        said = [links, losses, distance, row.get("reply", ""), row.get("error", "")]
        table.append([row["name"], ", ".join(text.replace("|", "\\|") for text in said if text)])
    return markdown(words["stages"], table)


def summary(rows: list[Row], language: str = "en") -> str:
    """All tables of a run of the kit."""
    words = WORDS[language]
    card = next((row for row in rows if row["part"] == "card" and "card" in row), None)
    parts = []
    if card:
        versions = card["versions"]
        limit = words["limited" if card.get("limit_gib") else "unlimited"]
        limit = limit.format(gib=card.get("limit_gib") or card["memory_gib"])
        names = {name: versions[name] for name in ("torch", "transformers")} | {"liger": versions["liger-kernel"]}
        parts.append(words["card"].format(card=card["card"], limit=limit, **names))
    for table in (training_table, gradients_table, attention_table, profile_table, stages_table):
        parts.append(table(rows, words))
    return "\n\n".join(part for part in parts if part)


def of_all(files: list[Path], language: str) -> str:
    """The tables of all cards, or that there are none."""
    found = [summary(read_results(path), language) for path in newest(files)]
    return "\n\n".join(found) if found else WORDS[language]["none"]


def with_tables(readme: str, tables: str) -> str:
    """A README with these tables in their place."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}"


def main(args: argparse.Namespace) -> None:
    """Prints or writes."""
    files = args.files or sorted(RESULTS.glob("*.jsonl"))
    if missing := [path for path in files if not path.is_file()]:
        raise SystemExit(f"No file at {missing[0]}. Measure first: bash benchmarks/gpu/run.sh --out {missing[0]}")
    if not args.write:
        print(of_all(files, "en"))
        return
    for language, name in READMES.items():
        text = with_tables((ROOT / name).read_text(encoding="utf-8"), of_all(files, language))
        with atomic_write(ROOT / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"Written: {shown(ROOT / name)}")


if __name__ == "__main__":
    main(build_parser().parse_args())
