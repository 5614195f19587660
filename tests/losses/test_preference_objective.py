"""Objectives over packed pairs: the same gradient however pairs are cut up, and that of padded logits in plain torch."""

import importlib.util
from pathlib import Path

import pytest
import torch

from treetune.core import tree
from treetune.core.data import pack, trees
from treetune.losses import preference, preference_objective
from treetune.ops import linear_logprob

spec = importlib.util.spec_from_file_location("preference_scene", Path(__file__).with_name("scene.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)
oracle = scene.oracle()

METHODS = {
    "dpo": ("dpo", {"loss": ("dpo",)}),
    "ipo": ("dpo", {"loss": ("ipo",)}),
    "hinge and sft": ("dpo", {"loss": ("hinge", "sft"), "loss_weights": (0.7, 0.2), "rl_beta": 0.3}),
    "ld": ("dpo", {"ld_alpha": 0.3, "rl_beta": 0.5}),
    "wpo": ("dpo", {"dpo_use_weighting": True}),
    "rpo": ("dpo", {"rpo_alpha": 0.4}),
    "orpo": ("orpo", {"orpo_nll_scope": "completion", "orpo_alpha": 0.6}),
    "orpo, prompts too": ("orpo", {"orpo_nll_scope": "full"}),
    "simpo": ("simpo", {}),
    "alphapo": ("simpo", {"simpo_alpha": 0.3, "cpo_alpha": 0.2}),
    "cpo": ("cpo", {}),
}


def made(name: str, base, used=None):
    command, options = METHODS[name]
    return scene.parts(command, base, used, **options)


ALIKE = ("ipo", "cpo", "alphapo")  # losses of the same margins as those of dpo and simpo
FULL = [pytest.param(name, "full", marks=pytest.mark.slow) if name in ALIKE else (name, "full") for name in METHODS]
ADAPTED = [(name, "lora") if name in ("dpo", "orpo", "simpo") else pytest.param(name, "lora", marks=pytest.mark.slow) for name in METHODS]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "trains"), FULL + ADAPTED)
def test_every_cut_of_a_step_gives_one_gradient(name, trains):
    base = scene.model()
    built = made(name, base, scene.adapted(base) if trains == "lora" else None)
    at, cuts = scene.state(built), scene.cuts(scene.pairs())
    want, told = scene.gradients(built, at, cuts.pop("one stream"))
    assert all(leaf.norm() > 0 for leaf in want.values())
    for how, cut in cuts.items():
        grads, metrics = scene.gradients(built, at, cut)
        assert scene.error(grads, want) <= 1e-12, how
        assert metrics.keys() == told.keys()
        for key, value in told.items():
            torch.testing.assert_close(metrics[key], value, rtol=1e-6, atol=1e-7, check_dtype=False, msg=f"{how}: {key}")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "orpo, prompts too"])
def test_a_copied_prompt_gives_the_gradient_of_a_shared_one(name):
    base, docs = scene.model(), scene.pairs()
    built = made(name, base)
    at = scene.state(built)
    want, told = scene.gradients(built, at, [docs])
    for cut in ([scene.copied(docs)], [scene.copied([doc]) for doc in docs], [docs[:4], scene.copied(docs[4:])]):
        grads, metrics = scene.gradients(built, at, cut)
        assert scene.error(grads, want) <= 1e-12
        assert metrics["num_tokens"] > told["num_tokens"] and metrics["supervised_tokens"] == told["supervised_tokens"]
        for key in told.keys() - {"num_tokens"}:
            torch.testing.assert_close(metrics[key], told[key], rtol=1e-6, atol=1e-7, check_dtype=False)


BETA = 0.3
ORACLES = {
    "dpo": ("dpo", {"rl_beta": BETA}, lambda *x: oracle.dpo(*x, BETA)),
    "ipo": ("dpo", {"loss": ("ipo",), "rl_beta": BETA}, lambda *x: oracle.ipo(*x, BETA)),
    "hinge": ("dpo", {"loss": ("hinge",), "rl_beta": BETA}, lambda *x: oracle.hinge(*x, BETA)),
    "apo_zero": ("dpo", {"loss": ("apo_zero",), "rl_beta": BETA}, lambda *x: oracle.apo_zero(*x, BETA)),
    "simpo": ("simpo", {"rl_beta": 2.0, "simpo_gamma": 0.5}, lambda *x: oracle.simpo(*x, 2.0, 0.5)),
    "cpo": ("cpo", {"rl_beta": BETA, "cpo_alpha": 0.8}, lambda *x: oracle.cpo(*x, BETA)),
    "orpo": ("orpo", {"orpo_alpha": BETA, "orpo_nll_scope": "completion"}, lambda *x: oracle.orpo(*x, BETA)),
}


def their_side(network, reference, docs, which):
    """(log-probs, which count, S or S - R, n) of one side in padded rows."""
    logp, counts = oracle.log_probs(network, scene.rows(docs, which))
    sums = logp.sum(1)
    if reference is not None:
        sums = sums - oracle.log_probs(reference, scene.rows(docs, which))[0].sum(1).detach()
    return logp, counts, sums, counts.sum(1)


