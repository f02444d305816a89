"""Messages become token ids with labels through the tokenizer's chat template: one rendering for all stages.

Shapes: L tokens in a sample.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

from utils.data.records import DataError, Message, UnusableRecord
from utils.data.thoughts import (
    THOUGHTS,
    ThoughtFolder,
    ThoughtFrame,
    find_frame,
    split_thought,
    thinks,
    without_thoughts,
)

# For models that were published without a chat template (most base models). Every answer ends in the EOS token.
PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token and add_bos_token else '' }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{%- elif message['role'] == 'user' %}{{ '### User:\n' + message['content'] + '\n\n' }}"
    "{%- else %}{{ '### Assistant:\n' + message['content'] + eos_token + '\n\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '### Assistant:\n' }}{%- endif %}"
)

QUESTION = [{"role": "user", "content": "question"}]
THOUGHT = "what to say"
ANSWER = {"role": "assistant", "content": "answer"}

Key = tuple[Any, ...]


class Sample(NamedTuple):
    """A token sequence with the tokens that are to be learnt."""

    id: str  # The record's, or its place in the file.
    input_ids: np.ndarray  # (L,) int32
    supervised: np.ndarray  # (L,) bool; True where the token is part of an answer or its end.


class Dialogue(NamedTuple):
    """A record's conversation and the answers to learn."""

    id: str
    messages: list[Message]
    # Several answers to the messages, which then end with the user's turn; None to learn all answers in the messages.
    answers: list[str] | None = None

    def renderings(self) -> Iterator[tuple[list[Message], bool]]:
        """The conversations that are rendered for its samples, and whether each ends with a generation prompt."""
        if self.answers is not None:
            yield self.messages, True
            for answer in self.answers:
                yield [*self.messages, {"role": "assistant", "content": answer}], False
            return
        for end, message in enumerate(self.messages):
            if message["role"] == "assistant":
                yield self.messages[:end], True
                yield self.messages[: end + 1], False


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template: the one way from messages to token ids, in training and in use."""

    tokenizer: Any
    folds_system: bool  # The template knows no system role: its text goes before the first user's.
    stop_id: int  # The token that ends an answer.
    writes_stop: bool  # The template itself ends an answer so; otherwise the token is appended.
    takes_parts: bool = False  # The template takes a message as a list of parts, as those of images and text do.
    # By how much the prompt is longer than what stands before the text of an answer: the tokens of a thought in the
    # prompt, which the template leaves out of answers, less those of a thought before the answer.
    thought_tokens: int = 0
    unshared_tokens: int = 0  # At the prompt's end, where a thought begins otherwise than before an answer without one.
    frame: ThoughtFrame | None = None  # How thoughts are written by a model that is trained with them.
    # Matches texts that cannot be tokenized in a batch; None for a tokenizer without batches.
    special: re.Pattern[str] | None = None
    # Token ids of conversations that were tokenized in a batch, by `_key`.
    known: Mapping[Key, list[int]] = field(default_factory=dict, repr=False)

    def _folded(self, messages: list[Message]) -> list[Any]:
        if self.folds_system and messages[0]["role"] == "system":
            system, user, *rest = messages
            messages = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        return in_parts(messages) if self.takes_parts else messages

    def _ids(self, messages: list[Message], asks: bool) -> list[int]:
        messages = without_thoughts(messages)
        if self.known and (ids := self.known.get(_key(messages, asks))) is not None:
            return ids
        if self._is_plain(message["content"] for message in messages):
            return _tokenized(self.tokenizer.backend_tokenizer, [self._text(messages, asks)])[0]
        return _apply_template(self.tokenizer, self._folded(messages), add_generation_prompt=asks)["input_ids"]

    def _is_plain(self, texts: Iterable[str]) -> bool:
        """Whether none of these texts holds a control token."""
        return self.special is not None and not self.special.search("\0".join(texts))

    def _text(self, messages: list[Message], asks: bool) -> str:
        return _apply_template(self.tokenizer, self._folded(messages), tokenize=False, add_generation_prompt=asks)

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Renders a conversation that ends with the user's turn, up to where the model's answer starts.

        Control tokens that users typed are encoded as the plain text they are.
        """
        return self._ids([{**message, "content": message["content"].strip()} for message in messages], asks=True)

    def prompt_text(self, messages: list[Message]) -> str:
        """The same as text."""
        return self._text(without_thoughts(messages), asks=True)

    def folder(self) -> ThoughtFolder | None:
        """What tells the thoughts of an answer from its text, if this model thinks."""
        return ThoughtFolder(self.frame) if self.frame else None

    def said(self, text: str) -> str:
        """What a model has written, without its thought."""
        folder = self.folder()
        return (folder.add(text, last=True)[1] if folder else text).strip()

    def _thought_ids(self, thought: str) -> list[int]:
        """The tokens that stand between the prompt and the text of an answer."""
        if self.frame is None:
            return []
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        if not thought:
            return encode(self.frame.none)
        # Control tokens in a thought are the plain text they are.
        return [
            *encode(self.frame.begin), *encode(thought, split_special_tokens=True), *encode(self.frame.end)
        ]  # fmt: skip

    def answer_ids(self, messages: list[Message], prompt: list[int]) -> list[int]:
        """Renders a conversation that ends with an answer; returns the answer's tokens, the stop token the last.

        A thought before its text is left out, or written before it if the model is trained with thoughts.

        Raises:
            UnusableRecord: if the tokens are not those of the prompt and more (an answer whose beginning is a part of
                the prompt's last token, or that the template rewrites).
        """
        thought, said = split_thought(messages[-1]["content"])
        if thought and not said.strip():
            raise UnusableRecord("an answer that is nothing but a thought")
        ids, begin = self._ids(messages, asks=False), len(prompt) - self.thought_tokens
        shared = len(prompt) - self.unshared_tokens
        if ids[:shared] != prompt[:shared]:
            raise UnusableRecord("an answer that the chat template changes")
        answer = [*self._thought_ids(thought), *ids[begin:]]
        if self.writes_stop:
            # What follows the stop token (a line break in ChatML) belongs to the next turn.
            return answer[: answer.index(self.stop_id) + 1]
        return [*answer, self.stop_id]

    def samples(self, dialogue: Dialogue, max_tokens: int) -> list[Sample]:
        """Renders a dialogue for training: every answer is supervised, from its first token to the stop token.

        A prompt that is too long is shortened in the middle of its longest text, older exchanges leave first. An answer
        is never cut.

        Returns:
            One sample; more where the template rewrites earlier turns, so that each answer has a prompt of its own;
            none where an answer alone does not fit. Of several answers to one prompt each has a sample, which begin
            alike; none if the longest does not fit.
        """
        if dialogue.answers is not None:
            return self._answers(dialogue, max_tokens)
        messages, samples, ids, supervised = dialogue.messages, [], [], []
        for end in range(len(messages)):
            if messages[end]["role"] != "assistant":
                continue
            prompt = self._ids(messages[:end], asks=True)
            answer = self.answer_ids(messages[: end + 1], prompt)
            if len(prompt) + len(answer) > max_tokens:
                prompt = self._fit(messages[:end], max_tokens - len(answer))
                if prompt is None:
                    continue
            if ids and prompt[: len(ids)] != ids:
                samples.append(_sample(dialogue.id, ids, supervised))
                ids, supervised = [], []
            supervised += [False] * (len(prompt) - len(ids)) + [True] * len(answer)
            ids = [*prompt, *answer]
        if ids:
            samples.append(_sample(dialogue.id, ids, supervised))
        return samples

    def _answers(self, dialogue: Dialogue, max_tokens: int) -> list[Sample]:
        """Renders several answers to one prompt; only they are supervised, not the answers of earlier turns."""
        messages, prompt = dialogue.messages, self._ids(dialogue.messages, asks=True)
        turns = [{"role": "assistant", "content": text} for text in dialogue.answers]
        answers = [self.answer_ids([*messages, turn], prompt) for turn in turns]
        longest = max(map(len, answers))
        if len(prompt) + longest > max_tokens and (prompt := self._fit(messages, max_tokens - longest)) is None:
            return []
        supervised = [[False] * len(prompt) + [True] * len(ids) for ids in answers]
        return [_sample(dialogue.id, [*prompt, *ids], flags) for ids, flags in zip(answers, supervised, strict=True)]

    def _fit(self, messages: list[Message], room_tokens: int) -> list[int] | None:
        """Renders a prompt in at most `room_tokens`, or returns None where even a bare one is longer."""
        system = messages[:1] if messages[0]["role"] == "system" else []
        talk = messages[len(system) :]
        while len(talk) > 1 and len(self._ids([*system, *talk], asks=True)) > room_tokens:
            talk = talk[2:]
        question = talk[0]["content"]
        kept = len(question)
        while len(ids := self.prompt_ids([*system, *talk])) > room_tokens:
            if kept <= 8 or len(talk) > 1:
                return None
            # In proportion, which nears the goal from above, since the frame around the text takes room too.
            # The title stands at the beginning and the comment to answer at the end.
            kept = max(min(kept * max(room_tokens, 0) // len(ids), kept - 1), 8)
            talk = [{"role": "user", "content": f"{question[: kept // 2]}…{question[len(question) - kept // 2 :]}"}]
        return ids

    def texts(self, dialogues: Sequence[Dialogue]) -> dict[Key, str]:
        """Renders the conversations of some dialogues as text, each distinct one once.

        Those with control tokens in a message are left out: they are tokenized one by one.
        """
        asked: dict[bool, dict[Key, list[Message]]] = {True: {}, False: {}}
        for dialogue in dialogues:
            for messages, asks in dialogue.renderings():
                plain = without_thoughts(messages)
                if self._is_plain(message["content"] for message in plain):
                    asked[asks].setdefault(_key(plain, asks), plain)
        texts: dict[Key, str] = {}
        for asks, conversations in asked.items():
            if conversations:
                folded = [self._folded(messages) for messages in conversations.values()]
                written = _apply_template(self.tokenizer, folded, tokenize=False, add_generation_prompt=asks)
                texts |= zip(conversations, written, strict=True)
        return texts

    def with_tokens_of(self, texts: Mapping[Key, str], backend: Any) -> "Chat":
        """The same chat with the tokens of some texts at hand, tokenized in one batch by the library's threads.

        Args:
            texts: From `texts`.
            backend: The tokenizer's, or a copy of it: two threads may not share one.
        """
        if not texts:
            return self
        return replace(self, known=dict(zip(texts, _tokenized(backend, [*texts.values()]), strict=True)))


def _key(messages: list[Message], asks: bool) -> Key:
    return (asks, *[part for message in messages for part in (message["role"], message["content"])])


def _tokenized(backend: Any, texts: list[str]) -> list[list[int]]:
    backend.encode_special_tokens = False
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _apply_template(tokenizer: Any, messages: Any, tokenize: bool = True, **options: Any) -> Any:
    """Renders a conversation, or a list of conversations."""
    # `enable_thinking` is read by templates of reasoning models: a comment is written without a thought, unless the
    # template itself says that the model is trained with them.
    return tokenizer.apply_chat_template(
        messages,
        tokenize=tokenize,
        sanitize_control_tokens=tokenize,
        enable_thinking=False,
        add_bos_token=tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id],
        **options,
    )


def _sample(id: str, ids: list[int], supervised: list[bool]) -> Sample:
    return Sample(id, np.array(ids, dtype=np.int32), np.array(supervised, dtype=bool))


def _special(tokenizer: Any, messages: list[Message], ids: list[int]) -> re.Pattern[str] | None:
    """A pattern of the control tokens that a user may have typed, which are tokenized as plain text.

    Args:
        tokenizer: The tokenizer.
        messages: A conversation without them.
        ids: Its tokens.

    Returns:
        The pattern, which may match more texts than necessary; None if texts cannot be tokenized in batches.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or _tokenized(backend, [_apply_template(tokenizer, messages, tokenize=False)]) != [ids]:
        return None
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
    # Characters for private use are what transformers marks control tokens with.
    return re.compile("|".join([*map(re.escape, added), "[\U000f0000-\U0010ffff]"]))


def in_parts(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as templates of models for images and text take them."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def takes_parts(tokenizer: Any) -> bool:
    """Whether a template shows messages only as lists of parts."""
    return not _shows(tokenizer, "question", QUESTION) and _shows(tokenizer, "question", in_parts(QUESTION))


def _shows(tokenizer: Any, text: str, messages: list[Any]) -> bool:
    from jinja2 import TemplateError

    try:
        return text in _apply_template(tokenizer, messages, tokenize=False)
    except (TemplateError, TypeError):  # A template may do with a list what can be done with a text only.
        return False


def complete_prompt(tokenizer: Any) -> None:
    """Lets a template's generation prompt go up to where the text of an answer begins.

    If it begins a thought, that ends there: comments are written without one. And control tokens that all answers begin
    with are the prompt's. That is in the template from now on, wherever it goes: training, chat, a server, a published
    model.
    """
    if not isinstance(tokenizer.chat_template, str) or thinks(tokenizer.chat_template):
        return
    form = in_parts if takes_parts(tokenizer) else list
    if not _shows(tokenizer, "answer", form([*QUESTION, ANSWER])):
        return  # `make_chat` says so.
    prompt = _apply_template(tokenizer, form(QUESTION), tokenize=False, add_generation_prompt=True)
    whole = _apply_template(tokenizer, form([*QUESTION, ANSWER]), tokenize=False)
    before = whole[len(prompt) :].partition("answer")[0] if whole.startswith(prompt) else None
    opened = next((begin for begin in THOUGHTS if prompt.rstrip().endswith(begin)), None)
    rest = ""
    if opened is not None:
        end = THOUGHTS[opened]
        own = before is not None and before.strip() == end
        rest = before if own else f"\n{end}\n\n" if prompt.endswith("\n") else end
    elif before is not None and any(token in before for token in _control(tokenizer).values()):
        rest = before
    if rest:  # Jinja drops a line break at a template's end.
        written = json.dumps(rest, ensure_ascii=False)
        ending = f"{{% if add_generation_prompt %}}{{{{ {written} }}}}{{% endif %}}"
        tokenizer.chat_template = tokenizer.chat_template.removesuffix("\n") + ending


def _control(tokenizer: Any) -> dict[int, str]:
    return {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}


def _empty_thought(tokenizer: Any, prompt: list[int]) -> int:
    """The tokens of an empty thought at the end of a prompt."""
    text = tokenizer.decode(prompt)
    for begin, end in THOUGHTS.items():
        if found := re.search(rf"{re.escape(begin)}\s*{re.escape(end)}\s*\Z", text):
            ids = tokenizer.encode(found[0], add_special_tokens=False)
            return len(ids) if prompt[-len(ids) :] == ids else 0
    return 0


def find_thoughts(tokenizer: Any, form: Callable[[list[Message]], list[Any]]) -> ThoughtFrame:
    """Finds how a template of a model that is trained with thoughts writes them.

    Raises:
        DataError: if it writes them between control tokens.
    """
    thought = dict.fromkeys(("reasoning_content", "thinking"), THOUGHT)
    [answer] = form([ANSWER])
    write = partial(_apply_template, tokenizer, tokenize=False)
    prompt = write(form(QUESTION), add_generation_prompt=True)
    plain, thoughtful = write([*form(QUESTION), answer]), write([*form(QUESTION), answer | thought])
    try:
        return find_frame(prompt, plain, thoughtful, THOUGHT, ANSWER["content"], [*_control(tokenizer).values()])
    except ValueError as error:
        raise DataError(str(error)) from error


def make_chat(tokenizer: Any) -> Chat:
    """Tries a tokenizer's chat template, and finds how it treats system prompts and ends answers.

    Raises:
        DataError: if the template does not show the model an answer as what follows its prompt.
    """
    parts = takes_parts(tokenizer)
    form = in_parts if parts else list
    folds_system = not _shows(tokenizer, "briefing", form([{"role": "system", "content": "briefing"}, *QUESTION]))
    prompt = _apply_template(tokenizer, form(QUESTION), add_generation_prompt=True)["input_ids"]
    messages = [*QUESTION, ANSWER]
    whole = _apply_template(tokenizer, form(messages))["input_ids"]
    frame = find_thoughts(tokenizer, form) if thinks(tokenizer.chat_template) else None
    thought_tokens = unshared_tokens = 0
    if frame and (frame.opened or frame.none.strip()):
        text = _apply_template(tokenizer, form(messages), tokenize=False)
        before = tokenizer.encode(text.rpartition(ANSWER["content"])[0], add_special_tokens=False)
        thought_tokens = len(prompt) - len(before)
        unshared_tokens = len(prompt) - len(commonprefix([prompt, before])) if frame.opened else 0
    elif frame:
        frame = frame._replace(none="")  # The space before an answer is its own.
    elif whole[: len(prompt)] != prompt:
        thought_tokens = unshared_tokens = _empty_thought(tokenizer, prompt)
    begin, shared = len(prompt) - thought_tokens, len(prompt) - unshared_tokens
    written = tokenizer.decode(whole[begin:])
    thought = (thought_tokens or frame) and any(mark in written for mark in THOUGHTS)
    if whole[:shared] != prompt[:shared] or "answer" not in written or thought:
        raise DataError(
            "the chat template writes an answer after another text than the one it asks the model to go on from: "
            f"{tokenizer.decode(prompt)!r} against {tokenizer.decode(whole)!r}. Name a file with a template that does: "
            "--chat_template FILE"
        )
    control = _control(tokenizer)
    # What stands before the answer's text is none of its end.
    said = next(end for end in range(begin, len(whole) + 1) if "answer" in tokenizer.decode(whole[begin:end]))
    stop_id = next((id for id in whole[said:] if id in control), None)
    return Chat(
        tokenizer,
        folds_system,
        stop_id=tokenizer.eos_token_id if stop_id is None else stop_id,
        writes_stop=stop_id is not None,
        takes_parts=parts,
        thought_tokens=thought_tokens,
        unshared_tokens=unshared_tokens,
        frame=frame,
        special=_special(tokenizer, form(messages), whole),
    )


def show_sample(sample: Sample, tokenizer: Any) -> str:
    """Writes a sample as the model gets it; what is learnt stands between >>> and <<<."""
    text = ""
    for learnt, tokens in groupby(zip(sample.supervised, sample.input_ids, strict=True), key=lambda pair: pair[0]):
        part = tokenizer.decode([token for _, token in tokens])
        text += f">>>{part}<<<" if learnt else part
    return text
