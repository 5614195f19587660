"""The oldest versions that pyproject.toml allows still train: three steps in a virtual environment of their own.

torch stays at the version that is installed, because its older builds come with gigabytes of CUDA packages.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELD = ("torch",)


def oldest(requirements: list[str]) -> list[str]:
    """`name==lower bound` of each requirement; those in HELD as they are installed now."""
    out = []
    for text in requirements:
        name, bound = re.match(r"([\w-]+)>=([\w.]+)", text).groups()
        if name not in HELD:
            out.append(f"{name}=={bound}.*" if bound.count(".") < 2 else f"{name}=={bound}")
    return out


def test_bounds_are_read():
    assert oldest(["rich>=13.7", "torch>=2.10,<2.14", "safetensors>=0.5.1"]) == ["rich==13.7.*", "safetensors==0.5.1"]


@pytest.mark.slow
def test_trains_on_the_oldest_versions_that_are_allowed(tmp_path, tiny):
    import torch

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = str(tmp_path / "venv" / "bin" / "python")

    def run(*args: str) -> str:
        done = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    run(python, "-m", "pip", "install", "-q", f"torch=={torch.__version__.split('+')[0]}", *oldest(project["dependencies"]))
    run(python, "-m", "pip", "install", "-q", "--no-deps", str(ROOT))
    command = ["-m", "treetune.cli.main", "sft", "--model", str(tiny.model), "--data", str(tiny.chat), "--sequence-len", "128"]
    printed = run(python, *command, "--max-steps", "3", "--gradient-accumulation-steps", "1", "--output-dir", str(tmp_path / "run"))
    assert "step    3/3" in printed
