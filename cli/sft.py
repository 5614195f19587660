"""`treetune sft`: supervised fine-tuning."""

from treetune.cli import method, training
from treetune.cli.methods.sft import Sft


def run(config: Sft, given: frozenset[str]) -> int:
    """Fine-tune and leave a run folder; the exit code."""
    return training.train("sft", config, given, method.SUPERVISED)
