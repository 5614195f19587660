"""Options of `treetune ebft` in both modes: each changes a structured run or is refused, and what cannot be is one line."""

import importlib.util
from pathlib import Path

import pytest

from treetune.cli import parse, requirements
from treetune.cli.methods.ebft import METHOD, TEMPERATURES
from treetune.cli.options.ebft import Ebft
from treetune.core.config import table


def _module(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runs, grpo = _module("test_ebft_structured"), _module("test_grpo_options")
learn = runs.learn  # the fixture

OWN = """
def asked(cfg, **kwargs):
    def fn(row, tokenizer=None):
        return {"prompt": row["input"], "ground_truth": row["output"]}
    return fn
"""
LONG = ["--max-completion-length", 80]
AHEAD, MOVED = grpo.AHEAD, grpo.MOVED
# option -> (the arguments that set it, arguments on both sides)
CHANGES = {
    "max_rows": (["--max-rows", 7], []),
    "data": (["--data", "other.jsonl"], []),
    "format": (["--format", "own.py:asked"], []),
    "sequence_len": (["--sequence-len", 45], []),
    "chat_template": (["--chat-template", grpo.NAMED], []),
    "chat_template_kwargs": (["--chat-template-kwargs", "name=Ada"], ["--chat-template", grpo.NAMED]),
    "dataset_exact_deduplication": (["--dataset-exact-deduplication"], ["--data", "twice.jsonl"]),
    "val_data": (["--val-data", "other.jsonl"], ["--val-set-size", None]),
    "val_set_size": (["--val-set-size", 4], []),
    "shuffle": (["--no-shuffle"], []),
    "feature_layers": (["--feature-layers", 0.5, 1], []),
    "embed_method": (["--embed-method", "completion_mean"], []),
    "feature_norm": (["--feature-norm", "per_layer"], []),
    "use_whitening": (["--use-whitening"], []),
    "whitening_space": (["--whitening-space", "rows"], ["--use-whitening", "--diversity-coef", 0]),
    "alignment_coef": (["--alignment-coef", 3], []),
    "diversity_coef": (["--diversity-coef", 0], []),
    "ce_coef": (["--ce-coef", 0.1], []),
    "adaptive_max_tokens": (["--no-adaptive-max-tokens"], LONG),
    "gt_length_multiplier": (["--gt-length-multiplier", 6], LONG),
    "num_generations": (["--num-generations", 3], []),
    "max_completion_length": (["--max-completion-length", 5], []),
    "temperature": (["--temperature", 0.8], []),
    "loss": (["--loss", "dr_grpo"], []),
    **{
        name: grpo.CHANGES[name]
        for name in (
            "top_p", "top_k", "min_p", "stop_token_ids", "rollout_func", "advantage", "aggregate", "importance_sampling_level", "epsilon",
            "epsilon_high", "delta", "sapo_tau_pos", "sapo_tau_neg", "beta", "kl_estimator", "use_bias_correction_kl", "entropy_coef",
            "use_adaptive_entropy", "entropy_target", "entropy_coef_delta", "entropy_coef_max", "top_entropy_quantile",
            "mask_truncated_completions", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
            "vllm_importance_sampling_cap", "vllm_importance_sampling_min", "off_policy_mask_threshold", "steps_per_generation",
            "num_iterations", "async_prefetch", "prefetch_depth", "streaming_partial_batch", "streaming_min_groups", "log_completions",
            "num_completions_to_print", "ref_model", "sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha", "learning_rate",
            "lr_scheduler", "micro_batch_size", "gradient_accumulation_steps", "seed",
        )
    },
    "dynamic_sampling": (["--dynamic-sampling"], ["--top-k", 2, "--max-completion-length", 1, "--max-steps", 4]),
    "replay_buffer_size": (["--replay-buffer-size", 4], ["--top-k", 2, "--max-completion-length", 1, "--max-steps", 6]),
    "skip_zero_advantage_batches": (["--no-skip-zero-advantage-batches"], ["--top-k", 1, "--weight-decay", 0]),
}  # fmt: skip
AS_MANY_NUMBERS = {"streaming_partial_batch", "streaming_min_groups", "skip_zero_advantage_batches", "log_completions",
                   "num_completions_to_print"}  # fmt: skip
FAST = ("format", "chat_template_kwargs", "dataset_exact_deduplication", "shuffle", "val_data", "feature_layers", "feature_norm",
        "whitening_space", "alignment_coef", "gt_length_multiplier", "ce_coef", "dynamic_sampling", "streaming_partial_batch")  # fmt: skip


@pytest.fixture
def told(kit, tiny, here, learn):
    """told(args, name) -> (what training was, what else a run did)."""
    (here / "own.py").write_text(OWN)
    (here / "more.py").write_text(grpo.MORE)
    rows = [runs.row(i) for i in range(20)]
    kit.write_rows(here / "other.jsonl", rows[::-2])
    kit.write_rows(here / "twice.jsonl", rows[:6] * 2)

    def run(args, name):
        done = learn(*[tiny.same if arg == "SAME" else arg for arg in args], "--output-dir", name, rows=rows)
        assert done.code == 0, done.err
        records = grpo.runs.stable(kit, here / name)
        samples = (here / name / "samples.jsonl").read_text() if (here / name / "samples.jsonl").exists() else None
        numbers = [[record["train/loss"], record["grad_norm"], record["learning_rate"]] for record in records if "train/loss" in record]
        said = [line for line in done.out.splitlines() if "advantage" in line and line.startswith("  '")]
        seconds = {"rollout/seconds"}
        kept = [{key: value for key, value in record.items() if key not in seconds} for record in records]
        return numbers, (samples, [record.get("skipped_zero_adv_batches") for record in kept], said, len(kept))

    return run


@pytest.fixture
def calls(monkeypatch):
    """How many prompts were scored at a time."""
    from treetune.core.rollout import feature_rewards

    sizes, plain = [], feature_rewards.scorer

    def scorer(*args, **options):
        inner = plain(*args, **options)
        return lambda groups: sizes.append(len(groups)) or inner(groups)

    monkeypatch.setattr(feature_rewards, "scorer", scorer)
    return sizes


@pytest.fixture(scope="module")
def plain_runs():
    """{arguments: what a run with them told}: many options are compared with the same one."""
    return {}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("option", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES])
