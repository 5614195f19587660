"""GaLore and APOLLO against their algorithms, written out in float64, over 50 steps with several projections."""

import math

import pytest
import torch

from treetune.core import ckpt, loss_scale, optim, optim_blocks, optim_projections, tree
from treetune.core.optim_projections import Shape
from treetune.core.state import TrainState

STEPS, GAP, B1, B2, EPS, DECAY = 50, 7, 0.8, 0.95, 1e-8, 0.1
SHAPES = {
    "embed_tokens": (12, 10),
    "layers": [{"wide": (6, 14), "tall": (15, 7), "experts": {"up": (3, 8, 12)}, "small": (3, 9), "norm": (9,)}],
}
ADAM = {"b1": B1, "b2": B2, "eps": EPS, "weight_decay": DECAY}


def _params(dtype=torch.float64, shapes=SHAPES):
    gen = torch.Generator().manual_seed(0)
    return tree.map(lambda shape: torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype), shapes)


def _grads(params, step):
    gen = torch.Generator().manual_seed(100 + step)
    return tree.map(
        lambda leaf: (torch.randn(leaf.shape, generator=gen, dtype=torch.float64) * 4.0 ** (-(step % 3))).to(leaf.dtype), params
    )


def _rate(step):
    return 0.01 * (1 + step % 3)


def _ours(optimizer, params, steps=STEPS, start=0, state=None):
    state = optimizer.init(params) if state is None else state
    for step in range(start, start + steps):
        lr = torch.tensor(_rate(step), dtype=tree.leaves(params)[0].dtype)
        params, state = optimizer.update(_grads(params, step), state, params, lr)
    return params, state


class Adam:
    """Adam's step without a learning rate, and the correction of its bias."""

    def __init__(self):
        self.m = self.v = self.t = 0

    def step(self, g):
        self.t += 1
        self.m, self.v = B1 * self.m + (1 - B1) * g, B2 * self.v + (1 - B2) * g * g
        return (self.m / (1 - B1**self.t)) / ((self.v / (1 - B2**self.t)).sqrt() + EPS)


def _oracle(params, projected):
    """The weights after all steps: `projected(path, matrix, number of the expert) -> step(gradient, number of the step)`."""
    ends = []
    for index, (path, leaf) in enumerate(tree.items(params)):
        matrices = [one.clone() for one in leaf] if leaf.ndim == 3 else [leaf.clone()]
        small = path.endswith(("embed_tokens", "small", "norm"))
        steps = [Adam().step if small else projected(path, one, i) for i, one in enumerate(matrices)]
        for step in range(STEPS):
            grad = tree.leaves(_grads(params, step))[index]
            for i, one in enumerate(matrices):
                own = grad[i] if leaf.ndim == 3 else grad
                rate = _rate(step)
                moved = steps[i](own) if small else steps[i](own, step)
                matrices[i] = one * (1 - rate * (DECAY if leaf.ndim > 1 else 0)) - rate * moved
        ends.append(torch.stack(matrices) if leaf.ndim == 3 else matrices[0])
    return ends


def _close(params, expected, tolerance):
    for (path, leaf), want in zip(tree.items(params), expected, strict=True):
        torch.testing.assert_close(
            leaf, want, rtol=tolerance, atol=tolerance, msg=lambda text, path=path: f"{path}: {text}", check_dtype=False
        )


