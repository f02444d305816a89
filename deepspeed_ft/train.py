"""Supervised fine-tuning of a causal language model with LoRA, 4-bit QLoRA or all weights, on DeepSpeed.

LoRA: arXiv 2106.09685; QLoRA: arXiv 2305.14314; ZeRO: arXiv 1910.02054.

    bash deepspeed_ft/run.sh                                                   # or run_qlora.sh, run_full.sh
    python deepspeed_ft/train.py --model_name Qwen/Qwen2.5-0.5B --ckpt_id 24   # the same without the launcher

Reads   model/<model_name>/ and data/data_train.json, data/data_test.json (or train.*, test.* in --data_dir; .json,
        .jsonl, .csv or .parquet in any format that utils/data.py knows).
Writes  deepspeed_ft/output/DS-<model_name>[-BNB|-FULL]/: the best checkpoint <ckpt_id>/, the newest <ckpt_id>-last/,
        metrics.jsonl, loss.png, samples.jsonl; in test mode test_<ckpt_id>[_train].jsonl or test_base[_train].jsonl.

Left out on purpose: loss on prompts (only answers are learnt), label smoothing, mixing of data sets.
Shapes: L tokens in a pack, T supervised targets in a pack, V vocabulary.
"""

import argparse
import gc
import json
import math
import os
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.checkpoint import load_checkpoint, make_record, open_run, save_checkpoint
from utils.data import find_split
from utils.engine import (
    add_run_arguments,
    argument_problems,
    boolean,
    build_model,
    choose_precision,
    fail,
    load_chat,
    load_whole,
    make_ds_config,
    make_engine,
    quant_bits,
    run_dir,
    start_ranks,
)
from utils.files import explained, from_root, missing_model, only_writer, replacing, shown
from utils.samples import Samples, load_splits

PANELS = {"loss": "loss (nats a token)"}
LORA_LR, FULL_LR = 2e-4, 2e-5
SHOWN_REPLIES = 4


def sft_loss(logits: Any, target_ids: Any, target_weight: Any) -> Any:
    """Sum of the cross-entropies of the supervised tokens: -sum_t w_t log p(y_t | y_<t).

    The caller divides by the number of supervised tokens of the whole accumulation window over all ranks, so that a
    token counts the same however the window is cut into packs and ranks.

    Args:
        logits: (T, V) at the places before the targets.
        target_ids: (T,) int64.
        target_weight: (T,) fp32.

    Returns:
        () fp32, nats.
    """
    from utils.tensors import token_logprobs

    return -(target_weight * token_logprobs(logits, target_ids)).sum()


