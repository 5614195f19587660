import pytest
import torch

from treetune.ops import rope
from treetune.ops.rope import rope_ref


def _inv_freq(dim, dtype=torch.float32):
    return 1 / 10000 ** (torch.arange(0, dim, 2, dtype=dtype) / dim)


def _inputs(dtype, *, tokens=40, dim=16, seed=0):
    gen = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(tokens, heads, dim, generator=gen).to(dtype).requires_grad_() for heads in (6, 2))
    return q, k, torch.randint(0, 4000, (tokens,), generator=gen), _inv_freq(dim)


def test_gradcheck():
    q, k, positions, _ = _inputs(torch.float64, tokens=5, dim=6)
    assert torch.autograd.gradcheck(lambda q, k: rope.rope(q, k, positions, _inv_freq(6, torch.float64)), (q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, positions, inv_freq = _inputs(dtype)
    angles = positions.float()[:, None] * inv_freq
    emb = torch.cat([angles, angles], -1)[None]
    theirs = llama.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], emb.cos().to(dtype), emb.sin().to(dtype))
    tol = 1e-6 if dtype == torch.float32 else 2**-7  # one rounding more or less of numbers below 4
    for ours, peer in zip(rope.rope(q, k, positions, inv_freq), theirs, strict=True):
        torch.testing.assert_close(ours, peer[0].transpose(0, 1), rtol=tol, atol=tol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_float64(dtype, relative_error):
    q, k, positions, inv_freq = _inputs(dtype)
    dq, dk = torch.randn_like(q), torch.randn_like(k)

    def run(fn, q, k):
        out = fn(q, k, positions, inv_freq)
        return *out, *torch.autograd.grad(out, (q, k), (dq.to(q.dtype), dk.to(k.dtype)))

    exact = run(rope_ref, *(x.detach().double().requires_grad_() for x in (q, k)))
    for ours, plain, truth in zip(run(rope.rope, q, k), run(rope_ref, q, k), exact, strict=True):
        assert relative_error(ours, truth) <= 1.5 * relative_error(plain, truth) + 1e-7


def test_scores_depend_on_distance_alone():
    q, k, _, inv_freq = _inputs(torch.float64)
    near, far = (rope.rope(q, k, torch.arange(40) + shift, inv_freq.double()) for shift in (0, 123))
    for a, b in zip(
        torch.einsum("qd,kd->qk", near[0][:, 0], near[1][:, 0]), torch.einsum("qd,kd->qk", far[0][:, 0], far[1][:, 0]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_scale_frequencies_of_each_token_and_part_of_a_head(relative_error):
    q, k, positions, _ = _inputs(torch.float32)
    inv_freq = _inv_freq(12) * torch.linspace(0.5, 2, 40)[:, None]  # [T, 6]: 12 of 16 features turn
    dq, dk = torch.randn_like(q), torch.randn_like(k)

    def run(fn, q, k):
        out = fn(q, k, positions, inv_freq, scale=1.3)
        return *out, *torch.autograd.grad(out, (q, k), (dq.to(q.dtype), dk.to(k.dtype)))

    exact = run(rope_ref, *(x.detach().double().requires_grad_() for x in (q, k)))
    for ours, truth in zip(run(rope.rope, q, k), exact, strict=True):
        assert relative_error(ours, truth) <= 1e-6
    row = 17
    alone = rope.rope(q[row : row + 1], k[row : row + 1], positions[row : row + 1], inv_freq[row], scale=1.3)
    for ours, expected in zip(run(rope.rope, q, k), alone, strict=False):
        torch.testing.assert_close(ours[row], expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(run(rope.rope, q, k)[0][..., 12:], q[..., 12:], rtol=0, atol=0)


def test_keeps_nothing_of_its_own(saved_bytes):
    assert saved_bytes(rope.rope, *_inputs(torch.bfloat16)) == 0


def test_takes_slices_of_a_fused_projection():
    gen = torch.Generator().manual_seed(1)
    qkv = torch.randn(10, 4 * 8, generator=gen).requires_grad_()
    positions, inv_freq = torch.arange(10), _inv_freq(8)
    q, k = qkv[:, :16].view(10, 2, 8), qkv[:, 16:24].view(10, 1, 8)
    grads = [
        torch.autograd.grad(sum(x.square().sum() for x in fn(q, k, positions, inv_freq)), qkv, retain_graph=True)[0]
        for fn in (rope.rope, rope_ref)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inv_freq": torch.ones(9)}, "inv_freq"),
        ({"inv_freq": torch.ones(39, 8)}, "inv_freq"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "expected one T"),
        ({"k": torch.zeros(40, 2, 8)}, "one head size"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    inputs = dict(zip(("q", "k", "positions", "inv_freq"), _inputs(torch.float32), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        rope.rope(**inputs)
