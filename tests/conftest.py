"""One thread for all tests and what they start: their tensors are small, and two cores serve two processes better than four threads."""

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch counts its threads; other processes inherit it

import pytest
import torch

with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401  torch.compile fails when something imported distutils before it

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Kernels of torchao are of other versions of torch, which it says in every process that imports transformers; the oracle needs none.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """`slow` tests run only when a marker expression asks for them."""
    if "slow" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="slow: run with make test-all")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
