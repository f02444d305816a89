"""How likely a model finds answers to a question: what a question and its answers have in common is computed once.

What all questions begin with (the system prompt, examples) is computed once for all packs, which find its keys and
values in a cache.

Shapes: T supervised tokens of a pack, S samples in it; P tokens that all questions begin with; H heads of keys, D
numbers a head.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from utils.data.chat import Chat
from utils.data.held_out import Comment
from utils.data.records import Message, UnusableRecord
from utils.data.samples import Samples
from utils.train.forward import choose_format, make_layout, supervised_logits
from utils.train.packing import lay_out, plan_packs
from utils.train.tensors import sample_sums, token_logprobs
from utils.weights.loading import DTYPES

OTHERS = 7  # Other contexts of each kind that an answer is read under.
ROOM_TOKENS = 1024  # Of a pack, for what follows the longest question: each has a row of logits over the vocabulary.
TOKENS_AT_ONCE = 1 << 22  # Of questions and answers that are laid out in packs together.

# Of each layer: keys and values (1, H, P, D).
Cached = list[tuple[torch.Tensor, torch.Tensor]]


class Reading(NamedTuple):
    """A question and the answers that a model reads after it.

    Attributes:
        id: The question's.
        prompt: Token ids.
        answers: Name -> token ids.
    """

    id: str
    prompt: list[int]
    answers: Mapping[Any, list[int]]


class Reader:
    """A model that computes log-likelihoods, many at a time."""

    def __init__(self, model: Any, longest: int) -> None:
        """Takes a model, and tries whether several answers can be computed with one question.

        Args:
            model: In evaluation mode.
            longest: The longest question and answer, tokens.
        """
        self.model = model
        precision = next(name for name, dtype in DTYPES.items() if dtype == model.dtype)
        self._form, why_not = choose_format(model, longest, precision)
        model.eval()
        if why_not:
            print(why_not.replace("samples", "answers").strip())
        self._caches = self._form.way == "shared" and self._reads_alike()

    @torch.no_grad()
    def read(self, readings: Sequence[Reading]) -> Iterator[tuple[str, dict[Any, float]]]:
        """Computes the log-likelihood of each answer after its question.

        Yields:
            A question's id and, for each of its answers, ln p(answer | question): nats. A question comes as soon as all
            of its answers are read.
        """
        prompts = [one.prompt for one in readings]
        # A prompt's last token is read with its answers: it says what the first token of an answer is.
        count = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1) if self._caches and len(prompts) > 1 else 0
        cached = self._cached(prompts[0][:count]) if count else []
        for part in in_parts(readings):
            pairs = [(number, name, ids) for number, one in enumerate(part) for name, ids in one.answers.items() if ids]
            found: list[dict[Any, float]] = [dict.fromkeys(one.answers, 0.0) for one in part]
            left = Counter(number for number, _, _ in pairs)
            yield from ((one.id, found[number]) for number, one in enumerate(part) if number not in left)
            texts = [(part[number].prompt[count:], ids) for number, _, ids in pairs]
            for place, nats in self._likelihoods(texts, cached) if texts else ():
                number, name, _ = pairs[place]
                found[number][name] = nats
                left[number] -= 1
                if not left[number]:
                    yield part[number].id, found[number]

    def _cached(self, tokens: list[int]) -> Cached:
        """Computes the keys and values of what all questions begin with."""
        # Without the model's config it keeps all keys: the masks hide those beyond a window.
        cache = DynamicCache()
        ids = torch.tensor([tokens], device=self.model.device)
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [(keys, values) for keys, values, _ in cache]

    @torch.no_grad()
    def _reads_alike(self) -> bool:
        """Tries whether answers are as likely with a cache as without: not every model's code takes one as given."""
        vocab_size = self.model.config.get_text_config().vocab_size
        prompt, *answers = np.random.default_rng(0).integers(0, vocab_size, (3, 12)).tolist()
        whole = [nats for _, nats in sorted(self._likelihoods([(prompt, ids) for ids in answers], []))]
        try:
            cached = self._cached(prompt[:8])
            rest = [nats for _, nats in sorted(self._likelihoods([(prompt[8:], ids) for ids in answers], cached))]
        except torch.OutOfMemoryError:
            raise  # Says nothing of caches.
        except Exception:  # Whatever a model makes of a cache that it does not know.
            return False
        return np.allclose(rest, whole, rtol=1e-5 if self.model.dtype == torch.float32 else 2e-2)

    def _likelihoods(self, texts: list[tuple[list[int], list[int]]], cached: Cached) -> Iterator[tuple[int, float]]:
        lengths = np.array([[len(prompt), len(answer)] for prompt, answer in texts])
        end = lengths.sum(1).cumsum()
        supervised = np.repeat(np.tile([False, True], len(texts)), lengths.ravel())
        samples = Samples(
            tokens=np.concatenate([part for text in texts for part in text]).astype(np.int32),
            supervised=supervised,
            begin=end - lengths.sum(1),
            end=end,
            group=np.zeros(len(texts), dtype=np.int64),
            targets=lengths[:, 1],
            ids=[""] * len(texts),
        )
        pack_tokens = int(lengths[:, 0].max()) + ROOM_TOKENS
        layout = make_layout(self._form, self.model, self.model.device.type, pack_tokens)
        plan = plan_packs(samples, [np.arange(len(texts))], layout)
        for number in plan.packs(0):
            numbers, shared = plan.order[plan.draws(number)], plan.shared[plan.draws(number)]
            pack = lay_out([samples[place] for place in numbers], shared.tolist()).to(self.model.device)
            logits = supervised_logits(self.model, pack, self._form, DynamicCache(cached) if cached else None)
            nats = sample_sums(token_logprobs(logits, pack.target_ids).double(), pack.sample_targets)
            yield from zip(numbers.tolist(), nats.tolist(), strict=True)


