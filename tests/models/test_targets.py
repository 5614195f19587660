"""LoRA targets by the names of transformers: the same leaves by every name, and the same modules when PEFT reads the saved adapter."""

import copy
import json
import warnings
from functools import partial

import pytest

from treetune.core import lora, tree
from treetune.models import adapter, hf, policy
from treetune.models.adapter import Base

DENSE = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "smollm3", "granite"]
# Targets in our words, and the same in those of transformers and PEFT.
SAME = {
    "plain": (("q_proj", "v_proj"), ("self_attn.q_proj", "self_attn.v_proj")),
    "full": (("layers.0.q_proj", "layers.1.up_proj"), ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")),
    "regex": ((r"layers\.0\.(q|k)_proj",), (r"layers.0.self_attn.(q|k)_proj",)),
    "parts": (("gate", "up_proj$", "down"), (r"model\.layers\.\d+\.mlp\.",)),
    "ends": (("embed_tokens", "lm_head", "o_proj"), ("model.embed_tokens", "^lm_head$", "self_attn.o_proj")),
    "every": (("all-linear",), (r"_proj$",)),
}


def adapted(model, **options):
    return policy.adapt(model, policy.AdapterSpec(rank=2, alpha=4.0, **options), base=Base("x", ""), seed=3)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("case", SAME)
def test_every_name_means_the_same_leaves(oracle, case, kind):
    model = hf.load(oracle(kind)[1])
    ours, theirs = (adapted(model, targets=targets) for targets in SAME[case])
    assert ours.adapter.paths == theirs.adapter.paths and len(ours.adapter.paths) >= 2
    assert all(left.equal(right) for left, right in zip(tree.leaves(ours.params), tree.leaves(theirs.params), strict=True))


# What PEFT takes as a list by its own rule must be the same modules here.
LISTS = [
    ["q_proj"],
    ["self_attn.k_proj", "mlp.up_proj"],
    ["layers.1.mlp.down_proj"],
    ["model.layers.0.self_attn.o_proj"],
    ["lm_head", "v_proj"],
]
OTHERS = ["all-linear", r".*layers\.1\..*(q|down)_proj"]


@pytest.mark.parametrize("targets", [*LISTS, *OTHERS], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_peft_reads_the_same_modules(oracle, tmp_path, kind, targets):
    import peft

    model, folder = oracle(kind)
    ours = adapted(hf.load(folder), targets=(targets,) if isinstance(targets, str) else tuple(targets))
    policy.save(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
        back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    modules = {adapter.module(kind, path) for path in ours.adapter.paths}
    assert set(theirs.base_model.targeted_module_names) == modules == set(back.base_model.targeted_module_names)
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == modules


@pytest.mark.parametrize("names, leaves", [
    (("self_attn.q_proj",), {"layers.0.q_proj", "layers.0.q_bias", "layers.1.q_proj", "layers.1.q_bias"}),
    (("model.norm", "layers.1.input_layernorm"), {"norm", "layers.1.input_norm"}),
    (("model.embed_tokens", "lm_head"), {"embed_tokens", "lm_head"}),
    ((r"layers.0.mlp",), {"layers.0.gate_proj", "layers.0.up_proj", "layers.0.down_proj"}),
])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save_by_the_names_of_transformers(oracle, tmp_path, names, leaves, tied):
    import peft

    model, folder = oracle("qwen2", tied)
    ours = adapted(hf.load(folder), targets=("o_proj",), modules_to_save=names)
    assert {path for path, _ in tree.items(ours.params["model"])} == leaves
    policy.save(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    replaced = {
        name.removeprefix("base_model.model.") for name, part in back.named_modules() if type(part).__name__ == "ModulesToSaveWrapper"
    }
    assert replaced == {adapter.module("qwen2", path) for path in leaves}


def test_errors_name_the_option_and_the_choice(oracle):
    model = hf.load(oracle("qwen2")[1])
    choice = "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj"
    with pytest.raises(
        ValueError, match=r"lora_target_modules: 'self_attn.q_pro_j' matches no parameter; the nearest are .*q_proj"
    ) as caught:
        adapted(model, targets=("self_attn.q_pro_j",))
    assert choice in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="lora_target_modules: 'input_layernorm' matches layers.0.input_norm, which is no linear layer"):
        adapted(model, targets=("input_layernorm",))
    with pytest.raises(ValueError, match="lora_modules_to_save: 'model.nrom' matches no parameter; the nearest are .*model.norm"):
        adapted(model, targets=("q_proj",), modules_to_save=("model.nrom",))


def test_layers_go_with_names_of_transformers(oracle):
    model = hf.load(oracle("qwen3")[1])
    assert adapted(model, targets=("self_attn.q_proj", "mlp.up_proj"), layers=(1,)).adapter.paths == ["layers.1.q_proj", "layers.1.up_proj"]


@pytest.mark.parametrize("kind", [*DENSE, "mixtral", "gpt_oss", "phi3"])
def test_all_linear_is_what_peft_means_by_it(oracle, kind):
    import peft

    model, folder = oracle(kind)
    ours = hf.load(folder)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    linears = lora.linears(hf.abstract_of(ours, head=True))
    assert set(map(partial(adapter.module, ours.family), linears)) == set(theirs.base_model.targeted_module_names)


def test_modules_of_several_leaves(oracle, tmp_path):
    """phi3 keeps three projections in one module of transformers, whose name is the target of all of them."""
    import peft

    model, folder = oracle("phi3")
    ours = adapted(hf.load(folder), targets=("self_attn.qkv_proj",), layers=(1,))
    assert ours.adapter.paths == [f"layers.1.{name}_proj" for name in "qkv"]
    policy.save(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert set(back.base_model.targeted_module_names) == {"model.layers.1.self_attn.qkv_proj"}
    with pytest.raises(ValueError, match="rows of qkv_proj: target qkv_proj"):
        adapted(hf.load(folder), targets=("q_proj",))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_routers_and_experts_go_by_the_names_of_transformers(oracle, kind):
    """They are no linear layers, so only who names them adapts them."""
    model = hf.load(oracle(kind)[1])
    owner = {"mixtral": "mlp", "qwen3_moe": "layers.1.mlp", "gpt_oss": "mlp"}[kind]
    numbers = (1,) if kind == "qwen3_moe" else (0, 1)
    assert adapted(model, targets=(f"{owner}.experts.gate_up_proj",)).adapter.paths == [f"layers.{i}.experts.gate_up_proj" for i in numbers]
    linears = lora.match(hf.abstract_of(model), "all-linear")
    assert linears and not any("router" in path or "experts" in path for path in linears)
