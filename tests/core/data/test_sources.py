import json
import subprocess
import sys

import pytest

from treetune.core.data import order, sources


def write(path, text):
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return str(path)


def test_jsonl_keeps_line_numbers(tmp_path):
    rows = sources.read(write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n\n  \n{"text": "é"}'))
    assert rows.rows == [{"text": "a"}, {"text": "é"}] and rows.numbers == [1, 4]
    assert sources.locate_row(rows, 1).endswith("a.jsonl line 4")


def test_json_list_and_json_lines_under_the_wrong_suffix(tmp_path):
    rows = sources.read(write(tmp_path / "a.json", json.dumps([{"text": "a"}, {"text": "b"}], indent=1)))
    assert rows.rows == [{"text": "a"}, {"text": "b"}] and sources.locate_row(rows, 1).endswith("a.json row 2")
    assert sources.read(write(tmp_path / "b.json", '{"text": "a"}\n{"text": "b"}\n')).rows == rows.rows


def test_csv_guesses_nothing(tmp_path):
    rows = sources.read(write(tmp_path / "a.csv", 'instruction,output\n007,"two\nlines, one cell"\nb,\n'))
    assert rows.rows == [{"instruction": "007", "output": "two\nlines, one cell"}, {"instruction": "b", "output": ""}]


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    data = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "a.parquet")
    assert sources.read(str(tmp_path / "a.parquet")).rows == data


def test_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n' * 5)
    assert len(sources.read(path, limit=2).rows) == 2 and len(sources.read(path, limit=9).rows) == 5
    with pytest.raises(ValueError, match="limit is 0"):
        sources.read(path, limit=0)


BROKEN = {
    "missing.jsonl": (None, "missing.jsonl: no such file"),
    "empty.jsonl": ("", "empty.jsonl has no rows"),
    "blank.jsonl": ("\n \n", "blank.jsonl has no rows"),
    "cut.jsonl": ('{"a": 1}\n{"a": \n', "cut.jsonl line 2: broken JSON"),
    "list.jsonl": ('{"a": 1}\n[1]\n', "list.jsonl line 2 is a list: expected an object"),
    "latin.jsonl": ('{"a": 1}\n{"a": "é"}\n'.encode("latin-1"), "latin.jsonl line 2: not UTF-8"),
    "deep.jsonl": ("[" * 100_000 + "\n", "deep.jsonl line 1: objects and lists lie in each other more than 200 levels deep"),
    "digits.jsonl": ('{"a": ' + "1" * 5000 + "}\n", "digits.jsonl line 1: broken JSON"),
    "cut.json": ('[{"a": 1},\n{"a": ]', "cut.json line 2: broken JSON"),
    "numbers.json": ("[1, 2]", "numbers.json row 1 is a int: expected an object"),
    "empty.json": ("[]", "empty.json has no rows"),
    "ragged.csv": ("a,b\n1,2\n1,2,3\n", "ragged.csv row 2 has 3 values: expected 2"),
    "short.csv": ("a,b\n1\n", "short.csv row 1 has 1 values: expected 2"),
    "quote.csv": ('a,b\n1,"x" y\n', "quote.csv line 2: broken CSV"),
    "header.csv": ("a,b\n", "header.csv has no rows"),
    "not.parquet": ("hello", "not.parquet: not a readable parquet file"),
    "rows.xlsx": ("hello", r"rows.xlsx: unsupported file type '.xlsx', expected one of .jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sources_get_one_line(name, tmp_path):
    content, message = BROKEN[name]
    path = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        sources.read(path)
    assert "\n" not in str(caught.value)


def test_a_path_that_could_be_a_hub_id_is_a_path_when_its_folder_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="here/name: unsupported file type ''"):
        sources.read("here/name")


def test_hub_ids_go_to_the_datasets_library(monkeypatch):
    import datasets

    asked = []

    def load(path, name, **options):
        asked.append((path, name, options))
        if path == "owner/gone":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/gone' doesn't exist\nmore")
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = sources.read("owner/data", split="test[:1%]", name="main")
    assert asked == [("owner/data", "main", {"split": "test[:1%]"})]
    assert rows.rows == [{"text": "a"}, {"text": "b"}] and rows.name == "owner/data"
    sources.read("owner/data", revision="v2", data_files="part-*.json")
    assert asked[1] == ("owner/data", None, {"split": "train", "revision": "v2", "data_files": "part-*.json"})
    with pytest.raises(ValueError, match="owner/gone: no such file here, and no such dataset on the hub") as caught:
        sources.read("owner/gone")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "count"), [(0.1, 10), (0.001, 1), (0.999, 99), (7, 7), (99, 99)])
