"""`treetune score` on tiny reward models: the numbers of transformers, in whatever batches, and what it refuses."""

import json
import math
import shlex

import pytest
import torch

from treetune.core import lora, tree
from treetune.models import adapter, heads, hf

PAIRS = [
    {"prompt": f"{i} + {i}?", "chosen": f" {2 * i}." + " Sure." * (i % 3), "rejected": f" {2 * i + 1}!" + " So." * (i % 2)}
    for i in range(9)
]
TALKS = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}" + "!" * (i % 4)}]} for i in range(7)]
STEPS = [
    {"prompt": f"Add {i}.\n", "completions": [f"{i} is {i}.", "So what?"][: 1 + i % 2], "labels": [i % 3 > 0, False][: 1 + i % 2]}
    for i in range(8)
]


def head_of(model, classes):
    fresh = heads.init(model.cfg, classes, bias=classes > 1, seed=0)
    generator = torch.Generator().manual_seed(1)
    return tree.map(lambda leaf: leaf + torch.randn(leaf.shape, generator=generator), fresh)


@pytest.fixture(scope="module")
def folders(tiny, kit, tmp_path_factory):
    """Folders of models with heads over the tiny model, and files of rows."""
    root = tmp_path_factory.mktemp("score")
    model = hf.load(tiny.long)
    for name, classes in (("reward", 1), ("prm", 2)):
        heads.save(root / name, model, head_of(model, classes), tokenizer=kit.tokenizer())
    for name, rows in (("pairs", PAIRS), ("talks", TALKS), ("steps", STEPS)):
        kit.write_rows(root / f"{name}.jsonl", rows)
    kit.write_rows(root / "answers.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])
    kit.write_rows(root / "unjudged.jsonl", [{key: row[key] for key in ("prompt", "completions")} for row in STEPS])
    return root


def auto(what):
    import transformers

    return {"sequence": transformers.AutoModelForSequenceClassification, "token": transformers.AutoModelForTokenClassification}[what]


def logits(path, what, ids):
    with torch.no_grad():
        return auto(what).from_pretrained(path, dtype=torch.float64)(torch.tensor([ids])).logits[0]


def value(done, name):
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith(name))
    return float(line.split()[len(name.split())])


def plain(kit, path, row, side):
    return logits(path, "sequence", kit.tokenizer()(row["prompt"] + row[side] + "<|im_end|>")["input_ids"]).item()


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pairs_are_scored_as_by_transformers(folders, kit, tune, here):
    done = tune("score", folders / "reward", "--data", folders / "pairs.jsonl", "--output", "out.jsonl", "--show", 2)
    rows = written(here / "out.jsonl")
    expected = [[plain(kit, folders / "reward", row, side) for side in ("chosen", "rejected")] for row in PAIRS]
    for row, pair, source in zip(rows, expected, PAIRS, strict=True):
        assert {key: row[key] for key in source} == source and row.keys() - source.keys() == {"chosen_score", "rejected_score"}
        assert [row["chosen_score"], row["rejected_score"]] == pytest.approx(pair, abs=1e-4)  # float32 against float64
    margins = [chosen - rejected for chosen, rejected in expected]
    accuracy = sum(margin > 0 for margin in margins) / len(margins)
    assert 0 < accuracy < 1 and value(done, "accuracy") == pytest.approx(accuracy, abs=1e-4)
    assert value(done, "margin") == pytest.approx(sum(margins) / len(margins), abs=2e-4)
    assert value(done, "pairs") == len(PAIRS) and "passthrough: 9 rows -> 9 documents" in done.out
    assert f"line 1: {expected[0][0]:.2f}" in done.out and "line 2: " in done.out and "line 3: " not in done.out


@pytest.mark.parametrize("options", [("--micro-batch-size", 1, "--sequence-len", 64), ("--micro-batch-size", 100)])
def test_batches_change_no_score(folders, tune, here, options):
    tune("score", folders / "reward", "--data", folders / "pairs.jsonl", folders / "talks.jsonl", "--output", "a.jsonl")
    tune("score", folders / "reward", "--data", folders / "pairs.jsonl", folders / "talks.jsonl", "--output", "b.jsonl", *options)
    one, other = written(here / "a.jsonl"), written(here / "b.jsonl")
    assert len(one) == len(other) == len(PAIRS) + len(TALKS)
    for a, b in zip(one, other, strict=True):
        for name in {"score", "chosen_score", "rejected_score"} & a.keys():
            assert a[name] == pytest.approx(b[name], abs=1e-4)


