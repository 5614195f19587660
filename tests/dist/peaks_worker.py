"""One rank of runs whose peaks are compared with their plans. argv: folder of `test_plan_peaks.place`, JSON of {title: arguments}.

Each rank leaves {title: bytes} in peaks.RANK.json, the first one the planned ones in planned.json.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__)
spec = importlib.util.spec_from_file_location("plan_peaks", HERE.parents[1] / "cli" / "test_plan_peaks.py")
peaks = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = peaks
spec.loader.exec_module(peaks)

folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
world, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
configs = {title: peaks.config(folder, *args) for title, args in runs.items()}
planned = {title: peaks.planned(one, ranks=world) for title, one in configs.items()}
measured = {title: peaks.measured(one) for title, one in configs.items()}
(folder / f"peaks.{rank}.json").write_text(json.dumps(measured))
if rank == "0":
    (folder / "planned.json").write_text(json.dumps(planned))
