"""Renders the records of bench_render.py as LLaMA-Factory or TRL does before it trains, in an environment that has it.

    python benchmarks/render_peer.py --kind trl --model DIR --work_dir DIR --workers 2

Reads DIR/messages.jsonl and writes result.json: seconds, samples and tokens.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=["llamafactory", "trl"], required=True)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--work_dir", type=Path, required=True, help="folder with messages.jsonl")
    parser.add_argument("--workers", type=int, required=True)
    return parser


def llamafactory(args: argparse.Namespace) -> tuple[float, Any]:
    """LLaMA-Factory's get_dataset, from the file to token ids with labels."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    flags = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": args.model,
        "dataset_dir": str(args.work_dir),
        "dataset": "comments",
        "template": "chatml",
        "cutoff_len": 1024,
        "preprocessing_num_workers": args.workers,
        "overwrite_cache": True,
        "output_dir": str(args.work_dir / "cache"),
        "finetuning_type": "lora",
        "use_cpu": True,
        "bf16": False,
    }
    model_args, data_args, training_args, *_ = get_train_args(flags)
    loaded = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
    started = time.perf_counter()
    dataset = get_dataset(template, model_args, data_args, training_args, stage="sft", **loaded)["train_dataset"]
    return time.perf_counter() - started, dataset


def trl(args: argparse.Namespace) -> tuple[float, Any]:
    """What TRL's SFTTrainer makes of its data set when it is made, with a model of one small layer."""
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), num_key_value_heads=1, **small)
    settings = SFTConfig(
        output_dir=str(args.work_dir / "cache"),
        max_length=1024,
        dataset_num_proc=args.workers,
        completion_only_loss=True,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    rows = load_dataset("json", data_files=str(args.work_dir / "messages.jsonl"), split="train")
    rows = rows.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns="messages"
    )
    model = AutoModelForCausalLM.from_config(config)
    started = time.perf_counter()
    trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    return time.perf_counter() - started, trainer.train_dataset


def main(args: argparse.Namespace) -> None:
    """Renders and writes what came of it."""
    seconds, dataset = {"llamafactory": llamafactory, "trl": trl}[args.kind](args)
    tokens = sum(map(len, dataset["input_ids"]))
    result = {"seconds": seconds, "samples": len(dataset), "tokens": tokens}
    (args.work_dir / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(build_parser().parse_args())
