"""Functions by name: the import path of each and the options that it takes. Imports no torch.

A function is imported when it is asked for, so that a command line can list names, and tell which options a choice reads, before torch is
loaded. `losses.presets` has the tables of losses. A new optimiser is one function of `core.optim` and one row here.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

from treetune.core import import_path


class Named(Protocol):
    """A row: an import path, and names of keyword-only parameters."""

    @property
    def function(self) -> str | Callable[..., Any]:
        """Import path `package.module.function`, or the function itself."""
        ...

    @property
    def takes(self) -> tuple[str, ...]:
        """Keyword-only parameters that options set."""
        ...


class Entry(NamedTuple):
    """A function, by its import path or itself, the keyword-only parameters of it that options set, and those that its name sets."""

    function: str | Callable[..., Any]
    takes: tuple[str, ...] = ()
    bound: Mapping[str, Any] = MappingProxyType({})

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Entry":
        """The row of a function; its keyword-only parameters are what it takes."""
        return cls(function, keywords(function))


_RULES, _ADAM = ("weight_decay", "decay", "lr_scale"), ("b1", "b2", "eps", "weight_decay", "decay", "lr_scale")
_GALORE, _APOLLO = ("rank", "update_proj_gap", "scale", "proj_type"), ("update_proj_gap", "scale", "seed")
_PAGED = MappingProxyType({"paged": True})
OPTIMIZERS: Mapping[str, Entry] = {
    "adamw": Entry("treetune.core.optim.adamw", (*_ADAM, "paged")),
    "adamw_8bit": Entry("treetune.core.optim_blocks.adamw_8bit", (*_ADAM, "paged")),
    "adamw_4bit": Entry("treetune.core.optim_blocks.adamw_4bit", (*_ADAM, "paged")),
    "adamw_fp8": Entry("treetune.core.optim_blocks.adamw_fp8", (*_ADAM, "paged")),
    "paged_adamw": Entry("treetune.core.optim.adamw", _ADAM, _PAGED),
    "paged_adamw_8bit": Entry("treetune.core.optim_blocks.adamw_8bit", _ADAM, _PAGED),
    "schedule_free_adamw": Entry("treetune.core.optim_averages.schedule_free_adamw", (*_ADAM, "paged")),
    "adopt": Entry("treetune.core.optim_averages.adopt", (*_ADAM, "paged")),
    "lion": Entry("treetune.core.optim.lion", ("b1", "b2", *_RULES, "paged")),
    "lion_8bit": Entry("treetune.core.optim_blocks.lion_8bit", ("b1", "b2", *_RULES, "paged")),
    "paged_lion": Entry("treetune.core.optim.lion", ("b1", "b2", *_RULES), _PAGED),
    "paged_lion_8bit": Entry("treetune.core.optim_blocks.lion_8bit", ("b1", "b2", *_RULES), _PAGED),
    "muon": Entry("treetune.core.optim_matrices.muon", ("momentum", "adjust", "b1", "b2", *_RULES, "paged")),
    "galore_adamw": Entry("treetune.core.optim_projections.galore_adamw", (*_GALORE, *_ADAM, "paged")),
    "galore_adamw_8bit": Entry("treetune.core.optim_projections.galore_adamw_8bit", (*_GALORE, *_ADAM, "paged")),
    "apollo_adamw": Entry("treetune.core.optim_projections.apollo_adamw", ("rank", "scale_type", *_APOLLO, *_ADAM, "paged")),
    "apollo_mini": Entry("treetune.core.optim_projections.apollo_mini", (*_APOLLO, *_ADAM, "paged")),
    "adafactor": Entry("treetune.core.optim_matrices.adafactor", ("decay_rate", "clip_threshold", "scale_parameter", *_RULES, "paged")),
    "adagrad": Entry("treetune.core.optim_averages.adagrad", ("eps", *_RULES, "paged")),
    "sgd": Entry("treetune.core.optim.sgd", ("momentum", *_RULES, "paged")),
}
# What other tools call them.
OPTIMIZER_ALIASES: Mapping[str, str] = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_torch_xla": "adamw", "adamw_hf": "adamw", "adamw_apex_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit", "adamw_torch_8bit": "adamw_8bit", "adamw_torch_4bit": "adamw_4bit", "adamw_torch_fp8": "adamw_fp8",
    "paged_adamw_32bit": "paged_adamw", "lion_32bit": "lion", "paged_lion_32bit": "paged_lion", "adopt_adamw": "adopt",
    "schedule_free_adamw_torch": "schedule_free_adamw", "adamw_schedule_free": "schedule_free_adamw",
    "apollo": "apollo_adamw",
}  # fmt: skip
_OWN: Mapping[str, Mapping[str, float]] = {
    "b2": {"lion": 0.99, "lion_8bit": 0.99, "paged_lion": 0.99, "paged_lion_8bit": 0.99, "adopt": 0.9999},
    "eps": {"adagrad": 1e-10, "adopt": 1e-6},
    "momentum": {"muon": 0.95},
}
_USUAL: Mapping[str, float] = {"b2": 0.999, "eps": 1e-8, "momentum": 0.0}


def left_open(optimizer: str) -> dict[str, float]:
    """What an optimizer takes for options that are not given: its own defaults, and the usual ones for a function of the user's."""
    return {name: _OWN[name].get(optimizer, usual) for name, usual in _USUAL.items()}


