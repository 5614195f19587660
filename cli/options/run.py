"""Options of a run (its folder, evaluations, checkpoints, stopping) and of sampling an answer. Importing this imports no torch."""

import importlib.util
import os
from dataclasses import dataclass
from typing import Annotated, Literal

from treetune.cli.options import answers, meshes
from treetune.cli.options.answers import AnswerOptions
from treetune.cli.options.data import HELD_OUT
from treetune.cli.options.doors import door
from treetune.core.config.marks import (
    ANSWER,
    CHECKPOINT,
    MACHINE,
    RUN_FOLDER,
    SHOWN,
    STARTED,
    Unused,
    Values,
    unused_if,
    unused_unless,
)
from treetune.core.config.ranges import BELOW_ONE, COUNT, COUNT_OR_NONE, POSITIVE, SECONDS, SEED, SHARE, SMALL, TEMPERATURE, TOKENS


def _several(values: Values) -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 or values["nproc"] > 1 or values["nnodes"] > 1


def _one_process(values: Values) -> str:
    return "" if _several(values) else "there is one process; start several with nproc"


def _nothing_to_split(values: Values) -> str:
    return "" if values["sharding"] == "none" else _one_process(values)


def _alone(values: Values) -> str:
    return "" if _several(values) else "there is one process, which waits for no other"


def _together(values: Values) -> str:
    return "several processes train; ask treetune lm-eval --adapter RUN when they are done" if _several(values) else ""


def _one_start(values: Values) -> str:
    return "" if values["nproc"] > 1 or values["nnodes"] > 1 else "there is one process; start several with nproc"


def _listed_steps(values: Values) -> str:
    return "profiler_steps names the steps themselves" if len(values["profiler_steps"]) > 1 else ""


# How a run is started, which is not what it is.
STARTS = ("resume", "overwrite", "ignore_memory", "nproc", "nnodes", "rendezvous", "restarts", "rank_timeout", "use_ray")
OBSERVER = door((), "observer", "event", "record")
GREEDY = unused_if("temperature", 0, reason="at temperature 0 the likeliest token is taken")


@dataclass(frozen=True)
class StartOptions:
    """Start, folder, evaluations and checkpoints of a run."""

    output_dir: Annotated[str | None, RUN_FOLDER, STARTED] = None
    """Run folder; if not given, the first free runs/COMMAND-NNN."""
    resume: Annotated[str | None, CHECKPOINT, STARTED] = None
    """auto: the newest checkpoint of output_dir (or of the newest run); or a checkpoint folder."""
    overwrite: Annotated[bool, STARTED] = False
    """Start anew in an output_dir that holds a run and nothing else; the old run is deleted after the first step of the new one."""
    ignore_memory: Annotated[bool, STARTED] = False
    """Start although more memory seems to be needed than there is: without it a run that cannot fit is refused before it loads anything."""
    sweep: Annotated[bool, STARTED] = False
    """Options that are given several values (--learning-rate 1e-4 2e-4 --sweep) are a run each, or a run for each of their combinations."""
    nproc: Annotated[int, COUNT, STARTED] = 1
    """Processes that train together on this machine, one for each of its devices."""
    nnodes: Annotated[int, COUNT, STARTED] = 1
    """Machines that train together: the same command is started on each."""
    rendezvous: Annotated[
        str | None,
        STARTED,
        unused_if("nnodes", 1, reason="there is one machine"),
        unused_if("use_ray", True, reason="Ray brings the workers together"),
    ] = None
    """HOST:PORT of one of the machines, where all of them meet."""
    restarts: Annotated[int, COUNT_OR_NONE, STARTED, Unused(_one_start)] = 0
    """Times that all processes start again from the newest checkpoint after one of them has failed."""
    use_ray: Annotated[bool, STARTED] = False
    """Start the processes, nproc on each of nnodes machines, as workers of Ray Train: on the cluster that RAY_ADDRESS names, or here."""
    rank_timeout: Annotated[float, SECONDS, STARTED, Unused(_alone)] = 1800.0
    """Seconds without a forward pass after which a run of several processes ends: a line names the rank that hangs, and all leave their
    stacks in RUN/stacks."""
    eval_steps: Annotated[int | None, COUNT, SHOWN, HELD_OUT] = None
    """Evaluate every so many steps, besides before and after; if not given, at the ends of epochs, up to 10 of them."""
    evals_per_epoch: Annotated[int | None, COUNT_OR_NONE, SHOWN, HELD_OUT] = None
    """Evaluate so many times in each epoch, besides before and after, instead of eval_steps; 0: never, not even before and after."""
    save_steps: Annotated[int | None, COUNT, SHOWN] = None
    """Save a checkpoint every so many steps, besides at the end; if not given, at the ends of epochs, up to 10 of them."""
    saves_per_epoch: Annotated[int | None, COUNT_OR_NONE, SHOWN] = None
    """Save a checkpoint so many times in each epoch, besides at the end, instead of save_steps; 0: only where a signal ends the run."""
    save_total_limit: Annotated[int, COUNT, SHOWN, unused_if("saves_per_epoch", 0, reason="saves_per_epoch is 0")] = 2
    """Newest checkpoints to keep; the best one by eval loss is kept besides."""
    async_save: Annotated[bool, SHOWN, unused_if("saves_per_epoch", 0, reason="saves_per_epoch is 0")] = False
    """Write checkpoints while training goes on, from copies in host memory."""
    logging_steps: Annotated[int, COUNT, SHOWN] = 1
    """Steps between lines on a plain screen; metrics.jsonl has every step."""


