"""Preference optimisation of a causal language model (DPO and its kin) with LoRA, QLoRA or all weights, on DeepSpeed.

DPO: arXiv 2305.18290; with label smoothing: ericmitchell.ai/cdpo.pdf; robust: 2403.00409; IPO: 2310.12036; hinge:
2305.10425; SimPO: 2405.14734; ORPO: 2403.07691; RPO's additional term: 2404.19733.

    bash deepspeed_dpo/run.sh --adapter deepspeed_ft/output/DS-Qwen/Qwen2.5-0.5B/1/adapter
    python deepspeed_dpo/train.py --model_name Qwen/Qwen2.5-0.5B --data_path pairs.jsonl   # the same without launcher

Reads   model/<model_name>/ and preference pairs in any format that utils/pairs.py knows: a file, or a folder with
        data_train_pairs.* and data_test_pairs.* (or train.*, test.*).
Writes  deepspeed_dpo/output/DS-<model_name>[-BNB|-FULL]/: the best checkpoint <ckpt_id>/, the newest <ckpt_id>-last/,
        metrics.jsonl, loss.png, samples.jsonl, and test_<ckpt_id>.jsonl in test mode.

Left out on purpose: a reference that moves with the policy, and pairs that the policy writes while it learns.
Shapes: B pairs, S = 2 B answers in a pack (chosen, rejected, chosen, ...), L tokens, T supervised targets of them.
"""

import argparse
import gc
import json
import math
import os
import sys
import time
from collections import Counter
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
    make_ds_config,
    make_engine,
    quant_bits,
    run_dir,
    start_ranks,
)
from utils.files import from_root, missing_model, only_writer, read_json, replacing, sha256, shown
from utils.samples import Samples, load_splits

LORA_LR, FULL_LR = 5e-5, 5e-7
PANELS = {"loss": "loss (mean over pairs)", "rewards/accuracy": "chosen one preferred (part of the pairs)"}
SHOWN_REPLIES = 4
PAIR = 2  # Samples of a pair.
WITHOUT_REFERENCE = ("simpo", "orpo")
TIE = 1e-4  # Rewards that are nearer to one another count as equal.


def preference_loss(
    logps: Any,
    reference_logps: Any,
    tokens: Any,
    loss: str,
    beta: float,
    label_smoothing: float,
    simpo_gamma: float,
) -> Any:
    """The loss of each pair. With c, r the chosen and the rejected answer of a pair, |y| the tokens of an answer,

        m    = (log pi(c) - log ref(c)) - (log pi(r) - log ref(r))
        mean = log pi(y) / |y|,   odds = log(p / (1 - p)) of p = exp(mean)

        sigmoid  -(1 - e) log s(beta m) - e log s(-beta m)                         2305.18290 eq. 7, cDPO eq. 3
        robust   (-(1 - e) log s(beta m) + e log s(-beta m)) / (1 - 2 e)           2403.00409 eq. 12
        hinge    max(0, 1 - beta m)                                                2305.10425 section 2
        ipo      (m' - 1 / (2 beta))^2, m' = m with every log-probability          2310.12036 eq. 17
                 divided by its answer's tokens
        simpo    -log s(beta (mean(c) - mean(r)) - gamma)                          2405.14734 eq. 6
        orpo     -mean(c) - beta log s(odds(c) - odds(r))                          2403.07691 eq. 6, 7

    with s the sigmoid and e the label smoothing.

    Args:
        logps: (B, 2) fp32, log-probabilities of chosen and rejected answers under the policy, nats.
        reference_logps: (B, 2) fp32, under the reference; without effect on simpo and orpo.
        tokens: (B, 2) supervised tokens of the answers.
        loss: Which one.
        beta: As above.
        label_smoothing: e, the part of the pairs that is taken to be labelled the wrong way round.
        simpo_gamma: gamma, the margin that SimPO asks for; of no effect on the others.

    Returns:
        (B,) fp32.
    """
    import torch
    from torch.nn.functional import logsigmoid

    margin = (logps - reference_logps) @ logps.new_tensor([1.0, -1.0])
    mean = logps / tokens
    if loss == "sigmoid":
        return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)
    if loss == "robust":
        right, wrong = logsigmoid(beta * margin), logsigmoid(-beta * margin)
        return (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)
    if loss == "hinge":
        return torch.relu(1 - beta * margin)
    if loss == "ipo":
        per_token = (logps - reference_logps) / tokens
        return (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)) ** 2
    if loss == "simpo":
        return -logsigmoid(beta * (mean[:, 0] - mean[:, 1]) - simpo_gamma)
    log_odds = mean - torch.log(-torch.expm1(mean))
    return -mean[:, 0] - beta * logsigmoid(log_odds[:, 0] - log_odds[:, 1])


