"""The oldest versions that pyproject.toml allows still train: three steps in a virtual environment of their own.

Models without a native family need a newer transformers, and say so.

torch stays at the version that is installed, because its older builds come with gigabytes of CUDA packages.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from treetune.models import bridge

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


def write_bridged(kit, folder):
    """A small random glm4, which no native family computes, with the tokenizer of the other tests."""
    from transformers import Glm4Config, Glm4ForCausalLM

    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    Glm4ForCausalLM(Glm4Config(**sizes, **heads, pad_token_id=0, eos_token_id=1)).save_pretrained(folder)
    kit.tokenizer().save_pretrained(folder)
    return folder


def test_bounds_are_read():
    assert oldest(["rich>=13.7", "torch>=2.10,<2.14", "safetensors>=0.5.1"]) == ["rich==13.7.*", "safetensors==0.5.1"]


@pytest.mark.slow
def test_trains_on_the_oldest_versions_that_are_allowed(tmp_path, tiny, kit):
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
    command = ["-m", "treetune.cli.main", "sft", "--data", str(tiny.chat), "--sequence-len", "128", "--max-steps", "3"]
    command += ["--gradient-accumulation-steps", "1", "--sample-prompt="]
    printed = run(python, *command, "--model", str(tiny.model), "--output-dir", str(tmp_path / "run"))
    assert "step    3/3" in printed

    bridged = write_bridged(kit, tmp_path / "glm4")
    refused = subprocess.run(
        [python, *command, "--model", str(bridged), "--output-dir", "no"], capture_output=True, text=True, cwd=tmp_path, timeout=900
    )
    needed = ".".join(map(str, bridge.OLDEST))
    assert refused.returncode == 2 and f"glm4 model is computed by the modules of transformers from {needed} on" in refused.stderr
    run(python, "-m", "pip", "install", "-q", f"transformers=={needed}.0")
    printed = run(python, *command, "--model", str(bridged), "--output-dir", str(tmp_path / "bridged"))
    assert "step    3/3" in printed
    checked = run(python, "-m", "treetune.cli.main", "check", str(bridged))
    assert "bridged (family glm4), all measures within their limits" in checked
