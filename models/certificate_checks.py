"""What a certificate measures of a model: each check is a function of a subject to measures, largest differences that should be small.

T tokens of a stream, V vocabulary, S scored tokens. Documents are lists of token ids; A, B, C are the documents of a packed stream.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from treetune.core import grad, lora, strided, tree
from treetune.core.lora import Lora
from treetune.models import MODELS, Model, decode, decode_branches, decoder_attention, dense, hf, logprobs, plain_model

NEW_TOKENS = 8  # sampled after each prompt
RANK = 4  # of the adapter
# Of the largest leaf's gradient: a smaller one is compared with this. With the limit of 1e-4 that is a tenth of float32's rounding, in
# which some attention sums whatever the model computes in: the gradient of a key's bias, which cancels in the softmax, is nothing else.
FLOOR = 1e-4


class Subject(NamedTuple):
    """What is checked: a model, transformers' model of the same folder, and three documents of different lengths."""

    model: Model
    plain: Any
    documents: tuple[list[int], ...]


class Measure(NamedTuple):
    """A difference, the largest that passes (None: stated only), and what it was measured on."""

    name: str
    value: float
    limit: float | None
    note: str = ""


class Check(NamedTuple):
    """A function of a subject.

    doubled: whether what is over its limit in float32 is measured again in float64. gradients: whether it takes memory for them.
    """

    measure: Callable[[Subject], list[Measure]]
    doubled: bool = True
    gradients: bool = False


