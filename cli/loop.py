"""The loop of a training run: steps, evaluations, checkpoints, health, and leaving in good order."""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from treetune.cli import cadence, rundir
from treetune.cli import progress as bookkeeping
from treetune.cli.errors import BadInput, RunFailed
from treetune.cli.options.run import RunOptions
from treetune.cli.screen import Screen, peak_memory_gib
from treetune.core import check, ckpt, durable, observe, shard
from treetune.core.data import loader
from treetune.core.state import Objective, TrainState

BEST = "best.json"
SHOWN_UNKNOWN = ("loss", "grad_norm", "completions/")  # null in a record where not known; other numbers are left out
Progress = bookkeeping.Progress
Cursor = bookkeeping.Cursor


class Job(NamedTuple):
    """What a method hands to the loop: its functions, its stream of micro-batches, and how to describe its base."""

    step: Callable
    evaluate: Callable[[TrainState], dict[str, torch.Tensor]] | None
    objective: Objective
    batches: Callable[[Cursor], Iterator[tuple[list, Cursor]]]  # from a cursor: (micro-batches of a step, cursor after it)
    total_steps: int
    meta: dict  # stored in checkpoints: what the run was made with
    device: torch.device
    rank: int = 0
    start: Cursor = loader.START  # of a new run; a checkpoint's cursor is one of its kind
    prepare: Callable | None = None  # what a step does to its micro-batches first
    between: Callable[[TrainState, dict, int], TrainState] | None = None  # after each step
    perplexity: bool = True
    roll: Callable[[TrainState, int], tuple[list, dict]] | None = None  # micro-batches of a step from the state itself, and their metrics
    carry: Callable[[], dict] | None = None  # what `roll` needs to go on from a checkpoint, as JSON
    mark: Callable[[Cursor], dict] | None = None  # which rows of a stream are read at a cursor, as JSON
    goal: str = "loss"  # what evaluations compare: a metric named loss, which should fall, or a reward, which should rise


class Outcome(NamedTuple):
    """How the loop ended: `stopped` says why when it was before the last step; `signum` when a signal asked for it."""

    state: TrainState
    progress: Progress
    stopped: str | None
    signum: int | None
    history: list[dict]


@contextlib.contextmanager
def _signals(screen: Screen):
    """Collect SIGINT and SIGTERM in a list; the second SIGINT interrupts at once."""
    seen: list[int] = []

    def handler(signum, _):
        if signum == signal.SIGINT and seen:
            raise KeyboardInterrupt
        seen.append(signum)
        screen.interrupt(f"{signal.Signals(signum).name}: saving after this step; Ctrl-C again leaves at once")

    old = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for signum, previous in old.items():
            signal.signal(signum, previous)


