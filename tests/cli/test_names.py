"""Suggestions: names of other tools first, then what differs in a letter or two; never a coincidence."""

from pathlib import Path

import pytest

from treetune.cli import main
from treetune.cli.methods.sft import Sft
from treetune.core.config import suggestions, table

SFT = table.defaults(Sft)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("lr", "learning_rate?"),
        ("bf16", "dtype: bfloat16?"),
        ("base_model", "model?"),
        ("epochs", "num_epochs?"),
        ("batch_size", "micro_batch_size?"),
        ("per_device_train_batch_size", "micro_batch_size?"),
        ("gradient_accumulation", "gradient_accumulation_steps?"),
        ("max_seq_length", "sequence_len?"),
        ("lora_rank", "lora_r?"),
        ("output", "output_dir?"),
        ("load_in_4bit", "quant: nf4?"),
        ("load_in_8bit", "quant: int8?"),
        ("bnb_config_kwargs", "quant: nf4, with quant_double?"),
        ("bnb_4bit_compute_dtype", "dtype?"),
        ("bnb_4bit_use_double_quant", "quant_double?"),
        ("llm_int8_threshold", "holds weights only"),
        ("quantization", "quant?"),
        ("lora_on_cpu", "treetune merge computes on the CPU"),
        ("qlora", "adapter: qlora?"),
        ("gptq", "are not read"),
        ("report_to", "use_wandb"),
        ("learning_rat", "learning_rate?"),
        ("Learning-Rate", "learning_rate?"),
        ("num_epoch", "num_epochs?"),
        ("rl", "treetune dpo"),
        ("trust_remote_code", "never run"),
        ("optim", "optimizer?"),
        ("cutoff_len", "sequence_len?"),
    ],
)
def test_what_other_tools_call_it(word, words):
    assert words in suggestions.of_option(word, SFT)


@pytest.mark.parametrize("word", ["cat", "training_rows", "frobnicate", "zzz", "temperature", "modality", "adaptation"])
def test_coincidences_are_not_suggested(word):
    assert suggestions.of_option(word, SFT) == ""


@pytest.mark.parametrize("command", main.COMMANDS)
def test_what_is_suggested_exists(command):
    known = table.defaults(main.COMMANDS[command].config)
    for word in suggestions.OPTIONS:
        said = suggestions.of_option(word, known)
        if "did you mean " in said:
            assert said.partition("did you mean ")[2].rstrip("?)").partition(":")[0].partition(",")[0].partition(" ")[0] in known


def test_every_name_in_the_table_is_an_option_of_some_command():
    known = {name for command in main.COMMANDS.values() for name in table.defaults(command.config)}
    for word, meant in suggestions.OPTIONS.items():
        head = meant.partition(":")[0].partition(",")[0].partition(" ")[0]
        assert head in known or meant in (suggestions.ALWAYS,) or head == "torchrun", (word, meant)
        assert word not in known or word in ("beta", "rl_beta", "gpu_memory_utilization", "max_model_len", "output") or known, word


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("finetune", "sft"),
        ("evaluate", "eval"),
        ("inference", "generate"),
        ("sfft", "sft"),
        ("DPO", "dpo"),
        ("export", "merge"),
        ("ppo", "grpo"),
    ],
)
def test_commands_of_other_tools(word, words):
    assert words in suggestions.of_command(word, main.COMMANDS)


def test_command_without_a_neighbour():
    assert suggestions.of_command("banana", main.COMMANDS) == ""


def test_flags_are_suggested_as_flags(kit, tune):
    kit.refused(tune("sft", "--lr", 1), "unknown option --lr .did you mean --learning-rate")
    kit.refused(tune("sft", "--bf16"), "did you mean --dtype bfloat16")
    kit.refused(tune("sft", "--no-shufle"), "did you mean --shuffle")
    kit.refused(tune("train"), "needs a config file", "treetune sft")


def test_unknown_flags_come_in_one_line(kit, tune):
    done = tune("sft", "--use_peft", "--eval_strategy", "no", "--report_to", "none", "--use_peft")
    kit.refused(
        done, "unknown options --use_peft .did you mean --adapter lora .the default. or none.., --eval_strategy .did you mean --eval-steps"
    )
    assert "--evals-per-epoch 0 for no" in done.err and "--use-tensorboard" in done.err and done.err.count("--use_peft") == 1


@pytest.mark.parametrize(("name", "ours"), suggestions.PARTS.items())
def test_a_part_of_the_run_is_another_option(name, ours, kit, tune, here):
    kit.refused(tune("sft", f"--{name}", 0.1), f"got '0.1' .did you mean --{ours.replace('_', '-')}")
    Path("run.yaml").write_text(f"{name}: .5\n")
    kit.refused(tune("sft", "run.yaml"), f"did you mean {ours}")
    assert suggestions.of_part(name, "1.5") == "" == suggestions.of_part("max_steps", "0.5")


@pytest.mark.parametrize(("kind", "words"), [("q4_k_m", "-f16.gguf MODEL.gguf Q4_K_M"), ("IQ4_XS", "IQ4_XS"), ("q9", "q8_0")])
def test_a_type_of_llama_cpp_names_its_tool(kind, words, tune):
    done = tune("export", "a", "b", "--gguf", kind)
    assert done.code == 2 and words in done.err and ("llama-quantize" in done.err) == (kind != "q9")