@pytest.mark.parametrize("name", ORACLES)
def test_loss_and_gradient_are_those_of_padded_logits(name):
    """transformers rounds norms and angles to float32 even in float64, which leaves about 2e-6."""
    command, options, formula = ORACLES[name]
    base, docs = scene.model(), scene.pairs(empty=False)
    built = scene.parts(command, base, **options)
    at = scene.state(built)
    grads, metrics = scene.gradients(built, at, [docs[:3], docs[3:]])

    network = scene.theirs(base, at.params["model"])
    reference = scene.theirs(base, base.params) if command == "dpo" else None
    sides = [their_side(network, reference, docs, which) for which in (1, 2)]
    value = formula(sides[0][2], sides[1][2], sides[0][3], sides[1][3]).mean()
    value = value + {"cpo": 0.8, "orpo": 1.0}.get(command, 0.0) * oracle.nll(*sides[0][:2])
    value.backward()
    assert metrics["loss"].item() == pytest.approx(value.item(), rel=2e-6)
    assert scene.error(scene.named(grads), scene.their_gradients(network)) <= 4e-6
    if command == "dpo":
        u_c, u_r = sides[0][2].detach(), sides[1][2].detach()
        expected = {"chosen": BETA * u_c, "rejected": BETA * u_r, "margins": BETA * (u_c - u_r), "accuracies": (u_c > u_r).double()}
        for key, numbers in expected.items():
            assert metrics[f"rewards/{key}"].item() == pytest.approx(numbers.mean().item(), rel=1e-5, abs=1e-5)


def test_orpo_likelihood_reads_the_prompt_once_beside_the_chosen_side():
    base, docs = scene.model(), scene.pairs(empty=False)
    built = scene.parts("orpo", base, orpo_alpha=BETA)
    at = scene.state(built)
    grads, metrics = scene.gradients(built, at, [docs])
    network = scene.theirs(base, at.params["model"])
    chosen, rejected = (their_side(network, None, docs, which) for which in (1, 2))
    sizes = [int((doc.branch == 0).sum()) for doc in docs]
    everything = [(ids, ids[:size] + labels[size:]) for (ids, labels), size in zip(scene.rows(docs, 1), sizes, strict=True)]
    value = oracle.orpo(chosen[2], rejected[2], chosen[3], rejected[3], BETA).mean() + oracle.nll(*oracle.log_probs(network, everything))
    value.backward()
    assert metrics["loss"].item() == pytest.approx(value.item(), rel=2e-6)
    assert scene.error(scene.named(grads), scene.their_gradients(network)) <= 4e-6


def test_documented_metrics_of_the_fixture():
    """Fixture P of the loss contract: beta 0.1, chosen and rejected sums against their references."""
    numbers = (-1.75, -2.5), (-2.5, -2.0), (-2.0, -2.0), (-2.0, -1.5)
    sums = [torch.tensor(side, dtype=torch.float64) for side in numbers]
    pairs = preference.Pairs(*sums, torch.tensor([3, 2]), torch.tensor([2, 3]))
    lens = torch.tensor([3, 2, 2, 3])
    stream = {"seq": torch.arange(4).repeat_interleave(lens), "seq_lens": lens}
    stream |= {"cu_docs": torch.tensor([0, 9, 18]), "doc_of_seq": torch.tensor([0, 0, 1, 1])}
    stats = linear_logprob.TokenStats(*[None] * len(linear_logprob.TokenStats._fields))
    got = {
        name: metric.value.item()
        for name, metric in preference_objective.metrics(stats, stream, pairs, preference_objective.implicit_rewards(0.1)).items()
    }
    assert got.items() >= {"num_tokens": 18, "supervised_tokens": 10}.items()
    expected = {
        "rewards/chosen": -0.0125, "rewards/rejected": -0.05, "rewards/margins": 0.0375, "rewards/accuracies": 0.5,
        "logps/chosen": -2.125, "logps/rejected": -2.25, "kl": ((0.25 - 0.5) / 5 + (-0.5 - 0.5) / 5) / 2,
    }  # fmt: skip
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12)


TOLD = {
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "mean_token_accuracy", "num_tokens", "supervised_tokens", "nll_loss",
}  # fmt: skip
OF_STEPS = {"loss", "grad_norm", "learning_rate", "skipped", "dead_leaves"}


@pytest.mark.parametrize(
    ("name", "more"), [("dpo", {"kl"}), ("ipo", {"kl"}), ("orpo", {"log_odds_ratio", "log_odds_chosen"}), ("simpo", set()), ("cpo", set())]
)
def test_metrics_have_the_documented_names(name, more):
    built = made(name, scene.model())
    at = scene.state(built)
    assert scene.gradients(built, at, [scene.pairs()])[1].keys() == TOLD | more | OF_STEPS
    batch, plan = scene.batch(built, scene.pairs())
    _, held = built.evaluation.terms(at.params, at.frozen, built.prepare(at, [(batch, plan)])[0][0] if built.prepare else batch, plan)
    assert held.keys() == TOLD | more | {"entropy", "logits/chosen", "logits/rejected"}


