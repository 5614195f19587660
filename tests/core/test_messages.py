"""Messages of several tensors between ranks that this process plays one after another."""

import pytest
import torch

from treetune.core import messages

SHAPES = ((5, 3), (1, 2), (8,), (2, 3, 2), (4, 1))


class Board:
    """A group of ranks: what each sends lies here, and is dealt out when all are waited for."""

    def __init__(self, ranks):
        self.ranks, self.rank, self.sent = ranks, 0, []


class Work:
    def __init__(self, deal):
        self.wait = deal


@pytest.fixture(autouse=True)
def local(monkeypatch):
    def gather(whole, part, board):
        board.sent.append(part)
        return Work(lambda: whole.copy_(torch.cat(board.sent)))

    def scatter(part, whole, board):
        rank = board.rank
        board.sent.append(whole)
        return Work(lambda: part.copy_(torch.stack(board.sent).sum(0).view(board.ranks, -1)[rank]))

    monkeypatch.setattr(messages, "_all_gather", gather)
    monkeypatch.setattr(messages, "_reduce_scatter", scatter)
    monkeypatch.setattr(messages.dist, "get_rank", lambda board: board.rank)


def numbers(dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=gen).mul(50).to(dtype) for shape in SHAPES]


def chunks(tensor, ranks):
    """The parts of a tensor; `torch.chunk` gives none to ranks that have no rows."""
    parts = list(tensor.chunk(ranks))
    return parts + [tensor[:0]] * (ranks - len(parts))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_parts_become_the_tensors_that_they_are_of(ranks):
    """Of several dtypes in one message: a cast happens before it, and integers are what they were."""
    given = numbers(torch.float32, 0) + numbers(torch.int64, 1)
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float64, torch.float32] + [torch.int64] * 5
    plan = messages.layout(tuple((dtype, tuple(t.shape)) for dtype, t in zip(dtypes, given, strict=True)), ranks)
    board = Board(ranks)
    sent = [messages.Gather([chunks(tensor, ranks)[rank] for tensor in given], plan, board) for rank in range(ranks)]
    assert all(part.dtype == torch.uint8 and part.numel() == plan.size for part in board.sent)
    for message in sent:
        for whole, tensor, dtype in zip(message.wait(), given, dtypes, strict=True):
            assert torch.equal(whole, tensor.to(dtype)) and whole.dtype == dtype and whole.is_contiguous()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_rank_has_its_rows_of_a_sum(ranks, dtype):
    """Gradients in 16 bits are widened before they are summed; one that is missing counts as zeros."""
    given = [numbers(torch.bfloat16, rank) for rank in range(ranks)]
    given[0][2] = None
    plan = messages.layout(tuple((dtype, shape) for shape in SHAPES), ranks)
    board, sent = Board(ranks), []
    for board.rank in range(ranks):
        sent.append(messages.Sum(given[board.rank], plan, board, torch.device("cpu")))
    for rank, message in enumerate(sent):
        for place, part in enumerate(message.wait()):
            exact = sum(tensors[place].to(dtype) for tensors in given if tensors[place] is not None)
            want = chunks(exact, ranks)[rank] if torch.is_tensor(exact) else torch.zeros(SHAPES[place])[: part.shape[0]]
            assert part.dtype == dtype and torch.equal(part, want.to(dtype))


@pytest.mark.parametrize("missing", [False, True])
def test_sums_of_parts_that_fill_a_message_hold_nothing_else(missing, monkeypatch):
    """Memory that is not filled may hold anything."""
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: torch.full(shape, torch.nan, **kw))
    plan = messages.layout(((torch.float32, (4, 4)), (torch.float32, (2, 4))), 2)
    board, given = Board(2), [torch.ones(4, 4), None if missing else torch.ones(2, 4)]
    sent = [messages.Sum(given, plan, board, torch.device("cpu")) for board.rank in range(2)]
    for message in sent:
        first, second = message.wait()
        assert torch.equal(first, torch.full((2, 4), 2.0)) and torch.equal(second, torch.full((1, 4), 0.0 if missing else 2.0))


def test_each_tensor_begins_on_sixteen_bytes():
    plan = messages.layout(((torch.bfloat16, (3, 3)), (torch.uint8, (5,)), (torch.float32, (2, 4))), 2)
    assert [slot.first for slot in plan.slots] == [0, 16, 32] and plan.size == 48
    assert [slot.rows for slot in plan.slots] == [2, 3, 1]
