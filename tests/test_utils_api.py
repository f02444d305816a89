"""utils/api.py: an API gets the key that it was given, and nobody else's.

python -m pytest tests/test_utils_api.py
"""

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from conftest import LocalServer

from utils.api import is_local, make_client


class Models(BaseHTTPRequestHandler):
    """Lists one model, and keeps what it was sent."""

    came: list[dict[str, str]] = []

    def do_GET(self) -> None:
        self.came.append({name.lower(): value for name, value in self.headers.items()})
        body = json.dumps({"object": "list", "data": [{"id": "small", "object": "model"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    Models.came.clear()
    server = LocalServer(Models)
    yield f"{server.url}/v1"
    server.shutdown()
    server.server_close()


def test_nothing_but_the_key_is_sent(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an account of the environment's, nor through its proxy, which leads nowhere from here."""
    monkeypatch.setenv("OPENAI_ORG_ID", "somebody")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "theirs")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer another")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)

    async def names() -> list[str]:
        async with make_client(server, "the key", max_retries=0, timeout=10) as client:
            return [model.id async for model in client.models.list()]

    assert asyncio.run(names()) == ["small"]
    (headers,) = Models.came
    assert headers["authorization"] == "Bearer the key"
    assert not {"openai-organization", "openai-project"} & {*headers}
    assert not any("another" in value or "somebody" in value for value in headers.values())


@pytest.mark.parametrize(
    ("url", "expected"),
    [("http://localhost:8000/v1", True), ("http://127.0.0.1/v1", True), ("http://[::1]:1/v1", True),
     ("https://localhost.example.com/v1", False), ("https://api.example.com/v1", False)],
)  # fmt: skip
def test_this_machine(url: str, expected: bool) -> None:
    assert is_local(url) == expected
