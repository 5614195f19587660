"""Options of trackers: which services follow a run, under which names. Importing this imports no torch."""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from treetune.core import option_pairs
from treetune.core.config.marks import NAMED_VALUES, SECRET, SHOWN, STARTED, Switch, Unused, Values
from treetune.core.config.ranges import SECONDS

AUTO = Switch("on", "off")
# The options that turn a tracker on by naming where a run goes; use_NAME says so without them, or against them.
NAMED_BY = {
    "wandb": "wandb_project",
    "mlflow": "mlflow_experiment_name",
    "comet": "comet_project_name",
    "trackio": "trackio_project_name",
    "swanlab": "swanlab_project",
}
DISABLED = {"wandb": "wandb_mode", "swanlab": "swanlab_mode"}
MODULES = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "comet": "comet_ml",
    "trackio": "trackio",
    "swanlab": "swanlab",
}
COMET_KEY = re.compile(r"[0-9a-zA-Z]{32,50}")


def _unused(tracker: str) -> Unused:
    """Unused where nothing asks for the tracker; where it is turned off, its other options may stay."""
    reason = f"{tracker} is not on: give {NAMED_BY[tracker]}, or use_{tracker}"
    return Unused(lambda values: reason if values[f"use_{tracker}"] == "auto" and not values[NAMED_BY[tracker]] else "")


def _model_of_none(values: Values) -> str:
    return "" if values["wandb_log_model"] == "false" else WANDB.reason(values)


def _none_on(values: Values) -> str:
    return "" if list(_active(values)) else "no tracker is on"


WANDB, MLFLOW, COMET, TRACKIO, SWANLAB = (_unused(name) for name in NAMED_BY)
Use = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class TrackerOptions:
    """Trackers."""

    use_wandb: Annotated[Use, AUTO, SHOWN] = "auto"
    """Tell Weights & Biases of the run; auto: where wandb_project is given."""
    wandb_project: Annotated[str | None, SHOWN] = None
    """Project of W&B; if not given, treetune."""
    wandb_entity: Annotated[str | None, SHOWN, WANDB] = None
    """Team or user of W&B; if not given, the one that is logged in."""
    wandb_name: Annotated[str | None, SHOWN, WANDB] = None
    """Name of the run in W&B; if not given, that of the run folder."""
    wandb_run_id: Annotated[str | None, SHOWN, WANDB] = None
    """Id of the run in W&B, to go on with a run that is there; if not given, made once for each run folder."""
    wandb_mode: Annotated[Literal["online", "offline", "disabled"] | None, SHOWN, WANDB] = None
    """offline keeps the run in ./wandb, for wandb sync; disabled: no W&B; if not given, WANDB_MODE of the environment, else online."""
    wandb_watch: Annotated[Literal["false", "gradients", "parameters", "all"] | None, SHOWN, Switch("gradients", "false")] = None
    """Histograms of gradients and weights, which are not there: nothing but false is taken. grad_norm is among the metrics."""
    wandb_log_model: Annotated[Literal["false", "checkpoint", "end"] | None, SHOWN, Unused(_model_of_none), Switch("end", "false")] = None
    """Upload what was trained at the end (end), and each checkpoint besides (checkpoint); if not given, nothing is uploaded."""
    use_tensorboard: Annotated[bool, SHOWN] = False
    """Write event files for TensorBoard into the folder tensorboard of the run."""
    use_mlflow: Annotated[Use, AUTO, SHOWN] = "auto"
    """Tell MLflow of the run; auto: where mlflow_experiment_name is given."""
    mlflow_tracking_uri: Annotated[str | None, SHOWN, MLFLOW] = None
    """Server, database or folder of MLflow; if not given, MLFLOW_TRACKING_URI of the environment, else MLflow's default."""
    mlflow_experiment_name: Annotated[str | None, SHOWN] = None
    """Experiment of MLflow; if not given, Default."""
    mlflow_run_name: Annotated[str | None, SHOWN, MLFLOW] = None
    """Name of the run in MLflow; if not given, that of the run folder."""
    hf_mlflow_log_artifacts: Annotated[bool, SHOWN, MLFLOW] = False
    """Copy each checkpoint, and what was trained, to MLflow's artifacts."""
    use_comet: Annotated[Use, AUTO, SHOWN] = "auto"
    """Tell Comet of the run; auto: where comet_project_name is given."""
    comet_api_key: Annotated[str | None, STARTED, COMET, SECRET] = None
    """API key of Comet; better COMET_API_KEY of the environment, or comet login."""
    comet_workspace: Annotated[str | None, SHOWN, COMET] = None
    """Workspace of Comet; if not given, that of the account."""
    comet_project_name: Annotated[str | None, SHOWN] = None
    """Project of Comet; if not given, Uncategorized."""
    comet_experiment_key: Annotated[str | None, SHOWN, COMET] = None
    """Key of the experiment in Comet, 32 to 50 letters and digits; if not given, made once for each run folder."""
    comet_mode: Annotated[Literal["get_or_create", "get", "create"], SHOWN, COMET] = "get_or_create"
    """get needs an experiment that is there, create one that is not; a resumed run goes on with its own."""
    comet_online: Annotated[bool, SHOWN, COMET] = True
    """False keeps an archive on this machine, for comet upload."""
    comet_experiment_config: Annotated[tuple[str, ...], NAMED_VALUES, SHOWN, COMET] = ()
    """NAME=VALUE: arguments of comet_ml.ExperimentConfig, such as offline_directory, tags, log_code; code is not sent by default."""
    use_trackio: Annotated[Use, AUTO, SHOWN] = "auto"
    """Tell Trackio of the run; auto: where trackio_project_name is given."""
    trackio_project_name: Annotated[str | None, SHOWN] = None
    """Project of Trackio; if not given, treetune."""
    trackio_run_name: Annotated[str | None, SHOWN, TRACKIO] = None
    """Name of the run in Trackio; if not given, that of the run folder with a part of its id."""
    trackio_space_id: Annotated[str | None, SHOWN, TRACKIO] = None
    """Space of the hub to send the run to; if not given, it stays on this machine."""
    use_swanlab: Annotated[Use, AUTO, SHOWN] = "auto"
    """Tell SwanLab of the run; auto: where swanlab_project is given."""
    swanlab_project: Annotated[str | None, SHOWN] = None
    """Project of SwanLab; if not given, treetune."""
    swanlab_workspace: Annotated[str | None, SHOWN, SWANLAB] = None
    """Workspace of SwanLab; if not given, that of the account."""
    swanlab_experiment_name: Annotated[str | None, SHOWN, SWANLAB] = None
    """Name of the experiment in SwanLab; if not given, that of the run folder."""
    swanlab_description: Annotated[str | None, SHOWN, SWANLAB] = None
    """What the experiment is about, as SwanLab shows it beside its name."""
    swanlab_mode: Annotated[Literal["online", "cloud", "local", "offline", "disabled"] | None, SHOWN, SWANLAB] = None
    """local and offline keep the run in ./swanlog; disabled: no SwanLab; if not given, SWANLAB_MODE of the environment, else online."""
    swanlab_api_key: Annotated[str | None, STARTED, SWANLAB, SECRET] = None
    """API key of SwanLab; better SWANLAB_API_KEY of the environment, or swanlab login."""
    tracker_timeout: Annotated[float, SECONDS, SHOWN, Unused(_none_on)] = 60.0
    """Seconds that a tracker may take for a call, and at the end for all that is left; ten times as long to open a run or copy a model."""


