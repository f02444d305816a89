"""Documents that are nearly the same: most of their runs of letters are in both.

MinHash (Broder 1997) with locality-sensitive hashing, by datasketch, as corpora are cleaned (arXiv 2107.06499, appendix
A). Comments have their own way (near_repeats.py): pairs of characters, of which long documents have many in common.
"""

from collections.abc import Iterable

import numpy as np

RUN_LETTERS = 5
NEAR = 0.7  # Jaccard similarity of near documents' runs, as estimated from
PERMUTATIONS = 128  # hashes: +- 0.04.
# Documents with all five hashes of one of 25 bands in common are compared: of those that are as near as `NEAR` 99 %.
BANDS = (25, 5)
RUNS_AT_ONCE = 1 << 14  # Each takes a kilobyte then.
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # Odd.


def near_documents(documents: Iterable[tuple[int, str]], most: int) -> list[int]:
    """Finds documents that are like `most` earlier ones that stay. Each that stays takes 9 KB.

    Args:
        documents: Their numbers and letters, folded. Those with less than `RUN_LETTERS` are like none.
        most: How many of those that are alike stay, the first ones.

    Returns:
        The numbers of the others.
    """
    from datasketch import MinHash, MinHashLSH

    empty, found = MinHash(PERMUTATIONS, hashfunc=int), []
    kept, index = {}, MinHashLSH(num_perm=PERMUTATIONS, params=BANDS)
    for number, letters in documents:
        runs = hashed_runs(letters)
        if not len(runs):
            continue
        prints = empty.copy()
        for start in range(0, len(runs), RUNS_AT_ONCE):
            prints.update_batch(runs[start : start + RUNS_AT_ONCE])
        alike = sum(np.mean(prints.hashvalues == kept[other]) >= NEAR for other in index.query(prints))
        if alike >= most:
            found.append(number)
        else:
            kept[number] = prints.hashvalues
            index.insert(number, prints, check_duplication=False)
    return found


def hashed_runs(letters: str) -> np.ndarray:
    """Hashes of all runs of letters, each once.

    Returns:
        (R,) uint32.
    """
    codes = np.frombuffer(letters.encode("utf-32-le", errors="replace"), dtype=np.uint32).astype(np.uint64)
    if len(codes) < RUN_LETTERS:
        return np.zeros(0, dtype=np.uint32)
    mixed = np.zeros(len(codes) - RUN_LETTERS + 1, dtype=np.uint64)
    for place in range(RUN_LETTERS):
        mixed = (mixed + codes[place : place + len(mixed)]) * FACTOR
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))
