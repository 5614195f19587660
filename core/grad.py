"""Gradients over trees, with the calling convention of jax.value_and_grad(has_aux=True)."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from treetune.core import tree


def value_and_grad(fn: Callable) -> Callable:
    """Turn `fn(params, *args) -> (value, aux)` into `(params, *args) -> ((value, aux), grads)`.

    Built on torch.autograd.grad, because torch.func.grad fails under activation checkpointing and with ctx-style
    autograd functions. Leaves that `fn` does not use get zero gradients. The value comes back detached.
    """

    def wrapped(params, *args):
        tracked = tree.map(lambda leaf: leaf.detach().requires_grad_(), params)
        with torch.enable_grad():
            value, aux = fn(tracked, *args)
        flat = torch.autograd.grad(value, tree.leaves(tracked), allow_unused=True, materialize_grads=True)
        grads = iter(flat)
        return (value.detach(), aux), tree.map(lambda _: next(grads), params)

    return wrapped


def remat(fn: Callable, policy: str | None) -> Callable:
    """`fn` as it is (policy None), or recomputed in the backward pass instead of kept in memory ("full")."""
    if policy is None:
        return fn
    if policy == "full":
        return lambda *args: checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    raise ValueError(f"unknown rematerialisation policy {policy!r}; expected None or 'full'")
