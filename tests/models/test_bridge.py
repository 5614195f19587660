"""Models of transformers that no native family computes: against transformers itself, and against themselves."""

import threading

import pytest
import torch

from treetune.core import grad, lora, tree
from treetune.core.lora import Lora
from treetune.models import MODELS, certificate, certificate_checks, decoder_attention, heads, hf, logprobs, plain_model
from treetune.models import adapter as adapters
from treetune.models.dense import Neftune

# Windows on some layers; latent attention with narrow values, and experts; sinks; a soft-cap of the logits; a bias of the head;
# parallel blocks with fused projections; ALiBi and recurrent layers, whose documents go through one at a time.
# The last has layers behind its base model.
WORKING = ("cohere2", "deepseek_v3", "granite_swa", "nanochat", "phi", "gpt_neox", "bloom", "qwen3_next", "modernbert-decoder")
SLOW = (
    "starcoder2", "glm4", "exaone4", "stablelm", "nemotron", "ernie4_5", "olmoe", "bitnet", "gemma4_text", "mimo_v2_flash", "minicpm3",
    "qwen2_moe", "glm4_moe", "helium", "seed_oss", "apertus", "lfm2", "falcon_h1", "nemotron_h", "zamba2", "llama4_text", "qwen3_5_text",
)  # fmt: skip
ALONE = {"bloom", "qwen3_next", "lfm2", "falcon_h1", "nemotron_h", "zamba2", "llama4_text", "qwen3_5_text"}
DOCUMENTS = ([5, 9, 120, 33, 7, 64, 8], [11, 3, 199, 42, 17, 17, 90, 31, 5, 77, 140, 2, 66], [150, 44, 13, 101, 23])


def check(path, kind):
    certified = certificate.certify(path, DOCUMENTS)
    assert [(row.name, row.measure, row.note) for row in certificate.differences(certified)] == []
    assert certified.outcome == (certificate.ALONE if kind in ALONE else certificate.BRIDGED)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", WORKING)
def test_it_equals_transformers_and_itself(folder, kind):
    check(folder(kind), kind)


@pytest.mark.parametrize("kind", ["deepseek_v3", "ernie4_5_moe"])
def test_tokens_of_other_documents_at_an_expert_change_no_bit(folder, kind):
    model = hf.load(folder(kind))
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        documents = tuple(torch.randint(20, 200, (size,), generator=generator).tolist() for size in (5, 3, 4))
        subject = certificate_checks.Subject(model, None, documents)
        assert [measure.value for measure in certificate_checks.isolate_documents(subject)] == [0.0], seed


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_more_of_them_do(folder, kind):
    check(folder(kind), kind)


def adapter(model, *, dropout=0.0):
    sizes = hf.abstract_of(model, head=True)
    paths = [*lora.match(sizes, "all-linear"), "embed_tokens", "lm_head"]
    pairs = lora.init(sizes, paths, rank=2, seed=0)
    generator = torch.Generator().manual_seed(1)
    moved = tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), pairs)
    return Lora(moved, 0.7, dropout, torch.tensor(5))


def losses(model, batch, low, remat=None):
    """The loss and its gradient in weights and adapter, with noise on the embeddings."""

    def loss(params, stream):
        used = low._replace(tree=params["lora"])
        options = {"lora": used, "remat": remat, "noise": Neftune(5.0, torch.tensor(3))}
        return logprobs(model.family, model.cfg, params["model"], stream, **options).logp.sum(), None

    return grad.value_and_grad(loss)({"model": model.params, "lora": low.tree}, batch)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["deepseek_v3", "gemma4_text", "qwen3_next"])
def test_rematerialised_gradients_are_those_of_a_kept_pass_bit_for_bit(folder, kind):
    """gemma4_text hands keys and values from layer to layer: what a layer reads must be there again."""
    model = hf.load(folder(kind))
    batch = certificate_checks.grow(DOCUMENTS[0], DOCUMENTS[1:]) | {"row": torch.zeros(2, dtype=torch.int64)}
    low = adapter(model, dropout=0.25)
    ((kept, _), one), ((again, _), other) = losses(model, batch, low), losses(model, batch, low, "full")
    assert torch.equal(kept, again)
    for (path, a), (_, b) in zip(tree.items(one), tree.items(other), strict=True):
        assert torch.equal(a, b), path
    assert all(leaf.any() for path, leaf in tree.items(one["lora"]))


