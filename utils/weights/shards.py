"""Weights of full training in DeepSpeed's checkpoints: joined from their ZeRO shards a tensor at a time.

DeepSpeed's own zero_to_fp32 joins the whole model in memory first (stages 1 and 2), or reads no shards (stage 0).
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.weights.lazy import LazyTensor, UnsafePickle, load_pickle


class Fragment(NamedTuple):
    """A part of a parameter: `start` to `end` in a group of a rank's shards."""

    rank: int
    group: int
    start: int
    end: int


Place = tuple[str, torch.Size, list[Fragment]]
Read = Callable[[Path], Any]


def allow_deepspeed() -> None:
    """Lets `load_pickle` read the classes that DeepSpeed puts into checkpoints: none does more than hold values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def check_pickles(folder: Path) -> None:
    """Makes sure that reading a checkpoint's files runs no code, before DeepSpeed reads them, which takes anything.

    Raises:
        ValueError: naming the first file that could, or that is damaged.
    """
    allow_deepspeed()
    with _advised():
        for path in sorted(folder.rglob("*.pt")):
            load_pickle(path)


def open_shards(folder: Path, stage: int, trusted: bool = False) -> dict[str, LazyTensor]:
    """Finds the trained parameters of a checkpoint in fp32.

    Args:
        folder: The tag's.
        stage: ZeRO's, with which it was saved.
        trusted: Whether reading its files may run code.

    Returns:
        Name -> parameter.

    Raises:
        OSError: if the files of some ranks are missing.
        ValueError: if the files do not go together, or reading them could run code.
    """
    allow_deepspeed()
    try:
        with _advised():
            return _found_shards(folder, stage, partial(load_pickle, trusted=trusted))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its files do not hold what DeepSpeed writes ({error!r}).") from error


@contextmanager
def _advised() -> Iterator[None]:
    """Adds --trust_checkpoint to the message about a file that is not read."""
    try:
        yield
    except UnsafePickle as error:
        raise UnsafePickle(f"{error} If you know who made it: --trust_checkpoint True") from error


def _found_shards(folder: Path, stage: int, read: Read) -> dict[str, LazyTensor]:
    if stage == 0:
        path = folder / "mp_rank_00_model_states.pt"
        module = read(path)["module"]
        return {
            name: LazyTensor(tuple(t.shape), t.dtype, partial(_read_module, read, path, name))
            for name, t in module.items()
        }
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    states = read(folder / f"{prefix}mp_rank_00_model_states.pt")
    files = sorted(folder.glob("*_optim_states.pt"), key=_rank_of)
    ranks = read(files[0])["optimizer_state_dict"]["partition_count"] if files else 1
    if len(files) != (max(ranks) if isinstance(ranks, list) else ranks):
        raise FileNotFoundError(f"{folder.name} has not the optimizer states of all ranks (*_optim_states.pt).")
    locate = _in_rank_parts if stage == 3 else _in_one_row
    weights = {
        name: LazyTensor(tuple(shape), torch.float32, partial(_read_fragments, read, files, stage, fragments, shape))
        for name, shape, fragments in locate(states["param_shapes"], read, files, stage)
    }
    # One parameter under several names is stored once.
    return weights | {name: weights[other] for name, other in states["shared_params"].items() if other in weights}


def _rank_of(path: Path) -> int:
    return int(re.search(r"rank_(\d+)_mp", path.name)[1])


def _flat_groups(read: Read, path: Path, stage: int) -> list[torch.Tensor]:
    """A rank's part of the fp32 parameters, a vector for each group of the optimizer."""
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    return read(path)["optimizer_state_dict"][key]


def _in_one_row(shapes: list[dict[str, torch.Size]], read: Read, files: list[Path], stage: int) -> Iterator[Place]:
    """Stages 1 and 2: a group's parameters lie one after the other, cut into as many parts as there are ranks."""
    sizes = [[group.numel() for group in _flat_groups(read, path, stage)] for path in files]
    gaps = read(files[0])["optimizer_state_dict"].get("param_alignment_paddings")
    for number, group in enumerate(shapes):
        begins = [0, *accumulate(rank[number] for rank in sizes)]
        place = 0
        for index, (name, shape) in enumerate(group.items()):
            end = place + shape.numel()
            fragments = [
                Fragment(rank, number, max(place - begin, 0), min(end - begin, after - begin))
                for rank, (begin, after) in enumerate(pairwise(begins))
                if begin < end and place < after
            ]
            yield name, shape, fragments
            place = end + (gaps[number][index] if gaps else 0)
        # DeepSpeed rounds a group up to a multiple of twice the ranks.
        if math.ceil(place / (2 * len(files))) != math.ceil(begins[-1] / (2 * len(files))):
            raise ValueError(f"the shards hold {begins[-1]} numbers, the parameters are {place}.")


def _in_rank_parts(shapes: list[dict[str, torch.Size]], read: Read, files: list[Path], stage: int) -> Iterator[Place]:
    """Stage 3: every parameter is cut into as many equal parts as there are ranks, the last one filled up."""
    begins = [0, *accumulate(group.numel() for group in _flat_groups(read, files[0], stage))]
    place = 0
    for name, shape in (item for group in shapes for item in group.items()):
        end = place + math.ceil(shape.numel() / len(files))
        fragments = [
            Fragment(rank, number, max(place - begin, 0), min(end - begin, after - begin))
            for rank in range(len(files))
            for number, (begin, after) in enumerate(pairwise(begins))
            if begin < end and place < after
        ]
        yield name, shape, fragments
        place = end
    if place != begins[-1]:
        raise ValueError(f"the shards of a rank hold {begins[-1]} numbers, its parts of the parameters are {place}.")


def _read_fragments(
    read: Read, files: list[Path], stage: int, fragments: list[Fragment], shape: torch.Size
) -> torch.Tensor:
    # Files are mapped for one tensor at a time: pages of them that were read count as this process's memory.
    parts = [_flat_groups(read, files[rank], stage)[group][start:end] for rank, group, start, end in fragments]
    return torch.cat(parts)[: shape.numel()].view(shape)


def _read_module(read: Read, path: Path, name: str) -> torch.Tensor:
    return read(path)["module"][name].clone()
