"""Tool calls and tool definitions of rows: as objects or as their JSON text, in the short form or the long one."""

from typing import Any

from treetune.core.data import jsontext, sources
from treetune.core.data.rows import Message


def read_calls(value: object, location: str) -> list[Message]:
    """Tool calls with their arguments as objects. Nested nulls go: columnar files put them where a key is missing."""
    value = _parse_text(value, location)
    if not isinstance(value, list):
        raise ValueError(f"{location} is {sources.value_kind(value)}, expected a list of calls")
    return [_call(call, f"{location}: call {i}") for i, call in enumerate(value, 1)]


def _call(value: object, location: str) -> dict[str, Any]:
    parsed = _parse_text(value, location)
    if not isinstance(parsed, dict):
        raise ValueError(f"{location} is {sources.value_kind(parsed)}, expected an object with function")
    call = without_nulls(parsed)
    if "function" not in call:  # the short form
        extra = {key: call[key] for key in ("id",) if key in call}
        call = {"type": "function", **extra, "function": {key: call[key] for key in ("name", "arguments") if key in call}}
    function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise ValueError(f"{location}: function is {sources.quote(function)}, expected an object with name and arguments")
    arguments = _parse_text(function.get("arguments", {}), f"{location}: arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"{location}: arguments is {sources.value_kind(arguments)}, expected an object or its JSON text")
    return call | {"function": function | {"arguments": arguments}}


def read_tools(value: object, location: str) -> list[Message] | None:
    """Tool definitions, from a list or its JSON text."""
    parsed = _parse_text(value, location)
    if parsed is None or parsed == []:
        return None
    if not isinstance(parsed, list):
        raise ValueError(f"{location} is {sources.value_kind(parsed)}, expected a list of tool definitions or its JSON text")
    tools = [_parse_text(tool, f"{location}: tool {i}") for i, tool in enumerate(parsed, 1)]
    for i, tool in enumerate(tools, 1):
        if not isinstance(tool, dict):
            raise ValueError(f"{location}: tool {i} is {sources.value_kind(tool)}, expected an object")
    if not isinstance(value, list):  # JSON text holds the nulls that its author wrote
        return tools
    return [tool if isinstance(definition, str) else without_nulls(tool) for tool, definition in zip(tools, value, strict=True)]


def _parse_text(value: object, location: str) -> Any:
    """The value, or what its JSON text says."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    return jsontext.parse(value, f"{location} is a text that is no JSON")


def without_nulls(value: Any) -> Any:
    """The value without the entries of objects that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
