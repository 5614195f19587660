"""DoRA, PiSSA and ranks of their own on bridged models: what PEFT computes on transformers' own modules, remade and sampled alike."""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch

from treetune.core import lora, manifest, tree
from treetune.core.quant import Scheme
from treetune.core.run import faults
from treetune.core.state import TrainState
from treetune.losses import reward_objective
from treetune.models import Model, adapter, decode, dense, families, heads, hf, plain_model, policy, reward_model
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


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["roberta-prelayernorm", "gpt_neox", "phi"])
def test_what_scores_needs_no_bias_of_the_language_head(kind, tmp_path):
    """Models that hold this bias beside the matrix, that have none but end in a norm with a bias, and that hold it in the matrix."""
    with plain_model.without_bars():
        architectures.build(kind).save_pretrained(tmp_path / "base")
    base = policy.full(hf.load(tmp_path / "base"))
    headed = reward_model.with_head(base, classes=1, device=torch.device("cpu"))
    batch = dense.single(torch.tensor(IDS * 2)) | {"cu_docs": torch.tensor([0, len(IDS), 2 * len(IDS)]), "at": torch.tensor([7, 24])}
    batch |= {"positions": torch.arange(len(IDS)).repeat(2), "row": torch.tensor([0, 0]), "seq_lens": torch.tensor([1, 1])}
    objective = reward_objective.ranked(policy.scores(headed))
    state = TrainState(headed.params, headed.frozen, {}, {}, torch.tensor(0))
    assert "lm_head_bias" not in headed.params["model"]
    assert faults.dead_leaves(objective, state, [(batch, None)]) == []
    model = Model(headed.family, headed.cfg, headed.params["model"])
    heads.save(tmp_path / "scored", model, headed.params["head"])
    again, head = heads.load(tmp_path / "scored")
    assert set(dict(tree.items(again.params))) == set(dict(tree.items(model.params)))
    assert torch.equal(heads.scores(again.family, again.cfg, again.params, head, batch), policy.scores(headed)(*state[:2], batch, None))


class Ids:
    """The special ids of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 9


@pytest.mark.parametrize("kind,pad", [("roberta", 0), ("gpt_neox", 9)])
def test_a_tokenizer_with_another_padding_moves_no_positions(kind, pad, tmp_path):
    """RoBERTa's positions begin behind the id of padding in config.json."""
    with plain_model.without_bars():
        architectures.build(kind).save_pretrained(tmp_path / "model")
    model = hf.load(tmp_path / "model")
    config = hf.files_of(model, Ids())[1]
    assert (config["pad_token_id"], config["eos_token_id"]) == (pad, 2)
    hf.save(tmp_path / "saved", model)
    (tmp_path / "saved" / manifest.NAME).unlink()
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    assert torch.equal(logits(hf.load(tmp_path / "saved"), None), logits(model, None))
