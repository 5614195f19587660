"""report.html of each method: its own curves and caption, both sides of pairs, completions with their rewards."""

import html
import re

import pytest


def words(text):
    """The page as a reader sees it."""
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL)).split())


def captions(text):
    return re.findall(r"<figcaption>(.*?)</figcaption>", text)


@pytest.fixture
def pairs(kit, here):
    return kit.write_rows(
        here / "pairs.jsonl", [{"prompt": f"{i} + 1 = ", "chosen": f"是{i + 1} 👍🏽", "rejected": f"{i + 5} 👎"} for i in range(8)]
    )


@pytest.fixture
def train(tune, tiny, here):
    """train(method, data, ...) -> the report of a short run."""

    def run(method, data, *args):
        done = tune(method, "--model", tiny.model, "--data", data, "--max-steps", 2, "--output-dir", "run", *args)
        assert done.code == 0, done.err
        return (here / "run/report.html").read_text(encoding="utf-8")

    return run


def test_pairs_show_prompt_chosen_and_rejected_apart(train, pairs):
    text = train("dpo", pairs, "--sample-prompt", "", "--val-set-size", 2, "--sequence-len", 128)
    assert "loss (mean over pairs)" in captions(text) and "per supervised token" not in text
    assert "share ranked right" in captions(text) and "margin: reward of chosen less rejected" in captions(text)
    assert re.search(r'<strong>chosen</strong></p>\n<pre class="on-side" dir="auto"><span class="on">是\d 👍🏽&lt;', text)
    assert re.search(r'<strong>rejected</strong></p>\n<pre class="bad-side" dir="auto"><span class="bad">\d+ 👎&lt;', text)
    assert re.search(r'<strong>prompt</strong></p>\n<pre class="off-side" dir="auto"><span class="off">\d \+ 1 = </span>', text)
    assert "\ufffd" not in text and "model" in words(text) and "peak learning rate" in words(text)


def test_scores_have_accuracy_and_margin(train, pairs):
    found = captions(train("reward", pairs, "--val-set-size", 2, "--sequence-len", 128))
    assert {"loss (mean over pairs)", "accuracy of the scores", "margin: score of chosen less rejected"} <= set(found)


def test_completions_come_with_their_rewards_and_curves(train, kit, here):
    (here / "own.py").write_text("def long(completions, **kw): return [len(set(c)) / 10 for c in completions]\n")
    rows = kit.write_rows(here / "prompts.jsonl", [{"prompt": f"<{i}> "} for i in range(6)])
    text = train("grpo", rows, "--reward-funcs", "own.long", "--max-completion-length", 6, "--num-generations", 3, "--sample-prompt", "")
    assert not any(title.startswith("loss") for title in captions(text)) and "What is trained" not in text
    assert {"reward: mean over completions", "completion length (tokens)", "entropy (nats per token)"} <= set(captions(text))
    assert len(re.findall(r"<strong>long [\d.]+</strong>", text)) == 6 and len(re.findall(r"advantage [+-]\d", text)) == 6, (
        "one prompt of two steps"
    )
    assert re.search(r"&lt;\d&gt;", text)
