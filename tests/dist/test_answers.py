"""Answers, metrics and rewards of evaluations: two ranks give those of one process, with whole weights and with parts of them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from treetune.core import tree

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("torchrun_scene", HERE / "test_torchrun.py")
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)

SIZES = dict(vocab_size=257, hidden_size=24, mlp_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=96)
REWARDS = """
def spread(completions, answer, completion_ids):
    return [None if i % 3 == 0 else i + len(right) for i, right in zip(map(len, completion_ids), answer)]

def letters(prompts, completions):
    return [sum(map(ord, prompt + text)) % 97 for prompt, text in zip(prompts, completions)]
"""
MEASURED = ("--eval-causal-lm-metrics", "chrf", "exact_match", "--eval-reward-funcs", "rewards.py:spread", "rewards.py:letters", "judge")
# An odd number of prompts, of which some leave less room than 40 tokens: the calls of one rank are not those of the other.
ASKED = {
    "all": (*MEASURED, "--eval-table-size", 7, "--eval-max-new-tokens", 40),
    "one": (*MEASURED, "--eval-table-size", 1, "--eval-answers", 1, "--eval-max-new-tokens", 5),  # nothing is left for the other rank
}
PLACED = {
    "whole": ("--sharding", "none"), "parts": ("--sharding", "full"), "context": ("--shard", "context=2"), "tensor": ("--shard", "tensor=2")
}  # fmt: skip
NAMES = ("chrf", "exact_match", "reward_spread", "reward_letters", "reward_judge", "loss")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, a reward model, ragged rows and rewards."""
    from treetune.models import heads, hf, llama

    root = tmp_path_factory.mktemp("answers")
    model = hf.random("llama", llama.Config(**SIZES, tied=True, init_std=0.2), seed=3)
    hf.save(root / "model", model, tokenizer=scene._tokenizer())
    judge = hf.random("llama", llama.Config(**SIZES, tied=True, init_std=0.2), seed=4)
    generator = torch.Generator().manual_seed(1)
    head = tree.map(lambda leaf: leaf + torch.randn(leaf.shape, generator=generator), heads.init(judge.cfg, 1, bias=False, seed=0))
    heads.save(root / "judge", judge, head, tokenizer=scene._tokenizer())
    rows = [{"prompt": f"Row {i}: " + "red blue green " * (i % 4), "completion": "red blue"[: 3 + i % 5]} for i in range(20)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[7:]))
    (root / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    (root / "rewards.py").write_text(REWARDS)
    return root


def arguments(output, accumulation, asked, *more) -> list[str]:
    options = {
        "model": "model", "data": "rows.jsonl", "val-data": "held_out.jsonl", "output-dir": output, "micro-batch-size": 1,
        "gradient-accumulation-steps": accumulation, "sequence-len": 96, "max-steps": 2, "learning-rate": 0.02, "device": "cpu",
        "lora-r": 3, "sample-prompt": "", "format": "prompt_completion",
    }  # fmt: skip
    return ["sft", *(f"--{name}={value}" for name, value in options.items()), *map(str, (*ASKED[asked], *more))]


def left(run: Path) -> tuple[list[dict], list[dict]]:
    """The answers of a run, and the metrics of its evaluations."""
    answers, records = ([json.loads(line) for line in (run / name).read_text().splitlines()] for name in ("samples.jsonl", "metrics.jsonl"))
    return answers, [{name: record[f"eval/{name}"] for name in NAMES} for record in records if "eval/loss" in record]


def evaluated(asked, adapter, output) -> list[str]:
    """Arguments of `treetune eval` on the adapter of a run."""
    data = ("--data", "held_out.jsonl", "--format", "prompt_completion", "--sequence-len", 96, "--device", "cpu")
    return ["eval", "--adapter", adapter, *map(str, (*data, *ASKED[asked], "--output", output))]


@pytest.mark.more
@pytest.mark.parametrize("placed", ["parts", *(pytest.param(name, marks=pytest.mark.slow) for name in PLACED if name != "parts")])
def test_two_ranks_answer_as_one_process_does(placed, place, launch, monkeypatch):
    from treetune.cli import main

    monkeypatch.chdir(place)
    accumulation = 2 if placed in ("whole", "parts") else 4
    runs = [arguments(f"{placed}_{asked}", accumulation, asked, *PLACED[placed]) for asked in ASKED]
    runs += [evaluated("all", f"{placed}_all", f"{placed}.jsonl")]
    (place / f"{placed}.json").write_text(json.dumps(runs))
    launch(2, HERE / "runs_worker.py", place / f"{placed}.json", cwd=place)
    for asked, count in (("all", 7), ("one", 1)):
        if not (place / f"alone_{asked}").exists():
            assert main.main(arguments(f"alone_{asked}", 4, asked)) == 0
        (answers, metrics), (own, found) = left(place / f"alone_{asked}"), left(place / f"{placed}_{asked}")
        assert own == answers and [one["step"] for one in answers] == [0] * count + [2] * count
        assert len(found) == len(metrics) == 2
        for mine, right in zip(found, metrics, strict=True):
            assert mine == pytest.approx(right, rel=1e-5, nan_ok=True)
    written = [json.loads(line) | {"step": 2} for line in (place / f"{placed}.jsonl").read_text().splitlines()]
    assert written == [one for one in left(place / "alone_all")[0] if one["step"] == 2]
    assert len({one["answer"] for one in written}) > 3 and metrics[0]["reward_judge"] != metrics[1]["reward_judge"]
