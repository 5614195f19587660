"""The keys of one of axolotl's files, and values as its own reader takes them. Imports no torch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from treetune.core.config.table import Option
from treetune.core.data import yamlvalues
from treetune.core.data.yamltext import Written, numeral

Values = dict[str, Written]


class Unsupported(ValueError):
    """What a key asks for is not there; the message says what is."""


class File(NamedTuple):
    """The keys of a file, sections laid flat, and the command that reads it with its options."""

    command: str
    options: Mapping[str, Option]
    keys: Mapping[str, Written]

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key as Python's own; the default where it is not given or null."""
        written = self.keys.get(key)
        return default if written is None or written.value is None else yamlvalues.plain(written)


def write(value: Any) -> Written:
    """A Python value as if the file held it."""
    if isinstance(value, Written):
        return value
    if isinstance(value, dict):
        return Written({name: write(item) for name, item in value.items()})
    if isinstance(value, list | tuple):
        return Written([write(item) for item in value])
    return Written(value, "" if value is None else str(value), True)


WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def truth(written: Written) -> Written:
    """A word of truth in quotes as true or false; anything else as it is."""
    value = written.value
    return Written(WORDS[value.lower()]) if isinstance(value, str) and value.lower() in ("true", "false") else written


def is_off(written: Written, option: Option) -> bool:
    """Whether a number turns off what the option, which may be left out, is not given for: 0, false or -1 where it must be above 0."""
    off = written.value in (0, -1) and isinstance(written.value, int | float)
    return off and option.optional and option.range is not None and not option.range.holds(float(written.value))


def lenient(written: Written, option: Option) -> Written:
    """A value for an option as axolotl takes it: numbers and words of truth may stand in quotes, 0 and 1 for words of truth."""
    value = written.value
    if isinstance(value, list) and option.many:
        return written._replace(value=[lenient(item, option) for item in value])
    if option.single in (int, float) and isinstance(value, str) and numeral(value) is not None:
        return Written(numeral(value), value, True)
    if option.single in (int, float) and value is False:
        return Written(0, "0", True)
    if option.switch is not None:
        return truth(written)
    if option.single is bool and not isinstance(value, bool) and str(value).lower() in WORDS and value is not None:
        return Written(WORDS[str(value).lower()])
    return written
