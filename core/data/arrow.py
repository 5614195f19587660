"""Rows of columnar files as plain dicts: parquet, Arrow's IPC, and tables of the datasets library.

A value that Python has no type for, such as a date in the year 30000, becomes its text: it must not fail a file whose other columns are
read. Two columns, or two fields of a struct, of one name are refused, because a dict would keep the last.
"""

from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from treetune.core.data import files, jsontext
from treetune.core.data.rows import Row

BATCH_ROWS = 1024
MOST_ROWS_PER_BYTE = 100  # constant columns are stored once; beyond this a file is a bomb
FREE_ROWS = 10_000_000  # and below this it is harmless
UNREADABLE = (ValueError, OverflowError, KeyError)  # of values: dates past the year 9999, unknown time zones; ArrowInvalid is a ValueError


def read_parquet(stream: BinaryIO, name: str, skip: int = 0) -> Iterator[tuple[int, dict]]:
    """(number from 1, row) after row `skip`; row groups before it are not read. Errors: ValueError of one line."""
    from pyarrow import ArrowException, parquet

    try:
        # A row group at a time: a whole table of a large file would not fit into memory, and groups before `skip` are never read.
        table, number = parquet.ParquetFile(stream), 0
        check_names(table.schema_arrow, name)
        _check_size(table.metadata, name)
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if number + size > skip:
                yield from iterate_batches(table.iter_batches(BATCH_ROWS, row_groups=[group]), number, skip)
            number += size
    except (ArrowException, UnicodeDecodeError, MemoryError) as error:  # a damaged length asks for any amount of memory
        raise ValueError(f"{name}: not a readable parquet file ({files.first_line(error)})") from error


def read_ipc(stream: BinaryIO, name: str, skip: int = 0) -> Iterator[tuple[int, dict]]:
    """Rows of Arrow's IPC stream, as the datasets library writes it, or of its file format; as `read_parquet`."""
    from pyarrow import ArrowException
    from pyarrow import ipc as pyarrow_ipc

    try:
        # Both formats have the suffix .arrow: a file begins with its magic bytes, a stream with a length.
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        table = pyarrow_ipc.open_file(stream) if is_file else pyarrow_ipc.open_stream(stream)
        check_names(table.schema, name)
        batches = (table.get_batch(i) for i in range(table.num_record_batches)) if is_file else table
        yield from iterate_batches(batches, 0, skip)
    except (ArrowException, UnicodeDecodeError, MemoryError) as error:  # a damaged length asks for any amount of memory
        raise ValueError(f"{name}: not a readable arrow file ({files.first_line(error)})") from error


def iterate_batches(batches: Iterable, number: int = 0, skip: int = 0) -> Iterator[tuple[int, dict]]:
    """Rows of record batches after row `skip`; `number` rows precede them."""
    for batch in batches:
        batch.validate(full=True)  # a damaged buffer would otherwise be read out of bounds
        first = max(0, skip - number)
        if first < batch.num_rows:
            yield from enumerate(_dicts(batch.slice(first)), number + first + 1)
        number += batch.num_rows


def check_names(schema: Any, name: str) -> None:
    """Errors: ValueError for two columns, or two fields of one struct, with the same name."""
    for place, names in _levels(schema.names, schema.types, "columns"):
        if twice := jsontext.first_duplicate(names):
            raise ValueError(f"{name}: two {place} have the name {twice!r}: rename one of them, or remove it")


def _levels(names: Iterable[str], types: Iterable[Any], place: str) -> Iterator[tuple[str, list[str]]]:
    names = list(names)
    yield place, names
    for name, kind in zip(names, types, strict=True):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        if fields:
            import pyarrow as pa

            inner = f"fields of {name}" if pa.types.is_struct(kind) else f"parts of {name}"
            yield from _levels([field.name for field in fields], [field.type for field in fields], inner)


def _check_size(metadata: Any, name: str) -> None:
    if metadata.num_rows <= FREE_ROWS:
        return
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    stored = sum(group.column(j).total_compressed_size for group in groups for j in range(metadata.num_columns))
    if metadata.num_rows > MOST_ROWS_PER_BYTE * stored:
        raise ValueError(
            f"{name} says it has {metadata.num_rows} rows in {stored} bytes, more than {MOST_ROWS_PER_BYTE} a byte: not read; "
            "write the rows to a file of another type if they are meant"
        )


def _dicts(batch: Any) -> list[Row]:
    columns = [_values(batch.column(i)) for i in range(batch.num_columns)]
    names = batch.schema.names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] if columns else [{} for _ in range(batch.num_rows)]


def _values(column: Any) -> list:
    # Value by value only where the column as a whole fails.
    try:
        return column.to_pylist()
    except UNREADABLE:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    """A scalar as a Python value, or as text where Python has no type for it; inside structs and lists, only such items become text."""
    import pyarrow as pa

    try:
        return scalar.as_py()
    except UNREADABLE:
        pass
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(scalar[name]) for name in scalar}
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return [_value(item) for item in scalar.values]
    return _text(scalar)


def _text(scalar: Any) -> str:
    import pyarrow as pa

    try:
        return scalar.cast(pa.string()).as_py()
    except (pa.ArrowException, *UNREADABLE):
        return str(getattr(scalar, "value", type(scalar).__name__))
