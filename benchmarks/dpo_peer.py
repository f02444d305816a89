"""Runs TRL's DPOTrainer for bench_dpo.py, in an environment that has it.

    python benchmarks/dpo_peer.py --model DIR --pairs FILE --output_dir DIR --max_tokens 1024 ...

Reads pairs of {"prompt": messages, "chosen", "rejected"} and writes result.json, {"seconds": of the training loop,
"losses": of its steps}, into --output_dir.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    for name in ("batch_size", "grad_accum", "max_tokens", "lora_r", "lora_alpha"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("lr", "beta"):
        parser.add_argument(f"--{name}", type=float, required=True)
    return parser


def main(args: argparse.Namespace) -> None:
    """Trains in the file's order."""
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        """Does not shuffle."""

        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    pairs = [json.loads(line) for line in args.pairs.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"prompt": pair["prompt"]}
        | {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
        for pair in pairs
    ]
    config = DPOConfig(
        output_dir=str(args.output_dir),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        max_length=args.max_tokens,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        beta=args.beta,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        model_init_kwargs={"dtype": "float32"},
    )
    lora = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = InOrder(model=args.model, args=config, train_dataset=Dataset.from_list(rows), peft_config=lora)
    seconds = trainer.train().metrics["train_runtime"]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "result.json").write_text(json.dumps({"seconds": seconds, "losses": losses}))


if __name__ == "__main__":
    main(build_parser().parse_args())
