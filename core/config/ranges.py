"""Ranges of numeric options, which stand in the annotation of the option's field. Imports no torch.

Upper bounds are what the machine's types hold, or far beyond what anyone trains with: a number past them is a slip of the keyboard.
"""

import math
from typing import Any, NamedTuple

ROWS_MAX = 10**9  # rows, steps, epochs: counters that are added up and kept in JSON
TOKENS_MAX = 2**24  # tokens of one text, or of one forward pass
SEED_MAX = 2**62  # seeds are int64, and small numbers are added to them
FLOAT_MAX = 3e38  # what float32 holds
SECONDS_MAX = 1e7  # what timers of the standard library take


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included unless an `above` or `below` excludes them; nan is in no range."""

    low: float
    high: float
    whole: bool = False
    above: bool = False
    below: bool = False
    zero: bool = False  # 0 is allowed besides
    words: str = ""

    def holds(self, value: float) -> bool:
        """Whether the range has the number."""
        if self.zero and value == 0:
            return True
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high) and not (self.whole and value != int(value))

    def outside(self, value: Any) -> str:
        """The error's words for a value out of range, such as "must be ..., got 7"; empty for a value in range or not a number."""
        for one in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(one, bool) and isinstance(one, int | float) and not self.holds(one):
                return f"must be {self.described()}, got {shown(one)}"
        return ""

    def expected(self) -> str:
        """What the option must be, in words, where its type may be wrong too."""
        words = self.described()
        if not self.whole:
            return words
        return words.replace("a number", "a whole number") if "a number" in words else f"a whole number of {words}"

    def described(self) -> str:
        """What an error says is expected."""
        if self.words:
            return self.words
        if self.whole and self.low > 0:
            return f"at least {self.low} and at most {self.high}"
        zero, high = "0, or " * self.zero, f"{self.high:g}"
        if self.above:
            return f"{zero}a number above {self.low:g}, at most {high}"
        if self.below or self.high <= 1:
            return f"{zero}a number from {self.low:g} to {'below ' * self.below}{high}"
        return f"{zero}a number from {self.low:g} up, at most {self.high if self.whole else high}"


def whole(low: int, high: int) -> Range:
    """Whole numbers from `low` to `high`."""
    return Range(low, high, whole=True)


class _PartOrRows(Range):
    """A part below 1, or a number of rows."""

    def holds(self, value: float) -> bool:
        """Whether the range has the number."""
        return 0 <= value < 1 or 1 <= value <= ROWS_MAX and value == int(value)


COUNT, COUNT_OR_NONE = whole(1, ROWS_MAX), whole(0, ROWS_MAX)
TOKENS, SMALL = whole(1, TOKENS_MAX), whole(1, 65536)
POSITIVE, NOT_NEGATIVE = Range(0, FLOAT_MAX, above=True), Range(0, FLOAT_MAX)
ANY = Range(-FLOAT_MAX, FLOAT_MAX)
BELOW_ONE, BELOW_HALF = Range(0, 1, below=True), Range(0, 0.5, below=True)
SHARE, PART = Range(0, 1, above=True), Range(0, 1)
SECONDS = Range(0, SECONDS_MAX, above=True)
PROCESSES, SEED = whole(1, 1024), whole(0, SEED_MAX)
TEMPERATURE = Range(1e-6, 1e6, zero=True)
PORT = whole(1, 65535)
ROWS = _PartOrRows(0, ROWS_MAX, words=f"a part below 1 or a whole number of rows up to {ROWS_MAX}")


def shown(value: float) -> str:
    """A number as an error shows it, however long it is."""
    if isinstance(value, float) or abs(value) < 10**40:
        return str(value)
    return f"a number of about {int(math.log10(abs(value))) + 1} digits"
