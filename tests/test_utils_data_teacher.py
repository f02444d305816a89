"""utils/data/teacher.py: the example's teachers can be read, and how long a teacher asks to wait.

python -m pytest tests/test_utils_data_teacher.py
"""

import time

import pytest
from conftest import ROOT

from utils.data.teacher import read_teacher, retry_after


def test_the_example_teachers_can_be_read() -> None:
    path = ROOT / "deepspeed_distill/teacher_config.example.yaml"
    for name in ("deepseek-chat", "qwen-plus", "local"):
        assert read_teacher(path, name).base_url.startswith("http")


@pytest.mark.parametrize("wait", ["0.4", "date"])
def test_the_teacher_says_how_long_to_wait(wait: str) -> None:
    """A number, or a date, which is whole seconds."""
    value = wait if wait != "date" else time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 5))
    assert retry_after({"retry-after": value}) == pytest.approx(0.4 if wait != "date" else 4.5, abs=0.6)


@pytest.mark.parametrize("value", [None, "", "soon"])
def test_no_word_of_waiting(value: str | None) -> None:
    assert retry_after({"retry-after": value} if value is not None else {}) is None
