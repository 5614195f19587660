"""Text from outside, safe to show."""

import pytest

from treetune.core import masking


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
    assert masking.escape_controls(text) == shown
    assert masking.escape_controls(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://bob:secret@host/a.jsonl: no", "https://***@host/a.jsonl: no"),
        ("s3://key:p%40ss@bucket/a", "s3://***@bucket/a"),
        ("https://host/a?x=1&token=abc&y=2", "https://host/a?x=1&token=***&y=2"),
        ("https://host/a?X-Amz-Signature=abc, https://host/b?sig=1", "https://host/a?X-Amz-Signature=***, https://host/b?sig=***"),
        ("data:\n- https://bob:secret@host/a?api_key=k\n", "data:\n- https://***@host/a?api_key=***\n"),
        ("ask bob@host.org; hf://owner/name; a?b=c", "ask bob@host.org; hf://owner/name; a?b=c"),
    ],
)
def test_passwords_of_addresses_are_hidden(text, shown):
    assert masking.mask_secrets(text) == shown and masking.mask_secrets(shown) == shown


def test_a_message_is_one_safe_line():
    assert masking.one_line("a\n b\x1b[2J https://u:p@h/") == "a b\\x1b[2J https://***@h/"


@pytest.mark.parametrize("text", ["naïve café", "你好，世界", "👨‍👩‍👧‍👦 🇩🇪 👍🏽", "e\u0301", "שלום עולם", "مرحبا", "[[x]] [bold]y[/]"])
def test_people_s_texts_stay_as_they_are(text):
    assert masking.escape_controls(text) == text
