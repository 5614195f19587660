"""Values of a YAML file as Python's own: nothing passes through text, and a value of another type is one line. Imports no torch.

Whole numbers may be written 1e1 or 2_000, numbers 1e-5; YAML itself takes some of these for texts.
"""

import math
from collections.abc import Collection
from typing import Any

from treetune.core import fields
from treetune.core.data.yamltext import Reading, Written, numeral, whole

BOOLEAN_WORDS = ("true", "false")


def wrong(written: Written, subject: str, expected: str, near: str = "") -> ValueError:
    """The error for a value of another type than was expected."""
    return ValueError(f"{subject} must be {expected}, got {shown(written)}{near}{_advice(written, expected)}")


def shown(written: Written) -> str:
    """A value and its type; a plain scalar as it was written, with what YAML reads in it."""
    if isinstance(written.value, Reading):
        return f"{shortened(written.text)}, which YAML reads as {written.value.words}"
    if isinstance(written.value, bool) and written.text.lower() not in BOOLEAN_WORDS:
        return f"{shortened(written.text)}, which YAML reads as {str(written.value).lower()}"
    return fields.shown(plain(written))


def shortened(words: str) -> str:
    """A text as an error shows it."""
    return words if len(words) <= 40 else f"{words[:36]} ..."


def _advice(written: Written, expected: str) -> str:
    scalar = written.plain and not isinstance(written.value, str | None)
    if scalar and ("a text" in expected or "one of" in expected):
        return "; put quotes around it if it is a text"
    return "; take the quotes away" if _quoted_number(written, expected) else ""


def _quoted_number(written: Written, expected: str) -> bool:
    if not isinstance(written.value, str) or written.plain:
        return False
    numeric = "number" in expected and numeral(written.value) is not None
    return numeric or "true or false" in expected and written.value.lower() in (*BOOLEAN_WORDS, "yes", "no", "on", "off")


def plain(written: Written) -> Any:
    """The value as Python's own; a `Reading` as its text."""
    if isinstance(written.value, list):
        return [plain(item) for item in written.value]
    if isinstance(written.value, dict):
        return {name: plain(item) for name, item in written.value.items()}
    return written.text if isinstance(written.value, Reading) else written.value


def text(written: Written, choices: Collection[str] = ()) -> str | None:
    """A text, one of `choices` where there are some; None for anything else."""
    value = written.value
    return value if isinstance(value, str) and (not choices or value in choices) else None


def flag(written: Written) -> bool | None:
    """True or false, or None."""
    return written.value if isinstance(written.value, bool) else None


def number(written: Written) -> float | None:
    """A finite number, or None."""
    value = _numeric(written)
    return float(value) if value is not None and abs(value) < 1e308 and math.isfinite(value) else None


def integer(written: Written) -> int | None:
    """A whole number, or None; 1e1 and 5.0 are whole."""
    value = _numeric(written)
    if isinstance(value, float) and math.isfinite(value):
        return whole(written.text, value)
    return value if isinstance(value, int) else None


def _numeric(written: Written) -> int | float | None:
    """A number as it was written; YAML itself takes 1e-5 for a text."""
    value = numeral(written.value) if isinstance(written.value, str) and written.plain else written.value
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
