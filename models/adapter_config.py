"""adapter_config.json of PEFT: every field with its effect, read by type, and which modules PEFT adapts or replaces by it.

A field is one of three: it is used, it has no effect on the function of a saved adapter, or it must be switched off. Modules are named
as PEFT names them, by their path in the model of transformers: `model.layers.0.self_attn.q_proj`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from treetune.core import fields, manifest
from treetune.core.fields import Fields
from treetune.models import folder

NAME = "adapter_config.json"
# Fields that would make another function of it unless they are off; also what our own adapters say of them.
OFF = {
    "lora_bias": False, "use_qalora": False, "alora_invocation_tokens": None, "arrow_config": None, "kasa_config": None,
    "layer_replication": None, "megatron_config": None, "monteclora_config": None,
    "trainable_token_indices": None, "use_bdlora": None, "velora_config": None,
}  # fmt: skip
# What only mattered while the adapter was made, or names programs; PEFT sets fan_in_fan_out aside for linear layers.
WITHOUT_EFFECT = frozenset({
    "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "runtime_config",
})  # fmt: skip
USED = frozenset({
    "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "target_modules", "target_parameters", "task_type", "use_dora", "use_rslora",
})  # fmt: skip
STARTS = ("gaussian", "orthogonal", "eva")  # leave the base as it is; others (pissa, olora, corda, loftq, lora_ga, mica) do not
TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")
DEFAULT_TARGETS = ("q_proj", "v_proj")  # PEFT's for llama, mistral, qwen2 and qwen3
MOST_RANK, MOST_ALPHA = 2**20, 1e6


class AdapterConfig(NamedTuple):
    """What an adapter_config.json says; a text among the module rules is a regular expression of whole names."""

    source: str
    rank: int
    alpha: float
    rslora: bool
    dropout: float
    base: str
    revision: str | None
    task: str | None
    bias: str
    tying: bool
    targets: str | tuple[str, ...]
    excludes: str | tuple[str, ...]
    layers: tuple[int, ...]
    layer_names: tuple[str, ...]
    saved: tuple[str, ...]
    parameters: tuple[str, ...]
    ranks: dict[str, int]
    alphas: dict[str, float]
    dora: bool = False


def read(root: Path) -> AdapterConfig:
    """The config of an adapter folder. Raises ValueError naming file and field for a value whose effect is not computed here."""
    file = root / NAME
    config = fields.mapping(folder.read_json(file), str(file))
    _check_off(config)
    _check_start(config)
    parsed = AdapterConfig(
        source=str(file),
        rank=fields.integer(config, "r", least=1, most=MOST_RANK),
        alpha=_alpha(config, "lora_alpha"),
        rslora=fields.flag(config, "use_rslora", default=False, null=True),
        dropout=_dropout(config),
        base=fields.text(config, "base_model_name_or_path", default="", null=True),
        revision=fields.text(config, "revision", default=None, null=True),
        task=fields.text(config, "task_type", default=None, choices=TASKS, null=True),
        bias=fields.text(config, "bias", default="none", choices=("none", "all", "lora_only"), null=True),
        tying=fields.flag(config, "ensure_weight_tying", default=False, null=True),
        targets=_names(config, "target_modules", () if config.values.get("target_parameters") else DEFAULT_TARGETS),
        excludes=_names(config, "exclude_modules", ()),
        layers=_layers(config),
        layer_names=_listed(config, "layers_pattern"),
        saved=fields.texts(config, "modules_to_save", default=(), null=True),
        parameters=fields.texts(config, "target_parameters", default=(), null=True),
        ranks=_pattern(config, "rank_pattern"),
        alphas=_pattern(config, "alpha_pattern"),
        dora=fields.flag(config, "use_dora", default=False, null=True),
    )
    _check_rules(config, parsed)
    manifest.check(root, weights=False)
    return parsed


def _check_off(config: Fields) -> None:
    kind = fields.text(config, "peft_type")
    if kind != "LORA":
        raise fields.wrong(config, "peft_type", "LORA, the only kind of adapter known here")
    for name, off in OFF.items():
        value = config.values.get(name)
        if value is not None and value is not False:
            raise fields.wrong(config, name, f"{'false' if off is False else 'null'}: only LoRA and DoRA are computed here")
    odd = [name for name in fields.unknown(config, (*OFF, *WITHOUT_EFFECT, *USED)) if config.values[name]]
    if odd:
        raise ValueError(
            f"{config.source} has {odd[0]} = {fields.shown(config.values[odd[0]])}, which is not known here: it may change what the "
            "adapter computes; remove the field if it has no effect"
        )


def _check_start(config: Fields) -> None:
    """Some ways to start an adapter change the base model, which the file does not hold: on the plain base it is another function."""
    start = config.values.get("init_lora_weights", True)
    if start is None or isinstance(start, bool) or (isinstance(start, str) and (start in STARTS or start.lower() == "gaussian")):
        return
    raise ValueError(
        f"{config.source}: init_lora_weights must be true, false, {', '.join(STARTS)}, got {fields.shown(start)}: PEFT starts such an "
        "adapter by changing the base model, so on the base as it is it would compute something else; save it with PEFT's "
        "save_pretrained(folder, path_initial_model_for_weight_conversion=...), which makes a plain adapter of it, or merge it in PEFT"
    )


def _dropout(config: Fields) -> float:
    rate = fields.number(config, "lora_dropout", default=0.0, least=0, null=True)
    if rate >= 1:
        raise fields.wrong(config, "lora_dropout", "a number from 0 to below 1")
    return rate


def _names(config: Fields, name: str, default: tuple[str, ...]) -> str | tuple[str, ...]:
    """A list of module names, or a regular expression of them."""
    value = config.values.get(name)
    if not isinstance(value, str):
        return fields.texts(config, name, default=default, null=True)
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise fields.wrong(config, name, f"a list of names or a regular expression ({error})") from error
    return value


def _listed(config: Fields, name: str) -> tuple[str, ...]:
    value = config.values.get(name)
    return (value,) if isinstance(value, str) and value else () if value == "" else fields.texts(config, name, default=(), null=True)


def _layers(config: Fields) -> tuple[int, ...]:
    name = "layers_to_transform"
    if isinstance(config.values.get(name), list):
        return fields.integers(config, name, least=0)
    value = fields.integer(config, name, default=None, least=0, null=True)
    return () if value is None else (value,)


def _pattern(config: Fields, name: str) -> dict[str, Any]:
    """A number for each pattern of module names."""
    rules = fields.inner(config, name, default=None, null=True)
    if rules is None:
        return {}
    if name == "rank_pattern":
        return {key: fields.integer(rules, key, least=1, most=MOST_RANK) for key in rules.values}
    return {key: _alpha(rules, key) for key in rules.values}


def _alpha(config: Fields, name: str) -> float:
    value = fields.number(config, name, above=0)
    if value > MOST_ALPHA:
        raise fields.wrong(config, name, f"a number above 0 and at most {MOST_ALPHA:g}")
    return value


def _check_rules(config: Fields, parsed: AdapterConfig) -> None:
    if parsed.layers and isinstance(parsed.targets, str):
        raise fields.wrong(config, "layers_to_transform", "null beside a regular expression of target_modules, as in PEFT")
    for name, rules in (("rank_pattern", parsed.ranks), ("alpha_pattern", parsed.alphas), ("layers_pattern", parsed.layer_names),
                        ("modules_to_save", parsed.saved)):  # fmt: skip
        for rule in rules:
            try:
                re.compile(rule)
            except (re.error, RecursionError, OverflowError) as error:
                raise fields.wrong(config, name, f"of regular expressions ({rule!r}: {error})") from error


def adapted(config: AdapterConfig, modules: Sequence[str], linears: Sequence[str]) -> list[str]:
    """Those of a model's modules on which PEFT puts an adapter; "all-linear" are its linear layers, without the head."""
    if isinstance(config.targets, str) and config.targets.lower() == "all-linear":
        return [name for name in linears if not _left_out(config, name)]
    return [name for name in modules if not _left_out(config, name) and _targeted(config, name)]


