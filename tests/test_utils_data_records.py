"""utils/data/records.py: records of any known format become messages, and files are read as they are.

python -m pytest tests/test_utils_data_records.py
"""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.data.records import (
    PAIRS,
    DataError,
    Taken,
    UnusableRecord,
    comment_prompt,
    fields_notes,
    find_split,
    read_records,
    to_messages,
)

Messages = list[dict[str, str]]


def say(*contents: str, system: str = "") -> Messages:
    """Messages of user and assistant in turn."""
    talk = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *talk] if system else talk


# ---------------------------------------------------------------------------------------------------------------------
# Formats


ONE = say("问", "答")
TWO = say("问一", "答一", "问二", "答二")
WITH_SYSTEM = say("问", "答", system="设定")


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"conversations": [{"from": "user", "value": "问"}, {"from": "assistant", "value": "答"}]}, ONE),
        ({"conversations": [{"from": "human", "value": " 问\n"}, {"from": "gpt", "value": "\t答 "}]}, ONE),
        (
            {
                "conversations": [
                    {"from": "system", "value": "设定"},
                    {"from": "user", "value": "问"},
                    {"from": "assistant", "value": "答"},
                ]
            },
            WITH_SYSTEM,
        ),
        (
            {"system": "设定", "conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
            WITH_SYSTEM,
        ),
        (
            {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate("甲乙丙丁")]},
            say("甲", "乙", "丙", "丁"),
        ),
        ({"messages": WITH_SYSTEM, "id": 3}, WITH_SYSTEM),
        ({"messages": TWO, "conversations": None}, TWO),
        ({"instruction": "问", "output": "答"}, ONE),
        ({"instruction": "问", "input": "", "output": "答"}, ONE),
        ({"instruction": "问", "input": "补充", "output": "答"}, say("问\n补充", "答")),
        ({"instruction": "", "input": "问", "output": "答"}, ONE),
        ({"instruction": "问", "input": None, "output": "答", "system": "设定", "history": None}, WITH_SYSTEM),
        ({"instruction": "问二", "input": "", "output": "答二", "history": [["问一", "答一"]]}, TWO),
        ([{"human": "问", "assistant": "答"}], ONE),
        ([{"human": "问一", "assistant": "答一"}, {"human": "问二", "assistant": "答二"}], TWO),
    ],
)  # fmt: skip
def test_formats(record: Any, messages: Messages) -> None:
    assert to_messages(record) == messages


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ("text", "str"),
        (7, "int"),
        ({"text": "问答"}, "text.*--columns 'user=FIELD,assistant=FIELD'"),
        ({"question": "问"}, "question"),
        ({"answer": "答", "label": 1}, "answer"),
        ({"prompt": [{"speaker": "user", "content": "问"}], "completion": "答"}, "role"),
        ({"instruction": "问"}, "instruction"),
        ({"messages": [{"speaker": "user", "content": "问"}]}, "role"),
        ({"messages": "[{'role': 'user'}]"}, "role"),
        ({"conversations": [["user", "问"], ["assistant", "答"]]}, "from"),
        # Messages without a dict around them are none of the known formats either.
        ([{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "human"),
        ([{"from": "user", "value": "问"}, {"from": "assistant", "value": "答"}], "human"),
        (["问", "答"], "human"),
        ({"instruction": "问", "output": "答", "history": [1]}, "history"),
        ({"instruction": "问", "output": "答", "history": ["前问"]}, "history"),  # Its letters are no turns.
    ],
)
def test_unknown_formats_are_named(record: Any, named: str) -> None:
    with pytest.raises(DataError, match=named) as caught:
        to_messages(record)
    assert not isinstance(caught.value, UnusableRecord)
    assert "conversations" in str(caught.value) and "messages" in str(caught.value), "says what is expected"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": say("问", "  ")},
        {"messages": say("", "答")},
        {"messages": say("问")},
        {"messages": say("问", "答", "问")},
        {"messages": [*say("问"), *say("问", "答")]},
        {"messages": say("问", "答")[1:]},
        {"messages": [{"role": "system", "content": "设定"}]},
        {"messages": [{"role": "tool", "content": "3"}, *say("问", "答")]},
        {"messages": [*say("问", "答"), {"role": "system", "content": "设定"}]},
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "答"}]},
        {"instruction": "问", "output": ""},
        {"instruction": "问", "output": None},
        {"instruction": True, "output": "答"},
        {"instruction": "问", "input": True, "output": "答"},
        {"instruction": "问", "input": [1], "output": "答"},
        {"instruction": "问", "output": float("nan")},
        {"instruction": "问", "output": "答", "system": True},
        {"question": "", "answer": "", "prompt": None, "completion": None},  # A row of empty cells.
        {"user": "", "assistant": "答", "prompt": ""},
        {"messages": None, "question": "问", "answer": ""},
        {"messages": [{"role": ["user"], "content": "问"}, {"role": "assistant", "content": "答"}]},
        {"conversations": []},
        {"messages": []},
        {"instruction": "问", "output": "答", "history": [["只有一半"]]},
        [{"human": "问", "assistant": ""}],
        [],
    ],
    ids=str,
)
def test_unusable_records_are_told_from_unknown_formats(record: Any) -> None:
    with pytest.raises(UnusableRecord):
        to_messages(record)


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        *(({q: "问", a: "答"}, ONE) for q, a in PAIRS),
        ({"Question": " 问", "ANSWER ": "答\n"}, ONE),
        ({"prompt": "问", "response": "答"}, ONE),  # One question and one answer of two usual pairs.
        ({"id": 1, "video_id": 2, "query": "问", "response": "答", "answer": "", "user": "某人"}, ONE),
        ({"prompt": [{"role": "user", "content": "问"}], "completion": [{"role": "assistant", "content": "答"}]}, ONE),
        ({"prompt": TWO[:3], "completion": "答二"}, TWO),
        ({"prompt": WITH_SYSTEM[:2], "completion": WITH_SYSTEM[2:]}, WITH_SYSTEM),
        ({"System_Prompt": "设定", "question": "问", "response": "答"}, WITH_SYSTEM),
        (
            {"system": "设定", "query": "问二", "response": "答二", "history": [["问一", "答一"]]},
            say("问一", "答一", "问二", "答二", system="设定"),
        ),
        ({"question": "问", "answer": "答", "history": "既往史"}, ONE),  # No turns.
        ({"instruction": "问", "input": "补充", "response": "答"}, say("问\n补充", "答")),
        ({"Instruction": "问", "Input": "", "Output": "答"}, ONE),
        ({"instruction": "问", "input": "补充", "target": "答"}, say("问\n补充", "答")),
        ({"instruction": "问", "context": "补充", "response": "答"}, say("问\n补充", "答")),  # Dolly's.
        ({"instruction": "", "input": "问", "prompt": None, "output": "答"}, ONE),
        ({"instruction": "问", "output": "答", "history": "既往史"}, ONE),
        ({"instruction": "问", "input": 5, "output": 5.0}, say("问\n5", "5")),
        ({"instruction": 0.25, "output": -3, "system": 7}, say("0.25", "-3", system="7")),
        ({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": 5}]}, say("问", "5")),
        ({"instruction": "问", "input": "", "output": "答", "system_prompt": "设定"}, WITH_SYSTEM),
        ({"System": "设定", "Instruction": "问", "output": "答"}, WITH_SYSTEM),
        ({"instruction": "问", "Input": "补充", "output": "答"}, say("问\n补充", "答")),
        ({"instruction": "问二", "output": "答二", "History": [["问一", "答一"]]}, TWO),
        ({"History": [], "history": [["问一", "答一"]], "question": "问二", "answer": "答二"}, TWO),
        ({"system": " ", "system_prompt": "设定", "question": "问", "answer": "答"}, WITH_SYSTEM),
        ({"system": float("nan"), "System": "设定", "question": "问", "answer": "答"}, WITH_SYSTEM),
        ({"system_prompt": "设定", "messages": ONE}, WITH_SYSTEM),
        ({"System": "设定", "Messages": ONE, "conversations": []}, WITH_SYSTEM),
        ({"question": "问", "answer": "答", "prompt": None, "completion": float("nan"), "target": []}, ONE),
        ({"messages": [], "conversations": None, "question": "问", "answer": "答"}, ONE),
        ({"question": "问", "answer": "答", "user": "某人", "assistant": ""}, ONE),
        ({"user": "问", "assistant": "答", "prompt": ""}, ONE),
        ({"messages": ONE, "question": "别的", "answer": "别的"}, ONE),
    ],
    ids=str,
)  # fmt: skip
def test_usual_names_of_questions_and_answers(record: dict[str, Any], messages: Messages) -> None:
    assert to_messages(record) == messages


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            "question answer prompt completion",
            "question or prompt may be user, answer or completion may be assistant.*'user=question,assistant=answer'",
        ),
        ("input output target", "target or output may be assistant.*'user=input,assistant=target'"),
        ("Question question answer", "Question or question may be user"),
        ("prompt answer response target", "answer or response or target may be assistant"),
        ("instruction question answer response", "question or instruction may be user, answer or response may be"),
        ("question answer response", "answer or response may be assistant.*'user=question,assistant=answer'"),
        ("question answer prompt", "question or prompt may be user.*'user=question,assistant=answer'"),
        ("query prompt response", "prompt or query may be user.*'user=query,assistant=response'"),
        ("instruction question answer", "question or instruction may be user.*'user=question,assistant=answer'"),
        ("instruction input prompt completion", "prompt or instruction may be user.*'user=prompt,assistant=completion"),
        ("instruction output question answer", "'user=question,assistant=answer'"),
        ("user assistant prompt", "prompt or user may be user.*'user=user,assistant=assistant'"),
        ("question answer system system_prompt", "system or system_prompt may be system.*,system=system'"),
        ("question answer response system", "'user=question,assistant=answer,system=system'"),
        ("question prompt", "'user=question,assistant=FIELD'"),
    ],
)
def test_several_fields_are_named(fields: str, named: str) -> None:
    with pytest.raises(DataError, match=f"got the fields .*, of which .*{named}") as caught:
        to_messages(dict.fromkeys(fields.split(), "文"))
    assert not isinstance(caught.value, UnusableRecord) and "--columns" in str(caught.value)


