"""deepspeed_pt/train.py: continued pre-training equals a plain loop over single documents.

python -m pytest tests/test_deepspeed_pt.py
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, adapter, distance, example_texts, launch, load_script, make_model, read_metrics, run, slow
from safetensors.torch import load_file
from test_deepspeed_ft import assert_same_numbers, assert_same_state, train_losses
from transformers import AutoModelForCausalLM

from utils.train.packing import draw_windows

Build = Callable[..., list[str]]


@pytest.fixture(scope="module")
def pt() -> ModuleType:
    return load_script("deepspeed_pt/train.py")


@pytest.fixture(scope="module")
def merge() -> ModuleType:
    return load_script("merge_tokenizer.py")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 20 to 200 tokens."""
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    texts = [text for text in example_texts() if 20 < len(text) < 120][:80]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def args(train_args: Build, text: Path) -> Build:
    """Builds a command line for a short run."""

    def build(*data: str, **flags: Any) -> list[str]:
        whole = train_args(**{"test_size": 0.1} | flags)
        place = whole.index("--data_dir")
        sources = data or (str(text),)
        return [*whole[:place], *whole[place + 2 :], *(part for one in sources for part in ("--data", one))]

    return build


def plain_pytorch(model_dir: Path, text: Path, steps: int, kind: str, eval_texts: list[str]) -> dict[str, Any]:
    """The same training without DeepSpeed, packs, masks or utils/: one document at a time, plain AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(model_dir / "tiny/qwen2")
    model = AutoModelForCausalLM.from_pretrained(model_dir / "tiny/qwen2", dtype=torch.float32)
    if kind != "full":
        both = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
        more = both if kind == "embeddings" else {}
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **more)
        model = get_peft_model(model, lora)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    apart = {name for name in weights if "embed_tokens" in name or "lm_head" in name}
    groups = [{"params": [weight for name, weight in weights.items() if (name in apart) == own], "lr": lr}
              for own, lr in ((False, 1e-2), (True, 1e-3))]  # fmt: skip
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    documents = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    documents = [document for document in documents if document not in eval_texts]

    def nats(document: str) -> tuple[torch.Tensor, int]:
        ids = torch.tensor([[*tokenizer.encode(document), tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"), ids.shape[1] - 1

    losses = []
    for window in draw_windows(np.arange(len(documents)), 8, 1, 1, 42)[:steps]:
        found = [nats(documents[number]) for number in window]
        loss = sum(one for one, _ in found) / sum(count for _, count in found)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        held_out = [nats(document) for document in eval_texts]
    bits = sum(one.item() for one, _ in held_out) / math.log(2)
    first = sum(len(tokenizer.decode(tokenizer.encode(document)[:1]).encode()) for document in eval_texts)
    size = sum(len(document.encode()) for document in eval_texts) - first
    return {"losses": losses, "weights": weights, "bits": bits / size}


def held_out_texts(text: Path, model_dir: Path, tmp_path: Path) -> list[str]:
    """The documents that a run has held out, as its samples say."""
    from transformers import AutoTokenizer

    from utils.data.documents import load_texts

    tokenizer = AutoTokenizer.from_pretrained(model_dir / "tiny/qwen2")
    found = load_texts([text], tokenizer, 256, 0.1, tmp_path / "other-cache")
    return [tokenizer.decode(found.samples[number].input_ids[:-1]) for number in found.held_out.nonzero()[0]]


KINDS = {"LoRA": {}, "embeddings": {"train_embeddings": True}, "full": {"tuner": "full"}}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_pytorch(
    pt: ModuleType, args: Build, model_dir: Path, text: Path, tmp_path: Path, kind: str
) -> None:
    """Losses, weights, and bits a byte of held-out text; embeddings with a tenth of the learning rate."""
    run(pt, args(eval_samples=-1, **KINDS[kind]))
    eval_texts = held_out_texts(text, model_dir, tmp_path)
    assert 2 < len(eval_texts) < 20
    plain = plain_pytorch(model_dir, text, 3, kind, eval_texts)
    assert train_losses(tmp_path) == pytest.approx(plain["losses"], rel=1e-5)
    assert read_metrics(tmp_path / "output")[-1]["eval/bits_per_byte"] == pytest.approx(plain["bits"], rel=1e-4)
    if kind == "LoRA":
        ours = adapter(tmp_path / "output")
        ours = {name.replace(".weight", ".default.weight"): tensor for name, tensor in ours.items()}
        assert distance(ours, {name: w.detach() for name, w in plain["weights"].items()}) < 5e-4


@pytest.mark.parametrize(
    "changes",
    [{"pack_tokens": 256, "batch_size": 2, "grad_accum": 4}, *map(slow, [{"zero_stage": 0}, {"zero_stage": 1}])]
    + [slow({"zero_stage": 3}), slow({"share_prefix": True, "group_size": 1})],
    ids=str,
)
def test_cutting_changes_nothing(pt: ModuleType, args: Build, tmp_path: Path, changes: dict[str, Any]) -> None:
    run(pt, args(output_dir=tmp_path / "one"))
    run(pt, args(output_dir=tmp_path / "two", **changes))
    assert_same_numbers(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_equal_one(pt: ModuleType, args: Build, tmp_path: Path, zero_stage: int) -> None:
    run(pt, args(output_dir=tmp_path / "one"))
    arguments = args(output_dir=tmp_path / "two", batch_size=4, grad_accum=1, zero_stage=zero_stage)
    finished = launch("deepspeed_pt/train.py", arguments, ranks=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_same_numbers(tmp_path / "one", tmp_path / "two")
    bits = [read_metrics(tmp_path / name)[-1]["eval/bits_per_byte"] for name in ("one", "two")]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)


@contextmanager
def stopping_at(last: int) -> Iterator[None]:
    """What is run inside is stopped as by Ctrl-C, before this step."""

    def stopping(steps: range, *_: Any, **__: Any) -> Any:
        for step in steps:
            if step == last:
                raise KeyboardInterrupt
            yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.train.run.progress_bar", stopping)
        with pytest.raises(SystemExit, match="130"):
            yield


@pytest.mark.parametrize(
    "flags",
    [{"zero_stage": 2}, *map(slow, [{"train_bnb_enabled": True}, {"tuner": "full", "zero_stage": 0}])]
    + [slow({"train_embeddings": True}), slow({"train_embeddings": True, "zero_stage": 3})],
    ids=str,
)
def test_resume_equals_a_straight_run(pt: ModuleType, args: Build, text: Path, tmp_path: Path, flags: Any) -> None:
    """With two sources in shares, and a schedule that is constant and then goes down."""
    other = tmp_path / "readme.txt"
    other.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    data = (f"{text}:0.6", f"{other}:0.4")
    flags = flags | {"lora_dropout": 0.2, "save_steps": 2, "lr_scheduler": "wsd", "warmup_ratio": 0.2}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(pt, args(*data, output_dir=straight, max_steps=5, **flags))

    with stopping_at(4):
        run(pt, args(*data, output_dir=stopped, max_steps=5, **flags))
    run(pt, args(*data, output_dir=stopped, max_steps=5, resume=True, **flags))
    assert_same_state(straight, stopped)
    rates = [line["train/lr"] for line in read_metrics(straight) if "train/lr" in line]
    assert rates == pytest.approx([0.0, 0.01, 0.01, 0.01, 0.01]), "of five steps one is the last fifth"
    last = read_metrics(straight)[-1]
    assert {"eval/bits_per_byte/1-a.jsonl", "eval/bits_per_byte/2-readme.txt"} <= {*last}


def test_what_is_said_and_recorded(pt: ModuleType, args: Build, text: Path, tmp_path: Path, capsys: Any) -> None:
    run(pt, args())
    said = capsys.readouterr().out
    assert "a.jsonl: 80 documents, " in said and "Samples are packed" in said and "bits_per_byte" in said
    (record,) = (tmp_path / "output").glob("*/*/1/run.json")
    data = json.loads(record.read_text())["data"]
    assert data["files"] == {"a.jsonl": data["files"]["a.jsonl"]} and data["sources"][0]["documents"] == 80
    (samples,) = (tmp_path / "output").glob("*/*/samples.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert all(row["prompt"] and row["real"] for row in rows), "held-out text, its beginning and how it goes on"


@pytest.mark.parametrize("tied", [True, slow(False)])
@pytest.mark.parametrize("flags", [{}, slow({"train_bnb_enabled": True}), slow({"zero_stage": 3})], ids=str)
def test_embeddings_beside_lora_are_merged(
    pt: ModuleType, args: Build, tokenizer: Any, root: Path, tmp_path: Path, tied: bool, flags: dict[str, Any]
) -> None:
    """Conversion proves that the model is the trained one; tied tables stay tied."""
    base = tmp_path / "model/tiny/base"
    make_model("qwen2", len(tokenizer), tie_word_embeddings=tied).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = {"model_dir": tmp_path / "model", "model_name": "tiny/base"}
    run(pt, args(**model, train_embeddings=True, **flags))
    convert = load_script("convert_model.py")
    (folder,) = (tmp_path / "output/DS-tiny").iterdir()
    asked = ["--zero_model", str(folder), "--org_model", str(base), "--save_model", "pt", "--t", "1"]
    convert.main(convert.build_parser().parse_args(asked))
    one, two = (AutoModelForCausalLM.from_pretrained(path) for path in (base, root / "output_hf/pt"))
    assert (two.lm_head.weight is two.get_input_embeddings().weight) == tied
    assert not torch.equal(one.get_input_embeddings().weight, two.get_input_embeddings().weight)


@pytest.mark.parametrize(("merged_model", "tied"), [(True, True), (False, False)], indirect=["merged_model"])
@pytest.mark.parametrize("flags", [{}, slow({"train_bnb_enabled": True})], ids=str)
def test_new_rows_alone_beside_lora(
    pt: ModuleType, args: Build, merged_model: Any, tokenizer: Any, root: Path, tmp_path: Path, tied: bool, flags: Any
) -> None:
    """After merge_tokenizer.py: rows of other tokens stay what they were, bit for bit; tied tables stay tied."""
    base = tmp_path / "model/tiny/base"
    run(pt, args(str(tmp_path / "zh.txt"), **merged_model, train_embeddings="new_rows", **flags))
    convert = load_script("convert_model.py")
    (folder,) = (tmp_path / "output/DS-tiny").iterdir()
    asked = ["--zero_model", str(folder), "--org_model", f"{base}-zh", "--save_model", "pt", "--t", "1"]
    convert.main(convert.build_parser().parse_args(asked))
    one, two = (AutoModelForCausalLM.from_pretrained(path) for path in (f"{base}-zh", root / "output_hf/pt"))
    first = len(tokenizer)
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(model, layer)().weight for model in (one, two))
        assert torch.equal(before[:first], after[:first])
        assert (before[first:] != after[first:]).any(1).float().mean() > 0.5
    assert (two.lm_head.weight is two.get_input_embeddings().weight) == tied
    trained = load_file(next(folder.glob("1/adapter/adapter_model.safetensors")))
    sizes = [len(tensor) for name, tensor in trained.items() if "lora_" not in name]
    assert sizes == [len(after) - first] * (1 if tied else 2), "no more than these rows are trained and kept"


@pytest.fixture
def merged_model(request: Any, merge: ModuleType, tokenizer: Any, tmp_path: Path) -> dict[str, Any]:
    """Arguments that name a model with new tokens; its tables are tied, unless the parameter is False."""
    base = tmp_path / "model/tiny/base"
    make_model("qwen2", len(tokenizer), tie_word_embeddings=getattr(request, "param", True)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "zh.txt").write_text("\n".join(example_texts()), encoding="utf-8")
    learn = ["--train_on", str(tmp_path / "zh.txt"), "--vocab_size", "400"]
    merge.main(merge.build_parser().parse_args(["--llama_tokenizer_dir", str(base), *learn]))
    return {"model_dir": tmp_path / "model", "model_name": "tiny/base-zh"}


@pytest.mark.slow
def test_rows_alone_stay_alone(pt: ModuleType, args: Build, merged_model: Any, tmp_path: Path) -> None:
    """A run that is continued is the straight one, and so is one without measuring, for which LoRA is not switched."""
    text, parts = str(tmp_path / "zh.txt"), []
    rows_alone = merged_model | {"train_only": "new_rows", "lr": 0.01, "save_steps": 1, "zero_stage": 0}
    rows_alone |= {"max_grad_norm": 0.01, "eval_steps": 1}
    run(pt, args(text, **rows_alone))
    with stopping_at(3):
        run(pt, args(text, **rows_alone, output_dir=tmp_path / "two"))
    run(pt, args(text, **rows_alone, output_dir=tmp_path / "two", resume=True))
    run(pt, args(text, **rows_alone | {"eval_samples": 0}, output_dir=tmp_path / "unmeasured"))
    for place in ("output", "two", "unmeasured"):
        (folder,) = (tmp_path / place / "DS-tiny").iterdir()
        parts.append(load_file(folder / "1-last/adapter/adapter_model.safetensors"))
    first, *others = parts
    for again in others:
        assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_new_rows_first_and_lora_after(
    pt: ModuleType, args: Build, merged_model: Any, tokenizer: Any, root: Path, tmp_path: Path, capsys: Any
) -> None:
    """What the rows alone have learnt is where LoRA and rows go on."""
    text = str(tmp_path / "zh.txt")
    run(pt, args(text, **merged_model, train_only="new_rows", lr=0.01))
    assert "Samples are packed" in capsys.readouterr().out
    (folder,) = (tmp_path / "output/DS-tiny").iterdir()
    first = load_file(folder / "1-last/adapter/adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in first.items() if "lora_B" in name), "LoRA is not trained"
    (rows,) = (name for name in first if "lora_" not in name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model/tiny/base-zh").get_input_embeddings().weight
    new = base[len(tokenizer) :]
    assert first[rows].shape == new.shape and not torch.equal(first[rows], new)
    adapter = tmp_path / "output/DS-tiny/base-zh/1-last/adapter"
    run(pt, args(text, **merged_model, adapter=adapter, lr=1e-9, embedding_lr=1e-9, output_dir=tmp_path / "three"))
    (folder,) = (tmp_path / "three/DS-tiny").iterdir()
    after = load_file(folder / "1-last/adapter/adapter_model.safetensors")
    assert torch.allclose(after[rows], first[rows], atol=1e-6) and not torch.equal(after[rows], first[rows])
    assert all(tensor.any() for name, tensor in after.items() if "lora_B" in name), "LoRA is trained"
    convert = load_script("convert_model.py")
    asked = ["--zero_model", str(folder), "--org_model", f"{tmp_path}/model/tiny/base-zh", "--save_model", "pt"]
    convert.main(convert.build_parser().parse_args([*asked, "--t", "1"]))
    merged = AutoModelForCausalLM.from_pretrained(root / "output_hf/pt").get_input_embeddings().weight
    assert torch.allclose(merged[len(tokenizer) :], first[rows], atol=1e-6)
    assert torch.equal(merged[: len(tokenizer)], base[: len(tokenizer)])


def test_rows_of_new_tokens_and_sharded_tables(
    pt: ModuleType, args: Build, merged_model: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="--zero_stage 2"):
        run(pt, args(str(tmp_path / "zh.txt"), **merged_model, train_only="new_rows", zero_stage=3))


@pytest.mark.parametrize(
    ("data", "flags", "said"),
    [
        (["nowhere"], {}, "--data: no .*nowhere"),
        (["{text}:0.5", "{text}"], {}, "PATH:SHARE for all or for none"),
        ([""], {}, "--data: got an empty name"),
        (["{text}:-1"], {}, "expected numbers above 0"),
        (["{text}:nan"], {}, "expected numbers above 0"),
        (["{text}"], {"test_size": 1}, "--test_size: got 1"),
        (["{text}"], {"test_mode": True}, "--test_mode: there are no questions"),
        (["{text}"], {"train_embeddings": "new_rows"}, "merge_tokenizer.py has not made it"),
        (["{text}"], {"train_only": "new_rows"}, "--train_only new_rows: .*merge_tokenizer.py has not made it"),
        (["{text}"], {"train_only": "new_rows", "train_embeddings": True}, "which trains all rows"),
        (["{text}"], {"train_embeddings": True, "tuner": "full"}, "Leave them out"),
        (["{text}"], {"adapter": "nowhere"}, "--adapter: no adapter_config.json"),
        (["{text}"], {"adapter": "nowhere", "train_embeddings": True}, "what it has is trained on"),
        (["{text}"], {"embedding_lr": 0.1}, "Train them: --train_embeddings True"),
        (["{text}"], {"embedding_lr": 0.1, "adapter": "{lora}"}, "leaves embeddings as they are. Leave it out"),
        (["{text}"], {"embedding_lr": -1, "tuner": "full"}, "--embedding_lr: got -1"),
        (["{empty}"], {}, "there is no text in it"),
        (["{binary}"], {}, "is not UTF-8"),
    ],
)
def test_user_errors(
    pt: ModuleType, args: Build, text: Path, tmp_path: Path, data: list[str], flags: dict[str, Any], said: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    lora = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "lora_dropout": 0.5, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora))
    (tmp_path / "adapter_model.safetensors").touch()
    names = {"text": text, "empty": tmp_path / "empty.txt", "binary": tmp_path / "binary.txt", "lora": tmp_path}
    flags = {name: value.format(**names) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(SystemExit, match=said):
        run(pt, args(*[one.format(**names) for one in data], **flags))


def test_what_is_measured(pt: ModuleType) -> None:
    """Of each source its part, and one at least."""
    source = np.repeat([0, 1, 2], [900, 99, 1])
    texts = SimpleNamespace(held_out=np.ones(1000, dtype=bool), source=source, facts=[{}] * 3)
    assert np.bincount(source[pt.to_measure(texts, 100)]).tolist() == [90, 10, 1]
    assert len(pt.to_measure(texts, -1)) == 1000 and len(pt.to_measure(texts, 0)) == 0
    assert len({*pt.to_measure(texts, 500).tolist()}) == len(pt.to_measure(texts, 500))


def test_without_data(pt: ModuleType, args: Build) -> None:
    arguments = args()
    place = arguments.index("--data")
    with pytest.raises(SystemExit, match="--data: expected a file or a folder of text"):
        run(pt, arguments[:place] + arguments[place + 2 :])


def test_paths_with_colons(pt: ModuleType) -> None:
    assert pt.source_of("/a:b/c.txt") == (Path("/a:b/c.txt"), None)
    assert pt.source_of("/a:b/c.txt:0.25") == (Path("/a:b/c.txt"), 0.25)
