"""utils/cli.py: what is wrong on a command line is said in two lines, and progress is not drawn into files.

python -m pytest tests/test_utils_cli.py
"""

import argparse
import io
import subprocess
import sys
import time
from typing import Any

import pytest
from conftest import ROOT, load_script

from utils.cli import (
    CALLED_ELSEWHERE,
    ArgumentParser,
    add_columns_argument,
    boolean,
    dashes_to_underscores,
    parse_columns,
    progress_bar,
)

SCRIPTS = ["deepspeed_ft/train.py", "deepspeed_dpo/train.py", "deepspeed_distill/train.py", "chat.py", "serve.py"]
SCRIPTS += ["prepare_data.py", "convert_model.py", "merge_qlora.py"]


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="x")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--lora_r", type=int, required=True)
    parser.add_argument("--text")
    parser.add_argument("--tuner", choices=["lora", "full"])
    return parser


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--lora_r 8 --learning_rate 1", "--learning_rate: there is no such argument. Did you mean --lr?"),
        ("--lora-rank=8", "--lora-rank: there is no such argument. Did you mean --lora_r?"),
        ("--lora_r 8 --tunr lora", "--tunr: there is no such argument. Did you mean --tuner?"),
        ("--lora_r 8 --xyzzy 1", "--xyzzy: there is no such argument.\n"),
        ("--lora_r 8 word", "word: there is no such argument.\n"),
        ("--lora_r 8 --tuner x", "argument --tuner: invalid choice: 'x'"),
        ("--lr 1", "the following arguments are required: --lora_r"),
    ],
)
def test_what_is_wrong_is_said_in_two_lines(given: str, said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(given.split())
    error = capsys.readouterr().err
    assert error.startswith(said) and "usage" not in error
    assert error.count("\n") == 2 and error.splitlines()[1].startswith("All arguments: python ")


def test_what_is_right_is_taken() -> None:
    """Beginnings of names, and values that look like options but hold a space, as argparse has it."""
    found = make_parser().parse_args(["--lora", "8", "--text", "--no option", "--lr=1e-4"])
    assert (found.lora_r, found.text, found.lr) == (8, "--no option", 1e-4)


def test_what_others_call_an_argument_is_one_somewhere() -> None:
    options = {option for script in SCRIPTS for option in load_script(script).build_parser()._option_string_actions}
    for other, ours in CALLED_ELSEWHERE.items():
        assert f"--{other}" not in options and all(f"--{name}" in options for name in ours.split()), other


@pytest.mark.parametrize(("text", "value"), [("True", True), ("1", True), ("False", False), ("0", False)])
def test_booleans(text: str, value: bool) -> None:
    assert boolean(text) is value
    with pytest.raises(argparse.ArgumentTypeError, match="expected True, False, 1 or 0"):
        boolean("yes")


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("user=question,assistant=answer", {"user": "question", "assistant": "answer"}),
        (" user = 问 题 , system=a=b ", {"user": "问 题", "system": "a=b"}),
        (r"user=one\,two,assistant=three", {"user": "one,two", "assistant": "three"}),
    ],
)
def test_columns(text: str, columns: dict[str, str]) -> None:
    assert parse_columns(text, ["user", "assistant", "system"]) == columns


@pytest.mark.parametrize(("text", "wrong"), [
    ("", ""), ("user", "user"), ("user=", "user="), ("=a", "=a"), ("usr=a", "usr=a"), ("user=a,user=b", "user=b"),
    ("user=a,", ""), ('{"q": "query"}', '{"q": "query"}'),
])  # fmt: skip
def test_what_are_no_columns(text: str, wrong: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=FIELD, .* user, assistant\\.") as error:
        parse_columns(text, ["user", "assistant"])
    assert f"got {wrong!r}," in str(error.value)


def test_a_comma_of_full_width() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="with '，', expected ','"):
        parse_columns("user=问题，assistant=回答", ["user", "assistant"])
    assert parse_columns("user=问，题", ["user", "assistant"]) == {"user": "问，题"}


def test_a_column_that_is_not_there() -> None:
    assert parse_columns("user=,assistant=a", ["user", "assistant"], may_lack=True) == {"user": "", "assistant": "a"}


def test_columns_of_records(capsys: Any) -> None:
    parser = ArgumentParser(prog="x")
    add_columns_argument(parser, ("user", "chosen", "rejected"))
    assert parser.parse_args([]).columns is None, "as in runs of versions without it"
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--columns", "user=a,chosen=b,rejected=b"])
    assert "got 'user=a,chosen=b,rejected=b' with 'b' twice" in (said := capsys.readouterr().err), said
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--columns", "user=a,system=b"])
    told = "got 'user=a,system=b' without chosen and rejected, expected user=FIELD,chosen=FIELD,rejected=FIELD"
    assert told in capsys.readouterr().err


def test_dashes_stand_for_underscores_in_names_alone() -> None:
    found = dashes_to_underscores(["--a-b", "c-d", "--e-f=g-h", "--", "-x-y"])
    assert found == ["--a_b", "c-d", "--e_f=g-h", "--", "-x-y"]


def test_progress_in_a_file_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what is over soon."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for _ in progress_bar(range(1000), "quick", "step"):
        pass
    assert sys.stderr.getvalue() == ""
    for _ in progress_bar(range(40), "slow", "step", delay=0.02, mininterval=0.2):
        time.sleep(0.02)
    lines = sys.stderr.getvalue().split("\n")
    assert 2 <= len(lines) <= 25 and all(line.startswith("slow:") for line in lines[:-1]) and "\r" not in "".join(lines)


def test_help_needs_no_library() -> None:
    program = "import sys; import utils.cli; print(*{'torch', 'tqdm', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
