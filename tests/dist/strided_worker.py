"""One rank of the distributed test of strided rollouts. argv: folder. Rank 0 writes gradients and metrics of every case as safetensors.

Run in one process, as the test does, `cases` gives what one rank finds.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from treetune.core.run.ranks import Ranks, join_ranks
from treetune.models import policy

CASES = {"full": ("full", "none"), "lora": ("lora", "none"), "full sharded": ("full", "full"), "lora sharded": ("lora", "full")}


def _loaded():
    path = Path(__file__).parents[1] / "losses" / "test_ebft_objective.py"
    spec = importlib.util.spec_from_file_location("strided_scene", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(ranks: Ranks) -> dict[str, torch.Tensor]:
    """{"CASE/DEAL/gradient/PATH" or ".../metric/NAME": number} of a step, its micro-batches dealt to the ranks in turn."""
    strided, out = _loaded(), {}
    scene, docs = strided.scene, strided.documents()
    deals = {"ragged": [docs[:1], docs[1:2], docs[2:4], docs[4:]], "a rank without documents": [docs[:4], [], docs[4:], []]}
    for name, (trains, sharding) in CASES.items():
        base = scene.model()
        built = strided.made(base, scene.adapted(base) if trains == "lora" else None, mesh=ranks.mesh)
        at = scene.state(built)
        placed = policy.place(built.policy._replace(params=at.params), ranks.mesh, sharding)
        at = at._replace(params=placed.params, frozen=placed.frozen)
        for deal, groups in deals.items():
            grads, metrics = scene.gradients(built, at, groups[ranks.rank :: ranks.world], ranks.mesh)
            out |= {f"{name}/{deal}/gradient/{path}": leaf for path, leaf in grads.items()}
            out |= {f"{name}/{deal}/metric/{key}": value.double() for key, value in metrics.items()}
    return out


def main() -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    ranks = join_ranks(torch.device("cpu"))
    found = cases(ranks)
    if ranks.rank == 0:
        save_file({key: leaf.contiguous() for key, leaf in found.items()}, Path(sys.argv[1]) / "two.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
