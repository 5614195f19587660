"""What the ranks and the test that watches them share: a tiny model, ragged documents, who gets which, and three steps of training.

Sizes are odd on purpose: the vocabulary and the adapter's rank do not divide by the number of ranks, and a rank-1 adapter leaves some
ranks without a part of A.
"""

import dataclasses
import math

import torch

from treetune.core import lora, optim, optim_parts, param, quant, shard, step, tree
from treetune.core.quant import Scheme
from treetune.core.run.ranks import ALONE, Ranks
from treetune.core.state import TrainState
from treetune.losses import sft_objective
from treetune.models import Model, hf, llama, policy, qwen2, relora
from treetune.models.adapter import Base
from treetune.models.policy import AdapterSpec, Policy

VOCAB = 53
TRAINS = ("full", "lora", "both")
# Document numbers of the micro-batches of each step, dealt to the ranks in turn. Document 3 scores nothing; some micro-batches are empty.
STEPS = ([[0, 1, 2], [4], [5], []], [[6, 7], [3], [1], [2, 5]], [[0], [], [7, 4], []])


def model() -> Model:
    cfg = llama.Config(
        vocab_size=VOCAB, hidden_size=22, mlp_size=37, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=6, tied=True, init_std=0.3
    )  # fmt: skip
    return Model("llama", cfg, param.init(llama.abstract(cfg), seed=5))


def trees(base: Model, trains: str) -> Policy:
    """What trains: all weights, a rank-1 adapter, or a rank-3 adapter with the norms of the model beside it."""
    if trains == "full":
        return policy.full(base)
    rank = 1 if trains == "lora" else 3
    paths = lora.match(hf.abstract_of(base), "all-linear")
    fresh = lora.init(base.params, paths, rank=rank, seed=1)
    gen = torch.Generator().manual_seed(2)
    used = lora.Lora(tree.map(lambda leaf: leaf + 0.2 * torch.randn(leaf.shape, generator=gen), fresh), 0.7, dropout=0.2)
    params = {"lora": used.tree} | ({"model": tree.map(torch.clone, tree.select(base.params, "norm"))} if trains == "both" else {})
    return Policy(base.family, base.cfg, params, {"model": base.params}, used)


# Kinds of adapters; "restarts" is of ReLoRA. Documents of a kind with dropout draw it by themselves.
KINDS = {
    "lora, dropout": dict(dropout=0.2), "dora": dict(dora=True, dropout=0.2), "pissa": dict(init="pissa"), "olora": dict(init="olora"),
    "orthogonal": dict(init="orthogonal", rank=2), "patterns": dict(ranks=(("q_proj", 1),), alphas=(("down_proj", 3.0),), dora=True),
    "bias": dict(bias="all"), "whole": dict(modules_to_save=("norm",), unfrozen=("post_norm",)), "nf4": dict(quant="nf4", dora=True),
    "relora": dict(restarts=1.0), "relora, pruned": dict(restarts=0.5, dora=True),
}  # fmt: skip


