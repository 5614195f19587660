"""Every schedule beside that of transformers or torch, over whole runs, and as a resumed run has it.

Ours starts to rise above 0: its warm-up of W steps is theirs of W + 1 without the step at rate 0. After the warm-up, rates are theirs.
"""

import itertools
import math

import pytest
import torch
import transformers
from torch.optim.lr_scheduler import OneCycleLR

from treetune.core.run import cadence

PEAK = 3e-4
RUNS = [(1, 0), (7, 0), (50, 5), (100, 1), (333, 100), (12, 11)]


def theirs(name: str, total: int, warmup: int, **options) -> list[float]:
    """The rates of transformers' schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    built = transformers.get_scheduler(name, optimizer, warmup, total, options)
    return _rates(optimizer, built, total)


def _rates(optimizer, built, total: int) -> list[float]:
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        built.step()
    return rates


def ours(name: str, total: int, warmup: int | None, first: int = 0, **given) -> list[float]:
    kwargs = tuple(f"{key}={value}" for key, value in given.pop("kwargs", {}).items())
    schedule = cadence.schedule(cadence.Rate(PEAK, total, name, lr_scheduler_kwargs=kwargs, warmup_steps=warmup, **given))
    return [schedule(torch.tensor(step)).item() for step in range(first, total)]


CASES = [
    ("linear", "linear", {}), ("cosine", "cosine", {}), ("cosine", "cosine", {"num_cycles": 1.5}),
    ("constant", "constant_with_warmup", {}), ("cosine_with_restarts", "cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_restarts", "cosine_with_restarts", {}), ("polynomial", "polynomial", {}),
    ("polynomial", "polynomial", {"power": 2.5, "lr_end": 1e-5}), ("inverse_sqrt", "inverse_sqrt", {}),
    ("inverse_sqrt", "inverse_sqrt", {"timescale": 77}), ("cosine_with_min_lr", "cosine_with_min_lr", {"min_lr": 2e-5}),
    ("cosine_with_min_lr", "cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 2.5}),
]  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "other", "kwargs"), CASES)
def test_rates_are_those_of_transformers(name, other, kwargs):
    for total, warmup in RUNS:
        rates, expected = ours(name, total, warmup, kwargs=kwargs), theirs(other, total, warmup, **kwargs)
        assert rates[warmup:] == pytest.approx(expected[warmup:], abs=1e-12, rel=0)
        rise = theirs(other, total + 1, warmup + 1, **kwargs)[1 : warmup + 1]
        assert rates[:warmup] == pytest.approx(rise, abs=1e-12, rel=0)


WSD = [
    {"num_decay_steps": 20}, {"num_decay_steps": 20, "decay_type": "1-sqrt", "warmup_type": "cosine", "min_lr_ratio": 0.1},
    {"num_decay_steps": 10, "num_stable_steps": 15, "decay_type": "linear", "warmup_type": "1-sqrt", "min_lr_ratio": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", WSD)
@pytest.mark.parametrize("warmup", [0, 1, 9])
def test_warmup_stable_decay_is_that_of_transformers(kwargs, warmup):
    rates, expected = ours("warmup_stable_decay", 60, warmup, kwargs=kwargs), theirs("warmup_stable_decay", 60, warmup, **kwargs)
    assert rates[warmup:] == pytest.approx(expected[warmup:], abs=1e-12, rel=0)
    rise = theirs("warmup_stable_decay", 61, warmup + 1, **kwargs)[1 : warmup + 1]
    assert rates[:warmup] == pytest.approx(rise, abs=1e-12, rel=0)


ONE_CYCLE = [
    {}, {"anneal_strategy": "linear"}, {"div_factor": 10, "final_div_factor": 100.0}, {"three_phase": True}, {"pct_start": 0.45},
    {"three_phase": True, "anneal_strategy": "linear"}, {"pct_start": 0.001},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", ONE_CYCLE)
@pytest.mark.parametrize(("total", "warmup"), [(40, 0), (40, 3), (101, 20), (40, 20)])
def test_one_cycle_is_that_of_torch(kwargs, total, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    built = OneCycleLR(optimizer, PEAK, total_steps=total, cycle_momentum=False, **({"pct_start": warmup / total} | kwargs))
    known = {key: str(value).lower() if isinstance(value, bool) else value for key, value in kwargs.items()}
    assert ours("one_cycle", total, warmup, kwargs=known) == pytest.approx(_rates(optimizer, built, total), abs=1e-12, rel=0)


def test_one_cycle_without_a_step_below_the_peak_starts_at_the_peak():
    assert ours("one_cycle", 40, 1)[0] == PEAK
    assert ours("one_cycle", 100, 10, lr_div_factor=5)[0] == PEAK / 5


@pytest.mark.parametrize("low", [0.0, 0.1])
def test_rex_falls_by_its_formula(low):
    for total, warmup in RUNS:
        left = [1 - (step - warmup) / max(total - warmup, 1) for step in range(warmup, total)]
        expected = [PEAK * (low + (1 - low) * z / (0.1 + 0.9 * z)) for z in left]
        assert ours("rex", total, warmup, cosine_min_lr_ratio=low)[warmup:] == pytest.approx(expected, abs=1e-12, rel=0)
    half = ours("rex", 10, 0, kwargs={"beta": 0.5})[5]
    assert half == pytest.approx(PEAK * 0.5 / (0.5 + 0.25), abs=1e-12)


def test_a_cosine_that_ends_before_the_run_stays_at_its_least():
    rates = ours("cosine", 100, 10, cosine_min_lr_ratio=0.2, cosine_constant_lr_ratio=0.8)
    expected = [PEAK * (0.2 + 0.8 * (1 + math.cos(math.pi * (min(step, 80) - 10) / 70)) / 2) for step in range(10, 100)]
    assert rates[10:] == pytest.approx(expected, abs=1e-12, rel=0) and rates[80:] == [0.2 * PEAK] * 20


def test_a_quadratic_warm_up_is_the_square_of_a_linear_one():
    rates, plain = ours("cosine", 50, 9, lr_quadratic_warmup=True), ours("cosine", 50, 9)
    assert rates[9:] == plain[9:]
    assert rates[:9] == pytest.approx([PEAK * ((step + 1) / 10) ** 2 for step in range(9)], abs=1e-12, rel=0)


EVERY = [*CASES, *(("warmup_stable_decay", "", kwargs) for kwargs in WSD[:1]), ("one_cycle", "", {}), ("rex", "", {})]


@pytest.mark.parametrize(("name", "other", "kwargs"), EVERY)
def test_a_rate_depends_on_the_step_alone_and_waits_for_nothing(name, other, kwargs):
    """So a resumed run goes on with the rates of the whole, and a compiled step recompiles for none."""
    whole = ours(name, 40, 3, kwargs=kwargs)
    assert whole[17:] == ours(name, 40, 3, first=17, kwargs=kwargs)
    lr_scheduler_kwargs = tuple(f"{key}={value}" for key, value in kwargs.items())
    schedule = cadence.schedule(cadence.Rate(PEAK, 40, name, lr_scheduler_kwargs=lr_scheduler_kwargs, warmup_steps=3))
    rate = schedule(torch.tensor(3, device="meta"))  # reading a meta tensor raises
    assert rate.device.type == "meta" and rate.dtype == torch.float64 and rate.ndim == 0
    assert all(0 <= one <= PEAK * (1 + 1e-12) for one in whole) and any(a != b for a, b in itertools.pairwise(whole))


def test_numbers_that_a_run_cannot_have_are_refused():
    with pytest.raises(ValueError, match="lr_end 0.001 of lr_scheduler_kwargs must be below the peak learning rate 0.0003"):
        ours("polynomial", 10, 0, kwargs={"lr_end": 1e-3})
    with pytest.raises(ValueError, match="num_decay_steps 8 of lr_scheduler_kwargs and 3 of warm-up are more than the 10 steps of the run"):
        ours("warmup_stable_decay", 10, 3, kwargs={"num_decay_steps": 8})
    with pytest.raises(ValueError, match="three_phase of lr_scheduler_kwargs rises and falls in 0.6 of the run each"):
        ours("one_cycle", 10, 6, kwargs={"three_phase": "true"})
