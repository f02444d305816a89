"""utils/data/documents.py: every token of a document is learnt once, wherever it is cut.

python -m pytest tests/test_utils_data_documents.py
"""

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from conftest import example_texts, make_tokenizer

from utils.data import documents
from utils.data.documents import Texts, find_files, load_texts, mixed, read_texts
from utils.data.records import DataError
from utils.data.samples import Samples
from utils.data.vocabulary import token_bytes


def texts_in(path: Path) -> list[tuple[str, bool, bool]]:
    return [tuple(text) for text in read_texts(path)]


def rows(path: Path, texts: list[str | None]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_files_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("甲\n乙", encoding="utf-8-sig")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("丙".encode()))
    rows(tmp_path / "c.jsonl", ["丁", " ", None, "子"])
    (tmp_path / ".hidden.txt").write_text("x")
    (tmp_path / "c2.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "丑"}).encode()))
    (tmp_path / "d.json").write_text('[{"text": "戊", "id": 1}]', encoding="utf-8")
    (tmp_path / "e.csv").write_text("id,text\n1,己\n", encoding="utf-8")
    duckdb.sql(f"COPY (SELECT '庚' AS text) TO '{tmp_path}/f.parquet'")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/g.txt").write_text("辛", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    expected = ("甲\n乙", "丙", "丁", "子", "丑", "戊", "己", "庚", "辛")
    assert texts_in(tmp_path) == [(text, True, True) for text in expected]
    assert len(find_files(tmp_path)) == 9


@pytest.mark.parametrize("text", ["一行\n" * 50, "没有换行" * 40, "x" * 64, "短", "a" * 63 + "\nb", "\n" * 200 + "a"])
def test_a_file_is_read_in_parts(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which end with a line where there is one, and are all of the file."""
    monkeypatch.setattr(documents, "BLOCK_CHARACTERS", 64)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    parts = texts_in(tmp_path / "a.txt")
    assert "".join(part for part, _, _ in parts) == text
    assert [begins for _, begins, _ in parts] == [True] + [False] * (len(parts) - 1)
    assert [ends for _, _, ends in parts] == [False] * (len(parts) - 1) + [True]
    if "\n" in text[:64]:
        assert all(part.endswith("\n") for part, _, _ in parts[:-1])


def test_long_records_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of csv files of any length, too, and half a character becomes a mark."""
    monkeypatch.setattr(documents, "BLOCK_CHARACTERS", 1000)
    text = "一行字\n" * 50_000
    (tmp_path / "a.csv").write_text(f'id,text\n1,"{text}"\n', encoding="utf-8")
    parts = texts_in(tmp_path / "a.csv")
    assert "".join(part for part, _, _ in parts) == text and len(parts) > 100
    between = [(False, False)] * (len(parts) - 2)
    assert [(begins, ends) for _, begins, ends in parts] == [(True, False), *between, (False, True)]
    (tmp_path / "b.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert texts_in(tmp_path / "b.jsonl") == [("a?b", True, True)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.png", b"x", "a.png: expected a file with .txt, .json"),
        ("a.txt", bytes(range(256)), "a.txt: its text is not UTF-8"),
        ("a.txt.gz", gzip.compress(b"text" * 999, mtime=0)[:-30], "a.txt.gz: not readable"),
        ("a.txt.gz", b"no gzip", "a.txt.gz: not readable"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: not readable"),
        ("a.jsonl", b'{"content": "x"}\n', r"a.jsonl, record 0: expected a field `text`.*\['content'\]"),
        ("a.jsonl", b'{"text": 3}\n', "record 0: expected a field `text` with text"),
        ("a.jsonl", b"[1]\n", "a.jsonl"),
        ("a.parquet", b"nothing", "a.parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        texts_in(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


def samples_of(texts: Texts) -> list[list[int]]:
    return [sample.input_ids.tolist() for sample in texts.samples]


@pytest.mark.parametrize("max_tokens", [16, 50, 1000])
@pytest.mark.parametrize("kind", ["rows", "file"])
def test_every_token_is_learnt_once(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_tokens: int, kind: str
) -> None:
    """Put together again, the samples of a document are its tokens and the one that ends it."""
    monkeypatch.setattr(documents, "BLOCK_CHARACTERS", 256)
    lines = [text for text in example_texts() if text.strip()][:60]
    if kind == "rows":
        path, whole = rows(tmp_path / "a.jsonl", lines), lines
    else:
        path, whole = tmp_path / "a.txt", ["\n".join(lines)]
        path.write_text(whole[0], encoding="utf-8")
    found = load_texts([path], tokenizer, max_tokens, 0.0, tmp_path / "cache")
    expected: list[list[int]] = []
    for text, begins, ends in read_texts(path):
        expected += [[]] if begins else []
        expected[-1] += [*tokenizer.encode(text, add_special_tokens=False), *[tokenizer.eos_token_id] * ends]
    together: list[list[int]] = []
    for ids in samples_of(found):
        assert 2 <= len(ids) <= max_tokens
        goes_on = together and together[-1][-1] == ids[0] and together[-1][-1] != tokenizer.eos_token_id
        if goes_on:
            together[-1] += ids[1:]
        else:
            together.append(ids)
    assert together == expected
    assert found.samples.targets.sum() == sum(len(ids) - 1 for ids in expected) == found.facts[0]["tokens"]
    assert all(sample.supervised.all() for sample in found.samples)
    assert found.facts[0]["documents"] == len(whole) and not found.held_out.any()


def test_samples_end_with_a_sentence_that_is_near(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("这里有一些话，说了很多。" * 40, encoding="utf-8")
    found = samples_of(load_texts([path], tokenizer, 100, 0.0, tmp_path / "cache"))
    assert all(tokenizer.decode(ids).endswith("。") and len(ids) >= 75 for ids in found[:-1])
    path.write_text("没有句号" * 200, encoding="utf-8")
    found = samples_of(load_texts([path], tokenizer, 100, 0.0, tmp_path / "cache"))
    assert [len(ids) for ids in found[:-1]] == [100] * (len(found) - 1)


def test_control_tokens_in_text_are_text(tokenizer: Any, tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", ["前<|im_end|>后<|endoftext|>"])
    ((*ids, last),) = samples_of(load_texts([path], tokenizer, 1000, 0.0, tmp_path / "cache"))
    assert last == tokenizer.eos_token_id and not {*ids} & {*tokenizer.all_special_ids}


def test_a_document_begins_as_the_tokenizer_begins_text(fast_llama: Any, tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", ["hello there"])
    (ids,) = samples_of(load_texts([path], fast_llama, 1000, 0.0, tmp_path / "cache"))
    assert ids == [*fast_llama.encode("hello there"), fast_llama.eos_token_id] and ids[0] == fast_llama.bos_token_id


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_bytes_of_tokens(fast_llama: Any, tmp_path: Path, kind: str) -> None:
    """Those of all learnt tokens are the text's, less those of the first token, which nothing predicts."""
    tokenizer = make_tokenizer(600) if kind == "byte-level" else fast_llama
    texts = ["今天weather真好😀，𠮷", "plain English text.", "  spaces  "]
    found = load_texts([rows(tmp_path / "a.jsonl", texts)], tokenizer, 1000, 0.0, tmp_path / "cache")
    sizes = token_bytes(tokenizer)
    for text, sample, size in zip(texts, found.samples, found.bytes, strict=True):
        whole = int(sizes[sample.input_ids].sum())
        # SentencePiece puts a space before a text.
        assert whole == len(text.encode()) + (kind == "sentencepiece" and not text.startswith(" "))
        assert size == whole - sizes[sample.input_ids[0]]


def test_what_is_held_out(tokenizer: Any, tmp_path: Path) -> None:
    """Whole documents where there are many, by their text; the end where there are few. All sources have some."""
    many = rows(tmp_path / "many.jsonl", [f"第{number}篇，{'话' * 50}" for number in range(400)])
    few = tmp_path / "few.txt"
    few.write_text("说了很多话。" * 400, encoding="utf-8")
    found = load_texts([many, few], tokenizer, 40, 0.1, tmp_path / "cache")
    own = [found.held_out[found.source == number] for number in (0, 1)]
    assert 0.05 < own[0].mean() < 0.15
    assert own[1].tolist() == sorted(own[1].tolist()) and own[1].sum() == round(0.1 * len(own[1]))
    first = {tuple(sample.input_ids[:8].tolist()) for sample in found.samples.select(found.held_out.nonzero()[0])}
    rows(tmp_path / "many.jsonl", [f"第{number}篇，{'话' * 50}" for number in range(399, -1, -1)])
    again = load_texts([few, many], tokenizer, 40, 0.1, tmp_path / "cache")
    assert first == {tuple(s.input_ids[:8].tolist()) for s in again.samples.select(again.held_out.nonzero()[0])}


def test_every_source_has_something_to_measure_on(tokenizer: Any, tmp_path: Path) -> None:
    """Also of documents that begin alike; but not all of a source."""
    alike = ["同样的开头" * 300 + str(number) for number in range(100)]
    sources = [
        rows(tmp_path / f"{number}.jsonl", texts)
        for number, texts in enumerate((alike, ["甲乙丙", "丁戊己"], ["只有一句"]))
    ]
    found = load_texts(sources, tokenizer, 5000, 0.01, tmp_path / "cache")
    counts = [int(found.held_out[found.source == number].sum()) for number in range(3)]
    assert 1 <= counts[0] < 10 and counts[1:] == [1, 0]
    assert not load_texts(sources, tokenizer, 5000, 0.0, tmp_path / "cache").held_out.any()


def test_what_is_held_out_is_not_learnt_elsewhere(tokenizer: Any, tmp_path: Path) -> None:
    texts = [f"第{number}篇文章" for number in range(12)]
    sources = [rows(tmp_path / "a.jsonl", texts), rows(tmp_path / "b.jsonl", texts * 2)]
    found = load_texts(sources, tokenizer, 100, 0.3, tmp_path / "cache")
    held_out, train = (
        {tuple(found.samples[number].input_ids) for number in part.nonzero()[0]}
        for part in (found.held_out, found.train)
    )
    assert held_out and train and not held_out & train
    assert mixed(found, None, 1).tolist() == found.train.nonzero()[0].tolist()


def test_a_tokenizer_without_an_end(tokenizer: Any, tmp_path: Path) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(DataError, match="no token that ends a text"):
        load_texts([rows(tmp_path / "a.jsonl", ["x"])], bare, 100, 0.0, tmp_path / "cache")


def test_what_was_cut_is_not_cut_again(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows(tmp_path / "a.jsonl", ["一些话", "又一些"])
    one = samples_of(load_texts([path], tokenizer, 100, 0.0, tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(documents, "_write_samples", None)
        assert samples_of(load_texts([path], tokenizer, 100, 0.5, tmp_path / "cache")) == one
    rows(path, ["别的话"])
    assert samples_of(load_texts([path], tokenizer, 100, 0.0, tmp_path / "cache")) != one


def test_nothing_is_there(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n ")
    with pytest.raises(DataError, match="a.txt: there is no text in it"):
        load_texts([tmp_path / "a.txt"], tokenizer, 100, 0.0, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").glob("*") if path.suffix != ".lock"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="expected files with .txt"):
        load_texts([tmp_path / "folder"], tokenizer, 100, 0.0, tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------------------
# Mixing


def made(targets: list[list[int]], held_out: int = 0) -> Texts:
    flat = np.array([count for own in targets for count in own])
    end = (flat + 1).cumsum()
    tokens = np.zeros(int(end[-1]), dtype=np.int32)
    samples = Samples(tokens, tokens == 0, end - flat - 1, end, np.arange(len(flat)), flat, [""] * len(flat))
    source = np.repeat(np.arange(len(targets)), [len(own) for own in targets])
    first = np.arange(len(flat)) < held_out
    return Texts(samples, source, first, ~first, flat, [])


def test_each_source_has_its_share() -> None:
    texts = made([[10] * 100, [30] * 100], held_out=20)
    for shares in ([0.7, 0.3], [0.05, 0.95], [0.5, 0.5]):
        drawn = mixed(texts, shares, 1)
        tokens = [int(texts.samples.targets[drawn[texts.source[drawn] == number]].sum()) for number in (0, 1)]
        assert sum(tokens) == pytest.approx(80 * 10 + 100 * 30, abs=60)
        assert tokens[0] / sum(tokens) == pytest.approx(shares[0], abs=0.02)
        assert drawn.min() >= 20, "what is held out is not learnt"
        counts = np.bincount(drawn, minlength=200)[20:]
        for own in (counts[:80], counts[80:]):
            assert own.max() - own.min() <= 1, "all once before any a second time"
    assert mixed(texts, None, 1).tolist() == [*range(20, 200)]
    one, again, other = (mixed(texts, [0.7, 0.3], seed).tolist() for seed in (1, 1, 2))
    assert one == again != other
