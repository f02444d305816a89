"""utils/serve/routes.py, utils/serve/limits.py: who may ask, how much, how long; and what happens to those who go.

python -m pytest tests/test_utils_serve_routes.py
"""

import asyncio
import http.client
import json
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from utils.data.records import comment_prompt
from utils.data.thoughts import ThoughtFolder, ThoughtFrame
from utils.serve.limits import Guard, Limits, Refused
from utils.serve.routes import (
    Delta,
    Question,
    Sampling,
    Served,
    add_error_handlers,
    check_lengths,
    find_model,
    own_routes,
    to_conversation,
)

ROUTE = "/ai/llm/generation_stream"
JSON = {"Content-Type": "application/json"}


class Parrot:
    """An engine that says "a", "b", "c"… with a rest after each, as many as are asked for."""

    name = "parrot"
    models = [Served("first", "训练时的设定", "output_hf/first"), Served("second", None)]
    max_model_len = 100

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.sampling: list[Sampling] = []
        self.at_work = self.ended = 0
        self.rest_sec = 0.0
        self.broken: str | None = None
        self.text = ""  # In place of the letters.
        self.frame: ThoughtFrame | None = None

    async def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        self.asked.append(messages)
        return [*range(sum(len(message["content"]) for message in messages))]

    async def generate(self, input_ids: list[int], sampling: Sampling, model: str) -> AsyncIterator[Delta]:
        self.sampling.append(sampling)
        self.at_work += 1
        try:
            for number in range(sampling.max_tokens):
                await asyncio.sleep(self.rest_sec)
                for index in range(sampling.n):
                    last = number == sampling.max_tokens - 1
                    yield Delta(index, self.text or chr(97 + number % 26), 1, "length" if last else None)
            self.ended += 1
        finally:
            self.at_work -= 1

    def folder(self) -> ThoughtFolder | None:
        return ThoughtFolder(self.frame) if self.frame else None

    def problem(self) -> str | None:
        return self.broken


@contextmanager
def serving(limits: Limits) -> Iterator[tuple[Parrot, int]]:
    """The routes on a real server in a thread; yields the engine and the port."""
    engine, app = Parrot(), FastAPI()
    add_error_handlers(app)
    app.include_router(own_routes(engine))
    with on_port(Guard(app, limits)) as port:
        yield engine, port


