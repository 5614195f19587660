"""Characters of each message in the text that a chat template renders, without help from the template.

The template is rendered a second time with a unique marker in place of every piece of content. The text between markers is what
the template itself writes; found again in the real rendering, character for character, it gives the span of every piece. Since
only roles and the shape of the contents matter for the markers' rendering, one of them serves all rows of the same shape.

A piece of content is text between reasoning tags: templates treat the two sides of `</think>` differently, and may drop one.
Of tool calls the pieces are the functions' names and every text in their arguments; the rest of a call is the template's writing.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from treetune.core.data.rows import Message

FIELDS = ("reasoning_content", "content")
CALLS = len(FIELDS)  # the field number of tool calls
TAGS = re.compile(r"(</?think>)")
# Letters and digits, which a template that strips, escapes or quotes contents leaves as they are.
MARKER = "Qx7vZkW"
MARKERS = re.compile(MARKER + r"m(\d+)f(\d+)p(\d+)e")
CACHE_SIZE = 4096
MISSING = "is not rendered"
MARK = re.compile(r"\s*(<\|?[^<>|\s]{1,40}\|?>)")  # a text such as <|eot_id|> or </s>
OPEN_MARK = re.compile(r"<\|?[^<>\s]{0,40}$")
CALL_END = re.compile(r"</[^<>|\s]{0,20}calls?[^<>|\s]{0,20}>\s*$")  # the end of a call that no end of turn follows

Key = tuple[int, int, int]  # message, field, piece
Tools = list[dict[str, Any]] | None  # definitions of a conversation's tools


class Render(Protocol):
    """Chat template of a run, applied to one conversation; a template that refuses it raises ValueError."""

    def __call__(self, messages: Sequence[Message], *, tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """Text of the conversation, perhaps with the header of the assistant's next turn behind it."""
        ...


class FindLayout(Protocol):
    """Layout of a conversation's shape, made once for all rows of that shape."""

    def __call__(self, messages: Sequence[Message], tools: Tools = None, *, literal: Collection[int] = ()) -> "TemplateLayout":
        """Layout of a conversation with these tools; the contents of `literal` messages belong to its shape."""
        ...


class MessageSlot(NamedTuple):
    """One message in a layout: its first and last piece, and how far its turn reaches into the text around them."""

    first: int
    last: int
    lead: int  # characters before the first piece that the speaker produces too, such as an opening <think>
    trail: int  # characters after the last piece that are still content: a tag, blanks
    tail: int  # characters after the last piece that still belong to the turn, not to the next one's header
    calls: bool = False  # it has tool calls


class TemplateLayout(NamedTuple):
    """Text that a template writes around a conversation of one shape: statics[0], piece, statics[1], piece, ..., statics[-1]."""

    statics: list[str]
    keys: list[Key]
    places: dict[int, MessageSlot | str]  # by message; a string says why the message has no single place
    cut: frozenset[int]  # messages of which the template leaves a piece out
    lost: frozenset[int]  # messages of which it leaves out a part of a tool call
    ending: str = ""  # end of the last turn, where the template writes it only before a next one; statics[-1] ends with it


class Markers(NamedTuple):
    """A conversation with markers for contents, and its rendering cut at them."""

    messages: list[Message]
    statics: list[str]
    keys: list[Key]
    render: Render
    eos: str  # text that ends a turn, empty where it is not known


class PieceSpan(NamedTuple):
    """Characters [begin, end) of one piece in the rendered text; blanks aside, it starts at `core`."""

    begin: int
    core: int
    end: int


class ContentRun(NamedTuple):
    """Character c in [first, last) of a content stands at start + c - first; with the blanks kept around them they are [begin, end)."""

    first: int
    last: int
    start: int
    begin: int
    end: int


class MessageSpan(NamedTuple):
    """Characters of one message in the rendered text: content, and the limits of what may close it."""

    begin: int
    end: int
    limit: int
    tail: int


def layout_cache(render: Render, eos: str = "") -> FindLayout:
    """Function from messages and tools to the layout of their shape, made once for all rows of one shape. eos: the tokenizer's."""
    # A layout costs several renderings, and a data set has few shapes; the bound keeps one of endless shapes from filling the memory.
    cache: dict[str, TemplateLayout] = {}

    def layout(messages: Sequence[Message], tools: Tools = None, *, literal: Collection[int] = ()) -> TemplateLayout:
        marked = [message if i in literal else _marked(i, message) for i, message in enumerate(messages)]
        # Tools count with their names and texts, since the template writes them around the messages.
        key = json.dumps([marked, tools], default=repr) if tools else json.dumps(marked, default=repr)
        if key not in cache:
            if len(cache) >= CACHE_SIZE:
                cache.clear()
            cache[key] = _layout(marked, partial(render, tools=tools) if tools else render, eos)
        return cache[key]

    return layout


