"""Text from outside as a terminal may see it."""

import pytest

from treetune.cli import terminal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b2J", "\\x9b2J"),  # the one-byte form of ESC [
        ("progress\roverwritten", "progress\\x0doverwritten"),
        ("a\x08b\x7f\x00", "a\\x08b\\x7f\\x00"),
        ("a\r\nb\tc\n", "a\nb\tc\n"),
        ("admin\u202egnp.exe", "admin\\u202egnp.exe"),
        ("half \ud83d of a pair", "half \\ud83d of a pair"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    assert terminal.safe(text) == shown
    assert terminal.safe(shown) == shown


@pytest.mark.parametrize("text", ["naïve café", "你好，世界", "👨‍👩‍👧‍👦 🇩🇪 👍🏽", "e\u0301", "שלום עולם", "مرحبا", "[[x]] [bold]y[/]"])
def test_people_s_texts_stay_as_they_are(text):
    assert terminal.safe(text) == text
