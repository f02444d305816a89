"""What an evaluation's files say: for each question and contender an estimate, and who is better than whom.

The questions, each a number with an interval over videos:
    likelihood   bits per character of the real replies, given what they answer; fewer is better
    reading      how often a real reply is likelier after its own question than after another one; half is guessing
    fitting      the same of the contender's replies, as the base model with the training prompt reads them; a reply
                 that repeats what it answers, or the format of the prompt, is likelier there for that alone, and counts
                 as guessing
    noticed      how well a classifier tells the contender's replies from real ones (area under the curve); half is not
"""

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from statistics import mean, median
from typing import Any, NamedTuple

from utils.data.held_out import Comment
from utils.evaluate import classifier, texts
from utils.evaluate.intervals import Estimate, Interval, draw_videos, estimate, ratio, verdict
from utils.evaluate.likelihood import question_of

# Whether more is better.
QUESTIONS = {"likelihood": False, "reading": True, "fitting": True, "noticed": False}
COMMONEST = 10


class Evidence(NamedTuple):
    """What is known of one contender; everything by the comment's id.

    Attributes:
        name: In the report.
        kind: From `utils.evaluate.contenders`.
        replies: What it wrote.
        cut: Whether each came to the longest length.
        real: Question -> nats of the real reply after it, its own question among them.
        written: The same of its first reply, as the base reads it.
    """

    name: str
    kind: str
    replies: dict[str, list[str]]
    cut: dict[str, list[bool]]
    real: dict[str, dict[str, float]]
    written: dict[str, dict[str, float]]


class Videos:
    """Comments by their videos, for sums over these."""

    def __init__(self, comments: Sequence[Comment]) -> None:
        self.comments = {comment.id: comment for comment in comments}
        places = {video: place for place, video in enumerate(dict.fromkeys(one.video_id for one in comments))}
        self.place = {comment.id: places[comment.video_id] for comment in comments}
        self.weights = draw_videos(len(places))
        self.count = len(places)

    def ratio(self, parts: Mapping[str, tuple[float, float]]) -> Estimate | None:
        """Estimates a ratio of sums.

        Args:
            parts: A comment's id -> its part of the numerator and of the denominator.

        Returns:
            None if the denominator is 0.
        """
        tops, bottoms = [0.0] * self.count, [0.0] * self.count
        for id, (top, bottom) in parts.items():
            tops[self.place[id]] += top
            bottoms[self.place[id]] += bottom
        measured = sum(bottom > 0 for bottom in bottoms)
        return estimate(ratio(tops, bottoms), self.weights)._replace(videos=measured) if measured else None


def wins(
    videos: Videos, nats: Mapping[str, Mapping[str, float]], same: bool | None, echoes: Container[str] = ()
) -> dict[str, tuple[float, float]]:
    """Counts how often a reply is likelier after its own question than after another; equal counts half.

    Args:
        videos: The comments.
        nats: Reply -> question -> nats.
        same: True: other questions about the same video; False: about other videos; None: all.
        echoes: Replies that count half against each.

    Returns:
        Reply -> how often it won, of how often.
    """
    counted = {}
    for id, after in nats.items():
        if id not in after:
            continue
        own, place = after[id], videos.place[id]
        others = [
            value for other, value in after.items()
            if other != id and (same is None or (videos.place[other] == place) == same)
        ]  # fmt: skip
        won = [0.5 if id in echoes or own == other else float(own > other) for other in others]
        counted[id] = (sum(won), float(len(won)))
    return counted


def bits(comments: Mapping[str, Comment], one: Evidence) -> dict[str, tuple[float, float]]:
    """What a contender needs to guess the real replies: a comment's id -> bits, and the characters of its reply."""
    return {
        id: (-after[id] / math.log(2), len(comments[id].messages[-1]["content"])) for id, after in one.real.items()
    }


def estimates(videos: Videos, one: Evidence) -> dict[str, Estimate]:
    """All numbers of a contender that can be measured."""
    comments = videos.comments
    found: dict[str, Estimate | None] = {}
    found["likelihood"] = videos.ratio(bits(comments, one))
    firsts = {id: one.replies[id][0] for id in one.written}
    echoes = {
        id for id, text in firsts.items()
        if texts.is_echo(text, question_of(comments[id])) or "control" in texts.unwanted(text)
    }  # fmt: skip
    for name, nats, halves in (("reading", one.real, ()), ("fitting", one.written, echoes)):
        found[name] = videos.ratio(wins(videos, nats, None, halves))
        found[f"{name}, same video"] = videos.ratio(wins(videos, nats, True, halves))
        found[f"{name}, other videos"] = videos.ratio(wins(videos, nats, False, halves))
    ids = [*comments]
    real, places = [comments[id].messages[-1]["content"] for id in ids], [videos.place[id] for id in ids]
    numbers = range(min(map(len, one.replies.values())))
    for name, make in (("noticed", classifier.by_characters), ("by length", classifier.by_length)):
        sides = [[one.replies[id][number] for id in ids] for number in numbers]
        each = [classifier.auc(real, written, places, make) for written in sides]
        statistic = classifier.mean(each)
        # Half of the videos is asked about.
        asked = (videos.count + 1) // 2
        found[name] = estimate(statistic, videos.weights)._replace(videos=asked) if statistic else None
    return {name: value for name, value in found.items() if value is not None}


