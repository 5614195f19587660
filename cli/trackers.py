"""From the options of trackers to observers of a run."""

import contextlib
from collections.abc import Callable
from typing import Any

from treetune.cli.options import trackers as options_
from treetune.cli.options.trackers import TrackerOptions
from treetune.cli.run import TrainConfig
from treetune.core import masking
from treetune.core.config import table
from treetune.core.run import observers
from treetune.core.run.folder import RunDir
from treetune.core.run.observers import Observers
from treetune.core.trackers import background
from treetune.core.trackers.background import Background
from treetune.core.trackers.service import Service
from treetune.core.trackers.told import Book


def _wandb(options: TrackerOptions) -> dict[str, Any]:
    keeps = {"checkpoint": ("checkpoint", "end"), "end": ("end",)}.get(options.wandb_log_model or "", ())
    given = {
        "project": options.wandb_project, "entity": options.wandb_entity, "name": options.wandb_name, "mode": options.wandb_mode,
    }  # fmt: skip
    return {"options": given, "id": options.wandb_run_id, "destination": ("project", "entity"), "keeps": keeps}


def _tensorboard(options: TrackerOptions) -> dict[str, Any]:
    return {"options": {}, "rewinds": True}


def _mlflow(options: TrackerOptions) -> dict[str, Any]:
    given = {"uri": options.mlflow_tracking_uri, "experiment": options.mlflow_experiment_name, "name": options.mlflow_run_name}
    keeps = ("checkpoint", "end") if options.hf_mlflow_log_artifacts else ()
    return {"options": given, "destination": ("uri", "experiment"), "keeps": keeps, "made_here": False}


def _comet(options: TrackerOptions) -> dict[str, Any]:
    given = {
        "api_key": options.comet_api_key, "workspace": options.comet_workspace, "project": options.comet_project_name,
        "mode": options.comet_mode, "online": options.comet_online, "config": options_.comet_config(options),
    }  # fmt: skip
    return {"options": given, "id": options.comet_experiment_key, "destination": ("workspace", "project")}


def _trackio(options: TrackerOptions) -> dict[str, Any]:
    given = {"project": options.trackio_project_name, "name": options.trackio_run_name, "space": options.trackio_space_id}
    return {"options": given, "id": options.trackio_run_name, "destination": ("project", "space")}


def _swanlab(options: TrackerOptions) -> dict[str, Any]:
    given = {
        "project": options.swanlab_project, "workspace": options.swanlab_workspace, "name": options.swanlab_experiment_name,
        "description": options.swanlab_description,
        "mode": "online" if options.swanlab_mode == "cloud" else options.swanlab_mode, "api_key": options.swanlab_api_key,
    }  # fmt: skip
    return {"options": given, "destination": ("project", "workspace")}


MADE: dict[str, Callable[[TrackerOptions], dict[str, Any]]] = {
    "wandb": _wandb, "tensorboard": _tensorboard, "mlflow": _mlflow, "comet": _comet, "trackio": _trackio, "swanlab": _swanlab,
}  # fmt: skip


def services(options: TrackerOptions) -> list[Service]:
    """The trackers that a run has, with what each is given."""
    return [Service(name=name, module=f"treetune.core.trackers.to_{name}", **MADE[name](options)) for name in options_.active(options)]


def attach(group: Observers, config: TrainConfig, folder: RunDir, stack: contextlib.ExitStack) -> None:
    """Add the trackers of a run to its observers; they end with the stack."""
    options = getattr(config, "tracking", None)
    if options is None or not (chosen := services(options)):
        return
    book, public = Book(folder.root), _public(config)
    trackers = [Background(one, folder.root, public, book, timeout_s=options.tracker_timeout) for one in chosen]

    def say(text: str, warning: bool) -> None:
        group.message(text, warning=warning) if not warning else group.warn(text)

    for one in trackers:
        one.say = say
        group.append(observers.of(one, f"tracker {one.service.name}", group.warn))
    stack.callback(_close, group, trackers)


def _close(group: Observers, trackers: list[Background]) -> None:
    with group.busy("telling trackers the rest"):
        background.close(trackers)


def _public(config: TrainConfig) -> dict[str, Any]:
    """option -> value as trackers may see it: without secrets, and without passwords of addresses."""
    hidden = table.secrets(type(config))
    return {name: _masked(value) for name, value in table.flatten(config).items() if name not in hidden}


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return masking.mask_secrets(value)
    return [_masked(one) for one in value] if isinstance(value, list) else value
