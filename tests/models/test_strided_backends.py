"""Blocks of a strided stream on every attention backend: what a block does not see changes no bit of it; memory grows with the blocks."""

import pytest
import torch

from treetune import models
from treetune.core import strided
from treetune.core.grad import value_and_grad
from treetune.models import MODELS, hf
from treetune.ops import attention, attention_mask

OPTIONS = {"stride": 4, "context_length": 4, "generate_max_len": 4}
ROLLOUTS = 3
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(oracle, request):
    return hf.load(oracle(request.param)[1])


@pytest.fixture(params=["sdpa", "flex"])
def plan(request, monkeypatch):
    """A plan for the backend that is named. FlexAttention runs as written, not compiled: it has no backward on a CPU either way."""

    def make(batch, cfg):
        made = attention.plan(batch, windows=cfg.windows)
        if request.param == "sdpa":
            return made
        masks = [attention_mask.block_mask(batch, made.tokens, window, torch.device("cpu")) for window in made.windows]
        pairs = zip(made.windows, masks, strict=True)
        return made._replace(patterns=tuple(attention.Pattern(window, "flex", (), mask) for window, mask in pairs))

    if request.param == "flex":
        flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
        monkeypatch.setattr(attention, "_compiled_flex", lambda: flex)
    return make


def grown(stream, sizes, seed=0):
    gen = torch.Generator().manual_seed(seed)
    batch = stream([torch.randint(0, 60, (size,), generator=gen).tolist() for size in sizes])
    found = strided.anchors(strided.lengths(batch), **OPTIONS)
    drawn = torch.randint(0, 60, (len(found.start) * ROLLOUTS, found.length), generator=gen)
    return *strided.grow(batch, found, drawn, ROLLOUTS), found


def hidden(model, batch, plan):
    return MODELS[model.family].forward(model.params, batch, plan(batch, model.cfg), model.cfg).hidden


def test_other_blocks_and_later_tokens_change_nothing(model, stream, plan):
    batch, place, found = grown(stream, [30, 21])
    before = hidden(model, batch, plan)
    for rollout in (0, 4, len(place.generated) - 1):
        own, anchor = place.generated[rollout], found.start[rollout // ROLLOUTS]
        document = torch.bucketize(own[0], batch["cu_docs"].long(), right=True) - 1
        seen = (batch["branch"] == 0) & (batch["positions"] < anchor) & (torch.arange(len(batch["tokens"])) >= batch["cu_docs"][document])
        seen &= torch.arange(len(batch["tokens"])) < batch["cu_docs"][document + 1]
        seen[own] = True
        changed = batch | {"tokens": torch.where(seen, batch["tokens"], (batch["tokens"] + 1) % 60)}
        after = hidden(model, changed, plan)
        assert torch.equal(after[own], before[own])
        assert not torch.equal(after[~seen], before[~seen])


def test_backends_agree(model, stream, plan):
    batch, place, _ = grown(stream, [30, 21])
    exact = MODELS[model.family].forward(model.params, batch, attention.plan(batch, windows=model.cfg.windows), model.cfg).hidden
    torch.testing.assert_close(hidden(model, batch, plan), exact, atol=2e-5, rtol=0)


def kept_bytes(model, batch):
    """What the forward pass keeps for the backward pass, each storage once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x  # held, so that no address is used twice
        return x

    def loss(params):
        return models.logprobs(model.family, model.cfg, params, batch).logp.sum(), None

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value_and_grad(loss)(model.params)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_memory_of_a_step_grows_linearly_with_the_blocks(model, stream):
    """Of one document of 64 tokens with 4, 8 and 12 of its anchors: the same more for the same number of blocks, within a tenth."""
    gen = torch.Generator().manual_seed(1)
    batch, sizes = stream([torch.randint(0, 60, (64,), generator=gen).tolist()]), []
    every = strided.anchors(strided.lengths(batch), **OPTIONS)
    for count in (4, 8, 12):
        found = every._replace(document=every.document[-12:][:count], start=every.start[-12:][:count])
        drawn = torch.randint(0, 60, (count * 16, found.length), generator=gen)
        sizes.append(kept_bytes(model, strided.grow(batch, found, drawn, 16)[0]))
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert 0 < first and abs(second - first) <= 0.1 * first, sizes
