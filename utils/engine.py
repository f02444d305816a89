"""The DeepSpeed engine: the arguments all training scripts share, configuration, launch, precision and seeds."""

import argparse
import json
import os
import re
import shutil
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from utils.files import from_root, shown, write_problem


def boolean(text: str) -> bool:
    """Reads True, False, 1 or 0 from the command line (argparse's `bool` takes every text for true)."""
    values = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
    if text not in values:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected True, False, 1 or 0")
    return values[text]


def underscored(arguments: Sequence[str]) -> list[str]:
    """Lets dashes in the names of options stand for underscores; values are left alone."""
    name = re.compile(r"--[\w-]+(?==|\Z)")
    return [name.sub(lambda found: "--" + found[0][2:].replace("-", "_"), text, count=1)
            if name.match(text) else text for text in arguments]  # fmt: skip


def shard_size(text: str) -> str:
    """Parses the size of a file, such as 5GB.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size such as 5GB or 500MB")
    return text


# To be set before torch is imported: it takes memory in large pages then, and gives it back at once.
LARGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")


def add_write_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that the scripts share that write finished models."""
    add = parser.add_argument
    add("--max_shard_size", type=shard_size, default="5GB", help="the largest file of weights")
    gguf = "also write a GGUF file for llama.cpp, and the Modelfile with which Ollama takes it"
    add("--gguf", choices=["f16", "bf16", "q8_0"], help=gguf)
    where = "where adapters are merged and models checked; auto: a card if there is one"
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help=where)
    add("--trust_remote_code", type=boolean, default=False, help="True: run Python code that comes with the model")


def add_run_arguments(parser: argparse.ArgumentParser, lora_lr: float, full_lr: float) -> None:
    """Adds the arguments that all training scripts share; the learning rates are a stage's own, for the help."""
    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--model_dir", default="model", help="folder of the downloaded models")
    add("--tuner", choices=["lora", "full"], default="lora", help="train low-rank matrices (LoRA) or all weights")
    add("--train_bnb_enabled", type=boolean, default=False, help="True: 4-bit base weights (QLoRA), as --quant_bits 4")
    add("--quant_bits", type=int, choices=[4], help="bits of the frozen base weights (NF4); 16 or 32 without it")
    add("--lora_r", type=int, default=16, help="rank of LoRA")
    add("--lora_alpha", type=int, default=32, help="LoRA's update is scaled by alpha / r")
    add("--lora_dropout", type=float, default=0.05, help="dropout before the low-rank matrices, 0 to 1")
    add("--lora_target", default="all-linear", help="layers that get LoRA: all-linear, or names separated by commas")
    add("--chat_template", default="", help="file with a Jinja chat template to use instead of the model's own")
    add("--trust_remote_code", type=boolean, default=False, help="True: run Python code that comes with the model")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=2, help="passes over the data")
    add("--max_steps", type=int, default=-1, help="stop after so many optimizer steps (-1: after the epochs)")
    add("--batch_size", type=int, default=4, help="samples of a rank, times --grad_accum, in an optimizer step")
    add("--grad_accum", type=int, default=8, help="an optimizer step sees batch_size x grad_accum x ranks samples")
    add("--max_tokens", type=int, default=1024, help="longest sample; the prompts of longer ones are shortened")
    add("--pack_tokens", type=int, default=2048, help="most tokens in a forward pass (samples are packed, not padded)")
    add("--share_prefix", type=boolean, default=True,
        help="True: compute what samples of a step have in common (a video's text) once; False: for each of them")
    add("--group_size", type=int,
        help="so many samples of a group (video) stand together in the data order; more share more, fewer mix better "
        "(default: 8, or 1 without --share_prefix)")
    add("--lr", type=float, help=f"peak learning rate (default: {lora_lr} for LoRA, {full_lr} for full training)")
    add("--lr_scheduler", choices=["cosine", "linear", "constant"], default="cosine", help="after the warm-up")
    add("--warmup_ratio", type=float, default=0.03, help="part of the steps in which the learning rate rises")
    add("--weight_decay", type=float, default=0.0, help="of AdamW")
    add("--max_grad_norm", type=float, help="clip gradients to this norm (default: as the configuration says, else 1)")
    add("--seed", type=int, default=42, help="of data order, LoRA's first weights and dropout")

    add = parser.add_argument_group("engine").add_argument
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
        help="auto: bf16 where the card has it, else fp16; fp32 on a CPU")
    add("--zero_stage", type=int, choices=[0, 1, 2, 3],
        help="ZeRO shards 1: optimizer state, 2: and gradients, 3: and weights (default: as the configuration says)")
    add("--offload", choices=["none", "optimizer", "param"],
        help="keep optimizer states (at stage 3 also weights) in host memory (default: as the configuration says)")
    add("--gradient_checkpointing", type=boolean,
        help="True: recompute activations, a third slower, far less memory (default: True on a GPU, False on a CPU)")
    add("--deepspeed_config", default="", help="DeepSpeed configuration (default: ds_config.json beside the script)")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it.

    add = parser.add_argument_group("results").add_argument
    add("--ckpt_id", default="1", help="name of the best checkpoint; <ckpt_id>-last is the newest")
    add("--eval_steps", type=int, default=50, help="measure the held-out loss and show replies every N steps")
    add("--save_steps", type=int, default=50, help="save every N steps; the best is kept as well")
    add("--eval_samples", type=int, default=200, help="held-out samples to measure the loss on (-1: all)")
    add("--max_new_tokens", type=int, default=64, help="longest reply that is shown")
    add("--resume", type=boolean, nargs="?", const=True, default=False, help="go on from <ckpt_id>-last")
    add("--trust_checkpoint", type=boolean, default=False,
        help="True: --resume reads the checkpoint whatever is in it, which may run code of whoever made it")
    add("--overwrite", type=boolean, nargs="?", const=True, default=False, help="start anew where another run has been")
    add("--track", choices=["none", "tensorboard", "swanlab", "wandb"], default="none",
        help="service that gets the metrics besides metrics.jsonl and loss.png")
    # fmt: on


