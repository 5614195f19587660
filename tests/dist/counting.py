"""Messages between ranks as they are begun, and the layers that are computed between them."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from treetune.core import copies, gathers, grad, lora, param, shard, step, tree
from treetune.core.run.ranks import Ranks
from treetune.losses import sft_objective
from treetune.models import Model, dense, hf, llama, policy

LAYERS = 3


class Event(NamedTuple):
    """kind: "gather" and "sum" of leaves in parts, with the path of the first leaf and the bytes that a rank gives and takes in all;
    "compute" of the layer `what`; any other collective by its name in torch."""

    kind: str
    what: str
    bytes: int = 0


class Log(TorchDispatchMode):
    """Collectives of this process: every one that torch dispatches, in order. `names`: paths of leaves by address."""

    def __init__(self, params: Any):
        super().__init__()
        self.events: list[Event] = []
        self.names = {shard.local(leaf).data_ptr(): path for path, leaf in tree.items(params)}
        self.next = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # what it does reaches us as well
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            name = func.__name__.partition(".")[0]
            kind = {"_allgather_base_": "gather", "_reduce_scatter_base_": "sum"}.get(name, name)
            whole = args[0][0] if name == "allreduce_" else args[1] if kind == "sum" else args[0]
            self.events.append(Event(kind, self.next, whole.nbytes if isinstance(whole, torch.Tensor) else 0))
            self.next = ""
        return func(*args, **(kwargs or {}))

    def first(self, leaves) -> None:
        """The message that comes next begins with the first of these leaves of which this rank has a part."""
        self.next = next(self.names[shard.local(leaf).data_ptr()] for leaf in leaves if shard.local(leaf).numel())


@contextlib.contextmanager
def log(params: Any) -> Iterator[list[Event]]:
    """The events inside; `params` are the leaves that may travel."""
    seen = Log(params)
    sent, summed, attention = gathers._sent, gathers._summed, dense._attention

    def sending(leaves, dtypes):
        seen.first(leaves)
        return sent(leaves, dtypes)

    def summing(grads, leaves):
        seen.first(leaves)
        return summed(grads, leaves)

    def computing(h, w, ab, index, s):
        seen.events.append(Event("compute", f"layers.{index}"))
        return attention(h, w, ab, index, s)

    gathers._sent, gathers._summed, dense._attention = sending, summing, computing
    try:
        with seen:
            yield seen.events
    finally:
        gathers._sent, gathers._summed, dense._attention = sent, summed, attention


def model(layers: int = LAYERS) -> Model:
    """Computed in bfloat16. Its sizes divide by two ranks and by 16 bytes, so that nothing travels that is no number of it."""
    cfg = llama.Config(
        vocab_size=64, hidden_size=32, mlp_size=64, num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=8, tied=False,
        dtype=torch.bfloat16,
    )  # fmt: skip
    return Model("llama", cfg, param.init(llama.abstract(cfg), seed=5))


def passes(placed: policy.Policy, batch: dict, remat: str | None, collect: grad.Collect | None = None) -> list[Event]:
    """The messages of one forward and backward pass."""
    one = sft_objective.named(policy.logprob(placed, remat=remat))
    gradient = step.value_and_grad(lambda params: (sum(one.terms(params, placed.frozen, batch, None)[0].values()), None), collect)
    with log({"params": placed.params, "frozen": placed.frozen}) as events:
        gradient(placed.params)
    return events


def counts(ranks: Ranks, batch: dict) -> dict[str, list[Event]]:
    """The messages of passes by what trains and what is kept."""
    base = model()
    low = lora.Lora(lora.init(base.params, lora.match(hf.abstract_of(base), "all-linear"), rank=4, seed=1), 0.7)
    full = policy.place(policy.full(base), ranks.mesh, "full")
    hybrid = shard.mesh("cpu", replicate=ranks.world, data=1)
    twice = policy.place(policy.full(base), hybrid, "full")
    adapted = policy.place(policy.Policy(base.family, base.cfg, {"lora": low.tree}, {"model": base.params}, low), ranks.mesh, "full")
    return {
        "full, again": passes(full, batch, "full"), "full": passes(full, batch, None), "lora, again": passes(adapted, batch, "full"),
        "many": passes(policy.place(policy.full(model(32)), ranks.mesh, "full"), batch, "full"),
        "hybrid": passes(twice, batch, "full", copies.summing(hybrid)),
        "copies": passes(policy.full(base), batch, "full", copies.summing(ranks.mesh)),
    }  # fmt: skip
