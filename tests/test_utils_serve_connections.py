"""utils/serve/connections.py: connections that ask nothing are closed, and do not keep others out.

python -m pytest tests/test_utils_serve_connections.py
"""

import asyncio
import http.client
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn
from conftest import ROOT

from utils.serve.connections import SPARE_FILES, RateLimitedLog, limited_protocol
from utils.serve.limits import Guard, Limits

HALF_A_HEAD = b"GET / HTTP/1.1\r\nHost: x\r\nX-a: "
KEYLESS = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"


class Slow:
    """An app that answers with the number of seconds that the path names, after so many."""

    at_work = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.at_work += 1
        try:
            await asyncio.sleep(float(scope["path"][1:] or 0))
        finally:
            self.at_work -= 1
        body = scope["path"].encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@contextmanager
def served(most: int, head_timeout_sec: float = 60, **limits: Any) -> Iterator[tuple[int, Slow]]:
    """The app behind its limits on a real server in a thread; yields the port."""
    app = Slow()
    config = uvicorn.Config(
        Guard(app, Limits(**limits)),
        http=limited_protocol(most, head_timeout_sec),
        ws="none",
        lifespan="off",
        log_level="critical",
        timeout_graceful_shutdown=1,
    )
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    worker = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    worker.start()
    try:
        yield listening.getsockname()[1], app
    finally:
        server.should_exit = True
        worker.join()


def ask(port: int, path: str = "/0", **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers=headers)
    return connection.getresponse().status


def opened(port: int, count: int, data: bytes = b"") -> list[socket.socket]:
    """So many connections that send this and no more."""
    sockets = []
    for _ in range(count):
        sockets.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        sockets[-1].sendall(data)
    return sockets


def closed_after(connection: socket.socket) -> float:
    """Seconds until the server closes a connection."""
    started = time.monotonic()
    with suppress(ConnectionError):
        assert connection.recv(1000) == b""
    return time.monotonic() - started


@pytest.mark.parametrize("data", [b"", b"G", HALF_A_HEAD], ids=["nothing", "a letter", "half a head"])
def test_a_head_that_does_not_come(data: bytes) -> None:
    with served(100, head_timeout_sec=0.5) as (port, _):
        (connection,) = opened(port, 1, data)
        assert 0.3 < closed_after(connection) < 3


def test_a_head_that_comes_letter_by_letter() -> None:
    """Each letter in time, all of them not."""
    with served(100, head_timeout_sec=0.5) as (port, _):
        (connection,) = opened(port, 1, HALF_A_HEAD)
        started = time.monotonic()
        with suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(b"a")
                time.sleep(0.05)
        assert time.monotonic() - started < 3


def test_the_head_of_a_second_request_that_does_not_come() -> None:
    with served(100, head_timeout_sec=0.5) as (port, _):
        (connection,) = opened(port, 1, b"GET /0 HTTP/1.1\r\nHost: x\r\n\r\n")
        said = b""
        while not said.endswith(b"/0"):
            said += connection.recv(1000)
        connection.sendall(HALF_A_HEAD)
        assert 0.3 < closed_after(connection) < 3


def test_slow_bodies_and_slow_answers_are_waited_for() -> None:
    """Longer than for a head."""
    with served(100, head_timeout_sec=0.2) as (port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        for _ in range(2):  # The second on the same connection.
            connection.putrequest("POST", "/0.5")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "4")
            connection.endheaders()
            time.sleep(0.5)
            connection.send(b"true")
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read() == b"/0.5"


@pytest.mark.parametrize("data", [b"", HALF_A_HEAD, KEYLESS], ids=["idle", "half a head", "no key, no body"])
def test_a_crowd_that_asks_nothing_keeps_nobody_out(data: bytes) -> None:
    """Fifty where there are places for eight, and again while somebody asks with the key."""
    with served(8, key="k", max_requests=4) as (port, _):
        crowd = opened(port, 50, data)
        for _ in range(5):
            assert ask(port, Authorization="Bearer k") == 200
            crowd += opened(port, 10, data)
        assert ask(port) == 401


def test_those_at_work_are_not_sent_away() -> None:
    """They keep their places while others come and go; when all are taken, who comes is turned away."""
    with served(3) as (port, app):
        answers: list[int] = []
        workers = [threading.Thread(target=lambda: answers.append(ask(port, "/2"))) for _ in range(3)]
        for worker in workers:
            worker.start()
        end = time.monotonic() + 10
        while app.at_work < 3 and time.monotonic() < end:
            time.sleep(0.01)
        for connection in opened(port, 20):
            assert closed_after(connection) < 1.5
        for worker in workers:
            worker.join()
        assert answers == [200] * 3 and ask(port) == 200


@pytest.mark.parametrize(("soft", "hard"), [(256, 256), (256, 1024), (256, 5000), (100, 100)])
def test_as_many_as_files_may_be_open(soft: int, hard: int) -> None:
    """The limit is raised as far as the system lets it be, and some files are left for others."""
    program = (
        "import json, psutil, resource as r; from utils.serve.connections import most_connections\n"
        f"r.setrlimit(r.RLIMIT_NOFILE, ({soft}, {hard}))\n"
        "print(json.dumps([most_connections(), r.getrlimit(r.RLIMIT_NOFILE), psutil.Process().num_fds()]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    most, limits, files = json.loads(done.stdout)
    assert limits == [hard, hard]
    assert most == max(16, min(4096, hard - files - SPARE_FILES))


def test_messages_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("utils.serve.connections.time.monotonic", lambda: now[0])
    log, said = logging.Logger("uvicorn.error"), []
    log.addFilter(RateLimitedLog())
    log.addHandler(type("Noted", (logging.Handler,), {"emit": lambda _, record: said.append(record.getMessage())})())
    for _ in range(1000):
        log.warning("Invalid HTTP request received.")
        log.error("socket.accept() out of system resource")
    assert len(said) == 2
    try:
        raise ValueError
    except ValueError:
        log.exception("Invalid HTTP request received.")
    assert len(said) == 3, "an error of another kind is another message"
    now[0] += 61
    log.warning("Invalid HTTP request received.")
    assert len(said) == 4
