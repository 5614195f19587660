"""Structured mode of `treetune ebft` on tiny models: rewards against another implementation, what trains, lengths, evaluation."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from treetune.core.rollout import documents
from treetune.models import decode

spec = importlib.util.spec_from_file_location("oracle_ebft", Path(__file__).parents[1] / "oracle" / "ebft.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)

STOPS = ["--stop-token-ids", *range(40, 120)]  # about a third of all tokens: some completions are empty
POOLS = ("last_token", "mean_pooling", "completion_mean", "concat")
NORMS = {"raw": lambda layers: [value for layer in layers for value in layer], "per_layer": oracle.per_layer, "joint": oracle.joint}


def row(i: int) -> dict:
    return {"input": f"{i} + {i * 7 % 11}" + " please" * (i % 3), "output": str(i + i * 7 % 11) + " and so on" * (i % 2)}


def talk(i: int) -> dict:
    """A conversation of one, two or three replies; of the last kind it ends with a question that nobody answers."""
    said = [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{i} + {i}"}, {"role": "assistant", "content": str(2 * i)}]
    for turn in range(i % 3):
        said += [{"role": "user", "content": f"plus {10 * i + turn}?"}, {"role": "assistant", "content": f"{i} {'so' * turn}"}]
    return {"messages": said + [{"role": "user", "content": "thanks"}] * (i % 3 == 2)}


def arguments(tiny, *args) -> list:
    """Arguments of a short run, those of `args` in place of the basic ones; an option alone with the value None is left out."""
    base = {
        "--model": [tiny.model], "--data": ["rows.jsonl"], "--num-generations": [4], "--max-completion-length": [6], "--lora-r": [4],
        "--max-steps": [2], "--learning-rate": [0.01], "--output-dir": ["run"], "--sample-prompt": [""], "--val-set-size": [0],
        "--num-completions-to-print": [0],
    }  # fmt: skip
    for arg in args:
        if str(arg).startswith("--"):
            values = base[str(arg)] = []
        else:
            values.append(arg)
    if base.get("--adapter") == ["none"]:
        base.pop("--lora-r", None)
    kept = {flag: values for flag, values in base.items() if values != [None]}
    return [part for flag, values in kept.items() for part in ([f"{flag}="] if values == [""] else [flag, *values])]


@pytest.fixture
def learn(kit, tiny, here, tune):
    """learn(...) -> Done of a run of two steps on 20 rows; arguments add to or replace the basic ones."""

    def run(*args, rows=None):
        kit.write_rows(here / "rows.jsonl", [row(i) for i in range(20)] if rows is None else rows)
        return tune("ebft", *arguments(tiny, *args))

    return run


@pytest.fixture
def steps(kit, here, learn):
    """steps(...) -> the records of the steps of a run."""

    def run(*args, name="run", **more):
        done = learn(*args, "--output-dir", name, **more)
        assert done.code == 0, done.err
        return [record for record in kit.metrics(here / name) if "train/loss" in record]

    return run


@pytest.fixture
def groups(monkeypatch):
    """Groups as they are trained on, in order."""
    found, plain = [], documents.document

    def document(group, **options):
        if "truth" in options:  # not where old log-probs are made
            found.append(group)
        return plain(group, **options)

    monkeypatch.setattr(documents, "document", document)
    return found


@pytest.fixture
def features(tiny):
    """features(ids) -> for each token, the hidden states that transformers has at the depths, of this text alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model, attn_implementation="eager").eval()

    @torch.no_grad()
    def run(ids, depths=(0.25, 0.5, 0.75)):
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        chosen = [states[math.floor(depth * model.config.num_hidden_layers)][0] for depth in depths]
        return [[layer[t].tolist() for layer in chosen] for t in range(len(ids))]

    return run


def stops(tokenizer) -> set[int]:
    return {*range(40, 120), tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}


def expected(group, kit, features, *, how="last_token", norm="raw", whiten=None, depths=(0.25, 0.5, 0.75), ends=None):
    """(alignment, diversity, cfm) of a group by the oracle: each text on its own, without the token that ended it."""
    tokenizer = kit.tokenizer()
    ends = stops(tokenizer) if ends is None else ends

    def vector(asked, ids):
        return oracle.pool([NORMS[norm](token) for token in features([*asked, *ids], depths)], how, len(asked))

    asked = group.prompt.tokens.tolist()
    said = [one.tokens.tolist() for one in group.completions]
    phi = [vector(asked, ids[:-1] if ids[-1] in ends else ids) for ids in said]
    y = vector(asked, tokenizer.encode(group.prompt.columns["ground_truth"], add_special_tokens=False))
    if whiten == "features":
        phi, y = oracle.whiten_features(phi, y)
    elif whiten == "rows":
        phi, factors = oracle.whiten_rows(phi)
        mean = [sum(map(abs, factors)) / len(factors) * v for v in y]
        return oracle.alignment(phi, y), oracle.diversity(phi), oracle.cfm(phi, mean)
    else:
        phi, y = [oracle.unit(one) for one in phi], oracle.unit(y)
    return oracle.alignment(phi, y), oracle.diversity(phi), oracle.cfm(phi, y)


