"""Publishing with the real git, git-lfs and hub clients, to a repository and to small servers on this machine.

python -m pytest tests/test_utils_export_publish.py
"""

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from conftest import ROOT, LocalServer, another_writer, load_script, make_model

from utils.export import publish

CARD = "---\nlicense: mit\ntags:\n- llm-train-playground\n---\n# Tiny\n"
TOKEN = "secret" * 4
IDENTITY = {f"GIT_{who}_{what}": "tester@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def write_model(folder: Path, tokenizer: Any, shard_size: str, seed: int = 0) -> Path:
    """A finished model of random weights."""
    model = make_model("llama", len(tokenizer))
    model.model.norm.weight.data.fill_(1 + seed / 8)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    (folder / "run.json").write_text("{}")
    (folder / "README.md").write_text(CARD)
    (folder / ".hidden").write_text("stays here")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """`large` has several files of weights, `small`, another model, one."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "large", tokenizer, "150KB")
    write_model(folder / "small", tokenizer, "5GB", seed=1)
    assert len(list((folder / "large").glob("*.safetensors"))) > 2
    assert len(list((folder / "small").glob("*.safetensors"))) == 1
    return folder


@pytest.fixture
def model(models: Path, root: Path) -> Path:
    """output_hf/Tiny, as a conversion leaves it: the larger one."""
    return replace_model(models / "large", root / "output_hf/Tiny")


def replace_model(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


def contents(folder: Path) -> dict[str, bytes]:
    """What lies in a folder and is not hidden."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    shown = {name: path for name, path in paths.items() if not any(part.startswith(".") for part in name.parts)}
    return {name.as_posix(): path.read_bytes() for name, path in shown.items()}


@pytest.fixture(scope="module")
def convert() -> ModuleType:
    return load_script("convert_model.py")


def publishes(convert: ModuleType, *arguments: str) -> None:
    convert.main(convert.build_parser().parse_args(["--save_model", "Tiny", *arguments]))


def refusal(convert: ModuleType, *arguments: str) -> str:
    """What is said when publishing does not come about."""
    with pytest.raises(SystemExit) as stop:
        publishes(convert, *arguments)
    assert isinstance(stop.value.code, str) and "Traceback" not in stop.value.code
    return stop.value.code


# ---------------------------------------------------------------------------------------------------------------------
# With git


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a user who has git, git-lfs and no settings; the test fails or is skipped where git-lfs is not installed."""
    if shutil.which("git-lfs") is None:
        missing = "git-lfs is not installed: sudo apt-get install git-lfs"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    nothing = {"GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"), "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(tmp_path)}
    return kept | nothing | IDENTITY


def git(environment: dict[str, str], *arguments: str | Path) -> bytes:
    return subprocess.run(["git", *arguments], env=environment, check=True, capture_output=True).stdout


def new_clone(environment: dict[str, str], folder: Path, first: dict[str, str]) -> Path:
    """Makes folder/hub.git, with a first commit as a hub makes one, and a clone of it at folder/clone."""
    git(environment, "init", "--quiet", "--bare", "--initial-branch=main", folder / "hub.git")
    clone = folder / "clone"
    git(environment, "clone", "--quiet", f"file://{folder}/hub.git", clone)
    for name, text in first.items():
        (clone / name).write_text(text)
    if first:
        git(environment, "-C", clone, "add", "-A")
        git(environment, "-C", clone, "commit", "--quiet", "-m", "initial commit")
        git(environment, "-C", clone, "push", "--quiet")
    return clone


def printed_commands(capsys: Any) -> str:
    """The commands at the end of what was printed."""
    printed = capsys.readouterr().out
    return printed[printed.index("cd ") :]


def run_printed(environment: dict[str, str], commands: str) -> None:
    done = subprocess.run(["bash"], input=commands, env=environment, cwd="/", text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def read_anew(environment: dict[str, str], folder: Path, name: str) -> Path:
    """Clones as somebody does who has run `git lfs install`."""
    git(environment, "lfs", "install", "--skip-repo")
    git(environment, "clone", "--quiet", f"file://{folder}/hub.git", folder / name)
    (folder.parent / "gitconfig").unlink(missing_ok=True)
    Path(environment["GIT_CONFIG_GLOBAL"]).unlink(missing_ok=True)
    return folder / name


HUBS_FIRST_COMMIT = {
    ".gitattributes": "*.bin filter=lfs diff=lfs merge=lfs -text\n*.own filter=lfs diff=lfs merge=lfs -text",
    "README.md": "---\nlicense: mit\n---\n",
}


def test_what_is_cloned_is_what_was_laid_out(
    convert: ModuleType, model: Path, models: Path, root: Path, environment: dict[str, str], capsys: Any
) -> None:
    """Twice: the second model has fewer files of weights. The printed commands run as they are."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    clone = new_clone(environment, root, HUBS_FIRST_COMMIT)
    publishes(convert, "--publish_dir", "clone")
    run_printed(environment, printed_commands(capsys))
    reader = read_anew(environment, root, "first")
    assert contents(reader) == contents(model) and not (reader / ".hidden").exists()
    loaded = AutoModelForCausalLM.from_pretrained(reader).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in expected.items())
    assert AutoTokenizer.from_pretrained(reader).chat_template

    attributes = (reader / ".gitattributes").read_text().splitlines()
    assert attributes[:2] == HUBS_FIRST_COMMIT[".gitattributes"].splitlines() and len(attributes) == 2 + 4
    for name in [*(path.name for path in model.glob("*.safetensors")), "tokenizer.json"]:
        data = (model / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        pointer = git(environment, "-C", root / "hub.git", "cat-file", "-p", f"main:{name}").decode()
        assert pointer.startswith("version https://git-lfs") and f"oid sha256:{digest}\nsize {len(data)}\n" in pointer
        assert (root / f"hub.git/lfs/objects/{digest[:2]}/{digest[2:4]}/{digest}").read_bytes() == data
    plain = git(environment, "-C", root / "hub.git", "cat-file", "-p", "main:config.json")
    assert plain == (model / "config.json").read_bytes()

    replace_model(models / "small", model)
    publishes(convert, "--publish_dir", str(clone))
    commands = printed_commands(capsys)
    run_printed(environment, commands)
    assert contents(read_anew(environment, root, "second")) == contents(model)
    assert "model.safetensors" in contents(model) and not list(clone.glob("*-of-*"))
    # Once more: nothing is written, nothing to commit, and no error.
    before = {path: path.stat().st_mtime_ns for path in clone.glob("*") if path.is_file()}
    publishes(convert, "--publish_dir", str(clone))
    assert "0 are new or changed" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in clone.glob("*") if path.is_file()}
    run_printed(environment, commands)
    assert git(environment, "-C", root / "hub.git", "rev-list", "--count", "main") == b"3\n"


