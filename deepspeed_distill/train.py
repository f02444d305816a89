"""Distillation of a causal language model with LoRA, QLoRA or all weights, on DeepSpeed.

A student learns a teacher's answers (--kd sft), or its next-token distributions on given answers: of a local teacher
beside it (--kd logits), or of one that has left its favourites on the disk (--kd topk). Knowledge distillation: arXiv
1503.02531; reverse KL: 2306.08543; generalised JSD: 2306.13649.

    bash deepspeed_distill/run.sh
    python deepspeed_distill/train.py --student_model_name Qwen/Qwen2.5-0.5B --teacher_model_name deepseek-chat

Reads   model/<student_model_name>/, data/data_train.json and data_test.json;
        with --kd sft, or --answers NAME, the answers of prepare_data.py: data_{train,test}_teacher_<name>.jsonl;
        with --kd logits or topk model/<teacher_model_name>/.
Writes  deepspeed_distill/output/DS-<student_model_name>[-BNB|-FULL]/: the best checkpoint <ckpt_id>/, the newest
        <ckpt_id>-last/, metrics.jsonl, loss.png, samples.jsonl; in test mode test_<ckpt_id>.jsonl, .md and .png.

Left out on purpose: answers that the student writes while it learns (on-policy distillation), losses between hidden
states, teachers with another tokenizer (but for --kd sft).
Shapes: L tokens in a pack, T supervised targets in a pack, V vocabulary, C events of a distribution, k favourites.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter
from functools import cache as cache_in_memory
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.checkpoint import load_checkpoint, make_record, open_run, save_checkpoint
from utils.data import DataError, Message, UnusableRecord, find_split, read_records, to_messages
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
from utils.files import (
    ANSWER_FIELDS,
    answers_path,
    from_root,
    made_once,
    missing_model,
    only_writer,
    read_json,
    read_lines,
    replacing,
    sha256,
    shown,
)
from utils.samples import Samples, load_splits

PANELS = {"loss": "loss (nats a token)", "kd": "distance from the teacher (nats a token)"}
LORA_LR, FULL_LR = 2e-4, 2e-5
SHOWN_REPLIES, SHOWN_CHARACTERS = 4, 60
COMPARED_TEXTS = 200
LEAST = -50.0  # The logarithm of no probability.


def divergence(student: Any, teacher: Any, kind: str, beta: float) -> Any:
    """How far two distributions q (student) and p (teacher) are apart, nats.

        forward_kl  KL(p || q) = sum p (log p - log q)                                      1503.02531 section 2
        reverse_kl  KL(q || p)                                                              2306.08543 eq. 1
        jsd         b KL(p || m) + (1 - b) KL(q || m),   m = b p + (1 - b) q                2306.13649 eq. 1

    Args:
        student: (T, C) fp32 log-probabilities.
        teacher: (T, C) fp32 log-probabilities.
        kind: As above.
        beta: b of jsd.

    Returns:
        (T,) fp32.
    """
    import torch

    if kind == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if kind == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(-1)
    mixed = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    return beta * (teacher.exp() * (teacher - mixed)).sum(-1) + (1 - beta) * (student.exp() * (student - mixed)).sum(-1)


def favourites(logprobs: Any, ids: Any) -> Any:
    """Puts all tokens but some together to one event, so that a teacher's favourites make a distribution.

    No divergence of what is left is larger than that of the whole distributions; with all tokens it is the same.

    Args:
        logprobs: (T, V) fp32.
        ids: (T, k) int64, without repetition.

    Returns:
        (T, k + 1) fp32, the last one of all other tokens.
    """
    import torch

    kept = logprobs.gather(1, ids)
    rest = (1 - kept.exp().sum(1, keepdim=True)).clamp_min(1e-7).log()
    return torch.cat([kept, rest], 1)


def distill_loss(
    logits: Any, target_ids: Any, target_weight: Any, teacher: Any, vocab_size: int | None, args: argparse.Namespace
) -> tuple[Any, Counter[str]]:
    """Sum over the supervised targets of (1 - a) CE + a t^2 D(teacher, student at temperature t).

    A sum, which the loop divides by the number of supervised tokens of the whole window (as in fine-tuning). t^2 keeps
    the gradients of D as large as those of the cross-entropy (1503.02531 section 2).

    Args:
        logits: (T, at least V) of the student at the places before the targets; what is behind V is cut off.
        target_ids: (T,) int64.
        target_weight: (T,) fp32.
        teacher: (T, V) fp32 log-probabilities at temperature t; or of its favourites (T, k) int64 ids and (T, k + 1)
            fp32 log-probabilities; None to learn the targets alone.
        vocab_size: V; None for all that the student has.
        args: Of the run: kd_loss, kd_temperature, kd_alpha, kd_beta.

    Returns:
        () fp32, nats; and the sums "loss", "ce" and "kd" (D times t^2).
    """
    import torch

    from utils.tensors import token_logprobs

    logits = logits[:, :vocab_size]
    ce = -(target_weight * token_logprobs(logits, target_ids)).sum()
    if teacher is None:
        return ce, Counter(loss=ce.item())
    student = torch.log_softmax(logits.float() / args.kd_temperature, -1)
    if isinstance(teacher, tuple):
        ids, teacher = teacher
        student = favourites(student, ids)
    apart = divergence(student, teacher, args.kd_loss, args.kd_beta)
    kd = args.kd_temperature**2 * (target_weight * apart).sum()
    loss = (1 - args.kd_alpha) * ce + args.kd_alpha * kd
    values = torch.stack([loss, ce, kd]).tolist()
    return loss, Counter(dict(zip(("loss", "ce", "kd"), values, strict=True)))


def build_parser() -> argparse.ArgumentParser:
    """The arguments; those that all training scripts share come from utils/engine.py."""
    parser = argparse.ArgumentParser(
        description="Let a small language model learn from a larger one (LoRA, QLoRA, full) with DeepSpeed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data_dir", default="data", help="folder with data_train.json and data_test.json")
    parser.add_argument(
        "--student_model_name", dest="model_name", default="Qwen/Qwen2.5-0.5B", help="the student, in --model_dir"
    )
    parser.add_argument(
        "--teacher_model_name", required=True,
        help="sft: the name under which prepare_data.py has collected answers; logits, topk: a model in --model_dir",
    )  # fmt: skip
    parser.add_argument("--output_dir", default="deepspeed_distill/output", help="folder of the results")
    parser.add_argument("--train_mode", type=boolean, default=True, help="True: train")
    parser.add_argument(
        "--test_mode", type=boolean, default=False, help="True: answer the held-out comments, at the end"
    )
    add = parser.add_argument_group("distillation").add_argument
    add("--kd", choices=["sft", "logits", "topk"], default="sft", help="what is learnt, see README")
    add("--answers", default="", help="logits, topk: learn on these collected answers (not given: on real comments)")
    add("--answers_dir", default="deepspeed_distill/data", help="folder of the collected answers")
    add("--kd_loss", choices=["forward_kl", "reverse_kl", "jsd"], default="forward_kl", help="see README")
    add("--kd_temperature", type=float, default=1.0, help="logits are divided by it, the teacher's too")
    add("--kd_alpha", type=float, default=0.5, help="part of the teacher in the loss; the rest is cross-entropy")
    add("--kd_beta", type=float, default=0.5, help="part of the teacher in jsd's mixture")
    add("--kd_topk", type=int, default=64, help="topk: tokens whose probabilities are kept")
    add("--teacher_bnb_enabled", type=boolean, default=False, help="True: a local teacher in 4 bits")
    add_run_arguments(parser, LORA_LR, FULL_LR)
    return parser


def own_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with this script's own arguments."""
    problems = []
    if not args.kd_temperature > 0:
        problems.append(f"--kd_temperature: got {args.kd_temperature}, expected more than 0.")
    if not 0 <= args.kd_alpha <= 1:
        problems.append(f"--kd_alpha: got {args.kd_alpha}, expected 0 to 1.")
    if not 0 < args.kd_beta < 1:
        problems.append(f"--kd_beta: got {args.kd_beta}, expected more than 0 and less than 1.")
    if args.kd_topk < 1:
        problems.append(f"--kd_topk: got {args.kd_topk}, expected 1 or more.")
    data = find_split(from_root(args.data_dir), "train")
    if data is None:
        problems.append(
            f"No training data in {shown(from_root(args.data_dir))} (expected data_train or train with .json, .jsonl, "
            ".csv or .parquet).\nMake it with: python prepare_data.py --total 2000"
        )
    if (name := answers_name(args)) and not answers_file(args, "train").is_file():
        files = from_root(args.answers_dir).glob("data_train_teacher_*.jsonl")
        there = {path.stem.partition("_teacher_")[2] for path in files if not path.stem.endswith("_failures")}
        problems.append(
            f"No answers at {shown(answers_file(args, 'train'))}. There are those of: "
            f"{', '.join(sorted(there)) or 'nobody'}.\n"
            f"Collect them: python deepspeed_distill/prepare_data.py --d_type train --model_name {name}"
        )
    if args.kd == "sft" and args.answers:
        problems.append("--answers is for --kd logits and topk; sft learns those of --teacher_model_name.")
    teacher_path = from_root(args.model_dir) / args.teacher_model_name
    if args.kd != "sft" and not (teacher_path / "config.json").is_file():
        problems.append(missing_model(from_root(args.model_dir), args.teacher_model_name))
    return problems


