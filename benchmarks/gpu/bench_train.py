"""Trains a model of a true shape on real comments within 8 GB: shared, nothing shared, and as other tools do it.

    python benchmarks/gpu/bench_train.py --model Qwen2.5-7B --bits 4
    python benchmarks/gpu/bench_train.py --model Qwen2.5-0.5B --profile

Updates of 32 comments, the same ones for all. "ours" is the loop of deepspeed_ft/train.py with its own engine,
arguments and packs. "padded" is what other tools do at best: transformers and PEFT under autocast, batches padded to
their longest sample, attention without a mask (the flash kernel), gradient checkpointing, and Liger's kernels where
they are installed; the largest batch that fits. Peak memory is that of the updates, models are loaded before.

With --profile: an update of ours under torch.profiler: the costliest kernels, and the time in which the card idles.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit import GIB, ROOT, Part, part_parser

WINDOW, GROUP, MAX_TOKENS = 32, 8, 512
WARM_UP, STEPS = 1, 3


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = part_parser(__doc__)
    parser.add_argument("--model", default="Qwen2.5-0.5B", help="a shape of random_models.py")
    parser.add_argument("--bits", type=int, choices=[4], help="4: QLoRA")
    parser.add_argument("--profile", action="store_true", help="say where the time of an update goes instead")
    return parser


class Trainer:
    """Ours: an engine around a random model, as deepspeed_ft/train.py builds it, and its update."""

    def __init__(self, part: Part, args: argparse.Namespace, share_prefix: bool, pack_tokens: int) -> None:
        from comments import load_comments
        from random_models import config_of, random_model, with_lora

        from utils.train.engine import choose_precision, make_ds_config, make_engine, start_ranks
        from utils.train.forward import choose_format, make_layout
        from utils.train.packing import plan_packs
        from utils.weights.loading import DTYPES

        self.script = load_script("deepspeed_ft/train.py")
        flags = {"lr": 1e-4, "lr_scheduler": "constant", "warmup_ratio": 0, "gradient_checkpointing": True}
        flags |= {"pack_tokens": pack_tokens, "max_tokens": MAX_TOKENS, "share_prefix": share_prefix}
        self.run_args = self.script.build_parser().parse_args([f"--{name}={value}" for name, value in flags.items()])
        start_ranks(self.run_args.seed)
        self.precision = choose_precision("auto")
        config = make_ds_config(self.run_args, ROOT / "deepspeed_ft/ds_config.json", self.precision)
        model_config = config_of(args.model, part.dry)
        model = random_model(model_config, DTYPES[self.precision], part.device, args.bits)
        model = with_lora(model, self.run_args.lora_r, self.run_args.lora_alpha, self.run_args.lora_dropout)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.engine = make_engine(model, self.run_args, config, 1000)
        self.form, self.problem = choose_format(self.engine, MAX_TOKENS, self.precision)
        self.samples = load_comments(part.dry)
        layout = make_layout(self.form, model, part.device, pack_tokens, 1, share_prefix)
        self.plan = plan_packs(self.samples, windows_of(self.samples), layout)

    def update(self, number: int) -> dict[str, float]:
        """An optimizer step."""
        from utils.train.forward import supervised_logits
        from utils.train.packing import rank_packs

        tokens = self.plan.count(self.samples, range(number, number + 1))
        packs = rank_packs(self.samples, self.plan, number, 0)
        loss_sum = 0.0
        for pack in packs:
            pack = pack.to(self.engine.device)
            logits = supervised_logits(self.engine, pack, self.form)
            loss = self.script.sft_loss(logits, pack.target_ids, pack.target_weight)
            self.engine.backward(loss / tokens["supervised"], scale_wrt_gas=False)
            loss_sum += loss.item()
        self.engine.step()
        return tokens | {"loss": loss_sum / tokens["supervised"], "packs": len(packs)}


@contextmanager
def trainer(*args: Any) -> Iterator[Trainer]:
    """A `Trainer` that leaves nothing behind on the card."""
    made = Trainer(*args)
    try:
        yield made
    finally:
        made.engine.destroy()


def load_script(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def windows_of(samples: Any) -> list[Any]:
    """The samples of every update, for all alike."""
    from utils.train.packing import draw_windows

    return [window for window in draw_windows(samples.group, WINDOW, GROUP, 4, 42) if len(window) == WINDOW]


def estimate(part: Part, args: argparse.Namespace, run_args: argparse.Namespace, precision: str) -> dict[str, float]:
    """What the project's memory line says before such a run, GiB."""
    from random_models import config_of

    from utils.train.memory import needed_bytes

    with tempfile.TemporaryDirectory() as folder:
        config_of(args.model, part.dry).save_pretrained(folder)
        needs = needed_bytes(Path(folder), run_args, args.bits, precision)
    return {name: round(size / GIB, 3) for name, size in needs.items() if name != "checkpoints"}


