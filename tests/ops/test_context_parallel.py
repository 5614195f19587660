"""Streams that ranks share: the parts of all ranks are the stream, and each part sees what its tokens see."""

import pytest
import torch

from treetune.ops import attention, context_parallel
from treetune.ops.attention_torch import Weighting
from treetune.ops.context_parallel import Part
from treetune.ops.tensor_parallel import Split


@pytest.mark.parametrize(("tokens", "ranks"), [(8, 2), (9, 2), (1, 3), (5, 4), (7, 1)])
def test_parts_cover_the_stream_once_and_are_equally_long(tokens, ranks):
    parts = [Part(Split(None, rank, ranks), tokens) for rank in range(ranks)]
    x = torch.arange(tokens)
    own = [context_parallel.own(part, x) for part in parts]
    assert {len(one) for one in own} == {-(-tokens // ranks)}
    assert torch.equal(torch.cat([one[: part.count] for one, part in zip(own, parts, strict=True)]), x)
    assert torch.equal(torch.cat(own)[:tokens], x)


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
        rows = torch.arange(plan.part.first, plan.part.first + plan.part.rows).clamp(max=18)
        own = attention.attention_of_part(q[rows], k, v, plan, Weighting(8**-0.5, softcap, sinks))
        assert own.shape[0] == plan.part.rows and own.isfinite().all()
        parts.append(own[: plan.part.count])
        total = total + parts[-1].square().sum()
        assert torch.equal(
            attention.attention(q, k, v, plan, **options),
            attention.attention(q, k, v, attention.plan(batch, windows=(window,), plain=softcap is None), **options),
        ), "a plan with a part still has the whole stream"
    torch.testing.assert_close(torch.cat(parts), whole)
    for mine, theirs in zip(torch.autograd.grad(total, (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
