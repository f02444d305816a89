"""Tokenizer and chat template on vLLM: conversations become the tokens that they were in training."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from utils.data.chat import Chat, make_chat
from utils.data.records import Message
from utils.files import explained, shown

# Characters that no text has, around control tokens that users typed; those that transformers 5.23 puts there.
MARKS = ("\U000f0000", "\U000f0001")


def make_renderer(settings: Any, first: Any) -> Chat:
    """Loads the tokenizer and chat template, and lets vLLM's own routes take the same tokenizer and settings.

    Args:
        settings: vLLM's namespace.
        first: What is known of the first adapter's training, or of the model's.

    Raises:
        SystemExit: if there is none that can be used.
    """
    from vllm.renderers.chat_utils import load_chat_template

    from utils.data.tokenizer import load_tokenizer

    if settings.tokenizer is None:
        own = first.adapter is not None and (first.adapter / "tokenizer_config.json").is_file()
        settings.tokenizer = str(first.adapter) if own else settings.model
    with explained(f"The tokenizer in {shown(settings.tokenizer)} cannot be used"):
        template = load_chat_template(settings.chat_template) or first.chat_template
        tokenizer = load_tokenizer(Path(settings.tokenizer), template, settings.trust_remote_code)
        if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
            tokenizer.apply_chat_template = partial(typed_as_text, tokenizer)
        chat = make_chat(tokenizer)
    settings.default_chat_template_kwargs = {
        # As utils/data/records.py renders.
        "enable_thinking": False,
        "add_bos_token": tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id],
    } | (settings.default_chat_template_kwargs or {})
    return chat


def typed_as_text(
    tokenizer: Any, messages: list[Message], sanitize_control_tokens: bool = False, **options: Any
) -> Any:
    """`apply_chat_template` with an option that vLLM's transformers does not know, and would go on without.

    Args:
        tokenizer: A fast one.
        messages: The conversation.
        sanitize_control_tokens: Whether control tokens in the messages are encoded as the plain text they are, to the
            tokens that transformers 5.23 makes of them in training.
        **options: As of transformers.
    """
    apply = partial(type(tokenizer).apply_chat_template, tokenizer)
    if not sanitize_control_tokens:
        return apply(messages, **options)
    control = control_tokens(tokenizer)
    pattern = "|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)"
    begin, end = MARKS

    def marked(text: str) -> str:
        return re.sub(pattern, f"{begin}\\g<0>{end}", text.replace(begin, "").replace(end, ""))

    text = apply(
        [{**message, "content": marked(message["content"])} for message in messages], **options | {"tokenize": False}
    )
    # Text and typed control tokens by turns; None where a template parted a mark from its token.
    parts = re.split(f"{begin}({pattern}){end}|[{begin}{end}]", text)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    ids = encode(parts[0])
    for number, part in enumerate(parts[1:], start=1):
        if part:
            ids += _amid(part, partial(_as_text, tokenizer) if number % 2 else encode, encode("\n"))
    return {"input_ids": ids}


def control_tokens(tokenizer: Any) -> list[str]:
    """The tokens that steer a conversation: special ones, and others that the chat template writes itself."""
    import jinja2.nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = tokenizer.get_chat_template()
    tree = _compile_jinja_template(template).environment.parse(template)
    written = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    written += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (not token.content.isspace() and any(token.content in text for text in written))
    ]


def _as_text(tokenizer: Any, text: str) -> list[int]:
    """Encodes without any added token."""
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def _amid(text: str, encode: Callable[[str], list[int]], line_break: list[int]) -> list[int]:
    """Encodes what stands amid other text: after a line break, as some tokenizers add a space where a text begins."""
    ids = encode("\n" + text)
    return ids[len(line_break) :] if ids[: len(line_break)] == line_break else encode(text)
