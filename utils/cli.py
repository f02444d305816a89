"""What every argparse script needs: booleans, dashes for underscores, sizes, progress bars, and how a script fails."""

import argparse
import difflib
import logging
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

GIB = 1024**3
# What transformers' trainer, TRL and LLaMA-Factory call an argument -> what it is called here, the first that there is.
CALLED_ELSEWHERE = {
    "adapter_name_or_path": "adapter",
    "base_model_name_or_path": "base_model org_model",
    "bf16": "precision",
    "cutoff_len": "max_tokens",
    "dataset": "data_dir data_path",
    "dataset_dir": "data_dir data_path",
    "dataset_name": "data_dir data_path",
    "deepspeed": "deepspeed_config",
    "do_eval": "test_mode",
    "do_predict": "test_mode",
    "do_train": "train_mode",
    "dpo_beta": "beta",
    "finetuning_type": "tuner",
    "fp16": "precision",
    "gradient_accumulation_steps": "grad_accum",
    "learning_rate": "lr",
    "load_in_4bit": "quant_bits bits",
    "lora_rank": "lora_r",
    "lora_target_modules": "lora_target",
    "loss_type": "loss",
    "lr_scheduler_type": "lr_scheduler",
    "max_eval_samples": "eval_samples",
    "max_length": "max_tokens max_model_len",
    "max_samples": "total max_steps",
    "max_seq_length": "max_tokens",
    "model_name_or_path": "model_name model student_model_name base_model",
    "num_train_epochs": "epochs",
    "overwrite_output_dir": "overwrite",
    "packing": "pack_tokens",
    "per_device_train_batch_size": "batch_size",
    "pref_beta": "beta",
    "pref_loss": "loss",
    "quantization_bit": "quant_bits bits",
    "report_to": "track",
    "resume_from_checkpoint": "resume",
    "target_modules": "lora_target",
    "template": "chat_template",
}


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with errors of two lines: what is wrong and what to give instead, without the whole usage."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Parses the command line; unknown arguments are errors."""
        args = sys.argv[1:] if args is None else args
        names = [text.partition("=")[0] for text in args if text.startswith("--")]
        options = [name for name in names if " " not in name]
        # Checked first: argparse would report a misspelt required argument as missing.
        wrong = [name for name in options if not any(known.startswith(name) for known in self._option_string_actions)]
        found, unknown = (None, wrong) if wrong else self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]}: there is no such argument.{self.suggestion(unknown[0])}")
        return found

    def suggestion(self, unknown: str) -> str:
        """A sentence with the known argument that an unknown one may stand for; "" if there is none."""
        names = {option.removeprefix("--"): option for option in self._option_string_actions if option[:2] == "--"}
        name = unknown.partition("=")[0].lstrip("-").replace("-", "_")
        near = [*CALLED_ELSEWHERE.get(name, "").split(), *difflib.get_close_matches(name, names)]
        known = next((names[other] for other in near if other in names), None)
        return f" Did you mean {known}?" if unknown[:1] == "-" and known else ""

    def error(self, message: str) -> NoReturn:
        """Prints an error and where to find help, and exits with 2."""
        self.exit(2, f"{message}\nAll arguments: python {sys.argv[0]} --help\n")


def boolean(text: str) -> bool:
    """Reads True, False, 1 or 0 from the command line (argparse's `bool` takes every text for true)."""
    values = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
    if text not in values:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected True, False, 1 or 0")
    return values[text]


def dashes_to_underscores(arguments: Sequence[str]) -> list[str]:
    """Lets dashes in the names of options stand for underscores; values are left alone."""
    name = re.compile(r"--[\w-]+(?==|\Z)")
    return [name.sub(lambda found: "--" + found[0][2:].replace("-", "_"), text, count=1)
            if name.match(text) else text for text in arguments]  # fmt: skip


