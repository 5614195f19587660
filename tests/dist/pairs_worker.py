"""One rank of the distributed tests of preference methods. argv: folder. Rank 0 writes gradients and metrics of every case as safetensors.

Run in one process, as the test does, `cases` gives what one rank finds.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from treetune.core.run.ranks import Ranks, join_ranks
from treetune.models import policy

HERE = Path(__file__).parent
# name -> (command, options, what trains, sharding)
METHODS = {
    "dpo": ("dpo", {}, "full", "none"),
    "dpo lora": ("dpo", {"loss": ("dpo", "sft"), "loss_weights": (1.0, 0.3)}, "lora", "none"),
    "dpo sharded": ("dpo", {"loss": ("ipo",)}, "full", "full"),
    "orpo": ("orpo", {}, "full", "none"),
    "kto": ("kto", {"rl_beta": 0.3}, "full", "none"),
    "kto lora": ("kto", {"rl_beta": 0.3}, "lora", "none"),
    "kto sharded": ("kto", {"rl_beta": 0.3}, "full", "full"),
    "bco": ("kto", {"loss": "bco"}, "full", "none"),
    "reward": ("reward", {"center_rewards_coefficient": 0.05}, "full", "none"),
    "reward sharded": ("reward", {}, "lora", "full"),
}
MOVED = {"policy": 0.06, "seed": 17}


def _scene():
    spec = importlib.util.spec_from_file_location("preference_scene", HERE.parent / "losses" / "scene.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(ranks: Ranks) -> dict[str, torch.Tensor]:
    """{"METHOD/DEAL/gradient/PATH" or ".../metric/NAME": number} of a step, its micro-batches dealt to the ranks in turn."""
    scene, out = _scene(), {}
    for name, (command, options, trains, sharding) in METHODS.items():
        base = scene.model()
        used = scene.adapted(base) if trains == "lora" else None
        built = scene.parts(command, base, used, mesh=ranks.mesh, **options)
        at = scene.state(built, **MOVED)
        placed = policy.place(built.policy._replace(params=at.params), ranks.mesh, sharding)
        at = at._replace(params=placed.params, frozen=placed.frozen)
        docs = scene.judged(7) if command == "kto" else scene.pairs(empty=command != "reward")
        deals = {"ragged": [docs[:3], docs[3:4], docs[4:6], docs[6:]], "a rank without documents": [docs[:4], [], docs[4:], []]}
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
