"""utils/packing.py: packs and windows change how samples are computed, never what comes out.

python -m pytest tests/test_utils_packing.py
"""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from utils import packing
from utils.attention import attention_mask, model_inputs, usable_masks
from utils.data import Sample
from utils.model import attention_windows
from utils.packing import (
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
from utils.samples import Samples
from utils.tensors import token_logprobs

property_test = settings(max_examples=100, deadline=None)
COST = PackCost(dense_tokens=2048, overhead_tokens=32)
KINDS = ["llama", "qwen2", "qwen3", "gemma3", "mistral"]


def stored(samples: list[Sample], group: list[int] | None = None) -> Samples:
    """Samples as they come from the disk."""
    end = np.cumsum([len(sample.input_ids) for sample in samples], dtype=np.int64)
    return Samples(
        tokens=np.concatenate([sample.input_ids for sample in samples]),
        supervised=np.concatenate([sample.supervised for sample in samples]),
        begin=np.concatenate([[0], end[:-1]]),
        end=end,
        group=np.array(group or [0] * len(samples)),
        targets=np.array([sample.supervised[1:].sum() for sample in samples]),
        ids=[sample.id for sample in samples],
    )


def sample_of(ids: list[int], supervised: list[bool]) -> Sample:
    return Sample("", np.array(ids, dtype=np.int32), np.array(supervised))


@st.composite
def kindred(draw: Any, vocab_size: int = 3, longest: int = 10) -> list[Sample]:
    """Samples over so few tokens that they begin alike, are prefixes of one another, or equal; some have one target."""
    samples = []
    for _ in range(draw(st.integers(1, 12))):
        ids = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=longest))
        if samples and draw(st.booleans()):
            other = draw(st.sampled_from(samples)).input_ids.tolist()
            ids = (other[: draw(st.integers(1, len(other)))] + ids * draw(st.integers(0, 1)))[:longest]
        supervised = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        samples.append(sample_of(ids, supervised))
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
    return Pack(*tree, nothing, nothing, nothing.float(), nothing, nothing)


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
    share_prefix=st.booleans(),
    window_samples=st.integers(1, 12),
)
@property_test
def test_packs_learn_what_samples_teach(
    samples: list[Sample], pack_tokens: int, world_size: int, share_prefix: bool, window_samples: int
) -> None:
    everything = stored(samples)
    windows = draw_windows(everything.group, window_samples, 8, 1, 0)
    plan = plan_packs(everything, windows, Layout(pack_tokens, world_size, share_prefix, COST))
    executed = 0
    for number, window in enumerate(windows):
        by_rank = [rank_packs(everything, plan, number, rank) for rank in range(world_size)]
        assert len({len(packs) for packs in by_rank}) == 1
        packs = [pack for rank in by_rank for pack in rank]
        assert all(len(pack.input_ids) <= pack_tokens for pack in packs)
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


# ---------------------------------------------------------------------------------------------------------------------
# Through models


def family(lengths: list[int], vocab_size: int = 800, seed: int = 0) -> list[Sample]:
    """Samples of two trunks, with answers of these lengths (one is a single token), one twice, one begun by another."""
    random = np.random.default_rng(seed)
    trunks = [random.integers(3, vocab_size, size).tolist() for size in (30, 21)]
    samples = []
    for number, length in enumerate(lengths):
        trunk = trunks[number % 2]
        answer = random.integers(3, vocab_size, length).tolist()
        samples.append(sample_of(trunk + answer, [False] * len(trunk) + [True] * length))
    samples.append(samples[0])
    longer = [*samples[0].input_ids.tolist(), 5, 6]
    return [*samples, sample_of(longer, [False] * (len(longer) - 2) + [True] * 2)]


def loss_of_packs(forward: Any, config: Any, packs: list[Pack]) -> torch.Tensor:
    losses = []
    for pack in packs:
        logits = forward(**model_inputs(pack, attention_windows(config))).logits[0]
        losses.append(-(pack.target_weight * token_logprobs(logits, pack.target_ids)).sum())
    return sum(losses)