def answers_name(args: argparse.Namespace) -> str:
    """Whose collected answers are learnt; "" for real comments."""
    return args.teacher_model_name if args.kd == "sft" else args.answers


def answers_file(args: argparse.Namespace, split: str) -> Path:
    """Where prepare_data.py has written a teacher's answers."""
    return answers_path(from_root(args.answers_dir), split, answers_name(args))


def learnt_files(args: argparse.Namespace) -> list[Path | None]:
    """The files of the conversations to learn and of the held-out ones."""
    data = [find_split(from_root(args.data_dir), split) for split in ("train", "test")]
    if not answers_name(args):
        return data
    answers = [answers_file(args, split) for split in ("train", "test")]
    cache = from_root(args.output_dir) / "cache"
    pairs = zip(data, answers, strict=True)
    try:
        return [join_answers(one, other, cache) if one and other.is_file() else None for one, other in pairs]
    except DataError as error:
        fail(str(error))


def join_answers(data: Path, answers: Path, cache: Path) -> Path:
    """Writes a split's comments with a teacher's newest answers in the place of the real ones.

    Answers to comments that are not in the split (any more), or whose prompt has changed, are left out. The comments'
    own system prompt stays; the teacher had another one.

    Raises:
        SystemExit: if nothing is left.
    """
    path = cache / f"learnt-{hashlib.sha256((sha256(data) + sha256(answers)).encode()).hexdigest()[:16]}.jsonl"
    with made_once(path) as temporary:
        if temporary:
            newest = {row["id"]: row for row in read_lines(answers, ANSWER_FIELDS)}
            lines, settings = [], Counter()
            for record in read_records(data):
                row = newest.get(str(record.get("id"))) if isinstance(record, dict) else None
                if row is None:
                    continue
                try:
                    *prompt, answer = to_messages(row)
                except DataError as error:
                    print(f"{shown(answers)}: the answer to {row['id']} is left out: {error}")
                    continue
                try:
                    *asked, real = to_messages(record)
                except UnusableRecord:  # As it was when the teacher was asked.
                    continue
                if spoken(prompt) == spoken(asked):
                    turns = [{"from": turn["role"], "value": turn["content"]} for turn in (*asked, answer)]
                    kept = {"id": row["id"], "video_id": row["video_id"], "conversations": turns}
                    lines.append(json.dumps(kept | {"real": real["content"]}, ensure_ascii=False) + "\n")
                    settings[row.get("setting")] += 1
            if len(settings) > 1:
                counts = ", ".join(f"{times:,}" for times in settings.values())
                print(
                    f"{shown(answers)}: the newest answers are to {len(settings)} different instructions, models or "
                    f"options ({counts}). If that is not meant, run again: python deepspeed_distill/prepare_data.py"
                )
            if not lines:
                again = "Run again: python deepspeed_distill/prepare_data.py"
                fail(f"{shown(answers)} has no answer to a comment of {shown(data)}. {again}")
            temporary.write_text("".join(lines), encoding="utf-8")
    return path


