"""Bad input: one clear line on stderr, exit code 2, and nothing written."""

import json
import shutil

import pytest
import torch

PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
CASES = {
    "unknown command": lambda t, d: (["sfft"], "unknown command 'sfft'", "did you mean sft"),
    "letters swapped": lambda t, d: (["trian", "run.yaml"], "unknown command 'trian'", "did you mean train"),
    "rows without an option": lambda t, d: (["sft", "--max-steps", "2", "chats.jsonl"], "chats.jsonl has no option before it", "--data"),
    "missing file": lambda t, d: (sft(t, "--data", "nope.jsonl"), "nope.jsonl: no such file"),
    "broken json": lambda t, d: (
        sft(t, "--data", text(d, "bad.jsonl", '{"text": "a"}\n\n{"text": oops}\n')), "bad.jsonl line 3", "broken JSON"
    ),
    "not utf-8": lambda t, d: (sft(t, "--data", raw(d, "bad.jsonl", b'{"text": "\xff"}\n')), "bad.jsonl line 1", "UTF-8"),
    "empty file": lambda t, d: (sft(t, "--data", text(d, "empty.jsonl", "")), "empty.jsonl has no rows"),
    "row without field": lambda t, d: (
        sft(t, "--data", text(d, "r.jsonl", '{"text": "a"}\n{"txt": "b", "id": 1}\n')), "r.jsonl line 2", "text", "txt, id"
    ),
    "columns of no format": lambda t, d: (sft(t, "--data", text(d, "r.jsonl", '{"a": 1, "b": 2}\n')), "no format fits", "a, b", "messages"),
    "message without role": lambda t, d: (
        sft(t, "--data", text(d, "r.jsonl", '{"messages": [{"content": "hi"}]}\n' * 2)), r"r.jsonl line \d: message 1", "role", "content"
    ),
    "one row only": lambda t, d: (sft(t, "--data", text(d, "r.jsonl", '{"text": "abc"}\n')), "val.* size 0.1", "of 1 rows"),
    "no template": lambda t, d: (sft(t, "--model", t.bare), "no chat template", "chat_template"),
    "no template to generate with": lambda t, d: (["generate", "hi", "--model", t.bare], "no chat template", "--raw"),
    "template file missing": lambda t, d: (sft(t, "--chat-template", "x.jinja"), "x.jinja does not exist"),
    "template refuses": lambda t, d: (sft(t, "--chat-template", "{{ raise_exception('no') }}"), r"chat.jsonl line \d", "template refuses"),
    "template broken": lambda t, d: (sft(t, "--chat-template", "{% for %}"), "template"),
    "no trainable token": lambda t, d: (sft(t, "--roles-to-train", "critic"), "not one token to train on", "roles_to_train"),
    "all rows too long": lambda t, d: (sft(t, "--sequence-len", 4), "not one token to train on", "raise sequence_len"),
    "one row too long": lambda t, d: (sft(t, "--sequence-len", 40, "--overlong", "error"), "chat.jsonl line", "more than sequence_len 40"),
    "longer than positions": lambda t, d: (sft(t, "--sequence-len", 257), "sequence_len 257", "256 positions"),
    "eval longer than positions": lambda t, d: (
        ["eval", "--model", t.model, "--data", t.chat, "--sequence-len", 512], "sequence_len 512", "256 positions"
    ),
    "tokenizer of another model": lambda t, d: (
        sft(t, "--model", t.model, "--from-config", config(t, d, vocab_size=99), command="pretrain", data=t.text), "token id", "has 99"
    ),
    "no routers": lambda t, d: (sft(t, "--router-z-loss-coef", 0.1), "router_z_loss_coef weighs a loss of routers, and a llama model has"),
    "no routers, dpo": lambda t, d: (
        sft(t, "--router-aux-loss-coef", 0.1, command="dpo", data=text(d, "p.jsonl", PAIR * 3)), "router_aux_loss_coef weighs a loss of"
    ),
    "misspelt flag": lambda t, d: (sft(t, "--learning-rat", 1), "unknown option --learning-rat ", "did you mean --learning-rate"),
    "flag twice": lambda t, d: (sft(t, "--seed", 1, "--seed=2"), "--seed is given twice"),
    "negated flag twice": lambda t, d: (sft(t, "--shuffle", "--no-shuffle"), "shuffle is given twice"),
    "wrong type": lambda t, d: (sft(t, "--lora-r", "four"), "--lora-r must be a whole number", "got 'four'"),
    "value of a switch": lambda t, d: (sft(t, "--shuffle", "false"), "--shuffle takes no value, got 'false'", "--no-shuffle"),
    "value of a negated switch": lambda t, d: (sft(t, "--no-shuffle=true"), "takes no value, got 'true'", "--shuffle or --no-shuffle"),
    "near choice": lambda t, d: (sft(t, "--optimizer", "adamv"), "one of adamw, .*, sgd, or FILE.py:FUNCTION, got", "mean adamw"),
    "optim args of another": lambda t, d: (
        sft(t, "--optimizer", "adafactor", "--optim-args", "rank=8"),
        "optim-args rank: adafactor takes no such; it takes decay_rate, clip_threshold, scale_parameter, paged",
    ),
    "layers of a model that trains": lambda t, d: (
        sft(t, "--layer-offloading", "disk", "--adapter", "none"), "--layer-offloading would be ignored: adapter is none, and all"
    ),
    "layers that the adapter is merged into": lambda t, d: (
        sft(t, "--layer-offloading", "disk", "--relora-steps", 4), "--layer-offloading would be ignored: relora_steps merges the adapter"
    ),
    "layers whose codes are multiplied": lambda t, d: (
        sft(t, "--layer-offloading", "disk", "--quant", "fp8", "--fp8-products"), "--layer-offloading would be ignored: fp8_products"
    ),
    "optim args choice": lambda t, d: (
        sft(t, "--optimizer", "muon", "--optim-args", "adjust=none"), "adjust must be one of match_rms_adamw, original, got 'none'"
    ),
    "optim args switch": lambda t, d: (sft(t, "--optim-args", "paged=1"), "optim-args paged must be true or false, got 1"),
    "optim args range": lambda t, d: (sft(t, "--optimizer", "adafactor", "--optim-args", "clip_threshold=0"), "clip_threshold must be"),
    "optim args of its name": lambda t, d: (sft(t, "--optimizer", "paged_adamw", "--optim-args", "paged=true"), "it takes none"),
    "list of numbers": lambda t, d: (sft(t, "--lora-layers", 0, "b"), "--lora-layers must be a whole number .*, got 'b'"),
    "nothing to merge": lambda t, d: (["merge"], "treetune merge needs ADAPTER and OUTPUT"),
    "special tokens map": lambda t, d: (sft(t, "--model", rewritten(t, d, "special_tokens_map.json", "[1]")), "map.json holds a list"),
    "template not text": lambda t, d: (sft(t, "--model", rewritten(t, d, "chat_template.jinja", "\udcff")), "template.jinja is not UTF-8"),
    "value with a dash": lambda t, d: (sft(t, "--default-system-message", "-be kind"), "--default-system-message='-be kind' if"),
    "one dash": lambda t, d: (sft(t, "-lr", 1), "unknown option -lr: options begin with two dashes", "did you mean --learning-rate"),
    "empty model": lambda t, d: (sft(t, "--model", ""), "model is empty"),
    "empty data": lambda t, d: (sft(t, "--data", ""), "data is empty"),
    "empty output": lambda t, d: (sft(t, "--output-dir="), "output_dir is empty"),
    "empty config": lambda t, d: (["sft", "--config", ""], "--config needs a file name"),
    "zero byte": lambda t, d: (sft(t, "--output-dir", "a\0b"), r"output_dir has a zero byte in 'a\\x00b'"),
    "name too long": lambda t, d: (sft(t, "--output-dir", "a" * 300), "output_dir has a name of more than 255 bytes"),
    "model is a file of weights": lambda t, d: (sft(t, "--model", t.model / "model.safetensors"), "name the folder that holds it"),
    "model folder is empty": lambda t, d: (sft(t, "--model", text(d, "e/x", "x").parent), "holds no model: there is no config"),

    "json object over lines": lambda t, d: (sft(t, "--data", text(d, "x.json", '{\n "data": []\n}')), "holds an object over several lines"),
    "null": lambda t, d: (sft(t, "--data", text(d, "r.jsonl", '{"text": "a"}\n{"text": null}\n')), "r.jsonl line 2: field text is null"),
    "no value": lambda t, d: (sft(t, "--seed"), "seed"),
    "wrong choice": lambda t, d: (sft(t, "--optimizer", "adam"), "optimizer", "adamw"),
    "stray word": lambda t, d: (sft(t, "stray"), "stray"),
    "config missing": lambda t, d: (["sft", "--config", "no.yaml"], "no.yaml does not exist"),
    "config without name": lambda t, d: (["sft", "--config"], "--config needs a file name"),
    "config twice": lambda t, d: (["sft", "--config", "a.yaml", "--config=b.yaml"], "--config is given twice"),
    "config key": lambda t, d: (yaml(d, "learning_rat: 1\n"), "c.yaml", "'learning_rat'", "did you mean learning_rate"),
    "config key twice": lambda t, d: (yaml(d, "seed: 1\nlora_r: 2\nseed: 3\n"), "c.yaml", "'seed' is given twice"),
    "config list": lambda t, d: (yaml(d, "- seed\n"), "c.yaml", "got a list"),
    "config empty list": lambda t, d: (yaml(d, "[]\n"), "c.yaml", "got a list"),
    "config unsafe": lambda t, d: (yaml(d, "model: !!python/object/apply:os.system ['touch owned']\n"), "c.yaml", "not valid YAML"),
    "config broken": lambda t, d: (yaml(d, "model: [a\n"), "c.yaml", "not valid YAML"),
    "config not text": lambda t, d: (["sft", "--config", raw(d, "c.yaml", b"\xff\xfe\x00")], "c.yaml", "not valid YAML"),
    "config type": lambda t, d: (yaml(d, "lora_r: four\n"), "c.yaml: lora_r must be a whole number of at least 1", 'got "four"'),
    "config boolean": lambda t, d: (yaml(d, "adapter: no\n"), "c.yaml: adapter must be one of lora, qlora, none, got no", "quotes"),
    "config not boolean": lambda t, d: (yaml(d, "shuffle: 'yes'\n"), "c.yaml: shuffle must be true or false", "yes"),
    "config mapping": lambda t, d: (yaml(d, "data:\n- path: x\n"), "c.yaml: data", "path"),
    "config nothing": lambda t, d: (yaml(d, "lora_r:\n"), "c.yaml: lora_r has no value"),
    "config of another command": lambda t, d: (yaml(d, "lora_r: 4\n", "pretrain"), "c.yaml", "unknown key 'lora_r'"),
    "config ignored": lambda t, d: (yaml(d, "adapter: none\nlora_r: 4\n"), "--lora-r would be ignored", "adapter is none"),
    "target matches nothing": lambda t, d: (sft(t, "--lora-target-modules", "qproj"), "'qproj' matches no par", "the nearest are q_proj"),
    "target is no regex": lambda t, d: (sft(t, "--lora-target-modules", "q_(proj"), "not a regular expression"),
    "layer out of range": lambda t, d: (sft(t, "--lora-layers", 0, 7), r"layers \[7\]", "0 to 1"),
    "module to save": lambda t, d: (sft(t, "--lora-modules-to-save", "head_lm"), "'head_lm' matches no parameter", "lm_head"),
    "adapted and saved": lambda t, d: (sft(t, "--lora-modules-to-save", "q_proj"), "q_proj.weight|q_proj", "choose one"),
    "rule matches nothing": lambda t, d: (sft(t, "--lr-rules", "zz=2"), "'zz' matches no parameter"),
    "rule without number": lambda t, d: (sft(t, "--weight-decay-rules", "norm"), "REGEX=NUMBER", "norm"),
    "pickle only": lambda t, d: (sft(t, "--model", pickled(t, d)), "pickled weights only", "safetensors"),
    "model of no family": lambda t, d: (sft(t, "--model", edited(t, d, "config.json", model_type="bert")), "bert"),
    "model is not there": lambda t, d: (sft(t, "--model", "nope"), "nope is not a folder"),
    "model without config": lambda t, d: (sft(t, "--model", lacking(t, d, "config.json")), "config.json"),
    "model without tokenizer": lambda t, d: (sft(t, "--model", lacking(t, d, "tokenizer.json")), "tokenizer"),
    "model cut short": lambda t, d: (sft(t, "--model", cut(t, d, "model.safetensors")), "model.safetensors"),
    "tokenizer cut short": lambda t, d: (sft(t, "--model", cut(t, d, "tokenizer.json")), "tokenizer"),
    "config cut short": lambda t, d: (sft(t, "--model", cut(t, d, "config.json")), "config.json", "line"),
    "weights not finite": lambda t, d: (sft(t, "--model", poisoned(t, d)), r"not finite: layers\.1\.q_proj"),
    "weights not finite in eval": lambda t, d: (["eval", "--model", poisoned(t, d), "--data", t.chat], r"not finite: layers\.1\.q_proj"),
    "revision of a folder": lambda t, d: (sft(t, "--revision", "main"), "--revision would be ignored"),
    "split of a file": lambda t, d: (sft(t, "--split", "test"), "split"),
    "no cuda": lambda t, d: (sft(t, "--device", "cuda"), "cuda"),
    "from_config missing": lambda t, d: (sft(t, "--from-config", "no.json", command="pretrain", data=t.text), "no.json does not exist"),
    "from_config lacks a size": lambda t, d: (
        sft(t, "--from-config", text(d, "c.json", '{"model_type": "llama"}'), command="pretrain", data=t.text), "hidden_size|num_"
    ),
    "text column": lambda t, d: (sft(t, "--text-column", "body", command="pretrain", data=t.text), r"text.jsonl line \d", "body", "text"),
    "resume nothing": lambda t, d: (sft(t, "--resume", "runs/x"), "runs/x is not a checkpoint"),
    "resume and overwrite": lambda t, d: (sft(t, "--resume", "auto", "--overwrite"), "resume or overwrite"),
    "output is a file": lambda t, d: (sft(t, "--output-dir", text(d, "out", "x")), "out"),
    "output is not empty": lambda t, d: (sft(t, "--output-dir", text(d, "out/notes.txt", "x").parent), "out already holds files that no"),
    "output is not ours": lambda t, d: (sft(t, "--output-dir", text(d, "out/notes.txt", "x").parent, "--overwrite"), "not made by"),
    "resume in a foreign folder": lambda t, d: (sft(t, "--output-dir", text(d, "out/notes.txt", "x").parent, "--resume", "auto"), "no run"),
    "info of nothing": lambda t, d: (["info", "nope"], "nope is not a folder"),
    "fetch of nothing": lambda t, d: (["fetch", "nope"], "nope is not a folder"),
    "hub out of reach": lambda t, d: (sft(t, "--model", "owner/name"), "owner/name", "hub cannot be reached"),
    "adapter missing": lambda t, d: (["generate", "hi", "--adapter", "nope"], "nope does not exist: expected an adapter's folder"),
    "adapter without rank": lambda t, d: (
        ["info", text(d, "a/adapter_config.json", '{"peft_type": "LORA"}').parent], "r must be a whole number"
    ),
    "merge onto a folder": lambda t, d: (["merge", "a", text(d, "out/x", "x").parent], "out exists"),
    "raw with system": lambda t, d: (["generate", "hi", "--raw", "--system", "s", "--model", t.model], "--system would be ignored"),
    "system refused": lambda t, d: (["generate", "hi", "--system", "s", "--model", refusing(t, d)], "template refuses", "system, user"),
    "adapter not finite": lambda t, d: (["eval", "--adapter", rotten(t, d), "--data", t.chat], r"not finite: layers\.0\.q_proj\.B"),
    "answer too long": lambda t, d: (["generate", "hi", "--model", t.model, "--max-new-tokens", 999], "999"),
    "empty raw prompt": lambda t, d: (["generate", "", "--raw", "--model", t.model], "prompt is empty"),
    "top_p out of range": lambda t, d: (["generate", "hi", "--model", t.model, "--top-p", 1.5], "top_p"),
}  # fmt: skip