def argument_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with the shared arguments, before anything is loaded."""
    problems = []
    for name in ("epochs", "batch_size", "grad_accum", "eval_steps", "save_steps", "lora_r", "max_new_tokens"):
        if getattr(args, name) < 1:
            problems.append(f"--{name}: got {getattr(args, name)}, expected 1 or more.")
    if args.max_steps < 1 and args.max_steps != -1:
        problems.append(f"--max_steps: got {args.max_steps}, expected 1 or more, or -1.")
    if args.lr is not None and not args.lr > 0:
        problems.append(f"--lr: got {args.lr}, expected more than 0.")
    if not args.weight_decay >= 0:
        problems.append(f"--weight_decay: got {args.weight_decay}, expected 0 or more.")
    if args.seed < 0:
        problems.append(f"--seed: got {args.seed}, expected 0 or more.")
    if args.group_size is not None and args.group_size < 1:
        problems.append(f"--group_size: got {args.group_size}, expected 1 or more.")
    if args.max_tokens < 16:
        problems.append(f"--max_tokens: got {args.max_tokens}, expected 16 or more.")
    if args.pack_tokens < args.max_tokens:
        problems.append(f"--pack_tokens: got {args.pack_tokens}, expected at least --max_tokens ({args.max_tokens}).")
    if not 0 <= args.lora_dropout < 1:
        problems.append(f"--lora_dropout: got {args.lora_dropout}, expected 0 or more and less than 1.")
    if not 0 <= args.warmup_ratio <= 1:
        problems.append(f"--warmup_ratio: got {args.warmup_ratio}, expected 0 to 1.")
    if args.tuner == "full" and quant_bits(args):
        problems.append("--tuner full trains all weights, 4-bit weights cannot be trained: leave --train_bnb_enabled "
                        "and --quant_bits out, or use --tuner lora.")  # fmt: skip
    if not re.fullmatch(r"[\w-]+", args.ckpt_id):
        problems.append(f"--ckpt_id: got {args.ckpt_id!r}, expected letters, digits, _ and -.")
    if args.resume and args.overwrite:
        problems.append("--resume goes on with a run, --overwrite starts it anew: name one of them.")
    if args.track != "none" and find_spec(args.track) is None:
        problems.append(f"--track {args.track}: not installed. Install it with: pip install {args.track}")
    if problem := write_problem(from_root(args.output_dir)):
        problems.append(f"--output_dir: {problem}")
    for name in ("chat_template", "deepspeed_config"):
        if getattr(args, name) and not from_root(getattr(args, name)).is_file():
            problems.append(f"--{name}: no file at {getattr(args, name)}.")
    return problems


def quant_bits(args: argparse.Namespace) -> int | None:
    """Bits of the frozen base weights; `--train_bnb_enabled True` is the original's way to ask for 4."""
    return 4 if args.train_bnb_enabled else args.quant_bits


def run_dir(output_dir: Path, model_name: str, tuner: str, bits: int | None) -> Path:
    """Names a run's folder: DS-<model>, DS-<model>-BNB with a 4-bit base, DS-<model>-FULL for full training."""
    return output_dir / f"DS-{model_name}{'-FULL' if tuner == 'full' else '-BNB' if bits else ''}"


