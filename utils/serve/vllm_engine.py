"""Serving on vLLM: its own OpenAI-compatible app, with this project's route, health and limits around it.

vLLM has an environment of its own (requirements_vllm.txt). What a server does on graphics cards (memory that does not
suffice, 4-bit weights, several cards, Ray) was read in vLLM's source; the CPU build is what the tests run.
"""

import argparse
import asyncio
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from socket import socket
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from utils.data.chat import Chat
from utils.data.records import Message
from utils.data.thoughts import ThoughtFolder
from utils.files import reason_of
from utils.serve.connections import BACKLOG, limit_log_rate, limited_protocol, most_connections
from utils.serve.limits import LAST_WORD_SEC, Guard, Limits, Refused, open_socket, problem_json
from utils.serve.routes import MAX_CHOICES, Delta, Sampling, Served, add_error_handlers, own_routes
from utils.serve.vllm_rendering import make_renderer
from utils.serve.vllm_settings import captured_output, startup_problem, vllm_settings

# Paths of vLLM's app that manage the server, let one request be very many, or answer as /v1 does under another name.
CLOSED_PATHS = (
    "/generative_scoring",
    "/health",
    "/invocations",
    "/is_scaling_elastic_ep",
    "/kv_event_sources",
    "/scale_elastic_ep",
    "/v1/chat/completions/batch",
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # Models are folders; nothing is looked up on a hub.
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_MAX_N_SEQUENCES": str(MAX_CHOICES),
    "VLLM_MAX_COMPLETION_PROMPTS": "128",  # In one request to /v1/completions.
}
SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130  # As shells call a command that Ctrl-C ended.


class VllmEngine:
    """Answers with vLLM; an `utils.serve.routes.Engine`."""

    name = "vllm"

    def __init__(self, client: Any, chat: Chat, models: list[Served], adapters: Mapping[str, Any]) -> None:
        """Takes what answers.

        Args:
            client: vLLM's `AsyncLLM`.
            chat: The model's template, with a tokenizer of its own.
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

    def folder(self) -> ThoughtFolder | None:
        """What tells thoughts from an answer's text, if the model thinks."""
        return self._chat.folder()

    def generate(self, input_ids: list[int], sampling: Sampling, model: str) -> AsyncIterator[Delta]:
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

    async def _pieces(self, input_ids: list[int], params: Any, adapter: Any) -> AsyncIterator[Delta]:
        from vllm.exceptions import VLLMError
        from vllm.inputs.engine import tokens_input

        answers = self._client.generate(tokens_input(input_ids), params, uuid4().hex, lora_request=adapter)
        try:
            async with aclosing(answers):
                async for step in answers:
                    for part in step.outputs:
                        if part.finish_reason not in (None, "stop", "length"):
                            raise Refused(503, f"The answer could not be finished ({part.finish_reason}). Try again.")
                        yield Delta(part.index, part.text, len(part.token_ids), part.finish_reason)
        except VLLMError as error:
            raise Refused(*self.refusal(error)) from error

    def refusal(self, error: Exception) -> tuple[int, str]:
        """Finds the status and the reason of what vLLM could not answer: the request's fault while its engine works."""
        if problem := self.problem():
            return 503, problem
        return 400, f"vLLM cannot answer this request: {reason_of(error)}"

    def problem(self) -> str | None:
        """Why it cannot answer, if it cannot."""
        return "vLLM's engine has ended; its log says why." if self._client.errored else None


def run(args: argparse.Namespace, further: Sequence[str], plan: Any) -> None:
    """Serves until a signal comes.

    Args:
        args: Of serve.py.
        further: Arguments that are vLLM's.
        plan: serve.py's `Plan`: the model's folder and name, adapters and limits.

    Raises:
        SystemExit: with a sentence, if the server cannot start or its engine ended.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ.pop("VLLM_API_KEY", None) and plan.limits.key is None:
        raise SystemExit("VLLM_API_KEY is set, but would guard some of the routes alone. Use: --api_key VLLM_API_KEY")
    with open_socket(args.host, args.port) as listening:
        try:
            import uvloop
            from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        except ImportError as error:
            raise SystemExit(
                f"vLLM cannot be used: {reason_of(error)}\nInstall it in an environment of its own: "
                "pip install -r requirements_vllm.txt, or use --engine transformers"
            ) from error
        cli_env_setup()
        settings, tunings = vllm_settings(args, further, plan)
        settings.host, settings.port = listening.getsockname()[:2]
        first = next((tuning for tuning in tunings.values() if tuning.adapter is not None), tunings[plan.name])
        chat = make_renderer(settings, first)
        paths = {plan.name: plan.given}
        models = [Served(name, tuning.system_prompt, paths.get(name, "")) for name, tuning in tunings.items()]
        if ending := uvloop.run(_serve(settings, chat, models, plan.limits, listening, args.shutdown_sec)):
            raise SystemExit(ending)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Makes child processes ignore Ctrl-C, which a terminal sends to all of them.

    vLLM's workers would end amid answers; this process ends them when it has answered. A signal while the block is at
    work ends all of them at once.
    """
    loaded = threading.Event()

    def end(*_: Any) -> None:
        import psutil

        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(INTERRUPTED)  # vLLM waits where no exception gets through.

    def watch() -> None:
        while not loaded.is_set():
            if signal.sigtimedwait([signal.SIGINT], 0.1) is not None:
                end()

    # SIGTERM is let through: it is what vLLM's processes end one another with. A thread that is older than the block
    # may get the other one too.
    earlier = {number: signal.signal(number, end) for number in SIGNALS}
    resource_tracker.ensure_running()  # Where this helper of Python's is started, blocked signals are let through.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        loaded.set()
        watcher.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for number, handler in earlier.items():
            signal.signal(number, handler)


