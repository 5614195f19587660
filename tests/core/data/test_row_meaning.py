"""Nothing of a row is dropped in silence: a system text, flags, a question that differs, roles and columns that nothing reads."""

import json
from decimal import Decimal

import pytest

from treetune.core.data import chat, ebft, formats, kinds, preference, prompts, reporting, sources, unpaired

USER, REPLY, OTHER = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "yes"), ("assistant", "no")))
SYSTEM = {"system": "Be brief."}
TEXTS = {"prompt": "q", "chosen": "yes", "rejected": "no"}
TALKS = {"chosen": [USER, REPLY], "rejected": [USER, OTHER]}
MIXED = {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}]}


def encode(kind, row, tokenizer, form=None, **own):
    rows = sources.from_list([row, row | ({"label": False, "prompt": [USER | {"content": "q2"}]} if "label" in row else {})], "data.jsonl")
    known = kinds.KINDS[kind]
    return known.encode(rows, tokenizer, format=known.canonical(form) if form else known.detect(list(row), row), format_options=own)


def text_of(kind, row, tokenizer, form=None, **own):
    docs, _ = encode(kind, row, tokenizer, form, **own)
    return tokenizer.decode(docs[0].tokens)


@pytest.mark.parametrize(
    ("kind", "form", "row"),
    [
        ("pairs", None, MIXED),
        ("pairs", None, TALKS),
        ("pairs", "chat_template.default", {"messages": [USER], "chosen": REPLY, "rejected": OTHER}),
        ("pairs", "chatml.intel", {"question": "q", "chosen": "yes", "rejected": "no"}),
        ("pairs", "chatml.argilla_chat", TALKS),
        ("pairs", "zephyr.nectar", {"prompt": "q", "answers": [{"answer": "yes", "rank": 1}, {"answer": "no", "rank": 2}]}),
        ("judged", None, {"prompt": [USER], "completion": [REPLY], "label": True}),
        ("judged", "chatml.argilla_chat", {"completion": [USER, REPLY], "label": True}),
        ("ranked", None, {"input": "q", "chosen": "yes", "rejected": "no"}),
        ("text", None, {"messages": [USER, REPLY]}),
        ("text", None, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "yes"}]}),
        ("text", None, {"instruction": "q", "output": "yes"}),
        ("strided", None, {"messages": [USER, REPLY]}),
    ],
)
def test_a_system_column_is_read(kind, form, row, tokenizer):
    assert "Be brief." in text_of(kind, row | SYSTEM, tokenizer, form)
    assert "Be brief." not in text_of(kind, row | {"system": ""}, tokenizer, form)
    if form != "chatml.intel":
        return
    with pytest.raises(ValueError, match="^data.jsonl row 1: field system is of type list, expected text"):
        encode(kind, row | {"system": ["x"]}, tokenizer, form)


@pytest.mark.parametrize(
    ("kind", "form", "row"),
    [
        ("pairs", None, TEXTS),
        ("judged", None, {"prompt": "q", "completion": "yes", "label": True}),
        ("steps", None, {"prompt": "q", "completions": ["a"], "labels": [True]}),
        ("text", "summarizetldr", {"article": "q", "summary": "yes"}),
        ("strided", None, {"input": "q", "output": "yes"}),
    ],
)
def test_or_refused_where_there_is_no_place(kind, form, row, tokenizer):
    with pytest.raises(ValueError, match="^data.jsonl row 1 has a system text, which rows of format .* have no place for"):
        encode(kind, row | SYSTEM, tokenizer, form)


def test_two_system_texts_are_refused(tokenizer):
    said = {"role": "system", "content": "Be long."}
    for kind, row in (
        ("pairs", MIXED | {"prompt": [said, USER]}),
        ("pairs", {"chosen": [said, USER, REPLY], "rejected": [said, USER, OTHER]}),
        ("text", {"messages": [said, USER, REPLY]}),
    ):
        with pytest.raises(ValueError, match="row 1: field system says something else than the system message"):
            encode(kind, row | SYSTEM, tokenizer)
        assert text_of(kind, row | {"system": "Be long."}, tokenizer).count("Be long.") == 1


