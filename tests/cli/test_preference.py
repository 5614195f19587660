"""The preference and reward commands from rows to run folders: references, what they leave, resuming, and bad input."""

import math
import signal

import pytest
import torch

COMMANDS, AGAIN = ("dpo", "kto", "orpo", "simpo", "cpo", "reward", "prm"), ("dpo", "kto", "reward")


def pair(i: int, **more) -> dict:
    right, wrong = i + i * 7 % 11, i + 1 + i * 5 % 7
    prompt = f"{i} + {i * 7 % 11}" + " please" * (i % 3) + " ="
    return {"prompt": prompt, "chosen": f" {right}" + "!" * (i % 4), "rejected": f" {wrong}" + " or so" * (i % 2) + "?"} | more


def judgement(i: int) -> dict:
    row = pair(i)
    return {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}


def stepped(i: int) -> dict:
    return {"prompt": f"{i} + 2 - 1?", "completions": [f"{i} + 2 = {i + 2 + i % 2}", f"so {i + 1}"], "labels": [i % 2 == 0, i % 3 > 0]}


def rows_of(command: str) -> list[dict]:
    return [{"kto": judgement, "prm": stepped}.get(command, pair)(i) for i in range(20)]


def arguments(tiny, command, *args) -> list:
    """Arguments of a short run, those of `args` in place of the basic ones."""
    base = {
        "--model": [tiny.model], "--data": [f"{command}.jsonl"], "--sequence-len": [128], "--lora-r": [4], "--max-steps": [2],
        "--learning-rate": [0.01], "--output-dir": ["run"], "--sample-prompt": [""], "--val-set-size": [6],
    }  # fmt: skip
    for arg in args:
        if str(arg).startswith("--"):
            values = base[str(arg)] = []
        else:
            values.append(arg)
    full, resumed = base.get("--adapter") == ["none"], "--lora-model-dir" in base
    drop = {"--lora-r"} if full or resumed else set()
    drop |= {"--sample-prompt"} if command in ("reward", "prm") else set()
    kept = {flag: values for flag, values in base.items() if flag not in drop}
    return [part for flag, values in kept.items() for part in ([f"{flag}="] if values == [""] else [flag, *values])]


@pytest.fixture
def train(kit, tiny, here, tune):
    """train("dpo", ...) -> Done of a run of two steps on 20 rows; arguments add to or replace the basic ones."""

    def run(command, *args, rows=None):
        kit.write_rows(here / f"{command}.jsonl", rows_of(command) if rows is None else rows)
        return tune(command, *arguments(tiny, command, *args))

    return run


def first_step(kit, root) -> dict:
    return next(record for record in kit.metrics(root) if "train/loss" in record)


def evaluations(kit, root) -> list[dict]:
    return [record for record in kit.metrics(root) if "eval/loss" in record]


# --- what runs say

