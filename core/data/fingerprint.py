"""Fingerprints of documents and prompts: sha256 over everything that training reads of them, not over their lengths alone.

Equal contents give equal digests whether they were encoded now or read from the cache: tuples count as lists, memory-mapped arrays as
arrays, keys of dicts in any order. Documents are hashed field by field, many at a time, at about the speed of sha256.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

CHUNK = 4096  # documents hashed together


def documents(docs: Sequence) -> str:
    """sha256 over every field of NamedTuples such as `spans.Doc`, `trees.TreeDoc` and `prompts.Prompt`, in order."""
    # Column by column: one update of a long array is as fast as sha256 itself, one update for each number is not.
    total = hashlib.sha256(f"{len(docs)} ".encode())
    for start in range(0, len(docs), CHUNK):
        chunk = docs[start : start + CHUNK]
        for name, column in zip(type(chunk[0])._fields, zip(*chunk, strict=True), strict=True):
            total.update(f"{name} ".encode())
            _column(total, column)
    return total.hexdigest()


def values(*parts: Any) -> str:
    """sha256 over plain values: numbers, texts, None, arrays, and lists, tuples and dicts of them."""
    total = hashlib.sha256()
    _value(total, parts)
    return total.hexdigest()


def _column(total: Any, column: Sequence) -> None:
    """One field of several documents: arrays of one type end to end, whole numbers as an array, anything else one by one."""
    if all(isinstance(value, np.ndarray) and value.ndim == 1 for value in column) and len({value.dtype for value in column}) == 1:
        total.update(np.array([len(value) for value in column], np.int64).tobytes())
        _array(total, np.concatenate(column))
    elif all(type(value) is int and abs(value) < 2**63 for value in column):
        _array(total, np.array(column, np.int64))
    else:
        _value(total, column)


def _array(total: Any, value: np.ndarray) -> None:
    total.update(f"array {value.dtype.str} {value.shape} ".encode())
    total.update(np.ascontiguousarray(value).tobytes())


def _value(total: Any, value: Any) -> None:
    """Any value with its type, so that 1, True and "1" differ."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        _array(total, value)
    elif isinstance(value, Mapping):
        total.update(f"dict {len(value)} ".encode())
        for key in sorted(value, key=repr):
            _value(total, key)
            _value(total, value[key])
    elif isinstance(value, list | tuple | np.ndarray):
        total.update(f"list {len(value)} ".encode())
        for item in value:
            _value(total, item)
    elif isinstance(value, bytes | bytearray):
        total.update(f"bytes {len(value)} ".encode() + bytes(value))
    else:
        text = _text(value.item() if isinstance(value, np.generic) else value)
        total.update(f"{text[0]} {len(text[1])} ".encode() + text[1])


def _text(value: Any) -> tuple[str, bytes]:
    """(type, bytes) of a value without inner values; objects whose repr holds an address count by type only."""
    if isinstance(value, str):
        return "str", value.encode("utf-8", "surrogatepass")
    shown = repr(value)
    return type(value).__name__, b"" if " at 0x" in shown else shown.encode("utf-8", "surrogatepass")
