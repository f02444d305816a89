"""utils/train/packing.py: packs and windows change how samples are computed, never what comes out.

python -m pytest tests/test_utils_train_packing.py
"""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import kindred, sample_of, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.chat import Sample
from utils.train import packing
from utils.train.attention import attention_mask
from utils.train.packing import (
    Layout,
    Pack,
    PackCost,
    draw_windows,
    lay_out,
    make_plan,
    pack_cost,
    plan_packs,
    rank_packs,
)

property_test = settings(max_examples=100, deadline=None)
COST = PackCost(dense_tokens=2048, overhead_tokens=32)


# ---------------------------------------------------------------------------------------------------------------------
# Plans and packs


def what_is_learnt(samples: list[Sample]) -> Counter[tuple[tuple[int, ...], int]]:
    """Every supervised token of samples, with all the tokens before it."""
    return Counter(
        (tuple(sample.input_ids[:place].tolist()), int(sample.input_ids[place]))
        for sample in samples
        for place in range(1, len(sample.input_ids))
        if sample.supervised[place]
    )


def what_packs_learn(packs: list[Pack]) -> Counter[tuple[tuple[int, ...], int]]:
    """The same of packs: what stands before a token is what the mask lets its predecessor see."""
    learnt: Counter[tuple[tuple[int, ...], int]] = Counter()
    for pack in packs:
        mask = attention_mask(pack)[0, 0]
        for index, token, weight in zip(*(tensor.tolist() for tensor in pack[3:6]), strict=True):
            assert weight == 1
            seen = mask[index].nonzero()[:, 0]
            assert pack.position_ids[seen].tolist() == list(range(len(seen)))
            learnt[tuple(pack.input_ids[seen].tolist()), token] += 1
    return learnt


@given(
    samples=kindred(),
    pack_tokens=st.integers(10, 40),
    world_size=st.integers(1, 4),
    kind=st.sampled_from(["shared", "chains", "padded"]),
    window_samples=st.integers(1, 12),
)
@property_test
def test_packs_learn_what_samples_teach(
    samples: list[Sample], pack_tokens: int, world_size: int, kind: str, window_samples: int
) -> None:
    everything = stored(samples)
    windows = draw_windows(everything.group, window_samples, 8, 1, 0)
    layout = Layout(pack_tokens, world_size, kind == "shared", COST, padded=kind == "padded")
    plan = plan_packs(everything, windows, layout)
    executed = 0
    for number, window in enumerate(windows):
        by_rank = [rank_packs(everything, plan, number, rank) for rank in range(world_size)]
        assert len({len(packs) for packs in by_rank}) == 1
        packs = [pack for rank in by_rank for pack in rank]
        assert all(len(pack.input_ids) <= pack_tokens for pack in packs)
        if kind == "padded":
            rows = [everything.lengths[pack.sample.tolist()] for pack in packs if len(pack.sample)]
            assert all(len(own) * own.max() <= pack_tokens for own in rows)
        assert what_packs_learn(packs) == what_is_learnt([samples[place] for place in window])
        count = plan.count(everything, range(number, number + 1))
        assert count["logical"] == sum(len(samples[place].input_ids) for place in window)
        assert count["supervised"] == what_is_learnt([samples[place] for place in window]).total()
        fillers = [pack for pack in packs if len(pack.input_ids) == 1 and not len(pack.target_ids)]
        assert count["executed"] <= sum(len(pack.input_ids) for pack in packs) <= count["executed"] + len(fillers)
        executed += count["executed"]
    assert plan.count(everything, range(len(windows)))["executed"] == executed


@given(samples=kindred())
@property_test
def test_a_pack_holds_every_common_token_once(samples: list[Sample]) -> None:
    """As many tokens as the samples have different beginnings: that is what a trie is."""
    everything = stored(samples)
    plan = plan_packs(everything, [np.arange(len(samples))], Layout(10_000, 1, True, COST))
    (pack,) = rank_packs(everything, plan, 0, 0)
    beginnings = {tuple(s.input_ids[: n + 1].tolist()) for s in samples for n in range(len(s.input_ids))}
    assert len(pack.input_ids) == len(beginnings)
    assert all(tensor.dtype == torch.int64 for tensor in pack[:5]) and pack.target_weight.dtype == torch.float32