def in_parts(readings: Sequence[Reading]) -> Iterator[Sequence[Reading]]:
    """Cuts questions into parts of up to `TOKENS_AT_ONCE` tokens, a question counted once for each of its answers."""
    start = tokens = 0
    for place, one in enumerate(readings):
        own = sum(len(one.prompt) + len(ids) for ids in one.answers.values())
        if place > start and tokens + own > TOKENS_AT_ONCE:
            yield readings[start:place]
            start, tokens = place, 0
        tokens += own
    if readings:
        yield readings[start:]


def answer_ids(chat: Chat, prompt: list[Message], prompt_ids: list[int], text: str) -> list[int] | None:
    """The tokens of an answer without the one that ends it, which a model without a template of its own cannot know.

    Returns:
        None if the template writes the answer differently.
    """
    try:
        ids = chat.answer_ids([*prompt, {"role": "assistant", "content": text}], prompt_ids)
    except UnusableRecord:
        return None
    return ids[:-1]


def draw_others(comments: Sequence[Comment], of: Sequence[Comment], seed: int) -> dict[str, list[Comment]]:
    """Draws the other questions that an answer is read after, to see whether it belongs to its own.

    Args:
        comments: All.
        of: Those whose answers are read so.
        seed: Of the draw.

    Returns:
        Id -> up to `OTHERS` questions about the same video and as many about other videos. A question that is worded
        like the answer's own is none of them, nor one that holds the whole answer as the comment to answer.
    """
    by_video: dict[str, list[Comment]] = {}
    for comment in comments:
        by_video.setdefault(comment.video_id, []).append(comment)
    found = {}
    for comment in of:
        draw = random.Random(f"{seed} {comment.id}")
        answer, asked = comment.messages[-1]["content"], question_of(comment)

        def usable(others: Sequence[Comment], asked: str = asked, answer: str = answer) -> list[Comment]:
            texts = {question_of(other): other for other in others}
            return [other for text, other in texts.items() if text != asked and not text.endswith(f"：{answer}")]

        same = usable(by_video[comment.video_id])
        away = [video for video in by_video if video != comment.video_id]
        far = usable([draw.choice(by_video[video]) for video in draw.sample(away, min(2 * OTHERS, len(away)))])
        found[comment.id] = draw.sample(same, min(OTHERS, len(same))) + far[:OTHERS]
    return found


def question_of(comment: Comment) -> str:
    """What the user said, turn after turn."""
    return "\n".join(message["content"] for message in comment.messages[:-1] if message["role"] == "user")
