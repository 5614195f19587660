"""Where a run stands, as the files of its folder tell."""

from pathlib import Path

from treetune.core import ckpt, records
from treetune.core.run import folder
from treetune.core.run.lines import clock


def describe(path: Path) -> dict[str, str]:
    """Lines by name for a run folder: steps, losses, checkpoints."""
    run_dir = folder.RunDir(path, None)
    history = records.read(run_dir.metrics, numbers=True).records
    steps = [record for record in history if "train/loss" in record]
    losses = [record["eval/loss"] for record in history if "eval/loss" in record]
    rows = {"run": str(path), "checkpoints": ", ".join(checkpoint.name for checkpoint in ckpt.steps(run_dir.checkpoints)) or "none"}
    if steps:
        seconds, tokens = sum(record.get("step_seconds", 0) for record in steps), int(steps[-1].get("num_tokens", 0))
        rows["steps"] = f"{steps[-1]['step']} in {clock(seconds)}, {tokens} tokens"
        rows["train loss"] = f"{steps[0]['train/loss']:.4f} -> {steps[-1]['train/loss']:.4f}"
    if losses:
        rows["held-out loss"] = f"{losses[0]:.4f} -> {losses[-1]:.4f}, best {min(losses):.4f}"
    return rows
