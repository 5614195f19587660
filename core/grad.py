"""Gradients over trees, with the calling convention of jax.value_and_grad(has_aux=True)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from treetune.core import shard, tree


def value_and_grad(fn: Callable) -> Callable:
    """Turn `fn(params, *args) -> (value, aux)` into `(params, *args, into=None) -> ((value, aux), grads)`.

    Built on torch.autograd.backward over detached leaves, because torch.func.grad fails under activation checkpointing and
    with ctx-style autograd functions. Leaves that `fn` does not use get zero gradients. The value comes back detached;
    gradients may be changed in place: each is contiguous and has memory of its own.

    into: gradients of the same tree, in the dtypes of params, to which the new ones are added in place. Each is added as it
    arrives, so two whole trees of gradients never exist at once.
    """

    def wrapped(params, *args, into=None):
        tracked = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        with torch.enable_grad():
            value, aux = fn(tracked, *args)
        leaves = tree.leaves(tracked)
        # Autograd adds into the buffer that it finds in .grad, so a total and a second whole tree of gradients never exist at once.
        for leaf, total in zip(leaves, [None] * len(leaves) if into is None else tree.leaves(into), strict=True):
            leaf.grad = total
        if value.requires_grad:
            torch.autograd.backward(value, inputs=leaves)
        flat = [torch.zeros_like(leaf, requires_grad=False) if leaf.grad is None else leaf.grad for leaf in leaves]
        grads = iter(_own(flat))
        return (value.detach(), aux), tree.map(lambda _: next(grads), params)

    return wrapped


def _own(grads: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous gradients in memory of their own: autograd may return an expanded, a transposed or a shared tensor."""
    owned, addresses = [], set()
    for grad in grads:
        grad = grad.contiguous()
        address = shard.local(grad).data_ptr()
        owned.append(grad.clone() if address in addresses else grad)
        addresses.add(address)
    return owned


def remat(fn: Callable, policy: str | None) -> Callable:
    """`fn` unchanged (policy None), or with its activations recomputed in the backward pass ("full")."""
    if policy is None:
        return fn
    if policy == "full":
        # Re-entrant checkpoints refuse backward(inputs=...). No random state is kept: noise is a function of counters, not of a generator.
        return lambda *args: checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    raise ValueError(f"unknown rematerialisation policy {policy!r}; expected None or 'full'")
