"""Names of losses, ratios, aggregates, advantages, divergences and corrections: which function each stands for. Imports no torch.

A function is given by its import path; `core.registry.bind` imports it. `takes` names its keyword-only parameters that options set.
A new loss is one function and one row here; tests/losses/test_presets.py holds every row to its function.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from treetune.core.registry import Entry, keywords


class PolicyPreset(NamedTuple):
    """A policy loss by name: its term, and how ratios, means and advantages go with it unless they are chosen.

    function, takes: the term. report: function of what only this term reports. ratio, aggregate, advantage: keys of the tables below.
    epsilon: how far a ratio may fall below and rise above 1 before the term clips it.
    """

    function: str | Callable[..., Any]
    takes: tuple[str, ...] = ()
    report: str | None = None
    ratio: str = "token"
    aggregate: str = "token"
    advantage: str = "group_scaled"
    epsilon: tuple[float, float] = (0.2, 0.2)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "PolicyPreset":
        """The row of a function; its keyword-only parameters are what it takes."""
        return cls(function, keywords(function))

    @property
    def term(self) -> str:
        """The function's own name."""
        return self.function.rpartition(".")[2] if isinstance(self.function, str) else getattr(self.function, "__name__", "function")


class AdvantageEntry(NamedTuple):
    """per_reward: takes the rewards of each function apart."""

    function: str | Callable[..., Any]
    per_reward: bool = False

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "AdvantageEntry":
        """The row of a function: it takes the rewards of each apart where it has the parameter `weights`, and may look at all prompts."""
        return cls(function, "weights" in inspect.signature(function).parameters)


class KtoEntry(NamedTuple):
    """scalar: the key of the batch whose value of the step the loss takes after `desirable`; None for none."""

    function: str | Callable[..., Any]
    takes: tuple[str, ...] = ()
    scalar: str | None = None

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "KtoEntry":
        """The row of a function; its keyword-only parameters are what it takes."""
        parameters = inspect.signature(function).parameters
        return cls(function, keywords(function), next((name for name in ("baseline", "delta") if name in parameters), None))


_PPO = PolicyPreset(
    "treetune.losses.policy.ppo_clip", ("epsilon", "epsilon_high", "delta"), report="treetune.losses.policy_gradient.clip_ratio"
)
POLICY_LOSSES = {
    "dapo": _PPO._replace(epsilon=(0.2, 0.28)),
    "bnpo": _PPO,
    "grpo": _PPO._replace(aggregate="sequence"),
    "dr_grpo": _PPO._replace(aggregate="constant", advantage="centered"),
    "gspo": _PPO._replace(ratio="sequence", aggregate="sequence", epsilon=(3e-4, 4e-4)),
    "luspo": _PPO._replace(ratio="sequence", aggregate="sum", epsilon=(3e-4, 4e-4)),
    "gdpo": _PPO._replace(advantage="gdpo"),
    "rloo": _PPO._replace(ratio="sequence_sum", aggregate="sequence", advantage="rloo"),
    "reinforce": PolicyPreset("treetune.losses.policy.reinforce", advantage="reinforce"),
    "cispo": PolicyPreset("treetune.losses.policy.cispo", ("epsilon_high",), report="treetune.losses.policy_gradient.cispo_clip_ratio"),
    "sapo": PolicyPreset("treetune.losses.policy.sapo", ("tau_pos", "tau_neg"), aggregate="sequence"),
    "vespo": PolicyPreset("treetune.losses.policy.vespo", report="treetune.losses.policy_gradient.vespo_phi"),
    "gmpo": PolicyPreset(
        "treetune.losses.policy.gmpo", ("epsilon", "epsilon_high"), ratio="sequence", aggregate="sequence", epsilon=(0.4, 0.4)
    ),
}
RATIOS = {
    "token": Entry("treetune.losses.ratio.token"),
    "sequence": Entry("treetune.losses.ratio.sequence"),
    "sequence_token": Entry("treetune.losses.ratio.sequence_token"),
    "sequence_sum": Entry("treetune.losses.ratio.sequence_sum"),
}
ONE_RATIO_PER_SEQUENCE = ("sequence", "sequence_sum")
AGGREGATES = {
    "token": Entry("treetune.losses.reduce.by_token"),
    "sequence": Entry("treetune.losses.reduce.by_sequence", ("count_empty",)),
    "constant": Entry("treetune.losses.reduce.by_constant", ("length",)),
    "sum": Entry("treetune.losses.reduce.by_sum"),
}
ADVANTAGES = {
    "group_scaled": AdvantageEntry("treetune.losses.advantage.group_scaled"),
    "centered": AdvantageEntry("treetune.losses.advantage.centered"),
    "batch_scaled": AdvantageEntry("treetune.losses.advantage.batch_scaled"),
    "gdpo": AdvantageEntry("treetune.losses.advantage.gdpo", per_reward=True),
    "rloo": AdvantageEntry("treetune.losses.advantage.rloo"),
    "reinforce": AdvantageEntry("treetune.losses.advantage.reinforce"),
}
DIVERGENCES = {
    "k1": Entry("treetune.losses.divergence.k1"),
    "k2": Entry("treetune.losses.divergence.k2"),
    "k3": Entry("treetune.losses.divergence.k3"),
}
CORRECTIONS = {
    "token_truncate": Entry("treetune.losses.correction.token_truncate", ("low", "high")),
    "token_mask": Entry("treetune.losses.correction.token_mask", ("low", "high")),
    "sequence_truncate": Entry("treetune.losses.correction.sequence_truncate", ("low", "high")),
    "sequence_mask": Entry("treetune.losses.correction.sequence_mask", ("low", "high")),
}

