"""Metrics of answers to held-out rows at each evaluation: their numbers, where they are told, and nothing else is changed."""

import pytest

from treetune.core.run import answer_metrics

SHORT = ("--sample-prompt=", "--learning-rate", 0.01, "--val-set-size", 5, "--eval-max-new-tokens", 6)
METRICS = ("--eval-causal-lm-metrics", "chrf", "ter", "exact_match", "perplexity")
NAMES = ("eval/chrf", "eval/ter", "eval/exact_match")


def test_a_run_with_metrics_is_the_run_without_them(kit, sft, here):
    """Bit for bit: state, adapter and metrics; beside them each evaluation has those of the answers that the table shows."""
    assert sft(*SHORT[:-2], "--eval-steps", 1, "--output-dir", "plain").code == 0
    done = sft(*SHORT, *METRICS, "--eval-table-size", 4, "--eval-answers", 4, "--eval-steps", 1, "--output-dir", "measured")
    assert done.code == 0, done.err
    plain, measured = kit.left(here / "plain", 2), kit.left(here / "measured", 2)
    assert kit.same(plain[0], measured[0]) and kit.same(plain[1], measured[1])
    evaluations = [record for record in measured[2] if "eval/loss" in record]
    assert [{name: value for name, value in record.items() if name not in NAMES} for record in measured[2]] == plain[2]
    rows = [record for record in kit.samples(here / "measured") if "row" in record]
    assert [record["step"] for record in evaluations] == [0, 1, 2] and len(rows) == 12
    for record in evaluations:
        pairs = [(row["answer"], row["reference"]) for row in rows if row["step"] == record["step"]]
        expected = answer_metrics.measure(["chrf", "ter", "exact_match"], pairs)
        assert {name: record[f"eval/{name}"] for name in expected} == expected
        assert f"chrf {record['eval/chrf']:.3f}  ter {record['eval/ter']:.3f}  exact_match" in done.out
    page = (here / "measured" / "report.html").read_text()
    assert "answers beside good ones" in page and "share of answers that are the good one" in page


def test_without_a_number_of_rows_all_are_measured_and_none_are_shown(kit, sft, here, monkeypatch):
    counts = []
    measure = answer_metrics.measure
    monkeypatch.setattr(answer_metrics, "measure", lambda names, pairs: counts.append(len(pairs)) or measure(names, pairs))
    assert sft(*SHORT, "--eval-causal-lm-metrics", "exact_match", "--max-steps", 1, "--output-dir", "run").code == 0
    assert counts == [5, 5] and not (here / "run" / "samples.jsonl").exists()


def test_what_cannot_be_measured_is_refused(kit, tiny, tune, here):
    data = kit.write_rows(here / "rows.jsonl", [{"prompt": f"{i} + 1 ="} for i in range(8)])
    grpo = ("grpo", "--model", tiny.model, "--data", data, "--val-set-size", 4, "--reward-funcs", "digits", "--output-dir", "run")
    grpo += ("--max-completion-length", 8)
    kit.refused(tune(*grpo, *METRICS[:2]), "no held-out row has an answer in one of the columns ground_truth")
    kit.refused(tune(*grpo, "--eval-causal-lm-metrics", "perplexity"), "the loss of grpo is no mean of -log p")
    kit.refused(tune("reward", *METRICS[:2]), "eval-causal-lm-metrics would be ignored: a reward model writes no answers")
    assert not (here / "run").exists()


def test_rewards_of_answers_by_functions_and_a_judge(kit, sft, here):
    """Functions see text, ids and the answer of the row; numbers are means of those of the answers that the table shows."""
    (here / "rewards.py").write_text(
        "def chars(completions, answer, prompts):\n"
        "    assert all(prompts) and all(isinstance(one, str) for one in answer)\n"
        "    return [len(one) + 100 * len(right) for one, right in zip(completions, answer)]\n"
        "def ids(completions, completion_ids):\n    return [len(one) for one in completion_ids]\n"
    )
    rewards = ("--eval-reward-funcs", "rewards.py:chars", "rewards.py:ids")
    assert sft(*SHORT[:-2], "--output-dir", "plain").code == 0
    done = sft(*SHORT, *rewards, "--eval-table-size", 3, "--eval-answers", 3, "--output-dir", "run")
    assert done.code == 0, done.err
    plain, scored = kit.left(here / "plain", 2), kit.left(here / "run", 2)
    assert kit.same(plain[0], scored[0]) and kit.same(plain[1], scored[1]), "bit for bit"
    rows = [record for record in kit.samples(here / "run") if record["step"] == 2 and "row" in record]
    last = scored[2][-1]
    assert last["eval/reward_chars"] == pytest.approx(sum(len(row["answer"]) + 100 * len(row["reference"]) for row in rows) / 3, rel=1e-12)
    assert last["eval/reward_ids"] == pytest.approx(sum(row["tokens"] for row in rows) / 3, rel=1e-12)
    assert f"chars {last['eval/reward_chars']:.3f}  ids" in done.out
    assert "rewards of answers to held-out prompts" in (here / "run" / "report.html").read_text()


def test_rewards_that_cannot_score_are_refused(kit, sft, here):
    (here / "rewards.py").write_text("def of(completions, colour):\n    return [0] * len(completions)\n")
    for name, why in (("rewards.py:of", "colour"), ("nothing", "is not built in"), ("llm_judge?model=m", "expected llm_judge")):
        kit.refused(sft(*SHORT, "--eval-reward-funcs", name, "--output-dir", "run"), why)
    assert not (here / "run").exists()
