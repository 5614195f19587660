"""`treetune config-schema`: the options of config files as a JSON schema."""

import json
from typing import Any

import yaml

from treetune.cli import schema
from treetune.cli.options.commands import ConfigSchema
from treetune.core.config import suggestions
from treetune.core.run.errors import checking_input


def run(config: ConfigSchema, given: frozenset[str]) -> int:
    """Print the schema, or one option of it; the exit code."""
    with checking_input():
        if config.dialect == "axolotl" and "method" in given:
            raise ValueError("--method would be ignored: a file of axolotl's names its method itself")
        whole = schema.of_axolotl() if config.dialect == "axolotl" else schema.of_method(config.method)
        shown = whole if config.field is None else _field(whole, config.field)
    print(json.dumps(shown, indent=2) if config.format == "json" else yaml.safe_dump(shown, sort_keys=False), end="")
    print(end="\n" if config.format == "json" else "")
    return 0


def _field(whole: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of a schema for one option, or one of a section such as trl.beta."""
    part: dict[str, Any] = whole
    for piece in name.replace("-", "_").split("."):
        known = part.get("properties", {})
        if piece not in known:
            raise ValueError(f"there is no option {name}{suggestions.of_option(piece, known)}")
        part = known[piece]
    return {name: part}
