import gzip
import itertools
import json
import threading
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.core.data import files, formats, sources, spans, streaming

SIZES = np.random.default_rng(0).integers(2, 30, 103).tolist()
TEXTS = [f"{i} " + "x" * size for i, size in enumerate(SIZES)]
CUTS = (0, 40, 41, 70, 103)


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(folder, kind):
    """Four files of unequal size, with blank lines where the kind allows them."""
    import pyarrow
    from pyarrow import parquet

    for i, (begin, end) in enumerate(zip(CUTS, CUTS[1:], strict=False)):
        texts, path = TEXTS[begin:end], folder / f"{i}.{kind}"
        match kind:
            case "jsonl":
                path.write_bytes(b"\n" + lines(texts).replace(b"\n", b"\n\n", 1))
            case "jsonl.gz":
                path.write_bytes(gzip.compress(lines(texts)))
            case "parquet":
                parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
            case "csv":
                path.write_text("text\n" + "".join(text + "\n" for text in texts))
            case "txt":
                path.write_text("".join(text + "\n" for text in texts))
    return str(folder)


KINDS = ("jsonl", "jsonl.gz", "parquet", "csv", "txt")
MODES = {
    "packed": {"budget": 64, "buffer": 20},
    "packed, whole epoch in the buffer": {"budget": 64, "buffer": 500},
    "rows": {"rows": 3, "buffer": 17},
    "one row at a time": {"rows": 1, "buffer": 1},
    "in order": {"rows": 3, "buffer": 20, "shuffle": False},
}


def encode(rows):
    """One document per row, of as many tokens as it has letters."""
    sizes = [len(row["text"]) for row in rows.rows]
    return [spans.Doc(np.full(size, size, np.int32), np.ones(size, np.float32), n) for size, n in zip(sizes, rows.numbers, strict=True)]


def rows_of(micro_batches):
    return [doc.row for docs in micro_batches for doc in docs]


