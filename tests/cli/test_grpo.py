"""`treetune grpo` from prompts to run folders on tiny models: what it records, what it trains on, references, rewards, evaluation."""

import math

import pytest
import torch

from treetune.core import step
from treetune.models import decode

REWARDS = '''
"""Rewards of the tests: texts of random bytes differ, and so do these."""

def texts(completions):
    return [one if isinstance(one, str) else one[0]["content"] for one in completions]

def spread(completions):
    return [sum(map(ord, one)) % 5 / 4 for one in texts(completions)]

def most(completions):
    return [None if sum(map(ord, one)) % 3 == 0 else one.count("e") + len(one) / 10 for one in texts(completions)]

def same(completions):
    return [0.7] * len(completions)

def silent(completions):
    return [None] * len(completions)
'''
SPREAD = "rewards.py:spread"


def spread(text: str) -> float:
    return sum(map(ord, text)) % 5 / 4


def prompt(i: int) -> dict:
    return {"prompt": f"{i} + {i * 7 % 11}" + " please" * (i % 3) + " =", "answer": str(i + i * 7 % 11)}


def arguments(tiny, *args, command: str = "grpo") -> list:
    """Arguments of a short run, those of `args` in place of the basic ones."""
    base = {
        "--model": [tiny.model], "--data": ["prompts.jsonl"], "--reward-funcs": [SPREAD], "--num-generations": [4],
        "--max-completion-length": [6], "--lora-r": [4], "--max-steps": [2], "--learning-rate": [0.01], "--output-dir": ["run"],
        "--sample-prompt": [""], "--num-completions-to-print": [0],
    }  # fmt: skip
    training = ("--lora-r", "--max-steps", "--learning-rate", "--output-dir", "--sample-prompt", "--num-completions-to-print")
    base = base if command == "grpo" else {flag: values for flag, values in base.items() if flag not in training}
    for arg in args:
        if str(arg).startswith("--"):
            values = base[str(arg)] = []
        else:
            values.append(arg)
    if base.get("--adapter") == ["none"] or "--lora-model-dir" in base:
        base.pop("--lora-r", None)
    return [part for flag, values in base.items() for part in ([f"{flag}="] if values == [""] else [flag, *values])]


