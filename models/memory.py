"""The memory of a training run by term, from the sizes of a model and the options of the run: nothing is loaded, and nothing allocated.

T tokens of a micro-batch, D hidden, q = H d and kv = K d features of queries and keys, F mlp width, V vocabulary, b bytes of the compute
dtype. A step holds the weights, the adapter, their gradients and the optimiser's states throughout; at its peak also what the layers keep
for the backward pass, and the larger of the head's logits and the one layer that is being computed.
Exact for native families with plain attention, adapters on all linear layers or full training; for others, what a decoder of these sizes
would take.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import grad, layer_offload, lora, shard, tree
from treetune.core.optim import Optimizer
from treetune.core.param import Param, Params
from treetune.core.quant import BLOCK, FOUR_BITS, NESTED_BLOCK, Scheme
from treetune.models import quantised
from treetune.models.dense import Config
from treetune.ops import linear_logprob

GIB = 2**30
STATS = 4  # bytes of what is computed in float32 whatever the dtype: moments of norms, log-sums of attention


class Setup(NamedTuple):
    """What of a run decides its memory beside the sizes of the model.

    rank: of an adapter on all linear layers; 0: the model itself trains. state_bytes: of the optimiser, a number that trains.
    master: bytes of a number that trains.
    rows, slots: of the sampler's cache, where the run samples; nucleus: it draws with top_p below 1.
    layers: where frozen layers are, "none" for the device. paged: states of the optimiser are in host memory.
    """

    tokens: int = 0
    rank: int = 16
    scheme: Scheme | None = None
    state_bytes: float = 8.0
    remat: str | None = None
    device: str = "cpu"
    rows: int = 0
    slots: int = 0
    master: int = 4
    nucleus: bool = False
    layers: str = "none"
    paged: bool = False

    @property
    def away(self) -> bool:
        """Whether frozen layers are elsewhere, and come to the device two at a time."""
        return self.layers == "disk" or (self.layers == "cpu" and self.device != "cpu")


class Table(NamedTuple):
    """Bytes by term. layer: what the one layer needs that is being computed.

    elsewhere, away, paged: activations, frozen layers, and states of the optimiser, in host memory or in files.
    """

    weights: int
    adapter: int = 0
    gradients: int = 0
    optimiser: int = 0
    activations: int = 0
    layer: int = 0
    head: int = 0
    cache: int = 0
    draws: int = 0
    elsewhere: int = 0
    away: int = 0
    paged: int = 0

    @property
    def held(self) -> int:
        """What is there between the steps, gradients included."""
        return self.weights + self.adapter + self.gradients + self.optimiser

    @property
    def peak(self) -> int:
        """The most that is there at once: in training, or while completions are sampled."""
        return self.held + max(self.activations + max(self.layer, self.head), self.cache + self.draws)


def size(params: Params, device: str | None = None) -> int:
    """Bytes of a tree of tensors or leaves made of such, as far as they are on this rank, and on devices of a type where one is given."""
    return sum(_bytes(leaf, device) for leaf in tree.leaves(params))


def _bytes(leaf: Any, device: str | None) -> int:
    if isinstance(leaf, Tensor):
        return shard.local(leaf).nbytes if device in (None, leaf.device.type) else 0
    return sum(_bytes(part, device) for part in leaf) if isinstance(leaf, tuple | list) else 0


def state_bytes(optimizer: Optimizer) -> float:
    """Bytes of an optimiser's state for each number that trains, of a matrix of common size."""
    matrix = torch.zeros(1024, 1024)
    return size(optimizer.init({"layers": [{"weight": matrix}]})) / matrix.numel()


