"""Ranks read their rows of a model: the numbers of the whole one bit for bit, and no more of them than their part and one leaf."""

import json
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("loading_worker.py")
# Numbers of rows that no number of ranks divides, and fewer heads than ranks.
SIZES = dict(vocab_size=53, hidden_size=22, mlp_size=37, num_layers=3, num_heads=3, num_kv_heads=1, head_dim=6, max_positions=64)


def _save(root: Path) -> None:
    from treetune.core.quant import Scheme
    from treetune.models import hf, llama, mixtral, moe, phi3, quantising

    own = llama.Config(**SIZES, tied=False, init_std=0.3)
    tied = llama.Config(**SIZES, tied=True, init_std=0.3)
    experts = moe.Experts(5, 2, 7, (0, 1, 2))
    sparse = mixtral.Config(**SIZES | dict(mlp_size=7), tied=False, init_std=0.3, experts=experts)
    turned = mixtral.Config(
        **SIZES | dict(mlp_size=7), tied=False, init_std=0.3, qkv_bias=True, o_bias=True, attn_sinks=True, norm="olmo",
        layer_windows=(8, None, 8), experts=moe.Experts(5, 2, 7, (0, 1, 2), biased=True, clamp=(1.702, 7.0)),
    )  # fmt: skip
    hf.save(root / "dense, tied", hf.random("llama", tied, seed=1))
    of_blocks = SIZES | dict(hidden_size=64, mlp_size=128, num_heads=4, num_kv_heads=2, head_dim=32)
    wide = hf.random("llama", llama.Config(**of_blocks, init_std=0.3), seed=6)
    hf.save(root / "wide", wide)
    for kind in ("nf4", "int8"):
        hf.write(root / f"in {kind}", *quantising.described(wide, Scheme(kind, experts=False), torch.float32, None))
    hf.save(root / "experts", hf.random("mixtral", sparse, seed=2))
    hf.save(root / "experts, stacked", hf.random("mixtral", sparse, seed=2), stacked=True)
    hf.save(root / "fused", hf.random("phi3", phi3.Config(**SIZES, tied=False, init_std=0.3), seed=3))
    hf.save(root / "turned", hf.random("gpt_oss", turned, seed=4))
    hf.save(root / "bfloat16, in files", hf.random("llama", own, seed=5, dtype=torch.bfloat16), max_shard_bytes=4000)


@pytest.fixture(scope="module")
def looks(launch, tmp_path_factory):
    """looks(world) -> what each rank says of each model."""
    root, by_world = tmp_path_factory.mktemp("loading"), {}
    (root / "models").mkdir()
    _save(root / "models")

    def get(world: int) -> list[dict]:
        if world not in by_world:
            launch(world, WORKER, root, *(NAMES + QUANTISED if world > 2 else FAST + FAST_QUANTISED), cwd=root)
            by_world[world] = [json.loads((root / f"rank{i}.json").read_text()) for i in range(world)]
        return by_world[world]

    return get


FAST = ("dense, tied", "experts", "fused")
NAMES = (*FAST, "experts, stacked", "turned", "bfloat16, in files")
# Rows of 22 numbers are not made of blocks of 64, those of 128 are.
FAST_QUANTISED = ("dense, tied/nf4", "wide/int8")
SCHEMES = ("nf4", "nf4, once", "fp4", "int4", "int8", "fp8")
QUANTISED = tuple(f"{name}/{scheme}" for name in ("dense, tied", "wide", "experts") for scheme in SCHEMES)
QUANTISED += ("in nf4/as written", "in int8/as written")
CASES = [(2, name) for name in FAST] + [pytest.param(4, name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize(("world", "name"), CASES)
def test_ranks_read_their_rows_and_no_more(looks, name, world):
    """Bit for bit those of the whole model, and the digests of it; in memory a part of each leaf, and at most one of another size."""
    for rank in (every[name] for every in looks(world)):
        assert rank["same"] and rank["placed"] and rank["grown"] and rank["cut"]
        assert rank["digest"][0] == rank["digest"][1] and rank["identity"][0] == rank["identity"][1]
        assert rank["bytes"] < rank["whole"] * (1.2 / world if "expert" not in name and name != "turned" else 0.6), (
            "5 experts are 2 a rank on four"
        )
        assert rank["read"] <= rank["bytes"], "bytes of rows of the files"
        assert rank["peak"] <= rank["bytes"] + rank["largest"], "shards and one leaf"
        assert rank["masters_peak"] <= rank["bytes"] + 1000, "float32 masters are made from shards"
        assert rank["digest_peak"] <= 6 * rank["largest"], "two leaves, each with what gathering it takes"
    assert sum(every[name]["bytes"] for every in looks(world)) == looks(world)[0][name]["whole"]


@pytest.mark.parametrize(("world", "name"), CASES)
def test_ranks_leave_the_files_of_one(looks, name, world):
    """To the byte: models, adapters, models with an adapter folded in, and those with a head. Nobody has more than a few leaves."""
    for rank in (every[name] for every in looks(world)):
        for kind, (same, peak) in rank["exported"].items():
            assert same, kind
            # a leaf, or those of one tensor of the files: gathered, rounded and put together; adapters are whole
            assert peak < (0.7 * rank["whole"] if kind in ("adapter", "folded") else 6 * rank["largest"]), (kind, peak, rank["largest"])


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["dense, tied", "experts"])
def test_ranks_sample_from_parts_what_whole_weights_sample(looks, name, world):
    """Bit for bit, though some have more prompts and longer answers; a layer is whole at a time, and the head."""
    for same, most in (every[name]["sampled"] for every in looks(world)):
        assert same and 0 < most < 0.7 * looks(world)[0][name]["whole"], most


QUANTISED_CASES = [(2, name) for name in FAST_QUANTISED] + [pytest.param(4, name, marks=pytest.mark.slow) for name in QUANTISED]


@pytest.mark.parametrize(("world", "name"), QUANTISED_CASES)
def test_ranks_hold_their_part_of_codes_and_statistics(looks, world, name):
    """The bits of one process, of which each rank has a part; digests, files and samples are those of the whole model."""
    every = [rank[name] for rank in looks(world)]
    for rank in every:
        assert rank["count"] and rank["same"] and rank["digest"] and rank["identity"] and rank["saved"] == [True, True] and rank["sampled"]
        few = 1.3 if "experts" in name else 1.15  # 5 experts are 2 a rank on four
        assert rank["held"] < few * rank["whole"] / world + 64 * rank["count"], "of each leaf its part, and a number"
        assert rank["beside"] <= rank["beside_whole"] + rank["largest"], "what quantising a leaf takes, and one whole leaf"
    assert sum(rank["held"] for rank in every) < every[0]["whole"] + 64 * world * every[0]["count"]
