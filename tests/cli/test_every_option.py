"""Every option changes the run: each one, alone, changes what a run of two steps computes, prints, writes or refuses."""

import json
import re
from pathlib import Path

import pytest

from treetune.cli import memory_ladder, ray_launch
from treetune.cli.commands import lm_eval
from treetune.cli.methods.sft import Sft
from treetune.cli.options.answers import AnswerOptions
from treetune.cli.options.hub import HubOptions
from treetune.cli.options.run import SampleOptions
from treetune.cli.options.trackers import TrackerOptions
from treetune.core import ckpt_parts, layer_offload
from treetune.core.config import table
from treetune.core.run import launch
from treetune.models import dense

BASE = ["--lora-r", 4, "--max-steps", 2, "--micro-batch-size", 1, "--gradient-accumulation-steps", 2, "--learning-rate", 0.01,
        "--output-dir", "run", "--sample-prompt", ""]  # fmt: skip
ASKED = ["--sample-prompt", "1 + 1"]
SGD = ["--optimizer", "sgd", "--learning-rate", 1, "--max-steps", 3]
LONG = "{% for m in messages %}<|im_start|>{{ m.role }}:\n{{ m.content }}<|im_end|>\n{% endfor %}"

# option -> (what it changes, the arguments that set it, arguments on both sides)
CHANGES = {
    "model": ("metrics", lambda t: ["--model", t.same], []),
    "revision": ("error", lambda t: ["--revision", "main"], []),
    "dtype": ("metrics", lambda t: ["--dtype", "bfloat16"], []),
    "device": ("error", lambda t: ["--device", "cuda"], []),
    "quant": ("metrics", lambda t: ["--quant", "nf4"], []),
    "quant_double": ("metrics", lambda t: ["--no-quant-double"], ["--quant", "nf4"]),
    "fp8_products": ("metrics", lambda t: ["--fp8-products"], ["--quant", "fp8"]),
    "quantize_moe_experts": ("metrics", lambda t: ["--no-quantize-moe-experts"], ["--quant", "int8", "--model", "experts"]),
    "data": ("metrics", lambda t: ["--data", t.text], []),
    "format": ("metrics", lambda t: ["--format", "completion"], ["--data", "both.jsonl"]),
    "split": ("error", lambda t: ["--split", "test"], []),
    "max_rows": ("metrics", lambda t: ["--max-rows", 12], []),
    "sequence_len": ("metrics", lambda t: ["--sequence-len", 90], []),
    "overlong": ("metrics", lambda t: ["--overlong", "truncate"], ["--sequence-len", 60, "--micro-batch-size", 2]),
    "sample_packing": ("metrics", lambda t: ["--no-sample-packing"], []),
    "chat_template": ("metrics", lambda t: ["--chat-template", LONG], []),
    "default_system_message": ("metrics", lambda t: ["--default-system-message", "Add."], []),
    "roles_to_train": ("metrics", lambda t: ["--roles-to-train", "user", "assistant"], []),
    "train_on_eos": ("metrics", lambda t: ["--train-on-eos", "all"], []),
    "train_on_inputs": ("metrics", lambda t: ["--train-on-inputs"], []),
    "dataset_exact_deduplication": ("metrics", lambda t: ["--dataset-exact-deduplication"], ["--data", "both.jsonl", "both.jsonl"]),
    "dataset_prepared_path": ("files", lambda t: ["--dataset-prepared-path", "prepared"], []),
    "val_data": ("metrics", lambda t: ["--val-data", t.text], []),
    "val_set_size": ("metrics", lambda t: ["--val-set-size", 5], []),
    "eval_batch_size": ("layers run", lambda t: ["--eval-batch-size", 3], ["--no-sample-packing"]),
    # In one block a stream is what memory would be (test_streamed_sets.py).
    "streaming": ("out", lambda t: ["--streaming"], ["--val-set-size", 0]),
    "streaming_multipack_buffer_size": (
        "metrics", lambda t: ["--streaming-multipack-buffer-size", 5], ["--streaming", "--val-set-size", 3]
    ),
    "shuffle": ("metrics", lambda t: ["--no-shuffle"], []),
    "tokenizer_config": ("metrics", lambda t: ["--tokenizer-config", "words"], []),
    "special_tokens": ("metrics", lambda t: ["--special-tokens", "pad_token=<|pad|>"], []),
    "tokens": ("metrics", lambda t: ["--tokens", " please"], []),
    "embedding_multiple": ("metrics", lambda t: ["--embedding-multiple", 32], []),
    "adapter": ("files", lambda t: ["--adapter", "none", "--lora-r", None], []),
    "lora_r": ("metrics", lambda t: ["--lora-r", 2], []),
    "lora_alpha": ("metrics", lambda t: ["--lora-alpha", 8], []),
    "lora_rslora": ("metrics", lambda t: ["--lora-rslora"], []),
    "lora_dropout": ("metrics", lambda t: ["--lora-dropout", 0.5], []),
    "lora_target_modules": ("metrics", lambda t: ["--lora-target-modules", "q_proj", "v_proj"], []),
    "lora_layers": ("metrics", lambda t: ["--lora-layers", 1], []),
    "lora_modules_to_save": ("metrics", lambda t: ["--lora-modules-to-save", r"^norm$"], []),
    "lora_dora": ("metrics", lambda t: ["--lora-dora"], []),
    "lora_init": ("metrics", lambda t: ["--lora-init", "pissa"], []),
    "lora_init_rows": ("metrics", lambda t: ["--lora-init-rows", 3], ["--lora-init", "corda_ipm"]),
    "lora_rank_pattern": ("metrics", lambda t: ["--lora-rank-pattern", "q_proj=2"], []),
    "lora_alpha_pattern": ("metrics", lambda t: ["--lora-alpha-pattern", "layers.0.q_proj=2"], []),
    "lora_bias": ("metrics", lambda t: ["--lora-bias", "all"], ["--model", "biased"]),
    "unfrozen_parameters": ("metrics", lambda t: ["--unfrozen-parameters", r"norm\.weight$"], ["--adapter", "none", "--lora-r", None]),
    "lora_model_dir": ("metrics", lambda t: ["--lora-model-dir", "start", "--lora-r", None], []),
    "loraplus_lr_ratio": ("metrics", lambda t: ["--loraplus-lr-ratio", 16], []),
    "relora_steps": ("metrics", lambda t: ["--relora-steps", 2], ["--max-steps", 4]),
    "relora_warmup_steps": ("metrics", lambda t: ["--relora-warmup-steps", 2], ["--max-steps", 4, "--relora-steps", 2]),
    "relora_anneal_steps": ("metrics", lambda t: ["--relora-anneal-steps", 1], ["--max-steps", 4, "--relora-steps", 2]),
    "relora_prune_ratio": ("metrics", lambda t: ["--relora-prune-ratio", 0.5], ["--max-steps", 4, "--relora-steps", 2]),
    "loss": ("metrics", lambda t: ["--loss", "dft"], []),
    "label_smoothing": ("metrics", lambda t: ["--label-smoothing", 0.1], []),
    "z_loss_coef": ("metrics", lambda t: ["--z-loss-coef", 0.01], []),
    "router_aux_loss_coef": ("metrics", lambda t: ["--router-aux-loss-coef", 0.5], ["--model", "experts"]),
    "router_z_loss_coef": ("metrics", lambda t: ["--router-z-loss-coef", 0.5], ["--model", "experts"]),
    "qat": ("metrics", lambda t: ["--qat", "nf4"], ["--adapter", "none", "--lora-r", None]),
    "neftune_noise_alpha": ("metrics", lambda t: ["--neftune-noise-alpha", 5], []),
    "optimizer": ("metrics", lambda t: ["--optimizer", "lion"], []),
    "learning_rate": ("metrics", lambda t: ["--learning-rate", 0.02], []),
    "lr_scheduler": ("metrics", lambda t: ["--lr-scheduler", "constant"], []),
    "lr_scheduler_kwargs": ("metrics", lambda t: ["--lr-scheduler-kwargs", "power=3"], ["--lr-scheduler", "polynomial"]),
    "cosine_constant_lr_ratio": (
        "metrics", lambda t: ["--cosine-constant-lr-ratio", 0.5], ["--cosine-min-lr-ratio", 0.5, "--max-steps", 3]
    ),
    "lr_div_factor": ("metrics", lambda t: ["--lr-div-factor", 2], ["--lr-scheduler", "one_cycle", "--warmup-steps", 2]),
    "lr_quadratic_warmup": ("metrics", lambda t: ["--lr-quadratic-warmup"], ["--warmup-steps", 1]),
    "cosine_min_lr_ratio": ("metrics", lambda t: ["--cosine-min-lr-ratio", 0.5], []),
    "warmup_steps": ("metrics", lambda t: ["--warmup-steps", 1], []),
    "warmup_ratio": ("metrics", lambda t: ["--warmup-ratio", 0.5], []),
    "weight_decay": ("metrics", lambda t: ["--weight-decay", 0.5], []),
    "weight_decay_rules": ("metrics", lambda t: ["--weight-decay-rules", r"v_proj\.A=5", "q_proj=3"], []),
    "lr_rules": ("metrics", lambda t: ["--lr-rules", "layers.0=0.1"], []),
    "embedding_lr": ("metrics", lambda t: ["--embedding-lr", 0.5], ["--lora-modules-to-save", "embed_tokens"]),
    "adam_beta1": ("metrics", lambda t: ["--adam-beta1", 0.5], []),
    "adam_beta2": ("metrics", lambda t: ["--adam-beta2", 0.5], ["--max-steps", 3]),
    "adam_epsilon": ("metrics", lambda t: ["--adam-epsilon", 0.01], []),
    "momentum": ("metrics", lambda t: ["--momentum", 0.9], SGD),
    "optim_args": ("metrics", lambda t: ["--optim-args", "clip_threshold=0.01"], ["--optimizer", "adafactor", "--max-steps", 3]),
    "master_dtype": ("metrics", lambda t: ["--master-dtype", "bfloat16"], ["--adapter", "none", "--lora-r", None]),
    "tf32": ("out", lambda t: ["--tf32"], []),
    "deterministic": ("out", lambda t: ["--deterministic"], []),
    "max_grad_norm": ("metrics", lambda t: ["--max-grad-norm", 0.01], SGD),
    "num_epochs": ("metrics", lambda t: ["--num-epochs", 2], ["--max-rows", 6, "--max-steps", None]),
    "max_steps": ("metrics", lambda t: ["--max-steps", 3], []),
    "micro_batch_size": ("metrics", lambda t: ["--micro-batch-size", 3], []),
    "gradient_accumulation_steps": ("metrics", lambda t: ["--gradient-accumulation-steps", 1], []),
    "gradient_checkpointing": ("layers run", lambda t: ["--gradient-checkpointing"], []),
    "activation_offloading": ("out", lambda t: ["--activation-offloading", "cpu"], []),
    "layer_offloading": ("out", lambda t: ["--layer-offloading", "cpu"], []),
    "seed": ("metrics", lambda t: ["--seed", 1], []),
    "data_seed": ("metrics", lambda t: ["--data-seed", 1], []),
    "output_dir": ("files", lambda t: ["--output-dir", "other"], []),
    "resume": ("metrics", lambda t: ["--resume", "start/checkpoints/step_000002"], ["--max-steps", 3]),
    # The options allow more than there is, and the rows are short.
    "ignore_memory": ("out", lambda t: ["--ignore-memory"], ["--sequence-len", 1 << 24]),
    "sweep": ("error", lambda t: ["--sweep"], []),
    "overwrite": ("error", lambda t: ["--overwrite"], ["--output-dir", "start", "--max-steps", 3]),
    "eval_steps": ("metrics", lambda t: ["--eval-steps", 1], []),
    "evals_per_epoch": ("metrics", lambda t: ["--evals-per-epoch", 0], []),
    "save_steps": ("files", lambda t: ["--save-steps", 1], []),
    "saves_per_epoch": ("files", lambda t: ["--saves-per-epoch", 99], []),
    "save_total_limit": ("files", lambda t: ["--save-total-limit", 1], ["--save-steps", 1, "--val-set-size", 0]),
    "async_save": ("copies", lambda t: ["--async-save"], []),
    "logging_steps": ("out", lambda t: ["--logging-steps", 2], []),
    "eval_table_size": ("samples", lambda t: ["--eval-table-size", 2], []),
    "eval_causal_lm_metrics": ("metrics", lambda t: ["--eval-causal-lm-metrics", "chrf", "--eval-max-new-tokens", 8], []),
    "lm_eval_tasks": ("files", lambda t: ["--lm-eval-tasks", "answers"], []),
    "lm_eval_batch_size": ("out", lambda t: ["--lm-eval-batch-size", 2], ["--lm-eval-tasks", "answers"]),
    "eval_reward_funcs": ("metrics", lambda t: ["--eval-reward-funcs", "length?max=9,cache=9", "--eval-max-new-tokens", 8], []),
    "eval_reward_timeout": (
        "error", lambda t: ["--eval-reward-timeout", 0.2], ["--eval-reward-funcs", "slow.py:slow", "--eval-max-new-tokens", 8],
    ),
    "eval_answers": (
        "metrics", lambda t: ["--eval-answers", 1],
        ["--eval-causal-lm-metrics", "chrf", "ter", "--eval-max-new-tokens", 30, "--val-set-size", 8],
    ),
    "eval_max_new_tokens": ("samples", lambda t: ["--eval-max-new-tokens", 3], ["--eval-table-size", 1]),
    "early_stopping_patience": (
        "metrics", lambda t: ["--early-stopping-patience", 1], ["--learning-rate", 2, "--eval-steps", 1, "--max-steps", 6]
    ),
    "loss_watchdog_threshold": ("error", lambda t: ["--loss-watchdog-threshold", 0.1], ["--max-steps", 3]),
    "loss_watchdog_patience": (
        "error", lambda t: ["--loss-watchdog-patience", 1], ["--max-steps", 3, "--loss-watchdog-threshold", 0.1]
    ),
    "sharding": ("error", lambda t: ["--sharding", "full"], []),
    "shard": ("error", lambda t: ["--shard", "data=2"], []),
    "nproc": ("out", lambda t: ["--nproc", 2], []),
    "nnodes": ("out", lambda t: ["--nnodes", 2, "--rendezvous", "a:1"], []),
    "rendezvous": ("out", lambda t: ["--rendezvous", "b:1"], ["--nnodes", 2, "--rendezvous", "a:1"]),
    "restarts": ("out", lambda t: ["--restarts", 1], ["--nproc", 2]),
    "use_ray": ("out", lambda t: ["--use-ray"], ["--nproc", 2]),
    "rank_timeout": ("out", lambda t: ["--rank-timeout", 9], ["--nproc", 2]),
    "profiler_steps": ("files", lambda t: ["--profiler-steps", 1], []),
    "profiler_steps_start": ("files", lambda t: ["--profiler-steps-start", 9], ["--profiler-steps", 1]),
    "log_level": ("out", lambda t: ["--log-level", "warning"], []),
    "observer": ("files", lambda t: ["--observer", "watch.py:watch"], []),
    "use_tensorboard": ("files", lambda t: ["--use-tensorboard"], []),
    "sample_prompt": ("samples", lambda t: ["--sample-prompt", "2 + 2"], ASKED),
    "sample_tokens": ("samples", lambda t: ["--sample-tokens", 9], ASKED),
}  # fmt: skip
CLOCK = re.compile(r"\d+ (supervised )?tok\S*/s|[\d.]+ GiB|eta \S+| in \d+:\d+")


