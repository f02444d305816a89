"""utils/data/chat.py: what a model sees is what the template says, whoever wrote the text, and only answers are learnt.

python -m pytest tests/test_utils_data_chat.py
"""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import CHATML
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken

from utils.data.chat import PLAIN_TEMPLATE, Chat, Dialogue, complete_prompt, make_chat, show_sample
from utils.data.records import SYSTEM_PROMPT, DataError, UnusableRecord, comment_prompt

Messages = list[dict[str, str]]

# Templates in the manner of well-known models.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set talk = messages[1:] %}{% set brief = messages[0]['content'] %}"
    "{% else %}{% set talk = messages %}{% set brief = '' %}{% endif %}"
    "{% for message in talk %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' }}{% if loop.first and brief %}{{ '<<SYS>>\n' + brief + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('not by turns') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Ignores system texts without a word.
SILENT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts are written for the last answer only, and cut out of earlier ones.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
NO_END = (
    "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "gemma": GEMMA,
    "silent": SILENT,
    "qwen3": QWEN3,
    "plain": PLAIN_TEMPLATE,
    "no_end": NO_END,
}
FOLDING = ("gemma", "silent")
# How an answer ends, and whether the template itself writes it.
STOPS = {"llama2": "</s>", "gemma": "<end_of_turn>", "plain": "</s>", "no_end": "</s>"}


@pytest.fixture(scope="module")
def chats(tokenizer: Any) -> dict[str, Chat]:
    """A chat of every kind of template."""
    found = {}
    for name, template in TEMPLATES.items():
        other = copy.deepcopy(tokenizer)
        if name in STOPS:
            other.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        if name == "gemma":
            other.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
        if name == "qwen3":
            other.add_tokens(["<think>", "</think>"])  # Added, but not special, as Qwen3 has them.
        other.chat_template = template
        found[name] = make_chat(other)
    return found


def say(*contents: str, system: str = "") -> Messages:
    """Messages of user and assistant in turn."""
    talk = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *talk] if system else talk


def folded(messages: Messages) -> Messages:
    """The system text before the first question."""
    if messages[0]["role"] != "system":
        return messages
    brief, first, *rest = messages
    return [{"role": "user", "content": brief["content"] + "\n\n" + first["content"]}, *rest]


def template_text(chat: Chat, name: str, messages: Messages, **options: Any) -> str:
    """What the tokenizer's own template writes, as text."""
    messages = folded(messages) if name in FOLDING else messages
    return chat.tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options)


def supervised_text(chat: Chat, ids: Any, supervised: Any) -> list[str]:
    """The runs of supervised tokens as texts."""
    runs: list[list[int]] = []
    for place, learnt in enumerate(supervised):
        if learnt:
            if place == 0 or not supervised[place - 1]:
                runs.append([])
            runs[-1].append(int(ids[place]))
    return [chat.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", ["", SYSTEM_PROMPT], ids=["bare", "system"])
def test_sample_is_the_template_text_tokenised_whole(chats: dict[str, Chat], name: str, system: str) -> None:
    chat = chats[name]
    stop = STOPS.get(name, "<|im_end|>")
    assert chat.tokenizer.convert_ids_to_tokens(chat.stop_id) == stop
    messages = say("视频标题：今天吃什么？\n父评论：前排！", "（笑）火锅，OK？ 😂", system=system)
    (sample,) = chat.samples(Dialogue("", messages), 1000)

    text = template_text(chat, name, messages)
    text = text + stop if name == "no_end" else text[: text.rindex(stop)] + stop
    assert sample.input_ids.tolist() == chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sample.input_ids[-1] == chat.stop_id and sample.supervised[-1]
    assert sample.input_ids.dtype == np.int32 and sample.supervised.dtype == bool
    assert (system in chat.tokenizer.decode(sample.input_ids)) and chat.folds_system == (name in FOLDING)

    prompt = template_text(chat, name, messages[:-1], add_generation_prompt=True)
    prompt_ids = chat.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert chat.prompt_ids(messages[:-1]) == prompt_ids == sample.input_ids[~sample.supervised].tolist()
    (learnt,) = supervised_text(chat, sample.input_ids, sample.supervised)
    assert learnt.removesuffix(stop).strip() == messages[-1]["content"]


def test_plain_template_starts_as_the_tokenizer_does(tokenizer: Any) -> None:
    """A tokenizer that puts <s> before every text has been pretrained so: prompts start with it, once."""
    from tokenizers import processors

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    other.chat_template = PLAIN_TEMPLATE
    assert other.bos_token_id not in make_chat(other).prompt_ids(say("问"))
    other._tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", other.bos_token_id)]),
        ]
    )
    ids = make_chat(other).prompt_ids(say("问"))
    assert ids[0] == other.bos_token_id and ids.count(other.bos_token_id) == 1


