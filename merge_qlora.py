"""Merges LoRA or QLoRA adapters into their base: a plain model folder that transformers and vLLM load.

    python merge_qlora.py --base_model model/Qwen/Qwen2.5-0.5B --qlora_model my_adapter --save_path output_hf/Merged

Adapters are folders in PEFT's format of any tool (LoRA, rsLoRA, DoRA, modules_to_save, larger vocabularies), or
checkpoints of this project, whose probe is replayed as in convert_model.py. Of an adapter that was trained on a 4-bit
base (QLoRA) exactly what was trained is the base's 4-bit weights, dequantised, and the adapter: `--base dequant4`. One
that was trained on 16-bit weights needs `--base original`. What is written is loaded anew and held against base and
adapter side by side. Without --qlora_model the base alone is written as safetensors, such as Meta's own files of Llama.

Reads   <base_model>/ (safetensors, pytorch_model.bin or Meta's consolidated.*.pth) and <qlora_model>/.
Writes  <save_path>/: safetensors, tokenizer, chat template, generation config, run.json, model card; with --gguf a GGUF
        file and a Modelfile.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from utils.cli import LARGE_PAGES, ArgumentParser, add_write_arguments
from utils.files import (
    atomic_write,
    check_manifest,
    check_target,
    exclusive_lock,
    explained,
    from_root,
    public_name,
    shown,
)

# What an adapter of another tool is tried with.
TEXTS = (
    "视频标题：《一口气看完三国》 视频简介：全程高能，建议收藏。 请你评论这个视频。",
    "楼主说得对，不过我还是想问一句：这个在哪里买的？",
    "Explain in two sentences why the sky is blue, and give one example.",
    "def fibonacci(n):\n    return n if n < 2 else",
)
PROBE_TOKENS = 256
MEANING = {"dequant4": "4-bit (NF4), dequantised", "original": "own"}


class AdapterFolder(NamedTuple):
    """Where an adapter lies.

    Attributes:
        folder: The adapter's; of a checkpoint of this project, a folder in the checkpoint's.
        record: The checkpoint's run.json; None of adapters of other tools.
        weight: What it counts.
    """

    folder: Path
    record: dict[str, Any] | None
    weight: float


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--base_model", required=True, help="folder of the base model, such as model/<model_name>")
    parser.add_argument("--qlora_model", nargs="*", default=[],
                        help="folders of adapters or checkpoints; none: write the base alone")  # fmt: skip
    parser.add_argument("--save_path", required=True, help="folder of the new model, such as output_hf/<name>")
    parser.add_argument("--weights", nargs="*", type=float, default=[],
                        help="what each of several adapters counts; not given: 1 each")  # fmt: skip
    parser.add_argument("--base", choices=["dequant4", "original"], default=None,
                        help="what the adapter is merged into: the base's 4-bit weights, dequantised, or its own "
                        "weights. Not given: what a checkpoint of this project was trained on; of other adapters "
                        "dequant4")  # fmt: skip
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                        help="of the written weights; auto: that of the base")  # fmt: skip
    add_write_arguments(parser)
    return parser


def find_adapter(path: Path, weight: float) -> AdapterFolder:
    """Finds an adapter in a folder of any tool or in a checkpoint of this project.

    Raises:
        SystemExit: if there is none, or a checkpoint that is not whole.
    """
    for folder in (path, path / "adapter"):
        if not (folder / "adapter_config.json").is_file():
            continue
        tag = folder.parent
        if not any((tag / file).is_file() for file in ("manifest.json", "run.json", "probe.safetensors")):
            return AdapterFolder(folder, None, weight)
        from utils.weights.run_folder import read_record

        check_manifest(tag)
        return AdapterFolder(folder, read_record(tag / "run.json"), weight)
    found = [file for depth in ("*", "*/*", "*/*/*") for file in path.glob(f"{depth}/adapter_config.json")]
    near = sorted({shown(file.parent) for file in found})
    there = f"There are: {', '.join(near)}." if near else "Weights of full training are joined by convert_model.py."
    raise SystemExit(f"--qlora_model: no adapter_config.json in {shown(path)}. {there}")


def check_arguments(args: argparse.Namespace, base: Path, target: Path) -> None:
    """Checks the arguments before anything is read.

    Raises:
        SystemExit: naming what is wrong.
    """
    if not any((base / file).is_file() for file in ("config.json", "params.json")):
        raise SystemExit(
            f"--base_model: no model at {shown(base)} (expected a folder with config.json, or Meta's params.json, and "
            "weights).\nFetch one with: python download_pt.py --model ORG/NAME"
        )
    if args.weights and len(args.weights) != len(args.qlora_model):
        raise SystemExit(
            f"--weights: got {len(args.weights)} for {len(args.qlora_model)} adapters, expected one for each."
        )
    if not all(math.isfinite(weight) for weight in args.weights):
        raise SystemExit(f"--weights: got {args.weights}, expected numbers.")
    if args.base == "dequant4" and not args.qlora_model:
        raise SystemExit("--base dequant4 needs an adapter: --qlora_model DIR")
    check_target("--save_path", target)


def merge_card(args: argparse.Namespace, record: dict[str, Any], links: list[str], base_card: dict[str, Any]) -> str:
    """Writes README.md: what was merged, and how faithful the result is."""
    import yaml

    facts = {name: base_card[name] for name in ("license", "license_name", "license_link") if name in base_card}
    base = Path(record["base_model"]).parts
    # Hubs refuse a card whose base is no ORG/NAME, which is what a folder is called that download_pt.py made.
    head = facts | ({"base_model": "/".join(base[1:])} if len(base) == 3 and base[0] == "model" else {})
    head |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"tags": ["merge", "llm-train-playground"]}
    merged = "\n".join(f"- {name}, weight {weight:g}" for name, weight in record["adapters"].items()) or "- nothing"
    fidelity = "\n".join(f"{number}. {link};" for number, link in enumerate(links, start=1))
    return f"""---
{yaml.safe_dump(head, allow_unicode=True, sort_keys=False)}---
# {Path(args.save_path).name}

