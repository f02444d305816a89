"""The transformers engine: requests are served together by transformers' continuous batching."""

import asyncio
import copy
import gc
import logging
import sys
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock, Thread, main_thread
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestState
from transformers.generation.logits_process import LogitsProcessorList

from utils.data.chat import Chat
from utils.data.records import Message
from utils.data.thoughts import ThoughtFolder
from utils.serve.capacity import PAGE_TOKENS, Capacity
from utils.serve.generate import IncrementalDetokenizer, end_ids, use_adapter
from utils.serve.limits import Refused
from utils.serve.paged_attention import NAME, plan_step
from utils.serve.routes import Delta, Sampling, Served, collect
from utils.serve.sampling import SamplingParams, sample_tokens

PATIENCE_SEC = 5


class PerRequestSampler(ContinuousBatchingLogitsProcessorList):
    """Samples each answer's next token with its own settings, where transformers has one `do_sample` for all.

    It leaves one token of each row, which the manager's greedy decoding then takes.
    """

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.generators: dict[str, torch.Generator] = {}  # By request; those without have PyTorch's own.
        self._rows: list[RequestState] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Settings were checked when the request came."""

    def prepare_tensor_args(self, requests_in_batch: list[FutureRequestState], arg_storage: torch.Tensor) -> Any:
        """Remembers whose logits come next."""
        self._rows = [request.state for request in requests_in_batch if request.has_new_token]
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: Any) -> torch.Tensor:
        """Takes (R, V) logits and returns them with all but the chosen tokens' at -inf."""
        rows = self._rows
        settings = [state.logit_processor_kwargs for state in rows]
        choices, generators = [one["choice"] for one in settings], [self.generators.get(row.request_id) for row in rows]
        said = []
        for state, one in zip(rows, settings, strict=True):
            # A request that was pushed out of the cache comes again with its answer so far as a part of the prompt.
            tokens = [*state.initial_tokens, *state.generated_tokens] if one["choice"].penalises else []
            said.append((tokens[: one["prompt_tokens"]], tokens[one["prompt_tokens"] :]))
        tokens = sample_tokens(scores[: len(rows)], choices, said, generators)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


class Step(NamedTuple):
    """What came of one step of an answer."""

    request_id: str
    new_ids: list[int]
    ended: bool
    error: str | None


class Reader:
    """The queue and event loop of a coroutine that waits for a request's tokens."""

    def __init__(self, steps: "asyncio.Queue[Step]") -> None:
        self.steps = steps
        self.loop = asyncio.get_running_loop()
        self.known = 0  # Tokens; of the engine's thread alone.


class Router(OutputRouter):
    """Hands new tokens to the coroutines that wait for them; those of cancelled requests are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[str, Reader] = {}

    def deliver(self, output: GenerationOutput) -> None:
        """Hands out one step, from the engine's thread: only what is new, as slow readers' steps pile up."""
        if reader := self.readers.get(output.request_id):
            new = output.generated_tokens[reader.known :]
            reader.known += len(new)
            step = Step(output.request_id, new, output.is_finished(), output.error)
            reader.loop.call_soon_threadsafe(reader.steps.put_nowait, step)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Hands out what came of a step."""
        for output in outputs:
            self.deliver(output)


class SharedModel:
    """A model whose adapters are used in turn.

    Each adapter, and the model without one, has a manager with a cache of its own. They share the weights, and compute
    one step at a time.
    """

    def __init__(self, model: Any, adapters: Sequence[str]) -> None:
        self.model = model
        self.adapters = adapters
        self.active = ""  # Not known at first.
        self.lock = Lock()

    def activate(self, name: str) -> None:
        """Makes the adapter of that name the active one; none for any other name."""
        if self.active != name:
            use_adapter(self.model, name if name in self.adapters else None)
            self.active = name


class AdapterView:
    """A model with one of its adapters, or none, as a manager sees a model."""

    def __init__(self, shared: SharedModel, name: str) -> None:
        self._shared, self._name = shared, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared.model, name)

    def eval(self) -> "AdapterView":
        """The model is in evaluation mode."""
        return self

    def __call__(self, **batch: Any) -> Any:
        """A forward pass."""
        with self._shared.lock:
            self._shared.activate(self._name)
            return self._shared.model(**batch)


