"""How fast and in how little memory is a large model merged? Ours against copying the files, and against PEFT.

    python benchmarks/bench_convert.py --work_dir benchmarks/output/convert

Makes models of random numbers: one of Llama-2-7B's shape in bf16 (13.5 GB) and one of about 1B, each with a LoRA of
rank 16 on all linear layers. merge_qlora.py merges each, its check included, which computes all layers twice in fp32
for a few hundred tokens and is timed apart; `cp` copies the base. At 1B PEFT merges the same in memory
(from_pretrained, merge_and_unload, save_pretrained); and the fp32 weights of a ZeRO-2 checkpoint of two ranks are
joined and written by utils/weights/shards.py and utils/weights/lazy.py, and by DeepSpeed's zero_to_fp32.

Memory is the largest resident set of the process (VmHWM). Prints a markdown table and a JSON line.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.files import from_root  # noqa: E402

COMMON = {"num_attention_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False, "eos_token_id": 2}
SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GB = 1e9

# A process's largest resident set, bytes; what getrusage says goes on counting that of the process that started it.
PEAK = """
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
"""
# Runs a script's own command and says what it took.
MEASURED = """
import os, runpy, sys, time
from utils.cli import LARGE_PAGES
os.environ.setdefault(*LARGE_PAGES)  # As the script does, before torch is there.
import utils.export.model_folder
times, write = {}, utils.export.model_folder.write_weights
def timed(*arguments):
    started = time.perf_counter()
    write(*arguments)
    times["writing"] = time.perf_counter() - started
utils.export.model_folder.write_weights = timed
started = time.perf_counter()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("MEASURED", time.perf_counter() - started, times["writing"], peak())
"""
PEFT = """
import sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
started = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
took = time.perf_counter() - started
print("MEASURED", took, took, peak())
"""
SHARDS = """
import sys, time
from pathlib import Path
from utils.weights.shards import open_shards
from utils.weights.lazy import write_weights
started = time.perf_counter()
Path(sys.argv[2]).mkdir()
write_weights(Path(sys.argv[2]), open_shards(Path(sys.argv[1]) / "tag", 2), "5GB")
took = time.perf_counter() - started
print("MEASURED", took, took, peak())
"""
ZERO_TO_FP32 = """
import sys, time
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
started = time.perf_counter()
convert_zero_checkpoint_to_fp32_state_dict(sys.argv[1], sys.argv[2], tag="tag", safe_serialization=True)
took = time.perf_counter() - started
print("MEASURED", took, took, peak())
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work_dir", default="benchmarks/output/convert", help="for models; 45 GB with 7B")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def make_model(size: str, folder: Path) -> None:
    """Writes a base of random numbers, and an adapter for it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from utils.weights.lazy import LazyTensor, write_weights
    from utils.weights.merging import make_skeleton

    (folder / "base").mkdir(parents=True)
    config = LlamaConfig(**COMMON, **SHAPES[size])
    model = make_skeleton(config, torch.bfloat16, False)

    def read(shape: tuple[int, ...]) -> torch.Tensor:
        # Norms are near 1; others keep what goes through a layer at about its size.
        noise = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        return noise + 1 if len(shape) == 1 else noise

    tensors = {
        name: LazyTensor(tuple(one.shape), torch.bfloat16, partial(read, tuple(one.shape)))
        for name, one in model.state_dict().items()
    }
    write_weights(folder / "base", tensors, "5GB")
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    config.save_pretrained(folder / "base")
    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder / "base")
    adapted = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"), low_cpu_mem_usage=True
    )
    (folder / "adapter").mkdir()
    weights = {
        name.replace(".default", ""): torch.randn(parameter.shape) * 0.02
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    save_file(weights, folder / "adapter/adapter_model.safetensors")
    adapted.peft_config["default"].save_pretrained(folder / "adapter")


def make_checkpoint(base: Path, folder: Path) -> None:
    """Writes what ZeRO stage 2 leaves of a model's fp32 weights on two ranks, without the optimizer's moments."""
    import torch

    from utils.weights.layouts import open_weights

    weights, ranks = open_weights(base), 2
    row = torch.cat([stored.read().float().reshape(-1) for stored in weights.values()])
    (folder / "tag").mkdir(parents=True)
    shapes = {name: torch.Size(stored.shape) for name, stored in weights.items()}
    states = {"buffer_names": [], "module": {}, "param_shapes": [shapes], "shared_params": {}, "ds_version": "0"}
    torch.save(states, folder / "tag/mp_rank_00_model_states.pt")
    for rank, part in enumerate(row.chunk(ranks)):
        state = {"zero_stage": 2, "partition_count": ranks, "single_partition_of_fp32_groups": [part.clone()]}
        path = folder / f"tag/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, path)


def measure(program: str, *arguments: Any) -> dict[str, float]:
    """Runs a program that says what it took: seconds in all, of them writing, and bytes of memory."""
    command = [sys.executable, "-c", PEAK + program, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if finished.returncode:
        raise SystemExit(f"failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}")
    (line,) = [line for line in finished.stdout.splitlines() if line.startswith("MEASURED")]
    return dict(zip(("seconds", "writing", "peak"), map(float, line.split()[1:]), strict=True))


def copy(base: Path, target: Path) -> dict[str, float]:
    """Copies a base's files to the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "writing": seconds, "peak": 0.0}


def bench(size: str, rounds: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Measures one size, all ways in turn."""
    if not (folder / "adapter/adapter_config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        make_model(size, folder)
    base, adapter, target = folder / "base", folder / "adapter", folder / "result"
    ours = [ROOT / "merge_qlora.py", "--base_model", base, "--qlora_model", adapter, "--base", "original"]
    ways = {
        "copying": partial(copy, base, target),
        "merge_qlora.py": partial(measure, MEASURED, *ours, "--save_path", target),
    }
    if size == "1B":
        make_checkpoint(base, folder / "zero")
        ways |= {
            "PEFT": partial(measure, PEFT, base, adapter, target),
            "joining shards (fp32)": partial(measure, SHARDS, folder / "zero", target),
            "zero_to_fp32": partial(measure, ZERO_TO_FP32, folder / "zero", target),
        }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            results[name].append(way())
            shutil.rmtree(target)
            print(f"{size} {name}: {results[name][-1]}", flush=True)
    shutil.rmtree(folder / "zero", ignore_errors=True)
    return results


def main(args: argparse.Namespace) -> None:
    """Measures, and prints a table."""
    work, results = from_root(args.work_dir), {}
    for size in args.sizes:
        results[size] = bench(size, args.rounds, work / size)
    columns = ["model", "", "writing, s", "GB/s", "x copying", "all, checked, s", "peak memory, GB"]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for size, ways in results.items():
        files = (work / size / "base").glob("*.safetensors")
        size_bytes, best = sum(file.stat().st_size for file in files), {}
        for name, runs in ways.items():
            best[name] = {key: sorted(run[key] for run in runs)[len(runs) // 2] for key in runs[0]}
            row = best[name]
            ratio = row["writing"] / best["copying"]["writing"]
            print(
                f"| {size} | {name} | {row['writing']:.1f} | {size_bytes / row['writing'] / GB:.2f} | {ratio:.2f} | "
                f"{row['seconds']:.1f} | {row['peak'] / GB:.2f} |"
            )
    print("\n" + json.dumps({"bench": "convert", "results": results}))


if __name__ == "__main__":
    main(build_parser().parse_args())
