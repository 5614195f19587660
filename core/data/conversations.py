"""Rows of messages, whatever their columns are called, as a chat template takes them: checked, renamed, with the flags taken out.

A message comes out with `role`, `content` (text, or None beside tool calls), `reasoning_content`, `tool_calls`, and what else it had.
What is to be trained of it is kept apart in `TrainFlags`: a decision for the message, and characters with a decision of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypedDict, Unpack

from treetune.core.data import sources, tool_calls
from treetune.core.data.rows import Message, Row

MESSAGES = ("messages", "conversations")  # the second where the first is the default and the row has none
MAPPINGS = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    "reasoning_content": ("reasoning_content", "thinking", "reasoning"),  # as transformers reads them
}
ROLES: Mapping[str, Sequence[str]] = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant"),
    "system": ("system",),
    "tool": ("tool",),
}
LIKELY = {  # what names of other tools most likely mean, for the fix that an error shows
    "assistant": "assistant gpt bot model ai chatbot chatgpt bard bing answer output response function_call tool_call".split(),
    "user": "user human customer client question input instruction prompter person".split(),
    "system": ["system", "developer", "context"],
    "tool": "tool observation function function_response tool_response tool_result ipython".split(),
}
SYSTEM = "system"  # a column beside the messages, and the role of what it says
CONTENTS = ("reasoning_content", "content")
PART_TEXTS = ("text", "content", "value")
MAX_WEIGHT = 1e6
TRAINED = -1.0  # of a part that is to be trained with the message's own weight, or with 1
TAGS = (("<think>", "</think>"), ("<reasoning>", "</reasoning>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))


class MessageFields(NamedTuple):
    """Column names and roles of rows of messages: the documented options, checked by `message_fields`."""

    messages: str
    tools: str | None
    mappings: dict[str, tuple[str, ...]]  # what a template wants -> the names it may have in a message, best first
    roles: dict[str, str]  # by the role's name in the row
    extra_roles: Callable[[str], bool]  # whether another name is a role by itself, because the template has it, say
    training: str
    detail: str
    split_thinking: bool
    drop_system: bool


class ContentSpan(NamedTuple):
    """Characters [begin, end) of one content, and their weight; None: that of the message."""

    begin: int
    end: int
    weight: float | None


class TrainFlags(NamedTuple):
    """Training flags of a message; weight None: no flag."""

    weight: float | None
    parts: dict[str, tuple[ContentSpan, ...]]


class Conversation(NamedTuple):
    """One conversation; flags[i] belong to messages[i]."""

    messages: list[Message]
    flags: list[TrainFlags]
    tools: list[Message] | None


class FieldOptions(TypedDict, total=False):
    """The documented options of rows of messages: names of columns, of keys of a message, and of roles."""

    field_messages: str
    field_tools: str | None
    message_property_mappings: Mapping[str, str] | None
    message_field_role: str | None
    message_field_content: str | None
    roles: Mapping[str, Sequence[str]] | None
    message_field_training: str
    message_field_training_detail: str
    split_thinking: bool
    drop_system_message: bool


def message_fields(*, extra_roles: Callable[[str], bool] = lambda role: False, **options: Unpack[FieldOptions]) -> MessageFields:
    """Options of rows of messages in one value. extra_roles: whether another name is a role by itself.

    Errors: ValueError for options that contradict each other or have the wrong kind.
    """
    custom_names = dict(options.get("message_property_mappings") or {})
    for target, name in (("role", options.get("message_field_role")), ("content", options.get("message_field_content"))):
        if name is not None and custom_names.setdefault(target, name) != name:
            raise ValueError(
                f"message_field_{target} is {name!r}, but message_property_mappings has {target}: {custom_names[target]!r}: give one"
            )
    for target, name in custom_names.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"message_property_mappings has {target}: {name!r}, expected the name of a column")
    return MessageFields(
        messages=options.get("field_messages", MESSAGES[0]),
        tools=options.get("field_tools", "tools"),
        mappings=MAPPINGS | {target: (name,) for target, name in custom_names.items()},
        roles=map_roles(options.get("roles")),
        extra_roles=extra_roles,
        training=options.get("message_field_training", "train"),
        detail=options.get("message_field_training_detail", "train_detail"),
        split_thinking=options.get("split_thinking", False),
        drop_system=options.get("drop_system_message", False),
    )


def map_roles(roles: Mapping[str, Sequence[str]] | None) -> dict[str, str]:
    """Role by its name in the rows: the usual names, and those of `roles`, which come first.

    Errors: ValueError for a mapping to something else than lists of names, or of one name to two roles.
    """
    role_by_name: dict[str, str] = {}
    for target, names in (roles or {}).items():
        if isinstance(names, str) or not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"roles has {target}: {sources.quote(names)}, expected a list of the names that this role has in the rows")
        for name in names:
            if role_by_name.setdefault(name, target) != target:
                raise ValueError(f"roles maps {name!r} to {role_by_name[name]!r} and to {target!r}: one name can be one role only")
    return {name: target for target, names in ROLES.items() for name in names} | role_by_name


def unknown_role_fix(role: str, roles: Mapping[str, Sequence[str]] | None = None) -> str:
    """Fix that an error shows for a role that nothing maps."""
    role_by_name = map_roles(roles)
    target = next((target for target, names in LIKELY.items() if role.strip().lower() in names), None)
    fix = f"roles: {{{target or 'assistant'}: [{role}]}}"
    return (
        f"expected one of {sources.join_names(role_by_name)}; map it in its entry of datasets, {fix}"
        f"{'' if target else ' (or user, system, tool)'}, or rename it"
    )


DEFAULT = message_fields()


def read_conversation(row: Row, location: str, fields: MessageFields = DEFAULT) -> Conversation:
    """The row's conversation. Errors: ValueError naming row, message, field and what is there."""
    names = MESSAGES if fields.messages == MESSAGES[0] else (fields.messages,)
    field = next((name for name in names if row.get(name) is not None), None)
    if field is None:
        raise sources.missing_field(names, row, location, " (or ".join(names) + ")" * (len(names) - 1))
    messages = row[field]
    if row.get("functions") and fields.tools != "functions":
        raise ValueError(f"{location}: field functions holds tool definitions: set field_tools to functions, or remove it")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{location}: {field} is {sources.value_kind(messages)}, expected a list of messages with role and content")
    pairs = [_message(message, f"{location}: message {i}", fields) for i, message in enumerate(messages, 1)]
    if fields.drop_system:
        pairs = pairs[pairs[0][0]["role"] == SYSTEM :]
    elif fields.messages != SYSTEM and (system := system_text(row.get(SYSTEM), [message for message, _ in pairs], location)):
        pairs = [({"role": SYSTEM, "content": system}, TrainFlags(None, {})), *pairs]
    defined = tool_calls.read_tools(row.get(fields.tools), f"{location}: field {fields.tools}") if fields.tools else None
    return Conversation([message for message, _ in pairs], [flags for _, flags in pairs], defined)


