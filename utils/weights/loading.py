"""Models as they are trained: base weights in 32, 16 or 4 bits, LoRA, and what their attention can see."""

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import embedding, linear

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# NF4 with double quantisation: 4 bits a weight and 0.127 bits a weight of scales (QLoRA, arXiv 2305.14314, section 3).
NF4_BYTES = 4.127 / 8
# Kinds of layers, in the words of transformers' configurations: those that have two in them, and those without either.
HYBRID_LAYERS = {
    "hybrid": {"full_attention", "linear_attention"},
    "hybrid_sliding": {"sliding_attention", "linear_attention"},
}
OTHER_LAYERS = {"mlp", "moe"}

# On CPUs with AVX512-BF16 bitsandbytes asks at its import for a package of kernels that `load_model` has no use for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


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

    ZeRO stage 3 gathers the original ones again, which are then misread; and other kernels give other numbers than
    training saw.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


# Fused kernels of these read the weights of Mamba's output projections beside the layer, so PEFT refuses LoRA there.
BARE_OUT_PROJ = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


def add_lora(
    model: torch.nn.Module, r: int, alpha: int, dropout: float, target: str, embeddings: bool | range = False
) -> torch.nn.Module:
    """Freezes a model and puts trainable low-rank matrices beside its linear layers (LoRA, arXiv 2106.09685).

    Args:
        model: The base model.
        r: Rank.
        alpha: The update is scaled by alpha / r.
        dropout: On the input of the low-rank matrices.
        target: "all-linear" (all but the output head, blocks of experts, and what PEFT refuses) or names of layers
            separated by commas.
        embeddings: Whether embedding and output head are trained beside it, as a whole or some tokens' rows.

    Raises:
        ValueError: if such layers cannot have any.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    targets = target if target == "all-linear" else [name.strip() for name in target.split(",")]
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = embeddings and ends[0].weight is ends[1].weight
    names = [name for name, layer in model.named_modules() if layer in ends]
    if isinstance(embeddings, range):  # Of tied ones PEFT takes the rows of the second by itself.
        config.trainable_token_indices = {name: [*embeddings] for name in names[: 1 if tied else 2]}
    elif embeddings:
        config.modules_to_save, config.ensure_weight_tying = names, tied
    taken = copy.deepcopy(config)
    convert_peft_config_for_transformers(taken, model, None)
    if taken.target_parameters:
        if target != "all-linear":
            names = ", ".join(sorted(taken.target_parameters))
            raise ValueError(f"got layers of experts ({names}), whose LoRA cannot be merged later; expected others")
        config.target_modules = {*outside_experts(model)}
    if target == "all-linear" and model.config.model_type in BARE_OUT_PROJ:
        config.exclude_modules = ["out_proj"]
    return get_peft_model(model, config)


def outside_experts(model: torch.nn.Module) -> list[str]:
    """Names of linear layers that no layer in a block of experts has."""
    tensors = [name for name, weight in model.named_parameters() if weight.ndim == 3 and ".experts." in name]
    blocks = tuple({name.partition("experts.")[0] for name in tensors})
    head = model.get_output_embeddings()
    layers = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    inside = {name.rpartition(".")[2] for name in layers if name.startswith(blocks)}
    return sorted({name.rpartition(".")[2] for name in layers} - inside)


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


def keep_rows_apart(model: torch.nn.Module) -> None:
    """Lets trained rows of embedding and output head stand beside the frozen tables.

    PEFT writes them into a copy of the table in every pass, and gets the gradient of all of its rows: with 75,000
    tokens of a 7B model that is more than a gigabyte a table. The same function and gradients; rows that are not one
    behind another are left to PEFT.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            ids = layer.token_indices["default"]
            if [*ids] == [*range(ids[0], ids[0] + len(ids))]:
                layer.forward = partial(_forward_with_rows, layer, ids[0])


def _forward_with_rows(layer: Any, first: int, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Looks rows up, or multiplies with them, where a token is `first` or one of those behind it."""
    base = layer.base_layer
    if layer.disable_adapters or layer.merged or layer.active_adapters != ["default"]:
        return type(layer).forward(layer, x, *args, **options)
    rows = layer.trainable_tokens_delta["default"].to(base.weight.dtype)
    end = first + len(rows)
    if isinstance(base, torch.nn.Embedding):
        found, scale = embedding((x - first).clamp(0, len(rows) - 1), rows), layer._get_embed_scale()
        found = found if scale is None else found * scale.to(found.dtype)
        return torch.where(((x >= first) & (x < end))[..., None], found, base(x))
    parts = [linear(x, base.weight[:first]), linear(x, rows), linear(x, base.weight[end:])]
    out = torch.cat(parts, dim=-1)
    return out if base.bias is None else out + base.bias


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
        with several take a dict of masks by kind. Recurrent layers are among them; a hybrid layer is two.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    kinds = set().union(*(HYBRID_LAYERS.get(kind, {kind}) for kind in kinds)) - OTHER_LAYERS
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Counts (trainable, all) weights; sharded and 4-bit ones as what they stand for."""

    def size(parameter: torch.nn.Parameter) -> int:
        if state := getattr(parameter, "quant_state", None):
            return state.shape.numel()
        return getattr(parameter, "ds_numel", parameter.numel())

    sizes = [(size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)
