"""What a run is, before it starts, and what it reached, after it has ended: rows of a table for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treetune.cli import cadence, invocation
from treetune.cli.options.commands import Score
from treetune.cli.run import Run
from treetune.core import param, tree
from treetune.core.run import loop
from treetune.core.run.lines import clock
from treetune.models.policy import Policy, weights


def describe(run: Run, start: Policy, supply: Mapping[str, str], peak: float, total_steps: int) -> dict[str, str]:
    """What is about to run, with the numbers that let two configs be compared by eye. supply: rows of the source."""
    trained, total = param.count(start.params), param.count(weights(start.params, start.frozen))
    resumed = f", resumed from {run.folder.resume.name}" if run.folder.resume else ""
    size = f"{total / 1e6:.1f} M parameters, computes in {str(start.cfg.dtype)[6:]}"
    leaves = len(tree.leaves(start.params))
    return {
        "run": f"{run.folder.root}{resumed}",
        "model": f"{run.config.model.model}: {start.family}, {size}",
        "trains": f"{trained / 1e6:.2f} M parameters in {leaves} leaves ({100 * trained / total:.2f} %)",
        "data": supply["data"],
        "step": supply["step"],
        "length": f"{total_steps} steps, {cadence.describe(run.config.optim, peak, total_steps)}",
    } | {name: text for name, text in supply.items() if name not in ("data", "step")}


def results(run: Run, outcome: loop.Outcome, total_steps: int, saved: Path) -> dict[str, str]:
    """What the run reached, where it is, and commands that go on from there."""
    history, goal = outcome.history, run.method.goal
    steps = [record for record in history if "train/loss" in record]
    seconds = sum(record["step_seconds"] for record in steps)
    rows = {"done": f"step {int(outcome.state.step)} of {total_steps} in {clock(seconds)}"}
    if outcome.stopped:
        rows["stopped"] = outcome.stopped + (": continue with --resume auto" if outcome.stopped == "interrupted" else "")
    held_out = _series(outcome, goal)
    if len(held_out) > 1:
        percent = held_out[0] and goal.endswith("loss")  # a hinge may start at 0, a reward below
        change = f" ({100 * (held_out[-1] / held_out[0] - 1):+.1f} %)" if percent else ""
        rows[f"held-out {goal}"] = f"{held_out[0]:.4f} -> {held_out[-1]:.4f}{change}, best at step {outcome.progress.best_step}"
    if seconds:
        rate = sum(record["supervised_tokens"] for record in steps) / seconds
        rows["speed"] = f"{rate:.0f} supervised tokens/s, peak memory {steps[-1]['memory_gib']:.1f} GiB"
    rows["saved"] = f"{saved}, {run.folder.root}/report.html"
    for key in run.method.shown:
        if key != goal and len(values := _series(outcome, key)) > 1:
            rows[f"held-out {key}"] = f"{values[0]:.4f} -> {values[-1]:.4f}"
    return rows


def _series(outcome: loop.Outcome, metric: str) -> list[float]:
    """A metric of the evaluations, in order."""
    return [record[f"eval/{metric}"] for record in outcome.history if f"eval/{metric}" in record]


def commands(run: Run, start: Policy, outcome: loop.Outcome, saved: Path, *, raw: bool) -> dict[str, str]:
    """Commands that continue the run and that try what was trained; raw: whether the rows were texts without a chat."""
    rows = {}
    if outcome.stopped == "interrupted" and (text := invocation.continuation(run.folder.root, overwrite=run.config.run.overwrite)):
        rows["continue with"] = text
    return rows | {"try it": _trial(run, start, saved, raw)}


def _trial(run: Run, start: Policy, saved: Path, raw: bool) -> str:
    options = run.config.data
    if "head" in start.params:
        rows = options.data[0] if options.data else "ROWS"
        return invocation.command("score", run.folder.root, "--data", rows, *_score_options(options))
    place = ("--model" if start.lora is None else "--adapter", saved)
    if raw or not start.tokenizer.chat_template:
        return invocation.command("generate", "Once upon a time", "--raw", *place)
    return invocation.command("chat", *place)


def _score_options(options: Any) -> list[Any]:
    """Options of `treetune score` for rows to be read as the run read them, where its defaults would not do so."""
    default = Score()
    names = ("format", "split", "sequence_len", "chat_template", "step_separator")
    values = {name: getattr(options, name, getattr(default, name)) for name in names}
    return [part for name, value in values.items() if value != getattr(default, name) for part in (f"--{name.replace('_', '-')}", value)]
