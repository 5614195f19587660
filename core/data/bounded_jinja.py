"""A chat template as transformers renders it, within limits: a template comes from outside and may loop or grow without end.

Every turn of a loop and every call of a macro looks at the clock, and whatever makes a text or a list longer is measured before it is
made. The clock is the thread's own processor time, so that a machine that is busy or asleep refuses nothing.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, wraps
from typing import Any

from treetune.core.data import template_date
from treetune.core.data.rows import Message

SECONDS = 20.0  # of processor time, for one conversation
LARGEST = 1 << 26  # characters or items of one value
WIDTH = re.compile(r"\d{7,}")  # in a format, a width of millions
WIDEST = 10**6  # of a width that is an argument of a format
WIDTHS = ("ljust", "rjust", "center", "zfill", "expandtabs", "indent", "wordwrap", "tojson", "batch", "slice", "truncate", "round")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates read it under, as transformers fills them


class TemplateLimitError(ValueError):
    """A template that went past a limit."""


class RenderClock(threading.local):
    """Processor time that is left to a rendering, in each thread."""

    # A compiled template is shared by all threads that render with it, each of which renders a conversation of its own.

    def __init__(self):
        self.end = float("inf")

    def start(self) -> None:
        """Begin to count."""
        self.end = time.thread_time() + SECONDS

    def tick(self) -> str:
        """Raise TemplateLimitError when the time is over; else an empty text, which the template writes."""
        if time.thread_time() > self.end:
            raise TemplateLimitError(f"it runs for more than {SECONDS:g} seconds of processor time: it loops too often")
        return ""


def render(text: str, messages: Sequence[Message], **variables: Any) -> str:
    """Text of the conversation as the template writes it.

    Errors: TemplateLimitError for a template that goes past a limit; ValueError for what Jinja raises.
    """
    import jinja2

    try:
        return _rendered(text, messages, variables)
    except jinja2.TemplateError as error:
        raise ValueError(str(error)) from error


def _rendered(text: str, messages: Sequence[Message], variables: dict[str, Any]) -> str:
    template, budget = _compiled(text)
    budget.start()
    chat = [_aliased(_without_nulls(message)) for message in messages]
    # Piece by piece and not with `render`, which would join a text of any size before it is measured.
    pieces, size = [], 0
    for piece in template.generate(messages=chat, **variables):
        pieces.append(piece)
        size += len(piece)
        check_size(size)
    return "".join(pieces)


def check_size(size: int) -> None:
    """Raise TemplateLimitError for a value of more than LARGEST characters or items."""
    if size > LARGEST:
        raise TemplateLimitError(f"it makes a value of {size} characters or items, more than {LARGEST}")


def _without_nulls(message: Message) -> dict:
    """The message without fields that are null, but for the content beside tool calls: some templates ask whether it is none."""
    return {key: value for key, value in message.items() if value is not None or (key == "content" and message.get("tool_calls"))}


def _aliased(message: Message) -> dict:
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


@lru_cache(128)
def _compiled(text: str) -> tuple[Any, RenderClock]:
    budget = RenderClock()
    return _environment(budget).from_string(text), budget


def _environment(budget: RenderClock) -> Any:
    """Environment of transformers for chat templates, with the limits."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils import chat_template_utils

    # A template must render as transformers renders it, and the filters, globals and the generation tag that it adds are made in a
    # private function only.
    theirs = chat_template_utils._compile_jinja_template("").environment

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            return _instrument(super()._parse(source, name, filename)).set_environment(self)

        def tick(self) -> str:
            return budget.tick()

        def measured(self, *parts: Any) -> str:
            texts = [str(part) for part in parts]
            check_size(sum(map(len, texts)))
            return "".join(texts)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_size(_size_of(operator, left, right))
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            _check_call(getattr(obj, "__self__", None), getattr(obj, "__name__", ""), args, kwargs)
            result = super().call(context, obj, *args, **kwargs)
            check_size(len(result) if isinstance(result, str) else 0)  # of a macro
            return result

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            return wrapped and _checked_format(wrapped, value.__self__)

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[type(extension) for extension in theirs.extensions.values()])
    environment.filters.update(theirs.filters)
    environment.globals.update(theirs.globals)
    environment.globals.pop("lipsum", None)  # makes as much text as it is asked for
    environment.globals["strftime_now"] = template_date.strftime_now
    environment.filters["measured"] = environment.measured
    for name in {"replace", "join", "format", *WIDTHS} & environment.filters.keys():
        environment.filters[name] = _checked(environment.filters[name], name)
    return environment


