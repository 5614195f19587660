"""This machine in a few lines: Python, packages, processor and devices."""

import math
import os
import platform
from importlib import metadata

import torch

PACKAGES = ("treetune", "torch", "transformers", "tokenizers", "safetensors", "datasets", "triton", "peft", "vllm")


def describe() -> dict[str, str]:
    """Lines by name: versions, cores and memory, and the GPUs."""
    pages = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    memory = f", {math.prod(map(os.sysconf, pages)) / 2**30:.0f} GiB" if hasattr(os, "sysconf") else ""  # not on Windows
    rows = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    rows["cpu"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}{memory}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return rows | {"cuda": ", ".join(names) or "none"}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
