"""What options may not say: values out of range, contradictions, and options that the command would ignore. Imports no torch."""

import os
from pathlib import Path
from typing import Any

from treetune.cli import ebft_checks, pairs, parse, preference_checks, ranges, rl_checks
from treetune.cli.configs import Chat, Generate, Pretrain, Sft
from treetune.cli.errors import BadInput


def check(config: Any, given: frozenset[str]) -> None:
    """Raise BadInput, one line, for options out of range, that contradict each other, or that this command would ignore."""
    values = parse.flatten(config)
    for name, value in values.items():
        if wrong := ranges.outside(name, value):
            raise BadInput(f"{name} {wrong}")
    _check_pass(values)
    _check_pairs(values)
    parse.refuse_ignored(given, _local_revision(values))
    if hasattr(config, "optim"):
        _contradictions(config)
        _stream_of_unknown_size(config, given)
        preference_checks.check(config)
        ebft_checks.check(config)
        rl_checks.check(config)
        parse.refuse_ignored(given, ignored(config))
    if isinstance(config, Generate | Chat):
        parse.refuse_ignored(given, _ignored_sampling(config))


def _check_pass(values: dict[str, Any]) -> None:
    """A forward pass holds micro_batch_size * sequence_len tokens."""
    tokens = (values.get("micro_batch_size") or 1) * (values.get("sequence_len") or 1)
    if tokens > ranges.TOKENS_MAX:
        raise BadInput(f"micro_batch_size * sequence_len must be at most {ranges.TOKENS_MAX} tokens, got {tokens}: lower one of them")


def ignored(config: Any) -> dict[str, str]:
    """{option: why this training run would not look at it}, as far as options tell."""
    own = preference_checks.ignored(config) | rl_checks.ignored(config) | ebft_checks.ignored(config)
    return _ignored_training(config) | own


def _check_pairs(values: dict[str, Any]) -> None:
    for name in ("weight_decay_rules", "lr_rules"):
        pairs.rules(values.get(name) or (), name.replace("_", "-"))
    for name in parse.PAIRS:
        pairs.named_texts(values.get(name) or (), name.replace("_", "-"))


def _contradictions(config: Any) -> None:
    optim, run = config.optim, config.run
    if optim.warmup_steps is not None and optim.warmup_ratio is not None:
        raise BadInput("give warmup_steps or warmup_ratio, not both")
    if run.resume is not None and run.overwrite:
        raise BadInput("give resume or overwrite, not both: one continues a run, the other deletes it")


def streams(data: Any) -> bool:
    """Whether rows are read while training."""
    return getattr(data, "streaming", False)


def held_out(data: Any) -> float:
    """The part or number of training rows to hold out; a part of a stream, whose size nobody knows, is none."""
    return 0 if data.val_data or streams(data) and data.val_set_size < 1 else data.val_set_size


def _stream_of_unknown_size(config: Any, given: frozenset[str]) -> None:
    if not streams(config.data):
        return
    if config.optim.max_steps is None:
        raise BadInput("streaming needs max_steps: how many rows a stream has is not known before its end")
    size = config.data.val_set_size
    if "val_set_size" in given and 0 < size < 1 and not config.data.val_data:
        raise BadInput(
            f"val_set_size {size} is a part of the rows, but how many a stream has is not known: give a number of rows, or val_data"
        )


def _local_revision(values: dict[str, Any]) -> dict[str, str]:
    model = values.get("model")
    local = model is not None and Path(model).expanduser().exists()
    return {"revision": f"{model} is on this machine"} if local else {}


def _ignored_training(config: Any) -> dict[str, str]:
    """{option: why this run would not look at it}."""
    optim, run, ignored = config.optim, config.run, {}
    if optim.optimizer != "adamw":
        ignored |= {"adam_epsilon": f"{optim.optimizer} has no epsilon"}
    if optim.optimizer == "sgd":
        ignored |= {name: "sgd has momentum instead" for name in ("adam_beta1", "adam_beta2")}
    else:
        ignored |= {"momentum": f"{optim.optimizer} has adam_beta1 instead"}
    if optim.lr_scheduler != "cosine":
        ignored |= {"cosine_min_lr_ratio": f"the schedule is {optim.lr_scheduler}"}
    if isinstance(config, Sft | Pretrain) and config.loss.loss != "nll":
        ignored |= {"label_smoothing": f"the loss is {config.loss.loss}"}
    held = config.data.val_data or getattr(config.data, "test_datasets", ())
    if not held and not held_out(config.data):
        ignored |= {name: "nothing is held out" for name in ("eval_steps", "early_stopping_patience")}
    if held:
        ignored |= {"val_set_size": "val_data is given" if config.data.val_data else "test_datasets is given"}
    if run.loss_watchdog_threshold is None:
        ignored |= {"loss_watchdog_patience": "there is no loss_watchdog_threshold"}
    if run.sample_prompt == "":
        ignored |= {"sample_tokens": "sample_prompt is empty"}
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        ignored |= {"sharding": "there is one process; start several with torchrun"} if run.sharding != "none" else {}
    return ignored | (_ignored_streaming(config.data) if isinstance(config, Pretrain) else _ignored_adapter(config.adapter))


def _ignored_streaming(data: Any) -> dict[str, str]:
    if streams(data):
        return {"max_rows": "a stream is read for max_steps"}
    return {"streaming_multipack_buffer_size": "there is no --streaming"}


def _ignored_adapter(options: Any) -> dict[str, str]:
    names = [key for key in vars(options) if key != "adapter"]
    if options.adapter == "none":
        return {key: "adapter is none" for key in names}
    if options.lora_model_dir is not None:
        fixed = ("lora_r", "lora_alpha", "lora_rslora", "lora_target_modules", "lora_layers")
        return {key: "lora_model_dir brings its own" for key in fixed}
    return {}


def _ignored_sampling(config: Generate | Chat) -> dict[str, str]:
    ignored = {}
    if config.sample.temperature == 0:
        ignored |= {name: "at temperature 0 the likeliest token is taken" for name in ("top_p", "top_k", "min_p", "seed")}
    if isinstance(config, Generate) and config.raw:
        ignored |= {"system": "--raw continues plain text, without a chat"}
    return ignored
