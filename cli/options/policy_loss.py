"""Options of the policy loss, and what its names stand for. Importing this imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from treetune.cli.options.doors import door
from treetune.core.config.doors import unused_unless_taken
from treetune.core.config.marks import OBJECTIVE, Unused, unused_if, unused_unless
from treetune.core.config.ranges import BELOW_ONE, NOT_NEGATIVE, PART, POSITIVE
from treetune.losses import presets

GIVEN = ("ratio", "advantage", "logp", "log_ratio", "old_logp", "seq", "seq_lens", "ref_logp", "correction")  # of a policy term
BOUNDS = ("epsilon", "epsilon_high", "delta")
POLICY_LOSS = door(presets.POLICY_LOSSES, "policy loss", *GIVEN, *BOUNDS, "tau_pos", "tau_neg")
ADVANTAGE = door(presets.ADVANTAGES, "advantage", "rewards", "weights")
ADAPTIVE = unused_unless("use_adaptive_entropy", reason="use_adaptive_entropy is off")


def preset(loss: str) -> presets.PolicyPreset:
    """What a name stands for; a function of the user's own is a term on token ratios."""
    return presets.POLICY_LOSSES.get(loss) or presets.PolicyPreset(loss)


def _taken(parameter: str, reason: str) -> Unused:
    """An option that only the losses with this parameter look at."""
    return unused_unless_taken("loss", presets.POLICY_LOSSES, parameter, reason=reason)


@dataclass(frozen=True)
class PolicyLoss:
    """Loss. The start of a run prints what a name stands for."""

    loss: Annotated[str, POLICY_LOSS, OBJECTIVE] = "dapo"
    """Method: what is clipped, what the loss is a mean over, and how rewards become advantages; docs/online.md has a table.
    Or a function of your own, as the term of a token."""
    advantage: Annotated[Annotated[str, ADVANTAGE] | None, OBJECTIVE] = None
    """How rewards become advantages, if not as the method says: less the mean of the prompt's completions and divided by their deviation
    (group_scaled), by that of the whole generation (batch_scaled), or by nothing (centered); each reward scaled on its own before they
    are added (gdpo); less the mean of the others (rloo); as they are (reinforce);
    or as a function of your own says."""
    aggregate: Annotated[Literal["token", "sequence", "constant", "sum"] | None, OBJECTIVE] = None
    """What the loss is a mean over, if not as the method says: tokens of the step, sequences of their token means, sequences of a
    constant length (max_completion_length), or sequences of their token sums."""
    importance_sampling_level: Annotated[
        Literal["token", "sequence", "sequence_token"] | None, OBJECTIVE, unused_if("loss", "reinforce", reason="reinforce has no ratios")
    ] = None
    """Ratios per token, or one per completion, of its mean log-ratio (sequence_token: that value with a gradient for each token), if not as
    the method says."""
    epsilon: Annotated[float | None, BELOW_ONE, OBJECTIVE, _taken("epsilon", "{loss} does not clip at it")] = None
    """How far a ratio may fall below 1 before it is clipped, and rise above it unless epsilon_high says otherwise; if not given 0.2, gspo
    and luspo 3e-4, gmpo 0.4 (in log space)."""
    epsilon_high: Annotated[float | None, POSITIVE, OBJECTIVE, _taken("epsilon_high", "{loss} does not clip at it")] = None
    """How far a ratio may rise above 1; if not given as epsilon, and if neither is, dapo 0.28, gspo and luspo 4e-4. For cispo the largest
    ratio itself, which must be given (5 is usual)."""
    delta: Annotated[float | None, POSITIVE, OBJECTIVE, _taken("delta", "{loss} does not clip at it")] = None
    """Upper bound of the ratio of completions with a negative advantage (two-sided clipping); above 1 + epsilon_high."""
    sapo_tau_pos: Annotated[float, POSITIVE, OBJECTIVE, _taken("tau_pos", "the loss is {loss}")] = 1.0
    """sapo: temperature of the gate where the advantage is positive."""
    sapo_tau_neg: Annotated[float, POSITIVE, OBJECTIVE, _taken("tau_neg", "the loss is {loss}")] = 1.05
    """sapo: temperature of the gate where it is not."""
    beta: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Weight of the divergence from the reference; 0 needs no reference."""
    kl_estimator: Annotated[Literal["k1", "k2", "k3"], OBJECTIVE, unused_unless("beta", reason="beta is 0")] = "k3"
    """Estimator of the divergence per token."""
    use_bias_correction_kl: Annotated[bool, OBJECTIVE, unused_unless("beta", reason="beta is 0")] = True
    """Multiply the divergence by the ratio, so that its gradient is that of the reverse divergence."""
    entropy_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Weight of the entropy bonus."""
    use_adaptive_entropy: Annotated[bool, OBJECTIVE] = False
    """Adapt the weight of the entropy bonus, starting at entropy_coef, to hold the entropy at entropy_target."""
    entropy_target: Annotated[float, NOT_NEGATIVE, OBJECTIVE, ADAPTIVE] = 0.2
    """Target entropy of the adaptive bonus (nats per token)."""
    entropy_coef_delta: Annotated[float, NOT_NEGATIVE, OBJECTIVE, ADAPTIVE] = 0.005
    """Step size of the adaptive entropy coefficient."""
    entropy_coef_max: Annotated[float, NOT_NEGATIVE, OBJECTIVE, ADAPTIVE] = 1.0
    """Upper bound of the adaptive entropy coefficient."""
    top_entropy_quantile: Annotated[float, PART, OBJECTIVE] = 1.0
    """Fraction of the tokens to train on, those of the highest entropy; 1 for all."""
    mask_truncated_completions: Annotated[bool, OBJECTIVE] = False
    """Do not train on completions that were cut off at max_completion_length."""