@dataclass(frozen=True)
class RunOptions(AnswerOptions, StartOptions):
    """Run."""

    lm_eval_tasks: Annotated[tuple[str, ...], SHOWN, Unused(_together)] = ()
    """Benchmarks of treetune lm-eval to ask after training, by name; the results are in lm_eval.json of the run folder."""
    lm_eval_batch_size: Annotated[int, SMALL, SHOWN, unused_unless("lm_eval_tasks", reason="lm_eval_tasks names none")] = 8
    """As batch_size of treetune lm-eval, for lm_eval_tasks."""
    early_stopping_patience: Annotated[
        int | None, COUNT, SHOWN, HELD_OUT, unused_if("evals_per_epoch", 0, reason="evals_per_epoch is 0")
    ] = None
    """Stop after this many evaluations in a row without a new best loss."""
    loss_watchdog_threshold: Annotated[float | None, POSITIVE, SHOWN] = None
    """Stop when train/loss stays above this for loss_watchdog_patience steps."""
    loss_watchdog_patience: Annotated[
        int, COUNT, SHOWN, unused_unless("loss_watchdog_threshold", reason="there is no loss_watchdog_threshold")
    ] = 3
    """Steps above the threshold before the watchdog stops the run."""
    sharding: Annotated[Literal["none", "moments", "gradients", "full"] | None, MACHINE, Unused(_nothing_to_split)] = None
    """What each of several processes keeps a part of: none, moments of the optimiser, gradients and moments, or full (weights, too)."""
    shard: Annotated[tuple[str, ...], MACHINE, meshes.SIZES, Unused(_one_process)] = ()
    """Processes by axis, such as data=4,replicate=2: ranks along data split what sharding says (full, if not given), those along
    replicate hold the same parts, those along context share the tokens of each row, those along tensor the heads, columns and experts of
    each layer. One size that is missing follows from the number of processes."""
    profiler_steps: Annotated[tuple[Annotated[int, COUNT], ...], SHOWN] = ()
    """Profile so many steps (one number), or from the lowest to the highest of these (several): profile_trace.json and profile_ops.txt
    in the run folder, on CUDA also profile_memory.pickle."""
    profiler_steps_start: Annotated[
        int, COUNT_OR_NONE, SHOWN, unused_unless("profiler_steps", reason="there are no profiler_steps"), Unused(_listed_steps)
    ] = 0
    """The step after which profiler_steps begin."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], SHOWN] = "info"
    """What is printed, and goes into run.log: debug has all numbers of each step, versions and times; warning and error leave out."""
    observer: Annotated[tuple[Annotated[str, OBSERVER], ...], SHOWN] = ()
    """Trackers to tell of the run: functions track(event, record), or classes with methods such as step and evaluation."""
    sample_prompt: Annotated[str | None, ANSWER] = None
    """Prompt answered before and after training; if not given, the first held-out chat row. Empty: none."""
    sample_tokens: Annotated[int, TOKENS, ANSWER, unused_if("sample_prompt", "", reason="sample_prompt is empty")] = 160
    """Longest sample answer."""


@dataclass(frozen=True)
class SampleOptions:
    """Sampling."""

    max_new_tokens: Annotated[int, TOKENS] = 200
    """Longest answer in tokens."""
    temperature: Annotated[float, TEMPERATURE] = 0.7
    """0 takes the likeliest token every time."""
    top_p: Annotated[float, SHARE, GREEDY] = 0.95
    """Nucleus sampling: sample among the likeliest tokens whose probabilities add up to this."""
    top_k: Annotated[int, COUNT_OR_NONE, GREEDY] = 0
    """Sample among this many likeliest tokens; 0 for all."""
    min_p: Annotated[float, BELOW_ONE, GREEDY] = 0.0
    """Leave out tokens whose probability is below this fraction of the likeliest token's."""
    seed: Annotated[int, SEED, GREEDY] = 0
    """Random seed: the same seed gives the same answer."""


