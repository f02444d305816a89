"""Samples become packs (token tries laid out in depth-first order) and windows (the samples of one optimizer step).

Samples that begin alike are computed together: their common tokens stand in a pack once, and every sample still sees
its own tokens alone. That this gives the gradients of separate samples is the tree training of arXiv 2511.00413 and the
prefix sharing of arXiv 2410.20305, here for any set of samples.

Shapes: N samples drawn in a run, P packs, W windows; L tokens, S samples, T supervised targets in a pack.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.data.chat import Sample
from utils.data.samples import Samples
from utils.files import create_once, sha256
from utils.weights.loading import count_parameters


class PackCost(NamedTuple):
    """What a pack of L tokens costs, in tokens that pass through the linear layers: L + L^2 / dense_tokens + overhead.

    The square is attention, which is computed for pairs of tokens, masked ones too.
    """

    dense_tokens: float
    overhead_tokens: float


def pack_cost(model: torch.nn.Module, device_name: str) -> PackCost:
    """Estimates what a pack costs, from the model's shape.

    Per token and layer, attention takes 4 L H floating-point operations (H: the width), linear layers 2 for each of
    their weights; counted alike. With SmolLM2-135M on two CPU cores a pack's overhead (reading all weights, calling
    the kernels) was worth 76 tokens, and packs up to 1,100 tokens trained as fast as any. On a card a pack pays for
    thousands of kernel launches before its size matters, so packs are filled there; that figure is not measured.
    """
    config = model.config.get_text_config()
    embeddings = count_parameters(model.get_input_embeddings())[1] * (1 if config.tie_word_embeddings else 2)
    weights = count_parameters(model)[1] - embeddings
    return PackCost(
        dense_tokens=weights / (2 * config.hidden_size * config.num_hidden_layers),
        overhead_tokens=76 if device_name == "cpu" else 4096,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Windows and plans: which samples are computed together


def draw_windows(group: np.ndarray, window_samples: int, group_size: int, epochs: int, seed: int) -> list[np.ndarray]:
    """Draws the samples of every optimizer step of a run; each epoch draws every sample once.

    Args:
        group: The group of every sample of the training set.
        window_samples: Samples in a step, over all ranks.
        group_size: So many samples of one group (fewer if it is smaller) are consecutive; 1 shuffles all. A
            window may end in the midst of them.
        epochs: Passes over the data.
        seed: Same seed, same windows.

    Returns:
        For each step the numbers of its samples; the last step of an epoch has what is left.
    """
    orders = [_draw_epoch(group, group_size, np.random.default_rng([seed, epoch])) for epoch in range(epochs)]
    return [order[start : start + window_samples] for order in orders for start in range(0, len(group), window_samples)]


def _draw_epoch(group: np.ndarray, group_size: int, random: np.random.Generator) -> np.ndarray:
    order = random.permutation(len(group))
    if group_size == 1:
        return order
    order = order[np.argsort(group[order], kind="stable")]
    starts = np.diff(group[order], prepend=-1) != 0
    place = np.arange(len(order))
    place_in_group = place - np.maximum.accumulate(np.where(starts, place, 0))
    chunk = np.cumsum(place_in_group % group_size == 0) - 1
    return order[np.argsort(random.permutation(chunk[-1] + 1)[chunk], kind="stable")]


class Plan(NamedTuple):
    """Where the samples of a run lie. A draw is a sample in a window; samples are drawn once an epoch."""

    order: np.ndarray  # (N,) int64, the drawn samples' numbers, window by window and pack by pack, depth first
    shared: np.ndarray  # (N,) int64, leading tokens that a draw has in common with the one before it in its pack
    pack_end: np.ndarray  # (P,) int64, draws up to the end of a pack
    pack_rank: np.ndarray  # (P,) int64, which rank computes a pack
    window_end: np.ndarray  # (W,) int64, packs up to the end of a window

    def packs(self, window: int) -> range:
        """The packs of a window."""
        return range(self.window_end[window - 1] if window else 0, self.window_end[window])

    def draws(self, pack: int) -> slice:
        """The draws of a pack."""
        return slice(self.pack_end[pack - 1] if pack else 0, self.pack_end[pack])

    def count(self, samples: Samples, windows: range) -> dict[str, int]:
        """Counts the tokens of windows that follow one another.

        Returns:
            "logical": of all samples; "executed": that pass through the model; "supervised": that are learnt.
        """
        packs = range(self.packs(windows.start).start, self.packs(windows[-1]).stop)
        draws = slice(self.draws(packs.start).start, self.draws(packs[-1]).stop)
        numbers = self.order[draws]
        logical = int((samples.end[numbers] - samples.begin[numbers]).sum())
        return {
            "logical": logical,
            "executed": logical - int(self.shared[draws].sum()),
            "supervised": int(samples.targets[numbers].sum()),
        }


class Layout(NamedTuple):
    """How samples are laid out in packs."""

    pack_tokens: int  # The most in a pack; a longer unit gets a pack of its own. 0: every sample gets its own.
    world_size: int  # Ranks; a window's samples are dealt to them in parts of about equal cost.
    share_prefix: bool  # Whether samples that begin alike are computed together.
    cost: PackCost
    # So many samples in a row belong together, as the two answers of a preference pair: windows name units (unit n is
    # the samples n * unit ...), and a unit's samples stand in one pack.
    unit: int = 1
    padded: bool = False  # Whether a pack's samples are the rows of a batch, each as long as the longest.


def make_plan(samples: Samples, windows: list[np.ndarray], layout: Layout, cache: Path) -> Plan:
    """Lays all windows out in packs, or finds the plan that was made before for the same samples and windows.

    Args:
        samples: The samples.
        windows: The units of every step; from `draw_windows`.
        layout: How.
        cache: Folder of earlier plans.
    """
    made_from = hashlib.sha256(f"{layout} {sha256(Path(__file__))}".encode())
    sizes = np.array([len(window) for window in windows])  # The same order may be cut in other windows.
    for array in (samples.begin, samples.end, samples.tokens, sizes, *windows):
        made_from.update(np.ascontiguousarray(array))
    path = cache / f"packs-{made_from.hexdigest()[:16]}.npz"
    with create_once(path) as temporary:
        if temporary:
            with temporary.open("wb") as file:
                np.savez(file, **plan_packs(samples, windows, layout)._asdict())
    return Plan(**np.load(path))


def plan_packs(samples: Samples, windows: list[np.ndarray], layout: Layout) -> Plan:
    """What `make_plan` does, without the cache."""
    pack_tokens, world_size, share_prefix, cost, unit, padded = layout
    order, shared, pack_end, pack_rank, window_end = [], [], [], [], []
    drawn = 0
    for window in windows:
        units = [range(number * unit, (number + 1) * unit) for number in window.tolist()]
        if share_prefix:
            # Sorted by their bytes, samples that begin alike stand together, and a prefix before what it begins.
            units.sort(key=lambda part: samples.tokens[samples.begin[part[0]] : samples.end[part[0]]].tobytes())
        if padded:  # Rows of about the same length stand together.
            units.sort(key=lambda part: max(samples.end[number] - samples.begin[number] for number in part))
        numbers = [number for numbers in units for number in numbers]
        texts = [samples.tokens[samples.begin[number] : samples.end[number]] for number in numbers]
        common = np.array([0, *map(_common_tokens, texts, texts[1:])] if share_prefix else [0] * len(texts))
        own = np.array([len(text) for text in texts]) - common
        # A unit that stands first in its pack has all its tokens, later ones leave out what they share before them.
        before = common[::unit]
        lengths = own.reshape(-1, unit).sum(1) + before
        start = 0
        for rank, end in enumerate(_deal(lengths, before, world_size)):
            rows = own.reshape(-1, unit).max(1) * unit if padded else None
            cuts = _cut(lengths, before, start, end, pack_tokens, cost, rows)
            for pack_start, pack_stop in pairwise([start, *cuts]):
                common[pack_start * unit] = 0  # A pack's first sample shares nothing.
                size = (pack_stop - pack_start) * unit if pack_tokens else 1
                ends = range(drawn + pack_start * unit + size, drawn + pack_stop * unit + 1, size)
                pack_end += ends
                pack_rank += [rank] * len(ends)
            start = end
        drawn += len(numbers)
        order += numbers
        shared.append(common)
        window_end.append(len(pack_end))
    arrays = (order, np.concatenate(shared), pack_end, pack_rank, window_end)
    return Plan(*(np.asarray(array, dtype=np.int64) for array in arrays))


def _common_tokens(one: np.ndarray, two: np.ndarray) -> int:
    shorter = min(len(one), len(two))
    differing = one[:shorter] != two[:shorter]
    first = int(differing.argmax()) if shorter else 0
    return first if shorter and differing[first] else shorter


def _deal(lengths: np.ndarray, shared: np.ndarray, world_size: int) -> list[int]:
    """Cuts a window's samples, in their order, in a part for each rank, so that the largest part is smallest.

    Returns:
        Where each rank's part ends. With fewer samples than ranks the last parts are empty.
    """
    if world_size == 1:
        return [len(lengths)]
    total = np.concatenate([[0], np.cumsum(lengths - shared)])

    def parts(most_tokens: int) -> list[int]:
        ends = [0]
        while ends[-1] < len(lengths):
            # A part's first sample shares nothing with the part before.
            room = most_tokens - shared[ends[-1]] + total[ends[-1]]
            ends.append(max(int(np.searchsorted(total, room, side="right")) - 1, ends[-1] + 1))
        return ends[1:]

    low, high = int(lengths.max()), int(lengths.sum())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(parts(middle)) <= world_size else (middle + 1, high)
    ends = parts(high)
    return ends + [len(lengths)] * (world_size - len(ends))


def _cut(
    lengths: np.ndarray,
    shared: np.ndarray,
    start: int,
    end: int,
    pack_tokens: int,
    cost: PackCost,
    rows: np.ndarray | None = None,
) -> list[int]:
    """Cuts samples start ... end - 1, in their order, in the cheapest packs (dynamic programming over the last pack).

    Args:
        lengths: Of all samples, tokens.
        shared: Tokens that each has in common with the one before it.
        start: The first sample.
        end: Behind the last one.
        pack_tokens: The most in a pack.
        cost: Of a pack.
        rows: Of samples that are the rows of a batch and never get shorter: the tokens of each row if it ends there.

    Returns:
        Where each pack ends.
    """
    if pack_tokens == 0:
        return list(range(start + 1, end + 1))
    total = np.concatenate([[0], np.cumsum((lengths - shared)[start:end])])
    whole = shared[start:end] - total[:-1]  # + total[n]: tokens of a pack from here up to sample n
    price = np.zeros(end - start + 1)  # Of the cheapest packs of the first samples.
    previous = np.zeros(end - start + 1, dtype=np.int64)
    for last in range(1, end - start + 1):
        first = min(int(np.searchsorted(total, total[last] - pack_tokens)), last - 1)
        tokens = whole[first:last] + total[last]
        if rows is not None:
            tokens = np.arange(last - first, 0, -1) * rows[start + last - 1]
        prices = price[first:last] + tokens * (1 + tokens / cost.dense_tokens) + cost.overhead_tokens
        prices[:-1][tokens[:-1] > pack_tokens] = np.inf
        best = int(prices.argmin())
        price[last], previous[last] = prices[best], first + best
    ends = []
    last = end - start
    while last > 0:
        ends.append(start + last)
        last = previous[last]
    return ends[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# Packs: what the model computes


class Pack(NamedTuple):
    """Token tries in depth-first order. Token i may attend to token j iff j <= i < subtree_end[j]: j is its ancestor.

    A sample that shares nothing is a chain: every token's subtree ends where the chain ends. Integers are int64.
    """

    input_ids: torch.Tensor  # (L,)
    position_ids: torch.Tensor  # (L,) depth in the trie
    subtree_end: torch.Tensor  # (L,) index after the last descendant
    target_index: torch.Tensor  # (T,) places whose next token is supervised, once per sample
    target_ids: torch.Tensor  # (T,) those next tokens
    target_weight: torch.Tensor  # (T,) fp32
    sample: torch.Tensor  # (S,) numbers of the samples in it
    sample_targets: torch.Tensor  # (S,) supervised targets of each; they stand in this order

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack on another device."""
        return Pack(*(tensor.to(device) for tensor in self))


