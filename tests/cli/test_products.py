"""The matrix products of a run: those of the machine, measured once; those of its checkpoint on resuming."""

import json

import pytest

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
