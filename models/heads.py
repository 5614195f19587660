"""Scalar heads: a linear map from final hidden states to C scores, and its folders in the format of transformers.

N read rows, D hidden, C classes. A head is a tree {"score": {"weight": [C, D], "bias"?: [C]}}, kept in float32.
Without a bias it scores sequences (a reward model, C = 1); with one it classifies tokens (a process reward model, C = 2).
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.core import fields, param, shard, tree
from treetune.core.fields import Fields
from treetune.core.lora import Lora
from treetune.core.param import Param, Params
from treetune.core.quant import Scheme
from treetune.models import MODELS, Model, adapter, decoder_attention, folder, hf, hf_weights, quantised
from treetune.models.dense import Config, Training
from treetune.models.quantised import Home
from treetune.ops import attention

# kind -> (what replaces "ForCausalLM" in transformers' class names, PEFT's task_type)
HEAD_KINDS = {"sequence": ("ForSequenceClassification", "SEQ_CLS"), "token": ("ForTokenClassification", "TOKEN_CLS")}
LABELS = {"sequence": ("reward",), "token": ("bad", "good")}
PAD = "<|pad|>"


def abstract(cfg: Config, classes: int, *, bias: bool) -> Params:
    """The tree of `Param`s of a head: weight [C, D] normal with the model's own deviation, bias [C] zero."""
    if classes < 1:
        raise ValueError(f"a head of {classes} classes was asked for; expected at least 1")
    score = {"weight": Param((classes, cfg.hidden_size), axes=("classes", "embed"), init=f"normal:{cfg.init_std}")}
    return {"score": score | ({"bias": Param((classes,), axes=("classes",), init="zeros")} if bias else {})}


def init(cfg: Config, classes: int, *, bias: bool, seed: int) -> Params:
    """A fresh head in float32, a function of the seed and the sizes."""
    return param.init(abstract(cfg, classes, bias=bias), seed=seed)


def kind_of(head: Params) -> str:
    """What a head scores: "token" where it has a bias, "sequence" where it has none."""
    # A tree of weights names no kind. transformers' two classes differ in the bias: docs/decisions.md, "A bias marks a token head".
    return "token" if "bias" in head["score"] else "sequence"


def logits(rows: Tensor, head: Params) -> Tensor:
    """rows W^T + b, [N, D] -> [N, C], computed in float32 whatever the rows' dtype."""
    # In bfloat16 two answers of nearly the same quality would often get the very same score.
    score = shard.gather_all(head["score"], torch.float32)
    return F.linear(rows.float(), score["weight"], score.get("bias"))


def scores(
    family: str,
    cfg: Config,
    weights: Params,
    head: Params,
    batch: dict,
    plan: attention.Plan | None = None,
    *,
    lora: Lora | None = None,
    **training: Unpack[Training],
) -> Tensor:
    """Scores [N, C] in float32 of the rows `at` [N] of a stream, from the hidden states after the last norm.

    The plan is computed here when absent.
    """
    plan = decoder_attention.plan(batch, cfg) if plan is None else plan
    hidden = MODELS[family].forward(weights, batch, plan, cfg, lora=lora, **training).hidden
    return logits(hidden[batch["at"]], head)


def kind(path: str | Path) -> str | None:
    """What scalar head a local model or adapter folder holds: "sequence", "token", or None for another model or a file."""
    root = Path(path).expanduser()
    if (root / adapter.CONFIG).is_file():
        task = adapter.task_of(root)
        return next((name for name, (_, task_type) in HEAD_KINDS.items() if task == task_type), None)
    config = folder.read_json(root / "config.json") if (root / "config.json").is_file() else {}
    architectures = " ".join(fields.texts(fields.mapping(config, str(root / "config.json")), "architectures", default=(), null=True))
    return next((name for name, (suffix, _) in HEAD_KINDS.items() if architectures.endswith(suffix)), None)


