"""Trackio: a database on this machine, or a Space of the hub where one is named; a run is continued under its name."""

import importlib
from collections.abc import Mapping
from typing import Any

from treetune.core.trackers.tracked_run import Answers, TrackedRun


class Trackio:
    """A run of trackio. Its names are unique in a project here: by its name a run is found again."""

    def __init__(self, run: TrackedRun, *, project: str | None, name: str | None, space: str | None):
        trackio: Any = importlib.import_module("trackio")
        self.trackio = trackio
        project = project or "treetune"
        # An id is made for a run folder alone, and two of them may be called sft-001.
        self.id = name or (str(run.id) if run.continued else f"{run.name}-{str(run.id)[:6]}")
        self.run = trackio.init(
            project=project,
            name=self.id,
            space_id=space,
            config=run.config,
            resume="allow" if run.continued else "never",
            embed=False,
        )
        self.place = f'trackio show --project "{project}"' if space is None else f"trackio project {project} in the Space {space}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """A row."""
        self.run.log(dict(values), step=step)

    def answers(self, step: int, table: Answers) -> None:
        """A table in a row of the step."""
        self.run.log({"eval/answers": self.trackio.Table(columns=table.columns, data=table.rows)}, step=step)

    def facts(self, values: Mapping[str, str | float]) -> None:
        """Nothing: trackio keeps rows of numbers, and has no place for these."""

    def copy(self, path: str, name: str) -> None:
        """Nothing: no option asks for it."""

    def finish(self, stopped: str | None) -> None:
        """Write or send what is left."""
        self.run.finish()


def open_run(run: TrackedRun, **options: Any) -> Trackio:
    """Begin the run, or go on with it."""
    return Trackio(run, **options)
