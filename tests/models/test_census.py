"""A computation that is counted: FLOPs, bytes, launches, and the memory that is there at once."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from treetune.models import census
from treetune.ops import attention, attention_torch, backend, rms_norm


def counted(run, *known, gpu=False):
    seen = census.Census(known)
    with seen, backend.counting(seen.told, gpu=gpu):
        run()
    return seen


def test_a_product_reads_its_inputs_and_writes_its_result():
    x, w = torch.ones(3, 5), torch.ones(5, 7)
    assert counted(lambda: x @ w).by == {"mm": census.Cost(2 * 3 * 5 * 7, 4 * (15 + 35 + 21), 1)}


def test_views_and_new_memory_cost_nothing_and_rows_that_are_looked_up_what_comes_out():
    x, at = torch.ones(100, 8), torch.tensor([3, 4])
    assert counted(lambda: (x.t()[2:], torch.empty(9), x.view(8, 100))).by == {}
    assert counted(lambda: x[at]).by["index"].bytes == 2 * 4 * 16


@pytest.mark.parametrize("backward", [False, True])
def test_a_causal_attention_counts_the_pairs_that_see_each_other(backward):
    n, heads, width = 12, 3, 16
    q, k, v = (torch.ones(1, heads, n, width, requires_grad=backward) for _ in range(3))

    def run():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if backward:
            out.sum().backward()

    pairs = heads * n * (n + 1) / 2
    assert counted(run).total.flops == 2 * pairs * width * (2 + 5 * backward)


def test_memory_is_that_of_what_is_there_at_once():
    known = torch.ones(1000)

    def run():
        first = torch.ones(500)
        second = first + 1
        del first
        return second * 2 + torch.ones(10)[0]

    seen = counted(run, known)
    assert seen.live.peak == 4 * (1000 + 3 * 500) + 4 * 10
    assert seen.live.held == 4000


def test_as_a_gpu_would_an_op_is_one_kernel_that_is_told_of_and_not_run():
    x, scale = torch.ones(6, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    seen = counted(lambda: rms_norm.rms_norm(x, scale, eps=1e-6), gpu=True)
    assert seen.by == {"_forward_kernel": census.Cost(0, 2 * (2 * 192 + 32) + 4 * 6, 1)}
    plain = counted(lambda: rms_norm.rms_norm(x, scale, eps=1e-6))
    assert plain.total.launches > 3 and not backend.counted()


def test_tensors_without_numbers_count_the_same():
    def run():
        x = torch.ones(64, 64, requires_grad=True)
        F.silu(x @ x).sum().backward()

    with FakeTensorMode():
        fake = counted(run)
    real = counted(run)
    assert (fake.total, fake.live.peak) == (real.total, real.live.peak)


def test_pairs_of_branches_are_those_of_their_masks_also_without_numbers():
    """A trunk of 3 tokens and two branches of 2: 6 pairs of the trunk, and 3 + 1 and 3 + 2 of each branch."""
    batch = {
        "cu_docs": torch.tensor([0, 7]), "positions": torch.tensor([0, 1, 2, 3, 4, 3, 4]), "branch": torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        "start": torch.tensor([0, 0, 0, 3, 3, 3, 3]), "tokens": torch.zeros(7, dtype=torch.int64),
    }  # fmt: skip
    documents = attention.plan(batch).patterns[0].documents
    with FakeTensorMode(allow_non_fake_inputs=True), census.Census():
        assert attention_torch.pairs(documents) == 6 + 2 * (4 + 5)
