"""Malformed rows of every format: a right result or one line that names file, row and field; never a traceback from elsewhere."""

import re
from pathlib import Path

import pytest

from treetune.core.data import (
    custom,
    ebft,
    instruction,
    preference,
    pretokenised,
    prompts,
    reward,
    row_formats,
    segments,
    sources,
    trees,
    unpaired,
)

FOLDER = Path(__file__).parents[3] / "examples" / "data" / "formats"
USER = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}
PAIRS, KTO = row_formats.of_kind("pairs"), row_formats.of_kind("unpaired")
STEPS = row_formats.of_kind("steps")["stepwise_supervised"].reader()
TALKS = {"chosen": [USER, REPLY], "rejected": [USER, REPLY | {"content": "c"}]}

# (how to read one row, the row, what the error says behind "data.jsonl row 1")
BAD = {
    "missing column": (PAIRS["chatml.intel"], {"prompt": "a"}, " has no field (question|chosen); it has prompt"),
    "wrong type": (PAIRS["chatml.intel"], {"question": "a", "chosen": 3, "rejected": "b"}, ": field chosen is of type int, expected text"),
    "system": (PAIRS["llama3.icr"], {"input": "a", "chosen": "c", "rejected": "b", "system": ["x"]}, ": field system is of type list"),
    "not a talk": (
        PAIRS["chatml.ultra"],
        {"prompt": "a"} | TALKS | {"chosen": "b"},
        ": field chosen is of type str, expected a list of messages",
    ),
    "longer talk": (
        PAIRS["chatml.ultra"],
        {"prompt": "a"} | TALKS | {"chosen": [USER, REPLY, USER, REPLY]},
        ": field chosen has 4 messages, expected",
    ),
    "user last": (
        PAIRS["llama3.argilla_chat"],
        TALKS | {"chosen": [REPLY, USER]},
        ": field chosen has the roles assistant, user: expected a question",
    ),
    "other history": (
        PAIRS["llama3.argilla_chat"],
        TALKS | {"chosen": [REPLY | {"role": "user"}, REPLY]},
        ": fields chosen and rejected differ",
    ),
    "role": (
        PAIRS["chat_template.default"],
        {"messages": [USER | {"role": "x"}]} | TALKS,
        ": field messages, message 1: field role is 'x', expected one",
    ),
    "content": (
        PAIRS["chat_template.default"],
        {"messages": [{"role": "user"}]} | TALKS,
        ": field messages, message 1: field content is missing",
    ),
    "user reply": (
        PAIRS["chat_template.default"],
        {"messages": [USER]} | TALKS | {"chosen": USER},
        ": field chosen has 1 messages: expected the assistant",
    ),
    "no turns": (
        PAIRS["chat_template.argilla"],
        TALKS | {"chosen": [USER, USER, REPLY]},
        ": field chosen has the roles user, user, assistant: expected",
    ),
    "answers": (
        PAIRS["zephyr.nectar"],
        {"prompt": "a", "answers": [{"answer": "b", "rank": 1}]},
        ": field answers is of type list, expected a list of two",
    ),
    "rank": (
        PAIRS["zephyr.nectar"],
        {"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c"}]},
        ": field answers, answer 2: field rank is None",
    ),
    "margin": (
        PAIRS["passthrough"],
        {"prompt": "a", "chosen": "c", "rejected": "b", "margin": "x"},
        ": field margin is 'x', expected a number",
    ),
    "infinite margin": (
        PAIRS["passthrough"],
        {"prompt": "a", "chosen": "c", "rejected": "b", "margin": float("nan")},
        ": field margin is nan",
    ),
    "surrogate": (PAIRS["passthrough"], {"prompt": "\ud800", "chosen": "c", "rejected": "b"}, ": not valid Unicode"),
    "label": (
        KTO["chatml.intel"],
        {"question": "a", "completion": "b", "label": "good"},
        ": field label is 'good', expected true or false",
    ),
    "no label": (KTO["chatml.intel"], {"question": "a", "completion": "b"}, " has no field label; it has question, completion"),
    "completion": (
        KTO["llama3.argilla_chat"],
        {"completion": "b", "label": True},
        ": field completion is of type str, expected a list of messages",
    ),
}
BAD_STEPS = {
    "text": ({"prompt": "a", "completions": "b", "labels": [True]}, ": field completions is of type str, expected a list"),
    "lengths": ({"prompt": "a", "completions": ["b"], "labels": []}, ": field labels has 0 entries for 1 completions"),
    "step": ({"prompt": "a", "completions": [3], "labels": [True]}, ", step 1: field completions is of type int"),
    "judgement": ({"prompt": "a", "completions": ["b"], "labels": [2]}, ", step 1: field labels is 2, expected true or false"),
}
BAD_TOKENS = {
    "no labels": ({"input_ids": [1, 2]}, ": field labels is missing, expected a list of whole numbers"),
    "vocabulary": ({"input_ids": [1, 10**6], "labels": [1, 2]}, ": field input_ids: entry 2 is 1000000, expected a token from 0 to"),
    "float": ({"input_ids": [1, 2.5], "labels": [1, 2]}, ": field input_ids: entry 2 is 2.5, expected a whole number"),
    "lengths": ({"input_ids": [1, 2], "labels": [1]}, ": field labels has 1 entries, expected 2"),
    "other label": (
        {"input_ids": [1, 2], "labels": [-100, 3]},
        ": field labels: entry 2 is 3, expected the token of input_ids there, or -100",
    ),
    "hole": (
        {"input_ids": [1, 2, 3], "labels": [-100] * 3, "attention_mask": [1, 0, 1]},
        ": field attention_mask: entry 2 is 0, expected 1",
    ),
    "masked": ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, ": field labels: entry 2 is 2, expected -100 where"),
}
BAD_SEGMENTS = {
    "none": ({"segments": []}, ": field segments is empty, expected a list"),
    "label": ({"segments": [{"text": "a", "label": 1}]}, ": field segments, segment 1: field label is 1, expected true or false"),
    "text": ({"segments": [{"label": True}]}, ": field segments, segment 1: field text is missing, expected text"),
}
BAD_INSTRUCTIONS = {
    "oasst": ({"INSTRUCTION": "a"}, " has no field RESPONSE; it has INSTRUCTION"),
    "explainchoice": ({"question": "a", "choices": "b", "solution": "c"}, ": field choices is of type str, expected a list of texts"),
    "concisechoice": ({"question": "a", "choices": ["b"]}, ": there is neither a solution nor an explanation"),
    "creative_acr.load_critique": ({"scores": {}, "instruction": "a", "answer": "b"}, " has no field critiques"),
}


