"""Turns a training checkpoint and its base model into a plain model folder that transformers and vLLM load.

    python convert_model.py --zero_model deepspeed_ft/output/DS-Qwen/Qwen2.5-0.5B-BNB \
        --org_model model/Qwen/Qwen2.5-0.5B --save_model BiliComments --t 24

LoRA is merged into the base; a 4-bit run's into the dequantised base, which is what was trained. Weights of full
training are joined from their ZeRO shards. Success is decided by the fidelity probe: the checkpoint holds what the
training model said to a few prompts, and the written folder, loaded anew, has to say the same.

Reads   <zero_model>/<t>/ (any train.py's output) and <org_model>/.
Writes  output_hf/<save_model>/: safetensors, tokenizer, chat template, generation config, run.json, model card.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from utils.files import from_root, replacing, shown

# A probe passes in fp32 if no logit moved by more than MAX_ABS; with 16-bit weights, whose rounding moves logits by
# more, if distributions and likeliest tokens stay. Merging into another base than the trained one is bounded by a part
# of what the training changed.
MAX_ABS, MAX_KL, MIN_TOP1, MAX_PART = 1e-3, 1e-3, 0.99, 0.1


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description="Convert a training checkpoint to a plain model folder, and prove that it is the trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--zero_model", required=True, help="run folder, such as deepspeed_ft/output/DS-<model_name>")
    parser.add_argument("--org_model", required=True, help="folder of the base model, such as model/<model_name>")
    parser.add_argument("--save_model", required=True, help="name of the new model; it goes to output_hf/<save_model>")
    parser.add_argument("--t", required=True, help="checkpoint id: <ckpt_id> is the best, <ckpt_id>-last the newest")
    parser.add_argument("--base", choices=["dequant4", "original"], default="dequant4",
                        help="of a 4-bit run: merge into the 4-bit weights that were trained on, dequantised, or into "
                        "the base's own weights (not what was trained: its drift is printed)")  # fmt: skip
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                        help="of the written weights; auto: what the run computed in")  # fmt: skip
    return parser


def passes(drift: Any, exact: bool) -> bool:
    """Whether a model is the trained one, as far as its precision can tell."""
    return drift.max_abs < MAX_ABS if exact else drift.kl < MAX_KL and drift.top1 >= MIN_TOP1


def write_model(model: Any, org_model: Path, record: dict[str, Any], stop_id: int, folder: Path) -> None:
    """Writes a model with all that is needed to use it."""
    from utils.generate import end_ids
    from utils.model import load_tokenizer

    # The run's template ends an answer with `stop_id`: who generates has to stop there, whatever the base's files say.
    generation = model.generation_config
    generation.eos_token_id = end_ids(model, stop_id)
    generation.do_sample = generation.do_sample or any((generation.temperature, generation.top_p, generation.top_k))
    model.save_pretrained(folder, max_shard_size="5GB")
    load_tokenizer(org_model, record["chat_template"]).save_pretrained(folder)
    for file in org_model.glob("*"):
        # Code that the configuration names, licences and the like; weights, tokenizer and configuration are written.
        if file.suffix == ".py" or file.name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY", "GEMMA_TERMS")):
            shutil.copy(file, folder)
    (folder / "run.json").write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors are written for their owner alone, but a server may be another user.


def model_card(args: argparse.Namespace, record: dict[str, Any], drift: Any, base_card: dict[str, Any]) -> str:
    """Writes README.md: what the model is, what it was made from, and how faithful it is to the training run."""
    import yaml

    settings, data = record["settings"], record["data"]
    kind = "full" if settings["tuner"] == "full" else "QLoRA (NF4)" if settings["quant_bits"] else "LoRA"
    facts = {name: base_card[name] for name in ("license", "license_name", "license_link") if name in base_card}
    head = facts | {
        "base_model": settings["model_name"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bilibili", "llm-train-playground"],
    }
    shown_settings = {
        name: settings[name]
        for name in ("epochs", "batch_size", "grad_accum", "ranks", "lr", "lr_scheduler", "max_tokens", "precision")
        if name in settings
    }
    if settings["tuner"] == "lora":
        shown_settings |= {name: settings[name] for name in ("lora_r", "lora_alpha", "lora_dropout")}
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown_settings.items())
    progress, files = record["progress"], ", ".join(f"{name} {digest[:12]}" for name, digest in data["files"].items())
    loss = "not measured" if progress["best_eval_loss"] is None else f"{progress['best_eval_loss']:.4f}"
    return f"""---
{yaml.safe_dump(head, allow_unicode=True, sort_keys=False)}---
# {args.save_model}