@contextmanager
def on_port(app: Any) -> Iterator[int]:
    """An ASGI app on a real server in a thread; yields the port."""

    class Noted(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            app.loop = asyncio.get_running_loop()
            await super().startup(sockets)

    server = Noted(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    listening = socket.create_server(("127.0.0.1", 0))
    worker = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    worker.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        worker.join()


@pytest.fixture(scope="module")
def parrot_server() -> Iterator[tuple[Parrot, int]]:
    with serving(Limits(max_body_bytes=10_000, max_requests=3)) as served:
        yield served


@pytest.fixture
def parrot(parrot_server: tuple[Parrot, int]) -> tuple[Parrot, int]:
    """One server for many tests, each of which finds it as at its start."""
    parrot_server[0].__init__()
    return parrot_server


def post(port: int, body: Any, path: str = ROUTE, **headers: str) -> tuple[int, Any]:
    """Status and JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, raw, JSON | headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def until(condition: Any, seconds: float = 10) -> bool:
    """Waits for what happens soon."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def test_thoughts_are_told_from_answers(parrot: tuple[Parrot, int]) -> None:
    """Of each answer; those of a model that does not think are all text."""
    engine, port = parrot
    body = {"message": "你好", "max_tokens": 7, "n": 2}
    assert post(port, body)[1]["text"] == ["abcdefg"] * 2 and "thought" not in post(port, body)[1]
    engine.frame = ThoughtFrame("<think>", "d", "", opened=True)
    assert post(port, body)[1] == {
        "text": ["efg", "efg"], "thought": ["abc", "abc"], "finish_reason": ["length", "length"],
        "usage": {"prompt_tokens": 8, "completion_tokens": 14, "total_tokens": 22},
    }  # fmt: skip


def test_whole_and_streamed_answers(parrot: tuple[Parrot, int]) -> None:
    engine, port = parrot
    status, answer = post(port, {"message": "你是谁", "n": 2, "max_tokens": 3})
    assert status == 200
    assert answer["text"] == ["abc", "abc"] and answer["finish_reason"] == ["length", "length"]
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", ROUTE, json.dumps({"message": "你是谁", "stream": True, "max_tokens": 2}), JSON)
    reply = connection.getresponse()
    assert reply.getheader("content-type").startswith("text/event-stream")
    lines = reply.read().decode().split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:2]]
    assert events == [
        {"index": 0, "text": "a", "finish_reason": None},
        {"index": 0, "text": "b", "finish_reason": "length"},
    ]
    assert lines[2:] == ["data: [DONE]", ""]
    system = {"role": "system", "content": "训练时的设定"}
    assert engine.asked == [[system, {"role": "user", "content": "你是谁"}]] * 2


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ({"message": "问"}, [("system", "S"), ("user", "问")]),
        ({"message": "问", "system": ""}, [("user", "问")]),
        ({"message": "问", "system": "T"}, [("system", "T"), ("user", "问")]),
        (
            {"message": "问", "history": [["一", "二"], ["三", "四"]], "system": ""},
            [("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四"), ("user", "问")],
        ),
        (
            {"message": "问", "history": [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]},
            [("system", "S"), ("user", "一"), ("assistant", "二"), ("user", "问")],
        ),
        (
            {"title": "标题", "desc": "简介", "parent": "前排"},
            [("system", "S"), ("user", comment_prompt("标题", "简介", "前排"))],
        ),
    ],
)
def test_conversations(question: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found = to_conversation(Question(**question), "S")
    assert [(message["role"], message["content"]) for message in found] == expected


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({}, "message"),
        ({"message": " "}, "message"),
        ({"message": "a", "title": "b"}, "one of them"),
        ({"message": "a", "history": ["b"]}, r"history\[0\]"),
        ({"message": "a", "history": [["b", "c"], ["d"]]}, r"history\[1\]"),
        ({"message": "a", "history": [{"role": "system", "content": "b"}]}, r"history\[0\]"),
    ],
)
def test_questions_that_ask_nothing(question: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said) as refusal:
        to_conversation(Question(**question), None)
    assert refusal.value.status == 400


def test_lengths() -> None:
    engine = Parrot()
    assert check_lengths(engine, [0] * 60, Sampling(), clamp=False).max_tokens == 40
    assert check_lengths(engine, [0] * 60, Sampling(max_tokens=8192), clamp=True).max_tokens == 40
    assert check_lengths(engine, [0] * 60, Sampling(max_tokens=7), clamp=False).max_tokens == 7
    with pytest.raises(Refused, match="at most 40"):
        check_lengths(engine, [0] * 60, Sampling(max_tokens=41), clamp=False)
    with pytest.raises(Refused, match="100 tokens; with an answer 100"):
        check_lengths(engine, [0] * 100, Sampling(), clamp=True)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"null",
        b'"text"',
        b"\xff\xfe\x00",
        b'{"message": 5}',
        b'{"message": "a", "temperature": NaN}',
        b'{"message": "a", "temperature": Infinity}',
        b'{"message": "a", "temperature": -1}',
        b'{"message": "a", "temperature": "hot"}',
        b'{"message": "a", "top_p": 0}',
        b'{"message": "a", "n": 0}',
        b'{"message": "a", "n": 1000000}',
        b'{"message": "a", "max_tokens": -5}',
        b'{"message": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"message": "a", "max_tokens": 1e400}',
        b'{"message": "a", "seed": -1}',
        b'{"message": "a", "repetition_penalty": 1e-38}',
        b'{"message": "a", "stop": "' + b"x" * 5000 + b'"}',
        b'{"message": "a", "stop": [' + b'"x",' * 20 + b'"x"]}',
        b'{"message": "a", "parent": "b"}',
        b'{"message": "a", "stop_token_ids": "x"}',
        b'{"message": "a", "history": {"a": 1}}',
        b"[" * 4000,
        b'{"message": "a", "model": "third"}',
        b'{"message": "' + b"a" * 200 + b'"}',
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
def test_bad_requests_are_told_why(parrot: tuple[Parrot, int], body: bytes) -> None:
    status, answer = post(parrot[1], body)
    assert 400 <= status < 500 and len(answer["error"]["message"]) > 10
    assert post(parrot[1], {"message": "a", "max_tokens": 1})[0] == 200


