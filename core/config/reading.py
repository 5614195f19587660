"""Values under the names of options, of a config file or of Python, to the config of a command and back. Imports no torch."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from treetune.core.config import suggestions, table, typed
from treetune.core.config.table import Config, Option
from treetune.core.data import dataset_fields, yamlvalues
from treetune.core.data.yamltext import Written

C = TypeVar("C", bound=Config)
DEEPEST = 20  # lists and mappings inside each other
MAPPING_VALUES = "a text, a finite number, true, false, null, or a list or mapping of such"


def from_written(written: Mapping[str, Written], options: Mapping[str, Option], place: str, *, hint: str = "") -> dict[str, Any]:
    """{option: value} of a config file, typed. Errors: ValueError naming the file and all unknown keys, or the key and its value.

    hint: the end of the message about unknown keys.
    """
    _check_known(written, options, place, hint)
    return _read(written, options, place)


def from_values(command: str, config: type, values: Mapping[str, Any]) -> Any:
    """The config of a command from Python values under the names of its options, read as those of a config file.

    Errors: ValueError naming all unknown options, or the option and its value.
    """
    options = table.options(config)
    _check_known(values, options, command)
    if missing := [name for name, option in options.items() if option.default is table.REQUIRED and name not in values]:
        raise ValueError(f"{command} needs {', '.join(missing)}")
    return fill(config, _read({name: _written(value, f"{command}: {name}") for name, value in values.items()}, options, command))


def reread(command: str, config: C) -> C:
    """A config that was put together in Python, its values read as those of a file.

    Errors: ValueError for a value that is not of the type of its option, and for anything but its groups in the place of one.
    """
    for entry in dataclasses.fields(cast(Any, config)):
        if entry.default_factory is not dataclasses.MISSING:
            kind, group = type(entry.default_factory()), getattr(config, entry.name)
            if type(group) is not kind:
                raise ValueError(f"{command}: {entry.name} must be {kind.__name__}(...), got {group!r:.80}")
    return from_values(command, type(config), table.flatten(config))


def fill(config: type, values: Mapping[str, Any], *, missing: Any = table.REQUIRED) -> Any:
    """The config of these values, with the defaults for all else; `missing` for what has none."""
    parts: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        if entry.default_factory is not dataclasses.MISSING:
            group = entry.default_factory()
            own = {name: _frozen(values[name]) for name in vars(group) if name in values}
            parts[entry.name] = dataclasses.replace(group, **own)
        elif entry.name in values:
            parts[entry.name] = _frozen(values[entry.name])
        else:
            parts[entry.name] = missing if entry.default is dataclasses.MISSING else entry.default
    return config(**parts)


def to_yaml(config: Config, *, without: tuple[str, ...] = ()) -> str:
    """The config as YAML that `from_written` reads back."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes equal lists out instead of naming the first."""

        def ignore_aliases(self, data: Any) -> bool:
            """Never an alias."""
            return True

    kept = {key: value for key, value in table.flatten(config).items() if value is not None and key not in without}
    return yaml.dump(kept, Dumper=Dumper, sort_keys=False)


def _check_known(names: Mapping[str, Any], options: Mapping[str, Option], place: str, hint: str = "") -> None:
    if unknown := [name for name in names if name not in options]:
        raise ValueError(f"{place}: {suggestions.all_of(unknown, options)}{hint}")


def _read(written: Mapping[str, Written], options: Mapping[str, Option], place: str) -> dict[str, Any]:
    fields = dataset_fields.of_options(options)
    return {name: _value(options[name], value, place, fields) for name, value in written.items()}


def _value(option: Option, written: Written, place: str, fields: dict[str, dataset_fields.Field]) -> Any:
    if option.of_mappings:
        found: Any = dataset_fields.entries(written, option.name, place, fields)
    elif option.pairs is not None and option.pairs.named and isinstance(written.value, dict):
        found = tuple(_pair(option, name, item, f"{place}: {option.name}") for name, item in written.value.items())
    else:
        found = typed.value(written, option, place)
    return list(found) if isinstance(found, tuple) else found


def _pair(option: Option, name: str, written: Written, place: str) -> str:
    """An entry of a mapping as NAME=TEXT."""
    if "=" in name or not name:
        raise ValueError(f"{place} has the name {name!r}; expected one without =")
    if option.pairs is not None and not option.pairs.values:
        if yamlvalues.text(written) is None:
            raise yamlvalues.wrong(written, f"{place}: {name}", "a text")
        return f"{name}={written.value}"
    value = dataset_fields.VALUES.read(Written({name: written}))
    if value is dataset_fields.BAD:
        raise yamlvalues.wrong(written, f"{place}: {name}", MAPPING_VALUES)
    return f"{name}={json.dumps(value[name], ensure_ascii=False)}"


def _written(value: Any, place: str, depth: int = 0) -> Written:
    """A Python value as a config file would hold it. Errors: ValueError for what no file can hold."""
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        value = value.item()  # a number of numpy or torch
    if isinstance(value, dict | list | tuple) and depth == DEEPEST:
        raise ValueError(f"{place} holds lists or mappings more than {DEEPEST} deep")
    if isinstance(value, dict):
        if wrong := [name for name in value if not isinstance(name, str)]:
            raise ValueError(f"{place} is a mapping with the key {wrong[0]!r}; keys must be texts")
        return Written({name: _written(item, place, depth + 1) for name, item in value.items()})
    if isinstance(value, list | tuple):
        return Written([_written(item, place, depth + 1) for item in value])
    if value is None or isinstance(value, bool):
        return Written(value, str(value))
    for kind in (int, float):
        if isinstance(value, kind):
            return Written(kind(value), str(kind(value)))  # an IntEnum is a number, too
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{place} is of type {type(value).__name__}; expected a number, a text, a path, or a list or mapping of such")
    return Written(os.fspath(value), os.fspath(value))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
