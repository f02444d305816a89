"""HTTP around an engine: who may ask, how much at once and for how long; this project's own route, and health.

Both engines share it. An engine is an object with `name`, `models` and the methods of `Engine`.
"""

import asyncio
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from textwrap import shorten
from typing import Annotated, Any, NamedTuple, Protocol

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from utils.data import Message, comment_prompt

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
MAX_CHOICES = 16
DISCARDED_BYTES = 32_000_000  # The most that is read of a refused request.
LAST_WORD_SEC = 5  # For clients that are slow to take, or to send, what is no longer wanted.
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # The second is read by nginx.


class Refused(Exception):
    """A request that is not answered; `status` is HTTP's, the message is written for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Served(NamedTuple):
    """A name that requests can ask for.

    Attributes:
        name: Of the model, or of an adapter.
        system_prompt: It was trained with; None if nothing is known.
    """

    name: str
    system_prompt: str | None


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


class Piece(NamedTuple):
    """A part of an answer.

    Attributes:
        index: Which of the n answers.
        text: What it says further.
        tokens: How many tokens that took.
        finish_reason: "stop" or "length" with the last one.
    """

    index: int
    text: str
    tokens: int
    finish_reason: str | None


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

    def generate(self, input_ids: list[int], sampling: Sampling, model: str) -> AsyncIterator[Piece]:
        """Answers; `sampling.max_tokens` is set. Closing the iterator ends the work."""
        ...

    def problem(self) -> str | None:
        """Why it cannot answer, if it cannot."""
        ...


@dataclass
class Limits:
    """What a server takes.

    Attributes:
        key: That clients must give; none: everybody may ask.
        max_body_bytes: The largest request.
        max_requests: Being answered or waiting at once; more are told to come again (429).
        timeout_sec: The longest that one may take.
        body_timeout_sec: The longest that sending one may take.
    """

    key: str | None = None
    max_body_bytes: int = 1_000_000
    max_requests: int = 256
    timeout_sec: float = 600
    body_timeout_sec: float = 30


def open_socket(host: str, port: int) -> socket.socket:
    """Takes the port before a model is loaded for nothing.

    Raises:
        SystemExit: if it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        opened = socket.socket(family)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
        # Connections are taken from now on, and wait until the model is there.
        opened.listen(2048)
    except OSError as error:
        raise SystemExit(
            f"{host}:{port} cannot be listened on: {error.strerror}. Give another --port, or --host."
        ) from error
    return opened


