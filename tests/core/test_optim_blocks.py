"""Moments in 8 and 4 bits: the codes of bitsandbytes and torchao to the bit over 50 steps, and float32 AdamW within their format."""

import bisect
import math

import pytest
import torch

from treetune.core import check, ckpt, optim, optim_blocks, quant_tables, tree
from treetune.core.state import TrainState

STEPS, RATE, CPU = 50, 1e-2, torch.device("cpu")
SHAPES = {"whole": (64, 128), "odd": (97, 53), "stack": (3, 40, 50), "small": (63, 65), "norm": (100,)}
MAKERS = {name: getattr(optim_blocks, name) for name in ("adamw_8bit", "adamw_4bit", "adamw_fp8", "lion_8bit")}


def _params(shapes=SHAPES, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=gen) for name, shape in shapes.items()}


def _grads(params, step):
    """Of another size at each step, with blocks of zeros and rare large numbers."""
    gen = torch.Generator().manual_seed(1000 + step)
    grads = tree.map(lambda leaf: torch.randn(leaf.shape, generator=gen) ** 3 * 10.0 ** (-(step % 4)), params)
    for leaf in tree.leaves(grads):
        leaf.view(-1)[512:1024] = 0
    return grads


def _ours(optimizer, params, steps=STEPS):
    state = optimizer.init(params)
    for step in range(steps):
        params, state = optimizer.update(_grads(params, step), state, params, torch.tensor(RATE))
    return params, state


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_the_codes_are_those_of_bitsandbytes(name):
    bnb = pytest.importorskip("bitsandbytes", reason="the oracle; it is installed on Linux only")
    params, leaves = _params(), {key: torch.nn.Parameter(leaf) for key, leaf in _params().items()}
    groups = [{"params": [leaf], "weight_decay": 0.1 if leaf.ndim >= 2 else 0.0} for leaf in leaves.values()]
    oracle = getattr(bnb.optim, name)(groups, lr=RATE, betas=(0.9, 0.99))
    for step in range(STEPS):
        for leaf, grad in zip(leaves.values(), _grads(params, step).values(), strict=True):
            leaf.grad = grad
        oracle.step()
    make = optim_blocks.adamw_8bit if name == "AdamW8bit" else optim_blocks.lion_8bit
    params, state = _ours(make(b1=0.9, b2=0.99, weight_decay=0.1), params)
    for key, leaf in leaves.items():
        theirs = oracle.state[leaf]
        torch.testing.assert_close(params[key], leaf.detach(), rtol=1e-5, atol=1e-5)  # float32, in another order
        for moment, codes, absmax in (("mu", "state1", "absmax1"), ("nu", "state2", "absmax2")):
            if moment not in state:
                continue
            if theirs[codes].dtype == torch.float32:
                assert key in ("small", "norm")
                torch.testing.assert_close(state[moment][key], theirs[codes], rtol=1e-5, atol=1e-12)
                continue
            # Squares are rounded twice by us and once by them, so a code of the second moment may be the next one, rarely.
            distance = (state[moment][key].int() - theirs[codes].int()).abs()
            assert distance.max() <= (moment == "nu") and (distance > 0).float().mean() < 1e-3
            torch.testing.assert_close(state[f"{moment}_absmax"][key], theirs[absmax], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["adamw_4bit", "adamw_fp8"])
def test_the_codes_are_those_of_torchao(name):
    adam = pytest.importorskip("torchao.optim.adam", reason="the oracle; it is installed on Linux only")
    four, eight = pytest.importorskip("torchao.optim.subclass_4bit"), pytest.importorskip("torchao.optim.subclass_fp8")
    params = _params({"whole": (64, 128)})
    leaf, flat = params["whole"].clone(), lambda codes: codes.reshape(-1).view(torch.uint8)
    if name == "adamw_4bit":
        mu, nu = (four.OptimState4bit.zeros(leaf.shape, signed, 128, dtype=leaf.dtype) for signed in (True, False))
    else:
        mu, nu = (eight.OptimStateFp8.zeros(leaf.shape, 256, dtype=leaf.dtype) for _ in range(2))
    for step in range(STEPS):
        grad = _grads(params, step)["whole"]
        rates = (torch.tensor(RATE), 0.9, 0.99, 0.1, 1e-8)
        adam.single_param_adam(leaf, grad, torch.tensor(step + 1.0), mu, nu, None, *rates, True, False)
    params, state = _ours(MAKERS[name](b2=0.99, weight_decay=0.1), params)
    torch.testing.assert_close(params["whole"], leaf, rtol=1e-5, atol=1e-5)
    for moment, theirs in (("mu", mu), ("nu", nu)):
        assert torch.equal(flat(state[moment]["whole"]), flat(theirs.codes))
        torch.testing.assert_close(state[f"{moment}_absmax"]["whole"], theirs.scale, rtol=1e-6, atol=0)


def _nearest(table, number):
    """The entry nearest to a number, the upper one of two, found by hand."""
    at = bisect.bisect_right(table, number)
    below, above = max(at - 1, 0), min(at, len(table) - 1)
    return above if table[above] - number <= number - table[below] else below