def test_what_an_earlier_model_left_is_not_published(
    convert: ModuleType, model: Path, root: Path, environment: dict[str, str], capsys: Any
) -> None:
    """An adapter's settings would be followed to a base that is not there, other tokenizers' files would be read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mine = {"notes.txt": "mine", "model-Q4_K_M.gguf": "mine"}
    left = {
        "adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "gone/away"}',
        "special_tokens_map.json": '{"eos_token": "<|im_start|>"}',
        "added_tokens.json": '{"[extra]": 800}',
        "old-q8_0.gguf": "old",
        "Modelfile": "FROM ./old-q8_0.gguf",
    }
    new_clone(environment, root, HUBS_FIRST_COMMIT | mine | left)
    publishes(convert, "--publish_dir", "clone")
    printed = capsys.readouterr().out
    assert all(f"Removed clone/{name}, which an earlier model left." in printed for name in left)
    run_printed(environment, printed.partition("Then:\n\n")[2])
    reader = read_anew(environment, root, "anew")
    assert contents(reader) == contents(model) | {name: text.encode() for name, text in mine.items()}
    assert AutoModelForCausalLM.from_pretrained(reader).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(reader).eos_token == AutoTokenizer.from_pretrained(model).eos_token


def test_an_empty_repository_at_a_path_with_spaces(
    convert: ModuleType, model: Path, root: Path, environment: dict[str, str], capsys: Any
) -> None:
    folder = root / "it's a place"
    folder.mkdir()
    new_clone(environment, folder, {})
    publishes(convert, "--publish_dir", "it's a place/clone")
    run_printed(environment, printed_commands(capsys))
    assert contents(read_anew(environment, folder, "anew")) == contents(model)


def test_a_push_that_failed_is_made_up_for(
    convert: ModuleType, model: Path, root: Path, environment: dict[str, str], capsys: Any
) -> None:
    """The commit is there already when the commands are pasted again."""
    new_clone(environment, root, HUBS_FIRST_COMMIT)
    publishes(convert, "--publish_dir", "clone")
    commands = printed_commands(capsys)
    (root / "hub.git").rename(root / "away")
    assert subprocess.run(["bash", "-c", commands], env=environment, capture_output=True).returncode != 0
    (root / "away").rename(root / "hub.git")
    run_printed(environment, commands)
    assert contents(read_anew(environment, root, "anew")) == contents(model)


def test_without_git_lfs_nothing_is_committed(
    convert: ModuleType, model: Path, root: Path, environment: dict[str, str], capsys: Any
) -> None:
    """Weights in plain git would have to be cut out of its history again."""
    clone = new_clone(environment, root, HUBS_FIRST_COMMIT)
    publishes(convert, "--publish_dir", "clone")
    (root / "bin").mkdir()
    (root / "bin/git").symlink_to(shutil.which("git"))
    (root / "exec").mkdir()
    for path in Path(git(environment, "--exec-path").decode().strip()).iterdir():
        if "lfs" not in path.name:
            (root / "exec" / path.name).symlink_to(path)
    without = environment | {"PATH": str(root / "bin"), "GIT_EXEC_PATH": str(root / "exec")}
    bash = shutil.which("bash")
    done = subprocess.run([bash], input=printed_commands(capsys), env=without, text=True, capture_output=True)
    assert done.returncode != 0 and "'lfs' is not a git command" in done.stderr
    assert git(environment, "-C", clone, "rev-list", "--count", "HEAD") == b"1\n"
    assert not git(environment, "-C", clone, "diff", "--cached", "--name-only")


def test_a_completed_card_stays(
    convert: ModuleType, model: Path, root: Path, environment: dict[str, str], capsys: Any
) -> None:
    clone = new_clone(environment, root, HUBS_FIRST_COMMIT)
    publishes(convert, "--publish_dir", "clone")
    assert (clone / "README.md").read_text() == CARD, "the hub's own first one is replaced"
    assert "Kept" not in capsys.readouterr().out
    for text in ("---\nlicense: mit\n---\n# My model\n", "My model\n"):
        (clone / "README.md").write_text(text)
        publishes(convert, "--publish_dir", "clone")
        assert (clone / "README.md").read_text() == text, "nothing of ours, but somebody's words"
    (clone / "README.md").write_text(CARD + "Written by hand.\n")
    publishes(convert, "--publish_dir", "clone")
    assert (clone / "README.md").read_text() == CARD + "Written by hand.\n"
    printed = capsys.readouterr().out
    take = next(line for line in printed.splitlines() if "to take it: " in line).partition("to take it: ")[2]
    subprocess.run(["bash", "-c", take], check=True)
    assert (clone / "README.md").read_text() == CARD


def test_what_is_no_clone(
    convert: ModuleType, model: Path, root: Path, environment: dict[str, str], monkeypatch: Any
) -> None:
    (root / "plain").mkdir()
    clone = new_clone(environment, root, HUBS_FIRST_COMMIT)
    (clone / "sub").mkdir()
    before = contents(clone)
    for folder, says in {
        "plain": "plain is no git clone",
        "nowhere": "there is no folder nowhere",
        "hub.git": "hub.git is no git clone",
        "clone/sub": "clone/sub is a folder of the git clone clone",
    }.items():
        message = refusal(convert, "--publish_dir", folder)
        assert says in message and f"git clone https://huggingface.co/ORG/NAME {root / folder}" in message
    for folder in (".", "model"):  # The project's own repository, and a folder in it.
        git(environment, "init", "--quiet", root)
        (root / "model").mkdir(exist_ok=True)
        assert "belongs to this project's own repository" in refusal(convert, "--publish_dir", folder)
    assert contents(clone) == before and not contents(root / "plain")
    publishes(convert, "--publish_dir", "clone")  # A repository of its own inside it is one.
    monkeypatch.setenv("PATH", str(root))
    assert "apt-get install git git-lfs" in refusal(convert, "--publish_dir", "clone")


def test_a_file_that_git_would_leave_out(
    convert: ModuleType, model: Path, root: Path, environment: dict[str, str], capsys: Any
) -> None:
    new_clone(environment, root, HUBS_FIRST_COMMIT | {".gitignore": "*.safetensors\n"})
    message = refusal(convert, "--publish_dir", "clone")
    assert "git would leave out model-00001" in message and "git add" not in capsys.readouterr().out
    command = message.partition("To see which: ")[2]
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert ".gitignore:1:*.safetensors" in said


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from utils.export import publish

def copy(source, target, whole=shutil.copyfile):
    if str(source).endswith(sys.argv[3]):
        Path(target).write_bytes(Path(source).read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
    whole(source, target)

shutil.copyfile = copy
publish.lay_out(Path(sys.argv[1]), Path(sys.argv[2]))
"""


