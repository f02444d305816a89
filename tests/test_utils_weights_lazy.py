"""utils/weights/lazy.py: every layout gives the same tensors, and what is written is what was read.

python -m pytest tests/test_utils_weights_lazy.py
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from utils.weights.layouts import open_weights
from utils.weights.lazy import LazyTensor, weights_digest, write_weights


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", 300).to(torch.bfloat16)


@pytest.fixture(scope="module")
def layouts(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every layout, each written by a library."""
    root = tmp_path_factory.mktemp("layouts")
    state = model.state_dict()
    names = list(state)
    for name in ("safetensors", "sharded", "bin", "old bin", "sharded bin"):
        (root / name).mkdir()
    model.save_pretrained(root / "safetensors")
    model.save_pretrained(root / "sharded", max_shard_size="50KB")
    torch.save(state, root / "bin/pytorch_model.bin")
    torch.save(state, root / "old bin/pytorch_model.bin", _use_new_zipfile_serialization=False)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:])):
        file = f"pytorch_model-{number}.bin"
        torch.save({name: state[name] for name in part}, root / "sharded bin" / file)
        weight_map |= dict.fromkeys(part, file)
    index = root / "sharded bin/pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {path.name: path for path in root.iterdir()}


def test_all_layouts_give_the_same_tensors(model: Any, layouts: dict[str, Path]) -> None:
    assert len(list(layouts["sharded"].glob("*.safetensors"))) > 2
    digests = set()
    for name, folder in layouts.items():
        weights, state = open_weights(folder), model.state_dict()
        assert set(weights) == set(state), name
        for key, stored in weights.items():
            assert (stored.shape, stored.dtype) == (tuple(state[key].shape), state[key].dtype)
            assert torch.equal(stored.read(), state[key]) and torch.equal(stored.read(slice(1, 3)), state[key][1:3])
        digests.add(weights_digest(weights))
    assert len(digests) == 1


def test_small_tensors_are_digested_to_their_end(tmp_path: Path) -> None:
    """Recurrent layers have a number a head; and a scale is one number."""
    from safetensors.torch import save_file

    digests = set()
    for last in (0.0, 1.0):
        tensors = {"decay": torch.tensor([1.0, 2, 3, last]), "scale": torch.ones(1), "number": torch.tensor(2.0)}
        save_file(tensors, tmp_path / "model.safetensors")
        digests.add(weights_digest(open_weights(tmp_path)))
    assert len(digests) == 2


def test_the_digest_tells_bases_apart(model: Any, layouts: dict[str, Path], tmp_path: Path) -> None:
    digest = weights_digest(open_weights(layouts["safetensors"]))
    state = load_file(layouts["safetensors"] / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert weights_digest(open_weights(tmp_path)) == digest  # The same numbers in another dtype.
    state["model.norm.weight"] = state["model.norm.weight"] * 1.01
    save_file(state, tmp_path / "model.safetensors")
    assert weights_digest(open_weights(tmp_path)) != digest


def test_what_is_written_is_what_was_read(model: Any, layouts: dict[str, Path], tmp_path: Path) -> None:
    weights = open_weights(layouts["safetensors"])
    # Not only numbers of two bytes: a whole number, a byte, a scalar.
    others = {"steps": torch.arange(3), "flag": torch.tensor([True]), "scalar": torch.tensor(2.5)}
    extra = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in others.items()}
    (tmp_path / "whole").mkdir()
    write_weights(tmp_path / "whole", extra | weights, "5GB")
    expected = model.state_dict() | others
    with safe_open(tmp_path / "whole/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(expected)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in expected.items())
    assert not (tmp_path / "whole/model.safetensors.index.json").exists()

    shutil.copytree(layouts["safetensors"], tmp_path / "parts")
    (tmp_path / "parts/model.safetensors").unlink()
    write_weights(tmp_path / "parts", weights, "50KB")
    files = list((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2 and all(len(load_file(f)) == 1 or f.stat().st_size < 52_000 for f in files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_reading_less_than_was_promised_is_noticed(tmp_path: Path) -> None:
    wrong = LazyTensor((2, 3), torch.float32, lambda: torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"x became \(3, 2\)"):
        write_weights(tmp_path, {"x": wrong}, "5GB")


def damaged(layouts: dict[str, Path], layout: str, target: Path) -> Path:
    shutil.copytree(layouts[layout], target)
    return target


class Evil:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("run",))


def test_files_that_cannot_be_trusted(layouts: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    folder = damaged(layouts, "bin", tmp_path / "evil")
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        open_weights(folder)
    assert "run" not in capsys.readouterr().out
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        open_weights(folder)
    for outside in ("../other.safetensors", "/other/model.safetensors", "a/b.safetensors", ""):
        folder = damaged(layouts, "sharded", tmp_path / f"outside{len(outside)}")
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = outside
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="outside of its folder"):
            open_weights(folder)


def test_files_that_do_not_go_together(layouts: dict[str, Path], tmp_path: Path) -> None:
    folder = damaged(layouts, "sharded", tmp_path / "missing")
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        open_weights(folder)
    index = damaged(layouts, "sharded", tmp_path / "index") / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="do not agree on 'model.norm.weight'"):
        open_weights(index.parent)
    for text in ('{"weight_map": 3}', "{}", "[]", '{"a"', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="no index of weights"):
            open_weights(index.parent)
    for layout, file in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        path = damaged(layouts, layout, tmp_path / f"cut {layout}") / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises((ValueError, SafetensorError)):
            open_weights(path.parent)
    with pytest.raises(FileNotFoundError, match="no weights"):
        open_weights(tmp_path)
