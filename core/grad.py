"""Gradients over trees, with the calling convention of jax.value_and_grad(has_aux=True)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from treetune.core import gathers, offload, shard, tree


class Totals(Protocol):
    """Gradients of leaves, to which those of a backward pass are added as they arrive."""

    def add(self, i: int, part: Tensor, /, *, last: bool) -> None:
        """Add this rank's part of a gradient that other ranks had a share in. last: no further part of it comes in this pass."""
        ...

    def collected(self) -> list[Tensor]:
        """The totals once the pass is over."""
        ...


# (paths and leaves, totals before) -> their totals; called before a forward pass.
Collect = Callable[[Sequence[tuple[str, Tensor]], Sequence[Tensor | None]], Totals]


def value_and_grad(fn: Callable, collect: Collect | None = None) -> Callable:
    """Turn `fn(params, *args) -> (value, aux)` into `(params, *args, into=None) -> ((value, aux), grads)`.

    Built on torch.autograd.backward over detached leaves, because torch.func.grad fails under activation checkpointing and
    with ctx-style autograd functions. Leaves that `fn` does not use get zero gradients. The value comes back detached;
    gradients may be changed in place: each is contiguous and has memory of its own.

    into: gradients of the same tree to which the new ones are added in place. Each is added as it arrives, so two whole trees of
    gradients never exist at once. Gradients of leaves in 16 bits are float32, because sums in 16 bits would lose the small ones.
    collect: what adds gradients to those before, as they arrive; by default each as it is.
    """
    collect = Plain if collect is None else collect

    def wrapped(params, *args, into=None):
        tracked = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        items = list(tree.items(tracked))
        leaves = [leaf for _, leaf in items]
        totals = collect(items, [None] * len(leaves) if into is None else tree.leaves(into))
        with gathers.collecting(leaves, totals.add) as sums:
            with torch.enable_grad():
                value, aux = fn(tracked, *args)
            sums.forward = False
            if value.requires_grad:
                torch.autograd.backward(value, inputs=leaves)
        grads = iter(_own(totals.collected()))
        return (value.detach(), aux), tree.map(lambda _: next(grads), params)

    return wrapped


class Plain:
    """The totals of leaves as they are: autograd adds into buffers that it finds, but for leaves in 16 bits."""

    def __init__(self, items: Sequence[tuple[str, Tensor]], before: Sequence[Tensor | None]):
        self.leaves = [leaf for _, leaf in items]
        self.wide: dict[int, Tensor | None] = {}  # totals of the leaves in 16 bits, filled as they arrive
        for i, (leaf, total) in enumerate(zip(self.leaves, before, strict=True)):
            if leaf.dtype in (torch.float32, torch.float64):
                leaf.grad = total
            else:
                self.wide[i] = total
                leaf.register_post_accumulate_grad_hook(partial(_widen, self.wide, i))

    def add(self, i: int, part: Tensor, /, *, last: bool) -> None:
        """Add this rank's part of a gradient that other ranks had a share in."""
        leaf = self.leaves[i]
        self.put(i, _added(self.wide[i] if i in self.wide else leaf.grad, shard.rewrap(part.to(_sum_dtype(leaf)), leaf)))

    def total(self, i: int) -> Tensor:
        """The total of a leaf, 0 where nothing has used it."""
        total = self.wide[i] if i in self.wide else self.leaves[i].grad
        return _zeros(self.leaves[i]) if total is None else total

    def put(self, i: int, total: Tensor) -> None:
        """Another total in place of a leaf's."""
        if i in self.wide:
            self.wide[i] = total
        else:
            self.leaves[i].grad = total

    def collected(self) -> list[Tensor]:
        """The totals."""
        return [self.total(i) for i in range(len(self.leaves))]


