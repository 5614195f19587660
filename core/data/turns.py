"""Messages of preference, reward and prompt rows: read and checked; which part of them gets trained is decided by `chat`."""

from collections.abc import Mapping, Sequence

from treetune.core.data import sources

ROLES: Mapping[str, Sequence[str]] = {
    "system": ("system",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt"),
    "tool": ("tool",),
}
FLAGS = ("train", "weight")


def messages(
    value: object, where: str, *, role: str = "role", content: str = "content", roles: Mapping[str, Sequence[str]] = ROLES
) -> list[dict]:
    """The messages in `value` with text under `role` and `content`, other keys kept. `where` ends with the field's name.

    role, content: what these are called in the row; roles: the names in the row by role.
    Errors: ValueError for anything but a list of one or more messages, each with a known role and a text.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is {kind(value)}, expected a list of messages with {role} and {content}")
    return [message(one, f"{where}, message {i}", role=role, content=content, roles=roles) for i, one in enumerate(value, 1)]


def message(value: object, where: str, *, role: str = "role", content: str = "content", roles: Mapping[str, Sequence[str]] = ROLES) -> dict:
    """One message, read as in `messages`."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {kind(value)}, expected an object with {role} and {content}")
    for name in (role, content):
        if not isinstance(value.get(name), str):
            raise ValueError(f"{where}: field {name} is {kind(value.get(name))}, expected text; it has {sources.listed(map(str, value))}")
    known = next((target for target, names in roles.items() if value[role] in names), None)
    if known is None:
        raise ValueError(
            f"{where}: field {role} is {value[role]!r}, expected one of {sources.listed(n for names in roles.values() for n in names)}"
        )
    rest = {key: kept for key, kept in value.items() if key not in (role, content, *FLAGS) and kept is not None}
    return {"role": known, "content": value[content]} | rest


def dialogue(value: object, where: str, **names) -> tuple[list[dict], dict]:
    """(history, reply) of a conversation that ends with the assistant. Errors: ValueError for any other."""
    said = messages(value, where, **names)
    if len(said) < 2 or said[-1]["role"] != "assistant":
        found = sources.listed(one["role"] for one in said)
        raise ValueError(f"{where} has the roles {found}: expected a question first and a reply of the assistant last")
    return said[:-1], said[-1]


def kind(value: object) -> str:
    """How an error names what it found instead."""
    if value is None:
        return "missing"
    return "empty" if value in ([], {}, "") else f"of type {type(value).__name__}"
