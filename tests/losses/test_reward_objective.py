"""Objectives of reward models against padded logits, however their documents are cut up."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from treetune.core import tree
from treetune.core.data import pack, trees
from treetune.losses import reward_objective
from treetune.models import heads

spec = importlib.util.spec_from_file_location("preference_scene", Path(__file__).with_name("scene.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)
oracle = scene.oracle()

OF_STEPS = {"loss", "grad_norm", "learning_rate", "skipped", "dead_leaves"}


TOLERANCE = 1e-12


def documents(command: str, **options) -> list:
    return scene.steps(8) if command == "prm" else scene.pairs(empty=False, **options)


def made(command: str, base, used=None):
    return scene.parts(command, base, used, **({"center_rewards_coefficient": 0.05} if command == "reward" else {}))


@pytest.fixture
def wide_head(monkeypatch):
    """A head that computes in float64, so that the float32 of the real one hides nothing."""
    monkeypatch.setattr(heads, "logits", lambda rows, head: linear(rows.double(), *(leaf.double() for leaf in _ordered(head["score"]))))


def _ordered(score: dict) -> list:
    return [score[name] for name in ("weight", "bias") if name in score]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("trains", ["full", "lora"])
@pytest.mark.parametrize("command", ["reward", "reward with margins", "prm"])
def test_every_cut_of_a_step_gives_one_gradient(command, trains, wide_head):
    name, _, margins = command.partition(" with ")
    base, docs = scene.model(), documents(name, **({"margin": True} if margins else {}))
    built = made(name, base, scene.adapted(base) if trains == "lora" else None)
    at, cuts = scene.state(built), scene.cuts(docs)
    want, told = scene.gradients(built, at, cuts.pop("one stream"))
    assert all(leaf.norm() > 0 for leaf in want.values()) and {"head.score.weight"} < want.keys()
    for how, cut in cuts.items():
        grads, metrics = scene.gradients(built, at, cut)
        assert scene.error(grads, want) <= TOLERANCE, how
        for key, value in told.items():
            torch.testing.assert_close(metrics[key], value, rtol=1e-5, atol=1e-6, check_dtype=False, msg=f"{how}: {key}")


def test_a_copied_prompt_gives_the_gradient_of_a_shared_one(wide_head):
    base, docs = scene.model(), documents("reward", margin=True)
    built = made("reward", base)
    at = scene.state(built)
    want, told = scene.gradients(built, at, [docs])
    for cut in ([scene.copied(docs)], [scene.copied([doc]) for doc in docs], [docs[:4], scene.copied(docs[4:])]):
        grads, metrics = scene.gradients(built, at, cut)
        assert scene.error(grads, want) <= TOLERANCE
        for key in told.keys() - {"num_tokens"}:
            torch.testing.assert_close(metrics[key], told[key], rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("command", ["reward", "prm"])
def test_float32_heads_give_one_gradient_too(command):
    """Gradients of single rows come back in float32 and partly cancel: 1e-5 by norm; 6.3e-6 was seen on one CPU."""
    docs, built = documents(command), made(command, scene.model())
    want, _ = scene.gradients(built, scene.state(built), [docs])
    got, _ = scene.gradients(built, scene.state(built), [[doc] for doc in docs])
    assert scene.error(got, want) <= 1e-5


def their_hidden(network, rows):
    ids, mask, _ = oracle.padded(rows)
    return network.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask.sum(1) - 1


def test_reward_is_that_of_padded_rows_scored_at_their_last_token():
    base, docs = scene.model(), documents("reward", margin=True)
    built = made("reward", base)
    at = scene.state(built)
    grads, metrics = scene.gradients(built, at, [docs[:3], docs[3:]])
    network, head = scene.theirs(base, at.params["model"]), at.params["head"]["score"]["weight"].double()
    scores = []
    for which in (1, 2):
        hidden, last = their_hidden(network, scene.rows(docs, which))
        scores.append(hidden[torch.arange(len(docs)), last] @ head[0])
    margin = torch.tensor([doc.extras["margin"][0] for doc in docs], dtype=torch.float64)
    value = (oracle.bradley_terry(*scores, margin) + 0.05 * (scores[0] + scores[1]) ** 2).mean()
    value.backward()
    assert metrics["loss"].item() == pytest.approx(value.item(), rel=1e-5)
    theirs = {name: leaf for name, leaf in scene.their_gradients(network).items() if not name.startswith("lm_head")}
    assert scene.error(scene.named(grads), theirs) <= 1e-5
    both = torch.cat(scores).detach()
    expected = {
        "mean_reward": both.mean(), "min_reward": both.min(), "max_reward": both.max(),
        "accuracy": (scores[0] > scores[1]).double().mean(), "margin": (scores[0] - scores[1]).detach().mean(),
    }  # fmt: skip
    for name, number in expected.items():
        assert metrics[name].item() == pytest.approx(number.item(), rel=1e-4, abs=1e-5), name


def test_a_process_reward_is_the_cross_entropy_at_each_step():
    base, docs = scene.model(), documents("prm")
    built = made("prm", base)
    at = scene.state(built)
    grads, metrics = scene.gradients(built, at, [docs[:3], docs[3:]])
    network, head = scene.theirs(base, at.params["model"]), {k: leaf.double() for k, leaf in at.params["head"]["score"].items()}
    hidden, _ = their_hidden(network, [(doc.tokens.tolist(), doc.tokens.tolist()) for doc in docs])
    read = [(b, t, int(c)) for b, doc in enumerate(docs) for t, c in enumerate(doc.classes) if c >= 0]
    logits = torch.stack([hidden[b, t] @ head["weight"].T + head["bias"] for b, t, _ in read])
    classes = torch.tensor([c for _, _, c in read])
    value = torch.nn.functional.cross_entropy(logits, classes)
    value.backward()
    assert metrics["loss"].item() == pytest.approx(value.item(), rel=1e-5)
    theirs = {name: leaf for name, leaf in scene.their_gradients(network).items() if not name.startswith("lm_head")}
    assert scene.error(scene.named(grads), theirs) <= 1e-5
    right = logits.argmax(-1) == classes
    assert metrics["accuracy"].item() == pytest.approx(right.double().mean().item())
    for name, kind in (("good", 1), ("bad", 0)):
        assert metrics[f"accuracy/{name}"].item() == pytest.approx(right[classes == kind].double().mean().item())


def test_a_head_reads_the_last_token_of_each_side_and_nothing_after():
    """Each sequence's row is its last one, and no token after it moves its score."""
    base, docs = scene.model(), documents("reward")
    built = made("reward", base)
    batch, plan = scene.batch(built, docs)
    ends = []
    for i, doc in enumerate(docs):
        first = int(batch["cu_docs"][i])
        ends += [first + max(j for j, b in enumerate(doc.branch) if b == which) for which in (1, 2)]
    assert batch["at"].tolist() == ends and batch["seq"].tolist() == list(range(16)) and "targets" not in batch
    at = scene.state(built)
    score = lambda stream: heads.scores("llama", base.cfg, at.params["model"], at.params["head"], stream, plan)[:, 0].detach()  # noqa: E731
    before = score(batch)
    for i in (0, 5, 9):
        changed = batch | {"tokens": batch["tokens"].clone()}
        changed["tokens"][ends[i]] = (changed["tokens"][ends[i]] + 1) % scene.VOCAB
        moved = (score(changed) != before).nonzero().flatten().tolist()
        assert moved == [i]