def test_numbers_of_a_side_are_means_over_pairs_and_over_tokens():
    base, docs = scene.model(), scene.pairs(empty=False)
    built = made("orpo", base)
    at = scene.state(built)
    _, metrics = scene.gradients(built._replace(objective=built.evaluation), at, [docs[:2], docs[2:]])
    network = scene.theirs(base, at.params["model"])
    for which, side in ((1, "chosen"), (2, "rejected")):
        ids, mask, labels = oracle.padded(scene.rows(docs, which))
        logits, counts = network(input_ids=ids, attention_mask=mask).logits[:, :-1].detach(), labels[:, 1:] != -100
        logp, _ = oracle.log_probs(network, scene.rows(docs, which))
        assert metrics[f"logps/{side}"].item() == pytest.approx(logp.sum(1).mean().item(), rel=1e-5)
        assert metrics[f"logits/{side}"].item() == pytest.approx(logits.mean(-1)[counts].mean().item(), rel=1e-4)
        if which == 1:
            right = (logits.argmax(-1) == labels[:, 1:])[counts]
            assert metrics["mean_token_accuracy"].item() == pytest.approx(right.double().mean().item())
            assert metrics["nll_loss"].item() == pytest.approx(-logp.sum().item() / counts.sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_pair_with_an_empty_side_adds_nothing_but_the_likelihood_of_its_chosen_tokens(name):
    """Pair 6 has no rejected token."""
    base, docs = scene.model(), scene.pairs()
    built = made(name, base)
    at = scene.state(built)
    (batch, plan) = scene.batch(built, docs)
    prepared = built.prepare(at, [(batch, plan)])[0][0] if built.prepare else batch
    counts = built.objective.counts(prepared)
    assert counts["pairs"] == 7
    only = [docs[6]]
    alone, plan = scene.batch(built, only)
    alone = built.prepare(at, [(alone, plan)])[0][0] if built.prepare else alone
    terms, told = built.objective.terms(at.params, at.frozen, alone, plan)
    assert terms["pairs"] == 0 and all(value.value.isfinite() for value in told.values())


def test_a_step_of_nothing_and_of_hollow_pairs_is_finite():
    base = scene.model()
    hollow = [doc._replace(weight=doc.weight * 0) for doc in scene.pairs()[:2]]
    for name in METHODS:
        built = made(name, base)
        at = scene.state(built)
        for docs in ([], hollow):
            grads, metrics = scene.gradients(built, at, [docs])
            nothing = name == "orpo, prompts too" and docs
            assert nothing or (metrics["loss"] == 0 and all((leaf == 0).all() for leaf in grads.values()))
            assert all(leaf.isfinite().all() for leaf in grads.values()) and metrics["loss"].isfinite()


def test_a_nan_log_prob_is_never_hidden():
    base = scene.model()
    for name in METHODS:
        built = made(name, base)
        at = scene.state(built)
        batch, plan = scene.batch(built, scene.pairs())
        batch = built.prepare(at, [(batch, plan)])[0][0] if built.prepare else batch
        if "ref_logp" in batch:
            batch["ref_logp"][0] = torch.nan
        else:
            at = at._replace(params=tree.map(lambda leaf: leaf * torch.nan, at.params))
        terms, _ = built.objective.terms(at.params, at.frozen, batch, plan)
        assert terms["pairs"].isnan(), name


@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge", "robust", "exo", "discopop", "apo_zero", "dpo_norm", "cdpo", "aot"])
def test_identical_sides_give_no_gradient(loss):
    """They are dropped before training; here the loss sees them. The gradient vanishes because both sides move alike."""
    base = scene.model()
    docs = []
    for doc in scene.pairs():
        side = doc.tokens[doc.branch == 1], doc.weight[doc.branch == 1]
        docs.append(trees.grow(doc.tokens[doc.branch == 0], [side, side], row=doc.row))
    built = scene.parts("dpo", base, loss=(loss,))
    grads, metrics = scene.gradients(built, scene.state(built), [docs])
    assert metrics["loss"].isfinite() and metrics["rewards/margins"].abs() < 1e-12
    scale = scene.gradients(built, scene.state(built), [scene.pairs()])[0]
    assert all(leaf.norm() <= 1e-12 * max(scale[path].norm(), 1.0) for path, leaf in grads.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trains", ["full", "lora"])
def test_nothing_has_moved_at_step_0(dtype, trains):
    base = scene.model(dtype)
    built = made("dpo", base, scene.adapted(base) if trains == "lora" else None)
    _, metrics = scene.gradients(built, scene.state(built, policy=0.0), [scene.pairs()[:4], scene.pairs()[4:]])
    assert metrics["kl"] == 0 and metrics["rewards/chosen"] == 0 and metrics["rewards/margins"] == 0
    assert metrics["loss"].item() == pytest.approx(0.6931471805599453, rel=1e-7)


def test_an_odd_number_of_sequences_is_refused():
    docs = [trees.single_branch(scene.pairs()[0], 1)]
    built = made("simpo", scene.model())
    with pytest.raises(ValueError, match="1 sequences cannot be pairs"):
        built.objective.terms(built.policy.params, {}, pack.collate_trees(docs), None)
