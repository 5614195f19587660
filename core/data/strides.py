"""Documents of strided rollouts: from rows to documents with room for blocks, what became of the rows, and the stream of documents.

n tokens of one document, D documents, B sequences. A document has a `prompt_length`, 0 for raw text; see `ebft.Strided`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from treetune.core import strided
from treetune.core.data import ebft, formats, pack, reporting, row_formats, sources, trees

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


class Report(NamedTuple):
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


def detect(columns: Sequence[str], row: Mapping | None = None) -> str:
    """The transform that the columns mean. Errors: ValueError listing what is known."""
    if (detected := row_formats.detect("strided", columns)) is not None:
        return detected.name
    needs = " + ".join(" or ".join(names) for names in ebft.ANSWERED)
    raise ValueError(
        f"the columns {sources.join_names(columns)} do not tell the format: ebft_pretrain.transform needs text, "
        f"ebft_strided_chat.transform messages or conversations, ebft_strided_structured.transform {needs}, pretokenised input_ids; "
        "rename columns, or name one"
    )


def takes(name: str, row: Mapping | None = None) -> tuple[str, ...]:
    """Options of a format."""
    return row_formats.of_kind("strided")[name].options


def talks(name: str) -> bool:
    """Whether rows of a format are conversations."""
    known = row_formats.of_kind("strided")
    return name in known and known[name].options == row_formats.CHAT


def canonical(name: str) -> str:
    """A name as users write it, `.transform` left out or not. Errors: ValueError listing all for an unknown one."""
    formats_ = row_formats.of_kind("strided")
    whole = next((known for known in (name, f"{name}.transform") if known in formats_), None)
    if whole is None:
        raise ValueError(f"unknown format {name!r}: expected one of {', '.join(formats_)}")
    return whole


def encode_rows(
    rows: sources.Rows,
    tokenizer,
    *,
    format: str,
    own: Mapping | None = None,
    sequence_len: int | None = None,
    overlong: str | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    places: Places,
) -> tuple[list[ebft.Strided], Report]:
    """Documents of the rows, in their order, and what became of the rows.

    overlong: for documents with a prompt that have more than sequence_len tokens: "truncate" (the completion goes first), "drop" or
    "error". Raw text is split; parts overlap by one token, so that every token but the first is still predicted once.
    Errors: ValueError for bad rows (named), options that the format does not take, and when no document is left.
    """
    if extra := [key for key in own or {} if key not in takes(format)]:
        raise ValueError(f"format {format} takes no {', '.join(extra)}; it takes {', '.join(takes(format)) or 'no options'}")
    trees.check_length(sequence_len, overlong or "truncate")
    rows = sources.track_reads(rows)
    read, unread = row_formats.of_kind("strided")[format].reader(rows, tokenizer, **(own or {})), sources.unread_columns(rows)
    if sources.SYSTEM in unread and format not in (PRETOKENISED, *SPLIT):
        raise sources.unplaced_system(rows, unread[sources.SYSTEM], format)
    progress(len(rows.rows))
    dropped, docs, cut = Counter({formats.EMPTY: len(rows.rows) - len(read)}), [], Counter()
    for doc in read:
        found, what = _fit(doc._replace(weight=(doc.weight > 0).astype(np.float32)), sequence_len, overlong or "truncate", rows)
        docs += found
        (cut if found else dropped)[what] += bool(what)
    counts = blocks(docs, places)
    docs = [doc for doc, some in zip(docs, counts, strict=True) if some or not places.needed]
    tally = Report(format, len(rows.rows), len(docs), {reason: n for reason, n in dropped.items() if n}, cut["cut"], cut["split"])
    told = {"unread": tuple(unread), "sizes": reporting.count_lengths(len(doc.tokens) for doc in read)}
    report = _counted(tally._replace(left=places.needed, **told), docs, read, counts)
    if not docs:
        raise ValueError(_nothing(report, rows))
    return docs, report


def _counted(report: Report, docs: Sequence[ebft.Strided], read: Sequence[ebft.Strided], counts: np.ndarray) -> Report:
    return report._replace(
        tokens=sum(len(doc.tokens) for doc in docs),
        supervised=int(sum(doc.weight.sum() for doc in docs)),
        longest=max((len(doc.tokens) for doc in read), default=0),
        blocks=int(counts.sum()),
        short=int((counts == 0).sum()),
    )


def _fit(doc: ebft.Strided, size: int | None, overlong: str, rows: sources.Rows) -> tuple[list[ebft.Strided], str]:
    """(the document under the length policy, "cut" or "split" if it is another; none, and why)."""
    if doc.prompt_length >= len(doc.tokens):
        return [], formats.EMPTY
    if size is None or len(doc.tokens) <= size:
        return [doc], ""
    if doc.prompt_length == 0:
        return [part for start in range(0, len(doc.tokens) - 1, size - 1) if (part := _part(doc, start, size)).weight.any()], "split"
    if overlong == "error":
        where = sources.locate_row(rows, rows.numbers.index(doc.row))
        raise ValueError(f"{where} has {len(doc.tokens)} tokens, more than sequence_len {size}: raise it, or set overlong to truncate")
    if overlong == "drop":
        return [], trees.TOO_LONG
    found = ebft.cut([doc], size)
    return found, "cut" if found else trees.FULL


def _part(doc: ebft.Strided, start: int, size: int) -> ebft.Strided:
    weight = doc.weight[start : start + size].copy()
    weight[:1] = 0.0  # nothing in this part predicts its first token; the part before ends with it
    return doc._replace(tokens=doc.tokens[start : start + size], weight=weight)


def blocks(docs: Sequence[ebft.Strided], places: Places) -> np.ndarray:
    """Blocks of each document, int64 [D]."""
    if not docs:
        return np.zeros(0, np.int64)
    lens = torch.tensor([len(doc.tokens) for doc in docs])
    prompts = torch.tensor([doc.prompt_length for doc in docs])
    scored = torch.from_numpy(np.concatenate([doc.weight for doc in docs]) > 0)
    found = strided.anchors(lens, prompt_lengths=prompts, **among(places))
    found = strided.trained_blocks(found, F.pad(lens.cumsum(0), (1, 0)), scored)
    return torch.bincount(found.document, minlength=len(docs)).numpy()


def among(places: Places) -> dict[str, int]:
    """The options of `strided.anchors`."""
    return {key: value for key, value in places._asdict().items() if key != "needed"}


def _nothing(report: Report, rows: sources.Rows) -> str:
    reasons = [f"{count} {reason}" for reason, count in report.dropped.items()] + [f"{report.short} with {NO_BLOCK}"] * bool(report.short)
    fix = "lower context_length or generate_max_len, or give longer texts" if report.short else "raise sequence_len, or fill the columns"
    return f"{rows.name}: not one document to train on in {report.rows} rows, read as {report.format} ({'; '.join(reasons)}): {fix}"


def describe(report: Report) -> str:
    """The report in one line, with what is unusual."""
    unusual = {
        "documents truncated": report.truncated,
        "rows split": report.split,
        f"documents {'dropped' if report.left else 'for cross-entropy alone'} ({NO_BLOCK})": report.short,
    }
    return reporting.format_report(report, {"blocks": report.blocks} | unusual)


def merged(reports: Sequence[Report]) -> Report:
    """One report of the parts of a data set."""
    dropped = Counter()
    for report in reports:
        dropped.update(report.dropped)
    fixed = ("format", "dropped", "longest", "left", "unread", "sizes", "ending")
    sums = {name: sum(getattr(one, name) for one in reports) for name in Report._fields if name not in fixed}
    return reports[0]._replace(
        **sums, dropped=dict(dropped), longest=max(report.longest for report in reports), **reporting.merge_fields(reports)
    )


def check(docs: Sequence[ebft.Strided], places: Places) -> None:
    """Errors: ValueError when no document has a block."""
    if docs and not blocks(docs, places).any():
        raise ValueError(
            f"not one of {len(docs)} documents has room for a block (context_length {places.context_length}, generate_max_len "
            f"{places.generate_max_len}, longest document {max(len(doc.tokens) for doc in docs)} tokens): lower these options or give "
            "longer texts; with rl_coef 0 cross-entropy alone would train"
        )


def collate(docs: Sequence[ebft.Strided], **options) -> dict[str, torch.Tensor]:
    """The packed stream of bare documents (see `pack.collate`) with their prompt_length [B]."""
    return pack.collate(docs, **options) | {"prompt_length": torch.tensor([doc.prompt_length for doc in docs], dtype=torch.int64)}