def one(row):
    return sources.from_list([row], "data.jsonl")


def refused(message):
    return pytest.raises(ValueError, match=f"^data.jsonl row 1{message}")


@pytest.mark.parametrize("case", BAD)
def test_pairs(case, tokenizer):
    form, row, message = BAD[case]
    with refused(message):
        trees.encode_rows(one(row), form.reader(), tokenizer)


@pytest.mark.parametrize("case", BAD_STEPS)
def test_steps(case, tokenizer):
    with refused(BAD_STEPS[case][1]):
        reward.encode_steps(one(BAD_STEPS[case][0]), STEPS, tokenizer)


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_tokens(case, tokenizer):
    with refused(BAD_TOKENS[case][1]):
        pretokenised.reader(tokenizer)(one(BAD_TOKENS[case][0]))


@pytest.mark.parametrize("case", BAD_SEGMENTS)
def test_segments(case, tokenizer):
    with refused(BAD_SEGMENTS[case][1]):
        segments.reader(tokenizer)(one(BAD_SEGMENTS[case][0]))


@pytest.mark.parametrize("name", BAD_INSTRUCTIONS)
def test_instructions(name, tokenizer):
    with refused(BAD_INSTRUCTIONS[name][1]):
        instruction.shape_reader(name)(tokenizer)(one(BAD_INSTRUCTIONS[name][0]))


def test_prompts_and_ebft(tokenizer):
    with refused(" has no field prompt; it has question"):
        prompts.read_prompts(one({"question": "a"}), tokenizer)
    with refused(": field tools is a text that is no JSON"):
        prompts.read_prompts(one({"prompt": [USER], "tools": "x"}), tokenizer)
    with refused(": field messages has no message of the assistant"):
        ebft.read_structured(one({"messages": [USER]}), ebft.last_turn)
    with refused(": field prompt_length is 9, expected a whole number from 0 to 2"):
        ebft.read_strided(one({"input_ids": [1, 2], "labels": [-100, 2], "prompt_length": 9}), tokenizer)
    with pytest.raises(ValueError, match="not one prompt in 1 rows .*longer than max_prompt_len"):
        prompts.read_prompts(one({"prompt": "hello " * 9}), tokenizer, max_prompt_len=3)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            preference.user_defined,
            {"prompt_format": "{question}"},
            "prompt_format '{question}' names question: its places are {prompt}, {system}",
        ),
        (preference.user_defined, {"chosen_format": "x"}, "chosen_format 'x' lacks chosen"),
        (unpaired.user_defined, {"completion_format": 3}, "completion_format is of type int"),
        (preference.templated, {"message_property_mappings": {"name": "x"}}, "message_property_mappings has name"),
        (reward.stepwise, {"step_separator": ""}, "step_separator is ''"),
    ],
)
def test_options(make, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**options)


def test_options_of_the_user_defined_instruction(tokenizer):
    for options, message in (({"format": "{input}"}, "lacks instruction"), ({"no_input_format": "{instruction}{input}"}, "names input")):
        with pytest.raises(ValueError, match=message):
            instruction.user_defined(tokenizer, **options)
    with pytest.raises(ValueError, match="both need the name of a column"):
        instruction.user_defined(tokenizer, field_output="")


