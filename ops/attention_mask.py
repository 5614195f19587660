"""The attention mask of a packed stream of token trees: the rule, the checks of a batch, and FlexAttention's blocks of it.

A trunk token sees the trunk tokens of its document up to itself; a branch token sees the first `start` trunk tokens of its document and its
own branch up to itself; a window further asks positions[q] - positions[k] < window; nothing crosses documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from treetune.ops.context_parallel import Part

BLOCK = 128  # tokens of a side of a FlexAttention block


def allowed(batch: dict[str, torch.Tensor], q: torch.Tensor, k: torch.Tensor, window: int | None) -> torch.Tensor:
    """Whether row q may see row k: broadcast boolean over two index tensors. The attention rule, written once."""
    document = document_of(batch["cu_docs"])
    visible = (document[q] == document[k]) & (k <= q)
    if "branch" in batch:
        branch, start = batch["branch"], batch["start"]
        trunk_index = k - batch["cu_docs"][document[k]]
        visible = visible & ((branch[k] == branch[q]) | ((branch[k] == 0) & (trunk_index < start[q])))
    if window is not None:
        positions = positions_of(batch)
        visible = visible & (positions[q] - positions[k] < window)
    return visible


def document_of(cu_docs: torch.Tensor) -> torch.Tensor:
    """The document of each token: int64 [T]."""
    lengths = cu_docs.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=cu_docs.device), lengths)


def positions_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The position of each token in its document: as the batch says, or counted from the boundaries; [T]."""
    if "positions" in batch:
        return batch["positions"]
    cu_docs = batch["cu_docs"].long()
    return torch.arange(int(cu_docs[-1]), device=cu_docs.device) - cu_docs[document_of(cu_docs)]


def check_boundaries(cu_docs: torch.Tensor, tokens: int) -> list[int]:
    """The boundaries as numbers; ValueError unless they cover the tokens in order."""
    if cu_docs.ndim != 1 or cu_docs.numel() < 1 or cu_docs.is_floating_point():
        raise ValueError(f"cu_docs got {cu_docs.dtype} of shape {tuple(cu_docs.shape)}: expected integers [documents + 1]")
    offsets = cu_docs.tolist()
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(f"cu_docs runs from {offsets[0]} to {offsets[-1]}: expected from 0 to the {tokens} tokens of the batch")
    drop = next((i for i in range(len(offsets) - 1) if offsets[i + 1] < offsets[i]), None)
    if drop is not None:
        raise ValueError(f"cu_docs falls from {offsets[drop]} to {offsets[drop + 1]} at document {drop}: boundaries must not decrease")
    return offsets


def check_branches(batch: dict[str, torch.Tensor], tokens: int) -> None:
    """Raise ValueError for branches that are out of order or leave their trunk where it has no token."""
    for name in ("branch", "start", "positions"):
        if name in batch and batch[name].shape != (tokens,):
            raise ValueError(f"{name} got shape {tuple(batch[name].shape)}: expected [{tokens}], one per token")
    if ("branch" in batch) != ("start" in batch):
        raise ValueError("a batch needs both branch and start, or neither: start says how many trunk tokens a branch token may see")
    if "branch" not in batch:
        return
    branch, start, cu_docs = batch["branch"].long(), batch["start"].long(), batch["cu_docs"].long()
    document = document_of(cu_docs)
    step = branch.diff()
    inside = document.diff() == 0
    first = branch[cu_docs[:-1][cu_docs.diff() > 0]]
    if bool((inside & ((step < 0) | (step > 1))).any()) or bool((first != 0).any()):
        raise ValueError("branch must be 0 on the trunk of every document and grow by 1 from each of its branches to the next")
    trunk = torch.zeros(len(cu_docs) - 1, dtype=torch.long, device=branch.device).index_add(0, document, (branch == 0).long())
    wrong = (branch > 0) & ((start < 0) | (start > trunk[document]))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(f"start is {int(start[row])} at token {row}: expected 0..{int(trunk[document[row]])}, the trunk of its document")


class _Span(NamedTuple):
    """The smallest, or the largest, values among the tokens of each block of the stream; all [blocks]."""

    row: torch.Tensor
    document: torch.Tensor
    branch: torch.Tensor
    position: torch.Tensor
    limit: torch.Tensor  # trunk tokens that a query may see: start, or all of them for a trunk token
    trunk_index: torch.Tensor  # over trunk tokens; branch tokens count as past the end


def _spans(batch: dict[str, torch.Tensor], tokens: int, rows: torch.Tensor) -> tuple[_Span, _Span]:
    """Smallest and largest values of each block of these rows."""
    document = document_of(batch["cu_docs"])
    end = torch.full_like(document, torch.iinfo(torch.int64).max)
    branch = batch["branch"].long() if "branch" in batch else torch.zeros_like(document)
    limit = torch.where(branch > 0, batch["start"].long(), end) if "branch" in batch else end
    trunk_index = torch.where(branch > 0, end, torch.arange(tokens) - batch["cu_docs"].long()[document])
    # The short last block is filled up with its own last token, which moves neither of its extents.
    rows = torch.cat([rows, rows[-1:].expand(-len(rows) % BLOCK)])

    def extent(x):
        blocks = x[rows].view(-1, BLOCK)
        return blocks.amin(1), blocks.amax(1)

    every = (torch.arange(tokens), document, branch, positions_of(batch).long(), limit, trunk_index)
    low, high = zip(*(extent(x) for x in every), strict=True)
    return _Span(*low), _Span(*high)