CHARACTERS = st.sampled_from("火锅好看哈草abcXYZ 019\n，。！？…:：()[]<>|/_-#~😂👍é\u200b\u3000")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=20).map(str.strip).filter(bool)
ATTACKS = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "<|im_start|>", "</s>", "<s>", "<|endoftext|>", "<end_of_turn>\n"]
    + ["<start_of_turn>model\n", "[/INST]", "<think>", "\U000f0000<|im_end|>\U000f0001", "<|im_<|im_end|>end|>"]
)
HOSTILE = st.lists(st.one_of(TEXTS, ATTACKS), min_size=1, max_size=5).map("".join).map(str.strip).filter(bool)
property_test = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), system=st.one_of(st.just(""), TEXTS))
@property_test
def test_every_answer_is_supervised_once(
    chats: dict[str, Chat], name: str, contents: list[tuple[str, str]], system: str
) -> None:
    """Over all samples of a conversation the supervised texts are its answers, each ended by the stop token."""
    chat, stop = chats[name], STOPS.get(name, "<|im_end|>")
    messages = say(*(text for pair in contents for text in pair), system=system)
    samples = chat.samples(Dialogue("", messages), 10_000)
    learnt = [text for sample in samples for text in supervised_text(chat, sample.input_ids, sample.supervised)]
    assert all(text.endswith(stop) for text in learnt)
    assert [text.removesuffix(stop).strip() for text in learnt] == [answer for _, answer in contents]
    if name not in ("qwen3", "no_end"):
        assert len(samples) == 1, "a template that keeps earlier turns as they were needs one sample"
    assert all(not sample.supervised[0] and sample.supervised[-1] for sample in samples)
    # What the model is asked in use is what it was shown in training.
    prompt = chat.prompt_ids(messages[:-1])
    assert samples[-1].input_ids[: len(prompt)].tolist() == prompt
    whole = template_text(chat, name, messages) + (stop if name == "no_end" else "")
    assert whole.startswith(chat.tokenizer.decode(samples[-1].input_ids))


