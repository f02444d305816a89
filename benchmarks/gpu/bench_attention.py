"""Measures one layer's attention over a pack of real comments, forward and backward, by length and kind.

    python benchmarks/gpu/bench_attention.py

"dense mask" is what training does: SDPA under the boolean mask of the ancestor rule, keys repeated for grouped heads,
the kernel PyTorch's own choice ("kernel" says which). "flash, causal" is the floor: the kernel that takes no mask, as
if the pack were one sample. The mask of a pack is made once for all layers and is not part of the times.
"""

import argparse
from typing import Any

from check_gradients import FLEX, kernel
from kit import GIB, Part, part_parser, relative_error

LENGTHS = (2048, 512, 1024, 4096, 8192)  # What matters most first.
SHAPES = ("Qwen2.5-0.5B", "Qwen2.5-7B")  # Heads of 64 and of 128 numbers.


def attention(part: Part, shape: str, length: int) -> dict[str, Any]:
    """All kinds of attention over one pack; the errors are against the dense mask under the efficient kernel."""
    import torch
    import tree_flex
    from comments import load_comments, pack_of
    from random_models import config_of
    from torch.nn.functional import scaled_dot_product_attention

    from utils.train.attention import attention_mask

    config = config_of(shape, part.dry)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = torch.float32 if part.dry else torch.bfloat16
    pack = tree_flex.padded(pack_of(load_comments(part.dry), length)[1])
    tokens = len(pack.input_ids)
    blocks = tree_flex.block_mask(pack.subtree_end, part.device)
    mask = attention_mask(pack.to(part.device))
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, count, tokens, width, device=part.device, dtype=dtype, requires_grad=True)
        for count in (heads, groups, groups)
    )
    gradient = torch.randn(1, heads, tokens, width, device=part.device, dtype=dtype)

    def repeated() -> tuple[Any, Any]:
        return key.repeat_interleave(heads // groups, 1), value.repeat_interleave(heads // groups, 1)

    def dense() -> Any:
        return scaled_dot_product_attention(query, *repeated(), attn_mask=mask)

    def flex() -> Any:
        # On CPUs it has no backward pass, and asks that nothing wants one.
        inputs = [tensor.detach() if part.dry else tensor for tensor in (query, key, value)]
        return tree_flex.flex(*inputs, blocks)

    def causal() -> Any:
        return scaled_dot_product_attention(query, *repeated(), is_causal=True)

    ways = {
        "dense mask, efficient kernel": (dense, "EFFICIENT_ATTENTION"),
        "dense mask": (dense, ""),
        FLEX: (flex, ""),
        "flash, causal": (causal, "FLASH_ATTENTION"),
    }
    figures: dict[str, Any] = {"tokens": tokens, "visible": round(mask.float().mean().item(), 4), "kinds": {}}
    if not part.dry:
        choice = torch._fused_sdp_choice(query, *repeated(), mask, 0.0, False)
        figures["kernel"] = torch.nn.attention.SDPBackend(choice).name
    plain: list[Any] = []
    for name, (way, held_to) in ways.items():
        if part.dry and name == FLEX:
            figures["kinds"][name] = {"error": relative_error([way()], plain[:1])}
            continue

        def both(way: Any = way) -> None:
            query.grad = key.grad = value.grad = None
            way().backward(gradient)

        try:
            with kernel("" if part.dry else held_to):
                both()  # Compiles, where something is compiled.
                row: dict[str, Any] = {}
                result = [way().detach(), query.grad.clone(), key.grad.clone(), value.grad.clone()]
                plain = plain or result
                if name != "flash, causal":
                    row["error"] = relative_error(result, plain)
                before = torch.cuda.memory_allocated() if part.device == "cuda" else 0
                with part.peak_memory(row):
                    both()
                if "peak_gib" in row:
                    row["peak_mib"] = round(1024 * (row.pop("peak_gib") - before / GIB), 1)
                    del row["reserved_gib"]
                row["forward_ms"], row["both_ms"] = part.milliseconds(way, 5, 1), part.milliseconds(both, 5, 1)
        except (RuntimeError, NotImplementedError, ValueError) as error:  # A kernel that does not take these inputs.
            row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        figures["kinds"][name] = row
    return figures


def cudnn_backward(part: Part) -> dict[str, Any]:
    """How many numbers of a gradient are not finite under cuDNN's kernel, at a length for which it has been wrong.

    pytorch/pytorch issue 196678: NaN where L % 128 is 64 and a row's visible scores are far below zero.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    found = {}
    for held_to in ("", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        for length in (640, 704):
            torch.manual_seed(0)
            query, key = (0.1 * torch.randn(1, 1, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            value = torch.randn(1, 1, length, 64, device="cuda", dtype=torch.bfloat16)
            query[..., 0], key[..., 0] = 1.0, -960.0
            for tensor in (query, key, value):
                tensor.requires_grad_()
            mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None]
            with kernel(held_to):
                result = scaled_dot_product_attention(query, key, value, attn_mask=mask)
                result.backward(torch.randn_like(value))
            found[f"{held_to or 'default'}, {length} tokens"] = int((~torch.isfinite(query.grad)).sum())
    return {"not_finite": found}


def main(args: argparse.Namespace) -> None:
    """Measures and writes."""
    part = Part("attention", args)
    if not part.dry:
        part.measure("cuDNN's backward pass", 10, cudnn_backward, part)
    for length in (384,) if part.dry else LENGTHS:
        for shape in SHAPES:
            part.measure(f"{shape}, {length}", 30, attention, part, shape, length)


if __name__ == "__main__":
    main(part_parser(__doc__).parse_args())
