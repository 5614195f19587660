"""What is not computed is refused by name, and what the probe finds out decides how a model is run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from treetune.core import fields
from treetune.models import MODELS, bridge, bridge_attention, bridge_modules, bridge_skeleton, hf

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).with_name("architectures.py"))
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)


def read(kind, **changes):
    values = json.loads(architectures.tiny(kind).to_json_string(use_diff=False)) | changes
    values = {name: value for name, value in values.items() if value is not ...}
    return MODELS[kind].config(fields.mapping(values, "config.json"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "kind,changes,message",
    [
        ("glm4", {"quantization_config": {"bits": 4}}, "quantization_config, quantised weights"),
        ("glm4", {"attention_sparsity": 0.5}, "attention_sparsity = 0.5 .*does not know of glm4"),
        ("glm4", {"num_attention_heads": "four"}, "refuses this config.json of glm4.*num_attention_heads"),
        ("glm4", {"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number of at most"),
        ("bert", {"is_decoder": False}, "lets a token see later ones"),
        ("dory", {}, "its head is no linear layer"),
        ("rwkv", {}, "does not run on text alone"),
        ("doge", {}, "chooses the keys of its attention .*keep_window_size"),
        ("reformer", {}, "chooses the keys of its attention .*num_hashes"),
        ("deepseek_v32", {}, "indexer"),
        ("glm_moe_dsa", {}, "indexer"),
    ],
)
def test_what_is_not_computed_is_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(kind, **changes)
    assert str(caught.value).startswith("config.json: ") or "config.json has" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "kind,changes,reason",
    [
        ("llama4_text", {}, "chunked_overlay"),
        ("bloom", {}, "keeps a state, or has an attention of its own"),
        ("roberta", {}, "computes something else over a packed stream"),
        ("jetmoe", {}, "multiplies tokens of different documents together"),
        ("qwen3_next", {}, "keeps a state, or has an attention of its own"),
        ("hrm_text", {}, "runs several times"),
        ("falcon", {}, "no attention function of another name"),
        ("inkling_text", {}, "position_bias"),
        ("glm4", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "change with the length"),
    ],
)
def test_what_cannot_be_packed_goes_one_document_at_a_time(kind, changes, reason):
    cfg = read(kind, **changes)
    assert reason in cfg.alone and cfg.keeps_ids


LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)],
}  # fmt: skip


def test_rotary_positions_of_an_inner_text_model_that_change_with_the_length_are_seen():
    """gemma3 has those of its language model in `text_config`."""
    inner = json.loads(architectures.tiny("gemma3").to_json_string(use_diff=False))["text_config"]
    inner["rope_parameters"]["full_attention"] = LONG
    cfg = read("gemma3", text_config=inner)
    assert "change with the length" in cfg.alone and cfg.shared_positions == 16


def test_samples_stay_where_documents_of_all_lengths_turn_alike():
    """A text that grows beyond the original length would turn the tokens before by other factors than they were sampled with."""
    cfg = read("cohere", rope_parameters=LONG)
    assert (cfg.shared_positions, cfg.max_positions) == (16, 128)
    assert read("cohere").shared_positions == 128


def test_passes_of_long_and_of_short_documents_share_no_frequencies():
    """transformers writes the frequencies of longrope in place, and sampling and training run at once."""
    cfg = read("cohere", rope_parameters=LONG)
    module = next(part for part in bridge.skeleton(cfg).base.modules() if hasattr(part, "rope_type"))
    before = module.inv_freq.clone()
    bound = bridge_modules.bound(module, bridge_modules.Binding(bridge.skeleton(cfg), {}, bridge_modules.Adapters({})))
    bound(torch.zeros(1, 20, 64), torch.arange(20)[None])
    assert torch.equal(module.inv_freq, before) and not torch.equal(bound.inv_freq, before)


def test_states_are_read_behind_what_stands_before_the_output_matrix():
    cfg = read("modernbert-decoder")
    assert cfg.whole and not cfg.alone and not read("glm4").whole
    leaves = bridge_leaves(cfg)
    assert leaves["lm_head_block.dense"].op == "linear" and leaves["lm_head_bias"].shape == (architectures.VOCABULARY,)


def test_a_mask_of_a_window_reaches_the_layers_that_have_it():
    """qwen2_moe gives its attention no window: its mask has it."""
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    cfg = read("qwen2_moe", num_hidden_layers=3, use_sliding_window=True, sliding_window=5, layer_types=types)
    assert cfg.layer_windows == (None, 5, 5) and not cfg.alone


def test_scales_caps_and_biases_of_the_head():
    assert read("cohere2").logit_scale == pytest.approx(0.0625) and read("nanochat").logit_softcap == pytest.approx(15.0)
    assert read("phi").head_bias and not read("glm4").head_bias


def test_an_older_transformers_is_named(monkeypatch):
    monkeypatch.setattr(bridge.metadata, "version", lambda name: "5.0.0")
    with pytest.raises(ValueError, match=r"config.json: a glm4 model .* from 5\.7 on, and 5\.0\.0 is installed: pip install") as caught:
        read("glm4")
    assert "\n" not in str(caught.value)


def test_unknown_types_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such"}))
    with pytest.raises(ValueError, match="model_type must be .*causal language model of the installed transformers.*no_such"):
        hf.read_config(tmp_path / "config.json")


def test_attention_outside_of_a_pass_is_refused():
    with pytest.raises(ValueError, match="outside a forward pass"):
        bridge_attention.attend(nn.Identity(), *(torch.zeros(1, 1, 2, 4) for _ in range(3)), None)


def test_masks_that_a_model_changes_are_refused():
    marked = bridge_attention.mask(mask_function=lambda *_: True)
    module = nn.Identity()
    module.__dict__[bridge_attention.CALL] = lambda heads: heads.v
    q = torch.zeros(1, 1, 2, 4)
    for given, message in (
        (marked, "of the kind test_masks_that_a_model_changes_are_refused"),
        (marked + 1.0, "that it makes itself"),
        (None, "no mask"),
    ):
        with pytest.raises(ValueError, match=message):
            bridge_attention.attend(module, q, q, q, given)


def test_linear_layers_are_known_by_what_they_compute():
    class Turned(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Router(nn.Linear):
        def forward(self, x):
            return (x @ self.weight.T).softmax(-1)

    assert bridge_skeleton.is_linear(Turned(2, 3)) and bridge_skeleton.is_linear(nn.Linear(2, 3))
    assert not bridge_skeleton.is_linear(Router(2, 3)) and not bridge_skeleton.is_linear(nn.Identity())


def test_an_adapter_on_what_is_no_linear_layer_is_refused():
    cfg = read("mamba")
    ops = {path: leaf.op for path, leaf in bridge_leaves(cfg).items()}
    assert ops["layers.0.mixer.in_proj"] == "linear" and ops["layers.0.mixer.dt_proj"] == "", "dt_proj is read for its weight alone"


def bridge_leaves(cfg: bridge.Config):
    from treetune.core import tree

    return dict(tree.items(MODELS[cfg.kind].abstract(cfg)))
