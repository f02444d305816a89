"""A teacher behind an OpenAI-compatible API: its entry in teacher_config.yaml, the client, one request."""

import asyncio
import os
import re
import time
from collections import Counter
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

from utils.api import make_client
from utils.data.records import Message
from utils.files import shown

THOUGHT = "</think>"
# How often a question is sent at most: after failures that cost nothing, such that tokens were paid for, and responses
# that cannot be understood, which may have been.
ATTEMPTS, PAID_ATTEMPTS, ODD_ATTEMPTS = 8, 4, 2
FINISHED = ["stop", "eos", "end_turn", "", None]  # Why an answer ended, if it is whole.
KINDS = {
    "base_url": str,
    "model": str,
    "api_key_env": str,
    "price_in": (int, float),
    "price_out": (int, float),
    "options": dict,
}


class Teacher(NamedTuple):
    """An entry of teacher_config.yaml."""

    base_url: str
    model: str
    api_key_env: str = ""
    price_in: float = 0.0
    price_out: float = 0.0
    options: dict[str, Any] = {}

    def cost(self, usage: Counter[str]) -> float:
        """What tokens cost, in the currency of the prices."""
        return (usage["in"] * self.price_in + usage["out"] * self.price_out) / 1e6


class Answer(NamedTuple):
    """What the teacher said."""

    text: str
    reasoning: str
    usage: Counter[str]


class NoAnswer(Exception):
    """A request that gave no answer.

    Attributes:
        again: Whether it is worth another attempt.
        odd: Whether the response cannot be understood.
        busy: Whether the teacher is asked too much at a time.
        wait_sec: How long the teacher asked to wait; None if it did not.
        usage: Tokens that it cost all the same.
    """

    def __init__(
        self,
        reason: str,
        again: bool,
        busy: bool = False,
        wait_sec: float | None = None,
        usage: Any = None,
        odd: bool = False,
    ) -> None:
        super().__init__(reason)
        self.again, self.busy, self.wait_sec, self.usage, self.odd = again, busy, wait_sec, usage or Counter(), odd

    @property
    def attempts(self) -> int:
        """After how many such failures a question is given up."""
        if not self.again:
            return 1
        return ODD_ATTEMPTS if self.odd else PAID_ATTEMPTS if self.usage.total() else ATTEMPTS


class FatalError(Exception):
    """Why no request can succeed, such as a wrong key."""


def read_teacher(path: Path, name: str, flag: str = "--model_name") -> Teacher:
    """Reads a teacher's entry.

    Args:
        path: teacher_config.yaml.
        name: Of the entry.
        flag: The argument that named it.

    Raises:
        SystemExit: saying what is wrong with it; no value is repeated, as it could be a key.
    """
    import yaml

    example = shown(path.with_name("teacher_config.example.yaml"))
    if not path.is_file():
        raise SystemExit(f"No {shown(path)}. Make it from the example: cp {example} {shown(path)}")
    try:
        teachers = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        raise SystemExit(f"{shown(path)}{line}: not YAML. Compare it with {example}") from None
    if not isinstance(teachers, dict) or not isinstance(teachers.get(name), dict):
        there = ", ".join(map(str, teachers)) if isinstance(teachers, dict) else ""
        raise SystemExit(f"{flag}: no entry {name!r} in {shown(path)}. There are: {there or 'none'}.")
    entry, place = teachers[name], f"{shown(path)}, {name}"
    if unknown := sorted(str(field) for field in entry.keys() - KINDS.keys()):
        advice = " Keys do not belong in files: name an environment variable in api_key_env."
        raise SystemExit(
            f"{place}: unknown {', '.join(unknown)}; known are {', '.join(KINDS)}."
            f"{advice if any('key' in field for field in unknown) else ''}"
        )
    wrong = [field for field, value in entry.items() if not isinstance(value, KINDS[field])]
    wrong += [f"{field} (missing)" for field in ("base_url", "model") if field not in entry]
    if wrong:
        raise SystemExit(f"{place}: not usable: {', '.join(wrong)}. Compare it with {example}")
    if re.search("[@?]", entry["base_url"]):
        raise SystemExit(f"{place}: base_url has room for an address only. Keys go into environment variables.")
    if not re.fullmatch("([A-Z_][A-Z0-9_]*)?", entry.get("api_key_env", "")):
        raise SystemExit(f"{place}: api_key_env is not the name of an environment variable, such as DEEPSEEK_API_KEY.")
    if asked := {"stream", "n", "model", "messages"} & entry.get("options", {}).keys():
        raise SystemExit(f"{place}: options cannot change {', '.join(sorted(asked))}.")
    return Teacher(**entry)


