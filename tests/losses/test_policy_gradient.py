"""The objective of online RL: the worked numbers, what masks and corrects what, and metrics."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch

from treetune.losses import correction, divergence, policy, policy_gradient, ratio, reduce

spec = importlib.util.spec_from_file_location("rollouts", Path(__file__).with_name("rollouts.py"))
rollouts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rollouts)

fixture, stand_in, run, of_fixture, flat = rollouts.fixture, rollouts.stand_in, rollouts.run, rollouts.of_fixture, rollouts.flat
LOGP, OLD, REF, ENTROPY = rollouts.LOGP, rollouts.OLD, rollouts.REF, rollouts.ENTROPY
PPO, SEQUENCES, SUMS, BUDGET, CISPO = rollouts.PPO, rollouts.SEQUENCES, rollouts.SUMS, rollouts.BUDGET, rollouts.CISPO
F64, NAN = torch.float64, float("nan")

LOSSES = {
    "grpo": (PPO, {"reduction": SEQUENCES}, -0.1966814149), "bnpo": (PPO, {}, -0.3444471759), "dapo": (PPO, {}, -0.3444471759),
    "dr_grpo": (PPO, {"reduction": BUDGET}, -0.1076397425), "sapo": (policy.sapo, {"reduction": SEQUENCES}, -0.4751583189),
    "luspo, tokens": (PPO, {"reduction": SUMS}, -0.8611179397), "vespo": (policy.vespo, {}, 0.6719274942),
    "cispo": (CISPO, {}, 0.4483645735),
    "gspo": (PPO, {"reduction": SEQUENCES, "ratio": ratio.sequence}, -0.1896009349),
    "luspo": (PPO, {"reduction": SUMS, "ratio": ratio.sequence}, -0.8316205789),
    "gmpo": (policy.gmpo, {"reduction": SEQUENCES}, -0.1896009349),
    "gmpo, narrow": (partial(policy.gmpo, epsilon=0.1), {"reduction": SEQUENCES}, -0.1612939300),
    "rloo": (PPO, {"reduction": SEQUENCES, "ratio": ratio.sequence_sum}, -0.0941163808),
    "reinforce": (policy.reinforce, {}, (3.5 - 0.5 * 1.5) / 5),
    "kl, corrected": (PPO, {"kl": divergence.k3, "kl_coef": 0.04}, -0.3439900046),
    "kl, plain": (PPO, {"kl": divergence.k3, "kl_coef": 0.04, "corrected_kl": False}, -0.3438720094),
    "bonus": (PPO, {"entropy_coef": 0.01}, -0.3576471759),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_worked_losses(name):
    term, options, expected = LOSSES[name]
    loss, _, _ = of_fixture(term, keys={"ref_logp": REF}, **options)
    assert loss.item() == pytest.approx(expected, abs=1e-10)


def test_numbers_reported_with_the_worked_losses():
    assert of_fixture(keys={"ref_logp": REF}, kl=divergence.k3, kl_coef=0.04)[2]["kl"] == pytest.approx(0.0114292831, abs=1e-9)
    plain = of_fixture(keys={"ref_logp": REF}, kl=divergence.k3, kl_coef=0.04, corrected_kl=False)[2]
    assert plain["kl"] == pytest.approx(0.0143791630, abs=1e-9)
    assert plain["policy_loss"] == pytest.approx(-0.3444471759, abs=1e-10) and plain["entropy"] == pytest.approx(1.32)
    assert of_fixture(policy.vespo, reports=(policy_gradient.vespo_phi,))[2]["vespo/phi_seq_mean"] == pytest.approx(1.1440412611, rel=1e-6)


GRADIENTS = {
    "dapo": [0, -0.2, -0.121306, 0.134986, 0.081873], "sapo": [-0.201093, -0.166667, -0.097275, 0.163165, 0.101420],
    "vespo": [-0.238856] * 3 + [0.109380] * 2, "cispo": [-0.24, -0.2, -0.121306, 0.12, 0.081873],
    "gspo": [-0.150806] * 3 + [0.131409] * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_worked_gradients(name):
    term, options, _ = LOSSES[name]
    assert of_fixture(term, **options)[1].tolist() == pytest.approx(GRADIENTS[name], abs=6e-7)


def test_worked_gradients_of_the_divergence_alone():
    """On-policy with beta 1: both modes have the value .0143791630, the corrected one has the gradient d / 5."""
    d = flat(LOGP) - flat(REF)
    plain = [0.019033, 0.019033, -0.044281, 0, 0.051836]
    for corrected, expected, close in ((True, (d / 5).tolist(), 1e-14), (False, plain, 6e-7)):
        options = {"kl": divergence.k3, "kl_coef": 1.0, "corrected_kl": corrected}
        loss, slope, _ = of_fixture(keys={"ref_logp": REF, "old_logp": None}, advantage=(0, 0), **options)
        assert loss.item() == pytest.approx(0.0143791630, abs=1e-10)
        assert slope.tolist() == pytest.approx(expected, abs=close)


def test_a_masked_completion_still_is_one_of_the_group():
    rows = {"logp": [LOGP[0], []], "keys": {"old_logp": [OLD[0], []], "entropy": [ENTROPY[0], []]}}
    assert of_fixture(reduction=SEQUENCES, **rows)[0].item() == pytest.approx(-0.4677551, abs=1e-7)
    assert of_fixture(**rows)[0].item() == pytest.approx(-0.9355102, abs=1e-7)


SAMPLER = [[-1.2, -0.5, -1.5], [-0.1, -1]]


def test_off_policy_sequences_are_left_out():
    """A drift of .2 in the row with a negative advantage; nan says unknown, and then the row stays."""
    at = lambda threshold, **keys: of_fixture(opsm_threshold=threshold, **keys)[0].item()  # noqa: E731
    assert at(0.15, keys={"sampler_logp": SAMPLER}) == pytest.approx(-0.5613061319, abs=1e-10)
    assert at(0.25, keys={"sampler_logp": SAMPLER}) == pytest.approx(-0.3444471759, abs=1e-10)
    assert at(0.15, keys={"sampler_logp": [SAMPLER[0], [NAN, -1]]}) == pytest.approx(-0.3444471759, abs=1e-10)
    anchored = {"old_logp": [OLD[0], [-0.1, -1]]}
    dropped, kept = (of_fixture(opsm_threshold=t, keys=anchored)[1] for t in (0.05, 0.25))
    assert (dropped[3:] == 0).all() and (kept[3:] != 0).any() and torch.equal(dropped[:3], kept[:3])


def test_only_tokens_of_high_entropy_train():
    """The share .4 of [.1, 2, 1 | .5, 3] has a threshold of 1.4."""
    entropy = flat(ENTROPY)
    keep = correction.entropy_mask(entropy, correction.entropy_threshold(entropy, quantile=0.4))
    assert keep.tolist() == [False, True, False, False, True]
    params, batch = fixture()
    loss, slope, _ = run(rollouts.objective(stand_in, PPO), params, batch | {"entropy_keep": keep})
    assert loss.item() == pytest.approx(-0.1181269247, abs=1e-10)
    assert ((slope != 0) == keep).all()
    bonus = run(rollouts.objective(stand_in, PPO, entropy_coef=0.01), params, batch | {"entropy_keep": keep})
    assert (bonus[0] - loss).item() == pytest.approx(-0.01 * 2.5) and bonus[2]["entropy"] == pytest.approx(1.32)


def test_weights_between_sampler_and_trainer():
    isr = [[1, 2, 0], [0.5, 1]]
    assert of_fixture(keys={"correction": isr})[0].item() == pytest.approx(-0.4906339843, abs=1e-10)
    folded = [[1, 2, 0.5], [0.5, 1]]
    loss, _, told = of_fixture(policy.vespo, keys={"correction": folded}, reports=(policy_gradient.vespo_phi,))
    assert loss.item() == pytest.approx(0.7740664199, abs=1e-10)
    assert told["vespo/phi_seq_mean"] == pytest.approx(0.8035781753, rel=1e-6)


def test_weights_are_made_from_the_log_probs_where_a_batch_has_none():
    smp = [[-1.1, -2, -2], [-0.3, NAN]]
    weigh = partial(correction.token_truncate, high=3.0)
    params, batch = fixture(sampler_logp=smp)
    made = weigh(batch["old_logp"], batch["sampler_logp"], batch["seq"], batch["seq_lens"])
    loss, slope, told = run(rollouts.objective(stand_in, PPO, correction=weigh), params, batch)
    given, same, _ = run(rollouts.objective(stand_in, PPO), params, batch | {"correction": made})
    assert loss == given and torch.equal(slope, same) and loss != of_fixture()[0]
    assert told["sampling/importance_sampling_ratio/max"] == 3
    del batch["old_logp"]
    fresh, slope, _ = run(rollouts.objective(stand_in, PPO, correction=weigh), params, batch)
    weights = torch.tensor([torch.tensor(x).exp().clamp(max=3) for x in (0.1, 1.5, 0, 0, 0)], dtype=F64)
    torch.testing.assert_close(slope, -weights * torch.tensor([1, 1, 1, -0.5, -0.5], dtype=F64) / 5, rtol=1e-6, atol=0)


def test_neither_masks_nor_weights_touch_the_divergence_or_the_bonus():
    nothing = {"correction": [[0, 0, 0], [0, 0]], "ref_logp": REF, "sampler_logp": SAMPLER}
    options = {"kl": divergence.k3, "kl_coef": 0.04, "entropy_coef": 0.01}
    loss, slope, _ = of_fixture(keys=nothing, **options)
    only = of_fixture(keys={"ref_logp": REF}, advantage=(0, 0), **options)
    assert loss.item() == pytest.approx(only[0].item(), abs=1e-16) and torch.equal(slope, only[1]) and (slope != 0).any()
    dropped = of_fixture(keys=nothing | {"correction": None}, opsm_threshold=0.15, advantage=(0, -0.5), **options)
    torch.testing.assert_close(dropped[1], only[1], rtol=0, atol=1e-16)


def test_a_dropped_sequence_may_have_an_infinite_ratio():
    keys = {"old_logp": [OLD[0], [-999, -1000]], "sampler_logp": [OLD[0], [5, 5]]}
    loss, slope, _ = of_fixture(keys=keys, opsm_threshold=0.5)
    assert loss.item() == pytest.approx(-0.5613061319, abs=1e-10) and (slope[3:] == 0).all() and slope.isfinite().all()
    loss, slope, _ = of_fixture(keys=keys)
    assert loss == torch.inf
    clamped, slope, _ = of_fixture(keys=keys, ratio=partial(ratio.token, clamp=20.0))
    assert clamped.isfinite() and slope.isfinite().all()


def test_an_objective_without_old_log_probs_is_on_policy():
    loss, slope, told = of_fixture(keys={"old_logp": None}, reports=(partial(policy_gradient.clip_ratio, low=0.8, high=1.2),))
    assert loss.item() == pytest.approx(-(3 - 1) / 5) and slope.tolist() == pytest.approx([-0.2] * 3 + [0.1] * 2)
    assert all(told[f"clip_ratio/{name}"] == 0 for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max"))


def test_clip_metrics_of_the_fixture():
    told = of_fixture(reports=(partial(policy_gradient.clip_ratio, low=0.8, high=1.2),))[2]
    expected = {"low_mean": 0, "high_mean": 0.2, "region_mean": 0.2, "low_min": 0, "high_max": 1 / 3}
    assert {name: told[f"clip_ratio/{name}"] for name in expected} == pytest.approx(expected)
    told = of_fixture(
        ratio=ratio.sequence, reports=(partial(policy_gradient.clip_ratio, low=0.8, high=1.04, by_sequence=True),), advantage=(1, 1)
    )[2]
    expected = {"low_mean": 0, "high_mean": 0.5, "region_mean": 0.5, "low_min": 0, "high_max": 1}
    assert {name: told[f"clip_ratio/{name}"] for name in expected} == pytest.approx(expected)
    low = of_fixture(reports=(partial(policy_gradient.clip_ratio, low=1.1, high=9.0),), advantage=(-1, -1))[2]
    assert low["clip_ratio/low_mean"] == pytest.approx(0.6) and low["clip_ratio/low_min"] == pytest.approx(0.5)
    assert of_fixture(CISPO, reports=(partial(policy_gradient.cispo_clip_ratio, epsilon_high=1.2),))[2][
        "cispo_clip_ratio"
    ] == pytest.approx(0.2)


def test_sampling_metrics_of_the_fixture():
    old, smp = [[-1, -0.5, -2], [-0.3, -1.2]], [[-1.1, -2, -2], [-0.3, -1]]
    told = of_fixture(keys={"old_logp": old, "sampler_logp": smp}, correction=correction.token_truncate)[2]
    assert told["sampling/sampling_logp_difference/mean"] == pytest.approx(0.36)
    assert told["sampling/sampling_logp_difference/max"] == pytest.approx(1.5)
    numbers = [told[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")]
    assert numbers == pytest.approx([0.81873, 1.38478, 3], abs=1e-5)
    told = of_fixture(keys={"old_logp": old, "sampler_logp": smp}, correction=partial(correction.sequence_mask, high=3.0))[2]
    numbers = [told[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")]
    assert numbers == pytest.approx([0, 0.40937, 0.81873], abs=1e-5)
    raw = of_fixture(keys={"old_logp": old, "sampler_logp": smp})[2]
    assert raw["sampling/importance_sampling_ratio/max"] == pytest.approx(4.481689)
    assert raw["policy_loss"] == of_fixture(keys={"old_logp": old})[2]["policy_loss"]


ALWAYS = {"num_tokens", "supervised_tokens", "skipped_zero_adv_batches", "policy_loss"}
SAMPLING = {f"sampling/{x}" for x in ("sampling_logp_difference/mean", "sampling_logp_difference/max")}
SAMPLING |= {f"sampling/importance_sampling_ratio/{x}" for x in ("min", "mean", "max")}


def test_metrics_have_the_documented_names():
    assert of_fixture(want=())[2].keys() == ALWAYS
    assert of_fixture()[2].keys() == ALWAYS | {"entropy"}
    assert of_fixture(keys={"sampler_logp": SAMPLER})[2].keys() == ALWAYS | SAMPLING | {"entropy"}
    assert of_fixture(keys={"ref_logp": REF}, kl=divergence.k3)[2].keys() == ALWAYS | {"entropy", "kl"}
    told = of_fixture(want=(), entropy_coef=0.01)[2]
    assert told.keys() == ALWAYS | {"entropy", "entropy_coef"} and told["entropy_coef"] == pytest.approx(0.01)
    assert told["num_tokens"] == 6 and told["supervised_tokens"] == 5


def test_a_coefficient_of_the_batch_goes_before_the_option():
    loss, _, told = of_fixture(keys={"entropy_coef": 0.03})
    assert loss.item() == pytest.approx(-0.3444471759 - 0.03 * 1.32, abs=1e-10) and told["entropy_coef"] == pytest.approx(0.03)
    assert of_fixture(keys={"entropy_coef": 0.03}, entropy_coef=7.0)[0] == loss
    with pytest.raises(ValueError, match='add "entropy" to want'):
        of_fixture(keys={"entropy_coef": 0.03}, want=())


def test_the_bonus_is_differentiated():
    made = rollouts.objective(stand_in, PPO, entropy_coef=0.5)
    params, batch = fixture()
    terms, _ = made.terms(params, {}, batch, None)
    slope = torch.autograd.grad(terms["entropy"], params["entropy"])[0]
    assert (slope == -0.5).all() and made.counts(batch)["entropy"] == 5


def test_a_batch_without_signal_keeps_the_denominators_and_reads_nothing():
    params, batch = fixture(advantage=(0, 0), sampler_logp=SAMPLER)
    for reduction in (reduce.by_token, reduce.by_sequence, SEQUENCES, BUDGET):
        clips = partial(policy_gradient.clip_ratio, low=0.8, high=1.2)
        made = rollouts.objective(stand_in, PPO, reduction=reduction, correction=correction.sequence_mask, reports=(clips,))
        whole, short = run(made, params, batch), run(made, params, policy_gradient.zero_signal_batch(batch))
        assert short[0] == whole[0] == 0 and (short[1] == 0).all()
        assert made.counts(policy_gradient.zero_signal_batch(batch)) == made.counts(batch)
        assert short[2].keys() == whole[2].keys()
        assert (whole[2]["skipped_zero_adv_batches"], short[2]["skipped_zero_adv_batches"]) == (0, 1)
        assert (whole[2]["supervised_tokens"], short[2]["supervised_tokens"], short[2]["num_tokens"]) == (5, 0, 1)


def test_what_a_term_lacks_is_told_before_anything_runs():
    with pytest.raises(ValueError, match="cispo needs epsilon_high: give it by functools.partial"):
        rollouts.objective(stand_in, policy.cispo)
    with pytest.raises(ValueError, match="clip_ratio needs low, high"):
        rollouts.objective(stand_in, PPO, reports=(policy_gradient.clip_ratio,))
    with pytest.raises(ValueError, match="coef=0.1 has no estimator"):
        rollouts.objective(stand_in, PPO, kl_coef=0.1)
    with pytest.raises(ValueError, match="one weight per sequence"):
        rollouts.objective(stand_in, policy.vespo, correction=partial(correction.sequence_mask, high=2.0))
    with pytest.raises(ValueError, match="without ref_logp"):
        of_fixture(kl=divergence.k3)


def test_a_term_of_your_own_takes_what_it_names():
    loss = of_fixture(lambda logp, advantage, ref_logp: -advantage * (logp - ref_logp), keys={"ref_logp": REF})[0]
    assert loss.item() == pytest.approx(-((0.1 + 0.1 - 0.2) - 0.5 * 0.3) / 5)
    regression = of_fixture(policy.a_star, keys={"ref_logp": REF}, reduction=SEQUENCES)[0]
    assert regression.item() == pytest.approx(((0.001 * 0 - 1) ** 2 + (0.001 * 0.3 + 0.5) ** 2) / 2)
