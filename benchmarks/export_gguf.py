"""GGUF files of SmolLM2-135M-Instruct: their sizes, and the mean KL of the next tokens that `treetune export` measures in them.

python benchmarks/export_gguf.py
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

KINDS = ("f16", "q8_0")


def exported(kind: str) -> dict[str, float]:
    """The size of the file in MiB and its mean KL in nats."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        line = [sys.executable, "-m", "treetune.cli.main", "export", "smollm2-135m-instruct", str(output), "--gguf", kind]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        found = re.search(r"mean KL ([\d.e+-]+)", done.stdout + done.stderr)
        if found is None:
            raise ValueError(f"no mean KL in: {done.stdout}{done.stderr}")
        (file,) = output.glob("*.gguf")
        return {"mib": file.stat().st_size / 2**20, "mean_kl": float(found[1])}


def main() -> None:
    """Write a file of each kind, and the result."""
    print("saved", harness.save("export_gguf", {"machine": harness.machine()} | {kind: exported(kind) for kind in KINDS}))


if __name__ == "__main__":
    main()
