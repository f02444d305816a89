"""Runs one of the trainers that bench_sft.py compares with, in whichever environment has it: plain PyTorch or TRL.

    python benchmarks/sft_peer.py --trainer plain --work_dir DIR --model DIR --max_tokens 1024 --pack_tokens 2048 ...

Reads DIR/messages.jsonl, or with --trainer trl_text the plain text of DIR/text.jsonl, and writes the adapter and
result.json, {"seconds": of the training loop}, into --output_dir.
Also measures the held-out loss of an adapter: --trainer none --adapter DIR, {"held_out": nats a token}.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trainer", choices=["plain", "trl", "trl_packing", "trl_text", "none"], required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder with messages.jsonl and held_out.jsonl")
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--adapter", help="measure this adapter")
    for name in ("batch_size", "grad_accum", "max_tokens", "pack_tokens", "lora_r", "lora_alpha"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    return parser


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def lora_config(args: argparse.Namespace) -> Any:
    """LoRA on all linear layers, without dropout."""
    from peft import LoraConfig

    return LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def padded(rows: list[list[int]], prompts: list[int], pad_id: int) -> dict[str, Any]:
    """A right-padded batch with labels on the answers: what every tutorial does."""
    import torch

    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
    labels = [
        [-100] * prompt + row[prompt:] + [-100] * (longest - len(row))
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": torch.tensor(labels)}


def rendered(tokenizer: Any, records: list[dict[str, Any]]) -> list[tuple[list[int], int]]:
    """Token ids of conversations up to the stop token, and the lengths of their prompts."""
    rows = []
    for record in records:
        messages = record["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        rows.append((ids, len(tokenizer(prompt, add_special_tokens=False)["input_ids"])))
    return rows


def train_plain(args: argparse.Namespace) -> float:
    """Padded batches through transformers and PEFT; the token mean over an update. Returns seconds of the loop."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), lora_config(args))
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    rows = rendered(tokenizer, read_lines(args.work_dir / "messages.jsonl"))
    order = torch.randperm(len(rows)).tolist()
    window = args.batch_size * args.grad_accum
    started = time.perf_counter()
    for start in range(0, len(rows), window):
        samples = [rows[number] for number in order[start : start + window]]
        learnt = sum(len(ids) - prompt for ids, prompt in samples)
        for first in range(0, len(samples), args.batch_size):
            batch = padded(*map(list, zip(*samples[first : first + args.batch_size], strict=True)), 0)
            labels = batch.pop("labels")
            logits = model(**batch, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            (loss / learnt).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    model.save_pretrained(args.output_dir)
    return seconds


def train_trl(args: argparse.Namespace) -> float:
    """TRL's SFTTrainer, padded or packed, on comments or plain text. Returns seconds of the loop."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    packing, plain = args.trainer != "trl", args.trainer == "trl_text"
    if plain:
        rows = read_lines(args.work_dir / "text.jsonl")
    else:
        records = [record["messages"] for record in read_lines(args.work_dir / "messages.jsonl")]
        rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in records]
    config = SFTConfig(
        output_dir=str(args.output_dir),
        # Packed rows hold several samples: fewer of them make an update of about as many samples.
        per_device_train_batch_size=1 if packing else args.batch_size,
        gradient_accumulation_steps=4 if packing else args.grad_accum,
        packing=packing,
        packing_strategy="wrapped" if plain else "bfd",  # One behind another: the other way cuts long documents off.
        max_length=args.pack_tokens if packing else args.max_tokens,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        completion_only_loss=not plain,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = SFTTrainer(
        model=args.model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        peft_config=lora_config(args),
    )
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    return seconds


def held_out_loss(args: argparse.Namespace) -> float:
    """Mean loss of the held-out answers' tokens, in nats."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    total = learnt = 0
    with torch.no_grad():
        for ids, prompt in rendered(tokenizer, read_lines(args.work_dir / "held_out.jsonl")):
            logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum").item()
            learnt += len(ids) - prompt
    return total / learnt


def main(args: argparse.Namespace) -> None:
    """Trains or measures."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.trainer == "none":
        result = {"held_out": held_out_loss(args)}
    else:
        result = {"seconds": train_plain(args) if args.trainer == "plain" else train_trl(args)}
    (args.output_dir / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(build_parser().parse_args())
