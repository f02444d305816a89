"""What continued pre-training does to a model: bits a byte of held-out Chinese and English, with and without replay.

    python benchmarks/check_pretraining.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4 \
        --chinese deepspeed_pt/data/text.jsonl --english c4.jsonl

merge_tokenizer.py learns --vocab_size Chinese tokens from --chinese; then deepspeed_pt/train.py trains LoRA and the
rows of these tokens, with each seed as many updates:

    Chinese alone    no English at all
    with replay      --replay of the tokens are English
    old vocabulary   with replay too, but the model as it was before merge_tokenizer.py: LoRA alone

Held out are the same documents in all of them, a tenth of each file. Bits a byte can be compared between vocabularies.
What is done already in --work_dir is not done again: a killed check goes on, and other settings want another folder.
Prints a markdown table and a JSON line.
"""

import argparse
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from check_data import run  # First: it makes utils/ importable.

from utils.files import from_root

NONE = 1e-6  # As a share; of what has none nothing would be measured.


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a base model, with another folder around it")
    add("--chinese", required=True, help="file or folder of text to learn")
    add("--english", required=True, help="file or folder of text not to forget")
    add("--work_dir", default="benchmarks/output/pretraining", help="for the model with new tokens, and the runs")
    add("--vocab_size", type=int, default=8000, help="new tokens")
    add("--replay", type=float, default=0.3, help="share of English")
    add("--max_steps", type=int, default=32, help="updates, of four samples each")
    add("--max_tokens", type=int, default=256, help="of a sample")
    add("--lr", type=float, default=5e-4)
    add("--embedding_lr", type=float, default=5e-5)
    add("--eval_samples", type=int, default=40, help="held-out samples")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--jobs", type=int, default=1, help="runs at a time; set OMP_NUM_THREADS so that they share the cores")
    return parser


def measure(args: argparse.Namespace, work: Path, way: str, seed: int) -> tuple[list[dict[str, Any]], float]:
    """Trains in a way with a seed.

    Returns:
        What was measured before the first update and after the last, and seconds of all updates.
    """
    place = work / f"{way}-{seed}"
    share = NONE if way == "Chinese alone" else args.replay
    model = work / "model/merged" if way != "old vocabulary" else from_root(args.model)
    flags = {"model_dir": model.parent, "model_name": model.name, "output_dir": place, "seed": seed, "test_size": 0.1}
    flags |= {"data": [f"{from_root(args.chinese)}:{1 - share}", "--data", f"{from_root(args.english)}:{share}"]}
    flags |= {"train_embeddings": False} if way == "old vocabulary" else {"train_embeddings": "new_rows"}
    flags |= {} if way == "old vocabulary" else {"embedding_lr": args.embedding_lr}
    flags |= {"batch_size": 4, "grad_accum": 1, "gradient_checkpointing": False, "max_new_tokens": 1}
    flags |= {name: getattr(args, name) for name in ("max_steps", "max_tokens", "lr", "eval_samples")}
    metrics = place / f"DS-{model.name}/metrics.jsonl"
    if not metrics.is_file() or f'"step": {args.max_steps},' not in metrics.read_text(encoding="utf-8"):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        run("deepspeed_pt/train.py", flags, place / "train.log")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [lines[0], lines[-1]], sum(line.get("train/step_sec", 0) for line in lines)


def main(args: argparse.Namespace) -> None:
    """Merges, trains, prints."""
    work = from_root(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    merged = work / "model/merged"
    if not merged.is_dir():
        flags = {"llama_tokenizer_dir": from_root(args.model), "train_on": from_root(args.chinese)}
        run("merge_tokenizer.py", flags | {"vocab_size": args.vocab_size, "save_path": merged}, work / "merge.log")
    runs = [*product(("Chinese alone", "with replay", "old vocabulary"), args.seeds)]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(runs, pool.map(lambda one: measure(args, work, *one), runs), strict=True))
    print("\n| | Chinese, bits a byte | English, bits a byte | English costs more by | seconds |")
    print("|---|---|---|---|---|")
    for way, seed in runs:
        (before, after), seconds = found[way, seed]
        keys = [key for key in after if key.startswith("eval/bits_per_byte/")]
        cells = [f"{before[key]:.4f} -> {after[key]:.4f}" for key in keys]
        cells += [f"{after[keys[1]] / before[keys[1]] - 1:+.2%}", f"{seconds:.0f}"]
        print(f"| {way}, {seed} | {' | '.join(cells)} |")
    results = {f"{way}-{seed}": found[way, seed] for way, seed in runs}
    print("\n" + json.dumps({"check": "pretraining", "results": results}, ensure_ascii=False))


if __name__ == "__main__":
    main(build_parser().parse_args())
