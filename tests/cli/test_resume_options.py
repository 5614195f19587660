"""Every option of every training command, changed between a checkpoint and the run that goes on from it: refused, or in force and listed.

TABLE says which; the reason of each stands in the option's field and is part of the message. The comparison itself is a pure function,
so the whole table is tested without training; runs show it for every option with `-m slow`.
"""

import importlib.util
import shutil
import typing
from pathlib import Path

import pytest
import yaml

from treetune.cli import main
from treetune.cli.methods.pretrain import Pretrain
from treetune.cli.methods.sft import Sft
from treetune.core import ckpt
from treetune.core.config import table
from treetune.core.run import resume_rules as rules


def _module(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMANDS = ("sft", "pretrain", "dpo", "kto", "orpo", "simpo", "cpo", "reward", "prm", "grpo", "ebft")
# what becomes of another value -> options. Neither "refused" nor "listed": refused unless what they stand for is the same, then listed.
TABLE = {
    "start": (
        "output_dir", "resume", "overwrite", "ignore_memory", "sweep", "nproc", "nnodes", "rendezvous", "restarts", "rank_timeout",
        "use_ray", "comet_api_key", "swanlab_api_key",
    ),
    "weights": ("model", "revision", "from_config", "lora_model_dir", "ref_model"),
    "documents": (
        "data", "datasets", "test_datasets", "format", "split", "max_rows", "sequence_len", "overlong", "chat_template",
        "chat_template_kwargs", "dataset_exact_deduplication", "default_system_message", "roles_to_train", "train_on_eos",
        "train_on_inputs", "val_data", "val_set_size", "text_column", "streaming", "field_prompt", "prompt_transform", "max_prompt_len",
    ),
    "order": ("micro_batch_size", "gradient_accumulation_steps", "sample_packing", "shuffle", "streaming_multipack_buffer_size"),
    "refused": (
        # the function that is trained
        "tokenizer_config",
        "dtype", "special_tokens", "tokens", "embedding_multiple", "adapter", "lora_r", "lora_alpha", "lora_rslora", "lora_target_modules",
        "lora_layers", "lora_modules_to_save", "unfrozen_parameters", "lora_dora", "lora_bias",
        "master_dtype", "fp8_products", "lora_init", "lora_init_rows", "relora_steps", "lora_rank_pattern",
        "lora_alpha_pattern", "quant", "quant_double",
        "quantize_moe_experts",
        # what it is trained towards
        "loss", "label_smoothing", "z_loss_coef", "qat", "router_aux_loss_coef", "router_z_loss_coef", "neftune_noise_alpha",
        "loss_weights",
        "rl_beta", "dpo_label_smoothing", "f_divergence", "f_alpha_divergence_coef", "discopop_tau", "ld_alpha", "dpo_use_weighting",
        "rpo_alpha", "kto_desirable_weight",
        "kto_undesirable_weight", "orpo_alpha", "orpo_nll_scope", "simpo_gamma", "simpo_alpha", "cpo_alpha", "center_rewards_coefficient",
        "advantage", "aggregate", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "sapo_tau_pos", "sapo_tau_neg", "beta",
        "kl_estimator", "use_bias_correction_kl", "entropy_coef", "use_adaptive_entropy", "entropy_target", "entropy_coef_delta",
        "entropy_coef_max", "top_entropy_quantile", "mask_truncated_completions", "ce_coef", "rl_coef", "advantage_estimator",
        "reward_weights", "mode", "feature_layers", "embed_method", "feature_norm", "use_whitening", "whitening_space",
        "alignment_coef", "diversity_coef", "sync_ref_model",
        # what the checkpoint holds: moments, stored groups, places in the data
        "data_seed",
        "optimizer", "seed", "num_generations", "steps_per_generation", "num_iterations", "stride", "context_length", "generate_max_len",
        "n_samples_per_prompt", "min_completion_prefix",
        # what is sampled from
        "temperature", "top_p", "top_k", "min_p", "stop_token_ids", "repetition_penalty", "vllm_guided_decoding_regex",
        "generation_kwargs",
    ),
    "function": ("reward_funcs", "rollout_func"),
    "listed": (
        # how large the steps to come are, and how many
        "embedding_lr", "eval_batch_size", "lr_scheduler_kwargs", "cosine_constant_lr_ratio", "lr_div_factor", "lr_quadratic_warmup",
        "learning_rate", "lr_scheduler", "cosine_min_lr_ratio", "warmup_steps", "warmup_ratio", "weight_decay", "weight_decay_rules",
        "lr_rules", "loraplus_lr_ratio", "adam_beta1", "adam_beta2", "adam_epsilon", "momentum", "optim_args", "max_grad_norm",
        "lora_dropout", "relora_warmup_steps", "relora_anneal_steps", "relora_prune_ratio",
        "num_epochs", "max_steps", "ref_model_sync_steps", "ref_model_mixup_alpha",
        # where and how they are made
        "device", "tf32", "deterministic", "sharding", "shard", "gradient_checkpointing", "activation_offloading", "layer_offloading",
        "feature_device",
        "precompute_ref_logps", "dataset_prepared_path",
        "max_completion_length", "adaptive_max_tokens", "gt_length_multiplier", "async_prefetch", "prefetch_depth", "vllm_sync_interval",
        "streaming_partial_batch", "streaming_min_groups", "dynamic_sampling", "replay_buffer_size", "reroll_start_fraction",
        "reroll_max_groups", "skip_zero_advantage_batches", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
        "vllm_importance_sampling_cap", "vllm_importance_sampling_min", "off_policy_mask_threshold", "use_vllm", "vllm_mode",
        "vllm_server_host", "vllm_server_port", "vllm_server_urls", "vllm_num_servers", "vllm_server_timeout", "vllm_python",
        "vllm_max_model_len", "vllm_gpu_memory_utilization",
        "vllm_reload_in_place", "vllm_canary_tolerance", "reward_num_workers", "reward_timeout",
        # what is shown and kept
        "evals_per_epoch", "saves_per_epoch",
        "eval_steps", "save_steps", "save_total_limit", "async_save", "logging_steps", "early_stopping_patience",
        "loss_watchdog_threshold",
        "profiler_steps", "profiler_steps_start", "log_level",
        "loss_watchdog_patience", "observer", "sample_prompt", "sample_tokens", "log_completions", "num_completions_to_print",
        "eval_table_size", "eval_max_new_tokens", "eval_causal_lm_metrics", "eval_answers",
        "eval_reward_funcs", "eval_reward_timeout", "lm_eval_tasks", "lm_eval_batch_size",
        # who is told
        "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision",
        "use_wandb", "wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "wandb_mode", "wandb_watch", "wandb_log_model",
        "use_tensorboard", "use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name", "hf_mlflow_log_artifacts",
        "use_comet", "comet_workspace", "comet_project_name", "comet_experiment_key", "comet_mode", "comet_online",
        "comet_experiment_config", "use_trackio", "trackio_project_name", "trackio_run_name", "trackio_space_id", "use_swanlab",
        "swanlab_project", "swanlab_workspace", "swanlab_experiment_name", "swanlab_description", "swanlab_mode", "tracker_timeout",
    ),
}  # fmt: skip
VERDICTS = {name: verdict for verdict, names in TABLE.items() for name in names}


def _config(command: str) -> type:
    return main.COMMANDS[command].config


RULES = {name: rule for command in COMMANDS for name, rule in table.rules(_config(command)).items()}


def changes(before: dict, after: dict, **options) -> list[rules.Change]:
    return rules.changes(before, after, RULES, **options)


def judge(found: list[rules.Change], after: dict, **options) -> rules.Verdict:
    return rules.judge(found, after, RULES, **options)


def _options() -> list[tuple[str, str]]:
    return [(command, name) for command in COMMANDS for name in table.defaults(_config(command))]


def test_the_table_has_every_option_of_every_training_command_and_no_other():
    assert set(VERDICTS) == set(RULES) == {name for _, name in _options()}
    assert sum(map(len, TABLE.values())) == len(VERDICTS), "an option stands in the table twice"
    trains = {command for command in main.COMMANDS if "optim" in typing.get_type_hints(_config(command))}
    assert trains == set(COMMANDS)


def test_every_rule_is_that_of_the_table_and_has_a_reason():
    assert {name: rule.verdict for name, rule in RULES.items()} == VERDICTS
    assert all(len(rule.reason.split()) >= 3 for rule in RULES.values())


def _other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, "x"] if isinstance(value, list) else f"{value or ''}x"


