"""Layers, heads and experts split among ranks: what one process computes, forward and backward."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from treetune.core import partition, quant, quant_split
from treetune.models import hf, llama, moe, tensor_rules
from treetune.ops.tensor_parallel import Split

WORKER = Path(__file__).parent / "tensor_worker.py"
FAST = ("llama, adapter, again", "qwen3, full", "qwen3_moe, full, selective", "gpt_oss, adapter")
SLOW = tuple(
    f"{family}, {trains}"
    for family in ("llama", "qwen2", "qwen3", "gemma2", "granite", "mixtral", "qwen3_moe", "gpt_oss")
    for trains in ("full", "adapter")
    if f"{family}, {trains}" not in FAST
)


FILES, SLOW_FILES = ("dense, tied",), ("dense, tied", "experts", "fused", "turned")


def _save(root: Path, names: tuple[str, ...]) -> None:
    """Model folders by these names."""
    sizes = dict(
        vocab_size=53, hidden_size=22, mlp_size=36, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=64, init_std=0.3
    )
    sparse = sizes | dict(mlp_size=7, experts=moe.Experts(4, 2, 7, (0, 1, 2)))
    biased = sparse | dict(qkv_bias=True, o_bias=True, attn_sinks=True, norm="olmo", layer_windows=(8, None, 8))
    biased["experts"] = moe.Experts(4, 2, 7, (0, 1, 2), biased=True, clamp=(1.702, 7.0))
    models = {
        "dense, tied": ("llama", sizes | dict(tied=True)), "experts": ("mixtral", sparse), "fused": ("phi3", sizes),
        "turned": ("gpt_oss", biased),
    }  # fmt: skip
    root.mkdir()
    for name in names:
        family, own = models[name]
        hf.save(root / name, hf.random(family, llama.Config(**own), seed=1))


FAST_SCHEMES, SCHEMES = ("nf4",), ("nf4", "nf4, once", "fp4", "int4", "int8", "fp8")


def _save_wide(root: Path, schemes: tuple[str, ...]) -> None:
    """A model folder whose rows, and halves of rows, are whole blocks of codes, and how it is quantised."""
    sizes = dict(vocab_size=53, hidden_size=64, mlp_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, init_std=0.3)
    hf.save(root / "wide", hf.random("llama", llama.Config(**sizes), seed=2))
    (root / "schemes.json").write_text(json.dumps(schemes))


@pytest.fixture(scope="module")
def looks(launch, tmp_path_factory):
    """looks(world, names) -> what each rank says of each case."""
    by_world = {}

    def get(world: int, names: tuple[str, ...]) -> list[dict]:
        if (world, names) not in by_world:
            root = tmp_path_factory.mktemp("tensor")
            _save(root / "models", FILES if names == FAST else SLOW_FILES)
            _save_wide(root, FAST_SCHEMES if names == FAST else SCHEMES)
            launch(world, WORKER, root, *names, cwd=root)
            by_world[world, names] = [json.loads((root / f"rank{i}.json").read_text()) for i in range(world)]
        return by_world[world, names]

    return get


CASES = [(2, FAST, name) for name in FAST]
CASES += [pytest.param(2, SLOW, name, marks=pytest.mark.slow) for name in SLOW]
CASES += [pytest.param(4, (*FAST, *SLOW), name, marks=pytest.mark.slow) for name in (*FAST, *SLOW)]  # two, and each part in two


@pytest.mark.parametrize(("world", "names", "name"), CASES)
def test_split_layers_compute_what_whole_ones_do(looks, world, names, name):
    """Log-probs and other statistics, and all gradients; what each rank has whole comes out the same to the bit on all of them."""
    for rank in (every["models"][name] for every in looks(world, names)):
        assert max(rank["statistics"].values()) < 2e-6, rank["statistics"]
        assert max(rank["gradients"].values()) < 1e-5, rank["gradients"]
        assert rank["same"]
        assert rank["numbers"] < 1.05 / world + 0.02, "of the weights each rank has its part, and norms"


@pytest.mark.parametrize("case", ["sure", "capped", "few", "none"])
def test_a_split_head_gives_the_statistics_of_a_whole_one(looks, case):
    for rank in looks(2, FAST):
        assert rank["heads"][case] < 1e-12, "float64"


FILE_CASES = [(2, FAST, name) for name in FILES] + [pytest.param(2, SLOW, name, marks=pytest.mark.slow) for name in SLOW_FILES]
FILE_CASES += [pytest.param(4, (*FAST, *SLOW), name, marks=pytest.mark.slow) for name in SLOW_FILES]


@pytest.mark.parametrize(("world", "names", "name"), FILE_CASES)
def test_ranks_read_save_and_sample_from_rows_and_columns(looks, world, names, name):
    """What they read are the bits of the whole model, what they save has the bytes of one process's files, what they sample its tokens."""
    for rank in (every["files"][name] for every in looks(world, names)):
        assert rank["same"] and rank["placed"] and rank["grown"] and rank["cut"]
        assert rank["digest"][0] == rank["digest"][1] and rank["identity"][0] == rank["identity"][1]
        assert rank["bytes"] < 1.15 * rank["whole"] / world
        assert rank["read"] <= rank["bytes"] or name == "turned", "bytes of the files; turned leaves are read in rows"
        assert rank["peak"] <= rank["bytes"] + rank["largest"] and rank["masters_peak"] <= rank["bytes"] + 3000
        assert all(same for same, _ in rank["exported"].values()), rank["exported"]
        assert rank["sampled"] is None or rank["sampled"][0]