def check_engine(engine: "TransformersEngine") -> None:
    """Checks that the engine writes what `model.generate` writes: it has its own attention and caches.

    Raises:
        ValueError: if it does not, or cannot run the model at all.
    """
    name, text = engine.models[0].name, "1 2 3 4 5 6 7 8 9 10 " * 20

    async def answers() -> list[str]:
        """Of two at once: requests that write together have an attention of their own."""
        ids = (await engine.prompt_ids([{"role": "user", "content": text}]))[: engine.max_model_len - 8]
        asked = [ids, ids[:-3]]
        expected.extend(engine.greedy(one, 8, name) for one in asked)
        sampling = Sampling(temperature=0, max_tokens=8)
        found = await asyncio.gather(*(collect(engine.generate(one, sampling, name), 1) for one in asked))
        return [answer.texts[0] for answer in found]

    expected: list[str] = []
    log = logging.getLogger("ContinuousBatchingLogger")
    log.disabled = True  # A traceback would stand above the sentence.
    try:
        found = asyncio.run(answers())
    except Refused as refusal:
        raise ValueError(
            f"transformers' continuous batching does not run this model ({refusal}). vLLM may: requirements_vllm.txt"
        ) from refusal
    finally:
        log.disabled = False
    for text, of_model in zip(found, expected, strict=True):
        if text != of_model:
            raise ValueError(
                f"transformers' continuous batching writes {text!r} where the model writes {of_model!r}. Serve it with "
                "vLLM: requirements_vllm.txt"
            )


