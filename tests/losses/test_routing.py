"""Losses of routers, and the objective that puts them beside another one."""

import pytest
import torch

from treetune.core import step
from treetune.core.state import TrainState
from treetune.losses import routing, routing_objective, sft_objective
from treetune.ops.linear_logprob import TokenStats

E, K = 5, 2


def _logits(rows, seed=0, dtype=torch.float64):
    return torch.randn(rows, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _balance(logits, lens):
    return routing.load_balance(logits, torch.arange(len(lens)).repeat_interleave(torch.tensor(lens)), torch.tensor(lens), top_k=K)


def test_the_balance_of_a_sequence_is_the_loss_of_transformers():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    one, two = _logits(7), _logits(4, 1)
    each = [load_balancing_loss_func((logits.float(),), E, K) for logits in (one, two)]
    got = _balance(torch.cat([one, two]).float(), [7, 0, 4])
    torch.testing.assert_close(got[:7].mean(), each[0])
    torch.testing.assert_close(got[7:].mean(), each[1])


def test_the_balance_equals_a_loop_and_its_gradient_goes_through_the_probabilities_alone():
    logits = _logits(6).requires_grad_()
    share = torch.zeros(E, dtype=torch.float64)
    for row in logits.detach():
        share[row.argsort(descending=True)[:K]] += 1 / 6
    want = sum(E * (share * row.softmax(0)).sum() for row in logits)
    got = _balance(logits, [6]).sum()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (got, want)), rtol=1e-6, atol=1e-9)


def test_bounds_of_the_balance():
    """k where every expert is used alike, near E where all tokens go to the same k."""
    alike = torch.eye(E, dtype=torch.float64).roll(0, 1) + torch.eye(E, dtype=torch.float64).roll(1, 1)
    assert _balance(1e-6 * alike, [E]).mean().item() == pytest.approx(K, abs=1e-5)
    same = torch.zeros(9, E, dtype=torch.float64)
    same[:, :K] = 40.0
    assert _balance(same, [9]).mean().item() == pytest.approx(E, rel=1e-6)


def test_z_loss():
    logits = _logits(6)
    torch.testing.assert_close(routing.z_loss(logits), logits.exp().sum(1).log() ** 2)
    assert routing.z_loss(logits.bfloat16()).dtype == torch.float32
    assert torch.isfinite(routing.z_loss(torch.full((1, E), 1e4))).all()


PARAMS = {"table": -torch.arange(1.0, 7.0) / 4, "router": _logits(6, dtype=torch.float32), "other": _logits(6, 3, dtype=torch.float32)}


def _routed(params, frozen, batch, plan, *, want=()):
    """A log-prob and the logits of two layers for each row, read from tables."""
    logp = params["table"][batch["at"]]
    return TokenStats(logp, **{name: logp > -0.75 for name in want}), [params[name][batch["at"]] for name in ("router", "other")]


def _plain(*args, want=()):
    return _routed(*args, want=want)[0]


def _batch(at, lens):
    number = torch.arange(len(lens))
    seq = number.repeat_interleave(torch.tensor(lens))
    bounds = torch.tensor([0, *[3] * len(lens)]).cumsum(0).int()
    return {"at": torch.tensor(at, dtype=torch.int64), "seq": seq, "seq_lens": torch.tensor(lens), "cu_docs": bounds, "doc_of_seq": number}


def _run(batches, *, aux=0.3, z=0.2):
    objective = routing_objective.objective(_routed, sft_objective.objective, routing_objective.Router(K, aux, z))
    return step.make_eval(objective)(TrainState(PARAMS, {}, {}, {}, torch.tensor(0)), batches)


def test_terms_are_means_over_layers_and_tokens_of_the_step():
    got = _run([_batch([0, 1, 5], [2, 1]), _batch([3, 2], [2])])
    lens, rows = [2, 1, 2], [0, 1, 5, 3, 2]
    balance, z = (
        sum(fn(PARAMS[name][rows]).mean() for name in ("router", "other")) / 2 for fn in (lambda x: _balance(x, lens), routing.z_loss)
    )
    assert got["router_aux_loss"].item() == pytest.approx(balance.item(), rel=1e-6)
    assert got["router_z_loss"].item() == pytest.approx(z.item(), rel=1e-6)
    assert got["loss"].item() == pytest.approx((got["nll"] + 0.3 * balance + 0.2 * z).item(), rel=1e-6)


def test_the_split_into_micro_batches_changes_nothing():
    one = _run([_batch([0, 1, 5, 3, 2], [2, 1, 2])])
    for batches in (
        [_batch([3, 2], [2]), _batch([0, 1, 5], [2, 1])],
        [_batch([0, 1], [2]), _batch([5], [1]), _batch([], [0]), _batch([3, 2], [2])],
    ):
        other = _run(batches)
        for name in ("loss", "router_aux_loss", "router_z_loss", "nll"):
            assert other[name].item() == pytest.approx(one[name].item(), rel=1e-6), name


def test_a_term_without_weight_is_reported_and_adds_nothing():
    got, plain = _run([_batch([0, 1, 5], [3])], aux=0.0, z=0.5), sft_objective.objective(_plain)
    nll = step.make_eval(plain)(TrainState(PARAMS, {}, {}, {}, torch.tensor(0)), [_batch([0, 1, 5], [3])])["loss"]
    assert got["loss"].item() == pytest.approx((nll + 0.5 * got["router_z_loss"]).item(), rel=1e-6) and got["router_aux_loss"] > 0
