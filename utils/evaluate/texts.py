"""What can be counted in replies: repetition, echoes, copies, what should not be there, and how they are written."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from utils.data.contacts import CONTACT

COPY_CHARACTERS = 15  # So many in a row that also stand in a training answer are copied.
ECHO_CHARACTERS = 4  # A shorter run that stands in the question too is a word that both use.
BEGINNING_CHARACTERS = 2  # Chinese writes no spaces: about a word.
EMOTICON = re.compile(r"\[[^\[\]\s]{1,12}\]")
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff]")
# Looked for in NFKC, where full-width letters and digits are plain ones.
UNWANTED = {
    "contact": CONTACT,
    "link": re.compile(
        r"https?://|www\.|b23\.tv|[a-z0-9-]{2,}\.(?:com|cn|net|org|top|xyz|vip|cc)\b", re.IGNORECASE | re.ASCII
    ),
    # Of chat templates, and of the lines in which a comment is asked for.
    "control": re.compile(
        r"<\|[^|<>]{1,30}\|>|<<SYS>>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn|/?think)>|\[/?INST\]"
        r"|### (?:User|Assistant):|(?:视频标题|视频简介|父评论)[:：]"
    ),
}


def normalised(text: str) -> str:
    """A text without spaces and with one form of each letter, so that equal texts are equal."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def unwanted(text: str) -> set[str]:
    """Which of `UNWANTED` a text holds."""
    plain = unicodedata.normalize("NFKC", text)
    return {name for name, pattern in UNWANTED.items() if pattern.search(plain)}


def distinct_2(texts: Iterable[str]) -> float:
    """Part of all pairs of neighbouring characters that are different ones (distinct-2, arXiv 1510.03055)."""
    pairs = [pair for text in texts for pair in zip(text, text[1:], strict=False)]
    return len(set(pairs)) / max(len(pairs), 1)


def repeated_texts(texts: Sequence[str]) -> list[bool]:
    """Whether each text was written for another question too, spaces and forms of letters aside."""
    counts = Counter(map(normalised, texts))
    return [counts[normalised(text)] > 1 for text in texts]


def is_echo(reply: str, question: str) -> bool:
    """Whether half of a reply or more repeats what it answers, in runs of `ECHO_CHARACTERS` or more."""
    reply, question = normalised(reply), normalised(question)
    runs = {question[start : start + ECHO_CHARACTERS] for start in range(len(question) - ECHO_CHARACTERS + 1)}
    repeated: set[int] = set()
    for start in range(len(reply) - ECHO_CHARACTERS + 1):
        if reply[start : start + ECHO_CHARACTERS] in runs:
            repeated.update(range(start, start + ECHO_CHARACTERS))
    return bool(reply) and 2 * len(repeated) >= len(reply)


def copied(replies: Sequence[str], training: Iterable[str]) -> list[str]:
    """Finds replies that stand in the training data.

    Args:
        replies: What a model wrote.
        training: Answers of the training data; gone through once, and never kept.

    Returns:
        For each reply "whole", if it is one of the answers, "part", if `COPY_CHARACTERS` of it stand in one, or "".
    """
    texts = [normalised(reply) for reply in replies]
    parts = [_parts(text) for text in texts]
    wanted, wholes = set().union(*parts), set(texts)
    found: set[str] = set()
    found_wholes: set[str] = set()
    for answer in map(normalised, training):
        found_wholes |= {answer} & wholes
        found |= _parts(answer) & wanted
    return ["whole" if text in found_wholes and text else "part" if own & found else ""
            for text, own in zip(texts, parts, strict=True)]  # fmt: skip


def _parts(text: str) -> set[str]:
    return {text[start : start + COPY_CHARACTERS] for start in range(len(text) - COPY_CHARACTERS + 1)}


def marks(texts: Iterable[str]) -> dict[str, Counter[str]]:
    """Counts how replies are written.

    Returns:
        "emoticons" ([doge] and its kin), "emoji", "punctuation" and the "beginnings" of replies.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("emoticons", "emoji", "punctuation", "beginnings")}
    for text in texts:
        counts["emoticons"].update(EMOTICON.findall(text))
        counts["emoji"].update(EMOJI.findall(text))
        plain = EMOTICON.sub("", text)
        counts["punctuation"].update(letter for letter in plain if unicodedata.category(letter)[0] == "P")
        emoticon = EMOTICON.match(text)
        counts["beginnings"][emoticon[0] if emoticon else normalised(text)[:BEGINNING_CHARACTERS]] += 1
    return counts


def distance(one: Counter[str], two: Counter[str]) -> float:
    """Jensen-Shannon distance of two distributions, from 0 (equal) to 1 (nothing in common); NaN where one is empty."""
    from scipy.spatial.distance import jensenshannon

    names = sorted(one.keys() | two.keys())
    if not one.total() or not two.total():
        return float("nan") if one.total() or two.total() else 0.0
    return float(jensenshannon([one[name] for name in names], [two[name] for name in names], base=2))


def length_distance(one: Sequence[str], two: Sequence[str]) -> float:
    """By how many characters one distribution of lengths is moved to become the other, on average (Wasserstein)."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance([*map(len, one)], [*map(len, two)]))


def halves(texts: Sequence[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """Cuts texts at random in two, to see how far apart two samples of the same are."""
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[number] for number in order[::2]], [texts[number] for number in order[1::2]]
