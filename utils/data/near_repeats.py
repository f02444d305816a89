"""Texts that are nearly the same, among millions: those with a hash in common are compared.

Shapes: T texts.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

RUN_LETTERS = 4  # Texts that may be near have the smallest hash of such runs in common (MinHash, Broder 1997).
HASHES = 4
# Long texts with an alphabet have nearly all pairs of its letters in common, whatever they say: instead of a pair of
# such letters the run of five that begins with it counts.
FIRST_WITHOUT_ALPHABET, ALPHABET_RUN = 0x2E80, 5
ALPHABET_PAIR = re.compile(f"[^{chr(FIRST_WITHOUT_ALPHABET)}-{chr(sys.maxunicode)}]{{2}}")
NEAR_PAIRS = 0.4  # Jaccard similarity of near texts' pairs of neighbouring letters,
NEAR_PAIRS_SHORT, SHORT_PAIRS = 0.6, 9  # and of texts with fewer than so many pairs.
BITMAP_WORDS = 4  # Of 64 bits, one for each pair by its hash: what is not near by these is not compared in full.
# By how many pairs a text has.
NEEDED = np.where(np.arange(64 * BITMAP_WORDS + 1) < SHORT_PAIRS, NEAR_PAIRS_SHORT, NEAR_PAIRS)
KINDS = 6  # Texts with a hash in common are sorted into so many kinds; the rest are not near.
CHUNK_TEXTS = 100_000  # Taken from the database at once,
HASHED_TEXTS = 10_000  # and hashed: arrays that stay in a core's cache.
FACTORS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)  # Odd, of xxHash.


class Prints(NamedTuple):
    """What is compared of T texts.

    Attributes:
        hashes: (`HASHES`, T) uint32, the smallest ones of each text's runs of letters, in several ways of hashing.
        bitmaps: (`BITMAP_WORDS`, T) uint64, which pairs of neighbouring letters it has.
    """

    hashes: np.ndarray
    bitmaps: np.ndarray


def near_repeats(con: "DuckDBPyConnection", most: int) -> np.ndarray:
    """Finds texts that are like `most` earlier ones that stay, such as an advertisement with small changes.

    Args:
        con: With the table `texts` (letters); a text's number is its row, from 0.
        most: How many of those that are alike stay, the first ones.

    Returns:
        (N,) int64, the numbers of the others.
    """
    count = con.execute("SELECT count(*) FROM texts").fetchone()[0]
    if count <= most:
        return np.zeros(0, dtype=np.int64)
    parts: list[Future[Prints]] = []
    with ThreadPoolExecutor(2) as pool:  # Comparing takes some 100 bytes a text in each.
        for start in range(0, count, CHUNK_TEXTS):
            some = "SELECT letters FROM texts WHERE rowid >= $1 AND rowid < $2 ORDER BY rowid"
            letters = con.execute(some, [start, start + CHUNK_TEXTS]).fetchnumpy()["letters"].tolist()
            if len(parts) > 1:
                parts[-2].result()  # No more than two wait in memory.
            parts.append(pool.submit(fingerprints, letters))
        prints = joined([part.result() for part in parts])
        pairs = np.concatenate([*pool.map(partial(alike, bitmaps=prints.bitmaps), prints.hashes)])
    groups = grouped(pairs, count, most)
    wanted = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *groups]))
    texts = dict(zip(wanted.tolist(), con.execute(
        "SELECT letters FROM texts WHERE rowid IN (SELECT unnest($1)) ORDER BY rowid", [wanted]
    ).fetchnumpy()["letters"].tolist(), strict=True))  # fmt: skip
    return np.array(
        [text for group in groups for text in beyond(group.tolist(), texts, prints.bitmaps[:, group], most)],
        dtype=np.int64,
    )


def fingerprints(texts: list[str]) -> Prints:
    """Hashes runs and pairs of letters.

    Args:
        texts: T of them, none shorter than a run.
    """
    return joined([_fingerprints(texts[start : start + HASHED_TEXTS]) for start in range(0, len(texts), HASHED_TEXTS)])


def joined(parts: list[Prints]) -> Prints:
    """Puts the prints of some texts behind those of others."""
    return Prints(*(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)))


def _fingerprints(texts: list[str]) -> Prints:
    letters = np.frombuffer("".join(texts).encode("utf-32-le", errors="replace"), dtype=np.uint32)
    ends = np.cumsum([*map(len, texts)])
    starts = np.concatenate([[0], ends[:-1]])

    def mixed_runs(length: int) -> np.ndarray:
        runs = np.zeros(len(letters), dtype=np.uint32)
        for place in range(length):
            runs[: len(letters) - place] = runs[: len(letters) - place] * np.uint32(FACTORS[0]) + letters[place:]
        return (runs ^ (runs >> np.uint32(15))) * np.uint32(FACTORS[1])

    runs, hashes = mixed_runs(RUN_LETTERS), []
    # Runs that begin in one text and end in the next are none.
    beyond = (ends[:, None] - np.arange(1, RUN_LETTERS)).ravel()
    for factor in FACTORS[-HASHES:]:
        mixed = (runs ^ (runs >> np.uint32(13))) * np.uint32(factor)
        mixed ^= mixed >> np.uint32(16)
        mixed[beyond] = np.iinfo(np.uint32).max
        hashes.append(np.minimum.reduceat(mixed, starts))
    place = mixed_runs(2) >> np.uint32(32 - 8)
    alphabet = letters < FIRST_WITHOUT_ALPHABET
    alphabet[:-1] &= alphabet[1:]
    alphabet[ends - 1] = False
    if alphabet.any():
        place[alphabet] = mixed_runs(ALPHABET_RUN)[alphabet] >> np.uint32(32 - 8)
    bit, word = np.uint64(1) << (place & np.uint32(63)).astype(np.uint64), place >> np.uint32(6)
    bit[ends - 1] = 0
    last = (ends[:, None] - np.arange(2, ALPHABET_RUN)).ravel()  # No text is shorter than a run of four.
    bit[last[alphabet[last]]] = 0
    bitmaps = [np.bitwise_or.reduceat(np.where(word == number, bit, 0), starts) for number in range(BITMAP_WORDS)]
    return Prints(np.stack(hashes), np.stack(bitmaps))


def alike(hashes: np.ndarray, bitmaps: np.ndarray) -> np.ndarray:
    """Pairs texts that have a hash, and most pairs of letters by their bitmaps, in common.

    Args:
        hashes: (T,).
        bitmaps: (`BITMAP_WORDS`, T).

    Returns:
        (N, 2) int64: a text, and the first one of its kind.
    """
    order, found, bits = np.argsort(hashes, kind="stable"), [], count_bits(bitmaps)
    for _ in range(KINDS):
        begins = np.flatnonzero(np.diff(hashes[order], prepend=~hashes[order[:1]]))
        sizes = np.diff(begins, append=len(order))
        order, sizes = order[np.repeat(sizes > 1, sizes)], sizes[sizes > 1]
        if not len(order):
            break
        places = np.cumsum(sizes) - sizes
        first = np.repeat(order[places], sizes)
        shared = count_bits(words[order] & words[first] for words in bitmaps)
        same = may_be_near(shared, bits[order], bits[first])
        same[places] = False  # With itself.
        found.append(np.stack([order[same], first[same]], axis=1))
        same[places] = True
        order = order[~same]
    return np.concatenate(found) if found else np.zeros((0, 2), dtype=np.int64)


def count_bits(bitmaps: Iterable[np.ndarray]) -> np.ndarray:
    """Counts the bits of each text's bitmap.

    Args:
        bitmaps: `BITMAP_WORDS` times (T,).

    Returns:
        (T,) uint16.
    """
    return sum(np.bitwise_count(words).astype(np.uint16) for words in bitmaps)


def may_be_near(shared: np.ndarray, mine: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether enough of two texts' bits are the same: which they have in common, and how many each has."""
    return shared >= NEEDED[np.minimum(mine, others)] * (mine + others - shared)


