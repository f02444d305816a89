"""Plain text to train on: documents from files of many kinds, cut into samples that are kept on disk.

A sample is a part of one document, and all of its tokens are learnt. A part that goes on begins with the last token of
the one before, which is learnt there: every token of a document but the first is learnt once.

Shapes: N samples, K tokens in all of them, V vocabulary.
"""

import csv
import gzip
import hashlib
import inspect
import json
import math
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.cli import progress_bar
from utils.data import records, vocabulary
from utils.data.records import DataError, read_records
from utils.data.samples import Samples, tokenizer_hash
from utils.data.vocabulary import token_bytes
from utils.files import create_once, sha256, shown

ENDINGS = (".txt", ".json", ".jsonl", ".csv", ".parquet")
BLOCK_CHARACTERS = 1 << 16  # Of a document that are tokenized at once; cut at the end of a line.
BATCH_CHARACTERS = 1 << 19  # So many are tokenized together: each takes some hundred bytes meanwhile.
LONGEST_CELL = 1 << 30  # Of a csv file, characters.
SENTENCE_END = "。！？!?….;；\n"
CLOSING = " ”’」』）)\"'"  # May follow it.
NEAR = 0.25  # Of a sample: the part at its end in which the end of a sentence is looked for.
FEW_DOCUMENTS = 20  # Of fewer the end is held out, and not some of them.


class Text(NamedTuple):
    """A document, or a part of a long one.

    Attributes:
        text: Of it.
        begins: Whether the document begins with it.
        ends: Whether it ends with it.
    """

    text: str
    begins: bool
    ends: bool


class Texts(NamedTuple):
    """Samples of several sources.

    Attributes:
        samples: All of them.
        source: (N,) int64, of which source each is.
        held_out: (N,) bool, whether it is there to measure on.
        train: (N,) bool, whether it is there to learn: neither held out nor the same as one that is.
        bytes: (N,) int64, of the text that its learnt tokens stand for.
        facts: Of each source, what run.json says of it.
    """

    samples: Samples
    source: np.ndarray
    held_out: np.ndarray
    train: np.ndarray
    bytes: np.ndarray
    facts: list[dict[str, Any]]


def find_files(path: Path) -> list[Path]:
    """The files of text that a path stands for: itself, or all in a folder.

    Raises:
        DataError: if there is none.
    """

    def is_text(file: Path) -> bool:
        kind = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
        return kind in ENDINGS and not file.name.endswith(".parquet.gz")

    inside = sorted(path.rglob("*")) if path.is_dir() else []
    shown_ones = [file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts)]
    if found := [file for file in (shown_ones if path.is_dir() else [path]) if file.is_file() and is_text(file)]:
        return found
    expected = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}, or one of the texts with .gz"
    raise DataError(f"{shown(path)}: expected {'files' if path.is_dir() else 'a file'} with {expected}.")


def read_texts(path: Path) -> Iterator[Text]:
    """Reads documents: a file with .txt is one, of other files the field `text` of each record.

    Raises:
        DataError: if a file cannot be read, or a record has no text.
    """
    csv.field_size_limit(LONGEST_CELL)
    for file in find_files(path):
        if Path(file.name.removesuffix(".gz")).suffix == ".txt":
            yield from _read_blocks(file)
            continue
        for number, record in enumerate(read_records(file)):
            has_text = isinstance(record, dict) and "text" in record
            text = record["text"] if has_text else None
            if not has_text or not isinstance(text, str | None):
                there = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise DataError(f"{shown(file)}, record {number}: expected a field `text` with text, there is {there}.")
            if text and text.strip():
                # JSON can carry half a character.
                yield from _parts(text.encode(errors="replace").decode())


def _parts(text: str) -> Iterator[Text]:
    """Cuts a document that is in memory, at the ends of lines where that is possible."""
    start = 0
    while len(text) - start > BLOCK_CHARACTERS:
        end = text.rfind("\n", start, start + BLOCK_CHARACTERS) + 1 or start + BLOCK_CHARACTERS
        yield Text(text[start:end], start == 0, False)
        start = end
    yield Text(text[start:], start == 0, True)


