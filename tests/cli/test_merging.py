"""Merging by layers and as a whole, into every dtype: the same weights, the same printed difference, and what is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from treetune.core import quant
from treetune.models import hf, merging


@pytest.fixture
def adapter(sft, here):
    """A run whose adapter is far from nothing, and its folder."""
    assert sft("--output-dir", "run", "--max-steps", 4, "--learning-rate", 0.05).code == 0
    return here / "run"


def differences(out):
    """The largest logit differences that were printed."""
    return [float(difference) for difference in re.findall(r"largest logit difference (\S+),", out)]


def merged(largest, kl, head=None):
    return merging.Merged(None, merging.Difference(largest, largest / 10, kl), 100, head)


@pytest.mark.parametrize(
    ("found", "bound", "dtype"), [(merged(0.8, 9e-3), None, "bfloat16"), (merged(0.04, 1), None, "float32"), (merged(0.8, 1), 0.9, "nf4")]
)
def test_logits_that_stay_the_same_are_kept(found, bound, dtype):
    assert merging.check(found, bound, dtype) is None


@pytest.mark.parametrize(
    ("found", "bound", "dtype", "said"),
    [
        (merged(0.8, 0.02), None, "bfloat16", "off by a mean KL of 0.02 nats, more than 0.01: .*--max-logit-diff 0.8$"),
        (merged(0.71, 9e-3), 0.5, "bfloat16", "logits differ by up to 0.71, more than 0.5: .*--max-logit-diff 0.8$"),
        (merged(0.06, 0), None, "float32", "logits differ by up to 0.06, more than 0.05"),
        (merged(0.06, 0, head={}), None, "bfloat16", "scores differ by up to 0.06, more than 0.05"),
        (merged(0.8, 0), None, "nf4", "logits differ by up to 0.8, more than 0.05"),
        (merged(float("nan"), float("nan")), None, "bfloat16", "a mean KL of nan nats"),
    ],
)
def test_logits_that_change_are_refused(found, bound, dtype, said):
    with pytest.raises(ValueError, match=said):
        merging.check(found, bound, dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp4", "int8"))])
def test_merge_quantises_again_within_the_bound(kind, adapter, tune, kit, here):
    kit.refused(tune("merge", adapter, "small", "--save-dtype", kind, "--max-logit-diff", 1e-6), "merged logits differ by up to")
    assert not (here / "small").exists()
    done = tune("merge", adapter, "small", "--save-dtype", kind, "--max-logit-diff", 100)
    assert done.code == 0, done
    assert len(differences(done.out)) == 1 and differences(done.out)[0] > 1e-4
    model, whole = hf.load("small"), tune("merge", adapter, "whole")
    assert whole.code == 0 and differences(whole.out)[0] < 1e-4
    leaf, merged = model.params["layers"][0]["q_proj"], hf.load("whole").params["layers"][0]["q_proj"]
    assert leaf.kind == kind and torch.equal(quant.dense(leaf), quant.dense(quant.quantise(merged, quant.Scheme(kind))))


def test_merge_says_how_far_the_unquantised_base_is(tiny, sft, tune, kit):
    assert sft("--quant", "nf4", "--output-dir", "run").code == 0
    done = tune("merge", "run", "merged")
    assert done.code == 0, done
    near, far = differences(done.out)
    assert near < 1e-4 < far and "against the adapter on the unquantised base" in done.out
    assert tune("quantize", tiny.model, "small").code == 0
    again = tune("merge", "run", "other", "--model", "small")
    assert again.code == 0 and len(differences(again.out)) == 1, again


def every_tensor(root):
    return {key: leaf for file in sorted(root.glob("*.safetensors")) for key, leaf in load_file(file).items()}


ADAPTERS = {
    "plain": ("model", []),
    "nf4 base": ("untied", ["--quant", "nf4"]),
    "fp8 base": ("untied", ["--quant", "fp8"]),
    "experts": ("experts", ["--lora-target-modules", "all-linear", "experts"]),
    "whole norm": ("model", ["--lora-modules-to-save", "norm"]),
    "unfrozen": ("model", ["--unfrozen-parameters", r"layers\.0\.post_norm", "embed_tokens"]),
    "dora": ("model", ["--lora-dora"]),
    "dora over nf4": ("untied", ["--lora-dora", "--quant", "nf4"]),
    "pissa": ("model", ["--lora-init", "pissa"]),
    "olora over int8": ("model", ["--lora-init", "olora", "--quant", "int8"]),
    "patterns": ("model", ["--lora-rank-pattern", "q_proj=3", "--lora-alpha-pattern", "layers.1=5", "--lora-rslora"]),
    "added token": ("model", ["--tokens", "<mark>"]),
}


# What goes through parts of its own: dense leaves over 4 bits, stacks, a norm that trains, magnitudes, grown rows.
FAST = ("nf4 base", "experts", "whole norm", "dora", "added token")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in ADAPTERS])
def test_merging_by_layers_gives_the_same_weights(kind, tiny, kit, sft, tune, here):
    base, options = ADAPTERS[kind]
    model = kit.write_experts(here / "experts") if base == "experts" else getattr(tiny, base)
    assert sft("--model", model, *options, "--learning-rate", 0.05, "--output-dir", "run").code == 0
    for dtype in ("float32", "bfloat16", "nf4"):
        whole, parts = here / f"whole-{dtype}", here / f"parts-{dtype}"
        one = tune("merge", "run", whole, "--save-dtype", dtype, "--max-logit-diff", 100)
        other = tune("merge", "run", parts, "--save-dtype", dtype, "--max-logit-diff", 100, "--merge-method", "memory_efficient")
        assert one.code == other.code == 0, (one, other)
        assert differences(one.out) == differences(other.out)
        first, second = every_tensor(whole), every_tensor(parts)
        assert first.keys() == second.keys() and all(torch.equal(leaf, second[key]) for key, leaf in first.items())
        configs = [json.loads((root / "config.json").read_text()) for root in (whole, parts)]
        assert configs[0] == configs[1] and (dtype == "nf4" or len(list(parts.glob("*.safetensors"))) > 1)
        assert hf.load(parts).params.keys() == hf.load(whole).params.keys()


@pytest.mark.parametrize("method", ["legacy", "memory_efficient"])
def test_merging_refuses_what_has_no_files(method, tiny, kit, sft, tune, here):
    assert sft("--model", kit.write_experts(here / "experts"), "--output-dir", "run").code == 0
    options = ("--merge-method", method, "--max-logit-diff", 100)
    kit.refused(tune("merge", "run", "merged", *options, "--save-dtype", "fp8"), "has experts", "take nf4, fp4 or int8")
    rows = [{"prompt": f"{i} + 1", "chosen": str(i + 1), "rejected": "no"} for i in range(4)]
    data = kit.write_rows(here / "pairs.jsonl", rows)
    reward = tune("reward", *kit.basics(tiny, "--data", data, "--max-steps", 1, "--output-dir", "scores", without=("--sample-tokens",)))
    assert reward.code == 0, reward
    if method == "memory_efficient":
        kit.refused(tune("merge", "scores", "merged", *options), "is a reward model's adapter", "take merge_method legacy")
    kit.refused(tune("merge", "scores", "merged", *options, "--save-dtype", "nf4"), "is a reward model's")
    assert not (here / "merged").exists()
