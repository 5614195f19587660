"""The matrix products of a run: those of the machine, measured once; those of its checkpoint on resuming."""

import contextlib
import json
import os

import pytest
import torch

from treetune.core import ckpt
from treetune.models import products
from treetune.ops import product

TURNED = product.Choice("onednn turned", "torch")


@pytest.fixture
def machine(here, monkeypatch):
    """A machine on which TURNED is measured; the number of measurements."""
    count = []
    monkeypatch.setenv("TREETUNE_HOME", str(here / "home"))
    monkeypatch.setattr(product, "measure", lambda: count.append(1) or TURNED)
    yield count
    product.choose(product.Choice())


def args(tiny, *more):
    return ["sft", "--model", tiny.model, "--data", tiny.chat, "--sequence-len", 128, "--sample-prompt=", "--output-dir", "run", *more]


def test_a_machine_is_measured_once(machine, tiny, tune, here):
    for _ in range(2):
        assert tune(*args(tiny, "--max-steps", 1, "--overwrite")).code == 0
    assert machine == [1] and product.chosen() == TURNED
    (kept,) = (here / "home/products").iterdir()
    for text in ("", "[]", '{"few": "cublas", "many": "torch"}'):
        kept.write_text(text)
        assert products.measured() == TURNED
    assert len(machine) == 4 and json.loads(kept.read_text())["few"] == "onednn turned"


def test_a_resumed_run_goes_on_with_its_own_products(machine, tiny, tune, here, monkeypatch):
    assert tune(*args(tiny, "--max-steps", 2, "--save-steps", 2)).code == 0
    meta = ckpt.read_meta(here / "run/checkpoints/step_000002")
    assert meta["products"] == TURNED._asdict()
    other = product.Choice()
    monkeypatch.setattr(products, "measured", lambda: other)
    done = tune(*args(tiny, "--max-steps", 4, "--resume", "auto"))
    assert done.code == 0 and product.chosen() == TURNED, done.err
    assert "products: onednn turned for few rows and torch for many, as in step_000002" in done.out
    assert ckpt.read_meta(here / "run/checkpoints/step_000004")["products"] == TURNED._asdict()


def test_bfloat16_has_one_product(machine, tiny, tune):
    assert tune(*args(tiny, "--max-steps", 1, "--dtype", "bfloat16")).code == 0
    assert not machine and product.chosen() == product.Choice()


def test_tf32_is_on_inside_of_a_run_only(monkeypatch):
    cuda, parts = torch.device("cuda"), products.TF32_PARTS
    before = [part.allow_tf32 for part in parts]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for on in (True, False):
        with contextlib.suppress(KeyError), products.tf32(cuda, on=on):
            assert [part.allow_tf32 for part in parts] == [on, on]
            raise KeyError
        assert [part.allow_tf32 for part in parts] == before


def test_deterministic_algorithms_are_on_inside_of_a_run_on_a_gpu_only(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for device, on in (("cuda", True), ("cuda", False), ("cpu", True)):
        lines: list[str] = []
        with contextlib.suppress(KeyError), products.deterministic(torch.device(device), on=on, say=lines.append):
            assert torch.are_deterministic_algorithms_enabled() == (on and device == "cuda")
            assert torch.is_deterministic_algorithms_warn_only_enabled() == torch.are_deterministic_algorithms_enabled()
            raise KeyError
        assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
        assert len(lines) == (device == "cpu")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(("device", "words"), [("cpu", "the run is on cpu"), ("cuda", "compute capability 8.0, and this GPU has 7.5")])
def test_a_device_without_tf32_is_said(device, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    lines: list[str] = []
    for on in (False, True):
        with products.tf32(torch.device(device), on=on, say=lines.append):
            assert not any(part.allow_tf32 for part in products.TF32_PARTS)
    assert len(lines) == 1 and words in lines[0] and "multiplied as they are" in lines[0]


def test_a_gpu_without_float8_is_refused_and_a_cpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"fp8_products needs a GPU of compute capability 8.9 or more, and this one has 8.6"):
        products.without_float8(torch.device("cuda"))
    assert "multiplies no float8" in products.without_float8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert products.without_float8(torch.device("cuda")) == ""
