"""web_demo.py: what models are asked is what they were trained on, what comes back is shown as it is, runs are drawn,
data can be looked through.

Most tests run the page without a browser; the slow ones go a person's way through it in a headless Chromium.

python -m pytest tests/test_web_demo.py
"""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from random import Random
from string import Formatter
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, LocalServer, load_script, write_rows

from utils.data.chat import Dialogue, make_chat
from utils.data.records import SYSTEM_PROMPT, comment_prompt, to_messages
from utils.train.tracking import Tracker

script = load_script("web_demo.py")
SCRIPT = str(ROOT / "web_demo.py")
ZH, EN = script.TEXTS["zh"], script.TEXTS["en"]
KEY = "sk-secret-of-the-test"
# What would not come out as it is, if it went through Markdown, LaTeX or HTML.
WILD = "<img src=x onerror=document.title='oh'> $x$ **a** `b` :smile: [c](d)\n# e\n![](http://127.0.0.1:9/f.png) <b>"


class Api(LocalServer):
    """Speaks as much of the OpenAI API as the page asks for.

    Attributes:
        models: Name -> system prompt, as this project's server tells in /health; with `health` off it tells nothing.
        reply: (request) -> the texts of the choices; more than `most` are not written, as some servers do.
        piece_sec: Between two pieces of text.
        fault: What goes wrong instead: an HTTP status, "event" (an error amid the stream), "garbage" or "cut".
        longest: Conversation, in messages.
        requests: The bodies of all requests for text. `headers` are theirs, `paths` those of all requests.
        left: How many streams the client closed before they ended.
    """

    def __init__(self, **changes: Any) -> None:
        self.models: dict[str, str | None] = {"small": None, "tuned": "调过的设定"}
        self.reply: Callable[[dict[str, Any]], list[str]] = echo
        self.health, self.most, self.piece_sec, self.fault, self.longest = True, 8, 0.0, "", 1000
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.left = 0
        for name, value in changes.items():
            setattr(self, name, value)
        super().__init__(Answering)


def echo(request: dict[str, Any]) -> list[str]:
    last = request["messages"][-1]["content"].splitlines()[-1]
    return [f"{request['model']}的第{number}条：{last}" for number in range(request.get("n", 1))]


