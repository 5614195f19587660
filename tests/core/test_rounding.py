"""Weights in bfloat16 with stochastic rounding: without bias, a function of seed, update, leaf and place, and resumed to the bit."""

import math

import pytest
import torch

from treetune.core import ckpt, grad, optim, registry, rounding, tree
from treetune.core.state import TrainState
from treetune.ops import noise

SHAPES = {"layers": [{"w": (24, 40), "experts": (3, 8, 12), "norm": (9,)}], "head": (5, 7)}
STEPS, RATE = 50, 1e-2
WORDS = torch.arange(2**16, dtype=torch.int32)


def _params(dtype=torch.bfloat16, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return tree.map(lambda shape: torch.randn(shape, generator=gen).bfloat16().to(dtype), SHAPES)


def _grads(params, step):
    """A direction that lasts, and noise."""
    lasting, gen = torch.Generator().manual_seed(5), torch.Generator().manual_seed(100 + step)
    return tree.map(lambda leaf: 0.3 * torch.randn(leaf.shape, generator=lasting) + torch.randn(leaf.shape, generator=gen), params)


def _trained(optimizer, params, steps=STEPS, rate=RATE):
    state = optimizer.init(params)
    for step in range(steps):
        params, state = optimizer.update(_grads(params, step), state, params, torch.tensor(rate))
    return params, state


def _made(name):
    """The optimiser of a name; projections of a rank that these small matrices are above."""
    options = {"rank": 4} if name.startswith(("galore", "apollo_adamw")) else {}
    return registry.bind(registry.OPTIMIZERS[name], weight_decay=0.1, **options)()


def _draw(seed=3, update=0):
    return rounding.Draw(torch.tensor(seed), torch.tensor(update))


NUMBERS = [1.0, 1.001, -1.001, 1.9999, -3.14159, 2.0**-20 * 1.7, 1e-39, -7.3e-41, 65504.3, 3e38, 0.0]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_mean_over_all_words_is_the_number_itself(number):
    exact = torch.tensor(number)
    rounded = rounding.rounded_by(exact.expand(2**16).contiguous(), WORDS)
    near = exact.bfloat16()
    assert rounded.dtype == torch.bfloat16 and len(rounded.unique()) == (1 if near.float() == exact else 2)
    assert (rounded.double().sum() / 2**16).item() == exact.double().item()  # sums of 2^16 numbers of 8 bits are exact in float64


def test_what_is_not_finite_stays_so():
    numbers = torch.tensor([math.inf, -math.inf, math.nan])
    for word in (0, 1, 2**16 - 1):
        rounded = rounding.rounded_by(numbers, torch.full((3,), word, dtype=torch.int32))
        assert rounded[0] == math.inf and rounded[1] == -math.inf and rounded[2].isnan()


@pytest.mark.parametrize("vary", ["key", "column"])
def test_words_are_even(vary):
    """By chi-square over the upper and the lower 8 bits, within 5 standard deviations."""
    count = 2**18
    if vary == "key":
        words = noise.words(noise.keys(1, torch.arange(count)), 1)[:, 0]
    else:
        words = noise.words(noise.keys(torch.zeros(1, dtype=torch.int64)), count)[0]
    assert words.dtype == torch.int32 and words.min() >= 0 and words.max() < 2**16
    for part in (words >> 8, words & 255):
        counts, expected = part.bincount(minlength=256).double(), count / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * math.sqrt(2 * 255)


def test_words_of_columns_do_not_depend_on_where_a_part_begins():
    key = noise.keys(7, torch.arange(5))
    whole = noise.words(key, 23)
    for first in range(23):
        assert torch.equal(noise.words(key, 23 - first, first=first), whole[:, first:])


def test_the_draw_is_by_seed_update_leaf_and_place_and_the_mean_over_updates_is_the_number(monkeypatch):
    leaf, numbers = torch.zeros(24, 40, dtype=torch.bfloat16), torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    one = rounding.into("a", leaf, numbers, _draw())
    others = [rounding.into("b", leaf, numbers, _draw()), rounding.into("a", leaf, numbers, _draw(4))]
    others += [rounding.into("a", leaf, numbers, _draw(update=1)), numbers.bfloat16()]
    assert not any(torch.equal(one, other) for other in others)
    monkeypatch.setattr(rounding, "CHUNK", 100)
    assert torch.equal(one, rounding.into("a", leaf, numbers, _draw()))
    assert torch.equal(rounding.into("a", leaf, numbers.bfloat16().float(), _draw()), numbers.bfloat16())
    times, total = 400, torch.zeros_like(numbers, dtype=torch.float64)
    for update in range(times):
        total += rounding.into("a", leaf, numbers, _draw(update=update)).double()
    gap = 2.0 ** (torch.floor(torch.log2(numbers.abs().double())) - 7)  # between bfloat16 neighbours
    apart = (total / times - numbers) / (gap / 2 / math.sqrt(times))  # in the largest standard deviation that a number can have
    assert apart.abs().max() < 5 and apart.mean().abs() < 5 / math.sqrt(apart.numel())


def test_small_updates_are_lost_by_rounding_to_the_nearest_and_kept_on_average():
    """1000 steps of 1/2000 of the distance to the next number, at a learning rate of sgd."""
    params, step = {"w": torch.ones(64, 64, dtype=torch.bfloat16)}, 2.0**-7 / 2000
    ends = []
    for optimizer in (optim.sgd(), rounding.stochastic(optim.sgd(), 1)):
        here = tree.map(torch.clone, params)
        state = optimizer.init(here)
        for _ in range(1000):
            optimizer.update({"w": -torch.ones(64, 64)}, state, here, torch.tensor(step))
        ends.append(here["w"].double() - 1)
    assert torch.equal(ends[0], torch.zeros_like(ends[0]))
    # A step goes up by a whole distance with a chance of 1/2000: of 1000, 1/2 of a distance with a variance of 1/2.
    assert ends[1].mean().item() / 2.0**-7 == pytest.approx(0.5, abs=5 * math.sqrt(0.5 / 64**2))


# Of muon the matrices of layers only: bfloat16 products inside of it; of adafactor a clip by the size of a whole leaf.
@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", sorted(registry.OPTIMIZERS))
def test_weights_walk_about_those_of_float32(name):
    """Of 50 roundings each adds at most half a distance of neighbours of deviation; the mean over a leaf stays where it is."""
    ends = [_trained(_made(name), _params(torch.float32))[0], _trained(rounding.stochastic(_made(name), 1), _params())[0]]
    wide, small = (torch.cat([leaf.double().view(-1) for leaf in tree.leaves(end)]) for end in ends)
    assert all(leaf.dtype == torch.bfloat16 for leaf in tree.leaves(ends[1]))
    gap = 2.0 ** (torch.floor(torch.log2(wide.abs().clamp(min=0.25))) - 7)
    apart = (small - wide) / gap
    assert apart.square().mean().sqrt() < math.sqrt(STEPS) / 2
    assert apart.mean().abs() < 5 * math.sqrt(STEPS) / 2 / math.sqrt(apart.numel())


@pytest.mark.parametrize("name", sorted(registry.OPTIMIZERS))
def test_a_checkpoint_holds_seed_and_update_and_the_run_goes_on_to_the_bit(name, tmp_path):
    optimizer = rounding.stochastic(_made(name), 5)
    params, state = _trained(optimizer, _params(), 3)
    path = ckpt.save(tmp_path, TrainState(params, {}, state, {}, torch.tensor(3)), {})
    fresh = _params(seed=9)
    loaded, _ = ckpt.load(path, TrainState(fresh, {}, optimizer.init(fresh), {}, torch.tensor(0)))
    assert loaded.opt[rounding.KEY] == {"seed": torch.tensor(5), "update": torch.tensor(3)}
    for step in range(3, 6):
        for one, two in ((params, state), (loaded.params, loaded.opt)):
            optimizer.update(_grads(one, step), two, one, torch.tensor(RATE))
    for one, two in zip(tree.leaves({"p": params, "s": state}), tree.leaves({"p": loaded.params, "s": loaded.opt}), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


@pytest.mark.parametrize("name", ["adamw", "lion", "adamw_8bit"])
def test_a_step_that_is_skipped_rounds_nothing(name):
    optimizer, params = rounding.stochastic(registry.bind(registry.OPTIMIZERS[name])(), 5), _params()
    before, state = tree.map(torch.clone, params), optimizer.init(params)
    bad = tree.map(lambda leaf: torch.full(leaf.shape, math.nan), params)
    params, state = optimizer.update(bad, state, params, torch.tensor(RATE), torch.tensor(1.0))
    assert all(torch.equal(one, two) for one, two in zip(tree.leaves(params), tree.leaves(before), strict=True))


@pytest.mark.parametrize(("name", "size"), [("adamw", 8), ("adamw_8bit", 2.03), ("lion_8bit", 1.02), ("sgd", 0)])
def test_there_is_no_float32_copy(name, size):
    params = {"layers": [{"w": torch.zeros(512, 512, dtype=torch.bfloat16)}]}
    state = rounding.stochastic(registry.bind(registry.OPTIMIZERS[name])(), 0).init(params)
    assert tree.bytes(params) == 2 * 512**2 and tree.bytes(state) / 512**2 == pytest.approx(size, abs=0.005)


def test_an_optimizer_that_writes_weights_by_itself_is_refused():
    own = optim.Optimizer(lambda params: {}, lambda grads, state, params, lr, found_inf=None: (params, state))
    with pytest.raises(ValueError, match=r"writes weights by itself.*make it with optim.stepwise or optim.leafwise"):
        rounding.stochastic(own, 0)


def test_gradients_of_bfloat16_weights_are_summed_in_float32():
    params = {"w": torch.ones(4, dtype=torch.bfloat16), "unused": torch.ones(2, dtype=torch.bfloat16), "wide": torch.ones(4)}
    gradient, total = grad.value_and_grad(lambda p, x: ((p["w"] * x).sum() + (p["wide"] * x).sum(), None)), None
    for x in (1.0, 2.0**-9, 2.0**-9):
        _, total = gradient(params, torch.full((4,), x, dtype=torch.bfloat16), into=total)
    assert all(leaf.dtype == torch.float32 for leaf in tree.leaves(total))
    assert torch.equal(total["w"], torch.full((4,), 1 + 2.0**-8)) and torch.equal(total["unused"], torch.zeros(2))
