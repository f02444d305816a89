"""What is worth training on: how many comments, and which? Held-out bits per character over seeds, from evaluate.py.

    python benchmarks/check_data.py selection --data_dir CRAWL --model model/google/gemma-3-270m-from-q4
    python benchmarks/check_data.py amount --data_dir CRAWL --model model/google/gemma-3-270m-from-q4

Both prepare a crawl with prepare_data.py, train LoRA with deepspeed_ft/train.py on parts of its training comments, each
comment once, and evaluate all of that on the same held-out comments.

selection   as many comments, and so as many updates, chosen in different ways from the same --pool:
            random       another part with each seed; the control
            context      those whose own question makes them likelier than other videos' questions do: the base model's
                         ln p(answer | question) less its mean after --others questions about other videos
            likeliest    a random part of the third with the fewest bits per character after its question, as the base
                         model reads it
            middle       of the middle third
            unlikeliest  of the third with the most
            likes        those with the most likes
            longest      those with the most characters
            diverse      one of each of as many clusters (k-means over TF-IDF of one to three characters)
            All but random, likeliest, middle and unlikeliest take the same comments with each seed.
amount      the first --counts comments of a random order, another with each seed.

What is done already is not done again: a killed check goes on. Prints a markdown table and a JSON line.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.data.held_out import Comment  # noqa: E402
from utils.evaluate.intervals import Interval  # noqa: E402
from utils.files import from_root, read_json  # noqa: E402

STEP = 16  # Comments an update.
WAYS = ("random", "context", "likeliest", "middle", "unlikeliest", "likes", "longest", "diverse")


class Part(NamedTuple):
    """Comments to train on.

    Attributes:
        name: Of the way they were chosen, or their number.
        seed: Of the choice and of the training.
        comments: In no order.
    """

    name: str
    seed: int
    comments: list[Comment]


class Score(NamedTuple):
    """How a model finds an answer, nats.

    Attributes:
        own: ln p after its own question.
        others: The mean after other videos' questions.
    """

    own: float
    others: float


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("check", choices=("selection", "amount"))
    add("--data_dir", required=True, help="crawl")
    add("--model", required=True, help="folder of the base model")
    add("--work_dir", default="benchmarks/output/data", help="for the data, the runs and the evaluation of one crawl")
    add("--test_size", type=float, default=0.15, help="share of the videos that is held out")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--limit", type=int, default=200, help="held-out comments")
    add("--counts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="amount: comments")
    add("--ways", nargs="+", choices=WAYS, default=WAYS, help="selection: which ones")
    add("--count", type=int, default=480, help="selection: comments that are chosen")
    add("--pool", type=int, default=2400, help="selection: comments to choose from, drawn at random")
    add("--others", type=int, default=3, help="selection: other videos' questions after which an answer is read")
    return parser


def run(script: str, flags: dict[str, Any], log: Path) -> None:
    """Runs a script of the repository; what it says goes to a file."""
    arguments = [
        text for key, value in flags.items()
        for text in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]  # fmt: skip
    finished = subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True)
    log.write_text(finished.stdout + finished.stderr, encoding="utf-8")
    if finished.returncode:
        raise SystemExit(f"{script} failed: {log}")


# ---------------------------------------------------------------------------------------------------------------------
# Ways to choose


def score(comments: Sequence[Comment], model_dir: Path, others: int, path: Path) -> dict[str, Score]:
    """Lets the base model read each answer after its own question and after some about other videos.

    Args:
        comments: All.
        model_dir: The base model's.
        others: How many other questions.
        path: Where the scores are kept.

    Returns:
        By the comment's id.
    """
    from utils.evaluate.likelihood import Reader, Reading, answer_ids
    from utils.serve.generate import load_for_inference

    if path.is_file():
        return {id: Score(*found) for id, found in read_json(path).items()}
    model, chat = load_for_inference(model_dir)
    prompts = {one.id: chat.prompt_ids(one.messages[:-1]) for one in comments}
    draw, after = random.Random(0), {one.id: [one.id] for one in comments}
    for one in comments:
        for other in draw.sample([other.id for other in comments if other.video_id != one.video_id], others):
            after[other].append(one.id)
    answers = {
        one.id: answer_ids(chat, one.messages[:-1], prompts[one.id], one.messages[-1]["content"]) for one in comments
    }
    readings = [
        Reading(id, prompts[id], {answer: answers[answer] for answer in those if answers[answer]})
        for id, those in after.items()
    ]
    longest = max(map(len, prompts.values())) + max(len(ids or ()) for ids in answers.values())
    own: dict[str, float] = {}
    away: dict[str, list[float]] = {one.id: [] for one in comments}
    for question, nats in Reader(model, longest).read(readings):
        for answer, value in nats.items():
            if answer == question:
                own[answer] = value
            else:
                away[answer].append(value)
    found = {id: Score(value, statistics.mean(away[id])) for id, value in own.items()}
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def third(comments: Sequence[Comment], scores: dict[str, Score], number: int) -> list[Comment]:
    """Those with the fewest bits per character (0), those in the middle (1), those with the most (2)."""
    ranked = sorted(comments, key=lambda one: -scores[one.id].own / len(one.messages[-1]["content"]))
    return ranked[number * len(ranked) // 3 : (number + 1) * len(ranked) // 3]


def diverse(comments: Sequence[Comment], count: int) -> list[Comment]:
    """One comment of each cluster: the one that is nearest to its centre."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import pairwise_distances_argmin
    from sklearn.preprocessing import normalize

    texts = [one.messages[-1]["content"] for one in comments]
    counted = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True).fit_transform(texts)
    points = normalize(TruncatedSVD(128, random_state=0).fit_transform(counted))
    clusters = MiniBatchKMeans(count, random_state=0, n_init=3).fit(points)
    nearest = dict.fromkeys(pairwise_distances_argmin(clusters.cluster_centers_, points).tolist())
    rest = [place for place in range(len(texts)) if place not in nearest]  # Empty clusters choose nothing new.
    filled = [*nearest, *random.Random(0).sample(rest, count - len(nearest))]
    return [comments[place] for place in filled]


