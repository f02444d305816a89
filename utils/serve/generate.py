"""Generation with transformers: loading a model folder, replies to a batch of prompts, one streamed reply."""

import logging
import queue
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import torch

from utils.cli import progress_bar
from utils.data.chat import Chat, Sample, make_chat
from utils.data.tokenizer import load_tokenizer
from utils.files import read_json, shown
from utils.weights.loading import keep_packing, nf4_config

BATCH_SIZE = 16
# How configurations call the most tokens that a model can read and write; `max_position_embeddings` comes first.
LENGTH_NAMES = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")

# In 8 bits it would say for each layer and token that the inputs become fp16 ones.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


class Tuning(NamedTuple):
    """How a model or an adapter was trained, as far as that is known.

    Attributes:
        adapter: The adapter's folder, if it is one.
        system_prompt: Of the training data; None if nothing is known.
        chat_template: That it was trained with; empty if nothing is known.
        quant_bits: 4 if it was trained on a base in 4 bits.
    """

    adapter: Path | None = None
    system_prompt: str | None = None
    chat_template: str = ""
    quant_bits: int | None = None


def tuning_of(path: Path) -> Tuning:
    """Reads how the model, adapter or checkpoint in a folder was trained.

    Args:
        path: A finished model, a checkpoint of this project (or the adapter in it), or an adapter of any tool.

    Raises:
        ValueError: if a run.json is there and not what this project writes.
    """
    adapter = next((place for place in (path, path / "adapter") if (place / "adapter_config.json").is_file()), None)
    record = (path if adapter is None else adapter.parent) / "run.json"
    if not record.is_file():
        return Tuning(adapter)
    try:
        said = read_json(record)
        system, template = said.get("data", {}).get("system_prompt"), said.get("chat_template", "")
        bits = said.get("settings", {}).get("quant_bits")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{shown(record)} is damaged: it is not what this project writes.") from error
    # The template of a finished model is in its folder, and its weights are those that were trained on.
    return Tuning(adapter, system, template, bits) if adapter else Tuning(None, system)


def load_for_inference(
    path: Path,
    trust_remote_code: bool = False,
    adapters: Mapping[str, Path] | None = None,
    bits: int | None = None,
    offload_folder: Path | None = None,
    chat_template: str = "",
) -> tuple[Any, Chat]:
    """Loads a model folder for use, on the accelerator if there is one.

    Args:
        path: The model's folder.
        trust_remote_code: Whether the model's own Python code may run.
        adapters: Name -> folder of adapters beside its layers; the first one is in use, see `use_adapter`. The
            first one's tokenizer or chat template is used too, if it has one.
        bits: 4 (NF4) or 8 to quantise the weights as they are loaded; None: 4 if an adapter was trained so.
        offload_folder: Where weights go that fit neither the accelerator nor the memory.
        chat_template: A Jinja template to use instead of the model's or the adapter's.

    Returns:
        The model in the precision it was saved in (fp32 on CPUs, where 16 bits are slow), and its chat template.

    Raises:
        OSError, ValueError: if it is not whole, or an adapter does not go with it.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tunings = {name: tuning_of(folder) for name, folder in (adapters or {}).items()}
    for name, tuning in tunings.items():
        if tuning.adapter is None:
            raise FileNotFoundError(f"no adapter_config.json in {shown(adapters[name])}.")
    first = next(iter(tunings.values()), Tuning())
    if bits is None and any(tuning.quant_bits for tuning in tunings.values()):
        bits = 4
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"dtype": "auto" if on_gpu else torch.float32}
    if bits:
        compute = torch.float32
        if on_gpu:
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            compute = torch.bfloat16 if has_bf16 else torch.float16
        options = {"dtype": compute, "device_map": {"": 0 if on_gpu else "cpu"}}
        options["quantization_config"] = nf4_config(compute) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    if offload_folder is not None:
        options |= {"device_map": "auto", "offload_folder": offload_folder}
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    keep_packing(model)
    if "device_map" not in options:
        model = model.to("cuda" if on_gpu else "cpu")
    if tunings:
        model = _with_adapters(model, {name: tuning.adapter for name, tuning in tunings.items()})
    own = first.adapter is not None and (first.adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(first.adapter if own else path, chat_template or first.chat_template, trust_remote_code)
    return model.eval(), make_chat(tokenizer)


def _with_adapters(model: Any, folders: Mapping[str, Path]) -> Any:
    """Puts adapters beside a model's layers and returns the same model: no wrapper, so that all of transformers works.

    Raises:
        ValueError: if one does not go with the model.
    """
    from utils.weights.adapters import Adapter, attach_adapters, read_adapter, vocabulary_rows

    on_disk = any(parameter.is_meta for parameter in model.parameters())
    adapters = {}
    for name, folder in folders.items():
        try:
            config, tensors, weight = read_adapter(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"{shown(folder)}: {error}") from error
        if config.bias != "none":
            raise ValueError(f"{shown(folder)} changes the model's own biases. Merge it first: merge_qlora.py")
        if on_disk and (config.use_dora or any(".lora_" not in key for key in tensors)):
            raise ValueError(
                f"{shown(folder)} is more than plain LoRA: it cannot be used with weights on the disk. Merge it first: "
                "merge_qlora.py"
            )
        rows = vocabulary_rows(tensors)
        if rows and rows != model.get_input_embeddings().weight.shape[0]:
            if len(folders) > 1:
                raise ValueError(f"{shown(folder)} brings another vocabulary: it cannot be used beside others.")
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapters[name] = Adapter(config, tensors, weight)
    try:
        tuned = attach_adapters(model, adapters)
    except ValueError as error:
        raise ValueError(f"{' or '.join(map(shown, folders.values()))}: {error}") from error
    tuned.set_adapter(next(iter(folders)))
    return tuned.get_base_model()


def use_adapter(model: Any, adapter: str | None) -> None:
    """Activates one of a model's adapters, or none."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter, inference_mode=True)


