"""Reward models: a head of scores on the model, trained to rank pairs or to judge steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from treetune.cli.methods.parts import Parts, Setting
from treetune.core import tree
from treetune.core.data import pack
from treetune.core.state import Objective, Params, Scores
from treetune.models import Model, heads
from treetune.models import policy as policies
from treetune.models.policy import Policy
from treetune.models.tokenizer import adapter_folder


def judge(config: Any, policy: Policy, setting: Setting, *, classes: int, read: str, objective: Callable[[Scores], Objective]) -> Parts:
    """A head of `classes` scores at the tokens that `read` names, and the objective of its scores."""
    headed = _with_head(config, policy, classes=classes, device=setting.device)
    remat = "full" if config.optim.gradient_checkpointing else None
    collate = partial(pack.collate_trees, read=read)
    return Parts(headed, objective(policies.scores(headed, remat=remat)), objective(policies.scores(headed)), (collate,))


def _with_head(config: Any, policy: Policy, *, classes: int, device: torch.device) -> Policy:
    """The policy with a head that trains; the output matrix of the vocabulary, which no score reads, does not."""
    params = dict(policy.params)
    if "lm_head" in params.get("lora", {}) or policy.lora is not None and "lm_head" in params.get("model", {}):
        raise ValueError("no score depends on lm_head: leave it out of --lora-target-modules and --lora-modules-to-save")
    head = tree.map(lambda leaf: leaf.to(device), _head(config, policy, classes))
    if policy.lora is None:
        params["model"] = {name: part for name, part in params["model"].items() if name != "lm_head"}
    return policy._replace(params=params | {"head": head})


def _head(config: Any, policy: Policy, classes: int) -> Params:
    """A fresh head, or the one of the adapter that the run starts from."""
    start = config.adapter.lora_model_dir if config.adapter.adapter == "lora" else None
    if start is None or heads.kind(adapter_folder(start)) is None:
        return heads.init(policy.cfg, classes, bias=classes > 1, seed=config.optim.seed)
    model = Model(policy.family, policy.cfg, policy.frozen["model"])
    head = heads.load_adapter(adapter_folder(start), model)[2]
    if (rows := head["score"]["weight"].shape[0]) != classes:
        raise ValueError(f"{start} has a head of {rows} classes, this command trains one of {classes}")
    return head