def choose(
    way: str, comments: list[Comment], count: int, seed: int, scores: dict[str, Score], likes: dict[str, int]
) -> list[Comment]:
    """Chooses comments to train on, see this file's beginning."""
    draw = random.Random(seed)
    if way == "random":
        return draw.sample(comments, count)
    if way in ("likeliest", "middle", "unlikeliest"):
        number = ("likeliest", "middle", "unlikeliest").index(way)
        return draw.sample(third([one for one in comments if one.id in scores], scores, number), count)
    if way == "diverse":
        return diverse(comments, count)
    worth = {
        "context": lambda one: scores[one.id].own - scores[one.id].others if one.id in scores else -math.inf,
        "likes": lambda one: likes.get(one.id, 0),
        "longest": lambda one: len(one.messages[-1]["content"]),
    }[way]
    return sorted(comments, key=lambda one: (-worth(one), one.id))[:count]


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation


def prepare(args: argparse.Namespace, work: Path) -> list[Comment]:
    """Prepares the crawl; its training comments in an order that does not depend on the machine."""
    from utils.data.held_out import read_comments

    if not (work / "data/data_train.json").is_file():
        flags = {"data_dir": from_root(args.data_dir), "output_dir": work / "data", "test_size": args.test_size}
        run("prepare_data.py", flags, work / "prepare.log")
    comments = [one for group in read_comments(work / "data/data_train.json") for one in group]
    return sorted(comments, key=lambda one: one.id)


