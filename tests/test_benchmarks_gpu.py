"""benchmarks/gpu: the kit runs without a card, measures what it says, and the READMEs show what was measured.

python -m pytest tests/test_benchmarks_gpu.py
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, kindred, load_script, outside_ranks, stored
from hypothesis import given, settings

sys.path.insert(0, str(ROOT / "benchmarks/gpu"))

import kit  # noqa: E402
import table  # noqa: E402
import tree_flex  # noqa: E402
from comments import ONE_PACK, load_comments, pack_of  # noqa: E402
from random_models import config_of, random_model, with_lora  # noqa: E402

from utils.train.attention import attention_mask  # noqa: E402
from utils.train.packing import lay_out, plan_packs, rank_packs  # noqa: E402

GPU = ROOT / "benchmarks/gpu"


# ---------------------------------------------------------------------------------------------------------------------
# The whole kit


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    """Every part, on the CPU: the same gradients and losses every way, models that convert, runs that resume."""
    out = tmp_path / "results.jsonl"
    environment = outside_ranks() | {"PYTHON": sys.executable}
    command = ["bash", str(GPU / "run.sh"), "--dry", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr + out.with_suffix(".log").read_text()
    rows = {(row["part"], row["name"]): row for row in table.read_results(out)}
    assert not [row for row in rows.values() if "error" in row]

    assert rows["gradients", "fp32"]["attention"]["dense mask"]["error"] < 1e-5
    assert rows["gradients", "fp32 on 4-bit weights"]["attention"]["dense mask"]["error"] < 1e-5
    bf16 = rows["gradients", "bf16"]
    assert bf16["attention"]["dense mask"]["error"] < 2 * bf16["rounding"] < 0.02
    assert bf16["tokens"] < 0.6 * bf16["tokens_alone"], "a pack that shares nothing shows nothing"
    for row in (row for (part, _), row in rows.items() if part == "gradients"):
        assert row["attention"]["FlexAttention"]["loss"] == pytest.approx(row["loss"], abs=1e-3)

    models = [part for part, name in rows if name == "padded"]
    assert models == [f"train {name}" for name in (
        "Qwen2.5-7B in 4 bits", "Qwen2.5-3B in 4 bits", "Qwen2.5-0.5B", "Qwen3-4B in 4 bits")]  # fmt: skip
    for model in models:
        shared, alone, padded = (rows[model, name] for name in ("ours", "ours, nothing shared", "padded"))
        # The same updates of the same samples; only dropout's random numbers differ.
        assert shared["loss"] == pytest.approx(padded["loss"], abs=0.02)
        assert alone["loss"] == pytest.approx(padded["loss"], abs=0.02)
        assert shared["samples_per_sec"] > 0 and shared["estimate_gib"] > 0
        per_sample = [row["tokens_per_sec"] / row["samples_per_sec"] for row in (shared, alone, padded)]
        assert per_sample == pytest.approx([per_sample[0]] * 3, rel=0.01)
        assert shared["executed_tokens_per_sec"] < 0.6 * shared["tokens_per_sec"]

    assert rows["attention", "Qwen2.5-0.5B, 384"]["kinds"]["FlexAttention"]["error"] < 1e-5
    assert len(rows["stages", "LoRA, 10 steps"]["losses"]) == 10
    assert rows["stages", "LoRA, 5 steps and 5 resumed"]["equal"]
    for kind in ("LoRA", "QLoRA"):
        assert [link[:6] for link in rows["stages", f"{kind}, converted"]["links"]] == ["Link 1", "Link 2"]
    assert rows["stages", "LoRA, replies"]["reply"]
    assert rows["preferences", "DPO, 3 steps"]["losses"][0] == pytest.approx(np.log(2), abs=1e-4)
    assert len(rows["preferences", "distillation, 3 steps"]["losses"]) == 3
    assert rows["profile Qwen2.5-0.5B", "an update"]["host"]
    assert rows["host", "packing"]["samples"] == 4 * len(load_comments(tiny=True))
    for heading in ("samples/s", "gradients of a pack", "attention of a layer", "the scripts themselves"):
        assert heading in done.stdout


def test_without_a_card(tmp_path: Path) -> None:
    """No traceback, and what to do instead."""
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}  # No nvidia-smi.
    done = subprocess.run([sys.executable, GPU / "run.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "--dry" in done.stderr and "Traceback" not in done.stderr


def test_parts_that_hang_or_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Each is ended, the next one runs, and the summary names them."""
    run = load_script("benchmarks/gpu/run.py")
    (tmp_path / "hang.py").write_text("import time; time.sleep(600)")
    (tmp_path / "fail.py").write_text("raise SystemExit('no')")
    writes = (
        "import sys\nout = next(word[6:] for word in sys.argv if word.startswith('--out='))\n"
        'open(out, "a").write(\'{"part": "good", "name": "one"}\\n{"part": "good", "name": "two", "error": "no"}\\n\')'
    )
    (tmp_path / "good.py").write_text(writes)
    monkeypatch.setattr(run, "HERE", tmp_path)
    steps = [run.Step(name, [f"{name}.py"], seconds) for name, seconds in (("hang", -18), ("fail", 30), ("good", 30))]
    monkeypatch.setattr(run, "STEPS", steps)
    started = time.monotonic()
    out = tmp_path / "results.jsonl"
    args = argparse.Namespace(out=out, parts=None, time_factor=1.0, memory_gib=7.3, dry=False)
    run.main(args)
    assert time.monotonic() - started < 30
    said = capsys.readouterr().out
    assert "hang (ended after 2 s)" in said and "fail (exit code 1" in said and "good: two" in said
    assert "2 measurements" in said
    args.dry = True
    with pytest.raises(SystemExit):
        run.main(args)


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kit.Part:
    """A part in this process."""
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    arguments = ["--dry", "--out", str(tmp_path / "results.jsonl"), "--seconds", "20"]
    return kit.Part("trial", kit.part_parser("A trial.").parse_args(arguments))


