"""Sums of the digests of rows that a stream has read, so that rows which changed on disk are noticed when they are read again.

A sum depends neither on the order of the shards, which is another each epoch, nor on where blocks begin. A checkpoint holds three of them
(`Ledger.mark`), and what the file system says of the files: only where that differs are the rows before the cursor read once more.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

from treetune.core.data import nested, sources, streaming

SIZE = 16  # bytes of a row's digest
MODULUS = 2 ** (8 * SIZE)
# Sums of the rows of the epoch before the cursor's block, of the block if some of it is taken, of a whole pass; and what `_files` gives.
LedgerMark = TypedDict("LedgerMark", {"rows": str, "block": str, "pass": str, "files": dict[str, list[int]]})


class BlockSums(NamedTuple):
    """Sum of the epoch's rows before a block (None: unknown), and sum of its own rows."""

    before: int | None
    block: int

    @property
    def through(self) -> int | None:
        """Sum of the epoch's rows up to the end of the block."""
        return None if self.before is None else (self.before + self.block) % MODULUS


class Ledger:
    """Sums of the rows of a stream, block by block as they are read.

    column: the one that is trained on, where a shard does not name its own; None: the whole row.
    warn: called once a pass of rows that changed while the run went on.
    """

    def __init__(self, shards: Sequence[streaming.Shard], column: str | None, *, warn: Callable[[str], None] = print):
        self._shards, self._column, self._warn = shards, column, warn
        self._blocks: dict[tuple[int, int], BlockSums] = {}  # by epoch and block
        self._start: tuple[tuple[int, int], int | None] = ((0, 0), 0)  # a block, and the sum before it if that is known
        self._whole: int | None = None
        self._files = _files(shards)

    def note(self, rows: sources.Rows, cursor: streaming.StreamCursor) -> None:
        """Adds the block that starts at `cursor`; blocks come in order."""
        if cursor.block == 0 and cursor.epoch:
            self._close(self._last(cursor.epoch))
        key = (cursor.epoch, cursor.block)
        self._blocks[key] = BlockSums(self._before(key), self._sum(rows))

    def mark(self, cursor: streaming.StreamCursor) -> LedgerMark:
        """JSON that a checkpoint at the cursor keeps; sums of earlier blocks are dropped."""
        key = (cursor.epoch, cursor.block)
        sums = self._blocks.get(key) or BlockSums(self._before(key), 0)
        for old in [past for past in self._blocks if past < (cursor.epoch, cursor.block - 1)]:
            del self._blocks[old]
        whole = self._whole if cursor.epoch else None
        return {"rows": _hex(sums.before), "block": _hex(sums.block if cursor.index else None), "pass": _hex(whole), "files": self._files}

    def go_on(self, cursor: streaming.StreamCursor, mark: LedgerMark | None, **options: Any) -> None:
        """Continues from a checkpoint, of which an earlier version kept nothing. options: buffer, shuffle and seed of `streaming.blocks`.

        Errors: ValueError when rows that were read are not there as they were.
        """
        start = cursor._replace(index=0)
        saved: LedgerMark = mark or {"rows": "", "block": "", "pass": "", "files": self._files}
        self._start, self._whole = ((cursor.epoch, cursor.block), _number(saved["rows"])), _number(saved["pass"])
        if saved["block"]:
            rows, here, _ = next(streaming.blocks(self._shards, cursor=start, **options))
            _require(here == start and _hex(self._sum(rows)) == saved["block"], rows.name)
        if cursor.block and saved["rows"] and saved["files"] != self._files:
            _require(self._walked(start, options) == saved["rows"], ", ".join(shard.name for shard in self._shards[:3]))

    def _walked(self, start: streaming.StreamCursor, options: dict[str, Any]) -> str:
        """The sum of the epoch's rows before a block, read once more; nothing where none starts there any longer."""
        total = 0
        for rows, here, _ in streaming.blocks(self._shards, cursor=streaming.StreamCursor(start.epoch), **options):
            if (here.epoch, here.block) >= (start.epoch, start.block):
                return _hex(total) if here == start else ""
            total = (total + self._sum(rows)) % MODULUS
        return ""

    def _before(self, key: tuple[int, int]) -> int | None:
        """The sum of the epoch's rows before a block; None where the first of them were read by an earlier version."""
        if key == self._start[0] or key[1] == 0:
            return self._start[1] if key == self._start[0] else 0
        return self._blocks[(key[0], key[1] - 1)].through

    def _last(self, epoch: int) -> int | None:
        """The sum of the rows of the pass that is over as this epoch begins."""
        if self._blocks:
            return self._blocks[max(self._blocks)].through
        return self._start[1] if self._start[0][0] < epoch else None

    def _close(self, total: int | None) -> None:
        """Compare the sum of a finished pass with that of the pass before; report a difference."""
        if None not in (total, self._whole) and total != self._whole:
            self._warn("the rows of the stream are not those of the pass before: a file changed while the run went on")
        self._whole = self._whole if total is None else total

    def _sum(self, rows: sources.Rows) -> int:
        total = 0
        for number, row in zip(rows.numbers, rows.rows, strict=True):
            column = self._shards[streaming.shard_of(number)].column or self._column
            text = json.dumps([number, row if column is None else nested.look_up(row, column)], default=str)
            total += int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=SIZE).digest())
        return total % MODULUS


def _hex(value: int | None) -> str:
    return "" if value is None else f"{value:x}"


def _number(text: str) -> int | None:
    return int(text, 16) if text else None


def _files(shards: Sequence[streaming.Shard]) -> dict[str, list[int]]:
    """Size and time of change of the shards that are local files."""
    stats = {}
    for shard in shards:
        with contextlib.suppress(OSError, ValueError):  # an address, or a shard
            stat = os.stat(shard.name)
            stats[shard.name] = [stat.st_size, stat.st_mtime_ns]
    return stats


def _require(same: bool, name: str) -> None:
    if not same:
        raise ValueError(f"{name}: rows that the run has read already are not there as they were; put them back, or start a new run")
