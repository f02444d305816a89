"""utils/export/gguf_tokenizer.py: llama.cpp splits text as the tokenizer does, Ollama's template writes the same.

python -m pytest tests/test_utils_export_gguf_tokenizer.py
"""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from conftest import CHATML, example_texts, llama_cpp, make_model, make_tokenizer, sp_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from utils.data import vocabulary
from utils.data.chat import PLAIN_TEMPLATE, Chat, make_chat
from utils.export.gguf_file import write_gguf
from utils.export.gguf_tokenizer import WORDS, WORDS_WITH_MARKS, go_template, modelfile

ODD_TEXTS = [
    *("", " ", "   ", "a", "\n", "a\r\nb\rc", "   x   y", " 两 个  空格\n\n\n换行\t制表 ", "▁ 下划线 ▁▁x"),
    *("123456 1,234.5 第12集", "don't I'LL we'Ve 's", "<0x41> <unk> <s>", "ｆｕｌｌ　ｗｉｄｔｈ…——！？"),
    *("😀👨‍👩‍👧 emoji 🇨🇳", "ÄÖÜ ñ é ø", "한국어 ไทย العربية", "हिन्दी कि"),
]
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


# Its system text goes to the last question, wherever that stands.
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def byte_tokenizer(*before: Any, digits: bool = False, whole: bool = False, normalizer: Any = None) -> Any:
    """A byte-level BPE tokenizer with other steps before the bytes."""
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    backend.normalizer = normalizer
    split = isinstance(before[0], pre_tokenizers.Split) if before else False
    steps = [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if before else steps[0]
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([*example_texts(), *ODD_TEXTS * 3], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def piece_tokenizer(normalizer: Any = None, before: Any = None, all_pairs: bool = True) -> Any:
    """A tokenizer of sentencepiece's kind: spaces are a letter, unknown letters are bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = normalizer, before
    # Too small an alphabet for all letters of the texts.
    trainer = trainers.BpeTrainer(vocab_size=700, limit_alphabet=400, max_token_length=8, show_progress=False)
    trained.train_from_iterator(example_texts(), trainer)
    model = json.loads(trained.to_str())["model"]
    bytes_as_text = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_as_text, *sorted(model["vocab"], key=model["vocab"].get)]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    # Sentencepiece merges any two pieces that make a third, the thirds in their order.
    merges = [(token[:cut], token[cut:]) for token in tokens[259:] for cut in range(1, len(token))]
    merges = [(left, right) for left, right in merges if left in vocabulary and right in vocabulary]
    if not all_pairs:
        merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer, backend.pre_tokenizer = normalizer, before
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = LLAMA2
    return tokenizer


def words(digits: str) -> Any:
    """Splits words as Qwen 2 and Llama 3 do, which differ in how many digits go together."""
    return pre_tokenizers.Split(Regex(WORDS % digits), "isolated")


def with_added(tokenizer: Any) -> Any:
    """A tokenizer with words that are found before anything is merged."""
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("[doge]", "一个", "▁▁")])
    return tokenizer


def with_chinese(tokenizer: Any) -> Any:
    """A tokenizer with more tokens for Chinese, as merge_tokenizer.py adds them."""
    backend, first_id = json.loads(tokenizer.backend_tokenizer.to_str()), len(tokenizer)
    if vocabulary.kind_of(backend) == "byte-level":
        found = vocabulary.learn_merges(backend, example_texts(), 500)
    else:
        known = backend["model"]["vocab"]
        found = vocabulary.with_merges(vocabulary.pieces_of(sp_model(example_texts(), 1600), known, True), known)
    extension = vocabulary.reachable(backend, found, first_id)
    assert len(extension.tokens) > 200
    merged = vocabulary.merged_backend(backend, extension, first_id)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(merged))
    return tokenizer


SPACES = normalizers.Replace(" ", "▁")


TOKENIZERS = {
    "gpt-2": lambda: byte_tokenizer(),
    "qwen2": lambda: byte_tokenizer(words(""), normalizer=normalizers.NFC()),
    "qwen35": lambda: byte_tokenizer(pre_tokenizers.Split(Regex(WORDS_WITH_MARKS), "isolated")),
    "llama-bpe": lambda: byte_tokenizer(words("{1,3}"), whole=True),
    "dbrx": lambda: byte_tokenizer(words("{1,3}")),
    "smollm": lambda: byte_tokenizer(pre_tokenizers.Digits(individual_digits=True)),
    "gemma": lambda: piece_tokenizer(SPACES, pre_tokenizers.Split(" ", "merged_with_previous")),
    "added": lambda: with_added(piece_tokenizer(SPACES)),
    "added bytes": lambda: with_added(byte_tokenizer()),
    "llama 2": lambda: piece_tokenizer(normalizers.Sequence([normalizers.Prepend("▁"), SPACES])),
    "mistral": lambda: piece_tokenizer(None, pre_tokenizers.Metaspace("▁", "first", split=False)),
    "more Chinese": lambda: with_chinese(byte_tokenizer(words(""), normalizer=normalizers.NFC())),
    "more pieces": lambda: with_chinese(piece_tokenizer(normalizers.Sequence([normalizers.Prepend("▁"), SPACES]))),
    "always": lambda: piece_tokenizer(None, pre_tokenizers.Metaspace("▁", "always", split=False)),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path: Path, name: str) -> None:
    """Plain texts, and rendered chats, which the server renders itself."""
    tokenizer = TOKENIZERS[name]()
    chat = make_chat(tokenizer)
    make_model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", chat, "bf16", "test", tmp_path / "model.gguf")
    texts = [*example_texts()[:100], *ODD_TEXTS]
    talks = [
        [{"role": "user", "content": "视频标题：自制红烧肉 2024"}],
        [{"role": "system", "content": "B站用户"}, {"role": "user", "content": "title  2 \n父评论：好"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "好吃"}, {"role": "user", "content": "b"}],
    ]
    # A space that stands only at a text's very beginning is not there after the control token of a prompt.
    with llama_cpp(tmp_path / "model.gguf") as ask:
        if name != "mistral":
            for text in (text for text in texts if name != "always" or not text.startswith((" ", "▁"))):
                found = ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]
                assert found == tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), text
        for talk in talks:
            rendered = ask("/apply-template", messages=talk)["prompt"]
            found = ask("/tokenize", content=rendered, add_special=True, parse_special=True)["tokens"]
            assert found == chat.prompt_ids(talk)


def test_other_tokenizers_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    """Those that llama.cpp has no name for, or would treat in another way."""
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0))
    stripped = byte_tokenizer()
    stripped.add_tokens([AddedToken("<x>", lstrip=True)])
    refused = {
        "none of the kind BPE": PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="b"),
        "does not split text": byte_tokenizer(pre_tokenizers.Split(Regex(r"\d+"), "isolated")),
        "does not split text as this": byte_tokenizer(normalizer=normalizers.Lowercase()),
        "Punctuation": piece_tokenizer(SPACES, pre_tokenizers.Punctuation()),
        "Lowercase": piece_tokenizer(normalizers.Sequence([normalizers.Lowercase(), SPACES])),
        "order in which": piece_tokenizer(SPACES, all_pairs=False),
        "spaces around '<x>'": stripped,
    }
    normalized = piece_tokenizer(SPACES)
    normalized.add_tokens(["<td>"])
    always = piece_tokenizer(None, pre_tokenizers.Metaspace("▁", "always", split=False))
    always.add_tokens([AddedToken("<td>", normalized=False)])
    refused |= {"looks for '<td>' before": normalized, "a space after '<td>'": always}
    make_model("llama", 1000).save_pretrained(tmp_path / "model")
    for reason, other in refused.items():
        other.chat_template = PLAIN_TEMPLATE
        with pytest.raises(ValueError, match=reason):
            chat = Chat(other, folds_system=False, stop_id=other.eos_token_id, writes_stop=True)
            write_gguf(tmp_path / "model", chat, "bf16", "test", tmp_path / "model.gguf")


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Renders a template of Ollama's as far as ours go, translated to Jinja construct by construct."""
    pairs = {
        r'{{ \$before := "" }}': '{% set ns = namespace(before="") %}',
        r"{{ range \.Messages }}": "{% for m in messages %}",
        r'{{ if eq \.Role ("\w+") }}': r"{% if m.role == \1 %}",
        r'{{ else if eq \.Role ("\w+") }}': r"{% elif m.role == \1 %}",
        r'{{ else if eq \$before ("\w*") }}': r"{% elif ns.before == \1 %}",
        r'{{ if ne \$before ("\w+") }}': r"{% if ns.before != \1 %}",
        r"{{ else }}": "{% else %}",
        r"{{ \.Content }}": "{{ m.content }}",
        r"{{ \$before = \.Role }}{{ end }}": "{% set ns.before = m.role %}{% endfor %}",
        r"{{ end }}": "{% endif %}",
    }
    for pattern, translated in pairs.items():
        template = re.sub(pattern, translated, template)
    return jinja2.Template(template, keep_trailing_newline=True).render(messages=messages)


OWN_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are.<|im_end|>\n' }}{% endif %}"
QUOTES = (
    "{% for m in messages %}{{ '\"\"\"\\\\' + m.role + '{{\t' + m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\"\"\"\\\\assistant{{\t' }}{% endif %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "plain": PLAIN_TEMPLATE,
    "Llama 2": LLAMA2,
    "of all": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "a system text of its own": OWN_SYSTEM + CHATML,
    "no system": CHATML.replace("in messages %}", "in messages if message.role != 'system' %}"),
    "quotes": QUOTES,
    "names": CHATML.replace("<|im_start|>' + ", "<TAIL><ANSWER>' + ").replace("<|im_start|>a", "<TAIL><ANSWER>a"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollamas_template_writes_what_the_chat_template_writes(name: str) -> None:
    """For conversations with and without a system text; the token that begins texts is left to llama.cpp."""
    tokenizer = piece_tokenizer(SPACES)
    tokenizer.chat_template = TEMPLATES[name]
    chat = make_chat(tokenizer)
    system, question = {"role": "system", "content": "B站 用户"}, {"role": "user", "content": "标题\n{{ x }}"}
    answer = {"role": "assistant", "content": "好 <b>"}
    for talk in ([question], [system, question], [question, answer, question], [system, question, answer, question]):
        assert go(go_template(chat), talk) == chat.prompt_text(talk).removeprefix("<s>"), talk
    assert '"""' not in go_template(chat)


def test_modelfile(tokenizer: Any) -> None:
    """What `ollama create` reads: the file, the template, what the model was trained with, and how to sample."""
    chat = make_chat(tokenizer)
    settings = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.1, eos_token_id=[0, 2])
    text = modelfile(chat, "a-q8_0.gguf", "你是B站用户。", settings)
    with pytest.raises(ValueError, match="three"):
        modelfile(chat, "a-q8_0.gguf", 'a """', settings)
    assert text.splitlines() == [
        "FROM ./a-q8_0.gguf",
        f'TEMPLATE """{go_template(chat)}"""',
        'SYSTEM """你是B站用户。"""',
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.8",
        "PARAMETER repeat_penalty 1.1",
    ]


def test_templates_that_depend_on_more_are_refused(tokenizer: Any) -> None:
    """Such as one that drops or repeats earlier turns."""
    for template in (
        CHATML.replace("for message in messages", "for message in messages[-1:]"),
        CHATML.replace("message['content'] +", "message['content'] * 2 +"),
        CHATML + "{{ messages | length }}",
        MISTRAL,
    ):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="its chat template"):
            go_template(Chat(tokenizer, folds_system=False, stop_id=2, writes_stop=True))