def test_prompts_and_structured_rows(tokenizer):
    found, _ = prompts.read_prompts(sources.from_list([{"prompt": [USER]} | SYSTEM]), tokenizer)
    assert "Be brief." in found[0].text
    with pytest.raises(ValueError, match="row 1: a prompt of plain text has no place for the field system"):
        prompts.read_prompts(sources.from_list([{"prompt": "q"} | SYSTEM]), tokenizer)
    with pytest.raises(ValueError, match="a default system message needs prompts of messages"):
        prompts.read_prompts(sources.from_list([{"prompt": "q"}]), tokenizer, system="x")
    assert ebft.last_turn({"messages": [USER, REPLY]} | SYSTEM, "row")[0]["prompt"][0]["content"] == "Be brief."
    with pytest.raises(ValueError, match="reasoning in a field of its own"):
        ebft.last_turn({"messages": [USER, REPLY | {"thinking": "hm"}]}, "row")
    with pytest.raises(ValueError, match="row: the reply has tool calls"):
        ebft.first_turn({"messages": [USER, CALL]}, "row")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (TALKS | {"prompt": "other"}, "field prompt is 'other', but the question in chosen is 'q'"),
        (TALKS | {"prompt": "q", "rejected": [USER | {"content": "r"}, OTHER]}, "field prompt is 'q', but the question in rejected is 'r'"),
        (TALKS | {"rejected": [USER | {"content": "r"}, OTHER]}, "fields chosen and rejected differ"),
        (
            MIXED | {"chosen": [USER | {"content": "r"}, REPLY]},
            "field chosen has 2 messages, and those before the reply are not the prompt's",
        ),
        (TEXTS | {"chosen": json.dumps([USER, REPLY])}, "field chosen is a list of messages written as text"),
    ],
)
def test_a_question_that_differs(row, message, tokenizer):
    with pytest.raises(ValueError, match=f"^data.jsonl row 1: {message}"):
        encode("pairs", row, tokenizer)
    assert "q" in text_of("pairs", TALKS | {"prompt": "q "}, tokenizer)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train": False}, "train is False, but this message is a reply, which is always learned"),
        ({"weight": 0.5}, "weight is 0.5, but replies count fully"),
        ({"train_detail": []}, "train_detail is not read here"),
        ({"content": [{"type": "text", "text": "yes", "train": False}]}, "field content has parts with train or weight"),
    ],
)
def test_flags_of_replies(flags, message, tokenizer):
    for kind, row in (
        ("pairs", MIXED | {"chosen": [REPLY | flags]}),
        ("pairs", TALKS | {"chosen": [USER, REPLY | flags]}),
        ("judged", {"prompt": [USER], "completion": [REPLY | flags], "label": True}),
    ):
        with pytest.raises(ValueError, match=f"^data.jsonl row 1: field (chosen|completion), message .: {message}"):
            encode(kind, row, tokenizer)
    with pytest.raises(ValueError, match="is of the prompt, which is never learned"):
        encode("pairs", MIXED | {"prompt": [USER | {"train": True}]}, tokenizer)
    fine = MIXED | {"prompt": [USER | {"train": False, "weight": 0}], "chosen": [REPLY | {"train": True, "weight": 1.0}]}
    assert len(encode("pairs", fine, tokenizer)[0]) == 2


def test_a_tool_call_is_a_reply(tokenizer, templates):
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"  # fmt: skip # noqa: E501
    docs, report = encode("pairs", MIXED | {"chosen": [CALL]}, tokenizer)
    assert len(docs) == 2 and "<call>f" in tokenizer.decode(docs[0].tokens) and not report.dropped
    with pytest.raises(ValueError, match="row 1: field chosen: the reply has tool calls, which this format has no wording for"):
        encode("pairs", TALKS | {"chosen": [USER, CALL]}, tokenizer, "chatml.argilla_chat")


@pytest.mark.parametrize(
    ("role", "fix"),
    [("bot", "assistant: [bot]"), ("User", "user: [User]"), ("observation", "tool: [observation]"), ("x", "assistant: [x]")],
)
def test_roles_that_nothing_maps(role, fix, tokenizer):
    row = {"messages": [USER, {"role": role, "content": "b"}, REPLY]}
    with pytest.raises(ValueError) as caught:
        encode("text", row, tokenizer)
    assert str(caught.value).startswith(f"data.jsonl row 1: message 2: role is '{role}', expected one of") and f"roles: {{{fix}}}" in str(
        caught.value
    )
    docs, report = encode("text", row, tokenizer, roles={"tool": [role]})
    assert {name for name, *_ in report.roles} >= {"tool", "user", "assistant"} and len(docs) == 2
    assert encode("text", row, tokenizer, roles_to_train=("assistant", role))
    with pytest.raises(ValueError, match=f"message 1: field role is '{role}', expected one of"):
        encode("pairs", MIXED | {"prompt": [{"role": role, "content": "q"}]}, tokenizer)


