"""Text from outside, safe to show: no password of an address, and no escape sequence of a row, an answer or a file name."""

import re

# C0 but for tab and line feed, DEL, C1, what reorders the text around it, and halves of surrogate pairs
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/@\s'\"]*@")  # user and password of an address
_SECRET = re.compile(r"([?&](?:[\w.-]*(?:token|key|secret|password|passwd|signature|credential)|auth|sig|pwd)=)[^&#\s'\",]+", re.IGNORECASE)
HIDDEN = "***"
ESCAPES = r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}"  # a regular expression of what `escape_controls` writes


def mask_secrets(text: str) -> str:
    """The text without the passwords and tokens of its addresses: https://***@host/rows.jsonl?token=***."""
    return _SECRET.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))


def escape_controls(text: str) -> str:
    """The text with control characters, except tabs and line breaks, written as \\x1b: visible, and without effect on a terminal."""
    return _CONTROL.sub(_escape, text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """An error message in one line, without secrets and control characters."""
    return escape_controls(mask_secrets(" ".join(text.split())))


def _escape(match: re.Match) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
