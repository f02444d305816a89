"""utils/train/forward.py: a pack gives what its samples give by themselves, whichever way a model computes it.

python -m pytest tests/test_utils_train_forward.py
"""

import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HYBRIDS, kindred, make_model, sample_of, stored
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils.data.chat import Sample
from utils.train import attention
from utils.train.attention import use_blocks
from utils.train.forward import (
    PACKED,
    SINGLE,
    PackFormat,
    choose_format,
    model_inputs,
    supervised_logits,
    trie_format,
    use_tries,
)
from utils.train.packing import Layout, Pack, PackCost, plan_packs, rank_packs
from utils.train.tensors import token_logprobs

COST = PackCost(dense_tokens=2048, overhead_tokens=32)
WAYS = ["single", "packed", "shared"]
KINDS = ["llama", "qwen2", "qwen3", "gemma3", "mistral", "gemma2"]


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


def loss_of_packs(model: Any, form: PackFormat, packs: list[Pack]) -> torch.Tensor:
    losses = []
    for pack in packs:
        logits = supervised_logits(model, pack, form)
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


def assert_equal_gradients(
    ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], of_each: float = 1e-5
) -> None:
    """Every number to 1e-5 of the largest; each weight's to `of_each` of its norm, or, where terms cancel and little is
    left, to 1e-7 of all weights' norm."""
    assert ours.keys() == plain.keys() and ours
    scale = max(tensor.abs().max() for tensor in plain.values())
    differing = {name: ((ours[name] - plain[name]).abs().max() / scale).item() for name in plain}
    assert max(differing.values()) < 1e-5, differing
    least = 1e-2 * torch.stack([tensor.norm() for tensor in plain.values()]).norm()
    differing = {
        name: ((ours[name] - plain[name]).norm() / torch.maximum(plain[name].norm(), least)).item() for name in plain
    }
    assert max(differing.values()) < of_each, differing


def shared_packs(samples: list[Sample], pack_tokens: int) -> list[Pack]:
    everything = stored(samples)
    plan = plan_packs(everything, [np.arange(len(samples))], Layout(pack_tokens, 1, True, COST))
    assert plan.count(everything, range(1))["executed"] < 0.7 * sum(len(sample.input_ids) for sample in samples)
    return rank_packs(everything, plan, 0, 0)


@pytest.mark.parametrize("pack_tokens", [200, 75])
@pytest.mark.parametrize("kind", [*KINDS, "qwen2 with windows", *HYBRIDS])
def test_packs_compute_what_their_samples_do(kind: str, pack_tokens: int) -> None:
    """Trunks longer than gemma3's, mistral's and qwen2's window of 16, so that the window counts."""
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1} if " " in kind else {}
    model, samples = make_model(kind.split()[0], 800, **windows), family([20, 9, 1, 14, 2])
    form = trie_format(model)
    assert len(form.windows) == (2 if windows or kind in ("gemma2", "gemma3") else 1)
    assert form.segments == (kind in HYBRIDS) and form.added == (kind == "gemma2")
    plain = loss_alone(model, samples)
    expected = gradients(model, plain)
    use_tries(model)
    loss = loss_of_packs(model, form, shared_packs(samples, pack_tokens))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert_equal_gradients(gradients(model, loss), expected)


def all_packs(samples: list[Sample], layout: Layout) -> list[Pack]:
    everything = stored(samples)
    return rank_packs(everything, plan_packs(everything, [np.arange(len(samples))], layout), 0, 0)


@given(samples=kindred(vocab_size=4), kind=st.sampled_from([*KINDS, *HYBRIDS]))
@example(samples=[sample_of([0, 0, 0], [False, False, True])], kind="llama")  # Attention has no gradient here.
@settings(max_examples=60, deadline=None)
def test_any_tries_compute_what_their_samples_do(samples: list[Sample], kind: str) -> None:
    if not any(sample.supervised[1:].any() for sample in samples):
        return
    model = make_model(kind, 8)
    use_tries(model)
    loss = loss_of_packs(model, trie_format(model), all_packs(samples, Layout(10_000, 1, True, COST)))
    plain = loss_alone(model, samples)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert_equal_gradients(gradients(model, loss), gradients(model, plain))


