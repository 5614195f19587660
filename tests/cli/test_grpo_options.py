"""Every option of `treetune grpo` changes what a run computes, or is refused where the run would not look at it."""

import importlib.util
import json
from pathlib import Path

import pytest

from treetune.cli.methods.grpo import Grpo
from treetune.cli.options import policy_loss
from treetune.cli.options import rollout as rollout_options
from treetune.cli.options.policy_loss import PolicyLoss
from treetune.core.config import table
from treetune.core.rollout import reward_pool

spec = importlib.util.spec_from_file_location("grpo_runs", Path(__file__).with_name("test_grpo.py"))
runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runs)
learn, steps = runs.learn, runs.steps  # the fixtures
SPREAD = runs.SPREAD

MORE = """
import time

def turned(cfg, **kwargs):
    def fn(row, tokenizer=None):
        return {"prompt": [{"role": "user", "content": row["answer"][::-1] + "?"}]}
    return fn

def shout(prompts, generate, *, num_generations, tokenizer):
    asked = [prompt["tokens"] for prompt in prompts for _ in range(num_generations)]
    found = generate(asked, max_tokens=2)
    return [found[i * num_generations : (i + 1) * num_generations] for i in range(len(prompts))]

def slow(completions):
    time.sleep(0.5 if len(completions) == 1 and sum(map(ord, completions[0][0]["content"])) % 3 == 0 else 0)
    assert len(completions) == 1, "in pieces"
    return [sum(map(ord, completions[0][0]["content"])) % 5]
"""
CHATS = [{"prompt": [{"role": "user", "content": runs.prompt(i)["prompt"]}], "answer": str(i), "other": f"{i}?"} for i in range(20)]
NAMED = "{{ name }}{% for m in messages %}{{ m.content }}{% endfor %}"
MOVED = ["--steps-per-generation", 2, "--max-steps", 3, "--learning-rate", 0.3]  # the policy has left what sampled
AHEAD = ["--async-prefetch", "--max-steps", 3, "--learning-rate", 0.3]
HELD = ["--beta", 0.3, "--learning-rate", 0.1]
FULL = ["--adapter", "none", "--learning-rate", 0.003, "--beta", 0.3]
SYNC = [*FULL, "--sync-ref-model", "--max-steps", 3]
BONUS = ["--use-adaptive-entropy", "--entropy-target", 9, "--max-steps", 3]
DIGITS = ["--reward-funcs", "digits", "--max-steps", 6, "--micro-batch-size", 1]
STOPS = ["--stop-token-ids", *range(40, 100)]
# option -> (the arguments that set it, arguments on both sides)
CHANGES = {
    "max_rows": (["--max-rows", 7], []),
    "field_prompt": (["--field-prompt", "other"], []),
    "prompt_transform": (["--prompt-transform", "more.py:turned"], []),
    "default_system_message": (["--default-system-message", "Add."], []),
    "max_prompt_len": (["--max-prompt-len", 30], []),
    "chat_template": (["--chat-template", NAMED], []),
    "chat_template_kwargs": (["--chat-template-kwargs", "name=Ada"], ["--chat-template", NAMED]),
    "data": (["--data", "other.jsonl"], []),
    "val_set_size": (["--val-set-size", 4], []),
    "num_generations": (["--num-generations", 3], []),
    "max_completion_length": (["--max-completion-length", 5], []),
    "temperature": (["--temperature", 0.8], []),
    "top_p": (["--top-p", 0.7], []),
    "top_k": (["--top-k", 20], []),
    "min_p": (["--min-p", 0.05], []),
    "stop_token_ids": (STOPS, []),
    "rollout_func": (["--rollout-func", "more.py:shout"], []),
    "reward_funcs": (["--reward-funcs", "rewards.py:most"], []),
    "reward_weights": (["--reward-weights", 1, 3], ["--reward-funcs", SPREAD, "rewards.py:most"]),
    "reward_timeout": (["--reward-timeout", 0.2], ["--reward-funcs", "more.py:slow", "--max-steps", 1, "--gradient-accumulation-steps", 1]),
    "loss": (["--loss", "rloo"], []),
    "advantage": (["--advantage", "centered"], []),
    "aggregate": (["--aggregate", "sum"], []),
    "importance_sampling_level": (["--importance-sampling-level", "sequence"], MOVED),
    "epsilon": (["--epsilon", 0.01, "--epsilon-high", 0.28], MOVED),
    "epsilon_high": (["--epsilon-high", 0.01], MOVED),
    "delta": (["--delta", 1.02], [*MOVED, "--epsilon", 0.01]),
    "sapo_tau_pos": (["--sapo-tau-pos", 1.5], [*MOVED, "--loss", "sapo"]),
    "sapo_tau_neg": (["--sapo-tau-neg", 1.5], [*MOVED, "--loss", "sapo"]),
    "beta": (["--beta", 0.2], ["--learning-rate", 0.1]),
    "kl_estimator": (["--kl-estimator", "k2"], HELD),
    "use_bias_correction_kl": (["--no-use-bias-correction-kl"], HELD),
    "entropy_coef": (["--entropy-coef", 0.1], []),
    "use_adaptive_entropy": (["--use-adaptive-entropy"], ["--entropy-coef", 0.1]),
    "entropy_target": (["--entropy-target", 1], BONUS),
    "entropy_coef_delta": (["--entropy-coef-delta", 0.5], BONUS),
    "entropy_coef_max": (["--entropy-coef-max", 0.001], BONUS),
    "top_entropy_quantile": (["--top-entropy-quantile", 0.3], []),
    "router_aux_loss_coef": (["--router-aux-loss-coef", 0.5], ["--model", "experts"]),
    "router_z_loss_coef": (["--router-z-loss-coef", 0.5], ["--model", "experts"]),
    "mask_truncated_completions": (["--mask-truncated-completions"], STOPS),
    "vllm_importance_sampling_correction": (["--no-vllm-importance-sampling-correction"], AHEAD),
    "vllm_importance_sampling_mode": (["--vllm-importance-sampling-mode", "sequence_mask"], AHEAD),
    "vllm_importance_sampling_cap": (["--vllm-importance-sampling-cap", 1.001], AHEAD),
    "vllm_importance_sampling_min": (["--vllm-importance-sampling-min", 0.999], AHEAD),
    "off_policy_mask_threshold": (["--off-policy-mask-threshold", 0.001], AHEAD),
    "steps_per_generation": (["--steps-per-generation", 2], []),
    "num_iterations": (["--num-iterations", 2], []),
    "async_prefetch": (["--async-prefetch"], ["--learning-rate", 0.3, "--max-steps", 3]),
    "prefetch_depth": (["--prefetch-depth", 3], [*AHEAD, "--max-steps", 5]),
    "streaming_partial_batch": (["--streaming-partial-batch"], []),
    "streaming_min_groups": (["--streaming-min-groups", 2], ["--streaming-partial-batch"]),
    "dynamic_sampling": (["--dynamic-sampling"], DIGITS),
    "replay_buffer_size": (["--replay-buffer-size", 4], DIGITS),
    "reroll_start_fraction": (["--reroll-start-fraction", 0.2], DIGITS),
    "reroll_max_groups": (["--reroll-max-groups", 3], [*DIGITS, "--gradient-accumulation-steps", 4, "--reroll-start-fraction", 0.2]),
    "skip_zero_advantage_batches": (["--no-skip-zero-advantage-batches"], DIGITS),
    "log_completions": (["--no-log-completions"], []),
    "num_completions_to_print": (["--num-completions-to-print", 3], []),
    "reward_num_workers": (["--reward-num-workers", 2], []),
    "ref_model": (["--ref-model", "SAME"], ["--beta", 0.3]),
    "sync_ref_model": (["--sync-ref-model", "--ref-model-sync-steps", 1], [*FULL, "--max-steps", 3]),
    "ref_model_sync_steps": (["--ref-model-sync-steps", 1], SYNC),
    "ref_model_mixup_alpha": (["--ref-model-mixup-alpha", 0.2], [*SYNC, "--ref-model-sync-steps", 1]),
    "learning_rate": (["--learning-rate", 0.02], []),
    "lr_scheduler": (["--lr-scheduler", "linear"], []),
    "micro_batch_size": (["--micro-batch-size", 1], []),
    "gradient_accumulation_steps": (["--gradient-accumulation-steps", 1], []),
    "seed": (["--seed", 7], []),
}
AS_MANY_NUMBERS = {"streaming_partial_batch", "streaming_min_groups", "skip_zero_advantage_batches", "log_completions",
                   "num_completions_to_print", "reward_num_workers"}  # fmt: skip