{record["base_model"]}, its weights {record["merged_into"]}, with these adapters merged by llm-train-playground:

{merged}

Fidelity, on the last places of a few prompts:

{fidelity}
"""


def make_probe(chat: Any) -> dict[str, Any]:
    """A probe without logits: prompts for an adapter of which no training run recorded any."""
    import torch

    prompts = [chat.prompt_ids([{"role": "user", "content": text}])[:PROBE_TOKENS] for text in TEXTS]
    return {f"input_ids_{number}": torch.tensor(prompt) for number, prompt in enumerate(prompts)}


class Merge(NamedTuple):
    """What is merged.

    Attributes:
        parts: From `utils.weights.merging.assemble`.
        chat: Tokenizer and template.
        kind: "dequant4" or "original".
        precision: That training computed with, as far as it is known.
        stored_in: Of the base's weights.
    """

    parts: Any
    chat: Any
    kind: str
    precision: str
    stored_in: str


def trained_on(places: list[AdapterFolder], asked: str | None) -> str:
    """What adapters are merged into: the base's own weights ("original") or its 4-bit ones ("dequant4").

    Raises:
        SystemExit: if they were trained on different ones and the arguments do not decide.
    """
    if asked or not places:
        return asked or "original"
    known = {bool(place.record["settings"]["quant_bits"]) for place in places if place.record}
    if len(known) > 1:
        raise SystemExit("The adapters were trained on a base in 4 bits and on one in 16: --base dequant4 or original?")
    kind, other = ("original", "dequant4") if known == {False} else ("dequant4", "original")
    if not all(place.record for place in places):
        print(
            "No record of its training comes with an adapter: it is taken for one that was trained on the base's "
            f"{MEANING[kind]} weights. If that is wrong: --base {other}"
        )
    return kind


def read_parts(args: argparse.Namespace, base: Path, places: list[AdapterFolder]) -> Merge:
    """Finds all that is merged, without reading the base's weights.

    Raises:
        SystemExit: if something cannot be used, or does not go together.
    """
    from utils.data.chat import make_chat
    from utils.data.tokenizer import load_tokenizer
    from utils.weights.adapters import read_adapter
    from utils.weights.layouts import open_weights
    from utils.weights.llama_pth import load_llama_tokenizer
    from utils.weights.loading import DTYPES
    from utils.weights.merging import assemble
    from utils.weights.run_folder import base_in_use, check_base

    kind, names = trained_on(places, args.base), {dtype: name for name, dtype in DTYPES.items()}
    records = [place.record for place in places if place.record]
    for record in records:
        with base_in_use(base, record):
            check_base(base, record)
    adapters = []
    for place in places:
        with explained(f"--qlora_model: {shown(place.folder)} cannot be used"):
            adapters.append(read_adapter(place.folder, place.weight))
        if not place.record and (name := adapters[-1].config.base_model_name_or_path):
            print(f"{shown(place.folder)} says that its base is {name}.")
    with explained(f"--base_model: {shown(base)} cannot be used"):
        stored_in = next((names[one.dtype] for one in open_weights(base).values() if one.dtype in names), None)
        if stored_in is None:
            raise ValueError("its weights are not in bf16, fp16 or fp32.")
        precisions = {record["settings"]["precision"] for record in records}
        precision = precisions.pop() if len(precisions) == 1 else stored_in
        # What was trained had the run's precision; a 4-bit run's base in 16 bits is not what was trained. Where nothing
        # is known, nothing is rounded but for 4 bits.
        as_trained = recorded(places) and not records[0]["settings"]["quant_bits"]
        dtype = DTYPES[precision] if kind == "dequant4" or as_trained else None
        parts = assemble(base, dtype, 4 if kind == "dequant4" else None, adapters, args.trust_remote_code)
        if (base / "config.json").is_file():
            own = places and (places[0].folder / "tokenizer_config.json").is_file()
            template = records[0]["chat_template"] if records else ""
            tokenizer = load_tokenizer(places[0].folder if own else base, template, args.trust_remote_code)
            rows = parts.plain.config.get_text_config().vocab_size
            if own and max(tokenizer.get_vocab().values()) >= rows:
                raise ValueError(
                    f"the tokenizer in {shown(places[0].folder)} has more tokens than the model's {rows}, and the "
                    "adapter brings no larger embedding. Remove the tokenizer's files there, or save the embedding too"
                )
        else:
            tokenizer = load_llama_tokenizer(base)
        return Merge(parts, make_chat(tokenizer), kind, precision, stored_in)


def recorded(places: list[AdapterFolder]) -> bool:
    """Whether a checkpoint's probe holds the expected logits of the merged model."""
    return len(places) == 1 and places[0].record is not None and places[0].weight == 1


