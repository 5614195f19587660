"""One thread for all tests and what they start: their tensors are small, and two cores serve two processes better than four threads."""

import collections
import contextlib
import gc
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
# Tiny models meet hundreds of lengths: the few kernels that a run keeps (ops/product.py) would be compiled again and again. The limits are
# read at the first product; processes that are started from here keep those of a run.
CACHES = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "1024")
if torch.backends.mkldnn.is_available() and not os.environ.keys() & CACHES.keys():
    os.environ |= CACHES
    torch.ops.mkldnn._linear_pointwise(torch.ones(2, 2), torch.ones(2, 2), None, "none", [], "")
    for name in CACHES:
        del os.environ[name]


GOLDEN = 0.6180339887  # its multiples are even and have no period, as the values of a parameter have


@pytest.hookimpl(tryfirst=True)  # before pytest looks at its marker expression
def pytest_collection_modifyitems(config, items):
    """Of a `sampled(n)` test one case in n is of the working set; `slow` tests run only when a marker expression asks for them."""
    seen = collections.Counter()
    for item in items:
        if (mark := item.get_closest_marker("sampled")) is not None and "slow" not in item.keywords:
            name = item.nodeid.partition("[")[0]
            if seen[name] * GOLDEN % 1 >= 1 / mark.args[0]:
                item.add_marker("more")
            seen[name] += 1
    if "slow" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="slow: run with make test-all")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish():
    """What is collected stays: the garbage collections of tests, and of processes forked from here, need not look at it."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # else libraries report at the end of the process that they are still held


@pytest.fixture(scope="session", autouse=True)
def unflushed(request):
    """Nothing waits for the disk, unless slow tests run too: no test cuts the power, and those of what is flushed count the calls."""
    with pytest.MonkeyPatch.context() as patch:
        if "slow" not in request.config.getoption("markexpr").replace("not slow", ""):
            patch.setattr(os, "fsync", lambda handle: None)
        yield
