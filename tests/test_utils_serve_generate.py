"""utils/serve/generate.py: batches, single replies and streams say the same.

python -m pytest tests/test_utils_serve_generate.py
"""

import copy
import json
import logging
import shutil
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CHATML, example_texts, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from utils.data.chat import Chat, make_chat
from utils.serve.generate import (
    IncrementalDetokenizer,
    context_tokens,
    load_for_inference,
    replies,
    stream,
    tuning_of,
    use_adapter,
)

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
    monkeypatch.setattr("utils.serve.generate.BATCH_SIZE", batch_size)
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


def test_ctrl_c_while_a_stream_begins(
    tokenizer: Any, chat: Chat, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread is there by then, and must end too."""
    model, plain_start = speaking_model("llama", tokenizer), threading.Thread.start

    def start(thread: threading.Thread) -> None:
        plain_start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        next(stream(model, tokenizer, prompts[0], 100_000, chat.stop_id, do_sample=False))
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
    model, chat = load_for_inference(model_dir / "tiny/llama")
    assert not model.training and model.dtype == torch.float32
    assert chat.tokenizer.convert_ids_to_tokens(chat.stop_id) == "<|im_end|>"
    plain = make_model("llama", len(chat.tokenizer)).eval()
    ids = torch.tensor([prompts[0]])
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


# ---------------------------------------------------------------------------------------------------------------------
# Text that comes in pieces


def with_byte_fallback(strip: bool) -> Any:
    """A tokenizer as SentencePiece makes them: spaces are ▁, rare letters are byte tokens.

    Args:
        strip: Whether a text's first space is added and taken away again, as Llama does and Gemma does not.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    plain = Tokenizer(models.BPE())
    plain.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=600, limit_alphabet=120, show_progress=False)
    plain.train_from_iterator([line[:200] for line in example_texts()[::20]], trainer)
    learnt = json.loads(plain.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in learnt["merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    first = [normalizers.Prepend("▁")] if strip else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if strip else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Any) -> dict[str, Any]:
    return {"bytes": tokenizer, "llama": with_byte_fallback(strip=True), "gemma": with_byte_fallback(strip=False)}


# Letters of one to four bytes, some of which are joined to one picture, and what is special in some tokenizer.
LETTERS = [*"ab .,'\n\té今天饕🤣\ufffd▁", "👨\u200d👩\u200d👧", "🏳️\u200d🌈", "  ", "<0x0A>", "哈哈哈"]


@pytest.mark.parametrize("kind", ["bytes", "llama", "gemma"])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_pieces_are_the_whole_text(tokenizers: dict[str, Any], kind: str, data: st.DataObject) -> None:
    """However many tokens come at once, control tokens among them, and wherever the text is cut off."""
    tokenizer = tokenizers[kind]
    text = "".join(data.draw(st.lists(st.sampled_from(LETTERS), max_size=12)))
    ids = tokenizer.encode(text, add_special_tokens=False)
    if data.draw(st.booleans()):
        ids.insert(data.draw(st.integers(0, len(ids))), 1)
    speech, pieces, start = IncrementalDetokenizer(tokenizer), [], 0
    while start < len(ids):
        end = start + data.draw(st.integers(1, 3))
        pieces.append(speech.add(ids[start:end]))
        start = end
    assert not any(piece.endswith("\ufffd") for piece in pieces), "a letter is not said before it is whole"
    pieces.append(speech.add([], last=True))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["bytes", "gemma"])
@settings(deadline=None, max_examples=100)
@given(numbers=st.lists(st.integers(0, 258), max_size=12))
def test_bytes_that_make_no_letters(tokenizers: dict[str, Any], kind: str, numbers: list[int]) -> None:
    """They come as the replacement character, and what follows them comes."""
    tokenizer = tokenizers[kind]
    speech = IncrementalDetokenizer(tokenizer)
    text = "".join(speech.add([number]) for number in numbers) + speech.add(tokenizer.encode("ok"), last=True)
    assert text.endswith("ok")
    if kind == "bytes":
        assert text == tokenizer.decode([*numbers, *tokenizer.encode("ok")], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["bytes", "llama", "gemma"])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_text_ends_before_the_first_stop_word(tokenizers: dict[str, Any], kind: str, data: st.DataObject) -> None:
    """Also where one comes over several tokens, begins twice, or is the beginning of another."""
    tokenizer = tokenizers[kind]
    text = "".join(data.draw(st.lists(st.sampled_from([*"ab哈\n", "用户", "用户：", "🤣"]), max_size=14)))
    words = data.draw(st.lists(st.sampled_from(["用户：", "aab", "\n\n", "哈哈b", "🤣", "ab"]), max_size=3))
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    end = min((whole.index(word) for word in words if word in whole), default=len(whole))
    speech, said = IncrementalDetokenizer(tokenizer, words), ""
    for number in ids:
        said += speech.add([number])
        assert end == len(whole) or len(said) <= end, "no part of a stop word is said"
        if speech.stopped:
            break
    else:
        said += speech.add([], last=True)
    assert (said, speech.stopped) == (whole[:end], end < len(whole))


def test_what_may_begin_a_stop_word_is_said_when_it_does_not(tokenizer: Any) -> None:
    speech = IncrementalDetokenizer(tokenizer, ["用户：", ""])
    pieces = [speech.add(tokenizer.encode(text)) for text in ("好用", "户", "们", "用户")]
    assert pieces == ["好", "", "用户们", ""]
    assert speech.add([], last=True) == "用户" and not speech.stopped


def test_a_stream_ends_before_a_stop_word(tokenizer: Any, chat: Chat, prompts: list[list[int]]) -> None:
    model = speaking_model("llama", tokenizer)
    (whole,) = replies(model, chat, prompts[:1], 40)
    word = whole[len(whole) // 2 :][:3]
    expected = whole[: whole.index(word)]
    pieces = list(stream(model, tokenizer, prompts[0], 40, chat.stop_id, [word, "nowhere in it"], do_sample=False))
    assert "".join(pieces) == expected != "" and len(pieces) > 2
    assert not any("work" in thread.name for thread in threading.enumerate()), "nothing is computed any more"


def test_a_control_token_as_a_stop_word(tokenizer: Any, chat: Chat, prompts: list[list[int]]) -> None:
    """It is no part of the text, so that it cannot be found there."""
    model = speaking_model("llama", tokenizer)
    tokens = alone(model, prompts[0])
    model = ends_after(model, tokens[3], end_id=tokenizer.convert_tokens_to_ids("<|im_start|>"))
    without_system = partial(stream, model, tokenizer, prompts[0], N_NEW, chat.stop_id, do_sample=False)
    expected = tokenizer.decode(tokens[: tokens.index(tokens[3]) + 1])
    assert "".join(without_system(stop_words=["<|im_start|>"])) == expected
    assert len("".join(without_system())) > len(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters, bits, weights on the disk


def make_adapter(base: Path, folder: Path, seed: int = 1, rows: int | None = None, **options: Any) -> Path:
    """Writes an adapter with random numbers, as after training."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    adapted = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(5, 45)[None]).logits[0].float()


def near(one: Any, other: Any) -> bool:
    return bool((logits_of(one) - logits_of(other)).abs().max() < 1e-5)


def in_bits(base: Path, bits: int | None) -> Any:
    """The model in 4 or 8 bits, with transformers alone."""
    if bits is None:
        return AutoModelForCausalLM.from_pretrained(base)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(load_in_4bit=True, **nf4) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    options = {"quantization_config": config, "dtype": torch.float32, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    # On some CPUs bitsandbytes computes in bf16, whatever it was told.
    return model.eval().dequantize() if bits == 4 else model


def with_peft(base: Path, adapter: Path, bits: int | None = None) -> Any:
    """What PEFT and transformers make of an adapter, without this project."""
    return PeftModel.from_pretrained(in_bits(base, bits), adapter)


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_an_adapter_says_what_it_says_in_peft(model_dir: Path, tmp_path: Path, kind: str, settings: Any) -> None:
    base = model_dir / "tiny" / kind
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    model, _ = load_for_inference(base, adapters={"one": adapter})
    assert near(model, with_peft(base, adapter))
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert type(model) is type(plain), "no wrapper"
    assert not near(model, plain)


def test_a_larger_vocabulary(model_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    """With the adapter's own tokenizer and embeddings."""
    base = model_dir / "tiny/llama"
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<new>"], special_tokens=True)
    adapter = make_adapter(base, tmp_path / "adapter", rows=len(larger), modules_to_save=["embed_tokens", "lm_head"])
    larger.save_pretrained(adapter)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(len(larger), mean_resizing=False)
    model, chat = load_for_inference(base, adapters={"one": adapter})
    assert near(model, PeftModel.from_pretrained(plain, adapter)) and len(chat.tokenizer) == len(larger)
    other = make_adapter(base, tmp_path / "other")
    with pytest.raises(ValueError, match="another vocabulary"):
        load_for_inference(base, adapters={"other": other, "one": adapter})


def test_several_adapters_in_turn(model_dir: Path, tmp_path: Path) -> None:
    base = model_dir / "tiny/qwen2"
    adapters = {name: make_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("one", "other"))}
    model, _ = load_for_inference(base, adapters=adapters)
    expected = {name: logits_of(with_peft(base, folder)) for name, folder in adapters.items()}
    expected[None] = logits_of(AutoModelForCausalLM.from_pretrained(base))
    assert (logits_of(model) - expected["one"]).abs().max() < 1e-5, "the first one is in use"
    for name in ("other", None, "one", None, "other"):
        use_adapter(model, name)
        assert (logits_of(model) - expected[name]).abs().max() < 1e-5
    assert (expected["one"] - expected["other"]).abs().max() > 0.01


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_bits(
    model_dir: Path, tmp_path: Path, prompts: list[list[int]], bits: int, adapted: bool, caplog: Any
) -> None:
    """What transformers and PEFT say with the same configuration, token by token."""
    base = model_dir / "tiny/llama"
    adapter = make_adapter(base, tmp_path / "adapter") if adapted else None
    plain, full = (with_peft(base, adapter, n) if adapted else in_bits(base, n) for n in (bits, None))
    bnb = logging.getLogger("bitsandbytes")
    bnb.addHandler(caplog.handler)
    model, chat = load_for_inference(base, adapters={"one": adapter} if adapted else None, bits=bits)
    assert near(model, plain)
    assert not near(model, full), "the weights are other ones"
    ids = torch.tensor(prompts[:1])
    out = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_NEW, do_sample=False)
    expected = chat.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    caplog.clear()
    assert "".join(stream(model, chat.tokenizer, prompts[0], N_NEW, 0, do_sample=False)) == expected
    bnb.removeHandler(caplog.handler)
    assert caplog.records == [], "no line for each layer and token"


def checkpoint(base: Path, folder: Path, bits: int | None = 4, **record: Any) -> Path:
    """A checkpoint as training leaves it: the adapter in a folder of its own, run.json beside it."""
    make_adapter(base, folder / "adapter")
    written = {"settings": {"quant_bits": bits}, "chat_template": CHATML, "data": {"system_prompt": "设定"}} | record
    (folder / "run.json").write_text(json.dumps(written), encoding="utf-8")
    return folder


@pytest.mark.parametrize("place", ["", "adapter"])
def test_an_adapter_of_4_bits_is_used_in_4_bits(model_dir: Path, tmp_path: Path, place: str) -> None:
    """Whether the checkpoint is named or the adapter in it; also where another one comes first."""
    base = model_dir / "tiny/llama"
    template = CHATML.replace("<|im_start|>", "<|im_start|>>")
    adapter = checkpoint(base, tmp_path / "24", chat_template=template) / place
    assert tuning_of(adapter) == (tmp_path / "24/adapter", "设定", template, 4)
    model, chat = load_for_inference(base, adapters={"one": adapter})
    assert near(model, with_peft(base, tmp_path / "24/adapter", 4))
    assert chat.tokenizer.chat_template == template
    model, _ = load_for_inference(base, adapters={"one": adapter}, bits=8)
    assert near(model, with_peft(base, tmp_path / "24/adapter", 8)), "another number on demand"
    model, chat = load_for_inference(base, adapters={"plain": make_adapter(base, tmp_path / "plain"), "one": adapter})
    assert model.is_loaded_in_4bit and chat.tokenizer.chat_template == CHATML


def test_an_adapter_of_whole_weights(model_dir: Path, tmp_path: Path) -> None:
    base = model_dir / "tiny/llama"
    adapter = checkpoint(base, tmp_path / "24", bits=None)
    model, _ = load_for_inference(base, adapters={"one": adapter})
    assert near(model, with_peft(base, adapter / "adapter"))


def test_a_template_on_demand(model_dir: Path, tmp_path: Path) -> None:
    base, template = model_dir / "tiny/llama", "{{ messages[-1].content }}{% if add_generation_prompt %}{% endif %}"
    plain = CHATML.replace("\n", " ")
    _, chat = load_for_inference(base, adapters={"one": checkpoint(base, tmp_path / "24", None)}, chat_template=plain)
    assert chat.tokenizer.chat_template == plain
    with pytest.raises(ValueError, match="template"):
        load_for_inference(base, chat_template=template)


def test_what_is_known_of_a_model(model_dir: Path, tmp_path: Path) -> None:
    """A finished model's template is in its folder, and its weights are whole."""
    assert tuning_of(model_dir / "tiny/llama") == (None, None, "", None)
    (tmp_path / "run.json").write_text(
        json.dumps({"settings": {"quant_bits": 4}, "chat_template": CHATML, "data": {"system_prompt": ""}})
    )
    assert tuning_of(tmp_path) == (None, "", "", None)
    adapter = make_adapter(model_dir / "tiny/llama", tmp_path / "other/adapter")
    assert tuning_of(adapter) == (adapter, None, "", None), "of another tool"


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"data": 3}', '{"data": {}, "settings": [1]}', "\udcff"])
def test_a_damaged_record(model_dir: Path, tmp_path: Path, text: str) -> None:
    folder = checkpoint(model_dir / "tiny/llama", tmp_path / "24")
    (folder / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"24/run\.json is damaged"):
        load_for_inference(model_dir / "tiny/llama", adapters={"one": folder})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_last_layer(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "adapter_model.safetensors")


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json in"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (without_last_layer, "has no base_model.model.model.layers.1.mlp"),
        (lambda folder: configure(folder, r=2), "does not go with this base"),
        (lambda folder: configure(folder, target_modules=["query"]), "does not go with this base"),
        (lambda folder: configure(folder, target_modules=["q_proj"]), "which has no place in this model"),
        (lambda folder: configure(folder, bias="all"), "biases. Merge it first"),
        (lambda folder: configure(folder, peft_type="LOHA"), "only LoRA"),
    ],
)
def test_a_damaged_adapter(model_dir: Path, tmp_path: Path, damage: Any, message: str) -> None:
    adapter = make_adapter(model_dir / "tiny/llama", tmp_path / "adapter")
    damage(adapter)
    with pytest.raises((OSError, ValueError), match=message) as error:
        load_for_inference(model_dir / "tiny/llama", adapters={"one": adapter})
    assert str(adapter) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "does not go with this base"),
        ({"num_hidden_layers": 1}, "which has no place in this model"),
        ({"num_hidden_layers": 3}, "has no base_model.model.model.layers.2"),
    ],
    ids=["narrower", "fewer layers", "more layers"],
)
def test_an_adapter_of_another_model(
    model_dir: Path, tokenizer: Any, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    """PEFT by itself passes over layers that are not there, and leaves those without numbers at nothing."""
    names = ["q_proj", "v_proj", "down_proj"]
    adapter = make_adapter(model_dir / "tiny/llama", tmp_path / "adapter", target_modules=names)
    make_model("llama", len(tokenizer), **changes).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        load_for_inference(tmp_path / "other", adapters={"one": adapter})


@pytest.mark.parametrize("share", [0.9, 0.6, 0.2])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_weights_on_the_disk(
    model_dir: Path,
    prompts: list[list[int]],
    tmp_path: Path,
    share: float,
    adapted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a machine that has room for a part of the model, or not even for its embedding."""
    base = tmp_path / "base"
    shutil.copytree(model_dir / "tiny/llama", base)
    adapters = {"one": make_adapter(base, tmp_path / "adapter")} if adapted else None
    model, chat = load_for_inference(base, adapters=adapters)
    (expected,) = replies(model, chat, prompts[:1], N_NEW)
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    room = (base / "model.safetensors").stat().st_size * share
    monkeypatch.setattr("transformers.integrations.accelerate.accelerate_max_memory", lambda _=None: {"cpu": room})
    monkeypatch.chdir(tmp_path)
    model, chat = load_for_inference(base, adapters=adapters, offload_folder=tmp_path / "offload")
    assert "disk" in model.hf_device_map.values()
    text = "".join(stream(model, chat.tokenizer, prompts[0], N_NEW, chat.stop_id, do_sample=False))
    assert text.strip() == expected
    assert {path.name: path.read_bytes() for path in base.iterdir()} == files, "the model is as it was"
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter", "offload"}, "no copy of it lies about"


def test_only_plain_lora_beside_weights_on_the_disk(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model_dir / "tiny/llama"
    adapter = make_adapter(base, tmp_path / "adapter", use_dora=True)
    monkeypatch.setattr("transformers.integrations.accelerate.accelerate_max_memory", lambda _=None: {"cpu": 4e5})
    with pytest.raises(ValueError, match="merge_qlora.py"):
        load_for_inference(base, adapters={"one": adapter}, offload_folder=tmp_path / "offload")


@pytest.mark.parametrize(
    ("config", "of_tokenizer", "expected"),
    [
        ({"max_position_embeddings": 2048}, 512, 2048),
        ({"max_seq_len": 4096}, 512, 4096),
        ({"seq_length": 8192}, int(1e30), 8192),
        ({"max_position_embeddings": -1}, 512, 512),
        ({"max_position_embeddings": None}, int(1e30), None),
        ({}, 1e30, None),
    ],
)
def test_how_much_a_model_can_read(config: dict[str, Any], of_tokenizer: float, expected: int | None) -> None:
    text = SimpleNamespace(**config)
    outer = SimpleNamespace(get_text_config=lambda: text)
    assert context_tokens(outer, SimpleNamespace(model_max_length=of_tokenizer)) == expected
