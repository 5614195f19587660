"""Documents of strided rollouts: from rows to documents with room for blocks, what became of the rows, and the stream of documents.

n tokens of one document, D documents, B sequences. A document has a `prompt_length`, 0 for raw text; see `ebft.StridedDoc`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from treetune.core import strided
from treetune.core.data import ebft, formats, pack, reporting, row_formats, sources, trees
from treetune.core.data.rows import Advance
from treetune.core.protocols import Tokenizer

PRETOKENISED = "pretokenised"
SPLIT = ("ebft_pretrain.transform",)  # raw text, which is split where it is too long
NO_BLOCK = "no room for a block: shorter than context_length + generate_max_len, prompt apart"


class Places(NamedTuple):
    """Where blocks are, as `strided.anchors` takes it. needed: a document without any is dropped, as nothing else trains."""

    stride: int = 8
    context_length: int = 8
    generate_max_len: int = 8
    min_completion_prefix: int = 0
    needed: bool = False


class StridedReport(NamedTuple):
    """What became of the rows. Token counts and blocks are of the documents that came out."""

    format: str
    rows: int
    docs: int
    dropped: dict[str, int]  # rows by reason
    truncated: int  # documents cut at sequence_len
    split: int  # rows divided into several documents
    tokens: int = 0
    supervised: int = 0
    longest: int = 0  # tokens of the longest document before the length policy
    blocks: int = 0
    short: int = 0  # documents that have no block
    left: bool = False  # whether these are dropped
    unread: tuple[str, ...] = ()  # columns that nothing reads
    sizes: reporting.LengthCounts = ()  # of the documents before the length policy
    ending: str = ""


def detect(columns: Sequence[str], row: Mapping[str, Any] | None = None) -> str:
    """The transform that the columns mean. Errors: ValueError listing what is known."""
    if (detected := row_formats.detect("strided", columns)) is not None:
        return detected.name
    needs = " + ".join(" or ".join(names) for names in ebft.ANSWERED)
    raise ValueError(
        f"the columns {sources.join_names(columns)} do not tell the format: ebft_pretrain.transform needs text, "
        f"ebft_strided_chat.transform messages or conversations, ebft_strided_structured.transform {needs}, pretokenised input_ids; "
        "rename columns, or name one"
    )


def takes(name: str, row: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Options of a format."""
    return row_formats.of_kind("strided")[name].options


def talks(name: str) -> bool:
    """Whether rows of a format are conversations."""
    formats_ = row_formats.of_kind("strided")
    return name in formats_ and formats_[name].options == row_formats.CHAT


def canonical(name: str) -> str:
    """A name as users write it, `.transform` left out or not. Errors: ValueError listing all for an unknown one."""
    formats_ = row_formats.of_kind("strided")
    whole = next((format_name for format_name in (name, f"{name}.transform") if format_name in formats_), None)
    if whole is None:
        raise ValueError(f"unknown format {name!r}: expected one of {', '.join(formats_)}")
    return whole


def encode_rows(
    rows: sources.Rows,
    tokenizer: Tokenizer,
    *,
    format: str,
    format_options: Mapping[str, Any] | None = None,
    sequence_len: int | None = None,
    overlong: str | None = None,
    progress: Advance = lambda rows: None,
    places: Places,
) -> tuple[list[ebft.StridedDoc], StridedReport]:
    """Documents of the rows, in their order, and what became of the rows.

    overlong: for documents with a prompt that have more than sequence_len tokens: "truncate" (the completion goes first), "drop" or
    "error". Raw text is split; parts overlap by one token, so that every token but the first is still predicted once.
    Errors: ValueError for bad rows (named), options that the format does not take, and when no document is left.
    """
    if extra := [key for key in format_options or {} if key not in takes(format)]:
        raise ValueError(f"format {format} takes no {', '.join(extra)}; it takes {', '.join(takes(format)) or 'no options'}")
    trees.check_length(sequence_len, overlong or "truncate")
    rows = sources.track_reads(rows)
    read, unread = row_formats.of_kind("strided")[format].reader(rows, tokenizer, **(format_options or {})), sources.unread_columns(rows)
    if sources.SYSTEM in unread and format not in (PRETOKENISED, *SPLIT):
        raise sources.unplaced_system(rows, unread[sources.SYSTEM], format)
    progress(len(rows.rows))
    dropped, docs, cut = Counter({formats.EMPTY: len(rows.rows) - len(read)}), [], Counter()
    for doc in read:
        row_docs, outcome = _fit(doc._replace(weight=(doc.weight > 0).astype(np.float32)), sequence_len, overlong or "truncate", rows)
        docs += row_docs
        (cut if row_docs else dropped)[outcome] += bool(outcome)
    counts = count_blocks(docs, places)
    docs = [doc for doc, count in zip(docs, counts, strict=True) if count or not places.needed]
    tally = StridedReport(format, len(rows.rows), len(docs), {reason: n for reason, n in dropped.items() if n}, cut["cut"], cut["split"])
    details = {"unread": tuple(unread), "sizes": reporting.count_lengths(len(doc.tokens) for doc in read)}
    report = _counted(tally._replace(left=places.needed, **details), docs, read, counts)
    if not docs:
        raise ValueError(_nothing(report, rows))
    return docs, report


