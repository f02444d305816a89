"""Measures the server on both engines, against transformers' `generate` and `serve` and vLLM's own server.

    python benchmarks/bench_serve.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4
    python benchmarks/bench_serve.py --model … --vllm_python .venv-vllm/bin/python

Clients that each send their next request when the last one is answered ask for comments under videos, greedily, as
streams. Every system gets the same requests in the same order, the systems take turns. Prints a markdown table of
medians over the rounds and a JSON line.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from utils.data.records import SYSTEM_PROMPT, comment_prompt  # noqa: E402
from utils.files import from_root  # noqa: E402

WORDS = "教程 测评 开箱 游戏 音乐 美食 旅行 学习 科技 生活 搞笑 动画 影视 舞蹈 知识 汽车 运动 手工 绘画 读书".split()


class Asked(NamedTuple):
    """One request that was answered.

    Attributes:
        first_sec: Until the first text.
        tokens: Of the answer.
    """

    first_sec: float
    tokens: int


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--vllm_python", help="the Python of vLLM's environment")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    return parser


def some_messages(number: int) -> list[dict[str, str]]:
    """A question like those of training; eight comments under each video."""
    video = random.Random(number // 8)
    title, desc = " ".join(video.choices(WORDS, k=8)), "，".join(video.choices(WORDS, k=40))
    parent = "".join(random.Random(-number).choices(WORDS, k=6))
    question = comment_prompt(title, desc, parent)
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


# ---------------------------------------------------------------------------------------------------------------------
# Clients


async def ask(port: int, model: str, number: int, tokens: int) -> Asked:
    """Sends one request to a server and reads its stream."""
    body = {"model": model, "messages": some_messages(number), "max_tokens": tokens, "temperature": 0}
    raw = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    began, first = time.perf_counter(), None
    writer.write(head.encode() + raw)
    if b" 200 " not in (status := await reader.readline()):
        raise RuntimeError(f"{status!r} {await reader.read(2000)!r}")
    written = chunks = 0
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            said = [choice["delta"].get("content") for choice in event["choices"]]
            chunks += any(said)
            if first is None and any(said):
                first = time.perf_counter() - began
            written = (event.get("usage") or {}).get("completion_tokens") or written
    writer.close()
    # transformers' own server counts no tokens in a stream; it sends one a chunk.
    return Asked(first or time.perf_counter() - began, written or chunks)


async def crowd(port: int, model: str, clients: int, args: argparse.Namespace, start: int) -> tuple[list[Asked], float]:
    """Lets clients ask one after the other."""
    numbers, last = count(start), start + clients * args.requests

    async def client() -> list[Asked]:
        found = []
        while (number := next(numbers)) < last:
            found.append(await ask(port, model, number, args.tokens))
        return found

    began = time.perf_counter()
    found = await asyncio.gather(*[client() for _ in range(clients)])
    return [one for answers in found for one in answers], time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------------------
# Systems


@contextmanager
def process(command: list[str], port: int, **environment: str) -> Iterator[int]:
    """A server as a process of its own, until the block ends."""
    log = ROOT / "benchmarks/output/bench_serve.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | environment, cwd=ROOT)
        try:
            while True:
                if server.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} ended:\n{log.read_text()[-3000:]}")
                try:
                    with socket.create_connection(("127.0.0.1", port), 1) as connection:
                        connection.settimeout(5)
                        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                        if b" 200 " in connection.recv(100):
                            break
                except OSError:
                    pass
                time.sleep(0.5)
            yield port
        finally:
            server.terminate()
            server.wait(60)


def free_port() -> int:
    """A port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


VLLM = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
LENGTH = ["--max_model_len", "1024", "--max_num_seqs", "32"]


def ours(args: argparse.Namespace) -> Any:
    """serve.py on transformers."""
    port = free_port()
    command = [sys.executable, "serve.py", "--model", args.model, "--engine", "transformers", *LENGTH]
    return process([*command, "--served_model_name", "m", "--port", str(port)], port)


def ours_on_vllm(args: argparse.Namespace) -> Any:
    """serve.py on vLLM."""
    port = free_port()
    command = [args.vllm_python, "serve.py", "--model", args.model, "--engine", "vllm", *LENGTH]
    return process([*command, "--served_model_name", "m", "--port", str(port)], port, **VLLM)


def vllm(args: argparse.Namespace) -> Any:
    """vLLM's own server, with the settings that serve.py gives it."""
    port = free_port()
    # Not `vllm serve`, which asks for a package named vllm: that of CPUs is named vllm-cpu.
    command = [args.vllm_python, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    flags = ["--model", str(from_root(args.model)), "--served-model-name", "m", "--dtype", "float32"]
    flags += ["--port", str(port), "--host", "127.0.0.1"]
    # Those of CPUs, from utils/serve/vllm_settings.py.
    flags += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", LENGTH[1]]
    return process([*command, *flags, *[flag.replace("_", "-") for flag in LENGTH]], port, **VLLM)


def transformers_serve(args: argparse.Namespace) -> Any:
    """transformers' own server with continuous batching."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(from_root(args.model))]
    flags = ["--continuous-batching", "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
    return process([*command, *flags], port, HF_HUB_OFFLINE="1")


def generate(args: argparse.Namespace, clients: int, start: int) -> tuple[list[Asked], float]:
    """transformers' `generate` in this process, one prompt after the other, whatever the number of clients."""
    import torch
    from transformers.generation import BaseStreamer

    class Watch(BaseStreamer):
        def __init__(self) -> None:
            self.at: list[float] = []  # The prompt's, and each token's.

        def put(self, value: torch.Tensor) -> None:
            self.at.append(time.perf_counter())

        def end(self) -> None:
            pass

    model, chat = loaded(args.model)
    found, began = [], time.perf_counter()
    for number in range(start, start + clients * args.requests):
        ids, watch, asked = torch.tensor([chat.prompt_ids(some_messages(number))]), Watch(), time.perf_counter()
        settings = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": chat.stop_id}
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=watch, eos_token_id=chat.stop_id, **settings)
        found.append(Asked(watch.at[1] - asked, len(watch.at) - 1))
    return found, time.perf_counter() - began


