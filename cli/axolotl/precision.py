"""The numbers that weights are kept in, computed with and rounded to: keys of axolotl's files as options. Imports no torch."""

from collections.abc import Callable, Mapping
from typing import Any

from treetune.cli.axolotl.file import File, Unsupported, Values, write

# {backend, weight_dtype} of `peft` and `model_quantization_config`, and what it is here; a group size that is ours where there is one.
STORED = {("bnb", "nf4"): "nf4", ("bnb", "int8"): "int8", ("torchao", "nf4"): "nf4", ("torchao", "int4"): "int4"}
GROUP = 64


def dtype(file: File) -> str | None:
    """The compute dtype that bf16, fp16, their old names and torch_dtype ask for together; None where none of them is given."""
    asked = {"bfloat16" if key in ("bf16", "bfloat16") else "float16": file.value(key) for key in ("bfloat16", "float16", "bf16", "fp16")
             if file.value(key) is not None}  # fmt: skip
    if file.value("float32"):
        asked["float32"] = True
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


def frozen(file: File) -> str | None:
    """The format that the file keeps frozen weights in; None for none. Errors: Unsupported for one that is not there."""
    if file.value("load_in_4bit"):
        return str(file.value("bnb_4bit_quant_type", "nf4"))
    if file.value("load_in_8bit"):
        return "int8"
    sections = [section for name in SECTIONS if isinstance(section := file.value(name), dict)]
    return next((_stored(section) for section in sections if section.get("weight_dtype")), None)


SECTIONS = ("peft", "model_quantization_config")


def _stored(section: Mapping[str, Any]) -> str:
    kind = STORED.get((str(section.get("backend")), str(section["weight_dtype"])))
    if kind is None:
        raise Unsupported("backend: bnb with weight_dtype: nf4 or int8")
    if section["backend"] == "torchao" and section.get("group_size", 128 if kind == "int4" else GROUP) != GROUP:
        raise Unsupported(f"group_size: {GROUP}, or backend: bnb with weight_dtype: nf4")
    return kind


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
    if value.get("fake_quant_after_n_steps"):
        raise Unsupported("qat from the first step on, without fake_quant_after_n_steps")
    if value.get("activation_dtype") or value.get("quantize_embedding"):
        raise Unsupported(f"qat: {kind}, which rounds weights of linear layers alone")
    if kind == "int4" and value.get("group_size", 32) != 64:
        raise Unsupported("group_size: 64")
    return {"qat": write(kind)}


def _compute_dtype(value: Any, file: File) -> Values:
    kind = str(value).removeprefix("torch.")
    if kind != (dtype(file) or kind):
        raise Unsupported(f"one dtype; bf16 or fp16 ask for {dtype(file)}")
    return {"dtype": write(kind)}


def _peft(value: Any, file: File) -> Values:
    if not isinstance(value, dict) or set(value) - {"loftq_config", "backend", "weight_dtype", "group_size"}:
        raise Unsupported("the lora_ options")
    out = _kept(file) if value.get("weight_dtype") else {}
    if bits := (value.get("loftq_config") or {}).get("loftq_bits"):
        out["lora_init"] = write("loftq")
        if frozen(file) is None and file.value("adapter") != "qlora":
            out |= _rounded_start(bits)
    return out


def _rounded_start(bits: Any) -> Values:
    """The weights that loftq leaves where the file quantises none: rounded to nf4, with their maxima whole."""
    if bits != 4:
        raise Unsupported("loftq_bits: 4")
    return {"quant": write("nf4"), "quant_double": write(False)}


def _kept(file: File) -> Values:
    _check_frozen(file)
    return {"quant": write(frozen(file))}


def _loaded(value: Any, file: File) -> Values:
    """model_quantization_config: the section that says how frozen weights are kept, or how those of the model's files are read."""
    if isinstance(value, dict) and value.get("weight_dtype"):
        return _kept(file)
    kwargs = (value.get("config_kwargs") if isinstance(value, dict) else file.value("model_quantization_config_kwargs")) or {}
    if not isinstance(kwargs, dict) or not kwargs.get("dequantize"):
        raise Unsupported("dequantize: true, or the unquantised model with quant: nf4")
    return {}


FUNCTIONS: Mapping[str, Callable[[Any, File], Values]] = {
    **dict.fromkeys(("bf16", "fp16", "bfloat16", "float16", "float32", "torch_dtype"), _dtype),
    "load_in_4bit": _four_bits, "load_in_8bit": _eight_bits, "bnb_4bit_compute_dtype": _compute_dtype,
    "bnb_4bit_use_double_quant": lambda value, file: {"quant_double": write(value)},
    "bnb_4bit_quant_type": lambda value, file: {}, "bnb_4bit_quant_storage": lambda value, file: {},
    "qat": _rounded, "peft": _peft, "model_quantization_config": _loaded, "model_quantization_config_kwargs": lambda value, file: {},
}  # fmt: skip
