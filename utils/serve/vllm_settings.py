"""How vLLM is started: its arguments, what suits small cards and CPUs, and what helps when it does not start.

What concerns graphics cards was read in vLLM's source; the tests run its CPU build.
"""

import argparse
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils.cli import GIB
from utils.files import explained, read_json, reason_of, shown

# The default context length: comments are short, and longer contexts take memory from other requests.
MODEL_LEN = 4096
# CUDA graphs take some hundred MB, which small cards need for weights and the cache.
SMALL_CARD_BYTES = 12.5 * GIB
CPU_CACHE_BYTES = 2 * GIB
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # What vLLM has kernels for.
# vLLM's ways to start that are not this server's: other programs, or several processes, each with limits of its own.
OTHER_PROGRAMS = {
    "headless": "start further nodes with vLLM itself: vllm serve MODEL --headless …, or use Ray",
    "grpc": "this server speaks HTTP",
    "uds": "this server listens on --host and --port",
    "api_server_count": "this server is one process",
    "lora_modules": "give --adapter NAME=PATH",
}


def vllm_settings(args: argparse.Namespace, further: Sequence[str], plan: Any) -> tuple[Any, dict[str, Any]]:
    """Makes vLLM's own namespace of the arguments, with this project's defaults where nothing was said.

    Returns:
        The namespace, and what is known of the served names' training (`utils.serve.generate.Tuning`), the model's
        first.

    Raises:
        SystemExit: for arguments that vLLM does not take, or this server not.
    """
    from vllm.entrypoints.launchers.api_server.entry import configure_logging_from_args
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from utils.serve.generate import tuning_of

    parser = make_arg_parser(FlexibleArgumentParser(prog="serve.py", usage="serve.py --model MODEL … [vLLM's flags]"))
    with explained("vLLM's arguments"):
        settings = parser.parse_args([*own_arguments(args, plan), *further])
        validate_parsed_serve_args(settings)
    if settings.model_tag is not None:
        raise SystemExit(f"{settings.model_tag}: this belongs to no argument. A model is given with --model")
    for name, instead in OTHER_PROGRAMS.items():
        if getattr(settings, name):
            raise SystemExit(f"--{name}: {instead}.")
    configure_logging_from_args(settings)
    with explained("The record of a training run cannot be read"):
        tunings = {name: tuning_of(folder) for name, folder in plan.adapters.items()}
        model = {plan.name: tuning_of(plan.path)}
    if tunings:
        settings.enable_lora = True
        settings.lora_modules = [LoRAModulePath(name, str(one.adapter)) for name, one in tunings.items()]
        settings.max_loras = max(settings.max_loras, len(tunings))
        settings.max_lora_rank = max(settings.max_lora_rank, *(lora_rank(one.adapter) for one in tunings.values()))
    set_bits(settings, args.bits, any(tuning.quant_bits == 4 for tuning in tunings.values()))
    set_defaults(settings, any("enforce" in text for text in further))
    return settings, model | tunings


def own_arguments(args: argparse.Namespace, plan: Any) -> list[str]:
    """Writes this project's arguments as vLLM's."""
    pairs = {
        "model": plan.path,
        "served-model-name": plan.name,
        "max-model-len": args.max_model_len,
        "max-num-seqs": args.max_num_seqs,
        "max-num-batched-tokens": args.max_num_batched_tokens,
        "gpu-memory-utilization": args.gpu_memory_utilization,
    }
    flags = ["--trust-remote-code"] if args.trust_remote_code else []
    return [*flags, *(f"--{name}={value}" for name, value in pairs.items() if value is not None)]


def set_defaults(settings: Any, eager_said: bool) -> None:
    """Fills in what suits small cards, and CPUs.

    Args:
        settings: vLLM's namespace.
        eager_said: Whether the user chose between CUDA graphs and none.
    """
    from transformers import AutoConfig
    from vllm.platforms import current_platform

    if settings.max_model_len is None:
        with explained(f"{shown(settings.model)} cannot be loaded"):
            config = AutoConfig.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        # What vLLM itself finds is taken for models that do not say it so.
        settings.max_model_len = None if longest is None else min(longest, MODEL_LEN)
    on_cpu = current_platform.is_cpu()
    if settings.max_num_batched_tokens is None:
        settings.max_num_batched_tokens = max(512 if on_cpu else 2048, settings.max_num_seqs)
    if on_cpu and settings.enable_chunked_prefill is None:
        # On CPUs a request with a seed whose prompt is computed in parts ends vLLM's engine (0.32.0: a CPU's random
        # numbers have no place to go back to).
        settings.enable_chunked_prefill = False
        settings.max_num_batched_tokens = max(settings.max_num_batched_tokens, settings.max_model_len or 0)
    if on_cpu and settings.dtype == "auto":
        settings.dtype = "bfloat16" if settings.quantization == "bitsandbytes" else "float32"
    if on_cpu and settings.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        settings.kv_cache_memory_bytes = CPU_CACHE_BYTES
    if not eager_said and (on_cpu or current_platform.get_device_total_memory() < SMALL_CARD_BYTES):
        settings.enforce_eager = True


