"""A policy in Python: what trains starts as the model, is sampled and saved as what it computes, and nothing keeps the loaded weights."""

import copy
import gc
import weakref

import pytest
import torch

from treetune.core import lora, manifest, tree
from treetune.core.run.errors import RunFailed
from treetune.core.state import TrainState
from treetune.models import adapter, decode, heads, hf, loading, logprobs, policy, reference, sampling, tokenizer

SPEC = policy.AdapterSpec(rank=3, alpha=6.0, dropout=0.25, targets=("q_proj", "down_proj"), modules_to_save=("^norm$",))


@pytest.fixture(params=["tied", "untied"])
def folder(request, oracle, words, tmp_path):
    """A model folder with a tokenizer."""
    path = tmp_path / "model"
    hf.save(path, hf.load(oracle("llama", request.param == "tied")[1]), tokenizer=words)
    return path


def moved(params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: leaf + 0.2 * torch.randn(leaf.shape, generator=generator), params)


def state(one, params=None):
    return TrainState(one.params if params is None else params, one.frozen, {}, {}, torch.tensor(3))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("spec", [None, SPEC], ids=["full", "adapter"])
def test_it_starts_as_the_model(folder, stream, documents, spec):
    one, model, batch = policy.load(folder, adapter=spec, seed=1), hf.load(folder), stream(documents)
    want = logprobs(model.family, model.cfg, model.params, batch).logp
    torch.testing.assert_close(policy.logprob(one)(one.params, one.frozen, batch, None).logp, want, atol=1e-6, rtol=0)
    assert one.tokenizer.eos_token == "<|end|>" and one.cfg.dtype == torch.float32
    assert set(one.params) == ({"model"} if spec is None else {"lora", "model"}) and set(one.frozen) == (
        set() if spec is None else {"model"}
    )
    if spec is not None:
        assert one.lora == lora.Lora({}, 2.0, 0.25) and one.adapter.base == str(folder) and one.adapter.digest
        assert [path for path, _ in tree.items(one.params["model"])] == ["norm"]


def test_dropout_and_noise_are_drawn_from_the_seed_of_the_step(folder, stream, documents):
    one, batch = policy.load(folder, adapter=SPEC, seed=1), stream(documents)
    params = moved(one.params)
    quiet = policy.logprob(one)(params, one.frozen, batch, None).logp
    seeded = batch | {"seed": torch.tensor(4)}
    dropped, again = (policy.logprob(one)(params, one.frozen, seeded, None).logp for _ in range(2))
    noisy = policy.logprob(one, neftune=5.0)(params, one.frozen, seeded, None).logp
    assert torch.equal(dropped, again)
    assert (dropped - quiet).abs().max() > 1e-3 and (noisy - dropped).abs().max() > 1e-3
    assert torch.equal(policy.logprob(one, neftune=5.0)(params, one.frozen, batch, None).logp, quiet)


def test_a_seed_is_asked_for_where_there_is_dropout(folder, stream, documents):
    one = policy.load(folder, adapter=SPEC)
    used = one.lora._replace(tree=one.params["lora"])
    with pytest.raises(ValueError, match="dropout 0.25 and no seed"):
        logprobs(one.family, one.cfg, one.frozen["model"], stream(documents), lora=used)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("spec", [None, SPEC], ids=["full", "adapter"])
def test_what_is_saved_computes_what_was_trained(folder, stream, documents, tmp_path, spec):
    one, batch = policy.load(folder, adapter=spec, seed=1), stream(documents)
    params = moved(one.params)
    want = policy.logprob(one)(params, one.frozen, batch, None).logp
    policy.save(one, tmp_path / "out", params=params)
    model, used = (
        (hf.load(tmp_path / "out"), None)
        if spec is None
        else loading.load_adapted(str(folder), str(tmp_path / "out"), device=torch.device("cpu"))
    )
    torch.testing.assert_close(logprobs(model.family, model.cfg, model.params, batch, lora=used).logp, want, atol=1e-5, rtol=0)
    if spec is not None:
        again = policy.load(folder, adapter=policy.AdapterSpec(start=str(tmp_path / "out")))
        torch.testing.assert_close(policy.logprob(again)(again.params, again.frozen, batch, None).logp, want, atol=1e-5, rtol=0)
        assert again.adapter == one.adapter


