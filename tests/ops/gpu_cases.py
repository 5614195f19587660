"""The ops with their references on one set of inputs each: what a GPU is compared by, in tests and in `benchmarks/gpu`.

A case draws its inputs on the host, so they are the same on every device; `measure` compares it with its reference in the same dtype and in
float64, forward and backward, and with itself.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import quant, quant_tables
from treetune.ops import (
    attention,
    clamped_swiglu,
    dequantise,
    fp8_linear,
    geglu,
    grouped_linear,
    linear_logprob,
    lora_linear,
    magnitude,
    noise,
    rms_norm,
    rope,
    routing,
    swiglu,
)

LOW, FULL = torch.bfloat16, torch.float32
FLOOR = 1e-5  # of errors in float32


class Draw(NamedTuple):
    """Inputs on a device in a dtype; `small` has sizes for an interpreter, with remainders all the same."""

    device: torch.device
    dtype: torch.dtype
    small: bool = False

    def size(self, full: int, small: int) -> int:
        return small if self.small else full

    def __call__(self, *shape: int, seed: int = 0, grad: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return values.to(self.device, dtype or self.dtype).requires_grad_(grad)


class Case(NamedTuple):
    """op and reference: leaves -> a tensor or several. Errors of the op are at most `slack` times those of the reference, plus `floor`.

    floor: in 16 bits; in float32 it is `FLOOR` at most.

    repeats: whether two runs are equal to the bit, gradients included.
    """

    op: Callable[..., Any]
    reference: Callable[..., Any]
    leaves: Callable[[Draw], list[Tensor]]
    dtypes: Sequence[torch.dtype] = (LOW, FULL)
    slack: float = 1.5
    floor: float = 1e-6
    repeats: bool = True


class Measured(NamedTuple):
    """Relative errors against float64 of the outputs, then of the gradients: the op's and its reference's; whether two runs were equal."""

    errors: list[float]
    plain: list[float]
    repeated: bool
    small: list[bool]  # vectors of few numbers, whose roundings average less

    def fits(self, case: Case, dtype: torch.dtype) -> bool:
        floor = case.floor if dtype == LOW else min(case.floor, FLOOR)
        pairs = zip(self.errors, self.plain, self.small, strict=True)
        return (self.repeated or not case.repeats) and all(a <= (2 if few else case.slack) * b + floor for a, b, few in pairs)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of `exact` (over 1 where exact is 0), in float64."""
    got, exact = got.detach().double(), exact.detach().double()
    return float((got - exact).norm() / (exact.norm() or 1.0))


