"""The peak of a plan against what torch allocates in a run of the same options, from loading its model to its last step."""

import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from treetune.cli import fit, memory_ladder, parse, requirements
from treetune.cli.methods import CONFIGS, METHODS, of_config
from treetune.cli.planning import estimate
from treetune.core import async_save
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


def config(place, name, data, *args, model="model"):
    size = {"grpo": (), "pretrain": ("--sequence-len", LENGTH)}.get(name, ("--sequence-len", LENGTH, "--overlong", "truncate"))
    fixed = ("--model", place / model, "--data", place / f"{data}.jsonl", "--val-set-size", 0, "--max-steps", 2, "--device", "cpu")
    args = (*args, f"{place}/rewards.py:spread") if name == "grpo" else args
    fixed = (*fixed, *size, "--output-dir", place / "run", "--overwrite", "--sample-prompt", "") if name != "reward" else fixed
    parsed, given = parse.parse(name, METHODS[name].config, [str(arg) for arg in (*fixed, *args)])
    return requirements.complete(parsed, CONFIGS[type(parsed)], given)


def measured(config):
    """The most bytes that torch holds at once in a run.

    By address: a thread of gloo that drops the last reference to what it has sent frees memory without the profiler's notice.
    """
    memory_ladder.state_bytes(config.optim.optimizer)  # once in a process, of a matrix that is larger than this model
    gc.collect()  # what earlier runs left would be freed in this one, and be taken off
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        fit.run(config)
    results: Any = seen.profiler
    there, held, top = {}, 0, 0
    for event in sorted(_allocations(results.kineto_results.experimental_event_tree()), key=lambda event: event.start_time_ns):
        one = event.extra_fields
        held -= there.pop(one.ptr, 0)
        if one.alloc_size > 0:
            there[one.ptr] = one.alloc_size
            held += one.alloc_size
        top = max(top, held)
    return top


def _allocations(events):
    waiting = list(reversed(events))
    while waiting:
        event = waiting.pop()  # in order: two may have one time
        waiting += reversed(event.children)
        if event.tag == _EventType.Allocation:
            yield event


def planned(config):
    run = estimate.Run(of_config(config), config, *describe.read_sizes(Path(config.model.model)))
    device = devices.GPUS["l4"]._replace(gpu=False, runtime=0)  # a CPU whose rates nobody waits for
    place = estimate.place(device, config.run)
    return estimate.estimate(run, estimate.counted(run, place), place).peak


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
    ("ebft", "text", ("--mode", "strided", "--n-samples-per-prompt", 2, "--generate-max-len", 4, "--stride", 16)),
    ("grpo", "prompts", ("--num-generations", 6, "--max-completion-length", 12, "--max-prompt-len", LENGTH // 3, "--reward-funcs")),
]


def compare(title, said, seen):
    """Print a plan beside what was measured, and add it to the file that PLAN_TABLE names, if any."""
    row = {"run": title, "planned": said, "measured": seen, "ratio": round(said / seen, 3)}
    print(f"{title}: planned {said / 2**20:.2f} MiB, measured {seen / 2**20:.2f} ({said / seen:.3f})")
    if table := os.environ.get("PLAN_TABLE"):
        with open(table, "a") as file:
            file.write(json.dumps(row) + "\n")
    assert said == pytest.approx(seen, rel=0.1), title


@pytest.mark.parametrize(("name", "data", "args"), [RUNS[0], *(pytest.param(*run, marks=pytest.mark.slow) for run in RUNS[1:])])
def test_the_peak_of_a_plan_is_that_of_the_run(place, here, name, data, args):
    one = config(place, name, data, *args)
    compare(" ".join(map(str, ("one process:", name, *args))), planned(one), measured(one))


@pytest.mark.slow
@pytest.mark.parametrize("args", [FULL, ()])
def test_copies_of_a_checkpoint_that_is_written_meanwhile_are_in_the_plan(place, here, monkeypatch, args):
    one = config(place, "sft", "text", *args, "--async-save", "--save-steps", 1)
    write = async_save.ckpt.write

    def slowly(*what):
        time.sleep(2)  # longer than a step
        return write(*what)

    monkeypatch.setattr(async_save.ckpt, "write", slowly)
    compare(" ".join(map(str, ("one process:", "sft", *args, "--async-save"))), planned(one), measured(one))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "data", "args"), [("gpt2", "sft", "text", FULL), ("gpt_neox", "dpo", "pairs", REMAT)])
def test_models_of_other_modules_are_counted(place, kit, here, kind, name, data, args):
    """Those that transformers computes."""
    sizes = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=1024)
    sizes |= {"intermediate_size": 512} if kind == "gpt_neox" else {}
    chosen = transformers.AutoConfig.for_model(kind, vocab_size=kit.SIZES["vocab_size"], bos_token_id=None, eos_token_id=None, **sizes)
    if not (place / kind).exists():
        transformers.AutoModelForCausalLM.from_config(chosen).save_pretrained(place / kind)
        kit.tokenizer(kit.CHATML).save_pretrained(place / kind)
    one = config(place, name, data, *args, model=kind)
    fit.run(one)  # the first run of such a model also checks its modules
    compare(" ".join(("one process:", kind, name, *args)), planned(one), measured(one))