def test_the_sampler_has_the_weights_of_the_state(folder, stream, documents):
    one = policy.load(folder, adapter=SPEC, seed=1)
    params = moved(one.params)
    sample = sampling.sampler(one, temperature=0.8, stop=(5,), seed=9)
    drawn = sample(state(one, params), [documents[0], documents[2]], [4, 7], n=2, max_tokens=5)
    model, used = policy.current(one, params)
    assert used.dropout == 0.0
    prompts = [documents[0], documents[2]]
    want = decode.sample(model, prompts, n=2, lora=used, max_new_tokens=5, temperature=0.8, stop=(5,), seed=9, ids=[4, 7])
    assert torch.equal(drawn.tokens, want.tokens) and torch.equal(drawn.logp, want.logp)
    assert not torch.equal(drawn.logp, sample(state(one), prompts, [4, 7], n=2, max_tokens=5).logp)


def test_functions_of_a_run_keep_no_weights(folder):
    one = policy.load(folder, adapter=SPEC)
    leaf = weakref.ref(one.params["lora"]["layers"][0]["q_proj"]["A"])
    base = weakref.ref(one.frozen["model"]["norm"])
    kept = [policy.logprob(one), policy.scores(one), sampling.sampler(one, seed=0), policy.bare(one), reference.build(one).logp]
    del one
    gc.collect()
    assert kept and leaf() is None and base() is None


def test_a_head_is_scored_and_saved(folder, stream, documents, tmp_path):
    one, batch = policy.load(folder, adapter=SPEC._replace(dropout=0.0), seed=1), stream(documents)
    one = one._replace(params=moved(one.params) | {"head": heads.init(one.cfg, 1, bias=False, seed=2)})
    want = policy.scores(one)(one.params, one.frozen, batch, None)
    assert want.shape == (len(batch["at"]), 1)
    policy.save(one, tmp_path / "out")
    base = hf.load(folder)
    used, whole, head, _ = heads.load_adapter(tmp_path / "out", base)
    got = heads.scores(base.family, base.cfg, tree.merge(base.params, whole), head, batch, lora=used)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path):
    one = policy.load(folder)
    params = {"model": one.params["model"] | {"norm": one.params["model"]["norm"] * torch.inf}}
    with pytest.raises(RunFailed, match="norm is not finite in float32"):
        policy.save(one, tmp_path / "out", params=params)
    assert not (tmp_path / "out").exists()


BAD = {
    "targets": (dict(targets=("nope",)), "lora_target_modules: .*nope"),
    "layers": (dict(layers=(9,)), "lora_layers: layers .9. do not exist"),
    "whole": (dict(modules_to_save=("nope",)), "lora_modules_to_save: .*nope"),
    "both": (dict(modules_to_save=("q_proj",)), "is trained whole and .* has an adapter"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", BAD)
def test_an_adapter_that_does_not_fit_is_refused(folder, case):
    fields, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        policy.load(folder, adapter=policy.AdapterSpec(**fields))


def test_an_adapter_is_trained_on_on_its_own_base_only(folder, oracle, words, tmp_path):
    policy.save(policy.load(folder, adapter=SPEC), tmp_path / "out")
    other = hf.load(folder)
    hf.save(tmp_path / "other", other._replace(params=other.params | {"norm": other.params["norm"] * 2}), tokenizer=words)
    with pytest.raises(ValueError, match="was trained on"):
        policy.load(tmp_path / "other", adapter=policy.AdapterSpec(start=str(tmp_path / "out")))


def test_carried_files_of_an_adapter(folder, words, tmp_path):
    one = policy.load(folder, adapter=SPEC)
    for name, carried in (("none", None), ("base", adapter.Carried(words, own=False)), ("own", adapter.Carried(words))):
        policy.save(one, tmp_path / name, carried=carried)
    assert not (tmp_path / "none" / adapter.TOKENIZER).exists()
    for name in ("base", "own"):
        assert tokenizer.load_tokenizer(folder, adapter_path=tmp_path / name).get_vocab() == words.get_vocab()
        assert tokenizer.has_own_words(tmp_path / name) == (name == "own")


@pytest.mark.parametrize("own", [False, True])
def test_the_tokenizer_of_the_base_asks_for_no_rows(folder, words, tmp_path, own):
    """Of a base model with fewer rows than its tokenizer has tokens, which is its own business."""
    longer = copy.deepcopy(words)
    longer.add_tokens([f"<more {index}>" for index in range(20 + hf.load(folder).cfg.vocab_size)])
    longer.save_pretrained(folder)
    (folder / manifest.NAME).unlink()
    one, path = policy.load(str(folder), adapter=SPEC), tmp_path / "out"
    policy.save(one, path, carried=adapter.Carried(one.tokenizer, own=own))
    model, _ = loading.load_adapted(str(folder), str(path), device=torch.device("cpu"))
    again = policy.load(str(folder), adapter=policy.AdapterSpec(start=str(path)))
    rows = len(longer) if own else one.cfg.vocab_size
    assert model.cfg.vocab_size == again.cfg.vocab_size == rows
