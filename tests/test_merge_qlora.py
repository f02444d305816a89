"""merge_qlora.py: adapters of any tool become plain models that say what base and adapter say.

python -m pytest tests/test_merge_qlora.py
"""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, load_script, make_model, run, slow
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_convert_model import PLAIN_USER, damage
from test_utils_weights_llama_pth import make_weights, meta_logits, write
from test_utils_weights_merging import ALL, make_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.files import exclusive_lock
from utils.weights.loading import load_model

IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def merge() -> ModuleType:
    return load_script("merge_qlora.py")


@pytest.fixture
def base(root: Path, tokenizer: Any) -> Path:
    """A model in 16 bits, as they are published."""
    make_model("llama", len(tokenizer)).to(torch.bfloat16).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    (root / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (root / "base/LICENSE").write_text("the licence")
    return root / "base"


def adapter_on(model: Any, folder: Path, seed: int = 1, **settings: Any) -> Any:
    adapted = make_adapter(model, seed, **({"target_modules": ALL} | settings))
    adapted.save_pretrained(folder)
    return adapted


def merged(merge: ModuleType, *more: str, base: str = "base", save: str = "merged") -> None:
    merge.main(merge.build_parser().parse_args(["--base_model", base, "--save_path", save, *more]))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits[0].float()


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_a_lora_of_another_tool(merge: ModuleType, base: Path, root: Path, capsys: Any) -> None:
    expected = logits_of(adapter_on(plain(base), root / "adapter"))
    merged(merge, "--qlora_model", "adapter", "--base", "original", "--dtype", "fp32")
    assert (logits_of(plain(root / "merged")) - expected).abs().max() < 1e-4
    assert "Link 2" in capsys.readouterr().out
    card = (root / "merged/README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "- adapter, weight 1" in card and "its weights own" in card
    assert (root / "merged/LICENSE").is_file() and AutoTokenizer.from_pretrained(root / "merged").chat_template
    # In the base's own precision, in files of a size.
    merged(merge, "--qlora_model", "adapter", "--base", "original", "--max_shard_size", "100KB", save="small")
    index = json.loads((root / "small/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    config = json.loads((root / "small/config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    assert (logits_of(plain(root / "small")) - expected).abs().max() < 0.2


FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True}),
    "dora, tied": ("qwen2", {"use_dora": True}),
    "saved": ("qwen3", {"modules_to_save": ["lm_head", "norm"]}),
    "saved, tied": ("gemma3", {"modules_to_save": ["embed_tokens"]}),
    "rslora, saved": ("mistral", {"use_rslora": True, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "larger": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "larger, tied": ("qwen2", {"target_modules": [*ALL, "embed_tokens"]}),
}


@pytest.mark.slow
def test_a_new_process_gets_what_peft_says(merge: ModuleType, root: Path, tokenizer: Any, model_dir: Path) -> None:
    """DoRA, whole modules and larger vocabularies on all kinds of models; nothing of this project reads the result."""
    jobs, expected = [], {}
    for name, (kind, settings) in FOREIGN.items():
        model, words = plain(model_dir / "tiny" / kind), tokenizer
        if "larger" in name:
            words = AutoTokenizer.from_pretrained(model_dir / "tiny" / kind)
            words.add_tokens(["[笑哭]", "[doge]"])
            model.resize_token_embeddings(len(words), mean_resizing=False)
        expected[name] = logits_of(adapter_on(model, root / name, **settings))
        words.save_pretrained(root / name)
        # In four files at least, which a new process has to put together.
        merged(
            merge, "--qlora_model", name, "--base", "original", "--max_shard_size", "50KB",
            base=str(model_dir / "tiny" / kind), save=f"merged/{name}",
        )  # fmt: skip
        assert len(list((root / "merged" / name).glob("model-*.safetensors"))) > 3
        save_file({"input_ids_0": IDS[0]}, root / f"{name}.probe")
        jobs.append((str(root / "merged" / name), str(root / f"{name}.probe"), str(root / f"{name}.logits")))
    subprocess.run([sys.executable, "-c", PLAIN_USER, json.dumps(jobs)], check=True)
    for name, logits in expected.items():
        assert (load_file(root / f"{name}.logits")["input_ids_0"] - logits).abs().max() < 1e-3, name
        assert logits.shape[1] == len(tokenizer) + 2 * ("larger" in name)


def test_a_qlora_of_another_tool(merge: ModuleType, base: Path, root: Path, capsys: Any) -> None:
    """PEFT beside bitsandbytes' own 4-bit layers says what the merged model says."""
    adapter_on(plain(base), root / "adapter")
    model = load_model(base, torch.bfloat16, 4).dequantize().float()
    expected = logits_of(PeftModel.from_pretrained(model, root / "adapter"))
    merged(merge, "--qlora_model", "adapter", "--dtype", "fp32")
    told = capsys.readouterr().out
    assert "4-bit (NF4), dequantised weights. If that is wrong: --base original" in told
    assert (logits_of(plain(root / "merged")) - expected).abs().max() < 1e-4
    merged(merge, "--qlora_model", "adapter", "--dtype", "fp32", "--base", "original", save="other")
    assert (logits_of(plain(root / "other")) - expected).abs().max() > 0.01
    assert "No record" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rslora, saved", "dora, tied", "saved"])
def test_a_damaged_adapter_is_refused_or_what_peft_makes_of_it(
    merge: ModuleType, root: Path, model_dir: Path, name: str
) -> None:
    """Fifty damages of each. No record says what the adapter was: what is merged is what PEFT reads in its files."""
    kind, settings = FOREIGN[name]
    base, written, refused = model_dir / "tiny" / kind, 0, Counter()
    adapter_on(plain(base), root / "kept", **settings)
    (root / "kept/README.md").unlink()
    for seed in range(50):
        shutil.rmtree(root / "adapter", ignore_errors=True)
        shutil.copytree(root / "kept", root / "adapter")
        what = damage(root / "adapter", random.Random(f"{name} {seed}"))
        try:
            merged(merge, "--qlora_model", "adapter", "--base", "original", base=str(base))
        except SystemExit as stop:
            assert isinstance(stop.code, str) and 10 < len(stop.code) < 1200, (seed, what)
            assert not (root / "merged").exists() and not (root / ".merged.partial").exists(), (seed, what)
            refused[stop.code[:60]] += 1
        else:
            written += 1
            expected = logits_of(PeftModel.from_pretrained(plain(base), root / "adapter"))
            assert (logits_of(plain(root / "merged")) - expected).abs().max() < 1e-3, (seed, what)
            shutil.rmtree(root / "merged")
    assert written > 3 and refused.total() > 10 and len(refused) > 3, (written, refused)


def test_several_adapters(merge: ModuleType, base: Path, root: Path) -> None:
    original = load_file(base / "model.safetensors")
    sums = {name: tensor.float() for name, tensor in original.items()}
    for seed, weight in ((1, 0.5), (2, 0.25)):
        adapter_on(plain(base), root / f"adapter{seed}", seed)
        alone = PeftModel.from_pretrained(plain(base), root / f"adapter{seed}").merge_and_unload().state_dict()
        for name, tensor in original.items():
            sums[name] += weight * (alone[name] - tensor.float())
    flags = ["--qlora_model", "adapter1", "adapter2", "--weights", "0.5", "0.25"]
    merged(merge, *flags, "--base", "original", "--dtype", "fp32")
    for name, tensor in load_file(root / "merged/model.safetensors").items():
        assert (tensor - sums[name]).abs().max() < 1e-5, name
    assert "- adapter2, weight 0.25" in (root / "merged/README.md").read_text()


@pytest.mark.parametrize("bits", [False, True])
def test_a_checkpoint_of_this_project(
    merge: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, root: Path, capsys: Any, bits: bool
) -> None:
    """Its probe is replayed, and it knows what it was trained on."""
    run(ft, train_args(train_bnb_enabled=bits, output_dir=root / "output"))
    (tag,) = (root / "output").glob("*/*/1")
    capsys.readouterr()
    merged(merge, "--qlora_model", str(tag), base=str(model_dir / "tiny/qwen2"))
    told = capsys.readouterr().out
    assert "Link 1, rebuilt as it was trained" in told and "No record" not in told
    probe = load_file(tag / "probe.safetensors")
    with torch.no_grad():
        logits = plain(root / "merged")(input_ids=probe["input_ids_0"][None]).logits[0]
    assert (logits[-len(probe["logits_0"]) :] - probe["logits_0"]).abs().max() < 1e-4
    record = json.loads((root / "merged/run.json").read_text())
    assert record["settings"]["model_name"] == "tiny/qwen2" and record["data"]["system_prompt"]
    # The wrong kind of base is found out.
    other = ["--base", "original" if bits else "dequant4"]
    if bits:
        merged(merge, "--qlora_model", str(tag / "adapter"), *other, base=str(model_dir / "tiny/qwen2"), save="other")
        assert "which are not those trained on" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="not the model that was trained"):
            merged(merge, "--qlora_model", str(tag), *other, base=str(model_dir / "tiny/qwen2"), save="other")
        assert not (root / "other").exists()


def test_a_larger_vocabulary_brings_its_tokenizer(merge: ModuleType, base: Path, root: Path, tokenizer: Any) -> None:
    model, size = plain(base), len(tokenizer)
    larger = AutoTokenizer.from_pretrained(base)
    larger.add_tokens(["<|new|>", "<|newer|>"])
    model.resize_token_embeddings(size + 2)
    adapted = make_adapter(model, 1, target_modules=ALL)
    adapted.save_pretrained(root / "adapter", save_embedding_layers=True)
    larger.save_pretrained(root / "adapter")
    merged(merge, "--qlora_model", "adapter", "--base", "original", "--dtype", "fp32")
    assert len(AutoTokenizer.from_pretrained(root / "merged")) == size + 2
    assert (logits_of(plain(root / "merged")) - logits_of(adapted)).abs().max() < 1e-4


def test_metas_llama_becomes_a_model(merge: ModuleType, root: Path) -> None:
    import sentencepiece

    weights = {name: tensor.to(torch.bfloat16) for name, tensor in make_weights().items()}
    write(weights, root / "meta", 2)
    text = root / "text.txt"
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8").encode("ascii", "ignore").decode())
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(root / "meta/tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, character_coverage=0.98, hard_vocab_limit=False,
    )  # fmt: skip
    merged(merge, base="meta", save="model/llama")
    model = plain(root / "model/llama")
    expected = meta_logits({name: tensor.float() for name, tensor in weights.items()}, IDS[0])
    assert (logits_of(model) - expected).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(root / "model/llama").encode("a")[0] == 1
    # It is now a base like any other.
    adapter_on(model, root / "adapter")
    merged(merge, "--qlora_model", "adapter", base="model/llama")
    # And so are Meta's files themselves.
    merged(merge, "--qlora_model", "adapter", base="meta", save="direct")
    one, two = (load_file(root / name / "model.safetensors") for name in ("merged", "direct"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_old_base_becomes_safetensors(merge: ModuleType, base: Path, root: Path) -> None:
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    merged(merge)
    written = load_file(root / "merged/model.safetensors")
    assert written.keys() == weights.keys() and all(torch.equal(written[name], weights[name]) for name in weights)
    assert not (root / "merged/pytorch_model.bin").exists()


@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", *map(slow, ("exclude_modules", "alpha_pattern"))])
def test_patterns_that_never_end_are_refused(
    merge: ModuleType, base: Path, root: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """Matching this one takes twice as long for each letter more of a layer's name."""
    monkeypatch.setattr("utils.weights.adapters.PATTERN_SEC", 1)
    adapter_on(plain(base), root / "adapter")
    path = root / "adapter/adapter_config.json"
    pattern = r"((\w|\.)+)+!"
    value = {pattern: 8} if field.endswith("_pattern") else pattern
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(SystemExit, match="patterns of layers take too long"):
        merged(merge, "--qlora_model", "adapter", "--base", "original")
    assert not (root / "merged").exists()


def test_patterns_are_matched_as_by_peft(merge: ModuleType, base: Path, root: Path) -> None:
    """Ordinary ones cost a moment."""
    pattern = r".*layers\.[01]\..*(q|v)_proj"
    expected = logits_of(adapter_on(plain(base), root / "adapter", target_modules=pattern, rank_pattern={"q.*": 3}))
    merged(merge, "--qlora_model", "adapter", "--base", "original", "--dtype", "fp32")
    assert (logits_of(plain(root / "merged")) - expected).abs().max() < 1e-4


def test_two_merges_at_once(merge: ModuleType, base: Path, root: Path) -> None:
    adapter_on(plain(base), root / "adapter")
    with exclusive_lock(root / "merged"):
        command = [sys.executable, str(ROOT / "merge_qlora.py"), "--base_model", str(base)]
        command += ["--qlora_model", str(root / "adapter"), "--save_path", str(root / "merged")]
        second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1 and "Another process is writing" in second.stderr
    assert "Traceback" not in second.stderr and not (root / "merged").exists()


def test_a_link_in_an_adapters_folder(merge: ModuleType, base: Path, root: Path) -> None:
    """Its tokenizer is written into the merged model."""
    adapter_on(plain(base), root / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(root / "adapter")
    (root / "key").write_text('{"token": "SECRET"}')
    (root / "adapter/added_tokens.json").symlink_to(root / "key")
    with pytest.raises(SystemExit, match="adapter/added_tokens.json is a link to a file outside"):
        merged(merge, "--qlora_model", "adapter", "--base", "original")


def test_user_errors(merge: ModuleType, base: Path, root: Path) -> None:
    adapter_on(plain(base), root / "tool/adapter")

    def message(*more: str, **names: str) -> str:
        with pytest.raises(SystemExit) as stop:
            merged(merge, *more, **names)
        assert isinstance(stop.value.code, str) and not (root / "merged").exists()
        return stop.value.code

    adapter = ["--qlora_model", "tool/adapter"]
    assert "There are: tool/adapter" in message("--qlora_model", ".")
    assert "python download_pt.py" in message(*adapter, base="nowhere")
    assert "got 2 for 1 adapters" in message(*adapter, "--weights", "1", "2")
    assert "got [nan], expected numbers" in message(*adapter, "--weights", "nan")
    assert "needs an adapter" in message("--base", "dequant4")
    words = AutoTokenizer.from_pretrained(base)
    words.add_tokens(["[doge]"])
    words.save_pretrained(root / "tool/adapter")
    assert "has more tokens than the model's" in message(*adapter)
    (root / "tool/adapter/tokenizer_config.json").unlink()
    (root / "own").mkdir()
    (root / "own/file").write_text("mine")
    assert "is no earlier conversion" in message(*adapter, save="own")
    (root / "tool/adapter/adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert "tool/adapter cannot be used" in message(*adapter)
    adapter_on(plain(base), root / "tool/adapter", target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    config = root / "tool/adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"q_proj"', '"v_proj"'))
    assert "cannot be used: the adapter" in message(*adapter)
    wide = make_model("llama", 300, intermediate_size=192)
    wide.save_pretrained(root / "wide")
    shutil.copy(base / "tokenizer.json", root / "wide")
    adapter_on(plain(base), root / "tool/adapter")
    assert "wide cannot be used" in message(*adapter, base="wide")


@pytest.mark.parametrize("free", [0, 10**5])
def test_a_disk_without_room(
    merge: ModuleType, base: Path, root: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    adapter_on(plain(base), root / "adapter")
    usage = shutil.disk_usage(root)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SystemExit, match="Make room"):
        merged(merge, "--qlora_model", "adapter", "--base", "original")
    assert sorted(path.name for path in root.iterdir()) == ["adapter", "base"]


@pytest.mark.slow
def test_a_killed_run_leaves_no_model(base: Path, root: Path) -> None:
    """And the same command makes one."""
    adapter_on(plain(base), root / "adapter")
    command = [sys.executable, str(ROOT / "merge_qlora.py"), "--base_model", str(base), "--base", "original"]
    command += ["--qlora_model", str(root / "adapter"), "--save_path", str(root / "merged")]
    # It dies in the middle of the weights, as by a power cut.
    die = "import os, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
    die += "import utils.weights.merging as m; check = m.checked; seen = []\n"
    die += "m.checked = lambda *a: os._exit(9) if len(seen) > 8 else seen.append(1) or check(*a)\n"
    die += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    died = subprocess.run([command[0], "-c", die, *command[1:]], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    assert not (root / "merged").exists() and (root / ".merged.partial/model.safetensors").stat().st_size > 1000
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in root.iterdir()) == ["adapter", "base", "merged"]
    expected = logits_of(PeftModel.from_pretrained(plain(base), root / "adapter"))
    assert (logits_of(plain(root / "merged")) - expected).abs().max() < 0.2


def test_command_line_without_traceback() -> None:
    command = [sys.executable, str(ROOT / "merge_qlora.py"), "--base_model", "no/model", "--save_path", "x"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert "no model at no/model" in finished.stderr
