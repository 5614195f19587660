"""Adapters that PEFT itself makes: each computes what PEFT's own reload of it computes, or is refused by name. Never a third outcome."""

import copy
import json
import shutil
import warnings

import pytest
import torch

from treetune.core import tree
from treetune.models import adapter, dense, hf

RANK, ALPHA = 4, 12
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERY = {"llama tied": ("llama", True), "qwen2": ("qwen2", False), "llama": ("llama", False), "qwen2 tied": ("qwen2", True)}


def each(names, *, both=False):
    """(name, case): in the working set with one of the first two cases in turn, or with both; the others are slow."""
    cases = [(name, case, j < 2 if both else i % 2 == j) for i, name in enumerate(names) for j, case in enumerate(EVERY)]
    return [pytest.param(name, EVERY[case], id=f"{name}-{case}", marks=[pytest.mark.slow] * (not fast)) for name, case, fast in cases]


# name -> (options of LoraConfig, what the refusal names on every model, or None where the adapter is read)
PLAIN = {
    "defaults": (dict(), None),
    "one target": (dict(target_modules=["q_proj"]), None),
    "all targets": (dict(target_modules=ALL), None),
    "all-linear": (dict(target_modules="all-linear"), None),
    "regex": (dict(target_modules=r".*layers\.1\..*(q|down)_proj"), None),
    "full names": (dict(target_modules=["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]), None),
    "targets of other models": (dict(target_modules=["q_proj", "query_key_value", "c_attn"]), None),
    "exclude by name": (dict(target_modules=ALL, exclude_modules=["k_proj"]), None),
    "exclude by full name": (dict(target_modules=ALL, exclude_modules=["model.layers.1.mlp.up_proj"]), None),
    "exclude by regex": (dict(target_modules=ALL, exclude_modules=r".*layers\.0\..*"), None),
    "one layer": (dict(target_modules=ALL, layers_to_transform=1), None),
    "layers": (dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[0]), None),
    "layers by pattern": (dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"), None),
    "layers by patterns": (dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"]), None),
    "a full name beside layers": (
        dict(target_modules=["v_proj", "model.layers.0.self_attn.q_proj"], layers_to_transform=[1]), None,
    ),
    "rslora": (dict(target_modules=ALL, use_rslora=True), None),
    "ranks": (dict(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}), None),
    "ranks and rslora": (dict(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, use_rslora=True), None),
    "alphas": (dict(target_modules=["q_proj", "up_proj"], alpha_pattern={"up_proj": 3}), None),
    "patterns by regex": (
        dict(target_modules=ALL, rank_pattern={r"layers\.0\..*": 3, "q_proj": 1}, alpha_pattern={r"^model\.layers\.1\.mlp\..*": 5}), None,
    ),
    "dropout": (dict(target_modules=["q_proj"], lora_dropout=0.5), None),
    "gaussian": (dict(target_modules=["q_proj"], init_lora_weights="gaussian"), None),
    "orthogonal": (dict(target_modules=["q_proj"], init_lora_weights="orthogonal"), None),
    "eva": (dict(target_modules=["q_proj"], init_lora_weights="eva"), None),
    "no start": (dict(target_modules=["q_proj"], init_lora_weights=False), None),
    "fan in fan out": (dict(target_modules=["q_proj"], fan_in_fan_out=True), None),
    "no task": (dict(target_modules=["q_proj"], task_type=None), None),
    "norms whole": (dict(target_modules=["q_proj"], modules_to_save=["norm"]), None),
    "one norm whole": (dict(target_modules=["q_proj"], modules_to_save=["model.norm"]), None),
    "mlp whole": (dict(target_modules=["q_proj"], modules_to_save=["layers.0.mlp"]), None),
    "projection whole": (dict(target_modules=["o_proj"], modules_to_save=["q_proj"]), None),
    "target under a whole module": (dict(target_modules=ALL, modules_to_save=["layers.1.mlp"]), None),
    "head": (dict(target_modules=["lm_head"]), None),
    "embedding": (dict(target_modules=["embed_tokens"]), None),
    "both ends": (dict(target_modules=["embed_tokens", "lm_head", "q_proj"]), None),
    "embedding whole": (dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), None),
    "head whole": (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), None),
    "both ends whole": (dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]), None),
    "embedding whole, head adapted": (dict(target_modules=["lm_head"], modules_to_save=["embed_tokens"]), None),
    "head whole, embedding adapted": (dict(target_modules=["embed_tokens"], modules_to_save=["lm_head"]), None),
    "pissa": (dict(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights"),
    "fast pissa": (dict(target_modules=["q_proj"], init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "olora": (dict(target_modules=["q_proj"], init_lora_weights="olora"), "init_lora_weights"),
    "mica": (dict(target_modules=["q_proj"], init_lora_weights="mica"), "init_lora_weights"),
    "dora": (dict(target_modules=["q_proj"], use_dora=True), None),
    "dora, ranks and rslora": (dict(target_modules=ALL, use_dora=True, rank_pattern={"q_proj": 2}, use_rslora=True), None),
    "lora bias": (dict(target_modules=["q_proj"], lora_bias=True), "lora_bias"),
    "tokens": (dict(target_modules=["q_proj"], trainable_token_indices=[1, 5]), "trainable_token_indices"),
    "tokens by name": (dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [2]}), "trainable_token_indices"),
    "activated": (dict(target_modules=["q_proj"], alora_invocation_tokens=[3, 4]), "alora_invocation_tokens"),
    "replicated layers": (dict(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
    "parameters": (dict(target_modules=["q_proj"], target_parameters=["mlp.gate_proj.weight"]), "target_parameters"),
}  # fmt: skip
# What depends on the model: (options, refusal on models with biases or None, refusal on tied models or None)
OTHERS = {
    "bias all": (dict(target_modules=["q_proj"], bias="all"), None, None),
    "bias of the adapted": (dict(target_modules=["q_proj"], bias="lora_only"), None, None),
    "tied whole": (
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        None,
        "ensure_weight_tying",
    ),
    "tied adapters": (dict(target_modules=["embed_tokens"], ensure_weight_tying=True), None, "ensure_weight_tying"),
    "tying without ends": (dict(target_modules=["q_proj"], ensure_weight_tying=True), None, None),
}


def make(model, path, options, *, resized: int | None = None) -> None:
    """An adapter folder that PEFT writes, every trained number away from its start."""
    import peft

    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"} | options)
    base = copy.deepcopy(model)
    if resized is not None:
        base.resize_token_embeddings(resized, mean_resizing=False)
    wrapped = peft.get_peft_model(base, config)
    shift(wrapped)
    wrapped.save_pretrained(path)


def shift(wrapped) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for leaf in [leaf for leaf in wrapped.parameters() if leaf.requires_grad]:
            leaf.add_(torch.randn(leaf.shape, generator=generator) * 0.1)


def reloaded(model, path, ids):
    import peft

    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model).double(), path).eval().double()
    with torch.no_grad():
        return wrapped(ids[None]).logits[0]


def ours(folder, path, ids):
    model = hf.load(folder, dtype=torch.float64)
    low, whole, _ = adapter.load(path, model, dtype=torch.float64)
    return dense.probe(tree.merge(model.params, whole), ids, model.cfg, lora=low)


def assert_equal(one, other):
    """To 1e-5 of the largest logit, in float64; rotary angles are float32 on both sides."""
    torch.testing.assert_close(one.double(), other.double(), atol=1e-5 * max(1.0, float(other.abs().max())), rtol=0)


def check(oracle, documents, path, case, options, refusal) -> None:
    model, folder = oracle(*case)
    ids = torch.tensor(documents[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(model, path, options)
        if refusal is not None:
            with pytest.raises(ValueError, match=refusal) as caught:
                ours(folder, path, ids)
            assert str(path / adapter.CONFIG) in str(caught.value) and "\n" not in str(caught.value)
            return
        expected = reloaded(model, path, ids)
    with torch.no_grad():
        assert (expected - model(ids[None]).logits[0]).abs().max() > 1e-3  # a no-op would pass unseen
    assert_equal(ours(folder, path, ids), expected)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("name", "case"), each(PLAIN))
def test_an_adapter_computes_what_peft_reloads(oracle, documents, tmp_path, name, case):
    check(oracle, documents, tmp_path, case, *PLAIN[name])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "case"), each(OTHERS, both=True))