PER_PAIR = {
    f"{what}/{side}" for what in ("rewards", "logps") for side in ("chosen", "rejected")
} | {"rewards/margins", "rewards/accuracies", "mean_token_accuracy"}  # fmt: skip
DOCUMENTED = {
    "dpo": PER_PAIR | {"kl", "nll_loss"},
    "kto": PER_PAIR | {"kl"},
    "orpo": PER_PAIR | {"nll_loss", "log_odds_ratio", "log_odds_chosen"},
    "simpo": PER_PAIR | {"nll_loss"},
    "cpo": PER_PAIR | {"nll_loss"},
    "reward": {"mean_reward", "min_reward", "max_reward", "accuracy", "margin"},
    "prm": {"accuracy", "accuracy/good", "accuracy/bad"},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_records_the_documented_numbers_and_shows_its_own(command, kit, here, train):
    done = train(command, "--max-steps", 3, "--eval-steps", 1, "--no-sample-packing", "--micro-batch-size", 4)
    assert done.code == 0, done.err
    steps = [record for record in kit.metrics(here / "run") if "train/loss" in record]
    held = evaluations(kit, here / "run")
    assert len(steps) == 3 and len(held) == 4
    for record in steps:
        assert DOCUMENTED[command] | {"num_tokens", "grad_norm", "learning_rate"} <= record.keys()
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
    for record in held:
        also = set() if command in ("reward", "prm") else {"logits/chosen", "logits/rejected", "entropy"}
        assert {f"eval/{name}" for name in DOCUMENTED[command] | also} <= record.keys() and "eval/perplexity" not in record
    assert all(f"held-out {name}" in done.out for name in {"reward": ("accuracy", "margin"), "prm": ("accuracy",)}.get(command, ()))
    assert (command in ("reward", "prm")) == ("treetune score" in done.out)


# --- the reference


def moves(kit, root) -> tuple:
    record = first_step(kit, root)
    return record["kl"], record["rewards/chosen"], record["rewards/rejected"]


@pytest.fixture
def started(begun, tune, train):
    """A trained adapter, and the same folded into a model folder."""
    if not (begun / "folded").exists():
        assert train("dpo", "--output-dir", begun / "sft", "--learning-rate", 0.3).code == 0
        done = tune("merge", begun / "sft", begun / "folded", "--max-logit-diff", 9)
        assert done.code == 0, done.err
    return begun / "sft" / "adapter", begun / "folded"


KINDS = {
    "DoRA": ["--lora-dora"],
    "PiSSA": ["--lora-init", "pissa"], "CorDA": ["--lora-init", "corda", "--lora-init-rows", 3],
    "LoftQ": ["--lora-init", "loftq", "--quant", "nf4"],
    "QERA": ["--lora-init", "qera", "--quant", "nf4", "--lora-init-rows", 3],
    "unfrozen": ["--adapter", "none", "--unfrozen-parameters", r"layers\.1", "^norm$"],
}  # fmt: skip

STARTS = ("fresh LoRA", "resumed LoRA", "merged", "full", "full from merged", "resumed LoRA, norms too", *KINDS)
SOME, LATER = ("resumed LoRA", "full"), ("full from merged", "resumed LoRA, norms too")
MOVING = [pytest.param("dpo", start, marks=pytest.mark.slow) for start in LATER] + [
    ("kto", start) if start in SOME else pytest.param("kto", start, marks=pytest.mark.slow) for start in STARTS
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("command", "start"), [("dpo", start) for start in STARTS if start not in LATER] + MOVING)
def test_nothing_has_moved_at_step_0(command, start, kit, tiny, here, train, started):
    """Exactly 0 where both run in one packing; within 1e-6 where the reference was computed once, in another.

    KTO's kl is of whole completions, of about ten tokens, not of tokens: within 1e-5.
    """
    adapter, folded = started
    args = {
        "fresh LoRA": [],
        "resumed LoRA": ["--lora-model-dir", adapter],
        "resumed LoRA, norms too": ["--lora-model-dir", adapter, "--lora-modules-to-save", "norm"],
        "merged": ["--model", folded],
        "full": ["--adapter", "none"],
        "full from merged": ["--adapter", "none", "--model", folded],
    }
    args = (args | KINDS)[start]
    for more, name in (((), "direct"), (("--precompute-ref-logps",), "once")):
        assert (done := train(command, *args, *more, "--output-dir", name)).code == 0, done.err
        told, held = moves(kit, here / name), evaluations(kit, here / name)[0]
        told = (*told, held["eval/kl"], held["eval/rewards/chosen"], held["eval/rewards/rejected"])
        near = {"kl": 1e-5 if command == "kto" else 1e-6}
        bounds = [near.get(key, 1e-6) for key in ("kl", "chosen", "rejected")] * 2
        assert told == (0,) * 6 if name == "direct" else all(abs(x) <= bound for x, bound in zip(told, bounds, strict=True)), told
    direct, once = (evaluations(kit, here / name)[-1] for name in ("direct", "once"))
    assert direct["eval/rewards/chosen"] != 0, "the policy moves and its reference does not"
    assert direct["eval/loss"] == pytest.approx(once["eval/loss"], abs=1e-5)


def test_another_model_as_the_reference(kit, tiny, here, train):
    """rewards/chosen is beta times what separates the policy from that model, which a run of its own tells."""
    args = ["--ref-model", tiny.same, "--rl-beta", 0.2]
    assert train("dpo", *args).code == 0
    assert train("dpo", "--model", tiny.same, "--output-dir", "other").code == 0
    ours, theirs = (evaluations(kit, here / name)[0] for name in ("run", "other"))
    for side in ("chosen", "rejected"):
        apart = ours[f"eval/logps/{side}"] - theirs[f"eval/logps/{side}"]
        assert abs(apart) > 0.1 and ours[f"eval/rewards/{side}"] == pytest.approx(0.2 * apart, rel=1e-4)
    assert train("dpo", *args, "--precompute-ref-logps", "--output-dir", "once").code == 0
    for one, other in zip(evaluations(kit, here / "run"), evaluations(kit, here / "once"), strict=True):
        assert one["eval/loss"] == pytest.approx(other["eval/loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("trains", "command"),
    [("lora", "dpo"), ("none", "kto"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("lora", "kto"), ("none", "dpo")))],
)
def test_a_reference_that_follows_is_the_policy_after_each_sync(command, trains, kit, here, train):
    """Copied every second step: nothing separates them at steps 1, 3 and 5. It is in the checkpoints, and no alias of the policy."""
    args = ["--adapter", trains, "--sync-ref-model", "--ref-model-sync-steps", 2, "--ref-model-mixup-alpha", 1, "--max-steps", 5]
    assert train(command, *args, "--save-steps", 1, "--save-total-limit", 9, "--optimizer", "sgd", "--learning-rate", 1).code == 0
    moved = [record["rewards/rejected"] for record in kit.metrics(here / "run") if "train/loss" in record]
    assert [value == 0 for value in moved] == [True, False, True, False, True], moved
    for step in range(1, 6):
        held = kit.state(here / "run", step)
        policy = {key.removeprefix("params."): leaf for key, leaf in held.items() if key.startswith("params.")}
        reference = {key.removeprefix("extra.ref."): leaf for key, leaf in held.items() if key.startswith("extra.ref.")}
        assert policy.keys() == reference.keys() and kit.same(policy, reference) == (step % 2 == 0)


def test_a_reference_that_follows_in_part(kit, here, train):
    args = ["--adapter", "none", "--sync-ref-model", "--ref-model-sync-steps", 1, "--ref-model-mixup-alpha", 0.25, "--max-steps", 2]
    assert train("dpo", *args, "--save-steps", 1, "--save-total-limit", 9).code == 0
    first, second = kit.state(here / "run", 1), kit.state(here / "run", 2)
    for key, leaf in second.items():
        if key.startswith("extra.ref."):
            expected = 0.25 * second["params" + key.removeprefix("extra.ref")] + 0.75 * first[key]
            torch.testing.assert_close(leaf, expected, rtol=1e-6, atol=1e-7)


# --- killed and resumed

STEPS = 5
CRASHES = {
    "dpo": ("dpo", ["--lora-dropout", 0.2, "--loss", "dpo", "sft"]),
    "dpo full": ("dpo", ["--adapter", "none"]),
    "dpo, synced": ("dpo", ["--adapter", "none", "--sync-ref-model", "--ref-model-sync-steps", 2, "--ref-model-mixup-alpha", 0.3]),
    "dpo, reference once": ("dpo", ["--adapter", "none", "--precompute-ref-logps"]),
    "kto": ("kto", ["--lora-dropout", 0.2]),
    "bco": ("kto", ["--loss", "bco"]),
    "orpo": ("orpo", ["--lora-dropout", 0.2]),
    "reward": ("reward", ["--lora-dropout", 0.2]),
    "reward full": ("reward", ["--adapter", "none"]),
    "prm": ("prm", []),
}

SOON = ("dpo, synced", "bco", "reward")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [kind if kind in SOON else pytest.param(kind, marks=pytest.mark.slow) for kind in CRASHES])
def test_killed_run_resumes_bit_for_bit(kind, kit, tiny, here, tune, train, forked):
    command, own = CRASHES[kind]
    args = [*own, "--max-steps", STEPS, "--save-steps", 2, "--eval-steps", 3, "--micro-batch-size", 1]
    assert train(command, *args, "--output-dir", "whole").code == 0
    crashed = arguments(tiny, command, *args)
    assert forked(kit.die_at(4), command, *crashed).code == -signal.SIGKILL
    assert [record["step"] for record in kit.metrics(here / "run") if "train/loss" in record][-1] < STEPS
    done = tune(command, *crashed, "--resume", "auto")
    assert done.code == 0, done.err
    one, other = kit.left(here / "whole", STEPS), kit.left(here / "run", STEPS)
    assert kit.same(one[0], other[0]) and kit.same(one[1], other[1]) and one[2] == other[2]
    extra = {key for key in one[0] if key.startswith("extra.")}
    assert bool(extra) == (kind in ("dpo, synced", "bco"))
    assert any("score" in key for key in one[1]) == (command in ("reward", "prm"))


