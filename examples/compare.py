"""Answers held-out comments with two models, side by side: base and tuned.

    python examples/compare.py --base model/Qwen/Qwen2.5-0.5B --tuned output_hf/BiliComments --data_dir data

Reads   both model folders and data_test.json in --data_dir.
Writes  nothing; prints each prompt with both replies and the real comment.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import ArgumentParser
from utils.data.held_out import read_held_out
from utils.data.records import Message, find_split
from utils.files import from_root, shown


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = ArgumentParser(
        description="Answer held-out comments with two models, side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--base", required=True, help="folder of the model before training")
    parser.add_argument("--tuned", required=True, help="folder of the model after training")
    parser.add_argument("--data_dir", default="data", help="folder with data_test.json")
    parser.add_argument("--number", type=int, default=5, help="comments to answer")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="longest reply")
    return parser


def choose(data_dir: Path, number: int) -> list[list[Message]]:
    """Takes conversations from data_test.json, spread over the videos.

    Raises:
        SystemExit: if there are none.
    """
    test_file = find_split(data_dir, "test")
    if test_file is None:
        raise SystemExit(f"No held-out data in {shown(data_dir)}. Make it with: python prepare_data.py")
    return [messages for group in read_held_out(test_file, number) for messages in group]


def main(args: argparse.Namespace) -> None:
    """Loads one model after the other and prints their replies."""
    if args.number < 1:
        raise SystemExit(f"--number: got {args.number}, expected 1 or more comments.")
    conversations = choose(from_root(args.data_dir), args.number)
    for name in ("base", "tuned"):
        if not (from_root(getattr(args, name)) / "config.json").is_file():
            raise SystemExit(f"--{name}: no model at {shown(from_root(getattr(args, name)))}.")

    from transformers.utils import logging

    from utils.serve.generate import load_for_inference, replies

    logging.disable_progress_bar()
    texts = []
    for path in (args.base, args.tuned):
        model, chat = load_for_inference(from_root(path))
        prompts = [chat.prompt_ids(messages[:-1]) for messages in conversations]
        texts.append(replies(model, chat, prompts, args.max_new_tokens))
    for messages, base, tuned in zip(conversations, *texts, strict=True):
        print(f"\n{messages[-2]['content']}")
        print(
            f"  base : {' '.join(base.split())}\n  tuned: {' '.join(tuned.split())}\n  real : {messages[-1]['content']}"
        )


if __name__ == "__main__":
    main(build_parser().parse_args())
