"""Rewards of the examples. `--reward-funcs examples/rewards.py:close`, or rewards.close from the folder that holds this file.

A reward takes `completions` and the data set columns that its parameters name, each a list with one entry per completion, and returns one
number per completion; None abstains. It runs in a worker process, so it may use signal.alarm, fail or hang: this affects its row only.
"""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def text(completion) -> str:
    """The text of a completion: messages for prompts of messages, a text for prompts of plain text."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def numbers(words: str) -> list[float]:
    """The numbers in a text, without commas."""
    return [float(match.replace(",", "")) for match in NUMBER.findall(words)]


def answer_line(completions, **columns) -> list[float]:
    """1 where the last line is `####` and a number, as the solutions of GSM8K end."""
    return [float(re.fullmatch(r"####\s*-?[\d,.]+", text(one).strip().split("\n")[-1]) is not None) for one in completions]


def close(completions, answer) -> list[float | None]:
    """Up to 1 as the last number approaches the answer; abstains if the column holds no number."""
    out = []
    for one, right in zip(completions, answer, strict=True):
        last, expected = numbers(text(one))[-1:], numbers(str(right))[-1:]
        out.append(None if not expected else 0.0 if not last else 1 / (1 + abs(last[0] - expected[0]) / (1 + abs(expected[0]))))
    return out


def brief(completions, words: int = 60) -> list[float]:
    """0 up to `words` words, then -1 for as many again: `examples/rewards.py:brief?words=30` sets the option."""
    return [-max(0, len(text(one).split()) - words) / words for one in completions]
