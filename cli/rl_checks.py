"""Names of earlier places of checks. Importing this imports no torch."""

from typing import Any

from treetune.cli.options import pipeline, table
from treetune.cli.options.rollout import VLLM_ONLY as VLLM_ONLY


def off_policy(config: Any) -> bool:
    """Whether completions may come from another policy than the one that trains on them."""
    return pipeline.off_policy(table.flatten(config))
