"""Planned peaks beside measured ones, of one process and of 2 and 4 ranks over gloo: what the tests of plans measure, as one table.

python benchmarks/plan_peaks.py                 # all of it, a quarter of an hour
python benchmarks/plan_peaks.py two_ranks.jsonl # rows that PLAN_TABLE=two_ranks.jsonl python -m pytest ... has left, without a run
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

ROOT = Path(__file__).parents[1]
TESTS = "tests/cli/test_plan_peaks.py", "tests/dist/test_peaks.py"


def measured() -> list[dict]:
    """A row for each kind of run, also where a plan is beyond 10 %."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", *TESTS]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PLAN_TABLE": str(table), "OMP_NUM_THREADS": "1"})
        return read(table)


def read(*tables: Path) -> list[dict]:
    """The rows of files, of those of one run the last."""
    rows = [json.loads(line) for table in tables for line in table.read_text().splitlines()]
    return list({row["run"]: row for row in rows}.values())


def main() -> None:
    """Measure, or read, and write the result."""
    rows = read(*map(Path, sys.argv[1:])) or measured()
    ratios = [row["ratio"] for row in rows]
    result = {"machine": harness.machine(), "rows": rows, "lowest": min(ratios), "highest": max(ratios)}
    print("saved", harness.save("plan_peaks", result))


if __name__ == "__main__":
    main()