def test_measurements_are_written_at_once(part: kit.Part, tmp_path: Path) -> None:
    def fail(message: str, size: int) -> dict[str, Any]:
        raise ValueError(message)

    def no_memory() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert part.measure("good", 5, lambda size: {"double": 2 * size}, size=4) == {"double": 8}
    assert part.measure("bad", 5, fail, "who knows", size=4) is None
    assert part.measure("large", 5, no_memory) is None
    assert part.measure("slow", 1.2, lambda: time.sleep(30)) is None
    part.measure("not finite", 5, lambda: {"error_of": float("nan"), "list": [float("inf"), 1.0]})
    rows = table.read_results(tmp_path / "results.jsonl")
    assert [row["name"] for row in rows] == ["good", "bad", "large", "slow", "not finite"]
    assert rows[0]["size"] == 4 and rows[0]["double"] == 8 and rows[0]["sec"] < 1
    assert rows[1]["error"] == "ValueError: who knows" and __file__ in rows[1]["at"] and rows[1]["size"] == 4
    assert rows[2]["error"] == "out of memory"
    assert rows[3]["error"] == "not done within 1 s" and rows[3]["sec"] < 5
    assert rows[4]["error_of"] == "nan" and rows[4]["list"] == ["inf", 1.0]


def test_no_measurement_begins_when_the_time_is_over(part: kit.Part, tmp_path: Path) -> None:
    part._end = time.perf_counter()
    assert part.measure("late", 5, lambda: {"x": 1}) is None
    assert table.read_results(tmp_path / "results.jsonl")[0]["error"] == "no time was left"


def test_relative_error() -> None:
    one, two = [torch.tensor([3.0, 0.0]), torch.tensor([1.0])], [torch.tensor([3.0, 4.0]), torch.tensor([1.0])]
    assert kit.relative_error(one, two) == pytest.approx(4 / np.sqrt(26))
    assert np.isnan(kit.relative_error([torch.tensor([float("nan")])], [torch.tensor([1.0])]))


