"""Documents as people read them: tokens as text, each with what the loss makes of it, and the sides of a pair apart."""

from collections.abc import Sequence
from typing import NamedTuple

from treetune.core.data import detokenise, trees
from treetune.core.data.spans import Doc
from treetune.core.protocols import Tokenizer

# Labels: "on" is supervised at weight 1 (or judged good), "half" at another weight, "bad" is to be avoided, "off" is read only.
MEANINGS = {"on": "supervised", "bad": "rejected, or judged bad", "half": "at another weight"}
MARKS = {"on": ("[[", "]]"), "bad": ("{{", "}}"), "half": ("((", "))"), "off": ("", "")}  # where there are no colours
Pieces = list[tuple[str, str]]  # (text of a token, or of several where a character needs them; label)


class Passage(NamedTuple):
    """A part of a document: its title ("" for a whole document) and text; side: "on" or "bad" for a completion to prefer or to avoid."""

    title: str
    pieces: Pieces
    side: str = "off"


def split(doc: Doc | trees.TreeDoc, tokenizer: Tokenizer, read: str | None) -> list[Passage]:
    """The document in one passage, or its prompt and then each completion. read: `kinds.DatasetSpec.read` of its kind."""
    if read == "classes" and isinstance(doc, trees.TreeDoc) and doc.classes is not None:
        labels = ["off" if label < 0 else "on" if label else "bad" for label in doc.classes.tolist()]
        return [Passage("", detokenise.label_units(tokenizer, doc.tokens.tolist(), labels))]
    if not isinstance(doc, trees.TreeDoc) or not doc.branch[-1]:
        return [Passage("", label_tokens(doc, tokenizer))]
    return _tree(doc, tokenizer)


def label_tokens(doc: Doc | trees.TreeDoc, tokenizer: Tokenizer) -> Pieces:
    """The tokens of a document as text, labelled by their weights."""
    return detokenise.label_units(tokenizer, doc.tokens.tolist(), _weight_labels(doc))


def _tree(doc: trees.TreeDoc, tokenizer: Tokenizer) -> list[Passage]:
    # Each completion is decoded after its prompt: some decoders need what comes before, and a character may begin in the prompt.
    labels, trunk = _weight_labels(doc), [i for i, branch in enumerate(doc.branch.tolist()) if branch == 0]
    passages: list[Passage] = []
    for title, avoid, branch in zip(*titles(doc), trees.branches(doc), strict=True):
        rows = [*trunk, *branch]
        marks = [
            ("bad" if avoid and i >= len(trunk) and labels[row] == "on" else labels[row], i >= len(trunk)) for i, row in enumerate(rows)
        ]
        texts = detokenise.label_units(tokenizer, doc.tokens[rows].tolist(), marks)
        prompt, completion = ([(text, label) for text, (label, part) in texts if part is after] for after in (False, True))
        passages += [] if passages else [Passage("prompt", prompt)]
        passages.append(Passage(title, completion, "bad" if avoid else "on"))
    return passages


def _weight_labels(doc: Doc | trees.TreeDoc) -> list[str]:
    return ["off" if weight == 0 else "on" if weight == 1 else "half" for weight in doc.weight.tolist()]


def titles(doc: trees.TreeDoc) -> tuple[list[str], list[bool]]:
    """(title of each completion, whether it is one to avoid)."""
    if "desirable" not in doc.extras:
        return ["chosen", "rejected"], [False, True]
    desirable = bool(doc.extras["desirable"][0])
    return [f"completion, {'' if desirable else 'un'}desirable", "completion of another row, for the baseline"], [not desirable, False]


def join_runs(pieces: Sequence[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Neighbouring pieces of one label together: (label, their texts)."""
    groups: list[tuple[str, list[str]]] = []
    for text, label in pieces:
        if not groups or groups[-1][0] != label:
            groups.append((label, []))
        groups[-1][1].append(text)
    return groups


def mark(pieces: Pieces) -> str:
    """The pieces with marks around what is not read only."""
    return "".join(f"{MARKS[label][0]}{''.join(texts)}{MARKS[label][1]}" for label, texts in join_runs(pieces))


def legend(parts: Sequence[Passage]) -> str:
    """What the marks of these passages mean, in a line."""
    labels = {label for part in parts for _, label in part.pieces}
    return ", ".join(f"{MARKS[label][0]}{meaning}{MARKS[label][1]}" for label, meaning in MEANINGS.items() if label in labels)
