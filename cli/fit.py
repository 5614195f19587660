"""One run of any method from its config: `fit(config) -> Result`, for the command line, a notebook, a thread or a test."""

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from treetune.cli import (
    answering,
    assembly,
    document_source,
    hub,
    invocation,
    memory_check,
    memory_ladder,
    requirements,
    run_file,
    trackers,
)
from treetune.cli.assembly import Assembly
from treetune.cli.methods import CONFIGS, METHODS, of_config
from treetune.cli.options import meshes
from treetune.cli.options import run as run_options
from treetune.cli.run import Run, TrainConfig, TrainRun
from treetune.core import hub_repos, import_path, machine, masking, shard, tree
from treetune.core.config import reading, table
from treetune.core.run import cadence, folder, journal, launch, loop, profiling, ranks, report, signals, stalls, summary
from treetune.core.run import observers as run_observers
from treetune.core.run.errors import checking_input, running
from treetune.core.run.observers import MetricsFile, Observer, Observers, SamplesFile
from treetune.core.run.recorder import Record
from treetune.core.run.source import Source
from treetune.core.run.uploads import Uploads
from treetune.core.state import TrainState
from treetune.models import loading, memory
from treetune.models import policy as policies
from treetune.models.policy import Policy

SHOWN = 8  # documents in the report


class Result(NamedTuple):
    """What a run leaves.

    policy: as trained, to sample from, to save, or to train on. history: the records of steps and evaluations. folder: the run folder.
    stopped: the reason where the run ended before its last step; signum: the signal that asked for it. unsent: why it is not on the hub,
    where it should be, and what uploads it.
    """

    policy: Policy
    state: TrainState
    history: list[Record]
    folder: Path
    stopped: str | None = None
    signum: int | None = None
    unsent: str = ""


