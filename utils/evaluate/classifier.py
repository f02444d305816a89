"""Would one notice? A classifier that tries to tell a model's replies from real ones.

A two-sample test by classifier (arXiv 1610.06545): its area under the ROC curve on videos that it has not seen is the
chance that, of a real and a written reply, it takes the right one for the real one; 0.5 is guessing.

Shapes: N pairs of a real and a written reply to the same comment, V videos, B bootstrap draws.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from utils.evaluate.intervals import Statistic

FLOOR_REPEATS = 5


def by_characters() -> Any:
    """Logistic regression on character n-grams, the ends of a text among the characters."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    ends = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True, min_df=2,
        preprocessor=lambda text: f"\x02{text}\x03",
    )  # fmt: skip
    return make_pipeline(ends, LogisticRegression(C=10, max_iter=1000))


def by_length() -> Any:
    """Logistic regression on the length alone, in ten steps, so that both too short and too long can be told."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, KBinsDiscretizer

    lengths = FunctionTransformer(lambda texts: np.array([[len(text)] for text in texts], dtype=float))
    bins = KBinsDiscretizer(10, strategy="quantile", quantile_method="averaged_inverted_cdf")
    return make_pipeline(lengths, bins, LogisticRegression(max_iter=1000))


def auc(
    real: Sequence[str], written: Sequence[str], videos: Sequence[int], make: Callable[[], Any], seed: int = 0
) -> Statistic | None:
    """Measures how well a classifier tells written replies from real ones, on videos that it has not seen.

    It learns on one half of the videos and is asked about the other. Cross-validation would ask about all of them, but
    its folds' classifiers learn on one another's videos, which a bootstrap over videos does not see: of its 95 %
    intervals, 83 % held the truth, and of these 93 to 95 %.

    Args:
        real: (N,).
        written: (N,), to the same comments.
        videos: (N,) the number of each pair's video.
        make: `by_characters` or `by_length`.
        seed: Of which videos it learns on.

    Returns:
        The area under the curve, of weighted videos; None if there is one video only.
    """
    from sklearn.model_selection import GroupKFold

    groups = np.asarray(videos)
    if len(set(videos)) < 2:
        return None
    texts, labels = np.array([*real, *written], dtype=object), np.repeat([0, 1], len(real))
    learnt, asked = next(GroupKFold(2, shuffle=True, random_state=seed).split(real, groups=groups))
    rows = np.concatenate([learnt, learnt + len(real)])
    with warnings.catch_warnings():
        # Where many replies are equally long, `by_length` makes fewer steps than it was asked for.
        warnings.simplefilter("ignore", UserWarning)
        classifier = make().fit(texts[rows].tolist(), labels[rows])
    scores = [classifier.decision_function(texts[asked + shift].tolist()) for shift in (0, len(real))]
    # (real, written) whether the written one is taken for written; equal ones count half.
    right = (scores[1] > scores[0][:, None]) + 0.5 * (scores[1] == scores[0][:, None])

    def statistic(weights: np.ndarray) -> np.ndarray:
        drawn = weights[:, groups[asked]].astype(float)
        with np.errstate(invalid="ignore"):  # A draw may have none of these videos.
            return ((drawn @ right) * drawn).sum(1) / drawn.sum(1) ** 2

    return statistic


def mean(statistics: Sequence[Statistic | None]) -> Statistic | None:
    """The mean of statistics of the same videos; None if one of them is missing."""
    if not statistics or None in statistics:
        return None
    return lambda weights: np.mean([statistic(weights) for statistic in statistics], axis=0)


def floor(real: Sequence[str], videos: Sequence[int], make: Callable[[], Any]) -> Statistic | None:
    """The same for real replies against other real ones of the same videos: what cannot be told apart looks like."""
    statistics = []
    for seed in range(FLOOR_REPEATS):
        pairs: list[tuple[int, int]] = []
        waiting: dict[int, int] = {}  # A video's reply that has no other one yet.
        for number in np.random.default_rng(seed).permutation(len(real)).tolist():
            if (other := waiting.pop(videos[number], None)) is None:
                waiting[videos[number]] = number
            else:
                pairs.append((other, number))
        if not pairs:
            return None
        sides = [[real[pair[side]] for pair in pairs] for side in (0, 1)]
        statistics.append(auc(*sides, [videos[one] for one, _ in pairs], make, seed))
    return mean(statistics)
