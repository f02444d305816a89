"""utils/weights/loading.py: what is estimated and counted, against models that are really built.

python -m pytest tests/test_utils_weights_loading.py
"""

from typing import Any

import pytest
import torch
from conftest import make_model
from torch.utils._python_dispatch import TorchDispatchMode

from utils.weights.loading import add_lora, attention_windows, count_parameters, keep_rows_apart, scale_early

KINDS = ("llama", "qwen2", "gemma3", "mistral")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


# ---------------------------------------------------------------------------------------------------------------------
# Attention windows


@pytest.mark.parametrize(
    ("kind", "changes", "windows"),
    [
        ("llama", {}, {"full_attention": None}),
        ("qwen2", {}, {"full_attention": None}),
        ("mistral", {}, {"sliding_attention": 16}),
        ("gemma3", {}, {"full_attention": None, "sliding_attention": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
         {"full_attention": None, "sliding_attention": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, {"sliding_attention": 8}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, {"full_attention": None}),
    ],
)  # fmt: skip
def test_attention_windows(kind: str, changes: dict[str, Any], windows: dict[str, int | None]) -> None:
    """Seen in the model, too: a change of the first token reaches the last one only where a layer sees so far."""
    model = make_model(kind, 100, **changes).eval()
    assert attention_windows(model.config) == windows
    ids = torch.arange(40)[None] + 10
    other = ids.clone()
    other[0, 0] = 99
    with torch.no_grad():
        reached = not torch.equal(model(input_ids=ids).logits[0, -1], model(input_ids=other).logits[0, -1])
    assert reached == (None in windows.values())


# ---------------------------------------------------------------------------------------------------------------------
# Counts and needs


@pytest.mark.parametrize("kind", KINDS)
def test_count_parameters(kind: str) -> None:
    """LoRA adds r x (in + out) weights to each of the seven linear layers of a block."""
    model = make_model(kind, 800)
    whole = sum({id(weight): weight.numel() for weight in model.parameters()}.values())
    assert count_parameters(model) == (whole, whole)
    hidden, mlp, queries, keys = 64, 128, 64, 32
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    layers = [*attention, (hidden, mlp), (hidden, mlp), (mlp, hidden)]
    lora = 2 * sum(8 * (n_in + n_out) for n_in, n_out in layers)
    assert count_parameters(add_lora(model, 8, 16, 0.0, "all-linear")) == (lora, whole + lora)


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             vocab_size=100, head_dim=16)  # fmt: skip


@pytest.mark.parametrize(("kind", "shape", "expected"), [
    ("mixtral", dict(num_local_experts=2), {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ("deepseek_v3", dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
                         n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, n_group=1, topk_group=1,
                         first_k_dense_replace=1, num_key_value_heads=2),
     {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
    ("nemotron_h", dict(layers_block_type=["mamba", "attention"], mamba_num_heads=4, mamba_head_dim=16, n_groups=1,
                        ssm_state_size=8), {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj"}),
])  # fmt: skip
def test_layers_that_take_no_lora_are_left_out(kind: str, shape: dict[str, Any], expected: set[str]) -> None:
    """Experts, whose adapter could not be merged, and Mamba's output, which fused kernels compute beside the layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {key: value for key, value in SMALL.items() if kind != "deepseek_v3" or key != "head_dim"}

    def make() -> torch.nn.Module:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(size | shape)))

    names = [name for name, _ in add_lora(make(), 2, 4, 0.05, "all-linear").named_parameters() if ".lora_A." in name]
    assert {name.partition(".lora_A.")[0].rpartition(".")[2] for name in names} == expected
    if kind == "deepseek_v3":
        with pytest.raises(ValueError, match="experts"):
            add_lora(make(), 2, 4, 0.0, "q_b_proj,gate_proj,up_proj,down_proj")


def test_add_lora_to_named_layers() -> None:
    model = add_lora(make_model("llama", 800), 4, 8, 0.0, "q_proj,v_proj")
    trained = {name.split(".")[-4] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("changes", "variants"),
    [({}, {"ScaledEarly"}), ({"use_dora": True}, {"DoraLinearVariant"}), ({"lora_bias": True}, set())],
    ids=["lora", "dora", "bias"],
)
def test_scale_early_changes_no_function(changes: dict[str, bool], variants: set[str]) -> None:
    """Against PEFT's own forward, with a scale that is no power of two, two adapters, and those that are left alone."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **changes)
    model = get_peft_model(make_model("qwen2", 800), config)
    model.add_adapter("other", config)
    ids = torch.arange(3, 23)[None]

    def outcome() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        return logits.detach(), [weight.grad for weight in model.parameters() if weight.grad is not None]

    plain = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        plain[name] = outcome()
    scale_early(model)
    layers = [module for module in model.modules() if hasattr(module, "lora_variant")]
    assert {type(variant).__name__ for layer in layers for variant in layer.lora_variant.values()} == variants
    for name, (logits, gradients) in plain.items():
        model.set_adapter(name)
        ours, own_gradients = outcome()
        torch.testing.assert_close(ours, logits)
        torch.testing.assert_close(own_gradients, gradients, rtol=1e-4, atol=1e-7)
    if not changes:
        with pytest.raises(NotImplementedError, match="loaded anew"):
            model.merge_and_unload()


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.found.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_stand_apart_change_no_function(kind: str, tied: bool) -> None:
    """Against PEFT's own forward; in the middle of the table, with scaled embeddings, a head with a bias, adapter off.

    A copy of a table, or a gradient of one, is never made.
    """
    first, count = 650, 100
    model = make_model(kind, 800, tie_word_embeddings=tied)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)  # PEFT forgets it.
    model = add_lora(model, 4, 8, 0.0, "q_proj,v_proj", range(first, first + count))
    for name, weight in model.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.tensor([[3, 649, 650, 700, 749, 750, 799, 0]])

    def outcome() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        return logits.detach(), [weight.grad for weight in model.parameters() if weight.grad is not None]

    logits, gradients = outcome()
    with model.disable_adapter(), torch.no_grad():
        base = model(input_ids=ids).logits
    keep_rows_apart(model)
    with Shapes() as shapes:
        ours, own_gradients = outcome()
    bias = 0 if head.bias is None else head.bias.detach()
    torch.testing.assert_close(ours - bias, logits, rtol=1e-4, atol=1e-5)
    if head.bias is None:
        torch.testing.assert_close(own_gradients, gradients, rtol=1e-4, atol=1e-7)
    table = tuple(model.get_input_embeddings().weight.shape)
    assert table not in shapes.found and (count, table[1]) in shapes.found
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base)
