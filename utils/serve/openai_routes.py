"""OpenAI's API on the transformers engine: chat completions, completions, models. vLLM has its own."""

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from utils.data.records import Message
from utils.serve.limits import Refused
from utils.serve.routes import (
    Delta,
    Sampling,
    Served,
    check_lengths,
    collect,
    find_model,
    folded,
    stream_response,
    usage,
)
from utils.serve.transformers_engine import TransformersEngine

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that would change the answer and are not computed here, what they ask for, and what asks for nothing. Others
# that are not known are ignored, tools among them, as by servers without tools.
MISSING: dict[str, tuple[str, tuple[Any, ...]]] = {
    "logprobs": ("log-probabilities", ()),
    "top_logprobs": ("log-probabilities", (0,)),
    "logit_bias": ("biased tokens", ({},)),
    "best_of": ("choosing among answers", (1,)),
    "echo": ("repeating the prompt", ()),
    "suffix": ("filling in", ("",)),
}


class StreamOptions(BaseModel):
    """What else a stream tells."""

    include_usage: bool = False


class Completion(Sampling):
    """What both kinds of requests have."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    response_format: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuses what would be answered otherwise than asked.

        Raises:
            Refused: naming the field.
        """
        for name, (what, neutral) in MISSING.items():
            asked = getattr(self, name)
            if asked is not None and asked is not False and asked not in neutral:
                raise Refused(400, f"{name}: {what} is not offered by this engine, vLLM's has it.")
        if self.response_format and self.response_format.get("type", "text") != "text":
            raise Refused(400, "response_format: only text is offered by this engine, vLLM's has others.")


class ChatRequest(Completion):
    """A request to `/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)


class TextRequest(Completion):
    """A request to `/v1/completions`."""

    prompt: str | list[int] | list[str]


def plain_messages(messages: list[dict[str, Any]]) -> list[Message]:
    """Reads OpenAI's messages.

    Raises:
        Refused: if one is no text, or of another role.
    """
    plain = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise Refused(400, f"messages[{number}].role: expected one of {', '.join(ROLES)}.")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if not isinstance(content, str):
            raise Refused(400, f"messages[{number}].content: expected text.")
        plain.append({"role": ROLES[role], "content": content})
    if [message["role"] for message in plain][-1] == "system":
        raise Refused(400, "messages: expected a user's message at the end.")
    return plain


def openai_routes(engine: TransformersEngine) -> APIRouter:
    """The routes under /v1."""
    routes = APIRouter(prefix="/v1")
    started = int(time.time())

    def described(served: Served) -> dict[str, Any]:
        head = {"id": served.name, "object": "model", "created": started, "owned_by": "llm-train-playground"}
        return head | {"max_model_len": engine.max_model_len}

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(served) for served in engine.models]}

    @routes.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return described(find_model(engine, name))

    @routes.post("/chat/completions")
    async def chat_completions(request: ChatRequest) -> Any:
        request.check()
        served = find_model(engine, request.model)
        input_ids = await engine.prompt_ids(plain_messages(request.messages))
        asked = request.model_copy(update={"max_tokens": request.max_completion_tokens or request.max_tokens})
        sampling = check_lengths(engine, input_ids, asked, clamp=False)
        return await answer(request, "chat.completion", input_ids, sampling, served.name)

    @routes.post("/completions")
    async def completions(request: TextRequest) -> Any:
        request.check()
        served = find_model(engine, request.model)
        input_ids = await _text_ids(engine, request.prompt)
        asked = request.model_copy(update={"max_tokens": request.max_tokens or 16})  # OpenAI's default.
        sampling = check_lengths(engine, input_ids, asked, clamp=False)
        return await answer(request, "text_completion", input_ids, sampling, served.name)

    async def answer(request: Completion, kind: str, input_ids: list[int], sampling: Sampling, name: str) -> Any:
        head = {"id": f"{kind}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}
        pieces = engine.generate(input_ids, sampling, name)
        if kind == "chat.completion":
            pieces = folded(engine, pieces)
        if request.stream:
            if kind == "chat.completion":
                head["object"] = "chat.completion.chunk"
            counted = request.stream_options is not None and request.stream_options.include_usage
            return stream_response(_chunks(head, kind, pieces, input_ids, counted))
        answers = await collect(pieces, request.n)
        choices = []
        for index, (text, reason) in enumerate(zip(answers.texts, answers.finish_reasons, strict=True)):
            said = {"text": text}
            if kind == "chat.completion":
                thought = answers.thoughts[index].strip()
                said = {"message": {"role": "assistant", "content": text, **reasoning(thought)}}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        return {**head, "choices": choices, "usage": usage(input_ids, answers.tokens)}

    return routes


def reasoning(thought: str) -> dict[str, str]:
    """A thought, as DeepSeek's API and vLLM name it."""
    return {"reasoning_content": thought} if thought else {}


async def _text_ids(engine: TransformersEngine, prompt: str | list[int] | list[str]) -> list[int]:
    if isinstance(prompt, list) and all(isinstance(part, str) for part in prompt):
        if len(prompt) != 1:
            raise Refused(400, f"prompt: got {len(prompt)} texts, expected one; send a request for each.")
        prompt = prompt[0]
    if isinstance(prompt, list):
        if not all(0 <= token < engine.vocabulary for token in prompt):
            raise Refused(400, f"prompt: expected tokens from 0 to {engine.vocabulary - 1}.")
        input_ids = prompt
    else:
        input_ids = await engine.encode(prompt)
    if not input_ids:
        raise Refused(400, "prompt: got an empty text.")
    return input_ids


async def _chunks(
    head: dict[str, Any], kind: str, pieces: AsyncIterator[Delta], input_ids: list[int], counted: bool
) -> AsyncIterator[dict[str, Any]]:
    begun, tokens = set(), 0
    async with aclosing(pieces):
        async for piece in pieces:
            tokens += piece.tokens
            said: dict[str, Any] = {"text": piece.text}
            if kind == "chat.completion":
                role = {} if piece.index in begun else {"role": "assistant"}
                said = {"delta": {**role, "content": piece.text, **reasoning(piece.thought)}}
                begun.add(piece.index)
            choice = {"index": piece.index, **said, "logprobs": None, "finish_reason": piece.finish_reason}
            yield {**head, "choices": [choice]}
    if counted:
        yield {**head, "choices": [], "usage": usage(input_ids, tokens)}
