"""Runs the parts of the kit one after the other, each in a process with its own time limit, and prints a summary.

    bash benchmarks/gpu/run.sh [--dry]        # sets up the environment and calls this

Results are appended to the file a line at a time, so that whatever ends a run, what was measured is there. While a part
computes, the next one imports its libraries and waits.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from kit import MEMORY_GIB, SMALL_CARD_GIB, boolean
from table import read_results, summary

from utils.files import from_root

HERE = Path(__file__).resolve().parent
SECONDS = 340  # For all parts together.


class Step(NamedTuple):
    """A part of the kit: its name for --parts, its script and how long it may take."""

    name: str
    command: list[str]
    seconds: float


# What matters most comes first.
STEPS = [
    Step("card", ["bench_card.py"], 30),
    Step("gradients", ["check_gradients.py"], 90),
    Step("7b", ["bench_train.py", "--model=Qwen2.5-7B", "--bits=4"], 75),
    Step("3b", ["bench_train.py", "--model=Qwen2.5-3B", "--bits=4"], 60),
    Step("0.5b", ["bench_train.py", "--model=Qwen2.5-0.5B"], 45),
    Step("4b", ["bench_train.py", "--model=Qwen3-4B", "--bits=4"], 60),
    Step("attention", ["bench_attention.py"], 75),
    Step("stages", ["check_stages.py"], 90),
    Step("preferences", ["check_stages.py", "--stages=preferences"], 45),
    Step("profile_0.5b", ["bench_train.py", "--model=Qwen2.5-0.5B", "--profile"], 30),
    Step("profile_7b", ["bench_train.py", "--model=Qwen2.5-7B", "--bits=4", "--profile"], 40),
    Step("host", ["bench_host.py"], 30),
]


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=[step.name for step in STEPS], help="only these (not given: all)")
    add("--out", type=Path, help="file of the results (not given: benchmarks/gpu/results/<card>-<time>.jsonl)")
    add("--time_factor", type=float, default=1.0,
        help=f"lengthens all time limits ({SECONDS} s in all), for slower cards")  # fmt: skip
    add("--memory_gib", type=float, default=MEMORY_GIB,
        help=f"most memory of the card, if it has more than {SMALL_CARD_GIB} GiB; 0: all of it")  # fmt: skip
    add("--dry", type=boolean, nargs="?", const=True, default=False, help="tiny shapes on the CPU, to try the kit")
    return parser


def card_name() -> str:
    """The first card's name, from the driver.

    Raises:
        SystemExit: if there is none.
    """
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if not shutil.which(command[0]) or (asked := subprocess.run(command, capture_output=True, text=True)).returncode:
        raise SystemExit("No card: nvidia-smi is not there or finds none. Try the kit without one: run.sh --dry")
    return asked.stdout.splitlines()[0].strip()


def results_file(args: argparse.Namespace) -> Path:
    """Where the results go."""
    if args.out:
        return from_root(args.out)
    if args.dry:
        return HERE.parent / "output" / "gpu-dry.jsonl"
    name = re.sub(r"\W+", "_", card_name()).strip("_")
    return HERE / "results" / f"{name}-{time.strftime('%Y-%m-%d-%H%M')}.jsonl"


def start(step: Step, args: argparse.Namespace, out: Path) -> subprocess.Popen[str]:
    """Starts a part, which imports its libraries and waits."""
    log = out.with_suffix(".log")
    flags = [f"--out={out}", f"--log={log}", f"--memory_gib={args.memory_gib}", f"--time_factor={args.time_factor}"]
    flags.append(f"--seconds={step.seconds * args.time_factor}")
    command = [sys.executable, str(HERE / step.command[0]), *step.command[1:], *flags, "--wait=True"]
    with log.open("a") as file:  # What is said before the part opens its log itself.
        return subprocess.Popen(
            [*command, *(["--dry"] if args.dry else [])],
            stdin=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )


def end(process: subprocess.Popen[str]) -> None:
    """Ends a part and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(args: argparse.Namespace) -> None:
    """Runs the parts.

    Raises:
        SystemExit: with 1 if a measurement of a dry run failed, which takes no card to mend.
    """
    out = results_file(args)
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in (out, out.with_suffix(".log")):
        path.unlink(missing_ok=True)
    steps = [step for step in STEPS if not args.parts or step.name in args.parts]
    deadline = time.monotonic() + SECONDS * args.time_factor
    started = [start(steps[0], args, out)]
    failed = []
    try:
        for number, step in enumerate(steps):
            process = started[number]
            if number + 1 < len(steps):
                started.append(start(steps[number + 1], args, out))
            left = deadline - time.monotonic()
            if left < 5:
                failed.append(f"{step.name} (no time was left)")
                continue
            print(f"--- {step.name}", flush=True)
            # The time to import is not the part's own; a library that hangs is ended a little later.
            limit_sec = min(left, step.seconds * args.time_factor + 20)
            try:
                process.communicate("\n", timeout=limit_sec)
            except subprocess.TimeoutExpired:
                failed.append(f"{step.name} (ended after {limit_sec:.0f} s)")
            except BrokenPipeError:  # It ended before its turn.
                process.wait()
            if process.poll():
                failed.append(f"{step.name} (exit code {process.returncode}, see {out.with_suffix('.log')})")
            end(process)
    finally:
        for process in started:
            end(process)
    rows = read_results(out) if out.exists() else []
    measured = {(row["part"], row["name"]) for row in rows if "error" not in row}  # With another size, perhaps.
    errors = {(row["part"], row["name"]) for row in rows if "error" in row}
    failed += [f"{part}: {name}" for part, name in sorted(errors - measured)]
    print(f"\n{summary(rows)}\n\n{len(rows)} measurements in {out}")
    if failed:
        print("Not measured, see the results: " + "; ".join(failed))
    if args.dry and failed:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except KeyboardInterrupt:
        raise SystemExit("\nStopped; what was measured until now is in the results.") from None