def test_user_formats_leave_braces_of_the_rows_alone(tokenizer):
    made = preference.user_defined(field_prompt="q", prompt_format="{system}|{prompt}\n", chosen_format="<{chosen}>")
    sides = made({"q": "{system} {0}", "chosen": "{chosen}", "rejected": "b", "system": "{prompt}"}, "row")
    assert sides.prompt == "{prompt}|{system} {0}\n" and sides.replies == ("<{chosen}>", "b")


def test_property_mappings_and_roles(tokenizer):
    options = {"field_messages": "talk", "field_chosen": "yes", "field_rejected": "no", "roles": {"user": ["me"], "assistant": ["it"]}}
    read = PAIRS["chat_template.default"].reader(message_field_role="who", message_field_content="says", **options)
    row = {"talk": [{"who": "me", "says": "hello"}], "yes": {"who": "it", "says": "a"}, "no": [{"who": "it", "says": "b"}]}
    assert read(row, "row") == trees.PromptReplies([{"role": "user", "content": "hello"}], (REPLY | {"content": "a"}, REPLY), {})


def test_defaults_of_the_user_defined_instruction(tokenizer):
    rows = sources.from_list(
        [{"instruction": "add", "input": "1, 2", "output": "3"}, {"instruction": "say", "output": "b", "system": "Be brief."}]
    )
    texts = instruction.user_defined(tokenizer)(rows)
    assert [text.text for text in texts] == ["User: add 1, 2\nAssistant:3", "Be brief.User: say\nAssistant:b"]
    one_for_both = instruction.user_defined(tokenizer, format="{system}>{instruction}[{input}]", no_input_format="", system_prompt="S")
    assert [text.text for text in one_for_both(rows)] == ["S>add[1, 2]3", "Be brief.>say[]b"]
    with pytest.raises(ValueError, match="row 1 has no field question; it has instruction, input, output"):
        instruction.user_defined(tokenizer, field_instruction="question")(rows)


def test_strided_rows_of_a_users_transform(tokenizer):
    rows = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [5, 6, 7, 3], "labels": [-100, -100, 7, -100], "attention_mask": [1, 1, 1, 0]}]
    rows += [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "prompt_length": 1}]
    docs = ebft.read_strided(sources.from_list(rows), tokenizer)
    assert [(doc.tokens.tolist(), doc.weight.tolist(), doc.prompt_length) for doc in docs] == [
        ([5, 6, 7, 8], [0, 1, 1, 1], 0),
        ([5, 6, 7], [0, 0, 1], 2),
        ([5, 6, 7], [0, 1, 1], 1),
    ]
    assert [doc.tokens.tolist() for doc in ebft.truncate_docs(docs, 2)] == [[5, 6], [5, 6]]  # the second is left without a completion


def test_sharegpt_names(tokenizer):
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert ebft.last_turn(row, "row") == [{"prompt": [USER], "ground_truth": "b"}]


def test_custom_transforms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "def bare(cfg, **kwargs):\n    return lambda example: {'n': example['a'] + cfg}\n"
        "def some(cfg, **kwargs):\n    return (lambda example, tokenizer=None: {'t': tokenizer}), {'remove_columns': ['a']}\n"
        "def many(cfg, **kwargs):\n    return (lambda rows: {'a': rows['a'] * 2}), {'batched': True, 'remove_columns': '__all__'}\n"
        "def uneven(cfg, **kwargs):\n    return (lambda rows: {'a': [1], 'b': []}), {'batched': True}\n"
        "def nothing(cfg):\n    return None\n"
        "value = 3\n"
    )
    Path("broken.py").write_text("def f(:\n")
    rows = sources.from_list([{"a": 1, "b": 2}, {"a": 5, "b": 6}], "data.jsonl")
    assert custom.apply_transform(rows, custom.load_transform("mine.bare", 10)).rows == [
        {"a": 1, "b": 2, "n": 11},
        {"a": 5, "b": 6, "n": 15},
    ]
    assert custom.apply_transform(rows, custom.load_transform("mine.py:some"), "T").rows == [{"b": 2, "t": "T"}, {"b": 6, "t": "T"}]
    made = custom.apply_transform(rows, custom.load_transform("mine.many"))
    assert made.rows == [{"a": 1}, {"a": 1}, {"a": 5}, {"a": 5}] and made.numbers == [1, 1, 2, 2]
    with refused(": transform 'mine.bare' raised KeyError: 'a'"):
        custom.apply_transform(one({"b": 1}), custom.load_transform("mine.bare", 1))
    with refused(": transform 'mine.uneven' is batched: expected lists of one length"):
        custom.apply_transform(one({"b": 1}), custom.load_transform("mine.uneven"))
    for path, message in (
        ("mine.other", "has no function other"),
        ("mine.value", "has no function value"),
        ("mine.nothing", "gave missing"),
        ("absent.f", "no module absent"),
        ("absent.py:f", "no file absent.py"),
        ("broken.f", "does not load .SyntaxError"),
        ("alone", "expected module.function or file.py:function"),
    ):
        with pytest.raises(ValueError, match=message):
            custom.load_transform(path)
