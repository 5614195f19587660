"""`pretrain --streaming`: rows are read while training, and a run that dies goes on with the very next row."""

import os
import signal
import threading

import pytest

from treetune.core.data import file_rows, pack
from treetune.core.run import recorder

STEPS = 6
BUFFER = "--streaming-multipack-buffer-size"
ONE_ROW = ["--no-sample-packing", "--micro-batch-size", 1, "--gradient-accumulation-steps", 1]
RUN = ["--max-steps", STEPS, "--save-steps", 2, "--micro-batch-size", 1]
KINDS = {
    "packed, many epochs": [*RUN, BUFFER, 5, "--neftune-noise-alpha", 5],
    "one block": [*RUN, BUFFER, 100, "--val-set-size", 3],
    "rows, in order": [*RUN, BUFFER, 3, "--no-sample-packing", "--no-shuffle"],
}


@pytest.fixture
def args(tiny, here, kit):
    """args(...) -> those of a short streaming run over two files."""
    rows = [{"text": f"Line {i}. " + "the cat sat. " * (1 + i % 5)} for i in range(14)] + [{"text": " "}] * 4
    kit.write_rows(here / "a.jsonl", rows[:9])
    kit.write_rows(here / "b.jsonl", rows[9:])

    def build(*more, output="run"):
        known = {"--model": [tiny.model], "--data": ["a.jsonl", "b.jsonl"], "--sequence-len": [64], "--learning-rate": [0.01]}
        kept = [part for flag, values in known.items() if flag not in more for part in (flag, *values)]
        return ["pretrain", "--streaming", "--output-dir", output, *kept, *more]

    return build


def left(kit, root):
    """What a finished run leaves, without times."""
    return kit.state(root, STEPS), kit.tensors(root / "model/model.safetensors"), kit.timeless(kit.metrics(root))


def assert_same(kit, one, other):
    assert kit.same(one[0], other[0]) and kit.same(one[1], other[1]) and one[2] == other[2]


def at_step(step, signum):
    def prepare():
        push = recorder.Recorder.push

        def patched(self, index, metrics):
            done = push(self, index, metrics)
            if index == step:
                os.kill(os.getpid(), signum)
            return done

        recorder.Recorder.push = patched

    return prepare


FAST = [("packed, many epochs", signal.SIGKILL), ("one block", signal.SIGTERM)]
STOPPED = [(kind, signum) for kind in KINDS for signum in (signal.SIGKILL, signal.SIGTERM)]


@pytest.mark.parametrize(("kind", "signum"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in STOPPED])
def test_a_stopped_run_continues_bit_for_bit(kind, signum, kit, args, tune, forked, here):
    done = tune(*args(*KINDS[kind], output="whole"))
    assert done.code == 0, done.err
    stopped = forked(at_step(3, signum), *args(*KINDS[kind]))
    assert stopped.code == (-signum if signum == signal.SIGKILL else 128 + signum), stopped.err
    done = tune(*args(*KINDS[kind], "--resume", "auto"))
    assert done.code == 0, done.err
    assert_same(kit, left(kit, here / "whole"), left(kit, here / "run"))
    losses = [record["train/loss"] for record in kit.metrics(here / "run") if "train/loss" in record]
    assert len(set(losses)) == len(losses) == STEPS


def test_a_stream_in_one_block_trains_on_what_memory_would(kit, tiny, args, tune, here):
    """Without shuffling and with all rows in the buffer, an epoch is that of a run that reads everything first."""
    both = ["--max-steps", STEPS, "--no-sample-packing", "--no-shuffle", "--micro-batch-size", 2, "--gradient-accumulation-steps", 1]
    assert tune(*args(*both, "--data", tiny.text, output="stream")).code == 0
    plain = [arg for arg in args(*both, "--data", tiny.text, "--val-set-size", 0, output="memory") if arg != "--streaming"]
    assert tune(*plain).code == 0
    assert kit.same(kit.tensors(here / "stream/model/model.safetensors"), kit.tensors(here / "memory/model/model.safetensors"))