def _widen(wide: dict[int, Tensor | None], i: int, leaf: Tensor) -> None:
    """Add what has arrived for a leaf to its total, and free it."""
    if leaf.grad is not None:  # what `gathers` collects does not arrive here
        grad, leaf.grad = leaf.grad.float(), None
        wide[i] = _added(wide[i], grad)


def _added(total: Tensor | None, grad: Tensor) -> Tensor:
    if total is None:
        return grad
    shard.local(total).add_(shard.local(grad))
    return total


def _sum_dtype(leaf: Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, torch.float32)


def _zeros(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, dtype=_sum_dtype(leaf), requires_grad=False)


def _own(grads: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous gradients in memory of their own: autograd may return an expanded, a transposed or a shared tensor."""
    owned, addresses = [], set()
    for grad in grads:
        grad = grad.contiguous()
        own = shard.local(grad)
        address = own.untyped_storage()._cdata, own.storage_offset()
        owned.append(grad.clone() if address in addresses else grad)
        addresses.add(address)
    return owned


class Remat(NamedTuple):
    """What of a layer is there in the backward pass, and where it is until then.

    recompute: "none", all that autograd saves; "full", the input, of which the layer is computed again; "selective", also the results of
    matrix products and of attention. place: "" on the device, else one of `offload.PLACES`.
    """

    recompute: str = "none"
    place: str = ""


RECOMPUTE = ("none", "full", "selective")


def policy_of(policy: str | None) -> Remat:
    """The policy of a name: None, "full", "selective", and each with a place, as in "none+cpu", "full+disk". Errors: ValueError."""
    recompute, plus, place = ("none" if policy is None else policy).partition("+")
    if recompute not in RECOMPUTE or plus and place not in offload.PLACES:
        names = ", ".join(repr(name) for name in RECOMPUTE[1:])
        raise ValueError(f"unknown rematerialisation policy {policy!r}; expected None, {names}, or one with +cpu or +disk behind it")
    return Remat(recompute, place)


def recomputes(policy: str | None) -> bool:
    """Whether a layer is computed again in the backward pass, and gathers its sharded and quantised leaves again by itself."""
    return policy_of(policy).recompute != "none"


def remat(fn: Callable, policy: str | None) -> Callable:
    """`fn(x, *args)` with what the policy says of its activations kept for the backward pass; x is the input [T, D] of a layer.

    Gradients are the same to the bit. No random state is kept: noise is a function of counters, not of a generator.
    """
    keep = policy_of(policy)
    if keep == Remat():
        return fn
    place = offload.place(keep.place) if keep.place else None
    if keep.recompute == "none":
        assert place is not None
        return partial(_elsewhere, fn, place)
    # Re-entrant checkpoints refuse backward(inputs=...).
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keep.recompute == "selective":
        options["context_fn"] = partial(_selected, place)

    def again(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return fn(*args)
        with contextlib.nullcontext() if place is None else saved_tensors_hooks(place.put, place.take):
            return checkpoint(fn, *args, **options)

    return again


def _selected(place: offload.Place | None) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """The contexts of the first computation of a layer and of the second."""
    from treetune.ops import kept

    store = kept.Store(*(place or (_same, _same)))
    return store.keeping(), store.using()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _elsewhere(fn: Callable, place: offload.Place, x: Tensor, *args: Any) -> Any:
    """`fn` with what autograd saves of it in another place. Weights stay where they are, and those that are made of others are again."""
    if not torch.is_grad_enabled():
        return fn(x, *args)
    still = {leaf.untyped_storage().data_ptr() for leaf in tensors(args) if not shard.distributed(leaf)}

    def put(saved: Tensor) -> Any:
        if shard.distributed(saved) or saved.untyped_storage().data_ptr() in still:
            return saved
        again = shard.without_whole(saved)
        return place.put(saved) if again is saved else again

    with saved_tensors_hooks(put, lambda stored: place.take(shard.with_whole(stored))):
        return fn(x, *args)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results: in dicts, lists and tuples, named ones too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors(one)
