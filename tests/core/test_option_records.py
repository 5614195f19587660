"""Records of plain values that are read from options of the same names (`table.record`)."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest

from treetune.core.config import table


@dataclass(frozen=True)
class Inner:
    """Options."""

    size: int = 3
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Config:
    """Options."""

    inner: Inner = table.group(Inner)
    rate: float = 0.5
    unread: int = 1


class Plain(NamedTuple):
    """What is read of them."""

    size: int
    rate: float
    names: tuple[str, ...]
    place: str = "here"


def test_fields_are_options_of_their_names_and_others():
    assert table.record(Plain, Config()) == Plain(3, 0.5, ("a",))
    assert table.record(Plain, Config(rate=1.0), size=4, place="there") == Plain(4, 1.0, ("a",), "there"), "others go before options"


def test_a_field_that_is_neither_is_an_error():
    with pytest.raises(TypeError, match="names"):
        table.record(Plain, Config(inner=None), size=1)
    with pytest.raises(TypeError, match="unknown"):
        table.record(Plain, Config(), unknown=1)
