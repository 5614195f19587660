"""Ollama's TEMPLATE against the Jinja template that it is made of, and the part of Go's templates that it is rendered with."""

import pytest

from treetune.core.data import chat_templates, go_template, ollama

# As Ollama's own library has it for Llama 3, trim markers and else-branches included.
LLAMA3 = """{{- if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>
{{- end }}
{{- range .Messages }}
{{- if ne .Role "system" }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>
{{- end }}
{{- end }}<|start_header_id|>assistant<|end_header_id|>

"""
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi\n\n{{ you }}"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "3 < 4?"},
]


class Special:
    special_tokens_map = {"bos_token": "<s>", "eos_token": "</s>"}
    chat_template = None


def jinja(name):
    return chat_templates.renderer(Special(), name, None, {})


@pytest.mark.parametrize(
    "text,wanted",
    [
        ('{{ if eq .A "x" "y" }}1{{ else if not .B }}2{{ else }}3{{ end }}', "1"),
        ('{{ if eq .A "z" }}1{{ else if .B }}2{{ else }}3{{ end }}', "3"),
        ('{{ if and .A (not .B) }}{{ "a\\n" }}{{ `b\\n` }}{{ end }}!', "a\nb\\n!"),
        ("a  \n{{- .A -}}\n  b{{/* nothing */}} {{ $.L }}", "ayb [1, 2]"),
        ("{{ range .L }}<{{ . }}{{ $.A }}>{{ end }}{{ range .None }}never{{ end }}", "<1y><2y>"),
        ("{{ or .B .A }}{{ len .L }}{{ true }}", "y2true"),
    ],
)
def test_go_templates(text, wanted):
    assert go_template.render(text, {"A": "y", "B": "", "L": [1, 2]}) == wanted


@pytest.mark.parametrize(
    "text", ["{{ if .A }}", "{{ end }}", "{{ range .A }}x", "{{ template }}", "{{ if .A }}1{{ else }}2", "{{ (.A }}", "{{ .A .B }}"]
)
def test_what_is_no_such_template_is_refused(text):
    with pytest.raises(ValueError, match="the template has|is not of the part"):
        go_template.render(text, {"A": ""})


def test_a_template_of_ollama_itself_renders_as_llama3():
    assert "<s>" + go_template.render(LLAMA3, ollama.data(TALK)) == jinja("llama3")(TALK, add_generation_prompt=True)


REGULAR = ("chatml", "llama3", "llama4", "qwen3", "qwen_25", "phi_4", "zephyr", "deepseek_v3")


@pytest.mark.parametrize("name", chat_templates.builtin_names())
def test_a_template_is_made_where_it_renders_the_same(name):
    render = jinja(name)
    made = ollama.template(render, bos="<s>")
    assert (made.text is not None) == (made.reason == "") and (made.text is not None or name not in REGULAR)
    assert made.ending.strip()
    if made.text is not None:
        wanted = render(TALK, add_generation_prompt=True).removeprefix("<s>")
        assert go_template.render(made.text, ollama.data(TALK)) == wanted and "<s>" not in made.text
        alone = render(TALK[1:2], add_generation_prompt=True).removeprefix("<s>")
        assert go_template.render(made.text, ollama.data(TALK[1:2])) == alone


@pytest.mark.parametrize(
    "template,reason",
    [
        ("{% for m in messages %}{{ loop.index }}: {{ m.content }};{% endfor %}", "depend on"),
        ("{% for m in messages %}[{{ m.content | upper }}]{% endfor %}", "does not write the contents of user, assistant once"),
        ("{% for m in messages %}{% if m.role != 'system' %}[{{ m.content }}]{% endif %}{% endfor %}", "the contents of system, user"),
        ("{% for m in messages %}[{{ m.content }}{% if m.content | length > 20 %}!{% endif %}]{% endfor %}", "depend on their contents"),
        ("{% for m in messages %}{{ '{{' }}{{ m.content }}{% endfor %}", "cannot hold"),
        ('{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}{% if add_generation_prompt %}["{% endif %}', "cannot hold"),
    ],
)
def test_an_irregular_template_is_not_made(template, reason):
    made = ollama.template(jinja(template))
    assert made.text is None and reason in made.reason


def test_the_modelfile_names_file_template_and_ends():
    text = ollama.modelfile("m.gguf", "a\n", ["<|im_end|>", "</s>"])
    assert text == 'FROM ./m.gguf\nTEMPLATE """a\n"""\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n'
    assert ollama.modelfile("m.gguf", None, []) == "FROM ./m.gguf\n"
