"""Documents as people read them: their tokens as text, each with what the loss makes of it, and pairs side by side."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.text import Text

from treetune.cli import terminal
from treetune.core.data import detokenise, kinds, trees
from treetune.core.data.spans import Doc

STYLES = {"on": "black on green", "bad": "black on red", "half": "black on yellow", "off": "dim"}
MARKS = {"on": ("[[", "]]"), "bad": ("{{", "}}"), "half": ("((", "))"), "off": ("", "")}
MEANINGS = {"on": "supervised", "bad": "rejected, or judged bad", "half": "at another weight"}
Pieces = list[tuple[str, str]]  # (text of a token, or of several where a character needs them; how it is shown: a key of STYLES)


class Passage(NamedTuple):
    """A part of a document: what it is ("" for a whole document), and its text. side: "on" or "bad" where it is to be liked or avoided."""

    title: str
    pieces: Pieces
    side: str = "off"


def document(doc: Doc | trees.TreeDoc, tokenizer: Any) -> tuple[int, Pieces]:
    """The row of a document and its tokens: supervised at weight 1 ("on"), at another ("half"), or read only ("off")."""
    return doc.row, detokenise.labelled(tokenizer, doc.tokens.tolist(), _weights(doc))


def of(doc: Doc | trees.TreeDoc, tokenizer: Any, kind: kinds.Kind) -> list[Passage]:
    """The document in one piece, or its prompt and then each completion."""
    if kind.read == "classes":
        judged = ["off" if label < 0 else "on" if label else "bad" for label in doc.classes.tolist()]
        return [Passage("", detokenise.labelled(tokenizer, doc.tokens.tolist(), judged))]
    if not isinstance(doc, trees.TreeDoc) or not doc.branch[-1]:
        return [Passage("", document(doc, tokenizer)[1])]
    return _tree(doc, tokenizer)


def _tree(doc: trees.TreeDoc, tokenizer: Any) -> list[Passage]:
    """Each completion is decoded behind its prompt, which some decoders need and where a character may begin."""
    labels, trunk = _weights(doc), [i for i, branch in enumerate(doc.branch.tolist()) if branch == 0]
    out: list[Passage] = []
    for title, bad, own in zip(*titles(doc), trees.branches(doc), strict=True):
        places = [*trunk, *own]
        shown = ["bad" if bad and i >= len(trunk) and labels[place] == "on" else labels[place] for i, place in enumerate(places)]
        ends = [(label, i >= len(trunk)) for i, label in enumerate(shown)]
        found = detokenise.labelled(tokenizer, doc.tokens[places].tolist(), ends)
        prompt, completion = ([(text, label) for text, (label, behind) in found if behind is part] for part in (False, True))
        out += [] if out else [Passage("prompt", prompt)]
        out.append(Passage(title, completion, "bad" if bad else "on"))
    return out


def _weights(doc: Doc | trees.TreeDoc) -> list[str]:
    return ["off" if weight == 0 else "on" if weight == 1 else "half" for weight in doc.weight.tolist()]


def titles(doc: trees.TreeDoc) -> tuple[list[str], list[bool]]:
    """(what each completion is, whether it is one to avoid)."""
    if "desirable" not in doc.extras:
        return ["chosen", "rejected"], [False, True]
    good = bool(doc.extras["desirable"][0])
    return [f"completion, {'' if good else 'un'}desirable", "completion of another row, for the baseline"], [not good, False]


def runs(pieces: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Neighbours that are shown alike, together: (how, their texts)."""
    out: list[tuple[str, list[str]]] = []
    for text, how in pieces:
        if not out or out[-1][0] != how:
            out.append((how, []))
        out[-1][1].append(text)
    return out


def coloured(pieces: Pieces) -> Text:
    """The pieces for a terminal with colours."""
    return Text.assemble(*((terminal.safe("".join(texts)), STYLES[how]) for how, texts in runs(pieces)))


def marked(pieces: Pieces) -> str:
    """The pieces with marks around what is not read only, for where there are no colours."""
    return "".join(f"{MARKS[how][0]}{''.join(texts)}{MARKS[how][1]}" for how, texts in runs(pieces))


def legend(passages: Sequence[Passage]) -> str:
    """What the marks of these passages mean, in a line."""
    shown = {how for passage in passages for _, how in passage.pieces}
    return ", ".join(f"{MARKS[how][0]}{meaning}{MARKS[how][1]}" for how, meaning in MEANINGS.items() if how in shown)
