"""The sampler: its distribution, its log-probs against the trainer's, and its independence of the batch."""

import pytest
import torch
from transformers import generation

from treetune import models
from treetune.core import lora, tree
from treetune.models import decode, dense, hf

PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [90, 3]]


@pytest.fixture(scope="module")
def ours(oracle):
    return hf.load(oracle("llama", True)[1])


def adapted(model, targets=("q_proj", "down_proj", "embed_tokens", "lm_head")):
    abstract = hf.abstract_of(model, head=True)
    fresh = lora.init(abstract, lora.match(abstract, targets), rank=2, seed=0)
    return lora.Lora(tree.map(lambda leaf: leaf + 0.1, fresh), 0.5, dropout=0.5, seed=torch.tensor(1))


def trainer_logp(model, stream, prompts, samples, n, adapter=None, temperature=1.0):
    """logprobs() of the packed prompts with their completions, as a list of [len] per row."""
    rows = [(prompts[row // n], samples.tokens[row, : samples.lens[row]].tolist()) for row in range(len(samples.lens))]
    batch = stream([prompt + completion for prompt, completion in rows])
    quiet = None if adapter is None else adapter._replace(dropout=0.0)
    logp = models.logprobs(model.family, model.cfg, model.params, batch, lora=quiet, temperature=temperature).logp
    parts = logp.split(batch["seq_lens"].tolist())
    return [part[len(prompt) - 1 :] for part, (prompt, _) in zip(parts, rows, strict=True)]


CUT = {"temperature": 0.6, "top_k": 20, "top_p": 0.7}
DRAWS = [{}, {"temperature": 0.6}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.2}, CUT]
FAMILIES = ("mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gpt_oss")
OTHERS = ("phi3", "smollm3", "granite", "olmo2", "olmo3", "gemma", "gemma2", "gemma3")


# What is cut off a distribution does not depend on the family: one has every way of it, the others the plain one and the sharpest.
DRAWN = [("llama", draw) for draw in DRAWS] + [(kind, CUT) for kind in FAMILIES + OTHERS] + [(kind, {}) for kind in ("mixtral", "gpt_oss")]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("kind", "options"),
    DRAWN + [pytest.param(kind, draw, marks=pytest.mark.slow) for kind in FAMILIES for draw in DRAWS if (kind, draw) not in DRAWN],
)
def test_logp_is_the_trainers(oracle, stream, kind, options):
    """|log ratio| <= 5e-5 on any token with the same weights, whatever was cut off (pain 36)."""
    model = hf.load(oracle(kind)[1])
    samples = decode.sample(model, PROMPTS, n=3, max_new_tokens=20, stop=[11, 12, 13], seed=4, **options)
    expected = trainer_logp(model, stream, PROMPTS, samples, 3, temperature=options.get("temperature", 1.0))
    assert len(set(samples.lens.tolist())) > 1
    for row, reference in enumerate(expected):
        size = int(samples.lens[row])
        assert (samples.logp[row, :size] - reference).abs().max() <= 5e-5
        assert not samples.logp[row, size:].any() and not samples.tokens[row, size:].any() and not samples.log_kept[row, size:].any()
    cut = any(name in options for name in ("top_p", "top_k", "min_p"))
    assert bool((samples.log_kept < 0).any()) == cut and bool((samples.log_kept <= 0).all())


def test_an_adapter_in_the_sampler_is_the_one_of_the_trainer_without_dropout(ours, stream):
    adapter = adapted(ours)
    samples = decode.sample(ours, PROMPTS, n=2, lora=adapter, max_new_tokens=12, seed=0)
    plain = decode.sample(ours, PROMPTS, n=2, max_new_tokens=12, seed=0)
    assert not torch.equal(samples.tokens, plain.tokens)
    for row, reference in enumerate(trainer_logp(ours, stream, PROMPTS, samples, 2, adapter)):
        torch.testing.assert_close(samples.logp[row, : samples.lens[row]], reference, atol=5e-5, rtol=0)


SOME = ("mistral", "qwen3_moe", "gpt_oss", "gemma3")
MORE = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "qwen3", "mixtral", "granite")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [*SOME, *MORE])
def test_greedy_is_what_transformers_generates(oracle, kind):
    model, path = oracle(kind)
    samples = decode.sample(hf.load(path), PROMPTS, max_new_tokens=20, temperature=0, seed=0)
    for prompt, got in zip(PROMPTS, samples.tokens, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0, len(prompt) :]
        assert got.tolist() == expected.tolist()
    assert torch.equal(samples.log_kept, samples.logp)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.75},
        {"min_p": 0.3},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_frequencies_are_those_of_the_cut_distribution(ours, options):
    """One step, many completions: support, frequencies and kept mass against transformers' own filters in float64."""
    count, prompt = 20_000, PROMPTS[0]
    logits = dense.probe(ours.params, torch.tensor(prompt), ours.cfg)[-1:].double() / options.get("temperature", 1.0)
    full, cut = logits.softmax(-1)[0], logits
    for name, filter_ in (
        ("top_k", generation.TopKLogitsWarper),
        ("top_p", generation.TopPLogitsWarper),
        ("min_p", generation.MinPLogitsWarper),
    ):
        if name in options:
            cut = filter_(options[name])(None, cut)
    expected = cut.softmax(-1)[0]
    samples = decode.sample(ours, [prompt], n=count, max_new_tokens=1, seed=1, **options)
    seen = torch.bincount(samples.tokens[:, 0], minlength=96).double() / count
    assert not seen[expected == 0].any()
    # Six standard deviations of a binomial frequency; about 100 of them are looked at.
    assert ((seen - expected).abs() <= 6 * (expected * (1 - expected) / count).sqrt() + 1e-12).all()
    kept = full[expected > 0].sum().log()
    torch.testing.assert_close(samples.log_kept[:, 0].double(), kept.expand(count), atol=1e-6, rtol=0)
    torch.testing.assert_close(samples.logp[:, 0].double(), full[samples.tokens[:, 0]].log(), atol=1e-5, rtol=0)


