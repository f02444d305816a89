"""Repeats a finished LoRA run with a plain PyTorch loop and compares the losses: is our training the textbook's?

    python benchmarks/check_sft.py --run deepspeed_ft/output/DS-<model> --model model/<model> --data_dir data

The loop shares only the order of the samples with ours: right-padded batches through the model's own attention mask,
labels of -100, PEFT, torch's AdamW, a learning rate worked out from its formula; no DeepSpeed, no packs. It makes the
updates of the run (LoRA dropout has to be 0, since random numbers differ) and measures the same held-out samples.

Prints a markdown table and a JSON line.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.data.chat import make_chat
from utils.data.records import find_split
from utils.data.samples import load_samples
from utils.files import from_root


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", required=True, help="folder of the finished run")
    parser.add_argument("--model", required=True, help="folder of its base model")
    parser.add_argument("--data_dir", required=True, help="folder of its data")
    parser.add_argument("--steps", type=int, help="repeat only so many steps (not given: all)")
    return parser


def padded_loss(model: Any, samples: list[Any], pad_id: int) -> Any:
    """Sum of the cross-entropies of a padded batch's supervised tokens."""
    import torch

    longest = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.full((len(samples), longest), pad_id)
    labels = torch.full_like(input_ids, -100)
    for row, sample in enumerate(samples):
        ids, learnt = torch.from_numpy(sample.input_ids).long(), torch.from_numpy(sample.supervised)
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = torch.where(learnt, ids, -100)
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    logits = model(input_ids=input_ids, attention_mask=mask).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def learning_rate(step: int, total: int, settings: dict[str, Any]) -> float:
    """Linear warm-up, then half a cosine, for the step counted from 0."""
    warmup = round(settings["warmup_ratio"] * total)
    if step < warmup:
        return settings["lr"] * step / warmup
    return settings["lr"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def main(args: argparse.Namespace) -> None:
    """Trains anew and compares."""
    run = from_root(args.run)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    settings, more = record["settings"], record["arguments"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if settings["tuner"] != "lora" or settings["quant_bits"] or settings["lora_dropout"] or settings["ranks"] > 1:
        raise SystemExit(f"{args.run}: expected a LoRA run on one rank with --lora_dropout 0.")
    if settings["lr_scheduler"] != "cosine" or settings["precision"] != "fp32":
        raise SystemExit(f"{args.run}: expected --lr_scheduler cosine and --precision fp32.")

    import torch
    from peft import LoraConfig, get_peft_model
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, set_seed

    from utils.data.tokenizer import load_tokenizer
    from utils.train.packing import draw_windows

    set_seed(settings["seed"])
    chat = make_chat(load_tokenizer(from_root(args.model), record["chat_template"]))
    train_set, test_set = (
        load_samples(find_split(from_root(args.data_dir), split), chat, settings["max_tokens"], run / "cache").samples
        for split in ("train", "test")
    )
    test_set = [*test_set][: more["eval_samples"] if more["eval_samples"] >= 0 else None]
    model = AutoModelForCausalLM.from_pretrained(from_root(args.model), dtype=torch.float32)
    lora = LoraConfig(
        r=settings["lora_r"], lora_alpha=settings["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings["lr"], weight_decay=settings["weight_decay"])
    batch_size = settings["batch_size"]
    window_samples, group_size = batch_size * settings["grad_accum"], settings["group_size"]
    plan = draw_windows(train_set.group, window_samples, group_size, more["epochs"], settings["seed"])
    total = len(plan) if more["max_steps"] < 0 else min(more["max_steps"], len(plan))
    expected = {line["step"]: line for line in metrics}
    rows, seconds = [], 0.0

    def batches(samples: list[Any]) -> list[list[Any]]:
        return [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]

    repeated = plan[: args.steps or total]
    for step, numbers in enumerate(tqdm(repeated, unit="step"), start=1):
        samples = [train_set[number] for number in numbers]
        tokens = sum(int(sample.supervised[1:].sum()) for sample in samples)
        started = time.perf_counter()
        loss_sum = 0.0
        for batch in batches(samples):
            loss = padded_loss(model, batch, chat.stop_id)
            (loss / tokens).backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step - 1, total, settings)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        row = {"step": step, "ours": expected[step]["train/loss"], "plain": loss_sum / tokens}
        if "eval/loss" in expected[step]:
            with torch.no_grad():
                held_out = sum(padded_loss(model, batch, chat.stop_id).item() for batch in batches(test_set))
            count = sum(int(sample.supervised[1:].sum()) for sample in test_set)
            row |= {"ours held out": expected[step]["eval/loss"], "plain held out": held_out / count}
            rows.append(row)
            tqdm.write(str(row))
    print(
        "| step | loss, ours | loss, plain | held out, ours | held out, plain | difference |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        ours, plain = row["ours held out"], row["plain held out"]
        losses = " | ".join(f"{loss:.4f}" for loss in (row["ours"], row["plain"], ours, plain))
        print(f"| {row['step']} | {losses} | {ours / plain - 1:+.2%} |")
    tokens = sum(len(train_set[number].input_ids) for numbers in repeated for number in numbers)
    print(json.dumps({"base": expected[0]["eval/loss"], "rows": rows, "plain_tokens_per_sec": tokens / seconds}))


if __name__ == "__main__":
    main(build_parser().parse_args())
