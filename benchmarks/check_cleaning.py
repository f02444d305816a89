"""What cleaning does to a model: a crawl with made-up bait among its comments, learnt with and without cleaning.

    python benchmarks/check_cleaning.py --data_dir CRAWL --model model/google/gemma-3-270m-from-q4

Threads of bait ("reply 1 and I send it to you") are written into a copy of the crawl, under the videos it is trained
on, their commonest texts as often as they were counted in a crawl of study-advice videos. prepare_data.py takes --total
comments of it, once with --clean False and once with its defaults; deepspeed_ft/train.py trains LoRA on both, each
comment once, with each seed, as many updates; evaluate.py reads and answers the same held-out, clean comments with all.

Junk replies have the text of one of the bait comments, or less than two letters and digits.

What is done already is not done again: a killed check goes on. Prints a markdown table and a JSON line.
"""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

from check_data import Part, in_words, run, train  # First: it makes utils/ importable.

from utils.data.held_out import read_comments
from utils.evaluate.intervals import Interval
from utils.evaluate.texts import normalised
from utils.files import from_root, read_json

WAYS = {"uncleaned": "False", "cleaned": "True"}
MEASURES = ("likelihood", "reading", "fitting", "noticed")
REPLIES = 14  # Of a thread, and one answer to one of them.
# Counted in a crawl of study-advice videos; the others are made up.
COUNTED = {"求": 607, "1": 77, "求发": 74, "[蹲蹲]": 58}
MADE_UP = ("求资料", "求求了", "求分享", "蹲蹲", "蹲", "滴滴", "想要", "求一份", "我也要", "求带", "111", "已三连求",
           "求求[保佑]", "求一个", "来一份", "求发一下", "想要一份", "求[打call]", "已关注求", "踢我")  # fmt: skip
OFFERS = ("{}整理好了，评论区扣1我挨个发", "需要{}的评论区留言，免费发", "自用{}，想要的滴滴我", "{}做了，想要的打个1",
          "花一周弄的{}，留言就发", "{}分享给大家，评论区蹲一下，看到就发")  # fmt: skip
THINGS = ("资料", "笔记", "清单", "模板", "对比表", "攻略", "题库", "合集", "表格", "避坑指南")
ANSWERS = ("发你啦", "已发", "发了", "滴我", "关一下我，发不过去", "看私信", "回关才能发")


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", required=True, help="crawl, in json or another format of MediaCrawler")
    add("--model", required=True, help="folder of the base model")
    add("--work_dir", default="benchmarks/output/cleaning", help="for the data, the runs and the evaluation")
    add("--test_size", type=float, default=0.2, help="share of the videos that is held out")
    add("--total", type=int, default=1000, help="comments that are taken of the crawl with bait")
    add("--bait", type=int, default=2250, help="comments of bait that are written into the crawl")
    add("--train", type=int, default=960, help="comments to train on, of those that were taken for training")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--limit", type=int, default=200, help="held-out comments")
    add("--matched", type=int, default=40, help="of these, replies that are also read after other questions")
    return parser


def bait(videos: list[str], count: int) -> list[dict[str, str | int]]:
    """Threads of bait as a crawl's comments."""
    draw, made_up = random.Random(0), sum(COUNTED.values()) // len(MADE_UP) // 2
    weights = COUNTED | dict.fromkeys(MADE_UP, made_up)
    found: list[dict[str, str | int]] = []

    def say(text: str, parent: str, video: str) -> str:
        id = f"77{len(found):010}"
        found.append({"comment_id": id, "parent_comment_id": parent, "create_time": 1741000000 + len(found),
                      "video_id": video, "content": text, "user_id": f"8{len(found):09}",
                      "nickname": f"路人{len(found)}", "sub_comment_count": "0", "last_modify_ts": 0})  # fmt: skip
        return id

    while len(found) < count:
        video = draw.choice(videos)
        parent = say(draw.choice(OFFERS).format(draw.choice(THINGS)), "0", video)
        replies = [say(draw.choices([*weights], [*weights.values()])[0], parent, video) for _ in range(REPLIES)]
        say(draw.choice(ANSWERS), draw.choice(replies), video)
    return found[:count]