def test_what_was_taken_is_noted() -> None:
    taken: Taken = {}
    for number in range(3):
        more = {"topic": "x"} if number else {"context": "背景", "source": None, "history": "既往史"}
        to_messages({"id": number, "Question": "问", "Answer": "答"} | more, taken)
    to_messages({"instruction": "问", "input": "补充", "response": "答"}, taken)
    to_messages({"messages": ONE}, taken)
    to_messages({"instruction": "问", "input": "", "output": "答", "system": "设定", "history": None}, taken)
    to_messages({"id": 1, "video_id": 2, "conversations": [], "messages": ONE, "system": "设定"}, taken)
    assert fields_notes(taken) == [
        "fields taken as user and assistant: Question, Answer; not used: context (in 1), history (in 1), topic (in 2)",
        "fields taken as user and assistant: instruction, response, instruction followed by input",
    ]


@pytest.mark.parametrize(
    ("record", "note"),
    [
        ({"messages": ONE, "system_prompt": "设定"}, "messages and system: messages, system_prompt"),
        ({"messages": ONE, "prompt": "问", "tags": []}, "messages: messages; not used: prompt (in 1)"),
        (
            {"instruction": "问", "output": "答", "text": "全"},
            "user and assistant: instruction, output; not used: text (in 1)",
        ),
        (
            {"instruction": "问", "output": "答", "System": "设定"},
            "user, assistant and system: instruction, output, System",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_unusual_is_noted(record: dict[str, Any], note: str) -> None:
    taken: Taken = {}
    to_messages(record, taken)
    assert fields_notes(taken) == [f"fields taken as {note}"]


@pytest.mark.parametrize("role", ["tool", "function", "function_call", "observation", "tool_call", "tool_response"])
@pytest.mark.parametrize("names", [("messages", "role", "content"), ("conversations", "from", "value")], ids=str)
def test_tool_calls_are_named(role: str, names: tuple[str, str, str]) -> None:
    field, who, what = names
    turns = [("user", "问"), ("assistant", None), (role, "{}"), ("assistant", "答")]
    told = rf"a turn of '{role}' \(tool calls are not trained on\), known are system"
    with pytest.raises(UnusableRecord, match=told):
        to_messages({field: [{who: one, what: text} for one, text in turns]})


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=str)
def test_a_call_in_the_place_of_an_answer(content: dict[str, Any]) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]} | content
    with pytest.raises(UnusableRecord, match="tool calls are not trained on"):
        to_messages({"messages": [{"role": "user", "content": "问", "tool_calls": None}, call]})


