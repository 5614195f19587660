"""What a run is, before it starts, and what it reached, after it has ended: rows of a table for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from treetune.core.run import cadence, loop
from treetune.core.run.folder import RunDir
from treetune.core.run.lines import clock


def describe(run: RunDir, model: Mapping[str, str], supply: Mapping[str, str], rate: cadence.Rate) -> dict[str, str]:
    """What is about to run, with the numbers that let two configs be compared by eye.

    model: rows of what trains. supply: rows of the source, "data" and "step" among them.
    """
    resumed = f", resumed from {run.resume.name}" if run.resume else ""
    length = f"{rate.total_steps} steps, {cadence.describe(rate)}"
    shape = {"data": supply["data"], "step": supply["step"], "length": length}
    return {"run": f"{run.root}{resumed}"} | dict(model) | shape | {name: text for name, text in supply.items() if name not in shape}


def results(outcome: loop.Outcome, total_steps: int, saved: Path, *, goal: str, shown: Sequence[str]) -> dict[str, str]:
    """What the run reached, and where it is. goal: the metric that the best checkpoint follows; shown: others worth a row."""
    history = outcome.history
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
    rows["saved"] = f"{saved}, {saved.parent}/report.html"
    for key in shown:
        if key != goal and len(values := _series(outcome, key)) > 1:
            rows[f"held-out {key}"] = f"{values[0]:.4f} -> {values[-1]:.4f}"
    return rows


def _series(outcome: loop.Outcome, metric: str) -> list[float]:
    """A metric of the evaluations, in order."""
    return [record[f"eval/{metric}"] for record in outcome.history if f"eval/{metric}" in record]
