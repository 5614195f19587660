"""Optimisers whose moments are kept in 8 or 4 bits, with one float32 maximum for a block of numbers.

x = table[code] * absmax of its block. adamw_8bit and lion_8bit: the blocks and tables of bitsandbytes 0.50, to the bit; adamw_4bit and
adamw_fp8: those of torchao 0.18. A moment is dense only while its leaf is updated, CHUNK numbers at a time. Leaves of fewer than SMALLEST
numbers (norms, biases, small adapters) keep float32 moments, as in both libraries.
Source: Dettmers et al., arXiv 2110.02861 (8 bits); Li et al., arXiv 2309.01507 (4 bits).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from treetune.core import quant, quant_tables, shard
from treetune.core.optim import LeafRules, Moments, Optimizer, Rate, Rule, leafwise

SMALLEST = 4096
CHUNK = 2**22  # numbers of a leaf that are dense at once; a multiple of every block
TINY = 1e-12  # what torchao divides a block of zeros by
SCALE = "_absmax"  # behind the name of a moment: its maxima

Signs = dict[str, bool]  # moment -> whether it has negative numbers, too
Numbers = dict[str, Tensor]  # moment -> its numbers [n]
Inner = Callable[[Tensor, Numbers, Tensor, Tensor, Rate], tuple[Tensor, Numbers]]


class Format(NamedTuple):
    """How numbers [n] are kept: encode(numbers, signed) -> (uint8 codes, absmax [blocks]); decode(codes, absmax, signed) -> float32 [n].

    per_byte: numbers in one code. label: the optimiser's name, for errors.
    """

    label: str
    block: int
    per_byte: int
    encode: Callable[[Tensor, bool], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, bool], Tensor]


def _blocks(numbers: Tensor, block: int) -> Tensor:
    """[blocks, block], filled up with zeros."""
    return torch.nn.functional.pad(numbers, (0, -numbers.numel() % block)).view(-1, block)


def _times(numbers: Tensor, absmax: Tensor, block: int) -> Tensor:
    return (_blocks(numbers, block) * absmax.unsqueeze(1)).view(-1)[: numbers.numel()]


def _eight_bits(numbers: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    return quant.eight_bits(numbers, signed=signed)  # a step that is skipped comes here with numbers that are not finite


def _from_eight_bits(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    return _times(quant_tables.eight_bits(codes.device, signed)[codes.int()], absmax, 256)


def _four_bits(numbers: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    blocks, table = _blocks(numbers, 128), quant_tables.four_bit_moments(numbers.device, signed)
    absmax = blocks.abs().amax(1).clamp(min=TINY)
    scaled = (blocks / absmax.unsqueeze(1)).view(-1)
    below = torch.bucketize(scaled, table, right=True).sub_(1).clamp_(0, 15)
    above = (below + 1).clamp(max=15)
    # Of two equally near entries the upper one, as torchao has it; `quant_tables.nearest` takes the lower one.
    upper = scaled - table[below] >= (table[above] - table[below]) * 0.5
    codes = torch.where(upper, above, below).to(torch.uint8)[: numbers.numel() + numbers.numel() % 2]
    return (codes[::2] << 4) | codes[1::2], absmax


def _from_four_bits(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    both = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)
    return _times(quant_tables.four_bit_moments(codes.device, signed)[both.int()], absmax, 128)


def _fp8(numbers: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    blocks = _blocks(numbers, 256)
    scale = blocks.abs().amax(1).clamp(min=TINY) / quant.MOST_FP8
    # As bytes: reductions and checkpoints know no float8.
    return (blocks / scale.unsqueeze(1)).view(-1)[: numbers.numel()].to(torch.float8_e4m3fn).view(torch.uint8), scale


def _from_fp8(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    return _times(codes.view(torch.float8_e4m3fn).float(), scale, 256)


def _eight(label: str) -> Format:
    return Format(label, 256, 1, _eight_bits, _from_eight_bits)


FOUR = Format("adamw_4bit", 128, 2, _four_bits, _from_four_bits)
FP8 = Format("adamw_fp8", 256, 1, _fp8, _from_fp8)


def _optimizer(
    fmt: Format, signs: Signs, inner: Inner, *, weight_decay: float, decay: LeafRules, lr_scale: LeafRules, paged: bool
) -> Optimizer:
    """An optimiser of `inner`, on flat float32 numbers: (grad, moments, param, count, rate) -> (param, moments)."""
    return leafwise(_rules(fmt, signs, inner), weight_decay=weight_decay, decay=decay, lr_scale=lr_scale, paged=paged)


def _rules(fmt: Format | None, signs: Signs, inner: Inner) -> Callable[[str, Tensor], Rule]:
    """The rule of each leaf, its moments in a format, or in float32."""
    whole = _dense_rule(inner, signs)

    def rule(path: str, leaf: Tensor) -> Rule:
        if fmt is None or leaf.numel() < SMALLEST:
            return whole
        return Rule(partial(_start_blocks, path, signs=signs, fmt=fmt), lambda g, m, p, rate: _move(g, m, p, rate, inner, fmt, signs))

    return rule


def _dense_rule(inner: Inner, signs: Signs) -> Rule:
    return Rule(lambda leaf: _start(leaf, signs), lambda g, m, p, rate: _move(g, m, p, rate, inner, None, signs))


def adamw_rules(label: str, b1: float, b2: float, eps: float, *, eight: bool) -> Callable[[str, Tensor], Rule]:
    """AdamW on each leaf, its moments in 8 bits or in float32."""
    return _rules(_eight(label) if eight else None, {"mu": True, "nu": False}, _adamw(b1, b2, eps, _sum))


def dense_adamw(b1: float, b2: float, eps: float) -> Rule:
    """AdamW on one leaf, its moments in float32."""
    return _dense_rule(_adamw(b1, b2, eps, _sum), {"mu": True, "nu": False})


def _start(leaf: Tensor, signs: Signs) -> Moments:
    wide = leaf.dtype if leaf.dtype == torch.float64 else torch.float32
    zeros = {name: shard.like(lambda own: torch.zeros_like(own, dtype=wide), leaf) for name in signs}
    return zeros | {"count": torch.zeros((), dtype=torch.float32, device=leaf.device)}


def _start_blocks(path: str, leaf: Tensor, signs: Signs, fmt: Format) -> Moments:
    """Codes and maxima of zeros, placed as the leaf is. Errors: ValueError for a leaf that is split inside a block."""
    own = shard.local(leaf)
    if shard.sharded(leaf):
        _check_split(path, leaf, fmt)
    moments: Moments = {"count": torch.zeros((), dtype=torch.float32, device=leaf.device)}
    for name, signed in signs.items():
        codes, absmax = fmt.encode(own.new_zeros(own.numel(), dtype=torch.float32), signed)
        absmax.zero_()
        # Codes keep the shape of the leaf where each number has its own, so that they are split among ranks as it is.
        moments[name] = shard.rewrap(codes.view(own.shape), leaf) if fmt.per_byte == 1 else _flat(codes, leaf)
        moments[name + SCALE] = _flat(absmax, leaf)
    return moments


def _flat(values: Tensor, like: Tensor) -> Tensor:
    """Values [n] about this rank's part of a leaf, split among ranks as the leaf is along its first dimension, in equal parts."""
    if not shard.distributed(like):
        return values
    from torch.distributed.tensor import DTensor

    shape = torch.Size([values.numel() * shard.parts(like)])
    return DTensor.from_local(values, like.device_mesh, like.placements, shape=shape, stride=(1,), run_check=False)