def spoken(turns: list[Message]) -> list[Message]:
    """Turns without the system prompt."""
    return [turn for turn in turns if turn["role"] != "system"]


def load_teacher_tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer of a local teacher."""
    from utils.model import load_tokenizer

    path = from_root(args.model_dir) / args.teacher_model_name
    try:
        return load_tokenizer(path, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:  # What transformers raises where files are missing or broken.
        name = args.teacher_model_name
        fail(f"No tokenizer in {shown(path)}: {error}\nFetch the model: python download_pt.py --model {name}")


def shared_vocabulary(student: Any, teacher: Any, texts: list[str], used: int) -> int:
    """How many tokens two tokenizers have in common, from the first one on.

    Models have more rows than tokens, and not equally many: rows of padding mean nothing, and would take probability.

    Args:
        student: Its tokenizer.
        teacher: Its tokenizer.
        texts: That both have to split into the same tokens.
        used: The largest token that is trained on, and 1.

    Raises:
        SystemExit: if they differ before one of them ends, in a token that is used, or in how they split a text.
    """
    ours, theirs = ({id: token for token, id in tokenizer.get_vocab().items()} for tokenizer in (student, teacher))
    common = min(max(ours), max(theirs)) + 1
    other = next((id for id in range(common) if ours.get(id) != theirs.get(id)), None)
    if other is not None:
        what = f"token {other} is {ours.get(other)!r} here and {theirs.get(other)!r} there"
    elif used > common:
        what = f"the data needs {used} tokens, both have {common}"
    elif other := next((text for text in texts if splits(student, text) != splits(teacher, text)), None):
        # With other merges, or more of them, the teacher knows other ways to write what the student writes.
        what = f"{other[:SHOWN_CHARACTERS]!r} becomes other tokens here than there"
    else:
        return common
    fail(
        f"The student's tokenizer is not the teacher's: {what}. Their distributions cannot be compared; let the "
        "student learn the teacher's answers: --kd sft"
    )


def splits(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without what a tokenizer puts around it."""
    return tokenizer.encode(text, add_special_tokens=False)