@pytest.mark.parametrize("signed", [True, False])
def test_four_bits_are_the_nearest_of_the_table_in_blocks_of_128(signed):
    numbers = torch.randn(300, generator=torch.Generator().manual_seed(1))
    numbers = numbers if signed else numbers.abs()
    codes, absmax = optim_blocks.FOUR.encode(numbers, signed)
    table = quant_tables.four_bit_moments(CPU, signed).double().tolist()
    assert absmax.tolist() == [block.abs().max().item() for block in numbers.split(128)]
    for i, number in enumerate(numbers.tolist()):
        byte = int(codes[i // 2])
        assert (byte & 15 if i % 2 else byte >> 4) == _nearest(table, number / absmax[i // 128].item()), i
    read = optim_blocks.FOUR.decode(codes, absmax, signed)[:300]
    assert (read - numbers).abs().max() <= 0.23 * numbers.abs().max()  # half of the widest gap of the dynamic table


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_on_a_gpu_are_the_nearest_of_the_table(signed):
    """The branch of other devices, run on the CPU: no grid."""
    table = quant_tables.eight_bits(CPU, signed)
    numbers = torch.randn(2000, generator=torch.Generator().manual_seed(1)) ** 3
    numbers = (numbers if signed else numbers.abs()) / numbers.abs().max()
    nearest = table[quant_tables.nearest(numbers, table).int()]
    best = (numbers[:, None] - table).abs().amin(1)
    assert torch.equal((nearest - numbers).abs(), best)


def _even_grads(params, step):
    """As those of training: a direction that lasts, and noise, of sizes within a factor of 4 in a leaf."""
    lasting, size = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    noise = torch.Generator().manual_seed(2000 + step)

    def one(leaf):
        scale = 4 ** torch.rand(leaf.shape, generator=size)
        return scale * (0.3 * torch.randn(leaf.shape, generator=lasting) + torch.randn(leaf.shape, generator=noise))

    return tree.map(one, params)


# How far the weights are from those of float32 AdamW after 50 steps, as a part of how far they went; a code is off by at most 1/16 of a
# number with the 3 bits of e4m3, by half of that for the larger numbers of a block in 8 bits, and by 1/3 between 0.2125 and 0.4375.
APART = {"adamw_8bit": 1 / 32, "adamw_fp8": 1 / 16, "adamw_4bit": 1 / 3}


@pytest.mark.parametrize("name", APART)
def test_the_weights_stay_near_those_of_float32_moments(name):
    shapes, ends = {"whole": (64, 128), "odd": (97, 53)}, []
    for make in (MAKERS[name], optim.adamw):
        params, optimizer = _params(shapes), make(b2=0.99)
        state = optimizer.init(params)
        for step in range(STEPS):
            optimizer.update(_even_grads(params, step), state, params, torch.tensor(RATE))
        ends.append(torch.cat([leaf.view(-1) for leaf in params.values()]))
    start = torch.cat([leaf.view(-1) for leaf in _params(shapes).values()])
    assert (ends[0] - ends[1]).norm() < APART[name] * (ends[1] - start).norm()


BYTES = {"adamw_8bit": 2 * (1 + 4 / 256), "adamw_4bit": 2 * (0.5 + 4 / 128), "adamw_fp8": 2 * (1 + 4 / 256), "lion_8bit": 1 + 4 / 256}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_a_parameter(name):
    params = {"w": torch.zeros(512, 512)}
    state = MAKERS[name]().init(params)
    assert tree.bytes(state) - 4 == BYTES[name] * 512 * 512
    small = MAKERS[name]().init({"w": torch.zeros(63, 65)})
    assert tree.bytes(small) - 4 == 4 * 63 * 65 * (1 if name == "lion_8bit" else 2)


@pytest.mark.parametrize("name", MAKERS)
def test_a_leaf_is_dense_in_chunks_only(name, monkeypatch):
    whole, state = _ours(MAKERS[name](), _params(), 5)
    monkeypatch.setattr(optim_blocks, "CHUNK", 512)
    chunked, other = _ours(MAKERS[name](), _params(), 5)
    for one, two in zip(tree.leaves({"p": whole, "s": state}), tree.leaves({"p": chunked, "s": other}), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_holds_the_codes_bit_for_bit_and_the_run_goes_on(name, tmp_path):
    optimizer = MAKERS[name](weight_decay=0.1)
    params, state = _ours(optimizer, _params(), 3)
    path = ckpt.save(tmp_path, TrainState(params, {}, state, {}, torch.tensor(3)), {})
    fresh = _params(seed=9)
    loaded, _ = ckpt.load(path, TrainState(fresh, {}, optimizer.init(fresh), {}, torch.tensor(0)))
    assert bool(check.finite(loaded.opt)) and math.isclose(float(loaded.opt["count"]["odd"]), 3)
    for step in range(3, 6):
        for one, two in ((params, state), (loaded.params, loaded.opt)):
            optimizer.update(_grads(one, step), two, one, torch.tensor(RATE))
    for one, two in zip(tree.leaves({"p": params, "s": state}), tree.leaves({"p": loaded.params, "s": loaded.opt}), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


def test_bfloat16_weights_have_float32_moments_and_take_float32_gradients():
    params = {"w": torch.zeros(64, 128, dtype=torch.bfloat16), "norm": torch.zeros(9, dtype=torch.bfloat16)}
    optimizer = optim_blocks.adamw_8bit()
    state = optimizer.init(params)
    assert state["mu"]["norm"].dtype == torch.float32
    optimizer.update(tree.map(lambda leaf: torch.ones(leaf.shape), params), state, params, torch.tensor(0.5))
    assert all(torch.allclose(leaf.float(), torch.tensor(-0.5), rtol=1e-2) for leaf in params.values())
