"""`treetune info`: this machine, or a model, an adapter or a run, in a few lines."""

import math
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from treetune.cli import rundir
from treetune.cli.configs import Info
from treetune.cli.errors import checking_input
from treetune.cli.screen import Screen, clock
from treetune.core import ckpt, lora, param, records
from treetune.models import MODELS, adapter, adapter_config, fetch, hf

PACKAGES = ("treetune", "torch", "transformers", "tokenizers", "safetensors", "datasets", "triton", "peft", "vllm")


def machine() -> dict[str, str]:
    """Python, packages, processor and devices."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    pages = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    memory = f", {math.prod(map(os.sysconf, pages)) / 2**30:.0f} GiB" if hasattr(os, "sysconf") else ""  # not on Windows
    rows = {"python": platform.python_version()} | found
    rows["cpu"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}{memory}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return rows | {"cuda": ", ".join(names) or "none"}


def model(path: Path) -> dict[str, str]:
    """Family, sizes, parameters, and what LoRA of rank 16 would add."""
    if path.suffix == ".gguf":
        from treetune.models import gguf

        loaded = gguf.load(path)
        family, cfg = loaded.family, loaded.cfg
    else:
        family, cfg = hf.read_config(path / "config.json")
    sizes = MODELS[family].abstract(cfg)
    count, added = param.count(sizes), param.count(lora.abstract(sizes, lora.linears(sizes), rank=16))
    return {
        "model": str(path),
        "family": f"{family}, {cfg.num_layers} layers, hidden {cfg.hidden_size}, mlp {cfg.mlp_size}",
        "attention": f"{cfg.num_heads} query and {cfg.num_kv_heads} key heads of {cfg.head_dim}, window {cfg.window or 'none'}",
        "vocabulary": f"{cfg.vocab_size}, embeddings {'tied' if cfg.tied else 'not tied'}, {cfg.max_positions} positions",
        "parameters": f"{count / 1e6:.1f} M: {count * 4 / 2**30:.2f} GiB in float32, {count * 2 / 2**30:.2f} GiB in bfloat16",
        "lora r 16": f"{added / 1e6:.2f} M on all linear layers ({100 * added / count:.2f} %)",
        "full training": f"{count * 16 / 2**30:.1f} GiB for float32 weights, gradients and two moments, before activations",
    }


def adapter_rows(path: Path) -> dict[str, str]:
    """Rank, scale, base model and targets of an adapter folder."""
    config = adapter_config.read(path)
    names = (config.targets,) if isinstance(config.targets, str) else config.targets
    targets = sorted({name.rpartition(".")[2] for name in names})
    return {
        "adapter": str(path),
        "base": config.base or "not named",
        "rank": f"{config.rank}, alpha {config.alpha:g}{', rank-stabilised' * config.rslora}",
        "targets": config.targets if isinstance(config.targets, str) else f"{len(names)} modules: {', '.join(targets)}",
        "trained whole": ", ".join(config.saved) or "none",
    }


def run_rows(path: Path) -> dict[str, str]:
    """Where a run stands: steps, losses, checkpoints."""
    run = rundir.RunDir(path, None)
    history = records.read(run.metrics, numbers=True).records
    steps, held = [r for r in history if "train/loss" in r], [r["eval/loss"] for r in history if "eval/loss" in r]
    rows = {"run": str(path), "checkpoints": ", ".join(found.name for found in ckpt.steps(run.checkpoints)) or "none"}
    if steps:
        rows["steps"] = (
            f"{steps[-1]['step']} in {clock(sum(r.get('step_seconds', 0) for r in steps))}, {int(steps[-1].get('num_tokens', 0))} tokens"
        )
        rows["train loss"] = f"{steps[0]['train/loss']:.4f} -> {steps[-1]['train/loss']:.4f}"
    if held:
        rows["held-out loss"] = f"{held[0]:.4f} -> {held[-1]:.4f}, best {min(held):.4f}"
    return rows


def run(config: Info, given: frozenset[str]) -> int:
    """Print the table for what the path is; the exit code."""
    screen = Screen()
    with checking_input():
        path = None if config.path is None else Path(config.path)
        if path is None:
            rows = machine()
        elif (path / "config.yaml").is_file():
            rows = run_rows(path)
        elif (path / adapter.CONFIG).is_file():
            rows = adapter_rows(path)
        else:
            rows = model(fetch.resolve(config.path, say=screen.line))
    screen.table("", rows)
    return 0
