"""`treetune ebft`: learn from true texts by the features that sampled texts share with them, in one of two modes."""

import dataclasses
from typing import Any

from treetune.cli import ebft_strided, ebft_structured
from treetune.cli.methods.ebft import TEMPERATURES


def run(config: Any, given: frozenset[str]) -> int:
    """Train and leave a run folder; the exit code."""
    if config.rollout.temperature is None:
        config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, temperature=TEMPERATURES[config.ebft.mode]))
    if config.ebft.mode == "strided":
        return ebft_strided.run(config, given)
    return ebft_structured.run(config, given)