def _judged(command: str, name: str, same) -> rules.Verdict:
    before = table.defaults(_config(command))
    after = before | {name: _other(before[name])}
    return judge(changes(before, after, defaults={}, ignored={}), after, same=lambda what: same)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_changed_option_is_refused_with_its_reason_or_listed(command):
    for name in table.defaults(_config(command)):
        _require_verdict(command, name)


def _require_verdict(command: str, name: str):
    verdict = VERDICTS[name]
    if verdict == "start":
        assert _judged(command, name, False) == ([], [])
    elif verdict == "listed" and name != "momentum":
        for same in (True, False, None):
            (line,) = _judged(command, name, same).listed
            assert line.startswith(f"{name} ") and " -> " in line and not _judged(command, name, same).refused
    else:
        (line,) = _judged(command, name, False).refused
        assert line.startswith(f"{name} ") and " instead of " in line
        assert name == "momentum" or RULES[name].reason in line
    if verdict in ("documents", "order", "weights", "function"):
        assert len(_judged(command, name, True).listed) == 1 and not _judged(command, name, True).refused
        assert _judged(command, name, None) == ([], []), "what it stands for is not known before it is read"


def test_options_that_the_run_does_not_look_at_are_not_compared():
    before = table.defaults(Sft)
    after = before | {"lr_scheduler": "constant", "cosine_min_lr_ratio": 0.5}
    found = changes(before, after, defaults={}, ignored={"cosine_min_lr_ratio": "the schedule is constant"})
    assert [one.name for one in found] == ["lr_scheduler"]


