"""A finished model as one GGUF file for llama.cpp: numbers and settings; the tokenizer is in gguf_tokenizer.py.

llama.cpp's computations are in its sources (src/models/llama.cpp, qwen2.cpp, qwen3.cpp, qwen35.cpp, gemma3.cpp,
gemma4.cpp), what it wants of some tensors in conversion/qwen.py and gemma.py. A model that it would compute otherwise
than transformers does is refused.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.cli import progress_bar
from utils.data.chat import Chat
from utils.export.gguf_tokenizer import add_tokenizer
from utils.weights.lazy import LazyTensor
from utils.weights.loading import attention_windows
from utils.weights.merging import assemble

# Transformers' class -> llama.cpp's name, and the activation function that its graph has built in.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", "silu"),
    "MistralForCausalLM": ("llama", "silu"),
    "Qwen2ForCausalLM": ("qwen2", "silu"),
    "Qwen3ForCausalLM": ("qwen3", "silu"),
    "Qwen3_5ForCausalLM": ("qwen35", "silu"),
    "Gemma4ForCausalLM": ("gemma4", "gelu_pytorch_tanh"),
    "Gemma4ForConditionalGeneration": ("gemma4", "gelu_pytorch_tanh"),
    "Gemma3ForCausalLM": ("gemma3", "gelu_pytorch_tanh"),
    "Gemma3ForConditionalGeneration": ("gemma3", "gelu_pytorch_tanh"),  # Without what looks at pictures.
}
PICTURES = (  # And sound.
    "model.vision_tower.", "model.multi_modal_projector.", "model.embed_vision.", "model.audio_tower.",
    "model.embed_audio.",
)  # fmt: skip
GEMMA_PATTERN = 6  # Of Gemma 3's layers each sixth sees all.
GEMMA_27B_LAYERS = 62  # By its depth llama.cpp knows the one whose scores are divided by another number.
ROWS = 1024  # Of a matrix, changed at once.


class Part(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
        shape: Its shape.
        kind: gguf's GGMLQuantizationType.
        stored: Where its numbers come from.
        heads: Of a query or key projection of Llama, whose rows llama.cpp wants in another order; 0 of others.
        shift: Is added to the numbers.
        change: What else is done to it, if anything.
    """

    shape: tuple[int, ...]
    kind: Any
    stored: LazyTensor
    heads: int = 0
    shift: float = 0.0
    change: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def size_bytes(self) -> int:
        """What it takes in the file."""
        from gguf.quants import quant_shape_to_byte_shape

        return int(np.prod(quant_shape_to_byte_shape(self.shape, self.kind)))

    def read(self) -> np.ndarray:
        """The tensor's bytes in the file."""
        tensor = self.stored.read()
        if self.change:
            tensor = self.change(tensor)
        if self.heads:
            # Transformers turns the halves of a head against each other, llama.cpp its even and odd rows.
            halves = tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        parts = [self._encoded(rows) for rows in tensor.split(ROWS)]
        return np.concatenate(parts)

    def _encoded(self, rows: torch.Tensor) -> np.ndarray:
        from gguf import GGMLQuantizationType, quantize

        rows = rows.float() + self.shift
        if self.kind == GGMLQuantizationType.BF16:
            return rows.bfloat16().view(torch.uint8).numpy().reshape(-1)
        encoded = quantize(rows.numpy(), self.kind)
        if not np.isfinite(encoded).all():
            raise ValueError(f"its weights hold numbers that {self.kind.name} cannot: use --gguf bf16 or q8_0.")
        return encoded.reshape(-1).view(np.uint8)