def timed_updates(part: Part, update: Any) -> dict[str, Any]:
    """Runs some updates, and gives speed and memory of all but the first."""
    for number in range(WARM_UP):
        update(number)
    part.synchronize()
    figures: dict[str, Any] = {}
    rows, times = [], []
    with part.peak_memory(figures):
        for number in range(WARM_UP, WARM_UP + STEPS):
            started = time.perf_counter()
            rows.append(update(number))
            part.synchronize()
            times.append(time.perf_counter() - started)
    return figures | {
        "samples_per_sec": round(STEPS * WINDOW / sum(times), 3),
        "tokens_per_sec": round(sum(row["logical"] for row in rows) / sum(times)),
        "executed_tokens_per_sec": round(sum(row["executed"] for row in rows) / sum(times)),
        "step_ms": [round(1000 * seconds, 1) for seconds in times],
        "packs": [row["packs"] for row in rows],
        "loss": round(rows[-1]["loss"], 4),
    }


def ours(part: Part, args: argparse.Namespace, pack_tokens: int, share_prefix: bool) -> dict[str, Any]:
    """Speed and memory of our loop, and what the memory line says."""
    started = time.perf_counter()
    with trainer(part, args, share_prefix, pack_tokens) as made:
        figures: dict[str, Any] = {"build_sec": round(time.perf_counter() - started, 1)}
        if made.problem:
            figures["masks"] = made.problem.strip()
        needs = estimate(part, args, made.run_args, made.precision)
        figures |= timed_updates(part, made.update)
        return figures | {"estimate_gib": round(sum(needs.values()), 3), "estimate": needs}


def padded_batch(samples: list[Any]) -> dict[str, Any]:
    """Right-padded ids and labels; under a causal mask the padding is seen by no other token."""
    import torch

    longest = max(len(sample.input_ids) for sample in samples)
    input_ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    for row, sample in enumerate(samples):
        ids, length = torch.from_numpy(sample.input_ids).long(), len(sample.input_ids)
        input_ids[row, :length] = ids
        labels[row, :length] = torch.where(torch.from_numpy(sample.supervised), ids, -100)
    return {"input_ids": input_ids, "labels": labels}


