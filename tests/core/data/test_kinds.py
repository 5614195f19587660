"""Kinds of rows: what columns and names mean, which options count, and what a stream of each kind reads."""

import numpy as np
import pytest

from treetune.core.data import kinds, pack, sources, workers

K = kinds.KINDS
TALK = [{"role": "user", "content": "What is ice?"}, {"role": "assistant", "content": "Frozen water."}]
PAIR = {"prompt": "What is ice?\n", "chosen": "Frozen water.", "rejected": "A kind of stone."}


def rows(listed, name="data.jsonl"):
    return sources.from_list(listed, name)


def encode(kind, listed, tokenizer, **options):
    format = options.pop("format", None) or K[kind].detect(list(listed[0]), listed[0])
    return K[kind].encode(rows(listed), tokenizer, format=format, **options)


@pytest.fixture
def talker(make_tokenizer, templates):
    made = make_tokenizer("byte")
    made.chat_template = templates["chatml"]
    return made


def test_whole_conversations_beside_messages_and_prompt_are_read_as_such():
    reply, other = {"role": "assistant", "content": "Frozen water."}, {"role": "assistant", "content": "A stone."}
    row = {"prompt": "What is ice?", "chosen": [TALK[0], reply], "rejected": [TALK[0], other], "messages": [TALK[0], reply]}
    assert K["pairs"].detect(list(row), row) == "chat_template.argilla"
    assert K["pairs"].detect(list(row), row | {"chosen": reply, "rejected": other}) == "chat_template.default"
    assert K["pairs"].detect(list(row), row | {"messages": TALK[:1]}) == "chat_template.default"


@pytest.mark.parametrize(
    ("kind", "columns", "name"),
    [
        ("text", "messages", "chat"),
        ("pairs", "messages chosen rejected", "chat_template.default"),
        ("pairs", "prompt chosen rejected margin", "passthrough"),
        ("pairs", "chosen rejected", "chat_template.argilla"),
        ("pairs", "chosen rejected system", "chat_template.argilla"),
        ("pairs", "prompt answers", "zephyr.nectar"),
        ("unpaired", "prompt completion label", "passthrough"),
        ("ranked", "input chosen rejected", "bradley_terry.chat_template"),
        ("ranked", "system input chosen rejected margin", "bradley_terry.chat_template"),
        ("ranked", "prompt chosen rejected", "passthrough"),
        ("ranked", "chosen rejected", "chat_template.argilla"),
        ("steps", "prompt completions labels", "stepwise_supervised"),
    ],
)
def test_columns_mean_a_format(kind, columns, name):
    assert K[kind].detect(columns.split()) == name


@pytest.mark.parametrize(
    ("kind", "columns", "said"),
    [
        ("pairs", "question chosen rejected", "name one of the formats with these columns: .*chatml.intel.*llama3.intel"),
        ("pairs", "input chosen rejected", "name one of the formats with these columns: .*chatml.icr.*llama3.icr"),
        ("pairs", "messages", "passthrough needs prompt . chosen . rejected; .*name one of the other formats: chatml.default"),
        ("unpaired", "instruction completion label", "name one of the formats with these columns: chatml.argilla"),
        ("unpaired", "prompt chosen rejected", "passthrough needs prompt . completion . label"),
        ("steps", "prompt completion label", "stepwise_supervised needs prompt . completions . labels"),
        ("text", "prompt chosen rejected", "no format fits"),
    ],
)
def test_columns_that_do_not_tell_are_an_error_with_the_choices(kind, columns, said):
    with pytest.raises(ValueError, match=said):
        K[kind].detect(columns.split())


def test_a_row_tells_conversations_from_texts():
    talks = {"prompt": "What is ice?", "chosen": TALK, "rejected": TALK}
    assert K["pairs"].detect(list(talks), talks) == "chat_template.argilla"
    assert K["pairs"].detect(list(PAIR), PAIR) == "passthrough"
    asked = {"question": "What is ice?", "chosen": TALK, "rejected": TALK}
    assert K["pairs"].detect(list(asked), asked) == "chat_template.argilla"


