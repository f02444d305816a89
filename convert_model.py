"""Turns a training checkpoint and its base model into a plain model folder that transformers and vLLM load.

    python convert_model.py --zero_model deepspeed_ft/output/DS-Qwen/Qwen2.5-0.5B-BNB \
        --org_model model/Qwen/Qwen2.5-0.5B --save_model BiliComments --t 24

LoRA is merged into the base; a 4-bit run's into the dequantised base, which is what was trained. Weights of full
training are joined from their ZeRO shards. Success is proved in two links, on a few prompts of the fidelity probe:

1. The base with the adapter beside it (or the joined weights), in the precision of the run, has to say what the probe
   says that the training model said: the same numbers, or, where another device computed them in 16 bits, numbers as
   near as this precision's rounding is to exact arithmetic.
2. The written folder, loaded anew, has to say what base and adapter (or the joined weights) say, both computed in
   fp32: the same numbers, or, with 16-bit weights, numbers as near as rounding the weights allows.

Tensors are read, merged and written one at a time, and models are checked layer by layer.

    python convert_model.py --save_model BiliComments --publish_dir ../BiliComments    # a git clone of its repository
    python convert_model.py --save_model BiliComments --push ORG/BiliComments          # no git

Either publishes what is in output_hf/<save_model>/ already; with the arguments above it converts first.

Reads   <zero_model>/<t>/ (any train.py's output), <zero_model>/samples.jsonl for the card, and <org_model>/.
Writes  output_hf/<save_model>/: safetensors, tokenizer, chat template, generation config, run.json, model card; with
        --gguf a GGUF file and a Modelfile.
"""

import argparse
import os
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.cli import LARGE_PAGES, ArgumentParser, add_write_arguments, boolean
from utils.files import (
    atomic_write,
    check_target,
    exclusive_lock,
    explained,
    from_root,
    missing_model,
    read_json,
    shown,
    write_problem,
)


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = ArgumentParser(
        description="Convert a training checkpoint to a plain model folder, and prove that it is the trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--zero_model", help="run folder, such as deepspeed_ft/output/DS-<model_name>")
    parser.add_argument("--org_model", help="folder of the base model, such as model/<model_name>")
    parser.add_argument("--save_model", required=True, help="name of the new model; it goes to output_hf/<save_model>")
    parser.add_argument("--t", help="checkpoint id: <ckpt_id> is the best, <ckpt_id>-last the newest")
    parser.add_argument("--base", choices=["dequant4", "original"], default="dequant4",
                        help="of a 4-bit run: merge into the 4-bit weights that were trained on, dequantised, or into "
                        "the base's own weights (not what was trained: its drift is printed)")  # fmt: skip
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                        help="of the written weights; auto: what the run computed in")  # fmt: skip
    parser.add_argument("--trust_checkpoint", type=boolean, default=False,
                        help="True: read a checkpoint whatever is in it, which may run code of whoever made it; also "
                        "one without manifest.json")  # fmt: skip
    add_write_arguments(parser)
    publishing = parser.add_argument_group("publishing, also of a model that is in output_hf/ already")
    where = publishing.add_mutually_exclusive_group()
    where.add_argument("--publish_dir", metavar="DIR",
                       help="git clone of the model's repository: lay the files out, print the commands")  # fmt: skip
    where.add_argument("--push", metavar="ORG/NAME",
                       help="upload to this repository; the token is HF_TOKEN or MODELSCOPE_API_TOKEN")  # fmt: skip
    publishing.add_argument("--hub", choices=["huggingface", "modelscope"], default="huggingface", help="of --push")
    publishing.add_argument("--public", type=boolean, default=False,
                            help="of --push; True: everybody may see a repository that is new")  # fmt: skip
    return parser


def check_arguments(args: argparse.Namespace, target: Path) -> None:
    """Checks the arguments: a conversion, a model to publish, or both.

    Raises:
        SystemExit: naming what is missing.
    """
    needed = {"--zero_model": args.zero_model, "--org_model": args.org_model, "--t": args.t}
    missing = [flag for flag, value in needed.items() if value is None]
    if 0 < len(missing) < len(needed):
        given = " and ".join(flag for flag in needed if flag not in missing)
        raise SystemExit(f"To convert, {given} needs {' and '.join(missing)} too.")
    if missing and not (args.publish_dir or args.push):
        raise SystemExit(
            "Nothing to do: to convert, name --zero_model, --org_model and --t; to publish what is converted, "
            "--publish_dir DIR or --push ORG/NAME."
        )
    if not args.push and (args.public or args.hub != "huggingface"):
        raise SystemExit("--hub and --public are of --push ORG/NAME; a git clone knows where it came from.")
    if problem := write_problem(target.parent):  # Of the lock.
        raise SystemExit(f"--save_model: {problem}")
    if missing and not all((target / file).is_file() for file in ("run.json", "config.json")):
        near = sorted({shown(path.parent) for path in target.parent.glob("*/run.json")})
        there = f" There are: {', '.join(near)}." if near else ""
        raise SystemExit(
            f"--save_model: no model at {shown(target)} (expected a folder that convert_model.py or merge_qlora.py "
            f"wrote).{there}\nConvert one with: --zero_model, --org_model and --t"
        )


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


