"""utils/data/vocabulary.py: only Chinese is written in other tokens, and SentencePiece itself writes the same ones.

python -m pytest tests/test_utils_data_vocabulary.py
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import ROOT, example_texts, make_tokenizer, sp_model
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from utils.data import vocabulary
from utils.data.records import DataError
from utils.data.vocabulary import Extension, is_chinese, is_chinese_only

README = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
ENGLISH = [line for line in README if not any(map(is_chinese, line))]
MIXED = [
    "今天weather真好", "  两个空格 和、标点。", "植物园（garden）", "𠮷野家〇一二", "日本語のテキスト", "émoji😀中文"
]  # fmt: skip


def backend_of(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def built(backend: dict[str, Any], extension: Extension, first_id: int) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(vocabulary.merged_backend(backend, extension, first_id)))


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# ---------------------------------------------------------------------------------------------------------------------
# Chinese


def test_what_is_chinese() -> None:
    assert all(map(is_chinese, ("植物", "〇", "𠮷", "㐀")))
    assert not any(map(is_chinese, ("", "，", "植 物", "ひ", "한", "a植", "1", "䷀"))), "the last is a hexagram"


@given(st.text(min_size=1, max_size=3), st.integers(1, 4))
def test_bytes_that_can_only_be_chinese(text: str, cut: int) -> None:
    """Against all characters that begin with these bytes."""
    code = text.encode(errors="ignore")[:cut]
    if not code:
        return
    for missing in range(4):
        try:
            ends = [(code + end * missing).decode() for end in (b"\x80", b"\xbf")]
        except UnicodeDecodeError:
            continue
        first, last = (ord(end[-1]) for end in ends)
        every = all(is_chinese(ends[0][:-1] + chr(point)) for point in range(first, last + 1))
        assert is_chinese_only(code) == every
        return
    assert not is_chinese_only(code)


@pytest.mark.parametrize(
    ("code", "only"), [("E6", True), ("E6A4", True), ("E4", False), ("E4B8", True), ("E4B7", False), ("A48D", False),
                       ("E6A48DE7", True), ("41E6A48D", False), ("F0A0", True), ("F0", False), ("E3", False)],
)  # fmt: skip
def test_bytes_by_hand(code: str, only: bool) -> None:
    """E4 B7 begins the hexagrams, E3 kana, F0 emoji."""
    assert is_chinese_only(bytes.fromhex(code)) == only


def test_runs_of_chinese() -> None:
    assert [*vocabulary.runs(["a今天，好b", "no", "植" * 70])] == ["今天", "好", "植" * 64, "植" * 6]


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece


def test_pieces_that_are_taken(sp_llama: Any) -> None:
    """Normal pieces of Chinese alone that are new, the commonest first; all of them if asked for."""
    model, kinds = sentencepiece_model_pb2.ModelProto(), sp_llama.SentencePiece.Type
    pieces = [("<unk>", 0, kinds.UNKNOWN), ("天", -9, 1), ("▁今天", -3, 1), ("今天a", -1, 1), ("植物", -2, 1),
              ("，好", -1, 1), ("▁we", -1.5, 1), ("▁", -1, 1), ("<s>", 0, kinds.CONTROL)]  # fmt: skip
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    assert vocabulary.pieces_of(model, {"天": 5}, True) == ["植物", "▁今天"]
    assert vocabulary.pieces_of(model, {"天": 5}, False) == ["今天a", "，好", "▁", "▁we", "植物", "▁今天"]


def test_pieces_without_a_way_to_them_are_left_out(fast_llama: Any) -> None:
    known = fast_llama.get_vocab()
    found = vocabulary.with_merges(["丙丁戊", "甲", "乙", "丙", "甲乙", "甲乙丙", "乙丙丁戊"], known)
    assert [*found.merges] == [("甲", "乙"), ("甲乙", "丙"), ("乙", "丙丁戊")]
    kept = vocabulary.reachable(backend_of(fast_llama), found, len(known))
    assert [*kept.tokens] == ["甲", "乙", "丙", "甲乙", "甲乙丙"] and [*kept.merges] == [*found.merges][:2]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_and_transformers_write_the_same(sp_llama: Any, fast_llama: Any, kind: str) -> None:
    """And other text as before, with special tokens where they were."""
    fast, first = copy.deepcopy(fast_llama), len(sp_llama.pieces) + 1
    fast.add_tokens(["<pad>"], special_tokens=True)
    backend = backend_of(fast)
    chinese = sp_model(example_texts(), 1600, model_type=kind, normalization_rule_name="nmt_nfkc")
    known = backend["model"]["vocab"]
    found = vocabulary.with_merges(vocabulary.pieces_of(chinese, known, True), known)
    extension = vocabulary.reachable(backend, found, first)
    assert len(extension.tokens) > 100
    before, after = fast.backend_tokenizer, built(backend, extension, first)
    merged = vocabulary.merged_sp_model(copy_of(sp_llama), extension, fast, first)
    library = sentencepiece.SentencePieceProcessor(model_proto=merged)
    assert library.id_to_piece(first - 1) == "<pad>" and after.token_to_id("<pad>") == first - 1
    # transformers' tokenizers of Llama put no space before text that begins with one.
    texts = [text.strip() for text in (*example_texts(), *MIXED)]
    assert [ids(after, text) for text in texts] == [library.encode(text) for text in texts]
    assert [ids(after, text) for text in ENGLISH] == [ids(before, text) for text in ENGLISH]
    assert [after.decode(ids(after, text)) for text in texts] == [before.decode(ids(before, text)) for text in texts]
    chinese = [*vocabulary.runs(texts)]
    assert sum(len(ids(after, text)) for text in chinese) < 0.6 * sum(len(ids(before, text)) for text in chinese)


def copy_of(model: Any) -> Any:
    copied = sentencepiece_model_pb2.ModelProto()
    copied.CopyFrom(model)
    return copied


def test_scores_stay_apart_below_a_very_low_one(sp_llama: Any, fast_llama: Any) -> None:
    """Mistral's lowest is -1e9, of which fp32 knows every 64th number only."""
    model = copy_of(sp_llama)
    model.pieces[-1].score = -1e9
    added = Extension(dict.fromkeys(["甲", "乙", "甲乙"]), {("甲", "乙"): None})
    written = vocabulary.merged_sp_model(model, added, fast_llama, len(model.pieces))
    found = sentencepiece_model_pb2.ModelProto()
    found.ParseFromString(written)
    scores = [piece.score for piece in found.pieces[-4:]]
    assert scores == sorted(scores, reverse=True) and len({*scores}) == 4


