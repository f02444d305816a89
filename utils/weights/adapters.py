"""Adapters in PEFT's format: read, attached to a model's layers, and merged layer by layer."""

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.files import reason_of
from utils.weights.lazy import load_pickle

# What PEFT puts into the names of a model's parameters.
PEFT_PARTS = (".base_layer", ".original_module", ".token_adapter", ".modules_to_save.default")
# Initialisations that leave the base unchanged; others change it, and the saved adapter belongs to the changed base.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
# What an adapter may say without being another kind of it; settings of training alone among it.
KNOWN = set(
    "alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying exclude_modules fan_in_fan_out "
    "inference_mode init_lora_weights layers_pattern layers_to_transform lora_alpha lora_bias lora_dropout "
    "modules_to_save peft_type peft_version r rank_pattern revision runtime_config target_modules task_type "
    "trainable_token_indices use_dora use_rslora".split()
)
# The ways in which PEFT matches patterns; what is no regular expression is PEFT's to refuse.
TRY_PATTERNS = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for form in ("{}", r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."):
        try:
            matcher = re.compile(form.replace("{}", pattern))
        except (re.error, OverflowError, RecursionError):
            continue
        for name in names:
            matcher.fullmatch(name)
            matcher.match(name)
"""
PATTERN_SEC = 10
MAX_DIFFERENCE = 1e-3  # Between a layer with and without merging, of its largest number.
KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Adapter(NamedTuple):
    """An adapter in memory.

    Attributes:
        config: PEFT's.
        tensors: By PEFT's names.
        weight: What it counts beside others.
    """

    config: Any
    tensors: dict[str, torch.Tensor]
    weight: float


def read_adapter(folder: Path, weight: float = 1.0) -> Adapter:
    """Reads a PEFT folder of any tool.

    Args:
        folder: With adapter_config.json.
        weight: What it counts beside others.

    Raises:
        OSError: if files are missing.
        ValueError: if it is none, or one that cannot be merged exactly.
    """
    from peft import LoraConfig, PeftConfig
    from safetensors.torch import load_file

    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError("it has no adapter_config.json.")
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # Libraries raise all kinds of errors on other tools' files.
        raise ValueError(f"adapter_config.json cannot be read ({error}).") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"it is of the kind {config.peft_type}; only LoRA and its variants are merged.")
    if config.init_lora_weights not in PLAIN_INITS:
        raise ValueError(
            f"it was begun with init_lora_weights={config.init_lora_weights!r}, which changes the base. Save it again "
            "with PEFT's path_initial_model_for_weight_conversion"
        )
    plain = LoraConfig().to_dict()
    said = {name: value for name, value in config.to_dict().items() if value or plain.get(name)}
    if others := [name for name, value in said.items() if value != plain.get(name) and name not in KNOWN]:
        raise ValueError(f"it is a variant of LoRA that is not merged: {', '.join(others)}.")
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if not (safe.is_file() or pickled.is_file()):
        raise FileNotFoundError("it has no adapter_model.safetensors or adapter_model.bin.")
    tensors = load_file(safe) if safe.is_file() else load_pickle(pickled)
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError("it does not hold tensors by name.")
    for name, tensor in tensors.items():
        if tensor.dtype not in KINDS or not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers of the kind {tensor.dtype}, or such that are not finite.")
    return Adapter(config, without_duplicates(tensors), weight)


def without_duplicates(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keeps one name for each tensor: PEFT writes saved embedding layers twice, and the base's too.

    Raises:
        ValueError: if the two differ.
    """
    once = {name: tensor for name, tensor in tensors.items() if ".modules_to_save." not in name}
    for name in tensors.keys() - once.keys():
        plain = name.replace(".modules_to_save.", ".")
        if not torch.equal(once.setdefault(plain, tensors[name]), tensors[name]):
            raise ValueError(f"{name} and {plain} differ.")
        once.pop(name.replace(".modules_to_save.", ".original_module."), None)
    return once


def vocabulary_rows(tensors: Mapping[str, torch.Tensor]) -> int | None:
    """The vocabulary size of an adapter that contains the whole embedding; None if it does not."""
    ends = tuple(f"{layer}.{kind}weight" for layer in ("embed_tokens", "lm_head") for kind in ("", "base_layer."))
    rows = [len(tensor) for name, tensor in tensors.items() if name.endswith(ends) and tensor.ndim == 2]
    return rows[0] if rows else None


def check_sum(adapters: Sequence[Adapter]) -> None:
    """Makes sure that adapters can be weighed and summed.

    Raises:
        ValueError: if they cannot.
    """
    if len(adapters) == 1 and adapters[0].weight == 1:
        return
    for config, tensors, weight in adapters:
        others = [name for name in tensors if ".lora_" not in name]
        if config.use_dora or config.bias != "none" or config.lora_bias or others or not math.isfinite(weight):
            raise ValueError(
                "adapters with weights, or several, are summed only if all are plain LoRA (no DoRA, biases, "
                "modules_to_save or embeddings)."
            )


def check_patterns(config: Any, names: Sequence[str]) -> None:
    """Makes sure that matching an adapter's patterns against a model's layers comes to an end.

    Some regular expressions take longer than anybody lives. They are tried in a process that can be ended.

    Args:
        config: PEFT's.
        names: Of the model's layers.

    Raises:
        ValueError: if it takes more than PATTERN_SEC seconds.
    """
    fields = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
    values = [getattr(config, field, None) or () for field in fields]
    patterns = [pattern for value in values for pattern in ([value] if isinstance(value, str) else value)]
    unusual = [pattern for pattern in patterns if not re.fullmatch(r"[\w.-]{1,300}", str(pattern))]
    if not unusual:
        return
    tried = json.dumps([list(map(str, unusual)), [*names, *(f"base_model.model.{name}" for name in names)]])
    try:
        subprocess.run([sys.executable, "-c", TRY_PATTERNS], input=tried.encode(), timeout=PATTERN_SEC, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the adapter's patterns of layers take too long to be matched ({', '.join(map(str, unusual))[:200]}). "
            "Name the layers in adapter_config.json"
        ) from None


def attach_adapters(model: torch.nn.Module, adapters: Mapping[str, Adapter]) -> Any:
    """Attaches adapters to a model, whose weights may be on the meta device or on disk.

    PEFT's own `from_pretrained` passes over tensors that have no place in the model. With a model of which a part is on
    the disk it writes that part once more, into the working directory.

    Args:
        model: The model.
        adapters: Name -> what `read_adapter` read.

    Returns:
        A PEFT model.

    Raises:
        ValueError: if tensors and configuration do not go together or with the model.
    """
    from peft import get_peft_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    empty = any(parameter.is_meta for parameter in model.parameters())
    options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": empty}
    tuned = None
    layers = [name for name, _ in model.named_modules()]
    for name, (config, tensors, _) in adapters.items():
        check_patterns(config, layers)
        config.inference_mode = True
        config.base_model_name_or_path = None  # PEFT would warn wherever the base lay elsewhere in training.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # Of transformers, about a name that PEFT still uses.
                if tuned is None:
                    tuned = get_peft_model(model, config, name, **options)
                else:
                    tuned.add_adapter(name, config, **options)
            for layer in tuned.modules():
                if isinstance(layer, BaseTunerLayer):
                    _keep_device(layer)
            result = set_peft_model_state_dict(tuned, tensors, name, low_cpu_mem_usage=empty)
        except Exception as error:  # Names that are no patterns, ranks that are no numbers, and so on.
            raise ValueError(f"the adapter does not go with this base: {reason_of(error)}") from error
        if result.unexpected_keys:
            raise ValueError(f"the adapter has {result.unexpected_keys[0]}, which has no place in this model.")
        missing = [key for key in result.missing_keys if f".{name}." in f"{key}."]
        # Of tied layers the second one has the first one's values.
        there = {id(weight) for key, weight in tuned.named_parameters(remove_duplicate=False) if key not in missing}
        for key in missing:
            weight = tuned.get_parameter(key)
            if weight.is_meta or not (empty or id(weight) in there):
                raise ValueError(f"the adapter has no {key}.")
    return tuned


def _keep_device(layer: Any) -> None:
    """Keeps PEFT from moving an adapter to the meta device, or to a layer whose weights are on disk."""
    base = layer.get_base_layer()
    if any(parameter.is_meta for parameter in base.parameters()):
        hook, move = getattr(base, "_hf_hook", None), layer._move_adapter_to_device_of_base_layer
        there = partial(move, device=hook.execution_device) if hook else lambda *_, **__: None
        layer._move_adapter_to_device_of_base_layer = there


def add_adapters(model: torch.nn.Module, adapters: Sequence[Adapter]) -> torch.nn.Module:
    """Attaches adapters to a model without weights.

    Args:
        model: The skeleton.
        adapters: From `read_adapter`.

    Returns:
        A PEFT model whose adapters have values.

    Raises:
        ValueError: if tensors and configuration do not go together or with the model, or adapters not with each other.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_sum(adapters)
    names = ["default", *(f"adapter{number}" for number in range(1, len(adapters)))]
    model = attach_adapters(model, dict(zip(names, adapters, strict=True)))
    model.base_model.set_adapter(names)
    for layer in model.modules():
        for key, buffer in layer.named_buffers(recurse=False):
            if buffer.is_meta:  # Rows of the base that PEFT keeps to take an adapter off again.
                layer.register_buffer(key, torch.zeros_like(buffer, device="cpu"))
        if isinstance(layer, BaseTunerLayer):
            if any(getattr(layer, "lora_bias", {}).values()) and getattr(layer.get_base_layer(), "bias", None) is None:
                raise ValueError("the adapter brings biases (lora_bias) to layers that have none.")
            for name, (_, _, weight) in zip(names, adapters, strict=True):
                if name in getattr(layer, "scaling", {}):
                    layer.scaling[name] *= weight
    return model.eval()


def plain_name(name: str) -> str:
    """The name that a parameter of a PEFT model has in the plain model."""
    name = name.removeprefix("base_model.model.")
    for part in PEFT_PARTS:
        name = name.replace(part, "")
    return name


def adapted_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Plain name of a layer -> PEFT's layer in its place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = model.named_modules(remove_duplicate=False)
    return {plain_name(name): module for name, module in named if isinstance(module, BaseTunerLayer)}


@torch.no_grad()
def merge_into(layer: torch.nn.Module, leaf: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Merges a layer's adapters, and tries the result out.

    Args:
        layer: PEFT's; adapters in fp32.
        leaf: Which of its parameters is wanted, such as "weight".
        weights: Its base's parameters by leaf, fp32; they are used up.

    Raises:
        ValueError: if the merged layer's output differs from that of base and adapters.
    """
    from peft.tuners.lora.layer import Linear

    base = layer.get_base_layer()
    kept = {name: base.get_parameter(name) for name in weights}
    for name, tensor in weights.items():
        setattr(base, name, torch.nn.Parameter(tensor, requires_grad=False))
    try:
        tried = _some_input(base)
        expected = layer(tried)
        if leaf == "weight" and isinstance(layer, Linear) and not (
            layer.fan_in_fan_out or layer.lora_variant or any(layer.lora_bias.values())
        ):
            # What PEFT does with plain LoRA, without three more matrices of this size.
            for name in (name for name in layer.lora_A if name in layer.active_adapters):
                base.weight.addmm_(layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name])
        else:
            layer.merge()
        merged = base.get_parameter(leaf).data
        if leaf == "weight" and (base(tried) - expected).abs().max() > MAX_DIFFERENCE * expected.abs().max():
            raise ValueError("merged, a layer says something else than base and adapter side by side.")
        return merged
    finally:
        layer.merged_adapters.clear()
        for name, parameter in kept.items():
            setattr(base, name, parameter)


def _some_input(layer: torch.nn.Module) -> torch.Tensor:
    """What a layer can be tried with: some tokens, or (4, in) numbers."""
    device, generator = layer.weight.device, torch.Generator().manual_seed(0)
    if isinstance(layer, torch.nn.Embedding):
        return torch.randint(len(layer.weight), (4,), generator=generator).to(device)
    size = layer.in_features if isinstance(layer, torch.nn.Linear) else layer.weight.shape[0]
    return torch.randn(4, size, generator=generator).to(device)
