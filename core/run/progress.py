"""The bookkeeping of a run that a checkpoint carries beside the state: the best evaluation, and where the source stands."""

from pathlib import Path
from typing import Any, NamedTuple

from treetune.core import ckpt, fields


class Progress(NamedTuple):
    """The best evaluation and how many bad ones followed it, and the tokens that were read."""

    best: float | None = None
    best_step: int | None = None
    bad_evals: int = 0
    tokens_seen: int = 0
    paused: int = 0  # the last step that was evaluated and saved because an epoch ended


def stored(progress: Progress, position: dict[str, Any]) -> dict[str, Any]:
    """A progress and the position of a source (`Source.state`) as entries of a checkpoint's meta."""
    rest = {name: value for name, value in position.items() if name != "cursor"}
    return {"progress": {"cursor": position["cursor"]} | progress._asdict()} | rest


def read(meta: dict[str, Any], path: Path) -> Progress:
    """The progress in the meta of the checkpoint at `path`. Errors: ValueError for anything else."""
    try:
        entry = fields.inner(fields.mapping(meta, "state.json"), "progress")
        best = entry.values.get("best")  # JSON as Python writes it: an infinite reward is a number
        if best is not None and (isinstance(best, bool) or not isinstance(best, int | float)):
            raise fields.wrong(entry, "best", "a number or null")
        counts = {name: fields.integer(entry, name, least=0) for name in ("bad_evals", "tokens_seen")}
        counts["paused"] = fields.integer(entry, "paused", default=0, least=0)
        return Progress(best, fields.integer(entry, "best_step", default=None, least=0, null=True), **counts)
    except ValueError as error:
        raise _damaged(path, error) from error


def position(meta: dict[str, Any], numbers: int | None, path: Path) -> dict[str, Any]:
    """What a source goes on from, in the meta of the checkpoint at `path`; numbers: how many its cursor has, None for any."""
    try:
        entry = fields.inner(fields.mapping(meta, "state.json"), "progress")
        cursor = fields.integers(entry, "cursor", least=0)
        if numbers is not None and len(cursor) != numbers:
            raise fields.wrong(entry, "cursor", f"a list of {numbers} whole numbers")
    except ValueError as error:
        raise _damaged(path, error) from error
    return meta | {"cursor": cursor}


def _damaged(path: Path, error: ValueError) -> ValueError:
    return ValueError(f"{path} is damaged, or of another kind of run ({error}): {ckpt.FIX}")