def blocks(
    batch: dict[str, torch.Tensor], tokens: int, window: int | None, queries: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [q, k] of the mask that may hold a visible pair, and those where every pair is visible: from extents, without [T, T].

    queries [t]: the tokens that ask, in any order; all of them without.
    """
    rows = torch.arange(tokens)
    low, high = (_Span(*(x[None] for x in side)) for side in _spans(batch, tokens, rows))  # of keys, [1, k]
    asking = (low, high) if queries is None else _spans(batch, tokens, queries)
    q_low, q_high = (_Span(*(x.reshape(-1, 1) for x in side)) for side in asking)  # [q, 1]
    before, single = q_low.row > high.row, (q_low.document == q_high.document) & (low.document == high.document)
    same = single & (low.document == q_low.document)
    trunk = low.trunk_index < q_high.limit
    branch = (high.branch >= q_low.branch) & (low.branch <= q_high.branch)
    visible = (q_high.row >= low.row) & (high.document >= q_low.document) & (~same | trunk | branch)
    alike = (low.branch == high.branch) & (q_low.branch == q_high.branch) & (low.branch == q_low.branch)
    every = before & same & ((high.trunk_index < q_low.limit) | alike)
    if window is not None:
        visible &= ~same | (q_low.position - high.position < window)
        every &= q_high.position - low.position < window
    # A short last block that counts as whole would let its padding be read.
    if tokens % BLOCK:
        every[:, -1] = False
    if (tokens if queries is None else len(queries)) % BLOCK:
        every[-1] = False
    return visible & ~every, every


def block_mask(batch: dict[str, torch.Tensor], tokens: int, window: int | None, device: torch.device, part: Part | None = None) -> object:
    """The rule as a FlexAttention BlockMask on a device: of all tokens, or of those of a part as queries and all as keys."""
    from torch.nn.attention.flex_attention import BlockMask

    # Block by block from extents: create_block_mask would fill [T, T] on the host, 460 MB and 2 s at 8192 tokens.
    host = {key: batch[key].cpu() for key in ("cu_docs", "positions", "branch", "start") if key in batch}
    lists, own = [], None if part is None else part.places()
    for side in blocks(host, tokens, window, own):
        index = side.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        lists += [_moved(x, device)[None, None] for x in (side.sum(-1), index)]
    rule = _mask_mod(host, window, device, own)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(tokens if own is None else len(own), tokens))


def _moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x as int32 on a device, without waiting for CUDA."""
    return x.to(device, torch.int32, non_blocking=device.type == "cuda")


def _mask_mod(
    batch: dict[str, torch.Tensor], window: int | None, device: torch.device, queries: torch.Tensor | None
) -> Callable[..., torch.Tensor]:
    """The rule of `allowed` over tensors that are made once: the compiled kernel calls it for every pair of a partial block.

    One function over five tensors [T] for all streams and windows, and the window in a tensor: what differs is compiled again, a number
    as a symbol, which soft-caps do not survive, and after eight compilations all scores are held in memory.
    """
    document, positions = document_of(batch["cu_docs"]), positions_of(batch)
    branch, start = (batch.get(key, torch.zeros_like(document)) for key in ("branch", "start"))
    limit = batch["cu_docs"].long()[document] + start  # trunk rows before it are seen
    behind = torch.full_like(positions, -1) if window is None else positions - window  # positions up to it are not
    if queries is not None:
        own = (_moved(x[queries], device) for x in (torch.arange(len(document)), document, branch, limit, behind))
        return _mask_mod_of(*own, *(_moved(x, device) for x in (document, branch, positions)))
    document, branch, limit, positions, behind = (_moved(x, device) for x in (document, branch, limit, positions, behind))

    def mask_mod(b, h, q, k):
        visible = (document[q] == document[k]) & (k <= q) & (positions[k] > behind[q])
        return visible & ((branch[k] == branch[q]) | ((branch[k] == 0) & (k < limit[q])))

    return mask_mod


def _mask_mod_of(rows, own_document, own_branch, limit, behind, document, branch, positions) -> Callable[..., torch.Tensor]:
    """The same rule where a query is a number of these rows [t] of the stream: five tensors [t] and three [T]."""

    def mask_mod(b, h, q, k):
        visible = (own_document[q] == document[k]) & (k <= rows[q]) & (positions[k] > behind[q])
        return visible & ((branch[k] == own_branch[q]) | ((branch[k] == 0) & (k < limit[q])))

    return mask_mod
