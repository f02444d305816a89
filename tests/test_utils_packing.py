"""utils/packing.py: packs and windows change how samples are computed, never what comes out.

python -m pytest tests/test_utils_packing.py
"""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data import Sample
from utils.model import attention_windows
from utils.packing import Pack, attention_mask, make_packs, model_inputs, n_targets, rank_packs, windows
from utils.tensors import token_logprobs

property_test = settings(max_examples=100, deadline=None)


def make_samples(lengths: list[int], vocab_size: int = 800, seed: int = 0) -> list[Sample]:
    """Random samples, half of each supervised, and some prompt between two answers."""
    rng = np.random.default_rng(seed)
    samples = []
    for number, length in enumerate(lengths):
        ids = rng.integers(3, vocab_size, length).astype(np.int32)
        supervised = np.arange(length) >= length // 2
        supervised[length // 4 : length // 3] = True
        supervised[:1] = False
        samples.append(Sample(str(number), str(number // 3), ids, supervised))
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# The mask


@st.composite
def trees(draw: Any) -> list[int | None]:
    """The parents of tokens in depth-first order; None for a tree's first token."""
    parents: list[int | None] = []
    path: list[int] = []  # From the current tree's root to the token before.
    for place in range(draw(st.integers(1, 24))):
        keep = draw(st.integers(0, len(path)))
        path = path[:keep]
        parents.append(path[-1] if path else None)
        path.append(place)
    return parents


def ancestors(parents: list[int | None], place: int) -> list[int]:
    """A token and its ancestors, the nearest first."""
    found = []
    here: int | None = place
    while here is not None:
        found.append(here)
        here = parents[here]
    return found


def pack_of(parents: list[int | None]) -> Pack:
    """A pack of these trees: depth and the index after the last descendant come from counting."""
    places = range(len(parents))
    ends = [place + sum(place in ancestors(parents, other) for other in places) for place in places]
    depths = [len(ancestors(parents, place)) - 1 for place in places]
    nothing = torch.zeros(0, dtype=torch.int64)
    tree = (torch.zeros(len(parents), dtype=torch.int64), torch.tensor(depths), torch.tensor(ends))
    return Pack(*tree, nothing, nothing, nothing.float())


def brute_force(parents: list[int | None], window: int | None) -> list[list[bool]]:
    """Who may attend to whom: a token's ancestors, with a window only the nearest."""
    allowed = [set(ancestors(parents, place)[:window]) for place in range(len(parents))]
    return [[key in allowed[query] for key in range(len(parents))] for query in range(len(parents))]


@given(parents=trees())
@property_test
def test_mask_is_the_ancestor_relation(parents: list[int | None]) -> None:
    mask = attention_mask(pack_of(parents))
    assert mask.shape == (1, 1, len(parents), len(parents)) and mask.dtype == torch.bool
    assert mask[0, 0].tolist() == brute_force(parents, None)


@given(parents=trees(), window=st.integers(1, 8))
@property_test
def test_window_counts_along_branches(parents: list[int | None], window: int) -> None:
    """Between a token and its ancestor lie other branches in the pack, which the window must not count."""
    assert attention_mask(pack_of(parents), window)[0, 0].tolist() == brute_force(parents, window)


# ---------------------------------------------------------------------------------------------------------------------
# Packs


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)


def chains(pack: Pack) -> list[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]:
    """The samples of a pack of chains: their token ids, and their (place, next token) targets."""
    found = []
    start = 0
    targets = list(zip(pack.target_index.tolist(), pack.target_ids.tolist(), strict=True))
    while start < len(pack.input_ids):
        end = int(pack.subtree_end[start])
        assert pack.subtree_end[start:end].tolist() == [end] * (end - start)
        assert pack.position_ids[start:end].tolist() == list(range(end - start))
        own = tuple((place - start, token) for place, token in targets if start <= place < end)
        found.append((tuple(pack.input_ids[start:end].tolist()), own))
        start = end
    return found


def as_chain(sample: Sample) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """What a sample has to look like in a pack."""
    ids = sample.input_ids.tolist()
    return tuple(ids), tuple((n - 1, ids[n]) for n in range(1, len(ids)) if sample.supervised[n])


@given(lengths=LENGTHS, pack_tokens=st.integers(2, 100))
@property_test
def test_packs_hold_every_sample_once(lengths: list[int], pack_tokens: int) -> None:
    samples = make_samples(lengths)
    packs = make_packs(samples, pack_tokens)
    assert sorted(chain for pack in packs for chain in chains(pack)) == sorted(map(as_chain, samples))
    for pack in packs:
        assert len(pack.input_ids) <= pack_tokens or len(chains(pack)) == 1
        assert pack.target_weight.tolist() == [1.0] * len(pack.target_ids)
        assert all(tensor.dtype == torch.int64 for tensor in pack[:5]) and pack.target_weight.dtype == torch.float32
    assert sum(len(pack.target_ids) for pack in packs) == sum(map(n_targets, samples))
    # First fit: no two packs could have been one.
    sizes = sorted(len(pack.input_ids) for pack in packs)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > pack_tokens
    again = make_packs(samples, pack_tokens)
    assert all(torch.equal(one, two) for pair in zip(packs, again, strict=True) for one, two in zip(*pair, strict=True))


def test_no_samples_no_packs() -> None:
    assert make_packs([], 100) == []


def test_a_first_token_cannot_be_predicted() -> None:
    sample = Sample("", "", np.array([5, 6, 7], dtype=np.int32), np.array([True, False, True]))
    (pack,) = make_packs([sample], 10)
    assert n_targets(sample) == 1
    assert pack.target_index.tolist() == [1] and pack.target_ids.tolist() == [7]


@given(lengths=LENGTHS, pack_tokens=st.integers(40, 100), world_size=st.integers(1, 5))
@property_test
def test_ranks_share_the_samples(lengths: list[int], pack_tokens: int, world_size: int) -> None:
    samples = make_samples(lengths)
    by_rank = [rank_packs(samples, pack_tokens, rank, world_size) for rank in range(world_size)]
    assert len({len(packs) for packs in by_rank}) == 1 and by_rank[0]
    full = [pack for packs in by_rank for pack in packs if pack.target_weight.any()]
    fillers = [pack for packs in by_rank for pack in packs if not pack.target_weight.any()]
    assert sorted(chain for pack in full for chain in chains(pack)) == sorted(map(as_chain, samples))
    assert len(fillers) < world_size
    assert sum(pack.target_weight.sum().item() for pack in full) == sum(map(n_targets, samples))


def test_ranks_have_about_the_same_to_do() -> None:
    """40 and 28 tokens against 36 and 32, not 40 and 32 against 36 and 28."""
    samples = make_samples([40, 36, 32, 28])
    by_rank = [rank_packs(samples, 40, rank, 2) for rank in range(2)]
    assert [sum(len(pack.input_ids) for pack in packs) for packs in by_rank] == [68, 68]


# ---------------------------------------------------------------------------------------------------------------------
# Models


def run_pack(model: Any, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the targets, and the summed loss."""
    logits = model(**model_inputs(pack, attention_windows(model.config))).logits[0]
    return logits, -(pack.target_weight * token_logprobs(logits, pack.target_ids)).sum()


def run_alone(model: Any, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a sample through the plain model: no mask, no positions, all logits."""
    ids = torch.from_numpy(sample.input_ids).long()
    places = torch.from_numpy(np.flatnonzero(sample.supervised[1:]))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, places]
    return logits, torch.nn.functional.cross_entropy(logits, ids[places + 1], reduction="sum")


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of all weights."""
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the largest number."""
    return ((one - two).abs().max() / two.abs().max()).item()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "mistral"])
def test_a_pack_computes_what_its_samples_do(kind: str) -> None:
    """Samples longer than gemma3's and mistral's window of 16, so that the window counts."""
    model = make_model(kind, 800)
    samples = make_samples([50, 40, 3, 21, 2])
    (pack,) = make_packs(samples, 200)
    logits, loss = run_pack(model, pack)
    in_pack = sorted(samples, key=lambda sample: -len(sample.input_ids))
    alone = [run_alone(model, sample) for sample in in_pack]
    assert difference(logits, torch.cat([logits for logits, _ in alone])) < 1e-5
    plain_loss = sum(loss for _, loss in alone)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-5)
    ours, plain = gradients(model, loss), gradients(model, plain_loss)
    scale = max(tensor.abs().max() for tensor in plain.values())
    for name in plain:
        assert (ours[name] - plain[name]).abs().max() / scale < 1e-5, name