def rewards(logps: Any, reference_logps: Any, tokens: Any, loss: str, beta: float) -> Any:
    """What the policy holds an answer worth: beta (log pi - log ref), or beta log pi / |y| where no reference is used.

    Args:
        logps: (B, 2) fp32.
        reference_logps: (B, 2) fp32.
        tokens: (B, 2).
        loss: Which one.
        beta: Its factor.

    Returns:
        (B, 2) fp32.
    """
    return beta * (logps / tokens if loss in WITHOUT_REFERENCE else logps - reference_logps)


def pair_loss(policy: Any, reference: Any, sizes: Any, args: argparse.Namespace) -> tuple[Any, Counter[str]]:
    """Sum of the losses of a pack's pairs, and the sums that the metrics are made of.

    Args:
        policy: (T,) fp32, log-probabilities of the answers' tokens under the policy.
        reference: (T,) fp32, under the reference.
        sizes: (S,) tokens of each answer.
        args: Of the run: loss, beta, label_smoothing, simpo_gamma, sft_weight.

    Returns:
        () fp32, nats; and sums over the pairs, `kl` over the tokens.
    """
    import torch

    from utils.tensors import sample_sums

    logps, reference_logps = (sample_sums(values, sizes).view(-1, PAIR) for values in (policy, reference))
    tokens = sizes.view(-1, PAIR)
    losses = preference_loss(
        logps, reference_logps, tokens, args.loss, args.beta, args.label_smoothing, args.simpo_gamma
    )
    if args.sft_weight:
        losses = losses - args.sft_weight * logps[:, 0] / tokens[:, 0]
    loss = losses.sum()
    worth = rewards(logps.detach(), reference_logps, tokens, args.loss, args.beta)
    margin = worth[:, 0] - worth[:, 1]
    sums = {
        "loss": loss.detach(),
        "rewards/chosen": worth[:, 0].sum(),
        "rewards/rejected": worth[:, 1].sum(),
        "rewards/margin": margin.sum(),
        # Before the first step the two are equal but for rounding: neither won.
        "rewards/accuracy": torch.where(margin.abs() < TIE, 0.5, (margin > 0).double()).sum(),
        "logps/chosen": logps[:, 0].detach().sum(),
        "logps/rejected": logps[:, 1].detach().sum(),
        "tokens/chosen": tokens[:, 0].sum(),
        "tokens/rejected": tokens[:, 1].sum(),
    }
    if args.loss not in WITHOUT_REFERENCE:
        sums["kl"] = ((policy.detach() - reference) ** 2).sum() / 2
    values = torch.stack([value.double() for value in sums.values()]).tolist()  # One wait for the device, not ten.
    return loss, Counter(dict(zip(sums, values, strict=True)))


def means(sums: Counter[str], pairs: int) -> dict[str, float]:
    """Sums over the pairs of all ranks become means: per pair, `kl` per token."""
    from utils.tensors import all_reduced_each

    total = all_reduced_each(dict(sums))
    tokens = total["tokens/chosen"] + total["tokens/rejected"]
    return {name: value / (tokens if name == "kl" else pairs) for name, value in total.items()}


