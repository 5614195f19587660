"""Our forward and backward against transformers, float32, on tiny random models of every family."""

import pytest
import torch

from treetune import models
from treetune.core import grad, tree
from treetune.models import decoder_attention, dense, hf, hf_keys

NEW = ("mixtral", "qwen3_moe", "gpt_oss", "phi3", "smollm3", "granite", "olmo2", "olmo3", "gemma", "gemma2", "gemma3")
KINDS = ("llama", "llama3", "mistral", "qwen2", "qwen3", *NEW)
# A tie is no family's own: each is here with one or without, and llama with both.
ALL = [("llama", False), *((kind, i % 2 == 0) for i, kind in enumerate(KINDS))]
ALL += [pytest.param(kind, i % 2 == 1, marks=pytest.mark.slow) for i, kind in enumerate(KINDS) if i]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind,tied", ALL)
def test_logits_equal_transformers(oracle, documents, kind, tied):
    model, path = oracle(kind, tied)
    ours = hf.load(path)
    assert ours.cfg.tied == tied and ("lm_head" in ours.params) != tied
    ids = torch.tensor(documents[1])
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
        got = dense.probe(ours.params, ids, ours.cfg)
    assert expected.abs().max() > 1.0
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind,tied", ALL)
def test_every_gradient_leaf_equals_transformers(oracle, documents, stream, kind, tied):
    model, path = oracle(kind, tied)
    ours = hf.load(path)
    batch = stream(documents)

    def loss(params, batch):
        stats = models.logprobs(ours.family, ours.cfg, params, batch)
        return -stats.logp.mean(), None

    (value, _), grads = grad.value_and_grad(loss)(ours.params, batch)
    model.zero_grad()
    total = sum(
        torch.nn.functional.cross_entropy(model(torch.tensor(ids)[None]).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum")
        for ids in documents
    )
    expected = total / len(batch["at"])
    expected.backward()
    assert abs(value - expected) < 1e-5 * expected
    theirs = {name: leaf.grad for name, leaf in model.named_parameters()}
    expected = hf_keys.split(ours.family, theirs, dict(tree.items(ours.params)))
    assert expected.keys() == dict(tree.items(grads)).keys() and len(theirs) == len(hf_keys.groups(ours.family, expected))
    for leaf_path, leaf in tree.items(grads):
        assert expected[leaf_path].norm() > 1e-6, leaf_path
        error = (leaf - expected[leaf_path]).norm() / expected[leaf_path].norm()
        assert error < 1e-5, (leaf_path, error)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind,tied", ALL)
def test_packed_equals_separate(oracle, documents, stream, kind, tied):
    _, path = oracle(kind, tied)
    ours = hf.load(path)
    packed = models.logprobs(ours.family, ours.cfg, ours.params, stream(documents)).logp
    separate = [models.logprobs(ours.family, ours.cfg, ours.params, stream([ids])).logp for ids in documents]
    torch.testing.assert_close(packed, torch.cat(separate), atol=5e-6, rtol=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "mixtral", "qwen3_moe", "gpt_oss"])
def test_a_document_does_not_see_its_neighbours_bit_for_bit(oracle, documents, stream, kind):
    _, path = oracle(kind)
    ours = hf.load(path)

    def hidden(docs):
        batch = stream(docs)
        return dense.forward(ours.params, batch, decoder_attention.plan(batch, ours.cfg), ours.cfg).hidden

    changed = [[(token + 17) % 96 for token in ids] if i == 1 else ids for i, ids in enumerate(documents)]
    before, after = hidden(documents), hidden(changed)
    mine = torch.zeros(len(before), dtype=torch.bool)
    mine[len(documents[0]) : len(documents[0]) + len(documents[1])] = True
    assert torch.equal(before[~mine], after[~mine])
    assert not torch.equal(before[mine], after[mine])


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind,tied", ALL)
def test_cached_steps_equal_the_full_forward(oracle, documents, stepwise, kind, tied):
    _, path = oracle(kind, tied)
    ours = hf.load(path)
    batch = dense.single(torch.tensor(documents[1][: ours.cfg.shared_positions]))
    full = dense.forward(ours.params, batch, decoder_attention.plan(batch, ours.cfg), ours.cfg).hidden
    torch.testing.assert_close(stepwise(ours, batch["tokens"]), full, atol=2e-5, rtol=0)


def test_features_are_the_residual_stream(oracle, documents):
    model, path = oracle("llama")
    ours = hf.load(path)
    ids = torch.tensor(documents[1])
    batch = dense.single(ids)
    out = dense.forward(ours.params, batch, decoder_attention.plan(batch, ours.cfg), ours.cfg, collect=(0, 1))
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states
    assert sorted(out.features) == [0, 1]
    for index, feature in out.features.items():
        torch.testing.assert_close(feature, states[index][0], atol=2e-5, rtol=0)


def test_compute_dtype_is_one_cast_of_the_leaves(oracle, documents):
    from dataclasses import replace

    _, path = oracle("qwen3")
    wide, low = hf.load(path), hf.load(path, dtype=torch.bfloat16)
    ids = torch.tensor(documents[0])
    assert low.cfg.dtype == torch.bfloat16 and {leaf.dtype for leaf in tree.leaves(low.params)} == {torch.bfloat16}
    cast = dense.probe(wide.params, ids, replace(wide.cfg, dtype=torch.bfloat16))
    assert torch.equal(cast, dense.probe(low.params, ids, low.cfg))