def fail(message: str) -> None:
    """Ends all ranks with exit code 1; one of them says why."""
    raise SystemExit(message if int(os.environ.get("RANK", 0)) == 0 else 1)


def load_chat(args: argparse.Namespace, path: Path, template: str) -> Any:
    """Loads the model's tokenizer with its chat template, or with another one if its text is given."""
    from jinja2 import TemplateError

    from utils.data import DataError, make_chat
    from utils.model import load_tokenizer

    try:
        return make_chat(load_tokenizer(path, template, args.trust_remote_code))
    except TemplateError as error:
        fail(f"The chat template cannot be used: {error}. Name a file with another: --chat_template FILE")
    except DataError as error:
        fail(str(error))
    except (OSError, ValueError) as error:  # What transformers raises where files are missing or broken.
        fail(
            f"No tokenizer in {shown(path)}: {error}\nFetch the model: python download_pt.py --model {args.model_name}"
        )


def load_whole(path: Path, name: str, precision: str, bits: int | None, device: str, trust_remote_code: bool) -> Any:
    """Loads a downloaded model, or ends the run with what to do."""
    from safetensors import SafetensorError

    from utils.model import DTYPES, load_model

    try:
        return load_model(path, DTYPES[precision], bits, device, trust_remote_code)
    except (OSError, SafetensorError) as error:
        fail(f"No whole model in {shown(path)}: {error}\nFetch it: python download_pt.py --model {name}")


def build_model(args: argparse.Namespace, path: Path, precision: str, device: str, adapter: str = "") -> Any:
    """Loads the base model and makes trainable what is to be trained.

    Args:
        args: Of the run.
        path: The base model's folder.
        precision: "bf16", "fp16" or "fp32".
        device: Where 4-bit weights go.
        adapter: Folder of a LoRA adapter to go on with; "" for a new one.

    Raises:
        SystemExit: if a folder or a layer is not what it should be.
    """
    from safetensors import SafetensorError

    from utils.model import add_lora

    model = load_whole(path, args.model_name, precision, quant_bits(args), device, args.trust_remote_code)
    if adapter:
        from peft import PeftConfig, PeftModel

        from utils.adapters import check_patterns

        try:
            check_patterns(PeftConfig.from_pretrained(from_root(adapter)), [name for name, _ in model.named_modules()])
            model = PeftModel.from_pretrained(model, from_root(adapter), is_trainable=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            fail(f"--adapter {adapter} does not fit {shown(path)}: {error}")
    elif args.tuner == "lora":
        try:
            model = add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target)
        except ValueError as error:
            fail(f"--lora_target {args.lora_target}: {error}")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def start_ranks(seed: int) -> tuple[int, int]:
    """Joins the ranks of a run, whether started by python, torchrun or DeepSpeed's launcher, and seeds them alike.

    Returns:
        This rank and the number of ranks.
    """
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel("WARNING")
    if "RANK" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile an all-reduce in shared memory for a minute; gloo does as well without a compiler.
        deepspeed.ops.__compatible_ops__ = {}
    else:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(seed)
    return deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()


def choose_precision(asked: str) -> str:
    """Resolves `--precision auto` for the device at hand.

    Raises:
        SystemExit: if the device cannot compute in what was asked for.
    """
    import torch
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    if device.device_name() == "cpu":
        if asked == "fp16":
            fail("--precision fp16: CPUs do not train in it. Use fp32 (or bf16 on a CPU with AMX or AVX512-BF16).")
        return "fp32" if asked == "auto" else asked
    has_bf16 = device.is_bf16_supported()
    if device.device_name() == "cuda":
        # DeepSpeed's answer counts cards that emulate it, slowly.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "bf16" and not has_bf16:
        fail("--precision bf16: this card does not have it. Use fp16.")
    return ("bf16" if has_bf16 else "fp16") if asked == "auto" else asked