@pytest.mark.more
def test_a_row_does_not_depend_on_the_others(ours):
    options = dict(max_new_tokens=16, stop=[11, 30, 31], seed=9)
    together = decode.sample(ours, PROMPTS, n=3, **options)
    for prompt in range(len(PROMPTS)):
        for n in (1, 3):
            alone = decode.sample(ours, [PROMPTS[prompt]], n=n, ids=[prompt], **options)
            size = alone.tokens.shape[1]
            assert torch.equal(alone.tokens, together.tokens[3 * prompt : 3 * prompt + n, :size])
            assert torch.equal(alone.lens, together.lens[3 * prompt : 3 * prompt + n])
            torch.testing.assert_close(alone.logp, together.logp[3 * prompt : 3 * prompt + n, :size], atol=1e-5, rtol=0)


def test_seed_prompt_and_completion_each_change_the_draw(ours):
    def tokens(seed, ids):
        return decode.sample(ours, [PROMPTS[0]] * 2, n=2, max_new_tokens=12, seed=seed, ids=ids).tokens.tolist()

    first = tokens(1, [0, 1])
    assert first == tokens(1, [0, 1]) and first != tokens(2, [0, 1])
    assert len({tuple(row) for row in first}) == 4
    assert tokens(1, [5, 0])[2:] == first[:2]


def test_rows_end_with_their_stop_token(ours):
    samples = decode.sample(ours, PROMPTS, n=8, max_new_tokens=24, stop=[11, 30, 31, 60], seed=3)
    for row, size in enumerate(samples.lens.tolist()):
        ids = samples.tokens[row, :size].tolist()
        assert not set(ids[:-1]) & {11, 30, 31, 60}
        assert size == 24 or ids[-1] in (11, 30, 31, 60)
    assert samples.tokens.shape[1] == samples.lens.max() and samples.lens.min() < samples.lens.max()


def test_the_loop_ends_with_the_last_row(ours, monkeypatch):
    steps = []
    advance = decode._advance
    monkeypatch.setattr(decode, "_advance", lambda *args: steps.append(len(args[2].row)) or advance(*args))
    every = list(range(96))
    samples = decode.sample(ours, PROMPTS, max_new_tokens=50, stop=every, seed=0)
    assert steps == [] and samples.lens.tolist() == [1] * 4
    samples = decode.sample(ours, PROMPTS, n=8, max_new_tokens=60, stop=every[:24], seed=0)
    assert len(steps) == samples.lens.max() - 1 < 59 and steps[-1] < 32  # finished rows have left the batch


def test_bfloat16_samples_from_float32_leaves_and_casts_once(oracle):
    from dataclasses import replace

    wide = hf.load(oracle("llama")[1])
    low = hf.load(oracle("llama")[1], dtype=torch.bfloat16)
    cast = wide._replace(cfg=replace(wide.cfg, dtype=torch.bfloat16))
    one, two = (decode.sample(model, PROMPTS, max_new_tokens=8, seed=0) for model in (low, cast))
    assert torch.equal(one.tokens, two.tokens) and one.logp.dtype == torch.float32 and torch.equal(one.logp, two.logp)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"prompts": [[1], []]}, "prompt is empty"),
        ({"prompts": []}, "prompt is empty"),
        ({"max_new_tokens": 117}, "need 129 positions; the model has 128"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, r"top_p is 0.0; expected in \(0, 1\]"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.0}, "min_p is 1.0"),
        ({"n": 0}, "n is 0"),
    ],
)
def test_bad_requests_are_refused(ours, options, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 4, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        decode.sample(ours, arguments.pop("prompts"), **arguments)


def test_weights_that_are_not_finite_are_refused(ours):
    broken = ours._replace(params=ours.params | {"norm": ours.params["norm"] * torch.nan})
    with pytest.raises(ValueError, match="prompt 0: its weights are not finite"):
        decode.sample(broken, PROMPTS, max_new_tokens=4, seed=0)
