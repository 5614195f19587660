"""Quantised leaves: weights kept in 4 or 8 bits, and made dense again where they are computed with.

A quantised leaf is a named tuple, so that `tree` takes it for a leaf, with the shape and the dtype of the dense one.
4 bits (nf4, fp4): w = table[code] * absmax of its block; absmax itself is in 8 bits where it is quantised, too ("double").
8 bits: int8 w = code * absmax of its row / 127; fp8 (e4m3) w = code * scale of its row.
int4: w = (code - 8) * scale of its 64 neighbours in the row. Scales of fp8 and int4 are numbers of bfloat16.
Codes and numbers of the others are those of bitsandbytes, to the bit. Source: Dettmers et al., arXiv 2305.14314 (nf4), 2208.07339
(int8 rows), 2110.02861 (the 8-bit table).
"""

import hashlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor

from treetune.core import quant_tables

Kind = Literal["nf4", "fp4", "int4", "int8", "fp8"]
FOUR_BITS: tuple[Kind, ...] = ("nf4", "fp4")  # those of bitsandbytes, in blocks of the flat leaf
KINDS: tuple[Kind, ...] = (*FOUR_BITS, "int4", "int8", "fp8")
BLOCK, NESTED_BLOCK = 64, 256
# Numbers of a leaf that are quantised, or made dense, at once, so that what is computed on the way is small: a multiple of every block.
CHUNK = 2**20
SMALLEST = 1e-38  # what a block of zeros is divided by
SPREAD = 256  # numbers of a leaf that tell which one it is
MOST_FP8 = 448.0
OF_127 = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it


class Scheme(NamedTuple):
    """How leaves are quantised. double: the maxima of 4-bit blocks, too. experts: stacks of experts beside linear layers."""

    kind: Kind
    double: bool = True
    experts: bool = True


class Origin(NamedTuple):
    """What a leaf was quantised from: sha256 of its bytes, and numbers spread over it in bfloat16."""

    digest: str
    numbers: Tensor


NO_ORIGIN = Origin("", torch.zeros(0))  # of a leaf that does not outlive the pass that makes it


class Quantised(NamedTuple):
    """A quantised leaf.

    codes: uint8 [ceil(n / 2)] of 4 bits, the earlier number in the higher half; int8 or float8 of the shape of the leaf for 8 bits.
    scale: float32 [blocks], [..., rows] for 8 bits; uint8 [blocks], codes of absmax - offset, where `nested` [blocks / 256] scales them.
    int4: codes uint8 [..., rows, ceil(I / 2)], the earlier number in the lower half, and scale [..., rows, ceil(I / block)].
    multiplied: layers multiply the codes themselves (`ops.fp8_linear`), where others make the leaf dense.
    """

    kind: Kind
    shape: torch.Size
    dtype: torch.dtype
    codes: Tensor
    scale: Tensor
    nested: Tensor | None
    offset: Tensor | None
    origin: Origin
    block: int = BLOCK
    multiplied: bool = False

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def ndim(self) -> int:
        """Dimensions of the dense leaf."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the leaf holds."""
        return sum(part.nbytes for part in self.parts())

    def numel(self) -> int:
        """Numbers of the dense leaf."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """The dense leaf is."""
        return True

    def detach(self) -> "Quantised":
        """Itself: it takes no gradient."""
        return self

    def parts(self) -> list[Tensor]:
        """Its tensors."""
        return [part for part in (self.codes, self.scale, self.nested, self.offset) if part is not None]

    def moved(self, put: Callable[[Tensor], Tensor]) -> "Quantised":
        """The leaf with `put` applied to each of its tensors."""
        nested, offset = (None if part is None else put(part) for part in (self.nested, self.offset))
        return self._replace(codes=put(self.codes), scale=put(self.scale), nested=nested, offset=offset)


def quantised(leaf: Any) -> TypeGuard[Quantised]:
    """Whether a leaf is quantised."""
    return isinstance(leaf, Quantised)


def quantise(weight: Tensor, scheme: Scheme) -> Quantised:
    """A leaf in 4 or 8 bits. Errors: ValueError for numbers that are not finite, or a vector."""
    if weight.ndim < 2:
        raise ValueError(f"a leaf of shape {list(weight.shape)} is not quantised; expected a matrix, or a stack of them")
    if not all(torch.isfinite(side) for side in weight.aminmax()):
        raise ValueError("a leaf with numbers that are not finite cannot be quantised")
    return _coded(weight.detach(), scheme, origin_of(weight))


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scheme: Scheme) -> Tensor:
        return dense(_coded(weight, scheme, NO_ORIGIN))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """What quantising leaves of a weight, with the gradient of the weight itself, as if nothing were rounded.

    Source: Bengio et al., arXiv 1308.3432 (straight-through); Jacob et al., arXiv 1712.05877, section 3.
    """
    return _Rounded.apply(weight, scheme)


def _coded(weight: Tensor, scheme: Scheme, origin: Origin) -> Quantised:
    make = {"int4": _int4, "int8": _int8, "fp8": _fp8}.get(scheme.kind, _four_bits)
    return make(weight, scheme, origin)


def dense(leaf: Quantised, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers of a leaf, computed in float32 and rounded once to `dtype`, by default its own."""
    dtype = dtype or leaf.dtype
    if leaf.kind in FOUR_BITS:
        return _dense_four_bits(leaf, dtype)
    if leaf.kind == "int4":
        return _dense_int4(leaf, dtype)
    scale = leaf.scale.unsqueeze(-1)
    if leaf.kind == "int8":
        return leaf.codes.float().mul_(scale).mul_(OF_127).to(dtype)
    return _of_fp8(leaf.codes).mul_(scale).to(dtype)


