"""Rotary positions in a config.json: `rope_parameters` and the older `rope_scaling`, for all layers alike or by the type of a layer.

What null and a missing field mean is what transformers makes of them.
"""

from typing import Any, NamedTuple

from treetune.core import fields
from treetune.core.fields import Fields
from treetune.models import rope_scaling
from treetune.models.rope_scaling import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, Scaling, YarnRope

ORIGINAL, PARTIAL, LAYERS = "original_max_position_embeddings", "partial_rotary_factor", ("full_attention", "sliding_attention")
# The fields of each type, besides those that all have.
KINDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", ORIGINAL),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", ORIGINAL),
}
COMMON = ("rope_type", "type", "rope_theta", PARTIAL)
MOST = 2**31 - 1


class Options(NamedTuple):
    """What a family has of rotary positions: default base, other names of types, whether a part of each head may turn.

    original: the original length where config.json names none beside the mapping, which then counts before that of the mapping.
    by_type: the default bases of full and of sliding layers, where each type of layers has positions of its own; window_theta: the field
    of older files with the base of sliding layers.
    """

    theta: float = 10000.0
    aliases: tuple[tuple[str, str], ...] = ()
    partial: bool = False
    original: int | None = None
    by_type: tuple[float, float] | None = None
    window_theta: str = ""


class Ropes(NamedTuple):
    """Rotary positions of all layers, or of full ones where those with a window have others; the part of each head that turns."""

    rope: Rope
    window_rope: Rope | None = None
    part: float = 1.0


def read(hf: Fields, max_positions: int, head_dim: int, options: Options) -> Ropes:
    """The rotary positions of a model. Raises ValueError naming file and field."""
    if options.by_type is not None:
        return Ropes(*_read_by_type(hf, max_positions, head_dim, options))
    return _read_one(hf, max_positions, head_dim, options)


def _read_one(hf: Fields, max_positions: int, head_dim: int, options: Options) -> Ropes:
    """A `rope_scaling` that says something replaces `rope_parameters` as a whole."""
    old, new = (fields.inner(hf, name, default=None, null=True) for name in ("rope_scaling", "rope_parameters"))
    rope = old if old and old.values else new or fields.mapping({}, f"{hf.source}: rope_parameters")
    theta, part = _theta(hf, options.theta), _part(hf, options, 1.0)
    part = _part(rope, options, part)
    if int(head_dim * part) % 2 or int(head_dim * part) < 2:
        raise fields.wrong(rope if PARTIAL in rope.values else hf, PARTIAL, f"a part of {head_dim} that is an even number of features")
    rope = rope._replace(values={"rope_theta": theta} | rope.values)
    original = fields.integer(hf, ORIGINAL, default=options.original, least=2, most=MOST, null=True)
    return Ropes(_rope(rope, (max_positions, original, int(head_dim * part)), options), part=part)


def _read_by_type(hf: Fields, max_positions: int, head_dim: int, options: Options) -> tuple[Rope, Rope]:
    """Full and sliding layers; `rope_scaling` and `rope_theta` are of the full ones."""
    assert options.by_type is not None
    new, old = (fields.inner(hf, name, default=None, null=True) for name in ("rope_parameters", "rope_scaling"))
    by_type = new or fields.mapping({}, f"{hf.source}: rope_parameters")
    if odd := [name for name in fields.unknown(by_type, LAYERS) if by_type.values[name]]:
        raise ValueError(f"{by_type.source} has {odd[0]}; expected the rotary positions of {' and '.join(LAYERS)}")
    ropes = []
    for name, theta, base in zip(LAYERS, ("rope_theta", options.window_theta), options.by_type, strict=True):
        # Where the file says nothing of a type of layers, it has the type default, which a `type` in rope_scaling does not replace.
        absent = fields.mapping({"rope_type": "default"}, f"{by_type.source}: {name}")
        rope = fields.inner(by_type, name, default=None, null=True) or absent
        base = fields.number(hf, theta, default=base, least=1.0)
        scaling = old.values if old and name == LAYERS[0] else {}
        rope = rope._replace(values={"rope_theta": base} | rope.values | scaling)
        if rope.values.get("truncate") is False:
            raise fields.wrong(rope, "truncate", "true: transformers reads no other for a type of layers")
        _part(rope, Options(), 1.0)
        ropes.append(_rope(rope, (max_positions, None, head_dim), Options()))
    return ropes[0], ropes[1]


