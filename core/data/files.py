"""Files of a data set: paths, folders, patterns and remote addresses, plain or compressed.

A `File` is a name, what is in it (a key of `file_rows.READERS`) and how it is packed. Remote addresses go through fsspec.
"""

import glob
import gzip
import hashlib
import importlib
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard
from urllib.parse import urlsplit

SUFFIXES = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".txt": "text"}
FILE_TYPES = (*SUFFIXES.values(), "document")  # "document" is a whole text file as one row; only ds_type can ask for it
PACKED = (".gz", ".zst")
CHUNK_BYTES = 1 << 20
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder: of several splits, of one
FREE_BYTES, MOST_EXPANSION = 64 << 20, 250  # a packed file may unpack to so much, or to so many times its own size
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
SPLITS = {"train": "train", "training": "train", "test": "test", "valid": "validation", "val": "validation", "dev": "validation"}
SPLITS |= {"validation": "validation"}
SERVES = {None: tuple(SUFFIXES.values()), "json": ("json", "jsonl"), "document": ("text",)}  # kinds by suffix that a ds_type takes


class File(NamedTuple):
    """One file: its path or address, its kind, and its packing ("", ".gz" or ".zst")."""

    name: str
    kind: str
    packed: str = ""


def is_remote(path: str) -> bool:
    """Whether the path is an address such as s3://bucket/key."""
    return bool(ADDRESS.match(path))


def kind_of(name: str) -> tuple[str | None, str]:
    """(kind by the suffix or None, packing) of a file name or address."""
    path = Path(urlsplit(name).path if is_remote(name) else name)
    packed = path.suffix if path.suffix in PACKED else ""
    return SUFFIXES.get(path.with_suffix("").suffix if packed else path.suffix), packed


def is_hub_id(path: str | None, ds_type: str | None = None) -> TypeGuard[str]:
    """Whether a path is owner/name of the hub: no local path, and not inside a local folder."""
    if path is None or ds_type is not None or kind_of(path)[0]:
        return False
    local = Path(path)
    return bool(HUB_ID.fullmatch(path)) and not local.exists() and not local.parent.exists()


def find(path: str | None, *, data_files: str | Sequence[str] = (), ds_type: str | None = None, split: str = "train") -> list[File]:
    """The files that a path, folder, pattern or address stands for, sorted within each; `data_files` lie in the folder `path`.

    path may also be a kind ("json"), or None, with data_files. ds_type: the kind, whatever the suffixes say.
    In a folder, names such as test.jsonl or test/0.jsonl belong to that split and all others to train.
    Errors: ValueError for nothing found, an unsupported or mixed kind, and what a remote system says.
    """
    if ds_type is not None and ds_type not in FILE_TYPES:
        raise ValueError(f"ds_type is {ds_type!r}: expected one of {', '.join(FILE_TYPES)}")
    names = [data_files] if isinstance(data_files, str) else list(data_files)
    if names and path in FILE_TYPES and not os.path.exists(path):
        path, ds_type = None, ds_type or path
    if not names:
        assert path is not None
        return _expand(path, ds_type, split)
    if path is not None and not is_remote(path) and not os.path.isdir(path):
        raise ValueError(f"{path} is no folder that data_files could lie in: give a folder, a kind such as json, or no path")
    full = [name if path is None or is_remote(name) else f"{path.rstrip('/')}/{name}" for name in names]
    return [file for name in full for file in _expand(name, ds_type, split)]


def saved_marker(path: str) -> str | None:
    """Marker file of a folder written by `save_to_disk`, one of SAVED; None for any other path."""
    if is_remote(path):
        return None if kind_of(path)[0] else next((name for name in SAVED if _remote_exists(f"{path.rstrip('/')}/{name}")), None)
    return next((name for name in SAVED if os.path.isfile(os.path.join(path, name))), None)


def folder_files(path: str) -> list[File]:
    """Every file of a folder, with its place in it as its kind: for a digest."""
    names, folder = _remote_names(path) if is_remote(path) else _local_names(path)
    return [File(name, name[len(folder or path) :]) for name in names]


@contextmanager
def open_file(file: File) -> Iterator[BinaryIO]:
    """The file's unpacked bytes. Errors: ValueError of one line for whatever goes wrong while it is open."""
    try:
        with _raw(file.name) as raw, _unpacked(raw, file) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, ImportError) as error:
        raise ValueError(f"{file.name}: cannot be read ({first_line(error)})") from error


def skip_bytes(stream: BinaryIO, offset: int) -> None:
    """Move a stream that is at its start to `offset` bytes."""
    if stream.seekable():
        stream.seek(offset)
        return
    while offset > 0 and (chunk := stream.read(min(offset, CHUNK_BYTES))):
        offset -= len(chunk)


def digest_files(files: Sequence[File]) -> str:
    """sha256 over kinds, packing and bytes, in order. Names do not count: a moved file is the same file."""
    total = hashlib.sha256()
    for file in files:
        file_digest = hashlib.sha256(f"{file.kind} {file.packed} ".encode())
        with open_file(file._replace(packed="")) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                file_digest.update(chunk)
        total.update(file_digest.digest())
    return total.hexdigest()


