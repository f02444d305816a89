"""The files of the repository themselves: they load, answer quickly, name what they need and nothing they should not.

python -m pytest tests/test_shipped_files.py
"""

import ast
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# What a run leaves behind; `data` holds crawled comments, but examples/data is the project's own.
SKIPPED = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
SKIPPED |= {"model", "output_hf", "output", "swanlog", "wandb"}


def walked(folder: Path) -> Iterator[Path]:
    """The files of a copy without git, without what runs leave."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            is_data = path.name == "data" and path.parent != ROOT / "examples"
            if path.name not in SKIPPED and not is_data:
                yield from walked(path)
        elif not path.name.endswith((".partial", ".old")):
            yield path


def shipped() -> list[Path]:
    """The repository's files: those that git has or would add."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return list(walked(ROOT))
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(path for path in map(ROOT.joinpath, listed.split("\0")) if path.is_file())


FILES = shipped()
PYTHON = [path for path in FILES if path.suffix == ".py"]
UTILS = [path for path in PYTHON if path.is_relative_to(ROOT / "utils") and path.name != "__init__.py"]
SHELL = [path for path in FILES if path.suffix == ".sh"]
SCRIPTS = [path for path in PYTHON if "__main__" in path.read_text(encoding="utf-8") and path.parent.name != "tests"]
PINS = dict(
    re.findall(r"^([A-Za-z0-9_.-]+)==([^\s#;]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def normal(distribution: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_something_is_looked_at() -> None:
    names = {name(path) for path in FILES}
    assert {"chat.py", "deepspeed_ft/train.py", "utils/data/records.py", "setup_env.sh", "tests/run.sh"} <= names
    assert {"chat.py", "prepare_data.py", "deepspeed_dpo/train.py", "benchmarks/gpu/run.py"} <= {*map(name, SCRIPTS)}
    assert any(text.startswith("examples/data/") for text in names)
    assert not any(text.startswith(("data/", "model/", ".venv")) for text in names - {"data/README.md"})


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="a copy without git")
@pytest.mark.parametrize("left", [".venv", "data/bili/x.json", "swanlog/run", "wandb/run", "model/a/b", ".x.partial"])
def test_what_runs_leave_is_ignored(left: str) -> None:
    """`.venv` also as a link, which git takes for a file."""
    assert subprocess.run(["git", "check-ignore", "--no-index", "--quiet", left], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "text", ["cd /work/x", "in /tmp", "-i https://pypi.mirror.example/simple", "//registry.local/x"]
)
def test_forbidden(text: str) -> None:
    assert any(re.search(pattern, text, re.IGNORECASE) for pattern in FORBIDDEN)
    allowed = "https://hf-mirror.com/a output/tmp/x a/work"
    assert not any(re.search(pattern, allowed, re.IGNORECASE) for pattern in FORBIDDEN)


# ---------------------------------------------------------------------------------------------------------------------
# Python


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_python_compiles_and_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    compile(tree, str(path), "exec")
    assert ast.get_docstring(tree), "a docstring at the top"
    if path.name.startswith("test_"):
        assert f"python -m pytest {name(path)}" in ast.get_docstring(tree)


def cpu_seconds(command: list[str], **options: object) -> tuple[float, int, str]:
    """Runs a command; its processor time, exit code and output."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    return usage.ru_utime + usage.ru_stime, process.returncode, output


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_help_is_quick(path: Path, tmp_path: Path) -> None:
    """From any folder, in less than half a second; three times at most, since the machine may be busy."""
    for _ in range(3):
        seconds, code, said = cpu_seconds([sys.executable, str(path), "--help"], cwd=tmp_path)
        assert code == 0 and "usage:" in said and "Traceback" not in said, said
        if seconds < 0.5:
            break
    assert seconds < 0.5


@pytest.mark.parametrize("path", UTILS, ids=name)
def test_modules_import(path: Path) -> None:
    __import__(module_name(path))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_from_utils(path: Path) -> set[str]:
    """The modules of utils/ that a file imports, wherever in the file."""
    modules, found = {module_name(path) for path in UTILS}, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_imports_go_one_way() -> None:
    """files, cli and api, of which data knows, then weights, serve, train, evaluate, export; nowhere in a circle."""
    order = ["files", "cli", "api", "data", "weights", "serve", "train", "evaluate", "export"]
    graph = {module_name(path): imported_from_utils(path) for path in UTILS}
    list(TopologicalSorter(graph).static_order())  # Raises CycleError.
    assert graph["utils.train.run"] > {"utils.train.engine", "utils.data.samples"}
    turned = [
        (module, other)
        for module, others in graph.items()
        for other in others
        if order.index(other.split(".")[1]) > order.index(module.split(".")[1])
    ]
    assert not turned
    folders = {path.name for path in (ROOT / "utils").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*order[3:]}


def repeated(paths: list[Path], count: int) -> list[str]:
    """Runs of so many lines that stand in two files, comments and empty lines aside."""
    first: dict[tuple[str, ...], Path] = {}
    found = []
    for path in paths:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        for start in range(len(lines) - count + 1):
            run = tuple(lines[start : start + count])
            if first.setdefault(run, path) != path:
                found.append(f"{name(first[run])} and {name(path)}: {run[0]}")
    return found


@pytest.mark.parametrize("pattern", ["deepspeed_*/train.py", "deepspeed_*/run*.sh"])
def test_what_methods_share_stands_once(pattern: str) -> None:
    paths = sorted(ROOT.glob(pattern))
    assert len(paths) >= 3 and not repeated(paths, 6)


def imported(path: Path) -> set[str]:
    """The first names of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@cache
def distributions_of_modules() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_what_is_imported_is_pinned(path: Path) -> None:
    own = {path.stem for path in PYTHON} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    third_party = imported(path) - set(sys.stdlib_module_names) - own
    if path.name.endswith("_peer.py"):
        # Runs in an environment of its own, where what it compares with is installed.
        pins = (ROOT / "benchmarks/bench_sft.py").read_text(encoding="utf-8")
        assert "trl==" in pins and "llamafactory==" in pins
        third_party -= {"trl", "llamafactory"}
    if path.parent.name == "gpu":
        # Optional, for the loop that ours is compared with.
        assert "liger-kernel==" in (ROOT / "benchmarks/gpu/wheels.sh").read_text(encoding="utf-8")
        third_party -= {"liger_kernel"}
    if path.name.startswith("vllm_"):
        # The same for the server on vLLM.
        lines = (ROOT / "requirements_vllm.txt").read_text(encoding="utf-8").splitlines()
        third_party -= {line.partition("==")[0] for line in lines if "==" in line and not line.startswith("#")}
    distributions = distributions_of_modules()
    pinned = {normal(pin) for pin in PINS}
    missing = {
        module: distributions.get(module)
        for module in third_party
        if not any(normal(distribution) in pinned for distribution in distributions.get(module, []))
    }
    assert not missing, "add to requirements.txt with its exact version"


def test_pins_are_exact_and_installed() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(wanted) == len(PINS), "every line is name==version"
    for_linux = {line.partition("==")[0] for line in wanted if "; sys_platform" in line}
    here = PINS.keys() - (set() if (sys.platform, platform.machine()) == ("linux", "x86_64") else for_linux)
    # A local build (+cpu, +cu128) is the same version.
    installed = {pin: importlib.metadata.version(pin).split("+")[0] for pin in here}
    assert installed == {pin: version for pin, version in PINS.items() if pin in here}


def code_lines(path: Path) -> int:
    """Lines of code: without docstrings, comments and empty lines."""
    text = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented) and ast.get_docstring(node)]
    docstrings = {line for node in nodes for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and number not in docstrings for number, line in lines)


