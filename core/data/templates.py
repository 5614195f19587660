"""Where each message stands in the text that a chat template renders, without help from the template.

The template is rendered a second time with a unique marker in place of every piece of content. The text between markers is what
the template itself writes; found again in the real rendering, character for character, it gives the span of every piece. Since
only roles and the shape of the contents matter for the markers' rendering, one of them serves all rows of the same shape.

A piece of content is text between reasoning tags: templates treat the two sides of `</think>` differently, and may drop one.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

FIELDS = ("reasoning_content", "content")
TAGS = re.compile(r"(</?think>)")
MARKER = "Qx7vZkW"
MARKERS = re.compile(MARKER + r"m(\d+)f(\d+)p(\d+)e")
CACHE_SIZE = 4096
MISSING = "is not rendered"

Key = tuple[int, int, int]  # message, field, piece
Render = Callable[..., str]  # (messages, *, add_generation_prompt=False) -> text


class Place(NamedTuple):
    """One message in a layout: its first and last piece, and how far its turn reaches into the text around them."""

    first: int
    last: int
    lead: int  # characters before the first piece that the speaker produces too, such as an opening <think>
    trail: int  # characters after the last piece that are still content: a tag, blanks
    tail: int  # characters after the last piece that still belong to the turn, not to the next one's header


class Layout(NamedTuple):
    """What a template writes around a conversation of one shape: statics[0], piece, statics[1], piece, ..., statics[-1]."""

    statics: list[str]
    keys: list[Key]
    places: dict[int, Place | str]  # by message; a string says why the message has no single place
    cut: frozenset[int]  # messages of which the template leaves a piece out


class Span(NamedTuple):
    """Characters of one message in the rendered text: content, and the limits of what may close it."""

    begin: int
    end: int
    limit: int
    tail: int


def layouts(render: Render) -> Callable[[Sequence[dict]], Layout]:
    """A function from messages to the layout of their shape; layouts are kept and shared by all rows of one shape."""
    known: dict[str, Layout] = {}

    def layout(messages: Sequence[dict]) -> Layout:
        marked = [_marked(i, message) for i, message in enumerate(messages)]
        key = json.dumps(marked, default=repr)
        if key not in known:
            if len(known) >= CACHE_SIZE:
                known.clear()
            known[key] = _layout(marked, render)
        return known[key]

    return layout


def locate(text: str, messages: Sequence[dict], layout: Layout) -> dict[int, Span]:
    """Span of every message that has a place. Errors: ValueError when the rendered text does not match the layout."""
    found, position = [], len(layout.statics[0])
    if not text.startswith(layout.statics[0]):
        raise ValueError("the template writes different text around these contents than around others")
    for i, (message, field, piece) in enumerate(layout.keys):
        content = TAGS.split(messages[message][FIELDS[field]])[piece]
        end = _piece_end(text, position, content, layout.statics[i + 1], final=i + 1 == len(layout.keys))
        if end is None:
            raise ValueError(f"the template changes the content of message {message + 1} beyond recognition")
        found.append((position, end))
        position = end + len(layout.statics[i + 1])
    return {i: _span(place, found, layout) for i, place in layout.places.items() if isinstance(place, Place)}


def _span(place: Place, found: list[tuple[int, int]], layout: Layout) -> Span:
    begin, end = found[place.first][0] - place.lead, found[place.last][1]
    return Span(begin, end + place.trail, end + len(layout.statics[place.last + 1]), end + max(place.trail, place.tail))


def _piece_end(text: str, begin: int, content: str, static: str, *, final: bool) -> int | None:
    """Where the piece ends that starts at `begin`: its content, perhaps stripped of blanks, must be followed by `static`."""
    core = content.strip()
    lead, trail = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
    start = text.find(core, begin, begin + len(lead) + len(core))
    if start < 0 or not lead.endswith(text[begin:start]):
        return None
    for kept in range(len(trail), -1, -1):
        end = start + len(core) + kept
        whole = end + len(static) == len(text) or not final
        if whole and text.startswith(trail[:kept] + static, start + len(core)):
            return end
    return None


def _layout(marked: list[dict], render: Render) -> Layout:
    statics, keys = _split(render(marked))
    places = {i: _place(i, marked, statics, keys, render) for i, message in enumerate(marked) if _shown(message)}
    wanted = {key for message in marked for field in FIELDS if field in message for key in _keys(message[field])}
    return Layout(statics, keys, places, frozenset(key[0] for key in wanted - set(keys)))


def _place(i: int, marked: list[dict], statics: list[str], keys: list[Key], render: Render) -> Place | str:
    at = [k for k, key in enumerate(keys) if key[0] == i]
    if not at:
        return MISSING
    if at != list(range(at[0], at[-1] + 1)) or len(at) != len({keys[k] for k in at}):
        return "is rendered more than once or in pieces"
    lead, tail = _lead(i, at[0], marked, statics, keys, render), _tail(i, at[-1], marked, statics, keys, render)
    return Place(at[0], at[-1], lead, _trail(marked[i], keys[at[-1]], statics[at[-1] + 1]), tail)


def _lead(i: int, first: int, marked: list[dict], statics: list[str], keys: list[Key], render: Render) -> int:
    """Characters between the generation prompt and the content: the model has to produce them itself, so they count."""
    before = statics[first]
    if marked[i]["role"] == "assistant" and i > 0:
        prompt, shown = _try_split(marked[:i], render, add_generation_prompt=True)
        if shown[-1:] == keys[:first][-1:] and prompt[-1] and before.startswith(prompt[-1]):
            return len(before) - len(prompt[-1])
    own = marked[i][FIELDS[keys[first][1]]].partition(_marker(keys[first]))[0]
    opened = re.search(r"<think>\s*$", before) if _reasons(marked[i]) else None
    kept = [len(text) for text in (own, own.lstrip()) if before.endswith(text)]
    return max(kept + [len(before) - opened.start() if opened else 0])


def _trail(message: dict, last: Key, after: str) -> int:
    """Length of what the content itself has after its last piece: a tag, blanks."""
    own = message[FIELDS[last[1]]].partition(_marker(last))[2]
    return max(len(text) for text in (own, own.rstrip(), "") if after.startswith(text))


def _tail(i: int, last: int, marked: list[dict], statics: list[str], keys: list[Key], render: Render) -> int:
    """Length of what the template writes after the content whether or not another message follows."""
    after = statics[last + 1]
    if i + 1 == len(marked):
        return len(after)
    alone, shown = _try_split(marked[: i + 1], render)
    if shown[-1:] != [keys[last]]:
        return 0
    shared = os.path.commonprefix([after, alone[-1]])
    whole = shared in (after, alone[-1])  # else it may end inside a token that two different endings happen to start with
    return len(shared) if whole else re.match(r"(.*\s)?", shared, re.DOTALL).end()


def _try_split(marked: list[dict], render: Render, **options) -> tuple[list[str], list[Key]]:
    """As _split, or nothing where the template refuses a conversation that stops here."""
    try:
        return _split(render(marked, **options))
    except ValueError:
        return [""], []


def _split(text: str) -> tuple[list[str], list[Key]]:
    return re.split(MARKER + r"m\d+f\d+p\d+e", text), _keys(text)


def _keys(text: str) -> list[Key]:
    return [tuple(map(int, match.groups())) for match in MARKERS.finditer(text)]


def _marked(i: int, message: dict) -> dict:
    """The message with a marker in place of each piece of its content; tags and blank pieces stay."""
    return message | {field: _mark(i, f, message[field]) for f, field in enumerate(FIELDS) if field in message}


def _mark(i: int, f: int, content: str) -> str:
    pieces = TAGS.split(content)
    return "".join(_marker((i, f, p)) if p % 2 == 0 and piece.strip() else piece for p, piece in enumerate(pieces))


def _marker(key: Key) -> str:
    return MARKER + "m{}f{}p{}e".format(*key)


def _shown(message: dict) -> bool:
    return any(_keys(message[field]) for field in FIELDS if field in message)


def _reasons(message: dict) -> bool:
    return FIELDS[0] in message or bool(TAGS.search(message["content"]))