async def _serve(
    settings: Any, chat: Chat, models: list[Served], limits: Limits, listening: socket, shutdown_sec: float
) -> str | int | None:
    """Loads and serves; returns what the program shall end with."""
    heard: deque[str] = deque(maxlen=2000)
    async with AsyncExitStack() as stack:
        try:
            with interrupts_ignored(), captured_output(heard):
                guard, engine = await _load(stack, settings, chat, models, limits)
        except Exception as error:
            return startup_problem(error, heard, settings)
        names = ", ".join(served.name for served in models)
        address = f"http://{settings.host}:{settings.port}"
        print(f"Serving {names} at {address} (prompt and answer: {engine.max_model_len:,} tokens).", flush=True)
        hurried = await _until_signal(guard, settings, listening, shutdown_sec)
        return engine.problem() or (INTERRUPTED if hurried else None)


async def _load(
    stack: AsyncExitStack, settings: Any, chat: Chat, models: list[Served], limits: Limits
) -> tuple[Guard, VllmEngine]:
    """Starts vLLM's engine and makes the app.

    Raises:
        Exception: whatever vLLM raises.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app

    from utils.serve.generate import end_ids

    client = await stack.enter_async_context(build_async_engine_client(settings))
    refuse_early(client)
    # A base model's own settings do not name the token that ends an answer in the chat template.
    generation = client.input_processor.generation_config_fields
    generation["eos_token_id"] = end_ids(SimpleNamespace(eos_token_id=generation.get("eos_token_id")), chat.stop_id)
    tasks = await client.get_supported_tasks()
    if "generate" not in tasks:
        raise ValueError(f"the model does not write text; it can: {', '.join(tasks)}.")
    app = build_app(settings, tasks, client.model_config)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(chat.tokenizer.chat_template, str):  # Of several by name vLLM chooses itself.
            # Given as a file: in an argument vLLM takes it for Python's escapes, which Chinese is not.
            settings.chat_template = str(Path(folder) / "chat_template.jinja")
            Path(settings.chat_template).write_text(chat.tokenizer.chat_template, encoding="utf-8")
        await init_app_state(client, app.state, settings, tasks)
    registry, path = app.state.openai_serving_models.registry, models[0].path
    is_base = registry.is_base_model
    registry.is_base_model = lambda name: is_base(name) or bool(path and name == path)  # Without listing it.
    engine = VllmEngine(client, chat, models, app.state.openai_serving_models.lora_requests)
    return add_own(app, engine, limits), engine


def refuse_early(client: Any) -> None:
    """Lets vLLM call settings that its processes cannot tell each other the request's fault, not its own."""
    from vllm.exceptions import VLLMError, VLLMValidationError

    add_request = client.add_request

    async def checked(*args: Any, **options: Any) -> Any:
        try:
            return await add_request(*args, **options)
        except VLLMError:
            raise
        except (OverflowError, TypeError, ValueError) as error:
            raise VLLMValidationError(f"a setting that cannot be used: {reason_of(error)}") from error

    client.add_request = checked


def add_own(app: Any, engine: VllmEngine, limits: Limits) -> Guard:
    """Adds this project's route, health and errors to vLLM's app, and takes away what clients must not have.

    Returns:
        The app behind its limits, as vLLM's `serve_http` takes it.
    """
    from vllm.exceptions import GenerationError

    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in CLOSED_PATHS]
    app.include_router(own_routes(engine))
    add_error_handlers(app)

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
            http=limited_protocol(most_connections()),
            ws="none",
            backlog=BACKLOG,
            timeout_graceful_shutdown=shutdown_sec + 2 * LAST_WORD_SEC,  # Then it would only cut them off.
            **options,
        )
    )
    await asyncio.sleep(0)
    limit_log_rate()
    # Now serve_http has set its own handlers, which end the engine while requests are at work.
    server = guard.state.server

    def stop() -> None:
        server.force_exit, server.should_exit = server.should_exit, True
        asyncio.get_running_loop().call_later(shutdown_sec, guard.end)

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await (await serving)
    return server.force_exit
