"""True completions beside sampled ones: out of the policy loss altogether, and a likelihood of their own."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from treetune.core.data import pack, trees
from treetune.core.state import Metric, Objective
from treetune.losses import policy, policy_gradient, policy_gradient_with_sft
from treetune.models import llama, logprobs, logprobs_beside
from treetune.ops import attention

CFG = llama.Config(
    vocab_size=40, hidden_size=16, mlp_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=64, tied=True,
    dtype=torch.float64,
)  # fmt: skip
PROMPTS = [[3, 1, 4], [1, 5]]
SAMPLED = [[[9, 2], [6, 5, 3]], [[5, 8, 9, 7], [9]]]
TRUTH = [([3, 2, 3], [1, 0, 1]), ([8, 4], [1, 1])]
GAIN = [(0.5, -0.5), (1.0, -1.0)]


def _docs(*, truth: bool, gain=GAIN):
    docs = []
    for i, prompt in enumerate(PROMPTS):
        branches = [(np.array(ids), np.ones(len(ids))) for ids in SAMPLED[i]]
        extras = {"advantage": gain[i]}
        if truth:
            branches.append((np.array(TRUTH[i][0]), np.array(TRUTH[i][1])))
            extras = {"advantage": (*gain[i], 0.0), "kind": (0, 0, 1)}
        doc = trees.grow(np.array(prompt), branches, row=i, extras=extras)
        docs.append(doc._replace(values={"old_logp": (-3.9 + 0.05 * np.arange(len(doc.tokens))).astype(np.float32)}))
    return docs


@pytest.fixture
def params():
    from treetune.models import hf

    return {"model": hf.random("llama", CFG, seed=3).params}


def _run(run, **how):
    def logprob(params, frozen, batch, plan, *, want=()):
        return run("llama", CFG, params["model"], batch, plan, want=want, temperature=0.7, **how)

    return logprob


def _grown(params):
    return {"model": {name: _leaves(part) for name, part in params["model"].items()}}


def _leaves(part):
    if isinstance(part, torch.Tensor):
        return part.detach().clone().requires_grad_()
    items = part.items() if isinstance(part, dict) else enumerate(part)
    made = {key: _leaves(value) for key, value in items}
    return made if isinstance(part, dict) else list(made.values())


def _all(part):
    if isinstance(part, torch.Tensor):
        return [part]
    return [leaf for value in (part.values() if isinstance(part, dict) else part) for leaf in _all(value)]


def _gradients(objective, batch, params):
    """The loss, the gradients of all leaves, the metrics and the denominators."""
    params = _grown(params)
    plan, below = attention.plan(batch, dtype=CFG.dtype), objective.counts(batch)
    terms, metrics = objective.terms(params, {}, batch, plan)
    loss = sum(value / below[name] for name, value in terms.items())
    return loss.item(), torch.autograd.grad(loss, _all(params)), metrics, below


def _make(logprob):
    term = policy_gradient.Surrogate(lambda ratio, advantage: policy.ppo_clip(ratio, advantage, epsilon=0.2))
    return policy_gradient.objective(logprob, term)


def test_what_is_taken_aside():
    """Sequences 2 and 5 are the truth: their rows predict what they hold, and the others are numbered anew."""
    whole = pack.collate_trees(_docs(truth=True))
    batch = policy_gradient_with_sft.aside(whole)
    plain = pack.collate_trees(_docs(truth=False))
    for name in ("seq", "seq_lens", "doc_of_seq", "row", "targets", "advantage"):
        assert torch.equal(batch[name], plain[name]), name
    assert "kind" not in batch and batch["old_logp"].shape == batch["at"].shape
    assert batch["prompt_targets"].tolist() == [3, 3, 8, 4]
    read = batch["tokens"][batch["prompt_at"]].tolist()
    assert read == [4, 2, 5, 8], "the last token of the prompt, then the one before; what is no reply is read past"
    assert torch.equal(batch["tokens"], whole["tokens"])
    assert policy_gradient_with_sft.aside(plain) is plain
    with pytest.raises(ValueError, match="prompt_at already"):
        policy_gradient_with_sft.aside(pack.collate_trees(_docs(truth=True), prompts=True))


def test_the_policy_loss_does_not_see_the_truth(params):
    """Its value, its metrics and its denominators are those of documents without one; log-probs are float32, so within 1e-6."""
    plain = _gradients(_make(_run(logprobs)), pack.collate_trees(_docs(truth=False)), params)
    objective = policy_gradient_with_sft.objective(_run(logprobs_beside), _make, coef=0.0)
    beside = _gradients(objective, policy_gradient_with_sft.aside(pack.collate_trees(_docs(truth=True))), params)
    assert beside[3]["policy"] == plain[3]["policy"] == 10 and beside[3]["ce"] == 4
    assert beside[0] == pytest.approx(plain[0], abs=1e-6)
    for one, other in zip(beside[1], plain[1], strict=True):
        assert (one - other).abs().max() <= 1e-6
    same = beside[2].keys() - {"ce_loss", "num_tokens"}
    assert same == plain[2].keys() - {"num_tokens"}
    for name in same:
        assert beside[2][name].value.item() == pytest.approx(plain[2][name].value.item(), abs=1e-6), name


def test_without_advantages_the_gradient_is_that_of_the_likelihood_at_temperature_1(params):
    batch = policy_gradient_with_sft.aside(pack.collate_trees(_docs(truth=True, gain=[(0.0, 0.0)] * 2)))
    objective = policy_gradient_with_sft.objective(_run(logprobs_beside), _make, coef=0.3, name="truth")
    loss, found, metrics, _ = _gradients(objective, batch, params)
    grown, total = _grown(params), 0.0
    for prompt, (ids, weight) in zip(PROMPTS, TRUTH, strict=True):  # one text at a time, through the supervised path
        doc = trees.grow(np.array([*prompt, *ids]), [], row=0)
        doc = doc._replace(weight=np.array([0.0] * len(prompt) + weight, np.float32))
        alone = pack.collate_trees([doc])
        total = total - logprobs("llama", CFG, grown["model"], alone).logp.sum() / 4
    assert loss == pytest.approx(0.3 * total.item(), abs=1e-6) and metrics["truth"].value.item() == pytest.approx(total.item(), abs=1e-6)
    for one, other in zip(found, torch.autograd.grad(0.3 * total, _all(grown)), strict=True):
        assert (one - other).abs().max() <= 1e-6 and other.abs().max() > 1e-5


def test_both_are_added_with_their_own_denominators():
    """By hand: 2 true tokens of log-prob -1 and -3, three sampled ones that another objective sums."""
    inner = Objective(lambda batch: {"policy": torch.tensor(3)}, lambda *_: ({"policy": torch.tensor(6.0)}, {"x": Metric(1, 1)}))
    own, truth = SimpleNamespace(logp=None), SimpleNamespace(logp=torch.tensor([-1.0, -3.0]))
    seen = []
    objective = policy_gradient_with_sft.objective(
        lambda *_, want: (own, truth), lambda logprob: seen.append(logprob) or inner, coef=0.5, want=("entropy",)
    )
    batch = {"prompt_at": torch.tensor([4, 5])}
    terms, metrics = objective.terms({}, {}, batch, None)
    assert {name: value.item() for name, value in terms.items()} == {"policy": 6.0, "ce": 2.0}
    assert {name: int(value) for name, value in objective.counts(batch).items()} == {"policy": 3, "ce": 2}
    assert metrics["ce_loss"].value == 2.0 and metrics["ce_loss"].weight == 2
    assert seen[-1]({}, {}, batch, None) is own