def configure(method: str, **options: Any) -> Any:
    """The config of a method: configure("sft", model="path", data=["chats.jsonl"], max_steps=100).

    Options have the names of a config file and are read as it is. Errors: ValueError for an unknown method or option, or a wrong value.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    return reading.from_values(method, METHODS[method].config, options)


def fit(config: TrainConfig, *, observers: Iterable[Any] = (), source: Source | None = None) -> Result:
    """Train by the method whose config this is, and leave a run folder.

    observers: told of the run as it goes: `Screen()`, a tracker (`core.run.observers`). source: micro-batches in place of the config's
    data. Prints nothing (warnings go to `logging` where no observer takes lines), handles no signals, and works in any thread.
    Errors: ValueError for bad input, RunFailed for a run that cannot go on.
    """
    with checking_input():
        config = reading.reread(of_config(config).name, config)
        defaults = table.defaults(type(config))
        options = frozenset(name for name, value in table.flatten(config).items() if value != defaults[name])
        config = requirements.complete(config, CONFIGS[type(config)], options)
        _check_source(source, config)
        _check_torch()
    return run(config, observers=observers, source=source, options=options)


def _check_source(source: Source | None, config: TrainConfig) -> None:
    """Raise ValueError for a length of the run that is not that of its source, and for parts of epochs of one that knows no epochs."""
    if source is None:
        return
    if config.optim.max_steps not in (None, source.total_steps):
        raise ValueError(f"max_steps is {config.optim.max_steps}, but the source has {source.total_steps} steps: leave max_steps out")
    if getattr(source, "passes", None) is None and (name := run_options.per_epoch(config.run)):
        raise ValueError(
            f"{name} needs a source that has passes(step), and {type(source).__name__} has none: {run_options.PER_EPOCH[name]}"
        )


def _check_torch() -> None:
    """Raise ValueError for settings of the process in which nothing trains, or not with the numbers of the command line."""
    if not torch.is_grad_enabled():
        raise ValueError("gradients are off: call fit outside of torch.no_grad and torch.inference_mode")
    if torch.get_default_dtype() != torch.float32:
        raise ValueError(f"the default dtype is {torch.get_default_dtype()}; a run needs torch.set_default_dtype(torch.float32)")


def run(
    config: TrainConfig,
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
            repo = hub.repo_of(config, this.ranks)
            if text := memory_check.check(config, this.device.type, shard.size(this.ranks.mesh, "data")):
                this.observers.warn(text)
            parts = assembly.assemble(this, source, stack)
            answer, evaluate = answering.of_sample_prompt(this, parts), answering.evaluation(this, parts, stack)
            parts = parts._replace(supply=parts.supply._replace(evaluate=evaluate))
            extras = assembly.extras(this, parts.policy)  # better refused now than when all is trained
            ranks.barrier(this.ranks)  # every rank has read what it resumes from
            ranks.share(this.ranks, partial(_create, this, parts.policy))
            this.observers.add(*_files(this, parts))
            described = hub.facts(this, parts)
            sent = hub.uploads_of(this, repo)
            if sent is not None:
                this.observers.append(sent)
                stack.callback(sent.abandon)
        limit, root = config.run.rank_timeout, this.folder.root
        with (
            running(root, partial(_advise, this, parts.state)),
            stalls.watched(this.ranks.rank, this.ranks.world, limit, root, device=this.device.type),
        ):
            outcome = _train(this, parts, answer, interrupted, hub.exporter(this, parts, extras, sent))
            shown = parts.shown(outcome.state)
            described |= hub.metrics(outcome.history, this.method, int(outcome.state.step))
            saved = _save(this, parts.policy, shown, extras, described)
            this.observers.saved(saved, None)
            _finish(this, parts, answer, outcome, saved)
            unsent = "" if sent is None else _upload(this, sent, saved)
        trained = parts.policy._replace(params=shown.params, frozen=shown.frozen)
        return Result(trained, outcome.state, outcome.history, this.folder.root, outcome.stopped, outcome.signum, unsent)


def _advise(this: TrainRun, state: TrainState) -> str:
    """Tell what to try where memory has run out, the whole ladder to the observers; the first thing in words."""
    device = this.device.type
    held = memory.size(state.params, device) + memory.size(state.frozen, device)
    ladder = memory_ladder.climb(this.config, device, held=held)
    lines = memory_ladder.lines(ladder, memory_ladder.capacity(device))
    this.observers.tell("advise", lines)
    for text in lines:
        this.observers.message(text)
    return memory_ladder.first(ladder)


def begin(config: TrainConfig, told: Iterable[Any], options: frozenset[str], stack: contextlib.ExitStack) -> TrainRun:
    """The device, the ranks and the folder of a run."""
    device, method = loading.select_device(config.model.device), of_config(config)
    if config.run.nproc * config.run.nnodes > 1 and not launch.inside():
        raise ValueError("nproc and nnodes are for the command line, which starts processes: start those of a Python program with torchrun")
    if device.type == "cuda":
        machine.join_segments()
    world = ranks.join_ranks(device, meshes.sizes(config.run), config.run.rank_timeout)
    request = table.record(folder.Request, config, name=method.name, read=partial(requirements.inputs, config))
    run_dir = stack.enter_context(folder.hold(request, share=partial(ranks.share, world)))
    group = Observers()
    if world.rank == 0:
        group.append(journal.Journal(run_dir.root, method=method.name, goal=method.goal, level=config.run.log_level))
        group.append(*(run_observers.of(one, getattr(one, "__name__", type(one).__name__), group.warn) for one in told))
        group.append(*(run_observers.of(import_path.load(path), path, group.warn) for path in config.run.observer))
        trackers.attach(group, config, run_dir, stack)
    return Run(config, method, options, device, world, group, run_dir)


def _result_name(start: Policy) -> str:
    """The name of the folder of what trained, in the run folder."""
    return "model" if start.leaves_model else "adapter"


def _create(this: TrainRun, start: Policy) -> None:
    """Begin the run in its folder."""
    text = reading.to_yaml(this.config, without=(*run_options.STARTS, *table.secrets(type(this.config))))
    folder.create(this.folder, masking.mask_secrets(f"{run_file.METHOD}: {this.method.name}\n{text}"), makes=(_result_name(start),))


def _files(this: TrainRun, parts: Assembly) -> tuple[Observer, ...]:
    """The observers that write the files of the run folder, on the first rank."""
    if this.ranks.rank > 0:
        return ()
    completions = table.flatten(this.config).get("log_completions", True)
    page = report.Report(
        this.folder.root,
        docs=parts.data.train[:SHOWN],
        tokenizer=parts.policy.tokenizer,
        read=document_source.reading_of(this),
        unit=this.method.unit,
    )
    return MetricsFile(this.folder.metrics), SamplesFile(this.folder.samples, completions=completions), page


def _train(
    this: TrainRun,
    parts: Assembly,
    answer: Callable[[TrainState], object],
    interrupted: Callable[[str], None] | None,
    export: Callable[[TrainState], None],
) -> loop.Outcome:
    """All steps of the run, or those up to a reason to stop."""

    def before(state: TrainState) -> None:
        for text in _facts(this):
            this.observers.debug(text)
        for text in (*_warnings(this, parts), *this.folder.notes):
            this.observers.warn(text)
        parts.supply.start(state)
        if parts.hooks.resumed is None:
            answer(parts.shown(state))

    with contextlib.ExitStack() as stack:
        stop = loop.never if interrupted is None else stack.enter_context(signals.caught(interrupted))
        return loop.run(
            parts.step,
            _watched(this, parts.supply.source, stack),
            parts.state,
            evaluate=parts.supply.evaluate,
            observers=this.observers,
            folder=this.folder,
            settings=table.record(loop.Settings, this.config, goal=this.method.goal, perplexity=this.method.perplexity),
            hooks=parts.hooks._replace(before=before, stop=stop, export=export),
        )


def _facts(this: TrainRun) -> list[str]:
    """The machine, and the options that are not as they are by default: lines for those who look for a fault."""
    if this.config.run.log_level != journal.DEBUG:
        return []
    defaults, hidden = table.defaults(type(this.config)), table.secrets(type(this.config))
    options = {name: value for name, value in table.flatten(this.config).items() if value != defaults[name] and name not in hidden}
    return [f"{name}: {value}" for name, value in (machine.describe() | {f"option {name}": one for name, one in options.items()}).items()]


def _watched(this: TrainRun, source: Source, stack: contextlib.ExitStack) -> Source:
    """The source as those see it who look inside a run: profiled, and with its time in the log; itself where nobody looks."""
    options, before = this.config.run, lambda index: None
    if this.ranks.rank > 0 or not (options.profiler_steps or options.log_level == journal.DEBUG):
        return source
    if (steps := profiling.span(options.profiler_steps, options.profiler_steps_start)) is not None:
        profile = profiling.Profile(this.folder.root, steps, this.device, this.say)
        stack.callback(profile.end)
        before = profile.before

    def after(index: int, seconds: float) -> None:
        this.observers.debug(f"step {index}: its micro-batches took {seconds:.3f} s")

    return cast(Source, profiling.Watched(source, before, after))


def _warnings(this: TrainRun, parts: Assembly) -> list[str]:
    """What the run never reaches."""
    passes = getattr(parts.supply.source, "passes", None)
    passed = None if passes is None else passes(parts.supply.source.total_steps)
    intervals = table.record(cadence.Intervals, this.config, passed=passed)
    warnings = cadence.warnings(parts.rate, intervals, evaluated=parts.supply.evaluate is not None and intervals.evals_per_epoch != 0)
    steps = profiling.span(this.config.run.profiler_steps, this.config.run.profiler_steps_start)
    if steps is not None and steps.first > parts.rate.total_steps:
        warnings = [*warnings, f"there is no profile: its first step is {steps.first}, and the run has {parts.rate.total_steps}"]
    return warnings


def _save(this: TrainRun, start: Policy, state: TrainState, extras: dict[str, Any], described: dict[str, Any]) -> Path:
    """Write what trained, with its card, into the run folder, in place of an earlier result. The folder written."""
    path = this.folder.root / _result_name(start)
    save = partial(policies.save, policies.bare(start), params=state.params, frozen=state.frozen, **extras)
    if this.ranks.rank == 0:
        hub.leave(path, save, described)
    elif any(shard.distributed(leaf) for leaf in tree.leaves(state.params)):
        save(None)  # gathering sharded leaves is a collective
    return path


def _upload(this: TrainRun, sent: Uploads, saved: Path) -> str:
    """Upload what the run has left; why it did not arrive, and what uploads it by hand, empty where it did."""
    place = hub_repos.address(sent.repo)
    with this.observers.busy(f"uploading to {place}"):
        reason = sent.finish(saved)
    if not reason:
        this.say(f"uploaded {saved} to {place}")
        return ""
    text = f"what trained is safe in {saved}, and not on the hub: {reason}; {hub.by_hand(saved, sent.repo)} uploads it"
    this.observers.warn(text)
    return text


def _finish(this: TrainRun, parts: Assembly, answer: Callable[[TrainState], object], outcome: loop.Outcome, saved: Path) -> None:
    """Answer the sample prompt once more and report; a failure here loses nothing, since what trained is saved."""
    try:
        answer(parts.shown(outcome.state))
    except (ValueError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        this.observers.warn(f"the sample answer failed, the trained weights are saved: {reason}")
    rows = summary.results(outcome, parts.rate.total_steps, saved, goal=this.method.goal, shown=this.method.shown)
    if warnings := _warnings(this, parts):
        rows["warning"] = "; ".join(warnings)  # its line at the start went by
    this.observers.summary(rows | _commands(this, parts, outcome, saved), outcome.history)
    ranks.barrier(this.ranks)


def _commands(this: TrainRun, parts: Assembly, outcome: loop.Outcome, saved: Path) -> dict[str, str]:
    """Commands that continue the run and that try what was trained."""
    rows, start = {}, parts.policy
    named = {"overwrite": this.config.run.overwrite, "secrets": table.secrets(type(this.config))}
    if outcome.stopped == "interrupted" and (text := invocation.continuation(this.folder.root, **named)):
        rows["continue with"] = text
    chat = parts.data.format != "completion" and bool(start.tokenizer.chat_template)
    kind = {"scores": "head" in start.params, "adapter": not start.leaves_model, "chat": chat}
    return rows | {"try it": invocation.trial(this.config.data, saved, **kind)}
