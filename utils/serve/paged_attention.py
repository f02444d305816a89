"""Attention for continuous batching: each request's tokens look at that request's keys alone.

transformers computes a batch of requests with SDPA as one sequence under a mask, each request against the keys of all:
with 32 of them, 32 times the work. Flash attention, which does not, is CUDA's alone. The name holds "flash", since that
is how transformers decides that no mask is needed.

What all requests begin with, such as the system prompt, is read once a step for those that write, one token each, and
not once a request: "cascade attention" in vLLM and FlashInfer.

Shapes: T new tokens of all requests, K keys of all, H heads, G heads that share keys, D per head; R requests with one
new token, P keys that all of them begin with.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache_allocators.full_attention import FullAttentionCacheAllocator
from transformers.masking_utils import AttentionMaskInterface

NAME = "flash_by_request"
LEAST_COMMON = 32  # Keys; fewer are not worth a path of their own.


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


class Step(NamedTuple):
    """Which keys a step reads.

    Attributes:
        new: Where each request's new tokens begin, and the end.
        begin: Where each request's keys begin among those that are read.
        end: Where they end.
        sharing: The requests with one new token, if their keys begin alike.
        common: (P,) int64, the slots of the keys that those begin with, which are not among their others.
        read: (K',) int64, the slots of all other keys, request after request. None, as `common`: all keys are read.
    """

    new: list[int]
    begin: list[int]
    end: list[int]
    sharing: list[int]
    common: torch.Tensor | None
    read: torch.Tensor | None


@lru_cache(maxsize=8)
def plan_step(slots: torch.Tensor, new_begin: torch.Tensor, every_begin: torch.Tensor, may_share: bool) -> Step:
    """Finds what requests with one new token have in common; all layers of a kind have the same arguments.

    Args:
        slots: (K,) int64, where the keys of each request are, request after request; empty: all keys are new.
        new_begin: Where each request's new tokens begin, and the end.
        every_begin: Where each request's keys begin, and the end.
        may_share: Whether equal slots hold equal keys, and all of them are seen.
    """
    new, every = new_begin.tolist(), every_begin.tolist()
    all_of_them = Step(new, every[:-1], every[1:], [], None, None)
    single = [number for number in range(len(new) - 1) if new[number + 1] - new[number] == 1]
    if not may_share or len(slots) == 0 or len(single) < 2:
        return all_of_them
    shortest = min(every[number + 1] - every[number] for number in single) - 1
    table = torch.stack([slots[every[number] : every[number] + shortest] for number in single])
    count = int((table == table[0]).all(0).cumprod(0).sum())
    if count < LEAST_COMMON:
        return all_of_them
    begin = [first + count * (number in single) for number, first in enumerate(every[:-1])]
    places = [slice(*place) for place in zip(begin, every[1:], strict=True)]
    end = [*accumulate(place.stop - place.start for place in places)]
    read = torch.cat([slots[place] for place in places])
    return Step(new, [0, *end[:-1]], end, single, table[0, :count].clone(), read)


def attend_common(
    query: torch.Tensor, common: Sequence[torch.Tensor], own: Sequence[tuple[torch.Tensor, torch.Tensor]], scale: float
) -> torch.Tensor:
    """Requests with one new token each, whose keys begin alike.

    Args:
        query: (R, H, D).
        common: Keys and values that all of them begin with, (H / G, P, D) each.
        own: Each one's further keys and values, (H / G, own, D) each.
        scale: Of the products.

    Returns:
        (R, H, D).
    """
    (keys, values), (n_groups, n_common, n_head) = common, common[0].shape
    query = (query * scale).view(len(own), n_groups, -1, n_head).transpose(0, 1)  # (H / G, R, G, D)
    longest = max(own_keys.shape[1] for own_keys, _ in own)
    scores = query.new_full((*query.shape[:3], n_common + longest), -torch.inf)
    scores[..., :n_common] = (query.flatten(1, 2) @ keys.mT).view(*query.shape[:3], n_common)
    for row, (own_keys, _) in enumerate(own):
        scores[:, row, :, n_common : n_common + own_keys.shape[1]] = query[:, row] @ own_keys.mT
    probs = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    out = (probs[..., :n_common].flatten(1, 2) @ values).view_as(query)
    for row, (_, own_values) in enumerate(own):
        out[:, row] += probs[:, row, :, n_common : n_common + own_values.shape[1]] @ own_values
    return out.transpose(0, 1).flatten(1, 2)


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
    allocator, layer = cache.layer_to_allocator[module.layer_idx], module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    slots, every = kwargs["read_index"][allocator.index], kwargs["cu_seq_lens_k"][allocator.layer_type]
    may_share = type(allocator) is FullAttentionCacheAllocator and sliding_window is None
    step = plan_step(slots, cu_seq_lens_q, every, may_share)
    out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    if step.common is None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
    else:
        tables = allocator._kv_token_views[layer]
        for table, states in zip(tables, (key, value), strict=True):
            table.index_copy_(0, kwargs["write_index"][allocator.index], states[0].transpose(0, 1))
        key, value = (table.index_select(0, step.read).transpose(0, 1)[None] for table in tables)
        common = [table.index_select(0, step.common).transpose(0, 1) for table in tables]
        places = [slice(step.begin[number], step.end[number]) for number in step.sharing]
        own = [(key[0, :, place], value[0, :, place]) for place in places]
        rows = [step.new[number] for number in step.sharing]
        out[rows] = attend_common(query[0].transpose(0, 1)[rows], common, own, scale)
    for number in {*range(len(step.begin))}.difference(step.sharing):
        mine, keys = slice(step.new[number], step.new[number + 1]), slice(step.begin[number], step.end[number])
        one = attend(query[:, :, mine], key[:, :, keys], value[:, :, keys], scale, sliding_window)
        out[mine] = one[0].transpose(0, 1)
    return out[None], None


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