# ---------------------------------------------------------------------------------------------------------------------
# Files


RECORDS = [{"instruction": f"问{n}，“好”", "input": "", "output": f"答{n}"} for n in range(3)]


def test_half_a_surrogate_pair_is_replaced() -> None:
    record = json.loads('{"instruction": "\\ud83d?", "output": "\\ud83d\\ude00"}')
    assert [message["content"] for message in to_messages(record)] == ["??", "\U0001f600"]


def write(path: Path, records: list[Any], bom: str = "") -> Path:
    """Writes records as the file's ending says."""
    if path.suffix == ".json":
        path.write_text(bom + json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_bytes((bom + "\r\n".join(lines) + "\r\n\r\n").encode())
    elif path.suffix == ".csv":
        rows = [[*records[0]], *([*record.values()] for record in records)]
        path.write_text(bom + "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows), encoding="utf-8")
    else:
        from datasets import Dataset

        Dataset.from_list(records).to_parquet(path)
    return path


@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "BOM"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_files(tmp_path: Path, ending: str, bom: str) -> None:
    path = write(tmp_path / f"train.{ending}", RECORDS, bom)
    assert [to_messages(record) for record in read_records(path)] == [
        say(record["instruction"], record["output"]) for record in RECORDS
    ]


def test_parquet_with_several_turns(tmp_path: Path) -> None:
    records = [{"id": "a", "messages": TWO}, {"id": "b", "messages": ONE}]
    path = write(tmp_path / "train.parquet", records)
    assert [to_messages(record) for record in read_records(path)] == [TWO, ONE]


def test_csv_is_read_anew_when_it_has_changed(tmp_path: Path) -> None:
    for answer in ("旧的", "新的"):
        path = write(tmp_path / "train.csv", [{"instruction": "问", "input": "", "output": answer}])
        assert [record["output"] for record in read_records(path)] == [answer]


@pytest.mark.parametrize("answer", ["666", "null", "NA", "1.50"])
def test_csv_answers_stay_the_text_they_are(tmp_path: Path, answer: str) -> None:
    """Comments such as 666 are common; a column of them must not become numbers or holes."""
    path = write(tmp_path / "train.csv", [{"instruction": "问", "input": "", "output": answer}])
    assert [to_messages(record) for record in read_records(path)] == [say("问", answer)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.json", b'[{"a": 1}, '),
        ("train.json", b'{"conversations": []}'),
        ("train.json", '["问"]'.encode("gbk")),
        ("train.jsonl", b'{"a": 1}\n{"a": '),
        ("train.csv", b""),
        ("train.csv", b"a,b\n1,2\n1,2,3,4\n"),
        ("train.csv", "instruction,output\n问,答\n".encode("gbk")),
        ("train.parquet", b"PAR1 no more"),
        ("train.txt", b"text"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        list(read_records(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("t.csv", 'question,answer\nq1,"今天\nq2,a2\nq3,a3\n', "row that begins in line 2 cannot be read"),
        ("t.csv", 'q,a\n"q\n1",a1\nq2,"a"b\n', r'line 4 cannot be read: .*quotes within it are doubled: "a ""b"" c"'),
        ("t.csv", "question,answer,question\nq,a,\n", "column 'question' is there twice"),
        ("t.json", '{"question": "q"}\n{"question": "r"}\n', "record a line, rename it to t.jsonl"),
        ("t.json", '{"data": [{"question": "q"}]}', r"one JSON dict, .*in 'data'\? Then save that list alone"),
        ("t.jsonl", '[{"question": "q"}, {"question": "r"}]', "array in line 1, .*rename it to t.json$"),
        ("t.jsonl", '[\n{"question": "q"}\n]', "array in line 1, .*rename it to t.json$"),
        ("t.jsonl", '{"question": "q"}\n\n{"question":\n"r"}', "line 3: .*Expected a record a line"),
        ("t.csv", "question,answer\n问,答\n".encode("gbk"), "not UTF-8 .*Save it as UTF-8"),
        ("t.csv", "question,answer\n问,答\n".encode("utf-16"), "not UTF-8 .*Save it as UTF-8"),
    ],
)  # fmt: skip
def test_what_to_do_with_a_file(tmp_path: Path, name: str, content: str | bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=told):
        list(read_records(tmp_path / name))


def test_quotes_and_unnamed_columns_of_csv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('question,answer,,\n"说""好""\n吗",5" 的,,\n', encoding="utf-8")
    assert [to_messages(record) for record in read_records(tmp_path / "t.csv")] == [say('说"好"\n吗', '5" 的')]


def test_dialogues_a_line(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('[{"human": "问", "assistant": "答"}]\n' * 2, encoding="utf-8")
    assert [to_messages(record) for record in read_records(tmp_path / "t.jsonl")] == [ONE, ONE]


NAMED = [{"id": id, "frage": "问", "antwort": "答", "rolle": system} for id, system in (("a", "设定"), ("b", ""))]
COLUMNS = {"user": "frage", "assistant": "antwort", "system": "rolle"}


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_named_fields(tmp_path: Path, ending: str) -> None:
    records = list(read_records(write(tmp_path / f"train.{ending}", NAMED), COLUMNS))
    assert [record["id"] for record in records] == ["a", "b"]
    assert [to_messages(record) for record in records] == [WITH_SYSTEM, ONE]


def test_names_count_before_what_is_usual(tmp_path: Path) -> None:
    record = {"question": "别的", "answer": "别的", "Prompt": "问", "completion": "答", "messages": [], "system": "x"}
    path = write(tmp_path / "train.jsonl", [record])
    (found,) = read_records(path, {"user": "prompt", "assistant": "completion"})
    assert to_messages(found) == ONE


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"user": "frage", "assistant": "x"}, r"record 0: no field 'x' of --columns, there are \['antwort', 'frage'"),
        (COLUMNS | {"system": "x"}, r"no field 'x' of --columns, in the last record are \['antwort', 'frage'"),
    ],
)
def test_wrong_names(tmp_path: Path, columns: dict[str, str], named: str) -> None:
    with pytest.raises(DataError, match=rf"train\.jsonl.*{named}"):
        list(read_records(write(tmp_path / "train.jsonl", NAMED), columns))


def test_not_every_record_has_a_system_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"frage": "问", "antwort": "答"}, *NAMED[:1]])
    assert [to_messages(record) for record in read_records(path, COLUMNS)] == [ONE, WITH_SYSTEM]
    with pytest.raises(DataError, match="record 0: got a list"):
        list(read_records(write(tmp_path / "train.json", [[1]]), COLUMNS))


