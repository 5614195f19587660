"""Runs on quantised models: what the options mean, what is refused, and that commands take the base as an adapter was trained on it."""

import json

import pytest
import torch
import yaml

from treetune.core import quant, tree
from treetune.models import hf

RUN = ["--max-steps", 2, "--learning-rate", 0.05, "--lora-r", 4, "--sample-prompt="]


def losses(kit, root):
    return [record[key] for record in kit.metrics(root) for key in ("train/loss", "eval/loss") if key in record]


def test_qlora_is_lora_on_a_model_in_nf4(kit, tiny, here, tune):
    for name, options in (("one", ["--adapter", "qlora"]), ("other", ["--quant", "nf4"])):
        assert tune("sft", *kit.basics(tiny, *RUN, *options, "--output-dir", name)).code == 0
    assert losses(kit, here / "one") == losses(kit, here / "other")
    config = yaml.safe_load((here / "one" / "config.yaml").read_text())
    assert (config["adapter"], config["quant"]) == ("lora", "nf4")


def test_an_adapter_is_used_on_the_base_it_was_trained_on(kit, tiny, here, tune):
    assert tune("sft", *kit.basics(tiny, *RUN, "--quant", "nf4", "--no-quant-double", "--output-dir", "run")).code == 0
    recorded = json.loads((here / "run" / "adapter" / "treetune_base.json").read_text())["quantised"]
    assert recorded == {"quant": "nf4", "quant_double": False, "quantize_moe_experts": True}
    evaluate = ["eval", "--adapter", "run", "--data", tiny.chat, "--sequence-len", 128]

    def loss(*options):
        done = tune(*evaluate, *options)
        assert done.code == 0, done.err
        return next(line.split()[1] for line in done.out.splitlines() if line.startswith("loss"))

    assert loss() == loss("--quant", "nf4", "--no-quant-double") != loss("--quant", "none")
    assert tune("merge", "run", "merged").code == 0
    further = ["--lora-model-dir", "run/adapter", "--output-dir", "further", "--max-steps", 1, "--sample-prompt=", "--learning-rate", 0.01]
    assert tune("sft", "--data", tiny.chat, "--sequence-len", 128, *further).code == 0
    assert yaml.safe_load((here / "further" / "config.yaml").read_text())["quant"] == "nf4"


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("sft", ["--adapter", "none", "--quant", "nf4"], "weights that train are not quantised"),
        ("sft", ["--adapter", "qlora", "--quant", "none"], "qlora trains on a quantised model, and quant is none"),
        ("sft", ["--quant", "int8", "--no-quant-double"], "quant is int8"),
        ("sft", ["--no-quantize-moe-experts"], "quant is auto"),
        ("sft", ["--quant", "nf4", "--fp8-products"], "quant is nf4"),
        ("sft", ["--quant", "fp8", "--fp8-products", "--lora-dora"], "fp8_products multiplies their codes: leave one out"),
        ("pretrain", ["--from-config", "shape", "--quant", "nf4"], "from_config starts from random weights"),
    ],
)
def test_what_would_do_nothing_is_refused(command, options, words, kit, tiny, here, tune):
    (here / "shape").mkdir()
    (here / "shape" / "config.json").write_text((tiny.model / "config.json").read_text())
    done = tune(command, "--model", tiny.model, "--data", tiny.text if command == "pretrain" else tiny.chat, *options)
    assert done.code == 2 and words in " ".join(done.err.split()), done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_that_was_trained_rounded_is_quantised_to_what_was_evaluated(kind, kit, tiny, here, tune):
    options = ["--adapter", "none", "--qat", kind, "--max-steps", 3, "--learning-rate", 1e-3, "--sample-prompt=", "--val-data", tiny.text]
    done = tune("sft", *kit.basics(tiny, *options, "--output-dir", "run"))
    assert done.code == 0, done.err
    records = kit.metrics(here / "run")
    last = [record["eval/loss"] for record in records if "eval/loss" in record][-1]
    evaluate = ["eval", "--model", "run/model", "--data", tiny.text, "--sequence-len", 128]

    def loss(*more):
        done = tune(*evaluate, *more)
        assert done.code == 0, done.err
        return float(next(line.split()[1] for line in done.out.splitlines() if line.startswith("loss")))

    assert loss("--quant", kind) == pytest.approx(last, abs=5e-5) != pytest.approx(loss(), abs=5e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp4", "int4", "int8"))])
def test_the_files_of_a_model_that_was_trained_rounded_hold_what_it_computed_with(kind, kit, tiny, here, tune):
    model = kit.write_model(here / "base", hidden_size=64, mlp_size=192, head_dim=16)
    options = ["--adapter", "none", "--qat", kind, "--max-steps", 2, "--learning-rate", 1e-2, "--sample-prompt="]
    assert tune("sft", *kit.basics(tiny, "--model", model, *options, "--output-dir", "run")).code == 0
    assert tune("quantize", "run/model", "small", "--quant", kind).code == 0
    for dtype in (torch.float32, torch.bfloat16):
        trained, small = hf.load(here / "run/model", dtype=torch.float32), hf.load(here / "small", dtype=dtype)
        chosen = [(path, leaf) for path, leaf in tree.items(small.params) if quant.quantised(leaf)]
        whole = dict(tree.items(trained.params))
        assert len(chosen) == 14
        for path, leaf in chosen:
            assert torch.equal(quant.dense(leaf, dtype), quant.rounded(whole[path], quant.Scheme(kind)).to(dtype)), path
