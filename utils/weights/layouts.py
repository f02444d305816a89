"""Finds the tensors of a model folder, whichever layout its files have."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils.files import read_json
from utils.weights.lazy import CODES, LazyTensor, load_pickle
from utils.weights.llama_pth import open_llama


def open_weights(folder: Path) -> dict[str, LazyTensor]:
    """Finds the tensors of a model folder: safetensors, pytorch_model.bin, or Meta's consolidated.*.pth.

    Args:
        folder: The model's; of several layouts the first of these counts, as in transformers.

    Returns:
        Name -> tensor, in the files' order; Meta's layout under the names that transformers uses.

    Raises:
        OSError: if files are missing or cannot be read.
        ValueError: if they do not hold what their index says.
        safetensors.SafetensorError: if one is cut off.
    """
    for name, open_file in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_pickle)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return open_file(folder / name)
        if index.is_file():
            return _open_indexed(index, open_file)
    if parts := sorted(folder.glob("consolidated.*.pth")):
        return open_llama(parts)
    raise FileNotFoundError("it has no weights (model.safetensors, pytorch_model.bin or consolidated.00.pth).")


def _open_indexed(index: Path, open_file: Callable[[Path], dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    try:
        weight_map = read_json(index)["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
        outside = [name for name in names if not name or Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is no index of weights ({error!r}).") from error
    if outside:
        raise ValueError(f"{index.name} names a file outside of its folder: {outside[0]!r}.")
    weights: dict[str, LazyTensor] = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{name}, which {index.name} names, is missing.")
        found = open_file(index.parent / name)
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        if differing := sorted(listed ^ set(found)):
            raise ValueError(f"{name} and {index.name} do not agree on {differing[0]!r}.")
        weights |= found
    return weights


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    from safetensors import safe_open

    # A mapped file would count as memory of this process as far as it has been read; pread reads one tensor. The file
    # stays open as long as its tensors are known: its header is read once.
    file = safe_open(path, framework="pt", backend="pread")
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    if unknown := sorted({code for _, code in kinds.values()} - set(CODES)):
        raise ValueError(f"{path.name} holds numbers of an unknown kind: {unknown[0]}.")
    return {
        name: LazyTensor(shape, CODES[code], partial(_read_safe, file, name)) for name, (shape, code) in kinds.items()
    }


def _read_safe(file: Any, name: str, rows: slice | None = None) -> torch.Tensor:
    return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]


def _open_pickle(path: Path) -> dict[str, LazyTensor]:
    loaded = load_pickle(path)
    if not isinstance(loaded, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise ValueError(f"{path.name} does not hold tensors by name.")
    return {name: LazyTensor(tuple(t.shape), t.dtype, partial(_read_pickle, path, name)) for name, t in loaded.items()}


def _read_pickle(path: Path, name: str, rows: slice | None = None) -> torch.Tensor:
    # The file is mapped for one tensor at a time: pages of it that were read count as this process's memory.
    tensor = load_pickle(path)[name]
    return (tensor if rows is None else tensor[rows]).detach().clone()
