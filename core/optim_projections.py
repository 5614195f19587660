"""AdamW whose moments are of projected gradients: GaLore and APOLLO. For matrices of layers that are wider than the rank on both sides.

A gradient G [m, n] becomes R = P G [r, n] or G P^T [m, r], whose moments are small. GaLore brings the step of R back, W -= lr scale P^T
step; APOLLO takes from it only how much each row or column of G is to be scaled. A stack of experts [E, m, n] is E matrices; all other
leaves have AdamW. Matrices must be whole on every rank.
Source: Zhao et al., arXiv 2403.03507, algorithm 2 (GaLore); Zhu et al., arXiv 2412.05270, algorithm 1 (APOLLO); Chen et al., arXiv
2410.01623, section 4.2 (the limit on the growth of norms).
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor

from treetune.core import optim_blocks, optim_matrices, param, shard, tree
from treetune.core.optim import LeafRules, Moments, Optimizer, Rate, Rule, leafwise
from treetune.core.state import OptState, Params

KEY = "projection"
GROWTH = 1.01  # of the norm of a step over that of the step before
TINY = 1e-8

PROJ_TYPES = ("std", "reverse_std", "left", "right")

Rules = Callable[[str, Tensor], Rule]
Made = TypeVar("Made", bound=Callable[..., Optimizer])


class Shared(TypedDict, total=False):
    """What all optimisers of this kind take, with the defaults of `Adam` and `Walk`."""

    b1: float
    b2: float
    eps: float
    weight_decay: float
    decay: LeafRules
    lr_scale: LeafRules
    paged: bool


class Adam(NamedTuple):
    """Of AdamW along R, and of what is not projected."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


class Walk(NamedTuple):
    """As of `optim.leafwise`."""

    weight_decay: float = 0.0
    decay: LeafRules = ()
    lr_scale: LeafRules = ()
    paged: bool = False


class Subspace(NamedTuple):
    """Options of GaLore."""

    rank: int
    gap: int
    scale: float
    proj_type: str


def _spelled_out(function: Made) -> Made:
    """The function with all that it takes by `Shared` in its signature, defaults included, for whoever asks what it takes."""
    own = [one for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY]
    defaults = Adam._field_defaults | Walk._field_defaults
    shared = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in defaults.items()]
    vars(function)["__signature__"] = inspect.Signature([*own, *shared], return_annotation=Optimizer)
    return function


def _parts(shared: Shared) -> tuple[Adam, Walk]:
    own = {name: value for name, value in shared.items() if name in Adam._fields}
    return Adam()._replace(**own), Walk()._replace(**{name: value for name, value in shared.items() if name not in own})


class Shape(NamedTuple):
    """Of a projection: its rank, and whether it is of rows, P G, or of columns, G P^T."""

    rank: int
    rows: bool

    def apply(self, grad: Tensor, p: Tensor) -> Tensor:
        """R of G and P [..., r, m or n]."""
        return p @ grad if self.rows else grad @ p.mT

    def back(self, low: Tensor, p: Tensor) -> Tensor:
        """A step [..., m, n] of one of R."""
        return p.mT @ low if self.rows else low @ p

    def low(self, leaf: Tensor) -> Tensor:
        """Zeros of the shape of R."""
        m, n = leaf.shape[-2:]
        return leaf.new_zeros((*leaf.shape[:-2], *((self.rank, n) if self.rows else (m, self.rank))), dtype=_wide(leaf))

    def side(self, leaf: Tensor) -> int:
        """The side of G that is projected."""
        return leaf.shape[-2 if self.rows else -1]


def _wide(leaf: Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, torch.float32)


def projected(path: str, leaf: Tensor, rank: int) -> bool:
    """Whether a leaf is a matrix of a layer, or a stack of its experts, with both sides above the rank."""
    return optim_matrices.is_hidden(path, leaf) and min(leaf.shape[-2:]) > rank


def _require_some(params: Params, name: str, rank: int) -> None:
    if not any(projected(path, leaf, rank) for path, leaf in tree.items(params)):
        raise ValueError(
            f"{name} projects matrices of layers whose sides are above rank {rank}, and none such trains: give a lower one "
            "(--optim-args rank=8), or use adamw"
        )


def _rules(name: str, rank: int, rest: Rules, rule: Rules) -> Rules:
    """`rule` for what is projected, `rest` for all else."""

    def chosen(path: str, leaf: Tensor) -> Rule:
        if not projected(path, leaf, rank):
            return rest(path, leaf)
        optim_matrices.require_whole(path, leaf, name)
        return rule(path, leaf)

    return chosen


