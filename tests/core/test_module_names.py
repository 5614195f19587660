"""Names of leaves: PEFT's rule for plain names, regular expressions over both kinds of names, and errors that list what there is."""

import pytest

from treetune.core import lora, module_names
from treetune.core.param import Param

LINEAR, OTHER = Param((4, 4), op="linear"), Param((4, 4))
# Leaves by the names of transformers, as a model has them that is not one of the native families: a router [E, D] is no linear layer.
LAYER = {
    "self_attn": {"q_proj": LINEAR, "q_norm": Param((4,)), "kv_a_proj_with_mqa": LINEAR},
    "mlp": {"gate": OTHER, "gate_up_proj": LINEAR, "experts": [{"up_proj": LINEAR}, {"up_proj": LINEAR}]},
}
MODEL = {"embed_tokens": Param((9, 4), op="embedding"), "layers": [LAYER] * 12, "wpe": OTHER, "lm_head": Param((9, 4), op="head")}
NATIVE = {
    "embed_tokens": Param((9, 4), op="embedding"),
    "layers": [{"norm": Param((4,)), "q_proj": LINEAR, "k_proj": LINEAR, "up_proj": LINEAR}] * 12,
    "lm_head": Param((9, 4), op="head"),
}
OWNERS = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "up_proj": "mlp.up_proj", "norm": "input_layernorm"}


def hf_name(path: str) -> str:
    """The module of transformers that owns a leaf of NATIVE."""
    *layer, last = path.split(".")
    return ".".join(["model", *layer, OWNERS.get(last, last)]).replace("model.lm_head", "lm_head")


def of_layers(name: str, numbers=range(12)) -> list[str]:
    return [f"layers.{i}.{name}" for i in numbers]


@pytest.mark.parametrize(
    "targets, layers, name",
    [
        ("q_proj", range(12), "q_proj"),
        ("self_attn.q_proj", range(12), "q_proj"),
        ("layers.1.self_attn.q_proj", [1], "q_proj"),
        ("model.layers.1.self_attn.q_proj", [1], "q_proj"),
        ("layers.1.q_proj", [1], "q_proj"),
        ("1.q_proj", [1, 11], "q_proj"),  # no components of a module's name, so a regular expression over paths
        (r"layers.(0|1).self_attn.(q)_proj", [0, 1], "q_proj"),
        (r"layers\.[02]\.q", [0, 2], "q_proj"),
        (r".*layers\.(3|11)\.mlp\..*", [3, 11], "up_proj"),
        ("mlp", range(12), "up_proj"),
    ],
)
def test_native_leaves_go_by_both_names(targets, layers, name):
    assert lora.match(NATIVE, targets, module=hf_name) == of_layers(name, layers)


def test_several_targets_and_layers():
    both = [path for pair in zip(of_layers("q_proj"), of_layers("k_proj"), strict=True) for path in pair]
    assert lora.match(NATIVE, ["self_attn.q_proj", "k_proj"], module=hf_name) == both
    assert lora.match(NATIVE, ["self_attn.q_proj", "lm_head"], layers=[4], module=hf_name) == ["layers.4.q_proj", "lm_head"]
    every = lora.match(NATIVE, "All-Linear", module=hf_name)
    assert every == lora.linears(NATIVE) and len(every) == 36
    assert lora.match(NATIVE, ["all-linear", "lm_head"], module=hf_name) == [*every, "lm_head"]


@pytest.mark.parametrize(
    "targets, paths",
    [
        ("up_proj", [f"layers.{i}.mlp.experts.{j}.up_proj" for i in range(12) for j in range(2)]),  # and not gate_up_proj
        ("kv_a_proj_with_mqa", of_layers("self_attn.kv_a_proj_with_mqa")),
        ("experts.1.up_proj", of_layers("mlp.experts.1.up_proj")),
        (r"layers\.2\.mlp\.", ["layers.2.mlp.gate_up_proj", "layers.2.mlp.experts.0.up_proj", "layers.2.mlp.experts.1.up_proj"]),
        ("model.layers.3.self_attn.q_proj", ["layers.3.self_attn.q_proj"]),
    ],
)
def test_other_leaves_by_the_names_of_transformers(targets, paths):
    assert lora.match(MODEL, targets, module=lambda path: path if path == "lm_head" else f"model.{path}") == paths


def test_what_is_no_linear_layer_takes_no_adapter():
    assert not {"wpe", "layers.0.mlp.gate"} & {*lora.match(MODEL, "all-linear"), *lora.match(MODEL, ".")}
    for target in ("mlp.gate", "wpe", "q_norm"):
        with pytest.raises(ValueError, match=f"'{target}' matches .*{target}, which is no linear layer and takes no adapter"):
            lora.match(MODEL, target)


@pytest.mark.parametrize("target, near", [("layers.7.self_attn.q_prj", "layers.7.self_attn.q_proj"), ("o_prjo", "q_proj"), ("head", "")])
def test_a_target_without_a_match_lists_what_there_is(target, near):
    if not near:
        assert lora.match(MODEL, target) == ["lm_head"]
        return
    short = "embed_tokens, self_attn.q_proj, self_attn.kv_a_proj_with_mqa, mlp.gate_up_proj, mlp.experts.N.up_proj, lm_head"
    with pytest.raises(ValueError, match="matches no parameter; the nearest are .*") as caught:
        lora.match(MODEL, target)
    assert f"the nearest are {near}," in str(caught.value) and str(caught.value).endswith(f"; the model has {short}")


def test_a_module_trains_whole_with_all_its_leaves():
    modules = {
        "layers.0.q_proj": "model.layers.0.self_attn.q_proj", "layers.0.q_bias": "model.layers.0.self_attn.q_proj",
        "layers.0.input_norm": "model.layers.0.input_layernorm", "norm": "model.norm",
    }  # fmt: skip
    cases = {
        "norm": ["layers.0.input_norm", "norm"], "^norm$": ["norm"], "model.norm": ["norm"], "input_layernorm": ["layers.0.input_norm"],
        "q_proj": ["layers.0.q_proj", "layers.0.q_bias"], "self_attn": ["layers.0.q_proj", "layers.0.q_bias"],
        "q_proj$": ["layers.0.q_proj"],
    }  # fmt: skip
    assert {name: module_names.match_whole(name, modules) for name in cases} == cases
    with pytest.raises(
        ValueError, match=r"'v_proj' matches no parameter; the nearest are q_proj, .*has self_attn.q_proj, input_layernorm, no"
    ):
        module_names.match_whole("v_proj", modules)


def test_a_tree_without_linear_layers_says_so():
    with pytest.raises(ValueError, match="all-linear matches nothing: no leaf of this family says that it is a linear layer"):
        lora.match({"embed_tokens": MODEL["embed_tokens"], "layers": [{"gate": OTHER}]}, "all-linear")
