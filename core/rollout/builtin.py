r"""Rewards that come with the package: `BUILTIN` by name. Standard library only, since worker processes import it.

A reward takes `completions`, one text (or list of messages) each, and the columns that its parameters name, as lists as long;
it returns a number for each completion, or None for no opinion. What is keyword-only is an option: `length?max=512,cache=128`.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction

from treetune.core.rollout import judge

Completion = str | list[dict]  # plain text, or [{"role": "assistant", "content": text}]

# A minus belongs to a number unless something stands before it that it could be taken from: 16-3 ends in 3.
_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+"
_NUMBER = re.compile(rf"(?<![\w)\]}}%])([-−]?)\$?([-−]?)({_PLAIN})")
_PART = rf"(?:\{{\s*([-−]?(?:{_PLAIN}))\s*\}}|([0-9]))"
_FRAC = rf"\\[dt]?frac\s*{_PART}\s*{_PART}"
_VALUE = re.compile(rf"([-−+]?)\$?([-−]?)\s*(?:({_PLAIN})?\s*{_FRAC}|({_PLAIN})(?:\s*/\s*([0-9]+))?)\s*(\\?%)?")
_ANY_FRAC = r"\\[dt]?frac\s*(?:\{[^{}]*\}|[0-9])\s*(?:\{[^{}]*\}|[0-9])"
_ANYWHERE = re.compile(rf"(?<![\w)\]}}%])[-−]?\$?[-−]?(?:[0-9]*\s*{_ANY_FRAC}|(?:{_PLAIN})(?:\s*/\s*[0-9]+)?)(?:\s*\\?%)?")
_BRACES = re.compile(r"\\f?boxed\s*\{|[{}]")
_NOISE = re.compile(r"\\left|\\right|\\[!,;: ]|\\displaystyle|\^\{?\\circ\}?|~|[\s{}]")
_TAGS = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def text(completion: Completion) -> str:
    """What the model wrote: the text itself, or the content of the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def gsm8k(completions: Sequence[Completion], answer: Sequence) -> list[float | None]:
    """1 where the completion's answer equals the column `answer`, else 0; no opinion where that column holds no number.

    The answer is the number after the first `####`, else the last number of the text; `answer` may be the number or a whole
    GSM8K solution. Commas, $ and % are ignored and the comparison is exact: 1,000.00 is 1000.
    Source: Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168 (the data and its `####`).
    """
    return [_agree(_final(text(completion)), _final(_as_text(right))) for completion, right in zip(completions, answer, strict=True)]


def math_equal(completions: Sequence[Completion], answer: Sequence) -> list[float | None]:
    r"""1 where the completion's answer is the value (or the same expression) as the column `answer`, else 0.

    The answer is the last \boxed{...}, else the last number or fraction of the text. Numbers, a/b, \frac{a}{b}, mixed numbers and
    percentages are compared exactly as fractions, where 50% is 50 as well as 1/2; anything else, such as \sqrt{2}, must be in a box
    and is compared as text without spaces and braces. No opinion where `answer` is missing or empty.
    """
    return [_same(text(completion), _as_text(right)) for completion, right in zip(completions, answer, strict=True)]


def math_verify(completions: Sequence[Completion], answer: Sequence) -> list[float | None]:
    """1 where the package math-verify finds the completion equal to the column `answer`, else 0; no opinion where it cannot parse that.

    Errors: ValueError when the package is not installed.
    """
    try:
        checker = importlib.import_module("math_verify")
    except ModuleNotFoundError as error:
        raise ValueError("math_verify needs the package math-verify: pip install 'math-verify[antlr4_13_2]', or use math_equal") from error
    out: list[float | None] = []
    for completion, right in zip(completions, answer, strict=True):
        gold = checker.parse(_as_text(right)) or checker.parse(f"${_as_text(right)}$")
        out.append(float(bool(checker.verify(gold, checker.parse(text(completion))))) if gold else None)
    return out


def format_tags(completions: Sequence[Completion], *, opened: bool = False) -> list[float]:
    """1 for `<think>...</think><answer>...</answer>`, each tag once, in this order, nothing but blanks around, else 0.

    opened: the prompt already ends in `<think>`, as some chat templates write it.
    """
    return [_tagged("<think>" * opened + text(completion)) for completion in completions]


def length(completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], *, max: int = 256, cache: int = 64) -> list[float]:
    """Soft overlong punishment: 0 up to max - cache tokens, then falling linearly to -1 at `max`, -1 beyond.

    Source: Yu et al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv 2503.14476, eq. 13.
    Errors: ValueError unless 1 <= cache <= max.
    """
    if not 1 <= cache <= max:
        raise ValueError(f"length has max={max}, cache={cache} (tokens): expected 1 <= cache <= max, such as length?max=256,cache=64")
    over = [len(ids) - (max - cache) for ids in completion_ids]
    return [0.0 if n <= 0 else -1.0 if n > cache else -n / cache for n in over]


