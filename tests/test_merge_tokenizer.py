"""merge_tokenizer.py: a model with more tokens says of other text what it said before.

python -m pytest tests/test_merge_tokenizer.py
"""

import gzip
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import example_texts, load_script, make_model, run, sp_model
from test_utils_data_vocabulary import ENGLISH
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.data.vocabulary import is_chinese


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("merge_tokenizer.py")


@pytest.fixture
def base(root: Path, tokenizer: Any) -> Path:
    """A model with a licence, some rows of padding, and text to learn from beside it."""
    folder = root / "model/tiny/base"
    make_model("llama", len(tokenizer) + 5, tie_word_embeddings=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nof its maker\n")
    (folder / "LICENSE").write_text("the licence")
    (root / "text").mkdir()
    (root / "text/a.txt").write_text("\n".join(example_texts()), encoding="utf-8")
    return folder


def merge(script: ModuleType, base: Path, *more: str) -> Path:
    script.main(script.build_parser().parse_args(["--llama_tokenizer_dir", str(base), *more]))
    return base.parent / f"{base.name}-zh"


LEARN = ("--train_on", "text", "--vocab_size", "500")


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits[0]


# ---------------------------------------------------------------------------------------------------------------------
# The model


def test_english_is_what_it_was(script: ModuleType, base: Path) -> None:
    """Its tokens, and the logits of all tokens that there were; special tokens, template and settings stay."""
    after = merge(script, base, *LEARN)
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (base, after))
    assert old(ENGLISH)["input_ids"] == new(ENGLISH)["input_ids"]
    assert (new.chat_template, new.eos_token_id, new.pad_token) == (old.chat_template, old.eos_token_id, old.pad_token)
    ids = torch.tensor([old.encode(" ".join(ENGLISH))[:200]])
    before, now = logits_of(base, ids), logits_of(after, ids)
    count = len(old)
    assert torch.equal(before[:, :count], now[:, :count]) and now.shape[1] == len(new) > count + 100
    assert (after / "LICENSE").read_text() == "the licence"
    card, record = (after / "README.md").read_text(encoding="utf-8"), json.loads((after / "run.json").read_text())
    assert "license: apache-2.0" in card and "of its maker" not in card and "model/tiny/base with" in card
    assert record["base_model"] == "model/tiny/base" and record["vocabulary"]["first_new_id"] == count
    assert record["vocabulary"]["new_tokens"] == len(new) - count
    config = [json.loads((folder / "config.json").read_text()) for folder in (base, after)]
    assert {key for key in config[0] if config[0][key] != config[1][key]} == {"vocab_size"}


@pytest.mark.parametrize("kind", ["gemma3", "qwen2"])
def test_tied_ones_stay_tied(script: ModuleType, base: Path, tokenizer: Any, kind: str) -> None:
    """New rows are the means of those that the text took before; all other weights are equal."""
    make_model(kind, len(tokenizer), tie_word_embeddings=True).save_pretrained(base)
    after = merge(script, base, *LEARN)
    one, two = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base, after))
    new = AutoTokenizer.from_pretrained(after)
    assert two.lm_head.weight is two.get_input_embeddings().weight
    rows, count = two.lm_head.weight, len(tokenizer)
    for id in range(count, len(new), 37):
        if "\ufffd" not in (text := new.decode([id])):
            expected = one.lm_head.weight[tokenizer.encode(text, add_special_tokens=False)].mean(0)
            assert torch.allclose(rows[id], expected, atol=1e-6), text
    others = {name: part for name, part in one.state_dict().items() if part.shape[0] != len(one.lm_head.weight)}
    assert len(others) > 10 and all(torch.equal(part, two.state_dict()[name]) for name, part in others.items())


