"""deepspeed_distill/train.py: distances by hand, a teacher beside the student or on the disk, cutting changes nothing.

python -m pytest tests/test_deepspeed_distill.py
"""

import json
import math
import shutil
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    adapter,
    answers_of,
    distance,
    launch,
    load_script,
    make_model,
    make_records,
    other_tokenizer,
    read_metrics,
    run,
    slow,
    write_rows,
)
from torch.nn.functional import kl_div

from utils.data.chat import make_chat
from utils.data.samples import load_splits
from utils.train.packing import draw_windows

Build = Callable[..., list[str]]
KINDS = ["forward_kl", "reverse_kl", "jsd"]


@pytest.fixture(scope="session")
def distill() -> ModuleType:
    """deepspeed_distill/train.py as a module."""
    return load_script("deepspeed_distill/train.py")


@pytest.fixture(scope="session")
def answers_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of a teacher to the comments of `data_dir`."""
    folder = tmp_path_factory.mktemp("answers")
    for split, records in (("train", make_records(12)), ("test", make_records(2, first=12))):
        write_rows(folder / f"data_{split}_teacher_big.jsonl", answers_of(records))
    return folder


@pytest.fixture(scope="session")
def teacher(model_dir: Path, tokenizer: Any) -> None:
    """Another model of the students' family: transformers gives each family its own way to split text."""
    make_model("qwen2", len(tokenizer), hidden_size=96).save_pretrained(model_dir / "tiny/teacher")
    tokenizer.save_pretrained(model_dir / "tiny/teacher")


@pytest.fixture
def distill_args(train_args: Build, answers_dir: Path, teacher: None) -> Build:
    """Builds a command line for a short run; keyword arguments are further flags."""

    def build(**flags: Any) -> list[str]:
        local = flags.get("kd", "sft") != "sft"
        flags = {"teacher_model_name": "tiny/teacher" if local else "big", "answers_dir": answers_dir} | flags
        arguments = train_args(**flags)
        arguments[arguments.index("--model_name")] = "--student_model_name"
        return arguments

    return build


def settings(**changes: Any) -> Namespace:
    """Of a run."""
    return Namespace(**{"kd_loss": "forward_kl", "kd_temperature": 1.0, "kd_alpha": 1.0, "kd_beta": 0.5} | changes)


# ---------------------------------------------------------------------------------------------------------------------
# The losses