def make_ds_config(args: argparse.Namespace, default_file: Path, precision: str) -> dict[str, Any]:
    """Reads a DeepSpeed configuration and puts the command line's wishes into it.

    "auto" values (a convention of the Hugging Face trainer) count as not given.

    Returns:
        A configuration in which everything that changes an update is spelled out.

    Raises:
        SystemExit: if the file is no configuration, or it cannot be had together with the arguments.
    """
    file = from_root(args.deepspeed_config) if args.deepspeed_config else default_file
    config = _read_config(file)
    zero = config["zero_optimization"]
    notes = []
    for section, key, given in ((zero, "stage", args.zero_stage), (config, "gradient_clipping", args.max_grad_norm)):
        if given is not None:
            if section.get(key, given) != given:
                notes.append(f"The command line wins over {shown(file)}: {key} is {given}, not {section[key]}.")
            section[key] = given
    if zero.setdefault("stage", 2) == 0 and precision != "fp32":
        zero["stage"] = 2
        notes.append(f"ZeRO stage 0 takes other steps in {precision}: stage 2 is used, on one rank the same memory.")
    config.setdefault("gradient_clipping", 1.0)  # Unsaid, DeepSpeed would clip at 1 too.
    if args.offload is not None:
        zero = {key: zero[key] for key in zero if not key.startswith("offload_")}
        zero |= {"offload_optimizer": {"device": "cpu"}} if args.offload != "none" else {}
        zero |= {"offload_param": {"device": "cpu"}} if args.offload == "param" else {}
        config["zero_optimization"] = zero
    stage, offloaded = zero["stage"], "offload_optimizer" in zero
    if ("offload_param" in zero and stage != 3) or (offloaded and stage == 0):
        fail(f"Offloading weights needs --zero_stage 3, offloading the optimizer 1 or more; got stage {stage}.")
    compiled = offloaded and all(map(shutil.which, ("c++", "ninja")))
    if offloaded and not compiled:
        notes.append("No C++ compiler: the offloaded optimizer is PyTorch's AdamW, slower than DeepSpeedCPUAdam.")
    if stage < 2:
        zero["overlap_comm"] = False  # DeepSpeed refuses it here when windows hold any number of packs.
    adam = {"lr": args.lr, "weight_decay": args.weight_decay, "betas": [0.9, 0.999], "eps": 1e-8}
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # The micro-batch is a pack; a window may hold any number of packs.
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "optimizer": {"type": "AdamW", "params": adam | {"torch_adam": not compiled}},
        "zero_force_ds_cpu_optimizer": compiled,
        "bf16": config.get("bf16", {}) | {"enabled": precision == "bf16"},
        "fp16": config.get("fp16", {}) | {"enabled": precision == "fp16"},
    }
    if precision == "bf16" and stage >= 2:
        # Summed up in bf16, the gradients of 8 packs are off by 0.4 %, those of 64 by 1 %; a single pack's by 0.2 %.
        # (At stage 1 DeepSpeed has another optimizer for this, whose checkpoints are others.)
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    replaced = [key for key in ours if key in config and config[key] != ours[key]]
    replaced += [key for key in ("train_batch_size", "scheduler") if config.pop(key, None) is not None]
    if replaced:
        notes.append(f"Of {shown(file)} these are left to the command line: {', '.join(replaced)}.")
    if int(os.environ.get("RANK", 0)) == 0 and notes:
        print(*notes, sep="\n")
    return config | ours


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = _without_auto(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        fail(f"{shown(file)} is not JSON: {error}")
    if not isinstance(config, dict) or not isinstance(config.setdefault("zero_optimization", {}), dict):
        fail(f"{shown(file)}: expected a DeepSpeed configuration, an object with an object zero_optimization.")
    zero = config["zero_optimization"]
    if zero.get("stage", 2) not in (0, 1, 2, 3):
        fail(f"{shown(file)}: zero_optimization.stage is {zero['stage']}, expected 0, 1, 2 or 3.")
    for name in ("offload_optimizer", "offload_param"):
        if name in zero and (zero[name] or {}).get("device", "none") == "none":
            del zero[name]
    return config


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value


def make_engine(model: Any, args: argparse.Namespace, ds_config: dict[str, Any], total_steps: int) -> Any:
    """Wraps a model in a DeepSpeed engine with AdamW and a learning rate that warms up.

    Args:
        model: With the weights to train marked by `requires_grad`.
        args: The run's arguments.
        ds_config: From `make_ds_config`.
        total_steps: At which the schedule ends.
    """
    import deepspeed
    import torch
    from transformers import get_scheduler

    from utils.model import scale_early

    scale_early(model)
    name = "constant_with_warmup" if args.lr_scheduler == "constant" else args.lr_scheduler
    warmup_steps = round(args.warmup_ratio * total_steps)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=ds_config,
        lr_scheduler=lambda optimizer: get_scheduler(name, optimizer, warmup_steps, total_steps),
    )
    if not engine.zero_optimization() and not engine.bfloat16_enabled() and not engine.fp16_enabled():
        # Here alone DeepSpeed clips without keeping the norm, which the metrics show.
        def clip() -> None:
            weights = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
            engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(weights, engine.gradient_clipping()).item()

        engine.clip_fp32_gradients = clip
    return engine
