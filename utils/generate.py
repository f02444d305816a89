"""Talking to a model: load a finished one, whole replies for many prompts, one reply as a stream."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from utils.data import Chat, Sample, make_chat
from utils.model import load_tokenizer

BATCH_SIZE = 16


def load_finished(path: Path, trust_remote_code: bool = False) -> tuple[torch.nn.Module, Chat]:
    """Loads a model folder for use, on the accelerator if there is one.

    Returns:
        The model in the precision it was saved in (fp32 on CPUs, where 16 bits are slow), and its chat template.
    """
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto" if on_gpu else torch.float32, trust_remote_code=trust_remote_code
    )
    model = model.to("cuda" if on_gpu else "cpu").eval()
    return model, make_chat(load_tokenizer(path, trust_remote_code=trust_remote_code))


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
    from tqdm import tqdm

    texts = []
    for start in tqdm(range(0, len(prompts), BATCH_SIZE), progress, disable=not progress, unit_scale=BATCH_SIZE):
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
    return [text.strip() for text in texts]


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
            "real": decode(sample.input_ids[len(prompt) :]).strip(),
        }
        for sample, prompt, text in zip(samples, prompts, texts, strict=True)
    ]


def stream(
    model: torch.nn.Module, tokenizer: Any, input_ids: list[int], max_new_tokens: int, stop_id: int, **sampling: Any
) -> Iterator[str]:
    """Writes on from a prompt, piece by piece, until the text ends or the caller closes the stream.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        input_ids: The prompt.
        max_new_tokens: The most tokens to write.
        stop_id: The token that ends the text; the model's own end tokens count too.
        **sampling: Passed to transformers' `generate`.

    Yields:
        Text, as it comes.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped = Event()
    ids = torch.tensor([input_ids], device=model.device)
    options = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([lambda *_, **__: stopped.is_set()]),
        eos_token_id=end_ids(model.generation_config, stop_id),
        pad_token_id=stop_id,
        **sampling,
    )
    errors: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**options)
        except BaseException as error:  # Handed to the reader below: a thread's own exceptions would be lost.
            errors.append(error)
            streamer.end()

    worker = Thread(target=work, daemon=True)
    worker.start()
    try:
        yield from streamer
    finally:
        # Also after Ctrl-C: a thread that still computes while Python ends would abort the process.
        stopped.set()
        worker.join()
    if errors:
        raise errors[0]