def _of_fp8(codes: Tensor) -> Tensor:
    if codes.device.type != "cpu":
        return codes.float()
    bytes_ = codes.reshape(-1).view(torch.uint8)
    return quant_tables.fp8(codes.device).index_select(0, bytes_.int()).view(codes.shape)


def origin_of(weight: Tensor) -> Origin:
    """Which leaf this is."""
    return Origin(digest(weight), spread(weight))


def digest(leaf: Tensor | Quantised) -> str:
    """sha256 of the bytes of a whole leaf; of a quantised one that of what it was made from."""
    if isinstance(leaf, Quantised):
        return leaf.origin.digest
    return hashlib.sha256(_bytes(leaf).numpy().data).hexdigest()


def spread(leaf: Tensor | Quantised) -> Tensor:
    """bfloat16 [<= 256] on the CPU: the first and the last number of a leaf, and others evenly between; of what a quantised one was."""
    if isinstance(leaf, Quantised):
        return leaf.origin.numbers
    flat = leaf.detach().reshape(-1)
    return flat[places(flat.numel()).to(flat.device)].cpu().to(torch.bfloat16)


def places(size: int) -> Tensor:
    """int64 [<= 256]: the first and the last place of so many, and others evenly between."""
    return torch.linspace(0, size - 1, min(SPREAD, size), dtype=torch.float64).round().long()


def facts(leaf: Quantised) -> str:
    """What tells a quantised leaf from others, in a line: what it was made from, and how."""
    return f"{tuple(leaf.shape)} {leaf.dtype} {leaf.kind}{'' if leaf.nested is None else ' double'} {leaf.origin.digest}"


def _bytes(leaf: Tensor) -> Tensor:
    return leaf.detach().contiguous().cpu().reshape(-1).view(torch.uint8)


