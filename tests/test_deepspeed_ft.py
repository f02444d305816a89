"""deepspeed_ft/train.py: the numbers of a run do not depend on how it is cut, and nothing is lost when it stops.

python -m pytest tests/test_deepspeed_ft.py
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, adapter, another_writer, distance, launch, outside_ranks, read_metrics, run, slow

from utils.files import write_manifest
from utils.train.checkpoint import make_record, save_checkpoint
from utils.train.engine import choose_precision, make_ds_config
from utils.train.packing import draw_windows

Build = Callable[..., list[str]]


def train_losses(output: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(output) if "train/loss" in line]


def assert_same_numbers(one: Path, two: Path) -> None:
    """Losses and gradient norms to 5 digits; weights to 4, since AdamW divides tiny gradients by themselves."""
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        left, right = ([line[name] for line in read_metrics(output) if name in line] for output in (one, two))
        assert left == pytest.approx(right, rel=1e-5), name
    assert distance(adapter(one), adapter(two)) < 5e-4


# ---------------------------------------------------------------------------------------------------------------------
# The loss and the updates


def test_sft_loss_is_the_sum_of_weighted_cross_entropies(ft: ModuleType) -> None:
    """Uniform over 4 tokens: -log(1/4) each. Weights 1, 0 and 2 make 3 log 4."""
    loss = ft.sft_loss(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.0, 2.0]))
    assert loss.item() == pytest.approx(3 * torch.log(torch.tensor(4.0)).item())


def plain_pytorch(model_dir: Path, data_dir: Path, kind: str, steps: int, full: bool) -> dict[str, Any]:
    """The same training without DeepSpeed, packs, masks or utils/: one sample at a time, plain AdamW."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(model_dir / "tiny" / kind)
    model = AutoModelForCausalLM.from_pretrained(model_dir / "tiny" / kind, dtype=torch.float32)
    if not full:
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    records = json.loads((data_dir / "data_train.json").read_text())
    videos = np.array([zlib.crc32(record["video_id"].encode()) for record in records])
    losses = []
    for window in draw_windows(videos, 8, 8, 1, 42)[:steps]:
        loss_sum, tokens = torch.tensor(0.0), 0
        for number in window:
            messages = [{"role": t["from"], "content": t["value"]} for t in records[number]["conversations"]]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text.removesuffix("\n"), add_special_tokens=False, return_tensors="pt")["input_ids"]
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            n_prompt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            logits = model(input_ids=ids).logits[0, n_prompt - 1 : -1]
            loss_sum = loss_sum + torch.nn.functional.cross_entropy(logits, ids[0, n_prompt:], reduction="sum")
            tokens += ids.shape[1] - n_prompt
        loss = loss_sum / tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "weights": weights}