def joined(*parts) -> list:
    """Arguments in which later ones replace earlier ones; a None takes an option away."""
    found: dict[str, list] = {}
    for part in parts:
        for arg in part:
            if str(arg).startswith("--"):
                found[arg] = []
                values = found[arg]
            else:
                values.append(arg)
    return [part for flag, values in found.items() if values != [None] for part in (flag, *values)]


@pytest.fixture(scope="module")
def start(kit, tiny, tmp_path_factory):
    """A finished run to resume from or to start from."""
    from treetune.cli import main

    root = tmp_path_factory.mktemp("start")
    args = joined(BASE, ["--output-dir", root / "start", "--max-steps", 2, "--learning-rate", 0.3])
    assert main.main(["sft", *kit.basics(tiny, *args, without=("--sample-tokens",))]) == 0
    return root / "start"


@pytest.fixture
def observed(kit, tiny, here, tune, start, monkeypatch):
    """observed(args) -> what can be seen of a run: records, printed text, files, samples, error, layers run."""
    import shutil

    rows = [row | {"text": f"text of row {i}"} for i, row in enumerate(kit.chats(24))]
    kit.write_rows(here / "both.jsonl", rows)
    (here / "slow.py").write_text("import time\ndef slow(completions):\n    time.sleep(0.4)\n    return [1.0] * len(completions)\n")
    (here / "watch.py").write_text("def watch(event, record):\n    open(f'{event}.seen', 'w').close()\n")
    monkeypatch.setattr(ray_launch, "run", lambda words, *how, **more: print(how, more) or 3)
    monkeypatch.setattr(launch, "run", lambda words, how, tell: print(how, "--rank-timeout" in words) or 3)  # tests/dist starts processes
    monkeypatch.setattr(memory_ladder, "capacity", lambda device: 2**31)  # of a small machine
    monkeypatch.setattr(lm_eval, "check", lambda tasks: None)  # test_lm_eval.py asks
    monkeypatch.setattr(lm_eval, "run", lambda config, given: print(config.batch_size) or Path(config.output_path).touch())
    copied, copy = [], ckpt_parts.on_host
    monkeypatch.setattr(ckpt_parts, "on_host", lambda own: copied.append(1) or copy(own))
    calls, layer = [], dense._layer
    monkeypatch.setattr(dense, "_layer", lambda *args: calls.append(1) or layer(*args))

    def run(args):
        calls.clear()
        copied.clear()
        for name, write in (("experts", kit.write_experts), ("biased", kit.write_biased), ("words", kit.write_tokenizer)):
            if name in args and not (here / name).exists():
                write(here / name)
        if any(str(arg).startswith("start") for arg in args) and not (here / "start").exists():
            shutil.copytree(start, here / "start")
        unasked = left_out(args)
        done = tune("sft", *kit.basics(tiny, *args, without=("--lora-r", "--max-steps", *unasked)))
        home = next((here / str(args[i + 1]) for i in [*range(len(args) - 1)] if args[i] == "--output-dir"), here)
        records = kit.timeless(kit.metrics(home)) if done.code == 0 else None
        samples = kit.samples(home) if done.code == 0 and (home / "samples.jsonl").exists() else None
        files = {path for path in kit.listing(here) if not path.startswith("start/")}
        seen = {
            "metrics": records,
            "out": re.sub(" +\n", "\n", CLOCK.sub("", done.out)),  # tables are as wide as the times in them
            "files": files,
            "samples": samples,
            "error": done.err,
            "layers run": len(calls),
            "copies": len(copied),  # of a checkpoint
        }
        if home.name == "run" and home.exists():
            shutil.rmtree(home)
        return seen

    return run


