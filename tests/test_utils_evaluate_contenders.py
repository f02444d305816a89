"""utils/evaluate/contenders.py and replies.py: who answers, by folder; with which prompt, by hand.

python -m pytest tests/test_utils_evaluate_contenders.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer

from utils.data.chat import PLAIN_TEMPLATE, make_chat
from utils.evaluate.contenders import (
    API,
    BASE,
    FEW_SHOT,
    LONGEST_EXAMPLE,
    STYLE,
    TUNED,
    Contender,
    best_checkpoint,
    draw_examples,
    make_prompt,
    tuned,
)
from utils.evaluate.replies import turn_separator


def a_model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def a_tag(path: Path, models: Path, adapter: bool = True) -> Path:
    """A checkpoint of a run whose base is `models`/a/b."""
    path.mkdir(parents=True)
    record = {"arguments": {"model_dir": str(models), "model_name": "a/b"}}
    (path / "run.json").write_text(json.dumps(record))
    (path / "manifest.json").write_text("{}")
    (path / "mp_rank_00_model_states.pt").write_bytes(b"weights")
    if adapter:
        (path / "adapter").mkdir()
        (path / "adapter/adapter_config.json").write_text("{}")
        (path / "adapter/adapter_model.safetensors").write_bytes(b"adapter")
    return path


def test_a_model_folder(tmp_path: Path) -> None:
    """Nothing says what a downloaded one was tuned on; a finished one of this project does."""
    path = a_model(tmp_path / "finished")
    assert best_checkpoint(path) is None
    assert tuned("mine", path) == (Contender("mine", TUNED, str(path)), None)
    record = {"arguments": {"model_dir": str(tmp_path / "model"), "model_name": "a/b"}}
    (path / "run.json").write_text(json.dumps(record))
    (path / "manifest.json").write_text("{}")
    assert best_checkpoint(path) is None
    assert tuned("mine", path) == (Contender("mine", TUNED, str(path)), str(tmp_path / "model/a/b"))


@pytest.mark.parametrize("adapter", [True, False])
def test_a_run_and_its_checkpoints(tmp_path: Path, adapter: bool) -> None:
    """The best one of a run, or the one that is named; adapters are put on the base, other runs are loaded as such."""
    base, run = str(a_model(tmp_path / "model/a/b")), tmp_path / "DS-a/b"
    last = a_tag(run / "1-last", tmp_path / "model", adapter)
    a_tag(run / ".1.100", tmp_path / "model", adapter)
    assert best_checkpoint(run) == last
    best = a_tag(run / "1", tmp_path / "model", adapter)
    assert best_checkpoint(run) == best and best_checkpoint(last) == last
    for path, tag in ((run, best), (best, best), (last, last)):
        where: dict[str, Any] = {"adapter": str(tag)} if adapter else {"run": (str(run), tag.name)}
        assert tuned("mine", path) == (Contender("mine", TUNED, base, **where), base)


def test_checkpoints_of_several_runs(tmp_path: Path) -> None:
    """Nobody can say which one is meant."""
    for tag in ("1", "1-last", "2", "2-last"):
        a_tag(tmp_path / "run" / tag, tmp_path / "model")
    with pytest.raises(SystemExit, match="run holds several checkpoints. Name one: .*/run/1, .*/run/2$"):
        tuned("mine", tmp_path / "run")


def test_a_base_that_is_gone(tmp_path: Path) -> None:
    a_tag(tmp_path / "run/1", tmp_path / "model")
    with pytest.raises(SystemExit, match="run/1 was trained on .*/model/a/b, which is not there any more"):
        tuned("mine", tmp_path / "run")
    (tmp_path / "run/1/run.json").write_text("{}")
    with pytest.raises(SystemExit, match="run/1 was trained on None, which is not there any more"):
        tuned("mine", tmp_path / "run")


def test_folders_that_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty/1").mkdir(parents=True)
    (tmp_path / "empty/1/run.json").write_text("{}")  # Without manifest.json: not complete.
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        assert best_checkpoint(path) is None
        with pytest.raises(SystemExit, match=f"{path} is neither a model's folder .* nor a training run's"):
            tuned("mine", path)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("model", "model/a/b/model.safetensors"),
        ("adapter", "run/1/adapter/adapter_model.safetensors"),
        ("run", "run/1/mp_rank_00_model_states.pt"),
    ],
)
@pytest.mark.parametrize("how", ["size", "time", "name"])
def test_the_fingerprint_follows_the_weights(tmp_path: Path, kind: str, changed: str, how: str) -> None:
    """It stays as it is while nothing changes."""
    base = a_model(tmp_path / "model/a/b")
    tag = a_tag(tmp_path / "run/1", tmp_path / "model", kind == "adapter")
    one = tuned("mine", base if kind == "model" else tag)[0]
    before, weights = one.fingerprint(), tmp_path / changed
    assert one.fingerprint() == before == one._replace(name="other").fingerprint()
    if how == "size":
        weights.write_bytes(b"other weights")
    elif how == "time":
        os.utime(weights, (1, 1))
    else:
        weights.rename(weights.with_name("other.safetensors"))
    assert one.fingerprint() != before


def record(id: str, video: str, answer: str, question: str = "视频标题：甲") -> dict[str, Any]:
    turns = [("system", "你是用户"), ("user", question), ("assistant", answer)]
    return {"id": id, "video_id": video, "conversations": [{"from": role, "value": text} for role, text in turns]}


def train_of(tmp_path: Path, records: list[dict[str, Any]]) -> Path:
    path = tmp_path / "data_train.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def answers(messages: list[dict[str, str]]) -> list[str]:
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_examples_are_of_different_videos(tmp_path: Path) -> None:
    """As long as there are enough; the seed decides which."""
    train = train_of(tmp_path, [record(f"{v}-{n}", str(v), f"{v}-{n}") for v in range(6) for n in range(3)])
    drawn = [answers(draw_examples(train, 6, seed)) for seed in range(5)]
    assert all(sorted(answer[0] for answer in each) == list("012345") for each in drawn)
    assert answers(draw_examples(train, 6, 3)) == drawn[3]
    assert len({tuple(each) for each in drawn}) == 5
    assert {answer[-1] for each in drawn for answer in each} == {*"012"}, "not always a video's first one"
    many = answers(draw_examples(train, 15, 0))
    assert len({*many}) == 15 and {answer[0] for answer in many[:6]} == {answer[0] for answer in many[6:12]}
    assert len({*answers(draw_examples(train, 18, 0))}) == len(answers(draw_examples(train, 50, 0))) == 18


def test_examples_are_short_where_they_can_be(tmp_path: Path) -> None:
    """Question and answer count. Of a video with a long and a short one the short one, whatever the seed."""
    long = "长" * (LONGEST_EXAMPLE - len("视频标题：甲") + 1)
    rows = [record(f"{v}{text[0]}", str(v), f"{v}{text}") for v in range(3) for text in ("l" + long, "s")]
    rows += [record("3l", "3", "3l", "视频标题：" + long), record("4s", "4", "4s" + long[:-3])]
    train = train_of(tmp_path, rows)
    for seed in range(10):
        assert sorted(answer[:2] for answer in answers(draw_examples(train, 4, seed))) == ["0s", "1s", "2s", "4s"]
        assert sorted(answer[:2] for answer in answers(draw_examples(train, 5, seed))) == ["0s", "1s", "2s", "3l", "4s"]
        assert len({*answers(draw_examples(train, 8, seed))}) == 8, "there are eight"


SYSTEM = {"role": "system", "content": "你是用户"}
QUESTION = {"role": "user", "content": "视频标题：甲"}
LATER = [QUESTION, {"role": "assistant", "content": "好"}, {"role": "user", "content": "哪里好"}]
EXAMPLES = [{"role": "user", "content": "例"}, {"role": "assistant", "content": "答"}]
STYLED = {"role": "system", "content": "写得像人"}


@pytest.mark.parametrize("kind", [BASE, TUNED, API, STYLE, FEW_SHOT])
@pytest.mark.parametrize("turns", [[QUESTION], LATER], ids=["one", "three"])
def test_prompts_by_hand(kind: str, turns: list[dict[str, str]]) -> None:
    prompt = make_prompt(kind, STYLED["content"], EXAMPLES)
    for system in ([], [SYSTEM]):
        asked = [*system, *turns]
        expected = {STYLE: [STYLED, *turns], FEW_SHOT: [*system, *EXAMPLES, *turns]}.get(kind, asked)
        assert prompt(asked) == expected
        assert asked == [*system, *turns], "what was given is not changed"


@pytest.mark.parametrize(
    ("template", "separator"),
    [
        (PLAIN_TEMPLATE, ["### User:"]),
        (CHATML, []),
        (CHATML.replace("message['role']", "('human' if message['role'] == 'user' else message['role'])"), []),
        ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", []),
        ("{% if messages[2:] %}{{ raise_exception('one') }}{% endif %}" + CHATML, []),
        ("{% for m in messages %}{{ 'Human: ' if m['role'] == 'user' else 'AI: ' }}{{ m['content'] + '\n' }}"
         "{% endfor %}", ["Human:"]),
    ],
    ids=["plain", "ChatML", "ChatML with longer names", "line breaks", "a single question", "names"],
)  # fmt: skip
def test_where_replies_end(template: str, separator: list[str]) -> None:
    tokenizer = make_tokenizer(300)
    tokenizer.chat_template = template
    assert turn_separator(make_chat(tokenizer)) == separator


def test_an_api_has_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model may be called like a folder that happens to be here."""
    monkeypatch.chdir(tmp_path)
    before = Contender("theirs", "api", "model").fingerprint()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights.safetensors").write_bytes(b"0")
    assert Contender("theirs", "api", "model").fingerprint() == before
    assert Contender("theirs", "api", "another").fingerprint() != before
