"""One training run around a method: what every training script does besides its own data, models and loss.

A script makes a `Run`, goes through its parts in this order, and writes the loop itself:

    run = Run(args, model_path, LORA_LR, FULL_LR)
    run.load_data(files)
    run.open(Path(__file__).with_name("ds_config.json"), PANELS)
    run.load_model()
    run.make_engine()
    run.resume_or_evaluate(evaluate)
    for step in run.steps():
        for pack in run.packs(step):
            ...                                  # forward, the method's loss
            run.backward(loss, count)
        run.engine.step()
        run.end_step(means, evaluate)
    run.close("NAME")

`evaluate` is the script's own function without arguments that returns the means of its metrics over the held-out
samples; `Run` calls it in evaluation mode and without gradients.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.cli import fail, progress_bar
from utils.data.chat import Sample
from utils.data.samples import Parse, Samples, conversation, load_splits
from utils.data.tokenizer import pin_date, pinned_date
from utils.files import explained, from_root, read_json, shown
from utils.train.arguments import quant_bits, run_dir
from utils.train.checkpoint import load_checkpoint, make_record, open_run, save_checkpoint
from utils.train.engine import (
    build_model,
    choose_precision,
    load_chat,
    make_ds_config,
    make_engine,
    read_template,
    start_ranks,
)
from utils.train.signals import StopSignals

SHOWN_REPLIES = 4
# How samples are computed.
SAID = {
    "shared": "Packs are shared: what samples begin with is computed once.",
    "packed": "Samples are packed: several are computed in a pass, and nothing is shared.",
    "single": "Samples are computed singly.",
}

Evaluate = Callable[[], dict[str, float]]


def template_date(folder: Path, args: argparse.Namespace) -> date | None:
    """The day that chat templates write: that of the run's start, as rank 0 knows it."""
    from utils.train.tensors import all_reduced

    record = folder / (f"{args.ckpt_id}-last/run.json" if args.resume else "run.json")
    day: date | None = date.today()
    if record.is_file() and not args.overwrite:  # What is missing is told when the run's folder is opened.
        with explained(f"{shown(record)} cannot be read. Start the run anew: --overwrite"):
            day = pinned_date(read_json(record)["chat_template"])
    ordinal = day.toordinal() if day and int(os.environ.get("RANK", 0)) == 0 else 0
    ordinal = int(all_reduced(float(ordinal)))
    return date.fromordinal(ordinal) if ordinal else None


