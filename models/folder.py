"""Folders that appear whole or not at all: written beside their place under a temporary name, with a manifest, flushed, then renamed."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from treetune.core import drafts, durable, manifest


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends well, and is removed when it does not.

    Nothing is ever replaced: raises ValueError when there is anything at `path` but an empty folder.
    """
    path = Path(path).absolute()
    require_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drafts.sweep(path.parent)
    part = drafts.name(path)
    part.mkdir()
    try:
        yield part
        manifest.write(part)
        for file in part.rglob("*"):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            durable.fsync(file)
        # Again: another process may have written here meanwhile, which this says more clearly than the error of a rename.
        require_free(path)
        os.rename(part, path)
        durable.fsync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def require_free(path: Path) -> None:
    """Raise ValueError where there is anything at `path` but an empty folder."""
    if path.is_symlink() or path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a {'link' if path.is_symlink() else 'file'}; name a folder that does not exist")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} already holds files: name a folder that does not exist, or move it away")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError when it is missing, broken (with the line), or names a field twice."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a folder that holds {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=partial(_unique, path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON at line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): download or save it again") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read; expected a JSON object of a few levels") from error
    except _Twice:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


class _Twice(ValueError):
    """A field that stands twice in one object."""


def _unique(path: Path, pairs: list[tuple[str, object]]) -> dict:
    """An object of its pairs. Of two equal names the last would win in silence."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _Twice(f"{path} names the field {repeated} twice in one object: leave one of them")
    return fields


def write_json(path: Path, value: dict) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
