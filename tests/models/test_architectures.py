"""The table of docs/models.md is in step with what the architectures do: some of them here, all of them in the slow tests."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from treetune.models import hf

HERE = Path(__file__).parent
SOME = ("bert", "dbrx", "gemma3", "gpt2", "nemotron_h", "qwen3_5_moe_text", "qwen3_moe")


def _load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


table = _load("architecture_table")
models = table.small_models()


@pytest.fixture(scope="module")
def recorded():
    return table.recorded(table.PAGE.read_text())


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=pytest.mark.slow) if name in ("dbrx", "qwen3_5_moe_text") else name for name in SOME]
)
def test_the_table_says_what_some_do(model_type, recorded, tmp_path):
    result = table.certify(model_type, tmp_path / "model")
    assert result.outcome == recorded[model_type], (result.reason, *result.lines)


def test_the_table_has_every_architecture_and_four_outcomes(recorded):
    assert sorted(recorded) == models.model_types()
    assert set(recorded.values()) == set(table.OUTCOMES)
    assert sum(outcome in table.OUTCOMES[:2] for outcome in recorded.values()) >= 100


@pytest.mark.slow
def test_the_table_says_what_all_do(recorded):
    results = [table.apart(model_type) for model_type in models.model_types()]
    assert {result.model_type: (result.outcome, result.reason) for result in results if result.outcome != recorded[result.model_type]} == {}


@pytest.mark.parametrize("model_type", ["deepseek_v2", "gemma3", "llama4_text", "zamba2"])
def test_small_configs_keep_a_layer_of_every_kind(model_type):
    from transformers import CONFIG_MAPPING

    small, whole = models.tiny(model_type).get_text_config(), CONFIG_MAPPING[model_type]().get_text_config()
    assert small.hidden_size == 64 and small.num_hidden_layers <= 4 and small.vocab_size == models.VOCABULARY
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = getattr(whole, name, None)
        assert kinds is None or set(kinds) == set(getattr(small, name))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("model_type", [name for name in models.ABSENT if name != "gemma3n"])
def test_what_is_not_built_here_is_refused_when_it_is_loaded(model_type, tmp_path):
    drafts = model_type == "gemma4_assistant"  # its default config is none that its class takes
    config = {"model_type": model_type} if drafts else json.loads(models.tiny(model_type).to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has an encoder|does not run on text alone|refuses this config.json"):
        hf.read_config(tmp_path / "config.json")
