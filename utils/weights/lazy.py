"""Weights in files: read a tensor at a time, and written shard by shard.

Whatever a model's size, no more than a tensor or two is in memory.
"""

import ctypes
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.cli import progress_bar
from utils.files import reason_of

# The names that safetensors files use for dtypes.
CODES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
}  # fmt: skip
# So many rows from the middle of each tensor tell a base from another.
DIGEST_ROWS = 4
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # As in malloc.h.


class LazyTensor(NamedTuple):
    """A tensor on disk that is read when it is needed, anew each time.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        read: Gives it; those of `open_weights` give some rows of it if a slice is named.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[..., torch.Tensor]

    @property
    def size_bytes(self) -> int:
        """What it takes on disk or in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class UnsafePickle(ValueError):
    """A file that may run code when it is read."""


def load_pickle(path: Path, trusted: bool = False) -> Any:
    """Reads what torch.save wrote, tensors only when they are touched.

    Args:
        path: The file.
        trusted: Whether anything may be in it; reading it can run code then. Otherwise tensors, containers, numbers and
            texts, and what `torch.serialization.add_safe_globals` was told of.

    Raises:
        UnsafePickle: if it holds something else, or is damaged.
        ValueError: if it is no such file.
    """
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=not trusted, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds {found[1]}, and reading that could run code" if found else "it is damaged, or could run code"
        raise UnsafePickle(f"{path.name} cannot be read: {what}.") from error
    except Exception as error:  # Damaged pickles raise almost anything.
        raise ValueError(f"{path.name} cannot be read ({reason_of(error)}).") from error


def read_ahead(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Reads the next tensor in a thread while the current one is in use."""
    reader, ahead, names = ThreadPoolExecutor(max_workers=1), {}, list(weights)

    def read(place: int) -> torch.Tensor:
        asked = ahead.pop(place, None) or reader.submit(weights[names[place]].read)
        ahead.clear()
        if place + 1 < len(names):
            ahead[place + 1] = reader.submit(weights[names[place + 1]].read)
        return asked.result()

    return {name: LazyTensor(*weights[name][:2], partial(read, place)) for place, name in enumerate(names)}


def weights_digest(weights: Mapping[str, LazyTensor]) -> str:
    """A digest of some rows of every tensor, independent of file layout and of dtypes that hold the same values.

    It takes seconds for the largest models, but a few changed numbers may go unnoticed.
    """
    digest = sha256()
    for name, stored in sorted(weights.items()):
        rows = stored.shape[0] if stored.shape else None
        part = stored.read(None if rows is None else slice(rows // 2, min(rows // 2 + DIGEST_ROWS, rows)))
        digest.update(f"{name} {stored.shape}".encode() + part.double().numpy().tobytes())
    return digest.hexdigest()


def write_weights(folder: Path, tensors: Mapping[str, LazyTensor], max_shard_size: str) -> None:
    """Writes tensors as safetensors files and their index, one tensor at a time.

    Args:
        folder: Where to.
        tensors: What to write; each is read once.
        max_shard_size: Of a file, such as "5GB".
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    shells = {name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in tensors.items()}
    split = split_torch_state_dict_into_shards(
        shells, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    total = sum(stored.size_bytes for stored in tensors.values())
    with progress_bar(None, "Writing", "B", total=total, unit_scale=True) as bar, _freed_memory_reused():
        for file, names in split.filename_to_tensors.items():
            _write_file(folder / file, {name: tensors[name] for name in names}, bar)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


@contextmanager
def _freed_memory_reused() -> Iterator[None]:
    """Makes glibc reuse freed memory for the next tensor: fresh pages take longer than the work on them."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # Another C library.
        yield
        return
    libc.mallopt(M_ARENA_MAX, 1)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 1 << 16)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 17)
        libc.malloc_trim(0)


def _write_file(path: Path, tensors: Mapping[str, LazyTensor], bar: Any) -> None:
    """Writes a safetensors file; the library itself wants all tensors of a file in memory."""
    codes = {dtype: code for code, dtype in CODES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, stored in tensors.items():
        end = place + stored.size_bytes
        header[name] = {"dtype": codes[stored.dtype], "shape": stored.shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # So that the tensors begin at a multiple of 8 bytes.
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as writer:
        file.write(len(text).to_bytes(8, "little") + text)
        written: Future[Any] = Future()
        written.set_result(None)
        for name, stored in tensors.items():
            tensor = stored.read()  # While the one before goes to the disk.
            if (tuple(tensor.shape), tensor.dtype) != stored[:2]:
                raise ValueError(f"{name} became {tuple(tensor.shape)} {tensor.dtype}, expected {stored[:2]}.")
            written.result()
            written = writer.submit(file.write, tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            bar.update(stored.size_bytes)
        written.result()
        file.flush()
        os.fsync(file.fileno())
