"""Runs the parts of the GPU benchmark, each in a process of its own with a time limit, within a budget for all; see benchmarks/gpu.sh.

A part prints lines `RESULT {"name": ..., ...}` as it goes, so what it found before a crash or its limit counts. What it gives under "text"
is written to tables.txt, all else to gpu.json. This file needs the standard library only.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MARK = "RESULT "
BUDGET, LEAST, TAIL = 530.0, 8.0, 12  # seconds for all, seconds without which no part starts, lines of an error


class Part(NamedTuple):
    """A script with its arguments and its limit in seconds. together: it measures no time, and runs beside others of its kind."""

    name: str
    command: Sequence[str]
    seconds: float
    together: bool = False


def script(name: str, *args: str) -> list[str]:
    return [sys.executable, str(HERE / f"{name}.py"), *args]


PARTS = [
    Part("parity of kernels", script("parity", "CASES"), 150, True),
    Part("parity of log-probs", script("parity", "LOGPROB"), 150, True),
    Part("parity of attention", script("parity", "ATTENTION"), 200, True),
    Part("syncs of SFT", script("syncs", "sft"), 120, True),
    Part("syncs of GRPO", script("syncs", "grpo"), 120, True),
    Part("determinism", script("determinism"), 120, True),
    Part("train qwen2.5-0.5b", script("train", "qwen2.5-0.5b"), 80),
    Part("train llama-8b", script("train", "llama-8b"), 100),
    Part("peer qwen2.5-0.5b", script("peer", "qwen2.5-0.5b"), 80),
    Part("peer llama-8b", script("peer", "llama-8b"), 100),
    Part("speed of ops", script("speed"), 90),
    Part("decoding", script("decoding", "qwen2.5-0.5b"), 60),
]


def results_of(text: str) -> list[dict]:
    """What a part has reported; a last line that was cut off does not count."""
    results = []
    for line in text.splitlines():
        if line.startswith(MARK):
            try:
                results.append(json.loads(line[len(MARK) :]))
            except ValueError:
                continue
    return results


def run(part: Part, limit: float, environment: dict[str, str]) -> dict:
    """Run a part for at most `limit` seconds, end what is left of its process group, and read what it said."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(part.command, stdout=out, stderr=err, cwd=ROOT, env=environment, start_new_session=True)
        try:
            status: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = "over its time"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    record = {"part": part.name, "seconds": round(time.perf_counter() - begun, 1), "limit": round(limit, 1), "status": status}
    record["results"] = results_of(texts[0])
    if status:
        record["error"] = texts[1].strip().splitlines()[-TAIL:]
    return record


def run_all(parts: Sequence[Part], budget: float, environment: dict[str, str], save=lambda records: None) -> list[dict]:
    """Every part within the budget, the first ones first; those that measure no time at once, before the others."""
    end, records = time.perf_counter() + budget, []

    def one(part: Part) -> None:
        left = end - time.perf_counter()
        skipped = {"part": part.name, "seconds": 0, "limit": 0, "status": "no time left", "results": []}
        records.append(run(part, min(part.seconds, left), environment) if left >= LEAST else skipped)
        print(line_of(records[-1]), flush=True)
        save(records)

    together = [part for part in parts if part.together]
    if together:
        with ThreadPoolExecutor(len(together) if environment.get("GPU_DRY") != "1" else 1) as pool:
            list(pool.map(one, together))
    for part in parts:
        if not part.together:
            one(part)
    names = [part.name for part in parts]
    return sorted(records, key=lambda record: names.index(record["part"]))


def bad(result: dict) -> bool:
    """Whether a result says that something is wrong, and not only how it is."""
    return result.get("ok") is False


def line_of(record: dict) -> str:
    results = record["results"]
    wrong = sum(map(bad, results))
    state = "ended" if record["status"] == 0 else f"status {record['status']}"
    return f"{record['part']}: {state} after {record['seconds']} s, {len(results)} results, {wrong} wrong"


def summary(records: Sequence[dict]) -> str:
    """What is wrong, then what was measured, in lines."""
    lines = []
    for record in records:
        lines.append(line_of(record))
        for result in record["results"]:
            shown = {key: value for key, value in result.items() if key not in ("name", "ok", "text")}
            if bad(result) or "ok" not in result:
                note = ("WRONG " if bad(result) else "") + result["name"]
                lines.append(f"  {note}: {json.dumps(shown)[:400]}")
        lines += [f"    {text}" for text in record.get("error", ())]
    return "\n".join(lines) + "\n"


def write(out: Path, records: Sequence[dict], about: dict) -> None:
    """gpu.json, tables.txt and summary.txt, as far as the run has come."""
    out.mkdir(parents=True, exist_ok=True)
    tables = [f"# {one['part']}: {result['name']}\n{result['text']}\n" for one in records for result in one["results"] if "text" in result]
    slim = [one | {"results": [{k: v for k, v in r.items() if k != "text"} for r in one["results"]]} for one in records]
    (out / "gpu.json").write_text(json.dumps({"about": about, "parts": slim}, indent=1) + "\n")
    (out / "tables.txt").write_text("\n".join(tables))
    (out / "summary.txt").write_text(summary(records))


def environment_of(dry: bool) -> dict[str, str]:
    """What parts run with: our folders without an installation, no network, repeatable products of cuBLAS."""
    paths = os.pathsep.join([*map(str, (ROOT / ".typing", HERE, HERE.parent)), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    fixed = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    fixed |= {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    tiny = {"GPU_DRY": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return dict(os.environ) | fixed | (tiny if dry else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts whose names contain one of these")
    args = parser.parse_args()
    parts = [part for part in PARTS if not args.only or any(word in part.name for word in args.only)]
    out = Path(os.environ.get("OUT") or HERE.parent / "results" / ("gpu-dry" if args.dry else "gpu"))
    about = {"dry": args.dry, "budget": args.budget, "began": time.strftime("%Y-%m-%d %H:%M:%S")}
    environment = environment_of(args.dry)
    records = run_all(parts, args.budget, environment, lambda records: write(out, records, about))
    write(out, records, about)
    print(summary(records), f"written to {out}", sep="\n")
    return int(any(record["status"] != 0 or any(map(bad, record["results"])) for record in records))


if __name__ == "__main__":
    sys.exit(main())