def scaled(rewards) -> np.ndarray:
    """Advantages of GRPO."""
    rewards = np.array(rewards)
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)


CASES = {
    **{how: (["--embed-method", how], {"how": how}) for how in POOLS},
    "per layer": (["--feature-norm", "per_layer"], {"norm": "per_layer"}),
    "joint": (["--feature-norm", "joint", "--embed-method", "mean_pooling"], {"norm": "joint", "how": "mean_pooling"}),
    "depths": (["--feature-layers", 0, 0.5, 1], {"depths": (0, 0.5, 1)}),
    "whitened": (["--use-whitening"], {"whiten": "features"}),
    "whitened rows": (["--use-whitening", "--whitening-space", "rows"], {"whiten": "rows"}),
    "full": (["--adapter", "none", "--learning-rate", 1e-3], {}),
    "network in main memory": (["--adapter", "none", "--learning-rate", 1e-3, "--feature-device", "cpu"], {}),
    "in parts": (["--streaming-partial-batch"], {}),
    "ahead": (["--async-prefetch"], {}),
    "one by one": (["--micro-batch-size", 1, "--gradient-accumulation-steps", 4], {}),
}


LATER = ("mean_pooling", "completion_mean", "per layer", "network in main memory", "ahead", "one by one")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow) if case in LATER else case for case in CASES])
def test_rewards_and_advantages_are_those_of_transformers_and_the_definition(case, kit, features, groups, steps):
    """float32 features: 2e-5 on rewards. Advantages divide that by the deviation of a group, and are compared where it is not small."""
    args, how = CASES[case]
    records = steps(*args, *STOPS, "--diversity-coef", 0.5, "--no-skip-zero-advantage-batches")
    assert len(groups) == 8
    assert any(len(one.tokens) == 1 and one.stopped for group in groups for one in group.completions), "an empty completion"
    told = []
    for group in groups:
        near, alike, away = expected(group, kit, features, **how)
        loose = 2e-4 if "whiten" in how else 2e-5  # divided by the smallest singular value
        assert group.rewards[:, 0] == pytest.approx(near, abs=loose) and group.rewards[:, 1] == pytest.approx(alike, abs=loose)
        assert group.rewards[:, 2] == pytest.approx([away] * 4, abs=loose * 10)
        reward = [a - 0.5 * d for a, d in zip(near, alike, strict=True)]
        if (apart := np.std(reward)) > 100 * loose:
            assert group.advantage == pytest.approx(scaled(reward), abs=10 * loose / apart)
            told.append(group)
    assert len(told) > 4, "most groups have something to learn from"
    for i, record in enumerate(records):
        for name, column in (("alignment", 0), ("diversity", 1), ("cfm_loss", 2)):
            assert record[f"ebft/{name}"] == pytest.approx(np.mean([one.rewards[:, column] for one in groups[4 * i : 4 * i + 4]]))
        assert record["ebft/reward"] == record["reward"] and not any(name.startswith("rewards/cfm") for name in record)
        assert record["rewards/alignment/mean"] == record["ebft/alignment"]


def test_the_frozen_network_stays_what_the_run_started_from(kit, features, groups, steps):
    """After four large steps of the whole model, the features are those of the model as it was."""
    steps("--adapter", "none", "--learning-rate", 0.01, "--max-steps", 4, *STOPS)
    near, _, _ = expected(groups[-1], kit, features)
    assert groups[-1].version == 3 and groups[-1].rewards[:, 0] == pytest.approx(near, abs=2e-5)


def test_the_same_completions_have_the_same_reward(groups, steps):
    """Bit for bit, so that a group of them teaches nothing."""
    records = steps("--top-k", 1, "--max-steps", 1)
    assert all((group.rewards == group.rewards[0]).all() and not group.advantage.any() for group in groups)
    assert records[0]["frac_reward_zero_std"] == 1 and records[0]["grad_norm"] == 0 and records[0]["skipped_zero_adv_batches"] == 1
    assert records[0]["ebft/diversity"] == pytest.approx(2, abs=1e-5), "of vectors of length 1"


def test_one_completion_with_reinforce(groups, steps):
    records = steps("--num-generations", 1, "--advantage", "reinforce")
    assert all(record["ebft/diversity"] == 0 and record["grad_norm"] > 0 for record in records)
    assert all(group.advantage[0] == group.rewards[0, 0] for group in groups)


# --- the likelihood of the truth