@pytest.fixture
def told(kit, tiny, here, learn, monkeypatch):
    """told(args, name) -> (what training was, what else a run did)."""
    (here / "more.py").write_text(MORE)
    kit.write_experts(here / "experts")
    kit.write_rows(here / "other.jsonl", CHATS[::-2])
    sizes, plain = [], reward_pool.Pool.score
    monkeypatch.setattr(
        reward_pool.Pool, "score", lambda self, groups: sizes.append((len(groups), len(self.pids()))) or plain(self, groups)
    )

    def run(args, name):
        sizes.clear()
        done = learn(*[tiny.same if arg == "SAME" else arg for arg in args], "--output-dir", name, rows=CHATS)
        assert done.code == 0, done.err
        records = runs.stable(kit, here / name)
        samples = (here / name / "samples.jsonl").read_text() if (here / name / "samples.jsonl").exists() else None
        skipped = [record.get("skipped_zero_adv_batches") for record in records]
        numbers = [[record["train/loss"], record["grad_norm"], record["learning_rate"]] for record in records if "train/loss" in record]
        said = [line for line in done.out.splitlines() if "advantage" in line and line.startswith("  '")]
        return numbers, (samples, skipped, said, list(sizes))

    return run


def joined(base: list, more: list) -> list:
    """Arguments in which those of `more` replace those of `base`."""
    known = {arg for arg in more if str(arg).startswith("--")}
    kept, keep = [], True
    for arg in base:
        keep = arg not in known if str(arg).startswith("--") else keep
        kept += [arg] if keep else []
    return kept + more


