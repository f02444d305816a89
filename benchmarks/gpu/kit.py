"""What every part of the kit needs: a process with its own time limit, a JSON line a measurement, clocks and memory."""

import argparse
import gc
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # The tests' tokenizer and records serve here too.

from utils.cli import boolean  # noqa: E402

GIB = 1024**3
# What an 8 GB card leaves to PyTorch's allocator beside the CUDA context and a desktop. Cards up to SMALL_CARD_GIB are
# measured as they are.
MEMORY_GIB, SMALL_CARD_GIB = 7.3, 8.5


def part_parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all parts share."""
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="file that gets a JSON line for every measurement (not given: they are printed alone)")
    add("--log", type=Path, help="file that gets what the libraries print (not given: the terminal)")
    add("--seconds", type=float, default=120, help="time limit of this part")
    add("--time_factor", type=float, default=1.0, help="lengthens the limits of single measurements, for slower cards")
    add("--memory_gib", type=float, default=MEMORY_GIB,
        help=f"most memory of the card, if it has more than {SMALL_CARD_GIB} GiB; 0: all of it")  # fmt: skip
    add("--dry", type=boolean, nargs="?", const=True, default=False, help="tiny shapes on the CPU, to try the part")
    add("--wait", type=boolean, default=False, help="True: import the libraries, then wait for a line on the input")
    return parser


class TimeLimit(Exception):
    """A measurement took longer than it may."""


class Part:
    """One part of the kit, in a process of its own.

    Attributes:
        dry: Whether tiny shapes are computed on the CPU.
        device: "cuda" or "cpu".
        limit_gib: What the card's memory is held to; None: nothing.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        """Imports what takes long, waits for its turn and takes the memory that it may have."""
        self.name, self.dry, self._out, self._time_factor = name, args.dry, args.out, args.time_factor
        self._terminal = os.dup(1)
        if args.log:
            log = os.open(args.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        if self.dry:
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # The next part is at work too.
        import deepspeed  # noqa: F401
        import peft  # noqa: F401
        import torch
        import transformers

        if args.wait:
            sys.stdin.readline()
        transformers.utils.logging.disable_progress_bar()
        self.device = "cpu" if self.dry else "cuda"
        if not self.dry and not torch.cuda.is_available():
            raise SystemExit("PyTorch finds no card on this machine. Try the kit without one: --dry")
        self.limit_gib = None
        if not self.dry and args.memory_gib:
            total = torch.cuda.get_device_properties(0).total_memory
            if total > max(SMALL_CARD_GIB, args.memory_gib) * GIB:
                self.limit_gib = args.memory_gib
                torch.cuda.set_per_process_memory_fraction(args.memory_gib * GIB / total)
        self._end = time.perf_counter() + args.seconds
        signal.signal(signal.SIGALRM, _raise_time_limit)

    def write(self, name: str, **values: Any) -> None:
        """Appends a measurement to the results, at once."""
        text = json.dumps(_finite({"part": self.name, "name": name} | values), ensure_ascii=False, allow_nan=False)
        if self._out:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        os.write(self._terminal, (text[:500] + "\n").encode())

    def measure(
        self, name: str, limit_sec: float, work: Callable[..., dict[str, Any]], *args: Any, **settings: Any
    ) -> dict[str, Any] | None:
        """Runs a measurement within its own time limit and the part's, and writes what it returns.

        Args:
            name: Of the measurement.
            limit_sec: The longest it may take, times --time_factor.
            work: What returns its figures.
            args: Of `work`.
            settings: Further arguments of `work`, by name; they are written with the figures.

        Returns:
            The figures; None if it failed, which is written as "error": a result too.
        """
        import torch

        left = min(limit_sec * self._time_factor, self._end - time.perf_counter())
        if left < 1:
            self.write(name, error="no time was left")
            return None
        started = time.perf_counter()
        figures, problem = None, {}
        try:
            signal.setitimer(signal.ITIMER_REAL, left)
            figures = work(*args, **settings)
        except TimeLimit:
            problem = {"error": f"not done within {left:.0f} s"}
        except torch.OutOfMemoryError as error:
            problem = {"error": "out of memory", "detail": str(error)[:300]}
        except BaseException as error:  # Also SystemExit, with which the project's scripts end.
            if isinstance(error, KeyboardInterrupt):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            problem = {"error": f"{type(error).__name__}: {str(error)[:300]}", "at": f"{frame.filename}:{frame.lineno}"}
            traceback.print_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        written = {key: value for key, value in settings.items() if isinstance(value, str | int | float)}
        self.write(name, **written, **(figures or {}), **problem, sec=round(time.perf_counter() - started, 2))
        self.free_memory()
        return figures

    def free_memory(self) -> None:
        """Gives back what the last measurement left on the card."""
        import torch

        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Waits for the card."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], Any], repeat: int = 8, warm_up: int = 3) -> float:
        """Median time of a call; on a card by its own clock."""
        import torch

        for _ in range(warm_up):
            work()
        self.synchronize()
        times = []
        for _ in range(repeat):
            if self.device == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                work()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                started = time.perf_counter()
                work()
                times.append(1000 * (time.perf_counter() - started))
        return round(sorted(times)[repeat // 2], 4)

    @contextmanager
    def peak_memory(self, figures: dict[str, Any]) -> Iterator[None]:
        """Adds the most memory that the block's tensors took and that the allocator held for them, in GiB.

        "used_gib" is what the driver counts at the end of it, for all programs: the CUDA context comes on top.
        """
        import torch

        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.device == "cuda":
            figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
            figures["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
            free, total = torch.cuda.mem_get_info()
            figures["used_gib"] = round((total - free) / GIB, 3)


def _finite(value: Any) -> Any:
    """Writes what JSON has no number for, as the error of gradients that are NaN, as text."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _raise_time_limit(*_: Any) -> None:
    raise TimeLimit


def relative_error(ours: Iterable[Any], plain: Iterable[Any]) -> float:
    """Distance of two lists of tensors, relative to the length of the second; NaN if a number is not finite."""
    squares = [
        ((one.double() - two.double()).norm() ** 2, two.double().norm() ** 2)
        for one, two in zip(ours, plain, strict=True)
    ]
    return float((sum(d for d, _ in squares) / sum(n for _, n in squares)).sqrt())
