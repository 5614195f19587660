"""Experts of bridged models: our products against a loop, and adapters on them against PEFT, folded weights and the sampler."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch

from treetune.core import grad, lora, tree
from treetune.core.lora import Lora
from treetune.models import adapter, bridge_experts, certificate_checks, decode, hf, logprobs, plain_model
from treetune.models.policy import AdapterSpec, adapt

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).with_name("architectures.py"))
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)

# Latent attention and a biased choice; recurrent layers beside attention; experts without gates in layers of their own.
KINDS = ("deepseek_v3", "qwen3_5_moe_text", "nemotron_h")
MORE = ("olmoe", "qwen2_moe", "glm4_moe", "minimax_m2", "granitemoe", "lfm2_moe")
EVERY = [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]
DOCUMENTS = ([5, 9, 120, 33, 7, 64, 8], [11, 3, 199, 42, 17, 17, 90, 31, 5, 77, 140, 2, 66], [150, 44, 13, 101, 23])


def adapted(model):
    """An adapter on the experts, away from its start."""
    sizes, generator = hf.abstract_of(model), torch.Generator().manual_seed(1)
    paths = lora.match(sizes, [r"\.experts\."])
    pairs = lora.init(sizes, paths, rank=3, seed=0, dtype=model.cfg.dtype)
    return Lora(tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype), pairs), 0.7), paths


def loop(module, h, chosen, weights, adapters):
    """One expert of one token at a time; an index beyond the experts stands for none."""
    names = bridge_experts.stacks(module)
    up, down = (getattr(module, name) + 0.7 * adapters[name]["B"] @ adapters[name]["A"] for name in names)
    out = []
    for x, experts, shares in zip(h, chosen.tolist(), weights, strict=True):
        y = torch.zeros_like(x)
        for e, share in zip(experts, shares, strict=True):
            if e < module.num_experts:
                inner = up[e] @ x
                y = y + share * (down[e] @ (module._apply_gate(inner) if module.has_gate else module.act_fn(inner)))
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("kind", EVERY)
def test_values_and_gradients_of_experts_and_of_their_weights_equal_a_loop(kind):
    """In float64: of the tokens, of the experts' weights, through which the router learns, of the stacks and of the adapters on them."""
    model = architectures.build(kind, dtype=torch.float64)
    module = next(module for module in model.modules() if bridge_experts.stacks(module))
    generator = torch.Generator().manual_seed(0)
    stacks = {name: getattr(module, name) for name in bridge_experts.stacks(module)}
    h = torch.randn(9, stacks["down_proj"].shape[1], generator=generator, dtype=torch.float64).requires_grad_()
    chosen = torch.stack([torch.randperm(module.num_experts + 1, generator=generator)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, generator=generator, dtype=torch.float64).requires_grad_()
    adapters = lora.init(stacks, list(stacks), rank=3, seed=0, dtype=torch.float64)
    adapters = tree.map(lambda leaf: (leaf + torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).requires_grad_(), adapters)
    module.__dict__[bridge_experts.ADAPTED] = bridge_experts.Adapted(adapters, 0.7)
    ours, plain = bridge_experts.forward(module, h, chosen, weights), loop(module, h, chosen, weights, adapters)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)
    up = torch.linspace(-1, 2, plain.numel(), dtype=torch.float64).view_as(plain)
    leaves = [h, weights, *stacks.values(), *tree.leaves(adapters)]
    for got, want in zip(torch.autograd.grad(ours, leaves, up), torch.autograd.grad(plain, leaves, up), strict=True):
        assert want.any() and (got - want).norm() <= 1e-9 * want.norm()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", EVERY)
