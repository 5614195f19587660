"""Feature matching against worked numbers, loops over Python floats, and what must hold for every group."""

import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch

from treetune.losses import ebft

spec = importlib.util.spec_from_file_location("oracle_ebft", Path(__file__).parents[1] / "oracle" / "ebft.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

X = [[1, 2, 0, -1, 0.5, 3], [0, 1, 1, 2, -1, 0], [2, 0, -1, 1, 1, 1], [1, 1, 1, 0, 0, -2]]
Y = [1, 0, 2, 1, -1, 0.5]
XW = [
    [0.1914111415, 0.6031600427, 0.1116996906, -0.3469821936, 0.0735012196, 0.6791788019],
    [-0.0685758319, 0.3311197627, 0.3372927458, 0.7767301859, -0.3957313571, 0.1094420992],
    [0.7047468394, -0.1297094497, -0.3778323775, 0.4382809967, 0.3530236478, 0.1644205510],
    [0.4680380178, 0.4385433256, 0.3386804110, -0.1533957658, 0.0894797269, -0.6651156758],
]
YW = [0.0529261293, 0.3516987761, 0.2831752363, 0.4777578700, -0.2428024998, 0.0589173163]
PHI = [[1, 0, 0, 1], [0, 2, 1, 0], [1, 1, 0, -1]]
TRUTH = [1, 1, 0, 0]
WHITEN = (ebft.whiten_features, ebft.whiten_rows)
POOLS = ("last_token", "mean_pooling", "completion_mean", "concat")


def _d(x):
    return torch.tensor(x, dtype=torch.float64)


def _near(got, want, tol=1e-9):
    """Within 1e-9: the worked numbers carry ten decimals."""
    want = torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape and got.dtype == torch.float64
    assert (got - want).abs().max().item() <= tol, (got, want)


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _grads(*shapes):
    return [_random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def _stream(lens):
    lens = torch.tensor(lens, dtype=torch.int64)
    return torch.arange(len(lens)).repeat_interleave(lens), lens


@pytest.mark.parametrize("num_layers,want", [(16, (4, 8, 12)), (22, (5, 11, 16)), (28, (7, 14, 21)), (30, (7, 15, 22)), (32, (8, 16, 24))])
def test_layers_of_the_default_depths(num_layers, want):
    assert ebft.layers((0.25, 0.5, 0.75), num_layers) == want


def test_layers_at_the_ends_and_repeated():
    assert ebft.layers([0.0, 1.0], 12) == (0, 12)
    assert ebft.layers([0.5, 0.6], 3) == (1, 1)


@pytest.mark.parametrize("fractions,num_layers", [([], 4), ([1.5], 4), ([-0.1], 4), ([math.nan], 4), ([0.5], 0)])
def test_layers_refuses_other_depths(fractions, num_layers):
    with pytest.raises(ValueError, match="expected at least one depth"):
        ebft.layers(fractions, num_layers)


def test_normalisations_against_the_definition():
    hidden = [_random(5, 3), 20 * _random(5, 3, seed=1)]
    tokens = [[x[i].tolist() for x in hidden] for i in range(5)]
    _near(ebft.per_layer(hidden), [oracle.per_layer(t) for t in tokens], 1e-14)
    _near(ebft.joint(hidden), [oracle.joint(t) for t in tokens], 1e-14)
    _near(ebft.raw(hidden), [[*a, *b] for a, b in tokens], 0)
    _near(ebft.per_layer(hidden).norm(dim=-1), [math.sqrt(2)] * 5, 1e-14)
    _near(ebft.joint(hidden).norm(dim=-1), [1.0] * 5, 1e-14)


@pytest.mark.parametrize("normalise", [ebft.raw, ebft.per_layer, ebft.joint])
def test_normalisations_widen_and_keep_zero(normalise):
    found = normalise([torch.zeros(2, 3, dtype=torch.bfloat16)] * 2)
    assert found.dtype == torch.float32 and (found == 0).all() and found.shape == (2, 6)


def test_worked_numbers_of_pooling():
    """Two padded rows of 8 with the values 0 .. 15 and lengths 8 and 5; without padding the second holds 8 .. 12."""
    x, (seq, lens) = _d(range(13))[:, None], _stream([8, 5])
    _near(ebft.last_token(x, seq, lens), [[7], [12]], 0)
    _near(ebft.mean_pooling(x, seq, lens), [[3.5], [10]], 0)
    _near(ebft.completion_mean(x, seq, lens, torch.tensor([3, 4])), [[5], [12]], 0)
    _near(ebft.concat(x, seq, lens), [[2, 4, 6], [9, 10, 11]], 0)


@pytest.mark.parametrize("how", POOLS)
def test_pooling_against_the_definition(how):
    sizes, prompts = [1, 2, 3, 4, 7, 9], [0, 1, 5, 4, 2, 8]
    x, (seq, lens) = _random(sum(sizes), 2), _stream(sizes)
    more = [torch.tensor(prompts)] if how == "completion_mean" else []
    rows = [part.tolist() for part in x.split(sizes)]
    want = [oracle.pool(part, how, prompt) for part, prompt in zip(rows, prompts, strict=True)]
    _near(getattr(ebft, how)(x, seq, lens, *more), want, 1e-14)


@pytest.mark.parametrize("how", POOLS)
@pytest.mark.parametrize("sizes", [[0, 3, 0], [2, 0], [0], []])
def test_pooling_of_sequences_without_rows_is_zero(how, sizes):
    x, (seq, lens) = _random(sum(sizes), 2), _stream(sizes)
    more = [torch.zeros_like(lens)] if how == "completion_mean" else []
    found = getattr(ebft, how)(x, seq, lens, *more)
    assert found.shape == (len(sizes), 6 if how == "concat" else 2)
    assert [bool((row != 0).any()) for row in found] == [size > 0 for size in sizes]


def test_a_completion_without_tokens_pools_to_zero_and_scores_zero():
    """Of a prompt alone completion_mean is zero: alignment and diversity are 0, its siblings keep theirs."""
    x, (seq, lens) = _random(9, 3), _stream([4, 5])
    pooled = ebft.completion_mean(x, seq, lens, torch.tensor([4, 2]))
    assert (pooled[0] == 0).all() and (pooled[1] != 0).all()
    found = ebft.scores(pooled[None], _random(1, 3, seed=1))
    assert found.alignment[0, 0] == 0 and found.diversity[0].tolist() == [0, 0] and found.alignment[0, 1] != 0
    white, y = ebft.whiten_features(pooled[None], _random(1, 3, seed=1))
    assert (white[0, 0] == 0).all() and ebft.scores(white, y).reward.isfinite().all()


def test_worked_numbers_of_whitening():
    phi, y = ebft.whiten_features(_d([X]), _d([Y]))
    _near(phi[0], XW)
    _near(y[0], YW)
    found = ebft.scores(phi, y)
    _near(found.alignment, [[0.3127675569, 1.9339884408, 0.0511955567, 0.3990541079]])
    _near(found.diversity, torch.zeros(1, 4), 1e-12)
    _near(found.cfm, [0.2718516998])


def test_worked_numbers_of_whitening_in_row_space():
    phi, copies = ebft.whiten_rows(_d([X]), _d([Y]))
    _near(phi[0], XW)
    want = [[0.2480269574, 1.3616610208, 0.0865709503, 0.4233597519]]
    _near(ebft.alignment(phi, copies), want)
    _near(ebft.alignment(phi, _d([Y])), want)


@pytest.mark.parametrize("n,dim", [(2, 5), (4, 6), (4, 4), (5, 3)])
def test_whitening_against_the_whole_matrices(n, dim):
    """More rollouts than features too; the oracle inverts X^T X, which squares the condition number, hence 1e-10."""
    phi, y = _random(3, n, dim), _random(3, dim, seed=1)
    by_features, by_rows = ebft.whiten_features(phi, y), ebft.whiten_rows(phi, y)
    for i in range(3):
        want, want_y = oracle.whiten_features(phi[i].tolist(), y[i].tolist())
        _near(by_features[0][i], want, 1e-10)
        _near(by_features[1][i], want_y, 1e-10)
        rows, factors = oracle.whiten_rows(phi[i].tolist())
        _near(by_rows[0][i], rows, 1e-10)
        _near(by_rows[1][i], [[abs(f) * v for v in y[i].tolist()] for f in factors], 1e-10)


def test_whitened_rows_never_turn_the_alignment_around():
    """Here the factor of the second copy is negative, and both rollouts point the way of the ground truth."""
    phi, y = _d([[[1, 0.0], [9, 4.0]]]), _d([[1, 0.5]])
    assert oracle.whiten_rows(phi[0].tolist())[1][1] < 0
    white, copies = ebft.whiten_rows(phi, y)
    _near(ebft.alignment(white, copies), ebft.alignment(white, y).tolist(), 1e-12)


def test_properties_of_whitening():
    """Rows of full rank become orthonormal; squared cosines sum to 1; cfm follows from the coordinates of y.

    The 1e-12 beside a singular value s, here above 0.8, shortens rows by 1e-12 / s: hence 1e-11.
    """
    phi, y = ebft.whiten_features(_random(6, 4, 9), _random(6, 9, seed=1))
    found, n = ebft.scores(phi, y), 4
    _near(phi @ phi.mT, torch.eye(n).expand(6, -1, -1), 1e-11)
    _near(found.diversity, torch.zeros(6, n), 1e-11)
    _near((found.alignment / 2).square().sum(1), torch.ones(6), 1e-11)
    assert (found.alignment.mean(1) <= 2 / math.sqrt(n) + 1e-12).all()
    c = (phi @ y[..., None])[..., 0]
    _near(found.cfm, 1 / n - 2 / n * c.sum(1) + c.square().sum(1), 1e-11)


@pytest.mark.parametrize("whiten", WHITEN)
def test_whitening_counts_duplicates(whiten):
    pair = whiten(_d([[X[0], X[0], X[2], X[3]]]), _d([Y]))[0]
    _near(pair @ pair.mT, [[[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]], 1e-12)
    _near(ebft.diversity(pair), [[1 / 3, 1 / 3, 0, 0]], 1e-12)
    _near(ebft.diversity(whiten(_d([[X[0]] * 4]), _d([Y]))[0]), [[0.5] * 4], 1e-12)


@pytest.mark.parametrize("whiten", WHITEN)
def test_small_singular_values_are_dropped(whiten):
    """Two rollouts a part in 1e6 apart are duplicates, a part in 1e3 they are two."""
    for gap, want in ((1e-6, 0.5), (1e-3, 1.0)):
        white = whiten(_d([[[1, 0, 0], [1, gap, 0]]]), _d([[1, 1, 1]]))[0]
        _near(white.square().sum(-1), [[want, want]], 1e-6)


@pytest.mark.parametrize("whiten", WHITEN)
def test_whitening_degenerate_groups(whiten):
    white, y = whiten(torch.zeros(1, 3, 4), _d([[1, 2, 3, 4]]).float())
    assert white.dtype == torch.float32 and (white == 0).all() and (ebft.scores(white, y).reward == 0).all()
    aside = ebft.scores(*whiten(_d([[[1, 0, 0], [1, 1, 0]]]), _d([[0, 0, 1]])))
    _near(aside.alignment, [[0, 0]], 1e-7)
    assert whiten(torch.zeros(0, 3, 4), torch.zeros(0, 4))[0].shape == (0, 3, 4)


@pytest.mark.parametrize("whiten", WHITEN)
def test_whitening_refuses_one_rollout_and_what_is_not_finite(whiten):
    with pytest.raises(ValueError, match="whitening 1 rollouts per prompt.*use_whitening"):
        whiten(_random(2, 1, 4), _random(2, 4))
    bad = _random(2, 3, 4)
    bad[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match=r"rollouts are not finite at \[1, 2, 0\]"):
        whiten(bad, _random(2, 4))


def test_whitening_does_not_build_the_square_matrix():
    """60000 features: the matrix would take 28 GB."""
    phi, y = _random(2, 4, 60000).bfloat16(), _random(2, 60000, seed=1).bfloat16()
    white, y = ebft.whiten_features(phi, y)
    assert white.dtype == torch.float32 and y.shape == (2, 60000)
    assert ((white @ white.mT) - torch.eye(4)).abs().max() < 1e-5  # float32 sums of 60000 products


def test_worked_numbers_of_the_reward():
    found = ebft.scores(_d([PHI]), _d([TRUTH]))
    _near(found.alignment, [[1, 1.2649110641, 1.6329931619]])
    _near(found.diversity, [[0, 2, 2]])
    _near(found.reward, [[1, -0.7350889359, -0.3670068381]])
    _near(found.cfm, [0.2222222222])
    half = ebft.scores(_d([PHI]), _d([TRUTH]), diversity_coef=0.5).reward
    _near(half, [[1, 0.2649110641, 0.6329931619]])


def test_worked_numbers_of_the_reward_of_unit_features():
    found = ebft.scores(ebft.unit(_d([PHI])), ebft.unit(_d([TRUTH])))
    _near(found.alignment, [[1, 1.2649110641, 1.6329931619]])
    _near(found.diversity, [[0, 0.5163977795, 0.5163977795]])
    _near(found.reward, [[1, 0.7485132846, 1.1165953824]])
    _near(found.cfm, [0.1487869868])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_scores_against_the_definition(n):
    phi, y = _random(3, n, 4), _random(3, 4, seed=1)
    found = ebft.scores(phi.requires_grad_(), y, alignment_coef=0.7, diversity_coef=0.3)
    pairs = list(zip(phi.tolist(), y.tolist(), strict=True))
    _near(found.alignment, [oracle.alignment(*pair) for pair in pairs], 1e-13)
    _near(found.diversity, [oracle.diversity(group) for group, _ in pairs], 1e-13)
    _near(found.cfm, [oracle.cfm(*pair) for pair in pairs], 1e-13)
    _near(found.reward, [oracle.rewards(*pair, 0.7, 0.3) for pair in pairs], 1e-13)
    assert not any(x.requires_grad for x in found)


def test_alignment_ignores_the_length_of_the_ground_truth():
    phi, y = _random(2, 3, 5), _random(2, 5, seed=1)
    _near(ebft.alignment(phi, 1e4 * y), ebft.alignment(phi, y), 1e-14)
    _near(ebft.alignment(phi, -y), -ebft.alignment(phi, y), 0)
    assert (ebft.alignment(torch.zeros(1, 2, 3), torch.ones(1, 3)) == 0).all()


@pytest.mark.parametrize("phi,y", [((2, 3), (2, 3)), ((2, 3, 4), (3, 4)), ((2, 0, 4), (2, 4)), ((2, 3, 4), (2, 2, 4))])
def test_scores_refuse_other_shapes_and_what_is_not_finite(phi, y):
    with pytest.raises(ValueError, match=r"expected \[P, n, D\]"):
        ebft.scores(torch.zeros(phi), torch.zeros(y))
    with pytest.raises(ValueError, match=r"ground truth are not finite at \[0, 1\]"):
        ebft.scores(torch.zeros(1, 2, 3), torch.tensor([[0, math.inf, 0]]))


def test_worked_numbers_of_advantages():
    found = ebft.scores(_d([PHI]), _d([TRUTH]))
    _near(ebft.rloo(found.reward), [[1.5510478870, -1.0515855169, -0.4994623702]])
    _near(ebft.group_norm(found.reward), [[1.1310608618, -0.7668410698, -0.3642197920]])
    _near(ebft.rloo_paired(found), [[3.5510478870, -2.0515855169, -1.4994623702]])
    rewards = _d([[1, 2, 4, 3]])
    _near(ebft.rloo(rewards), [[-2, -2 / 3, 2, 2 / 3]])
    _near(ebft.group_norm(rewards), [[-1.1618949949, -0.3872983316, 1.1618949949, 0.3872983316]])


@pytest.mark.parametrize("n", [3, 4, 6])
def test_paired_rloo_against_groups_without_the_rollout(n):
    phi, y = _random(3, n, 4), _random(3, 4, seed=1)
    found = ebft.rloo_paired(ebft.scores(phi, y), alignment_coef=0.7, diversity_coef=0.3)
    _near(found, [oracle.rloo_paired(g, t, 0.7, 0.3) for g, t in zip(phi.tolist(), y.tolist(), strict=True)], 1e-13)


def test_advantages_are_centred():
    rewards = _random(5, 4)
    _near(ebft.rloo(rewards).sum(1), torch.zeros(5), 1e-14)
    _near(ebft.group_norm(rewards).mean(1), torch.zeros(5), 1e-14)
    _near(ebft.reinforce(rewards), rewards, 0)


def test_one_rollout_keeps_its_reward_and_two_their_diversity():
    pair = ebft.scores(_random(3, 2, 4), _random(3, 4, seed=1))
    _near(ebft.rloo_paired(pair), ebft.rloo(pair.alignment) - pair.diversity, 0)
    found = ebft.scores(_random(3, 1, 4), _random(3, 4, seed=1))
    assert (found.diversity == 0).all() and (found.reward == found.alignment).all() and (found.reward != 0).all()
    for fn in (ebft.rloo, ebft.group_norm, ebft.reinforce):
        _near(fn(found.reward), found.reward, 0)
    _near(ebft.rloo_paired(found), found.reward, 0)


def test_identical_rollouts_have_no_advantage():
    phi, y = _random(3, 1, 64).expand(-1, 4, -1), _random(3, 64, seed=1)
    found = ebft.scores(phi.float(), y.float())
    for got in (ebft.rloo(found.reward), ebft.rloo_paired(found)):
        _near(got, torch.zeros(3, 4), 1e-12)
    level = torch.full((3, 5), 0.1, dtype=torch.float64)
    assert (ebft.rloo_paired(ebft.Scores(level, level, level, level[:, 0])) == 0).all()  # though 0.5 - 0.2 is not 3 times 0.1
    _near(ebft.group_norm(found.reward), torch.zeros(3, 4), 1e-5)  # rounding of rewards near 100, over 1e-8


def _expected_gradient(gains, logits, n):
    """E[-mean_j A_j d log p(j)] over every draw of n outcomes, with A = gains(outcomes [P, n])."""
    draws = torch.tensor(list(itertools.product(range(len(logits)), repeat=n)))
    logp = logits.log_softmax(0)[draws]  # [P, n]
    chance = logp.detach().sum(1).exp()
    return torch.autograd.grad(-(chance[:, None] * gains(draws) * logp).sum() / n, logits)[0]


@pytest.mark.parametrize("n", [2, 3])
def test_the_reward_with_a_product_is_the_gradient_of_feature_matching(n):
    """Eq. 7 on all draws of three outcomes: the gradient of |E phi - y|^2, whatever n, which fixes the factors 2 and 1 / (n - 1)."""
    table, y, logits = _random(3, 4), _random(4, seed=1), _random(3, seed=2).requires_grad_()
    loss = (logits.softmax(0) @ table - y).square().sum()
    got = _expected_gradient(lambda draws: 2 * table[draws] @ y - ebft.diversity(table[draws]), logits, n)
    _near(got, torch.autograd.grad(loss, logits)[0], 1e-13)


def test_only_the_paired_baseline_leaves_the_gradient_alone():
    table, y, logits = _random(3, 4), _random(4, seed=1), _random(3, seed=2).requires_grad_()

    def scored(draws):
        return ebft.scores(table[draws], y.expand(len(draws), -1))

    want = _expected_gradient(lambda draws: scored(draws).reward, logits, 3)
    _near(_expected_gradient(lambda draws: ebft.rloo_paired(scored(draws)), logits, 3), want, 1e-13)
    plain = _expected_gradient(lambda draws: ebft.rloo(scored(draws).reward), logits, 3)
    assert (plain - want).abs().max() > 1e-2


def test_terms_against_the_definition():
    """Two rollouts and a document in one stream; weights say which is which."""
    (logp,), (seq, lens) = _grads((7,)), _stream([2, 2, 3])
    gain, generated = _d([1.5, -0.5, 9.0]), _d([1, 1, 1, 1, 0, 0, 0])
    rl = ebft.policy_term(logp, gain, seq, lens, weight=generated)
    ce = ebft.cross_entropy_term(logp, seq, lens, weight=1 - generated)
    found = ebft.total(rl, ce, rl_coef=0.9, ce_coef=0.3)
    row = logp.tolist()
    _near(found, oracle.total([(1.5, row[:2]), (-0.5, row[2:4])], row[4:], 0.9, 0.3), 1e-14)
    (grad,) = torch.autograd.grad(rl[0] / rl[1], logp, retain_graph=True)
    _near(grad, [-1.5 / 4, -1.5 / 4, 0.5 / 4, 0.5 / 4, 0, 0, 0], 1e-15)
    (grad,) = torch.autograd.grad(ce[0] / ce[1], logp, retain_graph=True)
    _near(grad, [0, 0, 0, 0, -1 / 3, -1 / 3, -1 / 3], 1e-15)
    (grad,) = torch.autograd.grad(found, logp)
    _near(grad, [-0.3375, -0.3375, 0.1125, 0.1125, -0.1, -0.1, -0.1], 1e-15)


def test_the_total_is_linear_in_its_coefficients():
    rl, ce = (_d(3.0), torch.tensor(2)), (_d(5.0), torch.tensor(4))
    values = {(a, b): ebft.total(rl, ce, rl_coef=a, ce_coef=b).item() for a, b in ((1.0, 0.0), (0.0, 1.0), (0.5, 2.0))}
    assert values == {(1.0, 0.0): 1.5, (0.0, 1.0): 1.25, (0.5, 2.0): 0.5 * 1.5 + 2 * 1.25}
    assert ebft.total(rl, (_d(math.nan), torch.tensor(0))).item() == 1.5  # a term that is off is not read
    with pytest.raises(ValueError, match="nothing would train"):
        ebft.total(rl, ce, rl_coef=0.0, ce_coef=0.0)


def test_a_total_of_nothing_is_zero_with_a_graph():
    logp, (seq, lens) = torch.zeros(0, requires_grad=True), _stream([0, 0])
    terms = ebft.policy_term(logp, _d([1.0, 2.0]), seq, lens), ebft.cross_entropy_term(logp, seq, lens)
    found = ebft.total(*terms, ce_coef=1.0)
    found.backward()
    assert found.item() == 0 and logp.grad.shape == (0,)


def test_no_gradient_reaches_the_advantages():
    gain, (seq, lens) = _d([1.0, 2.0]).requires_grad_(), _stream([1, 2])
    logp = _random(3).requires_grad_()
    ebft.policy_term(logp, gain, seq, lens)[0].backward()
    assert gain.grad is None and logp.grad.tolist() == [-1, -2, -2]


def test_gradients():
    seq, lens = _stream([3, 0, 4])
    (x,) = _grads((7, 2))
    for pool in (ebft.last_token, ebft.mean_pooling, ebft.concat):
        assert torch.autograd.gradcheck(lambda x, pool=pool: pool(x, seq, lens), [x])
    assert torch.autograd.gradcheck(lambda x: ebft.completion_mean(x, seq, lens, torch.tensor([1, 0, 2])), [x])
    phi, y = _grads((2, 3, 4), (2, 4))
    for score in (ebft.alignment, ebft.cfm, lambda phi, y: ebft.diversity(phi)):
        assert torch.autograd.gradcheck(score, [phi, y])
    for normalise in (ebft.per_layer, ebft.joint):
        assert torch.autograd.gradcheck(lambda *hidden, fn=normalise: fn(hidden), _grads((3, 2), (3, 2)))
    (logp,), gain = _grads((7,)), _d([1.0, 0.0, -2.0])
    terms = (lambda x: ebft.policy_term(x, gain, seq, lens), lambda x: ebft.cross_entropy_term(x, seq, lens))
    assert torch.autograd.gradcheck(lambda x: ebft.total(terms[0](x), terms[1](x), ce_coef=0.03), [logp])
