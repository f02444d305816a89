"""Limits on a server's connections: idle ones are closed, and a crowd does not keep others out."""

import asyncio
import logging
import resource
import time
from typing import Any

import psutil
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_TIMEOUT_SEC = 10  # The longest that sending the head of a request may take.
# asyncio takes so many connections in each round of its loop, and several rounds pass before the first is known to a
# protocol, or closed.
BACKLOG = 64
SPARE_FILES = 6 * BACKLOG + 64  # The last are for what else the process opens.
MOST_CONNECTIONS = 4096
SAID_AGAIN_SEC = 60


def most_connections() -> int:
    """Raises the limit of open files as far as it goes, and finds how many connections fit under it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most_files = max(soft, 1 << 16) if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, hard))
    return max(16, min(MOST_CONNECTIONS, most_files - psutil.Process().num_fds() - SPARE_FILES))


def limited_protocol(most: int, head_timeout_sec: float = HEAD_TIMEOUT_SEC) -> Any:
    """uvicorn's HTTP protocol with a limit on connections and on the time that a request's head may take.

    A connection on which no whole head of a request comes in time is closed. When there are too many, the oldest one is
    that is not being worked for: `utils.serve.limits.Guard` marks the others in their scope ("at_work").

    Args:
        most: Connections at once.
        head_timeout_sec: For the head of a request, from the connection's beginning or the head's first byte.
    """
    opened: dict[Any, None] = {}  # In the order in which they came.

    class PatientProtocol(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(opened) >= most:
                idle = next((one for one in opened if not one._at_work()), self)
                opened.pop(idle, None)
                idle.transport.abort()
            if not transport.is_closing():
                opened[self] = None
                self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._awaits_head():
                self._await_head()
            elif self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def connection_lost(self, exc: Exception | None) -> None:
            opened.pop(self, None)
            if self._head_timer is not None:
                self._head_timer.cancel()
            super().connection_lost(exc)

        def _awaits_head(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _at_work(self) -> bool:
            return not self._awaits_head() and bool(self.scope.get("at_work"))

        def _await_head(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(head_timeout_sec, self.transport.close)

    return PatientProtocol


class RateLimitedLog(logging.Filter):
    """Passes each message at most once a minute, however often clients cause it."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        kind = (record.name, f"{record.msg} {record.exc_info and record.exc_info[0]}")
        if time.monotonic() - self._said.get(kind, -SAID_AGAIN_SEC) < SAID_AGAIN_SEC:
            return False
        if len(self._said) > 1000:
            self._said.clear()
        self._said[kind] = time.monotonic()
        return True


def limit_log_rate() -> None:
    """Filters what asyncio and uvicorn log about connections and requests."""
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(RateLimitedLog())
