"""Which architectures of transformers train, convert and answer here: tiny random models of each, through the scripts.

    python benchmarks/check_models.py                        # all of them: about an hour on two CPU cores
    python benchmarks/check_models.py --only qwen3_5 lfm2
    python benchmarks/check_models.py --vllm_python ENV/bin/python   # also in vLLM, which has an environment of its own

Each model has two to four small layers and a tokenizer with ChatML. deepspeed_ft/train.py trains LoRA and QLoRA on some
comments of examples/, convert_model.py merges the adapter and proves that in both links, and writes GGUF; chat.py
answers with what was converted. A cell says "yes", or what the script said. What is done already is not done again.

Prints a markdown table and a JSON line.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.files import from_root, read_json  # noqa: E402
from utils.train.run import SAID  # noqa: E402

STEPS = ("packs", "LoRA", "QLoRA", "convert", "GGUF", "chat", "vLLM")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BASE: dict[str, Any] = dict(
    hidden_size=128,  # vLLM's attention on CPUs wants heads of 32 at least.
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
)
OLD = dict(n_embd=128, n_layer=2, n_head=4, n_positions=1024)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32)
WINDOW = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
MAMBA = dict(mamba_n_heads=8, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1)
LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
)
RECURRENT = dict(layer_types=["linear_attention", "full_attention"])
MODELS: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "mistral": BASE | dict(sliding_window=16),
    "mixtral": BASE | MOE,
    "qwen2": BASE,
    "qwen3": BASE,
    "qwen3_moe": BASE | MOE,
    "qwen3_next": BASE | MOE | LINEAR | RECURRENT | dict(shared_expert_intermediate_size=32),
    "qwen3_5": BASE | LINEAR | RECURRENT,
    "qwen3_5_images": dict(
        text_config=BASE | LINEAR | RECURRENT,
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=128),
        image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
    ),
    "gemma2": BASE | WINDOW,
    "gemma3": BASE | dict(num_hidden_layers=6, sliding_window=16, query_pre_attn_scalar=32),
    "gemma4": BASE | WINDOW | dict(hidden_size_per_layer_input=16, global_head_dim=32, num_kv_shared_layers=0),
    "phi3": BASE,
    "glm4": BASE,
    "glm4_moe": BASE | MOE | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
    "internlm3": BASE,
    "minicpm3": BASE | LATENT | dict(head_dim=32),
    "hunyuan_v1_dense": BASE,
    "ernie4_5": BASE,
    "seed_oss": BASE,
    "smollm3": BASE,
    "olmo2": BASE,
    "olmo3": BASE | WINDOW,
    "olmo_hybrid": BASE | LINEAR | RECURRENT,
    "granite": BASE,
    "granitemoehybrid": BASE
    | MAMBA
    | dict(num_local_experts=0, shared_intermediate_size=128, layer_types=["mamba", "attention"]),
    "falcon_h1": BASE | MAMBA | dict(mamba_d_ssm=256),
    "nemotron_h": BASE
    | dict(layers_block_type=["mamba", "attention"], mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16)
    | dict(n_groups=1),
    "lfm2": BASE | dict(layer_types=["conv", "full_attention"], block_ff_dim=128, conv_dim=128, conv_dim_out=128),
    "deepseek_v3": {key: value for key, value in BASE.items() if key != "head_dim"}
    | LATENT
    | dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1,
           first_k_dense_replace=1, topk_method="noaux_tc"),
    "gpt_oss": BASE | MOE | WINDOW | dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "kimi_linear": BASE
    | LATENT
    | dict(
        linear_attn_config=dict(
            num_heads=4, head_dim=16, short_conv_kernel_size=4, kda_layers=[1], full_attn_layers=[2]
        ),
        q_lora_rank=None,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=32,
    ),
    "opt": BASE | dict(ffn_dim=128, word_embed_proj_dim=128),
    "gpt2": OLD,
    "bloom": OLD | dict(hidden_size=128),
    "mamba2": dict(hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=16, n_groups=1),
}  # fmt: skip
TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_images": "qwen3_5", "gemma3": "gemma3_text", "gemma4": "gemma4_text"}


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=MODELS, default=list(MODELS), help="architectures")
    add("--work_dir", default="benchmarks/output/models", help="for models, runs and what was found")
    add("--vllm_python", help="Python of an environment with vLLM")
    return parser


def make_tokenizer(texts: list[str]) -> Any:
    """A small tokenizer with ChatML's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHATML
    return tokenizer


