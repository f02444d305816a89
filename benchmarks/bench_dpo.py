"""Measures DPO with LoRA on preference pairs against LLaMA-Factory and TRL: speed, memory, loss.

    python benchmarks/bench_dpo.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4 --pairs dpo_zh_demo.json

All train one epoch on the same pairs in the same order with the same model, LoRA on all linear layers, fp32, learning
rate and pairs an update, in turn, --rounds times: first on the first --count pairs of the file, then on --count of
those whose prompt is about as long as their answers. Pairs longer than 1,024 tokens, which everyone shortens another
way, are left out. Seconds are those of the training loop; memory is the process's peak. Peers get virtual environments
of their own in --work_dir. Prints markdown tables and a JSON line.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench_prepare_data import measured  # noqa: E402
from bench_sft import environment, factory_command, in_fp32  # noqa: E402

from utils.files import from_root  # noqa: E402

# Updates of 4 pairs, two at a time: four of up to 1,024 tokens a text take LLaMA-Factory more than 24 GB.
SETTINGS = {"batch_size": 2, "grad_accum": 2, "max_tokens": 1024, "lora_r": 16, "lora_alpha": 32, "lr": 5e-5}
BETA = 0.1
CONTENDERS = {"ours": "ours", "LLaMA-Factory": "llamafactory", "TRL": "trl"}


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the base model, with SmolLM2's chat template")
    parser.add_argument("--pairs", required=True, help="file of preference pairs in any known format")
    parser.add_argument("--work_dir", default="benchmarks/output", help="for environments, data and adapters")
    parser.add_argument("--count", type=int, default=40, help="pairs to train on")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    return parser


def choose_pairs(args: argparse.Namespace, alike: bool) -> list[dict[str, Any]]:
    """Pairs that fit, the first ones of the file.

    Args:
        args: model, pairs, count.
        alike: Whether the prompt has 0.6 to 1.7 times the tokens of an answer.
    """
    import numpy as np

    from utils.data.chat import Dialogue, make_chat
    from utils.data.pairs import to_pair
    from utils.data.records import DataError, read_records
    from utils.data.tokenizer import load_tokenizer

    chat = make_chat(load_tokenizer(from_root(args.model)))
    chosen = []
    for record in read_records(from_root(args.pairs)):
        try:
            messages, *answers = to_pair(record)
            prompt = len(chat.prompt_ids(messages))
            samples = chat.samples(Dialogue("", messages, answers), SETTINGS["max_tokens"])
        except DataError:
            continue
        if not samples or any(sample.supervised.argmax() != prompt for sample in samples):
            continue
        answer_tokens = np.mean([sample.supervised.sum() for sample in samples])
        if alike and not 0.6 <= prompt / answer_tokens <= 1.7:
            continue
        chosen.append({"prompt": messages, "chosen": answers[0], "rejected": answers[1]})
        if len(chosen) == args.count:
            break
    return chosen


def for_ours(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Puts pairs in an order from which ours, which always draws, draws them in the order given."""
    import numpy as np

    from utils.train.packing import draw_windows

    (order,) = draw_windows(np.arange(len(pairs)), len(pairs), 1, 1, 42)
    return [pairs[place] for place in np.argsort(order)]


