"""What training leaves behind for treetune, transformers, PEFT and vLLM to load: a model or an adapter folder, with a head if any."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treetune.core import check, quant, shard, tree
from treetune.core import lora as lora_trees
from treetune.core.lora import Lora
from treetune.core.param import Params
from treetune.core.run.errors import RunFailed
from treetune.models import Model, adapter, families, heads, hf, model_files
from treetune.models.adapter import Carried, Info
from treetune.models.model_files import Late


def save_model(
    path: str | Path | None,
    model: Model,
    *,
    lora: Lora | None = None,
    head: Params | None = None,
    tokenizer: Any = None,
    generation: dict[str, Any] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model folder in the dtype that the model computes in, with the dense numbers of leaves that are quantised.

    Leaves are gathered, merged with those of an adapter and written one after another. Where ranks have parts of them all ranks call
    this, and those without a path write nothing. generation, beside: its generation_config.json and the files of its processor, if it
    has no head. Raises RunFailed for weights that are not finite in that dtype.
    """
    late = merged_late(model, lora, path)
    if path is None:
        model_files.follow(late, tied=model_files.tied(late))
    elif head is not None:
        heads.save(path, late, head, tokenizer=tokenizer)
    else:
        hf.save(path, late, tokenizer=tokenizer, generation=generation, beside=beside)


def merged_late(model: Model, lora: Lora | None, path: str | Path | None) -> Model:
    """The model with leaves that are made, merged with an adapter, as files hold them; errors of one that is not finite name `path`."""
    adapted = {} if lora is None else lora_trees.pairs(lora.tree)
    leaves, wide = dict(tree.items(model.params)), families.wide(model)
    if "lm_head" not in leaves and {"lm_head", "embed_tokens"} & adapted.keys():
        leaves["lm_head"] = leaves["embed_tokens"]  # the two then differ

    def one(name: str, leaf: Any) -> Late:
        merged = lora is not None and name in adapted
        dense = merged or not quant.quantised(leaf)
        dtype = wide.get(name, model.cfg.dtype) if dense and leaf.is_floating_point() else leaf.dtype
        make = partial(lora_trees.merged, name, leaf, lora.tree, lora.scale) if lora is not None and merged else lambda: leaf
        return Late(tuple(leaf.shape), dtype, partial(_finite, name, make, (leaf.dtype, dtype), path))

    return model._replace(params=tree.from_items((name, one(name, leaf)) for name, leaf in leaves.items()))


@torch.no_grad()
def _finite(name: str, make: Callable[[], Any], dtypes: tuple[torch.dtype, torch.dtype], path: str | Path | None) -> Tensor:
    """A whole leaf, rounded to its own dtype and then to that of the files."""
    whole = make()
    if not quant.quantised(whole) and whole.dtype != dtypes[0]:
        whole = whole.to(dtypes[0])
    saved = shard.whole(whole, dtypes[1]).detach()
    # float32 reaches further than bfloat16 rounds to. Every rank has the leaf, and fails where one does.
    if not check.finite({name: saved}):
        text = f"{name} is not finite in {str(dtypes[1]).removeprefix('torch.')}: {path or 'the model'} was not saved"
        raise RunFailed(f"{text}; lower learning_rate, or compute in float32")
    return saved


def save_adapter(path: str | Path, params: Params, *, family: str, info: Info, tied: bool, carried: Carried | None = None) -> None:
    """Write an adapter folder of what trained: {"lora", "model"?, "head"?}, where "model" holds the leaves trained whole."""
    if "head" in params:
        heads.save_adapter(path, params["lora"], params["head"], family=family, info=info, whole=params.get("model"), carried=carried)
    else:
        adapter.save(path, params["lora"], family=family, info=info, whole=params.get("model"), tied=tied, carried=carried)
