"""The processes of a command as workers of Ray Train: on the cluster that RAY_ADDRESS names, or on this machine."""

import importlib
import os
from collections.abc import Sequence
from typing import Any

from treetune.core.run import launch
from treetune.core.run.errors import BadInput, RunFailed


def run(words: Sequence[str], processes: int, *, device: str, restarts: int = 0) -> int:
    """Run a command line in so many workers; its exit code. After a failure all of them start again, `restarts` times.

    The folder of the command, and what it names, must be there on every machine of the cluster.
    Errors: BadInput without Ray; RunFailed where a worker is lost, or ends with an error that it has not said.
    """
    try:
        ray, train, torch_train = (importlib.import_module(name) for name in ("ray", "ray.train", "ray.train.torch"))
    except ImportError as error:
        raise BadInput(f"use_ray needs Ray Train: pip install 'treetune[ray]' ({error})") from error
    with ray.init(log_to_driver=True, logging_level="warning"):
        gpus = device != "cpu" and ray.cluster_resources().get("GPU", 0) >= processes
        for attempt in range(restarts + 1):
            trainer = torch_train.TorchTrainer(
                work,
                train_loop_config={"words": list(words), "folder": os.getcwd(), "attempt": attempt},
                torch_config=torch_train.TorchConfig(backend="nccl" if gpus else "gloo"),
                scaling_config=train.ScalingConfig(num_workers=processes, use_gpu=gpus),
                run_config=train.RunConfig(failure_config=train.FailureConfig(max_failures=0)),
            )
            try:
                return int(getattr(trainer.fit(), "return_value", 0) or 0)
            except Exception as error:  # of the versions of Ray, which have several
                lost = str(error).strip().splitlines()
        raise RunFailed(f"a worker of Ray was lost or failed: {lost[-1] if lost else 'it did not say why'}")


def work(job: dict[str, Any]) -> int:
    """One worker: the command in this process, which Ray has joined with the others; its exit code.

    Errors: RunFailed for another code than 0 and 2.
    """
    from treetune.cli import main

    os.environ[launch.RESTART_COUNT] = str(job["attempt"])
    os.chdir(job["folder"])
    code = main.main(job["words"])
    if code not in (0, 2):
        raise RunFailed(f"the command ended with exit code {code}")
    return code
