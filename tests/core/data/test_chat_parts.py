"""What a message may say about its own training: flags, character offsets, parts; and the names of columns and roles."""

import numpy as np
import pytest

from treetune.core.data import conversations, formats, row_formats, sources, spans


def runs(row, tokenizer, **options):
    """[(text, weight)] of the stretches that are trained."""
    docs, report = formats.encode_rows(sources.from_list([row]), tokenizer, format="chat", **options)
    doc = docs[0]
    cuts = np.split(np.arange(len(doc.tokens)), np.flatnonzero(np.diff(doc.weight)) + 1)
    return [(tokenizer.decode(doc.tokens[cut]), float(doc.weight[cut[0]])) for cut in cuts if doc.weight[cut[0]] > 0]


def reader_text(row, tokenizer, **options):
    return row_formats.of_kind("text")["chat"].reader(tokenizer, **options)(sources.from_list([row]))[0]


def encoded(row, tokenizer, **options):
    return spans.encode([reader_text(row, tokenizer, **options)], tokenizer, spans.read_special_tokens(tokenizer))[0]


def user(content="hello", **rest):
    return {"role": "user", "content": content, **rest}


def says(content, **rest):
    return {"role": "assistant", "content": content, **rest}


WORKED = {
    "conversations": [
        {"from": "system", "value": "You are an AI assistant.", "train": False},
        {"from": "human", "value": "Hello", "train": False},
        {"from": "assistant", "value": "Hello", "train": True},
        {"from": "human", "value": "How are you?", "train": True},
        {
            "from": "assistant",
            "value": "I'm doing very well, thank you!",
            "train_detail": [
                {"begin_offset": 0, "end_offset": 8, "train": False},
                {"begin_offset": 9, "end_offset": 18, "train": True},
                {"begin_offset": 19, "end_offset": 30, "train": False},
            ],
        },
        {"from": "human", "value": "I'm doing very well, thank you!", "train": True},
        {"from": "assistant", "value": "Hi there!", "train": True},
    ]
}
WORKED_OPTIONS = {
    "field_messages": "conversations",
    "message_field_role": "from",
    "message_field_content": "value",
    "roles_to_train": [],
    "train_on_eos": "turn",
    "message_field_training": "train",
    "message_field_training_detail": "train_detail",
}


def test_the_worked_example_of_the_documents(tokenizer):
    end = "<|im_end|>"
    assert runs(WORKED, tokenizer, **WORKED_OPTIONS) == [
        ("Hello" + end, 1.0),
        ("How are you?" + end, 1.0),
        (" very well", 1.0),
        (end, 1.0),
        ("I'm doing very well, thank you!" + end, 1.0),
        ("Hi there!" + end, 1.0),
    ]


def test_characters_that_no_detail_names_follow_the_message(tokenizer):
    detail = [{"begin_offset": 0, "end_offset": 7, "train": False}]
    row = {"messages": [user(), says("No, wait. It is 4.", train_detail=detail)]}
    assert runs(row, tokenizer) == [(". It is 4.<|im_end|>", 1.0)]
    row["messages"][1]["train"] = False
    with pytest.raises(ValueError, match="not one token to train on"):
        runs(row, tokenizer)


@pytest.mark.parametrize("name", ["text", "content", "value"])
def test_parts(name, tokenizer):
    parts = [
        {"type": "text", name: "Let me think step by step...", "train": False},
        {"type": "text", name: " The answer is 4.", "train": True},
    ]
    row = {"messages": [user([{"type": "text", "text": "What is 2+2?"}]), says(parts)]}
    assert runs(row, tokenizer) == [(" The answer is 4.<|im_end|>", 1.0)]
    assert encoded(row, tokenizer).trailing_space_boundaries == 0


def test_parts_have_weights_and_inherit(tokenizer):
    parts = [
        {"type": "text", "text": "hello", "weight": 0},
        {"type": "text", "text": " to the"},
        {"type": "text", "text": " user", "weight": 0.5},
    ]
    assert runs({"messages": [user(), says(parts)]}, tokenizer) == [(" to the", 1.0), (" user", 0.5), ("<|im_end|>", 1.0)]
    assert runs({"messages": [user(), says(parts, weight=0.25)]}, tokenizer) == [(" to the", 0.25), (" user", 0.5), ("<|im_end|>", 0.25)]
    assert runs({"messages": [user(), says(parts)]}, tokenizer, roles_to_train=[]) == [(" user<|im_end|>", 0.5)]