def digits(completions: Sequence[Completion]) -> list[float]:
    """Share of the characters that are 0 to 9; 0 for an empty text. A toy that every model learns at once."""
    return [
        sum("0" <= char <= "9" for char in answer_text) / len(answer_text) if (answer_text := text(completion)) else 0.0
        for completion in completions
    ]


def repetition(completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], *, ngram: int = 3) -> list[float]:
    """Repeated n-grams of tokens: different ones / all - 1, so 0 without repetition and towards -1; 0 below `ngram` tokens.

    Source: Yeo et al., Demystifying Long Chain-of-Thought Reasoning in LLMs, arXiv 2502.03373, appendix C.2.
    Errors: ValueError for ngram below 1.
    """
    if ngram < 1:
        raise ValueError(f"repetition has ngram={ngram}: expected at least 1, such as repetition?ngram=3")
    grams = [list(zip(*(ids[i:] for i in range(ngram)), strict=False)) for ids in completion_ids]
    return [len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0 for ngrams in grams]


BUILTIN: dict[str, Callable] = {
    one.__name__: one for one in (gsm8k, math_equal, math_verify, format_tags, length, digits, repetition, judge.llm_judge)
}


def _as_text(answer: object) -> str:
    return "" if answer is None else str(answer)


def _number(match: re.Match) -> Decimal:
    value = Decimal(match[3].replace(",", ""))
    return value.copy_negate() if match[1] or match[2] else value


def _final(answer: str) -> Decimal | None:
    """The number after the first `####` that has one, else the last number of the text."""
    for part in answer.split("####")[1:]:
        if number := _NUMBER.search(part):
            return _number(number)
    numbers = list(_NUMBER.finditer(answer))
    return _number(numbers[-1]) if numbers else None


def _agree(value: Decimal | None, right: Decimal | None) -> float | None:
    return None if right is None else float(value == right)


def _same(answer: str, right: str) -> float | None:
    expected = right.rpartition("####")[2] if (box := _boxed(right)) is None else box
    if not _squeezed(expected):
        return None
    box, value = _boxed(answer), _value(expected)
    if value is None:
        return float(box is not None and _squeezed(box) == _squeezed(expected))
    if box is None:
        box = "".join([match[0] for match in _ANYWHERE.finditer(answer)][-1:])
    return float(_equal(_value(box), value))


def _equal(a: tuple[Fraction, bool] | None, b: tuple[Fraction, bool]) -> bool:
    if a is None:
        return False
    (x, percent), (y, other) = a, b
    return x == y or (percent and not other and x == 100 * y) or (other and not percent and y == 100 * x)


def _boxed(answer: str) -> str | None:
    r"""What is in the last \boxed{...} whose braces close."""
    last, opened = (-1, -1), []
    for match in _BRACES.finditer(answer):
        if match[0] != "}":
            opened.append(match.end() if match[0] != "{" else -1)
        elif opened and (start := opened.pop()) > last[0]:
            last = start, match.start()
    return answer[slice(*last)] if last[0] >= 0 else None


def _squeezed(latex: str) -> str:
    latex = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r"\1", latex.replace("\\(", "").replace("\\)", ""))
    return _NOISE.sub("", re.sub(r"\\[dt]frac", r"\\frac", latex)).strip("$.").replace("−", "-")


def _value(latex: str) -> tuple[Fraction, bool] | None:
    """The number that a text is, units in \\text{} and a leading `x =` aside, and whether it is written as a percentage."""
    latex = re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}", "", latex).rpartition("=")[2]
    latex = re.sub(r"\\left|\\right|\\[!,;: ()\[\]$]|\^\{?\\circ\}?|~", lambda match: "$" if match[0] == "\\$" else "", latex)
    match = _VALUE.fullmatch(latex.strip().strip("$").strip().rstrip(".").replace("{,}", ","))
    if match is None:
        return None
    minus, second, whole, top, top1, bottom, bottom1, plain, under, percent = match.groups()
    try:
        if plain:
            value = _fraction(plain) / _fraction(under or "1")
        else:
            value = _fraction(whole or "0") + _fraction(top or top1) / _fraction(bottom or bottom1)
    except (ValueError, ZeroDivisionError, TypeError):
        return None
    return -value if "-" in (minus + second).replace("−", "-") else value, bool(percent)


def _fraction(latex: str) -> Fraction:
    return Fraction(latex.replace(",", "").replace("−", "-").strip())


def _tagged(answer: str) -> float:
    once = all(answer.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    return float(once and _TAGS.fullmatch(answer) is not None)
