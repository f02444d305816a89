"""Log-probabilities of a frozen model (a reference, or a teacher) for supervised tokens, computed now or beforehand.

Shapes: S answers and T supervised tokens of them in a pack, N samples with K supervised tokens in all.
"""

import hashlib
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from utils.cli import progress_bar
from utils.data.samples import Samples
from utils.files import atomic_write, create_once, drop_damaged, sha256, shown
from utils.train.forward import SINGLE, PackFormat, supervised_logits
from utils.train.packing import Layout, Pack, lay_out, make_plan, rank_packs
from utils.train.tensors import all_reduced, token_logprobs

KEEP_SEC = 5  # So often what has been computed is written to the disk.


def token_logps(engine: Any, packs: list[Pack], form: PackFormat) -> torch.Tensor:
    """(T,) fp32 log-probabilities of the supervised tokens of packs, one after the other."""
    parts = []
    for pack in packs:
        parts.append(token_logprobs(supervised_logits(engine, pack, form), pack.target_ids))
    return torch.cat(parts)


@torch.no_grad()
def answer_logps(model: Any, samples: Samples, progress: str) -> torch.Tensor:
    """(N,) fp32 log-probabilities of samples' answers, each computed by itself without a mask, nats."""
    bar = progress_bar(samples, progress, "answer", total=len(samples))
    packs = (lay_out([sample], [0]).to(model.device) for sample in bar)
    return torch.stack([token_logps(model, [pack], SINGLE).sum().cpu() for pack in packs])


@contextmanager
def as_reference(engine: Any, own_adapter: bool) -> Iterator[None]:
    """Switches the engine to the reference: its first adapter, or no adapter."""
    model = engine.module
    training = model.training  # The engine's own flag never changes.
    engine.eval()
    if own_adapter:
        model.set_adapter("reference", inference_mode=True)
    else:
        model.base_model.disable_adapter_layers()
    with torch.no_grad():
        yield
    if own_adapter:
        model.set_adapter("default")
    else:
        model.base_model.enable_adapter_layers()
    engine.train(training)


def reference_logps(engine: Any, packs: list[Pack], form: PackFormat, own_adapter: bool, known: Any) -> list[Any]:
    """The reference's log-probabilities of each pack's answers.

    Args:
        engine: In any mode; it is left as it was.
        packs: On the engine's device.
        form: From `utils.train.forward.choose_format`.
        own_adapter: Whether the reference is an adapter of its own, or the model without one.
        known: (K,) from `precompute_reference` and `target_begin` of the same samples; None to compute them now.

    Returns:
        (T,) fp32 for each pack.
    """
    if known is not None:
        return [known[0][target_places(known[1], pack)].to(engine.device) for pack in packs]
    with as_reference(engine, own_adapter):
        return [token_logps(engine, [pack], form) for pack in packs]


def precompute_reference(
    engine: Any, samples: Samples, units: np.ndarray, layout: Layout, form: PackFormat, made_from: str, cache: Path
) -> tuple[torch.Tensor, np.ndarray]:
    """Computes the log-probabilities of answers with the engine as it is, before its first step, by `compute_or_load`.

    Returns:
        (K,) fp32, and `target_begin`.
    """

    def compute(pack: Pack) -> list[torch.Tensor]:
        return [token_logps(engine, [pack.to(engine.device)], form)]

    engine.eval()
    with torch.no_grad():
        (values,) = compute_or_load(lambda: (layout, compute), samples, units, made_from, cache) or [torch.zeros(0)]
    engine.train()
    return values, target_begin(samples)


def compute_or_load(
    make_ready: Callable[[], tuple[Layout, Callable[[Pack], list[torch.Tensor]]]],
    samples: Samples,
    units: np.ndarray,
    made_from: str,
    cache: Path,
) -> list[torch.Tensor]:
    """Computes tensors for supervised tokens, or loads those that were computed before.

    All ranks call this together. What a run that was stopped has computed is kept.

    Args:
        make_ready: Called if something is to be computed: how packs are laid out, and what makes (T, ...) tensors of
            a pack.
        samples: The samples.
        units: Numbers of those to compute, as windows name them.
        made_from: What the model was made from, and what is computed.
        cache: Folder of what was computed before.

    Returns:
        (K, ...) tensors, mapped from files: for the K supervised tokens of all samples, 0 where a unit was not asked
        for. Nothing if no unit was.
    """
    if not len(units):
        return []
    digest = hashlib.sha256(made_from.encode())
    for array in (samples.begin, samples.end, samples.tokens, samples.supervised, units):
        digest.update(np.ascontiguousarray(array))
    folder = cache / f"computed-{digest.hexdigest()[:16]}"
    drop_damaged(folder)
    if all_reduced(not folder.exists()) > 0:
        begin, results = target_begin(samples), []
        layout, compute = make_ready()
        packs = rank_packs(samples, make_plan(samples, [units], layout, cache), 0, deepspeed.comm.get_rank())
        parts_folder = cache / f".{folder.name}.{hashlib.sha256(str(layout).encode()).hexdigest()[:8]}.parts"
        for pack, parts in zip(packs, _computed_packs(packs, compute, parts_folder), strict=True):
            results = results or [torch.zeros(int(begin[-1]), *part.shape[1:], dtype=part.dtype) for part in parts]
            for result, part in zip(results, parts, strict=True):
                result[target_places(begin, pack)] = part
        for result in results:
            _sum_over_ranks(result)
        with create_once(folder) as temporary:
            if temporary:
                temporary.mkdir()
                for number, result in enumerate(results):
                    np.save(temporary / f"{number}.npy", result.numpy())
        deepspeed.comm.barrier()
        for left in cache.glob(f".{folder.name}.*.parts"):
            shutil.rmtree(left, ignore_errors=True)
    # "c": torch wants arrays that could be written to; what is written stays in memory.
    return [torch.from_numpy(np.load(file, mmap_mode="c")) for file in sorted(folder.glob("*.npy"))]


