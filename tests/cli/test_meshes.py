"""The axes of a run: sizes that follow, what is refused, and what is split where nothing is said."""

from types import SimpleNamespace

import pytest

from treetune.cli import requirements
from treetune.cli.methods import METHODS
from treetune.cli.methods.sft import Sft
from treetune.cli.options import meshes
from treetune.cli.options.run import RunOptions


def options(*shard, sharding=None, nproc=4, nnodes=1) -> SimpleNamespace:
    return SimpleNamespace(shard=shard, sharding=sharding, nproc=nproc, nnodes=nnodes)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(("shard", "processes", "sizes", "sharding"), [
    ((), 4, {"data": 4}, "none"), (("data=4",), 4, {"data": 4}, "full"), (("data=2,replicate=2",), 4, {"replicate": 2, "data": 2}, "full"),
    (("replicate=2",), 8, {"replicate": 2, "data": 4}, "full"), (("data=4",), 8, {"replicate": 2, "data": 4}, "full"),
    (("replicate=1", "data=4"), 4, {"data": 4}, "full"), (("tensor=2",), 2, {"tensor": 2}, "none"),
    (("context=2, tensor=2",), 8, {"tensor": 2, "context": 2, "data": 2}, "none"),
])  # fmt: skip
def test_sizes_that_are_missing_follow_and_name_what_is_split(shard, processes, sizes, sharding):
    given = options(*shard, nproc=processes)
    assert list(meshes.sizes(given).items()) == list(sizes.items()) and meshes.sharding(given) == sharding
    assert meshes.sharding(options(*shard, sharding="moments")) == "moments"


@pytest.mark.parametrize(("shard", "sharding", "error"), [
    ("data=3", None, "shard data=3 is for 3 processes or a multiple, and there are 4"),
    ("data=2,replicate=4", None, "shard data=2,replicate=4 is for 8 processes, and there are 4"),
    ("data=0", None, "whole numbers of at least 1"), ("data", None, "got 'data'"), ("data=x", None, "got 'data=x'"),
    ("row=2", None, "an axis of tensor, replicate, context, data, got 'row=2'"), ("expert=2", None, "experts are split along tensor"),
    ("data=2,data=2", None, "data twice"), ("", None, "got ''"),
    ("replicate=4", None, "sharding full splits along data, which has one rank"),
    ("replicate=4", "moments", "sharding moments splits along data, which has one rank"),
    ("replicate=2", "none", "sharding none splits nothing"),
])  # fmt: skip
def test_what_makes_no_mesh_is_refused(shard, sharding, error):
    with pytest.raises(ValueError, match=error):
        meshes.conflicts(options(shard, sharding=sharding))


def test_processes_of_torchrun_come_first(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert meshes.sizes(options("data=3")) == {"replicate": 2, "data": 3}


def test_a_checked_config_says_what_is_split():
    def done(**run) -> str | None:
        config = requirements._spelled_out(Sft(run=RunOptions(nproc=4, **run)))
        requirements.check(config, METHODS["sft"], frozenset({"shard"}))
        return config.run.sharding

    assert [done(shard=("data=2",)), done(), done(sharding="gradients")] == ["full", "none", "gradients"]
    with pytest.raises(ValueError, match="shard would be ignored: there is one process"):
        requirements.check(Sft(run=RunOptions(shard=("data=2",))), METHODS["sft"], frozenset({"shard"}))


def test_one_mesh_is_refused_on_the_command_line_with_one_line(kit, here, tune):
    kit.refused(tune("sft", "--nproc", 4, "--shard", "data=3"), "shard data=3 is for 3 processes")
    kit.refused(tune("sft", "--shard", "data=2"), "--shard would be ignored: there is one process")
    (here / "run.yaml").write_text("method: sft\nnproc: 4\nshard: {data: 3, tensor: 2}\n")
    kit.refused(tune("train", "run.yaml"), "shard data=3,tensor=2 is for 6 processes")
    (here / "run.yaml").write_text("method: sft\nnproc: 4\nshard: {tensor: 2}\n")
    kit.refused(tune("plan", "run.yaml"), "shard tensor=2 does not fit this model: this model has 3 key.value heads")
