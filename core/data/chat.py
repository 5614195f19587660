"""Conversations: a `messages` column (role, content) or a `conversations` column (also from, value), through a chat template.

A message is trained when its `train` flag says so, else when its `weight` is above 0, else when its role is in `roles_to_train`.
What is trained of it is what the speaker produces: everything after the generation prompt, up to and with the end-of-turn token.
"""

from collections.abc import Callable, Sequence

from treetune.core.data import sources, spans, templates

FIELDS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}
NAMES = ("role", "content", "from", "value")
FLAGS = ("train", "weight")  # kept from the template; keys other than these go to it as they are
MAX_WEIGHT = 1e6
EOS = ("turn", "all", "last")
TOOLS = ("tool_calls", "function_call", "tools", "functions")


def reader(
    tokenizer,
    *,
    chat_template: str | None = None,
    template_kwargs: dict | None = None,
    roles_to_train: Sequence[str] = ("assistant",),
    train_on_eos: str = "turn",
    train_on_inputs: bool = False,
) -> Callable[[sources.Rows], list[spans.Text]]:
    """A function from rows to texts with the turns to train.

    chat_template: Jinja text in place of the tokenizer's own; template_kwargs: variables for it, such as enable_thinking.
    train_on_eos: end-of-turn tokens of the trained turns, of all turns, or of the last turn of the conversation only.
    train_on_inputs: every token, headers too, except messages whose own flag says otherwise.
    Errors: ValueError without a template, for options that contradict each other, and for malformed rows (named with their fields).
    """
    if train_on_eos not in EOS:
        raise ValueError(f"train_on_eos is {train_on_eos!r}: expected one of {', '.join(EOS)}")
    if isinstance(roles_to_train, str):
        raise ValueError(f"roles_to_train is the text {roles_to_train!r}: expected a list of roles")
    if train_on_inputs and (tuple(roles_to_train) != ("assistant",) or train_on_eos != "turn"):
        raise ValueError("train_on_inputs trains every token already: leave roles_to_train and train_on_eos at their defaults")
    render = _renderer(tokenizer, chat_template, template_kwargs or {})
    layout = templates.layouts(render)

    def read(rows: sources.Rows) -> list[spans.Text]:
        talks = [conversation(row, sources.where(rows, i)) for i, row in enumerate(rows.rows)]
        bare = [[{key: value for key, value in message.items() if key not in FLAGS} for message in talk] for talk in talks]
        return [text(talks[i], bare[i], rendered, sources.where(rows, i)) for i, rendered in enumerate(_render_all(bare, rows, render))]

    def text(talk: list[dict], bare: list[dict], rendered: str, where: str) -> spans.Text:
        weights = [_weight(message, roles_to_train, train_on_inputs) for message in talk]
        if not any(weights):
            return spans.Text(rendered, ())
        if train_on_inputs and all(weight == 1.0 for weight in weights):
            return spans.Text(rendered, (), whole=True)
        shape, found = _locate(rendered, bare, weights, layout, where)
        turns = _turns(found, weights, train_on_eos, whole=train_on_inputs)
        return spans.Text(rendered, turns, whole=train_on_inputs, cut=sum(weights[i] > 0 for i in shape.cut))

    return read


def conversation(row: dict, where: str) -> list[dict]:
    """The row's messages with `role` and `content`, checked. Errors: ValueError naming row, message, field and what is there."""
    field = next((name for name in FIELDS if row.get(name) is not None), None)
    if field is None:
        raise ValueError(f"{where} has no field messages (or conversations); it has {sources.listed(row)}")
    if any(row.get(name) for name in TOOLS):
        raise ValueError(f"{where}: tool definitions are not supported; remove the column or these rows")
    messages = row[field]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: {field} is {_kind(messages)}, expected a list of messages with role and content")
    return [_message(message, f"{where}: message {i}") for i, message in enumerate(messages, 1)]


