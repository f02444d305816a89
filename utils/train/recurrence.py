"""Recurrent layers over packs: a branch begins with the state in which its trunk ends.

A layer with linear attention (the gated delta rule, Mamba-2) or a short convolution takes its tokens one after the
other, so that no mask can tell it which of a pack's tokens are a token's ancestors. Instead the trie is cut where it
branches, and its segments are computed level by level: first those that begin samples, then those below them, each from
the final state of the segment before it. A convolution gets the last tokens before a segment in front of it. That this
is what the whole chains give follows from the layers' recurrences.

The layers of transformers' models call functions of their modules by the same few names; those are wrapped here. So a
kernel for a card that transformers puts in their place is called the same way.

Shapes: L tokens in a pack, S segments of a batch, N tokens of its longest one; K places of a convolution.
"""

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from utils.train.packing import Pack
from utils.weights.loading import HYBRID_LAYERS

RECURRENT = ("linear_attention", "conv")  # Kinds of layers, in the words of transformers' configurations.
CHUNK_TOKENS = 64  # The scans' own, and the most here: they compute so many tokens with matrices.
SMALLEST_CHUNK = 16

Arguments = dict[str, Any]  # By the names that transformers' functions give them.


class Scan(NamedTuple):
    """How a scan's function is called.

    Attributes:
        sequences: Its arguments along the tokens, (1, L, ...).
        neutral: Those of them that leave the state as it is, with that value.
        initial: Argument: the state before the first token.
        final: Argument: whether the state after the last token is returned as well.
    """

    sequences: tuple[str, ...]
    neutral: dict[str, float]
    initial: str
    final: str


DELTA_RULE = Scan(
    ("query", "key", "value", "g", "beta"), {"g": 0.0, "beta": 0.0}, "initial_state", "output_final_state"
)
SCANS = {
    "torch_chunk_gated_delta_rule": DELTA_RULE,
    "chunk_kimi_delta_attention": DELTA_RULE,
    "mamba2_chunk_scan": Scan(("hidden_states", "dt", "B", "C"), {"dt": 0.0}, "initial_states", "return_final_states"),
}  # fmt: skip
CONVOLUTION = "causal_conv1d_fn"
# A whole layer in one kernel, where transformers finds it: it knows nothing of tries, LoRA or padding.
FUSED = "mamba2_split_conv1d_scan_combined"


class Batch(NamedTuple):
    """Segments of about the same length that are computed together.

    Attributes:
        places: (S, N) int64, where their tokens stand in the pack; anything behind the shorter ones' ends.
        is_token: (S, N) bool.
        parents: (S,) int64, the place of each one's parent among the states that the level before left.
        has_children: Whether the next level begins with its states.
    """

    places: torch.Tensor
    is_token: torch.Tensor
    parents: torch.Tensor
    has_children: bool