def set_bits(settings: Any, bits: int | None, trained_so: bool) -> None:
    """Lets vLLM load in 4 bits where that was asked for, or an adapter was trained so.

    Args:
        settings: vLLM's namespace.
        bits: Asked for.
        trained_so: Whether an adapter was trained on 4 bits.

    Raises:
        SystemExit: if it cannot.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if bits == 8:
        raise SystemExit("--bits 8: vLLM has no such weights. Use --quantization fp8, or --engine transformers")
    quantised = "quantization_config" in read_json(Path(settings.model) / "config.json")
    if quantised or settings.quantization is not None or not (bits == 4 or trained_so):
        return
    why = "4 bits" if bits == 4 else "4 bits, on which an adapter was trained"
    instead = "use --engine transformers, or merge the adapter (merge_qlora.py) and serve the merged model"
    if "bitsandbytes" not in QUANTIZATION_METHODS:
        raise SystemExit(
            f"{why}: vLLM needs a plugin for them, see requirements_vllm.txt: "
            f"pip install --no-deps vllm-bnb-plugin bitsandbytes\nElse {instead}"
        )
    if settings.dtype in ("float32", "float"):
        raise SystemExit(f"{why}: vLLM computes with them in 16 bits, not --dtype {settings.dtype}. Else {instead}")
    settings.quantization = "bitsandbytes"


def lora_rank(folder: Path) -> int:
    """The rank that vLLM must be ready for, of an adapter.

    Raises:
        SystemExit: if it is larger than any of vLLM's.
    """
    with explained(f"{shown(folder)} is not an adapter that can be read"):
        config = read_json(folder / "adapter_config.json")
        rank = max(config["r"], *(config.get("rank_pattern") or {}).values(), 1)
    if rank > LORA_RANKS[-1]:
        raise SystemExit(
            f"{shown(folder)} has rank {rank}, vLLM serves up to {LORA_RANKS[-1]}. Merge it: merge_qlora.py"
        )
    return next(size for size in LORA_RANKS if size >= rank)


@contextmanager
def captured_output(heard: deque[str]) -> Iterator[None]:
    """Records what this process and its children print, and still prints it.

    vLLM's engine is a process of its own, which says why it ends nowhere else.
    """
    threads, ours = [], {}
    for number in (1, 2):
        ours[number], shown_at = os.dup(number), os.dup(number)
        read_end, write_end = os.pipe()
        os.dup2(write_end, number)
        os.close(write_end)
        threads.append(threading.Thread(target=_pass_on, args=(read_end, shown_at, heard), daemon=True))
        threads[-1].start()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in ours.items():
            os.dup2(before, number)
            os.close(before)
        # Of what failed everything is heard; what goes on holds the pipes open.
        for thread in threads:
            thread.join(0.5)


def _pass_on(read_end: int, shown_at: int, heard: deque[str]) -> None:
    rest = b""
    with open(read_end, "rb", buffering=0) as source, open(shown_at, "wb", buffering=0) as target:
        while data := source.read(65536):
            with suppress(OSError):  # Nobody looks any more.
                target.write(data)
            *lines, rest = (rest + data).split(b"\n")
            heard.extend(line.decode(errors="replace") for line in lines)


def startup_problem(error: Exception, heard: Iterable[str], settings: Any) -> str:
    """Writes why vLLM did not start, and what may help.

    Args:
        error: That it raised here.
        heard: What it printed.
        settings: vLLM's namespace.
    """
    said = "\n".join([*heard, str(error)])
    used = settings.gpu_memory_utilization
    smaller = "--bits 4 or a smaller model" if settings.quantization is None else "a smaller model"
    more = f"--gpu_memory_utilization up to 0.95 (now {used})"
    if settings.kv_cache_memory_bytes is not None:
        more = f"--kv_cache_memory_bytes (now {settings.kv_cache_memory_bytes})"
    # vLLM logs lines that begin like this during successful starts, too.
    if found := re.search(r"Free memory on device .*?\(([\d.]+)/([\d.]+) GiB\) on startup is less", said):
        free, whole = map(float, found.groups())
        return (
            f"Other programs use the card: {free:g} of {whole:g} GiB are free, and --gpu_memory_utilization {used} "
            f"asks for {used * whole:.2f}. End them (nvidia-smi shows them), or give --gpu_memory_utilization "
            f"{int(free / whole * 100) / 100}"
        )
    if found := re.search(r"max seq len \((\d+)\)(?:.*?estimated maximum model length is (\d+))?", said, re.DOTALL):
        fits = int(found[2] or 0) // 16 * 16
        shorter = f"--max_model_len {fits} fits. " if fits else ""
        return (
            f"The memory that is left does not hold --max_model_len {found[1]}, the longest prompt and answer. "
            f"{shorter}What helps else: {more}, {smaller}."
        )
    if "No available memory for the cache blocks" in said:
        return f"The model leaves no memory for prompts and answers. What helps: {more}, {smaller}."
    if re.search(r"out of memory|OutOfMemoryError", said):
        return (
            f"The card's memory does not suffice. What helps: {smaller}, fewer answers at once (--max_num_seqs, now "
            f"{settings.max_num_seqs}), or fewer tokens (--max_num_batched_tokens, now "
            f"{settings.max_num_batched_tokens}; --max_model_len, now {settings.max_model_len})."
        )
    if settings.lora_modules and "lora" in str(error).lower():
        return (
            f"vLLM does not take an adapter: {reason_of(error)}\n"
            "Merge it with merge_qlora.py and serve the merged model, or use --engine transformers"
        )
    # What one process says of another tells nothing.
    reasons = re.findall(r"(?:^|\s)(\w*(?:Error|Exception): (?!Engine core init|WorkerProc init).+)", "\n".join(heard))
    return f"vLLM did not start: {reasons[-1].strip() if reasons else plain_reason(error)}"


def plain_reason(error: Exception) -> str:
    """What vLLM says, without what pydantic adds."""
    found = re.search(r"Value error, (.+?)(?: \[type=|\n|$)", str(error))
    return found[1] if found else reason_of(error)
