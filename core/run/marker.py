"""What tells a run folder from any other: a file that only treetune writes, and the names that a run makes. Imports no torch."""

import json
import os
import re
import uuid
from pathlib import Path
from typing import NamedTuple

from treetune.core import drafts, lock, owned

NAME, FORMAT, PREVIOUS = ".treetune.json", 1, "previous"
FILES = (
    "config.yaml", "metrics.jsonl", "samples.jsonl", "best.json", "report.html", "live.js", "status.json", "run.log",
    "trackers.json",
    "profile_trace.json", "profile_ops.txt", "profile_memory.pickle", "metrics.tmp", "samples.tmp",
)  # fmt: skip
RESULTS = ("adapter", "model")
TENSORBOARD = "tensorboard"  # folder of event files
SYNCED = re.compile(r"(adapter|weights)-v\d{6,}")  # in the folder `engine`, what a sampler was given
# Versions before wrote no marker, but every option into config.yaml: a file of the user's does not hold all of these.
EARLIER = ("seed", "micro_batch_size", "gradient_accumulation_steps", "max_grad_norm", "num_epochs", "save_total_limit", "logging_steps")


class Marker(NamedTuple):
    """Of a run: its id, and which of `RESULTS` it makes."""

    run: str
    makes: tuple[str, ...]


def new(makes: tuple[str, ...]) -> Marker:
    """The marker of a run that begins."""
    return Marker(uuid.uuid4().hex, makes)


def write(root: Path, one: Marker) -> None:
    """Mark a folder as that of a run."""
    text = json.dumps({"made_by": "treetune", "run": one.run, "makes": list(one.makes), "format": FORMAT})
    drafts.write(root / NAME, text + "\n")


def read(root: Path) -> Marker | None:
    """The marker of a run folder; None for any other folder. Raises ValueError for a run of a later version."""
    try:
        fields = json.loads((root / NAME).read_text(encoding="utf-8")) if _plain(root / NAME) else None
        if not fields or fields["made_by"] != "treetune":
            return _earlier(root)
        marker = Marker(str(fields["run"]), tuple(map(str, fields["makes"])))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _earlier(root)  # damaged
    if fields.get("format") != FORMAT:
        raise ValueError(f"{root / NAME} has format {fields.get('format')!r}; this version reads {FORMAT}: use a later version of treetune")
    return marker._replace(makes=tuple(name for name in marker.makes if name in RESULTS))


def marked(root: Path) -> bool:
    """Whether a folder has a marker, in whatever state."""
    return os.path.lexists(root / NAME)


def _earlier(root: Path) -> Marker | None:
    """What a version without markers left: all options in its config.yaml, the folder of checkpoints, and results only after records."""
    file, checkpoints = root / "config.yaml", root / "checkpoints"
    try:
        if checkpoints.is_symlink() or not checkpoints.is_dir() or not _plain(file) or file.stat().st_size > 1 << 20:
            return None
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    values = dict(re.findall(r"^(\w+):[ \t]*(.*)$", text, re.MULTILINE))
    if not values.keys() >= set(EARLIER):
        return None
    if not _plain(root / "metrics.jsonl"):  # a user's own model beside a copy of a run's config
        return Marker("", ())
    return Marker("", ("model",) if values.get("adapter", "none") == "none" else ("adapter",))


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def names(one: Marker) -> tuple[str, ...]:
    """What a run of this marker makes in its folder, the marker first."""
    return (NAME, *FILES, "checkpoints", "engine", TENSORBOARD, *one.makes)


def foreign(root: Path, one: Marker) -> list[Path]:
    """What is in a run folder that the run did not make."""
    out = []
    for path in sorted(root.iterdir()):
        if drafts.read(path) is not None or path.name == lock.NAME:
            continue
        if path.name in (NAME, *FILES):
            out += [] if _plain(path) else [path]
        elif path.name == "checkpoints":
            out += _foreign_inside(path, re.compile(r"step_\d{6,}"), owned.CHECKPOINT)
        elif path.name == "engine":
            out += _foreign_inside(path, SYNCED, owned.MODEL)
        elif path.name == TENSORBOARD:
            out += owned.foreign(path, owned.EVENTS)
        else:
            out += owned.foreign(path, owned.MODEL) if path.name in one.makes else [path]
    return out


def _foreign_inside(folder: Path, folders: re.Pattern, names: re.Pattern) -> list[Path]:
    """What is foreign in a folder of folders that a run makes."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder]
    out = []
    for path in sorted(folder.iterdir()):
        if drafts.read(path) is None:
            expected = folders.fullmatch(path.name) and path.is_dir()
            out += owned.foreign(path, names) if expected else [path]
    return out


def holds_files(root: Path) -> bool:
    """Whether there is anything in a folder but a lock and drafts, which block nobody."""
    return root.is_dir() and any(path.name != lock.NAME and drafts.read(path) is None for path in root.iterdir())
