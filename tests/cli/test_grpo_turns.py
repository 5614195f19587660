"""Rollout functions of a user's own in `treetune grpo`: what they write is trained on, what an environment writes is not."""

import importlib.util
import re
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("grpo_runs", Path(__file__).with_name("test_grpo.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
learn, steps, drawn, batches = runs.learn, runs.steps, runs.drawn, runs.batches  # the fixtures

ROLLOUTS = '''
def turns(prompts, generate, *, num_generations, tokenizer):
    """Two turns, with a word of the environment between them."""
    word = tokenizer("so", add_special_tokens=False)["input_ids"]
    asked = [prompt["tokens"] for prompt in prompts for _ in range(num_generations)]
    first = generate(asked, max_tokens=3)
    second = generate([ids + one["tokens"] + word for ids, one in zip(asked, first)], max_tokens=2)
    rows = []
    for a, b in zip(first, second):
        rows.append({
            "tokens": a["tokens"] + word + b["tokens"],
            "logp": a["logp"] + [0.0] * len(word) + b["logp"],
            "trained": [True] * len(a["tokens"]) + [False] * len(word) + [True] * len(b["tokens"]),
            "text": a["text"] + "|" + b["text"], "stopped": b["stopped"],
        })
    return [rows[i * num_generations : (i + 1) * num_generations] for i in range(len(prompts))]

def plain(prompts, generate, *, num_generations, tokenizer):
    found = [generate([prompt["tokens"]] * num_generations) for prompt in prompts]
    return [[{"tokens": one["tokens"]} for one in group] for group in found]

def none_of_it(prompts, generate, *, num_generations, tokenizer):
    found = plain(prompts, generate, num_generations=num_generations, tokenizer=tokenizer)
    return [[one | {"trained": [False] * len(one["tokens"]), "text": str(i)} for i, one in enumerate(group)] for group in found]

def never(prompts, generate, **_):
    return [[{"tokens": [1]}] * 4 for _ in prompts]

def few(prompts, generate, *, num_generations, tokenizer):
    return plain(prompts, generate, num_generations=num_generations - 1, tokenizer=tokenizer)

def empty(prompts, generate, *, num_generations, tokenizer):
    generate([prompts[0]["tokens"]])
    return [[{"tokens": []}] * num_generations for _ in prompts]

def ragged(prompts, generate, *, num_generations, tokenizer):
    generate([prompts[0]["tokens"]])
    return [[{"tokens": [1, 2], "trained": [True]}] * num_generations for _ in prompts]

def foreign(prompts, generate, *, num_generations, tokenizer):
    generate([prompts[0]["tokens"]])
    return [[{"tokens": [1, 260]}] * num_generations for _ in prompts]

def negative(prompts, generate, *, num_generations, tokenizer):
    generate([prompts[0]["tokens"]])
    return [[{"tokens": [1, -1]}] * num_generations for _ in prompts]

def endless(prompts, generate, *, num_generations, tokenizer):
    generate([prompts[0]["tokens"]])
    return [[{"tokens": [1] * 256}] * num_generations for _ in prompts]

def words(prompts, generate, *, num_generations, tokenizer):
    generate([prompts[0]["tokens"]])
    return [[{"tokens": ["a"]}] * num_generations for _ in prompts]

def floats(prompts, generate, *, num_generations, tokenizer):
    generate([prompts[0]["tokens"]])
    return [[{"tokens": [1.5, 2.5]}] * num_generations for _ in prompts]

def numbers(prompts, generate, *, num_generations, tokenizer):
    generate([prompts[0]["tokens"]])
    return [[{"tokens": [1, 2], "text": 3}] * num_generations for _ in prompts]

def nothing(prompts, generate, *, num_generations, tokenizer):
    generate([prompts[0]["tokens"]])

def raises(prompts, generate, *, num_generations, tokenizer):
    return prompts[0]["question"]

def too_long(prompts, generate, *, num_generations, tokenizer):
    return generate([[1] * 256])

def no_prompt(prompts, generate, *, num_generations, tokenizer):
    return generate([[]])
'''


@pytest.fixture
def rollouts(here):
    (here / "turns.py").write_text(ROLLOUTS)


def test_tokens_of_an_environment_are_read_and_never_trained_on(kit, here, steps, rollouts, drawn, batches):
    records = steps("--rollout-func", "turns.py:turns", "--max-steps", 3, "--no-skip-zero-advantage-batches")
    word = kit.tokenizer()("so", add_special_tokens=False)["input_ids"]
    pairs = {}
    for ids, tokens, logp in drawn:
        pairs.setdefault(ids, []).append((tokens, logp))
    count = 0
    for _, micro, _ in batches:
        for batch in micro:
            for b, doc in enumerate(batch["doc_of_seq"].tolist()):
                span = slice(*batch["cu_docs"][doc : doc + 2].tolist())
                branch = batch["branch"][span]
                asked = tuple(batch["tokens"][span][branch == 0].tolist())
                inside = batch["tokens"][span][branch == 1 + batch["doc_of_seq"][:b].eq(doc).sum()].tolist()
                targets = batch["targets"][batch["seq"] == b].tolist()
                first = next(one for one, _ in pairs[asked] if inside[: len(one)] == one and inside[len(one) :][: len(word)] == word)
                second = inside[len(first) + len(word) :]
                assert targets == first + second
                assert second in [one for one, _ in pairs[(*asked, *first, *word)]]
                count += 1
    assert count == 3 * 16 and records[0]["supervised_tokens"] == records[0]["completions/mean_length"] * 16 - 2 * 16
    for record in records:
        assert record["sampling/sampling_logp_difference/max"] <= 5e-5, "each turn under the prompt that it was written after"
    assert all("|" in row["answer"] for row in kit.samples(here / "run"))


def test_a_rollout_function_without_log_probs_trains_with_a_ratio_of_1(kit, here, steps, rollouts):
    told = steps("--rollout-func", "turns.py:plain", "--async-prefetch", "--max-steps", 3)
    for record in told:
        assert record["sampling/importance_sampling_ratio/min"] == record["sampling/importance_sampling_ratio/max"] == 1
        assert record["grad_norm"] > 0
    assert {row["stopped"] for row in kit.samples(here / "run")} == {True}


def test_a_rollout_of_which_nothing_is_the_policys_trains_nothing(steps, rollouts):
    for record in steps("--rollout-func", "turns.py:none_of_it", "--weight-decay", 0):
        assert record["reward_std"] > 0 == record["supervised_tokens"] == record["train/loss"] == record["grad_norm"]


WRONG = {
    "never": "never called generate",
    "few": "lists .prompts. of 4 dicts",
    "empty": "row .*gave no tokens",
    "ragged": "row .*2 tokens, 1 trained and 2 logp",
    "foreign": "260",
    "negative": "-1",
    "endless": "256 positions",
    "words": "tokens",
    "floats": "tokens",
    "numbers": "text",
    "nothing": "list",
    "raises": "KeyError: 'question'",
    "too_long": "256",
    "no_prompt": "empty|no token|at least",
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", WRONG)
def test_what_a_rollout_function_gets_wrong_ends_the_run_with_one_line(name, here, learn, rollouts):
    done = learn("--rollout-func", "turns.py:" + name)
    lines = done.err.strip().splitlines()
    assert done.code == 1 and "Traceback" not in done.err, done.err
    assert lines[-1].startswith("treetune: failed: ") and re.search(WRONG[name], lines[-1]), lines[-1]


def test_a_missing_rollout_function_is_one_line(kit, here, learn, rollouts):
    kit.refused(learn("--rollout-func", "turns.py:nowhere"), "rollout_func", "turns.py has no function nowhere")
    kit.refused(learn("--rollout-func", "nowhere.turns"), "nowhere")
    assert not (here / "run").exists()