def test_find_split(tmp_path: Path) -> None:
    assert find_split(tmp_path, "train") is None
    (tmp_path / "train.csv").touch()
    assert find_split(tmp_path, "train") == tmp_path / "train.csv"
    (tmp_path / "data_train.jsonl").touch()
    assert find_split(tmp_path, "train") == tmp_path / "data_train.jsonl"
    assert find_split(tmp_path, "test") is None


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


def test_comment_prompt() -> None:
    assert comment_prompt("标题", "简介", "评论") == "视频标题：标题\n视频简介：简介\n父评论：评论"
    assert comment_prompt(" 标题\n", "-") == "视频标题：标题"
    assert comment_prompt("标题", parent=" ") == "视频标题：标题"
    for desc in ("@某人", "@甲 ＠乙\n@丙", "@甲@乙"):
        assert comment_prompt("标题", desc) == "视频标题：标题", "mentions tell nothing"
    for desc in ("@某人 看这里", "看 @某人", "@", "a@b.c"):
        assert comment_prompt("标题", desc) == f"视频标题：标题\n视频简介：{desc}"


PIECES = ["1", "-3", "12.5e3", "true", "null", '"a]b,["', "[]", "[[1], 2]", "{}", '{"a": [1, {"b": "x,]"}]}']
SPACES = st.sampled_from(["", " ", "\n"])


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=6), size=st.integers(1, 9), space=SPACES)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_an_array_is_read_in_parts(pieces: list[str], size: int, space: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Wherever the parts of a file end, even in the midst of a number."""
    text = f"{space}[{space}{f'{space},{space}'.join(pieces)}{space}]{space}"
    (tmp_path / "data.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr("utils.data.records.PART_CHARACTERS", size)
    assert list(read_records(tmp_path / "data.json")) == json.loads(text)


@pytest.mark.parametrize("size", [1, 1 << 20])
@pytest.mark.parametrize(
    ("text", "says"),
    [("", "Expecting value"), ("[1", "line 1"), ("[1,]", "line 1"), ("[1 2]", "line 1"), ("[1]x", "Extra data: line 1"),
     ('[\n{"a": 1},\n{"a": }]', "line 3"), ("[1\n\n2]", "line 3"), ("{}", "one JSON dict"), ("3", "one JSON int")],
)  # fmt: skip
def test_what_is_no_array(text: str, says: str, size: int, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "data.json").write_text(text)
    monkeypatch.setattr("utils.data.records.PART_CHARACTERS", size)
    with pytest.raises(DataError, match=says):
        list(read_records(tmp_path / "data.json"))


def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    """32 MB of records, read with a few."""
    with (tmp_path / "data.json").open("w") as file:
        file.write("[" + ",\n".join([json.dumps({"messages": "x" * 1000})] * 32_000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_records(tmp_path / "data.json")) == 32_000
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
