"""Documents -> micro-batches -> the packed stream.

T tokens of the stream, D documents, B sequences, N scored tokens (see the batch contract: tokens, positions, cu_docs, at, targets,
seq, seq_lens, doc_of_seq, row).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from treetune.core.data import order, trees
from treetune.core.data.shared_prefixes import SharedDoc

WINDOW = 8192  # documents
READS = ("tokens", "last", "classes")


class Tokens(Protocol):
    """A document of any kind."""

    @property
    def tokens(self) -> np.ndarray:
        """Ids, int32 [n]."""
        ...


class BareDoc(Tokens, Protocol):
    """A document without branches."""

    @property
    def weight(self) -> np.ndarray:
        """Weights, float32 [n]; a token with one above 0 is scored."""
        ...

    @property
    def row(self) -> int:
        """Number of the data set row."""
        ...


class Branched(Tokens, Protocol):
    """A document with branches."""

    @property
    def branch(self) -> np.ndarray:
        """Number of the branch of each token, int32 [n]."""
        ...

    @property
    def start(self) -> np.ndarray:
        """Trunk tokens that it sees, int32 [n]."""
        ...


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
    indices = range(len(lengths)) if seed is None else order.permutation(len(lengths), seed, order.DOCUMENTS)
    return [group for start in range(0, len(lengths), window) for group in _best_fit(indices[start : start + window], lengths, budget)]


def _best_fit(indices: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Longest first, each into the group with the least room that still holds it."""
    groups: list[list[int]] = []
    budget = min(budget, sum(lengths[i] for i in indices))  # one group takes all from there on, and rooms are counted below
    by_room: list[list[int]] = [[] for _ in range(budget + 1)]
    # Bit r is set when some group has room r: the lowest set bit from `length` up is the best fit. One shift of a long integer takes
    # the place of a search through the groups.
    rooms = 0
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


def group_rows(lengths: Sequence[int], rows_per_batch: int, *, seed: int | None = None) -> list[list[int]]:
    """Document indices in groups of `rows_per_batch`, in the order given or shuffled by `seed`; the last group may be smaller."""
    if rows_per_batch < 1:
        raise ValueError(f"rows per micro-batch is {rows_per_batch}: expected at least 1")
    indices = list(range(len(lengths))) if seed is None else order.permutation(len(lengths), seed, order.DOCUMENTS)
    return [indices[start : start + rows_per_batch] for start in range(0, len(indices), rows_per_batch)]