def kind(name: str, ranks: Ranks, sharding: str) -> dict[str, torch.Tensor]:
    """Three steps of an adapter of a kind: {"state.PATH", "frozen.PATH" of what moves, "start.PATH"} as whole tensors."""
    options = dict(KINDS[name])
    prune, scheme = options.pop("restarts", None), options.pop("quant", None)
    base = model()
    if "bias" in options:
        cfg = dataclasses.replace(base.cfg, qkv_bias=True)
        base = Model("qwen2", cfg, param.init(qwen2.abstract(cfg), seed=5))
    if scheme is not None:
        leaves = {path: quant.quantise(leaf, Scheme(scheme)) if "_proj" in path else leaf for path, leaf in tree.items(base.params)}
        base = base._replace(params=tree.from_items(leaves.items()))
    start = policy.adapt(base, AdapterSpec(**dict(rank=3, alpha=6.0) | options), base=Base("x", ""), seed=1)
    begun = {f"start.{path}": leaf.clone() for path, leaf in tree.items(start.params)}
    placed = policy.place(start, ranks.mesh, sharding)
    # With a small epsilon the first step after a restart is little more than the sign of each gradient, and rounding decides some.
    own = optim.adamw(eps=1e-2, weight_decay=0.1)
    state = TrainState(placed.params, placed.frozen, own.init(placed.params), {}, torch.tensor(0))
    one = step.make_step(objective(base, placed), own, schedule=optim.constant(0.1), mesh=ranks.mesh, clip=0.5)
    again = None if prune is None else relora.restarter(placed, own, relora.Restarts(2, prune, seed=4))
    for number in range(len(STEPS)):
        state, metrics = one(state, micro_batches(number, ranks.rank, ranks.world))
        state = state if again is None else again(state, metrics, number + 1)
    moved = {} if prune is None else {path: shard.full(leaf).clone() for path, leaf in tree.items(state.frozen["model"])}
    return begun | whole(state) | {f"frozen.{path}": leaf for path, leaf in moved.items()}


def documents() -> list[tuple[list[int], list[int]]]:
    """(tokens, positions of the scored ones) of eight documents."""
    gen = torch.Generator().manual_seed(11)
    out = []
    for number, size in enumerate((17, 3, 29, 8, 2, 21, 5, 12)):
        scored = (torch.rand(size, generator=gen) < 0.6).tolist()
        scored = [i for i in range(1, size) if scored[i] or i == size - 1] if number != 3 else []
        out.append((torch.randint(0, VOCAB, (size,), generator=gen).tolist(), scored))
    return out


def stream(numbers: list[int]) -> dict[str, torch.Tensor]:
    """The packed stream of some documents, or of one unread token."""
    docs = [documents()[i] for i in numbers]
    lens = [len(tokens) for tokens, _ in docs] or [1]
    starts = [sum(lens[:i]) for i in range(len(docs))]
    ints = {
        "tokens": [t for tokens, _ in docs for t in tokens] or [0],
        "positions": [i for size in lens for i in range(size)],
        "at": [start + i - 1 for start, (_, scored) in zip(starts, docs, strict=True) for i in scored],
        "targets": [tokens[i] for tokens, scored in docs for i in scored],
        "seq": [n for n, (_, scored) in enumerate(docs) for _ in scored],
        "seq_lens": [len(scored) for _, scored in docs],
        "doc_of_seq": list(range(len(docs))),
        "row": list(numbers),
    }
    bounds = torch.tensor([0, *lens]).cumsum(0).int()
    return {name: torch.tensor(value, dtype=torch.int64) for name, value in ints.items()} | {"cu_docs": bounds, "seed": torch.tensor(9)}


def micro_batches(number: int, rank: int, world: int) -> list[tuple]:
    return [(stream(group), None) for group in STEPS[number][rank::world]]


def objective(base: Model, placed: Policy):
    return sft_objective.named(policy.logprob(placed))


def optimizer(ranks: Ranks = ALONE, sharding: str = "none", inner: optim.Optimizer | None = None) -> optim.Optimizer:
    inner = optim.adamw(eps=1e-4, weight_decay=0.1) if inner is None else inner
    if ranks.mesh is None or sharding not in ("moments", "gradients"):
        return inner
    return optim_parts.parted(inner, shard.splitting(ranks.mesh))


def start(base: Model, trains: str, ranks: Ranks, sharding: str) -> tuple[TrainState, Policy]:
    placed = policy.place(trees(base, trains), ranks.mesh, sharding)
    return TrainState(placed.params, placed.frozen, optimizer(ranks, sharding).init(placed.params), {}, torch.tensor(0)), placed


