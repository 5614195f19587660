"""Encoding with worker processes: the rows in equal parts, the documents and the report as from one process."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from treetune.core.data import formats, sources
from treetune.core.data.spans import Doc

PARTS = 8  # of the rows per process: progress moves, and a slow part does not hold up the end


def encode_rows(
    rows: sources.Rows, tokenizer, *, processes: int, progress: Callable[[int], None] = lambda rows: None, **options
) -> tuple[list[Doc], formats.Report]:
    """`formats.encode_rows` over `processes` processes; the same documents in the same order, and the same errors."""
    if processes <= 1 or len(rows.rows) < 2 * processes:
        return formats.encode_rows(rows, tokenizer, progress=progress, **options)
    size = -(-len(rows.rows) // (processes * PARTS))
    parts = [sources.take(rows, range(start, min(start + size, len(rows.rows)))) for start in range(0, len(rows.rows), size)]
    encode = partial(formats.encode_rows, tokenizer=tokenizer, may_be_empty=True, **options)
    docs, reports = [], []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for part, (found, report) in zip(parts, pool.map(encode, parts), strict=True):
            docs += found
            reports.append(report)
            progress(len(part.rows))
    if not docs:  # the error names the first row of all
        return formats.encode_rows(rows, tokenizer, **options)
    return docs, formats.merged(reports)