# Losses of pairs that are held to a reference. `label_smoothing`: the share of flipped labels; `score`: what a log-ratio counts as.
PAIR_LOSSES = {
    "dpo": Entry("treetune.losses.preference.dpo", ("beta", "score")),
    "ipo": Entry("treetune.losses.preference.ipo", ("beta", "score")),
    "hinge": Entry("treetune.losses.preference.hinge", ("beta", "score")),
    "cdpo": Entry("treetune.losses.preference.cdpo", ("beta", "label_smoothing", "score")),
    "robust": Entry("treetune.losses.preference.robust", ("beta", "label_smoothing", "score")),
    "exo": Entry("treetune.losses.preference.exo", ("beta", "label_smoothing", "score")),
    "nca": Entry("treetune.losses.preference.nca", ("beta",)),
    "bco_pair": Entry("treetune.losses.preference.bco_pair", ("beta",)),
    "sppo_hard": Entry("treetune.losses.preference.sppo_hard", ("beta",)),
    "aot": Entry("treetune.losses.preference.aot", ("beta", "label_smoothing")),
    "aot_unpaired": Entry("treetune.losses.preference.aot_unpaired", ("beta", "label_smoothing")),
    "apo_zero": Entry("treetune.losses.preference.apo_zero", ("beta",)),
    "apo_down": Entry("treetune.losses.preference.apo_down", ("beta",)),
    "discopop": Entry("treetune.losses.preference.discopop", ("beta", "tau", "score")),
    "dpo_norm": Entry("treetune.losses.preference.dpo_norm", ("beta", "score")),
}
PAIR_SCORES = {
    "reverse_kl": Entry("treetune.losses.preference.reverse_kl"),
    "forward_kl": Entry("treetune.losses.preference.forward_kl"),
    "js": Entry("treetune.losses.preference.js"),
    "alpha": Entry("treetune.losses.preference.alpha_divergence", ("alpha",)),
}
CPO_LOSSES = {
    "cpo": Entry("treetune.losses.reference_free.cpo", ("beta", "label_smoothing")),
    "hinge": Entry("treetune.losses.reference_free.cpo_hinge", ("beta",)),
    "ipo": Entry("treetune.losses.reference_free.cpo_ipo", ("beta",)),
}
KTO_LOSSES = {
    "kto": KtoEntry("treetune.losses.kto.kto", ("beta", "desirable_weight", "undesirable_weight"), scalar="baseline"),
    "apo_zero_unpaired": KtoEntry("treetune.losses.kto.apo_zero_unpaired", ("beta", "desirable_weight", "undesirable_weight")),
    "bco": KtoEntry("treetune.losses.kto.bco", ("beta",), scalar="delta"),
}
TOKEN_LOSSES = {
    "nll": Entry("treetune.losses.sft.nll"),
    "smoothed": Entry("treetune.losses.sft.smoothed", ("label_smoothing",)),
    "dft": Entry("treetune.losses.sft.dft"),
    "eaft": Entry("treetune.losses.sft.eaft", ("alpha",)),
}


def clip_bounds(preset: PolicyPreset, epsilon: float | None = None, epsilon_high: float | None = None) -> tuple[float, float]:
    """How far a ratio may fall below and rise above 1: `epsilon` on both sides, unless `epsilon_high` is given; None: the preset's own."""
    low, high = preset.epsilon if epsilon is None else (epsilon, epsilon)
    return low, high if epsilon_high is None else epsilon_high