def sft(tiny, *args, command="sft", data=None):
    """A training command on the tiny files, without what `args` gives itself."""
    args = [str(arg) for arg in args]
    known = {"--model": tiny.model, "--data": data or tiny.chat, "--sequence-len": 128}
    return [command, *args, *[part for flag, value in known.items() if flag not in args for part in (flag, value)]]


def text(folder, name, content):
    return raw(folder, name, content.encode())


def raw(folder, name, content):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def yaml(folder, content, command="sft"):
    return [command, "--config", text(folder, "c.yaml", content)]


def rewritten(tiny, folder, name, content):
    path = copied(tiny, folder)
    (path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    return path


def copied(tiny, folder):
    return shutil.copytree(tiny.model, folder / "copy")


def edited(tiny, folder, name, **changes):
    path = copied(tiny, folder)
    (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | changes))
    return path


def config(tiny, folder, **changes):
    return edited(tiny, folder, "config.json", **changes) / "config.json"


def lacking(tiny, folder, name):
    (copied(tiny, folder) / name).unlink()
    return folder / "copy"


def cut(tiny, folder, name):
    file = copied(tiny, folder) / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file.parent


def pickled(tiny, folder):
    path = lacking(tiny, folder, "model.safetensors")
    torch.save({}, path / "pytorch_model.bin")
    return path


