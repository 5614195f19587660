"""Reward models and feature networks that ranks have in parts: half of the bytes on each of two, and the numbers of one process."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("torchrun_scene", HERE / "test_torchrun.py")
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)

SIZES = dict(vocab_size=257, hidden_size=24, mlp_size=40, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=512)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, reward models of a folder and of an adapter, and one of steps."""
    from treetune.core import lora, tree
    from treetune.core.quant import Scheme
    from treetune.models import adapter, heads, hf, llama

    root, words = tmp_path_factory.mktemp("nets"), scene._tokenizer()
    model = hf.random("llama", llama.Config(**SIZES, tied=True, init_std=0.2), seed=3)
    hf.save(root / "model", model, tokenizer=words)
    heads.save(root / "whole", model, heads.init(model.cfg, 1, bias=False, seed=5), tokenizer=words)
    heads.save(root / "steps", model, heads.init(model.cfg, 2, bias=True, seed=6), tokenizer=words)
    gen = torch.Generator().manual_seed(2)
    pairs = lora.init(model.params, lora.match(hf.abstract_of(model), "all-linear"), rank=3, seed=1)
    moved = tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=gen), pairs)
    norm = {"norm": model.params["norm"] + 0.3}
    info = adapter.Info(3, 6.0, base=str(root / "model"))
    heads.save_adapter(root / "adapter", moved, heads.init(model.cfg, 1, bias=False, seed=7), family="llama", info=info, whole=norm)
    info = info._replace(scheme=Scheme("nf4"))
    heads.save_adapter(root / "nf4", moved, heads.init(model.cfg, 1, bias=False, seed=7), family="llama", info=info)
    return root


def check(place, launch, ranks: int, most: dict[str, float]) -> None:
    """Scores and features of ranks against those of one process, and the share of each network that a rank holds on a mesh."""
    launch(ranks, HERE / "nets_worker.py", place, *most, cwd=place)
    for rank in range(ranks):
        for mesh, networks in json.loads((place / f"rank{rank}.json").read_text()).items():
            for name, (distance, held, same) in networks.items():
                assert distance < 1e-5 and same, (mesh, name, distance, same)
                assert held < most[mesh] or name == "nf4" and held <= 1, (mesh, name, held)


@pytest.mark.more
def test_two_ranks_score_with_half_of_each_network(place, launch):
    check(place, launch, 2, {"data=2": 0.52, "tensor=2": 0.55})


@pytest.mark.slow
def test_four_ranks_score_with_a_quarter_or_a_half(place, launch):
    check(place, launch, 4, {"tensor=2,data=2": 0.28, "replicate=2,data=2": 0.52})
