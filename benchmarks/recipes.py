"""Every examples/*.yaml as a user would run it, in few steps: steps, times, memory, and what it is judged by, before and after.

python benchmarks/recipes.py [NAME ...]     one JSON each in results/<machine>/recipes/; pages are made of them by recipes_page.py

The steps and the number of held-out rows are cut by flags so that a recipe takes minutes on one CPU thread; the JSON has the whole command.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import harness

ROOT = Path(__file__).resolve().parents[1]
UNSAMPLED = "--sample-prompt ''"
QUIET = f"{UNSAMPLED} --evals-per-epoch 1"
FEW = f"{QUIET} --val-set-size 8"
COMPUTES = ("core", "ops", "models", "losses", "cli/methods", "cli/options", "examples")  # code whose changes the JSON tells of
MEAN = 2  # training steps that are averaged where nothing is held out


class Recipe(NamedTuple):
    """method: the command. judged: {metric: whether more is better}, of which the first is that of the method. flags: over the file.

    server: the file of a vLLM server that must run beside it.
    """

    method: str
    judged: dict[str, bool]
    flags: str = ""
    server: str = ""


LOSS = {"eval/loss": False}
PAIRS = {"eval/loss": False, "eval/rewards/accuracies": True, "eval/rewards/margins": True}
REWARDED = {"reward": True}
STRIDED = {"eval/ebft/cfm_loss": False, "eval/ebft/mean_reward": True}
RECIPES = {
    "sft_lora": Recipe("sft", LOSS, f"{FEW} --max-steps 6"),
    "sft_full": Recipe("sft", LOSS, f"{FEW} --max-steps 4"),
    "sft_alpaca": Recipe("sft", LOSS, QUIET),
    "pretrain_text": Recipe("pretrain", LOSS, QUIET),
    "dpo_lora": Recipe("dpo", PAIRS, f"{FEW} --max-steps 6"),
    "dpo_mixture": Recipe("dpo", PAIRS, f"{FEW} --max-steps 3"),
    "kto_lora": Recipe("kto", PAIRS, f"{QUIET} --val-set-size 24"),
    "orpo_lora": Recipe("orpo", PAIRS, f"{FEW} --max-steps 4"),
    "simpo_lora": Recipe("simpo", PAIRS, f"{FEW} --max-steps 4"),
    "reward_lora": Recipe("reward", {"eval/loss": False, "eval/accuracy": True}, "--evals-per-epoch 1 --val-set-size 8 --max-steps 5"),
    "prm_lora": Recipe("prm", {"eval/loss": False, "eval/accuracy": True}, "--evals-per-epoch 1 --val-set-size 40 --num-epochs 3"),
    "grpo": Recipe("grpo", REWARDED, f"{UNSAMPLED} --val-set-size 4 --max-steps 5"),
    "dapo": Recipe("grpo", REWARDED, f"{UNSAMPLED} --max-steps 2"),
    "guess": Recipe("grpo", REWARDED, f"{UNSAMPLED} --max-steps 5"),
    "ebft_strided": Recipe("ebft", STRIDED, f"{QUIET} --val-set-size 4 --max-steps 3"),
    "ebft_strided_full": Recipe("ebft", STRIDED, f"{QUIET} --val-set-size 4 --max-steps 2"),
    "ebft_strided_structured": Recipe("ebft", STRIDED, f"{QUIET} --val-set-size 4 --max-steps 3"),
    "ebft_structured": Recipe("ebft", REWARDED, f"{UNSAMPLED} --max-steps 3"),
    "grpo_vllm": Recipe("grpo", REWARDED, f"{UNSAMPLED} --max-steps 4", "serve"),
    "ebft_structured_vllm": Recipe("ebft", REWARDED, f"{UNSAMPLED} --max-steps 3", "serve"),
    "ebft_structured_async": Recipe("ebft", REWARDED, f"{UNSAMPLED} --max-steps 3", "serve"),
}


def measure(name: str, recipe: Recipe) -> dict[str, Any]:
    """Run a recipe in a process of its own and read what it left."""
    words = shlex.split(f"{recipe.method} --config examples/{name}.yaml {recipe.flags}")
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "screen.txt", "w+") as screen:
        out = Path(folder) / "run"
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "treetune.cli.main", *words, "--output-dir", str(out)], cwd=ROOT, stdout=screen, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            screen.seek(0)
            raise SystemExit(f"{name} failed:\n{screen.read()[-3000:]}")
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        state = json.loads((out / "status.json").read_text())
    trained = [record for record in records if "train/loss" in record]
    measured = {metric: _ends(records, metric) for metric in recipe.judged}
    return {
        "recipe": name,
        "command": shlex.join(["treetune", *words]),
        "flags": recipe.flags,
        "server": recipe.server,
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", *COMPUTES)),
        "steps": state["total_steps"],
        "tokens": max((record.get("num_tokens", 0) for record in trained), default=0),
        "wall_s": wall,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_gib": used.ru_maxrss / 2**20,
        "step_s": statistics.median(record["step_seconds"] for record in trained),
        "judged": {metric: ends | {"more_is_better": recipe.judged[metric]} for metric, ends in measured.items() if ends},
        "held_out": [record for record in records if "eval/loss" in record or "eval/ebft/cfm_loss" in record],
        "losses": [record["train/loss"] for record in trained],
        "load_average": {"before": load, "after": os.getloadavg()},
        "machine": harness.machine(),
    }


def _ends(records: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The first and the last value that is held out; of a metric of training, means of as many steps at both ends."""
    values = [record[metric] for record in records if record.get(metric) is not None]
    if len(values) < 2:
        return {}
    if metric.startswith("eval/"):
        return {"before": values[0], "after": values[-1], "of": "held-out rows"}
    mean = min(MEAN, len(values) // 2)
    ends = {"before": statistics.mean(values[:mean]), "after": statistics.mean(values[-mean:])}
    return ends | {"of": f"mean of the first and of the last {mean} steps", "values": values}


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measure the recipes that are named, or all that need no server."""
    names = sys.argv[1:] or [name for name, recipe in RECIPES.items() if not recipe.server]
    if unknown := [name for name in names if name not in RECIPES]:
        raise SystemExit(f"no recipe is called {', '.join(unknown)}; expected some of {', '.join(RECIPES)}")
    folder = harness.RESULTS / harness.device_name() / "recipes"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        result = measure(name, RECIPES[name])
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {result['steps']} steps, {result['cpu_s']:.0f} s of CPU, {json.dumps(result['judged'])}", flush=True)


if __name__ == "__main__":
    main()