# Options that need the length of an epoch: what to give instead.
PER_EPOCH = {"evals_per_epoch": "give eval_steps", "saves_per_epoch": "give save_steps"}


def per_epoch(run: RunOptions) -> str:
    """The first option that needs the length of an epoch; empty where none does."""
    return next((name for name in PER_EPOCH if getattr(run, name)), "")


def conflicts(run: RunOptions, *, streaming: bool = False) -> None:
    """Raise ValueError for a run that is continued and deleted at once, a sweep in a file, and two ways of saying how often.

    streaming: the rows are a stream, of which no epoch is known before its end.
    """
    if run.sweep:
        raise ValueError("sweep is for the command line, which starts a run for each value: --learning-rate 1e-4 2e-4 --sweep")
    _check_processes(run)
    if run.lm_eval_tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval_tasks needs the package lm_eval, which is not installed: pip install 'treetune[eval]'")
    answers.conflicts(run)
    if run.resume is not None and run.overwrite:
        raise ValueError("give resume or overwrite, not both: one continues a run, the other deletes it")
    for steps, parts in (("eval_steps", "evals_per_epoch"), ("save_steps", "saves_per_epoch")):
        if getattr(run, steps) is not None and getattr(run, parts) is not None:
            raise ValueError(f"give {steps} or {parts}, not both: {getattr(run, steps)} steps, or {getattr(run, parts)} times an epoch")
    if streaming and (name := per_epoch(run)):
        raise ValueError(f"{name} {getattr(run, name)} needs the length of an epoch, which a stream tells at its end: {PER_EPOCH[name]}")


def _check_processes(run: RunOptions) -> None:
    """Raise ValueError for processes that cannot meet, that torchrun has started already, or that have no folder to start again in."""
    host, _, port = (run.rendezvous or "").rpartition(":")
    if run.nnodes > 1 and not run.use_ray and not (host and port.isdecimal()):
        raise ValueError(f"nnodes {run.nnodes} needs rendezvous, HOST:PORT of one of the machines, got {run.rendezvous!r}")
    meshes.conflicts(run)
    started = int(os.environ.get("LOCAL_WORLD_SIZE", run.nproc))
    if run.nproc not in (1, started) and not run.use_ray:
        raise ValueError(f"nproc is {run.nproc}, and torchrun has started {started} processes here already: leave out nproc")
    if run.restarts and run.output_dir is None and not _one_start({"nproc": run.nproc, "nnodes": run.nnodes}):
        raise ValueError("restarts continue the run in its folder: give output_dir")
