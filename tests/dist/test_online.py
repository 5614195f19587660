"""`torchrun -m treetune.cli.main grpo`: two ranks sample what one samples, train as one trains, and say what one says."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

spec = importlib.util.spec_from_file_location("torchrun_scene", Path(__file__).with_name("test_torchrun.py"))
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)

REWARDS = """
def spread(completions):
    return [sum(map(ord, one)) % 5 / 4 for one in completions]

def length(completions, completion_ids):
    return [len(one) / 8 for one in completion_ids]
"""
KINDS = {
    "lora": ["--beta", 0.1, "--entropy-coef", 0.01],
    "full": ["--adapter", "none", "--learning-rate", 1e-3],
    # what looks beyond the prompts of a rank: advantages, the highest entropies
    "across": ["--advantage", "gdpo", "--top-entropy-quantile", 0.5, "--num-iterations", 2],
    # what decides which groups a step trains on
    "dealt": ["--steps-per-generation", 2, "--dynamic-sampling", "--replay-buffer-size", 4, "--reroll-start-fraction", 0.25,
              "--streaming-partial-batch", "--async-prefetch"],
}  # fmt: skip
KINDS["shared streams"] = KINDS["across"] + KINDS["dealt"][:-2]
PLACED = {"lora": ["--sharding", "full"], "full": ["--sharding", "full"], "across": ["--sharding", "none"]}
PLACED |= {"dealt": ["--sharding", "none"], "shared streams": ["--shard", "context=2"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, prompts and rewards."""
    from treetune.models import hf, llama

    root = tmp_path_factory.mktemp("online")
    sizes = dict(vocab_size=257, hidden_size=24, mlp_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=128)
    hf.save(root / "model", hf.random("llama", llama.Config(**sizes, tied=True, init_std=0.2), seed=3), tokenizer=scene._tokenizer())
    rows = [{"prompt": f"Row {i}: " + "red blue green "[: 1 + 5 * i % 14]} for i in range(14)]  # a pass over the prompts ends within a step
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "rewards.py").write_text(REWARDS)
    return root


def arguments(place, output, accumulation, *more) -> list[str]:
    options = {
        "model": place / "model", "data": place / "rows.jsonl", "output-dir": output, "gradient-accumulation-steps": accumulation,
        "micro-batch-size": 1, "max-steps": 4, "device": "cpu", "num-generations": 4,
        "max-completion-length": 8, "val-set-size": 5, "eval-steps": 2, "save-steps": 2, "save-total-limit": 9,
    }  # fmt: skip
    flat = [part for name, value in options.items() for part in (f"--{name}", value)]
    rate = [] if "--learning-rate" in more else ["--learning-rate", 0.02, "--lora-r", 3]
    rewards = ["--reward-funcs", *(f"{place}/rewards.py:{name}" for name in ("spread", "length"))]
    return ["grpo", *map(str, [*flat, *rate, *rewards, *more])]


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


CLOCK = ("second", "memory", "tokens_per_second")


@pytest.mark.more
@pytest.mark.parametrize(
    "kind", ["across", "dealt", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("lora", "full", "shared streams"))]
)
def test_two_ranks_leave_what_one_leaves(kind, place, launch):
    from treetune.cli import main

    name, options = kind.replace(" ", "_"), KINDS[kind]
    assert main.main(arguments(place, place / f"{name}_alone", 4, *options)) == 0
    accumulation = 4 if kind == "shared streams" else 2
    launch(2, "-m", "treetune.cli.main", *arguments(place, place / name, accumulation, *options, *PLACED[kind]), cwd=place)
    alone, pair = place / f"{name}_alone", place / name
    file = "model/model.safetensors" if kind == "full" else "adapter/adapter_model.safetensors"
    one, two = load_file(alone / file), load_file(pair / file)
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        assert (leaf - two[path]).abs().max() <= 2e-5, path
    for mine, theirs in zip(records(alone), records(pair), strict=True):
        keys = {key for key in mine.keys() | theirs.keys() if not any(word in key for word in CLOCK)}
        for key in keys:
            near = theirs[key] is None or pytest.approx(theirs[key], rel=1e-4, abs=1e-5)
            assert mine[key] is None if near is True else mine[key] == near, key
    assert any("eval/reward" in record for record in records(alone))


@pytest.mark.more
@pytest.mark.slow
def test_ranks_that_share_streams_go_on_where_one_was(place, torchrun, saved_leaves):
    """They have the same prompts, so that their feed is that of one process, and so is what was drawn again and kept."""
    from treetune.cli import main

    options, end = KINDS["shared streams"], "checkpoints/step_000004"
    assert main.main(arguments(place, place / "one", 4, *options)) == 0
    args = arguments(place, place / "shared", 4, *options, *PLACED["shared streams"], "--resume", place / "one/checkpoints/step_000002")
    again = torchrun(2, "-m", "treetune.cli.main", *args, cwd=place)
    assert again.returncode == 0, again.stderr
    one, two = saved_leaves(place / "one" / end), saved_leaves(place / "shared" / end)
    assert one.keys() == two.keys() and all((one[key] - two[key]).abs().max() <= 2e-5 for key in one if one[key].is_floating_point())


@pytest.mark.more
@pytest.mark.slow
def test_ranks_go_on_where_they_were(place, torchrun, saved_leaves):
    """A checkpoint has the feed of all ranks, from which another number of ranks goes on as well."""
    from treetune.cli import main

    options = [*KINDS["across"], *KINDS["dealt"][:-2]]
    whole = torchrun(2, "-m", "treetune.cli.main", *arguments(place, place / "whole", 2, *options), cwd=place)
    assert whole.returncode == 0, whole.stderr
    args = arguments(place, place / "again", 2, *options, "--resume", place / "whole/checkpoints/step_000002")
    again = torchrun(2, "-m", "treetune.cli.main", *args, cwd=place)
    assert again.returncode == 0, again.stderr
    one, two = (saved_leaves(place / name / "checkpoints/step_000004") for name in ("whole", "again"))
    assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)
    args = arguments(place, place / "fewer", 4, *options, "--resume", place / "whole/checkpoints/step_000002")
    assert main.main(args) == 0
    one, two = (load_file(place / name / "adapter/adapter_model.safetensors") for name in ("whole", "fewer"))
    assert one.keys() == two.keys() and all((leaf - two[path]).abs().max() <= 2e-5 for path, leaf in one.items())


@pytest.mark.more
@pytest.mark.slow
def test_a_reward_that_fails_ends_both_ranks(place, torchrun):
    (place / "bad.py").write_text("def fails(completions):\n    raise RuntimeError('no such service')\n")
    args = [arg for arg in arguments(place, place / "bad", 2) if "rewards.py" not in arg]
    args.insert(args.index("--reward-funcs") + 1, f"{place}/bad.py:fails")
    done = torchrun(2, "-m", "treetune.cli.main", *args, cwd=place)
    assert done.returncode != 0 and "no such service" in done.stderr and "cli/grpo.py" not in done.stderr
