"""The DeepSpeed engine of a run: its configuration, the launch of ranks, precision, and the model in it."""

import argparse
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from utils.cli import fail
from utils.files import from_root, shown
from utils.train.arguments import quant_bits

WSD_DECAY = 0.2  # Of the steps.


def read_template(args: argparse.Namespace) -> str:
    """The text of --chat_template, "" without one."""
    # A file that is not UTF-8 becomes an unusable template, and is refused as such.
    return from_root(args.chat_template).read_text("utf-8", "replace") if args.chat_template else ""


def load_chat(args: argparse.Namespace, path: Path, template: str, thoughts: str | None = None) -> Any:
    """Loads the model's tokenizer with its chat template, or with another one if its text is given.

    Args:
        args: Of the run.
        path: The model's folder.
        template: Another chat template, or "".
        thoughts: See `utils.data.tokenizer.load_tokenizer`.
    """
    from jinja2 import TemplateError

    from utils.data.chat import make_chat
    from utils.data.records import DataError
    from utils.data.tokenizer import load_tokenizer

    try:
        return make_chat(load_tokenizer(path, template, args.trust_remote_code, thoughts))
    except TemplateError as error:
        fail(f"The chat template cannot be used: {error}. Name a file with another: --chat_template FILE")
    except DataError as error:
        fail(str(error))
    except (OSError, ValueError) as error:  # What transformers raises where files are missing or broken.
        fail(
            f"No tokenizer in {shown(path)}: {error}\nFetch the model: python download_pt.py --model {args.model_name}"
        )


def load_base(path: Path, name: str, precision: str, bits: int | None, device: str, trust_remote_code: bool) -> Any:
    """Loads a downloaded model; if it is incomplete, exits with what to do."""
    from safetensors import SafetensorError

    from utils.weights.loading import DTYPES, load_model

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

    from utils.data.vocabulary import new_rows
    from utils.weights.loading import add_lora

    model = load_base(path, args.model_name, precision, quant_bits(args), device, args.trust_remote_code)
    if adapter:
        from peft import PeftConfig, PeftModel

        from utils.weights.adapters import check_patterns

        try:
            check_patterns(PeftConfig.from_pretrained(from_root(adapter)), [name for name, _ in model.named_modules()])
            model = PeftModel.from_pretrained(model, from_root(adapter), is_trainable=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            fail(f"--adapter {adapter} does not fit {shown(path)}: {error}")
    elif args.tuner == "lora":
        try:
            asked = getattr(args, "train_embeddings", "none")
            embeddings = new_rows(path) if asked == "new_rows" else asked == "all"
            model = add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target, embeddings)
        except ValueError as error:
            fail(f"--lora_target {args.lora_target}: {error}")
    if getattr(args, "train_only", None):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_" not in name)
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
    """Reads a DeepSpeed configuration and applies the command line's arguments to it.

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
    if stage == 3 and getattr(args, "train_embeddings", "none") == "new_rows":
        fail("Rows of new tokens: PEFT cannot take rows of a sharded table. Use --zero_stage 2.")
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


def parameter_groups(model: Any, embedding_lr: float | None) -> list[Any]:
    """The weights to train; embeddings and output head apart, if they have a learning rate of their own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if embedding_lr is None:
        return trained
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    apart = {id(parameter) for layer in layers for parameter in layer.parameters()}
    groups: dict[bool, list[Any]] = {False: [], True: []}
    for parameter in trained:
        groups[id(parameter) in apart].append(parameter)
    return [{"params": groups[False]}, {"params": groups[True], "lr": embedding_lr}]


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

    from utils.weights.loading import keep_rows_apart, scale_early

    scale_early(model)
    keep_rows_apart(model)
    names = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
    name, warmup_steps = names.get(args.lr_scheduler, args.lr_scheduler), round(args.warmup_ratio * total_steps)
    decay_steps = min(max(round(WSD_DECAY * total_steps), 1), total_steps - warmup_steps)
    more = {"num_decay_steps": decay_steps} if args.lr_scheduler == "wsd" else {}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, getattr(args, "embedding_lr", None)),
        config=ds_config,
        lr_scheduler=lambda optimizer: get_scheduler(name, optimizer, warmup_steps, total_steps, more),
    )
    if not engine.zero_optimization() and not engine.bfloat16_enabled() and not engine.fp16_enabled():
        # Here alone DeepSpeed clips without keeping the norm, which the metrics show.
        def clip() -> None:
            weights = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
            engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(weights, engine.gradient_clipping()).item()

        engine.clip_fp32_gradients = clip
    return engine
