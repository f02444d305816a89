"""Distillation of a causal language model with LoRA, QLoRA or all weights, on DeepSpeed.

A student learns a teacher's answers (--kd sft), or its next-token distributions on given answers: of a local teacher
beside it (--kd logits), or of one whose top k tokens were kept on the disk (--kd topk). Knowledge distillation: arXiv
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
Shapes: L tokens in a pack, T supervised targets in a pack, V vocabulary, C events of a distribution, k top tokens.
"""

import argparse
import gc
import hashlib
import math
import sys
from collections import Counter
from functools import cache as cache_in_memory
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import ArgumentParser, add_columns_argument, boolean, fail
from utils.data.answers import answers_path, join_answers
from utils.data.records import DataError, find_splits
from utils.data.samples import Samples, load_splits
from utils.data.tokenizer import load_tokenizer, shared_vocabulary
from utils.files import from_root, missing_model, read_json, read_lines, shown, write_lines
from utils.train.arguments import add_run_arguments, check_and_start, data_problems, run_dir
from utils.train.engine import load_base, load_chat
from utils.train.run import SHOWN_REPLIES, Run

PANELS = {"loss": "loss (nats a token)", "kd": "distance from the teacher (nats a token)"}
LORA_LR, FULL_LR = 2e-4, 2e-5
COMPARED_TEXTS = 200
LOG_ZERO = -50.0  # In the place of log 0.


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


def topk_and_rest(logprobs: Any, ids: Any) -> Any:
    """Keeps some tokens and adds all others up to one event, so that a teacher's top k make a distribution.

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
        teacher: (T, V) fp32 log-probabilities at temperature t; or of its top k (T, k) int64 ids and (T, k + 1)
            fp32 log-probabilities; None to learn the targets alone.
        vocab_size: V; None for all that the student has.
        args: Of the run: kd_loss, kd_temperature, kd_alpha, kd_beta.

    Returns:
        () fp32, nats; and the sums "loss", "ce" and "kd" (D times t^2).
    """
    import torch

    from utils.train.tensors import token_logprobs

    logits = logits[:, :vocab_size]
    ce = -(target_weight * token_logprobs(logits, target_ids)).sum()
    if teacher is None:
        return ce, Counter(loss=ce.item())
    student = torch.log_softmax(logits.float() / args.kd_temperature, -1)
    if isinstance(teacher, tuple):
        ids, teacher = teacher
        student = topk_and_rest(student, ids)
    apart = divergence(student, teacher, args.kd_loss, args.kd_beta)
    kd = args.kd_temperature**2 * (target_weight * apart).sum()
    loss = (1 - args.kd_alpha) * ce + args.kd_alpha * kd
    values = torch.stack([loss, ce, kd]).tolist()
    return loss, Counter(dict(zip(("loss", "ce", "kd"), values, strict=True)))


def build_parser() -> argparse.ArgumentParser:
    """The arguments; those that all training scripts share come from utils/train/arguments.py."""
    parser = ArgumentParser(
        description="Let a small language model learn from a larger one (LoRA, QLoRA, full) with DeepSpeed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data_dir", default="data", help="folder with data_train.json and data_test.json")
    add_columns_argument(parser)
    parser.add_argument(
        "--student_model_name", dest="model_name", default="Qwen/Qwen2.5-0.5B", help="the student, in --model_dir"
    )
    parser.add_argument(
        "--teacher_model_name", required=True,
        help="sft: the name under which prepare_data.py has collected answers; logits, topk: a model in --model_dir",
    )  # fmt: skip
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
    add_run_arguments(parser, "deepspeed_distill/output", LORA_LR, FULL_LR)
    return parser


def own_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with this script's own arguments."""
    problems = data_problems(args)
    if not args.kd_temperature > 0:
        problems.append(f"--kd_temperature: got {args.kd_temperature}, expected more than 0.")
    if not 0 <= args.kd_alpha <= 1:
        problems.append(f"--kd_alpha: got {args.kd_alpha}, expected 0 to 1.")
    if not 0 < args.kd_beta < 1:
        problems.append(f"--kd_beta: got {args.kd_beta}, expected more than 0 and less than 1.")
    if args.kd_topk < 1:
        problems.append(f"--kd_topk: got {args.kd_topk}, expected 1 or more.")
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
    """Whose collected answers to train on; "" for real comments."""
    return args.teacher_model_name if args.kd == "sft" else args.answers


def answers_file(args: argparse.Namespace, split: str) -> Path:
    """Where prepare_data.py has written a teacher's answers."""
    return answers_path(from_root(args.answers_dir), split, answers_name(args))


def training_files(args: argparse.Namespace) -> list[Path | None]:
    """The files of the training and of the held-out conversations."""
    data = find_splits(from_root(args.data_dir))
    if not answers_name(args):
        return data
    answers = [answers_file(args, split) for split in ("train", "test")]
    cache = from_root(args.output_dir) / "cache"
    pairs = zip(data, answers, strict=True)
    join = partial(join_answers, cache=cache, columns=args.columns)
    try:
        return [join(one, other) if one and other.is_file() else None for one, other in pairs]
    except DataError as error:
        fail(str(error))


def columns_of_files(args: argparse.Namespace) -> dict[str, str] | None:
    """--columns for `training_files`: those with a teacher's answers have the fields that they were written with."""
    return None if answers_name(args) else args.columns


def load_teacher(args: argparse.Namespace, precision: str, device: str) -> Any:
    """Loads a local teacher, which does not learn."""
    path, bits = from_root(args.model_dir) / args.teacher_model_name, 4 if args.teacher_bnb_enabled else None
    model = load_base(path, args.teacher_model_name, precision, bits, device, args.trust_remote_code)
    return model.to(device).requires_grad_(False).eval()


def teacher_logprobs(model: Any, form: Any, vocab_size: int, temperature: float, pack: Any) -> Any:
    """(T, V) fp32 log-probabilities of a local teacher at the places before a pack's targets."""
    import torch

    from utils.train.forward import supervised_logits

    with torch.no_grad():
        logits = supervised_logits(model, pack.to(model.device), form)
        return torch.log_softmax(logits[:, :vocab_size].float() / temperature, -1)


def topk_logprobs(logprobs: Any, k: int) -> list[Any]:
    """The likeliest tokens, and all others together, small enough for a disk.

    Args:
        logprobs: (T, V) fp32.
        k: How many.

    Returns:
        (T, k) int32 ids, and (T, k + 1) fp16 log-probabilities, the last one of the rest.
    """
    import torch

    values, ids = logprobs.topk(min(k, logprobs.shape[1]))
    rest = logprobs.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True).clamp_min(LOG_ZERO)
    return [ids.int(), torch.cat([values, rest], 1).half()]


def make_teachers(run: Run, vocab_size: int | None) -> tuple[list[Any], tuple[Any, str] | None]:
    """Makes functions that give the teacher's distributions for a pack, for the training and the held-out samples.

    Args:
        run: With its samples, and no weights yet.
        vocab_size: V.

    Returns:
        For each a function of a pack that makes what `distill_loss` takes; and how the teacher computes packs while the
        student learns, with a line that says why not as tries.
    """
    import numpy as np
    from deepspeed.accelerator import get_accelerator

    from utils.train.forward import choose_format, make_layout
    from utils.train.reference import compute_or_load, target_begin, target_places

    args, sets = run.args, (run.train_set, run.eval_set)

    def load() -> tuple[Any, Any, str]:
        model = load_teacher(args, run.precision, run.device)
        form, why_not = choose_format(model, args.max_tokens, run.precision)
        return model.eval(), form, f"Teacher: {why_not}" if why_not else ""

    if args.kd == "sft":
        return [lambda pack: None] * len(sets), None
    if args.kd == "logits":
        model, form, why_not = load()
        logprobs = partial(teacher_logprobs, model, form, vocab_size, args.kd_temperature)
        return [logprobs] * len(sets), (form, why_not)

    @cache_in_memory
    def make_ready() -> tuple[Any, Any]:
        model, form, _ = load()
        layout = make_layout(form, model, get_accelerator().device_name(), args.pack_tokens, run.world_size)
        return layout, lambda pack: topk_logprobs(
            teacher_logprobs(model, form, vocab_size, args.kd_temperature, pack), args.kd_topk
        )

    name = run.data_facts["files"]["teacher"]
    made_from = f"{name} {args.teacher_bnb_enabled} {run.precision} {vocab_size} {args.kd_topk} {args.kd_temperature}"
    teachers = []
    for samples in sets:  # All of them: with other --max_steps the same are found on the disk.
        kept = compute_or_load(make_ready, samples, np.arange(len(samples)), made_from, run.cache)
        teachers.append(partial(cached_topk, kept, partial(target_places, target_begin(samples))))
    make_ready.cache_clear()  # The teacher goes.
    gc.collect()
    get_accelerator().empty_cache()
    return teachers, None


def cached_topk(kept: list[Any], places_of: Any, pack: Any) -> tuple[Any, Any]:
    """A pack's top k, as `distill_loss` takes them, from those of all samples."""
    ids, logprobs = (part[places_of(pack)].to(pack.input_ids.device) for part in kept)
    return ids.long(), logprobs.float().log_softmax(-1)  # Rounded to 16 bits they no longer sum to 1.


def compare_tokenizers(chat: Any, samples: Samples, used: int, args: argparse.Namespace) -> int:
    """How many tokens the tokenizers of student and teacher share; they have to split some texts alike.

    Raises:
        SystemExit: if the teacher has none, or another one.
    """
    path = from_root(args.model_dir) / args.teacher_model_name
    decode = partial(chat.tokenizer.decode, skip_special_tokens=True)
    texts = [decode(sample.input_ids) for sample in islice(samples, COMPARED_TEXTS)]
    try:
        return shared_vocabulary(chat.tokenizer, load_tokenizer(path, "", args.trust_remote_code), texts, used)
    except DataError as error:
        fail(
            f"The student's tokenizer is not the teacher's: {error}. Their distributions cannot be compared; let the "
            "student learn the teacher's answers: --kd sft"
        )
    except (OSError, ValueError) as error:  # What transformers raises where files are missing or broken.
        name = args.teacher_model_name
        fail(f"No tokenizer in {shown(path)}: {error}\nFetch the model: python download_pt.py --model {name}")


def check_teacher(run: Run) -> tuple[int | None, dict[str, int]]:
    """Checks the teacher against the student before any weight is read, and estimates its memory.

    Returns:
        V, None if the teacher's distributions are not learnt; and the memory that its part of the run needs.
    """
    from utils.train.memory import needed_bytes
    from utils.train.reference import fingerprint

    args, path = run.args, from_root(run.args.model_dir) / run.args.teacher_model_name
    if args.kd == "sft":
        return None, {}
    # Of all its files in one.
    run.data_facts["files"]["teacher"] = hashlib.sha256(fingerprint(path).encode()).hexdigest()
    used = max(int(samples.tokens.max()) for samples in (run.train_set, run.eval_set)) + 1
    vocab_size = compare_tokenizers(run.chat, run.train_set, used, args)
    rows = [read_json(folder / "config.json").get("vocab_size", vocab_size) for folder in (run.model_path, path)]
    vocab_size = min(vocab_size, *rows)  # Tokens may have been added to a tokenizer and not to its model.
    needed = {}
    if args.kd == "logits":
        bits = 4 if args.teacher_bnb_enabled else None
        needed["teacher"] = needed_bytes(path, args, bits, run.precision)["weights"]
    # Both distributions, and what their distance is made of, for the supervised tokens of a pack.
    needed["distributions"] = 4 * 4 * vocab_size * args.pack_tokens // (2 if args.share_prefix else 4)
    return vocab_size, needed


def evaluate(run: Run, teacher: Any, vocab_size: int | None) -> dict[str, float]:
    """Means of the losses over the held-out samples, over all ranks, in nats."""
    from utils.train.forward import supervised_logits
    from utils.train.tensors import means_over_ranks

    sums: Counter[str] = Counter()
    for pack in run.eval_packs():
        logits = supervised_logits(run.engine, pack, run.form)
        _, part = distill_loss(logits, pack.target_ids, pack.target_weight, teacher(pack), vocab_size, run.args)
        sums.update(part)
    return means_over_ranks(sums, int(run.eval_set.targets.sum()))