def test_divergences_by_hand(distill: ModuleType) -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4); with b = 1/2 their mixture is (3/8, 5/8).

    KL(p, q) = 1/2 log 2 + 1/2 log 2/3; KL(q, p) = 1/4 log 1/2 + 3/4 log 3/2;
    JSD = 1/2 (1/2 log 4/3 + 1/2 log 4/5) + 1/2 (1/4 log 2/3 + 3/4 log 6/5).
    """
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = {
        "forward_kl": 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
        "reverse_kl": 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2),
        "jsd": 0.25 * (math.log(4 / 3) + math.log(4 / 5)) + 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)),
    }
    for kind, value in expected.items():
        assert distill.divergence(q, p, kind, 0.5).item() == pytest.approx(value, rel=1e-5)


def test_a_third_of_the_teacher_by_hand(distill: ModuleType) -> None:
    """b = 1/3: the mixture of p = (1, 0) and q = (0, 1), almost, is (1/3, 2/3): 1/3 log 3 + 2/3 log 3/2."""
    p, q = torch.tensor([[0.0, -40.0]]), torch.tensor([[-40.0, 0.0]])
    expected = math.log(3) / 3 + 2 / 3 * math.log(1.5)
    assert distill.divergence(q, p, "jsd", 1 / 3).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_equal_torch(distill: ModuleType, kind: str) -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 30, generator=random).mul(3).log_softmax(-1) for _ in range(2))

    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return kl_div(other, one, log_target=True, reduction="none").sum(-1)

    mixed = (0.3 * teacher.exp() + 0.7 * student.exp()).log()
    expected = {
        "forward_kl": kl(teacher, student),
        "reverse_kl": kl(student, teacher),
        "jsd": 0.3 * kl(teacher, mixed) + 0.7 * kl(student, mixed),
    }[kind]
    assert torch.allclose(distill.divergence(student, teacher, kind, 0.3), expected, rtol=1e-4)


def test_the_loss_by_hand(distill: ModuleType) -> None:
    """Logits (0, log 3), target 0: q = (1/4, 3/4), CE = log 4. At t = 2 the logits halve: q = (1, √3) / (1 + √3).

    Teacher (1/2, 1/2): KL = 1/2 log (1/2)/q0 + 1/2 log (1/2)/q1, times t^2 = 4. Weight 2; a = 1/4.
    """
    q0, q1 = 1 / (1 + math.sqrt(3)), math.sqrt(3) / (1 + math.sqrt(3))
    kd = 4 * (0.5 * math.log(0.5 / q0) + 0.5 * math.log(0.5 / q1))
    logits, teacher = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.5, 0.5]]).log()
    args = settings(kd_temperature=2.0, kd_alpha=0.25)
    target = torch.tensor([0]), torch.tensor([2.0])
    loss, sums = distill.distill_loss(logits, *target, teacher, 2, args)
    assert loss.item() == pytest.approx(2 * (0.75 * math.log(4) + 0.25 * kd), rel=1e-5)
    assert sums == pytest.approx({"loss": loss.item(), "ce": 2 * math.log(4), "kd": 2 * kd}, rel=1e-5)
    alone, sums = distill.distill_loss(logits, *target, None, None, args)
    assert alone.item() == pytest.approx(2 * math.log(4), rel=1e-6) and sums == {"loss": alone.item()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(distill: ModuleType, kind: str, temperature: float) -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).mul(2).requires_grad_()
    teacher = (logits.detach() / temperature).log_softmax(-1)
    args = settings(kd_loss=kind, kd_temperature=temperature)
    loss, _ = distill.distill_loss(logits, torch.zeros(6, dtype=torch.int64), torch.ones(6), teacher, 40, args)
    loss.backward()
    assert loss.abs().item() < 1e-5 and logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topk", [False, True])
def test_rows_of_padding_change_nothing(distill: ModuleType, kind: str, topk: bool) -> None:
    """In the loss or in the gradient, whatever they hold: not the student's, and not the teacher's."""
    random = torch.Generator().manual_seed(2)
    logits, teacher = (torch.randn(6, 40, generator=random) for _ in range(2))
    target, weight = torch.arange(6), torch.rand(6, generator=random)
    results = []
    for padding in (0, 9):
        wide = torch.cat([logits, torch.full((6, padding), 30.0)], 1).requires_grad_()
        said = torch.cat([teacher, torch.full((6, 2 * padding), 30.0)], 1)[:, :40].log_softmax(-1)
        if topk:
            ids, values = distill.topk_logprobs(said, 5)
            said = ids.long(), values.float()
        loss, _ = distill.distill_loss(wide, target, weight, said, 40, settings(kd_loss=kind, kd_alpha=0.5))
        loss.backward()
        results.append((loss.item(), wide.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1][:, :40])
    assert not results[1][1][:, 40:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_favourites_say_less_the_fewer_they_are(distill: ModuleType, kind: str) -> None:
    """What is put together cannot differ more than it did apart; all tokens say all, gradients too."""
    random = torch.Generator().manual_seed(3)
    logits, teacher = (torch.randn(8, 50, generator=random).mul(2) for _ in range(2))
    teacher = teacher.log_softmax(-1)
    target, weight, args = torch.zeros(8, dtype=torch.int64), torch.ones(8), settings(kd_loss=kind)

    def result(said: Any) -> tuple[float, torch.Tensor]:
        own = logits.clone().requires_grad_()
        loss, _ = distill.distill_loss(own, target, weight, said, 50, args)
        loss.backward()
        return loss.item(), own.grad

    whole, whole_grad = result(teacher)
    losses = []
    for k in (1, 5, 20, 50, 99):
        ids, values = distill.topk_logprobs(teacher, k)
        assert ids.shape == (8, min(k, 50)) and values.shape == (8, min(k, 50) + 1) and values.dtype == torch.float16
        loss, grad = result((ids.long(), values.float().log_softmax(-1)))
        losses.append(loss)
    assert losses[:-2] == sorted(losses[:-2]) and losses[-2] == losses[-1] == pytest.approx(whole, rel=1e-3)
    assert (grad - whole_grad).norm() / whole_grad.norm() < 1e-3


@pytest.mark.parametrize("k", [5, 40])
def test_a_teachers_favourites_are_at_no_distance_from_it(distill: ModuleType, k: int) -> None:
    """However they are rounded on the disk: the distance of distributions is not negative."""
    teacher = torch.randn(500, 40, generator=torch.Generator().manual_seed(4)).mul(3).log_softmax(-1)
    kept = distill.topk_logprobs(teacher, k)
    pack = SimpleNamespace(input_ids=torch.zeros(1))
    ids, values = distill.cached_topk(kept, lambda _: torch.arange(500), pack)
    own = distill.topk_and_rest(teacher, ids)
    distance = (values.exp() * (values - own)).sum(-1)
    assert distance.min() > -1e-6 and distance.max() < 1e-5


def test_the_rest_is_counted(distill: ModuleType) -> None:
    """(1/2, 1/4, 1/8, 1/8), the two likeliest: 1/2, 1/4 and 1/4 for all others; of the student 0.1, 0.2 and 0.7."""
    ids, values = distill.topk_logprobs(torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log(), 2)
    assert ids.tolist() == [[1, 3]] and values.exp().tolist()[0] == pytest.approx([0.5, 0.25, 0.25], rel=1e-3)
    student = distill.topk_and_rest(torch.tensor([[0.3, 0.1, 0.4, 0.2]]).log(), ids.long())
    assert student.exp().tolist()[0] == pytest.approx([0.1, 0.2, 0.7])


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def losses(output: Path, name: str = "train/loss") -> list[float]:
    return [line[name] for line in read_metrics(output) if name in line]


def assert_same_numbers(one: Path, two: Path, rel: float = 2e-5) -> None:
    """Every metric but speeds, and the weights."""
    left, right = read_metrics(one), read_metrics(two)
    assert len(left) == len(right)
    for mine, theirs in zip(left, right, strict=True):
        names = {name for name in mine if "_sec" not in name}
        assert names == {name for name in theirs if "_sec" not in name}
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], rel=rel, abs=1e-6), name
    assert distance(adapter(one), adapter(two)) < 25 * rel


def test_learning_answers_is_fine_tuning_on_them(
    distill: ModuleType, ft: ModuleType, distill_args: Build, train_args: Build, answers_dir: Path, tmp_path: Path
) -> None:
    """The same numbers as deepspeed_ft/train.py on a file of these answers."""
    run(distill, distill_args(output_dir=tmp_path / "one"))
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (answers_dir / f"data_{split}_teacher_big.jsonl").read_text().splitlines()]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    run(ft, train_args(output_dir=tmp_path / "two", data_dir=tmp_path))
    assert_same_numbers(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("kd", ["sft", "logits"])
def test_fields_of_other_names(
    distill: ModuleType, distill_args: Build, tokenizer: Any, data_dir: Path, tmp_path: Path, kd: str
) -> None:
    """The same samples as of prepare_data.py's records, of collected answers too."""
    names, found = ("rolle", "frage", "antwort"), []
    for split in ("train", "test"):
        records = json.loads((data_dir / f"data_{split}.json").read_text())
        texts = [[turn["value"] for turn in record.pop("conversations")] for record in records]
        rows = [record | dict(zip(names, said, strict=True)) for record, said in zip(records, texts, strict=True)]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    for flags in ({}, {"data_dir": tmp_path, "columns": "user=frage,assistant=antwort,system=rolle"}):
        args = distill.build_parser().parse_args(distill_args(kd=kd, **flags))
        files, columns = distill.training_files(args), distill.columns_of_files(args)
        sets = load_splits(args, *files, make_chat(tokenizer), show=False, columns=columns)[:2]
        found.append([(samples.ids, samples.tokens.tolist()) for samples in sets])
    assert found[0] == found[1] and all(ids for ids, _ in found[0])


