"""deepspeed_pt/prepare_data.py: what goes of raw text, on texts of both sides of each rule.

python -m pytest tests/test_deepspeed_pt_prepare_data.py
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import load_script, make_records


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("deepspeed_pt/prepare_data.py")


def prepared(script: ModuleType, folder: Path, texts: list[str], *more: str) -> tuple[list[str], dict[str, Any]]:
    """The texts that are left, and the report."""
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    output = folder / "it's here"
    script.main(script.build_parser().parse_args(["--data", str(path), "--output_dir", str(output), *more]))
    lines = (output / "text.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines], json.loads((output / "report.json").read_text())


ONE = "今天我们去了城外的植物园，看见了许多从来没有见过的花和树，孩子们都很高兴。"
TWO = "这本书讲的是一个年轻人离开家乡以后在大城市里生活、工作和成长的故事。"
THREE = "发动机的工作原理并不复杂：燃料在气缸里燃烧，推动活塞，活塞再带动曲轴。"


def test_what_is_there_twice(script: ModuleType, tmp_path: Path) -> None:
    """Other punctuation and width, and small changes, make no other document; the first one stays."""
    same = "今天我们去了城外的植物园 看见了许多从来没有见过的花和树 孩子们都很高兴！！"
    near = ONE.replace("高兴", "开心")
    kept, report = prepared(script, tmp_path, [ONE, TWO, same, near, THREE])
    assert kept == [ONE, TWO, THREE]
    counts = {reason: found["documents"] for reason, found in report["dropped"].items()}
    assert counts == {"repeat": 1, "near_repeat": 1}
    assert report["dropped"]["repeat"]["examples"] == [same]
    lengths = sorted(map(len, kept))
    assert report["lengths"] == {"half": lengths[1], "90 %": lengths[2], "longest": lengths[2]}
    assert (tmp_path / "it's here/report.png").read_bytes().startswith(b"\x89PNG")
    assert prepared(script, tmp_path, ["太短了。"])[1]["lengths"] == {}
    empty = ["--min_chars", "0", "--max_repeats", "-1", "--max_line_repeats", "1"]
    assert prepared(script, tmp_path, [ONE, TWO, TWO], *empty)[0] == [ONE], "nothing is left of a line that recurs"
    assert prepared(script, tmp_path, [ONE, same, near], "--max_repeats", "-1")[0] == [ONE, same, near]
    assert len(prepared(script, tmp_path, [ONE, same, near], "--max_repeats", "2")[0]) == 2


def test_lines_of_many_documents(script: ModuleType, tmp_path: Path) -> None:
    """A menu goes, a short line that recurs in dialogues and one that few have stay."""
    menu = "首页 新闻 体育 娱乐 财经 登录 注册"
    parts = zip("甲乙丙丁戊己", [ONE, TWO, THREE] * 2, strict=True)
    texts = [f"{menu}\n{number}：{part}\n“嗯。”" for number, part in parts]
    kept, report = prepared(script, tmp_path, texts, "--max_line_repeats", "5", "--max_repeats", "-1")
    assert kept == [text.removeprefix(f"{menu}\n") for text in texts]
    assert report["lines"] == [{"line": menu, "documents": 6}]
    assert prepared(script, tmp_path, texts, "--max_line_repeats", "6", "--max_repeats", "-1")[0] == texts


def test_short_ones_and_other_languages(script: ModuleType, tmp_path: Path) -> None:
    english = "This is a text in another language, and it is long enough to stay otherwise."
    mixed = "用 PyTorch 训练大语言模型的时候，显存往往是最先遇到的瓶颈，需要想办法节省。"
    kept, report = prepared(script, tmp_path, [ONE, "太短了。", english, mixed], "--language", "zh")
    assert kept == [ONE, mixed]
    assert {reason: found["documents"] for reason, found in report["dropped"].items()} == {"short": 1, "language": 1}
    assert prepared(script, tmp_path, [english])[0] == [english]


def test_contact_details(script: ModuleType, tmp_path: Path) -> None:
    contact = f"{ONE}加微信 abc12345 进群领取资料。"
    assert prepared(script, tmp_path, [contact, TWO], "--contacts", "drop")[0] == [TWO]
    assert prepared(script, tmp_path, [contact, TWO], "--contacts", "keep")[0] == [contact, TWO]
    kept, report = prepared(script, tmp_path, [contact, TWO])
    assert "abc12345" not in kept[0] and "（联系方式）" in kept[0] and kept[1] == TWO and report["masked"] == 1


def test_comments_video_by_video(script: ModuleType, tmp_path: Path) -> None:
    """Title and description once, then each comment below what it answers; held-out videos are not read."""
    for name, records in (("train", make_records(3)), ("test", make_records(2, first=50))):
        (tmp_path / f"data_{name}.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    arguments = ["--comments", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--max_repeats", "-1"]
    script.main(script.build_parser().parse_args([*arguments, "--max_line_repeats", "-1", "--min_chars", "1"]))
    rows = [json.loads(line) for line in (tmp_path / "out/text.jsonl").read_text(encoding="utf-8").splitlines()]
    videos: dict[str, list[Any]] = {}
    for record in make_records(3):
        videos.setdefault(record["video_id"], []).append(record["conversations"])
    assert len(rows) == len(videos) == 3
    for row, talks in zip(rows, videos.values(), strict=True):
        lines = row["text"].splitlines()
        for *_, question, answer in talks:
            assert answer["value"] in row["text"] and set(question["value"].splitlines()) <= {*lines}
        first = talks[0][-2]["value"].splitlines()[0]
        assert lines.count(first) == 1 and lines[0] == first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Nothing to read: --data PATH"),
        (["--data", "nowhere"], "--data: no 'nowhere'"),
        (["--data", ""], "--data: no ''"),
        (["--comments", "nowhere"], "--comments: no 'nowhere'"),
        (["--comments", "{empty}"], "no data_train.json"),
        (["--data", "{empty}"], "expected files with .txt"),
        (["--data", "{blank}"], "there is no text in what was given"),
        (["--data", "{binary}"], "is not UTF-8"),
        (["--data", "{blank}", "--max_repeats", "0"], "--max_repeats: got 0"),
    ],
)
def test_user_errors(script: ModuleType, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n ")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    names = {"empty": tmp_path / "empty", "blank": tmp_path / "blank.txt", "binary": tmp_path / "binary.txt"}
    asked = [one.format(**names) for one in arguments]
    with pytest.raises(SystemExit, match=said):
        script.main(script.build_parser().parse_args([*asked, "--output_dir", str(tmp_path / "out")]))
    assert not (tmp_path / "out/text.jsonl").exists()
