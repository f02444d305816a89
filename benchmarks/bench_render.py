"""Measures how fast records become token ids with labels: ours on one core and two, LLaMA-Factory's and TRL's way.

    python benchmarks/bench_render.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4

Records are made of the comments in examples/: videos of 4 to 16 comments, half of them replies, every title and comment
another one. All render the same --records; ours, on two cores, also --many. Each runs in a process of its own on as
many cores as it has workers, without loading a model's weights, and from a cold cache; seconds are those of rendering,
memory is the largest process's peak. LLaMA-Factory and TRL get environments of their own, as in bench_sft.py.

Prints a markdown table and a JSON line.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench_prepare_data import measured  # noqa: E402
from bench_sft import environment  # noqa: E402

from utils.data.records import SYSTEM_PROMPT, comment_prompt  # noqa: E402
from utils.files import from_root  # noqa: E402

# name -> (environment, what render_peer.py calls it; ours is run by this script, cores)
CONTENDERS = {
    "ours, one core": ("ours", "ours", 1),
    "ours, two cores": ("ours", "ours", 2),
    "LLaMA-Factory, 1 worker": ("llamafactory", "llamafactory", 1),
    "LLaMA-Factory, 2 workers": ("llamafactory", "llamafactory", 2),
    "TRL, 1 worker": ("trl", "trl", 1),
    "TRL, 2 workers": ("trl", "trl", 2),
}


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder with a tokenizer and its chat template")
    parser.add_argument("--work_dir", default="benchmarks/output", help="for environments, data and caches")
    parser.add_argument("--records", type=int, default=20_000, help="that all render")
    parser.add_argument("--many", type=int, default=1_000_000, help="that ours renders besides; 0: none")
    parser.add_argument("--characters", type=int, default=10, help="about as long is a prompt's description")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn; the median counts")
    parser.add_argument("--render", type=Path, help=argparse.SUPPRESS)  # What a run of ours reads.
    return parser


def example_texts() -> tuple[list[tuple[str, str]], list[str]]:
    """Titles and descriptions, and comments, of the examples."""
    lines = []
    for path in sorted((ROOT / "examples/data").rglob("*.json*")):
        text = path.read_text(encoding="utf-8")
        lines += json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    videos = [(line["title"], line["desc"]) for line in lines if "title" in line]
    return videos, [line["content"] for line in lines if line.get("content")]


def write_records(count: int, characters: int, folder: Path) -> None:
    """Writes data.json as prepare_data.py does, and the same conversations as messages.jsonl for the others."""
    (videos, comments), draw = example_texts(), random.Random(0)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "data.json").open("w", encoding="utf-8") as data, (folder / "messages.jsonl").open("w") as lines:
        number = video = 0
        while number < count:
            video += 1
            title, desc = draw.choice(videos)
            for _ in range(min(draw.choice((4, 8, 12, 16)), count - number)):
                parent = f"{draw.choice(comments)[:60]}{draw.randrange(10**6)}" if draw.random() < 0.5 else ""
                prompt = comment_prompt(f"{title}（第{video}期）", desc[:characters], parent)
                turns = [("system", SYSTEM_PROMPT), ("user", prompt)]
                turns.append(("assistant", f"{draw.choice(comments)[:60]}{draw.randrange(10**6)}"))
                record = {"id": str(number), "video_id": str(video)}
                record |= {"conversations": [{"from": role, "value": text} for role, text in turns]}
                data.write(("[\n" if number == 0 else ",\n") + json.dumps(record, ensure_ascii=False))
                messages = [{"role": role, "content": text} for role, text in turns]
                lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
                number += 1
        data.write("\n]\n")
    columns = {"messages": "messages"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {"file_name": "messages.jsonl", "formatting": "sharegpt", "columns": columns}
    info["tags"] = tags | {"system_tag": "system"}
    (folder / "dataset_info.json").write_text(json.dumps({"comments": info}))


def render(model: Path, folder: Path) -> None:
    """A run of ours; writes result.json."""
    from utils.data.chat import make_chat
    from utils.data.samples import load_samples
    from utils.data.tokenizer import load_tokenizer

    chat = make_chat(load_tokenizer(model))
    started = time.perf_counter()
    samples = load_samples(folder / "data.json", chat, 1024, folder / "cache").samples
    seconds = time.perf_counter() - started
    result = {"seconds": seconds, "samples": len(samples), "tokens": int(samples.lengths.sum())}
    (folder / "result.json").write_text(json.dumps(result))


def run(name: str, args: argparse.Namespace, folder: Path, python: Path) -> dict[str, Any]:
    """Runs a contender once."""
    kind, cores = CONTENDERS[name][1:]
    model = str(from_root(args.model))
    if kind == "ours":
        command = [str(python), __file__, "--model", model, "--render", str(folder)]
    else:
        peer = str(Path(__file__).with_name("render_peer.py"))
        command = [str(python), peer, "--kind", kind, "--model", model, "--work_dir", str(folder)]
        command += ["--workers", str(cores)]
    for left in ("cache", "hf"):
        shutil.rmtree(folder / left, ignore_errors=True)
    variables = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(cores)}
    os.environ |= variables | {"TOKENIZERS_PARALLELISM": "true" if kind == "ours" else "false"}
    limited = ["taskset", "-c", ",".join(map(str, range(cores)))]
    _, memory = measured([*limited, *command])
    result = json.loads((folder / "result.json").read_text())
    return result | {"memory": memory}


def median(runs: list[dict[str, Any]], key: Callable[[dict[str, Any]], float]) -> float:
    """The middle one of a figure."""
    return sorted(map(key, runs))[len(runs) // 2]


def main(args: argparse.Namespace) -> None:
    """Renders in turn and prints what was measured."""
    if args.render:
        render(from_root(args.model), args.render)
        return
    work = from_root(args.work_dir)
    pythons = {name: environment(parts[0], work) for name, parts in CONTENDERS.items()}
    folder = work / "render"
    write_records(args.records, args.characters, folder)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name, found in runs.items():
            found.append(run(name, args, folder, pythons[name]))
            print(name, found[-1], flush=True)
    if args.many:
        write_records(args.many, args.characters, folder)
        name = f"ours, two cores, {args.many:,} records"
        runs[name] = [run("ours, two cores", args, folder, pythons["ours, two cores"])]
    speed = {name: median(found, lambda one: one["samples"] / one["seconds"]) for name, found in runs.items()}
    print(
        "\n| | samples/s | ours on two cores is faster by | tokens a sample | peak memory, GB |\n|---|---|---|---|---|"
    )
    for name, found in runs.items():
        tokens, memory = found[0]["tokens"] / found[0]["samples"], median(found, lambda one: one["memory"])
        times = speed["ours, two cores"] / speed[name]
        print(f"| {name} | {speed[name]:,.0f} | {times:.1f}x | {tokens:.0f} | {memory:.2f} |")
    print(json.dumps(runs))


if __name__ == "__main__":
    main(build_parser().parse_args())