CODED_CASES = [(2, FAST, name) for name in FAST_SCHEMES] + [pytest.param(2, SLOW, name, marks=pytest.mark.slow) for name in SCHEMES]
CODED_CASES += [pytest.param(4, (*FAST, *SLOW), name, marks=pytest.mark.slow) for name in SCHEMES]


@pytest.mark.parametrize(("world", "names", "name"), CODED_CASES)
def test_quantised_layers_are_split_by_whole_blocks(looks, world, names, name):
    """Codes and statistics, joined and as a rank makes its part dense, have the bits of one process; files and samples are those of it."""
    for rank in (every["coded"][name] for every in looks(world, names)):
        assert (
            rank["count"] == 14
            and rank["same"]
            and rank["digest"]
            and rank["identity"]
            and rank["saved"] == [True, True]
            and rank["sampled"]
        )
        # Of rows in 8 bits of which ranks have columns each has the scales; the maxima of maxima are whole along the axis, too.
        assert rank["held"] < 1.1 * rank["whole"] / world + 64 * rank["count"]


class _Mesh:
    """A mesh of which sizes are asked."""

    mesh_dim_names = ("tensor",)
    ndim = 1

    def __getitem__(self, name):
        return self

    def size(self, axis=None):
        return 2


@pytest.mark.parametrize(
    ("path", "width", "kind", "reason"),
    [
        ("layers.0.q_proj", 96, "nf4", "its rows of 96 numbers are no whole blocks of 64, as nf4 has"),
        ("layers.0.down_proj", 64, "int4", "its rows of 64 numbers, and 32 of them are no whole blocks of 64, as int4 has"),
        ("layers.0.o_proj", 96, "fp4", "its rows of 96 numbers are no whole blocks of 64, as fp4 has"),
    ],
)
def test_blocks_that_ranks_would_have_parts_of_are_refused(path, width, kind, reason):
    home, leaf = partition.Partition(_Mesh(), tensor_rules.dimension), quant.quantise(torch.ones(4, width), quant.Scheme(kind))
    with pytest.raises(ValueError, match=f"shard tensor=2 does not fit {path}: {reason}; give quant int8"):
        home.split(path, leaf)
    assert quant_split.refusal(quant.quantise(torch.ones(4, width), quant.Scheme("int8")), 1, 2) == ""


def test_parts_of_a_split_cover_all_rows():
    for size, ranks in ((53, 2), (53, 4), (8, 4), (9, 4)):
        parts = [Split(None, rank, ranks).part(size) for rank in range(ranks)]
        assert [parts[0][0], *(end for _, end in parts)] == [0, *(first for first, _ in parts[1:]), size]


CFG = llama.Config(vocab_size=53, hidden_size=16, mlp_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6)
REFUSED = {
    "key/value heads": (CFG, 4),
    "columns of the mlp": (dataclasses.replace(CFG, mlp_size=25), 2),
    "experts of a layer": (dataclasses.replace(CFG, experts=moe.Experts(3, 2, 10, (0, 1))), 2),
    "without any": (dataclasses.replace(CFG, vocab_size=5, num_kv_heads=4), 4), "modules of transformers": (object(), 2),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_cannot_be_split_are_refused_with_the_reason(reason):
    cfg, size = REFUSED[reason]
    assert reason in tensor_rules.refusal(cfg, size)
    assert tensor_rules.refusal(CFG, 2) == "" == tensor_rules.refusal(dataclasses.replace(CFG, num_kv_heads=4), 4)
