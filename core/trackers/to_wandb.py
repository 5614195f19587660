"""Weights & Biases: a run that is resumed under its id; offline, a folder that `wandb sync` uploads."""

import importlib
import os
from collections.abc import Mapping
from typing import Any

from treetune.core.trackers import tracked_run
from treetune.core.trackers.tracked_run import Answers, TrackedRun


class Wandb:
    """A run of wandb. Neither code nor a diff of the working folder goes with it, and models only where `wandb_log_model` asks."""

    def __init__(self, run: TrackedRun, *, project: str | None, entity: str | None, name: str | None, mode: str | None):
        wandb: Any = importlib.import_module("wandb")
        self.wandb, self.saved = wandb, []
        settings = wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True, x_stats_pid=run.pid)
        self.run = wandb.init(
            project=project or "treetune",
            entity=entity,
            name=name or run.name,
            id=run.id,
            resume="allow",
            mode=mode,
            config=run.config,
            allow_val_change=True,
            settings=settings,
        )
        self.id = self.run.id
        self.place = self.run.url if mode != "offline" and self.run.url else f"wandb sync {os.path.dirname(self.run.dir)}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """A row of the history; the evaluation at a step goes into the row of the step."""
        self.run.log(dict(values), step=step)

    def answers(self, step: int, table: Answers) -> None:
        """A table in the row of the step."""
        self.run.log({"eval/answers": self.wandb.Table(columns=table.columns, data=table.rows)}, step=step)

    def facts(self, values: Mapping[str, str | float]) -> None:
        """Entries of the summary."""
        self.run.summary.update(dict(values))

    def copy(self, path: str, name: str) -> None:
        """An artifact of type model: a new version for each folder saved, under the folder's name."""
        artifact = self.wandb.Artifact(f"model-{self.id}", type="model", metadata={"folder": name})
        artifact.add_dir(path)
        self.run.log_artifact(artifact, aliases=["latest", name])

    def finish(self, stopped: str | None) -> None:
        """Send what is left."""
        self.run.finish(exit_code=0 if tracked_run.ended_well(stopped) else 1)


def open_run(run: TrackedRun, **options: Any) -> Wandb:
    """Begin the run, or go on with it."""
    return Wandb(run, **options)