def pack(documents: Sequence[Sequence[int]], prompts: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The stream of bare documents in which every token after the first, or after the prompt of its document, is scored."""
    lens = torch.tensor([len(ids) for ids in documents])
    first = torch.tensor([1] * len(documents) if prompts is None else list(prompts))
    cu = F.pad(lens.cumsum(0), (1, 0))
    tokens = torch.tensor([token for ids in documents for token in ids])
    positions = torch.cat([torch.arange(size) for size in lens.tolist()])
    at = (positions >= first.repeat_interleave(lens)).nonzero()[:, 0] - 1
    return {"tokens": tokens, "positions": positions, "cu_docs": cu.int(), "at": at, "targets": tokens[at + 1]} | _sequences(lens - first)


def _sequences(scored: Tensor) -> dict[str, Tensor]:
    """The keys of sequences with these numbers of scored tokens, each a document of its own."""
    number = torch.arange(len(scored))
    return {"seq": number.repeat_interleave(scored), "seq_lens": scored, "doc_of_seq": number, "row": number}


def grow(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The token tree of a prompt with completions as its branches, which are scored."""
    lens, size = torch.tensor([len(ids) for ids in completions]), len(prompt)
    tokens = torch.tensor([*prompt, *(token for ids in completions for token in ids)])
    branch = torch.arange(len(completions) + 1).repeat_interleave(torch.cat([torch.tensor([size]), lens]))
    step = torch.cat([torch.arange(count) for count in lens.tolist()])  # of each branch token inside its branch
    rows = torch.arange(size, len(tokens))
    return {
        "tokens": tokens, "positions": torch.cat([torch.arange(size), size + step]), "branch": branch.int(),
        "start": torch.where(branch > 0, size, 0).int(), "cu_docs": torch.tensor([0, len(tokens)], dtype=torch.int32),
        "at": torch.where(step == 0, size - 1, rows - 1), "targets": tokens[rows],
    } | _sequences(lens) | {"doc_of_seq": torch.zeros(len(lens), dtype=torch.int64), "row": torch.zeros(1, dtype=torch.int64)}  # fmt: skip


def hidden(model: Model, batch: dict[str, Tensor], adapter: Lora | None = None) -> Tensor:
    """Hidden states [T, D] of a stream."""
    plan = decoder_attention.plan(batch, model.cfg)
    return MODELS[model.family].forward(model.params, batch, plan, model.cfg, lora=adapter).hidden


def logits(model: Model, batch: dict[str, Tensor], adapter: Lora | None = None) -> Tensor:
    """Logits [T, V] of a stream, in the dtype of the model."""
    family = MODELS[model.family]
    product = family.widen(hidden(model, batch, adapter), model.cfg, adapter) @ family.head(model.params, model.cfg, adapter).T
    return dense.map_logits(product, family.logit_map(model.cfg))


def token_logprobs(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Log-probs [S] of the scored tokens of a stream."""
    return logprobs(model.family, model.cfg, model.params, batch).logp


def gradients(model: Model, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss of the scored tokens and its gradient, by the keys and in the shapes of the files."""

    def loss(params: dict, stream: dict) -> tuple[Tensor, None]:
        return -logprobs(model.family, model.cfg, params, stream).logp.mean(), None

    (value, _), grads = grad.value_and_grad(loss)(model.params, batch)
    return value.item(), hf.described(model._replace(params=grads))[0]


def largest(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; nan where one is not a number."""
    return (one - other).abs().max().item()


@torch.no_grad()
def compare_logits(subject: Subject) -> list[Measure]:
    """Logits of each document."""
    pairs = [(logits(subject.model, pack([ids])), plain_model.logits(subject.plain, ids)) for ids in subject.documents]
    return [Measure("logits", max(largest(ours, theirs) for ours, theirs in pairs), 1e-4, "largest difference")]


def compare_gradients(subject: Subject) -> list[Measure]:
    """The loss of all documents, packed here, and its gradient in every leaf: |ours - theirs| / |theirs|."""
    expected, reference = plain_model.gradients(subject.plain, subject.documents)
    value, ours = gradients(subject.model, pack(subject.documents))
    errors, note = relative_errors(ours, reference)
    worst = max(errors, key=lambda key: errors[key])
    return [
        Measure("loss", abs(value - expected), 1e-5, f"{value:.4f} nats"),
        Measure("gradient", errors[worst], 1e-4, note or f"{len(errors)} leaves, the largest in {worst}"),
    ]


def relative_errors(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[dict[str, float], str]:
    """The relative error of each leaf, infinite for one that only one side has, and a note naming that."""
    smallest = FLOOR * max(leaf.norm().item() for leaf in reference.values())
    errors = {key: ((ours[key] - leaf).norm() / leaf.norm().clamp(min=smallest)).item() for key, leaf in reference.items() if key in ours}
    odd = [key for key in reference if key not in ours] + [key for key, leaf in ours.items() if key not in reference and leaf.any()]
    return errors | dict.fromkeys(odd, float("inf")), f"{odd[0]} has a gradient on one side only" if odd else ""


@torch.no_grad()
def isolate_documents(subject: Subject) -> list[Measure]:
    """How far the rows of B and C move when the tokens of A are others, those of A and B when C's are: not by a bit.

    Experts that transformers computes itself round by how many rows they get: in float64 that is nothing, and what leaks is as much.
    """
    a, b, c = subject.documents
    base = hidden(subject.model, pack([a, b, c]))
    first, last = hidden(subject.model, pack([_other(a, subject), b, c])), hidden(subject.model, pack([a, b, _other(c, subject)]))
    moved = max(largest(base[len(a) :], first[len(a) :]), largest(base[: -len(c)], last[: -len(c)]))
    limit = 1e-12 if subject.model.cfg.dtype == torch.float64 else 0.0
    return [Measure("packed, bit for bit", moved, limit, "hidden states of the other documents")]


@torch.no_grad()
def hide_later_tokens(subject: Subject) -> list[Measure]:
    """How far the first half of a document moves when its second half is another."""
    ids = max(subject.documents, key=len)
    half = len(ids) // 2
    base, changed = (hidden(subject.model, pack([part])) for part in (ids, ids[:half] + _other(ids[half:], subject)))
    return [Measure("later tokens unseen", largest(base[:half], changed[:half]), 1e-5, "hidden states of the tokens before")]


def _other(ids: list[int], subject: Subject) -> list[int]:
    """As many tokens, each another that the documents have."""
    words = sorted({token for document in subject.documents for token in document})
    return [words[(words.index(token) + 1) % len(words)] for token in ids]


@torch.no_grad()
def compare_packed(subject: Subject) -> list[Measure]:
    """Log-probs of the documents in one stream and of each alone."""
    packed = token_logprobs(subject.model, pack(subject.documents))
    alone = torch.cat([token_logprobs(subject.model, pack([ids])) for ids in subject.documents])
    return [Measure("packed, as alone", largest(packed, alone), 1e-5, "log-probs")]


def compare_shared_prompt(subject: Subject) -> list[Measure]:
    """Log-probs of completions as branches of one prompt and behind copies of it, and the gradient of both."""
    prompt, *completions = subject.documents
    shared = grow(prompt, completions)
    copied = pack([prompt + ids for ids in completions], [len(prompt)] * len(completions))
    with torch.no_grad():
        difference = largest(token_logprobs(subject.model, shared), token_logprobs(subject.model, copied))
    (_, ours), (_, reference) = gradients(subject.model, shared), gradients(subject.model, copied)
    errors, note = relative_errors(ours, reference)
    return [
        Measure("shared prompt, as copied", difference, 1e-5, "log-probs of 2 branches"),
        Measure("shared prompt, gradient", max(errors.values()), 1e-4, note or f"{len(errors)} leaves"),
    ]


@torch.no_grad()
def compare_decoding(subject: Subject) -> list[Measure]:
    """Log-probs of sampled tokens with a cache and in a forward pass over the whole text: of completions, and of branches of documents."""
    model, prompts = subject.model, list(subject.documents[:2])
    samples = decode.sample(model, prompts, n=2, max_new_tokens=NEW_TOKENS, seed=0)
    begins = [ids for ids in prompts for _ in range(2)]
    steps = [_replayed(model, begins, samples)]
    ends = torch.tensor([len(ids) // 2 for ids in prompts])
    anchors = strided.Anchors(torch.arange(2), ends, NEW_TOKENS)
    samples = decode_branches.branches(model, pack(prompts), anchors, 2, seed=0)
    begins = [ids[:end] for ids, end in zip(prompts, ends.tolist(), strict=True) for _ in range(2)]
    steps.append(_replayed(model, begins, samples))
    names = ("cached decoding, as forward", "cached branches, as forward")
    return [Measure(name, value, 5e-5, f"log-probs of 4 times {NEW_TOKENS} tokens") for name, value in zip(names, steps, strict=True)]


def _replayed(model: Model, begins: list[list[int]], samples: decode.Samples) -> float:
    """The largest difference of the samples' log-probs from those of a forward pass over each beginning with its tokens."""
    tails = [tokens[:size].tolist() for tokens, size in zip(samples.tokens, samples.lens.tolist(), strict=True)]
    batch = pack([ids + tail for ids, tail in zip(begins, tails, strict=True)], [len(ids) for ids in begins])
    taken = torch.arange(samples.tokens.shape[1]) < samples.lens[:, None]
    return largest(token_logprobs(model, batch), samples.logp[taken])


@torch.no_grad()
def compare_adapter(subject: Subject) -> list[Measure]:
    """Logits of the model with a random adapter on all linear layers, and of the model with it folded in."""
    model, batch = subject.model, pack(subject.documents)
    sizes = hf.abstract_of(model)
    targets = lora.match(sizes, "all-linear")
    pairs = lora.init(sizes, targets, rank=RANK, seed=0, dtype=model.cfg.dtype)
    generator = torch.Generator().manual_seed(0)
    moved = tree.map(lambda leaf: leaf + 0.05 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype), pairs)
    adapter = Lora(moved, lora.scale(rank=RANK, alpha=2.0 * RANK))
    merged = model._replace(params=lora.merge(model.params, adapter.tree, adapter.scale))
    adapted = logits(model, batch, adapter)
    names = sorted({name.rpartition(".")[2] for name in targets})
    note = f"logits, which it moves by {largest(adapted, logits(model, batch)):.2g}"
    return [
        Measure("adapter, as merged", largest(adapted, logits(merged, batch)), 1e-4, note),
        Measure("adapter targets", len(targets), None, ", ".join(names)),
    ]


@torch.no_grad()
def state_loss(subject: Subject) -> list[Measure]:
    """The loss beside what a model of random weights would have."""
    value = -token_logprobs(subject.model, pack(subject.documents)).mean().item()
    chance = torch.tensor(float(subject.model.cfg.vocab_size)).log().item()
    note = "of a trained model" if value < min(6.0, chance - 1) else "not below 6, as that of a trained model is on text"
    return [Measure("initial loss", value, None, f"nats, {note}; chance is {chance:.2f}")]


CHECKS = (
    Check(compare_logits),
    Check(compare_gradients, gradients=True),
    Check(hide_later_tokens),
    Check(isolate_documents),
    Check(compare_packed),
    Check(compare_shared_prompt, gradients=True),
    Check(compare_decoding, doubled=False),
    Check(compare_adapter),
    Check(state_loss, doubled=False),
)
