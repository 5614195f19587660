"""`treetune preprocess`: its numbers are those of the rows, its colours those of the weights."""

import html
import json
import re

import pytest

from treetune.cli.commands import preprocess
from treetune.cli.options.data import SAMPLES
from treetune.core.data import passages, spans

PAIRS = [{"prompt": f"{i} + 1 = ", "chosen": f"{i + 1}", "rejected": f"{i + 5}, or so"} for i in range(6)]
JUDGED = [{"prompt": f"{i} + 1 = ", "completion": f"it is {i + i % 2}", "label": i % 2 == 1} for i in range(6)]
STEPS = [{"prompt": "Add.", "completions": ["1+1=2", "2+2=5"], "labels": [True, False]} for i in range(3)]


def test_counts_are_those_of_the_documents(tune, tiny):
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, "--sequence-len", "128")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in tiny.chat.read_text().splitlines()]
    answers = sum(len(m["content"]) + 1 for row in rows for m in row["messages"] if m["role"] == "assistant")  # bytes, and an end of turn
    assert f"documents  {len(rows)}," in done.out
    assert f"of which {answers} supervised" in done.out


def shown_as(page, kind):
    """All text of a page's runs of one kind, as a reader sees it."""
    runs = re.findall(rf'<span class="{kind}">(.*?)</span>', page, re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", "", "".join(runs)))


def test_page_shows_each_token_with_its_weight(tune, tiny, here):
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, "--html", "pages/page.html", "--html-rows", "1")
    assert done.code == 0, done.err
    page = (here / "pages/page.html").read_text()
    first = json.loads(tiny.chat.read_text().splitlines()[0])["messages"]
    assert shown_as(page, "on") == "".join(turn["content"] + "<|im_end|>" for turn in first if turn["role"] == "assistant")
    assert first[0]["content"] in shown_as(page, "off")
    assert page.count("<i class=") == len(shown_as(page, "off") + shown_as(page, "on")) - sum(
        len(mark) - 1 for mark in ("<|im_start|>", "<|im_end|>") for _ in first
    )


def test_debug_prints_whole_documents(tune, tiny):
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, "--debug", "2")
    assert done.out.count("<|im_start|>assistant") >= 2 and "row 2" in done.out


def test_nothing_to_train_on_and_ignored_options_are_errors(tune, tiny):
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, "--roles-to-train", "nobody", "--html", "page.html")
    assert done.code == 2 and "not one token to train on" in done.err
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, "--html-rows", "3")
    assert done.code == 2 and "--html-rows would be ignored" in done.err


def test_weights_have_their_colours(kit):
    import numpy as np

    tokenizer = kit.tokenizer()
    ids = tokenizer("abc")["input_ids"]
    doc = spans.Doc(np.array(ids), np.array([0.0, 1.0, 0.5], np.float32), 7)
    assert passages.label_tokens(doc, tokenizer) == [("a", "off"), ("b", "on"), ("c", "half")]


@pytest.mark.slow  # tests/core/data/test_workers.py has the documents of two processes
def test_worker_processes_change_nothing_but_the_time(tune, tiny):
    args = ["preprocess", "--model", tiny.model, "--data", tiny.chat, "--debug", 1]
    one, two = (tune(*args, "--dataset-processes", n) for n in (1, 2))
    assert one.code == two.code == 0, two.err
    assert one.out.split("time")[0] == two.out.split("time")[0]


@pytest.fixture
def show(tune, tiny, kit, here):
    """show(method, rows, ...) -> Done of preprocess on these rows."""

    def run(method, rows, *args):
        kit.write_rows(here / "rows.jsonl", rows)
        return tune("preprocess", "--model", tiny.model, "--method", method, "--data", "rows.jsonl", *args)

    return run


def test_pairs_are_counted_with_their_prompt_once(show):
    done = show("dpo", [*PAIRS, PAIRS[0] | {"rejected": "1"}, PAIRS[1] | {"rejected": " "}])
    assert done.code == 0, done.err
    prompts, replies = sum(len(row["prompt"]) for row in PAIRS), sum(len(row["chosen"] + row["rejected"]) + 2 for row in PAIRS)
    assert "passthrough: 8 rows -> 6 documents" in done.out
    assert "dropped 1 row (identical completions)" in done.out and "dropped 1 row (an empty completion)" in done.out
    assert f"{prompts + replies}, of which {replies} supervised" in done.out
    assert f"{prompts + replies} tokens instead of {2 * prompts + replies}" in done.out


def test_packing_of_pairs_allows_for_both_sides(show):
    done = show("dpo", [{"prompt": "a", "chosen": "b" * 30, "rejected": "c" * 30}], "--sequence-len", 32, "--micro-batch-size", 1)
    assert "100.0 % full at 63 tokens per micro-batch (the longest document)" in done.out, done.err


@pytest.mark.parametrize(
    ("method", "rows", "said"),
    [
        ("kto", JUDGED, ["prompt", "completion, undesirable", "completion of another row, for the baseline"]),
        ("reward", PAIRS, ["a score to learn at the end of each of 12 completions", "chosen", "rejected"]),
        ("prm", STEPS, ["with 6 judged steps, 3 of them good"]),
    ],
)
def test_other_methods(show, method, rows, said):
    done = show(method, rows, "--debug", 1)
    assert done.code == 0, done.err
    assert all(text in done.out for text in said) and done.out.count("\nrow 1\n") == 1


