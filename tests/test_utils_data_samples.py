"""utils/data/samples.py: a data file is rendered once, and what is read back is what was rendered.

python -m pytest tests/test_utils_data_samples.py
"""

import argparse
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from utils.data import samples as room
from utils.data.chat import Chat, Dialogue, make_chat, show_sample
from utils.data.records import PAIRS, DataError
from utils.data.samples import Samples, load_samples, load_splits


def say(question: str, answer: str, system: str = "") -> list[dict[str, str]]:
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *talk] if system else talk


RECORDS = [
    {"id": "a", "video_id": 7, "messages": say("问", "答", system="常用")},
    {"id": "b", "messages": say("问", "答", system="常用")},
    {"messages": say("问", "", system="少见")},
    {"messages": say("问", "长" * 500)},
    {"messages": [*say("问一", "答一"), *say("问二", "答二")]},
]


@pytest.fixture
def chat(tokenizer: Any) -> Chat:
    return make_chat(tokenizer)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def test_what_is_read_back_is_what_was_rendered(tmp_path: Path, chat: Chat) -> None:
    loaded = load_samples(write(tmp_path / "train.json", RECORDS), chat, 100, tmp_path / "cache")
    dialogues = [Dialogue("", RECORDS[number]["messages"]) for number in (0, 1, 4)]
    rendered = [sample for dialogue in dialogues for sample in chat.samples(dialogue, 100)]
    assert len(loaded.samples) == 3 and loaded.samples.ids == ["a", "b", "4"]
    assert [sample.id for sample in loaded.samples] == loaded.samples.ids
    for stored, sample in zip(loaded.samples, rendered, strict=True):
        assert np.array_equal(stored.input_ids, sample.input_ids) and stored.input_ids.dtype == np.int32
        assert np.array_equal(stored.supervised, sample.supervised)
    assert loaded.samples.lengths.tolist() == [len(sample.input_ids) for sample in rendered]
    assert loaded.samples.targets.tolist() == [sample.supervised.sum() for sample in rendered]
    # The video's name, or else the prompt's tokens.
    prompts = [sample.input_ids[: int(sample.supervised.argmax())].tobytes() for sample in rendered]
    assert loaded.samples.group.tolist() == [zlib.crc32(name) for name in (b"7", *prompts[1:])]
    assert len(set(loaded.samples.group.tolist())) == 3


def test_samples_with_one_prompt_are_a_group(tmp_path: Path, chat: Chat) -> None:
    """Where no video is named: nothing held out may have been learnt."""
    records = [{"messages": say(question, answer)} for question, answer in (("问", "一"), ("问", "二"), ("别的", "二"))]
    group = load_samples(write(tmp_path / "train.json", records), chat, 100, tmp_path / "cache").samples.group
    assert group[0] == group[1] != group[2]


@pytest.mark.parametrize("nothing", [None, "", float("nan")], ids=str)
def test_nothing_is_no_video_and_no_id(tmp_path: Path, chat: Chat, nothing: Any) -> None:
    """As empty cells are: they would be one group, and all of them held out or none."""
    records = [{"id": nothing, "video_id": nothing, "messages": say(f"问{n}", "答")} for n in range(3)]
    found, without = (
        load_samples(write(tmp_path / f"{name}.json", rows), chat, 100, tmp_path / "cache").samples
        for name, rows in (("with", records), ("without", [{"messages": record["messages"]} for record in records]))
    )
    assert found.ids == ["0", "1", "2"] and len({*found.group}) == 3
    assert_same_samples(found, without)


def test_drops_are_counted(tmp_path: Path, chat: Chat) -> None:
    loaded = load_samples(write(tmp_path / "train.json", RECORDS), chat, 100, tmp_path / "cache")
    assert loaded.counts["used"] == 3 and sum(loaded.counts.values()) == 5
    assert sum(n for reason, n in loaded.counts.items() if "empty assistant" in reason) == 1
    assert sum(n for reason, n in loaded.counts.items() if "max_tokens 100" in reason) == 1
    assert loaded.system_prompt == "常用"