def _step(inner: Rule, low: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    """The step of AdamW along R, at a learning rate of 1."""
    target, moved = inner.move(low.contiguous(), moments, torch.zeros_like(low), Rate(torch.ones((), device=low.device), 0.0))
    return -target, moved


def basis(grad: Tensor, shape: Shape) -> Tensor:
    """P [..., r, m or n]: orthonormal, of the largest singular values of G; of each direction the largest number is positive."""
    grad = grad.to(_wide(grad))
    if shape.side(grad) == min(grad.shape[-2:]):
        # Eigenvectors of the smaller product of G with itself: many times faster than singular vectors, and nothing of size is lost.
        p = torch.linalg.eigh(grad @ grad.mT if shape.rows else grad.mT @ grad).eigenvectors[..., -shape.rank :].flip(-1).mT
    else:
        u, _, v = torch.linalg.svd(grad, full_matrices=False)
        p = (u.mT if shape.rows else v)[..., : shape.rank, :]
    largest = p.gather(-1, p.abs().argmax(-1, keepdim=True))
    return (p * largest.sign()).contiguous()


def _galore(name: str, subspace: Subspace, shared: Shared, *, eight: bool) -> Optimizer:
    """GaLore, with moments in 8 bits or in float32, of what is projected and of all else."""
    rank, gap, scale, proj_type = subspace
    _check(name, rank, gap, scale)
    if proj_type not in PROJ_TYPES:
        raise ValueError(f"{name} needs proj_type {', '.join(PROJ_TYPES)}, got {proj_type!r}")
    adam, walk = _parts(shared)
    rest = optim_blocks.adamw_rules(name, *adam, eight=eight)

    def rule(path: str, leaf: Tensor, fresh: bool) -> Rule:
        smaller = leaf.shape[-2] < leaf.shape[-1]
        shape = Shape(rank, {"std": smaller, "reverse_std": not smaller, "left": True, "right": False}[proj_type])
        inner = rest(path, shape.low(torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")))

        def start(placed: Tensor) -> Moments:
            leaf = shard.local(placed)
            p = leaf.new_zeros((*leaf.shape[:-2], rank, shape.side(leaf)), dtype=_wide(leaf))
            return inner.start(shape.low(leaf)) | {"basis": p}

        def move(grad: Tensor, moments: Moments, param: Tensor, rate: Rate) -> tuple[Tensor, Moments]:
            p = basis(grad, shape) if fresh else moments["basis"]
            own = {name: moment for name, moment in moments.items() if name != "basis"}
            step, moved = _step(inner, shape.apply(grad, p), own)
            return param - rate.lr * (scale * shape.back(step, p) + rate.decay * param), moved | {"basis": p}

        return Rule(start, move)

    def inner(fresh: bool) -> Optimizer:
        rules = _rules(name, rank, rest, lambda path, leaf: rule(path, leaf, fresh))
        return leafwise(rules, **walk._asdict())

    def init(params: Params) -> OptState:
        _require_some(params, name, rank)
        # On the host, which decides whether a step decomposes, so that no other step waits for the device.
        return inner(False).init(params) | {KEY: {"updates": torch.zeros((), dtype=torch.int64)}}

    def update(grads: Params, state: OptState, params: Params, lr: Tensor, found_inf: Tensor | None = None) -> tuple[Params, OptState]:
        updates = state[KEY]["updates"]
        fresh = int(updates) % gap == 0
        # Nothing to decompose in what is not finite; decompositions wait for the device by themselves, so reading the flag costs nothing.
        if fresh and found_inf is not None and bool(found_inf):
            return params, state
        params, state = inner(fresh).update(grads, state, params, lr, found_inf)
        updates.add_(1)
        return params, state

    return Optimizer(init, update, rounds=True)


def _check(name: str, rank: int, gap: int, scale: float) -> None:
    if rank < 1 or gap < 1 or not scale > 0:
        raise ValueError(f"{name} needs rank and update_proj_gap from 1 and scale above 0, got {rank}, {gap} and {scale}")


@_spelled_out
def galore_adamw(
    *, rank: int = 128, update_proj_gap: int = 200, scale: float = 0.25, proj_type: str = "std", **shared: Unpack[Shared]
) -> Optimizer:
    """GaLore: AdamW in the space of the `rank` largest singular vectors of a gradient, found anew every `update_proj_gap` steps.

    scale: of the step. proj_type: std projects the smaller side of a matrix, reverse_std the larger one, left rows, right columns.
    """
    return _galore("galore_adamw", Subspace(rank, update_proj_gap, scale, proj_type), shared, eight=False)


@_spelled_out
def galore_adamw_8bit(
    *, rank: int = 128, update_proj_gap: int = 200, scale: float = 0.25, proj_type: str = "std", **shared: Unpack[Shared]
) -> Optimizer:
    """`galore_adamw` with all moments in 8 bits, as those of adamw_8bit."""
    return _galore("galore_adamw_8bit", Subspace(rank, update_proj_gap, scale, proj_type), shared, eight=True)


@_spelled_out
def apollo_adamw(
    *,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 1.0,
    scale_type: str = "channel",
    seed: int = 0,
    **shared: Unpack[Shared],
) -> Optimizer:
    """APOLLO: gradients, each row or column scaled as AdamW scales it in a random projection; p -= lr (sqrt(scale) s G + decay p).

    s = |step of R| / |R| by row or column, or with scale_type "tensor" of the whole. The norm of s G grows by at most 1 % a step. P is
    normal / sqrt(rank), another every `update_proj_gap` steps, a function of seed, path and update.
    """
    _check("apollo_adamw", rank, update_proj_gap, scale)
    if scale_type not in ("channel", "tensor"):
        raise ValueError(f"apollo_adamw needs scale_type channel or tensor, got {scale_type!r}")
    adam, walk = _parts(shared)
    rest = optim_blocks.adamw_rules("apollo_adamw", *adam, eight=False)

    def rule(path: str, leaf: Tensor) -> Rule:
        shape = Shape(rank, leaf.shape[-2] < leaf.shape[-1])
        inner, over = rest(path, leaf), (-2 if shape.rows else -1) if scale_type == "channel" else (-2, -1)

        def start(placed: Tensor) -> Moments:
            leaf = shard.local(placed)
            return inner.start(shape.low(leaf)) | {"norm": leaf.new_zeros((*leaf.shape[:-2], 1, 1), dtype=_wide(leaf))}

        def move(grad: Tensor, moments: Moments, param: Tensor, rate: Rate) -> tuple[Tensor, Moments]:
            own = {name: moment for name, moment in moments.items() if name != "norm"}
            p = random_basis(seed, path, moments["count"] // update_proj_gap, (rank, shape.side(grad)))
            low = shape.apply(grad, p.to(grad.dtype))
            step, moved = _step(inner, low, own)
            factor = step.norm(dim=over, keepdim=True) / (low.norm(dim=over, keepdim=True) + TINY)
            # The growth of norms is that of steps without the correction of Adam's bias, as the authors' code has it.
            first, second = (1 - b ** moved["count"].double() for b in adam[:2])
            corrected = (second.sqrt() / first).to(grad.dtype)
            scaled, norm = _limited(grad * (factor / corrected), moments["norm"])
            return param - rate.lr * (scale**0.5 * corrected * scaled + rate.decay * param), moved | {"norm": norm}

        return Rule(start, move)

    rules = _rules("apollo_adamw", rank, rest, rule)
    optimizer = leafwise(rules, **walk._asdict())

    def init(params: Params) -> OptState:
        _require_some(params, "apollo_adamw", rank)
        return optimizer.init(params)

    return optimizer._replace(init=init)


@_spelled_out
def apollo_mini(*, update_proj_gap: int = 200, scale: float = 128.0, seed: int = 0, **shared: Unpack[Shared]) -> Optimizer:
    """APOLLO of rank 1 with one factor for a whole matrix."""
    return apollo_adamw(rank=1, scale_type="tensor", update_proj_gap=update_proj_gap, scale=scale, seed=seed, **shared)


def random_basis(seed: int, path: str, number: Tensor, shape: tuple[int, int]) -> Tensor:
    """float32 P [r, side] of a leaf: normal / sqrt(r), the `number`-th of them (0-d)."""
    from treetune.ops import noise

    key = noise.keys(seed, param.seed_of(path), number.long(), torch.arange(shape[0], device=number.device))
    return noise.normal(key, shape[1]) / shape[0] ** 0.5


def _limited(step: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """A step whose norm is at most GROWTH of that before (0: none), and its norm."""
    norm = step.norm(dim=(-2, -1), keepdim=True)
    over = (norm / (before + TINY)).clamp(min=GROWTH) / GROWTH
    over = torch.where(before > 0, over, 1.0)
    return step / over, norm / over
