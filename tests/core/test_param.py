import math

import pytest
import torch

from treetune.core import param, tree
from treetune.core.param import Param

ABSTRACT = {"embed": Param((64, 32)), "layers": [{"w": Param((32, 16))}, {"w": Param((32, 16))}], "norm": Param((32,), init="ones")}


def test_init_depends_on_seed_and_path_only():
    first = param.init(ABSTRACT, seed=3)
    torch.manual_seed(99)
    reordered = param.init({"norm": ABSTRACT["norm"], "layers": ABSTRACT["layers"], "embed": ABSTRACT["embed"]}, seed=3)
    alone = param.init({"layers": [{}, {"w": Param((32, 16))}]}, seed=3)
    assert all(torch.equal(dict(tree.items(first))[path], leaf) for path, leaf in tree.items(reordered))
    assert torch.equal(alone["layers"][1]["w"], first["layers"][1]["w"])
    assert not torch.equal(first["layers"][0]["w"], first["layers"][1]["w"])
    assert not torch.equal(first["embed"], param.init(ABSTRACT, seed=4)["embed"])


def test_init_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    param.init(ABSTRACT, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_init_kinds():
    big = {name: Param((400, 100), init=name) for name in ("normal:0.05", "kaiming", "zeros", "ones")}
    made = param.init(big, seed=1)
    assert made["normal:0.05"].std().item() == pytest.approx(0.05, rel=0.02) and abs(made["normal:0.05"].mean().item()) < 1e-3
    bound = 1 / math.sqrt(100)  # torch's kaiming_uniform_(a=sqrt(5)), which PEFT uses
    assert 0.99 * bound < made["kaiming"].abs().max().item() <= bound
    assert made["kaiming"].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert (made["zeros"] == 0).all() and (made["ones"] == 1).all()
    with pytest.raises(ValueError, match=r"layers\.0\.w: unknown init 'normall:1'"):
        param.init({"layers": [{"w": Param((2,), init="normall:1")}]}, seed=0)


def test_low_precision_leaves_are_rounded_float32_ones():
    half = param.init({"w": Param((8, 8), torch.bfloat16)}, seed=2)["w"]
    assert torch.equal(half, param.init({"w": Param((8, 8))}, seed=2)["w"].bfloat16())


def test_count_of_params_and_of_tensors():
    assert param.count(ABSTRACT) == param.count(param.init(ABSTRACT, seed=0)) == 64 * 32 + 2 * 32 * 16 + 32


def test_seed_of_tells_its_parts_apart():
    seeds = {param.seed_of(*parts) for parts in [(1, 2), (12,), (2, 1), (1, "2", ""), ("1/2", 3), (1, 23)]}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
