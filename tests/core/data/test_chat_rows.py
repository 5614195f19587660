"""Bad rows, bad options and templates that hide the spans: one clear line each, never a wrong mask."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    "null content": ({"messages": [{"role": "user", "content": None}]}, "row 2: message 1: field content is null"),
    "number": ({"messages": [{"role": "user", "content": 4}]}, "row 2: message 1: field content .*is of type int, expected text"),
    "train": ({"messages": [{"role": "user", "content": "a", "train": "no"}]}, "row 2: message 1: train is 'no'"),
    "weight": ({"messages": [{"role": "user", "content": "a", "weight": -1}]}, "row 2: message 1: weight is -1"),
    "nan": ({"messages": [{"role": "user", "content": "a", "weight": float("nan")}]}, "row 2: message 1: weight is nan"),
    "tools": (
        {"messages": SINGLE, "tools": [{"name": "f7"}]},
        "row 2: the chat template leaves out the tool 'f7': use a chat template that renders tools, or set field_tools",
    ),
    "tools of text": ({"messages": SINGLE, "tools": "[{"}, "row 2: field tools is a text that is no JSON"),
    "tools of numbers": ({"messages": SINGLE, "tools": [7]}, "row 2: field tools: tool 1 is of type int"),
    "functions": ({"messages": SINGLE, "functions": [{"name": "f"}]}, "row 2: field functions holds tool definitions: set field_tools"),
    "call": ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "row 2: message 1: tool_calls: call 1: function is {}"),
    "calls": ({"messages": [{"role": "assistant", "tool_calls": 7}]}, "row 2: message 1: tool_calls is of type int, expected a list"),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{a"}]}]},
        "row 2: message 1: tool_calls: call 1: arguments is a text that is no JSON",
    ),
    "list arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
        "row 2: message 1: tool_calls: call 1: arguments is of type list, expected an object",
    ),
    "dropped call": (
        {"messages": [*SINGLE[:1], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]},
        r"row 2: message 2 \(role 'assistant'\) is not rendered",
    ),
    "half dropped call": (
        {"messages": [*SINGLE[:1], {"role": "assistant", "content": "hello", "tool_calls": [{"name": "f", "arguments": {}}]}]},
        "row 2: the chat template leaves out tool calls of message 2|row 2: message 2 .* has tool calls whose limits",
    ),
    "function_call": (
        {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
        "row 2: message 1: function_call",
    ),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}]},
        "row 2: message 1: field content: part 1: type is 'image': only parts of type 'text'",
    ),
    "no parts": ({"messages": [{"role": "user", "content": []}]}, "row 2: message 1: field content is empty"),
    "part of two texts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "value": "b"}]}]},
        "row 2: message 1: field content: part 1 has type, text, value: expected one text",
    ),
    "part flag": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "train": 1}]}]},
        "row 2: message 1: field content: part 1: train is 1, expected true or false",
    ),
    "detail outside": (
        {"messages": [{"role": "user", "content": "abc", "train_detail": [{"begin_offset": 0, "end_offset": 3, "train": True}]}]},
        "row 2: message 1: train_detail: entry 1 has the offsets 0 to 3: expected 0 <= begin <= end <= 2",
    ),
    "detail twice": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": "abc",
                    "train_detail": [
                        {"begin_offset": 0, "end_offset": 1, "train": True},
                        {"begin_offset": 1, "end_offset": 2, "train": False},
                    ],
                }
            ]
        },
        "row 2: message 1: train_detail: two entries hold character 1",
    ),
    "detail and parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "train_detail": []}]},
        "row 2: message 1: train_detail needs content that is one text",
    ),
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
        spans.read_special_tokens(Slow())


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
        ({"roles": {"assistant": "gpt"}}, "roles has assistant: 'gpt', expected a list"),
        ({"roles": {"assistant": ["gpt"], "user": ["gpt"]}}, "roles maps 'gpt' to 'assistant' and to 'user'"),
        ({"message_field_role": "from", "message_property_mappings": {"role": "who"}}, "message_field_role is 'from', but"),
        ({"message_property_mappings": {"role": ["who"]}}, r"message_property_mappings has role: \['who'\]"),
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
    messages = chat.read_messages({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "row 1")
    assert [message["role"] for message in messages] == ["user", "assistant"]


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats()
    | st.sampled_from(["", " ", "user", "assistant", "{", "[]", "text", "<think>a</think>b"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "train", "name", "function"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = "role from content value train weight train_detail reasoning_content tool_calls name".split()
MESSAGES = (
    st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=4).map(lambda extra: {"role": "assistant", "content": "It is 4."} | extra) | JUNK
)
ROWS = st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=3) | JUNK}, optional={"tools": JUNK, "functions": JUNK})


@pytest.mark.sampled(2)
@pytest.mark.parametrize("template", ["chatml", "qwen3", "llama3"])
def test_malformed_rows_are_read_or_named(template, tokenizer):
    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(row=ROWS, split=st.booleans())
    def check(row, split):
        rows = sources.from_list([{"messages": SINGLE}, row], "data")
        try:
            docs, report = formats.encode_rows(rows, tokenizer, format="chat", chat_template=template, split_thinking=split)
        except ValueError as error:
            assert str(error).startswith("data row 2"), error
        else:
            assert len(docs) + sum(report.dropped.values()) == 2 and all((doc.weight >= 0).all() for doc in docs)

    check()


def test_a_default_system_message_is_for_chats_without_one(templates, tokenizer):
    tokenizer.chat_template = templates["chatml"]
    own, brief = talk(("system", "Be kind.")) + SINGLE, talk(("system", "Be brief.")) + SINGLE
    for said, written in ((SINGLE, brief), (own, own)):
        one, other = encode(said, tokenizer, default_system_message="Be brief.")[0][0], encode(written, tokenizer)[0][0]
        assert one.tokens.tolist() == other.tokens.tolist() and one.weight.tolist() == other.weight.tolist()
    trained = encode(SINGLE, tokenizer, default_system_message="Be brief.", roles_to_train=["system"])[0][0]
    assert tokenizer.decode(trained.tokens[trained.weight > 0]).startswith("Be brief.")
