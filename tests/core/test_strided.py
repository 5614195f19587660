"""Strided geometry: the worked numbers of the method, a loop that builds the same trees, and what is left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.core import check, strided
from treetune.core.data import pack
from treetune.ops import attention, attention_mask

OPTIONS = {"stride": 4, "context_length": 4, "generate_max_len": 2}


def stream(lens, padding=0, rows=None):
    """The packed batch of bare documents with every token but the first scored, and perhaps a padding document."""
    sizes = torch.tensor([*lens, *([padding] if padding else [])])
    cu = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    tokens = torch.arange(int(cu[-1])) + 100
    at = torch.cat([torch.arange(lo, lo + size - 1) for lo, size in zip(cu.tolist(), lens, strict=False)])
    own = torch.tensor(lens) - 1
    return {
        "tokens": tokens, "positions": torch.cat([torch.arange(size) for size in sizes.tolist()]), "cu_docs": cu.int(),
        "at": at, "targets": tokens[at + 1], "seq": torch.arange(len(lens)).repeat_interleave(own), "seq_lens": own,
        "doc_of_seq": torch.arange(len(lens)), "row": torch.arange(len(lens)) + 7 if rows is None else torch.tensor(rows),
    }  # fmt: skip


@pytest.mark.parametrize(("size", "expected"), [(1024, 127), (256, 31), (2048, 255), (16, 1), (15, 0), (1, 0)])
def test_anchors_of_raw_text(size, expected):
    found = strided.anchors(torch.tensor([size]), stride=8, context_length=8, generate_max_len=8)
    assert found.start.tolist() == [8 + 8 * block for block in range(expected)]


def test_anchors_after_a_prompt():
    options = {"stride": 8, "context_length": 8, "generate_max_len": 8, "min_completion_prefix": 8}
    found = strided.anchors(torch.tensor([1024]), prompt_lengths=torch.tensor([100]), **options)
    assert found.start[0] == 108 and found.start.shape == (114,) and found.start[-1] + 8 <= 1024
    # The prefix is for completions only, a short prompt gives way to the context, and each document has its own first anchor.
    found = strided.anchors(torch.tensor([64, 64, 64]), prompt_lengths=torch.tensor([0, 3, 30]), **options | {"context_length": 20})
    assert [found.start[found.document == doc][0].item() for doc in range(3)] == [20, 20, 38]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20)), min_size=1, max_size=4),
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5),
)  # fmt: skip
def test_anchors_are_all_the_places_that_fit(documents, stride, context, length, prefix):
    lens, prompts = (torch.tensor(side) for side in zip(*documents, strict=True))
    expected = []
    for doc, (size, prompt) in enumerate(documents):
        at = max(prompt + prefix, context) if prompt else context
        while at + length <= size:
            expected.append((doc, at))
            at += stride
    found = strided.anchors(
        lens, stride=stride, context_length=context, generate_max_len=length, prompt_lengths=prompts, min_completion_prefix=prefix
    )
    assert list(zip(found.document.tolist(), found.start.tolist(), strict=True)) == expected and found.length == length


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=25), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 4))
def test_blocks_that_are_not_trained_to_their_end_have_no_anchor(documents, stride, length):
    """Against a loop over documents: an anchor counts where all of its block's tokens are trained."""
    lens = torch.tensor([len(flags) for flags in documents])
    cu, scored = torch.nn.functional.pad(lens.cumsum(0), (1, 0)), torch.tensor([flag for flags in documents for flag in flags])
    found = strided.anchors(lens, stride=stride, context_length=1, generate_max_len=length)
    kept = strided.trained_blocks(found, cu, scored)
    pairs = zip(found.document.tolist(), found.start.tolist(), strict=True)
    expected = [(doc, at) for doc, at in pairs if all(documents[doc][at : at + length])]
    assert list(zip(kept.document.tolist(), kept.start.tolist(), strict=True)) == expected and kept.length == length


def test_the_trained_tokens_of_a_stream():
    batch = stream([4, 1, 3], padding=2)
    assert strided.scored(batch).int().tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 0, 0]


def test_the_worked_mask():
    """12 tokens, anchors 4 and 8, blocks of 2: mask, positions and rows as worked out by hand, generated tokens step by step."""
    batch = stream([12])
    found = strided.anchors(strided.lengths(batch), **OPTIONS)
    place = strided.layout(batch["cu_docs"], found, 1)
    steps = torch.cat([place.trunk, place.generated.T.flatten()])  # document, then s0b0 s0b1 s1b0 s1b1
    keys = {"positions": place.positions, "branch": place.branch, "start": place.start, "cu_docs": place.cu_docs}
    seen = attention_mask.allowed(keys, steps[:, None], steps[None], None).int()
    assert torch.equal(seen[:12, :12], torch.ones(12, 12, dtype=torch.int32).tril()) and not seen[:12, 12:].any()
    assert ["".join(map(str, row)) for row in seen[12:].tolist()] == [
        "1111000000001000",
        "1111111100000100",
        "1111000000001010",
        "1111111100000101",
    ]
    assert place.positions[steps].tolist() == [*range(12), 4, 8, 5, 9]
    assert (place.source.T.flatten()[:, None] == steps).int().argmax(1).tolist() == [3, 7, 12, 13]
    assert place.truth.tolist() == [[4, 5], [8, 9]]
    assert strided.prefix_rows(batch["cu_docs"], found).tolist() == [3, 7]


