"""The objective of online RL against loops in float64, and at its edges: nothing, nan, low precision, another order."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch

from treetune.losses import correction, divergence, policy, ratio

spec = importlib.util.spec_from_file_location("rollouts", Path(__file__).with_name("rollouts.py"))
rollouts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rollouts)

spec = importlib.util.spec_from_file_location("oracle_policy_gradient", Path(__file__).parents[1] / "oracle" / "policy_gradient.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

fixture, stand_in, run = rollouts.fixture, rollouts.stand_in, rollouts.run
LOGP = rollouts.LOGP
PPO, SEQUENCES, SUMS, BUDGET, CISPO = rollouts.PPO, rollouts.SEQUENCES, rollouts.SUMS, rollouts.BUDGET, rollouts.CISPO
F64, NAN = torch.float64, float("nan")


def drawn(seed=0):
    """Twelve ragged completions with everything a batch may have, as rows."""
    gen = torch.Generator().manual_seed(seed)
    lens = [3, 0, 1, 6, 2, 0, 4, 1, 5, 2, 7, 3]
    rows = lambda low, size: [list(low + size * torch.randn(n, generator=gen, dtype=F64)) for n in lens]  # noqa: E731
    logp = [[-abs(x) for x in row] for row in rows(-2, 1)]
    near = lambda size: [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(logp, rows(0, size), strict=True)]  # noqa: E731
    found = {"logp": logp, "old_logp": near(0.2), "ref_logp": near(0.3), "sampler_logp": near(0.4)}
    found["sampler_logp"][3][2] = torch.tensor(NAN, dtype=F64)
    found["correction"] = [[abs(x) * (abs(x) > 0.3) for x in row] for row in rows(1, 0.7)]
    found["entropy"] = [[abs(x) for x in row] for row in rows(1, 1)]
    found["entropy_keep"] = [[bool(x > 0.7) for x in row] for row in found["entropy"]]
    return found, torch.randn(12, generator=gen, dtype=F64).tolist()


def as_batch(found, advantage):
    params, batch = fixture(advantage=advantage, **found)
    batch["entropy_keep"] = batch["entropy_keep"].bool()
    return params, batch


FULL = {"kl": divergence.k3, "kl_coef": 0.3, "opsm_threshold": 0.05, "entropy_coef": 0.02}
METHODS = {
    "grpo": (PPO, {"reduction": SEQUENCES}, (oracle.ppo_clip, {"how": "sequence"})),
    "dapo": (
        partial(PPO, epsilon=0.1, epsilon_high=0.28), {"corrected_kl": False},
        (oracle.ppo_clip, {"low": 0.1, "high": 0.28, "corrected": False}),
    ),
    "dr_grpo": (PPO, {"reduction": BUDGET}, (oracle.ppo_clip, {"how": "constant"})),
    "gspo": (PPO, {"reduction": SEQUENCES, "ratio": ratio.sequence}, (oracle.ppo_clip, {"how": "sequence", "level": "sequence"})),
    "gspo-token": (
        PPO, {"reduction": SEQUENCES, "ratio": ratio.sequence_token}, (oracle.ppo_clip, {"how": "sequence", "level": "sequence_token"}),
    ),
    "luspo": (PPO, {"reduction": SUMS, "ratio": ratio.sequence}, (oracle.ppo_clip, {"how": "sum", "level": "sequence"})),
    "rloo": (PPO, {"reduction": SEQUENCES, "ratio": ratio.sequence_sum}, (oracle.ppo_clip, {"how": "sequence", "level": "sequence_sum"})),
    "cispo": (CISPO, {}, (oracle.cispo, {"cap": 1.2})),
    "sapo": (policy.sapo, {"reduction": SEQUENCES}, (oracle.sapo, {"how": "sequence"})),
    "vespo": (policy.vespo, {}, (oracle.vespo, {"folds": True})),
    "gmpo": (policy.gmpo, {"reduction": SEQUENCES}, (oracle.gmpo, {"how": "sequence"})),
    "reinforce": (policy.reinforce, {}, (oracle.reinforce, {})),
}  # fmt: skip


def by_loops(found, advantage, leaf, term, options, full=True):
    """(loss, gradient by log-prob) of the loops, with everything or with the policy term alone."""
    logp = [list(part) for part in leaf.split([len(row) for row in found["logp"]])]
    more = {"isr": found["correction"], "smp": found["sampler_logp"], "threshold": 0.05, "keep": found["entropy_keep"]}
    more |= {"ref": found["ref_logp"], "kl_coef": 0.3, "entropy": found["entropy"], "entropy_coef": 0.02}
    value = oracle.loss(term, logp, found["old_logp"], advantage, **(more if full else {}), **options)
    return value, torch.autograd.grad(value, leaf)[0]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_loops(name, full):
    term, options, (loops, knobs) = METHODS[name]
    for seed in range(3):
        found, advantage = drawn(seed)
        keys = found if full else {name: found[name] for name in ("logp", "old_logp", "entropy", "entropy_keep")}
        params, batch = as_batch(keys, advantage)
        if not full:
            del batch["entropy_keep"]
        loss, slope, _ = run(rollouts.objective(stand_in, term, **options, **(FULL if full else {})), params, batch)
        want, their_slope = by_loops(found, advantage, params["logp"].detach().clone().requires_grad_(), loops, knobs, full)
        assert loss.item() == pytest.approx(want.item(), rel=1e-12)
        torch.testing.assert_close(slope, their_slope, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_nan_of_the_sampler_is_harmless_and_of_the_policy_never_hidden(name):
    term, options, _ = METHODS[name]
    made = rollouts.objective(stand_in, term, **options, **FULL, correction=correction.token_truncate)
    found, advantage = drawn()
    for row in found["sampler_logp"]:
        row[:] = [torch.tensor(NAN, dtype=F64)] * len(row)
    del found["correction"]
    params, batch = as_batch(found, advantage)
    loss, slope, told = run(made, params, batch)
    assert loss.isfinite() and slope.isfinite().all() and told["sampling/importance_sampling_ratio/max"] == 1
    for key in ("logp", "old_logp", "ref_logp"):
        rows = [list(row) for row in found[key]]
        rows[3][2] = torch.tensor(NAN, dtype=F64)
        if key != "old_logp" or name not in ("reinforce",):
            assert run(made, *as_batch(found | {key: rows, "entropy_keep": [[1.0] * len(row) for row in rows]}, advantage))[0].isnan(), key


@pytest.mark.parametrize("name", METHODS)
def test_nothing_to_train_on_is_an_exact_0_with_a_graph(name):
    term, options, _ = METHODS[name]
    made = rollouts.objective(stand_in, term, **options, **FULL)
    empty = {key: [[], [], []] for key in ("logp", "old_logp", "ref_logp", "sampler_logp", "correction", "entropy", "entropy_keep")}
    for rows, advantage in ((empty, (1, -1, 2)), ({key: [] for key in empty}, ())):
        params, batch = as_batch(rows, advantage)
        loss, slope, told = run(made, params, batch)
        assert loss == 0 and loss.requires_grad and slope.shape == (0,)
        assert told["entropy"] == told["policy_loss"] == told["kl"] == 0
    params, batch = fixture(logp=LOGP)
    del batch["advantage"]
    assert run(rollouts.objective(stand_in, term, **options), params, batch)[1].abs().sum() == 0


@pytest.mark.parametrize("name", METHODS)
def test_float32_follows_float64(name):
    term, options, _ = METHODS[name]
    found, advantage = drawn(2)
    params, batch = as_batch(found, advantage)
    made = rollouts.objective(stand_in, term, **options, **FULL)
    want = run(made, params, batch)
    low = {key: x.detach().float().requires_grad_() for key, x in params.items()}
    got = run(made, low, {key: x.float() if x.is_floating_point() and key != "advantage" else x for key, x in batch.items()})
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-4, atol=1e-6)


def test_an_order_of_completions_does_not_matter():
    found, advantage = drawn()
    made = rollouts.objective(stand_in, PPO, reduction=SEQUENCES, **FULL)
    want = run(made, *as_batch(found, advantage))
    order = [7, 2, 11, 0, 5, 3, 9, 1, 4, 10, 6, 8]
    moved = {key: [rows[i] for i in order] for key, rows in found.items()}
    got = run(made, *as_batch(moved, [advantage[i] for i in order]))
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-13)
    assert got[2] == pytest.approx(want[2], rel=1e-6)
