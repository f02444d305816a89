"""A finished model's folder: weights shard by shard, and all that is needed to use them."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from utils.adapters import adapted
from utils.data import Chat
from utils.files import shown
from utils.generate import end_ids
from utils.merging import Trained, merged_weights, parted_ties
from utils.model import DTYPES, GIB
from utils.weights import write_weights


def write_model(
    trained: Trained, base: Path, chat: Chat, dtype: str, max_shard_size: str, device: str, folder: Path
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
    generation = copy.deepcopy(model.generation_config)
    # The run's template ends an answer with `stop_id`: who generates has to stop there, whatever the base's files say.
    generation.eos_token_id = end_ids(generation, chat.stop_id)
    generation.do_sample = generation.do_sample or any((generation.temperature, generation.top_p, generation.top_k))
    generation.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    for file in base.glob("*"):
        # Code that the configuration names, licences and the like; weights, tokenizer and configuration are written.
        kept = file.suffix == ".py" or file.name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY", "GEMMA_TERMS"))
        if kept and file.is_file():
            shutil.copy(file, folder)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # Some are written for their owner alone, but a server may be another user.


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
        kind: As of `utils.gguf_file.write_gguf`.
        name: The model's.
        system_prompt: What it was trained with, if anything.

    Raises:
        ValueError: if llama.cpp cannot use this model as transformers does. Where Ollama cannot, no Modelfile is
            written.
    """
    from transformers import GenerationConfig

    from utils.gguf_file import write_gguf
    from utils.gguf_tokenizer import modelfile

    file = f"{name}-{kind}.gguf"
    write_gguf(folder, chat, kind, name, folder / file)
    try:
        text = modelfile(chat, file, system_prompt, GenerationConfig.from_pretrained(folder))
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    except ValueError as error:
        print(f"No Modelfile for Ollama: {error} llama.cpp itself uses the template in the GGUF file.")


def check_room(trained: Trained, dtype: str, gguf: str | None, target: Path) -> None:
    """Makes sure that a disk has the room for a model.

    Raises:
        SystemExit: if it has not.
    """
    parted = [trained.find(name) for name in parted_ties(trained, adapted(trained.model))]
    numbers = sum(torch.Size(stored.shape).numel() for stored in [*trained.weights.values(), *parted])
    place = next(folder for folder in target.parents if folder.is_dir())
    size_bytes = DTYPES[dtype].itemsize + (2 if gguf else 0)
    needed, free = numbers * size_bytes * 1.01, shutil.disk_usage(place).free
    if free < needed:
        raise SystemExit(
            f"The model needs {needed / GIB:.2f} GiB, {shown(place)} has {free / GIB:.2f} GiB free. Make room."
        )