def test_the_data_is_never_read_whole(kit, args, tune, here, monkeypatch):
    rows = [{"text": f"{i} " + "x" * 60} for i in range(3000)]
    kit.write_rows(here / "large.jsonl", rows)
    read, plain, threads = [], file_rows.iterate, threading.active_count()
    monkeypatch.setattr(file_rows, "iterate", lambda *place: (read.append(record.number) or record for record in plain(*place)))
    options = ["--data", "large.jsonl", "--max-steps", 2, BUFFER, 10, "--val-set-size", 5]
    done = tune(*args(*options, "--sample-tokens", 4))
    assert done.code == 0, done.err
    assert max(read) < 200
    assert "stream of 1 files or shards" in done.out and "10 rows at a time" in done.out
    report = (here / "run/report.html").read_text()
    assert "row 6<" in report and "row 1<" not in report, "the first documents that are trained on"
    assert kit.samples(here / "run")[0]["prompt"].startswith("0 x"), "the first held-out row is the first row"
    assert threading.active_count() == threads


def test_rows_held_out_are_the_first_and_never_trained_on(kit, args, tune, here, monkeypatch):
    seen, plain = [], pack.collate
    monkeypatch.setattr(pack, "collate", lambda docs, **options: seen.append([doc.row for doc in docs]) or plain(docs, **options))
    kit.write_rows(here / "rows.jsonl", [{"text": f"{i} cats"} for i in range(12)])
    options = ["--data", "rows.jsonl", "--max-steps", 12, *ONE_ROW]
    assert tune(*args(*options, "--val-set-size", 4, BUFFER, 3, "--eval-steps", 100)).code == 0
    held, trained = seen[:4], seen[4:-4]
    assert sorted(row for rows in held for row in rows) == [1, 2, 3, 4]
    assert {row for rows in trained for row in rows} == set(range(5, 13))


def test_val_data_is_read_beside_the_stream(kit, tiny, args, tune, here):
    done = tune(*args("--max-steps", 2, "--val-data", tiny.text))
    assert done.code == 0, done.err
    assert "16 documents held out" in done.out and any("eval/loss" in record for record in kit.metrics(here / "run"))


def test_by_default_nothing_of_a_stream_is_held_out(kit, args, tune, here):
    done = tune(*args("--max-steps", 2))
    assert done.code == 0, done.err
    assert "0 documents held out" in done.out and not any("eval/loss" in record for record in kit.metrics(here / "run"))
    again = tune("pretrain", "--config", "run/config.yaml", "--output-dir", "again")
    assert again.code == 0, again.err
    assert kit.timeless(kit.metrics(here / "again")) == kit.timeless(kit.metrics(here / "run"))