def test_answers_and_conversations(folders, kit, tune, here):
    path, data = folders / "reward", (folders / "answers.jsonl", folders / "talks.jsonl")
    done = tune("score", path, "--data", *data, "--output", "out.jsonl")
    assert done.code == 0, done.err
    answers, talks = written(here / "out.jsonl")[: len(PAIRS)], written(here / "out.jsonl")[len(PAIRS) :]
    for row, source in zip(answers, PAIRS, strict=True):
        assert row["score"] == pytest.approx(plain(kit, path, source, "chosen"), abs=1e-4)
    for row in talks:
        text = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in row["messages"])
        expected = logits(path, "sequence", kit.tokenizer()(text.removesuffix("\n"))["input_ids"]).item()
        assert row["score"] == pytest.approx(expected, abs=1e-4)
    assert "prompt_completion: 9 rows" in done.out and "messages: 7 rows" in done.out
    assert value(done, "score") == pytest.approx(sum(row["score"] for row in answers) / len(answers), abs=1e-4)


def test_steps_with_and_without_labels(folders, kit, tune, here):
    done = tune("score", folders / "prm", "--data", folders / "steps.jsonl", "--output", "out.jsonl")
    hits, rows = {True: [], False: []}, written(here / "out.jsonl")
    for row in rows:
        ids, ends = kit.tokenizer()(row["prompt"])["input_ids"], []
        for step in row["completions"]:
            ids += kit.tokenizer()(step + "\n")["input_ids"]
            ends.append(len(ids) - 1)
        expected = logits(folders / "prm", "token", ids).softmax(-1)[ends, 1].tolist()
        assert row["step_scores"] == pytest.approx(expected, abs=1e-4)
        for one, label in zip(expected, row["labels"], strict=True):
            hits[label].append((one > 0.5) == label)
    every = hits[True] + hits[False]
    assert 0 < sum(every) < len(every) and value(done, "accuracy") == pytest.approx(sum(every) / len(every), abs=1e-4)
    assert f"of {len(hits[True])} good" in done.out and f"{sum(hits[False]) / len(hits[False]):.4f} of {len(hits[False])} bad" in done.out
    without = tune("score", folders / "prm", "--data", folders / "unjudged.jsonl", "--output", "unjudged.jsonl")
    assert without.code == 0 and "accuracy" not in without.out
    assert [row["step_scores"] for row in written(here / "unjudged.jsonl")] == [row["step_scores"] for row in rows]
    other = tune("score", folders / "prm", "--data", folders / "steps.jsonl", "--output", "other.jsonl", "--step-separator", " ##")
    assert other.code == 0 and written(here / "other.jsonl")[0]["step_scores"] != rows[0]["step_scores"]


@pytest.fixture
def adapted(tiny, here):
    """An adapter folder inside a run folder, with a head, over the tiny model; the model that it makes when merged; the head."""
    model = hf.load(tiny.long)
    fresh = lora.init(hf.abstract_of(model), lora.linears(hf.abstract_of(model)), rank=2, seed=0)
    generator = torch.Generator().manual_seed(2)
    fresh = tree.map(lambda leaf: leaf + 0.2 * torch.randn(leaf.shape, generator=generator), fresh)
    head = head_of(model, 1)
    heads.save_adapter(here / "run/adapter", fresh, head, family="llama", info=adapter.Info(2, 4.0, base=str(tiny.long)))
    return model._replace(params=lora.merge(model.params, fresh, 2.0)), head


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "named",
    [
        ("run",),
        ("BASE", "--adapter", "run/adapter"),
        ("REWARD", "--adapter", "run"),
        *(pytest.param(named, marks=pytest.mark.slow) for named in (("run/adapter",), ("--adapter", "run"))),
    ],
)
def test_an_adapter_is_scored_like_its_merged_model(adapted, folders, kit, tiny, tune, here, named):
    model, head = adapted
    heads.save(here / "merged", model, head, tokenizer=kit.tokenizer())
    named = [{"BASE": tiny.long, "REWARD": folders / "reward"}.get(name, name) for name in named]
    done = tune("score", *named, "--data", folders / "pairs.jsonl", "--output", "out.jsonl")
    assert done.code == 0, done.err
    for row in written(here / "out.jsonl"):
        for side in ("chosen", "rejected"):
            assert row[f"{side}_score"] == pytest.approx(plain(kit, here / "merged", row, side), abs=1e-3)  # merged in float32