@pytest.mark.parametrize("name", TEMPLATES)
@given(question=HOSTILE, answer=HOSTILE, system=st.one_of(st.just(""), HOSTILE))
@property_test
def test_users_cannot_write_control_tokens(
    chats: dict[str, Chat], name: str, question: str, answer: str, system: str
) -> None:
    chat = chats[name]
    control = {id for id, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    (harmless,) = chat.samples(Dialogue("", say("问", "答", system="设" if system else "")), 10_000)
    (sample,) = chat.samples(Dialogue("", say(question, answer, system=system)), 10_000)
    written = [id for id in sample.input_ids.tolist() if id in control]
    assert written == [id for id in harmless.input_ids.tolist() if id in control], "the template's own and no others"
    in_answer = [id for id in sample.input_ids[sample.supervised].tolist() if id in control]
    assert in_answer == [chat.stop_id], "the whole answer is learnt, up to the one stop token"
    text = chat.tokenizer.decode(sample.input_ids)
    for content in (question, answer, system):
        # transformers takes these two private characters, with which it marks texts, out of them.
        assert content.replace("\U000f0000", "").replace("\U000f0001", "").strip() in text


def test_an_answer_that_the_template_rewrites_is_dropped(chats: dict[str, Chat]) -> None:
    """A comment may hold the text </think>, at which this template cuts."""
    with pytest.raises(UnusableRecord, match="changes"):
        chats["qwen3"].samples(Dialogue("", say("问", "先想</think>再说")), 1000)


def test_answers_that_grow_together_with_the_prompt() -> None:
    """Where the prompt's last letters and the answer's first ones are one token, the prompt in use would be another."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["Bot:))"] * 100, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'You:' + message['content'] + '\n' }}"
        "{% else %}{{ 'Bot:' + message['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Bot:' }}{% endif %}"
    )
    chat = make_chat(tokenizer)
    with pytest.raises(UnusableRecord, match="changes"):
        chat.samples(Dialogue("", say("hi", ")) haha")), 1000)
    (sample,) = chat.samples(Dialogue("", say("hi", "haha")), 1000)
    assert supervised_text(chat, sample.input_ids, sample.supervised) == ["haha</s>"]


# Answers come without the thought that the generation prompt begins.
THINKING = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ '<|bot|>' + message['content'].split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bot|><think>\n' }}{% endif %}\n"
)
# A message is a list of parts.
PARTS = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# An answer begins with control tokens that say what kind of text it is.
CHANNELS = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + message['content'] }}"
    "{{ '<|end|>' if not loop.last or message['role'] == 'user' else '<|return|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


def chat_of(tokenizer: Any, template: str) -> Chat:
    marks = ["<|user|>", "<|bot|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>"]
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": marks})
    other.add_tokens(["<think>", "</think>"])
    other.chat_template = template
    complete_prompt(other)
    return make_chat(other)


def rendered(chat: Chat, sample: Any) -> str:
    return show_sample(sample, chat.tokenizer)


def test_a_thought_that_a_prompt_begins_ends_there(tokenizer: Any) -> None:
    """In the template, and so wherever it goes; earlier turns are written without it, in samples of their own."""
    chat, empty = chat_of(tokenizer, THINKING), "<think>\n\n</think>\n\n"
    first, second = chat.samples(Dialogue("", say("问", "答", "再问", "再答")), 1000)
    assert rendered(chat, first) == f"<|user|>问<|bot|>{empty}>>>答<|end|><<<"
    assert rendered(chat, second) == f"<|user|>问<|bot|>答<|end|><|user|>再问<|bot|>{empty}>>>再答<|end|><<<"
    in_use = chat.tokenizer.apply_chat_template(say("问"), tokenize=False, add_generation_prompt=True)
    assert in_use == f"<|user|>问<|bot|>{empty}"
    assert chat.tokenizer.decode(chat.prompt_ids(say("问"))) == in_use
    written = chat.tokenizer.apply_chat_template(say("问", "答"), tokenize=False)
    assert written == "<|user|>问<|bot|>答<|end|>"
    before = chat.tokenizer.chat_template
    complete_prompt(chat.tokenizer)
    assert chat.tokenizer.chat_template == before, "it is closed once"


@pytest.mark.parametrize("space", ["\n", "\n\n", ""])
def test_a_thought_that_answers_begin_with_ends_as_in_them(tokenizer: Any, space: str) -> None:
    """The template writes an empty thought before an answer, in its own way."""
    before = f"<|bot|><think>\n\n</think>{space}".replace("\n", "\\n")
    template = THINKING.replace("'<|bot|>' + message", f"'{before}' + message")
    chat = chat_of(tokenizer, template)
    (sample,) = chat.samples(Dialogue("", say("问", "答")), 1000)
    assert rendered(chat, sample) == f"<|user|>问<|bot|><think>\n\n</think>{space}>>>答<|end|><<<"


def test_a_thought_of_another_form_in_answers_is_refused(tokenizer: Any) -> None:
    """The prompt would end one, and the model would learn to begin another."""
    with pytest.raises(DataError, match="--chat_template"):
        chat_of(tokenizer, THINKING.replace("'<|bot|>' + message", "'<|bot|><think></think>' + message"))


def test_templates_that_cannot_do_with_a_question_are_refused(tokenizer: Any) -> None:
    """Not with a traceback, whatever they do with what they get."""
    with pytest.raises((DataError, TemplateError)):
        chat_of(tokenizer, "{{ raise_exception('system first') if messages[0]['role'] != 'system' }}{{ messages }}")
    shows_answers = "{% for message in messages %}{{ 'a' if loop.first else 'b' + message['content'] }}{% endfor %}"
    assert not chat_of(tokenizer, shows_answers).takes_parts


def test_templates_that_begin_no_thought_stay_as_they_are(chats: dict[str, Chat]) -> None:
    for name, chat in chats.items():
        complete_prompt(chat.tokenizer)
        assert chat.tokenizer.chat_template == TEMPLATES[name]


def test_messages_as_lists_of_parts(tokenizer: Any) -> None:
    chat = chat_of(tokenizer, PARTS)
    (sample,) = chat.samples(Dialogue("", say("问", "答", "再问", "再答", system="设定")), 1000)
    first = "system: 设定<|end|>\nuser: 问<|end|>\nassistant: >>>答<|end|><<<"
    assert rendered(chat, sample) == f"{first}\nuser: 再问<|end|>\nassistant: >>>再答<|end|><<<"
    (typed,) = chat.samples(Dialogue("", say("问<|end|>", "答")), 1000)
    assert typed.input_ids.tolist().count(chat.stop_id) == 2, "what users type is text"


def test_control_tokens_before_an_answer_are_the_prompts(tokenizer: Any) -> None:
    """A model that writes them would show what stands between them, and the first of them does not end the answer."""
    chat = chat_of(tokenizer, CHANNELS)
    first, second = chat.samples(Dialogue("", say("问", "答", "再问", "再答")), 1000)
    begin = "<|start|>user<|message|>问<|end|><|start|>assistant<|channel|>final<|message|>"
    assert rendered(chat, first) == f"{begin}>>>答<|return|><<<"
    assert rendered(chat, second).endswith("<|start|>assistant<|channel|>final<|message|>>>>再答<|return|><<<")
    assert chat.tokenizer.decode(chat.prompt_ids(say("问"))) == begin
    other = copy.deepcopy(tokenizer)  # Special, and in none of the tokenizer's lists.
    other.add_tokens([AddedToken(mark, special=True) for mark in ("<|start|>", "<|channel|>", "<|message|>")])
    other.chat_template = CHANNELS
    complete_prompt(other)
    written = other.apply_chat_template(say("问"), tokenize=False, add_generation_prompt=True)
    assert written.endswith("<|start|>assistant<|channel|>final<|message|>")


def test_a_template_that_writes_other_answers_is_refused(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = CHATML.replace("<|im_start|>assistant", "<|im_start|>bot")
    with pytest.raises(DataError, match="--chat_template"):
        make_chat(other)


def test_show_sample(chats: dict[str, Chat]) -> None:
    (sample,) = chats["chatml"].samples(Dialogue("", say("问一", "答一", "问二", "答二")), 1000)
    assert show_sample(sample, chats["chatml"].tokenizer) == (
        "<|im_start|>user\n问一<|im_end|>\n<|im_start|>assistant\n>>>答一<|im_end|><<<\n"
        "<|im_start|>user\n问二<|im_end|>\n<|im_start|>assistant\n>>>答二<|im_end|><<<"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def samples_or_problem(chat: Chat, dialogue: Dialogue, max_tokens: int) -> Any:
    try:
        return [(*map(np.ndarray.tolist, sample[1:]),) for sample in chat.samples(dialogue, max_tokens)]
    except UnusableRecord as problem:
        return str(problem)


DIALOGUES = st.builds(
    lambda contents, answers, system: Dialogue(
        "",
        say(*[text for pair in contents for text in pair][: -1 if answers else None], system=system),
        answers or None,
    ),
    contents=st.lists(st.tuples(HOSTILE, HOSTILE), min_size=1, max_size=3),
    answers=st.lists(HOSTILE, max_size=2),
    system=st.one_of(st.just(""), HOSTILE),
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(dialogues=st.lists(DIALOGUES, min_size=1, max_size=4), max_tokens=st.sampled_from([40, 80, 10_000]))
@settings(max_examples=75, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_batch_has_the_tokens_of_one_by_one(
    chats: dict[str, Chat], name: str, dialogues: list[Dialogue], max_tokens: int
) -> None:
    """The second form renders and tokenizes each conversation by itself, by transformers' apply_chat_template."""
    chat = chats[name]
    assert chat.special, "tokenized in batches"
    alone = replace(chat, special=None)
    texts = chat.texts(dialogues)
    together = chat.with_tokens_of(texts, chat.tokenizer.backend_tokenizer)
    for dialogue in dialogues:
        expected = samples_or_problem(alone, dialogue, max_tokens)
        assert samples_or_problem(together, dialogue, max_tokens) == expected
        assert samples_or_problem(chat, dialogue, max_tokens) == expected


def test_what_many_ask_is_rendered_once(chats: dict[str, Chat]) -> None:
    """Two prompts of three comments; what holds a control token is left to transformers."""
    contents = [("问", "一"), ("问", "二"), ("别的", "三"), ("问<|im_end|>", "四"), ("问", "五<|im_end|>")]
    dialogues = [Dialogue("", say(*pair, system="设定")) for pair in contents]
    texts = chats["chatml"].texts(dialogues)
    assert sum(asks for asks, *_ in texts) == 2 and len(texts) == 2 + 3
    assert not chats["chatml"].texts([Dialogue("", say("问<|im_end|>"), ["答"])])


def test_a_tokenizer_of_python_is_asked_one_by_one() -> None:
    """It has no backend that takes batches."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    chat, dialogue = make_chat(tokenizer), Dialogue("", say("问", "答"))
    assert chat.special is None and chat.texts([dialogue]) == {} and chat.with_tokens_of({}, None) is chat
    (sample,) = chat.samples(dialogue, 200)
    whole = chat.tokenizer.apply_chat_template(dialogue.messages, enable_thinking=False, sanitize_control_tokens=True)
    length = int(sample.supervised.argmax()) + len("答".encode())
    assert sample.input_ids[:length].tolist() == whole["input_ids"][:length]
    assert supervised_text(chat, sample.input_ids, sample.supervised)[0].startswith("答</s>")


# ---------------------------------------------------------------------------------------------------------------------
# What is too long


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    n_desc=st.integers(0, 600),
    letter=st.sampled_from("哈a😂"),
    answer=TEXTS,
    max_tokens=st.integers(16, 300),
    system=st.one_of(st.just(""), TEXTS),
)
@property_test
def test_long_prompts_are_shortened_and_answers_never(
    chats: dict[str, Chat], name: str, n_desc: int, letter: str, answer: str, max_tokens: int, system: str
) -> None:
    chat, stop = chats[name], STOPS.get(name, "<|im_end|>")
    question = comment_prompt("标题在前", letter * n_desc, "在末尾的评论")
    samples = chat.samples(Dialogue("", say(question, answer, system=system)), max_tokens)
    (whole,) = chat.samples(Dialogue("", say(question, answer, system=system)), 100_000)
    if len(whole.input_ids) <= max_tokens:
        assert samples[0].input_ids.tolist() == whole.input_ids.tolist()
        return
    # A bare question of the first and the last four letters is the shortest that is tried.
    (bare,) = chat.samples(Dialogue("", say(f"{question[:4]}…{question[-4:]}", answer, system=system)), 100_000)
    assert len(samples) == (len(bare.input_ids) <= max_tokens)
    for sample in samples:
        assert len(sample.input_ids) <= max_tokens
        (learnt,) = supervised_text(chat, sample.input_ids, sample.supervised)
        assert learnt.removesuffix(stop).strip() == answer and learnt.endswith(stop)
        text = chat.tokenizer.decode(sample.input_ids)
        assert question[:4] in text and "末尾的评论"[-4:] in text and (system in text)


def test_shortening_wastes_little(chats: dict[str, Chat]) -> None:
    """Room that is there is used: at least four fifths of it, whatever the letters cost."""
    for letter in "哈a😂":
        (sample,) = chats["chatml"].samples(Dialogue("", say(comment_prompt("标题", letter * 3000, "评论"), "答")), 400)
        assert 320 <= len(sample.input_ids) <= 400, letter


@pytest.mark.parametrize("name", TEMPLATES)
def test_long_conversations_lose_their_beginning(chats: dict[str, Chat], name: str) -> None:
    chat, stop = chats[name], STOPS.get(name, "<|im_end|>")
    exchanges = [text for n in range(10) for text in (f"第{n}问" + "哈" * 20, f"第{n}答")]
    samples = chat.samples(Dialogue("", say(*exchanges, system="设定")), 200)
    learnt = [text for sample in samples for text in supervised_text(chat, sample.input_ids, sample.supervised)]
    assert [text.removesuffix(stop).strip() for text in learnt] == exchanges[1::2]
    assert all(len(sample.input_ids) <= 200 for sample in samples)
    last = chat.tokenizer.decode(samples[-1].input_ids)
    assert "设定" in last and "第9问" in last and "第8问" in last and "第0问" not in last
