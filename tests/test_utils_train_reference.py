"""utils/train/reference.py: what the policy was before it learnt, computed now or read from disk.

python -m pytest tests/test_utils_train_reference.py
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, sample_of, stored
from peft import LoraConfig, get_peft_model
from test_utils_train_forward import COST, KINDS, Engine

from utils.data.chat import Sample
from utils.data.samples import Samples
from utils.train.engine import start_ranks
from utils.train.forward import PACKED, SINGLE, PackFormat, trie_format
from utils.train.packing import Layout, Pack, plan_packs, rank_packs
from utils.train.reference import (
    compute_or_load,
    precompute_reference,
    reference_logps,
    target_begin,
    target_places,
    token_logps,
)

PROMPTS = [30, 21]  # Tokens; longer than the windows of 16.
ANSWERS = [(5, 9), (1, 12), (7, 3)]  # Chosen and rejected; the first two pairs have the same prompt.
LAYOUT = Layout(pack_tokens=150, world_size=1, share_prefix=True, cost=COST, unit=2)


def pairs() -> Samples:
    """Three pairs of random tokens."""
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 800, size).tolist() for size in PROMPTS]
    samples = []
    for prompt, sizes in zip([prompts[0], prompts[0], prompts[1]], ANSWERS, strict=True):
        for size in sizes:
            answer = random.integers(3, 800, size).tolist()
            samples.append(sample_of(prompt + answer, [False] * len(prompt) + [True] * size))
    return stored(samples)


def packs_of(samples: Samples) -> list[Pack]:
    plan = plan_packs(samples, [np.arange(len(ANSWERS))], LAYOUT)
    assert plan.count(samples, range(1))["executed"] < samples.lengths.sum() - 2 * PROMPTS[0]
    return rank_packs(samples, plan, 0, 0)


def alone(model: Any, sample: Sample) -> torch.Tensor:
    """The textbook's: log-softmax of one answer's logits."""
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0][torch.from_numpy(sample.supervised[1:])]


def with_lora(kind: str) -> Any:
    """A model whose adapter changes what it says."""
    model = get_peft_model(make_model(kind, 800), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    return model


def assert_alone(found: list[torch.Tensor], packs: list[Pack], samples: Samples, model: Any) -> None:
    """The tokens of each pack's answers, each computed alone."""
    for values, pack in zip(found, packs, strict=True):
        expected = torch.cat([alone(model, samples[number]) for number in pack.sample.tolist()])
        assert torch.allclose(values.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_says_what_its_answers_say_alone(kind: str) -> None:
    model, samples = make_model(kind, 800), pairs()
    packs = packs_of(samples)
    logps = token_logps(Engine(model), packs, trie_format(model))
    sizes = [len(pack.target_ids) for pack in packs]
    assert sum(sizes) == sum(map(sum, ANSWERS))
    assert_alone([*logps.split(sizes)], packs, samples, model)


@pytest.mark.parametrize("training", [False, True])
def test_without_its_adapter_a_model_is_its_base(training: bool) -> None:
    model, samples = with_lora("qwen2"), pairs()
    base = make_model("qwen2", 800)
    engine, packs, form = Engine(model), packs_of(samples), trie_format(model)
    engine.train(training)
    found = reference_logps(engine, packs, form, own_adapter=False, known=None)
    assert_alone(found, packs, samples, base)
    # It is as it was: the adapter counts, learns, and the mode is the same.
    assert model.training == training and not any(values.requires_grad for values in found)
    model.eval()
    now = token_logps(engine, packs, form)
    assert now.requires_grad and (now - torch.cat(found)).abs().max() > 0.1


def test_the_first_adapter_stays_the_reference(tmp_path: Path) -> None:
    model, samples = with_lora("qwen2"), pairs()
    model.save_pretrained(tmp_path)
    packs, form = packs_of(samples), trie_format(model)
    before = token_logps(Engine(model), packs, form).detach()
    model.load_adapter(tmp_path, "reference")
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in model.named_parameters():
        if "lora_B.default" in name:
            weight.data.mul_(2)
    found = torch.cat(reference_logps(Engine(model), packs, form, own_adapter=True, known=None))
    assert torch.equal(found, before)
    assert (token_logps(Engine(model), packs, form) - before).abs().max() > 0.1
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == learning
    assert learning and all(".default." in name for name in learning)


def test_what_was_computed_is_read_again(tmp_path: Path) -> None:
    """Of two of three pairs; another model, or other pairs, are computed anew."""
    start_ranks(0)
    model, samples = make_model("qwen2", 800), pairs()
    form, units = trie_format(model), np.array([0, 2])
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_pre_hook(count)
    engine = Engine(model)
    values, begin = precompute_reference(engine, samples, units, LAYOUT, form, "model 1", tmp_path)
    first = calls
    expected = [alone(model, samples[number]) for number in range(6)]
    expected[2:4] = [torch.zeros_like(part) for part in expected[2:4]]
    assert torch.allclose(values, torch.cat(expected), rtol=1e-5, atol=1e-5)
    calls = 0
    again, _ = precompute_reference(engine, samples, units, LAYOUT, form, "model 1", tmp_path)
    assert calls == 0 < first and torch.equal(again, values)
    (pack,) = rank_packs(samples, plan_packs(samples, [units], LAYOUT), 0, 0)
    (read,) = reference_logps(engine, [pack], form, own_adapter=False, known=(values, begin))
    assert calls == 0
    assert_alone([read], [pack], samples, model)
    for other_units, made_from in ((units, "model 2"), (np.array([0, 1]), "model 1")):
        calls = 0
        precompute_reference(engine, samples, other_units, LAYOUT, form, made_from, tmp_path)
        assert calls == first


@pytest.mark.parametrize("damage", [None, "0-00000001.npz"])
def test_what_was_computed_before_a_kill_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None, capsys: Any
) -> None:
    """Pack by pack; a damaged file and those after it are computed anew."""
    start_ranks(0)
    monkeypatch.setattr("utils.train.reference.KEEP_SEC", -1)
    samples, units, layout = pairs(), np.arange(len(ANSWERS)), LAYOUT._replace(pack_tokens=0, share_prefix=False)
    asked: list[list[int]] = []

    def compute(pack: Pack, last: int) -> list[torch.Tensor]:
        if len(asked) == last:
            raise KeyboardInterrupt
        asked.append(pack.sample.tolist())
        numbers = pack.target_ids.float()
        return [numbers, torch.stack([numbers, -numbers], 1).half()]

    def computed(last: int) -> list[torch.Tensor]:
        asked.clear()
        return compute_or_load(lambda: (layout, partial(compute, last=last)), samples, units, "model", tmp_path)

    with pytest.raises(KeyboardInterrupt):
        computed(last=4)
    first, (folder,) = [*asked], tmp_path.glob(".computed-*.parts")
    if damage:
        (folder / damage).write_bytes(b"PK torn")
        capsys.readouterr()
    ids, both = computed(last=99)
    assert asked == [[number] for number in (range(1, 6) if damage else range(4, 6))], f"after {first}"
    assert ("is damaged: what follows is computed anew" in capsys.readouterr().out) == bool(damage)
    expected = torch.cat([torch.from_numpy(s.input_ids[s.supervised].astype(np.float32)) for s in samples])
    assert torch.equal(ids, expected) and torch.equal(both, torch.stack([expected, -expected], 1).half())
    assert not [*tmp_path.glob("*.parts")]
    computed(last=0)
    assert not asked, "found on the disk"