def test_some_of_them(tmp_path: Path, chat: Chat) -> None:
    everything = load_samples(write(tmp_path / "train.json", RECORDS), chat, 100, tmp_path / "cache").samples
    chosen = everything.select([2, 0])
    assert chosen.ids == ["4", "a"] and len(chosen) == 2
    assert np.array_equal(chosen[0].input_ids, everything[2].input_ids)
    assert chosen.targets.tolist() == everything.targets[[2, 0]].tolist()
    assert not everything.select([]) and list(everything.select([])) == []


def test_the_same_file_is_rendered_once(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "train.json", RECORDS), tmp_path / "cache"
    first = load_samples(path, chat, 100, cache)
    with monkeypatch.context() as patch:
        patch.setattr(room, "read_records", lambda _: pytest.fail("read again"))
        again = load_samples(path, chat, 100, cache)
    assert again.counts == first.counts and np.array_equal(again.samples.tokens, first.samples.tokens)
    load_samples(path, chat, 50, cache)
    assert sum(path.is_dir() for path in cache.iterdir()) == 2
    write(path, RECORDS[:1])
    assert load_samples(path, chat, 100, cache).samples.ids == ["a"]


@pytest.mark.parametrize("name", ["tokens.bin", "supervised.bin", "index.npz", "facts.json"])
@pytest.mark.parametrize("damage", ["changed", "shorter", "longer", "gone"])
def test_damaged_renderings_are_made_anew(tmp_path: Path, chat: Chat, name: str, damage: str, capsys: Any) -> None:
    """Nobody trains on what a full disk or a power cut has left."""
    path, cache = write(tmp_path / "train.json", RECORDS), tmp_path / "cache"
    first = load_samples(path, chat, 100, cache)
    (file,) = cache.glob(f"samples-*/{name}")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    {
        "changed": lambda: file.write_bytes(data),
        "shorter": lambda: file.write_bytes(data[:-1]),
        "longer": lambda: file.write_bytes(bytes(data) + b"\0"),
        "gone": file.unlink,
    }[damage]()
    capsys.readouterr()
    again = load_samples(path, chat, 100, cache)
    assert "is damaged, or an earlier version made it: it is made anew" in capsys.readouterr().out
    assert again.samples.ids == first.samples.ids and np.array_equal(again.samples.end, first.samples.end)
    assert [sample.input_ids.tolist() for sample in again.samples] == [
        sample.input_ids.tolist() for sample in load_samples(path, chat, 100, tmp_path / "other").samples
    ]
    load_samples(path, chat, 100, cache)
    assert capsys.readouterr().out == ""


def test_another_template_is_another_rendering(tmp_path: Path, chat: Chat, tokenizer: Any) -> None:
    path, cache = write(tmp_path / "train.json", RECORDS), tmp_path / "cache"
    one = load_samples(path, chat, 100, cache).samples
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace("\n", " ")
        two = load_samples(path, make_chat(tokenizer), 100, cache).samples
    finally:
        tokenizer.chat_template = template
    assert not np.array_equal(one[0].input_ids, two[0].input_ids)


def test_several_ranks_at_once(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ask at the same time, one works, all get the same."""
    path = write(tmp_path / "train.json", RECORDS)
    rendered = []
    render = room._write_samples
    monkeypatch.setattr(room, "_write_samples", lambda *args: rendered.append(1) or render(*args))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_samples(path, chat, 100, tmp_path / "cache").samples.ids, range(4)))
    assert found == [["a", "b", "4"]] * 4 and len(rendered) == 1


def test_the_record_is_named(tmp_path: Path, chat: Chat) -> None:
    path = write(tmp_path / "train.json", [{"messages": say("问", "答")}, {"id": "x9", "question": "问"}])
    with pytest.raises(DataError, match=r"train\.json.*record 1.*x9.*question"):
        load_samples(path, chat, 100, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("samples-*"))


@pytest.mark.parametrize("records", [[], [{"messages": say("问", "")}]], ids=["empty", "nothing usable"])
def test_something_is_wanted(tmp_path: Path, chat: Chat, records: list[Any]) -> None:
    with pytest.raises(DataError, match="no record can be used"):
        load_samples(write(tmp_path / "train.json", records), chat, 100, tmp_path / "cache")


def test_why_nothing_can_be_used(tmp_path: Path, chat: Chat) -> None:
    call = [{"from": "human", "value": "问"}, {"from": "function_call", "value": "{}"}, {"from": "gpt", "value": "答"}]
    records = [*[{"conversations": call}] * 3, {"messages": say("问", "")}]
    told = r"\(3 dropped: a turn of 'function_call' \(tool calls are not trained on\), known .*, 1 dropped: an empty "
    with pytest.raises(DataError, match=told):
        load_samples(write(tmp_path / "train.json", records), chat, 100, tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------------------
# Fields of other names

TEXTS = [("问一，“好”", "答\n一"), ("问二", "答,二"), ("问一，“好”", "答三")]


def write_as(path: Path, rows: list[dict[str, str]]) -> Path:
    """In the format that the ending names, by others' hands."""
    table = Dataset.from_list(rows)
    if path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, lines=path.suffix == ".jsonl", force_ascii=False)
    return path