def collate(docs: Sequence[BareDoc], *, budget: int | None = None, pad: bool = False, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """The packed stream of bare trunks: one sequence per document, one scored token per weight above 0.

    `pad` fills the stream to `budget` tokens with a document that nothing reads. No documents at all give a legal stream of one
    such token, so that a rank without work can still take part in a step. `weight` is there only when some weight is not 1.
    Errors: ValueError when the documents hold more than `budget` tokens.
    """
    lengths, filler = _filled(docs, budget, pad)
    stream = _stream(docs, lengths + [filler] * (filler > 0), pad_id)
    batch = stream | _reads(docs, lengths)
    check_stream(batch)
    return batch


def collate_trees(
    docs: Sequence[trees.TreeDoc],
    *,
    read: str = "tokens",
    prompts: bool = False,
    budget: int | None = None,
    pad: bool = False,
    pad_id: int = 0,
) -> dict[str, torch.Tensor]:
    """The packed stream of documents with branches: one sequence per branch, in order, or one for a document without any.

    read: "tokens" reads the row that predicts each scored token (for the first token of a branch, the last trunk token it sees);
    "last" the last token of each sequence, for a scalar head, without targets; "classes" the tokens that have a class, their targets.
    With pairs, sequence 2i is the chosen and 2i + 1 the rejected side of pair i. Extras of the documents become keys of axis B, their
    values keys of axis N. prompts: the trunks' own tokens are read as well, by `prompt_at` and `prompt_targets`.
    Errors: ValueError when the documents hold more than `budget` tokens.
    """
    if read not in READS:
        raise ValueError(f"read is {read!r}: expected one of {', '.join(READS)}")
    lengths, filler = _filled(docs, budget, pad)
    stream = _stream(docs, lengths + [filler] * (filler > 0), pad_id)
    stream |= _branches(docs, filler)
    batch = stream | _tree_reads(docs, lengths, read) | _extras(docs) | (_prompts(docs, lengths) if prompts else {})
    check_trees(batch, read)
    return batch


def collate_shared(docs: Sequence[SharedDoc], *, budget: int | None = None, pad: bool = False, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """The packed stream of documents that share beginnings: their sequences in order, each read where it is said.

    A last target is not among the tokens, and several sequences may be read at one row. Errors: as of `collate_trees`.
    """
    lengths, filler = _filled(docs, budget, pad)
    stream = _stream(docs, lengths + [filler] * (filler > 0), pad_id) | _branches(docs, filler)
    starts, targets = np.cumsum([0, *lengths])[: len(docs)], [part for doc in docs for part in doc.targets]
    counts = np.array([len(part) for part in targets], dtype=np.int64)
    return stream | {
        "at": _int64(_joined([start + rows for start, doc in zip(starts, docs, strict=True) for rows in doc.reads], np.int64)),  # [N]
        "targets": _int64(_joined(targets, np.int64)),  # [N]
        "seq": _int64(np.repeat(np.arange(len(counts)), counts)),  # [N]
        "seq_lens": _int64(counts),  # [B]
        "doc_of_seq": _int64(np.repeat(np.arange(len(docs)), [len(doc.reads) for doc in docs])),  # [B]
        "row": _int64(np.array([i for doc in docs for i in doc.sequences], dtype=np.int64)),  # [B]
    }


def collate_branch(docs: Sequence[trees.TreeDoc], *, branch: int, **options: Any) -> dict[str, torch.Tensor]:
    """The stream of documents with one of their branches only."""
    return collate_trees([trees.single_branch(doc, branch) for doc in docs], **options)


def _filled(docs: Sequence[Tokens], budget: int | None, pad: bool) -> tuple[list[int], int]:
    """(tokens of each document, tokens of padding behind them)."""
    lengths = [len(doc.tokens) for doc in docs]
    token_count = sum(lengths)
    if budget is not None and token_count > budget:
        raise ValueError(f"{len(docs)} documents hold {token_count} tokens, more than the budget of {budget}")
    if pad and budget is None:
        raise ValueError("pad needs the budget to fill")
    # A rank without documents takes part in the step all the same, so its stream has one token of padding.
    return lengths, budget - token_count if pad and budget is not None else int(not docs)


def _branches(docs: Sequence[Branched], filler: int) -> dict[str, torch.Tensor]:
    """Positions and further keys of axis T, where a document has branches."""
    if not any(doc.branch[-1] for doc in docs):
        return {}
    none, positions = [np.zeros(filler, np.int32)], [_places(doc) for doc in docs] + [np.arange(filler)]
    keys = {name: torch.from_numpy(np.concatenate([getattr(doc, name) for doc in docs] + none)) for name in ("branch", "start")}
    return keys | {"positions": _int64(np.concatenate(positions))}


def _places(doc: Branched) -> np.ndarray:
    """Position of each token in its document, branches continued from where they leave the trunk."""
    return np.arange(len(doc.tokens)) - np.searchsorted(doc.branch, doc.branch, "left") + doc.start


def _tree_reads(docs: Sequence[trees.TreeDoc], lengths: list[int], read: str) -> dict[str, torch.Tensor]:
    """Keys with axis N or B; `read` chooses the rows of axis N."""
    starts = np.cumsum([0, *lengths])[: len(docs)]
    parts = [(start, doc, indices) for start, doc in zip(starts, docs, strict=True) for indices in trees.branches(doc)]
    scored = [_scored(doc, indices, read) for _, doc, indices in parts]
    predictors = [rows if read != "tokens" else _before(doc, rows) for (_, doc, _), rows in zip(parts, scored, strict=True)]
    counts = np.array([len(rows) for rows in scored], dtype=np.int64)
    keys = {
        "at": _int64(_joined([start + rows for (start, _, _), rows in zip(parts, predictors, strict=True)], np.int64)),  # [N]
        "seq": _int64(np.repeat(np.arange(len(parts)), counts)),  # [N]
        "seq_lens": _int64(counts),  # [B]
        "doc_of_seq": _int64(np.repeat(np.arange(len(docs)), [len(trees.branches(doc)) for doc in docs])),  # [B]
        "row": _int64(np.array([doc.row for _, doc, _ in parts])),  # [B]
    }
    if read == "last":
        return keys
    pick = [_targets(doc, read)[rows] for (_, doc, _), rows in zip(parts, scored, strict=True)]
    weight = _joined([doc.weight[rows] for (_, doc, _), rows in zip(parts, scored, strict=True)], np.float32)
    keys["targets"] = _int64(_joined(pick, np.int64))  # [N]
    for name in docs[0].values or () if docs else ():
        values = [(doc.values or {})[name][rows] for (_, doc, _), rows in zip(parts, scored, strict=True)]
        keys[name] = torch.from_numpy(_joined(values, np.float32))  # [N]
    return keys | ({"weight": torch.from_numpy(weight)} if (weight != 1.0).any() else {})


def _prompts(docs: Sequence[trees.TreeDoc], lengths: list[int]) -> dict[str, torch.Tensor]:
    """Rows of the trunks that predict the next trunk token, and these tokens."""
    starts, sizes = np.cumsum([0, *lengths])[: len(docs)], [int((doc.branch == 0).sum()) for doc in docs]
    rows = [start + np.arange(size - 1) for start, size in zip(starts, sizes, strict=True)]
    targets = [doc.tokens[1:size] for doc, size in zip(docs, sizes, strict=True)]
    return {"prompt_at": _int64(_joined(rows, np.int64)), "prompt_targets": _int64(_joined(targets, np.int64))}  # [M]


def scored_tokens(doc: trees.TreeDoc) -> np.ndarray:
    """Indices of a document's scored tokens in the order in which a stream reads them."""
    return np.concatenate([_scored(doc, indices, "tokens") for indices in trees.branches(doc)])


def _scored(doc: trees.TreeDoc, indices: np.ndarray, read: str) -> np.ndarray:
    """Indices in the document of the tokens of one sequence that count."""
    if read == "last":
        return indices[-1:]
    return indices[(doc.weight if read == "tokens" else _targets(doc, read) + 1)[indices] > 0]


def _targets(doc: trees.TreeDoc, read: str) -> np.ndarray:
    """Targets at each token of a document: the tokens, or their classes."""
    if read != "classes":
        return doc.tokens
    assert doc.classes is not None, "a document without classes cannot be read by classes"
    return doc.classes


def _before(doc: trees.TreeDoc, indices: np.ndarray) -> np.ndarray:
    """Indices in the document of the tokens that predict the tokens `indices`."""
    # The first token of a branch follows the last trunk token that it sees, which is not the token before it in the stream.
    first = np.searchsorted(doc.branch, doc.branch[indices], "left") == indices
    return np.where(first & (doc.branch[indices] > 0), doc.start[indices] - 1, indices - 1)


def _extras(docs: Sequence[trees.TreeDoc]) -> dict[str, torch.Tensor]:
    # A key of axis B needs a value for every sequence, so documents with other extras cannot share a batch.
    names = docs[0].extras.keys() if docs else ()
    assert all(doc.extras.keys() == names for doc in docs), "documents of one batch have different extras"
    return {name: torch.tensor([value for doc in docs for value in doc.extras[name]]) for name in names}


def _stream(docs: Sequence[Tokens], lengths: list[int], pad_id: int) -> dict[str, torch.Tensor]:
    """Keys with axis T or D + 1. Lengths beyond the documents' own are padding documents."""
    token_arrays = [doc.tokens for doc in docs]
    padding = [np.full(length, pad_id) for length in lengths[len(docs) :]]
    return {
        "tokens": _int64(np.concatenate(token_arrays + padding)),  # [T]
        "positions": _int64(np.concatenate([np.arange(length) for length in lengths])),  # [T]
        "cu_docs": torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),  # [D + 1]
    }


def _reads(docs: Sequence[BareDoc], lengths: list[int]) -> dict[str, torch.Tensor]:
    """Keys with axis N or B: the row before each scored token predicts it."""
    starts = np.cumsum([0, *lengths])[: len(docs)]
    scored = [np.flatnonzero(doc.weight) for doc in docs]
    counts = np.array([len(indices) for indices in scored], dtype=np.int64)
    weight = _joined([doc.weight[indices] for doc, indices in zip(docs, scored, strict=True)], np.float32)
    keys = {
        "at": _int64(_joined([start + indices - 1 for start, indices in zip(starts, scored, strict=True)], np.int64)),  # [N]
        "targets": _int64(_joined([doc.tokens[indices] for doc, indices in zip(docs, scored, strict=True)], np.int64)),  # [N]
        "seq": _int64(np.repeat(np.arange(len(docs)), counts)),  # [N]
        "seq_lens": _int64(counts),  # [B]
        "doc_of_seq": _int64(np.arange(len(docs))),  # [B]
        "row": _int64(np.array([doc.row for doc in docs])),  # [B]
    }
    return keys | ({"weight": torch.from_numpy(weight)} if (weight != 1.0).any() else {})


def check_stream(batch: dict[str, torch.Tensor]) -> None:
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


def check_trees(batch: dict[str, torch.Tensor], read: str = "tokens") -> None:
    """Invariants of a stream with branches. Errors: AssertionError."""
    if "branch" not in batch and read == "tokens":
        check_stream(batch)
        return
    total, bounds = len(batch["tokens"]), batch["cu_docs"].long()
    assert bounds[0] == 0 and bounds[-1] == total and (bounds[1:] > bounds[:-1]).all(), "document borders do not tile the stream"
    assert len(batch["at"]) == len(batch["seq"]) == batch["seq_lens"].sum(), "reads do not match the sequences"
    assert (batch["seq"] == torch.arange(len(batch["seq_lens"])).repeat_interleave(batch["seq_lens"])).all(), "sequences are not in order"
    document = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    assert (document[batch["at"]] == batch["doc_of_seq"][batch["seq"]]).all(), "a row is read for a sequence of another document"
    if "branch" in batch and read == "tokens":
        _check_branches(batch, bounds, document)


def _check_branches(batch: dict[str, torch.Tensor], bounds: torch.Tensor, document: torch.Tensor) -> None:
    branch, start, base = batch["branch"].long(), batch["start"].long(), bounds[document]
    new = torch.cat([torch.ones(1, dtype=torch.bool), (branch.diff() != 0) | (document.diff() != 0)])
    before = torch.where(new & (branch > 0), base + start - 1, torch.arange(len(branch)) - 1)
    assert (branch[bounds[:-1]] == 0).all() and (start[branch == 0] == 0).all(), "a document does not begin with its trunk"
    assert (batch["positions"][new] == start[new]).all(), "a branch does not continue from where it leaves the trunk"
    # One sorted key for (document, branch, token before): whether a row predicts a token of its sequence is a search, not a loop.
    first = torch.searchsorted(batch["doc_of_seq"], batch["doc_of_seq"])
    branch_of_seq = torch.arange(len(first)) - first + (branch[bounds[1:] - 1] > 0)[batch["doc_of_seq"]].long()  # branch of each sequence
    key = (document * (branch.max() + 1) + branch) * len(branch) + before
    read = (batch["doc_of_seq"][batch["seq"]] * (branch.max() + 1) + branch_of_seq[batch["seq"]]) * len(branch) + batch["at"]
    order = key.sort()
    matches = torch.searchsorted(order.values, read).clamp(max=len(key) - 1)
    assert (order.values[matches] == read).all(), "a row is read that predicts no token of its sequence"
    assert (batch["tokens"][order.indices[matches]] == batch["targets"]).all(), "a target is not the token that its row predicts"


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _int64(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