def refusing(tiny, folder):
    path = copied(tiny, folder)
    (path / "chat_template.jinja").write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x")
    return path


def poisoned(tiny, folder):
    from safetensors.torch import load_file, save_file

    file = copied(tiny, folder) / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.self_attn.q_proj.weight"][3, 2] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    return file.parent


def rotten(tiny, folder):
    """An adapter with a nan."""
    from treetune.core import lora
    from treetune.models import adapter, hf

    base = hf.load(tiny.model)
    tree = lora.init(base.params, ["layers.0.q_proj"], rank=2, seed=0)
    tree["layers"][0]["q_proj"]["B"][0] = float("nan")
    adapter.save(folder / "a", tree, family="llama", info=adapter.Info(2, 4, base=str(tiny.model)))
    return folder / "a"


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_writes_nothing(case, tiny, kit, here, tune):
    args, *words = CASES[case](tiny, here)
    before = kit.listing(here)
    done = tune(*args)
    kit.refused(done, *words)
    assert kit.listing(here) == before


OUT_OF_RANGE = {
    "learning_rate": (0, -1, "nan", "inf"), "adam_beta1": (1, -0.1), "adam_beta2": (1,), "adam_epsilon": (0,), "max_grad_norm": (-1,),
    "weight_decay": (-1,), "warmup_ratio": (1.5, -0.1), "warmup_steps": (-1,), "cosine_min_lr_ratio": (1.1,), "momentum": (1,),
    "label_smoothing": (1, -0.1), "z_loss_coef": (-1,), "router_aux_loss_coef": (-1,), "router_z_loss_coef": (-1, "nan"),
    "neftune_noise_alpha": (-1, "nan"), "num_epochs": (0,), "max_steps": (0,),
    "micro_batch_size": (0,), "gradient_accumulation_steps": (0,), "sequence_len": (0,), "max_rows": (0,), "val_set_size": (-1, 1.5, "nan"),
    "lora_r": (0, -3), "lora_alpha": (0, "nan"), "lora_dropout": (1, -0.1), "loraplus_lr_ratio": (0,), "eval_steps": (0,),
    "save_steps": (0,), "save_total_limit": (0, -1), "logging_steps": (0,), "early_stopping_patience": (0,), "loss_watchdog_patience": (0,),
    "loss_watchdog_threshold": (0,), "sample_tokens": (0,),
    "eval_table_size": (-1,), "eval_max_new_tokens": (0,), "eval_answers": (0,), "eval_reward_timeout": (0,), "lm_eval_batch_size": (0,),
}  # fmt: skip
VALUES = [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_value_out_of_range_is_refused_before_anything_starts(name, value, kit, here, tune):
    kit.refused(tune("sft", f"--{name.replace('_', '-')}={value}"), f"^treetune: error: {name} must be .*, got {value}")
    assert kit.listing(here) == set()


IGNORED = [
    ("--optimizer sgd --adam-epsilon 1e-8", "adam-epsilon", "sgd has no epsilon"),
    ("--optimizer lion --adam-epsilon 1e-8", "adam-epsilon", "lion has no epsilon"),
    ("--optimizer sgd --adam-beta1 0.9", "adam-beta1", "momentum instead"),
    ("--optimizer adafactor --adam-beta1 0.9", "adam-beta1", "adafactor has no first moment"),
    ("--optimizer adagrad --momentum 0.9", "momentum", "adagrad has no momentum"),
    ("--optimizer sgd --adam-beta2 0.9", "adam-beta2", "momentum instead"),
    ("--momentum 0.9", "momentum", "adam_beta1 instead"),
    ("--optimizer lion --momentum 0.0", "momentum", "adam_beta1 instead"),
    ("--lr-scheduler linear --cosine-min-lr-ratio 0.1", "cosine-min-lr-ratio", "linear"),
    ("--loss dft --label-smoothing 0.1", "label-smoothing", "the loss is dft"),
    ("--val-set-size 0 --eval-steps 3", "eval-steps", "nothing is held out"),
    ("--val-set-size 0 --early-stopping-patience 3", "early-stopping-patience", "nothing is held out"),
    ("--val-data x.jsonl --val-set-size 0.2", "val-set-size", "val_data is given"),
    ("--loss-watchdog-patience 3", "loss-watchdog-patience", "no loss_watchdog_threshold"),
    ("--val-set-size 0 --eval-table-size 3", "eval-table-size", "nothing is held out"),
    ("--evals-per-epoch 0 --eval-table-size 3", "eval-table-size", "evals_per_epoch is 0"),
    ("--eval-max-new-tokens 3", "eval-max-new-tokens", "eval_table_size is 0"),
    ("--val-set-size 0 --eval-causal-lm-metrics chrf", "eval-causal-lm-metrics", "nothing is held out"),
    ("--eval-answers 3", "eval-answers", "neither eval_causal_lm_metrics nor eval_reward_funcs"),
    ("--eval-answers 3 --eval-causal-lm-metrics perplexity", "eval-answers", "neither eval_causal_lm_metrics nor eval_reward_funcs"),
    ("--evals-per-epoch 0 --eval-reward-funcs digits", "eval-reward-funcs", "evals_per_epoch is 0"),
    ("--lm-eval-batch-size 3", "lm-eval-batch-size", "lm_eval_tasks names none"),
    ("--lm-eval-tasks piqa --nproc 2", "lm-eval-tasks", "several processes train"),
    ("--eval-reward-timeout 3", "eval-reward-timeout", "eval_reward_funcs names none"),
    ("--sample-prompt= --sample-tokens 3", "sample-tokens", "sample_prompt is empty"),
    ("--sharding full", "sharding", "nproc"), ("--shard data=2", "shard", "nproc"), ("--rank-timeout 9", "rank-timeout", "one process"),
    ("--restarts 1", "restarts", "nproc"), ("--rendezvous a:1", "rendezvous", "one machine"),
    *[(f"--adapter none {flag}", flag.split()[0][2:].removeprefix("no-"), "adapter is none") for flag in (
        "--lora-r 16", "--lora-alpha 1", "--lora-rslora", "--lora-dropout 0.1", "--lora-target-modules q", "--lora-layers 0",
        "--lora-modules-to-save q", "--lora-model-dir a", "--loraplus-lr-ratio 2")],
    *[(f"--lora-model-dir a {flag}", flag.split()[0][2:], "lora_model_dir brings its own") for flag in (
        "--lora-r 16", "--lora-alpha 1", "--lora-rslora", "--lora-target-modules q", "--lora-layers 0")],
]  # fmt: skip


@pytest.mark.parametrize(("args", "name", "reason"), IGNORED)
def test_option_that_would_be_ignored_is_refused(args, name, reason, kit, here, tune):
    kit.refused(tune("sft", *args.split()), f"--{name} would be ignored: .*{reason}")
    assert kit.listing(here) == set()


OF_OTHER_ROWS = [
    ("text", "train-on-eos last"), ("text", "overlong drop"), ("text", "train-on-inputs"), ("text", "roles-to-train user"),
    ("alpaca", "roles-to-train user"), ("alpaca", "train-on-eos all"), ("alpaca", "chat-template x"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "name"), OF_OTHER_ROWS)
@pytest.mark.parametrize("command", ["sft", "eval"])
def test_option_that_these_rows_would_ignore_is_refused(command, rows, name, kit, tiny, here, tune):
    done = tune(*sft(tiny, "--sequence-len", 255, *f"--{name}".split(), command=command, data=getattr(tiny, rows)))
    kit.refused(done, f"--{name.split()[0]} would be ignored")
    assert kit.listing(here) == set()


@pytest.mark.parametrize("flag", ["--top-p 0.5", "--top-k 3", "--min-p 0.1", "--seed 1"])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_sampling_option_without_sampling_is_refused(command, flag, kit, tune):
    kit.refused(tune(command, "--temperature", 0, *flag.split()), f"{flag.split()[0]} would be ignored")


def test_both_kinds_of_warmup_are_refused(kit, tune):
    kit.refused(tune("sft", "--warmup-steps", 1, "--warmup-ratio", 0.1), "warmup_steps or warmup_ratio")
