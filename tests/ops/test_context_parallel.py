"""Streams that ranks share: the parts of all ranks are the stream, and each part sees what its tokens see."""

import pytest
import torch

from treetune.ops import attention, attention_mask, attention_torch, context_parallel
from treetune.ops.attention_torch import Weighting
from treetune.ops.context_parallel import Part
from treetune.ops.tensor_parallel import Split


@pytest.mark.parametrize(("tokens", "ranks"), [(8, 2), (9, 2), (1, 3), (5, 4), (7, 1), (64, 4)])
def test_parts_cover_the_stream_once_and_are_equally_long(tokens, ranks):
    parts = [Part(Split(None, rank, ranks), tokens) for rank in range(ranks)]
    x = torch.arange(tokens)
    own = [context_parallel.own(part, x) for part in parts]
    assert {len(one) for one in own} == {2 * -(-tokens // (2 * ranks))}
    counted = torch.cat([one[counts(part)] for one, part in zip(own, parts, strict=True)])
    assert torch.equal(counted.sort().values, x)
    assert all((one[~counts(part)] == tokens - 1).all() for one, part in zip(own, parts, strict=True))
    pairs = [int((one[counts(part)] + 1).sum()) for one, part in zip(own, parts, strict=True)]  # of a query and a key
    assert max(pairs) == min(pairs) or tokens % (2 * ranks), "chunks of the start and of the end see as much together on each rank"


def counts(part: Part) -> torch.Tensor:
    """Which rows of a part no other rank has."""
    return torch.cat([torch.arange(part.chunk) < end - first for first, end in part.spans])


@pytest.mark.parametrize(("tokens", "ranks"), [(8, 2), (9, 2), (1, 3), (5, 4)])
def test_parts_are_joined_in_order_and_gradients_go_back_to_their_rows(monkeypatch, tokens, ranks):
    parts, x = [Part(Split(None, rank, ranks), tokens) for rank in range(ranks)], torch.randn(tokens, 3)
    sent = []

    def gathered(whole, own, group):
        whole.copy_(torch.cat([context_parallel.own(part, x) for part in parts]))

    def scattered(rows, whole, group):
        sent.append(whole)
        rows.copy_(whole.view(ranks, *rows.shape)[len(sent) - 1])

    monkeypatch.setattr(context_parallel, "_all_gather", gathered)
    monkeypatch.setattr(context_parallel, "_reduce_scatter", scattered)
    for part in parts:
        own = context_parallel.own(part, x).requires_grad_()
        (whole,) = context_parallel.joined(part, own)
        assert torch.equal(whole, x)
        (grad,) = torch.autograd.grad((whole * torch.arange(1.0, tokens + 1)[:, None]).sum(), own)
        assert torch.equal(grad[counts(part)][:, 0], part.places()[counts(part)] + 1.0) and not grad[~counts(part)].any()


@pytest.mark.parametrize(("count", "ranks"), [(5, 2), (4, 2), (1, 3), (0, 2)])
def test_rows_that_ranks_made_in_turn_are_all_there_in_order(monkeypatch, count, ranks):
    wanted, sent = torch.arange(count * 2).view(count, 2) + 1, []

    def gathered(whole, own, group):
        sent.append(own)
        whole.copy_(torch.cat([own * 0 if len(sent) <= rank else sent[rank] for rank in range(ranks)]))

    monkeypatch.setattr(context_parallel, "_all_gather", gathered)
    results = [context_parallel.dealt(Split(None, rank, ranks), wanted[rank::ranks], count) for rank in range(ranks)]
    assert torch.equal(results[-1], wanted) and {one.shape for one in sent} == {(-(-count // ranks), 2)}


def stream(branches: bool) -> dict[str, torch.Tensor]:
    """Documents of 11, 1 and 7 tokens; with branches the first has two behind a trunk of 5, of which they see 5 and 3."""
    batch = {"cu_docs": torch.tensor([0, 11, 12, 19], dtype=torch.int32), "tokens": torch.zeros(19, dtype=torch.int64)}
    if not branches:
        return batch
    branch = torch.tensor([0] * 5 + [1] * 3 + [2] * 3 + [0] * 8)
    start = torch.tensor([0] * 5 + [5] * 3 + [3] * 3 + [0] * 8)
    positions = torch.tensor([*range(5), 5, 6, 7, 3, 4, 5, 0, *range(7)])
    return batch | {"branch": branch, "start": start, "positions": positions}


@pytest.mark.parametrize("ranks", [2, 3, 25])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_part_attends_as_its_tokens_do_in_the_whole_stream(ranks, window, branches, softcap):
    batch, gen = stream(branches), torch.Generator().manual_seed(0)
    q = torch.randn(19, 4, 8, generator=gen)
    k, v = torch.randn(2, 19, 2, 8, generator=gen).unbind()
    for x in (q, k, v):
        x.requires_grad_()
    sinks = None if softcap is None else torch.tensor([0.1, -0.2, 0.3, 0.4])
    options = {"softcap": softcap, "sinks": sinks}
    whole = attention.attention_ref(q, k, v, batch, window=window, **options)
    wanted = torch.autograd.grad(whole.square().sum(), (q, k, v))
    parts, total = [], torch.zeros(())
    for rank in range(ranks):
        plan = attention.plan(batch, windows=(window,), plain=softcap is None, split=Split(None, rank, ranks))
        assert plan.part is not None
        rows = plan.part.places()
        own = attention.attention_of_part(q[rows], k, v, plan, Weighting(8**-0.5, softcap, sinks))
        assert own.shape[0] == plan.part.rows and own.isfinite().all()
        parts.append(own[counts(plan.part)])
        torch.testing.assert_close(parts[-1], whole[rows[counts(plan.part)]])
        total = total + parts[-1].square().sum()
        seen = attention_mask.allowed(batch, rows[:, None], torch.arange(19)[None], plan.patterns[0].window)
        assert attention_torch.pairs_of(plan.patterns[0].pieces) == seen.sum()
        with pytest.raises(ValueError, match="of one of several ranks: call attention_of_part"):
            attention.attention(q, k, v, plan, **options)
        with pytest.raises(ValueError, match="attention of a part got q"):
            attention.attention_of_part(q[rows], k[1:], v[1:], plan, Weighting(8**-0.5, softcap, sinks))
    assert sum(len(part) for part in parts) == 19
    for mine, theirs in zip(torch.autograd.grad(total, (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