def test_the_page_colours_sides_and_steps(show, here):
    assert show("dpo", PAIRS[:1], "--html", "page.html").code == 0
    page = (here / "page.html").read_text()
    assert [page.count(f"<strong>{title}</strong>") for title in ("prompt", "chosen", "rejected")] == [1, 1, 1]
    assert [shown_as(page, kind) for kind in ("off", "on", "bad")] == ["0 + 1 = ", "1<|im_end|>", "5, or so<|im_end|>"]
    assert show("prm", STEPS[:1], "--html", "page.html").code == 0
    page = (here / "page.html").read_text()
    assert [shown_as(page, kind) for kind in ("off", "on", "bad")] == ["Add.1+1=22+2=5", "\n", "\n"]


@pytest.mark.parametrize(
    ("method", "rows", "args", "said"),
    [
        ("dpo", PAIRS, ["--roles-to-train", "user"], "--roles-to-train would be ignored: rows of format passthrough"),
        ("dpo", PAIRS, ["--chat-template", "chatml"], "--chat-template would be ignored: rows of format passthrough"),
        ("dpo", PAIRS, ["--overlong", "split"], "expected one of drop, truncate, error"),
        ("kto", JUDGED, ["--dataset-processes", 2], "--dataset-processes would be ignored: with kto"),
        ("kto", JUDGED[1::2], [], "3 rows are desirable"),
        ("kto", PAIRS, [], "passthrough needs prompt + completion + label"),
        ("dpo", PAIRS, ["--format", "chatml.intell"], "unknown format 'chatml.intell': expected one of chatml.default"),
    ],
)
def test_a_method_refuses_what_does_not_fit(show, method, rows, args, said):
    done = show(method, rows, *args)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err


def test_every_method_has_sample_rows(tune, tiny, monkeypatch):
    from pathlib import Path

    assert set(SAMPLES) == set(preprocess.METHODS)
    monkeypatch.chdir(Path(__file__).parents[2])
    for method, path in SAMPLES.items():
        done = tune("preprocess", "--model", tiny.model, "--method", method, "--sequence-len", 2000, "--max-rows", 20)
        assert done.code == 0 and f"rows of {path}: " in done.out, done.err


FOREIGN = ["你好，世界", "👨‍👩‍👧‍👦 family", "🇩🇪🇫🇷", "👍🏽", "e\u0301a\u0308", "שלום", "مرحبا بالعالم", "𝔘𐍈"]


@pytest.fixture
def foreign(kit, here):
    """Chats in scripts that a byte-level vocabulary has no whole tokens for, as a file."""
    rows = [[{"role": "user", "content": f"? {text}"}, {"role": "assistant", "content": f"! {text} !"}] for text in FOREIGN]
    return kit.write_rows(here / "foreign.jsonl", [{"messages": turns} for turns in rows])


def test_characters_of_several_tokens_are_whole_on_screen_and_page(tune, tiny, foreign, here):
    done = tune("preprocess", "--model", tiny.model, "--data", foreign, "--debug", 9, "--html", "page.html")
    assert done.code == 0, done.err
    page = (here / "page.html").read_text(encoding="utf-8")
    assert "\ufffd" not in done.out + page
    for text in FOREIGN:
        assert f"[[! {text} !<|im_end|>]]" in done.out and f"? {text}<" in done.out
        assert f'<span class="on">! {text} !&lt;|im_end|&gt;</span>' in page


def test_pairs_that_share_bytes_of_a_character_show_both(show, here):
    """The two faces differ in their last byte only."""
    done = show("dpo", [{"prompt": "你 ", "chosen": "😀 a", "rejected": "😁 b"}], "--debug", 1, "--html", "page.html")
    assert done.code == 0, done.err
    page = (here / "page.html").read_text(encoding="utf-8")
    assert [shown_as(page, kind) for kind in ("off", "on", "bad")] == ["你 ", "😀 a<|im_end|>", "😁 b<|im_end|>"]
    assert "prompt\n你 \nchosen\n[[😀 a<|im_end|>]]\nrejected\n{{😁 b<|im_end|>}}" in done.out
    assert "[[supervised]], {{rejected, or judged bad}}" in done.out


@pytest.mark.parametrize(
    ("variables", "coloured"), [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)]
)
def test_what_is_supervised_is_marked_with_and_without_colours(tune, tiny, variables, coloured, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = tune("preprocess", "--model", tiny.model, "--data", tiny.chat, "--debug", 1)
    assert ("[[" in done.out) is not coloured and ("\x1b[30;42m" in done.out) is coloured


def test_escape_sequences_of_rows_have_no_effect(tune, tiny, kit, here):
    turns = [{"role": "user", "content": "\x1b]0;x\x07"}, {"role": "assistant", "content": "\x1b[2J\r\u202egone"}]
    rows = kit.write_rows(here / "rows.jsonl", [{"messages": turns}])
    done = tune("preprocess", "--model", tiny.model, "--data", rows, "--debug", 1, "--html", "page.html")
    page = (here / "page.html").read_text(encoding="utf-8")
    for text in (done.out, page):
        assert not set("\x1b\x07\r\u202e") & set(text)
    assert "[[\\x1b[2J\\x0d\\u202egone<|im_end|>]]" in done.out and '<u class="code">\\x1b</u>[2J' in page
