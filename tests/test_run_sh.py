"""deepspeed_*/run.sh and utils/train/launch.sh: which launcher is started, and with which arguments.

python -m pytest tests/test_run_sh.py
"""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

TRAIN = "deepspeed_ft/train.py --model_name Qwen/Qwen2.5-0.5B --data_dir data"


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    """A folder with a `deepspeed` and a `python` that print how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("deepspeed", "python"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def run(bin_dir: Path, *arguments: str, stage: str = "ft", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs run.sh in the folder above `bin_dir`."""
    return subprocess.run(
        ["bash", str(ROOT / f"deepspeed_{stage}/run.sh"), *arguments],
        env={"PATH": f"{bin_dir}:{os.environ['PATH']}", **environment},
        cwd=bin_dir.parent,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, "python"),
        ({"NUM_GPUS": "1"}, "python"),
        ({"NUM_GPUS": "2"}, "deepspeed --quiet --num_gpus 2"),
        ({"LAUNCHER_ARGS": "--include localhost:1"}, "deepspeed --quiet --include localhost:1"),
        ({"NUM_GPUS": "2", "LAUNCHER_ARGS": "--master_port 1"}, "deepspeed --quiet --num_gpus 2 --master_port 1"),
    ],
    ids=str,
)
def test_launcher(bin_dir: Path, environment: dict[str, str], launcher: str) -> None:
    done = run(bin_dir, "--epochs", "3", **environment)
    assert (done.returncode, done.stdout) == (0, f"{launcher} {TRAIN} --epochs 3\n"), done.stderr


@pytest.mark.parametrize("node", [0, 1])
def test_several_nodes(bin_dir: Path, node: int) -> None:
    """The file is named from where the user is; train.py's arguments stay its own."""
    hosts = bin_dir.parent / "hosts"
    hosts.write_text("node1 slots=8\nnode2 slots=8\n")
    start = f"--no_ssh --node_rank {node} --master_addr node1"
    assert run(bin_dir, HOSTFILE="hosts").stdout == f"deepspeed --quiet --hostfile {hosts} {TRAIN}\n"
    done = run(bin_dir, "--epochs", "3", HOSTFILE="hosts", LAUNCHER_ARGS=start)
    assert (done.returncode, done.stdout) == (0, f"deepspeed --quiet --hostfile {hosts} {start} {TRAIN} --epochs 3\n")


def test_a_missing_hostfile_is_named(bin_dir: Path) -> None:
    """DeepSpeed would go on with this machine alone."""
    done = run(bin_dir, HOSTFILE="hots")
    assert (done.returncode, done.stdout) == (1, "")
    assert "HOSTFILE" in done.stderr and "hots" in done.stderr and "node1 slots=8" in done.stderr


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("pt", "--model_name Qwen/Qwen2.5-0.5B"),
        ("ft", "--model_name Qwen/Qwen2.5-0.5B --data_dir data"),
        ("dpo", "--model_name Qwen/Qwen2.5-0.5B --data_path deepspeed_dpo/data"),
        ("distill", "--student_model_name Qwen/Qwen2.5-0.5B --teacher_model_name deepseek-chat"),
    ],
)
def test_every_stage(bin_dir: Path, stage: str, arguments: str) -> None:
    """What is tested here of fine-tuning's script holds for the others': they source the same file."""
    done = run(bin_dir, "--epochs", "3", stage=stage, NUM_GPUS="2")
    command = f"deepspeed --quiet --num_gpus 2 deepspeed_{stage}/train.py {arguments} --epochs 3\n"
    assert done.stdout == command, done.stderr
