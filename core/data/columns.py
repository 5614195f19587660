"""Documents as flat arrays and back, whatever fields they have; reports as JSON and back.

A column holds one field of all documents. Its schema says how to cut it up again: arrays and texts lie end to end with their lengths
beside them, numbers in one array, tuples and NamedTuples as further columns, None by a mask, mixed plain values as JSON.
"""

import importlib
import json
from collections.abc import Sequence

import numpy as np

PACKAGE = "treetune."
TAG = "__fields_of__"


def to_columns(docs: Sequence) -> tuple[dict, dict[str, np.ndarray]]:
    """(schema, arrays by file name) of the documents. Errors: ValueError for a field that no column can hold."""
    arrays: dict[str, np.ndarray] = {}
    return _column(list(docs), "doc", arrays), arrays


def from_columns(schema: dict, arrays: dict[str, np.ndarray]) -> list:
    """Documents from the columns of `to_columns`; arrays are views. Errors: KeyError, ValueError or TypeError when they do not fit."""
    return _values(schema, {name: array.view(np.ndarray) for name, array in arrays.items()})


def report_to_json(value: object) -> object:
    """A report as JSON: NamedTuples become objects that name their class. Errors: ValueError for other values than plain ones."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple) and (names := _field_names(value)):
        return {TAG: _name(type(value))} | {name: report_to_json(item) for name, item in zip(names, value, strict=True)}
    if isinstance(value, list | tuple):
        return [report_to_json(item) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: report_to_json(item) for name, item in value.items()}
    raise ValueError(f"a report holds a value of type {type(value).__name__}: expected plain values, lists, dicts and NamedTuples")


def report_from_json(value: object) -> object:
    """Report from the JSON of `report_to_json`; list fields of NamedTuples come back as tuples."""
    if isinstance(value, list):
        return [report_from_json(item) for item in value]
    if isinstance(value, dict):
        fields = {name: report_from_json(item) for name, item in value.items() if name != TAG}
        return _class(value[TAG])(**{name: _tupled(item) for name, item in fields.items()}) if TAG in value else fields
    return value


def _field_names(value: object) -> tuple[str, ...]:
    """Names of a NamedTuple's fields; none for any other value."""
    return getattr(value, "_fields", ())


def _tupled(value: object) -> object:
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value


def _column(values: list, name: str, arrays: dict) -> dict:
    """The schema of one field of all documents. Plain values that are too mixed for columns of their own are kept as JSON texts."""
    field_arrays: dict[str, np.ndarray] = {}
    try:
        schema = _typed(values, name, field_arrays)
    except ValueError:
        if not all(_is_json(value) for value in values):
            raise
        field_arrays = {}
        schema = _write_texts([json.dumps(value) for value in values], name, field_arrays) | {"kind": "json"}
    arrays.update(field_arrays)
    return schema


def _typed(values: list, name: str, arrays: dict) -> dict:
    if any(value is None for value in values):
        present = [value is not None for value in values]
        mask = _keep(np.array(present, dtype=bool), f"{name}.there", arrays)
        return {"kind": "optional", "mask": mask, "of": _column([value for value in values if value is not None], name, arrays)}
    kinds = {_kind(value, name) for value in values} or {"int"}
    if len(kinds) > 1:
        raise ValueError(f"{name} is of several types ({', '.join(sorted(kinds))}): expected one in all documents")
    kind = kinds.pop()
    return _WRITERS[kind](values, name, arrays) | {"kind": kind}


