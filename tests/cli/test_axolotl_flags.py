"""Flags behind a file of axolotl's, which may be its keys, and keys that none of a file's rows would look at."""

import re

import pytest

from treetune.cli import run_file
from treetune.cli.axolotl import flags, rows
from treetune.cli.axolotl.file import File, write
from treetune.cli.methods import METHODS
from treetune.core.config import table
from treetune.core.data import row_formats

FILE = "base_model: m\nadapter: lora\nlora_r: 8\nmicro_batch_size: 2\nlearning_rate: 1e-4\n"
SHOWN = {
    ("--base-model", "other"): "model +other",
    ("--base_model=other",): "model +other",
    ("--model", "other", "--learning_rate=3e-5"): "learning_rate +3e-05",
    ("--load-in-4bit",): "quant +nf4",
    ("--load_in_4bit=true", "--lora-r=4"): "lora_r +4",
    ("--batch-size", "8"): "gradient_accumulation_steps +4",
    ("--rl", "grpo", "--trl.num-generations", "4"): "num_generations +4",
    ("--trl.scale-rewards=false", "--rl=grpo"): "advantage +centered",
    ("--no-flash-attention", "--bf16", "true"): "dtype +bfloat16",
    ("--evaluation-strategy", "no", "--val-set-size", "0.1"): "evals_per_epoch +0",
}


@pytest.mark.parametrize("args", SHOWN, ids=" ".join)
def test_keys_of_axolotl_are_flags_behind_its_files(tune, here, args):
    (here / "a.yaml").write_text(FILE)
    done = tune("train", "a.yaml", "--dry-run", *args)
    assert done.code == 0, done.err
    assert re.search(f"^{SHOWN[args]} *$", done.out, re.M), done.out


def test_flags_win_over_the_section_that_has_the_key(here):
    (here / "a.yaml").write_text(FILE + "rl: grpo\ntrl: {scale_rewards: true}\n")
    given = flags.taken(["--trl.scale-rewards", "batch"], {})[1]
    options = table.options(METHODS["grpo"].config)
    assert run_file.read("a.yaml", "grpo", options, over=given).values["advantage"] == "batch_scaled"


def test_other_flags_and_files_of_ours_are_as_ever(tune, here):
    (here / "a.yaml").write_text(FILE)
    assert "unknown option --bananas" in tune("train", "a.yaml", "--dry-run", "--bananas", 1).err
    assert "spectrum_model_name (nearest" in tune("train", "a.yaml", "--dry-run", "--spectrum-model-name", "a/b").err
    (here / "b.yaml").write_text("method: sft\nmodel: m\n")
    assert "unknown option --base-model" in tune("train", "b.yaml", "--dry-run", "--base-model", "x").err
    assert "unknown option --base-model" in tune("sft", "--base-model", "x").err


KIND = {"text": "sft", "pairs": "dpo", "unpaired": "kto", "ranked": "reward", "steps": "prm"}


@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("option", rows.WITHOUT)
def test_what_is_left_out_is_what_formats_do_not_take(kind, option):
    options = table.options(METHODS[KIND[kind]].config)
    for one in row_formats.of_kind(kind).values():
        name = {"chat": "chat_template", "pretokenised": None, "passthrough": "passthrough.default"}.get(one.name, one.name)
        file = File(KIND[kind], options, {"datasets": write([{"path": "a", "type": name}]), option: write("x")})
        assert (option in rows.idle(file)) == (option not in one.options) or option not in options, (name, option)


def test_the_formats_of_texts_are_those_of_the_table():
    ours = {"chat": "chat_template"}
    names = {ours.get(name, name) for name in row_formats.of_kind("text")} - {
        "pretokenised",
        "prompt_completion",
    }  # the names that are ours alone
    assert names | {"sharegpt"} == rows.TEXTS and set(rows.SAME.values()) <= rows.TEXTS


def test_what_is_left_out_is_told(here):
    (here / "a.yaml").write_text(FILE + "chat_template: chatml\ntrain_on_inputs: true\ndatasets: [{path: a, type: alpaca}]\n")
    file = run_file.read("a.yaml", "sft", table.options(METHODS["sft"].config))
    assert "chat_template" not in file.values and file.values["train_on_inputs"] is True
    assert "  left out, as nothing would look at it: chat_template (rows of alpaca do not take it)" in file.lines
