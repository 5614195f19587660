"""Quantised weights in the files of a folder, in parts beside one another: those of bitsandbytes, fp8 and int4 of compressed-tensors.

4 bits: X.weight uint8 [n / 2, 1], with .absmax, .quant_map, .nested_absmax and .nested_quant_map where the maxima are in 8 bits, and JSON
as bytes in .quant_state.bitsandbytes__nf4. int8: X.weight [out, in], X.SCB [out], X.weight_format. fp8: X.weight, X.weight_scale [out, 1].
int4: X.weight_packed int32 [out, in / 8], the first number in the lowest bits, X.weight_scale [out, groups], X.weight_shape [2].
Parts are checked before a byte of theirs is read, but for those that say how the others are to be read.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core import fields, quant, quant_parts, quant_tables
from treetune.core.fields import Fields
from treetune.core.quant import FOUR_BITS, NESTED_BLOCK, Kind, Quantised, Scheme
from treetune.models import quant_config

STATE = ".quant_state.bitsandbytes__"
MAP, ABSMAX, NESTED, NESTED_MAP = ".quant_map", ".absmax", ".nested_absmax", ".nested_quant_map"
SCALES: dict[Kind, tuple[str, ...]] = {"int8": ("SCB", "weight_format"), "fp8": ("weight_scale",)}
GROUPED = ("weight_packed", "weight_scale", "weight_shape")  # of int4
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE_BYTES = 4096  # more than any such JSON has
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU = torch.device("cpu")
AGAIN = "download or quantise the model again"


class Files(NamedTuple):
    """The tensors of a folder that hold the parts, by key, and how messages name it."""

    source: str
    files: Mapping[str, Any]

    def size(self, key: str) -> tuple[str, list[int]]:
        """Dtype and shape of a tensor. Errors: ValueError where it is missing."""
        if key not in self.files:
            raise ValueError(f"{self.source}: {key} is missing, a part of a quantised weight: {AGAIN}")
        piece = self.files[key].get_slice(key)
        return piece.get_dtype(), list(piece.get_shape())

    def check(self, key: str, dtype: str, shape: list[int]) -> None:
        """Errors: ValueError for a part that is missing, or of another dtype or shape."""
        if (size := self.size(key)) != (dtype, shape):
            raise ValueError(f"{self.source}: {key} is {size[0]} {size[1]}, and this quantised weight needs {dtype} {shape}: {AGAIN}")

    def read(self, key: str) -> Tensor:
        """The tensor, its own memory."""
        return self.files[key].get_tensor(key).clone()


class State(NamedTuple):
    """How the parts of a weight in 4 bits are to be read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int
    offset: float | None


class Packed(NamedTuple):
    """A quantised weight in the files, with the methods by which safetensors' files are read."""

    files: Files
    key: str
    kind: Kind
    state: State

    def get_slice(self, key: str) -> "Packed":
        """Itself."""
        return self

    def get_shape(self) -> list[int]:
        """Shape of the dense weight."""
        return list(self.state.shape)

    def get_dtype(self) -> str:
        """That of the dense weight, as safetensors names it."""
        return "F32"

    def get_tensor(self, key: str) -> Quantised:
        """The leaf."""
        state, read = self.state, self.files.read
        if self.kind == "int4":
            packed, scale, _ = (read(_beside(self.key, name)) for name in GROUPED)
            return quant_parts.leaf("int4", state.shape, state.dtype, packed.view(torch.uint8), scale.float(), block=state.block)
        if self.kind not in FOUR_BITS:
            scale = read(_beside(self.key, SCALES[self.kind][0])).float().view(-1)
            return quant_parts.leaf(self.kind, state.shape, state.dtype, read(self.key), scale)
        codes, scale = read(self.key).view(-1), read(self.key + ABSMAX)
        if state.offset is None:
            return quant_parts.leaf(self.kind, state.shape, state.dtype, codes, scale, block=state.block)
        double = {"nested": read(self.key + NESTED), "offset": torch.tensor(state.offset)}
        return quant_parts.leaf(self.kind, state.shape, state.dtype, codes, scale, block=state.block, **double)


