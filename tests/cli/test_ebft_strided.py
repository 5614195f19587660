"""`treetune ebft --mode strided` from rows to run folders: what it records, which options change it, resuming, and bad input."""

import dataclasses
import json
import math
import signal

import pytest

from treetune.cli.options import ebft

NUMBERS = {"rl_loss", "cfm_loss", "mean_reward", "alignment", "diversity", "num_blocks", "advantages_std"}
SMALL = ["--stride", 4, "--context-length", 4, "--generate-max-len", 3, "--n-samples-per-prompt", 3]


def asked(count: int = 16) -> list[dict]:
    return [{"input": f"{i} and {i * 7 % 11} make", "output": f" {i + i * 7 % 11}, which is" + " more" * (1 + i % 3)} for i in range(count)]


def arguments(tiny, *args) -> list:
    """Arguments of a short run, those of `args` in place of the basic ones; a None takes one away."""
    base = {
        "--mode": ["strided"], "--model": [tiny.model], "--data": [tiny.text], "--sequence-len": [48], "--lora-r": [4], "--max-steps": [2],
        "--learning-rate": [0.01], "--output-dir": ["run"], "--sample-prompt": [""], "--val-set-size": [4],
    } | {flag: [value] for flag, value in zip(SMALL[::2], SMALL[1::2], strict=True)}  # fmt: skip
    for arg in args:
        if str(arg).startswith("--"):
            values = base[str(arg)] = []
        else:
            values.append(arg)
    if base.get("--adapter") == ["none"]:
        del base["--lora-r"]
    kept = {flag: values for flag, values in base.items() if values != [None]}
    return [part for flag, values in kept.items() for part in ([f"{flag}="] if values == [""] else [flag, *values])]


@pytest.fixture
def train(kit, tiny, here, tune):
    """train(...) -> Done of a run of two steps; `rows` in place of the texts."""

    def run(*args, rows=None):
        if rows is not None:
            kit.write_rows(here / "rows.jsonl", rows)
            args = ("--data", "rows.jsonl", *args)
        return tune("ebft", *arguments(tiny, *args))

    return run


def steps(kit, root) -> list[dict]:
    return [record for record in kit.metrics(root) if "train/loss" in record]


def held(kit, root) -> list[dict]:
    return [record for record in kit.metrics(root) if "eval/loss" in record]


# --- what runs say


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["raw text", "answers", "full, unpacked"])
def test_a_run_records_the_documented_numbers(kind, kit, here, train):
    args = {"raw text": [], "answers": ["--ce-coef", 0.1], "full, unpacked": ["--adapter", "none", "--no-sample-packing"]}[kind]
    done = train(*args, "--eval-steps", 1, "--max-steps", 3, rows=asked() if kind == "answers" else None)
    assert done.code == 0, done.err
    trained, evaluated = steps(kit, here / "run"), held(kit, here / "run")
    assert len(trained) == 3 and len(evaluated) == 4
    for record in trained + evaluated:
        prefix = "eval/" if "eval/loss" in record else ""
        told = {key.removeprefix(f"{prefix}ebft/"): value for key, value in record.items() if key.startswith(f"{prefix}ebft/")}
        also = {"ce_loss"} if prefix or kind == "answers" else set()
        assert told.keys() == NUMBERS | also | ({"anchor_offset"} if kind == "answers" else set())
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))
        near = told["alignment"] - told["diversity"]
        assert told["mean_reward"] == pytest.approx(near, abs=1e-5) and -2 <= told["alignment"] <= 2 and told["cfm_loss"] > 0
        total = told["rl_loss"] + (0.1 * told["ce_loss"] if kind == "answers" else 0)
        assert record["eval/loss" if prefix else "train/loss"] == pytest.approx(total, abs=1e-5)
    assert "eval/perplexity" not in evaluated[0] and "entropy" in trained[0]
    assert "held-out ebft/cfm_loss" in done.out and "mean_reward" in done.out and "loss is" not in done.out
    assert "features: layers 0, 1, 1 of 2, last_token, per_layer" in done.out


