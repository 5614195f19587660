"""Conversations: a column of messages, perhaps with tools, through a chat template.

What is trained of a message is what the speaker produces: everything after the generation prompt, tool calls included, up to and with
the end-of-turn token. A message's own flag decides whether it is trained, else its role; parts of its content may decide for themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

from treetune.core.data import chat_templates, conversations, sources, spans, templates
from treetune.core.data.rows import Message, Row
from treetune.core.protocols import Tokenizer

EOS = ("turn", "all", "last")
SPACES = (" ", "\t")
INSTRUCTING = ("system", "developer")
READ = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "id")  # of a message; ids only link calls and answers


class MaskOptions(NamedTuple):
    """Options that decide which tokens of a conversation are trained."""

    roles: tuple[str, ...] | None  # None: the last message
    eos: str
    whole: bool


class WeightedSpan(NamedTuple):
    """Characters [begin, end) of one content, and their weight."""

    begin: int
    end: int
    weight: float


class MessageMask(NamedTuple):
    """Weight of a message, and the characters of its contents that have another one."""

    weight: float
    parts: dict[str, list[WeightedSpan]]
    spaces: int  # borders between parts right after a space

    @property
    def trained(self) -> float:
        """The message's weight, or else the last weight above 0 of its parts; 0 when nothing is trained."""
        return self.weight or next((part.weight for parts in reversed(self.parts.values()) for part in reversed(parts) if part.weight), 0.0)


def reader(
    tokenizer: Tokenizer,
    *,
    chat_template: str | None = None,
    chat_template_jinja: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    roles_to_train: Sequence[str] | None = ("assistant",),
    train_on_eos: str | None = "turn",
    train_on_inputs: bool = False,
    default_system_message: str | None = None,
    **field_options: Unpack[conversations.FieldOptions],
) -> Callable[[sources.Rows], list[spans.Text]]:
    """Reader of conversations: rows to texts with the turns to train.

    chat_template: as `chat_templates.resolve` takes it; chat_template_kwargs: variables for it, such as enable_thinking.
    roles_to_train: None for the last message only. train_on_eos: end-of-turn tokens of the trained turns, of all turns, or of the
    last turn of the conversation only. train_on_inputs: every token, headers too, except where a flag says otherwise.
    message_property_mappings: what a template wants -> what the message calls it; roles: role -> names that it has in the rows.
    message_field_training, message_field_training_detail: a message's flag, and its characters to train, both ends inclusive.
    split_thinking: move the text between reasoning tags to reasoning_content. drop_system_message: leave out that of the row.
    default_system_message: put before conversations without a system message; trained if roles_to_train says so.
    Errors: ValueError without a template, for options that contradict each other, and for malformed rows (named with their fields).
    """
    options = _mask_options(roles_to_train, train_on_eos, train_on_inputs)
    fields = conversations.message_fields(
        **field_options,
        extra_roles=lambda role: role in (options.roles or ()) or chat_templates.names_role(template, role),
    )
    template = chat_templates.template_source(tokenizer, chat_template, chat_template_jinja)
    render = chat_templates.renderer(tokenizer, chat_template, chat_template_jinja, chat_template_kwargs or {})
    find_layout = templates.layout_cache(render, getattr(tokenizer, "eos_token", None) or "")
    style_calls = chat_templates.tool_call_style(render)

    def read(rows: sources.Rows) -> list[spans.Text]:
        talks = [conversations.read_conversation(row, sources.locate_row(rows, i), fields) for i, row in enumerate(rows.rows)]
        talks = [style_calls(_add_default_system(talk, default_system_message)) for talk in talks]
        locations = [sources.locate_row(rows, i) for i in range(len(talks))]
        rendered = [_render(talk, location, render) for talk, location in zip(talks, locations, strict=True)]
        texts = [_text(*parts, options, find_layout) for parts in zip(talks, rendered, locations, strict=True)]
        return [text._replace(unread=_unread(talk, template)) for text, talk in zip(texts, talks, strict=True)]

    return read


def _unread(talk: conversations.Conversation, source: str) -> tuple[str, ...]:
    """Fields of the messages that neither this code nor the template reads."""
    names = dict.fromkeys(name for message in talk.messages for name, value in message.items() if value not in ("", [], {}))
    return tuple(f"{name} (of messages)" for name in names if name not in READ and not chat_templates.mentions(source, name))


def _add_default_system(talk: conversations.Conversation, system: str | None) -> conversations.Conversation:
    """The conversation with the default system message first, unless it has a system message."""
    if not system or any(message["role"] == "system" for message in talk.messages):
        return talk
    first = {"role": "system", "content": system}
    return talk._replace(messages=[first, *talk.messages], flags=[conversations.TrainFlags(None, {}), *talk.flags])


def read_messages(row: Row, location: str) -> list[Message]:
    """The row's messages with `role` and `content`, checked. Errors: ValueError naming row, message, field and what is there."""
    return conversations.read_conversation(row, location).messages


