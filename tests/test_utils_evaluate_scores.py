"""utils/evaluate/scores.py: scores by hand, as a table and a picture.

python -m pytest tests/test_utils_evaluate_scores.py
"""

from pathlib import Path

import pytest

from utils.evaluate.scores import as_markdown, compare_texts, plot_comparison

ROWS = [
    {"prompt": "子丑寅卯", "student": "甲乙丙丁", "real": "甲乙戊丁"},
    {"prompt": "辰巳午未", "student": "好看", "real": "好看"},
]


def test_scores_by_hand() -> None:
    """Of 甲乙丙丁 and 甲乙戊丁 three characters follow one another in both: F = 3/4; the second text is equal: 1.

    chrF counts all texts together, n-grams of 1 to 6 characters as far as there are any; both have as many, so that
    precision = recall: 1-grams (3 + 2) / 6, 2-grams (1 + 1) / 4, none of 2 and of 1 longer ones.
    """
    table = compare_texts(ROWS, ["student"], "real")
    assert table["student"]["ROUGE-L"] == pytest.approx((0.75 + 1) / 2)
    assert table["student"]["chrF"] == pytest.approx((5 / 6 + 2 / 4) / 4, abs=1e-3)
    assert (table["student"]["mean characters"], table["student"]["median"]) == (3, 3)
    assert table["real"]["chrF"] == table["real"]["ROUGE-L"] == pytest.approx(1)


def test_echoes_and_equal_texts() -> None:
    """Of two texts both are equal to one another, and one repeats its prompt."""
    rows = [{"prompt": "三月的旧书摊", "student": "三月的旧书摊", "real": "嗯"}]
    rows += [{"prompt": "另一个", "student": "三月的旧书摊", "real": "啊"}]
    table = compare_texts(rows, ["student"], "real")
    assert (table["student"]["equal"], table["student"]["echo"]) == (1, 0.5)
    assert (table["real"]["equal"], table["real"]["echo"]) == (0, 0)


def test_texts_without_anything_in_common() -> None:
    """Replies may be empty too."""
    rows = [{"prompt": "", "student": "", "real": "甲"}, {"prompt": "", "student": "乙", "real": "丙"}]
    table = compare_texts(rows, ["student"], "real")
    assert table["student"]["chrF"] == table["student"]["ROUGE-L"] == 0


def test_table_and_picture(tmp_path: Path) -> None:
    """The real texts are not held against themselves."""
    table = compare_texts(ROWS, ["student"], "real")
    lines = as_markdown(table).splitlines()
    assert lines[2] == "| student | 0.333 | 0.875 | 1.000 | 0.000 | 0.000 | 3.0 | 3 |"
    assert lines[3] == "| real |  |  | 1.000 | 0.000 | 0.000 | 3.0 | 3 |"
    plot_comparison(ROWS, table, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 5000
