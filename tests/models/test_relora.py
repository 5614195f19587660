"""ReLoRA: an adapter folded into its base and started anew. The oracle is the sum of all that was folded, over the base as it was."""

import copy
from typing import Any

import pytest
import torch

from treetune.core import lora, lora_use, optim, optim_averages, optim_blocks, optim_matrices, tree
from treetune.core.quant import Scheme
from treetune.core.state import TrainState
from treetune.models import families, hf, policy, relora
from treetune.models.adapter import Base
from treetune.models.policy import AdapterSpec
from treetune.models.relora import Restarts

KINDS: dict[str, dict[str, Any]] = {
    "plain": {}, "dora": dict(dora=True), "patterns": dict(ranks=(("q_proj", 2),), alphas=(("down_proj", 3.0),), rslora=True),
    "orthogonal": dict(init="orthogonal"), "few": dict(targets=("q_proj",), modules_to_save=("norm",)),
}  # fmt: skip


def started(model, optimizer, **options):
    """A policy and a state after some steps."""
    start = policy.adapt(model, AdapterSpec(rank=4, alpha=12.0)._replace(**options), base=Base("x", ""), seed=3)
    gen = torch.Generator().manual_seed(1)
    params = tree.map(lambda leaf: leaf + 0.05 * torch.randn(leaf.shape, generator=gen), start.params)
    state = TrainState(params, start.frozen, optimizer.init(params), {}, torch.tensor(4))
    grads = tree.map(lambda leaf: torch.randn(leaf.shape, generator=gen), params)
    params, opt = optimizer.update(grads, state.opt, params, torch.tensor(1e-3))
    return start, state._replace(params=params, opt=opt)


def logits(start, state, ids):
    model, low = policy.current(start, state.params, state.frozen)
    return families.document_logits(model, ids, lora=low)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_changes_no_output_and_starts_pairs_and_moments_anew(oracle, documents, kind):
    optimizer, ids = optim.adamw(), torch.tensor(documents[1])
    start, state = started(hf.load(oracle("llama")[1]), optimizer, **KINDS[kind])
    restarts = Restarts(5, init=KINDS[kind].get("init", "default"), seed=7)
    again, metrics = relora.restarter(start, optimizer, restarts), {}
    assert again(state, metrics, 4) is state and not metrics
    assert start.lora is not None
    before, trained = copy.deepcopy(state), lora_use.in_use(start.lora, state.params["lora"])
    expected = lora.merge(before.frozen["model"], trained.tree, trained.scale)
    shown = logits(start, state, ids)
    state = again(state, metrics, 5)
    for (path, leaf), want in zip(tree.items(state.frozen["model"]), tree.leaves(expected), strict=True):
        assert torch.equal(leaf, want), path
    assert torch.allclose(logits(start, state, ids), shown, atol=2e-5, rtol=0)
    assert metrics[relora.ROUNDING] < 1e-5
    trained, old = lora.pairs(state.params["lora"]), lora.pairs(before.params["lora"])
    assert {path: a.shape for path, (a, _) in trained.items()} == {path: a.shape for path, (a, _) in old.items()}
    for path, (a, b) in trained.items():
        assert (b @ a).abs().max() < 1e-6 and a.norm() > 0 and not torch.equal(a, old[path][0]), path
    fresh = optimizer.init(state.params)
    for (path, leaf), want, kept in zip(tree.items(state.opt), tree.leaves(fresh), tree.leaves(before.opt), strict=True):
        assert torch.equal(leaf, want if ".lora." in path else kept), path
    other = relora.restarter(start, optimizer, restarts)(before, {}, 10)
    assert all(not torch.equal(a, lora.pairs(other.params["lora"])[path][0]) for path, (a, _) in trained.items()), "drawn for each restart"


def test_pruning_keeps_the_largest_first_moments_and_the_same_places_of_the_others(oracle):
    optimizer = optim.adamw()
    _, state = started(hf.load(oracle("llama")[1]), optimizer)
    before = copy.deepcopy(state.opt)
    opt = relora.forgotten(optimizer, state, 0.9)
    for path, leaf in tree.items(state.params["lora"]):
        mu, nu = (dict(tree.items(opt[name]["lora"]))[path] for name in ("mu", "nu"))
        old = dict(tree.items(before["mu"]["lora"]))[path]
        kept = mu != 0
        assert kept.sum() == leaf.numel() - round(0.9 * leaf.numel()) and torch.equal(kept, nu != 0)
        assert old[kept].abs().min() >= old[~kept].abs().max() and torch.equal(mu[kept], old[kept])
    assert all(count == 1 for count in tree.leaves(opt["count"]))


def test_the_learning_rate_rises_again_and_falls_before():
    rate = optim.restarting(optim.constant(1.0), 6, 2, 1)
    seen = [round(rate(torch.tensor(step)).item(), 4) for step in range(14)]
    cycle = [0.3333, 0.6667, 1, 1, 1, 0.5]
    assert seen == [1, 1, 1, 1, 1, 0.5, *cycle, *cycle[:2]]


def test_a_bfloat16_base_rounds_and_the_metric_says_how_much(oracle):
    optimizer = optim.adamw()
    start, state = started(hf.load(oracle("llama")[1], dtype=torch.bfloat16), optimizer)
    assert start.lora is not None
    before = [leaf.float().clone() for leaf in tree.leaves(relora.base(start))]
    exact = lora.merge(tree.map(torch.Tensor.float, state.frozen["model"]), state.params["lora"], start.lora.scale)
    metrics = {}
    state = relora.restarter(start, optimizer, Restarts(5))(state, metrics, 5)
    paths = [path for path, _ in tree.items(relora.base(start))]
    got, want = (dict(tree.items(part)) for part in (state.frozen["model"], exact))
    lost = torch.stack([(got[path].float() - want[path]).square().sum() for path in paths]).sum()
    moved = torch.stack([(want[path] - old).square().sum() for path, old in zip(paths, before, strict=True)]).sum()
    torch.testing.assert_close(metrics[relora.ROUNDING], (lost / moved).sqrt(), rtol=1e-3, atol=0)
    assert 1e-4 < metrics[relora.ROUNDING] < 0.1


def test_refused_by_name(oracle):
    folder = oracle("llama")[1]
    params = started(hf.load(folder), optim.adamw())[1].params
    with pytest.raises(ValueError, match="relora_steps: layers.0.q_proj is quantised"):
        relora.base(started(hf.load(folder, scheme=Scheme("nf4")), optim.adamw())[0])
    tied = hf.load(oracle("llama", True)[1])
    for target in ("embed_tokens", "lm_head"):
        with pytest.raises(ValueError, match=f"relora_steps: {target} of a tied model"):
            relora.base(started(tied, optim.adamw(), targets=("q_proj", target))[0])
    with pytest.raises(ValueError, match="relora_steps: the optimizer averages weights"):
        relora.check(optim_averages.schedule_free_adamw(), params, Restarts(5))
    for optimizer in (optim_matrices.adafactor(), optim_blocks.adamw_8bit()):
        big = {"lora": {"w": {"A": torch.zeros(8, 1024), "B": torch.zeros(1024, 8)}}}
        relora.check(optimizer, big, Restarts(5))
        with pytest.raises(ValueError, match=r"relora_prune_ratio 0.9 forgets a part of each moment, and \w+ of this optimizer is no such"):
            relora.check(optimizer, big, Restarts(5, 0.9))
    relora.check(optim.lion(), params, Restarts(5, 0.9))