def test_a_written_out_pack() -> None:
    """Two answers and an identical third to one prompt, and another prompt: the trie in depth-first order."""
    prompt, other = [11, 12], [15]
    texts = [[*prompt, 21, 22], [*prompt, 31], [*prompt, 31], [*other, 41]]
    samples = [sample_of(ids, [token > 20 for token in ids]) for ids in texts]
    pack = lay_out(samples, [0, 2, 3, 0])
    assert pack.input_ids.tolist() == [11, 12, 21, 22, 31, 15, 41]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert pack.subtree_end.tolist() == [5, 5, 4, 4, 5, 7, 7]
    assert pack.target_index.tolist() == [1, 2, 1, 1, 5] and pack.target_ids.tolist() == [21, 22, 31, 31, 41]


def test_a_trie_larger_than_a_pack_repeats_its_trunk() -> None:
    samples = [sample_of([*range(20), 100 + number, 200 + number], [False] * 20 + [True] * 2) for number in range(6)]
    everything = stored(samples)
    plan = plan_packs(everything, [np.arange(6)], Layout(26, 1, True, COST))
    packs = rank_packs(everything, plan, 0, 0)
    assert [len(pack.input_ids) for pack in packs] == [26, 26]
    assert all(pack.input_ids[:20].tolist() == list(range(20)) for pack in packs)
    assert plan.count(everything, range(1)) == {"logical": 132, "executed": 52, "supervised": 12}


def partitions(n: int) -> Iterator[list[int]]:
    """All ways to cut n things in a row: where the parts end."""
    for size in range(n):
        for inner in combinations(range(1, n), size):
            yield [*inner, n]


ROWS = st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1)), min_size=1, max_size=7)


def sizes(lengths: list[int], shared: list[int], ends: list[int]) -> list[int]:
    """Tokens of the parts of a row of samples; each part's first sample is whole."""
    starts = [0, *ends[:-1]]
    return [sum(lengths[a:b]) - sum(shared[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]


def as_row(row: list[tuple[int, float]]) -> tuple[list[int], list[int]]:
    lengths = [length for length, _ in row]
    shared = [0] + [
        int(part * min(one, two)) for one, two, (_, part) in zip(lengths, lengths[1:], row[1:], strict=False)
    ]
    return lengths, shared


@given(row=ROWS, pack_tokens=st.integers(30, 80), dense_tokens=st.integers(10, 2000), overhead=st.integers(0, 200))
@property_test
def test_the_cut_is_the_cheapest(
    row: list[tuple[int, float]], pack_tokens: int, dense_tokens: int, overhead: int
) -> None:
    lengths, shared = as_row(row)

    def price(ends: list[int]) -> float:
        own = sizes(lengths, shared, ends)
        return sum(n + n * n / dense_tokens + overhead for n in own) if max(own) <= pack_tokens else float("inf")

    found = packing._cut(
        np.array(lengths), np.array(shared), 0, len(row), pack_tokens, PackCost(dense_tokens, overhead)
    )
    assert price(found) == pytest.approx(min(map(price, partitions(len(row)))))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7), overhead=st.integers(0, 200))
@property_test
def test_the_cut_of_rows_is_the_cheapest(lengths: list[int], overhead: int) -> None:
    """All rows of a batch are as long as the longest."""
    lengths = sorted(lengths)

    def price(ends: list[int]) -> float:
        tokens = [(end - start) * lengths[end - 1] for start, end in zip([0, *ends], ends, strict=False)]
        return sum(n + n * n / 500 + overhead for n in tokens) if max(tokens) <= 60 else float("inf")

    rows = np.array(lengths)
    found = packing._cut(rows, np.zeros_like(rows), 0, len(rows), 60, PackCost(500, overhead), rows)
    assert price(found) == pytest.approx(min(map(price, partitions(len(lengths)))))


