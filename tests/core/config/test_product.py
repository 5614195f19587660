"""Lists given to flags as runs: which values belong together, and what is not clear."""

import pytest

from treetune.cli.methods.sft import Sft
from treetune.core.config import product, table

OPTIONS = table.options(Sft)


def points(*argv):
    return list(product.read(argv, OPTIONS).points())


def test_several_values_are_a_run_each_and_several_options_all_combinations():
    product_points = points("--max-steps", "5", "--learning-rate", "1e-4", "2e-4", "--sweep", "--lora-r", "8", "16", "--no-shuffle")
    assert [values for values, _ in product_points] == [
        {"learning_rate": rate, "lora_r": rank} for rate in ("1e-4", "2e-4") for rank in ("8", "16")
    ]  # fmt: skip
    assert product_points[1][1] == ["--max-steps=5", "--no-shuffle", "--learning-rate=1e-4", "--lora-r=16"]


@pytest.mark.parametrize(
    ("argv", "args"),
    [
        (["--shuffle", "true", "false"], [["--shuffle"], ["--no-shuffle"]]),
        (["--gradient-checkpointing", "none", "full"], [["--gradient-checkpointing=none"], ["--gradient-checkpointing=full"]]),
        (["--weight-decay", "-1", "0"], [["--weight-decay=-1"], ["--weight-decay=0"]]),
        (["--sample-prompt", "a b", ""], [["--sample-prompt=a b"], ["--sample-prompt="]]),
        (
            ["--lora-target-modules", "[q_proj, v_proj]", "[all-linear]"],
            [["--lora-target-modules", "q_proj", "v_proj"], ["--lora-target-modules", "all-linear"]],
        ),
    ],
)
def test_values_of_every_kind_of_option(argv, args):
    assert [product_points for _, product_points in points("--sweep", *argv)] == args


def test_an_option_that_takes_a_list_keeps_one_list():
    _, args = points("--data", "[a.jsonl,b.jsonl]", "--lora-r", "1", "2", "--sweep")[0]
    assert args == ["--data", "a.jsonl", "b.jsonl", "--lora-r=1"]
    assert points("--data", "a.jsonl", "--lora-r", "1", "2", "--sweep")[0][1] == ["--data", "a.jsonl", "--lora-r=1"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lora-r", "8"], "needs an option with several values"),
        (["--data", "a", "b", "--lora-r", "1", "2"], r"--data takes a list itself: .* '\[a,b\]' for one list, or --data '\[a\]' '\[b\]'"),
        (["--lora-r", "8", "16", "8"], "--lora-r has '8' twice"),
        (["--output-dir", "a", "b"], "--output-dir is one for a whole sweep, got 2"),
        (["--config", "a", "b"], "one for a whole sweep"),
        (["--shuffle", "true", "maybe"], "expected true or false"),
        (["--seed", *map(str, range(40)), "--lora-r", *map(str, range(1, 40))], "would start 1560 runs"),
    ],
)
def test_what_is_not_clear_is_refused(argv, words):
    with pytest.raises(ValueError, match=words):
        product.read(["--sweep", *argv], OPTIONS)
