"""From a command line and a YAML file to a typed config; every mistake is one line and exit code 2.

`--config run.yaml` is read first, flags win. The file's values become the config as they are (`typed`), flags go through tyro.
Importing this imports no torch.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from treetune.cli import run_file
from treetune.cli.methods import METHODS
from treetune.cli.run_file import RunFile
from treetune.core.config import flags, reading, table

LONGEST = 600  # characters of a message about a flag
Parsed = tuple[Any, frozenset[str]]
Ignored = Callable[[Any], Mapping[str, str]]


def parse(
    command: str, config: type, argv: list[str], *, ignored: Ignored | None = None, say: Callable[[str], None] = lambda line: None
) -> Parsed:
    """The config, and the names of the options that the user set. `--help` prints and exits.

    A key of the file counts as set where it differs from the default: the config.yaml of a run holds every option. An empty list of what
    another option stands for (`data` beside `datasets`) is not set, either.
    ignored(config) -> {option: why nothing would look at it}: of a file of another tool such options are left out. say takes lines about
    what the file of another tool means.
    """
    options = table.options(config)
    argv, over = run_file.foreign_flags(argv, flags.take_config(argv)[1], options) if command in METHODS else (argv, {})
    argv, path, given = flags.read(command, argv, options)
    file = RunFile({}) if path is None else run_file.read(path, command, options, over=over, hint=f"; see treetune {command} --help")
    from_file = {key: value for key, value in file.values.items() if key not in given}
    parsed = _fill(command, config, from_file, argv)
    for line in file.lines:
        say(line)
    if file.foreign and ignored is not None and (idle := {key: why for key, why in ignored(parsed).items() if key in from_file}):
        for key, why in idle.items():
            if from_file[key] != options[key].default:
                say(f"  left out, as nothing would look at it: {key} ({why})")
        from_file = {key: value for key, value in from_file.items() if key not in idle}
        parsed = _fill(command, config, from_file, argv)
    values = table.flatten(parsed)
    empty = {key for key in from_file if values[key] == [] and (place := options[key].place) and values.get(place.instead)}
    return parsed, frozenset(given | {key for key in from_file.keys() - empty if values[key] != options[key].default})


def config_file(argv: list[str]) -> str | None:
    """The file that --config names."""
    return flags.take_config(argv)[1]


def _fill(command: str, config: type, from_file: dict[str, Any], args: list[str]) -> Any:
    """The config of a file and of flags. Without flags there is nothing to parse, and building tyro's parser takes longer than the file."""
    needed = {name for name, option in table.options(config).items() if option.default is table.REQUIRED}
    return _run_tyro(command, config, from_file, args) if args or needed - from_file.keys() else reading.fill(config, from_file)


def _run_tyro(command: str, config: type, from_file: dict[str, Any], args: list[str]) -> Any:
    """The config of the flags, with the file's values and the defaults for all else."""
    import tyro

    shown = io.StringIO()
    form = _with_config(config) if {"--help", "-h"} & set(args) else config
    try:
        with contextlib.redirect_stderr(shown):
            default = {"default": reading.fill(config, from_file, missing=tyro.MISSING)} if from_file and form is config else {}
            return tyro.cli(tyro.conf.OmitArgPrefixes[form], prog=f"treetune {command}", args=args, **default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        words = _one_line(shown.getvalue())
        if words.startswith("Required options"):
            needed = [name.upper() for name, option in table.options(config).items() if option.default is table.REQUIRED]
            words = f"treetune {command} needs {' and '.join(needed)}"
        if (alone := re.fullmatch(r"Unrecognized options: ([^-\s]\S*)", words)) and "data" in table.options(config):
            words = f"{alone[1]} has no option before it: rows come behind --data, a run file behind --config"
        raise ValueError(f"{words}; see treetune {command} --help") from None


def _with_config(config: type) -> type:
    """The config class as the help shows it: `--config` among its options."""
    import tyro

    words = "Read options from this YAML file; flags win over it. Each run leaves such a file, config.yaml."
    kind = Annotated[str | None, tyro.conf.arg(help=words, metavar="FILE")]
    form = dataclasses.make_dataclass(config.__name__, [("config", kind, dataclasses.field(default=None))], bases=(config,), frozen=True)
    form.__doc__ = config.__doc__
    return form


def _one_line(box: str) -> str:
    """The message inside tyro's error box, at most LONGEST characters of it."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line and line[0] in "│|"] or [
        line.strip() for line in box.splitlines()
    ]
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"[─-]{5,}", line)]
    body = [line for i, line in enumerate(lines) if i not in rules and not line.startswith("For full helptext")]
    words = " ".join(body if len(rules) != 1 or rules[0] == 0 else lines[: rules[0]]).split()
    text = re.sub(r"^(Unrecognized options) \1", r"\1", " ".join(words))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."