def test_validation_split(size, count):
    rows = sources.from_list([{"text": str(i)} for i in range(100)])
    train, val = sources.split_validation(rows, size, seed=3)
    assert len(val.rows) == count
    assert sorted(train.numbers + val.numbers) == list(range(1, 101))
    assert train.numbers == sorted(train.numbers) and [row["text"] for row in val.rows] == [str(n - 1) for n in val.numbers]
    assert sources.split_validation(rows, size, seed=3) == (train, val)
    assert count > 90 or count < 5 or sources.split_validation(rows, size, seed=4)[1].numbers != val.numbers


@pytest.mark.parametrize("size", [0, -1, 1.0, 0.0, 1.5, 5, 6])
def test_validation_sizes_that_make_no_sense(size):
    with pytest.raises(ValueError, match="validation size"):
        sources.split_validation(sources.from_list([{"text": "a"}] * 5), size)


def test_columns_of_all_rows():
    assert sources.columns(sources.from_list([{"a": 1}, {"b": 2, "a": 3}])) == ["a", "b"]


def test_shuffle_is_pinned():
    """A change of these numbers would silently change the data order of every resumed run."""
    assert order.permutation(10, 0, 1) == [9, 4, 1, 7, 5, 8, 0, 6, 3, 2]
    assert sorted(order.permutation(1000, 5)) == list(range(1000))
    assert order.permutation(100, 5) != order.permutation(100, 6) and order.permutation(100, 5, 1) != order.permutation(100, 5, 2)
    assert order.permutation(0, 1) == []


def splitmix(x):
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def plain_shuffle(n, *key):
    """The same in Python integers."""
    gamma, mask, state = 0x9E3779B97F4A7C15, 2**64 - 1, 0
    for part in key:
        state = splitmix((state + (part & mask) + gamma) & mask)
    return sorted(range(n), key=lambda i: splitmix((state + (i + 1) * gamma) & mask))


@pytest.mark.parametrize("key", [(0,), (7, 2), (-3, 1), (2**70, 5)])
def test_shuffle_equals_plain_integers(key):
    assert order.permutation(500, *key) == plain_shuffle(500, *key)


def test_importing_is_light():
    """A config error must come within half a second: the heavy libraries are imported where they are used."""
    heavy = {"transformers", "datasets", "jinja2", "pyarrow"}
    names = "cache, dedup, formats, loader, sources, streaming"
    code = f"import sys; from treetune.core.data import {names}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_rows_of_one_prompt_are_held_out_together():
    rows = sources.from_list([{"prompt": f"q{i % 17}", "n": i} for i in range(100)])
    train, held = sources.split_validation(rows, 0.2, 3, key=lambda row: row["prompt"])
    sides = [{row["prompt"] for row in side.rows} for side in (train, held)]
    assert not sides[0] & sides[1] and 15 <= len(held.rows) <= 20
    assert sorted(row["n"] for row in train.rows + held.rows) == list(range(100))
    _, few = sources.split_validation(rows, 1, 3, key=lambda row: row["prompt"])
    assert len({row["prompt"] for row in few.rows}) == 2
    one = sources.from_list([{"prompt": "q", "n": i} for i in range(10)])
    assert len(sources.split_validation(one, 0.2, 3, key=lambda row: row["prompt"])[1].rows) == 2
