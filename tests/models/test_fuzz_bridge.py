"""Mutated configs of models without a native family: one line that names the file, or the logits that transformers gives."""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch

from treetune.models import certificate_checks, hf, plain_model

FAST, SLOW = 20, 600  # mutations of each config
IDS = [30, 117, 60, 72, 72, 95, 40]
# What some model has and others do not: of another meaning in each, or of none.
NEW = [
    "attention_sparsity", "logits_scaling", "query_pre_attn_scalar", "residual_multiplier", "use_alibi", "rope_theta", "rope_scaling",
    "sliding_window", "final_logit_softcapping", "n_future_heads", "partial_rotary_factor", "quantization_config",
]  # fmt: skip


def module(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


architectures, files = module("architectures"), module("test_fuzz_files")


def write(kind, folder):
    """A small random model; of one with several parts, all of them."""
    import transformers

    config = architectures.tiny(kind)
    with plain_model.without_bars():
        torch.manual_seed(0)
        if kind in ("gemma3", "qwen3_5"):
            getattr(transformers, f"{'Gemma3' if kind == 'gemma3' else 'Qwen3_5'}ForConditionalGeneration")(config).save_pretrained(folder)
        else:
            architectures.build(kind).save_pretrained(folder)


MANY = ("glm4", "deepseek_v3", "gemma3", "qwen3_5", "cohere2", "stablelm")
OTHERS = [pytest.param(kind, "many", marks=pytest.mark.slow) for kind in MANY]
PARTS = ((), ("text_config",), ("text_config", "rope_parameters"))
PLACES = [("glm4", ()), ("gemma3", ("text_config", "rope_parameters"))]
PLACES += [pytest.param(*case, marks=pytest.mark.slow) for case in (("glm4", ("rope_parameters",)), ("gemma3", ()), ("gemma3", PARTS[1]))]


@pytest.mark.parametrize("kind,count", [("glm4", "few"), pytest.param("gemma3", "few", marks=pytest.mark.slow), *OTHERS])
def test_config(tmp_path, kind, count):
    write(kind, tmp_path)
    values, file = json.loads((tmp_path / "config.json").read_text()), tmp_path / "config.json"
    taken, told = 0, 0
    for changes, changed in files.mutations(values, NEW, FAST if count == "few" else SLOW, seed=1):
        file.write_text(json.dumps(changed))
        try:
            model = hf.load(tmp_path)
            with torch.no_grad():
                ours = certificate_checks.logits(model, certificate_checks.pack([IDS]))
        except ValueError as error:
            files.one_line(error, file, changes)
            told += 1
            continue
        taken += 1
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            theirs = plain_model.logits(plain_model.load(tmp_path), IDS)
        files.same(ours, theirs)
    assert taken and told


@pytest.mark.more
@pytest.mark.parametrize("kind,place", PLACES)
def test_what_transformers_does_not_know_is_refused_unless_it_is_off(tmp_path, kind, place):
    from treetune.models import hf as folders

    values = json.loads(architectures.tiny(kind).to_json_string(use_diff=False))
    inner = values
    for name in place:
        inner = inner[name]
    file = tmp_path / "config.json"
    for value in (1, 0.5, True, "yes", [1]):
        inner["query_multiplier"] = value
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match="config.json.* has query_multiplier = .*does not know of"):
            folders.read_config(file)
    for value in (None, False, 0, "", []):
        inner["query_multiplier"] = value
        file.write_text(json.dumps(values))
        assert folders.read_config(file)[0] == kind


def test_fields_of_older_files_are_those_of_newer_ones(tmp_path):
    """`rope_theta` and `rope_scaling` have gone into `rope_parameters`."""
    write("glm4", tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values |= {"rope_theta": 321.0, "partial_rotary_factor": values.pop("rope_parameters")["partial_rotary_factor"]}
    file.write_text(json.dumps(values))
    with torch.no_grad():
        ours = certificate_checks.logits(hf.load(tmp_path), certificate_checks.pack([IDS]))
        files.same(ours, plain_model.logits(plain_model.load(tmp_path), IDS))
        file.write_text(json.dumps(values | {"rope_theta": 10000.0}))
        assert (ours - certificate_checks.logits(hf.load(tmp_path), certificate_checks.pack([IDS]))).abs().max() > 1e-3
