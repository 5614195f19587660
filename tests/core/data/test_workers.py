"""Worker processes give what one process gives: documents, order, report, errors."""

import subprocess
import sys

import numpy as np
import pytest

from treetune.core.data import formats, sources, template_date, workers


def rows(count, text="row {} has some words in it"):
    return sources.from_list([{"text": text.format(i) * (i % 3 != 1)} for i in range(count)], "data.jsonl")


def test_two_processes_give_the_documents_of_one(tokenizer):
    seen = []
    one = formats.encode_rows(rows(50), tokenizer, format="completion", sequence_len=8)
    two = workers.encode_rows(rows(50), tokenizer, processes=2, progress=seen.append, format="completion", sequence_len=8)
    assert two[1] == one[1] and one[1].dropped and one[1].split
    assert sum(seen) == 50
    assert [doc.row for doc in two[0]] == [doc.row for doc in one[0]]
    for a, b in zip(one[0], two[0], strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.weight, b.weight)


def test_errors_are_those_of_one_process(tokenizer, shared_pool):
    bad = sources.from_list([{"text": "good"}] * 20 + [{"text": 3}], "data.jsonl")
    with pytest.raises(ValueError, match="data.jsonl row 21: field text is of type int"):
        workers.encode_rows(bad, tokenizer, processes=2, format="completion")
    with pytest.raises(ValueError, match="not one token to train on in 9 rows"):
        workers.encode_rows(rows(9, text=""), tokenizer, processes=2, format="completion")


def test_processes_write_the_date_of_their_parent(tokenizer, monkeypatch, shared_pool):
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    monkeypatch.setattr(template_date._Day, "chosen", template_date._Day.chosen)
    template_date.choose("1999-12-31")
    talks = [{"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "the answer"}]} for i in range(8)]
    docs, _ = workers.encode_rows(sources.from_list(talks), tokenizer, processes=2, format="chat")
    assert all(tokenizer.decode(doc.tokens).startswith("1999<|im_start|>user") for doc in docs)


KILLED = """
import os, signal, time
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from treetune.core.data import workers
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), workers._end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow  # three processes that import torch
def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    # The output that a worker inherits closes when it has ended: run returns then, and no earlier.
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, timeout=30)
    assert done.returncode == -9 and int(done.stdout) > 0
