"""A model that is quantised as it is read, of which ranks have parts, beside the whole one."""

import loading_worker
import torch

from treetune.core import ckpt, quant, quant_split, shard, tree
from treetune.core.quant import Scheme
from treetune.core.run.ranks import Ranks
from treetune.models import artifacts, identity, loading, policy, tensor_rules
from treetune.models.adapter import Base

CPU = loading_worker.CPU
SCHEMES = {
    "nf4": Scheme("nf4"), "nf4, once": Scheme("nf4", double=False), "fp4": Scheme("fp4"), "int4": Scheme("int4"), "int8": Scheme("int8"),
    "fp8": Scheme("fp8"), "as written": None,
}  # fmt: skip


def same(part, whole) -> bool:
    """Whether a leaf has the bits of the whole one, joined and as layers compute with it."""
    if not quant.quantised(whole):
        return loading_worker.part_equal(part, whole)
    joined = shard.full(part)
    known = joined[:3] == whole[:3] and joined.origin.digest == whole.origin.digest and joined.block == whole.block
    bits = all(
        torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        for one, other in zip(joined.parts(), whole.parts(), strict=True)
    )
    dense = quant.dense(whole, torch.float32)
    own = tuple(slice(first, first + size) for size, first in zip(*map(tuple, own_box(part)), strict=True))
    return (
        known
        and bits
        and torch.equal(shard.whole(part, torch.float32), dense)
        and torch.equal(shard.gather(part, torch.float32), dense[own])
    )


def own_box(part) -> tuple:
    """Shape and first places of what layers compute with."""
    size, first = (list(side) for side in quant_split.own_box(part.codes))
    if len(size) != part.ndim or not shard.split_along(part, "tensor"):  # in blocks
        return part.shape, [0] * part.ndim
    packed = part.shape[-1] // part.codes.shape[-1]
    return [*size[:-1], min(size[-1] * packed, part.shape[-1])], [*first[:-1], first[-1] * packed]


def held(part) -> int:
    """Bytes of memory that this rank has for a leaf."""
    local = shard.local(part)
    return sum(one.untyped_storage().nbytes() for one in (local.parts() if quant.quantised(local) else [local]))


def adapted(model) -> policy.Policy:
    """The model with an adapter that does something."""
    fresh = policy.adapt(model, loading_worker.SPEC._replace(modules_to_save=()), base=Base("x", ""), seed=1)
    return fresh._replace(params={"lora": tree.map(lambda leaf: leaf + 0.1, fresh.params["lora"])})


def look(path, name: str, ranks: Ranks, folder) -> dict:
    """What `loading_worker.look` finds of a model, of one by a scheme."""
    home, given = tensor_rules.home(ranks.mesh, "full"), {"dtype": "float32", "device": CPU, "scheme": SCHEMES[name]}
    if SCHEMES[name] is not None:
        quant.dense(quant.quantise(torch.ones(2, 64), SCHEMES[name]))  # its tables are made once
    (split, _), peak = loading_worker.measured(lambda: loading.load_model(path, **given, home=home))
    (whole, _), whole_peak = loading_worker.measured(lambda: loading.load_model(path, **given))
    pairs = [(mine, leaf) for (_, mine), (_, leaf) in zip(tree.items(split.params), tree.items(whole.params), strict=True)]
    coded = [(mine, leaf) for mine, leaf in pairs if quant.quantised(leaf)]
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.save_model(folder / "split" if ranks.rank == 0 else None, split)
    one, other = adapted(split)._replace(folds=True), adapted(whole)._replace(folds=True)
    policy.save(policy.place(one, ranks.mesh, "full"), folder / "folded split" if ranks.rank == 0 else None)
    if ranks.rank == 0:
        artifacts.save_model(folder / "whole", whole)
        policy.save(other, folder / "folded whole")
    torch.distributed.barrier()
    sampled, _ = loading_worker.drawn(adapted(split), adapted(whole), ranks)
    return {
        "same": all(same(*pair) for pair in pairs), "held": sum(held(mine) for mine, _ in coded),
        "whole": sum(leaf.nbytes for _, leaf in coded),
        "count": len(coded), "beside": peak - sum(held(mine) for mine, _ in pairs),
        "beside_whole": whole_peak - sum(leaf.nbytes for _, leaf in pairs),
        "largest": max(leaf.nbytes for _, leaf in pairs),
        "digest": ckpt.leaf_digest(split.params) == ckpt.leaf_digest(whole.params)
        and ckpt.digest(split.params) == ckpt.digest(whole.params),
        "identity": identity.digest(split) == identity.digest(whole), "sampled": sampled,
        "saved": [
            loading_worker.contents(folder / f"{kind}split") == loading_worker.contents(folder / f"{kind}whole")
            for kind in ("", "folded ")
        ],
    }  # fmt: skip
