"""utils/data/near_documents.py: which documents are nearly the same, of texts in two languages.

python -m pytest tests/test_utils_data_near_documents.py
"""

import random
import re

import numpy as np
import pytest
from conftest import ROOT

from utils.data import near_documents
from utils.data.near_documents import NEAR, hashed_runs
from utils.data.near_documents import near_documents as find

SIZE = 3000


def documents(name: str) -> list[str]:
    """Parts of a README as documents, letters only."""
    text = re.sub(r"[\W\d_]", "", (ROOT / name).read_text(encoding="utf-8").lower())
    return [text[start : start + SIZE] for start in range(0, len(text) - SIZE, SIZE)]


def changed(text: str, share: float, seed: int = 0) -> str:
    """A text with a part of its words, of eight letters, replaced."""
    draw = random.Random(seed)
    words = [text[start : start + 8] for start in range(0, len(text), 8)]
    return "".join("replaced" if draw.random() < share else word for word in words)


def similarity(one: str, two: str) -> float:
    """Jaccard's, by sets of the runs themselves."""
    mine, others = ({text[at : at + 5] for at in range(len(text) - 4)} for text in (one, two))
    return len(mine & others) / len(mine | others)


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_other_documents_stay(name: str) -> None:
    """Long ones on one subject in one language are no repeats; those with 3 % of their words changed are."""
    originals = documents(name)
    assert len(originals) > 4
    assert find(enumerate(originals), 1) == []
    near = [changed(text, 0.03) for text in originals]
    found = find(enumerate(originals + near), 1)
    assert set(found) <= {*range(len(originals), 2 * len(originals))} and len(found) >= 0.9 * len(near)
    far = [changed(text, 0.4) for text in originals]
    assert max(map(similarity, originals, far)) < NEAR - 0.1
    assert find(enumerate(originals + far), 1) == []


def test_so_many_stay() -> None:
    text, other = documents("README.md")[:2]
    numbered = [(10, text), (11, other), (12, changed(text, 0.01)), (13, changed(text, 0.01, 1)), (14, text)]
    assert find(numbered, 1) == [12, 13, 14]
    assert find(numbered, 2) == [13, 14]
    assert find(numbered, 4) == []
    assert find([(1, "甲"), (2, "甲"), (3, "")], 1) == [], "without a run a document is like no other"


def test_runs_are_hashed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many hashes as there are runs, the same wherever a run stands; parts of a document add up."""
    text = documents("README_zh.md")[0]
    runs = {text[at : at + 5] for at in range(len(text) - 4)}
    assert len(hashed_runs(text)) == len(runs)
    assert len(np.intersect1d(hashed_runs("前面" + text), hashed_runs(text))) == len(runs)
    assert len(hashed_runs("甲乙丙丁")) == 0 and len(hashed_runs("甲乙丙丁戊")) == 1
    both = [(1, text), (2, changed(text, 0.02))]
    whole = find(both, 1)
    monkeypatch.setattr(near_documents, "RUNS_AT_ONCE", 100)
    assert find(both, 1) == whole == [2]