def test_the_best_checkpoint_is_the_one_nearest_to_the_true_texts(kit, here, train):
    done = train("--eval-steps", 1, "--max-steps", 5, "--learning-rate", 0.05)
    assert done.code == 0, done.err
    values = {record["step"]: record["eval/ebft/cfm_loss"] for record in held(kit, here / "run")}
    best = min((step for step in values if step), key=values.get)
    assert values[best] < values[0] and best < 5, "neither the first nor the last"
    kept = json.loads((here / "run" / "best.json").read_text())
    assert kept == {"checkpoint": f"step_{best:06d}", "eval_ebft/cfm_loss": values[best]}
    assert f"best at step {best}" in done.out


def test_one_rollout_is_told_once(kit, here, train):
    done = train("--n-samples-per-prompt", 1)
    assert done.code == 0, done.err
    assert done.out.count("one rollout from each anchor: diversity is 0, and the advantage is the reward itself") == 1
    assert all(record["ebft/diversity"] == 0 and record["grad_norm"] > 0 for record in steps(kit, here / "run"))
    done = train("--n-samples-per-prompt", 1, "--advantage-estimator", "reinforce", "--output-dir", "again")
    assert "diversity is 0\n" in done.out
    assert kit.timeless(kit.metrics(here / "again")) == kit.timeless(kit.metrics(here / "run"))


def test_accumulation_and_packing_change_nothing(kit, here, train):
    """One step over all documents, in one stream or in many."""
    cuts = {
        "one": ["--micro-batch-size", 99, "--gradient-accumulation-steps", 1],
        "rows": ["--no-sample-packing", "--micro-batch-size", 2, "--gradient-accumulation-steps", 99],
        "streams": ["--micro-batch-size", 2, "--gradient-accumulation-steps", 99],
    }
    found = {}
    for name, args in cuts.items():
        assert train(*args, "--max-steps", 1, "--ce-coef", 0.1, "--output-dir", name).code == 0
        (found[name],) = steps(kit, here / name)
    for name, record in found.items():
        for key in (*(key for key in record if key.startswith("ebft/")), "train/loss", "grad_norm", "supervised_tokens"):
            # the seed of a step is that of its cursor, the same for all three
            assert record[key] == pytest.approx(found["one"][key], rel=2e-4, abs=2e-5), (name, key)


# --- data


def chats(count: int = 16) -> list[dict]:
    said = [("user", "say {}"), ("assistant", "it is {}, as was said"), ("user", "and now?"), ("assistant", "now it is {} no more")]
    return [{"messages": [{"role": role, "content": text.format(i)} for role, text in said]} for i in range(count)]


FORMATS = {
    "ebft_pretrain.transform": [{"text": "the cat sat " * (2 + i % 3)} for i in range(16)],
    "ebft_strided_structured.transform": asked(),
    "ebft_strided_chat.transform": chats(),
    "pretokenised": [{"input_ids": [5 + (i + k) % 40 for k in range(20)], "prompt_length": i % 3} for i in range(16)],
}


# An example of ebft_strided_structured.transform is run by test_startup.py.
LATER = ("ebft_strided_structured.transform",)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in LATER else name for name in FORMATS])
def test_columns_tell_the_transform(name, kit, here, train):
    done = train("--sequence-len", 160, "--sample-prompt", None, "--sample-tokens", 3, rows=FORMATS[name])
    assert done.code == 0, done.err
    assert f"train rows.jsonl: {name}: 12 rows -> 12 documents" in " ".join(done.out.split()) and "blocks" in done.out
    assert len(kit.samples(here / "run")) == 2
    named = ["--format", name, "--sample-prompt", "hello", "--output-dir", "named"]
    assert train("--sequence-len", 160, "--sample-tokens", 3, *named, rows=FORMATS[name]).code == 0
    assert kit.samples(here / "named")[0]["prompt"] == "hello"
    assert kit.timeless(kit.metrics(here / "run")) == kit.timeless(kit.metrics(here / "named"))


TRANSFORM = """
def ids(cfg, **kwargs):
    def one(row, tokenizer=None):
        prompt, answer = tokenizer(row["input"])["input_ids"], tokenizer(row["output"])["input_ids"]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "prompt_length": len(prompt)}
    return one, {"remove_columns": "__all__"}
"""


