"""deepspeed_dpo/prepare_data.py: who is preferred to whom, and that length does not tell.

python -m pytest tests/test_deepspeed_dpo_prepare_data.py
"""

import json
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, load_script

from utils.data.pairs import to_pair


@pytest.fixture(scope="session")
def prepare() -> ModuleType:
    """deepspeed_dpo/prepare_data.py as a module."""
    return load_script("deepspeed_dpo/prepare_data.py")


def record(id: int, text: str, video: int = 1, parent: str = "") -> dict[str, Any]:
    """A record as prepare_data.py writes it."""
    prompt = f"视频标题：第{video}个" + (f"\n父评论：{parent}" if parent else "")
    turns = [{"from": "system", "value": "你是B站用户"}, {"from": "user", "value": prompt}]
    return {
        "id": str(id),
        "video_id": str(video),
        "conversations": [*turns, {"from": "assistant", "value": text}],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes prepared data and a crawl with likes."""

    def write(train: list[dict], likes: dict[int, Any], test: list[dict] | None = None) -> Path:
        for split, records in (("train", train), ("test", test or [])):
            (tmp_path / f"data_{split}.json").write_text(json.dumps(records), encoding="utf-8")
        rows = [{"comment_id": id, "video_id": 1, "content": "x", "like_count": count} for id, count in likes.items()]
        (tmp_path / "search_comments.json").write_text(json.dumps(rows), encoding="utf-8")
        return tmp_path

    return write


def run(prepare: ModuleType, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Makes pairs; those of the training split."""
    flags = ["--data_dir", str(folder), "--output_dir", str(folder / "out"), "--balance_length", "False", *arguments]
    prepare.main(prepare.build_parser().parse_args(flags))
    lines = (folder / "out/data_train_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_more_liked_comment_is_preferred(prepare: ModuleType, folder: Callable[..., Path]) -> None:
    """12 likes against 3: 12 >= 3 (3 + 1). Against 4 it is too little. Text of the same length is taken first."""
    train = [record(1, "甲甲甲甲"), record(2, "乙乙乙乙"), record(3, "丙丙丙"), record(4, "丁丁丁丁")]
    (pair,) = run(prepare, folder(train, {1: 12, 2: 3, 3: 1, 4: "4"}))
    assert (pair["chosen"], pair["rejected"], pair["likes"]) == ("甲甲甲甲", "乙乙乙乙", [12, 3])
    messages, chosen, rejected = to_pair(pair)
    assert [message["role"] for message in messages] == ["system", "user"]
    assert (chosen, rejected) == ("甲甲甲甲", "乙乙乙乙")


def test_comments_whose_fields_are_named(prepare: ModuleType, folder: Callable[..., Path]) -> None:
    """The same pairs as of prepare_data.py's."""
    train = [record(1, "甲甲甲甲"), record(2, "乙乙乙乙")]
    expected = run(prepare, place := folder(train, {1: 12, 2: 3}))
    names = ("rolle", "frage", "antwort")
    values = [[turn["value"] for turn in one["conversations"]] for one in train]
    named = [{"id": one["id"], "video_id": one["video_id"], **dict(zip(names, texts, strict=True))}
             for one, texts in zip(train, values, strict=True)]  # fmt: skip
    (place / "data_train.json").write_text(json.dumps(named), encoding="utf-8")
    assert run(prepare, place, "--columns", "user=frage,assistant=antwort,system=rolle") == expected != []


@pytest.mark.parametrize(
    ("train", "likes"),
    [
        ([record(1, "甲甲"), record(2, "乙乙", video=2)], {1: 100, 2: 0}),
        ([record(1, "甲甲"), record(2, "乙乙", parent="前排")], {1: 100, 2: 0}),
        ([record(1, "甲" * 9), record(2, "乙乙")], {1: 100, 2: 0}),
        ([record(1, "甲甲"), record(2, "乙乙")], {1: 100, 2: None}),
        ([record(1, "甲甲"), record(2, "乙乙")], {1: 4, 2: 0}),
        ([record(1, "甲甲"), record(2, "甲甲")], {1: 100, 2: 0}),
    ],
    ids=["videos", "parents", "lengths", "no likes", "too few likes", "same text"],
)
def test_what_makes_no_pair(prepare: ModuleType, folder: Callable[..., Path], train: list, likes: dict) -> None:
    with pytest.raises(SystemExit, match="No training pairs"):
        run(prepare, folder(train, likes))
    assert not (folder(train, likes) / "out").exists()


def test_every_comment_stands_in_one_pair(prepare: ModuleType, folder: Callable[..., Path]) -> None:
    train = [record(id, f"第{id}条") for id in range(8)]
    pairs = run(prepare, folder(train, {id: 1000 if id < 4 else id for id in range(8)}))
    texts = [text for pair in pairs for text in (pair["chosen"], pair["rejected"])]
    assert len(pairs) == 4 and len(set(texts)) == 8


def slow_pairs(comments: list[Any], likes: dict[str, int], margin: float, ratio: float) -> list[tuple[str, str]]:
    """What pairs_by_likes finds, by looking at all comments for each one."""
    comments, used, found = sorted(comments, key=lambda c: (-likes[c.id], c.id)), set(), []
    for chosen in comments:
        beaten = [
            (abs(len(other.text) - len(chosen.text)), other.id)
            for other in comments
            if other.id not in used
            and other.text != chosen.text
            and likes[chosen.id] >= margin * (likes[other.id] + 1)
            and max(len(chosen.text), len(other.text)) <= ratio * min(len(chosen.text), len(other.text))
        ]
        if likes[chosen.id] >= 5 and chosen.id not in used and beaten:
            used |= {chosen.id, min(beaten)[1]}
            found.append((chosen.id, min(beaten)[1]))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_pairs_by_likes_equal_the_plain_search(prepare: ModuleType, seed: int) -> None:
    draw = random.Random(seed)
    texts = [draw.choice("甲乙") * draw.randint(5, 40) for _ in range(60)]  # Some are equal, some as long as others.
    likes = {str(number): int(draw.paretovariate(0.5)) for number in range(len(texts))}
    comments = [prepare.Comment(record(number, text)) for number, text in enumerate(texts)]
    margin, ratio = draw.uniform(1, 4), draw.uniform(1, 3)
    found = list(prepare.pairs_by_likes([comments], likes, 5, margin, ratio))
    expected = slow_pairs(comments, likes, margin, ratio)
    assert len(found) > 2
    for pair, (chosen, rejected) in zip(found, expected, strict=True):
        assert (pair["chosen"], pair["rejected"]) == (texts[int(chosen)], texts[int(rejected)])


def test_without_a_test_file_old_held_out_pairs_go(prepare: ModuleType, folder: Callable[..., Path]) -> None:
    place = folder([record(1, "甲甲"), record(2, "乙乙")], {1: 99, 2: 0})
    run(prepare, place)
    assert (place / "out/data_test_pairs.jsonl").exists()
    (place / "data_test.json").unlink()
    run(prepare, place)
    assert not (place / "out/data_test_pairs.jsonl").exists()


def test_a_longer_text_may_be_taken_where_the_nearest_is_too_short(
    prepare: ModuleType, folder: Callable[..., Path]
) -> None:
    """To 10 characters 4 are nearer than 17, but 10 > 2 x 4, and 17 <= 2 x 10."""
    train = [record(1, "甲" * 10), record(2, "乙" * 4), record(3, "丙" * 17)]
    (pair,) = run(prepare, folder(train, {1: 100, 2: 0, 3: 0}))
    assert pair["rejected"] == "丙" * 17


def test_a_comment_that_stands_twice_counts_once(prepare: ModuleType, folder: Callable[..., Path]) -> None:
    train = [record(1, "甲甲"), record(1, "甲甲"), record(2, "乙乙"), record(3, "丙丙")]
    assert len(run(prepare, folder(train, {1: 100, 2: 0, 3: 0}))) == 1


def test_files_that_cannot_be_read_are_named(
    prepare: ModuleType, folder: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    place = folder([record(1, "甲甲"), record(2, "乙乙")], {1: 99, 2: 0})
    (place / "broken.xlsx").write_bytes(b"PK\x03\x04 torn")
    os.mkfifo(place / "pipe.json")
    with closing(sqlite3.connect(place / "torn.db")) as con, con:
        con.execute("create table bilibili_video_comment (comment_id, video_id, content, like_count)")
        rows = [(number, 1, "字" * 200, 5) for number in range(2000)]
        con.executemany("insert into bilibili_video_comment values (?, ?, ?, ?)", rows)
    whole = (place / "torn.db").read_bytes()
    (place / "torn.db").write_bytes(whole[: len(whole) // 2] + b"\xff" * (len(whole) - len(whole) // 2))
    run(prepare, place)
    told = capsys.readouterr().out
    assert "broken.xlsx: not readable" in told and "torn.db: read up to an error" in told
    assert "pipe.json: not readable (no regular file)" in told
    assert len(json.loads((place / "out/report.json").read_text())["unread"]) == 3


def test_a_pair_stays_in_its_split(prepare: ModuleType, folder: Callable[..., Path]) -> None:
    train, test = ([record(10 * video + n, f"第{n}条", video) for n in range(2)] for video in (1, 2))
    place = folder(train, {10: 99, 11: 0, 20: 99, 21: 0}, test)
    (pair,) = run(prepare, place)
    (held_out,) = (place / "out/data_test_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert pair["video_id"] == "1" and json.loads(held_out)["video_id"] == "2"


def test_real_comments_are_preferred_to_replies(prepare: ModuleType, folder: Callable[..., Path]) -> None:
    train = [record(1, "真人写的"), record(2, "也是真人"), record(3, "同样的话")]
    place = folder(train, {})
    rows = [{"id": "1", "prompt": "", "reply": "机器写的", "real": "真人写的"}]
    rows += [{"id": "3", "prompt": "", "reply": "同样的话", "real": "同样的话"}]
    (place / "test_1.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (pair,) = run(prepare, place, "--replies", str(place / "test_1.jsonl"))
    assert (pair["source"], pair["chosen"], pair["rejected"]) == ("replies", "真人写的", "机器写的")


def test_pairs_that_all_lean_to_one_side_are_none(prepare: ModuleType, folder: Callable[..., Path]) -> None:
    """The run says why, and how to keep them."""
    place = folder([record(1, "甲甲甲"), record(2, "乙乙")], {1: 100, 2: 0})
    with pytest.raises(SystemExit, match="--balance_length False"):
        run(prepare, place, "--balance_length", "True")


def test_length_tells_nothing(prepare: ModuleType) -> None:
    """Three longer and one shorter chosen text, and an equal one: the two most unequal longer ones leave."""
    lengths = [(20, 10), (15, 10), (12, 10), (8, 10), (10, 10)]
    pairs = [{"id": n, "chosen": "长" * a, "rejected": "短" * b} for n, (a, b) in enumerate(lengths)]
    kept = prepare.balanced(pairs)
    assert [pair["id"] for pair in kept] == [2, 3, 4]
    assert prepare.length_bias(kept) == pytest.approx(
        {"pairs": 3, "chosen": 10, "rejected": 10, "longer": 1 / 3, "shorter": 1 / 3}
    )
    assert prepare.length_bias([]) == {"pairs": 0}


@pytest.mark.parametrize("value", ["12", 12, 12.0, "12.0"])
def test_likes_in_any_form(prepare: ModuleType, value: Any) -> None:
    assert prepare.as_number(value) == 12


@pytest.mark.parametrize("value", [None, "", "nan", "many", float("inf")])
def test_no_likes(prepare: ModuleType, value: Any) -> None:
    assert prepare.as_number(value) is None


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_a_kill_leaves_no_pairs_of_two_runs(
    prepare: ModuleType, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Before the first file takes its place, the second, the third: then there are no training pairs."""
    records = [record(1, "甲甲甲甲"), record(2, "乙乙乙乙"), record(3, "丙丙", video=2), record(4, "丁丁", video=2)]
    place = folder(records[:2], {1: 12, 2: 3, 3: 12, 4: 3}, test=records[2:])
    assert len(run(prepare, place)) == 1
    folder(records[2:], {1: 12, 2: 3, 3: 12, 4: 3}, test=records[:2])
    replace, left = os.replace, [renames]

    class Killed(BaseException):
        pass

    def killed(*paths: Any) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise Killed
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr("utils.files.os.replace", killed)
        with pytest.raises(Killed):
            run(prepare, place)
    assert not (place / "out/data_train_pairs.jsonl").exists()
    (pair,) = run(prepare, place)
    (held_out,) = (place / "out/data_test_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert pair["chosen"] == "丙丙" and json.loads(held_out)["chosen"] == "甲甲甲甲"


def test_the_example_data(prepare: ModuleType, tmp_path: Path) -> None:
    """From the crawl to pairs that training can read, with the commands that the README names."""
    for script, arguments in (
        ("prepare_data.py", ["--data_dir", "examples", "--output_dir", str(tmp_path), "--test_size", "0.3"]),
        (
            "deepspeed_dpo/prepare_data.py",
            ["--data_dir", str(tmp_path), "--crawl_dir", "examples", "--output_dir", str(tmp_path / "pairs")],
        ),
    ):
        subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True, cwd=tmp_path, capture_output=True)
    for split in ("train", "test"):
        lines = (tmp_path / f"pairs/data_{split}_pairs.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) > 5 and all(to_pair(json.loads(line)) for line in lines)
    report = json.loads((tmp_path / "pairs/report.json").read_text())
    assert report["train"]["likes"]["kept"]["longer"] == report["train"]["likes"]["kept"]["shorter"]
    assert report["with_likes"] > 200


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data_dir", "/nowhere"], "python prepare_data.py"),
        (["--margin", "0"], "--margin: got 0.0"),
        (["--replies", "/nowhere.jsonl"], "--replies: no file"),
        (["--crawl_dir", "/nowhere"], "--crawl_dir: no folder"),
    ],
)
def test_wrong_arguments(
    prepare: ModuleType, folder: Callable[..., Path], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit, match=says):
        run(prepare, folder([record(1, "甲")], {1: 1}), *arguments)
