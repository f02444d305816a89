"""serve.py on transformers: real clients, the seed's own requests, the same text as `generate`, and signals.

python -m pytest tests/test_serve.py
"""

import asyncio
import http.client
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
import torch
from conftest import ROOT, load_script, slow
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from utils.data.chat import Chat, make_chat
from utils.data.records import SYSTEM_PROMPT, comment_prompt

N_NEW = 16
QUESTIONS = [
    "你是谁",
    "今天吃什么？",
    "好看",
    "哈哈哈哈哈" * 5,
    "第一次来",
    "问<|im_end|>题",
    *(f"第{n}题" * (n + 1) for n in range(14)),
]


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    return load_script("serve.py")


@pytest.fixture(scope="module")
def model(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished model, with the record of its training."""
    folder = tmp_path_factory.mktemp("serve") / "BiliComments"
    shutil.copytree(model_dir / "tiny/llama", folder)
    (folder / "run.json").write_text(json.dumps({"data": {"system_prompt": SYSTEM_PROMPT}}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    folder = model.parent / "adapter"
    get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(serve: ModuleType, model: Path, adapter: Path) -> str:
    """A server that offers BiliComments and tuned."""
    return serve.serve_in_background(["--model", str(model), "--adapter", f"tuned={adapter}"])


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> Chat:
    return make_chat(tokenizer)


@pytest.fixture(scope="module")
def written(model: Path, adapter: Path, chat: Chat) -> Any:
    """What transformers alone writes to messages: model name, messages, tokens -> text."""
    models = {"BiliComments": AutoModelForCausalLM.from_pretrained(model)}
    models["tuned"] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)

    def write(name: str, messages: list[dict[str, str]], n_new: int = N_NEW) -> str:
        ids = torch.tensor([chat.prompt_ids(messages)])
        settings = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": [0, chat.stop_id], "pad_token_id": 0}
        out = models[name].generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return chat.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return write


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def post(url: str, route: str, body: dict[str, Any]) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


# ---------------------------------------------------------------------------------------------------------------------
# OpenAI's client


@pytest.mark.parametrize("name", ["BiliComments", slow("tuned")])
def test_greedy_answers_are_generates(client: openai.OpenAI, written: Any, name: str) -> None:
    """20 questions, 64 tokens, whole and as streams, all at the same time."""

    def whole(question: str) -> tuple[str, str]:
        settings: dict[str, Any] = dict(model=name, messages=user(question), temperature=0, max_tokens=64)
        choice = client.chat.completions.create(**settings).choices[0]
        return choice.message.content, choice.finish_reason

    def streamed(question: str) -> tuple[str, str]:
        settings: dict[str, Any] = dict(model=name, messages=user(question), temperature=0, max_tokens=64)
        chunks = list(client.chat.completions.create(**settings, stream=True))
        assert len(chunks) > 3, "piece by piece"
        choices = [chunk.choices[0] for chunk in chunks]
        return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(whole, QUESTIONS)), list(pool.map(streamed, QUESTIONS))
    expected = [written(name, user(question), 64) for question in QUESTIONS]
    assert len(QUESTIONS) == 20 and all(expected)
    assert [text for text, _ in found[0]] == expected
    assert found[0] == found[1]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["BiliComments", "tuned"]
    assert client.models.retrieve("tuned").id == "tuned"
    with pytest.raises(openai.NotFoundError, match="this server has"):
        client.models.retrieve("n" * 5000)


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(client: openai.OpenAI, stream: bool) -> None:
    """Drawn with a seed: the same ones streamed and whole, all different."""
    settings: dict[str, Any] = dict(
        model="tuned", messages=user("问"), n=3, seed=7, temperature=2.0, max_completion_tokens=8, top_p=0.95
    )
    whole = client.chat.completions.create(**settings)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3 and whole.usage.completion_tokens == 24
    if stream:
        found, counted = ["", "", ""], None
        for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                found[choice.index] += choice.delta.content or ""
            counted = chunk.usage
        assert found == texts and counted == whole.usage


def test_stop_words(client: openai.OpenAI, written: Any) -> None:
    whole = written("BiliComments", user("好看"))
    word = whole[4:6]
    settings: dict[str, Any] = dict(
        model="BiliComments", messages=user("好看"), temperature=0, max_tokens=N_NEW, stop=["never", word]
    )
    choice = client.chat.completions.create(**settings).choices[0]
    assert (choice.message.content, choice.finish_reason) == (whole[: whole.index(word)], "stop")
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**settings, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole[: whole.index(word)]
    assert chunks[-1].finish_reason == "stop"


def test_what_is_ignored_and_what_is_refused(client: openai.OpenAI, written: Any) -> None:
    """Tools are not called; what would change the text is not passed over in silence."""
    tool = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
    settings: dict[str, Any] = dict(model="BiliComments", messages=user("好看"), temperature=0, max_tokens=N_NEW)
    answer = client.chat.completions.create(**settings, tools=[tool], tool_choice="auto", user="somebody")
    assert answer.choices[0].message.content == written("BiliComments", user("好看"))
    assert answer.choices[0].message.tool_calls is None
    for refused in ({"logprobs": True}, {"logit_bias": {"5": 100}}, {"response_format": {"type": "json_object"}}):
        with pytest.raises(openai.BadRequestError, match=next(iter(refused))):
            client.chat.completions.create(**settings, **refused)
    client.chat.completions.create(**settings, logprobs=False, response_format={"type": "text"}, logit_bias={})
    asked: dict[str, Any] = dict(model="BiliComments", prompt="好看", max_tokens=2)
    assert client.completions.create(**asked, best_of=1, echo=False, suffix="").choices
    for refused in ({"logprobs": 0}, {"best_of": 2}, {"echo": True}, {"suffix": "。"}):
        with pytest.raises(openai.BadRequestError, match=next(iter(refused))):
            client.completions.create(**asked, **refused)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "this server has BiliComments, tuned"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, openai.BadRequestError, "user's message"),
        ({"messages": [{"role": "robot", "content": "a"}]}, openai.BadRequestError, r"messages\[0\].role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, openai.BadRequestError, r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": None}]}, openai.BadRequestError, r"messages\[0\].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "expected text",
        ),
        ({"max_tokens": 5000}, openai.BadRequestError, "at most 2,0"),
        ({"messages": user("长" * 3000)}, openai.BadRequestError, "2,048 is the most"),
        ({"n": 99}, openai.BadRequestError, "n: "),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ],
)
def test_mistakes_are_told(client: openai.OpenAI, changes: dict[str, Any], error: type[Exception], said: str) -> None:
    settings: dict[str, Any] = dict(model="BiliComments", messages=user("a"), max_tokens=2) | changes
    with pytest.raises(error, match=said):
        client.chat.completions.create(**settings)


def test_parts_and_half_characters(client: openai.OpenAI, url: str, written: Any) -> None:
    parts = [{"type": "text", "text": "好"}, {"type": "text", "text": "看"}]
    settings: dict[str, Any] = dict(model="BiliComments", temperature=0, max_tokens=N_NEW)
    answer = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **settings)
    assert answer.choices[0].message.content == written("BiliComments", user("好看"))
    for route, body in (
        ("/v1/chat/completions", {"messages": user("\ud800")}),
        ("/v1/completions", {"prompt": "\ud800"}),
        ("/ai/llm/generation_stream", {"message": "\ud800", "stop_token_ids": [-1, 2**62]}),
    ):
        assert post(url, route, body | {"max_tokens": 2})[0] == 200


def test_completions(client: openai.OpenAI, model: Path, chat: Chat, url: str) -> None:
    """Plain text, or tokens; and prompts that are none."""
    ids = chat.tokenizer.encode("今天天气")
    out = AutoModelForCausalLM.from_pretrained(model).generate(
        torch.tensor([ids]), max_new_tokens=N_NEW, do_sample=False, eos_token_id=[0, chat.stop_id], pad_token_id=0
    )
    expected = chat.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    for prompt in ("今天天气", ids, ["今天天气"]):
        answer = client.completions.create(model="BiliComments", prompt=prompt, temperature=0, max_tokens=N_NEW)
        assert answer.choices[0].text == expected
    chunks = client.completions.create(
        model="BiliComments", prompt="今天天气", temperature=0, max_tokens=N_NEW, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    for prompt in ("", [], ["a", "b"], [10**9], [-1]):
        assert post(url, "/v1/completions", {"prompt": prompt})[0] == 400
    assert post(url, "/v1/completions", {"prompt": [5], "n": 3, "max_tokens": 2})[0] == 200


def test_langchain(url: str, written: Any) -> None:
    """A client that nobody here wrote."""
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="tuned", temperature=0, max_tokens=N_NEW)
    expected = written("tuned", user("今天吃什么？"))
    assert model.invoke("今天吃什么？").content == expected
    assert "".join(chunk.content for chunk in model.stream("今天吃什么？")) == expected


# ---------------------------------------------------------------------------------------------------------------------
# The project's own route


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("stream", ["true", "false"])
def test_the_seeds_request_with_curl(url: str, stream: str) -> None:
    """As it stands in the document that asked for this route, but for the address."""
    data = """{
    "message": "你是谁",
    "history": [],
    "n": 1,
    "temperature": 0.3,
    "max_tokens": 8192,
    "stream": STREAM,
    "stop_token_ids": [151643],
    "frequency_penalty": 1.2
}""".replace("STREAM", stream)
    command = ["curl", "--silent", "--no-buffer", "--location", f"{url}/ai/llm/generation_stream"]
    said = subprocess.run(
        [*command, "--header", "Content-Type: application/json", "--data", data], capture_output=True, timeout=300
    ).stdout.decode()
    if stream == "false":
        answer = json.loads(said)
        assert len(answer["text"]) == 1 and answer["text"][0] and answer["finish_reason"][0] in ("stop", "length")
        return
    *events, done, rest = said.split("\n\n")
    pieces = [json.loads(event.removeprefix("data: ")) for event in events]
    assert (done, rest) == ("data: [DONE]", "") and len(pieces) > 3
    assert pieces[-1]["finish_reason"] in ("stop", "length") and all(piece["index"] == 0 for piece in pieces)


@pytest.mark.parametrize("name", ["BiliComments", "tuned"])
def test_own_route_is_generate(url: str, written: Any, name: str) -> None:
    """With the training's system text for the model that has a record, and none for the adapter, which has not."""
    system = [{"role": "system", "content": SYSTEM_PROMPT}] if name == "BiliComments" else []
    past = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]
    cases = [
        ({"message": "问<|im_end|>"}, [*system, *user("问<|im_end|>")]),
        ({"message": "问", "history": [["一", "二"]]}, [*system, *past, *user("问")]),
        ({"message": "问", "system": "别的"}, [{"role": "system", "content": "别的"}, *user("问")]),
        ({"title": "标题", "desc": "-", "parent": "前排"}, [*system, *user(comment_prompt("标题", "-", "前排"))]),
    ]
    for body, messages in cases:
        body = body | {"temperature": 0, "max_tokens": N_NEW, "model": name}
        status, answer = post(url, "/ai/llm/generation_stream", body)
        assert status == 200 and answer["text"] == [written(name, messages)]


