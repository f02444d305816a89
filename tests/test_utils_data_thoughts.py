"""utils/data/thoughts.py, and thoughts in records and chat templates.

python -m pytest tests/test_utils_data_thoughts.py
"""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_utils_data_chat import QWEN3, THINKING, chat_of, rendered, say

from utils.data.chat import PLAIN_TEMPLATE, Chat, Dialogue, complete_prompt, make_chat
from utils.data.records import DataError, UnusableRecord, to_messages
from utils.data.samples import load_samples
from utils.data.thoughts import THINKING as MARK
from utils.data.thoughts import (
    ThoughtFolder,
    ThoughtFrame,
    find_frame,
    join_thought,
    split_thought,
    thinks,
    without_thoughts,
)
from utils.data.tokenizer import load_tokenizer


@pytest.mark.parametrize(("text", "parts"), [
    ("<think>\n先想\n</think>\n\n再说", ("先想", "再说")),
    ("  <think>先想</think>再说 ", ("先想", "再说 ")),
    ("<think>\n\n</think>\n\n再说", ("", "再说")),
    ("[THINK]a[/THINK]b", ("a", "b")),
    ("<think>没有说完", ("", "<think>没有说完")),
    ("先说 <think>想</think>", ("", "先说 <think>想</think>")),
    ("想</think>说", ("", "想</think>说")),
    ("", ("", "")),
])  # fmt: skip
def test_split(text: str, parts: tuple[str, str]) -> None:
    assert split_thought(text) == parts


def test_join_is_what_split_reads() -> None:
    assert split_thought(join_thought("想\n又想", "说")) == ("想\n又想", "说")
    talk = say("<think>我的话</think>问", "<think>想</think>说")
    assert without_thoughts(talk) == say("<think>我的话</think>问", "说"), "users' words stay"


FRAME = ThoughtFrame("<think>\n", "\n</think>\n\n", "", opened=False)


