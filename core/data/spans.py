"""Text with trained character spans -> tokens with weights. Every format ends here, so masks follow one rule.

A text is tokenised once, whole. A token counts when it lies inside a trained span; one that straddles a border does not.
Masks come from character offsets only: which ids a tokenizer uses for padding or EOS never matters.

n tokens of one document. Offsets are characters of the text.
"""

import re
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np

from treetune.core.data import sources, templates
from treetune.core.data.rows import Row
from treetune.core.protocols import Tokenizer

TEMPLATE = "template"  # the role of what no speaker wrote
BYTE_SPACE = "\u0120"  # how byte-level vocabularies spell a space


class Piece(NamedTuple):
    """Characters [begin, end) of a turn that have a weight of their own. A token that straddles its border is not trained."""

    begin: int
    end: int
    weight: float


class Turn(NamedTuple):
    """A stretch of text that one speaker produces: its characters [begin, end), then what closes it.

    The closing is the first special token that starts in [end, limit), with the special tokens right behind it up to `tail`;
    without one, the text between `end` and `tail` but for blanks at its end. Past `tail` the next speaker's header begins.
    """

    begin: int
    end: int
    limit: int
    tail: int
    weight: float
    close: float  # weight of the closing
    pieces: tuple[Piece, ...] = ()  # in order, apart from each other
    calls: bool = False  # what follows `end` is still written by the speaker, up to the last special token before `tail`


class Speaker(NamedTuple):
    """Characters [begin, end) of the text that belong to a role. They only count tokens; masks come from turns."""

    begin: int
    end: int
    role: str


class Text(NamedTuple):
    """A text and its trained characters. `whole` trains every token, except that turns set their own weight on top."""

    text: str
    turns: tuple[Turn, ...]
    whole: bool = False
    eos: float | None = None  # add the tokenizer's default prefix (BOS, mostly) and an EOS of this weight
    cut: int = 0  # trained turns of which the text leaves a part out
    trailing_space_boundaries: int = 0  # borders between parts of different weight that come right after a space
    speakers: tuple[Speaker, ...] = ()  # in order, apart from each other
    unread: tuple[str, ...] = ()  # fields of its messages that nothing reads


class Doc(NamedTuple):
    """One document: weight[i] > 0 says that token i is supervised, that is predicted from token i - 1. weight[0] is 0."""

    tokens: np.ndarray  # int32 [n]
    weight: np.ndarray  # float32 [n]
    row: int


class Encoding(Protocol):
    """Encoding of the tokenizers library, as far as it is read here."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class TextTokens(NamedTuple):
    """Tokens of a text: token i covers the characters [begins[i], ends[i]), neither of which ever falls."""

    text: str
    ids: np.ndarray  # int32 [n]
    begins: np.ndarray  # int64 [n]
    ends: np.ndarray  # int64 [n]


class SpecialTokens(NamedTuple):
    """Ids of a tokenizer that masks depend on."""

    special: np.ndarray  # ids
    added: np.ndarray  # ids of added tokens that are not special, blank ones left out
    prefix: list[int]  # what the tokenizer puts before a text by default
    bos: int | None
    eos: int | None


class EncodedText(NamedTuple):
    """One tokenised text, and how many of its trained turns have nothing that closes them or lack a part."""

    tokens: np.ndarray  # int32 [n]
    weight: np.ndarray  # float32 [n]
    unclosed: int
    cut: int
    trailing_space_boundaries: int = 0
    role: np.ndarray | None = None  # uint8 [n], an index into `names`
    names: tuple[str, ...] = (TEMPLATE,)
    unread: tuple[str, ...] = ()  # as in Text
    ending: str = ""  # what closes a trained turn and looks like one token, but is none


def tokens_by_role(encoded: EncodedText, start: int = 0, stop: int | None = None) -> dict[str, tuple[int, int]]:
    """(tokens, trained tokens) by role of the tokens [start, stop); those that no speaker wrote are under "template"."""
    trained, role = encoded.weight[start:stop] > 0, encoded.role
    role = np.zeros(len(trained), np.uint8) if role is None else role[start:stop]
    totals = np.bincount(role, minlength=len(encoded.names)), np.bincount(role[trained], minlength=len(encoded.names))
    return {name: (int(total), int(count)) for name, total, count in zip(encoded.names, *totals, strict=True)}


def read_special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Special and added tokens of a fast tokenizer. Errors: ValueError for one that cannot give character offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets: a tokenizer with a tokenizer.json is needed")
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    other = {i for i, token in added.items() if i not in special and token.content.strip()}
    # The unknown token stands for any text, so it closes no turn; unless it is the EOS too, as in GPT-2's vocabulary.
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    return SpecialTokens(
        _ids(special - unknown), _ids(other - unknown), _default_prefix(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    )


def require_eos(tokenizer: Tokenizer) -> None:
    """Raise ValueError for a tokenizer without an end-of-text token."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so a model could not learn to stop: set eos_token in its tokenizer_config.json")