def trees_of(batch, found, rollouts, n):
    """Documents, their rollouts, and what predicts each token, built by a loop: (tokens, positions, branch, start, source)."""
    tokens, positions, branch, start, source, cu = [], [], [], [], [], batch["cu_docs"].tolist()
    for doc, (lo, hi) in enumerate(zip(cu, cu[1:], strict=False)):
        base = len(tokens)
        tokens += batch["tokens"][lo:hi].tolist()
        positions, branch, start = positions + list(range(hi - lo)), branch + [0] * (hi - lo), start + [0] * (hi - lo)
        mine = [r for r in range(len(rollouts)) if found.document[r // n] == doc]
        for number, r in enumerate(mine, 1):
            anchor = int(found.start[r // n])
            for step, token in enumerate(rollouts[r].tolist()):
                source.append(base + anchor - 1 if step == 0 else len(tokens) - 1)
                tokens.append(token)
                positions.append(anchor + step)
                branch.append(number)
                start.append(anchor)
    return tokens, positions, branch, start, source


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("lens", "padding"), [([12], 0), ([12, 3, 17], 0), ([5, 30, 9], 40), ([4, 2], 0)])
def test_a_grown_stream_is_the_trees_that_a_loop_builds(lens, padding, n):
    batch = stream(lens, padding=padding)
    found = strided.anchors(strided.lengths(batch), **OPTIONS)
    rollouts = torch.arange(len(found.start) * n * 2).view(-1, 2) + 1000
    grown, place = strided.grow(batch, found, rollouts, n)
    tokens, positions, branch, start, source = trees_of(batch, found, rollouts, n)
    assert grown["tokens"].tolist() == tokens and grown["positions"].tolist() == positions
    assert grown["branch"].tolist() == branch and grown["start"].tolist() == start
    assert grown["at"].tolist() == source and torch.equal(grown["targets"].view(-1, 2), rollouts)
    check.batch(grown)
    pack.check_trees(grown)
    attention.plan(grown)
    # The block that an anchor stands for is the document's own text from there on.
    assert torch.equal(grown["tokens"][place.truth][:, 0], batch["tokens"][strided.prefix_rows(batch["cu_docs"], found) + 1])
    assert torch.equal(grown["tokens"][place.truth].diff(), torch.ones(len(found.start), 1, dtype=torch.int64))


def test_documents_carry_the_cross_entropy_term_once_whatever_n_is():
    batch = stream([12, 3, 17], padding=9)
    found = strided.anchors(strided.lengths(batch), **OPTIONS)
    for n in (1, 4):
        grown, _ = strided.grow(batch, found, torch.zeros(len(found.start) * n, 2, dtype=torch.int64), n)
        assert torch.equal(grown["tokens"][grown["prompt_at"] + 1], grown["prompt_targets"])
        assert torch.equal(grown["prompt_targets"], batch["targets"])
        assert not grown["branch"][grown["prompt_at"]].any()


def test_a_document_without_anchors_keeps_its_row_and_padding_has_none():
    batch = stream([12, 3, 17], padding=30, rows=[5, 9, 2])
    assert strided.lengths(batch).tolist() == [12, 3, 17, 0]
    found = strided.anchors(strided.lengths(batch), **OPTIONS)
    assert found.document.tolist() == [0, 0, 2, 2, 2]
    grown, _ = strided.grow(batch, found, torch.zeros(10, 2, dtype=torch.int64), 2)
    assert grown["row"].tolist() == [5] * 4 + [9] + [2] * 6 and grown["doc_of_seq"].tolist() == [0] * 4 + [1] + [2] * 6
    assert strided.sequences(grown).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert grown["seq_lens"].tolist() == [2] * 4 + [0] + [2] * 6


def test_rows_grow_linearly_with_blocks_and_rollouts():
    sizes = [len(strided.layout(torch.tensor([0, 200]), strided.anchors(torch.tensor([200]), **OPTIONS), n).positions) for n in (1, 2, 3)]
    assert sizes == [200 + n * 49 * 2 for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 0}, "stride is 0; expected at least 1"),
        ({"context_length": 0}, "context_length is 0; expected at least 1"),
        ({"generate_max_len": 0}, "generate_max_len is 0; expected at least 1"),
        ({"min_completion_prefix": -1}, "min_completion_prefix is -1; expected at least 0"),
        ({"prompt_lengths": torch.tensor([1, 2])}, "prompt_lengths has shape"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        strided.anchors(torch.tensor([40]), **OPTIONS | change)


def test_anchors_outside_their_documents_are_refused():
    cu, one = torch.tensor([0, 6, 9]), torch.tensor([1])
    with pytest.raises(ValueError, match="anchor 0 starts after 4 tokens of document 1; expected 1 to 3"):
        strided.layout(cu, strided.Anchors(one, torch.tensor([4]), 2), 1)
    with pytest.raises(ValueError, match="starts after 0 tokens"):
        strided.layout(cu, strided.Anchors(one, torch.tensor([0]), 2), 1)
    with pytest.raises(ValueError, match="rising order"):
        strided.layout(cu, strided.Anchors(torch.tensor([1, 0]), torch.tensor([2, 2]), 2), 1)
    with pytest.raises(ValueError, match="n is 0"):
        strided.layout(cu, strided.Anchors(one, one, 2), 0)


def test_streams_and_rollouts_that_do_not_fit_are_refused():
    batch = stream([12])
    found = strided.anchors(strided.lengths(batch), **OPTIONS)
    with pytest.raises(ValueError, match=r"rollouts of shape \[3, 2\]; expected \[2, 2\]"):
        strided.grow(batch, found, torch.zeros(3, 2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="the stream has weight"):
        strided.grow(batch | {"weight": torch.ones(11)}, found, torch.zeros(2, 2, dtype=torch.int64), 1)
