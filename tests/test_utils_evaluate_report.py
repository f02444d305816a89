"""utils/evaluate/report.py: the page opens offline, says in two languages what the numbers are, and runs no reply.

python -m pytest tests/test_utils_evaluate_report.py
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from string import Formatter
from typing import Any

import pytest
from conftest import load_script

from utils.data.held_out import Comment
from utils.evaluate import report_texts
from utils.evaluate.contenders import BASE, FEW_SHOT, STYLE, TUNED
from utils.evaluate.measures import Evidence, measure
from utils.evaluate.report import as_html, as_json, as_text, sentence, side_by_side

IMAGE, SCRIPT = "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>"
EVIL = f"{IMAGE}&amp;\"'"  # The tuned one's name.
NAMES = {EVIL: TUNED, "base": BASE, "style prompt": STYLE, "few-shot": FEW_SHOT}
# Bits per character of the real replies, and out of how many comments the own question is the likelier one.
BITS = {EVIL: 1.0, "base": 2.0, "style prompt": 0.5, "few-shot": 1.0}
PAGE_WIDTH = 1100


def make(videos: int = 12, wild: str = "", each: int = 2) -> tuple[list[Comment], list[Evidence]]:
    """Comments and what contenders made of them; the tuned one finds each reply likelier where it belongs."""
    comments = []
    for number in range(each * videos):
        answer = f"真人第{number}条[doge]，{IMAGE}{wild}" + "哈" * (number % 5)
        question = f"视频标题：第{number // each}个{SCRIPT}\n父评论：{number}{IMAGE}{wild}"
        turns = [("system", IMAGE), ("user", question), ("assistant", answer)]
        messages = [{"role": role, "content": text} for role, text in turns]
        comments.append(Comment(str(number), f"v{number // each}", messages))
    evidence = []
    for name, kind in NAMES.items():
        replies = {one.id: [f"{kind}写的{one.id}{SCRIPT}[<b>x</b>]{wild}"] for one in comments}
        real = {}
        for place, one in enumerate(comments):
            own = -BITS[name] * math.log(2) * len(one.messages[-1]["content"])
            other = comments[(place + each) % len(comments)].id
            real[one.id] = {one.id: own, other: own - 1 if kind == TUNED else own}
        evidence.append(Evidence(name, kind, replies, {id: [False] for id in replies}, real, real))
    return comments, evidence


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """With a judge, who prefers the tuned one to the base in all comments of the first 12 videos."""
    comments, evidence = make()
    judged = {(EVIL, "base"): {one.id: (1.0, 1.0) for one in comments}}
    said = {"judge": {"name": IMAGE, "model": SCRIPT, "pairs": 24, "disagree": 6}}
    return measure(comments, evidence, [IMAGE], judged) | said


@pytest.fixture(scope="module")
def page(measured: dict[str, Any]) -> str:
    return as_html(SCRIPT, measured, side_by_side(*make()))


class Tags(HTMLParser):
    """All that a browser would make of a page.

    Attributes:
        tags: In order, with their attributes.
        text: What can be read, in both languages; `spans` by language.
        inside: What stands in <style> and <script>.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.inside, self.spans = "", "", {"zh": 0, "en": 0}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if (lang := dict(attrs).get("lang")) in self.spans:
            self.spans[lang] += 1

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.inside += data
        else:
            self.text += data


def fields(text: str) -> list[str]:
    return sorted({f"{name}:{form}" for _, name, form, _ in Formatter().parse(text) if name})


def leaves(table: Mapping[str, Any], path: str = "") -> dict[str, list[str]]:
    """Every text's place in a table, and its fields."""
    found: dict[str, list[str]] = {}
    for name, value in table.items():
        found |= leaves(value, f"{path}/{name}") if isinstance(value, Mapping) else {f"{path}/{name}": fields(value)}
    return found


@pytest.mark.parametrize("table", ["KINDS", "TITLES", "MEANINGS", "VERDICTS", "WORDS"])
def test_both_languages_say_the_same(table: str) -> None:
    """The same texts, with the same numbers in them."""
    texts = getattr(report_texts, table)
    assert [*texts] == ["zh", "en"]
    zh, en = leaves(texts["zh"]), leaves(texts["en"])
    assert zh == en and zh
    for place in zh:
        found = {lang: texts[lang] for lang in texts}
        for name in place.strip("/").split("/"):
            found = {lang: part[name] for lang, part in found.items()}
        assert all(found.values()), place


