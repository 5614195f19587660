"""Documents as rows of JSON: their tokens and the labels of those that train, for the hub, or for another program to train on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treetune.core.data import trees
from treetune.core.data.pretokenised import IGNORED
from treetune.core.data.spans import Doc


def rows(docs: Sequence[Doc] | Sequence[trees.TreeDoc]) -> Iterator[dict[str, Any]]:
    """{input_ids, labels} of each document: a label is the token that is predicted there, or -100.

    weights: where they are not all 0 or 1. Of a prompt with answers also branch, 0 for the prompt's tokens, and what each answer has.
    """
    for doc in docs:
        labels = np.where(doc.weight > 0, doc.tokens, IGNORED)
        row: dict[str, Any] = {"input_ids": doc.tokens.tolist(), "labels": labels.tolist()}
        if ((doc.weight != 0) & (doc.weight != 1)).any():
            row["weights"] = doc.weight.tolist()
        if isinstance(doc, trees.TreeDoc):
            row |= {"branch": doc.branch.tolist()} | {name: list(values) for name, values in doc.extras.items()}
        yield row


def write(file: Path, docs: Sequence[Doc] | Sequence[trees.TreeDoc]) -> None:
    """Write a line of JSON for each document."""
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows(docs))


def card(place: str, about: Mapping[str, str]) -> str:
    """The README.md of a repository of such rows, which the hub and the datasets library read the file's name from."""
    lines = "\n".join(f"- {name}: {text}" for name, text in about.items())
    matter = "---\ntags:\n- treetune\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"
    title = place.rpartition("/")[2]
    kinds = "`labels` is the token where it is trained on, -100 elsewhere."
    return f"{matter}\n# {title}\n\nDocuments as `treetune preprocess` makes them: `input_ids` and `labels`. {kinds}\n\n{lines}\n"
