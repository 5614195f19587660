"""One run of any method from its config: `fit(config) -> Result`, for the command line, a notebook, a thread or a test."""

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from treetune.cli import artifacts, assembly, cadence, document_source, requirements, sample_answer, setup, summary
from treetune.cli.assembly import Assembly
from treetune.cli.errors import checking_input, running
from treetune.cli.methods import METHODS, of_config
from treetune.cli.run import Run
from treetune.core import import_path, masking
from treetune.core.config import reading, table
from treetune.core.run import folder, loop, ranks, report, signals
from treetune.core.run import observers as trackers
from treetune.core.run.observers import MetricsFile, Observer, Observers, SamplesFile
from treetune.core.run.recorder import Record
from treetune.core.run.source import Source
from treetune.core.state import TrainState
from treetune.models.policy import Policy

SHOWN = 8  # documents in the report


class Result(NamedTuple):
    """What a run leaves.

    policy: as trained, to sample from, to save, or to train on. history: the records of steps and evaluations. folder: the run folder.
    stopped: the reason where the run ended before its last step; signum: the signal that asked for it.
    """

    policy: Policy
    state: TrainState
    history: list[Record]
    folder: Path
    stopped: str | None = None
    signum: int | None = None


def configure(method: str, **options: Any) -> Any:
    """The config of a method: configure("sft", model="path", data=["chats.jsonl"], max_steps=100).

    Options have the names of a config file and are read as it is. Errors: ValueError for an unknown method or option, or a wrong value.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    return reading.from_values(method, METHODS[method].config, options)


def fit(config: Any, *, observers: Iterable[Any] = (), source: Source | None = None) -> Result:
    """Train by the method whose config this is, and leave a run folder.

    observers: told of the run as it goes: `Screen()`, a tracker (`core.run.observers`). source: micro-batches in place of the config's
    data. Prints nothing, handles no signals, and works in any thread. Errors: ValueError for bad input, RunFailed for a run that cannot
    go on.
    """
    with checking_input():
        defaults = table.defaults(type(config))
        options = frozenset(name for name, value in table.flatten(config).items() if value != defaults[name])
        config = requirements.complete(config, options)
    return run(config, observers=observers, source=source, options=options)


def run(
    config: Any,
    *,
    observers: Iterable[Any] = (),
    source: Source | None = None,
    options: frozenset[str] = frozenset(),
    interrupted: Callable[[str], None] | None = None,
) -> Result:
    """`fit` of a config that is checked already.

    options: names of those that the user set; one that the rows would ignore is refused. interrupted: told of SIGINT and SIGTERM, which
    then end the run after the step; None leaves signals alone.
    """
    with contextlib.ExitStack() as stack:
        with checking_input():
            this = begin(config, observers, options, stack)
            parts = assembly.assemble(this, source, stack)
            answer = sample_answer.prepare(this, parts.policy, parts.data, parts.stop_ids)
            kept = artifacts.extras(config, parts.policy)  # better refused now than when all is trained
            ranks.barrier(this.ranks)  # every rank has read what it resumes from
            ranks.share(this.ranks, partial(_create, this, parts.policy))
            this.observers.add(*_files(this, parts))
        with running(this.folder.root):
            outcome = _train(this, parts, answer, interrupted)
            saved = artifacts.save(this, parts.policy, outcome.state, kept)
            _finish(this, parts, answer, outcome, saved)
        trained = parts.policy._replace(params=outcome.state.params, frozen=outcome.state.frozen)
        return Result(trained, outcome.state, outcome.history, this.folder.root, outcome.stopped, outcome.signum)


def begin(config: Any, told: Iterable[Any], options: frozenset[str], stack: contextlib.ExitStack) -> Run:
    """The device, the ranks and the folder of a run."""
    device, method = setup.device(config.model.device), of_config(config)
    world = ranks.join_ranks(device)
    request = folder.Request(
        method.name,
        config.run.output_dir,
        config.run.resume,
        config.run.overwrite,
        read=partial(requirements.inputs, config),
    )
    run_dir = stack.enter_context(folder.hold(request, share=partial(ranks.share, world)))
    group = Observers()
    if world.rank == 0:
        group.append(*(trackers.of(one, getattr(one, "__name__", type(one).__name__), group.warn) for one in told))
        group.append(*(trackers.of(import_path.load(path), path, group.warn) for path in config.run.observer))
    return Run(config, method, options, device, world, group, run_dir)


def _create(this: Run, start: Policy) -> None:
    """Begin the run in its folder."""
    # How a run was started (--resume, --overwrite) is not what it is.
    text = reading.to_yaml(this.config, without=("resume", "overwrite"))
    folder.create(this.folder, masking.mask_secrets(text), makes=("model" if start.lora is None else "adapter",))


def _files(this: Run, parts: Assembly) -> tuple[Observer, ...]:
    """The observers that write the files of the run folder, on the first rank."""
    if this.ranks.rank > 0:
        return ()
    completions = getattr(getattr(this.config, "pipeline", None), "log_completions", True)
    page = report.Report(
        this.folder.root,
        docs=parts.data.train[:SHOWN],
        tokenizer=parts.policy.tokenizer,
        read=document_source.reading_of(this),
        unit=this.method.unit,
    )
    return MetricsFile(this.folder.metrics), SamplesFile(this.folder.samples, completions=completions), page


def _train(this: Run, parts: Assembly, answer: Callable, interrupted: Callable[[str], None] | None) -> loop.Outcome:
    options, method = this.config.run, this.method
    settings = loop.Settings(
        options.eval_steps,
        options.save_steps,
        options.save_total_limit,
        options.early_stopping_patience,
        options.loss_watchdog_threshold,
        options.loss_watchdog_patience,
        method.goal,
        method.perplexity,
    )

    def before(state: TrainState) -> None:
        for text in (
            *cadence.warnings(this.config, parts.peak, parts.supply.source.total_steps, evaluated=parts.supply.evaluate is not None),
            *this.folder.notes,
        ):
            this.observers.warn(text)
        parts.supply.start(state)
        if parts.hooks.resumed is None:
            answer(state)

    with contextlib.ExitStack() as stack:
        stop = loop.never if interrupted is None else stack.enter_context(signals.caught(interrupted))
        hooks = parts.hooks._replace(before=before, stop=stop)
        return loop.run(
            parts.step,
            parts.supply.source,
            parts.state,
            evaluate=parts.supply.evaluate,
            observers=this.observers,
            folder=this.folder,
            settings=settings,
            hooks=hooks,
        )


def _finish(this: Run, parts: Assembly, answer: Callable, outcome: loop.Outcome, saved: Path) -> None:
    """Answer the sample prompt once more and report; a failure here loses nothing, since what trained is saved."""
    try:
        answer(outcome.state)
    except (ValueError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        this.observers.warn(f"the sample answer failed, the trained weights are saved: {reason}")
    rows = summary.results(this, outcome, parts.supply.source.total_steps, saved)
    if warnings := cadence.warnings(this.config, parts.peak, parts.supply.source.total_steps, evaluated=parts.supply.evaluate is not None):
        rows["warning"] = "; ".join(warnings)  # its line at the start went by
    rows |= summary.commands(this, parts.policy, outcome, saved, raw=parts.data.format == "completion")
    this.observers.summary(rows, outcome.history)
    ranks.barrier(this.ranks)