def assert_same_samples(one: Samples, two: Samples) -> None:
    for name in ("tokens", "supervised", "begin", "end", "group", "targets", "ids"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("names", [*PAIRS, ("Frage", "Antwort")], ids="/".join)
def test_the_same_samples_as_of_messages(tmp_path: Path, chat: Chat, names: tuple[str, str], ending: str) -> None:
    """Question and answer, and where no usual name tells them what the user names."""
    path = write_as(tmp_path / f"train.{ending}", [dict(zip(names, texts, strict=True)) for texts in TEXTS])
    columns = None if names in PAIRS else dict(zip(("user", "assistant"), names, strict=True))
    found = load_samples(path, chat, 100, tmp_path / "cache", columns=columns)
    expected = load_samples(
        write(tmp_path / "messages.json", [{"messages": say(*texts)} for texts in TEXTS]), chat, 100, tmp_path / "cache"
    )
    assert_same_samples(found.samples, expected.samples)
    assert found.counts == expected.counts == {"used": 3} and expected.taken == {}
    if names in PAIRS and names != ("instruction", "output"):  # Alpaca's.
        assert found.taken == {f"user and assistant: {', '.join(names)}": {}}


def test_lists_of_messages_as_prompts(tmp_path: Path, chat: Chat) -> None:
    talks = [say("问一", "答一", system="设定") + say(*texts) for texts in TEXTS]
    halves = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks]
    whole, half = (
        load_samples(write(tmp_path / f"{name}.json", records), chat, 100, tmp_path / "cache").samples
        for name, records in (("whole", [{"messages": talk} for talk in talks]), ("half", halves))
    )
    assert_same_samples(half, whole)


def test_other_columns_are_another_rendering(tmp_path: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"id": "a", "question": "问", "answer": "答", "briefing": "设定"}
    path, cache = write(tmp_path / "train.json", [record]), tmp_path / "cache"
    usual = {"user": "question", "assistant": "answer"}
    ways = (None, usual, usual | {"system": "briefing"}, {"user": "answer", "assistant": "question"})
    texts = [show_sample(load_samples(path, chat, 100, cache, columns=way).samples[0], chat.tokenizer) for way in ways]
    assert texts[0] == texts[1] and "设定" in texts[2] and texts[3].index("答") < texts[3].index("问")
    assert sum(place.is_dir() for place in cache.iterdir()) == 4
    monkeypatch.setattr(room, "read_records", lambda *_: pytest.fail("read again"))
    again = load_samples(path, chat, 100, cache, columns=dict(reversed(usual.items()))).samples[0]
    assert show_sample(again, chat.tokenizer) == texts[1], "their order makes no difference"


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (None, "Fields taken as user and assistant: question, answer; not used: topic (in 25).\n"),
        ({"user": "topic", "assistant": "answer"}, "Fields taken as user and assistant: topic, answer.\n"),
    ],
    ids=["usual", "named"],
)
def test_what_was_taken_is_said(
    tmp_path: Path, chat: Chat, columns: dict[str, str] | None, told: str, capsys: Any
) -> None:
    """At every start, also from what was rendered before; for other ranks and the test not at all."""
    records = [{"question": f"问{n}", "answer": "答", "topic": "题" * (n % 2)} for n in range(50)]
    files = [write(tmp_path / f"{name}.json", records) for name in ("train", "test")]
    args = argparse.Namespace(output_dir=str(tmp_path), max_tokens=100)
    for show in (True, True, False):
        load_splits(args, *files, chat, show, columns=columns)
        assert capsys.readouterr().out.count(told) == show
