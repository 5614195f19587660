"""The driver of benchmarks/gpu.sh with parts that crash, hang and end, and a dry run of the parts."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "benchmarks" / "gpu" / "run.py")
assert spec is not None and spec.loader is not None
driver = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driver)

GOOD = 'print("noise"); print(\'RESULT {"name": "one", "ok": true, "text": "a table"}\')'
WRONG = 'print(\'RESULT {"name": "two", "ok": false, "error": ["off"]}\')'
CRASH = 'import os; print(\'RESULT {"name": "before", "x": 1}\', flush=True); raise ValueError("it broke")'
HANG = (
    "import subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    'print(\'RESULT \' + \'{"name": "child", "pid": %d}\' % child.pid, flush=True); '
    "print('RESULT {\"na', end='', flush=True); time.sleep(60)"
)


def part(name, code, seconds=20.0, together=False):
    return driver.Part(name, [sys.executable, "-S", "-c", code], seconds, together)


def gone(pid):
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().split(")")[1].split()[0] == "Z"


def test_a_part_that_fails_costs_its_part(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "LEAST", 0.1)
    parts = [part("hang", HANG, 1.0, True), part("crash", CRASH, together=True), part("wrong", WRONG), part("good", GOOD)]
    records = driver.run_all(parts, 60, dict(os.environ), lambda records: driver.write(tmp_path, records, {"dry": True}))
    by_name = {record["part"]: record for record in records}
    assert list(by_name) == ["hang", "crash", "wrong", "good"]
    assert by_name["hang"]["status"] == "over its time" and by_name["hang"]["seconds"] < 10
    (child,) = by_name["hang"]["results"]
    for _ in range(50):
        if gone(child["pid"]):
            break
        time.sleep(0.1)
    assert gone(child["pid"])
    assert by_name["crash"]["status"] == 1 and by_name["crash"]["results"] == [{"name": "before", "x": 1}]
    assert by_name["crash"]["error"][-1] == "ValueError: it broke"
    assert [by_name[name]["status"] for name in ("wrong", "good")] == [0, 0]
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert {one["part"] for one in saved["parts"]} == set(by_name) and saved["about"] == {"dry": True}
    assert "a table" in (tmp_path / "tables.txt").read_text() and "a table" not in json.dumps(saved)
    told = driver.summary(records)
    assert "WRONG two" in told and "ValueError: it broke" in told and "before" in told and "one" not in told.replace("gone", "")


def test_the_budget_ends_the_run(monkeypatch):
    monkeypatch.setattr(driver, "LEAST", 0.5)
    records = driver.run_all([part("long", "import time; time.sleep(60)"), part("late", GOOD)], 1.0, dict(os.environ))
    assert [record["status"] for record in records] == ["over its time", "no time left"]
    assert sum(record["seconds"] for record in records) < 10


def test_limits_fit_the_lease():
    """Scripts exist, and the parts that tell whether results are right come first, and have time within the budget."""
    assert all(Path(one.command[1]).exists() for one in driver.PARTS) and driver.BUDGET <= 540
    order = [one.together for one in driver.PARTS]
    assert order == sorted(order, reverse=True) and max(one.seconds for one in driver.PARTS if one.together) < driver.BUDGET / 2


MISSING = "tyro, rich, datasets, gguf, httpx, tenacity"


@pytest.mark.slow
def test_a_dry_run_of_all_parts(tmp_path):
    """With the packages missing that such a machine may not have."""
    blocked = f"import sys\nsys.modules |= dict.fromkeys({MISSING.split(', ')!r})\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    env = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh", "--dry"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    parts = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert [one["part"] for one in parts] == [one.name for one in driver.PARTS]
    assert all(one["status"] == 0 and one["results"] for one in parts)
    loss = {r["name"]: r["first_loss"] for one in parts for r in one["results"] if "first_loss" in r}
    for shape in ("qwen2.5-0.5b", "llama-8b"):
        mine, peer = (value for name, value in loss.items() if name.startswith(shape))
        assert mine == pytest.approx(peer, rel=1e-5)
