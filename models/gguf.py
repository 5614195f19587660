"""GGUF files: llama, qwen2 and qwen3 models in any quantisation that the `gguf` package reads, with their tokenizers.

V vocabulary, D hidden, H heads, d head dim. The llama converter reorders the rows of q and k within each head for the
interleaved rotary layout, [d/2, 2] instead of [2, d/2]; loading puts them back. Frequencies of Llama 3.1 arrive as
one factor per frequency and are recognised as the scaling they came from.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from treetune.core import fields, tree
from treetune.core.fields import Fields
from treetune.core.param import Params
from treetune.core.quant import Scheme
from treetune.models import MODELS, Model, decoder_config, quantised
from treetune.models.dense import Config
from treetune.models.quantised import Keep
from treetune.models.rope_scaling import Llama3Rope

NAMES = {
    "token_embd.weight": "embed_tokens",
    "output_norm.weight": "norm",
    "output.weight": "lm_head",
    "attn_norm.weight": "input_norm",
    "attn_q.weight": "q_proj",
    "attn_k.weight": "k_proj",
    "attn_v.weight": "v_proj",
    "attn_q.bias": "q_bias",
    "attn_k.bias": "k_bias",
    "attn_v.bias": "v_bias",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    "attn_output.weight": "o_proj",
    "ffn_norm.weight": "post_norm",
    "ffn_gate.weight": "gate_proj",
    "ffn_up.weight": "up_proj",
    "ffn_down.weight": "down_proj",
}
FACTORS = "rope_freqs.weight"
ARCHITECTURES = ("llama", "qwen2", "qwen3")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre -> the split before BPE, as the models' own tokenizer.json files have it.
SPLITS = {"gpt-2": None, "smollm": None, "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST, "qwen2": _WORDS + r"\p{N}" + _REST}
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # our name -> that of the file
_MOST = 2**24  # more than any size of a model
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5


# What a reader of a damaged file raises: it takes sizes and offsets from the file itself.
_DAMAGED = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, OSError, MemoryError, RecursionError, NotImplementedError)
_SIZES = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_COMPUTED = (
    *_SIZES, "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
)  # fmt: skip
_WITHOUT_EFFECT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")


def _open(path: str | Path):
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
    except _DAMAGED as error:
        raise ValueError(f"{path} cannot be read as GGUF ({error}): check the path, or download the file again") from error
    _check_places(path, reader)
    return reader


def _check_places(path: str | Path, reader) -> None:
    """The tensors follow one another to the end of the file: a damaged offset or alignment would have other numbers read."""
    end = reader.data_offset
    if not reader.tensors:
        return
    for tensor in sorted(reader.tensors, key=lambda one: int(one.data_offset)):
        if int(tensor.data_offset) - end not in range(int(reader.alignment)):
            raise ValueError(f"{path}: the tensor {tensor.name} does not follow the one before it: download the file again")
        end = int(tensor.data_offset) + int(tensor.n_bytes)
    if Path(path).stat().st_size - end not in range(max(int(reader.alignment), 1)):
        raise ValueError(f"{path} does not end where its last tensor does: download the file again")


def _metadata(path: str | Path, reader, names: Iterable[str]) -> Fields:
    """The keys of a file that are there, as plain values, under their names."""
    values = {}
    for name in names:
        if (field := reader.fields.get(name)) is not None:
            try:
                values[name] = field.contents()
            except _DAMAGED as error:
                raise ValueError(f"{path}: the key {name} cannot be read ({error}): download the file again") from error
    return Fields(values, str(path))


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scheme: Scheme | None = None,
    see: quantised.See | None = None,
    home: quantised.Home | None = None,
) -> Model:
    """The model in a .gguf file, dequantised to float32 and rounded once to `dtype`, which is also what it computes in.

    scheme: quantise its leaves again, each as it is read. see: is told of each of these. home: where layers go, if not to
    the device, or how leaves are split among ranks.

    Raises ValueError for an architecture, a key or a rope scaling that is not known here, and for missing or unexpected tensors.
    """
    reader = _open(path)
    family = _family(path, reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    cfg = replace(_config(path, reader, family, tensors), dtype=dtype)
    keep = quantised.keeping(MODELS[family].abstract(cfg), scheme, dtype)._replace(see=see, home=home)
    return Model(family, cfg, _params(path, family, cfg, tensors, device, keep))


def _family(path: str | Path, reader) -> str:
    keys = _metadata(path, reader, ("general.architecture", "split.count"))
    if fields.integer(keys, "split.count", default=1) > 1:
        raise fields.wrong(keys, "split.count", "1: a model in several files is not read; join them with llama-gguf-split --merge")
    return fields.text(keys, "general.architecture", choices=ARCHITECTURES)


def _config(path: str | Path, reader, family: str, tensors: dict) -> Config:
    keys = _metadata(path, reader, [name for name in reader.fields if name.startswith(f"{family}.")])
    allowed = [f"{family}.{name}" for name in (*_COMPUTED, *_WITHOUT_EFFECT)]
    if odd := [name for name in fields.unknown(keys, allowed) if keys.values[name]]:
        raise ValueError(f"{path} has {odd[0]} = {fields.shown(keys.values[odd[0]])}, which is not known: it may change what is computed")

    def size(name: str, **bounds) -> int:
        return fields.integer(keys, f"{family}.{name}", least=1, most=_MOST, **bounds)

    heads, hidden = size("attention.head_count"), size("embedding_length")
    cfg = Config(
        vocab_size=_rows(path, tensors),
        hidden_size=hidden,
        mlp_size=size("feed_forward_length"),
        num_layers=size("block_count"),
        num_heads=heads,
        num_kv_heads=_kv_heads(keys, family, heads),
        head_dim=_head_dim(keys, family, hidden // heads),
        norm_eps=_epsilon(keys, family),
        rope_theta=fields.number(keys, f"{family}.rope.freq_base", default=10000.0, least=1.0),
        max_positions=fields.integer(keys, f"{family}.context_length", least=1, most=2**31 - 1),
        tied="output.weight" not in tensors,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        window=_window(keys, family),
    )
    if fields.text(keys, f"{family}.rope.scaling.type", default="none") != "none":
        raise fields.wrong(keys, f"{family}.rope.scaling.type", "none, or the frequency factors of Llama 3.1")
    return replace(cfg, rope_scaling=_rope_scaling(cfg, tensors[FACTORS])) if FACTORS in tensors else cfg


def _rows(path: str | Path, tensors: dict) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{path} has no matrix token_embd.weight; expected a language model")
    return int(embedding.shape[1])


def _kv_heads(keys: Fields, family: str, heads: int) -> int:
    name = f"{family}.attention.head_count_kv"
    count = fields.integer(keys, name, default=heads, least=1, most=_MOST)
    if heads % count:
        raise fields.wrong(keys, name, f"a divisor of {family}.attention.head_count, which is {heads}")
    return count


def _head_dim(keys: Fields, family: str, plain: int) -> int:
    """Features of a head: keys, values and the rotated part are all of this size."""
    names = [f"{family}.{name}" for name in ("attention.key_length", "rope.dimension_count", "attention.value_length")]
    sizes = {name: fields.integer(keys, name, least=1, most=_MOST) for name in names if name in keys.values}
    dim = next(iter(sizes.values()), plain)
    for name, size in sizes.items():
        if size != dim or size % 2:
            raise fields.wrong(keys, name, f"an even number, the same in {', '.join(names)}")
    if dim < 2 or dim % 2:
        raise fields.wrong(keys, f"{family}.embedding_length", f"an even multiple of {family}.attention.head_count")
    return dim


def _epsilon(keys: Fields, family: str) -> float:
    """Stored as float32: the shortest decimal that rounds to it is the number of the original config.json."""
    name = f"{family}.attention.layer_norm_rms_epsilon"
    value = fields.number(keys, name, least=0)
    if value > 1:
        raise fields.wrong(keys, name, "a number from 0 to 1")
    return float(f"{value:.6g}")


def _window(keys: Fields, family: str) -> int | None:
    size = fields.integer(keys, f"{family}.attention.sliding_window", default=0, least=0, most=2**31 - 1)
    if size and family != "llama":
        raise fields.wrong(keys, f"{family}.attention.sliding_window", "0: a window is not computed for this family")
    return size or None


def _rope_scaling(cfg: Config, tensor) -> Llama3Rope:
    """The Llama 3.1 scaling whose frequencies are the plain ones divided by the stored factors [d/2]."""
    factors = _dequantise(tensor)
    scaling = llama31(round(float(factors.max()), 4))
    plain = decoder_config.inv_freq(cfg, torch.device("cpu"))
    if not torch.allclose(plain / factors, decoder_config.inv_freq(replace(cfg, rope_scaling=scaling), plain.device), rtol=1e-4):
        raise ValueError(f"{FACTORS} holds frequency factors that are not those of Llama 3.1; this rope scaling is not known")
    return scaling


def llama31(factor: float) -> Llama3Rope:
    """The scaling of Llama 3.1 and 3.2, of which files hold the factors alone."""
    return Llama3Rope(factor, 1.0, 4.0, 8192)


def _dequantise(tensor) -> Tensor:
    """float32, rows first (GGUF lists the sizes the other way round)."""
    from gguf import quants

    try:
        array = quants.dequantize(tensor.data, tensor.tensor_type)
    except _DAMAGED as error:
        raise ValueError(f"the tensor {tensor.name} of type {tensor.tensor_type.name} cannot be read: {error or 'unknown type'}") from error
    return torch.from_numpy(array.copy() if not array.flags.writeable else array)


def _params(path, family: str, cfg: Config, tensors: dict, device, keep: Keep) -> Params:
    by_path = {_leaf_path(name): tensor for name, tensor in tensors.items() if name != FACTORS}
    abstract = keep.wide(dict(tree.items(MODELS[family].abstract(cfg, dtype=cfg.dtype))))
    for keys, problem in ((set(abstract) - set(by_path), "lacks"), (set(by_path) - set(abstract), "has besides those of its family")):
        if keys:
            raise ValueError(f"{path}: the file {problem} {len(keys)} tensors, the first is {min(keys)}")
    for leaf, param in abstract.items():  # all of them before the first is read, so that nothing of a wrong size takes memory
        if (shape := tuple(int(size) for size in by_path[leaf].shape[::-1])) != param.shape:
            raise ValueError(f"{path}: {leaf} has shape {list(shape)}; the sizes in the file imply {list(param.shape)}")
    pairs = []
    for leaf in abstract:
        tensor = _dequantise(by_path[leaf])
        if family == "llama" and leaf.endswith(("q_proj", "k_proj")):
            tensor = _unpermute(tensor, cfg.num_heads if leaf.endswith("q_proj") else cfg.num_kv_heads)
        pairs.append((leaf, keep(leaf, tensor.to(device=device, dtype=abstract[leaf].dtype))))
    return tree.from_items(pairs)


def _leaf_path(name: str) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    leaf = NAMES.get(block[2] if block else name, name)
    return f"layers.{block[1]}.{leaf}" if block else leaf


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """[H (d/2 2), D] -> [H (2 d/2), D]."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def tokenizer(path: str | Path) -> Any:
    """The transformers fast tokenizer in a .gguf file: byte-level BPE with the split, special tokens and chat template it names.

    Raises ValueError for another kind of tokenizer or a pre-tokenizer that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    reader = _open(path)
    keys = _metadata(path, reader, [name for name in reader.fields if name.startswith("tokenizer.")])
    kind, pre = (fields.text(keys, f"tokenizer.ggml.{name}", default=None) for name in ("model", "pre"))
    if kind != "gpt2" or pre not in SPLITS:
        raise ValueError(f"{path} has tokenizer {kind!r} with pre-tokenizer {pre!r}; expected 'gpt2' with one of {', '.join(SPLITS)}")
    tokens = list(fields.texts(keys, "tokenizer.ggml.tokens"))
    special = {name: token for name in SPECIAL if (token := _special(keys, name, tokens)) is not None}
    length = _metadata(path, reader, [name := f"{_family(path, reader)}.context_length"])
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(keys, pre, tokens, special),
        **{f"{name}_token": token for name, token in special.items()},
        chat_template=fields.text(keys, "tokenizer.chat_template", default=None),
        model_max_length=fields.integer(length, name, default=None, least=1),
        clean_up_tokenization_spaces=False,
    )


def _special(keys: Fields, name: str, tokens: list[str]) -> str | None:
    """The text of a special token, None where the file names none."""
    long = f"tokenizer.ggml.{SPECIAL[name]}_token_id"
    index = fields.integer(keys, long, default=None, least=0)
    if index is not None and index >= len(tokens):
        raise fields.wrong(keys, long, f"the number of one of the {len(tokens)} tokens")
    return None if index is None else tokens[index]


def _backend(keys: Fields, pre: str, tokens: list[str], special: dict[str, str]):
    """The tokenizers.Tokenizer of the file's vocabulary, merges and special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    types = fields.integers(keys, "tokenizer.ggml.token_type", default=(_NORMAL,) * len(tokens))
    if len(types) != len(tokens):
        raise fields.wrong(keys, "tokenizer.ggml.token_type", f"a list of {len(tokens)} whole numbers, one for each token")
    vocab = {token: index for index, token in enumerate(tokens) if types[index] != _UNUSED}
    # What is no pair is refused by the tokenizers package.
    merges = [cast(tuple[str, str], tuple(merge.split(" "))) for merge in fields.texts(keys, "tokenizer.ggml.merges", default=())]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = _split(pre), decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if fields.flag(keys, "tokenizer.ggml.add_bos_token", default=pre == "llama-bpe") and "bos" in special:
        bos = special["bos"]
        template = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
        backend.post_processor = processors.Sequence([backend.post_processor, template])
    # In the order of their ids: the added tokens of the original file.
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types, strict=True) if k == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == _USER])
    return backend


def _split(pre: str):
    from tokenizers import Regex, pre_tokenizers

    if SPLITS[pre] is not None:
        split = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if pre == "smollm" else words