class _Loop:
    """One pass of the loop; a class because it has a lifetime: open files, a clock, what was last saved."""

    def __init__(self, job: Job, run: rundir.RunDir, options: RunOptions, screen: Screen, progress: Progress):
        self.job, self.run, self.options, self.screen, self.progress = job, run, options, screen, progress
        self.recorder = observe.Recorder(run.metrics if job.rank == 0 else None, self._derive)
        self.fired: set[str] = set()
        self.over, self.saved, self.first = 0, None, 0
        self.previous: list = []

    def _derive(self, record: dict) -> dict:
        """Names of the documents, rates, and memory, once a step's numbers are on the host."""
        seconds = max(record["step_seconds"], 1e-9)
        tokens = self.progress.tokens_seen + int(record["num_tokens"])
        self.progress = self.progress._replace(tokens_seen=tokens)
        rates = {"tokens_per_second": record["num_tokens"] / seconds, "supervised_tokens_per_second": record["supervised_tokens"] / seconds}
        renamed = {("train/loss" if key == "loss" else key): value for key, value in _known(record).items() if key != "num_tokens"}
        return renamed | rates | {"num_tokens": tokens, "memory_gib": peak_memory_gib(self.job.device)}

    def record(self, record: dict | None, state: TrainState, eta_s: float) -> None:
        """Show a finished step and act on it: stop on numbers that are not finite, dead leaves, or the watchdog."""
        if record is None:
            return
        if record["skipped"]:
            raise RunFailed(f"step {record['step']} is not finite, no weight was changed: {self._explain(state)}; {self._where()}")
        known = record["train/loss"] != 0 and self.job.roll is None  # a hinge at 0, or rewards that are all the same, teach nothing
        if record["step"] == 2 and record["dead_leaves"] and known:
            self._require_alive(state)
        if record["step"] > self.first + 1:  # its loss is that of weights which a step of this run has changed
            self._settle()
        self.screen.step(record, eta_s)
        self.tell_health()
        self._watchdog(record)

    def _settle(self) -> None:
        if self.job.rank == 0:
            rundir.settle(self.run)

    def require_finite(self, state: TrainState) -> None:
        """Fail on weights or moments that are not finite, before anything is made of them."""
        moved = {"params": state.params, "opt": state.opt}
        bad = not bool(check.finite(moved))
        if shard.any_flag(bad, self.job.device) if torch.distributed.is_initialized() else bad:
            names = check.not_finite(moved)[:3] or ["leaves of another rank"]
            fix = "lower learning_rate, or lengthen the warm-up"
            raise RunFailed(
                f"the update of step {int(state.step)} is not finite in {', '.join(names)}: {fix}; nothing of it was saved; {self._where()}"
            )

    def _require_finite_loss(self, state: TrainState) -> None:
        """Fail where the last update leaves finite weights that compute a loss which is not: no step follows that would show it."""
        if text := observe.find_not_finite_loss(self.job.objective, state, self._prepared(state)[:1]):
            raise RunFailed(
                f"after the update of step {int(state.step)} {text}: lower learning_rate; nothing of it was saved; {self._where()}"
            )

    def _require_alive(self, state: TrainState) -> None:
        if dead := observe.dead_leaves(self.job.objective, state, self._prepared(state)):
            raise RunFailed(f"{len(dead)} trainable leaves get no gradient, the first are {', '.join(dead[:3])}")

    def _explain(self, state: TrainState) -> str:
        return observe.find_not_finite(self.job.objective, state, self._prepared(state))

    def _prepared(self, state: TrainState) -> list:
        """The micro-batches of the last step as its gradient saw them."""
        with torch.no_grad():
            return self.previous if self.job.prepare is None else self.job.prepare(state, self.previous)

    def _where(self) -> str:
        found = ckpt.steps(self.run.checkpoints)
        return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def tell_health(self) -> None:
        """Print each health rule the first time it fires."""
        for event in observe.health(self.recorder.history, quiet=self.fired):
            self.fired.add(event.rule)
            self.screen.warn(f"{event.seen}: {event.fix}")

    def _watchdog(self, record: dict) -> None:
        limit = self.options.loss_watchdog_threshold
        if limit is not None:
            self.over = self.over + 1 if record["train/loss"] > limit else 0
            if self.over >= self.options.loss_watchdog_patience:
                raise RunFailed(f"train/loss was above {limit} for {self.over} steps, up to step {record['step']}; {self._where()}")

    def evaluate(self, state: TrainState) -> str | None:
        """Evaluate, keep the best, and say why to stop if patience ran out."""
        if self.job.evaluate is None:
            return None
        step, start = int(state.step), time.perf_counter()
        with self.screen.busy("evaluating what is held out"):
            values = {key: value.item() for key, value in self.job.evaluate(state).items()}
        found = {f"eval/{key}": value for key, value in _known(values).items()}
        record = {"step": step, **found} | ({"eval/perplexity": math.exp(min(found["eval/loss"], 700.0))} if self.job.perplexity else {})
        self.recorder.note(record | {"eval/seconds": time.perf_counter() - start})
        goal, value = self.job.goal, found.get(f"eval/{self.job.goal}", math.nan)  # of no answer a reward may be known
        self.screen.line(f"held out, step {step}: {goal} {value:.4f}  {self._own(record)}".rstrip(), "bold")
        self.tell_health()
        best = self.progress.best
        better = value == value and (best is None or (value < best if goal.endswith("loss") else value > best))
        found_best = {"best": value, "best_step": step, "bad_evals": 0}
        self.progress = self.progress._replace(**found_best if better else {"bad_evals": self.progress.bad_evals + 1})
        if better and step:
            self.save(state)
        patience = self.options.early_stopping_patience
        return f"eval/{goal} has not improved in {patience} evaluations" if patience and self.progress.bad_evals >= patience else None

    def _own(self, record: dict) -> str:
        """What there is to say about an evaluation besides its loss."""
        if not self.job.perplexity:
            return self.screen.own({key: value for key, value in record.items() if key != f"eval/{self.job.goal}"}, "eval/")
        accuracy = f"accuracy {record['eval/mean_token_accuracy']:.3f}" if "eval/mean_token_accuracy" in record else ""
        return f"perplexity {record['eval/perplexity']:.2f}  {accuracy}"

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, unless this step has one; drop those beyond the limit, never the best."""
        step = int(state.step)
        if self.saved == step:
            return
        meta = self.job.meta | {"progress": bookkeeping.stored(self.progress)}
        meta |= {"rollout": self.job.carry()} if self.job.carry else {}
        meta |= {"rows": self.job.mark(self.progress.cursor)} if self.job.mark else {}
        try:
            if self.job.rank == 0:
                self._flush_records()
            ckpt.save(self.run.checkpoints, state, meta, rank=self.job.rank)
            self.saved = step
            if self.job.rank == 0:
                self._prune()
        except OSError as error:
            raise BadInput(str(error)) from error

    def _flush_records(self) -> None:
        """On the disk before the checkpoint that a resume continues them from."""
        for path in (self.run.metrics, self.run.samples):
            if path.exists():
                durable.fsync(path)
        durable.fsync(self.run.root)

    def restore_best(self) -> None:
        """Write best.json anew from the checkpoint's bookkeeping, on which alone a run depends."""
        file, best = self.run.root / BEST, self._best()
        if file.exists() and not _is_record(file):
            self.screen.warn(f"{file} was damaged and is {'dropped' if best is None else 'written anew'}")
        if best is None:
            file.unlink(missing_ok=True)
        else:
            rundir.write(file, self._described_best(best))

    def _best(self) -> Path | None:
        """The checkpoint of the best evaluation, where there is one."""
        found = None if self.progress.best_step is None else self.run.checkpoints / f"step_{self.progress.best_step:06d}"
        return found if found is not None and found.exists() else None

    def _prune(self) -> None:
        best = self._best()
        ckpt.prune(self.run.checkpoints, self.options.save_total_limit, best=best)
        if best is not None:
            rundir.write(self.run.root / BEST, self._described_best(best))

    def _described_best(self, best: Path) -> str:
        return json.dumps({"checkpoint": best.name, f"eval_{self.job.goal}": self.progress.best})

    def steps(self, state: TrainState, seen: list[int]) -> Outcome:
        """Run to the last step, or to a reason to stop."""
        first, begun, total, stopped = int(state.step), time.perf_counter(), self.job.total_steps, None
        mark, self.first = begun, first
        for index, (micro_batches, cursor) in enumerate(self.job.batches(self.progress.cursor) if first < total else (), first + 1):
            rolled = {}
            if self.job.roll is not None:
                micro_batches, rolled = self.job.roll(state, index)
            state, metrics = self.job.step(state, micro_batches)
            state = state if self.job.between is None else self.job.between(state, metrics, index)
            now = time.perf_counter()
            done = self.recorder.push(index, metrics | rolled | {"epoch": self.progress.cursor.epoch, "step_seconds": now - mark})
            mark, eta_s = now, (now - begun) / (index - first) * (total - index)
            self.record(done, state, eta_s)
            self.previous, ended = micro_batches, cursor.epoch != self.progress.cursor.epoch
            epoch_ended = ended and cadence.pauses(index, self.progress.paused, total)
            self.progress = self.progress._replace(cursor=cursor, paused=index if epoch_ended else self.progress.paused)
            leaving = _any_rank(bool(seen), index, self.job)
            if leaving or index == total or self._due(index, epoch_ended):
                stopped, mark = self._pause(state, index, epoch_ended, leaving, eta_s), time.perf_counter()
            if leaving or index == total or stopped:
                break
        if seen and int(state.step) < total:
            stopped = "interrupted"
        return Outcome(state, self.progress, stopped, seen[0] if seen else None, self.recorder.history)

    def _pause(self, state: TrainState, index: int, epoch_ended: bool, leaving: bool, eta_s: float) -> str | None:
        """Catch up with the metrics, then evaluate and save as is due; why to stop, if the evaluation says so."""
        done, last, stopped = self.recorder.flush(), index == self.job.total_steps, None
        if done is not None and not done["skipped"]:
            self.require_finite(state)
            if last:
                self._require_finite_loss(state)
            self._settle()
        self.record(done, state, eta_s)
        if last or _on(index, epoch_ended, self.options.eval_steps):
            stopped = self.evaluate(state)
        if last or leaving or stopped or _on(index, epoch_ended, self.options.save_steps):
            self.save(state)
        return stopped

    def _due(self, index: int, epoch_ended: bool) -> bool:
        return _on(index, epoch_ended, self.options.eval_steps) or _on(index, epoch_ended, self.options.save_steps)


