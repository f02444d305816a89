"""Models as they are trained: tokenizer, base weights in 32, 16 or 4 bits, LoRA, attention windows, memory needs."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from utils.data import PLAIN_TEMPLATE

GIB = 1024**3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# NF4 with double quantisation: 4 bits a weight and 0.127 bits a weight of scales (QLoRA, arXiv 2305.14314, section 3).
NF4_BYTES = 4.127 / 8

# On CPUs with AVX512-BF16 bitsandbytes asks at its import for a package of kernels that `load_model` has no use for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_tokenizer(path: Path, chat_template: str = "", trust_remote_code: bool = False) -> Any:
    """Loads a tokenizer that has a chat template.

    Args:
        path: The model's folder.
        chat_template: A Jinja template to use instead of the tokenizer's own.
        trust_remote_code: Whether the model's own Python code may run.

    Returns:
        A tokenizer; with the plain template where there is no other.

    Raises:
        ValueError: if the folder has a tokenizer's settings but not its vocabulary; transformers would go on without.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not tokenizer.encode("a", add_special_tokens=False):
        raise ValueError("the tokenizer has no vocabulary (is tokenizer.json missing?)")
    tokenizer.chat_template = chat_template or tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer


def load_model(
    path: Path, dtype: torch.dtype, quant_bits: int | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> torch.nn.Module:
    """Loads a causal language model for training or merging.

    Args:
        path: The model's folder.
        dtype: Of the weights; with `quant_bits`, of the arithmetic and of what is not quantised.
        quant_bits: 4 for NF4 with double quantisation (arXiv 2305.14314), None for none.
        device: Where quantised weights go; other weights stay on the CPU (or are sharded as they are read, if a
            `HfDeepSpeedConfig` of ZeRO stage 3 is alive) until DeepSpeed moves them.
        trust_remote_code: Whether the model's own Python code may run.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if quant_bits == 4:
        options["quantization_config"] = nf4_config(dtype)
        options["device_map"] = {"": device}
    # Attention is SDPA where the model's code has it: transformers' own choice.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    keep_packing(model)
    return model


def nf4_config(dtype: torch.dtype) -> Any:
    """4-bit NormalFloat weights with double quantisation (arXiv 2305.14314); arithmetic in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_packing(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights in place at the first evaluation, as it does on some CPUs.

    ZeRO stage 3 brings the old ones back, which are then read wrongly; and other kernels give other numbers than
    training saw.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def add_lora(model: torch.nn.Module, r: int, alpha: int, dropout: float, target: str) -> torch.nn.Module:
    """Freezes a model and puts trainable low-rank matrices beside its linear layers (LoRA, arXiv 2106.09685).

    Args:
        model: The base model.
        r: Rank.
        alpha: The update is scaled by alpha / r.
        dropout: On the input of the low-rank matrices.
        target: "all-linear" (all but the output head) or names of layers separated by commas.
    """
    from peft import LoraConfig, get_peft_model

    targets = target if target == "all-linear" else [name.strip() for name in target.split(",")]
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def scale_early(model: torch.nn.Module) -> None:
    """Lets LoRA layers scale what comes out of A, of r numbers a token, not what comes out of B, as wide as the layer.

    The same function and gradients, with fewer passes over memory both ways. Variants as DoRA, and B with a bias,
    are left alone. The adapter can no longer be merged in this model; that is done in one that is loaded anew.
    """
    from peft.tuners.lora.layer import LoraLayer, LoraVariant

    class ScaledEarly(LoraVariant):
        @staticmethod
        def forward(
            module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **options: Any
        ) -> torch.Tensor:
            low = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
            return result + module.lora_B[active_adapter](low * module.scaling[active_adapter])

        @staticmethod
        def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
            raise NotImplementedError("Merge the adapter in a model that is loaded anew.")  # PEFT's would do nothing.

    for module in model.modules():
        if isinstance(module, LoraLayer):
            plain = [name for name in module.lora_A if name not in module.lora_variant and not module.lora_bias[name]]
            module.lora_variant |= dict.fromkeys(plain, ScaledEarly())


def choose_device(asked: str) -> str:
    """Where to compute: what was asked for, or with "auto" a card if there is one.

    Raises:
        SystemExit: if there is no card.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no card that PyTorch can use. Use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def attention_windows(config: Any) -> dict[str, int | None]:
    """What each kind of attention layer of a model can see.

    A ready 4-D mask replaces the model's own, so a sliding window has to be in it.

    Args:
        config: The model's configuration.

    Returns:
        Kind of layer -> window in tokens, or None where a layer sees all. Models with one kind take one mask, models
        with several take a dict of masks by kind.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Counts (trainable, all) weights; sharded and 4-bit ones as what they stand for."""

    def size(parameter: torch.nn.Parameter) -> int:
        if state := getattr(parameter, "quant_state", None):
            return state.shape.numel()
        return getattr(parameter, "ds_numel", parameter.numel())

    sizes = [(size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


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
        "weights": weights,
        "gradients and optimizer": training,
        "activations": args.pack_tokens * kept_floats * width + logits + mask,
        "checkpoints": 2 * trainable * (12 + width),
    }


def report_needs(needs: dict[str, int], output_dir: Path, ranks: int, ds_config: dict[str, Any]) -> str:
    """Writes in a line what a run will need beside what there is; estimates carry a tilde.

    Args:
        needs: From `needed_bytes`.
        output_dir: Where the checkpoints go.
        ranks: Number of ranks.
        ds_config: From `utils.engine.make_ds_config`.

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