{settings["model_name"]}, fine-tuned ({kind}) with llm-train-playground.

Training samples: {data["train_samples"]}, held out: {data["test_samples"]}. Files (SHA-256): {files}.

| setting | value |
|---|---|
{rows}

Checkpoint {args.t}: step {progress["step"]}; the lowest held-out loss was {loss} at step {progress["best_step"]}.
Fidelity to the training model: {drift}.

System prompt of the training data: {data["system_prompt"] or "none"}
"""


def main(args: argparse.Namespace) -> None:
    """Converts, replays the probe on what was written, and only then puts it in its place."""
    from utils.files import missing_model

    run, org_model = from_root(args.zero_model), from_root(args.org_model)
    target = from_root("output_hf") / args.save_model
    if not (org_model / "config.json").is_file():
        raise SystemExit(f"--org_model: {missing_model(org_model.parents[1], '/'.join(org_model.parts[-2:]))}")
    if not Path(args.save_model).parts or Path(args.save_model).is_absolute() or ".." in Path(args.save_model).parts:
        raise SystemExit(f"--save_model: got {args.save_model!r}, expected a name such as BiliComments.")
    from utils.trained import check_tag

    record = check_tag(run, args.t)

    import torch
    from huggingface_hub import ModelCard
    from safetensors.torch import load_file

    from utils.data import make_chat
    from utils.model import DTYPES, load_model, load_tokenizer
    from utils.trained import compare_with_probe, rebuild

    dtype = record["settings"]["precision"] if args.dtype == "auto" else args.dtype
    exact = dtype == record["settings"]["precision"] == "fp32"
    probe = load_file(run / args.t / "probe.safetensors")
    chat = make_chat(load_tokenizer(org_model, record["chat_template"]))
    card = ModelCard.load(org_model / "README.md").data.to_dict() if (org_model / "README.md").is_file() else {}
    print(f"Merging {shown(run)}, checkpoint {args.t} (step {record['progress']['step']}) with {shown(org_model)} ...")
    model = rebuild(run, args.t, record, org_model, DTYPES[dtype], args.base)
    with replacing(target) as folder:
        write_model(model, org_model, record, chat.stop_id, folder)
        del model
        written = load_model(folder, torch.float32 if exact else DTYPES[dtype]).eval()
        drift = compare_with_probe(written, probe)
        print(f"Against the training model: {drift}.")
        if args.base == "original" and record["settings"]["quant_bits"]:
            untuned = compare_with_probe(load_model(org_model, DTYPES[dtype]).eval(), probe)
            print(f"The base without training:  {untuned}.")
            if drift.kl > MAX_PART * untuned.kl:
                raise SystemExit(
                    f"Not written: merged into the original weights the model is {drift.kl / untuned.kl:.0%} of the "
                    f"training's effect away from what was trained, more than {MAX_PART:.0%}. Use --base dequant4"
                )
        elif not passes(drift, exact):
            raise SystemExit(
                "Not written: this is not the model that was trained. Was another base used? The run was trained on "
                f"{record['settings']['model_name']}; --org_model is {shown(org_model)}."
            )
        (folder / "README.md").write_text(model_card(args, record, drift, card), encoding="utf-8")
    print(f"Written: {shown(target)} ({dtype}). Next: python chat.py --model {shown(target)}")


if __name__ == "__main__":
    main(build_parser().parse_args())
