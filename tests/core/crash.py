"""Run by test_ckpt: save a checkpoint again and again, killed with signal 9 just before each thing that a save does to the disk.

argv: folder, whether the killed save replaces a checkpoint of the same step. Prints a line of JSON per
kill: the steps that `recover` leaves and the values they hold, drafts besides them, and whether the save came to its end before the kill.
"""

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from treetune.core import ckpt, ckpt_parts, tensor_file
from treetune.core.state import TrainState

torch.set_num_threads(1)


def state(step: int, fill: float) -> TrainState:
    params = {"w": torch.full((256, 64), fill), "b": torch.full((3,), fill)}
    return TrainState(params, {}, {"mu": {"w": torch.full((256, 64), fill)}}, {}, torch.tensor(step))


def armed(function, fuse: list[int]):
    """The function, that counts the fuse down and kills the process where it reaches 0."""

    def call(*args, **options):
        fuse[0] -= 1
        if fuse[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return call


def killed_after(events: int, root: Path, again: bool) -> bool:
    """Whether a save was killed after so many events; False when it came to its end."""
    pid = os.fork()
    if pid == 0:
        fuse = [events]
        ckpt.fsync, shutil.rmtree = armed(ckpt.fsync, fuse), armed(shutil.rmtree, fuse)
        tensor_file.write = armed(tensor_file.write, fuse)
        ckpt_parts.fsync = armed(ckpt_parts.fsync, fuse)
        os.rename = armed(os.rename, fuse)
        for name in ("mkdir", "write_text"):
            setattr(Path, name, armed(getattr(Path, name), fuse))
        ckpt.save(root, state(10 if again else 20, 2.0), {"progress": {}})
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def held(path: Path) -> list[float]:
    """The distinct values in a checkpoint."""
    step = int(path.name.removeprefix("step_"))
    loaded, meta = ckpt.load(path, state(0, 0.0))
    assert int(loaded.step) == meta["step"] == step
    return torch.cat([leaf.flatten() for leaf in (*loaded.params.values(), loaded.opt["mu"]["w"])]).unique().tolist()


def main() -> None:
    root, again = Path(sys.argv[1]), sys.argv[2] == "again"
    for events in itertools.count():
        shutil.rmtree(root, ignore_errors=True)
        for step in (5, 10):
            ckpt.save(root, state(step, 1.0), {"progress": {}})
        ended = not killed_after(events, root, again)
        ckpt.recover(root)
        found = {path.name: held(path) for path in ckpt.steps(root)}
        left = [path.name for path in root.iterdir() if path.name.startswith(".")]
        print(json.dumps({"ended": ended, "found": found, "left": left}), flush=True)
        if ended:
            return


main()