def build_parser() -> argparse.ArgumentParser:
    """The arguments; those that all training scripts share come from utils/engine.py."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a language model on conversations (LoRA, QLoRA, full) with DeepSpeed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data_dir", default="data", help="folder with data_train.json and data_test.json")
    parser.add_argument("--model_name", default="Qwen/Qwen2.5-0.5B", help="model in --model_dir")
    parser.add_argument("--output_dir", default="deepspeed_ft/output", help="folder of the results")
    parser.add_argument("--train_mode", type=boolean, default=True, help="True: train")
    parser.add_argument(
        "--test_mode", type=boolean, default=False, help="True: answer the held-out comments, at the end"
    )
    parser.add_argument("--test_bnb_enabled", type=boolean, default=False, help="True: test on a 4-bit base")
    parser.add_argument(
        "--test_split", choices=["test", "train"], default="test",
        help="train: test mode answers the training comments, for preference pairs",
    )  # fmt: skip
    parser.add_argument(
        "--test_model", choices=["tuned", "base"], default="tuned",
        help="which model answers: the best checkpoint, or the base as it was before training",
    )  # fmt: skip
    add_run_arguments(parser, LORA_LR, FULL_LR)
    return parser


def evaluate(engine: Any, samples: Samples, plan: Any, attention: dict[str, int | None] | None) -> float:
    """Mean loss of the supervised tokens of held-out samples, over all ranks, in nats; `plan` is one window of them."""
    import deepspeed
    import torch

    from utils.attention import model_inputs
    from utils.packing import rank_packs
    from utils.tensors import all_reduced

    engine.eval()
    loss_sum = 0.0
    with torch.no_grad():
        for pack in rank_packs(samples, plan, 0, deepspeed.comm.get_rank()):
            pack = pack.to(engine.device)
            logits = engine(**model_inputs(pack, attention)).logits[0]
            loss_sum += sft_loss(logits, pack.target_ids, pack.target_weight).item()
    engine.train()
    return all_reduced(loss_sum) / int(samples.targets.sum())


def look(
    engine: Any, chat: Any, samples: Samples, plan: Any, attention: Any, max_new_tokens: int, tracker: Any, step: int
) -> dict[str, float]:
    """Measures the held-out loss and shows a few replies, because that is how over-fitting is noticed."""
    from utils.generate import show_replies

    if not samples:
        return {}
    loss = evaluate(engine, samples, plan, attention)
    engine.eval()
    rows = show_replies(engine.module, chat, list(islice(samples, SHOWN_REPLIES)), max_new_tokens)
    engine.train()
    if tracker:
        tracker.log_samples(step, rows)
        tqdm.write(f"step {step}: held-out loss {loss:.4f}")
        for row in rows:
            tqdm.write(f"    {row['reply'][:80]!r}, the real one: {row['real'][:80]!r}")
    return {"eval/loss": loss}


def train(args: argparse.Namespace, model_path: Path) -> None:
    """Trains, and leaves checkpoints, metrics and sample replies in the run's folder."""
    rank, world_size = start_ranks(args.seed)
    import numpy as np
    import torch
    from deepspeed.accelerator import get_accelerator
    from transformers.integrations import HfDeepSpeedConfig

    from utils.attention import model_inputs, usable_masks
    from utils.model import attention_windows, count_parameters, needed_bytes, report_needs
    from utils.packing import Layout, draw_windows, make_plan, pack_cost, rank_packs
    from utils.tensors import all_reduced
    from utils.track import Tracker
    from utils.trained import PROBE_PROMPTS, probe_prompt, record_probe

    # Tokenizer and data.
    # A file that is not UTF-8 becomes a template that says nothing of use, and is refused for that.
    template = from_root(args.chat_template).read_text("utf-8", "replace") if args.chat_template else ""
    chat = load_chat(args, model_path, template)
    files = [find_split(from_root(args.data_dir), split) for split in ("train", "test")]
    train_set, test_set, data_facts = load_splits(args, *files, chat, show=rank == 0)
    eval_set = test_set.select(range(len(test_set))[: args.eval_samples]) if args.eval_samples >= 0 else test_set

    # Settings; what was not given depends on the device and the kind of training.
    precision, device = choose_precision(args.precision), get_accelerator().current_device_name()
    if args.lr is None:
        args.lr = FULL_LR if args.tuner == "full" else LORA_LR
    args.group_size = args.group_size or (8 if args.share_prefix else 1)
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = get_accelerator().device_name() != "cpu"
    ds_config = make_ds_config(args, Path(__file__).with_name("ds_config.json"), precision)
    stage = ds_config["zero_optimization"]["stage"]
    record = make_record(args, ds_config, precision, world_size, chat.tokenizer.chat_template, data_facts)
    folder = run_dir(from_root(args.output_dir), args.model_name, args.tuner, quant_bits(args))
    run, previous = open_run(folder, args, record)
    ds_config["checkpoint"] = {"use_node_local_storage": not run.shared}
    progress = previous["progress"] if previous else {"step": 0, "best_step": 0, "best_eval_loss": None}
    tracker = Tracker(run.dir, progress["step"], args.track, record["settings"], PANELS) if rank == 0 else None
    needs = report_needs(needed_bytes(model_path, args, quant_bits(args), precision), run.dir, world_size, ds_config)
    if rank == 0:
        print(needs)

    # Model and engine. While the configuration object lives, transformers shards weights as it reads them.
    sharding = HfDeepSpeedConfig(ds_config) if stage == 3 and not quant_bits(args) else None
    model = build_model(args, model_path, precision, device)
    window_samples = args.batch_size * args.grad_accum * world_size
    windows = draw_windows(train_set.group, window_samples, args.group_size, args.epochs, args.seed)
    total_steps = len(windows) if args.max_steps < 0 else min(args.max_steps, len(windows))
    engine = make_engine(model, args, ds_config, total_steps)
    torch.manual_seed(args.seed + rank)  # Until here all ranks drew the same numbers; dropout is each rank's own.
    attention, why_not = usable_masks(engine, attention_windows(model.config), args.max_tokens, precision)
    shares = args.share_prefix and attention is not None
    cost = pack_cost(model, get_accelerator().device_name())
    layout = Layout(args.pack_tokens if attention else 0, world_size, shares, cost)
    cache = from_root(args.output_dir) / "cache"
    plan = make_plan(train_set, windows[:total_steps], layout, cache)
    eval_plan = make_plan(eval_set, [np.arange(len(eval_set))], layout, cache) if eval_set else None
    if rank == 0:
        trainable, total = count_parameters(model)
        tokens = plan.count(train_set, range(total_steps))
        print(
            f"{len(train_set)} samples x {args.epochs} epochs = {total_steps} steps of batch_size {args.batch_size} x "
            f"grad_accum {args.grad_accum} x {world_size} rank(s) = {window_samples} samples. {precision}, ZeRO stage "
            f"{stage}; {trainable:,} of {total:,} weights are trained ({trainable / total:.2%}).\n{why_not}"
            f"{tokens['logical']:,} tokens, of which {tokens['supervised']:,} are learnt; {tokens['executed']:,} are "
            f"computed, {tokens['logical'] / tokens['executed']:.2f}x fewer."
        )
    look_now = partial(look, engine, chat, eval_set, eval_plan, attention, args.max_new_tokens, tracker)
    if previous:
        load_checkpoint(engine, run)
    else:
        metrics = look_now(0)
        if tracker and metrics:
            tracker.log(0, metrics)

    steps = range(progress["step"] + 1, total_steps + 1)
    for step in tqdm(steps, "training", initial=steps.start - 1, total=total_steps, unit="step", disable=rank != 0):
        tokens = plan.count(train_set, range(step - 1, step))
        metrics = {"train/lr": engine.get_lr()[0]}
        started = time.perf_counter()
        loss_sum = 0.0
        for pack in rank_packs(train_set, plan, step - 1, rank):
            pack = pack.to(engine.device)
            logits = engine(**model_inputs(pack, attention)).logits[0]
            loss = sft_loss(logits, pack.target_ids, pack.target_weight)
            # DeepSpeed averages gradients over the ranks: times world_size makes it their sum.
            engine.backward(loss * world_size / tokens["supervised"], scale_wrt_gas=False)
            loss_sum += loss.item()
        engine.step()

        metrics["train/loss"] = all_reduced(loss_sum) / tokens["supervised"]
        if (norm := engine.get_global_grad_norm()) is not None:  # Not measured at ZeRO stage 0 without clipping.
            metrics["train/grad_norm"] = float(norm)
        metrics["train/step_sec"] = time.perf_counter() - started
        metrics["train/tokens_per_sec"] = tokens["logical"] / metrics["train/step_sec"]
        metrics["train/executed_tokens_per_sec"] = tokens["executed"] / metrics["train/step_sec"]
        if not math.isfinite(metrics["train/loss"]):
            fail(f"The loss is {metrics['train/loss']} at step {step}. Try a smaller --lr or another --precision.")
        at_stop = step == total_steps or step % args.eval_steps == 0
        if at_stop:
            metrics |= look_now(step)
        if tracker:
            tracker.log(step, metrics)
        held_out, best = metrics.get("eval/loss"), progress["best_eval_loss"]
        is_best = at_stop and (held_out is None or best is None or held_out < best)
        progress |= {"step": step} | ({"best_step": step, "best_eval_loss": held_out} if is_best else {})
        if is_best or step == total_steps or step % args.save_steps == 0:
            engine.eval()
            probe = record_probe(engine, [probe_prompt(s) for s in islice(eval_set or train_set, PROBE_PROMPTS)])
            engine.train()
            save_checkpoint(engine, run, step, record | {"progress": progress}, probe, is_best)

    if tracker:
        tracker.close()
        best = progress["best_eval_loss"]
        print(
            f"Best: step {progress['best_step']}, held-out loss {'not measured' if best is None else round(best, 4)}. "
            f"In {shown(run.dir)}: "
            f"checkpoints {args.ckpt_id} (best) and {args.ckpt_id}-last, metrics.jsonl, loss.png, samples.jsonl.\n"
            f"Next: python convert_model.py --zero_model {shown(run.dir)} --org_model {shown(model_path)} "
            f"--save_model {model_path.name}-BiliComments --t {args.ckpt_id}"
        )
    engine.destroy()  # Its hooks and buffers would keep the model in memory while the test loads another.
    del sharding


