"""utils/train/signals.py: the first signal is noticed, the second ends the process, ignored ones stay ignored.

python -m pytest tests/test_utils_train_signals.py
"""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import signal, sys, time
from utils.train.signals import StopSignals
if len(sys.argv) > 1: signal.signal(int(sys.argv[1]), signal.SIG_IGN)
with StopSignals(says=True) as signals:
    print("begun", flush=True)
    for _ in range(600):
        time.sleep(0.05)
        number, signals._received = signals._received, 0  # First: the next signal comes as soon as this one is told.
        if number: print(number, flush=True)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_of_a_kind_ends_at_once(number: int) -> None:
    """One of each kind is what DeepSpeed's launcher makes of a Ctrl-C."""
    process, other = start(), {signal.SIGINT: signal.SIGTERM, signal.SIGTERM: signal.SIGINT}[number]
    for sent in (number, other):
        process.send_signal(sent)
        assert process.stdout.readline() == f"{int(sent)}\n", "noticed, and it goes on"
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == -number and said.startswith("\nStopping after this step. Once more: at once")


def test_what_is_ignored_stays_ignored() -> None:
    process = start(str(int(signal.SIGINT)))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == f"{int(signal.SIGTERM)}\n"
    process.kill()
    assert process.communicate()[1].count("Stopping") == 1


def test_afterwards_all_is_as_before() -> None:
    from utils.train.signals import StopSignals

    before = signal.getsignal(signal.SIGINT)
    with StopSignals(says=False) as signals:
        assert signal.getsignal(signal.SIGINT) == signals._notice
    assert signal.getsignal(signal.SIGINT) == before