def require_text(row: Row, needed: Sequence[str], optional: Sequence[str], location: str) -> None:
    """Raise ValueError for a row that lacks a needed field, or has a value other than text in one."""
    for name in needed:
        if row.get(name) is None:
            raise sources.missing_field([name], row, location)
    for name in (*needed, *optional):
        if not isinstance(row.get(name, ""), str | None):
            raise ValueError(f"{location}: field {name} is of type {type(row[name]).__name__}, expected text")


def encode(texts: Sequence[Text], tokenizer: Tokenizer, special: SpecialTokens) -> list[EncodedText]:
    """Tokenise each text once and weigh its tokens."""
    return weigh_tokens(texts, tokenise(texts, tokenizer), tokenizer, special)


def tokenise(texts: Sequence[Text], tokenizer: Tokenizer) -> list[Encoding]:
    """Ids and character offsets of each text, without special tokens around it. Runs outside the interpreter."""
    backend = tokenizer.backend_tokenizer
    # Truncation and padding stay set in the backend after a call that asked for them, and tokenizer.json may bring them along.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = getattr(tokenizer, "split_special_tokens", False)
    return backend.encode_batch([text.text for text in texts], add_special_tokens=False) if texts else []


def weigh_tokens(texts: Sequence[Text], encodings: Sequence[Encoding], tokenizer: Tokenizer, special: SpecialTokens) -> list[EncodedText]:
    """Tokens of each text with their weights and roles."""
    return [_weigh_text(text, encoding, tokenizer, special) for text, encoding in zip(texts, encodings, strict=True)]


def _weigh_text(text: Text, encoding: Encoding, tokenizer: Tokenizer, special: SpecialTokens) -> EncodedText:
    located = _locate_tokens(text.text, encoding, tokenizer)
    weight, unclosed = _weigh(text, located, special)
    role, names = _roles(text.speakers, located.begins)
    tokens = located.ids
    if text.eos is not None:
        tokens, weight, role = _wrap(tokens, weight, role, text, special)
    weight[:1] = 0.0  # nothing predicts the first token
    ending = _false_ending(text, located)
    return EncodedText(tokens, weight, unclosed, text.cut, text.trailing_space_boundaries, role, names, text.unread, ending)


def _weigh(text: Text, tokens: TextTokens, special: SpecialTokens) -> tuple[np.ndarray, int]:
    """(weight [n], trained turns that nothing closes)."""
    begins, ends = tokens.begins, tokens.ends
    weight = np.full(len(tokens.ids), float(text.whole), dtype=np.float32)
    unclosed = 0
    for turn in text.turns:
        first, inside = np.searchsorted(begins, turn.begin, "left"), np.searchsorted(ends, turn.end, "right")
        opens, after, closed = _closing(tokens, turn, int(inside), special)
        trained = turn.weight > 0 or any(piece.weight > 0 for piece in turn.pieces)
        unclosed += trained and turn.close > 0 and not closed
        if text.whole:  # tokens across the border go too
            weight[np.searchsorted(ends, turn.begin, "right") : max(after, opens)] = 0.0
        if turn.close == turn.weight:
            weight[first:after] = turn.weight
        else:
            weight[first : opens if turn.calls else inside] = turn.weight
            weight[opens:after] = turn.close
        # First every token that touches a piece, then those inside one: a token that two pieces share ends with weight 0, whichever
        # of them comes last.
        for piece in turn.pieces:
            weight[np.searchsorted(ends, piece.begin, "right") : np.searchsorted(begins, piece.end, "left")] = 0.0
        for piece in turn.pieces:
            weight[np.searchsorted(begins, piece.begin, "left") : np.searchsorted(ends, piece.end, "right")] = piece.weight
    return weight, int(unclosed)


