"""`treetune plan`: what a run would take, from its config alone."""

import dataclasses
import json
import math

import pytest

from treetune.cli import main, memory_check, memory_ladder, parse, requirements
from treetune.cli.methods import CONFIGS, of_config
from treetune.cli.planning import advice, command, estimate
from treetune.core import param, tree
from treetune.models import describe, devices

SMALL = ("--micro-batch-size", "1", "--sequence-len", "64")


def planned(tiny, name, *args):
    kind = main.COMMANDS[name].config
    parsed, given = parse.parse(name, kind, ["--model", str(tiny.long), *SMALL, *map(str, args)])
    config = requirements.complete(parsed, CONFIGS[kind], given)
    return estimate.Run(of_config(config), config, *describe.read_sizes(tiny.long))


def test_a_plan_has_a_line_for_each_device_and_loads_nothing(tiny, capsys, monkeypatch):
    monkeypatch.setattr("treetune.models.loading.load_model", lambda *a, **k: pytest.fail("a plan loads no weights"))
    assert main.main(["plan", "sft", "--model", str(tiny.long), *SMALL]) == 0
    # A slow machine is told what it waits for.
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(" ...")]
    assert lines[0].startswith("sft of ") and "lora r 16" in lines[0]
    assert [line.split()[0] for line in lines[2:9]] == ["H200", "H100", "A100", "A100", "RTX", "L4", "this"]
    assert all("fits" in line for line in lines[2:9])


def test_terms_add_up_and_a_file_says_the_run(tiny, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(f"method: sft\nmodel: {tiny.long}\nmicro_batch_size: 1\nsequence_len: 64\n")
    assert main.main(["plan", str(tmp_path / "run.yaml"), "--on", "l4", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plan"]
    assert plan["peak"] == sum(plan["memory"].values()) and plan["step_seconds"] == pytest.approx(sum(plan["seconds"].values()))
    assert {"weights", "adapter", "gradients", "optimiser states", "activations"} <= plan["memory"].keys()


@pytest.mark.slow
def test_what_does_not_fit_comes_with_changes_that_do(tiny, capsys):
    args = ["plan", "sft", "--model", str(tiny.long), "--micro-batch-size", "4", "--sequence-len", "128", "--on", "cpu", "--memory", "2MiB"]
    assert main.main(args) == 0
    out = capsys.readouterr().out
    assert "does not fit on this CPU" in out and "to make it fit, the fastest first:" in out
    flags = out.partition("first:\n")[2].splitlines()[0].split("  ")[1].split()
    capsys.readouterr()
    assert main.main([*args, *flags]) == 0
    assert "fits on this CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "wrong"),
    [
        ([], "needs a config file or the name of a method"),
        (["sft", "--on", "gtx"], "'gtx' is no device that is known"),
        (["sft", "--memory", "much"], "expected a size such as 24GiB"),
        (["sft", "--nproc", "0"], "nproc must be"),
        (["sft", "--model", "nowhere/at-all"], "name a folder that holds one"),
    ],
)
def test_a_wrong_question_is_refused_in_a_line(args, wrong, capsys, tiny):
    assert main.main(["plan", *(str(tiny.long) if arg == "HERE" else arg for arg in args)]) == 2
    assert wrong in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("24", 24 * 2**30), ("80GB", 80 * 10**9), ("512m", 2**29)])
def test_sizes_are_read_with_their_units(text, size):
    assert command.size_of(text) == size


