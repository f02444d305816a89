"""Preference optimisation of a causal language model (DPO and its kin) with LoRA, QLoRA or all weights, on DeepSpeed.

DPO: arXiv 2305.18290; with label smoothing: ericmitchell.ai/cdpo.pdf; robust: 2403.00409; IPO: 2310.12036; hinge:
2305.10425; SimPO: 2405.14734; ORPO: 2403.07691; RPO's additional term: 2404.19733.

    bash deepspeed_dpo/run.sh --adapter deepspeed_ft/output/DS-Qwen/Qwen2.5-0.5B/1/adapter
    python deepspeed_dpo/train.py --model_name Qwen/Qwen2.5-0.5B --data_path pairs.jsonl   # the same without launcher

Reads   model/<model_name>/ and preference pairs in any format that utils/data/pairs.py knows: a file, or a folder with
        data_train_pairs.* and data_test_pairs.* (or train.*, test.*).
Writes  deepspeed_dpo/output/DS-<model_name>[-BNB|-FULL]/: the best checkpoint <ckpt_id>/, the newest <ckpt_id>-last/,
        metrics.jsonl, loss.png, samples.jsonl, and test_<ckpt_id>.jsonl in test mode.

Left out on purpose: a reference that moves with the policy, and pairs that the policy writes while it learns.
Shapes: B pairs, S = 2 B answers in a pack (chosen, rejected, chosen, ...), L tokens, T supervised targets of them.
"""

import argparse
import gc
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import ArgumentParser, add_columns_argument, boolean, fail
from utils.data.pairs import pair
from utils.data.records import find_split
from utils.data.samples import load_splits
from utils.files import from_root, shown, write_lines
from utils.train.arguments import adapter_problems, add_run_arguments, adopt_adapter, check_and_start, run_dir
from utils.train.engine import load_chat
from utils.train.run import SHOWN_REPLIES, Run

LORA_LR, FULL_LR = 5e-5, 5e-7
PANELS = {"loss": "loss (mean over pairs)", "rewards/accuracy": "chosen one preferred (part of the pairs)"}
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
    """The implicit rewards of answers: beta (log pi - log ref), or beta log pi / |y| where no reference is used.

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

    from utils.train.tensors import sample_sums

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
    from utils.train.tensors import all_reduced_each

    total = all_reduced_each(dict(sums))
    tokens = total["tokens/chosen"] + total["tokens/rejected"]
    return {name: value / (tokens if name == "kl" else pairs) for name, value in total.items()}


def build_parser() -> argparse.ArgumentParser:
    """The arguments; those that all training scripts share come from utils/train/arguments.py."""
    parser = ArgumentParser(
        description="Teach a language model which of two answers is preferred (LoRA, QLoRA, full) with DeepSpeed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data_path", default="deepspeed_dpo/data", help="file of preference pairs, or their folder")
    add_columns_argument(parser, ("user", "chosen", "rejected"))
    parser.add_argument("--model_name", default="Qwen/Qwen2.5-0.5B", help="model in --model_dir")
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
    add_run_arguments(parser, "deepspeed_dpo/output", LORA_LR, FULL_LR)
    return parser


def own_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with this script's own arguments."""
    problems = adapter_problems(args)
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


