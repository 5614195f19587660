"""Adapters in PEFT's format: the same function in PEFT as in ours, and nothing loaded by halves."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from treetune.core import lora, manifest, tree
from treetune.models import adapter, dense, hf

RANK, ALPHA = 4, 12.0
CASES = {
    "all-linear": dict(targets="all-linear"),
    "rslora, one layer": dict(targets=["q_proj", "down_proj"], layers=[1], rslora=True),
    "embedding": dict(targets=["embed_tokens"]),
    "head": dict(targets=["lm_head"]),
    "both ends": dict(targets=["embed_tokens", "lm_head"]),
    "norms whole": dict(targets=["k_proj"], whole=r"norm$"),
    "embedding whole": dict(targets=["gate_proj"], whole="embed_tokens"),
    "head whole": dict(targets=["v_proj", "embed_tokens"], whole="lm_head"),
    "both ends whole": dict(targets=["o_proj"], whole="embed_tokens|lm_head"),
    "embedding whole, head adapted": dict(targets=["o_proj", "lm_head"], whole="embed_tokens"),
    "projection whole with its bias": dict(targets=["o_proj"], whole=r"layers\.1\.q_(proj|bias)"),
}


def shifted(leaves, seed):
    """The same tree with every leaf moved by noise: as if trained."""
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator), leaves)


def trained(ours, targets, layers=None, whole=None, rslora=False):
    """An adapter tree, its scale, and whole leaves for a model, all away from their start."""
    abstract = hf.abstract_of(ours, head=True)
    paths = lora.match(abstract, targets, layers=layers)
    leaves = ours.params | ({"lm_head": ours.params["embed_tokens"].clone()} if "lm_head" not in ours.params else {})
    replaced = shifted(tree.select(leaves, whole), 2) if whole else {}
    return shifted(lora.init(abstract, paths, rank=RANK, seed=0), 1), lora.scale(rank=RANK, alpha=ALPHA, rslora=rslora), replaced


def logits(ours, ids, tree_, scale, whole):
    return dense.probe(tree.merge(ours.params, whole), ids, ours.cfg, lora=lora.Lora(tree_, scale))


def in_peft(model, path, ids):
    import peft

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), path)
    # PEFT warns of every adapter beside a tie; of keys it must not.
    assert not [entry.message for entry in caught if "keys" in str(entry.message)]
    with torch.no_grad():
        return wrapped(ids[None]).logits[0]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_logits(oracle, documents, tmp_path, case, tied):
    options = dict(CASES[case])
    model, folder = oracle("qwen2", tied)
    ours, ids = hf.load(folder), torch.tensor(documents[1])
    tree_, scale, whole = trained(ours, **options)
    adapter.save(
        tmp_path / "adapter", tree_, family=ours.family, whole=whole, tied=tied,
        info=adapter.Info(RANK, ALPHA, options.get("rslora", False), 0.1, str(folder)),
    )  # fmt: skip
    expected = logits(ours, ids, tree_, scale, whole)
    assert (expected - dense.probe(ours.params, ids, ours.cfg)).abs().max() > 0.1
    torch.testing.assert_close(in_peft(model, tmp_path / "adapter", ids), expected, atol=1e-5, rtol=1e-5)
    loaded, again, info = adapter.load(tmp_path / "adapter", ours)
    assert torch.equal(logits(ours, ids, loaded.tree, loaded.scale, again), expected)
    assert {path for path, _ in tree.items(again)} == {path for path, _ in tree.items(whole)}
    assert info == adapter.Info(RANK, ALPHA, options.get("rslora", False), 0.1, str(folder), info.paths)
    assert set(info.paths) == set(lora.pairs(tree_)) and loaded.dropout == 0.0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "smollm3", "granite", "olmo2", "gemma", "gemma2", "gemma3", "phi3"])
def test_every_family_has_peft_names(oracle, documents, tmp_path, kind):
    model, folder = oracle(kind)
    ours, ids = hf.load(folder), torch.tensor(documents[1])
    tree_, scale, whole = trained(ours, "all-linear", whole="norm")
    adapter.save(tmp_path, tree_, family=ours.family, info=adapter.Info(RANK, ALPHA, base="x"), whole=whole)
    got = in_peft(model, tmp_path, ids)
    torch.testing.assert_close(got, logits(ours, ids, tree_, scale, whole), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets,whole", [(["q_proj"], None), (["embed_tokens", "lm_head"], None), (["q_proj"], ["lm_head"])])
def test_adapters_written_by_peft_are_read(oracle, documents, tmp_path, targets, whole, tied):
    import peft

    model, folder = oracle("llama", tied)
    ours, ids = hf.load(folder), torch.tensor(documents[1])
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, modules_to_save=whole, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = wrapped(ids[None]).logits[0]
    loaded, again, _ = adapter.load(tmp_path, ours)
    torch.testing.assert_close(logits(ours, ids, loaded.tree, loaded.scale, again), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def saved(oracle, tmp_path):
    """(folder of an adapter with a whole norm, its model, edit(tensors, config) that rewrites the folder)."""
    ours = hf.load(oracle("llama")[1])
    tree_, _, whole = trained(ours, ["q_proj", "up_proj"], whole="^norm$")
    adapter.save(tmp_path, tree_, family="llama", info=adapter.Info(RANK, ALPHA, base="x"), whole=whole)
    (tmp_path / manifest.NAME).unlink()

    def edit(tensors=None, config=None):
        leaves = load_file(tmp_path / adapter.WEIGHTS) | (tensors or {})
        save_file({key: leaf for key, leaf in leaves.items() if leaf is not None}, tmp_path / adapter.WEIGHTS)
        fields = json.loads((tmp_path / adapter.CONFIG).read_text()) | (config or {})
        (tmp_path / adapter.CONFIG).write_text(json.dumps(fields))

    return tmp_path, ours, edit


Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "tensors,config,message",
    [
        ({f"{Q}.lora_B.weight": None}, {}, "layers.1.q_proj.A but not layers.1.q_proj.B"),
        ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, {}, "names model.layers.1.self_attn.q_proj"),
        ({"base_model.model.model.norm.weight": None}, {}, "names model.norm"),
        ({"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, {}, "cannot use.*layers.7"),
        ({f"{Q}.lora_magnitude_vector": torch.zeros(32)}, {}, "does not say use_dora"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 31)}, {}, r"A \[4, 31\]"),
        ({f"{Q}.lora_A.weight": torch.zeros(2, 32), f"{Q}.lora_B.weight": torch.zeros(32, 2)}, {}, "rank 4"),
        ({"base_model.model.model.norm.weight": torch.zeros(31)}, {}, r"norm in the adapter file has shape \[31\]"),
        ({f"{Q}.base_layer.weight": torch.zeros(32, 32)}, {}, "base weight"),
        ({}, {"use_dora": True}, "says use_dora, and the adapter file has no lora_magnitude_vector"),
        ({f"{Q}.lora_bias": torch.zeros(32)}, {}, "cannot use"),
        ({}, {"peft_type": "LOHA"}, "peft_type"),
        ({}, {"rank_pattern": {"q_proj": 2}}, "rank 2 ask for"),
        ({}, {"bias": "some"}, "bias must be one of"),
        ({}, {"target_modules": ["q_proj", "up_proj", "k_proj"]}, "names model.layers.0.self_attn.k_proj"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(saved, tensors, config, message):
    path, ours, edit = saved
    edit(tensors, config)
    with pytest.raises(ValueError, match=message):
        adapter.load(path, ours)


def test_folders_without_an_adapter_are_refused(saved, tmp_path):
    path, ours, _ = saved
    (path / adapter.WEIGHTS).unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors does not exist"):
        adapter.load(path, ours)
    with pytest.raises(ValueError, match="adapter_config.json does not exist"):
        adapter.load(tmp_path / "nowhere", ours)


def test_what_peft_cannot_hold_is_refused_before_training():
    for adapted, whole, message in (
        ([], ["norm"], "at least one adapted leaf"),
        (["layers.0.q_proj"], ["layers.0.q_proj", "layers.0.q_bias"], "choose one"),
        (["layers.0.k_proj"], ["layers.0.q_bias"], "without layers.0.q_proj"),
        (["layers.0.k_proj"], ["layers.0.k_bias"], "layers.0.k_bias is trained whole and layers.0.k_proj"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.check("qwen2", adapted, whole)
    adapter.check("qwen2", ["layers.0.k_proj", "lm_head"], ["layers.0.q_proj", "layers.0.q_bias", "embed_tokens"])


def test_a_rank_that_is_not_the_configs_keeps_its_scale(oracle, tmp_path):
    ours = hf.load(oracle("llama")[1])
    tree_, scale, _ = trained(ours, ["q_proj"])
    adapter.save(tmp_path / "adapter", tree_, family="llama", info=adapter.Info(8, 2 * ALPHA, base="x"))
    config = json.loads((tmp_path / "adapter" / adapter.CONFIG).read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (8, {"q_proj": RANK}, {"q_proj": ALPHA})
    again, _, _ = adapter.load(tmp_path / "adapter", ours)
    assert again.scale == scale and all(map(torch.equal, tree.leaves(again.tree), tree.leaves(tree_)))


def test_loaded_leaves_take_the_dtype_that_is_asked_for(saved):
    path, ours, _ = saved
    low = ours._replace(params=tree.map(lambda leaf: leaf.bfloat16(), ours.params))
    loaded, whole, _ = adapter.load(path, low, dtype=torch.float16)
    assert {leaf.dtype for leaf in tree.leaves(loaded.tree)} == {torch.float16}
    assert whole["norm"].dtype == torch.bfloat16