def _by_rows(m, n, proj_type):
    return {"std": m < n, "reverse_std": m >= n, "left": True, "right": False}[proj_type]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_galore_equals_its_algorithm(proj_type):
    rank, scale = 4, 0.25

    def projected(path, matrix, number):
        adam, kept, rows = Adam(), {}, _by_rows(*matrix.shape, proj_type)

        def step(g, t):
            if t % GAP == 0:
                u, _, vh = torch.linalg.svd(g)
                directions = [u[:, i] if rows else vh[i] for i in range(rank)]
                kept["p"] = torch.stack([one * one[one.abs().argmax()].sign() for one in directions])
            p = kept["p"]
            return scale * (p.T @ adam.step(p @ g) if rows else adam.step(g @ p.T) @ p)

        return step

    params = _params()
    expected = _oracle(params, projected)
    optimizer = optim_projections.galore_adamw(rank=rank, scale=scale, update_proj_gap=GAP, proj_type=proj_type, **ADAM)
    params, state = _ours(optimizer, params)
    _close(params, expected, 1e-6)  # learning rates are float32 in the state's bias correction
    assert int(state["projection"]["updates"]) == STEPS


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_apollo_equals_its_algorithm(scale_type):
    rank, scale, seed = 4, 2.0, 11

    def projected(path, matrix, number):
        adam, (m, n), before = Adam(), matrix.shape, {}

        def step(g, t):
            p = optim_projections.random_basis(seed, path, torch.tensor(t // GAP), (rank, min(m, n))).double()
            low = p @ g if m < n else g @ p.T
            correction = math.sqrt(1 - B2 ** (t + 1)) / (1 - B1 ** (t + 1))
            moved = adam.step(low) / correction
            if scale_type == "tensor":
                scaled = g * moved.norm() / (low.norm() + 1e-8)
            else:
                rows = [moved[:, j].norm() / (low[:, j].norm() + 1e-8) for j in range(n)] if m < n else []
                columns = [moved[i].norm() / (low[i].norm() + 1e-8) for i in range(m)] if m >= n else []
                scaled = g * torch.stack(rows) if rows else g * torch.stack(columns)[:, None]
            norm = scaled.norm()
            if before and norm / (before["norm"] + 1e-8) > 1.01:
                scaled = scaled * 1.01 / (norm / (before["norm"] + 1e-8))
            before["norm"] = scaled.norm()
            return math.sqrt(scale) * correction * scaled

        return step

    params = _params()
    expected = _oracle(params, projected)
    optimizer = optim_projections.apollo_adamw(rank=rank, scale=scale, update_proj_gap=GAP, scale_type=scale_type, seed=seed, **ADAM)
    params, _ = _ours(optimizer, params)
    _close(params, expected, 1e-6)


def test_apollo_mini_is_apollo_of_rank_1_by_tensor():
    ends = [
        _ours(optim_projections.apollo_mini(update_proj_gap=GAP, seed=3, **ADAM), _params())[0],
        _ours(optim_projections.apollo_adamw(rank=1, scale=128.0, scale_type="tensor", update_proj_gap=GAP, seed=3, **ADAM), _params())[0],
    ]
    assert all(torch.equal(one, two) for one, two in zip(*map(tree.leaves, ends), strict=True))


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("shape", [(9, 20), (20, 9)])
def test_a_basis_is_orthonormal_and_holds_the_most_of_a_gradient(shape, rows):
    grad = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    shape = Shape(5, rows)
    p = optim_projections.basis(grad, shape)
    torch.testing.assert_close(p @ p.mT, torch.eye(5).expand(2, 5, 5), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        shape.apply(grad, p).square().sum((-2, -1)), torch.linalg.svdvals(grad)[:, :5].square().sum(-1), rtol=1e-5, atol=1e-5
    )


def test_random_bases_are_normal_by_leaf_number_and_seed():
    first = optim_projections.random_basis(0, "layers.0.w", torch.tensor(0), (64, 512))
    assert abs(first.mean()) < 5 / 8 / math.sqrt(first.numel()) and first.square().mean().item() * 64 == pytest.approx(
        1, abs=5 * math.sqrt(2 / first.numel())
    )
    assert (first.abs() * 8).amax() > 3.5
    others = [(0, "layers.1.w", 0), (0, "layers.0.w", 1), (1, "layers.0.w", 0)]
    assert not any(
        torch.equal(first, optim_projections.random_basis(seed, path, torch.tensor(number), (64, 512))) for seed, path, number in others
    )


MADE = {
    "galore_adamw": optim_projections.galore_adamw, "galore_adamw_8bit": optim_projections.galore_adamw_8bit,
    "apollo_adamw": optim_projections.apollo_adamw,
}  # fmt: skip
LARGE = {"layers": [{"w": (96, 160), "norm": (96,)}]}


def test_the_moments_of_8_bits_are_those_of_adamw_8bit_of_the_projected_gradient():
    """Before a second projection, GaLore is AdamW along R: its codes are those of adamw_8bit on R itself."""
    params, rank = _params(torch.float32, LARGE), 64
    p = optim_projections.basis(_grads(params, 0)["layers"][0]["w"], Shape(rank, True))
    low = {"low": torch.zeros(rank, 160)}
    inner = optim_blocks.adamw_8bit()
    along = inner.init(low)
    optimizer = optim_projections.galore_adamw_8bit(rank=rank)
    state = optimizer.init(params)
    for step in range(5):
        grads = _grads(params, step)
        inner.update({"low": p @ grads["layers"][0]["w"]}, along, low, torch.tensor(0.01))
        params, state = optimizer.update(grads, state, params, torch.tensor(0.01))
    for name in ("mu", "nu", "mu_absmax", "nu_absmax"):
        assert torch.equal(state[name]["layers"][0]["w"].view(-1), along[name]["low"].view(-1)), name
    assert state["mu"]["layers"][0]["w"].dtype == torch.uint8


@pytest.mark.parametrize("name", MADE)
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(name, tmp_path):
    """Across a projection, which a checkpoint at step 5 of 7 has before it."""
    optimizer = MADE[name](rank=32, update_proj_gap=GAP, weight_decay=DECAY)
    params, state = _ours(optimizer, _params(torch.float32, LARGE), 5)
    path = ckpt.save(tmp_path, TrainState(params, {}, state, {}, torch.tensor(5)), {})
    fresh = tree.map(torch.zeros_like, params)
    loaded, _ = ckpt.load(path, TrainState(fresh, {}, optimizer.init(fresh), {}, torch.tensor(0)))
    ends = [_ours(optimizer, *pair, start=5, state=own) for *pair, own in ((params, 5, state), (loaded.params, 5, loaded.opt))]
    for one, two in zip(*(tree.leaves({"p": p, "s": s}) for p, s in ends), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


@pytest.mark.parametrize("name", MADE)
def test_a_first_step_that_is_skipped_leaves_the_projection_to_the_next(name):
    """As with float16, whose first steps overflow."""
    optimizer = loss_scale.scaled(MADE[name](rank=32, weight_decay=DECAY))
    ends = []
    for skipped in (True, False):
        params = _params(torch.float32, LARGE)
        state = optimizer.init(params)
        if skipped:
            bad = tree.map(lambda leaf: torch.full_like(leaf, math.nan), params)
            params, state = optimizer.update(bad, state, params, torch.tensor(0.01), torch.tensor(1.0))
        for step in range(3):
            params, state = optimizer.update(_grads(params, step), state, params, torch.tensor(0.01), torch.tensor(0.0))
        ends.append(params)
    assert all(torch.equal(one, two) for one, two in zip(*map(tree.leaves, ends), strict=True))
    assert not torch.equal(ends[0]["layers"][0]["w"], _params(torch.float32, LARGE)["layers"][0]["w"])


BYTES = {
    "galore_adamw": 4 * (2 * 32 * 160 + 32 * 96), "galore_adamw_8bit": 2 * (32 * 160 + 4 * 32 * 160 // 256) + 4 * 32 * 96,
    "apollo_adamw": 4 * (2 * 32 * 160 + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_a_state(name):
    params = {"layers": [{"w": torch.zeros(96, 160)}]}
    counts = 4 + (8 if name.startswith("galore") else 0)
    assert tree.bytes(MADE[name](rank=32).init(params)) == BYTES[name] + counts


def test_what_is_not_projected_has_adamw():
    shapes = {"embed_tokens": (12, 10), "layers": [{"small": (3, 9), "norm": (9,)}]}
    large = shapes | {"layers": [*shapes["layers"], {"w": (12, 10)}]}
    for make in (optim_projections.galore_adamw, optim_projections.apollo_adamw):
        ours, _ = _ours(make(rank=4, **ADAM), _params(shapes=large))
        plain, _ = _ours(optim.adamw(**ADAM), _params(shapes=large))
        for (path, one), two in zip(tree.items(ours), tree.leaves(plain), strict=True):
            assert torch.allclose(one, two, rtol=1e-6) == (path != "layers.1.w"), path


@pytest.mark.parametrize("name", MADE)
def test_ranks_that_project_nothing_and_wrong_parameters_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} projects matrices of layers whose sides are above rank 96"):
        MADE[name](rank=96).init(_params(torch.float32, LARGE))
    with pytest.raises(ValueError, match="rank and update_proj_gap from 1 and scale above 0, got 4, 0 and"):
        MADE[name](rank=4, update_proj_gap=0)
    wrong, words = (
        ({"scale_type": "row"}, "channel or tensor, got 'row'")
        if name == "apollo_adamw"
        else ({"proj_type": "full"}, "left, right, got 'full'")
    )
    with pytest.raises(ValueError, match=words):
        MADE[name](**wrong)
