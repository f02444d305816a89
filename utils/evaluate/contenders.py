"""Who answers in an evaluation: tuned models, and their base with the training, a style, or a few-shot prompt."""

import hashlib
import json
import random
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.held_out import Comment, read_comments
from utils.data.records import Message
from utils.files import from_root, read_json, shown

BASE, STYLE, FEW_SHOT, TUNED, API = "base", "style prompt", "few-shot", "tuned", "api"
LONGEST_EXAMPLE = 200  # Characters of a few-shot example, question and answer.


class Contender(NamedTuple):
    """One of those who answer.

    Attributes:
        name: In the report.
        kind: `BASE`, `STYLE`, `FEW_SHOT`, `TUNED` or `API`.
        model: The folder whose weights are loaded; of an API the model's name there.
        adapter: The folder of an adapter on it, if there is one.
        run: A training run's folder and checkpoint of all weights, whose base is `model`; None for others.
    """

    name: str
    kind: str
    model: str
    adapter: str | None = None
    run: tuple[str, str] | None = None

    def fingerprint(self) -> str:
        """Changes with the files of the weights, as far as their names, sizes and times tell; an API has none here."""
        folders = () if self.kind == API else (self.model, self.adapter, self.run and Path(*self.run))
        places = [Path(folder) for folder in folders if folder]
        # A checkpoint's adapter lies in a folder of its own.
        there = [path for place in places for path in sorted([*place.glob("*"), *place.glob("adapter/*")])]
        files = [path for path in there if path.suffix != ".json"]
        state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
        return hashlib.sha256(json.dumps([self.model, self.adapter, self.run, state]).encode()).hexdigest()[:16]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of a training run."""
    return all((path / name).is_file() for name in ("run.json", "manifest.json")) and not is_model(path)


def is_model(path: Path) -> bool:
    """Whether a folder is a model's."""
    return (path / "config.json").is_file()


def best_checkpoint(path: Path) -> Path | None:
    """The checkpoint in a training run's folder, or the folder itself if it is one; None for other folders.

    Raises:
        SystemExit: if there are several runs' checkpoints in it.
    """
    if is_checkpoint(path):
        return path
    tags = sorted(tag for tag in path.glob("[!.]*") if is_checkpoint(tag))
    best = [tag for tag in tags if not tag.name.endswith("-last")] or tags
    if len(best) > 1:
        raise SystemExit(f"--model: {shown(path)} holds several checkpoints. Name one: {', '.join(map(shown, best))}")
    return best[0] if best else None


def tuned(name: str, path: Path) -> tuple[Contender, str | None]:
    """Finds what a folder holds: a model, or a training run or its checkpoint.

    Returns:
        The contender, and its base model's folder where something says so.

    Raises:
        SystemExit: if it is none of these.
    """
    tag = best_checkpoint(path)
    if tag is None and not is_model(path):
        raise SystemExit(
            f"--model: {shown(path)} is neither a model's folder (config.json and weights) nor a training run's."
        )
    record = (tag or path) / "run.json"
    base = _base_of(read_json(record)) if record.is_file() else None
    if tag is None:
        return Contender(name, TUNED, str(path)), base
    if base is None or not is_model(Path(base)):
        raise SystemExit(f"--model: {shown(tag)} was trained on {base and shown(base)}, which is not there any more.")
    if (tag / "adapter/adapter_config.json").is_file():
        return Contender(name, TUNED, base, adapter=str(tag)), base
    return Contender(name, TUNED, base, run=(str(tag.parent), tag.name)), base


def _base_of(record: dict[str, Any]) -> str | None:
    try:
        arguments = record["arguments"]
        return str(from_root(arguments["model_dir"]) / arguments["model_name"])
    except (KeyError, TypeError):
        return None


def draw_examples(
    train: Path, count: int, seed: int, held_out: Container[str] = (), columns: Mapping[str, str] | None = None
) -> list[Message]:
    """Draws real answers for the few-shot prompt, each from another training video where there are enough.

    Args:
        train: The training records.
        count: How many.
        seed: Of the draw.
        held_out: Videos of which none is taken: their comments are to be answered.
        columns: Of --columns, see `utils.data.records.read_records`.

    Returns:
        `count` user and assistant turns each, without system prompts.

    Raises:
        SystemExit: if there are no other videos.
    """
    groups = [group for group in read_comments(train, columns=columns) if group[0].video_id not in held_out]
    if not groups:
        raise SystemExit(
            f"{shown(train)} holds no other videos than the held-out data: nothing to take the few-shot examples from. "
            "Name the training records: --train_data FILE, or leave that prompt out: --shots 0"
        )
    draw = random.Random(seed)
    draw.shuffle(groups)

    def is_long(comment: Comment) -> bool:
        return sum(len(turn["content"]) for turn in turns_of(comment)) > LONGEST_EXAMPLE

    for group in groups:
        draw.shuffle(group)
        group.sort(key=is_long)  # Long ones would take the model's room, and all of it is computed for every video.
    picked: list[Comment] = []
    for turn in range(max(map(len, groups))):
        picked += sorted((group[turn] for group in groups if turn < len(group)), key=is_long)
        if len(picked) >= count:
            break
    return [message for comment in picked[:count] for message in turns_of(comment)[-2:]]


def turns_of(comment: Comment) -> list[Message]:
    """A conversation without its system prompt."""
    return [message for message in comment.messages if message["role"] != "system"]


def make_prompt(kind: str, style: str, examples: Sequence[Message]) -> Callable[[list[Message]], list[Message]]:
    """How a contender is asked for the answer to a conversation that ends with the user's turn.

    Args:
        kind: The contender's.
        style: System prompt of `STYLE`, in place of the data's.
        examples: Turns of `FEW_SHOT`, before the question.
    """

    def prompt(messages: list[Message]) -> list[Message]:
        system = [message for message in messages if message["role"] == "system"]
        turns = messages[len(system) :]
        if kind == STYLE:
            return [{"role": "system", "content": style}, *turns]
        return [*system, *examples, *turns] if kind == FEW_SHOT else messages

    return prompt
