"""The objective glues a log-prob function to a token loss; a table of numbers stands in for the model."""

import pytest
import torch

from treetune.core import step
from treetune.core.state import TrainState
from treetune.losses import sft, sft_objective
from treetune.ops.linear_logprob import TokenStats


def _logprob(params, frozen, batch, plan, *, want=()):
    """log-probs read from a parameter by row, so that gradients name the rows they came from."""
    logp = params["table"][batch["at"]]
    extra = {"top1": logp > -0.75, "entropy": -0.5 * logp, "mean_logit": logp * 0, "topk_entropy": 2 * logp.detach().abs()}
    return TokenStats(logp, lse=-logp, **{name: extra[name] for name in want})


def _batch(at, lens, weight=None, documents=None, tail=0):
    documents = documents or [3] * len(lens)
    bounds = torch.tensor([0, *documents, *([tail] if tail else [])]).cumsum(0).int()
    batch = {"tokens": torch.zeros(int(bounds[-1]), dtype=torch.int64), "cu_docs": bounds, "at": torch.tensor(at, dtype=torch.int64)}
    batch |= {"seq_lens": torch.tensor(lens), "seq": torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))}
    batch["doc_of_seq"] = torch.arange(len(lens))
    return batch if weight is None else batch | {"weight": torch.tensor(weight)}


PARAMS = {"table": -torch.arange(1.0, 7.0) / 4}  # -0.25 .. -1.5


def _evaluate(objective, batches, params=PARAMS):
    return step.make_eval(objective)(TrainState(params, {}, {}, {}, torch.tensor(0)), batches)


def test_the_default_is_the_mean_nll_over_all_tokens():
    found = _evaluate(sft_objective.objective(_logprob), [_batch([0, 1, 5], [2, 1]), _batch([3], [1])])
    assert found["loss"].item() == pytest.approx((0.25 + 0.5 + 1.5 + 1.0) / 4)
    assert found["nll"] == found["loss"] and found["supervised_tokens"] == 4 and found["num_tokens"] == 9
    assert found["mean_token_accuracy"].item() == pytest.approx(2 / 4) and "entropy" not in found


def test_weights_count_in_loss_and_nll_and_not_in_accuracy():
    found = _evaluate(sft_objective.objective(_logprob), [_batch([0, 5], [2], [0.5, 0.25]), _batch([3], [1])])
    assert found["loss"].item() == pytest.approx((0.5 * 0.25 + 0.25 * 1.5 + 1.0) / 1.75)
    assert found["nll"].item() == pytest.approx(found["loss"].item())
    assert found["mean_token_accuracy"].item() == pytest.approx(1 / 3)


def test_another_token_loss_still_reports_the_nll():
    objective = sft_objective.objective(_logprob, lambda s: sft.eaft(s.logp, s.topk_entropy), want=("topk_entropy", "entropy"))
    found = _evaluate(objective, [_batch([0, 5], [2])])
    assert found["loss"].item() == pytest.approx((0.5 * 0.25 + 3.0 * 1.5) / 2)
    assert found["nll"].item() == pytest.approx((0.25 + 1.5) / 2)
    assert found["entropy"].item() == pytest.approx((0.125 + 0.75) / 2) and "mean_token_accuracy" not in found


def test_empty_batches_count_for_nothing():
    objective = sft_objective.objective(_logprob, want=("top1", "entropy"))
    empty, hollow = _batch([], [0]), _batch([], [0, 0], [])
    one = _evaluate(objective, [_batch([0, 1, 5], [2, 1])])
    many = _evaluate(objective, [empty, _batch([0, 1, 5], [2, 1]), hollow])
    assert all(many[key] == one[key] for key in ("loss", "nll", "mean_token_accuracy", "entropy", "supervised_tokens"))
    alone = _evaluate(objective, [empty])
    assert alone["loss"] == 0 and alone["supervised_tokens"] == 0
    assert all(alone[key].isnan() for key in ("nll", "mean_token_accuracy", "entropy")), "what was not computed is unknown"
    assert objective.counts(hollow)["nll"] == 0


def test_padding_documents_are_no_tokens():
    objective = sft_objective.objective(_logprob)
    assert _evaluate(objective, [_batch([0], [1], documents=[5], tail=11)])["num_tokens"] == 5


def test_numerator_and_count_are_separate():
    """The step divides; the objective never guesses the global count."""
    objective = sft_objective.objective(_logprob)
    batch = _batch([0, 1, 5], [2, 1])
    terms, metrics = objective.terms(PARAMS, {}, batch, None)
    assert terms["nll"].item() == pytest.approx(2.25) and objective.counts(batch)["nll"] == 3
    assert all(not metric.value.requires_grad for metric in metrics.values())
