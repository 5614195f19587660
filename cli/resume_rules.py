"""The rules of the fields of the training commands for a resumed run. Imports no torch.

A test requires a rule for every option, with its reason.
"""

from typing import Any

from treetune.cli import checks
from treetune.cli.methods import METHODS
from treetune.cli.options import table
from treetune.core.run.provenance import Options
from treetune.core.run.resume_rules import WEIGHTS, Rule

RULES: dict[str, Rule] = {}
DOORS: set[str] = set()  # options that hold a built-in name or an import path
for _method in METHODS.values():
    RULES |= {name: option.rule for name, option in table.options(_method.config).items()}
    DOORS |= {name for name, option in table.options(_method.config).items() if option.door is not None}
# Options that name functions; `model` is judged by the weights of that name.
FUNCTIONS = tuple(name for name, rule in RULES.items() if rule.verdict != WEIGHTS and rule.judged_by == (name,))
BETAS = {"adamw": 0.999, "lion": 0.99}


def describe(config: Any, *, rate: float, dtype: str) -> Options:
    """The options of a run for its checkpoints; rate and dtype are those of a run that leaves them open."""

    def resolve(values: dict[str, Any]) -> dict[str, Any]:
        """The options with values for those that were left open, so that naming the default is no change."""
        left = {"learning_rate": rate, "dtype": dtype, "adam_beta2": BETAS.get(values.get("optimizer", ""))}
        if "feature_norm" in values:
            left["feature_norm"] = "per_layer" if values["mode"] == "strided" else "raw"
        return values | {name: value for name, value in left.items() if name in values and values[name] in (None, "auto")}

    return Options(
        type(config).__name__.lower(),
        table.flatten(config),
        table.defaults(type(config)),
        checks.ignored(config),
        RULES,
        resolve,
        FUNCTIONS,
        frozenset(DOORS),
        tuple(METHODS),
    )