@pytest.mark.parametrize(("opened", "text", "parts"), [
    (False, "<think>\n想<b\n</thinks想\n</think>\n\n说</think>", ("想<b\n</thinks想", "说</think>")),
    (False, "就说<think>", ("", "就说<think>")),
    (False, "<th", ("", "<th")),
    (False, "\n<think>没完</th", ("没完</th", "")),
    (True, "想\n</think>\n\n说", ("想", "说")),
    (True, "没完", ("没完", "")),
    (False, "<think>想</think>\n", ("想", "")),
])  # fmt: skip
def test_folder_whatever_the_pieces(opened: bool, text: str, parts: tuple[str, str]) -> None:
    draw = random.Random(1)
    for _ in range(50):
        cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randrange(6)))
        folder = ThoughtFolder(FRAME._replace(opened=opened))
        said = [folder.add(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        said.append(folder.add("", last=True))
        thought, answer = map("".join, zip(*said, strict=True))
        assert (thought, answer) == parts


def thinking(tokenizer: Any, template: str) -> Chat:
    return chat_of(tokenizer, MARK + template)


def sample_text(chat: Chat, *talk: str) -> str:
    (sample,) = chat.samples(Dialogue("", say(*talk)), 1000)
    return rendered(chat, sample)


THOUGHT = join_thought("先想", "答")


def test_thoughts_are_learnt_behind_a_prompt_that_begins_one(tokenizer: Any) -> None:
    """The template leaves them out of answers; what the model is asked in use is what it was trained on."""
    chat = thinking(tokenizer, THINKING)
    assert sample_text(chat, "问", THOUGHT) == "<|user|>问<|bot|><think>\n>>>先想\n</think>\n\n答<|end|><<<"
    assert sample_text(chat, "问", "答") == "<|user|>问<|bot|><think>\n>>>\n</think>\n\n答<|end|><<<"
    assert chat.tokenizer.decode(chat.prompt_ids(say("问"))) == "<|user|>问<|bot|><think>\n"
    published = chat.tokenizer.apply_chat_template(say("问"), tokenize=False, add_generation_prompt=True)
    assert published == "<|user|>问<|bot|><think>\n"
    assert chat.said("先想\n</think>\n\n答") == "答"
    first, second = chat.samples(Dialogue("", say("问", THOUGHT, "再问", "再答")), 1000)
    assert rendered(chat, second).startswith("<|user|>问<|bot|>答<|end|><|user|>再问<|bot|><think>\n>>>")


def test_thoughts_are_learnt_as_the_template_writes_them(tokenizer: Any) -> None:
    """Qwen3's writes them before the last answer, an empty one too; the text is what the template itself writes."""
    chat = thinking(tokenizer, QWEN3)
    text = sample_text(chat, "问", THOUGHT)
    learnt = ">>><think>\n先想\n</think>\n\n答<|im_end|><<<"
    assert text == f"<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n{learnt}"
    whole = chat.tokenizer.apply_chat_template(say("问", THOUGHT), tokenize=False)
    assert whole == text.replace(">>>", "").replace("<<<", "") + "\n"
    assert sample_text(chat, "问", "答").endswith(">>><think>\n\n</think>\n\n答<|im_end|><<<")


def test_thoughts_without_a_form_in_the_template(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    other.chat_template = MARK + PLAIN_TEMPLATE
    complete_prompt(other)
    chat = make_chat(other)
    assert sample_text(chat, "问", THOUGHT).endswith(">>><think>\n先想\n</think>\n\n答</s><<<")
    assert sample_text(chat, "问", "答").endswith(">>>答</s><<<")
    assert chat.said("<think>\n先想\n</think>\n\n答") == chat.said("答") == "答"
    assert sample_text(chat, "问", join_thought("</s> 想", "答")).endswith(">>><think>\n</s> 想\n</think>\n\n答</s><<<")
    (sample,) = chat.samples(Dialogue("", say("问", join_thought("</s> 想", "答"))), 1000)
    assert [*sample.input_ids].count(other.eos_token_id) == 1, "a control token in a thought is plain text"


@pytest.mark.parametrize("template", [THINKING, QWEN3])
def test_thoughts_are_left_out(tokenizer: Any, template: str) -> None:
    chat = chat_of(tokenizer, template)
    assert sample_text(chat, "问", THOUGHT) == sample_text(chat, "问", "答")
    answers = Dialogue("", say("问"), [THOUGHT, "另答"])
    assert [rendered(chat, one).count("先想") for one in chat.samples(answers, 1000)] == [0, 0]
    assert chat.folder() is None and chat.said(" 答 ") == "答"


def test_an_empty_thought_of_another_form_than_the_prompts(tokenizer: Any) -> None:
    """Nemotron's: the prompt begins "<think>\\n", answers without a thought have "<think></think>"."""
    write = "{% set c = message['content'] %}{% if message.reasoning_content %}{% set t = '<think>\n' "
    write += "~ message.reasoning_content ~ '\n</think>\n' %}{% else %}{% set t = '<think></think>' %}{% endif %}"
    template = THINKING.replace("{% else %}{{ '<|bot|>' +", f"{{% else %}}{write}{{{{ '<|bot|>' + t +")
    chat = thinking(tokenizer, template)
    assert sample_text(chat, "问", THOUGHT) == "<|user|>问<|bot|><think>\n>>>先想\n</think>\n答<|end|><<<"
    assert sample_text(chat, "问", "答") == "<|user|>问<|bot|><think>\n>>>\n</think>\n答<|end|><<<"


def test_a_space_before_answers(tokenizer: Any) -> None:
    """Llama 2's form, whose space belongs to the answer's first token."""
    chat = thinking(tokenizer, "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>' + "
                    "message['content'] + '<|bot|>' }}{% else %}{{ ' ' + message['content'] + '<|end|>' }}{% endif %}"
                    "{% endfor %}")  # fmt: skip
    assert sample_text(chat, "问", THOUGHT) == "<|user|>问<|bot|>>>><think>\n先想\n</think>\n\n 答<|end|><<<"
    assert sample_text(chat, "问", "答") == "<|user|>问<|bot|>>>> 答<|end|><<<"


def test_thoughts_between_control_tokens_are_refused(tokenizer: Any) -> None:
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}{% else %}"
        "{% if message.thinking %}{{ '<|bot|><|channel|>' + message.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|bot|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|bot|>' }}{% endif %}"
    )
    with pytest.raises(DataError, match="--thoughts drop"):
        thinking(tokenizer, template)
    assert sample_text(chat_of(tokenizer, template), "问", THOUGHT) == "<|user|>问<|bot|>>>>答<|end|><<<"


def test_frames() -> None:
    """GLM's form: the prompt begins nothing, and answers without a thought have an empty one."""
    found = find_frame("Q<bot>", "Q<bot><think></think>\nA", "Q<bot><think>T</think>\nA", "T", "A", [])
    assert found == ThoughtFrame("<think>", "</think>\n", "<think></think>\n", opened=False)
    assert find_frame("Q<bot>", "Q<bot>A", "Q<bot>A", "T", "A", []) == FRAME


def test_records_with_thoughts() -> None:
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答", "reasoning_content": "先想"}]
    assert to_messages({"messages": turns}, thoughts=True) == say("问", THOUGHT)
    assert to_messages({"messages": turns}) == say("问", "答")
    row = {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "reasoning": "先想"}
    assert to_messages(row, thoughts=True) == say("问", THOUGHT) and to_messages(row) == say("问", "答")
    row = {"question": "问", "answer": "<think>先想</think>答", "reasoning": "别的"}
    assert split_thought(to_messages(row, thoughts=True)[1]["content"]) == ("先想", "答")
    assert to_messages({"question": "问", "answer": "答", "reasoning": None}, thoughts=True) == say("问", "答")


def test_the_template_says_whether_a_model_thinks(tokenizer: Any, tmp_path: Path) -> None:
    """What is saved says so to whoever loads it; a run without thoughts goes back to the template as it was."""
    tokenizer.save_pretrained(tmp_path)
    own = load_tokenizer(tmp_path).chat_template
    kept = load_tokenizer(tmp_path, thoughts="keep")
    assert kept.chat_template == MARK + own and thinks(kept.chat_template)
    kept.save_pretrained(tmp_path / "kept")
    assert make_chat(load_tokenizer(tmp_path / "kept")).frame == FRAME
    assert load_tokenizer(tmp_path / "kept", thoughts="keep").chat_template == kept.chat_template
    assert load_tokenizer(tmp_path / "kept", thoughts="drop").chat_template == own


def test_thoughts_that_are_left_out_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"question": "问", "answer": "答", "reasoning": "先想"}, {"question": "又问", "answer": "又答"}]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    left_out = load_samples(path, chat_of(tokenizer, QWEN3), 1000, tmp_path / "cache")
    assert left_out.counts == {"used": 2, "with thoughts, which are left out (--thoughts keep learns them)": 1}
    kept = load_samples(path, thinking(tokenizer, QWEN3), 1000, tmp_path / "cache")
    assert kept.counts == {"used": 2} and "先想" in tokenizer.decode(kept.samples[0].input_ids)
    assert not any("reasoning" in unused for unused in kept.taken.values())


def test_a_thought_alone_is_no_answer(tokenizer: Any) -> None:
    with pytest.raises(UnusableRecord, match="an empty assistant turn"):
        to_messages({"question": "问", "answer": "<think>先想</think>\n"})
    with pytest.raises(UnusableRecord, match="nothing but a thought"):
        chat_of(tokenizer, QWEN3).samples(Dialogue("", say("问"), ["<think>先想</think>", "答"]), 1000)