def engine_alone(args: argparse.Namespace, clients: int, start: int) -> tuple[list[Asked], float]:
    """The engine of serve.py in this process, without HTTP."""
    from contextlib import aclosing

    from utils.serve.routes import Sampling, Served
    from utils.serve.transformers_engine import Capacity, TransformersEngine

    model, chat = loaded(args.model)
    attention = model.config._attn_implementation
    engine = TransformersEngine(model, chat, [Served("m", None)], [], Capacity(1024, 32, 512, 32 * 1056))
    sampling, numbers, last = Sampling(temperature=0, max_tokens=args.tokens), count(start), 0

    async def client() -> list[Asked]:
        found = []
        while (number := next(numbers)) < last:
            began, first, tokens = time.perf_counter(), 0.0, 0
            ids = await engine.prompt_ids(some_messages(number))
            async with aclosing(engine.generate(ids, sampling, "m")) as pieces:
                async for piece in pieces:
                    first, tokens = first or time.perf_counter() - began, tokens + piece.tokens
            found.append(Asked(first, tokens))
        return found

    async def crowd() -> tuple[list[Asked], float]:
        nonlocal last
        last = start + 1
        await client()  # The first request makes the cache.
        last = start + 1 + clients * args.requests
        began = time.perf_counter()
        found = await asyncio.gather(*[client() for _ in range(clients)])
        return [one for answers in found for one in answers], time.perf_counter() - began

    try:
        return asyncio.run(crowd())
    finally:
        engine.close()
        model.config._attn_implementation = attention


@cache
def loaded(model: str) -> Any:
    """A model and its chat template."""
    from utils.serve.generate import load_for_inference

    return load_for_inference(from_root(model))


HERE = {"generate": generate, "serve.py's engine alone": engine_alone}
SERVERS = {
    "transformers serve": transformers_serve,
    "serve.py, transformers": ours,
    "vLLM": vllm,
    "serve.py, vLLM": ours_on_vllm,
}
SYSTEMS = (*HERE, *SERVERS)


def measure(system: str, args: argparse.Namespace, round: int) -> dict[int, dict[str, float]]:
    """Measures a system with each number of clients.

    Returns:
        Number of clients -> requests/s, tokens/s, median seconds to the first text.
    """
    rows = {}

    def note(clients: int, found: list[Asked], seconds: float) -> None:
        rows[clients] = {
            "requests": len(found) / seconds,
            "tokens": sum(one.tokens for one in found) / seconds,
            "first": statistics.median(one.first_sec for one in found),
        }

    # No prompt comes twice in a round, so that no cache knows it.
    starts = {clients: 100_000 * round + 1000 * place for place, clients in enumerate(args.concurrency)}
    if system == "generate":  # However many wait, it takes them one by one.
        note(1, *generate(args, 2, starts[args.concurrency[0]]))
        return dict.fromkeys(args.concurrency, rows[1])
    if system in HERE:
        for clients in args.concurrency:
            note(clients, *HERE[system](args, clients, starts[clients]))
        return rows
    name = str(from_root(args.model)) if system == "transformers serve" else "m"
    with SERVERS[system](args) as port:
        asyncio.run(ask(port, name, -1, args.tokens))
        for clients in args.concurrency:
            note(clients, *asyncio.run(crowd(port, name, clients, args, starts[clients])))
    return rows


def main(args: argparse.Namespace) -> None:
    """Measures by turns and prints medians."""
    systems = [system for system in args.systems if "vLLM" not in system or args.vllm_python]
    found: dict[str, list[dict[int, dict[str, float]]]] = {system: [] for system in systems}
    for round in range(args.rounds):
        for system in systems[round % len(systems) :] + systems[: round % len(systems)]:
            found[system].append(measure(system, args, round))
            print(f"# {round} {system}: {json.dumps(found[system][-1])}", file=sys.stderr, flush=True)
    print("| system | clients | requests/s | tokens/s | first text, s |\n|---|---|---|---|---|")
    for clients in args.concurrency:
        for system in systems:
            row = {
                name: statistics.median(rows[clients][name] for rows in found[system])
                for name in ("requests", "tokens", "first")
            }
            numbers = f"{row['requests']:.2f} | {row['tokens']:.1f} | {row['first']:.2f}"
            print(f"| {system} | {clients} | {numbers} |")
    print(json.dumps({"model": args.model, "tokens": args.tokens, "requests": args.requests, "rounds": found}))


if __name__ == "__main__":
    main(build_parser().parse_args())