def test_other_kinds_of_requests(parrot: tuple[Parrot, int]) -> None:
    """A form, as a page in somebody's browser could send it unasked; routes that are not there."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for path, headers, status in ((ROUTE, form, 415), ("/nowhere", JSON, 404), ("/health", JSON, 405)):
        found, answer = post(parrot[1], {"message": "a"}, path, **headers)
        assert found == status and answer["error"]["message"]
    assert not parrot[0].asked


def test_unknown_fields_and_the_most_there_is(parrot: tuple[Parrot, int]) -> None:
    """The fields of the seed's own request, and some that nobody knows."""
    body = {
        "message": "你是谁",
        "history": [],
        "n": 1,
        "temperature": 0.3,
        "max_tokens": 8192,
        "stream": False,
        "stop_token_ids": [151643],
        "frequency_penalty": 1.2,
        "who_knows": {"a": [1, None]},
    }
    status, _ = post(parrot[1], body)
    assert status == 200
    (sampling,) = parrot[0].sampling
    assert (sampling.max_tokens, sampling.stop_token_ids, sampling.frequency_penalty) == (91, [151643], 1.2)


# ---------------------------------------------------------------------------------------------------------------------
# Limits


def test_keys() -> None:
    with serving(Limits(key="geheim-密")) as (_, port):
        question = {"message": "a", "max_tokens": 1}
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "geheim"}):
            status, answer = post(port, question, **header)
            assert status == 401 and "geheim" not in json.dumps(answer)
        right = "bearer  geheim-密".encode().decode("latin-1")
        assert post(port, question, Authorization=right)[0] == 200
        # Health is told without a key, and what the models were trained with is not.
        for headers, told in (({}, False), ({"Authorization": right}, True)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/health", headers=headers)
            answer = connection.getresponse()
            assert answer.status == 200 and ("models" in json.loads(answer.read())) == told


@pytest.mark.parametrize("announced", [True, False], ids=["Content-Length", "chunked"])
@pytest.mark.parametrize("key", [None, "k"], ids=["no key", "key"])
def test_large_bodies(announced: bool, key: str | None) -> None:
    """10 MB of clients that look for an answer only when all is sent; what is read is not kept."""
    part = b'{"message": "' + b"a" * 100_000
    with serving(Limits(key=key, max_body_bytes=10_000)) as (engine, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        if announced:
            connection.request("POST", ROUTE, part * 100, JSON)
        else:
            connection.request("POST", ROUTE, iter([part] * 100), JSON, encode_chunked=True)
        answer = connection.getresponse()
        said = json.loads(answer.read())["error"]["message"]
        assert answer.status == (401 if key else 413) and ("key" if key else "10,000 bytes") in said
        assert not engine.asked


@pytest.mark.parametrize("key", [None, "k"], ids=["bodies that do not come", "no key"])
def test_those_who_are_not_at_work_do_not_count(key: str | None) -> None:
    """Twenty where two may be at work; who asks in earnest is answered at once."""
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    with serving(Limits(key=key, max_requests=2)) as (_, port):
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for stranger in strangers:
            stranger.sendall(head.encode() + b'{"mess')
        started = time.monotonic()
        for _ in range(5):
            assert post(port, {"message": "a", "max_tokens": 1}, Authorization="Bearer k")[0] == 200
        assert time.monotonic() - started < 3
        for stranger in strangers:
            stranger.close()


def test_bodies_that_come_all_at_once_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded, whoever sends."""
    monkeypatch.setattr("utils.serve.limits.LAST_WORD_SEC", 0.2)
    with serving(Limits(max_requests=2, max_body_bytes=10_000)) as (_, port):
        head = f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
        senders = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(3)]
        for sender in senders[:2]:
            sender.sendall(head.encode() + b" " * 9998)
        time.sleep(0.3)
        senders[2].sendall(head.encode() + b" " * 9000)
        assert senders[2].recv(1000).startswith(b"HTTP/1.1 429")
        senders[0].sendall(b" ")
        assert senders[0].recv(1000).startswith(b"HTTP/1.1 4"), "no JSON"


HOSTS = frozenset(("localhost", "127.0.0.1", "::1", "my-machine"))


@pytest.mark.parametrize(
    ("headers", "answered"),
    [
        ({"Host": "localhost"}, True),
        ({"Host": "LocalHost:8080"}, True),
        ({"Host": "127.0.0.1:1"}, True),
        ({"Host": "[::1]:8080"}, True),
        ({"Host": "my-machine:80", "Origin": "http://localhost:3000"}, True),
        ({"Host": "127.0.0.1", "Origin": "https://my-machine"}, True),
        ({"Host": "evil.example.com"}, False),
        ({"Host": "127.0.0.1.evil.example.com:8080"}, False),
        ({"Host": "evil.example.com@127.0.0.1@x"}, False),
        ({"Host": "localhost.evil"}, False),
        ({"Host": "[::1"}, False),
        ({"Host": ""}, False),
        ({"Host": "127.0.0.1", "Origin": "http://evil.example.com"}, False),
        ({"Host": "127.0.0.1", "Origin": "http://127.0.0.1.evil"}, False),
        ({"Host": "127.0.0.1", "Origin": "null"}, False),
        ({"Host": "127.0.0.1", "Origin": "file://"}, False),
    ],
    ids=str,
)
def test_pages_of_others(headers: dict[str, str], answered: bool) -> None:
    """A name of somebody's that leads here, and pages that are open in a browser. /health tells system prompts."""
    with serving(Limits(hosts=HOSTS)) as (engine, port):
        assert post(port, {"message": "a", "max_tokens": 1}, **headers)[0] == (200 if answered else 403)
        assert bool(engine.asked) == answered
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/health", headers=headers)
        answer = connection.getresponse()
        assert answer.status == (200 if answered else 403) and (b"models" in answer.read()) == answered
    with serving(Limits(key="k")) as (_, port):
        right = headers | {"Authorization": "Bearer k"}
        if headers["Host"]:
            assert post(port, {"message": "a", "max_tokens": 1}, **right)[0] == 200, "who has the key may"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("text/plain; a=json", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("json", 415),
        ("", 415),
    ],
)
def test_kinds_that_any_page_can_send_are_refused(parrot: tuple[Parrot, int], kind: str, status: int) -> None:
    assert post(parrot[1], {"message": "a", "max_tokens": 1}, **{"Content-Type": kind})[0] == status


def test_a_body_that_does_not_arrive() -> None:
    with serving(Limits(body_timeout_sec=0.2)) as (_, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.putrequest("POST", ROUTE)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b'{"mess')
        assert connection.getresponse().status == 408


@pytest.mark.slow
def test_no_more_than_can_be_answered(parrot: tuple[Parrot, int]) -> None:
    """With three at work the fourth is told to come again, and can when one has ended."""
    engine, port = parrot
    engine.rest_sec = 0.2
    found = []
    ask = lambda: found.append(post(port, {"message": "a", "max_tokens": 20})[0])  # noqa: E731
    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    assert until(lambda: engine.at_work == 3)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", ROUTE, json.dumps({"message": "a"}), JSON)
    refusal = connection.getresponse()
    assert refusal.status == 429 and refusal.getheader("Retry-After") == "1"
    for thread in asking:
        thread.join()
    assert found == [200] * 3
    assert post(port, {"message": "a", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_take_too_long(stream: bool) -> None:
    with serving(Limits(timeout_sec=0.5)) as (engine, port):
        engine.rest_sec = 0.1
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", ROUTE, json.dumps({"message": "a", "stream": stream, "max_tokens": 50}), JSON)
        answer = connection.getresponse()
        body = answer.read().decode()
        assert answer.status == (200 if stream else 504)
        assert "within 0.5 seconds" in body.strip().split("\n\n")[-1]
        assert until(lambda: engine.at_work == 0) and engine.ended == 0


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_is_not_answered_further(parrot: tuple[Parrot, int], stream: bool) -> None:
    """Also while a whole answer is waited for, when nothing has been sent yet."""
    engine, port = parrot
    engine.rest_sec = 0.05
    for _ in range(5):  # More often than there are places.
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", ROUTE, json.dumps({"message": "a", "stream": stream, "max_tokens": 90}), JSON)
        assert until(lambda: engine.at_work == 1)
        if stream:
            connection.getresponse().read(5)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        assert until(lambda: engine.at_work == 0)
    assert engine.ended == 0


def test_who_does_not_read_loses_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes nothing off its connection: in the end its time is up, and nobody waits for it."""
    monkeypatch.setattr("utils.serve.limits.LAST_WORD_SEC", 0.2)
    monkeypatch.setattr(Parrot, "max_model_len", 100_000)
    with serving(Limits(timeout_sec=1, max_requests=1)) as (engine, port):
        silent = socket.create_connection(("127.0.0.1", port))
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        engine.text = "a" * 100_000
        body = json.dumps({"message": "a", "stream": True, "max_tokens": 90_000}).encode()
        head = f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        silent.sendall(f"{head}\r\n\r\n".encode() + body)
        assert until(lambda: engine.at_work == 1)
        assert post(port, {"message": "a"})[0] == 429
        engine.text = ""
        assert until(lambda: post(port, {"message": "a", "max_tokens": 1})[0] == 200)
        silent.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_of_the_server_is_told(stream: bool) -> None:
    engine, app = Parrot(), FastAPI()
    engine.rest_sec = 0.1
    add_error_handlers(app)
    app.include_router(own_routes(engine))
    guard = Guard(app, Limits())
    with on_port(guard) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", ROUTE, json.dumps({"message": "a", "stream": stream, "max_tokens": 90}), JSON)
        assert until(lambda: engine.at_work == 1)
        guard.loop.call_soon_threadsafe(guard.end)
        answer = connection.getresponse()
        said = answer.read().decode()
        assert answer.status == (200 if stream else 503) and "The server ends" in said.strip().split("\n\n")[-1]
        assert until(lambda: engine.at_work == 0)


def test_health(parrot: tuple[Parrot, int]) -> None:
    engine, port = parrot

    def health() -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    status, body = health()
    models = [{"name": "first", "system_prompt": "训练时的设定"}, {"name": "second", "system_prompt": None}]
    assert (status, body["status"], body["engine"], body["models"]) == (200, "ok", "parrot", models)
    engine.broken = "no card"
    assert health() == (503, {"error": {"message": "no card", "type": "server_error", "param": None, "code": 503}})


def test_numbers_that_are_none() -> None:
    with pytest.raises(ValueError):
        Sampling(temperature=math.nan)


@pytest.mark.parametrize(
    ("name", "found"), [(None, "first"), ("first", "first"), ("output_hf/first", "first"), ("second", "second")]
)
def test_a_model_is_found_by_its_name_and_its_path(name: str | None, found: str) -> None:
    """The path is what clients of vLLM's own server call a model by default."""
    assert find_model(Parrot(), name).name == found
    for other in ("", "third", "output_hf"):
        with pytest.raises(Refused, match="this server has first, second"):
            find_model(Parrot(), other)
