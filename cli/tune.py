"""`treetune dpo`, `kto`, `orpo`, `simpo`, `cpo`, `reward` and `prm`: one way of running, a method each."""

from typing import Any

from treetune.cli import configs, judging, preferring, training

METHODS = {
    configs.Dpo: ("dpo", preferring.DPO),
    configs.Kto: ("kto", preferring.KTO),
    configs.Orpo: ("orpo", preferring.ORPO),
    configs.Simpo: ("simpo", preferring.SIMPO),
    configs.Cpo: ("cpo", preferring.CPO),
    configs.Reward: ("reward", judging.REWARD),
    configs.Prm: ("prm", judging.PRM),
}


def run(config: Any, given: frozenset[str]) -> int:
    """Train by the method whose config this is and leave a run folder; the exit code."""
    command, method = METHODS[type(config)]
    if isinstance(config, configs.Kto) and config.loss.loss != "kto":
        method = preferring.JUDGE
    return training.train(command, config, given, method)
