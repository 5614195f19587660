"""The rewards that options name: functions in worker processes, and models."""

from collections.abc import Callable
from functools import partial

import torch

from treetune.cli.options.model import ModelOptions
from treetune.cli.options.rollout import RewardFunctions
from treetune.core.rollout import reward_models, rewards
from treetune.core.rollout.rewards import Rewards
from treetune.models import reward_model

Say = Callable[[str], None]


def start(options: RewardFunctions, model: ModelOptions, *, device: torch.device, say: Say, warn: Say) -> Rewards:
    """Load every reward and start the workers. Errors: ValueError for rewards that cannot be loaded."""

    def load_model(name: str) -> reward_models.RewardModel:
        judge, tokenizer = reward_model.load_judge(name, dtype=model.dtype, device=device, say=say)
        forward, read = partial(reward_model.scores, judge, device=device), reward_model.READ[judge.kind]
        return reward_models.of_head(forward, tokenizer, read=read, weights=judge.weights, settings=judge.settings)

    pool = rewards.PoolSettings(options.reward_num_workers, options.reward_timeout)
    return rewards.start(options.reward_funcs, options.reward_weights, load_model=load_model, pool=pool, say=warn)
