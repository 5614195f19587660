"""From a command line and a YAML file to a typed config; every mistake is one line and exit code 2.

`--config run.yaml` is read first, flags win. The file's values become the config as they are (`typed`), flags go through tyro.
Importing this imports no torch.
"""

import contextlib
import dataclasses
import io
import itertools
import re
import shlex
from collections.abc import Mapping
from typing import Annotated, Any

from treetune.cli.errors import BadInput
from treetune.core.config import reading, suggestions, table, typed
from treetune.core.config.table import Option

LONGEST = 600  # characters of a message about a flag
Parsed = tuple[Any, frozenset[str]]
Options = Mapping[str, Option]


def parse(command: str, config: type, argv: list[str]) -> Parsed:
    """The config, and the names of the options that the user set. `--help` prints and exits.

    A key of the file counts as set where it differs from the default: the config.yaml of a run holds every option.
    """
    options = table.options(config)
    _check_text(argv)
    argv, path = _take_config(argv)
    given = _flags(command, argv, options)
    _check_flags(command, argv, options)
    _check_values(argv, options)
    argv = _numbers(argv, options)
    read = {} if path is None else reading.from_file(path, options, hint=f"; see treetune {command} --help")
    from_file = {key: value for key, value in read.items() if key not in given}
    parsed = _run_tyro(command, config, from_file, argv)
    values = table.flatten(parsed)
    return parsed, frozenset(given | {key for key in from_file if values[key] != options[key].default})


def _check_text(argv: list[str]) -> None:
    for arg in argv:
        if any("\ud800" <= char <= "\udfff" for char in arg):
            raise BadInput(f"the argument {arg.encode('utf-8', 'backslashreplace').decode()} is not UTF-8 text")


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
            if not path:
                raise BadInput("the name of the config file is empty: --config needs a file name")
        else:
            rest.append(argv[i])
            i += 1
    return rest, path


def config_file(argv: list[str]) -> str | None:
    """The file that --config names."""
    return _take_config(argv)[1]


def _flags(command: str, argv: list[str], known: Options) -> set[str]:
    """Names of the options given as flags; an unknown or repeated one is an error."""
    given: set[str] = set()
    for arg in argv:
        if not arg.startswith("--") or arg in ("--help", "--"):
            continue
        flag = arg.partition("=")[0]
        name = flag[2:].replace("-", "_")
        name = name.removeprefix("no_") if name not in known else name
        if name not in known:
            raise BadInput(f"unknown option {flag}{suggestions.of_option(name, known, flags=True)}; see treetune {command} --help")
        if known[name].of_mappings:
            raise BadInput(f"{name} is a list of mappings: write it in a file and give --config, or use --data")
        if name in given:
            raise BadInput(f"option {flag} is given twice")
        given.add(name)
    return given


def _check_flags(command: str, argv: list[str], options: Options) -> None:
    """Errors: BadInput for a value given to a flag that takes none, and for an option with one dash."""
    for arg, following in itertools.pairwise([*argv, ""]):
        option = _named(options, arg)
        if option is not None and option.kind in (str, str | None) and not option.choices and re.match(r"-[A-Za-z]", following):
            raise BadInput(f"{arg} has no value, got {following!r}: write {arg}={shlex.quote(following)} if that is its value")
        if re.fullmatch(r"-[A-Za-z][\w-]+(=.*)?", arg):
            meant = suggestions.of_option(arg[1:].partition("=")[0].replace("-", "_"), options, flags=True)
            raise BadInput(f"unknown option {arg}: options begin with two dashes{meant}; see treetune {command} --help")
        flag, equals, value = arg.partition("=")
        name = flag[2:].replace("-", "_").removeprefix("no_")
        if flag.startswith("--") and name in options and options[name].kind is bool and (equals or following.lower() in ("true", "false")):
            plain = f"--{name.replace('_', '-')}"
            raise BadInput(f"{flag} takes no value, got {(value if equals else following)!r}: write {plain} or --no-{plain[2:]}")


def _named(options: Options, flag: str) -> Option | None:
    """The option of a flag; None for what is no flag of the command."""
    return options.get(flag[2:].replace("-", "_")) if flag.startswith("--") else None


def _check_values(argv: list[str], options: Options) -> None:
    """Errors: BadInput for a value that is not one of its flag's choices, and for a list of numbers with something else in it."""
    for flag, texts in _texts(argv):
        option = _named(options, flag)
        if option is not None and (option.many or option.choices):
            for text in texts if option.many else texts[:1]:
                if text != "None" or not option.optional:
                    typed.check_argument(flag, text, option)


def _texts(argv: list[str]) -> list[tuple[str, list[str]]]:
    """(flag, what stands behind it) of the arguments."""
    found: list[tuple[str, list[str]]] = []
    for arg in argv:
        if arg.startswith("--"):
            flag, equals, text = arg.partition("=")
            found.append((flag, [text] if equals else []))
        elif found:
            found[-1][1].append(arg)
    return found


def _numbers(argv: list[str], options: Options) -> list[str]:
    """The arguments with whole numbers such as 1e3 written out. Errors: BadInput for a flag whose value is no number, as it must be."""
    out = list(argv)
    for i, arg in enumerate(argv):
        flag, equals, text = arg.partition("=")
        option = _named(options, flag)
        text = text if equals else next(iter(argv[i + 1 : i + 2]), "--")
        if option is None or option.many or option.single not in (int, float) or text.startswith("--") or text == "None":
            continue
        if _parses(option.single, text):
            continue
        value = typed.value_of(text, option.single)
        if value is None:
            raise BadInput(f"{flag} must be {option.expected()}, got {text if len(text) <= 40 else text[:36] + ' ...'!r}")
        out[i if equals else i + 1] = f"{flag}={value}" if equals else str(value)
    return out


def _parses(kind: type, text: str) -> bool:
    try:
        return kind(text) is not None
    except ValueError:
        return False


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
        raise BadInput(f"{words}; see treetune {command} --help") from None


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