def _mask_options(roles_to_train: Sequence[str] | None, train_on_eos: str | None, train_on_inputs: bool) -> MaskOptions:
    eos = "turn" if train_on_eos is None else train_on_eos
    if eos not in EOS:
        raise ValueError(f"train_on_eos is {train_on_eos!r}: expected one of {', '.join(EOS)}")
    if isinstance(roles_to_train, str):
        raise ValueError(f"roles_to_train is the text {roles_to_train!r}: expected a list of roles")
    roles = None if roles_to_train is None else tuple(roles_to_train)
    if train_on_inputs and (roles != ("assistant",) or eos != "turn"):
        raise ValueError("train_on_inputs trains every token already: leave roles_to_train and train_on_eos at their defaults")
    return MaskOptions(roles, eos, train_on_inputs)


def _text(
    talk: conversations.Conversation, rendered: str, location: str, options: MaskOptions, find_layout: templates.FindLayout
) -> spans.Text:
    masks = [
        _message_mask(message, flags, options, last=i + 1 == len(talk.messages))
        for i, (message, flags) in enumerate(_flagged_messages(talk))
    ]
    if not any(mask.trained for mask in masks):
        return spans.Text(rendered, ())
    whole_text = options.whole and all(mask.weight == 1.0 and not mask.parts for mask in masks)
    try:
        needed = options.whole or options.eos == "all"
        layout, piece_spans = _find_pieces(rendered, talk, [mask.trained for mask in masks], needed, find_layout, location)
    except ValueError:
        if whole_text:  # the mask does not depend on what the template writes where
            return spans.Text(rendered, (), whole=True)
        raise
    _check_tools(talk, layout, location)
    rendered += layout.ending
    message_spans = templates.message_spans(piece_spans, layout)
    turns = () if whole_text else _turns(rendered, talk, masks, message_spans, piece_spans, layout, options, location)
    cut, spaces = sum(masks[i].trained > 0 for i in layout.cut), sum(mask.spaces for mask in masks)
    return spans.Text(rendered, turns, options.whole, None, cut, spaces, _speakers(talk, message_spans))


def _flagged_messages(talk: conversations.Conversation) -> list[tuple[dict, conversations.TrainFlags]]:
    return list(zip(talk.messages, talk.flags, strict=True))


def _message_mask(message: Message, flags: conversations.TrainFlags, options: MaskOptions, *, last: bool) -> MessageMask:
    chosen = options.whole or (last if options.roles is None else message["role"] in options.roles)
    weight = flags.weight if flags.weight is not None else float(chosen)
    if not flags.parts:
        return MessageMask(weight, {}, 0)
    parts = {
        field: _cover_content(flags.parts.get(field, ()), message[field], weight) for field in conversations.CONTENTS if message.get(field)
    }
    weights = {part.weight for weighted in parts.values() for part in weighted} | ({weight} if message.get("tool_calls") else set())
    if len(weights) == 1:
        return MessageMask(weights.pop(), {}, 0)
    spaces = sum(message[field][part.end - 1] in SPACES for field, weighted in parts.items() for part in weighted[:-1])
    return MessageMask(weight, {field: [part for part in weighted if part.weight != weight] for field, weighted in parts.items()}, spaces)


def _cover_content(parts: Sequence[conversations.ContentSpan], content: str, weight: float) -> list[WeightedSpan]:
    """Parts that cover the whole content, neighbours of equal weight joined; characters outside the given parts have `weight`."""
    merged: list[WeightedSpan] = []
    bounds = zip([0, *(part.end for part in parts)], [*(part.begin for part in parts), len(content)], strict=True)
    gaps = [WeightedSpan(begin, end, weight) for begin, end in bounds]
    resolved = [WeightedSpan(part.begin, part.end, weight if part.weight is None else part.weight) for part in parts]
    for part in sorted([*resolved, *gaps], key=lambda part: part[:2]):
        if part.end == part.begin:
            continue
        if merged and merged[-1].weight == part.weight:
            merged[-1] = merged[-1]._replace(end=part.end)
        else:
            merged.append(part)
    return merged


def _check_tools(talk: conversations.Conversation, layout: templates.TemplateLayout, location: str) -> None:
    for tool in talk.tools or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and not any(name in static for static in layout.statics):
            fix = "use a chat template that renders tools, or set field_tools to null"
            raise ValueError(f"{location}: the chat template leaves out the tool {name!r}: {fix}")


def _find_pieces(
    text: str, talk: conversations.Conversation, trained: list[float], needed: bool, find_layout: templates.FindLayout, location: str
) -> tuple[templates.TemplateLayout, list[templates.PieceSpan]]:
    """Layout of the conversation, and the characters of its pieces in the text. needed: also those of messages that are not trained.

    Errors: ValueError for a message that the template leaves out, a trained one in pieces, or a text that the layout does not fit.
    """
    problems: list[ValueError] = []
    for literal in _literal_messages(talk, trained, needed):
        layout = None
        try:
            layout = find_layout(talk.messages, talk.tools, literal=literal)
            piece_spans = templates.find_pieces(text + layout.ending, talk.messages, layout)
        except ValueError as error:
            problems.append(error)
            if layout is not None and templates.MISSING in layout.places.values():
                break  # among the template's own text nobody would miss the message
            continue
        _check_places(talk, layout, trained, location)
        return layout, piece_spans
    raise ValueError(f"{location}: {problems[0]}, so the trained span is not known: use another chat template") from problems[0]


