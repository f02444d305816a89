"""utils/train/arguments.py: how a run's folder is named; adapters to go on with.

python -m pytest tests/test_utils_train_arguments.py
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from utils.train.arguments import adapter_problems, adopt_adapter, run_dir


def arguments(**changes: Any) -> Namespace:
    given = {"output_dir": "/out", "model_dir": "/models", "model_name": "org/name", "tuner": "lora", "adapter": ""}
    return Namespace(**given | {"train_bnb_enabled": False, "quant_bits": None} | changes)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "DS-org/name"),
        ({"quant_bits": 4}, "DS-org/name-BNB"),
        ({"train_bnb_enabled": True}, "DS-org/name-BNB"),
        ({"tuner": "full"}, "DS-org/name-FULL"),
        ({"model_name": "/elsewhere/org/mine"}, "DS-mine"),
        ({"model_name": "/elsewhere/org/mine/", "tuner": "full"}, "DS-mine-FULL"),
        ({"model_name": "../output_hf/mine"}, "DS-mine"),
    ],
    ids=str,
)
def test_a_run_is_named_after_its_model(changes: dict[str, Any], name: str) -> None:
    """After the folder alone, where that lies elsewhere than in --model_dir: results stay in --output_dir."""
    assert run_dir(arguments(**changes)) == Path("/out") / name


def test_an_adapter_to_go_on_with(tmp_path: Path) -> None:
    assert adapter_problems(arguments()) == [] and adopt_adapter(arguments(), tmp_path) == {}
    args = arguments(adapter=str(tmp_path))
    (problem,) = adapter_problems(args)
    assert "no adapter_config.json and no adapter_model.safetensors" in problem and "<run>/<ckpt_id>/adapter" in problem
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "lora_dropout": 0.5, "target_modules": ["b", "a"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    assert adapter_problems(args) == []
    known = adopt_adapter(args, tmp_path)
    assert (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target) == (3, 7, 0.5, "a,b")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"others")
    assert [*known] == ["adapter"] and adopt_adapter(args, tmp_path) != known, "known by its contents"
    assert "--tuner full trains all weights" in adapter_problems(arguments(adapter=str(tmp_path), tuner="full"))[0]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    assert "of the kind LOHA, expected LORA" in adapter_problems(args)[0]


def test_what_an_adapter_trains_besides(tmp_path: Path) -> None:
    """Whole tables, or rows of new tokens, which have to be those of the model."""
    args = arguments(adapter=str(tmp_path), train_embeddings="none")
    (tmp_path / "adapter_model.safetensors").touch()
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "lora_dropout": 0.5, "target_modules": ["a"]}

    def trained(**more: Any) -> str:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | more))
        adopt_adapter(args, tmp_path)
        return args.train_embeddings

    assert trained() == "none" and trained(modules_to_save=["lm_head"]) == "all"
    with pytest.raises(SystemExit, match="has no new tokens"):
        trained(trainable_token_indices={"embed_tokens": [5, 6, 7]})
    (tmp_path / "run.json").write_text(json.dumps({"vocabulary": {"first_new_id": 5, "new_tokens": 3}}))
    assert trained(trainable_token_indices={"embed_tokens": [5, 6, 7]}) == "new_rows"
    assert trained(trainable_token_indices=[5, 6, 7]) == "new_rows"
    for others in ({"embed_tokens": [5, 6, 7], "lm_head": [4, 5, 6]}, [5, 6]):
        with pytest.raises(SystemExit, match="it has rows of other tokens"):
            trained(trainable_token_indices=others)
    config.pop("r")
    with pytest.raises(SystemExit, match="cannot be used"):
        trained()
