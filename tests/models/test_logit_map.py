"""A family with a scale and a soft-cap on its logits: log-probs, prompt log-probs, and both samplers see them."""

from types import SimpleNamespace

import pytest
import torch

from treetune.core import strided
from treetune.models import MODELS, Model, decode, decode_branches, dense, hf, logprobs, logprobs_beside
from treetune.ops import attention

RULES = {"scale": dense.LogitMap(scale=0.3), "cap": dense.LogitMap(softcap=0.8), "both": dense.LogitMap(scale=2.5, softcap=1.5)}


@pytest.fixture(params=RULES)
def capped(request, monkeypatch, oracle):
    """A llama whose family maps its logits, and the rule."""
    rule = RULES[request.param]
    names = vars(MODELS["llama"]) | {"logit_map": lambda cfg: rule}
    monkeypatch.setitem(MODELS, "capped", SimpleNamespace(**names))
    base = hf.load(oracle("llama")[1])
    return Model("capped", base.cfg, base.params), rule


def logits(model, rule, ids):
    """By the formula, in float64."""
    plain = dense.probe(model.params, torch.tensor(ids), model.cfg).double()
    scaled = rule.scale * plain
    return scaled if rule.softcap is None else rule.softcap * torch.tanh(scaled / rule.softcap)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_mapped_logits(capped, stream, documents, temperature):
    model, rule = capped
    ids = documents[1]
    want = (logits(model, rule, ids)[:-1] / temperature).log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    got = logprobs(model.family, model.cfg, model.params, stream([ids]), temperature=temperature).logp
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    plain = logprobs("llama", model.cfg, model.params, stream([ids]), temperature=temperature).logp
    assert (plain - got).abs().max() > 0.1


@pytest.mark.sampled(2)
def test_log_probs_of_prompts_are_too(capped, stream, documents):
    model, _ = capped
    batch = stream([documents[0]])
    batch |= {"prompt_at": batch["at"], "prompt_targets": batch["targets"]}
    plan = attention.plan(batch)
    stats, prompt = logprobs_beside(model.family, model.cfg, model.params, batch, plan, temperature=0.7)
    for temperature, got in ((0.7, stats), (1.0, prompt)):
        want = logprobs(model.family, model.cfg, model.params, batch, temperature=temperature).logp
        torch.testing.assert_close(got.logp, want, atol=1e-6, rtol=0)


@pytest.mark.sampled(2)
def test_samplers_draw_from_them(capped, stream, documents):
    model, rule = capped
    prompt = documents[0]
    samples = decode.sample(model, [prompt], n=3, max_new_tokens=6, temperature=0.7, seed=1)
    batch = {name: stream([prompt])[name] for name in ("tokens", "positions", "cu_docs")}
    anchors = strided.Anchors(torch.zeros(1, dtype=torch.int64), torch.tensor([len(prompt)]), 6)
    branches = decode_branches.branches(model, batch, anchors, 3, temperature=0.7, seed=1)
    for drawn in (samples, branches):
        for tokens, logp in zip(drawn.tokens.tolist(), drawn.logp, strict=True):
            z = logits(model, rule, prompt + tokens)[len(prompt) - 1 : -1] / 0.7
            torch.testing.assert_close(logp.double(), z.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0], atol=1e-5, rtol=0)
