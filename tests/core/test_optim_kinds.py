"""Adafactor, Muon, Adagrad, ADOPT, schedule-free AdamW and pages against other implementations, or the published formulas in float64."""

import math
from pathlib import Path

import pytest
import torch

from treetune.core import optim, optim_averages, optim_blocks, optim_matrices, optim_pages, registry, tree
from treetune.core.state import TrainState

STEPS = 50
MATRICES = {"layers": [{"q_proj": (64, 128), "down": (30, 20)}, {"q_proj": (128, 64), "down": (20, 20)}]}


def _params(shapes, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    return tree.map(lambda shape: torch.randn(shape, generator=gen, dtype=dtype), shapes)


def _grads(params, step):
    gen = torch.Generator().manual_seed(100 + step)
    return tree.map(lambda leaf: torch.randn(leaf.shape, generator=gen, dtype=leaf.dtype) * 10.0 ** (-(step % 4)), params)


def _rate(step):
    return 0.01 * (1 + step % 3)


def _ours(optimizer, params, steps=STEPS):
    state = optimizer.init(params)
    for step in range(steps):
        lr = torch.tensor(_rate(step), dtype=tree.leaves(params)[0].dtype)
        params, state = optimizer.update(_grads(params, step), state, params, lr)
    return params, state


def _theirs(make, params, decay=0.1):
    leaves = [torch.nn.Parameter(leaf.clone()) for leaf in tree.leaves(params)]
    oracle = make([{"params": [leaf], "weight_decay": decay if leaf.ndim >= 2 else 0.0} for leaf in leaves])
    for step in range(STEPS):
        for leaf, grad in zip(leaves, tree.leaves(_grads(params, step)), strict=True):
            leaf.grad = grad
        for group in oracle.param_groups:
            group["lr"] = _rate(step)
        oracle.step()
    return [leaf.detach() for leaf in leaves]


def _close(params, expected, tolerance):
    for (path, leaf), want in zip(tree.items(params), expected, strict=True):
        torch.testing.assert_close(leaf, want, rtol=tolerance, atol=tolerance, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("options", [{}, {"scale_parameter": True}, {"clip_threshold": 0.5, "decay_rate": -0.6}])
def test_adafactor_equals_that_of_transformers(options):
    theirs = pytest.importorskip("transformers.optimization").Adafactor
    params = _params(MATRICES | {"norm": (100,), "experts": (3, 8, 12)})
    usual = {"relative_step": False, "scale_parameter": False}
    expected = _theirs(lambda groups: theirs(groups, lr=1.0, **usual | options), params)
    params, _ = _ours(optim_matrices.adafactor(weight_decay=0.1, **options), params)
    _close(params, expected, 1e-5)


def test_adafactor_keeps_a_row_and_a_column_of_a_matrix():
    params = {"w": torch.zeros(512, 256), "experts": torch.zeros(4, 64, 32)}
    state = optim_matrices.adafactor().init(params)
    assert tree.bytes(state) == 4 * (512 + 256 + 4 * (64 + 32) + 2)


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_equals_that_of_torch(adjust):
    params = _params(MATRICES)
    expected = _theirs(lambda groups: torch.optim.Muon(groups, lr=1.0, momentum=0.95, adjust_lr_fn=adjust), params)
    params, _ = _ours(optim_matrices.muon(weight_decay=0.1, adjust=adjust), params)
    _close(params, expected, 1e-4)  # the iteration is in bfloat16, whose sums the order of operations moves


def test_muon_is_adamw_outside_of_matrices_of_layers():
    shapes = {"model": {"embed_tokens": (12, 8), "lm_head": (12, 8), "layers": [{"norm": (8,)}]}, "head": {"w": (3, 8)}}
    params, _ = _ours(optim_matrices.muon(weight_decay=0.1), _params(shapes))
    expected, _ = _ours(optim.adamw(weight_decay=0.1), _params(shapes))
    _close(params, tree.leaves(expected), 1e-5)
    assert optim_matrices.is_hidden("lora.layers.0.q_proj.A", torch.zeros(2, 4))
    assert optim_matrices.is_hidden("model.layers.3.mlp.experts.down_proj", torch.zeros(2, 4, 4))
    assert not optim_matrices.is_hidden("model.layers.3.conv1d", torch.zeros(4, 1, 4))


def test_a_stack_of_experts_is_orthogonalised_matrix_by_matrix():
    stack = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    together = optim_matrices.orthogonal(stack)
    for one, matrix in zip(together, stack, strict=True):
        torch.testing.assert_close(one, optim_matrices.orthogonal(matrix), rtol=0.05, atol=0.02)  # bfloat16
        singular = torch.linalg.svdvals(one.float())
        assert singular.min() > 0.5 and singular.max() < 1.3


def test_adagrad_equals_that_of_torch():
    params = _params(MATRICES | {"norm": (100,)}, torch.float64)
    expected = _theirs(lambda groups: torch.optim.Adagrad(groups, lr=1.0), params, decay=0.0)
    params, _ = _ours(optim_averages.adagrad(), params)
    _close(params, expected, 1e-12)


def test_adopt_equals_its_algorithm():
    b1, b2, eps, decay = 0.8, 0.99, 1e-6, 0.1
    params = _params({"w": (6, 4), "norm": (4,)}, torch.float64)
    expected = [leaf.clone() for leaf in tree.leaves(params)]
    mu, nu = ([torch.zeros_like(leaf) for leaf in expected] for _ in range(2))
    for step in range(STEPS):
        for i, (leaf, grad) in enumerate(zip(expected, tree.leaves(_grads(params, step)), strict=True)):
            rate = _rate(step) * (decay if leaf.ndim == 2 else 0.0)
            if step == 0:
                nu[i] = grad**2
                leaf.mul_(1 - rate)
                continue
            normalised = grad / torch.maximum(nu[i].sqrt(), torch.tensor(eps, dtype=torch.float64))
            mu[i] = b1 * mu[i] + (1 - b1) * normalised.clamp(-(step**0.25), step**0.25)
            leaf.copy_(leaf - rate * leaf - _rate(step) * mu[i])
            nu[i] = b2 * nu[i] + (1 - b2) * grad**2
    params, _ = _ours(optim_averages.adopt(b1=b1, b2=b2, eps=eps, weight_decay=decay), params)
    _close(params, expected, 1e-12)


def test_schedule_free_adamw_equals_its_algorithm():
    """x, y and z of algorithm 1, kept apart; c weights each step by the square of the largest learning rate so far."""
    b1, b2, eps, decay = 0.9, 0.99, 1e-8, 0.1
    params = _params({"w": (6, 4), "norm": (4,)}, torch.float64)
    x = [leaf.clone() for leaf in tree.leaves(params)]
    z, nu, largest, total = [leaf.clone() for leaf in x], [torch.zeros_like(leaf) for leaf in x], 0.0, 0.0
    for step in range(STEPS):
        largest = max(largest, _rate(step))
        total += largest**2
        share = largest**2 / total
        for i, grad in enumerate(tree.leaves(_grads(params, step))):
            y = (1 - b1) * z[i] + b1 * x[i]
            nu[i] = b2 * nu[i] + (1 - b2) * grad**2
            direction = grad / ((nu[i] / (1 - b2 ** (step + 1))).sqrt() + eps) + (decay if y.ndim == 2 else 0.0) * y
            z[i] = z[i] - _rate(step) * direction
            x[i] = (1 - share) * x[i] + share * z[i]
    optimizer = optim_averages.schedule_free_adamw(b1=b1, b2=b2, eps=eps, weight_decay=decay)
    params, state = _ours(optimizer, params)
    _close(params, [(1 - b1) * one + b1 * other for one, other in zip(z, x, strict=True)], 1e-7)  # learning rates squared in float32
    shown = optimizer.shown(TrainState(params, {}, state, {}, torch.tensor(STEPS)))
    _close(shown.params, x, 1e-7)
    assert not any(torch.equal(one, two) for one, two in zip(tree.leaves(shown.params), tree.leaves(params), strict=True))


def test_schedule_free_weights_at_a_learning_rate_of_0_stay():
    params = _params({"w": (6, 4)})
    optimizer, before = optim_averages.schedule_free_adamw(), params["w"].clone()
    state = optimizer.init(params)
    params, state = optimizer.update(_grads(params, 0), state, params, torch.tensor(0.0))
    assert torch.equal(params["w"], before) and math.isclose(float(state["count"]["w"]), 1)


def test_other_optimisers_show_the_weights_that_train():
    state = TrainState({"w": torch.ones(2)}, {}, {}, {}, torch.tensor(0))
    assert optim.adamw().shown(state) is state


PAGED = {
    "adamw": optim.adamw,
    "lion": optim.lion,
    "adamw_8bit": optim_blocks.adamw_8bit,
    "lion_8bit": optim_blocks.lion_8bit,
    "adafactor": optim_matrices.adafactor,
}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", PAGED)
def test_pages_change_no_number(name, copied, monkeypatch):
    """On a CPU nothing is copied; where moments are copied to a device and back, they come to the same."""
    copies = []
    if copied:
        monkeypatch.setattr(optim_pages, "_copy", lambda state, device: copies.append(state) or state.clone())
    shapes = {"layers": [{"w": (64, 80), "norm": (7,)}]}
    ends = [_ours(PAGED[name](weight_decay=0.1, paged=paged), _params(shapes), 5) for paged in (False, True)]
    flat = [tree.leaves({"params": params, "state": state}) for params, state in ends]
    assert all(torch.equal(one, two) for one, two in zip(*flat, strict=True))
    assert bool(copies) == copied


def _documented():
    """{name: bytes of a weight} of the table in docs/training.md, without those whose state is elsewhere."""
    rows = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8").partition("## Optimisers")[2].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("| `")]
    return {name.strip("` "): size for names, size, *_ in cells for name in names.split(",")}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", registry.OPTIMIZERS)
def test_the_documented_bytes_of_a_weight_are_those_of_its_state(name):
    said, params = _documented()[name], {"layers": [{"w": torch.zeros(4096, 4096)}]}
    measured = tree.bytes(registry.bind(registry.OPTIMIZERS[name])().init(params)) / 4096**2
    if "paged" in name:
        assert said == "0 on the GPU"
    else:
        assert float(said.partition(",")[0]) == pytest.approx(measured, abs=0.005)


def test_wrong_parameters_are_refused():
    with pytest.raises(ValueError, match="decay_rate below 0"):
        optim_matrices.adafactor(decay_rate=0.5)
    with pytest.raises(ValueError, match="match_rms_adamw or original, got 'none'"):
        optim_matrices.muon(adjust="none")
    with pytest.raises(ValueError, match="adam_beta1 between 0 and 1, got 0.0"):
        optim_averages.schedule_free_adamw(b1=0.0)