def shard_size(text: str) -> str:
    """Parses the size of a file, such as 5GB.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size such as 5GB or 500MB")
    return text


def parse_columns(text: str, known: Sequence[str], may_lack: bool = False) -> dict[str, str]:
    """Parses which fields of somebody's files are meant, such as user=question,assistant=answer.

    Args:
        text: From the command line. A comma within a field's name is written \\,.
        known: The names that may stand on the left.
        may_lack: Whether nothing on the right means that there is no such field.

    Returns:
        What a field is called here -> what it is called there, "" for none.

    Raises:
        argparse.ArgumentTypeError: if it is something else.
    """
    found: dict[str, str] = {}
    if re.search(rf"，\s*({'|'.join(known)})\s*[=＝]", text):
        raise argparse.ArgumentTypeError(f"got {text!r} with '，', expected ',' between the fields")
    for pair in re.split(r"(?<!\\),", text):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not equals or ours not in known or ours in found or not (theirs or may_lack):
            raise argparse.ArgumentTypeError(
                f"got {pair.strip()!r}, expected NAME=FIELD, each NAME once, with commas between; as NAME "
                f"{', '.join(known)}. A comma within a field's name is written \\,"
            )
        found[ours] = theirs.replace("\\,", ",")
    return found


def add_columns_argument(parser: Any, roles: Sequence[str] = ("user", "assistant")) -> None:
    """Adds --columns, for records whose fields are not known by their names.

    Args:
        parser: The script's, or a group of its arguments.
        roles: Whose fields have to be named; the system prompt's may be.
    """
    example = ",".join(f"{role}=FIELD" for role in roles)

    def columns(text: str) -> dict[str, str]:
        found = parse_columns(text, [*roles, "system"])
        if missing := [role for role in roles if role not in found]:
            raise argparse.ArgumentTypeError(f"got {text!r} without {' and '.join(missing)}, expected {example}")
        if twice := [field for field, times in Counter(found.values()).items() if times > 1]:
            raise argparse.ArgumentTypeError(f"got {text!r} with {twice[0]!r} twice, expected a field for each")
        return found

    what = f"names of the records' fields, where they are not understood by themselves: {example}[,system=FIELD]"
    parser.add_argument("--columns", type=columns, metavar="ROLE=FIELD,...", help=what)


# To be set before torch is imported: it takes memory in large pages then, and gives it back at once.
LARGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")


def add_write_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments shared by the scripts that write converted models."""
    add = parser.add_argument
    add("--max_shard_size", type=shard_size, default="5GB", help="the largest file of weights")
    gguf = "also write a GGUF file for llama.cpp, and the Modelfile with which Ollama takes it"
    add("--gguf", choices=["f16", "bf16", "q8_0"], help=gguf)
    where = "where adapters are merged and models checked; auto: a card if there is one"
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help=where)
    add("--trust_remote_code", type=boolean, default=False, help="True: run Python code that comes with the model")


def fail(message: str) -> None:
    """Ends all ranks with exit code 1; one of them says why."""
    raise SystemExit(message if int(os.environ.get("RANK", 0)) == 0 else 1)


class _Lines:
    """An output for tqdm where there is no terminal: each refresh of a bar becomes a line."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(things: Iterable[Any] | None, what: str, unit: str, shows: bool = True, **options: Any) -> Any:
    """Shows progress: tqdm's bar in a terminal, elsewhere a line every half minute.

    Args:
        things: To go through; None if the caller says how far it is.
        what: Is being done.
        unit: Of the things.
        shows: Whether there is a bar at all.
        options: Of tqdm.
    """
    from tqdm import tqdm

    if not sys.stderr.isatty():
        options = {"file": _Lines(), "mininterval": 30, "maxinterval": 60, "delay": 30, "ncols": 100} | options
    return tqdm(things, what, disable=not shows, unit=unit, **options)


def quiet_libraries() -> None:
    """Silences the libraries' deprecation warnings and progress bars, on which users cannot act."""
    warnings.simplefilter("ignore", FutureWarning)
    found_no_card = "Setting accelerator to CPU"
    logging.getLogger("DeepSpeed").addFilter(lambda record: found_no_card not in record.getMessage())
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
