"""Options of adapters that contradict each other, or what cannot be computed: refused in a line, before anything is written."""

import pytest
import torch

from treetune.core import tree
from treetune.core.quant import Scheme
from treetune.models import hf, quantised

REFUSED = {
    "loftq, dense": (["--lora-init", "loftq"], "lora_init loftq", "the model is not quantised", "give quant"),
    "qera, dense": (["--lora-init", "qera"], "lora_init qera", "the model is not quantised", "give quant"),
    "pissa, dropout": (["--lora-init", "pissa", "--lora-dropout", 0.1], "lora_init pissa", "needs lora_dropout 0"),
    "corda, dropout": (["--lora-init", "corda", "--lora-dropout", 0.1], "lora_init corda", "needs lora_dropout 0"),
    "rows, pissa": (
        ["--lora-init", "pissa", "--lora-init-rows", 8], "--lora-init-rows would be ignored: lora_init is pissa"
    ),
    "relora, corda": (["--relora-steps", 2, "--lora-init", "corda"], "relora_steps", "lora_init corda"),
    "rank, part": (["--lora-rank-pattern", "q_proj=2.5"], "lora_rank_pattern needs whole numbers from 1", "'q_proj=2.5'"),
    "rank, zero": (["--lora-rank-pattern", "q_proj=0"], "lora_rank_pattern needs whole numbers from 1"),
    "rank, none": (["--lora-rank-pattern", "q_proj"], "--lora-rank-pattern takes REGEX=NUMBER"),
    "rank, nowhere": (["--lora-rank-pattern", "q_prj=2"], "lora_rank_pattern: 'q_prj' matches no parameter"),
    "alpha, zero": (["--lora-alpha-pattern", "q_proj=0"], "lora_alpha_pattern needs numbers above 0"),
    "alpha, not adapted": (
        ["--lora-target-modules", "v_proj", "--lora-alpha-pattern", "q_proj=3"], "lora_alpha_pattern: 'q_proj' matches no parameter"
    ),
    "dora, head": (["--lora-dora", "--lora-target-modules", "all-linear", "lm_head"], "lora_dora: lm_head", "linear layers only"),
    "dora, whole": (["--lora-dora", "--adapter", "none"], "--lora-dora would be ignored: adapter is none"),
    "init, whole": (["--lora-init", "pissa", "--adapter", "none"], "--lora-init would be ignored: adapter is none"),
    "unfrozen, nowhere": (["--adapter", "none", "--unfrozen-parameters", "nrom"], "unfrozen_parameters: 'nrom' matches no parameter"),
    "unfrozen, adapted": (["--unfrozen-parameters", "q_proj"], "q_proj is trained whole and", "choose one of the two"),
    "unfrozen, quantised": (
        ["--adapter", "none", "--quant", "nf4", "--unfrozen-parameters", "q_proj"], "unfrozen_parameters: layers.0.q_proj is quantised"
    ),
    "bias, none": (["--lora-bias", "all"], "lora_bias all: the model has no bias"),
    "relora, quantised": (["--relora-steps", 2, "--quant", "nf4"], "relora_steps merges", "between codes of nf4", "leave quant out"),
    "relora, pissa": (["--relora-steps", 2, "--lora-init", "pissa"], "relora_steps", "lora_init pissa"),
    "relora, long": (["--relora-steps", 2, "--relora-warmup-steps", 3], "relora_warmup_steps and", "longer than the 2 steps"),
    "relora, averages": (["--relora-steps", 2, "--optimizer", "schedule_free_adamw"], "relora_steps", "averages weights"),
    "relora, factors": (
        ["--relora-steps", 2, "--optimizer", "adafactor", "--relora-prune-ratio", 0.5], "relora_prune_ratio 0.5", "give 1"
    ),
    "relora, ratio": (["--relora-prune-ratio", 0.5], "--relora-prune-ratio would be ignored: relora_steps is not given"),
    "quant, all": (["--adapter", "none", "--quant", "nf4"], "quant", "weights that train are not quantised"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_line(case, kit, tiny, tune, here):
    args, *words = REFUSED[case]
    without = ("--lora-r",) if "none" in args else ()
    done = tune("sft", *kit.basics(tiny, *args, "--output-dir", "run", without=without))
    assert done.code == 2 and all(word in done.err for word in words) and done.err.count("\n") <= 2, done.err
    assert not (here / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("command", ["dpo", "kto", "grpo", "ebft"])
def test_a_base_that_moves_is_no_reference(command, kit, tiny, tune, here):
    done = tune(command, "--model", tiny.model, "--relora-steps", 2, "--output-dir", "run")
    kit.refused(done, f"relora_steps merges the adapter into the model that {command} compares the policy with")


@pytest.mark.parametrize("args", [["--lora-dora"], ["--lora-rank-pattern", "q_proj=2"], ["--lora-alpha-pattern", "q_proj=2"]], ids=str)
def test_servers_take_plain_adapters_only(args, kit, tiny, tune, here):
    kit.write_rows(here / "prompts.jsonl", [{"prompt": f"{i} + 1 ="} for i in range(8)])
    (here / "rewards.py").write_text("def one(completions):\n    return [1.0 for _ in completions]\n")
    options = ["--model", tiny.model, "--data", "prompts.jsonl", "--reward-funcs", "rewards.py:one", "--use-vllm"]
    done = tune("grpo", *options, *args, "--output-dir", "run")
    assert done.code == 2 and "vLLM computes no DoRA, and one scale for all of an adapter" in done.err, done.err


def test_prompts_orient_no_adapter(kit, tiny, tune, here):
    kit.write_rows(here / "prompts.jsonl", [{"prompt": f"{i} + 1 ="} for i in range(8)])
    (here / "rewards.py").write_text("def one(completions):\n    return [1.0 for _ in completions]\n")
    options = ["--model", tiny.model, "--data", "prompts.jsonl", "--reward-funcs", "rewards.py:one", "--lora-init", "corda"]
    kit.refused(tune("grpo", *options, "--output-dir", "run"), "lora_init corda starts from rows of the training data")


def test_chosen_weights_train_over_a_quantised_model(kit, tiny, tune, here):
    args = ["--adapter", "none", "--quant", "nf4", "--unfrozen-parameters", "norm", "--output-dir", "run", "--max-steps", 2]
    done = tune("sft", *kit.basics(tiny, *args, without=("--lora-r", "--max-steps")))
    assert done.code == 0, done.err
    kept, start = hf.load(here / "run/model"), hf.load(tiny.model, scheme=Scheme("nf4"))
    before, after = dict(tree.items(quantised.dense(start).params)), dict(tree.items(kept.params))
    for path, leaf in before.items():
        assert torch.equal(leaf, after[path]) != path.endswith("norm"), path
