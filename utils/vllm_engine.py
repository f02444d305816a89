"""Serving on vLLM: its own OpenAI-compatible app, with this project's route, health and limits around it.

vLLM has an environment of its own (requirements_vllm.txt). What a server does on graphics cards (memory that does not
suffice, 4-bit weights, several cards, Ray) was read in vLLM's source; the CPU build is what the tests run.
"""

import argparse
import asyncio
import inspect
import os
import re
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, contextmanager, suppress
from functools import partial
from pathlib import Path
from socket import socket
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from utils.data import Chat, Message, make_chat
from utils.files import explained, from_root, read_json, reason_of, shown
from utils.serving import (
    MAX_CHOICES,
    Guard,
    Limits,
    Piece,
    Refused,
    Sampling,
    Served,
    add_error_handlers,
    bound_socket,
    own_routes,
    problem_json,
    read_adapters,
)  # fmt: skip

GIB = 1024**3
# The longest prompt and answer if nothing is said: comments are short, and what is longer takes memory from others.
MODEL_LEN = 4096
# CUDA graphs take some hundred MB, which small cards need for weights and the cache.
SMALL_CARD_BYTES = 12.5 * GIB
CPU_CACHE_BYTES = 2 * GIB
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # What vLLM has kernels for.
# Paths of vLLM's app that manage the server, or answer as /v1 does under another name.
CLOSED_PATHS = ("/health", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/kv_event_sources", "/invocations")
# vLLM's ways to start that are not this server's: other programs, or several processes that count requests on their
# own.
OTHER_PROGRAMS = {
    "headless": "start further nodes with vLLM itself: vllm serve MODEL --headless …, or use Ray",
    "grpc": "this server speaks HTTP",
    "uds": "this server listens on --host and --port",
    "api_server_count": "this server is one process",
    "lora_modules": "give --adapter NAME=PATH",
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # Models are folders; nothing is looked up on a hub.
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_MAX_N_SEQUENCES": str(MAX_CHOICES),
}
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Characters that no text has, around control tokens that users typed; those that transformers 5.23 puts there.
MARKS = ("\U000f0000", "\U000f0001")


class VllmEngine:
    """Answers with vLLM; an `utils.serving.Engine`."""

    name = "vllm"

    def __init__(self, client: Any, chat: Chat, models: list[Served], adapters: Mapping[str, Any]) -> None:
        """Args:
        client: vLLM's `AsyncLLM`.
        chat: The model's template; its tokenizer is used by nobody else.
        models: What is served.
        adapters: vLLM's `LoRARequest` of those models that are adapters.
        """
        self.models = models
        self.max_model_len = client.model_config.max_model_len
        self._client = client
        self._chat = chat
        self._adapters = adapters
        self._defaults = client.model_config.get_diff_sampling_param()
        self._vocab_size = client.model_config.get_vocab_size()
        # One thread, as tokenizers are not to be shared, and not the loop's, which long texts would hold up.
        self._renderer = ThreadPoolExecutor(1, "render")

    async def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Renders a conversation as in training. Raises `Refused` where the template cannot."""
        from jinja2 import TemplateError

        try:
            return await asyncio.get_running_loop().run_in_executor(self._renderer, self._chat.prompt_ids, messages)
        except (TemplateError, ValueError) as error:
            raise Refused(400, f"The chat template cannot write this conversation: {reason_of(error)}") from error

    def generate(self, input_ids: list[int], sampling: Sampling, model: str) -> AsyncIterator[Piece]:
        """Answers; `sampling.max_tokens` is set. Closing the iterator ends the work.

        Raises:
            Refused: at once, if vLLM does not take these settings.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        asked = sampling.model_dump(exclude_none=True, exclude={"stop", "stop_token_ids"}) | {
            "stop": [word for word in sampling.stop_words if word],
            # Others never come; vLLM refuses them.
            "stop_token_ids": [id for id in sampling.stop_token_ids or () if 0 <= id < self._vocab_size],
        }
        known = {*SamplingParams.__struct_fields__}
        options = {name: value for name, value in {**self._defaults, **asked}.items() if name in known}
        try:
            params = SamplingParams(**options, output_kind=RequestOutputKind.DELTA, skip_clone=True)
        except VLLMClientError as error:
            raise Refused(400, str(error)) from error
        return self._pieces(input_ids, params, self._adapters.get(model))

    async def _pieces(self, input_ids: list[int], params: Any, adapter: Any) -> AsyncIterator[Piece]:
        from vllm.exceptions import VLLMError
        from vllm.inputs.engine import tokens_input

        answers = self._client.generate(tokens_input(input_ids), params, uuid4().hex, lora_request=adapter)
        try:
            async with aclosing(answers):
                async for step in answers:
                    for part in step.outputs:
                        if part.finish_reason not in (None, "stop", "length"):
                            raise Refused(503, f"The answer could not be finished ({part.finish_reason}). Try again.")
                        yield Piece(part.index, part.text, len(part.token_ids), part.finish_reason)
        except VLLMError as error:
            raise Refused(*self.refusal(error)) from error

    def refusal(self, error: Exception) -> tuple[int, str]:
        """Finds the status and the reason of what vLLM could not answer: the request's fault while its engine works."""
        if problem := self.problem():
            return 503, problem
        reason = reason_of(error.__cause__ or error).encode("utf-8", "backslashreplace").decode()
        return 400, f"vLLM cannot answer this request: {reason}"

    def problem(self) -> str | None:
        """Why it cannot answer, if it cannot."""
        return "vLLM's engine has ended; its log says why." if self._client.errored else None


def run(args: argparse.Namespace, unknown: Sequence[str], limits: Limits) -> None:
    """Serves until a signal comes.

    Args:
        args: Of serve.py.
        unknown: Further arguments, for vLLM.
        limits: What the server takes.

    Raises:
        SystemExit: with a sentence, if the server cannot start or its engine ended.
    """
    adapters = read_adapters(args.adapter)
    # Before anything is loaded, which takes long.
    with bound_socket(args.host, args.port) as listening:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if os.environ.pop("VLLM_API_KEY", None) and limits.key is None:
            raise SystemExit("VLLM_API_KEY is set, but guards some of the routes alone. Use: --api_key VLLM_API_KEY")
        try:
            import uvloop
            from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        except ImportError as error:
            raise SystemExit(
                f"vLLM cannot be used: {reason_of(error)}\nInstall it in an environment of its own: "
                "pip install -r requirements_vllm.txt, or use --engine transformers"
            ) from error
        for number in SIGNALS:
            signal.signal(number, _interrupt)
        cli_env_setup()
        settings, tunings = vllm_settings(args, unknown, adapters)
        settings.host, settings.port = listening.getsockname()[:2]
        if ending := uvloop.run(_serve(settings, tunings, listening, limits, args.shutdown_sec)):
            raise SystemExit(ending)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def shielded() -> Iterator[None]:
    """Lets processes that are started here ignore the signals that end this one.

    A terminal's Ctrl-C and the end of a system's service go to all of them, and vLLM's workers would end at once,
    amid answers. This process ends them when it has answered.
    """
    loaded, main = threading.Event(), threading.get_ident()

    def watch() -> None:
        while not loaded.is_set():
            # Blocked signals wait; another one interrupts the long waits of loading.
            if signal.sigtimedwait(SIGNALS, 0.1) is not None:
                signal.pthread_kill(main, signal.SIGUSR1)
                return

    signal.signal(signal.SIGUSR1, _interrupt)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        loaded.set()
        watcher.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def vllm_settings(
    args: argparse.Namespace, unknown: Sequence[str], adapters: Mapping[str, Path]
) -> tuple[Any, dict[str, Any]]:
    """Makes vLLM's own namespace of the arguments, with this project's defaults where nothing was said.

    Returns:
        The namespace, and what is known of the served names' training (`utils.generate.Tuning`), the model's first.

    Raises:
        SystemExit: for arguments that vLLM does not take, or this server not.
    """
    from vllm.entrypoints.launchers.api_server.entry import configure_logging_from_args
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from utils.generate import tuning_of

    parser = make_arg_parser(FlexibleArgumentParser(prog="serve.py", usage="serve.py --model MODEL … [vLLM's flags]"))
    with explained("vLLM's arguments"):
        settings = parser.parse_args([*own_arguments(args), *unknown])
        validate_parsed_serve_args(settings)
    for name, instead in OTHER_PROGRAMS.items():
        if getattr(settings, name):
            raise SystemExit(f"--{name}: {instead}.")
    configure_logging_from_args(settings)
    with explained("The record of a training run cannot be read"):
        model = {settings.served_model_name[0]: tuning_of(Path(settings.model))}
        tunings = {name: tuning_of(folder) for name, folder in adapters.items()}
    if model.keys() & tunings.keys():
        raise SystemExit(f"--adapter: {next(iter(model))} is the model's name. Give the adapter another one.")
    if adapters:
        settings.enable_lora = True
        settings.lora_modules = [LoRAModulePath(name, str(one.adapter)) for name, one in tunings.items()]
        settings.max_loras = max(settings.max_loras, len(adapters))
        ranks = [lora_rank(tuning.adapter) for tuning in tunings.values()]
        settings.max_lora_rank = max(settings.max_lora_rank, *ranks)
    tunings = model | tunings
    set_defaults(settings, any("enforce" in text for text in unknown))
    set_bits(settings, args.bits, tunings)
    return settings, tunings


def own_arguments(args: argparse.Namespace) -> list[str]:
    """Writes this project's arguments as vLLM's."""
    path = from_root(args.model)
    pairs = {
        "model": path,
        "served-model-name": args.served_model_name or path.resolve().name,
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
    if on_cpu and settings.dtype == "auto":
        settings.dtype = "float32"
    if on_cpu and settings.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        settings.kv_cache_memory_bytes = CPU_CACHE_BYTES
    if not eager_said and (on_cpu or current_platform.get_device_total_memory() < SMALL_CARD_BYTES):
        settings.enforce_eager = True


def set_bits(settings: Any, bits: int | None, tunings: Mapping[str, Any]) -> None:
    """Lets vLLM load in 4 bits where that was asked for, or an adapter was trained so.

    Raises:
        SystemExit: if it cannot.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if bits == 8:
        raise SystemExit("--bits 8: vLLM has no such weights. Use --quantization fp8, or --engine transformers")
    quantised = "quantization_config" in read_json(Path(settings.model) / "config.json")
    trained_so = any(tuning.quant_bits == 4 for tuning in tunings.values())
    if quantised or settings.quantization is not None or not (bits == 4 or trained_so):
        return
    if "bitsandbytes" not in QUANTIZATION_METHODS:
        raise SystemExit(
            "4 bits: vLLM needs its bitsandbytes plugin for them: pip install -r requirements_vllm.txt\n"
            "Without: --engine transformers, or merge the adapter (merge_qlora.py) and serve the merged model"
        )
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


def make_renderer(settings: Any, first: Any, folder: Path) -> Chat:
    """Loads the tokenizer and chat template, and lets vLLM's own routes use the same.

    Args:
        settings: vLLM's namespace.
        first: What is known of the first adapter's training, or the model's.
        folder: Where the template can be written for vLLM.

    Raises:
        SystemExit: if there is none that can be used.
    """
    from vllm.renderers.chat_utils import load_chat_template

    from utils.model import load_tokenizer

    if settings.tokenizer is None:
        own = first.adapter is not None and (first.adapter / "tokenizer_config.json").is_file()
        settings.tokenizer = str(first.adapter) if own else settings.model
    with explained(f"The tokenizer in {shown(settings.tokenizer)} cannot be used"):
        template = load_chat_template(settings.chat_template) or first.chat_template
        tokenizer = load_tokenizer(Path(settings.tokenizer), template, settings.trust_remote_code)
        if "sanitize_control_tokens" not in inspect.signature(tokenizer.apply_chat_template).parameters:
            tokenizer.apply_chat_template = partial(typed_as_text, tokenizer)
        chat = make_chat(tokenizer)
    if isinstance(tokenizer.chat_template, str):  # Of several by name vLLM chooses itself.
        settings.chat_template = str(folder / "chat_template.jinja")
        Path(settings.chat_template).write_text(tokenizer.chat_template, encoding="utf-8")
    settings.default_chat_template_kwargs = {
        # As utils/data.py renders.
        "enable_thinking": False,
        "add_bos_token": tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id],
    } | (settings.default_chat_template_kwargs or {})
    return chat


def typed_as_text(
    tokenizer: Any, messages: list[Message], sanitize_control_tokens: bool = False, **options: Any
) -> Any:
    """`apply_chat_template` with an option that vLLM's transformers does not know, and would go on without.

    Args:
        tokenizer: A fast one.
        messages: The conversation.
        sanitize_control_tokens: Whether control tokens in the messages are encoded as the plain text they are, to the
            tokens that transformers 5.23 makes of them in training.
        **options: As of transformers.
    """
    apply = partial(type(tokenizer).apply_chat_template, tokenizer)
    if not sanitize_control_tokens:
        return apply(messages, **options)
    control = control_tokens(tokenizer)
    pattern = "|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)"
    begin, end = MARKS

    def marked(text: str) -> str:
        return re.sub(pattern, f"{begin}\\g<0>{end}", text.replace(begin, "").replace(end, ""))

    text = apply(
        [{**message, "content": marked(message["content"])} for message in messages], **options | {"tokenize": False}
    )
    # Text and typed control tokens by turns; None where a template parted a mark from its token.
    parts = re.split(f"{begin}({pattern}){end}|[{begin}{end}]", text)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    ids = encode(parts[0])
    for number, part in enumerate(parts[1:], start=1):
        if part:
            ids += _amid(part, partial(_as_text, tokenizer) if number % 2 else encode, encode("\n"))
    return {"input_ids": ids}


def control_tokens(tokenizer: Any) -> list[str]:
    """The tokens that steer a conversation: special ones, and others that the chat template writes itself."""
    import jinja2.nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = tokenizer.get_chat_template()
    tree = _compile_jinja_template(template).environment.parse(template)
    written = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    written += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (not token.content.isspace() and any(token.content in text for text in written))
    ]


def _as_text(tokenizer: Any, text: str) -> list[int]:
    """Encodes without any added token."""
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text] if backend.pre_tokenizer is None else [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in backend.model.tokenize(word)]


def _amid(text: str, encode: Callable[[str], list[int]], line_break: list[int]) -> list[int]:
    """Encodes what stands amid other text: after a line break, as some tokenizers add a space where a text begins."""
    ids = encode("\n" + text)
    return ids[len(line_break) :] if ids[: len(line_break)] == line_break else encode(text)


async def _serve(
    settings: Any, tunings: Mapping[str, Any], listening: socket, limits: Limits, shutdown_sec: float
) -> str | int | None:
    """Loads and serves; returns what the program shall end with."""
    heard: deque[str] = deque(maxlen=2000)
    async with AsyncExitStack() as stack:
        try:
            with shielded(), overheard(heard):
                guard, engine = await _load(stack, settings, tunings, limits)
        except Exception as error:
            return startup_problem(error, heard, settings)
        names = ", ".join(served.name for served in engine.models)
        print(f"{names} on vLLM: http://{settings.host}:{settings.port}/v1", flush=True)
        hurried = await _until_signal(guard, settings, listening, shutdown_sec)
        return engine.problem() or (130 if hurried else None)


async def _load(
    stack: AsyncExitStack, settings: Any, tunings: Mapping[str, Any], limits: Limits
) -> tuple[Guard, VllmEngine]:
    """Starts vLLM's engine and makes the app.

    Raises:
        Exception: whatever vLLM raises.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app

    from utils.generate import end_ids

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    first = next((tuning for tuning in tunings.values() if tuning.adapter is not None), next(iter(tunings.values())))
    chat = make_renderer(settings, first, Path(folder))
    client = await stack.enter_async_context(build_async_engine_client(settings))
    # A base model's own settings do not name the token that ends an answer in the chat template.
    generation = client.input_processor.generation_config_fields
    generation["eos_token_id"] = end_ids(SimpleNamespace(eos_token_id=generation.get("eos_token_id")), chat.stop_id)
    tasks = await client.get_supported_tasks()
    if "generate" not in tasks:
        raise ValueError(f"the model does not write text; it can: {', '.join(tasks)}.")
    app = build_app(settings, tasks, client.model_config)
    await init_app_state(client, app.state, settings, tasks)
    models = [Served(name, tuning.system_prompt) for name, tuning in tunings.items()]
    engine = VllmEngine(client, chat, models, app.state.openai_serving_models.lora_requests)
    return add_own(app, engine, limits), engine


def add_own(app: Any, engine: VllmEngine, limits: Limits) -> Guard:
    """Adds this project's route, health and errors to vLLM's app, and takes away what clients must not have.

    Returns:
        The app behind its limits, as vLLM's `serve_http` takes it.
    """
    from vllm.exceptions import GenerationError
    from vllm.v1.engine.exceptions import EngineGenerateError

    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in CLOSED_PATHS]
    app.include_router(own_routes(engine))
    add_error_handlers(app)

    @app.exception_handler(EngineGenerateError)
    @app.exception_handler(GenerationError)
    async def impossible(_: Any, error: Exception) -> Any:
        return problem_json(*engine.refusal(error))

    app.middleware_stack = app.build_middleware_stack()  # It has been built without these handlers.
    guard = Guard(app, limits)
    guard.routes, guard.state = app.routes, app.state
    return guard


async def _until_signal(guard: Guard, settings: Any, listening: socket, shutdown_sec: float) -> bool:
    """Serves; the first signal lets requests at work end, a second one does not. Returns whether there was a second."""
    from vllm import envs
    from vllm.entrypoints.launchers.launcher import serve_http
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

    options = {} if (log := get_uvicorn_log_config(settings)) is None else {"log_config": log}
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"):
        options[name] = getattr(settings, name)
    for name in ("h11_max_incomplete_event_size", "h11_max_header_count"):
        options[name] = getattr(settings, name)
    serving = asyncio.ensure_future(
        serve_http(
            guard,
            sock=listening,
            enable_ssl_refresh=settings.enable_ssl_refresh,
            host=settings.host,
            port=settings.port,
            log_level=settings.uvicorn_log_level,
            access_log=not settings.disable_uvicorn_access_log,
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            timeout_graceful_shutdown=shutdown_sec,
            **options,
        )
    )
    await asyncio.sleep(0)
    # Now serve_http has set its own handlers, which end the engine while requests are at work.
    server = guard.state.server

    def stop() -> None:
        server.force_exit, server.should_exit = server.should_exit, True

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await (await serving)
    return server.force_exit


@contextmanager
def overheard(heard: deque[str]) -> Iterator[None]:
    """Notes the lines that this process and those that it starts print, and lets them pass.

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
    smaller = "--bits 4, a smaller model" if settings.quantization is None else "a smaller model"
    used = settings.gpu_memory_utilization
    on_cpu = settings.kv_cache_memory_bytes is not None
    more = f"--kv_cache_memory_bytes (now {(settings.kv_cache_memory_bytes or 0) / GIB:.1f} GiB)"
    more = more if on_cpu else f"--gpu_memory_utilization up to 0.95 (now {used})"
    if found := re.search(r"Free memory on device .*?\(([\d.]+)/([\d.]+) GiB\) on startup", said):
        free, whole = map(float, found.groups())
        return (
            f"Other programs use the card: {free:g} of {whole:g} GiB are free, and --gpu_memory_utilization {used} asks "
            f"for {used * whole:.2f}. End them (nvidia-smi shows them), or give --gpu_memory_utilization "
            f"{int(free / whole * 100) / 100}"
        )
    if found := re.search(r"max seq len \((\d+)\)(?:.*?estimated maximum model length is (\d+))?", said, re.DOTALL):
        fits = int(found[2] or 0) // 16 * 16
        shorter = f"--max_model_len {fits} fits. " if fits else ""
        return (
            f"The memory that is left holds no conversation of --max_model_len {found[1]} tokens. {shorter}Else: {more}, "
            f"or {smaller}."
        )
    if "No available memory for the cache blocks" in said:
        return f"The model leaves no memory for conversations. What helps: {more}, {smaller}."
    if re.search(r"out of memory|OutOfMemoryError", said):
        return (
            f"The card's memory does not suffice for this model. What helps: {smaller}, less at once (--max_num_seqs, now "
            f"{settings.max_num_seqs}; --max_num_batched_tokens, now {settings.max_num_batched_tokens}), --max_model_len."
        )
    if settings.lora_modules and re.search(r"lora", str(error), re.IGNORECASE):
        return (
            f"vLLM does not take an adapter: {reason_of(error)}\n"
            "Merge it with merge_qlora.py and serve the merged model, or use --engine transformers"
        )
    reasons = re.findall(r"(?:^|\s)(\w*(?:Error|Exception): .+)", said)
    own = [reason for reason in reasons if "Engine core initialization failed" not in reason]
    return f"vLLM did not start: {own[-1].strip() if own else reason_of(error)}"