def run(fn: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of what takes some, for one upstream gradient an output."""
    out = fn(*leaves)
    out = list(out) if isinstance(out, tuple | list) else [out]
    tracked = [leaf for leaf in leaves if leaf.requires_grad]
    if not tracked:
        return out
    upstream = [torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x).to(x.dtype) for x in out]
    return [*out, *torch.autograd.grad(out, tracked, upstream)]


def wide(leaf: Tensor) -> Tensor:
    """The leaf in float64, ids as they are."""
    return leaf.detach().double().requires_grad_(leaf.requires_grad) if leaf.is_floating_point() and leaf.element_size() > 1 else leaf


def measure(case: Case, draw: Draw) -> Measured:
    """The case on a device in a dtype."""
    leaves = case.leaves(draw)
    first, second = run(case.op, leaves), run(case.op, leaves)
    plain, exact = run(case.reference, leaves), run(case.reference, [wide(leaf) for leaf in leaves])
    errors, others = ([relative_error(x, truth) for x, truth in zip(side, exact, strict=True)] for side in (first, plain))
    return Measured(errors, others, all(map(torch.equal, first, second)), [x.ndim == 1 and x.numel() < 64 for x in exact])


def _rms_norm(once: bool) -> Case:
    options = {"eps": 1e-5, "once": once}
    return Case(
        partial(rms_norm.rms_norm, **options),
        partial(rms_norm.rms_norm_ref, **options),
        lambda draw: [draw(draw.size(1000, 9), draw.size(2049, 100)), draw(draw.size(2049, 100), seed=1)],
    )


def _rope(scale: float) -> Case:
    def of(fn):
        def call(q, k):
            positions = torch.arange(q.shape[0], device=q.device) * 200
            steps = torch.arange(0, q.shape[-1], 2, device=q.device) / q.shape[-1]
            return fn(q, k, positions, 1 / 10000**steps, scale=scale)

        return call

    def leaves(draw):
        rows, width = draw.size(500, 11), draw.size(128, 12)
        return [draw(rows, draw.size(12, 5), width), draw(rows, draw.size(3, 2), width, seed=1)]

    return Case(of(rope.rope), of(rope.rope_ref), leaves)


def _gated(draw: Draw) -> list[Tensor]:
    shape = draw.size(1000, 9), draw.size(3001, 257)
    return [draw(*shape), draw(*shape, seed=1)]


def _clamped() -> Case:
    sizes = {"alpha": 1.702, "limit": 2.0}
    return Case(
        partial(clamped_swiglu.clamped_swiglu, **sizes),
        partial(clamped_swiglu.clamped_swiglu_ref, **sizes),
        lambda draw: [draw(draw.size(1000, 9), draw.size(514, 258))],
    )


def _grouped(inner: int, rank: int) -> Case:
    """`torch._grouped_mm` and the Triton kernels: empty groups, one row alone, sizes that no tile divides."""

    def of(fn):
        def call(x, w, a, b):
            ends = torch.tensor([0, 300, 301, 301, 777, 777] if len(x) == 777 else [0, 30, 31, 31, 77, 77], device=x.device)
            return fn(x, w, ends.int(), {"A": a, "B": b}, scale=0.5)

        return call

    def leaves(draw):
        rows, width, outputs = draw.size(777, 77), draw.size(inner, 37), draw.size(192, 69)
        shapes = (rows, width), (6, outputs, width), (6, rank, width), (6, outputs, rank)
        return [draw(*shape, seed=i) for i, shape in enumerate(shapes)]

    return Case(of(grouped_linear.grouped_linear), of(grouped_linear.grouped_linear_ref), leaves)


def _routing() -> Case:
    def op(x, weights):
        rule = routing.route(_chosen(weights), 8)
        return routing.combine(routing.dispatch(x, rule, 2) * 2, weights, rule)

    def reference(x, weights):
        return (2 * x[:, None] * weights[:, :, None]).sum(1)

    return Case(op, reference, lambda draw: [draw(300, 64), draw(300, 2, seed=1)])


def _chosen(weights: Tensor) -> Tensor:
    first = torch.arange(weights.shape[0], device=weights.device) * 5 % 8
    return torch.stack([first, (first + 3) % 8], 1)


def _lora(fn: Callable) -> Callable:
    def call(x, w0, w1, a0, b0, a1, b1):
        return fn(x, [w0, w1], [{"A": a0, "B": b0}, {"A": a1, "B": b1}], scale=0.5)

    return call


def _lora_leaves(draw: Draw) -> list[Tensor]:
    rows, inner, outputs = draw.size(777, 33), draw.size(512, 40), (draw.size(320, 24), draw.size(64, 9))
    weights = [draw(size, inner, seed=i, grad=False) for i, size in enumerate(outputs, 1)]
    pairs = [draw(*shape, seed=5 + i) for i, size in enumerate(outputs) for shape in ((16, inner), (size, 16))]
    return [draw(rows, inner), *weights, *pairs]


def _magnitude() -> Case:
    def op(y, w, a, b, m):
        return magnitude.rescaled(y, w, {"A": a, "B": b, "M": m}, scale=0.5)

    def reference(y, w, a, b, m):
        wider = torch.promote_types(w.dtype, torch.float32)
        return (y.to(wider) * (m / (w.to(wider) + 0.5 * b @ a).norm(dim=1)).to(wider)).to(y.dtype)

    def leaves(draw):
        pairs = [draw(*shape, seed=i, grad=False, dtype=FULL) for i, shape in enumerate(((8, 256), (192, 8)), 2)]
        return [draw(100, 192), draw(192, 256, seed=1, grad=False), *pairs, draw(192, seed=4, dtype=FULL)]

    return Case(op, reference, leaves, floor=1e-2)  # in 16 bits m / n - 1 is rounded before it is used


def _logprob(options: dict[str, float], frozen: bool, fields: tuple[str, ...]) -> Case:
    want = tuple(name for name in fields if name in linear_logprob.WANT)

    def of(fn):
        def call(hidden, weight):
            stats = fn(hidden, weight, torch.arange(hidden.shape[0], device=hidden.device), want=want, **options)
            return tuple(getattr(stats, name) for name in fields)

        return call

    def leaves(draw):
        hidden = draw(draw.size(1500, 21), draw.size(128, 24))
        weight = draw(draw.size(5001, 150), hidden.shape[1], seed=1, grad=False).div(4)
        return [hidden, weight.requires_grad_(not frozen)]

    return Case(of(linear_logprob.linear_logprob), of(linear_logprob.linear_logprob_ref), leaves)


def batch_of(tokens: int, branches: bool) -> dict[str, Tensor]:
    """A stream of two documents, the second with two branches, on the host."""
    first, fork, other = 3 * tokens // 10, 7 * tokens // 10, 8 * tokens // 10
    bounds = torch.tensor([0, first, first, tokens], dtype=torch.int32)
    batch = {"cu_docs": bounds, "tokens": torch.zeros(tokens, dtype=torch.int64)}
    batch["positions"] = torch.cat([torch.arange(first), torch.arange(tokens - first)])
    if branches:
        batch["branch"], batch["start"] = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)
        for number, (lo, hi, leave) in enumerate([(fork, other, tokens // 10), (other, tokens, 2 * tokens // 5)], 1):
            batch["branch"][lo:hi], batch["start"][lo:hi] = number, leave
            batch["positions"][lo:hi] = torch.arange(leave, leave + hi - lo)
    return batch


def _attention(branches: bool, window: int | None, softcap: float | None, sinks: bool, width: int) -> Case:
    def op(q, k, v, logits=None):
        batch, plain = batch_of(q.shape[0], branches), softcap is None and not sinks
        plan = attention.plan(batch, windows=(None, 64, 200), plain=plain, device=q.device, dtype=q.dtype).of(window)
        return attention.attention(q, k, v, plan, softcap=softcap, sinks=logits)

    def reference(q, k, v, logits=None):
        here = {key: value.to(q.device) for key, value in batch_of(q.shape[0], branches).items()}
        return attention.attention_ref(q, k, v, here, window=window, softcap=softcap, sinks=logits)

    def leaves(draw):
        rows = draw.size(1000, 300)
        return [draw(rows, *size, seed=i) for i, size in enumerate(((6, 64), (2, 64), (2, width)))] + [draw(6, seed=3)] * sinks

    # FlashAttention's backward adds in the order in which blocks end.
    return Case(op, reference, leaves, floor=1e-3, repeats=False)


def _dequantise() -> Case:
    def of(fn):
        def call(like):
            weight = torch.randn(257, 512, generator=torch.Generator().manual_seed(0))
            leaf = quant.quantise(weight, quant.Scheme("nf4")).moved(lambda part: part.to(like.device))
            table = quant_tables.four_bits("nf4", like.device)
            return fn(leaf.codes, quant.absmax(leaf), table, leaf.shape, leaf.block, like.dtype)

        return call

    return Case(of(dequantise.four_bits), of(dequantise.four_bits_ref), lambda draw: [draw(1, grad=False)])


def _fp8() -> Case:
    def weight(x):
        codes, scale = fp8_linear.rounded_rows(torch.randn(192, x.shape[1], generator=torch.Generator().manual_seed(1)))
        return fp8_linear.Rows(codes.to(x.device), scale.to(x.device))

    def reference(x):
        w = weight(x)
        straight = x @ w.dense(x.dtype).T  # the gradient of x passes as if nothing were rounded
        return straight + (fp8_linear.linear_ref(x, w) - straight).detach()

    # CUDA's sums of a float8 product have fewer bits than float32 has.
    return Case(lambda x: fp8_linear.linears(x, [weight(x)])[0], reference, lambda draw: [draw(333, 256)], (LOW,), floor=2e-3)


def _noise(fn: Callable[..., Tensor], **options: Any) -> Case:
    return Case(
        lambda key: fn(key, 37, **options),
        lambda key: fn(key.cpu(), 37, **options).to(key.device),
        lambda draw: [noise.keys(3, torch.arange(500, device=draw.device), 7)],
        (FULL,),
    )


def _dropout() -> Case:
    def formula(x, key):
        kept = noise.uniform(key.cpu(), x.shape[1], stream=5).to(x.device) >= 0.3
        return torch.where(kept, x / 0.7, 0.0)

    def leaves(draw):
        rows = draw.size(500, 11)
        return [draw(rows, draw.size(1000, 300)), noise.keys(3, torch.arange(rows, device=draw.device), 7)]

    return Case(lambda x, key: noise.dropout(x, key, rate=0.3, stream=5), formula, leaves)


CASES: dict[str, Case] = {
    "rms_norm": _rms_norm(False),
    "rms_norm once": _rms_norm(True),
    "rope": _rope(1.0),
    "rope scaled": _rope(1.3),
    "swiglu": Case(swiglu.swiglu, swiglu.swiglu_ref, _gated),
    "geglu": Case(geglu.geglu, geglu.geglu_ref, _gated),
    "clamped_swiglu": _clamped(),
    "grouped_linear 256": _grouped(256, 8),
    "grouped_linear 100": _grouped(100, 3),
    "routing": _routing(),
    "lora_linears": Case(_lora(lora_linear.lora_linears), _lora(lora_linear.lora_linears_ref), _lora_leaves),
    "magnitude": _magnitude(),
    "dequantise": _dequantise(),
    "fp8_linear": _fp8(),
    "noise uniform": _noise(noise.uniform),
    "noise normal": _noise(noise.normal),
    "noise words": _noise(noise.words, first=3),
    "dropout": _dropout(),
}
LOGPROB: dict[str, Case] = {
    f"linear_logprob {'frozen' if frozen else 'trained'} {'+'.join(fields)}{' capped' * bool(options)}": _logprob(options, frozen, fields)
    for options in ({}, {"softcap": 30.0, "temperature": 0.7})
    for frozen in (True, False)
    for fields in (("logp",), ("logp", "entropy", "lse", "mean_logit"))
}
# Those of most models first.
ATTENTION: dict[str, Case] = {
    f"attention {'branches ' * branches}window {window} cap {cap} sinks {sinks} width {width}": _attention(
        branches, window, cap, sinks, width
    )
    for cap, sinks, width in ((None, False, 64), (2.0, False, 64), (None, True, 64), (None, False, 32), (2.0, True, 32))
    for branches in (False, True)
    for window in (None, 64, 200)
}