def _counted(report: StridedReport, docs: Sequence[ebft.StridedDoc], read: Sequence[ebft.StridedDoc], counts: np.ndarray) -> StridedReport:
    return report._replace(
        tokens=sum(len(doc.tokens) for doc in docs),
        supervised=int(sum(doc.weight.sum() for doc in docs)),
        longest=max((len(doc.tokens) for doc in read), default=0),
        blocks=int(counts.sum()),
        short=int((counts == 0).sum()),
    )


def _fit(doc: ebft.StridedDoc, size: int | None, overlong: str, rows: sources.Rows) -> tuple[list[ebft.StridedDoc], str]:
    """(the document under the length policy, "cut" or "split" if it is another; none, and why)."""
    if doc.prompt_length >= len(doc.tokens):
        return [], formats.EMPTY
    if size is None or len(doc.tokens) <= size:
        return [doc], ""
    if doc.prompt_length == 0:
        return [part for start in range(0, len(doc.tokens) - 1, size - 1) if (part := _part(doc, start, size)).weight.any()], "split"
    if overlong == "error":
        location = sources.locate_row(rows, rows.numbers.index(doc.row))
        raise ValueError(f"{location} has {len(doc.tokens)} tokens, more than sequence_len {size}: raise it, or set overlong to truncate")
    if overlong == "drop":
        return [], trees.TOO_LONG
    cut_docs = ebft.truncate_docs([doc], size)
    return cut_docs, "cut" if cut_docs else trees.FULL


def _part(doc: ebft.StridedDoc, start: int, size: int) -> ebft.StridedDoc:
    weight = doc.weight[start : start + size].copy()
    weight[:1] = 0.0  # nothing in this part predicts its first token; the part before ends with it
    return doc._replace(tokens=doc.tokens[start : start + size], weight=weight)


def count_blocks(docs: Sequence[ebft.StridedDoc], places: Places) -> np.ndarray:
    """Blocks of each document, int64 [D]."""
    if not docs:
        return np.zeros(0, np.int64)
    lens = torch.tensor([len(doc.tokens) for doc in docs])
    prompts = torch.tensor([doc.prompt_length for doc in docs])
    scored = torch.from_numpy(np.concatenate([doc.weight for doc in docs]) > 0)
    anchors = strided.anchors(lens, prompt_lengths=prompts, **anchor_options(places))
    anchors = strided.trained_blocks(anchors, F.pad(lens.cumsum(0), (1, 0)), scored)
    return torch.bincount(anchors.document, minlength=len(docs)).numpy()


def anchor_options(places: Places) -> dict[str, int]:
    """The options of `strided.anchors`."""
    return {key: value for key, value in places._asdict().items() if key != "needed"}


def _nothing(report: StridedReport, rows: sources.Rows) -> str:
    reasons = [f"{count} {reason}" for reason, count in report.dropped.items()] + [f"{report.short} with {NO_BLOCK}"] * bool(report.short)
    fix = "lower context_length or generate_max_len, or give longer texts" if report.short else "raise sequence_len, or fill the columns"
    return f"{rows.name}: not one document to train on in {report.rows} rows, read as {report.format} ({'; '.join(reasons)}): {fix}"


def describe_strided(report: StridedReport) -> str:
    """The report in one line, with what is unusual."""
    unusual = {
        "documents truncated": report.truncated,
        "rows split": report.split,
        f"documents {'dropped' if report.left else 'for cross-entropy alone'} ({NO_BLOCK})": report.short,
    }
    return reporting.format_report(report, {"blocks": report.blocks} | unusual)


def merge_strided_reports(reports: Sequence[StridedReport]) -> StridedReport:
    """One report of the parts of a data set."""
    dropped = Counter()
    for report in reports:
        dropped.update(report.dropped)
    fixed = ("format", "dropped", "longest", "left", "unread", "sizes", "ending")
    sums = {name: sum(getattr(one, name) for one in reports) for name in StridedReport._fields if name not in fixed}
    return reports[0]._replace(
        **sums, dropped=dict(dropped), longest=max(report.longest for report in reports), **reporting.merge_fields(reports)
    )


def check_blocks(docs: Sequence[ebft.StridedDoc], places: Places) -> None:
    """Errors: ValueError when no document has a block."""
    if docs and not count_blocks(docs, places).any():
        raise ValueError(
            f"not one of {len(docs)} documents has room for a block (context_length {places.context_length}, generate_max_len "
            f"{places.generate_max_len}, longest document {max(len(doc.tokens) for doc in docs)} tokens): lower these options or give "
            "longer texts; with rl_coef 0 cross-entropy alone would train"
        )


def collate(docs: Sequence[ebft.StridedDoc], **options) -> dict[str, torch.Tensor]:
    """The packed stream of bare documents (see `pack.collate`) with their prompt_length [B]."""
    return pack.collate(docs, **options) | {"prompt_length": torch.tensor([doc.prompt_length for doc in docs], dtype=torch.int64)}