def write_data(pairs: list[dict[str, Any]], work: Path) -> None:
    """Writes the pairs the way every contender reads them."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "ours").mkdir(parents=True)
    factory = [
        {"messages": pair["prompt"]}
        | {side: {"role": "assistant", "content": pair[side]} for side in ("chosen", "rejected")}
        for pair in pairs
    ]
    # An empty test file: nothing is held out.
    files = {"pairs": pairs, "factory": factory, "ours/train": for_ours(pairs), "ours/test": []}
    for name, records in files.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {"file_name": "factory.jsonl", "formatting": "sharegpt", "ranking": True}
    info["columns"] = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
    info["tags"] = tags | {"system_tag": "system"}
    (work / "dataset_info.json").write_text(json.dumps({"pairs": info}))


def command(name: str, python: Path, model: Path, work: Path, output: Path) -> list[str]:
    """What runs a contender."""
    if name == "ours":
        own = SETTINGS | {
            "model_dir": model.parent,
            "model_name": model.name,
            "data_path": work / "ours",
            "output_dir": output,
            "epochs": 1,
            "beta": BETA,
            "lora_dropout": 0,
            "lr_scheduler": "constant",
            "warmup_ratio": 0,
            "group_size": 1,
            "precision": "fp32",
        }
        flags = [text for key, value in own.items() for text in (f"--{key}", str(value))]
        return [str(python), str(ROOT / "deepspeed_dpo/train.py"), *flags]
    if name == "TRL":
        own = SETTINGS | {"model": model, "pairs": work / "pairs.jsonl", "output_dir": output, "beta": BETA}
        flags = [text for key, value in own.items() for text in (f"--{key}", str(value))]
        return [str(python), str(ROOT / "benchmarks/dpo_peer.py"), *flags]
    own = {
        "stage": "dpo",
        "dataset": "pairs",
        "cutoff_len": SETTINGS["max_tokens"],
        "pref_beta": BETA,
        "pref_loss": "sigmoid",
        "per_device_train_batch_size": SETTINGS["batch_size"],
        "gradient_accumulation_steps": SETTINGS["grad_accum"],
        "disable_shuffling": True,
    }
    return factory_command(python, model, work, output, SETTINGS, own)


def results_of(name: str, output: Path) -> tuple[float, list[float]]:
    """Seconds of a finished run's training loop, and its loss at each step."""
    if name == "ours":
        (metrics,) = output.rglob("metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines = [line for line in lines if "train/loss" in line]
        return sum(line["train/step_sec"] for line in lines), [line["train/loss"] for line in lines]
    if name == "TRL":
        result = json.loads((output / "result.json").read_text())
        return result["seconds"], result["losses"]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return history[-1]["train_runtime"], [line["loss"] for line in history if "loss" in line]


def run(name: str, model: Path, work: Path, number: int) -> dict[str, Any]:
    """Trains with a contender: seconds of its loop, peak memory in GB, losses."""
    output = work / f"{name}-{number}"
    python = environment(CONTENDERS[name], work.parent)
    print(f"round {number}: {name} ...", flush=True)
    _, peak_gb = measured(command(name, python, model, work, output))
    seconds, losses = results_of(name, output)
    print(f"    {seconds:.1f} s, {peak_gb:.2f} GB, losses {[round(loss, 4) for loss in losses[:5]]}", flush=True)
    return {"seconds": seconds, "peak_gb": peak_gb, "losses": losses}


def table(title: str, count: int, results: dict[str, list[dict[str, Any]]]) -> None:
    """Prints speed, ratios to ours with their range over the rounds, memory, and how far the losses are apart."""
    print(f"\n{title}: {count} pairs, {os.cpu_count()} cores\n")
    print("| | pairs/s | ours is faster by | peak memory, GB | loss, steps 1 to 4 |\n|---|---|---|---|---|")
    for name, runs in results.items():
        speeds = sorted(count / run["seconds"] for run in runs)
        ratios = sorted(run["seconds"] / ours["seconds"] for run, ours in zip(runs, results["ours"], strict=True))
        middle = len(ratios) // 2
        losses = ", ".join(f"{loss:.4f}" for loss in runs[0]["losses"][:4])
        print(
            f"| {name} | {speeds[middle]:.2f} | {ratios[middle]:.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
            f"| {max(run['peak_gb'] for run in runs):.2f} | {losses} |"
        )


def main(args: argparse.Namespace) -> None:
    """Runs all in turn and prints the figures."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # All on the CPU.
    model = in_fp32(from_root(args.model), from_root(args.work_dir))
    everything = {}
    for title, alike in (("Pairs as they come", False), ("Prompts about as long as the answers", True)):
        work = from_root(args.work_dir) / ("alike" if alike else "pairs")
        pairs = choose_pairs(args, alike)
        write_data(pairs, work)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for number in range(1, args.rounds + 1):
            for name in CONTENDERS:
                results[name].append(run(name, model, work, number))
        table(title, len(pairs), results)
        everything[title] = {"pairs": len(pairs), "results": results}
    print("\n" + json.dumps({"bench": "dpo", "settings": SETTINGS, "beta": BETA, "runs": everything}))


if __name__ == "__main__":
    main(build_parser().parse_args())