class Segments:
    """A pack's trie, cut where it branches.

    A class by itself, as what is passed on to a model's layers is not to be taken for tensors or a tuple of them.

    Attributes:
        levels: For each distance from the roots, the batches of its segments.
        order: (L,) int64, where each token of the pack stands in what all batches give, one after the other.
        taken: How many calls of each function have taken it.
    """

    def __init__(self, pack: Pack) -> None:
        """Cuts a pack's trie."""
        self._parents = parents_of(pack)
        device = pack.position_ids.device
        starts, parent = cut(self._parents)
        ends = np.append(starts[1:], len(self._parents))
        self._starts, self._ends, self._device = starts, ends, device
        depth = np.zeros(len(starts), dtype=np.int64)
        for number, above in enumerate(parent.tolist()):
            depth[number] = depth[above] + 1 if above >= 0 else 0
        has_children = np.isin(np.arange(len(starts)), parent)
        self.levels: list[list[Batch]] = []
        written, states = [], {}
        for level in range(depth.max() + 1):
            batches, left = [], {}
            own = np.flatnonzero(depth == level)
            sizes = np.array([padded_tokens(length) for length in (ends[own] - starts[own]).tolist()])
            # Those with children together: only their final states are wanted.
            for keys in sorted({*zip(sizes.tolist(), has_children[own].tolist(), strict=True)}):
                numbers = own[(sizes == keys[0]) & (has_children[own] == keys[1])]
                lengths = ends[numbers] - starts[numbers]
                is_token = np.arange(keys[0]) < lengths[:, None]
                places = np.where(is_token, starts[numbers][:, None] + np.arange(keys[0]), starts[numbers][:, None])
                above = np.array([states.get(one, 0) for one in parent[numbers].tolist()])
                batches.append(Batch(*(torch.from_numpy(array).to(device) for array in (places, is_token, above)),
                                     bool(keys[1])))  # fmt: skip
                written.append(places[is_token])
                if keys[1]:
                    left |= {number: len(left) + place for place, number in enumerate(numbers.tolist())}
            self.levels.append(batches)
            states = left
        self.order = torch.from_numpy(np.argsort(np.concatenate(written))).to(device)
        self.taken = Counter[str]()
        self._with_heads: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def with_heads(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The segments one after the other, each behind the tokens that come before it.

        Args:
            length: So many tokens.

        Returns:
            The places in the pack of all these tokens, from 1, with 0 where a sample has not begun, int64; and (L,)
            where among them each token of the pack stands, int64.
        """
        if length not in self._with_heads:
            parts, kept, written = [], [], 0
            for start, end in zip(self._starts.tolist(), self._ends.tolist(), strict=True):
                before, place = np.zeros(length, dtype=np.int64), self._parents[start]
                for back in range(length):
                    if place < 0:
                        break
                    before[length - 1 - back] = place + 1
                    place = self._parents[place]
                parts += [before, np.arange(start, end) + 1]
                kept.append(np.arange(end - start) + written + length)
                written += length + end - start
            arrays = np.concatenate(parts), np.concatenate(kept)
            self._with_heads[length] = tuple(torch.from_numpy(array).to(self._device) for array in arrays)
        return self._with_heads[length]


def parents_of(pack: Pack) -> np.ndarray:
    """(L,) int64, the place of the token before each one in its samples; -1 for a sample's first."""
    depth = pack.position_ids.cpu().numpy()
    parents, last = np.arange(-1, len(depth) - 1), np.zeros(depth.max() + 2, dtype=np.int64)
    breaks = np.flatnonzero(np.diff(depth, prepend=-1) != 1).tolist()
    start = 0
    for end in [*breaks, len(depth)]:  # In depth-first order a parent is the last token of its depth.
        last[depth[start:end]] = np.arange(start, end)
        if end < len(depth):
            parents[end] = last[depth[end] - 1] if depth[end] else -1
        start = end
    return parents


def cut(parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a trie where it branches.

    Returns:
        Where its segments begin, and the number of each one's parent, -1 for those that begin samples.
    """
    begins = np.zeros(len(parents) + 1, dtype=bool)
    breaks = parents != np.arange(-1, len(parents) - 1)
    breaks[0] = True
    begins[:-1] = breaks
    begins[parents[breaks] + 1] = True  # What follows a parent in the pack is another branch, or nothing.
    starts = np.flatnonzero(begins[:-1])
    return starts, np.where(parents[starts] < 0, -1, np.searchsorted(starts, parents[starts], side="right") - 1)


def padded_tokens(length: int) -> int:
    """A segment's length in its batch: whole chunks, or one smaller chunk."""
    if length > CHUNK_TOKENS // 2:
        return -(-length // CHUNK_TOKENS) * CHUNK_TOKENS
    return max(1 << (length - 1).bit_length(), SMALLEST_CHUNK)


# ---------------------------------------------------------------------------------------------------------------------
# In the place of transformers' functions


def scan_segments(call: Callable[[Arguments], Any], scan: Scan, segments: Segments, given: Arguments) -> torch.Tensor:
    """Computes a scan over a trie.

    Args:
        call: The scan, of its arguments by name.
        scan: How it is called.
        segments: The trie.
        given: The arguments for tokens (1, L, ...).

    Returns:
        (1, L, ...), what the scan gives for each token after its ancestors.
    """
    if "dt" in given:
        given = given | time_steps(**given)
    sequences = {name: given[name][0] for name in scan.sequences}
    found, states = [], None
    for level in segments.levels:
        left = []
        for batch in level:
            own = {name: tensor[batch.places] for name, tensor in sequences.items()}
            for name, value in scan.neutral.items():
                is_token = batch.is_token.reshape(*batch.is_token.shape, *[1] * (own[name].dim() - 2))
                own[name] = own[name].masked_fill(~is_token, value)
            own[scan.initial] = None if states is None else states[batch.parents]
            chunk_size = min(CHUNK_TOKENS, batch.places.shape[1])
            outputs, final = call(given | own | {scan.final: True, "chunk_size": chunk_size})
            found.append(outputs[batch.is_token])
            if batch.has_children:
                left.append(final)
        states = torch.cat(left) if left else None
    return torch.cat(found)[segments.order][None]


def time_steps(
    dt: torch.Tensor,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    **_: Any,
) -> dict[str, Any]:
    """Mamba-2's time steps as its scan would make them of these arguments, and the arguments that leave them so.

    A step of 0 leaves the state as it is. That is no value of `dt` itself where there is a least step.
    """
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    return {"dt": dt.clamp(*dt_limit), "dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, torch.inf)}


def over_segments(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Lets a function of transformers take a trie: another argument, `segments`."""
    names = [*inspect.signature(function).parameters]

    @functools.wraps(function)
    def wrapped(*args: Any, segments: Segments | None = None, **kwargs: Any) -> Any:
        if name == FUSED:
            return None  # The layer then goes on with its parts.
        if segments is None:
            return function(*args, **kwargs)
        segments.taken[name] += 1
        placed = names[: len(args)]

        def call(given: Arguments) -> Any:
            """With the same arguments by place as before: a kernel has others after them."""
            given = dict(given)
            return function(*[given.pop(name) for name in placed], **given)

        given = dict(zip(placed, args, strict=True)) | kwargs
        if name == CONVOLUTION:
            places, kept = segments.with_heads(given["weight"].shape[-1] - 1)
            return call(given | {"hidden_states": pad(given["hidden_states"], (1, 0))[:, :, places]})[:, :, kept]
        scan = SCANS[name]
        outputs = scan_segments(call, scan, segments, given)
        return (outputs, None) if scan is DELTA_RULE or given.get(scan.final) else outputs

    wrapped.takes_segments = True
    return wrapped


def all_taken(config: Any, segments: Segments) -> bool:
    """Whether all recurrent layers of a model have taken the segments that its forward was given."""
    kinds = Counter(config.get_text_config().layer_types)
    scans = sum(count for kind, count in kinds.items() if "linear_attention" in HYBRID_LAYERS.get(kind, {kind}))
    found = sum(segments.taken[name] for name in SCANS)
    return found == scans and segments.taken[CONVOLUTION] >= kinds["conv"]


def use_segments(model: torch.nn.Module) -> None:
    """Lets the recurrent layers of a model of transformers take tries."""
    for module in {sys.modules[type(layer).__module__] for layer in model.modules()}:
        for name in (*SCANS, CONVOLUTION, FUSED):
            function = getattr(module, name, None)
            if function is not None and not hasattr(function, "takes_segments"):
                setattr(module, name, over_segments(function, name))
