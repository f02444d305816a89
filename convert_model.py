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

from utils.engine import boolean
from utils.files import from_root, missing_model, replacing, shown

# Two models are the same if no logit differs by more than MAX_ABS.
MAX_ABS = 1e-3
# Other kernels of the same precision: the KL from the probe may be NOISE times what this precision costs the rebuilt
# model against fp32 arithmetic, or MAX_KL where it costs next to nothing. SmolLM2-135M in bf16 (LoRA, QLoRA, full):
# fp32 arithmetic is KL 1.3e-3 to 2.4e-3 away, other kernels (eager attention, no oneDNN) 1.6e-3 to 2.3e-3; the adapter
# scaled by 1.2 is 1.0e-2 away, by 0.5 or half of it 2.6e-2 or more, none of it 1.9e-1 or more.
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
    parser.add_argument("--trust_remote_code", type=boolean, default=False,
                        help="True: run Python code that comes with the model")  # fmt: skip
    return parser


def missing_base(org_model: Path) -> str:
    """Writes what to do when --org_model names no model."""
    if len(Path(shown(org_model).lstrip("/")).parts) >= 3:  # As download_pt.py lays models out: model/<org>/<name>.
        return missing_model(org_model.parents[1], "/".join(org_model.parts[-2:]))
    near = sorted({shown(path.parent) for depth in ("*", "*/*") for path in org_model.glob(f"{depth}/config.json")})
    there = f" There are: {', '.join(near)}." if near else ""
    return (
        f"No model at {shown(org_model)} (expected a folder with config.json and weights, such as "
        f"model/Qwen/Qwen2.5-0.5B).{there}\nFetch one with: python download_pt.py --model ORG/NAME"
    )


def check_target(save_model: str, target: Path) -> None:
    """Makes sure that nothing is replaced but an earlier conversion.

    Raises:
        SystemExit: naming what is in the way.
    """
    name = Path(save_model)
    if not name.parts or name.is_absolute() or ".." in name.parts:
        raise SystemExit(f"--save_model: got {save_model!r}, expected a name such as BiliComments.")
    if not target.exists() and not target.is_symlink():
        return
    way_out = "Move it away, or give the new model another name: --save_model NAME"
    if target.is_symlink() or not all((target / file).is_file() for file in ("run.json", "config.json")):
        raise SystemExit(f"--save_model: {shown(target)} is there and is no earlier conversion. {way_out}")
    if folders := sorted(path.name for path in target.iterdir() if path.is_dir()):
        raise SystemExit(
            f"--save_model: {shown(target)} is there and holds other things than a conversion: {', '.join(folders)}. "
            f"{way_out}"
        )


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


def check_written(folder: Path, probe: dict[str, Any], logits: Any, dtype: str, trust_remote_code: bool) -> str:
    """Link 2: loads the written folder and holds it against the merged model.

    Args:
        folder: The written one.
        probe: For its prompts.
        logits: Of the merged model.
        dtype: Of the written weights.
        trust_remote_code: Whether the model's own Python code may run.

    Returns:
        A sentence for the model card.

    Raises:
        SystemExit: if the folder does not hold the merged model.
    """
    import torch

    from utils.model import DTYPES, load_model
    from utils.trained import compare_logits, replay

    model = load_model(folder, torch.float32, trust_remote_code=trust_remote_code).eval()
    written = replay(model, probe)
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


