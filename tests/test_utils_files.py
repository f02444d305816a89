"""utils/files.py: results appear whole or not at all, and damage is noticed.

python -m pytest tests/test_utils_files.py
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from utils.files import (
    atomic_write,
    check_manifest,
    create_once,
    exclusive_lock,
    from_root,
    missing_model,
    sha256,
    shown,
    write_manifest,
    write_problem,
)

KINDS = ("file", "folder", "symlink")


def put(path: Path, kind: str, text: str) -> None:
    """Makes a file, a folder with a file, or a symbolic link to a folder."""
    if kind == "file":
        path.write_text(text)
    elif kind == "folder":
        (path / "inner").mkdir(parents=True)
        (path / "inner/file").write_text(text)
    else:
        target = path.parent / f"target-{text}"
        target.mkdir(exist_ok=True)
        (target / "file").write_text(text)
        path.symlink_to(target.name)


def content(path: Path) -> str | None:
    """What `put` wrote there."""
    if path.is_symlink():
        return (path / "file").read_text()
    if path.is_dir():
        assert [str(file.relative_to(path)) for file in path.rglob("*")] == ["inner", "inner/file"]
        return (path / "inner/file").read_text()
    return path.read_text() if path.exists() else None


def beside(path: Path) -> list[str]:
    """What stands in the folder apart from the path and the links' targets."""
    return [other.name for other in path.parent.iterdir() if other != path and not other.name.startswith("target-")]


def test_from_root_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert from_root("data/x.json") == ROOT / "data/x.json"
    assert from_root(tmp_path / "x") == tmp_path / "x"
    assert from_root("~/x") == tmp_path / "home/x"
    assert shown(ROOT / "data/x.json") == "data/x.json"
    assert shown(tmp_path / "x") == str(tmp_path / "x")


def test_missing_model_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "org/near").mkdir(parents=True)
    assert "There are" not in missing_model(tmp_path, "org/name")
    (tmp_path / "org/near/config.json").touch()
    message = missing_model(tmp_path, "org/name")
    assert str(tmp_path / "org/name") in message and "There are: org/near." in message
    assert message.endswith("python download_pt.py --model org/name")


# No script puts a folder where a file or a link was.
@pytest.mark.parametrize(
    ("old", "kind"), [(o, kind) for o in (None, *KINDS) for kind in KINDS if kind != "folder" or o in (None, kind)]
)
def test_replacing(tmp_path: Path, kind: str, old: str | None) -> None:
    path = tmp_path / "deep/er/name.x"
    if old:
        path.parent.mkdir(parents=True)
        put(path, old, "old")
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent and not temporary.exists()
        put(temporary, kind, "new")
        assert content(path) == ("old" if old else None), "nothing is seen before the end"
    assert content(path) == "new" and path.is_symlink() == (kind == "symlink")
    assert beside(path) == []


