"""utils/evaluate/likelihood.py: many answers to many questions at once, as likely as each of them by itself.

python -m pytest tests/test_utils_evaluate_likelihood.py
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from utils.data.chat import make_chat
from utils.data.held_out import Comment
from utils.evaluate import likelihood
from utils.evaluate.likelihood import OTHERS, Reader, Reading, answer_ids, draw_others, question_of
from utils.serve.generate import load_for_inference


def comment(id: str, video: str, question: str, answer: str = "好") -> Comment:
    turns = [("system", "你是一名B站用户"), ("user", question), ("assistant", answer)]
    return Comment(id, video, [{"role": role, "content": text} for role, text in turns])


def plain_loop(model: Any, prompt: list[int], answer: list[int]) -> float:
    """ln p(answer | prompt), one text a forward pass, in plain PyTorch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    return sum(logprobs[len(prompt) + place - 1, token].item() for place, token in enumerate(answer))


def readings(count: int, random: torch.Generator) -> list[Reading]:
    """Questions that begin alike, with one to four answers, one of them empty."""
    trunk = torch.randint(10, 700, (30,), generator=random).tolist()
    found = []
    for number in range(count):
        tail = torch.randint(10, 700, (number % 7,), generator=random).tolist()
        answers = {
            place: torch.randint(10, 700, (1 + (3 * number + place) % 9,), generator=random).tolist()
            for place in range(1 + number % 4)
        }
        found.append(Reading(str(number), [*trunk, *tail], answers | {"empty": []}))
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mistral", "gemma2", "qwen3_5", "bloom"])
def test_as_likely_as_in_a_plain_loop(model_dir: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-6, in several packs; bloom takes no masks, and recurrent layers do not begin with what a cache holds."""
    monkeypatch.setattr(likelihood, "ROOM_TOKENS", 64)
    model, _ = load_for_inference(model_dir / "tiny" / kind)
    asked = readings(20, torch.Generator().manual_seed(1))
    reader = Reader(model, 64)
    assert reader._caches == (kind not in ("qwen3_5", "bloom"))
    found = dict(reader.read(asked))
    assert sorted(found, key=int) == [str(number) for number in range(20)]
    plain, _ = load_for_inference(model_dir / "tiny" / kind)
    for one in asked:
        for name, ids in one.answers.items():
            expected = plain_loop(plain, one.prompt, ids) if ids else 0.0
            assert math.isclose(found[one.id][name], expected, rel_tol=1e-6, abs_tol=1e-5), (one.id, name)


def test_what_is_shared_is_computed_once(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 answers to one question of 40 tokens: 40 + 16 x 4 tokens pass through the model, not 16 x 44."""
    model, _ = load_for_inference(model_dir / "tiny/llama")
    reader = Reader(model, 64)
    seen: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **rest: seen.append(input_ids.numel()) or
                        forward(input_ids=input_ids, **rest))  # fmt: skip
    answers = {number: [100 + number, 5, 6, 7] for number in range(16)}
    list(reader.read([Reading("q", [*range(20, 60)], answers)]))
    assert seen == [40 + 16 * 4]


def test_what_all_questions_begin_with_is_computed_once(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 common tokens go through the model once; the packs have what follows them."""
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 2 * (30 + 1 + 2))
    model, _ = load_for_inference(model_dir / "tiny/llama")
    reader = Reader(model, 64)
    seen: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **rest: seen.append(input_ids.numel()) or
                        forward(input_ids=input_ids, **rest))  # fmt: skip
    trunk = [*range(20, 50)]
    list(reader.read([Reading(str(number), [*trunk, 100 + number], {"one": [5, 6]}) for number in range(4)]))
    # A pack: two questions' last tokens with two of an answer each.
    assert seen == [30, 2 * 3, 2 * 3]


def test_a_model_that_takes_no_cache_reads_alike(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = readings(6, torch.Generator().manual_seed(1))
    model, _ = load_for_inference(model_dir / "tiny/llama")
    with_cache = dict(Reader(model, 64).read(asked))
    forward = model.forward
    # Code that does not know what it is given here, and takes no notice of it.
    monkeypatch.setattr(model, "forward", lambda past_key_values=None, **rest: forward(**rest))
    reader = Reader(model, 64)
    assert not reader._caches
    for id, found in reader.read(asked):
        assert found == pytest.approx(with_cache[id], rel=1e-5)


def test_the_end_of_a_reply_is_not_counted(tokenizer: Any) -> None:
    chat = make_chat(tokenizer)
    messages = [{"role": "user", "content": "糖色怎么炒？"}]
    prompt = chat.prompt_ids(messages)
    ids = answer_ids(chat, messages, prompt, "小火慢慢来")
    assert tokenizer.decode(ids) == "小火慢慢来"
    assert chat.answer_ids([*messages, {"role": "assistant", "content": "小火慢慢来"}], prompt) == [*ids, chat.stop_id]


def test_other_questions() -> None:
    """Seven of the same video and seven of others, never one that is worded like the answer's own."""
    comments = [comment(f"{video}-{number}", str(video), f"视频标题：{video}\n父评论：{number}") for video in range(9)
                for number in range(9)]  # fmt: skip
    comments.append(comment("twin", "0", "视频标题：0\n父评论：1"))
    others = draw_others(comments, comments, seed=1)
    for one in comments:
        drawn = others[one.id]
        assert sum(other.video_id == one.video_id for other in drawn) == OTHERS
        assert len(drawn) == 2 * OTHERS == len({question_of(other) for other in drawn})
        assert question_of(one) not in {question_of(other) for other in drawn}
        assert len({other.video_id for other in drawn}) == OTHERS + 1
    assert draw_others(comments, comments[:3], seed=1) == {one.id: others[one.id] for one in comments[:3]}
    assert draw_others(comments, comments, seed=2) != others


def test_a_question_that_holds_the_answer_is_no_other_one() -> None:
    """The reply 求链接 was answered itself: after that question it would be likely for the wrong reason."""
    asked = comment("1", "a", "视频标题：旧书摊\n父评论：在哪买的", "求链接")
    answered = comment("2", "a", "视频标题：旧书摊\n父评论：求链接")
    third = comment("3", "a", "视频标题：旧书摊\n父评论：前排")
    assert draw_others([asked, answered, third], [asked], seed=0)["1"] == [third]


def test_a_lonely_comment_has_no_others() -> None:
    assert draw_others([comment("1", "a", "问")], [comment("1", "a", "问")], seed=0) == {"1": []}
