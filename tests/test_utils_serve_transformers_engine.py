"""utils/serve/transformers_engine.py, paged_attention.py: answers written together are those written alone.

python -m pytest tests/test_utils_serve_transformers_engine.py
"""

import argparse
import asyncio
import copy
import itertools
import logging
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

from utils.data.chat import Chat, make_chat
from utils.serve.capacity import Capacity, find_capacity
from utils.serve.generate import load_for_inference
from utils.serve.limits import Refused
from utils.serve.paged_attention import attend, attend_together, plan_step
from utils.serve.routes import Answers, Sampling, Served, collect
from utils.serve.transformers_engine import TransformersEngine, check_engine

N_NEW = 24
GREEDY = Sampling(temperature=0, max_tokens=N_NEW)


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> Chat:
    return make_chat(tokenizer)


@pytest.fixture(scope="module")
def prompts(chat: Chat) -> list[list[int]]:
    """Of very different lengths; some begin alike, some are shorter than a page of the cache, two are equal."""
    texts = ["问", "今天吃什么？" * 20, "今天吃什么？" * 20 + "好看", "哈哈" * 9, "标题" * 40, "好", "好", "猫" * 70]
    return [chat.prompt_ids([{"role": "user", "content": text}]) for text in texts]


@pytest.fixture
def engines() -> Iterator[Callable[..., TransformersEngine]]:
    """Makes engines, and ends them."""
    made = []

    def make(model: Any, chat: Chat, names: tuple[str, ...] = ("m",), **changes: int) -> TransformersEngine:
        room = Capacity(512, 8, 64, 4096)._replace(**changes)
        served = [Served(name, None) for name in names]
        made.append(TransformersEngine(model, chat, served, names[1:], room))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def ask(engine: TransformersEngine, prompts: list[list[int]], sampling: Sampling, model: str = "m") -> list[Answers]:
    """All at once."""

    async def together() -> list[Answers]:
        asked = [collect(engine.generate(ids, sampling, model), sampling.n) for ids in prompts]
        return await asyncio.gather(*asked)

    return asyncio.run(together())


