"""Base and adapters, or joined shards, as one model that is never in memory as a whole: it is merged layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from utils.files import read_json
from utils.weights.adapters import Adapter, adapted_layers, add_adapters, merge_into, plain_name, vocabulary_rows
from utils.weights.layouts import open_weights
from utils.weights.lazy import LazyTensor, read_ahead
from utils.weights.skeleton import (
    Fused,
    cast_lazy,
    check_shapes,
    make_skeleton,
    model_names,
    nf4_values,
    quantised_parameters,
    read_config,
    resolve_ties,
)

# Classes whose code uses weights of the layers in them: PEFT's, which are named as PyTorch's.
WRAPPERS = ["Linear", "Embedding", "Conv1D", "TrainableTokensWrapper", "TrainableTokensLayer"]


class ModelParts(NamedTuple):
    """A model as modules without weights, and its weights as lazy tensors.

    Attributes:
        model: The modules, adapters included, without the base's weights.
        weights: Plain name -> the base's weight as it was in training, or the trained one of full training.
        modules_to_save: Plain name -> what is computed with in place of the base's (`modules_to_save`).
        ties: Name of a parameter -> the one that it shares its values with.
        files: Plain name -> name in the base's files.
        fused: Plain name -> the tensors of the files that it is made of.
        others: Name in the base's files -> what is in them of parts for images or sound, beside the text's model.
    """

    model: torch.nn.Module
    weights: dict[str, LazyTensor]
    modules_to_save: dict[str, torch.nn.Parameter]
    ties: dict[str, str]
    files: dict[str, str]
    fused: dict[str, Fused]
    others: dict[str, LazyTensor]

    def find(self, name: str) -> LazyTensor:
        """The weight of a plain name without adapters."""
        return self.weights.get(name) or self.weights[self.ties[name]]

    @property
    def plain(self) -> torch.nn.Module:
        """The modules without PEFT's wrapping of the whole."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model


def assemble(
    base: Path, dtype: torch.dtype | None, bits: int | None, adapters: Sequence[Adapter], trust_remote_code: bool
) -> ModelParts:
    """Finds the parts of a base with adapters.

    Args:
        base: The model's folder, in any layout.
        dtype: That training computed with; None: the base is not rounded.
        bits: 4 if the base was in 4 bits.
        adapters: From `read_adapter`.
        trust_remote_code: Whether the model's own Python code may run.

    Raises:
        OSError, ValueError: if parts are missing or do not go together.
    """
    from transformers import GenerationConfig

    stored = open_weights(base)
    config = read_config(base, stored, trust_remote_code)
    rows = {rows for adapter in adapters if (rows := vocabulary_rows(adapter.tensors))}
    if len(rows) == 1:
        config.get_text_config().vocab_size = rows.pop()  # The adapter was trained with another vocabulary.
    model = make_skeleton(config, dtype or torch.float32, trust_remote_code)
    is_text = is_text_part(base, model)
    files, fused = model_names(model, stored)
    if resolve_ties(model.all_tied_weights_keys, files, stored):
        config.tie_word_embeddings = False
        model = make_skeleton(config, dtype or torch.float32, trust_remote_code)
    if (base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base)
    weights = {name: stored[file_name] for name, file_name in files.items()}
    weights |= {name: join_lazy(name, parts, stored, model) for name, parts in fused.items()}
    weights = {name: cast_lazy(one, dtype) for name, one in weights.items()}
    if bits:
        quantised = quantised_parameters(config, trust_remote_code)
        weights |= {name: nf4_values(weights[name], turned) for name, turned in quantised.items()}
    ties, shells = dict(model.all_tied_weights_keys), model.state_dict()
    modules_to_save = {}
    if adapters:
        model = add_adapters(model, adapters)
        for name, parameter in model.named_parameters():
            plain = plain_name(name)
            if plain in shells and not parameter.is_meta:
                if ".modules_to_save." in name:
                    modules_to_save[plain] = parameter  # Beside the base's, to which another one may be tied.
                else:
                    # In its place, such as the embedding of a larger vocabulary, or a bias.
                    weights[plain] = LazyTensor(tuple(parameter.shape), parameter.dtype, partial(_copy_of, parameter))
    # A base's tensor that is not used may have another shape.
    unused = modules_to_save.keys() - {source for target, source in ties.items() if target not in modules_to_save}
    check_shapes(shells, {name: one for name, one in weights.items() if name not in unused})
    for name, buffer in model.named_buffers():
        if plain_name(name) in weights:
            buffer.copy_(weights[plain_name(name)].read())
    used = {*files.values(), *(part for parts in fused.values() for part in parts.sources), *shells}
    others = {name: one for name, one in stored.items() if name not in used} if is_text else {}
    return ModelParts(model, weights, modules_to_save, ties, files, fused, others)