def assembled(source: str, files: Mapping[str, Any], scheme: Scheme) -> dict[str, Any]:
    """{key: file} of a folder of quantised weights, these as one tensor each instead of their parts.

    Errors: ValueError, by key, for parts that are missing, of another dtype or shape, or not what bitsandbytes writes.
    """
    own = Files(source, files)
    if scheme.kind == "int4":
        weights = _groups(own)
    else:
        weights = _four_bits(own, scheme) if scheme.kind in FOUR_BITS else _eight_bits(own, scheme.kind)
    if not weights:
        raise ValueError(f"{source}: config.json says {quant_config.named(scheme)}, and the files hold no weight so quantised: {AGAIN}")
    taken = {part for key, packed in weights.items() for part in _keys(key, packed)}
    return {key: file for key, file in files.items() if key not in taken} | weights


def parts(key: str, leaf: Quantised) -> dict[str, Tensor]:
    """{key: tensor} of a weight in the files: the inverse of `assembled`."""
    if leaf.kind == "int4":
        # Scales are numbers of bfloat16, which float16 has not all of.
        scale = leaf.scale.to(torch.float32 if leaf.dtype == torch.float16 else leaf.dtype)
        packed, shape = leaf.codes.contiguous().view(torch.int32), torch.tensor(leaf.shape)
        return {_beside(key, name): part for name, part in zip(GROUPED, (packed, scale, shape), strict=True)}
    if leaf.kind == "int8":
        form = torch.tensor(0, dtype=torch.uint8)  # rows as they are
        return {key: leaf.codes, _beside(key, "SCB"): leaf.scale, _beside(key, "weight_format"): form}
    if leaf.kind == "fp8":
        return {key: leaf.codes, _beside(key, "weight_scale"): leaf.scale.unsqueeze(-1)}
    state = {"quant_type": leaf.kind, "blocksize": leaf.block, "dtype": str(leaf.dtype).removeprefix("torch."), "shape": list(leaf.shape)}
    tensors = {key: leaf.codes.view(-1, 1), key + ABSMAX: leaf.scale, key + MAP: quant_tables.four_bits(leaf.kind, CPU)}
    if leaf.nested is not None and leaf.offset is not None:
        tensors |= {key + NESTED: leaf.nested, key + NESTED_MAP: quant_tables.eight_bits(CPU)}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": leaf.offset.item()}
    written = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name: part.clone() for name, part in (tensors | {key + STATE + leaf.kind: written}).items()}


def _beside(key: str, name: str) -> str:
    return f"{key.removesuffix('weight')}{name}"


def _keys(key: str, packed: Packed) -> list[str]:
    if packed.kind == "int4":
        return [_beside(key, name) for name in GROUPED]
    if packed.kind not in FOUR_BITS:
        return [key, *(_beside(key, name) for name in SCALES[packed.kind])]
    return [key, key + ABSMAX, key + MAP, key + NESTED, key + NESTED_MAP, key + STATE + packed.kind]


def _four_bits(files: Files, scheme: Scheme) -> dict[str, Packed]:
    for other in FOUR_BITS:
        end = STATE + other
        if other != scheme.kind and (odd := next((key for key in files.files if key.endswith(end)), None)):
            raise ValueError(f"{files.source}: config.json says {scheme.kind}, and {odd.removesuffix(end)} is in {other}: {AGAIN}")
    # A weight of which any part is there, so that one without its state is named.
    ends = (STATE + "nf4", STATE + "fp4", MAP, ABSMAX, NESTED, NESTED_MAP)
    keys = [key.removesuffix(end) for key in files.files for end in ends if key.endswith(end)]
    return {key: _four_bits_at(files, key, scheme.kind) for key in dict.fromkeys(keys)}