@pytest.mark.parametrize("kind", ["cohere2", "qwen3_next"])
def test_dropout_and_noise_do_not_depend_on_packing(folder, kind):
    model = hf.load(folder(kind))
    low = adapter(model, dropout=0.25)
    packed = certificate_checks.pack(DOCUMENTS)
    (together, _), _ = losses(model, packed, low)
    apart = [losses(model, certificate_checks.pack([ids]) | {"row": torch.tensor([row])}, low)[0][0] for row, ids in enumerate(DOCUMENTS)]
    torch.testing.assert_close(sum(apart), together, atol=1e-4, rtol=0)
    (without, _), _ = losses(model, packed, low._replace(dropout=0.0))
    assert (without - together).abs() > 0.01


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["starcoder2", "deepseek_v3", "phi", "qwen3_next"])
def test_saved_folders_load_in_transformers(folder, tmp_path, kind):
    model = hf.load(folder(kind))
    moved = model._replace(params=tree.map(lambda leaf: leaf * 1.01, model.params))
    hf.save(tmp_path / "saved", moved)
    again = hf.load(tmp_path / "saved")
    for (path, a), (_, b) in zip(tree.items(moved.params), tree.items(again.params), strict=True):
        assert torch.equal(a, b), path
    assert again.cfg == moved.cfg
    ids = DOCUMENTS[1]
    with torch.no_grad():
        theirs = plain_model.logits(plain_model.load(tmp_path / "saved"), ids)
        ours = certificate_checks.logits(again, certificate_checks.pack([ids]))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    with torch.no_grad():
        assert (theirs - plain_model.logits(plain_model.load(folder(kind)), ids)).abs().max() > 1e-3


def test_features_are_the_residual_stream(folder):
    model = hf.load(folder("starcoder2"))
    plain = plain_model.load(folder("starcoder2"))
    batch = certificate_checks.pack(DOCUMENTS)
    plan = decoder_attention.plan(batch, model.cfg)
    cut = model.params | {"layers": model.params["layers"][:2]}
    out = MODELS["starcoder2"].forward(cut, batch, plan, model.cfg, collect=[0, 1])
    for depth in (0, 1):
        theirs = [plain(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[depth][0] for ids in DOCUMENTS]
        torch.testing.assert_close(out.features[depth], torch.cat(theirs), atol=1e-5, rtol=0)


def test_threads_do_not_disturb_each_other(folder):
    """Sampling and training run at once, with other weights of one model."""
    model = hf.load(folder("phi"))
    other = model._replace(params=tree.map(lambda leaf: leaf * 0.5, model.params))
    batch, results = certificate_checks.pack(DOCUMENTS), {}

    def work(name, which):
        results[name] = [certificate_checks.hidden(which, batch) for _ in range(20)]

    threads = [threading.Thread(target=work, args=pair) for pair in (("one", model), ("other", other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, which in (("one", model), ("other", other)):
        expected = certificate_checks.hidden(which, batch)
        assert all(torch.equal(hidden, expected) for hidden in results[name])
    assert not torch.equal(results["one"][0], results["other"][0])


@pytest.mark.parametrize("kind", ["deepseek_v3", "phi"])
def test_a_reward_model_is_saved_and_read(folder, tmp_path, kind):
    """Experts are split in its files, and a bias of the language head goes with it."""
    model = hf.load(folder(kind))
    head = heads.init(model.cfg, 1, bias=False, seed=3)
    batch = certificate_checks.pack(DOCUMENTS)
    scores = heads.scores(kind, model.cfg, model.params, head, batch)
    heads.save(tmp_path / "reward", model, head)
    again, other = heads.load(tmp_path / "reward")
    assert torch.equal(heads.scores(kind, again.cfg, again.params, other, batch), scores)
    assert not [path for path, _ in tree.items(again.params) if path.startswith("lm_head")]


# What PEFT would read as experts, weights that layers share, and projections of recurrent layers take no adapter.
WITHOUT = {"phi": "none", "deepseek_v3": "gate_proj", "zamba2": "q_proj", "nemotron_h": "out_proj"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", WITHOUT)
def test_adapters_compute_the_same_in_peft(folder, tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = hf.load(folder(kind))
    paths = lora.match(hf.abstract_of(model), "all-linear")
    assert paths and not [path for path in paths if path.endswith(WITHOUT[kind])]
    pairs, generator = lora.init(hf.abstract_of(model), paths, rank=2, seed=0), torch.Generator().manual_seed(1)
    low = Lora(tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), pairs), 2.0)
    info = adapters.Info(2, 4.0, base=str(folder(kind)), paths=paths)
    adapters.save(tmp_path / "adapter", low.tree, family=model.family, info=info, tied=model.cfg.tied)
    theirs = peft.PeftModel.from_pretrained(plain_model.load(folder(kind)), tmp_path / "adapter").eval()
    with torch.no_grad():
        ours = certificate_checks.logits(model, certificate_checks.pack([DOCUMENTS[1]]), low)
        torch.testing.assert_close(ours, plain_model.logits(theirs, DOCUMENTS[1]), atol=1e-4, rtol=0)
        assert (ours - certificate_checks.logits(model, certificate_checks.pack([DOCUMENTS[1]]))).abs().max() > 0.1