def _split_dims(leaf: Tensor) -> list[int]:
    """The dimensions along which a leaf is split among ranks."""
    return [cast(Any, spec).dim for spec in leaf.placements if spec.is_shard()] if shard.distributed(leaf) else []


def _check_split(path: str, leaf: Tensor, fmt: Format) -> None:
    parts = shard.parts(leaf)
    # The same on all ranks, so that all of them stop.
    if _split_dims(leaf) != [0] or leaf.shape[0] % parts or leaf.numel() // parts % fmt.block:
        raise ValueError(
            f"{fmt.label} keeps blocks of {fmt.block} numbers, and ranks hold parts of {path} {tuple(leaf.shape)} that end inside of one: "
            "use optimizer adamw, or sharding none"
        )


def _move(grad: Tensor, moments: Moments, param: Tensor, rate: Rate, inner: Inner, fmt: Format | None, signs: Signs):
    """`inner` on one chunk of a leaf after another."""
    count, flat, against = moments["count"] + 1, param.reshape(-1), grad.reshape(-1)
    target, moved = torch.empty_like(flat), {name: torch.empty_like(moment) for name, moment in moments.items()}
    moved["count"] = count
    for start in range(0, flat.numel(), CHUNK):
        piece = slice(start, min(start + CHUNK, flat.numel()))
        own = _wide(flat[piece])
        numbers = {name: _read(moments, name, signed, piece, fmt).to(own.dtype) for name, signed in signs.items()}
        target[piece], numbers = inner(against[piece].to(own.dtype), numbers, own, count, rate)
        for name, signed in signs.items():
            _write(moved, name, signed, piece, fmt, numbers[name])
    return target.view(param.shape), moved


