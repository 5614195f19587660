"""Ops of treetune against plain torch and Liger's kernels where installed: milliseconds of a forward and backward pass."""

import traceback
from collections.abc import Callable
from importlib import import_module

import device
import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.ops import attention, linear_logprob, lora_linear, rms_norm, rope, swiglu

TOKENS, DOCUMENT = (32, 16) if device.DRY else (8192, 2048)


def draw(*shape: int, grad: bool = True) -> Tensor:
    shape = tuple(min(size, 32) for size in shape) if device.DRY else shape
    return torch.randn(shape, dtype=device.DTYPE, device=device.DEVICE).div_(8).requires_grad_(grad)


def timed(fn: Callable[..., Tensor], leaves: list[Tensor]) -> dict[str, float]:
    """Milliseconds of fn and its backward pass, and the peak of memory above what was there."""
    tracked = [leaf for leaf in leaves if leaf.requires_grad]
    out = fn(*leaves)
    upstream = torch.ones_like(out)
    del out
    device.free()
    before = 0 if device.DRY else torch.cuda.memory_allocated() / 2**30
    spent = device.milliseconds(lambda: torch.autograd.grad(fn(*leaves), tracked, upstream))
    return {"ms": round(spent, 4), "peak_gib": round(harness.peak_gib() - before, 3)}


def compare(name: str, leaves: list[Tensor], **sides: Callable[..., Tensor]) -> None:
    """Report all sides on the same inputs; one that raises has its error in place of numbers."""
    times = {}
    for side, fn in sides.items():
        try:
            times[side] = timed(fn, leaves)
        except Exception:
            times[side] = traceback.format_exc().strip().splitlines()[-1][:300]
    device.report(name, **times)


def liger(module: str, name: str) -> Callable[..., Tensor]:
    """A function of Liger's ops, called through `apply`; ImportError in the call where it is missing."""

    def call(*args):
        if device.DRY:
            raise ImportError("a dry run")
        out = getattr(import_module(f"liger_kernel.ops.{module}"), name).apply(*args)
        return out[0] if isinstance(out, tuple) else out

    return call


def ceilings() -> None:
    """What the device reaches on a large product and on a copy: what all else is to be seen against."""
    size, count = (64, 1 << 12) if device.DRY else (8192, 1 << 31)
    a, b = (torch.randn(size, size, dtype=device.DTYPE, device=device.DEVICE) for _ in range(2))
    product = device.milliseconds(lambda: a @ b)
    source = torch.zeros(count, dtype=torch.uint8, device=device.DEVICE)
    target = torch.empty_like(source)
    copied = device.milliseconds(lambda: target.copy_(source))
    device.report("ceilings", tflops=2 * size**3 / product / 1e9, copy_tb_per_s=2 * count / copied / 1e9, machine=harness.machine())


def heads() -> None:
    fused = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    for width, vocabulary, frozen in ((896, 151936, False), (2048, 151936, False), (4096, 128256, False), (4096, 128256, True)):
        hidden, weight = draw(TOKENS, width), draw(vocabulary, width, grad=not frozen)
        targets = torch.arange(TOKENS, device=device.DEVICE) % weight.shape[0]
        compare(
            f"head {width} x {vocabulary} {'frozen' if frozen else 'trained'}",
            [hidden, weight],
            treetune=lambda h, w, y=targets: -linear_logprob.linear_logprob(h, w, y, want=("top1",)).logp.mean(),
            torch=lambda h, w, y=targets: F.cross_entropy((h @ w.T).float(), y),
            liger=lambda h, w, y=targets: fused(h, w, y),
        )