def build_parser() -> argparse.ArgumentParser:
    """The arguments; those that all training scripts share come from utils/engine.py."""
    parser = argparse.ArgumentParser(
        description="Teach a language model which of two answers is preferred (LoRA, QLoRA, full) with DeepSpeed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data_path", default="deepspeed_dpo/data", help="file of preference pairs, or their folder")
    parser.add_argument("--model_name", default="Qwen/Qwen2.5-0.5B", help="model in --model_dir")
    parser.add_argument("--output_dir", default="deepspeed_dpo/output", help="folder of the results")
    parser.add_argument("--train_mode", type=boolean, default=True, help="True: train")
    parser.add_argument(
        "--test_mode", type=boolean, default=False, help="True: answer the held-out prompts, at the end"
    )
    parser.add_argument(
        "--adapter", default="", help="folder of a LoRA adapter to go on with; its rank, targets and dropout stay"
    )
    add = parser.add_argument_group("preferences").add_argument
    add("--loss", choices=["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"], default="sigmoid", help="see README")
    add("--beta", type=float, help="how far the policy is held to the reference (default: 0.1; simpo: 2.0)")
    add("--label_smoothing", type=float, default=0.0, help="part of wrongly labelled pairs (sigmoid, robust)")
    add("--simpo_gamma", type=float, help="the margin that simpo asks for (default: 1.0)")
    add("--sft_weight", type=float, default=0.0, help="weight of the chosen answer's own loss per token (RPO)")
    add(
        "--precompute_reference",
        type=boolean,
        help="True: the reference's log-probabilities are computed once, before training (default: True in full "
        "training, which has no other way; False with LoRA, which has its reference at hand)",
    )
    add_run_arguments(parser, LORA_LR, FULL_LR)
    return parser


def own_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with this script's own arguments."""
    problems = []
    if args.beta is not None and not args.beta > 0:
        problems.append(f"--beta: got {args.beta}, expected more than 0.")
    if not 0 <= args.label_smoothing < 0.5:
        problems.append(f"--label_smoothing: got {args.label_smoothing}, expected 0 or more and less than 0.5.")
    if args.label_smoothing and args.loss not in ("sigmoid", "robust"):
        problems.append(f"--label_smoothing has no effect on --loss {args.loss}: leave it out.")
    if args.simpo_gamma is not None and args.loss != "simpo":
        problems.append(f"--simpo_gamma has no effect on --loss {args.loss}: leave it out.")
    if args.precompute_reference and args.loss in WITHOUT_REFERENCE:
        problems.append(f"--loss {args.loss} has no reference to compute: leave --precompute_reference out.")
    if args.sft_weight < 0:
        problems.append(f"--sft_weight: got {args.sft_weight}, expected 0 or more.")
    if args.adapter and args.tuner == "full":
        problems.append("--adapter goes on with a LoRA adapter, --tuner full trains all weights: name one of them.")
    names = ("adapter_config.json", "adapter_model.safetensors") if args.adapter else ()
    missing = [name for name in names if not (from_root(args.adapter) / name).is_file()]
    for name in missing:
        problems.append(f"--adapter: no {name} in {args.adapter}, expected <run>/<ckpt_id>/adapter.")
    if names and not missing:
        kind = json.loads((from_root(args.adapter) / names[0]).read_text(encoding="utf-8")).get("peft_type")
        if kind != "LORA":
            problems.append(f"--adapter: {args.adapter} is an adapter of the kind {kind}, expected LORA.")
    if args.tuner == "full" and args.precompute_reference is False and args.loss not in WITHOUT_REFERENCE:
        problems.append("--precompute_reference False needs LoRA: full training changes the weights of its reference.")
    if pair_files(args)[0] is None:
        problems.append(
            f"No preference pairs at {shown(from_root(args.data_path))} (expected a file, or a folder with "
            "data_train_pairs or train with .json, .jsonl, .csv or .parquet).\n"
            "Make them with: python deepspeed_dpo/prepare_data.py"
        )
    return problems


def pair_files(args: argparse.Namespace) -> list[Path | None]:
    """The files of the training and of the held-out pairs."""
    path = from_root(args.data_path)
    if path.is_file():
        return [path, None]
    return [find_split(path, f"{split}_pairs") or find_split(path, split) for split in ("train", "test")]


def together(packs: list[Any], attention: dict[str, int | None] | None) -> list[list[Any]]:
    """Packs whose answers the loss needs together: each by itself, or two where every sample has a pack of its own."""
    size = 1 if attention else PAIR
    return [packs[start : start + size] for start in range(0, len(packs), size)]