class Run:
    """The state of a training run, from its samples to its checkpoints; see this file's docstring for the order.

    Attributes:
        rank, world_size: This rank and the number of ranks.
        chat: The tokenizer's chat template.
        train_set, eval_set: Samples to train on, and held-out ones to measure on.
        data_facts: What run.json says of the data; its "files" are to be equal when the run is resumed.
        precision, quant_bits, device: What is computed in, of which base weights, and where.
        cache: Folder of what was rendered, planned or computed before.
        model: The model, with the weights to train marked by `requires_grad`.
        engine: DeepSpeed's.
        form: How the model computes packs.
        layout: How samples are laid out in packs.
        windows: The units (samples, or pairs) of every step.
    """

    def __init__(self, args: argparse.Namespace, model_path: Path, lora_lr: float, full_lr: float) -> None:
        """Joins the ranks, and resolves what was left to the device and the kind of training."""
        self.args, self.model_path = args, model_path
        self.rank, self.world_size = start_ranks(args.seed)
        from deepspeed.accelerator import get_accelerator

        self.chat = load_chat(args, model_path, read_template(args), args.thoughts)
        if day := template_date(run_dir(args), args):
            pin_date(self.chat.tokenizer, day)
        self.precision, self.device = choose_precision(args.precision), get_accelerator().current_device_name()
        self.quant_bits, self.cache = quant_bits(args), from_root(args.output_dir) / "cache"
        if args.lr is None:
            args.lr = full_lr if args.tuner == "full" else lora_lr
        args.group_size = args.group_size or (8 if args.share_prefix else 1)
        if args.gradient_checkpointing is None:
            args.gradient_checkpointing = get_accelerator().device_name() != "cpu"
        self._signals, self._replies_wait = StopSignals(says=self.rank == 0), False

    def load_data(
        self,
        files: Sequence[Path | None],
        parse: Parse = conversation,
        unit: int = 1,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        """Loads the training and the held-out samples.

        Args:
            files: Of the training records and of the held-out ones, None where a part of the former is held out.
            parse: How a record is read.
            unit: So many samples in a row belong together, as the two answers of a preference pair.
            columns: Of --columns, if the files are the user's.
        """
        loaded = load_splits(self.args, *files, self.chat, self.rank == 0, parse, columns)
        self.train_set, test_set, self.data_facts = loaded
        self._unit, asked = unit, self.args.eval_samples
        self.eval_set = test_set if asked < 0 else test_set.select(range(len(test_set))[: asked * unit])
        self._shown = list(self.eval_set.select(range(0, len(self.eval_set), unit)[:SHOWN_REPLIES]))

    def use_data(self, train_set: Samples, eval_set: Samples, facts: dict[str, Any], shown: Sequence[Sample]) -> None:
        """Takes samples that are no conversations.

        Args:
            train_set: To train on.
            eval_set: Held-out ones to measure on.
            facts: What run.json says of the data, see `data_facts`.
            shown: Of the latter, whose beginning the model goes on from as it learns.
        """
        self.train_set, self.eval_set, self.data_facts, self._shown, self._unit = train_set, eval_set, facts, shown, 1

    def open(self, ds_config: Path, panels: Mapping[str, str], more_bytes: Mapping[str, int] | None = None) -> None:
        """Opens the run's folder, and prints what the run will need and what is free.

        Args:
            ds_config: DeepSpeed's configuration, unless --deepspeed_config names one.
            panels: Of loss.png: names of metrics, and what to call them.
            more_bytes: Memory that the method needs besides the model's.
        """
        from utils.train.memory import needed_bytes, report_needs
        from utils.train.tracking import Tracker

        args = self.args
        self._ds_config, self._panels = make_ds_config(args, ds_config, self.precision), panels
        template = self.chat.tokenizer.chat_template
        self._record = make_record(args, self._ds_config, self.precision, self.world_size, template, self.data_facts)
        self.folder, self._previous = open_run(run_dir(args), args, self._record)
        self._ds_config["checkpoint"] = {"use_node_local_storage": not self.folder.shared}
        at_start = {"step": 0, "best_step": 0, "best_eval_loss": None}
        self._progress = self._previous["progress"] if self._previous else at_start
        needed = needed_bytes(self.model_path, args, self.quant_bits, self.precision) | dict(more_bytes or {})
        needs = report_needs(needed, self.folder.dir, self.world_size, self._ds_config)
        self._tracker = None
        if self.rank == 0:
            settings, done = self._record["settings"], self._progress["step"]
            self._tracker = Tracker(self.folder.dir, done, args.track, settings, panels)
            print(needs)

    def load_model(self, adapter: str = "") -> None:
        """Loads the base model with a new adapter, or with one to go on with, or makes all its weights trainable."""
        from transformers.integrations import HfDeepSpeedConfig

        from utils.weights.loading import count_parameters

        stage = self._ds_config["zero_optimization"]["stage"]
        # While this object lives, transformers shards weights as it reads them.
        self._sharding = HfDeepSpeedConfig(self._ds_config) if stage == 3 and not self.quant_bits else None
        self.model = build_model(self.args, self.model_path, self.precision, self.device, adapter)
        self._parameters = count_parameters(self.model)

    def make_engine(self, teacher: tuple[Any, str] | None = None) -> None:
        """Makes the engine, tries how it can compute packs, plans all of them, and prints what will be computed.

        Args:
            teacher: How another model computes the same packs, and a line that says why not as tries.
        """
        import numpy as np
        import torch
        from deepspeed.accelerator import get_accelerator

        from utils.train.forward import choose_format, make_layout
        from utils.train.packing import draw_windows, make_plan

        args, unit = self.args, self._unit
        window_size = args.batch_size * args.grad_accum * self.world_size
        windows = draw_windows(self.train_set.group[::unit], window_size, args.group_size, args.epochs, args.seed)
        self.windows = windows if args.max_steps < 0 else windows[: args.max_steps]
        self.engine = make_engine(self.model, args, self._ds_config, len(self.windows))
        # Until here all ranks drew the same numbers; dropout is each rank's own.
        torch.manual_seed(args.seed + self.rank)
        most = teacher[0].way if teacher else "shared"
        self.form, why_not = choose_format(self.engine, args.max_tokens, self.precision, most)
        if teacher and self.form.way == most:
            why_not = teacher[1]
        where = (self.model, get_accelerator().device_name())
        self.layout = make_layout(self.form, *where, args.pack_tokens, self.world_size, args.share_prefix, unit)
        self._plan = make_plan(self.train_set, self.windows, self.layout, self.cache)
        if self.eval_set:
            all_units = [np.arange(len(self.eval_set) // unit)]
            self._eval_plan = make_plan(self.eval_set, all_units, self.layout, self.cache)
        if self.rank == 0:
            print(self._arithmetic(window_size) + f"\n{why_not}" + self._token_counts())

    def _arithmetic(self, window_size: int) -> str:
        args, units = self.args, "samples" if self._unit == 1 else "pairs"
        trainable, total = self._parameters
        return (
            f"{len(self.train_set) // self._unit} {units} x {args.epochs} epochs = {len(self.windows)} steps of "
            f"batch_size {args.batch_size} x grad_accum {args.grad_accum} x {self.world_size} rank(s) = {window_size} "
            f"{units}. {self.precision}, ZeRO stage {self._ds_config['zero_optimization']['stage']}; {trainable:,} of "
            f"{total:,} weights are trained ({trainable / total:.2%})."
        )

    def _token_counts(self) -> str:
        tokens = self._plan.count(self.train_set, range(len(self.windows)))
        way = "shared" if self.layout.share_prefix else "packed" if self.layout.pack_tokens else "single"
        return (
            f"{SAID[way]} {tokens['logical']:,} tokens, of which {tokens['supervised']:,} are learnt; "
            f"{tokens['executed']:,} are computed, {tokens['logical'] / tokens['executed']:.2f}x fewer."
        )

    def resume_or_evaluate(self, evaluate: Evaluate) -> None:
        """Puts the engine into the state of the newest checkpoint, or measures a fresh run before its first step."""
        if self._previous:
            load_checkpoint(self.engine, self.folder)
        elif (metrics := self._measure(0, evaluate)) and self._tracker:
            self._tracker.log(0, metrics)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to go, from 1; until the last one is over, signals wait for the end of a step."""
        done, total = self._progress["step"], len(self.windows)
        bar = progress_bar(range(done + 1, total + 1), "training", "step", self.rank == 0, initial=done, total=total)
        with self._signals:
            for step in bar:
                self._metrics = {"train/lr": self.engine.get_lr()[0]}
                self._started = time.perf_counter()
                yield step

    def packs(self, step: int) -> list[Any]:
        """This rank's packs of a step, on its device."""
        from utils.train.packing import rank_packs

        return [pack.to(self.engine.device) for pack in rank_packs(self.train_set, self._plan, step - 1, self.rank)]

    def eval_packs(self) -> list[Any]:
        """This rank's packs of the held-out samples, on its device."""
        from utils.train.packing import rank_packs

        return [pack.to(self.engine.device) for pack in rank_packs(self.eval_set, self._eval_plan, 0, self.rank)]

    def supervised_tokens(self, step: int) -> int:
        """Of all ranks, in a step."""
        return self._plan.count(self.train_set, range(step - 1, step))["supervised"]

    def backward(self, loss_sum: Any, count: int) -> None:
        """Adds the gradients of a sum of losses, divided by what all ranks together will have summed in this step."""
        # DeepSpeed averages gradients over the ranks: times world_size makes it their sum.
        self.engine.backward(loss_sum * self.world_size / count, scale_wrt_gas=False)

    def end_step(self, means: Mapping[str, float], evaluate: Evaluate) -> None:
        """Logs a step that the engine has made; evaluates, saves, and ends the run, when it is time.

        Args:
            means: The method's metrics, over all ranks; "loss" is one of them.
            evaluate: As in this file's docstring.

        Raises:
            SystemExit: if the loss is no number any more, or a signal asked the run to stop.
        """
        step, args = self._progress["step"] + 1, self.args
        metrics = self._metrics | {f"train/{name}": value for name, value in means.items()}
        if (norm := self.engine.get_global_grad_norm()) is not None:  # Not known at ZeRO stage 0 without clipping.
            metrics["train/grad_norm"] = float(norm)
        seconds = time.perf_counter() - self._started
        tokens = self._plan.count(self.train_set, range(step - 1, step))
        metrics["train/step_sec"] = seconds
        metrics["train/tokens_per_sec"] = tokens["logical"] / seconds
        metrics["train/executed_tokens_per_sec"] = tokens["executed"] / seconds
        if not math.isfinite(means["loss"]):
            fail(f"The loss is {means['loss']} at step {step}. Try a smaller --lr or another --precision.")
        is_last = step == len(self.windows)
        evaluates = is_last or step % args.eval_steps == 0
        if evaluates:
            metrics |= self._measure(step, evaluate)
        if self._tracker:
            self._tracker.log(step, metrics)
        held_out, best = metrics.get("eval/loss"), self._progress["best_eval_loss"]
        is_best = evaluates and (held_out is None or best is None or held_out < best)
        self._progress |= {"step": step} | ({"best_step": step, "best_eval_loss": held_out} if is_best else {})
        stopped_by = self._signals.received_by_any_rank()
        if is_best or is_last or stopped_by or step % args.save_steps == 0:
            self._save(is_best)
        if stopped_by and not is_last:
            self._stop(stopped_by)

    def _measure(self, step: int, evaluate: Evaluate) -> dict[str, float]:
        """Held-out metrics; and a few replies are shown, because that is how over-fitting is noticed."""
        import torch

        if not self.eval_set:
            return {}
        self.engine.eval()
        with torch.no_grad():
            means = evaluate()
        if self._tracker:
            measured = ", ".join(f"{name} {means[name]:.4f}" for name in self._panels if name in means)
            tqdm.write(f"step {step}: held-out {measured}")
        # What a new adapter changes is nothing yet: the first step need not wait for the replies, which take longest.
        can_wait = step == 0 and self.args.tuner == "lora" and not getattr(self.args, "adapter", "")
        # Switching an adapter off and on would make LoRA's matrices trainable.
        can_wait = can_wait and not getattr(self.args, "train_only", None)
        if self._replies_wait:
            with self.engine.module.disable_adapter():
                self._show_replies(0)
        if not can_wait:
            self._show_replies(step)
        self._replies_wait = can_wait
        self.engine.train()
        return {f"eval/{name}": value for name, value in means.items()}

    def _show_replies(self, step: int) -> None:
        from utils.serve.generate import show_replies

        rows = show_replies(self.engine.module, self.chat, self._shown, self.args.max_new_tokens)
        if self._tracker:
            self._tracker.log_samples(step, rows)
            for row in rows:
                tqdm.write(f"    {row['reply'][:80]!r} after step {step}, in the data: {row['real'][:80]!r}")

    def _save(self, is_best: bool) -> None:
        from utils.weights.probe import PROBE_PROMPTS, probe_prompt, record_probe

        self.engine.eval()
        prompts = [probe_prompt(sample) for sample in islice(self.eval_set or self.train_set, PROBE_PROMPTS)]
        probe = record_probe(self.engine, prompts)
        self.engine.train()
        record = self._record | {"progress": self._progress}
        save_checkpoint(self.engine, self.folder, self._progress["step"], record, probe, is_best)

    def _stop(self, signal_number: int) -> None:
        if self._tracker:
            self._tracker.close()
            instead = " in the place of --overwrite" if self.args.overwrite else ""
            said = f"Stopped after step {self._progress['step']} of {len(self.windows)}, saved in "
            said += f"{shown(self.folder.last)}. Go on with the same command and --resume{instead}."
            tqdm.write(said, file=sys.stderr)  # Not behind the bar.
        self._signals.restore()
        raise SystemExit(128 + signal_number)

    def close(self, suffix: str) -> None:
        """Says what came of the run and what comes next, and takes the engine down.

        Args:
            suffix: Of the name that a converted model gets.
        """
        if self._tracker:
            self._tracker.close()
            best, ckpt_id, folder = self._progress["best_eval_loss"], self.args.ckpt_id, shown(self.folder.dir)
            print(
                f"Best: step {self._progress['best_step']}, held-out loss "
                f"{'not measured' if best is None else round(best, 4)}. In {folder}: checkpoints {ckpt_id} (best) and "
                f"{ckpt_id}-last, metrics.jsonl, loss.png, samples.jsonl.\n"
                f"Next: python convert_model.py --zero_model {folder} --org_model {shown(self.model_path)} "
                f"--save_model {self.model_path.name}-{suffix} --t {ckpt_id}"
            )
        self.engine.destroy()  # Its hooks and buffers would keep the model in memory while the test loads another.
        del self._sharding
