"""Arithmetic with the values of its limits where plain floats give nan: 0 times inf is 0, and equal infinities differ by 0.

Log-probs of banned tokens are -inf and ratios of far-off policies overflow, both by right; a token that a loss clips or leaves out must
then have a gradient of exactly 0, not of 0 times inf. All elementwise, any shape; a nan that goes in comes out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def minus(x: Tensor, y: Tensor) -> Tensor:
    """x - y, and 0 without a gradient where both are the same infinity: what both rule out has not moved."""
    same = (x == y) & x.isinf()
    return torch.where(same, 0.0, x) - torch.where(same, 0.0, y)


def capped(x: Tensor) -> Tensor:
    """x with 1e30 in place of inf, for sums that may also hold -inf: what is ruled out then rules out the sum."""
    return torch.where(x == torch.inf, 1e30, x)


def times(x: Tensor | float, y: Tensor) -> Tensor:
    """x y, and 0 without a gradient where one is 0 and the other infinite."""
    if not isinstance(x, Tensor):
        if x != 0 and math.isfinite(x):
            return x * y
        x = torch.full_like(y, x)
    # Replaced before the product: a `where` around it would give 0 too, but multiply its gradient of 0 by the infinite factor.
    void = ((x == 0) & y.isinf()) | ((y == 0) & x.isinf())
    return torch.where(void, 0.0, x) * torch.where(void, 0.0, y)


def exp(x: Tensor) -> Tensor:
    """e^x, whose gradient is exactly 0 where that of the result is, also where e^x overflows."""
    return _Exp.apply(x)


def expm1(x: Tensor) -> Tensor:
    """e^x - 1, with the gradient of `exp`."""
    return _Expm1.apply(x)


def excess(x: Tensor) -> Tensor:
    """e^x - 1 - x, never below 0, with inf for x of inf or -inf; its gradient e^x - 1 is one product, so that it is never inf - inf."""
    return _Excess.apply(x)


def square(x: Tensor) -> Tensor:
    """x^2, with the gradient of `exp`."""
    return _Square.apply(x)


def logsigmoid(x: Tensor) -> Tensor:
    """log of the logistic function of x, with the gradient of `exp`."""
    return _LogSigmoid.apply(x)


def _chain(upstream: Tensor, slope: Tensor) -> Tensor:
    """Their product, 0 where one is exactly 0: what a later mask leaves out stays out whatever stands there, nan included."""
    void = ((upstream == 0) & ~slope.isfinite()) | ((slope == 0) & upstream.isinf())
    return torch.where(void, 0.0, torch.where(void, 0.0, upstream) * torch.where(void, 0.0, slope))


# Functions of their own, because autograd's backward passes of exp, expm1 and square multiply an upstream gradient of exactly 0, which a
# clip or a mask left, by a slope that has overflowed: 0 times inf is nan, and one token would end the run.
class _Exp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, upstream):
        return _chain(upstream, ctx.saved_tensors[0])


class _Expm1(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.expm1()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        return _chain(upstream, ctx.saved_tensors[0].exp())


class _Excess(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.expm1() - x.clamp(max=torch.finfo(x.dtype).max)  # inf less a finite number stays inf; inf - inf would be nan

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        return _chain(upstream, ctx.saved_tensors[0].expm1())


class _Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        return _chain(upstream, 2 * ctx.saved_tensors[0])


class _LogSigmoid(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return F.logsigmoid(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        return _chain(upstream, torch.sigmoid(-ctx.saved_tensors[0]))
