"""`treetune info`: this machine, or a model, an adapter or a run, in a few lines."""

import math
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from treetune.cli.errors import checking_input
from treetune.cli.options.commands import Info
from treetune.cli.screen import Screen, clock
from treetune.core import ckpt, records
from treetune.core.run import folder
from treetune.models import adapter, describe, fetch

PACKAGES = ("treetune", "torch", "transformers", "tokenizers", "safetensors", "datasets", "triton", "peft", "vllm")


def machine() -> dict[str, str]:
    """Python, packages, processor and devices."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    pages = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    memory = f", {math.prod(map(os.sysconf, pages)) / 2**30:.0f} GiB" if hasattr(os, "sysconf") else ""  # not on Windows
    rows = {"python": platform.python_version()} | versions
    rows["cpu"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}{memory}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return rows | {"cuda": ", ".join(names) or "none"}


def run_rows(path: Path) -> dict[str, str]:
    """Where a run stands: steps, losses, checkpoints."""
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


def run(config: Info, given: frozenset[str]) -> int:
    """Print the table for what the path is; the exit code."""
    screen = Screen()
    with checking_input():
        rows = _rows(config.path, screen)
    screen.table("", rows)
    return 0


def _rows(name: str | None, screen: Screen) -> dict[str, str]:
    if name is None:
        return machine()
    if (Path(name) / "config.yaml").is_file():
        return run_rows(Path(name))
    if (Path(name) / adapter.CONFIG).is_file():
        return describe.describe_adapter(Path(name))
    return describe.describe_model(fetch.resolve(name, say=screen.line))