# ---------------------------------------------------------------------------------------------------------------------
# Models, data, attention


def test_comments_are_those_of_the_examples(tmp_path: Path) -> None:
    """As many under each video as prepare_data.py finds; else make_comments.py has to be run again."""
    command = [sys.executable, ROOT / "prepare_data.py", "--data_dir", "examples", "--output_dir", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    records = [record for split in ("train", "test")
               for record in json.loads((tmp_path / f"data_{split}.json").read_text(encoding="utf-8"))]  # fmt: skip
    samples = load_comments()
    assert len(samples) == len(records)
    videos = [record["video_id"] for record in records]
    assert samples.group.tolist() == np.unique(videos, return_inverse=True)[1].tolist() or sorted(
        np.bincount(samples.group)
    ) == sorted(np.unique(videos, return_counts=True)[1])
    assert samples.tokens.max() < 151_936 and 16 <= samples.lengths.min() <= samples.lengths.max() <= 512
    # Comments of a video begin alike.
    first, second = (samples[number].input_ids for number in np.flatnonzero(samples.group == samples.group[0])[:2])
    assert (first[:30] == second[:30]).all()


def test_make_comments(tmp_path: Path, data_dir: Path, model_dir: Path) -> None:
    """What is written is what training would read."""
    from utils.data.chat import make_chat
    from utils.data.samples import load_samples
    from utils.data.tokenizer import load_tokenizer

    script, target = load_script("benchmarks/gpu/make_comments.py"), tmp_path / "comments.npz"
    model = model_dir / "tiny/qwen2"
    flags = ["--data_dir", str(data_dir), "--model", str(model), "--output", str(target)]
    script.main(script.build_parser().parse_args(flags))
    chat = make_chat(load_tokenizer(model))
    parts = [load_samples(data_dir / f"data_{split}.json", chat, 1024, tmp_path).samples for split in ("train", "test")]
    with np.load(target) as file:
        for name in ("tokens", "supervised", "lengths"):
            assert (file[name] == np.concatenate([getattr(part, name) for part in parts])).all()
        assert len(set(file["video"])) == 14


def test_tiny_comments_share_what_the_real_ones_share() -> None:
    tiny, real = load_comments(tiny=True), load_comments()
    chosen = [real[int(number)] for number in tiny.ids]
    assert all(len(one.input_ids) == len(other.input_ids) for one, other in zip(tiny, chosen, strict=True))
    counts = [plan_packs(s, [np.arange(len(s))], ONE_PACK).count(s, range(1)) for s in (tiny, stored(chosen))]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("most_tokens", [300, 1000])
def test_pack_of(most_tokens: int) -> None:
    samples = load_comments()
    numbers, pack = pack_of(samples, most_tokens)
    assert sorted(numbers) == list(range(len(numbers))) and len(pack.input_ids) <= most_tokens
    more = plan_packs(samples, [np.arange(len(numbers) + 1)], ONE_PACK)
    assert more.count(samples, range(1))["executed"] > most_tokens


@pytest.mark.parametrize("shape", ["Qwen2.5-0.5B", "Qwen3-4B"])
def test_random_models(shape: str) -> None:
    """Every weight is filled, alike in all precisions; 4-bit ones are the quantised 16-bit ones."""
    import bitsandbytes.functional as bnb

    config = config_of(shape, tiny=True)
    plain = random_model(config, torch.float32, "cpu")
    half = random_model(config_of(shape, tiny=True), torch.bfloat16, "cpu")
    for (name, one), (other_name, other) in zip(plain.named_parameters(), half.named_parameters(), strict=True):
        assert name == other_name and (one == other.float()).all()
        assert one.std() == pytest.approx(0.02, rel=0.1) if one.ndim == 2 else one.unique().numel() == 1
    assert plain.lm_head.weight is plain.get_input_embeddings().weight, "tied"
    quantised = random_model(config_of(shape, tiny=True), torch.float32, "cpu", bits=4)
    layer = quantised.model.layers[1].mlp.up_proj
    dequantised = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    codes, state = bnb.quantize_4bit(
        plain.model.layers[1].mlp.up_proj.weight.data, quant_type="nf4", compress_statistics=True
    )
    assert (dequantised == bnb.dequantize_4bit(codes, state)).all()
    assert quantised.is_loaded_in_4bit and not hasattr(quantised.lm_head.weight, "quant_state")


def test_trained_adapters_are_alike_in_all_precisions() -> None:
    one, two = (
        with_lora(random_model(config_of("Qwen2.5-0.5B", tiny=True), dtype, "cpu"), trained=True)
        for dtype in (torch.float32, torch.bfloat16)
    )
    trained = [(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True) if a.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all((a == b.float()).all() and a.std() > 0.01 for a, b in trained)


@pytest.mark.parametrize("shape", ["Qwen2.5-0.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Qwen3-4B"])
def test_true_shapes(shape: str) -> None:
    """As many weights as the models on the hub have, by their cards (tied heads counted once)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    billions = {"Qwen2.5-0.5B": 0.494, "Qwen2.5-3B": 3.086, "Qwen2.5-7B": 7.616, "Qwen3-4B": 4.022}[shape]
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


@given(samples=kindred(longest=40))
@settings(max_examples=60, deadline=None)
def test_block_mask(samples: list[Any]) -> None:
    """The blocks are those that PyTorch finds by trying every pair of tokens, and in them the dense mask stands."""
    from torch.nn.attention.flex_attention import create_block_mask

    everything = stored(samples)
    plan = plan_packs(everything, [np.arange(len(samples))], ONE_PACK)
    (pack,) = rank_packs(everything, plan, 0, 0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tree_flex, "BLOCK", 16)
        pack = tree_flex.padded(pack, 16)
        ours = tree_flex.block_mask(pack.subtree_end, "cpu")
    length = len(pack.input_ids)
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=16)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert (getattr(ours, name) == getattr(theirs, name)).all(), name
    assert (ours.to_dense() == theirs.to_dense()).all()
    dense = attention_mask(pack)[0, 0]
    place = torch.arange(length)
    assert (ours.mask_mod(0, 0, place[:, None], place[None, :]) == dense).all()
    some = dense.view(length // 16, 16, -1, 16).any(3).any(1)
    assert (ours.to_dense()[0, 0].bool() == some).all()


def test_flex_is_the_dense_mask() -> None:
    """Values of the eager form, with grouped heads, on real comments; padding changes nothing before it."""
    pack = pack_of(load_comments(), 700)[1]
    longer = tree_flex.padded(pack)
    assert len(longer.input_ids) % tree_flex.BLOCK == 0 and len(pack.input_ids) % tree_flex.BLOCK
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(longer.input_ids), 16) for heads in (4, 2, 2))
    ours = tree_flex.flex(query, key, value, tree_flex.block_mask(longer.subtree_end, "cpu"))
    length = len(pack.input_ids)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :length],
        key[:, :, :length].repeat_interleave(2, 1),
        value[:, :, :length].repeat_interleave(2, 1),
        attn_mask=attention_mask(pack),
    )
    assert kit.relative_error([ours[:, :, :length]], [dense]) < 1e-6


def test_padded_batches_have_the_samples_losses() -> None:
    """Against each sample by itself."""
    from bench_train import padded_batch

    samples = [load_comments(tiny=True)[number] for number in range(5)]
    model = random_model(config_of("Qwen2.5-0.5B", tiny=True), torch.float32, "cpu").eval()
    batch = padded_batch(samples)
    learnt = [int(sample.supervised[1:].sum()) for sample in samples]
    with torch.no_grad():
        together = model(**batch).loss.item()
        alone = 0.0
        for sample, count in zip(samples, learnt, strict=True):
            pack = lay_out([sample], [0])
            logits = model(input_ids=pack.input_ids[None]).logits[0, pack.target_index]
            alone += torch.nn.functional.cross_entropy(logits, pack.target_ids).item() * count
    assert together == pytest.approx(alone / sum(learnt), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def rows_of_a_card() -> list[dict[str, Any]]:
    """What a card might give, by hand."""
    versions = {"torch": "2.11.0", "transformers": "5.23.0", "liger-kernel": "0.8.5"}
    return [
        {"part": "card", "name": "card", "card": "Some Card", "memory_gib": 79.1, "limit_gib": 7.3,
         "versions": versions},
        {"part": "gradients", "name": "fp32", "attention": {"dense mask": {"error": 2e-6}, "dense mask, cuDNN": {
            "error": "RuntimeError: no kernel"}}, "loss": 1.0},
        {"part": "train Q", "name": "ours", "pack_tokens": 2048, "error": "out of memory"},
        {"part": "train Q", "name": "ours", "pack_tokens": 1024, "samples_per_sec": 30.0, "tokens_per_sec": 4500,
         "peak_gib": 6.5, "estimate_gib": 6.25},
        {"part": "train Q", "name": "padded", "batch_size": 4, "samples_per_sec": 10.0, "tokens_per_sec": 1500,
         "peak_gib": 7.1},
        {"part": "attention", "name": "Q, 512", "tokens": 512, "kinds": {"FlexAttention": {"both_ms": 0.5}}},
        {"part": "attention", "name": "Q, 2048", "tokens": 2048, "kinds": {"FlexAttention": {"both_ms": 1.25}}},
        {"part": "profile Q", "name": "an update", "step_ms": 100.0, "busy_ms": 60.0, "idle": 0.4, "host_ms": 80.0,
         "launches": 1234},
        {"part": "stages", "name": "LoRA, 10 steps", "losses": [3.0, 2.5]},
    ]  # fmt: skip


def test_summary() -> None:
    text = table.summary(rows_of_a_card())
    assert "Some Card, memory held to 7.3 GiB; PyTorch 2.11.0, transformers 5.23.0, Liger 0.8.5" in text
    assert "| Q: ours, packs of 1024 | 30 | 4,500 | 3.00x | 6.5 | 6.25 |" in text
    assert "| Q: padded, batches of 4 | 10 | 1,500 | 1.00x | 7.1 |  |" in text
    assert "| fp32 | 2.0e-06 | RuntimeError |  |" in text
    assert "| Q: FlexAttention | 0.5 | 1.25 |" in text
    assert "| Q | 100 | 60 | 40% | 80 | 1,234 |" in text
    assert "| LoRA, 10 steps | 3.000 -> 2.500 |" in text


def test_what_did_not_fit_says_so() -> None:
    rows = [row for row in rows_of_a_card() if row.get("pack_tokens") != 1024]
    assert "| Q: ours, packs of 2048 | out of memory |  |  |  |  |" in table.summary(rows)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_readmes_show_what_was_measured(language: str) -> None:
    """Else run: python benchmarks/gpu/table.py --write"""
    text = (ROOT / table.READMES[language]).read_text(encoding="utf-8")
    tables = table.of_all(sorted(table.RESULTS.glob("*.jsonl")), language)
    assert table.with_tables(text, tables) == text and text.count(table.BEGIN) == text.count(table.END) == 1
    assert table.WORDS["en"].keys() == table.WORDS[language].keys()


def test_tables_are_replaced_in_their_place(tmp_path: Path) -> None:
    cards = {"A_card-2026-11-01-1200": "old", "A_card-2026-12-01-0900": "new", "B-2026-01-01-0000": "b"}
    for name, card in cards.items():
        rows = [{**row, "card": card} if row["part"] == "card" else row for row in rows_of_a_card()]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines + '{"part": "torn')
    tables = table.of_all(sorted(tmp_path.glob("*.jsonl")), "zh")
    assert "new，" in tables and "b，" in tables and "old" not in tables
    readme = f"before\n{table.BEGIN}\nstale\n{table.END}\nafter\n"
    written = table.with_tables(readme, tables)
    assert written == f"before\n{table.BEGIN}\n{tables}\n{table.END}\nafter\n"
    assert table.with_tables(written, tables) == written