def _instrument(tree: Any) -> Any:
    """The syntax tree of a template with a look at the clock in every loop and macro, and with every joined text measured."""
    from jinja2 import nodes

    # In the tree and not in the objects that a loop runs over: nested short loops, or one over a text, are seen as well.
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        node.body.insert(0, nodes.Output([nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)]))
    for node in tree.find_all(nodes.AssignBlock):
        node.filter = nodes.Filter(node.filter, "measured", [], [], None, None)
    # `~` is no operator that the sandbox intercepts, so it becomes a call.
    for node in list(tree.find_all(nodes.Concat)):
        node.nodes = [nodes.Call(nodes.EnvironmentAttribute("measured"), node.nodes, [], None, None)]
    return tree


def _size_of(operator: str, left: Any, right: Any) -> int:
    """Upper bound of the size of an operation's result; 0 for operations that give nothing large."""
    if operator == "*":
        left, right = (right, left) if isinstance(left, int) else (left, right)
        return len(left) * max(right, 0) if isinstance(left, str | list | tuple) and isinstance(right, int) else 0
    if operator == "**":
        return abs(right) * left.bit_length() if isinstance(left, int) and isinstance(right, int) else 0
    if operator == "%" and isinstance(left, str):
        return _size_of_format(left, right if isinstance(right, list | tuple) else (right,))
    return len(left) + len(right) if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple) else 0


def _check_call(value: Any, name: str, args: tuple, kwargs: dict) -> None:
    """Raise TemplateLimitError for a method of a text that would give a much longer one."""
    if not isinstance(value, str):
        return
    if name in WIDTHS:
        check_size(max((arg for arg in (*args, *kwargs.values()) if isinstance(arg, int)), default=0))
    elif name == "format":
        check_size(_size_of_format(value, (*args, *kwargs.values())))
    elif name == "replace" and len(args) > 1:
        check_size(len(value) + (value.count(str(args[0])) if args[0] else len(value) + 1) * len(str(args[1])))
    elif name == "join" and args and hasattr(args[0], "__len__"):
        check_size(len(value) * len(args[0]) + sum(len(part) for part in args[0] if isinstance(part, str)))
    elif name == "translate":
        raise TemplateLimitError("it calls translate, which is not allowed")


def _size_of_format(form: str, values: Iterable[Any]) -> int:
    """Upper bound of the length of a formatted text: every placeholder may take the longest of the values."""
    values = list(values)
    if WIDTH.search(form) or any(isinstance(value, int) and abs(value) > WIDEST for value in values) and ("*" in form or "{:" in form):
        return LARGEST + 1
    longest = max((len(value) for value in values if isinstance(value, str)), default=0)
    return len(form) + (form.count("%") + form.count("{")) * longest


def _checked_format(function: Callable, form: str) -> Callable:
    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check_size(_size_of_format(form, (*args, *kwargs.values())))
        return function(*args, **kwargs)

    return checked


def _checked(function: Any, name: str) -> Any:
    """A filter that checks its arguments first; Jinja may pass the environment or context in front of them."""
    first = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        value, rest = args[first], args[first + 1 :]
        if name == "join":
            glue = next((argument for argument in (*rest, kwargs.get("d")) if isinstance(argument, str)), "")
            _check_call(glue, name, (value,), {})
        elif name in WIDTHS:
            check_size(max((arg for arg in (*rest, *kwargs.values()) if isinstance(arg, int)), default=0))
        else:
            _check_call(value, name, rest, kwargs)
        return function(*args, **kwargs)

    return checked
