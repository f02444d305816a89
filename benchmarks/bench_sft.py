"""Measures LoRA fine-tuning on real comments against plain PyTorch, LLaMA-Factory and TRL: speed, memory, loss.

    python benchmarks/bench_sft.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4 --data_dir data
    python benchmarks/bench_sft.py --model ... --data_dir data --architecture qwen3_5

All train one epoch on the same comments (whole videos) with the same model, LoRA on all linear layers, fp32, learning
rate and samples an update, in turn, --rounds times; then ours and the fastest peer that keeps samples apart once more
on --final comments. Seconds are those of the training loop, without loading; memory is the process's peak; the held-out
loss is measured for all by the same plain loop. Peers get virtual environments of their own in --work_dir.

--architecture takes random weights of about 0.1B numbers instead, with --model's tokenizer, and compares the ways of
computing packs: shared, packed and one by one; and says which part of the time recurrent layers take.

Prints a markdown table and a JSON line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench_prepare_data import measured  # noqa: E402

from utils.data.records import read_records, to_messages  # noqa: E402
from utils.files import from_root  # noqa: E402

SETTINGS = {"batch_size": 4, "grad_accum": 8, "max_tokens": 1024, "lora_r": 16, "lora_alpha": 32, "lr": 2e-4}
PACK_TOKENS = 2048
# name -> (environment, whether a sample sees no other sample, rounds at most)
CONTENDERS = {
    "ours": ("ours", True, 99),
    "ours, nothing shared": ("ours", True, 99),
    "plain PyTorch, padded": ("ours", True, 99),
    "LLaMA-Factory, padded": ("llamafactory", True, 99),
    "LLaMA-Factory, packing": ("llamafactory", False, 99),
    "LLaMA-Factory, neat_packing": ("llamafactory", True, 1),
    "TRL, padded": ("trl", True, 99),
    "TRL, packing": ("trl", True, 99),
}
WAYS = ("shared", "packed", "single")
SHAPE = {
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 16,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
DELTA_RULE = {
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
ARCHITECTURES = {
    "llama": {"model_type": "llama"},
    "qwen3_5": {"model_type": "qwen3_5_text"} | DELTA_RULE,
    "granitemoehybrid": {
        "model_type": "granitemoehybrid",
        "layer_types": ["mamba", "mamba", "mamba", "attention"] * 4,
        "mamba_n_heads": 20,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "num_local_experts": 0,
        "shared_intermediate_size": 1792,
    },
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "conv", "conv", "full_attention"] * 4},
}
PEERS = {
    "llamafactory": ["torch==2.13.0", "llamafactory==0.9.5"],
    "trl": ["torch==2.13.0", "trl==1.16.0", "peft==0.21.2"],
}


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the base model, with SmolLM2's chat template")
    parser.add_argument("--data_dir", default="data", help="folder with data_train.json and data_test.json")
    parser.add_argument("--work_dir", default="benchmarks/output", help="for environments, data and adapters")
    parser.add_argument("--comments", type=int, default=64, help="training comments, in whole videos")
    parser.add_argument("--held_out", type=int, default=64, help="comments to measure the loss on")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--final", type=int, default=400, help="comments of the last comparison; 0: none")
    parser.add_argument("--only", default="", help="names of contenders separated by ; (not given: all)")
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="of a random model, in the place of --model")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser


def environment(name: str, work: Path) -> Path:
    """The Python of a peer's environment, which is made at the first use."""
    if name == "ours":
        return Path(sys.executable)
    python = work / f"env-{name}" / "bin/python"
    if not (work / f"env-{name}" / "ready").exists():
        print(f"Installing {' '.join(PEERS[name])} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", work / f"env-{name}"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[name]], check=True)
        if name == "llamafactory":
            # The CPU build of torch has no matching torchvision and torchaudio; text training calls neither, but
            # the second is imported.
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "-y", "torchvision", "torchaudio"], check=True)
            (package,) = (work / f"env-{name}").glob("lib/*/site-packages")
            (package / "torchaudio.py").touch()
        (work / f"env-{name}" / "ready").touch()
    return python


