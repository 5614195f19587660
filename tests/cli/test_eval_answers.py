"""`treetune eval` with the options of answers: the numbers of the run's last evaluation, the answers themselves, refusals."""

import json
import re

import pytest

from treetune.core import masking

SHORT = ("--sample-prompt=", "--learning-rate", 0.03, "--max-steps", 3)
ANSWERS = ("--eval-causal-lm-metrics", "chrf", "ter", "exact_match", "perplexity", "--eval-reward-funcs", "rewards.py:chars", "digits")
ANSWERS += ("--eval-answers", 4, "--eval-table-size", 5, "--eval-max-new-tokens", 6)
REWARD = "def chars(completions, answer):\n    return [len(one) + 100 * len(right) for one, right in zip(completions, answer)]\n"


@pytest.fixture
def held_out(kit, here):
    (here / "rewards.py").write_text(REWARD)
    return kit.write_rows(here / "held_out.jsonl", kit.chats(8))


def number(text: str, name: str) -> float:
    return float(re.search(rf"^{name} +(\S+)", text, re.MULTILINE)[1])


@pytest.mark.parametrize("trained", ["adapter", "model"])
def test_the_numbers_are_those_of_the_last_evaluation_of_the_run(trained, kit, tiny, tune, held_out, here):
    args = (*SHORT, *ANSWERS, "--val-data", held_out, "--output-dir", "run")
    if trained == "model":
        done = tune("sft", *kit.basics(tiny, *args, "--adapter", "none", without=("--lora-r", "--sample-tokens")))
    else:
        done = tune("sft", *kit.basics(tiny, *args, without=("--sample-tokens",)))
    assert done.code == 0, done.err
    model = ("--adapter", "run") if trained == "adapter" else ("--model", "run/model")
    again = tune("eval", *model, "--data", held_out, "--sequence-len", 128, *ANSWERS, "--output", "answers.jsonl")
    assert again.code == 0, again.err
    before, *_, last = [record for record in kit.metrics(here / "run") if "eval/loss" in record]
    for name in ("chrf", "ter", "exact_match", "reward_chars", "reward_digits", "loss"):
        assert number(again.out, name) == pytest.approx(last[f"eval/{name}"], abs=1e-6), name
    assert before["eval/chrf"] != last["eval/chrf"], "the weights are those that were trained"
    left = [record for record in kit.samples(here / "run") if record["step"] == 3]
    found = [json.loads(line) for line in (here / "answers.jsonl").read_text().splitlines()]
    assert found == [{name: value for name, value in record.items() if name != "step"} for record in left] and len(found) == 5
    assert [f"held-out row {row['row']}\n" in again.out for row in found] == [True] * 5
    shown = masking.escape_controls(found[0]["answer"].strip())
    assert f"  answer: {shown}" in again.out and f"  reference: {found[0]['reference']}\n" in again.out


def test_all_rows_are_measured_and_none_are_shown(kit, tiny, tune, held_out, here):
    args = ("--eval-causal-lm-metrics", "chrf", "--eval-max-new-tokens", 3, "--output", "answers.jsonl")
    done = tune("eval", "--model", tiny.model, "--data", held_out, "--sequence-len", 128, *args)
    assert done.code == 0 and "held-out row" not in done.out, done.err
    assert len((here / "answers.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--eval-answers", 3), "eval-answers would be ignored: neither eval_causal_lm_metrics nor eval_reward_funcs"),
        (("--eval-max-new-tokens", 3), "eval-max-new-tokens would be ignored: eval_table_size is 0"),
        (("--output", "out.jsonl"), "output would be ignored: eval_table_size is 0"),
        (("--eval-reward-timeout", 3), "eval-reward-timeout would be ignored: eval_reward_funcs names none"),
        (("--eval-causal-lm-metrics", "blue"), "eval_causal_lm_metrics has blue, expected some of"),
        (("--eval-reward-funcs", "digits", "digits"), "expected none twice"),
        (("--eval-reward-funcs", "nope.py:f", "--output", "out.jsonl"), "nope.py"),
        (("--eval-table-size", 2, "--data", "blank.jsonl", "--output", "out.jsonl"), "and no held-out row has a prompt and an answer"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(args, message, kit, tiny, tune, here, held_out):
    kit.write_rows(here / "blank.jsonl", [{"text": "short"}] * 3)
    data = () if "--data" in args else ("--data", held_out)
    kit.refused(tune("eval", "--model", tiny.model, "--sequence-len", 128, *data, *args), message)
    assert not (here / "out.jsonl").exists()