def test_kept_log_probs_are_used_again_only_by_the_same_reference(kit, tiny, here, train):
    args = ["--precompute-ref-logps", "--dataset-prepared-path", "prepared"]
    said = "reference log-probs of 14 documents: prepared earlier"
    assert said not in train("dpo", *args).out
    again = train("dpo", *args, "--output-dir", "again")
    assert said in again.out and kit.timeless(kit.metrics(here / "again")) == kit.timeless(kit.metrics(here / "run"))
    for name, other in (("model", ["--ref-model", tiny.same]), ("rows", ["--sequence-len", 30])):
        done = train("dpo", *args, *other, "--output-dir", name)
        assert done.code == 0 and said not in done.out, name


def test_kept_log_probs_are_not_those_of_another_dtype(kit, here, train):
    """Weights that are stored in bfloat16 are the same numbers in both."""
    from safetensors.torch import save_file

    weights = kit.write_model(here / "rounded") / "model.safetensors"
    save_file({key: leaf.bfloat16() for key, leaf in kit.tensors(weights).items()}, weights, {"format": "pt"})
    args = ["--model", "rounded", "--adapter", "none", "--precompute-ref-logps", "--dataset-prepared-path", "prepared"]
    assert train("dpo", *args, "--dtype", "bfloat16", "--output-dir", "half").code == 0
    assert train("dpo", *args).code == 0 and abs(first_step(kit, here / "run")["rewards/chosen"]) <= 1e-6