def _active(values: Values) -> Iterator[str]:
    for name in MODULES:
        use = values[f"use_{name}"]
        wanted = use is True or use == "on" or use == "auto" and bool(values[NAMED_BY[name]])
        if wanted and values.get(DISABLED.get(name, "")) != "disabled":
            yield name


def active(options: TrackerOptions) -> list[str]:
    """The trackers that a run has."""
    return list(_active(vars(options)))


def conflicts(options: TrackerOptions) -> None:
    """Raise ValueError for options that no tracker can follow."""
    if options.wandb_watch not in (None, "false"):
        raise ValueError(
            f"wandb_watch is {options.wandb_watch}: histograms of gradients and weights are not there; leave it out (grad_norm is logged)"
        )
    if options.comet_mode == "get" and options.comet_experiment_key is None:
        raise ValueError("comet_mode get goes on with an experiment that is there: give comet_experiment_key")
    if options.comet_experiment_key is not None and not COMET_KEY.fullmatch(options.comet_experiment_key):
        raise ValueError(f"comet_experiment_key must be 32 to 50 letters and digits, got {options.comet_experiment_key!r:.60}")


def check_packages(options: TrackerOptions) -> None:
    """Raise ValueError for a tracker whose package is not there, before anything is loaded."""
    for name in active(options):
        module = "swanboard" if name == "swanlab" and options.swanlab_mode == "local" else MODULES[name]
        for needed in dict.fromkeys((MODULES[name], module)):
            package = importlib.util.find_spec(needed)
            if package is None or package.origin is None:  # a folder of that name, such as ./wandb, is no package
                by = f"use_{name}" if not getattr(options, NAMED_BY.get(name, ""), None) else NAMED_BY[name]
                raise ValueError(f"{by} needs the package {needed}, which is not installed: pip install 'treetune[{name}]'")


def comet_config(options: TrackerOptions) -> dict[str, Any]:
    """Arguments of comet_ml.ExperimentConfig."""
    return option_pairs.named_values(options.comet_experiment_config, "comet-experiment-config")
