"""Optimisers against torch.optim (adamw, sgd) and the published pseudo-code (lion), and what all of them promise."""

import math

import pytest
import torch

from treetune.core import optim, optim_averages, optim_blocks, optim_matrices, optim_pages, tree

OPTIMISERS = {
    "adamw_8bit": lambda **options: optim_blocks.adamw_8bit(**options),
    "adamw_4bit": lambda **options: optim_blocks.adamw_4bit(**options),
    "adamw_fp8": lambda **options: optim_blocks.adamw_fp8(**options),
    "lion_8bit": lambda **options: optim_blocks.lion_8bit(**options),
    "adafactor": lambda **options: optim_matrices.adafactor(**options),
    "muon": lambda **options: optim_matrices.muon(**options),
    "adagrad": lambda **options: optim_averages.adagrad(**options),
    "adopt": lambda **options: optim_averages.adopt(**options),
    "schedule_free": lambda **options: optim_averages.schedule_free_adamw(**options),
    "paged": lambda **options: optim.adamw(paged=True, **options),
    "adamw": lambda **options: optim.adamw(**options),
    "lion": lambda **options: optim.lion(**options),
    "sgd": lambda **options: optim.sgd(**options),
    "momentum": lambda **options: optim.sgd(momentum=0.9, **options),
}


@pytest.fixture(autouse=True)
def blocks_everywhere(monkeypatch):
    """Leaves of any size have their moments in blocks, and those of paged optimisers are copied there and back as on a GPU."""
    monkeypatch.setattr(optim_blocks, "SMALLEST", 1)
    monkeypatch.setattr(optim_pages, "_copy", lambda state, device: state.clone())


