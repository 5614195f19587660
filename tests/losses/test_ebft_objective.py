"""A step of strided rollouts against one that runs every rollout as a document of its own, and what must not change it."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from treetune.cli.methods import ebft as method
from treetune.cli.options.ebft import Ebft, EbftOptions, EbftRollout
from treetune.core import check, strided, tree
from treetune.core.data import ebft, pack, strides
from treetune.losses import ebft_objective as objectives
from treetune.models import logprobs_beside, policy


def loaded(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
scene = loaded("preference_scene", HERE / "scene.py")
llama = loaded("oracle_llama", HERE.parent / "oracle" / "llama.py")
oracle = loaded("oracle_ebft", HERE.parent / "oracle" / "ebft.py")

PLACES = {"stride": 3, "context_length": 2, "generate_max_len": 3, "min_completion_prefix": 1}
OPTIONS = EbftOptions(mode="strided", n_samples_per_prompt=3, ce_coef=0.3, rl_coef=0.7, **PLACES)
TEMPERATURE = 0.8
SIZES = ((9, 0), (4, 0), (14, 5), (2, 0), (11, 0), (12, 3))  # tokens, and those of the prompt; two have no room for a block


def documents() -> list[ebft.StridedDoc]:
    """Raw texts and answers to prompts; in the last, an answer with a gap that somebody else wrote."""
    gen, docs = np.random.default_rng(3), []
    for row, (size, prompt) in enumerate(SIZES):
        weight = (np.arange(size) >= max(prompt, 1)).astype(np.float32)
        if row == 5:
            weight[8:9] = 0
        docs.append(ebft.StridedDoc(gen.integers(1, scene.VOCAB, size).astype(np.int32), weight, prompt, row))
    return docs


def made(base, used=None, *, top_p=1.0, temperature=TEMPERATURE, mesh=None, **options):
    """The method put together as the command does it."""
    chosen = dataclasses.replace(OPTIONS, **options)
    config = Ebft(ebft=chosen, rollout=EbftRollout(temperature=temperature, top_p=top_p))
    return method.parts(config, used or scene.whole(base), scene.setting(mesh))


def blocks(doc, options) -> list[int]:
    """Anchors of a document, by a loop."""
    size, length = len(doc.tokens), options.generate_max_len
    at = max(doc.prompt_length + options.min_completion_prefix, options.context_length) if doc.prompt_length else options.context_length
    found = []
    while at + length <= size:
        found += [at] if all(doc.weight[at : at + length]) else []
        at += options.stride
    return found


def hidden(base, weights, tokens, at) -> list[float]:
    """Features of one token, layer by layer, through the whole text before it."""
    layers, x = [], weights["embed_tokens"][tokens]
    states = [x]
    for one in weights["layers"]:
        x = llama.layer(x, one, {}, base.cfg, 1.0)
        states.append(x)
    states[-1] = llama.norm(x, weights["norm"], base.cfg.norm_eps)
    layers = [states[int(depth * len(weights["layers"]))][at].tolist() for depth in OPTIONS.feature_layers]
    return oracle.per_layer(layers)


def slow_gradient(base, docs, rollouts, at, used, options, whiten=False):
    """{path: gradient} and the numbers of the step, each rollout a document of its own."""
    params = tree.map(lambda leaf: leaf.clone().requires_grad_(), at.params)
    weights = tree.merge(at.frozen.get("model", {}), params.get("model", {}))
    adapter, scale = (params["lora"], used.lora.scale) if used.lora else (None, 1.0)
    left, policy, told = iter(rollouts.tolist()), [], []
    for doc in docs:
        text = torch.tensor(doc.tokens).long()
        for start in blocks(doc, options):
            stop, n = start + options.generate_max_len, options.n_samples_per_prompt
            texts = [torch.cat([text[:start], torch.tensor(next(left))]) for _ in range(n)]
            with torch.no_grad():
                phi = [hidden(base, base.params, one, stop - 1) for one in texts]
                y = hidden(base, base.params, text[:stop], stop - 1)
            phi, y = oracle.whiten_features(phi, y) if whiten else (phi, y)
            rewards = oracle.rewards(phi, y)
            told.append((rewards, oracle.alignment(phi, y), oracle.diversity(phi), oracle.cfm(phi, y)))
            for j, one in enumerate(texts):
                gain = rewards[j] - (sum(rewards) - rewards[j]) / (n - 1)
                logp = (llama.logits(weights, base.cfg, one, adapter, scale) / TEMPERATURE).log_softmax(-1)
                policy += [-gain * logp[i - 1, one[i]] for i in range(start, stop)]
    assert next(left, None) is None, "there are more rollouts than blocks"
    document = []
    for doc in docs:
        logp = llama.logits(weights, base.cfg, torch.tensor(doc.tokens).long(), adapter, scale).log_softmax(-1)
        document += [-logp[i - 1, int(doc.tokens[i])] for i in range(1, len(doc.tokens)) if doc.weight[i]]
    rl, ce = torch.stack(policy).mean(), torch.stack(document).mean()
    leaves = tree.leaves(params)
    grads = torch.autograd.grad(options.rl_coef * rl + options.ce_coef * ce, leaves, allow_unused=True)
    return dict(zip([path for path, _ in tree.items(params)], grads, strict=True)), rl.item(), ce.item(), told


def rolled(built, at, docs) -> tuple:
    """(Batch, Plan) of a micro-batch with its rollouts."""
    return built.prepare(at, [scene.batch(built, docs)])[0]


def prepared(built, at, docs) -> dict:
    return rolled(built, at, docs)[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("trains", ["full", "lora"])
def test_a_step_is_that_of_every_rollout_run_by_itself(trains, whiten):
    """Float64; the policy has moved away from the frozen network, which must not follow it."""
    base = scene.model()
    built = made(base, scene.adapted(base) if trains == "lora" else None, use_whitening=whiten)
    at, docs = scene.state(built), documents()
    before = tree.map(torch.clone, at.params)
    rollouts = prepared(built, at, docs)["targets"].view(-1, OPTIONS.generate_max_len)
    got, metrics = scene.gradients(built, at, [docs])
    want, rl, ce, told = slow_gradient(base, docs, rollouts, at, built.policy, OPTIONS, whiten)
    assert len(told) == 2 + 2 + 3 + 1 and metrics["ebft/num_blocks"] == len(told)
    assert scene.error(got, want) <= 2e-6, "rotary angles are float32"
    assert metrics["ebft/rl_loss"].item() == pytest.approx(rl, rel=2e-6) and metrics["ebft/ce_loss"].item() == pytest.approx(ce, rel=2e-6)
    flat = [[value for group in told for value in group[k]] for k in range(3)] + [[group[3] for group in told]]
    for name, values in zip(("mean_reward", "alignment", "diversity", "cfm_loss"), flat, strict=True):
        # reported in float32; whitening by the singular values of X^T X loses half the digits
        assert metrics[f"ebft/{name}"].item() == pytest.approx(sum(values) / len(values), abs=1e-5), name
    assert metrics["ebft/anchor_offset"].item() == pytest.approx((6 + 4) / 2)
    assert all(torch.equal(one, other) for one, other in zip(tree.leaves(before), tree.leaves(at.params), strict=True))


@pytest.mark.parametrize("cut", ["one by one", "pairs of rows", "uneven", "backwards", "mixed", "with an empty micro-batch"])
def test_cutting_up_a_step_changes_nothing(cut):
    built, docs = made(scene.model()), documents()
    at = scene.state(built)
    want, told = scene.gradients(built, at, [docs])
    got, also = scene.gradients(built, at, scene.cuts(docs)[cut])
    assert scene.error(got, want) <= 1e-10
    for name, value in told.items():
        assert also[name].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-7), name


def test_the_gradient_is_linear_in_the_coefficients():
    base = scene.model()
    docs, grads = documents(), {}
    for coefs in ((1.0, 0.0), (0.0, 1.0), (0.7, 0.3)):
        built = made(base, rl_coef=coefs[0], ce_coef=coefs[1])
        grads[coefs] = scene.gradients(built, scene.state(built), [docs])[0]
    sums = {path: 0.7 * leaf + 0.3 * grads[0.0, 1.0][path] for path, leaf in grads[1.0, 0.0].items()}
    assert scene.error(grads[0.7, 0.3], sums) <= 1e-12
    assert scene.error(grads[1.0, 0.0], grads[0.0, 1.0]) > 0.1


def value_of(objective, at, batch, plan):
    """The loss and its gradient on one prepared batch."""
    params = tree.map(lambda leaf: leaf.clone().requires_grad_(), at.params)
    terms, _ = objective.terms(params, at.frozen, batch, plan)
    counts = objective.counts(batch)
    loss = sum(term / counts[name] for name, term in terms.items())
    return loss.detach(), torch.autograd.grad(loss, tree.leaves(params))


@pytest.mark.parametrize(("term", "keys", "others"), [
    ("rl", ("prompt_targets",), ("targets", "advantage")), ("ce", ("targets", "advantage"), ("prompt_targets",))
])  # fmt: skip
def test_each_term_reads_its_own_tokens_only(term, keys, others):
    """Which tokens the network sees stays; what is scored of them changes."""
    base = scene.model()
    used = scene.whole(base)
    built = made(base, used)
    at = scene.state(built)
    batch, plan = rolled(built, at, documents())
    logprob = policy.logprob(scene.whole(base), temperature=TEMPERATURE, run=logprobs_beside)
    objective = objectives.objective(logprob, rl_coef=float(term == "rl"), ce_coef=float(term == "ce"))

    def changed(names):
        return batch | {name: (batch[name] + 1) % scene.VOCAB if batch[name].dtype == torch.int64 else -batch[name] for name in names}

    plain, same, moved = (value_of(objective, at, one, plan) for one in (batch, changed(keys), changed(others)))
    assert torch.equal(plain[0], same[0]) and all(torch.equal(a, b) for a, b in zip(plain[1], same[1], strict=True))
    assert not torch.equal(plain[0], moved[0])


@pytest.mark.parametrize(("rl_coef", "ce_coef"), [(1.0, 0.0), (1.0, 0.5), (0.0, 1.0)])
def test_a_step_without_a_block_has_a_gradient(rl_coef, ce_coef):
    """Exactly 0 of the policy term, which still has a graph; that of cross-entropy stays."""
    built = made(scene.model(), rl_coef=rl_coef, ce_coef=ce_coef, use_whitening=True)
    docs = [doc for doc in documents() if not blocks(doc, OPTIONS)]
    assert len(docs) == 2
    grads, metrics = scene.gradients(built, scene.state(built), [docs, []])
    assert all(torch.isfinite(leaf).all() for leaf in grads.values())
    assert any(leaf.any() for leaf in grads.values()) == (ce_coef > 0)
    assert metrics["ebft/num_blocks"] == 0 and math.isnan(metrics["ebft/cfm_loss"]) and math.isfinite(metrics["loss"])


def test_one_rollout_has_no_siblings():
    """Diversity is 0 and every estimator gives the reward itself."""
    base = scene.model()
    for estimator in ("rloo", "group_norm", "reinforce", "rloo_paired"):
        built = made(base, n_samples_per_prompt=1, advantage_estimator=estimator)
        batch = prepared(built, scene.state(built), documents())
        at = strided.sequences(batch)
        assert len(at) == 8 and not batch["diversity"].any() and batch["ebft_reward"][at].abs().min() > 0
        torch.testing.assert_close(batch["advantage"], batch["ebft_reward"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"use_whitening": True}, {"use_whitening": True, "whitening_space": "rows"},
                                     {"advantage_estimator": "group_norm"}, {"advantage_estimator": "rloo_paired"}])  # fmt: skip
def test_rollouts_that_are_all_the_same_teach_nothing(options):
    """At a temperature so low that every draw is the likeliest token."""
    built = made(scene.model(), temperature=1e-4, ce_coef=0.0, **options)
    at = scene.state(built)
    batch = prepared(built, at, documents())
    groups = batch["targets"].view(-1, OPTIONS.n_samples_per_prompt, OPTIONS.generate_max_len)
    assert (groups == groups[:, :1]).all() and not batch["advantage"].any()
    grads, metrics = scene.gradients(built, at, [documents()])
    assert not any(leaf.any() for leaf in grads.values()) and metrics["ebft/advantages_std"] == 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_rollouts_are_drawn_without_dropout_and_trained_with_it():
    base = scene.model()
    used = scene.adapted(base)
    quiet, noisy = (made(base, used._replace(lora=used.lora._replace(dropout=rate))) for rate in (0.0, 0.5))
    at = scene.state(quiet)
    stream = scene.batch(quiet, documents())[0] | {"seed": torch.tensor(4)}
    ((one, plan),), ((other, _),) = (built.prepare(at, [(stream, None)]) for built in (quiet, noisy))
    assert torch.equal(one["targets"], other["targets"]) and torch.equal(one["advantage"], other["advantage"])
    losses = [sum(built.objective.terms(at.params, at.frozen, one, plan)[0].values()) for built in (quiet, noisy)]
    assert losses[0] != losses[1]
    held = [sum(built.evaluation.terms(at.params, at.frozen, {k: v for k, v in one.items() if k != "seed"}, plan)[0].values())
            for built in (quiet, noisy)]  # fmt: skip
    assert held[0] == held[1]


def test_draws_are_of_the_step_and_the_row_alone():
    """Not of what else is in the stream; evaluations, which have no seed, draw the same at every step."""
    built, docs = made(scene.model(), n_samples_per_prompt=2), documents()
    at = scene.state(built)
    stream = pack.collate(docs)

    def drawn(some, seed=None, step=0):
        batch = strides.collate(some) | ({} if seed is None else {"seed": torch.tensor(seed)})
        ((grown, _),) = built.prepare(at._replace(step=torch.tensor(step)), [(batch, None)])
        check.batch(grown)
        pack.check_trees({key: value for key, value in grown.items() if key in stream or key in ("branch", "start")})
        tokens = grown["targets"].view(-1, OPTIONS.generate_max_len)
        rows = grown["row"][strided.sequences(grown)]
        return {row: tokens[rows == row].tolist() for row in rows.unique().tolist()}

    together, apart = drawn(docs, seed=5), {}
    for doc in docs:
        apart |= drawn([doc], seed=5)
    assert together == apart == drawn(docs[::-1], seed=5) and set(together) == {0, 2, 4, 5}
    assert drawn(docs, seed=6) != together and drawn(docs) == drawn(docs, step=9) != together


def test_a_narrow_top_p_draws_the_likeliest():
    base = scene.model()
    greedy, narrow = made(base, temperature=1e-4), made(base, top_p=1e-4)
    at = scene.state(greedy)
    assert torch.equal(prepared(greedy, at, documents())["targets"], prepared(narrow, at, documents())["targets"])


def test_an_objective_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing would train"):
        objectives.objective(None, rl_coef=0.0, ce_coef=0.0)
    base = scene.model()
    built = made(base)
    at = scene.state(built)
    alone = objectives.objective(policy.logprob_beside(built.policy, documents=False), ce_coef=0.5)
    with pytest.raises(ValueError, match="ce_coef=0.5 without log-probs"):
        alone.terms(at.params, at.frozen, *rolled(built, at, documents()))
