"""A YAML config file as `Written` values: what was read, and how it was written, so that nothing is guessed behind the user's back.

YAML 1.1 reads `yes` as true, `12:30` as 750, `017` as 15 and `2024-01-01` as a date. Such a reading is kept beside its text, and
`yamlvalues` takes it only where that type is expected. Names that occur twice, several documents, tags and unbounded aliases
are errors. Imports no torch.
"""

import re
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

SIZE_MAX = 1 << 20  # bytes of a config file
VALUES_MAX = 100_000  # values in it, aliases written out
DEPTH_MAX = 40
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")
DIGITS_MAX = 100
TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {f"{TAG}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}


class Reading(NamedTuple):
    """What YAML makes of a text that few would read so: "the number 750 (base 60)"."""

    words: str


class Written(NamedTuple):
    """A value of the file: None, bool, int, float, str, a `Reading`, a list or a dict of Written; and a plain scalar's own text."""

    value: Any
    text: str = ""
    plain: bool = False


def load(path: str) -> dict[str, Written]:
    """The options of a config file. Errors: ValueError, one line that names the file and the line or the key."""
    return read(text_of(path), path)


def read(text: str, path: str, faults: list[str] | None = None) -> dict[str, Written]:
    """The options that a text holds. path: what errors call it. Errors: as `load`.

    faults: takes what other readers of YAML let pass, in place of errors: keys that are given twice, of which the last one counts, and
    keys inside of values that are no texts.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {_problem(error)}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested more than {DEPTH_MAX} deep") from error
    if node is None:
        return {}
    written = _Reader(path, loader, faults).read(node, 0)
    if written.value is None:
        return {}
    if not isinstance(written.value, dict):
        kind = "list" if isinstance(written.value, list) else "single value"
        raise ValueError(f"{path} must hold `option: value` lines, got a {kind}")
    return written.value


def text_of(path: str) -> str:
    """The text of a config file. Errors: ValueError for what cannot be read, is too large or is not UTF-8."""
    file = Path(path)
    try:
        exists, regular, size = file.exists(), file.is_file(), file.stat().st_size if file.is_file() else 0
        data = file.read_bytes() if regular and size <= SIZE_MAX else b""
    except (OSError, ValueError) as error:
        raise ValueError(f"config file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not exists:
        raise ValueError(f"config file {path} does not exist")
    if not regular:
        raise ValueError(f"config file {path} is {'a folder' if file.is_dir() else 'no regular file'}")
    if size > SIZE_MAX:
        raise ValueError(
            f"config file {path} has {size} bytes, more than {SIZE_MAX}: rows belong in data files, which data or datasets name"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: byte {error.start} is not UTF-8 text") from error


def _problem(error: Any) -> str:
    if error.problem_mark is None:
        return " ".join(str(error).split())
    several = "but found another document" in (error.problem or "")
    problem = "it holds several documents (a second ---), expected one" if several else f"{error.problem or error.context}"
    return f"line {error.problem_mark.line + 1}: {problem}"


class _Reader:
    """From nodes to values, with a budget for what aliases expand to."""

    def __init__(self, path: str, loader: Any, faults: list[str] | None = None):
        self.path, self.loader, self.left, self.faults = path, loader, VALUES_MAX, faults

    def refuse(self, text: str) -> None:
        if self.faults is None:
            raise ValueError(text)
        self.faults.append(text)

    def read(self, node: Any, depth: int) -> Written:
        import yaml

        self.left -= 1
        if self.left < 0:
            raise ValueError(f"{self.path} has more than {VALUES_MAX} values once its aliases are written out: write them less often")
        if depth > DEPTH_MAX:
            raise ValueError(f"{self.path} line {_line(node)}: nested more than {DEPTH_MAX} deep")
        self.check_tag(node)
        if isinstance(node, yaml.SequenceNode):
            return Written([self.read(item, depth + 1) for item in node.value])
        if isinstance(node, yaml.MappingNode):
            return Written(self.mapping(node, depth))
        text = self.unicode(node)
        return Written(_scalar(node), text, node.style is None)

    def unicode(self, node: Any) -> str:
        """The text of a scalar; pairs of \\u escapes that are one character together become that character."""
        try:
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} line {_line(node)}: the text has half of a character (a lone \\ud800 to \\udfff)") from error
        return node.value

    def check_tag(self, node: Any) -> None:
        import yaml

        kind, plain_tag = type(node), None
        if kind is yaml.ScalarNode:
            plain_tag = self.loader.resolve(kind, node.value, (True, False) if node.style is None else (False, True))
        elif node.tag not in PLAIN_TAGS:
            plain_tag = f"{TAG}{'seq' if kind is yaml.SequenceNode else 'map'}"
        if plain_tag is not None and node.tag not in (plain_tag, f"{TAG}str"):
            tag = node.tag.replace(TAG, "!!")
            raise ValueError(
                f"{self.path} line {_line(node)} is not valid YAML for options: the tag {tag} is not read, write a plain value"
            )

    def mapping(self, node: Any, depth: int) -> dict[str, Written]:
        out: dict[str, Written] = {}
        merged: dict[str, Written] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == f"{TAG}merge":
                merged = self.merged(value, depth) | merged
                continue
            name = self.name(key)
            if name in out:
                self.refuse(f"{self.path} line {_line(key)}: key {name!r} is given twice, the first time in line {lines[name]}; keep one")
            lines[name] = _line(key)
            out[name] = self.read(value, depth + 1)
        return merged | out

    def merged(self, node: Any, depth: int) -> dict[str, Written]:
        """The entries that `<<` takes from other mappings, the first one first."""
        import yaml

        out: dict[str, Written] = {}
        for one in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(one, yaml.MappingNode):
                raise ValueError(f"{self.path} line {_line(node)}: << takes a mapping, or a list of mappings")
            out = self.read(one, depth + 1).value | out
        return out

    def name(self, key: Any) -> str:
        import yaml

        if not isinstance(key, yaml.ScalarNode) or key.tag != f"{TAG}str":
            shown = key.value if isinstance(key, yaml.ScalarNode) else "a list" if isinstance(key, yaml.SequenceNode) else "a mapping"
            fix = "names are texts, in quotes where YAML reads them otherwise"
            text = f"{self.path} line {_line(key)}: the key {shown or 'null'} is no name; {fix}"
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(text)
            self.refuse(text)
        return key.value


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _scalar(node: Any) -> Any:
    """What YAML reads in a scalar, numbers exactly."""
    kind, text = node.tag.removeprefix(TAG), node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    if kind == "timestamp":
        return Reading("a date")
    if kind in ("int", "float"):
        return _number(text)
    if kind == "str":
        return text
    return Reading(f"a value of the type {kind}")


def _number(text: str) -> Any:
    bare = text.replace("_", "").lstrip("+-")
    sign = "-" if text.startswith("-") else ""
    if ":" in bare:
        return Reading(f"the number {sign}{_sexagesimal(bare)} (base 60)")
    if bare[:2].lower() in ("0x", "0b"):
        return int(sign + bare, 0) if len(bare) <= DIGITS_MAX else Reading(f"a number of {len(bare)} digits")
    if re.fullmatch(r"0[0-7]+", bare):
        return Reading(f"the number {sign}{int(bare[:DIGITS_MAX], 8)} (base 8)")
    return numeral(text)


def _sexagesimal(text: str) -> str:
    total = Decimal(0)
    for part in text[:DIGITS_MAX].split(":"):
        total = total * 60 + Decimal(part or "0")
    return format(total, "f")


def numeral(text: str) -> Any:
    """The int or float that a decimal text such as 2_000, 1e1 or 1e-5 writes; a `Reading` past what is read; None where it is no number."""
    bare = text.replace("_", "")
    if bare.lstrip("+-").lower() in (".inf", ".nan"):
        return float(bare.replace(".", ""))
    if not NUMBER.fullmatch(text) or re.fullmatch(r"[-+]?0\d+", bare):
        return None
    if len(bare) > DIGITS_MAX:
        return Reading(f"a number of {len(bare.lstrip('+-'))} digits")
    if re.fullmatch(r"[-+]?\d+", bare):
        return int(bare)
    return float(bare)


def whole(text: str, value: float) -> int | None:
    """The whole number that a text with a point or an exponent writes, exactly; None where it is none."""
    if abs(value) >= 1e40 or value != int(value):
        return None
    number = Decimal(text.replace("_", ""))
    return int(number) if number == number.to_integral_value() else None
