"""The flags of a command line against the options of its command: names, repetitions, values. Imports no torch."""

import itertools
import re
import shlex
from collections.abc import Mapping
from typing import NamedTuple

from treetune.core.config import suggestions, typed
from treetune.core.config.table import Option

Options = Mapping[str, Option]


class Arguments(NamedTuple):
    """The arguments without --config, the file that it names, and the names of the options that are given as flags."""

    rest: list[str]
    config_file: str | None
    given: set[str]


def read(command: str, argv: list[str], options: Options) -> Arguments:
    """The arguments of a command, with numbers such as 1e3 written out as tyro reads them.

    Errors: ValueError for a name that is unknown or comes twice, and for a value that is not one of its option.
    """
    _check_text(argv)
    argv, path = take_config(argv)
    argv = _switched(argv, options)
    given = _flags(command, argv, options)
    _check_flags(command, argv, options)
    _check_values(argv, options)
    return Arguments(_numbers(argv, options), path, given)


def _check_text(argv: list[str]) -> None:
    for arg in argv:
        if any("\ud800" <= char <= "\udfff" for char in arg):
            raise ValueError(f"the argument {arg.encode('utf-8', 'backslashreplace').decode()} is not UTF-8 text")


def take_config(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments without --config, and the file that it names."""
    rest, path, i = [], None, 0
    while i < len(argv):
        if argv[i] == "--config" or argv[i].startswith("--config="):
            _, equals, value = argv[i].partition("=")
            if not equals and i + 1 == len(argv):
                raise ValueError("--config needs a file name")
            if path is not None:
                raise ValueError("option --config is given twice")
            path, i = (value, i + 1) if equals else (argv[i + 1], i + 2)
            if not path:
                raise ValueError("the name of the config file is empty: --config needs a file name")
        else:
            rest.append(argv[i])
            i += 1
    return rest, path


def _switched(argv: list[str], options: Options) -> list[str]:
    """The arguments with the choices that switches stand for: --option, --no-option, and true or false behind it."""
    out: list[str] = []
    for arg, following in itertools.pairwise([*argv, "--"]):
        flag, equals, text = arg.partition("=")
        negated, known = flag.startswith("--no-"), _named(options, flag.replace("--no-", "--", 1))
        before = _named(options, out[-1]) if out else None
        if known is not None and known.switch is not None and negated and not equals and following.startswith("--"):
            out.append(f"--{flag[5:]}={known.switch.off}")
        elif known is not None and known.switch is not None and (equals or following.startswith("--")):
            out.append(f"{flag}={_choice(known, text) if equals else known.switch.on}")
        else:
            out.append(_choice(before, arg) if before is not None else arg)
    return out


def _choice(option: Option, text: str) -> str:
    """The text of a value; of a switch what true or false stand for."""
    words = {} if option.switch is None else {"true": option.switch.on, "false": option.switch.off}
    return words.get(text.lower(), text)


def _flags(command: str, argv: list[str], known: Options) -> set[str]:
    """Names of the options given as flags; unknown ones are an error, and one that is repeated."""
    given: set[str] = set()
    unknown: dict[str, str] = {}
    for arg in argv:
        if not arg.startswith("--") or arg in ("--help", "--"):
            continue
        flag = arg.partition("=")[0]
        name = flag[2:].replace("-", "_")
        name = name.removeprefix("no_") if name not in known else name
        if name not in known:
            unknown[flag] = suggestions.of_option(name, known, flags=True)
            continue
        if known[name].of_mappings:
            raise ValueError(f"{name} is a list of mappings: write it in a file and give --config, or use --data")
        if name in given:
            raise ValueError(f"option {flag} is given twice")
        given.add(name)
    if unknown:
        listed = ", ".join(flag + near for flag, near in unknown.items())
        raise ValueError(f"unknown option{'s' * (len(unknown) > 1)} {listed}; see treetune {command} --help")
    return given


def _check_flags(command: str, argv: list[str], options: Options) -> None:
    """Errors: ValueError for a value given to a flag that takes none, and for an option with one dash."""
    for arg, following in itertools.pairwise([*argv, ""]):
        option = _named(options, arg)
        if option is not None and option.kind in (str, str | None) and not option.choices and re.match(r"-[A-Za-z]", following):
            raise ValueError(f"{arg} has no value, got {following!r}: write {arg}={shlex.quote(following)} if that is its value")
        if re.fullmatch(r"-[A-Za-z][\w-]+(=.*)?", arg):
            meant = suggestions.of_option(arg[1:].partition("=")[0].replace("-", "_"), options, flags=True)
            raise ValueError(f"unknown option {arg}: options begin with two dashes{meant}; see treetune {command} --help")
        flag, equals, value = arg.partition("=")
        name = flag[2:].replace("-", "_").removeprefix("no_")
        if flag.startswith("--") and name in options and options[name].kind is bool and (equals or following.lower() in ("true", "false")):
            plain = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} takes no value, got {(value if equals else following)!r}: write {plain} or --no-{plain[2:]}")


def _named(options: Options, flag: str) -> Option | None:
    """The option of a flag; None for what is no flag of the command."""
    return options.get(flag[2:].replace("-", "_")) if flag.startswith("--") else None


def _check_values(argv: list[str], options: Options) -> None:
    """Errors: ValueError for a value that is not one of its flag's choices, and for a list of numbers with something else in it."""
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
    """The arguments with whole numbers such as 1e3 written out. Errors: ValueError for a flag whose value is no number, as it must be."""
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
            near = suggestions.of_part(option.name, text, flags=True)
            raise ValueError(f"{flag} must be {option.expected()}, got {text if len(text) <= 40 else text[:36] + ' ...'!r}{near}")
        out[i if equals else i + 1] = f"{flag}={value}" if equals else str(value)
    return out


def _parses(kind: type, text: str) -> bool:
    try:
        return kind(text) is not None
    except ValueError:
        return False
