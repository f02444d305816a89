"""Runs the project's own scripts on the card: train, resume, convert with the probe, answer; DPO and distillation.

    python benchmarks/gpu/check_stages.py                      # LoRA and QLoRA: 10 steps, conversion, replies, resuming
    python benchmarks/gpu/check_stages.py --stages preferences # DPO and distillation, 3 steps each

The model is a random one of Qwen2.5-0.5B's widths with 8 of its 24 layers, its tokenizer is trained on the examples.
Resuming is 5 steps, a new engine and 5 more, held against 10 steps at one go: on a card sums may come in another
order, so the distance is measured, where on a CPU it is zero.
"""

import argparse
import contextlib
import io
import json
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_train import load_script
from kit import ROOT, Part, part_parser, relative_error

SHAPE, LAYERS = "Qwen2.5-0.5B", 8
NAME, TEACHER = "random/student", "random/teacher"


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = part_parser(__doc__)
    parser.add_argument("--stages", choices=["training", "preferences"], default="training", help="which scripts")
    return parser


class Stages:
    """A folder with models and data, and the scripts that work in it."""

    def __init__(self, part: Part, folder: Path) -> None:
        self.part, self.folder = part, folder

    def make_inputs(self) -> dict[str, Any]:
        """Writes a student, a teacher of two more layers, comments and preference pairs."""
        import torch
        from conftest import make_records, make_tokenizer
        from random_models import config_of, random_model

        tokenizer = make_tokenizer(2000)
        vocabulary = {"vocab_size": len(tokenizer)} if self.part.dry else {}
        for name, layers in ((NAME, LAYERS), (TEACHER, LAYERS + 2)):
            layers = layers // 4 if self.part.dry else layers
            config = config_of(SHAPE, self.part.dry, num_hidden_layers=layers, **vocabulary)
            model = random_model(config, torch.bfloat16, self.part.device, std=0.05)
            model.save_pretrained(self.folder / "model" / name)
            tokenizer.save_pretrained(self.folder / "model" / name)
        (self.folder / "data").mkdir()
        pairs = [
            {"prompt": f"视频标题：第{n % 9}个视频", "chosen": f"好看{n}，支持", "rejected": f"不好看{n}"}
            for n in range(40)
        ]
        for split, videos, first, some in (("train", 24, 0, pairs[:32]), ("test", 2, 24, pairs[32:])):
            records = json.dumps(make_records(videos, first), ensure_ascii=False)
            (self.folder / f"data/data_{split}.json").write_text(records, encoding="utf-8")
            lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in some)
            (self.folder / f"data/data_{split}_pairs.jsonl").write_text(lines, encoding="utf-8")
        return {}

    def run(self, path: str, output: str, steps: int, **flags: Any) -> dict[str, Any]:
        """Runs a training script in this process; the losses and seconds of its steps."""
        script = load_script(path)
        given = {
            "model_dir": self.folder / "model",
            "output_dir": self.folder / output,
            "max_steps": steps,
            "epochs": 4,
            "batch_size": 4,
            "grad_accum": 2,
            "max_tokens": 256,
            "pack_tokens": 512,
            "eval_steps": steps,
            "eval_samples": 8,
            "max_new_tokens": 8,
            "lr": 1e-3,
            "lr_scheduler": "constant",
            "warmup_ratio": 0,
        } | flags
        script.main(script.build_parser().parse_args([f"--{name}={value}" for name, value in given.items()]))
        (metrics,) = (self.folder / output).rglob("metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if "train/loss" in row]
        return {
            "losses": [round(row["train/loss"], 5) for row in rows],
            "step_ms": [round(1000 * row["train/step_sec"], 1) for row in rows],
        }

    def fine_tune(self, output: str, steps: int, **flags: Any) -> dict[str, Any]:
        """Runs deepspeed_ft/train.py."""
        return self.run("deepspeed_ft/train.py", output, steps, model_name=NAME, data_dir=self.folder / "data", **flags)

    def resumed(self) -> dict[str, Any]:
        """Trains 5 steps, resumes for 5 more, and holds the adapter against that of the first run."""
        from conftest import adapter

        self.fine_tune("halves", 5)
        figures = self.fine_tune("halves", 10, resume=True)
        one, two = adapter(self.folder / "lora"), adapter(self.folder / "halves")
        distance = relative_error([one[name] for name in sorted(one)], [two[name] for name in sorted(two)])
        return figures | {"distance": distance, "equal": all(bool((one[name] == two[name]).all()) for name in one)}

    def converted(self, output: str) -> dict[str, Any]:
        """Converts a run; what the two links say."""
        import utils.files

        script = load_script("convert_model.py")
        (record,) = (self.folder / output).glob("*/*/1/run.json")
        flags = {
            "zero_model": record.parents[1],
            "org_model": self.folder / "model" / NAME,
            "save_model": output,
            "t": "1",
        }
        printed = io.StringIO()
        utils.files.ROOT = self.folder  # output_hf/ is made there.
        try:
            with contextlib.redirect_stdout(printed):
                script.main(script.build_parser().parse_args([f"--{name}={value}" for name, value in flags.items()]))
        finally:
            utils.files.ROOT = ROOT
            print(printed.getvalue())
        return {"links": re.findall(r"^(Link .*)", printed.getvalue(), re.MULTILINE)}

    def replies(self, output: str) -> dict[str, Any]:
        """Loads a converted model and lets it answer eight prompts at once."""
        from utils.serve.generate import load_for_inference, replies

        model, chat = load_for_inference(self.folder / "output_hf" / output)
        ids = chat.prompt_ids([{"role": "user", "content": "视频标题：第1个视频"}])
        started = time.perf_counter()
        texts = replies(model, chat, [ids] * 8, 32)
        seconds = round(time.perf_counter() - started, 2)
        return {"device": str(model.device), "dtype": str(model.dtype), "reply": texts[0][:40], "generate_sec": seconds}


def main(args: argparse.Namespace) -> None:
    """Runs the stages and writes what came out."""
    part = Part("stages" if args.stages == "training" else "preferences", args)
    folder = Path(tempfile.mkdtemp(prefix="gpu-kit-"))
    stages = Stages(part, folder)
    try:
        if part.measure("inputs", 30, stages.make_inputs) is None:
            return
        if args.stages == "training":
            part.measure("LoRA, 10 steps", 40, stages.fine_tune, "lora", 10)
            part.measure("LoRA, converted", 40, stages.converted, "lora")
            part.measure("LoRA, replies", 20, stages.replies, "lora")
            part.measure("LoRA, 5 steps and 5 resumed", 40, stages.resumed)
            part.measure("QLoRA, 10 steps", 40, stages.fine_tune, "qlora", 10, train_bnb_enabled=True)
            part.measure("QLoRA, converted", 40, stages.converted, "qlora")
        else:
            data = {"data_path": folder / "data", "model_name": NAME}
            part.measure("DPO, 3 steps", 40, stages.run, "deepspeed_dpo/train.py", "dpo", 3, **data)
            data = {"data_dir": folder / "data", "student_model_name": NAME, "teacher_model_name": TEACHER}
            kd = {"kd": "logits"} | data
            part.measure("distillation, 3 steps", 40, stages.run, "deepspeed_distill/train.py", "kd", 3, **kd)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(build_parser().parse_args())
