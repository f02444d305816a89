"""New tokens for Chinese behind the tokens of a tokenizer: pieces of a SentencePiece model, or merges learnt from text.

SentencePiece's BPE puts the two neighbours together whose piece has the highest score, a byte-level BPE those that come
first in its list of merges. New pieces have lower scores, and new merges stand behind all others; both can happen in
Chinese alone.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

from utils.files import read_json, shown

# Code points of Chinese characters: with their extensions and compatibility forms, and 〇.
CHINESE = (
    (0x3007, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F), (0x30000, 0x323AF)
)  # fmt: skip
SPACE = "▁"  # SentencePiece's.
LONGEST_RUN = 64  # Chinese characters that merges are learnt from together.
COVERAGE = 0.9995  # Of the characters in a text, which are to be a token each: SentencePiece's default.
MOST_RUNS = 5_000_000  # That are learnt from: some hundred MB of text.
PRIVATE = 0xF0000  # Code points that no text has stand for tokens while merges are learnt.

class Extension(NamedTuple):
    """What is added to a tokenizer.

    Attributes:
        tokens: As they stand in the vocabulary, in the order of their ids.
        merges: The pairs of tokens that become one, in order. Both are sets that have one.
    """

    tokens: dict[str, None]
    merges: dict[tuple[str, str], None]


def is_chinese(text: str) -> bool:
    """Whether a text has Chinese characters and nothing else."""
    return bool(text) and all(any(first <= ord(letter) <= last for first, last in CHINESE) for letter in text)


def is_chinese_only(code: bytes) -> bool:
    """Whether bytes stand in no text without Chinese characters: they begin one, and any end of the last one will do.

    Args:
        code: UTF-8 that may be cut off within a character.
    """
    for missing in range(4):
        # The smallest and the largest character that can begin so.
        ends = [code + fill * missing for fill in (b"\x80", b"\xbf")]
        try:
            texts = [end.decode() for end in ends]
        except UnicodeDecodeError:
            continue
        first, last = (ord(text[-1]) for text in texts)
        in_one = any(start <= first <= last <= end for start, end in CHINESE)
        return in_one and all(map(is_chinese, texts))
    return False


def runs(lines: Iterable[str]) -> Iterator[str]:
    """The runs of Chinese characters in a text, long ones in parts."""
    run = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in CHINESE) + f"]{{1,{LONGEST_RUN}}}")
    for line in lines:
        yield from run.findall(line)


def kind_of(backend: dict[str, Any]) -> str:
    """What kind of tokenizer it is: "sentencepiece" or "byte-level".

    Args:
        backend: tokenizer.json.

    Raises:
        ValueError: for other kinds.
    """
    model = backend["model"]
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "sentencepiece"
    if model["type"] == "BPE" and "ByteLevel" in json.dumps([backend["pre_tokenizer"], backend["decoder"]]):
        return "byte-level"
    raise ValueError(f"its tokenizer is a {model['type']} model; known are SentencePiece's BPE and byte-level BPE.")


def check_added(backend: dict[str, Any]) -> None:
    """Makes sure that added tokens can be named in the vocabulary, as they are in `merged_backend`.

    Those that are not looked for everywhere (parts of words, say) would be found there by BPE.

    Raises:
        ValueError: naming one that would be.
    """
    model = backend["model"]
    for token in backend["added_tokens"]:
        found_by_bpe = len(token["content"]) == 1 or (model.get("ignore_merges") and not token["special"])
        if found_by_bpe and token["content"] not in model["vocab"]:
            raise ValueError(f"the added token {token['content']!r} would be found in other places than before.")


def read_sp_model(file: Path) -> Any:
    """Reads a SentencePiece model.

    Raises:
        OSError, ValueError: if it is none.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError(f"it is no SentencePiece model ({error}).") from error
    if not model.pieces:
        raise ValueError("it is no SentencePiece model: it has no pieces.")
    return model


