"""Ranks that kill themselves at a point: what `install` puts into a folder, every Python with that folder on its path does as it starts.

A point is "module:function:calls:rank": in the start of its number (0, then one more after each restart) that rank ends by SIGKILL when it
calls a function of the module so often. Each rank notes when it starts, and what is there of the ranks before; and when it dies.
"""

import json
import os
import time
from pathlib import Path
from typing import Any


def install(folder: Path, points: list[str], run: Path) -> dict[str, str]:
    """Prepare a folder, whose log is `log.jsonl`; the environment variables that a command needs."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nimport deaths\ndeaths.arm()\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "DEATHS": json.dumps({"log": str(folder / "log.jsonl"), "points": points, "run": str(run)}),
    }


def log(folder: Path) -> list[dict[str, Any]]:
    """What ranks have noted."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def arm() -> None:
    """In a rank: note the start, and await the module of its point."""
    if not {"DEATHS", "RANK", "TORCHELASTIC_RESTART_COUNT"} <= os.environ.keys():
        return
    import sys

    given, start, rank = json.loads(os.environ["DEATHS"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    if "treetune.cli.main" not in sys.orig_argv:
        return  # a process of a rank's own
    before = log(Path(given["log"]).parent) if Path(given["log"]).exists() else []
    alive = [one["pid"] for one in before if one["start"] < start and Path(f"/proc/{one['pid']}").exists()]
    _note(given, event="starts", start=start, rank=rank, alive=alive)
    point = given["points"][start].split(":") if start < len(given["points"]) else None
    if point and int(point[3]) == rank:
        sys.meta_path.insert(0, _Awaited(given, start, point))


def _note(given: dict, **what: Any) -> None:
    with open(given["log"], "a") as file:
        file.write(json.dumps(what | {"pid": os.getpid(), "time": time.time()}) + "\n")


class _Awaited:
    """Finds the module of a point, with the deadly function in it."""

    def __init__(self, given: dict, start: int, point: list[str]):
        self.given, self.start, self.point = given, start, point

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.point[0]:
            return None
        import importlib.util
        import sys

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        plain = spec.loader.exec_module

        def executed(module: Any) -> None:
            plain(module)
            self.replace(module)

        spec.loader.exec_module = executed
        return spec

    def replace(self, module: Any) -> None:
        _, path, calls, rank = self.point
        *owners, name = path.split(".")
        for one in owners:
            module = getattr(module, one)
        plain, left = getattr(module, name), [int(calls)]

        def deadly(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                import signal

                there = sorted(path.name for path in Path(self.given["run"]).glob("checkpoints/step_*"))
                _note(self.given, event="dies", start=self.start, rank=int(rank), checkpoints=there)
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **options)

        setattr(module, name, deadly)
