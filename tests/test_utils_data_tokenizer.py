"""utils/data/tokenizer.py: the template that a tokenizer gets, and which tokenizers have tokens in common.

python -m pytest tests/test_utils_data_tokenizer.py
"""

from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, example_texts, make_tokenizer, other_tokenizer

from utils.data.chat import PLAIN_TEMPLATE
from utils.data.records import DataError
from utils.data.tokenizer import load_tokenizer, pin_date, pinned_date, shared_vocabulary


def test_load_tokenizer_keeps_the_models_template(model_dir: Path) -> None:
    assert load_tokenizer(model_dir / "tiny/qwen2").chat_template == CHATML


def test_load_tokenizer_takes_another_template(model_dir: Path) -> None:
    assert load_tokenizer(model_dir / "tiny/qwen2", chat_template="{{ messages }}").chat_template == "{{ messages }}"


def test_load_tokenizer_of_a_base_model(tokenizer: Any, tmp_path: Path) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == PLAIN_TEMPLATE
    messages = [
        {"role": "system", "content": "设定"},
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答"},
    ]
    assert loaded.apply_chat_template(messages, tokenize=False) == (
        "设定\n\n### User:\n问\n\n### Assistant:\n答<|endoftext|>\n\n"
    )
    assert loaded.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True) == (
        "### User:\n问\n\n### Assistant:\n"
    )


def test_a_date_in_a_template_is_that_of_the_run(tokenizer: Any) -> None:
    """However it is written; transformers' own function writes today's."""
    import copy
    from datetime import date

    other, day = copy.deepcopy(tokenizer), date(2024, 2, 3)
    dated = "{{ 'Date: ' + strftime_now(\"%Y-%m-%d\") + ', ' + strftime_now('%d %b %Y') + '\n' }}"
    guarded = "{% if strftime_now is defined %}{{ strftime_now('%H') }}{% endif %}"
    other.chat_template = dated + CHATML + guarded
    messages = [{"role": "user", "content": "问"}]
    now = other.apply_chat_template(messages, tokenize=False)
    assert "2024-02-03" not in now
    pin_date(other, day)
    text = other.apply_chat_template(messages, tokenize=False)
    assert text == "Date: 2024-02-03, 03 Feb 2024\n" + tokenizer.apply_chat_template(messages, tokenize=False) + "00"
    pin_date(other, date(2025, 1, 1))  # A run that goes on keeps its day.
    assert other.apply_chat_template(messages, tokenize=False) == text
    assert pinned_date(other.chat_template) == day and pinned_date(dated) is None
    forms = ("strftime_now('%d ')", "strftime_now(format='%Y')", "'|'", "strftime_now('%' + 'm')")
    other.chat_template = "\n " + "".join(f"{{{{ {form} }}}}" for form in forms)
    as_it_was = "\n 03 2024|2024-02-03"
    pin_date(other, day)
    assert other.apply_chat_template(messages, tokenize=False) == as_it_was, "space stays, other forms are a date"
    undated = copy.deepcopy(tokenizer)
    pin_date(undated, day)
    assert undated.chat_template == tokenizer.chat_template


def test_tokenizers_with_further_tokens_go_together() -> None:
    one, other = make_tokenizer(), make_tokenizer()
    texts = [*example_texts()[:50], "<|im_start|>user\n好<|im_end|>"]
    assert shared_vocabulary(one, other, texts, 10) == len(one)
    other.add_tokens(["<|image|>", "<|tool|>"])
    for left, right in ((one, other), (other, one)):
        assert shared_vocabulary(left, right, texts, 10) == len(one)
    with pytest.raises(DataError, match="the data needs"):
        shared_vocabulary(other, one, texts, len(other))


def test_a_teacher_that_knows_more_of_the_same_words_is_refused() -> None:
    """Its first tokens are the student's, but it writes the text with the ones after them."""
    with pytest.raises(DataError, match="becomes other tokens here than there"):
        shared_vocabulary(make_tokenizer(400), make_tokenizer(800), example_texts()[:50], 10)


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(DataError, match="token .* is '.' here and '.' there"):
        shared_vocabulary(make_tokenizer(), other_tokenizer(), [], 10)