def system_text(value: object, messages: list[Message], location: str, name: str = SYSTEM) -> str | None:
    """The row's system text, unless the conversation has it already. Errors: ValueError for two that differ."""
    if value in (None, ""):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{location}: field {name} is {sources.value_kind(value)}, expected text")
    system_message = next((message for message in messages if message["role"] == SYSTEM), None)
    if system_message is not None and system_message.get("content") != value:
        raise ValueError(f"{location}: field {name} says something else than the system message of the conversation: keep one of them")
    return None if system_message is not None else value


def _message(message: object, location: str, fields: MessageFields) -> tuple[dict, TrainFlags]:
    if not isinstance(message, dict):
        raise ValueError(f"{location} is {sources.value_kind(message)}, expected an object with role and content")
    present = _renamed({key: value for key, value in message.items() if value is not None}, location, fields)
    if present.get("function_call"):
        raise ValueError(
            f"{location}: function_call is the older form of tool_calls, which templates do not render: rewrite it as tool_calls"
        )
    if present.get("tool_calls"):
        present["tool_calls"] = tool_calls.read_calls(present["tool_calls"], f"{location}: tool_calls")
    else:
        present.pop("tool_calls", None)
    role = present.get("role")
    if not isinstance(role, str):
        raise _wrong("role", role, message, location, fields)
    if present.get("content") is None and "tool_calls" not in present:
        raise _wrong("content", None, message, location, fields)
    weight = _decision(present, location, fields)
    present["role"] = _role(role, location, fields)
    parts = _contents(present, location, fields)
    drop = (fields.training, fields.detail, "weight")
    return {key: value for key, value in present.items() if key not in drop}, TrainFlags(weight, parts)


