"""Serves a finished model over HTTP: OpenAI's API, and this project's own route.

    python serve.py --model output_hf/BiliComments --port 8080
    python serve.py --model model/Qwen/Qwen2.5-0.5B --adapter tuned=deepspeed_ft/output/DS-Qwen2.5-0.5B/24
    API_KEY=… python serve.py --model output_hf/BiliComments --host 0.0.0.0 --api_key

On vLLM where it is installed (requirements_vllm.txt, an environment of its own), on transformers otherwise.

    POST /v1/chat/completions  /v1/completions  GET /v1/models     as OpenAI's
    POST /ai/llm/generation_stream     {"message": "你是谁", "history": [], "stream": true, …}
                                       or {"title": …, "desc": …, "parent": …} of a video and a comment, as in training
    GET  /health

Ctrl-C or SIGTERM: no new requests are taken, those at work are answered, then it ends.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from utils.files import from_root, shown


def build_parser() -> argparse.ArgumentParser:
    """The arguments; those that vLLM knows have its names."""
    parser = argparse.ArgumentParser(
        description="Serve a model over HTTP. Further arguments are passed on to vLLM, if that is the engine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a model, such as output_hf/BiliComments")
    add("--served_model_name", help="what clients call it (default: the folder's name)")
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
    add("--max_num_batched_tokens", type=int, default=2048, help="most tokens computed in one step")
    add("--gpu_memory_utilization", type=float, default=0.85, help="part of the card's memory to use")
    add("--max_requests", type=int, default=256, help="most requests at work or waiting; more get 429")
    add("--max_body_bytes", type=int, default=1_000_000, help="largest request")
    add("--timeout_sec", type=float, default=600, help="longest time for a request")
    add("--shutdown_sec", type=float, default=30, help="time for requests at work when the server is to end")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    return parser
