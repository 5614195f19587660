"""What must hold of a config before anything is loaded. Imports torch only for a run that starts from an adapter."""

from typing import Any

from treetune.cli import checks, early, protection
from treetune.cli.methods import CONFIGS


def complete(config: Any, options: frozenset[str] = frozenset(), config_file: str | None = None) -> Any:
    """The config with what depends on other options filled in, once it is checked.

    options: names of those that the user set, of which one that the command would ignore is refused. Errors: ValueError, one line, for
    options out of range, that contradict each other, or that name what is not there.
    """
    early.check_names(config)
    checks.check(config, options)
    if getattr(getattr(config, "adapter", None), "lora_model_dir", None) is not None:
        early.check(config, options)
        from treetune.cli import bases

        config = bases.started(config, options)
    protection.check(config, config_file)
    early.check(config, options)
    method = CONFIGS.get(type(config))
    return config if method is None else method.complete(config)
