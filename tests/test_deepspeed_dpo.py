"""deepspeed_dpo/train.py: the losses are those of the papers, and the numbers do not depend on how a run is cut.

python -m pytest tests/test_deepspeed_dpo.py
"""

import json
import math
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import adapter, distance, launch, load_script, read_metrics, run, slow
from safetensors.torch import load_file

from utils.train.packing import draw_windows

Build = Callable[..., list[str]]


@pytest.fixture(scope="session")
def dpo() -> ModuleType:
    """deepspeed_dpo/train.py as a module."""
    return load_script("deepspeed_dpo/train.py")


def make_pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    """Pairs of which four have a prompt in common, with answers of different lengths."""
    return [
        {
            "id": str(number),
            "video_id": str(number // 4),
            "prompt": f"视频标题：第{number // 4}个视频" + "简介" * (number // 4 % 3),
            "chosen": f"第{number}条真好看" + "哈" * (number % 5),
            "rejected": f"第{number}条没意思" + "啊" * (3 * number % 7),
        }
        for number in range(first, first + count)
    ]


@pytest.fixture(scope="session")
def pair_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training pairs and 8 held-out ones."""
    folder = tmp_path_factory.mktemp("pairs")
    for split, pairs in (("train", make_pairs(24)), ("test", make_pairs(8, first=24))):
        lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs]
        (folder / f"data_{split}_pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def sft_adapter(ft: ModuleType, model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that fine-tuning left."""
    folder = tmp_path_factory.mktemp("sft")
    flags = {"model_dir": model_dir, "model_name": "tiny/qwen2", "data_dir": data_dir, "output_dir": folder}
    flags |= {"max_steps": 3, "lr": 1e-2, "batch_size": 8, "max_tokens": 256, "max_new_tokens": 4, "lora_dropout": 0}
    run(ft, [text for name, value in flags.items() for text in (f"--{name}", str(value))])
    (adapter_dir,) = folder.glob("*/*/1/adapter")
    return adapter_dir


@pytest.fixture
def dpo_args(train_args: Build, pair_dir: Path) -> Build:
    """Builds a command line for a short run; keyword arguments are further flags."""

    def build(**flags: Any) -> list[str]:
        arguments = train_args(**flags)
        place = arguments.index("--data_dir")
        return [*arguments[:place], *arguments[place + 2 :], "--data_path", str(flags.get("data_path", pair_dir))]

    return build


def assert_same_numbers(one: Path, two: Path, but: tuple[str, ...] = ()) -> None:
    """Every metric but speeds to 5 digits, weights to 4."""
    left, right = read_metrics(one), read_metrics(two)
    assert len(left) == len(right)
    for mine, theirs in zip(left, right, strict=True):
        names = {name for name in mine if "_sec" not in name and name not in but}
        assert names == {name for name in theirs if "_sec" not in name and name not in but}
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), name
    assert distance(adapter(one), adapter(two)) < 5e-4


# ---------------------------------------------------------------------------------------------------------------------
# The losses

LOGPS = torch.tensor([[-8.0, -10.0]])
REFERENCE = torch.tensor([[-10.0, -9.0]])
TOKENS = torch.tensor([[4, 5]])


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


@pytest.mark.parametrize(
    ("loss", "beta", "smoothing", "gamma", "expected"),
    [
        ("sigmoid", 0.5, 0.0, 0, -log_sigmoid(1.5)),
        ("sigmoid", 0.5, 0.2, 0, -0.8 * log_sigmoid(1.5) - 0.2 * log_sigmoid(-1.5)),
        ("robust", 0.5, 0.2, 0, (-0.8 * log_sigmoid(1.5) + 0.2 * log_sigmoid(-1.5)) / 0.6),
        ("hinge", 0.2, 0.0, 0, 0.4),
        ("hinge", 0.5, 0.0, 0, 0.0),
        ("ipo", 0.5, 0.0, 0, (2 / 4 + 1 / 5 - 1) ** 2),
        ("simpo", 2.0, 0.0, 1.0, -log_sigmoid(-1.0)),
        ("simpo, unequal", 2.0, 0.0, 1.0, -log_sigmoid(-5.0)),
        ("orpo", 0.1, 0.0, 0, 2 + 0.1 * math.log(2)),
    ],
)
def test_losses_by_hand(
    dpo: ModuleType, loss: str, beta: float, smoothing: float, gamma: float, expected: float
) -> None:
    """Answers of 4 and 5 tokens; log-probabilities -8 and -10, of the reference -10 and -9.

    The policy holds the chosen one 2 nats likelier than the reference does, the rejected one 1 nat less likely: m = 3.
    sigmoid: -log s(0.5 * 3); with smoothing 0.2: -0.8 log s(1.5) - 0.2 log s(-1.5).
    robust:  (-0.8 log s(1.5) + 0.2 log s(-1.5)) / (1 - 2 * 0.2).
    hinge:   1 - 0.2 * 3 = 0.4; 1 - 0.5 * 3 < 0 is 0.
    ipo:     per token 2 / 4 and -1 / 5, and 1 / (2 * 0.5) = 1: (0.5 + 0.2 - 1)^2.
    simpo:   means -8 / 4 and -10 / 5 are equal, only the margin is left: -log s(0 - 1). With 2 and 5 tokens -4 and -2:
             -log s(2 (-4 + 2) - 1).
    orpo:    the chosen one's mean is -2, the odds are equal: 2 - 0.1 log s(0) = 2 + 0.1 log 2.
    """
    tokens = torch.tensor([[2, 5]]) if "unequal" in loss else TOKENS
    (found,) = dpo.preference_loss(LOGPS, REFERENCE, tokens, loss.split(",")[0], beta, smoothing, gamma).tolist()
    assert found == pytest.approx(expected, rel=1e-6)


def test_orpo_with_unequal_odds(dpo: ModuleType) -> None:
    """Means log(1/2) and log(1/5): odds 1 and 1/4. -log(1/2) - 0.3 log s(log 4) = log 2 - 0.3 log(4/5)."""
    logps = torch.tensor([[2 * math.log(1 / 2), 3 * math.log(1 / 5)]])
    (found,) = dpo.preference_loss(logps, logps, torch.tensor([[2, 3]]), "orpo", 0.3, 0.0, 0.0).tolist()
    assert found == pytest.approx(math.log(2) - 0.3 * math.log(4 / 5), rel=1e-6)


def test_orpo_of_a_certain_answer_is_finite(dpo: ModuleType) -> None:
    """p = 1 - 1e-8: odds 1e8 both times."""
    logps = torch.tensor([[-1e-8, -1e-8]])
    (found,) = dpo.preference_loss(logps, logps, torch.ones(1, 2), "orpo", 0.1, 0.0, 0.0).tolist()
    assert found == pytest.approx(0.1 * math.log(2))


def test_losses_without_reference_equal_trl(dpo: ModuleType) -> None:
    """TRL's SimPO (in its CPO trainer) and the odds ratio of its ORPO, with the trainers' few settings."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    tokens, logps = torch.tensor([[3, 5], [7, 2]]), torch.tensor([[-4.0, -9.0], [-6.0, -1.0]])
    means = logps / tokens
    settings = {"beta": 0.7, "alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 0.4, "label_smoothing": 0.0}
    stub = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **settings)
    expected, *_ = CPOTrainer.cpo_loss(stub, means[:, 0], means[:, 1])
    assert torch.allclose(dpo.preference_loss(logps, logps, tokens, "simpo", 0.7, 0.0, 0.4), expected)
    gain, *_ = ORPOTrainer.odds_ratio_loss(stub, means[:, 0], means[:, 1])
    assert torch.allclose(dpo.preference_loss(logps, logps, tokens, "orpo", 0.7, 0.0, 0.0), -means[:, 0] - gain)


def test_ties_are_half_a_win(dpo: ModuleType) -> None:
    """Before the first step, but for rounding."""
    args = SimpleNamespace(loss="sigmoid", beta=0.1, label_smoothing=0.0, simpo_gamma=0.0, sft_weight=0.0)
    policy = torch.tensor([-1.0, -2.0, -3.0, -1.0])
    _, sums = dpo.pair_loss(policy, policy + torch.tensor([1e-6, 0, 0, 2]), torch.ones(4, dtype=torch.int64), args)
    assert sums["rewards/accuracy"] == 1.5


def test_rewards_by_hand(dpo: ModuleType) -> None:
    assert dpo.rewards(LOGPS, REFERENCE, TOKENS, "sigmoid", 0.5).tolist() == [[1.0, -0.5]]
    assert dpo.rewards(LOGPS, REFERENCE, TOKENS, "simpo", 0.5).tolist() == [[-1.0, -1.0]]


def test_a_pack_of_pairs_by_hand(dpo: ModuleType) -> None:
    """Two pairs of answers of 1, 2, 2, 1 tokens.

    Answers' log-probabilities: -1, -3, -2, -4; the reference's: -2, -2, -2, -2. Log-ratios: 1, -1, 0, -2, so m = 2 both
    times, rewards at beta 0.1: 0.1, -0.1, 0, -0.2. Squares of the tokens' ratios: 1; 0, 1; 0.25, 0.25; 4: half of their
    sum is 3.25. RPO adds the chosen ones' means: 0.5 (1 / 1 + 2 / 2) = 1.
    """
    policy = torch.tensor([-1.0, -1.0, -2.0, -1.5, -0.5, -4.0], requires_grad=True)
    reference = torch.tensor([-2.0, -1.0, -1.0, -1.0, -1.0, -2.0])
    sizes = torch.tensor([1, 2, 2, 1])
    args = SimpleNamespace(loss="sigmoid", beta=0.1, label_smoothing=0.0, simpo_gamma=0.0, sft_weight=0.5)
    loss, sums = dpo.pair_loss(policy, reference, sizes, args)
    assert loss.item() == pytest.approx(-2 * log_sigmoid(0.2) + 1)
    assert sums == pytest.approx(
        {
            "loss": -2 * log_sigmoid(0.2) + 1,
            "rewards/chosen": 0.1,
            "rewards/rejected": -0.3,
            "rewards/margin": 0.4,
            "rewards/accuracy": 2,
            "logps/chosen": -3,
            "logps/rejected": -7,
            "tokens/chosen": 3,
            "tokens/rejected": 3,
            "kl": 3.25,
        }
    )
    loss.backward()
    slope = -0.1 / (1 + math.exp(0.2))  # Of -log s(0.1 m) at m = 2.
    expected = [slope - 0.5, -slope, -slope, slope - 0.25, slope - 0.25, -slope]
    assert policy.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "smoothing", "theirs"),
    [
        ("sigmoid", 0.0, "sigmoid"),
        ("sigmoid", 0.2, "aot"),  # With label smoothing; sorted over the pairs, which one pair does not show.
        ("robust", 0.1, "robust"),
        ("hinge", 0.0, "hinge"),
        ("ipo", 0.0, "ipo"),
    ],
)
@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_losses_equal_trl(dpo: ModuleType, loss: str, smoothing: float, theirs: str, sft_weight: float) -> None:
    """TRL's trainer, whose losses are written inside a method, with a model that says what it is told to.

    Its SFT term is a mean over the tokens of a batch, ours one of each pair: they are equal for one pair.
    """
    from trl import DPOTrainer

    random = torch.Generator().manual_seed(3)
    sizes = [4, 7]
    policy, reference = (-3 * torch.rand(11, generator=random) for _ in range(2))
    mask = torch.zeros(2, 9, dtype=torch.int64)  # The prompt has two tokens.
    per_token = torch.zeros(2, 8)
    for row, (part, size) in enumerate(zip(policy.split(sizes), sizes, strict=True)):
        mask[row, 2 : 2 + size] = 1
        per_token[row, 1 : 1 + size] = part
    sums = [part.sum()[None] for part in reference.split(sizes)]
    nothing = torch.zeros(2, 8)
    outputs = SimpleNamespace(log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[theirs, "sft"],
        loss_weights=[1.0, sft_weight],
        beta=0.3,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(2, 9, dtype=torch.int64),
        "attention_mask": torch.ones(2, 9, dtype=torch.int64),
        "completion_mask": mask,
        "ref_chosen_logps": sums[0],
        "ref_rejected_logps": sums[1],
    }
    expected = DPOTrainer._compute_loss(stub, lambda **_: outputs, inputs, False)
    args = SimpleNamespace(loss=loss, beta=0.3, label_smoothing=smoothing, simpo_gamma=0.0, sft_weight=sft_weight)
    ours, sums = dpo.pair_loss(policy, reference, torch.tensor(sizes), args)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    for name in ("chosen", "rejected"):
        assert sums[f"rewards/{name}"] == pytest.approx(stub._metrics["train"][f"rewards/{name}"][0], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def plain_pytorch(model_dir: Path, kind: str, steps: int) -> dict[str, Any]:
    """The same training without DeepSpeed, packs, masks or the rooms: one answer at a time, a second model, AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(42)
    path = model_dir / "tiny" / kind
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    # Making a model of some kinds draws numbers, so that it comes after the adapter.
    frozen = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    pairs = make_pairs(24)

    def logp(which: Any, pair: dict[str, str], side: str) -> torch.Tensor:
        messages = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text.removesuffix("\n"), add_special_tokens=False, return_tensors="pt")["input_ids"]
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        n_prompt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        logits = which(input_ids=ids).logits[0, n_prompt - 1 : -1]
        return logits.log_softmax(-1).gather(1, ids[0, n_prompt:, None]).sum()

    videos = np.array([zlib.crc32(pair["video_id"].encode()) for pair in pairs])
    losses, accuracies = [], []
    for window in draw_windows(videos, 8, 8, 1, 42)[:steps]:
        total, right = torch.tensor(0.0), 0
        for number in window:
            ratios = [logp(model, pairs[number], side) - logp(frozen, pairs[number], side).detach()
                      for side in ("chosen", "rejected")]  # fmt: skip
            total = total - torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1]))
            right += (ratios[0] > ratios[1]).item()
        loss = total / len(window)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        accuracies.append(right / len(window))
    return {"losses": losses, "accuracies": accuracies, "weights": weights}


