"""Prompts with a true reply from options, under their former names; see core/data/ebft_rows.py."""

from typing import Any

from treetune.cli import row_settings, samplers
from treetune.core.data import chat_templates, ebft_rows
from treetune.core.data.dataset import Dataset
from treetune.core.data.ebft_rows import document

__all__ = ["check_fits", "document", "load"]


def load(config: Any, tokenizer: Any) -> Dataset:
    """All prompts of the options."""
    if (template := config.data.chat_template) is not None:  # sample answers and a saved adapter use it too
        tokenizer.chat_template = chat_templates.resolve(tokenizer, template) or tokenizer.chat_template
    return ebft_rows.load(row_settings.true_replies(config.data), tokenizer, seed=config.optim.seed)


def check_fits(data: Dataset, config: Any, cfg: Any) -> None:
    """`ebft_rows.check_fits` for the options of a run and a model's sizes."""
    engine, rollout, limit, limit_of = config.engine, config.rollout, cfg.max_positions, "the model"
    if engine.use_vllm and engine.vllm_mode == "managed" and (served := engine.vllm_max_model_len or samplers.longest(config)) < limit:
        limit, limit_of = served, "the server (vllm_max_model_len)"
    ebft_rows.check_fits(
        data.train + data.val,
        max_completion_length=rollout.max_completion_length,
        limit=limit,
        limit_of=limit_of,
        vocab_size=cfg.vocab_size,
        stop_ids=rollout.stop_token_ids,
        custom_rollout=rollout.rollout_func is not None,
    )