def test_an_option_that_is_newer_than_the_checkpoint_had_its_default():
    known = table.defaults(Sft)
    before = {name: value for name, value in known.items() if name != "z_loss_coef"}
    assert changes(before, known, defaults=known, ignored={}) == []
    assert [str(one) for one in changes(before, known | {"z_loss_coef": 1.0}, defaults=known, ignored={})] == ["z_loss_coef 0 -> 1"]


def test_a_changed_value_that_would_do_nothing_is_refused():
    before = table.defaults(Sft) | {"max_steps": 4, "optimizer": "sgd", "momentum": 0.5}
    for changed, words in (({"num_epochs": 3}, "max_steps is given"), ({"momentum": 0.0}, "moments with momentum only")):
        after = before | changed
        (line,) = judge(changes(before, after, defaults={}, ignored={}), after, same=lambda what: True).refused
        assert words in line
    after = before | {"momentum": 0.9}
    found = changes(before, after, defaults={}, ignored={})
    assert judge(found, after, same=lambda what: True) == ([], ["momentum 0.5 -> 0.9"])


# --- the same in runs


SFT, PAIRS, GRPO, EBFT = (_module(f"test_{name}") for name in ("every_option", "preference_options", "grpo_options", "ebft_options"))
STRIDED = _module("test_ebft_strided")
TEXT = ["--data", "more.jsonl"]
ONE_PASS = ["--max-rows", 6, "--max-steps", None]
PRETRAIN = {
    name: row for name, row in ((name, SFT.CHANGES[name][1:]) for name in SFT.CHANGES)
    if name in table.defaults(Pretrain) and name not in ("data", "split", "max_rows", "sequence_len", "val_data", "tokens")
} | {
    "data": (lambda t: TEXT, []), "text_column": (lambda t: ["--text-column", "other"], TEXT),
    "max_rows": (lambda t: ["--max-rows", 7], []), "sequence_len": (lambda t: ["--sequence-len", 40], []),
    "val_data": (lambda t: ["--val-data", "more.jsonl"], []), "tokens": (lambda t: ["--tokens", "cat"], []),
    "weight_decay_rules": (lambda t: ["--weight-decay-rules", "q_proj=3"], []), "embedding_lr": (lambda t: ["--embedding-lr", 0.5], []),
    "streaming": (lambda t: ["--streaming", "--val-set-size", 0], ["--val-set-size", 0]),
    "streaming_multipack_buffer_size": (lambda t: ["--streaming-multipack-buffer-size", 5], ["--streaming", "--val-set-size", 3]),
}  # fmt: skip
WATCHED = ["--loss-watchdog-threshold", 0.1]
OWN = {"loss_watchdog_patience": (lambda t: ["--loss-watchdog-patience", 1], WATCHED)}  # in place of a run that fails before it saves
BLOCKS = {
    "stride": (["--stride", 5], []), "context_length": (["--context-length", 5], []), "generate_max_len": (["--generate-max-len", 2], []),
    "n_samples_per_prompt": (["--n-samples-per-prompt", 4], []), "rl_coef": (["--rl-coef", 0.5], ["--ce-coef", 0.1]),
    "advantage_estimator": (["--advantage-estimator", "reinforce"], []), "min_completion_prefix": (["--min-completion-prefix", 1], []),
    "mode": (["--mode", "strided", "--data", "text.jsonl"], []), "top_p": (["--top-p", 0.5], []),
}  # fmt: skip
CASES = [("sft", name) for name in SFT.CHANGES if VERDICTS[name] != "start"]
CASES += [("pretrain", name) for name in PRETRAIN if VERDICTS[name] != "start"]
CASES += [*PAIRS.CHANGES, *(("grpo", name) for name in GRPO.CHANGES), *(("ebft", name) for name in EBFT.CHANGES)]
CASES += [("ebft strided", name) for name in BLOCKS if name != "mode"]
FAST = [("sft", "lora_alpha"), ("sft", "learning_rate"), ("sft", "train_on_inputs"), ("dpo", "rl_beta"), ("grpo", "replay_buffer_size")]
ERRORS = {"device", "revision", "split", "sharding", "shard"}  # what stops them here has nothing to do with resuming
STOPS = {"loss_watchdog_threshold", "loss_watchdog_patience"}  # take effect by ending the run


