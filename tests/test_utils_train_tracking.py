"""utils/train/tracking.py: every measurement once, whatever was killed in between, and a picture of them.

python -m pytest tests/test_utils_train_tracking.py
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from utils.files import read_lines
from utils.train.arguments import argument_problems
from utils.train.tracking import LINE, Tracker, curve, plot_metrics, smoothed

LOSS = {"loss": "loss (nats a token)"}


def lines(path: Path) -> list[dict[str, object]]:
    """A file's lines, read the plain way."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_are_there_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, "none", {}, LOSS)
    tracker.log(1, {"train/loss": 2.5, "train/lr": 1e-4})
    tracker.log_samples(1, [{"id": "a", "reply": "好看\u2028！\n"}, {"id": "b", "reply": "😂"}])
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 2.5, "train/lr": 1e-4}]
    assert read_lines(tmp_path / "samples.jsonl", LINE) == [
        {"step": 1, "id": "a", "reply": "好看\u2028！\n"},
        {"step": 1, "id": "b", "reply": "😂"},
    ]
    assert "好看" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8"), "readable as it stands"
    tracker.close()
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_resumed_run_goes_on_after_its_step(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, "none", {}, LOSS)
    for step in range(1, 6):
        tracker.log(step, {"train/loss": float(step)})
        tracker.log_samples(step, [{"reply": str(step)}])
    # Killed at step 5; the checkpoint is of step 3.
    again = Tracker(tmp_path, 3, "none", {}, LOSS)
    again.log(4, {"train/loss": 40.0})
    again.log_samples(4, [{"reply": "40"}])
    again.close()
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)
    ]  # fmt: skip
    assert [line["reply"] for line in lines(tmp_path / "samples.jsonl")] == ["1", "2", "3", "40"]
    tracker.close()


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    """Torn at any byte, inside of a letter as well."""
    whole = '{"step": 1, "reply": "好"}\n'.encode()
    torn = '{"step": 2, "reply": "好看"}\n'.encode()
    path = tmp_path / "samples.jsonl"
    for cut in range(1, len(torn)):
        path.write_bytes(whole + torn[:cut])
        assert read_lines(path, LINE) == [{"step": 1, "reply": "好"}], cut
        tracker = Tracker(tmp_path, 1, "none", {}, LOSS)
        tracker.log_samples(2, [{"reply": "新"}])
        assert lines(path) == [{"step": 1, "reply": "好"}, {"step": 2, "reply": "新"}]
        for file in tracker._files:
            file.close()


DAMAGED = [b'{"step": 2, "train/lo', b"\0" * 40, b"[1]", b'{"train/loss": 1.0}', b'{"step": "2"}',
           b'{"step": 2, "x": "\xff"}', b"[" * 100_000, b""]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:12]))
def test_damaged_lines_are_left_out(tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that goes on writes on behind the others, and draws."""
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "train/loss": 2.0}', b'{"step": 3, "train/loss": 1.0}']
    path.write_bytes(b"\n".join([good[0], line, good[1], b""]))
    tracker = Tracker(tmp_path, 3, "none", {}, LOSS)
    told = capsys.readouterr().out
    assert "metrics.jsonl" in told and "damaged and left out: line 2." in told
    tracker.log(4, {"train/loss": 0.5, "eval/loss": 0.7})
    tracker.close()
    assert [row["step"] for row in lines(path)] == [1, 3, 4] and (tmp_path / "loss.png").exists()
    assert capsys.readouterr().out == ""


def test_what_is_no_number_is_not_drawn(tmp_path: Path) -> None:
    odd = ['"x"', "[1]", '{"a": 1}', "null"]
    rows = [f'"step": {step}, "train/loss": {value}, "eval/loss": {value}' for step, value in enumerate([*odd, "2.5"])]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{{{row}}}\n" for row in rows))
    assert curve(read_lines(tmp_path / "metrics.jsonl", LINE), "eval/loss") == [(4, 2.5)]
    plot_metrics(tmp_path, LOSS)
    assert (tmp_path / "loss.png").exists()


def test_many_damaged_lines_are_told_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"{}\n" * 12 + b'{"step": 1}\n')
    assert read_lines(tmp_path / "x.jsonl", LINE) == [{"step": 1}]
    assert "lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more." in capsys.readouterr().out


def test_no_file_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "metrics.jsonl", LINE) == []


# The colours of the picture's lines, 0 to 1.
BLUE, ORANGE = (0.122, 0.467, 0.706), (1.0, 0.498, 0.055)


def columns_of(picture: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """The picture's columns in which a colour stands; the legend has few of them."""
    found = (np.abs(picture[:, :, :3] - np.array(colour)) < 0.02).all(-1)
    return np.flatnonzero(found.any(0))


def test_the_picture_shows_both_losses(tmp_path: Path) -> None:
    import matplotlib.image

    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": 4 - 0.02 * step + 0.1 * (step % 3)} for step in range(1, 101)]
    rows += [{"step": step, "eval/loss": 4.2 - 0.015 * step} for step in range(0, 101, 20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_metrics(tmp_path, LOSS)
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (480, 840)
    for colour in (BLUE, ORANGE):
        assert len(columns_of(picture, colour)) > 0.7 * 840, "from the first step to the last"

    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:100]))
    plot_metrics(tmp_path, LOSS)
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    assert len(columns_of(picture, BLUE)) and not len(columns_of(picture, ORANGE))


