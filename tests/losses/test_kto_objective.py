"""Objectives over judged completions: KTO and its baseline over a whole step, BCO and its running mean, against padded logits."""

import importlib.util
from pathlib import Path

import pytest
import torch

from treetune.core import tree
from treetune.core.data import trees
from treetune.losses import kto, kto_objective

spec = importlib.util.spec_from_file_location("preference_scene", Path(__file__).with_name("scene.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)
oracle = scene.oracle()

METHODS = {
    "kto": {"rl_beta": 0.3, "kto_desirable_weight": 1.4, "kto_undesirable_weight": 0.7},
    "apo_zero_unpaired": {"loss": "apo_zero_unpaired", "rl_beta": 0.3, "kto_undesirable_weight": 1.5},
    "bco": {"loss": "bco", "rl_beta": 0.3},
}
MOVED = {"policy": 0.06, "seed": 17}  # a policy whose baseline is above 0 on these documents


def made(name, base, used=None):
    built = scene.parts("kto", base, used, **METHODS[name])
    if name == "bco":
        built = built._replace(extra={"bco": {"mean": torch.tensor(0.4, dtype=torch.float64), "count": torch.tensor(3)}})
    return built


def their_ratios(base, policy, docs, which):
    """(S - R of each row with its own completion (1) or the foreign one (2), the policy's network)."""
    network, reference = scene.theirs(base, policy), scene.theirs(base, base.params)
    rows = scene.rows(docs, which)
    return oracle.log_probs(network, rows)[0].sum(1) - oracle.log_probs(reference, rows)[0].sum(1).detach(), network


@pytest.mark.sampled(3)
@pytest.mark.parametrize("trains", ["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_every_cut_of_a_step_gives_one_gradient(name, trains):
    """KTO's baseline is of the whole step, so it too does not know of micro-batches."""
    base = scene.model()
    built = made(name, base, scene.adapted(base) if trains == "lora" else None)
    at, cuts = scene.state(built, **MOVED), scene.cuts(scene.judged(8))
    want, told = scene.gradients(built, at, cuts.pop("one stream"))
    assert all(leaf.norm() > 0 for leaf in want.values())
    assert name != "kto" or told["kl"] > 0.05
    for how, cut in cuts.items():
        grads, metrics = scene.gradients(built, at, cut)
        assert scene.error(grads, want) <= (1e-6 if name == "kto" else 1e-12), how  # the baseline is kept in float32
        for key, value in told.items():
            torch.testing.assert_close(metrics[key], value, rtol=1e-6, atol=1e-6, check_dtype=False, msg=f"{how}: {key}")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("good", ["mixed", "good", "bad"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_kto_is_the_padded_oracle_at_every_batch_size(size, good):
    """Also where a whole batch is of one class; five rows in micro-batches of `size`."""
    base, docs = scene.model(), scene.judged(5, good)
    built = made("kto", base)
    at = scene.state(built, **MOVED)
    grads, metrics = scene.gradients(built, at, [docs[i : i + size] for i in range(0, 5, size)])

    ratios, network = their_ratios(base, at.params["model"], docs, 1)
    foreign, _ = their_ratios(base, at.params["model"], docs, 2)
    z0 = oracle.kto_baseline(foreign)
    flags = [doc.extras["desirable"][0] for doc in docs]
    value = oracle.kto(ratios, flags, z0, 0.3, 1.4, 0.7).mean()
    value.backward()
    assert z0 > 0.05 and metrics["kl"].item() == pytest.approx(z0, rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(value.item(), rel=2e-6)
    assert scene.error(scene.named(grads), scene.their_gradients(network)) <= 4e-6
    rewards, flags = 0.3 * ratios.detach(), torch.tensor(flags)
    for side, mask in (("chosen", flags), ("rejected", ~flags)):
        found = metrics[f"rewards/{side}"]
        assert found.isnan() if not mask.any() else found.item() == pytest.approx(rewards[mask].mean().item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["apo_zero_unpaired", "bco"])
def test_losses_without_a_baseline_are_the_padded_oracle(name):
    base, docs = scene.model(), scene.judged(6)
    built = made(name, base)
    at = scene.state(built, **MOVED)
    grads, metrics = scene.gradients(built, at, [docs[:4], docs[4:]])
    ratios, network = their_ratios(base, at.params["model"], docs, 1)
    flags = [doc.extras["desirable"][0] for doc in docs]
    value = (oracle.bco(ratios, flags, 0.4, 0.3) if name == "bco" else oracle.kto(ratios, flags, 0.0, 0.3, 1.0, 1.5)).mean()
    value.backward()
    assert metrics["loss"].item() == pytest.approx(value.item(), rel=2e-6)
    assert scene.error(scene.named(grads), scene.their_gradients(network)) <= 4e-6


def test_the_baseline_comes_from_foreign_completions_and_carries_no_gradient():
    """Another foreign completion changes the loss; the policy's own dropout does not reach the baseline."""
    base, docs = scene.model(), scene.judged(4)
    built = made("kto", base)
    at = scene.state(built, **MOVED)
    turned = [trees.grow(doc.tokens[doc.branch == 0], [(doc.tokens[doc.branch == b], doc.weight[doc.branch == b]) for b in (1, 1)],
                         row=doc.row, extras=doc.extras) for doc in docs]  # fmt: skip
    assert scene.gradients(built, at, [docs])[1]["kl"] != scene.gradients(built, at, [turned])[1]["kl"]
    prepared = built.prepare(at, [scene.batch(built, docs)])
    assert len(prepared) == 1 and not prepared[0][0]["baseline"].requires_grad and prepared[0][0]["baseline"].shape == ()


def test_a_negative_mean_is_a_baseline_of_0():
    base, docs = scene.model(), scene.judged(4)
    built = made("kto", base)
    at = scene.state(built, **MOVED)
    swapped = at._replace(params={"model": built.policy.frozen["ref"]}, frozen={"ref": at.params["model"]})
    ratios = their_ratios(base, at.params["model"], docs, 2)[0]
    assert ratios.mean() > 0
    assert scene.gradients(built, swapped, [docs])[1]["kl"] == 0


def test_nothing_has_moved_at_step_0():
    for trains in ("full", "lora"):
        base = scene.model()
        built = made("kto", base, scene.adapted(base) if trains == "lora" else None)
        _, metrics = scene.gradients(built, scene.state(built, policy=0.0), [scene.judged(5)[:2], scene.judged(5)[2:]])
        assert metrics["kl"] == 0 and metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0


def test_bco_counts_every_reward_once():
    """After two steps the mean is that of all their rewards, each step seen with the mean of those before it."""
    base, docs = scene.model(), scene.judged(6)
    built = scene.parts("kto", base, **METHODS["bco"])
    at, seen = scene.state(built, **MOVED), []
    for number, cut in enumerate(([docs[:2], docs[2:3]], [docs[3:]]), 1):
        deltas = {batch["delta"].item() for batch, _ in built.prepare(at, [scene.batch(built, group) for group in cut])}
        assert deltas == {at.extra["bco"]["mean"].item()}
        metrics = scene.gradients(built, at, cut)[1]
        at = built.after_step(at, metrics, number)
        seen += (0.3 * their_ratios(base, at.params["model"], [doc for group in cut for doc in group], 1)[0]).tolist()
        assert at.extra["bco"]["mean"].item() == pytest.approx(sum(seen) / len(seen), rel=1e-5, abs=1e-7)
        assert at.extra["bco"]["count"] == len(seen)
    running = kto.Running(**at.extra["bco"])
    assert running.mean.dtype == torch.float64


def test_a_nan_row_is_never_hidden():
    base, docs = scene.model(), scene.judged(3)
    for name in METHODS:
        built = made(name, base)
        at = scene.state(built, **MOVED)
        batch, plan = built.prepare(at, [scene.batch(built, docs)])[0]
        batch["ref_logp"][-1] = torch.nan
        terms, told = built.objective.terms(at.params, at.frozen, batch, plan)
        assert terms["rows"].isnan() and told["rewards/mean"].value.isnan()


def test_a_step_of_nothing_and_of_hollow_rows_is_finite():
    hollow = [doc._replace(weight=doc.weight * 0) for doc in scene.judged(3)]
    for name in METHODS:
        built = made(name, scene.model())
        for docs in ([], hollow):
            grads, metrics = scene.gradients(built, scene.state(built, **MOVED), [docs])
            assert metrics["loss"] == 0 and all((leaf == 0).all() for leaf in grads.values())


@pytest.mark.parametrize("name", METHODS)
def test_metrics_have_the_documented_names(name):
    built = made(name, scene.model())
    at = scene.state(built, **MOVED)
    per_class = {f"{what}/{side}" for what in ("rewards", "logps") for side in ("chosen", "rejected")}
    more = {"rewards/accuracies", "rewards/mean", "rows", "num_tokens", "supervised_tokens", "mean_token_accuracy"}
    steps = {"loss", "grad_norm", "learning_rate", "skipped", "dead_leaves"}
    assert scene.gradients(built, at, [scene.judged(4)])[1].keys() == per_class | more | steps | ({"kl"} if name == "kto" else set())


def test_numbers_of_a_class_are_over_its_own_rows_and_tokens():
    base, docs = scene.model(), scene.judged(5)
    built = made("kto", base)
    at = scene.state(built, **MOVED)
    _, metrics = scene.gradients(built._replace(objective=built.evaluation), at, [docs[:2], docs[2:]])
    network = scene.theirs(base, at.params["model"])
    rows, good = scene.rows(docs, 1), torch.tensor([doc.extras["desirable"][0] for doc in docs])
    ids, mask, labels = oracle.padded(rows)
    logits, counts = network(input_ids=ids, attention_mask=mask).logits[:, :-1].detach(), labels[:, 1:] != -100
    sums = oracle.log_probs(network, rows)[0].sum(1)
    for side, of in (("chosen", good), ("rejected", ~good)):
        assert metrics[f"logps/{side}"].item() == pytest.approx(sums[of].mean().item(), rel=1e-5)
        assert metrics[f"logits/{side}"].item() == pytest.approx(logits[of].mean(-1)[counts[of]].mean().item(), rel=1e-4)
    rewards, z0 = 0.3 * their_ratios(base, at.params["model"], docs, 1)[0].detach(), metrics["kl"]
    right = torch.where(good, rewards > 0.3 * z0, rewards < 0.3 * z0)
    assert metrics["rewards/accuracies"].item() == pytest.approx(right.double().mean().item())
    assert metrics["rows"] == 5 and metrics["supervised_tokens"] == counts.sum()


def test_the_fixture_of_the_contract():
    """EX-12: the baseline over mismatched pairs and the loss that follows, through the functions that the command puts together."""
    foreign = torch.tensor([-2.0, -3.0, -1.5], dtype=torch.float64), torch.tensor([-2.5, -3.25, -1.25], dtype=torch.float64)
    z0 = kto_objective.step_baseline(foreign[0] - foreign[1], lambda tensors: tensors)
    assert z0.item() == pytest.approx(0.16666667, abs=1e-7)
    loss = kto_objective.completion_loss("kto", beta=0.1)
    own, ref = torch.tensor([-1.5, -2.0, -0.5], dtype=torch.float64), torch.tensor([-2.0, -1.5, -0.75], dtype=torch.float64)
    value = loss(own, ref, torch.tensor([True, False, True]), {"baseline": z0})
    assert value.mean().item() == pytest.approx(0.4909745401, abs=1e-8)
    assert tree.leaves({"a": z0})[0].dtype == torch.float32