@pytest.mark.parametrize("command", [name if name in AGAIN else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS])
def test_a_run_again_from_its_own_config(command, kit, here, tune, train):
    assert train(command, "--optimizer", "sgd").code == 0
    assert tune(command, "--config", "run/config.yaml", "--output-dir", "again").code == 0
    assert kit.timeless(kit.metrics(here / "again")) == kit.timeless(kit.metrics(here / "run"))


@pytest.mark.parametrize("args", [["cpo", "--loss", "hinge", "--cpo-alpha", 0, "--rl-beta", 5], ["dpo", "--loss", "hinge", "--rl-beta", 9]])
def test_a_hinge_that_every_pair_clears_is_no_failure(args, kit, here, train):
    """Its loss and its gradient are exactly 0, which elsewhere means that leaves are cut off."""
    rows = [pair(i, chosen=" 1", rejected=" 2" * 15) for i in range(20)]
    done = train(*args, "--learning-rate", 0.3, "--max-steps", 3, rows=rows)
    assert done.code == 0, done.err
    assert next(record for record in kit.metrics(here / "run") if record["step"] == 2 and "train/loss" in record)["train/loss"] == 0


# --- bad rows: dropped and counted, or one line

GOOD = [pair(i) for i in range(20)]


def with_row(i: int, **changes) -> list[dict]:
    """Twenty good pairs, two of which (so that one trains) are changed."""
    return [GOOD[k] | changes if k in (i, i + 1) else GOOD[k] for k in range(20)]


DROPPED = {
    "identical": (with_row(6, chosen=" 5", rejected=" 5"), "identical completions"),
    "empty": (with_row(6, rejected=""), "an empty completion"),
    "blank": (with_row(6, chosen=" \n"), "an empty completion"),
    "full": (with_row(6, prompt="x" * 200), "a prompt that fills sequence_len"),
    "alike once cut": (
        with_row(6, prompt="x" * 110, chosen="y" * 30 + "a", rejected="y" * 30 + "b"),
        "identical completions after the cut",
    ),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("command", "what"),
    [("dpo", what) for what in DROPPED]
    + [("orpo", "empty"), ("reward", "identical")]
    + [pytest.param(name, what, marks=pytest.mark.slow) for name in ("orpo", "reward") for what in list(DROPPED)[2:]],
)
def test_pairs_that_cannot_be_learned_from_are_dropped_and_counted(what, command, kit, here, train):
    rows, reason = DROPPED[what]
    done = train(command, "--overlong", "truncate", "--val-set-size", 0, rows=rows)
    assert done.code == 0 and f"dropped 2 rows ({reason})" in " ".join(done.out.split()), done.out
    assert "18 documents" in done.out and all(math.isfinite(record["train/loss"]) for record in kit.metrics(here / "run"))


def test_an_empty_judged_completion_is_dropped_and_counted(kit, here, train):
    rows = [judgement(i) | ({"completion": " "} if i in (4, 5) else {}) for i in range(20)]
    done = train("kto", "--val-set-size", 0, rows=rows)
    assert done.code == 0 and "dropped 2 rows (an empty completion)" in " ".join(done.out.split())
    assert all(math.isfinite(record["train/loss"]) for record in kit.metrics(here / "run"))


def test_a_long_completion_costs_no_row_but_its_own(kit, here, train):
    """It is also the foreign completion of the row after it, where what does not fit of it is left out."""
    rows = [judgement(i) | ({"completion": "y" * 60} if i in (6, 11) else {}) for i in range(20)]
    done = train("kto", "--val-set-size", 0, "--sequence-len", 50, rows=rows)
    assert done.code == 0, done.err
    assert "20 rows -> 18 documents" in done.out and "dropped 2 rows (longer than sequence_len)" in " ".join(done.out.split())
    assert all(math.isfinite(record["train/loss"]) for record in kit.metrics(here / "run"))
    longest = max(len(row["prompt"] + row["completion"]) + 1 for row in rows)
    args = ["--sequence-len", longest, "--overlong", "error", "--output-dir", "strict"]
    assert train("kto", "--val-set-size", 0, *args, rows=rows).code == 0