def _role(role: str, location: str, fields: MessageFields) -> str:
    if role in fields.roles:
        return fields.roles[role]
    if role not in fields.roles.values() and not fields.extra_roles(role):
        raise ValueError(f"{location}: role is {sources.quote(role)}, {unknown_role_fix(role)}")
    return role


def _wrong(target: str, value: object, message: Message, location: str, fields: MessageFields) -> ValueError:
    names = fields.mappings[target]
    label = names[0] + "".join(f" (or {name})" for name in names[1:])
    if value is None:
        return sources.missing_field(names, message, location, label)
    return ValueError(f"{location}: field {label} is {sources.value_kind(value)}, expected text")


def _renamed(present: Message, location: str, fields: MessageFields) -> dict:
    """The message under the names that templates use, role and content first."""
    renamed, source_names = {}, set()
    for target, names in fields.mappings.items():
        name = next((name for name in names if name in present), None)
        source_names.update(names)
        if name is None:
            continue
        if target not in names and target in present and target not in source_names:
            raise ValueError(f"{location} has both {name} and {target}: message_property_mappings takes {name} for {target}; remove one")
        renamed[target] = present[name]
    return renamed | {key: value for key, value in present.items() if key not in source_names and key not in renamed}


def _decision(present: Message, location: str, fields: MessageFields) -> float | None:
    """Weight by the message's own flags; None without any."""
    train, weight = present.get(fields.training), present.get("weight")
    _check_flags(train, weight, location, fields.training)
    if train is None:
        return None if weight is None else float(weight)
    return (1.0 if weight is None else float(weight)) if train else 0.0


def _check_flags(train: object, weight: object, location: str, name: str = "train") -> None:
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{location}: {name} is {sources.quote(train)}, expected true or false")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT):
        raise ValueError(f"{location}: weight is {sources.quote(weight)}, expected a number from 0 to {MAX_WEIGHT:g}")


def _contents(present: Message, location: str, fields: MessageFields) -> dict[str, tuple[ContentSpan, ...]]:
    """Parts of the contents that have any; lists of parts in `present` become text."""
    parts = {}
    for field in CONTENTS:
        value = present.get(field)
        if isinstance(value, list):
            present[field], parts[field] = join_parts(value, f"{location}: field {field}")
        elif value is not None and not isinstance(value, str):
            raise _wrong(field, value, present, location, fields) if field in fields.mappings else _not_text(field, value, location)
    if present.get(fields.detail) is not None:
        if "content" in parts or not present.get("content"):
            raise ValueError(f"{location}: {fields.detail} needs content that is one text, without parts: keep one of the two")
        parts["content"] = _detail(present[fields.detail], present["content"], f"{location}: {fields.detail}")
    if fields.split_thinking and present["role"] == "assistant" and present.get("content") and "reasoning_content" not in present:
        _split_thinking(present, parts, location)
    scale = float(present.get("weight") or 1.0)
    return {field: tuple(_scaled(part, scale) for part in spans) for field, spans in parts.items()}


def _scaled(part: ContentSpan, scale: float) -> ContentSpan:
    return part._replace(weight=scale) if part.weight == TRAINED else part


def _not_text(field: str, value: object, location: str) -> ValueError:
    return ValueError(f"{location}: {field} is {sources.value_kind(value)}, expected text")


