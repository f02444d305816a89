"""Scores of generated texts against real ones, as a table and a picture, for test mode."""

from pathlib import Path
from statistics import mean, median

from utils.evaluate.texts import distinct_2, is_echo, repeated_texts
from utils.files import atomic_write


def compare_texts(rows: list[dict[str, str]], names: list[str], real: str) -> dict[str, dict[str, float]]:
    """Measures texts of several writers on the same prompts.

    Args:
        rows: A text of each writer, and the "prompt".
        names: The models.
        real: The writer whom they shall be like.

    Returns:
        For each, the last one `real`: "chrF" (Popovic 2015) and "ROUGE-L" (F of characters, Lin 2004) against the real
        texts, 0 to 1; "distinct-2"; which share of the texts is "equal" to another one, and an "echo" of the prompt;
        the mean and the median "characters" of a text.
    """
    from rapidfuzz.distance import Indel
    from sacrebleu import corpus_chrf

    references = [row[real] for row in rows]
    table = {}
    for name in [*names, real]:
        texts = [row[name] for row in rows]
        table[name] = {
            "chrF": corpus_chrf(texts, [references]).score / 100,
            # 2 LCS / (m + n), of texts with m and n characters whose longest common subsequence has LCS.
            "ROUGE-L": mean(Indel.normalized_similarity(*pair) for pair in zip(texts, references, strict=True)),
            "distinct-2": distinct_2(texts),
            "equal": mean(repeated_texts(texts)),
            "echo": mean(is_echo(text, row["prompt"]) for text, row in zip(texts, rows, strict=True)),
            "mean characters": mean(map(len, texts)),
            "median": median(map(len, texts)),
        }
    return table


def write_comparison(
    rows: list[dict[str, str]], names: list[str], real: str, beside: Path
) -> dict[str, dict[str, float]]:
    """Does what `compare_texts` does, and leaves the table and a picture beside a file (.md, .png)."""
    table = compare_texts(rows, names, real)
    with atomic_write(beside.with_suffix(".md")) as temporary:
        temporary.write_text(as_markdown(table), encoding="utf-8")
    plot_comparison(rows, table, beside.with_suffix(".png"))
    return table


def as_markdown(table: dict[str, dict[str, float]]) -> str:
    """Writes a comparison as a table."""
    *_, real = table
    heads = ["", "chrF", "ROUGE-L", "distinct-2", "equal", "echo", "characters, mean", "median"]
    lines = [f"| {' | '.join(heads)} |".replace("|  |", "| |"), "|---" * len(heads) + "|"]
    for name, row in table.items():
        against = [f"{row[score]:.3f}" if name != real else "" for score in ("chrF", "ROUGE-L")]
        numbers = [*against, *(f"{row[score]:.3f}" for score in ("distinct-2", "equal", "echo"))]
        numbers += [f"{row['mean characters']:.1f}", f"{row['median']:.0f}"]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def plot_comparison(rows: list[dict[str, str]], table: dict[str, dict[str, float]], path: Path) -> None:
    """Draws the scores, and how long the texts are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    *_, real = table
    scores = ("chrF", "ROUGE-L", "distinct-2")
    width = 0.8 / len(table)
    for number, (name, row) in enumerate(table.items()):
        color = "0.6" if name == real else f"C{number}"
        heights = [row[score] if name != real or score == "distinct-2" else 0 for score in scores]
        left.bar([place + width * number for place in range(len(scores))], heights, width, color=color, label=name)
        lengths = sorted(len(row[name]) for row in rows)
        right.step(lengths, [(place + 1) / len(lengths) for place in range(len(lengths))], where="post", color=color)
    left.set_xticks([place + width * (len(table) - 1) / 2 for place in range(len(scores))], scores)
    left.set(title=f"chrF and ROUGE-L against {real}", ylim=(0, 1))
    left.legend()
    right.set(xlabel="characters of a text", ylabel="part of the texts that are not longer", title="length")
    right.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
