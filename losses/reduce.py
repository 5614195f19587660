"""From per-token values to (numerator, denominator); the step divides by denominators summed over the whole step.

N scored tokens, B sequences. x [N], seq [N] (which sequence), seq_lens [B] (scored tokens of each; 0 allowed).
"""

import torch
from torch import Tensor

from treetune.core.state import Metric


def upcast(x: Tensor) -> Tensor:
    """x in float32 where it is bfloat16 or float16: sums and logarithms in those lose what a loss is about."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def elementwise(value: Tensor, like: Tensor, what: str) -> Tensor:
    """The value, if it is a tensor of the shape of `like`. Errors: ValueError for what would be broadcast into another loss."""
    if not isinstance(value, Tensor) or value.shape != like.shape:
        given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r:.40}"
        raise ValueError(f"the {what} gave {given}; expected a tensor of shape {list(like.shape)}, one number for each")
    return value


def per_sequence(x: Tensor, seq: Tensor, seq_lens: Tensor) -> Tensor:
    """Sum of x over each sequence: [N] -> [B]."""
    x = upcast(x)
    return torch.zeros(seq_lens.shape[0], dtype=x.dtype, device=x.device).index_add(0, seq, x)


def by_token(x: Tensor, seq: Tensor, seq_lens: Tensor, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean over tokens: sum of weight * x over sum of weight (weight [N], default 1). A token of weight 0 adds exactly 0."""
    x = upcast(x)
    if weight is None:
        return x.sum(), seq_lens.sum()
    # `where` and not a product: 0 times the inf or nan of a token that does not count would be nan.
    return torch.where(weight != 0, weight * x, 0.0).sum(), weight.sum()


def by_sequence(x: Tensor, seq: Tensor, seq_lens: Tensor, *, count_empty: bool = False) -> tuple[Tensor, Tensor]:
    """Mean over sequences of each sequence's token mean; empty sequences are left out unless `count_empty`."""
    means = per_sequence(x, seq, seq_lens) / seq_lens.clamp(min=1)
    # From seq_lens and not from the rows: a micro-batch without signal reads none of them, and its completions still count.
    count = seq_lens.new_full((), seq_lens.shape[0]) if count_empty else (seq_lens > 0).sum()
    return means.sum(), count


def by_constant(x: Tensor, seq: Tensor, seq_lens: Tensor, *, length: int) -> tuple[Tensor, Tensor]:
    """Sum over B * length, the fixed budget of Dr. GRPO. Source: Liu et al., arXiv 2503.20783, section 3.2."""
    return upcast(x).sum(), seq_lens.new_full((), seq_lens.shape[0] * length)


def by_sum(x: Tensor, seq: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over sequences of each sequence's sum; empty sequences count."""
    return by_constant(x, seq, seq_lens, length=1)


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Tokens of the documents that some sequence reads: a padding document does not count."""
    lens = batch["cu_docs"].diff()
    return torch.where(torch.zeros_like(lens).bool().index_fill(0, batch["doc_of_seq"], True), lens, 0).sum()


def whole_pairs(seq_lens: Tensor) -> Tensor:
    """Pairs, sequences 2i and 2i + 1, with a read row on both sides: [P] bool."""
    filled = seq_lens > 0
    return filled[0::2] & filled[1::2]


def masked_mean(x: Tensor, mask: Tensor) -> Metric:
    """The mean of x over the places where mask holds, weighted by their number."""
    count = mask.sum()
    return Metric(torch.where(mask, x.detach().float(), 0.0).sum() / count.clamp(min=1), count)
