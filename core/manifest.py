"""Manifests: the size and sha256 of every file of a folder, in a file of that folder which is compared when the folder is read.

A flipped bit, a truncated, missing, swapped or added file, an edited number: each is a ValueError that names the file. A folder without a
manifest was written by another program, or its owner accepted changes by deleting it: nothing is compared there. The digests are those
of `sha256sum`.
"""

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from treetune.core import fields

NAME, FORMAT = "treetune_manifest.json", 1
WEIGHTS = ".safetensors"
CARD = "README.md"  # for people, who may edit it: listed, and never compared
# What loaders take from a folder when it is there: such a file counts even if the manifest does not list it.
LOADED = re.compile(
    r".*\.safetensors(\.index\.json)?|(adapter_|generation_|tokenizer_)?config\.json|tokenizer\.(json|model)|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.(json|jinja)|additional_chat_templates/.*|vocab\.(json|txt)|merges\.txt|treetune_base\.json"
)
THREADS, SMALL = 4, 2**22  # bytes below which threads take longer to start than the files to hash
SETTLED_NS = 2 * 10**9  # a file that was changed a moment ago may change again without another time of change


class Entry(NamedTuple):
    """Size of a file as it was written, and the hexadecimal sha256 of its bytes."""

    bytes: int
    sha256: str


_compared: dict[str, tuple] = {}  # path -> identity and digest of a file that was compared in this process


def entry(path: Path) -> Entry:
    """The entry of a file as it is now."""
    digest = _digest(path)
    if isinstance(digest, OSError):
        raise digest
    return Entry(path.stat().st_size, digest)


def write(folder: Path, known: Mapping[str, Entry] = MappingProxyType({})) -> None:
    """Write the manifest of all files below `folder`. The caller flushes it with the others before the folder gets its name.

    known: entries of files that are not read again.
    """
    names = [name for name in _names(folder) if name not in known]
    digests = _digests([folder / name for name in names])
    if unread := [digest for digest in digests if isinstance(digest, OSError)]:
        raise unread[0]
    read = {name: Entry((folder / name).stat().st_size, str(digest)) for name, digest in zip(names, digests, strict=True)}
    files = {name: each._asdict() for name, each in sorted((read | dict(known)).items())}
    (folder / NAME).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")


def check(folder: str | Path, *, weights: bool = True, fix: str | None = None) -> bool:
    """Whether a folder has a manifest. Raises ValueError, with `fix`, unless every file is as it was written.

    Without `weights` the bytes of safetensors files are not compared. A file is read once in a process while it does not change.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / NAME):
        return False
    entries = {name: entry for name, entry in read(folder).items() if name != CARD}
    wrong = [text for name, entry in entries.items() if (text := _size_error(folder / name, entry))]
    wrong += [f"{folder / name} was added after the folder was written" for name in _added(folder, entries)]
    compared = {folder / name: entry for name, entry in entries.items() if weights or not name.endswith(WEIGHTS)}
    if not wrong:
        wrong = _changed(compared)
    if wrong:
        more = f" (and {len(wrong) - 1} more of its files)" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{more}: {fix or accept(folder)}")
    return True


def accept(folder: Path) -> str:
    """Advice for a folder whose files differ from its manifest."""
    return f"copy or make it again; if you changed it yourself, delete {folder / NAME}, and the folder is used without this check"


def read(folder: Path) -> dict[str, Entry]:
    """The entries of a folder's manifest by file name. Raises ValueError for one that is damaged."""
    file = folder / NAME
    try:
        meta = fields.mapping(json.loads(file.read_bytes().decode()), str(file))
        version = fields.integer(meta, "format")
        if version != FORMAT:
            raise ValueError(f"{file} has format {version}; this version reads {FORMAT}")
        listed = fields.inner(meta, "files")
        return {_inside(name, file): _entry(listed, name) for name in listed.values}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): {accept(folder)}") from error


def _entry(listed: fields.Fields, name: str) -> Entry:
    entry = fields.inner(listed, name)
    return Entry(fields.integer(entry, "bytes", least=0), fields.text(entry, "sha256"))


def _inside(name: str, file: Path) -> str:
    """The name of a file, which must lie below the folder of its manifest."""
    if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{file} lists {name!r}; expected the name of a file in its folder")
    return name


def _names(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != NAME)


def _added(folder: Path, entries: dict[str, Entry]) -> list[str]:
    """Files that a loader would take and the manifest does not list."""
    places = (folder, folder / "additional_chat_templates")
    names = (path.relative_to(folder).as_posix() for place in places if place.is_dir() for path in place.iterdir() if path.is_file())
    return sorted(name for name in names if name not in entries and LOADED.fullmatch(name))


def _size_error(path: Path, entry: Entry) -> str | None:
    try:
        status = path.stat()
    except OSError:
        return f"{path} is missing"
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is no regular file"
    return None if status.st_size == entry.bytes else f"{path} has {status.st_size} bytes and was written with {entry.bytes}"


def _changed(entries: dict[Path, Entry]) -> list[str]:
    """Faults of the files whose digest differs or that cannot be read; files that were compared before are not read again."""
    keys = {path: (_identity(path), entry.sha256) for path, entry in entries.items()}
    unread = [path for path in entries if _compared.get(str(path.resolve())) != keys[path]]
    digests = dict(zip(unread, _digests(unread), strict=True))
    wrong = [_fault(path, digest) for path, digest in digests.items() if digest != entries[path].sha256]
    for path in unread:
        if digests[path] == entries[path].sha256 and time.time_ns() - keys[path][0][-1] > SETTLED_NS:
            _compared[str(path.resolve())] = keys[path]
    return wrong


def _fault(path: Path, digest: str | OSError) -> str:
    if isinstance(digest, OSError):
        return f"{path} cannot be read ({digest.strerror or digest})"
    return f"{path} is not as it was written: its sha256 differs"


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _digests(paths: Iterable[Path]) -> list[str | OSError]:
    """sha256 of each file, or the error of reading it; several large ones at a time, because hashing releases the interpreter's lock."""
    paths = list(paths)
    if _bytes(paths) < SMALL:
        return [_digest(path) for path in paths]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_digest, paths))


def _bytes(paths: list[Path]) -> int:
    """The size of the files that can be read."""
    total = 0
    for path in paths:
        with suppress(OSError):
            total += path.stat().st_size
    return total


def _digest(path: Path) -> str | OSError:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return error