def test_the_page_is_one_file(page: str) -> None:
    """Nothing in it loads anything."""
    parsed = Tags(page)
    known = "html head meta title style body button h1 h2 h3 p div span ul li b br table tr th td script".split()
    assert {tag for tag, _ in parsed.tags} <= {*known, "svg", "path", "circle", "polyline", "text"}
    attributes = {name for _, own in parsed.tags for name in own}
    assert not attributes & {"src", "href", "srcset", "data", "action", "xlink:href", "background", "poster"}
    assert not any(name.startswith("on") for name in attributes)
    assert not any("//" in (value or "") for _, own in parsed.tags for value in own.values())
    assert not re.search(r"url\(|@import|https?:|fetch|import\b", parsed.inside)
    assert [tag for tag, _ in parsed.tags].count("script") == 1


def test_what_people_and_models_wrote_is_text(page: str) -> None:
    """It is neither markup nor lost."""
    assert "<img" not in page and "<script>alert" not in page and "[<b>" not in page
    text = Tags(page).text
    assert f"视频标题：第0个{SCRIPT}\n父评论：0{IMAGE}" in text and f"真人第0条[doge]，{IMAGE}" in text
    assert f"tuned写的0{SCRIPT}[<b>x</b>]" in text and f"Evaluation: {SCRIPT}" in text and EVIL in text
    assert "[<b>x</b>]" in text and f"Take {EVIL}." not in text, "there are two that are not beaten"


def test_names_in_sentences_are_text(measured: dict[str, Any]) -> None:
    """One's own and the others'."""
    for one in (EVIL, "base"):
        said = sentence(measured, "likelihood", one, "en", marked=True)
        assert "<img" not in said and "&lt;img src=x onerror=alert(1)&gt;&amp;amp;" in said


def test_both_languages_are_on_the_page(page: str, measured: dict[str, Any]) -> None:
    spans = Tags(page).spans
    assert spans["zh"] == spans["en"] > 50
    for lang in ("zh", "en"):
        for question in ("likelihood", "reading", "fitting", "noticed", "judged"):
            assert report_texts.TITLES[lang][question].replace("'", "&#x27;") in page
    assert "It compared 24 pairs, and contradicted itself in 25%." in page and "共比了 24 对，其中 25% 两次" in page
    assert "24 held-out comments under 12 videos" in page and "24 条留出的评论，来自 12 个视频" in page


def test_verdicts_by_hand(measured: dict[str, Any]) -> None:
    """All videos are alike in bits per character, so that intervals have no width."""
    assert sentence(measured, "likelihood", EVIL, "en") == (
        f"{EVIL}: 1.00 [1.00, 1.00], better than base (2.00); worse than style prompt (0.50); "
        "against few-shot (1.00) not to be told apart"
    )
    assert sentence(measured, "likelihood", EVIL, "zh") == (
        f"{EVIL}: 1.00 [1.00, 1.00]，比 base (2.00) 更好；比 style prompt (0.50) 更差；与 few-shot (1.00) 分不出高下"
    )
    assert sentence(measured, "reading", "base", "en") == (
        f"base: 50% [50%, 50%], worse than {EVIL} (100%); against style prompt (50%) and few-shot (50%) "
        "not to be told apart"
    )
    # Only one pair was judged, and 24 replies are too few for the classifier.
    assert sentence(measured, "judged", EVIL, "en") == f"{EVIL}: 100% [100%, 100%], better than base (0.0%)"
    assert sentence(measured, "noticed", EVIL, "en").endswith(
        "against base (100%), style prompt (100%) and few-shot (100%) too little data to say"
    )


def test_the_page_says_the_verdicts(page: str, measured: dict[str, Any]) -> None:
    text = Tags(page).text
    for question in ("likelihood", "reading", "fitting", "noticed", "judged"):
        for lang in ("zh", "en"):
            assert text.count(sentence(measured, question, EVIL, lang)) in (1, 2), (question, lang)
    assert '<b class="better">better</b> than base (2.00)' in page
    assert '<b class="worse">更差</b>' in page and '<b class="few">too little data to say</b>' in page


def test_too_little_data() -> None:
    """With nine videos no one is called better, however large the difference."""
    comments, evidence = make(9)
    few = measure(comments, evidence, None)
    assert few["best"] == []
    assert sentence(few, "likelihood", "base", "en") == (
        f"base: 2.00 [2.00, 2.00], against {EVIL} (1.00), style prompt (0.50) and few-shot (1.00) "
        "too little data to say"
    )
    text = Tags(as_html("E", few, [])).text
    assert "There is too little data to say. It takes at least 10 videos" in text
    assert "数据太少，还说不出该用哪个。至少要 10 个视频" in text and "better than" not in text