def _rope(rope: Fields, sizes: tuple[int, int | None, int], options: Options) -> Rope:
    """sizes: positions of the model, original positions where they stand beside the mapping, features that turn."""
    kind = fields.text(rope, "rope_type" if "rope_type" in rope.values else "type", default="default")
    kind = dict(options.aliases).get(kind, kind)
    if kind not in KINDS:
        raise ValueError(
            f"{rope.source} has the type {fields.shown(kind)}; expected one of {', '.join(KINDS)}: the others are not computed"
        )
    if odd := [name for name in fields.unknown(rope, (*COMMON, *KINDS[kind])) if rope.values[name]]:
        raise ValueError(f"{rope.source} has {odd[0]}, which is not known for the type {kind}: it may change what the model computes")
    theta = _theta(rope, 1.0)
    if kind == "yarn" and theta == 1:
        raise fields.wrong(rope, "rope_theta", "a number above 1: yarn divides by its logarithm")
    return Rope(theta, _scaling(rope, kind, *sizes))


def _theta(rope: Fields, default: float) -> float:
    return fields.number(rope, "rope_theta", default=default, least=1.0)


def _part(rope: Fields, options: Options, default: float) -> float:
    part = fields.number(rope, PARTIAL, default=default, above=0, null=True)
    if part > 1 or (part != 1 and not options.partial):
        raise fields.wrong(rope, PARTIAL, "at most 1" if part > 1 else "1: rotating a part of each head is not computed by this family")
    return part


def _scaling(rope: Fields, kind: str, max_positions: int, original: int | None, dim: int) -> Scaling | None:
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        return (LinearRope if kind == "linear" else DynamicRope)(fields.number(rope, "factor", above=0))
    least = 1 + (kind == "longrope")
    length: int = fields.integer(rope, ORIGINAL, default=max_positions, least=least, most=MOST) if original is None else original
    if kind == "llama3":
        return _llama3(rope, length)
    factor = fields.number(rope, "factor", default=None, above=0, null=True) or max_positions / length
    return _yarn(rope, factor, length) if kind == "yarn" else _long(rope, factor, length, dim)


def _llama3(rope: Fields, original: int) -> Llama3Rope:
    low, high = fields.number(rope, "low_freq_factor", above=0), fields.number(rope, "high_freq_factor", above=0)
    if high <= low:
        raise fields.wrong(rope, "high_freq_factor", f"a number above low_freq_factor, which is {low:g}")
    return Llama3Rope(fields.number(rope, "factor", above=0), low, high, original)


def _yarn(rope: Fields, factor: float, original: int) -> YarnRope:
    mscale, all_dim = (fields.number(rope, name, default=None, least=0, null=True) for name in ("mscale", "mscale_all_dim"))
    attention = fields.number(rope, "attention_factor", default=None, least=0, null=True)
    attention = rope_scaling.yarn_attention_factor(factor, mscale, all_dim) if attention is None else attention
    # transformers takes 0 for a missing bound
    fast, slow = (fields.number(rope, name, default=0.0, least=0, null=True) for name in ("beta_fast", "beta_slow"))
    return YarnRope(factor, original, attention, fast or 32.0, slow or 1.0, fields.flag(rope, "truncate", default=True))


def _long(rope: Fields, factor: float, original: int, dim: int) -> LongRope:
    attention = fields.number(rope, "attention_factor", default=None, least=0, null=True)
    attention = rope_scaling.long_attention_factor(factor, original) if attention is None else attention
    short, long = (_factors(rope, name, dim // 2) for name in ("short_factor", "long_factor"))
    return LongRope(short, long, original, attention)


def _factors(rope: Fields, name: str, count: int) -> tuple[float, ...]:
    values = rope.values.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise fields.wrong(rope, name, f"a list of {count} numbers")
    return tuple(fields.number(fields.mapping({name: value}, rope.source), name, above=0) for value in values)


def to_hf(rope: Rope, part: float = 1.0) -> dict[str, Any]:
    """The `rope_parameters` of some layers (inverse of `read`)."""
    mapping: dict[str, Any] = {"rope_theta": rope.theta} | ({} if part == 1 else {PARTIAL: part})
    match rope.scaling:
        case None:
            return mapping | {"rope_type": "default"}
        case LinearRope(factor) | DynamicRope(factor):
            return mapping | {"rope_type": "linear" if isinstance(rope.scaling, LinearRope) else "dynamic", "factor": factor}
        case Llama3Rope(factor, low, high, original):
            extra = {"low_freq_factor": low, "high_freq_factor": high, ORIGINAL: original}
            return mapping | {"rope_type": "llama3", "factor": factor} | extra
        case YarnRope(factor, original, attention, fast, slow, truncate):
            extra = {"attention_factor": attention, "beta_fast": fast, "beta_slow": slow} | ({} if truncate else {"truncate": False})
            return mapping | {"rope_type": "yarn", "factor": factor, ORIGINAL: original} | extra
        case LongRope(short, long, original, attention):
            extra = {"short_factor": list(short), "long_factor": list(long), ORIGINAL: original}
            return mapping | {"rope_type": "longrope", "attention_factor": attention} | extra