def _read_blocks(file: Path) -> Iterator[Text]:
    """Reads a file of text in parts that end with a line where that is possible."""
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
            begins, block = True, ""
            # A line may have any length.
            while piece := lines.read(BLOCK_CHARACTERS):
                block += piece
                if len(piece) == BLOCK_CHARACTERS:
                    place = block.rfind("\n") + 1 or len(block)
                    yield Text(block[:place], begins, False)
                    begins, block = False, block[place:]
            if block.strip() or not begins:
                yield Text(block, begins, True)
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(file)}: its text is not UTF-8 ({error}). Save it as UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{shown(file)}: not readable: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def load_texts(
    paths: Sequence[Path], tokenizer: Any, max_tokens: int, test_size: float, cache: Path, progress: str = ""
) -> Texts:
    """Cuts the documents of sources into samples, or finds what was cut before from the same files in the same way.

    Of a source with few documents its last samples are held out, else some documents, chosen by a hash of their text;
    one at least of each source, unless it has no more.

    Args:
        paths: Files or folders.
        tokenizer: The model's.
        max_tokens: The longest sample.
        test_size: Part of each source that is held out.
        cache: Folder of what was cut before. Of all ranks that call this together one does the work.
        progress: Name of a progress bar, if there shall be one.

    Raises:
        DataError: if files cannot be read, or hold no text.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no token that ends a text (eos_token in its tokenizer_config.json).")
    files = [{str(file.relative_to(path.parent)): sha256(file) for file in find_files(path)} for path in paths]
    code = [sha256(Path(inspect.getfile(part))) for part in (sys.modules[__name__], records, vocabulary)]
    made_from = [files, tokenizer_hash(tokenizer), max_tokens, code]
    folder = cache / f"texts-{hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]}"
    with create_once(folder) as temporary:
        if temporary:
            _write_samples(paths, tokenizer, max_tokens, temporary, progress)
    index = np.load(folder / "index.npz")
    lengths, source, document = index["lengths"], index["source"], index["document"]
    tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="c").view(np.ndarray)
    supervised = np.broadcast_to(np.ones(1, dtype=bool), tokens.shape)
    count, end = len(lengths), lengths.cumsum()
    samples = Samples(
        tokens, supervised, begin=end - lengths, end=end, group=np.arange(count), targets=lengths - 1, ids=[""] * count
    )
    hashes = index["hashes"][document]
    held_out = hashes < test_size * 2**32
    facts = []
    for number, path in enumerate(paths):
        own = (source == number).nonzero()[0]
        documents = len(np.unique(document[own]))
        if documents < FEW_DOCUMENTS:
            count = max(round(test_size * len(own)), int(0 < test_size and len(own) > 1))
            held_out[own] = np.arange(len(own)) >= len(own) - count
        elif test_size and not held_out[own].any():
            held_out[own] = hashes[own] == hashes[own].min()
        facts.append({"name": path.name, "documents": documents, "samples": len(own), "files": files[number],
                      "tokens": int(samples.targets[own].sum()), "bytes": int(index["bytes"][own].sum())})  # fmt: skip
    train = ~held_out & ~np.isin(index["digest"], index["digest"][held_out])
    return Texts(samples, source, held_out, train, index["bytes"], facts)


def _write_samples(paths: Sequence[Path], tokenizer: Any, max_tokens: int, folder: Path, progress: str) -> None:
    folder.mkdir()
    found = {name: array("q") for name in ("lengths", "bytes", "source", "document", "hashes", "digest")}
    sizes = token_bytes(tokenizer)
    ends = np.array([text.rstrip(CLOSING).endswith(tuple(SENTENCE_END)) for text in _texts_of(tokenizer)])
    with (folder / "tokens.bin").open("wb") as file:
        for number, path in enumerate(paths):
            before, left, carried = len(found["lengths"]), np.zeros(0, dtype=np.int32), 0
            for text, ids in _tokenized(path, tokenizer, progress):
                if text.begins:
                    found["hashes"].append(0)
                    left, carried = ids, 0
                else:
                    left = np.concatenate([left, ids])
                found["hashes"][-1] = zlib.crc32(text.text.encode(), found["hashes"][-1])
                while len(left) > max_tokens or (text.ends and len(left) > carried):
                    size = len(left) if len(left) <= max_tokens else _cut(left[:max_tokens], ends)
                    if size >= 2:  # Nothing predicts a token alone.
                        file.write(left[:size])
                        found["lengths"].append(size)
                        found["bytes"].append(int(sizes[left[1:size]].sum()))
                        found["source"].append(number)
                        found["document"].append(len(found["hashes"]) - 1)
                        digest = hashlib.blake2b(left[:size].tobytes(), digest_size=8).digest()
                        found["digest"].append(int.from_bytes(digest, "little", signed=True))
                    carried = 1  # The next part begins with the token that predicts its first one.
                    left = left[size - 1 :]
            if len(found["lengths"]) == before:
                raise DataError(f"{shown(path)}: there is no text in it.")
    np.savez(folder / "index.npz", **{name: np.array(values, dtype=np.int64) for name, values in found.items()})


def _cut(tokens: np.ndarray, ends: np.ndarray) -> int:
    """Where a sample ends that is full: at the end of a sentence, if one is near."""
    near = ends[tokens[round((1 - NEAR) * len(tokens)) :]].nonzero()[0]
    return round((1 - NEAR) * len(tokens)) + int(near[-1]) + 1 if len(near) else len(tokens)


def _texts_of(tokenizer: Any) -> list[str]:
    """The text of each token."""
    return tokenizer.batch_decode([[id] for id in range(max(tokenizer.get_vocab().values()) + 1)])


def _tokenized(path: Path, tokenizer: Any, progress: str) -> Iterator[tuple[Text, np.ndarray]]:
    """The tokens of texts: a document begins as the tokenizer begins every text, and ends with its end token."""
    first = tokenizer.encode("a")[:1] if tokenizer.bos_token_id is not None else []
    begin = first if first == [tokenizer.bos_token_id] else []
    for batch in _batches(progress_bar(read_texts(path), progress, "text", bool(progress))):
        whole = [text.text for text in batch]
        found = tokenizer(whole, add_special_tokens=False, split_special_tokens=True, verbose=False)
        for text, ids in zip(batch, found["input_ids"], strict=True):
            ends = [tokenizer.eos_token_id] if text.ends else []
            yield text, np.array([*(begin if text.begins else []), *ids, *ends], dtype=np.int32)


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Sources together


def mixed(texts: Texts, shares: Sequence[float] | None, seed: int) -> np.ndarray:
    """Draws the samples to train on so that each source has its share of the tokens.

    As many tokens are drawn as all sources have: one with a larger share than it has comes more than once, in another
    order each time, and of one with a smaller share a part.

    Args:
        texts: From `load_texts`.
        shares: Of the tokens, adding up to 1; None: each sample once.
        seed: Of the draw.

    Returns:
        Their numbers.
    """
    train = texts.train.nonzero()[0]
    if shares is None:
        return train
    total, drawn = texts.samples.targets[train].sum(), []
    for number, share in enumerate(shares):
        own, random = train[texts.source[train] == number], np.random.default_rng([seed, number])
        targets = texts.samples.targets[own]
        times = math.ceil(share * total / targets.sum()) if len(own) else 0
        order = np.concatenate([random.permutation(len(own)) for _ in range(times)] or [np.zeros(0, dtype=np.int64)])
        enough = int(np.searchsorted(targets[order].cumsum(), share * total)) + 1
        drawn.append(own[order[:enough]])
    return np.concatenate(drawn)
