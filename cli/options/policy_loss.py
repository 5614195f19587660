"""Options of the policy loss, and what its names stand for. Importing this imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from treetune.cli.errors import BadInput
from treetune.cli.options import import_path
from treetune.cli.options.import_path import door
from treetune.cli.options.marks import OBJECTIVE, Unused, Values, unused_if, unused_unless
from treetune.cli.options.ranges import BELOW_ONE, NOT_NEGATIVE, PART, POSITIVE


class Preset(NamedTuple):
    """What a name of `--loss` stands for; the options `advantage`, `importance_sampling_level` and `aggregate` override it."""

    term: str  # of losses.policy
    ratio: str = "token"
    aggregate: str = "token"
    advantage: str = "group_scaled"


PRESETS = {
    "dapo": Preset("ppo_clip"),
    "bnpo": Preset("ppo_clip"),
    "grpo": Preset("ppo_clip", aggregate="sequence"),
    "dr_grpo": Preset("ppo_clip", aggregate="constant", advantage="centered"),
    "gspo": Preset("ppo_clip", ratio="sequence", aggregate="sequence"),
    "luspo": Preset("ppo_clip", ratio="sequence", aggregate="sum"),
    "gdpo": Preset("ppo_clip", advantage="gdpo"),
    "rloo": Preset("ppo_clip", ratio="sequence_sum", aggregate="sequence", advantage="rloo"),
    "reinforce": Preset("reinforce", advantage="reinforce"),
    "cispo": Preset("cispo"),
    "sapo": Preset("sapo", aggregate="sequence"),
    "vespo": Preset("vespo"),
    "gmpo": Preset("gmpo", ratio="sequence", aggregate="sequence"),
}
GIVEN = ("ratio", "advantage", "logp", "log_ratio", "old_logp", "ref_logp", "correction", "seq", "seq_lens")  # of a policy term
POLICY_LOSS = door(PRESETS, "policy loss", *GIVEN, "epsilon", "epsilon_high", "delta")
ESTIMATORS = ("group_scaled", "centered", "batch_scaled", "gdpo", "rloo", "reinforce")
ADVANTAGE = door(ESTIMATORS, "advantage", "rewards", "weights")
ADAPTIVE = unused_unless("use_adaptive_entropy", reason="use_adaptive_entropy is off")


def preset(loss: str) -> Preset:
    """What a name stands for; a function of the user's own is a term on token ratios."""
    return PRESETS.get(loss) or Preset(loss)


def _clipped(option: str, *terms: str) -> Unused:
    """An option that bounds ratios, which only these terms look at, and functions with such a parameter."""

    def reason(values: Values) -> str:
        loss = values["loss"]
        taken = PRESETS[loss].term in terms if loss in PRESETS else import_path.takes(loss, option)
        return "" if taken else f"{loss} does not clip at it"

    return Unused(reason)


