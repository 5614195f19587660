"""What tests of the online objective share: fixture G of the loss contract as a batch, and a model that is its own log-probs."""

from functools import partial

import torch

from treetune.losses import policy, policy_gradient, reduce
from treetune.ops.linear_logprob import TokenStats

F64 = torch.float64
NAN = float("nan")
LOGP = [[-1, -0.5, -2], [-0.3, -1.2]]
OLD = [[-1.2, -0.5, -1.5], [-0.6, -1]]
REF = [[-1.1, -0.6, -1.8], [-0.3, -1.5]]
ENTROPY = [[0.1, 2, 1], [0.5, 3]]
PPO = policy.ppo_clip
SEQUENCES = partial(reduce.by_sequence, count_empty=True)
SUMS = partial(reduce.by_constant, length=1)
BUDGET = partial(reduce.by_constant, length=8)
CISPO = partial(policy.cispo, epsilon_high=1.2)


def flat(rows):
    return torch.tensor([x for row in rows for x in row], dtype=F64)


def fixture(logp=LOGP, advantage=(1, -0.5), **keys):
    """(params, batch) whose log-probs are the parameters; values of the keys are rows, or scalars."""
    lens = torch.tensor([len(row) for row in logp], dtype=torch.int64)
    n, total = int(lens.sum()), int(lens.sum()) + 1
    batch = {
        "tokens": torch.zeros(total, dtype=torch.int64), "positions": torch.arange(total), "at": torch.arange(n),
        "targets": torch.zeros(n, dtype=torch.int64), "cu_docs": torch.tensor([0, total]), "seq_lens": lens,
        "seq": torch.arange(len(logp)).repeat_interleave(lens), "doc_of_seq": torch.zeros_like(lens),
        "advantage": torch.tensor(advantage, dtype=F64),
    }  # fmt: skip
    for key, value in ({"old_logp": OLD} | keys).items():
        if value is not None:
            batch[key] = flat(value) if isinstance(value, list) else torch.tensor(value, dtype=F64)
    params = {"logp": flat(logp).requires_grad_(), "entropy": flat(keys.get("entropy", ENTROPY)).requires_grad_()}
    batch.pop("entropy", None)
    return params, batch


def stand_in(params, frozen, batch, plan, *, want=()):
    """A model whose log-probs and entropies are its parameters."""
    found = {"entropy": params["entropy"][batch["at"]]} if "entropy" in want else {}
    return TokenStats(params["logp"][batch["at"]], **found)


def run(made, params, batch):
    """(loss, gradient by log-prob, metrics) of a step of one micro-batch."""
    terms, metrics = made.terms(params, {}, batch, None)
    counts = made.counts(batch)
    assert terms.keys() == counts.keys()
    loss = sum(terms[name] / counts[name].clamp(min=1) for name in terms)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    assert all(not metric.value.requires_grad for metric in metrics.values())
    return loss, grads[0], {name: metric.value.item() for name, metric in metrics.items()}


def objective(logprob, term, *, kl=None, kl_coef=0.0, corrected_kl=True, **options):
    """policy_gradient.objective from one flat list of options."""
    loss = {name: options.pop(name) for name in ("ratio", "reduction", "reports") if name in options}
    divergence = policy_gradient.Divergence(kl, kl_coef, corrected_kl)
    return policy_gradient.objective(logprob, policy_gradient.Surrogate(term, **loss), kl=divergence, **options)


def of_fixture(term=PPO, *, keys=None, logp=LOGP, advantage=(1, -0.5), **options):
    made = objective(stand_in, term, **options)
    return run(made, *fixture(logp, advantage, **(keys or {})))