@pytest.mark.parametrize(("videos", "each"), [(1, 2), (2, 1), (12, 2)])
def test_the_file_for_programs(videos: int, each: int, tmp_path: Path, capsys: Any) -> None:
    """Valid JSON without NaN, even where nothing can be said; the page and the terminal hold its numbers."""
    comments, evidence = make(videos, each=each)
    found = measure(comments, evidence, [])
    load_script("evaluate.py").write_report(tmp_path, found, side_by_side(comments, evidence))

    def no_number(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    said = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=no_number)
    assert said["comments"] == videos * each and said["videos"] == videos and said["contenders"] == NAMES
    value, low, high = said["scores"]["base"]["likelihood"]
    assert value == pytest.approx(2) and [low, high] == ([None, None] if videos == 1 else pytest.approx([2, 2]))
    told, shown = capsys.readouterr().out, Tags((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "nan" not in told.lower()
    cell = "2.00" if videos == 1 else "2.00 [2.00, 2.00]"
    (line,) = [line for line in told.splitlines() if line.startswith("base ")]
    assert cell in line and cell in shown
    assert f"The whole page: {tmp_path}/report.html" in told


def test_what_is_no_number() -> None:
    assert as_json({"a": (math.nan, 1.5), "b": [{"c": math.nan}]}) == {"a": [None, 1.5], "b": [{"c": None}]}


def test_the_terminal_holds_the_same_numbers(measured: dict[str, Any], page: str) -> None:
    told, shown = as_text(measured), Tags(page).text
    rows = {name: next(line for line in told.splitlines()[2:] if line.startswith(name)) for name in NAMES}
    assert "2.00 [2.00, 2.00]" in rows["base"] and "50% [50%, 50%]" in rows["base"]
    assert "0.50 [0.50, 0.50]" in rows["style prompt"] and "100% [100%, 100%]" in rows[EVIL]
    numbers = re.findall(r"[\d.]+%? \[[\d.]+%?, [\d.]+%?\]", told)
    assert len(numbers) >= 16 and all(number in shown for number in numbers)
    for question in ("likelihood", "reading", "fitting", "noticed", "judged"):
        assert sentence(measured, question, EVIL, "en") in told


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A headless Chromium that speaks Chinese."""
    if not (CHROMIUM and CHROMEDRIVER):
        missing = "no Chromium with its driver: sudo apt-get install chromium chromium-driver"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",  # Which root needs.
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--window-size={PAGE_WIDTH},1000",
        f"--user-data-dir={tmp_path / 'browser'}",
    ):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"intl.accept_languages": "zh-CN"})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with webdriver.Chrome(options, Service(CHROMEDRIVER)) as driver:
        yield driver


# What is wider than the window, aside from what stands in a table, which can be scrolled.
TOO_WIDE = """
return [...document.querySelectorAll("body *")].filter(one => !one.closest("table"))
  .filter(one => one.getBoundingClientRect().right > innerWidth || one.getBoundingClientRect().left < 0)
  .map(one => one.outerHTML.slice(0, 200));
"""


@pytest.mark.slow
def test_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """No reply is more than text, the button changes the language, and the page is no wider than its window."""
    from selenium.common.exceptions import NoAlertPresentException

    comments, evidence = make(wild="长" * 300 + "long" * 150)
    long = "a" * 150  # A folder's name.
    evidence[0] = evidence[0]._replace(name=long)
    found = measure(comments, evidence, [])
    (tmp_path / "report.html").write_text(as_html(SCRIPT, found, side_by_side(comments, evidence)), encoding="utf-8")
    address = (tmp_path / "report.html").as_uri()
    browser.get(address)
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.text  # noqa: B018
    assert not browser.execute_script("return document.images.length")
    assert browser.execute_script("return document.scripts.length") == 1
    entries = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = {entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"}
    assert {url for url in sent if not url.startswith(("chrome", "data:"))} == {address}

    def read() -> str:
        return browser.execute_script("return document.body.innerText")

    titles = {lang: report_texts.TITLES[lang]["reading"] for lang in ("zh", "en")}
    (button,) = browser.find_elements("css selector", "button")
    for lang, other in (("zh", "en"), ("en", "zh"), ("zh", "en")):
        assert titles[lang] in read() and titles[other] not in read()
        assert f"tuned写的0{SCRIPT}" in read() and long in read()
        assert browser.execute_script("return innerWidth") == PAGE_WIDTH
        assert browser.execute_script(TOO_WIDE) == []
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert browser.execute_script(
            "return [...document.querySelectorAll('table')].every(t => t.getBoundingClientRect().right <= innerWidth)"
        )
        button.click()