@dataclass(frozen=True)
class PolicyLoss:
    """Loss. The start of a run prints what a name stands for."""

    loss: Annotated[str, POLICY_LOSS, OBJECTIVE] = "dapo"
    """Method: what is clipped, what the loss is a mean over, and how rewards become advantages; docs/online.md has a table;
    or a function of your own."""
    advantage: Annotated[Annotated[str, ADVANTAGE] | None, OBJECTIVE] = None
    """How rewards become advantages, if not as the method says: less the mean of the prompt's completions and divided by their deviation
    (group_scaled), by that of the whole generation (batch_scaled), or by nothing (centered); each reward scaled on its own before they
    are added (gdpo); less the mean of the others (rloo); as they are (reinforce); or
    a function of your own."""
    aggregate: Annotated[Literal["token", "sequence", "constant", "sum"] | None, OBJECTIVE] = None
    """What the loss is a mean over, if not as the method says: tokens of the step, sequences of their token means, sequences of a
    constant length (max_completion_length), or sequences of their token sums."""
    importance_sampling_level: Annotated[
        Literal["token", "sequence", "sequence_token"] | None, OBJECTIVE, unused_if("loss", "reinforce", reason="reinforce has no ratios")
    ] = None
    """Ratios per token, or one per completion, of its mean log-ratio (sequence_token: that value with a gradient for each token), if not as
    the method says."""
    epsilon: Annotated[float | None, BELOW_ONE, OBJECTIVE, _clipped("epsilon", "ppo_clip", "gmpo")] = None
    """How far a ratio may fall below 1 before it is clipped, and rise above it unless epsilon_high says otherwise; if not given 0.2, gspo
    and luspo 3e-4, gmpo 0.4 (in log space)."""
    epsilon_high: Annotated[float | None, POSITIVE, OBJECTIVE, _clipped("epsilon_high", "ppo_clip", "gmpo", "cispo")] = None
    """How far a ratio may rise above 1; if not given as epsilon, and if neither is, dapo 0.28, gspo and luspo 4e-4. For cispo the largest
    ratio itself, which must be given (5 is usual)."""
    delta: Annotated[float | None, POSITIVE, OBJECTIVE, _clipped("delta", "ppo_clip")] = None
    """Upper bound of the ratio of completions with a negative advantage (two-sided clipping); above 1 + epsilon_high."""
    sapo_tau_pos: Annotated[float, POSITIVE, OBJECTIVE, unused_unless("loss", "sapo", reason="the loss is {loss}")] = 1.0
    """sapo: temperature of the gate where the advantage is positive."""
    sapo_tau_neg: Annotated[float, POSITIVE, OBJECTIVE, unused_unless("loss", "sapo", reason="the loss is {loss}")] = 1.05
    """sapo: temperature of the gate where it is not."""
    beta: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Weight of the divergence from the reference; 0 needs no reference."""
    kl_estimator: Annotated[Literal["k1", "k2", "k3"], OBJECTIVE, unused_unless("beta", reason="beta is 0")] = "k3"
    """Estimator of that divergence per token."""
    use_bias_correction_kl: Annotated[bool, OBJECTIVE, unused_unless("beta", reason="beta is 0")] = True
    """Multiply it by the ratio, which makes its gradient that of the reverse divergence."""
    entropy_coef: Annotated[float, NOT_NEGATIVE, OBJECTIVE] = 0.0
    """Weight of the entropy bonus."""
    use_adaptive_entropy: Annotated[bool, OBJECTIVE] = False
    """Raise and lower the weight of the bonus, starting at entropy_coef, to hold the entropy at its target."""
    entropy_target: Annotated[float, NOT_NEGATIVE, OBJECTIVE, ADAPTIVE] = 0.2
    """Target of the adaptive bonus (nats per token)."""
    entropy_coef_delta: Annotated[float, NOT_NEGATIVE, OBJECTIVE, ADAPTIVE] = 0.005
    """Change of its weight per step."""
    entropy_coef_max: Annotated[float, NOT_NEGATIVE, OBJECTIVE, ADAPTIVE] = 1.0
    """Its largest weight."""
    top_entropy_quantile: Annotated[float, PART, OBJECTIVE] = 1.0
    """Train only on this part of the tokens, those of the highest entropy; 1 for all."""
    mask_truncated_completions: Annotated[bool, OBJECTIVE] = False
    """Do not train on completions that were cut off at max_completion_length."""


EPSILON = {"gspo": (3e-4, 4e-4), "luspo": (3e-4, 4e-4), "gmpo": (0.4, 0.4), "dapo": (0.2, 0.28)}  # low and high, where not 0.2


def clip_bounds(options: PolicyLoss) -> tuple[float, float]:
    """How far a ratio may fall below and rise above 1."""
    low, high = EPSILON.get(options.loss, (0.2, 0.2))
    if options.epsilon is not None:
        low = high = options.epsilon
    return low, options.epsilon_high if options.epsilon_high is not None else high


def conflicts(loss: PolicyLoss) -> None:
    """Raise BadInput for bounds that a loss cannot have."""
    if loss.loss == "cispo" and loss.epsilon_high is None:
        raise BadInput("cispo needs epsilon_high, the largest ratio itself: 5 is usual")
    if loss.loss == "cispo" and loss.epsilon_high is not None and loss.epsilon_high < 1:
        raise BadInput(f"epsilon_high is the largest ratio itself for cispo, at least 1 (5 is usual), got {loss.epsilon_high}")
    if loss.loss in ("gmpo", "vespo") and loss.importance_sampling_level:
        raise BadInput(f"{loss.loss} has ratios of its own: leave out importance_sampling_level")
    high = clip_bounds(loss)[1]
    if loss.delta is not None and loss.delta <= 1 + high:
        raise BadInput(f"delta must be above 1 + epsilon_high = {1 + high:g}, got {loss.delta:g}")