def find_pieces(text: str, messages: Sequence[Message], layout: TemplateLayout) -> list[PieceSpan]:
    """Characters of every piece of `layout.keys`. Errors: ValueError when the rendered text does not match the layout."""
    piece_spans, position = [], len(layout.statics[0])
    if not text.startswith(layout.statics[0]):
        raise ValueError("the template writes different text around these contents than around others")
    for i, key in enumerate(layout.keys):
        # A template may write a content as it is or as JSON text (of tool calls, mostly), with its blanks or without.
        content = _content(messages[key[0]], key)
        after, final = layout.statics[i + 1], i + 1 == len(layout.keys)
        place = _piece(text, position, content, after, final=final) or _piece(text, position, _escaped(content), after, final=final)
        if place is None:
            raise ValueError(f"the template changes the content of message {key[0] + 1} beyond recognition")
        piece_spans.append(PieceSpan(position, *place))
        position = place[1] + len(after)
    return piece_spans


def message_spans(piece_spans: list[PieceSpan], layout: TemplateLayout) -> dict[int, MessageSpan]:
    """Span of every message that has a place."""
    return {i: _message_span(place, piece_spans, layout) for i, place in layout.places.items() if isinstance(place, MessageSlot)}


def find_run(text: str, i: int, field: int, content: str, piece_spans: list[PieceSpan], layout: TemplateLayout) -> ContentRun:
    """Literal run of a field's content in the text: all of it but for blanks around it, or its only piece that is rendered.

    Errors: ValueError when the template takes the content apart or rewrites it.
    """
    indices = [k for k, key in enumerate(layout.keys) if key[:2] == (i, field)]
    if not indices:
        raise ValueError("leaves it out")
    parts = TAGS.split(content)
    number, first = layout.keys[indices[0]][2], piece_spans[indices[0]]
    offset = sum(map(len, parts[:number]))
    start = first.core - _blanks(parts[number])
    if text.startswith(content.strip(), start - offset + _blanks(content)):
        return ContentRun(
            0, len(content), start - offset, min(first.begin, start - offset + _blanks(content)), piece_spans[indices[-1]].end
        )
    if len(indices) > 1 or not text.startswith(parts[number].strip(), first.core):
        raise ValueError("takes it apart")
    return ContentRun(offset, offset + len(parts[number]), start, first.begin, first.end)


def _blanks(text: str) -> int:
    """Number of blanks at the beginning."""
    return len(text) - len(text.lstrip())


def _escaped(content: str) -> str:
    """Content inside JSON quotes, as Jinja's tojson writes it."""
    return json.dumps(content, ensure_ascii=False)[1:-1]


def _message_span(place: MessageSlot, piece_spans: list[PieceSpan], layout: TemplateLayout) -> MessageSpan:
    begin, end = piece_spans[place.first].begin - place.lead, piece_spans[place.last].end
    return MessageSpan(begin, end + place.trail, end + len(layout.statics[place.last + 1]), end + max(place.trail, place.tail))


def _content(message: Message, key: Key) -> str:
    """The piece that a key stands for."""
    if key[1] == CALLS:
        return _leaves(message)[key[2]]
    return TAGS.split(message[FIELDS[key[1]]])[key[2]]


def _piece(text: str, begin: int, content: str, static: str, *, final: bool) -> tuple[int, int] | None:
    """(core, end) of the piece that starts at `begin`: its content, perhaps stripped of blanks, must be followed by `static`."""
    # The text behind the content decides how many of its last blanks were kept. The most are tried first, because what the template
    # writes there may begin with blanks of its own.
    core = content.strip()
    lead, trail = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
    start = text.find(core, begin, begin + len(lead) + len(core))
    if start < 0 or not lead.endswith(text[begin:start]):
        return None
    for blanks_kept in range(len(trail), -1, -1):
        end = start + len(core) + blanks_kept
        whole = end + len(static) == len(text) or not final
        if whole and text.startswith(trail[:blanks_kept] + static, start + len(core)):
            return start, end
    return None


