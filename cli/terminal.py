"""Text from outside as a terminal may see it: no escape sequence of a row, an answer or a file name reaches it raw."""

import re

# C0 but for tab and line feed, DEL, C1, what reorders the text around it, and halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/@\s'\"]*@")  # user and password of an address
_SECRET = re.compile(r"([?&](?:[\w.-]*(?:token|key|secret|password|passwd|signature|credential)|auth|sig|pwd)=)[^&#\s'\",]+", re.IGNORECASE)
HIDDEN = "***"


def masked(text: str) -> str:
    """The text without the passwords and tokens of its addresses: https://***@host/rows.jsonl?token=***."""
    return _SECRET.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))


def message(text: str) -> str:
    """An error in one line that anybody may see."""
    return safe(masked(" ".join(text.split())))


def _escaped(match: re.Match) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def safe(text: str) -> str:
    """The text with control characters, but for tabs and line breaks, written as \\x1b: visible, and without effect."""
    return _UNSAFE.sub(_escaped, text.replace("\r\n", "\n"))