def train_sp_model(texts: Iterable[str], vocab_size: int) -> Any:
    """Trains SentencePiece's BPE on the Chinese of texts.

    Raises:
        ValueError: if there is none, or more characters than pieces.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    written, found = io.BytesIO(), runs(texts)
    failures: list[Exception] = []

    def sentences() -> Iterator[str]:  # Through the library an error would come as another one.
        try:
            yield from islice(found, MOST_RUNS)
        except ValueError as error:
            failures.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=written, model_type="bpe",
            vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=0.9999,
            normalization_rule_name="identity", add_dummy_prefix=False, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        if "required_chars" in str(error):
            raise ValueError(f"its characters alone are more than --vocab_size {vocab_size:,}.") from error
        if not failures:
            raise ValueError("there is no Chinese in it.") from error
    if failures:
        raise failures[0]
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(written.getvalue())
    return model


def pieces_of(model: Any, known: Mapping[str, int], only_cjk: bool) -> list[str]:
    """The pieces of a SentencePiece model that a vocabulary lacks, the commonest first."""
    normal = model.SentencePiece.Type.NORMAL
    new = [
        piece for piece in model.pieces
        if piece.type == normal and piece.piece not in known
        and (not only_cjk or is_chinese(piece.piece.removeprefix(SPACE)))
    ]  # fmt: skip
    return list(dict.fromkeys(piece.piece for piece in sorted(new, key=lambda piece: -piece.score)))


def with_merges(pieces: Sequence[str], known: Mapping[str, int]) -> Extension:
    """Finds the pairs that become each piece. Single characters need none.

    SentencePiece would come to a piece that there was from every new part of it, but a list of merges has its own place
    for each pair. New pieces that are such a part are left out: those of longer ones that most vocabularies lack.
    """
    new, old = {*pieces}, [piece for piece in known if any(map(is_chinese, piece))]
    pairs = [(piece[:place], piece[place:]) for piece in old for place in range(1, len(piece))]
    parts = {part for pair in pairs if all(one in known or one in new for one in pair) for part in pair}
    kept = [piece for piece in pieces if piece not in parts]
    vocabulary = {*known, *kept}
    pairs = [(piece[:place], piece[place:]) for piece in kept for place in range(1, len(piece))]
    return Extension(dict.fromkeys(kept), dict.fromkeys(pair for pair in pairs if vocabulary.issuperset(pair)))


def learn_merges(backend: dict[str, Any], texts: Iterable[str], vocab_size: int) -> Extension:
    """Goes on with a byte-level tokenizer's training, on the Chinese of texts.

    First of all, the characters that nearly all of the text consists of become a token each, byte after byte; then the
    commonest neighbours become one. `tokenizers` trains from single characters only, so that each of the tokenizer's
    tokens is written as one.

    Args:
        backend: tokenizer.json.
        texts: To learn from.
        vocab_size: Most tokens.

    Raises:
        ValueError: if there is nothing to learn.
    """
    from tokenizers import Tokenizer, models, trainers

    words = Counter(islice(runs(texts), MOST_RUNS))
    if not words:
        raise ValueError("there is no Chinese in it.")
    found = _whole_characters(backend, words, vocab_size)
    model, letters = _model_of(backend, found), {}

    def written(word: str) -> str:
        tokens = (token.value for token in model.tokenize(_mapped(word)))
        return "".join(letters.setdefault(token, chr(PRIVATE + len(letters))) for token in tokens)

    counted = [(written(word), count) for word, count in words.items()]
    # Each token that occurs counts as one of the vocabulary there.
    size = len(letters) + vocab_size - len(found.tokens)
    learner = Tokenizer(models.BPE())
    several = (word for own, count in counted for word in repeat(own, count))
    learner.train_from_iterator(several, trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False))
    tokens = {letter: token for token, letter in letters.items()}
    for pair in json.loads(learner.to_str())["model"]["merges"]:
        _add_merge(found, backend, *("".join(tokens[letter] for letter in part) for part in pair))
    if not found.tokens:
        raise ValueError("nothing in it occurs twice that is not one token already. Use more text.")
    return found


def _whole_characters(backend: dict[str, Any], words: Mapping[str, int], most: int) -> Extension:
    """The merges with which common characters become one token each."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            counts[letter] += count
    model, found, left = _model_of(backend, Extension({}, {})), Extension({}, {}), counts.total()
    for letter, count in counts.most_common():
        first, *others = (token.value for token in model.tokenize(_mapped(letter)))
        if count < 2 or left < (1 - COVERAGE) * counts.total() or len(found.tokens) + len(others) > most:
            break
        left -= count
        for other in others:
            _add_merge(found, backend, first, other)
            first += other
    return found


def _add_merge(found: Extension, backend: dict[str, Any], left: str, right: str) -> None:
    """Adds a merge and its token, if both of its parts are there and it can happen in Chinese alone."""
    old, codes = backend["model"]["vocab"], {letter: byte for byte, letter in _byte_letters().items()}
    there = all(part in old or part in found.tokens for part in (left, right))
    if there and is_chinese_only(bytes(codes[letter] for letter in left + right)):
        found.merges[left, right] = None
        if left + right not in old:
            found.tokens[left + right] = None


