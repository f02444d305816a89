"""Lets a crowd loose on the server: many who ask, many who go in the middle of an answer, many who send nonsense.

    python benchmarks/check_serve.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4
    python benchmarks/check_serve.py --model … --python .venv-vllm/bin/python     # on vLLM

Every request has to get its answer, or a 4xx with a reason; nobody who stays may be forgotten, and the server's memory
must not grow once it has seen the crowd. Prints what came back, and ends with an error if that is not so.

On vLLM this is asked of the process that serves. What vLLM's own processes hold is printed: on CPUs its worker's heap
grows for many minutes, ever more slowly, and does so under vLLM's own server too.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from bench_serve import VLLM, free_port, process, some_messages  # noqa: E402

KEY = "check-serve"
MAX_GROWTH = 1.03  # Of the server's memory from the middle of the load to after its end.
CHAT, OWN, TEXT = "/v1/chat/completions", "/ai/llm/generation_stream", "/v1/completions"


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--python", default=sys.executable, help="that of the environment to serve from")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    return parser


def good(dice: random.Random, tokens: int) -> tuple[str, bytes]:
    """A request that has an answer, with fields that nobody knows now and then."""
    messages = some_messages(dice.randrange(10_000))
    extra: dict[str, Any] = {"max_tokens": dice.randint(1, tokens), "stream": dice.random() < 0.5}
    if dice.random() < 0.3:
        extra |= {"n": dice.randint(2, 4), "temperature": dice.choice([0.3, 1.0, 2.0]), "seed": dice.randrange(1000)}
    if dice.random() < 0.2:
        extra |= {"who_knows": {"deep": [1, {"a": None}]}, "user": "somebody", "stop": ["。", "\n\n"]}
    if dice.random() < 0.1:
        extra |= {"top_p": 1e-320, "temperature": 1e-30}
    if dice.random() < 0.2:
        extra |= {"frequency_penalty": 1.2, "top_p": 0.9}
    if dice.random() < 0.5:
        extra |= {"stop_token_ids": [151643]}  # Not of every model: vLLM's own routes refuse it then.
        return OWN, json.dumps({"message": messages[-1]["content"], "history": [["一", "二"]]} | extra).encode()
    return CHAT, json.dumps({"model": "m", "messages": messages} | extra).encode()


def bad(dice: random.Random, tokens: int) -> tuple[str, bytes]:
    """A request that is none."""
    route = dice.choice([CHAT, OWN, TEXT])
    whole: dict[str, Any] = {"model": "m", "message": "a", "prompt": "a", "max_tokens": tokens}
    whole["messages"] = [{"role": "user", "content": "a"}]
    changes: dict[str, Any] = dice.choice(
        [
            {"max_tokens": -1}, {"max_tokens": 10**30}, {"temperature": -5}, {"temperature": 1e300},
            {"temperature": "hot"}, {"n": 0}, {"n": 10**9}, {"top_p": 7}, {"seed": -(2**70)}, {"stop": 5},
            {"stop_token_ids": ["a"]}, {"model": "nobody"}, {"messages": 5, "message": 5, "prompt": {}},
            {"messages": [], "message": "", "prompt": ""}, {"frequency_penalty": 99}, {"repetition_penalty": 1e-38},
            {"stop": "x" * 500_000}, {"stop": ["x"] * 1000},
        ]
    )  # fmt: skip
    body = json.dumps(whole | changes).encode()
    nonsense = [b"", b"{", b"[" * 3000, b"\xff\xfe", b"null", b'{"a": NaN}', b'{"messages": ' + b"9" * 6000 + b"}"]
    return route, dice.choice([body, body, dice.choice(nonsense)])


class Crowd:
    """What came back."""

    def __init__(self, port: int, args: argparse.Namespace) -> None:
        self.port, self.args = port, args
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def send(self, route: str, body: bytes, key: str = KEY, leave_sec: float | None = None) -> tuple[int, bytes]:
        """Sends a request; goes away after a while, if asked to.

        Returns:
            Status and body; 0 for who left.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            writer.write(head.encode())
            for start in range(0, len(body), 65536):
                writer.write(body[start : start + 65536])
                await writer.drain()
        except ConnectionError:
            pass  # Refused before all was sent; the answer may be there all the same.
        try:
            if leave_sec is not None:
                await asyncio.sleep(leave_sec)
                return 0, b""
            async with asyncio.timeout(300):
                said = await reader.read()
            return int(said.split(b" ", 2)[1]), said.partition(b"\r\n\r\n")[2]
        except (ConnectionError, IndexError):
            return -1, b""
        finally:
            writer.close()

    def note(self, kind: str, status: int, said: bytes, expected: set[int]) -> None:
        """Counts an answer, and keeps one that should not have come."""
        self.counts[f"{kind}: {status or 'left'}"] += 1
        # 429: more than the server takes. A reason comes with every refusal.
        fits = status in expected | {429} and (status in (0, 200) or b"message" in said)
        if status == 200 and (b'"error"' in said or b"finish_reason" not in said):
            fits = False
        if not fits:
            self.wrong.append(f"{kind}: {status} {said[:300]!r}")

    async def client(self, number: int, end: float) -> None:
        """One who asks, one after the other, in one of many ways."""
        dice = random.Random(number)
        while time.monotonic() < end:
            lot = dice.random()
            if lot < 0.33:
                route, body = good(dice, self.args.tokens)
                self.note("leaves", *await self.send(route, body, leave_sec=dice.uniform(0, 1.5)), {0})
            elif lot < 0.75:
                route, body = good(dice, self.args.tokens)
                self.note("asks", *await self.send(route, body), {200})
            elif lot < 0.92:
                route, body = bad(dice, self.args.tokens)
                # Of some of it vLLM makes something.
                self.note("nonsense", *await self.send(route, body), {200, 400, 404, 413, 422})
            elif lot < 0.97:
                route, body = good(dice, self.args.tokens)
                self.note("wrong key", *await self.send(route, body, key="guessed"), {401})
            else:
                body = b'{"message": "' + b"a" * 10_000_000 + b'"}'
                self.note("10 MB", *await self.send(OWN, body), {413})

    async def run(self, server: psutil.Process) -> AsyncIterator[list[float]]:
        """The whole crowd; yields what `memory_gb` says in the middle of it, and after the end."""
        end = time.monotonic() + self.args.seconds
        clients = asyncio.gather(*[self.client(number, end) for number in range(self.args.clients)])
        await asyncio.sleep(self.args.seconds / 2)
        yield memory_gb(server)
        await clients
        await asyncio.sleep(5)
        status, said = await self.send(OWN, b'{"message": "a", "max_tokens": 2}')
        self.note("after it", status, said, {200})
        yield memory_gb(server)


