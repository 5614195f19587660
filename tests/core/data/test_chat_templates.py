"""Named templates, where a template comes from, tools, and the stock templates that an installed TRL carries."""

import importlib.util
import json
from pathlib import Path

import jinja2
import numpy as np
import pytest
from tokenizers import AddedToken

from treetune.core.data import chat_templates, formats, sources, template_date

TOKENS = (
    "<|turn> <turn|> <|channel> <channel|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <｜tool▁calls▁begin｜> "
    "<｜tool▁call▁begin｜> <｜tool▁sep｜> <｜tool▁call▁end｜> <｜tool▁calls▁end｜> <｜end▁of▁sentence｜> <|START_OF_TURN_TOKEN|> "
    "<|END_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <|USER_TOKEN|> <|call|> <|observation|> <|eom|> <|bom|> <|im_sep|> <|eot|> "
    '<|header_start|> <|header_end|> [TOOL_CALLS] <|tool_call_start|> <|tool_call_end|> <|"|>'
).split()


@pytest.fixture(scope="module")
def wide():
    """A tokenizer that knows the special tokens of all families."""
    return {}


@pytest.fixture
def tokenizer(wide, build_tokenizer, variants):
    if not wide:
        wide["it"] = build_tokenizer(variants["byte"])
        wide["it"].add_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS], special_tokens=True)
    wide["it"].chat_template = None
    template_date.choose(template_date.today())  # as transformers has it now
    return wide["it"]


def runs(row, tokenizer, **options):
    doc = formats.encode_rows(sources.from_list([row]), tokenizer, format="chat", **options)[0][0]
    cuts = np.split(np.arange(len(doc.tokens)), np.flatnonzero(np.diff(doc.weight)) + 1)
    return [tokenizer.decode(doc.tokens[cut]) for cut in cuts if doc.weight[cut[0]] > 0]


def ids(row, tokenizer, **options):
    return formats.encode_rows(sources.from_list([row]), tokenizer, format="chat", **options)[0][0].tokens.tolist()


def call(arguments, name="get_weather"):
    return {"type": "function", "id": "abcdefghi", "function": {"name": name, "arguments": arguments}}


def talk(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


PLAIN = talk(("user", "hello"), ("assistant", "the answer"), ("user", "more?"), ("assistant", "It is 4."))
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WEATHER}]
ARGUMENTS = {"city": 'Par"is', "days": 3, "deep": {"list": ["é\n", True]}}


def tooled(arguments=ARGUMENTS, **rest):
    return [
        *talk(("system", "Be brief."), ("user", "weather?")),
        {"role": "assistant", "tool_calls": [call(arguments)], **rest},
        {"role": "tool", "content": '{"t": "20"}\nok', "name": "get_weather", "tool_call_id": "abcdefghi"},
        *talk(("assistant", "It is 20."), ("user", "bye"), ("assistant", "see you")),
    ]


PLAIN_RUNS = {
    "alpaca": ("", "</s>"),
    "chatml": ("", "<|im_end|>"),
    "cohere": ("", "<|END_OF_TURN_TOKEN|>"),
    "deepseek_v2": (" ", "</s>"),
    "deepseek_v3": ("", "<｜end▁of▁sentence｜>"),
    "gemma": ("", "<end_of_turn>"),
    "gemma3": ("", "<end_of_turn>"),
    "gemma4": ("", "<turn|>"),
    "inst": ("", "</s>"),
    "jamba": (" ", "<|eom|>"),
    "llama3": ("", "<|eot_id|>"),
    "llama4": ("", "<|eot|>"),
    "metharme": ("", "</s>"),
    "mistral": (" ", "</s>"),
    "mistral_v1": (" ", "</s>"),
    "phi_3": ("", "<|end|>"),
    "phi_35": ("", "<|end|>"),
    "phi_4": ("", "<|im_end|>"),
    "qwen3": ("", "<|im_end|>"),
    "qwen3_5": ("", "<|im_end|>"),
    "qwen_25": ("", "<|im_end|>"),
    "zephyr": ("", "</s>"),
}
THINKS = {"qwen3": "<think>\n\n</think>\n\n", "qwen3_5": "\n</think>\n\n"}  # what the last answer begins with


def test_every_name_is_tested():
    assert set(chat_templates.builtin_names()) == set(PLAIN_RUNS)


@pytest.mark.parametrize("name", PLAIN_RUNS)
def test_named_templates(name, tokenizer):
    before, close = PLAIN_RUNS[name]
    last = THINKS.get(name, before)
    assert runs({"messages": PLAIN}, tokenizer, chat_template=name) == [before + "the answer" + close, last + "It is 4." + close]
    reference = tokenizer.apply_chat_template(PLAIN, chat_template=chat_templates.builtin_template(name))["input_ids"]
    assert ids({"messages": PLAIN}, tokenizer, chat_template=name) == reference


