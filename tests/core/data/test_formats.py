import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treetune.core.data import formats, instruction, sources, spans

EXAMPLES = Path(__file__).parents[3] / "examples" / "data"
CHAT = {"messages": [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is 4."}]}
ALPACA = {"instruction": "hello", "input": "", "output": "the answer"}


def encode(rows, tokenizer, **options):
    return formats.encode_rows(sources.from_list(rows, "data.jsonl"), tokenizer, **options)


def trained(doc, tokenizer):
    return tokenizer.decode(doc.tokens[doc.weight > 0])


# --- which format


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["messages"], "chat"),
        (["id", "conversations"], "chat"),
        (["messages", "text"], "chat"),
        (["instruction", "input", "output"], "alpaca"),
        (["output", "instruction", "text"], "alpaca"),
        (["text", "meta"], "completion"),
    ],
)
def test_detection(columns, name):
    assert formats.detect(columns) == name


def test_nothing_fits():
    with pytest.raises(ValueError, match="no format fits the columns question, answer: chat needs messages or conversations; alpaca needs"):
        formats.detect(["question", "answer"])


def test_unknown_format_and_options(tokenizer):
    with pytest.raises(ValueError, match="unknown format 'sharegpt': expected one of chat, alpaca,.*completion"):
        encode([CHAT], tokenizer, format="sharegpt")
    with pytest.raises(ValueError, match="format completion takes no train_on_eos; it takes field"):
        encode([{"text": "a"}], tokenizer, train_on_eos="all")
    with pytest.raises(ValueError, match="overlong is 'cut': expected one of drop, truncate, split, error"):
        encode([CHAT], tokenizer, overlong="cut")
    with pytest.raises(ValueError, match="sequence_len is 1"):
        encode([CHAT], tokenizer, sequence_len=1)


# --- instruction rows


def test_alpaca_wording():
    expected = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nadd\n\n### Input:\n1, 2\n\n### Response:\n"
    )
    assert instruction.alpaca_prompt({"instruction": "add", "input": "1, 2"}) == expected
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nadd\n\n### Response:\n"
    )
    assert instruction.alpaca_prompt({"instruction": "add", "input": None}) == expected
    assert (
        instruction.alpaca_prompt({"instruction": "add", "system": "Be brief."}) == "Be brief.\n\n### Instruction:\nadd\n\n### Response:\n"
    )


def test_alpaca_trains_the_output_and_an_eos(variants, make_tokenizer):
    for name, variant in variants.items():
        tokenizer = make_tokenizer(name)
        docs, report = encode([ALPACA], tokenizer)
        ids = docs[0].tokens.tolist()
        plain = tokenizer(instruction.alpaca_prompt(ALPACA) + "the answer", add_special_tokens=False)["input_ids"]
        bos = [tokenizer.bos_token_id] if variant.adds_bos else []
        assert ids == bos + plain + [tokenizer.eos_token_id], name
        assert docs[0].weight[-1] == 1 and (docs[0].weight[-4:-1] > 0).any() and docs[0].weight[0] == 0
        assert "Response" not in trained(docs[0], tokenizer) and report.missing_bos == 0


