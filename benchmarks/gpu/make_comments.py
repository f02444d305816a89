"""Makes comments.npz, the real comments that the kit trains on: token ids of the project's own examples.

    python prepare_data.py --data_dir examples --output_dir benchmarks/output/examples
    python benchmarks/gpu/make_comments.py --data_dir benchmarks/output/examples --model model/Qwen/Qwen2.5-0.5B

A machine that is lent for minutes has no tokenizer and no network, so the ids travel with the repository.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.files import atomic_write, from_root, shown


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data_dir", required=True, help="folder with data_train.json and data_test.json")
    parser.add_argument("--model", required=True, help="folder with the tokenizer")
    parser.add_argument("--output", default="benchmarks/gpu/comments.npz", help="file to write")
    return parser


def main(args: argparse.Namespace) -> None:
    """Renders the comments as training does, and writes them."""
    import numpy as np

    from utils.data.chat import make_chat
    from utils.data.records import find_split
    from utils.data.samples import load_samples
    from utils.data.tokenizer import load_tokenizer

    chat = make_chat(load_tokenizer(from_root(args.model)))
    parts = []
    with tempfile.TemporaryDirectory() as cache:
        for split in ("train", "test"):
            samples = load_samples(find_split(from_root(args.data_dir), split), chat, 1024, Path(cache)).samples
            parts.append((samples.tokens.copy(), samples.supervised.copy(), samples.lengths, samples.group))
    tokens, supervised, lengths, group = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    video = np.unique(group, return_inverse=True)[1]
    target = from_root(args.output)
    with atomic_write(target) as temporary, temporary.open("wb") as file:
        arrays = {"lengths": lengths.astype(np.int32), "video": video.astype(np.int32)}
        np.savez_compressed(file, tokens=tokens.astype(np.int32), supervised=supervised, **arrays)
    print(f"{shown(target)}: {len(lengths)} comments, {len(tokens)} tokens, {supervised.sum()} of them learnt.")


if __name__ == "__main__":
    main(build_parser().parse_args())
