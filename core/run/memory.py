"""Memory of this process."""

import math
import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the allocator on CUDA, of the process on a CPU; nan where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
