"""evaluate.py: every kind of contender, a kill in the middle, wrong input, and what it says at the end.

python -m pytest tests/test_evaluate.py
"""

import json
import math
import os
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT, LocalServer, load_script, make_records, run

from utils.data.chat import make_chat
from utils.data.records import to_messages
from utils.evaluate.folder import EvaluationFolder
from utils.files import read_json

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("evaluate.py")


def train(ft: ModuleType, model_dir: Path, data_dir: Path, output: Path, *flags: str) -> None:
    """Trains two steps."""
    common = ["--model_dir", str(model_dir), "--model_name", "tiny/qwen2", "--data_dir", str(data_dir)]
    common += ["--output_dir", str(output), "--max_steps", "2", "--batch_size", "4", "--grad_accum", "1"]
    run(ft, [*common, "--eval_samples", "2", "--max_new_tokens", "2", "--max_tokens", "256", *flags])


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_dir: Path, ft: ModuleType) -> Path:
    """A training run of two steps."""
    output = tmp_path_factory.mktemp("runs")
    train(ft, model_dir, data_dir, output)
    return output / "DS-tiny/qwen2"


@pytest.fixture
def build(data_dir: Path, tmp_path: Path) -> Arguments:
    """A command line for a small evaluation; keyword arguments are further flags, lists several values."""

    def write(**flags: Any) -> list[str]:
        flags = {
            "data": data_dir / "data_test.json",
            "output_dir": tmp_path / "eval",
            "max_new_tokens": 4,
            "matched": 4,
            "shots": 2,
            "name": "first",
        } | flags
        parts = [(name, value if isinstance(value, list) else [value]) for name, value in flags.items()]
        return [text for name, values in parts for text in (f"--{name}", *map(str, values))]

    return write


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_all_kinds_of_tuned_models(
    script: ModuleType,
    build: Arguments,
    lora_run: Path,
    ft: ModuleType,
    model_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    """A model, runs of each kind and a checkpoint beside the base's three prompts; each answers everything once."""
    for flags in (["--train_bnb_enabled", "True"], ["--tuner", "full"]):
        train(ft, model_dir, data_dir, tmp_path / "runs", *flags)
    qwen = tmp_path / "runs/DS-tiny"
    models = [f"plain={model_dir}/tiny/qwen2", f"lora={lora_run}", f"four={qwen}/qwen2-BNB/1", f"{qwen}/qwen2-FULL"]
    run(script, build(model=models))
    names = ["plain", "lora", "four", "qwen2-FULL", "base", "style prompt", "few-shot"]
    place = tmp_path / "eval/first"
    rows = lines(place / "replies.jsonl")
    assert sorted((row["contender"], row["id"]) for row in rows) == sorted(
        (name, record["id"]) for name in names for record in make_records(2, first=12)
    )
    report = read_json(place / "report.json")
    assert [*report["contenders"]] == names and report["comments"] == 8 and report["videos"] == 2
    scores = report["scores"]
    # The base is the model itself, and two steps of training change what is likely.
    assert scores["plain"]["likelihood"] == scores["base"]["likelihood"]
    assert len({round(scores[name]["likelihood"][0], 6) for name in names if name != "plain"}) == len(names) - 1
    by_name = {name: {row["id"]: row["replies"] for row in rows if row["contender"] == name} for name in names}
    assert by_name["plain"] == by_name["base"] and by_name["plain"] != by_name["few-shot"]
    page, told = (place / "report.html").read_text(encoding="utf-8"), capsys.readouterr().out
    assert "数据太少" in page and "too little data" in told and "report.html" in told
    assert report["best"] == []


def test_trained_weights_are_what_is_measured(
    script: ModuleType, build: Arguments, lora_run: Path, tmp_path: Path
) -> None:
    """The run's own held-out loss, in nats a token with the end of the reply, is that of the evaluation's readings."""
    from utils.data.held_out import read_comments
    from utils.data.tokenizer import load_tokenizer

    run(script, build(model=[f"lora={lora_run}"], matched=0, shots=0))
    read = [row for row in lines(tmp_path / "eval/first/likelihoods.jsonl") if row["contender"] == "lora"]
    assert {row["of"] for row in read} == {"real"} and all([*row["nats"]] == [row["id"]] for row in read)
    total = sum(nats for row in read for nats in row["nats"].values())
    report = read_json(tmp_path / "eval/first/report.json")
    texts = [record["conversations"][-1]["value"] for record in make_records(2, first=12)]
    bits = -total / math.log(2) / sum(map(len, texts))
    assert report["scores"]["lora"]["likelihood"][0] == pytest.approx(bits)
    # By hand: the same model from the checkpoint, one text a forward pass.
    import torch

    from utils.weights.run_folder import check_tag, load_trained

    record = check_tag(lora_run, "1")
    base = Path(record["arguments"]["model_dir"]) / "tiny/qwen2"
    model, chat = load_trained(lora_run, "1", record, base, False).eval(), make_chat(load_tokenizer(base))
    expected = 0.0
    for group in read_comments(Path(record["arguments"]["data_dir"]) / "data_test.json"):
        for comment in group:
            prompt = chat.prompt_ids(comment.messages[:-1])
            answer = chat.answer_ids(comment.messages, prompt)[:-1]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            expected += sum(logits[len(prompt) + place - 1, token].item() for place, token in enumerate(answer))
    assert total == pytest.approx(expected, rel=1e-6)


def test_data_with_fields_of_other_names(script: ModuleType, build: Arguments, tmp_path: Path) -> None:
    """Held-out comments, few-shot examples and training answers are those of the same data in messages."""
    found = []
    for names in (None, ("question", "answer"), ("问", "答")):
        folder = tmp_path / f"{names}"
        folder.mkdir()
        for split, first in (("train", 0), ("test", 12)):
            rows = []
            for record in make_records(2, first):
                turns = to_messages(record)[1:]
                texts = [turn["content"] for turn in turns]
                said = {"messages": turns} if names is None else dict(zip(names, texts, strict=True))
                rows.append({"id": record["id"], "video_id": record["video_id"]} | said)
            (folder / f"data_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        columns = {"columns": "user=问,assistant=答"} if names == ("问", "答") else {}
        args = script.build_parser().parse_args(build(data=folder / "data_test.jsonl", **columns))
        train, prompt = script.find_train(args), [{"role": "user", "content": "?"}]
        task = script.make_task(args, None, train)
        prompts = [make(prompt) for make in task.prompts.values()]
        found.append((task.comments, prompts, script.training_answers(train, args.columns)))
        assert script.settings_of(args, "", train)["columns"] == args.columns
    assert found[0] == found[1] == found[2] and len(found[0][0]) == len(found[0][2]) == 8
    assert any(len(messages) == 5 for messages in found[0][1]), "two examples before the question"


class Progress:
    """In place of the progress bar: how much was to be done, and how much was."""

    def __init__(self, *_: Any, total: int, **__: Any) -> None:
        self.total, self.done = total, 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def set_description_str(self, *_: Any, **__: Any) -> None:
        """Says nothing."""

    def update(self) -> None:
        self.done += 1


# Of the 8 comments four contenders read the real replies first, 32 lines, and then the base reads what they wrote.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "at", "known"),
    [("add_replies", 13, 12), ("add_likelihoods", 5, 4), ("add_likelihoods", 36, 32 + 3 * 4)],
)
def test_a_killed_evaluation_goes_on(
    script: ModuleType,
    build: Arguments,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed: str,
    at: int,
    known: int,
) -> None:
    """The replies are those of a run in one go, nothing is done twice, and a finished one loads no model."""
    bars: list[Progress] = []
    monkeypatch.setattr(script, "progress_bar", lambda *rest, **more: bars.append(Progress(*rest, **more)) or bars[-1])
    arguments = build(model=[f"tuned={model_dir}/tiny/llama"], base=model_dir / "tiny/qwen2", replies=2)
    run(script, [*arguments, "--name", "whole"])
    added = getattr(EvaluationFolder, killed)
    count = 0

    def interrupted(*rest: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        added(*rest)

    monkeypatch.setattr(EvaluationFolder, killed, interrupted)
    with pytest.raises(BaseException) as ended:  # asyncio puts it into a group of exceptions.
        run(script, arguments)
    assert "KeyboardInterrupt" in repr(ended.value)
    place = tmp_path / "eval/first"
    file = {"add_replies": "replies.jsonl", "add_likelihoods": "likelihoods.jsonl"}[killed]
    assert len(lines(place / file)) == known and not (place / "report.html").exists()
    monkeypatch.setattr(EvaluationFolder, killed, added)
    run(script, arguments)
    whole = tmp_path / "eval/whole"

    def sorted_lines(folder: Path, name: str) -> list[str]:
        return sorted(json.dumps(row, ensure_ascii=False) for row in lines(folder / name))

    def read(folder: Path) -> list[tuple[str, ...]]:
        return sorted((row["contender"], row["of"], row["id"]) for row in lines(folder / "likelihoods.jsonl"))

    assert sorted_lines(place, "replies.jsonl") == sorted_lines(whole, "replies.jsonl")
    assert read(place) == read(whole) == sorted({*read(place)})
    assert all(len(row["replies"]) == 2 for row in lines(place / "replies.jsonl"))
    in_one_go, before, after = bars
    assert in_one_go.done == in_one_go.total == before.total == before.done + after.total and after.done == after.total
    monkeypatch.setattr("utils.evaluate.work.load", None)  # It would be called for any work left.
    run(script, arguments)


@pytest.mark.slow
def test_adapters_and_a_later_contender(
    script: ModuleType, build: Arguments, lora_run: Path, model_dir: Path, tmp_path: Path
) -> None:
    """`--model base --adapter`; and what was measured before is kept when another joins."""
    tag = lora_run / "1"
    run(script, build(model=[model_dir / "tiny/qwen2"], adapter=[f"one={tag}"]))
    before = (tmp_path / "eval/first/replies.jsonl").read_bytes()
    run(script, build(model=[model_dir / "tiny/qwen2"], adapter=[f"one={tag}", f"two={tag}/adapter"]))
    after = (tmp_path / "eval/first/replies.jsonl").read_bytes()
    assert after.startswith(before)
    assert {json.loads(line)["contender"] for line in after[len(before) :].splitlines()} == {"two"}
    scores = read_json(tmp_path / "eval/first/report.json")["scores"]
    assert scores["one"]["likelihood"] == scores["two"]["likelihood"] != scores["base"]["likelihood"]


@pytest.mark.slow
def test_compare(script: ModuleType, build: Arguments, model_dir: Path, tmp_path: Path, capsys: Any) -> None:
    """Two evaluations in one report, with what they were called."""
    base = model_dir / "tiny/qwen2"
    run(script, build(model=[f"tuned={model_dir}/tiny/llama"], base=base, shots=0))
    run(script, build(model=[f"tuned={model_dir}/tiny/qwen3"], base=base, shots=0, name="second", seed=2))
    capsys.readouterr()
    folders = [str(tmp_path / "eval" / name) for name in ("first", "second")]
    run(script, ["--compare", *folders, "--output_dir", str(tmp_path / "eval")])
    report = read_json(tmp_path / "eval/first-second/report.json")
    names = [f"{folder}: {name}" for folder in ("first", "second") for name in ("tuned", "base", "style prompt")]
    assert [*report["contenders"]] == names
    first = read_json(tmp_path / "eval/first/report.json")
    assert report["scores"]["first: tuned"]["likelihood"] == first["scores"]["tuned"]["likelihood"]
    told = capsys.readouterr().out
    assert "second: tuned" in told and "different seed; what differs may be that" in told
    with pytest.raises(SystemExit, match="is an evaluation itself"):
        run(script, ["--compare", *folders, "--output_dir", str(tmp_path / "eval"), "--name", "first"])
    assert read_json(tmp_path / "eval/first/report.json") == first


class Answering(BaseHTTPRequestHandler):
    """An API with one model that says 求, cut off for every second seed."""

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.send({"object": "list", "data": [{"id": self.server.model, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((body, self.headers["Authorization"]))
        if self.server.broken:
            self.send({"error": {"message": "no such model"}}, 400)
            return
        choice = {"index": 0, "message": {"role": "assistant", "content": " 求 "}, "finish_reason": "stop"}
        self.send({"id": "1", "object": "chat.completion", "created": 0, "model": "remote", "choices": [choice]})


@pytest.mark.slow
def test_an_api(
    script: ModuleType, build: Arguments, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A server's model answers the same prompts with the same settings; its key goes nowhere else."""
    server = LocalServer(Answering)
    server.requests, server.broken, server.model = [], False, "remote"
    monkeypatch.setenv("SECRET_OF_TEST", "sk-of-the-test")
    api = {"api": server.url, "api_key_env": "SECRET_OF_TEST"}
    run(script, build(**api, base=model_dir / "tiny/qwen2", shots=0, replies=2))
    assert len(server.requests) == 16
    body, key = server.requests[0]
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("remote", 0.8, 0.95, 4)
    assert [message["role"] for message in body["messages"]] == ["system", "user"] and key == "Bearer sk-of-the-test"
    assert len({body["seed"] for body, _ in server.requests}) == 16
    report = read_json(tmp_path / "eval/first/report.json")
    assert "likelihood" not in report["scores"]["remote"] and "fitting" in report["scores"]["remote"]
    assert report["texts"]["remote"]["shares"]["equal"][0] == 1
    # vLLM calls a model by the path that it was started with; the base's own prompts are answered here even so.
    server.model = str(model_dir / "tiny/qwen2")
    run(script, build(**api | {"api": f"theirs={server.url}"}, base=server.model, shots=0, name="named"))
    report = read_json(tmp_path / "eval/named/report.json")
    assert {*report["contenders"]} == {"theirs", "base", "style prompt"} and "likelihood" in report["scores"]["base"]
    assert server.requests[-1][0]["model"] == server.model
    server.broken = True
    with pytest.raises(SystemExit, match="the server does not answer as it should.*no such model"):
        run(script, build(api=f"broken={server.url}", base=model_dir / "tiny/qwen2", shots=0, name="named"))
    written = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "eval/first").glob("*.*"))
    assert "sk-of-the-test" not in written + capsys.readouterr().out
    server.shutdown()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"limit": 0}, "--limit: got 0"),
        ({"replies": 17}, "--replies: got 17"),
        ({"replies": 2, "temperature": 0}, "all replies to a comment are equal"),
        ({"name": "a/b"}, "--name: got 'a/b'"),
        ({"data": "nowhere.json"}, "--data: no nowhere.json"),
        ({"prompt_file": "nowhere.txt"}, "--prompt_file: no nowhere.txt"),
        ({"api_model": "x"}, "belong to an --api"),
        ({"api": "http://127.0.0.1:9", "api_key_env": "NOT_SET_HERE"}, "NOT_SET_HERE is not set"),
        ({"model": [], "base": []}, "Nothing to evaluate"),
        ({"base": "nowhere"}, "--base: nowhere is no model's folder"),
        ({"model": ["nowhere"]}, "--model: nowhere is neither a model's folder"),
        ({"train_data": "nowhere.json"}, "--train_data: no nowhere.json"),
        ({"judge": "x", "teacher_config": "nowhere.yaml"}, "--judge: no nowhere.yaml"),
        ({"compare": ["nowhere", "neither"]}, "--compare: nowhere is no evaluation"),
        ({"compare": ["nowhere"]}, "--compare: expected two evaluations or more"),
        ({"judge": "x", "teacher_config": "teachers.yaml"}, "--judge: no entry 'x'"),
        ({"prompt_file": "odd.txt"}, "--prompt_file: odd.txt is no text in UTF-8"),
        ({"prompt_file": "empty.txt"}, "--prompt_file: empty.txt is empty"),
        ({"output_dir": "odd.txt"}, "--output_dir: odd.txt/first is no folder that can be written to"),
        ({"model": ["..=model"]}, "neither a model's folder"),
        ({"train_data": "records.json", "shots": 0}, "records.json cannot be used as training data"),
        ({"train_data": "held_out.json"}, "holds no other videos than the held-out data"),
    ],
)
def test_wrong_input(
    script: ModuleType, build: Arguments, model_dir: Path, root: Path, flags: dict[str, Any], told: str
) -> None:
    """One sentence, before anything is loaded, and nothing left behind."""
    given = {"model": [model_dir / "tiny/llama"], "base": model_dir / "tiny/qwen2"} | flags
    prompt = root / "examples/style_prompt.txt"
    prompt.parent.mkdir(exist_ok=True)
    prompt.write_text("像真人一样", encoding="utf-8")
    (root / "odd.txt").write_bytes(b"\xff\xfe\xff")
    (root / "empty.txt").write_text(" \n")
    (root / "teachers.yaml").write_text('{"y": {"base_url": "http://127.0.0.1:9", "model": "m"}}')
    (root / "records.json").write_text('[{"x": 1}]')
    (root / "held_out.json").write_text(json.dumps(make_records(2, first=12)), encoding="utf-8")
    arguments = build(**{name: value for name, value in given.items() if value != []})
    with pytest.raises(SystemExit) as end:
        run(script, arguments)
    assert told in str(end.value.code)
    assert not (root / "eval/first/settings.json").exists()


@pytest.mark.parametrize("name", ["", "..", "real", "question", "base"])
def test_names_that_cannot_be(script: ModuleType, build: Arguments, model_dir: Path, tmp_path: Path, name: str) -> None:
    """They would lead out of the results' folder, or are taken."""
    flags = build(model=[f"{name}={model_dir}/tiny/llama"], base=model_dir / "tiny/qwen2")
    with pytest.raises(SystemExit, match="expected one such as|is given twice, or taken"):
        run(script, flags)
    assert not (tmp_path / "eval").exists()


def test_a_full_disk(script: ModuleType, build: Arguments, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, whether one or several replies could not be kept."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EvaluationFolder, "add_replies", full)
    with pytest.raises(SystemExit, match="No space left on device. The same command goes on"):
        run(script, build(base=model_dir / "tiny/qwen2", shots=0, matched=0))


@pytest.mark.parametrize("name", ["model", "adapter", "compare"])
def test_several_at_once_or_one_by_one(script: ModuleType, name: str) -> None:
    given = [f"--{name}", "a", "b", f"--{name}", "c"]
    assert getattr(script.build_parser().parse_args(given), name) == ["a", "b", "c"]


def test_nothing_says_what_the_base_is(script: ModuleType, build: Arguments, model_dir: Path) -> None:
    with pytest.raises(SystemExit, match="--base: nothing says which model it was before tuning"):
        run(script, build(model=[model_dir / "tiny/llama"]))


def test_without_training_data(
    script: ModuleType, build: Arguments, model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """The few-shot prompt needs them; without it nothing can be said of copies."""
    alone = tmp_path / "alone.jsonl"
    records = json.loads((data_dir / "data_test.json").read_text(encoding="utf-8"))
    alone.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    with pytest.raises(SystemExit, match="--shots 0"):
        run(script, build(base=model_dir / "tiny/qwen2", data=alone))
    run(script, build(base=model_dir / "tiny/qwen2", data=alone, shots=0))
    report = read_json(tmp_path / "eval/first/report.json")
    assert [*report["contenders"]] == ["base", "style prompt"]
    assert "copied, whole" not in report["texts"]["base"]["shares"]


@pytest.mark.slow
def test_prompts_that_are_too_long(
    script: ModuleType, build: Arguments, model_dir: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """Those that do not fit one contender's prompt are left out for everybody, and counted."""
    prompts = [to_messages(record)[:-1] for record in make_records(2, first=12)]
    style = {"role": "system", "content": (ROOT / "examples/style_prompt.txt").read_text(encoding="utf-8")}
    lengths = [len(make_chat(tokenizer).prompt_ids([style, prompt[-1]])) for prompt in prompts]
    run(script, build(base=model_dir / "tiny/qwen2", max_tokens=max(lengths) - 1, shots=0))
    report = read_json(tmp_path / "eval/first/report.json")
    longest = lengths.count(max(lengths))
    assert 0 < longest < 8 and (report["comments"], report["left_out"]) == (8 - longest, longest)
    with pytest.raises(SystemExit, match="no comment that all contenders have answered"):
        run(script, build(base=model_dir / "tiny/qwen2", max_tokens=1, shots=0, name="none"))


def test_another_directory(script: ModuleType, build: Arguments, model_dir: Path, tmp_path: Path) -> None:
    """Paths count from the repository's root, wherever it is started."""
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        run(script, build(base=model_dir / "tiny/qwen2", limit=3, shots=0))
    finally:
        os.chdir(here)
    assert read_json(tmp_path / "eval/first/report.json")["comments"] == 3