def load_teacher(args: argparse.Namespace, precision: str, device: str) -> Any:
    """Loads a local teacher, which does not learn."""
    path, bits = from_root(args.model_dir) / args.teacher_model_name, 4 if args.teacher_bnb_enabled else None
    model = load_whole(path, args.teacher_model_name, precision, bits, device, args.trust_remote_code)
    return model.to(device).requires_grad_(False).eval()


def teacher_logprobs(model: Any, attention: Any, vocab_size: int, temperature: float, pack: Any) -> Any:
    """(T, V) fp32 log-probabilities of a local teacher at the places before a pack's targets."""
    import torch

    from utils.attention import model_inputs

    with torch.no_grad():
        logits = model(**model_inputs(pack.to(model.device), attention)).logits[0]
        return torch.log_softmax(logits[:, :vocab_size].float() / temperature, -1)


def most_likely(logprobs: Any, k: int) -> list[Any]:
    """The likeliest tokens, and all others together, small enough for a disk.

    Args:
        logprobs: (T, V) fp32.
        k: How many.

    Returns:
        (T, k) int32 ids, and (T, k + 1) fp16 log-probabilities, the last one of the rest.
    """
    import torch

    values, ids = logprobs.topk(min(k, logprobs.shape[1]))
    rest = logprobs.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True).clamp_min(LEAST)
    return [ids.int(), torch.cat([values, rest], 1).half()]