@pytest.fixture(params=KINDS)
def parts(request, tmp_path):
    return streaming.list_shards(write(tmp_path, request.param))


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_an_epoch_has_each_row_once(parts, options):
    stream = list(streaming.micro_batches(parts, encode, epochs=2, **options))
    epochs = [[docs for docs, after in stream if after.epoch == epoch] for epoch in (0, 1)]  # a block never mixes epochs
    whole = Counter(rows_of(epochs[0]))
    assert len(whole) == len(TEXTS) and set(whole.values()) == {1} and whole == Counter(rows_of(epochs[1]))
    assert Counter(len(doc.tokens) for docs in epochs[0] for doc in docs) == Counter(map(len, TEXTS))
    if options.get("shuffle", True):
        assert rows_of(epochs[0]) != rows_of(epochs[1])
    else:
        assert rows_of(epochs[0]) == sorted(whole)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_resuming_from_any_state_continues_the_same_stream(parts, options):
    stream = list(streaming.micro_batches(parts, encode, epochs=2, **options))
    want = [rows_of([docs]) for docs, _ in stream]
    for stop in range(0, len(stream), max(1, len(stream) // 25)):
        state = json.loads(json.dumps(stream[stop][1]._asdict()))
        rest = list(streaming.micro_batches(parts, encode, epochs=2, cursor=streaming.StreamCursor(**state), **options))
        assert [rows_of([docs]) for docs, _ in rest] == want[stop + 1 :]
        assert [cursor for _, cursor in rest] == [cursor for _, cursor in stream[stop + 1 :]]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(stop=st.integers(0, 1000), accum=st.integers(1, 3), buffer=st.integers(1, 120), seed=st.integers(0, 5), packed=st.booleans())
def test_steps_resume_and_ranks_cover_each_row_once(tmp_path_factory, stop, accum, buffer, seed, packed):
    folder = tmp_path_factory.getbasetemp() / "steps"
    if not folder.exists():
        folder.mkdir()
        write(folder, "jsonl")
    parts = streaming.list_shards(str(folder))
    options = {"epochs": 1, "accum": accum, "buffer": buffer, "seed": seed} | ({"budget": 64} if packed else {"rows": 2})
    whole = list(streaming.stream_steps(parts, encode, **options))
    stop %= len(whole)
    rest = list(streaming.stream_steps(parts, encode, cursor=whole[stop][1], **options))
    assert [[rows_of([m]) for m in step] for step, _ in rest] == [[rows_of([m]) for m in step] for step, _ in whole[stop + 1 :]]
    for world in (1, 2, 4):
        ranks = [list(streaming.stream_steps(parts, encode, world=world, rank=rank, **options)) for rank in range(world)]
        assert len({len(steps) for steps in ranks}) == 1
        for step in zip(*ranks, strict=True):
            assert len({cursor for _, cursor in step}) == 1 and len({len(micro) for micro, _ in step}) == 1
        found = Counter(row for steps in ranks for micro, _ in steps for row in rows_of(micro))
        assert len(found) == len(TEXTS) and set(found.values()) == {1}


def test_the_stream_does_not_depend_on_ranks_or_accumulation(tmp_path):
    parts = streaming.list_shards(write(tmp_path, "jsonl"))
    one = [rows_of(micro) for micro, _ in streaming.stream_steps(parts, encode, accum=4, epochs=2, budget=64, buffer=20)]
    two = [list(streaming.stream_steps(parts, encode, accum=2, world=2, rank=rank, epochs=2, budget=64, buffer=20)) for rank in (0, 1)]
    assert [sorted(rows_of(a[0]) + rows_of(b[0])) for a, b in zip(*two, strict=True)] == [sorted(rows) for rows in one]


def test_blocks_bound_what_is_read_ahead(tmp_path):
    read = []

    def watched(part):
        def reading(place):
            for record in part.read(place):
                read.append(record.number)
                yield record

        return part._replace(read=reading)

    parts = [watched(part) for part in streaming.list_shards(write(tmp_path, "jsonl"))]
    stream, taken = streaming.micro_batches(parts, encode, rows=1, buffer=10), 0
    for _ in range(60):
        taken += len(next(stream)[0])
        assert len(read) <= -(-taken // 10) * 10


def test_a_large_file_is_never_held_in_memory(tmp_path):
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        for _ in range(60):
            file.write(lines(["y" * 2000] * 100))
    assert path.stat().st_size > 12e6
    short = lambda rows: [spans.Doc(np.ones(4, np.int32), np.ones(4, np.float32), n) for n in rows.numbers]  # noqa: E731
    tracemalloc.start()
    count = sum(len(docs) for docs, _ in streaming.micro_batches(streaming.list_shards(str(path)), short, epochs=1, rows=8, buffer=50))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 6000 and peak < 2e6


def test_resuming_reads_only_what_is_left(tmp_path, monkeypatch):
    parts = streaming.list_shards(write(tmp_path, "jsonl"))
    cursor = list(streaming.micro_batches(parts, encode, rows=1, buffer=10, epochs=1, shuffle=False))[34][1]
    assert cursor == streaming.StreamCursor(epoch=0, part=0, row=cursor.row, offset=cursor.offset, block=3, index=5)
    skipped = []
    monkeypatch.setattr(files, "skip_bytes", lambda stream, offset: (skipped.append(offset), stream.seek(offset)))
    got = next(streaming.micro_batches(parts, encode, rows=1, buffer=10, shuffle=False, cursor=cursor))
    assert len(got[0][0].tokens) == len(TEXTS[35]) and skipped[0] == cursor.offset > 0


def test_packing_fills_micro_batches_within_a_block(tmp_path):
    parts = streaming.list_shards(write(tmp_path, "jsonl"))
    stream = list(streaming.micro_batches(parts, encode, epochs=1, budget=64, buffer=103))
    used = [sum(len(doc.tokens) for doc in docs) for docs, _ in stream]
    assert max(used) <= 64 and sum(used) / (64 * len(used)) > 0.95
    with pytest.raises(ValueError, match="more than the budget of 16"):
        list(streaming.micro_batches(parts, encode, epochs=1, budget=16))


def test_seeds_and_blocks_shuffle_differently(tmp_path):
    parts = streaming.list_shards(write(tmp_path, "jsonl"))
    orders = [rows_of(d for d, _ in streaming.micro_batches(parts, encode, epochs=1, rows=1, buffer=20, seed=s)) for s in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    parts = streaming.list_shards(str(tmp_path / "1.jsonl")) + streaming.list_shards(str(tmp_path / "3.jsonl"))
    numbers = rows_of(docs for docs, _ in streaming.micro_batches(parts[1:], encode, epochs=1, rows=1, buffer=11))
    blocks = [numbers[i : i + 11] for i in (0, 11, 22)]
    ranks = [[sorted(block).index(n) for n in block] for block in blocks]
    assert len({tuple(rank) for rank in ranks}) == 3, "each block has an order of its own"


def test_errors_name_the_file_and_line_of_a_row(tmp_path):
    parts = streaming.list_shards(write(tmp_path, "jsonl"))
    for rows, _, _ in streaming.blocks(parts, buffer=1000, epochs=1, shuffle=False):
        assert sources.locate_row(rows, 0) == f"{tmp_path}/0.jsonl line 2" and sources.locate_row(rows, 40) == f"{tmp_path}/1.jsonl line 2"
        assert sources.locate_row(rows, 102) == f"{tmp_path}/3.jsonl line {2 + 33}"
    (tmp_path / "2.jsonl").write_text('{"text": "a"}\nbroken\n')
    with pytest.raises(ValueError, match="2.jsonl line 2: broken JSON"):
        list(streaming.micro_batches(parts, encode, epochs=1, rows=1))


def test_skip_leaves_rows_out_at_the_beginning(tmp_path):
    path = write(tmp_path, "jsonl")
    held = sources.read(path, limit=45).rows
    for skip in (0, 1, 39, 40, 41, 45, 102):
        parts = streaming.list_shards(path, skip=skip)
        stream = streaming.blocks(parts, buffer=10, epochs=2, shuffle=True)
        assert Counter(row["text"] for rows, _, _ in stream for row in rows.rows) == Counter(TEXTS[skip:] * 2)
        if skip == 45:
            first = next(streaming.blocks(parts, buffer=100, shuffle=False))[0].rows
            assert [row["text"] for row in held + first] == TEXTS
    with pytest.raises(ValueError, match="skip leaves out every row"):
        streaming.list_shards(path, skip=200)


def test_an_iterable_dataset_of_the_datasets_library(monkeypatch):
    import datasets

    data = datasets.Dataset.from_list([{"text": text} for text in TEXTS]).to_iterable_dataset(num_shards=4)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **options: asked.append((path, name, options)) or data)
    parts = streaming.list_shards("owner/data", name="main", split="test", revision="v1")
    assert asked == [("owner/data", "main", {"split": "test", "revision": "v1", "streaming": True})] and len(parts) == 4
    stream = list(streaming.micro_batches(parts, encode, epochs=1, budget=64, buffer=20))
    assert len(set(rows_of(docs for docs, _ in stream))) == len(TEXTS)
    for stop in (0, 7, len(stream) - 2):
        rest = streaming.micro_batches(parts, encode, epochs=1, budget=64, buffer=20, cursor=stream[stop][1])
        assert [rows_of([docs]) for docs, _ in rest] == [rows_of([docs]) for docs, _ in stream[stop + 1 :]]


@pytest.mark.parametrize("kind", ["one split", "splits"])
def test_a_saved_folder_streams(kind, tmp_path):
    import datasets

    data = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    saved = data if kind == "one split" else datasets.DatasetDict(train=data, test=data.select([0]))
    saved.save_to_disk(str(tmp_path / "set"), **({"num_shards": 3} if kind == "one split" else {"num_shards": {"train": 3, "test": 1}}))
    parts = streaming.list_shards(str(tmp_path / "set"))
    blocks = streaming.blocks(parts, epochs=1, buffer=20, shuffle=False)
    assert len(parts) == 3 and [row["text"] for rows, _, _ in blocks for row in rows.rows] == TEXTS


def test_remote_files_stream(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe("/streams/a.jsonl", lines(TEXTS))
    parts = streaming.list_shards("memory://streams/a.jsonl")
    stream = list(streaming.micro_batches(parts, encode, epochs=1, rows=2, buffer=10))
    assert len(set(rows_of(docs for docs, _ in stream))) == len(TEXTS)
    rest = streaming.micro_batches(parts, encode, epochs=1, rows=2, buffer=10, cursor=stream[20][1])
    assert [rows_of([docs]) for docs, _ in rest] == [rows_of([docs]) for docs, _ in stream[21:]]


def test_raw_text_streams_through_the_format(tmp_path, make_tokenizer):
    """What the stream holds are the very documents of the whole data set."""
    path, tokenizer = write(tmp_path, "jsonl"), make_tokenizer("byte")

    def read(rows):
        return formats.encode_rows(rows, tokenizer, format="completion", sequence_len=16)[0]

    whole = Counter(doc.tokens.tobytes() for doc in read(sources.read(path)))
    stream = streaming.micro_batches(streaming.list_shards(path), read, epochs=1, budget=32, buffer=20)
    assert Counter(doc.tokens.tobytes() for docs, _ in stream for doc in docs) == whole


def test_streams_that_make_no_sense(tmp_path):
    path = write(tmp_path, "txt")
    for bad, message in (({"split": "train[:1%]"}, "no parts of splits"), ({"revision": "x"}, "neither configurations nor revisions")):
        with pytest.raises(ValueError, match=message):
            streaming.list_shards(path, **bad)
    parts = streaming.list_shards(path)
    with pytest.raises(ValueError, match="buffer has 0 rows"):
        next(streaming.micro_batches(parts, encode, rows=1, buffer=0))
    with pytest.raises(ValueError, match="give exactly one"):
        next(streaming.micro_batches(parts, encode))
    with pytest.raises(ValueError, match="not one document in a whole pass"):
        next(streaming.micro_batches(parts, lambda rows: [], rows=1, buffer=10))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="a.jsonl: no rows to stream"):
        next(streaming.micro_batches(streaming.list_shards(str(tmp_path / "empty")), encode, rows=1))


def test_digest_tells_streams_apart(tmp_path):
    path = write(tmp_path, "jsonl")
    base = [streaming.stream_fingerprint(streaming.list_shards(path), seed=0, budget=64) for _ in range(2)]
    others = [
        streaming.stream_fingerprint(streaming.list_shards(path), seed=1, budget=64),
        streaming.stream_fingerprint(streaming.list_shards(path)[1:], seed=0, budget=64),
        streaming.stream_fingerprint(streaming.list_shards(path, skip=1), seed=0, budget=64),
    ]
    assert base[0] == base[1] and len({*base, *others}) == 4


def test_a_thread_makes_the_same_items_ahead(tmp_path):
    parts = streaming.list_shards(write(tmp_path, "jsonl"))
    want = [cursor for _, cursor in streaming.micro_batches(parts, encode, epochs=2, rows=2, buffer=10)]
    assert [cursor for _, cursor in streaming.prefetch(streaming.micro_batches(parts, encode, epochs=2, rows=2, buffer=10))] == want
    before, made = threading.active_count(), []
    endless = streaming.prefetch((made.append(i) or i for i in itertools.count()), depth=3)
    assert [next(endless) for _ in range(5)] == list(range(5)) and threading.active_count() == before + 1
    endless.close()
    assert threading.active_count() == before and len(made) <= 5 + 3 + 1


def test_errors_of_the_thread_come_out_in_their_place():
    def broken():
        yield 1
        yield 2
        raise ValueError("row 3")

    items = streaming.prefetch(broken())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="row 3"):
        next(items)