def make_references(run: Run) -> list[Any]:
    """For the training and the held-out pairs: a function of packs that makes (T,) log-probabilities of each."""
    import numpy as np
    import torch

    from utils.train.reference import fingerprint, precompute_reference, reference_logps, target_begin

    args, known, eval_pairs = run.args, [None, None], np.arange(len(run.eval_set) // PAIR)
    drawn = ((run.train_set, np.unique(np.concatenate(run.windows))), (run.eval_set, eval_pairs))
    if args.loss in WITHOUT_REFERENCE:
        known = [(torch.zeros(int(samples.targets.sum())), target_begin(samples)) for samples, _ in drawn]
    elif args.precompute_reference:  # Before a checkpoint is loaded: the engine is still what it starts from.
        start = fingerprint(run.model_path, *([from_root(args.adapter)] if args.adapter else []))
        made_from = f"{start} {run.precision} {run.quant_bits}"
        how = (run.layout, run.form, made_from, run.cache)
        known = [precompute_reference(run.engine, *pairs, *how) for pairs in drawn]
    now = partial(reference_logps, run.engine, form=run.form, own_adapter=keeps_adapter(args))
    return [partial(now, known=values) for values in known]


def keeps_adapter(args: argparse.Namespace) -> bool:
    """Whether a second copy of --adapter is loaded as the reference."""
    return bool(args.adapter) and not args.precompute_reference and args.loss not in WITHOUT_REFERENCE


def answer_groups(packs: list[Any], reference: Any, form: Any) -> list[tuple[list[Any], Any, Any]]:
    """Packs whose answers the loss needs together: each by itself, or two where every sample has a pack of its own.

    With (T,) the reference's log-probabilities, and (S,) the tokens of each answer.
    """
    import torch

    size, logps, groups = PAIR if form.way == "single" else 1, reference(packs), []
    for start in range(0, len(packs), size):
        group = packs[start : start + size]
        sizes = torch.cat([pack.sample_targets for pack in group])
        groups.append((group, torch.cat(logps[start : start + size]), sizes))
    return groups


def evaluate(run: Run, reference: Any) -> dict[str, float]:
    """Means of the metrics over the held-out pairs, on all ranks."""
    from utils.train.reference import token_logps

    sums: Counter[str] = Counter()
    for packs, reference_logps, sizes in answer_groups(run.eval_packs(), reference, run.form):
        sums.update(pair_loss(token_logps(run.engine, packs, run.form), reference_logps, sizes, run.args)[1])
    return means(sums, len(run.eval_set) // PAIR)


def resolve(args: argparse.Namespace) -> None:
    """Sets the defaults that depend on the loss."""
    if args.beta is None:
        args.beta = 2.0 if args.loss == "simpo" else 0.1
    args.simpo_gamma = 1.0 if args.simpo_gamma is None else args.simpo_gamma
    if args.precompute_reference is None:
        args.precompute_reference = args.tuner == "full" and args.loss not in WITHOUT_REFERENCE


def train(args: argparse.Namespace, model_path: Path) -> None:
    """Trains, and leaves checkpoints, metrics and sample replies in the run's folder."""
    run = Run(args, model_path, LORA_LR, FULL_LR)
    from utils.train.reference import token_logps

    run.load_data(pair_files(args), pair, PAIR, args.columns)
    resolve(args)
    run.data_facts["files"] |= adopt_adapter(args, run.model_path)
    run.open(Path(__file__).with_name("ds_config.json"), PANELS)
    run.load_model(args.adapter)
    if keeps_adapter(args):
        run.model.load_adapter(from_root(args.adapter), "reference")
    run.make_engine()
    reference, eval_reference = make_references(run)
    run.resume_or_evaluate(partial(evaluate, run, eval_reference))
    for step in run.steps():
        sums, pairs = Counter(), len(run.windows[step - 1])
        for packs, reference_logps, sizes in answer_groups(run.packs(step), reference, run.form):
            loss, part = pair_loss(token_logps(run.engine, packs, run.form), reference_logps, sizes, args)
            run.backward(loss, pairs)
            sums.update(part)
        run.engine.step()
        run.end_step(means(sums, pairs), partial(evaluate, run, eval_reference))
    run.close("BiliComments-DPO")


def test(args: argparse.Namespace, model_path: Path) -> None:
    """Compares the best checkpoint with its reference on the held-out pairs, and writes the replies of both."""
    import torch

    from utils.evaluate.scores import as_markdown, compare_texts
    from utils.serve.generate import show_replies
    from utils.train.reference import answer_logps
    from utils.weights.adapters import read_adapter
    from utils.weights.loading import DTYPES
    from utils.weights.merging import assemble, materialize
    from utils.weights.run_folder import as_trained, check_tag

    folder = run_dir(args)
    record = check_tag(folder, args.ckpt_id)
    settings = record["settings"]
    chat = load_chat(args, model_path, record["chat_template"])
    _, samples, _ = load_splits(args, *pair_files(args), chat, show=False, parse=pair, columns=args.columns)
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
        model = materialize(parts, dtype).to(device)
        logps.append(answer_logps(model, samples, f"{name}: pairs"))
        chosen = list(samples.select(range(0, len(samples), PAIR)))
        replies.append(show_replies(model, chat, chosen, args.max_new_tokens, progress=f"{name}: answering"))
        del parts, model
        gc.collect()
    tokens = torch.from_numpy(samples.targets).view(-1, PAIR)
    reference, tuned = (values.view(-1, PAIR) for values in logps)
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
    write_lines(target, rows)
    for row in rows[:SHOWN_REPLIES]:
        print(f"\n{row['prompt']}\n  tuned:     {row['reply']}\n  reference: {row['reference_reply']}")
    print(f"\n{as_markdown(compare_texts(rows, ['reply', 'reference_reply'], 'chosen'))}")
    wins = sum(chosen > rejected for chosen, rejected in worth)
    margin = sum(chosen - rejected for chosen, rejected in worth) / len(worth)
    print(
        f"\nOf {len(rows)} held-out pairs the tuned model moved towards the chosen answer in {wins} "
        f"({wins / len(rows):.0%}), mean reward margin {margin:.4f}. Replies of both models: {shown(target)}"
    )


def main(args: argparse.Namespace) -> None:
    """Checks what was asked for, trains and tests."""
    check_and_start(args, own_problems(args), train, test)


if __name__ == "__main__":
    main(build_parser().parse_args())
