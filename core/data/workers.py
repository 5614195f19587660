"""Encoding with worker processes: equal parts of the rows, documents and report equal to those of one process."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from treetune.core.data import kinds, sources, template_date
from treetune.core.data.rows import Advance
from treetune.core.protocols import Tokenizer

PARTS = 8  # of the rows per process: progress moves, and a slow part does not hold up the end


def encode_rows(
    rows: sources.Rows,
    tokenizer: Tokenizer,
    *,
    processes: int,
    kind: kinds.DatasetSpec = kinds.TEXT,
    progress: Advance = lambda rows: None,
    **options,
) -> tuple[list, Any]:
    """`kind.encode` over `processes` processes; the same documents in the same order, and the same errors."""
    if processes <= 1 or len(rows.rows) < 2 * processes or kind.in_parts is None:
        return kind.encode(rows, tokenizer, progress=progress, **options)
    size = -(-len(rows.rows) // (processes * PARTS))
    parts = [sources.take(rows, range(start, min(start + size, len(rows.rows)))) for start in range(0, len(rows.rows), size)]
    encode = partial(_encode, tokenizer=tokenizer, kind=kind.name, date=template_date.chosen(), **kind.in_parts, **options)
    docs, reports = [], []
    try:
        # Spawned, not forked: a fork copies locks that threads of torch or tokenizers may hold, and the child can hang.
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=spawned, initializer=_end_with_parent) as pool:
            for part, (part_docs, report) in zip(parts, pool.map(encode, parts), strict=True):
                docs += part_docs
                reports.append(report)
                progress(len(part.rows))
    except ValueError:
        if kind.in_parts:
            raise
        docs = []  # a part of which no row is left is no error yet
    if not docs or not kinds.same_extras(docs):  # one process says what is wrong with all of the rows
        return kind.encode(rows, tokenizer, **options)
    return docs, kind.merged(reports)


def _end_with_parent() -> None:
    """End this process when its parent is gone: one that was killed could not tell it, and the queue that it waits at never closes."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode(rows: sources.Rows, *, tokenizer: Tokenizer, kind: str, date: str, **options) -> tuple[list, Any]:
    template_date.choose(date)
    return kinds.KINDS[kind].encode(rows, tokenizer, **options)