def context_tokens(config: Any, tokenizer: Any) -> int | None:
    """The most tokens that a model can read and write together, or None where nothing says so.

    Args:
        config: The model's.
        tokenizer: Of the model; used where the configuration does not give a length.
    """
    text = config.get_text_config()
    said = [getattr(text, name, None) for name in LENGTH_NAMES] + [tokenizer.model_max_length]
    # Tokenizers without a limit name an enormous number; some configurations name -1.
    return next((int(number) for number in said if isinstance(number, int | float) and 0 < number < 1e9), None)


def end_ids(generation: Any, stop_id: int) -> list[int]:
    """The tokens that end a text: the template's stop token, and those of the model's generation settings."""
    own = generation.eos_token_id
    return sorted({stop_id, *(own if isinstance(own, list) else [] if own is None else [own])})


@torch.no_grad()
def replies(
    model: torch.nn.Module, chat: Chat, prompts: list[list[int]], max_new_tokens: int, progress: str = ""
) -> list[str]:
    """Answers prompts with the likeliest tokens (greedily, so that two runs can be compared).

    Args:
        model: In evaluation mode; under ZeRO stage 3 all ranks call this together.
        chat: The model's template.
        prompts: Token ids, from `Chat.prompt_ids`.
        max_new_tokens: The longest reply.
        progress: Name of a progress bar, if there shall be one.

    Returns:
        The replies, in the prompts' order.
    """
    texts = []
    batches = range(0, len(prompts), BATCH_SIZE)
    for start in progress_bar(batches, progress, "reply", bool(progress), unit_scale=BATCH_SIZE):
        rows = prompts[start : start + BATCH_SIZE]
        longest = max(map(len, rows))
        pad = chat.stop_id
        input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
        out = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=end_ids(model.generation_config, chat.stop_id),
            pad_token_id=pad,
        )
        texts += chat.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return [chat.said(text) for text in texts]


def show_replies(
    model: torch.nn.Module, chat: Chat, samples: Sequence[Sample], max_new_tokens: int, progress: str = ""
) -> list[dict[str, str]]:
    """Lets the model answer held-out prompts, greedily. All ranks call it together (ZeRO stage 3 gathers weights)."""
    prompts = [sample.input_ids[: sample.supervised.argmax()].tolist() for sample in samples]
    texts = replies(model, chat, prompts, max_new_tokens, progress)
    decode = partial(chat.tokenizer.decode, skip_special_tokens=True)
    return [
        {
            "id": sample.id,
            "prompt": decode(prompt),
            "reply": text,
            "real": chat.said(decode(sample.input_ids[len(prompt) :])),
        }
        for sample, prompt, text in zip(samples, prompts, texts, strict=True)
    ]


