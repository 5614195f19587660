"""Runs that compute in float16, with loss scaling."""

import pytest

from treetune.core import loss_scale

RUN = ["--dtype", "float16", "--max-steps", 4, "--save-steps", 2, "--learning-rate", 0.01, "--lora-r", 4, "--sample-prompt="]


def begin_at(monkeypatch, value):
    """The scale that runs begin at."""
    monkeypatch.setattr(loss_scale.scaled, "__defaults__", (loss_scale.Pace(value),))


def losses(kit, root):
    return [record["train/loss"] for record in kit.metrics(root) if "train/loss" in record]


def test_losses_are_those_of_float32_and_the_scale_is_recorded(kit, tiny, here, tune, monkeypatch):
    begin_at(monkeypatch, 2.0**8)
    done = tune("sft", *kit.basics(tiny, *RUN, "--output-dir", "half"))
    assert done.code == 0, done.err
    assert tune("sft", *kit.basics(tiny, *RUN[2:], "--output-dir", "whole")).code == 0
    assert losses(kit, here / "half") == pytest.approx(losses(kit, here / "whole"), rel=5e-3)
    assert [record["loss_scale"] for record in kit.metrics(here / "half") if "loss_scale" in record] == [2.0**8] * 4


def test_it_resumes_bit_for_bit(kit, tiny, here, tune):
    assert tune("sft", *kit.basics(tiny, *RUN, "--output-dir", "whole")).code == 0
    first = here / "whole" / "checkpoints" / "step_000002"
    assert tune("sft", *kit.basics(tiny, *RUN, "--output-dir", "rest", "--resume", first)).code == 0
    one, other = (kit.left(here / name, 4) for name in ("whole", "rest"))
    assert kit.same(one[0], other[0]) and kit.same(one[1], other[1])


def test_an_overflow_is_a_step_that_changes_nothing(kit, tiny, here, tune, monkeypatch):
    begin_at(monkeypatch, 2.0**40)
    done = tune("sft", *kit.basics(tiny, *RUN, "--output-dir", "run"))
    assert done.code == 0, done.err
    records = [record for record in kit.metrics(here / "run") if "loss_scale" in record]
    assert records[0]["skipped"] == 1 and records[1]["loss_scale"] == 2.0**39
    assert records[1]["train/loss"] > 0


def test_all_weights_and_samples(kit, tiny, here, tune):
    options = ["--adapter", "none", "--max-steps", 2, "--learning-rate", 1e-3, "--dtype", "float16"]
    assert tune("sft", *kit.basics(tiny, *options, "--output-dir", "run")).code == 0
    done = tune("generate", "1 + 1", "--model", "run/model", "--dtype", "float16", "--max-new-tokens", 4)
    assert done.code == 0, done.err
