"""The rewards of a run: functions in worker processes and reward models, their names and weights, and what scores with them.

P prompts, G completions of each, K rewards.
"""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from treetune.core.data import sources
from treetune.core.data.prompts import Prompt
from treetune.core.rollout import builtin, reward_models, stats
from treetune.core.rollout.group import Group, GroupScorer
from treetune.core.rollout.reward_models import RewardModel
from treetune.core.rollout.reward_pool import Pool


class Rewards(NamedTuple):
    """What scores completions: K names and weights, a text about each, and calls.

    score: float64 [P, G, K]. measure: metrics of scored groups. check: ValueError for prompts that nothing can score. close: ends what
    was started. models: fingerprints of the weights of reward models. files: functions, as the user named them.
    """

    names: tuple[str, ...]
    weights: list[float]
    described: list[str]
    score: GroupScorer
    measure: Callable[[Sequence[Group]], dict[str, float]]
    check: Callable[[Sequence[Prompt]], None] = lambda prompts: None
    close: Callable[[], None] = lambda: None
    models: dict[str, str] = {}
    files: tuple[str, ...] = ()


class PoolSettings(NamedTuple):
    """Worker processes of reward functions, and the seconds that a call may take (see `reward_pool.Pool`)."""

    workers: int = 1
    timeout_s: float = 30.0


def start(
    wanted: Sequence[str],
    reward_weights: Sequence[float],
    *,
    load_model: Callable[[str], RewardModel],
    pool: PoolSettings,
    say: Callable[[str], None],
    on_one: Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]] = lambda call: call,
) -> Rewards:
    """Load the models among the rewards, and start the workers of the functions. Errors: ValueError for what cannot be loaded.

    on_one: what calls a function on one of the ranks that have the same rows, for all of them.
    """
    factors = weights(wanted, reward_weights)
    check_names(wanted)
    models = {name: load_model(name) for name in wanted if is_model(name)}
    functions = [name for name in wanted if name not in models]
    workers = Pool(functions, workers=pool.workers, timeout_s=pool.timeout_s, say=say) if functions else None

    def score(groups: Sequence[Group], /) -> np.ndarray:
        # All ranks compute a model, of which each may have a part.
        scores = {name: reward_models.score(model, groups) for name, model in models.items()}

        def stack() -> np.ndarray:
            values = None if workers is None else workers.score(groups)
            columns = scores if values is None else scores | {name: values[:, :, k] for k, name in enumerate(functions)}
            return np.stack([columns[name] for name in wanted], axis=-1)

        return on_one(stack)()

    short = names(wanted)
    measure = partial(stats.metrics, names=short, weights=factors)
    digests = {f"reward model {name}": model.digest for name, model in models.items()}
    rewards = Rewards(short, factors, describe(wanted, factors), score, measure, models=digests, files=tuple(functions))
    return rewards if workers is None else rewards._replace(check=workers.check, close=workers.close)


def check_names(reward_funcs: Sequence[str]) -> None:
    """Errors: ValueError for no reward, or one that comes twice."""
    if not reward_funcs or len(set(reward_funcs)) != len(reward_funcs):
        raise ValueError(f"reward_funcs is {sources.join_names(reward_funcs)}: expected at least one reward, and none twice")


def describe(reward_funcs: Sequence[str], factors: Sequence[float]) -> list[str]:
    """Each reward with its weight."""
    return [f"{name} x {weight:g}" if weight != 1 else name for name, weight in zip(reward_funcs, factors, strict=True)]


def names(reward_funcs: Sequence[str]) -> tuple[str, ...]:
    """How metrics and the screen name the rewards: by the function alone, or the whole name where two would be the same."""
    short = [Path(name).name if is_model(name) else re.split(r"[:./]", name.split("?")[0].rstrip("/"))[-1] for name in reward_funcs]
    return tuple(one if short.count(one) == 1 else full for one, full in zip(short, reward_funcs, strict=True))


def weights(reward_funcs: Sequence[str], reward_weights: Sequence[float]) -> list[float]:
    """A weight for each reward, 1 each if none is given. Errors: ValueError for another number of them, or one that is not finite."""
    if wrong := [weight for weight in reward_weights if not math.isfinite(weight)]:
        raise ValueError(f"reward_weights has {wrong[0]}, expected finite numbers")
    if reward_weights and len(reward_weights) != len(reward_funcs):
        raise ValueError(f"reward_weights has {len(reward_weights)} numbers for {len(reward_funcs)} rewards; give one for each")
    return list(reward_weights) or [1.0] * len(reward_funcs)


def is_model(name: str) -> bool:
    """Whether a reward is a model: a folder that has no built-in's name, or an id owner/name that is no file."""
    if name.split("?")[0] in builtin.BUILTIN:
        return False
    return Path(name).is_dir() or (sources.HUB_ID.fullmatch(name) is not None and ":" not in name and not name.endswith(".py"))
