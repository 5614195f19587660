"""Durable writes: flushed to the disk, in lines of which a crash can only cut the last one short; and second names of files."""

import os
import shutil
from pathlib import Path


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    if os.name == "nt":  # folders cannot be flushed there, and files only by who may write them
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(source: str | Path, target: str | Path, *, soft: bool = False) -> None:
    """Give a file a second name, which is a copy where the file system has no links. soft: a name that goes where the file goes."""
    try:
        (os.symlink if soft else os.link)(source, target)
    except OSError:
        shutil.copyfile(source, target)


def append_line(path: Path, line: bytes) -> None:
    """Append a line; if a crash cut the last line short, it is ended first."""
    with open(path, "ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(line + b"\n")
