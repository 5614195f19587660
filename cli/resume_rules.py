"""The rules of the fields of the training commands for a resumed run. Imports no torch.

A test requires a rule for every option, with its reason.
"""

from typing import Any

from treetune.cli import checks
from treetune.cli.methods import CONFIGS, METHODS
from treetune.core.config import table
from treetune.core.run.provenance import Options
from treetune.core.run.resume_rules import WEIGHTS, Rule

BETAS = {"adamw": 0.999, "lion": 0.99}


def rules(config: type) -> dict[str, Rule]:
    """{option: its rule} of the config class of a method."""
    return {name: option.rule for name, option in table.options(config).items() if option.rule is not None}


def describe(config: Any, *, rate: float, dtype: str) -> Options:
    """The options of a run for its checkpoints; rate and dtype are those of a run that leaves them open."""

    def resolve(values: dict[str, Any]) -> dict[str, Any]:
        """The options with values for those that were left open, so that naming the default is no change."""
        left = {"learning_rate": rate, "dtype": dtype, "adam_beta2": BETAS.get(values.get("optimizer", ""))}
        if "feature_norm" in values:
            left["feature_norm"] = "per_layer" if values["mode"] == "strided" else "raw"
        return values | {name: value for name, value in left.items() if name in values and values[name] in (None, "auto")}

    kind = type(config)
    by_option = rules(kind)
    return Options(
        CONFIGS[kind].name,
        table.flatten(config),
        table.defaults(kind),
        checks.ignored(config),
        by_option,
        resolve,
        # `model` is judged by the weights of that name, not by a function.
        tuple(name for name, rule in by_option.items() if rule.verdict != WEIGHTS and rule.judged_by == (name,)),
        frozenset(name for name, option in table.options(kind).items() if option.door is not None),
        tuple(METHODS),
    )
