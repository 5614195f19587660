"""Folders, patterns, packed files, remote addresses, saved datasets, slices and shards."""

import gzip
import inspect
import json
import os
import random
from collections import Counter

import pytest

from treetune.core.data import file_rows, files, sources

ROWS = [{"text": f"row {i}", "n": i} for i in range(7)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(folder, name, data):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def table(rows):
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def arrow_stream(path, rows):
    from pyarrow import ipc

    with ipc.new_stream(path, table(rows).schema) as writer:
        writer.write_table(table(rows), max_chunksize=2)


def arrow_file(path, rows):
    from pyarrow import ipc

    with ipc.new_file(path, table(rows).schema) as writer:
        writer.write_table(table(rows), max_chunksize=2)


def parquet(path, rows):
    from pyarrow import parquet

    parquet.write_table(table(rows), path, row_group_size=3)


WRITERS = {
    "a.jsonl": lambda path: open(path, "wb").write(lines(ROWS)),
    "a.jsonl.gz": lambda path: open(path, "wb").write(gzip.compress(lines(ROWS))),
    "a.json": lambda path: open(path, "w").write(json.dumps(ROWS)),
    "a.json.gz": lambda path: open(path, "wb").write(gzip.compress(lines(ROWS))),
    "a.parquet": lambda path: parquet(path, ROWS),
    "stream.arrow": lambda path: arrow_stream(path, ROWS),
    "file.arrow": lambda path: arrow_file(path, ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    WRITERS[name](str(tmp_path / name))
    rows = sources.read(str(tmp_path / name))
    assert rows.rows == ROWS and rows.numbers == list(range(1, 8))


@pytest.mark.parametrize("name", [*WRITERS, "a.csv", "a.txt"])
def test_reading_from_any_place_continues_the_rows(name, tmp_path):
    path = str(tmp_path / name)
    if name in WRITERS:
        WRITERS[name](path)
    else:
        put(tmp_path, name, b"text,n\n" + b"".join(b"row %d,%d\n" % (i, i) for i in range(7)))
    file = files.find(path)[0]
    whole = list(file_rows.iterate(file))
    for i, record in enumerate(whole):
        assert list(file_rows.iterate(file, file_rows.ReadPosition(record.number, record.offset))) == whole[i + 1 :]


def test_text_is_one_row_per_line_or_per_file(tmp_path):
    path = put(tmp_path, "a.txt", "\ufeffone\r\n\ntwo é\n three".encode())
    rows = sources.read(path)
    assert [row["text"] for row in rows.rows] == ["one", "", "two é", " three"] and sources.locate_row(rows, 2).endswith("a.txt line 3")
    assert sources.read(path, ds_type="document").rows == [{"text": "one\r\n\ntwo é\n three"}]
    with pytest.raises(ValueError, match=r"b.txt line 2: not UTF-8"):
        sources.read(put(tmp_path, "b.txt", b"a\n\xff\n"))


def test_text_lines_are_those_of_the_datasets_library(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = put(tmp_path, "a.txt", b"one\n\ntwo\n")
    theirs = datasets.load_dataset("text", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    assert theirs.to_list() == sources.read(path).rows


def test_zstandard(tmp_path):
    path = put(tmp_path, "a.jsonl.zst", b"")
    try:
        import zstandard
    except ImportError:
        with pytest.raises(ValueError, match="a.jsonl.zst: reading .zst files needs the package zstandard"):
            sources.read(path)
        return
    put(tmp_path, "a.jsonl.zst", zstandard.ZstdCompressor().compress(lines(ROWS)))
    assert sources.read(path).rows == ROWS
    file = files.find(path)[0]
    whole = list(file_rows.iterate(file))
    assert list(file_rows.iterate(file, file_rows.ReadPosition(whole[2].number, whole[2].offset))) == whole[3:]
    put(tmp_path, "a.jsonl.zst", b"no frame")
    with pytest.raises(ValueError, match="a.jsonl.zst: cannot be read"):
        sources.read(path)


CUT = [gzip.compress(lines(ROWS))[:size] for size in (-9, 30)]  # the packed bytes hold the time, so tests are not named after them


@pytest.mark.parametrize("data", [b"not packed", *CUT], ids=["not packed", "no end", "no rows"])
def test_broken_packing_gets_one_line(data, tmp_path):
    with pytest.raises(ValueError, match="a.jsonl.gz: cannot be read") as caught:
        sources.read(put(tmp_path, "a.jsonl.gz", data))
    assert "\n" not in str(caught.value)


def test_patterns_and_folders_name_each_rows_own_file(tmp_path):
    put(tmp_path, "b/2.jsonl", b"\n" + lines(ROWS[3:5]))
    put(tmp_path, "b/1.jsonl", lines(ROWS[:3]))
    put(tmp_path, "b/3.jsonl.gz", gzip.compress(lines(ROWS[5:])))
    put(tmp_path, "b/README.md", b"not data")
    put(tmp_path, "b/.hidden.jsonl", b"broken")
    for path in (f"{tmp_path}/b", f"{tmp_path}/*/[0-9].jsonl*", f"{tmp_path}/**/*.jsonl*"):
        rows = sources.read(path)
        assert rows.rows == ROWS and len(set(rows.numbers)) == 7
        names = [sources.locate_row(rows, i).removeprefix(f"{tmp_path}/b/") for i in range(7)]
        assert names == [f"1.jsonl line {i}" for i in (1, 2, 3)] + ["2.jsonl line 2", "2.jsonl line 3"] + [
            f"3.jsonl.gz line {i}" for i in (1, 2)
        ]
    assert sources.read(f"{tmp_path}/b", limit=4).rows == ROWS[:4]
    with pytest.raises(ValueError, match="no such file"):
        sources.read(f"{tmp_path}/*.parquet")
    with pytest.raises(ValueError, match="has no files of parquet"):
        sources.read(f"{tmp_path}/b", ds_type="parquet")


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    assert sources.read(put(tmp_path, "a[1].jsonl", lines(ROWS))).rows == ROWS


def test_splits_of_a_folder_are_kept_apart(tmp_path):
    put(tmp_path, "train-00000-of-00002.jsonl", lines(ROWS[:2]))
    put(tmp_path, "train-00001-of-00002.jsonl", lines(ROWS[2:4]))
    put(tmp_path, "test/0.jsonl", lines(ROWS[4:]))
    assert sources.read(str(tmp_path)).rows == ROWS[:4]
    assert sources.read(str(tmp_path), split="test").rows == ROWS[4:]
    assert sources.read(str(tmp_path), split="train[1:3]").rows == ROWS[1:3]
    with pytest.raises(ValueError, match="no files of split 'validation'"):
        sources.read(str(tmp_path), split="validation")
    put(tmp_path, "b.csv", b"text\nx\n")
    with pytest.raises(ValueError, match=r"several types \(csv, json\)"):
        sources.read(str(tmp_path))
    assert sources.read(str(tmp_path), ds_type="csv").rows == [{"text": "x"}]


def test_data_files_and_kinds_as_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "A.jsonl", lines(ROWS[:3]))
    put(tmp_path, "B.data", lines(ROWS[3:]))
    assert sources.read("json", data_files=["A.jsonl", "B.data"]).rows == ROWS
    assert sources.read(None, data_files="B.data", ds_type="json").rows == ROWS[3:]
    assert sources.read(str(tmp_path), data_files=["A.jsonl"]).rows == ROWS[:3]
    assert sources.read("B.data", ds_type="json").rows == ROWS[3:]
    with pytest.raises(ValueError, match="unsupported file type '.data'"):
        sources.read("B.data")
    with pytest.raises(ValueError, match="ds_type is 'jsn'"):
        sources.read("B.data", ds_type="jsn")
    with pytest.raises(ValueError, match="no folder that data_files could lie in"):
        sources.read("A.jsonl", data_files="B.data")
    with pytest.raises(ValueError, match="neither a path nor data_files"):
        sources.read(None)


@pytest.mark.parametrize("saved", ["one split", "splits"])
def test_a_folder_saved_by_the_datasets_library(saved, tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    path = str(tmp_path / "saved")
    (data if saved == "one split" else datasets.DatasetDict(train=data, test=data.select([4, 5]))).save_to_disk(path)
    before = sources.digest_source(path)
    assert sources.read(path).rows == ROWS and sources.read(path, split="train[2:4]").rows == ROWS[2:4]
    assert sources.digest_source(path) == before
    if saved == "splits":
        assert sources.read(path, split="test").rows == ROWS[4:6]
    with pytest.raises(ValueError, match="has no split 'nope'"):
        sources.read(path, split="nope")


def test_remote_paths_in_memory():
    import fsspec

    system = fsspec.filesystem("memory")
    for name, data in (("1.jsonl", lines(ROWS[:3])), ("2.jsonl.gz", gzip.compress(lines(ROWS[3:]))), ("t/test.jsonl", lines(ROWS[:1]))):
        system.pipe(f"/places/{name}", data)
    assert sources.read("memory://places/1.jsonl").rows == ROWS[:3]
    assert sources.read("memory://places/*.jsonl*").rows == ROWS
    rows = sources.read("memory://places")
    assert rows.rows == ROWS and sources.locate_row(rows, 3).endswith("places/2.jsonl.gz line 1")
    assert sources.read("memory://places", split="test").rows == ROWS[:1]
    assert sources.read(None, data_files=["memory://places/1.jsonl"]).rows == ROWS[:3]
    for path in ("memory://places/gone.jsonl", "memory://gone", "memory://places/*.csv", "nosuch://a/b.jsonl"):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            sources.read(path)
        assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_saved_folder_in_memory():
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk("memory://saved/set")
    assert sources.read("memory://saved/set", split="train[:50%]").rows == ROWS[:4]


SLICES = ["train", "train[:1%]", "train[:10%]", "train[50%:]", "train[33%:66%]", "train[-10%:]", "train[:-25%]", "train[3:5]", "train[-5:]"]
SLICES += ["train[:7]+train[-7:]", "train[:500]", "train[-500:3]", "train[7:3]", "train[:]"]


@pytest.mark.parametrize("total", [7, 200, 333])
@pytest.mark.parametrize("split", SLICES)
def test_slices_are_those_of_the_datasets_library(split, total):
    from datasets import ReadInstruction

    rows = sources.from_list([{"n": i} for i in range(total)])
    theirs = [i for part in ReadInstruction.from_spec(split).to_absolute({"train": total}) for i in range(part.from_, part.to)]
    assert [row["n"] for row in sources.slice_rows(rows, split).rows] == theirs


def test_slices_that_make_no_sense(tmp_path):
    path = put(tmp_path, "a.jsonl", lines(ROWS))
    for split, message in {
        "train[1%": "expected a name, or a part",
        "train[a:b]": "expected a name, or a part",
        "": "expected a name, or a part",
        "test[:2]": "no split 'test'",
        "train[:2]+test": "joins several splits",
        "train[5:2]": "has no rows",
    }.items():
        with pytest.raises(ValueError, match=message):
            sources.read(path, split=split)
    # the last 10 % of 4 rows: none, where the datasets library gives all 4
    assert sources.slice_rows(sources.from_list([{}] * 4), "train[-10%:]").rows == []
    with pytest.raises(ValueError, match="neither configurations nor revisions"):
        sources.read(path, revision="main")
    with pytest.raises(ValueError, match="neither configurations nor revisions"):
        sources.read(path, name="main")


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_are_disjoint_and_cover_all_rows(shards, tmp_path):
    path = put(tmp_path, "a.jsonl", lines(ROWS))
    parts = [sources.read(path, shards=shards, shard_index=i) for i in range(shards)]
    assert Counter(n for part in parts for n in part.numbers) == Counter(range(1, 8))
    assert max(len(part.rows) for part in parts) - min(len(part.rows) for part in parts) <= 1
    assert all(part.numbers == sorted(part.numbers) for part in parts)


def test_shards_are_drawn_not_cut():
    rows = sources.from_list([{"n": i} for i in range(1000)])
    mean = sum(sources.take_shard(rows, 4, 0).numbers) / 250
    assert 430 < mean < 570 and sources.take_shard(rows, 4, 0) == sources.take_shard(rows, 4, 0)


@pytest.mark.parametrize(("shards", "index"), [(0, 0), (2, 2), (2, -1), (9, 8)])
def test_shards_that_make_no_sense(shards, index):
    with pytest.raises(ValueError, match=f"shard {index} of {shards}"):
        sources.take_shard(sources.from_list(ROWS), shards, index)


def test_digest_is_of_bytes_and_kinds(tmp_path):
    one, two = put(tmp_path, "a/1.jsonl", lines(ROWS[:3])), put(tmp_path, "a/2.jsonl", lines(ROWS[3:]))
    base = sources.digest_source(str(tmp_path / "a"))
    assert sources.digest_source(None, data_files=[one, two]) == base != sources.digest_source(None, data_files=[two, one])
    moved = put(tmp_path, "b/1.jsonl", lines(ROWS[:3]))
    assert sources.digest_source(moved) == sources.digest_source(one) != sources.digest_source(one, ds_type="text")
    put(tmp_path, "b/1.jsonl", lines(ROWS[:3])[:-1])
    assert sources.digest_source(moved) != sources.digest_source(one)
    put(tmp_path, "a/1.jsonl", lines(ROWS[:4]))
    put(tmp_path, "a/2.jsonl", lines(ROWS[4:]))
    assert sources.digest_source(str(tmp_path / "a")) != base, "where one file ends and the next begins is part of it"


def test_digest_counts_what_chooses_the_rows(tmp_path, monkeypatch):
    path = put(tmp_path, "a.jsonl", lines(ROWS))
    choices = [{}, {"split": "train[:2]"}, {"split": "train[:50%]"}, {"limit": 3}, {"shards": 2}, {"shards": 2, "shard_index": 1}]
    assert len({sources.digest_source(path, **choice) for choice in choices}) == len(choices)
    assert inspect.signature(sources.digest_source).parameters.keys() == inspect.signature(sources.read).parameters.keys()


def test_digest_of_a_hub_dataset_is_that_of_its_rows(monkeypatch):
    import datasets

    tables = {"v1": ROWS, "v2": ROWS[:6]}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, *, split, revision: datasets.Dataset.from_list(tables[revision]))
    one, two = (sources.digest_source("owner/data", revision=revision) for revision in ("v1", "v2"))
    tables["v2"] = ROWS
    assert one != two and sources.digest_source("owner/data", revision="v1") == one


WHOLE = [name for name in WRITERS if not name.endswith(".gz")] + ["a.csv", "a.txt", "a.jsonl.gz"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", WHOLE)
def test_damaged_files_give_rows_or_one_line_that_names_them(name, tmp_path):
    """Random damage of a valid file: never an error of a library, never one without the file's name."""
    path = tmp_path / name
    if name in WRITERS:
        WRITERS[name](str(path))
    else:
        path.write_bytes(b"text,n\n" + b"".join(b'"row, %d",%d\n' % (i, i) for i in range(7)))
    whole, draw, failed = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole[: draw.randrange(1, len(whole) + 1)] if draw.random() < 0.3 else whole)
        for _ in range(draw.randrange(4)):
            data[draw.randrange(len(data))] = draw.choice([0, 10, 34, 44, 123, 255, draw.randrange(256)])
        path.write_bytes(data)
        try:
            assert all(isinstance(row, dict) for row in sources.read(str(path)).rows)
        except ValueError as error:
            failed += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert failed > 30


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_lines_without_end_and_blank_lines_without_end_name_the_file(name, tmp_path, monkeypatch):
    monkeypatch.setattr(file_rows, "LONGEST_LINE", 1000)
    monkeypatch.setattr(file_rows, "MOST_BLANK", 100)
    path = tmp_path / name
    for content, words in (("x" * 2000, "line 1 is longer than"), ("\n" * 300, "100 lines before line 101 are blank")):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{name}:? {words}"):
            list(file_rows.iterate(*files.find(str(path))))


def test_a_pipe_is_no_file_of_rows(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="rows.jsonl is no regular file"):
        files.find(str(tmp_path / "rows.jsonl"))