@pytest.mark.parametrize("old", [None, *KINDS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old(tmp_path: Path, kind: str, old: str | None, error: type[BaseException]) -> None:
    path = tmp_path / "name"
    if old:
        put(path, old, "old")
    with pytest.raises(error), atomic_write(path) as temporary:
        put(temporary, kind, "half")
        raise error
    assert content(path) == ("old" if old else None)
    assert beside(path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_writes_nothing_leaves_the_old(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "name", kind, "old")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "name"):
        pass
    assert content(tmp_path / "name") == "old"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_leaves_the_old_and_is_cleaned_up(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "name"
    put(path, kind, "old")
    program = (
        "import sys, os, signal; from pathlib import Path; from utils.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as temporary:\n"
        "    temporary.mkdir(); (temporary / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert content(path) == "old" and sorted(beside(path)) == [".name.lock", ".name.partial"]
    with atomic_write(path) as temporary:
        put(temporary, kind, "new")
    assert content(path) == "new" and beside(path) == []


def test_a_kill_between_the_two_moves_of_a_folder_is_cleaned_up(tmp_path: Path) -> None:
    """Killed when the old folder was aside and the new one not yet in its place."""
    path = tmp_path / "name"
    put(tmp_path / ".name.old", "folder", "old")
    put(tmp_path / ".name.partial", "folder", "new")
    with atomic_write(path) as temporary:
        put(temporary, "folder", "newer")
    assert content(path) == "newer" and beside(path) == []


def test_replacing_waits_for_another_process_and_then_says_so(tmp_path: Path) -> None:
    """The other's work comes to its end as if nobody had asked."""
    path = tmp_path / "name"
    program = (
        "import sys, time; from pathlib import Path; from utils.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as temporary:\n"
        "    temporary.mkdir(); print('at work', flush=True); sys.stdin.readline(); (temporary / 'inner').mkdir()\n"
        "    (temporary / 'inner/file').write_text('theirs')\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "at work\n"
    with pytest.raises(SystemExit, match="Another process is writing .*name"), atomic_write(path) as temporary:
        put(temporary, "folder", "ours")
    with pytest.raises(SystemExit, match="Another process is writing"), exclusive_lock(path):
        pass
    other.communicate("go on\n")
    assert other.returncode == 0 and content(path) == "theirs" and beside(path) == []
    with atomic_write(path) as temporary:
        put(temporary, "folder", "ours")
    assert content(path) == "ours" and beside(path) == []


def test_blocks_for_one_place_may_stand_in_one_another(tmp_path: Path) -> None:
    with (
        exclusive_lock(tmp_path / "name"),
        exclusive_lock(tmp_path / "name"),
        atomic_write(tmp_path / "name") as temporary,
    ):
        temporary.write_text("new")
    assert content(tmp_path / "name") == "new" and beside(tmp_path / "name") == []


def test_many_processes_write_one_after_the_other(tmp_path: Path) -> None:
    """Who waits for a lock whose file is removed makes another, and nobody is in it together with somebody else."""
    program = (
        "import sys; from pathlib import Path; from utils.files import exclusive_lock\n"
        "path = Path(sys.argv[1])\n"
        "for _ in range(100):\n"
        "    with exclusive_lock(path, wait_sec=-1):\n"
        "        path.write_text(str(int(path.read_text()) + 1))\n"
    )
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", program, str(tmp_path / "count")]
    others = [subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) for _ in range(4)]
    assert [other.wait() for other in others] == [0] * 4
    assert (tmp_path / "count").read_text() == "400" and beside(tmp_path / "count") == []


# ---------------------------------------------------------------------------------------------------------------------
# Made once


def make_folder(path: Path) -> list[str]:
    """Makes a folder of two files, or finds it; what was done."""
    with create_once(path) as temporary:
        if temporary is None:
            return []
        put(temporary, "folder", "new")
        (temporary / "other").write_bytes(b"\0" * 100)
    return ["made"]


def test_made_once(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "name") == ["made"] and make_folder(tmp_path / "name") == []
    assert beside(tmp_path / "name") == ["name.contents.json"]


@pytest.mark.parametrize(
    "damage", ["changed", "shorter", "gone", "another", "no contents", "contents torn", "contents changed"]
)
def test_what_was_damaged_is_made_anew(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, contents = tmp_path / "name", tmp_path / "name.contents.json"
    make_folder(path)
    {
        "changed": lambda: (path / "other").write_bytes(b"\0" * 99 + b"\1"),
        "shorter": lambda: (path / "other").write_bytes(b"\0" * 99),
        "gone": (path / "other").unlink,
        "another": (path / "third").touch,
        "no contents": contents.unlink,
        "contents torn": lambda: contents.write_text(contents.read_text()[:-9]),
        "contents changed": lambda: contents.write_text("[1]"),
    }[damage]()
    assert make_folder(path) == ["made"]
    assert capsys.readouterr().out.count("is damaged") == 1
    assert make_folder(path) == [] and capsys.readouterr().out == ""
    assert sorted(file.name for file in path.iterdir()) == ["inner", "other"]


@pytest.mark.parametrize("name", ["", "new", "new/deep"])
def test_a_folder_that_can_be_written_to(tmp_path: Path, name: str) -> None:
    assert write_problem(tmp_path / name) == ""


@pytest.mark.parametrize("name", ["file", "file/new", "file/new/deep", "gone", "gone/new"])
def test_a_file_in_the_way_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert f"{name} is no folder that can be written to" in write_problem(tmp_path / name)
    assert f"{name.partition('/')[0]} is none)" in write_problem(tmp_path / name)


def test_a_folder_of_others(tmp_path: Path) -> None:
    """Looked at as another user, since root may write anywhere."""
    code = (
        "import os, sys, pathlib, utils.files\n"
        "os.getuid() or os.setuid(65534)\n"
        "print(utils.files.write_problem(pathlib.Path(sys.argv[1])))"
    )
    tmp_path.chmod(0o555)
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "new is no folder that can be written to (you may not write into " in told


def test_a_file_that_is_made_once(tmp_path: Path) -> None:
    path, made = tmp_path / "name.jsonl", []
    for text in (None, None, "changed", None):
        if text:
            path.write_text(text)
        with create_once(path) as temporary:
            if temporary:
                temporary.write_text("right")
                made.append(text)
        assert path.read_text() == "right"
    assert made == [None, "changed"]


def test_a_kill_before_the_contents_are_written_is_noticed(tmp_path: Path) -> None:
    put(tmp_path / "name", "folder", "whole, but nobody can know")
    assert make_folder(tmp_path / "name") == ["made"]


# ---------------------------------------------------------------------------------------------------------------------
# Manifests


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "1-last"
    (folder / "adapter").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "adapter/weights").write_bytes(b"\x00" * 1000)
    (folder / "empty").touch()
    write_manifest(folder)
    return folder


def test_sha256(checkpoint: Path) -> None:
    assert sha256(checkpoint / "adapter/weights") == hashlib.sha256(bytes(1000)).hexdigest()


def test_manifest_of_a_whole_folder(checkpoint: Path) -> None:
    hashes = json.loads((checkpoint / "manifest.json").read_text())
    assert sorted(hashes) == ["adapter/weights", "empty", "run.json"]
    check_manifest(checkpoint)
    write_manifest(checkpoint)
    check_manifest(checkpoint)
    link = checkpoint.with_name("link")
    link.symlink_to(checkpoint.name)
    check_manifest(link)


def test_manifest_notices_damage(checkpoint: Path) -> None:
    weights = checkpoint / "adapter/weights"
    weights.write_bytes(bytes(999) + b"\x01")
    with pytest.raises(SystemExit, match="adapter/weights is damaged"):
        check_manifest(checkpoint)
    weights.write_bytes(bytes(999))
    with pytest.raises(SystemExit, match="adapter/weights is damaged"):
        check_manifest(checkpoint)
    weights.unlink()
    with pytest.raises(SystemExit, match="adapter/weights is missing"):
        check_manifest(checkpoint)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(SystemExit, match="no manifest.json"):
        check_manifest(checkpoint)
