"""The arguments that all training scripts share, what is wrong with them, and what a script does with them."""

import argparse
import gc
import os
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from utils.cli import boolean, fail, quiet_libraries
from utils.data.records import find_split
from utils.files import exclusive_lock, explained, from_root, missing_model, read_json, sha256, shown, write_problem


def add_run_arguments(parser: argparse.ArgumentParser, output_dir: str, lora_lr: float, full_lr: float) -> None:
    """Adds the arguments that all training scripts share.

    Args:
        parser: The script's.
        output_dir: Where the stage's results go.
        lora_lr: The stage's learning rate for LoRA, for the help.
        full_lr: That for full training.
    """
    # fmt: off
    add = parser.add_argument
    add("--output_dir", default=output_dir, help="folder of the results")
    add("--train_mode", type=boolean, default=True, help="True: train")
    add("--test_mode", type=boolean, default=False, help="True: answer the held-out prompts, at the end")
    add = parser.add_argument_group("model").add_argument
    add("--model_dir", default="model", help="folder of the downloaded models")
    add("--tuner", choices=["lora", "full"], default="lora", help="train low-rank matrices (LoRA) or all weights")
    add("--train_bnb_enabled", type=boolean, default=False, help="True: 4-bit base weights (QLoRA), as --quant_bits 4")
    add("--quant_bits", type=int, choices=[4], help="bits of the frozen base weights (NF4); 16 or 32 without it")
    add("--lora_r", type=int, default=16, help="rank of LoRA")
    add("--lora_alpha", type=int, default=32, help="LoRA's update is scaled by alpha / r")
    add("--lora_dropout", type=float, default=0.05, help="dropout before the low-rank matrices, 0 to 1")
    add("--lora_target", default="all-linear", help="layers that get LoRA: all-linear, or names separated by commas")
    add("--chat_template", default="", help="file with a Jinja chat template to use instead of the model's own")
    add("--thoughts", choices=["drop", "keep"], default="drop", help="thoughts before answers (<think>, "
        "reasoning_content): leave them out, or learn them, and think before answering from then on")
    add("--trust_remote_code", type=boolean, default=False, help="True: run Python code that comes with the model")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=2, help="passes over the data")
    add("--max_steps", type=int, default=-1, help="stop after so many optimizer steps (-1: after the epochs)")
    add("--batch_size", type=int, default=4, help="samples of a rank, times --grad_accum, in an optimizer step")
    add("--grad_accum", type=int, default=8, help="an optimizer step sees batch_size x grad_accum x ranks samples")
    add("--max_tokens", type=int, default=1024, help="longest sample; the prompts of longer ones are shortened")
    add("--pack_tokens", type=int, default=2048, help="most tokens in a forward pass (samples are packed, not padded)")
    add("--share_prefix", type=boolean, default=True,
        help="True: compute what samples of a step have in common (a video's text) once; False: for each of them")
    add("--group_size", type=int,
        help="so many samples of a group (video) stand together in the data order; more share more, fewer mix better "
        "(default: 8, or 1 without --share_prefix)")
    add("--lr", type=float, help=f"peak learning rate (default: {lora_lr} for LoRA, {full_lr} for full training)")
    add("--lr_scheduler", choices=["cosine", "linear", "constant", "wsd"], default="cosine",
        help="after the warm-up; wsd: constant, and down in the last fifth of the steps")
    add("--warmup_ratio", type=float, default=0.03, help="part of the steps in which the learning rate rises")
    add("--weight_decay", type=float, default=0.0, help="of AdamW")
    add("--max_grad_norm", type=float, help="clip gradients to this norm (default: as the configuration says, else 1)")
    add("--seed", type=int, default=42, help="of data order, LoRA's first weights and dropout")

    add = parser.add_argument_group("engine").add_argument
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
        help="auto: bf16 where the card has it, else fp16; fp32 on a CPU")
    add("--zero_stage", type=int, choices=[0, 1, 2, 3],
        help="ZeRO shards 1: optimizer state, 2: and gradients, 3: and weights (default: as the configuration says)")
    add("--offload", choices=["none", "optimizer", "param"],
        help="keep optimizer states (at stage 3 also weights) in host memory (default: as the configuration says)")
    add("--gradient_checkpointing", type=boolean,
        help="True: recompute activations, a third slower, far less memory (default: True on a GPU, False on a CPU)")
    add("--deepspeed_config", default="", help="DeepSpeed configuration (default: ds_config.json beside the script)")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it.

    add = parser.add_argument_group("results").add_argument
    add("--ckpt_id", default="1", help="name of the best checkpoint; <ckpt_id>-last is the newest")
    add("--eval_steps", type=int, default=50, help="measure the held-out loss and show replies every N steps")
    add("--save_steps", type=int, default=50, help="save every N steps; the best is kept as well")
    add("--eval_samples", type=int, default=200, help="held-out samples to measure the loss on (-1: all)")
    add("--max_new_tokens", type=int, default=64, help="longest reply that is shown")
    add("--resume", type=boolean, nargs="?", const=True, default=False, help="go on from <ckpt_id>-last")
    add("--trust_checkpoint", type=boolean, default=False,
        help="True: --resume reads the checkpoint whatever is in it, which may run code of whoever made it")
    add("--overwrite", type=boolean, nargs="?", const=True, default=False, help="start anew where another run has been")
    add("--track", choices=["none", "tensorboard", "swanlab", "wandb"], default="none",
        help="service that gets the metrics besides metrics.jsonl and loss.png")
    # fmt: on


