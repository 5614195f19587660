"""Rollouts from inside documents: ordinary decoding from each prefix, the trainer's log-probs, and independence of all else."""

import pytest
import torch

from treetune import models
from treetune.core import lora, strided, tree
from treetune.models import decode, decode_branches, decoder_attention, hf

OPTIONS = {"stride": 3, "context_length": 4, "generate_max_len": 6}
KINDS = ("llama", "mistral", "qwen3", "mixtral", "gpt_oss", "smollm3", "granite", "gemma2", "gemma3")


@pytest.fixture(scope="module")
def ours(oracle):
    return hf.load(oracle("llama", True)[1])


def adapted(model):
    abstract = hf.abstract_of(model, head=True)
    fresh = lora.init(abstract, lora.match(abstract, ("q_proj", "down_proj", "embed_tokens", "lm_head")), rank=2, seed=0)
    return lora.Lora(tree.map(lambda leaf: leaf + 0.1, fresh), 0.5, dropout=0.5, seed=torch.tensor(1))


def found_in(batch):
    return strided.anchors(strided.lengths(batch), **OPTIONS)


def prefixes(batch, found):
    cu = batch["cu_docs"].tolist()
    pairs = zip(found.document.tolist(), found.start.tolist(), strict=True)
    return [batch["tokens"][cu[doc] : cu[doc] + start].tolist() for doc, start in pairs]


def prefix_logp(model, stream, before, samples, n, adapter=None, temperature=1.0):
    """logprobs() [R, G] of each rollout after a copy of its own prefix, every pair a document of its own."""
    rows = [before[r // n] + samples.tokens[r].tolist() for r in range(len(samples.tokens))]
    batch = stream(rows)
    quiet = None if adapter is None else adapter._replace(dropout=0.0)
    logp = models.logprobs(model.family, model.cfg, model.params, batch, lora=quiet, temperature=temperature).logp
    return torch.stack([part[-samples.tokens.shape[1] :] for part in logp.split(batch["seq_lens"].tolist())])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rollouts_are_ordinary_decoding_from_each_prefix(oracle, stream, documents, kind):
    """Token for token; the window of mistral (8) is shorter than most prefixes, and one document is too short for a block."""
    model, batch = hf.load(oracle(kind)[1]), stream(documents)
    found = found_in(batch)
    assert set(found.document.tolist()) == {0, 1, 3}
    got = decode_branches.branches(model, batch, found, 1, temperature=0, seed=0)
    expected = decode.sample(model, prefixes(batch, found), max_new_tokens=6, temperature=0, seed=0)
    assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.lens, expected.lens)
    torch.testing.assert_close(got.logp, expected.logp, atol=5e-6, rtol=0)


DRAWS = ({"temperature": 0.6, "top_p": 0.7}, {}, {"temperature": 0.6})
DRAWN = [(kind, DRAWS[0]) for kind in KINDS] + [("llama", DRAWS[1]), ("gemma2", DRAWS[2])]
MORE = [(kind, draw) for kind in KINDS for draw in DRAWS if (kind, draw) not in DRAWN]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("kind", "options"), DRAWN + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE])
def test_logp_is_that_of_each_prefix(oracle, stream, documents, kind, options):
    """Within 5e-6 / temperature, since logits are divided by it, of the temperature-only distribution: sampled and as trained on."""
    model, batch = hf.load(oracle(kind)[1]), stream(documents)
    found, temperature = found_in(batch), options.get("temperature", 1.0)
    got = decode_branches.branches(model, batch, found, 2, seed=4, **options)
    expected = prefix_logp(model, stream, prefixes(batch, found), got, 2, temperature=temperature)
    torch.testing.assert_close(got.logp, expected, atol=5e-6 / temperature, rtol=0)
    grown, _ = strided.grow(batch, found, got.tokens, 2)
    trained = models.logprobs(model.family, model.cfg, model.params, grown, temperature=temperature).logp
    torch.testing.assert_close(trained.view_as(expected), expected, atol=5e-6 / temperature, rtol=0)
    assert bool((got.log_kept < 0).any()) == ("top_p" in options) and bool((got.log_kept <= 0).all())


