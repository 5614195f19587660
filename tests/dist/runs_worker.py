"""One rank that makes several runs of the command line, one after another. argv: a JSON file with the arguments of each."""

import json
import os
import sys
from pathlib import Path

import torch

from treetune.cli import main


def run_all() -> None:
    torch.set_num_threads(1)
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        assert main.main(arguments) == 0, arguments
        torch.distributed.barrier()
        # Each run joins anew: a rank that goes ahead would hold the folder of a run that others have yet to check.
        torch.distributed.destroy_process_group()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


run_all()
