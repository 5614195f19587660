"""Ranges of numeric options: every one has a range with both ends, and what is past them is one line."""

import dataclasses
import math
import typing

import pytest

from treetune.cli import main
from treetune.core.config import table

RANGES = {
    name: option.range
    for command in main.COMMANDS.values()
    for name, option in table.options(command.config).items()
    if option.range is not None
}


def numeric(config) -> set[str]:
    """Options whose type holds int or float."""

    def holds(kind) -> bool:
        return kind in (int, float) or any(holds(one) for one in typing.get_args(kind))

    return {name for name, kind in table.kinds(config).items() if holds(kind)}


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_numeric_option_has_a_range_with_two_ends(command):
    names = numeric(main.COMMANDS[command].config)
    known = {name: option.range for name, option in table.options(main.COMMANDS[command].config).items() if option.range is not None}
    assert not names - known.keys()
    assert all(math.isfinite(known[name].low) and math.isfinite(known[name].high) for name in names)
    assert all(known[name] == RANGES[name] for name in names), "an option has two ranges"


def test_every_range_is_of_an_option():
    known = {name for command in main.COMMANDS.values() for name in numeric(command.config)}
    assert not RANGES.keys() - known


@pytest.mark.parametrize("command", main.COMMANDS)
def test_defaults_lie_in_their_ranges(command):
    for name, default in table.defaults(main.COMMANDS[command].config).items():
        if default is not dataclasses.MISSING:
            assert name not in RANGES or default is None or RANGES[name].outside(default) == ""


@pytest.mark.parametrize("name", RANGES)
def test_no_range_holds_what_the_machine_does_not(name):
    known = RANGES[name]
    assert not any(known.holds(value) for value in (math.nan, math.inf, -math.inf, 1e39, -1e39, 10**40, -(10**40)))
    assert known.outside(10**5000).startswith("must be ") and "5001 digits" in known.outside(10**5000)
    if known.whole:
        assert known.holds(known.low) and known.holds(known.high) and not known.holds(known.high + 1)


PAST = [
    ("sft", "seed", "99999999999999999999999"),
    ("sft", "seed", "-1"),
    ("sft", "warmup-steps", "99999999999999999999"),
    ("sft", "lora-r", "99999999999"),
    ("sft", "embedding-multiple", "99999999999"),
    ("sft", "max-rows", "99999999999999999999999"),
    ("sft", "micro-batch-size", "1000000"),
    ("sft", "sequence-len", "1000000000000"),
    ("sft", "learning-rate", "1e400"),
    ("sft", "learning-rate", "nan"),
    ("sft", "max-grad-norm", "inf"),
    ("sft", "sample-tokens", "1e400"),
    ("grpo", "temperature", "1e400"),
    ("grpo", "num-generations", "10000000"),
    ("grpo", "top-k", "1" * 50),
    ("grpo", "reward-timeout", "1e300"),
    ("grpo", "reward-weights", "1e400"),
    ("grpo", "stop-token-ids", "-5"),
    ("generate", "temperature", "-1"),
    ("serve", "port", "99999"),
    ("serve", "gpu-memory-utilization", "nan"),
    ("ebft", "feature-layers", "nan"),
    ("ebft", "stride", "1" * 30),
    ("merge", "max-logit-diff", "inf"),
    ("sft", "val-set-size", "1e300"),
    ("preprocess", "dataset-processes", "1" * 20),
    ("dpo", "loss-weights", "1e39"),
    ("sft", "lora-layers", "9" * 30),
    ("eval", "micro-batch-size", "0"),
]


@pytest.mark.parametrize(("command", "option", "value"), PAST)
def test_number_past_its_range_is_one_line_before_anything_is_read(command, option, value, kit, here, tune):
    words = ["a", "b"] if command == "merge" else []
    kit.refused(tune(command, *words, f"--{option}={value}"), option.replace("-", "[-_]"))
    assert kit.listing(here) == set()


def test_tokens_of_a_forward_pass_are_bounded(kit, here, tune):
    kit.refused(tune("sft", "--micro-batch-size", 60000, "--sequence-len", 4096), "micro_batch_size \\* sequence_len", "245760000")