def _layout(marked: list[Message], render: Render, eos: str) -> TemplateLayout:
    statics, keys = _split_at_markers(render(marked))
    markers = Markers(marked, statics, keys, render, eos)
    ending = _ending(markers)
    statics[-1] += ending
    places = {i: _message_slot(i, markers) for i, message in enumerate(marked) if _marks(message)}
    missing = {key for message in marked for key in _marks(message)} - set(keys)
    lost = frozenset(key[0] for key in missing if key[1] == CALLS)
    return TemplateLayout(statics, keys, places, frozenset(key[0] for key in missing), lost, ending)


def _ending(markers: Markers) -> str:
    """What ends the last turn where the template writes it only between two turns; empty where it does so itself, or nothing does.

    A model that never sees the end of an answer would not learn to stop.
    """
    marked, statics, keys, render, eos = markers
    last, after = marked[-1], statics[-1]
    if last["role"] != "assistant" or not keys or keys[-1][0] != len(marked) - 1 or (eos and eos in after):
        return ""
    calls = last.get("tool_calls")
    if after.strip() and not (calls and CALL_END.search(after)):
        return ""
    answer = {"role": "tool", "name": calls[-1]["function"]["name"], "tool_call_id": calls[-1].get("id")} if calls else {"role": "user"}
    next_key = (len(marked), 1, 0)
    longer, shown = _try_split_at_markers([*marked, answer | {"content": _marker(next_key)}], render)
    if shown[-2:] != [keys[-1], next_key] or not longer[-2].startswith(after):
        return ""
    mark = MARK.match(longer[-2], len(after))
    return longer[-2][len(after) : mark.end()] if mark else ""


def _message_slot(i: int, markers: Markers) -> MessageSlot | str:
    keys = markers.keys
    indices = _piece_indices(i, keys)
    if not indices:
        return MISSING
    if indices != list(range(indices[0], indices[-1] + 1)) or len(indices) != len({keys[k] for k in indices}):
        return "is rendered more than once or in pieces"
    message = markers.messages[i]
    calls = bool(message.get("tool_calls"))
    lead, tail = _lead(i, indices[0], markers), _tail(i, indices[-1], markers, whole=calls)
    if calls and (lead is None or tail is None):
        return "has tool calls whose limits are not known as they are written"
    trail = _trail(message, keys[indices[-1]], markers.statics[indices[-1] + 1])
    return MessageSlot(indices[0], indices[-1], lead or 0, trail, tail or 0, calls)


def _piece_indices(i: int, keys: list[Key]) -> list[int]:
    """Indices of the pieces of message `i`. A function's name that an answer to the call repeats belongs to the answer."""
    indices, seen = [], set()
    for k, key in enumerate(keys):
        if key[0] == i and not (key[1] == CALLS and key in seen):
            indices.append(k)
            seen.add(key)
    return indices


def _lead(i: int, first: int, markers: Markers) -> int | None:
    """Characters between the generation prompt and the content: the model has to produce them itself, so they count."""
    marked, statics, keys, render, _ = markers
    before = statics[first]
    if marked[i]["role"] == "assistant" and i > 0:
        prompt, shown = _try_split_at_markers(marked[:i], render, add_generation_prompt=True)
        if shown[-1:] == keys[:first][-1:] and prompt[-1] and before.startswith(prompt[-1]):
            return len(before) - len(prompt[-1])
    if marked[i].get("tool_calls") and keys[first][1] == CALLS:
        return _lead_of_calls(i, first, markers)
    lead_text = marked[i][FIELDS[keys[first][1]]].partition(_marker(keys[first]))[0]
    opened = re.search(r"<think>\s*$", before) if _reasons(marked[i]) else None
    lengths = [len(text) for text in (lead_text, lead_text.lstrip()) if before.endswith(text)]
    return max(lengths + [len(before) - opened.start() if opened else 0])


def _lead_of_calls(i: int, first: int, markers: Markers) -> int | None:
    """As `_lead`, for a message that starts with a call: it begins where plain content of the same speaker would."""
    marked, statics, keys, render, _ = markers
    plain = {"role": marked[i]["role"], "content": _marker((i, 1, 0))}
    for talk in ([*marked[:i], plain, *marked[i + 1 :]], [*marked[:i], plain]):
        header, shown = _try_split_at_markers(talk, render)
        if shown[: first + 1] == [*keys[:first], (i, 1, 0)] and (shared := _shared_header(header[first], statics[first])):
            return len(statics[first]) - len(shared)
    return None