def test_a_run_that_trained_the_model_itself(folders, tune, here):
    (here / "run").mkdir()
    (here / "run/model").symlink_to(folders / "reward")
    done = tune("score", "run", "--data", folders / "pairs.jsonl")
    direct = tune("score", folders / "reward", "--data", folders / "pairs.jsonl")
    assert value(done, "margin") == value(direct, "margin")


def test_rows_and_their_length(folders, tune):
    done = tune("score", folders / "reward", "--data", folders / "pairs.jsonl", "--max-rows", 4)
    assert value(done, "pairs") == 4
    short = tune("score", folders / "reward", "--data", folders / "pairs.jsonl", "--sequence-len", 15)
    assert 0 < value(short, "pairs") < 9 and "longer than sequence_len" in short.out
    cut = tune("score", folders / "reward", "--data", folders / "pairs.jsonl", "--sequence-len", 15, "--overlong", "truncate")
    assert value(cut, "pairs") == 9 and "documents truncated" in cut.out


def test_a_chat_template_and_a_dtype_change_the_scores(folders, tune):
    args = ("score", folders / "reward", "--data", folders / "talks.jsonl")
    plainly = value(tune(*args), "score")
    for option in (("--chat-template", "llama3"), ("--dtype", "bfloat16")):
        other = value(tune(*args, *option), "score")
        assert math.isfinite(other) and other != plainly


def test_what_is_refused(folders, kit, tiny, tune, here):
    kit.write_rows(here / "odd.jsonl", [{"question": "?", "answer": "!"}])
    kit.write_rows(here / "scored.jsonl", [row | {"chosen_score": 1.0} for row in PAIRS])
    three = {"score": {"weight": torch.zeros(3, 32)}}
    heads.save(here / "three", hf.load(tiny.long), three, tokenizer=kit.tokenizer())
    reward, prm, pairs, steps = folders / "reward", folders / "prm", folders / "pairs.jsonl", folders / "steps.jsonl"
    (here / "there.jsonl").write_text("mine")
    for args, words in (
        (("--data", pairs), ("nothing to score with",)),
        ((reward,), ("--data",)),
        ((reward, "--data", "nowhere.jsonl"), ("nowhere.jsonl",)),
        ((tiny.long, "--data", pairs), ("no head that scores",)),
        ((here / "three", "--data", pairs), ("3 classes", "expected one score")),
        ((reward, "--data", "odd.jsonl"), ("question, answer", "prompt \\+ completion")),
        ((reward, "--data", steps), ("prompt, completions, labels", "chosen \\+ rejected")),
        ((prm, "--data", pairs), ("a process reward model scores rows of prompt \\+ completions",)),
        ((prm, "--data", steps, "--format", "messages"), ("format messages", "process reward model")),
        ((reward, "--data", pairs, "--format", "nonsense"), ("unknown format 'nonsense'",)),
        ((reward, "--data", pairs, "--output", "there.jsonl"), ("there.jsonl exists",)),
        ((reward, "--data", "scored.jsonl", "--output", "new.jsonl"), ("a column chosen_score already",)),
        ((reward, "--data", pairs, "--chat-template", "chatml"), ("chat-template would be ignored", "passthrough")),
        ((reward, "--data", pairs, "--step-separator", ";"), ("step-separator would be ignored",)),
        ((reward, "--data", pairs, "--sequence-len", 9999), ("2048 positions",)),
        ((reward, "--data", pairs, "--micro-batch-size", 0), ("micro_batch_size",)),
        (("--adapter", reward, "--data", pairs), ("adapter_config.json does not exist",)),
    ):
        kit.refused(tune("score", *args), *words)
    assert (here / "there.jsonl").read_text() == "mine" and not (here / "new.jsonl").exists()


def test_the_command_to_try_reads_rows_as_the_run_did(kit, tiny, tune, here):
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no!"} for i in range(6)]
    pairs = kit.write_rows(here / "pairs.jsonl", rows)
    args = ("--model", tiny.model, "--data", pairs, "--sequence-len", 128, "--max-steps", 1, "--val-set-size", 0)
    last = tune("reward", *args).out.splitlines()[-1]
    assert last.startswith("try it") and last.endswith("--sequence-len 128")  # its default is more than this model has positions
    assert tune(*shlex.split(last)[3:]).code == 0


def test_scores_that_are_not_finite_are_no_result(folders, tune, monkeypatch, here):
    monkeypatch.setattr(heads, "logits", lambda rows, head: torch.full((len(rows), 1), torch.nan))
    done = tune("score", folders / "reward", "--data", folders / "pairs.jsonl", "--output", "out.jsonl")
    assert done.code == 1 and "not finite" in done.err and not (here / "out.jsonl").exists()
