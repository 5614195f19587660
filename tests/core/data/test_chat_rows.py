"""Bad rows, bad options and templates that hide the spans: one clear line each, never a wrong mask."""

import pytest

from treetune.core.data import chat, formats, sources, spans


def talk(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


SINGLE = talk(("user", "What is 2+2?"), ("assistant", "It is 4."))


def encode(messages, tokenizer, **options):
    return formats.encode_rows(sources.from_list([{"messages": messages}]), tokenizer, format="chat", **options)


BAD_ROWS = {
    "no field": ({"prompt": "a", "answer": "b"}, "row 2 has no field messages .*it has prompt, answer"),
    "empty": ({"messages": []}, "row 2: messages is empty"),
    "text": ({"messages": "hello"}, "row 2: messages is of type str, expected a list"),
    "message": ({"messages": ["hello"]}, "row 2: message 1 is of type str"),
    "no role": ({"messages": [{"content": "a", "name": "b"}]}, "row 2: message 1 has no field role .*it has content, name"),
    "no content": ({"messages": [{"role": "user"}]}, "row 2: message 1 has no field content .*it has role"),
    "null content": ({"messages": [{"role": "user", "content": None}]}, "row 2: message 1 has no field content"),
    "number": ({"messages": [{"role": "user", "content": 4}]}, "row 2: message 1: field content .*is of type int, expected text"),
    "train": ({"messages": [{"role": "user", "content": "a", "train": "no"}]}, "row 2: message 1: train is 'no'"),
    "weight": ({"messages": [{"role": "user", "content": "a", "weight": -1}]}, "row 2: message 1: weight is -1"),
    "nan": ({"messages": [{"role": "user", "content": "a", "weight": float("nan")}]}, "row 2: message 1: weight is nan"),
    "tools": ({"messages": SINGLE, "tools": [{"name": "f"}]}, "row 2: tool definitions are not supported"),
    "calls": ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "row 2: message 1: tool calls are not supported"),
    "surrogate": ({"messages": talk(("user", "\ud800"), ("assistant", "a"))}, "row 2: not valid Unicode"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case, tokenizer):
    row, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=message):
        formats.encode_rows(sources.from_list([{"messages": SINGLE}, row]), tokenizer, format="chat")


def test_template_that_refuses_a_row(templates, tokenizer):
    tokenizer.chat_template = templates["llama2"]
    rows = sources.from_list([{"messages": SINGLE}, {"messages": talk(("assistant", "a"), ("user", "b"))}], "data.jsonl")
    with pytest.raises(ValueError, match="data.jsonl row 2: the chat template refuses .*roles must alternate.* roles are assistant, user"):
        formats.encode_rows(rows, tokenizer)


def test_tokenizer_without_template(build_tokenizer, variants):
    with pytest.raises(ValueError, match="no chat template .*chat_template"):
        encode(SINGLE, build_tokenizer(variants["byte"]))


def test_tokenizer_without_offsets():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow gives no character offsets"):
        spans.marks(Slow())


UNKNOWN_SPANS = {
    "changes blanks": ("{% for m in messages %}{{ m.content.replace(' ', '_') + '<|im_end|>' }}{% endfor %}", "beyond recognition"),
    "changes letters": ("{% for m in messages %}{{ m.content | upper + '<|im_end|>' }}{% endfor %}", "different text around"),
    "leaves out a role": (
        "{% for m in messages if m.role != 'user' %}{{ m.content + '<|im_end|>' }}{% endfor %}",
        r"message 1 \(role 'user'\) is not rendered",
    ),
    "repeats": ("{% for m in messages %}{{ m.content + m.content + '<|im_end|>' }}{% endfor %}", "rendered more than once"),
    "depends on the content": (
        "{% for m in messages %}{{ ('short: ' if m.content | length < 12 else 'long: ') + m.content + '<|im_end|>' }}{% endfor %}",
        "different text around|beyond recognition",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN_SPANS)
def test_spans_that_cannot_be_known_are_errors(case, tokenizer):
    template, message = UNKNOWN_SPANS[case]
    with pytest.raises(ValueError, match=message):
        encode(SINGLE, tokenizer, chat_template=template)


def test_options_are_checked(tokenizer):
    for options, message in [
        ({"train_on_eos": "never"}, "train_on_eos is 'never': expected one of turn, all, last"),
        ({"roles_to_train": "assistant"}, "roles_to_train is the text 'assistant'"),
        ({"train_on_inputs": True, "train_on_eos": "last"}, "train_on_inputs trains every token already"),
        ({"field": "text"}, "format chat takes no field; it takes chat_template"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode(SINGLE, tokenizer, **options)


def test_blank_answers_are_nothing_to_train_on(tokenizer):
    rows = [
        {"messages": talk(("user", "a"), ("assistant", ""))},
        {"messages": talk(("user", "a"), ("assistant", " \n"))},
        {"messages": SINGLE},
    ]
    docs, report = formats.encode_rows(sources.from_list(rows), tokenizer)
    assert [doc.row for doc in docs] == [3] and report.dropped == {"nothing to train on": 2}


def test_roles_are_mapped():
    messages = chat.conversation({"conversations": [{"from": "human", "value": "a"}, {"from": "narrator", "value": "b"}]}, "row 1")
    assert [message["role"] for message in messages] == ["user", "narrator"]
