"""What a sync writes for a server of bridged models: names of transformers' modules and keys of its files."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from treetune.core.rollout import sync
from treetune.models import adapter, hf, plain_model, policy

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).with_name("architectures.py"))
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)


@pytest.fixture(params=["glm4", "deepseek_v3", "gemma3"])
def folder(request, tmp_path):
    with plain_model.without_bars():
        architectures.build(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_adapters_name_modules_of_transformers(folder, tmp_path):
    start = policy.adapt(hf.load(folder), policy.AdapterSpec(rank=2), base=adapter.Base(str(folder), ""), seed=0)
    sync.write(tmp_path / "adapter", lambda part: policy.save(start, part))
    modules = {name for name, module in plain_model.load(folder).named_modules() if isinstance(module, torch.nn.Linear)}
    with safe_open(tmp_path / "adapter" / adapter.WEIGHTS, framework="pt") as file:
        names = {key.removeprefix(adapter.PREFIX).rpartition(".lora_")[0] for key in file.keys()}
    targets = json.loads((tmp_path / "adapter" / adapter.CONFIG).read_text())["target_modules"]
    assert names and names == set(targets) and names <= modules


def test_whole_weights_have_the_keys_of_its_files(folder, tmp_path):
    start = policy.full(hf.load(folder))
    sync.write(tmp_path / "whole", lambda part: policy.save(start, part))
    before, after = load_file(folder / hf.SINGLE), load_file(tmp_path / "whole" / hf.SINGLE)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
