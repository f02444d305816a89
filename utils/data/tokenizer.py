"""The tokenizer of a model, with a chat template, and what two tokenizers have in common."""

import json
import re
from datetime import date
from pathlib import Path
from typing import Any

from utils.data.chat import PLAIN_TEMPLATE, complete_prompt
from utils.data.records import DataError
from utils.data.thoughts import THINKING

SHOWN_CHARACTERS = 60
# Calls of what templates write today's date with.
DATES = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?:'([^']*)'|"([^"]*)")\s*\)""")
PINNED = re.compile(r'\{%- set run_date = "([0-9-]+)" -%\}')


def load_tokenizer(
    path: Path, chat_template: str = "", trust_remote_code: bool = False, thoughts: str | None = None
) -> Any:
    """Loads a tokenizer that has a chat template.

    Args:
        path: The model's folder.
        chat_template: A Jinja template to use instead of the tokenizer's own.
        trust_remote_code: Whether the model's own Python code may run.
        thoughts: "keep": the model is to be trained with thoughts, "drop": without; None: as the template says.

    Returns:
        A tokenizer; with the plain template where there is no other. Its prompts go up to where the text of an answer
        begins.

    Raises:
        ValueError: if the folder has a tokenizer's settings but not its vocabulary; transformers would go on without.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not tokenizer.encode("a", add_special_tokens=False):
        raise ValueError("the tokenizer has no vocabulary (is tokenizer.json missing?)")
    tokenizer.chat_template = chat_template or tokenizer.chat_template or PLAIN_TEMPLATE
    if thoughts and isinstance(tokenizer.chat_template, str):
        own = tokenizer.chat_template.replace(THINKING, "")
        tokenizer.chat_template = THINKING + own if thoughts == "keep" else own
    complete_prompt(tokenizer)
    return tokenizer


def pin_date(tokenizer: Any, day: date) -> None:
    """Lets a template that writes today's date write this day: what is trained is then what is used later.

    A macro of the same name stands before the function that templates call. Where the form of the date is no literal,
    it writes year, month and day.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or PINNED.match(template) or "strftime_now(" not in template:
        return
    forms = dict.fromkeys(one or other for one, other in DATES.findall(template))
    cases = "".join(
        f"format == {json.dumps(form)} -%}}{{{{ {json.dumps(day.strftime(form))} }}}}{{%- elif " for form in forms
    )
    macro = f"{{%- macro strftime_now(format) -%}}{{%- if {cases}true -%}}{day}{{%- endif -%}}{{%- endmacro +%}}"
    tokenizer.chat_template = f'{{%- set run_date = "{day}" -%}}{macro}{template}'  # The + keeps a line break after it.


def pinned_date(template: str) -> date | None:
    """The day that `pin_date` wrote into a template."""
    found = PINNED.match(template)
    return date.fromisoformat(found[1]) if found else None


def shared_vocabulary(student: Any, teacher: Any, texts: list[str], used: int) -> int:
    """How many tokens two tokenizers have in common, from the first one on.

    Models have more rows than tokens, and not equally many: rows of padding mean nothing, and would take probability.

    Args:
        student: Its tokenizer.
        teacher: Its tokenizer.
        texts: That both have to split into the same tokens.
        used: The largest token that is trained on, and 1.

    Raises:
        DataError: if they differ before one of them ends, in a token that is used, or in how they split a text.
    """

    def split(tokenizer: Any, text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    ours, theirs = ({id: token for token, id in tokenizer.get_vocab().items()} for tokenizer in (student, teacher))
    common = min(max(ours), max(theirs)) + 1
    differing = next((id for id in range(common) if ours.get(id) != theirs.get(id)), None)
    if differing is not None:
        what = f"token {differing} is {ours.get(differing)!r} here and {theirs.get(differing)!r} there"
    elif used > common:
        what = f"the data needs {used} tokens, both have {common}"
    elif text := next((text for text in texts if split(student, text) != split(teacher, text)), None):
        # With other merges, or more of them, the teacher knows other ways to write what the student writes.
        what = f"{text[:SHOWN_CHARACTERS]!r} becomes other tokens here than there"
    else:
        return common
    raise DataError(what)