def test_metrics_have_the_documented_names():
    tokens = {"num_tokens", "supervised_tokens"}
    names = {
        "reward": {"mean_reward", "min_reward", "max_reward", "accuracy", "margin"},
        "prm": {"accuracy", "accuracy/good", "accuracy/bad"},
    }
    for command, own in names.items():
        built = made(command, scene.model())
        assert scene.gradients(built, scene.state(built), [documents(command)])[1].keys() == own | tokens | OF_STEPS


def test_the_fixture_of_the_contract():
    """EX-15: scores (1, 0.5) against (0.25, 0.75)."""
    scores = torch.tensor([1.0, 0.25, 0.5, 0.75], dtype=torch.float64)[:, None]
    stream = pack.collate_trees(documents("reward")[:2], read="last")
    margin = {"margin": torch.tensor([0.5, 0.5, 0.0, 0.0])}
    for extra, centre, value in (({}, 0.0, 0.6064052130), (margin, 0.0, 0.7009394199), ({}, 0.01, 0.6220302130)):
        objective = reward_objective.ranked(lambda *_: scores, centre=centre)
        terms, metrics = objective.terms({}, {}, stream | extra, None)
        assert (terms["pairs"] / objective.counts(stream)["pairs"]).item() == pytest.approx(value, abs=1e-9)
        found = {name: metrics[name].value.item() for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}
        assert found == {"min_reward": 0.25, "mean_reward": 0.625, "max_reward": 1.0, "accuracy": 0.5, "margin": 0.25}


def test_a_step_of_nothing_is_finite():
    for command in ("reward", "prm"):
        built = made(command, scene.model())
        grads, metrics = scene.gradients(built, scene.state(built), [[]])
        assert metrics["loss"] == 0 and all((leaf == 0).all() for leaf in grads.values())


def test_a_nan_score_is_never_hidden():
    for command in ("reward", "prm"):
        base = scene.model()
        built = made(command, base)
        at = scene.state(built)
        at = at._replace(params=at.params | {"head": tree.map(lambda leaf: leaf * torch.nan, at.params["head"])})
        batch, plan = scene.batch(built, documents(command))
        terms, _ = built.objective.terms(at.params, at.frozen, batch, plan)
        assert all(value.isnan() for value in terms.values())


def test_an_output_matrix_that_nothing_reads_does_not_train():
    base = scene.model(tied=False)
    built = made("reward", base)
    assert "lm_head" in base.params and not any("lm_head" in path for path, _ in tree.items(built.policy.params))
    grads, _ = scene.gradients(built, scene.state(built), [documents("reward")])
    assert all(leaf.norm() > 0 for leaf in grads.values())


def test_identical_sides_give_the_body_no_gradient():
    base, docs = scene.model(), []
    for doc in documents("reward"):
        side = doc.tokens[doc.branch == 1], doc.weight[doc.branch == 1]
        docs.append(trees.grow(doc.tokens[doc.branch == 0], [side, side], row=doc.row))
    built = scene.parts("reward", base)
    grads, metrics = scene.gradients(built, scene.state(built), [docs])
    scale, _ = scene.gradients(built, scene.state(built), [documents("reward")])
    assert metrics["loss"].item() == pytest.approx(0.6931471805599453, rel=1e-6)
    assert all(leaf.norm() <= 1e-6 * max(scale[path].norm(), 1.0) for path, leaf in grads.items())
