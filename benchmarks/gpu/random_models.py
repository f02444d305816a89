"""Models of true shapes with random weights, made on the card a tensor at a time: nothing is downloaded or copied."""

from typing import Any

import torch
from comments import tiny_vocabulary

from utils.weights.loading import add_lora, keep_packing, nf4_config

QWEN = dict(max_position_embeddings=32768, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=0, pad_token_id=None)
SHAPES = {
    "Qwen2.5-0.5B": dict(
        model_type="qwen2", hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True),
    "Qwen2.5-3B": dict(
        model_type="qwen2", hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        intermediate_size=11008, vocab_size=151936, tie_word_embeddings=True),
    "Qwen2.5-7B": dict(
        model_type="qwen2", hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False),
    "Qwen3-4B": dict(
        model_type="qwen3", hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=9728, vocab_size=151936, tie_word_embeddings=True),
}  # fmt: skip
TINY = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=128,
)  # fmt: skip


def config_of(shape: str, tiny: bool = False, **changes: Any) -> Any:
    """The configuration of a model in SHAPES; of a tiny one of its kind for trials on a CPU."""
    from transformers import AutoConfig

    values = SHAPES[shape] | (TINY | {"vocab_size": tiny_vocabulary()} if tiny else {}) | changes
    return AutoConfig.for_model(**(QWEN | values))


def random_model(config: Any, dtype: torch.dtype, device: str, bits: int | None = None, std: float = 0.02) -> Any:
    """Makes a model whose weights are random numbers that bf16 holds exactly, the same ones in every precision.

    A 4-bit model is quantised layer by layer and never needs more than its own memory and one layer's.

    Args:
        config: From `config_of`.
        dtype: Of the weights; in 4 bits, of the arithmetic and of what is not quantised.
        device: Where to.
        bits: 4 or None.
        std: Of the numbers.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if bits == 4:
        from transformers.integrations import replace_with_bnb_linear

        settings = nf4_config(dtype)
        model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=settings)
        model.is_loaded_in_4bit = model.is_quantized = True
        model.config.quantization_config = settings
        keep_packing(model)
    generator = torch.Generator(device).manual_seed(0)
    made: dict[int, torch.nn.Parameter] = {}  # By the empty parameter: tied ones are made once.
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        layer_name, _, leaf = name.rpartition(".")
        layer = model.get_submodule(layer_name)
        if id(parameter) not in made:
            made[id(parameter)] = _random_parameter(name, parameter, layer, dtype, generator, std)
        setattr(layer, leaf, made[id(parameter)])
    model.tie_weights()
    return model.to(device)  # The buffers too.


def _random_parameter(
    name: str, empty: torch.nn.Parameter, layer: Any, dtype: torch.dtype, generator: torch.Generator, std: float
) -> torch.nn.Parameter:
    device = generator.device
    value = torch.empty(empty.shape, dtype=dtype, device=device)
    if empty.ndim == 1:
        value.fill_(1 if "norm" in name else 0)
    else:
        for rows in value.split(8192):
            numbers = torch.empty(rows.shape, device=device).normal_(std=std, generator=generator)
            rows.copy_(numbers.bfloat16())
    if type(empty).__name__ == "Params4bit":
        from bitsandbytes.nn import Params4bit

        options = dict(quant_type="nf4", compress_statistics=True, module=layer)
        return Params4bit(value, requires_grad=False, **options).to(device)
    return torch.nn.Parameter(value, requires_grad=False)


def with_lora(model: Any, r: int = 16, alpha: int = 32, dropout: float = 0.05, trained: bool = False) -> Any:
    """Puts LoRA on all linear layers.

    Args:
        model: From `random_model`.
        r: Rank.
        alpha: The update is scaled by alpha / r.
        dropout: Before the low-rank matrices.
        trained: Whether B is random instead of zero, so that A has gradients too.
    """
    model = add_lora(model, r, alpha, dropout, "all-linear")
    if trained:
        generator = torch.Generator("cpu").manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator).bfloat16())
    return model
