"""Metrics of answers: sacrebleu's own numbers, numbers worked by hand, and what is refused."""

import importlib.util
import math

import pytest

from treetune.core.run import answer_metrics

ANSWERS = ["the cat sat on the mat", "it is 42, as far as I know", "", "Grüße aus Köln"]
REFERENCES = ["the cat sat on a mat", "it is 42", "something", "Grüße aus Bonn"]


def test_numbers_worked_by_hand():
    def of(name, answer, reference):
        return answer_metrics.measure([name], [(answer, reference)])[name]

    # Of 6, 5, 4 and 3 n-grams 5, 3, 2 and 1 are in the reference, which is as long.
    assert of("sacrebleu", ANSWERS[0], REFERENCES[0]) == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, rel=1e-12)
    # Half as long: exp(1 - 8 / 4), and every n-gram right.
    assert of("sacrebleu", "a b c d", "a b c d e f g h") == pytest.approx(100 * math.exp(-1), rel=1e-12)
    assert of("ter", ANSWERS[0], REFERENCES[0]) == pytest.approx(100 / 6, rel=1e-12), "one word of six is another"
    assert of("ter", "d a b c", "a b c d") == pytest.approx(100 / 4, rel=1e-12), "one word is moved"
    # Of 3 characters 2, of 2 pairs 1, of 1 triple 0: precision and recall are the mean of these shares.
    assert of("chrf", "abc", "abd") == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3, rel=1e-12)
    assert answer_metrics.measure(["exact_match"], [(" 4\n", "4"), ("5", "4"), ("6", None), ("", "x")]) == {"exact_match": 1 / 3}


@pytest.mark.parametrize("name", sorted(answer_metrics.OF_PACKAGE))
def test_metrics_are_the_corpus_functions_of_sacrebleu(name):
    import sacrebleu

    theirs = getattr(sacrebleu, f"corpus_{name.removeprefix('sacre')}")(ANSWERS, [REFERENCES]).score
    found = answer_metrics.measure([name], [*zip(ANSWERS, REFERENCES, strict=True), ("no reference", None)])
    assert found == {name: theirs} and theirs > 0


def test_answers_without_a_reference_or_a_word_have_numbers_all_the_same():
    assert all(math.isnan(value) for value in answer_metrics.measure(["chrf", "exact_match"], [("a", None)]).values())
    assert answer_metrics.measure(["sacrebleu", "chrf", "ter"], [("", "two words")]) == {"sacrebleu": 0, "chrf": 0, "ter": 100}


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["bleu"], "has bleu, expected some of sacrebleu, chrf, ter, exact_match, perplexity"),
        (["comet"], "comet: it is computed by another model"),
        (["chrf", "chrf"], "none twice"),
    ],
)
def test_other_metrics_are_refused(names, match):
    with pytest.raises(ValueError, match=match):
        answer_metrics.check(names, "eval_causal_lm_metrics")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    answer_metrics.check(["exact_match", "perplexity"], "metrics")
    with pytest.raises(ValueError, match=r"metrics has chrf, ter: the package sacrebleu .* pip install 'treetune\[eval\]'"):
        answer_metrics.check(["chrf", "exact_match", "ter"], "metrics")
