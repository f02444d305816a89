"""Ctrl-C and SIGTERM stop a run at the end of its step; a second one ends it at once."""

import os
import signal
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Context manager that records the signals that ask a run to stop.

    The second signal of a kind does what signals do by default. Of a kind, since DeepSpeed's launcher passes a Ctrl-C,
    which the terminal has sent to all processes, on as a SIGTERM.
    """

    def __init__(self, says: bool) -> None:
        """Makes it; nothing is noticed yet.

        Args:
            says: Whether this process tells the user what a signal does.
        """
        self._says, self._received, self._before = says, 0, {}

    def __enter__(self) -> "StopSignals":
        # What the process was told to ignore, as by nohup, it goes on ignoring.
        heeded = [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
        self._before: dict[int, Any] = {number: signal.signal(number, self._notice) for number in heeded}
        return self

    def _notice(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if self._says and not self._received:  # Not by print(), in the midst of which the signal may have come.
            os.write(2, b"\nStopping after this step. Once more: at once, without saving.\n")
        self._received = self._received or number

    def received_by_any_rank(self) -> int:
        """The signal that this or another rank was asked to stop by, 0 if none was. All ranks call it together."""
        from utils.train.tensors import all_reduced_each

        of_kinds = {str(number): float(self._received == number) for number in NUMBERS}
        return max((int(number) for number, count in all_reduced_each(of_kinds).items() if count), default=0)

    def restore(self) -> None:
        """Handles signals as before."""
        while self._before:
            signal.signal(*self._before.popitem())

    def __exit__(self, *_: Any) -> None:
        self.restore()