def test_pieces_that_are_trained() -> None:
    model = vocabulary.train_sp_model(example_texts(), 1500)
    texts = [piece.piece for piece in model.pieces if piece.type == 1]
    assert len(texts) > 200 and all(is_chinese(text.replace("▁", "")) for text in texts if text != "▁")
    with pytest.raises(ValueError, match="--vocab_size"):
        vocabulary.train_sp_model(example_texts(), 50)
    with pytest.raises(ValueError, match="no Chinese"):
        vocabulary.train_sp_model(["only English"], 400)

    def torn() -> Iterator[str]:
        yield "一些中文"
        raise DataError("a file is torn")

    with pytest.raises(DataError, match="a file is torn"):
        vocabulary.train_sp_model(torn(), 1500)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 50, json.dumps({"model": 1}).encode()])
def test_files_that_are_no_sentencepiece_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "zh.model").write_bytes(content)
    with pytest.raises(ValueError, match="no SentencePiece model"):
        vocabulary.read_sp_model(tmp_path / "zh.model")


# ---------------------------------------------------------------------------------------------------------------------
# Byte-level BPE


def learnt(texts: list[str], size: int = 300) -> tuple[Any, dict[str, Any], Extension, int]:
    tokenizer = make_tokenizer(400)
    backend, first = backend_of(tokenizer), max(tokenizer.get_vocab().values()) + 1
    return tokenizer, backend, vocabulary.learn_merges(backend, texts, size), first


def test_characters_and_then_their_neighbours() -> None:
    """Of characters that occur twice, the commonest first; then pairs, as plain BPE counts them."""
    letters = bytes_to_unicode()
    texts = ["甲乙丙", "甲乙丁", "甲乙", "丙丁戊"]
    _, backend, found, _ = learnt(texts, 100)
    said = [bytes({letter: byte for byte, letter in letters.items()}[one] for one in token) for token in found.tokens]
    whole = [token.decode() for token in said if len(token) % 3 == 0]
    assert whole == ["甲", "乙", "丙", "丁", "甲乙"], "丙丁 and 戊 occur once"
    assert {"".join(pair) for pair in found.merges} == {*found.tokens}


def test_no_more_than_asked_for() -> None:
    for size in (1, 7, 40, 300):
        assert 0 < len(learnt(example_texts(), size)[2].tokens) <= size


def test_other_text_keeps_its_tokens() -> None:
    """Japanese and hexagrams share bytes with Chinese."""
    tokenizer, backend, found, first = learnt(example_texts(), 3000)
    extension = vocabulary.reachable(backend, found, first)
    before, after = tokenizer.backend_tokenizer, built(backend, extension, first)
    others = [*ENGLISH, "ひらがな、カタカナ", "䷀䷁䷿", "한국어", "，。！？《》「」", "😀🎉", "ꀀꁀ"]
    assert [ids(after, text) for text in others] == [ids(before, text) for text in others]
    texts = [*example_texts(), *MIXED]
    assert [after.decode(ids(after, text)) for text in texts] == [before.decode(ids(before, text)) for text in texts]
    chinese = [*vocabulary.runs(texts)]
    assert sum(len(ids(after, text)) for text in chinese) < 0.3 * sum(len(ids(before, text)) for text in chinese)
    assert len(extension.tokens) == len({*extension.tokens} - backend["model"]["vocab"].keys()) > 100


@pytest.mark.parametrize(("texts", "said"), [(["English"], "no Chinese"), (["甲"], "occurs twice")])
def test_nothing_to_learn(texts: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        learnt(texts)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds


def test_added_tokens_that_bpe_would_find_are_refused(fast_llama: Any) -> None:
    """A single character is one in SentencePiece's kind, wherever it stands."""
    fast = copy.deepcopy(fast_llama)
    fast.add_tokens(["<x>", "天气"])
    vocabulary.check_added(backend_of(fast))
    fast.add_tokens(["🦥"])
    with pytest.raises(ValueError, match="🦥"):
        vocabulary.check_added(backend_of(fast))
    whole = backend_of(make_tokenizer(400))
    whole["model"]["ignore_merges"] = True
    vocabulary.check_added(whole)
    whole["added_tokens"].append({"id": 999, "content": "word", "special": False})
    with pytest.raises(ValueError, match="'word'"):
        vocabulary.check_added(whole)


def test_kinds_of_tokenizers(fast_llama: Any) -> None:
    unigram: Callable[..., dict[str, Any]] = lambda **more: {"model": {"type": "Unigram"} | more}  # noqa: E731
    assert vocabulary.kind_of(backend_of(fast_llama)) == "sentencepiece"
    assert vocabulary.kind_of(backend_of(make_tokenizer(400))) == "byte-level"
    with pytest.raises(ValueError, match="Unigram"):
        vocabulary.kind_of(unigram())
