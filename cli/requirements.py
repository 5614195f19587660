"""What must hold of a config before anything is loaded. Imports torch only for a run that starts from an adapter."""

from typing import Any

from treetune.cli import early, protection
from treetune.cli.methods import CONFIGS
from treetune.cli.options import optim, run
from treetune.core.config import checks, table
from treetune.core.config.ranges import TOKENS_MAX


def complete(config: Any, options: frozenset[str] = frozenset(), config_file: str | None = None) -> Any:
    """The config with what depends on other options filled in, once it is checked.

    options: names of those that the user set, of which one that the command would ignore is refused. Errors: ValueError, one line, for
    options out of range, that contradict each other, or that name what is not there.
    """
    early.check_names(config)
    check(config, options)
    if getattr(getattr(config, "adapter", None), "lora_model_dir", None) is not None:
        early.check(config, options)
        from treetune.cli import bases

        config = bases.started(config, options)
    protection.check(config, config_file)
    early.check(config, options)
    method = CONFIGS.get(type(config))
    return config if method is None else method.complete(config)


def check(config: Any, options: frozenset[str]) -> None:
    """Raise ValueError, one line, for options out of range, that contradict each other, or that this command would ignore."""
    checks.check_ranges(config)
    _check_pass(table.flatten(config))
    checks.check_texts(config)
    if (method := CONFIGS.get(type(config))) is not None:
        optim.conflicts(config.optim)
        run.conflicts(config.run)
        method.conflicts(config)
    checks.refuse_unused(options, ignored(config))


def ignored(config: Any) -> dict[str, str]:
    """{option: why this command would not look at it}, as far as options tell."""
    method = CONFIGS.get(type(config))
    return table.unused(config) | (method.unused(config) if method else {})


def _check_pass(values: dict[str, Any]) -> None:
    """A forward pass holds micro_batch_size * sequence_len tokens."""
    tokens = (values.get("micro_batch_size") or 1) * (values.get("sequence_len") or 1)
    if tokens > TOKENS_MAX:
        raise ValueError(f"micro_batch_size * sequence_len must be at most {TOKENS_MAX} tokens, got {tokens}: lower one of them")