def test_what_depends_on_the_model(oracle, documents, tmp_path, name, case):
    options, biased, tied = OTHERS[name]
    check(oracle, documents, tmp_path, case, options, biased if case[0] == "qwen2" and biased else tied if case[1] else None)


def test_pissa_that_peft_turned_into_a_plain_adapter(oracle, documents, tmp_path):
    import peft

    model, folder = oracle("llama")
    ids = torch.tensor(documents[1])
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.save_pretrained(tmp_path / "start")
    shift(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        expected = reloaded(model, tmp_path / "plain", ids)
    with torch.no_grad():
        assert_equal(wrapped.eval()(ids[None]).logits[0], expected)
    assert_equal(ours(folder, tmp_path / "plain", ids), expected)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Adapters that PEFT made, by their model: each is made once and copied."""
    return {None: tmp_path_factory.mktemp("plain")}


@pytest.fixture
def edited(oracle, plain, tmp_path):
    """edited(kind, tied, tensors, config) -> (the model, its folder, a plain adapter with these tensors and fields changed)."""

    def make_one(kind: str, tied: bool, tensors: dict | None = None, config: dict | None = None):
        from safetensors.torch import load_file, save_file

        model, folder = oracle(kind, tied)
        if (kind, tied) not in plain:
            plain[kind, tied] = plain[None] / f"{kind}-{tied}"
            make(model, plain[kind, tied], dict(target_modules=["q_proj", "v_proj"]))
        shutil.copytree(plain[kind, tied], tmp_path, dirs_exist_ok=True)
        leaves = load_file(tmp_path / adapter.WEIGHTS) | (tensors or {})
        save_file({key: leaf for key, leaf in leaves.items() if leaf is not None}, tmp_path / adapter.WEIGHTS)
        fields = json.loads((tmp_path / adapter.CONFIG).read_text()) | (config or {})
        (tmp_path / adapter.CONFIG).write_text(json.dumps(fields))
        return model, folder, tmp_path

    return make_one


P = "base_model.model."
WHOLE = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
READ = {
    "an embedding beside": {f"{P}model.embed_tokens.weight": WHOLE},
    "a head beside": {f"{P}lm_head.weight": WHOLE},
    "both beside, equal": {f"{P}lm_head.weight": WHOLE, f"{P}model.embed_tokens.weight": WHOLE.clone()},
    "a norm beside": {f"{P}model.norm.weight": WHOLE[0]},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", READ)
def test_whole_tensors_without_a_rule_go_into_the_base(edited, documents, name, tied):
    """As after `resize_token_embeddings`: PEFT loads them into the model, and on a tied one into the tensor that both ends share."""
    model, folder, path = edited("llama", tied, READ[name])
    ids = torch.tensor(documents[1])
    assert_equal(ours(folder, path, ids), reloaded(model, path, ids))


Q = f"{P}model.layers.0.self_attn.q_proj"
PASSED_OVER = {
    "tensors of an excluded module": ({}, {"exclude_modules": ["model.layers.0.self_attn.q_proj"]}, "does not target"),
    "tensors of another layer": ({}, {"layers_to_transform": [1]}, "does not target"),
    "tensors of no target": ({}, {"target_modules": ["v_proj"]}, "does not target"),
    "a weight under an adapter": ({f"{Q}.weight": torch.ones(32, 32)}, {}, "both an adapter and a whole tensor"),
    "a base layer of no target": ({f"{P}lm_head.base_layer.weight": WHOLE}, {}, "cannot use"),
    "an adapter of an embedding on a matrix": ({f"{Q}.lora_embedding_A": torch.ones(4, 32)}, {}, "cannot use"),
    "nothing for a target": ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, {}, "names model.layers.0.self_attn.q_proj"),
    "nothing for a whole module": ({}, {"modules_to_save": ["norm"]}, "in modules_to_save, and the adapter file lacks"),
    "no target at all": ({}, {"target_modules": ["c_attn"]}, "names no module of this model"),
    "a norm as target": ({}, {"target_modules": ["q_proj", "v_proj", "input_layernorm"]}, "which is no linear layer"),
    "another base below": ({f"{Q}.base_layer.weight": torch.ones(32, 32)}, {}, "not the one of this model"),
    "integers": ({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int64)}, {}, "dtype int64"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", PASSED_OVER)
def test_what_peft_would_pass_over_is_refused(edited, documents, name):
    tensors, config, message = PASSED_OVER[name]
    _, folder, path = edited("llama", False, tensors, config)
    with pytest.raises(ValueError, match=message):
        ours(folder, path, torch.tensor(documents[1]))


def test_two_ends_of_a_tie_that_differ_are_refused(edited, documents):
    tensors = {f"{P}lm_head.weight": WHOLE, f"{P}model.embed_tokens.weight": WHOLE + 1}
    _, folder, path = edited("llama", True, tensors)
    with pytest.raises(ValueError, match="another embed_tokens than lm_head for a tied model"):
        ours(folder, path, torch.tensor(documents[1]))


FIELDS = {
    "init_lora_weights": ["loftq", "corda", "lora_ga", "PiSSA", "kaiming", 3, {}],
    "r": [None, 0, -1, 1.5, "4", True, 2**40], "lora_alpha": [None, 0, -2, "8", [8], 1e400], "use_rslora": ["yes", 1],
    "lora_dropout": [1.0, -0.1, "0"], "target_modules": ["(", 3, [1], {"q_proj": 1}], "exclude_modules": ["[", [None]],
    "layers_to_transform": [-1, "0", [0.5], True], "layers_pattern": [3, [1], ["("]], "modules_to_save": ["lm_head", [3], ["("]],
    "rank_pattern": [[1], {"q_proj": 0}, {"q_proj": "2"}, {"(": 2}], "alpha_pattern": [3, {"q_proj": -1}, {"q_proj": None}],
    "bias": ["some", True], "peft_type": ["LOHA", "ADALORA", None, 3], "task_type": ["SEQ_2_SEQ_LM", 1],
    "base_model_name_or_path": [3, ["x"]], "revision": [1], "use_dora": [True, 1, "x"], "use_qalora": [True],
    "arrow_config": [{}, {"top_k": 3}], "kasa_config": [{"beta": 1}], "megatron_config": [{}], "monteclora_config": [{}],
    "use_bdlora": [{"nblocks": 2}], "velora_config": [{}], "alora_invocation_tokens": [[], [1]], "layer_replication": [[], [[0, 1]]],
    "trainable_token_indices": [[], [1], {"embed_tokens": [1]}], "target_parameters": [["x"]], "something_new": [True, {"a": 1}],
}  # fmt: skip


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", FIELDS)
def test_values_without_a_known_effect_are_refused_by_name(edited, documents, name):
    for value in FIELDS[name]:
        _, folder, path = edited("llama", False, {}, {name: value})
        with pytest.raises(ValueError, match=name) as caught:
            ours(folder, path, torch.tensor(documents[1]))
        assert str(path / adapter.CONFIG) in str(caught.value) and "\n" not in str(caught.value), value