def loss_alone(model: Any, samples: list[Sample]) -> torch.Tensor:
    """The textbook's: each sample by itself, no mask, cross-entropy over all its logits."""
    losses = []
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(sample.supervised), ids[0], -100)
        logits = model(input_ids=ids).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
    return sum(losses)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal_gradients(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the largest number."""
    assert ours.keys() == plain.keys() and ours
    scale = max(tensor.abs().max() for tensor in plain.values())
    differing = {name: ((ours[name] - plain[name]).abs().max() / scale).item() for name in plain}
    assert max(differing.values()) < 1e-5, differing


def shared_packs(samples: list[Sample], pack_tokens: int) -> list[Pack]:
    everything = stored(samples)
    plan = plan_packs(everything, [np.arange(len(samples))], Layout(pack_tokens, 1, True, COST))
    assert plan.count(everything, range(1))["executed"] < 0.7 * sum(len(sample.input_ids) for sample in samples)
    return rank_packs(everything, plan, 0, 0)


@pytest.mark.parametrize("pack_tokens", [200, 75])
@pytest.mark.parametrize("kind", KINDS)
def test_packs_compute_what_their_samples_do(kind: str, pack_tokens: int) -> None:
    """Trunks longer than gemma3's and mistral's window of 16, so that the window counts."""
    model, samples = make_model(kind, 800), family([20, 9, 1, 14, 2])
    loss, plain = loss_of_packs(model, model.config, shared_packs(samples, pack_tokens)), loss_alone(model, samples)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert_equal_gradients(gradients(model, loss), gradients(model, plain))


@given(samples=kindred(vocab_size=4), kind=st.sampled_from(KINDS))
@settings(max_examples=40, deadline=None)
def test_any_tries_compute_what_their_samples_do(samples: list[Sample], kind: str) -> None:
    if not what_is_learnt(samples):
        return
    model = make_model(kind, 8)
    packs = rank_packs(
        stored(samples), plan_packs(stored(samples), [np.arange(len(samples))], Layout(10_000, 1, True, COST)), 0, 0
    )
    loss, plain = loss_of_packs(model, model.config, packs), loss_alone(model, samples)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert_equal_gradients(gradients(model, loss), gradients(model, plain))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("tuner", ["lora", "qlora", "full"])
def test_gradients_through_the_engine(
    model_dir: Path, tuner: str, zero_stage: int, checkpointing: bool, ft: Any, train_args: Any
) -> None:
    """The engine's gradients of a window against those of the same samples one by one, through the same weights."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from utils.engine import build_model, make_ds_config, make_engine, start_ranks

    flags = {"tuner": "full" if tuner == "full" else "lora", "train_bnb_enabled": tuner == "qlora"}
    flags |= {"zero_stage": zero_stage, "gradient_checkpointing": checkpointing, "max_grad_norm": 1e9}
    args = ft.build_parser().parse_args(train_args(**flags))
    start_ranks(args.seed)
    samples = family([20, 9, 1, 14, 2])
    path = model_dir / "tiny/gemma3"
    plain_model = build_model(args, path, "fp32", "cpu")
    plain = gradients(plain_model, loss_alone(plain_model, samples))

    # A step of gradient descent at a rate of 1 shows the gradients at every stage.
    ds_config = make_ds_config(args, Path(ft.__file__).with_name("ds_config.json"), "fp32")
    ds_config |= {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}, "zero_allow_untested_optimizer": True}
    sharding = HfDeepSpeedConfig(ds_config) if zero_stage == 3 and tuner != "qlora" else None
    model = build_model(args, path, "fp32", "cpu")
    before = {name: weight.detach() for name, weight in plain_model.named_parameters() if weight.requires_grad}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with deepspeed.zero.GatheredParameters([*trained.values()], modifier_rank=0, enabled=sharding is not None):
        for name, weight in trained.items():
            weight.data.copy_(before[name])  # The first weights of LoRA were drawn anew.
    engine = make_engine(model, args, ds_config, 1)
    for pack in shared_packs(samples, 75):
        logits = engine(**model_inputs(pack, attention_windows(model.config))).logits[0]
        loss = -(pack.target_weight * token_logprobs(logits, pack.target_ids)).sum()
        engine.backward(loss, scale_wrt_gas=False)
    engine.step()
    with deepspeed.zero.GatheredParameters([*trained.values()], enabled=zero_stage == 3):
        ours = {name: before[name] - weight.detach() for name, weight in trained.items()}
    assert_equal_gradients(ours, plain)
    engine.destroy()
    del sharding


@pytest.mark.parametrize("kind", ["gemma3", "mistral"])
def test_the_window_is_seen(kind: str) -> None:
    """The tests above can fail: without its window the model says something else."""
    model, (pack,) = make_model(kind, 800), shared_packs(family([20, 9, 1]), 200)
    blind = {name: None for name in attention_windows(model.config)}
    with torch.no_grad():
        right = model(**model_inputs(pack, attention_windows(model.config))).logits
        assert (model(**model_inputs(pack, blind)).logits - right).abs().max() / right.abs().max() > 1e-2


def test_only_supervised_places_reach_the_output_head() -> None:
    """Forward and backward make no tensor as large as all places' logits would be, nor a fifth of it."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else [made]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return made

    vocab_size = 50_000
    model = make_model("llama", vocab_size)
    samples = [sample_of([*range(300), 1000 + n, 2000 + n], [False] * 300 + [True] * 2) for n in range(5)]
    (pack,) = shared_packs(samples, 400)
    embedding = model.get_input_embeddings().weight.numel()
    with Watch():
        gradients(model, loss_of_packs(model, model.config, [pack]))
    assert len(pack.target_ids) == 10 and largest <= max(embedding, len(pack.target_ids) * vocab_size)
    assert largest < 0.25 * len(pack.input_ids) * vocab_size


def test_attention_dropout_is_honoured() -> None:
    """A model that drops attention weights does so under our mask too, in training only."""
    model, (pack,) = make_model("llama", 800, attention_dropout=0.5), shared_packs(family([20, 9, 1]), 200)
    inputs = model_inputs(pack, attention_windows(model.config))
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.allclose(model(**inputs).logits, model(**inputs).logits)


class Engine(torch.nn.Module):
    """As much of an engine as the probe needs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module, self.device = model, torch.device("cpu")

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_that_take_masks_are_known(kind: str, precision: str) -> None:
    model = make_model(kind, 800).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    windows = attention_windows(model.config)
    assert usable_masks(Engine(model), windows, 256, precision) == (windows, "")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_models_that_take_no_masks_are_found(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention adds a boolean mask to its scores, a window that is not known is left out, a mask is refused."""
    model = make_model("llama", 800).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    model.set_attn_implementation("eager")
    windows, why = usable_masks(Engine(model), {"full_attention": None}, 256, precision)
    assert windows is None and "logits differ" in why
    model = make_model("mistral", 800).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    assert usable_masks(Engine(model), {"sliding_attention": 16}, 256, precision)[0]
    assert usable_masks(Engine(model), {"full_attention": None}, 256, precision)[0] is None
    model = make_model("llama", 800)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda attention_mask=None, **rest: forward(**rest))
    assert usable_masks(Engine(model), {"full_attention": None}, 256, "fp32")[0] is None


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
