"""What a run leaves: the adapter or the model that it trained, under its name once it is whole."""

from pathlib import Path
from typing import Any

from treetune.cli import setup
from treetune.cli.run import Run
from treetune.core import drafts, shard, tree
from treetune.core.run import folder
from treetune.core.state import TrainState
from treetune.models import policy
from treetune.models.adapter import Carried
from treetune.models.policy import Policy
from treetune.models.tokenizer import has_template, has_tokenizer


def extras(config: Any, start: Policy) -> dict[str, Any]:
    """What a saved folder holds besides weights: generation_config.json of a model, the tokenizer or template of an adapter.

    Errors: ValueError for a generation_config.json of the base model that cannot be used.
    """
    if start.lora is not None:
        return {"carried": _carried(config, start.tokenizer)}
    return {"generation": None if "head" in start.params else setup.generation_config(config.model, start.tokenizer)}


def _carried(config: Any, tokenizer: Any) -> Carried:
    """What of the tokenizer an adapter folder must hold, because the base model's is another."""
    start, words = config.adapter.lora_model_dir, config.vocabulary
    if words.special_tokens or words.tokens or (start is not None and has_tokenizer(start)):
        return Carried(tokenizer=tokenizer)
    template = config.data.chat_template is not None or (start is not None and has_template(start))
    return Carried(template=tokenizer.chat_template if template else None)


def save(run: Run, start: Policy, state: TrainState, kept: dict[str, Any]) -> Path:
    """Write what trained into the run folder, in place of an earlier result; kept: as of `extras`. The folder written."""
    trained = tree.map(shard.full, state.params)  # on every rank: gathering sharded leaves is a collective
    path = run.folder.root / ("model" if start.lora is None else "adapter")
    if run.ranks.rank > 0:
        return path
    draft = drafts.name(path)
    try:
        policy.save(policy.bare(start), draft, params=trained, **kept)
        folder.replace(draft, path)
    finally:
        drafts.delete(draft)
    return path