def test_places_by_hand() -> None:
    """Answers of 2, 0, 3 and 1 tokens stand at 0-1, nowhere, 2-4 and 5."""
    samples = stored([sample_of([1, 2, 3, 4], [False] * (4 - size) + [True] * size) for size in (2, 0, 3, 1)])
    begin = target_begin(samples)
    assert begin.tolist() == [0, 2, 2, 5, 6]
    nothing = torch.zeros(0, dtype=torch.int64)
    pack = Pack(*[nothing] * 6, sample=torch.tensor([3, 1, 2]), sample_targets=torch.tensor([1, 0, 3]))
    assert target_places(begin, pack).tolist() == [5, 2, 3, 4]
    assert target_places(begin, pack._replace(sample=nothing, sample_targets=nothing)).tolist() == []


@pytest.mark.parametrize("form", [PACKED, SINGLE], ids=lambda form: form.way)
def test_models_without_tree_masks(form: PackFormat) -> None:
    """Answers as the rows of a batch, and a pack an answer."""
    start_ranks(0)
    model, samples = make_model("llama", 800), pairs()
    pack_tokens, padded = (150, True) if form is PACKED else (0, False)
    layout = LAYOUT._replace(pack_tokens=pack_tokens, share_prefix=False, padded=padded)
    packs = rank_packs(samples, plan_packs(samples, [np.arange(len(ANSWERS))], layout), 0, 0)
    assert len(packs) == (6 if form is SINGLE else 3)
    found = [token_logps(Engine(model), [pack], form) for pack in packs]
    assert_alone(found, packs, samples, model)
