"""One rank that computes bridged models from parts. argv: folder with one model folder a kind, the kinds. What it found goes to rankI.json.

All ranks read the same documents, so that gradients summed over n of them are n times those of one; then each reads some of its own.
"""

import json
import sys
from pathlib import Path

import counting
import torch

from treetune.core import grad, lora, shard, tree
from treetune.core.lora import Lora
from treetune.core.run.ranks import Ranks, join_ranks
from treetune.models import certificate_checks, hf, logprobs, policy

DOCUMENTS = ([5, 9, 70, 33, 7, 64, 8], [11, 3, 19, 42, 17, 17, 90, 31], [50, 44, 13])


def gradients(model, low: Lora, params: dict, remat: str | None, documents=DOCUMENTS) -> dict:
    """The gradients of weights and adapter."""
    batch = certificate_checks.pack(documents) | {"row": torch.arange(len(documents))}

    def loss(params):
        own = low._replace(tree=params["lora"])
        return logprobs(model.family, model.cfg, params["model"], batch, lora=own, remat=remat).logp.sum(), None

    return dict(tree.items(grad.value_and_grad(loss)(params)[1]))


def look(path: Path, ranks: Ranks) -> dict:
    """The largest difference of gradients over the largest of a leaf, and the messages of layers, by what is kept."""
    model = hf.load(path)
    sizes = hf.abstract_of(model, head=True)
    low = Lora(lora.init(sizes, lora.match(sizes, "all-linear"), rank=2, seed=0), 0.7)
    low = low._replace(tree=tree.map(lambda leaf: leaf + 0.1, low.tree))
    whole = {"model": model.params, "lora": low.tree}
    placed = policy.place(policy.Policy(model.family, model.cfg, whole, {}, low), ranks.mesh, "full").params
    out = {}
    for remat in (None, "full"):
        one = gradients(model, low, whole, remat)
        with counting.log({"": placed}) as events:
            several = gradients(model, low, placed, remat)
        error = distance({path: shard.full(leaf) / ranks.world for path, leaf in several.items()}, one)
        layers = [[kind, what.split("layers.")[1].split(".")[0]] for kind, what, _ in events if "layers." in what]
        each = [gradients(model, low, whole, remat, DOCUMENTS[rank:]) for rank in range(ranks.world)]
        mine = gradients(model, low, placed, remat, DOCUMENTS[ranks.rank :])
        summed = {path: sum(grads[path] for grads in each) for path in mine}
        uneven = distance({path: shard.full(leaf) for path, leaf in mine.items()}, summed)
        out[str(remat)] = {"error": error, "messages": layers, "uneven": uneven}
    return out


def distance(several: dict, one: dict) -> float:
    """The largest difference of a leaf over its size."""
    return max(float((leaf - one[path]).norm() / one[path].norm().clamp(min=1e-6)) for path, leaf in several.items())


def main() -> None:
    torch.set_num_threads(1)
    ranks, folder = join_ranks(torch.device("cpu")), Path(sys.argv[1])
    seen = {kind: look(folder / kind, ranks) for kind in sys.argv[2:]}
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
