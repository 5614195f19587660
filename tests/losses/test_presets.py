"""The tables of named losses: every row names a function that exists and takes what the row says, and listing them needs no torch."""

import inspect
import subprocess
import sys

import pytest
import torch

from treetune.core import registry
from treetune.losses import kto, policy, policy_gradient, preference, presets, ratio, reduce, sft_objective
from treetune.ops.linear_logprob import TokenStats

TABLES = {
    name: getattr(presets, name)
    for name in (
        "POLICY_LOSSES", "RATIOS", "AGGREGATES", "ADVANTAGES", "DIVERGENCES", "CORRECTIONS", "PAIR_LOSSES", "PAIR_SCORES", "CPO_LOSSES",
        "KTO_LOSSES", "TOKEN_LOSSES",
    )
}  # fmt: skip
ROWS = [pytest.param(entry, id=f"{table}-{name}") for table, entries in TABLES.items() for name, entry in entries.items()]
# Keyword-only parameters that no option sets: a mean over sequences, a clamp, the groups of a ranking.
UNSET = {"clamp", "group", "mean", "weight", "eps", "ddof", "k", "rate"}


@pytest.mark.parametrize("entry", ROWS)
def test_a_row_takes_what_its_function_takes(entry):
    parameters = inspect.signature(registry.resolve(entry.function)).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert set(getattr(entry, "takes", ())) == keywords - UNSET, entry.function


def test_names_are_listed_without_torch():
    code = "import sys; from treetune.losses import presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_option_that_a_function_does_not_take_is_left_out_and_one_that_is_not_given_keeps_its_default():
    assert registry.bind(presets.PAIR_LOSSES["nca"], beta=0.3, tau=1.0).keywords == {"beta": 0.3}
    assert registry.bind(presets.PAIR_LOSSES["exo"], beta=0.3).keywords == {"beta": 0.3}
    assert registry.bind(presets.PAIR_SCORES["js"], alpha=0.5) is preference.js


@pytest.mark.parametrize(
    "name, options, bounds",
    [
        ("grpo", (None, None), (0.2, 0.2)), ("dapo", (None, None), (0.2, 0.28)), ("gspo", (None, None), (3e-4, 4e-4)),
        ("dapo", (0.1, None), (0.1, 0.1)), ("dapo", (None, 0.5), (0.2, 0.5)), ("grpo", (0.1, 0.3), (0.1, 0.3)),
    ],
)  # fmt: skip
def test_bounds_are_those_of_the_options_else_of_the_preset(name, options, bounds):
    assert presets.clip_bounds(presets.POLICY_LOSSES[name], *options) == bounds


def test_a_policy_loss_comes_with_its_ratio_mean_and_report():
    made = policy_gradient.surrogate(presets.POLICY_LOSSES["gspo"], length=9, epsilon=0.1, epsilon_high=0.3, delta=None, tau_pos=2.0)
    assert made.term.func is policy.ppo_clip and made.term.keywords == {"epsilon": 0.1, "epsilon_high": 0.3, "delta": None}
    assert made.ratio is ratio.sequence
    assert made.reduction.func is reduce.by_sequence and made.reduction.keywords == {"count_empty": True}
    assert made.reports[0].keywords == {"low": 0.9, "high": 1.3, "by_sequence": True}
    dr_grpo = policy_gradient.surrogate(presets.POLICY_LOSSES["dr_grpo"], length=9)
    assert dr_grpo.reduction.keywords == {"length": 9}


def test_a_loss_of_completions_reads_its_scalar_of_the_step():
    from treetune.losses import kto_objective

    logp, ref_logp, good = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), torch.tensor([True, False])
    batch = {"baseline": torch.tensor(0.2, dtype=torch.float64), "delta": torch.tensor(0.1)}
    value = kto_objective.completion_loss("kto", beta=0.5, desirable_weight=2.0, undesirable_weight=1.0)(logp, ref_logp, good, batch)
    assert torch.equal(value, kto.kto(logp, ref_logp, good, torch.tensor(0.2), beta=0.5, desirable_weight=2.0))
    bco = kto_objective.completion_loss("bco", beta=0.5, desirable_weight=2.0)(logp, ref_logp, good, batch)
    assert torch.equal(bco, kto.bco(logp, ref_logp, good, torch.tensor(0.1), beta=0.5))
    apo = kto_objective.completion_loss("apo_zero_unpaired", beta=0.5)(logp, ref_logp, good, {})
    assert torch.equal(apo, kto.apo_zero_unpaired(logp, ref_logp, good, beta=0.5))


def test_a_token_loss_says_which_statistics_it_needs():
    stats = TokenStats(*(torch.tensor([x]) for x in (-1.0, 0.5, 2.0, 0.1)), topk_entropy=torch.tensor([0.7]))
    loss, outputs = sft_objective.token_loss("smoothed", label_smoothing=0.1, z_loss_coef=0.5)
    assert outputs == ("mean_logit",)
    torch.testing.assert_close(loss(stats), torch.tensor([0.9 * 1.0 + 0.1 * 1.9 + 0.5 * 4.0]))
    assert sft_objective.token_loss("eaft")[1] == ("topk_entropy",)
    assert sft_objective.token_loss("nll")[1] == ()