def save(
    path: str | Path,
    model: Model,
    head: Params,
    *,
    tokenizer: Any = None,
    labels: Sequence[str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that `load` and transformers read: AutoModelForSequenceClassification, or ...ForTokenClassification with a bias.

    `labels` name the classes (reward; bad and good). The language head is left out. The tokenizer goes in as `padding` makes it;
    without one the folder names no padding token, and transformers refuses batches of several texts.
    """
    kind_name = kind_of(head)
    classes = _check(head, model.cfg, "the head to save")
    tokenizer = None if tokenizer is None else padding(tokenizer, model.cfg.vocab_size)
    files, config = hf.files_of(model, tokenizer)
    left_out = {key for path, key in MODELS[model.family].HF_KEYS.items() if path in ("lm_head", "lm_head_bias")}
    own = {name: leaf.detach().contiguous() for name, leaf in tree.items(head)}
    tensors = itertools.chain((item for item in files.tensors() if item[0] not in left_out), own.items())
    sizes = {key: leaf for key, leaf in (files.sizes or {}).items() if key not in left_out}
    sizes |= {name: Param(tuple(leaf.shape), leaf.dtype) for name, leaf in own.items()}
    architecture = config["architectures"][0].replace("ForCausalLM", HEAD_KINDS[kind_name][0])
    config |= {"architectures": [architecture], "tie_word_embeddings": model.cfg.tied} | _labelled(labels, kind_name, classes)
    hf.write(path, tensors, config, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes, sizes=sizes)


def load(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    scheme: Scheme | None = None,
    home: Home | None = None,
) -> tuple[Model, Params]:
    """The model (without `lm_head`, leaves in `dtype`) and the head (float32) of a folder or hub id of transformers' classifiers.

    home: where the leaves of the model go as they are read, or how they are split among ranks; the head stays whole.

    Raises ValueError when config.json names no such class, and as `hf.load` does for wrong, missing or unexpected tensors.
    """
    root = hf.fetch(path_or_id, revision=revision)
    config, kind_name = folder.read_json(root / "config.json"), kind(root)
    if kind_name is None:
        expected = " or ".join(f"...{suffix}" for suffix, _ in HEAD_KINDS.values())
        raise ValueError(
            f"{root / 'config.json'} has architectures {config.get('architectures')}; expected {expected}, a model with a head"
        )
    family, cfg = hf.read_config(root / "config.json")
    cfg = replace(cfg, dtype=dtype)
    sizes = dict(tree.items(MODELS[family].abstract(replace(cfg, tied=True), dtype=dtype)))
    sizes.pop("lm_head_bias", None)
    score = dict(tree.items(abstract(cfg, _classes(fields.mapping(config, str(root / "config.json"))), bias=kind_name == "token")))
    keep = quantised.folder_keeping(root, MODELS[family].abstract(cfg), scheme, dtype)._replace(home=home)
    if (read := getattr(MODELS[family], "read_files", None)) is not None:
        params, tensors = (
            read(root, cfg, dtype, device, beside=list(score), keep=keep),
            hf_weights.read_tensors(root, score, unread=hf_weights.checked_keys(root), device=device),
        )
        return Model(family, cfg, params), tree.from_items((name, tensors[name]) for name in score)
    # Some folders keep the language head, which no score depends on.
    unread = {hf.hf_key(family, "lm_head")}
    params = hf_weights.read_leaves(root, family, sizes, unread=unread | set(score), device=device, keep=keep)
    tensors = hf_weights.read_tensors(root, score, unread=hf_weights.checked_keys(root), device=device)
    return Model(family, cfg, params), tree.from_items((name, tensors[name]) for name in score)


def save_adapter(
    path: str | Path,
    tree_: Params,
    head: Params,
    *,
    family: str,
    info: adapter.Info,
    whole: Params | None = None,
    carried: adapter.Carried | None = None,
) -> None:
    """Write an adapter folder that AutoPeftModelForSequenceClassification (or ...ForTokenClassification) loads, with `num_labels`.

    `tree_` is the LoRA tree, `whole` the leaves trained whole beside it. The base model may be a plain one or one with a head.
    PEFT takes no padding token from an adapter: for batches, set `config.pad_token_id` of the base.
    Raises ValueError for an adapter or whole weights on the language head, which no score depends on.
    """
    if "lm_head" in tree_ or "lm_head" in (whole or {}):
        raise ValueError("lm_head trains beside a scalar head, and no score depends on it: leave it out of the targets and whole modules")
    saved = adapter.Head(HEAD_KINDS[kind_of(head)][1], dict(tree.items(head)))
    # Not `tied`: that would only tell PEFT how to keep up a language head, which these models lack.
    adapter.save(path, tree_, family=family, info=info, whole=whole, carried=carried, head=saved)


def load_adapter(path: str | Path, model: Model, *, dtype: torch.dtype = torch.float32) -> tuple[Lora, Params, Params, adapter.Info]:
    """The adapter (no dropout), the leaves to lay over the model's, the head in float32, and what the folder's config says.

    Raises ValueError when the config names no classification task or the head is missing, and as `adapter.load` does.
    """
    root = Path(path).expanduser()
    if (kind_name := kind(root)) is None:
        expected = " or ".join(task for _, task in HEAD_KINDS.values())
        raise ValueError(f"{root} has task_type {adapter.task_of(root)!r}; expected {expected}, an adapter with a scalar head")
    names = [f"score.{part}" for part in ("weight", "bias")[: 2 if kind_name == "token" else 1]]
    low, whole, extra, info = adapter.load_with_tensors(root, model, names, dtype=dtype)
    if missing := [name for name in names if name not in extra]:
        raise ValueError(f"{root / adapter.WEIGHTS} lacks {adapter.PREFIX}{missing[0]}, the head of a {HEAD_KINDS[kind_name][1]} adapter")
    like = model.params["embed_tokens"]
    head = tree.from_items((name, extra[name].to(like.device, torch.float32)) for name in names)
    _check(head, model.cfg, str(root))
    return low, whole, head, info


def padding(tokenizer: Any, rows: int) -> Any:
    """A copy of a tokenizer with a padding token that ends no text; `rows` is the size of the model's vocabulary.

    transformers scores the last token that is not the padding token, so padding with the token that ends a text scores the
    one before it. Its own padding token is kept where it is neither the end-of-sequence token nor written by the chat template;
    else it is another special token, else a new one where the vocabulary has a spare row, else none.
    """
    tokenizer = copy.deepcopy(tokenizer)
    added = sorted(tokenizer.added_tokens_decoder.items())
    special = [token.content for _, token in added if token.special]
    candidates = [tokenizer.pad_token, *(text for text in special if "pad" in text.lower()), tokenizer.unk_token, *special]
    template = str(tokenizer.chat_template or "")
    taken = {None, tokenizer.eos_token, tokenizer.bos_token, *(text for text in special if text in template)}
    free = [text for text in candidates if text not in taken and tokenizer.convert_tokens_to_ids(text) < rows]
    if free or len(tokenizer) < rows:
        tokenizer.add_special_tokens({"pad_token": (*free, PAD)[0]})
    else:
        tokenizer.pad_token = None
    return tokenizer


def _check(head: Params, cfg: Config, source: str) -> int:
    """The number of classes. Raises ValueError unless the weight is [C, D] and the bias, if any, [C]."""
    weight, bias = head["score"]["weight"], head["score"].get("bias")
    classes = weight.shape[0]
    if weight.ndim != 2 or weight.shape[1] != cfg.hidden_size:
        raise ValueError(f"{source}: score.weight has shape {list(weight.shape)}; the model asks for [classes, {cfg.hidden_size}]")
    if bias is not None and tuple(bias.shape) != (classes,):
        raise ValueError(f"{source}: score.bias has shape {list(bias.shape)}; score.weight asks for [{classes}]")
    return classes


def _labelled(labels: Sequence[str] | None, kind_name: str, classes: int) -> dict:
    """The fields of a config.json that count and name the classes."""
    if labels is None:
        labels = LABELS[kind_name] if len(LABELS[kind_name]) == classes else [f"LABEL_{i}" for i in range(classes)]
    if len(labels) != classes or len(set(labels)) != classes:
        raise ValueError(f"labels are {list(labels)}; expected {classes} different names, one for each class of the head")
    return {
        "num_labels": classes,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def _classes(config: Fields) -> int:
    """Classes that a config.json implies, counted as transformers does: by name, else by number, else 2."""
    labels = fields.inner(config, "id2label", default=None, null=True)
    return len(labels.values) if labels and labels.values else fields.integer(config, "num_labels", default=2, least=1, null=True)