@pytest.mark.parametrize(
    "kind",
    ["qwen2", "qwen3_5", *map(slow, ["llama", "qwen3", "gemma2", "gemma3", "mistral", "granitemoehybrid", "bloom"])],
)
def test_equals_plain_pytorch(
    ft: ModuleType, train_args: Build, model_dir: Path, data_dir: Path, tmp_path: Path, kind: str, capsys: Any
) -> None:
    """bloom takes no tree masks: it is found out, and its samples are the rows of a batch."""
    run(ft, train_args(model_name=f"tiny/{kind}"))
    assert ("as the rows of a batch" in capsys.readouterr().out) == (kind == "bloom")
    plain = plain_pytorch(model_dir, data_dir, kind, steps=3, full=False)
    assert train_losses(tmp_path) == pytest.approx(plain["losses"], rel=1e-5)
    ours = {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter(tmp_path / "output").items()}
    assert distance(ours, {name: w.detach() for name, w in plain["weights"].items()}) < 5e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1, "grad_accum": 8},
        slow({"batch_size": 8, "grad_accum": 1}),
        {"pack_tokens": 256},
        slow({"share_prefix": False, "group_size": 8}),
        slow({"gradient_checkpointing": True}),
        slow({"zero_stage": 0}),
        slow({"zero_stage": 1}),
        {"zero_stage": 3},
        slow({"zero_stage": 3, "gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_cutting_changes_nothing(ft: ModuleType, train_args: Build, tmp_path: Path, changes: dict[str, Any]) -> None:
    run(ft, train_args(output_dir=tmp_path / "one"))
    run(ft, train_args(output_dir=tmp_path / "two", **changes))
    assert_same_numbers(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_equal_one(ft: ModuleType, train_args: Build, tmp_path: Path, zero_stage: int) -> None:
    run(ft, train_args(output_dir=tmp_path / "one", batch_size=4, grad_accum=2))
    arguments = train_args(output_dir=tmp_path / "two", batch_size=4, grad_accum=1, zero_stage=zero_stage)
    finished = launch("deepspeed_ft/train.py", arguments, ranks=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_same_numbers(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("zero_stage", [2, *map(slow, (0, 3))])
def test_qlora_is_the_same_at_every_stage(ft: ModuleType, train_args: Build, tmp_path: Path, zero_stage: int) -> None:
    run(ft, train_args(output_dir=tmp_path / "one", train_bnb_enabled=True, zero_stage=1))
    run(ft, train_args(output_dir=tmp_path / "two", train_bnb_enabled=True, zero_stage=zero_stage))
    assert (tmp_path / "one/DS-tiny/qwen2-BNB/1/adapter").is_dir()
    assert train_losses(tmp_path / "one") == pytest.approx(train_losses(tmp_path / "two"), rel=1e-4)
    assert train_losses(tmp_path / "one")[-1] < train_losses(tmp_path / "one")[0]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [{}, {"train_bnb_enabled": True}], ids=["fp32", "nf4"])
def test_weights_that_are_really_sharded(ft: ModuleType, train_args: Build, tmp_path: Path, bits: dict) -> None:
    """DeepSpeed leaves the weights of models as small as the tests' whole, if it is not told otherwise."""
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    run(ft, train_args(output_dir=tmp_path / "one", **bits))
    run(ft, train_args(output_dir=tmp_path / "two", deepspeed_config=tmp_path / "ds.json", **bits))
    assert_same_numbers(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_bf16_gradients_are_summed_up_in_fp32(ft: ModuleType, train_args: Build, zero_stage: int) -> None:
    """Those of 64 packs are as exact as a single pack's, 0.2 %; in bf16 the sum would be off by 1 %."""
    from deepspeed.utils import safe_get_full_grad

    from utils.train.engine import make_engine, start_ranks

    args = ft.build_parser().parse_args(train_args(zero_stage=zero_stage))
    start_ranks(args.seed)
    layer = torch.nn.Linear(64, 64, bias=False)
    engine = make_engine(layer, args, make_ds_config(args, ROOT / "deepspeed_ft/ds_config.json", "bf16"), 1)
    random, expected = torch.Generator().manual_seed(0), torch.zeros(64, 64)
    for _ in range(64):
        inputs, weights = (torch.randn(8, 64, generator=random).bfloat16() for _ in range(2))
        engine.backward((engine(inputs).float() * weights).sum() / 64, scale_wrt_gas=False)
        expected += weights.float().T @ inputs.float() / 64
    ours = safe_get_full_grad(layer.weight).float()
    assert (ours - expected).norm() / expected.norm() < 3e-3
    engine.destroy()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{"offload": "optimizer"}, {"offload": "param", "zero_stage": 3}], ids=lambda flags: flags["offload"]
)
def test_offloading_changes_nothing(
    ft: ModuleType, train_args: Build, tmp_path: Path, flags: dict, monkeypatch: Any
) -> None:
    """Without a compiler: PyTorch's AdamW."""
    monkeypatch.setattr("utils.train.engine.shutil.which", lambda name: None)
    run(ft, train_args(output_dir=tmp_path / "one"))
    run(ft, train_args(output_dir=tmp_path / "two", **flags))
    assert_same_numbers(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") and shutil.which("ninja")), reason="needs a C++ compiler and ninja")
def test_offloading_to_deepspeeds_own_adam(ft: ModuleType, train_args: Build, tmp_path: Path, capsys: Any) -> None:
    run(ft, train_args(output_dir=tmp_path / "one"))
    capsys.readouterr()
    run(ft, train_args(output_dir=tmp_path / "two", offload="optimizer"))
    assert "No C++ compiler" not in capsys.readouterr().out
    assert_same_numbers(tmp_path / "one", tmp_path / "two")


def test_zero_stage_0_is_for_fp32(ft: ModuleType, train_args: Build, capsys: Any) -> None:
    args = ft.build_parser().parse_args(train_args(zero_stage=0))
    default = ROOT / "deepspeed_ft/ds_config.json"
    assert make_ds_config(args, default, "fp32")["zero_optimization"]["stage"] == 0
    capsys.readouterr()
    assert make_ds_config(args, default, "bf16")["zero_optimization"]["stage"] == 2
    assert "stage 2 is used" in capsys.readouterr().out


def test_what_a_configuration_cannot_say_is_told(
    ft: ModuleType, train_args: Build, tmp_path: Path, capsys: Any
) -> None:
    """An optimizer and a scheduler are left out, what goes with a precision and no offload is kept."""
    given = {"optimizer": {"type": "SGD"}, "scheduler": {"type": "WarmupLR"}, "fp16": {"initial_scale_power": 8}}
    given |= {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}, "train_batch_size": 16}
    (tmp_path / "ds.json").write_text(json.dumps(given))
    args = ft.build_parser().parse_args(train_args(deepspeed_config=tmp_path / "ds.json"))
    config = make_ds_config(args, ROOT / "none.json", "fp16")
    assert config["fp16"] == {"initial_scale_power": 8, "enabled": True}
    assert config["zero_optimization"] == {"stage": 2} and config["optimizer"]["params"]["torch_adam"]
    assert "train_batch_size" not in config and "scheduler" not in config
    told = capsys.readouterr().out
    assert all(word in told for word in ("optimizer", "scheduler", "train_batch_size"))


@pytest.mark.parametrize(("real", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_emulated_bf16_is_not_chosen(ft: ModuleType, monkeypatch: Any, real: bool, chosen: str) -> None:
    card = SimpleNamespace(device_name=lambda: "cuda", is_bf16_supported=lambda: True)
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: card)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or real)
    assert choose_precision("auto") == chosen


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on


def state(output: Path) -> dict[str, torch.Tensor]:
    """All weights and optimizer states of the newest checkpoint."""
    tensors: dict[str, torch.Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                collect(f"{name}/{key}", item)
        elif isinstance(value, list):
            for number, item in enumerate(value):
                collect(f"{name}/{number}", item)

    for path in sorted(output.glob("*/*/1-last/*.pt")):
        collect(path.name, torch.load(path, weights_only=False))
    return tensors


def assert_same_state(one: Path, two: Path) -> None:
    """Bit for bit."""
    left, right = state(one), state(two)
    assert left.keys() == right.keys() and left
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing


@pytest.mark.parametrize(
    "flags",
    [
        slow({"zero_stage": 0}),
        {"zero_stage": 2},
        slow({"zero_stage": 3}),
        slow({"zero_stage": 2, "train_bnb_enabled": True}),
        slow({"zero_stage": 2, "tuner": "full"}),
        slow({"zero_stage": 0, "tuner": "full"}),
        slow({"zero_stage": 2, "precision": "bf16"}),
        slow({"zero_stage": 3, "precision": "bf16"}),
    ],
    ids=str,
)
def test_resume_equals_a_straight_run(ft: ModuleType, train_args: Build, tmp_path: Path, flags: dict[str, Any]) -> None:
    """With dropout on, so that the random numbers have to go on as well, and a schedule that moves."""
    flags = flags | {"lora_dropout": 0.2, "save_steps": 2, "lr_scheduler": "cosine", "warmup_ratio": 0.5}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(ft, train_args(output_dir=straight, max_steps=5, **flags))

    def stopping(steps: range, *_: Any, **__: Any) -> Any:
        for step in steps:
            if step == 4:  # Two steps are saved, the third is lost.
                raise KeyboardInterrupt
            yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.train.run.progress_bar", stopping)
        with pytest.raises(SystemExit, match="130"):
            run(ft, train_args(output_dir=stopped, max_steps=5, **flags))
    (record,) = stopped.glob("*/*/1-last/run.json")
    assert json.loads(record.read_text())["progress"]["step"] == 2
    run(ft, train_args(output_dir=stopped, max_steps=5, resume=True, **flags))
    assert_same_state(straight, stopped)
    assert train_losses(straight) == train_losses(stopped)


def start(arguments: list[str], ranks: int = 1) -> subprocess.Popen[str]:
    """Starts training as a user does, who can press Ctrl-C."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "deepspeed_ft/train.py"), *arguments],
        env=outside_ranks(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGINT, 1),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_lets_the_step_end_and_saves(
    ft: ModuleType, train_args: Build, tmp_path: Path, number: int, ranks: int
) -> None:
    """Nothing is lost: who goes on gets what a straight run gets, bit for bit."""
    flags = {"lora_dropout": 0.2, "save_steps": 1000, "eval_steps": 1000, "epochs": 1000, "lr_scheduler": "constant"}
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    process = start(train_args(output_dir=stopped, max_steps=-1, **flags), ranks)
    try:
        wait_for(lambda: any(len(path.read_bytes().splitlines()) > 4 for path in stopped.rglob("metrics.jsonl")))
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    if ranks == 1:  # torchrun ends with a traceback of its own.
        assert process.returncode == 128 + number and "Traceback" not in said, said
    (record,) = stopped.glob("*/*/1-last/run.json")
    step = json.loads(record.read_text())["progress"]["step"]
    assert len(train_losses(stopped)) == step and f"Stopped after step {step} of {6000 // ranks}, saved in" in said
    assert "Go on with the same command and --resume." in said
    if ranks == 1:
        run(ft, train_args(output_dir=stopped, max_steps=step + 2, resume=True, **flags))
        run(ft, train_args(output_dir=straight, max_steps=step + 2, **flags))
        assert_same_state(straight, stopped)
        assert train_losses(straight) == train_losses(stopped)


def test_ctrl_c_before_the_first_step(train_args: Build, tmp_path: Path) -> None:
    process = start(train_args(output_dir=tmp_path / "output"))
    try:
        wait_for(lambda: any(tmp_path.rglob("run.json")))
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said and said.count("Stop") == 1, said


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero_stage"), [(2, 2), (2, 3)])
def test_resume_after_kill(train_args: Build, tmp_path: Path, ranks: int, zero_stage: int) -> None:
    flags = {"lora_dropout": 0.2, "save_steps": 2, "max_steps": 12, "zero_stage": zero_stage, "grad_accum": 1}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finished = launch("deepspeed_ft/train.py", train_args(output_dir=straight, **flags), ranks)
    assert finished.returncode == 0, finished.stderr[-3000:]

    arguments = train_args(output_dir=killed, **flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = outside_ranks()
    process = subprocess.Popen(
        [*command, str(ROOT / "deepspeed_ft/train.py"), *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: any(killed.glob("*/*/1-last/run.json")))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (record,) = killed.glob("*/*/1-last/run.json")
    assert json.loads(record.read_text())["progress"]["step"] < 12
    finished = launch("deepspeed_ft/train.py", [*arguments, "--resume"], ranks)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_same_state(straight, killed)
    assert train_losses(straight) == train_losses(killed)


@pytest.mark.slow
def test_resume_where_nodes_share_no_folder(train_args: Build, tmp_path: Path) -> None:
    """Two nodes of one rank, each with its own output folder."""

    def both(**flags: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        environment = outside_ranks()
        environment |= {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    str(ROOT / "deepspeed_ft/train.py"),
                    *train_args(output_dir=tmp_path / f"node{rank}", grad_accum=1, **flags),
                ],
                env=environment | {"RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors

    both(max_steps=2)
    both(max_steps=3, resume=True)
    assert len(train_losses(tmp_path / "node0")) == 3


def test_a_changed_configuration_is_refused(ft: ModuleType, train_args: Build, tmp_path: Path) -> None:
    """By its content: the file's name is the same."""
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 1.0}')
    run(ft, train_args(max_steps=1, deepspeed_config=tmp_path / "ds.json"))
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 0.001}')
    with pytest.raises(SystemExit) as stop:
        run(ft, train_args(max_steps=2, deepspeed_config=tmp_path / "ds.json", resume=True))
    assert "deepspeed_config" in str(stop.value.code)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves


def test_best_is_the_lowest_held_out_loss(ft: ModuleType, train_args: Build, tmp_path: Path, monkeypatch: Any) -> None:
    losses = iter([9.0, 5.0, 3.0, 4.0])
    monkeypatch.setattr("utils.train.run.Run._measure", lambda *_: {"eval/loss": next(losses)})
    run(ft, train_args(eval_steps=1, save_steps=1))
    folder = tmp_path / "output/DS-tiny/qwen2"
    assert json.loads((folder / "1/run.json").read_text())["progress"]["step"] == 2
    assert json.loads((folder / "1-last/run.json").read_text())["progress"]["step"] == 3
    assert json.loads((folder / "1-last/run.json").read_text())["progress"]["best_step"] == 2
    assert len(list(folder.glob(".1.*"))) == 2  # What no tag points to is deleted.


def test_output_folder_behind_a_link(ft: ModuleType, train_args: Build, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    run(ft, train_args(output_dir=tmp_path / "link/../link"))
    for tag in ("1", "1-last"):
        assert (tmp_path / "disk/DS-tiny/qwen2" / tag / "manifest.json").is_file()


@pytest.mark.parametrize("flags", [{}, {"train_bnb_enabled": True}, {"zero_stage": 0}], ids=str)
def test_a_checkpoint_holds_no_frozen_weights(ft: ModuleType, train_args: Build, tmp_path: Path, flags: Any) -> None:
    run(ft, train_args(**flags))
    (tag,) = (tmp_path / "output").glob("*/*/1")
    trainable = sum(tensor.nbytes for tensor in adapter(tmp_path / "output").values())
    engine_files = sum(path.stat().st_size for path in tag.glob("*states.pt"))
    # Weights, and of the optimizer fp32 weights (from stage 1 on) and two moments; names and shapes are some kB.
    assert engine_files < 1.1 * 4 * trainable + 60_000
    module = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert all("lora_" in name for name in module)


def test_run_record_and_samples(ft: ModuleType, train_args: Build, tmp_path: Path) -> None:
    run(ft, train_args(eval_steps=2))
    folder = tmp_path / "output/DS-tiny/qwen2"
    record = json.loads((folder / "1/run.json").read_text())
    assert record["settings"]["lr"] == 1e-2 and record["settings"]["precision"] == "fp32"
    assert record["data"]["system_prompt"].startswith("你是一名B站用户")
    assert record["ds_config"]["zero_optimization"]["stage"] == 2 and record["versions"]["torch"] == version("torch")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 2, 3} and samples[0]["real"].startswith("视频12真好看")
    assert (folder / "loss.png").stat().st_size > 5000


def test_test_mode_writes_replies_beside_the_real_ones(ft: ModuleType, train_args: Build, tmp_path: Path) -> None:
    run(ft, train_args())
    for flags in ({}, {"test_bnb_enabled": True}):
        run(ft, train_args(train_mode=False, test_mode=True, **flags))
        lines = (tmp_path / "output/DS-tiny/qwen2/test_1.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 8 and rows[0]["real"].startswith("视频12真好看") and "第12个视频" in rows[0]["prompt"]
        assert all(set(row) == {"id", "prompt", "reply", "real"} for row in rows)
    run(ft, train_args(train_mode=False, test_mode=True, test_split="train"))
    lines = (tmp_path / "output/DS-tiny/qwen2/test_1_train.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"{n // 4}-{n % 4}" for n in range(48)]


@pytest.mark.parametrize("on_4_bits", [False, True])
def test_test_mode_ends_whatever_the_patterns_of_an_adapter(
    ft: ModuleType, train_args: Build, tmp_path: Path, on_4_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(ft, train_args(max_steps=1))
    folder = tmp_path / "output/DS-tiny/qwen2/1"
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    config["target_modules"] = r"((\w|\.)+)+!"
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    write_manifest(folder)
    monkeypatch.setattr("utils.weights.adapters.PATTERN_SEC", 1)
    with pytest.raises(SystemExit, match="patterns of layers take too long"):
        run(ft, train_args(train_mode=False, test_mode=True, test_bnb_enabled=on_4_bits))


@pytest.mark.parametrize("flags", [{}, {"train_bnb_enabled": True}], ids=str)
def test_the_base_answers_as_it_did_before_training(
    ft: ModuleType, train_args: Build, tmp_path: Path, flags: dict[str, Any]
) -> None:
    """Without any run; its replies are those of step 0."""
    run(ft, train_args(train_mode=False, test_mode=True, test_model="base", **flags))
    (file,) = (tmp_path / "output").glob("*/*/test_base.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    run(ft, train_args(max_steps=1, **flags))
    shown = [json.loads(line) for line in (file.parent / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    first = [row for row in shown if row["step"] == 0]
    assert len(rows) == 8 and len(first) == 4
    assert [row["reply"] for row in rows[:4]] == [row["reply"] for row in first]


def test_a_broken_base_is_named(ft: ModuleType, train_args: Build, model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model/tiny/qwen2/model.safetensors").write_bytes(b"torn")
    flags = {"model_dir": tmp_path / "model", "train_mode": False, "test_mode": True, "test_model": "base"}
    with pytest.raises(SystemExit, match="python download_pt.py --model tiny/qwen2"):
        run(ft, train_args(**flags))


def test_held_out_videos_are_split_off_when_there_is_no_test_file(
    ft: ModuleType, train_args: Build, tmp_path: Path, data_dir: Path
) -> None:
    records = json.loads((data_dir / "data_train.json").read_text())
    for number, record in enumerate(records):
        record["video_id"] = str(number // 2)
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run(ft, train_args(data_dir=own))
    record = json.loads(next(tmp_path.glob("output/*/*/1/run.json")).read_text())
    assert record["data"]["train_samples"] + record["data"]["test_samples"] == 48
    assert 0 < record["data"]["test_samples"] < 10


def test_an_empty_test_file_holds_nothing_out(
    ft: ModuleType, train_args: Build, tmp_path: Path, data_dir: Path, capsys: Any
) -> None:
    shutil.copytree(data_dir, tmp_path / "own")
    (tmp_path / "own/data_test.json").write_text("[\n]\n")
    run(ft, train_args(data_dir=tmp_path / "own"))
    told = capsys.readouterr().out
    assert "held out: 0" in told and "held-out loss not measured" in told
    assert (tmp_path / "output/DS-tiny/qwen2/1/run.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Errors a user can make


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"model_name": "no/model"}, "python download_pt.py --model no/model"),
        ({"data_dir": "/nowhere"}, "python prepare_data.py --total 2000"),
        ({"epochs": 0}, "--epochs: got 0"),
        ({"pack_tokens": 100}, "--pack_tokens: got 100"),
        ({"tuner": "full", "train_bnb_enabled": True}, "--tuner lora"),
        ({"tuner": "full", "test_bnb_enabled": True}, "--test_bnb_enabled"),
        ({"ckpt_id": "../x"}, "--ckpt_id"),
        ({"resume": True, "overwrite": True}, "name one of them"),
        ({"resume": True}, "Start the run without --resume"),
        ({"offload": "param", "zero_stage": 2}, "--zero_stage 3"),
        ({"offload": "param"}, "--zero_stage 3, offloading the optimizer 1 or more; got stage 2"),
        ({"offload": "optimizer", "zero_stage": 0}, "got stage 0"),
        ({"max_steps": 0}, "--max_steps: got 0"),
        ({"lr": 0}, "--lr: got 0.0"),
        ({"lr": "nan"}, "--lr: got nan"),
        ({"weight_decay": -1}, "--weight_decay: got -1.0"),
        ({"seed": -1}, "--seed: got -1"),
        ({"lora_target": "nothere"}, "--lora_target nothere"),
        ({"output_dir": __file__}, "--output_dir"),
        ({"train_mode": False}, "nothing to do"),
        ({"precision": "fp16"}, "--precision fp16"),
        ({"chat_template": "nowhere.jinja"}, "--chat_template"),
        ({"train_mode": False, "test_mode": True}, "No checkpoint '1'"),
    ],
    ids=str,
)
def test_user_errors(ft: ModuleType, train_args: Build, flags: dict[str, Any], expected: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(ft, train_args(**flags))
    assert expected in str(stop.value.code)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[1]", "expected a DeepSpeed configuration"),
        (b'{"zero_optimization": 3}', "expected a DeepSpeed configuration"),
        (b'{"zero_optimization": {"stage": 7}}', "stage is 7"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_a_configuration_that_is_none(
    ft: ModuleType, train_args: Build, tmp_path: Path, content: bytes, expected: str
) -> None:
    (tmp_path / "ds.json").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run(ft, train_args(deepspeed_config=tmp_path / "ds.json"))
    assert expected in str(stop.value.code)


@pytest.mark.parametrize("content", [b"{{ oops", b"{{ raise_exception('no') }}", b"\xff"])
def test_a_template_that_is_none(ft: ModuleType, train_args: Build, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "chat.jinja").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run(ft, train_args(chat_template=tmp_path / "chat.jinja"))
    assert "--chat_template" in str(stop.value.code)


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_a_model_with_something_missing(
    ft: ModuleType, train_args: Build, tmp_path: Path, model_dir: Path, missing: str
) -> None:
    shutil.copytree(model_dir / "tiny/qwen2", tmp_path / "a/b")
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:999]), Path.unlink):
        damage(tmp_path / "a/b" / missing)
        with pytest.raises(SystemExit) as stop:
            run(ft, train_args(model_dir=tmp_path, model_name="a/b", overwrite=True))
        assert "python download_pt.py --model a/b" in str(stop.value.code)


def test_several_errors_are_told_at_once(ft: ModuleType, train_args: Build) -> None:
    with pytest.raises(SystemExit) as stop:
        run(ft, train_args(model_name="no/model", data_dir="/nowhere", epochs=0))
    assert all(part in str(stop.value.code) for part in ("--epochs", "download_pt.py", "prepare_data.py"))


def test_an_unknown_record_format_is_named(ft: ModuleType, train_args: Build, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"id": "seven", "question": "a", "reply": "b"}\n')
    with pytest.raises(SystemExit) as stop:
        run(ft, train_args(data_dir=tmp_path))
    assert "record 0 (id seven)" in str(stop.value.code) and "question" in str(stop.value.code)


def test_a_run_with_other_columns_is_another_run(
    ft: ModuleType, train_args: Build, tmp_path: Path, capsys: Any
) -> None:
    rows = [f"{n},问{n},答{n},设定" for n in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["id,frage,antwort,rolle", *rows]), encoding="utf-8")
    columns = "user=frage,assistant=antwort"
    flags = {"data_dir": tmp_path, "columns": columns, "max_new_tokens": 1, "eval_samples": 1}
    run(ft, train_args(**flags, max_steps=1))
    assert "Fields taken as user and assistant: frage, antwort.\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run(ft, train_args(**flags | {"columns": f"{columns},system=rolle"}, max_steps=2, resume=True))
    assert "columns {'user': 'frage', 'assistant': 'antwort'} (now {" in str(stop.value.code)
    with pytest.raises(SystemExit, match=r"train\.csv, record 0: no field 'x' of --columns.*'antwort', 'frage'"):
        run(ft, train_args(**flags | {"columns": "user=frage,assistant=x"}, overwrite=True))


def test_another_run_is_not_overwritten(ft: ModuleType, train_args: Build, tmp_path: Path) -> None:
    run(ft, train_args(max_steps=1))
    with pytest.raises(SystemExit) as stop:
        run(ft, train_args(max_steps=1, lr=1e-3))
    assert all(word in str(stop.value.code) for word in ("--resume", "--overwrite", "--output_dir"))
    for changes in ({"zero_stage": 1}, {"lr": 1e-3}):
        with pytest.raises(SystemExit) as stop:
            run(ft, train_args(max_steps=2, resume=True, **changes))
        assert f"{next(iter(changes))} " in str(stop.value.code) and "\n" not in str(stop.value.code)
    run(ft, train_args(max_steps=2, lr=1e-3, overwrite=True))
    assert len(train_losses(tmp_path)) == 2


def test_another_number_of_ranks_is_refused(ft: ModuleType, train_args: Build, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        of_two = lambda a, b, c, world_size, *rest: make_record(a, b, c, 2, *rest)  # noqa: E731
        patch.setattr("utils.train.run.make_record", of_two)
        run(ft, train_args(max_steps=1))
    with pytest.raises(SystemExit) as stop:
        run(ft, train_args(max_steps=2, resume=True))
    assert "ranks 2 (now 1)" in str(stop.value.code)


def test_a_damaged_checkpoint_is_not_unpickled(ft: ModuleType, train_args: Build, tmp_path: Path) -> None:
    run(ft, train_args(max_steps=1))
    (victim,) = (tmp_path / "output").glob("*/*/1-last/mp_rank_00_model_states.pt")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run(ft, train_args(max_steps=2, resume=True))
    assert "is damaged" in str(stop.value.code)


class Payload:
    """What runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("where", ["mp_rank_00_model_states.pt", "*_optim_states.pt", "random_rank_0.pt", "more.pt"])
def test_no_code_of_a_checkpoint_runs_when_it_is_resumed(
    ft: ModuleType, train_args: Build, tmp_path: Path, where: str
) -> None:
    """Although its manifest says that it is whole: that says nothing of who made it."""
    run(ft, train_args(max_steps=1))
    (tag,) = (tmp_path / "output").glob("*/*/1-last")
    (path,) = [*tag.glob(where)] or [tag / where]
    torch.save({"module": Payload(tmp_path / "it ran")}, path)
    write_manifest(tag)
    with pytest.raises(SystemExit) as stop:
        run(ft, train_args(max_steps=2, resume=True))
    assert not (tmp_path / "it ran").exists()
    assert "it holds" in stop.value.code and "If you know who made it: --trust_checkpoint True" in stop.value.code


def test_a_checkpoint_that_is_trusted_is_resumed(ft: ModuleType, train_args: Build, tmp_path: Path) -> None:
    run(ft, train_args(max_steps=1))
    (tag,) = (tmp_path / "output").glob("*/*/1-last")
    torch.save({"path": Payload(tmp_path / "it ran")}, tag / "more.pt")
    (tag / "manifest.json").unlink()
    with pytest.raises(SystemExit, match="--trust_checkpoint True"):
        run(ft, train_args(max_steps=2, resume=True))
    run(ft, train_args(max_steps=2, resume=True, trust_checkpoint=True))
    assert len(train_losses(tmp_path)) == 2


def test_a_folder_in_which_another_run_is_at_work(ft: ModuleType, train_args: Build, tmp_path: Path) -> None:
    """Nothing of it is touched, whatever is asked for."""
    run(ft, train_args(max_steps=1))
    folder = tmp_path / "output/DS-tiny/qwen2"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with another_writer(folder):
        for flags in ({"overwrite": True}, {"resume": True, "max_steps": 2}, {"ckpt_id": "other"}):
            with pytest.raises(SystemExit, match="Another process is writing"):
                run(ft, train_args(**flags))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    run(ft, train_args(max_steps=2, resume=True))


@pytest.mark.slow
def test_two_runs_in_one_folder(ft: ModuleType, train_args: Build, tmp_path: Path, monkeypatch: Any) -> None:
    """The second says so, whatever it was told, and the first is not disturbed; after its end the folder is free."""
    said, alone = [], outside_ranks()

    def meanwhile(*args: Any) -> None:
        if not said:
            command = [sys.executable, str(ROOT / "deepspeed_ft/train.py"), *train_args(max_steps=1)]
            for flags in (["--overwrite"], ["--ckpt_id", "other"], ["--overwrite", "--ckpt_id", "other"]):
                said.append(subprocess.run([*command, *flags], env=alone, capture_output=True, text=True))
        save_checkpoint(*args)

    monkeypatch.setattr("utils.train.run.save_checkpoint", meanwhile)
    run(ft, train_args(max_steps=2))
    assert len(said) == 3
    for second in said:
        assert second.returncode == 1 and "Traceback" not in second.stderr
        assert "Another process is writing" in second.stderr.splitlines()[-1]
    assert len(train_losses(tmp_path)) == 2
    assert not list((tmp_path / "output").rglob(".*.lock"))
    command = [sys.executable, str(ROOT / "deepspeed_ft/train.py"), *train_args(max_steps=3), "--resume"]
    assert subprocess.run(command, env=alone, capture_output=True).returncode == 0


@pytest.mark.slow
def test_two_runs_of_several_ranks_in_one_folder(train_args: Build, tmp_path: Path) -> None:
    """All ranks of the second end."""
    first = tmp_path / "output"
    arguments = train_args(output_dir=first, max_steps=-1, epochs=1000)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "deepspeed_ft/train.py"), *arguments],
        env=outside_ranks(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: any(first.rglob("metrics.jsonl")))
        second = launch("deepspeed_ft/train.py", [*arguments, "--overwrite"], 2)
    finally:
        process.kill()
        process.wait()
    assert second.returncode != 0 and "Another process is writing" in second.stderr
    run_again = launch("deepspeed_ft/train.py", [*train_args(max_steps=1), "--overwrite"], 2)
    assert run_again.returncode == 0, run_again.stderr[-2000:]


def test_errors_of_the_command_line_have_no_traceback(train_args: Build) -> None:
    command = [sys.executable, str(ROOT / "deepspeed_ft/train.py"), *train_args(model_name="no/model")]
    finished = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert finished.returncode == 1 and "Traceback" not in finished.stderr and "download_pt.py" in finished.stderr
    finished = subprocess.run([*command[:2], "--train_mode", "no"], capture_output=True, text=True)
    assert finished.returncode == 2 and "expected True, False, 1 or 0" in finished.stderr
