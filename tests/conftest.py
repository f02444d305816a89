"""What several test files share: tiny models, a small data set, training runs in this process and in several."""

import faulthandler
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import strategies as st

# Before torch is imported: the tests are many short computations, for which one thread is quicker than two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

# A shell starts what runs in the background deaf to Ctrl-C, and the programs that the tests interrupt would be it too.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.data.chat import Sample  # noqa: E402
from utils.data.samples import Samples  # noqa: E402

RUN_MARK = f"TESTS_OF_{os.getpid()}"
END_SEC = 60


def pytest_configure() -> None:
    """Marks whatever the tests start."""
    os.environ[RUN_MARK] = "1"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends what the tests have left behind, which would keep the shell that started them waiting, and names it."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and RUN_MARK in process.environ():
                print(f"\nThe tests have left a process behind: {' '.join(process.cmdline())[:200]}", file=sys.stderr)
                process.kill()
    if hasattr(config, "workerinput"):  # One of two processes: it waits for the other, and pytest-xdist ends it.
        return
    faulthandler.cancel_dump_traceback_later()
    threading.Thread(target=_end_hard, args=(config,), daemon=True).start()


def _end_hard(config: pytest.Config) -> None:
    time.sleep(END_SEC)
    print(f"\nThe tests are over, but Python did not end within {END_SEC} s:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    os._exit(1 if reporter is None or {"failed", "error"} & reporter.stats.keys() else 0)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_script(path: str) -> ModuleType:
    """Imports a script by its path from the repository's root."""
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example_texts() -> list[str]:
    """Chinese text to train tokenizers on."""
    return [
        line
        for path in sorted((ROOT / "examples/data").rglob("*.json*"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def make_tokenizer(vocab_size: int = 800) -> Any:
    """A byte-level BPE tokenizer with ChatML's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(example_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


DELTA_RULE = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=2)
# Models with recurrent layers: the gated delta rule, Mamba-2 and short convolutions.
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5": DELTA_RULE,
    "qwen3_next": DELTA_RULE
    | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32),
    "kimi_linear": dict(
        linear_attn_config=dict(
            num_heads=4, head_dim=16, short_conv_kernel_size=4, kda_layers=[1], full_attn_layers=[2]
        ),
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=32,
    ),
    "granitemoehybrid": MAMBA2
    | dict(num_local_experts=0, shared_intermediate_size=96, layer_types=["mamba", "attention"]),
    "falcon_h1": MAMBA2 | dict(mamba_d_ssm=128),
    "nemotron_h": dict(
        layers_block_type=["mamba", "attention"], mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=2
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"], block_ff_dim=96),
}
# Models that compute no tries.
OTHERS: dict[str, dict[str, Any]] = {
    "jamba": dict(mamba_d_state=16, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2),
    "mamba": dict(state_size=16),
    "mamba2": dict(num_heads=8, state_size=16, n_groups=1),
    "bloom": dict(n_head=4, n_layer=2),
    "gpt2": dict(n_embd=64, n_head=4, n_layer=2, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}


def make_model(kind: str, vocab_size: int, **changes: Any) -> Any:
    """A random model of two small layers: "llama", "qwen2" (tied embeddings), "qwen3", "gemma2", "gemma3" or "mistral"
    (windows of 16), or one of `HYBRIDS` and `OTHERS`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    names = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "qwen3_5": "qwen3_5_text"}
    sizes = dict(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=kind in ("qwen2", "gemma2", "gemma3"),
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    if kind in ("gemma2", "gemma3", "mistral"):
        sizes["sliding_window"] = 16
    if kind in ("gemma2", "gemma3"):
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    sizes |= HYBRIDS.get(kind, OTHERS.get(kind, {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(names.get(kind, kind), **(sizes | changes)))
    # Larger than the usual first weights, so that attention is far from uniform and the tests can see its mask.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.15)
    return model


def stored(samples: list[Sample], group: list[int] | None = None) -> Samples:
    """Samples as they come from the disk."""
    end = np.cumsum([len(sample.input_ids) for sample in samples], dtype=np.int64)
    return Samples(
        tokens=np.concatenate([sample.input_ids for sample in samples]),
        supervised=np.concatenate([sample.supervised for sample in samples]),
        begin=np.concatenate([[0], end[:-1]]),
        end=end,
        group=np.array(group or [0] * len(samples)),
        targets=np.array([sample.supervised[1:].sum() for sample in samples]),
        ids=[sample.id for sample in samples],
    )


def sample_of(ids: list[int], supervised: list[bool]) -> Sample:
    return Sample("", np.array(ids, dtype=np.int32), np.array(supervised))


@st.composite
def kindred(draw: Any, vocab_size: int = 3, longest: int = 10) -> list[Sample]:
    """Samples over so few tokens that they begin alike, are prefixes of one another, or equal; some have one target."""
    samples = []
    for _ in range(draw(st.integers(1, 12))):
        ids = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=longest))
        if samples and draw(st.booleans()):
            other = draw(st.sampled_from(samples)).input_ids.tolist()
            ids = (other[: draw(st.integers(1, len(other)))] + ids * draw(st.integers(0, 1)))[:longest]
        supervised = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        samples.append(sample_of(ids, supervised))
    return samples


@st.composite
def trees(draw: Any) -> list[int | None]:
    """The parents of tokens in depth-first order; None for a tree's first token."""
    parents: list[int | None] = []
    path: list[int] = []  # From the current tree's root to the token before.
    for place in range(draw(st.integers(1, 24))):
        keep = draw(st.integers(0, len(path)))
        path = path[:keep]
        parents.append(path[-1] if path else None)
        path.append(place)
    return parents


def ancestors(parents: list[int | None], place: int) -> list[int]:
    """A token and its ancestors, the nearest first."""
    found = []
    here: int | None = place
    while here is not None:
        found.append(here)
        here = parents[here]
    return found


def pack_of(parents: list[int | None]) -> Any:
    """A pack of these trees: depth and the index after the last descendant come from counting."""
    import torch

    from utils.train.packing import Pack

    places = range(len(parents))
    ends = [place + sum(place in ancestors(parents, other) for other in places) for place in places]
    depths = [len(ancestors(parents, place)) - 1 for place in places]
    nothing = torch.zeros(0, dtype=torch.int64)
    tree = (torch.zeros(len(parents), dtype=torch.int64), torch.tensor(depths), torch.tensor(ends))
    return Pack(*tree, nothing, nothing, nothing.float(), nothing, nothing)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder of downloaded models: tiny/llama, tiny/qwen2, tiny/qwen3 and so on."""
    folder = tmp_path_factory.mktemp("model")
    for kind in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "qwen3_5", "granitemoehybrid", "bloom"):
        make_model(kind, len(tokenizer)).save_pretrained(folder / "tiny" / kind)
        tokenizer.save_pretrained(folder / "tiny" / kind)
    return folder


def make_records(n_videos: int, first: int = 0) -> list[dict[str, Any]]:
    """Records as prepare_data.py writes them, four comments a video, of different lengths."""
    from utils.data.records import SYSTEM_PROMPT, comment_prompt

    records = []
    for video in range(first, first + n_videos):
        for number in range(4):
            prompt = comment_prompt(f"第{video}个视频", "简介" * (video % 5), "前排" if number % 2 else "")
            answer = f"视频{video}真好看" + "哈" * ((7 * video + 3 * number) % 11 + 1)
            turns = [("system", SYSTEM_PROMPT), ("user", prompt), ("assistant", answer)]
            records.append(
                {
                    "id": f"{video}-{number}",
                    "video_id": str(video),
                    "conversations": [{"from": role, "value": text} for role, text in turns],
                }
            )
    return records


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training records of 12 videos, 8 held-out ones of 2 others."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "data_train.json").write_text(json.dumps(make_records(12)), encoding="utf-8")
    (folder / "data_test.json").write_text(json.dumps(make_records(2, first=12)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def ft() -> ModuleType:
    """deepspeed_ft/train.py as a module."""
    return load_script("deepspeed_ft/train.py")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes relative paths count from the test's folder, so that output_hf/ is there."""
    import utils.files

    monkeypatch.setattr(utils.files, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def train_args(model_dir: Path, data_dir: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Builds a command line for a short run; keyword arguments are further flags."""

    def build(**flags: Any) -> list[str]:
        flags = {
            "model_dir": model_dir,
            "model_name": "tiny/qwen2",
            "data_dir": data_dir,
            "output_dir": tmp_path / "output",
            "max_steps": 3,
            "batch_size": 4,
            "grad_accum": 2,
            "max_tokens": 256,
            "pack_tokens": 512,
            "lora_dropout": 0.0,
            "lr": 1e-2,
            "warmup_ratio": 0.0,
            "lr_scheduler": "constant",
            "max_new_tokens": 4,
            "eval_samples": 4,
        } | flags
        return [text for name, value in flags.items() for text in (f"--{name}", str(value))]

    return build


def launch(script: str, arguments: list[str], ranks: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in `ranks` processes under torchrun, as one node."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*command, str(ROOT / script), *arguments],
        env=outside_ranks() | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def outside_ranks() -> dict[str, str]:
    """The environment without what says that this process is a rank, which it is once a test has trained in it."""
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The metrics of the only run below a folder."""
    (path,) = output.rglob("metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def slow(value: Any) -> Any:
    """A parameter that only CI tries."""
    return pytest.param(value, marks=pytest.mark.slow)


def run(script: ModuleType, arguments: list[str]) -> None:
    """Trains in this process."""
    script.main(script.build_parser().parse_args(arguments))


def adapter(output: Path, tag: str = "1-last") -> dict[str, Any]:
    """The LoRA weights of the only run below a folder."""
    from safetensors.torch import load_file

    (path,) = output.glob(f"*/*/{tag}/adapter/adapter_model.safetensors")
    return load_file(path)


def distance(one: dict[str, Any], two: dict[str, Any]) -> float:
    """Distance of two sets of weights, relative to their length."""
    assert one.keys() == two.keys()
    squares = {name: ((one[name] - two[name]).norm() ** 2, two[name].norm() ** 2) for name in one}
    return (sum(d for d, _ in squares.values()) / sum(n for _, n in squares.values())).sqrt().item()


# A process of its own, as the tests' own threads and llama.cpp's have nothing to do with one another.
LLAMA_CPP = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 0  # The model's own.
params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = False
params.verbosity = 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_cpp(path: Path) -> Iterator[Callable[..., Any]]:
    """llama.cpp's own server with a GGUF file; yields what asks it: a route and what goes there as JSON."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is there for Linux on x86-64 only")
    command = [sys.executable, "-c", LLAMA_CPP, str(path)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    address = server.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), "llama.cpp does not take the file; what it says stands above"

    def ask(route: str, **body: Any) -> Any:
        request = urllib.request.Request(
            address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        yield ask
    finally:
        server.kill()
        server.communicate()


class LocalServer(ThreadingHTTPServer):
    """A server on this machine that stands in for one on the net, in threads of its own."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def another_writer(path: Path) -> Iterator[None]:
    """Another process writes there until the block ends."""
    program = "import sys; from pathlib import Path; from utils.files import exclusive_lock\n"
    program += "with exclusive_lock(Path(sys.argv[1])): print('at work', flush=True); sys.stdin.readline()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT, **pipes)
    assert other.stdout.readline() == "at work\n"
    try:
        yield
    finally:
        other.communicate("end\n")


def answers_of(records: list[dict[str, Any]], key: str = "1") -> list[dict[str, Any]]:
    """What prepare_data.py writes for comments."""
    rows = []
    for record in records:
        turns = [*record["conversations"][:-1], {"from": "assistant", "value": f"老师说{record['id']}很好看"}]
        rows.append({"id": record["id"], "video_id": record["video_id"], "key": key, "conversations": turns})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def other_tokenizer() -> Any:
    """With as many tokens, two of which have changed places."""
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(state)))
    other.chat_template = tokenizer.chat_template
    return other


def sp_model(texts: list[str], size: int, **settings: Any) -> Any:
    """A SentencePiece model that is trained on texts."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, vocab_size=size, hard_vocab_limit=False, minloglevel=2,
        **settings,
    )  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(written.getvalue())
    return model


@pytest.fixture(scope="session")
def sp_llama() -> Any:
    """As Llama's: BPE with bytes for what it does not know."""
    english = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.isascii()]
    settings = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.99}
    return sp_model(english + example_texts()[:40], 700, normalization_rule_name="identity",
                    remove_extra_whitespaces=False, **settings)  # fmt: skip


@pytest.fixture(scope="session")
def fast_llama(sp_llama: Any) -> Any:
    """The same in transformers' form."""
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    vocab = {piece.piece: id for id, piece in enumerate(sp_llama.pieces)}
    scores = {piece.piece: piece.score for piece in sp_llama.pieces}
    return LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores), add_bos_token=True)