def _wide(numbers: Tensor) -> Tensor:
    return numbers if numbers.dtype == torch.float64 else numbers.float()


def _places(moments: Moments, name: str, piece: slice, fmt: Format) -> tuple[Tensor, Tensor]:
    """Codes and maxima of a piece that begins with a block."""
    codes = moments[name].reshape(-1)[piece.start // fmt.per_byte : -(-piece.stop // fmt.per_byte)]
    return codes, moments[name + SCALE][piece.start // fmt.block : -(-piece.stop // fmt.block)]


def _read(moments: Moments, name: str, signed: bool, piece: slice, fmt: Format | None) -> Tensor:
    if fmt is None:
        return moments[name].reshape(-1)[piece]
    return fmt.decode(*_places(moments, name, piece, fmt), signed)[: piece.stop - piece.start]


def _write(moments: Moments, name: str, signed: bool, piece: slice, fmt: Format | None, numbers: Tensor) -> None:
    if fmt is None:
        moments[name].view(-1)[piece] = numbers
        return
    for place, value in zip(_places(moments, name, piece, fmt), fmt.encode(numbers.float(), signed), strict=True):
        place.copy_(value)


def _sum(old: Tensor, new: Tensor, decay: float) -> Tensor:
    """decay old + (1 - decay) new, rounded as bitsandbytes does."""
    return old.mul(decay).add_(new, alpha=1 - decay)


def _between(old: Tensor, new: Tensor, decay: float) -> Tensor:
    """decay old + (1 - decay) new, rounded as torchao does."""
    return old.lerp(new, 1 - decay)


def _adamw(b1: float, b2: float, eps: float, mean: Callable[[Tensor, Tensor, float], Tensor]) -> Inner:
    def inner(grad: Tensor, moments: Numbers, param: Tensor, count: Tensor, rate: Rate) -> tuple[Tensor, Numbers]:
        mu, nu = mean(moments["mu"], grad, b1), mean(moments["nu"], grad.square(), b2)
        # 1 - b^t in float64: in float32 it would be wrong by 3e-5 of itself at the first step.
        first, second = (1 - b ** count.double() for b in (b1, b2))
        step = (mu / first.to(mu.dtype)) / ((nu.sqrt() / second.sqrt().to(nu.dtype)).add_(eps))
        return param - rate.lr * (step + rate.decay * param), {"mu": mu, "nu": nu}

    return inner


def adamw_8bit(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """AdamW with both moments in 8 bits, as bitsandbytes' AdamW8bit has them; 2.03 bytes a parameter."""
    rules = {"weight_decay": weight_decay, "decay": decay, "lr_scale": lr_scale, "paged": paged}
    return _optimizer(_eight("adamw_8bit"), {"mu": True, "nu": False}, _adamw(b1, b2, eps, _sum), **rules)


def adamw_4bit(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """AdamW with both moments in 4 bits and blocks of 128, as torchao's AdamW4bit has them; 1.06 bytes a parameter."""
    rules = {"weight_decay": weight_decay, "decay": decay, "lr_scale": lr_scale, "paged": paged}
    return _optimizer(FOUR, {"mu": True, "nu": False}, _adamw(b1, b2, eps, _between), **rules)


def adamw_fp8(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """AdamW with both moments in float8 e4m3, as torchao's AdamWFp8 has them; 2.03 bytes a parameter."""
    rules = {"weight_decay": weight_decay, "decay": decay, "lr_scale": lr_scale, "paged": paged}
    return _optimizer(FP8, {"mu": True, "nu": False}, _adamw(b1, b2, eps, _between), **rules)


def lion_8bit(
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    decay: LeafRules = (),
    lr_scale: LeafRules = (),
    paged: bool = False,
) -> Optimizer:
    """Lion with its moment in 8 bits, as bitsandbytes' Lion8bit has it; 1.02 bytes a parameter."""

    def inner(grad: Tensor, moments: Numbers, param: Tensor, count: Tensor, rate: Rate) -> tuple[Tensor, Numbers]:
        mu = moments["mu"]
        step = torch.sign(mu.mul(b1) + grad.mul(1 - b1))
        return param - rate.lr * (step + rate.decay * param), {"mu": mu.mul(b2).add_(grad, alpha=1 - b2)}

    rules = {"weight_decay": weight_decay, "decay": decay, "lr_scale": lr_scale, "paged": paged}
    return _optimizer(_eight("lion_8bit"), {"mu": True}, inner, **rules)
