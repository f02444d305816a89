"""Talks to a finished model in the terminal.

    python chat.py --model output_hf/BiliComments                                  # a conversation
    python chat.py --model output_hf/BiliComments --prompt "今天吃什么？"           # one question
    python chat.py --model output_hf/BiliComments --title 标题 --desc 简介 --parent 评论   # a comment, as in training
    python chat.py --model model/google/gemma-3-270m-from-q4 --completion "今天天气"      # plain text, for base models

In a conversation, Ctrl-C ends a reply, RESET starts anew and EXIT (or Ctrl-D) ends it.
"""

import argparse
import json
import math
import os
import sys
from contextlib import closing
from pathlib import Path
from textwrap import shorten
from typing import Any

from utils.data import SYSTEM_PROMPT, DataError, comment_prompt
from utils.files import from_root, shown


def readable(text: str) -> str:
    """Replaces what is no UTF-8 in an argument, which tokenizers do not take."""
    return os.fsencode(text).decode(errors="replace")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description="Talk to a finished model in the terminal.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a model, such as output_hf/BiliComments")
    parser.add_argument("--system", type=readable, help="system prompt (default: the one in the model's training data)")
    parser.add_argument("--prompt", type=readable, help="answer this question and end")
    parser.add_argument("--completion", type=readable, help="write on from this text, without a chat template, and end")
    parser.add_argument("--title", type=readable, help="write a comment under a video with this title, and end")
    parser.add_argument("--desc", type=readable, default="", help="the video's description")
    parser.add_argument("--parent", type=readable, default="", help="the comment to answer")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest reply")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_p", type=float, default=0.95, help="choose among the likeliest tokens of this weight")
    parser.add_argument("--seed", type=int, help="for the same replies again")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    return parser


def system_messages(model: Path, system: str | None, default: str) -> list[dict[str, str]]:
    """The system message to start with, if any.

    Args:
        model: A folder; its run.json knows what the model was trained with.
        system: What was asked for, if anything.
        default: For models that were not trained here.
    """
    if system is None:
        record = model / "run.json"
        trained = json.loads(record.read_text(encoding="utf-8"))["data"] if record.is_file() else {}
        system = trained.get("system_prompt", default)
    return [{"role": "system", "content": system}] if system.strip() else []


def main(args: argparse.Namespace) -> None:
    """Loads the model and answers."""
    path = from_root(args.model)
    asked = [name for name in ("prompt", "completion", "title") if getattr(args, name) is not None]
    if len(asked) > 1:
        raise SystemExit(f"Got --{' and --'.join(asked)}, expected one of them or none.")
    if (args.desc or args.parent) and args.title is None:
        raise SystemExit("--desc and --parent belong to a video: give its --title as well.")
    for name in asked:
        if not getattr(args, name).strip():
            raise SystemExit(f"--{name}: got an empty text.")
    for name, fits, expected in (
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= args.temperature < math.inf, "a number from 0"),
        ("top_p", 0 < args.top_p <= 1, "more than 0 but not more than 1"),
        ("seed", args.seed is None or 0 <= args.seed < 2**64, "from 0 to 2^64 - 1"),
    ):
        if not fits:
            raise SystemExit(f"--{name}: got {getattr(args, name)}, expected {expected}.")
    if not (path / "config.json").is_file():
        raise SystemExit(
            f"No model at {shown(path)} (expected a folder with config.json and weights).\n"
            "Convert a training checkpoint with convert_model.py, or fetch a model with download_pt.py."
        )

    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    from utils.generate import load_finished, stream

    logging.disable_progress_bar()
    if args.seed is not None:
        torch.manual_seed(args.seed)
    try:
        model, chat = load_finished(path, args.trust_remote_code)
    except DataError as error:  # The chat template is not one that can be used.
        raise SystemExit(f"{shown(path)}: {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise SystemExit(
            f"{shown(path)} cannot be loaded: {shorten(str(error), 200, placeholder=' …')}\n"
            "Expected config.json, weights and a tokenizer, all of them whole. Convert the training checkpoint again "
            "with convert_model.py, or fetch the model again with download_pt.py. A model with Python code of its own "
            "needs --trust_remote_code."
        ) from error
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}

    def say(input_ids: list[int]) -> str:
        pieces = []
        reply = stream(model, chat.tokenizer, input_ids, args.max_new_tokens, chat.stop_id, **sampling)
        with closing(reply):
            try:
                for piece in reply:
                    print(piece, end="", flush=True)
                    pieces.append(piece)
            except KeyboardInterrupt:
                if asked:
                    raise
        print()
        return "".join(pieces)

    system = system_messages(path, args.system, default=SYSTEM_PROMPT if args.title else "")
    if args.completion is not None:
        print(args.completion, end="", flush=True)
        say(chat.tokenizer.encode(args.completion))
    elif args.title is not None:
        question = comment_prompt(args.title, args.desc, args.parent)
        say(chat.prompt_ids([*system, {"role": "user", "content": question}]))
    elif args.prompt is not None:
        say(chat.prompt_ids([*system, {"role": "user", "content": args.prompt}]))
    else:
        converse(say, chat, system)


def converse(say: Any, chat: Any, system: list[dict[str, str]]) -> None:
    """Reads questions and answers them until EXIT or the end of the input."""
    sys.stdin.reconfigure(errors="replace")  # Tokenizers take nothing but UTF-8.
    if sys.stdin.isatty():
        print("Ctrl-C ends a reply, RESET starts anew, EXIT ends.")
    messages = [*system]
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "EXIT":
            return
        if text == "RESET":
            messages = [*system]
        elif text:
            question = {"role": "user", "content": text}
            if reply := say(chat.prompt_ids([*messages, question])).strip():
                messages += [question, {"role": "assistant", "content": reply}]


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except KeyboardInterrupt:
        print()
        sys.exit(130)  # As shells call a command that Ctrl-C ended.
