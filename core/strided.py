"""Where strided rollouts stand: anchors of documents, and the token trees of rollouts from them, as functions of lengths.

An anchor a of a document is the position of the first token of a block; rollouts from it continue the a tokens before it, and the
block's own G tokens are the ground truth. n rollouts from each of K anchors are n K branches of one trunk, computed once.
D documents, T tokens of the documents end to end, M anchors of all documents, R = M n rollouts, G tokens of a block,
P = T + R G rows of the tree stream, B sequences. Rollout m n + j is rollout j of anchor m; anchors are in stream order.
Source: Energy-Based Fine-Tuning; its strided mode places the blocks of a document `stride` tokens apart.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.core.state import Batch


class Anchors(NamedTuple):
    """Blocks of documents: document int64 [M], sorted; start int64 [M], tokens of the document before the block; tokens of a block."""

    document: Tensor
    start: Tensor
    length: int


class Layout(NamedTuple):
    """Rows of the stream in which each document is followed by its rollouts. See `tokens` and `grow` for its use.

    positions int64, branch and start int32 [P], cu_docs int32 [D + 1]: the keys of the batch.
    trunk int64 [T]: the row of each document token.  generated int64 [R, G]: the row of each generated token.
    source int64 [R, G]: the row that predicts it, a - 1 of the trunk for the first.  truth int64 [M, G]: the rows of the true block.
    """

    positions: Tensor
    branch: Tensor
    start: Tensor
    cu_docs: Tensor
    trunk: Tensor
    generated: Tensor
    source: Tensor
    truth: Tensor


def first(prompt_lengths: Tensor, *, context_length: int, min_completion_prefix: int = 0) -> Tensor:
    """First anchor of each document: max(prompt + min_completion_prefix, context_length), or context_length for raw text.

    prompt_lengths int64 [D] in tokens, 0 for raw text, to which min_completion_prefix does not apply. -> int64 [D].
    """
    after = (prompt_lengths + min_completion_prefix).clamp(min=context_length)
    return after.where(prompt_lengths > 0, context_length)


def counts(lens: Tensor, first: Tensor, *, stride: int, generate_max_len: int) -> Tensor:
    """Anchors of each document: floor((S - G - A) / stride) + 1, and 0 where S < A + G; lens S, first A -> int64 [D]."""
    return ((lens - generate_max_len - first).div(stride, rounding_mode="floor") + 1).clamp(min=0)


def anchors(
    lens: Tensor,
    *,
    stride: int,
    context_length: int,
    generate_max_len: int,
    prompt_lengths: Tensor | None = None,
    min_completion_prefix: int = 0,
) -> Anchors:
    """Anchors A, A + stride, ... of each document whose true block of G = generate_max_len tokens lies inside the document.

    lens int64 [D]: tokens of each document without padding (see `lengths`); prompt_lengths int64 [D], default raw text.
    A document that is too short for one block has none. Raises ValueError for options out of range.
    """
    sizes = {"stride": (stride, 1), "context_length": (context_length, 1), "generate_max_len": (generate_max_len, 1)}
    for name, (value, least) in (sizes | {"min_completion_prefix": (min_completion_prefix, 0)}).items():
        if value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}")
    prompts = torch.zeros_like(lens) if prompt_lengths is None else prompt_lengths
    if prompts.shape != lens.shape:
        raise ValueError(f"prompt_lengths has shape {list(prompts.shape)}; expected {list(lens.shape)}, one per document")
    begin = first(prompts, context_length=context_length, min_completion_prefix=min_completion_prefix)
    per_document = counts(lens, begin, stride=stride, generate_max_len=generate_max_len)
    document = torch.arange(lens.shape[0], device=lens.device).repeat_interleave(per_document)
    number = torch.arange(document.shape[0], device=lens.device) - (per_document.cumsum(0) - per_document)[document]
    return Anchors(document, begin[document] + stride * number, generate_max_len)


def trained_blocks(blocks: Anchors, cu_docs: Tensor, scored: Tensor) -> Anchors:
    """The anchors whose whole true block is trained: scored bool [T] of the documents' tokens, cu_docs [D + 1] their bounds.

    In a conversation these are blocks of the assistant's words; one that reaches into another turn has no truth to be compared with.
    """
    rows = prefix_rows(cu_docs, blocks)[:, None] + 1 + torch.arange(blocks.length, device=scored.device)  # [M, G]
    whole = scored[rows].all(1)
    return blocks._replace(document=blocks.document[whole], start=blocks.start[whole])


def scored(batch: Batch) -> Tensor:
    """Which tokens of a stream of bare documents are trained: bool [T]."""
    return torch.zeros(batch["tokens"].shape[0], dtype=torch.bool, device=batch["at"].device).index_fill(0, batch["at"] + 1, True)


def lengths(batch: Batch) -> Tensor:
    """Tokens of each document of a stream, int64 [D]; 0 for a padding document, which no sequence belongs to."""
    lens = batch["cu_docs"].long().diff()
    real = torch.zeros_like(lens).scatter(0, batch["doc_of_seq"], 1)
    return lens * real


def prefix_rows(cu_docs: Tensor, blocks: Anchors) -> Tensor:
    """Rows of the stream of documents that predict the first token of each anchor's block: int64 [M]."""
    return cu_docs.long()[blocks.document] + blocks.start - 1


