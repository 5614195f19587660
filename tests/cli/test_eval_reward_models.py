"""Reward models that were trained here score the answers of a run: the metric is what `treetune score` gives for those answers."""

import json
import shutil

import pytest

LORA = ("--lora-r", 4, "--learning-rate", 0.03, "--sequence-len", 128, "--max-steps", 4)
ASKED = ("--eval-table-size", 7, "--eval-max-new-tokens", 12)


@pytest.fixture(params=["<|im_end|>", "<|endoftext|>"], ids=["EOS ends a turn", "EOS ends a text"])
def model(request, kit, tiny, here):
    """A tiny model whose chat template ends turns with <|im_end|>, which may be its EOS."""
    shutil.copytree(tiny.model, here / "model")
    tokenizer = kit.tokenizer()
    tokenizer.eos_token = request.param
    tokenizer.save_pretrained(here / "model")
    return here / "model"


@pytest.fixture
def judges(kit, model, tune, here):
    """The runs of a reward model of conversations, and of a process reward model."""
    pairs = [{"chosen": row["messages"], "rejected": [*row["messages"][:-1], assistant("no")]} for row in kit.chats(9)]
    steps = [{"prompt": f"Add {i}.", "completions": [f"{i} is {i}.", "So what?"], "labels": [True, i % 2 > 0]} for i in range(9)]
    for name, command, rows in (("outcome", "reward", pairs), ("process", "prm", steps)):
        done = tune(command, "--model", model, "--data", kit.write_rows(here / f"{name}.jsonl", rows), *LORA, "--output-dir", name)
        assert done.code == 0, done.err
    return "outcome", "process"


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def text_of(messages: list[dict]) -> str:
    """A conversation as the model reads it, up to where its answer begins."""
    turns = (f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
    return "".join(turns) + "<|im_start|>assistant\n"


@pytest.mark.more
def test_the_rewards_are_those_of_treetune_score(judges, kit, model, tune, here):
    held_out = kit.chats(7, 40)
    data = kit.write_rows(here / "held_out.jsonl", held_out)
    args = ("--model", model, "--data", kit.write_rows(here / "rows.jsonl", kit.chats(12)), "--val-data", data, *LORA, *ASKED)
    done = tune("sft", *args, "--sample-prompt=", "--eval-reward-funcs", *judges, "--output-dir", "run")
    assert done.code == 0, done.err
    records = [record for record in kit.metrics(here / "run") if "eval/loss" in record]
    assert records[0]["eval/reward_outcome"] != pytest.approx(records[-1]["eval/reward_outcome"], abs=1e-3)
    for record in (records[0], records[-1]):
        answers = [row["answer"] for row in kit.samples(here / "run") if row["step"] == record["step"]]
        asked = [row["messages"][:-1] for row in held_out]
        talks = [{"messages": [*before, assistant(answer)]} for before, answer in zip(asked, answers, strict=True) if answer.strip()]
        lines = [[line for line in answer.split("\n") if line.strip()] for answer in answers]
        steps = [{"prompt": text_of(before), "completions": part} for before, part in zip(asked, lines, strict=True) if part]
        for judge, rows, read in (("outcome", talks, lambda row: row["score"]), ("process", steps, lambda row: min(row["step_scores"]))):
            data = kit.write_rows(here / "asked.jsonl", rows)
            done = tune("score", judge, "--data", data, "--sequence-len", 250, "--output", f"{judge}-{record['step']}.jsonl")
            assert done.code == 0, done.err
            scores = [read(json.loads(line)) for line in (here / f"{judge}-{record['step']}.jsonl").read_text().splitlines()]
            assert record[f"eval/reward_{judge}"] == pytest.approx(sum(scores) / len(scores), abs=1e-5), (judge, record["step"])