def _computed_packs(
    packs: list[Pack], compute: Callable[[Pack], list[torch.Tensor]], folder: Path
) -> Iterator[list[torch.Tensor]]:
    """Computes a rank's packs in their order, and keeps what is computed on the disk, for a run that goes on later.

    Args:
        packs: This rank's; all ranks have as many.
        compute: Makes (T, ...) tensors of a pack.
        folder: Of what is kept.

    Yields:
        Each pack's tensors, on the CPU.
    """
    rank = deepspeed.comm.get_rank()
    kept = _kept_packs(packs, folder, rank)
    # A sharded model is computed by all ranks together: they begin where the one that has kept least goes on.
    first = torch.tensor(len(kept), device=get_accelerator().current_device_name())
    deepspeed.comm.all_reduce(first, op=deepspeed.comm.ReduceOp.MIN)
    yield from kept[: int(first)]
    fresh, kept_at, numbers = [], time.monotonic(), range(int(first), len(packs))
    for number in progress_bar(numbers, "computing once", "pack", rank == 0, initial=int(first), total=len(packs)):
        fresh.append([part.cpu() for part in compute(packs[number])])
        yield fresh[-1]
        if time.monotonic() - kept_at > KEEP_SEC:
            columns = [torch.cat(parts).numpy() for parts in zip(*fresh, strict=True)]
            path = folder / f"{rank}-{number + 1 - len(fresh):08d}.npz"
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.savez(file, np.array(len(fresh)), *columns)
            fresh, kept_at = [], time.monotonic()


def _kept_packs(packs: list[Pack], folder: Path, rank: int) -> list[list[torch.Tensor]]:
    """Loads an earlier run's results for a rank's first packs, up to a missing or damaged file."""
    kept: list[list[torch.Tensor]] = []
    try:
        while (path := folder / f"{rank}-{len(kept):08d}.npz").is_file():
            with np.load(path) as file:
                count, *columns = (torch.from_numpy(file[f"arr_{number}"]) for number in range(len(file.files)))
            sizes = [len(pack.target_ids) for pack in packs[len(kept) : len(kept) + int(count)]]
            kept += [[*parts] for parts in zip(*(column.split(sizes) for column in columns), strict=True)]
    except (OSError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile):
        print(f"{shown(path)} is damaged: what follows is computed anew.")
    return kept


def _sum_over_ranks(values: torch.Tensor) -> None:
    """Sums on the device, some at a time, what is 0 on all ranks but one."""
    if deepspeed.comm.get_world_size() == 1:
        return
    for part in values.split(1 << 14):
        moved = part.to(get_accelerator().current_device_name(), torch.float32)
        deepspeed.comm.all_reduce(moved)
        part.copy_(moved)


def fingerprint(*folders: Path) -> str:
    """Hashes of the weights and configurations of models and adapters."""
    kinds = (".safetensors", ".bin", "config.json")
    files = [path for folder in folders for path in sorted(folder.glob("*")) if path.name.endswith(kinds)]
    return " ".join(sha256(path) for path in files)


def target_begin(samples: Samples) -> np.ndarray:
    """(N + 1,) where the supervised tokens of each sample begin when those of all stand in a row."""
    return np.concatenate([[0], np.cumsum(samples.targets)])


def target_places(begin: np.ndarray, pack: Pack) -> torch.Tensor:
    """(T,) places of a pack's supervised tokens in that row."""
    numbers, sizes = pack.sample.tolist(), pack.sample_targets.tolist()
    parts = [torch.arange(begin[number], begin[number] + size) for number, size in zip(numbers, sizes, strict=True)]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])
