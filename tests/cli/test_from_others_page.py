"""docs/from_others.md: our names are options or commands, those of TRL and PEFT are theirs, its files are read."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from treetune.cli import main
from treetune.cli.methods import METHODS
from treetune.core.config import suggestions, table

PAGE = (Path(__file__).parents[2] / "docs" / "from_others.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ") and line.count("|") == 6
]
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]
# Of datasets, transformers and TRL that are no fields of a config.
FUNCTIONS = {
    "train_dataset", "eval_dataset", "reward_funcs", "ref_model", "peft_config", "interleave_datasets", "merge_and_unload", "generate",
    "create_loraplus_optimizer", "compute_metrics", "requires_grad_", "attn_implementation", "model", "warmup_ratio", "sft", "revision",
}  # fmt: skip
VALUES = {
    "cut",
    "dpo",
    "kto",
    "rm",
    "pt",
    "sft",
    "requires_grad_",
    "create_loraplus_optimizer",
    "from_pretrained",
    "for_inference",
    "generate",
}


def names(column: int) -> set[str]:
    return {name for row in ROWS for name in re.findall(r"`([a-z][a-z_0-9]+)(?:\(\)|: \w+)?`", row[column])}


def test_every_name_of_ours_exists():
    known = {name for command in main.COMMANDS.values() for name in table.options(command.config)} | main.COMMANDS.keys()
    assert len(names(4)) > 90 and names(4) - known == set()


def test_every_name_of_trl_and_peft_is_a_field_of_theirs():
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    configs = [trl.SFTConfig, trl.DPOConfig, trl.KTOConfig, trl.RewardConfig, trl.GRPOConfig, peft.LoraConfig]
    theirs = {field.name for config in configs for field in dataclasses.fields(config)}
    assert len(names(1)) > 60 and names(1) - theirs - FUNCTIONS == set()


def test_every_name_of_theirs_leads_to_something_of_ours():
    """As a key and as a flag of some command; what is a call, a value, or named alike is left out."""
    options = {name: table.options(command.config) for name, command in main.COMMANDS.items()}
    alike = {name for known in options.values() for name in known} | VALUES
    theirs = {
        name for column in (1, 2, 3) for name in re.findall(r"`([a-z][a-z_0-9]+)(?::[^`]*|=[^`]*)?`", " ".join(row[column] for row in ROWS))
    }
    silent = {name for name in theirs - alike if not any(suggestions.of_option(name, known) for known in options.values())}
    assert len(theirs) > 100 and silent == set()


def test_the_file_of_a_run_has_options():
    run = next(block for block in BLOCKS if "method" in block)
    assert run.keys() - {"method"} - set(table.options(main.COMMANDS[run["method"]].config)) == set() and len(run) > 15


def talk(*turns):
    return [{"from": role, "value": text} for role, text in turns]


SAMPLES = {
    "tools.jsonl": ("sft", {"conversations": talk(("human", "age?"), ("function_call", "f()"), ("observation", "31"), ("gpt", "31"))}, 2),
    "pairs.jsonl": ("dpo", {"conversations": talk(("human", "a?")), "chosen": talk(("gpt", "b"))[0], "rejected": talk(("gpt", "c"))[0]}, 2),
    "pairs_alpaca.jsonl": ("dpo", {"instruction": "a?", "chosen": "b", "rejected": "c"}, 2),
}


@pytest.mark.more
@pytest.mark.parametrize("name", SAMPLES)
def test_entries_read_rows_of_llama_factory(name, tiny, tune, here):
    method, row, trained = SAMPLES[name]
    entry = next(block["datasets"][0] for block in BLOCKS if "datasets" in block and block["datasets"][0]["path"] == name)
    Path(name).write_text(json.dumps(row) + "\n")
    Path("run.yaml").write_text(yaml.safe_dump({"datasets": [entry], "model": str(tiny.model)}))
    done = tune("preprocess", "--method", method, "--config", "run.yaml", "--debug", "1")
    assert done.code == 0 and len(re.findall(r"\[\[.|\{\{.", done.out.partition("row 1")[2])) == trained, done.out + done.err


def test_the_defaults_are_those_of_the_program_and_of_trl():
    said = " ".join(PAGE.partition("- **Defaults.**")[2].partition("- **What is trained.**")[0].split())
    ours = table.defaults(main.COMMANDS["sft"].config)
    named = {"lora_r": 16, "sequence_len": 512, "num_epochs": 1, "val_set_size": 0.1, "overlong": "drop", "adapter": "lora"}
    assert {name: ours[name] for name in named} == named and METHODS["sft"].rates[0] == 2e-4
    assert "an adapter of rank 16 on all linear layers at 2e-4, rows up to 512 tokens, longer ones dropped" in said
    trl = pytest.importorskip("trl")
    theirs = trl.SFTConfig(output_dir="x", bf16=False)
    assert (theirs.learning_rate, theirs.max_length, theirs.num_train_epochs) == (2e-5, 1024, 3)
    assert "at 2e-5, with rows up to 1024 tokens, which are cut, for 3 epochs" in said
