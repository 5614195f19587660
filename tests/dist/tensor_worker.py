"""One rank of a mesh whose ranks split layers. argv: folder, cases.

Differences from one process go to rankI.json, as numbers."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import loading_worker
import quant_look
import scene
import torch
import torch.distributed as dist

from treetune.core import lora, param, partition, shard, tree
from treetune.core.run.ranks import Ranks, join_ranks
from treetune.models import MODELS, Model, families, hf, llama, moe, tensor_rules
from treetune.ops import linear_logprob, split_logprob, tensor_parallel

SIZES = dict(vocab_size=53, hidden_size=16, mlp_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, init_std=0.3)
EXPERTS = moe.Experts(4, 2, 10, (0, 1))
# family, sizes beside those above
MODELS_SPLIT = {
    "llama": dict(tied=True),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True, tied=True),
    "gemma2": dict(norm="gemma", out_norms=True, activation="gelu", embed_sqrt=True, attn_softcap=5.0, logit_softcap=3.0, tied=True),
    "olmo2": dict(norm="olmo", out_norms=True, pre_norms=False, qk_norm=True, qk_norm_whole=True),
    "granite": dict(logit_scale=0.3, residual_scale=0.5, embed_scale=3.0),
    "mixtral": dict(experts=EXPERTS),
    "qwen3_moe": dict(experts=replace(EXPERTS, normalised=False, layers=(1,)), qk_norm=True),
    "gpt_oss": dict(experts=replace(EXPERTS, biased=True, clamp=(1.7, 7.0)), attn_sinks=True, qkv_bias=True, o_bias=True, norm="olmo"),
}  # fmt: skip
REMAT = {"llama, adapter, again": "full", "qwen3_moe, full, selective": "selective"}
WANT = ("entropy", "mean_logit", "logsq", "top1", "topk_entropy")


def build(family: str) -> Model:
    cfg = llama.Config(**SIZES | MODELS_SPLIT[family])
    # Biases and norms that do something.
    gen, leaves = torch.Generator().manual_seed(3), param.init(MODELS[family].abstract(cfg), seed=5)
    return Model(family, cfg, tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=gen), leaves))


def adapter(model: Model) -> lora.Lora:
    """Pairs on all that may have one, DoRA on what begins a block; with dropout where no expert and no router has any."""
    sparse = model.cfg.experts is not None
    paths = lora.adaptable(hf.abstract_of(model))
    gen = torch.Generator().manual_seed(2)
    pairs = tree.map(lambda leaf: leaf + 0.2 * torch.randn(leaf.shape, generator=gen), lora.init(model.params, paths, rank=3, seed=1))
    lengths = {
        f"{path}.M": 1 + torch.rand(dict(tree.items(model.params))[path].shape[0], generator=gen)
        for path in paths
        if path.endswith(("q_proj", "up_proj", "o_proj", "down_proj")) and ".experts." not in path
    }
    grown = tree.from_items([*tree.items(pairs), *lengths.items()])
    return lora.Lora(grown, 0.7, dropout=0.0 if sparse else 0.2, seed=torch.tensor(9))


def loss_of(model: Model, low: lora.Lora | None, batch: dict, remat: str | None = None) -> tuple[torch.Tensor, dict]:
    """A sum of all statistics with a gradient, each row with a weight of its own, and all statistics."""
    stats, routed = families.logprobs_routed(
        model.family, model.cfg, model.params, batch, lora=low, want=WANT, temperature=0.8, remat=remat
    )
    rows = torch.linspace(-1, 1, len(batch["at"]))
    parts = (stats.logp, stats.entropy, stats.lse, stats.mean_logit)
    loss = sum((weight * rows.roll(i) * part).sum() for i, (weight, part) in enumerate(zip((1.0, 0.7, 0.4, 0.3), parts, strict=True)))
    loss = loss + sum((logits.square() * rows[:, None]).sum() for logits in routed)
    return loss, stats._asdict()


def gradients(model: Model, low: lora.Lora | None, batch: dict, remat: str | None = None) -> tuple[dict, dict]:
    """Statistics, and gradients by path."""
    own = {"model": model.params} | ({} if low is None else {"lora": low.tree})
    tracked = tree.map(lambda leaf: leaf.detach().requires_grad_(), own)
    used = None if low is None else low._replace(tree=tracked["lora"])
    loss, stats = loss_of(model._replace(params=tracked["model"]), used, batch, remat)
    loss.backward()
    found = {path: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for path, leaf in tree.items(tracked)}
    return {name: value.detach() for name, value in stats.items() if value is not None}, found


def furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference over the largest number."""
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-3)) if one.numel() else 0.0


