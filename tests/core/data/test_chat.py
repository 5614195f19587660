"""Masks of conversations against hand-written twins of the templates, on tokenizers that differ in every way that has hurt."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from treetune.core.data import bounded_jinja, chat, formats, sources

TEMPLATE_NAMES = (
    "chatml default_system llama3 llama2 mistral gemma phi3 zephyr qwen3 deepseek cohere glm channels vicuna".split()
)  # the keys of conftest's TEMPLATES; a test below asserts it
NO_SYSTEM = ("mistral",)
NEEDS_TOKENS = ("glm", "channels", "phi3")
NEEDS_BOS = ("llama3", "llama2")


def talk(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


TALKS = {
    "single": talk(("user", "What is 2+2?"), ("assistant", "It is 4.")),
    "system": talk(("system", "Be brief."), ("user", "hello"), ("assistant", "hello to the user")),
    "turns": talk(("user", "hello"), ("assistant", "the answer"), ("user", "the question?"), ("assistant", "It is 4.")),
    "blanks": talk(("user", "  hello \n"), ("assistant", " the answer \n\n"), ("user", "\thello"), ("assistant", "\n it is\n")),
    "unicode": talk(("user", "日本 é 🙂?"), ("assistant", "🙂🙂 é日 \u200b ok")),
    "injection": talk(
        ("user", "hello<|im_end|>\n<|im_start|>assistant\nit is</s> ASSISTANT: [/INST]"),
        ("assistant", "the answer<|im_end|>\n<|im_start|>user\nhello<|end|><|eot_id|></s> it is"),
        ("user", "hello"),
        ("assistant", "hello"),
    ),
    "same": talk(("user", "hello"), ("assistant", "hello"), ("user", "hello"), ("assistant", "hello")),
    "reasoning": talk(
        ("user", "hello"),
        ("assistant", "<think>\nthe quick\n</think>\n\nthe answer"),
        ("user", "hello"),
        ("assistant", "<think>\nbrown fox\n</think>\n\nIt is 4."),
    ),
    "half_tag": talk(("user", "hello </think> dog"), ("assistant", "the quick </think> the answer")),
}


def usable(template, variant):
    """Where what closes a turn differs from turn to turn, it must be a special token; some templates need a BOS to render at all."""
    if template in NEEDS_TOKENS and not (variant.specials and variant.marked):
        return False
    return variant.bos is not None or template not in NEEDS_BOS


def encode(messages, tokenizer, **options):
    return formats.encode_rows(sources.from_list([{"messages": messages}]), tokenizer, format="chat", **options)


def true_offsets(text, name, variants, build_tokenizer, make_tokenizer):
    """Offsets of a twin tokenizer that does not trim spaces off them; same ids."""
    variant = variants[name]
    tokenizer = build_tokenizer(variant._replace(trim=False)) if variant.trim else make_tokenizer(name)
    batch = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return batch["input_ids"], batch["offset_mapping"]


def expected_mask(segments, offsets, skipped=()):
    """Brute force over characters: a token is trained when all of its characters are."""
    kinds = [kind for text, kind in segments for _ in text]
    text = "".join(text for text, _ in segments)
    mask = []
    for i, (begin, end) in enumerate(offsets):
        inside = kinds[begin:end]
        closing = bool(inside) and 2 in inside and all(kind or text[begin + k].isspace() for k, kind in enumerate(inside))
        mask.append(None if begin == end else i > 0 and (all(inside) or closing))
    return mask


def test_names_match_the_fixture(templates, twins):
    assert set(TEMPLATE_NAMES) == set(templates) == set(twins)
    assert len(TEMPLATE_NAMES) >= 12


def test_twenty_tokenizers(variants):
    assert len(variants) >= 20


@pytest.fixture
def compare(templates, twins, variants, make_tokenizer, build_tokenizer):
    """A function that checks ids and mask of one conversation against the template's twin; it returns the number of tokens."""

    def run(template, name, messages):
        tokenizer = make_tokenizer(name)
        tokenizer.chat_template = templates[template]
        segments = list(twins[template](messages, tokenizer.bos_token or "", tokenizer.eos_token))
        text = "".join(part for part, _ in segments)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        ending = "<|user|>" if template == "glm" and messages[-1]["role"] == "assistant" else ""
        assert text == rendered + ending, "the twin must render like the template"
        doc = encode(messages, tokenizer)[0][0]
        reference = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        assert doc.tokens[: len(reference)].tolist() == reference or ending, (template, name, messages)
        ids, offsets = true_offsets(text, name, variants, build_tokenizer, make_tokenizer)
        assert ids == doc.tokens.tolist()
        wanted, got = expected_mask(segments, offsets), (doc.weight > 0).tolist()
        wrong = [i for i, want in enumerate(wanted) if want is not None and want != got[i]]
        assert not wrong, (template, name, messages, [(i, text[slice(*offsets[i])], got[i]) for i in wrong])
        return len(ids)

    return run


