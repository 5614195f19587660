"""Reading and writing model folders: what transformers reads back, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from treetune.core import lora, tensor_file, tree
from treetune.models import MODELS, Model, dense, hf, hf_keys

KINDS = [
    "llama",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "phi3",
    "smollm3",
    "granite",
    "olmo2",
    "olmo3",
    "gemma",
    "gemma2",
    "gemma3",
]


def transformers_logits(path, ids):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(ids[None]).logits[0], model.config


# A tie is no family's own: each is here with one or without, and llama with both.
SAVED = [("llama", False), *((kind, i % 2 == 0) for i, kind in enumerate(KINDS))]
SAVED += [pytest.param(kind, i % 2 == 1, marks=pytest.mark.slow) for i, kind in enumerate(KINDS) if i]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("kind", "tied"), SAVED)
def test_saved_model_has_the_same_logits_in_transformers(oracle, documents, tmp_path, kind, tied):
    model, path = oracle(kind, tied)
    ids = torch.tensor(documents[1])
    ours = hf.load(path)
    hf.save(tmp_path / "saved", ours)
    got, config = transformers_logits(tmp_path / "saved", ids)
    with torch.no_grad():
        assert torch.equal(got, model(ids[None]).logits[0])
    assert config.tie_word_embeddings == tied and config.model_type == model.config.model_type
    again = hf.load(tmp_path / "saved")
    assert again.cfg == ours.cfg
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(again.params), tree.leaves(ours.params), strict=True))


def test_shards_and_their_index(oracle, documents, tmp_path):
    model, path = oracle("llama")
    ids = torch.tensor(documents[0])
    ours = hf.load(path)
    hf.save(tmp_path / "saved", ours, max_shard_bytes=20_000)
    files = sorted(tmp_path.glob("saved/*.safetensors"))
    index = json.loads((tmp_path / "saved" / hf.INDEX).read_text())
    assert len(files) > 3 and not (tmp_path / "saved" / hf.SINGLE).exists()
    assert all(sum(leaf.nbytes for leaf in load_file(file).values()) <= 20_000 for file in files)
    assert index["metadata"]["total_size"] == tree.bytes(ours.params)
    again = hf.load(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(again.params), tree.leaves(ours.params), strict=True))
    with torch.no_grad():
        assert torch.equal(transformers_logits(tmp_path / "saved", ids)[0], model(ids[None]).logits[0])
    files[0].unlink()
    with pytest.raises(ValueError, match="model-00001-of"):
        hf.load(tmp_path / "saved")


def test_keys_and_paths_are_inverse():
    for family, module in MODELS.items():
        for pattern in module.HF_KEYS:
            path = pattern.format(12)
            assert path in hf_keys.leaves_of(family, hf.hf_key(family, path))
    assert hf.hf_key("llama", "layers.3.q_proj") == "model.layers.3.self_attn.q_proj.weight"
    assert hf_keys.leaves_of("llama", "model.layers.12.self_attn.q_proj.weight") == ["layers.12.q_proj"]
    assert not hf_keys.leaves_of("llama", "model.layers.0.self_attn.q_proj.bias")
    with pytest.raises(ValueError, match="q_proj"):
        hf.hf_key("llama", "layers.0.q_prj")


def edited(path, tmp_path, *, tensors=None, config=None):
    """A copy of a model folder with changed tensors (None drops one) and changed config fields."""
    leaves = load_file(path / hf.SINGLE) | (tensors or {})
    save_file({key: leaf for key, leaf in leaves.items() if leaf is not None}, tmp_path / hf.SINGLE)
    fields = json.loads((path / "config.json").read_text()) | (config or {})
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def test_wrong_weights_are_refused(oracle, tmp_path):
    _, path = oracle("llama")
    norm = "model.layers.1.input_layernorm.weight"
    for tensors, message in (
        ({norm: None}, f"lacks 1 tensors, the first is {norm}"),
        ({"extra.weight": torch.zeros(2)}, "the first is extra.weight"),
        ({norm: torch.ones(31)}, rf"{norm} has shape \[31\]"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "q_proj.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.load(edited(path, tmp_path, tensors=tensors))
    hf.load(edited(path, tmp_path, tensors={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))


def test_wrong_configs_are_refused(oracle, tmp_path):
    _, path = oracle("llama")
    for config, message in (
        ({"model_type": "gpt_neox"}, "not know of gpt_neox"),
        ({"model_type": "no_such"}, "a causal language model of the installed transformers"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "axial", "factor": 2.0}}, "axial"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.load(edited(path, tmp_path, config=config))
    (tmp_path / "config.json").write_text('{\n"model_type": "llama",\n}')
    with pytest.raises(ValueError, match="line 3"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 3}')
    with pytest.raises(ValueError, match="has no hidden_size, intermediate_size"):
        hf.load(tmp_path)


def test_sources_that_are_no_model_are_refused(oracle, tmp_path, monkeypatch):
    _, path = oracle("llama")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(ValueError, match="no model.safetensors"):
        hf.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="pickled weights only.*save_pretrained"):
        hf.load(tmp_path)
    (tmp_path / hf.SINGLE).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        hf.load(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        hf.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="trust_remote_code"):
        hf.load(path, trust_remote_code=True)


def test_old_spelling_of_the_rope_options(oracle, documents, tmp_path):
    model, path = oracle("llama3")
    fields = json.loads((path / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    old = {"rope_parameters": None, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    ours, again = hf.load(path), hf.load(edited(path, tmp_path, config=old))
    assert again.cfg == ours.cfg and ours.cfg.rope_theta == 1000.0 and ours.cfg.rope_scaling.factor == 4.0


def test_a_tied_model_that_carries_its_head(oracle, tmp_path):
    _, path = oracle("llama", True)
    embed = load_file(path / hf.SINGLE)["model.embed_tokens.weight"]
    same = hf.load(edited(path, tmp_path, tensors={"lm_head.weight": embed.clone()}))
    assert same.cfg.tied and "lm_head" not in same.params
    other = hf.load(edited(path, tmp_path, tensors={"lm_head.weight": embed + 1}))
    assert not other.cfg.tied and torch.equal(other.params["lm_head"], embed + 1)


def test_a_save_replaces_nothing_and_a_failed_one_leaves_nothing(oracle, tmp_path, monkeypatch):
    _, path = oracle("llama")
    ours = hf.load(path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write", full)
    with pytest.raises(OSError, match="No space"):
        hf.save(tmp_path / "saved", ours)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "saved").mkdir()  # empty
    hf.save(tmp_path / "saved", ours)
    before = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name, words in (("saved", "already holds files"), ("file", "is a file"), ("link", "is a link")):
        with pytest.raises(ValueError, match=words):
            hf.save(tmp_path / name, ours)
    assert {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "link", "saved"]


def test_random_models_depend_on_the_seed_alone(oracle):
    _, path = oracle("qwen2")
    one, same, other = (hf.random("qwen2", path / "config.json", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(one.params), tree.leaves(same.params), strict=True))
    assert not torch.equal(one.params["embed_tokens"], other.params["embed_tokens"])
    assert one.params["layers"][0]["q_proj"].std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(one.params["norm"], torch.ones(32)) and not one.params["layers"][0]["q_bias"].any()
    with pytest.raises(ValueError, match="qwen2 model, not llama"):
        hf.random("llama", path, seed=0)
    low = hf.random("qwen2", one.cfg, seed=1, dtype=torch.bfloat16)
    assert low.cfg.dtype == torch.bfloat16 and low.params["norm"].dtype == torch.bfloat16


def test_abstract_of_names_the_head_of_a_tied_model_on_request(oracle):
    ours = hf.load(oracle("llama", True)[1])
    assert "lm_head" not in hf.abstract_of(ours)
    assert lora.match(hf.abstract_of(ours, head=True), "lm_head") == ["lm_head"]
    assert {path: tuple(leaf.shape) for path, leaf in tree.items(ours.params)} == {
        path: leaf.shape for path, leaf in tree.items(hf.abstract_of(ours))
    }


def test_vocabulary_padded_past_the_tokenizer(oracle, documents, tmp_path, words):
    """Train -> merge -> save with the tokenizer -> reload keeps the padded rows (pain 24)."""
    ours = hf.load(oracle("qwen2", True)[1])
    assert len(words) < ours.cfg.vocab_size
    adapter = lora.init(ours.params, lora.match(hf.abstract_of(ours), "all-linear"), rank=4, seed=0)
    adapter = tree.map(lambda leaf: leaf + 0.05, adapter)
    ids = torch.tensor(documents[0])
    expected = dense.probe(ours.params, ids, ours.cfg, lora=lora.Lora(adapter, 2.0))
    hf.save(tmp_path / "merged", ours._replace(params=lora.merge(ours.params, adapter, 2.0)), tokenizer=words)
    again = hf.load(tmp_path / "merged")
    assert again.params["embed_tokens"].shape == (96, 32) and again.cfg.tied
    torch.testing.assert_close(dense.probe(again.params, ids, again.cfg), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(transformers_logits(tmp_path / "merged", ids)[0], expected, atol=2e-5, rtol=0)
    assert hf.tokenizer(tmp_path / "merged")("a bc")["input_ids"] == words("a bc")["input_ids"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head"), ("q_proj", "lm_head")])
def test_merging_into_a_tied_model(oracle, documents, tmp_path, targets):
    """Adapters on either side of a tie, merged, saved and reloaded, give the unmerged logits (pain 31)."""
    ours = hf.load(oracle("llama", True)[1])
    abstract = hf.abstract_of(ours, head=True)
    adapter = lora.init(abstract, lora.match(abstract, targets), rank=4, seed=0)
    adapter = tree.map(lambda leaf: leaf + 0.1, adapter)
    ids = torch.tensor(documents[1])
    expected = dense.probe(ours.params, ids, ours.cfg, lora=lora.Lora(adapter, 0.5))
    assert (expected - dense.probe(ours.params, ids, ours.cfg)).abs().max() > 0.1
    hf.save(tmp_path / "merged", ours._replace(params=lora.merge(ours.params, adapter, 0.5)))
    again = hf.load(tmp_path / "merged")
    assert not again.cfg.tied
    torch.testing.assert_close(dense.probe(again.params, ids, again.cfg), expected, atol=5e-5, rtol=0)
    logits, config = transformers_logits(tmp_path / "merged", ids)
    assert not config.tie_word_embeddings
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)


def test_a_head_equal_to_the_tied_embedding_stays_tied(oracle, tmp_path):
    ours = hf.load(oracle("llama", True)[1])
    hf.save(tmp_path / "saved", Model(ours.family, ours.cfg, ours.params | {"lm_head": ours.params["embed_tokens"].clone()}))
    assert hf.load(tmp_path / "saved").cfg.tied
    untied = Model(ours.family, replace(ours.cfg, tied=False), ours.params | {"lm_head": ours.params["embed_tokens"].clone()})
    hf.save(tmp_path / "untied", untied)
    assert not hf.load(tmp_path / "untied").cfg.tied


def test_tokenizer_is_the_one_of_auto_tokenizer(tmp_path, words):
    from transformers import AutoTokenizer

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    words.save_pretrained(tmp_path)
    ours, auto = hf.tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "abc  bca\n<|end|>cab ab 12345"
    assert type(ours) is type(auto)
    assert ours(text)["input_ids"] == auto(text)["input_ids"] == words(text)["input_ids"]
    assert ours.chat_template == auto.chat_template == words.chat_template
    messages = [{"role": "user", "content": "ab"}]
    assert ours.apply_chat_template(messages) == auto.apply_chat_template(messages)
    assert (ours.special_tokens_map, ours.all_special_ids) == (auto.special_tokens_map, auto.all_special_ids)
    assert ours.model_max_length == auto.model_max_length == 77


def test_a_tokenizer_class_of_its_own_goes_through_auto_tokenizer(tmp_path, words):
    from transformers import AutoTokenizer

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    words.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    ours, auto = hf.tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(auto) and type(ours).__name__ == "Qwen2Tokenizer"
    assert ours("ab 12345")["input_ids"] == auto("ab 12345")["input_ids"]


def test_generation_config_and_stop_ids(oracle, tmp_path, words):
    ours = hf.load(oracle("llama")[1])
    hf.save(tmp_path / "saved", ours, tokenizer=words, generation={"eos_token_id": [3, 5], "temperature": 0.6})
    assert hf.generation_config(tmp_path / "saved")["temperature"] == 0.6
    assert hf.stop_ids(tmp_path / "saved", words) == sorted({3, 5, words.eos_token_id})
    assert hf.generation_config(tmp_path) == {}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["eos_token_id"] == words.eos_token_id and config["dtype"] == "float32"


@pytest.mark.parametrize("ids", ["2", 1.5, True, -1, [2, "3"], [2, None], {"id": 2}, 2**70])
def test_end_ids_of_another_type_are_refused(tmp_path, words, ids):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids, "temperature": "warm"}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be"):
        hf.stop_ids(tmp_path, words)


def test_other_generation_options_are_handed_on_as_they_are(tmp_path, words):
    found = {"eos_token_id": None, "do_sample": False, "temperature": 0.9, "made_up": [1]}
    (tmp_path / "generation_config.json").write_text(json.dumps(found))
    assert hf.generation_config(tmp_path) == found
    assert hf.stop_ids(tmp_path, words) == [words.eos_token_id]


INDEXES = {
    "metadata only": ({"metadata": {}}, "weight_map must be a mapping"),
    "a list": ({"weight_map": ["a"]}, "weight_map must be a mapping"),
    "empty": ({"weight_map": {}}, "weight_map is empty"),
    "a number": ({"weight_map": {"lm_head.weight": 3}}, r"weight_map: lm_head\.weight must be a text"),
    "above": ({"weight_map": {"lm_head.weight": "../model.safetensors"}}, "expected a .safetensors file of this folder"),
    "elsewhere": ({"weight_map": {"lm_head.weight": "/etc/model.safetensors"}}, "expected a .safetensors file of this folder"),
    "below": ({"weight_map": {"lm_head.weight": "sub/model.safetensors"}}, "expected a .safetensors file of this folder"),
    "another kind": ({"weight_map": {"lm_head.weight": "config.json"}}, "expected a .safetensors file of this folder"),
    "not there": ({"weight_map": {"lm_head.weight": "model-00002.safetensors"}}, "which is not in the folder"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_names_files_of_its_folder(oracle, tmp_path, case):
    index, message = INDEXES[case]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((oracle("llama")[1] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").symlink_to(oracle("llama")[1] / hf.SINGLE)
    (tmp_path / "model" / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message) as caught:
        hf.load(tmp_path / "model")
    assert str(tmp_path / "model" / hf.INDEX) in str(caught.value)


def test_weights_of_another_kind_are_refused(oracle, tmp_path):
    path = oracle("llama")[1]
    whole = load_file(path / hf.SINGLE)
    with pytest.raises(ValueError, match="lm_head.weight has dtype I64"):
        hf.load(edited(path, tmp_path, tensors={"lm_head.weight": whole["lm_head.weight"].long()}))
    index = {"weight_map": {"lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}}
    (tmp_path / hf.SINGLE).unlink()
    (tmp_path / hf.INDEX).write_text(json.dumps(index))
    save_file(whole, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": whole["lm_head.weight"] + 1}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="b.safetensors has the tensor lm_head.weight, which another file"):
        hf.load(tmp_path)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="b.safetensors cannot be read as safetensors"):
        hf.load(tmp_path)


def test_links_of_the_hub_cache_are_followed(oracle, tmp_path):
    path = oracle("llama")[1]
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    for number, file in enumerate(path.iterdir()):
        (tmp_path / "blobs" / str(number)).write_bytes(file.read_bytes())
        (tmp_path / "snapshots" / file.name).symlink_to(Path("..") / "blobs" / str(number))
    assert torch.equal(hf.load(tmp_path / "snapshots").params["norm"], hf.load(path).params["norm"])


def test_a_model_larger_than_the_machine_is_refused_before_it_is_made(oracle, tmp_path):
    config = json.loads((oracle("llama")[1] / "config.json").read_text()) | {"vocab_size": 2**23, "hidden_size": 2**19}
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": 8, "num_hidden_layers": 1000}))
    with pytest.raises(ValueError, match="GiB; this machine has"):
        hf.random("llama", tmp_path, seed=0)