def _four_bits(weight: Tensor, scheme: Scheme, origin: Origin) -> Quantised:
    table = quant_tables.four_bits(scheme.kind, weight.device)
    order = table.argsort()
    flat = weight.reshape(-1)
    halves, scale = flat.new_empty(-(-flat.numel() // 2), dtype=torch.uint8), flat.new_empty(-(-flat.numel() // BLOCK), dtype=torch.float32)
    for start in range(0, flat.numel(), CHUNK):
        scaled, absmax = _scaled(flat[start : start + CHUNK].float(), BLOCK)
        scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
        codes = order.to(torch.uint8)[quant_tables.nearest(scaled, table[order]).int()]
        halves[start // 2 : (start + CHUNK) // 2] = (codes[::2] << 4) | codes[1::2]
        scale[start // BLOCK : (start + CHUNK) // BLOCK] = absmax
    leaf = Quantised(scheme.kind, weight.shape, weight.dtype, halves, scale, None, None, origin)
    return _doubled(leaf) if scheme.double else leaf


def _by_rows(weight: Tensor, dtype: torch.dtype, make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Codes of the shape of a weight and scales of its rows, some rows at a time: make(rows [n, I]) -> (codes [n, I], scales [n])."""
    rows = weight.reshape(-1, weight.shape[-1])
    codes, scale = torch.empty_like(rows, dtype=dtype), rows.new_empty(rows.shape[0], dtype=torch.float32)
    for some, of_codes, of_scale in zip(*(part.split(max(1, CHUNK // rows.shape[1])) for part in (rows, codes, scale)), strict=True):
        part, largest = make(some)
        of_codes.copy_(part)
        of_scale.copy_(largest)
    return codes.view(weight.shape), scale.view(weight.shape[:-1])


def _doubled(leaf: Quantised) -> Quantised:
    """The leaf with its maxima in 8 bits."""
    offset = leaf.scale.mean()
    codes, absmax = eight_bits(leaf.scale - offset)
    return leaf._replace(scale=codes, nested=absmax, offset=offset)


def eight_bits(numbers: Tensor, *, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] of numbers [n] over the largest of their block of 256, and these maxima [blocks]; a block of zeros has codes of 0.

    On a CPU numbers are rounded to a grid first, as bitsandbytes' kernel for CPUs does. Numbers that are not finite have codes, too.
    """
    blocks = torch.nn.functional.pad(numbers, (0, -numbers.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = torch.where(absmax.unsqueeze(1) > 0, blocks * (1 / absmax).unsqueeze(1), -1.0).view(-1)[: numbers.numel()]
    if numbers.device.type != "cpu":
        return quant_tables.nearest(scaled, quant_tables.eight_bits(numbers.device, signed)), absmax
    cells = ((scaled + 1) * (quant_tables.CELLS / 2) + 0.5).floor_().nan_to_num_(0.0).int()
    return quant_tables.grid_codes(signed)[cells], absmax


def _scaled(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Numbers [n] over the largest of their block, in [-1, 1], and these maxima [blocks]."""
    whole = flat.numel() // block * block
    rows, rest = flat[:whole].view(-1, block), flat[whole:]
    absmax = rows.abs().amax(1)
    scaled = (rows * (1.0 / absmax.clamp(min=SMALLEST)).unsqueeze(1)).clamp_(-1, 1).view(-1)
    if rest.numel():
        largest = rest.abs().amax().clamp(min=SMALLEST)
        absmax, scaled = torch.cat([absmax, largest[None]]), torch.cat([scaled, (rest / largest).clamp_(-1, 1)])
    return scaled, absmax


def _dense_four_bits(leaf: Quantised, dtype: torch.dtype) -> Tensor:
    from treetune.ops import dequantise

    if dequantise.by_kernel(leaf.codes):
        return dequantise.four_bits(leaf.codes, absmax(leaf), quant_tables.four_bits(leaf.kind, leaf.device), leaf.shape, leaf.block, dtype)
    out, scale = torch.empty(leaf.numel(), dtype=dtype, device=leaf.device), absmax(leaf)
    # A byte is looked up at once: its two numbers are one complex one.
    table = torch.view_as_complex(quant_tables.pairs(leaf.kind, leaf.device))
    for start in range(0, out.numel(), CHUNK):
        part = out[start : start + CHUNK]
        codes = leaf.codes[start // 2 : (start + CHUNK) // 2]
        numbers = torch.view_as_real(table.index_select(0, codes.int())).view(-1)[: part.numel()]
        part.copy_(_multiplied(numbers, scale[start // leaf.block :], leaf.block))
    return out.view(leaf.shape)


def _multiplied(numbers: Tensor, scale: Tensor, block: int) -> Tensor:
    """Numbers [n] times the scale of their block, in place."""
    whole = numbers.numel() // block
    numbers[: whole * block].view(-1, block).mul_(scale[:whole, None])
    if whole * block < numbers.numel():
        numbers[whole * block :].mul_(scale[whole])
    return numbers


def absmax(leaf: Quantised) -> Tensor:
    """float32 [blocks]: the maxima of a leaf in 4 bits."""
    if leaf.nested is None or leaf.offset is None:
        return leaf.scale
    numbers, scale = quant_tables.eight_bits(leaf.device)[leaf.scale.int()], leaf.nested.repeat_interleave(NESTED_BLOCK)
    return numbers * scale[: numbers.numel()] + leaf.offset


def _int8(weight: Tensor, scheme: Scheme, origin: Origin) -> Quantised:
    # bitsandbytes quantises what is left of a number in float16; beyond its range we keep what it would lose.
    fits = all(torch.isfinite(side) for side in torch.stack(weight.aminmax()).half())

    def make(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = (rows.half() if fits else rows).float()
        scale = rows.abs().amax(-1)
        return torch.where(scale.unsqueeze(-1) > 0, torch.round(rows * (127.0 / scale.unsqueeze(-1))), 0).to(torch.int8), scale

    codes, scale = _by_rows(weight, torch.int8, make)
    return Quantised("int8", weight.shape, weight.dtype, codes, scale, None, None, origin)


def _fp8(weight: Tensor, scheme: Scheme, origin: Origin) -> Quantised:
    def make(rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.float()
        scale = _bfloat16(rows.abs().amax(-1) / MOST_FP8)
        return (rows / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale

    codes, scale = _by_rows(weight, torch.float8_e4m3fn, make)
    return Quantised("fp8", weight.shape, weight.dtype, codes, scale, None, None, origin)


def _int4(weight: Tensor, scheme: Scheme, origin: Origin) -> Quantised:
    width = weight.shape[-1]
    groups = torch.nn.functional.pad(weight.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = _bfloat16(groups.abs().amax(-1) / 7.5)
    codes = (torch.round(groups / scale.unsqueeze(-1)).clamp_(-8, 7) + 8).to(torch.uint8).flatten(-2)[..., : width + width % 2]
    return Quantised("int4", weight.shape, weight.dtype, codes[..., ::2] | (codes[..., 1::2] << 4), scale, None, None, origin)


def _bfloat16(scale: Tensor) -> Tensor:
    """Scales as numbers of bfloat16, so that who computes in it has the very same weights; none is 0."""
    return scale.clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16().float()


def _dense_int4(leaf: Quantised, dtype: torch.dtype) -> Tensor:
    width, table = leaf.shape[-1], torch.view_as_complex(quant_tables.whole_pairs(leaf.device))
    numbers = torch.view_as_real(table.index_select(0, leaf.codes.reshape(-1).int())).view(*leaf.shape[:-1], width + width % 2)
    if width % leaf.block == 0:
        numbers.unflatten(-1, (-1, leaf.block)).mul_(leaf.scale.unsqueeze(-1))
        return numbers.to(dtype)
    return (numbers[..., :width] * leaf.scale.repeat_interleave(leaf.block, -1)[..., :width]).to(dtype)