def evaluate(
    engine: Any, samples: Samples, plan: Any, attention: Any, reference: Any, args: argparse.Namespace
) -> dict[str, float]:
    """Means of the metrics over held-out pairs, on all ranks; `plan` is one window of them."""
    import deepspeed
    import torch

    from utils.packing import rank_packs
    from utils.reference import token_logps

    packs = [pack.to(engine.device) for pack in rank_packs(samples, plan, 0, deepspeed.comm.get_rank())]
    sums: Counter[str] = Counter()
    engine.eval()
    with torch.no_grad():
        for group in together([*zip(packs, reference(engine, packs), strict=True)], attention):
            own, theirs = (list(part) for part in zip(*group, strict=True))
            sizes = torch.cat([pack.sample_targets for pack in own])
            sums.update(pair_loss(token_logps(engine, own, attention), torch.cat(theirs), sizes, args)[1])
    engine.train()
    return means(sums, len(samples) // PAIR)


def look(
    engine: Any,
    chat: Any,
    samples: Samples,
    plan: Any,
    attention: Any,
    reference: Any,
    args: argparse.Namespace,
    tracker: Any,
    step: int,
) -> dict[str, float]:
    """Measures the held-out pairs and shows a few replies, because that is how over-fitting is noticed."""
    from utils.generate import show_replies

    if not samples:
        return {}
    metrics = evaluate(engine, samples, plan, attention, reference, args)
    engine.eval()
    chosen = samples.select(range(0, len(samples), PAIR)[:SHOWN_REPLIES])
    rows = show_replies(engine.module, chat, list(chosen), args.max_new_tokens)
    engine.train()
    if tracker:
        tracker.log_samples(step, rows)
        tqdm.write(
            f"step {step}: held-out loss {metrics['loss']:.4f}, the chosen answer preferred in "
            f"{metrics['rewards/accuracy']:.0%} of the pairs"
        )
        for row in rows:
            tqdm.write(f"    {row['reply'][:80]!r}, the chosen one: {row['real'][:80]!r}")
    return {f"eval/{name}": value for name, value in metrics.items()}


def train(args: argparse.Namespace, model_path: Path) -> None:
    """Trains, and leaves checkpoints, metrics and sample replies in the run's folder."""
    rank, world_size = start_ranks(args.seed)
    import numpy as np
    import torch
    from deepspeed.accelerator import get_accelerator
    from transformers.integrations import HfDeepSpeedConfig

    from utils.attention import usable_masks
    from utils.model import attention_windows, count_parameters, needed_bytes, report_needs
    from utils.packing import Layout, draw_windows, make_plan, pack_cost, rank_packs
    from utils.pairs import pair
    from utils.reference import fingerprint, precompute_reference, reference_logps, target_begin, token_logps
    from utils.track import Tracker
    from utils.trained import PROBE_PROMPTS, probe_prompt, record_probe

    # Tokenizer and data.
    # A file that is not UTF-8 becomes a template that says nothing of use, and is refused for that.
    template = from_root(args.chat_template).read_text("utf-8", "replace") if args.chat_template else ""
    chat = load_chat(args, model_path, template)
    train_set, test_set, data_facts = load_splits(args, *pair_files(args), chat, show=rank == 0, render=pair)
    eval_pairs = len(test_set) // PAIR if args.eval_samples < 0 else min(args.eval_samples, len(test_set) // PAIR)
    eval_set = test_set.select(range(PAIR * eval_pairs))

    # Settings; what was not given depends on the device and the kind of training.
    precision, device = choose_precision(args.precision), get_accelerator().current_device_name()
    if args.lr is None:
        args.lr = FULL_LR if args.tuner == "full" else LORA_LR
    if args.beta is None:
        args.beta = 2.0 if args.loss == "simpo" else 0.1
    if args.simpo_gamma is None:
        args.simpo_gamma = 1.0
    if args.precompute_reference is None:
        args.precompute_reference = args.tuner == "full" and args.loss not in WITHOUT_REFERENCE
    if args.adapter:
        data_facts["files"]["adapter"] = sha256(from_root(args.adapter) / "adapter_model.safetensors")
        lora = read_json(from_root(args.adapter) / "adapter_config.json")
        args.lora_r, args.lora_alpha, args.lora_dropout = lora["r"], lora["lora_alpha"], lora["lora_dropout"]
        targets = lora["target_modules"] or []
        args.lora_target = targets if isinstance(targets, str) else ",".join(sorted(targets))
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
    model = build_model(args, model_path, precision, device, args.adapter)
    trainable, total = count_parameters(model)
    own_reference = bool(args.adapter) and not args.precompute_reference and args.loss not in WITHOUT_REFERENCE
    if own_reference:
        model.load_adapter(from_root(args.adapter), "reference")
    window_samples = args.batch_size * args.grad_accum * world_size
    windows = draw_windows(train_set.group[::PAIR], window_samples, args.group_size, args.epochs, args.seed)
    total_steps = len(windows) if args.max_steps < 0 else min(args.max_steps, len(windows))
    engine = make_engine(model, args, ds_config, total_steps)
    torch.manual_seed(args.seed + rank)  # Until here all ranks drew the same numbers; dropout is each rank's own.
    attention, why_not = usable_masks(engine, attention_windows(model.config), args.max_tokens, precision)
    shares = args.share_prefix and attention is not None
    cost = pack_cost(model, get_accelerator().device_name())
    layout = Layout(args.pack_tokens if attention else 0, world_size, shares, cost, PAIR)
    cache = from_root(args.output_dir) / "cache"
    plan = make_plan(train_set, windows[:total_steps], layout, cache)
    eval_plan = make_plan(eval_set, [np.arange(eval_pairs)], layout, cache) if eval_set else None
    if rank == 0:
        tokens = plan.count(train_set, range(total_steps))
        print(
            f"{len(train_set) // PAIR} pairs x {args.epochs} epochs = {total_steps} steps of batch_size "
            f"{args.batch_size} x grad_accum {args.grad_accum} x {world_size} rank(s) = {window_samples} pairs. "
            f"{precision}, ZeRO stage {stage}; {trainable:,} of {total:,} weights are trained "
            f"({trainable / total:.2%}).\n{why_not}"
            f"{tokens['logical']:,} tokens, of which {tokens['supervised']:,} are of answers; {tokens['executed']:,} "
            f"are computed, {tokens['logical'] / tokens['executed']:.2f}x fewer."
        )
    drawn = ((train_set, np.unique(np.concatenate(windows[:total_steps]))), (eval_set, np.arange(eval_pairs)))
    known: list[Any] = [None, None]
    if args.loss in WITHOUT_REFERENCE:
        known = [(torch.zeros(int(samples.targets.sum())), target_begin(samples)) for samples, _ in drawn]
    elif args.precompute_reference:  # Before a checkpoint is loaded: the engine is still what it starts from.
        start = fingerprint(model_path, *([from_root(args.adapter)] if args.adapter else []))
        made_from = f"{start} {precision} {quant_bits(args)}"
        known = [precompute_reference(engine, *pairs, layout, attention, made_from, cache) for pairs in drawn]
    train_reference, eval_reference = (
        partial(reference_logps, attention=attention, own_adapter=own_reference, known=values) for values in known
    )
    look_now = partial(look, engine, chat, eval_set, eval_plan, attention, eval_reference, args, tracker)
    if previous:
        load_checkpoint(engine, run)
    else:
        metrics = look_now(0)
        if tracker and metrics:
            tracker.log(0, metrics)

    steps = range(progress["step"] + 1, total_steps + 1)
    for step in tqdm(steps, "training", initial=steps.start - 1, total=total_steps, unit="step", disable=rank != 0):
        tokens, pairs = plan.count(train_set, range(step - 1, step)), len(windows[step - 1])
        metrics = {"train/lr": engine.get_lr()[0]}
        started = time.perf_counter()
        packs = [pack.to(engine.device) for pack in rank_packs(train_set, plan, step - 1, rank)]
        sums: Counter[str] = Counter()
        for group in together([*zip(packs, train_reference(engine, packs), strict=True)], attention):
            own, theirs = (list(part) for part in zip(*group, strict=True))
            sizes = torch.cat([pack.sample_targets for pack in own])
            loss, part = pair_loss(token_logps(engine, own, attention), torch.cat(theirs), sizes, args)
            # DeepSpeed averages gradients over the ranks: times world_size makes it their sum.
            engine.backward(loss * world_size / pairs, scale_wrt_gas=False)
            sums.update(part)
        engine.step()

        metrics |= {f"train/{name}": value for name, value in means(sums, pairs).items()}
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
            f"--save_model {model_path.name}-BiliComments-DPO --t {args.ckpt_id}"
        )
    engine.destroy()  # Its hooks and buffers would keep the model in memory while the test loads another.
    del sharding