@pytest.fixture(scope="module")
def plain_runs():
    """{arguments: what a run with them told}: many options are compared with the same one."""
    return {}


PLAIN = ("max_rows", "data", "num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p", "reward_funcs", "seed",
         "learning_rate", "lr_scheduler", "micro_batch_size", "gradient_accumulation_steps", "loss", "advantage")  # fmt: skip
# What these do is the subject of a test of its own, here or beside.
TOLD = ("chat_template", "default_system_message", "rollout_func", "reward_weights", "entropy_target", "entropy_coef_delta",
        "entropy_coef_max", "router_aux_loss_coef", "async_prefetch", "prefetch_depth", "streaming_min_groups", "dynamic_sampling",
        "replay_buffer_size", "reroll_max_groups", "reroll_start_fraction", "sapo_tau_neg", "ref_model_mixup_alpha",
        "vllm_importance_sampling_min", "router_z_loss_coef", "learning_rate", "lr_scheduler", "micro_batch_size",
        "skip_zero_advantage_batches", "sync_ref_model", "ref_model_sync_steps")  # fmt: skip


@pytest.mark.sampled(5)
@pytest.mark.parametrize("option", [pytest.param(name, marks=pytest.mark.slow) if name in PLAIN + TOLD else name for name in CHANGES])
def test_option_changes_the_run(option, told, plain_runs):
    own, both = CHANGES[option]
    key = tuple(map(str, both))
    plain = plain_runs[key] = plain_runs[key] if key in plain_runs else told(both, "plain")
    changed = told(joined(both, own), "changed")
    if option in AS_MANY_NUMBERS:
        ours, theirs = ([value for step in numbers for value in step] for numbers in (changed[0], plain[0]))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6) and changed[1] != plain[1]
    else:
        assert plain[0] != changed[0], "the numbers of training, not only what is printed"