def test(args: argparse.Namespace, model_path: Path) -> None:
    """Writes a model's replies to the held-out (or the training) comments beside the real ones."""
    import torch

    from utils.adapters import put_beside, read_adapter
    from utils.generate import show_replies
    from utils.merging import whole
    from utils.model import DTYPES
    from utils.scores import as_markdown, compare_texts
    from utils.trained import as_trained, check_tag

    folder = run_dir(from_root(args.output_dir), args.model_name, args.tuner, quant_bits(args))
    tuned = args.test_model == "tuned"
    if tuned:
        record = check_tag(folder, args.ckpt_id)
        template, precision = record["chat_template"], record["settings"]["precision"]
    else:
        template = from_root(args.chat_template).read_text("utf-8", "replace") if args.chat_template else ""
        precision = choose_precision(args.precision)
    chat = load_chat(args, model_path, template)
    files = [find_split(from_root(args.data_dir), split) for split in ("train", "test")]
    train_set, test_set, _ = load_splits(args, *files, chat, show=False)
    samples = train_set if args.test_split == "train" else test_set
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if tuned and not args.test_bnb_enabled:
        trained = as_trained(folder, args.ckpt_id, record, model_path, trust_remote_code=args.trust_remote_code)
        model = whole(trained, DTYPES[precision])
    else:
        bits = 4 if args.test_bnb_enabled else quant_bits(args)
        model = load_whole(model_path, args.model_name, precision, bits, device, args.trust_remote_code)
    if tuned and args.test_bnb_enabled:
        with explained(f"{shown(folder / args.ckpt_id / 'adapter')} cannot be used"):
            model = put_beside(model, {"default": read_adapter(folder / args.ckpt_id / "adapter")})
    rows = show_replies(model.to(device).eval(), chat, samples, args.max_new_tokens, progress="answering")
    who = args.ckpt_id if tuned else "base"
    target = folder / f"test_{who}{'_train' if args.test_split == 'train' else ''}.jsonl"
    with replacing(target) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    for row in rows[:SHOWN_REPLIES]:
        print(f"\n{row['prompt']}\n  reply: {row['reply']}\n  real:  {row['real']}")
    if rows:
        print(f"\n{as_markdown(compare_texts(rows, ['reply'], 'real'))}")
    print(f"{len(rows)} replies beside the real ones: {shown(target)}")


