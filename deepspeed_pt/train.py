"""Continued pre-training of a causal language model on plain text, with LoRA, 4-bit QLoRA or all weights, on DeepSpeed.

What a model reads here it goes on to write: the words of a field, a style, a language, new tokens (merge_tokenizer.py).
Replay against forgetting, a learning rate that rises anew: arXiv 2403.08763; warmup, stable, decay: 2404.06395.

    bash deepspeed_pt/run.sh --data text/                                     # or run_qlora.sh, run_full.sh
    bash deepspeed_pt/run.sh --data novels.jsonl:0.7 --data general.parquet:0.3
    python deepspeed_pt/train.py --model_name Qwen/Qwen2.5-0.5B --data text/  # the same without the launcher

Reads   model/<model_name>/ and text: files with .txt (a document each), .json, .jsonl, .csv, .parquet with a field
        `text`, also with .gz, or folders of them.
Writes  deepspeed_pt/output/DS-<model_name>[-BNB|-FULL]/: the best checkpoint <ckpt_id>/, the newest <ckpt_id>-last/,
        metrics.jsonl, loss.png, samples.jsonl.

Documents are packed to --pack_tokens and never see one another. Long ones are cut into samples of --max_tokens, at the
end of a sentence where one is near. All tokens of a document are learnt, and the one that ends it; they count the same:
the loss is -sum_t log p(x_t | x_<t) over all documents of a step, divided by their tokens.

Left out on purpose: sequences that are cut without regard to documents, and fill-in-the-middle.
Shapes: L tokens in a pack, T supervised targets in a pack, V vocabulary.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import ArgumentParser, boolean, fail
from utils.files import from_root
from utils.train.arguments import adapter_problems, add_run_arguments, adopt_adapter, check_and_start
from utils.train.run import SHOWN_REPLIES, Run

PANELS = {"loss": "loss (nats a token)", "bits_per_byte": "bits a byte of held-out text"}
LORA_LR, FULL_LR = 2e-4, 2e-5
BEGINNING = 48  # Tokens of held-out text that a shown sample goes on from.


class Source(NamedTuple):
    """One --data.

    Attributes:
        path: A file or a folder.
        share: Of the tokens; None: what it has.
    """

    path: Path
    share: float | None


def build_parser() -> argparse.ArgumentParser:
    """The arguments; those that all training scripts share come from utils/train/arguments.py."""
    parser = ArgumentParser(
        description="Go on with a language model's pre-training on plain text (LoRA, QLoRA, full) with DeepSpeed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data", action="append", default=[], metavar="PATH[:SHARE]",
        help="file or folder of text, and its share of the tokens; may be given several times",
    )  # fmt: skip
    parser.add_argument("--model_name", default="Qwen/Qwen2.5-0.5B", help="model in --model_dir")
    parser.add_argument("--test_size", type=float, default=0.01, help="part of each source that is held out")
    add_run_arguments(parser, "deepspeed_pt/output", LORA_LR, FULL_LR)
    parser.add_argument(
        "--train_embeddings", type=embeddings, default="none", metavar="{False,True,new_rows}",
        help="True: train embedding and output head as a whole beside LoRA; new_rows: the rows of the tokens that "
        "merge_tokenizer.py has added, which takes far less memory",
    )  # fmt: skip
    parser.add_argument(
        "--train_only", choices=["new_rows"],
        help="train these rows and nothing else, before LoRA joins in (--adapter with this run's)",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", default="", help="folder of a LoRA adapter to go on with; what it trains, rank and dropout stay"
    )
    parser.add_argument(
        "--embedding_lr", type=float,
        help="peak learning rate of embeddings and output head, where they are trained (default: a tenth of --lr; with "
        "--train_only --lr)",
    )  # fmt: skip
    # Documents have nothing in common that would be worth computing once, and are mixed well.
    # All of a pack's tokens go through the output head.
    parser.set_defaults(share_prefix=False, epochs=1, pack_tokens=1024)
    return parser


def embeddings(text: str) -> str:
    """Reads --train_embeddings: "none", "all" or "new_rows"."""
    return text if text in ("none", "new_rows") else "all" if boolean(text) else "none"


def source_of(text: str) -> Source:
    """Takes PATH[:SHARE] apart; a path may have colons."""
    path, separator, share = text.rpartition(":")
    try:
        return Source(from_root(path), float(share)) if separator else Source(from_root(text), None)
    except ValueError:
        return Source(from_root(text), None)


def own_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with this script's own arguments."""
    sources = [source_of(text) for text in args.data]
    problems = [f"--data: no {path}." for path, _ in sources if not path.exists()]
    problems += adapter_problems(args)
    if not all(text.strip() for text in args.data):
        problems.append("--data: got an empty name, expected a file or a folder of text.")
    shares = [share for _, share in sources if share is not None]
    if not sources:
        problems.append("--data: expected a file or a folder of text, such as --data text/ or --data a.jsonl:0.7.")
    if shares and len(shares) < len(sources):
        problems.append("--data: some have a share and some have none, expected PATH:SHARE for all or for none.")
    if not all(math.isfinite(share) and share > 0 for share in shares):
        problems.append(f"--data: got shares of {shares}, expected numbers above 0.")
    if not 0 <= args.test_size < 1:
        problems.append(f"--test_size: got {args.test_size}, expected 0 or more and less than 1.")
    if args.adapter and (args.train_only or args.train_embeddings != "none"):
        problems.append("--adapter: what it has is trained on. Leave out --train_only and --train_embeddings.")
    if args.train_only and args.train_embeddings == "all":
        problems.append("--train_only new_rows: got --train_embeddings True, which trains all rows. Leave one out.")
    if "new_rows" in (args.train_embeddings, args.train_only):
        from utils.data.vocabulary import new_rows

        try:
            new_rows(from_root(args.model_dir) / args.model_name)
        except ValueError as error:
            problems.append(f"{'--train_only' if args.train_only else '--train_embeddings'} new_rows: {error}")
    if args.tuner == "full" and (args.train_only or args.train_embeddings != "none"):
        problems.append("--train_embeddings, --train_only: --tuner full trains all weights. Leave them out.")
    leaves = args.tuner == "lora" and args.train_embeddings == "none" and not args.train_only and not args.adapter
    if args.embedding_lr is not None and leaves:
        problems.append("--embedding_lr: LoRA leaves embeddings as they are. Train them: --train_embeddings True")
    if args.embedding_lr is not None and not args.embedding_lr > 0:
        problems.append(f"--embedding_lr: got {args.embedding_lr}, expected more than 0.")
    if args.test_mode:
        problems.append("--test_mode: there are no questions to answer. evaluate.py reads held-out comments.")
    return problems


