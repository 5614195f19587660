"""metrics.jsonl, the health rules, and the search for numbers that are not finite (on the real objective)."""

import json
import math

import pytest
import torch

from treetune.core import observe, optim, records, step, tree


def test_numbers_are_read_one_step_late(tmp_path):
    recorder = observe.Recorder(tmp_path / "metrics.jsonl", lambda record: record | {"double": 2 * record["loss"]})
    assert recorder.push(1, {"loss": torch.tensor(0.5), "epoch": 0}) is None
    assert not (tmp_path / "metrics.jsonl").exists(), "nothing was read yet"
    first = recorder.push(2, {"loss": torch.tensor(0.25), "epoch": 0})
    assert first == {"step": 1, "loss": 0.5, "epoch": 0, "double": 1.0}
    recorder.note({"step": 1, "eval/loss": 3.0})
    assert recorder.flush()["loss"] == 0.25 and recorder.flush() is None
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == recorder.history == records.read(tmp_path / "metrics.jsonl", numbers=True).records and [
        line["step"] for line in lines
    ] == [1, 1, 2]


def test_a_recorder_without_a_file_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = observe.Recorder(None)
    recorder.push(1, {"loss": 1.0})
    assert recorder.flush() == {"step": 1, "loss": 1.0} and list(tmp_path.iterdir()) == []


def _steps(losses, *, norm=1.0, held=()):
    """Training records, then evaluations."""
    history = [{"step": i + 1, "train/loss": loss, "grad_norm": norm} for i, loss in enumerate(losses)]
    return history + [{"step": len(losses), "eval/loss": loss} for loss in held]


def _with(**numbers):
    """Forty steps that also report these."""
    return [record | numbers for record in _steps(FALLING[:40])]


def _online(**values: float) -> list[dict]:
    """A healthy run of reinforcement learning, with other values of some metrics at every step."""
    usual = {"reward": 0.3, "reward_std": 0.2, "frac_reward_zero_std": 0.3, "entropy": 0.3, "kl": 0.1, "completions/clipped_ratio": 0.1}
    return [record | usual | values for record in _steps([0.01 * (i % 3) for i in range(25)])]


FALLING = [2.0 * 0.98**i for i in range(80)]
HEALTHY = (
    [_steps(FALLING[:n]) for n in (1, 2, 3, 12, 60, 80)]
    + [
        [],
        _steps(FALLING[:40], held=(2.0, 1.8, 1.7)),
        _steps(FALLING[:40], held=(1.6, 1.7)),
        _steps(FALLING[:40], held=(1.8, 1.6, 1.7)),
        _steps(FALLING[:40], norm=99.9),
        _steps([2.0] * 11 + [3.9]),
        _steps([0.02] * 11 + [0.045]),  # a jump between losses that are small anyway
        _steps([0.009, 0.009, 0.011]),
        _with(**{"rewards/margins": 0.1, "rewards/accuracies": 0.6, "rewards/chosen": -1.0, "rewards/rejected": -4.0, "kl": -0.2}),
        _with(**{"rewards/margins": -0.1, "rewards/accuracies": 0.4})[:39],  # early, a run may still prefer the wrong side
        _with(**{"rewards/chosen": -9.0, "rewards/rejected": -11.0}),  # no reference: rewards are plain log-probs
    ]
)
SICK = {
    "grad_spike": (_steps([1.0], norm=101.0), "101.0", "learning_rate"),
    "no_gradient": (_steps([1.0], norm=0.0), "0", "trainable"),
    "loss_spike": (_steps([2.0] * 11 + [4.1]), "4.100 from about 2.000", "malformed"),
    "plateau": (_steps([2.0 + 0.1 * math.sin(i) for i in range(59)] + [2.5]), "60 steps", "learning_rate"),
    "vanished": (_steps([0.5, 0.009, 0.008, 0.007]), "0.0070", "memorised"),
    "overfit": (_steps(FALLING[:40], held=(1.5, 1.6, 1.7)), "1.700", "fewer epochs"),
    "prefers_rejected": (_with(**{"rewards/margins": -0.1, "rewards/accuracies": 0.6}), "-0.100", "swapped"),
    "ranks_badly": (_with(accuracy=0.4), "accuracy is 0.40", "swapped"),
    "both_fall": (_with(**{"rewards/chosen": -3.0, "rewards/rejected": -4.0, "kl": 0.5}), "-3.00", "rpo_alpha"),
    "no_reward": (_online(reward=0.0, reward_std=0.0), "no completion", "rollout"),
    "no_signal": (_online(frac_reward_zero_std=0.95), "0.95", "dynamic_sampling"),
    "entropy_collapse": (_online(entropy=0.005), "0.005", "temperature"),
    "far_from_reference": (_online(kl=2.5), "2.5", "beta"),
    "stale_sampler": (_online(**{"sampling/sampling_logp_difference/mean": 1.5}), "1.5", "vllm_sync_interval"),
    "lost_weight": (_online(**{"sampling/importance_sampling_ratio/min": 1e-4}), "0.0001", "off_policy_mask_threshold"),
    "clipped_updates": (_online(**{"clip_ratio/region_mean": 0.4}), "0.4", "num_iterations"),
    "cut_completions": (_online(**{"completions/clipped_ratio": 0.9}), "0.9", "max_completion_length"),
}


