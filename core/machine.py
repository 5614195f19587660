"""This machine in a few lines: Python, packages, processor and devices."""

import ctypes
import functools
import math
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

MAPPED_FROM = 4 * 2**20
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the name since torch 2.9, and the former one
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of malloc.h
CONTAINER = Path("/sys/fs/cgroup")
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


def join_segments() -> None:
    """Have CUDA's allocator grow its segments where streams of many lengths would leave holes between them, unless the user has a say.

    It takes effect before the first allocation of a GPU only.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def trim() -> None:
    """Give memory that was freed back to the system: the allocator of glibc keeps what lies between smaller pieces that are in use."""
    if trim := getattr(_library(), "malloc_trim", None):
        trim(0)


def map_large_buffers() -> None:
    """Give each buffer above `MAPPED_FROM` back to the system when it is freed: glibc raises that bound to 32 MiB by itself.

    Below the bound, dense copies of quantised weights, one after another, leave holes that stay with the process.
    """
    if mallopt := getattr(_library(), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)
        mallopt(M_TRIM_THRESHOLD, 2 * MAPPED_FROM)  # as glibc keeps them; fixing one fixes the other, at 128 KiB


@functools.cache
def _library() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None


def free_memory() -> int:
    """Bytes of memory that a process may take without others being moved out, in its container too; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0
    try:
        limit, in_use = (int((CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no limit is "max"
        return free
    return max(0, min(free, limit - in_use))
