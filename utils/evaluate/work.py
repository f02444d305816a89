"""Contenders read the real replies and write their own; what is done already is not done again."""

import gc
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.data.chat import Chat, make_chat
from utils.data.held_out import Comment
from utils.data.records import Message
from utils.data.tokenizer import load_tokenizer
from utils.evaluate.contenders import API, BASE, Contender
from utils.evaluate.folder import REAL, EvaluationFolder
from utils.evaluate.likelihood import Reader, Reading, answer_ids, draw_others
from utils.evaluate.replies import SamplingSettings, Written, api_replies, engine_replies, make_engine, turn_separator
from utils.files import explained, shown
from utils.serve.generate import context_tokens, load_for_inference
from utils.weights.run_folder import check_tag, load_trained

ENGINE_NAME = "tuned"  # Of whatever is loaded: contenders' own names could be those of its parts.

# Comment -> a contender's prompt for it, as messages and token ids.
Prompts = dict[str, tuple[list[Message], list[int]]]


class Task(NamedTuple):
    """What all contenders have in common.

    Attributes:
        comments: To answer.
        matched: Those of them whose answers are also read after other questions.
        prompts: Contenders' kind -> how it is asked (from `utils.evaluate.contenders.make_prompt`).
        sampling: How replies are drawn.
        max_tokens: Longest prompt.
        trust_remote_code: Whether the models' own Python code may run.
        folder: What is known so far.
        step: Called with what is being done, for each question read and each comment answered.
    """

    comments: Sequence[Comment]
    matched: Sequence[Comment]
    prompts: Mapping[str, Callable[[list[Message]], list[Message]]]
    sampling: SamplingSettings
    max_tokens: int
    trust_remote_code: bool
    folder: EvaluationFolder
    step: Callable[[str], None]

    @property
    def ids(self) -> set[str]:
        """Of all comments."""
        return {comment.id for comment in self.comments}

    def read_after(self, own: Sequence[Comment]) -> dict[str, list[str]]:
        """Which answers are read after which question.

        Args:
            own: Whose answers are read after their own questions.

        Returns:
            A question's id -> the ids of comments; questions after which none is read are left out.
        """
        after: dict[str, list[str]] = {comment.id: [] for comment in self.comments}
        for comment in own:
            after[comment.id].append(comment.id)
        for id, questions in draw_others(self.comments, self.matched, self.sampling.seed).items():
            for question in questions:
                after[question.id].append(id)
        return {question: ids for question, ids in after.items() if ids}


def load(one: Contender, trust_remote_code: bool) -> tuple[Any, Chat]:
    """Loads a contender's model and chat template.

    Raises:
        SystemExit: if it cannot be used.
    """
    path = Path(one.model)
    with explained(f"{shown(path)} cannot be used"):
        if one.run is None:
            adapters = {ENGINE_NAME: Path(one.adapter)} if one.adapter else None
            return load_for_inference(path, trust_remote_code, adapters)
        run, tag = Path(one.run[0]), one.run[1]
        record = check_tag(run, tag)
        model = load_trained(run, tag, record, path, trust_remote_code)
        model = model.to("cuda") if torch.cuda.is_available() else model.float()  # 16 bits are slow on CPUs.
        return model.eval(), make_chat(load_tokenizer(path, record["chat_template"], trust_remote_code))


def render(task: Task, kind: str, model: Any, chat: Chat) -> Prompts:
    """A contender's prompts, without those that are too long for it."""
    most = context_tokens(model.config, chat.tokenizer) or math.inf
    longest = min(task.max_tokens, most - task.sampling.max_new_tokens)
    found = {}
    for comment in task.comments:
        messages = task.prompts[kind](comment.messages[:-1])
        ids = chat.prompt_ids(messages)
        if len(ids) <= longest:
            found[comment.id] = (messages, ids)
    return found


def left_to_read(
    task: Task, name: str, writers: Sequence[str], after: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Sequence[str]]]:
    """Which answers a contender has yet to read.

    Args:
        task: What is common.
        name: The contender's.
        writers: Whose answers it reads.
        after: From `Task.read_after`.

    Returns:
        A question's id -> writer -> the ids of the comments whose answers it reads after that question.
    """
    read = {writer: task.folder.read(name, writer) for writer in writers}
    left = {id: {writer: ids for writer in writers if id not in read[writer]} for id, ids in after.items()}
    return {id: by_writer for id, by_writer in left.items() if by_writer}


def read_answers(
    task: Task,
    reader: Reader,
    chat: Chat,
    name: str,
    prompts: Prompts,
    texts: Mapping[str, Mapping[str, str]],
    left: Mapping[str, Mapping[str, Sequence[str]]],
) -> None:
    """Lets a model read answers after questions, and keeps how likely it finds them.

    Args:
        task: What is common.
        reader: The model.
        chat: Its template.
        name: The contender whose prompts these are.
        prompts: From `render`.
        texts: Writer -> comment -> its answer.
        left: From `left_to_read`.
    """
    tokens = {
        (writer, id): answer_ids(chat, *prompts[id], text)
        for writer, those in texts.items() for id, text in those.items() if id in prompts
    }  # fmt: skip
    readings = []
    for question, writers in left.items():
        if question in prompts:
            own = {(writer, id): tokens.get((writer, id)) for writer, ids in writers.items() for id in ids}
            found = {key: value for key, value in own.items() if value is not None}
            readings.append(Reading(question, prompts[question][1], found))
    for question, nats in reader.read(readings):
        by_writer: dict[str, dict[str, float]] = {writer: {} for writer in left[question]}
        for (writer, id), value in nats.items():
            by_writer[writer][id] = value
        task.folder.add_likelihoods(name, question, by_writer)
        task.step(f"{name} reads")


