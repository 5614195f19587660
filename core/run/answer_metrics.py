"""Metrics of answers to held-out prompts, each beside a good one: BLEU, chrF and TER of sacrebleu, and exact match.

M answers with one reference each; a metric is of all of them together, as papers report it, not a mean of theirs.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

MISSING = "the package sacrebleu is not installed: pip install 'treetune[eval]'"
OF_PACKAGE = {"sacrebleu", "chrf", "ter"}
PERPLEXITY = "perplexity"  # of the held-out rows themselves, which every evaluation of texts has
ABSENT = {
    "comet": "it is computed by another model, from a source sentence and its translation",
}


def sacrebleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU, 0 to 100: 100 exp(min(0, 1 - r / c) + sum_n log(p_n) / 4), n = 1 to 4, of counts summed over the M texts.

    p_n: share of n-grams of answers that their reference has; c, r: tokens of answers and references. Tokens of mteval-v13a, exponential
    smoothing. Source: Post, A Call for Clarity in Reporting BLEU Scores, WMT 2018.
    """
    return _package().corpus_bleu(answers, [references]).score


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF2, 0 to 100: F score with beta 2 of character n-grams, n = 1 to 6, of counts summed over the M texts, without blanks.

    Source: Popovic, chrF: character n-gram F-score for automatic MT evaluation, WMT 2015.
    """
    return _package().corpus_chrf(answers, [references]).score


def ter(answers: Sequence[str], references: Sequence[str]) -> float:
    """Translation edit rate, 0 and up, the lower the better: 100 edits / words of references; an edit inserts, deletes, replaces or shifts.

    Source: Snover et al., A Study of Translation Edit Rate with Targeted Human Annotation, AMTA 2006.
    """
    return _package().corpus_ter(answers, [references]).score


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that are their reference, blanks around them aside."""
    return sum(one.strip() == right.strip() for one, right in zip(answers, references, strict=True)) / len(answers)


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {one.__name__: one for one in (sacrebleu, chrf, ter, exact_match)}
NAMES = (*METRICS, PERPLEXITY)


def measure(names: Sequence[str], pairs: Sequence[tuple[str, str | None]]) -> dict[str, float]:
    """Those metrics of (answer, reference) with a reference; nan where none has one."""
    known = [(answer, reference) for answer, reference in pairs if reference is not None]
    if not known:
        return dict.fromkeys(names, float("nan"))
    answers, references = zip(*known, strict=True)
    return {name: METRICS[name](answers, references) for name in names}


def is_reward(name: str) -> bool:
    """Whether a metric of a run is the mean reward of answers; reward_std is that of completions."""
    return name.startswith("eval/reward_") and name != "eval/reward_std"


def check(names: Sequence[str], option: str) -> None:
    """Raise ValueError for a metric that is not known, one that comes twice, and one whose package is not there."""
    for name in names:
        if name in ABSENT:
            raise ValueError(f"{option} has {name}: {ABSENT[name]}")
        if name not in NAMES:
            raise ValueError(f"{option} has {name}, expected some of {', '.join(NAMES)}")
    if len(set(names)) != len(names):
        raise ValueError(f"{option} is {', '.join(names)}: expected none twice")
    if set(names) & OF_PACKAGE and importlib.util.find_spec("sacrebleu") is None:
        raise ValueError(f"{option} has {', '.join(name for name in names if name in OF_PACKAGE)}: {MISSING}")


def _package() -> Any:
    return importlib.import_module("sacrebleu")  # it takes half a second, and is an extra