RENDERED = {
    "alpaca": "<s>### Instruction:\nhello\n\n### Response:\nhi</s>",
    "chatml": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n",
    "deepseek_v2": "<s>User: hello\n\nAssistant: hi</s>",
    "deepseek_v3": "<s><｜User｜>hello<｜Assistant｜>hi<｜end▁of▁sentence｜>",
    "gemma": "<s><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\nhi<end_of_turn>\n",
    "gemma4": "<s><|turn>user\nhello<turn|>\n<|turn>model\nhi<turn|>\n",
    "inst": "<s>[INST] hello [/INST]hi</s>",
    "jamba": "<s><|bom|><|user|> hello<|eom|><|bom|><|assistant|> hi<|eom|>",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nhi<|eot_id|>",
    "mistral": "<s>[INST] hello[/INST] hi</s>",
    "mistral_v1": "<s> [INST] hello [/INST] hi</s>",
    "phi_3": "<|user|>\nhello<|end|>\n<|assistant|>\nhi<|end|>\n</s>",
    "phi_4": "<|im_start|>user<|im_sep|>hello<|im_end|><|im_start|>assistant<|im_sep|>hi<|im_end|>",
    "qwen3": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nhi<|im_end|>\n",
    "zephyr": "<|user|>\nhello</s>\n<|assistant|>\nhi</s>\n",
}


@pytest.mark.parametrize("name", RENDERED)
def test_what_named_templates_write(name, tokenizer):
    messages = talk(("user", "hello"), ("assistant", "hi"))
    assert tokenizer.apply_chat_template(messages, chat_template=chat_templates.builtin_template(name), tokenize=False) == RENDERED[name]


CALLED = {
    "llama3": ['{"name": "get_weather", "parameters": ' + json.dumps(ARGUMENTS, ensure_ascii=False) + "}<|eot_id|>", "", "<|eot_id|>"],
    "mistral": [
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": ' + json.dumps(ARGUMENTS, ensure_ascii=False) + ', "id": "abcdefghi"}]</s>',
        " ",
        "</s>",
    ],
    "qwen_25": [
        '<tool_call>\n{"name": "get_weather", "arguments": ' + json.dumps(ARGUMENTS, ensure_ascii=False) + "}\n</tool_call><|im_end|>",
        "",
        "<|im_end|>",
    ],
    "qwen3_5": [
        '<tool_call>\n<function=get_weather>\n<parameter=city>\nPar"is\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=deep>\n'
        '{"list": ["é\\n", true]}\n</parameter>\n</function>\n</tool_call><|im_end|>',
        "",
        "<|im_end|>",
    ],
}
CALLED["qwen3"] = CALLED["qwen_25"]


@pytest.mark.parametrize("name", CALLED)
def test_tool_calls(name, tokenizer):
    first, before, close = CALLED[name]
    wanted = [first, before + "It is 20." + close, THINKS.get(name, before) + "see you" + close]
    row = {"messages": tooled(content=""), "tools": TOOLS}
    assert runs(row, tokenizer, chat_template=name) == wanted
    reference = tokenizer.apply_chat_template(row["messages"], tools=TOOLS, chat_template=chat_templates.builtin_template(name))[
        "input_ids"
    ]
    assert ids(row, tokenizer, chat_template=name) == reference
    for same in (tooled(), tooled(json.dumps(ARGUMENTS)), tooled(content=None)):
        text = {"messages": same, "tools": json.dumps(TOOLS)}
        assert ids(text, tokenizer, chat_template=name) == reference and runs(text, tokenizer, chat_template=name) == wanted
    short = tooled()
    short[2]["tool_calls"] = json.dumps([{"name": "get_weather", "id": "abcdefghi", "arguments": ARGUMENTS}])
    assert runs({"messages": short, "tools": TOOLS}, tokenizer, chat_template=name) == wanted
    last = [f"{before}see you{close}"] if name not in THINKS else wanted[2:]
    wanted_last = [wanted[0].removesuffix(close), wanted[1].removesuffix(close), *last]
    assert runs(row, tokenizer, chat_template=name, train_on_eos="last") == wanted_last


