"""Rewards of the examples. `--reward-funcs examples/rewards.py:close`, or rewards.close from the folder that holds this file.

A reward takes `completions` and the columns of the data set that its parameters name, each a list with an entry for every completion, and
returns as many numbers; None is no opinion. It runs in a process of its own, so it may use signal.alarm, fail or hang: that costs its row.
"""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def said(completion) -> str:
    """The text: prompts of messages get messages back, prompts of plain text get text."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def numbers(text: str) -> list[float]:
    """The numbers of a text, commas left out."""
    return [float(found.replace(",", "")) for found in NUMBER.findall(text)]


def answer_line(completions, **columns) -> list[float]:
    """1 where the last line is `####` and a number, as the solutions of GSM8K end."""
    return [float(re.fullmatch(r"####\s*-?[\d,.]+", said(one).strip().split("\n")[-1]) is not None) for one in completions]


def close(completions, answer) -> list[float | None]:
    """Up to 1 as the last number nears the answer; no opinion where the column holds no number."""
    out = []
    for one, right in zip(completions, answer, strict=True):
        found, expected = numbers(said(one))[-1:], numbers(str(right))[-1:]
        out.append(None if not expected else 0.0 if not found else 1 / (1 + abs(found[0] - expected[0]) / (1 + abs(expected[0]))))
    return out


def brief(completions, words: int = 60) -> list[float]:
    """0 up to `words` words, then -1 for as many again: `examples/rewards.py:brief?words=30` sets the option."""
    return [-max(0, len(said(one).split()) - words) / words for one in completions]