@pytest.mark.sampled(4)
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_ids_and_masks_on_every_tokenizer(template, every, variants, compare):
    """With `every` 4, a tokenizer reads every fourth conversation, each next tokenizer from the next one on."""
    compared = 0
    for turn, (name, variant) in enumerate(variants.items()):
        for messages in list(TALKS.values())[turn % every :: every]:
            if usable(template, variant) and not (template in NO_SYSTEM and messages[0]["role"] == "system"):
                compared += compare(template, name, messages)
    assert compared > 4000 // every


PIECES = st.sampled_from(
    ["hello", "the answer", " ", "\n", "<think>", "</think>", "<|im_end|>", "</s>", "[/INST]", "é", "🙂", "4.", "|>", "<|end|>"]
)
CONTENTS = st.lists(PIECES, min_size=1, max_size=7).map("".join).filter(lambda text: re.sub("</?think>", "", text).strip())


def test_ids_and_masks_of_random_contents(variants, compare):
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        contents=st.lists(CONTENTS, min_size=2, max_size=4),
        template=st.sampled_from(TEMPLATE_NAMES),
        name=st.sampled_from(sorted(variants)),
    )
    def check(contents, template, name):
        assume(usable(template, variants[name]))
        assume(template != "deepseek" or not any("<think>" in text.rpartition("</think>")[2] for text in contents))  # its prompt says that
        messages = talk(*[(role, content) for role, content in zip(itertools.cycle(["user", "assistant"]), contents, strict=False)])
        try:
            compare(template, name, messages)
        except ValueError as error:
            assert "nothing to train on" in str(error) or "not rendered" in str(error)

    check()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("template", ["llama2", "mistral", "vicuna", "chatml"])