def _message(message: object, where: str) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is {_kind(message)}, expected an object with role and content")
    present = {key: value for key, value in message.items() if value is not None}
    role, content = present.get("role", present.get("from")), present.get("content", present.get("value"))
    if any(present.get(name) for name in TOOLS):
        raise ValueError(f"{where}: tool calls are not supported; remove these rows")
    for names, value in (("role (or from)", role), ("content (or value)", content)):
        if value is None:
            raise ValueError(f"{where} has no field {names}; it has {sources.listed(present)}")
        if not isinstance(value, str):
            raise ValueError(f"{where}: field {names} is {_kind(value)}, expected text")
    if not isinstance(present.get("reasoning_content", ""), str):
        raise ValueError(f"{where}: reasoning_content is {_kind(present['reasoning_content'])}, expected text")
    _check_flags(present, where)
    rest = {key: value for key, value in present.items() if key not in NAMES}
    return {"role": ROLES.get(role, role), "content": content} | rest


def _check_flags(message: dict, where: str) -> None:
    train, weight = message.get("train", True), message.get("weight", 1.0)
    if not isinstance(train, bool):
        raise ValueError(f"{where}: train is {train!r}, expected true or false")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
        raise ValueError(f"{where}: weight is {weight!r}, expected a number from 0 to {MAX_WEIGHT:g}")


def _weight(message: dict, roles_to_train: Sequence[str], train_on_inputs: bool) -> float:
    weight = float(message.get("weight", 1.0))
    if "train" in message:
        return weight if message["train"] else 0.0
    return weight if "weight" in message or train_on_inputs or message["role"] in roles_to_train else 0.0


def _locate(
    text: str, talk: list[dict], weights: list[float], layout: Callable, where: str
) -> tuple[templates.Layout, dict[int, templates.Span]]:
    """The conversation's layout, and the spans of its messages in the text.

    Errors: ValueError for a message that the template leaves out, a trained one in pieces, or a text that the layout does not fit.
    """
    try:
        shape = layout(talk)
        found = templates.locate(text, talk, shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}, so the trained span is not known: use another chat template") from error
    for i, place in shape.places.items():
        if place == templates.MISSING or isinstance(place, str) and weights[i] > 0:
            role = talk[i]["role"]
            raise ValueError(f"{where}: message {i + 1} (role {role!r}) {place} by the chat template: use another one, or change the role")
    return shape, found


def _turns(found: dict[int, templates.Span], weights: list[float], train_on_eos: str, *, whole: bool) -> tuple[spans.Turn, ...]:
    turns = []
    for i, span in found.items():
        close = _close(i, weights, train_on_eos)
        if weights[i] != 1.0 if whole else weights[i] > 0 or close > 0:
            turns.append(spans.Turn(*span, weights[i], close))
    return tuple(turns)


def _close(i: int, weights: list[float], train_on_eos: str) -> float:
    """Weight of the end-of-turn token of message `i`."""
    if train_on_eos == "last" and i + 1 < len(weights):
        return 0.0
    return weights[i] if weights[i] > 0 or train_on_eos == "turn" else 1.0


def _renderer(tokenizer, chat_template: str | None, template_kwargs: dict) -> templates.Render:
    """apply_chat_template without tokenising; whatever a template can raise becomes a ValueError."""
    import jinja2

    try:
        template = tokenizer.get_chat_template(chat_template)
    except ValueError as error:
        fix = "name one with chat_template, use a model whose tokenizer has one, or train on text or alpaca rows"
        raise ValueError(f"the tokenizer has no chat template ({type(tokenizer).__name__}): {fix}") from error

    def render(messages: list, *, add_generation_prompt: bool = False):
        try:
            return tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
            )
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise ValueError(f"the chat template refuses this conversation ({(str(error).splitlines() or [''])[0]})") from error

    return render


def _render_all(talks: list[list[dict]], rows: sources.Rows, render: templates.Render) -> list[str]:
    try:
        return render(talks)
    except ValueError:
        return [_render_one(talk, sources.where(rows, i), render) for i, talk in enumerate(talks)]


def _render_one(talk: list[dict], where: str, render: templates.Render) -> str:
    try:
        return render(talk)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; its roles are {sources.listed(message['role'] for message in talk)}") from error


def _kind(value: object) -> str:
    return "empty" if value in ([], {}, "") else f"of type {type(value).__name__}"