GROUPS = ("data", "rollout", "rewards", "loss", "correction", "pipeline", "engine", "reference")
ELSEWHERE = {"datasets", "split", "val_data"}  # tests of their own, here or for evaluation


def test_there_is_a_row_for_every_option():
    expected = {option for group in GROUPS for option in vars(getattr(Grpo(), group))}
    vllm = {*vars(Grpo().engine), *rollout_options.VLLM_ONLY, "vllm_sync_interval"}
    assert set(CHANGES) - set(vars(Grpo().optim)) == expected - vllm - ELSEWHERE


def test_the_defaults_of_the_documents():
    flat = table.flatten(Grpo())
    expected = {
        "loss": "dapo", "beta": 0.0, "num_generations": 8, "max_completion_length": 256, "temperature": 1.0, "num_iterations": 1,
        "entropy_target": 0.2, "entropy_coef_delta": 0.005, "entropy_coef_max": 1.0, "vllm_importance_sampling_cap": 3.0,
        "vllm_importance_sampling_correction": True, "replay_buffer_size": 0, "reroll_start_fraction": 1.0, "reroll_max_groups": 1,
        "skip_zero_advantage_batches": True, "prefetch_depth": 1, "streaming_min_groups": 1, "ref_model_sync_steps": 512,
        "ref_model_mixup_alpha": 0.6, "top_entropy_quantile": 1.0, "mask_truncated_completions": False, "delta": None,
    }  # fmt: skip
    assert {name: flat[name] for name in expected} == expected
    assert policy_loss.clip_bounds(PolicyLoss()) == (0.2, 0.28)
    assert policy_loss.clip_bounds(PolicyLoss(loss="grpo")) == (0.2, 0.2)
    assert policy_loss.clip_bounds(PolicyLoss(loss="gspo")) == (3e-4, 4e-4)
    assert policy_loss.clip_bounds(PolicyLoss(loss="gmpo", epsilon=0.1)) == (0.1, 0.1)


def test_routers_learn_from_completions_without_an_advantage(kit, here, steps):
    """Groups without a signal are skipped otherwise, and nothing is computed of them."""
    (here / "same.py").write_text("def same(completions):\n    return [1.0] * len(completions)\n")
    kit.write_experts(here / "experts")
    args = ["--model", "experts", "--reward-funcs", "same.py:same"]
    assert all(record["grad_norm"] == 0 for record in steps(*args, name="plain"))
    records = steps(*args, "--router-aux-loss-coef", 0.5, "--lora-target-modules", "router", name="routed")
    assert all(record["grad_norm"] > 0 and record["router_z_loss"] > 0 for record in records)
    assert all(record["train/loss"] == pytest.approx(0.5 * record["router_aux_loss"], rel=1e-5) for record in records)


def test_every_loss_is_its_own(kit, here, steps):
    """One step away from what sampled, with completions of ragged lengths. bnpo is dapo with a symmetric clip, which is off here."""
    args = ["--steps-per-generation", 2, "--learning-rate", 0.05, *STOPS, "--max-completion-length", 8, "--epsilon-high"]
    told = {}
    for loss in runs.LOSSES:
        own = [arg for arg in runs.LOSSES[loss] if arg not in ("--epsilon-high", 5)]
        clips = loss in ("dapo", "bnpo", "grpo", "dr_grpo", "gspo", "luspo", "gdpo", "rloo", "gmpo")
        high = [1] if loss == "cispo" else [9] if clips else []
        records = steps(*own, *(args if high else args[:-1]), *high, *(["--epsilon", 0.99] if clips else []), name=loss)
        told[loss] = records[1]["grad_norm"]
    alike = {frozenset(name for name in told if told[name] == value) for value in told.values()}
    assert {group for group in alike if len(group) > 1} <= {frozenset({"dapo", "bnpo"})}, alike