def test_alpaca_text(tokenizer):
    docs, _ = encode([ALPACA], tokenizer)
    assert trained(docs[0], tokenizer) == "the answer</s>"
    docs, _ = encode([ALPACA], tokenizer, train_on_inputs=True)
    assert (docs[0].weight[1:] == 1).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a"}, "data.jsonl row 2 has no field output; it has instruction"),
        ({"instruction": "a", "output": None}, "row 2: field output is null, expected a value"),
        ({"instruction": "a", "output": 4}, "row 2: field output is of type int, expected text"),
        ({"instruction": "a", "output": "b", "input": []}, "row 2: field input is of type list"),
    ],
)
def test_bad_alpaca_rows(row, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        encode([ALPACA, row], tokenizer)


def test_blank_outputs_are_dropped_and_counted(tokenizer):
    docs, report = encode([ALPACA | {"output": " \n"}, ALPACA, ALPACA | {"output": ""}], tokenizer)
    assert [doc.row for doc in docs] == [2] and report.dropped == {"nothing to train on": 2} and report.rows == 3


# --- raw text


def test_completion_has_one_bos_and_a_trained_eos(variants, make_tokenizer):
    for name, variant in variants.items():
        tokenizer = make_tokenizer(name)
        plain = tokenizer("hello to the user", add_special_tokens=False)["input_ids"]
        bos, eos = [tokenizer.bos_token_id] if variant.adds_bos else [], [tokenizer.eos_token_id]
        for text in ("hello to the user", f"{tokenizer.bos_token or ''}hello to the user"):
            docs, _ = encode([{"text": text}], tokenizer)
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            expected = own if bos and own[0] == bos[0] else bos + own
            assert docs[0].tokens.tolist() == expected + eos, (name, text)
            assert (docs[0].weight[1:] == 1).all() and docs[0].weight[0] == 0
        assert encode([{"text": "hello to the user"}], tokenizer)[0][0].tokens.tolist() == bos + plain + eos


def test_eos_is_not_doubled(tokenizer):
    docs, _ = encode([{"text": "hello</s>"}], tokenizer)
    assert docs[0].tokens.tolist().count(tokenizer.eos_token_id) == 1 and docs[0].weight[-1] == 1


def test_another_field(tokenizer):
    docs, _ = encode([{"body": "hello to the user"}], tokenizer, format="completion", field="body")
    assert trained(docs[0], tokenizer) == " to the user</s>"
    with pytest.raises(ValueError, match="data.jsonl row 1 has no field text; it has body"):
        encode([{"body": "hello"}], tokenizer, format="completion")


def test_tokenizer_without_eos(build_tokenizer, variants):
    tokenizer = build_tokenizer(variants["byte"])
    tokenizer.eos_token = None
    for row in ({"text": "a"}, ALPACA):
        with pytest.raises(ValueError, match="no EOS token"):
            encode([row], tokenizer)


def test_splitting_loses_nothing(tokenizer):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(words=st.integers(1, 60), size=st.integers(2, 40))
    def check(words, size):
        text = " ".join(f"fox{i}" for i in range(words))
        whole = encode([{"text": text}], tokenizer)[0][0]
        docs, report = encode([{"text": text}], tokenizer, sequence_len=size)
        assert all(2 <= len(doc.tokens) <= size and doc.weight[0] == 0 and (doc.weight[1:] == 1).all() for doc in docs)
        rebuilt = docs[0].tokens.tolist() + [token for doc in docs[1:] for token in doc.tokens.tolist()[1:]]
        assert rebuilt == whole.tokens.tolist()
        assert sum(int((doc.weight > 0).sum()) for doc in docs) == report.supervised == len(rebuilt) - 1
        assert report.split == int(len(docs) > 1) and {doc.row for doc in docs} == {1}

    check()


# --- length policy


LONG = {
    "messages": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "the quick brown fox"},
        {"role": "user", "content": "What is 2+2?", "weight": 0},
        {"role": "assistant", "content": "It is 4. " * 5, "weight": 0.5},
    ]
}


def test_truncation_at_every_length_keeps_the_mask(tokenizer):
    whole = encode([LONG], tokenizer)[0][0]
    seen = 0
    for size in range(2, len(whole.tokens) + 2):
        if not whole.weight[:size].any():
            with pytest.raises(ValueError, match="not one token to train on.*raise sequence_len .the longest row has"):
                encode([LONG], tokenizer, sequence_len=size, overlong="truncate")
            continue
        docs, report = encode([LONG], tokenizer, sequence_len=size, overlong="truncate")
        assert docs[0].tokens.tolist() == whole.tokens[:size].tolist()
        assert docs[0].weight.tolist() == whole.weight[:size].tolist()
        cut = size < len(whole.tokens)
        lost = bool(whole.weight[size:].any())
        assert (report.truncated, report.dropped_eos) == (int(cut), int(lost))
        seen += lost
    assert seen > 20


def test_overlong_rows_are_dropped_and_counted_by_default(tokenizer):
    docs, report = encode([CHAT, LONG, CHAT], tokenizer, sequence_len=40)
    assert [doc.row for doc in docs] == [1, 3]
    assert report.dropped == {"longer than sequence_len": 1} and report.dropped_eos == 0 and report.longest > 40
    assert "dropped 1 row (longer than sequence_len)" in formats.describe_texts(report)


def test_overlong_error_names_the_row(tokenizer):
    with pytest.raises(ValueError, match=r"data.jsonl row 2 has \d+ tokens, more than sequence_len 40: raise"):
        encode([CHAT, LONG], tokenizer, sequence_len=40, overlong="error")


def test_exact_fit_is_not_overlong(tokenizer):
    size = len(encode([LONG], tokenizer)[0][0].tokens)
    assert encode([LONG], tokenizer, sequence_len=size)[1].dropped == {}
    assert encode([LONG], tokenizer, sequence_len=size, overlong="error")[1].docs == 1


# --- reports and datasets with nothing in them