def test_option_changes_the_run(option, told, calls, plain_runs):
    own, both = CHANGES[option]
    key = tuple(map(str, both))
    if key not in plain_runs:
        calls.clear()
        plain_runs[key] = (*told(both, "plain"), tuple(calls))
    calls.clear()
    plain, changed = plain_runs[key], (*told(grpo.joined(both, own), "changed"), tuple(calls))
    if option in AS_MANY_NUMBERS:
        ours, theirs = ([value for step in numbers for value in step] for numbers in (changed[0], plain[0]))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6) and changed[1:] != plain[1:]
    else:
        assert plain[0] != changed[0], "the numbers of training, not only what is printed"


GROUPS = ("data", "ebft", "rollout", "loss", "correction", "pipeline", "engine", "reference")
ELSEWHERE = {"datasets", "test_datasets", "split", "mode", "feature_device"}  # tests of their own: a device changes no number


def _refused(*args) -> str:
    """The line that these options are refused with before anything is read, or nothing."""
    try:
        config, given = parse.parse("ebft", Ebft, [str(arg) for arg in args])
        requirements.check(config, METHOD, given)
    except ValueError as error:
        return str(error)
    return ""


def test_every_option_of_a_structured_run_changes_it_or_is_refused():
    expected = {option for group in GROUPS for option in vars(getattr(Ebft(), group))}
    refused = {name for name in expected - set(CHANGES) - ELSEWHERE if _given(name, [])}
    assert expected - refused - ELSEWHERE == set(CHANGES) - set(vars(Ebft().optim)) | {"use_vllm"}


VALUES = {
    "overlong": "drop", "dataset_prepared_path": "p", "advantage_estimator": "group_norm", "vllm_mode": "managed", "vllm_server_host": "h",
    "vllm_python": "p", "vllm_gpu_memory_utilization": 0.5, "vllm_guided_decoding_regex": "a+", "generation_kwargs": "seed=3",
    "reroll_start_fraction": 0.2, "loss": "dapo", "advantage": "rloo", "aggregate": "sum", "importance_sampling_level": "token",
    "kl_estimator": "k1", "vllm_importance_sampling_mode": "token_mask", "ref_model": "m", "rollout_func": "a.py:b", "epsilon_high": 0.3,
    "top_entropy_quantile": 0.5, "ref_model_mixup_alpha": 1, "min_p": 0.1, "delta": 3, "rl_coef": 0.5,
    "epsilon": 0.1,
}  # fmt: skip