def _is_json(value: object) -> bool:
    """Whether JSON gives back the very same value."""
    if type(value) is list:
        return all(map(_is_json, value))
    if type(value) is dict:
        return all(type(key) is str and _is_json(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _kind(value: object, name: str) -> str:
    types_by_kind = {"fields": hasattr(value, "_fields") and tuple, "array": np.ndarray, "bool": bool | np.bool_, "int": int | np.integer}
    types_by_kind |= {"float": float | np.floating, "text": str, "tuple": tuple, "list": list, "dict": dict}
    for kind, types in types_by_kind.items():
        if types and isinstance(value, types):
            return kind
    raise ValueError(f"{name} is of type {type(value).__name__}: documents hold arrays, numbers, texts, tuples, dicts and NamedTuples")


def _keep(array: np.ndarray, name: str, arrays: dict) -> str:
    arrays[f"{name}.npy"] = array
    return f"{name}.npy"


def _lengths(values: list, name: str, arrays: dict) -> str:
    return _keep(np.array([len(value) for value in values], dtype=np.int64), f"{name}.lengths", arrays)


def _write_arrays(values: list, name: str, arrays: dict) -> dict:
    shapes = {(value.dtype.str, value.shape[1:] if value.ndim else None) for value in values}
    if len(shapes) > 1 or None in {shape for _, shape in shapes} or values[0].dtype.hasobject:
        raise ValueError(f"{name} has arrays of several types or without an axis ({shapes}): expected one type, one row per item")
    return {"flat": _keep(np.concatenate(values), name, arrays), "lengths": _lengths(values, name, arrays)}


def _write_numbers(values: list, name: str, arrays: dict) -> dict:
    dtype = {"bool": np.bool_, "float": np.float64}.get(_kind(values[0], name) if values else "int", np.int64)
    try:
        return {"flat": _keep(np.array(values, dtype=dtype), name, arrays)}
    except OverflowError as error:
        raise ValueError(f"{name} holds numbers beyond 64 bits") from error


def _write_texts(values: list, name: str, arrays: dict) -> dict:
    encoded = [value.encode("utf-8", "surrogatepass") for value in values]
    flat = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    return {"flat": _keep(flat, name, arrays), "lengths": _lengths(encoded, name, arrays)}


def _write_items(values: list, name: str, arrays: dict) -> dict:
    """Tuples of one type of item and any length, or of different types, position by position."""
    items = [item for value in values for item in value]
    sizes = {len(value) for value in values}
    if len(sizes) == 1 and len({_kind(item, name) for item in items if item is not None}) > 1:
        return {"fields": {str(i): _column([value[i] for value in values], f"{name}.{i}", arrays) for i in range(sizes.pop())}}
    return {"lengths": _lengths(values, name, arrays), "of": _column(items, f"{name}.items", arrays)}


def _write_fields(values: list, name: str, arrays: dict) -> dict:
    classes = {_name(type(value)) for value in values}
    if len(classes) > 1:
        raise ValueError(f"{name} is of several types ({', '.join(sorted(classes))}): expected one in all documents")
    names = values[0]._fields
    fields = {field: _column([getattr(value, field) for value in values], f"{name}.{field}", arrays) for field in names}
    return {"class": classes.pop(), "fields": fields}


def _write_dicts(values: list, name: str, arrays: dict) -> dict:
    """One column per key; a document without a key has no entry in its column."""
    keys = list(dict.fromkeys(key for value in values for key in value))
    if not all(isinstance(key, str) for key in keys) or any(item is None for value in values for item in value.values()):
        raise ValueError(f"{name} has keys that are no text, or values None: leave such keys out")
    fields = {key: _column([value.get(key) for value in values], f"{name}.{i}", arrays) for i, key in enumerate(keys)}
    return {"fields": fields, "count": len(values)}


def _values(schema: dict, arrays: dict[str, np.ndarray]) -> list:
    kind = schema["kind"]
    if kind == "optional":
        present = iter(_values(schema["of"], arrays))
        return [next(present) if is_present else None for is_present in arrays[schema["mask"]]]
    if kind in ("bool", "int", "float"):
        return arrays[schema["flat"]].tolist()
    return _joined(schema, arrays) if "fields" in schema else _cut(schema, arrays)


def _joined(schema: dict, arrays: dict[str, np.ndarray]) -> list:
    """NamedTuples, dicts, or tuples and lists of different items: one column each."""
    kind, fields = schema["kind"], {name: _values(field, arrays) for name, field in schema["fields"].items()}
    if kind == "dict":
        return [{name: field[i] for name, field in fields.items() if field[i] is not None} for i in range(schema["count"])]
    rows = zip(*fields.values(), strict=True)
    if kind in ("tuple", "list"):
        return [row if kind == "tuple" else list(row) for row in rows]
    record_class = _class(schema["class"])
    if record_class._fields != tuple(fields):
        raise ValueError(f"{schema['class']} has other fields now")
    return [record_class(*row) for row in rows]


def _cut(schema: dict, arrays: dict[str, np.ndarray]) -> list:
    """Arrays, texts, tuples or lists, cut by their lengths out of the flat column that holds them end to end."""
    kind, bounds = schema["kind"], np.concatenate([[0], np.cumsum(arrays[schema["lengths"]])]).tolist()
    flat = _values(schema["of"], arrays) if "of" in schema else arrays[schema["flat"]]
    if len(flat) != bounds[-1]:
        raise ValueError(f"a column of {len(flat)} items has lengths for {bounds[-1]}")
    make = {
        "json": lambda part: json.loads(part.tobytes()),
        "array": lambda part: part,
        "text": lambda part: part.tobytes().decode("utf-8", "surrogatepass"),
        "tuple": tuple,
        "list": list,
    }
    return [make[kind](flat[begin:end]) for begin, end in zip(bounds, bounds[1:], strict=False)]


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _class(name: str) -> type:
    """The NamedTuple of that name, which must be one of this package: an entry cannot make us import anything else."""
    module, _, path = name.partition(":")
    if not module.startswith(PACKAGE):
        raise ValueError(f"{name} is no class of this package")
    return getattr(importlib.import_module(module), path)


_WRITERS = {
    "array": _write_arrays,
    "bool": _write_numbers,
    "int": _write_numbers,
    "float": _write_numbers,
    "text": _write_texts,
    "tuple": _write_items,
    "list": _write_items,
    "fields": _write_fields,
    "dict": _write_dicts,
}
