"""Values under the names of options, of a config file or of Python, to the config of a command and back. Imports no torch."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from treetune.core.config import suggestions, table, typed
from treetune.core.config.table import Option
from treetune.core.data import dataset_fields, yamltext, yamlvalues
from treetune.core.data.yamltext import Written

MAPPING_VALUES = "a text, a finite number, true, false, null, or a list or mapping of such"


def from_file(path: str, options: Mapping[str, Option], *, hint: str = "") -> dict[str, Any]:
    """{option: value} of a config file, typed. Errors: ValueError naming the file and all unknown keys, or the key and its value.

    hint: the end of the message about unknown keys.
    """
    written = yamltext.load(path)
    _check_known(written, options, path, hint)
    return _read(written, options, path)


def from_values(command: str, config: type, values: Mapping[str, Any]) -> Any:
    """The config of a command from Python values under the names of its options, read as those of a config file.

    Errors: ValueError naming all unknown options, or the option and its value.
    """
    options = table.options(config)
    _check_known(values, options, command)
    if missing := [name for name, option in options.items() if option.default is table.REQUIRED and name not in values]:
        raise ValueError(f"{command} needs {', '.join(missing)}")
    return fill(config, _read({name: _written(value) for name, value in values.items()}, options, command))


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


def to_yaml(config: Any, *, without: tuple[str, ...] = ()) -> str:
    """The config as YAML that `from_file` reads back."""
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
    fields = dataset_fields.PROMPTS if "field_prompt" in options else dataset_fields.ROWS
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


def _written(value: Any) -> Written:
    """A Python value as a config file would hold it; paths are texts."""
    if isinstance(value, dict):
        return Written({name: _written(item) for name, item in value.items()})
    if isinstance(value, list | tuple):
        return Written([_written(item) for item in value])
    if value is None or isinstance(value, bool | int | float):
        return Written(value, str(value))
    return Written(str(value), str(value))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
