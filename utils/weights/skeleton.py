"""Models on the meta device, and which tensors of a base's files become which of their parameters."""

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.weights.lazy import LazyTensor


class Fused(NamedTuple):
    """A parameter that is several tensors in the files, such as a layer's experts.

    Attributes:
        sources: Their names, in the order in which they are put together.
        patterns: Of transformers' converter, for each.
        converter: What puts them together.
    """

    sources: tuple[str, ...]
    patterns: tuple[str, ...]
    converter: Any

    def join(self, name: str, tensors: list[torch.Tensor], model: torch.nn.Module) -> torch.Tensor:
        """Makes the parameter of the files' tensors."""
        converter = deepcopy(self.converter)  # It keeps what it is given.
        for source, pattern, tensor in zip(self.sources, self.patterns, tensors, strict=True):
            converter.add_tensor(name, source, pattern, tensor)
        made = converter.convert(name, model=model, config=model.config)
        if list(made) != [name]:
            raise ValueError(f"{self.sources[0]} becomes {', '.join(made)}, which is not supported.")
        return made[name][0] if isinstance(made[name], list) else made[name]


def make_skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> torch.nn.Module:
    """Builds a model whose parameters have shapes but no values."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval()


def read_config(base: Path, stored: Mapping[str, LazyTensor], trust_remote_code: bool) -> Any:
    """Reads a base's configuration, or makes it where Meta's files lie.

    Raises:
        ValueError: if the base is quantised.
    """
    from transformers import AutoConfig, LlamaConfig

    from utils.weights.llama_pth import llama_config, read_params

    if not (base / "config.json").is_file() and (base / "params.json").is_file():
        return LlamaConfig(**llama_config(read_params(base), {name: part.shape for name, part in stored.items()}))
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise ValueError("its weights are stored quantised. Take the model that it was made from.")
    return config


def model_names(model: torch.nn.Module, stored: Mapping[str, LazyTensor]) -> tuple[dict[str, str], dict[str, Fused]]:
    """Finds the parameters that a base's tensors become, by transformers' own rules.

    Args:
        model: The skeleton.
        stored: From `utils.weights.layouts.open_weights`.

    Returns:
        Name in the model -> name in the files, without what the model's class says may be there unused; and the
        parameters that are put together.

    Raises:
        ValueError: if tensors are missing or unknown.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    shells = model.state_dict()
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    names, groups, unused = {}, {}, re.compile("|".join(patterns))
    for name in sorted(stored, key=dot_natural_key):
        found, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, shells)
        if pattern and found in shells:
            groups.setdefault(found, []).append((name, pattern))
        elif found in names:
            raise ValueError(f"its weights have {names[found]} and {name}, which are one tensor.")
        elif found in shells:
            names[found] = name
        elif not unused.search(name):
            raise ValueError(f"its weights have {name}, its configuration has no such tensor.")
    fused = {
        found: Fused(*map(tuple, zip(*group, strict=True)), by_pattern[group[0][1]]) for found, group in groups.items()
    }
    ties = model.all_tied_weights_keys
    there = set(names) | set(fused) | set(ties) | {ties[name] for name in ties if name in names}
    if missing := sorted(set(shells) - there):
        raise ValueError(f"{missing[0]} is missing in its weights.")
    return names, fused


def resolve_ties(ties: Mapping[str, str], files: dict[str, str], stored: Mapping[str, LazyTensor]) -> bool:
    """Resolves tied parameters as transformers does.

    Args:
        ties: Of the configuration: name -> the one that it shares its values with.
        files: From `model_names`; duplicates with the same values are removed.
        stored: The tensors.

    Returns:
        Whether the files hold two different tensors for one, so that the configuration is wrong.
    """
    parted = False
    for target, source in ties.items():
        if target in files and source not in files:
            files[source] = files.pop(target)
        elif target in files and torch.equal(stored[files[target]].read(), stored[files[source]].read()):
            del files[target]
        elif target in files:
            parted = True
    return parted


def quantised_parameters(config: Any, trust_remote_code: bool) -> dict[str, bool]:
    """The parameters that a 4-bit model quantises, by transformers' own rule.

    Returns:
        Name -> whether it is quantised the other way round (GPT-2's layers hold their weights so).
    """
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer

    model = make_skeleton(config, torch.float32, trust_remote_code)
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    settings = BitsAndBytesConfig(load_in_4bit=True)
    model = replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=settings)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    return {f"{name}.weight": issubclass(layer.source_cls, Conv1D) for name, layer in layers.items()}


def nf4_values(stored: LazyTensor, turned: bool) -> LazyTensor:
    """A tensor after NF4 quantisation with double quantisation and back (QLoRA, arXiv 2305.14314)."""

    def read() -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        tensor = stored.read()
        tensor = tensor.T.contiguous() if turned else tensor
        tensor = dequantize_4bit(*quantize_4bit(tensor, quant_type="nf4", compress_statistics=True))
        return tensor.T.contiguous() if turned else tensor

    return LazyTensor(stored.shape, stored.dtype, read)


def cast_lazy(stored: LazyTensor, dtype: torch.dtype | None) -> LazyTensor:
    """Changes the precision of a tensor when it is read; whole numbers stay as they are, and all if there is none."""
    if dtype is None or not stored.dtype.is_floating_point or stored.dtype == dtype:
        return stored
    return LazyTensor(stored.shape, dtype, lambda: stored.read().to(dtype))


def check_shapes(shells: Mapping[str, torch.Tensor], weights: Mapping[str, LazyTensor]) -> None:
    """Makes sure that weights are what the configuration wants.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, stored in weights.items():
        shell = shells[name]
        if stored.shape != tuple(shell.shape):
            expected = tuple(shell.shape)
            raise ValueError(f"{name} has the shape {stored.shape}, the configuration expects {expected}.")
        if stored.dtype.is_floating_point != shell.is_floating_point():
            raise ValueError(f"{name} holds numbers of the kind {stored.dtype}, which is not what it is computed with.")
