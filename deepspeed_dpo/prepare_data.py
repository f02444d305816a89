"""Makes preference pairs: of two comments the one with more likes, or a real comment and a model's reply.

    python deepspeed_dpo/prepare_data.py
    python deepspeed_dpo/prepare_data.py --replies deepspeed_ft/output/DS-Qwen/Qwen2.5-0.5B/test_base*.jsonl

Reads   data_train.json and data_test.json of prepare_data.py in --data_dir, the crawled files below --crawl_dir for the
        likes, and in --replies files that train.py wrote in test mode (the real comment is preferred to the reply):
        test_base_train.jsonl of --test_model base --test_split train, and test_base.jsonl; or test_1... of a tuned one.
Writes into --output_dir
    data_train_pairs.jsonl, data_test_pairs.jsonl   {"id", "video_id", "source", "prompt", "chosen", "rejected"} a line
    report.json                                     what became of the comments, and how much longer chosen ones are

Two comments make a pair if they answer the same thing: the same comment, or the same video. A pair goes to training or
test with its video, as prepare_data.py has decided. Longer comments get more likes, and a model would learn that length
is what counts: so the two may not differ much in length, and as many chosen ones are the longer as the shorter.
"""

import argparse
import json
import math
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import ArgumentParser, add_columns_argument, boolean
from utils.data.crawl_files import find_files, kind_of, tables_or_problem
from utils.data.records import DataError, Message, find_split, id_of, read_records, to_messages
from utils.files import atomic_writes, from_root, shown, write_problem


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", default="data", help="folder with data_train.json and data_test.json of prepare_data.py")
    add_columns_argument(parser)
    add("--crawl_dir", help="folder of the crawled files with their likes (not given: --data_dir)")
    add("--output_dir", default="deepspeed_dpo/data", help="folder for the results")
    add("--replies", nargs="+", action="extend", default=[],
        help="files of train.py's test mode: real comments preferred to replies")  # fmt: skip
    add("--min_likes", type=int, default=5, help="likes that a chosen comment has at least")
    add("--margin", type=float, default=3.0, help="so many times the rejected comment's likes + 1 the chosen one has")
    add("--length_ratio", type=float, default=2.0, help="the longer one has at most so many times the characters")
    add("--balance_length", type=boolean, default=True, help="True: as many chosen ones are longer as shorter")
    return parser


class Comment:
    """A prepared comment: the conversation before it, and its text."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.id, self.video_id = str(record["id"]), str(record["video_id"])
        *self.prompt, answer = to_messages(record)
        self.text = answer["content"]


def read_likes(crawl_dir: Path) -> tuple[dict[str, int], int, list[str]]:
    """Reads how often crawled comments were liked.

    Returns:
        Likes by comment id (the most that any copy has), the number of comments without likes, and a sentence for
        each file or folder that cannot be read.
    """
    likes: dict[str, int] = {}
    without = 0
    unread: list[str] = []

    def unlisted(error: OSError) -> None:
        unread.append(f"{shown(error.filename)}: cannot be listed ({error.strerror})")

    for path in find_files(crawl_dir, unlisted):
        for table in tables_or_problem(path):
            if isinstance(table, str):
                unread.append(f"{shown(path)}: {table}")
                continue
            if kind_of(table[1]) != "comments":
                continue
            try:
                for record in table[2]:
                    if record is None:
                        continue
                    number = as_number(record.get("like_count"))
                    without += number is None
                    if number is not None:
                        id = str(record.get("comment_id")).removesuffix(".0")
                        likes[id] = max(number, likes.get(id, 0))
            except Exception as error:  # Whatever a torn sheet or database makes its parser raise.
                unread.append(f"{shown(path)}: read up to an error ({type(error).__name__}: {error})")
    return likes, without, unread


def as_number(value: Any) -> int | None:
    """Reads a count that may have become a text or a float on its way; None where there is none."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def by_prompt(comments: list[Comment]) -> list[list[Comment]]:
    """Groups the comments that answer the same thing under the same video."""
    groups: dict[str, list[Comment]] = defaultdict(list)
    for comment in comments:
        groups[json.dumps([comment.video_id, comment.prompt], ensure_ascii=False)].append(comment)
    return list(groups.values())


def nearest_in_length(pool: list[tuple[int, str, Comment]], text: str, ratio: float) -> int | None:
    """The place of the comment whose text is nearest to another one in length without being the same; ties: by id.

    Args:
        pool: (characters, id, comment), sorted.
        text: The other one.
        ratio: From `alike_in_length`; None is returned if no text is that near.
    """
    middle = bisect_left(pool, (len(text),))
    places = [bisect_left(pool, (pool[middle - 1][0],))] if middle else []
    places += [*islice((place for place in range(middle, len(pool)) if pool[place][2].text != text), 1)]
    # On each side the nearest one has the best ratio.
    places = [place for place in places if alike_in_length(text, pool[place][2].text, ratio)]
    return min(places, key=lambda place: (abs(pool[place][0] - len(text)), pool[place][1]), default=None)


