"""What training leaves behind for treetune, transformers, PEFT and vLLM to load: a model or an adapter folder, with a head if any."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treetune.core import check
from treetune.core.param import Params
from treetune.core.run.errors import RunFailed
from treetune.models import Model, adapter, families, heads, hf, quantised
from treetune.models.adapter import Carried, Info


def save_model(
    path: str | Path,
    model: Model,
    *,
    head: Params | None = None,
    tokenizer: Any = None,
    generation: dict[str, Any] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model folder in the dtype that the model computes in, with the dense numbers of leaves that are quantised.

    generation, beside: its generation_config.json and the files of its processor, if it has no head.
    Raises RunFailed for weights that are not finite in that dtype.
    """
    dtype = model.cfg.dtype
    # float32 reaches further than bfloat16 rounds to.
    saved = quantised.dense(model._replace(params=families.whole(model)))
    if not check.finite(saved.params):
        bad, name = check.not_finite(saved.params)[0], str(dtype).removeprefix("torch.")
        raise RunFailed(f"{bad} is not finite in {name}: {path} was not saved; lower learning_rate, or compute in float32")
    if head is not None:
        heads.save(path, saved, head, tokenizer=tokenizer)
    else:
        hf.save(path, saved, tokenizer=tokenizer, generation=generation, beside=beside)


def save_adapter(path: str | Path, params: Params, *, family: str, info: Info, tied: bool, carried: Carried | None = None) -> None:
    """Write an adapter folder of what trained: {"lora", "model"?, "head"?}, where "model" holds the leaves trained whole."""
    if "head" in params:
        heads.save_adapter(path, params["lora"], params["head"], family=family, info=info, whole=params.get("model"), carried=carried)
    else:
        adapter.save(path, params["lora"], family=family, info=info, whole=params.get("model"), tied=tied, carried=carried)
