"""Does preference optimisation teach preferences? Reward accuracy on held-out pairs before and after, over seeds.

    python benchmarks/check_preferences.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4 \\
        --pairs dpo_zh_demo.json

Takes the --count pairs whose longer text is the shortest (of several with the same prompt the first one). Each seed
holds other --held_out pairs out, trains LoRA on the rest with deepspeed_dpo/train.py, and converts what it got, which
refuses models that are not the trained one. Prints a markdown table and a JSON line.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.files import from_root  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--pairs", required=True, help="file of preference pairs in any known format")
    parser.add_argument("--work_dir", default="benchmarks/output/preferences", help="for the data and the runs")
    parser.add_argument("--count", type=int, default=200, help="pairs, training and held out")
    parser.add_argument("--held_out", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=2048, help="longer texts are left out")
    parser.add_argument("--lr", type=float, default=1e-4)
    return parser


def choose_pairs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The shortest pairs with different prompts."""
    from utils.data.chat import Dialogue, make_chat
    from utils.data.pairs import to_pair
    from utils.data.records import DataError, read_records
    from utils.data.tokenizer import load_tokenizer

    chat = make_chat(load_tokenizer(from_root(args.model)))
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for record in read_records(from_root(args.pairs)):
        try:
            prompt, *answers = to_pair(record)
            samples = chat.samples(Dialogue("", prompt, answers), 10**6)
        except DataError:
            continue
        longest = max(len(sample.input_ids) for sample in samples)
        pair = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        if longest <= args.max_tokens:
            found.setdefault(json.dumps(prompt), (longest, pair))
    return [pair for _, pair in sorted(found.values(), key=lambda entry: entry[0])][: args.count]


def run(script: str, flags: dict[str, Any], log: Path) -> str:
    """Runs a script of the repository; what it says goes to a file too."""
    arguments = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    finished = subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True)
    log.write_text(finished.stdout + finished.stderr, encoding="utf-8")
    if finished.returncode:
        raise SystemExit(f"{script} failed: {log}")
    return finished.stdout


def train(pairs: list[dict[str, Any]], args: argparse.Namespace, seed: int, work: Path) -> list[dict[str, float]]:
    """Trains and converts with one seed, and returns the run's metrics."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    drawn = random.Random(seed).sample(pairs, len(pairs))
    for split, part in (("test", drawn[: args.held_out]), ("train", drawn[args.held_out :])):
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in part]
        (work / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    model = from_root(args.model)
    flags = {"model_dir": model.parent, "model_name": model.name, "data_path": work, "output_dir": work / "output"}
    flags |= {"epochs": 1, "batch_size": 4, "grad_accum": 1, "max_tokens": args.max_tokens, "lr": args.lr, "seed": seed}
    flags |= {"pack_tokens": max(2048, args.max_tokens), "max_new_tokens": 1, "eval_steps": 10**6, "save_steps": 10**6}
    run("deepspeed_dpo/train.py", flags, work / "train.log")
    (metrics,) = work.rglob("metrics.jsonl")
    convert = {"zero_model": metrics.parent, "org_model": model, "save_model": f"check_preferences_{seed}", "t": 1}
    said = run("convert_model.py", convert, work / "convert.log")
    print(*[line for line in said.splitlines() if line.startswith("Link")], sep="\n", flush=True)
    shutil.rmtree(ROOT / "output_hf" / convert["save_model"])
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def main(args: argparse.Namespace) -> None:
    """Trains with every seed and compares."""
    work, pairs = from_root(args.work_dir), choose_pairs(args)
    names = ("rewards/accuracy", "rewards/margin", "loss", "kl")
    rows = []
    print(f"{len(pairs)} pairs, of which {args.held_out} are held out, lr {args.lr}", flush=True)
    for seed in range(1, args.seeds + 1):
        lines = train(pairs, args, seed, work / str(seed))
        held_out = [line for line in lines if "eval/loss" in line]
        seconds = sum(line.get("train/step_sec", 0) for line in lines)
        row = {name: [held_out[0][f"eval/{name}"], held_out[-1][f"eval/{name}"]] for name in names}
        rows.append(row | {"seconds": seconds, "steps": lines[-1]["step"]})
        print(f"seed {seed}: {rows[-1]}", flush=True)
    print(f"\n{len(pairs)} pairs, {args.held_out} held out, {args.seeds} seeds\n")
    print("| held out | before | after, each seed | mean |\n|---|---|---|---|")
    for name in names:
        before, after = (statistics.mean(row[name][place] for row in rows) for place in (0, 1))
        print(f"| {name} | {before:.4f} | {', '.join(f'{row[name][1]:.4f}' for row in rows)} | {after:.4f} |")
    print("\n" + json.dumps({"check": "preferences", "pairs": len(pairs), "results": rows}))


if __name__ == "__main__":
    main(build_parser().parse_args())