def test_a_correction_repairs_what_is_ahead_of_the_weights(steps):
    """What is cut is told, and the mask leaves out what the truncation keeps."""
    truncated = steps(*AHEAD, "--vllm-importance-sampling-cap", 1.02, name="a")[-1]
    masked = steps(*AHEAD, "--vllm-importance-sampling-cap", 1.02, "--vllm-importance-sampling-mode", "token_mask", name="b")[-1]
    off = steps(*AHEAD, "--no-vllm-importance-sampling-correction", name="c")[-1]
    name = "sampling/importance_sampling_ratio/"
    assert truncated[name + "max"] == pytest.approx(1.02) and masked[name + "max"] <= 1.02 and masked[name + "min"] == 0
    assert off[name + "max"] > 1.02 and off["sampling/sampling_logp_difference/mean"] > 1e-3


VLLM = {f"--{name.replace('_', '-')}": value for name, value in vars(Grpo().engine).items() if name != "use_vllm"}
VALUES = {"--vllm-mode": "managed", "--vllm-server-host": "h", "--vllm-server-urls": "http://h:1", "--vllm-python": "p",
          "--vllm-gpu-memory-utilization": 0.5}  # fmt: skip
IGNORED = {
    **{f"{flag} without vLLM": ([flag] if value is False else [flag, VALUES.get(flag, 3)], "use_vllm is off")
       for flag, value in VLLM.items()},
    "repetition penalty": (["--repetition-penalty", 1.2], "use_vllm is off"),
    "regex": (["--vllm-guided-decoding-regex", "a+"], "use_vllm is off"),
    "generation kwargs": (["--generation-kwargs", "seed=3"], "use_vllm is off"),
    "sync interval": (["--vllm-sync-interval", 2], "use_vllm is off"),
    "correction of what is aligned": (["--vllm-importance-sampling-cap", 2], "nothing to correct"),
    "mode of no correction": (["--async-prefetch", "--no-vllm-importance-sampling-correction", "--vllm-importance-sampling-mode",
                               "token_mask"], "vllm_importance_sampling_correction is off"),
    "depth of nothing": (["--prefetch-depth", 2], "async_prefetch is off"),
    "parts of nothing": (["--streaming-min-groups", 2], "streaming_partial_batch is off"),
    "re-roll of nothing": (["--reroll-max-groups", 2], "reroll_start_fraction is 1"),
    "a reference that nothing reads": (["--ref-model", "SAME"], "beta is 0"),
    "a reference that moves for nothing": (["--sync-ref-model", "--ref-model-mixup-alpha", 1], "beta is 0"),
    "estimator of nothing": (["--kl-estimator", "k1"], "beta is 0"),
    "its correction": (["--no-use-bias-correction-kl"], "beta is 0"),
    "sync steps": (["--beta", 0.1, "--ref-model-sync-steps", 3], "sync_ref_model is off"),
    "mixup": (["--beta", 0.1, "--ref-model-mixup-alpha", 1], "sync_ref_model is off"),
    "another model that moves": ([*SYNC, "--ref-model", "SAME"], "sync_ref_model"),
    "target": (["--entropy-target", 1], "use_adaptive_entropy is off"),
    "tau of another loss": (["--sapo-tau-pos", 2], "the loss is dapo"),
    "other tau of another loss": (["--loss", "grpo", "--sapo-tau-neg", 2], "the loss is grpo"),
    **{f"clip of {loss}": (["--loss", loss, *high, "--epsilon", 0.1], f"{loss} does not clip")
       for loss, high in {"sapo": [], "vespo": [], "reinforce": [], "cispo": ["--epsilon-high", 5]}.items()},
    **{f"upper clip of {loss}": (["--loss", loss, "--epsilon-high", 0.1], "does not clip") for loss in ("sapo", "vespo", "reinforce")},
    "delta of gmpo": (["--loss", "gmpo", "--delta", 3], "does not clip"),
    "ratios of reinforce": (["--loss", "reinforce", "--importance-sampling-level", "token"], "no ratios"),
    "evaluations of nothing": (["--eval-steps", 3], "nothing is held out"),
    "adapter of full": (["--adapter", "none", "--lora-alpha", 4], "adapter is none"),
}  # fmt: skip
SHARED = ["--nproc", 2, "--shard", "context=2"]
CONTRADICTING = {
    "cispo without a cap": (["--loss", "cispo"], "cispo needs epsilon_high"),
    "cispo with a clip": (["--loss", "cispo", "--epsilon-high", 0.2], "at least 1"),
    "ratios of gmpo": (["--loss", "gmpo", "--importance-sampling-level", "token"], "ratios of its own"),
    "ratios of vespo": (["--loss", "vespo", "--importance-sampling-level", "sequence"], "ratios of its own"),
    "delta inside the clip": (["--delta", 1.2], "delta must be above"),
    "delta inside dapo's clip": (["--delta", 1.25], "delta must be above 1 . epsilon_high = 1.28"),
    "one completion": (["--num-generations", 1], "num_generations must be at least 2"),
    "greedy": (["--temperature", 0], "temperature 0"),
    "temperature below 0": (["--temperature", -1], "temperature must be"),
    "ahead of whole weights": (["--async-prefetch", "--adapter", "none"], "async_prefetch", "use an adapter"),
    **{
        f"{flag} on shared streams": (
            [*SHARED, flag, *value],
            f"{flag[2:].replace('-', '_')} does not go with shard context=2: ranks would",
        )
        for flag, *value in (["--async-prefetch"], ["--streaming-partial-batch"], ["--rollout-func", "rewards.py:play"])
    },
    "mean of adapters": (["--beta", 0.1, "--sync-ref-model"], "ref_model_mixup_alpha 1"),
    "vespo with weights of sequences": ([*AHEAD, "--loss", "vespo", "--vllm-importance-sampling-mode", "sequence_mask"], "vespo"),
    "whole weights to a running server": (["--use-vllm", "--adapter", "none"], "vllm_mode managed"),
    "norms to a server": (["--use-vllm", "--lora-modules-to-save", "norm"], "low rank only"),
    "bounds the wrong way round": (["--async-prefetch", "--vllm-importance-sampling-min", 4], "vllm_importance_sampling_min"),
    "bound below 0": (["--async-prefetch", "--vllm-importance-sampling-min", -1], "vllm_importance_sampling_min"),
    "threshold below 0": (["--off-policy-mask-threshold", -1], "off_policy_mask_threshold"),
    "threshold nan": (["--off-policy-mask-threshold", "nan"], "off_policy_mask_threshold"),
    "delta nan": (["--delta", "nan"], "delta"),
    "unknown loss": (["--loss", "gspp"], "gspp", "gspo"),
    "unknown advantage": (["--advantage", "none"], "none"),
    "quantile": (["--top-entropy-quantile", 1.5], "top_entropy_quantile must be a number from 0 to 1"),
    "top_p 0": (["--top-p", 0], "top_p"),
    "prompts of no steps": (["--steps-per-generation", 0], "steps_per_generation must be at least 1"),
    "stop id of no token": (["--stop-token-ids", 260], "stop_token_ids", "260"),
    "stop id below 0": (["--stop-token-ids", -1], "stop_token_ids"),
    "split of a file": (["--split", "test"], "split"),
    "missing file": (["--data", "nope.jsonl"], "nope.jsonl: no such file"),
    "column that is not there": (["--field-prompt", "ask"], "no column ask", "prompt, answer, other"),
    "all prompts too long": (["--max-prompt-len", 10], "not one prompt in 20 rows", r"\(20 longer than max_prompt_len\)"),
    "no room for a completion": (["--max-completion-length", 250], "256 positions", "lower max_prompt_len or max_completion_length"),
    "kwargs without a value": (["--chat-template-kwargs", "name"], "NAME=VALUE|name"),
    "missing reference": (["--beta", 0.1, "--ref-model", "nowhere"], "nowhere is not a folder"),
    "option of another command": (["--rl-beta", 0.1], "unknown option --rl-beta", "--beta"),
    "model not finite": (["--model", "POISONED"], r"not finite: layers\.1\.q_proj"),
    "reference not finite": (["--beta", 0.1, "--ref-model", "POISONED"], r"not finite: layers\.1\.q_proj"),
}


