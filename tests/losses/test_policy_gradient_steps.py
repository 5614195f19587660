"""The objective of online RL through a model and a step: the same gradient however completions are cut up or share a prompt."""

import importlib.util
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from treetune.core import lora
from treetune.core.data import pack, trees
from treetune.losses import correction, divergence, policy, policy_gradient, ratio, reduce
from treetune.models import hf
from treetune.models import policy as policies
from treetune.models.policy import Policy
from treetune.ops import linear_logprob


def loaded(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scene = loaded("preference_scene", Path(__file__).with_name("scene.py"))
rollouts = loaded("rollouts", Path(__file__).with_name("rollouts.py"))
oracle = loaded("oracle_policy_gradient", Path(__file__).parents[1] / "oracle" / "policy_gradient.py")

SIZES = ((3, (7, 2, 4)), (1, (1, 5)), (9, (4, 4, 1, 3)), (2, (12, 1)), (6, (3,)))  # prompt, its completions
N_KEYS = ("old_logp", "sampler_logp", "ref_logp", "entropy_keep")
SEQUENCES = partial(reduce.by_sequence, count_empty=True)
SUMS, BUDGET = partial(reduce.by_constant, length=1), partial(reduce.by_constant, length=12)
CLIPS = partial(policy_gradient.clip_ratio, low=0.8, high=1.2)


def groups(*, keys=N_KEYS) -> list[trees.TreeDoc]:
    """Prompts with ragged completions; one has a gap as an environment leaves it, one is masked whole, the sampler missed some tokens."""
    gen, docs = np.random.default_rng(7), []
    for row, (prompt, sizes) in enumerate(SIZES):
        sides = [(gen.integers(1, scene.VOCAB, n), np.ones(n)) for n in sizes]
        if row == 0:
            sides[0][1][2:4] = 0
        if row == 2:
            sides[1][1][:] = 0
        doc = trees.grow(gen.integers(1, scene.VOCAB, prompt), sides, row=row, extras={"advantage": tuple(gen.normal(size=len(sizes)))})
        near = -4 + 0.4 * gen.normal(size=(4, len(doc.tokens))).astype(np.float32)
        values = dict(zip(N_KEYS, near, strict=True)) | {"entropy_keep": np.float32(near[3] > -4.1)}
        values["sampler_logp"][prompt + 1 if row == 3 else 0] = np.nan
        docs.append(doc._replace(values={key: values[key] for key in keys}))
    return docs


def apart(docs: list[trees.TreeDoc]) -> list[trees.TreeDoc]:
    """Every completion a document of its own, with its prompt."""
    return [trees.single_branch(doc, which) for doc in docs for which in range(1, int(doc.branch.max()) + 1)]


def made(base, term, used=None, **options):
    used = used or scene.whole(base)

    def prepare(state, micro_batches):
        """As an anchor of the policy does: near its own log-probs, so that some ratios are inside the band and some outside."""
        found = []
        for batch, plan in micro_batches:
            own = policies.logprob(used)(state.params, state.frozen, batch, plan).logp
            moved = {key: own + 4 + batch[key] for key in ("old_logp", "sampler_logp", "ref_logp") if key in batch}
            keep = {"entropy_keep": batch["entropy_keep"] > 0} if "entropy_keep" in batch else {}
            found.append((batch | moved | keep, plan))
        return found

    objective = rollouts.objective(policies.logprob(used), term, **options)
    return SimpleNamespace(objective=objective, prepare=prepare, collates=(pack.collate_trees,), policy=used, extra={})


EXTRAS = {"kl": divergence.k3, "kl_coef": 0.3, "opsm_threshold": 0.05, "entropy_coef": 0.02, "correction": correction.token_truncate}
METHODS = {
    "grpo": (policy.ppo_clip, {"reduction": SEQUENCES}),
    "grpo, filled only": (policy.ppo_clip, {"reduction": reduce.by_sequence}),
    "dapo": (partial(policy.ppo_clip, epsilon_high=0.28), {"corrected_kl": False}),
    "dr_grpo": (policy.ppo_clip, {"reduction": BUDGET}),
    "gspo": (policy.ppo_clip, {"reduction": SEQUENCES, "ratio": ratio.sequence}),
    "luspo": (policy.ppo_clip, {"reduction": SUMS, "ratio": ratio.sequence}),
    "rloo": (policy.ppo_clip, {"reduction": SEQUENCES, "ratio": ratio.sequence_sum}),
    "cispo": (partial(policy.cispo, epsilon_high=5.0), {}),
    "sapo": (policy.sapo, {"reduction": SEQUENCES}),
    "vespo": (policy.vespo, {"reports": (CLIPS, policy_gradient.vespo_phi)}),
    "gmpo": (policy.gmpo, {"reduction": SEQUENCES, "correction": correction.sequence_mask}),
    "reinforce": (policy.reinforce, {}),
}  # fmt: skip


def cuts(docs):
    single = apart(docs)
    return {
        "one by one": [[doc] for doc in docs],
        "uneven": [docs[:1], docs[1:4], docs[4:]],
        "backwards": [docs[::-1]],
        "with an empty micro-batch": [docs[:2], [], docs[2:]],
        "prompts copied": [single],
        "completions one by one": [[doc] for doc in single],
        "completions across": [single[::3], single[1::3], single[2::3]],
        "shared and copied": [docs[:3], apart(docs[3:])],
    }


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", METHODS)
def test_every_cut_of_a_step_gives_one_gradient(name):
    term, options = METHODS[name]
    base, docs = scene.model(), groups()
    built = made(base, term, **(EXTRAS | {"reports": (CLIPS,)} | options))
    at = scene.state(built)
    want, told = scene.gradients(built, at, [docs])
    assert all(leaf.norm() > 0 for leaf in want.values()) and 0 < told["clip_ratio/region_mean"] < 1
    for how, cut in cuts(docs).items():
        grads, metrics = scene.gradients(built, at, cut)
        assert scene.error(grads, want) <= 1e-12, how
        assert metrics.keys() == told.keys()
        for key in told.keys() - {"num_tokens"}:
            torch.testing.assert_close(metrics[key], told[key], rtol=1e-6, atol=1e-7, check_dtype=False, msg=f"{how}: {key}")
        assert (metrics["num_tokens"] > told["num_tokens"]) == ("copied" in how or "completions" in how)


def test_an_adapter_alone_may_train():
    base, docs = scene.model(), groups(keys=("ref_logp",))
    built = made(base, policy.ppo_clip, scene.adapted(base), kl=divergence.k3, kl_coef=0.1, entropy_coef=0.01)
    at = scene.state(built)
    want, _ = scene.gradients(built, at, [docs])
    assert all(path.startswith("lora.") and leaf.norm() > 0 for path, leaf in want.items())
    for cut in cuts(docs).values():
        assert scene.error(scene.gradients(built, at, cut)[0], want) <= 1e-12


def test_means_of_means_would_differ():
    """The cut matters to what divides within a micro-batch: the tests above can fail."""
    base, docs = scene.model(), groups()
    local = lambda x, seq, lens: (x.sum() / lens.sum().clamp(min=1), lens.new_ones(()))  # noqa: E731
    built = made(base, policy.ppo_clip, reduction=local)
    at = scene.state(built)
    whole, cut = (scene.gradients(built, at, how)[0] for how in ([docs], [docs[:1], docs[1:]]))
    assert scene.error(cut, whole) > 0.01


def by_loops(network, docs, columns, term, **options):
    """The loops' loss over each completion read alone, with a prompt of its own, by transformers' model."""
    logp, entropy = [], []
    for doc in apart(docs):
        ids, mask = torch.from_numpy(doc.tokens).long(), torch.from_numpy(doc.weight[1:] > 0)
        logs = network(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        logp.append(list(logs.gather(1, ids[1:, None])[:, 0][mask]))
        entropy.append(list(-(logs.exp() * logs).sum(-1)[mask]))
    own = [[x.detach() for x in row] for row in logp]
    kept = {key: [doc.values[key][1:][doc.weight[1:] > 0] for doc in apart(docs)] for key in columns}
    near = {
        key: [[a + 4 + b for a, b in zip(row, more.astype(np.float64), strict=True)] for row, more in zip(own, kept[key], strict=True)]
        for key in ("old_logp", "ref_logp", "sampler_logp")
    }
    advantage = [doc.extras["advantage"][0] for doc in apart(docs)]
    keep = [[bool(x) for x in row] for row in kept["entropy_keep"]]
    more = {"ref": near["ref_logp"], "smp": near["sampler_logp"], "keep": keep, "entropy": entropy}
    return oracle.loss(term, logp, near["old_logp"], advantage, threshold=0.05, kl_coef=0.3, entropy_coef=0.02, **more, **options)


@pytest.mark.parametrize(
    ("name", "loops", "knobs"),
    [
        ("grpo", oracle.ppo_clip, {"how": "sequence"}),
        ("dapo", oracle.ppo_clip, {"high": 0.28, "corrected": False}),
        ("dr_grpo", oracle.ppo_clip, {"how": "constant", "length": 12}),
        ("luspo", oracle.ppo_clip, {"how": "sum", "level": "sequence"}),
        ("sapo", oracle.sapo, {"how": "sequence"}),
    ],
)
def test_loss_and_gradient_are_those_of_separate_completions(name, loops, knobs):
    """transformers rounds norms and angles to float32 even in float64, which leaves about 2e-6."""
    term, options = METHODS[name]
    base, docs = scene.model(), groups()
    built = made(base, term, **(EXTRAS | options | {"correction": None}))
    at = scene.state(built)
    grads, metrics = scene.gradients(built, at, [docs[:2], docs[2:]])
    network = scene.theirs(base, at.params["model"])
    value = by_loops(network, docs, N_KEYS, loops, **knobs)
    value.backward()
    assert metrics["loss"].item() == pytest.approx(value.item(), rel=5e-6)
    assert scene.error(scene.named(grads), scene.their_gradients(network)) <= 8e-6


def test_a_skipped_micro_batch_changes_nothing_but_the_reports():
    base, docs = scene.model(), groups(keys=())
    flat = [doc._replace(extras={"advantage": (0.0,) * len(doc.extras["advantage"])}) for doc in docs[:2]]
    built = made(base, policy.ppo_clip, reduction=SEQUENCES)
    at = scene.state(built)
    want, told = scene.gradients(built, at, [flat, docs[2:]])

    def skip(state, micro_batches):
        return [
            (batch, plan) if batch["advantage"].any() else (policy_gradient.zero_signal_batch(batch), None) for batch, plan in micro_batches
        ]

    built.prepare = skip
    grads, metrics = scene.gradients(built, at, [flat, docs[2:]])
    assert scene.error(grads, want) <= 1e-14 and metrics["loss"] == told["loss"]
    assert (told["skipped_zero_adv_batches"], metrics["skipped_zero_adv_batches"]) == (0, 0.5)
    assert metrics["policy_loss"] == told["policy_loss"] and metrics["supervised_tokens"] < told["supervised_tokens"]


def test_entropy_that_is_only_told_costs_the_frozen_head_no_backward(monkeypatch):
    """The gradient of the rows is made in the forward; a bonus needs the products again."""
    base, docs, calls = scene.model(), groups(keys=()), []
    again = linear_logprob.backward_chunks
    monkeypatch.setattr(linear_logprob, "backward_chunks", lambda *args: calls.append(1) or again(*args))
    for coef, expected in ((0.0, 0), (0.01, 1)):
        built = made(base, policy.ppo_clip, only_layers(base), entropy_coef=coef)
        _, told = scene.gradients(built, scene.state(built), [docs])
        assert told["entropy"] > 0 and len(calls) == expected


def only_layers(base):
    """An adapter everywhere but on the head, whose matrix then is a constant."""
    fresh = lora.init(base.params, lora.match(hf.abstract_of(base), "all-linear"), rank=3, seed=9, dtype=base.cfg.dtype)
    return Policy(base.family, base.cfg, {"lora": fresh}, {"model": base.params}, lora.Lora(fresh, 0.7))