def test_a_token_across_parts_is_masked_and_the_boundary_counted(tokenizer):
    parts = [{"type": "text", "text": "Let me think... ", "train": False}, {"type": "text", "text": "the answer is 4.", "train": True}]
    row = {"messages": [user(), says(parts)]}
    words = tokenizer.tokenize("... the answer")
    assert "Ġthe" in words, "no token crosses the border: the test would show nothing"
    assert runs(row, tokenizer) == [(" answer is 4.<|im_end|>", 1.0)]
    assert encoded(row, tokenizer).trailing_space_boundaries == 1
    for part in parts:
        part["train"] = True
    assert encoded(row, tokenizer).trailing_space_boundaries == 0


def test_newlines_stay_with_the_part_before(tokenizer):
    parts = [{"type": "text", "text": "Thinking:\n", "train": False}, {"type": "text", "text": "The answer is 4.", "train": True}]
    row = {"messages": [user(), says(parts)]}
    assert runs(row, tokenizer) == [("The answer is 4.<|im_end|>", 1.0)]
    assert encoded(row, tokenizer).trailing_space_boundaries == 0


def test_parts_of_reasoning(templates, tokenizer):
    tokenizer.chat_template = templates["qwen3"]
    reasoning = [{"type": "text", "text": "Hmm maybe 2+2=5.", "train": False}, {"type": "text", "text": " Wait no, 2+2=4.", "train": True}]
    answer = [{"type": "text", "text": "The answer is 4.", "train": True}]
    row = {"messages": [user(), {"role": "assistant", "reasoning_content": reasoning, "content": answer}]}
    assert runs(row, tokenizer) == [
        ("<think>\n", 1.0),
        (" Wait no, 2+2=4.\n</think>\n\nThe answer is 4.<|im_end|>", 1.0),
    ]
    answer[0]["train"] = False
    assert runs(row, tokenizer)[1:] == [(" Wait no, 2+2=4.\n</think>\n\n", 1.0), ("<|im_end|>", 1.0)]


def test_parts_that_are_stripped_keep_their_places(templates, tokenizer):
    parts = [{"type": "text", "text": "  \n hello", "train": False}, {"type": "text", "text": " to the user \n ", "train": True}]
    row = {"messages": [user(), says(parts)]}
    assert runs(row, tokenizer, chat_template=templates["llama3"]) == [(" to the user<|eot_id|>", 1.0)]


def test_parts_around_reasoning_tags(templates, tokenizer):
    tokenizer.chat_template = templates["qwen3"]
    parts = [
        {"type": "text", "text": "<think>\nthe quick\n</think>\n\n", "train": False},
        {"type": "text", "text": "the answer", "train": True},
    ]
    talk = [user(), says(parts)]
    assert runs({"messages": talk}, tokenizer)[-1] == ("the answer<|im_end|>", 1.0)
    history = [*talk, user("more"), says("It is 4.", train=False)]
    assert runs({"messages": history}, tokenizer) == [("the answer<|im_end|>", 1.0)]  # the template leaves old reasoning out
    parts[0]["text"] = "<think>the quick</think>"
    with pytest.raises(ValueError, match="row 1: content of message 2 has parts of different weight, but the template takes it apart"):
        runs({"messages": talk}, tokenizer)


@pytest.mark.parametrize("template", ["qwen3", "chatml"])
def test_split_thinking(template, templates, tokenizer):
    tokenizer.chat_template = templates[template]
    row = {"messages": [user(), says("<think>the quick </think>\n\nIt is 4.")]}
    messages = conversations.read_conversation(row, "row 1", conversations.message_fields(split_thinking=True)).messages
    assert messages[1] == {"role": "assistant", "content": "It is 4.", "reasoning_content": "the quick"}
    trained = {"qwen3": "<think>\nthe quick\n</think>\n\nIt is 4.<|im_end|>", "chatml": "It is 4.<|im_end|>"}[template]
    assert runs(row, tokenizer, split_thinking=True) == [(trained, 1.0)]
    assert encoded(row, tokenizer, split_thinking=True).cut == (template == "chatml")


