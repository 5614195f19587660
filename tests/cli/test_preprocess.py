"""`treetune preprocess`: its numbers are those of the rows, its colours those of the weights."""

import json
import re

from treetune.cli import preprocess, report
from treetune.core.data import spans


def test_counts_are_those_of_the_documents(tune, tiny):
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, "--sequence-len", "128")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in tiny.chat.read_text().splitlines()]
    answers = sum(len(m["content"]) + 1 for row in rows for m in row["messages"] if m["role"] == "assistant")  # bytes, and an end of turn
    assert f"documents  {len(rows)}," in done.out
    assert f"of which {answers} supervised" in done.out


def test_page_shows_each_token_with_its_weight(tune, tiny, here):
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, "--html", "page.html", "--html-rows", "1")
    assert done.code == 0, done.err
    page = (here / "page.html").read_text()
    shown = {kind: "".join(re.findall(rf'<pre>.*?<span class="{kind}">|<span class="{kind}">(.*?)</span>', page)) for kind in ("on", "off")}
    first = json.loads(tiny.chat.read_text().splitlines()[0])["messages"]
    assert first[1]["content"] in shown["on"] and first[0]["content"] in shown["off"]


def test_debug_prints_whole_documents(tune, tiny):
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, "--debug", "2")
    assert done.out.count("<|im_start|>assistant") >= 2 and "row 2" in done.out


def test_nothing_to_train_on_and_ignored_options_are_errors(tune, tiny):
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, "--roles-to-train", "nobody", "--html", "page.html")
    assert done.code == 2 and "not one token to train on" in done.err
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, "--html-rows", "3")
    assert done.code == 2 and "--html-rows would be ignored" in done.err


def test_histogram_counts_every_length_once():
    lengths = [3, 3, 4, 9, 30, 31, 31, 47]
    lines = preprocess.histogram(lengths, bins=5)
    ranges = [re.match(r" *(\d+)-(\d+) +(\d+)", line).groups() for line in lines]
    for low, high, count in ranges:
        assert int(count) == sum(int(low) <= length <= int(high) for length in lengths)
    assert sum(int(count) for _, _, count in ranges) == len(lengths)


def test_weights_have_their_colours(kit):
    import numpy as np

    tokenizer = kit.tokenizer()
    ids = tokenizer("abc")["input_ids"]
    doc = spans.Doc(np.array(ids), np.array([0.0, 1.0, 0.5], np.float32), 7)
    assert report.document(doc, tokenizer) == (7, [("a", "off"), ("b", "on"), ("c", "half")])


def test_worker_processes_change_nothing_but_the_time(tune, tiny):
    args = ["preprocess", "--model", tiny.model, "--data", tiny.chat, "--debug", 1]
    one, two = (tune(*args, "--dataset-processes", n) for n in (1, 2))
    assert one.code == two.code == 0, two.err
    assert one.out.split("time")[0] == two.out.split("time")[0]
