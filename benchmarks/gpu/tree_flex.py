"""The ancestor rule under FlexAttention: a block mask made on the host, and the attention function of a model.

Shapes: L tokens in a pack, H heads, D numbers a head.
"""

from typing import Any

import numpy as np
import torch

from utils.train.packing import Pack

NAME = "tree_flex"
BLOCK = 128
# In fp32 the kernels' own blocks are too large for the shared memory of some cards.
SMALL_BLOCKS = {f"BLOCK_{axis}{pass_}": 32 for axis in "MN" for pass_ in ("", "1", "2")}

_compiled: Any = None


def padded(pack: Pack, multiple: int = BLOCK) -> Pack:
    """Adds tokens that see themselves alone, so that the length is a multiple: a new length need not be compiled."""
    length = len(pack.input_ids)
    more = -length % multiple
    zeros = torch.zeros(more, dtype=torch.int64)
    return pack._replace(
        input_ids=torch.cat([pack.input_ids, zeros]),
        position_ids=torch.cat([pack.position_ids, zeros]),
        subtree_end=torch.cat([pack.subtree_end, torch.arange(length + 1, length + more + 1)]),
    )


def block_mask(subtree_end: torch.Tensor, device: str) -> Any:
    """The ancestor rule as a BlockMask; no L x L mask is ever made.

    A block of keys is seen by the blocks of queries from its own to that of its last descendant, and as a whole by
    those behind it that lie within the subtrees of all its tokens.

    Args:
        subtree_end: (L,) on the host; L is a multiple of BLOCK.
        device: Where the attention is computed.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ends = subtree_end.numpy().reshape(-1, BLOCK)
    last, first = ends.max(1), ends.min(1)
    query, key = np.arange(len(ends))[:, None], np.arange(len(ends))[None, :]
    seen = (query >= key) & (query * BLOCK < last)
    whole = (query > key) & ((query + 1) * BLOCK <= first)
    on_device = subtree_end.to(device, torch.int32)

    def ancestor(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < on_device[key])

    def listed(table: np.ndarray) -> list[torch.Tensor]:
        order = np.argsort(~table, axis=1, kind="stable").astype(np.int32)
        counts = table.sum(1).astype(np.int32)
        return [torch.from_numpy(array).to(device)[None, None] for array in (counts, order)]

    return BlockMask.from_kv_blocks(*listed(seen & ~whole), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=ancestor)


def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float | None = None) -> Any:
    """FlexAttention, compiled on a card.

    Args:
        query: (1, H, L, D).
        key: (1, heads of keys, L, D).
        value: As key.
        mask: From `block_mask`.
        scale: Of the products; None: 1 / sqrt(D).

    Returns:
        (1, H, L, D).
    """
    global _compiled
    from torch.nn.attention.flex_attention import flex_attention

    if _compiled is None:
        torch._dynamo.config.recompile_limit = 64  # At the limit, specialisations of other shapes were used again.
        _compiled = torch.compile(flex_attention, dynamic=True) if query.is_cuda else flex_attention
    options = SMALL_BLOCKS if query.dtype == torch.float32 and query.is_cuda else None
    grouped = query.shape[1] != key.shape[1]
    return _compiled(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=options)


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any) -> Any:
    return flex(query, key, value, mask, scaling).transpose(1, 2).contiguous(), None


def register() -> None:
    """Makes the attention known to transformers as `tree_flex`; its mask is a BlockMask."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
