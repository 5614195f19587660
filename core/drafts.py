"""Drafts: names of files and folders that are being written beside their final place, or being deleted.

A draft is named `.NAME.HOST-BOOT-SPACE-PID-START-COUNT.KIND` after its final name and its process. The draft of a process that has ended
may be deleted; that of a running process is never touched. Kinds: `draft` is being written; `old` made room for a draft and is restored
if that is never finished; `gone` is being deleted.
"""

import itertools
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from treetune.core import durable, process

DRAFT, OLD, GONE = "draft", "old", "gone"
NAME = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<boot>\w*)-(?P<space>\d*)-(?P<pid>\d+)-(?P<start>\d*)-\d+\.(?P<kind>[a-z]+)")
# What versions before wrote: `.step_000100.PID`, `.step_000100.old.PID`, `.adapter.x1y2z3w4.part` and `.adapter.x1y2z3w4.part.old`.
EARLIER = re.compile(
    r"\.(?P<name>step_\d{6,}|config\.yaml|best\.json|report\.html)(?P<old>\.old)?\.(?P<pid>\d+)"
    r"|\.(?P<folder>adapter|model)\.[a-z0-9_]{8}\.part(?P<aside>\.old)?|\.(?P<sync>(adapter|weights)-v\d{6,})\.part"
)
STALE_S = 7 * 24 * 3600  # of a draft from a machine that cannot be asked: nothing is written for so long
LONGEST = 120  # characters of NAME, because the whole name has a limit too

_count = itertools.count()


class Draft(NamedTuple):
    """A draft's path, final name, process and kind. Another host than this one is recorded by its digest."""

    path: Path
    name: str
    owner: process.Process | int | None  # versions before wrote the number only, or nothing
    kind: str


def name(path: Path, kind: str = DRAFT) -> Path:
    """A new name beside `path` for a draft of this process."""
    this = process.own()
    owner = f"{process.short(this.host)}-{this.boot}-{this.space}-{this.pid}-{this.start}"
    # A folder of kind `old` is restored under the name that stands in this one, which is therefore never cut.
    whole = path.name if kind == OLD else path.name[:LONGEST]
    return path.with_name(f".{whole}.{owner}-{next(_count)}.{kind}")


def read(path: Path) -> Draft | None:
    """The draft that a path names; None where it names none."""
    match = NAME.fullmatch(path.name)
    if match is None:
        return _earlier(path)
    this = process.own()
    host = this.host if match["host"] == process.short(this.host) else match["host"]
    owner = process.Process(host, match["boot"], match["space"], int(match["pid"]), match["start"])
    return Draft(path, match["name"], owner, match["kind"])


def _earlier(path: Path) -> Draft | None:
    match = EARLIER.fullmatch(path.name)
    if match is None:
        return None
    kind = OLD if match["old"] or match["aside"] else DRAFT
    return Draft(path, match["name"] or match["folder"] or match["sync"], int(match["pid"]) if match["pid"] else None, kind)


def inside(folder: Path) -> Iterator[Draft]:
    """The drafts in a folder; none where there is no folder."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (draft := read(path)) is not None:
            yield draft


def abandoned(draft: Draft, *, locked: bool = False) -> bool:
    """Whether no process will finish a draft.

    locked: this process holds the lock of the folder, so a process that it cannot check has ended.
    """
    if draft.owner == process.own():
        return False
    if isinstance(draft.owner, int):
        return process.pid_ended(draft.owner)
    ended = None if draft.owner is None else process.ended(draft.owner)
    return locked or _age_s(draft.path) > STALE_S if ended is None else ended


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def sweep(folder: Path, *, locked: bool = False) -> None:
    """Delete the abandoned drafts of a folder of the kinds `draft` and `gone`; `owned.restore` deals with `old`."""
    for draft in inside(folder):
        if draft.kind in (DRAFT, GONE) and abandoned(draft, locked=locked):
            delete(draft.path)


def delete(path: Path) -> None:
    """Delete a draft; what the disk refuses is left for the next sweep."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def write(path: Path, data: str | bytes) -> None:
    """Write a small file atomically and flush it: at any moment it has its old or its new content."""
    draft = name(path)
    try:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)
        durable.fsync(draft)
        os.replace(draft, path)
        durable.fsync(path.parent)
    finally:
        draft.unlink(missing_ok=True)
