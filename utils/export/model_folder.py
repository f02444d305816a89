"""Writes a converted model's folder: weights shard by shard, and everything needed to use them."""

import copy
import json
import re
import shlex
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from utils.cli import GIB
from utils.data.chat import Chat
from utils.files import is_own, read_json, shown
from utils.serve.generate import end_ids
from utils.weights.adapters import adapted_layers
from utils.weights.lazy import write_weights
from utils.weights.loading import DTYPES
from utils.weights.merging import ModelParts, merged_weights, untied

TERMS = ("LICENSE", "NOTICE", "USE_POLICY", "GEMMA_TERMS")  # Beginnings of the names of licence files.
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")


def check_links(base: Path) -> None:
    """Makes sure that what is read of a base, and written again into a folder that may be published, is the base's.

    A link in a downloaded folder may lead to any file of the user's, and tokenizers and configurations keep what they
    do not know. Weights are numbers; licences and code are looked at where they are copied.

    Raises:
        SystemExit: naming a link that leads out of the folder.
    """
    for file in sorted(base.rglob("*")):
        read = file.suffix not in (*WEIGHTS, ".py") and not file.name.upper().startswith((*TERMS, "README"))
        if read and file.is_file() and not is_own(base, file):
            raise SystemExit(
                f"{shown(file)} is a link to a file outside of its folder, whose content could get into the new model. "
                f"If it belongs to the model, use a copy: cp -rL {shlex.quote(shown(base))} COPY"
            )


def code_files(base: Path) -> set[Path]:
    """The Python files that a base's configurations name, and those that these import from beside them."""
    from transformers.dynamic_module_utils import get_relative_import_files

    named: set[str] = set()
    for config in base.glob("*config.json"):
        with suppress(OSError, ValueError, AttributeError):  # What cannot be read names nothing.
            for value in read_json(config).get("auto_map", {}).values():
                classes = value if isinstance(value, list) else [value]  # Of tokenizers: the slow one and the fast one.
                named |= {name.rpartition(".")[0] for name in classes if isinstance(name, str) and "--" not in name}
    files = {base / f"{module}.py" for module in named if re.fullmatch(r"\w+", module)}
    for file in [file for file in files if file.is_file() and is_own(base, file)]:
        with suppress(OSError, ValueError):  # One that is missing will be missed when the model is loaded.
            files |= {Path(other) for other in get_relative_import_files(file) if Path(other).parent == base}
    return files


def write_model(
    trained: ModelParts, base: Path, chat: Chat, dtype: str, max_shard_size: str, device: str, folder: Path
) -> None:
    """Writes a model with all that is needed to use it; no more than a tensor or two of it is in memory.

    Args:
        trained: The model in parts.
        base: Folder of its base, for settings of generation, code and licences.
        chat: Its tokenizer and template.
        dtype: Of the written weights.
        max_shard_size: Of a file, such as "5GB".
        device: Where adapters are merged.
        folder: Where to; it is made.
    """
    tensors, model = merged_weights(trained, DTYPES[dtype], device), trained.plain
    folder.mkdir()
    write_weights(folder, tensors, max_shard_size)
    config = copy.deepcopy(model.config)
    config.dtype, config.architectures = DTYPES[dtype], [type(model).__name__]
    if any(trained.files.get(name, name) in tensors for name in trained.ties):
        config.tie_word_embeddings = False  # Training has parted them.
    config.save_pretrained(folder)
    if trained.others:
        write_whole_config(base, config, folder)
    generation = copy.deepcopy(model.generation_config)
    # The run's template ends an answer with `stop_id`: generation has to stop there, also if the base's files differ.
    generation.eos_token_id = end_ids(generation, chat.stop_id)
    generation.do_sample = generation.do_sample or any((generation.temperature, generation.top_p, generation.top_k))
    generation.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    # Weights, tokenizer and configuration are written; code that a configuration names and licences go along.
    for file in sorted({*code_files(base), *(file for file in base.iterdir() if file.name.upper().startswith(TERMS))}):
        if file.is_file() and is_own(base, file):
            shutil.copy(file, folder)
        elif file.is_symlink():
            print(f"{shown(file)} is not taken along: it is a link to a file outside of its folder.")
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # Some are written for their owner alone, but a server may be another user.


def write_whole_config(base: Path, text: Any, folder: Path) -> None:
    """Writes the settings of a model for images or sound whose text's part was trained, and of how it reads these."""
    config = AutoConfig.from_pretrained(base)
    config.text_config, config.dtype = text, text.dtype
    config.tie_word_embeddings = text.tie_word_embeddings
    config.save_pretrained(folder)
    for file in base.glob("*processor*.json"):
        if is_own(base, file):
            shutil.copy(file, folder)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes run.json, the last of a finished model's files: what it came from, and the other files' sizes in bytes."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    text = json.dumps(record | {"files": sizes}, ensure_ascii=False, indent=1)
    (folder / "run.json").write_text(text, encoding="utf-8")


def write_for_llama_cpp(folder: Path, chat: Chat, kind: str, name: str, system_prompt: str) -> None:
    """Adds a GGUF file and Ollama's Modelfile to a finished model's folder.

    Args:
        folder: The model's.
        chat: Its tokenizer and template.
        kind: As of `utils.export.gguf_file.write_gguf`.
        name: The model's.
        system_prompt: What it was trained with, if anything.

    Raises:
        ValueError: if llama.cpp cannot use this model as transformers does. Where Ollama cannot, no Modelfile is
            written.
    """
    from transformers import GenerationConfig

    from utils.export.gguf_file import write_gguf
    from utils.export.gguf_tokenizer import modelfile

    file = f"{name}-{kind}.gguf"
    write_gguf(folder, chat, kind, name, folder / file)
    try:
        text = modelfile(chat, file, system_prompt, GenerationConfig.from_pretrained(folder))
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    except ValueError as error:
        print(f"No Modelfile for Ollama: {error} llama.cpp itself uses the template in the GGUF file.")


def check_disk_space(trained: ModelParts, dtype: str, gguf: str | None, target: Path) -> None:
    """Checks the free disk space for a model.

    Raises:
        SystemExit: if it has not.
    """
    parted = [trained.find(name) for name in untied(trained, adapted_layers(trained.model))]
    numbers = sum(torch.Size(stored.shape).numel() for stored in [*trained.weights.values(), *parted])
    place = next(folder for folder in target.parents if folder.is_dir())
    size_bytes = DTYPES[dtype].itemsize + (2 if gguf else 0)
    needed, free = numbers * size_bytes * 1.01, shutil.disk_usage(place).free
    if free < needed:
        raise SystemExit(
            f"The model needs {needed / GIB:.2f} GiB, {shown(place)} has {free / GIB:.2f} GiB free. Make room."
        )