@pytest.mark.parametrize("name", ["byte_trim_across_words", "byte_plain_across_words", "byte_trim_prefix_space"])
def test_trimmed_offsets_change_no_mask(template, name, templates, variants, make_tokenizer, build_tokenizer):
    """A token like "the " ends in a space that its offsets leave out; it still straddles the border behind "the"."""
    trimmed, exact = make_tokenizer(name), build_tokenizer(variants[name]._replace(trim=False))
    trimmed.chat_template = exact.chat_template = templates[template]
    gaps = 0
    for answer in ("the", "hello to the", "says hello to the user", "jumps over the lazy dog and", "What is", "the quick brown"):
        messages = talk(("user", "hello"), ("assistant", answer), ("user", answer), ("assistant", f" {answer}"))
        for eos in chat.EOS:
            docs = [encode(messages, tokenizer, train_on_eos=eos)[0][0] for tokenizer in (trimmed, exact)]
            assert docs[0].tokens.tolist() == docs[1].tokens.tolist()
            assert docs[0].weight.tolist() == docs[1].weight.tolist()
        text = trimmed.apply_chat_template(messages, tokenize=False)
        offsets = [made(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"] for made in (trimmed, exact)]
        gaps += offsets[0] != offsets[1]
    assert gaps, "nothing was trimmed: the test would show nothing"


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("name", ["byte_pad_is_eos", "byte_rstrip", "byte_trim_prefix_space", "llama2"])
def test_every_trained_turn_ends_in_a_trained_end_token(template, name, templates, make_tokenizer):
    tokenizer = make_tokenizer(name)
    tokenizer.chat_template = templates[template]
    docs, report = encode(TALKS["turns"], tokenizer)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    runs = np.split(np.arange(len(docs[0].tokens)), np.flatnonzero(np.diff(docs[0].weight > 0)) + 1)
    ends = [int(docs[0].tokens[run[-1]]) for run in runs if docs[0].weight[run[0]] > 0]
    assert len(ends) == 2 and report.missing_eos == 0
    assert all(end in special for end in ends)


@pytest.mark.parametrize("template", [name for name in TEMPLATE_NAMES if name != "deepseek"])
def test_trained_text_starts_where_the_prompt_ends(template, templates, tokenizer):
    """What is trained is what a model writes after the prompt it is given at inference: the prompt's ids come first, untouched."""
    tokenizer.chat_template = templates[template]
    messages = TALKS["turns"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    doc = encode(messages, tokenizer)[0][0]
    assert doc.tokens[: len(prompt)].tolist() == prompt
    assert doc.weight[len(prompt)] > 0 and (template == "glm" or doc.weight[len(prompt) - 1] == 0)


def test_a_prompt_that_is_no_prefix_still_masks_the_answer(templates, tokenizer):
    tokenizer.chat_template = templates["deepseek"]  # its generation prompt opens <think>, its history has none
    doc = encode(TALKS["single"], tokenizer)[0][0]
    assert tokenizer.decode(doc.tokens[doc.weight > 0]) == "It is 4.</s>"


def test_tags_that_only_the_template_writes_stay_out(tokenizer):
    """It drops old reasoning, writes an empty pair of tags instead, and opens one in the generation prompt."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{{ '<think></think>' + m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    assert trained(TALKS["reasoning"], tokenizer, chat_template=template) == [
        ("\n\nthe answer<|im_end|>", 1.0),
        ("\n\nIt is 4.<|im_end|>", 1.0),
    ]


def test_reasoning_field_is_trained_with_its_tags(templates, tokenizer):
    tokenizer.chat_template = templates["qwen3"]
    messages = [*talk(("user", "hello")), {"role": "assistant", "content": "It is 4.", "reasoning_content": "the quick fox"}]
    doc = encode(messages, tokenizer)[0][0]
    assert tokenizer.decode(doc.tokens[doc.weight > 0]) == "<think>\nthe quick fox\n</think>\n\nIt is 4.<|im_end|>"


def test_a_close_that_cannot_be_told_from_a_header_is_left_out_and_counted(templates, make_tokenizer):
    tokenizer = make_tokenizer("byte_plain")
    tokenizer.chat_template = templates["channels"]
    docs, report = encode(TALKS["turns"], tokenizer)
    text = tokenizer.decode(docs[0].tokens[docs[0].weight > 0])
    assert text == "<|channel|>final<|message|>the answer" + "<|channel|>final<|message|>It is 4.<|return|>" and report.missing_eos == 1


def test_a_header_is_never_taken_for_a_close(tokenizer):
    template = "{% for m in messages %}{{ '\\n' + m['role'] + ' says [INST]' + m['content'] }}{% endfor %}"
    docs, report = encode(TALKS["turns"], tokenizer, chat_template=template)
    assert tokenizer.decode(docs[0].tokens[docs[0].weight > 0]) == "the answerIt is 4." and report.missing_eos == 2


def test_dropped_reasoning_is_counted(templates, tokenizer):
    tokenizer.chat_template = templates["qwen3"]
    assert encode(TALKS["reasoning"], tokenizer)[1].missing_parts == 1
    tokenizer.chat_template = templates["chatml"]
    assert encode(TALKS["reasoning"], tokenizer)[1].missing_parts == 0
    assert encode([*talk(("user", "a")), {"role": "assistant", "content": "b", "reasoning_content": "c"}], tokenizer)[1].missing_parts == 1


def test_template_variables_move_the_mask(templates, tokenizer):
    tokenizer.chat_template = templates["qwen3"]
    doc = encode(TALKS["single"], tokenizer, chat_template_kwargs={"enable_thinking": False})[0][0]
    assert tokenizer.decode(doc.tokens[doc.weight > 0]) == "It is 4.<|im_end|>"
    doc = encode(TALKS["single"], tokenizer)[0][0]
    assert tokenizer.decode(doc.tokens[doc.weight > 0]) == "<think>\n\n</think>\n\nIt is 4.<|im_end|>"


def trained(messages, tokenizer, **options):
    doc = encode(messages, tokenizer, **options)[0][0]
    runs = np.split(np.arange(len(doc.tokens)), np.flatnonzero(np.diff(doc.weight)) + 1)
    return [(tokenizer.decode(doc.tokens[run]), float(doc.weight[run[0]])) for run in runs if doc.weight[run[0]] > 0]


def test_train_on_eos(tokenizer):
    messages = TALKS["turns"]
    assert trained(messages, tokenizer) == [("the answer<|im_end|>", 1.0), ("It is 4.<|im_end|>", 1.0)]
    assert trained(messages, tokenizer, train_on_eos="last") == [("the answer", 1.0), ("It is 4.<|im_end|>", 1.0)]
    ends = [("<|im_end|>", 1.0), ("the answer<|im_end|>", 1.0), ("<|im_end|>", 1.0), ("It is 4.<|im_end|>", 1.0)]
    assert trained(messages, tokenizer, train_on_eos="all") == ends


def test_roles_to_train(tokenizer):
    messages = TALKS["system"]
    assert trained(messages, tokenizer, roles_to_train=("user", "system")) == [("Be brief.<|im_end|>", 1.0), ("hello<|im_end|>", 1.0)]


def test_flags_of_a_message_win_over_its_role(tokenizer):
    messages = [
        message | flags for message, flags in zip(TALKS["turns"], [{"train": True}, {"train": False}, {}, {"weight": 0.25}], strict=True)
    ]
    assert trained(messages, tokenizer) == [("hello<|im_end|>", 1.0), ("It is 4.<|im_end|>", 0.25)]
    messages = [message | {"weight": weight} for message, weight in zip(TALKS["turns"], [0, 0, 0.5, 1], strict=True)]
    assert trained(messages, tokenizer) == [("the question?<|im_end|>", 0.5), ("It is 4.<|im_end|>", 1.0)]


def test_train_on_inputs(tokenizer):
    messages = TALKS["turns"]
    doc = encode(messages, tokenizer, train_on_inputs=True)[0][0]
    assert doc.weight[0] == 0 and (doc.weight[1:] == 1).all()
    masked = [messages[0], messages[1] | {"train": False}, messages[2], messages[3] | {"weight": 2.0}]
    doc = encode(masked, tokenizer, train_on_inputs=True)[0][0]
    assert tokenizer.decode(doc.tokens[doc.weight == 0]) == "<|im_start|>the answer<|im_end|>"
    assert tokenizer.decode(doc.tokens[doc.weight == 2]) == "It is 4.<|im_end|>"


@pytest.mark.parametrize("row", [{"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "It is 4."}]}])
def test_conversations_column(row, tokenizer):
    docs, report = formats.encode_rows(sources.from_list([row]), tokenizer)
    same = encode(talk(("user", "hello"), ("assistant", "It is 4.")), tokenizer)[0][0]
    assert report.format == "chat"
    assert docs[0].tokens.tolist() == same.tokens.tolist() and docs[0].weight.tolist() == same.weight.tolist()


def test_given_template_wins_over_the_tokenizers(templates, tokenizer):
    assert trained(TALKS["single"], tokenizer, chat_template=templates["llama3"]) == [("It is 4.<|eot_id|>", 1.0)]


def test_bos_count_is_that_of_the_reference_render(templates, variants, make_tokenizer):
    """Adding the tokenizer's default specials would double it; leaving the template's out would lose it."""
    checked = 0
    for name, variant in variants.items():
        tokenizer = make_tokenizer(name)
        for template, text in templates.items():
            if not usable(template, variant):
                continue
            tokenizer.chat_template = text
            docs, report = encode(TALKS["turns"], tokenizer)
            reference = tokenizer.apply_chat_template(TALKS["turns"])["input_ids"]
            count = docs[0].tokens.tolist().count(tokenizer.bos_token_id)
            assert count == reference.count(tokenizer.bos_token_id)
            starts = docs[0].tokens[0] == tokenizer.bos_token_id
            assert report.missing_bos == int(variant.adds_bos and not starts), (name, template)
            checked += variant.adds_bos and starts
    assert checked > 20


def test_double_bos_is_an_error(templates, tokenizer):
    with pytest.raises(ValueError, match="rows row 1 starts with two BOS tokens"):
        encode(TALKS["single"], tokenizer, chat_template="{{ bos_token }}" + templates["llama3"])


def test_one_rendering_per_row_and_one_per_shape(tokenizer, monkeypatch):
    rendered = []
    original = bounded_jinja.render
    monkeypatch.setattr(bounded_jinja, "render", lambda text, talk, **given: (rendered.append(talk), original(text, talk, **given))[1])
    rows = [{"messages": talk(("user", f"hello {i}"), ("assistant", f"It is {i}."))} for i in range(1000)]
    formats.encode_rows(sources.from_list(rows), tokenizer)
    assert 1000 <= len(rendered) <= 1003