def alone(model: Any, chat: Chat, prompts: list[list[int]], n_new: int = N_NEW) -> list[str]:
    """What transformers' generate writes, one prompt at a time."""
    texts = []
    for ids in prompts:
        settings = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": [0, chat.stop_id], "pad_token_id": 0}
        out = model.generate(torch.tensor([ids]), **settings)
        texts.append(chat.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    return texts


def texts_of(answers: list[Answers]) -> list[str]:
    return [answer.texts[0] for answer in answers]


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("new", "every"), [(1, 1), (1, 9), (4, 4), (4, 9), (9, 9)])
def test_attend_is_attention_by_its_formula(new: int, every: int, window: int | None) -> None:
    """softmax(q k / sqrt(d)) v, written out, with keys repeated for the heads that share them."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, new, 8), torch.randn(1, 2, every, 8), torch.randn(1, 2, every, 8)
    expected = torch.zeros_like(query)
    for head in range(4):
        for place in range(new):
            last = every - new + place
            first = 0 if window is None else max(0, last - window + 1)
            keys, values = key[0, head // 2, first : last + 1], value[0, head // 2, first : last + 1]
            expected[0, head, place] = (keys @ query[0, head, place] / 8**0.5).softmax(0) @ values
    assert torch.allclose(attend(query, key, value, 8**-0.5, window), expected, atol=1e-6)


@pytest.mark.parametrize("window", [None, 20])
def test_requests_with_one_new_token_are_computed_together(window: int | None) -> None:
    """Of seven requests six write; the keys of five begin with slots 40 to 79, one's do not. One reads its prompt.

    Against each request's own attention. Without the sixth, what is common is read once.
    """
    torch.manual_seed(1)
    tables, query = torch.randn(2, 400, 2, 8), torch.randn(1, 4, 6 + 7, 8)
    common = [*range(40, 80)]
    requests = [
        [*common, 0, 1, 2],
        [*range(100, 120)],  # Its last seven tokens are new.
        [*common, 5],
        [*common, *range(150, 190)],
        [*common, 6, 7],
        [*common, *range(200, 300)],
        [*range(300, 400)],
    ]
    for count in (7, 6, 2):
        asked = requests[:count]
        begins = torch.tensor([0, *itertools.accumulate(map(len, asked))])
        new = torch.tensor([0, 1, 8, 9, 10, 11, 12, 13][: count + 1])
        step = plan_step(torch.tensor(sum(asked, [])), new, begins, 2, window, True)
        shared = count == 6 and window is None
        assert step.common.tolist() == (
            [[2 * slot + group for slot in common] for group in (0, 1)] if shared else [[], []]
        )
        assert (slice(1, 8), requests[1]) in [(mine, slots.tolist()) for mine, slots in step.others]
        found, flat = {}, tables.flatten(1, 2)
        for mine, slots in step.others:  # Those that no other one is like are computed by themselves.
            if mine.stop == mine.start + 1:
                key, value = tables[:, None, slots].transpose(2, 3)
                found[mine.start] = attend(query[:, :, mine], key, value, 8**-0.5, window)[0, :, 0]
        assert len(found) < len(asked) - 1 or count == 2
        for rows, places, bias in step.batches:
            lengths = (bias[:, 0] == 0).sum(-1)
            assert len(rows) > 1 and lengths.max() == places.shape[-1] <= 2 * lengths.min()
            out = attend_together(
                query[0, :, rows].transpose(0, 1), flat[:, places], flat[:, step.common], bias, 8**-0.5
            )
            found |= dict(zip(rows.tolist(), out, strict=True))
        places = new[:-1].tolist()
        assert sorted(found) == [place for number, place in enumerate(places) if number != 1]
        for place, slots in zip(places, asked, strict=True):
            if place in found:
                key, value = tables[:, None, slots].transpose(2, 3)
                expected = attend(query[:, :, place : place + 1], key, value, 8**-0.5, window)
                assert torch.allclose(found[place], expected[0, :, 0], atol=1e-6)


@pytest.mark.parametrize("slots", [[*range(31), 90, *range(31), 91], [*range(40), 90, *range(50, 90), 91]])
def test_little_in_common_is_not_shared(slots: list[int]) -> None:
    begins = torch.tensor([0, len(slots) // 2 if len(slots) == 64 else 41, len(slots)])
    step = plan_step(torch.tensor(slots), torch.tensor([0, 1, 2]), begins, 1, None, True)
    assert tuple(step.common.shape) == (1, 0) and [{*batch.rows.tolist()} for batch in step.batches] == [{0, 1}]


def test_products_in_16_bits_are_not_rounded() -> None:
    """As near to the exact result as PyTorch's own attention, where scores are large."""
    torch.manual_seed(0)
    query, keys = torch.randn(8, 8, 64).bfloat16() * 3, torch.randn(2, 8, 500, 64).bfloat16()
    values, bias = torch.randn(2, 8, 500, 64).bfloat16(), torch.zeros(8, 1, 500)
    nothing = keys.new_empty(2, 0, 64)
    found = attend_together(query, (keys, values), (nothing, nothing), bias, 0.125)
    grouped = query.view(8, 2, 4, 64)

    def exact(dtype: torch.dtype) -> torch.Tensor:
        parts = (part.to(dtype) for part in (grouped, keys.transpose(0, 1), values.transpose(0, 1)))
        return torch.nn.functional.scaled_dot_product_attention(*parts, scale=0.125).flatten(1, 2)

    expected = exact(torch.float64)
    error, usual = ((one.double() - expected).abs().mean() for one in (found, exact(torch.bfloat16)))
    assert error < 1.5 * usual


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])
def test_answers_written_together_are_those_written_alone(
    kind: str, tokenizer: Any, chat: Chat, prompts: list[list[int]], engines: Any
) -> None:
    """Prompts longer than a step's tokens, a window of 16, and a second time with the prompts in the cache."""
    model = make_model(kind, len(tokenizer), tie_word_embeddings=False).eval()
    expected = alone(model, chat, prompts)
    engine = engines(model, chat)
    assert texts_of(ask(engine, prompts, GREEDY)) == expected
    assert texts_of(ask(engine, prompts[::-1], GREEDY)) == expected[::-1]
    assert len(set(expected)) > 5


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
def test_answers_to_prompts_that_begin_alike(
    kind: str, tokenizer: Any, chat: Chat, prompts: list[list[int]], engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long system prompt: its keys are read once a step. Pages are shared where no layer has a window."""
    calls = []

    def attend_and_count(query: torch.Tensor, own: Any, common: Any, *args: Any) -> torch.Tensor:
        calls.append(len(query) if common[0].shape[1] else 0)
        return attend_together(query, own, common, *args)

    monkeypatch.setattr("utils.serve.paged_attention.attend_together", attend_and_count)
    system = {"role": "system", "content": "你在哔哩哔哩看视频，说话简短。" * 6}
    asked = [chat.prompt_ids([system, {"role": "user", "content": "问" * count}]) for count in (1, 9, 40, 2, 2, 17)]
    model = make_model(kind, len(tokenizer), tie_word_embeddings=False).eval()
    expected = alone(model, chat, asked)
    engine = engines(model, chat)
    assert texts_of(ask(engine, asked, GREEDY)) == expected
    assert (max(calls, default=0) > 1) == (kind == "llama")


@pytest.mark.slow
def test_a_cache_that_is_too_small_for_all(
    tokenizer: Any, chat: Chat, prompts: list[list[int]], engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are pushed out and come again; drawn answers with penalties are the same, too."""
    pushed, offload = [], OffloadingManager.offload_requests
    monkeypatch.setattr(OffloadingManager, "offload_requests", lambda self: pushed.append(0) or offload(self))
    model = make_model("llama", len(tokenizer)).eval()
    expected = alone(model, chat, prompts, 100)
    drawn = Sampling(temperature=1.5, seed=3, max_tokens=100, repetition_penalty=1.2, presence_penalty=0.5)
    roomy, narrow = engines(model, chat), engines(copy.deepcopy(model), chat, cache_tokens=384)
    assert texts_of(ask(narrow, prompts, GREEDY.model_copy(update={"max_tokens": 100}))) == expected
    greedy_ones = len(pushed)
    assert texts_of(ask(narrow, prompts, drawn)) == texts_of(ask(roomy, prompts, drawn))
    assert 0 < greedy_ones < len(pushed)


def test_n_answers_differ_and_a_seed_repeats_them(
    tokenizer: Any, chat: Chat, prompts: list[list[int]], engines: Any
) -> None:
    engine = engines(make_model("llama", len(tokenizer)).eval(), chat)
    drawn = Sampling(n=3, temperature=2.0, seed=5, max_tokens=12)
    (one,), two = ask(engine, prompts[:1], drawn), ask(engine, prompts[:4], drawn)
    assert one.texts == two[0].texts and len(set(one.texts)) == 3
    assert one.finish_reasons == ["length"] * 3 and one.tokens == 36
    assert ask(engine, prompts[:1], drawn.model_copy(update={"seed": 6}))[0].texts != one.texts
    first = ask(engine, prompts[:1], drawn.model_copy(update={"n": 1}))[0].texts
    assert first == one.texts[:1], "the first of three is the one that is asked for alone"


def test_settings_of_one_request_are_not_anothers(
    tokenizer: Any, chat: Chat, prompts: list[list[int]], engines: Any
) -> None:
    model = make_model("llama", len(tokenizer)).eval()
    expected = alone(model, chat, prompts)
    engine = engines(model, chat)

    async def mixed() -> list[Answers]:
        wild = Sampling(temperature=50.0, seed=1, max_tokens=N_NEW, frequency_penalty=2.0)
        sampled = [collect(engine.generate(ids, wild, "m"), 1) for ids in prompts]
        return await asyncio.gather(*sampled, *[collect(engine.generate(ids, GREEDY, "m"), 1) for ids in prompts])

    answers = texts_of(asyncio.run(mixed()))
    assert answers[len(prompts) :] == expected and answers[: len(prompts)] != expected


def test_the_models_own_settings_hold_where_nothing_is_asked(tokenizer: Any, chat: Chat, engines: Any) -> None:
    model = make_model("llama", len(tokenizer)).eval()
    model.generation_config.update(temperature=0.6, top_k=20, top_p=0.8, repetition_penalty=1.1)
    engine = engines(model, chat)
    own = engine.choice(Sampling())
    assert (own.temperature, own.top_k, own.top_p, own.repetition_penalty) == (0.6, 20, 0.8, 1.1)
    asked = engine.choice(Sampling(temperature=0, top_k=-1, top_p=1, repetition_penalty=1))
    assert (asked.temperature, asked.top_k, asked.top_p, asked.repetition_penalty) == (0, 0, 1, 1)
    assert engine.choice(Sampling(top_k=7)).top_p == 0.8


@pytest.mark.parametrize("given", ["stop_token_ids", "stop"])
def test_an_answer_ends_before_what_stops_it(
    given: str, tokenizer: Any, chat: Chat, prompts: list[list[int]], engines: Any
) -> None:
    """Token ids that the model does not have are no error: the model never writes them."""
    model = make_model("llama", len(tokenizer)).eval()
    prompt = prompts[1]
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=N_NEW, do_sample=False)[0, len(prompt) :].tolist()
    place = next(
        n for n, token in enumerate(ids) if n > 3 and token not in ids[:n] and len(tokenizer.decode(token)) > 0
    )
    whole = tokenizer.decode(ids)
    if given == "stop_token_ids":
        asked, expected = {"stop_token_ids": [151643, ids[place]]}, tokenizer.decode(ids[:place])
    else:
        word = whole[5:8]
        asked, expected = {"stop": ["no such text", word]}, whole[: whole.index(word)]
    (answer,) = ask(engines(model, chat), [prompt], GREEDY.model_copy(update=asked))
    assert answer.texts == [expected.rstrip("\ufffd") if given == "stop" else expected]
    assert answer.finish_reasons == ["stop"] and answer.tokens <= N_NEW


