"""Templates that loop or grow without end stop with one line; all others render as transformers renders them."""

import pytest

from treetune.core.data import bounded_jinja, chat, chat_templates, sources

TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": {"a": 1}}}
LONG = [
    {"role": "system", "content": "brief"}, {"role": "user", "content": "é 日"},
    {"role": "assistant", "content": "x", "reasoning_content": "thoughts"}, {"role": "user", "content": "more", "name": None},
    {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "7", "name": "f", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "end"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}]
NS = "{% set ns = namespace(x='a') %}{% for i in range(100) %}"
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a text": "{% for i in range(99999) %}{% for j in 'x' * 60000 %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}
LARGE = {
    "product": "{{ 'x' * 10 ** 10 }}",
    "list": "{{ [1] * 10 ** 10 }}",
    "sum": NS + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "concatenation": NS + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "block": NS + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    "width": "{{ 'x'.ljust(10 ** 10) }}",
    "filter": "{{ 'x' | center(10 ** 10) }}",
    "indent": "{{ [1] | tojson(indent=10 ** 10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "star": "{{ '%*d' % (10 ** 10, 1) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "nested format": "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "replace": "{{ ('x' * 60000) | replace('x', 'y' * 60000) }}",
    "join": "{{ range(60000) | join('x' * 60000) }}",
    "batch": "{{ [1] | batch(10 ** 10, 0) | list }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_templates(name, monkeypatch):
    monkeypatch.setattr(bounded_jinja, "SECONDS", 0.05)
    with pytest.raises(bounded_jinja.TemplateLimitError, match="it loops too often"):
        bounded_jinja.render(ENDLESS[name], TALK)


@pytest.mark.parametrize("name", LARGE)
def test_large_values(name, monkeypatch):
    monkeypatch.setattr(bounded_jinja, "LARGEST", 1 << 20)
    with pytest.raises(bounded_jinja.TemplateLimitError, match="characters or items, more than"):
        bounded_jinja.render(LARGE[name], TALK)


def test_a_row_names_the_template(tokenizer):
    tokenizer.chat_template = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    rows = sources.from_list([{"messages": TALK}], "data.jsonl")
    with pytest.raises(ValueError, match="^data.jsonl row 1: the chat template refuses this conversation .maximum recursion depth"):
        chat.reader(tokenizer)(rows)
    tokenizer.chat_template = LARGE["product"]
    with pytest.raises(ValueError, match="^data.jsonl row 1: the chat template is not run to its end: it makes a value of 10000000000"):
        chat.reader(tokenizer)(rows)


@pytest.mark.parametrize("name", chat_templates.builtin_names())
def test_others_render_as_ever(name, tokenizer):
    def outcome(call):
        try:
            return call()
        except Exception as error:  # a template may refuse: both then do
            return str(error)

    for talk in (LONG, LONG[:3], TALK):
        for tools in (None, TOOLS):
            given = {"tools": tools, "add_generation_prompt": len(talk) == 3}
            theirs = outcome(
                lambda talk=talk, given=given: tokenizer.apply_chat_template(
                    talk, chat_template=chat_templates.builtin_template(name), tokenize=False, **given
                )
            )
            given |= {"documents": None, **tokenizer.special_tokens_map}
            assert (
                outcome(lambda talk=talk, given=given: bounded_jinja.render(chat_templates.builtin_template(name), talk, **given)) == theirs
            )