@pytest.mark.parametrize("micro", [1, 4])
def test_without_advantages_the_step_is_supervised_fine_tuning_times_ce_coef(micro, kit, tiny, here, learn):
    """Identical completions have no advantage; SGD of rate 1 without clipping moves by minus the gradient, which transformers has too."""
    from transformers import AutoModelForCausalLM

    rows = [row(i) for i in range(4)]
    args = ["--adapter", "none", "--optimizer", "sgd", "--learning-rate", 0.1, "--max-grad-norm", 0, "--max-steps", 1, "--ce-coef", 0.5]
    size = ["--micro-batch-size", micro, "--gradient-accumulation-steps", 4 // micro]
    done = learn(*args, *size, "--top-k", 1, "--warmup-steps", 0, rows=rows)
    assert done.code == 0, done.err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.model, attn_implementation="eager"), kit.tokenizer()
    total, count = 0.0, 0
    for one in rows:
        said = [{"role": "user", "content": one["input"]}]
        asked = tokenizer.encode(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True), add_special_tokens=False)
        ids = torch.tensor([*asked, *tokenizer.encode(one["output"], add_special_tokens=False)])
        logp = model(ids[None]).logits[0, len(asked) - 1 : -1].log_softmax(-1)
        total, count = total - logp.gather(1, ids[len(asked) :, None]).sum(), count + len(ids) - len(asked)
    (0.5 * total / count).backward()
    before = dict(AutoModelForCausalLM.from_pretrained(tiny.model).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(here / "run/model").named_parameters())
    for name, leaf in model.named_parameters():
        moved = (before[name] - after[name]) / 0.1
        assert (moved - leaf.grad).abs().max() <= 1e-5 + 1e-4 * leaf.grad.abs().max(), name
    record = kit.metrics(here / "run")[0]
    assert record["ebft/ce_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert record["train/loss"] == pytest.approx(0.5 * (total / count).item(), rel=1e-5)
    assert record["frac_reward_zero_std"] == 1 and record["skipped_zero_adv_batches"] == 0


def test_the_truth_beside_the_completions_changes_nothing_of_their_loss(steps):
    plain, beside = steps("--max-steps", 1), steps("--max-steps", 1, "--ce-coef", 0.1, name="beside")
    for name in ("reward", "policy_loss", "entropy", "supervised_tokens", "completions/mean_length", "clip_ratio/region_mean"):
        assert plain[0][name] == pytest.approx(beside[0][name], abs=1e-6), name
    assert "ebft/ce_loss" in beside[0] and "ebft/ce_loss" not in plain[0]
    assert beside[0]["train/loss"] == pytest.approx(plain[0]["train/loss"] + 0.1 * beside[0]["ebft/ce_loss"], rel=1e-5)


BESIDE = {
    "reference": ["--beta", 0.1, "--steps-per-generation", 2],
    "entropy": ["--top-entropy-quantile", 0.5, "--entropy-coef", 0.01],
    "recomputed": ["--gradient-checkpointing", "--lora-dropout", 0.2],
    "ahead": ["--async-prefetch"],
    "full": ["--adapter", "none", "--learning-rate", 1e-3, "--num-iterations", 2],
}


@pytest.mark.parametrize(
    "what", [what if what in ("reference", "recomputed") else pytest.param(what, marks=pytest.mark.slow) for what in BESIDE]
)
def test_the_truth_trains_beside_all_that_the_policy_loss_can_have(what, steps):
    """However the step is cut into micro-batches: float32, 2e-5."""
    args = [*BESIDE[what], "--ce-coef", 0.3, *STOPS]
    whole = steps(*args, "--micro-batch-size", 4, "--gradient-accumulation-steps", 1, name="whole")
    split = steps(*args, "--micro-batch-size", 1, "--gradient-accumulation-steps", 4, name="split")
    for one, other in zip(whole, split, strict=True):
        for name in ("train/loss", "grad_norm", "policy_loss", "ebft/ce_loss", "ebft/reward"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=2e-5), name


# --- lengths


@pytest.mark.parametrize(
    ("args", "length"),
    [
        (["--max-completion-length", 100], 90),  # 60 tokens of the longest truth times 1.5
        pytest.param(["--max-completion-length", 80], 80, marks=pytest.mark.slow),
        pytest.param(["--max-completion-length", 100, "--gt-length-multiplier", 0.5], 64, marks=pytest.mark.slow),
        (["--max-completion-length", 100, "--no-adaptive-max-tokens"], 100),
    ],
)
def test_a_run_samples_as_long_as_that(args, length, monkeypatch, steps):
    asked, plain = [], decode.sample

    def sample(*given, **options):
        asked.append(options["max_new_tokens"])
        return plain(*given, **options)

    monkeypatch.setattr(decode, "sample", sample)
    rows = [{"input": f"{i}?", "output": "x" * (60 if i == 2 else 4)} for i in range(4)]
    steps("--max-steps", 1, "--num-generations", 2, "--val-set-size", 0, *args, rows=rows)
    assert set(asked) == {length}


# --- evaluation


def test_evaluation_takes_as_many_completions_and_reports_under_the_same_names(kit, here, learn):
    done = learn("--val-set-size", 6, "--use-whitening", "--max-steps", 2)
    assert done.code == 0, done.err
    held = [record for record in kit.metrics(here / "run") if "eval/reward" in record]
    names = {"eval/ebft/alignment", "eval/ebft/diversity", "eval/ebft/cfm_loss", "eval/ebft/reward", "eval/ebft/ce_loss"}
    assert len(held) == 2 and all(names <= record.keys() for record in held)
    assert all(math.isfinite(record[name]) for record in held for name in names)
    assert held[0]["eval/ebft/reward"] == held[0]["eval/reward"]
    assert held[0]["eval/ebft/ce_loss"] == pytest.approx(math.log(260), abs=1), "of a random model"
