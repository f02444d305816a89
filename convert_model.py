"""Turns a training checkpoint and its base model into a plain model folder that transformers and vLLM load.

    python convert_model.py --zero_model deepspeed_ft/output/DS-Qwen/Qwen2.5-0.5B-BNB \
        --org_model model/Qwen/Qwen2.5-0.5B --save_model BiliComments --t 24

LoRA is merged into the base; a 4-bit run's into the dequantised base, which is what was trained. Weights of full
training are joined from their ZeRO shards. Success is proved in two links, on a few prompts of the fidelity probe:

1. The base with the adapter beside it (or the joined weights), in the precision of the run, has to say what the probe
   says that the training model said: the same numbers, or, where another device computed them in 16 bits, numbers as
   near as this precision's rounding is to exact arithmetic.
2. The written folder, loaded anew, has to say what the merged model says, both computed in fp32: the same numbers, or,
   with 16-bit weights, numbers as near as rounding the weights allows.

Reads   <zero_model>/<t>/ (any train.py's output) and <org_model>/.
Writes  output_hf/<save_model>/: safetensors, tokenizer, chat template, generation config, run.json, model card.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from utils.files import from_root, replacing, shown

# Two models are the same if no logit differs by more than MAX_ABS.
MAX_ABS = 1e-3
# Other kernels of the same precision: the KL from the probe may be NOISE times what this precision costs the rebuilt
# model against fp32 arithmetic, or MAX_KL where it costs next to nothing. SmolLM2-135M in bf16: fp32 arithmetic is
# KL 1.3e-3 to 2.7e-3 away, other kernels (eager attention, no oneDNN) 1.6e-3 to 2.9e-3; the LoRA scaled by 1.2 or 0.5,
# or half of it, 1.0e-2, 2.6e-2 and 2.8e-2, none of it 1.9e-1.
NOISE, MAX_KL = 4, 1e-3
# What rounding the merged weights may cost, KL. SmolLM2-135M: 4.1e-3 to 4.4e-3 in bf16, 1.4e-6 to 2.4e-6 in fp16, where
# its own bf16 weights are exact; fp16's step is an eighth of bf16's, and KL goes with the square.
MAX_ROUNDING = {"bf16": 2e-2, "fp16": 2e-2 / 64}
# Merging into another base than the trained one is bounded by a part of what the training changed.
MAX_PART = 0.1


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


def check_rebuilt(
    model: Any, probe: dict[str, Any], precision: str, org_model: Path, trained_on: str
) -> tuple[Any, Any, str]:
    """Link 1: holds what was rebuilt against the probe.

    Args:
        model: From `utils.trained.as_trained`; merged when this returns.
        probe: The checkpoint's.
        precision: Of the run.
        org_model: Folder of the base.
        trained_on: Name of the base in the run.

    Returns:
        The merged model in fp32, its logits, and a sentence for the model card.

    Raises:
        SystemExit: if this is not the model that was trained.
    """
    from utils.model import DTYPES
    from utils.trained import compare_logits, merge, recorded, replay

    rebuilt = replay(model, probe)
    drift = compare_logits(recorded(probe), rebuilt, DTYPES[precision])
    model = merge(model)
    logits = replay(model, probe)
    noise = compare_logits(logits, rebuilt, DTYPES[precision]).kl
    found = f"rebuilt as it was trained, computed in {precision}, against what the training run recorded: {drift}"
    if precision != "fp32":
        found += f" ({precision} itself: KL {noise:.2e} from fp32 arithmetic)"
    print(f"Link 1, {found}.")
    if not (drift.max_abs < MAX_ABS or (precision != "fp32" and drift.kl < max(NOISE * noise, MAX_KL))):
        raise SystemExit(
            "Not written: this is not the model that was trained. Was another base used? The run was trained on "
            f"{trained_on}; --org_model is {shown(org_model)}."
        )
    return model, logits, found


def check_original(model: Any, probe: dict[str, Any]) -> tuple[Any, Any, str]:
    """Link 1 of `--base original`, which is not what was trained: bounds its distance by the training's effect.

    Returns:
        As `check_rebuilt`.

    Raises:
        SystemExit: if the model is too far from the trained one.
    """
    from utils.trained import compare_logits, compare_with_probe, merge, recorded, replay

    with model.disable_adapter():
        untuned = compare_with_probe(model, probe)
    model = merge(model)
    logits = replay(model, probe)
    drift = compare_logits(recorded(probe), logits, probe["logits_0"].dtype)
    found = f"merged into the original weights, which are not those trained on, against the training run: {drift}"
    print(f"Link 1, {found}.\nThe base without training: {untuned}.")
    if not drift.kl < MAX_PART * untuned.kl:
        raise SystemExit(
            f"Not written: merged into the original weights the model is {drift.kl / untuned.kl:.0%} of the "
            f"training's effect away from what was trained, more than {MAX_PART:.0%}. Use --base dequant4"
        )
    return model, logits, found


def check_written(folder: Path, probe: dict[str, Any], logits: Any, dtype: str) -> str:
    """Link 2: loads the written folder and holds it against the merged model.

    Args:
        folder: The written one.
        probe: For its prompts.
        logits: Of the merged model.
        dtype: Of the written weights.

    Returns:
        A sentence for the model card.

    Raises:
        SystemExit: if the folder does not hold the merged model.
    """
    import torch

    from utils.model import DTYPES, load_model
    from utils.trained import compare_logits, replay

    written = replay(load_model(folder, torch.float32).eval(), probe)
    drift = compare_logits(logits, written, DTYPES[dtype])
    found = f"the written {dtype} weights, loaded anew, against the merged model, both computed in fp32: {drift}"
    print(f"Link 2, {found}.")
    if drift.max_abs < MAX_ABS or (dtype != "fp32" and drift.kl < MAX_ROUNDING[dtype]):
        return found
    if dtype == "fp32":
        raise SystemExit("Not written: the folder, loaded anew, is not the merged model. Is the disk full or damaged?")
    raise SystemExit(
        f"Not written: rounding the weights to {dtype} changes this model by KL {drift.kl:.2e}, more than "
        f"{MAX_ROUNDING[dtype]:.0e}. Use --dtype fp32"
    )


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


def model_card(args: argparse.Namespace, record: dict[str, Any], links: list[str], base_card: dict[str, Any]) -> str:
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

Fidelity to the training model, on the last places of a few prompts:

1. {links[0]};
2. {links[1]}.

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

    from huggingface_hub import ModelCard
    from safetensors.torch import load_file

    from utils.data import make_chat
    from utils.model import DTYPES, load_tokenizer
    from utils.trained import as_trained, cast

    settings = record["settings"]
    dtype = settings["precision"] if args.dtype == "auto" else args.dtype
    probe = load_file(run / args.t / "probe.safetensors")
    chat = make_chat(load_tokenizer(org_model, record["chat_template"]))
    card = ModelCard.load(org_model / "README.md").data.to_dict() if (org_model / "README.md").is_file() else {}
    print(f"Merging {shown(run)}, checkpoint {args.t} (step {record['progress']['step']}) with {shown(org_model)} ...")
    model = as_trained(run, args.t, record, org_model, args.base)
    if args.base == "original" and settings["quant_bits"]:
        model, logits, rebuilt = check_original(model, probe)
    else:
        model, logits, rebuilt = check_rebuilt(model, probe, settings["precision"], org_model, settings["model_name"])
    with replacing(target) as folder:
        write_model(cast(model, DTYPES[dtype]), org_model, record, chat.stop_id, folder)
        del model
        written = check_written(folder, probe, logits, dtype)
        (folder / "README.md").write_text(model_card(args, record, [rebuilt, written], card), encoding="utf-8")
    print(f"Written: {shown(target)} ({dtype}). Next: python chat.py --model {shown(target)}")


if __name__ == "__main__":
    main(build_parser().parse_args())