def load_data(run: Run) -> tuple[list[str], Any, Any]:
    """Loads the text into the run.

    Returns:
        The sources' names; and of each held-out sample the number of its source, and the bytes that it stands for.
    """
    from utils.data.documents import load_texts, mixed
    from utils.data.records import DataError

    args, sources = run.args, [source_of(text) for text in run.args.data]
    try:
        texts = load_texts(
            [path for path, _ in sources], run.chat.tokenizer, args.max_tokens, args.test_size, run.cache,
            "reading" if run.rank == 0 else "",
        )  # fmt: skip
    except DataError as error:
        fail(str(error))
    shares = [share or 0 for _, share in sources]
    drawn = mixed(texts, [share / sum(shares) for share in shares] if any(shares) else None, args.seed)
    if not len(drawn):
        fail("--data: there is too little text: all of it would be held out. Use more, or --test_size 0.")
    held_out = to_measure(texts, args.eval_samples)
    for number, fact in enumerate(texts.facts):
        fact["drawn"] = int((texts.source[drawn] == number).sum())
        if run.rank == 0:
            print(f"{fact['name']}: {fact['documents']:,} documents, {fact['tokens']:,} tokens, "
                  f"{fact['bytes'] / max(fact['tokens'], 1):.2f} bytes a token; {fact['samples']:,} samples, "
                  f"{fact['drawn']:,} drawn to train on.")  # fmt: skip
    several = len(sources) > 1
    facts = {"files": {f"{number}/{name}" if several else name: digest for number, fact in enumerate(texts.facts)
                       for name, digest in fact.pop("files").items()}}  # fmt: skip
    facts |= {"sources": texts.facts, "train_samples": len(drawn), "test_samples": len(held_out), "system_prompt": ""}
    train_set, eval_set = texts.samples.select(drawn), texts.samples.select(held_out)
    shown = [beginning(eval_set[number]) for number in range(len(eval_set))[:SHOWN_REPLIES]]
    run.use_data(train_set, eval_set, facts, shown)
    return [fact["name"] for fact in texts.facts], texts.source[held_out], texts.bytes[held_out]