def make_model(name: str, tokenizer: Any, folder: Path) -> None:
    """Writes a random model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    ends = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    torch.manual_seed(0)
    shape = MODELS[name] | ({"vocab_size_per_layer_input": len(tokenizer)} if name == "gemma4" else {})
    shape = shape | ({"text_config": shape["text_config"] | ends} if "text_config" in shape else ends)
    config = AutoConfig.for_model(TYPES.get(name, name), **shape)
    kind = AutoModelForImageTextToText if "text_config" in shape else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(command: list[str | Path], log: Path) -> tuple[bool, str]:
    """Runs a command in the repository; returns whether it succeeded, and all that it said."""
    finished = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    said = finished.stdout + finished.stderr
    log.write_text(said, encoding="utf-8")
    return finished.returncode == 0, said


def cell(succeeded: bool, said: str) -> str:
    """What a table says of a step: "yes", or the last line that is no part of a traceback."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return "yes" if succeeded else (lines[-1] if lines else "no word")[:160].replace("|", "/")


VLLM = """
import os, sys
# One process, so that the last line says what is wrong.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
from vllm import LLM, SamplingParams
few = dict(max_model_len=256, max_num_seqs=2, gpu_memory_utilization=0.3, enable_prefix_caching=True)
model = LLM(sys.argv[1], enforce_eager=True, distributed_executor_backend="uni", **few)
print(model.generate(["你好"], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids)
"""


def check(name: str, work: Path, data: Path, vllm: str | None) -> dict[str, str]:
    """Takes a model through the scripts.

    Returns:
        Step -> what came of it.
    """
    place, found = work / name, dict.fromkeys(STEPS, "")
    place.mkdir(exist_ok=True)
    base, saved = work / "model/tiny" / name, f"check-{name}"
    flags = [f"--{key}={value}" for key, value in {
        "model_dir": work / "model", "model_name": f"tiny/{name}", "data_dir": data, "output_dir": place / "output",
        "epochs": 1, "max_steps": 2, "batch_size": 4, "grad_accum": 2, "eval_samples": 4, "max_new_tokens": 4,
        "ckpt_id": 24, "overwrite": True,
    }.items()]  # fmt: skip
    train = [sys.executable, "deepspeed_ft/train.py", *flags]
    succeeded, said = run(train, place / "lora.log")
    found["packs"] = next((way for way, text in SAID.items() if text in said), "")
    found["LoRA"] = cell(succeeded, said)
    found["QLoRA"] = cell(*run([*train, "--train_bnb_enabled=True"], place / "qlora.log"))
    if found["LoRA"] != "yes":
        return found
    trained = ["--zero_model", place / f"output/DS-tiny/{name}", "--org_model", base]
    convert = [sys.executable, "convert_model.py", *trained, "--save_model", saved, "--t", "24"]
    found["convert"] = cell(*run(convert, place / "convert.log"))
    if found["convert"] == "yes":
        folder = ROOT / "output_hf" / saved
        asked = ["--prompt", "你好", "--max_new_tokens", "8", "--no_streamer"]
        found["chat"] = cell(*run([sys.executable, "chat.py", "--model", folder, *asked], place / "chat.log"))
        if vllm:
            found["vLLM"] = cell(*run([vllm, "-c", VLLM, folder], place / "vllm.log"))
        shutil.rmtree(folder)
        found["GGUF"] = cell(*run([*convert, "--gguf", "f16"], place / "gguf.log"))
        shutil.rmtree(folder, ignore_errors=True)
    return found


def main(args: argparse.Namespace) -> None:
    """Checks each model, and prints the table."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # All on the CPU.
    work = from_root(args.work_dir)
    data = work / "data"
    if not (data / "data_train.json").is_file():
        prepared = [sys.executable, "prepare_data.py", "--data_dir", "examples", "--output_dir", data, "--total", "40"]
        succeeded, said = run([*prepared, "--test_size", "0.3"], work.parent / "prepare.log")
        if not succeeded:
            raise SystemExit(said)
    texts = re.findall('"value": "([^"]*)"', (data / "data_train.json").read_text(encoding="utf-8"))
    tokenizer, results = make_tokenizer(texts), {}
    for name in args.only:
        path = work / f"{name}.json"
        if not path.is_file():
            print(f"{name} ...", flush=True)
            make_model(name, tokenizer, work / "model/tiny" / name)
            path.write_text(json.dumps(check(name, work, data, args.vllm_python)), encoding="utf-8")
        results[name] = read_json(path)
    columns = [step for step in STEPS if any(found[step] for found in results.values())]
    print(f"\n| architecture | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, found in results.items():  # What was said is in the JSON line.
        cells = [found[step] if found[step] in ("yes", "", *SAID) else "no" for step in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n" + json.dumps({"check": "models", "results": results}, ensure_ascii=False))


if __name__ == "__main__":
    main(build_parser().parse_args())
