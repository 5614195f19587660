"""What enters and leaves layers that ranks split, on one rank whose others are absent."""

import torch

from treetune.cli.planning import absent_ranks
from treetune.ops import tensor_parallel


def test_a_small_gradient_does_not_keep_the_message_that_brought_it():
    """The gradient of an adapter's side stays until the update, that of the tokens beside it goes with its layer."""
    x, side = torch.randn(64, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with absent_ranks.joined({"tensor": 2}, copies=False) as ranks:
        assert ranks.mesh is not None
        split = tensor_parallel.Split(ranks.mesh.get_group("tensor"), 0, 2)
        h, low = tensor_parallel.enter(split, x, side)
        (2 * h.sum() + 3 * low.sum()).backward()
    assert x.grad is not None and side.grad is not None
    assert (x.grad == 2).all() and (side.grad == 3).all()
    assert side.grad.untyped_storage().nbytes() == side.nbytes