def make_teachers(
    args: argparse.Namespace,
    sets: list[Samples],
    vocab_size: int | None,
    precision: str,
    device: str,
    teacher: str | None,
    cache: Path,
) -> tuple[list[Any], bool, str]:
    """What says what the teacher holds of a pack, for each set of samples.

    Args:
        args: Of the run.
        sets: Of samples.
        vocab_size: V.
        precision: Of the run.
        device: Where the teacher computes.
        teacher: Its fingerprint.
        cache: Folder of what was computed before.

    Returns:
        For each set a function of a pack that makes what `distill_loss` takes; whether the teacher takes tree masks;
        and why not.
    """
    import numpy as np
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm import get_world_size

    from utils.attention import usable_masks
    from utils.model import attention_windows
    from utils.packing import Layout, pack_cost
    from utils.reference import computed_once, target_begin, target_places

    def load() -> tuple[Any, Any, str]:
        model = load_teacher(args, precision, device)
        masks, why_not = usable_masks(model, attention_windows(model.config), args.max_tokens, precision)
        return model.eval(), masks, why_not and f"Teacher: {why_not}"

    if args.kd == "sft":
        return [lambda pack: None] * len(sets), True, ""
    if args.kd == "logits":
        model, masks, why_not = load()
        logprobs = partial(teacher_logprobs, model, masks, vocab_size, args.kd_temperature)
        return [logprobs] * len(sets), masks is not None, why_not

    @cache_in_memory
    def make_ready() -> tuple[Any, Any]:
        model, masks, _ = load()
        cost = pack_cost(model, get_accelerator().device_name())
        layout = Layout(args.pack_tokens if masks else 0, get_world_size(), masks is not None, cost)
        return layout, lambda pack: most_likely(
            teacher_logprobs(model, masks, vocab_size, args.kd_temperature, pack), args.kd_topk
        )

    made_from = f"{teacher} {args.teacher_bnb_enabled} {precision} {vocab_size} {args.kd_topk} {args.kd_temperature}"
    teachers = []
    for samples in sets:  # All of them: with other --max_steps the same are found on the disk.
        kept = computed_once(make_ready, samples, np.arange(len(samples)), made_from, cache)
        teachers.append(partial(kept_favourites, kept, partial(target_places, target_begin(samples))))
    make_ready.cache_clear()  # The teacher goes.
    gc.collect()
    get_accelerator().empty_cache()
    return teachers, True, ""


def kept_favourites(kept: list[Any], places_of: Any, pack: Any) -> tuple[Any, Any]:
    """A pack's favourites, as `distill_loss` takes them, from those of all samples."""
    ids, logprobs = (part[places_of(pack)].to(pack.input_ids.device) for part in kept)
    return ids.long(), logprobs.float().log_softmax(-1)  # Rounded to 16 bits they no longer sum to 1.


def means(sums: Counter[str], supervised_tokens: int) -> dict[str, float]:
    """Sums over the supervised tokens of all ranks become means."""
    from utils.tensors import all_reduced_each

    return {name: value / supervised_tokens for name, value in all_reduced_each(dict(sums)).items()}


def evaluate(
    engine: Any, samples: Samples, plan: Any, attention: Any, teach: Any, vocab_size: Any, args: argparse.Namespace
) -> dict[str, float]:
    """Means of the losses over held-out samples, over all ranks, in nats; `plan` is one window of them."""
    import deepspeed
    import torch

    from utils.attention import model_inputs
    from utils.packing import rank_packs

    engine.eval()
    sums: Counter[str] = Counter()
    with torch.no_grad():
        for pack in rank_packs(samples, plan, 0, deepspeed.comm.get_rank()):
            pack = pack.to(engine.device)
            logits = engine(**model_inputs(pack, attention)).logits[0]
            sums.update(distill_loss(logits, pack.target_ids, pack.target_weight, teach(pack), vocab_size, args)[1])
    engine.train()
    return means(sums, int(samples.targets.sum()))