@given(samples=kindred(vocab_size=4), kind=st.sampled_from(["llama", "gemma3", "gpt2", "bloom", "mamba", "qwen3_5"]))
@settings(max_examples=30, deadline=None)
def test_any_batches_compute_what_their_samples_do(samples: list[Sample], kind: str) -> None:
    """Positions that turn, that are learnt, and distances; and recurrent layers, which see what is padded."""
    if not any(sample.supervised[1:].any() for sample in samples):
        return
    model = make_model(kind, 8)
    packs = all_packs(samples, Layout(20, 1, False, COST, padded=True))
    loss, plain = loss_of_packs(model, PACKED, packs), loss_alone(model, samples)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert_equal_gradients(gradients(model, loss), gradients(model, plain))


@pytest.mark.parametrize(
    ("kind", "tuner", "zero_stage", "checkpointing"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case[2:] != (3, True) or case[:2] == ("qwen3_5", "qlora")))
        for case in [
            *product(["gemma3"], ["lora", "qlora", "full"], [0, 2, 3], [False, True]),
            *[(kind, "lora", stage, stage == 3) for kind in KINDS if kind != "gemma3" for stage in (2, 3)],
            *[("qwen3_5", tuner, stage, True) for tuner in ("lora", "qlora", "full") for stage in (0, 3)],
            *[("granitemoehybrid", "full", stage, stage == 3) for stage in (2, 3)],
        ]
    ],
)
def test_gradients_through_the_engine(
    kind: str,
    tuner: str,
    zero_stage: int,
    checkpointing: bool,
    model_dir: Path,
    ft: Any,
    train_args: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine's gradients of a window against those of the same samples one by one, through the same weights."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from utils.train.engine import build_model, make_ds_config, make_engine, start_ranks

    flags = {"tuner": "full" if tuner == "full" else "lora", "train_bnb_enabled": tuner == "qlora"}
    flags |= {"zero_stage": zero_stage, "gradient_checkpointing": checkpointing, "max_grad_norm": 1e9}
    args = ft.build_parser().parse_args(train_args(**flags))
    start_ranks(args.seed)
    samples = family([20, 9, 1, 14, 2])
    path = model_dir / "tiny" / kind
    plain_model = build_model(args, path, "fp32", "cpu")
    for name, weight in plain_model.named_parameters():
        if "lora_B" in name:  # As PEFT makes it, of zeros, it leaves A without a gradient.
            weight.data.normal_(std=0.1)
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
    use_tries(engine.module)
    monkeypatch.setattr(attention, "BLOCK_TOKENS", 16)
    for pack in shared_packs(samples, 75):
        logits = supervised_logits(engine, pack, trie_format(model))
        loss = -(pack.target_weight * token_logprobs(logits, pack.target_ids)).sum()
        engine.backward(loss, scale_wrt_gas=False)
    engine.step()
    with deepspeed.zero.GatheredParameters([*trained.values()], enabled=zero_stage == 3):
        ours = {name: before[name] - weight.detach() for name, weight in trained.items()}
    # The projection of qwen3_5's decays loses digits: with its 4-bit weights the rows of a batch are as far apart.
    assert_equal_gradients(ours, plain, 5e-5 if (kind, tuner) == ("qwen3_5", "qlora") else 1e-5)
    engine.destroy()
    del sharding


@pytest.mark.parametrize("kind", ["gemma3", "mistral"])
def test_the_window_is_seen(kind: str) -> None:
    """The tests above can fail: without its window the model says something else."""
    model, (pack,) = make_model(kind, 800), shared_packs(family([20, 9, 1]), 200)
    form = trie_format(model)
    blind = form._replace(windows=dict.fromkeys(form.windows))
    with torch.no_grad():
        right = supervised_logits(model, pack, form)
        assert (supervised_logits(model, pack, blind) - right).abs().max() / right.abs().max() > 1e-2


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
        gradients(model, loss_of_packs(model, trie_format(model), [pack]))
    assert len(pack.target_ids) == 10 and largest <= max(embedding, len(pack.target_ids) * vocab_size)
    assert largest < 0.25 * len(pack.input_ids) * vocab_size


def test_attention_dropout_is_honoured() -> None:
    """A model that drops attention weights does so under our mask too, in training only."""
    model, (pack,) = make_model("llama", 800, attention_dropout=0.5), shared_packs(family([20, 9, 1]), 200)
    inputs = model_inputs(pack, trie_format(model))
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
@pytest.mark.parametrize("kind", [*KINDS, *HYBRIDS])
def test_models_that_compute_tries_are_known(kind: str, precision: str) -> None:
    model = make_model(kind, 800).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    form, why_not = choose_format(Engine(model), 256, precision)
    assert (form.way, why_not) == ("shared", "") and form == trie_format(model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_models_that_compute_no_tries_are_found(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask without the window, one that is ignored, one that is refused; those compute batches, or single samples."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with monkeypatch.context() as patch:
        patch.setattr("utils.train.forward.attention_windows", lambda config: {"full_attention": None})
        form, why_not = choose_format(Engine(make_model("mistral", 800).to(dtype)), 256, precision)
    assert form is PACKED and "logits differ" in why_not and "rows of a batch" in why_not
    form, why_not = choose_format(Engine(make_model("bloom", 800).to(dtype)), 256, precision)
    assert form is PACKED and "ValueError" in why_not
    model = make_model("llama", 800).to(dtype)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda attention_mask=None, position_ids=None, **rest: forward(**rest))
    form, why_not = choose_format(Engine(model), 256, precision)
    assert form is SINGLE and "one by one" in why_not


@pytest.mark.parametrize(("kind", "precision"), [("mamba2", "bf16"), ("lfm2", "bf16"), ("falcon_h1", "fp32")])
def test_models_that_see_what_is_padded_are_found(kind: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that has forgotten it at the end of a long row has not at the end of a short one."""
    model = make_model(kind, 800).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    for module in {sys.modules[type(layer).__module__] for layer in model.modules()}:
        if hasattr(module, "apply_mask_to_padding_states"):
            monkeypatch.setattr(module, "apply_mask_to_padding_states", lambda states, mask: states)
    assert choose_format(Engine(model), 256, precision, most="packed")[0] is SINGLE
    monkeypatch.undo()
    assert choose_format(Engine(model), 256, precision, most="packed")[0] is PACKED


def test_another_model_may_know_no_better_way() -> None:
    model = make_model("llama", 800)
    assert [choose_format(model, 256, "fp32", most=way)[0].way for way in WAYS] == WAYS


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["jamba", "mamba2", "mamba"])
def test_recurrent_layers_that_take_no_segments_are_found(kind: str, precision: str) -> None:
    """Jamba's would go on from the branch before; at first so little that the logits hardly show it."""
    model = make_model(kind, 800).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    form, why_not = choose_format(Engine(model), 256, precision)
    assert form is PACKED and ("cannot begin with a state" in why_not) == (kind == "jamba")


def test_too_little_memory_says_nothing_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends; it would go on slowly, sample by sample, in less memory."""
    model = make_model("llama", 800)

    def forward(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        choose_format(Engine(model), 256, "fp32")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma2"])
def test_blocks_change_nothing(kind: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients of a pack in blocks of about 16 queries and in one."""
    model = make_model(kind, 800).train()
    samples = sorted(family([20, 9, 1, 14, 2]), key=lambda sample: sample.input_ids.tobytes())
    everything = stored(samples)
    plan = plan_packs(everything, [np.arange(len(samples))], Layout(10_000, 1, True, COST))
    packs = rank_packs(everything, plan, 0, 0)
    dense = loss_of_packs(model, trie_format(model), packs)
    expected = gradients(model, dense)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    monkeypatch.setattr(attention, "BLOCK_TOKENS", 16)
    blocks = []

    def counted(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        blocks.append(query.shape[2])
        return sdpa_attention_forward(module, query, *rest, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    use_blocks(model)
    loss = loss_of_packs(model, trie_format(model), packs)
    assert loss.item() == pytest.approx(dense.item(), rel=1e-6)
    assert_equal_gradients(gradients(model, loss), expected)
    assert len(blocks) > 2 * len(packs) and max(blocks) < 24, "computed in blocks"


def test_models_without_sdpa_are_left_alone() -> None:
    model = make_model("gemma2", 800)
    model.set_attn_implementation("eager")
    use_blocks(model)
    assert model.config._attn_implementation == "eager"


def test_a_model_in_blocks_still_generates() -> None:
    """Without a mask of ours it is transformers' SDPA."""
    model = make_model("gemma3", 800).eval()
    ids = torch.randint(3, 800, (2, 40), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, **options)
    use_blocks(model)
    assert model.config._attn_implementation == "sdpa_in_blocks"
    assert torch.equal(model.generate(ids, **options), before)