def test_content_and_reasoning_before_a_call(tokenizer):
    messages = tooled(content="the user", reasoning_content="the quick")
    del messages[5:]
    assert runs({"messages": messages, "tools": TOOLS}, tokenizer, chat_template="qwen3")[0] == (
        '<think>\nthe quick\n</think>\n\nthe user\n<tool_call>\n{"name": "get_weather", "arguments": '
        + json.dumps(ARGUMENTS, ensure_ascii=False)
        + "}\n</tool_call><|im_end|>"
    )
    parts = [{"type": "text", "text": "hello", "train": False}, {"type": "text", "text": " the user"}]
    messages = tooled({"city": "a"}, content=parts)
    assert runs({"messages": messages, "tools": TOOLS}, tokenizer, chat_template="llama3")[0] == (
        ' the user{"name": "get_weather", "parameters": {"city": "a"}}<|eot_id|>'
    )
    messages[2] |= {"train": False}
    assert runs({"messages": messages}, tokenizer, chat_template="llama3")[0] == "It is 20.<|eot_id|>"


def test_several_calls_and_calls_without_arguments(tokenizer):
    messages = tooled()
    messages[2]["tool_calls"] = [call({}, "f_one"), call(None, "f_two"), call({"a": 1}, "f_one")]
    assert runs({"messages": messages}, tokenizer, chat_template="qwen_25")[0] == (
        '<tool_call>\n{"name": "f_one", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "f_two", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f_one", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    )


def test_calls_of_a_template_that_wants_text_arguments(tokenizer):
    """And no content where a message has only calls."""
    template = (
        "{% for m in messages %}{% if m['role'] != 'assistant' %}{{ '<|user|>' + m['content'] }}{% elif 'content' not in m %}"
        "{{ '<|assistant|>' }}{% for t in m['tool_calls'] %}{{ '<｜tool▁calls▁begin｜>' + t['function']['name'] + ' '"
        " + t['function']['arguments'] + '<｜tool▁calls▁end｜>' }}{% endfor %}{{ eos_token }}"
        "{% else %}{{ '<|assistant|>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    wanted = '<｜tool▁calls▁begin｜>get_weather {"city": "a"}<｜tool▁calls▁end｜></s>'
    for arguments in ({"city": "a"}, '{"city": "a"}'):
        assert runs({"messages": tooled(arguments)}, tokenizer, chat_template=template)[0] == wanted


def test_nulls_that_columnar_files_add_are_gone(tokenizer):
    row = {"messages": tooled({"city": "a", "days": None}), "tools": [{"type": "function", "function": WEATHER | {"strict": None}}]}
    clean = {"messages": tooled({"city": "a"}), "tools": TOOLS}
    assert ids(row, tokenizer, chat_template="qwen3") == ids(clean, tokenizer, chat_template="qwen3")


def test_where_a_template_comes_from(tokenizer, templates, tmp_path):
    row = {"messages": PLAIN}
    chatml, llama3 = (ids(row, tokenizer, chat_template=name) for name in ("chatml", "llama3"))
    file = tmp_path / "own.jinja2"
    file.write_text(templates["chatml"])
    assert ids(row, tokenizer, chat_template="tokenizer_default_fallback_llama3") == llama3
    for options in (
        {"chat_template": templates["chatml"]},
        {"chat_template_jinja": templates["chatml"]},
        {"chat_template": "jinja", "chat_template_jinja": templates["chatml"]},
        {"chat_template": str(file)},
        {"chat_template_jinja": str(file)},
    ):
        assert ids(row, tokenizer, **options) == chatml
    tokenizer.chat_template = templates["chatml"]
    for name in (None, "tokenizer_default", "tokenizer_default_fallback_llama3"):
        assert ids(row, tokenizer, chat_template=name) == chatml
    assert ids(row, tokenizer, chat_template="llama3") == llama3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the tokenizer has no chat template .*name one with chat_template"),
        ({"chat_template": "chatlm"}, "there is no chat template 'chatlm': expected tokenizer_default.*chatml"),
        ({"chat_template": "tokenizer_default_fallback_x"}, "there is no chat template 'x'"),
        ({"chat_template": "jinja"}, "chat_template_jinja is missing"),
        ({"chat_template": "chatml", "chat_template_jinja": "{{ 1 }}"}, "chat_template is 'chatml' and chat_template_jinja"),
        ({"chat_template": "none.jinja"}, "chat template file none.jinja does not exist"),
    ],
)
def test_templates_that_are_not_there(options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        ids({"messages": PLAIN}, tokenizer, **options)


def test_variables_of_a_template(tokenizer):
    row = {"messages": PLAIN}
    assert runs(row, tokenizer, chat_template="qwen3", chat_template_kwargs={"enable_thinking": False})[-1] == "It is 4.<|im_end|>"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    ],
)
def test_templates_run_in_a_sandbox(attack, tokenizer):
    with pytest.raises(ValueError, match="rows row 1: the chat template refuses this conversation"):
        ids({"messages": PLAIN}, tokenizer, chat_template=attack + chat_templates.builtin_template("chatml"))


