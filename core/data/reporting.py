"""Reports on rows of every kind: the summary line, and the warnings."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from treetune.core.data import sources

TOO_LONG = "longer than sequence_len"
STEP = 64  # tokens; lengths are counted in steps of this
SHARE_KEPT, SHARE_LOST = 0.95, 0.25  # the first is what a longer sequence_len should keep, the second is too much to lose unnoticed
SHOWN = 8  # names in a line
LengthCounts = tuple[tuple[int, int], ...]  # (tokens, rounded up to a step, rows of that length)


class Report(Protocol):
    """Fields that every report on rows has."""

    @property
    def format(self) -> str:
        """Name of the format that the rows were read as."""
        ...

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def docs(self) -> int:
        """Number of documents that came out."""
        ...

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows that gave no document, by reason."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens of the documents."""
        ...

    @property
    def supervised(self) -> int:
        """Tokens with a weight above 0."""
        ...

    @property
    def unread(self) -> tuple[str, ...]:
        """Columns, and fields of messages, that nothing reads."""
        ...

    @property
    def sizes(self) -> LengthCounts:
        """Lengths before the length policy."""
        ...

    @property
    def ending(self) -> str:
        """What closes trained turns and looks like one token, but is none."""
        ...


def format_report(report: Report, unusual: Mapping[str, int]) -> str:
    """Summary line of a report: rows in, documents out, share trained, rows dropped; then the unusual counts that are not 0."""
    share = 100 * report.supervised / max(1, report.tokens)
    parts = [f"{report.format}: {report.rows} rows -> {report.docs} documents, {report.tokens} tokens, {share:.0f} % trained"]
    parts += [f"dropped {count} row{'s' * (count != 1)} ({reason})" for reason, count in report.dropped.items()]
    parts += [f"{count} {what}" for what, count in unusual.items() if count]
    return "; ".join(parts + ([f"not read: {abbreviate(report.unread)}"] if report.unread else []))


def abbreviate(names: Sequence[str]) -> str:
    """The first SHOWN names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return sources.join_names(names[:SHOWN]) + more


def count_lengths(lengths: Iterable[int]) -> LengthCounts:
    """Number of documents by length, rounded up to steps of STEP tokens."""
    return tuple(sorted(Counter(-(-length // STEP) * STEP for length in lengths).items()))


def merge_fields(reports: Sequence[Report]) -> dict[str, Any]:
    """Unread columns, lengths and endings of several reports, merged."""
    lengths: Counter[int] = Counter()
    for report in reports:
        lengths.update(dict(report.sizes))
    unread = tuple(dict.fromkeys(name for report in reports for name in report.unread))
    ending = next((report.ending for report in reports if report.ending), "")
    return {"unread": unread, "sizes": tuple(sorted(lengths.items())), "ending": ending}


def find_warnings(report: Report) -> list[str]:
    """Warnings of a report: rows lost to their length, and turns that end in no token."""
    return [text for text in (_lost(report.rows, report.dropped.get(TOO_LONG, 0), report.sizes), _endless(report)) if text]


def _lost(rows: int, lost: int, lengths: Sequence[Sequence[int]]) -> str:
    if not lost or lost < SHARE_LOST * rows:
        return ""
    seen = list(accumulate(count for _, count in lengths))
    size = next(size for (size, _), below in zip(lengths, seen, strict=True) if below >= SHARE_KEPT * seen[-1])
    return f"{lost} of {rows} rows are {TOO_LONG} and left out: --sequence-len {size} keeps 95 % of the rows, --overlong truncate cuts them"


def _endless(report: Report) -> str:
    if not report.ending:
        return ""
    return (
        f"trained turns end with {report.ending}, which is not one token of this tokenizer, so that answers may never stop: add it with "
        f"--special-tokens eos_token={report.ending}, or name a --chat-template whose end of turn the tokenizer has"
    )
