"""GGUF files of llama, qwen2 and qwen3 models, laid out as llama.cpp's converter does: the inverse of `gguf.load`.

Matrices are in the type of the file, vectors in float32, and rows that are no whole blocks of 32 numbers in float16. The rows of q and k of
llama are reordered within each head, [2, d/2] to [d/2, 2], for the interleaved rotary layout; frequencies of Llama 3.1 are factors [d/2].
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import tree
from treetune.models import Model, decoder_config, gguf, model_files
from treetune.models.dense import Config
from treetune.models.model_files import Late
from treetune.models.rope_scaling import Llama3Rope

KINDS = ("f32", "f16", "bf16", "q8_0")
BLOCK = 32  # numbers that share a scale in q8_0
LARGEST_F16 = 65504.0
FILES = {path: name for name, path in gguf.NAMES.items()}


class Entry(NamedTuple):
    """A tensor of the file: its name, the leaf that makes it, its type in the file, and the heads whose rows are reordered (0: none)."""

    name: str
    leaf: Any
    kind: str
    heads: int = 0


def check(family: str, cfg: Config, name: str) -> None:
    """Errors: ValueError for a model that llama.cpp would compute otherwise, or that no file here holds."""
    if family not in gguf.ARCHITECTURES:
        raise ValueError(f"{name} is a {family} model; GGUF files are written of {', '.join(gguf.ARCHITECTURES)}")
    if cfg.window is not None and cfg.window < cfg.max_positions:
        raise ValueError(f"{name} has a sliding window of {cfg.window} tokens, which llama.cpp does not compute for this family")
    scaling = cfg.rope_scaling
    if scaling is not None and not (isinstance(scaling, Llama3Rope) and gguf.llama31(scaling.factor) == scaling):
        raise ValueError(f"{name} has the rope scaling {scaling}; GGUF files are written without one, or with that of Llama 3.1")
    if scaling is not None and family != "llama":
        raise ValueError(f"{name} is a {family} model with the rope scaling of Llama 3.1, whose factors llama.cpp reads of llama alone")


def write(path: Path, model: Model, kind: str, keys: Mapping[str, Any], *, name: str) -> None:
    """Write a model, whose leaves may be `Late`, one leaf after another. keys: of the tokenizer, by their names in the file.

    Errors: ValueError for a model that `check` refuses, and for numbers that float16 does not reach.
    """
    import gguf as package

    check(model.family, model.cfg, name)
    writer = package.GGUFWriter(str(path), model.family)
    try:
        for key, value in (_sizes(model.family, model.cfg, kind, name) | dict(keys)).items():
            _add(writer, key, value)
        entries = _entries(model, kind)
        for entry in entries:
            _announce(writer, entry)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_array(entry))
    finally:
        writer.close()


def _sizes(family: str, cfg: Config, kind: str, name: str) -> dict[str, Any]:
    """The keys of a model by their names in the file."""
    import gguf as package

    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    of_family = {
        "context_length": cfg.max_positions,
        "embedding_length": cfg.hidden_size,
        "block_count": cfg.num_layers,
        "feed_forward_length": cfg.mlp_size,
        "attention.head_count": cfg.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.head_dim,
        "rope.dimension_count": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": float(cfg.norm_eps),
        "rope.freq_base": float(cfg.rope_theta),
        "vocab_size": cfg.vocab_size,
    }
    general = {"name": name, "file_type": int(package.LlamaFileType[types[kind]]), "quantization_version": package.GGML_QUANT_VERSION}
    return {f"general.{key}": value for key, value in general.items()} | {f"{family}.{key}": value for key, value in of_family.items()}


def _add(writer: Any, key: str, value: Any) -> None:
    """A key of the file, of the type that llama.cpp reads: whole numbers are unsigned."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:  # a list without elements has no type
        writer.add_array(key, value)


def _entries(model: Model, kind: str) -> list[Entry]:
    cfg, tied = model.cfg, model_files.tied(model)
    heads = {"q_proj": cfg.num_heads, "k_proj": cfg.num_kv_heads} if model.family == "llama" else {}
    entries = [
        Entry(_file_name(path), leaf, _kind(tuple(leaf.shape), kind), heads.get(path.rpartition(".")[2], 0))
        for path, leaf in tree.items(model.params)
        if not (tied and path == "lm_head")
    ]
    if cfg.rope_scaling is not None:
        cpu = torch.device("cpu")
        plain = decoder_config.inv_freq(replace(cfg, rope_scaling=None), cpu)
        entries.append(Entry(gguf.FACTORS, plain / decoder_config.inv_freq(cfg, cpu), "f32"))
    return entries


def _kind(shape: tuple[int, ...], kind: str) -> str:
    """The type of a tensor in a file of this kind."""
    if len(shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % BLOCK else kind


def _file_name(path: str) -> str:
    parts = path.split(".")
    return f"blk.{parts[1]}.{FILES[parts[2]]}" if parts[0] == "layers" else FILES[path]


def _announce(writer: Any, entry: Entry) -> None:
    """Tell the sizes of a tensor that is written later."""
    import gguf as package
    import numpy

    shape, raw = tuple(entry.leaf.shape), package.GGMLQuantizationType[entry.kind.upper()]
    stored, dtype = shape, numpy.dtype({"f32": "float32", "f16": "float16"}.get(entry.kind, "uint8"))
    if dtype == numpy.uint8:
        stored = package.quant_shape_to_byte_shape(shape, raw)
    writer.add_tensor_info(entry.name, stored, dtype, math.prod(stored) * dtype.itemsize, raw_dtype=raw)


def _array(entry: Entry) -> Any:
    """The numbers of a tensor as the file holds them."""
    import gguf as package
    from gguf import quants

    leaf = (entry.leaf.make() if isinstance(entry.leaf, Late) else entry.leaf).detach().float()
    if entry.kind == "f16" and (largest := leaf.abs().max().item()) > LARGEST_F16:
        raise ValueError(f"{entry.name} has the number {largest:.4g}, and float16 reaches to {LARGEST_F16:.0f}: take --gguf bf16")
    rows = permute(leaf, entry.heads) if entry.heads else leaf
    return quants.quantize(rows.contiguous().numpy(), package.GGMLQuantizationType[entry.kind.upper()])


def permute(weight: Tensor, heads: int) -> Tensor:
    """[H (2 d/2), D] -> [H (d/2 2), D]."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
