"""Supervised fine-tuning of a causal language model with LoRA, 4-bit QLoRA or all weights, on DeepSpeed.

LoRA: arXiv 2106.09685; QLoRA: arXiv 2305.14314; ZeRO: arXiv 1910.02054.

    bash deepspeed_ft/run.sh                                                   # or run_qlora.sh, run_full.sh
    python deepspeed_ft/train.py --model_name Qwen/Qwen2.5-0.5B --ckpt_id 24   # the same without the launcher

Reads   model/<model_name>/ and data/data_train.json, data/data_test.json (or train.*, test.* in --data_dir; .json,
        .jsonl, .csv or .parquet in any format that utils/data/records.py knows).
Writes  deepspeed_ft/output/DS-<model_name>[-BNB|-FULL]/: the best checkpoint <ckpt_id>/, the newest <ckpt_id>-last/,
        metrics.jsonl, loss.png, samples.jsonl; in test mode test_<ckpt_id>[_train].jsonl or test_base[_train].jsonl.

Left out on purpose: loss on prompts (only answers are learnt), label smoothing, mixing of data sets.
Shapes: L tokens in a pack, T supervised targets in a pack, V vocabulary.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import ArgumentParser, add_columns_argument, boolean
from utils.data.records import find_splits
from utils.data.samples import load_splits
from utils.files import explained, from_root, shown, write_lines
from utils.train.arguments import add_run_arguments, check_and_start, data_problems, quant_bits, run_dir
from utils.train.engine import choose_precision, load_base, load_chat, read_template
from utils.train.run import SHOWN_REPLIES, Run

PANELS = {"loss": "loss (nats a token)"}
LORA_LR, FULL_LR = 2e-4, 2e-5


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
    from utils.train.tensors import weighted_nll

    return weighted_nll(logits, target_ids, target_weight)


def build_parser() -> argparse.ArgumentParser:
    """The arguments; those that all training scripts share come from utils/train/arguments.py."""
    parser = ArgumentParser(
        description="Fine-tune a language model on conversations (LoRA, QLoRA, full) with DeepSpeed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data_dir", default="data", help="folder with data_train.json and data_test.json")
    add_columns_argument(parser)
    parser.add_argument("--model_name", default="Qwen/Qwen2.5-0.5B", help="model in --model_dir")
    parser.add_argument("--test_bnb_enabled", type=boolean, default=False, help="True: test on a 4-bit base")
    parser.add_argument(
        "--test_split", choices=["test", "train"], default="test",
        help="train: test mode answers the training comments, for preference pairs",
    )  # fmt: skip
    parser.add_argument(
        "--test_model", choices=["tuned", "base"], default="tuned",
        help="which model answers: the best checkpoint, or the base as it was before training",
    )  # fmt: skip
    add_run_arguments(parser, "deepspeed_ft/output", LORA_LR, FULL_LR)
    return parser


def own_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with this script's own arguments."""
    problems = []
    if args.ckpt_id == "base":
        problems.append("--ckpt_id base: test mode calls the base's replies so. Take another name.")
    if args.test_bnb_enabled and args.tuner == "full":
        problems.append("--test_bnb_enabled True needs an adapter to put on a 4-bit base: --tuner lora.")
    return problems + data_problems(args)


def evaluate(run: Run) -> dict[str, float]:
    """Mean loss of the supervised tokens of the held-out samples, over all ranks, in nats."""
    from utils.train.forward import supervised_logits
    from utils.train.tensors import all_reduced

    loss_sum = 0.0
    for pack in run.eval_packs():
        logits = supervised_logits(run.engine, pack, run.form)
        loss_sum += sft_loss(logits, pack.target_ids, pack.target_weight).item()
    return {"loss": all_reduced(loss_sum) / int(run.eval_set.targets.sum())}


def train(args: argparse.Namespace, model_path: Path) -> None:
    """Trains, and leaves checkpoints, metrics and sample replies in the run's folder."""
    run = Run(args, model_path, LORA_LR, FULL_LR)
    from utils.train.forward import supervised_logits
    from utils.train.tensors import all_reduced

    run.load_data(find_splits(from_root(args.data_dir)), columns=args.columns)
    run.open(Path(__file__).with_name("ds_config.json"), PANELS)
    run.load_model()
    run.make_engine()
    run.resume_or_evaluate(partial(evaluate, run))
    for step in run.steps():
        loss_sum, tokens = 0.0, run.supervised_tokens(step)
        for pack in run.packs(step):
            logits = supervised_logits(run.engine, pack, run.form)
            loss = sft_loss(logits, pack.target_ids, pack.target_weight)
            run.backward(loss, tokens)
            loss_sum += loss.item()
        run.engine.step()
        run.end_step({"loss": all_reduced(loss_sum) / tokens}, partial(evaluate, run))
    run.close("BiliComments")


def test(args: argparse.Namespace, model_path: Path) -> None:
    """Writes a model's replies to the held-out (or the training) comments beside the real ones."""
    import torch

    from utils.evaluate.scores import as_markdown, compare_texts
    from utils.serve.generate import show_replies
    from utils.weights.adapters import attach_adapters, read_adapter
    from utils.weights.run_folder import check_tag, load_trained

    folder, tuned = run_dir(args), args.test_model == "tuned"
    if tuned:
        record = check_tag(folder, args.ckpt_id)
        template, precision = record["chat_template"], record["settings"]["precision"]
    else:
        template, precision = read_template(args), choose_precision(args.precision)
    chat = load_chat(args, model_path, template)
    files = find_splits(from_root(args.data_dir))
    train_set, test_set, _ = load_splits(args, *files, chat, show=False, columns=args.columns)
    samples = train_set if args.test_split == "train" else test_set
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if tuned and not args.test_bnb_enabled:
        model = load_trained(folder, args.ckpt_id, record, model_path, args.trust_remote_code)
    else:
        bits = 4 if args.test_bnb_enabled else quant_bits(args)
        model = load_base(model_path, args.model_name, precision, bits, device, args.trust_remote_code)
    if tuned and args.test_bnb_enabled:
        with explained(f"{shown(folder / args.ckpt_id / 'adapter')} cannot be used"):
            model = attach_adapters(model, {"default": read_adapter(folder / args.ckpt_id / "adapter")})
    rows = show_replies(model.to(device).eval(), chat, samples, args.max_new_tokens, progress="answering")
    who = args.ckpt_id if tuned else "base"
    target = folder / f"test_{who}{'_train' if args.test_split == 'train' else ''}.jsonl"
    write_lines(target, rows)
    for row in rows[:SHOWN_REPLIES]:
        print(f"\n{row['prompt']}\n  reply: {row['reply']}\n  real:  {row['real']}")
    if rows:
        print(f"\n{as_markdown(compare_texts(rows, ['reply'], 'real'))}")
    print(f"{len(rows)} replies beside the real ones: {shown(target)}")


def main(args: argparse.Namespace) -> None:
    """Checks what was asked for, trains and tests."""
    check_and_start(args, own_problems(args), train, test)


if __name__ == "__main__":
    main(build_parser().parse_args())
