"""Attention for continuous batching: each request's tokens look at that request's keys alone.

transformers computes a batch of requests with SDPA as one sequence under a mask, each request against the keys of all:
with 32 of them, 32 times the work. Flash attention, which does not, is CUDA's alone. The name holds "flash", since that
is how transformers decides that no mask is needed.

Requests that write, one token each, are computed together, those of like length. What all of them begin with, such as
the system prompt, is read once a step and not once a request: "cascade attention" in vLLM and FlashInfer.

Shapes: T new tokens of all requests, K keys of all, H heads, G heads that share keys, D per head; R requests with one
new token, P keys that all of them begin with, N further ones.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
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
    mask = None
    if new < every or (window is not None and every > window):
        place = torch.arange(every, device=query.device)
        back = place[every - new :, None] - place
        mask = (back >= 0) if window is None else (back >= 0) & (back < window)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
    )


class Batch(NamedTuple):
    """Requests with one new token each, that are computed together.

    Attributes:
        rows: (R,) int64, the places of their tokens among the new ones.
        places: (H / G, R, N) int32, of the keys that each has for itself, in a table of all slots' groups of heads;
            rows with fewer end in repetitions of the last one.
        bias: (R, 1, N) fp32, -inf at the repetitions.
    """

    rows: torch.Tensor
    places: torch.Tensor
    bias: torch.Tensor


class Step(NamedTuple):
    """Which keys a step reads.

    Attributes:
        common: (H / G, P) int32, places of the keys that all requests with one new token begin with, as in `Batch`.
        batches: These requests.
        others: Of each request with several new tokens, or like no other in length, which of the new ones are its own,
            and its keys' slots.
    """

    common: torch.Tensor
    batches: list[Batch]
    others: list[tuple[slice, torch.Tensor]]


@lru_cache(maxsize=4)  # For kinds of layers. The library makes the arguments anew in each step.
def plan_step(
    slots: torch.Tensor,
    new_begin: torch.Tensor,
    every_begin: torch.Tensor,
    n_groups: int,
    window: int | None,
    in_cache: bool,
) -> Step:
    """Finds what is computed together; all layers of a kind have the same arguments.

    Args:
        slots: (K,) int64, where the keys of each request are in the cache, request after request.
        new_begin: Where each request's new tokens begin, and the end.
        every_begin: Where each request's keys begin, and the end.
        n_groups: H / G.
        window: How many tokens, itself included, a token sees; None: all before it.
        in_cache: Whether keys are read from the cache, by `slots`; else they lie request after request.
    """
    new, every = new_begin.tolist(), every_begin.tolist()
    if not in_cache:
        slots = torch.arange(every[-1], device=slots.device)
    keys = [slots[begin:end] for begin, end in pairwise(every)]
    single = [number for number, (begin, end) in enumerate(pairwise(new)) if end - begin == 1]
    if window is not None:
        keys = [own[-window:] if number in single else own for number, own in enumerate(keys)]
    common = _in_common([keys[number] for number in single]) if in_cache and window is None else 0
    groups, batches = torch.arange(n_groups, device=slots.device), []
    alike = _of_like_length(single, [len(own) - common for own in keys])
    alone = {number for number in range(len(keys)) if number not in single or [number] in alike}
    for numbers in (numbers for numbers in alike if len(numbers) > 1):
        own = [keys[number][common:] for number in numbers]
        place = torch.arange(len(own[0]), device=slots.device)
        lengths = torch.tensor([len(one) for one in own], device=slots.device)
        bias = torch.zeros(len(own), len(place), device=slots.device)
        bias.masked_fill_(place >= lengths[:, None], -torch.inf)
        table = torch.stack([one[place.clamp(max=len(one) - 1)] for one in own])
        rows = torch.tensor([new[number] for number in numbers], device=slots.device)
        batches.append(Batch(rows, (table * n_groups + groups[:, None, None]).int(), bias[:, None]))
    others = [(slice(new[n], new[n + 1]), own) for n, own in enumerate(keys) if n in alone]
    shared = keys[single[0]][:common] if single else slots[:0]
    return Step((shared * n_groups + groups[:, None]).int(), batches, others)


def _in_common(keys: Sequence[torch.Tensor]) -> int:
    """How many slots all requests begin with; one at least is left to each."""
    if len(keys) < 2:
        return 0
    shortest = min(map(len, keys)) - 1
    table = torch.stack([own[:shortest] for own in keys])
    count = int((table == table[0]).all(0).cumprod(0).sum())
    return count if count >= LEAST_COMMON else 0


def _of_like_length(numbers: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Requests that are filled up to the longest of them: never more than to the double."""
    found: list[list[int]] = []
    for number in sorted(numbers, key=lengths.__getitem__, reverse=True):
        if not found or lengths[found[-1][0]] > 2 * lengths[number]:
            found.append([])
        found[-1].append(number)
    return found


def attend_together(
    query: torch.Tensor,
    own: Sequence[torch.Tensor],
    common: Sequence[torch.Tensor],
    bias: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Requests with one new token each, which sees all of its request's keys.

    Args:
        query: (R, H, D).
        own: Keys and values of each request, (H / G, R, N, D) each.
        common: Keys and values that all of them begin with, (H / G, P, D) each.
        bias: (R, 1, N), added to the products with own keys.
        scale: Of the products.

    Returns:
        (R, H, D).
    """
    (keys, values), (common_keys, common_values) = own, common
    n_groups, n_common, _ = common_keys.shape
    # Products in 16 bits would be rounded before the softmax, which fused kernels do not do.
    heads = (query.float() * scale).unflatten(1, (n_groups, -1)).transpose(0, 1)  # (H / G, R, G, D)
    # All requests' heads of a group as if they were tokens: common keys are read once.
    to_common = (heads.flatten(1, 2) @ common_keys.float().mT).unflatten(1, heads.shape[1:3])
    probs = torch.cat([to_common, heads @ keys.float().mT + bias], -1).softmax(-1).to(query.dtype)
    of_common = (probs[..., :n_common].flatten(1, 2) @ common_values).view_as(heads)
    return (of_common + probs[..., n_common:] @ values).transpose(0, 1).flatten(1, 2)


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
    in_cache = type(allocator) is FullAttentionCacheAllocator and len(slots) > 0
    if in_cache:
        tables = allocator._kv_token_views[layer]
        for table, states in zip(tables, (key, value), strict=True):
            table.index_copy_(0, kwargs["write_index"][allocator.index], states[0].transpose(0, 1))
    else:  # What a window has left behind is overwritten: keys are read before that.
        read = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
        tables = [states[0].transpose(0, 1) for states in read]
    step = plan_step(slots, cu_seq_lens_q, every, key.shape[1], sliding_window, in_cache)
    out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    flat = [table.reshape(-1, table.shape[2]) for table in tables]
    common = [table.index_select(0, step.common.flatten()).unflatten(0, step.common.shape) for table in flat]
    for rows, places, bias in step.batches:
        own = [table.index_select(0, places.flatten()).unflatten(0, places.shape) for table in flat]
        out[rows] = attend_together(query[0, :, rows].transpose(0, 1), own, common, bias, scale)
    for mine, own_slots in step.others:
        keys, values = (table.index_select(0, own_slots).transpose(0, 1)[None] for table in tables)
        out[mine] = attend(query[:, :, mine], keys, values, scale, sliding_window)[0].transpose(0, 1)
    return out[None], None


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