def is_text_part(base: Path, model: torch.nn.Module) -> bool:
    """Whether a model is the text's part of what is in a folder, beside parts for images or sound."""
    file = base / "config.json"
    saved = read_json(file) if file.is_file() else {}  # Meta's own folders have none.
    return "text_config" in saved and [type(model).__name__] != saved.get("architectures")


def _copy_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.data.clone()  # As from a file: who reads it may change it.


def join_lazy(name: str, parts: Fused, stored: Mapping[str, LazyTensor], model: torch.nn.Module) -> LazyTensor:
    """A parameter that several tensors of the files are put together to."""
    shells = [torch.empty(stored[part].shape, dtype=stored[part].dtype, device="meta") for part in parts.sources]
    shell = parts.join(name, shells, model)

    def read() -> torch.Tensor:
        return parts.join(name, [stored[part].read() for part in parts.sources], model)

    return LazyTensor(tuple(shell.shape), shell.dtype, read)


def merged_weights(trained: ModelParts, dtype: torch.dtype, device: str) -> dict[str, LazyTensor]:
    """Finds what the plain model's tensors become, under the names and in the order of the base's files.

    Args:
        trained: The model in parts. Its adapters go to fp32 and to `device`, and are used when tensors are read.
        dtype: Of the result; sums are made in fp32.
        device: Where sums are made.

    Returns:
        Name in files -> merged tensor. Of tied ones the second is left out unless training has parted them.
    """
    layers = adapted_layers(trained.model)
    trained = trained._replace(weights=read_ahead(trained.weights))
    for parameter in trained.model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device, torch.float32)

    def read(name: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        if owner in layers:
            leaves = [key for key, _ in layers[owner].get_base_layer().named_parameters()]
            parts = {key: trained.find(f"{owner}.{key}").read().to(device, torch.float32) for key in leaves}
            tensor = merge_into(layers[owner], leaf, parts)
        elif name in trained.modules_to_save:
            tensor = trained.modules_to_save[name].data
        else:
            tensor = trained.find(name).read()
        return checked(name, tensor.to(dtype).cpu() if tensor.is_floating_point() else tensor)

    result = {}
    for name in dict.fromkeys([*trained.weights, *sorted(untied(trained, layers))]):
        stored = trained.find(name)
        kept = dtype if stored.dtype.is_floating_point else stored.dtype
        shape = tuple(trained.modules_to_save[name].shape) if name in trained.modules_to_save else stored.shape
        merged = LazyTensor(shape, kept, partial(read, name))
        if name in trained.fused:
            result |= split_lazy(name, merged, trained)
        else:
            result[trained.files.get(name, name)] = merged
    return result | {name: cast_lazy(one, dtype) for name, one in trained.others.items()}


def untied(trained: ModelParts, layers: Mapping[str, torch.nn.Module]) -> set[str]:
    """Of tied parameters those that are no longer what the other one is, since an adapter changes one of them.

    An adapter may hold both, and the same values for both; and PEFT ties the rows of single tokens.
    """
    saved = trained.modules_to_save

    def tied(target: str, source: str) -> bool:
        if {target, source} <= saved.keys():
            return torch.equal(saved[target], saved[source])
        owners = [layers[owner] for name in (target, source) if (owner := name.rpartition(".")[0]) in layers]
        return any(getattr(owner, "tied_adapter", None) in owners for owner in owners)

    changed = set(trained.modules_to_save) | {
        name for pair in trained.ties.items() for name in pair if name.rpartition(".")[0] in layers
    }
    pairs = ((target, source) for target, source in trained.ties.items() if {target, source} & changed)
    return {target for target, source in pairs if not tied(target, source)}


def split_lazy(name: str, merged: LazyTensor, trained: ModelParts) -> dict[str, LazyTensor]:
    """Takes a merged parameter apart into the tensors of the files that it was made of.

    Raises:
        ValueError: if it cannot be.
    """
    from transformers.core_model_loading import revert_weight_conversion

    @lru_cache(maxsize=1)
    def parts() -> dict[str, torch.Tensor]:
        return revert_weight_conversion(trained.plain, {name: merged.read()})

    def read(source: str, last: bool) -> torch.Tensor:
        tensor = parts()[source].contiguous()
        if last:
            parts.cache_clear()
        return tensor

    shell, sources = torch.empty(merged.shape, dtype=merged.dtype, device="meta"), trained.fused[name].sources
    shells = revert_weight_conversion(trained.plain, {name: shell})
    if set(shells) != set(sources):
        raise ValueError(f"{name} cannot be written as the tensors that it was made of.")
    return {
        source: LazyTensor(tuple(shells[source].shape), merged.dtype, partial(read, source, source == sources[-1]))
        for source in sources
    }


def checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Passes a tensor on if all its numbers are finite.

    Raises:
        ValueError: if one is not.
    """
    # The smallest and the largest tell as much as a look at each, in a tenth of the time.
    if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite, or that {tensor.dtype} cannot hold.")
    return tensor


class _Values(Mapping[str, torch.Tensor]):
    """All parameters of a skeleton by their full names, for accelerate's hooks."""

    def __init__(self, trained: ModelParts, dtype: torch.dtype) -> None:
        self.trained, self.dtype = trained, dtype
        named = trained.model.named_parameters(remove_duplicate=False)
        self.real = {name: parameter.data for name, parameter in named if not parameter.is_meta}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.real:
            return self.real[name]
        return cast_lazy(self.trained.find(plain_name(name)), self.dtype).read()

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.trained.model.named_parameters())

    def __len__(self) -> int:
        return sum(1 for _ in self)