def _four_bits_at(files: Files, key: str, kind: Kind) -> Packed:
    state = _state(files, key, kind)
    count = torch.Size(state.shape).numel()
    blocks = -(-count // state.block)
    files.check(key, "U8", [-(-count // 2), 1])
    files.check(key + ABSMAX, "F32" if state.offset is None else "U8", [blocks])
    tables = [(MAP, quant_tables.four_bits(kind, CPU))]
    if state.offset is not None:
        files.check(key + NESTED, "F32", [-(-blocks // NESTED_BLOCK)])
        tables.append((NESTED_MAP, quant_tables.eight_bits(CPU)))
    for end, table in tables:
        files.check(key + end, "F32", [len(table)])
        if not torch.equal(files.read(key + end), table):
            raise ValueError(f"{files.source}: {key + end} is not the table of bitsandbytes' {kind}: take the unquantised model")
    return Packed(files, key, kind, state)


def _state(files: Files, key: str, kind: Kind) -> State:
    name = key + STATE + kind
    dtype, shape = files.size(name)
    if dtype != "U8" or len(shape) != 1 or shape[0] > STATE_BYTES:
        raise ValueError(f"{files.source}: {name} is {dtype} {shape}; expected JSON in at most {STATE_BYTES} bytes (U8): {AGAIN}")
    try:
        values = json.loads(bytes(files.read(name).tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{files.source}: {name} is not valid JSON ({error}): {AGAIN}") from error
    state = fields.mapping(values, f"{files.source}: {name}")
    if fields.text(state, "quant_type") != kind:
        raise fields.wrong(state, "quant_type", kind)
    if (block := fields.integer(state, "blocksize")) not in BLOCKS:
        raise fields.wrong(state, "blocksize", f"one of {', '.join(map(str, BLOCKS))}")
    kept = DTYPES[fields.text(state, "dtype", choices=tuple(DTYPES))]
    return State(_shape(state), kept, block, _offset(state))


def _shape(state: Fields) -> tuple[int, ...]:
    shape = fields.integers(state, "shape", least=1)
    if len(shape) < 2 or any(size > 2**31 for size in shape) or torch.Size(shape).numel() > 2**40:
        raise fields.wrong(state, "shape", "the sizes of a matrix")
    return shape


def _offset(state: Fields) -> float | None:
    if "nested_offset" not in state.values:
        return None
    if fields.integer(state, "nested_blocksize") != NESTED_BLOCK:
        raise fields.wrong(state, "nested_blocksize", str(NESTED_BLOCK))
    fields.text(state, "nested_dtype", choices=("float32",))
    return fields.number(state, "nested_offset")


def _eight_bits(files: Files, kind: Kind) -> dict[str, Packed]:
    scale, dtype = SCALES[kind][0], "I8" if kind == "int8" else "F8_E4M3"
    scales = (f"{key.removesuffix(scale)}weight" for key in files.files if key.endswith(f".{scale}"))
    coded = (key for key, file in files.files.items() if file.get_slice(key).get_dtype() == dtype)
    return {key: _eight_bits_at(files, key, kind, dtype) for key in dict.fromkeys((*scales, *coded))}


def _eight_bits_at(files: Files, key: str, kind: Kind, dtype: str) -> Packed:
    shape, scale = files.size(key)[1], _beside(key, SCALES[kind][0])
    if len(shape) != 2:
        raise ValueError(f"{files.source}: {key} has shape {shape}; expected that of a matrix: {AGAIN}")
    files.check(key, dtype, shape)
    if kind == "int8":
        files.check(scale, "F32", shape[:1])
        _check_format(files, _beside(key, "weight_format"))
    else:
        scale_size = files.size(scale)
        if scale_size[0] not in ("F32", "BF16", "F16") or scale_size[1] != [shape[0], 1]:
            raise ValueError(
                f"{files.source}: {scale} is {scale_size[0]} {scale_size[1]}, the scales of a weight that are F32 {[shape[0], 1]}: {AGAIN}"
            )
    return Packed(files, key, kind, State(tuple(shape), torch.float32, quant.BLOCK, None))


def _check_format(files: Files, key: str) -> None:
    """Folders of older versions do not say that rows are as they are; other layouts are those of some graphics cards."""
    if key not in files.files:
        return
    files.check(key, "U8", [])
    if (form := int(files.read(key))) != 0:
        raise ValueError(
            f"{files.source}: {key} is {form}; expected 0, rows as they are: save the model again with bitsandbytes 0.45 or later"
        )


def _groups(files: Files) -> dict[str, Packed]:
    keys = (f"{key.removesuffix(end)}weight" for key in files.files for end in GROUPED if key.endswith(f".{end}"))
    return {key: _groups_at(files, key) for key in dict.fromkeys(keys)}


def _groups_at(files: Files, key: str) -> Packed:
    packed, scale, shape = (_beside(key, name) for name in GROUPED)
    files.check(shape, "I64", [2])
    rows, width = files.read(shape).tolist()
    if rows < 1 or width < 8 or width % 8 or rows * width > 2**40:
        raise ValueError(f"{files.source}: {shape} is {[rows, width]}; expected the sizes of a matrix of whole bytes: {AGAIN}")
    files.check(packed, "I32", [rows, width // 8])
    dtype, sizes = files.size(scale)
    if dtype not in ("F32", "BF16", "F16") or len(sizes) != 2 or sizes[0] != rows or sizes[1] < 1 or width % sizes[1]:
        raise ValueError(f"{files.source}: {scale} is {dtype} {sizes}, and a weight {[rows, width]} needs F32 [{rows}, groups]: {AGAIN}")
    return Packed(files, key, "int4", State((rows, width), torch.float32, width // sizes[1], None))
