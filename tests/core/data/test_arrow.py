"""Columnar files: values that Python has no type for, names that come twice, files that unpack without end."""

import datetime
import gzip
from decimal import Decimal

import pyarrow as pa
import pytest
from pyarrow import parquet

from treetune.core.data import files, sources

FAR = pa.array([10**18, 0], pa.timestamp("us"))
COLUMNS = {
    "text": pa.array(["a", "b"]),
    "far": FAR,
    "past": pa.array([-(10**17), None], pa.timestamp("us", "UTC")),
    "day": pa.array([10**8, 0], pa.date32()),
    "zone": pa.array([0, 1], pa.timestamp("us", tz="Mars/Phobos")),
    "length": pa.array([2**62, 1], pa.duration("s")),
    "struct": pa.StructArray.from_arrays([FAR, pa.array(["x", "y"])], ["when", "what"]),
    "list": pa.ListArray.from_arrays([0, 1, 2], FAR),
    "map": pa.MapArray.from_arrays([0, 1, 2], pa.array(["a", "b"]), FAR),
    "decimal": pa.array([Decimal("1.5"), None], pa.decimal128(38, 1)),
    "bytes": pa.array([b"\xff", None], pa.binary()),
}


def write(path, table):
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as out:
            out.write_table(table)
    return str(path)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_far_dates_do_not_stop_a_file(tmp_path, suffix):
    first, second = sources.read(write(tmp_path / f"a.{suffix}", pa.table(COLUMNS))).rows
    assert first["text"] == "a" and isinstance(first["far"], str) and first["struct"]["what"] == "x"
    assert isinstance(first["struct"]["when"], str) and isinstance(first["list"][0], str)
    assert first["decimal"] == Decimal("1.5") and first["bytes"] == b"\xff"
    assert second["far"] == datetime.datetime(1970, 1, 1) and second["length"] == datetime.timedelta(seconds=1)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_names_that_come_twice(tmp_path, suffix):
    texts = pa.array(["a"])
    with pytest.raises(ValueError, match="two columns have the name 'text'"):
        sources.read(write(tmp_path / f"a.{suffix}", pa.Table.from_arrays([texts, texts], names=["text", "text"])))
    struct = pa.StructArray.from_arrays([texts, texts], ["role", "role"])
    nested = pa.ListArray.from_arrays([0, 1], struct)
    with pytest.raises(ValueError, match="two fields of .* have the name 'role'"):
        sources.read(write(tmp_path / f"b.{suffix}", pa.table({"messages": nested})))
    assert sources.read(write(tmp_path / f"c.{suffix}", pa.table({"text": texts, "Text": texts}))).rows == [{"text": "a", "Text": "a"}]


def test_a_saved_dataset_with_far_dates(tmp_path):
    import datasets

    datasets.Dataset(datasets.table.InMemoryTable(pa.table({name: COLUMNS[name] for name in ("text", "far")}))).save_to_disk(tmp_path / "d")
    assert [row["text"] for row in sources.read(str(tmp_path / "d")).rows] == ["a", "b"]


def test_constant_columns_of_endless_rows_are_refused(tmp_path):
    rows = pa.array(["a"]).take(pa.array([0] * 1000, pa.int8()))
    path = write(tmp_path / "a.parquet", pa.table({"text": rows}))
    assert len(sources.read(path).rows) == 1000
    from treetune.core.data import arrow

    metadata = parquet.ParquetFile(path).metadata

    class Claims:
        num_rows, num_row_groups, num_columns = 10**9, metadata.num_row_groups, metadata.num_columns
        row_group = staticmethod(metadata.row_group)

    with pytest.raises(ValueError, match="says it has 1000000000 rows in .* bytes, more than 100 a byte"):
        arrow._check_size(Claims, "a.parquet")


@pytest.mark.parametrize("line", [b" " * (1 << 20), b'{"text": "a"}\n' * 70_000])
def test_packed_files_that_unpack_without_end(tmp_path, monkeypatch, line):
    monkeypatch.setattr(files, "FREE_BYTES", 1 << 20)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as out:
        for _ in range(12):
            out.write(line)
    with pytest.raises(ValueError, match="a.jsonl.gz: .* packed bytes have unpacked to .* MiB, more than 250 times as much"):
        sources.read(str(tmp_path / "a.jsonl.gz"))


def test_packed_files_are_read_from_any_place(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"text": COLUMNS["text"]}))
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert sources.read(str(tmp_path / "b.parquet.gz")).rows == sources.read(path).rows
