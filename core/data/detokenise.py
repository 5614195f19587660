"""Token ids back to text, cut only where characters end.

A token of a byte-level or byte-fallback vocabulary may hold a part of a character, and one token decoded alone is then U+FFFD.
Tokens are read together until their text is whole: such a unit is one token nearly everywhere, and at most four.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from treetune.core.protocols import Tokenizer

LONGEST = 4  # bytes of a character in UTF-8, hence tokens that it may lie in
BROKEN = "\ufffd"


class TextUnit(NamedTuple):
    """Consecutive tokens that form whole characters, and their text."""

    tokens: tuple[int, ...]
    text: str


class Decoder:
    """Incremental decoder: `push` returns the units that a token completes, `flush` the incomplete rest."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False):
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        # The unit before and its text are decoded along: some decoders drop or add a space at the very beginning of a text.
        self.last: tuple[int, ...] = ()
        self.before = ""
        self.pending: tuple[int, ...] = ()

    def push(self, token: int) -> list[TextUnit]:
        """The units that end with this token: none while a character is not whole."""
        self.pending += (token,)
        text = self._text(self.pending)
        if not text.endswith(BROKEN) or self._is_meant(text):
            return [self._emit(self.pending, text)]
        return [self._emit(self.pending[:1])] if len(self.pending) == LONGEST else []

    def flush(self) -> list[TextUnit]:
        """The pending tokens as one unit, whose bytes form no character."""
        return [self._emit(self.pending)] if self.pending else []

    def _emit(self, tokens: tuple[int, ...], text: str | None = None) -> TextUnit:
        unit = TextUnit(tokens, self._text(tokens) if text is None else text)
        self.last, self.before, self.pending = tokens, self._decode(tokens), self.pending[len(tokens) :]
        return unit

    def _text(self, tokens: tuple[int, ...]) -> str:
        """Text that these tokens add to the unit before them."""
        text = self._decode(self.last + tokens)
        return text.removeprefix(self.before) if text.startswith(self.before) else self._decode(tokens)

    def _decode(self, tokens: tuple[int, ...]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=self.skip, clean_up_tokenization_spaces=False)

    def _is_meant(self, text: str) -> bool:
        """Whether U+FFFD stands in the text itself: then its tokens are those of that character."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tuple(ids[-len(self.pending) :]) == self.pending  # some vocabularies begin every text with a space


class Answer:
    """The text of an answer while it is sampled: whole characters, and no blanks at its ends. Lives as long as the answer."""

    def __init__(self, tokenizer: Tokenizer):
        self.decoder = Decoder(tokenizer, skip_special_tokens=True)
        self.tokens: list[int] = []
        self.started, self.blank = False, ""

    def push(self, token: int) -> str:
        """What one more token settles of the text."""
        self.tokens.append(token)
        return self._settle(self.decoder.push(token))

    def flush(self) -> str:
        """What is left at the end."""
        return self._settle(self.decoder.flush())

    def _settle(self, units: Sequence[TextUnit]) -> str:
        """The text of the units; blanks are held back until something follows them."""
        text = self.blank + "".join(unit.text for unit in units)
        settled = text.rstrip()
        self.blank = text[len(settled) :]
        shown = settled if self.started else settled.lstrip()
        self.started = self.started or settled != ""
        return shown

    def text(self) -> str:
        """The answer as far as it came."""
        return self.decoder.tokenizer.decode(self.tokens, skip_special_tokens=True).strip()


def decode_units(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[TextUnit]:
    """Units of a list of tokens; their texts joined are the decoded text."""
    decoder = Decoder(tokenizer)
    for token in ids:
        yield from decoder.push(int(token))
    yield from decoder.flush()


def label_units(tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[Any]) -> list[tuple[str, Any]]:
    """(text, label) of each unit; a character that tokens of two labels share has the label of the one that completes it."""
    pairs, end = [], 0
    for unit in decode_units(tokenizer, ids):
        end += len(unit.tokens)
        pairs.append((unit.text, labels[end - 1]))
    return pairs