@pytest.mark.parametrize(
    ("kind", "short", "name"),
    [
        ("text", "chat_template", "chat"),
        ("pairs", "chatml", "chatml.default"),
        ("pairs", "llama3", "llama3.default"),
        ("pairs", "zephyr", "zephyr.nectar"),
        ("pairs", "chat_template", "chat_template.default"),
        ("pairs", "user_defined", "user_defined.default"),
        ("pairs", "chatml.ultra", "chatml.ultra"),
        ("unpaired", "user_defined", "user_defined.default"),
        ("ranked", "bradley_terry", "bradley_terry.chat_template"),
        ("steps", "stepwise_supervised", "stepwise_supervised"),
    ],
)
def test_short_names(kind, short, name):
    assert K[kind].canonical(short) == name


@pytest.mark.parametrize("kind", K)
def test_an_unknown_name_lists_all(kind):
    with pytest.raises(ValueError, match="unknown format 'nonsense'") as caught:
        K[kind].canonical("nonsense")
    assert set(str(caught.value).partition("one of ")[2].split(", ")) == set(K[kind].names)


def test_options_that_a_format_takes(talker):
    assert "chat_template" in K["pairs"].takes("chat_template.default") and "chat_template" not in K["pairs"].takes("chatml.intel")
    assert set(K["steps"].takes("stepwise_supervised")) == {"step_separator", "train_on_last_step_only"}
    assert "chat_template" not in K["pairs"].takes("passthrough", PAIR)
    assert "chat_template" in K["pairs"].takes("passthrough", PAIR | {"prompt": TALK[:1]})
    with pytest.raises(ValueError, match="format passthrough of plain text takes no chat_template"):
        encode("pairs", [PAIR], talker, format_options={"chat_template": "llama3"})
    with pytest.raises(ValueError, match="format stepwise_supervised takes no separator; it takes step_separator"):
        encode("steps", [{"prompt": "a", "completions": ["b"], "labels": [True]}], talker, format_options={"separator": "x"})


def test_chat_template_and_a_formats_own_options_reach_the_tokens(talker):
    said = [{"question": TALK[:1], "chosen": "Water.", "rejected": "Stone."}]
    own = {"field_messages": "question"}
    plain = encode("pairs", said, talker, format="chat_template.default", format_options=own)[0][0]
    other = encode("pairs", said, talker, format="chat_template.default", format_options=own | {"chat_template": "llama3"})[0][0]
    assert talker.decode(plain.tokens[:2]).startswith("<|im_start|>") and "<|start_header_id|>" in talker.decode(other.tokens)


def sides(batch, tokenizer):
    """The scored text of each sequence."""
    return [tokenizer.decode(batch["targets"][batch["seq"] == i]).replace("</s>", "") for i in range(len(batch["seq_lens"]))]


def test_pairs_are_read_chosen_first(talker):
    docs, report = encode("pairs", [PAIR, PAIR | {"prompt": "And snow?\n", "margin": None}], talker)
    batch = pack.collate_trees(docs, read=K["pairs"].read)
    assert sides(batch, talker) == [PAIR["chosen"], PAIR["rejected"]] * 2
    assert "2 rows -> 2 documents" in K["pairs"].describe(report)


def test_judged_rows_have_their_own_completion_and_one_of_another_prompt(talker):
    listed = [{"prompt": f"Name {i // 2}:\n", "completion": f"it{i}", "label": i % 3 == 0} for i in range(8)]
    docs, _ = encode("unpaired", listed, talker)
    batch = pack.collate_trees(docs, read=K["unpaired"].read)
    texts = sides(batch, talker)
    assert texts[::2] == [row["completion"] for row in listed]
    assert batch["kind"].tolist() == [0, 1] * 8
    assert batch["desirable"].tolist() == [i % 3 == 0 for i in range(8) for _ in range(2)]
    for i, text in enumerate(texts[1::2]):
        assert int(text.removeprefix("it")) // 2 != i // 2
    K["unpaired"].check(docs)


