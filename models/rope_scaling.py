"""Rotary frequencies of a model and their scalings, as `modeling_rope_utils` of transformers computes them.

r features of a head turn in pairs, the pair i by position * theta^(-2 i / r); a scaling changes these frequencies, and some multiply
cosine and sine by an attention factor. T tokens of a stream, L its documents.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearRope:
    """Position interpolation: all frequencies divided by `factor`. Source: Chen et al., arXiv 2306.15595."""

    factor: float


@dataclass(frozen=True)
class DynamicRope:
    """NTK scaling of documents beyond the positions of the model. These are refused wherever documents are read, so nothing is scaled."""

    factor: float


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later: long wavelengths divided by `factor`, with a smooth band between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class YarnRope:
    """NTK by parts: frequencies below `beta_slow` turns in the original length divided by `factor`, above `beta_fast` kept, a ramp between.

    `truncate` rounds the ends of the ramp to whole pairs. Source: Peng et al., "YaRN", arXiv 2309.00071.
    """

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRope:
    """Frequencies divided by `short` [r/2], in documents longer than the original length by `long` [r/2].

    Source: Ding et al., "LongRoPE", arXiv 2402.13753.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


Scaling = LinearRope | DynamicRope | Llama3Rope | YarnRope | LongRope


@dataclass(frozen=True)
class Rope:
    """Base and scaling of the rotary positions of some layers."""

    theta: float = 10000.0
    scaling: Scaling | None = None


class Rotation(NamedTuple):
    """What a layer turns queries and keys by: frequencies [r/2] in radians per position, or [T, r/2], and a factor of cosine and sine."""

    inv_freq: Tensor
    scale: float = 1.0


def rotation(rope: Rope, dim: int, batch: dict[str, Tensor]) -> Rotation:
    """The rotation of `dim` features of the heads of a stream.

    With LongRope the length of each document decides for all its tokens, so that packing changes nothing; a stream without documents, as
    a sampler has, is short.
    """
    positions, scaling = batch["positions"], rope.scaling
    freq = inv_freq(rope, dim, positions.device)
    if not isinstance(scaling, LongRope):
        return Rotation(freq, scaling.attention_factor if isinstance(scaling, YarnRope) else 1.0)
    if "cu_docs" in batch:
        long = _lengths(positions, batch["cu_docs"]) > scaling.original_max_positions  # [T]
        freq = torch.where(long[:, None], _divided(rope.theta, dim, scaling.long, positions.device), freq)
    return Rotation(freq, scaling.attention_factor)


def _lengths(positions: Tensor, cu_docs: Tensor) -> Tensor:
    """[T]: positions of the document of each token; branches begin again, so it is the longest path through them."""
    lens = cu_docs.long().diff()
    document = torch.repeat_interleave(torch.arange(lens.shape[0], device=lens.device), lens, output_size=positions.shape[0])
    return torch.zeros_like(lens).scatter_reduce(0, document, positions + 1, "amax")[document]


def shared_positions(rope: Rope, max_positions: int) -> int:
    """Positions up to which all documents turn alike, so that a prompt's keys serve any continuation of it."""
    return min(max_positions, rope.scaling.original_max_positions) if isinstance(rope.scaling, LongRope) else max_positions


def inv_freq(rope: Rope, dim: int, device: torch.device) -> Tensor:
    """Frequencies [dim/2] in float32, of short documents where the length decides. Source: arXiv 2104.09864."""
    match rope.scaling:
        case LinearRope(factor):
            return _plain(rope.theta, dim, device) / factor
        case Llama3Rope():
            return _llama3(_plain(rope.theta, dim, device), rope.scaling)
        case YarnRope():
            return _yarn(rope.theta, dim, rope.scaling, device)
        case LongRope(short):
            return _divided(rope.theta, dim, short, device)
    return _plain(rope.theta, dim, device)


def _powers(theta: float, dim: int, device: torch.device) -> Tensor:
    return theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def _plain(theta: float, dim: int, device: torch.device) -> Tensor:
    return 1.0 / _powers(theta, dim, device)


def _divided(theta: float, dim: int, factors: tuple[float, ...], device: torch.device) -> Tensor:
    wide = torch.tensor(factors, dtype=torch.float32).to(device, non_blocking=device.type == "cuda")
    return 1.0 / (wide * _powers(theta, dim, device))


def _llama3(freq: Tensor, scaling: Llama3Rope) -> Tensor:
    """Source: the Llama 3.1 release."""
    turns = scaling.original_max_positions * freq / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * freq / scaling.factor + smooth * freq


def _yarn(theta: float, dim: int, scaling: YarnRope, device: torch.device) -> Tensor:
    def pair(turns: float) -> float:
        """The pair that makes this many turns in the original length."""
        return dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)  # a ramp of no width would divide by 0
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    powers = _powers(theta, dim, device)
    return (1 - kept) / (scaling.factor * powers) + kept / powers


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """0.1 m ln(factor) + 1 with m = 1, or the ratio of two of these where a model names both `mscale`."""

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def long_attention_factor(factor: float, original_max_positions: int) -> float:
    """sqrt(1 + ln(factor) / ln(original length)), 1 where nothing is stretched."""
    return math.sqrt(1 + math.log(factor) / math.log(original_max_positions)) if factor > 1 else 1.0