def test_modules_stay_small() -> None:
    lengths = {name(path): code_lines(path) for path in UTILS}
    assert sum(lengths.values()) <= 11_000 and max(lengths.values()) <= 300, lengths


# ---------------------------------------------------------------------------------------------------------------------
# Other files


@pytest.mark.parametrize("path", [*SHELL, ROOT / ".ci/run"], ids=name)
def test_shell_scripts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "\r" not in text
    assert path.stat().st_mode & 0o111, "chmod +x"
    if path.name not in ("setup_env.sh", "launch.sh"):  # Which are sourced.
        assert text.startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("path", [path for path in FILES if path.name.startswith("ds_config")], ids=name)
def test_deepspeed_configurations(path: Path) -> None:
    """DeepSpeed's own model of the ZeRO section refuses names that it does not know."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads(path.read_text(encoding="utf-8"))
    assert DeepSpeedZeroConfig(**config["zero_optimization"]).stage in range(4)
    assert config["gradient_clipping"] > 0, "unset, DeepSpeed clips at 1 without a word"
    assert "train_batch_size" not in config and "optimizer" not in config, "the command line's"


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".json"], ids=name)
def test_json_files(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8-sig"))


# Places on one machine, marks of unfinished work, and secrets.
FORBIDDEN = [
    r"(?<![\w.}/])/(root|home|mnt|opt|tmp|work)\b",
    r"//(?!pypi\.org|hf-mirror\.com)[\w.-]*(pypi|registry|proxy|mirror)",
    r"(?-i:\b(TODO|FIXME|XXX|HACK)\b)",
    r"\bhf_[A-Za-z]{20,}",
    r"\bsk-[A-Za-z0-9]{20,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    r"<<<<<<< |>>>>>>> ",
]


@pytest.mark.parametrize("path", [path for path in FILES if path != Path(__file__)], ids=name)
def test_nothing_that_does_not_belong_here(path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return  # A picture.
    found = [match[0] for pattern in FORBIDDEN for match in re.finditer(pattern, text, re.IGNORECASE)]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_small(path: Path) -> None:
    assert path.stat().st_size < 1_000_000
