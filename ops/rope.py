"""Rotary position embedding of queries and keys, rotate-half layout.

With a = position * inv_freq (float32), x = (x1, x2) the halves of a head and m a scale: y1 = m (x1 cos a - x2 sin a),
y2 = m (x2 cos a + x1 sin a). Of a head wider than 2 len(inv_freq) = r only the first r features turn; the others pass as they are.
The backward is m times the rotation by -a. Bytes moved: 2b per element of q and k each way. Saved for backward: positions, inv_freq.
Shapes: T tokens, H heads, K kv heads, d head dim, r <= d turned features (even); q [T, H, d], k [T, K, d], positions [T],
inv_freq [r/2], or [T, r/2] where tokens turn by frequencies of their own.
Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2104.09864, eq. 34 (half-split layout of GPT-NeoX).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from treetune.ops import backend
from treetune.ops.backend import tl


def _angles(positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    wide = backend.stat_dtype(inv_freq)
    return positions.to(wide)[:, None] * inv_freq.to(wide)  # [T, d/2]


def rope_ref(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain torch, differentiated by autograd: the twin that tests compare against."""
    angles, half = _angles(positions, inv_freq), inv_freq.shape[-1]
    cos, sin = scale * angles.cos()[:, None], scale * angles.sin()[:, None]  # [T, 1, r/2]

    def rotate(x):
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        x1, x2, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s, rest], -1)

    return rotate(q), rotate(k)


def _turns(positions: torch.Tensor, inv_freq: torch.Tensor, scale: float, sign: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scale * cos and scale * sign * sin [T, d/2]."""
    angles = _angles(positions, inv_freq)
    cos, sin = angles.cos(), angles.sin().mul_(sign)
    return (cos, sin) if scale == 1 else (cos.mul_(scale), sin.mul_(scale))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    cos, sin = torch.cat([cos, cos], -1).to(x.dtype), sin.to(x.dtype)  # [T, 1, d], [T, 1, d/2]
    rotated = x * cos
    rotated[..., :half].addcmul_(x[..., half:], sin, value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin)
    return rotated


def rotate_torch(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, scale: float = 1.0, sign: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated by sign * angle."""
    cos, sin = (x[:, None] for x in _turns(positions, inv_freq, scale, sign))
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


@backend.jit
def _rotate_heads(x, y, cos, sin, row, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):  # noqa: PLR0913
    half_index = tl.arange(0, HALF)[None, :]
    head_index = tl.arange(0, HEADS)[:, None]
    inside = (head_index < heads) & (half_index < half)
    index = (row * heads + head_index) * (2 * half) + half_index
    c = tl.load(cos + row * half + half_index, half_index < half, 0)
    s = tl.load(sin + row * half + half_index, half_index < half, 0)
    x1 = tl.load(x + index, inside, 0).to(tl.float32)
    x2 = tl.load(x + index + half, inside, 0).to(tl.float32)
    tl.store(y + index, x1 * c - x2 * s, inside)
    tl.store(y + index + half, x2 * c + x1 * s, inside)


@backend.jit
def _kernel(  # noqa: PLR0913
    q, k, q_out, k_out, cos, sin, q_heads, k_heads, half, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    _rotate_heads(q, q_out, cos, sin, row, q_heads, half, Q_HEADS, HALF)
    _rotate_heads(k, k_out, cos, sin, row, k_heads, half, K_HEADS, HALF)


def warps_of(heads: int, half: int) -> int:
    """Warps of a program that turns so many heads of a token, as tiles."""
    return 4 if heads * half <= 2048 else 8


def rotate_triton(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, scale: float = 1.0, sign: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated by sign * angle, one program per token; rounded once.

    cos and sin [T, d/2] come from torch: the hardware's fast ones are wrong at the angles of long documents.
    """
    q, k = q.contiguous(), k.contiguous()
    cos, sin = (x.float() for x in _turns(positions, inv_freq, scale, sign))
    rotated = torch.empty_like(q), torch.empty_like(k)
    heads, half = (q.shape[1], k.shape[1]), q.shape[2] // 2
    tiles = [1 << (n - 1).bit_length() for n in (*heads, half)]
    if q.shape[0]:
        launch = backend.launch(_kernel, (q.shape[0],))
        launch(q, k, *rotated, cos, sin, *heads, half, *tiles, num_warps=warps_of(tiles[0], tiles[2]))
    return rotated


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(q, k, positions, inv_freq, scale):
        return (rotate_triton if backend.use_triton(q) else rotate_torch)(q, k, positions, inv_freq, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[2:4])
        ctx.scale = inputs[4]

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        run = rotate_triton if backend.use_triton(dq) else rotate_torch
        return *run(dq, dk, *ctx.saved_tensors, scale=ctx.scale, sign=-1), None, None, None


def rope(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first r features of q [T, H, d] and k [T, K, d] by positions [T] * inv_freq [r/2] (or [T, r/2]), times scale.

    The results keep their shapes and dtypes. Angles are float32 (float64 when inv_freq is), whatever the dtype of q.
    Errors: ValueError when the shapes do not fit.
    """
    turned, dim = 2 * inv_freq.shape[-1], q.shape[-1]
    if turned > dim or inv_freq.shape[:-1] not in ((), q.shape[:1]) or k.shape[-1] != dim:
        raise ValueError(
            f"rope got heads of {dim} (q) and {k.shape[-1]} (k) features and inv_freq {tuple(inv_freq.shape)}: "
            f"expected one head size d and inv_freq [r/2], or [T, r/2], with r of at most d"
        )
    if positions.shape != q.shape[:1] or k.shape[0] != q.shape[0]:
        raise ValueError(f"rope got {q.shape[0]} queries, {k.shape[0]} keys and positions {tuple(positions.shape)}: expected one T")
    if turned == dim:
        return _Rope.apply(q, k, positions, inv_freq, scale)
    (q, q_rest), (k, k_rest) = (x.split([turned, dim - turned], -1) for x in (q, k))
    q, k = _Rope.apply(q, k, positions, inv_freq, scale)
    return torch.cat([q, q_rest], -1), torch.cat([k, k_rest], -1)