def _false_ending(text: Text, tokens: TextTokens) -> str:
    """Text behind the content of a trained turn that is spelt like a special token but is several tokens; "" for none."""
    begins, ends = tokens.begins, tokens.ends
    for turn in text.turns:
        match = templates.MARK.match(text.text, turn.end, max(turn.tail, turn.end))
        if match and turn.close > 0 and (turn.weight > 0 or turn.pieces):
            begin, end = match.span(1)
            i = int(np.searchsorted(begins, begin, "right")) - 1
            if i >= 0 and not (begins[i] <= begin and ends[i] >= end):
                return match[1]
    return ""


def _closing(tokens: TextTokens, turn: Turn, start: int, special: SpecialTokens) -> tuple[int, int, bool]:
    """(first, one past the last) of the tokens that close the turn whose content ends before token `start`, and whether any do."""
    if turn.calls:
        return _closing_calls(tokens, turn, start, special)
    after = _closing_text(tokens, turn, start, special)
    return int(np.searchsorted(tokens.begins, turn.end, "left")), after, after > start


def _closing_calls(tokens: TextTokens, turn: Turn, start: int, special: SpecialTokens) -> tuple[int, int, bool]:
    """As `_closing`, for a turn with tool calls, which may hold special tokens: the last one before `tail` closes, if blanks follow."""
    text, ids, begins, ends = tokens
    tail, stop = int(np.searchsorted(begins, turn.tail, "left")), int(np.searchsorted(begins, turn.limit, "left"))
    for kind in (special.special, special.added):
        hits = start + np.flatnonzero(np.isin(ids[start:stop], kind))
        before, behind = hits[hits < tail], hits[hits >= tail]
        if len(before) and not text[ends[before[-1]] : turn.tail].strip():
            return int(before[-1]), int(before[-1]) + 1, True
        if len(behind) and not text[turn.tail : begins[behind[0]]].strip():
            return int(behind[0]), int(behind[0]) + 1, True
    after = _closing_run(tokens, turn, start)
    return start, after, after > start


def _closing_text(tokens: TextTokens, turn: Turn, start: int, special: SpecialTokens) -> int:
    """Index after the last token of what closes the turn whose content ends before token `start`; `start` when nothing does."""
    text, ids, begins, ends = tokens
    stop = int(np.searchsorted(begins, turn.limit, "left"))
    final = int(np.searchsorted(ends, turn.tail, "left"))
    if (
        not re.search(r"\s", text[turn.end : turn.tail])
        and start <= final < stop
        and ends[final] == turn.tail
        and ids[final] in special.special
    ):
        return final + 1  # special tokens with names between them, as in <|close|>message<|sep|><|end_of_msg|>
    begin = start
    while begin < stop and text[begins[begin] : turn.end].strip():
        begin += 1  # content, in one token with what follows it
    # Some tokenizers do not mark their end of turn as special, it is only an added token: these are asked second, since added tokens
    # may also be ordinary text.
    for kind in (special.special, special.added):
        hits = np.flatnonzero(np.isin(ids[begin:stop], kind))
        if len(hits) == 0:
            continue
        last = begin + int(hits[0])
        if begins[last] >= turn.tail and text[turn.end : begins[last]].strip():
            break  # it belongs to the next speaker's header
        while last + 1 < stop and _adjoins(tokens, last) and ends[last + 1] <= turn.tail and ids[last + 1] in kind:
            last += 1
        return last + 1
    return _closing_run(tokens, turn, start)