def poisoned(kit, here) -> Path:
    from safetensors.torch import save_file

    path = kit.write_model(here / "poisoned") / "model.safetensors"
    leaves = kit.tensors(path)
    leaves["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("inf")
    save_file(leaves, path, {"format": "pt"})
    return path.parent


@pytest.mark.parametrize("what", IGNORED | CONTRADICTING)
def test_options_that_cannot_be_are_one_line(what, kit, tiny, here, learn):
    args, *words = (IGNORED | CONTRADICTING)[what]
    args = [tiny.same if arg == "SAME" else poisoned(kit, here) if arg == "POISONED" else arg for arg in args]
    kit.refused(learn(*args, rows=CHATS), *words)
    assert not (here / "run").exists()


ROWS = {
    "no prompt at all": ([{"prompt": ""}, {"prompt": " \n"}], "not one prompt in 2 rows"),
    "a prompt that is a number": ([{"prompt": 3}] * 3, "prompts.jsonl line 1", "prompt"),
    "no column for it": ([{"text": "a"}] * 3, "the columns text", "--field-prompt"),
    "an answer alone": ([{"messages": [{"role": "assistant", "content": "a"}]}] * 3, "prompts.jsonl line 1", "an answer and no prompt"),
    "a message without content": ([{"prompt": [{"role": "user"}]}] * 3, "prompts.jsonl line 1", "content"),
    "nothing": ([], "prompts.jsonl has no rows"),
}


@pytest.mark.parametrize("what", ROWS)
def test_bad_rows_are_one_line(what, kit, here, learn):
    rows, *words = ROWS[what]
    kit.refused(learn(rows=rows), *words)
    assert not (here / "run").exists()


def test_some_bad_prompts_are_dropped_and_counted(here, learn):
    rows = [runs.prompt(i) | ({"prompt": "x" * 40} if i in (2, 3) else {"prompt": ""} if i == 5 else {}) for i in range(20)]
    done = learn("--max-prompt-len", 30, rows=rows)
    said = " ".join(done.out.split())
    assert done.code == 0 and "17 prompts" in said and "2 dropped: longer than max_prompt_len" in said, (said, done.err)


def test_messages_that_end_in_an_answer_give_it_to_the_reward(kit, here, steps):
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}]} for i in range(9)]
    told = steps("--reward-funcs", "gsm8k", rows=rows)
    assert "rewards/gsm8k/unknown" not in told[0] and all("assistant\n" in row["prompt"][-12:] for row in kit.samples(here / "run"))


