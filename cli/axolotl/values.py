"""Keys whose value means one or several options of ours: key -> function of its value and of the file. Imports no torch."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from treetune.cli.axolotl import intervals, keys, placing, precision
from treetune.cli.axolotl.file import File, Unsupported, Values, write
from treetune.core import registry
from treetune.core.data import samples

JINJA = Path(samples.__file__).parent / "jinja"


def _targets(value: Any, file: File) -> Values:
    if file.value("lora_target_linear"):
        return {"lora_target_modules": write(["all-linear"])}
    stacks = file.value("lora_target_parameters", [])
    stacks = [stacks] if isinstance(stacks, str) else list(stacks)
    named = file.value("lora_target_modules", [])
    # PEFT compares a text with the whole name, and the names of a list with the ends.
    named = [named if named == "all-linear" or re.fullmatch(r"\w+", named) else f"^(?:{named})$"] if isinstance(named, str) else list(named)
    return {"lora_target_modules": write(named + stacks)} if named or stacks else {}


def _rates(value: Any, file: File) -> Values:
    """lr_rules of the file, and those that lr_groups and embedding_lr_scale mean: rates of parts are relative to learning_rate here."""
    rules, peak = list(file.value("lr_rules", [])), file.value("learning_rate")
    for group in file.value("lr_groups", []):
        if peak is None:
            raise Unsupported("learning_rate beside lr_groups, whose rates are relative here")
        if not group.get("modules") or "lr" not in group:
            raise Unsupported("groups with modules and lr each")
        rules.append(f"{'|'.join(re.escape(name) for name in group['modules'])}={float(group['lr']) / float(peak):.10g}")
    scale = file.value("embedding_lr_scale")
    return {"lr_rules": write(rules if scale is None else [*rules, f"embed={float(scale):.10g}"])}


def _optimizer(value: Any, file: File) -> Values:
    return {"optimizer": write(keys.OPTIMIZERS.get(str(value), registry.OPTIMIZER_ALIASES.get(str(value), value)))}


def _optim_args(value: Any, file: File) -> Values:
    return {"optim_args": write(placing.with_pages(placing.optim_args(value), file))}  # one key of a file lays over another


def _schedule_args(value: Any, file: File) -> Values:
    return {"lr_scheduler_kwargs": write(placing.numbers(value))}


def _schedule(value: Any, file: File) -> Values:
    return {"lr_scheduler": write({"constant_with_warmup": "constant"}.get(str(value), value))}


def _scale_rewards(value: Any, file: File) -> Values:
    kinds = {True: "group_scaled", False: "centered", "group": "group_scaled", "batch": "batch_scaled", "none": "centered"}
    if value not in kinds:
        raise Unsupported("true, false, group, batch or none")
    gdpo = file.value("rl") == "gdpo" or file.value("multi_objective_aggregation") == "normalize_then_sum"
    return {} if gdpo else {"advantage": write(kinds[value])}


def _aggregation(value: Any, file: File) -> Values:
    if value not in ("normalize_then_sum", "sum_then_normalize"):
        raise Unsupported("normalize_then_sum or sum_then_normalize")
    return {"advantage": write("gdpo")} if value == "normalize_then_sum" else {}


def _generation(value: Any, file: File) -> Values:
    """Parameters of sampling: those that are options of ours, and the rest."""
    own = {name: write(item) for name, item in value.items() if name in file.options}
    rest = {name: item for name, item in value.items() if name not in file.options}
    return own | ({"generation_kwargs": write(rest)} if rest else {})


def _colocated(value: Any, file: File) -> Values:
    return {"vllm_mode": write("managed" if value == "colocate" else value)}


def _server(value: Any, file: File) -> Values:
    if value and file.value("adapter") is None and file.value("vllm_mode") not in ("colocate", "managed"):
        raise Unsupported("adapter: lora, or vllm_mode: colocate; whole weights reach a server by restarting it")
    return {"use_vllm": write(value)}


def _ahead(value: Any, file: File) -> Values:
    if value and file.value("adapter") is None:
        raise Unsupported("adapter: lora; whole weights would be held twice to sample ahead")
    return {"async_prefetch": write(value)}


def _labels(value: Any, file: File) -> Values:
    expected = {"reward": 1, "prm": 2}.get(file.command)
    if expected is not None and value != expected:
        raise Unsupported(f"num_labels: {expected}")
    return {}


def _resume(value: Any, file: File) -> Values:
    return {"resume": write("auto" if value is True else value)} if value else {}


def _auto_resume(value: Any, file: File) -> Values:
    folder = file.value("output_dir")
    return {"resume": write("auto")} if value and folder is not None and os.path.isdir(os.path.join(folder, "checkpoints")) else {}


def _overlong(value: Any, file: File) -> Values:
    return {"overlong": write({"raise": "error"}.get(value, value))}


def _thirty_two(value: Any, file: File) -> Values:
    return {"embedding_multiple": write(32)} if value else {}


def _restarts(value: Any, file: File) -> Values:
    if value and precision.frozen(file) is not None:
        raise Unsupported("weights that are not quantised, as updates of 4 and 8 bits are lost when they are merged")
    return {"relora_steps": write(value)}


def _reference(value: Any, file: File) -> Values:
    """true asks for the base model as the reference, which the model without its adapter is here."""
    return {} if isinstance(value, bool) else {"ref_model": write(value)}


def _relora(value: Any, file: File) -> Values:
    if value and not (file.value("relora_steps") or file.value("jagged_restart_steps")):
        raise Unsupported("relora_steps")
    return {}


def _plugins(value: Any, file: File) -> Values:
    names = value if isinstance(value, list) else [value]
    others = [name for name in names if not any(known in str(name) for known in keys.PLUGINS)]
    if others:
        raise Unsupported(f"options; {' and '.join(map(str, others))} cannot be loaded")
    return {}


OWN, FALLBACK = "tokenizer_default", "tokenizer_default_fallback_"
TEMPLATES = {"mistral_v2v3": "mistral", "gemma3n": "gemma3"}  # of axolotl's, with the same text in it under another name here


def _template(value: Any, file: File) -> Values:
    """chat_template and chat_template_jinja together: the text, where the name is jinja or none."""
    name, text = file.value("chat_template"), file.value("chat_template_jinja")
    if name in (None, "jinja"):
        if text is None:
            raise Unsupported("chat_template_jinja beside it")
        return {"chat_template": write(text)}
    return {"chat_template": write(template(name))}


def template(name: Any) -> Any:
    """A template by our name. Errors: Unsupported for one that is not there."""
    bare = str(name).removeprefix(FALLBACK)
    known = TEMPLATES.get(bare, bare)
    if "{" in bare or bare.endswith((".jinja", ".jinja2")) or bare == OWN or not isinstance(name, str):
        return name
    if known not in {path.stem for path in JINJA.glob("*.jinja")}:
        raise Unsupported(f"{OWN}, the template that comes with the model's tokenizer")
    return str(name)[: len(str(name)) - len(bare)] + known


def _initial(value: Any, file: File) -> Values:
    if value is False:
        raise Unsupported("true, or a name such as gaussian or pissa")
    return {"lora_init": write("default" if value is True else value)}


def _vocabulary(value: Any, file: File) -> Values:
    """special_tokens and tokens together: more special tokens are tokens, and special tokens under `tokens` are special."""
    special, tokens = file.value("special_tokens", {}), file.value("tokens", [])
    if not isinstance(special, dict):
        raise Unsupported("a mapping, such as {pad_token: <pad>}")
    if isinstance(tokens, dict):
        special, tokens = special | tokens, []
    more = special.get("additional_special_tokens") or []
    tokens = [*([tokens] if isinstance(tokens, str) else tokens), *more]
    named = {name: text for name, text in special.items() if text is not None and name != "additional_special_tokens"}
    return ({"special_tokens": write(named)} if named else {}) | ({"tokens": write(tokens)} if tokens else {})


def _loss(name: str) -> Callable[[Any, File], Values]:
    """A key that turns a token loss of ours on."""

    def function(value: Any, file: File) -> Values:
        if value and (file.command not in ("sft", "pretrain")):
            raise Unsupported(f"treetune sft with loss: {name}")
        return {"loss": write(name)} if value else {}

    return function


def _fixed(expected: Any, nearest: str) -> Callable[[Any, File], Values]:
    """A key that is there with one value only."""

    def function(value: Any, file: File) -> Values:
        if value != expected:
            raise Unsupported(nearest)
        return {}

    return function


def _pair_losses(value: Any, file: File) -> Values:
    named = [{"sigmoid": "dpo", "sigmoid_norm": "dpo_norm"}.get(name, name) for name in (value if isinstance(value, list) else [value])]
    if "loss" not in file.options or file.command != "dpo":
        raise Unsupported("rl: dpo")
    return {"loss": write(named)}


def _random(value: Any, file: File) -> Values:
    if not value:
        return {}
    if "from_config" not in file.options:
        raise Unsupported("pretraining_dataset, as treetune pretrain starts from random weights with from_config")
    return {"from_config": write(file.value("base_model"))}


def _curriculum(value: Any, file: File) -> Values:
    """Rows in the order of the files; where axolotl has shuffled them when it merged them, an order at random does as well."""
    return {"shuffle": write(False)} if value and file.value("shuffle_merged_datasets") is False and "shuffle" in file.options else {}


# Fields of config.json that change nothing in a run of ours.
IDLE_FIELDS = {"use_cache", "output_router_logits", "attn_implementation", "_attn_implementation", "torch_dtype", "low_cpu_mem_usage",
               "device_map", "trust_remote_code"}  # fmt: skip


def _config_fields(value: Any, file: File) -> Values:
    """overrides_of_model_config: the weight of the loss that balances experts, and fields that change nothing."""
    given = value if isinstance(value, dict) else {"": value}
    balance, on = given.get("router_aux_loss_coef"), given.get("output_router_logits")
    others = [name for name in given if name not in IDLE_FIELDS | {"router_aux_loss_coef"}]
    if others:
        raise Unsupported("the model's config.json, where such fields stand")
    if on and balance is None:
        raise Unsupported("output_router_logits: true with router_aux_loss_coef, which is 0.001 in most models of experts")
    if on and "router_aux_loss_coef" not in file.options:
        raise Unsupported("treetune sft, pretrain, dpo or grpo, which have router_aux_loss_coef")
    return {"router_aux_loss_coef": write(balance)} if on else {}


def _load_fields(value: Any, file: File) -> Values:
    if not isinstance(value, dict) or set(value) - IDLE_FIELDS:
        raise Unsupported("the model's config.json")
    return {}


def _watched(value: Any, file: File) -> Values:
    if str(value).lower() not in ("false", "off", ""):
        raise Unsupported("grad_norm, which is logged")
    return {}


def _best(value: Any, file: File) -> Values:
    if str(value) not in ("loss", "eval_loss", "eval/loss"):
        raise Unsupported("eval_loss, which best.json goes by")
    return {}


def _warmup(value: Any, file: File) -> Values:
    """A number below 1 is a part of the run, as in transformers."""
    part = isinstance(value, float) and 0 < value < 1
    return {"warmup_ratio" if part else "warmup_steps": write(value)}


# What axolotl computes of answers where a file names nothing, but comet, which it skips where that is not installed.
ANSWER_METRICS = ["sacrebleu", "ter", "chrf"]


def _measured(file: File) -> bool:
    """Whether axolotl answers all held-out rows."""
    held_out = file.value("val_set_size") or file.value("test_datasets")
    return bool(file.value("do_causal_lm_eval") and held_out and file.command not in ("reward", "prm"))


def _answer_metrics(value: Any, file: File) -> Values:
    """do_causal_lm_eval and eval_causal_lm_metrics together: without the first nothing is computed."""
    named = file.value("eval_causal_lm_metrics") or ANSWER_METRICS
    if "comet" in named:
        raise Unsupported("sacrebleu, chrf, ter, exact_match and perplexity")
    return {"eval_causal_lm_metrics": write(list(named))} if _measured(file) else {}


def _after(name: str) -> Callable[[Any, File], Values]:
    """Benchmarks behind the run, unless lm_eval_post_train leaves them to a command of its own."""

    def function(value: Any, file: File) -> Values:
        asked = file.value("lm_eval_tasks") and file.value("lm_eval_post_train", True)
        return {name: write(value)} if asked and name in file.options else {}

    return function


def _table(name: str) -> Callable[[Any, File], Values]:
    """Answers to held-out prompts; nothing where axolotl writes no table: without a size, without held-out rows, or of scores."""

    def function(value: Any, file: File) -> Values:
        length = name == "eval_max_new_tokens" and _measured(file) and file.value("eval_causal_lm_metrics") != ["perplexity"]
        asked = length or file.value("eval_table_size") and (file.value("val_set_size") or file.value("test_datasets"))
        return {name: write(value)} if asked and file.command not in ("reward", "prm") else {}

    return function


FUNCTIONS: Mapping[str, Callable[[Any, File], Values]] = {
    **precision.FUNCTIONS, **placing.FUNCTIONS, **intervals.FUNCTIONS,
    **dict.fromkeys(("lora_target_modules", "lora_target_linear", "lora_target_parameters"), _targets),
    **dict.fromkeys(("lr_rules", "lr_groups", "embedding_lr_scale"), _rates),
    **dict.fromkeys(("special_tokens", "tokens"), _vocabulary), **dict.fromkeys(("chat_template", "chat_template_jinja"), _template),
    **dict.fromkeys(("use_dft", "enable_dft_loss", "use_dynamic_finetuning"), _loss("dft")), "use_eaft": _loss("eaft"),
    "eaft_alpha": _fixed(1, "eaft_alpha: 1, or loss: FILE.py:FUNCTION"), "eaft_k": _fixed(20, "eaft_k: 20, or loss: FILE.py:FUNCTION"),
    **dict.fromkeys(("reinit_weights", "random_init_weights"), _random),
    **dict.fromkeys(("overrides_of_model_config", "model_config"), _config_fields),
    **dict.fromkeys(("overrides_of_model_kwargs", "model_kwargs"), _load_fields),
    "optimizer": _optimizer, "optim_args": _optim_args, "lr_scheduler": _schedule, "lr_scheduler_kwargs": _schedule_args,
    "warmup_steps": _warmup, "cosine_constant_lr_ratio": lambda value, file: {"cosine_constant_lr_ratio": write(value)} if value else {},
    "scale_rewards": _scale_rewards, "multi_objective_aggregation": _aggregation, "dpo_loss_type": _pair_losses,
    "generation_kwargs": _generation, "vllm_mode": _colocated, "use_vllm": _server, "async_prefetch": _ahead, "num_labels": _labels,
    "resume_from_checkpoint": _resume, "auto_resume_from_checkpoints": _auto_resume, "excess_length_strategy": _overlong,
    "resize_token_embeddings_to_32x": _thirty_two, "plugins": _plugins, "relora": _relora, "peft_init_lora_weights": _initial,
    **dict.fromkeys(("relora_steps", "jagged_restart_steps"), _restarts), "rl_adapter_ref_model": _reference,
    "curriculum_sampling": _curriculum, "wandb_watch": _watched, "metric_for_best_model": _best,
    "lm_eval_tasks": _after("lm_eval_tasks"), "lm_eval_batch_size": _after("lm_eval_batch_size"),
    "lm_eval_post_train": lambda value, file: {}, "eval_table_size": _table("eval_table_size"),
    **dict.fromkeys(("do_causal_lm_eval", "eval_causal_lm_metrics"), _answer_metrics),
    **dict.fromkeys(("eval_max_new_tokens", "eval_table_max_new_tokens"), _table("eval_max_new_tokens")),
    "tf32": lambda value, file: {"tf32": write(True if value == "auto" else value)},
    "greater_is_better": _fixed(False, "false, as the loss is to fall"),
}  # fmt: skip