def _adjoins(tokens: TextTokens, i: int) -> bool:
    """Whether token i + 1 follows without a blank, be it one that token i has swallowed."""
    return tokens.begins[i + 1] == tokens.ends[i] and not tokens.text[tokens.ends[i] - 1].isspace()


def _closing_run(tokens: TextTokens, turn: Turn, start: int) -> int:
    """As `_closing_text` for a closing in plain text. Blanks that a tokenizer glues to its last characters come along."""
    text, ends = tokens.text, tokens.ends
    run = len(text[turn.end : turn.tail].rstrip())
    behind = text[turn.end + run :]
    blank = len(behind) - len(behind.lstrip()) if run else 0
    after = int(np.searchsorted(tokens.begins, turn.end + run, "left"))
    while after > start and ends[after - 1] > turn.end + run + blank:
        after -= 1
    return max(after, start)


def _roles(speakers: tuple[Speaker, ...], begins: np.ndarray) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """(role [n], names): of each token the speaker in whose characters it begins."""
    if not speakers:
        return None, (TEMPLATE,)
    names = tuple(dict.fromkeys((TEMPLATE, *(speaker.role for speaker in speakers))))
    codes = np.zeros(2 * len(speakers) + 1, np.uint8)
    codes[1::2] = [names.index(speaker.role) for speaker in speakers]
    return codes[np.searchsorted([edge for speaker in speakers for edge in speaker[:2]], begins, "right")], names


def _wrap(
    tokens: np.ndarray, weight: np.ndarray, role: np.ndarray | None, text: Text, special: SpecialTokens
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Default prefix before, EOS behind, each unless it is there already."""
    prefix = special.prefix if tokens[: len(special.prefix)].tolist() != special.prefix else []
    suffix = [special.eos] if len(tokens) == 0 or tokens[-1] != special.eos else []
    tokens = np.concatenate([_ids(prefix), tokens, _ids(suffix)])
    weight = np.concatenate([np.full(len(prefix), float(text.whole)), weight, np.zeros(len(suffix))])
    weight[-1] = text.eos
    role = None if role is None else np.concatenate([np.zeros(len(prefix), np.uint8), role, np.zeros(len(suffix), np.uint8)])
    return tokens.astype(np.int32), weight.astype(np.float32), role


def _locate_tokens(text: str, encoding: Encoding, tokenizer: Tokenizer) -> TextTokens:
    """Tokens of a text and their characters, with the spaces back that some byte-level tokenizers trim off their offsets."""
    ids = np.array(encoding.ids, dtype=np.int32)
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64, count=2 * len(ids)).reshape(-1, 2)
    # Tokens that hold the bytes of one character have its offsets each; `searchsorted` needs ends and begins that never fall.
    begins, ends = offsets[:, 0].copy(), np.maximum.accumulate(offsets[:, 1])
    previous = np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)]
    # A post-processor with trim_offsets takes the spaces of a token out of its offsets, which leaves a gap before the token or behind
    # the one before it. The vocabulary's spelling says whose they are.
    gaps = np.flatnonzero(begins > previous)
    for i in gaps:
        word = tokenizer.convert_ids_to_tokens(int(ids[i]))
        begins[i] = max(previous[i], begins[i] - (len(word) - len(word.lstrip(BYTE_SPACE))))
    for i in gaps[gaps > 0] - 1:
        word = tokenizer.convert_ids_to_tokens(int(ids[i]))
        ends[i] = min(begins[i + 1], ends[i] + len(word) - len(word.rstrip(BYTE_SPACE)))
    return TextTokens(text, ids, np.maximum.accumulate(np.minimum(begins, ends)), ends)


def _default_prefix(tokenizer: Tokenizer) -> list[int]:
    """Ids that the tokenizer puts before a text on its own: [BOS], nothing, or whatever its family uses."""
    # Asked of an encoded text, as neither add_bos_token nor bos_token says what a tokenizer's post-processor does.
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    return full[: starts[0]] if bare and starts else []


def _ids(values: set[int] | Sequence[int | None]) -> np.ndarray:
    return np.array(sorted(values) if isinstance(values, set) else values, dtype=np.int32)
