"""The options of a run as its checkpoints hold them, with what a resumed run may change of them. Imports no torch."""

from typing import Any

from treetune.cli import requirements
from treetune.cli.methods.method import Method
from treetune.cli.options import ebft
from treetune.core import registry
from treetune.core.config import table
from treetune.core.config.table import Config
from treetune.core.run.provenance import Options
from treetune.core.run.resume_rules import WEIGHTS

OPEN = {"adam_beta2": "b2", "adam_epsilon": "eps", "momentum": "momentum"}


def describe(config: Config, method: Method, *, rate: float, dtype: str) -> Options:
    """The options of a run for its checkpoints; rate and dtype are those of a run that leaves them open."""

    def resolve(values: dict[str, Any]) -> dict[str, Any]:
        """The options with values for those that were left open, so that naming the default is no change."""
        own = registry.left_open(values.get("optimizer", ""))
        left = {"learning_rate": rate, "dtype": dtype, **{option: own[name] for option, name in OPEN.items()}}
        left["data_seed"] = values.get("seed")
        if "feature_norm" in values:
            left["feature_norm"] = ebft.norm(values)
        return values | {name: value for name, value in left.items() if name in values and values[name] in (None, "auto")}

    kind = type(config)
    rules, defaults = table.rules(kind), table.defaults(kind)
    return Options(
        method.name,
        table.flatten(config) | {name: defaults[name] for name in table.secrets(kind)},
        defaults,
        requirements.ignored(config, method),
        rules,
        resolve,
        # `model` is judged by the weights of that name, not by a function.
        tuple(name for name, rule in rules.items() if rule.verdict != WEIGHTS and rule.judged_by == (name,)),
        frozenset(name for name, option in table.options(kind).items() if option.door is not None),
    )
