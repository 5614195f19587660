"""Shared tools of the op tests."""

import pytest
import torch


@pytest.fixture
def poison():
    """Every torch.empty is filled with NaN, so that an output that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def saved_bytes():
    """saved_bytes(fn, *inputs): bytes kept for the backward of fn(*inputs), the storage of the inputs not counted."""

    def measure(fn, *inputs):
        known, kept = {x.untyped_storage().data_ptr() for x in inputs}, {}

        def pack(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = fn(*inputs)
        del out
        return sum(kept.values())

    return measure


@pytest.fixture
def relative_error():
    """relative_error(got, exact): Frobenius norm of the difference over that of `exact` (over 1 where exact is 0), in float64."""

    def error(got, exact):
        got, exact = got.detach().double(), exact.detach().double()
        return float((got - exact).norm() / (exact.norm() or 1.0))

    return error