def answer_logps(model: Any, sample: Any) -> float:
    """Log-probability of a sample's answer, computed by itself without a mask, nats."""
    import torch

    from utils.packing import lay_out
    from utils.reference import token_logps

    with torch.no_grad():
        return token_logps(model, [lay_out([sample], [0]).to(model.device)], None).sum().item()


def test(args: argparse.Namespace, model_path: Path) -> None:
    """Compares the best checkpoint with its reference on the held-out pairs, and writes the replies of both."""
    import torch

    from utils.adapters import read_adapter
    from utils.generate import show_replies
    from utils.merging import assemble, whole
    from utils.model import DTYPES
    from utils.pairs import pair
    from utils.trained import as_trained, check_tag

    folder = run_dir(from_root(args.output_dir), args.model_name, args.tuner, quant_bits(args))
    record = check_tag(folder, args.ckpt_id)
    settings = record["settings"]
    chat = load_chat(args, model_path, record["chat_template"])
    _, samples, _ = load_splits(args, *pair_files(args), chat, show=False, render=pair)
    if not samples:
        fail(f"--test_mode: no pairs are held out at {shown(from_root(args.data_path))}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logps, replies, dtype = [], [], DTYPES[settings["precision"]]
    for name in ("reference", "tuned"):
        if name == "tuned":
            parts = as_trained(folder, args.ckpt_id, record, model_path, trust_remote_code=args.trust_remote_code)
        else:
            adapters = [read_adapter(from_root(settings["adapter"]))] if settings["adapter"] else []
            parts = assemble(model_path, dtype, settings["quant_bits"], adapters, args.trust_remote_code)
        model = whole(parts, dtype).to(device)
        progress = f"{name}: pairs"
        logps.append([answer_logps(model, sample) for sample in tqdm(samples, progress, total=len(samples))])
        chosen = list(samples.select(range(0, len(samples), PAIR)))
        replies.append(show_replies(model, chat, chosen, args.max_new_tokens, progress=f"{name}: answering"))
        del parts, model
        gc.collect()
    tokens = torch.from_numpy(samples.targets).view(-1, PAIR)
    reference, tuned = (torch.tensor(values).view(-1, PAIR) for values in logps)
    # Of what changed: simpo's and orpo's rewards know no reference.
    change = tuned - reference
    worth = rewards(change, torch.zeros_like(change), tokens, settings["loss"], settings["beta"]).tolist()
    decode = partial(chat.tokenizer.decode, skip_special_tokens=True)
    rows = []
    for number, (old, new) in enumerate(zip(*replies, strict=True)):
        rejected = samples[PAIR * number + 1]
        rows.append(
            {"id": new["id"], "prompt": new["prompt"], "reply": new["reply"], "reference_reply": old["reply"]}
            | {"chosen": new["real"], "rejected": decode(rejected.input_ids[rejected.supervised]).strip()}
            | {"reward_chosen": worth[number][0], "reward_rejected": worth[number][1]}
        )
    target = folder / f"test_{args.ckpt_id}.jsonl"
    with replacing(target) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    for row in rows[:SHOWN_REPLIES]:
        print(f"\n{row['prompt']}\n  tuned:     {row['reply']}\n  reference: {row['reference_reply']}")
    wins = sum(chosen > rejected for chosen, rejected in worth)
    margin = sum(chosen - rejected for chosen, rejected in worth) / len(worth)
    print(
        f"\nOf {len(rows)} held-out pairs the tuned model moved towards the chosen answer in {wins} "
        f"({wins / len(rows):.0%}), mean reward margin {margin:.4f}. Replies of both models: {shown(target)}"
    )


def main(args: argparse.Namespace) -> None:
    """Checks what was asked for, trains and tests."""
    problems = argument_problems(args) + own_problems(args)
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