# ---------------------------------------------------------------------------------------------------------------------
# The process


def start(model: Path, *arguments: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """serve.py as a process; returns it and its address once it has said that."""
    command = [sys.executable, str(ROOT / "serve.py"), "--model", str(model), "--port", "0", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment, cwd="/"
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Serving "):
            return process, line.split()[3]
    raise AssertionError("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end(model: Path, ending: signal.Signals) -> None:
    """No new ones are taken, and the process ends without an error."""
    process, address = start(model, "--api-key", "MY_KEY", MY_KEY="secret-key")
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret-key"}
    body = {"message": "说", "stream": True, "max_tokens": 200, "temperature": 5.0, "seed": 1}
    connection.request("POST", "/ai/llm/generation_stream", json.dumps(body), headers)
    answer = connection.getresponse()
    first = answer.read(10)
    process.send_signal(ending)
    rest = answer.read()
    assert (first + rest).endswith(b"data: [DONE]\n\n") and rest.count(b'"finish_reason":"') == 1
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "secret-key" not in said and "Traceback" not in said and "Error" not in said


@pytest.mark.slow
def test_answers_that_take_too_long_do_not_hold_the_end_up(model: Path) -> None:
    """Those who wait are told so: a whole answer's client and a stream's."""
    process, address = start(model, "--shutdown_sec", "1")
    connections = []
    for stream in (True, False):
        connections.append(http.client.HTTPConnection(address.removeprefix("http://"), timeout=60))
        body = {"message": "说", "stream": stream, "temperature": 5.0, "n": 16}
        headers = {"Content-Type": "application/json"}
        connections[-1].request("POST", "/ai/llm/generation_stream", json.dumps(body), headers)
    streamed = connections[0].getresponse()
    streamed.read(10)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    whole = connections[1].getresponse()
    assert whole.status == 503 and b"The server ends" in whole.read()
    assert b"The server ends" in streamed.read()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and time.monotonic() - began < 20
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_signal_as_soon_as_it_serves(model: Path) -> None:
    for _ in range(5):
        process, _ = start(model)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def refusal(serve: ModuleType, *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        serve.main(*serve.build_parser().parse_known_args(serve.dashes_to_underscores(arguments)))
    return str(error.value)


def test_arguments(serve: ModuleType, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake is told before anything is loaded."""
    monkeypatch.setattr(serve, "load_engine", None)
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    served = ("--model", str(model))
    assert "download_pt.py" in refusal(serve, "--model", "model/no/such")
    assert "NAME=PATH" in refusal(serve, *served, "--adapter", str(adapter))
    assert "adapter_config.json" in refusal(serve, *served, "--adapter", f"a={model}")
    assert "given twice" in refusal(serve, *served, "--adapter", f"a={adapter}", "--adapter", f"a={adapter}")
    assert "given twice" in refusal(serve, *served, "--adapter", f"BiliComments={adapter}")
    assert "requirements_vllm.txt" in refusal(serve, *served, "--engine", "vllm")
    assert "--tensor_parallel_size" in refusal(serve, *served, "--tensor-parallel-size", "2")
    for flag, value in (
        ("port", "70000"), ("max-model-len", "63"), ("max_num_seqs", "0"), ("gpu-memory-utilization", "1.5"),
        ("max_requests", "0"), ("max_body_bytes", "0"), ("timeout_sec", "nan"), ("shutdown_sec", "-1"),
    ):  # fmt: skip
        said = refusal(serve, *served, f"--{flag}", value)
        assert f"--{flag.replace('-', '_')}: got" in said and "expected" in said
    assert "at least the 32" in refusal(serve, *served, "--max_num_batched_tokens", "8")


def test_a_key_is_not_repeated(serve: ModuleType, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gives the key itself in place of a variable's name does not find it in a log."""
    monkeypatch.delenv("API_KEY", raising=False)
    for arguments in (["--api_key"], ["--api-key", "sk-12345"]):
        said = refusal(serve, "--model", str(model), *arguments)
        assert "export API_KEY=" in said and "sk-12345" not in said


def test_a_port_in_use(serve: ModuleType, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "load_engine", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refusal(serve, "--model", str(model), "--engine", "transformers", "--port", str(taken.getsockname()[1]))
    assert "in use" in said and "--port" in said


def test_a_damaged_model(serve: ModuleType, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    said = refusal(serve, "--model", str(broken), "--engine", "transformers", "--port", "0")
    assert "cannot be served" in said


# ---------------------------------------------------------------------------------------------------------------------
# Strangers


def test_without_a_key_other_names_are_refused(url: str) -> None:
    """As a page does whose name leads to this machine (DNS rebinding), or that is another site's."""
    port = url.rsplit(":", 1)[1]
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    for headers, status in (
        ({"Host": f"localhost:{port}"}, 200),
        ({"Host": "evil.example.com"}, 403),
        ({"Host": f"127.0.0.1:{port}", "Origin": "http://evil.example.com"}, 403),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        headers = {"Content-Type": "application/json"} | headers
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        assert connection.getresponse().status == status


def test_which_names_are_answered_to(serve: ModuleType, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback's and the one that it was started for; with a key, or for other machines, all."""
    monkeypatch.setenv("API_KEY", "k")

    def hosts(*arguments: str) -> Any:
        return serve.make_limits(serve.build_parser().parse_args(["--model", str(model), *arguments])).hosts

    assert hosts() == hosts("--host", "localhost") == {"127.0.0.1", "localhost", "::1"}
    assert hosts("--host", "127.0.0.5") == {"127.0.0.1", "localhost", "::1", "127.0.0.5"}
    assert hosts("--api_key") is None and hosts("--host", "0.0.0.0") is None


@pytest.mark.slow
def test_idle_connections_keep_nobody_out(model: Path) -> None:
    """More than the process may have open files; who asks is answered, and the log says little."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard := resource.getrlimit(resource.RLIMIT_NOFILE)[1], hard))
    command = [sys.executable, str(ROOT / "serve.py"), "--model", str(model), "--port", "0", "--api_key"]
    script = "ulimit -n 1024; exec " + shlex.join(command)
    process = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/",
        env=os.environ | {"API_KEY": "k"},
    )  # fmt: skip
    address = next(line for line in process.stdout if line.startswith("Serving ")).split()[3]
    port = int(address.rsplit(":", 1)[1])
    crowd = []
    for data in (b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-a: "):
        for _ in range(1500):
            crowd.append(socket.create_connection(("127.0.0.1", port), timeout=10))
            crowd[-1].sendall(data)
        for _ in range(5):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/v1/models", headers={"Authorization": "Bearer k"})
            assert connection.getresponse().status == 200
    for connection in crowd:
        connection.close()
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and said.count("\n") < 10 and "Traceback" not in said


# ---------------------------------------------------------------------------------------------------------------------
# Load


@pytest.mark.slow
def test_a_hostile_crowd(url: str) -> None:
    """Many clients at once, a third of which go, others send what is no request: all get an answer or a reason."""
    bad = [b"{", b'{"message": 5}', b'{"message": "a", "n": -3}', b'{"message": "a", "temperature": 1e999}', b"\xff"]

    async def client(number: int) -> list[int]:
        statuses = []
        for turn in range(12):
            kind = (number + turn) % 6
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            body = bad[(number * 7 + turn) % len(bad)]
            if kind < 4:
                body = json.dumps({"message": f"问{number}", "stream": kind % 2 == 0, "max_tokens": 20}).encode()
            head = "POST /ai/llm/generation_stream HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            if kind < 2:
                await asyncio.sleep(0.05 * turn)
                writer.close()
                continue
            status = int((await asyncio.wait_for(reader.read(), 120)).split(b" ", 2)[1])
            statuses.append(status if kind < 4 else -status)
            writer.close()
        return statuses

    async def crowd() -> list[list[int]]:
        return await asyncio.gather(*[client(number) for number in range(32)])

    statuses = [status for found in asyncio.run(crowd()) for status in found]
    assert {status for status in statuses if status > 0} == {200}
    assert {status for status in statuses if status < 0} <= {-400, -422}
    status, _ = post(url, "/ai/llm/generation_stream", {"message": "a", "max_tokens": 1})
    assert status == 200