def _given(name: str, more: list) -> str:
    """The line that an option is refused with when it is set."""
    value, flag = table.flatten(Ebft())[name], f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return _refused(flag.replace("--", "--no-" if value else "--", 1), *more)
    return _refused(flag, VALUES.get(name, 3), *more)


STRIDED_ONLY = (
    "stride", "context_length", "generate_max_len", "n_samples_per_prompt", "rl_coef", "advantage_estimator", "min_completion_prefix",
)  # fmt: skip


@pytest.mark.parametrize("name", [*STRIDED_ONLY, "sample_packing", "overlong", "dataset_prepared_path",
                                  "reroll_start_fraction", "vllm_sync_interval"])  # fmt: skip
def test_structured_mode_refuses_what_it_would_ignore(name):
    assert f"--{name.replace('_', '-')} would be ignored" in _given(name, [])


SAMPLED = [name for group in ("rollout", "loss", "correction", "pipeline", "engine", "reference")
           for name in vars(getattr(Ebft(), group)) if name not in ("temperature", "top_p")]  # fmt: skip


@pytest.mark.parametrize("name", ["adaptive_max_tokens", "gt_length_multiplier", *SAMPLED])
def test_strided_mode_refuses_the_options_of_whole_replies(name):
    twins = {"num_generations": "n-samples-per-prompt", "max_completion_length": "generate-max-len", "advantage": "advantage-estimator"}
    instead = f"; the option is --{twins[name]}" if name in twins else ""
    assert _given(name, ["--mode", "strided"]) == f"--{name.replace('_', '-')} would be ignored: mode is strided{instead}"


