"""MLflow: a run of a tracking server, a database or a folder (file store), which is continued under the id that MLflow gave it."""

import importlib
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from treetune.core.trackers import tracked_run
from treetune.core.trackers.tracked_run import Answers, TrackedRun

BATCH = 100  # options and tags of one request; numbers may be 1000
TAG = "treetune.run"
VALUE = 5000  # characters of a tag


class Mlflow:
    """A run of MLflow through its client, which keeps no global state."""

    def __init__(self, run: TrackedRun, *, uri: str | None, experiment: str | None, name: str | None):
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is not None and (uri.startswith("file:") or "://" not in uri):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it has been asked for: MLflow prefers a database
        mlflow: Any = importlib.import_module("mlflow")
        self.entities: Any = importlib.import_module("mlflow.entities")
        self.client = mlflow.MlflowClient(tracking_uri=uri)
        if run.continued and run.id is not None:
            self.id = run.id
        else:
            self.id = self._run_id(self._experiment(experiment or "Default"), name or run.name, run)
        self.client.update_run(self.id, status="RUNNING")
        self.place = f"MLflow run {self.id} at {_masked(uri or mlflow.get_tracking_uri())}"
        self._log_options(run)

    def _experiment(self, name: str) -> str:
        known = self.client.get_experiment_by_name(name)
        return self.client.create_experiment(name) if known is None else known.experiment_id

    def _run_id(self, experiment: str, name: str, run: TrackedRun) -> str:
        """The id of a new run, or of one that a trainer began which was killed before it heard of the id."""
        runs = self.client.search_runs([experiment], filter_string=f"tags.`{TAG}` = '{run.key}'", max_results=1)
        if runs:
            return runs[0].info.run_id
        if os.getppid() != run.pid:
            raise RuntimeError("the trainer is gone, and would not hear of a new run")
        return self.client.create_run(experiment, run_name=name, tags={TAG: run.key}).info.run_id

    def _log_options(self, run: TrackedRun) -> None:
        """Options as parameters, which MLflow never changes: another value of a resumed run becomes a tag."""
        known, options = self.client.get_run(self.id).data.params, tracked_run.flat(run.config)
        new = [self.entities.Param(name, str(value)) for name, value in options.items() if name not in known]
        for first in range(0, len(new), BATCH):
            self.client.log_batch(self.id, params=new[first : first + BATCH])
        changed = {f"option.{name}": value for name, value in options.items() if name in known and known[name] != str(value)}
        self.facts({**run.about, **changed})

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """One request."""
        now = int(1000 * time.time())
        self.client.log_batch(self.id, [self.entities.Metric(_name(name), float(value), now, step) for name, value in values.items()])

    def answers(self, step: int, table: Answers) -> None:
        """A table of the artifacts, one for each evaluation, which MLflow shows side by side."""
        columns = {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}
        self.client.log_table(self.id, columns, f"answers/step_{step:06}.json")

    def facts(self, values: Mapping[str, str | float]) -> None:
        """Tags."""
        tags = [self.entities.RunTag(_name(name), str(value)[:VALUE]) for name, value in values.items()]
        self.client.log_batch(self.id, tags=tags)

    def copy(self, path: str, name: str) -> None:
        """A folder of artifacts."""
        self.client.log_artifacts(self.id, path, artifact_path=name)

    def finish(self, stopped: str | None) -> None:
        """Tell how the run ended."""
        status = "FINISHED" if stopped is None else "KILLED" if tracked_run.ended_well(stopped) else "FAILED"
        self.client.set_terminated(self.id, status=status)


def _name(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w/.\- :]", "_", name)


def _masked(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", uri)


def open_run(run: TrackedRun, **options: Any) -> Mlflow:
    """Begin the run, or go on with it."""
    return Mlflow(run, **options)