def expected_logits(
    found: Merge, places: list[AdapterFolder], base: Path, device: str
) -> tuple[dict[str, Any], Any, list[str]]:
    """The expected logits of the merged model.

    Returns:
        The probe, the logits of base and adapter side by side in fp32, and what the checkpoint's probe says of them.

    Raises:
        SystemExit: if the checkpoint's probe says that this is not the model that was trained.
    """
    import torch

    from utils.weights.fidelity import check_original, check_rebuilt
    from utils.weights.merging import offloaded
    from utils.weights.probe import replay
    from utils.weights.run_folder import read_probe

    if not recorded(places):
        probe = make_probe(found.chat)
        with offloaded(found.parts, torch.float32, device) as model:
            return probe, replay(model, probe, device), []
    probe, settings = read_probe(places[0].folder.parent / "probe.safetensors"), places[0].record["settings"]
    if found.kind == "original" and settings["quant_bits"]:
        logits, link = check_original(found.parts, probe, device)
    else:
        logits, link = check_rebuilt(found.parts, probe, found.precision, device, base, settings["model_name"])
    return probe, logits, [link]


def merge(args: argparse.Namespace, base: Path, target: Path) -> None:
    """Merges, holds what was written against base and adapters, and only then puts it in its place."""
    weights = args.weights or [1.0] * len(args.qlora_model)
    places = [find_adapter(from_root(path), weight) for path, weight in zip(args.qlora_model, weights, strict=True)]

    from huggingface_hub import ModelCard

    from utils.export.model_folder import check_disk_space, check_links, write_for_llama_cpp, write_model, write_record
    from utils.weights.fidelity import check_written
    from utils.weights.loading import choose_device

    check_links(base)
    for place in places:
        check_links(place.folder)
    device, found = choose_device(args.device), read_parts(args, base, places)
    dtype = found.stored_in if args.dtype == "auto" else args.dtype
    if args.gguf:
        from utils.export.gguf_file import gguf_head

        with explained(f"--gguf {args.gguf}"):  # Before anything that takes long.
            gguf_head(found.parts.plain, found.chat, args.gguf, target.name)
    check_disk_space(found.parts, dtype, args.gguf, target)
    print(f"Merging {', '.join(shown(place.folder) for place in places) or 'nothing'} into {shown(base)} ...")
    with explained("Not written"):
        card = ModelCard.load(base / "README.md").data.to_dict() if (base / "README.md").is_file() else {}
        probe, logits, links = expected_logits(found, places, base, device)
        record = next((place.record for place in places if place.record), {})
        record = {name: part for name, part in record.items() if name != "arguments"} | {
            "base_model": public_name(base),
            "adapters": {public_name(place.folder): place.weight for place in places},
            "merged_into": MEANING[found.kind],
        }
        with atomic_write(target) as folder:
            write_model(found.parts, base, found.chat, dtype, args.max_shard_size, device, folder)
            links.append(check_written(folder, probe, logits, dtype, device, args.trust_remote_code))
            (folder / "README.md").write_text(merge_card(args, record, links, card), encoding="utf-8")
            if args.gguf:
                prompt = record["data"]["system_prompt"] if "data" in record else ""
                write_for_llama_cpp(folder, found.chat, args.gguf, target.name, prompt)
            write_record(folder, record)
    print(f"Written: {shown(target)} ({dtype}). Next: python chat.py --model {shown(target)}")


def main(args: argparse.Namespace) -> None:
    """Checks the arguments, and merges."""
    os.environ.setdefault(*LARGE_PAGES)
    base, target = from_root(args.base_model), from_root(args.save_path)
    check_arguments(args, base, target)
    with exclusive_lock(target):
        merge(args, base, target)


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except KeyboardInterrupt:
        raise SystemExit("\nStopped; nothing was written.") from None
