"""Runs with ReLoRA: what they leave is a whole model, and it is the base plus all that was folded into it."""

import copy

import torch

from treetune.cli import fit
from treetune.core import lora, tree
from treetune.models import families, hf, policy, relora, reward_model
from treetune.models.target import Target


def test_what_is_folded_is_what_the_run_leaves(kit, tiny, here, monkeypatch):
    """The saved model is the base plus all pairs at the ends of their cycles, and transformers computes it."""
    from transformers import AutoModelForCausalLM

    seen, fold = [], relora._fold
    monkeypatch.setattr(relora, "_fold", lambda low, state: seen.append(copy.deepcopy(state.params["lora"])) or fold(low, state))
    options = dict(model=str(tiny.model), data=[str(tiny.chat)], lora_r=4, lora_alpha=8.0, max_steps=7, sequence_len=128, relora_steps=3)
    result = fit.fit(fit.configure("sft", **options, relora_anneal_steps=1, learning_rate=0.02, output_dir="run"))
    assert len(seen) == 2
    model = dict(tree.items(hf.load(tiny.model).params))
    for adapter in (*seen, result.state.params["lora"]):
        assert all(b.norm() > 0 for _, b in lora.pairs(adapter).values())
        for path, (a, b) in lora.pairs(adapter).items():
            model[path] = model[path] + 2.0 * b @ a
    saved = dict(tree.items(hf.load(here / "run/model").params))
    for path, leaf in saved.items():
        torch.testing.assert_close(leaf, model[path], atol=2e-6, rtol=1e-5)
    ids = torch.tensor([5, 9, 30, 77, 120, 8])
    theirs = AutoModelForCausalLM.from_pretrained(here / "run/model", dtype=torch.float32)(ids[None]).logits[0]
    current, low = policy.current(result.policy)
    torch.testing.assert_close(families.document_logits(current, ids, lora=low), theirs, atol=1e-4, rtol=1e-4)
    records = kit.metrics(here / "run")
    assert [record["step"] for record in records if relora.ROUNDING in record] == [3, 6]
    assert not (here / "run/adapter").exists()


def test_a_reward_model_is_left_whole(kit, tiny, tune, here):
    pairs = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i}"} for i in range(12)]
    kit.write_rows(here / "pairs.jsonl", pairs)
    args = [
        "--model",
        tiny.model,
        "--data",
        "pairs.jsonl",
        "--sequence-len",
        128,
        "--lora-r",
        4,
        "--relora-steps",
        2,
        "--learning-rate",
        0.01,
    ]
    done = tune("reward", *args, "--max-steps", 5, "--output-dir", "run")
    assert done.code == 0, done.err
    loaded = reward_model.load(Target("run/model"))
    base = dict(tree.items(hf.load(tiny.model).params))
    moved = {path for path, leaf in tree.items(loaded.model.params) if not torch.equal(leaf, base[path])}
    assert moved == {path for path, leaf in tree.items(hf.abstract_of(hf.load(tiny.model))) if leaf.op == "linear"}
    again = tune("reward", *args, "--resume", "run/checkpoints/step_000005", "--max-steps", 6, "--output-dir", "run")
    assert again.code == 0, again.err


def test_a_run_starts_from_an_adapter_and_is_used_by_every_command(kit, tiny, tune, here):
    assert tune("sft", *kit.basics(tiny, "--output-dir", "first", "--lora-dora")).code == 0
    args = ["--lora-model-dir", "first", "--relora-steps", 2, "--max-steps", 4, "--output-dir", "run"]
    done = tune("sft", *kit.basics(tiny, *args, without=("--lora-r", "--max-steps")))
    assert done.code == 0, done.err
    assert "rising again after every 2 steps" in " ".join(done.out.split())
    for command in (["eval", "--data", tiny.chat, "--sequence-len", 128], ["generate", "1 + 1"]):
        assert tune(*command, "--model", "run/model").code == 0