def test_first_values_of_new_rows(script: ModuleType) -> None:
    table = torch.tensor([[0.0, 2.0], [2.0, 4.0], [4.0, 0.0]])
    found = {init: script.new_rows(table, [[0, 1], [2]], init).tolist() for init in ("mean", "average", "zeros")}
    assert found == {"mean": [[1, 3], [4, 0]], "average": [[2, 2], [2, 2]], "zeros": [[0, 0], [0, 0]]}
    assert script.new_rows(torch.tensor([1.0, 3.0]), [[0, 1]], "mean").tolist() == [2], "a head's bias"
    half = script.new_rows(table.to(torch.bfloat16), [[0]], "mean")
    assert half.dtype == torch.bfloat16


def test_a_tokenizer_of_sentencepiece(
    script: ModuleType, root: Path, sp_llama: Any, fast_llama: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed's own command: pieces of another model; the folder's tokenizer.model grows along."""
    import sentencepiece

    folder = root / "model/tiny/llama"
    make_model("llama", len(sp_llama.pieces)).save_pretrained(folder)
    fast_llama.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(sp_llama.SerializeToString())
    chinese = sp_model(example_texts(), 1600, normalization_rule_name="nmt_nfkc")
    (root / "zh.model").write_bytes(chinese.SerializeToString())
    after = merge(script, folder, "--chinese_sp_model_file", "zh.model")
    said = capsys.readouterr().out
    new = AutoTokenizer.from_pretrained(after)
    library = sentencepiece.SentencePieceProcessor(str(after / "tokenizer.model"))
    texts = [text.strip() for text in example_texts()]
    assert new(texts, add_special_tokens=False)["input_ids"] == library.encode(texts)
    assert new.encode("天") == fast_llama.encode("天")[:1] + new.encode("天", add_special_tokens=False)
    assert len(new) == len(library) == len(logits_of(after, torch.tensor([[1]]))[0])
    assert "| English | " in said and "| +0.0% |" in said


def test_a_tokenizer_without_a_model(script: ModuleType, root: Path, sp_llama: Any) -> None:
    (root / "m").mkdir()
    (root / "m/tokenizer.model").write_bytes(sp_llama.SerializeToString())
    (root / "zh.model").write_bytes(sp_model(example_texts(), 1600).SerializeToString())
    after = merge(script, root / "m", "--chinese_sp_model_file", "zh.model")
    assert {file.name for file in after.iterdir()} == {
        "README.md", "run.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
    }  # fmt: skip


@pytest.mark.slow
def test_what_follows(script: ModuleType, ft: ModuleType, base: Path, train_args: Any, tmp_path: Path) -> None:
    """A merged model is trained and converted as any other, and chat templates still write the same conversation."""
    after = merge(script, base, *LEARN)
    output = tmp_path / "output"
    model = {"model_dir": str(base.parents[1]), "model_name": "tiny/base-zh"}
    run(ft, train_args(**model, output_dir=str(output), max_steps=2))
    convert = load_script("convert_model.py")
    asked = ["--zero_model", f"{output}/DS-tiny/base-zh", "--org_model", str(after), "--save_model", "zh", "--t", "1"]
    convert.main(convert.build_parser().parse_args(asked))


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --chinese_sp_model_file FILE or --train_on PATH"),
        (["--train_on", "nowhere"], "--train_on: no nowhere"),
        (["--chinese_sp_model_file", "nowhere"], "--chinese_sp_model_file: no nowhere"),
        (["--train_on", "text", "--vocab_size", "0"], "--vocab_size: got 0"),
        (["--train_on", "text", "--only_cjk", "False"], "goes with --chinese_sp_model_file"),
        (["--chinese_sp_model_file", "text/a.txt"], "is a byte-level one.*--train_on PATH"),
        (["--train_on", "empty.txt"], "there is no Chinese in it"),
        (["--train_on", "english.txt"], "there is no Chinese in it"),
        (["--train_on", "binary.txt"], "binary.txt: its text is not UTF-8"),
        (["--train_on", "picture.png"], "picture.png: expected a file with .txt"),
        (["--train_on", "other.jsonl"], "expected a field `text`"),
        (["--train_on", "torn.txt.gz"], "torn.txt.gz: not readable"),
    ],
)
def test_what_cannot_be_merged(script: ModuleType, base: Path, root: Path, arguments: list[str], said: str) -> None:
    (root / "empty.txt").touch()
    (root / "english.txt").write_text("nothing but English")
    (root / "binary.txt").write_bytes(bytes(range(256)))
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / "other.jsonl").write_text('{"content": "甲"}\n', encoding="utf-8")
    (root / "torn.txt.gz").write_bytes(gzip.compress("甲乙丙丁".encode() * 999)[:-20])
    with pytest.raises(SystemExit, match=said):
        merge(script, base, *arguments)
    assert [path.name for path in base.parent.iterdir() if path.suffix != ".lock"] == ["base"]


def test_folders_that_are_no_models(script: ModuleType, base: Path, root: Path) -> None:
    with pytest.raises(SystemExit, match="no folder nowhere.\nFetch a model: python download_pt.py"):
        merge(script, root / "nowhere", *LEARN)
    (root / "empty").mkdir()
    with pytest.raises(SystemExit, match="there is no tokenizer in it"):
        merge(script, root / "empty", *LEARN)
    (base / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(SystemExit, match="cannot be made"):
        merge(script, base, *LEARN)
    assert not (base.parent / "base-zh").exists()


def test_a_model_with_images(script: ModuleType, base: Path, tokenizer: Any) -> None:
    """Its text's settings may leave the vocabulary's size to the class."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    AutoModelForImageTextToText.from_config(config).save_pretrained(base)
    after = merge(script, base, *LEARN)
    saved = json.loads((after / "config.json").read_text())
    assert saved["text_config"]["vocab_size"] == len(AutoTokenizer.from_pretrained(after))
    model = AutoModelForImageTextToText.from_pretrained(after)
    assert len(model.get_input_embeddings().weight) == saved["text_config"]["vocab_size"]


def test_links_out_of_the_folder(script: ModuleType, base: Path, root: Path) -> None:
    """What they lead to could get into a folder that is published."""
    (root / "private.json").write_text("{}")
    (base / "settings.json").symlink_to(root / "private.json")
    with pytest.raises(SystemExit, match="is a link to a file outside of its folder"):
        merge(script, base, *LEARN)


def test_metas_own_files(script: ModuleType, base: Path) -> None:
    (base / "config.json").unlink()
    with pytest.raises(SystemExit, match="no config.json.*merge_qlora.py --base_model model/tiny/base"):
        merge(script, base, *LEARN)


def test_twice(script: ModuleType, base: Path) -> None:
    """What was merged takes further tokens."""
    once = merge(script, base, "--train_on", "text", "--vocab_size", "200")
    twice = merge(script, once, *LEARN)
    counts = [len(AutoTokenizer.from_pretrained(folder)) for folder in (base, once, twice)]
    assert counts[0] < counts[1] < counts[2]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(logits_of(base, ids)[:, : counts[0]], logits_of(twice, ids)[:, : counts[0]])


def test_a_folder_that_is_there(script: ModuleType, base: Path, root: Path) -> None:
    """The result of an earlier run is replaced, anything else is not."""
    after = merge(script, base, *LEARN)
    merge(script, base, *LEARN)
    (after / "notes.txt").touch()
    with pytest.raises(SystemExit, match=r"notes\.txt"):
        merge(script, base, *LEARN)


def test_all_pieces_only_if_asked_for(script: ModuleType, root: Path, sp_llama: Any) -> None:
    (root / "m").mkdir()
    (root / "m/tokenizer.model").write_bytes(sp_llama.SerializeToString())
    (root / "zh.model").write_bytes(sp_model([*example_texts(), *ENGLISH], 2500).SerializeToString())
    counts = []
    for more in ([], ["--only_cjk", "False"]):
        after = merge(script, root / "m", "--chinese_sp_model_file", "zh.model", *more)
        new = [*AutoTokenizer.from_pretrained(after).get_vocab().items()]
        counts.append(sum(id >= len(sp_llama.pieces) and not is_chinese(token.strip("▁")) for token, id in new))
        (after / "run.json").unlink()
        after.rename(root / f"kept{len(counts)}")
    assert counts[0] == 0 < counts[1]