def train(part: Part, model: Path, work: Path) -> Path:
    """Trains LoRA on some comments, each of them once; returns the adapter's folder."""
    place = work / f"{part.name}-{part.seed}"
    place.mkdir(exist_ok=True)
    adapter = place / f"output/DS-{model.parent.name}/{model.name}/1/adapter"
    lines = [json.dumps({"id": one.id, "video_id": one.video_id, "messages": one.messages}, ensure_ascii=False)
             for one in part.comments]  # fmt: skip
    data, text = place / "train.jsonl", "\n".join(lines) + "\n"
    if data.is_file() and data.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{place} was trained on other comments. Name another --work_dir.")
    if adapter.is_dir():
        return adapter
    data.write_text(text, encoding="utf-8")
    flags = {"model_dir": model.parents[1], "model_name": f"{model.parent.name}/{model.name}", "data_dir": place}
    flags |= {"output_dir": place / "output", "epochs": 1, "batch_size": 4, "grad_accum": STEP // 4, "seed": part.seed}
    flags |= {"eval_samples": 0, "save_steps": 10**6}
    run("deepspeed_ft/train.py", flags, place / "train.log")
    return adapter


def evaluate(args: argparse.Namespace, adapters: dict[str, Path], model: Path, work: Path) -> Path:
    """Evaluates all adapters; returns the evaluation's folder."""
    flags = {"model": f"base={model}", "adapter": [f"{name}={path}" for name, path in adapters.items()]}
    flags |= {"data": work / "data/data_test.json", "train_data": work / "data/data_train.json", "shots": 0}
    # Only likelihoods are wanted: replies are as short as can be, and read after no other questions.
    flags |= {"limit": args.limit, "matched": 0, "max_new_tokens": 1, "name": "all", "output_dir": work / "eval"}
    run("evaluate.py", flags, work / "evaluate.log")
    return work / "eval/all"


def table(place: Path, names: list[str], seeds: list[int], control: str) -> list[dict[str, Any]]:
    """Each name's bits per character, its seeds apart and together, and by how much that differs from another's."""
    from utils.evaluate.folder import EvaluationFolder, answer_of
    from utils.evaluate.measures import Videos, bits

    folder, said = EvaluationFolder(place), read_json(place / "settings.json")
    rows = [row for own in folder.replies().values() for row in own.values()]
    comments = {row["id"]: Comment(row["id"], row["video_id"], [answer_of(row)]) for row in rows}
    videos = Videos([*comments.values()])
    parts = {one.name: bits(comments, one) for one in folder.evidence(said["kinds"], "base")}

    def together(name: str) -> Any:
        several = [parts[name]] if name == "base" else [parts[f"{name}-{seed}"] for seed in seeds]
        return videos.ratio({id: tuple(map(sum, zip(*(one[id] for one in several), strict=True))) for id in several[0]})

    found = []
    for name in ["base", *names]:
        alone = [videos.ratio(parts[f"{name}-{seed}"]).value for seed in seeds] if name != "base" else []
        mean = together(name)
        found.append({"name": name, "bits": mean.interval(), "seeds": alone,
                      "difference": (mean - together(control)).interval()})  # fmt: skip
    return found


def read_likes(crawl: Path) -> dict[str, int]:
    """Likes by comment id."""
    sys.path.insert(0, str(ROOT / "deepspeed_dpo"))
    import prepare_data

    return prepare_data.read_likes(crawl)[0]


def selected(args: argparse.Namespace, comments: list[Comment], model: Path, work: Path) -> list[Part]:
    """As many comments, chosen in each of the ways."""
    likes = read_likes(from_root(args.data_dir))
    known = [one for one in comments if one.id in likes]
    pool = random.Random(0).sample(known, min(args.pool, len(known)))
    print(f"{len(known)} of them with likes, of which {len(pool)} are to choose from", flush=True)
    scores = score(pool, model, args.others, work / f"scores-{args.pool}-{args.others}.json")
    return [
        Part(way, seed, choose(way, pool, args.count, seed, scores, likes)) for seed in args.seeds for way in args.ways
    ]


def in_amounts(args: argparse.Namespace, comments: list[Comment]) -> list[Part]:
    """The first comments of a random order, few and many."""
    orders = {seed: random.Random(seed).sample(comments, len(comments)) for seed in args.seeds}
    return [Part(str(count), seed, order[:count]) for seed, order in orders.items() for count in args.counts]


def main(args: argparse.Namespace) -> None:
    """Chooses, trains, evaluates."""
    work, model = from_root(args.work_dir) / args.check, from_root(args.model)
    work.mkdir(parents=True, exist_ok=True)
    comments = prepare(args, work)
    print(f"{len(comments)} training comments", flush=True)
    parts = selected(args, comments, model, work) if args.check == "selection" else in_amounts(args, comments)
    adapters = {}
    for part in parts:
        adapters[f"{part.name}-{part.seed}"] = train(part, model, work)
        length = statistics.median(len(one.messages[-1]["content"]) for one in part.comments)
        print(f"{part.name}, seed {part.seed}: {len(part.comments)} comments, median {length} characters", flush=True)
    names = list(dict.fromkeys(part.name for part in parts))
    found = table(evaluate(args, adapters, model, work), names, args.seeds, control=names[0])
    print(f"\n| {args.check} | bits per character | each seed | more than {names[0]} |\n|---|---|---|---|")
    for row in found:
        seeds = ", ".join(f"{one:.3f}" for one in row["seeds"])
        print(f"| {row['name']} | {in_words(row['bits'])} | {seeds} | {in_words(row['difference'])} |")
    print("\n" + json.dumps({"check": args.check, "results": found}))


def in_words(interval: Interval) -> str:
    """An estimate with its 95 % confidence interval."""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


if __name__ == "__main__":
    main(build_parser().parse_args())
