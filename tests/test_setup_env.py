"""setup_env.sh on a copy of its own, with nothing to install: python -m pytest tests/test_setup_env.py"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

STAMP = "requirements.sha256"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with setup_env.sh and an empty requirements.txt, in a path with a space."""
    folder = tmp_path / "a copy"
    folder.mkdir()
    shutil.copy(ROOT / "setup_env.sh", folder)
    (folder / "requirements.txt").write_text("# nothing\n")
    return folder


def bash(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a folder, with a Python that fits first on PATH."""
    path = f"{Path(sys.base_prefix) / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} | variables
    command = ["bash", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def works(folder: Path) -> bool:
    """Sources the script as the others do, and tells whether `python` is then the environment's, with pip."""
    done = bash("set -euo pipefail; source ./setup_env.sh; python -m pip --version >&2; command -v python", folder)
    return done.returncode == 0 and done.stdout.splitlines()[-1] == str(folder / ".venv/bin/python")


def fake(path: Path, script: str) -> None:
    """Writes a program."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.slow
def test_broken_environments_are_made_anew(copy: Path, tmp_path: Path) -> None:
    """Each with the stamp of a finished installation; in one test, since making an environment takes long."""
    venv, elsewhere = copy / ".venv", tmp_path / "disk/env"
    venv.symlink_to(elsewhere)
    assert works(copy), "a link to a folder that is not there yet"
    stamp, python = (elsewhere / STAMP).read_text(), elsewhere / "bin/python"
    again = bash("source ./setup_env.sh", copy)
    assert again.stdout == "" and again.returncode == 0, "nothing to do"

    for packages in venv.glob("lib/python*/site-packages/pip"):
        shutil.rmtree(packages)
    assert works(copy), "without pip"

    python.unlink()
    python.symlink_to("/no/such/python")
    assert works(copy), "the interpreter is gone"

    fake(python, "exit 1")  # what another version answers when it is asked for its version
    assert works(copy), "another version of Python"
    assert venv.is_symlink() and (elsewhere / STAMP).read_text() == stamp


BREAKS = {
    "no Python": ("needs Python 3.11 or 3.12", "exit 1"),
    "no venv": ("could not make .venv", 'case "$*" in *venv*) exit 1;; *) exit 0;; esac'),
    "no installation": ("PIP_INDEX_URL=<mirror> bash setup_env.sh", None),
}


@pytest.mark.parametrize("reason", BREAKS)
def test_failure(copy: Path, tmp_path: Path, reason: str) -> None:
    """A script stops, and an interactive shell goes on; the message names this script, whoever sourced it."""
    message, answer = BREAKS[reason]
    path = os.environ["PATH"]
    if answer:
        for python in ("python3.11", "python3.12", "python3"):
            fake(tmp_path / "bin" / python, answer)
        path = f"{tmp_path / 'bin'}:{path}"
    else:
        fake(copy / ".venv/bin/python", 'case "$*" in *install*) exit 1;; *) exit 0;; esac')
    (copy / "caller.sh").write_text("set -euo pipefail\nsource ./setup_env.sh\necho went on\n")
    for script, goes_on in {
        "bash caller.sh": False,
        "bash setup_env.sh && echo went on": False,
        "source ./setup_env.sh || echo went on": True,
        "source ./setup_env.sh; echo went on": True,
    }.items():
        done = bash(f'export PATH="{path}"; {script}', copy)
        assert ("went on" in done.stdout) == goes_on and (done.returncode == 0) == goes_on
        assert message in done.stderr and "setup_env.sh: " in done.stderr and "return" not in done.stderr