def look(
    engine: Any,
    chat: Any,
    samples: Samples,
    plan: Any,
    attention: Any,
    teach: Any,
    vocab_size: int | None,
    args: argparse.Namespace,
    tracker: Any,
    step: int,
) -> dict[str, float]:
    """Measures the held-out loss and shows a few replies, because that is how over-fitting is noticed."""
    from utils.generate import show_replies

    if not samples:
        return {}
    metrics = evaluate(engine, samples, plan, attention, teach, vocab_size, args)
    engine.eval()
    rows = show_replies(engine.module, chat, list(islice(samples, SHOWN_REPLIES)), args.max_new_tokens)
    engine.train()
    if tracker:
        tracker.log_samples(step, rows)
        tqdm.write(f"step {step}: held-out " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        for row in rows:
            tqdm.write(f"    {row['reply'][:80]!r}, to learn: {row['real'][:80]!r}")
    return {f"eval/{name}": value for name, value in metrics.items()}


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
    from utils.reference import fingerprint
    from utils.track import Tracker
    from utils.trained import PROBE_PROMPTS, probe_prompt, record_probe

    # Tokenizer and data.
    # A file that is not UTF-8 becomes a template that says nothing of use, and is refused for that.
    template = from_root(args.chat_template).read_text("utf-8", "replace") if args.chat_template else ""
    chat = load_chat(args, model_path, template)
    train_set, test_set, data_facts = load_splits(args, *learnt_files(args), chat, show=rank == 0)
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
    teacher_path, vocab_size = from_root(args.model_dir) / args.teacher_model_name, None
    if args.kd != "sft":
        # Of all its files in one.
        data_facts["files"]["teacher"] = hashlib.sha256(fingerprint(teacher_path).encode()).hexdigest()
        used = max(int(samples.tokens.max()) for samples in (train_set, eval_set)) + 1
        decode = partial(chat.tokenizer.decode, skip_special_tokens=True)
        texts = [decode(sample.input_ids) for sample in islice(train_set, COMPARED_TEXTS)]
        vocab_size = shared_vocabulary(chat.tokenizer, load_teacher_tokenizer(args), texts, used)
        rows = [read_json(path / "config.json").get("vocab_size", vocab_size) for path in (model_path, teacher_path)]
        vocab_size = min(vocab_size, *rows)  # Tokens may have been added to a tokenizer and not to its model.
    record = make_record(args, ds_config, precision, world_size, chat.tokenizer.chat_template, data_facts)
    folder = run_dir(from_root(args.output_dir), args.model_name, args.tuner, quant_bits(args))
    run, previous = open_run(folder, args, record)
    ds_config["checkpoint"] = {"use_node_local_storage": not run.shared}
    progress = previous["progress"] if previous else {"step": 0, "best_step": 0, "best_eval_loss": None}
    panels = PANELS if args.kd != "sft" else {"loss": PANELS["loss"]}
    tracker = Tracker(run.dir, progress["step"], args.track, record["settings"], panels) if rank == 0 else None
    needed = needed_bytes(model_path, args, quant_bits(args), precision)
    if args.kd == "logits":
        bits = 4 if args.teacher_bnb_enabled else None
        needed["teacher"] = needed_bytes(teacher_path, args, bits, precision)["weights"]
    if args.kd != "sft":
        # Both distributions, and what their distance is made of, for the supervised tokens of a pack.
        needed["distributions"] = 4 * 4 * vocab_size * args.pack_tokens // (2 if args.share_prefix else 4)
    needs = report_needs(needed, run.dir, world_size, ds_config)
    if rank == 0:
        print(needs)

    # The teacher comes before weights are sharded as they are read: each rank has the whole of it.
    window_samples = args.batch_size * args.grad_accum * world_size
    windows = draw_windows(train_set.group, window_samples, args.group_size, args.epochs, args.seed)
    total_steps = len(windows) if args.max_steps < 0 else min(args.max_steps, len(windows))
    cache = from_root(args.output_dir) / "cache"
    (teach_train, teach_eval), masks, teacher_why_not = make_teachers(
        args, [train_set, eval_set], vocab_size, precision, device, data_facts["files"].get("teacher"), cache
    )

    # Model and engine. While the configuration object lives, transformers shards weights as it reads them.
    sharding = HfDeepSpeedConfig(ds_config) if stage == 3 and not quant_bits(args) else None
    model = build_model(args, model_path, precision, device)
    engine = make_engine(model, args, ds_config, total_steps)
    torch.manual_seed(args.seed + rank)  # Until here all ranks drew the same numbers; dropout is each rank's own.
    attention, why_not = usable_masks(engine, attention_windows(model.config), args.max_tokens, precision)
    attention = attention if masks else None
    shares = args.share_prefix and attention is not None
    cost = pack_cost(model, get_accelerator().device_name())
    layout = Layout(args.pack_tokens if attention else 0, world_size, shares, cost)
    plan = make_plan(train_set, windows[:total_steps], layout, cache)
    eval_plan = make_plan(eval_set, [np.arange(len(eval_set))], layout, cache) if eval_set else None
    if rank == 0:
        trainable, total = count_parameters(model)
        tokens = plan.count(train_set, range(total_steps))
        print(
            f"{len(train_set)} samples x {args.epochs} epochs = {total_steps} steps of batch_size {args.batch_size} x "
            f"grad_accum {args.grad_accum} x {world_size} rank(s) = {window_samples} samples. {precision}, ZeRO stage "
            f"{stage}; {trainable:,} of {total:,} weights are trained ({trainable / total:.2%}).\n"
            f"{why_not}{teacher_why_not}"
            f"{tokens['logical']:,} tokens, of which {tokens['supervised']:,} are learnt; {tokens['executed']:,} are "
            f"computed, {tokens['logical'] / tokens['executed']:.2f}x fewer."
        )
    look_now = partial(look, engine, chat, eval_set, eval_plan, attention, teach_eval, vocab_size, args, tracker)
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
        sums: Counter[str] = Counter()
        for pack in rank_packs(train_set, plan, step - 1, rank):
            pack = pack.to(engine.device)
            logits = engine(**model_inputs(pack, attention)).logits[0]
            said = teach_train(pack)
            loss, part = distill_loss(logits, pack.target_ids, pack.target_weight, said, vocab_size, args)
            # DeepSpeed averages gradients over the ranks: times world_size makes it their sum.
            engine.backward(loss * world_size / tokens["supervised"], scale_wrt_gas=False)
            sums.update(part)
        engine.step()

        metrics |= {f"train/{name}": value for name, value in means(sums, tokens["supervised"]).items()}
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
            f"--save_model {model_path.name}-Distill-BiliComments --t {args.ckpt_id}"
        )
    engine.destroy()  # Its hooks and buffers would keep the model in memory while the test loads another.
    del sharding


