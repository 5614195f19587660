"""The loaded model is gone once a run of full weights has trees of its own: nothing that lives as long as the run holds it."""

import gc
import json
import weakref

import pytest

from treetune.core import tree
from treetune.core.run import loop
from treetune.models import loading

REWARDS = "def length(completions):\n    return [float(len(one)) for one in completions]\n"
PAIRS = [{"prompt": f"{i} + 1", "chosen": str(i + 1), "rejected": "no"} for i in range(12)]
JUDGED = [{"prompt": f"{i} + 1", "completion": str(i + 1), "label": i % 2 == 0} for i in range(12)]
GRPO = ["--reward-funcs", "rewards.py:length", "--num-generations", "2", "--max-completion-length", "4"]
RUNS = {
    "sft": ("sft", "chat", []),
    "dpo": ("dpo", "pairs", []),
    "dpo with a moving reference": ("dpo", "pairs", ["--sync-ref-model", "--ref-model-sync-steps", "1"]),
    "kto": ("kto", "judged", []),
    "orpo": ("orpo", "pairs", []),
    "reward": ("reward", "pairs", []),
    "grpo": ("grpo", "prompts", [*GRPO, "--beta", "0.1"]),
    "ebft": ("ebft", "text", ["--mode", "strided"]),
}


@pytest.fixture
def alive(monkeypatch):
    """Names of the loaded leaves that are alive when the first step begins."""
    loaded, names = {}, []
    load, run = loading.load_model, loop.run

    def remember(*args, **named):
        model, path = load(*args, **named)
        loaded.update({f"{len(loaded)} {name}": weakref.ref(leaf) for name, leaf in tree.items(model.params)})
        return model, path

    def look(*args, **named):
        gc.collect()
        names.extend(name for name, ref in loaded.items() if ref() is not None)
        assert loaded
        return run(*args, **named)

    monkeypatch.setattr(loading, "load_model", remember)
    monkeypatch.setattr(loop, "run", look)
    return names


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", RUNS)
def test_full_weights_train_without_the_loaded_ones(name, tiny, tune, here, alive):
    command, rows, more = RUNS[name]
    (here / "rewards.py").write_text(REWARDS)
    for file, table in {"pairs": PAIRS, "judged": JUDGED, "prompts": [{"prompt": f"{i} +"} for i in range(8)]}.items():
        (here / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    data = {"chat": tiny.chat, "text": tiny.text}.get(rows, here / f"{rows}.jsonl")
    answers = [] if command == "reward" else ["--sample-prompt="]
    answers += [] if command == "grpo" else ["--sequence-len", 256]
    args = [command, "--model", tiny.model, "--data", data, "--adapter", "none", "--max-steps", 1, "--output-dir", "run", *answers, *more]
    done = tune(*args)
    assert done.code == 0, done.err
    assert alive == []