def test_report_counts(tokenizer):
    rows = [CHAT, LONG, {"messages": [{"role": "user", "content": "hello"}]}]
    docs, report = encode(rows, tokenizer)
    assert (report.format, report.rows, report.docs) == ("chat", 3, 2)
    assert report.dropped == {"nothing to train on": 1}
    assert report.tokens == sum(len(doc.tokens) for doc in docs)
    assert report.supervised == sum(int((doc.weight > 0).sum()) for doc in docs)
    line = formats.describe_texts(report)
    assert "chat: 3 rows -> 2 documents" in line and "dropped 1 row (nothing to train on)" in line and "\n" not in line


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"messages": [{"role": "user", "content": "hello"}]}] * 2,
            {},
            "2 nothing to train on.*data.jsonl row 1, read as chat.*roles_to_train",
        ),
        ([CHAT], {"roles_to_train": ["model"]}, "read as chat, with the fields messages: check the roles"),
        ([ALPACA | {"output": ""}], {}, "read as alpaca.*fill the output column"),
        ([{"text": " "}], {}, "read as completion.*fill the text column"),
        ([CHAT], {"sequence_len": 4}, "1 longer than sequence_len.*raise sequence_len .the longest row has"),
    ],
)
def test_a_dataset_with_nothing_to_train_on_is_an_error(rows, options, message, tokenizer):
    with pytest.raises(ValueError, match=message) as caught:
        encode(rows, tokenizer, **options)
    assert "not one token to train on" in str(caught.value) and "\n" not in str(caught.value)


def test_rows_keep_their_numbers_across_chunks(tokenizer):
    rows = [CHAT] * (formats.CHUNK + 3)
    docs, _ = encode(rows, tokenizer)
    assert [doc.row for doc in docs] == list(range(1, len(rows) + 1))
    with pytest.raises(ValueError, match=f"row {len(rows) + 1} has no field messages"):
        encode([*rows, {"other": 1}], tokenizer)


def test_documents_are_plain_arrays(tokenizer):
    doc = encode([CHAT], tokenizer)[0][0]
    assert isinstance(doc, spans.Doc) and doc.tokens.dtype == np.int32 and doc.weight.dtype == np.float32 and doc.weight[0] == 0


# --- examples that the repository carries


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("gsm8k_train_sample", 400, "chat"),
        ("gsm8k_test_sample", 100, "chat"),
        ("alpaca", 5, "alpaca"),
        ("text", 5, "completion"),
    ],
)
def test_example_files(name, count, kind, tokenizer):
    rows = sources.read(str(EXAMPLES / f"{name}.jsonl"))
    docs, report = formats.encode_rows(rows, tokenizer)
    assert len(rows.rows) == len(docs) == count and report.format == kind and report.dropped == {} and report.missing_eos == 0
    for row, doc in zip(rows.rows, docs, strict=True):
        answer = row["messages"][-1]["content"] + "<|im_end|>" if kind == "chat" else row.get("output", "") + "</s>"
        assert trained(doc, tokenizer).endswith(answer)


def test_the_examples_carry_their_licence():
    assert "Copyright (c) 2021 OpenAI" in (EXAMPLES / "LICENSE-GSM8K").read_text()


# --- random rows: right streams or a ValueError that names the row


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=12))
TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from(["<think>a</think>b", "<|im_end|>", "</s>", "\ud800", "", " ", "\x00", "Qx7vZkWm0f1p0e"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "gpt", "", "\n"]) | VALUES,
        "content": TEXTS | VALUES,
        "reasoning_content": TEXTS | VALUES,
        "train": st.booleans() | VALUES,
        "weight": st.floats(0, 2) | VALUES,
        "name": VALUES,
        "tool_calls": st.just([]) | VALUES,
    },
)
GOOD_MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS})
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(MESSAGES | GOOD_MESSAGES, max_size=4) | st.lists(GOOD_MESSAGES, max_size=4) | VALUES,
        "instruction": TEXTS | VALUES,
        "output": TEXTS | VALUES,
        "text": TEXTS | VALUES,
    },
)


@pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_rows_give_streams_or_a_named_error(tokenizer, templates, examples):
    went = Counter()

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(
        row=ROWS, kind=st.sampled_from(["chat", "alpaca", "completion"]), template=st.sampled_from(["chatml", "qwen3", "llama2", "gemma"])
    )
    def check(row, kind, template):
        options = {"chat_template": templates[template]} if kind == "chat" else {}
        try:
            docs, report = encode([row], tokenizer, format=kind, **options)
        except ValueError as error:
            assert "data.jsonl row 1" in str(error) and "\n" not in str(error)
            went["error"] += 1
            return
        went["stream"] += 1
        assert report.docs == len(docs) == 1 and docs[0].weight.any() and docs[0].weight[0] == 0
        assert np.isfinite(docs[0].weight).all() and len(docs[0].tokens) == len(docs[0].weight)
        if kind == "chat" and not any(message.keys() - {"role", "content"} for message in row["messages"]):
            names = {"human": "user", "gpt": "assistant"}
            messages = [message | {"role": names.get(message["role"], message["role"])} for message in row["messages"]]
            assert docs[0].tokens.tolist() == tokenizer.apply_chat_template(messages, **options)["input_ids"]

    check()
    assert went["error"] > min(200, examples // 3) and went["stream"] > min(50, examples // 12)


def test_rows_of_the_examples_are_valid_json():
    for path in EXAMPLES.glob("*.jsonl"):
        assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
