"""Holds the gradients of a pack of real comments against those of its samples one by one, for every kind of attention.

    python benchmarks/gpu/check_gradients.py

A whole Qwen2.5-0.5B with LoRA and gradient checkpointing, in fp32, bf16 and on 4-bit weights. "error" is the distance
of the gradients of a pack from those of its samples alone, which are computed as any program would, without a mask.
"rounding" is the distance of those samples' gradients from the same in fp32: what the precision itself costs.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kit import Part, part_parser, relative_error

SHAPE, PACK_TOKENS = "Qwen2.5-0.5B", 1024
# Name -> the kernel that SDPA is held to; "" leaves the choice to PyTorch.
KERNELS = {
    "dense mask": "",
    "dense mask, efficient kernel": "EFFICIENT_ATTENTION",
    "dense mask, cuDNN": "CUDNN_ATTENTION",
}
FLEX = "FlexAttention"


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Holds SDPA to one of its kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not name:
        yield
    else:
        with sdpa_kernel(SDPBackend[name]):
            yield


def gradients(model: Any, loss_of: list[Callable[[], Any]]) -> tuple[float, list[Any]]:
    """The sum of some losses and its gradients, added up in fp32."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
    total = 0.0
    for compute in loss_of:
        loss = compute()
        loss.backward()
        total += loss.item()
        for added, parameter in zip(sums, trained, strict=True):
            added += parameter.grad.float()
            parameter.grad = None
    return total, sums


def compare(part: Part, dtype: Any, bits: int | None, exact: list[Any] | None) -> tuple[dict[str, Any], list[Any]]:
    """Computes a pack every way.

    Args:
        part: The process.
        dtype: Of the arithmetic.
        bits: 4 or None.
        exact: Gradients of the samples one by one in fp32, if they are known.

    Returns:
        The figures, and the gradients of the samples one by one.
    """
    import torch
    import tree_flex
    from comments import load_comments, pack_of
    from random_models import config_of, random_model, with_lora

    from utils.train.forward import SINGLE, model_inputs, trie_format, use_tries
    from utils.train.packing import lay_out
    from utils.train.tensors import token_logprobs

    config = config_of(SHAPE, part.dry)
    model = with_lora(random_model(config, dtype, part.device, bits), dropout=0.0, trained=True).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    samples = load_comments(part.dry)
    numbers, pack = pack_of(samples, 256 if part.dry else PACK_TOKENS)
    form = trie_format(model)

    def loss(inputs: dict[str, Any], own: Any) -> Any:
        logits = model(**inputs).logits[0]
        return -(own.target_weight * token_logprobs(logits, own.target_ids)).sum() / len(pack.target_ids)

    def alone(number: int) -> Any:
        own = lay_out([samples[number]], [0]).to(part.device)
        return loss(model_inputs(own, SINGLE), own)

    def together() -> Any:
        own = pack.to(part.device)
        return loss(model_inputs(own, form), own)

    def under_flex() -> Any:
        own = tree_flex.padded(pack)
        mask = tree_flex.block_mask(own.subtree_end, part.device)
        own = own.to(part.device)
        return loss(model_inputs(own, SINGLE) | {"attention_mask": mask}, own)

    plain_loss, plain = gradients(model, [lambda number=number: alone(number) for number in numbers])
    figures: dict[str, Any] = {
        "samples": len(numbers),
        "tokens_alone": int(samples.lengths[numbers].sum()),
        "tokens": len(pack.input_ids),
        "loss": round(plain_loss, 6),
        "attention": {},
    }
    if exact is not None:
        figures["rounding"] = relative_error(plain, exact)

    def hold(name: str, compute: Callable[[], Any], held_to: str) -> None:
        try:
            with kernel(held_to):
                packed_loss, packed = gradients(model, [compute])
            figures["attention"][name] = {"loss": round(packed_loss, 6), "error": relative_error(packed, plain)}
        except (RuntimeError, NotImplementedError, ValueError) as error:  # A kernel that does not take these inputs.
            figures["attention"][name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            model.zero_grad()

    use_tries(model)
    for name, held_to in KERNELS.items():
        if not held_to or part.device == "cuda":
            hold(name, together, held_to)
    model.set_attn_implementation(tree_flex.NAME)
    if part.device == "cuda":
        hold(FLEX, under_flex, "")
    else:  # It has no backward pass on CPUs.
        with torch.no_grad():
            figures["attention"][FLEX] = {"loss": round(under_flex().item(), 6)}
    return figures, plain


def main(args: argparse.Namespace) -> None:
    """Measures and writes."""
    part = Part("gradients", args)
    import torch
    import tree_flex

    tree_flex.register()
    exact: dict[int | None, list[Any]] = {}

    def work(dtype: Any, bits: int | None) -> dict[str, Any]:
        figures, plain = compare(part, dtype, bits, exact.get(bits))
        exact.setdefault(bits, plain)
        return figures

    for bits, weights in ((None, ""), (4, " on 4-bit weights")):
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            part.measure(f"{name}{weights}", 45, work, dtype, bits)


if __name__ == "__main__":
    main(part_parser(__doc__).parse_args())
