"""Messages of preference, reward and prompt rows: read and checked; which part of them gets trained is decided by `chat`."""

from collections.abc import Mapping, Sequence
from typing import Any

from treetune.core.data import conversations, sources
from treetune.core.data.rows import Message

ROLES: Mapping[str, Sequence[str]] = conversations.ROLES
FLAGS = ("train", "weight")


def read_turns(
    value: object,
    location: str,
    *,
    role: str = "role",
    content: str = "content",
    roles: Mapping[str, Sequence[str]] = ROLES,
    replies: int | None = None,
) -> list[Message]:
    """The messages in `value` with text under `role` and `content`, other keys kept. `location` ends with the field's name.

    role, content: what these are called in the row; roles: the names in the row by role, besides the usual ones. replies: how many
    of the last messages are learned, so that a `train` or `weight` that says otherwise is refused; None: nothing is, so none counts.
    Errors: ValueError for anything but a list of one or more messages, each with a known role and a text or tool calls.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{location} is {type_name(value)}, expected a list of messages with {role} and {content}")
    learned = [None if replies is None else i >= len(value) - replies for i in range(len(value))]
    return [
        read_turn(message, f"{location}, message {i}", role=role, content=content, roles=roles, learned=learned[i - 1])
        for i, message in enumerate(value, 1)
    ]


def read_turn(
    value: object,
    location: str,
    *,
    role: str = "role",
    content: str = "content",
    roles: Mapping[str, Sequence[str]] = ROLES,
    learned: bool | None = None,
) -> dict:
    """One message, read as in `read_turns`. learned: whether it is a reply to learn from; None where nothing is."""
    if not isinstance(value, dict):
        raise ValueError(f"{location} is {type_name(value)}, expected an object with {role} and {content}")
    text_content, calls = value.get(content), value.get("tool_calls")
    if isinstance(text_content, list) and text_content:
        text_content = _plain(text_content, f"{location}: field {content}")
    for name, text in ((role, value.get(role)), (content, text_content)):
        if not isinstance(text, str) and not (name == content and text is None and calls):
            raise ValueError(f"{location}: field {name} is {type_name(text)}, expected text; it has {sources.join_names(map(str, value))}")
    role_name = conversations.map_roles(roles).get(value[role])
    if role_name is None:
        raise ValueError(f"{location}: field {role} is {sources.quote(value[role])}, {conversations.unknown_role_fix(value[role], roles)}")
    if learned is not None:
        _check_flags(value, learned, location)
    rest = {key: item for key, item in value.items() if key not in (role, content, *FLAGS) and item is not None}
    return {"role": role_name} | ({} if text_content is None else {"content": text_content}) | rest


def _plain(parts: list, location: str) -> str:
    text, spans = conversations.join_parts(parts, location)
    if any(part.weight is not None for part in spans):
        raise ValueError(f"{location} has parts with train or weight: a reply is learned as a whole here, so remove them")
    return text


def _check_flags(value: dict, learned: bool, location: str) -> None:
    """Raise ValueError for a message whose flags contradict what is trained of it."""
    train, weight = (value.get(name) for name in FLAGS)
    if train is not None and train is not learned:
        what = "is a reply, which is always learned" if learned else "is of the prompt, which is never learned"
        raise ValueError(f"{location}: train is {sources.quote(train)}, but this message {what} here: remove train, or the row")
    if weight is not None and (isinstance(weight, bool) or weight != (1 if learned else 0)):
        what = "replies count fully" if learned else "the prompt is never learned"
        raise ValueError(f"{location}: weight is {sources.quote(weight)}, but {what} here: remove weight, or the row")
    if value.get("train_detail") is not None:
        raise ValueError(f"{location}: train_detail is not read here, a message is learned as a whole or not at all: remove it")


def read_dialogue(value: object, location: str) -> tuple[list[Message], Message]:
    """(history, reply) of a conversation that ends with the assistant. Errors: ValueError for any other."""
    messages = read_turns(value, location, replies=1)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = sources.join_names(message["role"] for message in messages)
        raise ValueError(f"{location} has the roles {roles}: expected a question first and a reply of the assistant last")
    return messages[:-1], messages[-1]


def turn_text(message: Message, location: str) -> str:
    """Text of a message. Errors: ValueError for tool calls, which have no wording as text."""
    if message.get("tool_calls") or "content" not in message:
        raise ValueError(f"{location} has tool calls, which this format has no wording for: use rows of messages and a chat template")
    return message["content"]


def with_system(history: list[Message], row: Mapping[str, Any], location: str, name: str = "system") -> list[Message]:
    """The messages with the row's system text in front.

    Errors: ValueError for a field that is no text, or that says something else than the messages' own system message.
    """
    system = conversations.system_text(row.get(name), history, location, name)
    return [{"role": "system", "content": system}, *history] if system else history


def type_name(value: object) -> str:
    """Type of a value as errors name it: "missing", "empty" or "of type ..."."""
    if value is None:
        return "missing"
    return "empty" if value in ([], {}, "") else f"of type {type(value).__name__}"