def test_the_system_message_is_dropped_where_asked():
    system, talk = {"role": "system", "content": "Be brief."}, [user(), says("4.")]
    fields = conversations.message_fields(drop_system_message=True)
    for row in ({"messages": [system, *talk]}, {"messages": talk, "system": "Be brief."}):
        assert [message["role"] for message in conversations.read_conversation(row, "row 1", fields).messages] == ["user", "assistant"]
        assert conversations.read_conversation(row, "row 1").messages[0] == system


def test_split_thinking_keeps_parts(templates, tokenizer):
    tokenizer.chat_template = templates["qwen3"]
    parts = [{"type": "text", "text": "<think>hello", "train": False}, {"type": "text", "text": " the user</think>It is 4.", "train": True}]
    row = {"messages": [user(), says(parts)]}
    assert runs(row, tokenizer, split_thinking=True)[1:] == [(" the user\n</think>\n\nIt is 4.<|im_end|>", 1.0)]


def test_split_thinking_refuses_text_before_the_tags(tokenizer):
    row = {"messages": [user(), says("First <think>the quick</think> It is 4.")]}
    with pytest.raises(ValueError, match="rows row 1: message 2: text stands before <think>"):
        runs(row, tokenizer, split_thinking=True)


def test_names_of_columns_and_roles(tokenizer):
    row = {"talk": [{"who": "person", "says": "hello", "note": None}, {"who": "model", "says": "It is 4.", "grade": True}]}
    options = {
        "field_messages": "talk",
        "message_property_mappings": {"role": "who", "content": "says"},
        "roles": {"user": ["person"], "assistant": ["model"]},
    }
    assert runs(row, tokenizer, **options) == [("It is 4.<|im_end|>", 1.0)]
    row["talk"][1]["grade"] = False
    with pytest.raises(ValueError, match="not one token to train on"):
        runs(row, tokenizer, message_field_training="grade", **options)
    with pytest.raises(ValueError, match="rows row 1 has no field messages"):
        runs(row, tokenizer)


def test_a_mapped_column_beside_one_of_the_same_name_is_refused(tokenizer):
    row = {"messages": [user(), {"role": "assistant", "content": "a", "answer": "b"}]}
    with pytest.raises(ValueError, match="rows row 1: message 2 has both answer and content"):
        options = {"message_property_mappings": {"content": "answer"}}
        runs({"messages": [{"role": "user", "answer": "c"}, row["messages"][1]]}, tokenizer, **options)


def test_no_roles_means_the_last_message(tokenizer):
    row = {"messages": [user(), says("the answer"), user("hello"), says("It is 4.")]}
    assert runs(row, tokenizer, roles_to_train=None, train_on_eos=None) == [("It is 4.<|im_end|>", 1.0)]


def test_parts_under_train_on_inputs(tokenizer):
    parts = [{"type": "text", "text": "hello", "train": False}, {"type": "text", "text": " user"}]
    doc = encoded({"messages": [user(), says(parts)]}, tokenizer, train_on_inputs=True)
    assert tokenizer.decode(doc.tokens[doc.weight == 0]) == "<|im_start|>hello"


def test_end_tokens_of_partly_trained_turns(tokenizer):
    parts = [{"type": "text", "text": "hello", "train": False}, {"type": "text", "text": " user", "train": True}]
    row = {"messages": [user(), says(parts), user(), says(parts)]}
    assert runs(row, tokenizer, train_on_eos="last") == [(" user", 1.0), (" user<|im_end|>", 1.0)]


def test_tokens_by_role(templates, tokenizer):
    row = {"messages": [{"role": "system", "content": "the user"}, user("hello"), says("the answer")]}
    doc = encoded(row, tokenizer)
    sizes = {role: len(tokenizer.tokenize(text)) for role, text in (("system", "the user"), ("user", "hello"), ("assistant", "the answer"))}
    counts = spans.tokens_by_role(doc)
    blank = len(tokenizer.tokenize("\n"))
    assert counts == {
        "template": (len(doc.tokens) - sum(sizes.values()) - 3 * (1 + blank), 0),
        "system": (sizes["system"] + 1 + blank, 0),
        "user": (sizes["user"] + 1 + blank, 0),
        "assistant": (sizes["assistant"] + 1 + blank, sizes["assistant"] + 1),
    }
    assert spans.tokens_by_role(doc, 0, 5)["assistant"] == (0, 0)
    assert sum(total for total, _ in spans.tokens_by_role(encoded(row, tokenizer, train_on_inputs=True)).values()) == len(doc.tokens)
