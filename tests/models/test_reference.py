"""The reference of a policy: its log-probs stay those of the start, or follow the policy."""

import pytest
import torch

from treetune.core import tree
from treetune.core.state import TrainState
from treetune.models import hf, logprobs, policy, reference, resize

SPEC = policy.AdapterSpec(rank=3, alpha=6.0, targets=("q_proj", "down_proj"), modules_to_save=("^norm$",))
PACE = reference.Pace(2, 0.25)


@pytest.fixture
def folder(oracle, words, tmp_path):
    """A model folder with a tokenizer."""
    path = tmp_path / "model"
    hf.save(path, hf.load(oracle("llama")[1]), tokenizer=words)
    return path


def moved(params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: leaf + 0.2 * torch.randn(leaf.shape, generator=generator), params)


@pytest.mark.parametrize("how", ["full", "fresh adapter", "trained adapter", "moves", "other"])
def test_it_stays_where_the_policy_started(folder, stream, documents, how, tmp_path):
    one, batch = policy.load(folder, adapter=None if how == "full" else SPEC, seed=1), stream(documents)
    if how == "trained adapter":
        one = one._replace(params=moved(one.params))
    other = hf.load(folder)._replace(params=moved(hf.load(folder).params)) if how == "other" else None
    kept = {"pace": PACE if how == "moves" else None, "trained_adapter": how == "trained adapter"}
    ref = reference.build(one, other=other, temperature=0.9, **kept)
    logprob = policy.logprob(one, temperature=0.9)
    want = logprob(one.params, one.frozen, batch, None).logp
    if other is not None:
        want = logprobs(other.family, other.cfg, other.params, batch, temperature=0.9).logp
    now = TrainState(moved(ref.policy.params, 5), ref.policy.frozen, {}, ref.extra, torch.tensor(0))
    torch.testing.assert_close(ref.logp(now, batch, None), want, atol=1e-6, rtol=0)
    assert (logprob(now.params, now.frozen, batch, None).logp - want).abs().max() > 1e-3


def test_it_follows_by_the_mean(folder):
    one = policy.load(folder, adapter=SPEC, seed=1)
    ref = reference.build(one, pace=PACE)
    now = TrainState(moved(one.params), one.frozen, {}, ref.extra, torch.tensor(0))
    after_step = ref.after_step
    assert after_step(now, {}, 3) is now
    mixed = after_step(now, {}, 4).extra["ref"]
    for path, leaf in tree.items(mixed):
        old, new = dict(tree.items(ref.extra["ref"]))[path], dict(tree.items(now.params))[path]
        torch.testing.assert_close(leaf, 0.75 * old + 0.25 * new)


def test_log_probs_that_are_there_are_not_computed_again(folder):
    def fail(*args):
        raise AssertionError

    batch = {reference.NAME: torch.zeros(2)}
    assert reference.preparer(fail)(None, [(batch, None)]) == [(batch, None)]


def test_another_vocabulary_is_refused(folder, oracle, tmp_path, words):
    hf.save(tmp_path / "other", resize.resize(hf.load(folder), 128), tokenizer=words)
    with pytest.raises(ValueError, match="128 rows of vocabulary, the model 96"):
        reference.load_other(str(tmp_path / "other"), policy.load(folder), dtype="float32", device=torch.device("cpu"))