def teacher_client(teacher: Teacher, name: str, timeout_sec: float) -> Any:
    """A client of a teacher; it does not retry, since `Collector` does.

    Raises:
        SystemExit: if the key is not in the environment.
    """
    key = os.environ.get(teacher.api_key_env, "") if teacher.api_key_env else "none"
    if not key:
        variable = teacher.api_key_env
        raise SystemExit(f"{variable} is not set, which holds the key of {name}. Set it: export {variable}=...")
    if not (key.isascii() and key.isprintable()):
        odd = "characters that no key has, such as curly quotes or a line break"
        raise SystemExit(f"{teacher.api_key_env} holds {odd}. Set it again: export {teacher.api_key_env}=...")
    return make_client(teacher.base_url, key, max_retries=0, timeout=timeout_sec)


def usage_of(completion: Any) -> Counter[str]:
    """The tokens of a request, as far as the server says so in numbers that can be."""
    usage = getattr(completion, "usage", None)
    said = {"in": getattr(usage, "prompt_tokens", None), "out": getattr(usage, "completion_tokens", None)}
    return Counter({
        name: int(number) for name, number in said.items() if isinstance(number, int | float) and 0 <= number < 1e9
    })  # fmt: skip


def text_of(content: Any) -> str:
    """The text of a message, which some servers send in parts; "" if there is none."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str)).strip()


def to_answer(completion: Any) -> Answer:
    """Takes the answer out of what the server sent. A complete text counts, even if the rest of the response is odd.

    Raises:
        NoAnswer: if there is none that a student should learn.
    """
    usage, choices = usage_of(completion), getattr(completion, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise NoAnswer("no choices in the response", again=True, usage=usage, odd=bool(choices))
    reason, message = getattr(choices[0], "finish_reason", None), getattr(choices[0], "message", None)
    reason = reason.lower() if isinstance(reason, str) else reason
    if reason == "content_filter":
        raise NoAnswer("content filter", again=False, usage=usage)
    if reason == "length":
        advice = "raise max_tokens in the teacher's options (another option asks all comments again)"
        raise NoAnswer(f"cut off: {advice}", again=False, usage=usage)
    if reason not in FINISHED:  # Such as a server that ran out of memory in the middle.
        raise NoAnswer(f"ended by {reason!r}", again=True, usage=usage, odd=not isinstance(reason, str))
    content = getattr(message, "content", ...)
    text = text_of(content)
    reasoning = text_of(getattr(message, "reasoning_content", None)) or text_of(getattr(message, "reasoning", None))
    if THOUGHT in text:  # Some servers leave the tags in, or only the closing one.
        thought, _, text = text.rpartition(THOUGHT)
        reasoning, text = reasoning or thought.replace("<think>", "", 1).strip(), text.strip()
    if not text or "<think>" in text:
        raise NoAnswer("an empty answer", again=True, usage=usage, odd=not isinstance(content, str | list | None))
    return Answer(text, reasoning, usage)


def retry_after(headers: Any) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after")
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


async def ask(client: Any, teacher: Teacher, messages: list[Message], timeout_sec: float) -> Answer:
    """Sends a question once.

    Raises:
        NoAnswer: if this request gave none.
        FatalError: if no request will.
    """
    import openai

    try:
        async with asyncio.timeout(timeout_sec):  # The client's own limit is for each part of a response.
            return to_answer(
                await client.chat.completions.create(model=teacher.model, messages=messages, extra_body=teacher.options)
            )
    except TimeoutError:
        raise NoAnswer(f"no answer in {timeout_sec:g} s", again=True) from None
    except openai.APIStatusError as error:
        status = error.status_code
        if status in (401, 402) or error.code == "insufficient_quota":
            # What the server says may repeat a part of the key.
            raise FatalError(f"the teacher refused the key, or the account is empty (HTTP {status})") from None
        if status == 404:
            raise FatalError(f"HTTP 404 for model {teacher.model!r} at {teacher.base_url}") from None
        busy = status == 429 or status >= 500
        again = busy or status in (408, 409)
        # The server's own words say which option it does not like, or what its filter did.
        said = re.sub(r"\bsk-\S+", "***", str(error.message).replace(client.api_key, "***"))[:200]
        raise NoAnswer(f"HTTP {status}: {said}", again, busy, retry_after(error.response.headers)) from None
    except openai.APIConnectionError as error:
        raise NoAnswer(f"connection: {type(error.__cause__ or error).__name__}", again=True) from None
    except (openai.APIError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise NoAnswer(f"a broken response ({type(error).__name__})", again=True, odd=True) from None
