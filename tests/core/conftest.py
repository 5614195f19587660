"""A tiny llama, ragged documents in any split, and the supervised step over them."""

import contextlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import pytest
import torch

VOCAB = 53


class Document(NamedTuple):
    """Token ids, a weight per token (0: not scored), and the number of the data set row."""

    tokens: list[int]
    weight: list[float]
    row: int


def make_documents(*, weighted: bool = False) -> list[Document]:
    """Eight ragged documents: scored suffixes and gaps, one that scores a single token, one that scores none."""
    gen = torch.Generator().manual_seed(11)
    out = []
    for row, size in enumerate((17, 3, 29, 8, 2, 21, 5, 12)):
        weight = (torch.rand(size, generator=gen) < 0.6).float()
        weight *= torch.rand(size, generator=gen) if weighted else 1.0
        weight[0] = 0.0
        weight = weight * (row != 3)
        out.append(Document(torch.randint(0, VOCAB, (size,), generator=gen).tolist(), weight.tolist(), row))
    return out


def make_batch(documents: list[Document]) -> dict[str, torch.Tensor]:
    """The packed stream of some documents, written out token by token; no documents give one unread token."""
    tokens, positions, bounds, at, targets, seq, weights = [], [], [0], [], [], [], []
    for number, doc in enumerate(documents):
        for i, (token, weight) in enumerate(zip(doc.tokens, doc.weight, strict=True)):
            if weight:
                at.append(len(tokens) - 1)
                targets.append(token)
                seq.append(number)
                weights.append(weight)
            tokens.append(token)
            positions.append(i)
        bounds.append(len(tokens))
    if not documents:
        tokens, positions, bounds = [0], [0], [0, 1]
    ints = dict(tokens=tokens, positions=positions, at=at, targets=targets, seq=seq, row=[doc.row for doc in documents])
    batch = {key: torch.tensor(value, dtype=torch.int64) for key, value in ints.items()}
    batch["cu_docs"] = torch.tensor(bounds, dtype=torch.int32)
    batch["seq_lens"] = torch.bincount(batch["seq"], minlength=len(documents))
    batch["doc_of_seq"] = torch.arange(len(documents))
    weight = torch.tensor(weights, dtype=torch.float32)
    return batch | ({"weight": weight} if bool((weight != 1).any()) else {})


def make_config(dtype: torch.dtype = torch.float32, **changes):
    from treetune.models import llama

    sizes = dict(vocab_size=VOCAB, hidden_size=24, mlp_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, tied=True)
    return llama.Config(**(sizes | dict(init_std=0.3, dtype=dtype) | changes))


@pytest.fixture(scope="session")
def documents():
    return make_documents


@pytest.fixture(scope="session")
def batch():
    return make_batch


@pytest.fixture(scope="session")
def model():
    """model(dtype, **changes of the config) -> Model whose norms are not 1 and whose weights are not small."""
    from treetune.core import param, tree
    from treetune.models import Model, llama

    def make(dtype=torch.float32, **changes):
        cfg = make_config(dtype, **changes)
        params = param.init(llama.abstract(cfg, dtype=torch.float32), seed=5)
        gen = torch.Generator().manual_seed(6)
        params = tree.map(lambda leaf: leaf if leaf.ndim > 1 else leaf + 0.3 * torch.randn(leaf.shape, generator=gen), params)
        return Model("llama", cfg, tree.map(lambda leaf: leaf.to(dtype), params))

    return make


@pytest.fixture(scope="session")
def adapter():
    """adapter(model, rank=..., scale=..., dropout=...) -> Lora on all linear layers, its B not zero."""
    from treetune.core import lora, tree

    def make(model, *, rank=3, scale=0.7, dropout=0.0, targets="all-linear"):
        from treetune.models import hf

        sizes = hf.abstract_of(model, head=True)
        found = lora.init(sizes, lora.match(sizes, targets), rank=rank, seed=9, dtype=model.cfg.dtype)
        gen = torch.Generator().manual_seed(8)
        return lora.Lora(tree.map(lambda leaf: leaf + 0.2 * torch.randn(leaf.shape, generator=gen).to(leaf.dtype), found), scale, dropout)

    return make


@pytest.fixture(scope="session")
def objective():
    """objective(model, lora=None) -> the supervised objective that `treetune sft` trains."""
    from treetune.losses import sft_objective
    from treetune.models import policy
    from treetune.models.policy import Policy

    def make(model, lora=None, remat=None, **loss):
        sizes = Policy(model.family, model.cfg, {}, {}, lora)
        return sft_objective.named(policy.logprob(sizes, remat=remat), loss.pop("loss", "nll"), **loss)

    return make


@pytest.fixture(scope="session")
def start():
    """start(params, frozen, optimizer) -> a TrainState at step 0, its leaves cloned."""
    from treetune.core import tree
    from treetune.core.state import TrainState

    def make(params, frozen, optimizer):
        params = tree.map(torch.clone, params)
        return TrainState(params, frozen, optimizer.init(params), {}, torch.tensor(0))

    return make


@pytest.fixture(scope="session")
def splits():
    """The eight documents in micro-batches of 1, 2, 4 and 8."""
    return lambda docs: {f"{8 // n}x{n}": [make_batch(docs[i : i + n]) for i in range(0, 8, n)] for n in (1, 2, 4, 8)}


@pytest.fixture(scope="session")
def pool():
    """Two worker processes for tests of any file: each of them imports torch when it starts."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def shared_pool(pool, monkeypatch):
    """`workers.encode_rows` finds its processes running."""
    from treetune.core.data import workers

    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *_, **__: contextlib.nullcontext(pool))