def left_out(args) -> tuple[str, ...]:
    """Basic arguments that a run without a sample prompt does not have."""
    return () if set(ASKED) <= set(map(str, args)) or "2 + 2" in args else ("--sample-tokens",)


def numbers(records):
    """Records without what merely counts tokens."""
    return [{key: value for key, value in record.items() if "num_tokens" not in key} for record in records]


@pytest.fixture(scope="module")
def plain_runs():
    """{arguments: what was seen of a run with them}: the numbers of many options are compared with those of the same one."""
    return {}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", CHANGES)
def test_option_changes_the_run(name, plain_runs, tiny, observed):
    import torch

    if name == "device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA: the option changes where it runs")
    what, change, both = CHANGES[name]
    key = tuple(map(str, both)) if what in ("metrics", "samples") else name  # all else may name the working folder
    if key not in plain_runs:
        plain_runs[key] = observed(joined(BASE, both))
    plain, changed = plain_runs[key], observed(joined(BASE, both, change(tiny)))
    assert plain[what] != changed[what]
    if what == "metrics":
        assert plain["error"] == changed["error"] == "", changed["error"]
        assert numbers(plain["metrics"]) != numbers(changed["metrics"])


def test_there_is_a_row_for_every_option():
    # Lists of mappings are tested in test_datasets.py, what trackers are given in test_trackers.py, uploads in test_hub.py.
    elsewhere = set(vars(TrackerOptions())) - {"use_tensorboard"} | set(vars(HubOptions()))
    assert set(CHANGES) == {name for name, option in table.options(Sft).items() if not option.of_mappings} - elsewhere