def padded(part: Part, args: argparse.Namespace, batch_size: int, liger: bool) -> dict[str, Any]:
    """Speed and memory of a loop over padded batches."""
    import torch
    from comments import load_comments
    from random_models import config_of, random_model, with_lora

    from utils.train.engine import choose_precision
    from utils.weights.loading import DTYPES

    dtype = DTYPES[choose_precision("auto")]
    model = random_model(config_of(args.model, part.dry), dtype, part.device, args.bits)
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    model = with_lora(model).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()  # As PEFT has it.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    samples = load_comments(part.dry)
    windows = windows_of(samples)

    def update(number: int) -> dict[str, float]:
        window = [samples[place] for place in windows[number]]
        targets = sum(int(sample.supervised[1:].sum()) for sample in window)
        loss_sum = 0.0
        for start in range(0, WINDOW, batch_size):
            rows = window[start : start + batch_size]
            learnt = sum(int(sample.supervised[1:].sum()) for sample in rows)
            inputs = {name: tensor.to(part.device) for name, tensor in padded_batch(rows).items()}
            with torch.autocast(part.device, dtype, enabled=dtype != torch.float32):
                loss = model(**inputs, use_cache=False).loss * learnt
            (loss / targets).backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(len(sample.input_ids) for sample in window)
        batches = -(-WINDOW // batch_size)
        return {"logical": tokens, "executed": tokens, "packs": batches, "loss": float(loss_sum) / targets}

    return timed_updates(part, update)


def profile_update(part: Part, args: argparse.Namespace, pack_tokens: int) -> dict[str, Any]:
    """Where the time of an update goes: the card's busy time against the clock's, launches, the longest kernels.

    "idle" is of an update without the profiler, whose own work would count as idling. "host_ms" is the clock's time
    without that in which the program waits for the card.
    """
    from torch.profiler import ProfilerActivity, profile

    with trainer(part, args, True, pack_tokens) as made:
        for number in range(2):
            made.update(number)
        part.synchronize()
        started = time.perf_counter()
        made.update(2)
        part.synchronize()
        step_ms = 1000 * (time.perf_counter() - started)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if part.device == "cuda" else [])
        with profile(activities=activities) as record:
            made.update(2)
            part.synchronize()
    events = record.key_averages()
    device_times = [
        (event.key, event.self_device_time_total / 1000, event.count)
        for event in events
        if event.self_device_time_total > 0 and str(event.device_type).endswith("CUDA")
    ]
    busy_ms = sum(milliseconds for _, milliseconds, _ in device_times)
    waiting = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    waiting_ms = sum(event.self_cpu_time_total for event in events if event.key in waiting) / 1000
    host = sorted(events, key=lambda event: -event.self_cpu_time_total)[:10]
    costliest = sorted(device_times, key=lambda row: -row[1])[:10]
    return {
        "step_ms": round(step_ms, 1),
        "busy_ms": round(busy_ms, 1),
        "idle": round(max(0.0, 1 - busy_ms / step_ms), 3),
        "host_ms": round(step_ms - waiting_ms, 1),
        "launches": sum(count for _, _, count in device_times),
        "kernels": [[key[:120], round(milliseconds, 2), count] for key, milliseconds, count in costliest],
        "host": [[event.key[:60], round(event.self_cpu_time_total / 1000, 2), event.count] for event in host],
    }


def first_that_fits(
    part: Part, name: str, work: Any, args: argparse.Namespace, sizes: list[dict[str, int]], **settings: Any
) -> bool:
    """Measures with the largest size that the memory allows; smaller ones are tried only after a larger one fails."""
    return any(part.measure(name, 40, work, part, args, **size, **settings) is not None for size in sizes)


def main(args: argparse.Namespace) -> None:
    """Measures and writes."""
    name = f"{'profile' if args.profile else 'train'} {args.model}{' in 4 bits' if args.bits else ''}"
    part = Part(name, args)
    packs = [{"pack_tokens": tokens} for tokens in ((256,) if part.dry else (2048, 1024, 512))]
    batches = [{"batch_size": samples} for samples in ((4,) if part.dry else (8, 4, 2, 1))]
    if args.profile:
        first_that_fits(part, "an update", profile_update, args, packs)
        return
    first_that_fits(part, "ours", ours, args, packs, share_prefix=True)
    first_that_fits(part, "ours, nothing shared", ours, args, packs, share_prefix=False)
    has_liger = part.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    if not (has_liger and first_that_fits(part, "padded", padded, args, batches, liger=True)):
        first_that_fits(part, "padded", padded, args, batches, liger=False)


if __name__ == "__main__":
    main(build_parser().parse_args())
