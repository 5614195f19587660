"""Keys whose value means one or several options of ours: key -> function of its value and of the file. Imports no torch."""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from treetune.cli.axolotl import keys
from treetune.core import registry
from treetune.core.config.table import Option
from treetune.core.data import yamlvalues
from treetune.core.data.yamltext import Written

Values = dict[str, Written]


class Unsupported(ValueError):
    """What a key asks for is not there; the message says what is."""


class File(NamedTuple):
    """The keys of a file, sections laid flat, and the command that reads it with its options."""

    command: str
    options: Mapping[str, Option]
    keys: Mapping[str, Written]

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key as Python's own; the default where it is not given or null."""
        written = self.keys.get(key)
        return default if written is None or written.value is None else yamlvalues.plain(written)


def write(value: Any) -> Written:
    """A Python value as if the file held it."""
    if isinstance(value, Written):
        return value
    if isinstance(value, dict):
        return Written({name: write(item) for name, item in value.items()})
    if isinstance(value, list | tuple):
        return Written([write(item) for item in value])
    return Written(value, "" if value is None else str(value), True)


def several_processes() -> bool:
    """Whether torchrun has started more than one process."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def dtype(file: File) -> str | None:
    """The compute dtype that bf16, fp16, their old names and torch_dtype ask for together; None where none of them is given."""
    asked = {"bfloat16" if key in ("bf16", "bfloat16") else "float16": file.value(key) for key in ("bfloat16", "float16", "bf16", "fp16")
             if file.value(key) is not None}  # fmt: skip
    named = str(file.value("torch_dtype", "")).removeprefix("torch.") or None
    wanted = {kind for kind, value in asked.items() if value not in (False, "auto")}
    if len(wanted | ({named} if named not in (None, "auto") else set())) > 1:
        raise Unsupported(f"one dtype; the file asks for {' and '.join(sorted(wanted | {str(named)}))}")
    if wanted:
        return wanted.pop()
    if "auto" in asked.values() and named is None:
        return "auto"
    return named or ("float32" if asked else None)


def _dtype(value: Any, file: File) -> Values:
    kind = dtype(file)
    out: Values = {} if kind is None else {"dtype": write(kind)}
    if file.value("bf16") == "full" and file.value("adapter") is None:
        out["master_dtype"] = write("bfloat16")
    return out


def _check_frozen(file: File) -> None:
    if file.value("adapter") is None and not file.value("unfrozen_parameters"):
        raise Unsupported("an adapter beside it: weights that train are not quantised")


def _four_bits(value: Any, file: File) -> Values:
    if value and file.value("load_in_8bit"):
        raise Unsupported("either load_in_4bit or load_in_8bit")
    if value:
        _check_frozen(file)
    return {"quant": write(file.value("bnb_4bit_quant_type", "nf4"))} if value else {}


def _eight_bits(value: Any, file: File) -> Values:
    if value and file.value("adapter") == "qlora":
        raise Unsupported("adapter: lora with load_in_8bit, as qlora is in 4 bits")
    if value:
        _check_frozen(file)
    return {"quant": write("int8")} if value else {}


QAT = {"int4": "int4", "int8": "int8", "fp8": "fp8", "float8_e4m3fn": "fp8", "torch.int4": "int4", "torch.int8": "int8"}


def _rounded(value: Any, file: File) -> Values:
    """The section `qat`: weights alone, in groups of 64 where they are in int4."""
    if not isinstance(value, dict):
        return {"qat": write(value)}
    kind = QAT.get(str(value.get("weight_dtype", "int8")))
    if kind is None:
        raise Unsupported("weight_dtype int4, int8 or fp8, or qat: nf4")
    if value.get("activation_dtype") or value.get("quantize_embedding"):
        raise Unsupported(f"qat: {kind}, which rounds weights of linear layers alone")
    if kind == "int4" and value.get("group_size", 64) != 64:
        raise Unsupported("group_size: 64")
    return {"qat": write(kind)}


def _compute_dtype(value: Any, file: File) -> Values:
    kind = str(value).removeprefix("torch.")
    if kind != (dtype(file) or kind):
        raise Unsupported(f"one dtype; bf16 or fp16 ask for {dtype(file)}")
    return {"dtype": write(kind)}


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
    if isinstance(value, str):
        value = dict(pair.strip().split("=", 1) for pair in value.split(",") if "=" in pair)
        value = {name: yamlvalues.numeral(text) if yamlvalues.numeral(text) is not None else text for name, text in value.items()}
    return {"optim_args": write(value)}


def _schedule(value: Any, file: File) -> Values:
    return {"lr_scheduler": write({"constant_with_warmup": "constant"}.get(str(value), value))}


def _checkpointing(value: Any, file: File) -> Values:
    if value == "offload_disk":
        return {"gradient_checkpointing": write("full"), "activation_offloading": write("disk")}
    return {"gradient_checkpointing": write("full" if value == "unsloth" else value)}


def _activations(value: Any, file: File) -> Values:
    return {"activation_offloading": write("cpu" if value in ("legacy", "hidden_states") else value)}


def sharded() -> Values:
    """Sharding of everything, which one process has nothing to do with."""
    return {"sharding": write("full")} if several_processes() else {}


def _fsdp(value: Any, file: File) -> Values:
    words = value if isinstance(value, list) else str(value).split()
    if "offload" in words:
        raise Unsupported("fsdp without offload")
    if any("hybrid" in str(word) for word in words):
        raise Unsupported("fsdp: full_shard")
    return {} if not value or "no_shard" in words else sharded()


def _fsdp_config(value: Any, file: File) -> Values:
    if not isinstance(value, dict):
        raise Unsupported("a mapping")
    bare = {name.removeprefix("fsdp_"): item for name, item in value.items()}
    if bare.get("offload_params"):
        raise Unsupported("offload_params: false")
    strategy = str(bare.get("sharding_strategy", "FULL_SHARD")).upper()
    if strategy not in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "1", "2", "3"):
        raise Unsupported("sharding_strategy: FULL_SHARD")
    out = {} if not value or strategy in ("NO_SHARD", "3") else sharded()
    if bare.get("activation_checkpointing") and not file.value("gradient_checkpointing"):
        out["gradient_checkpointing"] = write("full")
    return out


def _fsdp_version(value: Any, file: File) -> Values:
    return sharded()


def _deepspeed(value: Any, file: File) -> Values:
    offloads = "offload_optimizer" in value or "offload_param" in value if isinstance(value, dict) else "offload" in str(value)
    if offloads:
        raise Unsupported("a DeepSpeed file without offload; optimizer: paged_adamw keeps moments in the memory of the host")
    return sharded() if value else {}


def _evaluation(value: Any, file: File) -> Values:
    if value in (False, "no"):
        return {"evals_per_epoch": write(0)}
    return {"evals_per_epoch": write(1)} if value == "epoch" else {}


def _saving(value: Any, file: File) -> Values:
    if value in (False, "no"):
        return {"saves_per_epoch": write(0)}
    return {"saves_per_epoch": write(1)} if value == "epoch" else {}


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


def _media(value: Any, file: File) -> Values:
    if not value:
        raise Unsupported("freeze_mm_modules: true, as only the text model trains")
    return {}


def _relora(value: Any, file: File) -> Values:
    if value and not (file.value("relora_steps") or file.value("jagged_restart_steps")):
        raise Unsupported("relora_steps")
    return {}


def _peft(value: Any, file: File) -> Values:
    bits = (value.get("loftq_config") or {}).get("loftq_bits") if isinstance(value, dict) else None
    if not isinstance(value, dict) or set(value) - {"loftq_config"}:
        raise Unsupported("the lora_ options")
    return {"lora_init": write("loftq")} if bits else {}


def _plugins(value: Any, file: File) -> Values:
    names = value if isinstance(value, list) else [value]
    others = [name for name in names if not any(known in str(name) for known in keys.PLUGINS)]
    if others:
        raise Unsupported(f"options; {' and '.join(map(str, others))} cannot be loaded")
    return {}


FUNCTIONS: Mapping[str, Callable[[Any, File], Values]] = {
    **dict.fromkeys(("bf16", "fp16", "bfloat16", "float16", "torch_dtype"), _dtype),
    "load_in_4bit": _four_bits, "load_in_8bit": _eight_bits, "bnb_4bit_compute_dtype": _compute_dtype,
    "bnb_4bit_use_double_quant": lambda value, file: {"quant_double": write(value)},
    "bnb_4bit_quant_type": lambda value, file: {}, "bnb_4bit_quant_storage": lambda value, file: {},
    "qat": _rounded,
    **dict.fromkeys(("lora_target_modules", "lora_target_linear", "lora_target_parameters"), _targets),
    **dict.fromkeys(("lr_rules", "lr_groups", "embedding_lr_scale"), _rates),
    "optimizer": _optimizer, "optim_args": _optim_args, "lr_scheduler": _schedule,
    "gradient_checkpointing": _checkpointing, "activation_checkpointing": _checkpointing, "activation_offloading": _activations,
    "fsdp": _fsdp, "fsdp_config": _fsdp_config, "fsdp_version": _fsdp_version, "deepspeed": _deepspeed,
    "eval_strategy": _evaluation, "save_strategy": _saving, "scale_rewards": _scale_rewards, "multi_objective_aggregation": _aggregation,
    "generation_kwargs": _generation, "vllm_mode": _colocated,
    "use_vllm": _server, "async_prefetch": _ahead, "num_labels": _labels, "resume_from_checkpoint": _resume,
    "auto_resume_from_checkpoints": _auto_resume, "excess_length_strategy": _overlong, 
    "resize_token_embeddings_to_32x": _thirty_two, "peft": _peft, "plugins": _plugins,
    "freeze_mm_modules": _media, "relora": _relora,
}  # fmt: skip
