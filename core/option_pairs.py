"""Options that hold NAME=TEXT or REGEX=NUMBER pairs. Imports no torch."""

import json
import re
from typing import Any

FLOAT_MAX = 3e38  # what float32 holds


def rules(texts: tuple[str, ...], option: str) -> list[tuple[str, float]]:
    """REGEX=VALUE texts as (regex, value) pairs. Errors: ValueError for what is no regular expression, or no finite number from 0 up."""
    out = []
    for text in texts:
        regex, _, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"--{option} takes REGEX=NUMBER, got {text!r}") from None
        if not 0 <= number <= FLOAT_MAX:
            raise ValueError(f"--{option} takes REGEX=NUMBER with a number from 0 up, at most {FLOAT_MAX:g}, got {text!r}")
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"--{option}: {regex!r} is not a regular expression ({error})") from error
        out.append((regex, number))
    return out


def named_texts(texts: tuple[str, ...], option: str) -> dict[str, str]:
    """NAME=TEXT texts as a mapping."""
    out: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or name in out:
            raise ValueError(f"--{option} takes NAME=TEXT, each name once, got {text!r}")
        out[name] = value
    return out


def named_values(texts: tuple[str, ...], option: str) -> dict[str, Any]:
    """NAME=VALUE texts as a mapping, values as JSON where they are JSON."""
    return {name: _value(text) for name, text in named_texts(texts, option).items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