def problem_json(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(body, status, headers)


async def _next_part(receive: Receive) -> tuple[bytes, bool]:
    """A part of a body, and whether there are more."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ConnectionError
    return message.get("body", b""), message.get("more_body", False)


async def _discard(receive: Receive) -> None:
    """Reads what a client still sends, for a while: many look for an answer only when all is sent."""
    read, more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORD_SEC):
            while more and read < DISCARDED_BYTES:
                part, more = await _next_part(receive)
                read += len(part)


class Guard:
    """ASGI middleware that enforces `Limits`, and ends the work on a request whose client has gone.

    `/health` is always answered.
    """

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.at_work = 0
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Ends all answers at work with a sentence, as the server is to end."""
        self._ending.set()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or scope["path"] == "/health":
            scope.setdefault("state", {})["knows_key"] = scope["type"] == "http" and self._knows_key(scope)
            await self.app(scope, receive, send)
            return
        if self.at_work >= self.limits.max_requests:
            waiting = f"{self.at_work} requests are at work or waiting, as many as this server takes. Try again soon."
            await problem_json(429, waiting, {"Retry-After": "1"})(scope, receive, send)
            return
        self.at_work += 1
        try:
            body = await self._read_body(scope, receive)
            await self._answer(scope, body, receive, send)
        except Refused as refusal:
            with suppress(ConnectionError):
                if refusal.status != 408:
                    await _discard(receive)
                # What of the body was not read would be taken for the next request.
                await problem_json(refusal.status, str(refusal), {"Connection": "close"})(scope, receive, send)
        except ConnectionError:
            pass  # The client went while it was sending.
        finally:
            self.at_work -= 1

    def _knows_key(self, scope: MutableMapping[str, Any]) -> bool:
        if self.limits.key is None:
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.limits.key.encode())

    def _refusal(self, scope: MutableMapping[str, Any]) -> Refused | None:
        """What the headers alone tell."""
        headers, most = dict(scope["headers"]), self.limits.max_body_bytes
        if not self._knows_key(scope):
            return Refused(401, "A key is needed: send the header `Authorization: Bearer KEY`.")
        # Other kinds can be sent by any page that is open in a browser on this machine.
        if scope["method"] == "POST" and b"json" not in headers.get(b"content-type", b""):
            return Refused(415, "Send the header `Content-Type: application/json`.")
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > most:
            return Refused(413, f"The request is larger than {most:,} bytes, the most that this server takes.")
        return None

    async def _read_body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        if refusal := self._refusal(scope):
            raise refusal
        body, more, most = bytearray(), True, self.limits.max_body_bytes
        try:
            async with asyncio.timeout(self.limits.body_timeout_sec):
                while more:
                    part, more = await _next_part(receive)
                    body += part
                    if len(body) > most:
                        raise Refused(413, f"The request is larger than {most:,} bytes.")
        except TimeoutError:
            seconds = self.limits.body_timeout_sec
            raise Refused(408, f"The request did not arrive within {seconds:g} seconds.") from None
        return bytes(body)

    async def _answer(self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        started, ended, gone, given, late = False, False, asyncio.Event(), False, False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal started, ended
            if late:
                return
            started = True
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        answer = asyncio.ensure_future(self.app(scope, replay, noted))
        watch, ending = asyncio.ensure_future(until_gone()), asyncio.ensure_future(self._ending.wait())
        try:
            waited = {answer, watch, ending}
            await asyncio.wait(waited, timeout=self.limits.timeout_sec, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                late = not gone.is_set()
                # An app may work in tasks of its own, which it ends when its client goes, not when it is cancelled.
                gone.set()
                await asyncio.wait({answer}, timeout=0.3)
                if late and not ended:
                    await self._last_word(started, scope, receive, send)
            elif started and not ended and answer.exception():
                event = {"error": {"message": "The answer could not be finished.", "code": 500}}
                await send({"type": "http.response.body", "body": sse(event)})
                await answer
            else:
                await answer
        finally:
            for task in (answer, watch, ending):
                task.cancel()
            # An engine is told to stop while its route is cancelled.
            await asyncio.gather(answer, watch, ending, return_exceptions=True)

    async def _last_word(self, started: bool, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        status = 503 if self._ending.is_set() else 504
        message = f"The answer was not ready within {self.limits.timeout_sec:g} seconds. Ask for fewer tokens."
        if status == 503:
            message = "The server ends, and the answer was not ready. Try again later."
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_SEC):
                if started:
                    event = {"error": {"message": message, "code": status}}
                    await send({"type": "http.response.body", "body": sse(event)})
                else:
                    await problem_json(status, message)(scope, receive, send)


def sse(event: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


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
        if served.name == name:
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


class Answers:
    """Pieces of n answers, put together."""

    def __init__(self, n: int) -> None:
        self.texts = [""] * n
        self.finish_reasons: list[str | None] = [None] * n
        self.tokens = 0

    def add(self, piece: Piece) -> None:
        """Takes a piece."""
        self.texts[piece.index] += piece.text
        self.tokens += piece.tokens
        self.finish_reasons[piece.index] = piece.finish_reason or self.finish_reasons[piece.index]


async def collect(pieces: AsyncIterator[Piece], n: int) -> Answers:
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
        pieces = engine.generate(input_ids, sampling, served.name)
        if not question.stream:
            answers = await collect(pieces, question.n)
            return {
                "text": answers.texts,
                "finish_reason": answers.finish_reasons,
                "usage": usage(input_ids, answers.tokens),
            }

        async def events() -> AsyncIterator[dict[str, Any]]:
            async with aclosing(pieces):
                async for piece in pieces:
                    yield {"index": piece.index, "text": piece.text, "finish_reason": piece.finish_reason}

        return stream_response(events())

    @routes.api_route("/health", methods=["GET", "HEAD"])
    async def health(request: Request) -> Any:
        if problem := engine.problem():
            return problem_json(503, problem)
        told: dict[str, Any] = {"status": "ok", "engine": engine.name}
        if request.state.knows_key:
            told |= {"models": [served._asdict() for served in engine.models], "started": started}
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