def memory_gb(server: psutil.Process) -> list[float]:
    """What a server holds, and what the processes hold that it started."""
    held = [sum(one.memory_info().rss for one in group) for group in ([server], server.children(recursive=True))]
    return [size / 1e9 for size in held]


def started(command: list[str]) -> Iterator[psutil.Process]:
    """The process that was started with a command."""
    return (one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == command)


def main(args: argparse.Namespace) -> None:
    """Serves, and lets the crowd in."""
    port = free_port()
    command = [args.python, "serve.py", "--model", args.model, "--served_model_name", "m", "--port", str(port)]
    command += ["--api_key", "CHECK_SERVE_KEY", "--max_model_len", "1024"]

    async def crowd() -> list[list[float]]:
        return [held async for held in found.run(server)]

    with process(command, port, CHECK_SERVE_KEY=KEY, **VLLM):
        server, found = next(started(command)), Crowd(port, args)
        before = memory_gb(server)
        middle, after = asyncio.run(crowd())
    for kind, number in sorted(found.counts.items()):
        print(f"{kind:24} {number}")
    for whose, *held in zip(("server", "processes it started"), before, middle, after, strict=True):
        print("memory, {}: {:.3f} GB before, {:.3f} GB in the middle, {:.3f} GB after".format(whose, *held))
    answered = sum(number for kind, number in found.counts.items() if kind == "asks: 200")
    if found.wrong or after[0] > middle[0] * MAX_GROWTH or not answered:
        raise SystemExit("\n".join([f"{len(found.wrong)} answers that should not have come", *found.wrong[:10]]))
    print("Every request got its answer, or a reason.")


if __name__ == "__main__":
    os.chdir(ROOT)
    main(build_parser().parse_args())
