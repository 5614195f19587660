"""Options of the optimiser, the learning rate and the length of a run. Importing this imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from tyro.conf import arg

from treetune.cli.options import schedule
from treetune.cli.options.doors import door
from treetune.core import option_pairs, registry
from treetune.core.config import checks
from treetune.core.config.doors import unused_unless_taken
from treetune.core.config.marks import (
    NAMED_VALUES,
    REGEX_NUMBERS,
    RESOURCES,
    RUN_LENGTH,
    STEP_ROWS,
    STEP_SIZE,
    Switch,
    Unused,
    Values,
    listed,
    refused,
    unused_if,
    unused_unless,
)
from treetune.core.config.ranges import BELOW_ONE, COUNT, COUNT_OR_NONE, NOT_NEGATIVE, PART, POSITIVE, SEED, SHARE, SMALL, Range

if TYPE_CHECKING:
    from treetune.core.optim import Optimizer

MOMENTUM, BETA = {"momentum": "{optimizer} has momentum instead"}, {"b1": "{optimizer} has adam_beta1 instead"}
RATES, PREFERENCE_RATES, REWARD_RATES, RL_RATES = (2e-4, 2e-5), (5e-5, 1e-6), (1e-4, 1e-5), (2e-5, 1e-6)

KEPT = refused("the weights in the checkpoint are kept in this dtype")
FEW = unused_if("adapter", "lora", "qlora", reason="the weights of an adapter are few, and kept in float32")
# What options of their own set; `optim_args` sets the others.
GIVEN = ("b1", "b2", "eps", "momentum", "weight_decay", "decay", "lr_scale", "seed")
OPTIMIZER = door(registry.OPTIMIZERS, "optimizer", *GIVEN, aliases=registry.OPTIMIZER_ALIASES)
SCHEDULE = door(registry.SCHEDULES, "learning-rate schedule", "peak", "steps", aliases=registry.SCHEDULE_ALIASES)


def taken(parameter: str, *, reason: str = "", instead: Mapping[str, str] = MappingProxyType({})) -> Unused:
    """The mark of an option that sets a parameter of the optimizer. instead: {parameter that it may have in its place: the reason}."""
    mark = unused_unless_taken("optimizer", registry.OPTIMIZERS, parameter, reason=reason)

    def unused(values: Values) -> str:
        row = registry.OPTIMIZERS.get(values["optimizer"], registry.Entry(""))
        other = next((text for name, text in instead.items() if name in row.takes and parameter not in row.takes), "")
        return other.format(**values) or mark.reason(values)

    return Unused(unused)


def _unshuffled(values: Values) -> str:
    weighted = any("weight" in entry for entry in values.get("datasets", ()))  # decides which rows come once more, in any order
    return "" if values.get("shuffle", True) or weighted else "shuffle is off"


def peak(rates: tuple[float, float]) -> Any:
    """The help of the learning rate, whose default is the first of the rates with an adapter and the second without."""
    low, full = (f"{rate:.0e}".replace("e-0", "e-") for rate in rates)
    return arg(help=f"Peak learning rate; if not given, {low} with an adapter and {full} without.")


def _all_here(values: Values) -> str:
    if values["layer_offloading"] == "none":
        return ""
    if values.get("relora_steps"):
        return "relora_steps merges the adapter into the layers, which are on the device for it"
    if values.get("fp8_products"):
        return "fp8_products multiplies the codes of layers, which are on the device for it"
    whole = values.get("adapter", "none") == "none" and not values.get("unfrozen_parameters")
    # A reference, or a network of features, is a frozen model beside the one that trains.
    return "adapter is none, and all layers train" if whole and not {"ref_model", "feature_device"} & set(values) else ""


@dataclass(frozen=True)
class OptimOptions:
    """Optimisation."""

    optimizer: Annotated[str, OPTIMIZER, refused("the moments in the checkpoint are those of this optimizer")] = "adamw"
    """Update rule, or a function of your own that makes one; all work in place."""
    learning_rate: Annotated[float | None, POSITIVE, STEP_SIZE, peak(RATES)] = None
    lr_scheduler: Annotated[str, SCHEDULE, STEP_SIZE] = "cosine"
    """Shape of the learning rate after the warm-up (docs/training.md lists them), or a function of your own."""
    lr_scheduler_kwargs: Annotated[tuple[str, ...], NAMED_VALUES, STEP_SIZE, schedule.KWARGS_TAKEN] = ()
    """NAME=VALUE for the schedule, such as num_cycles=3, power=2, min_lr_rate=0.1, num_decay_steps=100; in a file also a mapping."""
    cosine_min_lr_ratio: Annotated[
        float, PART, STEP_SIZE, unused_unless("lr_scheduler", "cosine", "rex", reason="the schedule is {lr_scheduler}")
    ] = 0.0
    """Final learning rate of the schedules cosine and rex, as a fraction of the peak."""
    cosine_constant_lr_ratio: Annotated[
        float | None, SHARE, STEP_SIZE, unused_unless("lr_scheduler", "cosine", reason="the schedule is {lr_scheduler}")
    ] = None
    """Fraction of the run in which the cosine falls; after it the learning rate stays at cosine_min_lr_ratio of the peak."""
    lr_div_factor: Annotated[
        float | None, schedule.FACTOR, STEP_SIZE, unused_unless("lr_scheduler", "one_cycle", reason="the schedule is {lr_scheduler}")
    ] = None
    """The peak over the first learning rate of one_cycle; 25 if not given."""
    warmup_steps: Annotated[int | None, COUNT_OR_NONE, STEP_SIZE] = None
    """Steps of linear warm-up."""
    warmup_ratio: Annotated[float | None, PART, STEP_SIZE] = None
    """Warm-up as a fraction of all steps, instead of warmup_steps; 0.03 if neither is given."""
    lr_quadratic_warmup: Annotated[bool, STEP_SIZE, schedule.LINEAR_RISE] = False
    """The warm-up rises as the square of the step."""
    weight_decay: Annotated[float, NOT_NEGATIVE, STEP_SIZE, taken("weight_decay")] = 0.0
    """Decoupled decay of matrices; vectors (norms, biases) do not decay."""
    weight_decay_rules: Annotated[tuple[str, ...], REGEX_NUMBERS, STEP_SIZE, taken("decay")] = ()
    """REGEX=VALUE over paths, or names of transformers, first match wins: decay of the leaves that match."""
    lr_rules: Annotated[tuple[str, ...], REGEX_NUMBERS, STEP_SIZE, taken("lr_scale")] = ()
    """REGEX=FACTOR over paths, or names of transformers, first match wins: multiplies the learning rate of the leaves that match."""
    embedding_lr: Annotated[float | None, POSITIVE, STEP_SIZE, taken("lr_scale")] = None
    """Peak learning rate of the embedding and the head where they train, unless a rule of lr_rules matches them."""
    adam_beta1: Annotated[float, BELOW_ONE, STEP_SIZE, taken("b1", reason="{optimizer} has no first moment", instead=MOMENTUM)] = 0.9
    """Decay rate of the first moment (adamw, lion and their kin)."""
    adam_beta2: Annotated[
        float | None, BELOW_ONE, STEP_SIZE, taken("b2", reason="{optimizer} has no such decay rate", instead=MOMENTUM)
    ] = None
    """Decay rate of the second moment (adamw, lion and their kin); if not given, 0.99 for lion, 0.9999 for adopt and 0.999 for others."""
    adam_epsilon: Annotated[float | None, POSITIVE, STEP_SIZE, taken("eps", reason="{optimizer} has no epsilon")] = None
    """Term added to the root of the second moment; if not given, 1e-10 for adagrad, 1e-6 for adopt and 1e-8 for others."""
    momentum: Annotated[float | None, BELOW_ONE, STEP_SIZE, taken("momentum", reason="{optimizer} has no momentum", instead=BETA)] = None
    """Heavy-ball momentum of sgd, and that of muon; if not given, 0 for sgd and 0.95 for muon."""
    optim_args: Annotated[tuple[str, ...], NAMED_VALUES, STEP_SIZE, Unused(lambda values: _without_args(values["optimizer"]))] = ()
    """NAME=VALUE: parameters of this optimizer alone, such as adjust of muon; paged=true keeps moments in the memory of the host."""
    master_dtype: Annotated[Literal["float32", "bfloat16"], KEPT, FEW] = "float32"
    """Dtype in which matrices that train are kept; bfloat16 halves their memory, and rounds updates up or down at random, without bias."""
    tf32: Annotated[bool, listed("says how CUDA multiplies float32 numbers", lasting=True)] = False
    """Round float32 numbers to TF32 (10 bits) where CUDA multiplies them, which is several times faster; from Ampere on."""
    deterministic: Annotated[bool, listed("says whether CUDA gives the same bits each time", lasting=True)] = False
    """Take those algorithms of CUDA that give the same bits each time, some of them slower, with a warning where there are none."""
    max_grad_norm: Annotated[float, NOT_NEGATIVE, STEP_SIZE] = 1.0
    """Clip the global gradient norm to this value; 0 disables clipping."""
    num_epochs: Annotated[int, COUNT, RUN_LENGTH] = 1
    """Passes over the training rows, unless max_steps is given."""
    max_steps: Annotated[int | None, COUNT, RUN_LENGTH] = None
    """Optimiser steps of the run, whatever num_epochs says."""
    micro_batch_size: Annotated[int, SMALL, STEP_ROWS] = 2
    """Documents (or, packed, sequence_len's worth of tokens) in one forward pass on one device."""
    gradient_accumulation_steps: Annotated[int, COUNT, STEP_ROWS] = 2
    """Micro-batches in one optimiser step on one device; the split never changes the gradient."""
    gradient_checkpointing: Annotated[Literal["none", "full", "selective", "offload"], RESOURCES, Switch("full", "none")] = "none"
    """Compute layers again in the backward pass: full, from their inputs; selective, all but matrix products and attention; offload, full
    with the inputs in host memory."""
    activation_offloading: Annotated[Literal["none", "cpu", "disk"], RESOURCES, Switch("cpu", "none")] = "none"
    """Where activations are until the backward pass reads them: on the device, in host memory (cpu), or in temporary files (disk)."""
    layer_offloading: Annotated[Literal["none", "cpu", "disk"], RESOURCES, Switch("cpu", "none"), Unused(_all_here)] = "none"
    """Where frozen layers are until they are computed with: on the device, in host memory (cpu), or in temporary files (disk)."""
    seed: Annotated[int, SEED, refused("decides order, rollouts and dropout; another value would read rows twice or never")] = 42
    """Random seed; all randomness of the run derives from it."""
    data_seed: Annotated[int | None, SEED, Unused(_unshuffled), refused("decides order; another value would read rows twice or never")] = (
        None
    )
    """Seed of the order of rows alone; seed if not given."""

    @property
    def remat(self) -> str | None:
        """What a training pass of a model keeps for its backward pass, as `core.grad.remat` takes it."""
        recompute = "full" if self.gradient_checkpointing == "offload" else self.gradient_checkpointing
        place = "cpu" if self.gradient_checkpointing == "offload" and self.activation_offloading == "none" else self.activation_offloading
        if place != "none":
            return f"{recompute}+{place}"
        return None if recompute == "none" else recompute


@dataclass(frozen=True)
class PreferenceOptim(OptimOptions):
    """Optimisation."""

    learning_rate: Annotated[float | None, POSITIVE, STEP_SIZE, peak(PREFERENCE_RATES)] = None


@dataclass(frozen=True)
class RewardOptim(OptimOptions):
    """Optimisation."""

    learning_rate: Annotated[float | None, POSITIVE, STEP_SIZE, peak(REWARD_RATES)] = None


@dataclass(frozen=True)
class RlOptim(OptimOptions):
    """Optimisation."""

    learning_rate: Annotated[float | None, POSITIVE, STEP_SIZE, peak(RL_RATES)] = None
    lr_scheduler: Annotated[str, SCHEDULE, STEP_SIZE] = "constant"
    """Shape of the learning rate after the warm-up, or a function of your own."""
    micro_batch_size: Annotated[int, SMALL, STEP_ROWS] = 2
    """Prompts, each with its completions, in one forward pass on one device."""


def offloading_notes(optim: OptimOptions, device: str) -> list[str]:
    """Lines about offloads that change nothing on a device of this type."""
    if device != "cpu":
        return []
    idle = {"activation": (optim.remat or "").endswith("+cpu"), "layer": optim.layer_offloading == "cpu"}
    reason = "the model is on the CPU, where they are in host memory already"
    return [f"{name}s: {reason}; --{name}-offloading disk writes them to files" for name, on in idle.items() if on]


# Parameters that `optim_args` sets: the range, the words to choose from, or bool.
ARGS: Mapping[str, Range | tuple[str, ...] | type[bool]] = {
    "paged": bool, "scale_parameter": bool, "adjust": ("match_rms_adamw", "original"),
    "rank": SMALL, "update_proj_gap": COUNT, "scale": POSITIVE, "proj_type": ("std", "reverse_std", "left", "right"),
    "scale_type": ("channel", "tensor"), "clip_threshold": POSITIVE, "decay_rate": Range(-10, 0, below=True),
}  # fmt: skip


def _without_args(optimizer: str) -> str:
    if optimizer in registry.OPTIMIZERS:
        return ""
    return "options of your own function go behind its name: FILE.py:FUNCTION?name=value"


def _own_args(optim: OptimOptions) -> dict[str, Any]:
    """The parameters in `optim_args`. Errors: ValueError for one that the optimizer does not take, or a value that it cannot use."""
    takes = registry.OPTIMIZERS[optim.optimizer].takes if optim.optimizer in registry.OPTIMIZERS else ()
    args, own = option_pairs.named_values(optim.optim_args, "optim-args"), [name for name in takes if name in ARGS]
    checks.check_named(args, "optim-args", optim.optimizer, own, ARGS)
    return args


def conflicts(optim: OptimOptions) -> None:
    """Raise ValueError for two ways of saying how long the warm-up is, and for what the optimizer or the schedule does not take."""
    _own_args(optim)
    schedule.conflicts(optim)


class Names(Protocol):
    """The names of what trains in one model."""

    def over_paths(self, rules: Sequence[tuple[str, float]], option: str) -> list[tuple[str, float]]:
        """The rules as rules over paths. Errors: ValueError for one that matches nothing."""
        ...

    def vocabulary(self) -> str:
        """A regular expression of what trains of the embedding and the head. Errors: ValueError where nothing does."""
        ...


def build(options: OptimOptions, names: Names | None = None, *, peak: float = 1.0, loraplus: float | None = None) -> "Optimizer":
    """The optimiser that the options name; LoRA+ is a learning-rate rule for the B side. Imports torch.

    names: of what trains; without them rules are over paths, and there is no embedding_lr, which is a part of the peak learning rate.
    """
    factors = option_pairs.rules(options.lr_rules, "lr-rules")
    if frozen := [regex for regex, factor in factors if not factor > 0]:
        raise ValueError(f"--lr-rules needs factors above 0, and {frozen[0]!r} has none; to leave weights as they are, do not target them")
    decays = option_pairs.rules(options.weight_decay_rules, "weight-decay-rules")
    if names is not None:
        factors, decays = names.over_paths(factors, "lr_rules"), names.over_paths(decays, "weight_decay_rules")
        if options.embedding_lr is not None:
            factors.append((names.vocabulary(), options.embedding_lr / peak))
    given = {"b2": options.adam_beta2, "eps": options.adam_epsilon, "momentum": options.momentum}
    values = {
        "b1": options.adam_beta1,
        "seed": options.seed,
        **{name: usual if given[name] is None else given[name] for name, usual in registry.left_open(options.optimizer).items()},
        "weight_decay": options.weight_decay,
        "decay": decays,
        "lr_scale": factors + ([(r"^lora\..*\.B$", loraplus)] if loraplus else []),
    }
    optimizer = registry.bind(registry.choose(registry.OPTIMIZERS, options.optimizer), **values, **_own_args(options))()
    if options.master_dtype == "float32":
        return optimizer
    from treetune.core import rounding

    return rounding.stochastic(optimizer, options.seed)
