"""What a batch of groups looks like, in the names of the documents; on the host, of this rank's groups.

P groups, G completions of each, K reward functions; R = P * G rows. nan: an opinion withheld, and a metric of which nothing was counted.
"""

from collections.abc import Sequence

import numpy as np

from treetune.core.rollout.group import Completion, Group, rewards_of


def metrics(groups: Sequence[Group], names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Rewards and lengths of scored groups. Every key is always there but `rewards/NAME/unknown`; nan where nothing was counted.

    reward, reward_std: over all rows, of the weighted sum of what the functions said. rewards/NAME/mean|std: of one function,
    rows without its opinion left out; rewards/NAME/unknown: their share, where there are any. Deviations have ddof 1.
    frac_reward_zero_std: share of groups whose weighted sums are all equal (or known for one completion at most), whatever scales
    the advantages. completions/{mean,min,max}_length: tokens, those of an environment included; _terminated_length: of completions
    that ended with a stop token; clipped_ratio: share of the others.
    Errors: ValueError when there is no group, one without rewards, or another number of names or weights than of functions.
    """
    _check(groups, names, weights)
    rows = np.concatenate([rewards_of(group) for group in groups])  # [R, K]
    total = [combined(rewards_of(group), weights) for group in groups]
    out = {"reward": mean(np.concatenate(total)), "reward_std": deviation(np.concatenate(total))}
    for name, column in zip(names, rows.T, strict=True):
        out |= {f"rewards/{name}/mean": mean(column), f"rewards/{name}/std": deviation(column)}
        if np.isnan(column).any():
            out[f"rewards/{name}/unknown"] = float(np.isnan(column).mean())
    out["frac_reward_zero_std"] = float(np.mean([flat(values) for values in total]))
    return out | _lengths([completion for group in groups for completion in group.completions])


def combined(rewards: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """[..., K] -> [...]: sum_k w_k R_k over the functions that have an opinion, nan where none has."""
    total = np.nansum(np.asarray(rewards, np.float64) * np.asarray(weights, np.float64), axis=-1)
    return np.where(np.isnan(rewards).all(axis=-1), np.nan, total)


def flat(values: np.ndarray) -> bool:
    """Whether the values that are known are all the same: a test of their range, which rounding cannot deceive."""
    finite = values[~np.isnan(values)]
    return finite.size < 2 or bool(finite.max() == finite.min())


def mean(values: np.ndarray) -> float:
    """Of the values that are not nan."""
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if finite.size else float("nan")


def deviation(values: np.ndarray) -> float:
    """Standard deviation (ddof 1) of the values that are not nan; exactly 0 where they are all equal, nan for fewer than two."""
    finite = values[~np.isnan(values)]
    if finite.size < 2:
        return float("nan")
    return 0.0 if flat(finite) else float(finite.std(ddof=1))


def _lengths(completions: Sequence[Completion]) -> dict[str, float]:
    lengths = np.array([len(completion.tokens) for completion in completions], np.float64)
    stopped = np.array([completion.stopped for completion in completions], bool)
    out = {}
    for kind, values_of_kind in (("length", lengths), ("terminated_length", lengths[stopped])):
        values = (values_of_kind.mean(), values_of_kind.min(), values_of_kind.max()) if values_of_kind.size else (float("nan"),) * 3
        out |= {f"completions/{how}_{kind}": float(value) for how, value in zip(("mean", "min", "max"), values, strict=True)}
    return out | {"completions/clipped_ratio": float(np.mean(~stopped))}


def _check(groups: Sequence[Group], names: Sequence[str], weights: Sequence[float]) -> None:
    if not groups or any(group.rewards is None for group in groups):
        raise ValueError(f"{len(groups)} groups, some maybe without rewards: expected at least one, all of them scored first")
    functions = {rewards_of(group).shape[-1] for group in groups}
    if functions != {len(names)} or len(weights) != len(names):
        raise ValueError(
            f"rewards of {sorted(functions)} functions with {len(names)} names and {len(weights)} weights: expected one of each"
        )
