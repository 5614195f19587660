"""Prompts from options, under their former names; see core/data/prompt_rows.py."""

from typing import Any

from treetune.cli import row_settings
from treetune.cli.pairs import named_values
from treetune.core.data import prompt_rows
from treetune.core.data.dataset import Dataset
from treetune.core.data.dataset import Dataset as Prompts

__all__ = ["Prompts", "check_fits", "load", "named_values"]


def load(options: Any, tokenizer: Any, *, seed: int) -> Dataset:
    """All prompts of the options."""
    return prompt_rows.load(row_settings.prompts(options), tokenizer, seed=seed)


def check_fits(data: Dataset, rollout: Any, cfg: Any) -> None:
    """`prompt_rows.check_fits` for sampling options and a model's sizes."""
    sizes = {"vocab_size": cfg.vocab_size, "max_positions": cfg.max_positions}
    prompts, length = data.train + data.val, rollout.max_completion_length
    prompt_rows.check_fits(prompts, max_completion_length=length, stop_ids=rollout.stop_token_ids, **sizes)