class Answering(BaseHTTPRequestHandler):
    server: Api

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.path == "/v1/models":
            self.send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]})
        elif self.path == "/health" and self.server.health:
            told = [{"name": name, "system_prompt": text} for name, text in self.server.models.items()]
            # As this project's server: what models were trained with is told to those who know the key.
            known = {"models": told} if self.headers["Authorization"] in ("Bearer none", f"Bearer {KEY}") else {}
            self.send(200, {"status": "ok", "engine": "test"} | known)
        else:
            self.send(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.paths.append(self.path)
        server.requests.append(body)
        server.headers.append({name.lower(): value for name, value in self.headers.items()})
        if len(body["messages"]) > server.longest:
            self.send(400, {"error": {"message": "The prompt has 5,000 tokens; with an answer 4,096 is the most."}})
            return
        if isinstance(server.fault, int):
            self.send(server.fault, {"error": {"message": f"wrong **key** {KEY}", "code": "no"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.stream(body, server.reply(body)[: server.most])
        except (BrokenPipeError, ConnectionResetError):
            server.left += 1

    def stream(self, body: dict[str, Any], texts: list[str]) -> None:
        for start in range(0, max(map(len, texts)), 4):
            for number, text in enumerate(texts):
                if text[start:]:
                    self.event(body, number, {"content": text[start : start + 4]})
            time.sleep(self.server.piece_sec)
            if self.server.fault == "event":
                self.wfile.write(b'event: error\ndata: {"error": {"message": "out of memory"}}\n\n')
                return
            if self.server.fault == "garbage":
                self.wfile.write(b"data: {nothing\n\n")
            if self.server.fault == "cut":
                return
        for number, text in enumerate(texts):
            self.event(body, number, {}, "length" if text.endswith("长") else "stop")
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, body: dict[str, Any], number: int, delta: dict[str, str], end: str | None = None) -> None:
        choice = {"index": number, "delta": delta, "finish_reason": end}
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        self.wfile.write(f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n".encode())


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api()
    yield server
    server.shutdown()


@pytest.fixture
def open_page(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Opens a page as a visitor of its own; returns Streamlit's stand-in for a browser."""
    import streamlit as st
    from streamlit.logger import set_log_level
    from streamlit.testing.v1 import AppTest
    from streamlit.util import calc_hash

    set_log_level("error")  # It would warn that this is no browser.
    st.cache_resource.clear()

    def build(
        name: str,
        *arguments: str,
        locale: str = "zh-CN",
        query: str = "",
        evaluation: str = "",
        state: dict[str, Any] | None = None,
    ) -> Any:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        page = AppTest.from_file(SCRIPT, default_timeout=120)
        page.context = {"locale": locale}
        asked = {"lang": query, "eval": evaluation}
        page.query_params.update({key: value for key, value in asked.items() if value})
        for key, value in (state or {}).items():
            page.session_state[key] = value
        page.run()
        if name != "comments":
            page._page_hash = calc_hash(name)  # Pages that are functions cannot be named otherwise.
            page.run()
        assert not page.exception
        return page

    return build


def texts(page: Any) -> list[str]:
    return [element.value for element in page.text]


def press(page: Any, label: str) -> None:
    (button,) = [button for button in page.button if button.label == label]
    button.click().run()
    assert not page.exception


def labels(page: Any) -> list[str]:
    return [button.label for button in page.button]


def write(page: Any, title: str = "标题", desc: str = "", parent: str = "", count: int = 3, **settings: Any) -> None:
    """Fills in the form and presses the button."""
    for key, value in {"title": title, "desc": desc, "parent": parent, "count": count, **settings}.items():
        page.get_by_key(key).set_value(value)
    press(page, ZH["write"])


class Elsewhere(BaseHTTPRequestHandler):
    """Another host; it writes down what comes."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.came.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET


class Redirecting(Answering):
    """An API whose /health, or every page, is elsewhere."""

    def do_GET(self) -> None:
        if self.path == "/health" or self.server.all_of_it:
            self.redirect()
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.redirect()

    def redirect(self) -> None:
        self.send_response(self.server.status)
        self.send_header("Location", self.server.elsewhere + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("all_of_it", [False, True])
def test_the_key_stays_with_its_host(status: int, all_of_it: bool) -> None:
    """Wherever /health, the models or a request for text are redirected to."""
    elsewhere = LocalServer(Elsewhere)
    elsewhere.came = []
    api = Api(status=status, elsewhere=elsewhere.url.replace("127.0.0.1", "localhost"), all_of_it=all_of_it)
    api.RequestHandlerClass = Redirecting
    try:
        with suppress(Exception):  # What comes of it is no answer of an API.
            assert script.offered(api.url + "/v1", KEY) == dict.fromkeys(api.models, script.SYSTEM_PROMPT)

        async def write() -> None:
            async with script.make_client(api.url + "/v1", KEY, max_retries=0) as client:
                await client.chat.completions.create(model="small", messages=[{"role": "user", "content": "问"}])

        with suppress(Exception):
            asyncio.run(write())
    finally:
        api.shutdown()
        elsewhere.shutdown()
    assert elsewhere.came, "the openai client follows"
    assert not [came for came in elsewhere.came if KEY in str(came)]
    assert not [path for path, _ in elsewhere.came if path == "/health"]


# ---------------------------------------------------------------------------------------------------------------------
# Texts and arguments


def test_both_languages_have_the_same_texts() -> None:
    assert ZH.keys() == EN.keys()
    for key in ZH:
        fields = [{field for _, field, *_ in Formatter().parse(texts[key]) if field} for texts in (ZH, EN)]
        assert ZH[key] and EN[key] and fields[0] == fields[1], key
    code = Path(SCRIPT).read_text(encoding="utf-8").partition("# Arguments")[2]
    assert [key for key in ZH if f'"{key}"' not in code] == [], "texts that nothing shows"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--api http://a --model b", "--model, --adapter and --base cannot be given too"),
        ("--adapter a", "belong to a --model"),
        ("--model a --adapter b --base c", "is the base already"),
        ("--api 127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("--api http://", "expected an address"),
        ("--api http://[", "expected an address"),
        ("--api http://a:b", "expected an address"),
        ("--api_key_env A", "belongs to an --api"),
        ("--api http://a --api_key_env THIS_IS_NOT_SET", "export THIS_IS_NOT_SET=..."),
        ("--modle a", "unrecognized arguments: --modle a"),
        ("--model", "expected one argument"),
    ],
)
def test_wrong_arguments(
    arguments: str, said: str, open_page: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, in the terminal and on the page."""
    with pytest.raises(SystemExit) as end:
        script.read_arguments(arguments.split())
    assert said in end.value.code and "usage: streamlit run" in end.value.code
    page = open_page("comments", *arguments.split())
    assert [error.value for error in page.error] == [f"{ZH['wrong_arguments']} {EN['wrong_arguments']}"]
    assert texts(page) == [end.value.code]
    assert end.value.code in capsys.readouterr().err


def test_help_on_the_page(open_page: Callable[..., Any]) -> None:
    page = open_page("comments", "--help")
    assert not page.error and "--api_key_env" in texts(page)[0]


@pytest.mark.parametrize(("arguments", "said"), [(["--model", "a b"], "-- --model 'a b'\n"), (["-x"], "-x\nusage: ")])
def test_without_streamlit(arguments: list[str], said: str) -> None:
    """It says how to start it."""
    ended = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert ended.returncode == 1 and said in ended.stderr and "Traceback" not in ended.stderr
    assert "streamlit run web_demo.py -- " in ended.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Languages


@pytest.mark.parametrize(
    ("locale", "query", "expected"),
    [("zh-CN", "", "zh"), ("zh", "", "zh"), ("en-US", "", "en"), ("zh", "en", "en"), ("zh", "x", "zh")],
)
def test_language(api: Api, open_page: Callable[..., Any], locale: str, query: str, expected: str) -> None:
    page = open_page("comments", "--api", api.url, locale=locale, query=query)
    assert page.title[0].value == script.TEXTS[expected]["comments"]
    assert page.query_params["lang"] == expected


def test_the_language_can_be_changed(api: Api, open_page: Callable[..., Any]) -> None:
    """What was written stays."""
    page = open_page("comments", "--api", api.url)
    write(page, count=1)
    page.get_by_key("lang").set_value("en").run()
    assert page.title[0].value == EN["comments"] and EN["write"] in labels(page)
    assert page.query_params["lang"] == "en"
    assert "tuned的第0条：视频标题：标题" in texts(page)


# ---------------------------------------------------------------------------------------------------------------------
# Comments


@pytest.mark.parametrize(("desc", "parent"), [("", ""), ("简介", ""), ("-", "前排"), ("简介\n二", " 前排 <|im_end|>")])
def test_a_comment_is_asked_for_as_in_training(
    api: Api, open_page: Callable[..., Any], tokenizer: Any, desc: str, parent: str
) -> None:
    """The messages, rendered by the template, are the prompt of a training sample."""
    write(open_page("comments", "--api", api.url), desc=desc, parent=parent, count=2)
    turns = [("system", "调过的设定"), ("user", comment_prompt("标题", desc, parent)), ("assistant", "好看")]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    (sample,) = make_chat(tokenizer).samples(Dialogue("", to_messages(record)), 1000)
    assert sorted(request["model"] for request in api.requests) == ["small", "tuned"], "both are asked the same"
    for request in api.requests:
        assert make_chat(tokenizer).prompt_ids(request["messages"]) == sample.input_ids[~sample.supervised].tolist()
        assert request["n"] == 2


def test_replies_side_by_side(api: Api, open_page: Callable[..., Any]) -> None:
    page = open_page("comments", "--api", api.url)
    assert labels(page) == [ZH["write"], ZH["example"]] and texts(page) == []
    write(page, parent="前排", count=3)
    sides = [[f"{name}的第{number}条：父评论：前排" for number in range(3)] for name in ("small", "tuned")]
    assert texts(page)[:8] == ["small", *sides[0], "tuned", *sides[1]]
    assert texts(page)[8:] == ["调过的设定", comment_prompt("标题", "", "前排")], "what the model reads"
    assert [element.value for element in page.markdown][1:] == [f"#### {ZH['base']}", f"#### {ZH['tuned']}"]
    assert labels(page) == [ZH["write"], ZH["example"]], "no stop button is left"


def test_example(api: Api, open_page: Callable[..., Any]) -> None:
    page = open_page("comments", "--api", api.url)
    press(page, ZH["example"])
    press(page, ZH["write"])
    assert api.requests[0]["messages"][-1]["content"] == comment_prompt(*script.EXAMPLE.values())


def test_without_a_title_nothing_is_asked(api: Api, open_page: Callable[..., Any]) -> None:
    page = open_page("comments", "--api", api.url)
    write(page, title=" ")
    assert [warning.value for warning in page.warning] == [ZH["no_title"]] and not api.requests


def test_neutral_settings_are_left_out(api: Api, open_page: Callable[..., Any]) -> None:
    """Not every server knows them."""
    write(open_page("comments", "--api", api.url), count=1)
    assert api.requests[0].keys() == {"model", "messages", "stream", "temperature", "top_p", "max_tokens"}
    assert api.requests[0]["temperature"] == 0.8 and api.requests[0]["top_p"] == 0.95
    assert api.requests[0]["max_tokens"] == 256


def test_settings(api: Api, open_page: Callable[..., Any]) -> None:
    settings = {"temperature": 1.5, "top_p": 0.5, "top_k": 7, "penalty": 1.2, "max_tokens": 9, "seed": 0}
    write(open_page("comments", "--api", api.url), count=2, **settings)
    expected = {"repetition_penalty" if name == "penalty" else name: value for name, value in settings.items()}
    for request in api.requests:
        assert {name: request[name] for name in request.keys() - {"model", "messages", "stream"}} == expected | {"n": 2}


def test_greedily_one_reply_is_written(api: Api, open_page: Callable[..., Any]) -> None:
    """Others would be the same, and vLLM refuses to write them."""
    page = open_page("comments", "--api", api.url)
    write(page, count=4, temperature=0.0)
    assert all("n" not in request and request["temperature"] == 0 for request in api.requests)
    assert ZH["greedy_one"] in [caption.value for caption in page.caption]
    assert texts(page)[:4] == ["small", "small的第0条：视频标题：标题", "tuned", "tuned的第0条：视频标题：标题"]


def test_servers_that_do_not_know_n(api: Api, open_page: Callable[..., Any]) -> None:
    """They write one reply, so they are asked again, each time with another seed."""
    api.models, api.most = {"only": "设定"}, 1
    api.reply = lambda request: [f"种子{request['seed']}"]
    page = open_page("comments", "--api", api.url)
    write(page, count=3, seed=5)
    assert texts(page)[:4] == ["only", "种子5", "种子6", "种子7"]


@pytest.mark.parametrize(
    ("health", "told", "expected"),
    [(True, "设定", "设定"), (True, "", ""), (True, None, SYSTEM_PROMPT), (False, None, SYSTEM_PROMPT)],
    ids=["trained here", "without one", "not trained here", "another server"],
)
def test_system_prompt_of_comments(
    api: Api, open_page: Callable[..., Any], health: bool, told: str | None, expected: str
) -> None:
    api.health, api.models = health, {"only": told}
    page = open_page("comments", "--api", api.url)
    assert page.get_by_key("comment system of only").value == expected
    write(page, count=1)
    system = [{"role": "system", "content": expected}] if expected else []
    assert api.requests[0]["messages"] == [*system, {"role": "user", "content": comment_prompt("标题")}]


def test_another_system_prompt(api: Api, open_page: Callable[..., Any]) -> None:
    page = open_page("comments", "--api", api.url)
    for text in ("别的", " "):
        page.get_by_key("comment system of tuned").set_value(text)
        write(page, count=1)
    assert [[message["role"] for message in request["messages"]] for request in api.requests[1:3]] == [
        ["system", "user"],
        ["user"],
    ]


def test_odd_replies(api: Api, open_page: Callable[..., Any]) -> None:
    """Nothing, too long ones, an emoji in two halves, and what is no HTML."""
    api.models = {"only": None}
    api.reply = lambda request: ["", "长长长长长", "哈哈哈\ud83d\ude02\n 好", WILD]
    page = open_page("comments", "--api", api.url)
    write(page, count=4)
    assert texts(page)[1:5] == ["", "长长长长长", "哈哈哈😂\n 好", WILD]
    assert [caption.value for caption in page.caption] == [ZH["empty"], ZH["cut"]]


def test_models_are_chosen(api: Api, open_page: Callable[..., Any]) -> None:
    """Of any number; without a base there is one column."""
    api.models = {"a": None, "b": None, "c": "设定"}
    page = open_page("comments", "--api", api.url)
    assert (page.get_by_key("tuned_model").value, page.get_by_key("base_model").value) == ("c", "a")
    page.get_by_key("tuned_model").set_value("b")
    page.get_by_key("base_model").set_value("").run()
    write(page, count=1)
    assert [request["model"] for request in api.requests] == ["b"]
    assert [element.value for element in page.markdown][1:] == [f"#### {ZH['tuned']}"]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_addresses(api: Api, open_page: Callable[..., Any], ending: str) -> None:
    write(open_page("comments", "--api", api.url + ending), count=1)
    assert Counter(api.paths) == {"/v1/models": 1, "/health": 1, "/v1/chat/completions": 2}


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize(
    ("fault", "text", "values", "said"),
    [
        (401, "error_key", {"status": 401}, None),
        (403, "error_key", {"status": 403}, None),
        (404, "error_missing", {}, "wrong **key** ***"),
        (429, "error_busy", {}, "wrong **key** ***"),
        (503, "error_loading", {}, "wrong **key** ***"),
        (400, "error_request", {"status": 400}, "wrong **key** ***"),
        (422, "error_request", {"status": 422}, "wrong **key** ***"),
        (500, "error_server", {"status": 500}, "wrong **key** ***"),
        ("event", "error_broken", {}, "out of memory"),
        ("garbage", "error_broken", {}, ""),
    ],
)
def test_errors_are_sentences(
    api: Api,
    open_page: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: int | str,
    text: str,
    values: dict[str, Any],
    said: str | None,
) -> None:
    """Without the key, whatever the server says; what came before stays."""
    monkeypatch.setenv("KEY_OF_THE_TEST", KEY)
    api.models, api.fault = {"only": None}, fault
    page = open_page("comments", "--api", api.url, "--api_key_env", "KEY_OF_THE_TEST")
    write(page, count=1)
    assert api.headers[0]["authorization"] == f"Bearer {KEY}"
    assert [error.value for error in page.error] == [ZH[text].format(**values)]
    shown = texts(page)
    assert shown[1] == ("" if isinstance(fault, int) else "only")
    assert SYSTEM_PROMPT in shown if said is None else said in shown[2]
    assert KEY not in f"{page}{shown}" and KEY not in "".join(capfd.readouterr())
    api.fault = ""
    write(page, count=1)
    assert not page.error, "the next one may go well"


def test_a_cut_stream(api: Api, open_page: Callable[..., Any]) -> None:
    """A stream that ends early, as that of a server which is stopped: what came is shown."""
    api.models, api.fault = {"only": None}, "cut"
    page = open_page("comments", "--api", api.url)
    write(page, count=1)
    assert texts(page)[1] == "only" and [caption.value for caption in page.caption] == [ZH["stopped"]]


def test_no_server(open_page: Callable[..., Any], api: Api) -> None:
    """The page asks again when it is told to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = open_page("comments", "--api", f"http://127.0.0.1:{port}")
    assert [error.value for error in page.error] == [ZH["error_connection"].format(url=f"127.0.0.1:{port}")]
    assert labels(page) == [ZH["reload"]]
    press(page, ZH["reload"])
    assert page.error


def test_a_server_without_models(api: Api, open_page: Callable[..., Any]) -> None:
    api.models = {}
    page = open_page("comments", "--api", api.url)
    assert [error.value for error in page.error] == [ZH["error_no_models"]]


def test_it_stops_amid_a_request(api: Api) -> None:
    """The server is left at once, what came stays."""
    api.piece_sec = 0.05
    api.reply = lambda request: ["很" * 4000]
    model = script.Model(f"{api.url}/v1", "none", "only", None)
    answer = script.new_answer(model, 1)
    with closing(script.working([script.ask(model, [], {}, answer)])) as looks:
        while not answer["texts"][0]:
            next(looks)
    deadline = time.monotonic() + 10
    while not api.left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert api.left == 1 and len(answer["texts"][0]) < 4000 and answer["ends"] == [None]


def test_other_services_settings_go_nowhere(
    api: Api, open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what the openai client takes from the environment, nor a proxy, since the server is on this machine."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-another")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    write(open_page("comments", "--api", api.url), count=1)
    assert "another" not in str(api.headers) and KEY not in str(api.headers) and len(api.headers) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The project's own server


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Lets servers of the tests stand in for serve.py's; what they were started with."""
    calls: list[list[str]] = []
    servers = []

    def serve_in_background(arguments: list[str]) -> str:
        calls.append(arguments)
        name = Path(arguments[1]).name
        if name == "broken":
            raise SystemExit("No model at broken (expected a folder).")
        models = {name: None} | ({"tuned": "调过的设定"} if "--adapter" in arguments else {})
        servers.append(Api(models=dict(reversed(models.items()))))
        return servers[-1].url

    serve = ModuleType("serve")
    serve.serve_in_background = serve_in_background
    monkeypatch.setitem(sys.modules, "serve", serve)
    yield calls
    for server in servers:
        server.shutdown()


def test_one_server_for_all_visitors(started: list[list[str]], open_page: Callable[..., Any]) -> None:
    for _ in range(2):
        page = open_page("comments", "--model", "output_hf/Mine")
        write(page, count=1)
        assert texts(page)[:2] == ["Mine", "Mine的第0条：视频标题：标题"]
    assert started == [["--model", str(ROOT / "output_hf/Mine")]]


def test_adapter(started: list[list[str]], open_page: Callable[..., Any]) -> None:
    """One server has the base and the adapter, which comes with its system prompt."""
    page = open_page("comments", "--model", "model/a/Base", "--adapter", "out/1")
    write(page, count=1)
    assert started == [["--model", str(ROOT / "model/a/Base"), "--adapter", f"tuned={ROOT / 'out/1'}"]]
    assert [texts(page)[0], texts(page)[2]] == ["Base", "tuned"]
    assert page.get_by_key("comment system of tuned").value == "调过的设定"


def test_base(started: list[list[str]], open_page: Callable[..., Any]) -> None:
    """A second server, when it is needed."""
    page = open_page("comments", "--model", "output_hf/Mine", "--base", "model/a/Base")
    assert started == [["--model", str(ROOT / "output_hf/Mine")]]
    for _ in range(2):
        write(page, count=1)
        assert [texts(page)[0], texts(page)[2]] == ["Base", "Mine"]
    assert started[1:] == [["--model", str(ROOT / "model/a/Base")]]


def test_a_model_that_cannot_be_loaded(
    started: list[list[str]], open_page: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    page = open_page("comments", "--model", "broken")
    assert [error.value for error in page.error] == [ZH["no_server"]]
    assert texts(page) == ["No model at broken (expected a folder)."]
    assert texts(page)[0] in capsys.readouterr().err


def test_without_a_model(open_page: Callable[..., Any]) -> None:
    for name in ("comments", "chat"):
        page = open_page(name)
        assert [info.value for info in page.info] == [ZH["no_arguments"]] and "--model" in page.code[0].value


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("server", ["stand-in", "serve.py"])
def test_greedy_replies_are_generates(
    api: Api,
    open_page: Callable[..., Any],
    model_dir: Path,
    tokenizer: Any,
    request: pytest.FixtureRequest,
    kind: str,
    server: str,
) -> None:
    """The text on the page is what plain transformers makes of the rendered prompt, in fp32."""
    from transformers import AutoModelForCausalLM

    folder = model_dir / "tiny" / kind
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    def generated(request: dict[str, Any]) -> list[str]:
        inputs = tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_tensors="pt")
        end = [model.generation_config.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=end, pad_token_id=0)
        return [tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]

    if server == "stand-in":
        api.models, api.reply = {kind: None}, generated
        page = open_page("comments", "--api", api.url)
    else:
        page = open_page("comments", "--model", str(folder))
    write(page, desc="简介", parent="前排", count=2, temperature=0.0, max_tokens=24)
    content = comment_prompt("标题", "简介", "前排")
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": content}]
    (expected,) = generated({"messages": messages})
    assert expected.strip() and texts(page)[1] == expected.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Chat


def say(page: Any, text: str) -> None:
    page.chat_input[0].set_value(text).run()
    assert not page.exception


def talk(*contents: str, system: str = "调过的设定") -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def test_conversation(api: Api, open_page: Callable[..., Any]) -> None:
    """Questions without an answer are shown, and not told to the model."""
    page = open_page("chat", "--api", api.url)
    say(page, WILD)
    api.fault = 429
    say(page, "二")
    assert [error.value for error in page.error] == [ZH["error_busy"]]
    api.fault = ""
    say(page, "三")
    first = f"tuned的第0条：{WILD.splitlines()[-1]}"
    assert [request["messages"] for request in api.requests] == [
        talk(WILD),
        talk(WILD, first, "二"),
        talk(WILD, first, "三"),
    ]
    assert all(request["model"] == "tuned" and "n" not in request for request in api.requests)
    assert [text.value for text in page.main.text if text.value] == [
        WILD, first, "二", "wrong **key** ***", "三", "tuned的第0条：三"
    ]  # fmt: skip
    assert ZH["stop"] not in labels(page)
    press(page, ZH["clear"])
    assert [text.value for text in page.main.text] == []
    say(page, "四")
    assert api.requests[-1]["messages"] == talk("四")


def test_a_conversation_that_outgrows_the_model(api: Api, open_page: Callable[..., Any]) -> None:
    """Its oldest exchanges leave, which the page tells; the next question starts from there. One is never dropped."""
    page = open_page("chat", "--api", api.url)
    api.longest = 4  # With the system text and the question, one exchange.
    for text in "一二三":
        say(page, text)
    answers = {text: f"tuned的第0条：{text}" for text in "一二三四"}
    assert api.requests[-1]["messages"] == talk("二", answers["二"], "三")
    assert [caption.value for caption in page.main.caption] == [ZH["left_out"].format(count=1)]
    asked = len(api.requests)
    say(page, "四")
    assert api.requests[-1]["messages"] == talk("三", answers["三"], "四") and len(api.requests) == asked + 2
    api.longest = 1
    say(page, "五")
    assert [error.value for error in page.error] == [ZH["error_request"].format(status=400)]


def test_chat_with_the_base(api: Api, open_page: Callable[..., Any]) -> None:
    """It was not trained here, so it is told nothing."""
    page = open_page("chat", "--api", api.url)
    page.get_by_key("speaker").set_value("base").run()
    say(page, "一")
    page.get_by_key("system of small").set_value("别的").run()
    say(page, "二")
    assert [request["model"] for request in api.requests] == ["small", "small"]
    assert [request["messages"] for request in api.requests] == [
        talk("一", system=""),
        talk("一", "small的第0条：一", "二", system="别的"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture
def run_dir(root: Path) -> Path:
    return root / "deepspeed_ft/output/DS-tiny/$qwen2$"


@pytest.fixture
def tracker(run_dir: Path) -> Iterator[Callable[[int], Tracker]]:
    """Opens a run's files."""
    run_dir.mkdir(parents=True)
    opened = []

    def build(first_step: int = 0) -> Tracker:
        opened.append(Tracker(run_dir, first_step, "none", {}, {"loss": "loss"}))
        return opened[-1]

    yield build
    for tracker in opened:
        tracker.close()


def log(tracker: Tracker, steps: range) -> None:
    """What a training run writes: the loss is 3, 2, 1.5 ..., measured on held-out samples at every tenth step."""
    for step in steps:
        values = {} if step == 0 else {"train/loss": 1 + 2 / step, "train/lr": 1e-4, "train/tokens_per_sec": 100.0}
        values |= {"train/grad_norm": float("inf") if step == 3 else 0.5} if step else {}
        if step % 10 == 0:
            values |= {"eval/loss": 3 - step / 100}
            shown = {"reply": f"第{step}步", "real": "真"}
            tracker.log_samples(step, [{"id": str(n), "prompt": f"提示{n}\n{WILD}"} | shown for n in range(2)])
        tracker.log(step, values)


def charts(page: Any) -> list[list[dict[str, Any]]]:
    """What the charts draw."""
    from streamlit.dataframe_util import convert_arrow_bytes_to_pandas_df

    drawn = page.get("vega_lite_chart")
    return [convert_arrow_bytes_to_pandas_df(chart.proto.data.data).to_dict("records") for chart in drawn]


def curves(page: Any) -> dict[str, list[tuple[int, float]]]:
    """What the charts of a run draw."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in [row for chart in charts(page) for row in chart]:
        found.setdefault(row["curve"], []).append((row["step"], row["value"]))
    return found


def test_curves_and_samples(tracker: Any, open_page: Callable[..., Any]) -> None:
    run = tracker()
    log(run, range(0, 21))
    page = open_page("training")
    assert page.get_by_key("run").value == "deepspeed_ft/output/DS-tiny/$qwen2$"
    drawn = curves(page)
    assert drawn[ZH["train"]] == [(step, 1 + 2 / step) for step in range(1, 21)]
    assert drawn[ZH["eval"]] == [(0, 3), (10, 2.9), (20, 2.8)]
    assert drawn[ZH["lr"]] == [(step, 1e-4) for step in range(1, 21)]
    assert [step for step, _ in drawn[ZH["grad_norm"]]] == [1, 2, *range(4, 21)], "not the infinite one"
    assert drawn[ZH["speed"]][0] == (1, 100)
    assert texts(page) == [text for n in range(2) for text in (f"提示{n}\n{WILD}", "第20步", "真")]
    page.get_by_key("step").set_value(10).run()
    assert texts(page)[1] == "第10步"
    log(run, range(21, 31))
    page.run()
    assert texts(page)[1] == "第10步", "the chosen step stays"
    assert curves(page)[ZH["eval"]][-1] == (30, 2.7)
    page.get_by_key("step").set_value(script.NEWEST).run()
    assert texts(page)[1] == "第30步"


@pytest.mark.parametrize("number", [0, 1, 1500, 1501, 100_000])
def test_long_curves_are_thinned(number: int) -> None:
    points = [(step, 0.0) for step in range(number)]
    kept = script.downsampled(points)
    assert kept[-1:] == points[-1:] and len(kept) <= 1500 and kept == sorted(kept)
    assert number > 1500 or kept == points


def test_a_torn_line_is_left_for_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "a')
    tail = script.TailReader(path)
    assert tail.read() == [{"step": 1}]
    with path.open("ab") as file:
        file.write(b'": "\xe5\x97')
    assert tail.read() == [{"step": 1}]
    with path.open("ab") as file:
        file.write(b'\x97"}\n')
    assert tail.read() == [{"step": 1}, {"step": 2, "a": "嗗"}]


def test_only_new_lines_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1000)))
    parsed: list[bytes] = []
    monkeypatch.setattr(script.json, "loads", lambda line, loads=json.loads: parsed.append(line) or loads(line))
    tail = script.TailReader(path)
    assert len(tail.read()) == 1000 == len(parsed)
    with path.open("a") as file:
        file.write('{"step": 1000}\n')
    assert len(tail.read()) == 1001 == len(parsed)


def test_a_run_that_goes_on_from_an_earlier_step(tracker: Any, open_page: Callable[..., Any]) -> None:
    """Its files are replaced; what the earlier attempt wrote later is gone."""
    log(tracker(), range(0, 31))
    page = open_page("training")
    assert curves(page)[ZH["eval"]][-1] == (30, 2.7)
    log(tracker(first_step=12), range(13, 16))
    page.run()
    drawn = curves(page)
    assert drawn[ZH["eval"]] == [(0, 3), (10, 2.9)] and drawn[ZH["train"]][-1][0] == 15
    assert texts(page)[1] == "第10步"


def test_files_are_kept_between_looks(
    tracker: Any, open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between visitors, though Streamlit runs the script anew each time."""
    log(tracker(), range(0, 11))
    open_page("training")
    parsed: list[bytes] = []
    monkeypatch.setattr(json, "loads", lambda line, loads=json.loads: parsed.append(line) or loads(line))
    open_page("training")
    assert not [line for line in parsed if isinstance(line, bytes) and line.startswith(b'{"step"')]


def test_no_runs(root: Path, open_page: Callable[..., Any]) -> None:
    page = open_page("training", locale="en")
    assert [info.value for info in page.info] == [EN["no_runs"]]
    assert [code.value for code in page.code] == ["bash deepspeed_ft/run.sh"]


def test_runs_the_newest_first(root: Path, open_page: Callable[..., Any]) -> None:
    for age, name in enumerate(("deepspeed_ft/output/DS-a", "deepspeed_dpo/output/x/DS-b/c", "deepspeed_x/output")):
        (root / name).mkdir(parents=True)
        (root / name / "metrics.jsonl").write_text('{"step": 1}\n')
        os.utime(root / name / "metrics.jsonl", (1000 - age, 1000 - age))
    page = open_page("training")
    assert page.get_by_key("run").options == [
        "deepspeed_ft/output/DS-a", "deepspeed_dpo/output/x/DS-b/c", "deepspeed_x/output"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "text"), [("", "no_lines"), ("nonsense\n", "bad_lines"), ("[1]\n", "bad_lines"), (None, "no_metrics")]
)
def test_odd_runs(run_dir: Path, open_page: Callable[..., Any], content: str | None, text: str) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text(content or "")
    page = open_page("training")
    if content is None:
        (run_dir / "metrics.jsonl").unlink()
        page.run()
    assert [element.value for element in [*page.info, *page.warning]] == [ZH[text]]


@pytest.mark.parametrize("typed", ["~nobody-of-this-name/x", "nowhere", "/", "metrics.jsonl/x"])
def test_a_typed_path_that_is_no_run(tracker: Any, open_page: Callable[..., Any], typed: str) -> None:
    log(tracker(), range(0, 2))
    page = open_page("training", state={"run": typed})
    assert not page.exception and [warning.value for warning in page.warning] == [ZH["no_metrics"]]


def test_a_typed_path(tracker: Any, open_page: Callable[..., Any], tmp_path: Path) -> None:
    log(tracker(), range(0, 2))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/metrics.jsonl").write_text('{"step": 7, "train/loss": 1.0}\n')
    page = open_page("training", state={"run": "elsewhere"})
    assert curves(page)[ZH["train"]] == [(7, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Real or written


def answered(contender: str, id: str, replies: Sequence[str], real: str = "真的", **changes: Any) -> dict[str, Any]:
    """A line of replies.jsonl."""
    user = comment_prompt(f"标题{id}", f"简介{id}", f"评论{id}")
    messages = [{"role": "system", "content": "设定"}, {"role": "user", "content": user}]
    row = {"contender": contender, "id": id, "video_id": f"v{id}", "messages": messages, "real": real}
    return row | {"replies": [*replies], "cut": [False] * len(replies)} | changes


def evaluated(root: Path, *rows: dict[str, Any], name: str = "E") -> Path:
    """Writes an evaluation; returns its folder."""
    folder = root / "eval" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "replies.jsonl", [*rows])
    return folder


def guesses_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "guesses.jsonl").read_text().splitlines()]


def guess(page: Any, right: bool, real: str = "真的") -> str:
    """Guesses; returns the written reply, as shown."""
    replies = texts(page)[-2:]
    press_key(page, f"pick {int((replies[0] == real) != right)}")
    (written,) = [text for text in replies if text != real]
    return written


def press_key(page: Any, key: str) -> None:
    page.get_by_key(key).click().run()
    assert not page.exception


def made(contender: str, id: str, number: int = 0) -> Any:
    return script.Round(contender, id, number, "标题", "", "", "真的", f"{contender}{id}{number}")


def guessed(contender: str, right: int, wrong: int, session: str = "s") -> list[dict[str, Any]]:
    """Guesses on as many comments."""
    row = {"contender": contender, "session": session}
    return [row | {"id": str(number), "right": number < right} for number in range(right + wrong)]


def test_guess_scores_known_by_hand() -> None:
    """Wilson's interval: for 5 of 10, 0.5 +- 1.96 sqrt(0.025 + 0.0096) / 1.384; for 0 of 4, up to 0.960 / 1.960."""
    found = script.scores(guessed("b", 5, 5) + guessed("a", 0, 4) + guessed("c", 3, 3))
    assert [(score.contender, score.right, score.count) for score in found] == [("a", 0, 4), ("b", 5, 10), ("c", 3, 6)]
    assert (found[0].low, found[0].high) == (0, pytest.approx(0.48990, abs=1e-5))
    assert (found[1].low, found[1].high) == (pytest.approx(0.23659, abs=1e-5), pytest.approx(0.76341, abs=1e-5))
    assert script.scores([]) == []


def test_a_real_reply_is_guessed_at_once() -> None:
    """Whoever knows it already, from a round with another model, cannot be wrong."""
    rows = guessed("a", 1, 1) + guessed("b", 2, 0) + guessed("b", 2, 0, session="t")
    assert script.first_guesses(rows) == rows[:2] + rows[4:]


@pytest.mark.parametrize(("said", "expected"), [("", 0), ("1", 1), ("0", 0), ("1011", 2), ("1110", 0), ("111", 3)])
def test_guess_streak(said: str, expected: int) -> None:
    assert script.streak([{"right": each == "1"} for each in said]) == expected


def test_guess_rounds_leave_out_what_tells_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Replies that are cut off, empty or the real one; and lines that are none of this project's."""
    rows = [
        answered("a", "1", ["好", "断在这", " \n", "真的 ", "也好"], cut=[False, True, False, False, False]),
        answered("b", "2", ["好"], real=" "),
        answered("b", "3", ["好"], messages=["x"]),
        answered("b", "4", ["好"], messages=[{"role": "user", "content": None}, {"role": "user"}]),
        answered("b", "5", [7]),
        answered("b", "6", ["好"], cut=1),
        answered("c", "7", ["\ud83d 半个"], cut=None, messages=[{"role": "user", "content": "只有一句"}]),
    ]
    rounds = script.rounds_of(rows)
    assert [each.key for group in rounds.values() for each in group] == [("a", "1", 0), ("a", "1", 4), ("c", "7", 0)]
    assert rounds["a"][0][3:] == ("标题1", "简介1", "评论1", "真的", "好")
    assert rounds["c"][0][3:] == ("只有一句", "", "", "真的", "\ufffd 半个")


def test_guess_rounds_do_not_come_twice_until_all_have_come() -> None:
    rounds = {"a": [made("a", id, n) for id in "123" for n in range(2)], "b": [made("b", id) for id in "1234"]}
    for seed in range(20):
        played: list[Any] = []
        for _ in range(20):
            played.append(script.draw_round(rounds, played, Random(f"{seed} {len(played)}")))
        assert len({*played[:10]}) == 10 == len({*played[10:]})
        assert {each.id for each in played[:4]} == {*"1234"}, "what is not known yet comes first"


def test_guess_rounds_are_drawn_evenly() -> None:
    """The models, though one has more replies; the comments, though one was answered more often."""
    rounds = {"a": [made("a", "1"), *(made("a", "2", n) for n in range(9))], "b": [made("b", "3")]}
    random = Random(1)
    drawn = Counter(script.draw_round(rounds, [], random).id for _ in range(4000))
    assert drawn["3"] == pytest.approx(2000, abs=130)  # Four standard deviations.
    assert drawn["1"] == pytest.approx(1000, abs=110)
    orders = Counter()
    for _ in range(1000):
        game = script.new_game(str(random.random()))
        script.next_round(game, rounds)
        orders[tuple(game["order"])] += 1
    assert orders["real", "written"] == pytest.approx(500, abs=64) and sum(orders.values()) == 1000 and len(orders) == 2


def test_guesses_of_many_visitors_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "guesses.jsonl"
    rows = [{"id": str(number), "text": "好" * 500} for number in range(400)]
    with ThreadPoolExecutor(16) as pool:
        [*pool.map(lambda row: script.append_line(path, row), rows)]
    assert sorted(guesses_of(tmp_path), key=lambda row: int(row["id"])) == rows


def test_a_guess(root: Path, open_page: Callable[..., Any]) -> None:
    """It is told at once whether it was right and who wrote the other one, and stored."""
    folder = evaluated(root, *(answered(name, id, [f"{name}写{id}"]) for name in ("m1", "m2") for id in "1234"))
    page = open_page("guess")
    assert [metric.value for metric in page.metric] == ["0 / 0", "0"] and not (folder / "guesses.jsonl").exists()
    for number, right in enumerate((True, True, True, False), start=1):
        id = texts(page)[0].removeprefix("标题")
        assert texts(page)[:3] == [f"标题{id}", f"简介{id}", f"评论{id}"]
        written = guess(page, right)
        row = guesses_of(folder)[-1]
        assert row.keys() == {"time", "session", "contender", "id", "reply", "right", "seconds"}
        assert (f"{row['contender']}写{row['id']}", row["id"], row["reply"]) == (written, id, 0)
        assert row["right"] == right and 0 <= row["seconds"] < 60 and round(row["seconds"], 1) == row["seconds"]
        assert abs(datetime.fromisoformat(row["time"]) - datetime.now(UTC)) < timedelta(minutes=1)
        assert row["contender"] in texts(page)
        assert [element.value for element in [*page.success, *page.error]] == [
            ZH["guessed_right" if right else "guessed_wrong"]
        ]
        assert page.metric[0].value == f"{number if right else number - 1} / {number}"
        assert labels(page) == [ZH["next"]] and len(guesses_of(folder)) == number
        press_key(page, "next")
        assert labels(page) == [ZH["pick_0"], ZH["pick_1"]] and not page.success and not page.error
    assert page.metric[1].value == "0"
    assert ZH["seen_before"] in [caption.value for caption in page.caption], "all four comments have come"


def test_guess_streak_on_the_page(root: Path, open_page: Callable[..., Any]) -> None:
    evaluated(root, *(answered("m", str(id), ["写"]) for id in range(5)))
    page = open_page("guess", locale="en")
    for expected in ("1", "2", "3 🔥"):
        guess(page, True)
        assert page.metric[1].value == expected
        press_key(page, "next")


def test_a_key_pressed_twice_is_one_guess(tmp_path: Path) -> None:
    game = script.new_game("s")
    rounds = {"m": [made("m", "1"), made("m", "2")]}
    script.next_round(game, rounds)
    place = game["order"].index("real")
    for each in (place, 1 - place):
        script.take_guess(game, tmp_path / "guesses.jsonl", "s", 1, each)
    assert [row["right"] for row in guesses_of(tmp_path)] == [True] == [row["right"] for row in game["guesses"]]
    script.go_on(game, 1)
    script.next_round(game, rounds)
    asked = game["round"]
    script.go_on(game, 1)
    script.go_on(game, 2)
    script.take_guess(game, tmp_path / "guesses.jsonl", "s", 1, place)
    assert game["round"] == asked and game["right"] is None and len(guesses_of(tmp_path)) == 1


def test_two_visitors_guess(root: Path, open_page: Callable[..., Any]) -> None:
    """Each has a score and an order of one's own; what everybody guessed is shown to both."""
    rows = [answered(name, str(id), [f"{name}写"]) for id in range(30) for name in ("m1", "m2")]
    folder = evaluated(root, *rows)
    pages = [open_page("guess") for _ in range(2)]
    orders: list[list[str]] = [[], []]
    for _ in range(6):
        for page, order in zip(pages, orders, strict=True):
            order.append(texts(page)[0])
            guess(page, page is pages[0])
            press_key(page, "next")
    assert orders[0] != orders[1]
    sessions = Counter(row["session"] for row in guesses_of(folder))
    assert [*sessions.values()] == [6, 6] and all(int(session, 16) and len(session) == 16 for session in sessions)
    assert [page.metric[0].value for page in pages] == ["6 / 6", "0 / 6"]
    pages[0].run()
    everybody, own = (pages[number].dataframe[number].value for number in range(2))
    assert everybody[ZH["guesses"]].sum() == 12 and own[ZH["guesses"]].sum() == 6
    assert (own[ZH["share"]] == 0).all()


def test_guess_table(root: Path, open_page: Callable[..., Any]) -> None:
    """Sorted; only the first guess on a comment counts, and few say nothing. Damaged lines are left out."""
    folder = evaluated(root, answered("a", "1", ["写"]))
    page = open_page("guess")
    assert [caption.value for caption in page.caption].count(ZH["no_guesses"]) == 2 and not page.dataframe
    write_rows(folder / "guesses.jsonl", guessed("b", 30, 0) + guessed("a", 15, 15, "t") + guessed("c", 9, 9))
    page.run()
    few = ZH["few_guesses"].format(count=30)
    assert page.dataframe[0].value.to_numpy().tolist() == [
        ["a", 50.0, "33% – 67%", 30], ["b", 100.0, "89% – 100%", 30]
    ]  # fmt: skip
    assert few not in [caption.value for caption in page.caption]
    with (folder / "guesses.jsonl").open("a") as file:
        file.write('{"torn": \n' + json.dumps(guessed("c", 1, 0, "u")[0]) + "\n{")
    page.run()
    assert page.dataframe[0].value[ZH["guesses"]].tolist() == [30, 30, 1]
    assert few in [caption.value for caption in page.caption]


def all_of(page: Any) -> list[Any]:
    """All elements of a page."""
    return [node for node in page._tree if hasattr(node, "proto")]


def test_guesses_are_blind(root: Path, open_page: Callable[..., Any]) -> None:
    """Before a guess a model's name is nowhere, but among those that can be chosen and those that were guessed at."""
    rows = [answered(name, str(id), [f"写{id}"]) for id in range(8) for name in ("model-x", "model-y")]
    folder = evaluated(root, *rows)
    page = open_page("guess")
    for _ in range(8):
        shown = [node for node in all_of(page) if node.type not in ("multiselect", "dataframe")]
        assert len(shown) > 10 and "model-" not in " ".join(str(node.proto) for node in shown)
        assert page.multiselect[0].options == ["model-x", "model-y"] and page.multiselect[0].value == []
        tables = [frame.value.to_csv() for frame in page.dataframe]
        guess(page, True, real="真的")
        assert guesses_of(folder)[-1]["contender"] in texts(page)
        told = [frame.value.to_csv() for frame in page.dataframe]
        press_key(page, "next")
        assert tables != told == [frame.value.to_csv() for frame in page.dataframe]


def test_models_to_guess_at_are_chosen(root: Path, open_page: Callable[..., Any]) -> None:
    """Another choice is another round, or it would tell whose the present one is."""
    folder = evaluated(root, *(answered(name, str(id), [f"{name}写"]) for id in range(9) for name in "abc"))
    page = open_page("guess")
    for chosen in (["b"], ["a", "c"], []):
        turn = page.session_state["games"]["E"]["turn"]
        page.multiselect[0].set_value(chosen).run()
        assert page.session_state["games"]["E"]["turn"] == turn + 1
        for _ in range(3):
            guess(page, False)
            assert guesses_of(folder)[-1]["contender"] in (chosen or "abc")
            press_key(page, "next")


def test_evaluations_to_choose(root: Path, open_page: Callable[..., Any]) -> None:
    """The newest first, unless the address names one. Each has its own game."""
    for age, name in enumerate(("new", "$old$")):
        folder = evaluated(root, answered("m", name, ["写"]), name=name)
        os.utime(folder / "replies.jsonl", (1000 - age, 1000 - age))
    page = open_page("guess", evaluation="gone")
    assert page.get_by_key("evaluation").options == ["new", "$old$"] and texts(page)[0] == "标题new"
    assert page.query_params["eval"] == "new"
    page = open_page("guess", evaluation="$old$")
    assert texts(page)[0] == "标题$old$"
    guess(page, True)
    page.get_by_key("evaluation").set_value("new").run()
    assert texts(page)[0] == "标题new" and page.metric[0].value == "0 / 0" and page.query_params["eval"] == "new"
    shutil.rmtree(root / "eval/new")
    page.run()
    assert not page.exception and page.metric[0].value == "1 / 1"


def test_no_evaluation(root: Path, open_page: Callable[..., Any]) -> None:
    page = open_page("guess", locale="en")
    assert [info.value for info in page.info] == [EN["no_evaluations"]]
    assert "python evaluate.py --model output_hf/BiliComments --base" in page.code[0].value


@pytest.mark.parametrize("content", ["", "nonsense\n", "[1]\n"])
def test_nothing_to_guess_at(root: Path, open_page: Callable[..., Any], content: str) -> None:
    folder = evaluated(root)
    (folder / "replies.jsonl").write_text(content)
    assert [info.value for info in open_page("guess").info] == [ZH["no_rounds"]]


def test_damaged_replies(root: Path, open_page: Callable[..., Any]) -> None:
    """The others are played; so are those that are written while the page is open."""
    folder = evaluated(root, answered("m", "1", ["写"]))
    with (folder / "replies.jsonl").open("ab") as file:
        file.write(b'{"contender": "\xff\n{"contender": 1}\n{"torn')
    page = open_page("guess")
    assert guess(page, True) == "写"
    evaluated(root, answered("m", "1", ["写"]), answered("m", "2", ["又写"]))
    press_key(page, "next")
    assert texts(page)[0] == "标题2"


def test_a_guess_that_cannot_be_stored(root: Path, open_page: Callable[..., Any]) -> None:
    folder = evaluated(root, answered("m", "1", ["写"]))
    page = open_page("guess")
    (folder / "guesses.jsonl").symlink_to(root / "no/such/folder")
    guess(page, True)
    assert [warning.value for warning in page.warning] == [ZH["unwritten"]] and page.metric[0].value == "1 / 1"


def test_wild_texts_to_guess_at(root: Path, open_page: Callable[..., Any]) -> None:
    """Texts and names are shown as they are."""
    user = comment_prompt(WILD, WILD, WILD)
    row = answered(WILD, "1", [f"写{WILD}"], real=WILD, messages=[{"role": "user", "content": user}])
    evaluated(root, row)
    page = open_page("guess")
    assert texts(page)[:3] == [WILD] * 3 and sorted(texts(page)[3:]) == sorted([WILD, f"写{WILD}"])
    guess(page, False, real=WILD)
    assert sorted(texts(page)[3:]) == sorted([WILD, WILD, f"写{WILD}"])
    assert not [element for element in [*page.markdown, *page.caption] if "onerror" in element.value]


# ---------------------------------------------------------------------------------------------------------------------
# Data


def record(id: int, answer: str, prompt: str = "") -> dict[str, Any]:
    """A line of data_train.json."""
    user = prompt or comment_prompt(f"标题{id}", f"简介{id}", f"评论{id}")
    turns = {"system": SYSTEM_PROMPT, "user": user, "assistant": answer}
    conversations = [{"from": role, "value": text} for role, text in turns.items()]
    return {"id": f"k{id}", "video_id": "v", "conversations": conversations}


def prepared_data(
    root: Path, kept: Sequence[str], dropped: Sequence[tuple[str, str]] = (), name: str = "data", **changes: Any
) -> Path:
    """Writes what prepare_data.py would; returns the folder. The last kept comment is the only one of the test set.

    Args:
        root: Where to.
        kept: Comments.
        dropped: (reason, comment).
        name: Of the folder.
        changes: Of the arguments.
    """
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(record(number, text), ensure_ascii=False) for number, text in enumerate(kept)]
    for split, part in (("train", rows[:-1]), ("test", rows[-1:])):
        (folder / f"data_{split}.json").write_text("[\n" + ",\n".join(part) + "\n]\n", encoding="utf-8")
    gone = [
        {"reason": reason, "id": f"d{n}", "prompt": f"视频标题：视频{n}\n父评论：问{n}", "text": text}
        for n, (reason, text) in enumerate(dropped)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in gone)
    (folder / "dropped.jsonl").write_text(lines, encoding="utf-8", errors="backslashreplace")
    examples: dict[str, list[str]] = {}
    for reason, text in dropped:
        examples.setdefault(reason, []).append(text)
    report = {
        "arguments": {"data_dir": "data", "output_dir": name, "max_repeats": 3, "write_dropped": True} | changes,
        "read": len(kept) + len(dropped),
        "dropped": {"torn": 0} | Counter(reason for reason, _ in dropped),
        "examples": {reason: found[:3] for reason, found in examples.items()},
        "splits": {"train": {"comments": len(kept) - 1, "videos": 7}, "test": {"comments": 1, "videos": 1}},
        "lengths": {"comment": Counter(map(len, kept)), "prompt": {"40": len(kept)}},
    }
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


KEPT = [f"留下的第{number}条" for number in range(60)]
GONE = [("repeat", f"丢掉的第{number}条") for number in range(40)]


def labels_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]


def drawn_from(folder: Path, draws: int = 1) -> tuple[str, list[Any]]:
    """The data's mark, and what the page asks about."""
    prepared = script.prepared
    mark = prepared.read_prepared(folder).mark
    return mark, prepared.draw_records(mark, prepared.kept_lines(folder), prepared.cleaned_lines(folder), draws)


def shown_of(each: Any) -> list[str]:
    """What the page shows of a comment to judge: the title, the comment that it answers, and the comment."""
    title, _, answered = each.prompt.removeprefix("视频标题：").partition("\n父评论：")
    return [part for part in (title.partition("\n")[0], answered) if part] + [each.text]


def judge_all(folder: Path, *left: int, draws: int = 1) -> list[Any]:
    """Judges what the page asks about, but for some; junk are those that were dropped, and every fifth of the others.

    Returns:
        What is left.
    """
    mark, drawn = drawn_from(folder, draws)
    rows = [
        {"data": mark, "draw": each.draw, "id": each.id, "reason": each.reason, "junk": is_junk(each.text)}
        for number, each in enumerate(drawn)
        if number not in left
    ]
    write_rows(folder / "labels.jsonl", rows)
    return [drawn[number] for number in left]


def is_junk(text: str) -> bool:
    return text.startswith("丢") or text.endswith(("0条", "5条"))


def test_no_data(root: Path, open_page: Callable[..., Any]) -> None:
    """Reports of other scripts are none; the data shows up as soon as it is there."""
    (root / "eval/E").mkdir(parents=True)
    (root / "eval/E/report.json").write_text('{"verdicts": {}}')
    page = open_page("data", locale="en")
    assert [info.value for info in page.info] == [EN["no_data"]]
    assert [code.value for code in page.code] == ["python prepare_data.py --data_dir examples --write_dropped True"]
    prepared_data(root, KEPT)
    page.run()
    assert page.get_by_key("data_folder").options == ["data"] and not page.info


def test_folders_of_data(root: Path, open_page: Callable[..., Any]) -> None:
    """The default, then the newest; any other can be typed."""
    for age, name in enumerate(("data", "output/new", "old")):
        folder = prepared_data(root, KEPT[: 10 + age], name=name)
        os.utime(folder / "report.json", (1000 - age, 1000 - age if age else 900))
    page = open_page("data")
    assert page.get_by_key("data_folder").options == ["data", "output/new", "old"]
    prepared_data(root, KEPT[:20], name="a/b/c")
    assert open_page("data", state={"data_folder": "a/b/c"}).metric[1].value == "19"
    for typed in ("~nobody-of-this-name/x", "data/report.json", "da\0ta"):
        page = open_page("data", state={"data_folder": typed})
        assert [warning.value for warning in page.warning] == [ZH["no_report"]] and texts(page) == [typed]


@pytest.mark.parametrize(("locale", "t"), [("zh-CN", ZH), ("en", EN)])
def test_counts_of_data(root: Path, open_page: Callable[..., Any], locale: str, t: dict[str, str]) -> None:
    """Numbers, shares of what was read, and the examples, as the texts they are."""
    prepared_data(root, KEPT, [*GONE, ("duplicate", WILD), *[("of_another_version", "\ud83d")] * 20])
    page = open_page("data", locale=locale)
    assert [metric.value for metric in page.metric] == ["121", "59", "1", "61"]
    names = script.drop_names(t)
    assert [row[:2] for row in page.dataframe[0].value.to_numpy().tolist()] == [
        [t["for_training"], 59], [t["for_test"], 1], [names["repeat"], 40], [names["duplicate"], 1],
        ["of_another_version", 20],
    ]  # fmt: skip
    assert page.dataframe[0].value[t["part"]].tolist() == [pytest.approx(100 * n / 121) for n in (59, 1, 40, 1, 20)]
    assert WILD in texts(page) and "\ufffd" in texts(page) and "丢掉的第2条" in texts(page)
    assert not [element for element in [*page.markdown, *page.caption] if "onerror" in element.value]
    lengths = [[(bar["from"], bar["to"], bar["count"]) for bar in chart if bar["count"]] for chart in charts(page)]
    assert lengths == [[(6, 7, 10), (7, 8, 50)], [(40, 42, 60)]]


def test_all_reasons_have_chinese_words() -> None:
    data_script = load_script("prepare_data.py")
    assert script.ZH_DROPS.keys() == data_script.DROPS.keys() == script.drop_names(EN).keys()


def test_the_command_that_prepares_again(root: Path) -> None:
    """It has the same arguments, but for what is asked for."""
    usual = load_script("prepare_data.py").build_parser()
    arguments = vars(usual.parse_args(["--data_dir", "a b", "--total", "9", "--max_repeats", "2", "--clean", "False"]))
    folder = prepared_data(root, KEPT, name="some where", **arguments | {"output_dir": "elsewhere"})
    command = script.prepare_again(script.prepared.read_prepared(folder))
    assert command.count("--") == 6
    again = vars(usual.parse_args(script.shlex.split(command)[2:]))
    assert again == arguments | {"output_dir": "some where", "write_dropped": True}


def test_samples_by_chance(root: Path, open_page: Callable[..., Any]) -> None:
    """As the model gets them; others at a click."""
    prepared_data(root, KEPT)
    page = open_page("data", state={"view": "by_chance"})
    seen = set()
    for _ in range(5):
        shown = texts(page)
        assert len(shown) == 3 * 7
        for place in range(0, 21, 7):
            number = shown[place].removeprefix("标题")
            answer = KEPT[int(number)]
            assert shown[place + 1 : place + 4] == [f"简介{number}", f"评论{number}", answer]
            expected = to_messages(record(int(number), answer))
            assert shown[place + 4 : place + 7] == [message["content"] for message in expected]
            seen.add(number)
        press(page, ZH["others"])
    assert len(seen) > 8 and "59" not in seen, "that one is of the test set"


def test_search_in_data(root: Path, open_page: Callable[..., Any]) -> None:
    prepared_data(root, [*KEPT, WILD], [("repeat", "丢掉的"), ("bait", f"{WILD} 回复1")])
    page = open_page("data", state={"view": "search", "search_text": "留下"})
    assert page.caption[0].value == ZH["hits"].format(total="60", shown=50) and len(texts(page)) == 100
    page.session_state["search_text"] = "ONERROR"
    assert texts(page.run()) == [comment_prompt("标题60", "简介60", "评论60"), WILD]
    page.session_state["search_where"] = "prompt"
    assert [info.value for info in page.run().info] == [ZH["no_hits"]]
    page.session_state["search_text"] = "标题7"
    assert texts(page.run())[1] == KEPT[7]
    page.session_state.search_where, page.session_state.search_text = "dropped", "回复1"
    assert texts(page.run()) == [script.ZH_DROPS["bait"], f"{WILD} 回复1"]
    prepared_data(root, KEPT, [("repeat", "丢掉的")], write_dropped=False)
    page.run()
    assert [info.value for info in page.info] == [ZH["no_dropped"]] and "--write_dropped True" in page.code[0].value


def test_search_reads_a_file_once(root: Path, open_page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared_data(root, KEPT)
    page = open_page("data", state={"view": "search", "search_text": "留下"})
    opened: list[Path] = []
    monkeypatch.setattr(Path, "open", lambda path, *a, real=Path.open, **b: opened.append(path) or real(path, *a, **b))
    page.run()
    assert not [path for path in opened if path.is_relative_to(folder)] and len(texts(page)) == 100
    prepared_data(root, KEPT[:5])
    page.run()
    assert [path for path in opened if path.is_relative_to(folder)] and len(texts(page)) == 10


def test_judging_is_blind(root: Path, open_page: Callable[..., Any]) -> None:
    """Nothing on the page tells which side a text is from. What is judged is stored at once, and found again."""
    folder = prepared_data(root, [f"甲{n:02}" for n in range(60)], [("repeat", f"乙{n:02}") for n in range(40)])
    mark, drawn = drawn_from(folder)
    page = open_page("data", state={"view": "check"})
    shapes = set()
    for number in range(8):
        assert texts(page) == shown_of(drawn[number])
        shown = " ".join(str(node.proto) for node in all_of(page)) + str(page.query_params)
        shown = shown.replace(json.dumps(drawn[number].text), "").replace(f"{number + 1} 条", "")
        assert "repeat" not in shown and drawn[number].id not in shown
        shapes.add(len(all_of(page)) - bool(number))
        press_key(page, f"tick {'junk' if number % 2 else 'good'}")
        row = labels_of(folder)[-1]
        assert abs(datetime.fromisoformat(row.pop("time")) - datetime.now(UTC)) < timedelta(minutes=1)
        expected = {"data": mark, "draw": 0, "id": drawn[number].id, "reason": drawn[number].reason}
        assert row == expected | {"junk": number % 2 == 1} and len(labels_of(folder)) == number + 1
    assert len(shapes) == 1 and {bool(each.reason) for each in drawn[:8]} == {False, True}
    page = open_page("data", state={"view": "check"})
    assert texts(page) == shown_of(drawn[8]), "it goes on after a reload"
    press_key(page, "back")
    press_key(page, "back")
    assert texts(page) == shown_of(drawn[6])
    press_key(page, "tick junk")
    assert texts(page) == shown_of(drawn[8])
    assert script.prepared.read_labels(folder / "labels.jsonl", mark)[drawn[6].id]["junk"] is True


def test_precision_and_recall_on_the_page(root: Path, open_page: Callable[..., Any]) -> None:
    """All 25 dropped ones are junk, and each kept one that ends with 0 or 5: q = y / 25; 40 / (40 + 60 q)."""
    folder = prepared_data(root, KEPT, GONE)
    for each in judge_all(folder, 10, 20, 30):
        page = open_page("data", state={"view": "check"})
        assert not page.metric and texts(page) == shown_of(each)
        press_key(page, "tick junk" if is_junk(each.text) else "tick good")
    junk = sum(is_junk(each.text) for each in drawn_from(folder)[1] if not each.reason)
    assert 0 < junk < 25
    recall = 40 / (40 + 60 * junk / 25)
    assert [metric.value for metric in page.metric] == ["100%", f"{recall:.0%}", f"{junk / 25:.0%}"]
    assert page.caption[0].value == ZH["share_of"].format(low=0.8628, high=1)
    assert page.dataframe[0].value.to_numpy().tolist() == [
        [script.ZH_DROPS["repeat"], 25, 25, "--max_repeats 6"]
    ]  # fmt: skip
    assert texts(page)[0] == ZH["none"] and len(texts(page)) == 1 + junk and all(map(is_junk, texts(page)[1:]))
    press(page, ZH["again"])
    _, drawn = drawn_from(folder, 2)
    assert texts(page) == shown_of(drawn[50]) and len(drawn) == 90, "of 40 dropped ones 15 are left"
    press_key(page, "tick good")
    assert texts(open_page("data", state={"view": "check"})) == shown_of(drawn[51])
    judge_all(folder, draws=2)
    assert page.run().dataframe[0].value[ZH["number"]].tolist() == [40]
    prepared_data(root, KEPT, GONE[1:])
    assert page.run().metric.len == 0 and labels(page) == [ZH["good"], ZH["junk"]], "other data begins anew"


def test_nothing_to_check(root: Path, open_page: Callable[..., Any]) -> None:
    prepared_data(root, KEPT, [("duplicate", "一样")])
    page = open_page("data", locale="en", state={"view": "check"})
    assert [info.value for info in page.info] == [EN["nothing_cleaned"]]
    assert [code.value for code in page.code][0].endswith("--write_dropped True --min_chars 12")
    prepared_data(root, KEPT, GONE, write_dropped=False)
    page.run()
    assert [info.value for info in page.info] == [EN["no_dropped"]]
    assert [code.value for code in page.code] == [
        "python prepare_data.py --output_dir data --write_dropped True"
    ]  # fmt: skip


def test_a_judgement_that_cannot_be_stored(root: Path, open_page: Callable[..., Any]) -> None:
    folder = prepared_data(root, KEPT, GONE)
    (folder / "labels.jsonl").symlink_to(root / "no/such/folder")
    page = open_page("data", state={"view": "check"})
    shown = texts(page)
    press_key(page, "tick good")
    assert [warning.value for warning in page.warning] == [ZH["unlabelled"]] and texts(page) == shown
    (folder / "labels.jsonl").unlink()
    press_key(page, "tick good")
    assert not page.warning and texts(page) != shown and len(labels_of(folder)) == 1


@pytest.mark.parametrize(
    ("view", "name"), [("by_chance", "data_train.json"), ("search", "data_test.json"), ("check", "dropped.jsonl")]
)
def test_damaged_data(root: Path, open_page: Callable[..., Any], view: str, name: str) -> None:
    """A sentence that names the file, and the command that writes it anew."""
    folder = prepared_data(root, KEPT, GONE)
    (folder / name).write_text('{"conversations": "留下' + name)
    page = open_page("data", state={"view": view, "search_text": "留下"})
    assert not page.exception and [warning.value for warning in page.warning] == [ZH["bad_data"]]
    assert f"data/{name}" in texts(page)[-1]
    assert [code.value for code in page.code] == ["python prepare_data.py --output_dir data --write_dropped True"]


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

OUTPUT = ROOT / "tests/output"  # Where the screenshots stay.
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts the page as people do, from another folder and as a user who never started Streamlit; gives its address.

    What it sent to places that are not on this machine is found out at the end.
    """
    outside = Api()  # As a proxy it would see any request.
    environment = {name: text for name, text in os.environ.items() if name.lower() != "no_proxy"}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), outside.url)
    environment["HOME"] = str(tmp_path)
    processes = []
    log = (tmp_path / "log").open("w+")

    def start(*arguments: str, script: Path | str = SCRIPT) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "streamlit", "run", str(script), "--server.port", str(port), "--", *arguments]
        options = {"cwd": tmp_path, "env": environment, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        processes.append(subprocess.Popen(command, **options))
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in processes:
        process.terminate()
        process.wait()
    outside.shutdown()
    log.seek(0)
    said = log.read()
    assert "Traceback" not in said and "mail" not in said and "URL: http://127.0.0.1" in said, said
    assert not outside.paths and not outside.requests and not (tmp_path / ".streamlit/credentials.toml").exists()


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Waits for something that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
    return found


class Visitor:
    """Somebody with a browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def find(self, selector: str) -> list[Any]:
        from selenium.webdriver.common.by import By

        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def script(self, code: str) -> Any:
        return self.driver.execute_script(f"return {code}")

    def page(self) -> str:
        """All that can be read."""
        return self.script("document.body.innerText")

    def texts(self) -> list[str]:
        """What stands where text is shown as it is; looked up in one step, since the page may change meanwhile."""
        return self.script("[...document.querySelectorAll('[data-testid=stText]')].map(e => e.innerText.trim())")

    def reads(self, text: str, seconds: float = 60) -> None:
        """Waits for a text."""
        try:
            until(lambda: text in self.page(), seconds)
        except AssertionError:
            raise AssertionError(f"{text!r} is not in {self.page()!r}") from None

    def press(self, label: str) -> None:
        """Presses a button; again, if the page was being drawn anew."""
        from selenium.common.exceptions import WebDriverException

        def pressed() -> bool:
            try:
                buttons = [button for button in self.find("button") if button.text.strip() == label]
                buttons[0].click() if buttons else None
            except WebDriverException:
                return False
            return bool(buttons)

        until(pressed)

    def key(self, key: str) -> None:
        """Presses a key, wherever the page's focus is."""
        self.driver.switch_to.active_element.send_keys(key)

    def can_stop(self) -> bool:
        """Whether something is being written."""
        return bool(self.find(".st-key-stop button"))

    def fill_in(self, label: str, text: str) -> None:
        (box,) = until(lambda: self.find(f"[aria-label='{label}']"))
        box.send_keys("\ue009a\ue000" + text)  # Instead of what is there (Ctrl-A).

    def calm(self) -> None:
        """Waits until the page has been drawn."""
        until(lambda: not self.find("[data-testid=stApp][data-test-script-state=running], [data-stale=true]"))
        time.sleep(0.5)  # Of fading.

    def screenshot(self, name: str) -> None:
        self.calm()
        OUTPUT.mkdir(exist_ok=True)
        self.driver.save_screenshot(OUTPUT / name)

    def requests(self) -> list[str]:
        """Where the pages' requests went, without those of the browser's own start page."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent if not each["documentURL"].startswith("chrome:")]


@pytest.fixture
def visitor(tmp_path: Path) -> Iterator[Visitor]:
    """Somebody whose browser speaks Chinese."""
    if not (CHROMIUM and CHROMEDRIVER):
        missing = "no Chromium with its driver: sudo apt-get install chromium chromium-driver"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",  # Which root needs.
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1400,1100",
        "--no-proxy-server",
        f"--user-data-dir={tmp_path / 'browser'}",
    ):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"intl.accept_languages": "zh-CN"})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with webdriver.Chrome(options, Service(CHROMEDRIVER)) as driver:
        yield Visitor(driver)


@pytest.mark.slow
def test_from_opening_the_page_to_reading_replies(api: Api, demo: Callable[..., str], visitor: Visitor) -> None:

    def reply(request: dict[str, Any]) -> list[str]:
        return [f"{request['model']}：门板够厚就不晃。\n第{n + 1}个：{WILD}" for n in range(request["n"])]

    api.piece_sec, api.reply = 0.2, reply
    url = demo("--api", api.url)
    visitor.driver.get(url)
    visitor.reads(ZH["comments_lead"])
    visitor.press("English")
    visitor.reads(EN["comments_lead"])
    visitor.driver.refresh()
    visitor.reads(EN["comments_lead"])
    assert visitor.driver.current_url == f"{url}/?lang=en"
    visitor.press("中文")
    visitor.reads(ZH["comments_lead"])
    visitor.press(ZH["example"])
    until(lambda: visitor.find(f"[aria-label='{ZH['title']}']")[0].get_property("value") == script.EXAMPLE["title"])
    visitor.fill_in(ZH["parent"], WILD.replace("\n", " "))
    visitor.press(ZH["write"])
    visitor.reads("small：门")
    assert visitor.can_stop() and "第3个" not in visitor.page(), "text is read as it comes"
    until(lambda: not visitor.can_stop())
    visitor.calm()
    expected = [reply({"model": name, "n": 3}) for name in ("small", "tuned")]
    assert visitor.texts()[:8] == ["small", *expected[0], "tuned", *expected[1]]
    assert visitor.driver.title == f"llm-train-playground · {ZH['comments']}", "no script ran"
    assert not visitor.find("img, .katex, [data-testid=stText] a, [data-testid=stText] h1, [data-testid=stText] b")
    visitor.screenshot("web_demo_comments.png")
    assert {request["messages"][-1]["content"] for request in api.requests} == {
        comment_prompt(script.EXAMPLE["title"], script.EXAMPLE["desc"], WILD.replace("\n", " "))
    }
    assert all(sent.startswith((url, "ws" + url[4:], "data:")) for sent in visitor.requests())


@pytest.mark.slow
def test_a_conversation_in_the_browser(api: Api, demo: Callable[..., str], visitor: Visitor) -> None:
    api.piece_sec = 0.1
    api.reply = lambda request: ["不晃。" * 1000 if len(api.requests) == 1 else WILD]
    visitor.driver.get(demo("--api", api.url) + "/chat")
    visitor.reads(ZH["chat_lead"])
    (box,) = until(lambda: visitor.find("[data-testid=stChatInput] textarea"))
    box.send_keys("会晃吗？\n")
    visitor.reads("不晃。不晃。不晃。")
    visitor.press(ZH["stop"])
    until(lambda: not visitor.can_stop())
    until(lambda: api.left == 1)
    visitor.calm()
    visitor.reads(ZH["stopped"])
    kept = visitor.texts()[1]
    assert 3 <= kept.count("不晃。") < 100, "what had come stays"
    box.send_keys(WILD.replace("\n", " ") + "\n")
    until(lambda: visitor.texts()[2:] == [WILD.replace("\n", " "), WILD] and not visitor.can_stop())
    assert [message["content"] for message in api.requests[1]["messages"]] == [
        "调过的设定", "会晃吗？", kept, WILD.replace("\n", " ")
    ]  # fmt: skip
    assert not visitor.find("img, .katex, [data-testid=stText] a")
    visitor.screenshot("web_demo_chat.png")
    visitor.press(ZH["clear"])
    until(lambda: not visitor.texts())


@pytest.mark.slow
def test_a_run_in_the_browser(tracker: Any, run_dir: Path, demo: Callable[..., str], visitor: Visitor) -> None:
    """Curves and samples come by themselves; nothing but the page's own files is asked for."""
    run = tracker()
    log(run, range(0, 3))
    url = demo()
    visitor.driver.get(url + "/training")
    visitor.reads(ZH["training_lead"].format(seconds=script.FOLLOW_SEC))
    (box,) = until(lambda: visitor.find("[data-testid=stSelectbox] input"))
    box.send_keys(f"{run_dir}\n")
    visitor.reads(ZH["at_step"].format(step=2))
    until(lambda: len(visitor.find("[data-testid=stVegaLiteChart] svg")) == 4)
    visitor.reads("第0步")
    log(run, range(3, 41))
    visitor.reads(ZH["at_step"].format(step=40))
    visitor.reads("第40步")
    lines = "document.querySelector('[data-testid=stVegaLiteChart] svg').querySelectorAll('.mark-line path').length"
    until(lambda: visitor.script(lines) == 3)
    assert f"提示0\n{WILD}" in visitor.texts() and not visitor.find("img, .katex")
    visitor.screenshot("web_demo_training.png")
    assert all(sent.startswith((url, "ws" + url[4:], "data:")) for sent in visitor.requests())


@pytest.mark.slow
def test_wrong_arguments_in_the_browser(demo: Callable[..., str], visitor: Visitor) -> None:
    visitor.driver.get(demo("--modle", "a"))
    visitor.reads(EN["wrong_arguments"])
    visitor.reads("unrecognized arguments: --modle a")


@pytest.mark.slow
def test_guessing_in_the_browser(tmp_path: Path, demo: Callable[..., str], visitor: Visitor) -> None:
    """With the keyboard alone; long and wild texts neither widen the page nor become more than text."""
    from selenium.webdriver.common.keys import Keys

    for name in ("utils", ".streamlit"):  # A copy, whose eval/ is its own.
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    shutil.copy(SCRIPT, tmp_path / "copy")
    long = {"real": f"真的{WILD}", "replies": [f"写的{'长' * 600}", f"写的{'long' * 300}"]}
    rows = [answered(name, str(id), ["写的"] * 2) | long for name in ("model-x", WILD) for id in range(3)]
    folder = evaluated(tmp_path / "copy", *rows)
    url = demo(script=tmp_path / "copy/web_demo.py")
    visitor.driver.get(f"{url}/guess?eval=E")
    visitor.reads(ZH["guess_lead"].partition("**")[0])
    for number, right in enumerate((True, False, True), start=1):
        visitor.reads(ZH["pick_1"])
        visitor.calm()
        assert "model-x" not in visitor.page() and f"真的{WILD}" in visitor.texts()
        left = visitor.texts()[-2].startswith("真的")
        visitor.key(Keys.ARROW_LEFT if left == right else Keys.ARROW_RIGHT)
        visitor.reads(ZH["guessed_right" if right else "guessed_wrong"])
        assert [row["right"] for row in guesses_of(folder)] == [True, False, True][:number]
        assert guesses_of(folder)[-1]["contender"] in visitor.texts()
        visitor.calm()
        assert visitor.script("document.documentElement.scrollWidth <= innerWidth")
        assert visitor.script(
            "[...document.querySelectorAll('[data-testid=stText]')].every(e => e.scrollWidth <= e.clientWidth + 1)"
        )
        visitor.screenshot("web_demo_guess.png")
        visitor.key(Keys.ENTER)
    visitor.reads("2 / 3")
    assert not visitor.find("img, .katex, [data-testid=stText] a, [data-testid=stText] h1, [data-testid=stText] b")
    assert visitor.driver.title == f"llm-train-playground · {ZH['guess']}", "no script ran"
    assert len({row["session"] for row in guesses_of(folder)}) == 1 and len({r["id"] for r in guesses_of(folder)}) == 3
    assert all(sent.startswith((url, "ws" + url[4:], "data:")) for sent in visitor.requests())


@pytest.mark.slow
def test_data_in_the_browser(tmp_path: Path, demo: Callable[..., str], visitor: Visitor) -> None:
    """From the counts to a verdict on the cleaning, with the keyboard; wild texts stay texts."""
    for name in ("utils", ".streamlit"):  # A copy, whose data/ is its own.
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    for name in ("web_demo.py", "prepare_data.py"):
        shutil.copy(ROOT / name, tmp_path / "copy")
    kept = [f"留下的第{number}条{WILD}{'长' * 300}" for number in range(60)]
    gone = [("repeat", f"丢掉的第{number}条{WILD}") for number in range(40)]
    folder = prepared_data(tmp_path / "copy", kept, gone)
    asked = judge_all(folder, 48, 49)
    url = demo(script=tmp_path / "copy/web_demo.py")
    visitor.driver.get(f"{url}/data")
    visitor.reads(ZH["was_read"])
    until(lambda: len(visitor.find("[data-testid=stVegaLiteChart] svg")) == 2)
    visitor.press(ZH["by_chance"])
    visitor.reads(ZH["others"])
    visitor.press(ZH["others"])
    until(lambda: any(text.startswith("留下的第") for text in visitor.texts()))
    visitor.press(ZH["search"])
    (box,) = until(lambda: visitor.find("[data-testid=stTextInput] input"))
    box.send_keys("第7条<IMG\n")
    visitor.reads(ZH["hits"].format(total=1, shown=1))
    until(lambda: kept[7] in visitor.texts())
    visitor.press(ZH["check"])
    for number, each in enumerate(asked, start=49):
        visitor.reads(ZH["judged"].format(number=number, count=50))
        until(lambda each=each: visitor.texts() == shown_of(each))
        visitor.calm()
        visitor.key("2" if is_junk(each.text) else "1")
    visitor.reads(ZH["precision"])
    first = "document.querySelector('[data-testid=stMetricValue]')?.innerText.trim()"
    until(lambda: visitor.script(first) == "100%")
    visitor.calm()
    assert len(labels_of(folder)) == 50
    assert visitor.script("document.documentElement.scrollWidth <= innerWidth")
    assert not visitor.find("img, .katex, [data-testid=stText] a, [data-testid=stText] h1, [data-testid=stText] b")
    assert visitor.driver.title == f"llm-train-playground · {ZH['data']}", "no script ran"
    visitor.screenshot("web_demo_data.png")
    assert all(sent.startswith((url, "ws" + url[4:], "data:")) for sent in visitor.requests())