def test_a_run_that_trains_nothing_is_told_at_its_third_step():
    flat = _online(reward=0.5, reward_std=0.0, frac_reward_zero_std=1.0)
    fired = [[event.rule for event in observe.health(flat[:n])] for n in range(1, 6)]
    assert fired[:2] == [[], []] and fired[2:] == [["no_signal"]] * 3
    failed = _online(reward=0.0, reward_std=0.0, frac_reward_zero_std=1.0)
    assert [event.rule for event in observe.health(failed[:3])] == ["no_reward"]
    (event,) = observe.health(failed[:3])
    assert "first 3 steps" in event.seen and "treetune rollout" in event.fix
    assert observe.health([flat[0] | {"frac_reward_zero_std": 0.5}, *flat[1:6]]) == [], "one step with signal"


def test_rules_pass_over_what_was_not_computed():
    """Steps without signal have no entropy, so that it cannot have collapsed."""
    hollow = [{key: value for key, value in record.items() if key not in ("entropy", "kl")} for record in _online()]
    assert observe.health(hollow) == []


def test_what_sampled_completions_may_do_is_left_in_peace():
    """A loss of 0 or one that jumps, and steps without a gradient, where all completions had the same reward."""
    still = [record | {"train/loss": 0.0, "grad_norm": 0.0} for record in _online()]
    jumps = [record | {"train/loss": 10.0 * (i % 2)} for i, record in enumerate(_online())]
    assert observe.health(still) == observe.health(jumps) == observe.health(_online()) == []


@pytest.mark.parametrize("history", HEALTHY)
def test_healthy_runs_are_left_in_peace(history):
    assert observe.health(history) == []


@pytest.mark.parametrize("losses", [[0.5, 0.009, 0.008, 0.007], [0.1] * 20 + [0.9], [0.2] * 60])
def test_the_loss_of_sampled_texts_says_nothing_by_itself(losses):
    """It is around 0 and jumps, for rewards of functions and of feature matching alike; the same losses of texts are told."""
    history = _steps(losses)
    assert observe.health(history)
    for key in ("reward", "ebft/mean_reward"):
        assert observe.health([record | {key: 0.3} for record in history]) == []


@pytest.mark.parametrize("rule", observe.HEALTH)
def test_every_rule_fires_with_what_was_seen_and_the_fix(rule):
    history, seen, fix = SICK[rule]
    events = observe.health(history)
    assert [event.rule for event in events] == [rule]
    assert seen in events[0].seen and fix in events[0].fix
    assert observe.health(history, quiet={rule}) == []