def quantised_bytes(numbers: int, rows: int, scheme: Scheme) -> int:
    """Bytes of a leaf of so many numbers in so many rows."""
    if scheme.kind == "int4":
        width = numbers // rows
        return rows * (-(-width // 2) + 4 * -(-width // BLOCK))
    if scheme.kind not in FOUR_BITS:
        return numbers + 4 * rows
    blocks = -(-numbers // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if scheme.double else 4 * blocks
    return -(-numbers // 2) + scales


def weights(abstract: Params, scheme: Scheme | None, dtype: torch.dtype) -> int:
    """Bytes of a frozen model in the compute dtype, with the leaves of a scheme quantised."""
    return sum(leaf_bytes(abstract, scheme, dtype).values())


def leaf_bytes(abstract: Params, scheme: Scheme | None, dtype: torch.dtype) -> dict[str, int]:
    """Those of each leaf, by path."""
    chosen = set() if scheme is None else quantised.paths(abstract, scheme)

    def one(path: str, leaf: Param) -> int:
        numbers = _numbers(leaf)
        if scheme is None or path not in chosen:
            return numbers * dtype.itemsize
        return quantised_bytes(numbers, numbers // leaf.shape[-1], scheme)

    return {path: one(path, leaf) for path, leaf in tree.items(abstract)}


def travelling(abstract: Params, cfg: Config, setup: Setup) -> tuple[int, int]:
    """Bytes of frozen layers that are away, and of the two that are on the device at once, which a CPU needs none of: it reads files."""
    if not (setup.away and setup.rank):
        return 0, 0
    layers = [0] * cfg.num_layers
    for path, size in leaf_bytes(abstract, setup.scheme, cfg.dtype).items():
        if path.startswith("layers.") and size >= layer_offload.SMALL:
            layers[int(path.split(".")[1])] += size
    return sum(layers), _window(layers, setup.device)


def _window(layers: Sequence[int], device: str) -> int:
    return 0 if device == "cpu" else max((sum(layers[index : index + 2]) for index in range(len(layers))), default=0)


def frozen(trees: Params, device: torch.device) -> tuple[int, int]:
    """Bytes on a device of frozen trees by name, and of their layers that are away: of each tree two are on the device at once."""
    away, here = layer_offload.elsewhere(trees, device), 0
    for part in trees.values():
        layers = part.get("layers", []) if isinstance(part, dict) else []
        here += _window([layer_offload.elsewhere(layer, device) for layer in layers], device.type)
    return size(trees) - away + here, away


def _numbers(leaf: Param) -> int:
    return math.prod(leaf.shape)


class Saved(NamedTuple):
    """Of one layer, bytes a token: all that autograd saves; what a selective policy keeps; what that computes again; the input.

    work: gradients on the way, at the widest place.
    """

    everything: int
    results: int
    again: int
    input: int
    work: int


def saved(cfg: Config, index: int, rank: int, *, device: str = "cpu") -> Saved:
    """What a layer with an adapter of this rank (0: none) keeps of a token."""
    b, d = cfg.dtype.itemsize, cfg.hidden_size
    q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    norms = 2 * cfg.pre_norms + 2 * cfg.out_norms
    inside, products, wide = _mlp(cfg, index)
    copies = q if device == "cpu" else 0  # documents are computed one by one, and put together
    low, numbers = 7 * rank * b, STATS * (norms + cfg.num_heads)
    # The residual stream before attention and before the mlp, and both after their norms.
    stream = d * (2 + norms)
    normed = (q + kv) * bool(cfg.qk_norm)
    everything = b * (stream + normed + q + 2 * kv + q + copies + inside) + low + numbers
    results = b * (q + 2 * kv + q + d + products) + low + STATS * cfg.num_heads
    # Results that no gradient reads go when they have been used: queries and keys before they turn, what is added to the residual stream.
    again = b * (d * (1 + norms) + normed + copies + inside - (products - d) - 2 * d)
    # Products of low precision on a CPU have float32 sums beside them: those of the mlp's gradient are the widest.
    sums = STATS * (wide // 2) - b * (wide // 2) if device == "cpu" and b < STATS else 0
    return Saved(everything, results, again, b * d, b * (wide + d) + sums)


def _mlp(cfg: Config, index: int) -> tuple[int, int, int]:
    """Numbers a token of an mlp: what its gradient reads, the results of its products, and gradients on the way beyond what they free."""
    d, experts = cfg.hidden_size, cfg.experts
    if experts is None or index not in experts.layers:
        return 3 * cfg.mlp_size, 2 * cfg.mlp_size + d, 2 * cfg.mlp_size
    k, f = experts.top_k, experts.width
    # Rows are sorted by expert: each of the k copies of a token goes in, and its answer comes out. Halves of a stack are copied.
    return k * (2 * d + 3 * f) + experts.count, k * (2 * f + d) + experts.count, k * 2 * f


def activations(cfg: Config, setup: Setup) -> tuple[int, int]:
    """Bytes that all layers keep between the passes, and those that the one layer needs which is being computed."""
    policy = grad.policy_of(setup.remat)
    layers = [saved(cfg, index, setup.rank, device=setup.device) for index in range(cfg.num_layers)]
    kept = {"none": lambda one: one.everything, "selective": lambda one: one.input + one.results, "full": lambda one: one.input}
    more = {"none": lambda one: 0, "selective": lambda one: one.again, "full": lambda one: one.everything - one.input}
    between = sum(kept[policy.recompute](one) for one in layers) * setup.tokens
    if setup.rank and policy.recompute == "none":
        between -= layers[0].input * setup.tokens  # of the first layer: no gradient goes on to embeddings that are frozen
    return between, max(more[policy.recompute](one) + one.work for one in layers) * setup.tokens


def casts(abstract: Params, cfg: Config, setup: Setup) -> tuple[int, int]:
    """Bytes of weights in the compute dtype that are made of others, where they live as long as activations, and in one layer."""
    b = cfg.dtype.itemsize
    one = max(sum(_numbers(leaf) for _, leaf in tree.items(layer)) for layer in abstract["layers"]) * b
    if setup.scheme is not None:
        return 0, one  # a quantised leaf is made again, and never kept
    if setup.rank or b == setup.master:
        return 0, 0
    return (0, one) if grad.recomputes(setup.remat) else (one * cfg.num_layers, 0)


def head(cfg: Config, setup: Setup) -> int:
    """Bytes of the last norm and of the log-probs of all tokens: logits are made some rows at a time."""
    b, d, v = cfg.dtype.itemsize, cfg.hidden_size, cfg.vocab_size
    rows = min(setup.tokens, linear_logprob.ROWS[setup.device])
    # Before the norm, the rows read and their gradient; of a frozen head, which makes it ahead, also those after the norm.
    states = setup.tokens * d * b * (3 + bool(setup.rank))
    logits = rows * v * (STATS + (b if b < STATS else 0))  # in the compute dtype, too
    if setup.rank:
        return states + logits + rows * d * b
    cast = v * d * b if b < 4 else 0
    return states + logits + v * d * 4 + 2 * cast


def cache(cfg: Config, rows: int, slots: int) -> int:
    """Bytes of the sampler's cache: keys and values of all slots of all rows, or the ids of a model that keeps those."""
    if cfg.keeps_ids:
        return rows * slots * 8
    return rows * slots * cfg.dtype.itemsize * sum(heads * (key + value) for heads, key, value in cfg.caches)


def dense_weights(abstract: Params, cfg: Config, setup: Setup) -> int:
    """Bytes of the quantised leaves that a sampler on a CPU makes dense for all its tokens, fewer where memory is short."""
    if setup.scheme is None or setup.device != "cpu" or setup.away or not setup.rows:
        return 0
    chosen = quantised.paths(abstract, setup.scheme)
    return sum(_numbers(leaf) * cfg.dtype.itemsize for path, leaf in tree.items(abstract) if path in chosen)


def draws(cfg: Config, rows: int, nucleus: bool) -> int:
    """Bytes of the distributions [rows, V] that a token of each row is drawn from: float32, and float64 where they are summed up."""
    return rows * cfg.vocab_size * (44 if nucleus else 24)


def table(abstract: Params, cfg: Config, setup: Setup) -> Table:
    """The memory of a run that trains an adapter on all linear layers, or with rank 0 the model itself."""
    if setup.rank:
        low = lora.abstract(abstract, lora.linears(abstract), rank=setup.rank)
        trained = sum(_numbers(leaf) for leaf in tree.leaves(low))
        away, window = travelling(abstract, cfg, setup)
        held = Table(weights(abstract, setup.scheme, cfg.dtype) - away + window, adapter=4 * trained, away=away)
    else:
        trained = sum(_numbers(leaf) for leaf in tree.leaves(abstract))
        held = Table(setup.master * trained)
    return training(held, trained, abstract, cfg, setup)


def training(held: Table, trained: int, abstract: Params, cfg: Config, setup: Setup) -> Table:
    """The memory of a run that holds these weights and this adapter, of which so many numbers train."""
    between, layer = activations(cfg, setup)
    kept_casts, layer_casts = casts(abstract, cfg, setup)
    place = grad.policy_of(setup.remat).place
    gone = between if place == "disk" or (place == "cpu" and setup.device != "cpu") else 0
    states, paged = round(setup.state_bytes * trained), setup.paged and setup.device != "cpu"
    return held._replace(
        gradients=4 * trained,
        optimiser=0 if paged else states,
        paged=states if paged else 0,
        activations=between - gone + kept_casts,
        # The gradient of a tied head waits for that of the embeddings.
        layer=layer + layer_casts + gone // cfg.num_layers + (0 if setup.rank or not cfg.tied else 4 * cfg.vocab_size * cfg.hidden_size),
        head=head(cfg, setup) if setup.tokens else 0,
        cache=cache(cfg, setup.rows, setup.slots) + dense_weights(abstract, cfg, setup),
        draws=draws(cfg, setup.rows, setup.nucleus),
        elsewhere=gone,
    )


# In the order of the fields of a table.
TERMS = (
    "weights", "adapter", "gradients", "optimiser states", "activations", "one layer", "logits", "sampler cache", "sampler draws",
    "elsewhere: activations", "elsewhere: layers", "elsewhere: states",
)  # fmt: skip


def lines(table: Table, about: str) -> dict[str, str]:
    """A row for the peak of a run, described in a few words, and one for each term that there is."""
    rows = {f"  {name}": shown(value) for name, value in zip(TERMS, table, strict=True) if value}
    return {"memory": f"{shown(table.peak)} at the peak of a run: {about}"} | rows


def shown(size: int) -> str:
    """Bytes in a unit that leaves digits before the point."""
    unit, name = next(((unit, name) for unit, name in ((GIB, "GiB"), (2**20, "MiB")) if size >= unit), (2**10, "KiB"))
    return f"{size / unit:.2f} {name}"


def line(table: Table) -> str:
    """All terms in a line."""
    terms = ", ".join(f"{name} {shown(value)}" for name, value in zip(TERMS, table, strict=True) if value >= table.peak / 200)
    return f"about {shown(table.peak)} of tensors at the peak: {terms}"
