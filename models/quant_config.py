"""`quantization_config` of a config.json: how the weights of a folder are quantised, as transformers and vLLM read it, and back.

nf4, fp4 and int8 are bitsandbytes' own; fp8 with a scale for each row, and int4 with one for each group, are of compressed-tensors.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.core.quant import BLOCK, FOUR_BITS, Kind, Scheme
from treetune.models import fetch, folder

NAME = "quantization_config"
BITSANDBYTES, COMPRESSED = "bitsandbytes", "compressed-tensors"
PLAIN = "take the unquantised model, with --quant if it is to be quantised"


def read(hf: Fields) -> Scheme | None:
    """The scheme in a config.json; None where its weights are plain. Errors: ValueError for another method, or options not read here."""
    if not hf.values.get(NAME):
        return None
    config = fields.inner(hf, NAME)
    method = fields.text(config, "quant_method", default="one without a name")
    if method == BITSANDBYTES:
        return _bitsandbytes(config)
    if method == COMPRESSED:
        return _compressed(config)
    raise ValueError(
        f"{hf.source} has {NAME}, quantised weights of quant_method {fields.shown(method)}; expected float weights, or those of "
        f"{BITSANDBYTES} (4 and 8 bits) or {COMPRESSED} (fp8 by rows, int4 in groups): {PLAIN}"
    )


def of_folder(root: Path) -> Scheme | None:
    """The scheme of the weights in a model folder; None where they are plain, or it has no config.json."""
    path = root / "config.json"
    return read(fields.mapping(folder.read_json(path), str(path))) if path.is_file() else None


def of_name(name: str, revision: str | None = None) -> Scheme | None:
    """`of_folder` of the folder that a name means; None for a .gguf file."""
    path = fetch.resolve(name, revision=revision)
    return of_folder(path) if path.is_dir() else None


def agreed(stored: Scheme | None, asked: Scheme | None, source: object) -> Scheme | None:
    """The scheme of a model that is `stored` so and `asked` for so. Errors: ValueError where that would be to quantise it once more."""
    if stored is None or asked is None or asked[:2] == stored[:2]:
        return stored or asked
    raise ValueError(
        f"{source} is quantised as {named(stored)}, and quant asks for {named(asked)}: leave quant out to take the weights as they are, or "
        "name the unquantised model"
    )


def named(scheme: Scheme) -> str:
    """A scheme in words."""
    if scheme.kind not in FOUR_BITS:
        return scheme.kind
    return f"{scheme.kind} {'with' if scheme.double else 'without'} quant_double"


def to_hf(scheme: Scheme, dense: Iterable[str], dtype: str) -> dict[str, Any]:
    """The mapping of a scheme. dense: modules that are linear layers of transformers and stay as they are. dtype: of what is dense."""
    if scheme.kind in COMPRESSED_KINDS:
        return _to_compressed(scheme.kind, list(dense))
    four = scheme.kind in FOUR_BITS
    return {
        "quant_method": BITSANDBYTES, "load_in_4bit": four, "load_in_8bit": not four, "llm_int8_skip_modules": list(dense),
        "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False, "llm_int8_enable_fp32_cpu_offload": False,
        "bnb_4bit_quant_type": scheme.kind if four else "fp4", "bnb_4bit_use_double_quant": four and scheme.double,
        "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip


def _bitsandbytes(config: Fields) -> Scheme:
    four, eight = (fields.flag(config, name, default=False) for name in ("load_in_4bit", "load_in_8bit"))
    if four == eight:
        raise fields.wrong(config, "load_in_4bit", "true where load_in_8bit is not, or the other way round")
    if eight:
        if fields.flag(config, "llm_int8_has_fp16_weight", default=False):
            raise fields.wrong(config, "llm_int8_has_fp16_weight", "false: weights in float16 are not quantised")
        return Scheme("int8")
    if fields.text(config, "bnb_4bit_quant_storage", default="uint8", null=True) not in ("uint8", "torch.uint8"):
        raise fields.wrong(config, "bnb_4bit_quant_storage", f"uint8: {PLAIN}")
    kind = fields.text(config, "bnb_4bit_quant_type", default="fp4", choices=FOUR_BITS)
    return Scheme(cast(Kind, kind), fields.flag(config, "bnb_4bit_use_double_quant", default=False))


FP8, INT4 = "float-quantized", "pack-quantized"  # formats of compressed-tensors
COMPRESSED_KINDS: dict[Kind, str] = {"fp8": FP8, "int4": INT4}
GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "dynamic": False}
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True}


def _compressed(config: Fields) -> Scheme:
    groups = fields.inner(config, "config_groups")
    kinds: dict[str, Kind] = {form: kind for kind, form in COMPRESSED_KINDS.items()}
    form = fields.text(config, "format", default="")
    if form not in kinds or not groups.values:
        raise fields.wrong(config, "format", f"{' or '.join(kinds)}, with at least one of config_groups; {PLAIN}")
    for name in groups.values:
        weights, known = fields.inner(fields.inner(groups, name), "weights"), WEIGHTS if form == FP8 else GROUPS
        if odd := [key for key, value in known.items() if weights.values.get(key) != value]:
            raise fields.wrong(
                weights,
                odd[0],
                f"{known[odd[0]]}: of this method fp8 with a scale for each row and symmetric int4 in groups are read; {PLAIN}",
            )
    return Scheme(kinds[form])


def _to_compressed(kind: Kind, dense: list[str]) -> dict[str, Any]:
    form = COMPRESSED_KINDS[kind]
    group = {
        "targets": ["Linear"],
        "weights": WEIGHTS if kind == "fp8" else GROUPS | {"group_size": BLOCK},
        "input_activations": None,  # rounded, too, they would make the model another than the one that was measured
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": COMPRESSED, "format": form, "quantization_status": "compressed", "config_groups": {"group_0": group},
        "ignore": dense, "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip
