"""Documents of strided rollouts: what columns mean, what is cut, split and left out, and where blocks are in conversations."""

import numpy as np
import pytest
import torch

from treetune.core import check, strided
from treetune.core.data import cache, formats, kinds, pack, row_formats, sources, strides

PLACES = strides.Places(stride=4, context_length=4, generate_max_len=3)
TALK = [
    {"role": "user", "content": "What is ice made of, and why?"},
    {"role": "assistant", "content": "It is frozen water."},
    {"role": "user", "content": "And what would steam be, then?"},
    {"role": "assistant", "content": "It is boiling water, a gas."},
]


@pytest.fixture
def words(make_tokenizer, templates):
    made = make_tokenizer("byte")
    made.chat_template = templates["chatml"]
    return made


def encode(listed, words, *, places=PLACES, **options):
    kind = kinds.strided(places)
    rows = sources.from_list(listed, "data.jsonl")
    name = options.pop("format", None) or kind.detect(sources.columns(rows), rows.rows[0])
    return kind.encode(rows, words, format=name, **options)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("text", "ebft_pretrain.transform"),
        ("text source", "ebft_pretrain.transform"),
        ("messages", "ebft_strided_chat.transform"),
        ("conversations", "ebft_strided_chat.transform"),
        ("input output", "ebft_strided_structured.transform"),
        ("question answer", "ebft_strided_structured.transform"),
        ("prompt completion", "ebft_strided_structured.transform"),
        ("input_ids labels prompt_length text", "pretokenised"),
    ],
)
def test_columns_mean_a_transform(columns, name):
    assert kinds.KINDS["strided"].detect(columns.split()) == name


def test_names():
    kind = kinds.KINDS["strided"]
    transforms = ("ebft_pretrain", "ebft_strided_structured", "ebft_strided_chat")
    assert set(kind.names) == {*(f"{name}.transform" for name in transforms), "ebft_reasoning.transform_strided", "pretokenised"}
    assert all(kind.canonical(name) == name for name in kind.names)
    assert kind.canonical("ebft_pretrain") == "ebft_pretrain.transform"
    with pytest.raises(ValueError, match="unknown format 'alpaca': expected one of ebft_pretrain.transform, .*, pretokenised"):
        kind.canonical("alpaca")
    with pytest.raises(ValueError, match="the columns chosen, rejected do not tell the format: ebft_pretrain.transform needs text"):
        kind.detect(["chosen", "rejected"])
    assert kind.takes("ebft_reasoning.transform_strided") == row_formats.CHAT and kind.takes("ebft_pretrain.transform") == ()


def test_raw_text_is_split_so_that_every_token_is_predicted_once(words):
    (whole,), _ = encode([{"text": "x" * 7 + "y" * 9 + "z" * 12}], words)
    docs, report = encode([{"text": "x" * 7 + "y" * 9 + "z" * 12}], words, sequence_len=10)
    assert [len(doc.tokens) for doc in docs[:-1]] == [10] * (len(docs) - 1) and report.split == 1 and report.longest == len(whole.tokens)
    predicted = np.concatenate([doc.tokens[doc.weight > 0] for doc in docs])
    assert predicted.tolist() == whole.tokens[1:].tolist() and all(doc.prompt_length == 0 for doc in docs)
    assert "1 rows split" in strides.describe_strided(report)


@pytest.mark.parametrize("overlong", ["truncate", "drop", "error"])
def test_a_long_answer_is_cut_a_long_prompt_dropped(words, overlong):
    rows = [{"input": "a" * size, "output": "b" * more} for size, more in ((6, 8), (6, 30), (20, 8))]
    if overlong == "error":
        with pytest.raises(ValueError, match="data.jsonl row 2 has 36 tokens, more than sequence_len 16"):
            encode(rows, words, sequence_len=16, overlong=overlong)
        return
    docs, report = encode(rows, words, sequence_len=16, overlong=overlong)
    assert [doc.row for doc in docs] == [1, 2][: 1 + (overlong == "truncate")] and max(len(doc.tokens) for doc in docs) <= 16
    assert report.truncated == (overlong == "truncate") and sum(report.dropped.values()) == (1 if overlong == "truncate" else 2)
    assert all((doc.prompt_length, doc.weight[6:].all(), doc.weight[:6].any()) == (6, True, False) for doc in docs)


def test_documents_without_a_block_are_dropped_or_kept_for_cross_entropy(words):
    rows = [{"text": "x" * size} for size in (3, 5, 6, 20)]  # an EOS follows each
    size = PLACES.context_length + PLACES.generate_max_len
    kept, report = encode(rows, words)
    assert [len(doc.tokens) for doc in kept] == [4, 6, 7, 21] and report.short == 2 and report.blocks == 1 + 4
    assert "2 documents for cross-entropy alone" in strides.describe_strided(report) and "5 blocks" in strides.describe_strided(report)
    docs, report = encode(rows, words, places=PLACES._replace(needed=True))
    assert [len(doc.tokens) for doc in docs] == [7, 21] and min(len(doc.tokens) for doc in docs) == size
    assert "2 documents dropped (no room for a block: shorter than context_length + generate_max_len" in strides.describe_strided(report)
    with pytest.raises(ValueError, match="not one document to train on in 2 rows.*2 with no room for a block.*lower context_length"):
        encode(rows[:2], words, places=PLACES._replace(needed=True))
    with pytest.raises(ValueError, match=r"not one of 2 documents has room for a block \(context_length 4, generate_max_len 3, longest"):
        kinds.strided(PLACES, blocks=True).check(kept[:2])
    kinds.strided(PLACES).check(kept[:2])
    kinds.strided(PLACES, blocks=True).check(kept)


def test_empty_rows_are_dropped_and_counted(words):
    docs, report = encode([{"text": "  "}, {"text": "x" * 30}], words)
    assert [doc.row for doc in docs] == [2] and report.dropped == {formats.EMPTY: 1} and report.docs == 1
    with pytest.raises(ValueError, match="not one token to train on"):
        encode([{"text": ""}], words)


@pytest.mark.parametrize("name", ["ebft_strided_chat.transform", "ebft_reasoning.transform_strided"])
def test_blocks_of_a_conversation_are_what_the_assistant_said(words, name):
    """Of every reply, or of the last only; never the user's words, nor the headers of turns."""
    places = strides.Places(stride=1, context_length=2, generate_max_len=4)
    docs, report = encode([{"messages": TALK}], words, format=name, places=places)
    batch = strides.collate(docs)
    found = strided.anchors(strided.lengths(batch), prompt_lengths=batch["prompt_length"], **strides.anchor_options(places))
    kept = strided.trained_blocks(found, batch["cu_docs"], strided.scored(batch))
    blocks = [words.decode(batch["tokens"][start : start + 4]) for start in kept.start.tolist()]
    replies = [said["content"] + "<|im_end|>" for said in TALK if said["role"] == "assistant"]
    replies = replies if name == "ebft_strided_chat.transform" else replies[1:]
    expected = [words.decode(ids[i : i + 4]) for reply in replies if (ids := words.encode(reply)) for i in range(len(ids) - 3)]
    assert blocks == expected and report.blocks == len(expected) < len(found.start)
    assert words.decode(batch["tokens"][: batch["prompt_length"]]).endswith("assistant\n")


def test_options_of_the_chat_template_reach_it(words):
    shout = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ mark }}{{ m.content }}<|im_end|>\n{% endfor %}"
    own = {"chat_template": shout, "chat_template_kwargs": {"mark": "!!"}}
    (doc,), _ = encode([{"messages": TALK}], words, format_options=own)
    assert words.decode(doc.tokens).count("!!") == 4
    with pytest.raises(ValueError, match="ebft_pretrain.transform takes no chat_template, chat_template_kwargs; it takes no options"):
        encode([{"text": "x"}], words, format_options=own)


def test_rows_that_are_tokens_already(words):
    rows = [
        {"input_ids": [5, 6, 7, 8, 9, 10, 11, 12], "labels": [-100, -100, 7, 8, 9, 10, 11, 12], "prompt_length": 2},
        {"input_ids": list(range(20, 32)), "labels": None},
        {"input_ids": [5, 6, 7, 8], "prompt_length": 4},
    ]
    docs, report = encode(rows, words)
    assert [(doc.prompt_length, int(doc.weight.sum())) for doc in docs] == [(2, 6), (0, 11)] and report.dropped == {formats.EMPTY: 1}
    with pytest.raises(ValueError, match="data.jsonl row 1: field prompt_length is 9, expected a whole number from 0 to 3"):
        encode([{"input_ids": [5, 6, 7], "prompt_length": 9}], words)


def test_a_stream_knows_its_prompts(words):
    docs, _ = encode([{"input": "a" * 6, "output": "b" * 9}, {"input": "a", "output": "b" * 19}], words)
    for some, budget in ((docs, None), (docs, 64), ([], None)):
        batch = strides.collate(some, budget=budget, pad=budget is not None)
        check.batch(batch)
        pack.check_stream(batch)
        assert batch["prompt_length"].tolist() == [6, 1][: len(some)] and batch["prompt_length"].dtype == torch.int64
        assert strided.scored(batch).tolist()[: sum(len(doc.tokens) for doc in some)] == [w > 0 for doc in some for w in doc.weight]


def test_kept_on_disk_as_they_were(words, tmp_path):
    docs, report = encode([{"text": "x" * 30}, {"text": "y"}], words)
    cache.save_entry(tmp_path, "one", docs, report)
    again, told = cache.load_entry(tmp_path, "one")
    assert told == report and len(again) == len(docs)
    for one, other in zip(docs, again, strict=True):
        assert one.prompt_length == other.prompt_length and (one.tokens == other.tokens).all() and (one.weight == other.weight).all()
    assert kinds.strided(PLACES).name != kinds.strided(PLACES._replace(needed=True)).name, "another folder for other documents"


def test_reports_of_parts_add_up(words):
    parts = [encode(rows, words, sequence_len=12)[1] for rows in ([{"text": "x" * 30}], [{"text": "y"}, {"text": " "}])]
    both, whole = (
        strides.merge_strided_reports(parts),
        encode([{"text": "x" * 30}, {"text": "y"}, {"text": " "}], words, sequence_len=12)[1],
    )
    assert both == whole