def stock():
    """Templates that an installed TRL carries."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else None
    return sorted(folder.glob("*.jinja")) if folder else []


def stock_ids(messages, template, tokenizer, name, **options):
    """Ids of transformers. GLM ends a turn with the header of the next, so that the last one would have no end: here it has."""
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    return tokenizer(text + "<|user|>" * (name == "glm4moe"), add_special_tokens=False)["input_ids"]


TEXT_ONLY = [path for path in stock() if not path.stem.startswith(("idefics", "llava", "smolvlm"))]


@pytest.mark.more
@pytest.mark.skipif(not TEXT_ONLY, reason="TRL is not installed")
def test_stock_templates(tokenizer):
    assert len(TEXT_ONLY) >= 12
    tools = 0
    for path in TEXT_ONLY:
        template = path.read_text(encoding="utf-8")
        found = runs({"messages": PLAIN}, tokenizer, chat_template=template)
        assert len(found) == 2 and "the answer" in found[0] and "It is 4." in found[1], path.stem
        reference = stock_ids(PLAIN, template, tokenizer, path.stem)
        assert ids({"messages": PLAIN}, tokenizer, chat_template=template) == reference, path.stem
        tools += _stock_tools(template, tokenizer, path.stem)
    assert tools >= 12


@pytest.mark.skipif(not TEXT_ONLY, reason="TRL is not installed")
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_stock_templates_on_every_tokenizer(every, variants, make_tokenizer):
    """Ids are those of transformers on tokenizers that differ in BOS, EOS, pad and spaces; errors are two BOS, or its own."""
    equal, refused = 0, 0
    for turn, name in enumerate(variants):
        tokenizer = make_tokenizer(name)
        for path in TEXT_ONLY[turn % every :: every]:
            template = path.read_text(encoding="utf-8")
            try:
                found = ids({"messages": PLAIN}, tokenizer, chat_template=template)
            except ValueError as error:
                refused += 1
                if "two BOS tokens" not in str(error):
                    with pytest.raises(jinja2.TemplateError):
                        tokenizer.apply_chat_template(PLAIN, chat_template=template)
                continue
            assert found == stock_ids(PLAIN, template, tokenizer, path.stem), (name, path.stem)
            equal += 1
    assert len(variants) >= 20 and equal >= 20 * 12 // every and refused <= equal // 5, (equal, refused)


# What TRL trains too, though the prompt has it, or though it stands behind the end of the turn.
GIVEN = ("", "<｜Assistant｜>", "<|start|>assistant", "<think>", "<think></think>", "<think>\n\n</think>")
MARKED = [path for path in TEXT_ONLY if path.stem.endswith("_training") and path.stem != "diffusion_gemma_training"]


@pytest.mark.skipif(not MARKED, reason="TRL is not installed")
def test_what_is_trained_is_what_trl_marks(tokenizer):
    """Copies of stock templates in which TRL marks by hand what the assistant writes: the same texts, but for the header before them."""
    compared = 0
    for path in MARKED:
        template = path.read_text(encoding="utf-8")
        for messages in (PLAIN, talk(("system", "Be brief.")) + PLAIN, PLAIN[:2]):
            try:
                marked = tokenizer.apply_chat_template(
                    messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
                )
            except jinja2.TemplateError:
                continue
            cuts = np.split(np.arange(len(marked["input_ids"])), np.flatnonzero(np.diff(marked["assistant_masks"])) + 1)
            theirs = [tokenizer.decode(np.array(marked["input_ids"])[cut]).rstrip() for cut in cuts if marked["assistant_masks"][cut[0]]]
            theirs = [text.removesuffix("</s>").rstrip() if "phi3" in path.stem else text for text in theirs]
            ours = [text.rstrip() for text in runs({"messages": messages}, tokenizer, chat_template=template)]
            assert len(ours) == len(theirs) == len(messages) // 2, (path.stem, theirs, ours)
            for one, other in zip(ours, theirs, strict=True):
                assert other.endswith(one) and other.removesuffix(one).strip() in GIVEN, (path.stem, one, other)
                compared += 1
    assert compared >= 100


def _stock_tools(template, tokenizer, name):
    """1 if the template renders tools, and does so with the right ids and masks."""
    row = {"messages": tooled({"city": "Paris"}, content=""), "tools": TOOLS}
    try:
        found = runs(row, tokenizer, chat_template=template)
    except ValueError as error:
        assert any(text in str(error) for text in ("refuses", "not rendered", "leaves out", "in pieces", "not known")), (name, error)
        return 0
    reference = stock_ids(row["messages"], template, tokenizer, name, tools=TOOLS)
    assert ids(row, tokenizer, chat_template=template) == reference, name
    assert len(found) == 3 and "get_weather" in found[0] and "Paris" in found[0], (name, found)
    assert "It is 20." in found[1] and "see you" in found[2] and "weather?" not in "".join(found), (name, found)
    return 1
