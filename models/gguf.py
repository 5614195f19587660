"""GGUF files: llama, qwen2 and qwen3 models in any quantisation that the `gguf` package reads, with their tokenizers.

V vocabulary, D hidden, H heads, d head dim. The llama converter reorders the rows of q and k within each head for the
interleaved rotary layout, [d/2, 2] instead of [2, d/2]; loading puts them back. Frequencies of Llama 3.1 arrive as
one factor per frequency and are recognised as the scaling they came from.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from treetune.core import tree
from treetune.core.param import Params
from treetune.models import MODELS, Model, dense, llama

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
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5


def _open(path: str | Path):
    import gguf

    try:
        return gguf.GGUFReader(str(path))
    except (ValueError, FileNotFoundError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as GGUF ({error}): check the path, or download the file again") from error


def _get(reader, key: str, default=None):
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def load(path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
    """The model in a .gguf file, dequantised to float32 and rounded once to `dtype`, which is also what it computes in.

    Raises ValueError for an architecture or rope scaling that is not known here, and for missing or unexpected tensors.
    """
    reader = _open(path)
    family = _get(reader, "general.architecture")
    if family not in ARCHITECTURES:
        raise ValueError(f"{path} has architecture {family!r}; expected one of {', '.join(ARCHITECTURES)}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    cfg = replace(_config(reader, family, tensors), dtype=dtype)
    return Model(family, cfg, _params(path, family, cfg, tensors, dtype, device))


def _config(reader, family: str, tensors: dict) -> llama.Config:
    def size(name: str, default=None):
        return _get(reader, f"{family}.{name}", default)

    heads, hidden = size("attention.head_count"), size("embedding_length")
    cfg = llama.Config(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden,
        mlp_size=size("feed_forward_length"),
        num_layers=size("block_count"),
        num_heads=heads,
        num_kv_heads=size("attention.head_count_kv", heads),
        head_dim=size("attention.key_length") or size("rope.dimension_count") or hidden // heads,
        # Stored as float32: the shortest decimal that rounds to it is the number of the original config.json.
        norm_eps=float(f"{size('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_theta=float(size("rope.freq_base", 10000.0)),
        max_positions=size("context_length"),
        tied="output.weight" not in tensors,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        window=size("attention.sliding_window"),
    )
    if (kind := size("rope.scaling.type", "none")) != "none":
        raise ValueError(f"the file has rope scaling {kind!r}; expected none, or the frequency factors of Llama 3.1")
    return replace(cfg, rope_scaling=_rope_scaling(cfg, tensors[FACTORS])) if FACTORS in tensors else cfg


def _rope_scaling(cfg: llama.Config, tensor) -> llama.Llama3Rope:
    """The Llama 3.1 scaling whose frequencies are the plain ones divided by the stored factors [d/2]."""
    factors = _dequantise(tensor)
    scaling = llama.Llama3Rope(round(float(factors.max()), 4), 1.0, 4.0, 8192)
    plain = dense.inv_freq(cfg, torch.device("cpu"))
    if not torch.allclose(plain / factors, dense.inv_freq(replace(cfg, rope_scaling=scaling), plain.device), rtol=1e-4):
        raise ValueError(f"{FACTORS} holds frequency factors that are not those of Llama 3.1; this rope scaling is not known")
    return scaling


def _dequantise(tensor) -> Tensor:
    """float32, rows first (GGUF lists the sizes the other way round)."""
    from gguf import quants

    array = quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(array.copy() if not array.flags.writeable else array)


def _params(path, family: str, cfg: llama.Config, tensors: dict, dtype: torch.dtype, device) -> Params:
    named = {_leaf_path(name): tensor for name, tensor in tensors.items() if name != FACTORS}
    abstract = dict(tree.items(MODELS[family].abstract(cfg, dtype=dtype)))
    for keys, what in ((set(abstract) - set(named), "lacks"), (set(named) - set(abstract), "has besides those of its family")):
        if keys:
            raise ValueError(f"{path}: the file {what} {len(keys)} tensors, the first is {min(keys)}")
    pairs = []
    for leaf, param in abstract.items():
        tensor = _dequantise(named[leaf])
        if family == "llama" and leaf.endswith(("q_proj", "k_proj")):
            tensor = _unpermute(tensor, cfg.num_heads if leaf.endswith("q_proj") else cfg.num_kv_heads)
        if tuple(tensor.shape) != param.shape:
            raise ValueError(f"{path}: {leaf} has shape {list(tensor.shape)}; the sizes in the file imply {list(param.shape)}")
        pairs.append((leaf, tensor.to(device=device, dtype=dtype)))
    return tree.from_items(pairs)


def _leaf_path(name: str) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    known = NAMES.get(block[2] if block else name, name)
    return f"layers.{block[1]}.{known}" if block else known


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """[H (d/2 2), D] -> [H (2 d/2), D]."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def tokenizer(path: str | Path):
    """The transformers fast tokenizer in a .gguf file: byte-level BPE with the split, special tokens and chat template it names.

    Raises ValueError for another kind of tokenizer or a pre-tokenizer that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    reader = _open(path)
    kind, pre = _get(reader, "tokenizer.ggml.model"), _get(reader, "tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in SPLITS:
        raise ValueError(f"{path} has tokenizer {kind!r} with pre-tokenizer {pre!r}; expected 'gpt2' with one of {', '.join(SPLITS)}")
    tokens = _get(reader, "tokenizer.ggml.tokens")
    special = {name: tokens[index] for name in ("bos", "eos", "pad") if (index := _special(reader, name)) is not None}
    if (unknown := _get(reader, "tokenizer.ggml.unknown_token_id")) is not None:
        special["unk"] = tokens[unknown]
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(reader, pre, tokens, special),
        **{f"{name}_token": token for name, token in special.items()},
        chat_template=_get(reader, "tokenizer.chat_template"),
        model_max_length=_get(reader, f"{_get(reader, 'general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
    )


def _special(reader, name: str) -> int | None:
    long = {"pad": "padding"}.get(name, name)
    return _get(reader, f"tokenizer.ggml.{long}_token_id")


def _backend(reader, pre: str, tokens: list[str], special: dict[str, str]):
    """The tokenizers.Tokenizer of the file's vocabulary, merges and special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    types = _get(reader, "tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    vocab = {token: index for index, token in enumerate(tokens) if types[index] != _UNUSED}
    merges = [tuple(merge.split(" ")) for merge in _get(reader, "tokenizer.ggml.merges", [])]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = _split(pre), decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if _get(reader, "tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos" in special:
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