LAID_OUT = """
import sys
from pathlib import Path
from utils.export import publish

publish.lay_out(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_kill_leaves_no_half_file(
    model: Path, models: Path, root: Path, environment: dict[str, str], capsys: Any
) -> None:
    clone = new_clone(environment, root, HUBS_FIRST_COMMIT)
    publish.lay_out(models / "small", clone)
    allowed = [contents(models / "small"), contents(model)]
    (clone / "additional_chat_templates/tools.jinja").unlink()
    for file in ("tools.jinja", sorted(model.glob("*.safetensors"))[1].name, "model.safetensors.index.json"):
        command = [sys.executable, "-c", KILLED, str(model), str(clone), file]
        finished = subprocess.run(command, cwd=ROOT, capture_output=True)
        assert finished.returncode == -signal.SIGKILL, finished.stderr
        halves = [path.name for path in clone.rglob(".*.partial")]
        assert halves == [f".{file}.partial"]
        assert all(data in [files.get(name) for files in allowed] for name, data in contents(clone).items())
    (clone / ".model-00009-of-00009.safetensors.partial").write_bytes(b"half")  # A kill's, when there were more files.
    publish.lay_out(model, clone)
    assert contents(clone) == contents(model)
    assert not [path for path in clone.rglob(".*") if path.suffix in (".partial", ".lock")]


def test_what_a_link_leads_to_is_not_published(model: Path, root: Path, environment: dict[str, str]) -> None:
    """git itself does not read a .gitattributes that is a link."""
    clone = new_clone(environment, root, HUBS_FIRST_COMMIT)
    (root / "key").write_text("secret\n")
    (clone / ".gitattributes").unlink()
    (clone / ".gitattributes").symlink_to(root / "key")
    publish.lay_out(model, clone)
    assert not (clone / ".gitattributes").is_symlink() and "secret" not in (clone / ".gitattributes").read_text()
    assert (root / "key").read_text() == "secret\n"


def test_a_model_that_is_being_written_is_not_published(
    convert: ModuleType, model: Path, root: Path, environment: dict[str, str]
) -> None:
    clone = new_clone(environment, root, HUBS_FIRST_COMMIT)
    with another_writer(model):
        assert refusal(convert, "--publish_dir", str(clone)).startswith("Another process is writing output_hf/Tiny.")
    assert set(contents(clone)) == {"README.md"}
    publishes(convert, "--publish_dir", str(clone))
    assert contents(clone) == contents(model)


def test_two_into_one_clone(
    model: Path, models: Path, root: Path, environment: dict[str, str], monkeypatch: Any
) -> None:
    clone = new_clone(environment, root, HUBS_FIRST_COMMIT)
    copy, tried = shutil.copyfile, []

    def second(source: Path, target: Path) -> None:
        command = [sys.executable, "-c", LAID_OUT, str(models / "small"), str(clone)]
        tried.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True))
        copy(source, target)
        monkeypatch.setattr(shutil, "copyfile", copy)

    monkeypatch.setattr(shutil, "copyfile", second)
    publish.lay_out(model, clone)
    assert tried[0].returncode == 1 and tried[0].stderr.startswith("Another process is writing")
    assert contents(clone) == contents(model)


def test_large_files_and_a_full_disk(model: Path, root: Path, monkeypatch: Any, tmp_path: Path) -> None:
    """A file over the hub's limit goes to git-lfs whatever it is called; over 5 GB it has to be sent in parts."""
    clone = tmp_path / "a clone"
    clone.mkdir()
    (clone / "mine.png").write_text("mine")
    (model / "merges and more.txt").write_bytes(b"x" * 2000)
    assert "largefiles" not in publish.git_commands(model, clone)
    monkeypatch.setattr(publish, "PLAIN_BYTES", 2000)
    monkeypatch.setattr(publish, "ONE_PIECE_BYTES", 100_000)
    publish.lay_out(model, clone)
    commands = publish.git_commands(model, clone)
    first = [f"cd '{clone}' &&", "git lfs install --local &&", "hf lfs-enable-largefiles . &&"]
    assert commands.splitlines()[:3] == first
    attributes = (clone / ".gitattributes").read_text()
    assert "merges[[:space:]]and[[:space:]]more.txt filter=lfs" in attributes and "config.json" not in attributes
    publish.lay_out(model, clone)
    assert (clone / ".gitattributes").read_text() == attributes and (clone / "mine.png").is_file()
    subprocess.run(["git", "init", "--quiet", str(clone)], check=True)
    asked = ["git", "-C", str(clone), "check-attr", "filter", "--", "merges and more.txt", "config.json"]
    attributed = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    assert attributed == "merges and more.txt: filter: lfs\nconfig.json: filter: unspecified\n"
    if shutil.which("hf"):  # The command that is printed is one.
        subprocess.run(["hf", "lfs-enable-largefiles", "."], cwd=clone, check=True, capture_output=True)
        configured = ["git", "-C", str(clone), "config", "lfs.customtransfer.multipart.path"]
        assert subprocess.run(configured, check=True, capture_output=True, text=True).stdout == "hf\n"

    (model / "config.json").write_text("{} ")
    usage = shutil.disk_usage(clone)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5))
    before = contents(clone)
    with pytest.raises(SystemExit, match="0.00 GB are free. Make room"):
        publish.lay_out(model, clone)
    assert contents(clone) == before