def floor_of_noticed(videos: Videos) -> Interval | None:
    """Real replies against other real ones of the same videos."""
    ids = [*videos.comments]
    real, places = [videos.comments[id].messages[-1]["content"] for id in ids], [videos.place[id] for id in ids]
    statistic = classifier.floor(real, places, classifier.by_characters)
    if statistic is None:
        return None
    return estimate(statistic, videos.weights)._replace(videos=(videos.count + 1) // 2).interval()


def describe(
    videos: Videos,
    replies: Mapping[str, Sequence[str]],
    cut: Mapping[str, Sequence[bool]],
    training: Iterable[str] | None,
) -> dict[str, Any]:
    """What can be counted in somebody's replies.

    Args:
        videos: The comments.
        replies: By the comment's id.
        cut: As in `Evidence`; empty for real replies.
        training: Answers of the training data; None if they are not known.

    Returns:
        "shares" name -> an `Interval` of the share of replies; "distinct-2", "characters" (median and mean),
        "commonest" (the ten texts that come most often, and how often), "lengths" and "marks" for pictures.
    """
    rows = [(id, text) for id, several in replies.items() for text in several]
    written = [text for _, text in rows]
    firsts = [several[0] for several in replies.values()]
    flags: dict[str, list[bool]] = {
        "echo": [texts.is_echo(text, question_of(videos.comments[id])) for id, text in rows],
        **{name: [name in texts.unwanted(text) for text in written] for name in texts.UNWANTED},
        "emoticons": [bool(texts.EMOTICON.search(text)) for text in written],
        "emoji": [bool(texts.EMOJI.search(text)) for text in written],
        "empty": [not text for text in written],
    }
    if cut:
        flags["cut"] = [flag for id in replies for flag in cut[id]]
    if training is not None:
        copies = texts.copied(written, training)
        flags |= {f"copied, {how}": [copy == how for copy in copies] for how in ("whole", "part")}
    shares = {}
    for name, values in flags.items():
        parts: dict[str, tuple[float, float]] = {}
        for (id, _), value in zip(rows, values, strict=True):
            top, bottom = parts.get(id, (0.0, 0.0))
            parts[id] = (top + value, bottom + 1)
        shares[name] = videos.ratio(parts).interval()
    equal = dict(zip(replies, texts.repeated_texts(firsts), strict=True))
    shares["equal"] = videos.ratio({id: (float(value), 1.0) for id, value in equal.items()}).interval()
    return {
        "shares": shares,
        "distinct-2": texts.distinct_2(firsts),
        "characters": [median(map(len, written)), mean(map(len, written))],
        "commonest": Counter(firsts).most_common(COMMONEST),
        "lengths": sorted(map(len, written)),
        "marks": texts.marks(written),
    }


def distances(texts_of: Sequence[str], real: Sequence[str]) -> dict[str, float]:
    """How far replies are from real ones in how they are written: characters of length, else 0 (equal) to 1."""
    if not texts_of or not real:
        return dict.fromkeys(("length", "emoticons", "emoji", "punctuation", "beginnings"), math.nan)
    own, theirs = texts.marks(texts_of), texts.marks(real)
    return {"length": texts.length_distance(texts_of, real)} | {
        name: texts.distance(own[name], theirs[name]) for name in own
    }


def compare(numbers: Mapping[str, Mapping[str, Estimate]], pairs: int, videos: int) -> dict[str, Any]:
    """Says of each two contenders which is better at what.

    Args:
        numbers: Contender -> question -> estimate.
        pairs: Real and written replies that the classifier had.
        videos: Theirs, of which it is asked about half.

    Returns:
        Question -> contender -> other contender -> {"verdict", "lead": `Interval`}; the lead is positive where the
        first one is better.
    """
    found: dict[str, Any] = {}
    for question, more_is_better in QUESTIONS.items():
        for one, own in numbers.items():
            for other, theirs in numbers.items():
                if one == other or question not in own or question not in theirs:
                    continue
                lead = own[question] - theirs[question]
                lead = lead if more_is_better else -lead
                amount = (videos, pairs) if question == "noticed" else (lead.videos,)
                said = verdict(lead.interval(), *amount)
                row = found.setdefault(question, {}).setdefault(one, {})
                row[other] = {"verdict": said, "lead": lead.interval()}
    return found


def best_of(verdicts: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those that no other is better than: better in more questions than worse.

    Where they go in a circle, it is those that are better than the most others, less those that are better than them
    (Copeland's rule).

    Args:
        verdicts: From `compare`.
        names: The contenders.

    Returns:
        Their names; none if there is too little data for any verdict.
    """
    said = {
        (one, other): [row[one][other]["verdict"] for row in verdicts.values() if other in row.get(one, {})]
        for one in names for other in names if one != other
    }  # fmt: skip
    if all(verdict == "few" for each in said.values() for verdict in each):  # Or there is one contender only.
        return []

    def lead(one: str, other: str) -> int:
        difference = said[one, other].count("better") - said[one, other].count("worse")
        return (difference > 0) - (difference < 0)

    leads = {one: [lead(one, other) for other in names if other != one] for one in names}
    unbeaten = [name for name in names if min(leads[name]) >= 0]
    return unbeaten or [name for name in names if sum(leads[name]) == max(map(sum, leads.values()))]


def restricted(one: Evidence, ids: Container[str]) -> Evidence:
    """What is known of a contender, of some comments only."""

    def kept(found: Mapping[str, Any]) -> dict[str, Any]:
        return {id: value for id, value in found.items() if id in ids}

    nats = [{id: kept(after) for id, after in kept(found).items()} for found in (one.real, one.written)]
    return Evidence(one.name, one.kind, kept(one.replies), kept(one.cut), *nats)


def add_judged(
    videos: Videos,
    judged: Mapping[tuple[str, str], Mapping[str, tuple[float, float]]],
    scores: dict[str, dict[str, Interval]],
    verdicts: dict[str, Any],
) -> None:
    """Adds what a judge prefers to scores and verdicts, as the question "judged"."""
    all_of: dict[str, dict[str, tuple[float, float]]] = {}
    for pair, found in judged.items():
        kept = {id: part for id, part in found.items() if id in videos.comments}
        lost = {id: (count - won, count) for id, (won, count) in kept.items()}
        for (one, other), parts in ((pair, kept), (pair[::-1], lost)):
            if share := videos.ratio(parts):
                lead = share._replace(value=share.value - 0.5, draws=share.draws - 0.5).interval()
                row = {"verdict": verdict(lead, share.videos), "lead": lead}
                verdicts.setdefault("judged", {}).setdefault(one, {})[other] = row
            for id, (won, count) in parts.items():
                before = all_of.setdefault(one, {}).get(id, (0.0, 0.0))
                all_of[one][id] = (before[0] + won, before[1] + count)
    for name, parts in all_of.items():
        if share := videos.ratio(parts):
            scores[name]["judged"] = share.interval()


def alone(nats: Mapping[str, Mapping[str, float]]) -> int:
    """How many replies were read after one question only."""
    return sum(len(after) < 2 for after in nats.values())


def measure(
    comments: Sequence[Comment],
    evidence: Sequence[Evidence],
    training: Sequence[str] | None,
    judged: Mapping[tuple[str, str], Mapping[str, tuple[float, float]]] | None = None,
) -> dict[str, Any]:
    """Measures all contenders on the comments that all of them have answered.

    Args:
        comments: All.
        evidence: Of each contender.
        training: Answers of the training data; None if they are not known.
        judged: From `utils.evaluate.judge.judge`, if there was a judge.

    Returns:
        What report.json holds.

    Raises:
        ValueError: if there is no comment that all have answered.
    """
    shared = [
        comment for comment in comments
        if all(comment.id in one.replies and (not one.real or comment.id in one.real) for one in evidence)
    ]  # fmt: skip
    if not shared:
        raise ValueError("there is no comment that all contenders have answered.")
    videos = Videos(shared)
    kept = [restricted(one, videos.comments) for one in evidence]
    numbers = {one.name: estimates(videos, one) for one in kept}
    verdicts = compare(numbers, len(shared), videos.count)
    scores = {name: {what: value.interval() for what, value in own.items()} for name, own in numbers.items()}
    add_judged(videos, judged or {}, scores, verdicts)
    real = {id: [comment.messages[-1]["content"]] for id, comment in videos.comments.items()}
    real_texts = [text for [text] in real.values()]
    written = {"real": describe(videos, real, {}, training) | {"distances": distances(*texts.halves(real_texts))}}
    for one in kept:
        apart = distances([several[0] for several in one.replies.values()], real_texts)
        written[one.name] = describe(videos, one.replies, one.cut, training) | {"distances": apart}
    return {
        "comments": len(shared),
        "left_out": len(comments) - len(shared),
        # Replies that were read after other questions too.
        "read": {name: max(len(getattr(one, part)) - alone(getattr(one, part)) for one in kept)
                 for name, part in (("reading", "real"), ("fitting", "written"))},
        "videos": videos.count,
        "contenders": {one.name: one.kind for one in evidence},
        "scores": scores,
        "floor": floor_of_noticed(videos),
        "verdicts": verdicts,
        "best": best_of(verdicts, [*numbers]),
        "texts": written,
    }