def test_a_transform_of_ones_own(kit, here, train):
    """As an option, or as the type of a data set; the numbers are those of the built-in one."""
    (here / "mine.py").write_text(TRANSFORM)
    assert (done := train("--format", "mine.ids", rows=asked())).code == 0, done.err
    (here / "own.yaml").write_text("datasets:\n- path: rows.jsonl\n  type: mine.ids\n")
    done = train("--data", None, "--config", "own.yaml", "--output-dir", "listed")
    assert done.code == 0, done.err
    assert train("--output-dir", "plain", rows=asked()).code == 0
    first = kit.timeless(kit.metrics(here / "plain"))
    assert kit.timeless(kit.metrics(here / "run")) == kit.timeless(kit.metrics(here / "listed")) == first


def test_prepared_rows_are_read_again_only_for_the_same_blocks(kit, here, train):
    args = ["--dataset-prepared-path", "prepared"]
    assert "prepared earlier" not in train(*args).out
    again = train(*args, "--output-dir", "again")
    assert "prepared earlier" in again.out and kit.timeless(kit.metrics(here / "again")) == kit.timeless(kit.metrics(here / "run"))
    assert "prepared earlier" not in train(*args, "--context-length", 12, "--output-dir", "other").out


def test_short_documents_train_on_cross_entropy_alone(kit, here, train):
    rows = [{"text": "x" * (3 if i % 2 else 20)} for i in range(16)]
    assert "documents dropped (no room for a block" in train("--val-set-size", 0, rows=rows).out
    done = train("--val-set-size", 0, "--ce-coef", 0.1, "--output-dir", "kept", rows=rows)
    assert done.code == 0 and "8 documents for cross-entropy alone" in " ".join(done.out.split())
    short = [{"text": "x" * 3} for _ in range(16)]
    kit.refused(train("--output-dir", "none", rows=short), "not one document to train on", "no room for a block", "lower context_length")
    kit.refused(train("--ce-coef", 0.1, "--output-dir", "none", rows=short), "not one of 12 documents has room for a block")
    assert not (here / "none").exists()
    done = train("--ce-coef", 0.1, "--rl-coef", 0, "--output-dir", "alone", rows=short)
    assert done.code == 0, done.err
    assert all("ebft/cfm_loss" not in record and record["grad_norm"] > 0 for record in steps(kit, here / "alone"))


# --- options

MARKED = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ mark }}{{ m.content }}<|im_end|>\n{% endfor %}"
# option -> (the arguments that set it, arguments on both sides)
CHANGES = {
    "feature_layers": (["--feature-layers", 0.0, 1.0], []),
    "embed_method": (["--embed-method", "concat"], []),
    "feature_norm": (["--feature-norm", "joint"], []),
    "use_whitening": (["--use-whitening"], []),
    "whitening_space": (["--whitening-space", "rows"], ["--use-whitening"]),
    "alignment_coef": (["--alignment-coef", 0.5], []),
    "diversity_coef": (["--diversity-coef", 0.5], []),
    "ce_coef": (["--ce-coef", 0.1], []),
    "stride": (["--stride", 5], []),
    "context_length": (["--context-length", 5], []),
    "generate_max_len": (["--generate-max-len", 4], []),
    "n_samples_per_prompt": (["--n-samples-per-prompt", 2], []),
    "rl_coef": (["--rl-coef", 0.5], []),
    "advantage_estimator": (["--advantage-estimator", "group_norm"], []),
    "min_completion_prefix": (["--min-completion-prefix", 6], ["--data", "asked.jsonl"]),
    "temperature": (["--temperature", 0.9], []),
    "top_p": (["--top-p", 0.5], []),
    "chat_template_kwargs": (["--chat-template-kwargs", "mark=now"], ["--data", "chats.jsonl", "--sequence-len", 200]),
    "chat_template": (["--chat-template", MARKED.replace("mark", "'so'")], ["--data", "chats.jsonl", "--sequence-len", 200]),
    "overlong": (["--overlong", "drop"], ["--data", "asked.jsonl", "--sequence-len", 34]),
    "sequence_len": (["--sequence-len", 30], []),
    "sample_packing": (["--no-sample-packing"], []),
    "lora_dropout": (["--lora-dropout", 0.5], []),
    "seed": (["--seed", 5], []),
}
SAME_NUMBERS = ("feature_device",)  # where the frozen network is
STRUCTURED = ("mode", "adaptive_max_tokens", "gt_length_multiplier")