@cache
def _byte_letters() -> dict[int, str]:
    """The letter that byte-level tokenizers write for each byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def _mapped(text: str) -> str:
    """A text as byte-level tokenizers write it."""
    return "".join(map(_byte_letters().__getitem__, text.encode()))


def _model_of(backend: dict[str, Any], extension: Extension) -> Any:
    """The BPE with an extension, whose tokens' ids are of no importance."""
    from tokenizers import Tokenizer

    first_id = max(backend["model"]["vocab"].values()) + 1 + len(backend["added_tokens"])
    return Tokenizer.from_str(json.dumps(merged_backend(backend, extension, first_id), ensure_ascii=False)).model


def merged_backend(backend: dict[str, Any], extension: Extension, first_id: int) -> dict[str, Any]:
    """Puts new tokens behind all others.

    Args:
        backend: tokenizer.json.
        extension: The new ones.
        first_id: Behind the tokenizer's special tokens, too.
    """
    model = backend["model"]
    # Special tokens stand behind the vocabulary, and would move with its end if they were not named in it.
    vocab = model["vocab"] | {token["content"]: token["id"] for token in backend["added_tokens"]}
    vocab |= {token: first_id + place for place, token in enumerate(extension.tokens)}
    return backend | {"model": model | {"vocab": vocab, "merges": [*model["merges"], *map(list, extension.merges)]}}


def reachable(backend: dict[str, Any], extension: Extension, first_id: int) -> Extension:
    """Leaves out tokens that the merged tokenizer can never come to: no two shorter ones make them."""
    from tokenizers import Tokenizer

    model = Tokenizer.from_str(json.dumps(merged_backend(backend, extension, first_id), ensure_ascii=False)).model
    lost = {token for token in extension.tokens if [one.value for one in model.tokenize(token)] != [token]}
    return Extension(
        dict.fromkeys(token for token in extension.tokens if token not in lost),
        dict.fromkeys(pair for pair in extension.merges if not lost & {*pair, "".join(pair)}),
    )


def merged_sp_model(model: Any, extension: Extension, tokenizer: Any, first_id: int) -> bytes:
    """The SentencePiece model that a folder has beside tokenizer.json, with the new pieces.

    Of two pairs of pieces the one with the higher score is put together first: the new ones come after all others.

    Raises:
        ValueError: if it is not the tokenizer's.
    """
    import numpy as np

    if len(model.pieces) > first_id:
        raise ValueError(f"tokenizer.model has {len(model.pieces):,} pieces, the tokenizer {first_id:,} tokens.")
    types, special = model.SentencePiece.Type, {*tokenizer.all_special_ids}
    score = np.float32(min(piece.score for piece in model.pieces))
    for id in range(len(model.pieces), first_id):  # Tokens that were added to it.
        kind = types.CONTROL if id in special else types.USER_DEFINED
        model.pieces.add(piece=tokenizer.convert_ids_to_tokens(id), score=0.0, type=kind)
    for token in extension.tokens:
        # Mistral's lowest score is -1e9, where 1 less is the same number in fp32.
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        model.pieces.add(piece=token, score=float(score), type=types.NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


def token_bytes(tokenizer: Any) -> Any:
    """How many bytes of text each token stands for.

    Returns:
        (V,) int64; 0 for special tokens. Of what is no SentencePiece or byte-level tokenizer, the bytes of its text.
    """
    import numpy as np

    special = {*tokenizer.all_special_ids}
    try:
        kind = kind_of(json.loads(tokenizer.backend_tokenizer.to_str()))
    except (AttributeError, ValueError):
        kind = "other"
    added = {*tokenizer.added_tokens_decoder}

    def size(token: str, id: int) -> int:
        if id in special:
            return 0
        if kind == "byte-level" and id not in added:
            return len(token)  # A letter for each byte.
        if kind == "sentencepiece":
            return 1 if re.fullmatch("<0x[0-9A-F]{2}>", token) else len(token.replace(SPACE, " ").encode())
        return len(tokenizer.decode([id]).encode())

    found = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    for token, id in tokenizer.get_vocab().items():
        found[id] = size(token, id)
    return found


def new_rows(path: Path) -> range:
    """The tokens that merge_tokenizer.py has added to a model.

    Raises:
        ValueError: if it has added none.
    """
    try:
        added = read_json(path / "run.json")["vocabulary"]
        return range(added["first_new_id"], added["first_new_id"] + added["new_tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{shown(path)} has no new tokens: merge_tokenizer.py has not made it.") from error