def join_parts(items: list, location: str) -> tuple[str, tuple[ContentSpan, ...]]:
    """(text, parts) of a list of content parts."""
    if not items:
        raise ValueError(f"{location} is empty, expected text or a list of parts")
    text, parts = "", []
    for i, item in enumerate(items, 1):
        piece, weight = _part(item, f"{location}: part {i}")
        parts.append(ContentSpan(len(text), len(text) + len(piece), weight))
        text += piece
    return text, tuple(parts)


def _part(item: object, location: str) -> tuple[str, float | None]:
    if isinstance(item, str):
        return item, None
    if not isinstance(item, dict):
        raise ValueError(f"{location} is {sources.value_kind(item)}, expected an object with type and text")
    present = {key: value for key, value in item.items() if value is not None}
    if present.get("type") != "text":
        raise ValueError(f"{location}: type is {sources.quote(present.get('type'))}: only parts of type 'text' can be trained on")
    texts = [present[name] for name in PART_TEXTS if name in present]
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise ValueError(f"{location} has {sources.join_names(present)}: expected one text, under text, content or value")
    train, weight = present.get("train"), present.get("weight")
    _check_flags(train, weight, location)
    if train is None:
        return texts[0], None if weight is None else float(weight)
    return texts[0], 0.0 if not train else TRAINED if weight is None else float(weight)


def _detail(items: object, content: str, location: str) -> tuple[ContentSpan, ...]:
    """Parts from character offsets; both ends belong to the part."""
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{location} is {sources.value_kind(items)}, expected a list of objects with begin_offset, end_offset and train")
    spans = []
    for i, item in enumerate(items, 1):
        begin, end, train = (item.get(name) for name in ("begin_offset", "end_offset", "train"))
        whole = all(isinstance(offset, int) and not isinstance(offset, bool) for offset in (begin, end))
        if not whole or not isinstance(train, bool):
            raise ValueError(
                f"{location}: entry {i} is {sources.quote(item)}: expected whole begin_offset and end_offset, and train true or false"
            )
        if not 0 <= begin <= end < len(content):
            fix = f"expected 0 <= begin <= end <= {len(content) - 1}; end_offset is the last character of the entry, not the one behind it"
            raise ValueError(f"{location}: entry {i} has the offsets {begin} to {end}: {fix}")
        spans.append(ContentSpan(begin, end + 1, TRAINED if train else 0.0))
    spans.sort()
    for before, after in zip(spans, spans[1:], strict=False):
        if after.begin < before.end:
            raise ValueError(f"{location}: two entries hold character {after.begin}; end_offset is the last character of an entry")
    return tuple(spans)


def _split_thinking(present: Message, parts: dict[str, tuple[ContentSpan, ...]], location: str) -> None:
    """Move the text between reasoning tags at the start of the content to `reasoning_content`, with its parts."""
    content = present["content"]
    tags = next((pair for pair in TAGS if pair[1] in content), None)
    if tags is None:
        return
    close = content.index(tags[1])
    begin = content.find(tags[0], 0, close)
    if content[: max(begin, 0)].strip():
        raise ValueError(f"{location}: text stands before {tags[0]}, so split_thinking cannot tell reasoning from answer")
    begin = 0 if begin < 0 else begin + len(tags[0])
    after = close + len(tags[1])
    cuts = {"reasoning_content": _stripped(content, begin, close), "content": _stripped(content, after, len(content))}
    spans = parts.pop("content", ())
    for field, (first, last) in cuts.items():
        present[field] = content[first:last]
        if spans:
            parts[field] = tuple(_clip(part, first, last) for part in spans if part.begin < last and part.end > first)


def _stripped(text: str, begin: int, end: int) -> tuple[int, int]:
    inner = text[begin:end]
    return begin + len(inner) - len(inner.lstrip()), max(begin + len(inner) - len(inner.lstrip()), begin + len(inner.rstrip()))


def _clip(part: ContentSpan, first: int, last: int) -> ContentSpan:
    return part._replace(begin=max(part.begin, first) - first, end=min(part.end, last) - first)
