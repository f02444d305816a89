"""Measures continued pre-training on documents against LLaMA-Factory's --stage pt and TRL: tokens a second, memory.

    python benchmarks/bench_pt.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4 --data text.jsonl

All train LoRA on all linear layers for one pass over the first documents of a file, fp32, with the same learning rate
and rows of --max_tokens, in turn, --rounds times. Ours packs documents and keeps them apart; at the peers' documents
stand one behind another, see one another, and are cut where a row is full. Updates are of 16 documents or 4 rows.
Seconds are those of the training loop, without loading; memory is the process's peak; tokens are all of the text, of
which LLaMA-Factory leaves out those of the last row, if it is not full. The environments are bench_sft.py's.

Prints a markdown table and a JSON line.
"""

import argparse
import json
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from bench_sft import ROOT, SETTINGS, environment, factory_command, in_fp32, loop_seconds, measured

from utils.data.records import read_records
from utils.files import from_root

CONTENDERS = {"ours": "ours", "LLaMA-Factory": "llamafactory", "TRL": "trl"}


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--data", required=True, help="file of records with a field text")
    parser.add_argument("--work_dir", default="benchmarks/output", help="for environments, data and adapters")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--max_tokens", type=int, default=1024, help="of a row, of a pass")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--only", default="", help="names of peers separated by ; (not given: all)")
    return parser


def command(name: str, python: Path, args: argparse.Namespace, model: Path, work: Path, output: Path) -> list[str]:
    """What runs a contender."""
    lora = {key: SETTINGS[key] for key in ("lora_r", "lora_alpha", "lr")}
    if name == "ours":
        own = {"model_dir": model.parent, "model_name": model.name, "data": work / "text.jsonl", "output_dir": output}
        own |= {"lora_dropout": 0, "lr_scheduler": "constant", "warmup_ratio": 0, "eval_samples": 0, "test_size": 0}
        own |= {"batch_size": 4, "grad_accum": 4, "max_tokens": args.max_tokens, "pack_tokens": args.max_tokens}
        own |= {"precision": "fp32", "gradient_checkpointing": False} | lora
        flags = [text for key, value in own.items() for text in (f"--{key}", str(value))]
        return [str(python), str(ROOT / "deepspeed_pt/train.py"), *flags]
    if name == "LLaMA-Factory":
        own = {"stage": "pt", "dataset": "text", "cutoff_len": args.max_tokens, "packing": True}
        own |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        return factory_command(python, model, work, output, SETTINGS, own)
    flags = [text for key, value in lora.items() for text in (f"--{key}", str(value))]
    flags += ["--max_tokens", str(args.max_tokens), "--pack_tokens", str(args.max_tokens)]
    flags += ["--batch_size", "1", "--grad_accum", "4"]
    places = ["--trainer", "trl_text", "--work_dir", str(work), "--model", str(model), "--output_dir", str(output)]
    return [str(python), str(ROOT / "benchmarks/sft_peer.py"), *places, *flags]


def write_data(args: argparse.Namespace, work: Path) -> int:
    """Writes the text the way every contender reads it; returns its tokens, each document's end among them."""
    from utils.data.tokenizer import load_tokenizer

    texts = [{"text": record["text"]} for record in islice(read_records(from_root(args.data)), args.documents)]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in texts)
    (work / "text.jsonl").write_text(lines, encoding="utf-8")
    info = {"text": {"file_name": "text.jsonl", "columns": {"prompt": "text"}}}
    (work / "dataset_info.json").write_text(json.dumps(info))
    tokenizer = load_tokenizer(from_root(args.model))
    return sum(len(tokenizer.encode(record["text"])) + 1 for record in texts)


def main(args: argparse.Namespace) -> None:
    """Runs all in turn and prints the figures."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # All on the CPU.
    place = from_root(args.work_dir)
    work, chosen = place / "pt", [name for name in CONTENDERS if name == "ours" or not args.only or name in args.only]
    tokens = write_data(args, work)
    model = in_fp32(from_root(args.model), place)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for number in range(1, args.rounds + 1):
        for name in chosen:
            output = work / f"{name}-{number}"
            print(f"round {number}: {name} ...", flush=True)
            python = environment(CONTENDERS[name], place)
            _, peak_gb = measured(command(name, python, args, model, work, output))
            learnt = tokens // args.max_tokens * args.max_tokens if name == "LLaMA-Factory" else tokens
            seconds = loop_seconds(name, output)
            results[name].append({"seconds": seconds, "tokens_per_sec": learnt / seconds, "peak_gb": peak_gb})
            print(f"    {results[name][-1]}", flush=True)
    print(f"\n{args.documents} documents, {tokens:,} tokens, {os.cpu_count()} cores\n")
    print("| | tokens/s | ours is faster by | peak memory, GB |\n|---|---|---|---|")
    for name, runs in results.items():
        speeds = sorted(run["tokens_per_sec"] for run in runs)
        pairs = zip(runs, results["ours"], strict=True)
        ratios = sorted(ours["tokens_per_sec"] / run["tokens_per_sec"] for run, ours in pairs)
        middle, peak = len(runs) // 2, max(run["peak_gb"] for run in runs)
        spread = f"{ratios[middle]:.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {speeds[middle]:.0f} | {spread} | {peak:.2f} |")
    print("\n" + json.dumps({"bench": "pt", "tokens": tokens, "max_tokens": args.max_tokens, "results": results}))


if __name__ == "__main__":
    main(build_parser().parse_args())