def argument_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with the shared arguments, before anything is loaded."""
    problems = []
    for name in ("epochs", "batch_size", "grad_accum", "eval_steps", "save_steps", "lora_r", "max_new_tokens"):
        if getattr(args, name) < 1:
            problems.append(f"--{name}: got {getattr(args, name)}, expected 1 or more.")
    if args.max_steps < 1 and args.max_steps != -1:
        problems.append(f"--max_steps: got {args.max_steps}, expected 1 or more, or -1.")
    if args.lr is not None and not args.lr > 0:
        problems.append(f"--lr: got {args.lr}, expected more than 0.")
    if not args.weight_decay >= 0:
        problems.append(f"--weight_decay: got {args.weight_decay}, expected 0 or more.")
    if args.seed < 0:
        problems.append(f"--seed: got {args.seed}, expected 0 or more.")
    if args.group_size is not None and args.group_size < 1:
        problems.append(f"--group_size: got {args.group_size}, expected 1 or more.")
    if args.max_tokens < 16:
        problems.append(f"--max_tokens: got {args.max_tokens}, expected 16 or more.")
    if args.pack_tokens < args.max_tokens:
        problems.append(f"--pack_tokens: got {args.pack_tokens}, expected at least --max_tokens ({args.max_tokens}).")
    if not 0 <= args.lora_dropout < 1:
        problems.append(f"--lora_dropout: got {args.lora_dropout}, expected 0 or more and less than 1.")
    if not 0 <= args.warmup_ratio <= 1:
        problems.append(f"--warmup_ratio: got {args.warmup_ratio}, expected 0 to 1.")
    if args.tuner == "full" and quant_bits(args):
        problems.append("--tuner full trains all weights, 4-bit weights cannot be trained: leave --train_bnb_enabled "
                        "and --quant_bits out, or use --tuner lora.")  # fmt: skip
    if not re.fullmatch(r"[\w-]+", args.ckpt_id):
        problems.append(f"--ckpt_id: got {args.ckpt_id!r}, expected letters, digits, _ and -.")
    if args.resume and args.overwrite:
        problems.append("--resume goes on with a run, --overwrite starts it anew: name one of them.")
    if args.track != "none" and find_spec(args.track) is None:
        problems.append(f"--track {args.track}: not installed. Install it with: pip install {args.track}")
    if problem := write_problem(from_root(args.output_dir)):
        problems.append(f"--output_dir: {problem}")
    for name in ("chat_template", "deepspeed_config"):
        if getattr(args, name) and not from_root(getattr(args, name)).is_file():
            problems.append(f"--{name}: no file at {getattr(args, name)}.")
    return problems


def quant_bits(args: argparse.Namespace) -> int | None:
    """Bits of the frozen base weights; `--train_bnb_enabled True` is the original's way to ask for 4."""
    return 4 if args.train_bnb_enabled else args.quant_bits