def test_an_adapter_samples_without_dropout(ours, stream, documents):
    adapter, batch = adapted(ours), stream(documents)
    found = found_in(batch)
    got = decode_branches.branches(ours, batch, found, 2, lora=adapter, seed=0)
    assert not torch.equal(got.tokens, decode_branches.branches(ours, batch, found, 2, seed=0).tokens)
    expected = prefix_logp(ours, stream, prefixes(batch, found), got, 2, adapter)
    torch.testing.assert_close(got.logp, expected, atol=5e-6, rtol=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_document_tokens_from_the_anchor_on_change_nothing_in_its_block(oracle, stream, documents, kind):
    """Bit for bit, while later blocks, which read the changed tokens, change: so neither document nor other blocks leak."""
    model, batch = hf.load(oracle(kind)[1]), stream(documents)
    found = found_in(batch)
    at = 16
    changed = batch | {"tokens": batch["tokens"].clone()}
    lo, hi = batch["cu_docs"][1:3].tolist()
    changed["tokens"][lo + at : hi] = (changed["tokens"][lo + at : hi] + 1) % 96
    one, two = (decode_branches.branches(model, stream_, found, 2, seed=3) for stream_ in (batch, changed))
    same = ((found.document != 1) | (found.start <= at)).repeat_interleave(2)
    assert bool(same[(found.document == 1).repeat_interleave(2)].any()) and not bool(same.all())
    for ours_, theirs in ((one.tokens, two.tokens), (one.logp, two.logp)):
        assert torch.equal(ours_[same], theirs[same]) and not torch.equal(ours_[~same], theirs[~same])


def hidden(model, batch):
    return models.MODELS[model.family].forward(model.params, batch, decoder_attention.plan(batch, model.cfg), model.cfg).hidden


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_the_trained_tree_depends_on_its_prefix_and_itself_only(oracle, stream, documents, kind):
    """Bit for bit on the CPU plan: other blocks' tokens and document tokens at or after the anchor change nothing in a block."""
    model, batch = hf.load(oracle(kind)[1]), stream(documents)
    found = found_in(batch)
    rollouts = torch.randint(0, 96, (len(found.start) * 2, 6), generator=torch.Generator().manual_seed(1))
    grown, place = strided.grow(batch, found, rollouts, 2)
    base = hidden(model, grown)
    for r in (0, 7, len(rollouts) - 1):
        others = torch.ones(len(grown["tokens"]), dtype=torch.bool)
        others[place.generated[r]] = False
        begin, anchor = place.cu_docs[found.document[r // 2]], found.start[r // 2]
        others[begin : begin + anchor] = False
        tokens = torch.where(others, (grown["tokens"] + 1) % 96, grown["tokens"])
        other = hidden(model, grown | {"tokens": tokens})
        kept = torch.cat([place.source[r, :1], place.generated[r]])
        assert torch.equal(other[kept], base[kept]) and not torch.equal(other[place.generated[r - 1]], base[place.generated[r - 1]])
        near = grown["tokens"].clone()
        near[place.source[r, 0]] = (near[place.source[r, 0]] + 1) % 96
        assert not torch.equal(hidden(model, grown | {"tokens": near})[place.generated[r]], base[place.generated[r]])


def test_a_token_is_a_function_of_seed_document_anchor_rollout_and_position(ours, stream, documents):
    """Packing, other anchors and more rollouts change no token; each part of the key does."""
    batch = stream(documents)
    found, n = found_in(batch), 3
    base = decode_branches.branches(ours, batch, found, n, seed=3, ids=[10, 11, 12, 13]).tokens.view(-1, n, 6)
    alone = stream([documents[1]])
    own = decode_branches.branches(ours, alone, found_in(alone), n, seed=3, ids=[11]).tokens.view(-1, n, 6)
    assert torch.equal(own, base[found.document == 1])
    some = strided.Anchors(found.document[::2], found.start[::2], 6)
    assert torch.equal(decode_branches.branches(ours, batch, some, 1, seed=3, ids=[10, 11, 12, 13]).tokens, base[::2, 0])
    for change in ({"seed": 4}, {"ids": [10, 21, 12, 13]}):
        other = decode_branches.branches(ours, batch, found, n, **{"seed": 3, "ids": [10, 11, 12, 13]} | change).tokens.view(-1, n, 6)
        assert not torch.equal(other[found.document == 1], base[found.document == 1])
    assert not torch.equal(base[:, 0], base[:, 1])


def test_padding_after_the_documents_changes_nothing(ours, stream, documents):
    batch = stream(documents)
    padded = {name: batch[name] for name in ("doc_of_seq", "row")}
    padded["tokens"] = torch.cat([batch["tokens"], torch.zeros(140, dtype=torch.int64)])
    padded["positions"] = torch.cat([batch["positions"], torch.arange(140)])
    padded["cu_docs"] = torch.cat([batch["cu_docs"], batch["cu_docs"][-1:] + 140])
    found = found_in(padded)
    assert torch.equal(found.start, found_in(batch).start)
    one, two = (decode_branches.branches(ours, stream_, found, 2, seed=3) for stream_ in (batch, padded))
    assert torch.equal(one.tokens, two.tokens)
    torch.testing.assert_close(one.logp, two.logp, atol=5e-6, rtol=0)


def test_rollouts_longer_than_the_window(oracle, stream, documents):
    """Mistral's window is 8 tokens: the last tokens of a rollout of 12 see neither their prefix nor their own first tokens."""
    model, batch = hf.load(oracle("mistral")[1]), stream(documents)
    found = strided.anchors(strided.lengths(batch), stride=7, context_length=4, generate_max_len=12)
    got = decode_branches.branches(model, batch, found, 1, temperature=0, seed=0)
    expected = decode.sample(model, prefixes(batch, found), max_new_tokens=12, temperature=0, seed=0)
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.logp, expected.logp, atol=5e-6, rtol=0)


def test_each_part_of_the_key_draws_anew(ours, stream):
    """With all logits equal a token shows nothing but its draw: 200 of them agree by chance at a rate near 1 in 96."""
    flat = ours._replace(params=tree.map(torch.zeros_like, ours.params))
    batch = stream([list(range(40)), list(range(40))])
    found = strided.Anchors(torch.tensor([0, 0, 1]), torch.tensor([10, 11, 10]), 20)
    drawn = decode_branches.branches(flat, batch, found, 10, seed=0).tokens.view(3, 10, 20)
    pairs = {
        "position": (drawn[0, :, 1:], drawn[0, :, :-1]),
        "anchor": (drawn[0, :, 1:], drawn[1, :, :-1]),  # at equal positions
        "document": (drawn[0], drawn[2]),
        "rollout": (drawn[0, 1:], drawn[0, :-1]),
    }
    for part, (one, other) in pairs.items():
        assert (one == other).float().mean() < 0.06, part


def test_rollouts_follow_the_models_distribution(ours, stream, documents):
    """First tokens of 4000 rollouts of one anchor: total variation from softmax(logits / T) below 0.06, the sampling error of 96 cells."""
    batch = stream([documents[0]])
    found = strided.Anchors(torch.tensor([0]), torch.tensor([5]), 1)
    first = decode_branches.branches(ours, batch, found, 4000, temperature=0.7, seed=0).tokens[:, 0]
    logits = models.dense.probe(ours.params, batch["tokens"][:5], ours.cfg)[-1]
    expected = (logits / 0.7).softmax(-1)
    assert 0.5 * (torch.bincount(first, minlength=96) / 4000 - expected).abs().sum() < 0.06


def test_calls_of_a_few_branches_give_the_same(ours, stream, documents, monkeypatch):
    batch = stream(documents)
    whole = decode_branches.branches(ours, batch, found_in(batch), 3, seed=1)
    monkeypatch.setattr(decode_branches, "CHUNK", 4)
    monkeypatch.setattr(decode_branches, "HEAD_ROWS", 5)
    parts = decode_branches.branches(ours, batch, found_in(batch), 3, seed=1)
    assert torch.equal(whole.tokens, parts.tokens)
    torch.testing.assert_close(whole.logp, parts.logp, atol=5e-6, rtol=0)


def test_documents_too_short_for_a_block_give_no_rollouts(ours, stream):
    batch = stream([[1, 2, 3], [4, 5]])
    got = decode_branches.branches(ours, batch, found_in(batch), 2, seed=0)
    assert got.tokens.shape == got.logp.shape == (0, 6) and got.tokens.dtype == torch.int64 and got.lens.shape == (0,)


def test_no_prefix_is_copied(oracle, stream):
    """The largest tensor made while sampling: linear in the blocks of a document, and below one copied prefix per branch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.untyped_storage().nbytes())
            return out

    model = hf.load(oracle("llama")[1])
    batch = stream([torch.randint(0, 96, (110,), generator=torch.Generator().manual_seed(0)).tolist()])
    found = found_in(batch)
    with Largest() as seen:
        decode_branches.branches(model, batch, found, 8, seed=0)
    copied = len(found.start) * 8 * 110 * model.cfg.num_kv_heads * model.cfg.head_dim * 4
    assert seen.size < copied / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"n": 0}, "n is 0"),
        ({"anchors": strided.Anchors(torch.tensor([1]), torch.tensor([49]), 2)}, "starts after 49 tokens of document 1"),
        ({"anchors": strided.Anchors(torch.tensor([1]), torch.tensor([48]), 90)}, "ends at position 138; the model has 128"),
    ],
)
def test_what_cannot_be_sampled_is_refused(ours, stream, documents, options, message):
    batch = stream(documents)
    options = {"anchors": found_in(batch), "n": 1, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        decode_branches.branches(ours, batch, options.pop("anchors"), options.pop("n"), **options)


def test_a_stream_with_branches_is_refused(ours, stream, documents):
    batch = stream(documents)
    grown, _ = strided.grow(batch, found_in(batch), torch.zeros(len(found_in(batch).start), 6, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="branches already"):
        decode_branches.branches(ours, grown, found_in(batch), 1, seed=0)