def adapted_parameters(config: AdapterConfig, parameters: Sequence[str]) -> list[str]:
    """Those of a model's experts and routers, by their full names, on which PEFT puts an adapter. Errors: ValueError for other targets."""
    if odd := [rule for rule in config.parameters if not any(_named((rule,), name) for name in parameters)]:
        raise ValueError(f"{config.source}: target_parameters names {odd[0]}, which is none of the experts and routers of this model")
    return [name for name in parameters if _named(config.parameters, name)]


def _left_out(config: AdapterConfig, name: str) -> bool:
    return _named(config.excludes, name) or any(re.match(rf"(^|.*\.){rule}($|\..*)", name) for rule in config.saved)


def _named(rules: str | tuple[str, ...], name: str) -> bool:
    if isinstance(rules, str):
        return bool(rules) and re.fullmatch(rules, name) is not None
    return any(name == rule or name.endswith(f".{rule}") for rule in rules)


def _targeted(config: AdapterConfig, name: str) -> bool:
    if not _named(config.targets, name):
        return False
    if not config.layers or isinstance(config.targets, str) or name in config.targets:
        return True  # a full name in the list counts whatever the layers
    patterns = [rf"(?:^|.*?\.){layers}\.(?P<number>\d+)\." for layers in config.layer_names] or [r".*?\.[^.]*\.(?P<number>\d+)\."]
    match = next((match for pattern in patterns if (match := re.match(pattern, name))), None)
    return match is not None and int(match["number"]) in config.layers


def replaced(config: AdapterConfig, modules: Sequence[str]) -> list[str]:
    """Those of a model's modules that PEFT replaces as a whole (`modules_to_save`): by the ending of their name, or of what holds them."""

    def within(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[: size + 1]).endswith(rule) for size in range(len(parts)) for rule in config.saved)

    return [name for name in modules if within(name)]


def rank_of(config: AdapterConfig, name: str) -> int:
    """The rank of the adapter on a module."""
    return next((rank for rule, rank in config.ranks.items() if _fits(rule, name)), config.rank)


def alpha_of(config: AdapterConfig, name: str) -> float:
    """The alpha of the adapter on a module."""
    return next((alpha for rule, alpha in config.alphas.items() if _fits(rule, name)), config.alpha)


def _fits(rule: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({rule})$", name) is not None
