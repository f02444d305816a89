"""Talks to a finished model, or to a base model with an adapter, in the terminal.

    python chat.py --model output_hf/BiliComments                                  # a conversation
    python chat.py --model model/Qwen/Qwen2.5-3B --adapter deepspeed_ft/output/DS-Qwen/Qwen2.5-3B-BNB/24
    python chat.py --model output_hf/BiliComments --history talk.json              # it goes on where it ended
    python chat.py --model output_hf/BiliComments --prompt "今天吃什么？"           # one question
    python chat.py --model output_hf/BiliComments --title 标题 --desc 简介 --parent 评论   # a comment, as in training
    python chat.py --model output_hf/BiliComments --from_test data/data_test.json --count 5   # beside the real ones
    python chat.py --model model/google/gemma-3-270m-from-q4 --completion "今天天气"      # plain text, for base models

In a conversation, Ctrl-C ends a reply, RESET starts anew and EXIT (or Ctrl-D) ends it. Questions may be piped in, one a
line. Options are accepted with dashes too: --max-new-tokens 64.
"""

import argparse
import json
import math
import os
import re
import sys
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from utils.cli import ArgumentParser, add_columns_argument, boolean, dashes_to_underscores
from utils.data.held_out import parts_of, read_held_out
from utils.data.records import SYSTEM_PROMPT, DataError, Message, comment_prompt, to_messages
from utils.files import atomic_write, from_root, shown

# What keys such as the arrows send, and control characters, but for tabs and line breaks.
UNTYPED = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.)|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Control characters as pictures of them: a model shall not move the cursor, or write into the clipboard.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def readable(text: str) -> str:
    """Removes bytes that are no UTF-8 and control characters from a text."""
    return UNTYPED.sub("", text.encode(errors="surrogateescape").decode(errors="replace"))


def stop_word(text: str) -> str:
    r"""Reads a stop word, in which \n is a line break, \t a tab and \\ a backslash."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], readable(text))


def note(text: str) -> None:
    """Prints a note to stderr, apart from the answers."""
    sys.stdout.flush()
    print(f"({text})", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = ArgumentParser(
        description="Talk to a model in the terminal.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", "--base_model", "--base_moddel", required=True, metavar="DIR",
        help="folder of a model, such as output_hf/BiliComments")  # fmt: skip
    add("--adapter", "--qlora_model", metavar="DIR",
        help="adapter beside the model's layers: a folder in PEFT's format, or a checkpoint from here")  # fmt: skip
    add("--bits", type=int, choices=[4, 8], help="quantise the weights (default: 4 if the adapter was trained so)")
    add("--offload_folder", metavar="DIR", help="where weights go that fit neither the card nor the memory")
    add("--prompt_template", "--chat_template", metavar="FILE",
        help="Jinja chat template to use instead of the model's own")  # fmt: skip
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add("--system", type=readable, help="system prompt (default: the one in the model's training data)")
    asked = parser.add_argument_group("one answer, or several, in place of a conversation")
    asked.add_argument("--prompt", type=readable, help="answer this question and end")
    asked.add_argument("--completion", type=readable, help="write on from this text, without a chat template, and end")
    asked.add_argument("--title", type=readable, help="write a comment under a video with this title, and end")
    asked.add_argument("--desc", type=readable, default="", help="the video's description")
    asked.add_argument("--parent", type=readable, default="", help="the comment to answer")
    asked.add_argument("--from_test", metavar="FILE", help="answer held-out comments beside the real ones, and end")
    add_columns_argument(asked)
    asked.add_argument("--count", type=int, help="of --from_test: how many, spread over the videos (default: all)")
    talk = parser.add_argument_group("conversations")
    talk.add_argument("--history", metavar="FILE", help="JSON file that a conversation goes on from and is kept in")
    talk.add_argument("--is_multi_turn", type=boolean, default=True, help="0: every question alone")
    talk.add_argument("--bot_name", type=readable, default="", help="printed before answers")
    talk.add_argument("--no_streamer", action="store_true", help="print answers when they are whole")
    add = parser.add_argument_group("how answers are chosen").add_argument
    add("--max_new_tokens", type=int, default=256, help="longest reply")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    add("--top_k", type=int, help="choose among so many likeliest tokens; 0: all (default: the model's own setting)")
    add("--top_p", type=float, default=0.95, help="choose among the likeliest tokens of this weight")
    add("--repetition_penalty", type=float, help="above 1: repeat less (default: the model's own setting)")
    add("--seed", type=int, help="for the same replies again")
    add("--stop_words", type=stop_word, nargs="+", action="extend", default=[], metavar="WORD",
        help=r"end a reply before any of these; \n is a line break")  # fmt: skip
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses arguments. In the names of options, dashes are as good as underscores."""
    return build_parser().parse_args(dashes_to_underscores(arguments))


