"""Options of the preference and reward methods: their losses and their reference. Importing this imports no torch.

Names are those of the documents (`rl_beta`, `dpo_label_smoothing`, ...); LOSSES maps the losses' names in other tools to ours.
"""

from dataclasses import dataclass
from typing import Literal

from treetune.cli.options.shared import OptimOptions

LOSSES = {
    "sigmoid": "dpo", "exo_pair": "exo", "nca_pair": "nca", "sigmoid_norm": "dpo_norm",
    "kto_pair": "apo_zero_unpaired", "js_divergence": "js", "alpha_divergence": "alpha",
}  # fmt: skip

SMOOTHED = ("cdpo", "robust", "exo", "aot", "aot_unpaired")  # losses that take label smoothing
SCORED = ("dpo", "cdpo", "ipo", "hinge", "exo", "robust", "discopop", "dpo_norm")  # losses that other divergences fit

PairLoss = Literal[
    "dpo", "ipo", "hinge", "cdpo", "robust", "exo", "nca", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
    "discopop", "dpo_norm", "sft", "sigmoid", "exo_pair", "nca_pair", "sigmoid_norm",
]  # fmt: skip


@dataclass(frozen=True)
class ReferenceOptions:
    """Reference: what the policy is held to; unless said otherwise the model as the run starts, with the adapter it starts from."""

    ref_model: str | None = None
    """Another model as the reference: folder, .gguf file, known name or Hugging Face id, with the same vocabulary."""
    precompute_ref_logps: bool = False
    """Compute the reference's log-probs once before training, instead of at every step; with dataset_prepared_path they are kept."""
    sync_ref_model: bool = False
    """Let the reference follow the policy (TR-DPO)."""
    ref_model_sync_steps: int = 512
    """Steps between two syncs."""
    ref_model_mixup_alpha: float = 0.6
    """Part of the policy in the new reference; 1 copies it. An adapter can only be copied."""


@dataclass(frozen=True)
class DpoLoss:
    """Loss."""

    loss: tuple[PairLoss, ...] = ("dpo",)
    """Loss of a pair: dpo, ipo, hinge, robust, ...; several are summed. sft is the chosen side's mean negative log-likelihood.
    aot and aot_unpaired rank the pairs of a micro-batch, so they alone depend on micro_batch_size."""
    loss_weights: tuple[float, ...] = ()
    """A weight for each loss; 1 each if not given."""
    rl_beta: float = 0.1
    """How strongly the policy is held to the reference."""
    dpo_label_smoothing: float = 0.0
    """Share of labels taken to be wrong (cdpo, robust, exo, aot)."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence from the reference that log-ratios stand for."""
    f_alpha_divergence_coef: float = 0.5
    """Order of the alpha divergence."""
    discopop_tau: float = 0.05
    """Temperature of discopop's mixture."""
    ld_alpha: float | None = None
    """LD-DPO: weight, from 0 to 1, of the tokens of the longer side beyond the shorter one's length."""
    dpo_use_weighting: bool = False
    """WPO: weigh pairs by how likely the policy is to write them."""
    rpo_alpha: float | None = None
    """Add the chosen side's mean negative log-likelihood times this."""


@dataclass(frozen=True)
class KtoLoss:
    """Loss."""

    loss: Literal["kto", "apo_zero_unpaired", "bco"] = "kto"
    """Loss of a judged completion: kto; apo_zero_unpaired, which has no baseline; bco, whose baseline is the mean reward so far."""
    rl_beta: float = 0.1
    """How strongly the policy is held to the reference."""
    kto_desirable_weight: float = 1.0
    """Weight of good completions; this times their number over the same for bad ones is best between 1 and 4/3."""
    kto_undesirable_weight: float = 1.0
    """Weight of bad completions."""


@dataclass(frozen=True)
class OrpoLoss:
    """Loss."""

    orpo_alpha: float = 0.1
    """Weight of the odds-ratio term beside the negative log-likelihood."""
    orpo_nll_scope: Literal["full", "completion"] = "full"
    """Tokens of the likelihood term: prompt and chosen completion, as in the paper, or the completion alone."""


@dataclass(frozen=True)
class SimpoLoss:
    """Loss."""

    rl_beta: float = 2.0
    """Scale of the mean log-prob per token; the paper uses 2 to 10."""
    simpo_gamma: float = 0.5
    """Margin that chosen must have over rejected, in units of the scaled reward."""
    simpo_alpha: float = 0.0
    """AlphaPO: bends the reward, (1 - p^-alpha) / alpha in place of log p; 0 is SimPO."""
    cpo_alpha: float = 0.0
    """Add the chosen side's mean negative log-likelihood times this."""


@dataclass(frozen=True)
class CpoLoss:
    """Loss."""

    loss: Literal["cpo", "hinge", "ipo", "sigmoid"] = "cpo"
    """Loss of a pair, without a reference."""
    rl_beta: float = 0.1
    """Scale of the summed log-probs."""
    cpo_alpha: float = 1.0
    """Weight of the chosen side's mean negative log-likelihood."""
    dpo_label_smoothing: float = 0.0
    """Share of labels taken to be wrong (cpo only)."""


@dataclass(frozen=True)
class RewardLoss:
    """Loss."""

    center_rewards_coefficient: float = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores around 0; 0.01 is usual."""


@dataclass(frozen=True)
class PreferenceOptim(OptimOptions):
    """Optimisation."""

    learning_rate: float | None = None
    """Peak learning rate; if not given, 5e-5 with an adapter and 1e-6 without."""


@dataclass(frozen=True)
class RewardOptim(OptimOptions):
    """Optimisation."""

    learning_rate: float | None = None
    """Peak learning rate; if not given, 1e-4 with an adapter and 1e-5 without."""