def run_models(task: Task, group: Sequence[Contender], writers: Sequence[str]) -> None:
    """Lets the contenders of one model read the real replies, and write their own.

    The base with the training prompt is a neutral reader as well: once all have written, it reads what they wrote. That
    is a pass of its own: all contenders read the real replies in the same packs, so that rounding makes no difference
    between them.

    Args:
        task: What is common.
        group: Contenders whose weights are the same. Those of the base model come after all others.
        writers: The names of all contenders.
    """
    after = task.read_after(task.comments)
    to_read = {one.name: left_to_read(task, one.name, [REAL], after) for one in group}
    to_write = [one for one in group if task.ids - task.folder.answered(one.name)]
    is_base = any(one.kind == BASE for one in group)
    replies_left = left_to_read(task, BASE, writers, task.read_after(task.matched)) if is_base else {}
    if not any(to_read.values()) and not to_write and not replies_left:
        return
    model, chat = load(group[0], task.trust_remote_code)
    prompts = {one.name: render(task, one.kind, model, chat) for one in group}
    longest, real = (
        longest_tokens(task, prompts.values()),
        {one.id: one.messages[-1]["content"] for one in task.comments},
    )
    reader = Reader(model, longest) if any(to_read.values()) or replies_left else None
    for name, left in to_read.items():
        if left:
            read_answers(task, reader, chat, name, prompts[name], {REAL: real}, left)
    if to_write:
        write_replies(task, group, to_write, model, chat, prompts, longest)
    if replies_left:
        read_answers(task, reader, chat, BASE, prompts[BASE], first_replies(task, writers), replies_left)
    del model, reader
    gc.collect()  # Before the next model is loaded.


def write_replies(
    task: Task,
    group: Sequence[Contender],
    to_write: Sequence[Contender],
    model: Any,
    chat: Chat,
    prompts: Mapping[str, Prompts],
    longest: int,
) -> None:
    """Lets contenders of one model write their replies.

    Args:
        task: What is common.
        group: As for `run_models`.
        to_write: Those of them with comments left to answer.
        model: Loaded.
        chat: Its template.
        prompts: Contender -> what `render` gave.
        longest: Prompt and reply together, tokens.
    """
    attention = model.config._attn_implementation
    with explained(f"{shown(group[0].model)} cannot answer here. Serve it with vLLM, and evaluate it with --api"):
        engine = make_engine(model, chat, [ENGINE_NAME], [ENGINE_NAME] if group[0].adapter else [], longest)
    try:
        for one in to_write:
            answered = task.folder.answered(one.name)
            found = prompts[one.name]
            asked = {id: found[id][1] for id in videos_in_turn(task.comments) if id in found and id not in answered}
            engine_replies(engine, ENGINE_NAME, asked, turn_separator(chat), task.sampling, keeper(task, one.name))
    finally:
        engine.close()
        model.config._attn_implementation = attention  # The engine has one of its own.


def videos_in_turn(comments: Sequence[Comment]) -> list[str]:
    """The ids of comments, one of each video after the other.

    What two prompts of a video have in common is in the engine's cache only once the first one has been computed.
    """
    number, seen = {}, Counter[str]()
    for comment in comments:
        number[comment.id] = seen[comment.video_id]
        seen[comment.video_id] += 1
    return sorted(number, key=number.__getitem__)


def first_replies(task: Task, writers: Sequence[str]) -> dict[str, dict[str, str]]:
    """Writer -> a matched comment's id -> the first reply to it."""
    rows, ids = task.folder.replies(), [one.id for one in task.matched]
    return {
        writer: {id: rows[writer][id]["replies"][0] for id in ids if id in rows[writer]}
        for writer in writers if writer in rows
    }  # fmt: skip


def longest_tokens(task: Task, prompts: Any) -> int:
    """Of a prompt and its reply."""
    return max((len(ids) for each in prompts for _, ids in each.values()), default=1) + task.sampling.max_new_tokens


def keeper(task: Task, name: str) -> Callable[[str, Written], None]:
    """Keeps a contender's replies as they come."""
    comments = {comment.id: comment for comment in task.comments}

    def keep(id: str, written: Written) -> None:
        task.folder.add_replies(name, comments[id], written.replies, written.cut)
        task.step(f"{name} writes")

    return keep


def run_api(task: Task, one: Contender, client: Any) -> None:
    """Lets a model behind an API write its replies."""
    answered = task.folder.answered(one.name)
    asked = {
        comment.id: task.prompts[one.kind](comment.messages[:-1])
        for comment in task.comments if comment.id not in answered
    }  # fmt: skip
    if asked:
        with explained("--api: the server does not answer as it should; when it does, the same command goes on"):
            api_replies(client, one.model, asked, task.sampling, keeper(task, one.name))


def work_left(task: Task, contenders: Sequence[Contender]) -> int:
    """Questions to read and comments to answer, those among them whose prompts will be too long."""
    after, writers = task.read_after(task.comments), [one.name for one in contenders]
    left = len(left_to_read(task, BASE, writers, task.read_after(task.matched)))
    for one in contenders:
        left += len(left_to_read(task, one.name, [REAL], after)) if one.kind != API else 0
        left += len(task.ids - task.folder.answered(one.name))
    return left