def check_arguments(args: argparse.Namespace) -> bool:
    """Checks the arguments before anything is loaded.

    Returns:
        Whether a conversation is asked for.

    Raises:
        SystemExit: naming what is wrong.
    """
    asked = [name for name in ("prompt", "completion", "title", "from_test") if getattr(args, name) is not None]
    if len(asked) > 1:
        raise SystemExit(f"Got --{' and --'.join(asked)}, expected one of them or none.")
    if (args.desc or args.parent) and args.title is None:
        raise SystemExit("--desc and --parent belong to a video: give its --title as well.")
    if args.count is not None and args.from_test is None:
        raise SystemExit("--count belongs to --from_test FILE.")
    if args.columns and args.from_test is None:
        raise SystemExit("--columns belongs to --from_test FILE.")
    if args.history and (not args.is_multi_turn or asked not in ([], ["prompt"])):
        raise SystemExit("--history belongs to a conversation: leave --is_multi_turn 0, or what asks for else, out.")
    for name in asked:
        if not getattr(args, name).strip():
            raise SystemExit(f"--{name}: got an empty text.")
    for name, fits, expected in (
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", args.temperature == 0 or 1e-3 <= args.temperature < math.inf, "0, or a number from 0.001"),
        ("top_k", args.top_k is None or args.top_k >= 0, "a number from 0"),
        ("top_p", 0 < args.top_p <= 1, "more than 0 but not more than 1"),
        ("repetition_penalty", args.repetition_penalty is None or 0 < args.repetition_penalty < math.inf,
         "more than 0"),
        ("seed", args.seed is None or 0 <= args.seed < 2**64, "from 0 to 2^64 - 1"),
        ("stop_words", all(args.stop_words), "texts that are not empty"),
        ("count", args.count is None or args.count >= 1, "at least 1"),
    ):  # fmt: skip
        if not fits:
            raise SystemExit(f"--{name}: got {getattr(args, name)}, expected {expected}.")
    if not (from_root(args.model) / "config.json").is_file():
        raise SystemExit(
            f"No model at {shown(from_root(args.model))} (expected a folder with config.json and weights).\n"
            "Convert a training checkpoint with convert_model.py, or fetch a model with download_pt.py. An adapter is "
            "named beside its base: --model BASE --adapter ADAPTER"
        )
    adapter = from_root(args.adapter) if args.adapter else None
    if adapter and not any((place / "adapter_config.json").is_file() for place in (adapter, adapter / "adapter")):
        near = ", ".join(sorted(shown(path.parents[1]) for path in adapter.glob("[!.]*/adapter/adapter_config.json")))
        raise SystemExit(
            f"--adapter: no adapter at {shown(adapter)} (expected a folder with adapter_config.json, or a checkpoint "
            f"such as deepspeed_ft/output/DS-<model_name>/24).{f' There are: {near}.' if near else ''}"
        )
    if args.from_test and not from_root(args.from_test).is_file():
        raise SystemExit(f"--from_test: no file at {shown(from_root(args.from_test))}. Make it: python prepare_data.py")
    if args.prompt_template and not from_root(args.prompt_template).is_file():
        raise SystemExit(
            f"--prompt_template: got {args.prompt_template!r}, which is no file. A template comes with its model and "
            "is used by itself: leave the option out, or name a file with a Jinja template."
        )
    return not asked


