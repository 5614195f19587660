"""Pages: blanks can be seen, nothing of a text becomes markup, and nothing is fetched."""

import re

import pytest

from treetune.core.run import page


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain words", [("", "plain words")]),
        ("\n" * 57, [("gap", "57 line breaks"), ("", "\n")]),
        (" a  b ", [("space", " "), ("", "a  b"), ("space", " ")]),
        ("a \nb", [("", "a"), ("space", " "), ("nl", "\n"), ("", "b")]),
        ("\ta", [("tab", "\t"), ("", "a")]),
        ("a" + " " * 40 + "b", [("", "a"), ("gap", "40 spaces"), ("", "b")]),
        ("\x1b[31m", [("code", "\\x1b"), ("", "[31m")]),
        ("its own \\x1b", [("", "its own \\x1b")]),
        ("", []),
    ],
)
def test_blanks_and_control_characters_can_be_seen(text, parts):
    assert list(page.mark_blanks(text)) == parts


def test_nothing_becomes_markup_and_nothing_is_fetched():
    evil = "<script>alert(1)</script>&'\"><img src=x>"
    groups = [{"step": 1, "prompt": evil, "more": 0, "completions": [
        {"label": "on", "advantage": "+1", "rewards": [(evil, evil)], "about": evil, "answer": evil}]}]  # fmt: skip
    parts = {
        "now": page.part("{{ standing(rows, notes, charts) }}", rows={evil: evil}, notes=[(1, evil, evil)], charts=[]),
        "answers": page.part("{{ replies(groups, samples) }}", groups=groups, samples=[(evil, [(1, evil)])]),
        "trained": page.part("trained.jinja", docs=[], labels=set()),
    }
    text = page.render("run.jinja", name=evil, **parts)
    assert text.count("&lt;script&gt;") == 13, "each of the values is there"
    assert "<script" not in text and "<img" not in text
    assert not re.search(r"https?:|<[^>]*src=|url\(|@import|<link", text)
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