def test_devices_that_share_what_trains_hold_less_and_talk(tiny):
    run = planned(tiny, "sft", "--adapter", "none")

    def one(*place, **more):
        there = estimate.Place(devices.GPUS["l4"], *place, **more)
        return estimate.estimate(run, estimate.counted(run, there), there)

    leaves = [leaf.shape for leaf in tree.leaves(run.shapes(devices.GPUS["l4"]).abstract)]

    def part(ranks):
        """Of the numbers of leaves, of which the first rank has the rows that do not divide."""
        return sum(-(-rows // ranks) * math.prod(rest) for rows, *rest in leaves) / sum(map(math.prod, leaves))

    alone, copies, shared = one(), one(4), one(4, "full")
    counts = 4 * len(leaves)  # bytes of the steps of each leaf, which are whole
    assert shared.memory["optimiser states"] == pytest.approx((alone.memory["optimiser states"] - counts) * part(4) + counts, rel=1e-6)
    assert copies.memory["optimiser states"] == alone.memory["optimiser states"] and copies.tokens == 4 * alone.tokens
    split = {what: one(4, what) for what in ("moments", "gradients")}
    assert all(one.memory["optimiser states"] == shared.memory["optimiser states"] for one in split.values())
    assert split["moments"].memory["gradients"] == alone.memory["gradients"] > split["gradients"].memory["gradients"]
    twice = one(4, "full", copies=2)
    assert twice.memory["optimiser states"] == pytest.approx((alone.memory["optimiser states"] - counts) * part(2) + counts, rel=1e-6)
    assert "communication" not in alone.seconds and 0 < copies.seconds["communication"] < shared.seconds["communication"]


@pytest.mark.more
@pytest.mark.parametrize(("split", "weights"), [({"tensor": 2}, 2), ({"context": 2}, 1), ({"tensor": 2, "sharding": "full"}, 4)])
def test_ranks_that_compute_the_same_rows_together_are_counted(tiny, split, weights):
    """They hold less of a layer, or of a stream, and wait for one another in each."""
    run, ranks = planned(tiny, "dpo"), 4 if "sharding" in split else 2
    alone, there = estimate.Place(devices.GPUS["l4"]), estimate.Place(devices.GPUS["l4"], ranks, **split)
    one, other = (estimate.estimate(run, estimate.counted(run, place), place) for place in (alone, there))
    assert other.memory["weights"] == pytest.approx(one.memory["weights"] / weights, rel=0.02)  # norms are whole along tensor
    assert other.memory["activations"] < 0.8 * one.memory["activations"]
    assert other.tokens == one.tokens * ranks / 2 and other.seconds["communication"] > 0


def test_a_slow_link_is_waited_for(tiny):
    """Of layers for two gathers in the compute dtype and a float32 sum, and at both ends for one more of each; outside layers for all."""
    run, ranks = planned(tiny, "sft", "--adapter", "none", "--gradient-accumulation-steps", "3"), 4
    device = devices.GPUS["l4"]._replace(link=1.0, latency=0.0)
    model = run.shapes(device)
    layers, outside = (param.count({"": part}) for part in (model.abstract["layers"], model.abstract | {"layers": []}))
    outside += 0 if "lm_head" in model.abstract else param.count({"": model.abstract["embed_tokens"]})
    sent = (2 * 2 + 4) * layers * (1 + 1 / model.cfg.num_layers) + (2 + 4) * outside
    place = estimate.Place(device, ranks, "full")
    seen = estimate.counted(run, place)
    waited = estimate.estimate(run, seen, place).seconds["communication"]
    assert waited == pytest.approx(3 * sent * (ranks - 1) / ranks, rel=1e-2)
    fast = estimate.estimate(run, seen, place._replace(device=device._replace(link=1e15)))
    assert fast.seconds.get("communication", 0) < 1e-6, "messages travel beside the computation"


def test_devices_that_are_there_are_first_offered_as_another_mesh(tiny):
    run = planned(tiny, "sft")
    kv = run.cfg.num_kv_heads
    flags = [one.flags for one in advice._changes(run, estimate.Place(devices.GPUS["l4"], 4))]
    assert flags[:2] == ["--nproc 4 --sharding full", "--nproc 4 --shard tensor=2,data=2"]
    assert ("--nproc 4 --shard tensor=4" in flags) == (kv % 4 == 0) and "--nproc 8 --sharding full" in flags
    split = [one.flags for one in advice._changes(run, estimate.Place(devices.GPUS["l4"], 4, "full"))]
    assert "--nproc 4 --sharding full" not in split, "what is done already"
    odd = planned(tiny, "sft", "--relora-steps", "10")
    assert not [one for one in advice._changes(odd, estimate.Place(devices.GPUS["l4"], 4)) if "tensor" in one.flags], "it is refused"


def test_changes_are_of_the_config(tiny):
    run = advice.changed(planned(tiny, "dpo"), {"gradient_checkpointing": "full", "quant": "nf4"})
    assert (run.config.optim.gradient_checkpointing, run.config.model.quant) == ("full", "nf4")


@pytest.mark.parametrize(("gpu", "refused"), [(False, False), (True, True)])
def test_a_run_that_may_not_fit_is_warned_of_and_one_that_cannot_is_refused(tiny, monkeypatch, gpu, refused):
    config = planned(tiny, "sft").config
    needed = memory_check.need(config, "cpu")
    several = [dataclasses.replace(config, run=dataclasses.replace(config.run, sharding=what)) for what in ("moments", "gradients", "full")]
    held = [needed.held, *(memory_check.need(one, "cpu", 4).held for one in several)]
    assert held == sorted(held, reverse=True) and len(set(held)) == 4
    room = (needed.peak + needed.held) // 2
    monkeypatch.setattr(memory_ladder, "capacity", lambda device: room)
    monkeypatch.setattr(memory_check, "need", lambda *args: needed._replace(capacity=room, gpu=gpu))
    if not refused:
        assert memory_check.check(config, "cpu").startswith("this run may need about ")
        needed = needed._replace(held=2 * needed.peak)
    with pytest.raises(ValueError, match=r"this run needs about .*: try --.* --ignore-memory starts it all the same"):
        memory_check.check(config, "cpu")
    assert memory_check.check(dataclasses.replace(config, run=dataclasses.replace(config.run, ignore_memory=True)), "cpu") == ""


def test_a_run_that_cannot_fit_reads_no_weights_and_leaves_nothing(tiny, here, tune, kit, monkeypatch):
    monkeypatch.setattr(memory_ladder, "capacity", lambda device: 1000)
    monkeypatch.setattr("treetune.models.loading.load_model", lambda *a, **k: pytest.fail("weights were read"))
    done = tune("sft", "--model", tiny.model, "--data", tiny.chat, *SMALL)
    assert done.code == 2 and "this run needs about" in done.err and kit.listing(here) == set()
    dry = tune("sft", "--model", tiny.model, "--data", tiny.chat, *SMALL, "--dry-run")
    assert dry.code == 0 and "--ignore-memory" in dry.out