@pytest.fixture
def run(kit, tiny, here, tune):
    """run(command, arguments) -> Done."""
    kit.write_rows(here / "both.jsonl", [row | {"text": f"text of row {i}"} for i, row in enumerate(kit.chats(24))])
    kit.write_tokenizer(here / "words")
    kit.write_rows(here / "more.jsonl", [{"text": f"{i} dogs ran " + "far " * (i % 4), "other": f"{i} cats"} for i in range(16)])
    (here / "more.py").write_text(GRPO.MORE)
    (here / "own.py").write_text(EBFT.OWN)
    (here / "rewards.py").write_text(GRPO.runs.REWARDS)
    kit.write_rows(here / "prompts.jsonl", GRPO.CHATS)
    kit.write_rows(here / "rows.jsonl", [EBFT.runs.row(i) for i in range(20)])
    kit.write_rows(here / "twice.jsonl", [EBFT.runs.row(i) for i in range(6)] * 2)
    for name in ("dpo", "kto", "orpo", "simpo", "cpo", "reward"):
        kit.write_rows(here / f"{name}.jsonl", PAIRS.runs.rows_of(name))

    def call(command, args):
        args = [tiny.same if arg == "SAME" else arg for arg in args]
        name = command.split()[0]
        kit.write_rows(here / "other.jsonl", (GRPO.CHATS if name == "grpo" else [EBFT.runs.row(i) for i in range(20)])[::-2])
        return tune(name, *_arguments(kit, tiny, command, args))

    return call