def test(args: argparse.Namespace, model_path: Path) -> None:
    """Holds the best checkpoint's replies to the held-out comments against the teacher's and the real ones."""
    import torch

    from utils.generate import show_replies
    from utils.merging import whole
    from utils.model import DTYPES
    from utils.scores import as_markdown, compare_texts, plot_comparison
    from utils.trained import as_trained, check_tag

    folder = run_dir(from_root(args.output_dir), args.model_name, args.tuner, quant_bits(args))
    record = check_tag(folder, args.ckpt_id)
    chat = load_chat(args, model_path, record["chat_template"])
    files = learnt_files(args)
    _, samples, _ = load_splits(args, *files, chat, show=False)
    if not samples:
        fail(f"--test_mode: nothing is held out at {shown(from_root(args.data_dir))}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = record["settings"]["precision"]
    trained = as_trained(folder, args.ckpt_id, record, model_path, trust_remote_code=args.trust_remote_code)
    model = whole(trained, DTYPES[precision])
    student = show_replies(model.to(device), chat, samples, args.max_new_tokens, progress="student")
    del trained, model
    if answers_name(args):  # What is learnt is the teacher's; what is real stands in the data.
        real = {row["id"]: row["real"] for file in files if file for row in read_lines(file, {"id": str, "real": str})}
        others = [{"teacher": row["real"], "real": real[row["id"]]} for row in student]
    else:
        decode = partial(chat.tokenizer.decode, skip_special_tokens=True)
        texts = [decode(sample.input_ids) for sample in islice(samples, COMPARED_TEXTS)]
        shared_vocabulary(chat.tokenizer, load_teacher_tokenizer(args), texts, 0)  # It reads the student's tokens.
        model = load_teacher(args, precision, device)
        teacher = show_replies(model, chat, samples, args.max_new_tokens, progress="teacher")
        others = [{"teacher": row["reply"], "real": row["real"]} for row in teacher]
    rows = [
        {"id": row["id"], "prompt": row["prompt"], "student": row["reply"]} | other
        for row, other in zip(student, others, strict=True)
    ]
    table = compare_texts(rows, ["student", "teacher"], "real")
    target = folder / f"test_{args.ckpt_id}.jsonl"
    with replacing(target) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with replacing(target.with_suffix(".md")) as temporary:
        temporary.write_text(as_markdown(table), encoding="utf-8")
    plot_comparison(rows, table, target.with_suffix(".png"))
    for row in rows[:SHOWN_REPLIES]:
        print(f"\n{row['prompt']}", *(f"{name + ':':8} {row[name]}" for name in table), sep="\n  ")
    beside = "the table and a picture lie beside it (.md, .png)"
    print(f"\n{as_markdown(table)}\n{len(rows)} replies: {shown(target)}; {beside}")


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
