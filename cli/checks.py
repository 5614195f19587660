"""What options may not say: values out of range, contradictions, and options that the command would ignore. Imports no torch."""

from typing import Any

from treetune.cli.errors import BadInput
from treetune.cli.methods import CONFIGS
from treetune.cli.options import optim, run
from treetune.cli.options.data import held_out as held_out
from treetune.cli.options.data import streams as streams
from treetune.core import import_path
from treetune.core.config import doors, table
from treetune.core.config.ranges import TOKENS_MAX


def check(config: Any, explicit: frozenset[str]) -> None:
    """Raise BadInput, one line, for options out of range, that contradict each other, or that this command would ignore."""
    values, options = table.flatten(config), table.options(type(config))
    for name, value in values.items():
        if (known := options[name].range) and (wrong := known.outside(value)):
            raise BadInput(f"{name} {wrong}")
    _check_pass(values)
    for name, option in options.items():
        if option.pairs is not None:
            option.pairs.read(values[name], name.replace("_", "-"))
        _check_functions(option, values[name])
    if (method := CONFIGS.get(type(config))) is not None:
        optim.conflicts(config.optim)
        run.conflicts(config.run)
        method.conflicts(config)
    refuse_unused(explicit, ignored(config))


def _check_functions(option: table.Option, value: Any) -> None:
    """Functions are looked for, and their parameters compared with what they are given, without importing them."""
    for text in value if isinstance(value, list) else [value]:
        if option.door is not None and text is not None and text not in option.choices:
            if not import_path.is_path(text):
                raise BadInput(f"{option.name} must be {option.expected()}, got {text!r}")
            doors.check(text, option.name, option.door)


def _check_pass(values: dict[str, Any]) -> None:
    """A forward pass holds micro_batch_size * sequence_len tokens."""
    tokens = (values.get("micro_batch_size") or 1) * (values.get("sequence_len") or 1)
    if tokens > TOKENS_MAX:
        raise BadInput(f"micro_batch_size * sequence_len must be at most {TOKENS_MAX} tokens, got {tokens}: lower one of them")


def ignored(config: Any) -> dict[str, str]:
    """{option: why this command would not look at it}, as far as options tell."""
    method = CONFIGS.get(type(config))
    return table.unused(config) | (method.unused(config) if method else {})


def refuse_unused(explicit: frozenset[str], reasons: dict[str, str]) -> None:
    """Raise BadInput for an option that the user set and this run would ignore; `reasons` maps it to the reason."""
    for name in sorted(explicit & reasons.keys()):
        raise BadInput(f"--{name.replace('_', '-')} would be ignored: {reasons[name]}")
