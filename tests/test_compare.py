"""python -m pytest tests/test_compare.py"""

from pathlib import Path

import pytest
from conftest import load_script

compare = load_script("examples/compare.py")


def run(base: Path, data_dir: Path, *options: str) -> None:
    """Runs the script in this process, with one model on both sides."""
    models = ["--base", str(base), "--tuned", str(base)]
    compare.main(compare.build_parser().parse_args([*models, "--data_dir", str(data_dir), *options]))


def test_replies_side_by_side(model_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(model_dir / "tiny/llama", data_dir, "--number", "2", "--max_new_tokens", "2")
    lines = capsys.readouterr().out.splitlines()
    assert [sum(line.startswith(f"  {name:<5}: ") for line in lines) for name in ("base", "tuned", "real")] == [2, 2, 2]
    assert [line.split("个")[0] for line in lines if line.startswith("视频标题")] == [
        "视频标题：第12",
        "视频标题：第13",
    ]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("[]", ["--number", "0"], "--number: got 0, expected 1 or more"),
        ("no JSON", [], "data_test.json: not readable as json"),
        ("[]", [], "data_test.json is empty, or holds nothing that can be used. Hold out more: python"),
        ("[1]", [], "got a int, expected one of"),
        (None, [], "Make it with: python prepare_data.py"),
    ],
)
def test_wrong_input(tmp_path: Path, text: str | None, options: list[str], message: str) -> None:
    """One sentence, before any model is loaded."""
    (tmp_path / "config.json").write_text("{}")
    if text is not None:
        (tmp_path / "data_test.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tmp_path, *options)
    assert message in stop.value.code and "\n" not in stop.value.code
