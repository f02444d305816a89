"""utils/data/pairs.py: preference pairs in every known format, and what is dropped.

python -m pytest tests/test_utils_data_pairs.py
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from utils.data.chat import make_chat
from utils.data.pairs import pair, to_pair
from utils.data.records import DataError, Taken, UnusableRecord, fields_notes
from utils.data.samples import load_samples

USER, SYSTEM = {"role": "user", "content": "好看吗"}, {"role": "system", "content": "你是B站用户"}
YES, NO = {"role": "assistant", "content": "好看"}, {"role": "assistant", "content": "不好看"}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "好看吗", "chosen": "好看", "rejected": "不好看"}, [USER]),
        ({"prompt": "好看吗", "chosen": "好看", "rejected": "不好看", "system": "你是B站用户"}, [SYSTEM, USER]),
        ({"prompt": "\n\nHuman: 好看吗\n\nAssistant:", "chosen": " 好看", "rejected": " 不好看"}, [USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [YES], "rejected": [NO]}, [SYSTEM, USER]),
        ({"prompt": [USER], "chosen": "好看", "rejected": NO}, [USER]),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, [USER]),
        (
            {
                "chosen": "\n\nHuman: 好看吗\n\nAssistant: 好看",
                "rejected": "\n\nHuman: 好看吗\n\nAssistant: 不好看",
            },
            [USER],
        ),
        (
            {
                "conversations": [{"from": "system", "value": "你是B站用户"}, {"from": "human", "value": "好看吗"}],
                "chosen": {"from": "gpt", "value": "好看"},
                "rejected": {"from": "gpt", "value": "不好看"},
            },
            [SYSTEM, USER],
        ),
        ({"instruction": "好看吗", "input": "", "chosen": "好看", "rejected": "不好看"}, [USER]),
        ({"messages": [SYSTEM, USER], "chosen": YES, "rejected": NO}, [SYSTEM, USER]),
        ({"prompt": "好看吗", "chosen": [USER, YES], "rejected": [USER, NO]}, [USER]),
        ({"prompt": "好看吗", "instruction": None, "messages": None, "chosen": "好看", "rejected": "不好看"}, [USER]),
        ({"question": "好看吗", "chosen": "好看", "rejected": "不好看"}, [USER]),
        ({"system": "你是B站用户", "Query": "好看吗", "Chosen": [YES], "Rejected": [NO]}, [SYSTEM, USER]),
        ({"prompt": None, "question": [SYSTEM, USER], "chosen": "好看", "rejected": "不好看"}, [SYSTEM, USER]),
        ({"user": "好看吗", "chosen": "好看", "rejected": "不好看", "system": ""}, [USER]),
        ({"prompt": "好看吗", "chosen": "好看", "rejected": "不好看", "system_prompt": "你是B站用户"}, [SYSTEM, USER]),
        ({"System": "你是B站用户", "chosen": [USER, YES], "rejected": [USER, NO]}, [SYSTEM, USER]),
        ({"instruction": "好", "Input": "吗", "chosen": "好看", "rejected": "不好看"}, [USER | {"content": "好\n吗"}]),
        ({"instruction": "好看吗", "chosen": YES, "rejected": NO, "history": [["好看吗", "好看"]]}, [USER, YES, USER]),
        ({"prompt": "好看吗", "user": "某人", "chosen": "好看", "rejected": "不好看"}, [USER]),
        ({"messages": [], "prompt": "好看吗", "chosen": "好看", "rejected": "不好看"}, [USER]),
        ({"prompt": 5, "chosen": "好看", "rejected": "不好看"}, [USER | {"content": "5"}]),
    ],
    ids="texts system human messages mixed dialogues hh llamafactory alpaca openai ultrafeedback nulls "
    "question case lists named system_prompt whole_system input history user empty number".split(),
)  # fmt: skip
def test_formats(record: Mapping[str, Any], prompt: list[dict[str, str]]) -> None:
    assert to_pair(record) == (prompt, "好看", "不好看")


def test_earlier_turns_stay() -> None:
    dialogue = "\n\nHuman: 一\n\nAssistant: 二\n\nHuman: 三\n\nAssistant:"
    messages, chosen, rejected = to_pair({"prompt": dialogue, "chosen": " 四", "rejected": " 五"})
    assert [message["content"] for message in messages] == ["一", "二", "三"] and (chosen, rejected) == ("四", "五")
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]


def test_an_answer_may_speak_of_humans() -> None:
    text = "第一段\n\nHuman: 这是引文"
    assert to_pair({"prompt": "问", "chosen": text, "rejected": "答"})[1] == text


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "问", "chosen": "答", "rejected": " 答 "}, "two equal answers"),
        ({"prompt": "问", "chosen": "答", "rejected": " "}, "empty"),
        ({"prompt": "", "chosen": "答", "rejected": "不答"}, "empty"),
        ({"prompt": "问", "chosen": None, "rejected": "不答"}, "empty"),
        ({"instruction": "问", "chosen": [], "rejected": "不答"}, "empty"),
        ({"prompt": "问", "chosen": float("nan"), "rejected": "不答"}, "empty"),
        ({"prompt": None, "chosen": "答", "rejected": "不答"}, "empty"),
        ({"prompt": float("nan"), "chosen": "答", "rejected": "不答"}, "empty"),
        ({"prompt": True, "chosen": "答", "rejected": "不答"}, "not a text"),
        ({"prompt": "问", "chosen": True, "rejected": "不答"}, "not a text"),
        ({"prompt": "问", "chosen": 5, "rejected": 5.0}, "two equal answers"),
        ({"prompt": "问", "chosen": "\n\nAssistant:", "rejected": "不答"}, "empty"),
        ({"chosen": [USER, YES], "rejected": [{**USER, "content": "别的"}, NO]}, "different prompts"),
    ],
)
def test_unusable_records(record: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRecord, match=reason):
        to_pair(record)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "问", "chosen": "答"},
        ["问"],
        {"prompt": [3], "chosen": "答", "rejected": "否"},
        {"conversations": 5, "chosen": "答", "rejected": "否"},
        {"title": "问", "chosen": "答", "rejected": "否"},
        {"text": "x"},
    ],
)
def test_unknown_formats(record: Any) -> None:
    with pytest.raises(DataError, match="expected one of") as error:
        to_pair(record)
    assert not isinstance(error.value, UnusableRecord)


def test_both_answers_follow_the_same_shortened_prompt(tokenizer: Any) -> None:
    chat = make_chat(tokenizer)
    record = {"prompt": "标题很长" * 100, "chosen": "好", "rejected": "真的非常不好看" * 3}
    chosen, rejected = chat.samples(pair(record, "7"), 120)
    assert chosen.id == rejected.id == "7"
    start = int(chosen.supervised.argmax())
    assert start == rejected.supervised.argmax() and (chosen.input_ids[:start] == rejected.input_ids[:start]).all()
    assert 100 < len(rejected.input_ids) <= 120 and len(chosen.input_ids) < len(rejected.input_ids)
    for sample, text in ((chosen, "好"), (rejected, "真的非常不好看" * 3)):
        assert sample.supervised[start:].all() and sample.input_ids[-1] == chat.stop_id
        assert tokenizer.decode(sample.input_ids[start:], skip_special_tokens=True) == text
    assert chat.samples(pair(record | {"rejected": "长" * 500}, "7"), 120) == []


def test_only_the_last_answer_is_learnt(tokenizer: Any) -> None:
    chat = make_chat(tokenizer)
    chosen, _ = chat.samples(pair({"prompt": [USER, YES, USER], "chosen": "四", "rejected": "五"}, ""), 200)
    assert tokenizer.decode(chosen.input_ids[chosen.supervised]).startswith("四")


def test_a_file_of_pairs(tokenizer: Any, tmp_path: Path) -> None:
    """Two samples a pair, in order; what is dropped is counted, an unknown record is named."""
    records = [{"prompt": f"问{n}", "chosen": "答", "rejected": "否", "id": f"r{n}"} for n in range(3)]
    records[1]["rejected"] = "答"
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    samples, counts, _, taken = load_samples(path, make_chat(tokenizer), 100, tmp_path / "cache", parse=pair)
    assert taken == {}
    assert samples.ids == ["r0", "r0", "r2", "r2"]
    assert counts == {"used": 2, "dropped: two equal answers": 1}
    path.write_text(json.dumps({"text": "x"}))
    with pytest.raises(DataError, match=r"pairs.jsonl, record 0 \(id 0\): got the fields \['text'\]"):
        load_samples(path, make_chat(tokenizer), 100, tmp_path / "cache", parse=pair)


def test_several_prompts_are_named() -> None:
    for one, other in (("question", "query"), ("question", "prompt"), ("question", "instruction")):
        told = f"{one} or {other} may be user.*--columns 'user={one},chosen=chosen,rejected=rejected'"
        with pytest.raises(DataError, match=told):
            to_pair({other: "问", one: "问", "chosen": "答", "rejected": "否"})


def test_what_is_unusual_is_noted() -> None:
    taken: Taken = {}
    sides = {"chosen": "答", "rejected": "否"}
    for more in ({"prompt": "问"}, {"prompt": "问", "score": 3}, {"prompt": "问", "system": "设定", "score": 4}):
        to_pair(sides | more, taken)
    to_pair({"instruction": "问", "input": ""} | sides, taken)
    to_pair({"prompt": "好看吗", "messages": [USER], "chosen": [USER, YES], "rejected": [USER, NO], "score": 1}, taken)
    assert fields_notes(taken) == [
        "fields taken as user, chosen and rejected: prompt, chosen, rejected; not used: score (in 1)",
        "fields taken as user, chosen, rejected and system: prompt, chosen, rejected, system; not used: score (in 1)",
        "fields taken as chosen and rejected: chosen, rejected; not used: score (in 1)",
    ]


@pytest.mark.parametrize("names", [("question", "chosen", "rejected"), ("问题", "好", "坏")], ids="/".join)
def test_pairs_with_fields_of_other_names(tokenizer: Any, tmp_path: Path, names: tuple[str, str, str]) -> None:
    roles = ("user", "chosen", "rejected")
    columns = None if names[0] == "question" else dict(zip(roles, names, strict=True))
    texts = [(f"问{n}", "答" * (n + 1), "否") for n in range(3)]
    files = [tmp_path / "named.jsonl", tmp_path / "usual.jsonl"]
    for path, fields in zip(files, (names, ("prompt", *roles[1:])), strict=True):
        path.write_text("\n".join(json.dumps(dict(zip(fields, row, strict=True))) for row in texts))
    named, usual = (
        load_samples(path, make_chat(tokenizer), 100, tmp_path / "cache", parse=pair, columns=way)
        for path, way in zip(files, (columns, None), strict=True)
    )
    assert [[*sample.input_ids] for sample in named.samples] == [[*sample.input_ids] for sample in usual.samples]
    assert named.counts == usual.counts and len(named.samples) == 6
    if columns is None:
        assert named.taken == {"user, chosen and rejected: question, chosen, rejected": {}}
