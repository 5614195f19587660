"""One of two ranks that hold a half of each leaf. argv: folder. Results go there as safetensors and JSON, from rank 0."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import Shard

from treetune.core import ckpt, optim, registry, rounding, shard, tree
from treetune.core.run.ranks import join_ranks
from treetune.core.state import TrainState

ELEMENTWISE = ("adamw", "lion", "sgd", "adagrad", "adopt", "schedule_free_adamw", "adamw_8bit", "lion_8bit", "adamw_4bit", "adamw_fp8")
REFUSED = ("adamw_8bit", "adamw_4bit", "muon", "adafactor", "galore_adamw", "apollo_mini")
ROUNDED = ("lion, bfloat16", "adamw_8bit, bfloat16", "adopt, bfloat16 by columns")
STEPS = 4


def params(odd: bool) -> dict:
    """A leaf whose halves are whole blocks, a small one that splits unevenly, and, if asked, a large one whose halves are no blocks."""
    gen = torch.Generator().manual_seed(0)
    shapes = {"layers": [{"w": (64, 128), "small": (7, 5)}]} | ({"odd": (65, 64)} if odd else {})
    return tree.map(lambda shape: torch.randn(shape, generator=gen), shapes)


def train(label: str, start: dict, placed) -> TrainState:
    """A few steps on the leaves that `placed` makes of whole ones."""
    name, rounded, _ = label.partition(", bfloat16")
    optimizer: optim.Optimizer = registry.bind(registry.OPTIMIZERS[name], weight_decay=0.1, rank=4)()
    weights = tree.map(placed, start)
    if rounded:
        weights, optimizer = tree.map(lambda leaf: leaf.bfloat16(), weights), rounding.stochastic(optimizer, 3)
    state = optimizer.init(weights)
    for step in range(STEPS):
        gen = torch.Generator().manual_seed(step + 1)
        grads = tree.map(lambda leaf, gen=gen: placed(torch.randn(leaf.shape, generator=gen)), start)
        weights, state = optimizer.update(grads, state, weights, torch.tensor(0.01), torch.tensor(float(step == 2)))
    return TrainState(
        weights, {}, state, {"shown": optimizer.shown(TrainState(weights, {}, state, {}, torch.tensor(0))).params}, torch.tensor(STEPS)
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = join_ranks(torch.device("cpu"))
    mesh, refused = ranks.mesh, {}
    assert mesh is not None

    def half(leaf: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return shard.distribute(leaf, mesh, (Shard(dim),))

    for name in ELEMENTWISE + ROUNDED:
        placed = partial(half, dim=int("columns" in name))
        state = train(name, params(odd=False), placed)
        ckpt.save(folder / name, state, {})
        torch.distributed.barrier()  # rank 0 writes
        again = train(name, tree.map(torch.zeros_like, params(odd=False)), placed)
        loaded, _ = ckpt.load(folder / name / "step_000004", again)
        whole = {path: shard.full(leaf).contiguous() for path, leaf in tree.items({"params": loaded.params, "opt": loaded.opt})}
        if ranks.rank == 0:
            save_file(whole, folder / f"{name}.safetensors")
    for name in REFUSED:
        try:
            train(name, params(odd=True), half)
        except ValueError as error:
            refused[name] = str(error)
    (folder / f"refused{ranks.rank}.json").write_text(json.dumps(refused))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
