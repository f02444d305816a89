"""Attention for continuous batching: each request's tokens look at that request's keys alone.

transformers computes a batch of requests with SDPA as one sequence under a mask, each request against the keys of all:
with 32 of them, 32 times the work. Flash attention, which does not, is CUDA's alone. The name holds "flash", since that
is how transformers decides that no mask is needed.

Shapes: T new tokens of all requests, K keys of all, H heads, G groups of heads that share keys, D per head.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "flash_by_request"


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None) -> Any:
    """One request's new tokens, the last ones of its keys.

    Args:
        query: (1, H, new, D).
        key: (1, H / G, all, D).
        value: As `key`.
        scale: Of the products.
        window: How many tokens, itself included, a token sees; None: all before it.

    Returns:
        (1, H, new, D).
    """
    new, every, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    if new == 1:
        if window is not None and every > window:
            key, value = key[:, :, -window:], value[:, :, -window:]
        # The heads of a group as if they were tokens: keys need not be repeated.
        packed = query.view(1, -1, groups, query.shape[3])
        return scaled_dot_product_attention(packed, key, value, scale=scale).view_as(query)
    mask = None
    if new < every or (window is not None and every > window):
        place = torch.arange(every, device=query.device)
        back = place[every - new :, None] - place
        mask = (back >= 0) if window is None else (back >= 0) & (back < window)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
    )


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    cache: Any,
    cu_seq_lens_q: torch.Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer, in the form that transformers calls.

    Args:
        module: The layer.
        query: (1, H, T, D).
        key: (1, H / G, T, D), of the new tokens.
        value: As `key`.
        attention_mask: None, by the name above.
        cache: Has the keys and values of earlier tokens, and takes the new ones.
        cu_seq_lens_q: Where each request's new tokens begin, and the end.
        scaling: Of the products; None: 1 / sqrt(D).
        sliding_window: Of the layer.
        softcap: Not known here.
        s_aux: Not known here.
        **kwargs: What the cache needs.

    Returns:
        (1, T, H, D).

    Raises:
        ValueError: for kinds of attention that are not computed here.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError("the model's attention has a soft cap or sinks.")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    new, every = cu_seq_lens_q.tolist(), kwargs["cu_seq_lens_k"].tolist()
    out = torch.empty_like(query)
    for number in range(len(new) - 1):
        mine, keys = slice(new[number], new[number + 1]), slice(every[number], every[number + 1])
        out[:, :, mine] = attend(query[:, :, mine], key[:, :, keys], value[:, :, keys], scale, sliding_window)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