def compared(family: str, home: partition.Partition, *, adapted: bool, remat: str | None = None) -> dict:
    """Of a model on this mesh and on one process: how far statistics and gradients are apart, and whether whole leaves have equal ones."""
    whole = build(family)
    low = adapter(whole) if adapted else None
    batch = scene.stream([0, 2, 4, 5])
    parts = whole._replace(params=split(home, whole.params))
    own = None if low is None else low._replace(tree=split(home, low.tree))
    stats, grads = gradients(whole, low, batch)
    found, shares = gradients(parts, own, batch, remat)
    rows = shard.world(home.device_mesh) if "data" in (home.device_mesh.mesh_dim_names or ()) else 1  # ranks with the same documents here
    apart = {path: furthest(shard.full(share) / rows, grads[path]) for path, share in shares.items()}
    plain = [share.contiguous() for share in shares.values() if not shard.distributed(share)]
    return {
        "statistics": {name: furthest(value, stats[name]) for name, value in found.items()},
        "gradients": dict(sorted(apart.items(), key=lambda item: -item[1])[:3]),
        "same": equal_everywhere([*plain, *found.values()]),
        "numbers": sum(shard.local(leaf).numel() for leaf in tree.leaves(parts.params)) / param.count(whole.params),
    }


def split(home: partition.Partition, leaves: dict) -> dict:
    return tree.from_items((path, home.split(path, leaf)) for path, leaf in tree.items(leaves))


def equal_everywhere(tensors: list[torch.Tensor]) -> bool:
    """Whether all ranks have the same bits."""
    flat = torch.cat([leaf.reshape(-1).double() for leaf in tensors])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    return all(torch.equal(flat, other) for other in every)


def heads(split: tensor_parallel.Split) -> dict[str, float]:
    """split_logprob beside linear_logprob in float64: ties of the largest logit, sure targets, few tokens, no row."""
    gen, apart = torch.Generator().manual_seed(1), {}
    for name, (rows, vocabulary, softcap) in {
        "sure": (9, 41, None),
        "capped": (9, 40, 2.0),
        "few": (5, 3, None),
        "none": (0, 41, None),
    }.items():
        hidden = torch.randn(rows, 6, generator=gen, dtype=torch.float64) * 4
        weight = torch.randn(vocabulary, 6, generator=gen, dtype=torch.float64)
        weight[-1] = weight[0]  # the first of two largest
        targets = torch.arange(rows) * 5 % vocabulary
        first, end = split.part(vocabulary)
        results = []
        for own in (False, True):
            h, w = hidden.clone().requires_grad_(), (weight[first:end] if own else weight).clone().requires_grad_()
            if own:
                stats = split_logprob.split_logprob(
                    tensor_parallel.enter(split, h)[0], w, targets, split=split, vocabulary=vocabulary, softcap=softcap, want=WANT
                )
            else:
                stats = linear_logprob.linear_logprob(h, w, targets, softcap=softcap, want=WANT)
            (stats.logp.sum() + (stats.entropy * stats.lse).sum() + 2 * stats.mean_logit.sum()).backward()
            results.append([*(value.detach() for value in stats), h.grad, w.grad if own else w.grad[first:end]])
        apart[name] = max(furthest(one, other) for one, other in zip(*reversed(results), strict=True))
    return apart


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    ranks: Ranks = join_ranks(torch.device("cpu"), {"tensor": 2} if os.environ["WORLD_SIZE"] == "2" else {"tensor": 2, "data": 2})
    mesh, home = ranks.mesh, tensor_rules.home(ranks.mesh, "full")
    files = {path.name: loading_worker.look(path, ranks) for path in sorted((folder / "models").iterdir())}
    coded = {
        name: quant_look.look(folder / "wide", name, ranks, folder / "quantised" / name)
        for name in json.loads((folder / "schemes.json").read_text())
    }
    found = {case: compared(case.split(",")[0], home, adapted="adapter" in case, remat=REMAT.get(case)) for case in sys.argv[2:]}
    head = heads(tensor_parallel.Split(mesh.get_group("tensor"), mesh.get_local_rank("tensor"), 2))
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps({"models": found, "heads": head, "files": files, "coded": coded}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
