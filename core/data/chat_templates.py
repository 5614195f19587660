"""Chat templates: resolving the one that the options name, and rendering with it in transformers' sandbox.

The named ones are files of `jinja/`: the conversation formats of the model families, written for text, tools and reasoning.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from treetune.core.data import bounded_jinja, conversations, templates
from treetune.core.data.rows import Message
from treetune.core.protocols import Tokenizer

FOLDER = Path(__file__).parent / "jinja"
OWN, FALLBACK, INLINE = "tokenizer_default", "tokenizer_default_fallback_", "jinja"
FAILS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError, RuntimeError)
SUFFIXES = (".jinja", ".jinja2")
PROBE = "Pz3kQwJ"
FIX = "name one with chat_template, use a model whose tokenizer has one, or train on text or alpaca rows"


class TemplateOptions(TypedDict, total=False):
    """The documented options that choose a chat template, see `resolve`, and the variables that it gets."""

    chat_template: str | None
    chat_template_jinja: str | None
    chat_template_kwargs: Mapping[str, Any] | None


class CallStyle(NamedTuple):
    """How a template takes tool calls: the content of a message without any, and whether arguments are JSON text."""

    empty: dict[str, str | None]
    as_text: bool


NO_CONTENT: tuple[dict[str, str | None], ...] = ({"content": ""}, {}, {"content": None})


@cache
def builtin_template(name: str) -> str:
    """Jinja text of a built-in template. Errors: ValueError listing the names."""
    if name not in builtin_names():
        raise ValueError(
            f"there is no chat template {name!r}: expected {OWN}, {FALLBACK}NAME, {INLINE}, a .jinja file, or {', '.join(builtin_names())}"
        )
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


@cache
def builtin_names() -> tuple[str, ...]:
    """Names of the built-in templates."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))


def resolve(tokenizer: Tokenizer, chat_template: str | None = None, chat_template_jinja: str | None = None) -> str | None:
    """Jinja text of the template that the options name; None for the tokenizer's own.

    chat_template: "tokenizer_default" (the default), "tokenizer_default_fallback_NAME", a built-in name, "jinja", a .jinja or .jinja2
    file, the name of one of several templates of the tokenizer, or Jinja text. chat_template_jinja: Jinja text or a file; implies "jinja".
    Errors: ValueError for unknown names, missing files, a tokenizer without a template, and options that contradict each other.
    """
    if chat_template_jinja is not None:
        if chat_template not in (None, INLINE):
            raise ValueError(f"chat_template is {chat_template!r} and chat_template_jinja is given too: leave one out")
        return _text(chat_template_jinja)
    if chat_template == INLINE:
        raise ValueError("chat_template is jinja, but chat_template_jinja is missing: put the Jinja text or a .jinja file there")
    tokenizer_template = getattr(tokenizer, "chat_template", None)
    if chat_template in (None, OWN):
        if not tokenizer_template:
            raise ValueError(f"the tokenizer has no chat template ({type(tokenizer).__name__}): {FIX}")
        return None
    if chat_template.startswith(FALLBACK):
        fallback = builtin_template(chat_template.removeprefix(FALLBACK))
        return None if tokenizer_template else fallback
    if isinstance(tokenizer_template, dict) and chat_template in tokenizer_template:
        return tokenizer_template[chat_template]
    return _text(chat_template)


def template_source(tokenizer: Tokenizer, chat_template: str | None = None, chat_template_jinja: str | None = None) -> str:
    """The text of the template that the options name, or of all templates of the tokenizer where it has several. Errors: as `resolve`."""
    tokenizer_template = getattr(tokenizer, "chat_template", None)
    text = resolve(tokenizer, chat_template, chat_template_jinja)
    if text is not None:
        return text
    return "\n".join(tokenizer_template.values()) if isinstance(tokenizer_template, dict) else str(tokenizer_template)


@lru_cache(1024)
def mentions(source: str, name: str) -> bool:
    """Whether a template has this name anywhere, as a whole word."""
    return bool(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", source))


@lru_cache(1024)
def names_role(source: str, text: str) -> bool:
    """Whether a template has this text in quotes, as it would to compare a role with it."""
    return f"'{text}'" in source or f'"{text}"' in source


def writes_date(source: str) -> bool:
    """Whether a template may write the date."""
    return mentions(source, "strftime_now")


def _text(template: str) -> str:
    """Jinja text as it is, of a file, or of a name."""
    if "{" in template:
        return template
    if not template.endswith(SUFFIXES):
        return builtin_template(template)
    if not Path(template).is_file():
        raise ValueError(f"chat template file {template} does not exist")
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat template file {template} is not readable as UTF-8 text ({error})") from error


def renderer(
    tokenizer: Tokenizer, chat_template: str | None, chat_template_jinja: str | None, kwargs: Mapping[str, Any]
) -> templates.Render:
    """Function that renders as apply_chat_template does without tokenising, within limits. Errors of the template become ValueError."""
    text = resolve(tokenizer, chat_template, chat_template_jinja)

    def render(messages: Sequence[Message], *, tools: templates.Tools = None, add_generation_prompt: bool = False) -> str:
        try:
            template = text or tokenizer.get_chat_template(None, tools=tools)
            variables = {
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **tokenizer.special_tokens_map,
                **kwargs,
            }
            return bounded_jinja.render(template, messages, **variables)
        except bounded_jinja.TemplateLimitError as error:
            raise ValueError(f"the chat template is not run to its end: {error}") from error
        # Templates are programs: whatever Python can raise in an expression comes out of one for the wrong conversation.
        except FAILS as error:
            raise ValueError(f"the chat template refuses this conversation ({(str(error).splitlines() or [''])[0][:300]})") from error

    return render


def tool_call_style(render: templates.Render) -> Callable[[conversations.Conversation], conversations.Conversation]:
    """A function that writes tool calls as this template takes them: arguments as object or text, no content as "", null or no field."""
    # Templates do not say how they take tool calls: one concatenates the arguments, another runs tojson over them, a third asks
    # whether there is content, or whether it is none. The first conversation with a call tries the ways out.
    cached: list[CallStyle] = []

    def style(talk: conversations.Conversation) -> conversations.Conversation:
        if not any("tool_calls" in message for message in talk.messages):
            return talk
        if not cached:
            cached.append(_probe(render))
        return talk._replace(messages=[_styled(message, cached[0]) for message in talk.messages])

    return style


def _probe(render: templates.Render) -> CallStyle:
    """The first style that the template renders."""
    function = {"name": f"{PROBE}name", "arguments": {f"{PROBE}key": f"{PROBE}value"}}
    call = {"role": "assistant", "tool_calls": [{"type": "function", "id": "abcdefghi", "function": function}]}
    candidates = [CallStyle(empty, as_text) for empty in NO_CONTENT for as_text in (False, True)]
    for candidate in candidates:
        # A template may render a call that it does not understand without complaint, so the call must also be in the text.
        try:
            text = render([{"role": "user", "content": "a"}, _styled(call, candidate)])
        except ValueError:
            continue
        if all(PROBE + part in text for part in ("name", "key", "value")):
            return candidate
    return candidates[0]


def _styled(message: Message, style: CallStyle) -> dict:
    if "tool_calls" not in message:
        return message
    calls = [_as_text(call) for call in message["tool_calls"]] if style.as_text else message["tool_calls"]
    content = {"content": message["content"]} if message.get("content") else style.empty
    rest = {key: value for key, value in message.items() if key != "content"}
    return rest | content | {"tool_calls": calls}


def _as_text(call: dict) -> dict:
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
