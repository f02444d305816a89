"""Checkpoints of a run: the record of what made it, saving that survives a kill, resuming bit for bit."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from utils.cli import fail
from utils.files import (
    ROOT,
    atomic_write,
    check_manifest,
    exclusive_lock,
    explained,
    from_root,
    read_json,
    reason_of,
    shown,
    write_manifest,
)
from utils.train.arguments import quant_bits

# What may differ when a run is resumed: how long it goes on (a falling learning rate is stretched to the new end) and
# what it shows, not what an update is. Data is known by its contents.
FREE_TO_CHANGE = set(
    "epochs max_steps eval_steps save_steps eval_samples max_new_tokens train_mode test_mode test_bnb_enabled "
    "test_split test_model track resume overwrite trust_checkpoint local_rank output_dir model_dir data_dir data_path "
    "answers_dir".split()
)


class RunFolder(NamedTuple):
    """Where a run's results go: the tag `<ckpt_id>` is its best state, `<ckpt_id>-last` its newest.

    One rank on every file system is the `leader` that looks after the folder.
    """

    dir: Path
    ckpt_id: str
    leader: bool
    shared: bool  # All ranks see the same folder; False where every node has its own.
    lock: Any  # A leader's, which keeps other runs out of the folder until this object goes.

    @property
    def last(self) -> Path:
        """The newest state."""
        return self.dir / f"{self.ckpt_id}-last"

    @property
    def best(self) -> Path:
        """The state with the lowest held-out loss."""
        return self.dir / self.ckpt_id


def make_record(
    args: argparse.Namespace, ds_config: dict[str, Any], precision: str, world_size: int, template: str, data: dict
) -> dict[str, Any]:
    """Gathers what made a run, for run.json: later scripts need no repeated flags.

    Returns:
        "settings" (what must be equal when the run is resumed), "arguments", "ds_config", "chat_template", "data" and
        "versions" (of what computes, and the repository's commit if there is one).
    """
    settings = {name: value for name, value in vars(args).items() if name not in FREE_TO_CHANGE} | {
        "quant_bits": quant_bits(args),
        "precision": precision,
        "zero_stage": ds_config["zero_optimization"]["stage"],
        "ranks": world_size,
        "data": data["files"],
        "base": digest_base(from_root(args.model_dir) / args.model_name, args.model_name),
        # Of files the content counts, not the name.
        "deepspeed_config": _digest(json.dumps(ds_config, sort_keys=True)),
        "chat_template": _digest(template),
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    packages = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes")
    return {
        "settings": settings,
        "arguments": vars(args).copy(),
        "ds_config": ds_config,
        "chat_template": template,
        "data": data,
        "versions": {name: version(name) for name in packages} | {"commit": commit.stdout.strip()},
    }


def digest_base(path: Path, name: str) -> str:
    """A digest of a base model's weights.

    Raises:
        SystemExit: if its weights are not whole.
    """
    from utils.weights.layouts import open_weights
    from utils.weights.lazy import weights_digest

    try:
        return weights_digest(open_weights(path))
    except Exception as error:  # Libraries raise all kinds of errors on damaged files.
        fail(f"No whole model in {shown(path)}: {reason_of(error)}\nFetch it: python download_pt.py --model {name}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def open_run(folder: Path, args: argparse.Namespace, record: dict[str, Any]) -> tuple[RunFolder, dict[str, Any] | None]:
    """Claims a run's folder.

    Args:
        folder: From `utils.train.arguments.run_dir`.
        args: The run's arguments.
        record: What run.json will say; its "settings" decide whether a resumed run is the same run.

    Returns:
        The run, and the resumed tag's record or None at a fresh start.

    Raises:
        SystemExit: if another run is at work here or has been, or there is nothing to resume, or what is to be resumed
            differs.
    """
    import deepspeed

    from utils.weights.shards import check_pickles

    leader, shared = _share_folder(folder)
    run = RunFolder(folder, args.ckpt_id, leader, shared, _lock_folder(folder, leader))
    previous = None
    if args.resume:
        if not (run.last / "run.json").is_file():
            fail(f"--resume: no checkpoint at {shown(run.last)}. Start the run without --resume.")
        if not args.trust_checkpoint:
            check_manifest(run.last)
            with explained(f"--resume: {shown(run.last)} cannot be used"):
                check_pickles(run.last)
        previous = json.loads((run.last / "run.json").read_text(encoding="utf-8"))
        before, now = previous["settings"], record["settings"]
        before = {"base": now["base"], "thoughts": "drop"} | before  # Runs of earlier versions do not say.
        differing = [f"{key} {before.get(key)} (now {now[key]})" for key in now if before.get(key) != now[key]]
        if differing:
            fail(
                f"--resume goes on with the same run, but it was made with {', '.join(differing)}. "
                "Name the same again, or start anew with --overwrite."
            )
    elif (folder / "run.json").is_file() and not args.overwrite:
        with explained(f"{shown(folder / 'run.json')} cannot be read. Start the run anew: --overwrite"):
            settings = read_json(folder / "run.json")["settings"]
        if run.last.exists() or settings != record["settings"]:
            fail(
                f"{shown(folder)} holds the results of another run. Go on with it: --resume; start anew in its place: "
                "--overwrite; keep both: --output_dir DIR"
            )
    deepspeed.comm.barrier()
    if run.leader:
        if previous is None:
            for path in (run.last, run.best, *folder.glob(f".{run.ckpt_id}.*")):
                path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
            for name in ("metrics.jsonl", "samples.jsonl", "loss.png"):
                (folder / name).unlink(missing_ok=True)
        elif previous["progress"]["best_step"] == previous["progress"]["step"]:
            _point(run.best, run.last.resolve())  # A kill may have come between the two tags.
        _write_json(folder / "run.json", record)
    deepspeed.comm.barrier()
    return run, previous


def _lock_folder(folder: Path, leader: bool) -> Any:
    """Lets no other run into a folder, for as long as what is returned is there.

    Raises:
        SystemExit: on all ranks, if another run is at work.
    """
    import deepspeed
    import torch

    lock, problem = None, ""
    if leader:
        lock = exclusive_lock(folder)
        try:
            lock.__enter__()
        except SystemExit as busy:
            problem = str(busy)
    problems = [""] * deepspeed.comm.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    if any(problems):
        fail(max(problems))
    return lock


def _share_folder(folder: Path) -> tuple[bool, bool]:
    """Finds out how the ranks share a folder.

    Returns:
        Whether this rank leads: global rank 0, and the first rank of every node that does not see rank 0's files; and
        whether all ranks see the same files.
    """
    import deepspeed
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    token = [uuid.uuid4().hex]
    torch.distributed.broadcast_object_list(token, src=0)
    marker = folder / f".leader-{token[0]}"
    is_first = deepspeed.comm.get_rank() == 0
    if is_first:
        marker.touch()
    deepspeed.comm.barrier()
    sees_marker = marker.exists()
    deepspeed.comm.barrier()
    if is_first:
        marker.unlink()
    seen = [None] * deepspeed.comm.get_world_size()
    torch.distributed.all_gather_object(seen, sees_marker)
    return is_first or (not sees_marker and int(os.environ["LOCAL_RANK"]) == 0), all(seen)


def save_checkpoint(
    engine: Any, run: RunFolder, step: int, record: dict[str, Any], probe: dict[str, Any], is_best: bool
) -> None:
    """Saves all that continues or publishes a run, in a folder that becomes `<ckpt_id>-last` when it is complete.

    Frozen weights are left out. A kill at any moment leaves the previous tags complete. All ranks call it together.

    Args:
        engine: From `utils.train.engine.make_engine`.
        run: Where to.
        step: Optimizer steps done.
        record: Becomes run.json.
        probe: From `utils.weights.probe.record_probe`.
        is_best: Whether `<ckpt_id>` shall point here as well.
    """
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator
    from safetensors.torch import save_file

    folder, rank = run.dir / f".{run.ckpt_id}.{step}", deepspeed.comm.get_rank()
    if run.leader:
        shutil.rmtree(folder, ignore_errors=True)
    deepspeed.comm.barrier()
    hook = engine.module.register_state_dict_post_hook(_drop_frozen)
    engine.save_checkpoint(run.dir, tag=folder.name, save_latest=False, exclude_frozen_parameters=True)
    hook.remove()
    random = {"torch": torch.get_rng_state(), "device": get_accelerator().get_rng_state()}
    torch.save(random, folder / f"random_rank_{rank}.pt")
    adapter = _gathered_adapter(engine)
    if rank == 0:
        if adapter:
            _write_adapter(engine.module, adapter, folder / "adapter")
        save_file(probe, folder / "probe.safetensors")
    if run.leader:
        _write_json(folder / "run.json", record)
    deepspeed.comm.barrier()
    if run.leader:
        write_manifest(folder)
        for tag in (run.last, run.best) if is_best else (run.last,):
            _point(tag, folder)
        # By name: the output folder may be given with links or .. in its path.
        kept = {run.last.resolve().name, run.best.resolve().name}
        for old in run.dir.glob(f".{run.ckpt_id}.*"):
            if old.name not in kept:
                shutil.rmtree(old)
    deepspeed.comm.barrier()


def _drop_frozen(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leaves the trainable tensors: DeepSpeed's own rule keeps a tied output head and 4-bit quantisation states."""
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if trainable != {name for name, _ in module.named_parameters()}:
        for name in set(state) - trainable:
            del state[name]


def _gathered_adapter(engine: Any) -> dict[str, Any]:
    """LoRA's tensors on the CPU, whole at every ZeRO stage; empty in full training."""
    import deepspeed
    from peft import PeftModel

    if not isinstance(engine.module, PeftModel):
        return {}
    # A tied output head under its own name as well, as PEFT looks for it.
    named = engine.module.named_parameters(remove_duplicate=False)
    # Where rows of new tokens are trained alone, LoRA's frozen matrices belong to the adapter all the same.
    own = {name: weight for name, weight in named if weight.requires_grad or ("lora_" in name and ".default" in name)}
    sharded = engine.zero_optimization_partition_weights()
    with deepspeed.zero.GatheredParameters(list(own.values()), enabled=sharded):
        return {name: weight.detach().cpu().clone() for name, weight in own.items()}


def _write_adapter(model: Any, weights: dict[str, Any], folder: Path) -> None:
    """Writes a PEFT adapter folder.

    Raises:
        RuntimeError: if the tensors cannot be an adapter (left sharded, or not finite).
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    if any(weight.numel() == 0 or not torch.isfinite(weight).all() for weight in weights.values()):
        raise RuntimeError("The adapter has empty or non-finite tensors; the checkpoint is not written.")
    folder.mkdir(exist_ok=True)
    save_file(get_peft_model_state_dict(model, state_dict=weights), folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(folder)


def _point(link: Path, folder: Path) -> None:
    with atomic_write(link) as temporary:
        temporary.symlink_to(folder.name)


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def load_checkpoint(engine: Any, run: RunFolder) -> None:
    """Puts an engine (weights, optimizer, schedule, random numbers) into the state that `<ckpt_id>-last` holds."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    folder = run.last.resolve()
    # Frozen weights are not in the checkpoint: they came with the base model.
    engine.load_checkpoint(run.dir, tag=folder.name, load_module_strict=False)
    random = torch.load(folder / f"random_rank_{deepspeed.comm.get_rank()}.pt", weights_only=True)
    torch.set_rng_state(random["torch"])
    get_accelerator().set_rng_state(random["device"])
