"""Who may ask the server, how much at once and for how long: limits around either engine's application."""

import asyncio
import hmac
import json
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
DISCARDED_BYTES = 32_000_000  # The most that is read of a refused request.
LAST_WORD_SEC = 5  # For clients that are slow to take, or to send, what is no longer wanted.


class Refused(Exception):
    """A request that is not answered; `status` is HTTP's, the message is written for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Limits:
    """What a server takes.

    Attributes:
        key: That clients must give; none: everybody may ask.
        max_body_bytes: The largest request.
        max_requests: Requests at once, running or waiting; more get 429.
        timeout_sec: The longest that one may take.
        body_timeout_sec: The longest that sending one may take.
        hosts: Names that the server answers to; None: to all. Without a key any page that is open in a browser on this
            machine could use it otherwise, under a name that leads here (DNS rebinding).
    """

    key: str | None = None
    max_body_bytes: int = 1_000_000
    max_requests: int = 256
    timeout_sec: float = 600
    body_timeout_sec: float = 30
    hosts: frozenset[str] | None = None


def open_socket(host: str, port: int) -> socket.socket:
    """Binds the port before the model is loaded, so that a port in use is an early error.

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


def sse(event: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _host_of(value: bytes, is_url: bool) -> str | None:
    """The name in a Host or an Origin header."""
    text = value.decode("latin-1")
    with suppress(ValueError):
        return urlsplit(text if is_url else f"//{text}").hostname
    return None


async def _next_part(receive: Receive) -> tuple[bytes, bool]:
    """A part of a body, and whether there are more."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ConnectionError
    return message.get("body", b""), message.get("more_body", False)


async def _discard(receive: Receive) -> None:
    """Reads the rest of a refused request for a while: many clients read the answer only after sending all."""
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
        self._arriving_bytes = 0  # Of bodies that are not whole yet.
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Ends all answers at work with a sentence, as the server is to end."""
        self._ending.set()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it. Only what is passed on counts as being at work."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_host(scope)
            if scope["path"] == "/health":
                scope.setdefault("state", {})["knows_key"] = self._knows_key(scope)
                await self.app(scope, receive, send)
                return
            self._check_headers(scope)
            self._check_load()
            body = await self._read_body(receive)
            self._check_load()
        except Refused as refusal:
            await self._refuse(refusal, scope, receive, send)
            return
        except ConnectionError:
            return  # The client went while it was sending.
        self.at_work += 1
        scope["at_work"] = True
        try:
            await _Exchange(self.app, self.limits, self._ending, scope, receive, send).run(body)
        except Refused as refusal:
            await self._refuse(refusal, scope, receive, send)
        except ConnectionError:
            pass
        finally:
            self.at_work -= 1

    async def _refuse(
        self, refusal: Refused, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:
        headers = {"Retry-After": "1"} if refusal.status == 429 else {}
        with suppress(ConnectionError):
            if refusal.status != 408:
                await _discard(receive)
            # What of the body was not read would be taken for the next request.
            await problem_json(refusal.status, str(refusal), headers | {"Connection": "close"})(scope, receive, send)

    def _check_host(self, scope: MutableMapping[str, Any]) -> None:
        """Raises `Refused` if a request is for another server, or from a page of one."""
        if self.limits.hosts is None:
            return
        given = [(name, value) for name, value in scope["headers"] if name in (b"host", b"origin")]
        for name, value in given:
            if _host_of(value, is_url=name == b"origin") not in self.limits.hosts:
                known = ", ".join(sorted(self.limits.hosts))
                raise Refused(
                    403,
                    f"Without a key this server answers to {known} alone, and to their own pages. To be asked under "
                    "other names, as behind a proxy, start it with --api_key.",
                )

    def _check_load(self) -> None:
        """Raises `Refused` if too many requests are being served."""
        limits = self.limits
        if self.at_work >= limits.max_requests or self._arriving_bytes > limits.max_requests * limits.max_body_bytes:
            raise Refused(
                429, f"{self.at_work} requests are at work or waiting, as many as this server takes. Try again soon."
            )

    def _knows_key(self, scope: MutableMapping[str, Any]) -> bool:
        if self.limits.key is None:
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.limits.key.encode())

    def _check_headers(self, scope: MutableMapping[str, Any]) -> None:
        """Raises `Refused` for what the headers alone tell."""
        headers, most = dict(scope["headers"]), self.limits.max_body_bytes
        if not self._knows_key(scope):
            raise Refused(401, "A key is needed: send the header `Authorization: Bearer KEY`.")
        # Other kinds can be sent by any page that is open in a browser on this machine.
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json" and not kind.endswith(b"+json"):
            raise Refused(415, "Send the header `Content-Type: application/json`.")
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > most:
            raise Refused(413, f"The request is larger than {most:,} bytes, the most that this server takes.")

    async def _read_body(self, receive: Receive) -> bytes:
        body, more, most = bytearray(), True, self.limits.max_body_bytes
        try:
            async with asyncio.timeout(self.limits.body_timeout_sec):
                while more:
                    part, more = await _next_part(receive)
                    body += part
                    self._arriving_bytes += len(part)
                    if len(body) > most:
                        raise Refused(413, f"The request is larger than {most:,} bytes.")
                    self._check_load()
        except TimeoutError:
            seconds = self.limits.body_timeout_sec
            raise Refused(408, f"The request did not arrive within {seconds:g} seconds.") from None
        finally:
            self._arriving_bytes -= len(body)
        return bytes(body)


class _Exchange:
    """One request that was read, and its answer.

    Attributes:
        started: The client was sent a beginning.
        ended: It was sent everything.
        late: Time is up: what the app still sends is discarded.
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        ending: asyncio.Event,
        scope: MutableMapping[str, Any],
        receive: Receive,
        send: Send,
    ) -> None:
        self._app, self._limits, self._ending = app, limits, ending
        self._scope, self._receive, self._send = scope, receive, send
        self._body: bytes | None = None
        self._gone = asyncio.Event()
        self.started = self.ended = self.late = False

    async def run(self, body: bytes) -> None:
        """Lets the app answer until that is done, the client goes, time is up or the server ends."""
        self._body = body
        answer = asyncio.ensure_future(self._app(self._scope, self._replay, self._noted))
        watch, ending = asyncio.ensure_future(self._until_gone()), asyncio.ensure_future(self._ending.wait())
        try:
            waited = {answer, watch, ending}
            await asyncio.wait(waited, timeout=self._limits.timeout_sec, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.late = not self._gone.is_set()
                # An app may work in tasks of its own, which it ends when its client goes, not when it is cancelled.
                self._gone.set()
                await asyncio.wait({answer}, timeout=0.3)
                if self.late and not self.ended:
                    await self._last_word()
            elif self.started and not self.ended and answer.exception():
                await self._send_error(500, "The answer could not be finished.")
                await answer
            else:
                await answer
        finally:
            for task in (answer, watch, ending):
                task.cancel()
            # Cancelling a route aborts its request in the engine.
            await asyncio.gather(answer, watch, ending, return_exceptions=True)

    async def _replay(self) -> MutableMapping[str, Any]:
        """What the app receives: the body once, then that its client has gone."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _noted(self, message: MutableMapping[str, Any]) -> None:
        """Passes on what the app sends."""
        if self.late:
            return
        self.started = True
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone.set()

    async def _send_error(self, status: int, message: str) -> None:
        """Ends an answer, or begins and ends it."""
        if self.started:
            event = {"error": {"message": message, "code": status}}
            await self._send({"type": "http.response.body", "body": sse(event)})
        else:
            await problem_json(status, message)(self._scope, self._receive, self._send)

    async def _last_word(self) -> None:
        status = 503 if self._ending.is_set() else 504
        message = f"The answer was not ready within {self._limits.timeout_sec:g} seconds. Ask for fewer tokens."
        if status == 503:
            message = "The server ends, and the answer was not ready. Try again later."
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_SEC):
                await self._send_error(status, message)
