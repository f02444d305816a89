"""Whether a model is the one that was trained: rebuilt against the training run's probe, written against rebuilt."""

from pathlib import Path
from typing import Any

import torch

from utils.files import shown
from utils.weights.loading import DTYPES
from utils.weights.merging import ModelParts, assemble, offloaded
from utils.weights.probe import compare_logits, recorded, replay

# Two models are the same if no logit differs by more than MAX_ABS.
MAX_ABS = 1e-3
# What rounding the merged weights may cost, KL. SmolLM2-135M: 4.1e-3 to 4.4e-3 in bf16, 1.4e-6 to 2.4e-6 in fp16, where
# its own bf16 weights are exact; fp16's step is an eighth of bf16's, and KL goes with the square.
MAX_ROUNDING = {"bf16": 2e-2, "fp16": 2e-2 / 64}
# Other kernels of the same precision: the KL from the probe may be NOISE times what this precision costs the rebuilt
# model against fp32 arithmetic, or MAX_KL where it costs next to nothing. SmolLM2-135M in bf16 (LoRA, QLoRA, full):
# fp32 arithmetic is KL 1.3e-3 to 2.4e-3 away, other kernels (eager attention, no oneDNN) 1.6e-3 to 2.3e-3; the adapter
# scaled by 1.2 is 1.0e-2 away, by 0.5 or half of it 2.6e-2 or more, none of it 1.9e-1 or more.
NOISE, MAX_KL = 4, 1e-3
# Merging into another base than the trained one is bounded by a part of what the training changed.
MAX_PART = 0.1


def check_rebuilt(
    trained: ModelParts, probe: dict[str, Any], precision: str, device: str, base: Path, trained_on: str
) -> tuple[torch.Tensor, str]:
    """Link 1: holds what was rebuilt against the probe.

    Args:
        trained: From `utils.weights.run_folder.as_trained`.
        probe: The checkpoint's.
        precision: Of the run.
        device: To compute on.
        base: Folder of the base.
        trained_on: Name of the base in the run.

    Returns:
        The model's logits, computed in fp32, and a sentence for the model card.

    Raises:
        SystemExit: if this is not the model that was trained.
    """
    with offloaded(trained, DTYPES[precision], device) as model:
        rebuilt = replay(model, probe, device)
    drift = compare_logits(recorded(probe), rebuilt, DTYPES[precision])
    logits = rebuilt
    if precision != "fp32":
        with offloaded(trained, torch.float32, device) as model:
            logits = replay(model, probe, device)
    noise = compare_logits(logits, rebuilt, DTYPES[precision]).kl
    found = f"rebuilt as it was trained, computed in {precision}, against what the training run recorded: {drift}"
    if precision != "fp32":
        found += f" ({precision} itself: KL {noise:.2e} from fp32 arithmetic)"
    print(f"Link 1, {found}.")
    if not (drift.max_abs < MAX_ABS or (precision != "fp32" and drift.kl < max(NOISE * noise, MAX_KL))):
        raise SystemExit(
            "Not written: this is not the model that was trained. Was another base used? The run was trained on "
            f"{trained_on}; the base given is {shown(base)}."
        )
    return logits, found


def check_original(trained: ModelParts, probe: dict[str, Any], device: str) -> tuple[torch.Tensor, str]:
    """Link 1 of `--base original`, which is not what was trained: bounds its distance by the training's effect.

    Returns:
        As `check_rebuilt`.

    Raises:
        SystemExit: if the model is too far from the trained one.
    """
    with offloaded(trained, torch.float32, device) as model:
        with model.disable_adapter():
            untuned = compare_logits(recorded(probe), replay(model, probe, device), probe["logits_0"].dtype)
        logits = replay(model, probe, device)
    drift = compare_logits(recorded(probe), logits, probe["logits_0"].dtype)
    found = f"merged into the original weights, which are not those trained on, against the training run: {drift}"
    print(f"Link 1, {found}.\nThe base without training: {untuned}.")
    if not drift.kl < MAX_PART * untuned.kl:
        raise SystemExit(
            f"Not written: merged into the original weights the model is {drift.kl / untuned.kl:.0%} of the "
            f"training's effect away from what was trained, more than {MAX_PART:.0%}. Use --base dequant4"
        )
    return logits, found


def check_written(
    folder: Path, probe: dict[str, Any], logits: torch.Tensor, dtype: str, device: str, trust_remote_code: bool
) -> str:
    """Link 2: loads the written folder and holds it against the model that was to be written.

    Args:
        folder: The written one.
        probe: For its prompts.
        logits: Of that model, adapters beside the base, computed in fp32.
        dtype: Of the written weights.
        device: To compute on.
        trust_remote_code: Whether the model's own Python code may run.

    Returns:
        A sentence for the model card.

    Raises:
        SystemExit: if the folder does not hold that model.
    """
    with offloaded(assemble(folder, None, None, [], trust_remote_code), torch.float32, device) as model:
        written = replay(model, probe, device)
    drift = compare_logits(logits, written, DTYPES[dtype])
    found = f"the written {dtype} weights, loaded anew, against base and adapter, both computed in fp32: {drift}"
    print(f"Link 2, {found}.")
    if drift.max_abs < MAX_ABS or (dtype != "fp32" and drift.kl < MAX_ROUNDING[dtype]):
        return found
    if dtype == "fp32":
        raise SystemExit("Not written: the folder, loaded anew, is not the merged model. Is the disk full or damaged?")
    raise SystemExit(
        f"Not written: rounding the weights to {dtype} changes this model by KL {drift.kl:.2e}, more than "
        f"{MAX_ROUNDING[dtype]:.0e}. Use --dtype fp32"
    )
