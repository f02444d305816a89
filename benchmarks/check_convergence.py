"""Does it hurt that comments of one video stand together in a step? Held-out loss with and without, over seeds.

    python benchmarks/check_convergence.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4 --data_dir data

Trains the first --layers layers of a model for an epoch on --comments comments of whole videos: without sharing and in
random order, and with shared prefixes for several group sizes, each with the same seeds. Prints a markdown table and a
JSON line, and draws the loss curves.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench_sft import write_data  # noqa: E402

from utils.files import from_root  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the model whose first layers are trained")
    parser.add_argument("--data_dir", default="data", help="folder with data_train.json and data_test.json")
    parser.add_argument("--work_dir", default="benchmarks/output/convergence", help="for the small model and the runs")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--comments", type=int, default=600)
    parser.add_argument("--held_out", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--group_sizes", type=int, nargs="+", default=[4, 8, 16])
    return parser


def write_model(source: Path, layers: int, target: Path) -> None:
    """Writes the first layers of a model as a model of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def train(work: Path, name: str, seed: int, flags: dict[str, Any]) -> list[dict[str, float]]:
    """Runs deepspeed_ft/train.py and returns its metrics."""
    output = work / f"{name}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    flags = {
        "model_dir": work,
        "model_name": "model",
        "data_dir": work / "data",
        "output_dir": output,
        "epochs": 1,
        "batch_size": 4,
        "grad_accum": 4,
        "lora_dropout": 0,
        "lr": 2e-3,
        "eval_steps": 10,
        "eval_samples": -1,
        "max_new_tokens": 1,
        "save_steps": 1000,
        "seed": seed,
    } | flags
    arguments = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "deepspeed_ft/train.py"), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    (metrics,) = output.rglob("metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def draw(curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Draws the held-out loss over the steps, a line a seed, and where each seed ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    last = {name: [run[-1]["eval/loss"] for run in runs] for name, runs in curves.items()}
    plain = statistics.mean(last["nothing shared"])
    right.axhspan(0.99 * plain, 1.01 * plain, color="0.9")
    colors = ("k", "tab:blue", "tab:orange", "tab:green", "tab:red")
    for place, (color, (name, runs)) in enumerate(zip(colors, curves.items(), strict=False)):
        for number, run in enumerate(runs):
            points = [(line["step"], line["eval/loss"]) for line in run if "eval/loss" in line]
            left.plot(*zip(*points, strict=True), color=color, linewidth=1, label=name if number == 0 else None)
        right.plot([place] * len(runs), last[name], "o", color=color, markersize=4)
        right.plot([place - 0.25, place + 0.25], [statistics.mean(last[name])] * 2, color=color)
    left.set(xlabel="step", ylabel="held-out loss (nats a token)", yscale="log", title="a line a seed")
    left.legend()
    left.grid(alpha=0.3, which="both")
    right.set(title="the last step (grey: 1 %)")
    right.set_xticks(range(len(last)), [name.replace(" ", "\n", 1) for name in last])
    figure.savefig(path)


def main(args: argparse.Namespace) -> None:
    """Trains all and compares."""
    work = from_root(args.work_dir)
    comments = write_data(args, args.comments, work / "data")
    shutil.rmtree(work / "model", ignore_errors=True)
    write_model(from_root(args.model), args.layers, work / "model")
    kinds = {"nothing shared": {"share_prefix": False}}
    kinds |= {f"groups of {size}": {"group_size": size} for size in args.group_sizes}
    curves: dict[str, list[list[dict[str, float]]]] = {name: [] for name in kinds}
    for seed in range(1, args.seeds + 1):
        for name, flags in kinds.items():
            curves[name].append(train(work, name.replace(" ", "_"), seed, flags))
            print(f"seed {seed}, {name}: held-out loss {curves[name][-1][-1]['eval/loss']:.4f}", flush=True)
    losses = {name: [run[-1]["eval/loss"] for run in runs] for name, runs in curves.items()}
    plain, plain_deviation = statistics.mean(losses["nothing shared"]), statistics.stdev(losses["nothing shared"])
    print(f"\n{comments} comments, {args.seeds} seeds\n")
    print("| | held-out loss | against nothing shared | in pooled deviations | tokens |\n|---|---|---|---|---|")
    rows = {}
    for name, values in losses.items():
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        pooled = ((deviation**2 + plain_deviation**2) / 2) ** 0.5
        lines = [line for run in curves[name] for line in run if "train/tokens_per_sec" in line]
        logical = sum(line["train/tokens_per_sec"] * line["train/step_sec"] for line in lines)
        executed = sum(line["train/executed_tokens_per_sec"] * line["train/step_sec"] for line in lines)
        rows[name] = {"losses": values, "factor": logical / executed}
        print(
            f"| {name} | {mean:.4f} ± {deviation:.4f} | {mean / plain - 1:+.2%} | {(mean - plain) / pooled:+.1f} "
            f"| {logical / executed:.2f}x fewer |"
        )
    draw(curves, work / "convergence.png")
    print("\n" + json.dumps({"check": "convergence", "comments": comments, "results": rows}))


if __name__ == "__main__":
    main(build_parser().parse_args())