@pytest.mark.parametrize("kind", ["qwen2", *map(slow, ["gemma2", "gemma3", "llama", "mistral", "qwen3_5", "bloom"])])
def test_equals_plain_pytorch(
    dpo: ModuleType, dpo_args: Build, model_dir: Path, tmp_path: Path, kind: str, capsys: Any
) -> None:
    """bloom takes no tree masks: answers are the rows of a batch."""
    run(dpo, dpo_args(model_name=f"tiny/{kind}"))
    assert ("as the rows of a batch" in capsys.readouterr().out) == (kind == "bloom")
    plain = plain_pytorch(model_dir, kind, steps=3)
    lines = [line for line in read_metrics(tmp_path) if "train/loss" in line]
    assert [line["train/loss"] for line in lines] == pytest.approx(plain["losses"], rel=1e-5)
    assert lines[0]["train/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert [line["train/rewards/accuracy"] for line in lines][1:] == pytest.approx(plain["accuracies"][1:])
    ours = {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter(tmp_path / "output").items()}
    assert distance(ours, {name: w.detach() for name, w in plain["weights"].items()}) < 5e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1, "grad_accum": 8},
        slow({"pack_tokens": 256}),
        slow({"share_prefix": False, "group_size": 8}),
        slow({"gradient_checkpointing": True}),
        slow({"precompute_reference": True}),
        slow({"zero_stage": 0}),
        slow({"zero_stage": 1}),
        slow({"zero_stage": 3}),
        slow({"offload": "optimizer"}),
        slow({"zero_stage": 3, "offload": "param"}),
        slow({"zero_stage": 3, "precompute_reference": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("base", [{}, slow({"train_bnb_enabled": True})], ids=["lora", "qlora"])
def test_cutting_changes_nothing(
    dpo: ModuleType, dpo_args: Build, tmp_path: Path, changes: dict[str, Any], base: dict[str, Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr("utils.train.engine.shutil.which", lambda name: None)  # Offloads to PyTorch's AdamW.
    run(dpo, dpo_args(output_dir=tmp_path / "one", **base))
    run(dpo, dpo_args(output_dir=tmp_path / "two", **base, **changes))
    assert_same_numbers(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "flags",
    [
        slow({}),
        slow({"zero_stage": 3}),
        slow({"precompute_reference": True}),
        slow({"adapter": True}),
        slow({"adapter": True, "zero_stage": 3}),
        slow({"tuner": "full", "lr": 1e-3}),
    ],
    ids=str,
)
def test_two_ranks_equal_one(
    dpo: ModuleType, dpo_args: Build, sft_adapter: Path, tmp_path: Path, flags: dict[str, Any]
) -> None:
    flags = flags | ({"adapter": sft_adapter} if "adapter" in flags else {})
    run(dpo, dpo_args(output_dir=tmp_path / "one", batch_size=4, grad_accum=2, **flags))
    arguments = dpo_args(output_dir=tmp_path / "two", batch_size=4, grad_accum=1, **flags)
    finished = launch("deepspeed_dpo/train.py", arguments, ranks=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    if "tuner" in flags:
        one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
        losses = [[line["train/loss"] for line in lines if "train/loss" in line] for lines in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-5) and losses[0][-1] != pytest.approx(losses[0][0])
    else:
        assert_same_numbers(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("loss", ["simpo", *map(slow, ["orpo", "robust", "hinge", "ipo"])])
def test_every_loss_learns(dpo: ModuleType, dpo_args: Build, tmp_path: Path, loss: str) -> None:
    run(dpo, dpo_args(loss=loss, max_steps=4, epochs=2))
    losses = [line["train/loss"] for line in read_metrics(tmp_path) if "train/loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "flags",
    [slow({}), slow({"train_bnb_enabled": True}), slow({"precompute_reference": True}), slow({"zero_stage": 3})],
    ids=str,
)
def test_goes_on_from_an_adapter(
    dpo: ModuleType, ft: ModuleType, dpo_args: Build, train_args: Build, tmp_path: Path, flags: dict[str, Any]
) -> None:
    """The reference is the adapter as it was: the first loss is ln 2, and the policy's answers are the adapter's."""
    base = {"train_bnb_enabled": True} if "train_bnb_enabled" in flags else {}
    ft.main(ft.build_parser().parse_args(train_args(output_dir=tmp_path / "sft", **base)))
    (start,) = (tmp_path / "sft").glob("*/*/1/adapter")
    run(dpo, dpo_args(output_dir=tmp_path / "dpo", adapter=start, **flags))
    run(dpo, dpo_args(output_dir=tmp_path / "fresh", **base))
    lines, fresh = read_metrics(tmp_path / "dpo"), read_metrics(tmp_path / "fresh")
    assert [lines[0]["eval/loss"], lines[1]["train/loss"]] == pytest.approx([math.log(2)] * 2, rel=1e-6)
    assert lines[0]["eval/logps/chosen"] != pytest.approx(fresh[0]["eval/logps/chosen"], rel=1e-3)
    assert lines[-1]["train/loss"] < lines[1]["train/loss"]
    before, after = load_file(start / "adapter_model.safetensors"), adapter(tmp_path / "dpo")
    assert before.keys() == after.keys() and 0 < distance(after, before) < 1
    run_json = json.loads(next((tmp_path / "dpo").glob("*/*/1/run.json")).read_text())
    assert run_json["data"]["files"]["adapter"]


@pytest.mark.slow
def test_full_training_has_its_reference_on_disk(dpo: ModuleType, dpo_args: Build, tmp_path: Path) -> None:
    flags = {"tuner": "full", "lr": 1e-3, "save_steps": 2}
    run(dpo, dpo_args(output_dir=tmp_path / "one", **flags))
    lines = read_metrics(tmp_path / "one")
    assert lines[1]["train/loss"] == pytest.approx(math.log(2), rel=1e-6) and lines[-1]["train/loss"] < math.log(2)
    kept = sorted((tmp_path / "one/cache").glob("computed-*/0.npy"))
    assert len(kept) == 2  # Training and held-out pairs.
    stamps = [path.stat().st_mtime_ns for path in kept]
    run(dpo, dpo_args(output_dir=tmp_path / "one", overwrite=True, **flags))
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    assert read_metrics(tmp_path / "one")[-1]["train/loss"] == lines[-1]["train/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_resumed_run_is_the_same(
    dpo: ModuleType, dpo_args: Build, sft_adapter: Path, tmp_path: Path, goes_on: bool
) -> None:
    """With dropout, which no evaluation may draw for: the stopped run has one more of them.

    An adapter that is gone on with brings its own dropout, and is still the reference after resuming.
    """
    start = tmp_path / "start"
    shutil.copytree(sft_adapter, start)
    config = json.loads((start / "adapter_config.json").read_text())
    (start / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.2}))
    flags = {"save_steps": 2} | ({"adapter": start} if goes_on else {"lora_dropout": 0.2})
    run(dpo, dpo_args(output_dir=tmp_path / "straight", max_steps=3, **flags))
    run(dpo, dpo_args(output_dir=tmp_path / "stopped", max_steps=2, **flags))
    run(dpo, dpo_args(output_dir=tmp_path / "stopped", max_steps=3, resume=True, **flags))
    one, two = adapter(tmp_path / "straight"), adapter(tmp_path / "stopped")
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [[line for line in read_metrics(tmp_path / name) if line["step"] == 3] for name in ("straight", "stopped")]
    assert lines[0][0]["train/kl"] == pytest.approx(lines[1][0]["train/kl"], rel=1e-6)


@pytest.mark.parametrize("flags", [{}, slow({"train_bnb_enabled": True}), slow({"tuner": "full", "lr": 1e-3})], ids=str)
def test_the_converted_model_is_the_trained_one(
    dpo: ModuleType,
    dpo_args: Build,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
    flags: dict[str, Any],
) -> None:
    convert = load_script("convert_model.py")
    run(dpo, dpo_args(test_mode=True, **flags))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table] == ["|", "| reply", "| reference_reply", "| chosen"]
    (folder,) = (tmp_path / "output").glob("DS-*/*")
    rows = [json.loads(line) for line in (folder / "test_1.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8 and {"id", "prompt", "reply", "reference_reply", "chosen", "rejected"} < rows[0].keys()
    assert rows[0]["chosen"] == make_pairs(1, first=24)[0]["chosen"]
    margin = [row["reward_chosen"] - row["reward_rejected"] for row in rows[:4]]
    assert np.mean(margin) == pytest.approx(read_metrics(tmp_path)[-1]["eval/rewards/margin"], rel=1e-3, abs=1e-5)
    monkeypatch.setattr(convert, "from_root", lambda path: tmp_path / path)
    arguments = ["--zero_model", str(folder), "--org_model", str(model_dir / "tiny/qwen2")]
    convert.main(convert.build_parser().parse_args([*arguments, "--save_model", "new", "--t", "1"]))
    card = (tmp_path / "output_hf/new/README.md").read_text(encoding="utf-8")
    assert "preference-optimised (sigmoid loss, " in card and "Training pairs: 24, held out: 8." in card
    assert "| beta | 0.1 |" in card


@pytest.mark.parametrize("flags", [{"loss": "simpo"}, {"precompute_reference": True}], ids=str)
def test_without_held_out_pairs(
    dpo: ModuleType, dpo_args: Build, pair_dir: Path, tmp_path: Path, flags: dict[str, Any]
) -> None:
    """Training goes on without them, test mode says that there is nothing to test."""
    (tmp_path / "train.jsonl").write_bytes((pair_dir / "data_train_pairs.jsonl").read_bytes())
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(SystemExit, match="no pairs are held out"):
        run(dpo, dpo_args(data_path=tmp_path, test_mode=True, **flags))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"beta": -1}, "--beta: got -1.0"),
        ({"label_smoothing": 0.6}, "--label_smoothing: got 0.6"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "no effect"),
        ({"adapter": "/nowhere"}, "no adapter_config.json"),
        ({"simpo_gamma": 0.5}, "--simpo_gamma has no effect on --loss sigmoid"),
        ({"loss": "orpo", "precompute_reference": True}, "--loss orpo has no reference"),
        ({"tuner": "full", "precompute_reference": False}, "needs LoRA"),
        ({"data_path": "/nowhere"}, "python deepspeed_dpo/prepare_data.py"),
    ],
)
def test_wrong_arguments(dpo: ModuleType, dpo_args: Build, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(SystemExit, match=says):
        run(dpo, dpo_args(**flags))