class TransformersEngine:
    """Implements `utils.serve.routes.Engine`."""

    name = "transformers"

    def __init__(
        self, model: Any, chat: Chat, served: Sequence[Served], adapters: Sequence[str], capacity: Capacity
    ) -> None:
        """Takes a loaded model.

        Args:
            model: In evaluation mode, from `utils.serve.generate.load_for_inference`.
            chat: Its template.
            served: The model's own name, if it is offered, and its adapters'.
            adapters: Those of the names that are adapters'.
            capacity: How much is computed at once.
        """
        self.models = [*served]
        self.max_model_len = capacity.max_model_len
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self._capacity, self._chat, self._model = capacity, chat, model
        chat.tokenizer.model_max_length = sys.maxsize  # It would warn of what is looked after here.
        self._decoder = copy.deepcopy(chat.tokenizer)  # Encoding changes a tokenizer's state, in another thread.
        self._ends = end_ids(model.generation_config, chat.stop_id)
        self._shared = SharedModel(model, [*adapters]) if adapters else None
        self._voices = {one.name: AdapterView(self._shared, one.name) if self._shared else model for one in served}
        self._managers: dict[str, ContinuousBatchingManager] = {}
        self._renderer = ThreadPoolExecutor(1, "render")
        self._closing = False
        self._failures = 0  # Of managers, since the last answer.
        # The managers' threads would keep the process from ending. This one is no daemon: Python waits for it, and
        # nothing is computing any more when the interpreter goes.
        Thread(target=_close_with_main, args=(weakref.ref(self),)).start()

    async def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Renders a conversation as in training; a long one does not keep others waiting."""
        from jinja2 import TemplateError

        messages = [{**one, "content": one["content"].encode(errors="replace").decode()} for one in messages]
        try:
            return await asyncio.get_running_loop().run_in_executor(self._renderer, self._chat.prompt_ids, messages)
        except (TemplateError, ValueError) as error:
            raise Refused(400, f"messages: the model's chat template cannot write them: {error}") from error

    @torch.no_grad()
    def greedy(self, input_ids: list[int], max_tokens: int, model: str) -> str:
        """What transformers' own `generate` writes. For use before the first request: attention is another then."""
        if self._shared is not None:
            self._shared.activate(model)
        ids = torch.tensor([input_ids], device=self._model.device)
        settings = {"max_new_tokens": max_tokens, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), eos_token_id=self._ends, pad_token_id=self._ends[0], **settings
        )
        new = out[0, len(input_ids) :].tolist()
        return self._chat.tokenizer.decode(new[:-1] if new[-1] in self._ends else new, skip_special_tokens=True)

    async def encode(self, text: str) -> list[int]:
        """The tokens of plain text."""
        whole = text.encode(errors="replace").decode()  # JSON can carry half a character.
        return await asyncio.get_running_loop().run_in_executor(self._renderer, self._chat.tokenizer.encode, whole)

    def choice(self, sampling: Sampling) -> SamplingParams:
        """What is not given is the model's own setting, as vLLM has it; the names are the same in both."""
        given = sampling.model_dump(exclude_none=True)
        own = {name: getattr(self._model.generation_config, name, None) for name in SamplingParams._fields}
        own = {name: value for name, value in own.items() if value is not None}
        choice = SamplingParams(**(own | {name: given[name] for name in SamplingParams._fields if name in given}))
        return choice._replace(top_k=max(choice.top_k, 0))  # vLLM's -1 means all, too.

    async def generate(self, input_ids: list[int], sampling: Sampling, model: str) -> AsyncIterator[Delta]:
        """Answers; closing the iterator ends the work."""
        manager, choice = self._manager(model), self.choice(sampling)
        ends = {*self._ends, *(sampling.stop_token_ids or [])}
        steps: asyncio.Queue[Step] = asyncio.Queue()
        request = uuid.uuid4().hex
        ids = [f"{request}-{index}" for index in range(sampling.n)]
        speeches = [IncrementalDetokenizer(self._decoder, sampling.stop_words) for _ in ids]
        untold = [0] * sampling.n  # Tokens that are in no piece yet.
        open_ids, waiting = set(), [*ids]

        def ask(request_id: str) -> None:
            index = ids.index(request_id)
            if sampling.seed is not None:
                seeded = torch.Generator(self._model.device).manual_seed(sampling.seed + index)
                manager.logit_processor.generators[request_id] = seeded
            manager.output_router.readers[request_id] = Reader(steps)
            open_ids.add(request_id)
            settings = {"choice": choice, "prompt_tokens": len(input_ids)}
            if not manager.add_request(input_ids, request_id, sampling.max_tokens, True, False, [*ends], **settings):
                raise Refused(503, "The server is about to end, or its engine has stopped. Try again later.")

        def leave(request_id: str) -> None:
            open_ids.discard(request_id)
            manager.output_router.readers.pop(request_id, None)
            manager.logit_processor.generators.pop(request_id, None)

        try:
            ask(waiting.pop(0))
            while open_ids:
                request_id, new, done, error = await _next_step(steps, manager)
                if request_id not in open_ids:
                    continue
                if error is not None:
                    raise Refused(500, f"The engine has stopped this answer: {error}")
                while waiting:  # The others find the prompt's pages in the cache now.
                    ask(waiting.pop(0))
                index = ids.index(request_id)
                ended = bool(new) and new[-1] in ends
                text = speeches[index].add(new[:-1] if ended else new, last=done)
                if speeches[index].stopped and not done:
                    manager.cancel_request(request_id)
                reason = "stop" if ended or speeches[index].stopped else "length" if done else None
                if reason:
                    leave(request_id)
                    self._failures = 0
                untold[index] += len(new)
                if text or reason:
                    yield Delta(index, text, untold[index], reason)
                    untold[index] = 0
        finally:
            for request_id in [*open_ids]:
                manager.cancel_request(request_id)
                leave(request_id)

    def folder(self) -> ThoughtFolder | None:
        """What tells thoughts from an answer's text, if the model thinks."""
        return self._chat.folder()

    def problem(self) -> str | None:
        """Why it cannot answer, if it cannot."""
        if self._closing:
            return "The server is about to end."
        if self._failures > 1:
            return "The engine fails again and again; its log says why."
        return None

    def _manager(self, name: str) -> ContinuousBatchingManager:
        """Finds a name's manager; the first request to it, or the first after an error that ended it, starts one."""
        if self._closing:
            raise Refused(503, "The server is about to end.")
        if manager := self._managers.get(name):
            if manager.is_running() and manager.background_thread_status.can_accept_new_requests() is None:
                return manager
            # An error is ending it. Its cache is gone before the next one is made.
            manager.join(time.perf_counter())
            self._failures += 1
            del self._managers[name], manager  # The error's traceback holds it, too, in a circle.
            gc.collect()
        capacity = self._capacity
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=-(-capacity.cache_tokens // PAGE_TOKENS),
            max_batch_tokens=capacity.max_num_batched_tokens,
            max_requests_per_batch=capacity.max_num_seqs,
            # Tokens are chosen with what was said so far in view, which a step that is prepared ahead does not have.
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
            max_memory_percent=1.0,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=self._ends, pad_token_id=self._chat.stop_id)
        self._model.config._attn_implementation = NAME
        manager = ContinuousBatchingManager(self._voices[name], greedy, config)
        manager.logit_processor = PerRequestSampler()
        manager.output_router = Router()
        manager.start()
        self._managers[name] = manager
        return manager

    def close(self) -> None:
        """Ends all work."""
        self._closing = True
        for manager in self._managers.values():
            if manager.is_running():
                manager.stop(hard_stop=True)
        plan_step.cache_clear()  # It holds tensors of the last steps.
        self._renderer.shutdown()


async def _next_step(steps: "asyncio.Queue[Step]", manager: ContinuousBatchingManager) -> Step:
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_SEC):
                return await steps.get()
        # A request that arrives just as an error ends the engine would wait for ever.
        if not manager.is_running() and steps.empty():
            raise Refused(503, "The engine has stopped. Try again.")


def _close_with_main(engine: "weakref.ref[TransformersEngine]") -> None:
    main_thread().join()
    if (left := engine()) is not None:
        left.close()
