"""The peak of a plan against what torch allocates on each rank of a run of the same options.

`-k` chooses kinds of runs, all of those of one size in one start of the ranks. With PLAN_TABLE=FILE a row for each goes into that file.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def module(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_of_peaks", TESTS / path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


PEAKS = module("cli/test_plan_peaks.py")
FULL, REMAT, SHARDED = ("--adapter", "none"), ("--gradient-checkpointing", "full"), ("--sharding", "full")
SAMPLED = ("--num-generations", 6, "--max-completion-length", 12, "--max-prompt-len", PEAKS.LENGTH // 3, "--reward-funcs")
COUNTS = "--num-generations", "--n-samples-per-prompt"
ON_RANKS = [
    ("sft", "text", FULL),
    ("sft", "text", (*FULL, "--sharding", "moments")),
    ("sft", "text", (*FULL, "--sharding", "gradients")),
    ("sft", "text", (*FULL, *SHARDED)),
    ("sft", "text", (*FULL, *SHARDED, *REMAT)),
    ("sft", "text", SHARDED),
    ("sft", "text", (*SHARDED, *REMAT)),
    ("sft", "text", (*SHARDED, "--quant", "nf4")),
    ("dpo", "pairs", (*FULL, *SHARDED)),
    ("dpo", "pairs", (*SHARDED, *REMAT)),
    ("kto", "judged", (*FULL, *SHARDED, *REMAT)),
    ("sft", "text", (*FULL, "--shard", "tensor=2")),
    ("dpo", "pairs", (*REMAT, "--shard", "tensor=2")),
    ("sft", "text", (*FULL, "--shard", "context=2")),
    ("grpo", "prompts", ("--shard", "tensor=2", *SAMPLED)),
    ("ebft", "text", (*SHARDED, "--mode", "strided", "--n-samples-per-prompt", 2, "--generate-max-len", 4, "--stride", 16)),
]
ON_FOUR = [
    ("sft", "text", (*FULL, *REMAT, "--shard", "tensor=2,data=2")),
    ("dpo", "pairs", ("--shard", "replicate=2,data=2")),
    ("sft", "text", (*FULL, *SHARDED, "--shard", "context=2,data=2")),
]
WORLDS = {2: "two", 4: "four"}
KINDS = [(2, *run) for run in ON_RANKS] + [(4, *run) for run in (*ON_RANKS[:11], *ON_FOUR)]


def title(world, name, data, args):
    args = args[: next((i for i, arg in enumerate(args) if arg in COUNTS), len(args))]  # pytest gives a long name up
    return " ".join(map(str, (WORLDS[world], "ranks:", name, *args)))


TITLES = [title(*kind) for kind in KINDS]


@pytest.fixture(scope="module")
def peaks(request, launch, tmp_path_factory):
    """peaks(world, title) -> bytes planned, and measured on the rank that holds most; all kinds that are asked of a size run at once."""
    asked = {item.callspec.params["kind"] for item in request.session.items if item.nodeid.startswith(request.node.nodeid)}
    done = {}

    def one(world, wanted):
        if world not in done:
            done[world] = {}  # one start, whatever comes of it
            root = tmp_path_factory.mktemp(f"peaks{world}")
            place = PEAKS.fill(root, module("cli/conftest.py"))
            runs = {title(*kind): kind[1:3] + kind[3] for kind in KINDS if kind[0] == world and title(*kind) in asked}
            launch(world, Path(__file__).with_name("peaks_worker.py"), place, json.dumps(runs), cwd=place, timeout=1500)
            measured = [json.loads((place / f"peaks.{rank}.json").read_text()) for rank in range(world)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("WORLD_SIZE", str(world))
                said = {name: PEAKS.planned(PEAKS.config(place, *run)) for name, run in runs.items()}
            done[world] = {name: (said[name], max(rank[name] for rank in measured)) for name in said}
        return done[world][wanted]

    return one


@pytest.mark.slow
@pytest.mark.parametrize("kind", TITLES)
def test_the_peak_of_a_rank_is_the_planned_one(peaks, kind):
    """Of the rank that holds most."""
    PEAKS.compare(kind, *peaks(next(world for world, word in WORLDS.items() if kind.startswith(word)), kind))