@pytest.mark.parametrize(("label", "said"), [(True, "4 rows are desirable .* and 0 undes.*add rows with label false"),
                                             (False, "0 rows are desirable .* and 4 undes.*add rows with label true")])  # fmt: skip
def test_rows_of_one_class_are_an_error_that_counts_them(talker, label, said):
    docs, _ = encode("unpaired", [{"prompt": f"Name {i}: ", "completion": "It is", "label": label} for i in range(4)], talker)
    with pytest.raises(ValueError, match=said):
        K["unpaired"].check(docs)


def test_ranked_pairs_are_read_at_the_last_token_of_each_side(talker):
    docs, _ = encode("ranked", [{"input": "What is ice?", "chosen": "Water.", "rejected": "A stone.", "margin": 2}], talker)
    batch = pack.collate_trees(docs, read=K["ranked"].read)
    ends = [np.flatnonzero(docs[0].branch == b)[-1] for b in (1, 2)]
    assert batch["at"].tolist() == ends and batch["margin"].tolist() == [2.0, 2.0] and "targets" not in batch


def test_steps_are_read_where_each_ends(talker):
    listed = [{"prompt": "Add.", "completions": ["1+1=2", "2+2=5"], "labels": [True, False]}]
    docs, _ = encode("steps", listed, talker)
    batch = pack.collate_trees(docs, read=K["steps"].read)
    assert batch["targets"].tolist() == [1, 0] and batch["at"][-1] == len(docs[0].tokens) - 1
    assert talker.decode(docs[0].tokens[: batch["at"][0] + 1]).endswith("1+1=2\n")
    last = encode("steps", listed, talker, format_options={"train_on_last_step_only": True})[0]
    assert pack.collate_trees(last, read="classes")["targets"].tolist() == [0]


def test_a_pair_may_hold_nearly_twice_sequence_len(talker):
    long = {"prompt": "a", "chosen": "b" * 30, "rejected": "c" * 30}
    docs, report = encode("pairs", [long], talker, sequence_len=32, overlong="error")
    assert len(docs[0].tokens) == 1 + 31 + 31 and report.longest == 32
    with pytest.raises(ValueError, match="33 tokens, more than sequence_len 32"):
        encode("pairs", [long | {"chosen": "b" * 31}], talker, sequence_len=32, overlong="error")


def test_progress_counts_every_row(talker):
    for kind, listed in (
        ("pairs", [PAIR] * 5),
        ("unpaired", [{"prompt": str(i), "completion": "x", "label": True} for i in range(5)]),
        ("steps", [{"prompt": "a", "completions": ["b"], "labels": [1]}] * 5),
    ):
        seen = []
        encode(kind, listed, talker, progress=seen.append)
        assert sum(seen) == 5


def in_two(listed, talker, **options):
    return workers.encode_rows(rows(listed), talker, processes=2, kind=K["pairs"], format="passthrough", **options)


@pytest.mark.parametrize(("empty", "told"), [((3,), [2] * 16), ((2, 3), [2])])  # 32 rows are 16 parts of 2; a part without documents
def test_two_processes_give_the_pairs_of_one(talker, shared_pool, empty, told):
    listed = [PAIR | {"prompt": f"What is {i}?", "rejected": "" if i in empty else "Stone."} for i in range(32)]
    one, seen = K["pairs"].encode(rows(listed), talker, format="passthrough"), []
    two = in_two(listed, talker, progress=seen.append)
    assert two[1] == one[1] and one[1].dropped == {"an empty completion": len(empty)} and seen == told
    assert all(np.array_equal(a.tokens, b.tokens) and a.row == b.row for a, b in zip(one[0], two[0], strict=True))


def test_two_processes_find_what_parts_cannot_see(talker, shared_pool):
    good = [PAIR | {"prompt": f"What is {i}?"} for i in range(16)]
    with pytest.raises(ValueError, match="data.jsonl row 17 has the field margin, unlike row 1"):
        in_two(good + [row | {"margin": 1.0} for row in good], talker)