def write_model(model: Any, org_model: Path, record: dict[str, Any], chat: Any, folder: Path) -> None:
    """Writes a model with all that is needed to use it."""
    from utils.generate import end_ids

    # The run's template ends an answer with `stop_id`: who generates has to stop there, whatever the base's files say.
    generation = model.generation_config
    generation.eos_token_id = end_ids(model, chat.stop_id)
    generation.do_sample = generation.do_sample or any((generation.temperature, generation.top_p, generation.top_k))
    model.save_pretrained(folder, max_shard_size="5GB")
    chat.tokenizer.save_pretrained(folder)
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
    pairs = "loss" in settings  # Of preference optimisation.
    what = f"preference-optimised ({settings['loss']} loss, {kind})" if pairs else f"fine-tuned ({kind})"
    if "kd" in settings:
        what = f"distilled from {settings['teacher_model_name']} ({settings['kd']}, {kind})"
    counts = [number // 2 if pairs else number for number in (data["train_samples"], data["test_samples"])]
    names = "epochs batch_size grad_accum ranks lr lr_scheduler max_tokens precision".split()
    names += "beta label_smoothing simpo_gamma sft_weight".split() if pairs else []
    shown_settings = {name: settings[name] for name in names if name in settings}
    if settings["tuner"] == "lora":
        shown_settings |= {name: settings[name] for name in ("lora_r", "lora_alpha", "lora_dropout")}
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown_settings.items())
    progress, files = record["progress"], ", ".join(f"{name} {digest[:12]}" for name, digest in data["files"].items())
    loss = "not measured" if progress["best_eval_loss"] is None else f"{progress['best_eval_loss']:.4f}"
    return f"""---
{yaml.safe_dump(head, allow_unicode=True, sort_keys=False)}---
# {args.save_model}

{settings["model_name"]}, {what} with llm-train-playground.

Training {"pairs" if pairs else "samples"}: {counts[0]}, held out: {counts[1]}. Files (SHA-256): {files}.

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
    run, org_model = from_root(args.zero_model), from_root(args.org_model)
    target = from_root("output_hf") / args.save_model
    if not (org_model / "config.json").is_file():
        raise SystemExit(f"--org_model: {missing_base(org_model)}")
    check_target(args.save_model, target)
    from utils.trained import check_tag

    record = check_tag(run, args.t)

    from huggingface_hub import ModelCard
    from jinja2 import TemplateError
    from safetensors.torch import load_file

    from utils.data import DataError, make_chat
    from utils.model import DTYPES, load_tokenizer
    from utils.trained import as_trained, base_in_use, cast

    settings = record["settings"]
    dtype = settings["precision"] if args.dtype == "auto" else args.dtype
    probe = load_file(run / args.t / "probe.safetensors")
    with base_in_use(org_model, record):
        tokenizer = load_tokenizer(org_model, record["chat_template"], args.trust_remote_code)
        try:
            chat = make_chat(tokenizer)
        except (DataError, TemplateError) as error:  # The template is the run's and was good for the run's tokenizer.
            raise ValueError("it has no tokenizer, or one that does not go with the run's chat template.") from error
    card = ModelCard.load(org_model / "README.md").data.to_dict() if (org_model / "README.md").is_file() else {}
    print(f"Merging {shown(run)}, checkpoint {args.t} (step {record['progress']['step']}) with {shown(org_model)} ...")
    with base_in_use(org_model, record):
        model = as_trained(run, args.t, record, org_model, args.base, args.trust_remote_code)
        size, trained_size = model.get_output_embeddings().weight.shape[0], probe["logits_0"].shape[1]
        if size != trained_size:
            raise ValueError(f"its vocabulary has {size} tokens, the trained model's has {trained_size}.")
    if args.base == "original" and settings["quant_bits"]:
        model, logits, rebuilt = check_original(model, probe)
    else:
        model, logits, rebuilt = check_rebuilt(model, probe, settings["precision"], org_model, settings["model_name"])
    with replacing(target) as folder:
        write_model(cast(model, DTYPES[dtype]), org_model, record, chat, folder)
        del model
        written = check_written(folder, probe, logits, dtype, args.trust_remote_code)
        (folder / "README.md").write_text(model_card(args, record, [rebuilt, written], card), encoding="utf-8")
    print(f"Written: {shown(target)} ({dtype}). Next: python chat.py --model {shown(target)}")


if __name__ == "__main__":
    main(build_parser().parse_args())