# ---------------------------------------------------------------------------------------------------------------------
# Without git


class Hub(LocalServer):
    """Keeps what it is sent, as both hubs do.

    Attributes:
        repos: Files by repository and name.
        made: What was asked for when a repository was made.
        blobs: Large files by their SHA-256.
        asked: (method, path, whether the token came along) of every request.
        refuse: Status of the answer to everything that writes, where set.
        errors: What is wrong with every model card.
    """

    def __init__(self) -> None:
        super().__init__(Answer)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.made: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, bool]] = []
        self.refuse = 0
        self.errors: list[dict[str, str]] = []


class Answer(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        path = unquote(url.path)
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        known = self.headers["Authorization"] == f"Bearer {TOKEN}"
        known |= path.startswith("/api/v1/") and self.headers["Cookie"] == f"m_session_id={TOKEN}"
        hub.asked.append((self.command, path, known))
        if hub.refuse and self.command in ("POST", "PUT") and path != "/api/validate-yaml":
            # What some gateways do: they repeat what they were sent.
            return self.reply(hub.refuse, {"error": f"no, {TOKEN}", "Message": f"no, {TOKEN}"})
        if path.startswith("/blobs/") and self.command == "PUT":
            hub.blobs[path.removeprefix("/blobs/")] = self.body
            return self.reply(200, {})
        if path.startswith(("/api/v1/", "/openapi/v1/")):
            return self.modelscope(path.partition("/v1/")[2], parse_qs(url.query))
        return self.huggingface(path)

    def huggingface(self, path: str) -> None:
        hub = self.server
        if path == "/api/repos/create":
            asked = json.loads(self.body)
            hub.made.append(asked)
            repo = f"{asked['organization']}/{asked['name']}"
            hub.repos[repo] = {".gitattributes": b"", "README.md": b"---\nlicense: mit\n---\n"}
            return self.reply(200, {"url": f"{hub.url}/{repo}"})
        if path == "/api/validate-yaml":
            return self.reply(400 if hub.errors else 200, {"errors": hub.errors})
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if repo not in hub.repos:
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files = hub.repos[repo]
        if path == f"/api/models/{repo}":
            return self.reply(200, {"id": repo, "sha": "c0ffee" * 6 + "beef", "siblings": []})
        if path == f"/api/models/{repo}/tree/main":
            return self.reply(200, [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in files.items()])
        if path == f"/{repo}/resolve/main/README.md":
            headers = {"ETag": hashlib.sha256(files["README.md"]).hexdigest(), "X-Repo-Commit": "c0ffee" * 6 + "beef"}
            return self.reply(200, files["README.md"], headers)
        if path == f"/api/models/{repo}/preupload/main":
            asked = json.loads(self.body)["files"]
            for file in asked:
                is_large = file["path"].endswith((".safetensors", "tokenizer.json"))
                file |= {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            return self.reply(200, {"files": asked})
        if path == f"/{repo}.git/info/lfs/objects/batch":
            return self.reply(200, {"transfer": "basic", "objects": self.wanted_blobs()})
        if path == f"/api/models/{repo}/commit/main":
            for line in map(json.loads, self.body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            return self.reply(200, {"commitUrl": f"{hub.url}/{repo}/commit/1", "commitOid": "1"})
        return self.reply(404, {"error": path})

    def modelscope(self, path: str, query: dict[str, list[str]]) -> None:
        hub = self.server
        if path == "models":
            asked = json.loads(self.body)
            hub.made.append(asked)
            repo = f"{asked['Path']}/{asked['Name']}"
            if repo in hub.repos:
                return self.reply(400, {"Code": 400, "Success": False, "Message": "it exists"})
            hub.repos[repo] = {"README.md": b"---\nlicense: Apache\n---\n"}
            return self.reply(200, {"Code": 200, "Success": True, "Data": asked})
        repo = "/".join(path.removeprefix("repos/").split("/")[1:3])
        if repo not in hub.repos:
            return self.reply(404, {"Code": 404, "Success": False, "Message": "not found"})
        files, what = hub.repos[repo], path.partition(f"models/{repo}")[2]
        if what == "":
            return self.reply(200, {"Code": 200, "Success": True, "Data": {"Path": repo, "Name": repo}})
        if what == "/repo/files":
            listed = [
                {"Path": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.reply(200, {"Code": 200, "Success": True, "Data": {"Files": listed}})
        if what == "/repo":
            return self.reply(200, files[query["FilePath"][0]])
        if what == "/info/lfs/objects/batch":
            return self.reply(200, {"Code": 200, "Success": True, "Data": {"objects": self.wanted_blobs()}})
        if what == "/commit/master":
            for action in json.loads(self.body)["actions"]:
                name = action["path"]
                if action["action"] == "delete":
                    del files[name]
                else:
                    is_blob = action["type"] == "lfs"
                    files[name] = hub.blobs[action["sha256"]] if is_blob else base64.b64decode(action["content"])
            return self.reply(200, {"Code": 200, "Success": True, "Data": {}})
        return self.reply(404, {"Code": 404, "Success": False, "Message": path})

    def wanted_blobs(self) -> list[dict[str, Any]]:
        """Says where those of the named large files go that are not here."""
        objects = json.loads(self.body)["objects"]
        for blob in objects:
            if blob["oid"] not in self.server.blobs:
                blob["actions"] = {"upload": {"href": f"{self.server.url}/blobs/{blob['oid']}"}}
        return objects

    def reply(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """Both hubs, and a user who is logged in to neither."""
    server = Hub()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    constants = "huggingface_hub.constants"  # Read once, when the client is imported.
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(tmp_path / "hf_token"))
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)  # Its storage is no server of a test's.
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms_cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


VARIABLES = {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}
HUBS = pytest.mark.parametrize("which", VARIABLES)


def stored(hub: Hub) -> dict[str, bytes]:
    return {name: data for name, data in hub.repos["me/tiny"].items() if not name.startswith(".")}


@HUBS
def test_what_the_hub_has_is_the_folder(
    convert: ModuleType, model: Path, models: Path, hub: Hub, monkeypatch: Any, capfd: Any, which: str
) -> None:
    monkeypatch.setenv(VARIABLES[which], TOKEN)
    before = sorted(model.rglob("*"))
    publishes(convert, "--push", "me/tiny", "--hub", which)
    assert stored(hub) == contents(model)
    (asked,) = hub.made
    if which == "huggingface":
        assert asked["visibility"] == "private" and (asked["organization"], asked["name"]) == ("me", "tiny")
    else:
        assert (asked["Path"], asked["Name"], asked["Visibility"], asked["License"]) == ("me", "tiny", 1, "MIT")
    assert len(hub.blobs) == len(list(model.glob("*.safetensors"))) + (which == "huggingface")
    # Addresses of large files are signed, and need no token; everything else does.
    assert all(known for _, path, known in hub.asked if not path.startswith("/blobs/"))
    assert sorted(model.rglob("*")) == before, "nothing is left among the model's files"
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err
    page = f"{hub.url}/{'models/' if which == 'modelscope' else ''}me/tiny"
    assert printed.out.endswith(f"Published: {page} (new, private)\n") and printed.out.count("\n") == 2

    replace_model(models / "small", model)
    hub.repos["me/tiny"]["picture.png"] = b"mine"
    hub.repos["me/tiny"]["onnx/other.safetensors"] = b"mine"
    hub.repos["me/tiny"]["adapter_config.json"] = b"{}"
    publishes(convert, "--push", "me/tiny", "--hub", which, "--public", "True")
    assert stored(hub) == contents(model) | {"picture.png": b"mine", "onnx/other.safetensors": b"mine"}
    printed = capfd.readouterr().out
    assert len(hub.made) == 1 and "who may see it has not changed" in printed
    assert "which an earlier model left: adapter_config.json, " in printed

    hub.repos["me/tiny"]["README.md"] = (CARD + "Written by hand.\n").encode()
    publishes(convert, "--push", "me/tiny", "--hub", which)
    assert stored(hub)["README.md"].endswith(b"Written by hand.\n")
    assert "Kept the hub's model card" in capfd.readouterr().out


@HUBS
def test_a_public_repository_has_to_be_asked_for(
    convert: ModuleType, model: Path, hub: Hub, monkeypatch: Any, capfd: Any, which: str
) -> None:
    monkeypatch.setenv(VARIABLES[which], f"{TOKEN}\n")
    publishes(convert, "--push", "me/tiny", "--hub", which, "--public", "True")
    (asked,) = hub.made
    assert asked.get("visibility", asked.get("Visibility")) in ("public", 5)
    assert "(new, public)" in capfd.readouterr().out and stored(hub) == contents(model)


@HUBS
@pytest.mark.parametrize(
    ("status", "says"),
    [(400, "no, ***"), (401, "the token is not accepted"), (403, "may not write"), (404, "nothing is there")],
)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "there"])
def test_a_hub_that_refuses(
    convert: ModuleType, model: Path, hub: Hub, monkeypatch: Any, capfd: Any, which: str, status: int, says: str,
    exists: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv(VARIABLES[which], TOKEN)
    if exists:
        hub.repos["me/tiny"] = {}
    hub.refuse = status
    message = refusal(convert, "--push", "me/tiny", "--hub", which)
    assert message.startswith(f"Could not publish to {hub.url}") and says in message
    printed = capfd.readouterr()
    assert TOKEN not in message + printed.out + printed.err and "Published" not in printed.out
    assert not hub.repos.get("me/tiny")


def test_a_card_that_the_hub_refuses_and_a_stop(
    convert: ModuleType, model: Path, hub: Hub, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.errors = [{"message": '"license" must be one of mit, other'}]
    message = refusal(convert, "--push", "me/tiny")
    assert '"license" must be one of mit, other' in message and "Run it again" not in message

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", stop)
    assert "Stopped. Run it again" in refusal(convert, "--push", "me/tiny")


@HUBS
def test_what_is_wrong_before_a_hub_is_asked(
    convert: ModuleType, model: Path, hub: Hub, monkeypatch: Any, which: str
) -> None:
    arguments = ["--hub", which, "--push"]
    message = refusal(convert, *arguments, "me/tiny")
    assert f"read -rs {VARIABLES[which]} && export {VARIABLES[which]}" in message and "login" in message
    monkeypatch.setenv(VARIABLES[which], TOKEN)
    for name in ("tiny", "a/b/c", "../b", "a/..", "a/b c", "-x/y", "名/字"):
        assert "expected ORG/NAME" in refusal(convert, "--hub", which, f"--push={name}")
    assert not hub.asked
    endpoint = "HF_ENDPOINT" if which == "huggingface" else "MODELSCOPE_ENDPOINT"
    monkeypatch.setenv(endpoint, "hub.example.com")
    assert f"{endpoint} must be an address" in refusal(convert, *arguments, "me/tiny")
    monkeypatch.setenv(endpoint, "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)  # ModelScope's client tries for 16 seconds.
    message = refusal(convert, *arguments, "me/tiny")
    assert "Could not publish to http://127.0.0.1:9/" in message and TOKEN not in message


def test_the_token_of_a_log_in_is_found(convert: ModuleType, model: Path, hub: Hub, tmp_path: Path) -> None:
    from modelscope_hub.config import HubConfig

    (tmp_path / "hf_token").write_text(TOKEN)
    publishes(convert, "--push", "me/tiny")
    HubConfig().save_token(TOKEN)
    hub.repos.clear()
    publishes(convert, "--push", "me/tiny", "--hub", "modelscope")
    assert stored(hub) == contents(model)


# ---------------------------------------------------------------------------------------------------------------------
# The command line, and the card


def test_arguments_that_do_not_go_together(convert: ModuleType, model: Path) -> None:
    assert "Nothing to do" in refusal(convert)
    assert refusal(convert, "--t", "1") == "To convert, --t needs --zero_model and --org_model too."
    half = ["--zero_model", "x", "--org_model", "y", "--publish_dir", "z"]
    assert refusal(convert, *half) == "To convert, --zero_model and --org_model needs --t too."
    assert "--hub and --public are of --push" in refusal(convert, "--publish_dir", "z", "--public", "True")
    message = refusal(convert, "--publish_dir", "z", "--save_model", "none")
    assert "no model at output_hf/none" in message and "There are: output_hf/Tiny." in message
    assert "--save_model" in refusal(convert, "--publish_dir", "z", "--save_model", "../x")
    with pytest.raises(SystemExit) as stop:
        publishes(convert, "--publish_dir", "z", "--push", "a/b")
    assert stop.value.code == 2
    (model / "config.json").unlink()
    assert "no model at output_hf/Tiny" in refusal(convert, "--publish_dir", "z")


def video(title: str, parent: str = "") -> str:
    """A prompt as show_replies reads it back: the template's words around it."""
    answered = f"\n父评论：{parent}" if parent else ""
    return f"system\n你是一名B站用户\nuser\n视频标题：{title}\n视频简介：someone@example.com{answered}\nassistant\n"


ODD = "``` | <b>x</b>\n````\n# not a heading"
ROWS = [
    {"step": 0, "prompt": video("一"), "reply": "too early", "real": "真"},
    {"step": 3, "prompt": video("一"), "reply": "first", "real": "the real one"},
    {"step": 3, "prompt": video("一"), "reply": "first ", "real": "another real one"},
    {"step": 3, "prompt": video("二", "what somebody said"), "reply": "answered", "real": "真"},
    {"step": 3, "prompt": video("三"), "reply": "so: learnt by heart!", "real": "learnt by heart"},
    {"step": 3, "prompt": "user\nmy own data\nassistant\n", "reply": "own", "real": ""},
    {"step": 3, "prompt": video("四"), "reply": ODD, "real": ""},
    *({"step": 3, "prompt": video("五"), "reply": f"more {number}", "real": "真"} for number in range(4)),
    {"step": 4, "prompt": video("一"), "reply": "too late", "real": "真"},
]
RECORD = {"settings": {"lr": 1}, "progress": {"step": 3}}


def write_samples(run: Path, rows: list[dict[str, Any]]) -> None:
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps({"settings": {"lr": 1}}))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (run / "samples.jsonl").write_text(text, encoding="utf-8")


def test_samples_of_the_card(convert: ModuleType, tmp_path: Path) -> None:
    write_samples(tmp_path, ROWS)
    samples = convert.sample_replies(tmp_path, RECORD)
    assert samples == ["视频标题：一\nfirst", f"视频标题：四\n{ODD}", "视频标题：五\nmore 0", "视频标题：五\nmore 1"]
    section = convert.sample_section(samples)
    lines = section.splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("`````")]
    assert [lines[number] for number in fences] == ["`````text", "`````"] * 4
    inside = [lines[begin + 1 : end] for begin, end in zip(fences[::2], fences[1::2], strict=True)]
    assert ["\n".join(part) for part in inside] == samples


@pytest.mark.parametrize(
    "change",
    [
        lambda run: write_samples(run, ROWS[:1] + ROWS[3:6]),
        lambda run: (run / "samples.jsonl").unlink(),
        lambda run: (run / "run.json").unlink(),
        lambda run: (run / "run.json").write_text('{"settings": {"lr": 2}}'),
        lambda run: (run / "samples.jsonl").write_text('{"broken\n'),
        lambda run: (run / "samples.jsonl").write_text('{"step": 3}\n[]\n'),
    ],
    ids=["none that may be shown", "no file", "no record", "another run's", "broken", "other contents"],
)
def test_a_card_without_samples(convert: ModuleType, tmp_path: Path, change: Any) -> None:
    write_samples(tmp_path, ROWS)
    change(tmp_path)
    assert convert.sample_section(convert.sample_replies(tmp_path, RECORD)) == ""


@pytest.mark.parametrize(("base", "named"), [("model/tiny/llama", "tiny/llama"), ("llama-2-7b", None), ("a/b", None)])
def test_a_merged_models_card_is_one_that_hubs_take(base: str, named: str | None) -> None:
    """Hugging Face refuses a card whose base is no ORG/NAME."""
    from argparse import Namespace

    from huggingface_hub import ModelCard

    record = {"base_model": base, "merged_into": "own", "adapters": {}}
    merge = load_script("merge_qlora.py")
    card = ModelCard(merge.merge_card(Namespace(save_path="output_hf/x"), record, ["same"], {"license": "mit"}))
    assert card.data.base_model == named and card.data.license == "mit" and "llm-train-playground" in card.data.tags
    assert f"\n{base}, its weights own" in card.text


@pytest.mark.slow
def test_from_training_to_the_hub(
    convert: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, root: Path, hub: Hub, monkeypatch: Any
) -> None:
    """One command converts and publishes; the card says all that it should, and no file a path of this machine."""
    base = root / "model/tiny/qwen2"
    shutil.copytree(model_dir / "tiny/qwen2", base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    (base / "LICENSE").write_text("the licence")
    ft.main(ft.build_parser().parse_args(train_args(model_dir=root / "model", output_dir=root / "output")))
    run = root / "output/DS-tiny/qwen2"
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = ["--zero_model", str(run), "--org_model", str(base), "--t", "1"]
    publishes(convert, *arguments, "--push", "me/tiny")
    assert stored(hub) == contents(root / "output_hf/Tiny") and "LICENSE" in stored(hub)
    card = stored(hub)["README.md"].decode()
    facts = ["license: other", "license_name: own", "license_link: LICENSE", "base_model: tiny/qwen2"]
    record = json.loads((run / "1/run.json").read_text())
    digests = [digest[:12] for digest in record["data"]["files"].values()]
    settings = ["| lr | 0.01 |", "| lora_r | 16 |", "| batch_size | 4 |"]
    loss = f"the lowest held-out loss was {record['progress']['best_eval_loss']:.4f}"
    assert all(part in card for part in [*facts, *digests, *settings, loss])
    shown = [row for row in rows if row["step"] == record["progress"]["step"] and "父评论" not in row["prompt"]]
    assert shown and "视频标题：第12个视频" in card and "父评论" not in card
    assert all(row["real"] not in card for row in rows)
    for name, data in stored(hub).items():
        assert str(root).encode() not in data and str(model_dir).encode() not in data, name
