"""Gives a model a vocabulary for Chinese: the same text in fewer tokens, and no token of any other text is changed.

    python merge_tokenizer.py --llama_tokenizer_dir model/mistralai/Mistral-7B-v0.1 --chinese_sp_model_file zh.model
    python merge_tokenizer.py --llama_tokenizer_dir model/Qwen/Qwen2.5-0.5B --train_on text/ --vocab_size 20000

New tokens come from a SentencePiece model of Chinese, or are learnt from text: SentencePiece pieces for tokenizers of
that kind (Llama 2, Mistral 7B, Gemma), further merges for byte-level ones (Qwen, Llama 3, newer Mistral). They come
behind all that there are, in ids and in the order of merges, and each of them is Chinese and nothing else: other text
keeps its token ids exactly. (Scripts that add all pieces of a Chinese model, with a score of 0, make `▁w eat her` of
`▁weather`.) Pieces that the merged tokenizer can never come to are left out.

A new row of the embedding, and of the output head, is the mean of the rows of the tokens that the text took before, so
that training does not start from nothing. They have to be trained: bash deepspeed_pt/run.sh --data text/
--train_embeddings new_rows (or True: the whole tables; or run_full.sh: all weights).

Reads   <llama_tokenizer_dir>/, a model's folder, or a tokenizer's alone; <chinese_sp_model_file> or <train_on>.
Writes  <save_path>/: the same folder with the larger vocabulary, README.md and run.json.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from utils.cli import ArgumentParser, boolean, shard_size
from utils.files import (
    ROOT,
    atomic_write,
    check_target,
    exclusive_lock,
    explained,
    from_root,
    is_own,
    public_name,
    read_json,
    shown,
)

# What the first document that describes such a merge shows its tokens of.
SENTENCE = (
    "今天天气真好，可以去植物园秋游了。The weather is wonderful today, providing an ideal opportunity for a leisurely "
    "autumn stroll in the botanical garden."
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated.*.pth")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--llama_tokenizer_dir", required=True, help="folder of the model, such as model/<model_name>")
    add("--chinese_sp_model_file", help="SentencePiece model whose Chinese pieces are added")
    add("--train_on", nargs="+", default=[], metavar="PATH",
        help="text to learn new tokens from instead: files (.txt, or .json, .jsonl, .csv, .parquet with a field text; "
        "also with .gz) or folders of them")  # fmt: skip
    add("--vocab_size", type=int, default=20000, help="most tokens that are learnt")
    add("--only_cjk", type=boolean, default=True,
        help="False: add all pieces of the SentencePiece model; other text changes its tokens then")  # fmt: skip
    add("--init", choices=["mean", "average", "zeros"], default="mean",
        help="new rows: the mean of the rows of the tokens that the text took before, the average of all rows, or "
        "zeros")  # fmt: skip
    add("--save_path", help="folder of the new model (default: <llama_tokenizer_dir>-zh)")
    add("--max_shard_size", type=shard_size, default="5GB", help="the largest file of weights")
    add("--trust_remote_code", type=boolean, default=False, help="True: run Python code that comes with the model")
    return parser


def check_arguments(args: argparse.Namespace, base: Path, target: Path) -> None:
    """Checks the arguments before anything is read.

    Raises:
        SystemExit: naming what is wrong.
    """
    if not base.is_dir():
        raise SystemExit(
            f"--llama_tokenizer_dir: no folder {shown(base)}.\nFetch a model: python download_pt.py --model ORG/NAME"
        )
    if bool(args.chinese_sp_model_file) == bool(args.train_on):
        raise SystemExit("Expected either --chinese_sp_model_file FILE or --train_on PATH.")
    for path in filter(None, [args.chinese_sp_model_file, *args.train_on]):
        if not from_root(path).exists():
            flag = "--train_on" if args.train_on else "--chinese_sp_model_file"
            raise SystemExit(f"{flag}: no {shown(from_root(path))}.")
    if args.vocab_size < 1:
        raise SystemExit(f"--vocab_size: got {args.vocab_size}, expected 1 or more.")
    if not args.only_cjk and args.train_on:
        raise SystemExit("--only_cjk False: tokens that are learnt are Chinese. It goes with --chinese_sp_model_file.")
    check_target("--save_path", target)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


class Merged(NamedTuple):
    """A tokenizer before and after.

    Attributes:
        before: As it was.
        after: With the new tokens: in memory, not as it will be read from its files.
        first_id: Of the new tokens.
        old_ids: Of each new token, the tokens that its text took before.
        sp_model: The folder's SentencePiece model with the new pieces; None: it has none.
    """

    before: Any
    after: Any
    first_id: int
    old_ids: list[list[int]]
    sp_model: bytes | None


def load(base: Path, trust_remote_code: bool) -> Any:
    """Loads a folder's tokenizer.

    Raises:
        ValueError: if it is none that is known here.
    """
    from transformers import AutoTokenizer

    if not any((base / name).is_file() for name in (*TOKENIZER_FILES, "tokenizer_config.json")):
        raise ValueError("there is no tokenizer in it (tokenizer.json, or tokenizer.model).")
    if not any((base / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        from utils.weights.llama_pth import load_llama_tokenizer

        tokenizer = load_llama_tokenizer(base)
        tokenizer.chat_template = None
        return tokenizer
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise ValueError("its tokenizer is Python code of its own; known are those of the tokenizers package.")
    return tokenizer


def merge(args: argparse.Namespace, base: Path) -> Merged:
    """Makes the merged tokenizer.

    Raises:
        SystemExit: if it cannot be made.
    """
    from tokenizers import Tokenizer

    from utils.data import vocabulary
    from utils.data.documents import read_texts

    with explained(f"--llama_tokenizer_dir: {shown(base)} cannot be used"):
        before = load(base, args.trust_remote_code)
        backend = json.loads(before.backend_tokenizer.to_str())
        kind = vocabulary.kind_of(backend)
        vocabulary.check_added(backend)
    texts = (text.text for path in args.train_on for text in read_texts(from_root(path)))
    known = backend["model"]["vocab"]
    first_id = max([*before.get_vocab().values()]) + 1
    if kind == "byte-level" and args.chinese_sp_model_file:
        raise SystemExit(
            f"--chinese_sp_model_file: the tokenizer in {shown(base)} is a byte-level one, which has no SentencePiece "
            "pieces. Let it learn from text: --train_on PATH"
        )
    if args.train_on:
        with explained("--train_on cannot be learnt from"):
            if kind == "byte-level":
                found = vocabulary.learn_merges(backend, texts, args.vocab_size)
            else:
                model = vocabulary.train_sp_model(texts, args.vocab_size)
    else:
        file = from_root(args.chinese_sp_model_file)
        with explained(f"--chinese_sp_model_file: {shown(file)} cannot be used"):
            model = vocabulary.read_sp_model(file)
    if kind == "sentencepiece":
        new = vocabulary.pieces_of(model, before.get_vocab(), args.only_cjk)
        found = vocabulary.with_merges(new, known)
    extension = vocabulary.reachable(backend, found, first_id)
    if not extension.tokens:
        raise SystemExit("Nothing was added: this tokenizer has all of these tokens already.")
    count, lost = len(extension.tokens), len(found.tokens) - len(extension.tokens)
    left_out = f"; {lost:,} that it could never come to are left out" if lost else ""
    print(f"{count:,} new tokens: {first_id:,} -> {first_id + count:,}{left_out}.")
    old = before.backend_tokenizer.model
    old_ids = [[one.id for one in old.tokenize(token)] for token in extension.tokens]
    after = load(base, args.trust_remote_code)
    merged = vocabulary.merged_backend(backend, extension, first_id)
    after._tokenizer = Tokenizer.from_str(json.dumps(merged, ensure_ascii=False))
    sp_file, sp_model = base / "tokenizer.model", None
    if kind == "sentencepiece" and sp_file.is_file():
        with explained(f"--llama_tokenizer_dir: {shown(sp_file)} cannot be used"):
            sp_model = vocabulary.merged_sp_model(vocabulary.read_sp_model(sp_file), extension, before, first_id)
    return Merged(before, after, first_id, old_ids, sp_model)


# ---------------------------------------------------------------------------------------------------------------------
# The model


def new_rows(table: Any, old_ids: Sequence[Sequence[int]], init: str) -> Any:
    """The rows of new tokens.

    Args:
        table: (V, D), or (V,) of a bias.
        old_ids: Of each new token, those whose rows it begins from.
        init: "mean", "average" or "zeros".

    Returns:
        (N, D), or (N,).
    """
    import torch

    if init == "zeros":
        return table.new_zeros(len(old_ids), *table.shape[1:])
    if init == "average":
        return table.float().mean(0, keepdim=True).to(table.dtype).repeat(len(old_ids), *[1] * (table.ndim - 1))
    return torch.stack([table[list(ids)].float().mean(0) for ids in old_ids]).to(table.dtype)


def tables(base: Path, trust_remote_code: bool) -> tuple[dict[str, Any], set[str]]:
    """All tensors of a model, and the names of those that have a row for each token.

    Raises:
        OSError, ValueError: if it cannot be read, or has tables by token beside embedding and head.
    """
    if not (base / "config.json").is_file():
        raise ValueError(
            "it has no config.json. Meta's own files become such a folder with: python merge_qlora.py --base_model "
            f"{shown(base)} --save_path NEW"
        )
    from utils.weights.layouts import open_weights
    from utils.weights.skeleton import make_skeleton, model_names, read_config

    stored = open_weights(base)
    config = read_config(base, stored, trust_remote_code)
    model = make_skeleton(config, next(iter(stored.values())).dtype, trust_remote_code)
    files, _ = model_names(model, stored)
    own = {id(part) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
           for part in layer.parameters(recurse=False)}  # fmt: skip
    names = {name for name, part in model.named_parameters(remove_duplicate=False) if id(part) in own}
    rows = model.get_input_embeddings().weight.shape[0]
    if other := [name for name, part in model.named_parameters() if part.shape[:1] == (rows,) and name not in names]:
        raise ValueError(f"{other[0]} has a row for each token too, which is not supported.")
    return stored, {files[name] for name in names if name in files}


def write_weights(base: Path, merged: Merged, args: argparse.Namespace, folder: Path) -> int:
    """Writes the weights with new rows, and the configuration; returns how many rows there are now.

    Raises:
        OSError, ValueError: if the model cannot be used.
    """
    import torch

    from utils.weights import lazy

    stored, names = tables(base, args.trust_remote_code)
    end = merged.first_id + len(merged.old_ids)

    def read(name: str) -> torch.Tensor:
        table = stored[name].read()
        # Rows behind the tokens that there were are padding.
        wider = torch.cat([table, table.new_zeros(max(end - len(table), 0), *table.shape[1:])])
        wider[merged.first_id : end] = new_rows(table, merged.old_ids, args.init)
        return wider

    rows = {max(end, stored[name].shape[0]) for name in names}
    if len(rows) != 1:
        raise ValueError("embedding and head have different numbers of rows.")
    tensors = stored | {
        name: stored[name]._replace(shape=(*rows, *stored[name].shape[1:]), read=partial(read, name)) for name in names
    }
    lazy.write_weights(folder, tensors, args.max_shard_size)
    config = read_json(base / "config.json")
    nested = config.get("text_config")  # Of models for images, too. What it does not say is the class's default.
    for part in ([nested] if isinstance(nested, dict) else []) + [config] * ("vocab_size" in config or not nested):
        (part["vocab_size"],) = rows
    (folder / "config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return rows.pop()


def copy_others(base: Path, folder: Path) -> None:
    """Copies what is neither weights nor tokenizer: settings of generation, code, licences."""
    from utils.export.model_folder import WEIGHTS as ENDINGS

    written = (*TOKENIZER_FILES, "README.md", "run.json")
    for file in sorted(base.iterdir()):
        taken = file.name in written or file.name.endswith((*ENDINGS, ".index.json"))
        if file.is_file() and not taken and not (folder / file.name).exists() and is_own(base, file):
            shutil.copy(file, folder)


# ---------------------------------------------------------------------------------------------------------------------
# What came of it


def samples() -> dict[str, list[str]]:
    """Chinese and English text of this project, to count tokens of."""
    from utils.data import vocabulary

    comments = [
        row["content"] for file in sorted((ROOT / "examples/data/bili/json").glob("*comments*.json"))
        for row in json.loads(file.read_text(encoding="utf-8"))
    ]  # fmt: skip
    english = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return {
        "Chinese": [text for text in comments if text],
        "English": [line for line in english if line and not any(map(vocabulary.is_chinese, line))],
    }


def compare(before: Any, after: Any, only_cjk: bool) -> list[tuple[str, int, int, int]]:
    """Counts tokens before and after.

    Args:
        before: The tokenizer as it was.
        after: As it was read from the new folder.
        only_cjk: Whether text without Chinese has to have the tokens that it had.

    Returns:
        Language, bytes, tokens before, tokens after.

    Raises:
        ValueError: if the new tokenizer is not what it should be.
    """
    report = "Please report this."
    if {token: after.convert_tokens_to_ids(token) for token in before.get_added_vocab()} != before.get_added_vocab():
        raise ValueError(f"special tokens have other ids than before. {report}")
    if after.chat_template != before.chat_template:
        raise ValueError(f"the chat template is another one than before. {report}")
    rows = []
    for language, texts in samples().items():
        old, new = (tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (before, after))
        if language == "English" and only_cjk and old != new:
            raise ValueError(f"text without Chinese has other tokens than before. {report}")
        if before.batch_decode(old) != after.batch_decode(new):
            raise ValueError(f"texts do not come back as they were. {report}")
        counts = (sum(map(len, ids)) for ids in (old, new))
        rows.append((language, sum(len(text.encode()) for text in texts), *counts))
    return rows


def compare_library(before: Any, after: Any, old: Path, new: Path) -> None:
    """Holds tokenizer.json against tokenizer.model, on texts on which they agreed before.

    Raises:
        ValueError: if SentencePiece itself writes other tokens.
    """
    from sentencepiece import SentencePieceProcessor

    libraries = [SentencePieceProcessor(model_file=str(file)) for file in (old, new)]
    texts = [text.strip() for text in samples()["Chinese"]]
    written = [
        [tokenizer(texts, add_special_tokens=False)["input_ids"], library.encode(texts)]
        for tokenizer, library in zip((before, after), libraries, strict=True)
    ]
    agreed = [number for number, (one, two) in enumerate(zip(*written[0], strict=True)) if one == two]
    if any(written[1][0][number] != written[1][1][number] for number in agreed):
        raise ValueError("tokenizer.json and tokenizer.model write different tokens. Please report this.")


def card(name: str, base: Path, merged: Merged, counted: list[tuple[str, int, int, int]], made: str) -> str:
    """What was added, and what it is worth, for README.md."""
    import yaml
    from huggingface_hub import ModelCard

    rows = "\n".join(
        f"| {language} | {size / before:.2f} | {size / after:.2f} | {after / before - 1:+.1%} |"
        for language, size, before, after in counted
    )
    ids = [tokenizer.encode(SENTENCE, add_special_tokens=False) for tokenizer in merged[:2]]
    tokens = [
        " ".join(f"`{tokenizer.decode([id])}`" for id in own) for tokenizer, own in zip(merged[:2], ids, strict=True)
    ]
    facts: dict[str, Any] = {}
    if (base / "README.md").is_file():
        own = ModelCard.load(base / "README.md").data.to_dict()
        facts = {key: own[key] for key in ("license", "license_name", "license_link", "language") if key in own}
    head = facts | {"library_name": "transformers", "tags": ["llm-train-playground"]}
    return f"""---
{yaml.safe_dump(head, allow_unicode=True, sort_keys=False)}---
# {name}