def write_data(args: argparse.Namespace, comments: int, work: Path) -> int:
    """Writes the comments the way every contender reads them.

    Returns:
        The number of training comments, whole videos up to about `comments`.
    """
    data_dir = from_root(args.data_dir)
    chosen: list[dict[str, Any]] = []
    for record in read_records(data_dir / "data_train.json"):
        if len(chosen) >= comments and record["video_id"] != chosen[-1]["video_id"]:
            break
        chosen.append(record)
    held_out = list(read_records(data_dir / "data_test.json"))[: args.held_out]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name, records in (("messages", chosen), ("held_out", held_out)):
        lines = [json.dumps({"messages": to_messages(record)}, ensure_ascii=False) for record in records]
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split, records in (("train", chosen), ("test", held_out)):
        text = json.dumps(records, ensure_ascii=False)
        (work / f"data_{split}.json").write_text(text, encoding="utf-8")
    columns = {"messages": "messages"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {"file_name": "messages.jsonl", "formatting": "sharegpt", "columns": columns}
    info["tags"] = tags | {"system_tag": "system"}
    (work / "dataset_info.json").write_text(json.dumps({"comments": info}))
    return len(chosen)


def in_fp32(model: Path, work: Path) -> Path:
    """A folder of the same model whose configuration says fp32: LLaMA-Factory trains in what stands there."""
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    return folder


def make_random(architecture: str, tokenizer: Path, work: Path) -> None:
    """Writes a model with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    own = AutoTokenizer.from_pretrained(tokenizer)
    own.save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"vocab_size": len(own), "bos_token_id": None, "eos_token_id": own.eos_token_id, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE, **ends, **ARCHITECTURES[architecture]))
    model.save_pretrained(folder)
    print(f"{architecture}: {sum(weight.numel() for weight in model.parameters()):,} weights", flush=True)


def train_one_way(folder: Path, work: Path, way: str) -> dict[str, float]:
    """Trains LoRA for an epoch, computing packs in one way.

    Returns:
        `seconds` of the loop, `tokens` that were computed, and `recurrent`, the part of the time that is spent in
        recurrent layers.
    """
    import time

    import torch

    from utils.data.chat import make_chat
    from utils.data.samples import load_samples
    from utils.data.tokenizer import load_tokenizer
    from utils.train.forward import SINGLE, make_layout, supervised_logits, trie_format, use_tries
    from utils.train.packing import draw_windows, plan_packs, rank_packs
    from utils.train.tensors import token_logprobs
    from utils.weights.loading import add_lora, load_model

    chat = make_chat(load_tokenizer(folder))
    samples = load_samples(work / "data_train.json", chat, SETTINGS["max_tokens"], work / "cache").samples
    model = add_lora(load_model(folder, torch.float32), SETTINGS["lora_r"], SETTINGS["lora_alpha"], 0.0, "all-linear")
    use_tries(model)
    form = SINGLE if way == "single" else trie_format(model)
    layout = make_layout(form, model, "cpu", PACK_TOKENS, share_prefix=way == "shared")
    windows = draw_windows(samples.group, SETTINGS["batch_size"] * SETTINGS["grad_accum"], 8, 1, 0)
    plan = plan_packs(samples, windows, layout)
    weights = [weight for weight in model.train().parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=SETTINGS["lr"])
    spent, started = 0.0, 0.0

    def begin(*_: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def end(*_: Any) -> None:
        nonlocal spent
        spent += time.perf_counter() - started

    for layer in model.modules():
        if hasattr(layer, "conv1d") or type(layer).__name__.endswith("ShortConv"):
            layer.register_forward_pre_hook(begin)
            layer.register_forward_hook(end)
            layer.register_full_backward_pre_hook(begin)
            layer.register_full_backward_hook(end)
    loop = time.perf_counter()
    for number in range(len(windows)):
        for pack in rank_packs(samples, plan, number, 0):
            logits = supervised_logits(model, pack, form)
            (-token_logprobs(logits, pack.target_ids).sum() / len(samples)).backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - loop
    tokens = plan.count(samples, range(len(windows)))["executed"]
    return {"seconds": seconds, "tokens": tokens, "recurrent": spent / seconds}


def compare_ways(args: argparse.Namespace, comments: int, work: Path) -> dict[str, list[dict[str, float]]]:
    """Trains a random model in all ways, in turn, each in a process of its own; prints a table."""
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(1, args.rounds + 1):
        for way in WAYS:
            print(f"round {number}: {way} ...", flush=True)
            own = [sys.executable, __file__, "--model", args.model, "--work_dir", args.work_dir, "--way", way]
            _, peak_gb = measured(own)
            found = json.loads((work / f"{way}.json").read_text(encoding="utf-8"))
            results[way].append(found | {"peak_gb": peak_gb})
            print(f"    {results[way][-1]}", flush=True)
    print(f"\n{args.architecture}: {comments} comments, {os.cpu_count()} cores\n")
    print("| | samples/s | shared is faster by | tokens | in recurrent layers | peak memory, GB |")
    print("|---|---|---|---|---|---|")
    for way, runs in results.items():
        ratios = sorted(run["seconds"] / ours["seconds"] for run, ours in zip(runs, results["shared"], strict=True))
        range_text = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(ratios) > 1 else ""
        speed = sorted(comments / run["seconds"] for run in runs)[len(runs) // 2]
        print(
            f"| {way} | {speed:.2f} | {ratios[len(ratios) // 2]:.2f}x{range_text} | {runs[0]['tokens']:,} "
            f"| {runs[0]['recurrent']:.0%} | {max(run['peak_gb'] for run in runs):.2f} |"
        )
    return results


def command(name: str, python: Path, model: Path, work: Path, output: Path) -> list[str]:
    """What runs a contender."""
    flags = [text for key, value in SETTINGS.items() for text in (f"--{key}", str(value))]
    if name.startswith("ours"):
        own = {
            "model_dir": model.parent,
            "model_name": model.name,
            "data_dir": work,
            "output_dir": output,
            "epochs": 1,
            "lora_dropout": 0,
            "lr_scheduler": "constant",
            "warmup_ratio": 0,
            "eval_samples": 0,
            "precision": "fp32",
            "pack_tokens": PACK_TOKENS,
            "share_prefix": name == "ours",
        }
        own_flags = [text for key, value in own.items() for text in (f"--{key}", str(value))]
        return [str(python), str(ROOT / "deepspeed_ft/train.py"), *flags, *own_flags]
    if name.startswith("LLaMA-Factory"):
        packing = "packing" in name
        own = {
            "stage": "sft",
            "dataset": "comments",
            "cutoff_len": PACK_TOKENS if packing else SETTINGS["max_tokens"],
            "packing": packing,
            "neat_packing": "neat" in name,
            "per_device_train_batch_size": 1 if packing else SETTINGS["batch_size"],
            "gradient_accumulation_steps": 4 if packing else SETTINGS["grad_accum"],
        }
        return factory_command(python, model, work, output, SETTINGS, own)
    trainer = {"plain PyTorch, padded": "plain", "TRL, padded": "trl", "TRL, packing": "trl_packing"}[name]
    return peer_command(python, trainer, model, work, output)


def factory_command(
    python: Path, model: Path, work: Path, output: Path, settings: dict[str, Any], own: dict[str, Any]
) -> list[str]:
    """What runs LLaMA-Factory: LoRA on all linear layers in fp32 on the CPU, and what a benchmark asks for beyond."""
    config = {
        "do_train": True,
        "model_name_or_path": str(model),
        "template": "smollm2",
        "dataset_dir": str(work),
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": settings["lora_r"],
        "lora_alpha": settings["lora_alpha"],
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "disable_gradient_checkpointing": True,
        "use_cpu": True,
        "output_dir": str(output),
        "overwrite_output_dir": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "preprocessing_num_workers": 1,
    }
    output.mkdir(parents=True)
    (output / "config.yaml").write_text(json.dumps(config | own))  # JSON is YAML too.
    return [str(python.with_name("llamafactory-cli")), "train", str(output / "config.yaml")]


def peer_command(python: Path, trainer: str, model: Path, work: Path, output: Path) -> list[str]:
    """What runs sft_peer.py."""
    flags = [text for key, value in SETTINGS.items() for text in (f"--{key}", str(value))]
    places = ["--trainer", trainer, "--work_dir", str(work), "--model", str(model), "--output_dir", str(output)]
    return [str(python), str(ROOT / "benchmarks/sft_peer.py"), *places, "--pack_tokens", str(PACK_TOKENS), *flags]


def loop_seconds(name: str, output: Path) -> float:
    """How long the training loop of a finished run took."""
    if name.startswith("ours"):
        (metrics,) = output.rglob("metrics.jsonl")
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        return sum(line["train/step_sec"] for line in lines if "train/step_sec" in line)
    if name.startswith("LLaMA-Factory"):
        return json.loads((output / "train_results.json").read_text())["train_runtime"]
    return json.loads((output / "result.json").read_text())["seconds"]


def adapter_of(output: Path) -> Path:
    """Where a finished run left its adapter; runs without held-out samples save once, at the end."""
    (path,) = output.rglob("adapter_model.safetensors")
    return path.parent


def run(name: str, model: Path, work: Path, number: int) -> dict[str, float]:
    """Trains with a contender: seconds of its loop, peak memory in GB, and in the first round its held-out loss."""
    output = work / f"{name.replace(', ', '-').replace(' ', '_')}-{number}"
    python = environment(CONTENDERS[name][0], from_root(work).parent)
    print(f"round {number}: {name} ...", flush=True)
    _, peak_gb = measured(command(name, python, model, work, output))
    result = {"seconds": loop_seconds(name, output), "peak_gb": peak_gb}
    if number == 1:
        probe = work / "held_out_loss"
        adapter = ["--adapter", str(adapter_of(output))]
        measured(peer_command(Path(sys.executable), "none", model, work, probe) + adapter)
        result["held_out"] = json.loads((probe / "result.json").read_text())["held_out"]
    print(f"    {result}", flush=True)
    return result


def table(title: str, comments: int, results: dict[str, list[dict[str, float]]]) -> None:
    """Prints speed, ratios to ours with their range over the rounds, memory and loss."""
    print(f"\n{title}: {comments} comments, {os.cpu_count()} cores\n")
    print("| | samples/s | ours is faster by | peak memory, GB | held-out loss |\n|---|---|---|---|---|")
    for name, runs in results.items():
        speeds = sorted(comments / run["seconds"] for run in runs)
        ratios = sorted(run["seconds"] / ours["seconds"] for run, ours in zip(runs, results["ours"], strict=False))
        middle = len(ratios) // 2
        range_text = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(ratios) > 1 else ""
        apart = "" if CONTENDERS[name][1] else " (samples see one another)"
        peak, loss = max(run["peak_gb"] for run in runs), runs[0].get("held_out", float("nan"))
        print(
            f"| {name}{apart} | {speeds[len(speeds) // 2]:.2f} | {ratios[middle]:.2f}x{range_text} | {peak:.2f} "
            f"| {loss:.4f} |"
        )


def main(args: argparse.Namespace) -> None:
    """Runs all in turn and prints the figures."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # All on the CPU.
    work = from_root(args.work_dir)
    if args.way:
        found = train_one_way(work / "model", work / "few", args.way)
        (work / "few" / f"{args.way}.json").write_text(json.dumps(found), encoding="utf-8")
        return
    if args.architecture:
        make_random(args.architecture, from_root(args.model), work)
        comments = write_data(args, args.comments, work / "few")
        results = compare_ways(args, comments, work / "few")
        print("\n" + json.dumps({"bench": "sft", "architecture": args.architecture, "comments": comments,
                                 "settings": SETTINGS, "results": results}))  # fmt: skip
        return
    model = in_fp32(from_root(args.model), work)
    chosen = args.only.split(";") if args.only else list(CONTENDERS)
    comments = write_data(args, args.comments, work / "few")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for number in range(1, args.rounds + 1):
        for name in chosen:
            if number <= CONTENDERS[name][2]:
                results[name].append(run(name, model, work / "few", number))
    table("In turn", comments, results)
    if args.final:
        apart = [name for name in chosen if CONTENDERS[name][1] and not name.startswith("ours")]
        best = min(apart, key=lambda name: min(run["seconds"] for run in results[name]))
        final_comments = write_data(args, args.final, work / "many")
        final = {name: [run(name, model, work / "many", 1)] for name in ("ours", best)}
        table("Once more", final_comments, final)
        results |= {f"{name}, {final_comments} comments": runs for name, runs in final.items()}
    print("\n" + json.dumps({"bench": "sft", "comments": comments, "settings": SETTINGS, "results": results}))


if __name__ == "__main__":
    main(build_parser().parse_args())
