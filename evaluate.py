"""Is a tuned model any good, and better than a prompt? Answers it offline, with intervals, on one page.

    python evaluate.py --model output_hf/BiliComments --base model/Qwen/Qwen2.5-0.5B
    python evaluate.py --model deepspeed_ft/output/DS-Qwen/Qwen2.5-0.5B                 # a run; several may be named
    python evaluate.py --model model/Qwen/Qwen2.5-0.5B --adapter deepspeed_ft/output/DS-Qwen/Qwen2.5-0.5B/1
    python evaluate.py --api http://127.0.0.1:8000 --base model/Qwen/Qwen2.5-0.5B       # a running server
    python evaluate.py --compare eval/monday eval/tuesday                               # several evaluations, paired

Reads   held-out records in any known format (--data), the training records beside them (for the few-shot prompt and to
        find copies), models, adapters and training runs.
Writes  eval/<name>/: report.html (pictures, opens offline), report.json, replies.jsonl, likelihoods.jsonl,
        settings.json. The same command goes on after a kill; further models may join later.

Besides the tuned models these always answer: the base with the training prompt, the base with a style prompt
(--prompt_file), and the base with real examples in its prompt (--shots).
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.cli import ArgumentParser, add_columns_argument, boolean, progress_bar
from utils.files import atomic_writes, exclusive_lock, explained, from_root, reason_of, sha256, shown, write_problem

START = "python evaluate.py"


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = ArgumentParser(
        description="Is a tuned model any good, and better than a prompt?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", nargs="+", action="extend", default=[], metavar="[NAME=]DIR",
        help="tuned models: finished ones, training runs or their checkpoints")  # fmt: skip
    add("--adapter", nargs="+", action="extend", default=[], metavar="[NAME=]DIR",
        help="adapters on the one --model, which is the base")  # fmt: skip
    add("--base", metavar="DIR", help="the model before tuning (default: what the tuned one was trained on)")
    add("--data", default="data/data_test.json", metavar="FILE", help="held-out records")
    add("--train_data", metavar="FILE", help="training records (default: those beside --data)")
    add_columns_argument(parser)
    add("--name", help="of the results' folder (default: the first model's)")
    add("--output_dir", default="eval", help="folder of all evaluations")
    add("--overwrite", nargs="?", type=boolean, const=True, default=False, help="start anew where one has been")
    add("--compare", nargs="+", action="extend", metavar="DIR",
        help="put evaluations that were made before in one report, and end")  # fmt: skip
    add = parser.add_argument_group("who answers besides").add_argument
    add("--prompt_file", default="examples/style_prompt.txt", metavar="FILE", help="system prompt of the style prompt")
    add("--shots", type=int, default=4, help="real examples in the few-shot prompt; 0: without it")
    add("--api", metavar="[NAME=]URL", help="an OpenAI-compatible API that answers too, such as http://127.0.0.1:8000")
    add("--api_model", help="its model's name there (default: the only one)")
    add("--api_key_env", metavar="VARIABLE", help="environment variable that holds its key")
    add = parser.add_argument_group("how much").add_argument
    add("--limit", type=int, default=500, help="held-out comments, spread over the videos; -1: all")
    add("--matched", type=int, default=50, help="of these, replies that are also read after other questions; -1: all")
    add("--replies", type=int, default=1, help="replies to each comment")
    add("--max_tokens", type=int, default=2048, help="longest prompt; comments with longer ones are left out")
    add = parser.add_argument_group("how replies are chosen, equal for all").add_argument
    add("--max_new_tokens", type=int, default=64, help="longest reply")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    add("--top_p", type=float, default=0.95, help="choose among the likeliest tokens of this weight")
    add("--seed", type=int, default=1, help="of the replies, the examples and the other questions")
    add = parser.add_argument_group("a judge, if there is one").add_argument
    add("--judge", metavar="NAME", help="name of a model in --teacher_config that says which of two replies is better")
    add("--teacher_config", default="deepspeed_distill/teacher_config.yaml", metavar="FILE", help="file of such models")
    add("--judge_limit", type=int, default=100, help="comments that it judges, each pair of replies in both orders")
    parser.add_argument("--trust_remote_code", type=boolean, default=False,
                        help="True: run Python code that comes with the models")  # fmt: skip
    return parser


def argument_problems(args: argparse.Namespace) -> list[str]:
    """Finds what is wrong with the arguments."""
    problems = []
    for name, fits, expected in (
        ("limit", args.limit == -1 or args.limit >= 1, "a number of comments, or -1 for all"),
        ("matched", args.matched >= -1, "a number of comments, or -1 for all"),
        ("replies", 1 <= args.replies <= 16, "1 to 16"),
        ("shots", args.shots >= 0, "0 or more"),
        ("max_tokens", args.max_tokens >= 1, "1 or more"),
        ("max_new_tokens", args.max_new_tokens >= 1, "1 or more"),
        ("temperature", args.temperature == 0 or 1e-3 <= args.temperature < math.inf, "0, or a number from 0.001"),
        ("top_p", 0 < args.top_p <= 1, "more than 0 but not more than 1"),
        ("seed", args.seed >= 0, "0 or more"),
        ("judge_limit", args.judge_limit >= 1, "1 or more"),
    ):
        if not fits:
            problems.append(f"--{name}: got {getattr(args, name)}, expected {expected}.")
    if args.name is not None and not is_name(args.name):
        problems.append(f"--name: got {args.name!r}, expected a folder's name, such as BiliComments.")
    if args.compare:
        if len(args.compare) < 2:
            problems.append("--compare: expected two evaluations or more, such as eval/monday eval/tuesday.")
        return problems
    if not args.model and not args.api and not args.base:
        problems.append(
            f"Nothing to evaluate. Name a tuned model: {START} --model output_hf/BiliComments --base model/…"
        )
    if args.adapter and len(args.model) != 1:
        problems.append("--adapter: expected one --model, the base that the adapters belong to.")
    if (args.api_model or args.api_key_env) and not args.api:
        problems.append("--api_model and --api_key_env belong to an --api.")
    if args.api_key_env and not os.environ.get(args.api_key_env):
        problems.append(f"{args.api_key_env} is not set, which holds the key of --api: export {args.api_key_env}=...")
    if args.replies > 1 and args.temperature == 0:
        problems.append("--replies: at --temperature 0 all replies to a comment are equal. Ask for one.")
    if not from_root(args.data).is_file():
        problems.append(f"--data: no {shown(from_root(args.data))}. Make it with: python prepare_data.py --total 2000")
    if args.judge and not from_root(args.teacher_config).is_file():
        example = "deepspeed_distill/teacher_config.example.yaml"
        problems.append(f"--judge: no {shown(from_root(args.teacher_config))}. Make it from the example: {example}")
    if not from_root(args.prompt_file).is_file():
        problems.append(f"--prompt_file: no {shown(from_root(args.prompt_file))}.")
    elif not style_prompt(args):
        problems.append(f"--prompt_file: {shown(from_root(args.prompt_file))} is empty. Write a system prompt into it.")
    return problems


def is_name(text: str) -> bool:
    """Whether a text can name a folder."""
    return bool(text.strip(". ")) and Path(text).name == text


def style_prompt(args: argparse.Namespace) -> str:
    """The written style prompt."""
    with explained(f"--prompt_file: {shown(from_root(args.prompt_file))} is no text in UTF-8"):
        return from_root(args.prompt_file).read_text(encoding="utf-8").strip()


# ---------------------------------------------------------------------------------------------------------------------
# Who answers


def split_name(text: str) -> tuple[str, Path]:
    """Takes NAME=DIR apart; without a name it is the folder's, and a checkpoint's that of its run as well."""
    name, separator, folder = text.partition("=")
    path = from_root(folder if separator else text)
    if separator:
        return name.strip(), path
    return (f"{path.parent.name}/{path.name}" if (path / "manifest.json").is_file() else path.name), path


def find_contenders(args: argparse.Namespace) -> list[Any]:
    """Finds all who answer, the base's last.

    Returns:
        `Contender`s.

    Raises:
        SystemExit: if a folder is not what it should be, or nothing says which model is the base.
    """
    from utils.evaluate.contenders import API, BASE, FEW_SHOT, STYLE, TUNED, Contender, is_model, tuned
    from utils.serve.generate import tuning_of

    found, bases = [], []
    if args.adapter:
        _, path = split_name(args.model[0])
        if not is_model(path):
            raise SystemExit(f"--model: {shown(path)} is no model's folder (config.json and weights).")
        bases.append(str(path))
        for text in args.adapter:
            name, folder = split_name(text)
            if tuning_of(folder).adapter is None:
                raise SystemExit(f"--adapter: no adapter_config.json in {shown(folder)}.")
            found.append(Contender(name, TUNED, str(path), adapter=str(folder)))
    else:
        for name, path in map(split_name, args.model):
            contender, base = tuned(name, path)
            found.append(contender)
            bases += [base] if base else []
    base = from_root(args.base) if args.base else Path(bases[0]) if bases else None
    if base is None:
        raise SystemExit(
            f"--base: nothing says which model it was before tuning. Name its folder: {START} … --base model/…"
        )
    if not is_model(base):
        raise SystemExit(f"--base: {shown(base)} is no model's folder (config.json and weights).")
    if args.api:
        name, _ = api_address(args)
        model = api_model(args)
        found.append(Contender(name or model, API, model))
    kinds = [BASE, STYLE, *([FEW_SHOT] if args.shots else [])]
    found += [Contender(kind, kind, str(base)) for kind in kinds]
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1} | ({"real", "question"} & {*names})):
        raise SystemExit(
            f"The name {twice[0]!r} is given twice, or taken. Give others: --model mine=DIR, --api theirs=URL"
        )
    if wrong := [name for name in names if not is_name(name.replace("/", "-"))]:
        raise SystemExit(f"--model: got the name {wrong[0]!r}, expected one such as tuned=DIR.")
    return found


def api_address(args: argparse.Namespace) -> tuple[str, str]:
    """Takes NAME=URL apart; the name may be missing."""
    name, separator, url = args.api.partition("=")
    return (name.strip(), url) if separator and "://" not in name else ("", args.api)


def api_client(args: argparse.Namespace) -> Any:
    """A client of --api that tries again where a server is busy."""
    from urllib.parse import urlsplit

    from utils.api import make_client

    _, address = api_address(args)
    url = address.rstrip("/") + ("" if urlsplit(address).path.strip("/") else "/v1")
    return make_client(url, os.environ[args.api_key_env] if args.api_key_env else "none", max_retries=8)


def api_model(args: argparse.Namespace) -> str:
    """The name of the model that the API is asked for."""
    import asyncio

    async def names() -> list[str]:
        async with api_client(args) as client:
            return [model.id async for model in client.models.list()]

    with explained(f"--api: {args.api} does not answer as an OpenAI-compatible API"):
        offered = asyncio.run(names())
    wanted = args.api_model or (offered[0] if len(offered) == 1 else None)
    if wanted is None or (offered and wanted not in offered):
        raise SystemExit(f"--api_model: got {args.api_model}, the server has {', '.join(offered) or 'none'}. Name one.")
    return wanted


# ---------------------------------------------------------------------------------------------------------------------
# The evaluation


def make_task(args: argparse.Namespace, folder: Any, train: Path | None) -> Any:
    """Reads the data; what all contenders have in common, without progress."""
    from utils.data.held_out import read_comments, spread
    from utils.evaluate.contenders import API, BASE, FEW_SHOT, STYLE, TUNED, draw_examples, make_prompt
    from utils.evaluate.replies import SamplingSettings
    from utils.evaluate.work import Task

    groups = read_comments(from_root(args.data), None if args.limit == -1 else args.limit, args.columns)
    count = sum(map(len, groups)) if args.matched == -1 else args.matched
    style, held_out = style_prompt(args), {comment.video_id for group in groups for comment in group}
    examples = draw_examples(train, args.shots, args.seed, held_out, args.columns) if args.shots else []
    return Task(
        comments=[comment for group in groups for comment in group],
        matched=[comment for group in spread(groups, count) for comment in group],
        prompts={kind: make_prompt(kind, style, examples) for kind in (BASE, STYLE, FEW_SHOT, TUNED, API)},
        sampling=SamplingSettings(args.replies, args.max_new_tokens, args.temperature, args.top_p, args.seed),
        max_tokens=args.max_tokens,
        trust_remote_code=args.trust_remote_code,
        folder=folder,
        step=lambda _: None,
    )


def settings_of(args: argparse.Namespace, base: str, train: Path | None) -> dict[str, Any]:
    """What has to be equal for the evaluation to go on."""
    names = ("limit", "matched", "replies", "max_tokens", "max_new_tokens", "temperature", "top_p", "seed", "shots")
    return {name: getattr(args, name) for name in names} | {
        "data": sha256(from_root(args.data)),
        "train_data": train and sha256(train),
        "columns": args.columns,
        "style prompt": hashlib.sha256(from_root(args.prompt_file).read_bytes()).hexdigest(),
        "base": base,
    }


def find_train(args: argparse.Namespace) -> Path | None:
    """The training records, if there are any.

    Raises:
        SystemExit: if the few-shot prompt needs some.
    """
    from utils.data.records import find_split

    data = from_root(args.data)
    train = from_root(args.train_data) if args.train_data else find_split(data.parent, "train")
    if args.train_data and not train.is_file():
        raise SystemExit(f"--train_data: no {shown(train)}.")
    if train is None and args.shots:
        where = f"no data_train.json beside {shown(data)}"
        raise SystemExit(f"The few-shot prompt takes its examples from the training data: {where}. "
                         "Name it: --train_data FILE, or leave that prompt out: --shots 0")  # fmt: skip
    return train


def training_answers(train: Path | None, columns: dict[str, str] | None) -> list[str] | None:
    """All answers of the training data; None without any."""
    from utils.data.records import UnusableRecord, read_records, to_messages

    if train is None or not train.is_file():
        return None
    answers = []
    with explained(f"{shown(train)} cannot be used as training data"):
        for record in read_records(train, columns):
            with suppress(UnusableRecord):
                answers += [turn["content"] for turn in to_messages(record) if turn["role"] == "assistant"]
    return answers


def work(args: argparse.Namespace, contenders: list[Any], task: Any) -> None:
    """Lets all contenders read and write."""
    from itertools import groupby

    from utils.cli import quiet_libraries
    from utils.evaluate.contenders import API
    from utils.evaluate.work import run_api, run_models, work_left

    quiet_libraries()
    started = time.monotonic()
    with progress_bar(None, "evaluating", "step", total=work_left(task, contenders), smoothing=0.05) as bar:

        def step(what: str) -> None:
            bar.set_description_str(what, refresh=False)
            bar.update()

        task = task._replace(step=step)
        by_weights = groupby(contenders, key=lambda one: (one.kind == API, one.model, one.adapter, one.run))
        for members in ([*group] for _, group in by_weights):
            if members[0].kind == API:
                run_api(task, members[0], api_client(args))
            else:
                run_models(task, members, [one.name for one in contenders])
    print(f"Read and answered in {(time.monotonic() - started) / 60:.1f} min.")


def write_report(place: Path, measured: dict[str, Any], examples: list[Any]) -> None:
    """Leaves report.json and report.html, and prints what they say."""
    from utils.evaluate.report import as_html, as_json, as_text

    with atomic_writes([place / "report.json", place / "report.html"]) as (data, page):
        data.write_text(json.dumps(as_json(measured), ensure_ascii=False, indent=1), encoding="utf-8")
        page.write_text(as_html(place.name, measured, examples), encoding="utf-8")
    print(f"{as_text(measured)}\nThe whole page: {shown(place / 'report.html')}")


def compare(args: argparse.Namespace) -> None:
    """Puts several evaluations in one report."""
    from utils.evaluate.folder import joined

    folders = [from_root(path) for path in args.compare]
    place = from_root(args.output_dir) / (args.name or "-".join(folder.name for folder in folders))
    comments, evidence, train, columns = joined(folders)
    if (place / "settings.json").is_file():
        raise SystemExit(f"--name: {shown(place)} is an evaluation itself. Give the comparison another name.")
    if problem := write_problem(place):
        raise SystemExit(f"--output_dir: {problem}")
    with exclusive_lock(place):
        place.mkdir(parents=True, exist_ok=True)
        finish(place, comments, evidence, training_answers(train, columns), {}, {})


def ask_judge(args: argparse.Namespace, task: Any, contenders: list[Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Lets the judge compare each tuned model's replies with those of the base's prompts.

    Returns:
        What it prefers, and what the report says of it.
    """
    from utils.data.held_out import spread
    from utils.data.teacher import read_teacher
    from utils.evaluate.contenders import API, TUNED
    from utils.evaluate.judge import answers_of, judge, told

    rows = task.folder.replies()
    replies = {one.name: {id: row["replies"][0] for id, row in rows[one.name].items()} for one in contenders}
    candidates = [one.name for one in contenders if one.kind in (TUNED, API)]
    pairs = [(one, other.name) for one in candidates for other in contenders if other.name not in candidates]
    path = answers_of(from_root(args.output_dir), args.judge)
    teacher = read_teacher(from_root(args.teacher_config), args.judge, "--judge")
    videos: dict[str, list[Any]] = {}
    for comment in task.comments:
        videos.setdefault(comment.video_id, []).append(comment)
    chosen = [comment for group in spread([*videos.values()], args.judge_limit) for comment in group]
    judged, counts = judge(chosen, replies, pairs, teacher, args.judge, path)
    print(told(counts, path))
    return judged, {"judge": {"name": args.judge, "model": teacher.model, **counts}}


