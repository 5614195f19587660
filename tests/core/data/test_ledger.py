"""Sums of what a stream has read: rows that changed on disk are noticed when they are read again, whatever the blocks."""

import json
import os

import pytest

from treetune.core.data import ledger, streaming

OPTIONS = {"buffer": 4, "shuffle": True, "seed": 3}


def write(path, rows, *, later: bool = True):
    draft = path.with_suffix(".new")
    draft.write_text("".join(json.dumps({"text": text, "other": i}) + "\n" for i, text in enumerate(rows)))
    if later:
        os.utime(draft, ns=(10**18, 10**18))
    return draft.replace(path)


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(7)], later=False) for name in "ab"]


def read(files, blocks, *, say=print, cursor=streaming.START, mark=None):
    """(ledger, cursor) after some blocks from a cursor on, of which one row is taken from the last."""
    parts = [part for file in files for part in streaming.list_shards(str(file))]
    made = ledger.Ledger(parts, "text", warn=say)
    if cursor != streaming.START:
        made.go_on(cursor, mark, **OPTIONS)
    for _, (rows, here, _) in zip(range(blocks), streaming.blocks(parts, cursor=cursor, **OPTIONS), strict=False):
        made.note(rows, here)
    return made, here._replace(index=1)


def saved(files, blocks):
    made, cursor = read(files, blocks)
    return cursor, json.loads(json.dumps(made.mark(cursor)))


def test_a_stream_that_is_as_it_was_goes_on_and_ends_with_the_same_sums(files):
    cursor, mark = saved(files, 2)
    again, last = read(files, 3, cursor=cursor, mark=mark)
    whole, there = read(files, 4)
    assert last == there and again.mark(last) == whole.mark(last)


def test_sums_of_a_pass_do_not_depend_on_its_order(files):
    said = []
    made, cursor = read(files, 9, say=said.append)
    assert cursor.epoch == 2 and made.mark(cursor)["pass"] and not said


@pytest.mark.parametrize("row", range(7))
@pytest.mark.parametrize("file", [0, 1])
def test_a_row_that_was_read_and_changed_is_refused_one_to_come_is_not(row, file, files):
    cursor, mark = saved(files, 2)
    rows = [json.loads(line)["text"] for line in files[file].read_text().splitlines()]
    first = streaming.list_shards(str(files[0])) + streaming.list_shards(str(files[1]))
    taken = [row["text"] for _, (rows_, _, _) in zip(range(2), streaming.blocks(first, **OPTIONS), strict=False) for row in rows_.rows]
    known = rows[row] in taken
    write(files[file], [*rows[:row], rows[row].upper(), *rows[row + 1 :]])
    if not known:
        read(files, 1, cursor=cursor, mark=mark)
        return
    with pytest.raises(ValueError, match="rows that the run has read already are not there as they were"):
        read(files, 1, cursor=cursor, mark=mark)


def test_a_file_that_was_only_touched_is_read_once_more_and_accepted(files, monkeypatch):
    cursor, mark = saved(files, 3)
    reads, plain = [], ledger.Ledger._walked
    monkeypatch.setattr(ledger.Ledger, "_walked", lambda self, *args: reads.append(1) or plain(self, *args))
    read(files, 1, cursor=cursor, mark=mark)
    assert not reads, "the same files by size and time are not read again"
    os.utime(files[0], ns=(10**18, 10**18))
    read(files, 1, cursor=cursor, mark=mark)
    assert reads


def test_rows_that_moved_in_the_file_are_refused_even_if_their_texts_are_the_same(files):
    cursor, mark = saved(files, 3)
    for file in files:
        file.write_text("\n" + file.read_text())
        os.utime(file, ns=(10**18, 10**18))
    with pytest.raises(ValueError, match="not there as they were"):
        read(files, 1, cursor=cursor, mark=mark)


def test_rows_that_change_while_a_run_goes_on_are_told_when_they_are_read_again(files):
    said = []
    parts = [part for file in files for part in streaming.list_shards(str(file))]
    made = ledger.Ledger(parts, "text", warn=said.append)
    for rows, here, _ in streaming.blocks(parts, **OPTIONS, epochs=3):
        if here.epoch == 1 and here.block == 0:
            write(files[0], ["changed"] + [f"a {i}" for i in range(1, 7)])
        made.note(rows, here)
    made.note(rows, streaming.StreamCursor(3))
    assert len(said) in (1, 2) and "a file changed while the run went on" in said[0]


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_nothing_of_what_came_before(files):
    cursor, _ = saved(files, 2)
    made, last = read(files, 2, cursor=cursor, mark=None)
    assert made.mark(last)["rows"] == ""
    again, last = read(files, 2, cursor=last, mark=made.mark(last))
    assert again.mark(last)["rows"] == "" or last.epoch > 0
