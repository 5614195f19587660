"""From a command line and a YAML file to a typed config; every mistake is one line and exit code 2.

`--config run.yaml` is read first, flags win. Unknown keys and flags are errors that name the nearest known one.
Importing this imports no torch.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import re
import typing
from pathlib import Path
from typing import Any

from treetune.cli.errors import BadInput

PAIRS = frozenset(
    {"special_tokens", "chat_template_kwargs", "generation_kwargs"}
)  # lists of NAME=VALUE, which a config file may also hold as a mapping
LISTED = frozenset({"datasets", "test_datasets"})  # lists of mappings, which only a config file can hold
Parsed = tuple[Any, frozenset[str]]


def defaults(config: type) -> dict[str, Any]:
    """{option: default} of a config class, whose groups are its fields that are dataclasses; MISSING where there is none."""
    known: dict[str, Any] = {}
    hints = typing.get_type_hints(config)
    for entry in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[entry.name]):
            known |= flatten(entry.default_factory())
        else:
            known[entry.name] = list(entry.default) if isinstance(entry.default, tuple) else entry.default
    return known


def parse(command: str, config: type, argv: list[str]) -> Parsed:
    """The config, and the names of the options that the user set. `--help` prints and exits.

    A key of the file counts as set where it differs from the default: the config.yaml of a run holds every option.
    """
    known = defaults(config)
    argv, path = _take_config(argv)
    given = _flags(command, argv, known)
    from_file = {key: value for key, value in (_read_yaml(path, known) if path else {}).items() if key not in given}
    listed = {key: _listed(key, from_file[key], path) for key in LISTED & from_file.keys()}
    args = [arg for key, value in from_file.items() if key not in LISTED for arg in _as_args(key, value, path, known[key])]
    parsed = _with_listed(_run_tyro(command, config, args + argv), listed)
    values = flatten(parsed)
    return parsed, frozenset(given | {key for key in from_file if values[key] != known[key]})


def _listed(key: str, value: Any, path: str | None) -> tuple[dict, ...]:
    """A list of mappings, each with a `path`."""
    if not isinstance(value, list) or not all(isinstance(item, dict) and ("path" in item or "data_files" in item) for item in value):
        raise BadInput(f"{path}: {key} must be a list of mappings with a path each, such as `- path: rows.jsonl`")
    return tuple(value)


def _with_listed(parsed: Any, listed: dict[str, tuple]) -> Any:
    return dataclasses.replace(parsed, data=dataclasses.replace(parsed.data, **listed)) if listed else parsed


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    rest, path, i = [], None, 0
    while i < len(argv):
        if argv[i] == "--config" or argv[i].startswith("--config="):
            _, equals, value = argv[i].partition("=")
            if not equals and i + 1 == len(argv):
                raise BadInput("--config needs a file name")
            if path is not None:
                raise BadInput("option --config is given twice")
            path, i = (value, i + 1) if equals else (argv[i + 1], i + 2)
        else:
            rest.append(argv[i])
            i += 1
    return rest, path


def config_file(argv: list[str]) -> str | None:
    """The file that --config names."""
    return _take_config(argv)[1]


def nearest(word: str, known: list[str]) -> str:
    """ " (did you mean X?)" for the closest known word, or nothing when none is close."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""


def _flags(command: str, argv: list[str], known: dict) -> set[str]:
    """Names of the options given as flags; an unknown or repeated one is an error."""
    given: set[str] = set()
    for arg in argv:
        if not arg.startswith("--") or arg in ("--help", "--"):
            continue
        flag = arg.partition("=")[0]
        name = flag[2:].replace("-", "_")
        name = name.removeprefix("no_") if name not in known else name
        if name not in known:
            raise BadInput(
                f"unknown option {flag}{nearest(flag, ['--' + key.replace('_', '-') for key in known])}; see treetune {command} --help"
            )
        if name in LISTED:
            raise BadInput(f"{name} is a list of mappings: write it in a file and give --config, or use --data")
        if name in given:
            raise BadInput(f"option {flag} is given twice")
        given.add(name)
    return given


def _read_yaml(path: str, known: dict) -> dict[str, Any]:
    import yaml

    if not Path(path).is_file():
        raise BadInput(f"config file {path} does not exist")
    try:
        text = Path(path).read_text(encoding="utf-8")
        found, tree = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BadInput(f"{path} must hold `option: value` lines, got a {type(found).__name__}")
    keys = [key.value for key, _ in tree.value]
    for key in found:
        if key not in known:
            raise BadInput(f"{path}: unknown key {key!r}{nearest(str(key), list(known))}")
        if keys.count(key) > 1:
            raise BadInput(f"{path}: key {key!r} is given twice")
    return found


def _as_args(key: str, value: Any, path: str, default: Any) -> list[str]:
    """A YAML value as the flag that says the same."""
    flag = "--" + key.replace("_", "-")
    if isinstance(value, bool) != isinstance(default, bool):
        wanted = "true or false" if isinstance(default, bool) else "a value; put quotes around words like yes and off"
        raise BadInput(f"{path}: {key} is {value!r}, expected {wanted}")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if value is None and default is not None:
        raise BadInput(f"{path}: {key} has no value; give one or remove the line")
    if key in PAIRS and isinstance(value, dict):
        value = _pairs(key, value, path)
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, dict | list) for item in items):
        raise BadInput(f"{path}: {key} must be a value or a list of values, got {value!r}")
    if isinstance(value, list):
        return [flag, *(str(item) for item in items)]
    return [f"{flag}={value}"]  # in one piece, because a text may begin with dashes


def _pairs(key: str, value: dict, path: str | None) -> list[str]:
    """A mapping of texts as NAME=TEXT."""
    if key != "special_tokens":
        return [f"{name}={json.dumps(item)}" for name, item in value.items()]
    if wrong := [name for name, text in value.items() if not isinstance(text, str)]:
        raise BadInput(f"{path}: {key} has {value[wrong[0]]!r} for {wrong[0]}; expected a text, in quotes where it looks like a number")
    return [f"{name}={text}" for name, text in value.items()]


def _run_tyro(command: str, config: type, args: list[str]) -> Any:
    import tyro

    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(tyro.conf.OmitArgPrefixes[config], prog=f"treetune {command}", args=args)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise BadInput(f"{_one_line(shown.getvalue())}; see treetune {command} --help") from None


def _one_line(box: str) -> str:
    """The message inside tyro's error box."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line and line[0] in "│|"]
    body = next((i for i, line in enumerate(lines) if re.fullmatch(r"[─-]{5,}", line)), len(lines))
    return " ".join(lines[:body]) or " ".join(box.split())


def flatten(config: Any) -> dict[str, Any]:
    """The config as one flat mapping, option -> value, in the order of the help."""
    out: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        out |= flatten(value) if dataclasses.is_dataclass(value) else {entry.name: list(value) if isinstance(value, tuple) else value}
    return out


def to_yaml(config: Any, *, without: tuple[str, ...] = ()) -> str:
    """The resolved config as YAML that `--config` reads back."""
    import yaml

    kept = {key: value for key, value in flatten(config).items() if value is not None and key not in without}
    return yaml.safe_dump(kept, sort_keys=False)


def refuse_ignored(given: frozenset[str], ignored: dict[str, str]) -> None:
    """Raise BadInput for an option that the user set and this run would ignore; `ignored` maps it to the reason."""
    for name in sorted(given & ignored.keys()):
        raise BadInput(f"--{name.replace('_', '-')} would be ignored: {ignored[name]}")
