"""Text from outside as a terminal may see it: no escape sequence of a row, an answer or a file name reaches it raw."""

import re

# C0 but for tab and line feed, DEL, C1, what reorders the text around it, and halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _escaped(match: re.Match) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def safe(text: str) -> str:
    """The text with control characters, but for tabs and line breaks, written as \\x1b: visible, and without effect."""
    return _UNSAFE.sub(_escaped, text.replace("\r\n", "\n"))