def test_rules_still_fire_late_in_a_long_run():
    long = _steps([1.0 + 1e-3 * math.sin(i) for i in range(3000)])
    assert observe.health(long) == [], "a flat tail late in a run is no plateau"
    assert [event.rule for event in observe.health([*long, {"step": 3001, "train/loss": 1.0, "grad_norm": 500.0}])] == ["grad_spike"]
    assert [event.rule for event in observe.health([*long, {"step": 3001, "train/loss": 2.1, "grad_norm": 1.0}])] == ["loss_spike"]


@pytest.fixture
def run(model, objective, documents, batch, start):
    """(objective, optimizer, state, micro-batches of rows 0-3 and 4-7) of a healthy full fine-tune."""
    base, optimizer = model(), optim.adamw()
    docs = documents()
    return objective(base), optimizer, start({"model": base.params}, {}, optimizer), [(batch(docs[:4]), None), (batch(docs[4:]), None)]


def _poisoned(objective, row, where):
    """The objective, but that a row gives a loss, or one leaf a gradient, that is not finite."""

    def terms(params, frozen, batch, plan):
        found, metrics = objective.terms(params, frozen, batch, plan)
        if row not in batch["row"]:
            return found, metrics
        leaf = params["model"]["layers"][1]["up_proj"]
        if where == "loss":
            return {"nll": found["nll"] + math.inf}, metrics
        return {"nll": found["nll"] + (leaf * 0).abs().sum().sqrt()}, metrics

    return objective._replace(terms=terms)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_row_is_named_and_no_weight_moves(run, where):
    objective, optimizer, state, micro_batches = run
    bad = _poisoned(objective, 5, where)
    before = tree.map(torch.clone, [state.params, state.opt])
    state, metrics = step.make_step(bad, optimizer, schedule=optim.constant(0.1))(state, micro_batches)
    assert metrics["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves([state.params, state.opt]), tree.leaves(before), strict=True))
    text = observe.find_not_finite(bad, state, micro_batches)
    assert "rows [4, 5, 6, 7]" in text and "[0, 1, 2, 3]" not in text
    assert ("is inf" in text) if where == "loss" else ("gradient" in text and "model.layers.1.up_proj" in text and "q_proj" not in text)


def test_bad_weights_are_named_first(run):
    objective, _, state, micro_batches = run
    state.params["model"]["layers"][0]["k_proj"][3, 2] = math.nan
    assert observe.find_not_finite(objective, state, micro_batches) == "weights are not finite: model.layers.0.k_proj"
    state.params["model"]["layers"][0]["k_proj"][3, 2] = 0.0
    text = observe.find_not_finite(objective, state._replace(frozen={"ref": {"w": torch.tensor([math.inf])}}), micro_batches)
    assert text == "weights are not finite: ref.w"


def test_a_sum_that_overflows_is_said_to(run):
    objective, _, state, micro_batches = run
    assert "sum overflowed" in observe.find_not_finite(objective, state, micro_batches)


def test_dead_leaves_are_named(model, adapter, objective, documents, batch, start):
    """A fresh adapter's A has no gradient at the first step and has one at the second; an unused leaf never has."""
    from treetune.core import lora

    base = model()
    fresh = adapter(base)._replace(tree=lora.init(base.params, ["layers.0.q_proj", "layers.1.up_proj"], rank=2, seed=0))
    optimizer, one, pairs = optim.adamw(), objective(base, fresh), [(batch(documents()), None)]
    state = start({"lora": fresh.tree, "model": {"spare": torch.ones(3)}}, {"model": base.params}, optimizer)
    up = ["lora.layers.0.q_proj.A", "lora.layers.1.up_proj.A", "model.spare"]
    assert observe.dead_leaves(one, state, pairs) == up
    state, metrics = step.make_step(one, optimizer, schedule=optim.constant(0.01))(state, pairs)
    assert metrics["dead_leaves"] == 3
    assert observe.dead_leaves(one, state, pairs) == ["model.spare"]
    state, metrics = step.make_step(one, optimizer, schedule=optim.constant(0.01))(state, pairs)
    assert metrics["dead_leaves"] == 1
