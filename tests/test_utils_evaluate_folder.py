"""utils/evaluate/folder.py: what is known stays, what does not belong there is refused, several become one.

python -m pytest tests/test_utils_evaluate_folder.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from utils.data.held_out import Comment
from utils.evaluate.contenders import BASE, TUNED, Contender
from utils.evaluate.folder import REAL, EvaluationFolder, joined
from utils.evaluate.measures import Evidence

SETTINGS = {"limit": 500, "temperature": 0.8, "base": "model/a", "columns": {"user": "问", "assistant": "答"}}


def comment(id: str, answer: str = "真的") -> Comment:
    """Two comments a video: 0 and 1, 2 and 3."""
    messages = [{"role": "user", "content": f"视频标题：{id}"}, {"role": "assistant", "content": answer}]
    return Comment(id, f"v{int(id) // 2}", messages)


@pytest.fixture
def contender(tmp_path: Path) -> Contender:
    """A tuned model whose weights are a few bytes."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(b"12345")
    return Contender("mine", TUNED, str(tmp_path / "weights"))


def settings_in(folder: EvaluationFolder) -> dict[str, Any]:
    return json.loads((folder.path / "settings.json").read_text(encoding="utf-8"))


def opened(path: Path, contender: Contender, train: Path | None = None) -> EvaluationFolder:
    """An evaluation with one line of each kind."""
    folder = EvaluationFolder(path)
    folder.open(SETTINGS, [contender], train, False)
    folder.add_replies("mine", comment("0"), ["好"], [False])
    folder.add_likelihoods("mine", "0", {REAL: {"0": -2.0}})
    return folder


def test_it_goes_on(tmp_path: Path, contender: Contender) -> None:
    """With the same settings and files what is known stays known."""
    folder = opened(tmp_path / "mine", contender, tmp_path / "data_train.json")
    kept = settings_in(folder)
    assert kept["settings"] == SETTINGS and kept["kinds"] == {"mine": "tuned"}
    assert kept["train_data"] == str(tmp_path / "data_train.json")
    again = EvaluationFolder(tmp_path / "mine")
    again.open(SETTINGS, [contender], tmp_path / "data_train.json", False)
    assert again.answered("mine") == {"0"} and again.read("mine", REAL) == {"0"}
    assert again.answered("base") == set() and again.read("mine", "base") == set()
    assert settings_in(again) == kept


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("temperature", 1.0, "temperature 0.8, not 1.0"), ("base", "model/b", "base 'model/a', not 'model/b'")],
)
def test_other_settings(tmp_path: Path, contender: Contender, name: str, value: Any, said: str) -> None:
    """Are refused, with both values and what to do; nothing is lost."""
    folder = opened(tmp_path / "mine", contender)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(SystemExit, match=f"mine was made with {said}.*another --name.*--overwrite"):
        folder.open(SETTINGS | {name: value}, [contender], None, False)
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_changed_weights(tmp_path: Path, contender: Contender) -> None:
    folder = opened(tmp_path / "mine", contender)
    (tmp_path / "weights/model.safetensors").write_bytes(b"123456")
    with pytest.raises(SystemExit, match="mine knows another 'mine': its files have changed.*--overwrite"):
        folder.open(SETTINGS, [contender], None, False)
    assert folder.answered("mine") == {"0"}


def test_overwrite(tmp_path: Path, contender: Contender) -> None:
    """Throws away all of it, contenders too."""
    folder = opened(tmp_path / "mine", contender)
    other = contender._replace(name="other")
    folder.open(SETTINGS | {"limit": 5}, [other], None, True)
    assert folder.answered("mine") == set() and folder.read("mine", REAL) == set()
    kept = settings_in(folder)
    assert kept["settings"]["limit"] == 5 and kept["kinds"] == {"other": "tuned"} == {**kept["kinds"]}
    assert [*kept["contenders"]] == ["other"]


def test_a_contender_that_joins_later(tmp_path: Path, contender: Contender) -> None:
    """The first ones stay known, even where the later command does not name them."""
    folder = opened(tmp_path / "mine", contender)
    later = contender._replace(name="base", kind=BASE)
    folder.open(SETTINGS, [later], None, False)
    kept = settings_in(folder)
    assert kept["kinds"] == {"mine": "tuned", "base": "base"} and [*kept["contenders"]] == ["mine", "base"]
    assert folder.answered("mine") == {"0"}
    (tmp_path / "weights/model.safetensors").write_bytes(b"changed")
    with pytest.raises(SystemExit, match="'base': its files have changed"):
        folder.open(SETTINGS, [later], None, False)