def stepper(base: Model, placed: Policy, ranks: Ranks, sharding: str, seen: dict | None = None, **changes):
    """The step of these tests; `seen` collects the whole gradients that the optimiser is given, after clipping."""
    inner = optimizer()

    def update(grads, state, params, lr, found_inf):
        if seen is not None:
            seen.update({path: shard.full(leaf).clone() for path, leaf in tree.items(grads)})
        return inner.update(grads, state, params, lr, found_inf)

    one = changes.pop("objective", None) or objective(base, placed)
    used = optimizer(ranks, sharding, optim.Optimizer(inner.init, update))
    options = {"clip": 0.5, "split_gradients": sharding == "gradients"} | changes
    return step.make_step(one, used, schedule=optim.constant(0.02), mesh=ranks.mesh, **options)


def run(trains: str, ranks: Ranks, sharding: str) -> tuple[dict[str, torch.Tensor], TrainState, Policy]:
    """Three steps: {"gradient.I.PATH", "metric.I.NAME", "state.PATH"} as whole tensors, and the state itself."""
    base = model()
    state, placed = start(base, trains, ranks, sharding)
    out = {}
    for number in range(len(STEPS)):
        seen: dict = {}
        state, metrics = stepper(base, placed, ranks, sharding, seen)(state, micro_batches(number, ranks.row_rank, ranks.row_ranks))
        out |= {f"gradient.{number}.{path}": leaf for path, leaf in seen.items()}
        out |= {f"metric.{number}.{name}": value.double() for name, value in metrics.items()}
    return out | whole(state), state, placed


def whole(state: TrainState) -> dict[str, torch.Tensor]:
    """{"state.PATH": tensor} of all that a checkpoint holds."""
    return {f"state.{path}": shard.full(leaf).clone() for path, leaf in tree.items({"params": state.params, "opt": state.opt})}


def poisoned(base: Model, placed: Policy, row: int):
    """The objective, but that a row makes the loss infinite."""
    inner = objective(base, placed)

    def terms(params, frozen, batch, plan):
        found, metrics = inner.terms(params, frozen, batch, plan)
        return ({"nll": found["nll"] + math.inf} if row in batch["row"] else found), metrics

    return inner._replace(terms=terms)


def like(base: Model, trains: str, ranks: Ranks, sharding: str) -> TrainState:
    """A state with the structure of a run's and none of its numbers."""
    state, _ = start(base, trains, ranks, sharding)
    blank = tree.map(lambda leaf: shard.like(torch.zeros_like, leaf), {"params": state.params, "opt": state.opt})
    return state._replace(**blank)


# By number of ranks: sizes of meshes, and dimensions along which leaves are split on each of their axes (None: whole).
LAYOUTS = {
    2: [({"data": 2}, (0,)), ({"data": 2}, (1,)), ({"replicate": 2, "data": 1}, (None, 0)), ({"tensor": 2, "data": 1}, (2, 0))],
    4: [({"data": 4}, (0,)), ({"tensor": 2, "data": 2}, (1, 0)), ({"tensor": 2, "data": 2}, (0, 0)), ({"tensor": 2, "data": 2}, (2, None)),
        ({"replicate": 2, "data": 2}, (None, 0)), ({"replicate": 4, "data": 1}, (None, None))],
}  # fmt: skip


def shapes() -> dict[str, torch.Tensor]:
    """Leaves whose sides no number of ranks divides, or that have fewer rows than there are ranks."""
    gen = torch.Generator().manual_seed(3)
    sides = {"wide": (7, 6, 5), "long": (13,), "few": (1, 9), "none": (0, 4), "scalar": ()}
    return {name: torch.randn(shape, generator=gen) for name, shape in sides.items()} | {
        "half": torch.randn(9, 3, 2, generator=gen).bfloat16()
    }


def scattered(sizes: dict[str, int], dims: tuple[int | None, ...]) -> TrainState:
    """A state of `shapes` on a mesh; a leaf without such a dimension is whole on that axis."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = shard.mesh("cpu", **sizes)
    specs = lambda leaf: tuple(Replicate() if dim is None or dim >= leaf.ndim else Shard(dim) for dim in dims)  # noqa: E731
    return TrainState({name: shard.distribute(leaf, mesh, specs(leaf)) for name, leaf in shapes().items()}, {}, {}, {}, torch.tensor(1))
