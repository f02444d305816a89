"""Metrics of a run: metrics.jsonl, samples.jsonl and loss.png always, a tracking service if asked."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.files import atomic_write, read_lines

LINE = {"step": int}  # What every line of metrics.jsonl and samples.jsonl has.


class Tracker:
    """Writes one rank's (the first's) metrics and sample replies, a JSON object a line."""

    def __init__(
        self, folder: Path, first_step: int, service: str, settings: dict[str, Any], panels: Mapping[str, str]
    ) -> None:
        """Opens the files of a run.

        Args:
            folder: The run's.
            first_step: Steps done before; later lines of an earlier attempt are cut off.
            service: "none", "tensorboard", "swanlab" or "wandb".
            settings: What the service shall show of the run.
            panels: What loss.png shows: names of metrics without "train/" and "eval/", and what to call them.
        """
        self.folder, self._panels = folder, panels
        self._files = [_continue_file(folder / name, first_step) for name in ("metrics.jsonl", "samples.jsonl")]
        self._service = _open_service(service, folder, settings) if service != "none" else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Appends a step's measurements; a held-out loss is drawn at once, since not every run comes to its end."""
        self._append(0, {"step": step, **values})
        if "eval/loss" in values:
            plot_metrics(self.folder, self._panels)
        if self._service:
            self._service.log(values, step=step)

    def log_samples(self, step: int, rows: list[dict[str, str]]) -> None:
        """Appends the model's replies at a step."""
        for row in rows:
            self._append(1, {"step": step, **row})

    def _append(self, number: int, line: dict[str, Any]) -> None:
        self._files[number].write(_as_json(line))
        self._files[number].flush()

    def close(self) -> None:
        """Draws loss.png and ends the service's run."""
        plot_metrics(self.folder, self._panels)
        for file in self._files:
            file.close()
        if self._service:
            self._service.finish()


def _as_json(line: dict[str, Any]) -> str:
    """Writes a line; infinities and NaN, which JSON does not know, as null."""
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()
    }
    return json.dumps(known, ensure_ascii=False) + "\n"


def _continue_file(path: Path, first_step: int) -> Any:
    kept = [line for line in read_lines(path, LINE) if line["step"] <= first_step]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(map(_as_json, kept)), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def _open_service(service: str, folder: Path, settings: dict[str, Any]) -> Any:
    from accelerate import PartialState, tracking

    PartialState()  # accelerate's trackers ask it which process they are in.
    place = {"logging_dir": folder} if service == "tensorboard" else {}
    tracker = tracking.LOGGER_TYPE_TO_CLASS[service](folder.name, **place)
    tracker.start()
    tracker.store_init_configuration({name: str(value) for name, value in settings.items()})
    return tracker


def curve(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """The steps at which something was measured, and what; null, which stands for an infinite number, is left out."""
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """An exponentially weighted mean, whose weights sum to one from the first point on."""
    mean, weight, smooth = 0.0, 0.0, []
    for step, value in points:
        mean, weight = 0.9 * mean + 0.1 * value, 0.9 * weight + 0.1
        smooth.append((step, mean / weight))
    return smooth


def plot_metrics(folder: Path, panels: Mapping[str, str]) -> None:
    """Draws what is in metrics.jsonl as loss.png, a panel a metric, one below the other."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lines = read_lines(folder / "metrics.jsonl", LINE)
    size = (7, 1 + 3 * len(panels))
    figure, rows = plt.subplots(len(panels), figsize=size, dpi=120, layout="constrained", sharex=True, squeeze=False)
    for axes, (name, label) in zip(rows[:, 0], panels.items(), strict=True):
        _draw(axes, lines, name)
        axes.set(ylabel=label)
        axes.grid(alpha=0.3)
    rows[0, 0].set(title=folder.name)
    rows[-1, 0].set(xlabel="step")
    if rows[0, 0].lines:
        rows[0, 0].legend()
    with atomic_write(folder / "loss.png") as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def _draw(axes: Any, lines: list[dict[str, Any]], name: str) -> None:
    """Draws a metric in training, as it was and smoothed, and on held-out samples."""
    train, held_out = curve(lines, f"train/{name}"), curve(lines, f"eval/{name}")
    if train:
        axes.plot(*zip(*train, strict=True), color="0.75", linewidth=1, label="training, each step")
        axes.plot(*zip(*smoothed(train), strict=True), color="tab:blue", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
