"""What every benchmark needs: runs in processes of their own, interleaved; medians; the machine; JSON with all of it."""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "peft", "liger-kernel", "bitsandbytes", "triton", "numpy")


def device_name() -> str:
    """A folder name for this kind of machine: the GPU, or CPU threads and the instruction set that torch uses; ratios differ by both."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    instructions = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-threads-{instructions}"


def machine() -> dict:
    """Processor, threads and package versions."""
    cpu = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": versions,
    }


def gemm_rate(dtype: torch.dtype, *, size: int = 2048, repeats: int = 5) -> float:
    """GFLOP/s of a square matrix product, the median of `repeats`."""
    a = torch.randn(size, size).to(dtype)
    a @ a
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times) / 1e9


def peak_gib() -> float:
    """Peak memory of this process in GiB: of the allocator on CUDA, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def child(script: str, *args: str) -> dict:
    """Run `script args` in a process of its own and read the JSON on its last line of output."""
    done = subprocess.run([sys.executable, script, *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(args)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def interleave(script: str, sides: list[list[str]], repeats: int) -> list[list[dict]]:
    """`repeats` rounds of all sides in turn; results by side."""
    results: list[list[dict]] = [[] for _ in sides]
    for round_ in range(repeats):
        for runs, args in zip(results, sides, strict=True):
            runs.append(child(script, *args))
            print(f"round {round_ + 1}/{repeats}: {' '.join(args)}: {json.dumps(runs[-1])}", flush=True)
    return results


def medians(runs: list[dict]) -> dict:
    """The median of every number over runs."""
    return {key: statistics.median(run[key] for run in runs) for key, value in runs[0].items() if isinstance(value, int | float)}


def save(name: str, result: dict) -> Path:
    """Write results/<device>/<name>.json."""
    path = RESULTS / device_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