def sample_replies(run: Path, record: dict[str, Any]) -> list[str]:
    """Picks replies for the model card from those that the run wrote at the checkpoint's step.

    Nothing that people commented is published: not the real comment, nor a comment that was to be answered, nor a
    reply that repeats the real one. Of a prompt the card shows the line with the video's title. Prompts without one
    come from the user's data, which may be private.

    Returns:
        Title and reply, four at most.
    """
    from utils.files import read_lines

    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # A card does without what is damaged.
        if read_json(run / "run.json")["settings"] != record["settings"]:
            return []  # Another run's, started in the same folder since then.
        found = {}  # In order, and once: held-out comments on one video ask for the same.
        fields = {"step": int, "prompt": str, "reply": str, "real": str}
        for line in read_lines(run / "samples.jsonl", fields):
            prompt, reply, real = line["prompt"], line["reply"].strip(), line["real"].strip()
            title = re.search(r"^视频标题：.*", prompt, re.MULTILINE)
            own_words = title and "父评论：" not in prompt and not (real and real in reply)
            if line["step"] == record["progress"]["step"] and own_words:
                found[f"{title[0]}\n{reply}"] = None
        return list(found)[:4]
    return []


def sample_section(samples: list[str]) -> str:
    """Writes sample replies so that nothing in them is taken for Markdown."""
    if not samples:
        return ""
    longest = max(len(ticks) for sample in samples for ticks in re.findall("`*", sample))
    fence = "`" * max(3, longest + 1)
    blocks = "\n\n".join(f"{fence}text\n{sample}\n{fence}" for sample in samples)
    return f"""
Replies at this step to held-out videos. The model saw the description as well, where there is one; it is left out here.

{blocks}
"""