def prepare(args: argparse.Namespace, work: Path) -> list[str]:
    """Prepares the crawl as it is, and with bait in both ways; returns the texts of the bait."""
    flags = {"test_size": args.test_size, "data_dir": from_root(args.data_dir)}
    if not (work / "data/data_test.json").is_file():
        run("prepare_data.py", flags | {"output_dir": work / "data"}, work / "prepare.log")
    videos = sorted({one.video_id for group in read_comments(work / "data/data_train.json") for one in group})
    written = bait(videos, args.bait)
    crawl = work / "crawl"
    if not crawl.is_dir():
        shutil.copytree(from_root(args.data_dir), crawl)
        # Of MediaCrawler's own name for such a file.
        path = crawl / "search_comments_2000-01-01.json"
        path.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
    for way, clean in WAYS.items():
        place = work / f"data-{way}"
        if not (place / "data_train.json").is_file():
            flags |= {"data_dir": crawl, "output_dir": place, "total": args.total, "clean": clean}
            run("prepare_data.py", flags, work / f"prepare-{way}.log")
    return [str(one["content"]) for one in written]


def parts(args: argparse.Namespace, work: Path, held_out: set[str], texts: list[str]) -> list[Part]:
    """As many comments of both ways, none of a held-out video."""
    found, junk = [], {normalised(text) for text in texts}
    for way in WAYS:
        groups = read_comments(work / f"data-{way}/data_train.json")
        usable = [one for group in groups for one in group if one.video_id not in held_out]
        comments = sorted(usable, key=lambda one: one.id)
        count = sum(normalised(one.messages[-1]["content"]) in junk for one in comments)
        print(f"{way}: {len(comments)} comments to train on, {count} with the text of a bait comment", flush=True)
        if len(comments) < args.train:
            raise SystemExit(f"--train: got {args.train}, there are {len(comments)}. Use less, or a larger --total.")
        found += [Part(way, seed, random.Random(seed).sample(comments, args.train)) for seed in args.seeds]
    return found


def is_junk(reply: str, texts: set[str]) -> bool:
    """Whether a reply is bait's, or says nothing."""
    return normalised(reply) in texts or sum(map(str.isalnum, reply)) < 2


def main(args: argparse.Namespace) -> None:
    """Prepares, trains, evaluates."""
    from utils.evaluate.folder import EvaluationFolder

    work, model = from_root(args.work_dir), from_root(args.model)
    work.mkdir(parents=True, exist_ok=True)
    texts = prepare(args, work)
    held_out = {one.video_id for group in read_comments(work / "data/data_test.json") for one in group}
    adapters = {f"{part.name}-{part.seed}": train(part, model, work) for part in parts(args, work, held_out, texts)}
    flags: dict[str, Any] = {"model": f"base={model}", "adapter": [f"{name}={path}" for name, path in adapters.items()]}
    flags |= {"data": work / "data/data_test.json", "train_data": work / "data-uncleaned/data_train.json", "shots": 0}
    flags |= {"limit": args.limit, "matched": args.matched, "max_new_tokens": 32, "name": "all"}
    run("evaluate.py", flags | {"output_dir": work / "eval"}, work / "evaluate.log")
    place, junk = work / "eval/all", {normalised(text) for text in texts}
    scores = read_json(place / "report.json")["scores"]
    rows = EvaluationFolder(place).replies()
    replies = {"real replies": [row["real"] for row in rows["base"].values()]}
    replies |= {name: [row["replies"][0] for row in rows[name].values()] for name in [*adapters, "base"]}
    print("\n| | bits per character | reads | fits | noticed (AUC) | junk replies | exactly 求 |")
    print("|---|---|---|---|---|---|---|")
    found = {}
    for name, said in replies.items():
        own = {what: scores.get(name, {}).get(what) for what in MEASURES}
        share, asks = sum(is_junk(text, junk) for text in said) / len(said), said.count("求")
        found[name] = own | {"junk": share, "asks": asks}
        cells = [in_words(Interval(*value)) if value else "" for value in own.values()]
        print(f"| {name} | {' | '.join(cells)} | {share:.1%} | {asks} of {len(said)} |")
    print("\n" + json.dumps({"check": "cleaning", "results": found}, ensure_ascii=False))


if __name__ == "__main__":
    main(build_parser().parse_args())
