"""HTTP around an engine: this project's own route, health, and what both engines' routes have in common.

An engine is an object with what `Engine` has.
"""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from textwrap import shorten
from typing import Annotated, Any, NamedTuple, Protocol

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from utils.data.records import Message, comment_prompt
from utils.data.thoughts import ThoughtFolder
from utils.serve.limits import Refused, problem_json, sse

MAX_CHOICES = 16
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # The second is read by nginx.


class Served(NamedTuple):
    """A name that requests can ask for.

    Attributes:
        name: Of the model, or of an adapter.
        system_prompt: It was trained with; None if nothing is known.
        path: What --model was given, which clients of vLLM call it by default; "" if it has no other name.
    """

    name: str
    system_prompt: str | None
    path: str = ""


StopWord = Annotated[str, Field(max_length=256)]


class Sampling(BaseModel):
    """How tokens are chosen; what is not given is the model's own setting. The names are those of vLLM."""

    model_config = ConfigDict(allow_inf_nan=False)

    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    stop: StopWord | Annotated[list[StopWord], Field(max_length=16)] | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=64)

    @property
    def stop_words(self) -> list[str]:
        """The stop texts as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Delta(NamedTuple):
    """A part of an answer.

    Attributes:
        index: Which of the n answers.
        text: What it says further.
        tokens: How many tokens that took.
        finish_reason: "stop" or "length" with the last one.
        thought: What it thinks further, if the model thinks.
    """

    index: int
    text: str
    tokens: int
    finish_reason: str | None
    thought: str = ""


class Engine(Protocol):
    """What the routes need of an engine.

    Attributes:
        name: "vllm" or "transformers".
        models: What it serves; the first one is the default.
        max_model_len: The longest prompt and answer together, in tokens.
    """

    name: str
    models: list[Served]
    max_model_len: int

    async def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Renders a conversation as in training. Raises `Refused` where the template cannot."""
        ...

    def generate(self, input_ids: list[int], sampling: Sampling, model: str) -> AsyncIterator[Delta]:
        """Answers; `sampling.max_tokens` is set. Closing the iterator ends the work."""
        ...

    def folder(self) -> ThoughtFolder | None:
        """What tells thoughts from an answer's text, if the model thinks."""
        ...

    def problem(self) -> str | None:
        """Why it cannot answer, if it cannot."""
        ...


def check_lengths(engine: Engine, input_ids: list[int], sampling: Sampling, clamp: bool) -> Sampling:
    """Finds how long an answer may become.

    Args:
        engine: With the longest prompt and answer together.
        input_ids: The prompt.
        sampling: As asked for.
        clamp: Whether too large a `max_tokens` is lowered to what fits, or refused.

    Raises:
        Refused: if prompt, or prompt and answer, are too long.
    """
    room = engine.max_model_len - len(input_ids)
    if room < 1:
        raise Refused(
            400, f"The prompt has {len(input_ids):,} tokens; with an answer {engine.max_model_len:,} is the most."
        )
    asked = sampling.max_tokens
    if asked is not None and asked > room and not clamp:
        raise Refused(
            400,
            f"max_tokens: got {asked:,}, and the prompt has {len(input_ids):,} tokens; both together may have "
            f"{engine.max_model_len:,}. Expected at most {room:,}.",
        )
    return sampling.model_copy(update={"max_tokens": min(asked or room, room)})


def find_model(engine: Engine, name: str | None) -> Served:
    """Finds what a request asks for; the first one by default.

    Raises:
        Refused: if there is none of that name.
    """
    if name is None:
        return engine.models[0]
    for served in engine.models:
        if name == served.name or (served.path and name == served.path):
            return served
    names = ", ".join(served.name for served in engine.models)
    raise Refused(404, f"model: got {shorten(repr(name), 100)}, this server has {names}.")


class Question(Sampling):
    """A request to `/ai/llm/generation_stream`."""

    message: str = ""
    title: str = Field(default="", description="of a video, in place of a message")
    desc: str = ""
    parent: str = ""
    history: list[Any] = Field(default_factory=list, description="[question, answer] pairs, or messages")
    system: str | None = Field(default=None, description="not given: that of the training data; empty: none")
    stream: bool = False
    model: str | None = None