def alike_in_length(one: str, two: str, ratio: float) -> bool:
    """Whether the longer of two texts has at most `ratio` times the characters of the other."""
    return max(len(one), len(two)) <= ratio * min(len(one), len(two))


def pairs_by_likes(
    groups: list[list[Comment]], likes: dict[str, int], min_likes: int, margin: float, length_ratio: float
) -> Iterator[dict[str, Any]]:
    """Pairs much liked comments with little liked ones that answer the same thing; each stands in one pair at most.

    The most liked comment chooses first, and takes of those that it beats the one nearest to it in length.
    """
    for group in groups:
        once = {comment.id: comment for comment in group if comment.id in likes}
        group = sorted(once.values(), key=lambda comment: (-likes[comment.id], comment.id))
        pool = sorted(((len(c.text), c.id, c) for c in group), key=lambda entry: entry[:2])
        used: set[str] = set()
        unbeaten = 0  # So many at the head of the group are not beaten; as likes fall, they leave the pool for good.
        for chosen in group:
            if likes[chosen.id] < min_likes:
                break
            while unbeaten < len(group) and likes[chosen.id] < margin * (likes[group[unbeaten].id] + 1):
                if group[unbeaten].id not in used:
                    pool.pop(bisect_left(pool, (len(group[unbeaten].text), group[unbeaten].id)))
                unbeaten += 1
            place = nearest_in_length(pool, chosen.text, length_ratio) if chosen.id not in used else None
            if place is None:
                continue
            rejected = pool.pop(place)[2]
            used.add(rejected.id)
            yield as_pair(chosen, chosen.text, rejected.text, "likes") | {
                "likes": [likes[chosen.id], likes[rejected.id]]
            }


def pairs_from_replies(
    comments: list[Comment], replies: dict[str, str], length_ratio: float
) -> Iterator[dict[str, Any]]:
    """Prefers real comments to what a model wrote in their place."""
    for comment in comments:
        reply = replies.get(comment.id, "").strip()
        if reply and reply != comment.text and alike_in_length(comment.text, reply, length_ratio):
            yield as_pair(comment, comment.text, reply, "replies")


def as_pair(comment: Comment, chosen: str, rejected: str, source: str) -> dict[str, Any]:
    """Writes a record that utils/data/pairs.py reads."""
    prompt: list[Message] = comment.prompt
    record = {"id": f"{source}-{comment.id}", "video_id": comment.video_id, "source": source, "prompt": prompt}
    return record | {"chosen": chosen, "rejected": rejected}


def log_ratio(pair: dict[str, Any]) -> float:
    """How much longer the chosen text is: log of the ratio of the characters."""
    return math.log(len(pair["chosen"]) / len(pair["rejected"]))