def test_peft_computes_the_same_logits(folder, tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = hf.load(folder(kind))
    low, paths = adapted(model)
    info = adapter.Info(3, 2.1, base=str(folder(kind)), paths=paths)
    adapter.save(tmp_path / "adapter", low.tree, family=model.family, info=info, tied=model.cfg.tied)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(plain_model.load(folder(kind)), tmp_path / "adapter").eval()
    assert not [entry.message for entry in caught if "keys" in str(entry.message)]
    batch = certificate_checks.pack([DOCUMENTS[1]])
    with torch.no_grad():
        ours = certificate_checks.logits(model, batch, low)
        torch.testing.assert_close(ours, plain_model.logits(theirs, DOCUMENTS[1]), atol=1e-4, rtol=0)
        assert (ours - certificate_checks.logits(model, batch)).abs().max() > 0.02
        again, whole, read = adapter.load(tmp_path / "adapter", model)
        assert torch.equal(certificate_checks.logits(model, batch, again), ours)
    assert set(read.paths) == set(paths) and not whole


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", EVERY)
def test_values_and_gradients_are_those_of_the_folded_weights(folder, kind):
    model = hf.load(folder(kind), dtype=torch.float64)
    low, _ = adapted(model)
    base, batch = dict(tree.items(model.params)), certificate_checks.pack(DOCUMENTS)

    def loss(pairs, fold):
        folded = base | {path: base[path] + low.scale * b @ a for path, (a, b) in lora.pairs(pairs).items()} if fold else base
        adapter = None if fold else low._replace(tree=pairs)
        return -logprobs(model.family, model.cfg, tree.from_items(folded.items()), batch, lora=adapter).logp.sum(), None

    ((one, _), mine), ((other, _), plain) = (grad.value_and_grad(loss)(low.tree, fold) for fold in (False, True))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    largest = max(want.norm() for want in tree.leaves(plain))
    for (path, leaf), want in zip(tree.items(mine), tree.leaves(plain), strict=True):
        assert want.any() and (leaf - want).norm() <= 1e-5 * want.norm() + 1e-7 * largest, path  # the head and routers give float32


@pytest.mark.parametrize("kind", [*EVERY[:1], *(pytest.param(kind, marks=pytest.mark.slow) for kind in (*KINDS[1:], *MORE))])
def test_the_sampler_uses_adapters_on_experts(folder, kind):
    """|log ratio| <= 5e-5 on any token."""
    model = hf.load(folder(kind))
    low, _ = adapted(model)
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    samples = decode.sample(model, prompts, n=3, lora=low, max_new_tokens=12, seed=4)
    rows = [prompts[row // 3] + samples.tokens[row].tolist() for row in range(9)]
    batch = certificate_checks.pack(rows)
    with torch.no_grad():
        expected = logprobs(model.family, model.cfg, model.params, batch, lora=low).logp.split(batch["seq_lens"].tolist())
    for row, logp in enumerate(expected):
        assert (samples.logp[row] - logp[-12:]).abs().max() <= 5e-5


@pytest.mark.parametrize("kind", ["deepseek_v3", "nemotron_h"])
def test_rematerialised_gradients_are_those_of_a_kept_pass_bit_for_bit(folder, kind):
    model = hf.load(folder(kind))
    low, _ = adapted(model)

    def loss(pairs, remat):
        batch = certificate_checks.pack(DOCUMENTS)
        return logprobs(model.family, model.cfg, model.params, batch, lora=low._replace(tree=pairs), remat=remat).logp.sum(), None

    ((kept, _), one), ((again, _), other) = (grad.value_and_grad(loss)(low.tree, remat) for remat in (None, "full"))
    assert torch.equal(kept, again) and all(torch.equal(a, b) for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True))


def test_targets_name_experts_as_transformers_does(folder):
    model, base = hf.load(folder("deepseek_v3")), adapter.Base("x", "")
    every = adapt(model, AdapterSpec(rank=2), base=base, seed=0)
    assert not [path for path in every.adapter.paths if "experts." in path and "shared" not in path]
    named = [adapt(model, AdapterSpec(rank=2, targets=(name,)), base=base, seed=0) for name in ("experts", "mlp.experts.down_proj")]
    assert [len(policy.adapter.paths) for policy in named] == [4, 2]
    assert named[0].params["lora"]["layers"][1]["mlp"]["experts"]["gate_up_proj"]["A"].shape[:2] == (4, 2)
    with pytest.raises(ValueError, match=r"dropout of adapters must be 0 where layers.1.mlp.experts.gate_up_proj has one, got 0.1"):
        adapt(model, AdapterSpec(rank=2, targets=("experts",), dropout=0.1), base=base, seed=0)
