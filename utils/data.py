"""Records in any known format become messages, and messages become token ids with labels: one rendering for all stages.

Shapes: L tokens in a sample.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.files import shown

SYSTEM_PROMPT = "你是一名B站用户，看完视频后在评论区用自然、口语化的语气发表评论或回复别人的评论。"

# For models that were published without a chat template (most base models). Every answer ends in the EOS token.
PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token and add_bos_token else '' }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{%- elif message['role'] == 'user' %}{{ '### User:\n' + message['content'] + '\n\n' }}"
    "{%- else %}{{ '### Assistant:\n' + message['content'] + eos_token + '\n\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '### Assistant:\n' }}{%- endif %}"
)

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
FORMATS = (
    "one of {conversations: [{from, value}]}, {messages: [{role, content}]}, "
    "{instruction, input, output} or [{human, assistant}]"
)

Message = dict[str, str]


class DataError(ValueError):
    """Data that a run cannot go on with; the message is written for the user."""


class UnusableRecord(DataError):
    """A record of a known format that has nothing to learn from; runs count it and go on."""


def comment_prompt(title: str, desc: str = "", parent: str = "") -> str:
    """Writes the user turn that asks for a comment.

    The parts that all comments of one video have in common come first, so that their token prefixes are equal.

    Args:
        title: The video's title.
        desc: Its description; no line is written for an empty one or for Bilibili's "-".
        parent: The comment to answer; no line is written for a comment on the video itself.

    Returns:
        One line a part.
    """
    lines = [f"视频标题：{title.strip()}"]
    if desc.strip() not in ("", "-"):
        lines.append(f"视频简介：{desc.strip()}")
    if parent.strip():
        lines.append(f"父评论：{parent.strip()}")
    return "\n".join(lines)


def read_records(path: Path) -> Iterator[Any]:
    """Reads the records of a .json, .jsonl, .csv or .parquet file in order.

    Raises:
        DataError: if the file's ending is unknown or its content is not what the ending says.
    """
    try:
        if path.suffix == ".json":
            records = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(records, list):
                raise DataError(f"{shown(path)}: got one JSON {type(records).__name__}, expected an array of records.")
            yield from records
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        elif path.suffix == ".csv":
            # Not through pandas: cells stay the texts they are, 666 is an answer, and so is NA.
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file)
                if not rows.fieldnames:
                    raise DataError(f"{shown(path)}: expected the columns' names in the first row, got nothing.")
                for row in rows:
                    if None in row or None in row.values():
                        raise DataError(f"{shown(path)}: a row with another number of cells than the first: {row}")
                    yield row
        elif path.suffix == ".parquet":
            from datasets import load_dataset

            yield from load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            raise DataError(f"{shown(path)}: expected a .json, .jsonl, .csv or .parquet file.")
    except (ValueError, csv.Error, OSError) as error:  # json's, a wrong encoding, and what datasets and pyarrow raise.
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shown(path)}: not readable as {path.suffix[1:]}: {error}") from error


def find_split(data_dir: Path, split: str) -> Path | None:
    """Finds data_<split> or <split> with any readable ending in a folder."""
    stems, endings = (f"data_{split}", split), (".json", ".jsonl", ".csv", ".parquet")
    paths = [data_dir / f"{stem}{ending}" for stem in stems for ending in endings]
    return next((path for path in paths if path.is_file()), None)


def to_messages(record: Any) -> list[Message]:
    """Turns a record of any known format into messages.

    Known are the original's and ShareGPT's `conversations`, OpenAI's `messages`, Alpaca's `instruction`, `input`,
    `output` (with `system` and `history`) and lists of `human`, `assistant` pairs.

    Returns:
        [{"role": ..., "content": stripped text}]: perhaps a system message, then user and assistant by turns.

    Raises:
        DataError: if the format is unknown.
        UnusableRecord: if a turn is empty or no text, a role is unknown or the turns do not alternate.
    """
    if isinstance(record, list) and all(
        isinstance(turn, dict) and {"human", "assistant"} <= {*turn} for turn in record
    ):
        turns = [(role, turn[role]) for turn in record for role in ("human", "assistant")]
    elif not isinstance(record, dict):
        raise DataError(f"got a {type(record).__name__}, expected {FORMATS}.")
    elif record.get("conversations") is not None:
        turns = _named_turns(record["conversations"], "from", "value")
    elif record.get("messages") is not None:
        turns = _named_turns(record["messages"], "role", "content")
    elif "instruction" in record and "output" in record:
        parts = [part for part in (record["instruction"], record.get("input")) if part]
        question = "\n".join(parts) if all(isinstance(part, str) for part in parts) else parts
        turns = [*_past_turns(record.get("history") or []), ("user", question), ("gpt", record["output"])]
    else:
        raise DataError(f"got the fields {sorted(record)}, expected {FORMATS}.")
    if isinstance(record, dict) and record.get("system"):
        turns = [("system", record["system"]), *turns]
    return _checked(turns)


def _named_turns(turns: Any, role: str, content: str) -> list[tuple[str, Any]]:
    try:
        return [(turn[role], turn[content]) for turn in turns]
    except (TypeError, KeyError) as error:
        raise DataError(f"a turn without {role!r} and {content!r}, expected {FORMATS}.") from error


def _past_turns(history: Any) -> list[tuple[str, Any]]:
    if not isinstance(history, list) or not all(isinstance(pair, list) for pair in history):
        raise DataError(f"a history that is not a list of [question, answer] pairs, expected {FORMATS}.")
    return [turn for pair in history for turn in zip(("user", "gpt"), pair, strict=False)]


def _checked(turns: list[tuple[str, Any]]) -> list[Message]:
    messages = []
    for role, content in turns:
        if role not in [*ROLES]:  # A list, since what stands for the role may not be hashable.
            raise UnusableRecord(f"a turn of {role!r}, known are {', '.join(ROLES)}")
        if content is not None and not isinstance(content, str):
            raise UnusableRecord(f"a {ROLES[role]} turn that is not a text")
        if not content or not content.strip():
            raise UnusableRecord(f"an empty {ROLES[role]} turn")
        # Half of a surrogate pair, which JSON can carry, is no character: tokenizers refuse it.
        whole = content.strip().encode("utf-8", "replace").decode()
        messages.append({"role": ROLES[role], "content": whole})
    roles = [message["role"] for message in messages]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        raise UnusableRecord("turns that are not user and assistant by turns")
    return messages


class Sample(NamedTuple):
    """A token sequence with the tokens that are to be learnt."""

    id: str  # The record's, or its place in the file.
    input_ids: np.ndarray  # (L,) int32
    supervised: np.ndarray  # (L,) bool; True where the token is part of an answer or its end.


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template: the one way from messages to token ids, in training and in use."""

    tokenizer: Any
    folds_system: bool  # The template knows no system role: its text goes before the first user's.
    stop_id: int  # The token that ends an answer.
    writes_stop: bool  # The template itself ends an answer so; otherwise the token is appended.

    def _render(self, messages: list[Message], **options: Any) -> Any:
        if self.folds_system and messages[0]["role"] == "system":
            system, user, *rest = messages
            messages = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        return _apply_template(self.tokenizer, messages, **options)

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Renders a conversation that ends with the user's turn, up to where the model's answer starts.

        Control tokens that users typed are encoded as the plain text they are.
        """
        stripped = [{**message, "content": message["content"].strip()} for message in messages]
        return self._render(stripped, add_generation_prompt=True)["input_ids"]

    def prompt_text(self, messages: list[Message]) -> str:
        """The same as text."""
        return self._render(messages, add_generation_prompt=True, tokenize=False)

    def answer_ids(self, messages: list[Message], prompt: list[int]) -> list[int]:
        """Renders a conversation that ends with an answer; returns the answer's tokens, the stop token the last.

        Raises:
            UnusableRecord: if the tokens are not those of the prompt and more (an answer that melts into the prompt's
                last token, or that the template rewrites).
        """
        whole = self._render(messages)["input_ids"]
        if whole[: len(prompt)] != prompt:
            raise UnusableRecord("an answer that the chat template changes")
        ids = whole[len(prompt) :]
        if self.writes_stop:
            # What follows the stop token (a line break in ChatML) belongs to the next turn.
            return ids[: ids.index(self.stop_id) + 1]
        return [*ids, self.stop_id]

    def samples(self, messages: list[Message], max_tokens: int, id: str = "") -> list[Sample]:
        """Renders a conversation for training: every answer is supervised, from its first token to the stop token.

        A prompt that is too long is shortened in the middle of its longest text, older exchanges leave first. An answer
        is never cut.

        Returns:
            One sample; more where the template rewrites earlier turns, so that each answer has a prompt of its own;
            none where an answer alone does not fit.
        """
        samples: list[Sample] = []
        ids: list[int] = []
        supervised: list[bool] = []
        for end in range(len(messages)):
            if messages[end]["role"] != "assistant":
                continue
            prompt = self.prompt_ids(messages[:end])
            answer = self.answer_ids(messages[: end + 1], prompt)
            if len(prompt) + len(answer) > max_tokens:
                prompt = self._fit(messages[:end], max_tokens - len(answer))
                if prompt is None:
                    continue
            if ids and prompt[: len(ids)] != ids:
                samples.append(_sample(id, ids, supervised))
                ids, supervised = [], []
            supervised += [False] * (len(prompt) - len(ids)) + [True] * len(answer)
            ids = [*prompt, *answer]
        if ids:
            samples.append(_sample(id, ids, supervised))
        return samples

    def answers(self, messages: list[Message], answers: list[str], max_tokens: int, id: str = "") -> list[Sample]:
        """Renders several answers to one prompt; only they are supervised, not the answers of earlier turns.

        The prompt is shortened as `samples` does, for all alike, until the longest answer fits.

        Args:
            messages: A conversation that ends with the user's turn.
            answers: What might follow.
            max_tokens: The longest sample.
            id: The record's.

        Returns:
            A sample an answer; none where an answer alone does not fit.
        """
        prompt = self.prompt_ids(messages)
        rendered = [self.answer_ids([*messages, {"role": "assistant", "content": text}], prompt) for text in answers]
        longest = max(map(len, rendered))
        if len(prompt) + longest > max_tokens and (prompt := self._fit(messages, max_tokens - longest)) is None:
            return []
        supervised = [[False] * len(prompt) + [True] * len(ids) for ids in rendered]
        return [_sample(id, [*prompt, *ids], flags) for ids, flags in zip(rendered, supervised, strict=True)]

    def _fit(self, messages: list[Message], room_tokens: int) -> list[int] | None:
        """Renders a prompt in at most `room_tokens`, or returns None where even a bare one is longer."""
        system = messages[:1] if messages[0]["role"] == "system" else []
        talk = messages[len(system) :]
        while len(talk) > 1 and len(self.prompt_ids([*system, *talk])) > room_tokens:
            talk = talk[2:]
        question = talk[0]["content"]
        kept = len(question)
        while len(ids := self.prompt_ids([*system, *talk])) > room_tokens:
            if kept <= 8 or len(talk) > 1:
                return None
            # In proportion, which nears the goal from above, since the frame around the text takes room too.
            # The title stands at the beginning and the comment to answer at the end.
            kept = max(min(kept * max(room_tokens, 0) // len(ids), kept - 1), 8)
            talk = [{"role": "user", "content": f"{question[: kept // 2]}…{question[len(question) - kept // 2 :]}"}]
        return ids


def _apply_template(tokenizer: Any, messages: list[Message], tokenize: bool = True, **options: Any) -> Any:
    # `enable_thinking` is read by templates of reasoning models: a comment is written without an inner monologue.
    return tokenizer.apply_chat_template(
        messages,
        tokenize=tokenize,
        sanitize_control_tokens=tokenize,
        enable_thinking=False,
        add_bos_token=tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id],
        **options,
    )


def _sample(id: str, ids: list[int], supervised: list[bool]) -> Sample:
    return Sample(id, np.array(ids, dtype=np.int32), np.array(supervised, dtype=bool))


def make_chat(tokenizer: Any) -> Chat:
    """Tries a tokenizer's chat template out and finds how it treats system texts and ends answers.

    Raises:
        DataError: if the template does not show the model an answer as what follows its prompt.
    """
    from jinja2 import TemplateError

    question = [{"role": "user", "content": "question"}]
    system = {"role": "system", "content": "briefing"}
    try:
        folds_system = "briefing" not in _apply_template(tokenizer, [system, *question], tokenize=False)
    except TemplateError:
        folds_system = True
    prompt = _apply_template(tokenizer, question, add_generation_prompt=True)["input_ids"]
    whole = _apply_template(tokenizer, [*question, {"role": "assistant", "content": "answer"}])["input_ids"]
    if whole[: len(prompt)] != prompt or "answer" not in tokenizer.decode(whole[len(prompt) :]):
        raise DataError(
            "the chat template writes an answer after another text than the one it asks the model to go on from: "
            f"{tokenizer.decode(prompt)!r} against {tokenizer.decode(whole)!r}. Name a file with a template that does: "
            "--chat_template FILE"
        )
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    stop_id = next((id for id in whole[len(prompt) :] if id in special), None)
    return Chat(tokenizer, folds_system, tokenizer.eos_token_id if stop_id is None else stop_id, stop_id is not None)


def show_sample(sample: Sample, tokenizer: Any) -> str:
    """Writes a sample as the model gets it; what is learnt stands between >>> and <<<."""
    text = ""
    for learnt, tokens in groupby(zip(sample.supervised, sample.input_ids, strict=True), key=lambda pair: pair[0]):
        part = tokenizer.decode([token for _, token in tokens])
        text += f">>>{part}<<<" if learnt else part
    return text
