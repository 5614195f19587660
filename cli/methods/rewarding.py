"""The rewards that options name: functions in worker processes, and models."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from treetune.cli.options.model import ModelOptions
from treetune.cli.options.rollout import RewardFunctions
from treetune.core.partition import Partition
from treetune.core.rollout import reward_models, rewards
from treetune.core.rollout.rewards import Rewards
from treetune.core.run import ranks
from treetune.core.run.ranks import ALONE, Ranks
from treetune.models import reward_model, together

Say = Callable[[str], None]


class Place(NamedTuple):
    """Where models score: on a device, among ranks of which each may have a part of them."""

    device: torch.device
    ranks: Ranks = ALONE
    home: Partition | None = None


def start(options: RewardFunctions, model: ModelOptions, place: Place, *, say: Say, warn: Say) -> Rewards:
    """Load every reward and start the workers. Errors: ValueError for rewards that cannot be loaded."""

    def load_model(name: str) -> reward_models.RewardModel:
        judge, tokenizer = reward_model.load_judge(name, dtype=model.dtype, device=place.device, home=place.home, say=say)
        forward, read = partial(reward_model.scores, judge, device=place.device), reward_model.READ[judge.kind]
        loaded = reward_models.of_head(forward, tokenizer, read=read, weights=judge.weights, settings=judge.settings)
        idle = partial(together.idle, judge.model, judge.model.params, judge.lora)
        return loaded._replace(most=partial(together.most, judge.model), idle=idle)

    pool = rewards.PoolSettings(options.reward_num_workers, options.reward_timeout)
    on_one = partial(ranks.of_same_rows, place.ranks)
    return rewards.start(options.reward_funcs, options.reward_weights, load_model=load_model, pool=pool, say=warn, on_one=on_one)
