"""`treetune rollout`: completions and rewards of a few prompts, printed and written, without training."""

import importlib.util
import json
from pathlib import Path

import pytest

from treetune.cli.options import rollout as rollout_options
from treetune.core.rollout import sampler

spec = importlib.util.spec_from_file_location("grpo_runs", Path(__file__).with_name("test_grpo.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
learn, drawn = runs.learn, runs.drawn  # the fixtures
SPREAD = runs.SPREAD


@pytest.fixture
def roll(learn):
    """roll(...) -> Done of `treetune rollout` on 3 of 20 prompts."""
    return lambda *args, **more: learn("--num-prompts", 3, *args, command="rollout", **more)


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(done) -> dict[str, float]:
    """The numbers of the table at the end."""
    pairs = [line.split() for line in done.out.splitlines() if len(line.split()) == 2]
    return {name: float(value) for name, value in pairs if value.replace(".", "").replace("-", "").isdigit()}


def test_what_it_prints_and_writes(here, roll):
    done = roll("--output", "out/rows.jsonl", "--reward-funcs", SPREAD, "rewards.py:most", "--show", 1)
    assert done.code == 0, done.err
    rows = written(here / "out/rows.jsonl")
    assert len(rows) == 3 * 4 and [row["row"] for row in rows] == sorted(row["row"] for row in rows)
    assert [row["prompt"] for row in rows[::4]] == [runs.prompt(i)["prompt"] for i in range(3)], "the first ones, in order"
    for row in rows:
        assert row["rewards"]["spread"] == runs.spread(row["answer"]) and 1 <= row["tokens"] <= 6
        unknown = sum(map(ord, row["answer"])) % 3 == 0
        assert (row["rewards"]["most"] is None) == unknown
    told, first = table(done), [row["rewards"]["spread"] for row in rows]
    assert told["rewards/spread/mean"] == pytest.approx(sum(first) / 12, abs=1e-4)
    total = [sum(value for value in row["rewards"].values() if value is not None) for row in rows]
    assert told["reward"] == pytest.approx(sum(total) / 12, abs=1e-4) and told["completions/clipped_ratio"] == 1
    assert " tokens/s)" in done.out and "saved" in done.out
    for at in range(0, 12, 4):
        best = max(range(at, at + 4), key=lambda i: total[i])
        assert f"# {rows[at]['prompt']}" in done.out and f"[spread {first[best]:g}" in done.out
    assert sum(line.startswith("  [") for line in done.out.splitlines()) == 3, "the best one of each prompt"


def test_they_are_the_completions_that_training_starts_with(tiny, here, roll, drawn):
    """Same seed, same completions; another seed, others; whatever is sampled beside them."""

    def sampled(*args):
        drawn.clear()
        assert roll(*args).code == 0
        return [one[:2] for one in drawn]  # log-probs round otherwise in another batch

    first = sampled()
    assert sampled() == first and sampled("--num-prompts", 2) == first[:8]
    other = sampled("--seed", 7)
    assert [prompt for prompt, _ in other] == [prompt for prompt, _ in first] and other != first


def test_an_adapter_and_a_model_that_were_trained(kit, here, learn, roll, drawn):
    assert learn("--learning-rate", 0.3).code == 0
    drawn.clear()
    done = roll("--adapter", "run", "--output", "rows.jsonl")
    assert done.code == 0, done.err
    trained = list(drawn)
    drawn.clear()
    assert roll().code == 0 and [one for _, one, _ in drawn] != [one for _, one, _ in trained]


OPTIONS = {
    "num_generations": ["--num-generations", 2],
    "max_completion_length": ["--max-completion-length", 2],
    "temperature": ["--temperature", 0.3],
    "top_k": ["--top-k", 3],
    "stop_token_ids": ["--stop-token-ids", *range(60, 120)],
    "num_prompts": ["--num-prompts", 2],
    "rewards": ["--reward-funcs", "length"],
    "rollout_func": ["--rollout-func", "turns.py:short"],
    "prompts": ["--default-system-message", "Add."],
}


@pytest.fixture(scope="module")
def plain_rows():
    """[what is written without options]: made once."""
    return []


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", OPTIONS)
def test_options_change_what_is_written(what, plain_rows, here, roll):
    (here / "turns.py").write_text(
        "def short(prompts, generate, *, num_generations, tokenizer):\n"
        "    return [generate([one['tokens']] * num_generations, max_tokens=1) for one in prompts]\n"
    )
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": str(i)} for i in range(20)]
    if not plain_rows:
        assert roll("--output", "a.jsonl", rows=rows).code == 0
        plain_rows.append(written(here / "a.jsonl"))
    done = roll("--output", "b.jsonl", *OPTIONS[what], rows=rows)
    assert done.code == 0, done.err
    assert plain_rows[0] != written(here / "b.jsonl")


def test_greedy_is_allowed_here(here, roll, drawn):
    done = roll("--temperature", 0, "--num-generations", 2)
    assert done.code == 0, done.err
    assert drawn[0][1] == drawn[1][1] and table(done)["frac_reward_zero_std"] == 1


def test_it_says_where_nothing_could_be_learned(roll):
    done = roll("--reward-funcs", "rewards.py:same")
    assert done.code == 0 and "nothing could be learned" in done.out
    assert "nothing could be learned" not in roll().out


def test_rewards_that_know_nothing(here, roll):
    done = roll("--reward-funcs", "rewards.py:silent", "--output", "rows.jsonl")
    assert done.code == 0, done.err
    assert "nothing could be learned" in done.out and "[no reward" in done.out
    assert all(row["rewards"] == {"silent": None} for row in written(here / "rows.jsonl"))


REFUSED = {
    **{f"--{name}": ([f"--{name.replace('_', '-')}", value], "would be ignored", "without vLLM")
       for name, value in zip(rollout_options.VLLM_ONLY, (1.5, "a+", "seed=1"), strict=True)},
    "existing output": (["--output", "prompts.jsonl"], "prompts.jsonl exists", "--output another name"),
    "missing reward": (["--reward-funcs", "rewards.py:none"], "rewards.py has no none"),
    "missing column": (["--reward-funcs", "math_equal", "--field-prompt", "answer"], "takes answer", "columns: none"),
    "missing rollout function": (["--rollout-func", "nowhere.turns"], "nowhere"),
    "no room": (["--max-completion-length", 256], "256 positions"),
    "stop id": (["--stop-token-ids", 999], "stop_token_ids has 999"),
    "no prompts": (["--num-prompts", 0], "num_prompts must be at least 1"),
    "reward that fails": (["--reward-funcs", "turns.py:fails"], "every call failed", "RuntimeError: no"),
    "rollout function that fails": (["--rollout-func", "turns.py:fails"], "rollout function raised|takes 1 positional"),
    "weights": (["--reward-weights", 1, 2], "reward_weights"),
    "no reward": (["--reward-funcs"], "at least one reward"),
    "option of training": (["--learning-rate", 1], "unknown option --learning-rate"),
    "model": (["--model", "nowhere"], "nowhere"),
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_one_line(what, kit, here, roll):
    (here / "turns.py").write_text("def fails(completions):\n    raise RuntimeError('no')\n")
    args, *words = REFUSED[what]
    kit.refused(roll(*args), *words)
    assert {path.name for path in here.iterdir()} <= {"rewards.py", "turns.py", "prompts.jsonl", "__pycache__"}


def test_more_prompts_than_fit_in_a_batch(monkeypatch, roll, drawn):
    """Nothing depends on how many are sampled together."""
    assert roll("--num-prompts", 5).code == 0
    whole = list(drawn)
    drawn.clear()
    monkeypatch.setattr(sampler, "ROWS", 4)
    assert roll("--num-prompts", 5).code == 0
    assert [one[:2] for one in drawn] == [one[:2] for one in whole]