@pytest.fixture
def learn(kit, tiny, here, tune):
    """learn(...) -> Done of a run of two steps on 20 prompts; arguments add to or replace the basic ones."""
    (here / "rewards.py").write_text(REWARDS)

    def run(*args, rows=None, command="grpo"):
        kit.write_rows(here / "prompts.jsonl", [prompt(i) for i in range(20)] if rows is None else rows)
        return tune(command, *arguments(tiny, *args, command=command))

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
def drawn(monkeypatch):
    """[(ids of a prompt, ids of a completion, its log-probs)] of all that is sampled, in order."""
    found, plain = [], decode.sample

    def sample(model, prompts, *, n=1, **options):
        made = plain(model, prompts, n=n, **options)
        for i, size in enumerate(made.lens.tolist()):
            found.append((tuple(prompts[i // n]), made.tokens[i, :size].tolist(), made.logp[i, :size].tolist()))
        return made

    monkeypatch.setattr(decode, "sample", sample)
    return found


@pytest.fixture
def batches(monkeypatch):
    """[(state, micro-batches, metrics)] of every step."""
    found, plain = [], step.make_step

    def make(*args, **options):
        inner = plain(*args, **options)

        def one(state, micro_batches):
            after, metrics = inner(state, micro_batches)
            found.append((state, [batch for batch, _ in micro_batches], metrics))
            return after, metrics

        return one

    monkeypatch.setattr(step, "make_step", make)
    return found


def trained(batch) -> list[tuple]:
    """[(ids of the prompt, trained ids, the sampler's log-probs of them)] of each completion of a batch."""
    out = []
    for b, doc in enumerate(batch["doc_of_seq"].tolist()):
        span = slice(*batch["cu_docs"][doc : doc + 2].tolist())
        asked = batch["tokens"][span][batch["branch"][span] == 0].tolist()
        mine = batch["seq"] == b
        inside = batch["branch"][span] == 1 + batch["doc_of_seq"][:b].eq(doc).sum()
        assert batch["tokens"][span][inside].tolist() == batch["targets"][mine].tolist(), "what the model reads is what it is asked for"
        out.append((tuple(asked), batch["targets"][mine].tolist(), batch["sampler_logp"][mine].tolist()))
    return out


# --- what runs say and leave

LENGTHS = {f"completions/{how}_{what}" for how in ("mean", "min", "max") for what in ("length", "terminated_length")}
SAMPLING = {f"sampling/sampling_logp_difference/{how}" for how in ("mean", "max")} | {
    f"sampling/importance_sampling_ratio/{how}" for how in ("min", "mean", "max")
}  # fmt: skip
ALWAYS = LENGTHS | SAMPLING | {
    "reward", "reward_std", "rewards/spread/mean", "rewards/spread/std", "frac_reward_zero_std", "completions/clipped_ratio",
    "entropy", "policy_loss", "train/loss", "grad_norm", "learning_rate", "num_tokens", "skipped_zero_adv_batches", "epoch",
    "rollout/seconds", "rollout/sampled", "rollout/staleness_mean", "step_seconds", "tokens_per_second",
}  # fmt: skip
CLIPS = {f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")}
DOCUMENTED = {
    "dapo": ([], CLIPS),
    "a reference": (["--beta", 0.1], CLIPS | {"kl"}),
    "cispo": (["--loss", "cispo", "--epsilon-high", 5], {"cispo_clip_ratio"}),
    "vespo": (["--loss", "vespo"], {"vespo/phi_seq_mean"}),
    "entropy": (["--entropy-coef", 0.01], CLIPS | {"entropy_coef"}),
    "adaptive entropy": (["--use-adaptive-entropy"], CLIPS | {"entropy_coef"}),
}


@pytest.mark.parametrize("what", DOCUMENTED)
def test_a_run_records_the_documented_numbers(what, steps):
    args, own = DOCUMENTED[what]
    records = steps(*args)
    assert len(records) == 2
    for record in records:
        assert ALWAYS | own <= record.keys()
        assert not ({"kl", "entropy_coef", "cispo_clip_ratio", "vespo/phi_seq_mean"} | CLIPS) - own & record.keys()
        unknown = {key for key, value in record.items() if value is None}
        assert unknown <= {key for key in LENGTHS if "terminated" in key}, "nothing ended by itself"
        assert all(math.isfinite(value) for value in record.values() if value is not None)


def test_a_run_leaves_samples_an_adapter_and_a_report(kit, here, tune, steps):
    records = steps("--max-steps", 3, "--num-completions-to-print", 2)
    rows = kit.samples(here / "run")
    assert len(rows) == 3 * 4 * 4 and [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    for record in records:
        mine = [row for row in rows if row["step"] == record["step"]]
        values = torch.tensor([row["rewards"]["spread"] for row in mine], dtype=torch.float64)
        assert values.tolist() == [spread(row["answer"]) for row in mine]
        assert record["reward"] == pytest.approx(values.mean().item()) and record["reward_std"] == pytest.approx(values.std().item())
        assert record["completions/mean_length"] == pytest.approx(sum(row["tokens"] for row in mine) / 16)
        assert {row["version"] for row in mine} == {record["step"] - 1}
        for at in range(0, 16, 4):  # highest advantage first, and with it the reward
            group = [row["rewards"]["spread"] for row in mine[at : at + 4]]
            assert group == sorted(group, reverse=True) and len({row["prompt"] for row in mine[at : at + 4]}) == 1
    assert (here / "run/report.html").exists()
    done = tune("generate", "1 + 1 =", "--raw", "--adapter", "run/adapter", "--max-new-tokens", 3)
    assert done.code == 0, done.err
    weights = kit.tensors(here / "run/adapter/adapter_model.safetensors")
    assert any(leaf.any() for key, leaf in weights.items() if "lora_B" in key)


def test_a_run_again_from_its_own_config_is_the_same(kit, here, tune, steps):
    steps("--beta", 0.1, "--temperature", 0.7)
    assert tune("grpo", "--config", "run/config.yaml", "--output-dir", "again").code == 0
    assert stable(kit, here / "again") == stable(kit, here / "run") and kit.samples(here / "again") == kit.samples(here / "run")


def test_epochs_are_passes_over_the_prompts(kit, tiny, here, tune, steps):
    """15 prompts, one a step: checkpoints at the 15th and the 30th, where the epochs end."""
    rows = [prompt(i) for i in range(15)]
    args = ["--micro-batch-size", 1, "--gradient-accumulation-steps", 1, "--num-generations", 2, "--max-completion-length", 1]
    steps("--max-steps", 1, *args, name="rows", rows=rows)
    more = arguments(tiny, *args, "--num-epochs", 2)
    at = more.index("--max-steps")
    done = tune("grpo", *more[:at], *more[at + 2 :])
    assert done.code == 0, done.err
    assert [path.name for path in sorted((here / "run/checkpoints").iterdir())] == ["step_000015", "step_000030"]
    records = kit.metrics(here / "run")
    assert [record["epoch"] for record in records] == [0] * 15 + [1] * 15
    for epoch in (0, 1):
        asked = [row["prompt"] for row in kit.samples(here / "run") if (row["step"] - 1) // 15 == epoch]
        assert sorted(asked) == sorted(2 * [row["prompt"] for row in rows])


def stable(kit, root) -> list[dict]:
    """The records without what the clock decides."""
    return [{key: value for key, value in record.items() if key != "rollout/seconds"} for record in kit.timeless(kit.metrics(root))]


# --- what is trained on is what was sampled

PIPES = {
    "plain": [],
    "one prompt at a time": ["--micro-batch-size", 1, "--gradient-accumulation-steps", 4],
    "full": ["--adapter", "none", "--learning-rate", 1e-3],
    "twice": ["--num-iterations", 2, "--max-steps", 4],
    "two steps": ["--steps-per-generation", 2, "--max-steps", 4],
    "vLLM's order of things": ["--async-prefetch"],
    "in parts": ["--streaming-partial-batch"],
}


@pytest.mark.parametrize("what", PIPES)
def test_ids_in_the_loss_are_the_ids_that_were_sampled(what, drawn, batches, steps):
    """With their own log-probs, each once per pass, after the prompt that they were sampled from."""
    records = steps("--no-skip-zero-advantage-batches", *PIPES[what])
    used = [one for _, micro, _ in batches for batch in micro for one in trained(batch)]
    passes = 2 if what == "twice" else 1
    expected = drawn[: len(used) // passes]  # ahead of the last step more may have been sampled
    assert len(used) == len(records) * 16 and sorted(used) == sorted(expected * passes)


SAMPLERS = {
    "as it is": [],
    "cooler": ["--temperature", 0.6],
    "nucleus": ["--top-p", 0.8],
    "few": ["--top-k", 5],
    "likely": ["--min-p", 0.1, "--temperature", 1.3],
    "all": ["--top-p", 0.9, "--top-k", 20, "--min-p", 0.02, "--temperature", 0.6, "--micro-batch-size", 4],
    "full": ["--adapter", "none", "--learning-rate", 1e-3],
    "many": ["--num-generations", 17, "--micro-batch-size", 1],
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("what", SAMPLERS)
def test_sampler_and_trainer_agree_on_every_token(what, steps):
    """In float32, in any batch composition, and also when the weights have moved."""
    for record in steps("--max-steps", 3, *SAMPLERS[what]):
        assert record["sampling/sampling_logp_difference/max"] <= 5e-5 and record["sampling/sampling_logp_difference/mean"] <= 1e-5
        assert abs(record["sampling/importance_sampling_ratio/mean"] - 1) <= 1e-5


@pytest.mark.parametrize(("loss", "shape"), [(loss, (4, 1)) for loss in ("dapo", "grpo", "dr_grpo", "rloo", "gspo")] + [("grpo", (1, 4))])
def test_the_first_loss_is_0_and_its_gradient_is_not(loss, shape, steps):
    """Ratios are 1 and advantages of a prompt sum to 0; completions have one length here, so that no mean changes that."""
    size = ["--micro-batch-size", shape[0], "--gradient-accumulation-steps", shape[1]]
    record = steps("--loss", loss, "--max-steps", 1, "--max-completion-length", 1, *size)[0]
    assert abs(record["train/loss"]) <= 1e-6 and record["grad_norm"] > 1e-3


LOSSES = {
    loss: ["--loss", loss] + (["--epsilon-high", 5] if loss == "cispo" else [])
    for loss in ("dapo", "bnpo", "grpo", "dr_grpo", "gspo", "luspo", "gdpo", "rloo", "reinforce", "cispo", "sapo", "vespo", "gmpo")
}

# Put together from the same parts as others; tests/losses/test_policy_gradient_steps.py cuts steps of them all.
ALIKE = ("bnpo", "luspo", "gdpo", "rloo", "reinforce", "sapo", "dapo", "dr_grpo", "gspo", "gmpo")


@pytest.mark.parametrize("loss", [pytest.param(loss, marks=pytest.mark.slow) if loss in ALIKE else loss for loss in LOSSES])
def test_every_loss_trains_and_no_split_into_micro_batches_changes_it(loss, steps):
    """The policy has moved from what sampled, so that ratios, masks and means all count; also the terms beside the loss."""
    args = [*LOSSES[loss], "--steps-per-generation", 2, "--max-steps", 2, "--learning-rate", 0.05, "--beta", 0.1, "--entropy-coef", 0.01]
    whole = steps(*args, "--micro-batch-size", 4, "--gradient-accumulation-steps", 1, name="whole")
    split = steps(*args, "--micro-batch-size", 1, "--gradient-accumulation-steps", 4, name="split")
    assert whole[1]["kl"] > 0
    for one, other in zip(whole, split, strict=True):
        for key in ("train/loss", "grad_norm", "policy_loss", "kl", "entropy", "reward"):
            assert one[key] == pytest.approx(other[key], rel=2e-5, abs=2e-6), key


# --- the reference


@pytest.fixture
def started(begun, learn, tune):
    """A trained adapter, and the same folded into a model folder; made once, read only."""
    if not (begun / "folded").exists():
        assert learn("--output-dir", begun / "first", "--learning-rate", 0.3).code == 0
        done = tune("merge", begun / "first", begun / "folded", "--max-logit-diff", 9)
        assert done.code == 0, done.err
    return {"ADAPTER": begun / "first" / "adapter", "FOLDED": begun / "folded"}


STARTS = {
    "fresh LoRA": [],
    "resumed LoRA": ["--lora-model-dir", "ADAPTER"],
    "resumed LoRA, norms too": ["--lora-model-dir", "ADAPTER", "--lora-modules-to-save", "norm"],
    "merged": ["--model", "FOLDED"],
    "full": ["--adapter", "none"],
    "full from merged": ["--adapter", "none", "--model", "FOLDED"],
    "DoRA": ["--lora-dora"],
    "PiSSA": ["--lora-init", "pissa", "--lora-alpha-pattern", "q_proj=3"],
    "LoftQ": ["--lora-init", "loftq", "--quant", "nf4"],
    "unfrozen": ["--adapter", "none", "--unfrozen-parameters", "layers"],
}

LATER = ("resumed LoRA, norms too", "full from merged", "DoRA")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("start", [pytest.param(start, marks=pytest.mark.slow) if start in LATER else start for start in STARTS])
def test_nothing_has_moved_at_step_0(start, steps, started):
    args = [started.get(arg, arg) for arg in STARTS[start]]
    records = steps(*args, "--beta", 0.1, "--no-skip-zero-advantage-batches")
    assert records[0]["kl"] == 0 and records[1]["kl"] > 0, "exactly: both run in one packing"


def test_another_model_as_the_reference(tiny, steps):
    """k1 at the start is a plain difference of log-probs, which the two models tell apart by."""
    args = ["--beta", 0.1, "--kl-estimator", "k1", "--max-steps", 1, "--ref-model"]
    assert abs(steps(*args, tiny.same, name="other")[0]["kl"]) > 0.1
    assert steps(*args, tiny.model, name="own")[0]["kl"] == 0


@pytest.mark.parametrize("trains", ["lora", pytest.param("none", marks=pytest.mark.slow)])
def test_a_reference_that_follows_is_the_policy_after_each_sync(trains, kit, here, steps):
    args = ["--adapter", trains, "--beta", 0.1, "--sync-ref-model", "--ref-model-sync-steps", 2, "--ref-model-mixup-alpha", 1]
    records = steps(*args, "--max-steps", 5, "--save-steps", 1, "--save-total-limit", 9, "--optimizer", "sgd", "--learning-rate", 0.1)
    assert [record["kl"] == 0 for record in records] == [True, False, True, False, True]
    for index in range(1, 6):
        held = kit.state(here / "run", index)
        policy = {key.removeprefix("params."): leaf for key, leaf in held.items() if key.startswith("params.")}
        reference = {key.removeprefix("extra.ref."): leaf for key, leaf in held.items() if key.startswith("extra.ref.")}
        assert policy.keys() == reference.keys() and kit.same(policy, reference) == (index % 2 == 0)


def test_adaptive_entropy_moves_its_weight_by_the_rule(kit, here, steps):
    """Skywork-OR1: up by delta where the entropy is at most the target, else down; applied only after an entropy at most the target."""
    args = ["--use-adaptive-entropy", "--entropy-coef", 0.02, "--entropy-coef-delta", 0.01, "--max-steps", 4, "--learning-rate", 1e-5]
    low = steps(*args, "--entropy-target", 0.1, name="low")
    assert [record["entropy_coef"] for record in low] == [0] * 4, "the entropy of random bytes is about 5 nats"
    high = steps(*args, "--entropy-target", 9, name="high")
    assert [record["entropy_coef"] for record in high] == pytest.approx([0, 0.03, 0.04, 0.05])
    kept = kit.state(here / "low", 4)
    assert kept["extra.entropy.coef"] == 0 and kept["extra.entropy.last"] == pytest.approx(low[-1]["entropy"], rel=1e-6)
    capped = steps(*args, "--entropy-target", 9, "--entropy-coef-max", 0.035, name="capped")
    assert [record["entropy_coef"] for record in capped] == pytest.approx([0, 0.03, 0.035, 0.035])


# --- groups without signal


def test_prompts_of_which_nothing_can_be_learned_cost_no_pass(batches, steps):
    """And change no number but what is counted of tokens: the loss and its gradient are 0."""
    for record in steps("--reward-funcs", "rewards.py:same", "--weight-decay", 0):
        assert record["skipped_zero_adv_batches"] == 1 and record["frac_reward_zero_std"] == 1
        assert record["train/loss"] == 0 and record["grad_norm"] == 0 and record["reward_std"] == 0
    assert all(batch["tokens"].shape == (1,) and not batch["seq"].numel() for _, micro, _ in batches for batch in micro)


def test_skipping_changes_no_gradient(kit, here, steps):
    """gsm8k has mostly 0 for everything here; digits is somewhere between."""
    args = ["--reward-funcs", "digits", "--micro-batch-size", 1, "--gradient-accumulation-steps", 4]
    ours, plain = steps(*args, name="a"), steps(*args, "--no-skip-zero-advantage-batches", name="b")
    assert ours[0]["skipped_zero_adv_batches"] > 0 == plain[0]["skipped_zero_adv_batches"]
    for one, other in zip(ours, plain, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-7)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_where_something_else_trains_nothing_is_skipped(steps):
    for record in steps("--reward-funcs", "rewards.py:same", "--entropy-coef", 0.1):
        assert record["skipped_zero_adv_batches"] == 0 and record["grad_norm"] > 0


def test_dynamic_sampling_trains_on_groups_with_signal_only(batches, steps):
    args = ["--reward-funcs", "digits", "--max-steps", 3, "--dynamic-sampling"]
    records = steps(*args)
    assert sum(record["rollout/refills"] for record in records) > 0
    for record, (_, micro, _) in zip(records, batches, strict=True):
        dead = sum(not batch["advantage"].view(-1, 4)[i].any() for batch in micro for i in range(len(batch["advantage"]) // 4))
        assert dead == record["rollout/zero_advantage"] and (dead == 0 or record["rollout/refills"] == 3)


def test_a_replayed_group_stands_in_for_one_without_signal(drawn, batches, steps):
    args = ["--reward-funcs", "digits", "--max-steps", 6, "--replay-buffer-size", 8, "--no-skip-zero-advantage-batches"]
    records = steps(*args)
    assert sum(record["rollout/replayed"] for record in records) > 0 < records[-1]["rollout/stored"] <= 8
    assert max(record["rollout/staleness_max"] for record in records) > 0
    sampled = {(prompt, tuple(ids)) for prompt, ids, _ in drawn}
    for record, (_, micro, _) in zip(records, batches, strict=True):
        assert all((prompt, tuple(ids)) in sampled for batch in micro for prompt, ids, _ in trained(batch))
        assert all("old_logp" in batch for batch in micro), "of the policy of the moment: the ratio of a first pass is 1"
        assert record["clip_ratio/region_mean"] == 0