def load(args: argparse.Namespace) -> tuple[Any, Any, str | None]:
    """Loads the model.

    Returns:
        The model, its chat template, and the system prompt that it was trained with; None if unknown.

    Raises:
        SystemExit: if it cannot be loaded.
    """
    from jinja2 import TemplateError
    from safetensors import SafetensorError

    from utils.serve.generate import Tuning, load_for_inference, tuning_of

    names = (args.model, args.adapter, args.offload_folder)
    path, adapter, offload = (from_root(name) if name else None for name in names)
    template = from_root(args.prompt_template).read_text("utf-8", "replace") if args.prompt_template else ""
    try:
        tuning = tuning_of(adapter) if adapter else Tuning()
        if tuning.quant_bits and args.bits is None:
            note("the model is loaded in 4 bits, as the adapter was trained")
        trained = tuning_of(path).system_prompt if tuning.system_prompt is None else tuning.system_prompt
        adapters = {"default": adapter} if adapter else None
        model, chat = load_for_inference(path, args.trust_remote_code, adapters, args.bits, offload, template)
    except DataError as error:  # The chat template is not one that can be used.
        raise SystemExit(f"{shown(path)}: {error}") from error
    except TemplateError as error:
        raise SystemExit(f"{shown(path)}: the chat template cannot be read: {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        reason = shorten(str(error), 300, placeholder=" …")
        if adapter and shown(adapter) in str(error):
            raise SystemExit(f"--adapter: {reason}\nIs it whole, and was it trained on {shown(path)}?") from error
        raise SystemExit(
            f"{shown(path)} cannot be loaded: {reason}\n"
            "Expected config.json, weights and a tokenizer, all of them whole. Convert the training checkpoint again "
            "with convert_model.py, or fetch the model again with download_pt.py. A model with Python code of its own "
            "needs --trust_remote_code."
        ) from error
    return model, chat, trained


@dataclass(frozen=True)
class Replier:
    """A model with its sampling settings, which answers in the terminal."""

    model: Any
    chat: Any
    options: dict[str, Any]  # Of `utils.serve.generate.stream`.
    limit_tokens: int | None  # Of prompt and answer together.
    label: str  # Before answers.
    streamed: bool
    in_turns: bool  # Ctrl-C ends an answer and no more.

    @property
    def most_prompt_tokens(self) -> float:
        """The longest prompt."""
        return math.inf if self.limit_tokens is None else self.limit_tokens - self.options["max_new_tokens"]

    def prompt(self, messages: list[Message], left_out: int = 0) -> tuple[list[int], int]:
        """Renders a conversation that ends with a question; the oldest exchanges leave it until it fits.

        Args:
            messages: The conversation.
            left_out: How many exchanges did not fit when the question before was asked.

        Returns:
            Token ids, and how many exchanges are left out now.

        Raises:
            DataError: if there is no room for the question alone.
        """
        first = messages[0]["role"] == "system"
        system, talk = messages[:first], messages[first:]

        def ids(start: int) -> list[int]:
            return self.chat.prompt_ids([*system, *talk[2 * start :]])

        starts = range(left_out, len(talk) // 2)
        start = left_out + bisect_left(starts, True, key=lambda start: len(ids(start)) <= self.most_prompt_tokens)
        input_ids = self.checked(ids(start))
        if start > left_out:
            exchanges, fit, were = ("exchange", "fits", "was") if start == 1 else (f"{start} exchanges", "fit", "were")
            note(f"the oldest {exchanges} no longer {fit} into {self.limit_tokens:,} tokens and {were} left out")
        return input_ids, start

    def checked(self, input_ids: list[int]) -> list[int]:
        """Checks that an answer fits behind the prompt.

        Raises:
            DataError: if there is none.
        """
        if len(input_ids) > self.most_prompt_tokens:
            raise DataError(
                f"{len(input_ids):,} tokens are too many: the model reads and writes {self.limit_tokens:,} in all, and "
                f"{self.options['max_new_tokens']:,} are for the answer. Shorten the text, or lower --max_new_tokens"
            )
        return input_ids

    def say(self, input_ids: list[int]) -> str:
        """Prints an answer as it comes; returns it, or as much of it as there was before Ctrl-C.

        A thought before it is printed in parentheses, and is no part of it.
        """
        print(self.label, end="", flush=True)
        thoughts, pieces = [], []
        try:
            for thought, piece in self._pieces(input_ids):
                opens, closes = thought and not thoughts, piece and thoughts and not pieces
                thoughts += [thought] * bool(thought)  # Before it is shown: Ctrl-C may come then.
                pieces += [piece] * bool(piece)
                if self.streamed:
                    shown = "（" * bool(opens) + thought + "）\n" * bool(closes) + piece
                    print(shown.translate(PICTURES), end="", flush=True)
        except KeyboardInterrupt:
            if not self.in_turns:
                raise
        said = "".join(pieces)
        if not self.streamed:
            print((f"（{''.join(thoughts).strip()}）\n" * bool(thoughts) + said).translate(PICTURES), end="")
        print("", flush=True)
        return said

    def _pieces(self, input_ids: list[int]) -> Iterator[tuple[str, str]]:
        """What the model thinks, and says, as it comes."""
        from utils.serve.generate import stream

        folder = self.chat.folder()
        with closing(stream(self.model, self.chat.tokenizer, input_ids, **self.options)) as answer:
            for piece in answer:
                yield folder.add(piece) if folder else ("", piece)
        if folder:
            yield folder.add("", last=True)


class Conversation:
    """The messages so far, and the file that keeps them."""

    def __init__(self, replier: Replier, system: list[Message], messages: list[Message], file: Path | None) -> None:
        self.replier, self.system, self.file = replier, system, file
        self.messages = messages or [*system]
        self.left_out = 0  # The oldest exchanges, for which there is no room.

    def ask(self, text: str, remember: bool = True) -> None:
        """Answers a question; one without any answer is dropped from the conversation.

        Raises:
            DataError: if there is no room for the question.
        """
        question = {"role": "user", "content": text.strip()}
        input_ids, self.left_out = self.replier.prompt([*self.messages, question], self.left_out)
        reply = self.replier.say(input_ids).strip()
        if reply and remember:
            self.messages += [question, {"role": "assistant", "content": reply}]
            self._keep()

    def reset(self) -> None:
        """Clears the conversation."""
        self.messages, self.left_out = [*self.system], 0
        if self.file:
            self.file.unlink(missing_ok=True)

    def _keep(self) -> None:
        if self.file:
            try:
                with atomic_write(self.file) as temporary:
                    text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1)
                    temporary.write_text(f"{text}\n", encoding="utf-8")
            except OSError as error:
                note(f"the conversation could not be kept in {shown(self.file)}: {error.strerror}")


def read_history(path: Path) -> list[Message]:
    """Reads a conversation in any of the formats of training records, or a list of OpenAI's messages.

    Returns:
        Messages; none if there is no file yet, or an empty one.

    Raises:
        SystemExit: if it is no conversation. The file is not changed.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            return []
        record = json.loads(text)
        if isinstance(record, list) and all(isinstance(turn, dict) and "role" in turn for turn in record):
            record = {"messages": record}
        return to_messages(record)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"--history: {shown(path)} is no conversation that can go on: {error}\n"
            'Expected {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}. Mend it, '
            "move it away, or name another file."
        ) from error


def answer_tests(replier: Replier, groups: list[list[list[Message]]], system: str | None) -> None:
    """Answers held-out comments beside the real ones.

    Args:
        replier: Who answers.
        groups: From `read_held_out`.
        system: In place of the records' own system prompt.
    """
    before = None
    for messages in (messages for group in groups for messages in group):
        if system is not None:
            messages = [*as_messages(system), *(message for message in messages if message["role"] != "system")]
        shared, parent = parts_of(messages)
        if shared != before:
            print(f"\n== {shared.translate(PICTURES)}")
        before = shared
        print("\n" + "\n".join(filter(None, (parent, f"real: {messages[-1]['content']}"))).translate(PICTURES))
        try:
            replier.say(replier.prompt(messages[:-1])[0])
        except DataError as error:
            note(str(error))


def as_messages(system: str) -> list[Message]:
    """The system message to start with, if any."""
    return [{"role": "system", "content": system}] if system.strip() else []


def converse(conversation: Conversation, multi_turn: bool) -> None:
    """Reads questions and answers them until EXIT or the end of the input."""
    sys.stdin.reconfigure(errors="replace")  # Tokenizers take nothing but UTF-8.
    typing = sys.stdin.isatty()
    if typing:
        print("Ctrl-C ends a reply, RESET starts anew, EXIT ends.")
        if sys.stdout.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  # Keys to edit a question, and to find earlier ones.
    while True:
        try:
            text = UNTYPED.sub("", input("> " if typing else "")).strip()
        except (EOFError, KeyboardInterrupt):
            if typing:
                print()
            return
        if text == "EXIT":
            return
        try:
            if text == "RESET":
                conversation.reset()
            elif text:
                conversation.ask(text, remember=multi_turn)
        except DataError as error:
            note(str(error))
        except KeyboardInterrupt:  # Before the answer began.
            print()


def main(args: argparse.Namespace) -> None:
    """Loads the model and answers."""
    in_turns = check_arguments(args)
    sys.stdout.reconfigure(errors="replace")  # Terminals that know fewer letters than models.
    history = from_root(args.history) if args.history else None
    messages = read_history(history) if history else []
    tests = read_held_out(from_root(args.from_test), args.count, args.columns) if args.from_test else []

    import torch
    from transformers.utils import logging

    from utils.serve.generate import context_tokens

    logging.disable_progress_bar()
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model, chat, trained = load(args)
    if messages:
        note(f"goes on after {len(messages) // 2:,} exchanges in {shown(history)}")
    limit = context_tokens(model.config, chat.tokenizer)
    chat.tokenizer.model_max_length = sys.maxsize  # It would warn of what is looked after here.
    if limit is not None and args.max_new_tokens >= limit:
        raise SystemExit(
            f"--max_new_tokens: got {args.max_new_tokens}, expected fewer than the {limit:,} tokens that the model "
            "reads and writes in all."
        )
    options = {"max_new_tokens": args.max_new_tokens, "stop_id": chat.stop_id, "stop_words": args.stop_words}
    options |= {"do_sample": args.temperature > 0, "repetition_penalty": args.repetition_penalty}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    options = {name: value for name, value in options.items() if value is not None}
    name = args.bot_name or ("model" if args.from_test else "")
    label = f"{name}: " if name and not args.completion else ""
    replier = Replier(model, chat, options, limit, label, not args.no_streamer, in_turns)
    default = SYSTEM_PROMPT if args.title else ""
    system = as_messages(next(text for text in (args.system, trained, default) if text is not None))
    if messages and args.system is not None:
        messages = [*system, *(message for message in messages if message["role"] != "system")]
    conversation = Conversation(replier, system, messages, history)
    try:
        if args.completion:
            input_ids = replier.checked(chat.tokenizer.encode(args.completion))
            print(args.completion.translate(PICTURES), end="", flush=True)
            replier.say(input_ids)
        elif args.from_test:
            answer_tests(replier, tests, args.system)
        elif args.title:
            conversation.ask(comment_prompt(args.title, args.desc, args.parent))
        elif args.prompt:
            conversation.ask(args.prompt)
        else:
            converse(conversation, args.is_multi_turn)
    except DataError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    code = 0
    try:
        main(parse(sys.argv[1:]))
    except KeyboardInterrupt:
        print()
        code = 130  # As shells call a command that Ctrl-C ended.
    except BrokenPipeError:  # Who read the answers has gone; so does what Python would still write at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if threading.active_count() > 1:  # After a second Ctrl-C the model still computes, and Python would abort.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