@contextmanager
def offloaded(trained: ModelParts, dtype: torch.dtype, device: str) -> Iterator[torch.nn.Module]:
    """Runs a model with one layer at a time in memory (accelerate's offloading).

    Args:
        trained: The model in parts.
        dtype: To compute with.
        device: Where to.
    """
    from accelerate.hooks import attach_align_device_hook, remove_hook_from_module

    for parameter in trained.model.parameters():
        parameter.data = parameter.data.to(dtype)
    attach_align_device_hook(
        trained.model, device, offload=True, weights_map=_Values(trained, dtype), preload_module_classes=WRAPPERS
    )
    try:
        yield trained.model
    finally:
        for module in trained.model.modules():
            if "_hf_hook" in vars(module):  # PEFT's wrappers pass questions for attributes on to what they wrap.
                remove_hook_from_module(module)


def materialize(trained: ModelParts, dtype: torch.dtype) -> torch.nn.Module:
    """Loads all weights into the model; adapters stay unmerged, as in training."""
    values, shared = _Values(trained, dtype), {}
    for name, parameter in list(trained.model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        plain = plain_name(name)
        if parameter.is_meta:
            plain = trained.ties.get(plain, plain)
            if plain not in shared:
                shared[plain] = torch.nn.Parameter(values[name], requires_grad=False)
            setattr(trained.model.get_submodule(owner), leaf, shared[plain])
        else:
            parameter.data = parameter.data.to(dtype)
    return trained.model
