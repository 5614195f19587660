"""Options that name files, folders, models and functions, looked at before anything heavy is imported. Imports no torch.

What is missing is told at once, but only what is certain without reading: that a file is there and of a known type, that a folder is one,
that an output can be written.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from treetune.core import fields
from treetune.core.config import marks, table
from treetune.core.config.marks import Place
from treetune.core.config.table import Config
from treetune.core.data import files
from treetune.core.rollout import builtin

LONGEST_NAME = 255  # bytes of a file's name, as Linux and macOS have it
TEMPLATES = (".jinja", ".jinja2")
WRITTEN = (marks.RUN_FOLDER, marks.NEW_FOLDER, marks.NEW_FILE, marks.PAGE, marks.LOG)
NO_NAMES = (marks.TEMPLATE, marks.FUNCTION_PATH, marks.PROGRAM, marks.ANY_PATH)  # other texts, too, which say themselves what is wrong
FIELDS = ("path", "data_files", "type", "chat_template")  # of a mapping in `datasets` that name files
Check = Callable[[Any], None]  # raises ValueError for a value that cannot be what its option wants


class Named(NamedTuple):
    """A value that names something: a text, or a mapping in a list of such. label: how errors name it."""

    option: str
    place: Place
    value: Any
    label: str

    @property
    def flag(self) -> str:
        """The option as a flag."""
        return f"--{self.option.replace('_', '-')}"


def named(config: Config) -> Iterator[Named]:
    """All values of the options that name something, in the order of the help."""
    values = table.flatten(config)
    for name, option in table.options(type(config)).items():
        value = values[name]
        if option.place is not None:
            for i, one in enumerate([value] if isinstance(value, str) else value or (), 1):
                yield Named(name, option.place, one, f"{name} entry {i}" if isinstance(one, dict) else _label(name, option.place, one))


def _label(name: str, place: Place, text: str) -> str:
    return f"{name.removesuffix('_funcs')} {text}" if place == marks.FUNCTION_PATH else name


def check_names(config: Config) -> None:
    """Raise ValueError for a text that can be the name of no file, folder or model."""
    for name, place, value, _ in named(config):
        if place in NO_NAMES or not isinstance(value, str):
            continue
        if not value:
            raise ValueError(f"{name} is empty; expected a name, or leave it out")
        if "\0" in value:
            raise ValueError(f"{name} has a zero byte in {value!r}; no file can be named so")
        if any(len(part.encode()) > LONGEST_NAME for part in Path(value).parts):
            raise ValueError(f"{name} has a name of more than {LONGEST_NAME} bytes: {value[:40]} ...; no file system takes it")


def check(config: Config, models: Mapping[str, Check]) -> None:
    """Raise ValueError for the first option that names what is not there, or what cannot be written.

    Defaults are found where they are read. models: by kind of place, the checks of what core does not know.
    """
    for error in absent(config, models):
        raise error


def absent(config: Config, models: Mapping[str, Check]) -> Iterator[ValueError]:
    """An error for each option that names what is not there, or what cannot be written; otherwise as `check`."""
    values, defaults = table.flatten(config), table.defaults(type(config))
    checks = {**CHECKS, **models, marks.ROW_SETS.kind: partial(check_rows, split=values.get("split") or "train")}
    for one in named(config):
        looked_at = one.place.kind in checks and values[one.option] != defaults[one.option] and not values.get(one.place.instead)
        if looked_at:
            try:
                with _naming(one.label):
                    checks[one.place.kind](one.value)
            except ValueError as error:
                yield error


@contextlib.contextmanager
def _naming(label: str) -> Iterator[None]:
    """Inside, the value of an option is looked at: errors begin with its name."""
    try:
        with fields.reading("the path"):
            yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{label}: {error}") from error


def check_folder(name: str) -> None:
    """Errors: ValueError where a folder, or the nearest one above it that there is, is a file or may not be written to."""
    folder = Path(name)
    if folder.parts[:1] and folder.parts[0].startswith("~") and not os.path.lexists(folder.parts[0]):
        raise ValueError(f"{folder} would lie in a folder called {folder.parts[0]} here; write the whole path of the home folder")
    above = next((one for one in (folder, *folder.parents) if os.path.lexists(one)), Path("."))
    if not above.is_dir():
        raise ValueError(f"{above} is a file; expected a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"the folder {above} may not be written to")


def check_parent(name: str) -> None:
    """`check_folder` of the folder that a file or folder is written into."""
    check_folder(str(Path(name).parent))


def check_checkpoint(name: str) -> None:
    """Errors: ValueError for a checkpoint whose folder is not there."""
    if name != "auto" and not Path(name).is_dir():
        raise ValueError(f"{name} is not a checkpoint: there is no such folder")


def check_rows(entry: str | dict[str, Any], split: str) -> None:
    """Errors: ValueError as reading would raise it, for files that are not there or of no known type."""
    entry = {"path": entry} if isinstance(entry, str) else entry
    path, kind, inside = entry.get("path"), entry.get("ds_type"), entry.get("data_files") or ()
    template, transform = entry.get("chat_template"), entry.get("type")
    if isinstance(template, str):
        with _naming("chat_template"):
            check_template(template)
    if isinstance(transform, str):
        with _naming(f"transform {transform}"):
            check_function(transform)
    if files.is_hub_id(path, kind) or any(files.is_remote(one) for one in (path, inside) if isinstance(one, str)):
        return
    if path is not None and not inside and files.saved_marker(path):
        return
    with _naming("data_files" if inside else "path"):
        files.find(path, data_files=inside, ds_type=kind, split=_base(entry.get("train_on_split") or entry.get("split") or split))


def _base(split: str) -> str:
    """The split that a part such as train[:10%] is of; its form is checked where it is read."""
    return split.partition("[")[0].partition("+")[0].strip() or "train"


def check_function(text: str) -> None:
    """Errors: ValueError for file.py:function without that file."""
    file, colon, _ = text.partition("?")[0].rpartition(":")
    if colon and file.endswith(".py") and not Path(file).is_file():
        raise ValueError(f"there is no file {file} in {Path.cwd()}")


def check_template(text: str) -> None:
    """Errors: ValueError for the file of a chat template that is not there."""
    if text.endswith(TEMPLATES) and "{" not in text and not Path(text).is_file():
        raise ValueError(f"chat template file {text} does not exist")


def check_python(name: str) -> None:
    """Errors: ValueError for a Python that is not there."""
    if shutil.which(name) is None:
        raise ValueError(f"there is no program {name}; name the Python of the environment that has vLLM")


CHECKS: dict[str, Check] = {
    marks.RUN_FOLDER.kind: check_folder,
    marks.PREPARED_ROWS.kind: check_folder,
    marks.CHECKPOINT.kind: check_checkpoint,
    marks.NEW_FOLDER.kind: check_parent,
    marks.NEW_FILE.kind: check_parent,
    marks.PAGE.kind: check_parent,
    marks.LOG.kind: check_parent,
    marks.FUNCTION_PATH.kind: check_function,
    marks.TEMPLATE.kind: check_template,
    marks.PROGRAM.kind: check_python,
}


def read(config: Config) -> Iterator[tuple[str, str]]:
    """(flag, text) of everything that a run may read on this machine: paths, patterns, files of functions."""
    for one in named(config):
        if one.place in WRITTEN:
            continue
        for text in _texts(one.value):
            text = _file(text) if isinstance(one.value, dict) or one.place == marks.FUNCTION_PATH else text
            jinja = one.place == marks.TEMPLATE and "{" in text
            if not jinja and not (one.place == marks.FUNCTION_PATH and text in builtin.BUILTIN):
                yield one.flag, text


def _texts(value: Any) -> Iterator[str]:
    """The texts in an option's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for field in FIELDS:
            yield from _texts(value.get(field))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _file(text: str) -> str:
    """The file of a function's name."""
    text = text.partition("?")[0]
    return text.rpartition(":")[0] if re.search(r"\.py:\w+$", text) else text
