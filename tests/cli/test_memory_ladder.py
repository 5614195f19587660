"""What to try where memory has run out: each rung has the peak of the run that its flags make, and less than the one before."""

import pytest

from treetune.cli import main, memory_ladder, parse, requirements
from treetune.cli.methods import CONFIGS
from treetune.core.config import table

GIB = memory_ladder.GIB


def config(kit, tiny, command, *args):
    kind = main.COMMANDS[command].config
    parsed, given = parse.parse(command, kind, ["--model", str(tiny.long), *map(str, args)])
    return requirements.complete(parsed, CONFIGS[kind], given)


def joined(args, flags):
    """Arguments in which the flags replace earlier ones of the same name."""
    pairs = dict(zip(args[::2], args[1::2], strict=True))
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        pairs[flag] = value
    return [part for pair in pairs.items() for part in pair]


@pytest.mark.parametrize(
    ("command", "args", "first"),
    [
        ("sft", ["--micro-batch-size", "8", "--sequence-len", "2048"], "--micro-batch-size 4 --gradient-accumulation-steps 4"),
        ("sft", ["--adapter", "none", "--micro-batch-size", "1", "--sequence-len", "64"], "--gradient-checkpointing selective"),
        ("dpo", ["--gradient-checkpointing", "full", "--micro-batch-size", "1", "--sequence-len", "2048"], "--activation-offloading disk"),
        ("grpo", ["--micro-batch-size", "4", "--max-completion-length", "64"], "--micro-batch-size 2 --gradient-accumulation-steps 4"),
    ],
)
def test_every_rung_has_the_peak_of_the_run_that_it_makes(kit, tiny, command, args, first):
    ladder = memory_ladder.climb(config(kit, tiny, command, *args), "cpu")
    assert ladder.rungs[0].flags == first
    peaks, now = [ladder.peak], args
    for rung in ladder.rungs:
        now = joined(now, rung.flags.split())
        assert memory_ladder.climb(config(kit, tiny, command, *now), "cpu").peak == rung.peak, rung
        peaks.append(rung.peak)
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks) > 3


@pytest.mark.parametrize(("mesh", "offered"), [(("--sharding", "full"), True), (("--shard", "tensor=2"), False)])
def test_layers_of_ranks_go_to_files_unless_they_are_split(kit, tiny, monkeypatch, mesh, offered):
    monkeypatch.setenv("WORLD_SIZE", "2")
    tried = [flags for flags, _, _ in memory_ladder.changes(table.flatten(config(kit, tiny, "sft", *mesh)), "cpu")]
    assert ("--layer-offloading disk" in tried) == offered


def test_what_the_run_holds_besides_is_on_every_rung(kit, tiny):
    one = config(kit, tiny, "sft", "--micro-batch-size", 4)
    plain, more = (memory_ladder.climb(one, "cpu", held=held) for held in (None, GIB))
    assert more.peak > GIB > plain.peak
    ladders = [{rung.flags: rung.peak for rung in ladder.rungs} for ladder in (plain, more)]
    assert all(peak - ladders[0][flags] == more.peak - plain.peak for flags, peak in ladders[1].items())


def test_the_words_say_which_rung_fits_and_where_memory_is_not_the_runs(kit, tiny):
    ladder = memory_ladder.Ladder(10 * GIB, [memory_ladder.Rung("--a 1", "slower", 9 * GIB), memory_ladder.Rung("--b 2", "worse", 3 * GIB)])
    lines = memory_ladder.lines(ladder, 8 * GIB)
    assert lines[0] == (
        "this run needs about 10.00 GiB at its peak, of 8.00 GiB of memory; to need less, in this order, each with those before it:"
    )
    assert lines[1:] == ["1. --a 1: about 9.00 GiB (slower)", "2. --b 2: about 3.00 GiB (worse), which fits"]
    roomy = memory_ladder.lines(ladder, 80 * GIB)
    assert "look for what else takes memory" in roomy[0] and not any("fits" in line for line in roomy)
    assert memory_ladder.first(ladder) == "try --a 1, about 9.00 GiB instead of 10.00 GiB, or further down the list of 2 above"
    assert "a smaller model" in memory_ladder.first(memory_ladder.Ladder(GIB, []))


def test_a_ladder_of_random_weights_keeps_what_such_a_run_refuses_out(kit, tiny):
    args = ["--from-config", str(tiny.long / "config.json"), "--micro-batch-size", "2"]
    kind = main.COMMANDS["pretrain"].config
    parsed, given = parse.parse("pretrain", kind, args)
    ladder = memory_ladder.climb(requirements.complete(parsed, CONFIGS[kind], given), "cpu")
    flags = " ".join(rung.flags for rung in ladder.rungs)
    assert "--quant" not in flags and "--adapter" not in flags and "--micro-batch-size 1" in flags