@pytest.mark.parametrize("tied", [True, False])
def test_the_cost_of_a_pack_comes_from_the_shape_of_the_model(tied: bool) -> None:
    """A layer of 2 hidden units in 1 head, 3 between: 4 x 4 weights for attention, 3 x 6 for the MLP, 2 + 2 of norms.

    All 2 layers and the last norm: 78. Attention over d tokens costs as much as the weights when 4 d x 2 x 2 layers =
    2 x 78 operations, d = 9.75. Embeddings do not count, once or twice.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=2,
        intermediate_size=3,
        num_attention_heads=1,
        num_hidden_layers=2,
        tie_word_embeddings=tied,
    )
    assert pack_cost(LlamaForCausalLM(config), "cpu") == pytest.approx((78 / 8, 76))


@given(row=ROWS, world_size=st.integers(1, 4))
@property_test
def test_ranks_get_equal_parts(row: list[tuple[int, float]], world_size: int) -> None:
    lengths, shared = as_row(row)
    ends = packing._deal(np.array(lengths), np.array(shared), world_size)
    assert len(ends) == world_size and ends[-1] == len(row)
    largest = max(sizes(lengths, shared, [*dict.fromkeys(ends)]))
    best = min(max(sizes(lengths, shared, cut)) for cut in partitions(len(row)) if len(cut) <= world_size)
    assert largest == best


def test_a_plan_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = stored([sample_of([1, 2, 3], [False, True, True]), sample_of([1, 2, 4], [False, False, True])])
    layout = ([np.arange(2)], Layout(10, 1, True, COST), tmp_path)
    first = make_plan(samples, *layout)
    monkeypatch.setattr(packing, "plan_packs", lambda *_: pytest.fail("made again"))
    again = make_plan(samples, *layout)
    assert all(map(np.array_equal, first, again)) and again.count(samples, range(1))["executed"] == 4
    monkeypatch.undo()
    unshared = make_plan(samples, [np.arange(2)], Layout(10, 1, False, COST), tmp_path)
    assert unshared.count(samples, range(1))["executed"] == 6


def test_the_same_order_in_other_windows_is_another_plan(tmp_path: Path) -> None:
    samples = stored([sample_of([1, 2, number], [False, True, True]) for number in range(4)])
    layout = (Layout(10, 1, True, COST), tmp_path)
    assert len(make_plan(samples, [np.arange(4)], *layout).window_end) == 1
    assert len(make_plan(samples, [np.arange(2), np.arange(2, 4)], *layout).window_end) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Windows


@given(
    group=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    size=st.integers(1, 20),
    group_size=st.integers(1, 10),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
@property_test
def test_windows_draw_every_sample_once_an_epoch(
    group: list[int], size: int, group_size: int, epochs: int, seed: int
) -> None:
    n = len(group)
    steps = draw_windows(np.array(group), size, group_size, epochs, seed)
    per_epoch = -(-n // size)
    assert len(steps) == per_epoch * epochs
    for epoch in range(epochs):
        own = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        order = np.concatenate(own)
        assert sorted(order.tolist()) == list(range(n))
        assert [len(step) for step in own] == [size] * (n // size) + [n % size] * (n % size > 0)
        # A group of m falls into ceil(m / group_size) pieces, so it has no more beginnings in the order.
        beginnings = Counter(
            group[place] for k, place in enumerate(order) if k == 0 or group[place] != group[order[k - 1]]
        )
        if group_size > 1:
            assert all(beginnings[name] <= -(-many // group_size) for name, many in Counter(group).items())
    assert all(map(np.array_equal, steps, draw_windows(np.array(group), size, group_size, epochs, seed)))
    # A longer run begins as a shorter one, so that --epochs may grow when a run is resumed.
    longer = draw_windows(np.array(group), size, group_size, epochs + 1, seed)
    assert all(map(np.array_equal, steps, longer[: len(steps)]))


def test_windows_mix_groups() -> None:
    """40 groups of 20 in pieces of 4: a window of 32 holds 8 pieces, seldom two of one group."""
    group = np.repeat(np.arange(40), 20)
    steps = draw_windows(group, 32, 4, 1, seed=0)
    assert np.mean([len(set(group[step])) for step in steps]) > 6
    assert all(max(Counter(group[step].tolist()).values()) <= 12 for step in steps)


def test_windows_differ_by_epoch_and_seed() -> None:
    group = np.arange(100) // 5
    first, second = draw_windows(group, 100, 3, 2, seed=1)
    (other,) = draw_windows(group, 100, 3, 1, seed=2)
    orders = {tuple(order) for order in (first, second, other, range(100))}
    assert len(orders) == 4
