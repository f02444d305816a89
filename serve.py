"""Serves a finished model over HTTP: OpenAI's API, and this project's own route.

    python serve.py --model output_hf/BiliComments --port 8080
    python serve.py --model model/Qwen/Qwen2.5-0.5B --adapter tuned=deepspeed_ft/output/DS-Qwen/Qwen2.5-0.5B/24
    API_KEY=… python serve.py --model output_hf/BiliComments --host 0.0.0.0 --api_key

On vLLM where it is installed (requirements_vllm.txt, an environment of its own), on transformers otherwise.

    POST /v1/chat/completions  /v1/completions  GET /v1/models     as OpenAI's
    POST /ai/llm/generation_stream     {"message": "你是谁", "history": [], "stream": true, …}
                                       or {"title": …, "desc": …, "parent": …} of a video and a comment, as in training
    GET  /health

Ctrl-C or SIGTERM: no new requests are taken, those at work have --shutdown_sec to end, then it ends.
"""

import argparse
import asyncio
import math
import os
import signal
import sys
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from socket import socket
from threading import Thread, main_thread
from typing import Any, NamedTuple

from utils.cli import ArgumentParser, dashes_to_underscores
from utils.files import explained, from_root, shown


def build_parser() -> argparse.ArgumentParser:
    """The arguments; those that vLLM knows have its names."""
    parser = ArgumentParser(
        description="Serve a model over HTTP. Further arguments are passed on to vLLM, if that is the engine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a model, such as output_hf/BiliComments")
    add("--served_model_name", help="what clients call it (default: the folder's name; also --model as it is given)")
    add("--adapter", action="append", default=[], metavar="NAME=PATH",
        help="an adapter beside the model, which clients ask for by NAME; may be given several times")  # fmt: skip
    add("--bits", type=int, choices=[4, 8], help="weights in 4 bits (NF4) or 8; not given: 4 for adapters of QLoRA")
    add("--engine", choices=["auto", "vllm", "transformers"], default="auto", help="auto: vLLM if it is installed")
    add("--host", default="127.0.0.1", help="0.0.0.0: reachable from other machines; use --api_key then")
    add("--port", type=int, default=8080, help="0: any free one")
    add("--api_key", nargs="?", const="API_KEY", metavar="VARIABLE",
        help="ask clients for a key: the content of this environment variable (API_KEY if none is named)")  # fmt: skip
    add("--max_model_len", type=int, help="longest prompt and answer, tokens (default: the model's, at most 4096)")
    add("--max_num_seqs", type=int, default=32, help="most answers written at once; others wait")
    add("--max_num_batched_tokens", type=int, help="most tokens computed in one step (default: 512 on CPUs, or 2048)")
    add("--gpu_memory_utilization", type=float, default=0.85, help="part of the card's memory to use")
    add("--max_requests", type=int, default=256, help="most requests at work or waiting; more get 429")
    add("--max_body_bytes", type=int, default=1_000_000, help="largest request")
    add("--timeout_sec", type=float, default=600, help="longest time for a request")
    add("--shutdown_sec", type=float, default=30, help="time for requests at work when the server is to end")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    return parser


LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Plan(NamedTuple):
    """What is served, as the arguments say.

    Attributes:
        path: The model's folder.
        name: What clients call it.
        given: What --model was given, if clients may call it so as well; else "".
        adapters: Name -> folder.
        limits: What the server takes.
    """

    path: Path
    name: str
    given: str
    adapters: dict[str, Path]
    limits: Any