def test_a_panel_for_each_metric(tmp_path: Path) -> None:
    """The second one has held-out values only: its half of the picture is orange and not blue."""
    import matplotlib.image

    rows = [{"step": step, "train/loss": 4 - 0.02 * step, "eval/rewards/accuracy": step / 100} for step in range(100)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_metrics(tmp_path, LOSS | {"rewards/accuracy": "accuracy"})
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (840, 840)
    upper, lower = picture[:420], picture[420:]
    assert len(columns_of(upper, BLUE)) > 500 and not len(columns_of(lower, BLUE))
    assert len(columns_of(lower, ORANGE)) > 500


def test_a_run_without_a_step_has_a_picture_too(tmp_path: Path) -> None:
    Tracker(tmp_path, 0, "none", {}, LOSS).close()
    assert (tmp_path / "loss.png").is_file()


def test_the_picture_is_drawn_with_each_held_out_loss(tmp_path: Path) -> None:
    """So that a run that is stopped leaves one too."""
    tracker = Tracker(tmp_path, 0, "none", {}, LOSS)
    tracker.log(1, {"train/loss": 2.5})
    assert not (tmp_path / "loss.png").exists()
    pictures = []
    for step in (2, 3):
        tracker.log(step, {"train/loss": 2.0, "eval/loss": 2.0 / step})
        pictures.append((tmp_path / "loss.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    tracker = Tracker(tmp_path, 0, "none", {}, LOSS)
    tracker.log(1, {"train/loss": 2.5, "train/grad_norm": inf, "eval/loss": nan})
    tracker.log(2, {"train/loss": -inf, "train/lr": 1e-4, "eval/loss": 2.0})
    expected = [
        {"step": 1, "train/loss": 2.5, "train/grad_norm": None, "eval/loss": None},
        {"step": 2, "train/loss": None, "train/lr": 1e-4, "eval/loss": 2.0},
    ]
    assert lines(tmp_path / "metrics.jsonl") == expected
    # An earlier version wrote them as they are: a run that goes on cleans its file.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/loss": NaN}\n')
    Tracker(tmp_path, 3, "none", {}, LOSS).close()
    assert lines(tmp_path / "metrics.jsonl") == [*expected, {"step": 3, "train/loss": None}]


# ---------------------------------------------------------------------------------------------------------------------
# Services


@pytest.mark.parametrize("service", ["tensorboard", "swanlab", "wandb"])
def test_a_missing_service_is_named(ft: ModuleType, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr("utils.train.arguments.find_spec", lambda name: None)
    (problem,) = argument_problems(ft.build_parser().parse_args(["--track", service]))
    assert f"--track {service}" in problem and f"pip install {service}" in problem
    assert argument_problems(ft.build_parser().parse_args([])) == []


def test_a_service_gets_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through accelerate's interface, whose services take no Paths and no None in their settings."""
    from accelerate import tracking

    seen: list[tuple[object, ...]] = []

    class Service:
        def __init__(self, name: str) -> None:
            seen.append(("name", name))

        def start(self) -> None:
            seen.append(("start",))

        def store_init_configuration(self, values: dict[str, object]) -> None:
            assert all(isinstance(value, int | float | str | bool) for value in values.values())
            seen.append(("settings", values["lora_r"]))

        def log(self, values: dict[str, float], step: int) -> None:
            seen.append(("log", step, values))

        def finish(self) -> None:
            seen.append(("finish",))

    monkeypatch.setattr(tracking, "is_wandb_available", lambda: True)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Service)
    tracker = Tracker(tmp_path, 0, "wandb", {"lora_r": 16, "lr": None, "data_dir": tmp_path}, LOSS)
    tracker.log(1, {"train/loss": 2.0})
    tracker.close()
    assert [entry[0] for entry in seen] == ["name", "start", "settings", "log", "finish"]
    assert seen[0] == ("name", tmp_path.name) and seen[3] == ("log", 1, {"train/loss": 2.0})


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path / "run", 0, "tensorboard", {"lora_r": 16, "lr": None, "data_dir": tmp_path}, LOSS)
    for step in (1, 2):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.close()
    # Settings go to a folder below.
    folder = min((path.parent for path in tmp_path.rglob("events.out.*")), key=lambda path: len(path.parts))
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_the_smoothed_curve_is_a_weighted_mean() -> None:
    points = [(step, float(step * step % 7)) for step in range(1, 30)]
    for number, (step, value) in enumerate(smoothed(points)):
        weights = [0.9 ** (number - earlier) for earlier in range(number + 1)]
        mean = sum(w * v for w, (_, v) in zip(weights, points, strict=False)) / sum(weights)
        assert step == points[number][0] and value == pytest.approx(mean)