def rows() -> None:
    x, scale = draw(TOKENS, 4096), draw(4096)
    norm = liger("rms_norm", "LigerRMSNormFunction")
    compare(
        "rms_norm 4096", [x, scale],
        treetune=lambda x, s: rms_norm.rms_norm(x, s, eps=1e-5), torch=lambda x, s: F.rms_norm(x, s.shape, s, 1e-5),
        liger=lambda x, s: norm(x, s, 1e-5),
    )  # fmt: skip
    unit = liger("swiglu", "LigerSiLUMulFunction")
    compare("swiglu 14336", [draw(TOKENS, 14336), draw(TOKENS, 14336)], treetune=swiglu.swiglu, torch=swiglu.swiglu_ref, liger=unit)
    q, k = draw(TOKENS, 32, 128), draw(TOKENS, 8, 128)
    turns = torch.arange(TOKENS, device=device.DEVICE), torch.ones(q.shape[-1] // 2, device=device.DEVICE)
    compare(
        "rope 32 + 8 heads of 128", [q, k],
        treetune=lambda q, k: torch.cat(rope.rope(q, k, *turns), 1), torch=lambda q, k: torch.cat(rope.rope_ref(q, k, *turns), 1),
    )  # fmt: skip


def layers() -> None:
    x, w, a, b = draw(TOKENS, 4096), draw(14336, 4096, grad=False), draw(16, 4096), draw(14336, 16)
    sides = {"treetune": lora_linear.lora_linears, "torch": lora_linear.lora_linears_ref}
    compare("lora linear 4096 -> 14336", [x, w, a, b], **{side: _adapted(fn) for side, fn in sides.items()})
    q, k, v = draw(TOKENS, 32, 128), draw(TOKENS, 8, 128), draw(TOKENS, 8, 128)
    bounds = torch.arange(0, TOKENS + 1, DOCUMENT, dtype=torch.int32)
    batch = {"cu_docs": bounds, "tokens": torch.zeros(TOKENS, dtype=torch.int64)}
    plan = attention.plan(batch, device=device.DEVICE, dtype=device.DTYPE)

    def rows_of_documents(q, k, v):
        parts = [x.view(-1, DOCUMENT, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)

    compare(
        "attention of documents of 2048", [q, k, v], treetune=lambda q, k, v: attention.attention(q, k, v, plan), torch=rows_of_documents
    )
    half = TOKENS // 2
    branch = torch.cat([torch.zeros(half), torch.arange(half) // (half // 8) + 1]).int()
    batch = {"cu_docs": torch.tensor([0, TOKENS], dtype=torch.int32), "tokens": batch["tokens"], "branch": branch}
    batch["start"] = torch.where(branch > 0, half, 0).int()
    batch["positions"] = torch.cat([torch.arange(half), half + torch.arange(half) % (half // 8)])
    tree = attention.plan(batch, device=device.DEVICE, dtype=device.DTYPE)
    compare("attention of a prompt with 8 branches", [q, k, v], treetune=lambda q, k, v: attention.attention(q, k, v, tree))


def grouped_heads() -> None:
    """Whether a varlen_attn without `enable_gqa`, for which `attention` repeats keys and values, takes fewer heads of them all the same."""
    varlen, names = attention._varlen()
    if device.DRY or varlen is None or "enable_gqa" in names:
        reason = "a dry run" if device.DRY else "this torch has none" if varlen is None else "it has enable_gqa"
        device.report("varlen_attn with grouped heads", skipped=reason)
        return
    leaves = [draw(TOKENS, 32, 128), draw(TOKENS, 8, 128), draw(TOKENS, 8, 128)]
    bounds = torch.arange(0, TOKENS + 1, DOCUMENT, dtype=torch.int32, device=device.DEVICE)
    causal = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}

    def plain(q, k, v):
        return varlen(q, k, v, bounds, bounds, DOCUMENT, DOCUMENT, **causal)

    def repeated(q, k, v):
        return plain(q, *(x.repeat_interleave(4, 1) for x in (k, v)))

    compare("varlen_attn with grouped heads", leaves, repeated=repeated, grouped=plain)
    sides = [(out := fn(*leaves), *torch.autograd.grad(out, leaves, torch.ones_like(out))) for fn in (repeated, plain)]
    largest = [float((a - b).abs().max()) for a, b in zip(*sides, strict=True)]
    device.report("varlen_attn with grouped heads: largest differences of output and gradients", largest=largest)


def _adapted(fn: Callable) -> Callable[..., Tensor]:
    return lambda x, w, a, b: fn(x, [w], [{"A": a, "B": b}], scale=2.0)[0]


def main() -> None:
    for group in (ceilings, heads, rows, layers, grouped_heads):
        try:
            group()
        except Exception:
            device.report(group.__name__, ok=False, error=traceback.format_exc().strip().splitlines()[-8:])


if __name__ == "__main__":
    main()