def write_gguf(folder: Path, chat: Chat, kind: str, name: str, path: Path) -> None:
    """Writes a finished model as a GGUF file, a tensor at a time.

    Args:
        folder: The model's, as `utils.export.model_folder.write_model` leaves it.
        chat: Its tokenizer and template.
        kind: "f16", "bf16" or "q8_0", for matrices; vectors stay in fp32.
        name: The model's, for people.
        path: The file.

    Raises:
        ValueError: if llama.cpp cannot compute this model, or not as transformers does.
    """
    model = assemble(folder, None, None, [], trust_remote_code=False)
    writer = gguf_head(model.plain, chat, kind, name)
    parts = dict(gguf_parts(model.weights, model.plain.config.get_text_config(), writer.arch, kind))
    for part_name, part in parts.items():
        writer.add_tensor_info(part_name, part.shape, np.dtype(np.float32), part.size_bytes, raw_dtype=part.kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = sum(part.size_bytes for part in parts.values())
        with progress_bar(None, f"Writing GGUF ({kind})", "B", total=total, unit_scale=True) as bar:
            for part in parts.values():
                writer.write_tensor_data(part.read())
                bar.update(part.size_bytes)
    finally:
        writer.close()


def gguf_head(model: torch.nn.Module, chat: Chat, kind: str, name: str) -> Any:
    """Describes a model in all but its tensors.

    Args:
        model: Its modules, with or without values.
        chat: Its tokenizer and template.
        kind: As of `write_gguf`.
        name: The model's, for people.

    Returns:
        A GGUFWriter that has no file yet.

    Raises:
        ValueError: if llama.cpp cannot compute this model, or not as transformers does.
    """
    from gguf import GGUFWriter

    config = model.config.get_text_config()
    writer = GGUFWriter(None, check_model(type(model).__name__, config))
    add_settings(writer, config, kind, name)
    add_tokenizer(writer, chat, config.vocab_size)
    return writer


def check_model(name: str, config: Any) -> str:
    """Makes sure that llama.cpp computes a model as transformers does.

    Args:
        name: Of the model's class.
        config: The text model's configuration.

    Returns:
        What llama.cpp calls it.

    Raises:
        ValueError: if it would not.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"GGUF files are written of {', '.join(ARCHITECTURES)}; this is {name}.")
    arch, activation = ARCHITECTURES[name]
    used = getattr(config, "hidden_activation", None) or config.hidden_act
    full, sliding = rope_of(config)
    reasons = [f"its activation function is {used}"] if used != activation else []
    if arch == "gemma3":
        pattern = [(number + 1) % GEMMA_PATTERN == 0 for number in range(config.num_hidden_layers)]
        scale = config.head_dim
        if config.num_hidden_layers == GEMMA_27B_LAYERS:
            scale = config.hidden_size // config.num_attention_heads
        if [kind == "full_attention" for kind in config.layer_types] != pattern:
            reasons.append("other layers than each sixth see all")
        if config.query_pre_attn_scalar != scale:
            reasons.append(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}")
        if config.attn_logit_softcapping or config.final_logit_softcapping or config.use_bidirectional_attention:
            reasons.append("its logits are capped, or its attention looks both ways")
        if sliding["rope_type"] != "default":
            reasons.append("positions are scaled in layers with a window")
    if arch == "qwen35":
        interval = config.layer_types.index("full_attention") + 1 if "full_attention" in config.layer_types else 0
        pattern = [bool(interval) and (number + 1) % interval == 0 for number in range(config.num_hidden_layers)]
        if [kind == "full_attention" for kind in config.layer_types] != pattern or not interval:
            reasons.append("the layers that see all are not each n-th")
        if config.linear_key_head_dim != config.linear_value_head_dim:
            reasons.append("keys and values of linear attention differ in size")
    if arch == "gemma4":
        if config.enable_moe_block or config.use_bidirectional_attention:
            reasons.append("it has experts, or its attention looks both ways")
        if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input != config.vocab_size:
            reasons.append("its layers' own embeddings have another vocabulary")
        if "sliding_attention" not in config.layer_types or "full_attention" not in config.layer_types:
            reasons.append("not all kinds of layers are there")
    if arch in ("qwen3", "qwen35", "gemma3", "gemma4") and config.attention_bias:
        reasons.append("its attention has biases")
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
    known |= {"low_freq_factor", "high_freq_factor"} if full["rope_type"] == "llama3" else set()
    known |= {"partial_rotary_factor"} if full.get("partial_rotary_factor") == 1 or arch == "qwen35" else set()
    known |= {"mrope_section", "mrope_interleaved"} if arch == "qwen35" else set()  # Of pictures.
    known |= {"partial_rotary_factor"} if full["rope_type"] == "proportional" else set()
    unknown = {key for key, value in full.items() if value is not None} - known
    kinds = ("proportional",) if arch == "gemma4" else ("default", "linear", "yarn", "llama3")
    if full["rope_type"] not in kinds or unknown or (arch == "gemma4" and sliding["rope_type"] != "default"):
        reasons.append(f"rope_parameters are {full}")
    if reasons:
        raise ValueError(f"llama.cpp computes such a model otherwise than transformers: {'; '.join(reasons)}.")
    return arch


def rope_of(config: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Rotary positions of layers that see all, and of layers with a window where they have their own."""
    rope = config.rope_parameters
    return (rope, None) if "rope_type" in rope else (rope["full_attention"], rope["sliding_attention"])


def add_settings(writer: Any, config: Any, kind: str, name: str) -> None:
    """Adds the numbers that describe a model."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    own = layer_of(config, "full_attention") if writer.arch == "gemma4" else config
    head_dim = getattr(own, "head_dim", None) or config.hidden_size // config.num_attention_heads
    full, sliding = rope_of(config)
    windows = [window for window in attention_windows(config).values() if window]
    context = config.max_position_embeddings
    if writer.arch in ("gemma3", "gemma4"):
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    else:  # llama.cpp lets all layers of these see all, which is the same for as long as a window is.
        context = min([context, *windows])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if writer.arch == "gemma4":
        add_gemma4_settings(writer, config)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rotary = int(head_dim * (full.get("partial_rotary_factor") or 1)) if writer.arch != "gemma4" else head_dim
    writer.add_rope_dimension_count(rotary)
    writer.add_rope_freq_base(full["rope_theta"])
    if writer.arch == "qwen35":
        # Positions by time, height and width, by turns, are the same number for text; one by none of them would be 0.
        sections = [len(range(axis, rotary // 2, 3)) for axis in range(3)]
        writer.add_rope_dimension_sections([*(full.get("mrope_section") or sections), 0])
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    if full["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(full["rope_type"]))
        writer.add_rope_scaling_factor(full["factor"])
        original = full.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)


def layer_of(config: Any, kind: str) -> Any:
    """The settings of Gemma 4's layers of a kind: those that see all have other heads than those with a window."""
    return config.per_layer_config[config.layer_types.index(kind)]


def add_gemma4_settings(writer: Any, config: Any) -> None:
    """Adds what differs between layers of Gemma 4."""
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    wide = 2 if config.use_double_wide_mlp else 1
    own = config.num_hidden_layers - config.num_kv_shared_layers  # Later ones take keys and values of earlier layers.
    sizes = [config.intermediate_size * (1 if number < own else wide) for number in range(config.num_hidden_layers)]
    window, full = layer_of(config, "sliding_attention"), layer_of(config, "full_attention")
    writer.add_feed_forward_length(sizes)
    writer.add_head_count_kv([(window if slide else full).num_key_value_heads for slide in slides])
    writer.add_sliding_window_pattern(slides)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input or 0)
    writer.add_key_length_swa(window.head_dim)
    writer.add_value_length_swa(window.head_dim)
    writer.add_rope_dimension_count_swa(window.head_dim)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def delta_rule_change(name: str, config: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What llama.cpp wants of a tensor of the gated delta rule.

    Decays as numbers, not as logarithms; a convolution without a dimension of 1; and the heads of values that share a
    head of keys apart: transformers has them one after another, llama.cpp each first one, each second one and so on.
    """
    groups, size = config.linear_num_key_heads, config.linear_value_head_dim
    keys = 2 * groups * config.linear_key_head_dim  # Rows of queries and keys.

    def tiled(tensor: torch.Tensor, rows: int, axis: int = 0) -> torch.Tensor:
        heads = tensor.unflatten(axis, (groups, -1, rows))
        return heads.transpose(axis, axis + 1).reshape(tensor.shape)

    def values(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[:keys], tiled(tensor[keys:], size)])

    return {
        "A_log": lambda tensor: tiled(-tensor.float().exp(), 1),
        "dt_bias": lambda tensor: tiled(tensor, 1),
        "conv1d.weight": lambda tensor: values(tensor.squeeze(1)),
        "in_proj_qkv.weight": values,
        "in_proj_z.weight": lambda tensor: tiled(tensor, size),
        "in_proj_a.weight": lambda tensor: tiled(tensor, 1),
        "in_proj_b.weight": lambda tensor: tiled(tensor, 1),
        "out_proj.weight": lambda tensor: tiled(tensor, size, 1),
    }.get(name.rpartition(".linear_attn.")[2])


def gguf_parts(weights: Mapping[str, LazyTensor], config: Any, arch: str, kind: str) -> Iterator[tuple[str, Part]]:
    """Finds what a model's tensors are called and become in a GGUF file.

    Args:
        weights: Name in the model -> tensor.
        config: The text model's configuration.
        arch: llama.cpp's name for the model.
        kind: As of `write_gguf`.

    Raises:
        ValueError: if llama.cpp has no place for one of them.
    """
    from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    names = get_tensor_name_map(MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    wanted = GGMLQuantizationType[kind.upper()]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if arch == "llama" else {}
    for name, stored in weights.items():
        if name.startswith(PICTURES):
            continue
        name = name.replace("model.language_model.", "model.")
        change = delta_rule_change(name, config) if arch == "qwen35" and ".linear_attn." in name else None
        called = name.replace(".dt_bias", ".dt_proj.bias").replace(".layer_scalar", ".layer_scalar.weight")
        found = names.get_name(called, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp has no place for {name} in a model of this kind.")
        whole = stored.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0
        matrix = GGMLQuantizationType.F16 if not whole else wanted
        layer = name.split(".")[-2]
        yield found, Part(
            shape=(stored.shape[0], stored.shape[2]) if layer == "conv1d" else stored.shape,
            kind=matrix if len(stored.shape) == 2 else GGMLQuantizationType.F32,
            stored=stored,
            heads=heads.get(layer, 0),
            # These multiply what norms make with 1 + weight, llama.cpp with the number in the file.
            shift=float(arch in ("gemma3", "qwen35") and layer.endswith("norm") and ".linear_attn." not in name),
            change=change,
        )
    if rope_of(config)[0]["rope_type"] == "proportional":
        # Places that are not turned are turned so slowly that nothing is seen of it.
        half = layer_of(config, "full_attention").head_dim // 2
        turned = int(half * rope_of(config)[0].get("partial_rotary_factor", 1.0))
        slow = torch.tensor([1.0] * turned + [1e30] * (half - turned))
        stored = LazyTensor(tuple(slow.shape), torch.float32, lambda: slow)
        yield "rope_freqs.weight", Part(stored.shape, GGMLQuantizationType.F32, stored)
    if rope_of(config)[0]["rope_type"] == "llama3":
        changed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        places = torch.arange(0, 2 * len(changed), 2) / (2 * len(changed))
        factors = rope_of(config)[0]["rope_theta"] ** -places / changed
        stored = LazyTensor(tuple(factors.shape), torch.float32, lambda: factors)
        yield "rope_freqs.weight", Part(stored.shape, GGMLQuantizationType.F32, stored)