def _params(dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    shapes = {"layers": [{"w": (6, 4), "norm": (4,)}, {"w": (6, 4), "norm": (4,)}], "lora": {"q": {"A": (2, 4), "B": (6, 2)}}}
    return tree.map(lambda shape: torch.randn(shape, generator=gen, dtype=dtype), shapes)


def _grads(params, step):
    gen = torch.Generator().manual_seed(100 + step)
    return tree.map(lambda leaf: torch.randn(leaf.shape, generator=gen, dtype=leaf.dtype), params)


def _run(optimizer, params, steps=25, *, lr=lambda i: 0.02 * (1 + i % 3), transposed=False, found_inf=None):
    state = optimizer.init(params)
    for i in range(steps):
        grads = _grads(params, i)
        if transposed:
            grads = tree.map(lambda g: g.T.contiguous().T if g.ndim == 2 else g, grads)
        params, state = optimizer.update(grads, state, params, torch.tensor(lr(i), dtype=tree.leaves(params)[0].dtype), found_inf)
    return params, state


def _torch_run(make, params, steps=25, *, lr=lambda i: 0.02 * (1 + i % 3), decay=0.0):
    leaves = [torch.nn.Parameter(leaf.clone()) for leaf in tree.leaves(params)]
    groups = [{"params": [leaf], "weight_decay": decay if leaf.ndim >= 2 else 0.0} for leaf in leaves]
    optimizer = make(groups)
    for i in range(steps):
        for leaf, grad in zip(leaves, tree.leaves(_grads(params, i)), strict=True):
            leaf.grad = grad
        for group in optimizer.param_groups:
            group["lr"] = lr(i)
        optimizer.step()
    return [leaf.detach() for leaf in leaves]


def _close(params, expected, tolerance):
    for (path, leaf), want in zip(tree.items(params), expected, strict=True):
        torch.testing.assert_close(leaf, want, rtol=tolerance, atol=tolerance, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch_over_many_steps(dtype, tolerance, decay):
    expected = _torch_run(
        lambda g: torch.optim.AdamW(g, betas=(0.8, 0.95), eps=1e-6, foreach=False, fused=False), _params(dtype), decay=decay
    )
    params, _ = _run(optim.adamw(b1=0.8, b2=0.95, eps=1e-6, weight_decay=decay), _params(dtype))
    _close(params, expected, tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torch_over_many_steps(momentum):
    expected = _torch_run(lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=momentum), _params(torch.float64))
    params, state = _run(optim.sgd(momentum=momentum), _params(torch.float64))
    _close(params, expected, 1e-12)
    assert bool(state) == bool(momentum)


def test_lion_equals_its_pseudo_code():
    params, decay, b1, b2 = _params(torch.float64), 0.1, 0.85, 0.97
    expected = [leaf.clone() for leaf in tree.leaves(params)]
    moments = [torch.zeros_like(leaf) for leaf in expected]
    for i in range(25):
        for leaf, moment, grad in zip(expected, moments, tree.leaves(_grads(params, i)), strict=True):
            update = torch.sign(b1 * moment + (1 - b1) * grad)
            leaf -= 0.02 * (1 + i % 3) * (update + (decay if leaf.ndim == 2 else 0.0) * leaf)
            moment.copy_(b2 * moment + (1 - b2) * grad)
    params, _ = _run(optim.lion(b1=b1, b2=b2, weight_decay=decay), params)
    _close(params, expected, 1e-12)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_memory_order_of_a_gradient_does_not_matter(name):
    plain, _ = _run(OPTIMISERS[name](weight_decay=0.1), _params())
    transposed, _ = _run(OPTIMISERS[name](weight_decay=0.1), _params(), transposed=True)
    _close(transposed, tree.leaves(plain), 0.0)


@pytest.mark.parametrize("name", [name for name in OPTIMISERS if name != "schedule_free"])
def test_decay_by_rule_and_not_of_vectors(name):
    """With zero gradients only decay moves a leaf: by 1 - lr * rate a step."""
    rules = [(r"layers\.0\.norm", 0.5), (r"layers\.1\.w", 0.0)]
    params = _params(torch.float64)
    before, optimizer = tree.map(torch.clone, params), OPTIMISERS[name](weight_decay=0.2, decay=rules)
    state, lr = optimizer.init(params), torch.tensor(0.1, dtype=torch.float64)
    for _ in range(3):
        params, state = optimizer.update(tree.map(torch.zeros_like, params), state, params, lr)
    rates = {"layers.0.norm": 0.5, "layers.1.w": 0.0, "layers.1.norm": 0.0}
    for (path, leaf), old in zip(tree.items(params), tree.leaves(before), strict=True):
        torch.testing.assert_close(leaf, old * (1 - 0.1 * rates.get(path, 0.2)) ** 3, rtol=1e-12, atol=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_lr_by_rule_is_a_run_of_that_leaf_alone(name):
    """LoRA+ among them: B learns 16 times as fast as A."""
    together, _ = _run(OPTIMISERS[name](weight_decay=0.1, lr_scale=[(r"^lora\..*\.B$", 16.0), (r"layers\.0", 0.0)]), _params())
    usual, _ = _run(OPTIMISERS[name](weight_decay=0.1), _params())
    fast, _ = _run(OPTIMISERS[name](weight_decay=0.1), _params(), lr=lambda i: 16 * 0.02 * (1 + i % 3))
    assert torch.equal(together["lora"]["q"]["A"], usual["lora"]["q"]["A"])
    torch.testing.assert_close(together["lora"]["q"]["B"], fast["lora"]["q"]["B"], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(together["layers"][0]), tree.leaves(_params()["layers"][0]), strict=True))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_rules_that_match_nothing_are_refused_at_init(name):
    for options in ({"decay": [("nrom", 0.1)]}, {"lr_scale": [("nrom", 2.0)]}):
        with pytest.raises(ValueError, match="'nrom' matches no parameter; the nearest paths are .*norm"):
            OPTIMISERS[name](**options).init(_params())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_found_inf_leaves_everything_untouched_bit_for_bit(name, bad):
    optimizer = OPTIMISERS[name](weight_decay=0.1)
    params, state = _run(optimizer, _params(), 3)
    before = tree.map(torch.clone, {"params": params, "state": state})
    grads = tree.map(lambda leaf: torch.full_like(leaf, bad), params)
    params, state = optimizer.update(grads, state, params, torch.tensor(0.1), torch.tensor(1.0))
    for (path, leaf), old in zip(tree.items({"params": params, "state": state}), tree.leaves(before), strict=True):
        assert torch.equal(leaf, old), path
    # and the run goes on as if the step had not been
    grads = _grads(params, 7)
    params, state = optimizer.update(tree.map(torch.clone, grads), state, params, torch.tensor(0.1), torch.tensor(0.0))
    other, _ = optimizer.update(grads, before["state"], before["params"], torch.tensor(0.1))
    _close(params, tree.leaves(other), 0.0)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_updates_in_place(name):
    optimizer, params = OPTIMISERS[name](), _params()
    state = optimizer.init(params)
    places = [leaf.data_ptr() for leaf in tree.leaves({"params": params, "state": state})]
    for i in range(2):  # the first step of adopt only makes its moments
        params, state = optimizer.update(_grads(params, i), state, params, torch.tensor(0.1))
    assert [leaf.data_ptr() for leaf in tree.leaves({"params": params, "state": state})] == places
    assert not torch.equal(params["layers"][0]["w"], _params()["layers"][0]["w"])


def test_adamw_takes_float32_gradients_of_bfloat16_leaves():
    params, _ = _run(optim.adamw(), tree.map(lambda leaf: leaf.bfloat16(), _params()), 5, lr=lambda _: 0.1)
    state = optim.adamw().init(params)
    grads = tree.map(lambda leaf: torch.ones(leaf.shape), params)
    before = tree.map(torch.clone, params)
    optim.adamw().update(grads, state, params, torch.tensor(0.1))
    moved = before["layers"][0]["w"].float() - params["layers"][0]["w"].float()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1), rtol=0.1, atol=0)


