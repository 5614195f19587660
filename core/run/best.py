"""best.json of a run: which checkpoint had the best evaluation. A run depends on the bookkeeping of its checkpoints alone, never on it."""

import json
from pathlib import Path

from treetune.core.run import folder
from treetune.core.run.folder import RunDir
from treetune.core.run.progress import Progress

NAME = "best.json"


def checkpoint(run: RunDir, progress: Progress) -> Path | None:
    """The checkpoint of the best evaluation, where there is one."""
    path = None if progress.best_step is None else run.checkpoints / f"step_{progress.best_step:06d}"
    return path if path is not None and path.exists() else None


def write(run: RunDir, best: Path, goal: str, value: float | None) -> None:
    """Write best.json; goal: the metric that evaluations compare, and its value there."""
    folder.write(run.root / NAME, json.dumps({"checkpoint": best.name, f"eval_{goal}": value}))


def restore(run: RunDir, progress: Progress, goal: str) -> str | None:
    """Write best.json anew for a run that goes on; a warning where it was damaged."""
    file, best = run.root / NAME, checkpoint(run, progress)
    damaged = file.exists() and not _is_record(file)
    if best is None:
        file.unlink(missing_ok=True)
    else:
        write(run, best, goal, progress.best)
    return f"{file} was damaged and is {'dropped' if best is None else 'written anew'}" if damaged else None


def _is_record(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()).get("checkpoint"), str)
    except (ValueError, AttributeError, RecursionError):
        return False