def layout(cu_docs: Tensor, blocks: Anchors, n: int) -> Layout:
    """The tree stream of n rollouts from each anchor of the documents bounded by cu_docs [D + 1], padding documents included.

    Raises ValueError for n below 1, or anchors that are out of order or outside their documents.
    """
    bounds = cu_docs.long()
    lens = bounds.diff()
    check(lens, blocks, n)
    document, start = blocks.document.repeat_interleave(n), blocks.start.repeat_interleave(n)  # [R]
    branches = torch.bincount(document, minlength=lens.shape[0])
    cu = F.pad((lens + branches * blocks.length).cumsum(0), (1, 0))  # [D + 1]
    number = torch.arange(document.shape[0], device=lens.device) - (branches.cumsum(0) - branches)[document]
    step = torch.arange(blocks.length, device=lens.device)  # [G]
    generated = (cu[document] + lens[document] + number * blocks.length)[:, None] + step
    source = torch.cat([(cu[document] + start - 1)[:, None], generated[:, :-1]], dim=1)
    inside = torch.arange(int(bounds[-1]), device=lens.device) - bounds[:-1].repeat_interleave(lens)  # [T]
    trunk = inside + cu[:-1].repeat_interleave(lens)
    zeros = torch.zeros(int(cu[-1]), dtype=torch.int64, device=lens.device)
    continued = start[:, None] + step
    return Layout(
        positions=zeros.index_copy(0, trunk, inside).index_copy(0, generated.flatten(), continued.flatten()),
        branch=zeros.index_copy(0, generated.flatten(), (number + 1).repeat_interleave(blocks.length)).int(),
        start=zeros.index_copy(0, generated.flatten(), start.repeat_interleave(blocks.length)).int(),
        cu_docs=cu.int(),
        trunk=trunk,
        generated=generated,
        source=source,
        truth=(cu[blocks.document] + blocks.start)[:, None] + step,
    )


def check(lens: Tensor, blocks: Anchors, n: int) -> None:
    """Raise ValueError unless n is at least 1 and the anchors are in order, each with a token before it, inside documents of lens [D]."""
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1 rollout from each anchor")
    document, start = blocks.document, blocks.start
    if document.numel() == 0:
        return
    if bool((document.diff() < 0).any()) or int(document[0]) < 0 or int(document[-1]) >= lens.shape[0]:
        raise ValueError(f"anchors name documents {document.tolist()}; expected numbers below {lens.shape[0]} in rising order")
    wrong = ((start < 1) | (start > lens[document])).nonzero()
    if wrong.numel():
        index = int(wrong[0])
        raise ValueError(
            f"anchor {index} starts after {int(start[index])} tokens of document {int(document[index])}; "
            f"expected 1 to {int(lens[document[index]])}, the tokens of the document"
        )


def tokens(layout: Layout, trunk: Tensor, generated: Tensor) -> Tensor:
    """The tokens [P] of the tree stream from those of the documents [T] and of the rollouts [R, G]."""
    if generated.shape != layout.generated.shape:
        raise ValueError(f"rollouts of shape {list(generated.shape)}; expected {list(layout.generated.shape)}, as laid out")
    empty = trunk.new_zeros(layout.positions.shape[0])
    return empty.index_copy(0, layout.trunk, trunk).index_copy(0, layout.generated.flatten(), generated.flatten())


def grow(batch: Batch, blocks: Anchors, generated: Tensor, n: int) -> tuple[Batch, Layout]:
    """The stream of documents with their rollouts generated [R, G], and where everything stands.

    at, targets [R G]: the rollouts' tokens and the rows that predict them, rollout by rollout; each rollout is a sequence.
    prompt_at, prompt_targets [N of the given stream]: the scored document tokens, for the cross-entropy term, once per document
    whatever n is. A document without anchors keeps one empty sequence, so that its row and its randomness stay its own;
    `sequences` says which sequences are rollouts. Padding documents stay without.

    Raises ValueError for a stream that branches already, or whose tokens have weights.
    """
    if keys := [key for key in ("branch", "weight") if key in batch]:
        raise ValueError(f"the stream has {', '.join(keys)}; expected bare documents whose tokens are scored or not")
    place = layout(batch["cu_docs"], blocks, n)
    real, rows = _per_document(batch, torch.ones_like(batch["row"])), document_rows(batch)
    branches = torch.bincount(blocks.document, minlength=rows.shape[0]) * n  # [D]
    each = torch.maximum(branches, real)  # sequences of each document
    doc_of_seq = torch.arange(rows.shape[0], device=rows.device).repeat_interleave(each)
    seq_lens = blocks.length * (branches[doc_of_seq] > 0)
    grown = {
        "tokens": tokens(place, batch["tokens"], generated.to(batch["tokens"])),
        "positions": place.positions, "branch": place.branch, "start": place.start, "cu_docs": place.cu_docs,
        "at": place.source.flatten(), "targets": generated.to(batch["tokens"]).flatten(),
        "seq": torch.arange(int(each.sum()), device=rows.device).repeat_interleave(seq_lens), "seq_lens": seq_lens,
        "doc_of_seq": doc_of_seq, "row": rows[doc_of_seq],
        "prompt_at": place.trunk[batch["at"]], "prompt_targets": batch["targets"],
    }  # fmt: skip
    return grown | ({"seed": batch["seed"]} if "seed" in batch else {}), place


def sequences(grown: Batch) -> Tensor:
    """The sequences of a grown stream that are rollouts, int64 [R], in the order of the rollouts."""
    return grown["seq_lens"].nonzero()[:, 0]


def document_rows(batch: Batch) -> Tensor:
    """The data set row of each document, int64 [D]; 0 for a padding document."""
    return _per_document(batch, batch["row"])


def _per_document(batch: Batch, values: Tensor) -> Tensor:
    """Values [B] of sequences at their documents [D], 0 where a document has none."""
    none = torch.zeros(batch["cu_docs"].shape[0] - 1, dtype=torch.int64, device=batch["cu_docs"].device)
    return none.scatter(0, batch["doc_of_seq"], values)
