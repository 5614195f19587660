"""docs/memory_table.md, of the counts of `treetune plan`: `python -m treetune.cli.planning.memory_table docs/memory_table.md`."""

import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from treetune.cli import main as commands
from treetune.cli import parse, requirements
from treetune.cli.methods import CONFIGS, of_config
from treetune.cli.planning import estimate, shapes, words
from treetune.cli.planning.estimate import Estimate, Place
from treetune.models import devices, hf
from treetune.models.memory import GIB

LENGTH, SHARED = 2048, 8
ALL = ("--sequence-len", str(LENGTH), "--micro-batch-size", "1", "--gradient-accumulation-steps", "4", "--gradient-checkpointing", "full")
EIGHT_BIT = "full, adamw_8bit"
# Moments in 8 bits are counted chunk by chunk, many thousands in a large model.
WITH_EIGHT_BIT = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Mistral-7B-v0.3")
LORA = ("--adapter", "lora", "--lora-r", "16")
TRAININGS = {
    "QLoRA, nf4": (*LORA, "--quant", "nf4"),
    "LoRA": LORA,
    EIGHT_BIT: ("--adapter", "none", "--optimizer", "adamw_8bit", "--master-dtype", "bfloat16"),
    "full": ("--adapter", "none"),
}
DEVICES = ("4090", "a100-40", "h100", "h200")
SHARED_MODELS = tuple(name for name in shapes.CONFIGS if not name.endswith(("-0.6B", "-1.7B", "-4B")))
HEAD = f"""<!-- Made by `make memory-table` of the counts of `treetune plan`; a test compares. -->

# How much memory a run takes

Computed, not measured: the peak of tensors in GiB, as `treetune plan` counts it. [Planning](planning.md) says how, and how near
that is on a CPU; no GPU has confirmed the figures.

A supervised step in bfloat16, micro-batches of one document of {LENGTH} tokens, several of them a step, `--gradient-checkpointing full`;
LoRA of rank 16 on all linear layers. `full` keeps weights, gradients and moments in float32, `full, adamw_8bit` is
`--optimizer adamw_8bit --master-dtype bfloat16`.

A cell says whether the run fits on one such device: **yes**, *tight* (more than 92 % of the room that tensors have, which the head of
the column says), or no. Where it does not, but {SHARED} of them with `--sharding full` do, it says what each of them takes; models below
6 B parameters were counted on one device only, 8-bit moments of models up to 7 B. For your own run: `treetune plan run.yaml`.

"""


class Row(NamedTuple):
    """The peaks of a model and a training: on one device, and on each of several; None where those were not counted."""

    alone: Estimate
    shared: Estimate | None


def cases() -> list[tuple[str, str]]:
    """(model, training) of each row."""
    every = [(name, training) for name in shapes.CONFIGS for training in TRAININGS]
    return [(name, training) for name, training in every if training != EIGHT_BIT or name in WITH_EIGHT_BIT]


def planned(name: str, training: str) -> estimate.Run:
    """A supervised run of a model of `shapes`. Errors: KeyError for a name that is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(shapes.CONFIGS[name]))
        family, cfg = hf.read_config(path)
        kind = commands.COMMANDS["sft"].config
        parsed, given = parse.parse("sft", kind, ["--model", folder, *ALL, *TRAININGS[training]])
        config = requirements.complete(parsed, CONFIGS[kind], given)
    return estimate.Run(of_config(config), config, family, cfg)


def row(name: str, training: str) -> Row:
    """The peaks of a model and a training."""
    run, device = planned(name, training), devices.GPUS[DEVICES[0]]
    places = [Place(device), *([Place(device, SHARED, "full")] if name in SHARED_MODELS else [])]
    peaks = [estimate.estimate(run, estimate.counted(run, place), place) for place in places]
    return Row(peaks[0], peaks[1] if len(peaks) > 1 else None)


def line(name: str, training: str, row: Row) -> str:
    """A row of the table."""
    cells = [_cell(row, devices.GPUS[one]) for one in DEVICES]
    return f"| {name} | {training} | {row.alone.peak / GIB:.1f} | {' | '.join(cells)} |"


def _cell(row: Row, device: devices.Device) -> str:
    alone = words.verdict(row.alone, Place(device))
    if alone != "does not fit":
        return "**yes**" if alone == "fits" else "*tight*"
    if row.shared is None or words.verdict(row.shared, Place(device)) == "does not fit":
        return "no"
    mark = "" if words.verdict(row.shared, Place(device)) == "fits" else ", *tight*"
    return f"{SHARED} x {row.shared.peak / GIB:.1f}{mark}"


def header() -> str:
    """The head of the table."""
    titles = [f"{devices.GPUS[one].title}, {devices.GPUS[one].room / GIB:.1f} GiB" for one in DEVICES]
    return f"| model | training | peak | {' | '.join(titles)} |\n|---|---|---|{'---|' * len(DEVICES)}\n"


def page(told: bool = False) -> str:
    """The page: minutes of one core; `told` prints each row as it is counted."""
    lines = []
    for name, training in cases():
        lines.append(line(name, training, row(name, training)))
        if told:
            print(lines[-1], flush=True)
    return f"{HEAD}{header()}" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(told=True), encoding="utf-8")
