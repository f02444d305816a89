"""What was measured as one page that opens offline, in Chinese and English, and as lines for the terminal."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape as escape_html
from typing import Any

from utils.data.held_out import Comment
from utils.evaluate.intervals import LEAST_PAIRS, LEAST_VIDEOS, Interval
from utils.evaluate.likelihood import OTHERS, question_of
from utils.evaluate.measures import QUESTIONS, Evidence
from utils.evaluate.report_texts import KINDS, MEANINGS, TITLES, VERDICTS, WORDS

EXAMPLES = 12
LANGUAGES = ("zh", "en")
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")

STYLE = """
body { font: 16px/1.6 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "WenQuanYi Zen Hei", sans-serif;
  max-width: 1060px; margin: 2em auto; padding: 0 1em; color: #222; overflow-wrap: break-word }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em } h3 { font-size: 1em; margin: 1.2em 0 .3em }
table { border-collapse: collapse; font-size: .9em; margin: .5em 0; display: block; overflow-x: auto }
td, th { padding: .25em .7em; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top }
th { font-weight: 600 } td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.note { color: #666; font-size: .88em }
.answer { background: #f3f7fb; border-left: 4px solid #1f77b4; padding: .8em 1em }
.better { color: #17803d } .worse { color: #b42318 } .equal, .few { color: #666 }
.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 8em }
.zh .en, .en .zh { display: none } .bar { display: inline-block; height: .6em; background: #9ec5e8; margin-right: .4em }
button { float: right; font: inherit; font-size: .85em }
"""
SCRIPT = """
const page = document.documentElement;
page.className = /^zh/.test(navigator.language) ? "zh" : "en";
document.querySelector("button").onclick = () => { page.className = page.className === "zh" ? "en" : "zh"; };
"""


def escape(text: str) -> str:
    """A text for HTML; control characters, which models can write, would make the page a binary file."""
    return escape_html("".join(letter for letter in text if letter.isprintable() or letter in "\n\t"))


def both(text: Mapping[str, str] | Any) -> str:
    """A text in both languages, of which the page shows one."""
    return "".join(f'<span class="{lang}" lang="{lang}">{text[lang]}</span>' for lang in LANGUAGES)


def words(name: str, /, **values: Any) -> dict[str, str]:
    """One of `WORDS` in both languages."""
    return {lang: escape(WORDS[lang][name].format(**values)) for lang in LANGUAGES}


def said(table: Mapping[str, Mapping[str, str]], name: str, /, **values: Any) -> dict[str, str]:
    """One text of a table by language."""
    return {lang: escape(table[lang][name].format(**values)) for lang in LANGUAGES}


def number(question: str, value: float) -> str:
    """Writes one number."""
    if math.isnan(value):
        return "–"
    return f"{value:.2f}" if question == "likelihood" else f"{value:.0%}" if abs(value) >= 0.0995 else f"{value:.1%}"


def with_interval(question: str, found: Interval | None) -> str:
    """Writes a number with its interval."""
    if found is None:
        return "–"
    if math.isnan(found.low) or found == (0, 0, 0):
        return number(question, found.value)
    return f"{number(question, found.value)} [{number(question, found.low)}, {number(question, found.high)}]"


def names_of(names: Sequence[str], lang: str) -> str:
    """Names in a sentence."""
    if len(names) < 2:
        return "".join(names)
    return f"{('、' if lang == 'zh' else ', ').join(names[:-1])}{' 和 ' if lang == 'zh' else ' and '}{names[-1]}"


def answer(measured: Mapping[str, Any], lang: str) -> str:
    """Which one to take, in a sentence."""
    text, best = WORDS[lang], measured["best"]
    if not best:
        return text["none"].format(videos=LEAST_VIDEOS, pairs=LEAST_PAIRS)
    apart = {
        row[one][other]["verdict"] for row in measured["verdicts"].values() for one in best for other in best
        if other in row.get(one, {})
    }  # fmt: skip
    kind = "take" if len(best) == 1 else "depends" if apart & {"better", "worse"} else "several"
    return text[kind].format(best=names_of(best, lang))


def against_each(measured: Mapping[str, Any], one: str, lang: str) -> list[str]:
    """In how many questions a contender is better and worse than each other."""
    lines: list[str] = []
    if not measured["best"]:
        return lines
    for other in measured["contenders"]:
        said_of = [row[one][other]["verdict"] for row in measured["verdicts"].values() if other in row.get(one, {})]
        if not said_of:
            continue
        better, worse = said_of.count("better"), said_of.count("worse")
        rest = len(said_of) - better - worse
        lines.append(WORDS[lang]["counts"].format(one=one, other=other, better=better, worse=worse, rest=rest))
    return lines


def direction(question: str) -> str:
    """"more" or "less", whichever is better."""
    return "more" if QUESTIONS.get(question, True) else "less"


def in_view(measured: Mapping[str, Any]) -> str:
    """The contender of whom the first lines tell: the best one; of several a tuned one."""
    names = measured["best"] or [*measured["contenders"]]
    return next((name for name in names if measured["contenders"][name] in ("tuned", "api")), names[0])


def sentence(measured: Mapping[str, Any], question: str, one: str, lang: str, marked: bool = False) -> str:
    """Says how a contender compares with all others in one question, with the numbers."""
    by_verdict: dict[str, list[str]] = {}
    for other, row in measured["verdicts"].get(question, {}).get(one, {}).items():
        score = measured["scores"][other].get(question)
        told = f"{other} ({number(question, score.value)})" if score else other
        by_verdict.setdefault(row["verdict"], []).append(told)
    parts = []
    for verdict in ("better", "worse", "equal", "few"):
        if others := by_verdict.get(verdict):
            word = VERDICTS[lang][verdict]
            word = f'<b class="{verdict}">{word}</b>' if marked else word
            named = names_of([escape(other) if marked else other for other in others], lang)
            joins = {"zh": f"比 {named} {word}", "en": f"{word} than {named}"}
            if verdict in ("equal", "few"):
                joins = {"zh": f"与 {named} {word}", "en": f"against {named} {word}"}
            parts.append(joins[lang])
    name = escape(one) if marked else one
    own = with_interval(question, measured["scores"][one].get(question))
    return f"{name}: {own}{'，' if lang == 'zh' else ', '}{('；' if lang == 'zh' else '; ').join(parts)}"


def asked(measured: Mapping[str, Any]) -> list[str]:
    """The questions that were measured."""
    questions = [*QUESTIONS, "judged"]
    return [question for question in questions if any(question in own for own in measured["scores"].values())]


def as_text(measured: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lang = "en"
    lines = [answer(measured, lang), *(f"  {line}" for line in against_each(measured, in_view(measured), lang))]
    width = max(map(len, measured["contenders"]))
    columns = asked(measured)
    arrows = {"more": "↑", "less": "↓"}
    heads = [f"{WORDS[lang]['scores'][question] + ' ' + arrows[direction(question)]:>24}" for question in columns]
    lines.append(f"\n{'':{width}}{''.join(heads)}")
    for name in measured["contenders"]:
        cells = [f"{with_interval(question, measured['scores'][name].get(question)):>24}" for question in columns]
        lines.append(f"{name:{width}}{''.join(cells)}")
    lines.append("")
    for question in columns:
        lines.append(f"{TITLES[lang][question]} ({WORDS[lang][direction(question)][:-2]})")
        for name, kind in measured["contenders"].items():
            if kind in ("tuned", "api") and question in measured["scores"][name]:
                lines.append(f"  {sentence(measured, question, name, lang)}")
    return "\n".join(lines)


def as_json(value: Any) -> Any:
    """Numbers that are none become null, and counts keep what is commonest."""
    if isinstance(value, Counter):
        return dict(value.most_common(30))
    if isinstance(value, Mapping):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def side_by_side(comments: Sequence[Comment], evidence: Sequence[Evidence]) -> list[dict[str, str]]:
    """Some comments with everybody's first reply, spread over the data: "question", "real" and each name."""
    usable = [comment for comment in comments if all(comment.id in one.replies for one in evidence)]
    rows = usable[:: max(len(usable) // EXAMPLES, 1)][:EXAMPLES]
    return [
        {"question": question_of(comment), "real": comment.messages[-1]["content"]}
        | {one.name: one.replies[comment.id][0] for one in evidence}
        for comment in rows
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The page


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "n") -> str:
    """An HTML table; cells are HTML, the first one of a row names it, the others are of a CSS class."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    cells = [[f"<td>{first}</td>", *(f'<td class="{kind}">{cell}</td>' for cell in rest)] for first, *rest in rows]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f"<table><tr>{head}</tr>{body}</table>"


def interval_picture(found: Mapping[str, Interval], ideal: float | None) -> dict[str, str]:
    """Draws intervals on a common scale, each as an SVG.

    Args:
        found: Contender -> interval.
        ideal: A value that gets a line, such as that of guessing.
    """
    ends = [value for one in found.values() for value in one if not math.isnan(value)]
    ends += [] if ideal is None else [ideal]
    low, high = min(ends), max(ends)
    scale = 240 / ((high - low) or 1)

    def at(value: float) -> float:
        return 10 + (value - low) * scale

    pictures = {}
    for name, one in found.items():
        line = "" if ideal is None else f'<path d="M{at(ideal):.1f} 0v20" stroke="#bbb"/>'
        if not math.isnan(one.low):
            line += f'<path d="M{at(one.low):.1f} 10H{at(one.high):.1f}" stroke="#1f77b4" stroke-width="3"/>'
        dot = f'<circle cx="{at(one.value):.1f}" cy="10" r="5" fill="#1f77b4"/>'
        pictures[name] = f'<svg width="260" height="20" role="img" aria-label="{one.value:.3f}">{line}{dot}</svg>'
    return pictures


def length_picture(measured: Mapping[str, Any]) -> str:
    """Draws how long the replies are: for each length the share that is not longer."""
    writers = measured["texts"]
    longest = max(10, max(own["lengths"][int(0.95 * (len(own["lengths"]) - 1))] for own in writers.values()))
    lines, legend = [], []
    for place, (name, own) in enumerate(writers.items()):
        colour = "#222" if name == "real" else COLOURS[(place - 1) % len(COLOURS)]
        counts = own["lengths"]
        points = []
        for length in range(longest + 1):
            share = sum(one <= length for one in counts) / len(counts)
            points.append(f"{50 + 620 * length / longest:.1f},{220 - 200 * share:.1f}")
        width = 3 if name == "real" else 1.8
        lines.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        shown_name = both(words("real")) if name == "real" else escape(name)
        legend.append(f'<span style="color:{colour}">&#9632;</span> {shown_name}&emsp;')
    grid = "".join(
        f'<path d="M50 {y}H670" stroke="#e4e4e4"/><text x="8" y="{y + 4}" font-size="12">{share}</text>'
        for y, share in ((20, "100%"), (120, "50%"), (220, "0%"))
    )
    ticks = "".join(
        f'<text x="{50 + 620 * part / 4:.0f}" y="240" font-size="12" text-anchor="middle">{longest * part // 4}</text>'
        for part in range(5)
    )
    return (
        f'<p class="note">{"".join(legend)}<br>{both(words("lengths_axis"))}</p>'
        f'<svg width="700" height="250" role="img">{grid}{ticks}{"".join(lines)}</svg>'
    )


def marks_tables(measured: Mapping[str, Any]) -> str:
    """Emoticons, emoji, punctuation and beginnings side by side, the commonest among real replies."""
    writers, parts = measured["texts"], []
    for kind in ("emoticons", "emoji", "punctuation", "beginnings"):
        top = [mark for mark, _ in writers["real"]["marks"][kind].most_common(8)]
        for own in writers.values():
            top += [mark for mark, _ in own["marks"][kind].most_common(2) if mark not in top]
        if not top:
            continue
        rates = {name: {mark: 100 * own["marks"][kind][mark] / len(own["lengths"]) for mark in top}
                 for name, own in writers.items()}  # fmt: skip
        most = max(max(own.values()) for own in rates.values()) or 1
        rows = [
            [escape(mark) or "∅"]
            + [
                f'<span class="bar" style="width:{60 * own[mark] / most:.0f}px"></span>{own[mark]:.1f}'
                for own in rates.values()
            ]
            for mark in top
        ]
        heads = [both(said({lang: WORDS[lang]["distance_names"] for lang in LANGUAGES}, kind)), *writer_heads(measured)]
        parts.append(table(heads, rows))
    return "".join(parts)


def writer_heads(measured: Mapping[str, Any]) -> list[str]:
    """The writers' names, the real ones first."""
    return [both(words("real")) if name == "real" else escape(name) for name in measured["texts"]]


def question_section(measured: Mapping[str, Any], question: str) -> str:
    """One question: what the number means, everybody's interval, and who is better than whom."""
    scores = {name: own[question] for name, own in measured["scores"].items() if question in own}
    floor = with_interval(question, measured["floor"])
    judge = measured.get("judge", {"pairs": 0, "disagree": 0})
    judge = {"pairs": judge["pairs"], "disagree": f"{judge['disagree'] / max(judge['pairs'], 1):.0%}"}
    read = measured["read"].get(question, 0)
    numbers = {"read": read, "comments": measured["comments"], "pairs_needed": LEAST_PAIRS}
    meaning = said(MEANINGS, question, others=OTHERS, floor=floor, **judge, **numbers)
    way = both(words(direction(question)))
    pictures = interval_picture(scores, None if question == "likelihood" else 0.5)
    rows = [[escape(name), with_interval(question, found), pictures[name]] for name, found in scores.items()]
    judged = [name for name, kind in measured["contenders"].items() if kind in ("tuned", "api") and name in scores]
    sentences = "".join(
        f"<li>{both({lang: sentence(measured, question, name, lang, marked=True) for lang in LANGUAGES})}</li>"
        for name in (judged or scores if len(judged) != 1 else ())
    )
    lines = table(["", both(words("numbers")), ""], rows)
    note = f"<p class='note'><b>{way}</b> {both(meaning)}</p>"
    return f"<h2>{both(said(TITLES, question))}</h2>{note}<ul>{sentences}</ul>{lines}"


def as_html(name: str, measured: Mapping[str, Any], examples: Sequence[Mapping[str, str]]) -> str:
    """The whole page.

    Args:
        name: Of the evaluation.
        measured: From `utils.evaluate.measures.measure`.
        examples: From `side_by_side`.
    """
    writers = measured["texts"]
    take = both({lang: f"<b>{escape(answer(measured, lang))}</b>" for lang in LANGUAGES})
    one = in_view(measured)
    against = both({lang: "<br>".join(["", *map(escape, against_each(measured, one, lang))]) for lang in LANGUAGES})
    why = "".join(
        f"<li>{both(said(TITLES, question))} <span class='note'>{both(words(direction(question)))}</span><br>"
        f"{both({lang: sentence(measured, question, one, lang, marked=True) for lang in LANGUAGES})}</li>"
        for question in asked(measured) if question in measured["scores"][one]
    )  # fmt: skip
    counts = {
        lang: WORDS[lang]["comments"].format(**measured)
        + (WORDS[lang]["left_out"].format(**measured) if measured["left_out"] else "")
        for lang in LANGUAGES
    }
    who = [[escape(one), both(said(KINDS, kind))] for one, kind in measured["contenders"].items()]
    sections = "".join(question_section(measured, question) for question in asked(measured))
    details = [
        (f"{question}, {which}", word)
        for question in ("reading", "fitting")
        for which, word in (("same video", "same"), ("other videos", "far"))
    ] + [("by length", "length")]
    detail_rows = []
    for key, word in details:
        parent = key.partition(",")[0] if "," in key else "noticed"
        title = {lang: f"{WORDS[lang]['scores'][parent]}: {WORDS[lang][word]}" for lang in LANGUAGES}
        cells = [with_interval(parent, own.get(key)) for own in measured["scores"].values()]
        detail_rows.append([both(title), *cells])
    shares = [
        [both(said({lang: WORDS[lang]["share_names"] for lang in LANGUAGES}, share))]
        + [with_interval("share", own["shares"].get(share)) for own in writers.values()]
        for share in WORDS["en"]["share_names"] if any(share in own["shares"] for own in writers.values())
    ]  # fmt: skip
    shares.append([both(words("distinct")), *(f"{own['distinct-2']:.2f}" for own in writers.values())])
    for place, key in enumerate(("median", "mean")):
        shares.append([both(words(key)), *(f"{own['characters'][place]:.0f}" for own in writers.values())])
    apart = [
        [both(said({lang: WORDS[lang]["distance_names"] for lang in LANGUAGES}, kind))]
        + ["–" if math.isnan(own["distances"][kind]) else f"{own['distances'][kind]:.2f}" for own in writers.values()]
        for kind in WORDS["en"]["distance_names"]
    ]
    common = [
        [escape(one) if one != "real" else both(words("real")),
         " · ".join(f"{escape(text) or '∅'} ×{count}" for text, count in own["commonest"] if count > 1) or "–"]
        for one, own in writers.items()
    ]  # fmt: skip
    shown_examples = [
        [f'<div class="text">{escape(row["question"])}</div>']
        + [f'<div class="text">{escape(row[one])}</div>' for one in ("real", *measured["contenders"])]
        for row in examples
    ]
    heads = ["", *writer_heads(measured)]
    contender_heads = ["", *map(escape, measured["contenders"])]
    return f"""<!DOCTYPE html>
<html class="zh"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}</title><style>{STYLE}</style></head><body>
<button>中文 / English</button>
<h1>{both(words("title", name=name))}</h1>
<p class="note">{both(counts)}</p>
<div class="answer">{both(words("which"))} {take}{against}<ul>{why}</ul></div>
<h2>{both(words("who"))}</h2>{table(["", ""], who, "")}
{sections}
<p class="note">{both(words("settings"))}</p>
<h2>{both(words("examples"))}</h2>{table([both(words("comment")), *heads[1:]], shown_examples, "")}
<h2>{both(words("details"))}</h2>{table(contender_heads, detail_rows)}
<h2>{both(words("shares"))}</h2><p class="note">{both(words("normal"))}</p>{table(heads, shares)}
<h2>{both(words("style"))}</h2><p class="note">{both(words("distance"))}</p>{table(heads, apart)}
<h3>{both(words("lengths"))}</h3>{length_picture(measured)}
<h3>{both(words("marks"))}</h3>{marks_tables(measured)}
<h2>{both(words("commonest"))}</h2>{table(["", ""], common, "")}
<script>{SCRIPT}</script></body></html>
"""
