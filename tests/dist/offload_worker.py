"""One rank whose parts of frozen layers are in files, and whose moments are copied to a device and back. argv: folder.

What it found goes to rankI.json; runs of the real command leave their folders there.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from treetune.cli import main as command
from treetune.cli.options import meshes
from treetune.core import gathers, layer_offload, optim, optim_pages, shard, step, tree
from treetune.core.run.ranks import Ranks, join_ranks
from treetune.core.state import TrainState
from treetune.losses import sft_objective
from treetune.models import loading, policy, tensor_rules
from treetune.models.adapter import Base
from treetune.models.policy import AdapterSpec, Policy

CPU = torch.device("cpu")


class Lane(layer_offload.Pages):
    """The way of mapped parts, which writes down what comes when."""

    def __init__(self, events: list):
        self.events = events

    def beside(self, *filled):
        @contextlib.contextmanager
        def inside():
            self.events.append("copy")
            yield
            self.events.append("sent")

        return inside()

    def drop(self, parts):
        self.events.append("drop")
        super().drop(parts)


def start(folder: Path, ranks: Ranks, place: str) -> tuple[Policy, TrainState]:
    """The policy of an adapter on a model that ranks read in parts, its layers in a place."""
    put = layer_offload.home(place, CPU)
    home = tensor_rules.home(ranks.mesh, "full")._replace(put=put)
    model, _ = loading.load_model(folder / "model", dtype="float32", device=CPU, home=home)
    adapted = policy.adapt(model, AdapterSpec(rank=3, alpha=6.0), base=Base("x", ""), seed=1)
    placed = policy.offload(policy.place(adapted, ranks.mesh, "full"), put)
    own = optim.adamw(paged=place != "none")
    return placed, TrainState(placed.params, placed.frozen, own.init(placed.params), {}, torch.tensor(0))


def stream(ranks: Ranks, number: int) -> dict:
    gen = torch.Generator().manual_seed(7 * number + ranks.row_rank)
    size = 12 + 5 * ranks.row_rank
    tokens, at = torch.randint(0, 257, (size,), generator=gen), torch.arange(size - 1)
    return {
        "tokens": tokens, "positions": torch.arange(size), "at": at, "targets": tokens[1:], "seq": torch.zeros_like(at),
        "cu_docs": torch.tensor([0, size], dtype=torch.int32), "seq_lens": torch.tensor([size - 1]),
        "doc_of_seq": torch.tensor([0]), "row": torch.tensor([number]), "seed": torch.tensor(9),
    }  # fmt: skip


def trained(placed: Policy, state: TrainState, ranks: Ranks, place: str) -> TrainState:
    one = step.make_step(
        sft_objective.named(policy.logprob(placed)), optim.adamw(paged=place != "none"), schedule=optim.constant(0.05), mesh=ranks.mesh
    )
    for number in range(3):
        state, _ = one(state, [(stream(ranks, number), None)])
    return state


def look(folder: Path, ranks: Ranks) -> dict:
    """Where the parts are, what comes in which order, and whether numbers are those of parts on the device."""
    ends, found = {}, {}
    for place in ("none", "disk"):
        placed, state = start(folder, ranks, place)
        layers = state.frozen["model"]["layers"]
        local = [shard.local(leaf) for leaf in tree.leaves(layers)]
        found[place] = [layer_offload.elsewhere(layers, CPU), sum(leaf.nbytes for leaf in local if leaf.nbytes >= layer_offload.SMALL)]
        ends[place] = trained(placed, state, ranks, place)
    whole = {place: [shard.full(leaf) for leaf in tree.leaves([state.params, state.opt])] for place, state in ends.items()}
    found["same"] = all(torch.equal(*pair) for pair in zip(*whole.values(), strict=True))
    found["whole"] = all(
        torch.equal(shard.full(leaf), shard.full(other))
        for leaf, other in zip(*(tree.leaves(ends[place].frozen) for place in ends), strict=True)
    )
    return found | {"order": order(*start(folder, ranks, "disk"), ranks), "stays": stays_on_the_host(ranks)}


def order(placed: Policy, state: TrainState, ranks: Ranks) -> list:
    """The events of a forward pass, with the layers as they are computed."""
    events: list = []
    plain, taken = layer_offload.way, gathers.Passage.whole
    layer_offload.way = lambda device: Lane(events)
    gathers.Passage.whole = lambda self, index, *trees: (events.append(f"layer {index}"), taken(self, index, *trees))[1]
    with torch.no_grad():
        policy.logprob(placed)(state.params, state.frozen, stream(ranks, 0), None)
    layer_offload.way, gathers.Passage.whole = plain, taken
    return events


def stays_on_the_host(ranks: Ranks) -> bool:
    """Whether a part in the memory of the host stays there beside a mesh of GPUs, by a mesh that is only called one."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    mesh = DeviceMesh("cuda", [0, 1], mesh_dim_names=("data",), _init_backend=False)
    meta = TensorMeta(torch.Size([4, 2]), (2, 1), torch.float32)
    like = DTensor(torch.empty(2, 2, device="meta"), DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)
    part = torch.ones(2, 2)
    placed = shard.rewrap(part, like)
    return placed.device.type == "cpu" and shard.local(placed).data_ptr() == part.data_ptr() and tuple(placed.shape) == (4, 2)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    optim_pages._copy = lambda state, device: state.clone()  # as to a device
    ranks = join_ranks(CPU, meshes.read(("data=2",)))
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(look(folder, ranks)))
    for name, more in json.loads((folder / "runs.json").read_text()).items():
        assert command.main([*more, "--output-dir", str(folder / name)]) == 0, name
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
