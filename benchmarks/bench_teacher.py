"""Measures how fast answers are collected from a teacher that takes its time, against the most that is possible.

    python benchmarks/bench_teacher.py

A teacher on 127.0.0.1 takes 0.2 to 0.8 s for an answer, without faults. With so many requests under way at a time the
most is their number divided by the mean latency. Prints a markdown table and a JSON line.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench_prepare_data import measured  # noqa: E402
from teacher_server import TeacherServer  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--latency", type=float, nargs=2, default=[0.2, 0.8], help="seconds, from and to")
    return parser


def collect(prompts: int, concurrency: int, latency: list[float], work: Path) -> tuple[float, float]:
    """Collects answers to as many prompts.

    Returns:
        Seconds that it took, without starting Python, and peak memory in GB.
    """
    real = {"from": "assistant", "value": "好"}
    asked = [{"from": "user", "value": f"视频标题：{number}"} for number in range(prompts)]
    records = [{"id": str(n), "video_id": str(n), "conversations": [turn, real]} for n, turn in enumerate(asked)]
    (work / "data_train.json").write_text(json.dumps(records), encoding="utf-8")
    with TeacherServer((latency[0], latency[1])) as server:
        (work / "teachers.yaml").write_text(json.dumps({"kind": {"base_url": server.url, "model": "kind"}}))
        script = str(ROOT / "deepspeed_distill/prepare_data.py")
        flags = ["--model_name", "kind", "--data_dir", str(work), "--teacher_config", str(work / "teachers.yaml")]
        output = work / str(concurrency)
        command = [sys.executable, script, *flags, "--output_dir", str(output), "--concurrency", str(concurrency)]
        _, peak_gb = measured(command)
        seconds = server.last_at - server.first_at
    assert sum(1 for _ in (output / "data_train_teacher_kind.jsonl").open()) == prompts
    return seconds, peak_gb


def main(args: argparse.Namespace) -> None:
    """Measures each number of requests."""
    mean = sum(args.latency) / 2
    print(f"{args.prompts} prompts, {args.latency[0]} to {args.latency[1]} s each\n")
    print("| requests under way | answers/s | the most that is possible | part of it | peak memory, GB |")
    print("|---|---|---|---|---|")
    rows = {}
    for concurrency in args.concurrency:
        with tempfile.TemporaryDirectory() as work:
            seconds, peak_gb = collect(args.prompts, concurrency, args.latency, Path(work))
        rate, most = args.prompts / seconds, concurrency / mean
        rows[concurrency] = {"seconds": seconds, "rate": rate, "part": rate / most, "peak_gb": peak_gb}
        print(f"| {concurrency} | {rate:.1f} | {most:.0f} | {rate / most:.0%} | {peak_gb:.2f} |", flush=True)
    print("\n" + json.dumps({"bench": "teacher", "prompts": args.prompts, "results": rows}))


if __name__ == "__main__":
    main(build_parser().parse_args())
