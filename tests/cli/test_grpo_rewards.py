"""What `treetune grpo` makes of rewards: functions good and bad, reward models, held-out prompts, numbers not finite."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch

from treetune.core import tree
from treetune.models import heads, hf

spec = importlib.util.spec_from_file_location("grpo_runs", Path(__file__).with_name("test_grpo.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
learn, steps = runs.learn, runs.steps  # the fixtures
SPREAD = runs.SPREAD

BAD = '''
import json, os, time

def texts(completions):
    return [one if isinstance(one, str) else one[0]["content"] for one in completions]

def odd(one):
    return sum(map(ord, one)) % 4 == 0

def hangs(completions):
    if any(odd(one) for one in texts(completions)):
        time.sleep(60)
    return [float(len(one) % 3) for one in texts(completions)]

def crashes(completions):
    if any(odd(one) for one in texts(completions)):
        os._exit(3)
    return [float(len(one) % 3) for one in texts(completions)]

def raises(completions):
    return [1 / (0 if odd(one) else len(one)) for one in texts(completions)]

def alarms(completions):
    import signal
    def gone(*_):
        raise TimeoutError("took too long")
    signal.signal(signal.SIGALRM, gone)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    out = []
    for one in texts(completions):
        try:
            time.sleep(0.2 if odd(one) else 0)
            out.append(1.0)
        except TimeoutError:
            out.append(0.0)
    return out

def nan(completions):
    return [float("nan") if odd(one) else sum(map(ord, one)) % 5 for one in texts(completions)]

def inf(completions):
    return [float("inf") if odd(one) else sum(map(ord, one)) % 5 for one in texts(completions)]

def none(completions):
    return [None if odd(one) else sum(map(ord, one)) % 5 for one in texts(completions)]

def word(completions):
    return ["good" if odd(one) else sum(map(ord, one)) % 5 for one in texts(completions)]

def long(completions):
    return [1.0] * (len(completions) + 1)

def always_raises(completions):
    raise RuntimeError("no such service")

def always_ends(completions):
    os._exit(7)

def always_nan(completions):
    return [float("nan")] * len(completions)

def later(completions):
    """Fails from its third call on."""
    with open("calls", "a") as file:
        file.write("x")
    if os.path.getsize("calls") > 2:
        raise RuntimeError("went away")
    return [sum(map(ord, one)) % 5 for one in texts(completions)]

def columns(prompts, completions, completion_ids, answer, **rest):
    with open("seen.jsonl", "a") as file:
        file.write(json.dumps({"prompts": prompts, "completions": completions, "answer": answer, "rest": sorted(rest)}) + "\\n")
    return [len(ids) + len(prompt) for ids, prompt in zip(completion_ids, prompts)]

def needs(completions, solution):
    return [1.0] * len(completions)
'''


@pytest.fixture
def bad(here):
    (here / "bad.py").write_text(BAD)


SOME = {
    "hangs": (["--reward-timeout", 0.3], "no answer within 0.3 s"),
    "crashes": ([], "exit code 3"),
    "raises": ([], "ZeroDivisionError"),
    "nan": ([], "gave nan, expected a finite number or None"),
    "inf": ([], "gave inf, expected a finite number or None"),
    "word": ([], "gave 'good', expected a finite number or None"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SOME)
def test_a_reward_that_fails_costs_its_own_row(name, kit, here, steps, bad, capsys):
    """It is unknown, which is no 0: the advantages of the others are among themselves. The first failure is told."""
    args, words = SOME[name]
    kit.write_rows(here / "prompts.jsonl", [runs.prompt(i) for i in range(20)])
    records = steps("--reward-funcs", f"bad.py:{name}", "--max-steps", 1, "--num-generations", 6, *args)
    rows = kit.samples(here / "run")
    lost = [row for row in rows if sum(map(ord, row["answer"])) % 4 == 0]
    assert 0 < len(lost) < len(rows) and all(row["rewards"][name] is None and row["advantage"] == 0 for row in lost)
    kept = [row["rewards"][name] for row in rows if row not in lost]
    assert None not in kept and records[0]["reward"] == pytest.approx(sum(kept) / len(kept))
    assert records[0][f"rewards/{name}/unknown"] == pytest.approx(len(lost) / len(rows))
    assert math.isfinite(records[0]["train/loss"]) and records[0]["grad_norm"] > 0


def test_a_reward_may_use_alarms(kit, here, steps, bad):
    """They work in the main thread of a process only."""
    steps("--reward-funcs", "bad.py:alarms", "--max-steps", 1)
    for row in kit.samples(here / "run"):
        assert row["rewards"]["alarms"] in (0, 1)


def test_rewards_that_abstain_leave_it_to_the_others(kit, here, steps, bad):
    names = ["bad.py:none", SPREAD, "rewards.py:silent"]
    record = steps("--reward-funcs", *names, "--reward-weights", 2, 0.5, 9, "--max-steps", 1, "--num-generations", 6)[0]
    rows = kit.samples(here / "run")
    total = []
    for row in rows:
        said = row["rewards"]
        assert (said["none"] is None) == (sum(map(ord, row["answer"])) % 4 == 0) and said["silent"] is None
        total.append(2 * (said["none"] or 0) + 0.5 * said["spread"])
    assert record["reward"] == pytest.approx(sum(total) / len(total))
    assert record["rewards/silent/unknown"] == 1 and "rewards/silent/mean" not in record
    for at in range(0, len(rows), 6):
        mine = torch.tensor(total[at : at + 6], dtype=torch.float64)
        expected = (mine - mine.mean()) / (mine.std() + 1e-4) if mine.max() > mine.min() else 0 * mine
        assert [row["advantage"] for row in rows[at : at + 6]] == pytest.approx(expected.tolist(), abs=1e-9)


def test_a_reward_sees_the_columns_of_the_row(kit, here, steps, bad):
    rows = [runs.prompt(i) | {"level": i, "prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(20)]
    steps("--reward-funcs", "bad.py:columns", "--max-steps", 1, rows=rows)
    seen = [json.loads(line) for line in (here / "seen.jsonl").read_text().splitlines()]
    asked = {row["prompt"][0]["content"]: row["answer"] for row in rows}
    for call in seen:
        assert call["rest"] == ["level"]
        for prompt, completion, answer in zip(call["prompts"], call["completions"], call["answer"], strict=True):
            assert asked[prompt[-1]["content"]] == answer and completion[0]["role"] == "assistant"


ALL = {
    "always_raises": "RuntimeError: no such service",
    "always_ends": "exit code 7",
    "always_nan": "gave nan",
    "long": "returned 5 values for 4 completions",
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ALL)
def test_a_reward_of_which_every_call_fails_ends_the_run(name, here, learn, bad):
    done = learn("--reward-funcs", "bad.py:" + name, "--max-completion-length", 3, "--num-generations", 2, "--micro-batch-size", 1)
    lines = done.err.strip().splitlines()
    assert done.code in (1, 2) and "Traceback" not in done.err, done.err
    assert f"bad.py:{name}" in lines[-1] and ALL[name] in lines[-1]


def test_a_reward_that_goes_away_in_mid_run_leaves_what_can_be_resumed(kit, here, learn, bad):
    args = ["--reward-funcs", "bad.py:later", "--max-steps", 4, "--save-steps", 1]
    done = learn(*args)
    assert done.code in (1, 2) and "Traceback" not in done.err and "went away" in done.err.strip().splitlines()[-1], done.err
    assert kit.state(here / "run", 2)
    (here / "bad.py").write_text(BAD.replace("> 2:", "> 99:"))
    done = learn(*args, "--resume", "auto")
    assert done.code == 0, done.err
    assert [record["step"] for record in kit.metrics(here / "run")] == [1, 2, 3, 4]


NONE = {
    "missing module": (["--reward-funcs", "nowhere.accuracy"], "nowhere.accuracy cannot be loaded", "No module named 'nowhere'"),
    "missing file": (["--reward-funcs", "nowhere.py:accuracy"], "nowhere.py"),
    "missing function": (["--reward-funcs", "bad.py:accuracy"], "bad.py has no accuracy", "its functions are .*hangs"),
    "misspelt": (["--reward-funcs", "gsm8"], "'gsm8' is not built in", "did you mean gsm8k"),
    "missing column": (["--reward-funcs", "bad.py:needs"], "takes solution", "no column of the prompts", "columns: answer"),
    "option of none": (["--reward-funcs", "length?most=3"], "length has no option most", "cache, max"),
    "option out of range": (["--reward-funcs", "length?max=3,cache=9"], "1 <= cache <= max"),
    "twice": (["--reward-funcs", "digits", "digits"], "none twice"),
    "weights": (["--reward-funcs", "digits", "length", "--reward-weights", 1], "reward_weights", "2 rewards"),
    "weight nan": (["--reward-weights", "nan"], "reward_weights|finite"),
    "nothing": (["--reward-funcs"], "at least one|reward_funcs"),
    "a model without a head": (["--reward-funcs", "MODEL"], "without a head that scores"),
    "a hub id": (["--reward-funcs", "owner/name"], "owner/name"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", NONE)
def test_rewards_that_cannot_be_are_one_line(what, kit, tiny, here, learn, bad):
    args, *words = NONE[what]
    kit.refused(learn(*[tiny.model if arg == "MODEL" else arg for arg in args]), *words)
    assert not (here / "run").exists()


# --- reward models


def head_of(model, classes):
    fresh = heads.init(model.cfg, classes, bias=classes > 1, seed=0)
    generator = torch.Generator().manual_seed(1)
    return tree.map(lambda leaf: leaf + torch.randn(leaf.shape, generator=generator), fresh)


LINES = '''
def lines(prompts, generate, *, num_generations, tokenizer):
    """Answers of two lines, but for every third, which has none."""
    asked = [prompt["tokens"] for prompt in prompts for _ in range(num_generations)]
    found = [one | {"text": "" if i % 3 == 2 else one["text"][:3] + "x\\n\\n" + one["text"][3:]} for i, one in enumerate(generate(asked))]
    return [found[i * num_generations : (i + 1) * num_generations] for i in range(len(prompts))]
'''


@pytest.fixture
def judges(kit, tiny, here):
    """Folders of a reward model and of a judge of steps, of another kind of weights than the policy."""
    model = hf.load(tiny.same)
    for name, classes in (("reward", 1), ("prm", 2)):
        heads.save(here / name, model, head_of(model, classes), tokenizer=kit.tokenizer())
    return here


def logits(path, kind, ids):
    import transformers

    auto = {"reward": transformers.AutoModelForSequenceClassification, "prm": transformers.AutoModelForTokenClassification}[kind]
    with torch.no_grad():
        return auto.from_pretrained(path, dtype=torch.float64)(torch.tensor([ids])).logits[0]


def test_a_reward_model_scores_whole_answers(kit, here, steps, judges):
    """As transformers pools them: the logit at the end of prompt, answer and the token that closes it. Text is text: no id is kept."""
    steps("--reward-funcs", "reward", SPREAD, "--max-steps", 1)
    tokenizer = kit.tokenizer()
    for row in kit.samples(here / "run"):
        ids = tokenizer(row["prompt"] + row["answer"])["input_ids"] + [tokenizer.eos_token_id]
        expected = logits(here / "reward", "reward", ids).item() if row["answer"].strip() else None
        assert row["rewards"]["reward"] == pytest.approx(expected, abs=1e-4)  # float32 against float64
        assert row["rewards"]["spread"] == runs.spread(row["answer"])


def test_a_judge_of_steps_gives_the_probability_of_the_worst(kit, here, tune, steps, judges):
    """Of all lines of an answer, as `treetune score` judges them."""
    (here / "lines.py").write_text(LINES)
    steps("--reward-funcs", "prm", "--max-steps", 1, "--rollout-func", "lines.py:lines")
    rows = kit.samples(here / "run")
    parts = [[line for line in row["answer"].split("\n") if line.strip()] for row in rows]
    known = [i for i, lines in enumerate(parts) if lines]
    asked = [{"prompt": rows[i]["prompt"], "completions": parts[i]} for i in known]
    kit.write_rows(here / "steps.jsonl", asked)
    done = tune("score", "prm", "--data", "steps.jsonl", "--output", "scores.jsonl", "--sequence-len", 128)
    assert done.code == 0, done.err
    told = kit.metrics(here, "scores.jsonl")
    assert max(len(row["step_scores"]) for row in told) > 1
    assert [rows[i]["rewards"]["prm"] for i in known] == pytest.approx([min(row["step_scores"]) for row in told], abs=1e-5)
    assert all(row["rewards"]["prm"] is None for i, row in enumerate(rows) if i not in known)


@pytest.mark.parametrize("trains", ["lora", "none"])
def test_a_model_that_treetune_reward_trained_is_a_reward(trains, kit, tiny, here, tune, steps):
    pairs = [{"prompt": f"{i} =", "chosen": f" {i}", "rejected": f" {i + 1}!"} for i in range(20)]
    kit.write_rows(here / "pairs.jsonl", pairs)
    options = ["--sequence-len", 128, "--max-steps", 2, "--output-dir", "judge", "--adapter", trains]
    done = tune("reward", "--model", tiny.same, "--data", "pairs.jsonl", *options)
    assert done.code == 0, done.err
    told = steps("--reward-funcs", "judge", "--max-steps", 1)
    assert told[0]["rewards/judge/std"] > 0 and told[0]["grad_norm"] > 0
    answer = kit.samples(here / "run")[0]
    kit.write_rows(here / "answers.jsonl", [{"prompt": answer["prompt"], "completion": answer["answer"]}])
    assert tune("score", "judge", "--data", "answers.jsonl", "--output", "scores.jsonl", "--sequence-len", 128).code == 0
    (row,) = kit.metrics(here, "scores.jsonl")
    assert answer["rewards"]["judge"] == pytest.approx(row["score"], abs=1e-5)


# --- held-out prompts


def test_held_out_prompts_are_scored_with_the_same_randomness(kit, here, steps):
    """One completion each; an evaluation that nothing has moved in between gives the same numbers."""
    args = ["--val-set-size", 6, "--eval-steps", 1, "--max-steps", 3]
    trained = steps(*args, "--learning-rate", 1e-30, "--weight-decay", 0)
    held = [record for record in kit.metrics(here / "run") if "eval/reward" in record]
    assert [record["step"] for record in held] == [0, 1, 2, 3] and len({record["eval/reward"] for record in held}) == 1
    assert {"eval/completions/mean_length", "eval/rewards/spread/mean", "eval/reward_std", "eval/seconds"} <= held[0].keys()
    assert not {"eval/frac_reward_zero_std", "eval/loss", "eval/perplexity"} & held[0].keys()
    assert all("eval/reward" not in record for record in trained)
    asked = {row["prompt"] for row in kit.samples(here / "run")}
    steps(*args, "--max-steps", 7, "--num-epochs", 9, name="long")
    assert len(asked | {row["prompt"] for row in kit.samples(here / "long")}) == 14, "never a prompt that is held out"


def test_the_best_checkpoint_is_that_of_the_highest_reward(kit, here, learn):
    args = ["--val-set-size", 8, "--eval-steps", 1, "--max-steps", 6, "--learning-rate", 0.05, "--early-stopping-patience", 2]
    done = learn(*args, "--save-total-limit", 1)
    assert done.code == 0, done.err
    held = [record["eval/reward"] for record in kit.metrics(here / "run") if "eval/reward" in record]
    best = json.loads((here / "run/best.json").read_text()) if (here / "run/best.json").exists() else None
    step = held.index(max(held))
    assert (best is None) == (step == 0)
    if best is not None:
        assert best == {"checkpoint": f"step_{step:06d}", "eval_reward": max(held)}
    bad, high = 0, held[0]
    for i, value in enumerate(held[1:], 1):
        bad, high = (0, value) if value > high else (bad + 1, high)
        assert (bad >= 2) <= (i == len(held) - 1), "two evaluations without a better one end the run"


def test_held_out_prompts_of_which_no_reward_is_known(kit, here, learn):
    """A run goes on that would only have been watched by it."""
    done = learn("--reward-funcs", "rewards.py:silent", "--val-set-size", 6, "--eval-steps", 1, "--max-steps", 1)
    assert done.code == 0, done.err
    held = [record for record in kit.metrics(here / "run") if "eval/seconds" in record]
    assert len(held) == 2 and all("eval/reward" not in record for record in held) and not (here / "run/best.json").exists()


def test_val_data_is_a_file_of_its_own(kit, here, learn):
    kit.write_rows(here / "held.jsonl", [{"prompt": "held out", "answer": "1"}])
    done = learn("--val-data", "held.jsonl", "--eval-steps", 1)
    assert done.code == 0 and "held out held.jsonl: 1 prompts" in " ".join(done.out.split()), (done.out, done.err)
    assert "eval/reward" in kit.metrics(here / "run")[0]


# --- numbers that are not finite


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_says_where(what, here, learn, monkeypatch):
    from treetune.losses import policy

    def broken(ratio, advantage, **_):
        found = -ratio * advantage
        return found + math.inf if what == "loss" else found + (ratio - ratio.detach()).abs().sqrt()  # whose slope at 0 is infinite

    monkeypatch.setattr(policy, "ppo_clip", broken)
    done = learn()
    lines = done.err.strip().splitlines()
    assert done.code == 1 and len(lines) == 1 and "not finite, no weight was changed" in lines[0], done.err
    assert re.search(r"rows \[\d+" if what == "loss" else r"lora\.layers\.\d\.\w+\.[AB]", lines[0]), lines[0]
    assert not list((here / "run/checkpoints").iterdir())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("trains", [[], ["--adapter", "none"], ["--async-prefetch", "--max-steps", 9]])
def test_weights_that_are_not_finite_are_never_sampled_from(trains, here, learn):
    """What a step of this size leaves writes nothing but noise: the run ends, and the checkpoints are from before."""
    done = learn(*trains, "--learning-rate", 1e38)
    lines = done.err.strip().splitlines()
    assert done.code == 1 and len(lines) == 1 and re.search("not finite|not numbers", lines[0]), done.err
