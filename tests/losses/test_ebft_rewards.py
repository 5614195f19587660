"""Equal rollouts share features before whitening, which would turn the rounding between them into a direction."""

import pytest
import torch

from treetune.losses import ebft, ebft_rewards
from treetune.losses.ebft_rewards import WHITEN

TOKENS = torch.tensor([[[1, 2], [3, 4], [5, 6], [1, 2]], [[7, 7], [8, 8], [7, 7], [7, 7]]])


def drawn(seed=0):
    """Features [2, 4, 16] that are equal where TOKENS are, and the truths'."""
    gen = torch.Generator().manual_seed(seed)
    one = torch.randn(2, 4, 16, generator=gen)
    one[0, 3], one[1, 2], one[1, 3] = one[0, 0], one[1, 0], one[1, 0]
    return one, torch.randn(2, 16, generator=gen)


@pytest.mark.parametrize("space", WHITEN)
def test_rounding_between_equal_rollouts_changes_no_score(space):
    phi, y = drawn()
    nobody = torch.full((2, 2), -1)
    noisy = phi + 1e-3 * torch.randn(phi.shape, generator=torch.Generator().manual_seed(1))
    clean = noisy.clone()
    clean[0, 3], clean[1, 2], clean[1, 3] = clean[0, 0], clean[1, 0], clean[1, 0]
    shared = ebft_rewards.equal_features(noisy, y, TOKENS, nobody)
    assert torch.equal(shared, clean)
    want = ebft.scores(*WHITEN[space](phi, y))
    got = ebft_rewards.equal_scores(ebft.scores(*WHITEN[space](shared, y)), TOKENS)
    torch.testing.assert_close(got.alignment, want.alignment, rtol=0, atol=0.02)
    torch.testing.assert_close(got.diversity, want.diversity, rtol=0, atol=0.02)
    assert got.reward[0, 0] == got.reward[0, 3] and len(set(got.reward[1, [0, 2, 3]].tolist())) == 1


def test_a_rollout_that_says_what_the_document_does_has_its_features():
    phi, y = drawn()
    shared = ebft_rewards.equal_features(phi + 0.01, y, TOKENS, torch.tensor([[5, 6], [7, 7]]))
    assert torch.equal(shared[0, 2], y[0]) and all(torch.equal(shared[1, j], y[1]) for j in (0, 2, 3))
    assert torch.equal(shared[0, 0], phi[0, 0] + 0.01)
    assert ebft.alignment(shared, y)[0, 2].item() == pytest.approx(2, abs=1e-12)
