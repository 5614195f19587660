"""Experts in files: a tensor for each projection of each expert, or stacked ones; never both, never by halves."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from treetune.core import tree
from treetune.models import dense, hf

KINDS = ["mixtral", "qwen3_moe"]


def stacked(model, path):
    """The folder that transformers writes with experts as it holds them."""
    model.save_pretrained(path, save_original_format=False)
    return path


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(tree.leaves(one.params), tree.leaves(other.params), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_are_read_as_the_same_leaves(oracle, tmp_path, kind):
    model, path = oracle(kind)
    each, whole = hf.load(path), hf.load(stacked(model, tmp_path))
    keys = [set(load_file(folder / hf.SINGLE)) for folder in (path, tmp_path)]
    assert len(keys[0]) > len(keys[1]) and any(key.endswith("experts.gate_up_proj") for key in keys[1] - keys[0])
    assert equal(each, whole) and each.cfg == whole.cfg
    assert whole.params["layers"][1]["experts"]["gate_up_proj"].shape == (5, 48, 32)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", ["each", "stacked"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_both_layouts_that_are_written(oracle, documents, tmp_path, kind, layout):
    from transformers import AutoModelForCausalLM

    model, path = oracle(kind)
    hf.save(tmp_path / "saved", hf.load(path), stacked=layout == "stacked")
    same_keys = path if layout == "each" else stacked(model, tmp_path / "theirs")
    assert set(load_file(tmp_path / "saved" / hf.SINGLE)) == set(load_file(same_keys / hf.SINGLE))
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([documents[1]])
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, model(ids).logits)
    assert equal(hf.load(tmp_path / "saved"), hf.load(path))


DOWN = "model.layers.1.mlp.experts.{}down_proj{}"
DAMAGED = {
    "an expert is missing": ({DOWN.format("3.", ".weight"): None}, "lacks 1 tensors, the first is .*experts.3.down_proj.weight"),
    "an expert too many": ({DOWN.format("5.", ".weight"): torch.ones(32, 24)}, "the first is .*experts.5.down_proj.weight"),
    "both layouts": ({DOWN.format("", ""): torch.ones(5, 32, 24)}, "besides those of its family 5 tensors"),
    "an expert of another width": ({DOWN.format("2.", ".weight"): torch.ones(32, 23)}, r"experts.2.down_proj.weight has shape \[32, 23\]"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_experts_by_halves_are_refused(oracle, tmp_path, name):
    tensors, message = DAMAGED[name]
    path = oracle("qwen3_moe")[1]
    leaves = {key: leaf for key, leaf in (load_file(path / hf.SINGLE) | tensors).items() if leaf is not None}
    save_file(leaves, tmp_path / hf.SINGLE)
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        hf.load(tmp_path)


def test_layers_without_experts(oracle):
    """mlp_only_layers: layer 0 has a plain MLP of another width."""
    ours = hf.load(oracle("qwen3_moe")[1])
    assert "router" not in ours.params["layers"][0] and ours.params["layers"][0]["gate_proj"].shape == (64, 32)
    assert "gate_proj" not in ours.params["layers"][1] and ours.cfg.experts.layers == (1,)


def test_files_of_the_hub_name_the_number_of_experts_otherwise(oracle, documents, tmp_path):
    _, path = oracle("qwen3_moe")
    config = json.loads((path / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / hf.SINGLE).symlink_to(path / hf.SINGLE)
    ids, one, other = torch.tensor(documents[0]), hf.load(path), hf.load(tmp_path)
    assert torch.equal(dense.probe(one.params, ids, one.cfg), dense.probe(other.params, ids, other.cfg))
