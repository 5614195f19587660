"""Comet: an experiment that is continued under its key; offline, an archive for each process, which `comet upload` uploads."""

import importlib
from collections.abc import Mapping
from typing import Any

from treetune.core.trackers import tracked_run
from treetune.core.trackers.tracked_run import Answers, TrackedRun

# What Comet would send besides: code, the changes of the working folder, the command line and the output of the tracker's own process.
QUIET = {
    "log_code": False, "log_graph": False, "log_git_metadata": False, "log_git_patch": False, "parse_args": False,
    "auto_output_logging": False, "display_summary_level": 0,
}  # fmt: skip


class Comet:
    """An experiment of Comet."""

    def __init__(
        self,
        run: TrackedRun,
        *,
        api_key: str | None,
        workspace: str | None,
        project: str | None,
        mode: str,
        online: bool,
        config: Mapping[str, Any],
    ):
        comet: Any = importlib.import_module("comet_ml")
        self.experiment = comet.start(
            api_key=api_key,
            workspace=workspace,
            project_name=project,
            experiment_key=run.id,
            mode="get" if run.continued else mode,
            online=online,
            experiment_config=comet.ExperimentConfig(**{"name": run.name, **QUIET, **config}),
        )
        self.id = self.experiment.get_key()
        self.place = f"{self.experiment.url}" if online else f"Comet experiment {self.id}, offline"
        self.experiment.log_parameters(tracked_run.flat(run.config))
        self.facts(run.about)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of the step."""
        self.experiment.log_metrics(dict(values), step=step)

    def answers(self, step: int, table: Answers) -> None:
        """A CSV file among the assets, one for each evaluation."""
        self.experiment.log_table(f"answers_step_{step:06}.csv", table.rows, headers=table.columns)

    def facts(self, values: Mapping[str, str | float]) -> None:
        """Entries under Other."""
        self.experiment.log_others(dict(values))

    def copy(self, path: str, name: str) -> None:
        """Nothing: no option asks for it."""

    def finish(self, stopped: str | None) -> None:
        """Send or write what is left."""
        self.experiment.end()


def open_run(run: TrackedRun, **options: Any) -> Comet:
    """Begin the experiment, or go on with it."""
    return Comet(run, **options)
