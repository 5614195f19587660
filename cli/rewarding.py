"""The rewards that the options name, with the models among them loaded, and how rewards become advantages.

P prompts, G completions of each, K rewards.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from treetune.cli import setup
from treetune.cli.options.model import ModelOptions
from treetune.cli.options.rollout import RewardFunctions
from treetune.core import ckpt
from treetune.core.data import fingerprint, scored_rows
from treetune.core.rollout import rewards
from treetune.core.rollout.reward_models import RewardModel
from treetune.core.rollout.rewards import Rewards
from treetune.models import adapter, fetch, heads, identity, reward_model

__all__ = ["Rewards", "names", "start", "weights"]


def names(options: RewardFunctions) -> tuple[str, ...]:
    """The names of the rewards in metrics."""
    return rewards.names(options.reward_funcs)


def weights(options: RewardFunctions) -> list[float]:
    """A weight for each reward."""
    return rewards.weights(options.reward_funcs, options.reward_weights)


def start(options: RewardFunctions, model: ModelOptions, *, on: torch.device, say: Callable[[str], None]) -> Rewards:
    """Load every reward and start the workers. Errors: ValueError for rewards that cannot be loaded."""
    weights(options)
    rewards.check_names(options.reward_funcs)
    models = {name: _model(name, model, on) for name in options.reward_funcs if rewards.is_model(name)}
    pool = rewards.PoolSettings(options.reward_num_workers, options.reward_timeout)
    return rewards.start(options.reward_funcs, options.reward_weights, models=models, pool=pool, say=say)


def _model(name: str, model: ModelOptions, device: torch.device) -> RewardModel:
    path = name if (setup.adapter_folder(name) / adapter.CONFIG).is_file() else None
    inside = Path(name) / "model"
    base = adapter.base_of(setup.adapter_folder(name)) if path else str(inside) if (inside / "config.json").is_file() else name
    options = ModelOptions(model=base, dtype=model.dtype, device=model.device)
    tokenizer = setup.load_tokenizer(options, path)
    if path is None and heads.kind(fetch.resolve(base)) is None:
        raise ValueError(f"reward {name} is a model without a head that scores: expected a reward model, or module.function")
    judge = reward_model.load(base, adapter_path=path, dtype=model.dtype, device=device)
    forward = partial(reward_model.scores, judge, device=device)
    scores = partial(scored_rows.score_batch, forward=forward, read=reward_model.READ[judge.kind])
    return RewardModel(scores, tokenizer, judge.kind == "token", _digest(judge))


def _digest(judge: reward_model.RewardModel) -> str:
    adapted = {} if judge.lora is None else {"lora": judge.lora.tree}
    return fingerprint.values(
        ckpt.leaf_digest({"model": judge.model.params, "head": judge.head} | adapted),
        judge.lora and judge.lora.scale,
        identity.settings(judge.model.family, judge.model.cfg),
    )
