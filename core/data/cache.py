"""Prepared documents on disk: found by a key over everything that made them, memory-mapped, written once and whole.

An entry is a folder: one .npy per column of the documents, and header.json with how columns form documents, the report, and the size
and checksum of every file. It is written to a temporary folder and renamed, so an entry is either complete or not there. Whatever is
damaged is as good as missing: `load_entry` gives None, and the next `save_entry` puts a sound entry in its place.

Documents may be NamedTuples of arrays, numbers, texts, None, and tuples or lists of them; columns know nothing of their meaning.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from treetune.core import ckpt, drafts, owned
from treetune.core.data import columns, files
from treetune.core.protocols import Tokenizer

HEADER = "header.json"
ENTRY = re.compile(rf"{HEADER}|.+\.npy")  # the files of an entry
LIBRARIES = ("transformers", "tokenizers", "jinja2")  # a new version may render or tokenise differently
TOKENIZER_FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "legacy", "do_lower_case")
# What versions before left of an interrupted write.
EARLIER = re.compile(r"\.writing-([0-9a-f]{64}|broken)-[0-9a-f]{32}")
STALE_S = 24 * 3600
CHUNK_BYTES = 1 << 24


def entry_key(
    *,
    data: Sequence[str],
    tokenizer: Tokenizer,
    template: str | None = None,
    options: dict[str, Any] | None = None,
    code: Sequence[str] = (),
) -> str:
    """The name of an entry: sha256 over all that its documents depend on, so that a changed input never finds an old entry.

    data: a digest of each data set (`sources.digest_source`), in order; template: the chat template's text, unless it is the tokenizer's;
    options: every option that reading and encoding take; code: files whose bytes count too, such as a user's own transform.
    The bytes of this package's data code and the versions of the libraries that render and tokenise are always part of it.
    Errors: ValueError for an option that is no plain value.
    """
    parts = {
        "data": list(data),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template,
        "options": _plain(options or {}, "options"),
        "code": code_digest(),
        "own code": [_file_digest(path) for path in code],
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """sha256 over the tokenizer's serialised backend, special tokens, chat template and flags; its name and place do not count."""
    return hashlib.sha256(json.dumps([vocabulary_digest(tokenizer), tokenizer.chat_template], default=str).encode()).hexdigest()


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """sha256 over everything of a tokenizer that decides which ids a text becomes, so without the chat template."""
    backend = tokenizer.backend_tokenizer.to_str()
    start = backend.find('"added_tokens":')  # before it: padding and truncation, which the last call has set
    parts = [type(tokenizer).__name__, backend[max(0, start) :], _texts(tokenizer.special_tokens_map), tokenizer.all_special_ids]
    parts += [[getattr(tokenizer, name, None) for name in TOKENIZER_FLAGS]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def code_digest(folder: Path = Path(__file__).parent) -> str:
    """sha256 over the code and templates of this package's data folder."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".jinja", ".jinja2"))
    text = [[path.relative_to(folder).as_posix(), _file_digest(path)] for path in paths]
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()


def load_entry(root: str | Path, key: str) -> tuple[list, Any] | None:
    """(documents, report) of an entry, arrays being read-only views into the mapped files; None when it is missing or damaged."""
    folder = Path(root) / key
    try:
        header = _header(folder)
        arrays = {name: np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in header["files"]}
        return columns.from_columns(header["schema"], arrays), columns.report_from_json(header["report"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, EOFError):
        return None


def save_entry(root: str | Path, key: str, docs: Sequence, report: object = None) -> Path:
    """Write an entry and return its folder. When another process has finished the same one first, its entry stays.

    report: NamedTuples, dicts, lists and plain values. Errors: OSError for a full or read-only disk, after which nothing is left;
    ValueError for documents or reports that cannot be stored.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    temporary = drafts.name(root / key)
    temporary.mkdir()
    try:
        _write(temporary, docs, report)
        return _publish(temporary, root / key)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, docs: Sequence, report: object) -> None:
    schema, arrays = columns.to_columns(docs)
    for name, array in arrays.items():
        with open(folder / name, "wb") as file:
            np.save(file, array, allow_pickle=False)
            _flush(file)
    sizes = {name: [os.path.getsize(folder / name), _checksum(folder / name)] for name in arrays}
    text = json.dumps({"schema": schema, "report": columns.report_to_json(report), "files": sizes})
    with open(folder / HEADER, "w", encoding="utf-8") as file:
        file.write(hashlib.sha256(text.encode()).hexdigest() + "\n" + text)
        _flush(file)
    ckpt.fsync(folder)


def _publish(temporary: Path, folder: Path) -> Path:
    """Rename the folder into place. A sound entry that is already there stays; a damaged one is removed."""
    for _ in range(100):
        try:
            os.rename(temporary, folder)
            ckpt.fsync(folder.parent)
            return folder
        except OSError:
            if not folder.is_dir():
                raise
        if _sound(folder):
            return folder
        try:
            if not owned.remove(folder, ENTRY):
                raise OSError(f"{folder} is damaged and holds files that are not of this cache: move it away")
        except FileNotFoundError:
            continue  # another process has moved it
    raise OSError(f"{folder} cannot be replaced: other processes keep writing it")


def _header(folder: Path) -> dict:
    """Header of an entry whose sizes and checksums match. Errors: ValueError or OSError for a damaged entry."""
    digest, _, text = (folder / HEADER).read_text(encoding="utf-8").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError(f"{folder / HEADER} is damaged")
    header = json.loads(text)
    for name, (size, checksum) in header["files"].items():
        if os.path.getsize(folder / name) != size or _checksum(folder / name) != checksum:
            raise ValueError(f"{folder / name} is damaged")
    return header


def _sound(folder: Path) -> bool:
    try:
        return bool(_header(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksum(path: Path) -> int:
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            total = zlib.crc32(chunk, total)
    return total


def _sweep(root: Path) -> None:
    """Remove unfinished entries of processes that were killed."""
    drafts.sweep(root)
    for path in root.glob(".writing-*"):
        if EARLIER.fullmatch(path.name) and not owned.foreign(path, ENTRY) and time.time() - path.stat().st_mtime > STALE_S:
            drafts.delete(path)


def _plain(value: object, path: str) -> object:
    """An option with its types spelled out where JSON would merge them."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {"": [[_plain(name, path), _plain(item, f"{path}.{name}")] for name, item in sorted(value.items(), key=repr)]}
    raise ValueError(f"{path} is of type {type(value).__name__}: only plain values can be part of a cache key")


def _texts(special: Mapping[str, Any]) -> list[list[str]]:
    return sorted([name, str(token)] for name, token in special.items())


def _file_digest(path: str | Path) -> str:
    return files.digest_files([files.File(str(path), "code")])


def _flush(file: BinaryIO | TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())
