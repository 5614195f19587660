"""The sparse MLP against a loop over tokens, in float64."""

from dataclasses import replace

import pytest
import torch

from treetune import models
from treetune.core import grad, param, step, tree
from treetune.core.lora import Lora
from treetune.core.param import Param
from treetune.losses import routing_objective, sft_objective
from treetune.models import decoder_attention, dense, hf, moe, policy

T, D, F = 13, 8, 6
EXPERTS = moe.Experts(count=5, top_k=2, width=F, layers=(0,))
SCALE = 0.7


def weights(experts=EXPERTS, dtype=torch.float64):
    tree_ = moe.abstract(experts, D, lambda shape, axes, init, op: Param(shape, dtype, axes, init, op), "normal:0.5", "normal:0.5")
    return param.init(tree_, seed=0)


def adapter(w, seed=1):
    """Low-rank pairs on the router and on the experts, away from their start."""
    generator = torch.Generator().manual_seed(seed)

    def pair(leaf):
        *lead, outputs, inputs = leaf.shape
        return {
            "A": torch.randn(*lead, 3, inputs, generator=generator, dtype=leaf.dtype),
            "B": torch.randn(*lead, outputs, 3, generator=generator, dtype=leaf.dtype),
        }

    return {"router": pair(w["router"]), "experts": {name: pair(leaf) for name, leaf in w["experts"].items()}}


def stream(tokens=T, dtype=torch.float64):
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def loop(h, w, ab, experts):
    """The formula, one expert of one token at a time."""

    def whole(leaf, pair):
        return leaf if pair is None else leaf + SCALE * pair["B"] @ pair["A"]

    router = whole(w["router"], ab.get("router"))
    up_down = {name: whole(w["experts"][name], ab.get("experts", {}).get(name)) for name in ("gate_up_proj", "down_proj")}
    out = []
    for x in h:
        p = (router @ x).softmax(0)
        best = p.argsort(descending=True)[: experts.top_k]
        share = p[best] / p[best].sum() if experts.normalised else p[best]
        y = torch.zeros_like(x)
        for weight, e in zip(share, best, strict=True):
            both = up_down["gate_up_proj"][e] @ x
            gate, up = both[: experts.width], both[experts.width :]
            y = y + weight * (up_down["down_proj"][e] @ (gate / (1 + torch.exp(-gate)) * up))
        out.append(y)
    return torch.stack(out)


def gradients(y, leaves):
    up = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view_as(y)
    return torch.autograd.grad((y.double() * up).sum(), leaves)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_values_and_gradients_of_router_and_experts_equal_a_loop(top_k, normalised, adapted):
    experts = replace(EXPERTS, top_k=top_k, normalised=normalised)
    w, h = weights(experts), stream()
    ab = adapter(w) if adapted else {}
    leaves = [leaf.requires_grad_() for leaf in (h, w["router"], *w["experts"].values())]
    leaves += [side.requires_grad_() for pair in ((ab["router"], *ab["experts"].values()) if ab else ()) for side in pair.values()]
    y, logits = moe.mlp(h, w, ab, experts, Lora({}, SCALE))
    want = loop(h, w, ab, experts)
    assert logits.shape == (T, 5)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-12)
    for ours, plain in zip(gradients(y, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


def test_an_expert_that_no_token_asks_for_has_no_gradient():
    w, h = weights(), stream(2)
    leaf = w["experts"]["down_proj"].requires_grad_()
    y, logits = moe.mlp(h, w, {}, EXPERTS)
    chosen, _ = moe.choose(logits, EXPERTS)
    (grad,) = gradients(y, [leaf])
    idle = [e for e in range(5) if e not in chosen]
    assert idle and not grad[idle].any() and all(grad[e].any() for e in chosen.unique())


@pytest.mark.parametrize("normalised", [True, False])
def test_weights_of_a_token(normalised):
    """Best first; over the chosen experts alone they sum to 1, over all to less."""
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    chosen, share = moe.choose(logits, replace(EXPERTS, normalised=normalised))
    assert torch.equal(chosen, logits.argsort(-1, descending=True)[:, :2]) and (share[:, 0] >= share[:, 1]).all()
    want = logits.softmax(-1).gather(-1, chosen)
    torch.testing.assert_close(share, want / want.sum(-1, keepdim=True) if normalised else want)
    assert moe.choose(logits.bfloat16(), EXPERTS)[1].dtype == torch.float32


def test_a_token_does_not_depend_on_the_others():
    """In float32 on the CPU not by a bit, whichever experts the other tokens go to and however many there are."""
    w = weights(dtype=torch.float32)
    h = stream(40, torch.float32)
    y, _ = moe.mlp(h, w, {}, EXPERTS)
    other = torch.cat([stream(30, torch.float32) * 3, h[:1], -h[5:20], h[7:40], h[:1]])
    again, _ = moe.mlp(other, w, {}, EXPERTS)
    torch.testing.assert_close(again[46:79], y[7:40], rtol=0, atol=1e-6)
    if torch.backends.mkldnn.is_available():
        assert torch.equal(again[46:79], y[7:40]) and torch.equal(again[30], y[0]) and torch.equal(again[-1], y[0])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_logits_of_routers_are_those_of_transformers(oracle, documents, stream, kind):
    model, path = oracle(kind)
    ours, ids = hf.load(path), documents[1]
    _, routing = models.logprobs_routed(ours.family, ours.cfg, ours.params, stream([ids]))
    with torch.no_grad():
        theirs = model(torch.tensor([ids]), output_router_logits=True).router_logits
    assert len(routing) == len(ours.cfg.experts.layers)
    for logits, want in zip(routing, theirs[-len(routing) :], strict=True):
        torch.testing.assert_close(logits, want.view(-1, 5)[:-1], atol=2e-5, rtol=0)
    batch = dense.single(torch.tensor(ids))
    assert not dense.forward(ours.params, batch, decoder_attention.plan(batch, ours.cfg), ours.cfg).routing  # unless they are asked for


def test_terms_of_routers_do_not_depend_on_packing_or_recomputing(oracle, documents, stream):
    """The gradient of the whole objective: packed as one stream, a document each, and with layers computed again in the backward."""
    ours = hf.load(oracle("qwen3_moe")[1])
    start = policy.full(ours)
    router = routing_objective.Router(ours.cfg.experts.top_k, 0.3, 0.2)

    def gradient(batches, remat=None):
        logprob = policy.logprob(start, remat=remat, run=models.logprobs_routed)
        objective = routing_objective.objective(logprob, sft_objective.objective, router)
        totals = step.totals(objective, batches)
        values = []
        for batch in batches:

            def loss(params, batch=batch):
                terms, _ = objective.terms(params, {}, batch, None)
                return sum(term / totals[name] for name, term in terms.items()), None

            values.append(grad.value_and_grad(loss)(start.params)[1])
        return [sum(leaves) for leaves in zip(*map(tree.leaves, values), strict=True)]

    whole = gradient([stream(documents)])
    for other in (gradient([stream([ids]) for ids in documents]), gradient([stream(documents)], remat="full")):
        for got, want in zip(other, whole, strict=True):
            assert (got - want).norm() <= 2e-5 * want.norm()