def first_line(error: BaseException) -> str:
    """First line of an error's message."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def _expand(path: str, ds_type: str | None, split: str) -> list[File]:
    names, folder = _remote_names(path) if is_remote(path) else _local_names(path)
    if folder is None:
        return [_file(name, ds_type) for name in names]
    hidden = re.compile(r"(^|/)\.")
    candidates = [name for name in names if kind_of(name)[0] in SERVES.get(ds_type, (ds_type,)) and not hidden.search(name[len(folder) :])]
    matches = [_file(name, ds_type) for name in _of_split(candidates, folder, split)]
    if not matches:
        raise ValueError(f"{path} has no files of {ds_type or 'these types'}: expected {', '.join(SUFFIXES)}, packed or not")
    kinds = {"json" if file.kind == "jsonl" else file.kind for file in matches}
    if len(kinds) > 1:
        raise ValueError(f"{path} has files of several types ({', '.join(sorted(kinds))}): choose with ds_type or data_files")
    return matches


def _of_split(names: list[str], folder: str, split: str) -> list[str]:
    """Files of a split, told by the words in their names."""
    words = {name: re.split(r"[^a-z]+", name[len(folder) :].lower()) for name in names}
    labels = {name: next((SPLITS[word] for word in words[name] if word in SPLITS), "train") for name in names}
    chosen = [name for name in names if labels[name] == SPLITS.get(split, split)]
    if names and not chosen:
        raise ValueError(f"{folder} has no files of split {split!r}: their names say {', '.join(sorted(set(labels.values())))}")
    return chosen


def _file(name: str, ds_type: str | None) -> File:
    kind, packed = kind_of(name)
    if kind is None and ds_type is None:
        suffix, expected = Path(name).suffix, ", ".join(SUFFIXES)
        raise ValueError(
            f"{name}: unsupported file type {suffix!r}, expected one of {expected} (also .gz or .zst), "
            "or a dataset id owner/name; ds_type says what a file is whatever its name"
        )
    if kind is not None and (ds_type is None or (ds_type == "json" and kind == "jsonl")):
        return File(name, kind, packed)
    assert ds_type is not None
    return File(name, ds_type, packed)


def _local_names(path: str) -> tuple[list[str], str | None]:
    """(sorted names, the folder when it is one)."""
    if os.path.isdir(path):
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
        return sorted(paths), path
    if os.path.exists(path):
        if not os.path.isfile(path):  # it may never end, and cannot be read twice
            raise ValueError(f"{path} is no regular file but a pipe or device: save what it gives as a file first")
        return [path], None
    paths = sorted(name for name in glob.glob(path, recursive=True) if os.path.isfile(name)) if glob.has_magic(path) else []
    if not paths and kind_of(path)[0] is None and not glob.has_magic(path):
        _file(path, None)
    if not paths:
        raise ValueError(f"{path}: no such file (looked in {Path.cwd()})")
    return paths, None


def _remote_names(path: str) -> tuple[list[str], str | None]:
    pattern = glob.has_magic(path) and not path.startswith("http")
    if kind_of(path)[0] and not pattern:
        return [path], None
    with _remote_errors(path):
        system, inner = _system(path)
        if pattern:
            paths, folder = [name for name in system.glob(inner) if system.isfile(name)], None
        elif system.isdir(inner):
            paths, folder = system.find(inner), system.unstrip_protocol(inner)
        else:
            paths, folder = [inner] if system.exists(inner) else [], None
        if not paths:
            raise ValueError("no such file")
        return sorted(system.unstrip_protocol(name) for name in paths), folder


def _remote_exists(path: str) -> bool:
    with _remote_errors(path):
        system, inner = _system(path)
        return system.exists(inner)


@contextmanager
def _remote_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({first_line(error)})") from error


def _system(path: str) -> tuple[Any, str]:
    """(fsspec file system, path inside it) of an address."""
    import fsspec

    return fsspec.core.url_to_fs(path)


@contextmanager
def _raw(name: str) -> Iterator[BinaryIO]:
    if not is_remote(name):
        with open(name, "rb") as stream:
            yield stream
        return
    with _remote_errors(name):
        system, inner = _system(name)
        stream = system.open(inner, "rb")
    with stream:
        yield stream


@contextmanager
def _unpacked(raw: BinaryIO, file: File) -> Iterator[BinaryIO]:
    if not file.packed:
        yield raw
        return
    with gzip.GzipFile(fileobj=raw) if file.packed == ".gz" else _zstandard(raw, file.name) as stream:
        yield io.BufferedReader(_Unpacking(stream, raw, file.name), CHUNK_BYTES)


class _Unpacking(io.RawIOBase):
    """Unpacking stream that fails when it grows far beyond the size of its packed bytes."""

    def __init__(self, stream: io.BufferedIOBase, packed: BinaryIO, name: str):
        self.stream, self.packed, self.name = stream, packed, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.stream.seekable()

    def tell(self) -> int:
        return self.stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.stream.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        # Measured while reading: the size in a gzip trailer is that of the last member modulo 4 GiB, and may be false.
        size, done, packed = self.stream.readinto(buffer), self.stream.tell(), self.packed.tell()
        if done > FREE_BYTES and done > MOST_EXPANSION * packed:
            raise ValueError(
                f"{self.name}: {packed} packed bytes have unpacked to {done >> 20} MiB, more than {MOST_EXPANSION} times as much: "
                "not read any further, as that is how harmful files look; unpack the file yourself if it is meant"
            )
        return size


@contextmanager
def _zstandard(raw: BinaryIO, name: str) -> Iterator[io.BufferedIOBase]:
    try:
        zstandard = importlib.import_module("zstandard")  # not one of our requirements
    except ImportError as error:
        raise ValueError(f"{name}: reading .zst files needs the package zstandard: install it, or unpack the file") from error
    try:
        with io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), CHUNK_BYTES) as stream:
            yield stream
    except zstandard.ZstdError as error:
        raise ValueError(f"{name}: cannot be read ({first_line(error)})") from error
