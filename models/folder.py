"""Folders that appear whole or not at all: written beside their place under a temporary name, with a manifest, flushed, then renamed."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from treetune.core import manifest


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends well, and is removed when it does not.

    A folder that is already at `path` is replaced as a whole, and stays as it was when the block fails.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        part.chmod(0o777 & ~_umask())
        yield part
        manifest.write(part)
        for file in part.rglob("*"):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            _flush(file)
        _replace(part, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(part: Path, path: Path) -> None:
    """Rename `part` to `path`; a folder cannot be renamed over a full one, so that one steps aside first and returns on failure."""
    if not path.exists():
        os.rename(part, path)
        return
    aside = path.parent / f"{part.name}.old"
    os.rename(path, aside)
    try:
        os.rename(part, path)
    except OSError:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError when it is missing or broken, with the line."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a folder that holds {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON at line {error.lineno}: {error.msg}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found


def write_json(path: Path, value: dict) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
