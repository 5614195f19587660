"""Every method on models that transformers' modules compute: packed, and one document at a time."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from treetune.models import certificate

spec = importlib.util.spec_from_file_location("architectures", Path(__file__).parents[1] / "models" / "architectures.py")
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)
VOCABULARY = ((r"(?:decoder_|unpadded_)?vocab_size(?:_per_layer_input)?", 260), (r"max_position_embeddings", 256))
SHORT = ["--max-steps", 3, "--micro-batch-size", 2, "--learning-rate", 0.01, "--output-dir", "run"]
QUIET = ["--sample-prompt="]
LORA, FULL = ["--lora-r", 4], ["--adapter", "none"]
METHODS = {
    "sft": ["sft", "--data", "chat.jsonl", "--sequence-len", 128, "--lora-dropout", 0.1, "--neftune-noise-alpha", 5, *LORA],
    "sft-full": ["sft", "--data", "chat.jsonl", "--sequence-len", 128, "--gradient-checkpointing", *FULL],
    "dpo": ["dpo", "--data", "pairs.jsonl", "--sequence-len", 128, *LORA],
    "grpo": [
        "grpo", "--data", "prompts.jsonl", "--reward-funcs", "rewards.py:spread", "--num-generations", 4, "--max-completion-length", 6,
        *LORA,
    ],
    "ebft": [
        "ebft", "--data", "text.jsonl", "--mode", "strided", "--sequence-len", 48, "--stride", 4, "--context-length", 4,
        "--generate-max-len", 3, "--n-samples-per-prompt", 3, *LORA,
    ],
    "reward": ["reward", "--data", "pairs.jsonl", "--sequence-len", 128, *LORA],
}  # fmt: skip
WORKING = [("glm4", "sft"), pytest.param("qwen3_5_text", "dpo", marks=pytest.mark.slow)]
KINDS = ("glm4", "deepseek_v3", "qwen3_5_text", "qwen3_5_moe_text", "nemotron_h")


@pytest.fixture(scope="session")
def bridged(kit, tmp_path_factory):
    """bridged(kind) -> the folder of a small model of an architecture, with the tokenizer of the other tests."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(architectures, "SIZES", VOCABULARY + architectures.SIZES)
                architectures.build(kind).save_pretrained(made[kind])
            kit.tokenizer().save_pretrained(made[kind])
        return made[kind]

    return make


@pytest.fixture
def rows(kit, here):
    kit.write_rows(here / "chat.jsonl", kit.chats(24))
    kit.write_rows(
        here / "pairs.jsonl", [{"prompt": f"{i} + 1 = ", "chosen": str(i + 1), "rejected": "no" * (1 + i % 3)} for i in range(12)]
    )
    kit.write_rows(here / "prompts.jsonl", [{"prompt": f"{i} + 1 = "} for i in range(12)])
    kit.write_rows(here / "text.jsonl", [{"text": f"Line {i}. " + "the cat sat. " * 3} for i in range(16)])
    (here / "rewards.py").write_text(
        "def spread(completions, **row):\n    return [sum(map(ord, text)) % 10 / 10 for text in completions]\n"
    )


def check(kit, here, tune, folder, method):
    done = tune(*METHODS[method], "--model", folder, *SHORT, *([] if method == "reward" else QUIET))
    assert done.code == 0, done
    losses = [record["train/loss"] for record in kit.metrics(here / "run") if "train/loss" in record]
    assert len(losses) >= 3 and all(math.isfinite(loss) for loss in losses)
    return done


@pytest.mark.parametrize("kind,method", WORKING)
def test_a_method_trains_it(kit, here, tune, rows, bridged, kind, method):
    done = check(kit, here, tune, bridged(kind), method)
    assert ("one document at a time" in done.out) == (kind == "qwen3_5_text")
    if method == "grpo":
        apart = [record[name] for record in kit.metrics(here / "run") if (name := "sampling/sampling_logp_difference/max") in record]
        assert len(apart) == 3 and max(apart) <= 5e-5, "the sampler's log-probs are the trainer's"


def test_the_first_run_certifies_and_later_ones_remember(tune, here, rows, bridged, monkeypatch):
    monkeypatch.setenv("TREETUNE_HOME", str(here / "home"))
    begin = ["sft", "--data", "chat.jsonl", "--sequence-len", 128, *LORA, "--model", bridged("glm4"), *SHORT[:6], "--sample-prompt="]
    certified, certify = [], certificate.certify
    monkeypatch.setattr(certificate, "certify", lambda *args, **options: certified.append(args) or certify(*args, **options))
    lines = []
    for name in ("a", "b"):
        done = tune(*begin, "--output-dir", name)
        assert done.code == 0, done
        lines += [line for line in done.out.splitlines() if line.startswith("certificate: bridged, 11 measures within their limits")]
    assert len(lines) == 2 and len(certified) == 1
    kept = next((here / "home/certificates").glob("*.json"))
    entry = json.loads(kept.read_text())
    entry["rows"][0][1:4] = [0.5, 1e-4, "DIFFERENCE"]
    kept.write_text(json.dumps(entry))
    refused = tune(*begin, "--output-dir", "c")
    assert (
        refused.code == 2
        and "logits 0.5, expected at most 0.0001; treetune check" in refused.err
        and not (here / "c/metrics.jsonl").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_trains_every_kind(kit, here, tune, rows, bridged, kind, method):
    check(kit, here, tune, bridged(kind), method)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["glm4", "deepseek_v3", "qwen3_5_text"])
def test_a_killed_run_resumes_bit_for_bit(kit, here, forked, tune, rows, bridged, kind):
    args = [*METHODS["sft"], "--model", bridged(kind), *SHORT, *QUIET, "--save-steps", 1]
    assert tune(*args).code == 0
    whole = kit.left(here / "run", 3)
    (here / "run").rename(here / "whole")
    assert forked(kit.die_at(2), *args).code == -9
    assert tune(*args, "--resume", "auto").code == 0
    resumed = kit.left(here / "run", 3)
    assert kit.same(resumed[0], whole[0]) and kit.same(resumed[1], whole[1])


def test_a_merged_model_is_described(kit, here, tune, rows, bridged):
    folder = bridged("glm4")
    check(kit, here, tune, folder, "sft")
    merged = tune("merge", "run", "merged")
    assert merged.code == 0, merged
    info = tune("info", "merged")
    assert info.code == 0 and "glm4" in info.out and "gate_up_proj" in info.out
