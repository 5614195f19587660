"""Reward models: a head of scores on the model, trained to rank pairs or to judge steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from treetune.cli import method, setup
from treetune.core import tree
from treetune.core.data import kinds, pack
from treetune.core.state import Params
from treetune.losses import reward_objective
from treetune.models import Model, heads, policy


def _with_head(config: Any, model: Model, used: setup.Trees, *, classes: int, on: torch.device) -> setup.Trees:
    """The trees with a head that trains; an output matrix of words, which nothing reads, does not."""
    params = dict(used.params)
    if "lm_head" in params.get("lora", {}) or used.lora is not None and "lm_head" in params.get("model", {}):
        raise ValueError("no score depends on lm_head: leave it out of --lora-target-modules and --lora-modules-to-save")
    head = tree.map(lambda leaf: leaf.to(on), _head(config, model, classes))
    if used.lora is None:
        params["model"] = {name: part for name, part in params["model"].items() if name != "lm_head"}
    return used._replace(params=params | {"head": head})


def _head(config: Any, model: Model, classes: int) -> Params:
    """A fresh head, or that of the adapter that the run starts from."""
    start = config.adapter.lora_model_dir if config.adapter.adapter == "lora" else None
    if start is None or heads.kind(setup.adapter_folder(start)) is None:
        return heads.init(model.cfg, classes, bias=classes > 1, seed=config.optim.seed)
    found = heads.load_adapter(setup.adapter_folder(start), model)[2]
    if (have := found["score"]["weight"].shape[0]) != classes:
        raise ValueError(f"{start} has a head of {have} classes, this command trains one of {classes}")
    return found


def _parts(config: Any, model: Model, used: setup.Trees, on: torch.device, *, classes: int, read: str, objective: Callable) -> method.Parts:
    used = _with_head(config, model, used, classes=classes, on=on)
    remat = "full" if config.optim.gradient_checkpointing else None
    streams = (partial(pack.collate_trees, read=read),)
    return method.Parts(used, objective(policy.scores(used, remat=remat)), objective(policy.scores(used)), streams)


def reward(config: Any, model: Model, used: setup.Trees, *, on: torch.device, **_: Any) -> method.Parts:
    """A reward model: one score for a whole answer."""
    ranked = partial(reward_objective.ranked, centre=config.loss.center_rewards_coefficient)
    return _parts(config, model, used, on, classes=1, read="last", objective=ranked)


def prm(config: Any, model: Model, used: setup.Trees, *, on: torch.device, **_: Any) -> method.Parts:
    """A process reward model: good or bad, for each step."""
    return _parts(config, model, used, on, classes=2, read="classes", objective=reward_objective.steps)


RATES = (1e-4, 1e-5)
REWARD = method.Method(kinds.KINDS["ranked"], reward, RATES, ("accuracy", "margin"), head=True)
PRM = method.Method(kinds.KINDS["steps"], prm, RATES, ("accuracy",), "steps", head=True)
