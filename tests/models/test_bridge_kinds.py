"""DoRA, PiSSA and ranks of their own on bridged models: what PEFT computes on transformers' own modules, remade and sampled alike."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch

from treetune.core import lora, tree
from treetune.core.quant import Scheme
from treetune.models import adapter, decode, dense, families, hf, plain_model, policy
from treetune.models.policy import AdapterSpec

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).with_name("architectures.py"))
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)

IDS = [11, 3, 199, 42, 17, 17, 90, 31, 5, 77, 140, 2, 66]
KINDS = {"dora": dict(dora=True), "pissa, dora, ranks": dict(dora=True, init="pissa", ranks=((r"layers\.1\.", 2),))}


def close(ours, theirs, bound=1e-5):
    """Models compute in float64: in float32 the order of sums, which is another on each CPU, takes up to 2e-5."""
    assert (ours - theirs).abs().max() <= bound


@pytest.fixture(scope="module", params=["glm4", "cohere2"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    with plain_model.without_bars():
        architectures.build(request.param).save_pretrained(path)
    return path


def moved(start):
    gen = torch.Generator().manual_seed(1)
    return tree.map(lambda leaf: leaf + 0.02 * torch.randn(leaf.shape, generator=gen), start.params)


def logits(model, low, ids=IDS):
    return families.document_logits(model, torch.tensor(ids), lora=low)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_on_the_modules_computes_the_same(folder, tmp_path, kind):
    import peft

    model = hf.load(folder, dtype=torch.float64)
    start = policy.adapt(model, AdapterSpec(rank=4, alpha=8.0, **KINDS[kind]), base=adapter.Base(str(folder), ""), seed=0)
    assert torch.equal(logits(*policy.current(start)), logits(model, None))
    params = moved(start)
    current, low = policy.current(start, params)
    expected = logits(current, low)
    policy.save(start, tmp_path / "a", params=params)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(plain_model.load(folder), tmp_path / "a").double()
        theirs = wrapped(torch.tensor([IDS])).logits[0]
    assert (expected - logits(model, None)).abs().max() > 0.01
    close(theirs, expected)
    again, _, _ = adapter.load(tmp_path / "a", model)
    merged = model._replace(params=lora.merge(model.params, again.tree, again.scale))
    close(logits(merged, None), expected, 2e-5)
    drawn = decode.sample(model, [IDS[:5]], n=2, lora=low, max_new_tokens=4, seed=1)
    assert torch.equal(drawn.tokens, decode.sample(merged, [IDS[:5]], n=2, max_new_tokens=4, seed=1).tokens)


def test_remade_layers_and_quantised_bases_have_the_same_gradients(folder):
    model = hf.load(folder, scheme=Scheme("nf4"))
    start = policy.adapt(model, AdapterSpec(rank=4, dora=True, dropout=0.2), base=adapter.Base(str(folder), ""), seed=0)
    ids = torch.tensor(IDS)
    batch = dense.single(ids) | {"at": torch.arange(len(ids) - 1), "targets": ids[1:], "seq": torch.zeros(len(ids) - 1, dtype=torch.int64)}
    batch |= {"seed": torch.tensor(7)}
    grads = []
    for remat in (None, "full"):
        params = tree.map(lambda leaf: leaf.clone().requires_grad_(), moved(start))
        policy.logprob(start, remat=remat)(params, start.frozen, batch, None).logp.sum().backward()
        grads.append([leaf.grad for leaf in tree.leaves(params)])
    assert all(map(torch.equal, *grads)) and all(grad.abs().max() > 0 for grad in grads[0])
