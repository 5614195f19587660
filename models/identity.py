"""Which model a tree of weights is, whatever dtype it was loaded in: a digest that tells an adapter's base from others."""

import dataclasses
import hashlib

import torch

from treetune.core import partition, tree
from treetune.models import Model
from treetune.models.dense import Config

OUTER = ("dtype", "init_std", "max_positions", "tied", "vocab_size")
ALWAYS = (
    "hidden_size", "mlp_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "norm_eps", "rope_theta", "rope_scaling", "qkv_bias",
    "qk_norm", "window",
)  # fmt: skip


def digest(model: Model) -> str:
    """sha256 over `settings`, the shapes of all leaves and numbers spread over each, rounded to bfloat16; the language head is left out.

    A base model with a scalar head instead, or loaded in a dtype as wide or in bfloat16, or quantised, has the same digest. It says which
    model this is, not that no bit of it has changed: manifests do.
    """
    total = hashlib.sha256(settings(model.family, model.cfg).encode())
    # Few numbers of each leaf, so that a model whose layers are read one at a time is never whole in memory.
    facts = {path: (tuple(leaf.shape), partition.spread(leaf)) for path, leaf in tree.items(model.params)}
    for path, (shape, numbers) in sorted(facts.items()):
        if path != "lm_head":
            total.update(f"{path} {shape} ".encode())
            total.update(numbers.view(torch.int16).numpy().tobytes())
    return total.hexdigest()


def settings(family: str, cfg: Config) -> str:
    """What a model computes besides its leaves: rotary frequencies, heads, window and the like, floats to four digits.

    Left out: the dtype, how weights are drawn, and how long its documents may be, which change no number of what it computes; and all that
    most families lack, where a model lacks it too: it may come to have a name here, and digests of models without it must stay.
    """
    fields = [entry for entry in dataclasses.fields(cfg) if entry.name not in OUTER]
    written = [entry.name for entry in fields if entry.name in ALWAYS or getattr(cfg, entry.name) != entry.default]
    pairs = ((name, getattr(cfg, name)) for name in written)
    return " ".join([family, *(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in pairs)])