SAMPLING = {
    "max_new_tokens": ["--max-new-tokens", 3], "temperature": ["--temperature", 3], "top_p": ["--top-p", 0.1], "top_k": ["--top-k", 2],
    "min_p": ["--min-p", 0.5], "seed": ["--seed", 3],
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_option_changes_the_answer(name, tiny, tune):
    base = ["--model", tiny.model, "--temperature", 1, "--top-p", 1.0, "--max-new-tokens", 20]
    plain, changed = tune("generate", "1 + 1", *base), tune("generate", "1 + 1", *joined(base, SAMPLING[name]))
    assert plain.code == changed.code == 0 and plain.out != changed.out
    assert set(SAMPLING) == set(vars(SampleOptions()))


EVALUATION = {
    "dtype": ["--dtype", "bfloat16"], "quant": ["--quant", "nf4"], "max_rows": ["--max-rows", 9], "overlong": ["--overlong", "truncate"],
    "roles_to_train": ["--roles-to-train", "user"], "train_on_eos": ["--train-on-eos", "last"], "train_on_inputs": ["--train-on-inputs"],
    "chat_template": ["--chat-template", LONG], "default_system_message": ["--default-system-message", "Add."],
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_option_changes_the_numbers(name, tiny, tune):
    base = ["eval", "--model", tiny.model, "--data", tiny.chat, "--sequence-len", 70]
    plain, changed = tune(*base), tune(*base, *EVALUATION[name])
    assert plain.code == changed.code == 0
    assert CLOCK.sub("", plain.out) != CLOCK.sub("", changed.out)


# option -> (the arguments that set it, arguments on both sides)
ASKING = {
    "eval_table_size": (["--eval-table-size", 1], ["--eval-causal-lm-metrics", "chrf"]),
    "eval_max_new_tokens": (["--eval-max-new-tokens", 2], ["--eval-table-size", 1]),
    "eval_causal_lm_metrics": (["--eval-causal-lm-metrics", "chrf"], []),
    "eval_reward_funcs": (["--eval-reward-funcs", "length?max=9,cache=9"], []),
    "eval_reward_timeout": (["--eval-reward-timeout", 0.2], ["--eval-reward-funcs", "slow.py:slow"]),
    "eval_answers": (["--eval-answers", 1], ["--eval-causal-lm-metrics", "chrf", "ter"]),
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ASKING)
def test_answer_option_of_evaluation_changes_what_is_told(name, tiny, tune, here):
    (here / "slow.py").write_text("import time\ndef slow(completions):\n    time.sleep(0.4)\n    return [1.0] * len(completions)\n")
    change, both = ASKING[name]
    base = joined(["--model", tiny.model, "--data", tiny.chat, "--max-rows", 4, "--sequence-len", 128], both)
    plain, changed = tune("eval", *base), tune("eval", *base, *change)
    assert plain.code == 0 and changed.code == (2 if name == "eval_reward_timeout" else 0)
    assert CLOCK.sub("", plain.out + plain.err) != CLOCK.sub("", changed.out + changed.err)
    assert set(ASKING) == set(vars(AnswerOptions()))


def test_adam_beta2_of_lion_is_its_own(observed):
    lion = joined(BASE, ["--optimizer", "lion", "--max-steps", 3])
    assert observed(lion)["metrics"] == observed(joined(lion, ["--adam-beta2", 0.99]))["metrics"]
    assert observed(lion)["metrics"] != observed(joined(lion, ["--adam-beta2", 0.5]))["metrics"]


def test_same_options_give_the_same_run(observed):
    one, other = (observed(joined(BASE, ASKED)) for _ in range(2))
    assert json.dumps(one["metrics"]) == json.dumps(other["metrics"]) and one["out"] == other["out"] and one["samples"] == other["samples"]


def test_gradient_checkpointing_changes_no_number(observed):
    plain = observed(BASE)["metrics"]
    for policy in (["--gradient-checkpointing"], ["--gradient-checkpointing", "selective"], ["--activation-offloading", "disk"]):
        assert observed([*BASE, *policy])["metrics"] == plain, policy


def test_layer_offloading_changes_no_number(observed, monkeypatch):
    moved, put = [], layer_offload._in_file
    monkeypatch.setattr(layer_offload, "_in_file", lambda part: moved.append(part.nbytes) or put(part))
    for more in ([], ["--quant", "nf4", "--gradient-checkpointing"]):
        assert observed([*BASE, *more, "--layer-offloading", "disk"])["metrics"] == observed([*BASE, *more])["metrics"]
    assert moved