class IncrementalDetokenizer:
    """Turns token ids into text as they come; the text ends before a stop word.

    Pieces are whole letters: the bytes of one may be spread over several tokens. Put together they are the text that
    the tokenizer makes of all tokens, unless these hold bytes that make no letters.

    Attributes:
        stopped: Whether a stop word has come; what follows is not wanted.
    """

    def __init__(self, tokenizer: Any, stop_words: Sequence[str] = ()) -> None:
        self.stopped = False
        self._decode = partial(tokenizer.decode, skip_special_tokens=True)
        self._stop_words = [word for word in stop_words if word]
        # Tokens are decoded together with the last ones before them, since how one is written depends on these (a
        # space before a word, say): ids[start:said] are known to the reader, ids[said:] are not.
        self._ids: list[int] = []
        self._start = self._said = 0
        self._held = ""  # What may be the beginning of a stop word.

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """Takes further tokens.

        Args:
            ids: The tokens.
            last: Whether nothing follows.

        Returns:
            What can be said now.
        """
        self._held += self._letters(ids, last)
        if places := [place for word in self._stop_words if (place := self._held.find(word)) >= 0]:
            self.stopped = True
            return self._held[: min(places)]
        held = self._held
        beginnings = (
            n for word in self._stop_words for n in range(1, min(len(word), len(held) + 1)) if held.endswith(word[:n])
        )
        end = len(self._held) - (0 if last else max(beginnings, default=0))
        piece, self._held = self._held[:end], self._held[end:]
        return piece

    def _letters(self, ids: Sequence[int], last: bool) -> str:
        self._ids += ids
        before, now = self._decode(self._ids[self._start : self._said]), self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not last):
            return ""
        self._start, self._said = self._said, len(self._ids)
        return now[len(before) :]


def stream(
    model: Any,
    tokenizer: Any,
    input_ids: list[int],
    max_new_tokens: int,
    stop_id: int,
    stop_words: Sequence[str] = (),
    **sampling: Any,
) -> Iterator[str]:
    """Streams the continuation of a prompt until it ends or the caller closes the stream.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        input_ids: The prompt.
        max_new_tokens: The most tokens to write.
        stop_id: The token that ends the text; the model's own end tokens count too.
        stop_words: Texts that end it too; they are not part of it. Control tokens may be among them.
        **sampling: Passed to transformers' `generate`.

    Yields:
        Text, as it comes.
    """
    from transformers import StoppingCriteriaList
    from transformers.generation import BaseStreamer

    tokens: queue.Queue[list[int] | None] = queue.Queue()

    class Tokens(BaseStreamer):
        def put(self, value: torch.Tensor) -> None:
            tokens.put(value.flatten().tolist())

        def end(self) -> None:
            tokens.put(None)

    stopped = Event()
    device = model.device
    if device.type == "meta":  # The embedding is on the disk.
        device = model.get_input_embeddings()._hf_hook.execution_device
    ids = torch.tensor([input_ids], device=device)
    # Control tokens are no part of the text in which other stop words are looked for.
    controls = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    stop_ids = [controls[word] for word in stop_words if word in controls]
    options = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=Tokens(),
        stopping_criteria=StoppingCriteriaList([lambda *_, **__: stopped.is_set()]),
        eos_token_id=[*end_ids(model.generation_config, stop_id), *stop_ids],
        pad_token_id=stop_id,
        **sampling,
    )
    errors: list[BaseException] = []

    def work() -> None:
        try:
            if not stopped.is_set():
                model.generate(**options)
        except BaseException as error:  # Handed to the reader below: a thread's own exceptions would be lost.
            errors.append(error)
            tokens.put(None)

    worker = Thread(target=work, daemon=True)
    try:
        worker.start()
        speech, first = IncrementalDetokenizer(tokenizer, stop_words), tokens.get()  # The prompt.
        while first is not None and not speech.stopped:
            new = tokens.get()
            if piece := speech.add(new or [], last=new is None):
                yield piece
            if new is None:
                break
    finally:
        # Also after Ctrl-C: a thread that still computes while Python ends would abort the process.
        stopped.set()
        if worker.is_alive():  # Else Ctrl-C came while it was started, and it will not begin.
            worker.join()
    if errors:
        raise errors[0]
