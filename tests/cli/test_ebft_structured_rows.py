"""What structured runs of `treetune ebft` read, and how they go on through the turns of a conversation."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location("ebft_runs", Path(__file__).with_name("test_ebft_structured.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
learn, steps, groups = runs.learn, runs.steps, runs.groups  # the fixtures
STOPS, row, talk, stops = runs.STOPS, runs.row, runs.talk, runs.stops

# --- conversations


def test_each_sample_goes_on_through_the_turns_of_its_own_row(kit, tiny, groups, learn):
    """The first reply trains; what follows it is the row's own turns with replies sampled anew, for the features alone."""
    done = learn("--max-steps", 2, "--micro-batch-size", 4, *STOPS, rows=[talk(i) for i in range(8)])
    assert done.code == 0 and "ebft_chat_multiturn.transform" in done.out, done.err
    tokenizer, seen = kit.tokenizer(), set()
    for group in groups:
        columns, ends = group.prompt.columns, stops(tokenizer)
        asked = [one["content"] for one in columns["remaining_turns"] if one["role"] == "user" and one["content"] != "thanks"]
        seen.add(len(asked))
        for one in group.completions:
            first = int(np.argmin(one.trained)) if not one.trained.all() else len(one.tokens)
            assert not one.trained[first:].any() and np.isnan(one.logp[first:]).all() and np.isfinite(one.logp[:first]).all()
            assert 0 < first <= 6 and (int(one.tokens[first - 1]) in ends) == one.stopped
            text = tokenizer.decode(one.tokens[first:].tolist())
            parts = [f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n" for said in asked]
            places = [text.find(part) for part in parts]
            assert -1 not in places and places == sorted(places), "its own turns, in order, and no others"
            assert text.count("<|im_start|>assistant") == len(asked) and "thanks" not in text
        truth = ""
        for said in columns["remaining_turns"][: 2 * len(asked)]:
            user = f"<|im_end|>\n<|im_start|>user\n{said['content']}<|im_end|>\n<|im_start|>assistant\n"
            truth += said["content"] if said["role"] == "assistant" else user
        assert tokenizer.decode(columns["truth"].tolist()) == columns["ground_truth"] + truth
        assert tokenizer.decode(columns["truth"][columns["replies"]].tolist()).startswith(columns["ground_truth"])
    assert seen == {0, 1, 2}


def test_only_the_first_reply_is_in_the_policy_loss(groups, steps):
    records = steps("--max-steps", 1, "--micro-batch-size", 4, "--no-skip-zero-advantage-batches", *STOPS, rows=[talk(i) for i in range(8)])
    own = sum(int(one.trained.sum()) for group in groups for one in group.completions)
    whole = sum(len(one.tokens) for group in groups for one in group.completions)
    assert records[0]["supervised_tokens"] == own < whole
    assert records[0]["completions/mean_length"] == pytest.approx(whole / 32)


def test_how_prompts_are_sampled_together_changes_no_conversation(groups, steps):
    told = []
    for size in (1, 2):
        groups.clear()
        args = ["--micro-batch-size", 4, "--max-steps", 1, "--streaming-partial-batch", "--streaming-min-groups", size]
        steps(*args, name=f"run{size}", rows=[talk(i) for i in range(8)])
        told.append({group.prompt.row: [one.tokens.tolist() for one in group.completions] for group in groups})
    assert told[0] == told[1]


# --- rows

SHAPES = {
    "input and output": ([row(i) for i in range(8)], [], "ebft_opencode.transform"),
    "messages": ([talk(i) for i in range(8)], [], "ebft_chat_multiturn.transform"),
    "prompt and ground truth": ([{"prompt": f"{i} +", "ground_truth": f" {i}"} for i in range(8)], [], "prompt, ground_truth"),
    "question and answer": ([{"question": f"{i}?", "answer": f"{i}"} for i in range(8)], [], "question, answer"),
    "prompt and completion": ([{"prompt": f"{i} +", "completion": f" {i}"} for i in range(8)], [], "prompt, completion"),
    "every turn": ([talk(i) for i in range(8)], ["--format", "ebft_chat_multiturn.transform_all_turns"], "transform_all_turns"),
    "own": ([{"a": f"{i}?", "b": f"{i}"} for i in range(8)], ["--format", "own.py:transform"], "own.py:transform"),
}
OWN = """
def transform(cfg, **kwargs):
    def fn(example, tokenizer=None):
        return {"prompt": [{"role": "user", "content": example["a"]}], "ground_truth": example["b"]}
    return fn, {"remove_columns": "__all__"}
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_read_by_their_columns_or_as_named(shape, here, groups, learn):
    (here / "own.py").write_text(OWN)
    rows, args, said = SHAPES[shape]
    done = learn(*args, "--max-steps", 1, rows=rows)
    assert done.code == 0 and said in done.out, done.err
    plain = isinstance(rows[0].get("prompt"), str)
    assert all((group.prompt.messages is None) == plain for group in groups), "plain text is continued as text"


def test_a_model_without_a_chat_template_continues_text(tiny, learn):
    rows = [{"prompt": f"{i} +", "completion": f" {i}"} for i in range(8)]
    assert learn("--model", tiny.bare, rows=rows).code == 0
    assert "chat template" in learn("--model", tiny.bare, "--output-dir", "other").err


def test_rows_of_one_conversation_are_held_out_together(kit, here, learn):
    """Every turn of it is a row; none of them is on both sides."""
    rows = [talk(i) for i in range(12)]
    done = learn("--format", "ebft_chat_multiturn.transform_all_turns", "--val-set-size", 6, "--max-steps", 2, rows=rows)
    assert done.code == 0, done.err
    trained = {one["prompt"].split("user\n")[1].split("<")[0] for one in kit.samples(here / "run")}
    assert "held out" in done.out and trained and len(trained) <= 10


def test_what_is_too_long_is_dropped_and_counted(groups, learn):
    rows = [row(i) for i in range(8)] + [{"input": "long?", "output": "x" * 90}]
    done = learn("--sequence-len", 80, "--max-steps", 1, rows=rows)
    assert done.code == 0 and "1 dropped: longer than sequence_len with the true reply" in " ".join(done.out.split()), done.err