def main(args: argparse.Namespace) -> None:
    """Checks what was asked for, trains and tests."""
    problems = argument_problems(args)
    if args.ckpt_id == "base":
        problems.append("--ckpt_id base: test mode calls the base's replies so. Take another name.")
    if args.test_bnb_enabled and args.tuner == "full":
        problems.append("--test_bnb_enabled True needs an adapter to put on a 4-bit base: --tuner lora.")
    if find_split(from_root(args.data_dir), "train") is None:
        problems.append(
            f"No training data in {shown(from_root(args.data_dir))} (expected data_train or train with .json, .jsonl, "
            ".csv or .parquet).\nMake it with: python prepare_data.py --total 2000"
        )
    model_path = from_root(args.model_dir) / args.model_name
    if not (model_path / "config.json").is_file():
        problems.append(missing_model(from_root(args.model_dir), args.model_name))
    if not (args.train_mode or args.test_mode):
        problems.append("Neither --train_mode nor --test_mode is True: nothing to do.")
    if problems:
        fail("\n".join(problems))
    if args.train_mode:
        train(args, model_path)
        gc.collect()
    if args.test_mode and int(os.environ.get("RANK", 0)) == 0:
        folder = run_dir(from_root(args.output_dir), args.model_name, args.tuner, quant_bits(args))
        with only_writer(folder / "test"):
            test(args, model_path)


if __name__ == "__main__":
    main(build_parser().parse_args())