def test_there_is_a_row_for_every_option_of_the_mode():
    known = {field.name for field in dataclasses.fields(ebft.EbftOptions)}
    assert known <= {*CHANGES, *SAME_NUMBERS, *STRUCTURED}


@pytest.fixture(scope="module")
def plain_numbers():
    """{arguments: the numbers of a run with them}: many options are compared with the same one."""
    return {}


# What the method shares with others, whose tests change it, and what only scales a term.
SHARED = ("diversity_coef", "rl_coef", "top_p", "chat_template", "sequence_len", "lora_dropout", "seed")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("option", [pytest.param(name, marks=pytest.mark.slow) if name in SHARED else name for name in CHANGES])
def test_option_changes_the_training(option, plain_numbers, kit, here, train):
    kit.write_rows(here / "asked.jsonl", asked())
    kit.write_rows(here / "chats.jsonl", chats())
    own, both = CHANGES[option]
    both = [*both, "--chat-template", MARKED] if option == "chat_template_kwargs" else both

    def numbers(name, *args):
        assert (done := train("--val-set-size", 0, *args, "--output-dir", name)).code == 0, done.err
        return [(record["train/loss"], record["grad_norm"]) for record in steps(kit, here / name)]

    if str(both) not in plain_numbers:
        plain_numbers[str(both)] = numbers("plain", *both)
    assert plain_numbers[str(both)] != numbers("changed", *both, *own), "the numbers of training, not only what is printed"


@pytest.mark.parametrize("trains", ["lora", pytest.param("none", marks=pytest.mark.slow)])
def test_a_network_in_main_memory_says_the_same(trains, kit, here, train):
    assert train("--adapter", trains).code == 0
    assert train("--adapter", trains, "--feature-device", "cpu", "--output-dir", "copy").code == 0
    assert kit.timeless(kit.metrics(here / "copy")) == kit.timeless(kit.metrics(here / "run"))


REFUSED = {
    "transform of another mode": (["--format", "ebft_opencode.transform"], "ebft_opencode"),
    "template of raw text": (["--chat-template", "chatml"], "chat-template would be ignored", "ebft_pretrain.transform do not take it"),
    "template options of raw text": (["--chat-template-kwargs", "a=1"], "chat-template-kwargs would be ignored"),
    "length policy of raw text": (["--overlong", "drop"], "overlong would be ignored", "raw text is split"),
    "no transform": (["--format", "nowhere.ids"], "no module nowhere"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_options_that_cannot_be_are_one_line(what, kit, here, train):
    args, *words = REFUSED[what]
    kit.refused(train(*args), *words)
    assert not (here / "run").exists()


# --- killed and resumed

STEPS = 5
CRASHES = {"lora": ["--lora-dropout", 0.2], "full": ["--adapter", "none", "--ce-coef", 0.1, "--use-whitening"]}


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_killed_run_resumes_bit_for_bit(kind, kit, tiny, here, tune, train, forked):
    args = [*CRASHES[kind], "--max-steps", STEPS, "--save-steps", 2, "--eval-steps", 3, "--micro-batch-size", 1]
    assert train(*args, "--output-dir", "whole").code == 0
    crashed = arguments(tiny, *args)
    assert forked(kit.die_at(4), "ebft", *crashed).code == -signal.SIGKILL
    assert steps(kit, here / "run")[-1]["step"] < STEPS
    done = tune("ebft", *crashed, "--resume", "auto")
    assert done.code == 0, done.err
    one, other = kit.left(here / "whole", STEPS), kit.left(here / "run", STEPS)
    assert kit.same(one[0], other[0]) and kit.same(one[1], other[1]) and one[2] == other[2]


def test_a_run_again_from_its_own_config(kit, here, tune, train):
    assert train().code == 0
    assert (done := tune("ebft", "--config", "run/config.yaml", "--output-dir", "again")).code == 0, done.err
    assert kit.timeless(kit.metrics(here / "again")) == kit.timeless(kit.metrics(here / "run"))