def to_conversation(question: Question, trained_system: str | None) -> list[Message]:
    """Makes messages of a request to this project's own route.

    Raises:
        Refused: if it asks nothing, or its history cannot be read.
    """
    system = trained_system if question.system is None else question.system
    messages = [{"role": "system", "content": system}] if system and system.strip() else []
    for number, turn in enumerate(question.history):
        match turn:
            case [str(asked), str(answered)]:
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            case {"role": "user" | "assistant" as role, "content": str(content)}:
                messages.append({"role": role, "content": content})
            case _:
                raise Refused(
                    400, f"history[{number}]: expected [question, answer] or {{role: user or assistant, content}}."
                )
    if question.message.strip() and question.title.strip():
        raise Refused(400, "Got a message and a title, expected one of them.")
    if not question.title.strip() and (question.desc or question.parent):
        raise Refused(400, "desc and parent belong to a video: give its title as well.")
    asked = question.message if question.message.strip() else ""
    if question.title.strip():
        asked = comment_prompt(question.title, question.desc, question.parent)
    if not asked:
        raise Refused(400, "message: got an empty text. Give a message, or a video's title.")
    return [*messages, {"role": "user", "content": asked}]


async def folded(engine: Engine, pieces: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    """Tells thoughts from the text of answers to a conversation."""
    folders: dict[int, ThoughtFolder | None] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            folder = folders.setdefault(piece.index, engine.folder())
            if folder:
                thought, text = folder.add(piece.text, last=piece.finish_reason is not None)
                piece = piece._replace(text=text, thought=thought)
            yield piece


class Answers:
    """Pieces of n answers, put together."""

    def __init__(self, n: int) -> None:
        self.texts = [""] * n
        self.thoughts = [""] * n
        self.finish_reasons: list[str | None] = [None] * n
        self.tokens = 0

    def add(self, piece: Delta) -> None:
        """Takes a piece."""
        self.texts[piece.index] += piece.text
        self.thoughts[piece.index] += piece.thought
        self.tokens += piece.tokens
        self.finish_reasons[piece.index] = piece.finish_reason or self.finish_reasons[piece.index]


async def collect(pieces: AsyncIterator[Delta], n: int) -> Answers:
    """Waits for whole answers."""
    answers = Answers(n)
    async with aclosing(pieces):
        async for piece in pieces:
            answers.add(piece)
    return answers


def usage(input_ids: list[int], tokens: int) -> dict[str, int]:
    """Counts of tokens, as OpenAI names them."""
    prompt = len(input_ids)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def stream_response(events: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Sends events as they come; an error on the way is the last one."""

    async def body() -> AsyncIterator[bytes]:
        async with aclosing(events):
            try:
                async for event in events:
                    yield sse(event)
            except Refused as refusal:
                yield sse({"error": {"message": str(refusal), "code": refusal.status}})
        yield sse("[DONE]")

    return StreamingResponse(body(), media_type="text/event-stream", headers=UNBUFFERED)


def own_routes(engine: Engine) -> APIRouter:
    """The routes that both engines have: this project's own, and health."""
    routes = APIRouter()
    started = int(time.time())

    @routes.post("/ai/llm/generation_stream")
    async def generation_stream(question: Question) -> Any:
        served = find_model(engine, question.model)
        input_ids = await engine.prompt_ids(to_conversation(question, served.system_prompt))
        sampling = check_lengths(engine, input_ids, question, clamp=True)
        pieces = folded(engine, engine.generate(input_ids, sampling, served.name))
        if not question.stream:
            answers = await collect(pieces, question.n)
            thoughts = [thought.strip() for thought in answers.thoughts]
            return {
                "text": answers.texts,
                **({"thought": thoughts} if any(thoughts) else {}),
                "finish_reason": answers.finish_reasons,
                "usage": usage(input_ids, answers.tokens),
            }

        async def events() -> AsyncIterator[dict[str, Any]]:
            async with aclosing(pieces):
                async for piece in pieces:
                    thought = {"thought": piece.thought} if piece.thought else {}
                    yield {"index": piece.index, "text": piece.text, **thought, "finish_reason": piece.finish_reason}

        return stream_response(events())

    @routes.api_route("/health", methods=["GET", "HEAD"])
    async def health(request: Request) -> Any:
        if problem := engine.problem():
            return problem_json(503, problem)
        told: dict[str, Any] = {"status": "ok", "engine": engine.name}
        if request.state.knows_key:
            models = [{"name": served.name, "system_prompt": served.system_prompt} for served in engine.models]
            told |= {"models": models, "started": started}
        return told

    return routes


def add_error_handlers(app: FastAPI) -> None:
    """Errors as sentences in OpenAI's format."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return problem_json(error.status, str(error))

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> JSONResponse:
        return problem_json(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # What was got is not repeated: it may be large, or no JSON at all.
        found = [f"{'.'.join(str(part) for part in one['loc'][1:]) or 'body'}: {one['msg']}" for one in error.errors()]
        return problem_json(400, "; ".join(found[:5]))