def test_a_closed_answer_frees_its_place(tokenizer: Any, chat: Chat, prompts: list[list[int]], engines: Any) -> None:
    """Half of the answers are left after their first piece; nothing of them is left in the engine."""
    engine = engines(make_model("llama", len(tokenizer)).eval(), chat)
    long = GREEDY.model_copy(update={"max_tokens": 400, "n": 2, "seed": 1})

    async def leave(ids: list[int]) -> None:
        pieces = engine.generate(ids, long, "m")
        await anext(pieces)
        await pieces.aclose()

    async def load() -> list[Answers]:
        kept = [collect(engine.generate(ids, GREEDY, "m"), 1) for ids in prompts]
        await asyncio.gather(*[leave(ids) for ids in prompts])
        return await asyncio.gather(*kept)

    assert all(answer.tokens for answer in asyncio.run(load()))
    (manager,) = engine._managers.values()
    ask(engine, prompts[:1], GREEDY)  # By the end of another one, the engine has seen that the others have left.
    scheduler = manager.batch_processor.scheduler
    assert not scheduler.active_requests and not scheduler.waiting_requests
    assert not manager.output_router.readers and manager.output_router.output_queue.empty()
    assert not manager.logit_processor.generators


def test_an_error_of_the_engine_reaches_all_and_it_starts_anew(
    tokenizer: Any, chat: Chat, prompts: list[list[int]], engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", len(tokenizer)).eval()
    expected, engine = alone(model, chat, prompts), engines(model, chat)
    with monkeypatch.context() as patch:
        failing = lambda *_: (_ for _ in ()).throw(MemoryError("the card is full"))  # noqa: E731
        patch.setattr("utils.serve.transformers_engine.sample_tokens", failing)
        # pytest would keep what is logged, and with the traceback all that the engine held.
        patch.setattr(logging.getLogger("ContinuousBatchingLogger"), "disabled", True)

        async def fail() -> list[Any]:
            asked = [collect(engine.generate(ids, GREEDY, "m"), 1) for ids in prompts[:2]]
            return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)

        statuses = [error.status for error in asyncio.run(fail()) if isinstance(error, Refused)]
        assert len(statuses) == 2 and min(statuses) >= 500
        dead = weakref.ref(engine._managers["m"])
    assert texts_of(ask(engine, prompts, GREEDY)) == expected
    assert dead() is None, "its cache is gone"


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def with_adapters(folder: Path, base: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Adapters with random numbers, as PEFT writes them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = {}
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        folders[name] = folder / name
        tuned.save_pretrained(folders[name])
    return folders


@pytest.mark.slow
def test_adapters_answer_at_the_same_time(
    model_dir: Path, prompts: list[list[int]], engines: Any, tmp_path: Path
) -> None:
    """Base and two adapters share the weights; each says what PEFT's model with that adapter alone says."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = model_dir / "tiny/qwen2"
    folders = with_adapters(tmp_path, base, ("one", "two"))
    model, chat = load_for_inference(base, adapters=folders)
    expected = {"m": alone(AutoModelForCausalLM.from_pretrained(base), chat, prompts)}
    for name, folder in folders.items():
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
        expected[name] = alone(plain, chat, prompts)
    engine = engines(model, chat, names=("m", "one", "two"))

    async def all_three() -> list[list[Answers]]:
        def group(name: str) -> Awaitable[list[Answers]]:
            return asyncio.gather(*[collect(engine.generate(ids, GREEDY, name), 1) for ids in prompts])

        return await asyncio.gather(*[group(name) for name in expected])

    found = asyncio.run(all_three())
    assert [texts_of(answers) for answers in found] == [*expected.values()]
    assert expected["m"] != expected["one"] != expected["two"]
    check_engine(engines(load_for_inference(base, adapters=folders)[0], chat, names=("m", "one", "two")))


# ---------------------------------------------------------------------------------------------------------------------
# What does not go


def test_attention_that_is_not_known_is_noticed(tokenizer: Any, chat: Chat, engines: Any) -> None:
    """Gemma 2 has a soft cap."""
    model = make_model("gemma2", len(tokenizer), attn_logit_softcapping=5.0).eval()
    with pytest.raises(ValueError, match="soft cap.*vLLM may"):
        check_engine(engines(model, chat))


@pytest.mark.slow
def test_an_engine_that_says_something_else_is_noticed(
    tokenizer: Any, chat: Chat, engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama", len(tokenizer)).eval()
    check_engine(engines(model, chat))
    zeros = "utils.serve.paged_attention.attend_together", lambda query, *args: torch.zeros_like(query)
    monkeypatch.setattr(*zeros)
    with pytest.raises(ValueError, match="writes .* where the model writes"):
        check_engine(engines(make_model("llama", len(tokenizer)).eval(), chat))


@pytest.mark.slow
def test_small_rooms(tokenizer: Any, chat: Chat, prompts: list[list[int]], engines: Any) -> None:
    """One answer at a time, few tokens: the trial at the start fits, and so does the longest answer there may be."""
    args = argparse.Namespace(max_num_batched_tokens=None, gpu_memory_utilization=0.85)
    for args.max_num_seqs, args.max_model_len in ((1, 64), (1, 256), (3, 100)):
        model = make_model("llama", len(tokenizer)).eval()
        expected = alone(model, chat, prompts[:1], args.max_model_len - len(prompts[0]))
        engine = engines(model, chat)
        engine._room = find_capacity(model, chat, 1, args)
        engine.max_model_len = args.max_model_len
        check_engine(engine)
        longest = GREEDY.model_copy(update={"max_tokens": args.max_model_len - len(prompts[0])})
        assert texts_of(ask(engine, prompts[:1] * 4, longest)) == expected * 4


def test_slow_readers_do_not_pile_up(tokenizer: Any, chat: Chat, prompts: list[list[int]], engines: Any) -> None:
    """What waits for a reader is each token once, not the whole answer once a token."""
    engine = engines(make_model("llama", len(tokenizer)).eval(), chat)
    asked = Sampling(temperature=3.0, seed=1, max_tokens=200)

    async def slowly() -> int:
        pieces = engine.generate(prompts[0], asked, "m")
        await anext(pieces)
        (manager,) = engine._managers.values()
        while manager.is_running() and manager.batch_processor.has_pending_requests():
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        (reader,) = manager.output_router.readers.values()
        waiting = sum(len(step.new_ids) for step in list(reader.steps._queue))
        answers = Answers(1)
        async for piece in pieces:
            answers.add(piece)
        assert answers.finish_reasons == ["length"]
        return waiting

    assert 100 < asyncio.run(slowly()) < 200


def test_room(tokenizer: Any, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of a token of the tiny model: 2 x 2 layers x 2 heads x 16 numbers of 4 bytes."""
    model = make_model("llama", len(tokenizer))
    args = argparse.Namespace(
        max_model_len=None, max_num_seqs=4, max_num_batched_tokens=None, gpu_memory_utilization=0.85
    )
    token_bytes = 2 * 2 * 2 * 16 * 4
    monkeypatch.setattr("utils.serve.capacity._free_bytes", lambda *_: 10_000 * token_bytes)
    assert find_capacity(model, chat, 1, args) == Capacity(2048, 4, 512, 8384)
    assert find_capacity(model, chat, 2, args).cache_tokens == 4992, "half of 10,000 tokens for each of two names"
    args.max_model_len = 4000
    with pytest.raises(ValueError, match="made for 2,048 tokens"):
        find_capacity(model, chat, 1, args)
    args.max_model_len = 1000
    monkeypatch.setattr("utils.serve.capacity._free_bytes", lambda *_: 700 * token_bytes)
    with pytest.raises(ValueError, match="--max_model_len 688 or less"):
        find_capacity(model, chat, 1, args)