def to_measure(texts: Any, most: int) -> Any:
    """The numbers of the held-out samples to measure on: of each source its part, and one at least; -1: all."""
    import numpy as np

    held_out = texts.held_out.nonzero()[0]
    if most < 0 or most >= len(held_out):
        return held_out
    chosen = []
    for number in range(len(texts.facts)):
        own = held_out[texts.source[held_out] == number]
        count = min(max(round(most * len(own) / len(held_out)), 1), len(own)) if most else 0
        chosen.append(own[np.linspace(0, len(own) - 1, count).round().astype(int)] if count else own[:0])
    return np.concatenate(chosen)


def beginning(sample: Any) -> Any:
    """A sample of which only what follows its beginning is to be written."""
    import numpy as np

    count = min(BEGINNING, len(sample.input_ids) // 2)
    return sample._replace(supervised=np.arange(len(sample.input_ids)) >= count)


def evaluate(run: Run, names: list[str], source: Any, size: Any) -> dict[str, float]:
    """Measures held-out text, over all ranks.

    Args:
        run: The run.
        names: Of the sources.
        source: (N,) the number of each held-out sample's source.
        size: (N,) bytes that each stands for.

    Returns:
        Mean loss in nats a token; bits a byte, which models with other tokens can be compared by; and these of each
        source, if there are several.
    """
    import torch

    from utils.train.forward import supervised_logits
    from utils.train.tensors import all_reduced, sample_sums, token_logprobs

    nats, of_source = torch.zeros(len(names), dtype=torch.float64), torch.from_numpy(source)
    for pack in run.eval_packs():
        logits = supervised_logits(run.engine, pack, run.form)
        own = -sample_sums(pack.target_weight * token_logprobs(logits, pack.target_ids), pack.sample_targets)
        nats += torch.bincount(of_source[pack.sample.cpu()], own.double().cpu(), minlength=len(names))
    nats = torch.tensor([all_reduced(value) for value in nats.tolist()], dtype=torch.float64)
    sizes = torch.bincount(of_source, torch.from_numpy(size).double(), minlength=len(names))
    tokens, bits = int(run.eval_set.targets.sum()), nats / math.log(2)
    found = {"loss": float(nats.sum()) / tokens}
    if sizes.sum() > 0:
        found["bits_per_byte"] = float(bits.sum() / sizes.sum())
    for number, name in enumerate(names):
        if len(names) > 1 and sizes[number] > 0:
            found[f"bits_per_byte/{number + 1}-{name}"] = float(bits[number] / sizes[number])
    return found


def train(args: argparse.Namespace, model_path: Path) -> None:
    """Trains, and leaves checkpoints, metrics and samples of text in the run's folder."""
    run = Run(args, model_path, LORA_LR, FULL_LR)
    adapter = adopt_adapter(args, model_path)
    if args.train_only:
        args.train_embeddings = "new_rows"
    trained = args.tuner == "full" or args.train_embeddings != "none"
    if not trained and args.embedding_lr is not None:
        fail(f"--embedding_lr: {args.adapter} leaves embeddings as they are. Leave it out.")
    if trained and args.embedding_lr is None:
        args.embedding_lr = args.lr if args.train_only else args.lr / 10
    from utils.train.forward import supervised_logits
    from utils.train.tensors import all_reduced, weighted_nll

    measure = partial(evaluate, run, *load_data(run))
    run.data_facts["files"] |= adapter
    # The estimate for all methods takes it that a quarter of the tokens is learnt.
    width = 4 if run.precision == "fp32" else 2
    logits = args.pack_tokens * 3 // 4 * len(run.chat.tokenizer) * (width + 4)
    run.open(Path(__file__).with_name("ds_config.json"), PANELS, {"logits of all tokens": logits})
    if args.train_embeddings == "all" and run.rank == 0:
        from utils.train.memory import report_embeddings

        print(report_embeddings(model_path, args.trust_remote_code, run.precision))
    run.load_model(args.adapter)
    run.make_engine()
    run.resume_or_evaluate(measure)
    for step in run.steps():
        loss_sum, tokens = 0.0, run.supervised_tokens(step)
        for pack in run.packs(step):
            logits = supervised_logits(run.engine, pack, run.form)
            loss = weighted_nll(logits, pack.target_ids, pack.target_weight)
            run.backward(loss, tokens)
            loss_sum += loss.item()
        run.engine.step()
        run.end_step({"loss": all_reduced(loss_sum) / tokens}, measure)
    run.close("Pretrained")


def test(args: argparse.Namespace, model_path: Path) -> None:
    """There is none: `own_problems` says so."""


def main(args: argparse.Namespace) -> None:
    """Checks what was asked for, and trains."""
    check_and_start(args, own_problems(args), train, test)


if __name__ == "__main__":
    main(build_parser().parse_args())
