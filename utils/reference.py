"""The reference of preference learning and RL: what a policy said before it learnt, now or computed beforehand.

Shapes: S answers and T supervised tokens of them in a pack, N samples with K supervised tokens in all.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from tqdm import tqdm

from utils.attention import model_inputs
from utils.files import made_once
from utils.packing import Layout, Pack, make_plan, rank_packs
from utils.samples import Samples
from utils.tensors import all_reduced, token_logprobs


def token_logps(engine: Any, packs: list[Pack], attention: dict[str, int | None] | None) -> torch.Tensor:
    """(T,) fp32 log-probabilities of the supervised tokens of packs, one after the other."""
    parts = []
    for pack in packs:
        logits = engine(**model_inputs(pack, attention)).logits[0]
        parts.append(token_logprobs(logits, pack.target_ids))
    return torch.cat(parts)


@contextmanager
def as_reference(engine: Any, own_adapter: bool) -> Iterator[None]:
    """Lets the engine compute what it computed before it learnt: with its first adapter, or without one."""
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


def reference_logps(engine: Any, packs: list[Pack], attention: Any, own_adapter: bool, known: Any) -> list[Any]:
    """What the reference holds of each pack's answers.

    Args:
        engine: In any mode; it is left as it was.
        packs: On the engine's device.
        attention: From `utils.attention.usable_masks`.
        own_adapter: Whether the reference is an adapter of its own, or the model without one.
        known: (K,) from `precompute_reference` and `target_begin` of the same samples; None to compute them now.

    Returns:
        (T,) fp32 for each pack.
    """
    if known is not None:
        return [known[0][target_places(known[1], pack)].to(engine.device) for pack in packs]
    with as_reference(engine, own_adapter):
        return [token_logps(engine, [pack], attention) for pack in packs]


def precompute_reference(
    engine: Any, samples: Samples, units: np.ndarray, layout: Layout, attention: Any, made_from: str, cache: Path
) -> tuple[torch.Tensor, np.ndarray]:
    """Computes the log-probabilities of answers with the engine as it is, or reads what was computed before.

    All ranks call this together.

    Args:
        engine: Before its first step.
        samples: Pairs.
        units: Numbers of the pairs to compute.
        layout: As `utils.packing.make_plan` takes it.
        attention: From `utils.attention.usable_masks`.
        made_from: What the model was made from.
        cache: Folder of what was computed before.

    Returns:
        (K,) fp32 for the K supervised tokens of all samples, 0 where a pair was not asked for; and `target_begin`.
    """
    digest = hashlib.sha256(made_from.encode())
    for array in (samples.begin, samples.end, samples.tokens, samples.supervised, units):
        digest.update(np.ascontiguousarray(array))
    path, begin = cache / f"reference-{digest.hexdigest()[:16]}.npy", target_begin(samples)
    if all_reduced(not path.exists()) == 0:
        return torch.from_numpy(np.load(path)), begin
    values = torch.zeros(int(begin[-1]), device=engine.device)
    if not len(units):
        return values.cpu(), begin
    plan = make_plan(samples, [units], layout, cache)
    packs = rank_packs(samples, plan, 0, deepspeed.comm.get_rank())
    engine.eval()
    with torch.no_grad():
        for pack in tqdm(packs, "reference", unit="pack", disable=deepspeed.comm.get_rank() != 0):
            pack = pack.to(engine.device)
            values[target_places(begin, pack)] = token_logps(engine, [pack], attention)
    engine.train()
    deepspeed.comm.all_reduce(values)
    with made_once(path) as temporary:
        if temporary:
            with temporary.open("wb") as file:
                np.save(file, values.cpu().numpy())
    return values.cpu(), begin


def target_begin(samples: Samples) -> np.ndarray:
    """(N + 1,) where the supervised tokens of each sample begin when those of all stand in a row."""
    return np.concatenate([[0], np.cumsum(samples.targets)])


def target_places(begin: np.ndarray, pack: Pack) -> torch.Tensor:
    """(T,) places of a pack's supervised tokens in that row."""
    numbers, sizes = pack.sample.tolist(), pack.sample_targets.tolist()
    parts = [torch.arange(begin[number], begin[number] + size) for number, size in zip(numbers, sizes, strict=True)]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])