def make_plan(args: argparse.Namespace) -> Plan:
    """Checks the arguments before anything is loaded.

    Raises:
        SystemExit: naming what is wrong.
    """
    path = from_root(args.model)
    if not (path / "config.json").is_file():
        raise SystemExit(
            f"--model: no model at {shown(path)} (expected a folder with config.json and weights).\n"
            "Convert a training checkpoint with convert_model.py, or fetch a model with download_pt.py."
        )
    for name, fits, expected in (
        ("port", 0 <= args.port < 65536, "from 0 to 65535"),
        ("max_model_len", args.max_model_len is None or args.max_model_len >= 64, "64 tokens or more"),
        ("max_num_seqs", args.max_num_seqs > 0, "1 or more"),
        ("max_num_batched_tokens", (args.max_num_batched_tokens or 1) > 0, "1 or more"),
        ("gpu_memory_utilization", 0 < args.gpu_memory_utilization <= 1, "more than 0 but not more than 1"),
        ("max_requests", args.max_requests > 0, "1 or more"),
        ("max_body_bytes", args.max_body_bytes > 0, "1 or more"),
        ("timeout_sec", 0 < args.timeout_sec < math.inf, "more than 0"),
        ("shutdown_sec", 0 <= args.shutdown_sec < math.inf, "0 or more"),
    ):
        if not fits:
            raise SystemExit(f"--{name}: got {getattr(args, name)}, expected {expected}.")
    if args.max_num_batched_tokens and args.max_num_batched_tokens < args.max_num_seqs:
        raise SystemExit(
            f"--max_num_batched_tokens: got {args.max_num_batched_tokens}, expected at least the {args.max_num_seqs} "
            "of --max_num_seqs: each answer takes one token a step."
        )
    name = args.served_model_name or path.name
    adapters: dict[str, Path] = {}
    for text in args.adapter:
        adapter, _, folder = text.partition("=")
        if not adapter or not folder:
            raise SystemExit(f"--adapter: got {text!r}, expected NAME=PATH, such as tuned=deepspeed_ft/output/…/24")
        if adapter == name or adapter in adapters:
            raise SystemExit(f"--adapter: the name {adapter!r} is given twice (the model's is {name!r}).")
        adapters[adapter] = from_root(folder)
        if not any((adapters[adapter] / part / "adapter_config.json").is_file() for part in ("", "adapter")):
            raise SystemExit(f"--adapter: no adapter_config.json in {shown(adapters[adapter])}.")
    given = "" if args.served_model_name or args.model == name else args.model
    return Plan(path, name, given, adapters, make_limits(args))


def make_limits(args: argparse.Namespace) -> Any:
    """What the server takes.

    Raises:
        SystemExit: if a key is asked for, and there is none. What was given is not repeated: it may be the key.
    """
    from utils.serve.limits import Limits

    key = None
    if args.api_key:
        key = os.environ.get(args.api_key)
        if not key:
            raise SystemExit(
                "--api_key: expected the NAME of an environment variable that holds the key (API_KEY if none is "
                "given), and there is no such variable, or it is empty.\nSet it first: export API_KEY=…   and then: "
                "python serve.py … --api_key"
            )
    hosts = frozenset((*LOOPBACK, args.host.lower())) if key is None and is_loopback(args.host) else None
    return Limits(key, args.max_body_bytes, args.max_requests, args.timeout_sec, hosts=hosts)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's for itself."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def load_engine(args: argparse.Namespace, plan: Plan) -> Any:
    """Loads the model into the transformers engine and tries it.

    Raises:
        SystemExit: if it cannot be loaded, does not fit, or the engine cannot run it.
    """
    from transformers.utils import logging

    from utils.serve.capacity import find_capacity
    from utils.serve.generate import load_for_inference, tuning_of
    from utils.serve.routes import Served
    from utils.serve.transformers_engine import TransformersEngine, check_engine

    logging.disable_progress_bar()
    with explained(f"{shown(plan.path)} cannot be served"):
        served = [Served(plan.name, tuning_of(plan.path).system_prompt, plan.given)]
        served += [Served(name, tuning_of(folder).system_prompt) for name, folder in plan.adapters.items()]
        model, chat = load_for_inference(plan.path, args.trust_remote_code, plan.adapters, args.bits)
        capacity = find_capacity(model, chat, len(served), args)
        engine = TransformersEngine(model, chat, served, [*plan.adapters], capacity)
        check_engine(engine)
    return engine


