"""One rank that reads its rows of models. argv: folder with one model folder a name, the names. What it found goes to rankI.json."""

import json
import sys
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treetune.core import ckpt, shard, tree
from treetune.core.run.ranks import Ranks, join_ranks
from treetune.core.state import TrainState
from treetune.models import hf_weights, identity, loading, policy, resize, reward_model, sampling, tensor_rules
from treetune.models.adapter import Base
from treetune.models.policy import AdapterSpec, Policy

CPU = torch.device("cpu")


class Allocated(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those that operations have made."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if _plain(one)}
        for one in tree_leaves(out):
            if _plain(one) and (storage := one.untyped_storage())._cdata not in known:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def _plain(one) -> bool:
    return isinstance(one, torch.Tensor) and not shard.distributed(one) and one.device.type == "cpu"


def measured(call) -> tuple[object, int]:
    """What a call gives, and the most bytes that it had allocated at once."""
    with Allocated() as allocated:
        out = call()
    return out, allocated.peak


def part_equal(part, whole) -> bool:
    """Whether this rank's part of a leaf has its numbers of the whole one, bit for bit."""
    local = shard.local(part)
    box = tuple(slice(first, first + size) for first, size in zip(shard.first_places(part), local.shape, strict=True))
    return tuple(part.shape) == tuple(whole.shape) and torch.equal(local, whole[box])


def same(parts, wholes) -> bool:
    pairs = list(zip(tree.items(parts), tree.items(wholes), strict=True))
    return all(path == other and part_equal(part, whole) for (path, part), (other, whole) in pairs)


SAMPLED = {"dense, tied": "adapter", "experts": "full"}
SPEC = AdapterSpec(rank=3, alpha=6.0, modules_to_save=("lm_head", "norm"))


def policies(model) -> dict[str, Policy]:
    """What may be left of a model: itself, an adapter with weights trained whole, itself with an adapter folded in, one with a head."""
    adapted = policy.adapt(model, SPEC, base=Base("x", ""), seed=1)
    moved = adapted._replace(params=adapted.params | {"lora": tree.map(lambda leaf: leaf + 0.1, adapted.params["lora"])})
    alone = policy.adapt(model, SPEC._replace(modules_to_save=()), base=Base("x", ""), seed=1)
    folded = alone._replace(params={"lora": tree.map(lambda leaf: leaf + 0.1, alone.params["lora"])}, folds=True)
    full = policy.full(model)
    return {"full": full, "adapter": moved, "folded": folded, "head": reward_model.with_head(full, classes=1, seed=2, device=CPU)}


def exported(split, whole, folder: Path, ranks: Ranks) -> dict[str, list]:
    """{what is saved: whether the files of all ranks are those of one, and the most bytes that saving allocated here}."""
    samples, plain = {}, policies(whole)
    for name, one in policies(split).items():
        if name != "full" and folder.name not in SAMPLED:
            continue
        placed, path = policy.place(one, ranks.mesh, "full"), folder / f"{name} split"
        _, peak = measured(lambda placed=placed, path=path: policy.save(placed, path if ranks.rank == 0 else None))
        same = True
        if ranks.rank == 0:
            policy.save(plain[name], folder / f"{name} whole")
            same = contents(path) == contents(folder / f"{name} whole")
        samples[name] = [same, peak]
    return samples


def drawn(one: Policy, other: Policy, ranks: Ranks) -> tuple[bool, int]:
    """Whether samples from parts are those from whole weights, and the most bytes of whole leaves at once. Ranks draw unlike often."""
    pieces = [[[3, 4, 5], [6]], [[7, 8]], [[9]]][ranks.row_rank % 2 :: 2]
    sample, join = sampling.sampler(one, seed=4, stop=(11, 12, 13)), sampling.joiner(one)

    def draw(placed: Policy) -> list:
        state = TrainState(placed.params, placed.frozen, {}, {}, torch.tensor(0))
        drawn = [sample(state, ids, [5, 6][: len(ids)], n=2, max_tokens=2 + ranks.row_rank % 2 + i) for i, ids in enumerate(pieces)]
        join(state)
        return drawn

    gathered, most, remember = {}, [0], shard.remember

    def watched(out, source):
        gathered[out.untyped_storage()._cdata] = StorageWeakRef(out.untyped_storage()), out.nbytes  # a leaf is given several times
        most[0] = max(most[0], sum(size for ref, size in gathered.values() if not ref.expired()))
        return remember(out, source)

    shard.remember = watched
    parts = draw(policy.place(one, ranks.mesh, "full"))
    shard.remember = remember
    pairs = [both for pair in zip(parts, draw(other), strict=True) for both in zip(*pair, strict=True)]
    # Where layers are split their sums are made in parts: the tokens are the same, log-probs up to rounding.
    exact = shard.size(ranks.mesh, "tensor") == 1
    same = all(torch.equal(*both) if exact or not both[0].is_floating_point() else torch.allclose(*both, atol=1e-5) for both in pairs)
    return same, most[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def look(path: Path, ranks: Ranks) -> dict:
    """A model read in parts, beside the whole one."""
    home, bytes_read, read = tensor_rules.home(ranks.mesh, "full"), [0], hf_weights._File._count

    def counted(file, tensor):
        bytes_read[0] += tensor.nbytes
        return read(file, tensor)

    hf_weights._File._count = counted
    (split, _), peak = measured(lambda: loading.load_model(path, dtype="float32", device=CPU, home=home))
    hf_weights._File._count = read
    digest, digest_peak = measured(lambda: ckpt.leaf_digest(split.params))
    whole, _ = loading.load_model(path, dtype="float32", device=CPU)
    masters, masters_peak = measured(lambda: policy.place(policy.full(split), ranks.mesh, "full"))
    usual = policy.place(policy.full(whole), ranks.mesh, "full")
    rows = whole.cfg.vocab_size
    return {
        "bytes": tree.bytes(tree.map(shard.local, split.params)), "whole": tree.bytes(whole.params), "read": bytes_read[0], "peak": peak,
        "largest": max(leaf.nbytes for leaf in tree.leaves(whole.params)), "digest_peak": digest_peak, "masters_peak": masters_peak,
        "same": same(split.params, whole.params) and split._replace(params={}) == whole._replace(params={}),
        "digest": [digest, ckpt.leaf_digest(whole.params)], "identity": [identity.digest(split), identity.digest(whole)],
        "placed": all(
            getattr(one, "placements", ()) == getattr(other, "placements", ())
            and torch.equal(shard.local(one), shard.local(other))
                      for one, other in zip(tree.leaves(masters.params), tree.leaves(usual.params), strict=True)),
        "grown": same(resize.resize(split, rows + 4).params, resize.resize(whole, rows + 4).params),
        "sampled": drawn(*(policies(one)[SAMPLED[path.name]] for one in (split, whole)), ranks) if path.name in SAMPLED else None,
        "exported": exported(split, whole, path.parents[1] / f"out{ranks.world}" / path.name, ranks),
        "cut": same(resize.cut(split, rows - 4).params, resize.cut(whole, rows - 4).params),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    ranks, folder = join_ranks(CPU), Path(sys.argv[1])
    seen = {name: look(folder / "models" / name, ranks) for name in sys.argv[2:] if "/" not in name}
    for case in (name for name in sys.argv[2:] if "/" in name):  # MODEL/HOW IT IS QUANTISED
        import quant_look

        name, scheme = case.split("/")
        seen[case] = quant_look.look(folder / "models" / name, scheme, ranks, folder / f"quantised{ranks.world}" / case)
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
