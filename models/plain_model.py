"""transformers' own model of a folder, one document at a time and without a cache: what certificates compare ours with.

T tokens of a document, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def load(path: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder with eager attention, on the CPU. Code of the folder is never run."""
    from transformers import AutoConfig

    kind = auto_class(AutoConfig.from_pretrained(path, trust_remote_code=False))
    with without_bars():
        plain = kind.from_pretrained(path, dtype=dtype, attn_implementation="eager", trust_remote_code=False).eval()
        # Quantised weights take no gradient, and some of their kernels round what meets them.
        return plain.dequantize().to(dtype) if getattr(plain, "is_quantized", False) else plain


def knows(kind: str) -> bool:
    """Whether transformers has a model of this `model_type` that reads and writes text."""
    return any(kind in names for names in _classes())


def auto_class(config: Any) -> Any:
    """The Auto class of a config: that of causal language models, or of those of text and other media where only it has the model type, or
    where the config names its class, so that a model keeps the parts that text does not use.
    """
    import transformers

    causal, media = (_listed(names.get(config.model_type)) for names in _classes())
    named = next(iter(config.architectures or ()), "")
    if causal and (named in causal or named not in media):
        return transformers.AutoModelForCausalLM
    return getattr(transformers, "AutoModelForMultimodalLM", transformers.AutoModelForImageTextToText)


def _classes() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """{model_type: names of classes} of causal language models, and of models of text and other media."""
    from transformers.models.auto import modeling_auto

    media = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, media


def _listed(names: Any) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Context in which transformers shows no progress."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Context in which transformers writes errors only."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def logits(plain: Any, ids: Sequence[int]) -> Tensor:
    """[T, V] of one document."""
    return plain(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def loss(plain: Any, documents: Sequence[Sequence[int]]) -> Tensor:
    """Mean over all tokens but the first of each document of -log p, in nats."""
    parts = [F.cross_entropy(logits(plain, ids)[:-1], torch.tensor(ids[1:]), reduction="sum") for ids in documents]
    return torch.stack(parts).sum() / sum(len(ids) - 1 for ids in documents)


def gradients(plain: Any, documents: Sequence[Sequence[int]]) -> tuple[float, dict[str, Tensor]]:
    """The loss and its gradient by the keys and in the shapes of the files, without leaves that the loss does not use."""
    from transformers.core_model_loading import revert_weight_conversion

    plain.zero_grad(set_to_none=True)
    value = loss(plain, documents)
    value.backward()
    # A head that is the embedding goes by the name of that, though some models name the head first.
    embedding = plain.get_input_embeddings()
    shared = {
        name for name, module in plain.named_modules() if getattr(module, "weight", None) is embedding.weight and module is not embedding
    }
    named = [(name, leaf) for name, leaf in plain.named_parameters(remove_duplicate=False) if name.removesuffix(".weight") not in shared]
    grads = {name: leaf.grad for name, leaf in {id(leaf): (name, leaf) for name, leaf in reversed(named)}.values() if leaf.grad is not None}
    # A family may keep in one leaf what its files hold in many, such as experts: the conversion is linear, so gradients take it too.
    return value.item(), revert_weight_conversion(plain, grads)
