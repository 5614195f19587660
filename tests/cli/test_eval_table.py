"""The table of answers: held-out prompts, answered at each evaluation beside the answers of their rows, and nothing else is changed."""

import pytest

SHORT = ("--sample-prompt=", "--learning-rate", 0.01, "--val-set-size", 5)
TABLE = ("--eval-table-size", 3, "--eval-max-new-tokens", 6)


def table(kit, root) -> list[dict]:
    return [record for record in kit.samples(root) if "row" in record]


def test_a_run_with_a_table_is_the_run_without_it(kit, sft, here):
    """Bit for bit: state, adapter and metrics; beside them each evaluation has answered the same prompts."""
    assert sft(*SHORT, "--eval-steps", 1, "--output-dir", "plain").code == 0
    done = sft(*SHORT, *TABLE, "--eval-steps", 1, "--output-dir", "asked")
    assert done.code == 0, done.err
    assert all(kit.same(*pair) for pair in zip(kit.left(here / "plain", 2)[:2], kit.left(here / "asked", 2)[:2], strict=True))
    assert kit.left(here / "plain", 2)[2] == kit.left(here / "asked", 2)[2]
    rows = table(kit, here / "asked")
    assert [row["step"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    assert [row["row"] for row in rows[:3]] == [row["row"] for row in rows[3:6]] and len({row["row"] for row in rows}) == 3
    sums = {row["row"]: kit.chats(24)[row["row"] - 1]["messages"] for row in rows}
    for row in rows:
        *_, question, answer = sums[row["row"]]
        assert row["reference"] == answer["content"] and question["content"] in row["prompt"]
        assert row["tokens"] <= 6 and "<|im_end|>" not in row["answer"]
    assert f"held-out row {rows[0]['row']} (of 3 answered)" in done.out


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_other_methods_have_tables(method, kit, tiny, tune, here):
    column = "chosen" if method == "dpo" else "completion"
    rows = [
        {"prompt": f"{i} + 1", "completion": f"{i + 1}", "label": i % 3 > 0}
        if method == "kto"
        else {"prompt": f"{i} + 1", "chosen": f"{i + 1}", "rejected": "no"}
        for i in range(12)
    ]
    data = kit.write_rows(here / "rows.jsonl", rows)
    done = tune(method, *kit.basics(tiny, *SHORT, *TABLE, "--data", data, "--output-dir", "run"))
    assert done.code == 0, done.err
    found = table(kit, here / "run")
    assert found and all(
        row["reference"] == rows[row["row"] - 1][column] and rows[row["row"] - 1]["prompt"] == row["prompt"] for row in found
    )
    assert method == "dpo" or all(rows[row["row"] - 1]["label"] for row in found), "a bad answer is no reference"


def test_a_run_that_goes_on_asks_nothing_twice(kit, tiny, forked, sft, here):
    args = (*SHORT, *TABLE, "--eval-steps", 1, "--save-steps", 2, "--max-steps", 4)
    done = forked(kit.die_at(4), "sft", *kit.basics(tiny, *args, "--output-dir", "killed"))
    assert done.code == -9, done.err
    assert sft(*args, "--output-dir", "killed", "--resume", "auto").code == 0
    assert sft(*args, "--output-dir", "whole").code == 0
    assert table(kit, here / "killed") == table(kit, here / "whole")
    assert [row["step"] for row in table(kit, here / "whole")] == [step for step in range(5) for _ in range(3)]


def test_without_a_row_that_has_a_prompt_there_is_an_error(kit, tiny, tune, here):
    data = kit.write_rows(here / "rows.jsonl", [{"text": "short"}] * 6)
    done = tune("pretrain", *kit.basics(tiny, *SHORT, *TABLE, "--data", data, "--output-dir", "run", without=("--lora-r",)))
    kit.refused(done, "eval_table_size is 3, and no held-out row has a prompt and an answer")
    kit.refused(tune("reward", *TABLE[:2]), "eval-table-size would be ignored: a reward model writes no answers")
    assert not (here / "run").exists()


def test_prompts_of_rewards_are_answered_beside_a_text_of_their_row(kit, tiny, tune, here):
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(8)]
    (here / "rewards.py").write_text("def length(completions):\n    return [float(len(one)) for one in completions]\n")
    data = kit.write_rows(here / "rows.jsonl", rows)
    args = (
        "--model",
        tiny.model,
        "--data",
        data,
        "--lora-r",
        4,
        "--max-steps",
        1,
        "--reward-funcs",
        "rewards.py:length",
        "--output-dir",
        "run",
    )
    done = tune("grpo", *args, *TABLE, "--sample-prompt=", "--val-set-size", 4, "--max-completion-length", 4, "--num-generations", 2)
    assert done.code == 0, done.err
    found = table(kit, here / "run")
    assert [row["step"] for row in found] == [0] * 3 + [1] * 3
    assert all(row["reference"] == str(int(row["prompt"].split()[0]) + 1) for row in found)