def lay_out(samples: Sequence[Sample], shared: Sequence[int]) -> Pack:
    """Writes samples into a pack, each from where it leaves the one before.

    Args:
        samples: So ordered that what begins alike stands together.
        shared: The number of leading tokens that each has in common with the one before; the first's is 0.

    Returns:
        The pack; its `sample` counts from 0.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    starts = np.concatenate([[0], np.cumsum(np.subtract(lengths, shared))]).tolist()
    place = np.zeros(max(lengths), dtype=np.int64)  # By depth: where the current sample's token stands.
    input_ids, position_ids, target_index, target_ids = [], [], [], []
    for sample, length, skipped, start, stop in zip(samples, lengths, shared, starts, starts[1:], strict=False):
        place[skipped:length] = np.arange(start, stop)
        input_ids.append(sample.input_ids[skipped:])
        position_ids.append(np.arange(skipped, length))
        depth = np.flatnonzero(sample.supervised[1:])
        target_index.append(place[depth])
        target_ids.append(sample.input_ids[depth + 1])
    # A subtree ends where the first later sample leaves the branch above it: read from the end.
    end_at = np.full(max(lengths), starts[-1])
    subtree_end = []
    for length, skipped, start in zip(lengths[::-1], shared[::-1], starts[-2::-1], strict=True):
        subtree_end.append(end_at[skipped:length].copy())
        end_at[skipped:] = start
    arrays = (input_ids, position_ids, subtree_end[::-1], target_index, target_ids)
    tensors = [torch.from_numpy(np.concatenate(array).astype(np.int64)) for array in arrays]
    targets = torch.tensor([len(ids) for ids in target_ids])
    return Pack(*tensors, torch.ones(len(tensors[-1])), torch.arange(len(samples)), targets)


def rank_packs(samples: Samples, plan: Plan, window: int, rank: int) -> list[Pack]:
    """One rank's packs of a window; every rank gets the same number, so that collective calls meet.

    Args:
        samples: The samples.
        plan: From `make_plan`.
        window: Its number.
        rank: This one.
    """
    packs = plan.packs(window)
    ranks = plan.pack_rank[packs.start : packs.stop]
    own = []
    for pack in (pack for pack, owner in zip(packs, ranks, strict=True) if owner == rank):
        numbers, shared = plan.order[plan.draws(pack)], plan.shared[plan.draws(pack)]
        laid_out = lay_out([samples[number] for number in numbers], shared.tolist())
        own.append(laid_out._replace(sample=torch.from_numpy(numbers)))
    nothing = torch.zeros(0, dtype=torch.int64)
    one = torch.zeros(1, dtype=torch.int64)
    filler = Pack(one, one, one + 1, nothing, nothing, nothing.float(), nothing, nothing)
    return own + [filler] * (int(np.bincount(ranks).max()) - len(own))
