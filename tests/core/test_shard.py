"""What placement means without ranks: everything is the identity on plain leaves. tests/dist has the rest."""

from types import SimpleNamespace

import torch
from torch.distributed.tensor import Replicate, Shard

from treetune.core import shard, tree
from treetune.core.param import Param


def test_placements_shard_the_first_dimension_that_has_a_rule():
    sizes = {
        "w": Param((6, 4), axes=("heads", "embed")), "b": Param((6,), axes=("heads",)), "odd": Param((3, 4), axes=("other", "embed")),
        "none": Param((3,), axes=("other",)), "scalar": Param(()),
    }  # fmt: skip
    one = SimpleNamespace(mesh_dim_names=("data",))
    found = shard.placements(sizes, one, shard.FULLY_SHARDED)
    want = {"w": (Shard(0),), "b": (Shard(0),), "odd": (Shard(1),), "none": (Replicate(),), "scalar": (Replicate(),)}
    assert found == want
    two = SimpleNamespace(mesh_dim_names=("replica", "data"))
    assert shard.placements(sizes, two, {"embed": "data"})["w"] == (Replicate(), Shard(1))


def test_every_axis_of_the_models_has_a_rule(model):
    from treetune.models import MODELS

    for module in MODELS.values():
        cfg = model().cfg
        for path, leaf in tree.items(module.abstract(cfg)):
            assert len(leaf.axes) == len(leaf.shape) and set(leaf.axes) <= set(shard.FULLY_SHARDED), path


def test_plain_leaves_pass_unchanged():
    leaf = torch.ones(3, 2)
    assert shard.gather(leaf) is shard.local(leaf) is shard.rewrap(leaf, leaf) is leaf
    assert shard.gather(leaf, torch.float64).dtype == torch.float64
    assert shard.full(leaf.requires_grad_()).requires_grad is False
    assert torch.equal(shard.like(torch.zeros_like, leaf), torch.zeros(3, 2))
    assert not shard.distributed(leaf) and not shard.sharded(leaf)


def test_without_a_mesh_there_is_one_rank():
    values = [torch.ones(2), torch.tensor(3)]
    assert shard.all_sum(values, None) is values and shard.world(None) == 1
    assert shard.all_reduce(values[1], "max", None) is values[1]