def test_a_role_that_the_template_names_needs_no_mapping(tokenizer):
    row = {"messages": [{"role": "developer", "content": "b"}, USER, REPLY]}
    with pytest.raises(ValueError, match="role is 'developer'"):
        encode("text", row, tokenizer)
    tokenizer.chat_template = "{# 'developer' #}" + tokenizer.chat_template
    assert len(encode("text", row, tokenizer)[0]) == 2


def test_what_is_not_read_is_told(tokenizer):
    row = MIXED | {"prompt": [USER | {"name": "bob"}], "tools": None, "images": ["x"], "score": 3, "id": 7}
    _, report = encode("pairs", row, tokenizer)
    assert report.unread == ("images", "score", "id", "name (of messages)")
    assert kinds.KINDS["pairs"].describe(report).endswith("not read: images, score, id, name (of messages)")
    _, report = encode("text", {"text": "a b", "source": "web", "empty": ""}, tokenizer)
    assert report.unread == ("source",)
    _, report = encode("text", {"messages": [USER, REPLY], "tools": [], "id": 1}, tokenizer)
    assert report.unread == ("id",)
    one, two = (report._replace(unread=names, sizes=((64, 1),)) for names in (("a",), ("b", "a")))
    assert formats.merge_text_reports([one, two]).unread == ("a", "b") and formats.merge_text_reports([one, two]).sizes == ((64, 2),)


def test_reasoning_that_a_template_drops_is_told_of_pairs(tokenizer):
    _, report = encode("pairs", MIXED | {"chosen": [REPLY | {"reasoning_content": "hm"}]}, tokenizer)
    assert report.missing_parts == 2 and "2 completions of which the chat template leaves a part out" in kinds.KINDS["pairs"].describe(
        report
    )
    same = {"role": "assistant", "content": "yes"}
    with pytest.raises(ValueError, match="2 identical completions"):
        encode("pairs", MIXED | {"chosen": [same | {"reasoning_content": "hm"}], "rejected": [same]}, tokenizer)


def test_rows_lost_to_their_length_are_a_warning(tokenizer):
    rows = [{"text": "hello " * (2 if i < 6 else 100)} for i in range(30)]
    _, report = formats.encode_rows(sources.from_list(rows), tokenizer, sequence_len=40, overlong="drop")
    (said,) = reporting.find_warnings(report)
    assert said.startswith("24 of 30 rows are longer than sequence_len and left out: --sequence-len ")
    size = int(said.split("--sequence-len ")[1].split()[0])
    assert len(formats.encode_rows(sources.from_list(rows), tokenizer, sequence_len=size, overlong="drop")[0]) >= 29
    assert reporting.find_warnings(formats.encode_rows(sources.from_list(rows[:6]), tokenizer, sequence_len=40)[1]) == []


def test_an_end_of_turn_that_is_no_token_is_a_warning(tokenizer, make_tokenizer):
    plain = make_tokenizer("byte_plain")
    for words, told in ((tokenizer, False), (plain, True)):
        words.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        _, report = encode("text", {"messages": [USER, REPLY]}, words)
        assert bool(reporting.find_warnings(report)) == told
    assert "trained turns end with <|eot_id|>, which is not one token" in reporting.find_warnings(report)[0]


@pytest.mark.parametrize("value", [int("9" * 400), float("inf"), float("nan"), True, [1], "x", "1e400", 1e300, {}])
def test_margins_and_labels_of_other_types(value, tokenizer):
    with pytest.raises(ValueError, match="^row: field margin is .*, expected a number from -1e"):
        preference.pair_numbers({"margin": value}, "margin", "row")
    if value is not True:
        with pytest.raises(ValueError, match="^row: field label is .*, expected true or false"):
            unpaired.read_label({"label": value}, "label", "row")


def test_margins_and_labels_as_files_have_them():
    for value in (0.5, "0.5", Decimal("0.5")):
        assert preference.pair_numbers({"margin": value}, "margin", "row") == {"margin": (0.5, 0.5)}
    assert preference.pair_numbers({"margin": ""}, "margin", "row") == {}
    for value in (True, 1, 1.0, "true", "1", Decimal(1)):
        assert unpaired.read_label({"label": value}, "label", "row") == {"desirable": (True,)}


def test_nothing_of_a_message_is_lost_in_the_default_reading():
    assert chat.read_messages({"messages": [USER, REPLY], "system": "s"}, "row")[0] == {"role": "system", "content": "s"}