STRIDED = ["--mode", "strided"]
WRONG = {
    "nothing to train": ([*STRIDED, "--rl-coef", 0], "rl_coef and ce_coef are both 0"),
    "whitening of one": (["--use-whitening", "--num-generations", 1, "--advantage", "reinforce"], "use_whitening compares"),
    "whitening of one block": ([*STRIDED, "--use-whitening", "--n-samples-per-prompt", 1], "use_whitening compares"),
    "a space of no whitening": (["--whitening-space", "rows"], "use_whitening is off"),
    "a space of no whitening, strided": ([*STRIDED, "--whitening-space", "rows"], "use_whitening is off"),
    "greedy": (["--temperature", 0], "temperature 0"),
    "greedy blocks": ([*STRIDED, "--temperature", 0], "temperature 0"),
    "no layers": (["--feature-layers"], "feature_layers|feature-layers"),
    "a layer too deep": (["--feature-layers", 0.5, 1.5], "depths from 0 to 1"),
    "a layer above": ([*STRIDED, "--feature-layers", -0.5], "depths from 0 to 1"),
    "no reward": (["--alignment-coef", 0, "--diversity-coef", 0], "nothing is rewarded"),
    "a factor too small": (["--gt-length-multiplier", 0.05], "from 0.1 up"),
    "a factor of nothing": (["--no-adaptive-max-tokens", "--gt-length-multiplier", 2], "adaptive_max_tokens is off"),
    "one completion": (["--num-generations", 1], "num_generations must be at least 2"),
    "likeness to nothing": (["--num-generations", 1, "--advantage", "reinforce", "--diversity-coef", 2], "nothing to be like"),
    "shards": (["--sharding", "full", "--streaming-partial-batch"], "streaming_partial_batch does not go"),
    "shards ahead": (["--sharding", "full", "--async-prefetch"], "async_prefetch does not go"),
    "cispo": (["--loss", "cispo"], "cispo needs epsilon_high"),
    "whole weights ahead": (["--adapter", "none", "--async-prefetch"], "async_prefetch samples from a copy"),
    "a reference of nothing": (["--ref-model", "m"], "beta is 0"),
    "a correction of nothing": (["--vllm-importance-sampling-cap", 2], "nothing to correct"),
    **{f"{name} below 0": ([f"--{name.replace('_', '-')}", -1], f"{name} must be a number from 0 up")
       for name in ("alignment_coef", "diversity_coef", "ce_coef")},
    **{f"{name} below 0, strided": ([*STRIDED, f"--{name.replace('_', '-')}", -1], f"{name} must be a number from 0 up")
       for name in ("rl_coef", "min_completion_prefix")},
    **{f"no {name}": ([*STRIDED, f"--{name.replace('_', '-')}", 0], f"{name} must be at least 1")
       for name in ("stride", "context_length", "generate_max_len", "n_samples_per_prompt")},
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_one_line(what, kit, tune):
    args, said = WRONG[what]
    kit.refused(tune("ebft", *args), said)


ROWS = {
    "columns of another kind": ([{"text": "a"}], [], "structured mode reads"),
    "a transform of the other mode": ([runs.row(1)], ["--format", "ebft_pretrain.transform"], "--mode strided"),
    "a transform that is none": ([runs.row(1)], ["--format", "ebft_opencode.transfrom"], "did you mean ebft_opencode.transform"),
    "no truth": ([{"input": "a", "output": ""}] * 3, [], "not one row with a prompt and a ground truth"),
    "everything too long": ([runs.row(i) for i in range(4)], ["--sequence-len", 20], "raise it to"),
    "more than the model holds": ([runs.row(i) for i in range(4)], ["--max-completion-length", 250], "256 positions of the model"),
    "turns of plain text": ([{"prompt": "a", "ground_truth": "b", "remaining_turns": [{"role": "assistant", "content": "c"}]}] * 4, [],
                            "remaining_turns need a prompt of messages"),
    "turns and a rollout function": ([runs.talk(2)] * 4, ["--rollout-func", "more.py:shout"], "remaining_turns, which rollout_func"),
    "a transform that raises": ([{"input": "a"}], ["--format", "own.py:asked"], "own.py:asked.*KeyError"),
}  # fmt: skip


@pytest.mark.parametrize("what", ROWS)
def test_rows_that_cannot_be_are_one_line(what, kit, here, learn):
    (here / "own.py").write_text(OWN)
    (here / "more.py").write_text(grpo.MORE)
    rows, args, said = ROWS[what]
    kit.refused(learn(*args, rows=rows), said)
    assert not (here / "run").exists()


def test_data_sets_with_options_of_their_own(kit, tiny, here, learn):
    import yaml

    kit.write_rows(here / "a.jsonl", [runs.row(i) for i in range(6)])
    kit.write_rows(here / "b.jsonl", [runs.talk(i) for i in range(6)])
    kit.write_rows(here / "c.jsonl", [runs.row(9)])
    listed = [{"path": "a.jsonl"}, {"path": "b.jsonl", "type": "ebft_chat_multiturn.transform_last_turn"}]
    (here / "run.yaml").write_text(yaml.safe_dump({"datasets": listed, "test_datasets": [{"path": "c.jsonl"}]}))
    done = learn("--config", "run.yaml", "--data", None, "--val-set-size", None, "--max-steps", 1)
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert "a.jsonl as ebft_opencode.transform: 6 prompts" in said and "transform_last_turn: 6 prompts" in said
    assert "held out c.jsonl as ebft_opencode.transform: 1 prompts" in said
    (here / "run.yaml").write_text(yaml.safe_dump({"datasets": [{"path": "a.jsonl", "weight": 2}]}))
    kit.refused(learn("--config", "run.yaml", "--data", None, "--output-dir", "other"), "unknown key weight")


def test_the_defaults_of_the_documents():
    flat = table.flatten(Ebft())
    expected = {
        "mode": "structured", "feature_layers": [0.25, 0.5, 0.75], "embed_method": "last_token", "use_whitening": False,
        "alignment_coef": 1.0, "diversity_coef": 1.0, "ce_coef": 0.0, "adaptive_max_tokens": True, "gt_length_multiplier": 1.5, "stride": 8,
        "context_length": 8, "generate_max_len": 8, "n_samples_per_prompt": 4, "top_p": 1.0, "rl_coef": 1.0, "loss": "grpo",
        "advantage_estimator": "rloo", "min_completion_prefix": 0,
    }  # fmt: skip
    assert {name: flat[name] for name in expected} == expected
    assert TEMPERATURES["strided"] == 0.6
