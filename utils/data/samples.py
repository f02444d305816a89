"""Rendered samples on disk: written once for a data file and a tokenizer, then mapped into memory by every rank.

Shapes: N samples, K tokens in all of them.
"""

import argparse
import copy
import gc
import hashlib
import inspect
import json
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from utils.cli import fail, progress_bar
from utils.data import chat as chat_module
from utils.data import records, thoughts
from utils.data.chat import Chat, Dialogue, Sample, show_sample
from utils.data.records import (
    DataError,
    Message,
    Taken,
    UnusableRecord,
    fields_notes,
    id_of,
    listed_fields,
    read_records,
    to_messages,
)
from utils.files import create_once, from_root, sha256, shown

# Turns a record and its id into a dialogue, and notes which fields it took where their usual names alone told them
# (`utils.data.records.note_fields`). Raises UnusableRecord if there is nothing to learn, DataError if the format is
# unknown.
Parse = Callable[[Any, str, Taken], Dialogue]
BATCH_RECORDS = 1000  # So many are tokenized together.


@dataclass(frozen=True)
class Samples:
    """Samples in flat arrays that are mapped from files, so that a million of them need no memory of a process."""

    tokens: np.ndarray  # (K,) int32
    supervised: np.ndarray  # (K,) bool
    begin: np.ndarray  # (N,) int64, where a sample's tokens stand
    end: np.ndarray  # (N,) int64
    group: np.ndarray  # (N,) int64; equal for samples of one group (video), which have much text in common
    targets: np.ndarray  # (N,) int64, number of supervised tokens
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> Sample:
        place = slice(self.begin[number], self.end[number])
        return Sample(self.ids[number], self.tokens[place], self.supervised[place])

    def __iter__(self) -> Iterator[Sample]:
        return (self[number] for number in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64, tokens of each sample."""
        return self.end - self.begin

    def select(self, numbers: Sequence[int] | np.ndarray) -> "Samples":
        """Some of the samples, without copying their tokens."""
        numbers = np.asarray(numbers, dtype=np.int64)
        arrays = {name: getattr(self, name)[numbers] for name in ("begin", "end", "group", "targets")}
        return replace(self, **arrays, ids=[self.ids[number] for number in numbers])


class Loaded(NamedTuple):
    """A file of records, ready for training."""

    samples: Samples  # In the file's order.
    counts: Counter[str]  # Records used, and dropped for which reason.
    system_prompt: str  # The commonest system text; "" where there is none.
    taken: Taken  # Which fields were found by their usual names, and which others there are in how many records.


def conversation(record: Any, id: str, taken: Taken | None = None) -> Dialogue:
    """Reads a record whose answers are all learnt, as every `Parse` does."""
    return Dialogue(id, to_messages(record, taken, thoughts=True))


def has_thoughts(dialogue: Dialogue) -> bool:
    """Whether any of a dialogue's answers begins with a thought."""
    answers = [message["content"] for message in dialogue.messages if message["role"] == "assistant"]
    return any(thoughts.split_thought(answer)[0] for answer in [*answers, *(dialogue.answers or [])])


def system_text(messages: list[Message]) -> str:
    """The text of a conversation's system message, "" without one."""
    return messages[0]["content"] if messages[0]["role"] == "system" else ""


def load_samples(
    path: Path,
    chat: Chat,
    max_tokens: int,
    cache: Path,
    progress: str = "",
    parse: Parse = conversation,
    columns: Mapping[str, str] | None = None,
) -> Loaded:
    """Renders a file of records for training, or finds what was rendered before from the same file in the same way.

    Args:
        path: A file that `utils.data.records.read_records` knows.
        chat: From `utils.data.chat.make_chat`.
        max_tokens: The longest sample.
        cache: Folder of what was rendered before. Of all ranks that call this together one does the work.
        progress: Name of a progress bar, if there shall be one.
        parse: How a record is read.
        columns: Of --columns, see `utils.data.records.read_records`.

    Raises:
        DataError: if a record's format is unknown (it is named), or no record is left.
    """
    code = [sha256(Path(inspect.getfile(part))) for part in (records, thoughts, chat_module, conversation, parse)]
    made_from = [sha256(path), tokenizer_hash(chat.tokenizer), max_tokens, parse.__name__, columns, *code]
    folder = cache / f"samples-{hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]}"
    with create_once(folder) as temporary:
        if temporary:
            gc.freeze()  # The collector need not go through the libraries' objects again and again.
            try:
                _write_samples(path, chat, max_tokens, temporary, progress, parse, columns)
            finally:
                gc.unfreeze()
    index, facts = np.load(folder / "index.npz"), json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    end = index["lengths"].cumsum()
    samples = Samples(
        # Plain arrays over the mapped files, since numpy's own class for them takes longer to slice. "c": torch wants
        # arrays that could be written to; what is written stays in memory.
        tokens=np.memmap(folder / "tokens.bin", dtype=np.int32, mode="c").view(np.ndarray),
        supervised=np.memmap(folder / "supervised.bin", dtype=bool, mode="c").view(np.ndarray),
        begin=end - index["lengths"],
        end=end,
        group=index["group"],
        targets=index["targets"],
        ids=facts["ids"],
    )
    return Loaded(samples, Counter(facts["counts"]), facts["system_prompt"], facts["taken"])


def load_splits(
    args: argparse.Namespace,
    train_file: Path,
    test_file: Path | None,
    chat: Chat,
    show: bool,
    parse: Parse = conversation,
    columns: Mapping[str, str] | None = None,
) -> tuple[Samples, Samples, dict[str, Any]]:
    """Loads the training and the held-out samples of a run.

    Without a held-out file, about a twentieth of the training groups (videos, or samples with one prompt where no
    video is named) is held out, chosen by hash; with an empty one nothing is.

    Args:
        args: Of the run.
        train_file: Of the samples to train on.
        test_file: Of those that are held out.
        chat: From `utils.data.chat.make_chat`.
        show: Whether to print what was read, and the first sample.
        parse: How a record is read.
        columns: Of --columns, for both files.

    Returns:
        Training samples, held-out samples, and what run.json says of the data.

    Raises:
        SystemExit: if the files cannot be used.
    """
    cache = from_root(args.output_dir) / "cache"
    try:
        train, counts, system_prompt, taken = load_samples(
            train_file, chat, args.max_tokens, cache, "reading" if show else "", parse, columns
        )
        if test_file and not any(True for _ in read_records(test_file)):
            test = train.select([])
        elif test_file:
            test = load_samples(test_file, chat, args.max_tokens, cache, parse=parse, columns=columns).samples
        else:
            held_out = train.group % 20 == 0
            test = train.select(held_out.nonzero()[0])
            train = train if held_out.all() else train.select((~held_out).nonzero()[0])
    except DataError as error:
        fail(str(error))
    if show:
        lengths = sorted(train.lengths)
        read = ", ".join(f"{number} {what}" for what, number in counts.items())
        print(f"{shown(train_file)}: {read}; held out: {len(set(test.ids))}.")
        for note in fields_notes({listed_fields(columns): {}} if columns else taken):
            print(f"{note[0].upper()}{note[1:]}.")
        print(f"Tokens a sample: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}.")
        print(f"The first sample, what is learnt between >>> and <<<:\n{show_sample(train[0], chat.tokenizer)}")
    return (
        train,
        test,
        {
            "files": {path.name: sha256(path) for path in (train_file, test_file) if path},
            "train_samples": len(train),
            "test_samples": len(test),
            "records": dict(counts),
            "system_prompt": system_prompt,
        },
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Hashes all that a tokenizer consists of, its chat template too."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return " ".join(sha256(path) for path in files)


def _write_samples(
    path: Path,
    chat: Chat,
    max_tokens: int,
    folder: Path,
    progress: str,
    parse: Parse,
    columns: Mapping[str, str] | None,
) -> None:
    folder.mkdir()
    ids: list[str] = []
    lengths, groups, targets = array("q"), array("q"), array("q")
    counts: Counter[str] = Counter()
    systems: Counter[str] = Counter()
    taken: Taken = {}
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "supervised.bin").open("wb") as supervised:
        bar = progress_bar(read_records(path, columns), progress, "record", bool(progress))
        for dialogue, video, chat_of_batch in _dialogues(bar, path, chat, partial(parse, taken=taken), counts):
            try:
                rendered = chat_of_batch.samples(dialogue, max_tokens)
            except UnusableRecord as reason:
                counts[f"dropped: {reason}"] += 1
                continue
            too_long = f"dropped: longer than --max_tokens {max_tokens} with the shortest prompt"
            counts["used" if rendered else too_long] += 1
            if chat.frame is None and rendered and has_thoughts(dialogue):
                counts["with thoughts, which are left out (--thoughts keep learns them)"] += 1
            systems[system_text(dialogue.messages)] += 1
            for sample in rendered:
                tokens.write(sample.input_ids)
                supervised.write(sample.supervised)
                ids.append(dialogue.id)
                lengths.append(len(sample.input_ids))
                # What answers the same prompt belongs together where nothing else says so.
                prompt = sample.input_ids[: sample.supervised.argmax()].tobytes()
                groups.append(zlib.crc32(prompt if video is None else video.encode()))
                targets.append(int(sample.supervised[1:].sum()))  # Nothing predicts the first token.
    if not ids:
        why = ", ".join(f"{number} {what}" for what, number in counts.items()) or "the file is empty"
        raise DataError(f"{shown(path)}: no record can be used ({why}).")
    arrays = {"lengths": lengths, "group": groups, "targets": targets}
    np.savez(folder / "index.npz", **{name: np.array(values, dtype=np.int64) for name, values in arrays.items()})
    facts = {"ids": ids, "counts": counts, "system_prompt": systems.most_common(1)[0][0], "taken": taken}
    (folder / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _dialogues(
    records: Iterable[Any], path: Path, chat: Chat, parse: Callable[[Any, str], Dialogue], counts: Counter[str]
) -> Iterator[tuple[Dialogue, str | None, Chat]]:
    """Reads and tokenizes records in batches; one is tokenized while the next is read and rendered as text.

    Yields:
        A record's dialogue, its video, and a chat that has its tokens at hand.
    """

    def read(batch: Iterable[tuple[int, Any]]) -> list[tuple[Dialogue, str | None]]:
        found = []
        for number, record in batch:
            id = id_of(record) or str(number)
            try:
                dialogue = parse(record, id)
            except UnusableRecord as reason:
                counts[f"dropped: {reason}"] += 1
            except DataError as error:
                raise DataError(f"{shown(path)}, record {number} (id {id}): {error}") from error
            else:
                found.append((dialogue, id_of(record, "video_id")))
        return found

    numbered, before = enumerate(records), None
    backend = copy.deepcopy(getattr(chat.tokenizer, "backend_tokenizer", None))
    with ThreadPoolExecutor(1) as worker:
        while batch := [*islice(numbered, BATCH_RECORDS)]:
            found = read(batch)
            tokenizing = worker.submit(chat.with_tokens_of, chat.texts([dialogue for dialogue, _ in found]), backend)
            if before:
                yield from ((*each, before[1].result()) for each in before[0])
            before = found, tokenizing
        if before:
            yield from ((*each, before[1].result()) for each in before[0])