def balanced(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out the most unequal pairs of the larger side, until as many chosen texts are longer as are shorter."""
    longer = sorted((pair for pair in pairs if log_ratio(pair) > 0), key=log_ratio)
    shorter = sorted((pair for pair in pairs if log_ratio(pair) < 0), key=log_ratio, reverse=True)
    kept = min(len(longer), len(shorter))
    left_out = {pair["id"] for pair in longer[kept:] + shorter[kept:]}
    return [pair for pair in pairs if pair["id"] not in left_out]


def length_bias(pairs: list[dict[str, Any]]) -> dict[str, float]:
    """What the texts' lengths say of the preference.

    Returns:
        "pairs"; mean characters of "chosen" and "rejected" texts; the parts of the pairs in which the chosen text is
        "longer" and "shorter".
    """
    if not pairs:
        return {"pairs": 0}
    return {
        "pairs": len(pairs),
        "chosen": mean(len(pair["chosen"]) for pair in pairs),
        "rejected": mean(len(pair["rejected"]) for pair in pairs),
        "longer": mean(log_ratio(pair) > 0 for pair in pairs),
        "shorter": mean(log_ratio(pair) < 0 for pair in pairs),
    }


def describe(name: str, bias: dict[str, float]) -> str:
    """Writes a line of the length bias."""
    if not bias["pairs"]:
        return f"  {name}: no pairs"
    return (
        f"  {name}: {bias['pairs']:,} pairs; characters of a chosen text {bias['chosen']:.1f}, of a rejected one "
        f"{bias['rejected']:.1f}; the chosen one is longer in {bias['longer']:.0%}, shorter in {bias['shorter']:.0%}"
    )


def read_replies(files: list[str]) -> dict[str, str]:
    """Reads the replies of test mode by the id of the comment they stand for.

    Raises:
        SystemExit: if a file holds something else.
    """
    replies = {}
    for file in files:
        path = from_root(file)
        if not path.is_file():
            raise SystemExit(f"--replies: no file {shown(path)}. It comes from: deepspeed_ft/train.py --test_mode True")
        for row in read_records(path):
            if not isinstance(row, dict) or not {"id", "reply", "real"} <= row.keys():
                raise SystemExit(f"--replies: {shown(path)} is none that train.py --test_mode True writes: {row}")
            replies[str(row["id"])] = row["reply"]
    return replies


def read_comments(path: Path, columns: dict[str, str] | None) -> list[Comment]:
    """Reads a file of prepare_data.py, or one whose fields --columns names.

    Raises:
        SystemExit: if it holds something else.
    """
    comments = []
    for record in read_records(path, columns):
        if not id_of(record) or not id_of(record, "video_id"):
            raise SystemExit(f"{shown(path)}: a record without id and video_id. Make it with: python prepare_data.py")
        comments.append(Comment(record))
    return comments


def prepare(args: argparse.Namespace, files: dict[str, Path]) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Makes the pairs of both splits and reports what was dropped.

    Returns:
        Pairs by split, and what report.json holds.
    """
    crawl_dir = from_root(args.crawl_dir or args.data_dir)
    likes, without, unread = read_likes(crawl_dir)
    replies = read_replies(args.replies)
    for problem in unread:
        print(f"  {problem}")
    print(
        f"{shown(crawl_dir)}: {len(likes):,} comments with likes, {without:,} without (crawled before June 2025). "
        f"{len(replies):,} replies of models."
    )
    results: dict[str, list[dict[str, Any]]] = {}
    report: dict[str, Any] = {"arguments": vars(args), "with_likes": len(likes), "without_likes": without}
    report["unread"] = unread
    for split, path in files.items():
        comments = read_comments(path, args.columns)
        groups = by_prompt(comments)
        sources = {
            "likes": list(pairs_by_likes(groups, likes, args.min_likes, args.margin, args.length_ratio)),
            "replies": list(pairs_from_replies(comments, replies, args.length_ratio)),
        }
        results[split] = []
        report[split] = {"comments": len(comments), "prompts": len(groups)}
        print(f"{split}: {len(comments):,} comments answer {report[split]['prompts']:,} different things.")
        for source, pairs in sources.items():
            kept = balanced(pairs) if args.balance_length else pairs
            report[split][source] = {"found": length_bias(pairs), "kept": length_bias(kept)}
            if pairs:
                print(describe(f"{source}, found", report[split][source]["found"]))
                print(describe(f"{source}, kept", report[split][source]["kept"]))
            results[split] += kept
    return results, report


def main(args: argparse.Namespace) -> None:
    """Checks the arguments, makes the pairs and writes them."""
    data_dir, output_dir = from_root(args.data_dir), from_root(args.output_dir)
    for name, least in (("min_likes", 1), ("margin", 1), ("length_ratio", 1)):
        if not getattr(args, name) >= least:
            raise SystemExit(f"--{name}: got {getattr(args, name)}, expected {least} or more.")
    if args.crawl_dir and not from_root(args.crawl_dir).is_dir():
        raise SystemExit(f"--crawl_dir: no folder {shown(from_root(args.crawl_dir))}.")
    if problem := write_problem(output_dir):
        raise SystemExit(f"--output_dir: {problem}")
    found = {split: find_split(data_dir, split) for split in ("train", "test")}
    if found["train"] is None:
        raise SystemExit(f"No data_train.json in {shown(data_dir)}. Make it with: python prepare_data.py --total 2000")
    try:
        results, report = prepare(args, {split: path for split, path in found.items() if path})
    except DataError as error:
        raise SystemExit(str(error)) from error
    if not results["train"] and any(report["train"][source]["found"]["pairs"] for source in ("likes", "replies")):
        raise SystemExit(
            "No training pairs: in all that were found the same side is the longer one, so that length alone would "
            "tell. Let the model answer at greater length (--max_new_tokens), or keep them: --balance_length False"
        )
    if not results["train"]:
        raise SystemExit(
            "No training pairs. Pairs by likes need a crawl with like_count (MediaCrawler since June 2025) and several "
            "comments on a video (--min_likes, --margin and --length_ratio say which). Without likes, let a model "
            "answer the training comments and name its file with --replies FILE: python deepspeed_ft/train.py "
            "--train_mode False --test_mode True --test_model base --test_split train"
        )
    files = {split: output_dir / f"data_{split}_pairs.jsonl" for split in ("train", "test")}
    with atomic_writes([*(files[split] for split in results), output_dir / "report.json"]) as temporaries:
        for temporary, pairs in zip(temporaries, results.values(), strict=False):
            lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
            temporary.write_text("".join(lines), encoding="utf-8")
        temporaries[-1].write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        for split in files.keys() - results.keys():  # What an earlier run left would be held out by training.
            files[split].unlink(missing_ok=True)
    print(
        f"Written to {shown(output_dir)}: {', '.join(f'{len(pairs):,} {split}' for split, pairs in results.items())} "
        f"pairs.\nNext: bash deepspeed_dpo/run.sh --adapter <run of deepspeed_ft>/<ckpt_id>/adapter"
    )


if __name__ == "__main__":
    main(build_parser().parse_args())
