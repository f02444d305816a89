"""A teacher on 127.0.0.1 that speaks as much of the OpenAI API as is asked of it, and fails as real ones do."""

import asyncio
import itertools
import json
import random
import threading
import time
from collections import Counter, defaultdict
from typing import Any

FAULTS = ("429", "429 with Retry-After", "500", "dropped", "half a body", "no choices", "no content", "slow stream")
LOST = ("dropped", "half a body")  # The teacher has written an answer, and the client does not get it.


class TeacherServer:
    """Answers every question with text made of it.

    Attributes:
        url: What to put as base_url.
        log: For each last user message what became of its requests, in order: "answered" or the name of a fault.
        most_active: The most requests that were under way at a time.
        first_at, last_at: When the first request came and the last response went, seconds.
    """

    def __init__(
        self,
        latency: tuple[float, float] = (0.0, 0.0),
        faults: tuple[str, ...] = FAULTS,
        fault_every: int = 0,
        retry_after: str = "1",
        reply: Any = None,
    ) -> None:
        """Starts serving.

        Args:
            latency: Seconds that an answer takes, drawn between these.
            faults: What goes wrong, one after the other.
            fault_every: Of so many requests one fails; 0: none.
            retry_after: Seconds that "429 with Retry-After" asks for.
            reply: (messages) -> a "message" and "finish_reason", and perhaps the response's "usage", or an HTTP status;
                not given: a text.
        """
        self.latency, self.reply, self.retry_after = latency, reply or self._echo, retry_after
        self.faults, self.fault_every = itertools.cycle(faults), fault_every
        self.random = random.Random(0)
        self.log: dict[str, list[str]] = defaultdict(list)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.active = self.most_active = 0
        self.first_at = self.last_at = 0.0
        started = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self.thread.start()
        started.wait()

    def close(self) -> None:
        """Stops serving."""
        self.loop.call_soon_threadsafe(self.stopped.set)
        self.thread.join()

    def __enter__(self) -> "TeacherServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def outcomes(self) -> Counter[str]:
        """How often what happened."""
        return Counter(outcome for outcomes in self.log.values() for outcome in outcomes)

    @staticmethod
    def _echo(messages: list[dict[str, str]]) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": f"答：{messages[-1]['content']}"}, "finish_reason": "stop"}

    def _serve(self, started: threading.Event) -> None:
        async def serve() -> None:
            self.loop, self.stopped = asyncio.get_running_loop(), asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 20)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            started.set()
            await self.stopped.wait()
            server.close()

        asyncio.run(serve())

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")[1:]
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                self.first_at = self.first_at or time.monotonic()
                self.headers.append(headers)
                self.requests.append(body)
                self.active += 1
                self.most_active = max(self.most_active, self.active)
                try:
                    await self._respond(body["messages"], writer)
                finally:
                    self.active -= 1
                    self.last_at = time.monotonic()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # The client has gone.
        finally:
            writer.close()

    async def _respond(self, messages: list[dict[str, str]], writer: asyncio.StreamWriter) -> None:
        log = self.log[messages[-1]["content"]]
        fails = self.fault_every and len(self.requests) % self.fault_every == 0
        fault = next(self.faults) if fails else ""
        if fault.startswith(("429", "500")):
            log.append(fault)
            await self._send(writer, int(fault[:3]), {"error": {"message": "no"}}, "Retry-After" in fault)
            return
        await asyncio.sleep(self.random.uniform(*self.latency))
        choice = self.reply(messages)
        if isinstance(choice, int):
            log.append(str(choice))
            await self._send(writer, choice, {"error": {"message": "wrong key sk-secret-of-the-test", "code": "no"}})
            return
        if fault == "no content":
            choice = choice | {"message": choice["message"] | {"content": None}}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        if choice and "usage" in choice:
            usage, choice = choice["usage"], {name: part for name, part in choice.items() if name != "usage"}
        completion = {"id": "1", "object": "chat.completion", "created": 1, "model": "teacher", "usage": usage}
        completion["choices"] = [] if fault == "no choices" else [choice and {"index": 0} | choice]
        if fault in LOST:
            log.append(fault)
            if fault == "half a body":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{\"choi")
                await writer.drain()
            raise ConnectionResetError
        # Before it goes out: the client may be done, and the log be read, before this thread comes to the next line.
        log.append(fault if fault.startswith("no ") else "answered")
        await self._send(writer, 200, completion, slow=fault == "slow stream")

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, body: Any, retry: bool = False, slow: bool = False
    ) -> None:
        data = json.dumps(body).encode()
        head = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(data)}"]
        head += [f"retry-after: {self.retry_after}"] if retry else []
        writer.write("\r\n".join([*head, "", ""]).encode())
        for start in range(0, len(data), 50 if slow else len(data)):
            writer.write(data[start : start + (50 if slow else len(data))])
            await writer.drain()
            await asyncio.sleep(0.05 if slow else 0)