@pytest.mark.parametrize("name", ["replies.jsonl", "likelihoods.jsonl"])
def test_damage(tmp_path: Path, contender: Contender, capsys: Any, name: str) -> None:
    """A torn last line is cut, so that the next one starts a line; one in the middle is named, and only it is lost."""
    folder = opened(tmp_path / "mine", contender)
    for id in ("1", "2"):
        folder.add_replies("mine", comment(id), ["好"], [False])
        folder.add_likelihoods("mine", id, {REAL: {id: -2.0}})
    path = folder.path / name
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:20] + b"\n" + third + second[:30])

    def known() -> set[str]:
        return folder.answered("mine") if name == "replies.jsonl" else folder.read("mine", REAL)

    folder.open(SETTINGS, [contender], None, False)
    assert path.read_bytes() == first + second[:20] + b"\n" + third
    assert known() == {"0", "2"}
    assert f"{name}: damaged and left out: line 2." in capsys.readouterr().out
    folder.add_replies("mine", comment("1"), ["好"], [False])
    folder.add_likelihoods("mine", "1", {REAL: {"1": -2.0}})
    assert known() == {"0", "1", "2"}


def test_evidence_by_hand(tmp_path: Path) -> None:
    """What each reads of the real replies, and of the others' what the base reads; the newest line counts."""
    path = tmp_path / "mine"
    path.mkdir()
    row = {"video_id": "v", "messages": [{"role": "user", "content": "问"}], "real": "真"}
    write_rows(path / "replies.jsonl", [
        row | {"contender": "mine", "id": "0", "replies": ["旧"], "cut": [False]},
        row | {"contender": "mine", "id": "1", "replies": ["甲", "乙"], "cut": [False, True]},
        row | {"contender": "gone", "id": "1", "replies": ["丙"], "cut": [False]},
        row | {"contender": "mine", "id": "0", "replies": ["新"], "cut": [True]},
    ])  # fmt: skip
    write_rows(path / "likelihoods.jsonl", [
        {"contender": "mine", "of": "real", "id": "0", "nats": {"0": -1.0, "1": -5.0}},
        {"contender": "mine", "of": "real", "id": "1", "nats": {"1": -2.0}},
        {"contender": "base", "of": "real", "id": "1", "nats": {"1": -3.0}},
        {"contender": "base", "of": "mine", "id": "0", "nats": {"0": -4.0}},
        {"contender": "base", "of": "mine", "id": "1", "nats": {"0": -6.0, "1": -7.0}},
        {"contender": "base", "of": "base", "id": "0", "nats": {"0": -9.0}},
        {"contender": "mine", "of": "base", "id": "0", "nats": {"0": -8.0}},
    ])  # fmt: skip
    replies, cut = {"0": ["新"], "1": ["甲", "乙"]}, {"0": [True], "1": [False, True]}
    real, written = {"0": {"0": -1.0}, "1": {"0": -5.0, "1": -2.0}}, {"0": {"0": -4.0, "1": -6.0}, "1": {"1": -7.0}}
    assert EvaluationFolder(path).evidence({"mine": TUNED, "base": BASE}, BASE) == [
        Evidence("mine", TUNED, replies, cut, real, written),
        Evidence("base", BASE, {}, {}, {"1": {"1": -3.0}}, {"0": {"0": -9.0}}),
    ]


def evaluated(path: Path, contender: Contender, comments: list[Comment], train: Path | None = None) -> Path:
    """An evaluation in which one contender has answered some comments."""
    folder = EvaluationFolder(path)
    folder.open(SETTINGS, [contender], train, False)
    for one in comments:
        folder.add_replies("mine", one, [f"{path.name}的{one.id}"], [False])
        folder.add_likelihoods("mine", one.id, {REAL: {one.id: -2.0}})
    return path


def test_joined(tmp_path: Path, contender: Contender) -> None:
    """Comments that are the same in both: 2 is another one in the second, 0 and 3 stand in one only."""
    one = evaluated(tmp_path / "monday", contender, [comment("0"), comment("1"), comment("2")], tmp_path / "train.json")
    two = evaluated(tmp_path / "tuesday", contender, [comment("3"), comment("2", "别的"), comment("1")])
    comments, evidence, train, columns = joined([one, two])
    assert comments == [comment("1")] and (train, columns) == (tmp_path / "train.json", SETTINGS["columns"])
    assert [(each.name, each.kind) for each in evidence] == [("monday: mine", TUNED), ("tuesday: mine", TUNED)]
    assert [each.replies["1"] for each in evidence] == [["monday的1"], ["tuesday的1"]]
    assert [each.real["1"] for each in evidence] == [{"1": -2.0}] * 2
    assert joined([two, one])[2] is None


def test_what_cannot_be_joined(tmp_path: Path, contender: Contender) -> None:
    one = evaluated(tmp_path / "monday", contender, [comment("0")])
    other = evaluated(tmp_path / "tuesday", contender, [comment("1")])
    with pytest.raises(SystemExit, match="monday.*tuesday have no held-out comments in common"):
        joined([one, other])
    (tmp_path / "empty").mkdir()
    for none in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(SystemExit, match=f"--compare: {none} is no evaluation"):
            joined([one, none])


def test_two_evaluations_of_one_name(tmp_path: Path, contender: Contender) -> None:
    """Their contenders would have the same names, and one would stand for both."""
    one = evaluated(tmp_path / "a/monday", contender, [comment("0")])
    other = evaluated(tmp_path / "b/monday", contender, [comment("0")])
    with pytest.raises(SystemExit, match="two evaluations are named 'monday'"):
        joined([one, other])