@dataclass(frozen=True)
class RoutedPolicyLoss(PolicyLoss):
    """Loss. The start of a run prints what a name stands for."""

    router_aux_loss_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Experts: weight of the load-balancing loss, within each completion, averaged over layers and its tokens; 0.001 is usual."""
    router_z_loss_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Experts: weight of the routers' squared log-normaliser, averaged likewise; 0.001 is usual."""


def clip_bounds(options: PolicyLoss) -> tuple[float, float]:
    """How far a ratio may fall below and rise above 1."""
    return presets.clip_bounds(preset(options.loss), options.epsilon, options.epsilon_high)


def skippable(options: PolicyLoss) -> bool:
    """Whether a completion of advantage 0 trains nothing at all, and no threshold counts its tokens."""
    bonus = options.entropy_coef or options.use_adaptive_entropy
    routers = isinstance(options, RoutedPolicyLoss) and (options.router_aux_loss_coef or options.router_z_loss_coef)
    return not options.beta and not bonus and not routers and options.top_entropy_quantile == 1


def conflicts(loss: PolicyLoss) -> None:
    """Raise ValueError for bounds that a loss cannot have."""
    if loss.loss == "cispo" and loss.epsilon_high is None:
        raise ValueError("cispo needs epsilon_high, the largest ratio itself: 5 is usual")
    if loss.loss == "cispo" and loss.epsilon_high is not None and loss.epsilon_high < 1:
        raise ValueError(f"epsilon_high is the largest ratio itself for cispo, at least 1 (5 is usual), got {loss.epsilon_high}")
    if loss.loss in ("gmpo", "vespo") and loss.importance_sampling_level:
        raise ValueError(f"{loss.loss} has ratios of its own: leave out importance_sampling_level")
    high = clip_bounds(loss)[1]
    if loss.delta is not None and loss.delta <= 1 + high:
        raise ValueError(f"delta must be above 1 + epsilon_high = {1 + high:g}, got {loss.delta:g}")
