"""Preference steps of the real SmolLM2-135M-Instruct on real pairs, where it is in the cache (`treetune fetch smollm2-135m-instruct`)."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from treetune.core import tree
from treetune.core.data import kinds, pack, sources
from treetune.models import fetch, heads, hf, reference

PLACE = fetch.home() / "models" / "smollm2-135m-instruct"
ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "examples" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PLACE / "config.json").is_file(), reason="SmolLM2-135M-Instruct is not in the cache"),
]
spec = importlib.util.spec_from_file_location("preference_scene", ROOT / "tests" / "losses" / "scene.py")
scene = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scene)

METHODS = {
    "dpo": ("dpo", {}),
    "ipo": ("dpo", {"loss": ("ipo",)}),
    "kto": ("kto", {}),
    "orpo": ("orpo", {"orpo_nll_scope": "completion"}),
    "simpo": ("simpo", {}),
    "reward": ("reward", {}),
}


@pytest.fixture(scope="module", autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def shortest(name: str, kind: str, count: int) -> list:
    """The documents of the shortest rows with different prompts."""
    rows = [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]
    by_prompt = {row["prompt"]: row for row in sorted(rows, key=lambda row: -len(json.dumps(row)))}
    chosen = sorted(by_prompt.values(), key=lambda row: len(json.dumps(row)))[:count]
    docs, _ = kinds.KINDS[kind].encode(sources.from_list(chosen, name), hf.tokenizer(PLACE), format="passthrough")
    assert len(docs) == count
    return docs


def pairs(count: int = 2) -> list:
    return shortest("gsm8k_preference_sample.jsonl", "pairs", count)


@pytest.fixture(scope="module")
def wide():
    """The model in float64."""
    return hf.load(PLACE, dtype=torch.float64)


def cut_to(model, layers: int):
    """The model with its first layers only: float64 is slow, and what is shared and packed is the same in all."""
    return model._replace(cfg=replace(model.cfg, num_layers=layers), params=model.params | {"layers": model.params["layers"][:layers]})


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_of_real_pairs_is_one(name, wide, monkeypatch):
    """Prompts shared in one stream, or copied, one by one and backwards: to 1e-9 in float64, and to 1e-6 beside KTO's float32 baseline."""
    command, options = METHODS[name]
    monkeypatch.setattr(heads, "logits", lambda rows, head: rows @ head["score"]["weight"].T)  # in float64 too
    docs = shortest("gsm8k_binary_sample.jsonl", "unpaired", 3) if command == "kto" else pairs()
    base = wide if name == "dpo" else cut_to(wide, 4)
    built = scene.parts(command, base, scene.adapted(base), **options)
    at = scene.state(built, policy=0.02)
    want, told = scene.gradients(built, at, [docs])
    grads, metrics = scene.gradients(built, at, [[doc] if command == "kto" else scene.copied([doc]) for doc in docs[::-1]])
    assert scene.error(grads, want) <= (1e-6 if command == "kto" else 1e-9)
    assert metrics["loss"].item() == pytest.approx(told["loss"].item(), rel=1e-6)


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_nothing_has_moved_at_step_0(trains):
    """Exactly in the same packing; to 1e-6 nats per token where the reference was computed in another."""
    base, docs = hf.load(PLACE), pairs()
    built = scene.parts("dpo", base, scene.adapted(base) if trains == "lora" else None)
    at = scene.state(built, policy=0.0)
    batch, plan = scene.batch(built, docs)
    with torch.no_grad():
        _, told = built.objective.terms(at.params, at.frozen, built.prepare(at, [(batch, plan)])[0][0], plan)
        assert told["kl"].value == 0 and told["rewards/chosen"].value == 0 and told["rewards/rejected"].value == 0
        alone = [scene.batch(built, [doc]) for doc in docs]
        parts = [reference.with_logp(_logp(built), at, *one)["ref_logp"] for one in alone]
        _, once = built.objective.terms(at.params, at.frozen, batch | {"ref_logp": torch.cat(parts)}, plan)
    assert abs(once["kl"].value) <= 1e-6
    assert len(tree.leaves(at.params)) > 100 and len(batch["at"]) == sum(len(pack.scored_tokens(doc)) for doc in docs)


def _logp(built):
    return lambda state, batch, plan: built.prepare(state, [(batch, plan)])[0][0]["ref_logp"]
