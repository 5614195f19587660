"""Which model an adapter goes with, and what a folder that is named as a model means."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from treetune.core import manifest, tree
from treetune.models import adapter, hf, identity


@pytest.fixture(scope="module")
def trained(tiny, kit, tmp_path_factory):
    """The folder of a finished LoRA run on the tiny model."""
    from treetune.cli import main

    root = tmp_path_factory.mktemp("trained") / "run"
    args = kit.basics(tiny, "--output-dir", root, "--sample-prompt=", "--save-steps", 1)
    assert main.main(["sft", *args]) == 0
    return root


@pytest.fixture
def foreign(trained, here):
    """The adapter of that run as another tool would leave it: no manifest, no record of its base but a name."""
    shutil.copytree(trained / "adapter", here / "foreign")
    (here / "foreign" / manifest.NAME).unlink()
    (here / "foreign" / adapter.BASE_FILE).unlink()
    return here / "foreign"


def renamed(folder, base):
    config = json.loads((folder / adapter.CONFIG).read_text()) | {"base_model_name_or_path": base}
    (folder / adapter.CONFIG).write_text(json.dumps(config))


def test_an_adapter_records_its_base(trained, tiny):
    known = adapter.base(trained / "adapter")
    assert known == (str(tiny.model), identity.digest(hf.load(tiny.model)), None)
    assert identity.digest(hf.load(tiny.same)) != known.digest


def test_the_digest_of_a_model_is_that_of_any_dtype(tiny):
    whole = hf.load(tiny.untied)
    low = hf.load(tiny.untied, dtype=torch.bfloat16)
    assert identity.digest(low) == identity.digest(whole)
    headless = {name: leaf for name, leaf in whole.params.items() if name != "lm_head"}
    assert identity.digest(whole._replace(params=headless)) == identity.digest(whole)
    moved = tree.map(torch.clone, whole.params)
    moved["layers"][1]["up_proj"] += 0.1
    assert identity.digest(whole._replace(params=moved)) != identity.digest(whole)


def test_training_goes_on_from_the_base_of_the_adapter(trained, sft, tiny, here):
    done = sft("--lora-model-dir", trained, "--max-steps", 1, "--sample-prompt=", without=("--model", "--lora-r"))
    assert done.code == 0, done
    assert adapter.base(here / "runs/sft-001/adapter") == adapter.base(trained / "adapter")
    assert f"model: {tiny.model}" in (here / "runs/sft-001/config.yaml").read_text()


RUN = ("--sequence-len", 128, "--max-steps", 1, "--sample-prompt=")
COMMANDS = {
    "sft": lambda t, run, base: ["sft", "--data", t.chat, "--lora-model-dir", run, "--model", base, *RUN],
    "generate": lambda t, run, base: ["generate", "hi", "--adapter", run, "--model", base, "--max-new-tokens", 2],
    "eval": lambda t, run, base: ["eval", "--data", t.chat, "--sequence-len", 128, "--adapter", run, "--model", base],
    "merge": lambda t, run, base: ["merge", run, "merged", "--model", base],
}


def test_an_adapter_trains_on_its_own_base_only(trained, tune, kit, tiny, here):
    done = tune(*COMMANDS["sft"](tiny, trained, tiny.same))
    kit.refused(done, "was trained on", str(tiny.model), str(tiny.same), "leave --model out")
    assert kit.listing(here) == set()


@pytest.mark.parametrize("command", ["generate", "eval", "merge"])
def test_a_base_that_is_known_to_be_another_is_told(trained, tune, tiny, command):
    done = tune(*COMMANDS[command](tiny, trained, tiny.same))
    assert done.code == 0, done
    assert f"was trained on {tiny.model}, and the weights of {tiny.same} are others" in " ".join(done.out.split())


def test_a_base_that_has_changed_since_is_refused(trained, tune, kit, tiny, here):
    shutil.copytree(trained, here / "run")
    record = json.loads((here / "run/adapter" / adapter.BASE_FILE).read_text()) | {"digest": "0" * 64}
    (here / "run/adapter" / adapter.BASE_FILE).write_text(json.dumps(record))
    (here / "run/adapter" / manifest.NAME).unlink()
    kit.refused(tune("generate", "hi", "--adapter", "run"), "which has other weights now")


def test_the_same_base_under_another_name_is_taken(trained, tune, tiny, here):
    shutil.copytree(tiny.model, here / "moved")
    done = tune(*COMMANDS["generate"](tiny, trained, here / "moved"))
    assert done.code == 0 and "names the base model" not in done.out + done.err


@pytest.mark.parametrize("command", ["sft", "generate", "eval", "merge"])
def test_a_base_that_may_be_another_is_told(foreign, tune, tiny, command):
    done = tune(*COMMANDS[command](tiny, foreign, tiny.same))
    assert done.code == 0, done
    assert f"names the base model {tiny.model}; it is used on {tiny.same}" in " ".join(done.out.split())


def test_an_adapter_without_a_base_asks_for_one(foreign, tune, kit, tiny):
    renamed(foreign, None)
    kit.refused(tune("generate", "hi", "--adapter", foreign), "names no base model: name it with --model")
    done = tune("sft", "--data", tiny.chat, "--lora-model-dir", foreign, *RUN)
    kit.refused(done, "names no base model")
    assert tune("generate", "hi", "--adapter", foreign, "--model", tiny.model, "--max-new-tokens", 2).code == 0


def test_a_full_run_is_a_model(sft, tune, tiny, kit, here):
    done = sft("--adapter", "none", "--output-dir", "full", "--max-steps", 1, "--save-steps", 1)
    assert done.code == 0, done
    assert tune("generate", "hi", "--model", "full", "--max-new-tokens", 2).code == 0
    assert tune("eval", "--data", tiny.chat, "--sequence-len", 128, "--model", "full").code == 0
    done = sft("--model", "full", "--max-steps", 1, "--sample-prompt=")
    assert done.code == 0, done
    assert adapter.base_of(here / "runs/sft-001/adapter") == str(here / "full" / "model")
    checkpoint = "full/checkpoints/step_000001"
    kit.refused(tune("generate", "hi", "--model", checkpoint), "is a checkpoint, not a model: name its run full")
    shutil.rmtree("full/model")
    kit.refused(tune("generate", "hi", "--model", "full"), "left no model yet")


def test_an_adapter_is_no_model(trained, tune, kit):
    for name in (trained, trained / "adapter"):
        kit.refused(tune("generate", "hi", "--model", name), "holds an adapter, not a model", f"--adapter {name}")


def test_tokens_past_the_rows_of_the_model(kit, tune, sft, here):
    """A tokenizer of 259 tokens on a model of 250 rows: the chat template writes tokens that the model lacks."""
    base = kit.write_model(here / "short", vocab_size=250)
    before = kit.listing(here)
    kit.refused(tune("generate", "hi", "--model", base), r"token id 25\d, the model ids up to 249")
    kit.refused(sft("--model", base, "--sample-prompt", "hi"), r"token id 25\d, the model has 250")
    (here / "rows.jsonl").write_text(json.dumps({"text": "a cat sat"}) + "\n" + json.dumps({"text": "a dog"}) + "\n")
    done = tune("pretrain", "--model", base, "--data", "rows.jsonl", "--sequence-len", 32, "--max-steps", 1, "--no-append-eos",
                "--val-set-size", 0, "--sample-prompt", "<|im_end|>")  # fmt: skip
    assert done.code == 2, done
    assert kit.listing(here) - before == {"rows.jsonl"}


def test_weights_that_are_not_finite_are_told(kit, tune, here):
    base = kit.write_model(here / "broken")
    leaves = load_file(base / hf.SINGLE)
    leaves["model.norm.weight"][3] = float("nan")
    save_file(leaves, base / hf.SINGLE)
    kit.refused(tune("generate", "hi", "--model", base), "weights that are not finite: norm")