REFUSED = {
    "no steps": (["--streaming"], "streaming needs max_steps"),
    "a part": (
        ["--streaming", "--max-steps", 2, "--val-set-size", 0.2], "val-set-size would be ignored: 0.2 is a part", "a number of rows"
    ),
    "the default said": (["--streaming", "--max-steps", 2, "--val-set-size", 0.1], "val-set-size would be ignored: 0.1 is a part"),
    "buffer of nothing": (["--max-steps", 2, BUFFER, 5], "buffer-size would be ignored: there is no --streaming"),
    "buffer of no rows": (["--streaming", "--max-steps", 2, BUFFER, 0], "buffer_size must be at least 1 .*got 0"),
    "rows": (["--streaming", "--max-steps", 2, "--max-rows", 5], "max-rows would be ignored"),
    "evaluations": (["--streaming", "--max-steps", 2, "--eval-steps", 1], "eval-steps would be ignored: nothing is held out"),
    "all held out": (["--streaming", "--max-steps", 2, "--val-set-size", 16], "val_set_size 16 holds out all 16 rows of .*text.jsonl"),
    "split": (["--streaming", "--max-steps", 2, "--split", "train[:10%]"], "a stream has no parts of splits"),
    "column": (["--streaming", "--max-steps", 2, "--text-column", "body"], r"text.jsonl line 1", "body"),
    "no file": (["--streaming", "--max-steps", 2, "--data", "nope.jsonl"], "nope.jsonl: no such file"),
    "too long": (["--streaming", "--max-steps", 2, "--sequence-len", 999], "sequence_len 999", "256 positions"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_streams_that_make_no_sense_are_one_line(what, kit, tiny, tune, here):
    more, *words = REFUSED[what]
    known = {"--model": tiny.model, "--data": tiny.text, "--sequence-len": 64}
    kit.refused(tune("pretrain", *more, *[part for flag, value in known.items() if flag not in more for part in (flag, value)]), *words)
    assert kit.listing(here) == set()


def test_pairs_do_not_stream(kit, tune):
    kit.refused(tune("dpo", "--streaming"), "unknown option --streaming")


def test_blank_rows_are_no_reason_to_stop_but_a_stream_of_them_is(kit, args, tune, here):
    kit.write_rows(here / "rows.jsonl", [{"text": " "}] * 20 + [{"text": "some cats sat"}])
    done = tune(*args("--data", "rows.jsonl", "--max-steps", 2, BUFFER, 2))
    assert done.code == 0, done.err
    kit.write_rows(here / "blank.jsonl", [{"text": " "}] * 20)
    kit.refused(tune(*args("--data", "blank.jsonl", "--max-steps", 2, output="no")), "not one document in a whole pass")


def test_a_bad_row_far_into_the_stream_is_one_line_and_the_run_goes_on_when_it_is_mended(kit, args, tune, here):
    rows = [{"text": f"{i} " + "x" * 50} for i in range(70)]
    kit.write_rows(here / "rows.jsonl", [*rows[:50], {"texts": "oops"}, *rows[51:]])
    options = ["--data", "rows.jsonl", "--max-steps", 60, "--save-steps", 30, "--no-shuffle", *ONE_ROW, BUFFER, 10]
    kit.refused(tune(*args(*options)), "rows.jsonl line 51", "text")
    kit.write_rows(here / "rows.jsonl", rows)
    assert tune(*args(*options, "--resume", "auto")).code == 0
    assert [record["step"] for record in kit.metrics(here / "run") if "train/loss" in record] == list(range(1, 61))


def test_a_row_that_was_trained_on_and_changed_is_refused_and_one_to_come_is_not(kit, args, tune, here):
    rows = [{"text": f"{i} " + "x" * 50} for i in range(100)]
    options = ["--data", "rows.jsonl", "--save-steps", 100, "--no-shuffle", *ONE_ROW, BUFFER, 10]
    kit.write_rows(here / "rows.jsonl", rows)
    assert tune(*args(*options, "--max-steps", 25)).code == 0
    for row, refused in ((12, True), (27, True), (60, False)):
        kit.write_rows(here / "rows.jsonl", [*rows[:row], {"text": rows[row]["text"].replace("x", "y")}, *rows[row + 1 :]])
        done = tune(*args(*options, "--max-steps", 26, "--resume", "auto"))
        if refused:  # of the block that the run stands in, too
            kit.refused(done, "rows.jsonl: rows that the run has read already are not there as they were")
        else:
            assert done.code == 0, done.err


OTHERS = {
    "streaming_multipack_buffer_size": [BUFFER, 7], "data": ["--data", "a.jsonl"],
    "seed": ["--seed", 3], "sequence_len": ["--sequence-len", 32],
    "gradient_accumulation_steps": ["--gradient-accumulation-steps", 1], "val_set_size": ["--val-set-size", 2],
}  # fmt: skip


def test_another_stream_is_not_resumed(kit, args, tune):
    assert tune(*args("--max-steps", 2)).code == 0
    for what, other in OTHERS.items():
        kit.refused(tune(*args("--max-steps", 4, "--resume", "auto", *other)), rf"cannot be continued with {what} \S+ instead of")


def test_a_stream_and_a_run_in_memory_do_not_continue_each_other(kit, tiny, args, tune):
    options = ["--data", tiny.text, "--val-set-size", 0, "--resume", "auto", "--max-steps"]
    assert tune(*args(*options, 2)).code == 0
    kit.refused(tune(*[arg for arg in args(*options, 4) if arg != "--streaming"]), "streaming false instead of true")


def test_files_of_a_stream_may_move_and_not_change_places(args, kit, tune, here):
    assert tune(*args(BUFFER, 5, "--max-steps", 2)).code == 0
    (here / "rows").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (here / name).rename(here / "rows" / name)
    ending = [BUFFER, 5, "--max-steps", 3, "--resume", "auto", "--data"]
    done = tune(*args(*ending, "rows/a.jsonl", "rows/b.jsonl"))
    assert done.code == 0 and "  data a.jsonl b.jsonl -> rows/a.jsonl rows/b.jsonl\n" in done.out, done
    kit.refused(tune(*args(*ending, "rows/b.jsonl", "rows/a.jsonl")), "data rows/b.jsonl rows/a.jsonl instead of rows/a.jsonl rows/b.jsonl")
