"""Documents with branches: each branch with its trunk is the sequence that the same text gives on its own, whatever is packed or cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.core.data import pack, preference, prompts, sources, spans, trees, unpaired
from treetune.ops import attention

PAIR = {"prompt": "What is ice?\n", "chosen": "Frozen water.", "rejected": "A kind of stone."}
TALK = {
    "prompt": [{"role": "user", "content": "What is ice?"}],
    "chosen": [{"role": "assistant", "content": "Frozen water."}],
    "rejected": [{"role": "assistant", "content": "A stone."}],
}


def encode(rows, tokenizer, read=preference.passthrough, **options):
    return trees.encode_rows(sources.from_list(rows, "data.jsonl"), read, tokenizer, **options)


def sequences(doc):
    """(tokens, weights) of the trunk with each branch, by a plain loop."""
    found = []
    for b in range(1, int(doc.branch.max()) + 1) if doc.branch.max() else [0]:
        picked = [i for i in range(len(doc.tokens)) if doc.branch[i] == b or doc.branch[i] == 0 and i < doc.start[doc.branch == b][0]]
        found.append((doc.tokens[picked].tolist(), doc.weight[picked].tolist()))
    return found


def expected(part):
    last = np.flatnonzero(part.weight)[-1] + 1
    return part.tokens[:last].tolist(), part.weight[:last].tolist()


def random_tree(draw):
    trunk = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 5), max_size=4))
    tokens = draw(st.lists(st.integers(0, 99), min_size=trunk + sum(sizes), max_size=trunk + sum(sizes)))
    weights = draw(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=len(tokens), max_size=len(tokens)))
    branch = np.repeat(np.arange(len(sizes) + 1), [trunk, *sizes]).astype(np.int32)
    weight = np.array(weights, np.float32) * (branch > 0 if sizes else np.arange(len(tokens)) > 0)
    leaves = [draw(st.integers(1, trunk)) for _ in sizes]
    start = np.repeat([0, *leaves], [trunk, *sizes]).astype(np.int32)
    return trees.TreeDoc(np.array(tokens, np.int32), branch, start, weight.astype(np.float32), draw(st.integers(1, 99)), {})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), count=st.integers(1, 5), spare=st.integers(0, 7))
def test_collate_against_a_plain_loop(data, count, spare):
    docs = [random_tree(data.draw) for _ in range(count)]
    budget = sum(len(doc.tokens) for doc in docs) + spare
    batch = pack.collate_trees(docs, budget=budget, pad=True, pad_id=7)
    at, targets, weight, seq, positions, row, of_doc, base, last = [], [], [], [], [], [], [], 0, []
    for d, doc in enumerate(docs):
        for b in range(int(doc.branch.max()) + 1):
            own = [i for i in range(len(doc.tokens)) if doc.branch[i] == b]
            positions += [(doc.start[i] if b else 0) + k for k, i in enumerate(own)]
            if b == 0 and doc.branch.max() > 0:
                continue
            for k, i in enumerate(own):
                if doc.weight[i] > 0:
                    at.append(base + (doc.start[i] - 1 if b and k == 0 else i - 1))
                    targets.append(doc.tokens[i])
                    weight.append(doc.weight[i])
                    seq.append(len(row))
            last.append(base + own[-1])
            row.append(doc.row)
            of_doc.append(d)
        base += len(doc.tokens)
    got = {key: value.tolist() for key, value in batch.items()}
    assert (got["at"], got["targets"], got["seq"]) == (at, targets, seq) and got["positions"] == positions + list(range(spare))
    assert got["row"] == row and got["doc_of_seq"] == of_doc and got["seq_lens"] == [seq.count(s) for s in range(len(row))]
    assert got["tokens"] == [token for doc in docs for token in doc.tokens.tolist()] + [7] * spare
    assert got.get("weight", [1.0] * len(weight)) == pytest.approx(weight)
    assert got["cu_docs"] == np.cumsum([0, *(len(doc.tokens) for doc in docs), *([spare] if spare else [])]).tolist()
    assert ("branch" in got) == any(doc.branch.max() > 0 for doc in docs)
    attention.plan(batch)
    ends = pack.collate_trees(docs, read="last")
    assert ends["at"].tolist() == last and "targets" not in ends and ends["seq_lens"].tolist() == [1] * len(row)


def test_each_side_is_the_sequence_of_its_own_text(make_tokenizer, variants, templates):
    for name in variants:
        tokenizer = make_tokenizer(name)
        tokenizer.chat_template = templates["chatml"]
        known = spans.read_special_tokens(tokenizer)
        doc = encode([PAIR], tokenizer)[0][0]
        for side, (tokens, weight) in zip(("chosen", "rejected"), sequences(doc), strict=True):
            text = spans.Text(PAIR["prompt"] + PAIR[side], trees.plain_pair(PAIR["prompt"], PAIR[side]).turns, eos=1.0)
            assert (tokens, weight) == expected(spans.encode([text], tokenizer, known)[0]), name
            assert tokens[-1] == tokenizer.eos_token_id and weight[-1] == 1, name
        assert len(doc.tokens) < sum(len(tokens) for tokens, _ in sequences(doc)), name  # the prompt is there once


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "zephyr", "phi3", "qwen3"])
def test_conversations_are_those_of_supervised_rows(template, make_tokenizer, templates):
    from treetune.core.data import formats

    for name in ("byte", "byte_pad_is_eos", "meta_first", "llama2", "byte_plain"):
        tokenizer = make_tokenizer(name)
        tokenizer.chat_template = templates[template]
        doc = encode([TALK], tokenizer)[0][0]
        rows = [{"messages": TALK["prompt"] + TALK[side]} for side in ("chosen", "rejected")]
        single = formats.encode_rows(sources.from_list(rows), tokenizer)[0]
        assert sequences(doc) == [expected(one) for one in single], name


def test_a_token_across_the_border_is_not_trained_and_reported(tokenizer):
    row = {"prompt": "the answer ", "chosen": "answer", "rejected": "user"}
    docs, report = encode([row], tokenizer)
    assert [tokenizer.decode(np.array(tokens)[np.array(weight) > 0]) for tokens, weight in sequences(docs[0])] == ["</s>", "</s>"]
    assert report.trailing_space_boundaries == 2 and "end in a space" in trees.describe_trees(report)


def test_truncation_cuts_both_sides_at_one_length(make_tokenizer):
    for name in ("byte", "byte_adds_both", "llama2"):
        tokenizer = make_tokenizer(name)
        doc = encode([PAIR], tokenizer)[0][0]
        whole, trunk = sequences(doc), int((doc.branch == 0).sum())
        longest = max(trees.side_lengths(doc))
        for size in range(2, longest + 2):
            sides = [(tokens[:size], weight[:size]) for tokens, weight in whole]
            if not all(any(weight) for _, weight in sides):
                with pytest.raises(ValueError, match="not one row to train on .*a prompt that fills sequence_len"):
                    encode([PAIR], tokenizer, sequence_len=size, overlong="truncate")
                assert size <= trunk
                continue
            docs, report = encode([PAIR], tokenizer, sequence_len=size, overlong="truncate")
            assert sequences(docs[0]) == sides and report.longest == longest
            assert report.truncated == (size < longest) and report.dropped_eos == sum(size < len(tokens) for tokens, _ in whole)


def test_what_is_dropped_is_counted(tokenizer):
    long = PAIR | {"prompt": "hello " * 40 + "\n"}
    alike = {"prompt": "hello\n", "chosen": "the answer is the answer", "rejected": "the answer is the user"}
    rows = [PAIR, PAIR | {"chosen": " \n"}, PAIR | {"rejected": PAIR["chosen"]}, long, alike, PAIR | {"prompt": "", "chosen": "b"}]
    docs, report = encode(rows, tokenizer, sequence_len=30)
    assert report.rows == 6 and report.docs == len(docs) == 2 and [doc.row for doc in docs] == [1, 5]
    assert report.dropped == {trees.EMPTY: 1, trees.SAME: 1, trees.TOO_LONG: 1, trees.NO_PROMPT: 1}
    assert "dropped 1 row (identical completions)" in trees.describe_trees(report)
    cut = len(encode([alike], tokenizer)[0][0].tokens[encode([alike], tokenizer)[0][0].branch == 0]) + 3
    _, report = encode([{"prompt": "a\n", "chosen": "b", "rejected": "c"}, alike], tokenizer, sequence_len=cut, overlong="truncate")
    assert report.dropped == {trees.SAME_CUT: 1}
    with pytest.raises(ValueError, match=r"data.jsonl row 1 has \d+ tokens, more than sequence_len 30: raise sequence_len"):
        encode([long], tokenizer, sequence_len=30, overlong="error")
    with pytest.raises(
        ValueError, match="data.jsonl: not one row to train on in 1, read as rows .1 longer than sequence_len.: raise sequence_len"
    ):
        encode([long], tokenizer, sequence_len=30)
    with pytest.raises(ValueError, match="overlong is 'split': expected one of drop, truncate, error: .* cannot be split"):
        encode([PAIR], tokenizer, overlong="split")


def test_pairs_and_groups_stay_together_when_packed(tokenizer):
    draw = np.random.default_rng(0)
    rows = [
        PAIR | {"prompt": "hello " * int(n) + "\n", "chosen": "the answer " * int(m), "rejected": "user " * int(k)}
        for n, m, k in draw.integers(1, 15, (150, 3))
    ]
    docs, report = encode(rows, tokenizer)
    lengths = [len(doc.tokens) for doc in docs]
    rejoined, supervised = {}, 0
    for chunk in pack.pack(lengths, 600):
        batch = pack.collate_trees([docs[i] for i in chunk], budget=600)
        supervised += len(batch["at"])
        parts = batch["targets"].split(batch["seq_lens"].tolist())
        assert (batch["doc_of_seq"] == torch.arange(len(parts)) // 2).all()
        rejoined |= {row: (parts[2 * i].tolist(), parts[2 * i + 1].tolist()) for i, row in enumerate(batch["row"][::2].tolist())}
    assert supervised == report.supervised and sorted(rejoined) == list(range(1, 151))
    for doc in docs:
        wanted = tuple(np.array(tokens)[np.array(weight) > 0].tolist() for tokens, weight in sequences(doc))
        assert rejoined[doc.row] == wanted


def test_a_group_of_samples(tokenizer):
    prompt = prompts.read_prompts(sources.from_list([{"prompt": "hello", "answer": 3}]), tokenizer)[0][0]
    samples = [(np.array([5, 6], np.int32), np.ones(2)), (np.array([5, 7, 8], np.int32), np.array([1, 0, 1.0]))]
    doc = prompts.completion_tree(prompt, samples, {"advantage": (0.5, -0.5)})
    batch = pack.collate_trees([doc, doc])
    size = len(prompt.tokens)
    assert batch["targets"].tolist() == [5, 6, 5, 8] * 2 and batch["seq_lens"].tolist() == [2, 2, 2, 2]
    assert batch["at"].tolist()[:4] == [size - 1, size, size - 1, size + 3]
    assert batch["advantage"].tolist() == [0.5, -0.5] * 2


def test_kto_gets_foreign_completions(tokenizer):
    rows = sources.from_list(
        [
            {"prompt": "a\n", "completion": "one", "label": True},
            {"prompt": "a\n", "completion": "two", "label": False},
            {"prompt": "b\n", "completion": "three", "label": "true"},
            {"prompt": "c\n", "completion": " ", "label": 1},
        ]
    )
    docs, report = trees.encode_rows(rows, unpaired.add_foreign_replies(rows, unpaired.passthrough), tokenizer, distinct=False)
    spoken = [[tokenizer.decode(doc.tokens[own][doc.weight[own] > 0]) for own in trees.branches(doc)] for doc in docs]
    assert spoken == [["one</s>", "three</s>"], ["two</s>", "three</s>"], ["three</s>", "two</s>"]]
    batch = pack.collate_trees(docs)
    assert batch["kind"].tolist() == [0, 1] * 3 and batch["desirable"].tolist() == [True, True, False, False, True, True]
    assert report.dropped == {trees.EMPTY: 1}
    with pytest.raises(ValueError, match="all 2 rows have one prompt"):
        unpaired.add_foreign_replies(sources.take(rows, [0, 1]), unpaired.passthrough)


def test_extras_must_be_there_for_all(tokenizer):
    with pytest.raises(ValueError, match="data.jsonl row 2 lacks the field margin, unlike row 1: fill it in all rows or in none"):
        encode([PAIR | {"margin": 0.5}, PAIR], tokenizer)
    with pytest.raises(ValueError, match="data.jsonl row 2 has the field margin, unlike row 1"):
        encode([PAIR, PAIR | {"margin": 0.5}], tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at": 1}, "a row is read"),
        ({"targets": 1}, "a target is not the token"),
        ({"positions": 1}, "does not continue"),
        ({"start": -1}, "does not continue|begin with its trunk"),
        ({"doc_of_seq": 1}, "another document"),
    ],
)
def test_broken_streams_are_caught(change, message, tokenizer):
    docs, _ = encode([PAIR, PAIR | {"prompt": "hello\n"}], tokenizer)
    batch = pack.collate_trees(docs)
    pack.check_trees(batch)
    name, step = next(iter(change.items()))
    broken = (batch[name] + step) % max(2, int(batch[name].max()) + 1)
    with pytest.raises(AssertionError, match=message):
        pack.check_trees(batch | {name: broken.to(batch[name].dtype)})


def test_no_documents_give_a_legal_filler():
    batch = pack.collate_trees([], pad_id=3)
    assert batch["tokens"].tolist() == [3] and len(batch["at"]) == len(batch["row"]) == 0
    with pytest.raises(ValueError, match="read is 'all'"):
        pack.collate_trees([], read="all")