def make_server(args: argparse.Namespace, plan: Plan, engine: Any) -> Any:
    """Puts the HTTP application around the transformers engine."""
    import uvicorn
    from fastapi import FastAPI

    from utils.serve.connections import BACKLOG, limit_log_rate, limited_protocol, most_connections
    from utils.serve.limits import LAST_WORD_SEC, Guard
    from utils.serve.openai_routes import openai_routes
    from utils.serve.routes import add_error_handlers, own_routes

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_error_handlers(app)
    app.include_router(own_routes(engine))
    app.include_router(openai_routes(engine))
    guard = Guard(app, plan.limits)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket] | None = None) -> None:
            """Waits for running answers for a while; then ends the others with an error."""
            asyncio.get_running_loop().call_later(args.shutdown_sec, guard.end)
            await super().shutdown(sockets)

    # uvicorn itself would only cut them off.
    patience = math.ceil(args.shutdown_sec + 2 * LAST_WORD_SEC)
    protocol = limited_protocol(most_connections())
    config = uvicorn.Config(
        guard, http=protocol, ws="none", backlog=BACKLOG, log_level="warning", timeout_graceful_shutdown=patience
    )
    limit_log_rate()
    return Server(config)


def serve_in_background(arguments: list[str]) -> str:
    """Serves from a thread of this process, on a free port of this machine, until the process ends.

    Args:
        arguments: As on the command line.

    Returns:
        The server's address, such as http://127.0.0.1:40123, once it answers.

    Raises:
        SystemExit: as on the command line.
    """
    from utils.serve.limits import open_socket

    args = build_parser().parse_args([*arguments, "--port", "0", "--host", "127.0.0.1", "--engine", "transformers"])
    plan = make_plan(args)
    engine = load_engine(args, plan)
    server, listening = make_server(args, plan, engine), open_socket(args.host, args.port)
    worker = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    worker.start()

    def end_with_main() -> None:
        main_thread().join()
        server.should_exit = True
        worker.join()

    Thread(target=end_with_main).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def main(args: argparse.Namespace, further: list[str]) -> None:
    """Serves until a signal."""
    plan = make_plan(args)
    if args.engine == "vllm" and not find_spec("vllm"):
        raise SystemExit(
            "--engine vllm: vLLM is not installed in this environment. It has one of its own:\n"
            "python3 -m venv .venv-vllm && .venv-vllm/bin/pip install -r requirements_vllm.txt\n"
            ".venv-vllm/bin/python serve.py …"
        )
    use_vllm = args.engine == "vllm" or (args.engine == "auto" and find_spec("vllm"))
    if not is_loopback(args.host) and not plan.limits.key:
        print(f"Note: {args.host} can be reached from other machines, and everybody may ask: consider --api_key.")
    if use_vllm:
        print("Engine: vLLM.", flush=True)
        from utils.serve.vllm_engine import run

        run(args, further, plan)
        return
    if further:
        meant = build_parser().suggestion(further[0])
        raise SystemExit(f"{further[0]}: unknown here.{meant} vLLM's arguments need --engine vllm, and vLLM installed.")
    why = "" if args.engine == "transformers" else " (vLLM, which is faster on cards, is not installed here)"
    print(f"Engine: transformers{why}.", flush=True)
    from utils.serve.limits import open_socket

    listening = open_socket(args.host, args.port)
    engine = load_engine(args, plan)
    server, port = make_server(args, plan, engine), listening.getsockname()[1]
    # Until uvicorn has its own handlers; when it has ended, it sends itself what it caught once more.
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: setattr(server, "should_exit", True))
    names = ", ".join(served.name for served in engine.models)
    print(f"Serving {names} at http://{args.host}:{port} (prompt and answer: {engine.max_model_len:,} tokens).")
    print(
        f"Try: curl http://127.0.0.1:{port}/ai/llm/generation_stream -H 'Content-Type: application/json' "
        """-d '{"message": "你是谁", "stream": true}'""",
        flush=True,
    )
    try:
        server.run(sockets=[listening])
    finally:
        engine.close()


if __name__ == "__main__":
    try:
        main(*build_parser().parse_known_args(dashes_to_underscores(sys.argv[1:])))
    except KeyboardInterrupt:
        sys.exit(130)
