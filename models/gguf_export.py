"""A model, with the adapter on it folded in, as a GGUF file that is read back and compared before it is kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treetune.core.lora import Lora
from treetune.models import Model, artifacts, families, gguf, gguf_tokenizer, gguf_writer, merging
from treetune.models.merging import Difference

# Mean KL (nats) of the probe's next tokens that rounding to a type may cause.
LARGEST_KL: Mapping[str, float] = {"f32": 1e-6, "f16": 1e-4, "bf16": 1e-2, "q8_0": 2e-2}


class Written(NamedTuple):
    """How logits of a file differ from those of its model on tokens of probes; its bytes, and the texts its tokenizer was tried on."""

    difference: Difference
    tokens: int
    bytes: int
    texts: int


class Source(NamedTuple):
    """What is written: a model, the adapter on it, its tokenizer, how errors name it, and the id that ends an answer, if known."""

    model: Model
    lora: Lora | None
    tokenizer: Any
    name: str
    end_of_turn: int | None = None


@torch.no_grad()
def write(path: Path, source: Source, kind: str, texts: Sequence[str] = (), *, max_kl: float | None = None) -> Written:
    """Write the file and compare it with what it was made of, on the probe of `merging` and on these texts.

    max_kl: instead of that of LARGEST_KL.
    Errors: ValueError for a model or tokenizer that is not written, and where the file's logits or tokenizer differ by more than allowed.
    """
    model, lora, tokenizer, name, end = source
    bound = LARGEST_KL[kind] if max_kl is None else max_kl
    keys = gguf_tokenizer.keys(tokenizer, model.cfg.vocab_size, name, end_of_turn=end)
    documents = _probes(tokenizer, model, texts)
    wanted = _logits(model, lora, documents)
    gguf_writer.write(path, artifacts.merged_late(model, lora, path.name), kind, keys, name=path.stem)
    tried = gguf_tokenizer.check_same(tokenizer, gguf.tokenizer(path), name)
    difference = merging.compare(wanted, _logits(gguf.load(path), None, documents))
    if not difference.kl <= bound:
        raise ValueError(
            f"the file's logits are off by a mean KL of {difference.kl:.3g} nats, more than max_kl {bound:g}: not kept; "
            "take a type of more bits, or raise the bound"
        )
    return Written(difference, len(wanted), path.stat().st_size, tried)


def _probes(tokenizer: Any, model: Model, texts: Sequence[str]) -> list[Tensor]:
    """Token ids of the probe documents."""
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"][: model.cfg.max_positions] for text in texts]
    return [merging.probe_ids(tokenizer, model.cfg), *(torch.tensor(ids) for ids in documents if ids)]


def describe(written: Written) -> str:
    """What was written, and how far it is from the model, in a line."""
    largest, mean, kl = written.difference
    apart = f"mean KL {kl:.2e} nats, largest logit difference {largest:.2e}, mean {mean:.2e}"
    size, texts = f"{written.bytes / 2**20:.1f} MiB", f"tokenizer the same on {written.texts} texts"
    return f"read back ({size}): probe of {written.tokens} tokens: {apart}; {texts}"


def _logits(model: Model, lora: Lora | None, documents: list[Tensor]) -> Tensor:
    """Logits [T, V] of all documents."""
    return torch.cat([families.document_logits(model, ids, lora=lora) for ids in documents])
