"""Which dimension of each leaf is split along the mesh axis `tensor`, and which models can be split so.

Rows of q, k, v, gate and up and columns of o and down, so that a rank has whole heads and whole features of the mlp; experts one by one;
rows of the embedding and of the head, one for each token. Of an adapter the side that has the dimension of its weight. All else is whole.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from treetune.core import partition, shard
from treetune.core.partition import Partition
from treetune.models.decoder_config import Config
from treetune.ops.tensor_parallel import Split

# (pattern over the path of a leaf, its dimension); the first that matches counts.
RULES: Sequence[tuple[str, int | None]] = (
    (r"\.experts\.\w+(\.[AB])?$", 0),
    (r"\.(q|k|v|gate|up)_proj(\.[BMG])?$", 0),
    (r"\.(o|down)_proj(\.A)?$", 1),
    (r"\.([qkv]_bias|sinks)$", 0),
    (r"(^|\.)(embed_tokens|lm_head|lm_head_bias|lm_head\.B)$", 0),
    (r"", None),
)


def dimension(path: str) -> int | None:
    """The dimension along which a leaf is split; None where each rank has it whole."""
    return next(dim for pattern, dim in RULES if re.search(pattern, path))


def home(device_mesh: Any, sharding: str) -> Partition | None:
    """How the leaves of a run's models are split among the ranks of a mesh; None where each has whole ones."""
    return partition.of(device_mesh, sharding, dimension)


def beside(where: Partition, cfg: Any, *, dense: bool) -> Partition | None:
    """How the leaves of a model that scores beside the policy are split: along `tensor` only where its layers can be, and are dense.

    None where each rank has whole leaves.
    """
    size = shard.size(where.device_mesh, shard.TENSOR)
    if size == 1 or (dense and not refusal(cfg, size)):
        return where
    return along_data(where)


def along_data(where: Partition) -> Partition | None:
    """The partition along `data` alone; None where that axis has one rank."""
    return Partition(shard.splitting(where.device_mesh)) if shard.size(where.device_mesh, "data") > 1 else None


def check(cfg: Any, where: Any, name: object) -> None:
    """Raise ValueError for a model that cannot be split as a home says that it is."""
    mesh = where.device_mesh if isinstance(where, Partition) else None
    size = shard.size(mesh, shard.TENSOR)
    if size > 1 and (reason := refusal(cfg, size)):
        raise ValueError(f"shard tensor={size} does not fit {name}: {reason}; give another size, or data instead")


def split_of(weights: Any) -> Split | None:
    """The ranks among which the layers of these weights are split; None where each rank computes all of them."""
    leaf = weights.get("embed_tokens")
    if not shard.split_along(leaf, shard.TENSOR):
        return None
    mesh = leaf.device_mesh
    return Split(mesh.get_group(shard.TENSOR), mesh.get_local_rank(shard.TENSOR), mesh[shard.TENSOR].size())


def own_caches(cfg: Config, split: Split | None) -> Config:
    """The config whose caches have the key/value heads of this rank."""
    return cfg if split is None else replace(cfg, num_kv_heads=cfg.num_kv_heads // split.size)


def refusal(cfg: Any, size: int) -> str:
    """Why a model of these sizes cannot be split among so many ranks; empty where it can."""
    if not isinstance(cfg, Config) or cfg.keeps_ids:
        return "modules of transformers compute this model, and their layers are not split"
    counts = {"key/value heads": cfg.num_kv_heads, "query heads": cfg.num_heads}
    layers = range(cfg.num_layers) if cfg.experts is None else [index for index in range(cfg.num_layers) if index not in cfg.experts.layers]
    counts |= {"columns of the mlp": cfg.mlp_size} if len(layers) else {}
    counts |= {} if cfg.experts is None else {"experts of a layer": cfg.experts.count}
    if odd := next((name for name, count in counts.items() if count % size), None):
        return f"this model has {counts[odd]} {odd}, which do not divide by {size}"
    each = -(-cfg.vocab_size // size)
    return "" if each * (size - 1) < cfg.vocab_size else f"{cfg.vocab_size} tokens of a vocabulary leave one of {size} ranks without any"