def plain_pytorch(model_dir: Path, steps: int) -> dict[str, Any]:
    """The same distillation without DeepSpeed, packs or masks: one comment at a time, torch's own KL, AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(model_dir / "tiny/qwen2")
    teacher = AutoModelForCausalLM.from_pretrained(model_dir / "tiny/teacher", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(model_dir / "tiny/qwen2", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    records = make_records(12)
    group = np.array([zlib.crc32(record["video_id"].encode()) for record in records])
    found = []
    for window in draw_windows(group, 8, 8, 1, 42)[:steps]:
        ce, kd, count = torch.tensor(0.0), torch.tensor(0.0), 0
        for number in window:
            turns = records[number]["conversations"]
            messages = [{"role": turn["from"], "content": turn["value"]} for turn in turns]
            text = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
            with torch.no_grad():
                theirs = teacher(input_ids=ids).logits[0, start - 1 : -1]
            ce = ce + torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum")
            target = (theirs / 2).log_softmax(-1)
            kd = kd + 4 * kl_div((logits / 2).log_softmax(-1), target, log_target=True, reduction="sum")
            count += ids.shape[1] - start
        loss = (0.7 * ce + 0.3 * kd) / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        found.append({"loss": loss.item(), "ce": (ce / count).item(), "kd": (kd / count).item()})
    return {"metrics": found, "weights": {name: weight.detach() for name, weight in weights.items()}}


def test_equals_plain_pytorch(distill: ModuleType, distill_args: Build, model_dir: Path, tmp_path: Path) -> None:
    run(distill, distill_args(kd="logits", kd_temperature=2, kd_alpha=0.3))
    plain = plain_pytorch(model_dir, steps=3)
    for name in ("loss", "ce", "kd"):
        expected = [step[name] for step in plain["metrics"]]
        assert losses(tmp_path, f"train/{name}") == pytest.approx(expected, rel=1e-5)
    ours = {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter(tmp_path / "output").items()}
    assert distance(ours, plain["weights"]) < 5e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1, "grad_accum": 8},
        slow({"share_prefix": False, "group_size": 8}),
        slow({"pack_tokens": 256}),
        slow({"gradient_checkpointing": True}),
        slow({"zero_stage": 0}),
        slow({"zero_stage": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kd", ["logits", slow("topk")])
def test_cutting_changes_nothing(
    distill: ModuleType, distill_args: Build, tmp_path: Path, changes: dict[str, Any], kd: str
) -> None:
    run(distill, distill_args(output_dir=tmp_path / "one", kd=kd))
    run(distill, distill_args(output_dir=tmp_path / "two", kd=kd, **changes))
    # What the disk keeps has three digits, and other packs round another way.
    assert_same_numbers(tmp_path / "one", tmp_path / "two", rel=2e-5 if kd == "logits" else 1e-3)


@pytest.mark.parametrize(
    "flags", [slow({"kd": "topk"}), slow({"kd": "logits", "zero_stage": 3}), slow({"kd": "sft"})], ids=str
)
def test_two_ranks_equal_one(distill: ModuleType, distill_args: Build, tmp_path: Path, flags: dict[str, Any]) -> None:
    run(distill, distill_args(output_dir=tmp_path / "one", batch_size=4, grad_accum=2, **flags))
    arguments = distill_args(output_dir=tmp_path / "two", batch_size=4, grad_accum=1, **flags)
    finished = launch("deepspeed_distill/train.py", arguments, ranks=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_same_numbers(tmp_path / "one", tmp_path / "two", rel=1e-3 if flags["kd"] == "topk" else 2e-5)


@pytest.mark.slow
def test_all_favourites_are_the_teacher(
    distill: ModuleType, distill_args: Build, model_dir: Path, tmp_path: Path
) -> None:
    """With as many as there are tokens; and the teacher is asked once: later it need not be there."""
    run(distill, distill_args(output_dir=tmp_path / "one", kd="logits"))
    run(distill, distill_args(output_dir=tmp_path / "two", kd="topk", kd_topk=5000))
    assert_same_numbers(tmp_path / "one", tmp_path / "two", rel=2e-3)
    asked = []
    load_teacher, distill.load_teacher = distill.load_teacher, lambda *rest: asked.append(rest) or load_teacher(*rest)
    try:
        run(distill, distill_args(output_dir=tmp_path / "two", kd="topk", kd_topk=5000, overwrite=True))
        assert not asked
        run(distill, distill_args(output_dir=tmp_path / "two", kd="topk", kd_topk=5, overwrite=True))
        assert len(asked) == 1
    finally:
        distill.load_teacher = load_teacher


@pytest.mark.parametrize("kd", [slow("logits"), slow("topk")])
def test_a_resumed_run_is_the_same(distill: ModuleType, distill_args: Build, tmp_path: Path, kd: str) -> None:
    flags = {"lora_dropout": 0.2, "save_steps": 2, "kd": kd}
    run(distill, distill_args(output_dir=tmp_path / "straight", max_steps=3, **flags))
    run(distill, distill_args(output_dir=tmp_path / "stopped", max_steps=2, **flags))
    run(distill, distill_args(output_dir=tmp_path / "stopped", max_steps=3, resume=True, **flags))
    one, two = adapter(tmp_path / "straight"), adapter(tmp_path / "stopped")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "flags",
    [
        {"kd": "logits", "kd_loss": "reverse_kl"},
        slow({"kd": "topk", "kd_loss": "jsd", "answers": "big"}),
        slow({"kd": "logits", "teacher_bnb_enabled": True, "train_bnb_enabled": True}),
        slow({"kd": "logits", "tuner": "full", "lr": 1e-3}),
        slow({"kd": "logits", "teacher_model_name": "tiny/bloom", "model_name": "tiny/qwen3_5"}),
    ],
    ids=str,
)
def test_the_student_comes_nearer(
    distill: ModuleType, distill_args: Build, tmp_path: Path, flags: dict[str, Any], capsys: Any
) -> None:
    run(distill, distill_args(max_steps=-1, epochs=2, kd_alpha=1, **flags))
    apart = losses(tmp_path, "eval/kd")
    assert apart[-1] < 0.9 * apart[0]
    assert ("Teacher: This model takes no tree masks" in capsys.readouterr().out) == ("teacher_model_name" in flags)


@pytest.mark.parametrize(
    "flags",
    [slow({}), {"kd": "logits", "train_bnb_enabled": True}, slow({"kd": "topk", "tuner": "full", "lr": 1e-3})],
    ids=str,
)
def test_test_mode_and_conversion(
    distill: ModuleType, distill_args: Build, model_dir: Path, tmp_path: Path, monkeypatch: Any, flags: Any, capsys: Any
) -> None:
    """Three answers side by side, a table, a picture; and the converted student is the trained one."""
    run(distill, distill_args(test_mode=True, **flags))
    (folder,) = (tmp_path / "output").glob("DS-*/*")
    rows = [json.loads(line) for line in (folder / "test_1.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8 and set(rows[0]) == {"id", "prompt", "student", "teacher", "real"}
    assert rows[0]["real"].startswith("视频12真好看")
    assert (rows[0]["teacher"] == "老师说12-0很好看") == (not flags)
    table = (folder / "test_1.md").read_text(encoding="utf-8")
    assert table.startswith("| | chrF | ROUGE-L |") and table in capsys.readouterr().out
    assert (folder / "test_1.png").stat().st_size > 5000
    convert = load_script("convert_model.py")
    monkeypatch.setattr(convert, "from_root", lambda path: tmp_path / path)
    arguments = ["--zero_model", str(folder), "--org_model", str(model_dir / "tiny/qwen2")]
    convert.main(convert.build_parser().parse_args([*arguments, "--save_model", "new", "--t", "1"]))
    card = (tmp_path / "output_hf/new/README.md").read_text(encoding="utf-8")
    assert f"distilled from {'tiny/teacher' if flags else 'big'} ({flags.get('kd', 'sft')}, " in card


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"kd_temperature": 0}, "--kd_temperature: got 0.0"),
        ({"kd_alpha": 1.5}, "--kd_alpha: got 1.5"),
        ({"kd_beta": 0}, "--kd_beta: got 0.0"),
        ({"kd_topk": 0}, "--kd_topk: got 0"),
        ({"answers": "big"}, "--answers is for --kd logits and topk"),
        ({"teacher_model_name": "nobody"}, "There are those of: big.\nCollect them: python deepspeed_distill/prepare"),
        ({"kd": "logits", "teacher_model_name": "no/model"}, "python download_pt.py --model no/model"),
        ({"kd": "logits", "answers": "nobody"}, "There are those of: big."),
        ({"data_dir": "/nowhere"}, "python prepare_data.py --total 2000"),
    ],
)
def test_wrong_arguments(distill: ModuleType, distill_args: Build, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(SystemExit, match=says):
        run(distill, distill_args(**flags))


def test_a_teacher_with_another_tokenizer_is_refused(
    distill: ModuleType, distill_args: Build, model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    other_tokenizer().save_pretrained(tmp_path / "model/tiny/teacher")
    with pytest.raises(SystemExit, match="--kd sft"):
        run(distill, distill_args(kd="logits", model_dir=tmp_path / "model"))
    assert not list((tmp_path / "output").glob("DS-*")), "nothing is left"
