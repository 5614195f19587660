"""The bookkeeping of a run that a checkpoint carries beside the state."""

from pathlib import Path
from typing import NamedTuple

from treetune.core import ckpt, fields
from treetune.core.data import loader, streaming

Cursor = loader.PlanCursor | streaming.StreamCursor


class Progress(NamedTuple):
    """The position in the data, the best evaluation and how many bad ones followed it, and the tokens that were read."""

    cursor: Cursor = loader.START
    best: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    tokens_seen: int = 0
    paused: int = 0  # the last step that was evaluated and saved because an epoch ended


def stored(progress: Progress) -> dict:
    """A progress as JSON."""
    return progress._asdict() | {"cursor": list(progress.cursor)}


def read(meta: dict, start: Cursor, path: Path) -> Progress:
    """The progress in the meta of the checkpoint at `path`, its cursor of the kind of `start`. Raises ValueError for anything else."""
    try:
        found = fields.inner(fields.mapping(meta, "state.json"), "progress")
        cursor = fields.integers(found, "cursor", least=0)
        if len(cursor) != len(start):
            raise fields.wrong(found, "cursor", f"a list of {len(start)} whole numbers")
        best = found.values.get("best")  # JSON as Python writes it: an infinite reward is a number
        if best is not None and (isinstance(best, bool) or not isinstance(best, int | float)):
            raise fields.wrong(found, "best", "a number or null")
        counts = {name: fields.integer(found, name, least=0) for name in ("bad_evals", "tokens_seen")}
        counts["paused"] = fields.integer(found, "paused", default=0, least=0)
        return Progress(start._make(cursor), best, fields.integer(found, "best_step", default=None, least=0, null=True), **counts)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or of another kind of run ({error}): {ckpt.FIX}") from error