def grouped(pairs: np.ndarray, count: int, most: int) -> list[np.ndarray]:
    """Puts texts together that pairs connect.

    Args:
        pairs: (N, 2).
        count: T.
        most: Smaller groups, and those of so many, are left out.

    Returns:
        The texts of each group, in order.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    _, group = connected_components(coo_array((np.ones(len(pairs), dtype=bool), (*pairs.T,)), (count, count)), False)
    sizes = np.bincount(group)
    members = np.flatnonzero(sizes[group] > most)
    members = members[np.argsort(group[members], kind="stable")]
    return np.split(members, np.flatnonzero(np.diff(group[members])) + 1) if len(members) else []


def beyond(group: list[int], texts: Mapping[int, str], bitmaps: np.ndarray, most: int) -> list[int]:
    """Finds the texts of a group that are near `most` earlier ones that stay.

    Args:
        group: Numbers of texts, in order.
        texts: By number.
        bitmaps: (`BITMAP_WORDS`, the group's texts).
        most: How many are enough.
    """
    found, stay, kept, bits = [], [], np.empty_like(bitmaps), count_bits(bitmaps)
    stay_bits = np.empty_like(bits)
    for place, text in enumerate(group):
        shared = count_bits(words[: len(stay)] & word for words, word in zip(kept, bitmaps[:, place], strict=True))
        near = np.flatnonzero(may_be_near(shared, bits[place], stay_bits[: len(stay)])).tolist()
        if len([*islice((one for one in near if are_near(texts[text], texts[stay[one]])), most)]) == most:
            found.append(text)
        else:
            kept[:, len(stay)], stay_bits[len(stay)] = bitmaps[:, place], bits[place]
            stay.append(text)
    return found


def are_near(one: str, two: str) -> bool:
    """Whether enough pairs of neighbouring letters of two texts are the same."""
    mine, others = pairs_of(one), pairs_of(two)
    needed = NEAR_PAIRS_SHORT if min(len(mine), len(others)) < SHORT_PAIRS else NEAR_PAIRS
    return len(mine & others) >= needed * len(mine | others)


def pairs_of(text: str) -> set[str]:
    """A text's pairs of neighbouring letters; of those of an alphabet runs of `ALPHABET_RUN`."""
    if not ALPHABET_PAIR.search(text):
        return {*map("".join, pairwise(text))}
    last, first = len(text) - ALPHABET_RUN, chr(FIRST_WITHOUT_ALPHABET)
    found = set()
    for place, (one, two) in enumerate(pairwise(text)):
        if one >= first or two >= first:
            found.add(one + two)
        elif place <= last:
            found.add(text[place : place + ALPHABET_RUN])
    return found