def finish(
    place: Path,
    comments: list[Any],
    evidence: list[Any],
    training: list[str] | None,
    judged: dict[Any, Any],
    more: dict[str, Any],
) -> None:
    """Measures, and writes the report."""
    from utils.evaluate.measures import measure
    from utils.evaluate.report import side_by_side

    with explained("Nothing can be compared"):
        measured = measure(comments, evidence, training, judged) | more
    write_report(place, measured, side_by_side(comments, evidence))


def main(args: argparse.Namespace) -> None:
    """Checks what was asked for, evaluates and reports."""
    if problems := argument_problems(args):
        raise SystemExit("\n".join(problems))
    if args.compare:
        compare(args)
        return
    if args.judge:
        from utils.data.teacher import read_teacher

        read_teacher(from_root(args.teacher_config), args.judge, "--judge")
    train, contenders = find_train(args), find_contenders(args)
    place = from_root(args.output_dir) / (args.name or contenders[0].name.replace("/", "-"))
    if problem := write_problem(place):
        raise SystemExit(f"--output_dir: {problem}")
    try:
        evaluate(args, place, contenders, train)
    except (OSError, ExceptionGroup) as error:
        full = error.subgroup(OSError) if isinstance(error, ExceptionGroup) else error
        if full is None:
            raise
        raise SystemExit(f"{shown(place)} cannot be written: {reason_of(full)}. The same command goes on.") from None


def evaluate(args: argparse.Namespace, place: Path, contenders: list[Any], train: Path | None) -> None:
    """Evaluates into a folder that nobody else writes to."""
    from utils.evaluate.contenders import BASE
    from utils.evaluate.folder import EvaluationFolder

    base = next(one for one in contenders if one.kind == BASE)
    folder = EvaluationFolder(place)
    with exclusive_lock(place):
        task, training = make_task(args, folder, train), training_answers(train, args.columns)
        folder.open(settings_of(args, base.model, train), contenders, train, args.overwrite)
        print(f"{len(task.comments):,} comments under {len({one.video_id for one in task.comments}):,} videos; "
              f"{', '.join(one.name for one in contenders)} answer. In {shown(place)}.")  # fmt: skip
        work(args, contenders, task)
        evidence = folder.evidence({one.name: one.kind for one in contenders}, BASE)
        finish(place, task.comments, evidence, training, {}, {})
        if args.judge:
            finish(place, task.comments, evidence, training, *ask_judge(args, task, contenders))


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on.", file=sys.stderr)
        sys.exit(130)
