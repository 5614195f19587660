"""Rules of learning rates and decays by the names of transformers and PEFT, and by our paths."""

import re
from typing import Any

import pytest

from treetune.core import tree
from treetune.models import hf, policy, rule_names
from treetune.models.adapter import Base
from treetune.models.adapter_spec import AdapterSpec
from treetune.models.llama import Config

SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, mlp_size=24, num_layers=12, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=64
)


def trained(adapter=None):
    model = hf.random("llama", Config(**SIZES, tied=False), seed=0)
    return policy.full(model) if adapter is None else policy.adapt(model, adapter, base=Base("base", "", None), seed=0)


def chosen(names: rule_names.Names, regex: str) -> list[str]:
    ((over, value),) = names.over_paths([(regex, 0.5)], "lr_rules")
    assert value == 0.5
    return [path for path in names.known if re.search(over, path)]


def test_a_name_of_transformers_is_that_of_a_leaf():
    names = rule_names.of(trained())
    q = [f"model.layers.{i}.q_proj" for i in range(12)]
    assert chosen(names, "self_attn.q_proj") == chosen(names, r"self_attn\.q_proj\.weight$") == q
    assert chosen(names, r"model\.layers\.1\.self_attn\.q_proj\.weight") == q[1:2], "and not that of layer 11"
    assert chosen(names, "input_layernorm") == [f"model.layers.{i}.input_norm" for i in range(12)]
    assert chosen(names, r"^model\.norm\.weight$") == ["model.norm"]


def test_our_paths_come_first():
    plain = rule_names.of(trained())
    assert plain.over_paths([("q_proj", 2.0), (r"layers\.0\.", 3.0)], "lr_rules") == [("q_proj", 2.0), (r"layers\.0\.", 3.0)]


def test_a_pair_has_the_name_of_its_weight_and_that_of_peft():
    names = rule_names.of(trained(AdapterSpec(rank=2, targets=("q_proj", "o_proj"), modules_to_save=("lm_head",), dora=True)))
    pairs = [f"lora.layers.{i}.o_proj.{part}" for i in range(12) for part in "ABM"]
    assert chosen(names, r"self_attn\.o_proj") == chosen(names, "self_attn.o_proj.weight") == pairs
    assert chosen(names, r"self_attn\.o_proj\.lora_B\.weight") == pairs[1::3]
    assert chosen(names, "o_proj.lora_magnitude_vector") == pairs[2::3]
    assert chosen(names, "lm_head.weight") == ["model.lm_head"]
    assert chosen(names, names.vocabulary()) == ["model.lm_head"]


def test_what_trains_of_the_vocabulary():
    names = rule_names.of(trained())
    assert chosen(names, names.vocabulary()) == ["model.embed_tokens", "model.lm_head"]
    with pytest.raises(ValueError, match="embedding_lr .* neither trains: .*--lora-modules-to-save embed_tokens lm_head"):
        rule_names.of(trained(AdapterSpec(rank=2))).vocabulary()


def test_a_name_of_nothing_that_trains_is_refused_with_the_nearest():
    names = rule_names.of(trained(AdapterSpec(rank=2, targets=("q_proj",))))
    with pytest.raises(ValueError, match=r"lr_rules: 'self_attn.k_proj' matches no parameter that trains; the nearest are .*_proj"):
        names.over_paths([("self_attn.k_proj", 2.0)], "lr_rules")


def test_every_leaf_that_trains_has_a_name_and_is_found_by_it():
    for given in (trained(), trained(AdapterSpec(rank=2, modules_to_save=("embed_tokens",), dora=True))):
        names = rule_names.of(given)
        assert list(names.known) == [path for path, _ in tree.items(given.params)]
        for path, known in names.known.items():
            assert path in chosen(names, f"^{re.escape(known[-1])}$")
            assert [other for other in names.known if re.search(rule_names.exactly([path]), other)] == [path]
