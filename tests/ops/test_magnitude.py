"""DoRA against autograd of its formula in float64, and against what PEFT computes."""

import pytest
import torch

from treetune.ops import lora_linear, magnitude

SCALE = 1.7


def parts(dropped, seed=0):
    """x, W, {"A", "B", "M"} and u, float64; u is x where nothing is dropped."""
    gen = torch.Generator().manual_seed(seed)
    x, w = torch.randn(7, 5, generator=gen, dtype=torch.float64), torch.randn(6, 5, generator=gen, dtype=torch.float64)
    ab = {name: torch.randn(*shape, generator=gen, dtype=torch.float64) for name, shape in (("A", (3, 5)), ("B", (6, 3)), ("M", (6,)))}
    kept = torch.rand(7, 5, generator=gen) > 0.4
    return x, w, ab, x * kept / 0.6 if dropped else x


def formula(x, w, ab, u):
    """PEFT's, with the norms as constants: W x + (m / n - 1) W u + m / n s B A u."""
    n = (w + SCALE * ab["B"] @ ab["A"]).norm(dim=1).detach()
    g = ab["M"] / n
    return x @ w.T + (g - 1) * (u @ w.T) + g * (SCALE * (u @ ab["A"].T) @ ab["B"].T)


@pytest.mark.parametrize("dropped", [False, True])
def test_values_and_gradients_are_those_of_the_formula(dropped):
    x, w, ab, u = parts(dropped)
    gen, results = torch.Generator().manual_seed(9), []
    out = torch.randn(7, 6, generator=gen, dtype=torch.float64)
    for run in ("ours", "theirs"):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, *ab.values())]
        own = dict(zip(ab, leaves[1:], strict=True))
        source = leaves[0] * (u / x).nan_to_num() if dropped else leaves[0]
        if run == "ours":
            (y,) = lora_linear.lora_linears(leaves[0], [w], [own], scale=SCALE, u=source if dropped else None)
        else:
            y = formula(leaves[0], w, own, source)
        (y * out).sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_known_norms_give_the_same_values():
    x, w, ab, _ = parts(False)
    known = {"A": ab["A"], "B": ab["B"], "G": ab["M"] / magnitude.norms(w, ab["A"], ab["B"], SCALE)}
    one, other = (lora_linear.lora_linears(x, [w], [pair], scale=SCALE)[0] for pair in (ab, known))
    assert torch.equal(one, other)


def test_projections_share_an_input_with_and_without_magnitudes():
    x, w, ab, _ = parts(False)
    plain = {"A": ab["A"], "B": ab["B"]}
    got = lora_linear.lora_linears(x, [w, 2 * w, w], [ab, plain, None], scale=SCALE)
    torch.testing.assert_close(got[0], formula(x, w, ab, x), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(got[1], x @ (2 * w + SCALE * plain["B"] @ plain["A"]).T, atol=1e-12, rtol=1e-12)
    assert torch.equal(got[2], x @ w.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_changes_nothing_and_small_lengths_are_not_lost(dtype):
    x, w, ab, _ = parts(False)
    x, w, ab = x.to(dtype), w.to(dtype), {"A": ab["A"].float(), "B": torch.zeros(6, 3)}
    fresh = ab | {"M": magnitude.norms(w, ab["A"], ab["B"], SCALE)}
    base, start = (lora_linear.lora_linears(x, [w], [pair], scale=SCALE)[0] for pair in (ab, fresh))
    assert torch.equal(start, base)
    more = magnitude.excess(w, fresh | {"M": fresh["M"] * (1 + 1e-3)}, SCALE).to(dtype).float()
    torch.testing.assert_close(more, torch.full((6,), 1e-3), rtol=0.01, atol=0)  # 1.001 is 1 in bfloat16
