"""One rank of runs whose peaks are measured. argv: folder of `test_plan_peaks.place`, JSON of {title: arguments}.

Each rank leaves {title: bytes} in peaks.RANK.json. Plans are made by another process: torch would keep their groups in mind.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from treetune.core import shard

HERE = Path(__file__)
spec = importlib.util.spec_from_file_location("plan_peaks", HERE.parents[1] / "cli" / "test_plan_peaks.py")
peaks = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = peaks
spec.loader.exec_module(peaks)


def unhurried(function):
    """A function after which the threads of gloo have the time to drop what was sent: what they free, the profiler is not told of."""

    def call(*args, **kwargs):
        out = function(*args, **kwargs)
        time.sleep(0.002)
        return out

    return call


dist.Work.wait, shard.full = unhurried(dist.Work.wait), unhurried(shard.full)
folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
configs = {title: peaks.config(folder, *args) for title, args in runs.items()}
peaks.measured(next(iter(configs.values())))  # the first run of a process also measures which matrix products it takes
measured = {title: peaks.measured(one) for title, one in configs.items()}
(folder / f"peaks.{os.environ['RANK']}.json").write_text(json.dumps(measured))
