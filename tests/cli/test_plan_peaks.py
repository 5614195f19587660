"""The peak of a plan against what torch allocates in a run of the same options, from loading its model to its last step."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

from treetune.cli import fit, parse, requirements
from treetune.cli.methods import CONFIGS, METHODS, of_config
from treetune.cli.options import meshes
from treetune.cli.planning import estimate
from treetune.models import describe, devices

LENGTH = 256
SIZES = dict(hidden_size=128, mlp_size=320, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, max_positions=1024, init_std=0.02)


@pytest.fixture(scope="module")
def place(tmp_path_factory, kit):
    return fill(tmp_path_factory.mktemp("peaks"), kit)


def fill(root, kit):
    """A model, and rows of each kind that fill a document."""
    kit.write_model(root / "model", **SIZES)
    text, third = "x" * 2 * LENGTH, "x" * (LENGTH // 3 - 1)
    rows = {
        "text": [{"text": text}] * 8,
        "pairs": [{"prompt": third, "chosen": f"a{third}", "rejected": f"b{third}"}] * 8,
        "judged": [{"prompt": f"{i}{third}"[:-1], "completion": f"{i}{third}", "label": i % 2 == 0} for i in range(8)],
        "prompts": [{"prompt": third}] * 8,
    }
    for name, some in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (root / "rewards.py").write_text("def spread(completions):\n    return [float(sum(map(ord, str(one))) % 97) for one in completions]\n")
    return root


def config(place, name, data, *args):
    size = {"grpo": (), "pretrain": ("--sequence-len", LENGTH)}.get(name, ("--sequence-len", LENGTH, "--overlong", "truncate"))
    fixed = ("--model", place / "model", "--data", place / f"{data}.jsonl", "--val-set-size", 0, "--max-steps", 2, "--device", "cpu")
    args = (*args, f"{place}/rewards.py:spread") if name == "grpo" else args
    fixed = (*fixed, *size, "--output-dir", place / "run", "--overwrite", "--sample-prompt", "") if name != "reward" else fixed
    parsed, given = parse.parse(name, METHODS[name].config, [str(arg) for arg in (*fixed, *args)])
    return requirements.complete(parsed, CONFIGS[type(parsed)], given)


def measured(config):
    """The most bytes that torch holds at once in a run."""
    gc.collect()  # what earlier runs left would be freed in this one, and be taken off
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        fit.run(config)
    results: Any = seen.profiler
    events = sorted((event for event in results.kineto_results.events() if event.name() == "[memory]"), key=lambda e: e.start_ns())
    held = top = 0
    for event in events:
        held += event.nbytes()
        top = max(top, held)
    return top


def planned(config, ranks=1):
    run = estimate.Run(of_config(config), config, *describe.read_sizes(Path(config.model.model)))
    device = devices.GPUS["l4"]._replace(gpu=False, runtime=0)  # a CPU whose rates nobody waits for
    return estimate.estimate(run, estimate.counted(run, device), estimate.Place(device, ranks, meshes.sharding(config.run))).peak


FULL, REMAT, SELECTIVE = ("--adapter", "none"), ("--gradient-checkpointing", "full"), ("--gradient-checkpointing", "selective")
RUNS = [
    ("sft", "text", ()),
    ("sft", "text", REMAT),
    ("sft", "text", FULL),
    ("sft", "text", (*FULL, *REMAT)),
    ("sft", "text", ("--adapter", "qlora")),
    ("sft", "text", ("--quant", "int8", *REMAT)),
    ("sft", "text", ("--quant", "nf4", *SELECTIVE)),
    ("sft", "text", (*FULL, "--optimizer", "adamw_8bit")),
    ("pretrain", "text", SELECTIVE),
    ("dpo", "pairs", ()),
    ("dpo", "pairs", FULL),
    ("dpo", "pairs", ("--quant", "nf4", *REMAT)),
    ("orpo", "pairs", REMAT),
    ("kto", "judged", ()),
    ("kto", "judged", (*FULL, *REMAT)),
    ("reward", "pairs", REMAT),
    ("grpo", "prompts", ("--num-generations", 6, "--max-completion-length", 12, "--max-prompt-len", LENGTH // 3, "--reward-funcs")),
]


@pytest.mark.parametrize(("name", "data", "args"), [RUNS[0], *(pytest.param(*run, marks=pytest.mark.slow) for run in RUNS[1:])])
def test_the_peak_of_a_plan_is_that_of_the_run(place, here, name, data, args):
    one = config(place, name, data, *args)
    said, seen = planned(one), measured(one)
    print(f"{name} {' '.join(map(str, args))}: planned {said / 2**20:.2f} MiB, measured {seen / 2**20:.2f} ({said / seen:.3f})")
    assert said == pytest.approx(seen, rel=0.1)
