"""A user's own transform of rows, named by its import path.

    def transform(cfg, **kwargs):
        def transform_fn(example, tokenizer=None):
            return {"prompt": example["question"], "chosen": example["good"], "rejected": example["bad"]}
        return transform_fn, {"remove_columns": "__all__"}

The second value may be left out. `remove_columns`: "__all__" for every column of the row, or a list of names; otherwise the output is laid
over the row. `batched`: the function takes and gives a dict of lists, and may give more rows than it got.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from treetune.core.data import sources, turns
from treetune.core.data.rows import Row
from treetune.core.import_path import RAISED, import_function, split_options
from treetune.core.protocols import Tokenizer


class Transform(NamedTuple):
    """A user's transform: its function, the columns of the row that it replaces, and whether it takes and gives lists."""

    name: str
    fn: Callable[..., Any]  # (row, perhaps tokenizer=) -> columns
    removed: Sequence[str] | None  # None: all
    batched: bool
    takes_tokenizer: bool


def load_transform(path: str, cfg: object = None, **options: Any) -> Transform:
    """The transform at "module.function" or "folder/file.py:function", called with (cfg, **options).

    Options may stand behind the name, as in "file.py:function?column=ask,limit=3". A module is looked for as any import is, then as a
    file under the working folder.
    Errors: ValueError when there is no such module or function, or when it does not give what the module's text says.
    """
    name, named_options = split_options(path)
    factory = import_function(name)
    try:
        result = factory(cfg, **named_options | options)
    except RAISED as error:
        raise ValueError(f"transform {path!r} raised {type(error).__name__}: {error}; it is called with (cfg, **kwargs)") from error
    return _checked(path, *(result if isinstance(result, tuple) and len(result) == 2 else (result, {})))


def is_path(name: object, formats: Sequence[str]) -> bool:
    """Whether a type names the user's own transform, after which rows are known by their columns, and none of the formats."""
    if not isinstance(name, str) or name in formats or not ("." in name or ":" in name):
        return False
    return name.partition(".")[0] not in {other.partition(".")[0] for other in formats if "." in other}


def _checked(path: str, fn: object, extra: object) -> Transform:
    if not callable(fn) or not isinstance(extra, dict):
        example = "{'remove_columns': '__all__'}"
        raise ValueError(f"transform {path!r} gave {turns.type_name(fn)}: expected a function, or a function and a dict such as {example}")
    removed = extra.get("remove_columns") or ()
    takes = inspect.signature(fn).parameters
    wants = "tokenizer" in takes or any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    return Transform(path, fn, None if removed == "__all__" else removed, bool(extra.get("batched")), wants)


def apply_transform(rows: sources.Rows, transform: Transform, tokenizer: Tokenizer | None = None) -> sources.Rows:
    """The rows through the transform; every new row has the number of the one it was made from.

    Errors: ValueError, naming the row, for what the function raises and for anything but a dict.
    """
    new_rows, origins = [], []
    for i, row in enumerate(rows.rows):
        for new_row in _call(transform, row, tokenizer, sources.locate_row(rows, i)):
            new_rows.append(new_row)
            origins.append(i)
    if not new_rows:
        raise ValueError(f"{rows.name}: transform {transform.name!r} gave no row at all from {len(rows.rows)}")
    return sources.take(rows, origins)._replace(rows=new_rows)


def digest_rows(rows: sources.Rows) -> str:
    """sha256 over the rows that a transform gave; its file alone does not decide them."""
    digest = hashlib.sha256()
    for row in rows.rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _call(transform: Transform, row: Row, tokenizer: Tokenizer | None, location: str) -> list[Row]:
    argument = {name: [value] for name, value in row.items()} if transform.batched else dict(row)
    try:
        output = transform.fn(argument, tokenizer=tokenizer) if transform.takes_tokenizer else transform.fn(argument)
    except RAISED as error:
        raise ValueError(f"{location}: transform {transform.name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(output, dict) or not all(isinstance(name, str) for name in output):
        raise ValueError(f"{location}: transform {transform.name!r} gave {turns.type_name(output)}, expected a dict of columns")
    columns = {} if transform.removed is None else {name: value for name, value in row.items() if name not in transform.removed}
    if not transform.batched:
        return [columns | output]
    sizes = {name: len(value) if isinstance(value, list | tuple) else -1 for name, value in output.items()}
    if len(set(sizes.values())) > 1 or -1 in sizes.values():
        raise ValueError(f"{location}: transform {transform.name!r} is batched: expected lists of one length, got {sizes}")
    return [columns | {name: value[i] for name, value in output.items()} for i in range(next(iter(sizes.values()), 0))]