def _literal_messages(talk: conversations.Conversation, trained: list[float], needed: bool) -> dict[tuple[int, ...], None]:
    """Messages whose contents stand for themselves in the layout: none, else those that a template may look into."""
    # Some look for /no_think in the system message, for tags of tools in the user's. No conversation but this one has such a layout.
    silent = () if needed else tuple(i for i, weight in enumerate(trained) if not weight)
    return dict.fromkeys([(), tuple(i for i in silent if talk.messages[i]["role"] in INSTRUCTING), silent])


def _check_places(talk: conversations.Conversation, layout: templates.TemplateLayout, trained: list[float], location: str) -> None:
    for i, place in layout.places.items():
        if place == templates.MISSING or isinstance(place, str) and trained[i] > 0:
            role = talk.messages[i]["role"]
            raise ValueError(
                f"{location}: message {i + 1} (role {role!r}) {place} by the chat template: use another one, or change the role"
            )
    for i in layout.lost:
        raise ValueError(f"{location}: the chat template leaves out tool calls of message {i + 1}: use one that renders them")


def _turns(
    text: str,
    talk: conversations.Conversation,
    masks: list[MessageMask],
    message_spans: dict[int, templates.MessageSpan],
    piece_spans: list[templates.PieceSpan],
    layout: templates.TemplateLayout,
    options: MaskOptions,
    location: str,
) -> tuple[spans.Turn, ...]:
    turns = []
    for i, span in message_spans.items():
        mask, close = masks[i], _close(i, masks, options.eos)
        if mask.weight != 1.0 or mask.parts if options.whole else mask.trained > 0 or close > 0:
            pieces = _pieces(text, i, talk.messages[i], mask, piece_spans, layout, location) if mask.parts else ()
            slot = layout.places[i]
            assert isinstance(slot, templates.MessageSlot)  # messages without one have no span
            turns.append(spans.Turn(*span, mask.weight, close, pieces, slot.calls))
    return tuple(turns)


def _close(i: int, masks: list[MessageMask], train_on_eos: str) -> float:
    """Weight of the end-of-turn token of message `i`."""
    if train_on_eos == "last" and i + 1 < len(masks):
        return 0.0
    return masks[i].trained if masks[i].trained > 0 or train_on_eos == "turn" else 1.0


def _pieces(
    text: str,
    i: int,
    message: Message,
    mask: MessageMask,
    piece_spans: list[templates.PieceSpan],
    layout: templates.TemplateLayout,
    location: str,
) -> tuple[spans.Piece, ...]:
    """The message's parts as characters of the text."""
    pieces = []
    for number, field in enumerate(templates.FIELDS):
        parts = mask.parts.get(field)
        if not parts:
            continue
        try:
            run = templates.find_run(text, i, number, message[field], piece_spans, layout)
        except ValueError as error:
            fix = "use a chat template that keeps it as it is, or put reasoning in reasoning_content"
            raise ValueError(
                f"{location}: {field} of message {i + 1} has parts of different weight, but the template {error}: {fix}"
            ) from error
        pieces += [_piece(part, run, len(message[field])) for part in parts if part.begin < run.last and part.end > run.first]
    return tuple(sorted(piece for piece in pieces if piece.begin < piece.end))


def _piece(part: WeightedSpan, run: templates.ContentRun, size: int) -> spans.Piece:
    """Characters of a part in the text; the template may have stripped blanks at the ends of the content."""
    shift = run.start - run.first
    begin = run.begin if part.begin <= run.first else max(run.begin, part.begin + shift)
    end = run.end if part.end >= run.last else min(run.end, part.end + shift)
    return spans.Piece(begin, end, part.weight)


def _speakers(talk: conversations.Conversation, message_spans: dict[int, templates.MessageSpan]) -> tuple[spans.Speaker, ...]:
    """Characters of the text by role: contents, and what closes them."""
    ordered = sorted((span.begin, max(span.end, span.tail), talk.messages[i]["role"]) for i, span in message_spans.items())
    limits = [begin for begin, _, _ in ordered[1:]] + [ordered[-1][1]] if ordered else []
    return tuple(spans.Speaker(begin, min(end, limit), role) for (begin, end, role), limit in zip(ordered, limits, strict=True))


def _render(talk: conversations.Conversation, location: str, render: templates.Render) -> str:
    try:
        return render(talk.messages, tools=talk.tools)
    except ValueError as error:
        raise ValueError(
            f"{location}: {error}; its roles are {sources.join_names(message['role'] for message in talk.messages)}"
        ) from error
