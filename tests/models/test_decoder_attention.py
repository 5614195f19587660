"""Layers of several windows, with soft-cap and sinks: packed, branched, cached and trained alike, in float64 against the dense mask."""

import pytest
import torch

from treetune import models
from treetune.core import strided, tree
from treetune.core.grad import value_and_grad
from treetune.models import decode, decode_branches, decoder_attention, dense, hf
from treetune.models.decoder_attention import Rule
from treetune.ops import attention
from treetune.ops.attention_torch import Weighting

SIZES = dense.Config(96, 32, 48, 3, 4, 2, 8, max_positions=64, init_std=0.3)
VARIANTS = {
    "windows": {"layer_windows": (3, None, 8)},
    "softcap": {"attn_softcap": 1.5},
    "sinks": {"attn_sinks": True, "window": 5},
    "all": {"layer_windows": (3, None, 8), "attn_softcap": 1.5, "attn_sinks": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    """No leaf at a neutral start: sinks differ from head to head and from layer to layer."""
    from dataclasses import replace

    made = hf.random("llama", replace(SIZES, **VARIANTS[request.param]), seed=0, dtype=torch.float64)
    for number, layer in enumerate(made.params["layers"]):
        if "sinks" in layer:
            layer["sinks"] += torch.linspace(-1, 2, 4) + number / 2
    return made


def hidden(model, batch):
    return dense.forward(model.params, batch, decoder_attention.plan(batch, model.cfg), model.cfg).hidden


def grown(stream, documents, n=2):
    """Token trees: rollouts of 6 tokens from anchors of the documents; the batch, the layout and the anchors."""
    batch = stream(documents)
    anchors = strided.anchors(strided.lengths(batch), stride=5, context_length=4, generate_max_len=6)
    drawn = torch.randint(0, 96, (len(anchors.start) * n, 6), generator=torch.Generator().manual_seed(0))
    return *strided.grow(batch, anchors, drawn, n), anchors


@pytest.mark.sampled(2)
def test_cached_steps_equal_the_full_forward(model, documents, stepwise):
    batch = dense.single(torch.tensor(documents[1]))
    torch.testing.assert_close(stepwise(model, batch["tokens"]), hidden(model, batch), rtol=1e-11, atol=1e-12)


@pytest.mark.sampled(2)
def test_packed_documents_equal_each_alone(model, documents, stream):
    alone = torch.cat([hidden(model, stream([ids])) for ids in documents])
    torch.testing.assert_close(hidden(model, stream(documents)), alone, rtol=1e-11, atol=1e-12)


@pytest.mark.sampled(2)
def test_branches_equal_documents_of_their_own(model, documents, stream):
    batch, layout, anchors = grown(stream, documents)
    states = hidden(model, batch)
    for rollout, rows in enumerate(layout.generated):
        document, start = (int(side[rollout // 2]) for side in (anchors.document, anchors.start))
        ids = [*documents[document][:start], *batch["tokens"][rows].tolist()]
        torch.testing.assert_close(states[rows], hidden(model, stream([ids]))[start:], rtol=1e-11, atol=1e-12)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("remat", [None, "full"])
def test_gradients_equal_those_of_the_dense_mask(model, documents, stream, monkeypatch, remat):
    batch, _, _ = grown(stream, documents)

    def loss(params):
        return models.logprobs(model.family, model.cfg, params, batch, remat=remat).logp.sum(), None

    (mine, _), ours = value_and_grad(loss)(model.params)

    def plain(q, k, v, layer, rule, *, plan, cache):
        return attention.attention_ref(q, k, v, batch, window=rule.window, **rule.weighting._asdict())

    monkeypatch.setattr(decoder_attention, "mix", plain)
    (exact, _), expected = value_and_grad(loss)(model.params)
    torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)
    for (path, one), other in zip(tree.items(ours), tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=path)
        assert one.abs().max() > 0, path


@pytest.mark.sampled(2)
def test_samplers_draw_from_what_is_trained(model, documents, stream):
    prompts = [ids[:17] for ids in documents]
    drawn = decode.sample(model, prompts, n=2, max_new_tokens=12, seed=1)
    rows = [[*prompts[row // 2], *ids.tolist()] for row, ids in enumerate(drawn.tokens)]
    batch = stream(rows)
    logp = models.logprobs(model.family, model.cfg, model.params, batch).logp.split(batch["seq_lens"].tolist())
    torch.testing.assert_close(torch.stack([part[-12:] for part in logp]).float(), drawn.logp.float(), rtol=0, atol=2e-6)


@pytest.mark.sampled(2)
def test_strided_rollouts_are_drawn_from_what_is_trained(model, documents, stream):
    batch = stream(documents)
    anchors = strided.anchors(strided.lengths(batch), stride=5, context_length=4, generate_max_len=12)
    drawn = decode_branches.branches(model, batch, anchors, 2, seed=4)
    trained = models.logprobs(model.family, model.cfg, model.params, strided.grow(batch, anchors, drawn.tokens, 2)[0]).logp
    torch.testing.assert_close(trained.view_as(drawn.logp).float(), drawn.logp.float(), rtol=0, atol=2e-6)


WEIGHTINGS = [Weighting(0.4, None, None), Weighting(0.4, 1.5, None), Weighting(0.4, None, torch.linspace(-1, 2, 4).double())]


@pytest.mark.parametrize("weighting", [*WEIGHTINGS, WEIGHTINGS[2]._replace(softcap=1.5)])
@pytest.mark.parametrize("window", [None, 4])
def test_values_of_another_width_than_keys(window, weighting):
    """Of branches of 3 tokens: from a plan, from a cache row of their own, and from the trunk's keys beside theirs."""
    rule, starts, length, trunk = Rule(window, weighting), (2, 7, 9), 3, 9
    anchors = strided.Anchors(torch.zeros(3, dtype=torch.int64), torch.tensor(starts), length)
    layout = strided.layout(torch.tensor([0, trunk]), anchors, 1)
    batch = {name: getattr(layout, name) for name in ("positions", "branch", "start", "cu_docs")}
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(layout.branch), *size, generator=gen, dtype=torch.float64) for size in ((4, 8), (2, 8), (2, 5)))
    exact = attention.attention_ref(q, k, v, batch, window=window, **weighting._asdict())
    plan = attention.plan(batch, windows=(window,), plain=False)
    torch.testing.assert_close(decoder_attention.mix(q, k, v, 0, rule, plan=plan, cache=None), exact, rtol=1e-12, atol=1e-13)

    last, prefix = (
        layout.generated[:, -1],
        [torch.cat([layout.trunk[:start], rows]) for start, rows in zip(starts, layout.generated, strict=True)],
    )
    row = torch.nn.utils.rnn.pad_sequence(prefix, batch_first=True)  # of each branch, as many slots as the longest
    cache = dense.Cache([k[row]], [v[row]], torch.arange(3), torch.tensor(starts) + length - 1, row.shape[1])
    mixed = decoder_attention.mix(q[last], k[last], v[last], 0, rule, plan=None, cache=cache)
    torch.testing.assert_close(mixed, exact[last], rtol=1e-12, atol=1e-13)

    runs = decode_branches._runs([0, trunk], anchors.document, anchors.start)
    side = decode_branches._Trunk([k[None, layout.trunk]], [v[None, layout.trunk]], runs, anchors.start)
    own = ([k[layout.generated]], [v[layout.generated]])
    branched = decode_branches._attend(q[last], 0, rule, trunk=side, branch_cache=own, step=length - 1)
    torch.testing.assert_close(branched, exact[last], rtol=1e-12, atol=1e-13)


def test_windows_are_one_for_each_layer():
    with pytest.raises(ValueError, match="layer_windows has 2 windows; expected 3"):
        dense.Config(96, 32, 48, 3, 4, 2, 8, layer_windows=(None, 3))


def test_each_layer_attends_by_its_own_window(documents, stream):
    """A window of 3 on the second layer: the first is as without, and of the second all but the first tokens of a document change."""
    from dataclasses import replace

    batch = stream(documents)

    def features(**change):
        model = hf.random("llama", replace(SIZES, **change), seed=0, dtype=torch.float64)
        plan = decoder_attention.plan(batch, model.cfg)
        return dense.forward(model.params, batch, plan, model.cfg, collect=(1, 2)).features

    full, some = features(), features(layer_windows=(None, 3, None))
    assert torch.equal(full[1], some[1])
    assert torch.equal((full[2] != some[2]).any(1), batch["positions"] >= 3)
    one, each = features(window=3), features(layer_windows=(3, 3, 3))
    assert all(torch.equal(one[layer], each[layer]) for layer in (1, 2)) and not torch.equal(one[1], some[1])
