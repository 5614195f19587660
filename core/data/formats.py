"""Rows of text as documents: the formats of kind text in `row_formats`, tokenised, weighed, cut and counted."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from treetune.core.data import reporting, row_formats, sources, spans
from treetune.core.data.row_formats import RowFormat
from treetune.core.data.rows import Advance
from treetune.core.protocols import Tokenizer

CHUNK = 512  # rows tokenised together: enough to keep the cores busy
OVERLONG = ("drop", "truncate", "split", "error")
EMPTY, TOO_LONG = "nothing to train on", reporting.TOO_LONG
WHOLE = ("completion", "pretokenised", "input_output")  # nothing is put around these texts, so a system text has no place


class TextReport(NamedTuple):
    """What became of the rows. Token counts are of the documents that came out."""

    format: str
    rows: int
    docs: int = 0
    dropped: dict[str, int] = {}  # rows by reason
    truncated: int = 0  # documents cut at sequence_len
    split: int = 0  # rows divided into several documents
    tokens: int = 0
    supervised: int = 0  # tokens with a weight above 0
    longest: int = 0  # tokens of the longest document before the length policy
    dropped_eos: int = 0  # documents that lost their last trained token to the cut
    missing_eos: int = 0  # trained turns with nothing that ends them
    missing_parts: int = 0  # trained turns of which the chat template leaves a part out, reasoning mostly
    missing_bos: int = 0  # documents without the BOS that the tokenizer adds to plain text
    trailing_spaces: int = 0  # boundaries between parts of a message that lie right behind a space
    roles: tuple[tuple[str, int, int], ...] = ()  # who wrote them: name, tokens and supervised tokens of the rows that came out
    unread: tuple[str, ...] = ()  # columns, and fields of messages, that nothing reads
    sizes: reporting.LengthCounts = ()  # of the documents before the length policy
    ending: str = ""  # what closes trained turns and looks like one token, but is none


ALIASES = {"chat_template": "chat", "sharegpt": "chat", "pretrain": "completion"}  # the documents' names


def detect(columns: Sequence[str]) -> str:
    """Name of the first format whose columns are all there. Errors: ValueError listing columns and formats."""
    if (detected := row_formats.detect("text", columns)) is not None:
        return detected.name
    needed = {
        row_format.name: " or ".join(" + ".join(names) for names in row_format.columns) for row_format in row_formats.detect_order("text")
    }
    needs = "; ".join(f"{name} needs {columns}" for name, columns in needed.items())
    raise ValueError(f"no format fits the columns {sources.join_names(columns)}: {needs}. Rename columns or name one of the other formats")


def takes(name: str) -> tuple[str, ...]:
    """Options that the reader of a format takes. Errors: ValueError for an unknown format."""
    formats_by_name = row_formats.of_kind("text")
    if name not in formats_by_name:
        raise ValueError(f"unknown format {name!r}: expected one of {', '.join(formats_by_name)}")
    return formats_by_name[name].options


def encode_rows(
    rows: sources.Rows,
    tokenizer: Tokenizer,
    *,
    format: str | None = None,
    sequence_len: int | None = None,
    overlong: str | None = None,
    format_options: Mapping[str, Any] | None = None,
    may_be_empty: bool = False,
    progress: Advance = lambda rows: None,
    **options,
) -> tuple[list[spans.Doc], TextReport]:
    """Documents of the rows, in their order, and what became of the rows.

    format: of kind text in `row_formats`, else by the columns. options, format_options: those of the format's reader; the second may
    have the names of parameters above.
    may_be_empty: no document at all is no error (a part of a data set). progress: told after each row how many more are done.
    overlong: for documents longer than sequence_len tokens: "drop", "truncate", "split" (parts overlap by one token, so that every
    token but the first is still predicted once) or "error"; by default "split" for raw text, "drop" for all else.
    Errors: ValueError for bad rows (named), options that the format does not take, a doubled BOS, and a dataset with nothing to train on.
    """
    name, options = format or detect(sources.columns(rows)), options | dict(format_options or {})
    row_format = _format(name, options)
    overlong = overlong or row_format.overlong
    _check_length(sequence_len, overlong)
    read, special = row_format.reader(tokenizer, **options), spans.read_special_tokens(tokenizer)
    docs, tally, roles, lengths, unread, ending = [], TextReport(name, len(rows.rows)), {}, [], {}, ""
    columns: dict[str, None] = {}
    for number, encoded in _encoded(rows, _watching(read, name, columns), tokenizer, special):
        _check_bos(encoded, number, rows, special)
        progress(1)
        lengths.append(len(encoded.tokens))
        unread |= dict.fromkeys(encoded.unread)
        ending = ending or encoded.ending
        row_docs, tally = _fit(encoded, number, rows, sequence_len, overlong, tally)
        missing_bos = bool(row_docs and special.prefix and encoded.tokens[: len(special.prefix)].tolist() != special.prefix)
        tally = tally._replace(missing_bos=tally.missing_bos + missing_bos)
        docs.extend(row_docs)
        if row_docs:
            _add_roles(roles, ((role, *counts) for role, counts in spans.tokens_by_role(encoded).items()))
    if not docs and not may_be_empty:
        raise ValueError(_nothing(rows, tally, row_format, options))
    supervised = sum(int(np.count_nonzero(doc.weight)) for doc in docs)
    by_role = tuple((role, *counts) for role, counts in roles.items())
    details = {"unread": (*columns, *unread), "sizes": reporting.count_lengths(lengths), "ending": ending, "roles": by_role}
    return docs, tally._replace(docs=len(docs), tokens=sum(len(doc.tokens) for doc in docs), supervised=supervised, **details)


def _watching(read: Callable[[sources.Rows], list], name: str, columns: dict[str, None]) -> Callable[[sources.Rows], list]:
    """The reader, adding the names of columns that it does not look at. Errors: ValueError for a system text among them."""

    def watched(rows: sources.Rows) -> list:
        rows = sources.track_reads(rows)
        texts, unread = read(rows), sources.unread_columns(rows)
        if sources.SYSTEM in unread and name not in WHOLE:
            raise sources.unplaced_system(rows, unread[sources.SYSTEM], name)
        columns.update(dict.fromkeys(unread))
        return texts

    return watched


def _add_roles(roles: dict[str, list[int]], entries: Iterable[tuple[str, int, int]]) -> None:
    """Add (role, tokens, trained tokens) to the totals by role."""
    for role, tokens, trained in entries:
        have = roles.setdefault(role, [0, 0])
        roles[role] = [have[0] + tokens, have[1] + trained]


def merge_text_reports(reports: Sequence[TextReport]) -> TextReport:
    """One report of the parts of a data set."""
    first, sums, roles = reports[0], {}, {}
    for name in TextReport._fields:
        values = [getattr(report, name) for report in reports]
        if isinstance(values[0], int):
            sums[name] = max(values) if name == "longest" else sum(values)
    dropped = Counter()
    for report in reports:
        dropped.update(report.dropped)
        _add_roles(roles, report.roles)
    by_role = tuple((role, *counts) for role, counts in roles.items())
    return first._replace(**sums, dropped=dict(dropped), roles=by_role, **reporting.merge_fields(reports))


def describe_texts(report: TextReport) -> str:
    """The report in one line, with what is unusual."""
    unusual = {
        "documents truncated": report.truncated,
        "lost their end": report.dropped_eos,
        "rows split": report.split,
        "trained turns without an end-of-turn token": report.missing_eos,
        "trained turns of which the chat template leaves a part out": report.missing_parts,
        "documents without BOS": report.missing_bos,
        "parts that begin right behind a space": report.trailing_spaces,
    }
    return reporting.format_report(report, unusual)


def _format(name: str, options: dict) -> RowFormat:
    names = takes(name)
    if extra := [key for key in options if key not in names]:
        raise ValueError(f"format {name} takes no {', '.join(extra)}; it takes {', '.join(names) or 'no options'}")
    return row_formats.of_kind("text")[name]


def _check_length(sequence_len: int | None, overlong: str) -> None:
    if overlong not in OVERLONG:
        raise ValueError(f"overlong is {overlong!r}: expected one of {', '.join(OVERLONG)}")
    if sequence_len is not None and sequence_len < 2:
        raise ValueError(f"sequence_len is {sequence_len}: expected at least 2 tokens, one to read and one to predict")


def _encoded(
    rows: sources.Rows, read: Callable, tokenizer: Tokenizer, special: spans.SpecialTokens
) -> Iterator[tuple[int, spans.EncodedText]]:
    """(index of the row, its tokens) row by row. The next rows are tokenised while these are weighed."""
    # Tokenising runs in Rust without the interpreter's lock, so one thread is enough to overlap it with weighing in Python.
    with ThreadPoolExecutor(1) as pool:
        previous = None
        for start in range(0, len(rows.rows), CHUNK):
            texts = _texts(sources.take(rows, range(start, min(start + CHUNK, len(rows.rows)))), read)
            current = start, texts, pool.submit(spans.tokenise, texts if _to_tokenise(texts) else [], tokenizer)
            yield from _weighed(previous, tokenizer, special)
            previous = current
        yield from _weighed(previous, tokenizer, special)


def _texts(chunk: sources.Rows, read: Callable) -> list:
    texts = read(chunk)
    for i, text in enumerate(texts if _to_tokenise(texts) else ()):
        _check_unicode(text.text, sources.locate_row(chunk, i))
    return texts


def _to_tokenise(texts: list) -> bool:
    """Whether these are texts; a format may also give rows that were tokens already."""
    return not (texts and isinstance(texts[0], spans.EncodedText))


def _weighed(chunk: tuple | None, tokenizer: Tokenizer, special: spans.SpecialTokens) -> Iterator[tuple[int, spans.EncodedText]]:
    if chunk is not None:
        start, texts, tokenised = chunk
        done = spans.weigh_tokens(texts, tokenised.result(), tokenizer, special) if _to_tokenise(texts) else texts
        yield from enumerate(done, start)


def _check_unicode(text: str, location: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{location}: not valid Unicode ({error.reason} at character {error.start} of the text)") from error


def _check_bos(encoded: spans.EncodedText, i: int, rows: sources.Rows, special: spans.SpecialTokens) -> None:
    if special.bos is not None and len(encoded.tokens) > 1 and encoded.tokens[0] == encoded.tokens[1] == special.bos:
        raise ValueError(
            f"{sources.locate_row(rows, i)} starts with two BOS tokens: take the BOS out of the chat template or out of the text"
        )


def _fit(
    encoded: spans.EncodedText, i: int, rows: sources.Rows, sequence_len: int | None, overlong: str, tally: TextReport
) -> tuple[list[spans.Doc], TextReport]:
    """The row's documents under the length policy, and the tally with the row in it."""
    tokens, weight = encoded.tokens, encoded.weight
    tally = tally._replace(longest=max(tally.longest, len(tokens)))
    if not weight.any():
        return [], _drop(tally, EMPTY)
    fits = sequence_len is None or len(tokens) <= sequence_len
    if not fits and overlong == "error":
        fix = "raise sequence_len, or set overlong to drop, truncate or split"
        raise ValueError(f"{sources.locate_row(rows, i)} has {len(tokens)} tokens, more than sequence_len {sequence_len}: {fix}")
    if not fits and overlong == "drop":
        return [], _drop(tally, TOO_LONG)
    starts = range(0, len(tokens) - 1, sequence_len - 1) if sequence_len is not None and not fits and overlong == "split" else [0]
    parts = [_part(tokens, weight, start, sequence_len, rows.numbers[i]) for start in starts]
    parts = [part for part in parts if part.weight.any()]
    cut = not fits and overlong == "truncate"
    if not parts:
        return [], _drop(tally, TOO_LONG)
    last = int(np.flatnonzero(weight)[-1])
    tally = tally._replace(
        truncated=tally.truncated + cut,
        split=tally.split + (len(parts) > 1),
        dropped_eos=tally.dropped_eos + bool(cut and sequence_len is not None and last >= sequence_len),
        missing_eos=tally.missing_eos + encoded.unclosed,
        missing_parts=tally.missing_parts + encoded.cut,
        trailing_spaces=tally.trailing_spaces + encoded.trailing_space_boundaries,
    )
    return parts, tally


def _part(tokens: np.ndarray, weight: np.ndarray, start: int, size: int | None, row: int) -> spans.Doc:
    stop = len(tokens) if size is None else start + size
    part = weight[start:stop].copy()
    part[:1] = 0.0  # nothing in this part predicts its first token; the part before ends with it
    return spans.Doc(tokens[start:stop].copy(), part, row)


def _drop(tally: TextReport, reason: str) -> TextReport:
    return tally._replace(dropped=tally.dropped | {reason: tally.dropped.get(reason, 0) + 1})


def _nothing(rows: sources.Rows, tally: TextReport, row_format: RowFormat, options: dict) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.items())
    fix = f"raise sequence_len (the longest row has {tally.longest} tokens)" if TOO_LONG in tally.dropped else row_format.fix
    template = " with the given chat template" if options.get("chat_template") else ""
    return (
        f"{rows.name}: not one token to train on in {tally.rows} rows ({reasons}); the first is {sources.locate_row(rows, 0)}, "
        f"read as {tally.format}{template}, with the fields {sources.join_names(rows.rows[0])}: {fix}"
    )
