"""utils/generate.py: batches, single replies and streams say the same.

python -m pytest tests/test_utils_generate.py
"""

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model

from utils.data import Chat, make_chat
from utils.generate import load_finished, replies, stream

N_NEW = 12


def speaking_model(kind: str, tokenizer: Any) -> Any:
    """A random model that writes whole letters only, and neither control tokens nor pieces of letters."""
    model = make_model(kind, len(tokenizer)).eval()
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    silent = [token for token, text in enumerate(texts) if "\ufffd" in text or not text.strip() or token < 3]
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # No longer tied to the input.
    with torch.no_grad():
        # Their logits are 0, and among the others one is always positive.
        head.weight[silent] = 0
    return model


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> Chat:
    return make_chat(tokenizer)


@pytest.fixture(scope="module")
def prompts(chat: Chat) -> list[list[int]]:
    """Of very different lengths."""
    questions = ["问", "今天吃什么？" * 12, "好看", "哈哈哈哈哈", "这是一个很长的标题" * 3]
    return [chat.prompt_ids([{"role": "user", "content": question}]) for question in questions]


@torch.no_grad()
def alone(model: Any, prompt: list[int], n_new: int = N_NEW, stop_ids: tuple[int, ...] = ()) -> list[int]:
    """The likeliest tokens, one full forward pass each: no cache, no padding, no generate."""
    ids = [*prompt]
    while len(ids) < len(prompt) + n_new:
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "mistral"])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_replies_of_a_batch_are_those_of_each_alone(
    tokenizer: Any, chat: Chat, prompts: list[list[int]], kind: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.generate.BATCH_SIZE", batch_size)
    model = speaking_model(kind, tokenizer)
    expected = [tokenizer.decode(alone(model, prompt)).strip() for prompt in prompts]
    assert replies(model, chat, prompts, N_NEW) == expected
    assert len(set(expected)) > 1 and all(expected)


def test_replies_end_at_the_stop_token(tokenizer: Any, chat: Chat, prompts: list[list[int]]) -> None:
    """Each at its own, while others of the batch go on. The stop token itself is not part of a reply."""
    model = speaking_model("llama", tokenizer)
    endless = [alone(model, prompt) for prompt in prompts]
    stop_id = endless[1][4]
    expected = [tokens[: tokens.index(stop_id)] if stop_id in tokens else tokens for tokens in endless]
    assert len({len(tokens) for tokens in expected}) > 1
    # The stop token of the test is a letter: it is marked as a control token, so that decoding leaves it out.
    marked = copy.deepcopy(tokenizer)
    marked.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(stop_id)]})
    found = replies(model, replace(chat, tokenizer=marked, stop_id=stop_id), prompts, N_NEW)
    assert found == [tokenizer.decode(tokens).strip() for tokens in expected]


def test_replies_to_nothing(tokenizer: Any, chat: Chat) -> None:
    assert replies(speaking_model("llama", tokenizer), chat, [], N_NEW) == []


def test_replies_are_greedy_whatever_the_model_recommends(tokenizer: Any, chat: Chat, prompts: list[list[int]]) -> None:
    """Published models recommend sampling settings in generation_config.json, and padding must not disturb them."""
    model = speaking_model("llama", tokenizer)
    expected = replies(model, chat, prompts, N_NEW)
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, min_p=0.1)
    assert replies(model, chat, prompts, N_NEW) == expected
    model.generation_config.update(repetition_penalty=1.3)
    with_penalty = [text for prompt in prompts for text in replies(model, chat, [prompt], N_NEW)]
    assert replies(model, chat, prompts, N_NEW) == with_penalty, "the same in a batch as alone"


def ends_after(model: Any, first_token: int, end_id: int) -> Any:
    """Makes a model write an end token right after a token."""
    plain_forward = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = plain_forward(*args, **kwargs)
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        out.logits[ids[:, -1] == first_token, -1, end_id] = 1e4
        return out

    model.forward = forward
    return model


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "replies"])
def test_the_models_own_end_token_ends_the_text(
    tokenizer: Any, chat: Chat, prompts: list[list[int]], streamed: bool
) -> None:
    """A base model ends in <|endoftext|>, whatever its template's stop token is. What it would write next is noise."""
    model = speaking_model("llama", tokenizer)
    assert model.generation_config.eos_token_id == 0 != chat.stop_id
    tokens = alone(model, prompts[0])
    end = next(n for n, token in enumerate(tokens) if token not in tokens[:n] and n >= 3)
    model = ends_after(model, tokens[end], end_id=0)
    if streamed:
        text = "".join(stream(model, tokenizer, prompts[0], N_NEW, chat.stop_id, do_sample=False)).strip()
    else:
        (text,) = replies(model, chat, prompts[:1], N_NEW)
    assert text == tokenizer.decode(tokens[: end + 1]).strip()


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_stream_is_a_reply_in_pieces(tokenizer: Any, chat: Chat, prompts: list[list[int]], kind: str) -> None:
    model = speaking_model(kind, tokenizer)
    for prompt, text in zip(prompts, replies(model, chat, prompts, N_NEW), strict=True):
        pieces = list(stream(model, tokenizer, prompt, N_NEW, chat.stop_id, do_sample=False))
        assert "".join(pieces).strip() == text
        assert len(pieces) > 2, "piece by piece"


def test_a_stream_samples_by_seed(tokenizer: Any, chat: Chat, prompts: list[list[int]]) -> None:
    from transformers import set_seed

    model = speaking_model("llama", tokenizer)
    texts = []
    for seed in (1, 1, 2):
        set_seed(seed)
        sampling = dict(do_sample=True, temperature=5.0, top_p=1.0)
        texts.append("".join(stream(model, tokenizer, prompts[0], N_NEW, chat.stop_id, **sampling)))
    assert texts[0] == texts[1] != texts[2]


def test_a_stream_that_is_closed_ends_its_thread(tokenizer: Any, chat: Chat, prompts: list[list[int]]) -> None:
    """A thread that still computes while Python ends would abort the process."""
    model = speaking_model("llama", tokenizer)
    pieces = stream(model, tokenizer, prompts[0], 100_000, chat.stop_id, do_sample=False)
    next(pieces)
    assert any("work" in thread.name for thread in threading.enumerate())
    pieces.close()
    assert not any("work" in thread.name for thread in threading.enumerate())


def test_an_error_while_generating_reaches_the_reader(
    tokenizer: Any, chat: Chat, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = speaking_model("llama", tokenizer)
    plain_forward = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] == 1:
            raise MemoryError("no room")
        return plain_forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(MemoryError, match="no room"):
        list(stream(model, tokenizer, prompts[0], N_NEW, chat.stop_id, do_sample=False))
    assert threading.active_count() == 1 or not any("work" in thread.name for thread in threading.enumerate())


def test_load_finished(model_dir: Path, prompts: list[list[int]]) -> None:
    model, chat = load_finished(model_dir / "tiny/llama")
    assert not model.training and model.dtype == torch.float32
    assert chat.tokenizer.convert_ids_to_tokens(chat.stop_id) == "<|im_end|>"
    plain = make_model("llama", len(chat.tokenizer)).eval()
    ids = torch.tensor([prompts[0]])
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