def _is_record(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()).get("checkpoint"), str)
    except (ValueError, AttributeError, RecursionError):
        return False


def _known(record: dict) -> dict:
    """The record without numbers of which nothing was counted, and with the margin of rates that were counted apart."""
    known = {key: value for key, value in record.items() if value == value or key.startswith(SHOWN_UNKNOWN)}
    if "rewards/margins" not in known and {"rewards/chosen", "rewards/rejected"} <= known.keys():
        known["rewards/margins"] = known["rewards/chosen"] - known["rewards/rejected"]
    return known


def _on(index: int, epoch_ended: bool, every: int | None) -> bool:
    """Whether something that happens `every` so many steps (None: at each epoch's end) happens now."""
    return epoch_ended if every is None else index % every == 0


def _any_rank(flag: bool, step: int, job: Job) -> bool:
    """Whether any rank saw a signal: all must leave the loop at the same step. Several ranks ask each other every 8 steps."""
    if not torch.distributed.is_initialized():
        return flag
    return step % 8 == 0 and shard.any_flag(flag, job.device)


def run(job: Job, state: TrainState, where: rundir.RunDir, options: RunOptions, screen: Screen, meta: dict | None) -> Outcome:
    """Train from `state` to the end. `meta` is that of the checkpoint it came from, None for a fresh start."""
    progress = Progress(job.start) if meta is None else bookkeeping.read(meta, job.start, where.resume)
    loop = _Loop(job, where, options, screen, progress)
    for text in where.notes:
        screen.warn(text)
    if job.rank == 0 and meta is not None:
        if any(path.name > f"step_{int(state.step):06d}" for path in ckpt.numbered(where.checkpoints)):
            screen.warn(f"back to step {int(state.step)}: the later checkpoints and records of {where.root} are dropped")
        history, broken = rundir.rewind(where, int(state.step))
        loop.recorder.history += history
        loop.restore_best()
        for text in broken:
            screen.warn(text)
    loop.saved = int(state.step) if meta is not None else None
    with _signals(screen) as seen:
        if meta is None:
            loop.evaluate(state)
        screen.start(job.total_steps, int(state.step))
        try:
            return loop.steps(state, seen)
        finally:
            screen.stop()


def restore(where: rundir.RunDir, state: TrainState, start: Cursor = loader.START) -> tuple[TrainState, dict | None]:
    """The state and meta of the checkpoint to resume from; unchanged for a new run."""
    if where.resume is None:
        return state, None
    state, meta = ckpt.load(where.resume, state)
    bookkeeping.read(meta, start, where.resume)
    if not check.finite({"params": state.params, "opt": state.opt}):
        raise ValueError(f"{where.resume} holds weights or moments that are not finite: {ckpt.FIX}")
    return state, meta
