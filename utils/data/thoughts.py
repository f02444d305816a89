"""Thoughts: what a reasoning model writes for itself before its answer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = dict[str, str]

# What begins a thought in the templates of reasoning models, and what ends it.
THOUGHTS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
REASONING = ("reasoning_content", "reasoning")  # Fields of a thought beside an answer.
# At the beginning of the template of a model that is trained with thoughts, which so are asked for wherever it is used.
THINKING = "{%- set enable_thinking = true -%}{%- set thinking = true +%}"


class ThoughtFrame(NamedTuple):
    """How a thought stands between a prompt and the answer.

    Attributes:
        begin: Before the thought.
        end: Between it and the answer.
        none: What stands before an answer without a thought.
        opened: Whether the prompt itself begins the thought.
    """

    begin: str
    end: str
    none: str
    opened: bool


def split_thought(text: str) -> tuple[str, str]:
    """Splits a text that begins with a whole thought; returns thought and answer. The thought is "" without one."""
    start = text.lstrip()
    for begin, end in THOUGHTS.items():
        if start.startswith(begin):
            thought, ended, answer = start[len(begin) :].partition(end)
            if ended:
                return thought.strip(), answer.lstrip()
    return "", text


def join_thought(thought: str, answer: str) -> str:
    """Writes a thought before an answer, as `split_thought` reads it."""
    return f"<think>\n{thought}\n</think>\n\n{answer}"


def with_thought(fields: Mapping[str, Any], answer: Any) -> Any:
    """An answer with the thought that the fields beside it hold; what is no text stays what it is."""
    thoughts = [fields[name] for name in REASONING if isinstance(fields.get(name), str) and fields[name].strip()]
    if not thoughts or not isinstance(answer, str) or split_thought(answer)[0]:
        return answer
    return join_thought(thoughts[0].strip(), answer)


def without_thoughts(messages: Sequence[Message]) -> list[Message]:
    """The same messages, the assistant's without thoughts."""
    return [
        {**message, "content": split_thought(message["content"])[1]} if message["role"] == "assistant" else message
        for message in messages
    ]


def thinks(template: Any) -> bool:
    """Whether a template is that of a model that is trained with thoughts."""
    return isinstance(template, str) and THINKING in template


def find_frame(
    prompt: str, plain: str, thoughtful: str, thought: str, answer: str, control: Sequence[str]
) -> ThoughtFrame:
    """Finds how a template writes thoughts; in the usual way where it leaves them out.

    Args:
        prompt: That asks for an answer.
        plain: The conversation with an answer.
        thoughtful: The same with a thought.
        thought: Its text.
        answer: The answer's.
        control: The control tokens.

    Raises:
        ValueError: if it writes them between control tokens, which are no part of what a model is heard to say.
    """
    opened = next((begin for begin in THOUGHTS if prompt.rstrip().endswith(begin)), None)
    written, found, after = thoughtful[len(prompt) :].partition(thought)
    if found and thoughtful.startswith(prompt) and answer in after:
        begin, end = written, after.partition(answer)[0]
    else:
        tag = opened or "<think>"
        begin, end = "" if opened else f"{tag}\n", f"\n{THOUGHTS[tag]}\n\n"
    if token := next((token for token in control if token in begin + end), None):
        raise ValueError(
            f"the chat template writes thoughts between control tokens such as {token!r}, which cannot be told from "
            "the answer when the model is used. Train without thoughts: --thoughts drop"
        )
    none = plain[len(prompt) :].partition(answer)[0] if plain.startswith(prompt) else begin + end
    return ThoughtFrame(begin, end, none, opened is not None)


class ThoughtFolder:
    """Tells thoughts from answers in text that comes piece by piece."""

    def __init__(self, frame: ThoughtFrame) -> None:
        self._begin, self._end = frame.begin.strip(), frame.end.strip()
        self._held = ""  # What may be a part of a mark.
        self._place = "thought" if frame.opened else "start"
        self._began = False  # Whether any of the thought was said: white space around it is none of it.

    def add(self, text: str, last: bool = False) -> tuple[str, str]:
        """Takes a piece.

        Args:
            text: The piece.
            last: Whether nothing follows.

        Returns:
            What can be said now of the thought, and of the answer.
        """
        self._held += text
        thought = ""
        if self._place == "start":
            start = self._held.lstrip()
            if start.startswith(self._begin):
                self._place, self._held = "thought", start[len(self._begin) :].lstrip()
            elif last or not self._begin.startswith(start):
                self._place = "answer"
        if self._place == "thought":
            thought, ended, rest = self._held.partition(self._end)
            part = next((n for n in range(len(self._end), 0, -1) if thought.endswith(self._end[:n])), 0)
            shown = thought[: len(thought) - (0 if ended or last else part)].rstrip()
            self._held, thought = thought[len(shown) :], shown if self._began else shown.lstrip()
            self._began |= bool(thought)
            if ended:
                self._place, self._held = "gap", rest
        if self._place == "gap" and (rest := self._held.lstrip()):
            self._place, self._held = "answer", rest
        answer = self._held if self._place == "answer" else ""
        if self._place in ("answer", "gap"):
            self._held = ""
        return thought, answer
