"""Documents -> micro-batches -> the packed stream.

T tokens of the stream, D documents, B sequences, N scored tokens (see the batch contract: tokens, positions, cu_docs, at, targets,
seq, seq_lens, doc_of_seq, row).
"""

from collections.abc import Sequence

import numpy as np
import torch

from treetune.core.data import order, spans

WINDOW = 8192


def pack(lengths: Sequence[int], budget: int, *, seed: int | None = 0, window: int = WINDOW) -> list[list[int]]:
    """Document indices in groups of at most `budget` tokens: whole documents, each in exactly one group.

    Best-fit decreasing inside windows of `window` documents, taken from a shuffled order (`seed`) or, with seed None, from the
    order given; so a group mixes documents of one window only. The same arguments always give the same groups.
    Errors: ValueError when a document is longer than the budget.
    """
    if len(lengths) and max(lengths) > budget:
        worst = max(range(len(lengths)), key=lengths.__getitem__)
        raise ValueError(
            f"document {worst} has {lengths[worst]} tokens, more than the budget of {budget} per micro-batch: raise the budget"
        )
    indices = range(len(lengths)) if seed is None else order.shuffled(len(lengths), seed, order.DOCUMENTS)
    return [group for start in range(0, len(lengths), window) for group in _best_fit(indices[start : start + window], lengths, budget)]


def _best_fit(indices: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Longest first, each into the group with the least room that still holds it."""
    groups: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(budget + 1)]
    rooms = 0  # bit r is set when some group has room r: the lowest set bit from `length` up is the best fit
    rank = {index: position for position, index in enumerate(indices)}
    for index in sorted(indices, key=lambda i: (-lengths[i], rank[i])):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            group = by_room[room].pop()
            rooms ^= 0 if by_room[room] else 1 << room
        else:
            room, group = budget, len(groups)
            groups.append([])
        groups[group].append(index)
        by_room[room - length].append(group)
        rooms |= 1 << (room - length)
    return [sorted(group, key=rank.__getitem__) for group in groups]


def in_order(lengths: Sequence[int], rows_per_batch: int, *, seed: int | None = None) -> list[list[int]]:
    """Document indices in groups of `rows_per_batch`, in the order given or shuffled by `seed`; the last group may be smaller."""
    if rows_per_batch < 1:
        raise ValueError(f"rows per micro-batch is {rows_per_batch}: expected at least 1")
    indices = list(range(len(lengths))) if seed is None else order.shuffled(len(lengths), seed, order.DOCUMENTS)
    return [indices[start : start + rows_per_batch] for start in range(0, len(indices), rows_per_batch)]


def collate(docs: Sequence[spans.Doc], *, budget: int | None = None, pad: bool = False, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """The packed stream of bare trunks: one sequence per document, one scored token per weight above 0.

    `pad` fills the stream to `budget` tokens with a document that nothing reads. No documents at all give a legal stream of one
    such token, so that a rank without work can still take part in a step. `weight` is there only when some weight is not 1.
    Errors: ValueError when the documents hold more than `budget` tokens.
    """
    lengths = [len(doc.tokens) for doc in docs]
    used = sum(lengths)
    if budget is not None and used > budget:
        raise ValueError(f"{len(docs)} documents hold {used} tokens, more than the budget of {budget}")
    if pad and budget is None:
        raise ValueError("pad needs the budget to fill")
    filler = budget - used if pad else int(not docs)
    stream = _stream(docs, lengths + [filler] * (filler > 0), pad_id)
    batch = stream | _reads(docs, lengths)
    check(batch)
    return batch


def _stream(docs: Sequence[spans.Doc], lengths: list[int], pad_id: int) -> dict[str, torch.Tensor]:
    """Keys with axis T or D + 1. Lengths beyond the documents' own are padding documents."""
    used = [doc.tokens for doc in docs]
    padding = [np.full(length, pad_id) for length in lengths[len(docs) :]]
    return {
        "tokens": _int64(np.concatenate(used + padding)),  # [T]
        "positions": _int64(np.concatenate([np.arange(length) for length in lengths])),  # [T]
        "cu_docs": torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),  # [D + 1]
    }


def _reads(docs: Sequence[spans.Doc], lengths: list[int]) -> dict[str, torch.Tensor]:
    """Keys with axis N or B: the row before each scored token predicts it."""
    starts = np.cumsum([0, *lengths])[: len(docs)]
    scored = [np.flatnonzero(doc.weight) for doc in docs]
    counts = np.array([len(at) for at in scored], dtype=np.int64)
    weight = _joined([doc.weight[at] for doc, at in zip(docs, scored, strict=True)], np.float32)
    keys = {
        "at": _int64(_joined([start + at - 1 for start, at in zip(starts, scored, strict=True)], np.int64)),  # [N]
        "targets": _int64(_joined([doc.tokens[at] for doc, at in zip(docs, scored, strict=True)], np.int64)),  # [N]
        "seq": _int64(np.repeat(np.arange(len(docs)), counts)),  # [N]
        "seq_lens": _int64(counts),  # [B]
        "doc_of_seq": _int64(np.arange(len(docs))),  # [B]
        "row": _int64(np.array([doc.row for doc in docs])),  # [B]
    }
    return keys | ({"weight": torch.from_numpy(weight)} if (weight != 1.0).any() else {})


def check(batch: dict[str, torch.Tensor]) -> None:
    """Invariants of a stream; they hold for whatever collate builds. Errors: AssertionError."""
    total, bounds = len(batch["tokens"]), batch["cu_docs"]
    assert bounds[0] == 0 and bounds[-1] == total and (bounds[1:] > bounds[:-1]).all(), "document borders do not tile the stream"
    assert len(batch["positions"]) == total and (batch["positions"][bounds[:-1].long()] == 0).all(), (
        "positions do not restart with documents"
    )
    assert len(batch["at"]) == len(batch["targets"]) == len(batch["seq"]) == batch["seq_lens"].sum(), "reads do not match the sequences"
    following = batch["at"] + 1
    assert (following < total).all() and (batch["tokens"][following] == batch["targets"]).all(), "a target is not the token after its row"
    assert (batch["positions"][following] > 0).all(), "a document's first token is scored across its border"


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _int64(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
