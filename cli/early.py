"""Paths that the options name, looked at before anything heavy is imported: what is missing is told at once. Imports no torch.

Only what is certain without reading: that a file is there and of a known type, that a folder is one, that an output can be written.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treetune.cli.errors import BadInput
from treetune.core import fields
from treetune.core.config import table
from treetune.core.data import files
from treetune.models import fetch

ADAPTER = "adapter_config.json"
LONGEST_NAME = 255  # bytes of a file's name, as Linux and macOS have it
TEMPLATES = (".jinja", ".jinja2")
FUNCTIONS = ("reward_funcs", "rollout_func", "prompt_transform", "format")
PYTHONS = ("python", "vllm_python")
PATHS = (
    "model", "ref_model", "adapter", "lora_model_dir", "from_config", "data", "val_data", "output_dir", "dataset_prepared_path", "resume",
    "output", "html", "log",
)  # fmt: skip


def check(config: Any, given: frozenset[str]) -> None:
    """Raise ValueError or BadInput for the first path that cannot be what its option wants."""
    values = table.flatten(config)
    for name in ("output_dir", "dataset_prepared_path"):
        if values.get(name) is not None:
            _writable(Path(values[name]), name)
    if values.get("resume") not in (None, "auto") and not Path(values["resume"]).is_dir():
        raise BadInput(f"resume: {values['resume']} is not a checkpoint: there is no such folder")
    for name in ("output", "html", "log"):
        if isinstance(values.get(name), str):
            _writable(Path(values[name]).parent, name)
    for name, entry in _sources(values, given):
        with _naming(name):
            _rows(entry, values.get("split") or "train")
    for name, value in _named(values, FUNCTIONS):
        _function(name, value)
    for name, value in _named(values, ("chat_template",)):
        _template(value, name)
    _models(config, values, given)


def _named(values: dict[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(option, text) of the options that hold one, or several."""
    for name in names:
        value = values.get(name)
        for one in [value] if isinstance(value, str) else value or ():
            yield name, one


def check_names(config: Any) -> None:
    """Raise BadInput for a text that can be the name of no file, folder or model."""
    for name, value in _named(table.flatten(config), PATHS):
        if not value:
            raise BadInput(f"{name} is empty; expected a name, or leave it out")
        if "\0" in value:
            raise BadInput(f"{name} has a zero byte in {value!r}; no file can be named so")
        if any(len(part.encode()) > LONGEST_NAME for part in Path(value).parts):
            raise BadInput(f"{name} has a name of more than {LONGEST_NAME} bytes: {value[:40]} ...; no file system takes it")


def _writable(folder: Path, name: str) -> None:
    """Errors: BadInput where the folder, or the nearest one above it that there is, is a file or may not be written to."""
    if folder.parts[:1] and folder.parts[0].startswith("~") and not os.path.lexists(folder.parts[0]):
        raise BadInput(f"{name}: {folder} would lie in a folder called {folder.parts[0]} here; write the whole path of the home folder")
    above = next((one for one in (folder, *folder.parents) if os.path.lexists(one)), Path("."))
    if not above.is_dir():
        raise BadInput(f"{name}: {above} is a file; expected a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadInput(f"{name}: the folder {above} may not be written to")


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Inside, a value of the option `name` is looked at: errors begin with its name."""
    try:
        with fields.reading("the path"):
            yield
    except (BadInput, ValueError, OSError) as error:
        raise BadInput(f"{name}: {error}") from error


def _sources(values: dict[str, Any], given: frozenset[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(option, data set as a mapping) of what the user named. Sample rows that nobody named are found where they are read."""
    for listed, plain in (("datasets", "data"), ("test_datasets", "val_data")):
        if values.get(listed):
            yield from ((f"{listed} entry {i}", entry) for i, entry in enumerate(values[listed], 1))
        elif plain in given:
            yield from ((plain, {"path": path}) for path in values.get(plain) or ())


def _rows(entry: dict[str, Any], split: str) -> None:
    """Errors: ValueError as reading would raise it, for files that are not there or of no known type."""
    path, kind, inside = entry.get("path"), entry.get("ds_type"), entry.get("data_files") or ()
    template, transform = entry.get("chat_template"), entry.get("type")
    if isinstance(template, str):
        _template(template, "chat_template")
    if isinstance(transform, str):
        _function("transform", transform)
    if files.is_hub_id(path, kind) or any(files.is_remote(one) for one in (path, inside) if isinstance(one, str)):
        return
    if path is not None and not inside and files.saved_marker(path):
        return
    with _naming("data_files" if inside else "path"):
        files.find(path, data_files=inside, ds_type=kind, split=_base(entry.get("train_on_split") or entry.get("split") or split))


def _base(split: str) -> str:
    """The split that a part such as train[:10%] is of; its form is checked where it is read."""
    return split.partition("[")[0].partition("+")[0].strip() or "train"


def _function(name: str, value: str) -> None:
    """Errors: BadInput for file.py:function without that file."""
    file, colon, _ = value.partition("?")[0].rpartition(":")
    if colon and file.endswith(".py") and not Path(file).is_file():
        raise BadInput(f"{name.removesuffix('_funcs')} {value}: there is no file {file} in {Path.cwd()}")


def _template(value: str, name: str) -> None:
    if value.endswith(TEMPLATES) and "{" not in value and not Path(value).is_file():
        raise BadInput(f"{name}: chat template file {value} does not exist")


def _models(config: Any, values: dict[str, Any], given: frozenset[str]) -> None:
    start = values.get("from_config")
    if start is not None and not (Path(start) / "config.json" if Path(start).is_dir() else Path(start)).is_file():
        raise BadInput(f"from_config: config file {Path(start) / 'config.json' if Path(start).is_dir() else start} does not exist")
    trains = hasattr(config, "optim")
    for name in ("lora_model_dir",) if trains else ("adapter",):
        if isinstance(values.get(name), str):
            with _naming(name):
                _adapter(values[name])
    names = ["ref_model"] + ["model"] * ("model" in given)
    for name in names:
        if isinstance(values.get(name), str):
            with _naming(name):
                fetch.check(values[name])
    for name in PYTHONS:
        if values.get(name) and shutil.which(values[name]) is None:
            raise BadInput(f"{name}: there is no program {values[name]}; name the Python of the environment that has vLLM")


def _adapter(path: str) -> None:
    """An adapter's folder, or that of a run with one."""
    inside = Path(path) / "adapter"
    folder = inside if inside.is_dir() else Path(path)
    if not (folder / ADAPTER).is_file():
        raise ValueError(f"{folder / ADAPTER} does not exist: expected an adapter's folder in PEFT format, or a run folder with one")
