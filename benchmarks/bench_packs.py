"""Measures how long it takes to plan and lay out the packs of many samples, and which pack size trains fastest.

    python benchmarks/bench_packs.py --samples 1000000
    python benchmarks/bench_packs.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4 --data_dir data

Without a model: random samples of 150 tokens, 100 of them shared by the 20 samples of a video, on one core. With one:
updates of LoRA on real comments with several --pack_tokens, in turn. Prints a markdown table and a JSON line.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.files import from_root


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000, help="random samples to plan")
    parser.add_argument("--model", help="train this model instead")
    parser.add_argument("--data_dir", default="data", help="folder with data_train.json")
    parser.add_argument("--pack_tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--window", type=int, default=32, help="samples in an update")
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--updates", type=int, default=4)
    return parser


def plan_many(args: argparse.Namespace) -> dict[str, float]:
    """Plans one epoch of random samples, and lays out the packs of a hundredth of it."""
    import numpy as np

    from utils.data.samples import Samples
    from utils.train.packing import Layout, PackCost, draw_windows, plan_packs, rank_packs

    random = np.random.default_rng(0)
    videos = -(-args.samples // 20)
    with tempfile.TemporaryDirectory() as folder:
        shape = (args.samples, 150)
        tokens = np.memmap(Path(folder, "tokens.bin"), dtype=np.int32, mode="w+", shape=shape)
        for video in range(videos):
            rows = tokens[20 * video : 20 * video + 20]
            rows[:, :100] = random.integers(0, 50_000, 100)
            rows[:, 100:] = random.integers(0, 50_000, (len(rows), 50))
        begin = np.arange(args.samples, dtype=np.int64) * 150
        samples = Samples(
            tokens=tokens.reshape(-1).view(np.ndarray),
            supervised=np.tile(np.arange(150) >= 100, args.samples),
            begin=begin,
            end=begin + 150,
            group=np.arange(args.samples) // 20,
            targets=np.full(args.samples, 50),
            ids=[""] * args.samples,
        )
        before_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        started = time.perf_counter()
        windows = draw_windows(samples.group, args.window, args.group_size, 1, 0)
        plan = plan_packs(samples, windows, Layout(2048, 1, True, PackCost(1400, 76)))
        planned = time.perf_counter()
        some = range(0, len(windows), 100)
        packs = sum(len(rank_packs(samples, plan, window, 0)) for window in some)
        laid_out = time.perf_counter()
        count = plan.count(samples, range(len(windows)))
        return {
            "plan_sec": planned - started,
            "lay_out_ms_a_step": 1000 * (laid_out - planned) / len(some),
            "packs_a_step": packs / len(some),
            "factor": count["logical"] / count["executed"],
            "more_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 - before_gb,
        }


def train_some(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Forward and backward of the same updates with several pack sizes; the median over the updates."""
    import statistics

    import torch

    from utils.data.chat import make_chat
    from utils.data.samples import load_samples
    from utils.data.tokenizer import load_tokenizer
    from utils.train.forward import supervised_logits, trie_format, use_tries
    from utils.train.packing import Layout, draw_windows, pack_cost, plan_packs, rank_packs
    from utils.train.tensors import token_logprobs
    from utils.weights.loading import add_lora, load_model, scale_early

    path = from_root(args.model)
    chat = make_chat(load_tokenizer(path))
    with tempfile.TemporaryDirectory() as cache:
        samples = load_samples(from_root(args.data_dir) / "data_train.json", chat, 1024, Path(cache)).samples
        model = add_lora(load_model(path, torch.float32), 16, 32, 0.0, "all-linear").train()
        use_tries(model)
        scale_early(model)
        form = trie_format(model)
        windows = draw_windows(samples.group, args.window, args.group_size, 1, 0)[: args.updates]
        cost = pack_cost(model, "cpu")
        plans = {size: plan_packs(samples, windows, Layout(size, 1, True, cost)) for size in args.pack_tokens}
        seconds: dict[int, list[float]] = {size: [] for size in args.pack_tokens}
        for number in range(len(windows)):
            for size, plan in plans.items():
                started = time.perf_counter()
                for pack in rank_packs(samples, plan, number, 0):
                    logits = supervised_logits(model, pack, form)
                    (-token_logprobs(logits, pack.target_ids).sum()).backward()
                seconds[size].append(time.perf_counter() - started)
        count = {size: plan.count(samples, range(len(windows))) for size, plan in plans.items()}
        return {
            str(size): {
                "samples_per_sec": args.window / statistics.median(seconds[size]),
                "factor": count[size]["logical"] / count[size]["executed"],
                "packs_a_step": len(plans[size].pack_end) / len(windows),
            }
            for size in args.pack_tokens
        }


def main(args: argparse.Namespace) -> None:
    """Measures and prints."""
    if args.model:
        results = train_some(args)
        print("| pack_tokens | samples/s | fewer tokens by | packs a step |\n|---|---|---|---|")
        for size, row in results.items():
            print(f"| {size} | {row['samples_per_sec']:.2f} | {row['factor']:.2f}x | {row['packs_a_step']:.1f} |")
    else:
        results = plan_many(args)
        print("| | |\n|---|---|")
        for name, value in results.items():
            print(f"| {name} | {value:.2f} |")
    print(json.dumps({"bench": "packs", "results": results}))


if __name__ == "__main__":
    main(build_parser().parse_args())