def test_datasets_with_options_of_their_own(kit, tiny, here, learn, tune):
    kit.write_rows(here / "asked.jsonl", [{"ask": f"{i}?", "answer": str(i)} for i in range(9)])
    learn("--max-steps", 1)  # writes rows and rewards
    text = "datasets:\n- path: asked.jsonl\n  field_prompt: ask\n  limit: 5\n- path: prompts.jsonl\n"
    (here / "c.yaml").write_text(text)
    args = [arg for arg in runs.arguments(tiny, "--output-dir", "two") if arg not in ("--data", "prompts.jsonl")]
    done = tune("grpo", "--config", "c.yaml", *args)
    said = " ".join(done.out.split())
    assert done.code == 0 and "asked.jsonl: 5 prompts" in said and "prompts.jsonl: 20 prompts" in said, (said, done.err)
    (here / "c.yaml").write_text(text.replace("field_prompt", "prompt_field"))
    kit.refused(tune("grpo", "--config", "c.yaml", *args, "--overwrite"), "unknown key prompt_field", "field_prompt")


def test_a_config_file_takes_mappings_for_values(kit, tiny, here, learn, tune):
    learn("--max-steps", 1, rows=CHATS)
    (here / "c.yaml").write_text(f"chat_template: {json.dumps(NAMED)}\nchat_template_kwargs:\n  name: Ada\n")
    assert tune("grpo", "--config", "c.yaml", *runs.arguments(tiny, "--output-dir", "named")).code == 0
    assert all(row["prompt"].startswith("Ada") for row in kit.samples(here / "named"))