def run_dir(args: argparse.Namespace) -> Path:
    """A run's folder: DS-<model>, DS-<model>-BNB with a 4-bit base, DS-<model>-FULL for full training.

    A model that lies elsewhere than in --model_dir lends it its folder's name.
    """
    name = Path(args.model_name)
    inside = not name.is_absolute() and ".." not in name.parts
    name = name if inside else Path((from_root(args.model_dir) / name).resolve().name)
    kind = "-FULL" if args.tuner == "full" else "-BNB" if quant_bits(args) else ""
    return from_root(args.output_dir) / f"DS-{name}{kind}"


def data_problems(args: argparse.Namespace) -> list[str]:
    """Says how to come by training data, if there is none in --data_dir."""
    if find_split(from_root(args.data_dir), "train"):
        return []
    return [
        f"No training data in {shown(from_root(args.data_dir))} (expected data_train or train with .json, .jsonl, .csv "
        "or .parquet).\nMake it with: python prepare_data.py --total 2000"
    ]


def adapter_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with --adapter, a LoRA adapter to go on with."""
    if not args.adapter:
        return []
    if args.tuner == "full":
        return ["--adapter goes on with a LoRA adapter, --tuner full trains all weights: name one of them."]
    folder, names = from_root(args.adapter), ("adapter_config.json", "adapter_model.safetensors")
    if missing := [name for name in names if not (folder / name).is_file()]:
        return [f"--adapter: no {' and no '.join(missing)} in {args.adapter}, expected <run>/<ckpt_id>/adapter."]
    with explained(f"--adapter: {args.adapter} cannot be used"):
        kind = read_json(folder / names[0]).get("peft_type")
    return [] if kind == "LORA" else [f"--adapter: {args.adapter} is an adapter of the kind {kind}, expected LORA."]


def adopt_adapter(args: argparse.Namespace, model_path: Path) -> dict[str, str]:
    """Takes the settings of --adapter into the arguments, for run.json.

    Args:
        args: Of the run.
        model_path: The base model's folder.

    Returns:
        "adapter": the hash of its weights; nothing without --adapter.

    Raises:
        SystemExit: if it has not the settings of one, or rows of other tokens than the model's new ones.
    """
    from utils.data.vocabulary import new_rows

    if not args.adapter:
        return {}
    with explained(f"--adapter: {args.adapter} cannot be used"):
        lora = read_json(from_root(args.adapter) / "adapter_config.json")
        args.lora_r, args.lora_alpha, args.lora_dropout = lora["r"], lora["lora_alpha"], lora["lora_dropout"]
        targets, rows = lora["target_modules"] or [], lora.get("trainable_token_indices")
        args.lora_target = targets if isinstance(targets, str) else ",".join(sorted(targets))
        if lora.get("modules_to_save"):
            args.train_embeddings = "all"
        if rows:
            args.train_embeddings, there = "new_rows", [*new_rows(model_path)]
            if any(ids != there for ids in (rows.values() if isinstance(rows, dict) else [rows])):
                raise ValueError(f"it has rows of other tokens than the new ones of {shown(model_path)}.")
    return {"adapter": sha256(from_root(args.adapter) / "adapter_model.safetensors")}


def check_and_start(
    args: argparse.Namespace,
    problems: list[str],
    train: Callable[[argparse.Namespace, Path], None],
    test: Callable[[argparse.Namespace, Path], None],
) -> None:
    """Reports what is wrong with the arguments, before anything is loaded; else trains and tests as they say.

    Args:
        args: Of the run.
        problems: With the script's own arguments.
        train: Trains.
        test: Tests the best checkpoint, on one rank.

    Raises:
        SystemExit: if there are problems.
    """
    problems = argument_problems(args) + problems
    model_path = from_root(args.model_dir) / args.model_name
    if not (model_path / "config.json").is_file():
        problems.append(missing_model(from_root(args.model_dir), args.model_name))
    if not (args.train_mode or args.test_mode):
        problems.append("Neither --train_mode nor --test_mode is True: nothing to do.")
    if problems:
        fail("\n".join(problems))
    quiet_libraries()
    try:
        if args.train_mode:
            train(args, model_path)
            gc.collect()
        if args.test_mode and int(os.environ.get("RANK", 0)) == 0:
            with exclusive_lock(run_dir(args) / "test"):
                test(args, model_path)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        raise SystemExit(130) from None
