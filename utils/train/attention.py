"""Attention over packs: the ancestor rule as a mask, computed in blocks.

Shapes: L tokens in a pack, P cached ones before them; B queries, H heads, D numbers a head.
"""

from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from utils.train.packing import Pack

# On a CPU so many queries are computed together, with the keys that at least one of them sees. A smaller block leaves
# out more of what nobody sees, and its kernel is slower: with SmolLM2-135M and packs of 700 tokens 96 to 256 made
# little difference. A card computes a pack as one block.
BLOCK_TOKENS = 128
BLOCKWISE = "sdpa_in_blocks"


def attention_in_blocks(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Transformers' SDPA attention, for a mask of `cut_mask` block by block.

    Args:
        module: The attention layer.
        query: (1, H, L, D).
        key: (1, heads of keys, L, D).
        value: As key.
        mask: As `sdpa_attention_forward` takes it.
        options: As `sdpa_attention_forward` takes them.

    Returns:
        (1, L, H, D), and no attention weights.
    """
    if not hasattr(mask, "blocks"):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    parts = [
        sdpa_attention_forward(module, query[:, :, rows], key[:, :, seen], value[:, :, seen], part, **options)[0]
        for rows, seen, part in mask.blocks
    ]
    return torch.cat(parts, dim=1), None


# On Hopper cards cuDNN's kernel is PyTorch's first choice. Under a mask its gradients can be NaN where L % 128 is 64
# (pytorch/pytorch issue 196678), and it prepares anew for every length.
torch.backends.cuda.enable_cudnn_sdp(False)

AttentionInterface.register(BLOCKWISE, attention_in_blocks)
AttentionMaskInterface.register(BLOCKWISE, sdpa_mask)


def use_blocks(model: Any) -> None:
    """Lets a model whose attention is SDPA compute it in blocks where its mask says so."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(BLOCKWISE)


def cut_mask(mask: torch.Tensor) -> torch.Tensor:
    """Splits a mask into blocks of queries, each with the keys it needs.

    Args:
        mask: (1, 1, L, P + L) bool.

    Returns:
        The same tensor; with an attribute `blocks`, if there are several: for each block of queries their slice, the
        (K,) places of the keys that one of them sees, and the (1, 1, B, K) part of the mask. An attribute, because
        models hand masks on as they are, and not every one hands on further arguments.
    """
    count = round(len(mask[0, 0]) / BLOCK_TOKENS)
    if count < 2:
        return mask
    edges = np.linspace(0, len(mask[0, 0]), count + 1).astype(int).tolist()
    mask.blocks = []
    for start, end in zip(edges, edges[1:], strict=False):
        seen = mask[0, 0, start:end].any(0).nonzero()[:, 0]
        mask.blocks.append((slice(start, end), seen, mask[:, :, start:end, seen]))
    return mask


def attention_mask(pack: Pack, window: int | None = None, cached: int = 0) -> torch.Tensor:
    """The ancestor rule as a mask.

    Args:
        pack: Of L tokens.
        window: Of a model with sliding-window attention: a token sees itself and the window - 1 tokens before it.
        cached: P, tokens that all samples begin with, whose keys are in a cache and not in the pack.

    Returns:
        (1, 1, L, P + L) bool; [0, 0, i, P + j] is True where token i may attend to token j. L x (P + L) bytes.
    """
    place = torch.arange(len(pack.subtree_end), device=pack.subtree_end.device)
    query, key = place[:, None], place[None, :]
    mask = torch.nn.functional.pad((key <= query) & (query < pack.subtree_end[None, :]), (cached, 0), value=True)
    if window is not None:
        positions = torch.cat([torch.arange(-cached, 0, device=place.device), pack.position_ids])
        mask &= pack.position_ids[:, None] - positions[None, :] < window
    return mask[None, None]


def added_mask(mask: torch.Tensor) -> torch.Tensor:
    """The same mask as numbers to add to the scores, which is what attention without a kernel ("eager") takes."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