def test_adamw_refuses_a_leaf_that_is_a_window_into_a_larger_tensor():
    with pytest.raises(ValueError, match="w is a view into a larger tensor; clone it"):
        optim.adamw().init({"w": torch.zeros(4, 8)[:, :4]})


def _factored(*, eps: float = 1e-30) -> optim.Optimizer:
    """Adafactor without its schedule of decays: second moments of a matrix by row and column, of a vector in full."""

    def start(leaf):
        if leaf.ndim < 2:
            return {"nu": torch.zeros_like(leaf)}
        return {"row": leaf.new_zeros(leaf.shape[0]), "column": leaf.new_zeros(leaf.shape[1])}

    def direction(grad, moments, param):
        square = grad.square() + eps
        if "nu" in moments:
            nu = 0.9 * moments["nu"] + 0.1 * square
            return grad * nu.rsqrt() + 0.01 * param, {"nu": nu}
        row, column = 0.9 * moments["row"] + 0.1 * square.mean(1), 0.9 * moments["column"] + 0.1 * square.mean(0)
        return grad * (row[:, None] * column / row.mean()).rsqrt() + 0.01 * param, {"row": row, "column": column}

    return optim.stepwise(start, direction, weight_decay=0.0, decay=(), lr_scale=())


def test_an_optimiser_is_a_pair_of_functions_on_one_leaf():
    params = _params(torch.float64)
    state = _factored().init(params)
    assert [path for path, _ in tree.items(state["nu"])] == ["layers.0.norm", "layers.1.norm"]
    assert state["row"]["layers"][0]["w"].shape == (6,) and state["column"]["lora"]["q"]["A"].shape == (4,)
    expected = {path: leaf.clone() for path, leaf in tree.items(params)}
    moved, state = _run(_factored(), params, steps=1, lr=lambda _: 0.5)
    grads = dict(tree.items(_grads(expected_tree := tree.from_items(expected.items()), 0)))
    for path, leaf in tree.items(moved):
        grad, square = grads[path], grads[path].square()
        row, column = 0.1 * square.mean(-1, keepdim=True), 0.1 * square.mean(0, keepdim=True)
        scale = (row * column / row.mean() if leaf.ndim == 2 else 0.1 * square).rsqrt()
        torch.testing.assert_close(leaf, expected[path] - 0.5 * (grad * scale + 0.01 * expected[path]))
    assert tree.map(lambda leaf: leaf.shape, expected_tree) == tree.map(lambda leaf: leaf.shape, moved)


def test_a_skipped_step_keeps_the_moments_of_any_optimiser():
    params = _params()
    before = tree.map(torch.clone, params)
    after, state = _run(_factored(), params, steps=2, found_inf=torch.ones(()))
    assert all(torch.equal(one, other) for one, other in zip(tree.leaves(before), tree.leaves(after), strict=True))
    assert all((leaf == 0).all() for leaf in tree.leaves(state))