def _shared_header(plain: str, call: str) -> str:
    """What opens a turn, be it content or a call: the former's text, or that up to the first mark in which they differ."""
    shared = os.path.commonprefix([plain, call])
    border = OPEN_MARK.sub("", shared)
    return shared if shared == plain else border if border != shared and border.endswith(">") else ""


def _trail(message: Message, last: Key, after: str) -> int:
    """Length of the content's own text after its last piece: a tag, blanks."""
    if last[1] == CALLS:
        return 0
    trail_text = message[FIELDS[last[1]]].partition(_marker(last))[2]
    return max(len(text) for text in (trail_text, trail_text.rstrip(), "") if after.startswith(text))


def _tail(i: int, last: int, markers: Markers, *, whole: bool = False) -> int | None:
    """Length of the template's text after the content that does not depend on a next message; `whole`: None where that is uncertain."""
    marked, statics, keys, render, eos = markers
    after = statics[last + 1]
    stop = after.find(eos) + len(eos) if eos and eos in after else None
    if i + 1 == len(marked):
        # Some templates open the next answer whether they are asked to or not.
        return stop if stop and after[stop:].strip() else len(after)
    # What stands between two messages is the end of one turn and the header of the next. The conversation that stops here has only
    # the first.
    alone, shown = _try_split_at_markers(marked[: i + 1], render)
    if shown[-1:] != [keys[last]]:
        return stop
    shared = os.path.commonprefix([after, alone[-1]])
    if shared in (after, alone[-1]):  # else it may end inside a token that two different endings happen to start with
        return min(len(shared), stop) if stop and shared else len(shared) or stop or 0
    call = OPEN_MARK.sub("", shared)
    if CALL_END.search(call) and (mark := MARK.match(after, len(call))) and alone[-1][len(call) :].strip() == eos:
        return mark.end()  # a conversation that stops here has its own end instead
    if stop:
        return stop
    return None if whole else len(shared) - len(re.split(r"\s", shared)[-1])


def _try_split_at_markers(marked: list[Message], render: Render, *, add_generation_prompt: bool = False) -> tuple[list[str], list[Key]]:
    """As `_split_at_markers`, or nothing where the template refuses a conversation that stops here."""
    try:
        return _split_at_markers(render(marked, add_generation_prompt=add_generation_prompt))
    except ValueError:
        return [""], []


def _split_at_markers(text: str) -> tuple[list[str], list[Key]]:
    return re.split(MARKER + r"m\d+f\d+p\d+e", text), _keys(text)


def _keys(text: str) -> list[Key]:
    return [(int(match[1]), int(match[2]), int(match[3])) for match in MARKERS.finditer(text)]


def _marked(i: int, message: Message) -> dict:
    """The message with a marker in place of each piece of its content; tags and blank pieces stay."""
    marked = message | {field: _mark(i, f, message[field]) for f, field in enumerate(FIELDS) if message.get(field)}
    if message.get("tool_calls"):
        count = iter(range(sys.maxsize))
        marked["tool_calls"] = [_mark_call(call, lambda text: _marker((i, CALLS, next(count)))) for call in message["tool_calls"]]
    return marked


def _mark_call(call: dict, mark: Callable[[str], str]) -> dict:
    """The call with `mark` of its name and of each text in its arguments that is not blank."""
    function = call["function"]
    return call | {"function": function | {"name": mark(function["name"]), "arguments": _mark_value(function.get("arguments"), mark)}}


def _mark_value(value: object, mark: Callable[[str], str]) -> object:
    if isinstance(value, dict):
        return {key: _mark_value(item, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark_value(item, mark) for item in value]
    return mark(value) if isinstance(value, str) and value.strip() else value


def _leaves(message: Message) -> list[str]:
    """Pieces of the tool calls, in the order of their numbers."""
    texts: list[str] = []
    for call in message["tool_calls"]:
        _mark_call(call, lambda text: texts.append(text) or text)
    return texts


def _mark(i: int, f: int, content: str) -> str:
    pieces = TAGS.split(content)
    return "".join(_marker((i, f, p)) if p % 2 == 0 and piece.strip() else piece for p, piece in enumerate(pieces))


def _marker(key: Key) -> str:
    return MARKER + "m{}f{}p{}e".format(*key)


def _marks(message: Message) -> list[Key]:
    """Markers in a marked message."""
    keys = [key for field in FIELDS if message.get(field) for key in _keys(message[field])]
    return keys + [key for text in (_leaves(message) if message.get("tool_calls") else ()) for key in _keys(text)]


def _reasons(message: Message) -> bool:
    return FIELDS[0] in message or bool(TAGS.search(message.get("content") or ""))