def _arguments(kit, tiny, command: str, args: list) -> list:
    if command in ("grpo", "ebft"):
        return (GRPO if command == "grpo" else EBFT).runs.arguments(tiny, *args)
    if command == "ebft strided":
        return STRIDED.arguments(tiny, *args)
    if command == "sft":
        args = SFT.joined(SFT.BASE, args)
        return kit.basics(tiny, *args, without=("--lora-r", "--max-steps", *SFT.left_out(args)))
    if command == "pretrain":
        known = ["--model", tiny.model, "--data", tiny.text, "--sequence-len", 64, "--sample-tokens", 4, "--output-dir", "run"]
        return SFT.joined(known, ["--max-steps", 2], args)
    return PAIRS.runs.arguments(tiny, command, *args)


def _case(command: str, name: str, tiny) -> tuple[list, list]:
    """(arguments that set an option, arguments on both sides)."""
    if command in ("sft", "pretrain"):
        own, both = OWN.get(name) or (SFT.CHANGES[name][1:] if command == "sft" else PRETRAIN[name])
        return own(tiny), both
    table = {"grpo": GRPO.CHANGES, "ebft": EBFT.CHANGES, "ebft strided": BLOCKS}.get(command)
    return PAIRS.CHANGES[command, name] if table is None else table[name]


def _saved(run, command: str, both: list, here: Path, kept: dict) -> Path:
    """The folder of a run with these arguments, made once."""
    key = (command, tuple(map(str, both)))
    if key not in kept:
        shutil.rmtree(here / "run", ignore_errors=True)
        done = run(command, both)
        assert done.code == 0, done.err
        kept[key] = here.parent / f"kept-{len(kept)}"
        shutil.copytree(here / "run", kept[key])
    return kept[key]


def _expected(name: str) -> str:
    """In these cases other documents, orders and weights are really others, and momentum comes to a run that had none."""
    return "listed" if VERDICTS[name] == "listed" and name != "momentum" else "refused"


@pytest.fixture(scope="module")
def kept():
    """{(command, arguments): a run folder}: many options are changed in the same one."""
    return {}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("command", "name"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case[1] not in ERRORS]
)
def test_a_run_refuses_a_changed_option_or_lists_it_and_takes_it(command, name, kit, tiny, here, run, kept):
    own, both = _case(command, name, tiny)
    (here / "watch.py").write_text("def watch(event, record):\n    pass\n")
    home = _saved(run, command, both, here, kept)
    shutil.rmtree(here / "run", ignore_errors=True)
    shutil.copytree(home, here / "run")
    if name == "lora_model_dir":
        shutil.copytree(home, here / "start")
    steps = [2, *(value for flag, value in zip(both, both[1:], strict=False) if flag == "--max-steps")][-1]
    more = [] if steps is None or name in ("max_steps", "num_epochs") else ["--max-steps", steps + 1]
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    done = run(command, [*both, *more, *own, "--resume", "auto"])
    if _expected(name) == "refused":
        kit.refused(done, rf"step_\d+ cannot be continued with (.*; )?{name} .+ instead of .+ \(.+\)")
        assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before
        return
    assert done.code == 0 or name in STOPS, done.err
    said = done.out[done.out.index("changed since the checkpoint:") :]
    assert any(line.startswith(f"  {name} ") and " -> " in line for line in said.splitlines()), said
    held, was = (yaml.safe_load(path.read_text()).get(name) for path in (here / "run/config.yaml", home / "config.yaml"))
    assert held != was, "config.yaml holds what is in force"


def test_a_run_without_functions_has_no_fingerprint_of_functions(kit, here, sft):
    """Or checkpoints of before there were such functions, and those of a model at another path, would be of another model."""
    assert sft("--output-dir", "run").code == 0
    assert ckpt.read_meta(here / "run/checkpoints/step_000002")["provenance"]["functions"] == {}
