"""Estimates the memory and disk space of a run before weights are read, and compares them with what is free."""

import shutil
from pathlib import Path
from typing import Any

import torch

from utils.cli import GIB
from utils.data.vocabulary import new_rows
from utils.weights.loading import NF4_BYTES


def needed_bytes(path: Path, args: Any, quant_bits: int | None, precision: str) -> dict[str, int]:
    """Estimates the memory of a training run on one device, without reading weights.

    Args:
        path: The model's folder.
        args: Of the run.
        quant_bits: 4 or None.
        precision: "bf16", "fp16" or "fp32".

    Returns:
        Bytes of "weights", "gradients and optimizer" and "activations", and of the "checkpoints" on disk.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    total = sum(parameter.numel() for parameter in model.parameters())
    in_linear = sum(layer.weight.numel() for layer in linear)
    width = 4 if precision == "fp32" else 2
    trainable = total if args.tuner == "full" else sum(args.lora_r * (m.in_features + m.out_features) for m in linear)
    asked, saved = getattr(args, "train_embeddings", "none"), 0
    if args.tuner == "lora" and asked != "none":  # Beside the frozen ones.
        ends = {model.get_input_embeddings().weight, head.weight}
        saved = sum(weight.shape[1] * (len(weight) if asked == "all" else len(new_rows(path))) for weight in ends)
        trainable = saved + (0 if getattr(args, "train_only", None) else trainable)
    weights = total * width if quant_bits is None else int((total - in_linear) * width + in_linear * NF4_BYTES)
    # AdamW: two fp32 moments, and in 16-bit training fp32 master weights and fp32 gradients beside the 16-bit ones.
    training = trainable * (12 if width == 4 else 18)
    text = config.get_text_config()
    # What a layer keeps for the backward pass is about what goes in and out of its linear parts; dropout keeps copies.
    dropped = args.tuner == "lora" and args.lora_dropout > 0
    layer_floats = sum(m.in_features * (1 + dropped) + m.out_features for m in linear) // text.num_hidden_layers
    kept_floats = (
        text.hidden_size * text.num_hidden_layers + layer_floats
        if args.gradient_checkpointing
        else (layer_floats * text.num_hidden_layers)
    )
    # A quarter of the tokens of a pack is supervised, or less, where prompts are shared a half; the softmax takes the
    # logits in fp32 once more. The mask is boolean, and in the attention a number for every pair of tokens.
    logits = args.pack_tokens // (2 if args.share_prefix else 4) * text.vocab_size * (width + 4)
    mask = args.pack_tokens**2 * (1 + width)
    return {
        "weights": weights + saved * width,
        "gradients and optimizer": training,
        "activations": args.pack_tokens * kept_floats * width + logits + mask,
        "checkpoints": 2 * trainable * (12 + width),
    }


def report_embeddings(path: Path, trust_remote_code: bool, precision: str) -> str:
    """A line on what it costs to train embedding and output head as a whole beside LoRA, and what new rows alone would.

    Args:
        path: The model's folder.
        trust_remote_code: Whether code in it may be run.
        precision: "bf16", "fp16" or "fp32".
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    # As in `needed_bytes`, and the copy beside the frozen table.
    row = text.hidden_size * (1 if config.tie_word_embeddings else 2) * (16 if precision == "fp32" else 20)
    line = f"Of it ~{row * text.vocab_size / GIB:.2f} GiB for embedding and output head"
    try:
        rows = len(new_rows(path))
    except ValueError:
        return f"{line}."
    return f"{line}; the {rows:,} new tokens' rows alone: ~{row * rows / GIB:.2f} GiB (--train_embeddings new_rows)."


def report_needs(needs: dict[str, int], output_dir: Path, ranks: int, ds_config: dict[str, Any]) -> str:
    """A line on what a run will need and what is free; estimates carry a tilde.

    Args:
        needs: From `needed_bytes`.
        output_dir: Where the checkpoints go.
        ranks: Number of ranks.
        ds_config: From `utils.train.engine.make_ds_config`.

    Raises:
        SystemExit: if the disk has not the room for the checkpoints.
    """
    import psutil
    from deepspeed.accelerator import get_accelerator

    zero, on_card, on_host = ds_config["zero_optimization"], dict(needs), {}
    del on_card["checkpoints"]
    if zero["stage"] >= 1:
        on_card["gradients and optimizer"] //= ranks
    if zero["stage"] == 3:
        on_card["weights"] //= ranks
    if get_accelerator().device_name() != "cpu":
        offloaded = {"gradients and optimizer": "offload_optimizer", "weights": "offload_param"}
        on_host = {name: on_card.pop(name) for name, key in offloaded.items() if key in zero}
    host = f"{psutil.virtual_memory().available / GIB:.1f} GiB of host memory"
    there = f"there are {host}"
    if get_accelerator().device_name() != "cpu":
        there = f"there are {get_accelerator().available_memory() / GIB:.1f} GiB free on the card and {host}"
    disk = shutil.disk_usage(output_dir).free
    if disk < needs["checkpoints"]:
        raise SystemExit(
            f"The checkpoints need about {needs['checkpoints'] / GIB:.1f} GiB, {output_dir} has {disk / GIB:.1f} GiB "
            "free. Make room or name another place: --output_dir DIR"
        )

    def sizes(parts: dict[str, int]) -> str:
        detail = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return f"~{sum(parts.values()) / GIB:.2f} GiB ({detail})"

    host_part = f" and on the host {sizes(on_host)}" if on_host else ""
    return (
        f"Memory of a rank: {sizes(on_card)}{host_part}; {there}. "
        f"Disk: ~{needs['checkpoints'] / GIB:.2f} GiB of {disk / GIB:.0f} GiB free."
    )