{public_name(base)} with {len(merged.old_ids):,} more tokens for Chinese, from id {merged.first_id} on, by
llm-train-playground. {made} All other weights are unchanged. **The new rows
have to be trained before it is of use** (deepspeed_pt/run.sh --train_embeddings new_rows).

| text | bytes a token before | now | tokens |
|---|---|---|---|
{rows}

Before ({len(ids[0])} tokens): {tokens[0]}

Now ({len(ids[1])} tokens): {tokens[1]}
"""


ROWS = {
    "mean": "the mean of the rows of the tokens that its text took before",
    "average": "the average of all rows",
    "zeros": "zero",
}


def main(args: argparse.Namespace) -> None:
    """Merges, writes, compares."""
    base = from_root(args.llama_tokenizer_dir)
    target = from_root(args.save_path or f"{base}-zh")
    check_arguments(args, base, target)
    from utils.export.model_folder import check_links, write_record

    check_links(base)
    with exclusive_lock(target):
        merged = merge(args, base)
        file = args.chinese_sp_model_file
        source = f"pieces of {Path(file).name}" if file else "learnt from text"
        made = f"They are {source}; each of their rows is {ROWS[args.init]}."
        with atomic_write(target) as folder, explained(f"{shown(target)} cannot be made"):
            folder.mkdir()
            has_weights = any(file for name in WEIGHTS for file in base.glob(name))
            rows = write_weights(base, merged, args, folder) if has_weights else None
            merged.after.save_pretrained(folder)
            if merged.sp_model:
                (folder / "tokenizer.model").write_bytes(merged.sp_model)
            copy_others(base, folder)
            after = load(folder, args.trust_remote_code)
            counted = compare(merged.before, after, args.only_cjk)
            if merged.sp_model:
                compare_library(merged.before, after, base / "tokenizer.model", folder / "tokenizer.model")
            text = card(target.name, base, merged, counted, made)
            (folder / "README.md").write_text(text, encoding="utf-8")
            vocabulary = {"first_new_id": merged.first_id, "new_tokens": len(merged.old_ids), "made": made}
            write_record(folder, {"base_model": public_name(base), "vocabulary": vocabulary})
    print(text.rpartition("\n---\n")[2])
    print(f"{shown(target)} is ready" + (f": {rows:,} rows." if rows else ", without weights: there are none."))


if __name__ == "__main__":
    main(build_parser().parse_args())