def train(args: argparse.Namespace, model_path: Path) -> None:
    """Trains, and leaves checkpoints, metrics and sample replies in the run's folder."""
    run = Run(args, model_path, LORA_LR, FULL_LR)
    from utils.train.forward import supervised_logits
    from utils.train.tensors import means_over_ranks

    run.load_data(training_files(args), columns=columns_of_files(args))
    vocab_size, needed = check_teacher(run)
    panels = PANELS if args.kd != "sft" else {"loss": PANELS["loss"]}
    run.open(Path(__file__).with_name("ds_config.json"), panels, needed)
    # Before weights are sharded as they are read: each rank has the whole of the teacher.
    (teacher, eval_teacher), teacher_form = make_teachers(run, vocab_size)
    run.load_model()
    run.make_engine(teacher_form)
    measure = partial(evaluate, run, eval_teacher, vocab_size)
    run.resume_or_evaluate(measure)
    for step in run.steps():
        sums, tokens = Counter(), run.supervised_tokens(step)
        for pack in run.packs(step):
            logits = supervised_logits(run.engine, pack, run.form)
            said = teacher(pack)
            loss, part = distill_loss(logits, pack.target_ids, pack.target_weight, said, vocab_size, args)
            run.backward(loss, tokens)
            sums.update(part)
        run.engine.step()
        run.end_step(means_over_ranks(sums, tokens), measure)
    run.close("Distill-BiliComments")


def test(args: argparse.Namespace, model_path: Path) -> None:
    """Holds the best checkpoint's replies to the held-out comments against the teacher's and the real ones."""
    import torch

    from utils.evaluate.scores import as_markdown, write_comparison
    from utils.serve.generate import show_replies
    from utils.weights.run_folder import check_tag, load_trained

    folder = run_dir(args)
    record = check_tag(folder, args.ckpt_id)
    chat = load_chat(args, model_path, record["chat_template"])
    files = training_files(args)
    _, samples, _ = load_splits(args, *files, chat, show=False, columns=columns_of_files(args))
    if not samples:
        fail(f"--test_mode: nothing is held out at {shown(from_root(args.data_dir))}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_trained(folder, args.ckpt_id, record, model_path, args.trust_remote_code).to(device)
    student = show_replies(model, chat, samples, args.max_new_tokens, progress="student")
    del model
    if answers_name(args):  # The training target is the teacher's answer; the real one is in the data.
        real = {row["id"]: row["real"] for file in files if file for row in read_lines(file, {"id": str, "real": str})}
        others = [{"teacher": row["real"], "real": real[row["id"]]} for row in student]
    else:
        compare_tokenizers(chat, samples, 0, args)  # The teacher reads the student's tokens.
        model = load_teacher(args, record["settings"]["precision"], device)
        teacher = show_replies(model, chat, samples, args.max_new_tokens, progress="teacher")
        others = [{"teacher": row["reply"], "real": row["real"]} for row in teacher]
    rows = [
        {"id": row["id"], "prompt": row["prompt"], "student": row["reply"]} | other
        for row, other in zip(student, others, strict=True)
    ]
    target = folder / f"test_{args.ckpt_id}.jsonl"
    write_lines(target, rows)
    table = write_comparison(rows, ["student", "teacher"], "real", target)
    for row in rows[:SHOWN_REPLIES]:
        print(f"\n{row['prompt']}", *(f"{name + ':':8} {row[name]}" for name in table), sep="\n  ")
    beside = "the table and a picture lie beside it (.md, .png)"
    print(f"\n{as_markdown(table)}\n{len(rows)} replies: {shown(target)}; {beside}")


def main(args: argparse.Namespace) -> None:
    """Checks what was asked for, trains and tests."""
    check_and_start(args, own_problems(args), train, test)


if __name__ == "__main__":
    main(build_parser().parse_args())