# One that takes `warmup` has a rise of its own.
SCHEDULES: Mapping[str, Entry] = {
    "cosine": Entry("treetune.core.optim.cosine", ("min_ratio", "num_cycles")),
    "linear": Entry("treetune.core.optim.linear", ("min_ratio",)),
    "constant": Entry("treetune.core.optim.constant"),
    "cosine_with_restarts": Entry("treetune.core.schedules.cosine_with_restarts", ("num_cycles",)),
    "cosine_with_min_lr": Entry("treetune.core.schedules.cosine_with_min_lr", ("min_lr", "min_lr_rate", "num_cycles")),
    "polynomial": Entry("treetune.core.schedules.polynomial", ("power", "lr_end")),
    "inverse_sqrt": Entry("treetune.core.schedules.inverse_sqrt", ("timescale",)),
    "rex": Entry("treetune.core.schedules.rex", ("min_ratio", "beta")),
    "warmup_stable_decay": Entry(
        "treetune.core.schedules.warmup_stable_decay",
        ("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "warmup"),
    ),
    "one_cycle": Entry(
        "treetune.core.schedules.one_cycle",
        ("pct_start", "anneal_strategy", "div_factor", "final_div_factor", "three_phase", "warmup"),
    ),
}
SCHEDULE_ALIASES: Mapping[str, str] = {"constant_with_warmup": "constant", "wsd": "warmup_stable_decay"}
# What options of their own set; `lr_scheduler_kwargs` sets the others.
SCHEDULE_GIVEN = ("min_ratio", "warmup")


def keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the keyword-only parameters that options may set: those that no partial has bound."""
    bound = function.keywords if isinstance(function, partial) else {}
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in bound)


class Own(Protocol):
    """A row that can be made for a function of the user's."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Own":
        """The row of a function."""
        ...


R = TypeVar("R", bound=Own)


def choose(table: Mapping[str, R], text: str) -> R:
    """The row that a name stands for, or one like it for the function at an import path, which is imported now."""
    kind: Any = type(next(iter(table.values())))
    return table[text] if text in table else kind.of(import_path.load_guarded(text))


def resolve(function: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function at the import path `package.module.function`; a function is itself."""
    if not isinstance(function, str):
        return function
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)


def bind(entry: Named, **options: Any) -> Callable[..., Any]:
    """The function of a row, with those of `options` that it takes. An option that is left out keeps the function's own default."""
    function, chosen = resolve(entry.function), {name: options[name] for name in entry.takes if name in options}
    chosen |= getattr(entry, "bound", {})
    return partial(function, **chosen) if chosen else function
