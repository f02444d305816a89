"""utils/weights/shards.py: what it joins is what DeepSpeed's own script joins.

python -m pytest tests/test_utils_weights_shards.py
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import launch, run
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from utils.weights.shards import open_shards


def joined(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    """An independent second form: DeepSpeed's, or at stage 0 the one file."""
    if stage == 0:
        return torch.load(folder / "1-last/mp_rank_00_model_states.pt", weights_only=False)["module"]
    return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="1-last")


def compare(folder: Path, stage: int) -> None:
    weights, expected = open_shards(folder / "1-last", stage), joined(folder, stage)
    assert set(weights) == set(expected) and len(weights) > 20
    for name, tensor in expected.items():
        assert weights[name].shape == tuple(tensor.shape), name
        assert torch.equal(weights[name].read(), tensor), name


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_one_rank(ft: ModuleType, train_args: Any, tmp_path: Path, stage: int) -> None:
    run(ft, train_args(tuner="full", zero_stage=stage, max_steps=1, output_dir=tmp_path / "output"))
    folder = next((tmp_path / "output").glob("*/*/run.json")).parent
    compare(folder, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_three_ranks(train_args: Any, tmp_path: Path, stage: int) -> None:
    """Parameters do not divide by three, so that shards are cut inside of them and filled up."""
    arguments = train_args(tuner="full", zero_stage=stage, max_steps=1, batch_size=3, output_dir=tmp_path / "output")
    launch("deepspeed_ft/train.py", arguments, 3)
    folder = next((tmp_path / "output").glob("*/*/run.json")).parent
    compare(folder, stage)
    first = sorted((folder / "1-last").glob("*_optim_states.pt"))[0]
    first.unlink()
    with pytest.raises(FileNotFoundError, match="not the optimizer states of all ranks"):
        open_shards(folder / "1-last", stage)