BAD = {
    "all identical": ("dpo", [pair(i, chosen=" 5", rejected=" 5") for i in range(20)], "not one row", "14 identical completions"),
    "all empty": ("simpo", [pair(i, rejected="") for i in range(20)], "not one row", "14 an empty completion"),
    "all prompts full": ("cpo", [pair(i, prompt="x" * 200) for i in range(20)], "not one row", "raise sequence_len", "211"),
    "all bad": ("kto", [judgement(2 * i) for i in range(20)], "0 rows are desirable .* and 14 undesirable", "expected some of both"),
    "all good": ("kto", [judgement(2 * i + 1) for i in range(20)], "14 rows are desirable .* and 0 undesirable", "expected some of both"),
    "one prompt": ("kto", [judgement(i) | {"prompt": "same"} for i in range(20)], "one prompt", "add rows with other prompts"),
    "margins in some": ("reward", [*GOOD[:9], pair(9, margin=0.5), pair(10, margin=1), *GOOD[11:]], "margin", "in all rows or in none"),
    "margin not a number": ("reward", [pair(i, margin="big") for i in range(20)], "reward.jsonl line", "margin is 'big'", "a number"),
    "margin not finite": ("reward", [pair(i, margin=math.nan) for i in range(20)], "reward.jsonl line", "margin is nan"),
    "no verdict": ("kto", [judgement(i) | {"label": "maybe"} for i in range(20)], "kto.jsonl line", "'maybe'", "true or false"),
    "labels of fewer steps": ("prm", [stepped(i) | {"labels": [True]} for i in range(20)], "prm.jsonl line", "1 entries for 2"),
    "rows of another command": ("kto", GOOD, "prompt, chosen, rejected", "completion . label"),
    "texts": ("dpo", [{"text": "a"}] * 20, "the columns text do not tell the format"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_rows_are_one_line(what, kit, here, train):
    command, rows, *words = BAD[what]
    kit.refused(train(command, rows=rows), *words)
    assert not (here / "run").exists()


def test_a_reward_head_reads_the_end_of_each_answer(kit):
    """Exactly one row per side: its last token, which is the EOS that closes it."""
    from treetune.core.data import kinds, pack, sources

    tokenizer = kit.tokenizer()
    talks = [{"input": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in GOOD]
    for rows, name in ((GOOD, "passthrough"), (talks, "bradley_terry.chat_template")):
        docs, _ = kinds.KINDS["ranked"].encode(sources.Rows(name, rows, list(range(20))), tokenizer, format=name)
        batch = pack.collate_trees(docs, read="last")
        assert batch["seq_lens"].tolist() == [1] * 40
        assert (batch["tokens"][batch["at"]] == tokenizer.eos_token_id).all()
        ends = [i for i in range(len(batch["tokens"])) if batch["branch"][i : i + 2].unique().numel() != 1 or i + 1 in batch["cu_docs"]]
        assert batch["at"].tolist() == [i for i in ends if batch["branch"][i] > 0]


def test_truncation_never_cuts_into_a_prompt_or_a_step(kit):
    """At every length a document that is left has its whole prompt, and of reasoning only whole steps."""
    from treetune.core.data import kinds, sources

    tokenizer, name = kit.tokenizer(), "passthrough"

    def encoded(kind, rows, size, form):
        try:
            return kinds.KINDS[kind].encode(sources.from_list(rows), tokenizer, format=form, sequence_len=size, overlong="truncate")[0]
        except ValueError as error:
            assert "not one row to train on" in str(error)
            return []

    whole = {doc.row: doc for doc in encoded("pairs", GOOD, None, name)}
    judged = {doc.row: doc for doc in encoded("steps", [stepped(i) for i in range(20)], None, "stepwise_supervised")}
    kept = set()
    for size in range(2, 40):
        for doc in encoded("pairs", GOOD, size, name):
            prompts = [one.tokens[one.branch == 0].tolist() for one in (doc, whole[doc.row])]
            assert prompts[0] == prompts[1] and all(doc.weight[doc.branch == side].any() for side in (1, 2))
            kept.add((size, doc.row))
        for doc in encoded("steps", [stepped(i) for i in range(20)], size, "stepwise_supervised"):
            length = len(doc.tokens)
            assert doc.classes[-1] >= 0 and doc.tokens.tolist() == judged[doc.row].tokens[:length].tolist()
            assert (doc.classes == judged[doc.row].classes[:length]).all()
    assert 0 < len(kept) < 38 * 20
