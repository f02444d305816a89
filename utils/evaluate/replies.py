"""Sampled replies to held-out comments: through the batching engine, or from an OpenAI-compatible API."""

import argparse
import asyncio
import zlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from jinja2 import TemplateError

from utils.data.chat import Chat
from utils.data.records import Message

AT_ONCE = 128  # Comments that are answered together.
SEPARATOR_CHARACTERS = 5  # A shorter text between two turns may well be a part of a reply.
API_AT_ONCE = 16


class Written(NamedTuple):
    """A contender's replies to one comment.

    Attributes:
        replies: Texts.
        cut: Whether each came to the longest length.
    """

    replies: list[str]
    cut: list[bool]


class SamplingSettings(NamedTuple):
    """How replies are drawn; equal for all contenders."""

    replies: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def seed_of(self, id: str) -> int:
        """Each comment has a seed of its own, so that an evaluation that goes on draws what it would have drawn."""
        return zlib.crc32(f"{self.seed} {id}".encode())


def turn_separator(chat: Chat) -> list[str]:
    """What a chat template writes before the next question, if that is plain text, such as "### User:".

    A base model goes on with it instead of ending its reply, and everybody who uses one lets replies end there.
    """
    talk = [("user", "甲"), ("assistant", "乙"), ("user", "丙")]
    try:
        text = chat.prompt_text([{"role": role, "content": content} for role, content in talk])
    except TemplateError:  # Some know a single question only.
        return []
    between = text.partition("乙")[2].partition("丙")[0]
    for token in chat.tokenizer.added_tokens_decoder.values():
        between = between.replace(token.content, "") if token.special else between
    separator = between.strip()
    return [] if len(separator) < SEPARATOR_CHARACTERS or separator.isalpha() else [separator]


async def gather(
    ids: Sequence[str], answer: Callable[[str], Awaitable[Written]], done: Callable[[str, Written], None], at_once: int
) -> None:
    """Answers comments, some at a time, in order.

    Args:
        ids: Of the comments.
        answer: Answers one.
        done: Is told of each as soon as it is there.
        at_once: How many are under way.
    """
    left = iter(ids)

    async def work() -> None:
        for id in left:
            done(id, await answer(id))

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())


def make_engine(model: Any, chat: Any, names: Sequence[str], adapters: Sequence[str], longest: int) -> Any:
    """Puts a loaded model into the server's engine, and tries that it writes what the model's `generate` writes.

    Args:
        model: From `utils.serve.generate.load_for_inference`.
        chat: Its template.
        names: Under which it answers; the first one is the model's own.
        adapters: Those of the names that are adapters'.
        longest: Prompt and reply together, tokens.

    Raises:
        ValueError: if it does not fit, or the engine cannot run it.
    """
    from utils.serve.capacity import find_capacity
    from utils.serve.routes import Served
    from utils.serve.transformers_engine import TransformersEngine, check_engine

    asked = argparse.Namespace(
        max_model_len=longest, max_num_seqs=AT_ONCE, max_num_batched_tokens=None, gpu_memory_utilization=0.9
    )
    capacity = find_capacity(model, chat, 1, asked)
    engine = TransformersEngine(model, chat, [Served(name, None) for name in names], adapters, capacity)
    check_engine(engine)
    return engine


def engine_replies(
    engine: Any,
    name: str,
    prompts: dict[str, list[int]],
    stop: list[str],
    settings: SamplingSettings,
    done: Callable[[str, Written], None],
) -> None:
    """Lets one of an engine's models answer.

    Args:
        engine: From `make_engine`.
        name: The model's.
        prompts: A comment's id -> token ids.
        stop: Texts before which a reply ends.
        settings: How is sampled.
        done: Is told of each comment's replies as soon as they are there.
    """
    from utils.serve.routes import Sampling, collect, folded

    async def answer(id: str) -> Written:
        sampling = Sampling(
            n=settings.replies,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            repetition_penalty=1.0,
            stop=stop or None,
            seed=settings.seed_of(id),
        )
        async with aclosing(folded(engine, engine.generate(prompts[id], sampling, name))) as pieces:
            answers = await collect(pieces, settings.replies)
        return Written([text.strip() for text in answers.texts], [end == "length" for end in answers.finish_reasons])

    asyncio.run(gather([*prompts], answer, done, AT_ONCE))


def api_replies(
    client: Any,
    name: str,
    prompts: dict[str, list[Message]],
    settings: SamplingSettings,
    done: Callable[[str, Written], None],
) -> None:
    """Lets a model behind an OpenAI-compatible API answer.

    Args:
        client: An asynchronous client of the openai package.
        name: The model's.
        prompts: A comment's id -> messages.
        settings: How is sampled. Each reply is asked for by itself: some servers write only one a request.
        done: As for `engine_replies`.
    """

    async def answer(id: str) -> Written:
        replies, cut = [], []
        for number in range(settings.replies):
            completion = await client.chat.completions.create(
                model=name,
                messages=prompts[id],
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed_of(id) + number,
            )
            choice = completion.choices[0]
            replies.append((choice.message.content or "").strip())
            cut.append(choice.finish_reason == "length")
        return Written(replies, cut)

    async def all_of_them() -> None:
        async with client:
            await gather([*prompts], answer, done, API_AT_ONCE)

    asyncio.run(all_of_them())
