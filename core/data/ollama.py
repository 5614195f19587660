"""Ollama's Modelfile: its TEMPLATE, in Go's text/template, made from the layout of a chat template in Jinja.

What a regular template writes around the turns of a conversation does not depend on their contents: rendered with markers for contents it
falls into the head and tail of each role's turns. The Go template of these is kept if it renders the same text as the Jinja one for probe
conversations. Contents with blanks around them are left as they are, where a Jinja template may strip them; tools are not written.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from treetune.core.data import go_template
from treetune.core.data.rows import Message
from treetune.core.data.templates import Render

MARKER = "Qx7vZkW{}e"
MARKS = re.compile(r"Qx7vZkW\d+e")
QUOTE, QUOTES = '"', '"""'
PROBE = {
    "system": ("Answer briefly.", 'You are {{ kind }}, "always".\nBe exact.'),
    "user": ("What is 17 + 25?", "Zwei\n\nAbsätze {% raw %} <b>東京</b>?", "And 3 * 4?"),
    "assistant": ("42", "Ja: `x = {1: 2}`\n- eins\n- zwei", "12"),
}
SHAPES = ("u", "su", "uau", "suau", "uauau", "suauau")
ROLES = {"s": "system", "u": "user", "a": "assistant"}


class Turns(NamedTuple):
    """Text around the turns of each role, (head, tail) by role; what begins a conversation; what the assistant's next turn begins with."""

    around: dict[str, tuple[str, str]]
    lead: str  # of conversations without a system message; the head of the system message has its own
    prompt: str


class Template(NamedTuple):
    """A TEMPLATE, None where none is known to render as the chat template does, with the reason; and the text that ends an answer."""

    text: str | None
    reason: str
    ending: str


def template(render: Render, *, bos: str = "") -> Template:
    """The TEMPLATE of a chat template. bos: the token that the tokenizer begins texts with of itself, which Ollama has it write."""
    ending = ""
    try:
        ending = _cut(render, "ua", prompt=False)[-1]
        text = _text(_turns(render), bos)
        _check(text, render, bos)
    except ValueError as error:
        return Template(None, str(error), ending)
    return Template(text, "", ending)


def modelfile(file: str, template_text: str | None, stops: Iterable[str]) -> str:
    """The Modelfile of a .gguf file beside it."""
    lines = [f"FROM ./{file}"]
    if template_text is not None:
        lines.append(f"TEMPLATE {QUOTES}{template_text}{QUOTES}")
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]) + "\n"


def conversations() -> list[list[Message]]:
    """Probe conversations, which end with a question."""
    return [_conversation(shape, second) for shape in SHAPES for second in (0, 1)]


def _conversation(shape: str, first: int) -> list[Message]:
    """The contents of each role in turn, from this one on."""
    texts = {role: iter((*texts[first:], *texts[:first])) for role, texts in PROBE.items()}
    return [{"role": ROLES[letter], "content": next(texts[ROLES[letter]])} for letter in shape]


def _cut(render: Render, shape: str, *, prompt: bool = True) -> list[str]:
    """The texts before, between and after the contents of a conversation of these roles. Errors: ValueError where one is missing."""
    marks = [MARKER.format(i) for i in range(len(shape))]
    messages = [{"role": ROLES[letter], "content": mark} for letter, mark in zip(shape, marks, strict=True)]
    text = render(messages, add_generation_prompt=prompt)
    if MARKS.findall(text) != marks:
        raise ValueError(f"the chat template does not write the contents of {', '.join(ROLES[letter] for letter in shape)} once, in order")
    return MARKS.split(text)


def _turns(render: Render) -> Turns:
    lead, after = _cut(render, "u")
    _, asked, answered, _ = _cut(render, "uau")
    system, between, _ = _cut(render, "su")
    user_tail, assistant_tail = _cut(render, "u", prompt=False)[-1], _cut(render, "ua", prompt=False)[-1]
    user_head = _without(answered, assistant_tail)
    return Turns(
        {
            "system": (system, _without(between, user_head, last=True)),
            "user": (user_head, user_tail),
            "assistant": (_without(asked, user_tail), assistant_tail),
        },
        _without(lead, user_head, last=True),
        _without(after, user_tail),
    )


def _without(text: str, part: str, *, last: bool = False) -> str:
    if not (text.endswith(part) if last else text.startswith(part)):
        raise ValueError("the chat template writes turns that depend on those around them")
    return (text.removesuffix if last else text.removeprefix)(part)


def _text(turns: Turns, bos: str) -> str:
    lead, (system, system_tail) = turns.lead.removeprefix(bos), turns.around["system"]
    system = system.removeprefix(bos)
    if system.startswith(lead):
        begin, system = lead, system.removeprefix(lead)
    else:
        begin = f"{{{{ if not .System }}}}{_literal(lead)}{{{{ end }}}}"
    around = turns.around | {"system": (system, system_tail)}
    words = ("if", "else if", "else if")
    turn = "".join(
        f'{{{{ {word} eq .Role "{role}" }}}}{_literal(head)}{{{{ .Content }}}}{_literal(tail)}'
        for word, (role, (head, tail)) in zip(words, around.items(), strict=True)
    )
    text = f"{begin}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{{{{ end }}}}{_literal(turns.prompt)}"
    if text.startswith(QUOTE) or text.endswith(QUOTE):  # which would stand beside the quotes around it
        raise ValueError("the chat template writes text that a Modelfile cannot hold")
    return text


def _literal(text: str) -> str:
    """Text that stands for itself in a template in a Modelfile. Errors: ValueError where it does not."""
    if "{{" in text or QUOTES in text:
        raise ValueError("the chat template writes text that a Modelfile cannot hold")
    return text


def _check(text: str, render: Render, bos: str) -> None:
    for messages in conversations():
        wanted = render(messages, add_generation_prompt=True).removeprefix(bos)
        if go_template.render(text, data(messages)) != wanted:
            raise ValueError("the chat template writes turns that depend on their contents or place")


def data(messages: Sequence[Message]) -> dict[str, object]:
    """What Ollama gives a template of a conversation."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return {"System": system, "Messages": [{"Role": message["role"], "Content": message["content"]} for message in messages]}