def model_card(args: argparse.Namespace, record: dict[str, Any], links: list[str], base_card: dict[str, Any]) -> str:
    """Writes README.md: what the model is, what it was made from, and how faithful it is to the training run."""
    import yaml

    settings, data = record["settings"], record["data"]
    kind = "full" if settings["tuner"] == "full" else "QLoRA (NF4)" if settings["quant_bits"] else "LoRA"
    facts = {name: base_card[name] for name in ("license", "license_name", "license_link") if name in base_card}
    # Hubs refuse a card whose base is no ORG/NAME.
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", settings["model_name"], re.ASCII)
    head = facts | ({"base_model": settings["model_name"]} if is_id else {})
    head |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bilibili", "llm-train-playground"],
    }
    pairs = "loss" in settings  # Of preference optimisation.
    what = f"preference-optimised ({settings['loss']} loss, {kind})" if pairs else f"fine-tuned ({kind})"
    if "kd" in settings:
        what = f"distilled from {settings.get('teacher_model_name')} ({settings['kd']}, {kind})"
    counts = [number // 2 if pairs else number for number in (data["train_samples"], data["test_samples"])]
    names = "epochs batch_size grad_accum ranks lr lr_scheduler max_tokens precision".split()
    names += "beta label_smoothing simpo_gamma sft_weight".split() if pairs else []
    shown_settings = {name: settings[name] for name in names if name in settings}
    if settings["tuner"] == "lora":
        lora = ("lora_r", "lora_alpha", "lora_dropout")
        shown_settings |= {name: settings[name] for name in lora if name in settings}
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
{sample_section(sample_replies(from_root(args.zero_model), record))}"""


def convert(args: argparse.Namespace, target: Path) -> None:
    """Converts, replays the probe on what was written, and only then puts it in its place."""
    run, org_model = from_root(args.zero_model), from_root(args.org_model)
    if not (org_model / "config.json").is_file():
        raise SystemExit(f"--org_model: {missing_base(org_model)}")
    from utils.export.model_folder import check_links
    from utils.weights.run_folder import check_tag

    check_links(org_model)

    record = check_tag(run, args.t, args.trust_checkpoint)

    from huggingface_hub import ModelCard
    from jinja2 import TemplateError

    from utils.data.chat import make_chat
    from utils.data.records import DataError
    from utils.data.tokenizer import load_tokenizer
    from utils.export.model_folder import check_disk_space, write_for_llama_cpp, write_model, write_record
    from utils.weights.fidelity import check_original, check_rebuilt, check_written
    from utils.weights.loading import choose_device
    from utils.weights.run_folder import as_trained, base_in_use, read_probe

    settings, device = record["settings"], choose_device(args.device)
    public = {name: part for name, part in record.items() if name != "arguments"}  # Those hold this machine's paths.
    dtype = settings["precision"] if args.dtype == "auto" else args.dtype
    probe = read_probe(run / args.t / "probe.safetensors")
    with base_in_use(org_model, record):
        tokenizer = load_tokenizer(org_model, record["chat_template"], args.trust_remote_code)
        try:
            chat = make_chat(tokenizer)
        except (DataError, TemplateError) as error:  # The template is the run's and was good for the run's tokenizer.
            raise ValueError("it has no tokenizer, or one that does not go with the run's chat template.") from error
    with explained(f"{shown(org_model / 'README.md')} cannot be read"):
        card = ModelCard.load(org_model / "README.md").data.to_dict() if (org_model / "README.md").is_file() else {}
    print(f"Merging {shown(run)}, checkpoint {args.t} (step {record['progress']['step']}) with {shown(org_model)} ...")
    trained = as_trained(run, args.t, record, org_model, args.base, args.trust_remote_code, args.trust_checkpoint)
    with base_in_use(org_model, record):
        size, trained_size = trained.model.config.get_text_config().vocab_size, probe["logits_0"].shape[1]
        if size != trained_size:
            raise ValueError(f"its vocabulary has {size} tokens, the trained model's has {trained_size}.")
    if args.gguf:
        from utils.export.gguf_file import gguf_head

        with explained(f"--gguf {args.gguf}"):  # Before anything that takes long.
            gguf_head(trained.plain, chat, args.gguf, target.name)
    check_disk_space(trained, dtype, args.gguf, target)
    with explained("Not written"):
        if args.base == "original" and settings["quant_bits"]:
            logits, rebuilt = check_original(trained, probe, device)
        else:
            precision, name = settings["precision"], settings["model_name"]
            logits, rebuilt = check_rebuilt(trained, probe, precision, device, org_model, name)
        with atomic_write(target) as folder:
            write_model(trained, org_model, chat, dtype, args.max_shard_size, device, folder)
            written = check_written(folder, probe, logits, dtype, device, args.trust_remote_code)
            (folder / "README.md").write_text(model_card(args, record, [rebuilt, written], card), encoding="utf-8")
            if args.gguf:
                write_for_llama_cpp(folder, chat, args.gguf, target.name, record["data"]["system_prompt"])
            write_record(folder, public)
    print(f"Written: {shown(target)} ({dtype}). Next: python chat.py --model {shown(target)}")


def main(args: argparse.Namespace) -> None:
    """Converts and publishes, or one of the two. What publishing needs is looked at before the long conversion."""
    os.environ.setdefault(*LARGE_PAGES)
    from utils.export.publish import check_clone, check_upload, git_commands, lay_out, push

    name = Path(args.save_model)
    if not name.parts or name.is_absolute() or ".." in name.parts or not args.save_model.isprintable():
        raise SystemExit(f"--save_model: got {args.save_model[:300]!r}, expected a name such as BiliComments.")
    target = from_root("output_hf") / name
    if args.zero_model is not None:
        check_target("--save_model", target)
    check_arguments(args, target)
    if args.publish_dir:
        check_clone(from_root(args.publish_dir))
    if args.push:
        check_upload(args.push, args.hub)
    with exclusive_lock(target):
        if args.zero_model is not None:
            convert(args, target)
        if args.publish_dir:
            with explained(f"Not laid out in {shown(args.publish_dir)}"):
                lay_out(target, from_root(args.publish_dir))
        elif args.push:
            push(target, args.push, args.hub, args.public)
    if args.publish_dir:
        print(f"Look through README.md there. Then:\n\n{git_commands(target, from_root(args.publish_dir))}")
    elif not args.push:
        command = f"python convert_model.py --save_model {shlex.quote(args.save_model)}"
        print(f"To publish it: {command} --publish_dir CLONE, or --push ORG/NAME")


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except KeyboardInterrupt:
        raise SystemExit("\nStopped; what was not finished is not there.") from None