@pytest.mark.parametrize("kind", ["gemma3", "mistral"])
def test_the_window_is_seen(kind: str) -> None:
    """The test above can fail: without its window the model says something else."""
    model = make_model(kind, 800)
    (pack,) = make_packs(make_samples([50]), 200)
    blind = {name: None for name in attention_windows(model.config)}
    with torch.no_grad():
        logits = model(**model_inputs(pack, blind)).logits[0]
        assert difference(logits, run_pack(model, pack)[0]) > 1e-2


def test_a_tree_computes_what_its_branches_do() -> None:
    """Two answers to one prompt: the prompt stands in the pack once."""
    model = make_model("llama", 800)
    prompt, first, second = [11, 12, 13, 14], [21, 22, 23], [31, 32]
    ids = torch.tensor(prompt + first + second)
    end = torch.tensor([9] * 4 + [7] * 3 + [9] * 2)
    depth = torch.tensor([0, 1, 2, 3, 4, 5, 6, 4, 5])
    index, target_ids = torch.tensor([3, 4, 5, 3, 7]), torch.tensor(first + second)
    with torch.no_grad():
        logits, _ = run_pack(model, Pack(ids, depth, end, index, target_ids, torch.ones(5)))
        for answer, rows in ((first, logits[:3]), (second, logits[3:])):
            alone = model(input_ids=torch.tensor([prompt + answer])).logits[0, 3:-1]
            assert difference(rows, alone) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@given(n=st.integers(1, 60), size=st.integers(1, 20), epochs=st.integers(1, 4), seed=st.integers(0, 2**32))
@property_test
def test_windows_draw_every_sample_once_an_epoch(n: int, size: int, epochs: int, seed: int) -> None:
    steps = windows(n, size, epochs, seed)
    per_epoch = -(-n // size)
    assert len(steps) == per_epoch * epochs
    for epoch in range(epochs):
        own = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(np.concatenate(own).tolist()) == list(range(n))
        assert [len(step) for step in own] == [size] * (n // size) + [n % size] * (n % size > 0)
    assert all(map(np.array_equal, steps, windows(n, size, epochs, seed)))
    # A longer run begins as a shorter one, so that --epochs may grow when a run is resumed.
    assert all(map(np.array_equal, steps, windows(n, size, epochs + 1, seed)[: len(steps)]))


def test_windows_differ_by_epoch_and_seed() -> None:
    first, second = windows(100, 100, 2, seed=1)
    (other,) = windows(100, 100, 1, seed=2)
    orders = {tuple(order) for order in (first, second, other, range(100))}
    assert len(orders) == 4
